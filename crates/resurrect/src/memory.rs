//! Address spaces: the old mappings take the place of ours, at the same addresses.
//!
//! Everything here only works out which system calls do it; they are run inside the process (see [`crate::inject`]).

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use nix::errno::Errno;
use snapshot::{
    AddressSpace, Bytes, FileId, InodeId, MmLayout, PAGE_SIZE, PageRun, Prot, Vma, VmaFlags, VmaKind,
};

use crate::copy_on_write::{Kept, clip, gaps};
use crate::hugetlb;
use crate::inject::{Arg, Call, Scratch, call};

/// End of the addresses that mmap gives without being asked for more.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// Room behind the scratch area where the vDSO waits while the rest of the address space is cleared.
pub(crate) const PARKING: u64 = 256 << 10;

/// A line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MapsLine {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) prot: Prot,
    pub(crate) shared: bool,
    pub(crate) offset: u64,
    pub(crate) ino: u64,
    pub(crate) path: Bytes,
}

/// Reads /proc/PID/maps, without `[vsyscall]`.
pub(crate) fn parse_maps(text: &[u8]) -> Option<Vec<MapsLine>> {
    let lines = text.split(|&b| b == b'\n').filter(|l| !l.is_empty());
    let parsed: Option<Vec<MapsLine>> = lines.map(parse_maps_line).collect();
    Some(parsed?.into_iter().filter(|l| l.path.as_bytes() != b"[vsyscall]").collect())
}

fn parse_maps_line(line: &[u8]) -> Option<MapsLine> {
    // Five columns and a path that may contain anything.
    let mut rest = line;
    let mut column = || {
        let end = rest.iter().position(|&b| b == b' ')?;
        let text = std::str::from_utf8(&rest[..end]).ok()?;
        rest = &rest[end + 1..];
        Some(text)
    };
    let (start, end) = column()?.split_once('-')?;
    let perms = column()?.as_bytes();
    let offset = column()?;
    let _dev = column()?;
    let ino = match column() {
        Some(ino) => ino,
        None => std::str::from_utf8(rest).ok()?,
    };
    let path = rest.iter().position(|&b| b != b' ').map_or(&[][..], |i| &rest[i..]);
    let mut prot = Prot::empty();
    prot.set(Prot::READ, perms.first() == Some(&b'r'));
    prot.set(Prot::WRITE, perms.get(1) == Some(&b'w'));
    prot.set(Prot::EXEC, perms.get(2) == Some(&b'x'));
    Some(MapsLine {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        prot,
        shared: perms.get(3) == Some(&b's'),
        offset: u64::from_str_radix(offset, 16).ok()?,
        ino: ino.parse().ok()?,
        path: unescape_octal(path),
    })
}

/// /proc writes newlines (and in some files blanks and backslashes) as `\ooo`.
pub(crate) fn unescape_octal(text: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(text.len());
    let mut i = 0;
    while let Some(&b) = text.get(i) {
        let digits = text.get(i + 1..i + 4).filter(|_| b == b'\\');
        let value = digits.and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        out.push(value.unwrap_or(b));
        i += if value.is_some() { 4 } else { 1 };
    }
    Bytes(out)
}

/// The page sets that the kernel itself maps into every process: `[vdso]`, `[vvar]` and their kin.
#[derive(Clone, Debug, Default)]
pub(crate) struct Specials(Vec<(Bytes, u64, u64)>);

impl Specials {
    /// Those of a process: of this one (and of the children that it forks), or of PID 1.
    pub(crate) fn of(maps: &[MapsLine]) -> Self {
        let is_special =
            |l: &&MapsLine| l.path.as_bytes().starts_with(b"[v") && l.path.as_bytes() != b"[vsyscall]";
        Self(maps.iter().filter(is_special).map(|l| (l.path.clone(), l.start, l.end)).collect())
    }

    /// Name, first address and end of each.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Bytes, u64, u64)> {
        self.0.iter().map(|(name, start, end)| (name, *start, *end))
    }

    fn find(&self, name: &Bytes) -> Option<(u64, u64)> {
        self.0.iter().find(|(n, ..)| n == name).map(|&(_, start, end)| (start, end))
    }

    /// Where the vDSO begins.
    pub(crate) fn vdso_start(&self) -> Option<u64> {
        self.find(&"[vdso]".into()).map(|(start, _)| start)
    }

    /// Contents of the vDSO; to be asked of this process's own only.
    pub(crate) fn vdso(&self) -> Option<&'static [u8]> {
        let (start, end) = self.find(&"[vdso]".into())?;
        // SAFETY: the kernel maps the vDSO readable and we never unmap our own.
        Some(unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) })
    }
}

/// Offset of a `syscall` instruction in the vDSO (its fall-back path): no code of ours is needed in a process to make a call.
pub(crate) fn syscall_instruction(vdso: &[u8]) -> Option<u64> {
    vdso.windows(2).position(|w| w == [0x0f, 0x05]).map(|i| i as u64)
}

/// Address of the process's own vDSO.
pub(crate) fn vdso_start(mm: &AddressSpace) -> Option<u64> {
    mm.vmas
        .iter()
        .find(|v| matches!(&v.kind, VmaKind::Special { name } if name.as_bytes() == b"[vdso]"))
        .map(|v| v.start)
}

/// Why this address space cannot be rebuilt here, if so.
pub(crate) fn obstacle(mm: &AddressSpace, specials: &Specials) -> Option<String> {
    let mut last_end = 0;
    for vma in &mm.vmas {
        let at = format!("mapping {:x}-{:x}", vma.start, vma.end);
        let aligned = vma.start % PAGE_SIZE == 0 && vma.end % PAGE_SIZE == 0;
        if !aligned || vma.start >= vma.end || vma.start < last_end {
            return Some(format!("{at} is malformed"));
        }
        if vma.start < TASK_SIZE && vma.end > TASK_SIZE {
            return Some(format!("{at} reaches beyond what a program has"));
        }
        last_end = vma.end;
        for run in &vma.pages {
            let end = run.addr.checked_add(u64::from(run.count) * PAGE_SIZE);
            if run.addr < vma.start || end.is_none_or(|e| e > vma.end) {
                return Some(format!("{at}: page {:x} lies outside", run.addr));
            }
        }
        match &vma.kind {
            VmaKind::Special { name } => match specials.find(name) {
                Some((start, end)) if end - start == vma.end - vma.start => {}
                Some(_) => return Some(format!("{at}: this kernel's {name} has another size")),
                None => return Some(format!("{at}: this kernel has no {name}")),
            },
            VmaKind::Unsupported { what } => return Some(format!("{at}: {what}")),
            _ => {}
        }
    }
    vdso_start(mm).is_none().then(|| "it has no vDSO mapping".into())
}

/// A stretch of memory to be mapped with one call: neighbouring mappings that are alike in everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) prot: Prot,
    pub(crate) shared: bool,
    pub(crate) flags: VmaFlags,
    pub(crate) kind: VmaKind,
    pub(crate) name: Option<Bytes>,
}

impl Area {
    fn of(vma: &Vma) -> Self {
        Self {
            start: vma.start,
            end: vma.end,
            prot: vma.prot,
            shared: vma.shared,
            flags: vma.flags,
            kind: vma.kind.clone(),
            name: vma.name.clone(),
        }
    }

    fn len(&self) -> u64 {
        self.end - self.start
    }

    /// `next` goes on where this one ends, showing what comes next in the same object.
    pub(crate) fn continues_in(&self, next: &Area) -> bool {
        self.end == next.start
            && match (&self.kind, &next.kind) {
                (VmaKind::Anonymous, VmaKind::Anonymous) => true,
                (VmaKind::File { file: a, offset: x }, VmaKind::File { file: b, offset: y }) => {
                    a == b && x + self.len() == *y
                }
                (
                    VmaKind::SharedAnonymous { inode: a, offset: x },
                    VmaKind::SharedAnonymous { inode: b, offset: y },
                ) => a == b && x + self.len() == *y,
                (VmaKind::SysvShm { id: a, offset: x }, VmaKind::SysvShm { id: b, offset: y }) => {
                    a == b && x + self.len() == *y
                }
                _ => false,
            }
    }

    /// While memory is being poured, whatever was charged as writable is writable. What was never writable stays so: making a reservation
    /// of terabytes writable, if only for a moment, would charge it for good.
    fn prot_for_pouring(&self) -> Prot {
        // Huge pages are never charged, nor can they be written to from outside when they are not writable.
        let is_huge = self.flags.contains(VmaFlags::HUGETLB | VmaFlags::MAYWRITE);
        if !self.shared && (is_huge || self.flags.contains(VmaFlags::ACCOUNT)) {
            self.prot | Prot::WRITE
        } else {
            self.prot
        }
    }

    fn mmap_flags(&self) -> i32 {
        let mut flags = libc::MAP_FIXED_NOREPLACE;
        flags |= if self.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        for (is_so, flag) in [
            (matches!(self.kind, VmaKind::Anonymous), libc::MAP_ANONYMOUS),
            (self.flags.contains(VmaFlags::GROWSDOWN), libc::MAP_GROWSDOWN),
            (self.flags.contains(VmaFlags::NORESERVE), libc::MAP_NORESERVE),
        ] {
            flags |= if is_so { flag } else { 0 };
        }
        if let VmaKind::AioRing { .. } = self.kind {
            return libc::MAP_FIXED_NOREPLACE | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        }
        if let VmaKind::AnonymousHuge { page_size } = self.kind {
            flags |= libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | hugetlb::size_flags(page_size) as i32;
        }
        flags
    }

    /// To be given before the pages come, so that they come in the right size.
    fn page_size_advice(&self) -> impl Iterator<Item = i32> {
        let all = [(VmaFlags::HUGEPAGE, libc::MADV_HUGEPAGE), (VmaFlags::NOHUGEPAGE, libc::MADV_NOHUGEPAGE)];
        let flags = self.flags;
        all.into_iter().filter(move |(flag, _)| flags.contains(*flag)).map(|(_, advice)| advice)
    }

    /// Its pages can be written with process_vm_writev(2) while being poured.
    pub(crate) fn is_writable_for_pouring(&self) -> bool {
        !self.shared && self.prot_for_pouring().contains(Prot::WRITE)
    }
}

/// The mappings to be made, neighbours joined.
pub(crate) fn areas(mm: &AddressSpace) -> Vec<Area> {
    let mut areas: Vec<Area> = Vec::new();
    for vma in mm.vmas.iter().filter(|v| !matches!(v.kind, VmaKind::Special { .. })) {
        let next = Area::of(vma);
        match areas.last_mut() {
            Some(last)
                if last.continues_in(&next)
                    && (last.prot, last.shared, last.flags, &last.name)
                        == (next.prot, next.shared, next.flags, &next.name) =>
            {
                last.end = next.end;
            }
            _ => areas.push(next),
        }
    }
    areas
}

/// Finds an address range of `len` bytes that none of `taken` overlaps.
pub(crate) fn find_hole(len: u64, taken: &mut [(u64, u64)]) -> Option<u64> {
    const LOWEST: u64 = 0x10_0000_0000;
    taken.sort_unstable();
    let mut candidate = LOWEST;
    for &(start, end) in taken.iter() {
        if start >= candidate.checked_add(len)? {
            break;
        }
        candidate = candidate.max(end.checked_next_multiple_of(2 << 20)?);
    }
    (candidate.checked_add(len)? < TASK_SIZE).then_some(candidate)
}

fn range(start: u64, end: u64) -> String {
    format!("{start:x}-{end:x}")
}

/// Everything that is mapped goes, but the scratch area; the vDSO and its data pages move to where the old process had them.
/// What is kept stays.
pub(crate) fn clear(mm: &AddressSpace, specials: &Specials, scratch: Scratch, kept: &[Kept]) -> Vec<Call> {
    let mut calls = Vec::new();
    let mremap = |what: &Bytes, from: u64, len: u64, to: u64| {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        call!(format!("move {what}"), libc::SYS_mremap, from, len, len, flags, to)
    };
    let scratch = scratch.range();
    let parking = scratch.end;
    let mut parked = Vec::new();
    let mut end = parking;
    for vma in &mm.vmas {
        if let VmaKind::Special { name } = &vma.kind
            && let Some((start, stop)) = specials.find(name)
        {
            calls.push(mremap(name, start, stop - start, end));
            parked.push((name, end, stop - start, vma.start));
            end += stop - start;
        }
    }
    for (from, to) in [gaps(0, scratch.start, kept), gaps(end, TASK_SIZE, kept)].concat() {
        calls.push(call!("unmap", libc::SYS_munmap, from, to - from));
    }
    for (name, from, len, to) in parked {
        calls.push(mremap(name, from, len, to));
    }
    calls
}

/// Open files to map, by what the snapshot calls them.
#[derive(Clone, Copy)]
pub(crate) struct Sources<'a> {
    pub(crate) files: &'a dyn Fn(FileId) -> Option<RawFd>,
    pub(crate) shared: &'a BTreeMap<InodeId, RawFd>,
    /// Length of System V shared memory segments.
    pub(crate) segments: &'a dyn Fn(i32) -> Option<u64>,
}

/// Attaches System V shared memory, and takes away what of it the process had unmapped or protected otherwise.
fn attach(areas: &[Area], len: &dyn Fn(i32) -> Option<u64>) -> Result<Vec<Call>, String> {
    let mut attachments: BTreeMap<(u64, i32), Vec<&Area>> = BTreeMap::new();
    for area in areas {
        if let VmaKind::SysvShm { id, offset } = area.kind {
            let base =
                area.start.checked_sub(offset).ok_or("a segment that begins before the first address")?;
            attachments.entry((base, id)).or_default().push(area);
        }
    }
    let mut calls = Vec::new();
    for ((base, id), areas) in attachments {
        let len = len(id).ok_or_else(|| format!("segment {id} is not there"))?;
        let end = base.checked_add(len).ok_or("a segment that ends behind the last address")?;
        let any = |flag| areas.iter().any(|a| a.flags.contains(flag));
        let prot = areas.iter().fold(Prot::empty(), |all, area| all | area.prot);
        let mut flags = if any(VmaFlags::MAYWRITE) { 0 } else { libc::SHM_RDONLY };
        if prot.contains(Prot::EXEC) {
            flags |= libc::SHM_EXEC;
        }
        calls.push(call!(format!("attach segment {id}"), libc::SYS_shmat, id, base, flags));
        let mut at = base;
        for (start, stop) in areas.iter().map(|a| (a.start, a.end)).chain([(end, end)]) {
            if at < start {
                calls.push(call!(format!("unmap {}", range(at, start)), libc::SYS_munmap, at, start - at));
            }
            at = stop;
        }
        for area in areas {
            let what = format!("protect {}", range(area.start, area.end));
            calls.push(call!(what, libc::SYS_mprotect, area.start, area.len(), area.prot.bits()));
        }
    }
    Ok(calls)
}

/// Makes the mappings, writable where they are to be filled. `Err` names one whose file is not there.
pub(crate) fn map(areas: &[Area], sources: &Sources<'_>, kept: &[Kept]) -> Result<Vec<Call>, String> {
    // A segment is attached as a whole, and may reach where something else is to be.
    let mut calls = attach(areas, sources.segments)?;
    for area in areas {
        if let VmaKind::SysvShm { .. } = area.kind {
            continue;
        }
        let what = format!("map {}", range(area.start, area.end));
        let flags = area.mmap_flags();
        let (fd, offset) = match &area.kind {
            VmaKind::Anonymous | VmaKind::AnonymousHuge { .. } => (-1, 0),
            VmaKind::File { file, offset } => {
                ((sources.files)(*file).ok_or_else(|| format!("{what}: no file"))?, *offset)
            }
            VmaKind::SharedAnonymous { inode, offset } => {
                (*sources.shared.get(inode).ok_or_else(|| format!("{what}: no object"))?, *offset)
            }
            // Its place is kept for it.
            VmaKind::AioRing { .. } => (-1, 0),
            VmaKind::Special { .. } | VmaKind::SysvShm { .. } | VmaKind::Unsupported { .. } => {
                return Err(format!("{what}: unknown kind"));
            }
        };
        let prot = area.prot_for_pouring().bits();
        for (start, end) in gaps(area.start, area.end, kept) {
            let offset = if fd < 0 { 0 } else { offset + (start - area.start) };
            calls.push(call!(&what, libc::SYS_mmap, start, end - start, prot, flags, fd, offset));
        }
        calls.extend(area.page_size_advice().map(|advice| advise(area, advice).optional()));
    }
    Ok(calls)
}

/// Maps a part of an anonymous area in the calling process, as [`map`] would.
pub(crate) fn map_here(area: &Area, start: u64, end: u64) -> Result<(), Errno> {
    let (len, prot) = ((end - start) as usize, area.prot_for_pouring().bits() as i32);
    // SAFETY: NOREPLACE: nothing that exists is touched. Advice changes no contents.
    unsafe {
        let p = libc::mmap(start as *mut _, len, prot, area.mmap_flags(), -1, 0);
        if p == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        for advice in area.page_size_advice() {
            libc::madvise(p, len, advice);
        }
    }
    Ok(())
}

/// Takes away pages that were inherited and are not the process's.
pub(crate) fn drop_pages(ranges: &[(u64, u64)]) -> impl Iterator<Item = Call> {
    ranges.iter().map(|&(start, end)| {
        call!(
            format!("empty {}", range(start, end)),
            libc::SYS_madvise,
            start,
            end - start,
            libc::MADV_DONTNEED
        )
    })
}

fn advise(area: &Area, advice: i32) -> Call {
    let what = format!("madvise({advice}) {}", range(area.start, area.end));
    call!(what, libc::SYS_madvise, area.start, area.len(), advice)
}

/// What is left to do when the pages are in: final protection, advice, locks, names.
pub(crate) fn finish(areas: &[Area]) -> Vec<Call> {
    const ADVICE: [(VmaFlags, i32); 6] = [
        (VmaFlags::DONTCOPY, libc::MADV_DONTFORK),
        (VmaFlags::DONTDUMP, libc::MADV_DONTDUMP),
        (VmaFlags::WIPEONFORK, libc::MADV_WIPEONFORK),
        (VmaFlags::MERGEABLE, libc::MADV_MERGEABLE),
        (VmaFlags::SEQ_READ, libc::MADV_SEQUENTIAL),
        (VmaFlags::RAND_READ, libc::MADV_RANDOM),
    ];
    let mut calls = Vec::new();
    for area in areas {
        for (flag, advice) in ADVICE {
            if area.flags.contains(flag) {
                calls.push(advise(area, advice).optional());
            }
        }
        if area.flags.intersects(VmaFlags::LOCKED | VmaFlags::LOCKONFAULT) {
            let flags = if area.flags.contains(VmaFlags::LOCKONFAULT) { libc::MLOCK_ONFAULT } else { 0 };
            let what = format!("mlock {}", range(area.start, area.end));
            let lock = call!(what, libc::SYS_mlock2, area.start, area.len(), flags).optional();
            // What cannot be touched cannot be read in, which the call complains of after it has locked it.
            calls.push(if area.prot.is_empty() { lock.unheard() } else { lock });
        }
        if let Some(name) = &area.name {
            let mut text = name.as_bytes().to_vec();
            text.push(0);
            let what = format!("name {}", range(area.start, area.end));
            let (option, attr) = (libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME as u64);
            calls.push(call!(what, libc::SYS_prctl, option, attr, area.start, area.len(), text).optional());
        }
        if area.prot_for_pouring() != area.prot {
            let what = format!("protect {}", range(area.start, area.end));
            calls.push(call!(what, libc::SYS_mprotect, area.start, area.len(), area.prot.bits()));
        }
    }
    calls
}

/// prctl(PR_SET_MM_MAP): code, data, heap, stack, arguments, environment, auxiliary vector and, unless it is right already, the
/// executable.
pub(crate) fn set_layout(layout: &MmLayout, exe: Option<RawFd>) -> Call {
    let l = layout;
    let words = [
        l.start_code,
        l.end_code,
        l.start_data,
        l.end_data,
        l.start_brk,
        l.brk,
        l.start_stack,
        l.arg_start,
        l.arg_end,
        l.env_start,
        l.env_end,
        0,
    ];
    // The kernel's array is of a fixed size; the closing pair is the last one that counts.
    let pairs = l.auxv.chunks_exact(2).take(24);
    let entries = pairs.clone().position(|p| p[0] == 0).map_or(pairs.len(), |i| i + 1);
    let auxv: Vec<u8> = pairs.take(entries).flatten().flat_map(|w| w.to_ne_bytes()).collect();
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    bytes.extend((auxv.len() as u32).to_ne_bytes());
    bytes.extend(exe.unwrap_or(-1).to_ne_bytes());
    let size = bytes.len() as u64;
    let map = Arg::Data { bytes, pointers: vec![(11 * 8, auxv)] };
    let (option, sub) = (libc::PR_SET_MM, libc::PR_SET_MM_MAP);
    call!("prctl PR_SET_MM_MAP", libc::SYS_prctl, option, sub, map, size, 0u64)
}

/// Where the pages of an address space go: those of writable areas, and those that need `/proc/PID/mem`. Pages that are in place are left
/// out.
pub(crate) fn pages(mm: &AddressSpace, areas: &[Area], kept: &[Kept]) -> Vec<(bool, PageRun)> {
    let mut pages = Vec::new();
    for vma in &mm.vmas {
        let i = areas.partition_point(|a| a.end <= vma.start);
        let writable = areas.get(i).is_some_and(Area::is_writable_for_pouring);
        let mut add = |runs: Vec<PageRun>| pages.extend(runs.into_iter().map(|run| (writable, run)));
        for (start, end) in gaps(vma.start, vma.end, kept) {
            add(vma.pages.iter().filter_map(|run| clip(*run, start, end)).collect());
        }
        for kept in kept.iter().filter_map(|kept| kept.within(vma.start, vma.end)) {
            add(kept.to_pour(&vma.pages));
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64, prot: Prot, kind: VmaKind) -> Vma {
        Vma {
            start,
            end,
            prot,
            shared: false,
            flags: VmaFlags::ACCOUNT,
            kind,
            name: None,
            pages: vec![],
            lost_pages: 0,
        }
    }

    #[test]
    fn maps_lines_are_read() {
        let text = b"7f0000-7f1000 r-xp 00002000 fe:01 4711                       /usr/lib/a b\\012c.so\n\
            7f1000-7f2000 rw-s 00000000 00:01 12 \n\
            7f3000-7f4000 ---p 00000000 00:00 0\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let lines = parse_maps(text).unwrap();
        assert_eq!(lines.len(), 3);
        assert_eq!(
            (lines[0].start, lines[0].end, lines[0].offset, lines[0].ino),
            (0x7f0000, 0x7f1000, 0x2000, 4711)
        );
        assert_eq!(lines[0].prot, Prot::READ | Prot::EXEC);
        assert_eq!(lines[0].path, "/usr/lib/a b\nc.so".into());
        assert!(lines[1].shared && lines[1].path.is_empty());
        assert_eq!((lines[2].prot, lines[2].ino), (Prot::empty(), 0));
    }

    #[test]
    fn neighbours_that_are_alike_are_mapped_at_once() {
        let rw = Prot::READ | Prot::WRITE;
        let file = |offset| VmaKind::File { file: FileId(1), offset };
        let vmas = vec![
            vma(0x1000, 0x3000, rw, file(0)),
            vma(0x3000, 0x4000, rw, file(0x2000)),
            vma(0x4000, 0x5000, rw, file(0x5000)),
            vma(0x5000, 0x6000, rw, VmaKind::Anonymous),
            vma(0x6000, 0x7000, rw, VmaKind::Anonymous),
            vma(0x7000, 0x8000, Prot::READ, VmaKind::Anonymous),
        ];
        let mm = AddressSpace { vmas, ..AddressSpace::default() };
        let ranges: Vec<_> = areas(&mm).iter().map(|a| (a.start, a.end)).collect();
        assert_eq!(ranges, [(0x1000, 0x4000), (0x4000, 0x5000), (0x5000, 0x7000), (0x7000, 0x8000)]);
    }

    #[test]
    fn a_reservation_never_becomes_writable_and_charged_memory_does() {
        let reserved = Vma { flags: VmaFlags::empty(), ..vma(0, 8 << 40, Prot::empty(), VmaKind::Anonymous) };
        let relro = vma(9 << 40, (9 << 40) + 0x1000, Prot::READ, VmaKind::Anonymous);
        let mm = AddressSpace { vmas: vec![reserved, relro], ..AddressSpace::default() };
        let areas = areas(&mm);
        assert!(!areas[0].is_writable_for_pouring() && areas[1].is_writable_for_pouring());
        let calls = finish(&areas);
        assert_eq!(calls.len(), 1);
        assert!(calls[0].what.starts_with("protect 90000000000-"), "{}", calls[0].what);
    }

    #[test]
    fn holes_are_found_between_mappings() {
        let mut taken = vec![(0x20_0000_0000, 0x30_0000_0000), (0x400000, 0x10_0000_1000)];
        assert_eq!(find_hole(0x10_0000, &mut taken), Some(0x10_0020_0000));
        assert_eq!(find_hole(0x10_0000_0000, &mut taken), Some(0x30_0000_0000));
        assert_eq!(find_hole(TASK_SIZE, &mut taken), None);
    }

    #[test]
    fn malformed_address_spaces_are_refused() {
        let specials = Specials(vec![("[vdso]".into(), 0, 0x2000)]);
        let vdso = |end| vma(0x10000, end, Prot::READ, VmaKind::Special { name: "[vdso]".into() });
        let space = |vmas| AddressSpace { vmas, ..AddressSpace::default() };
        assert_eq!(obstacle(&space(vec![vdso(0x12000)]), &specials), None);
        assert!(obstacle(&space(vec![vdso(0x13000)]), &specials).unwrap().contains("another size"));
        assert!(obstacle(&space(vec![]), &specials).unwrap().contains("no vDSO"));
        let overlapping = vma(0x11000, 0x12000, Prot::READ, VmaKind::Anonymous);
        assert!(obstacle(&space(vec![vdso(0x12000), overlapping]), &specials).is_some());
        let mut stray = vma(0x20000, 0x21000, Prot::READ, VmaKind::Anonymous);
        stray.pages.push(PageRun { addr: 0x20000, pfn: 1, count: 2 });
        assert!(obstacle(&space(vec![vdso(0x12000), stray]), &specials).unwrap().contains("outside"));
    }
}
