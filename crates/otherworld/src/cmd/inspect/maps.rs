//! `inspect maps`

use snapshot::{Prot, Snapshot, SwapArea, VmaKind};

/// In the manner of /proc/PID/maps.
pub fn text(snapshot: &Snapshot, mm: &snapshot::AddressSpace) -> String {
    let mut out = String::new();
    for vma in &mm.vmas {
        let bit = |prot, letter| if vma.prot.contains(prot) { letter } else { '-' };
        let (offset, inode, name) = match &vma.kind {
            VmaKind::File { file, offset } => {
                let file = snapshot.files.get(file);
                let inode = file.and_then(|f| snapshot.inodes.get(&f.inode)).map_or(0, |i| i.ino);
                let name = file.map(|f| format!("{}{}", f.path, if f.deleted { " (deleted)" } else { "" }));
                (*offset, inode, name.unwrap_or_else(|| "(unknown file)".into()))
            }
            VmaKind::AioRing { .. } => (0, 0, "/[aio] (deleted)".into()),
            VmaKind::AnonymousHuge { .. } => (0, 0, "/anon_hugepage (deleted)".into()),
            VmaKind::Anonymous => (0, 0, special_name(mm, vma.start, vma.end)),
            VmaKind::SharedAnonymous { offset, .. } => (*offset, 0, "/dev/zero (deleted)".into()),
            VmaKind::SysvShm { id, offset } => {
                (*offset, *id as u64, snapshot.shm_segment(*id).map(|s| s.file_name()).unwrap_or_default())
            }
            VmaKind::Special { name } => (0, 0, name.to_string()),
            VmaKind::Unsupported { what } => (0, 0, format!("({what})")),
        };
        let name = vma.name.as_ref().map_or(name, |n| format!("[anon:{n}]"));
        let pages: u64 = vma.pages.iter().map(|r| u64::from(r.count)).sum();
        let in_swap = vma.pages.iter().filter(|r| SwapArea::slot_of(r.pfn).is_some());
        let swapped: u64 = in_swap.map(|r| u64::from(r.count)).sum();
        let row = format!(
            "{:012x}-{:012x} {}{}{}{} {offset:08x} {inode:>8} {pages:>7} {swapped:>5}  {name}",
            vma.start,
            vma.end,
            bit(Prot::READ, 'r'),
            bit(Prot::WRITE, 'w'),
            bit(Prot::EXEC, 'x'),
            if vma.shared { 's' } else { 'p' },
        );
        out.push_str(row.trim_end());
        out.push('\n');
    }
    out
}

fn special_name(mm: &snapshot::AddressSpace, start: u64, end: u64) -> String {
    let layout = &mm.layout;
    if start <= layout.brk && end >= layout.start_brk && layout.brk > layout.start_brk {
        "[heap]".into()
    } else if start <= layout.start_stack && end > layout.start_stack {
        "[stack]".into()
    } else {
        String::new()
    }
}
