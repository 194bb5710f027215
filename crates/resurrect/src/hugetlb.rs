//! Pools of huge pages (hugetlb).

use std::collections::BTreeSet;

use snapshot::{HugePages, InodeId, PAGE_SIZE, Process, Snapshot, VmaFlags, VmaKind};

use crate::{FileStale, sys};

/// Of the memory that is free, the part that huge pages may take.
const SHARE: u64 = 2;

/// Fills the pools as the dead kernel had them or, where there is not the memory for it, with the pages that are needed; not at all when nobody
/// who comes back needs one. Returns those that are smaller than they were.
pub(crate) fn fill_pools(snapshot: &Snapshot, processes: &[&Process]) -> Vec<FileStale> {
    let room = sys::available_memory() / SHARE;
    snapshot
        .huge_pages
        .iter()
        .filter_map(|pool| fill(pool, needed(snapshot, processes, pool.page_size), room))
        .collect()
}

/// `room`: bytes.
fn fill(pool: &HugePages, needed: u64, room: u64) -> Option<FileStale> {
    let path = format!("/sys/kernel/mm/hugepages/{}/nr_hugepages", pool.name());
    let have = || -> u64 {
        let text = sys::read_proc(&path).unwrap_or_default();
        String::from_utf8_lossy(&text).trim().parse().unwrap_or(0)
    };
    let wanted = wanted(pool.total, needed, room / pool.page_size.max(1));
    let written = if wanted > have() { sys::write_proc(&path, &wanted.to_string()) } else { Ok(()) };
    let have = have();
    let why = match written {
        _ if have >= pool.total => return None,
        Err(e) => format!("it cannot be filled: {e}"),
        Ok(()) if needed == 0 => "nobody who comes back has any".into(),
        Ok(()) => "there is not the memory for more".into(),
    };
    let why =
        format!("the pool has {have} pages instead of {}, of which {needed} are needed: {why}", pool.total);
    Some(FileStale { path: path.as_str().into(), why })
}

/// Of `room` pages, beyond which it would take what processes need otherwise.
fn wanted(total: u64, needed: u64, room: u64) -> u64 {
    match needed {
        0 => 0,
        _ if total <= room => total.max(needed).min(room),
        _ => needed.min(room),
    }
}

/// How many pages of this size those who come back need, and what is there without anybody.
fn needed(snapshot: &Snapshot, processes: &[&Process], page_size: u64) -> u64 {
    let mut private = 0u64;
    // Those of a file that is mapped are promised to it as a whole.
    let (mut mapped, mut files): (BTreeSet<InodeId>, BTreeSet<InodeId>) = Default::default();
    let spaces = processes.iter().filter_map(|p| snapshot.address_spaces.get(p.address_space.as_ref()?));
    for vma in spaces.flat_map(|mm| &mm.vmas) {
        let len = (vma.end - vma.start) / page_size;
        match &vma.kind {
            VmaKind::AnonymousHuge { page_size: own } if *own == page_size => private += len,
            VmaKind::SharedAnonymous { inode, .. } => _ = mapped.insert(*inode),
            VmaKind::File { file, .. } if vma.flags.contains(VmaFlags::HUGETLB) => {
                mapped.extend(snapshot.files.get(file).map(|file| file.inode));
                private += if vma.shared { 0 } else { len };
            }
            _ => {}
        }
    }
    let descriptors = processes.iter().flat_map(|p| &p.descriptors);
    files.extend(descriptors.filter_map(|d| snapshot.files.get(&d.file)).map(|file| file.inode));
    files.extend(snapshot.ipc.shm.iter().map(|segment| segment.inode));
    files.extend(snapshot.tmpfs.iter().flat_map(|t| &t.entries).map(|entry| entry.inode));
    let of_size = |id: &InodeId| snapshot.inodes.get(id).filter(|inode| inode.huge_page == Some(page_size));
    let whole = mapped.iter().filter_map(of_size).map(|inode| inode.size.div_ceil(page_size));
    let parts = files.difference(&mapped).filter_map(of_size).map(|inode| {
        inode.pages.iter().map(|run| u64::from(run.count) * PAGE_SIZE).sum::<u64>().div_ceil(page_size)
    });
    whole.chain(parts).fold(private, u64::saturating_add)
}

/// What tells mmap(2), memfd_create(2) and shmget(2) the size of the pages (MAP_HUGE_SHIFT and its kin).
pub(crate) fn size_flags(page_size: u64) -> u32 {
    page_size.trailing_zeros() << libc::MAP_HUGE_SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_filled_for_somebody_and_within_the_room_there_is() {
        assert_eq!(wanted(100, 0, 1000), 0, "nobody needs it");
        assert_eq!(wanted(100, 10, 1000), 100, "as it was");
        assert_eq!(wanted(100, 10, 50), 10);
        assert_eq!(wanted(100, 80, 50), 50);
        assert_eq!(wanted(5, 8, 50), 8, "private memory that was not touched yet is promised its pages now");
    }

    #[test]
    fn sizes_are_told_by_their_logarithm() {
        assert_eq!(size_flags(2 << 20), libc::MAP_HUGE_2MB as u32);
        assert_eq!(size_flags(1 << 30), libc::MAP_HUGE_1GB as u32);
    }
}
