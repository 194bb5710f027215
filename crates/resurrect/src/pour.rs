//! Pouring: page frames of the dead memory go to their owners, in physical order.
//!
//! One [`ReverseMap`] says for each needed frame who owns it and where. The dead memory is walked once from low to high,
//! block by block; within a block the frames of each owner are collected and copied with few system calls. A frame with
//! several owners (copy-on-write after fork, shared memory) is copied to each while its block is mapped: this is where sharing such
//! frames again belongs. When a block has been poured nothing in it is needed any more, and the caller is told so, so
//! that it can be given to the new kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use snapshot::{FIRST_SWAP_FRAME, PAGE_SIZE, PageRun, PhysMap, PhysMem, PhysRange, Pid, SwapArea};

use crate::sys;

/// Bytes of physical memory that are mapped at a time: the unit in which Linux adds memory.
pub(crate) const BLOCK: u64 = 128 << 20;
const FRAMES_PER_BLOCK: u64 = BLOCK / PAGE_SIZE;
/// Of a swap area, fewer: they are not mapped, but read.
const SLOTS_PER_BLOCK: u64 = (8 << 20) / PAGE_SIZE;
/// What lies between two needed frames is mapped with them up to this size. The dead memory is mapped page by page when it is asked for:
/// mapping and unmapping this much takes as long as another call.
const MAX_GAP: u64 = 64 * PAGE_SIZE;
/// Ranges per call (UIO_MAXIOV).
const MAX_IOV: usize = 1024;

/// Somebody whose memory is filled.
#[derive(Debug)]
pub(crate) enum Owner {
    /// A process whose mapping is writable.
    Process(Pid),
    /// A process through `/proc/PID/mem`, which also writes to private mappings that are not writable.
    Mem(File),
    /// A mapping of our own, `len` bytes at `start`; addresses are offsets into it.
    Here { start: *mut u8, len: usize },
}

/// Index of an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OwnerId(u32);

#[derive(Clone, Copy, Debug)]
struct Entry {
    pfn: u64,
    addr: u64,
    count: u32,
    owner: OwnerId,
}

impl Entry {
    fn start(&self) -> u64 {
        self.pfn * PAGE_SIZE
    }
    fn end(&self) -> u64 {
        self.start() + self.len() as u64
    }
    fn len(&self) -> usize {
        self.count as usize * PAGE_SIZE as usize
    }
}

/// Frame → every owner and address.
#[derive(Debug, Default)]
pub(crate) struct ReverseMap {
    owners: Vec<Owner>,
    entries: Vec<Entry>,
}

/// What pouring did.
#[derive(Debug, Default)]
pub(crate) struct Poured {
    /// Bytes copied, each copy counted.
    pub(crate) bytes: u64,
    /// Owners that did not get all of their pages, with the first reason.
    pub(crate) failed: BTreeMap<OwnerId, String>,
}

impl ReverseMap {
    pub(crate) fn owner(&mut self, owner: Owner) -> OwnerId {
        self.owners.push(owner);
        OwnerId((self.owners.len() - 1) as u32)
    }

    /// The frames of `run` belong to `owner`.
    pub(crate) fn add(&mut self, owner: OwnerId, run: PageRun) {
        let PageRun { mut addr, mut pfn, mut count } = run;
        while count > 0 {
            let size = block_size(pfn);
            let n = count.min((size - pfn % size) as u32);
            self.entries.push(Entry { pfn, addr, count: n, owner });
            addr = addr.wrapping_add(u64::from(n) * PAGE_SIZE);
            pfn = pfn.wrapping_add(n.into());
            count -= n;
        }
    }

    /// Copies everything. `poured` is called after each block, with the part of it that had been mapped.
    pub(crate) fn pour(mut self, mem: &dyn PhysMem, poured: &mut dyn FnMut(PhysRange)) -> Poured {
        let mut result = Poured::default();
        self.entries.sort_unstable_by_key(|e| (e.pfn, e.owner, e.addr));
        let mut rest = self.entries.as_slice();
        while let Some(first) = rest.first() {
            let Some(range) = range_of(mem.ranges(), first) else {
                result.fail(first.owner, not_there(first.pfn));
                rest = &rest[1..];
                continue;
            };
            let size = block_size(first.pfn);
            let here =
                |e: &&Entry| e.pfn / size == first.pfn / size && range_of(mem.ranges(), e) == Some(range);
            let n = rest.iter().take_while(here).count();
            let (group, tail) = rest.split_at(n);
            rest = tail;
            let start = first.pfn * PAGE_SIZE;
            let end = group.iter().map(Entry::end).max().unwrap_or(start);
            self.pour_group(group, mem, &mut result);
            poured(PhysRange { start, len: end - start });
        }
        result
    }

    /// Copies the frames of one block: owner after owner, each in the order of its addresses. What is in one piece there is the kernel's
    /// to fill in one go, from wherever the frames lie in the block; that is twice as fast as page by page.
    fn pour_group(&self, group: &[Entry], mem: &dyn PhysMem, result: &mut Poured) {
        let (mut pieces, mut group) = (Vec::new(), group.to_vec());
        for piece in pieces_of(&group) {
            match mem.map(piece.start, piece.len as usize) {
                Ok(bytes) => pieces.push((piece, bytes)),
                Err(e) => {
                    let within = |at: &Entry| (piece.start..piece.start + piece.len).contains(&at.start());
                    group
                        .iter()
                        .filter(|e| within(e))
                        .for_each(|entry| result.fail(entry.owner, e.to_string()));
                    group.retain(|entry| !within(entry));
                }
            }
        }
        group.sort_unstable_by_key(|e| (e.owner, e.addr));
        for entries in group.chunk_by(|a, b| a.owner == b.owner) {
            let Some(Entry { owner: id, .. }) = entries.first() else { continue };
            let mut sources = Vec::with_capacity(entries.len());
            for entry in entries {
                match source(&pieces, entry) {
                    Some(bytes) => sources.push((bytes, entry.addr)),
                    None => result.fail(*id, format!("page frame {:#x} is not mapped", entry.pfn)),
                }
            }
            match &self.owners[id.0 as usize] {
                Owner::Process(pid) => {
                    let mut batch = Batch::default();
                    for (source, addr) in sources {
                        if !batch.push(source, addr) {
                            batch.flush(*pid, *id, result);
                            batch.push(source, addr);
                        }
                    }
                    batch.flush(*pid, *id, result);
                }
                Owner::Mem(file) => {
                    for (source, addr) in sources {
                        match file.write_all_at(source, addr) {
                            Ok(()) => result.bytes += source.len() as u64,
                            Err(e) => result.fail(*id, format!("write to {addr:#x}: {e}")),
                        }
                    }
                }
                Owner::Here { start, len } => {
                    for (source, addr) in sources {
                        let at = addr as usize;
                        if at.checked_add(source.len()).is_none_or(|end| end > *len) {
                            result.fail(*id, format!("page at offset {at:#x} lies behind its end"));
                            continue;
                        }
                        // SAFETY: whoever made the owner promises `len` writable bytes at `start`; the range has just been checked;
                        // `source` is another mapping.
                        unsafe {
                            std::ptr::copy_nonoverlapping(source.as_ptr(), start.add(at), source.len());
                        }
                        result.bytes += source.len() as u64;
                    }
                }
            }
        }
    }
}

impl Poured {
    fn fail(&mut self, owner: OwnerId, why: String) {
        self.failed.entry(owner).or_insert(why);
    }
}

/// How many frames are mapped at a time, from a multiple of it on.
fn block_size(pfn: u64) -> u64 {
    if pfn < FIRST_SWAP_FRAME { FRAMES_PER_BLOCK } else { SLOTS_PER_BLOCK }
}

fn not_there(pfn: u64) -> String {
    match SwapArea::slot_of(pfn) {
        None => format!("page frame {pfn:#x} is not in the dump"),
        Some((area, slot)) => format!("slot {slot} of swap area {area} cannot be read"),
    }
}

/// The parts of a block that have to be mapped for `entries`, which are in physical order.
fn pieces_of(entries: &[Entry]) -> Vec<PhysRange> {
    let mut pieces: Vec<PhysRange> = Vec::new();
    for entry in entries {
        match pieces.last_mut() {
            Some(last) if entry.start() <= last.start + last.len + MAX_GAP => {
                last.len = last.len.max(entry.end() - last.start);
            }
            _ => pieces.push(PhysRange { start: entry.start(), len: entry.len() as u64 }),
        }
    }
    pieces
}

/// The frames of an entry in the piece that holds them.
fn source<'a>(pieces: &'a [(PhysRange, PhysMap<'_>)], entry: &Entry) -> Option<&'a [u8]> {
    let after = pieces.partition_point(|(piece, _)| piece.start <= entry.start());
    let (piece, bytes) = pieces.get(after.checked_sub(1)?)?;
    let offset = (entry.start() - piece.start) as usize;
    bytes.get(offset..offset + entry.len())
}

fn range_of(ranges: &[PhysRange], e: &Entry) -> Option<usize> {
    let start = e.pfn.checked_mul(PAGE_SIZE)?;
    let i = ranges.partition_point(|r| r.start <= start).checked_sub(1)?;
    let range = ranges.get(i)?;
    (start - range.start + u64::from(e.count) * PAGE_SIZE <= range.len).then_some(i)
}

/// Copies that one process is to get with one system call.
#[derive(Default)]
struct Batch {
    local: Vec<libc::iovec>,
    remote: Vec<libc::iovec>,
    bytes: usize,
}

impl Batch {
    /// Adds a copy; false when there is no room.
    fn push(&mut self, source: &[u8], addr: u64) -> bool {
        if self.local.len() == MAX_IOV || self.remote.len() == MAX_IOV {
            return false;
        }
        append(&mut self.local, source.as_ptr() as usize, source.len());
        append(&mut self.remote, addr as usize, source.len());
        self.bytes += source.len();
        true
    }

    fn flush(&mut self, pid: Pid, owner: OwnerId, result: &mut Poured) {
        if self.bytes == 0 {
            return;
        }
        // SAFETY: the local ranges are slices of the block that is mapped until the group is done.
        let written = unsafe { sys::write_memory(pid, &self.local, &self.remote) };
        match written {
            Ok(n) if n == self.bytes => result.bytes += n as u64,
            Ok(n) => {
                let at = address_after(&self.remote, n);
                result.fail(owner, format!("memory at {at:#x} cannot be written"));
            }
            Err(e) => result.fail(owner, format!("process_vm_writev: {e}")),
        }
        *self = Self::default();
    }
}

/// Appends a range, or lengthens the last one when it goes on there.
fn append(iov: &mut Vec<libc::iovec>, start: usize, len: usize) {
    match iov.last_mut() {
        Some(last) if last.iov_base as usize + last.iov_len == start => last.iov_len += len,
        _ => iov.push(libc::iovec { iov_base: start as *mut _, iov_len: len }),
    }
}

fn address_after(iov: &[libc::iovec], mut n: usize) -> usize {
    for i in iov {
        if n < i.iov_len {
            return i.iov_base as usize + n;
        }
        n -= i.iov_len;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::{PhysMap, PhysMemError};

    /// 16 frames at each of two places, frame contents = low byte of the frame number.
    struct Mem {
        bytes: Vec<Vec<u8>>,
        ranges: Vec<PhysRange>,
    }

    impl Mem {
        fn new(starts: &[u64]) -> Self {
            let bytes =
                starts.iter().map(|s| (0..16).flat_map(|i| [(s / PAGE_SIZE + i) as u8; 4096]).collect());
            let ranges = starts.iter().map(|&start| PhysRange { start, len: 16 * PAGE_SIZE }).collect();
            Self { bytes: bytes.collect(), ranges }
        }
    }

    impl PhysMem for Mem {
        fn ranges(&self) -> &[PhysRange] {
            &self.ranges
        }
        fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
            let absent = || PhysMemError::NotPresent { addr, len: len as u64 };
            let i = self.ranges.iter().position(|r| (r.start..r.start + r.len).contains(&addr));
            let i = i.ok_or_else(absent)?;
            let at = (addr - self.ranges[i].start) as usize;
            self.bytes[i].get(at..at + len).map(PhysMap::borrowed).ok_or_else(absent)
        }
    }

    fn here(buf: &mut [u8]) -> Owner {
        Owner::Here { start: buf.as_mut_ptr(), len: buf.len() }
    }

    #[test]
    fn frames_reach_all_their_owners_across_blocks() {
        // The first range touches a block boundary.
        let mem = Mem::new(&[BLOCK - 4 * PAGE_SIZE, 5 * BLOCK]);
        let pfn = (BLOCK / PAGE_SIZE) - 4;
        let (mut a, mut b) = (vec![0u8; 16 * 4096], vec![0u8; 4096]);
        let mut map = ReverseMap::default();
        let (oa, ob) = (map.owner(here(&mut a)), map.owner(here(&mut b)));
        map.add(oa, PageRun { addr: 0, pfn: pfn + 2, count: 8 });
        map.add(oa, PageRun { addr: 12 * 4096, pfn: 5 * BLOCK / PAGE_SIZE + 1, count: 1 });
        map.add(ob, PageRun { addr: 0, pfn: pfn + 3, count: 1 });
        let mut blocks = Vec::new();
        let poured = map.pour(&mem, &mut |r| blocks.push(r.start));
        assert!(poured.failed.is_empty(), "{poured:?}");
        assert_eq!(poured.bytes, 10 * 4096);
        for i in 0..8 {
            assert_eq!(a[i * 4096], (pfn as usize + 2 + i) as u8);
        }
        assert_eq!(a[12 * 4096], (5 * BLOCK / PAGE_SIZE + 1) as u8);
        assert_eq!(b[0], (pfn + 3) as u8);
        assert_eq!(blocks, [BLOCK - 2 * PAGE_SIZE, BLOCK, 5 * BLOCK + PAGE_SIZE]);
    }

    #[test]
    fn scattered_frames_come_from_pieces_of_their_block() {
        let mem = Mem::new(&[0x10_0000, 0x80_0000]);
        // Out of order, with a gap that is mapped along and one that is not.
        let frames = [0x805, 0x100, 0x10f, 0x800, 0x104, 0x105];
        let (mut a, mut b) = (vec![0u8; frames.len() * 4096], vec![0u8; 2 * 4096]);
        let mut map = ReverseMap::default();
        let (oa, ob) = (map.owner(here(&mut a)), map.owner(here(&mut b)));
        for (at, pfn) in frames.into_iter().enumerate() {
            map.add(oa, PageRun { addr: at as u64 * 4096, pfn, count: 1 });
        }
        map.add(ob, PageRun { addr: 0, pfn: 0x104, count: 2 });
        let poured = map.pour(&mem, &mut |_| {});
        assert!(poured.failed.is_empty(), "{poured:?}");
        assert_eq!(poured.bytes, (frames.len() as u64 + 2) * 4096);
        let first = |bytes: &[u8]| bytes.chunks(4096).map(|page| page[0]).collect::<Vec<_>>();
        assert_eq!(first(&a), frames.map(|pfn| pfn as u8));
        assert_eq!(first(&b), [4, 5]);
    }

    #[test]
    fn what_lies_far_apart_is_mapped_apart() {
        let entry = |pfn, count| Entry { pfn, addr: 0, count, owner: OwnerId(0) };
        let pieces = pieces_of(&[entry(10, 2), entry(12 + 64, 1), entry(12 + 64, 3), entry(80 + 64, 1)]);
        let starts: Vec<(u64, u64)> =
            pieces.iter().map(|p| (p.start / PAGE_SIZE, p.len / PAGE_SIZE)).collect();
        assert_eq!(starts, [(10, 69), (144, 1)]);
    }

    #[test]
    fn an_owner_whose_frame_is_not_there_fails_alone() {
        let mem = Mem::new(&[0x10000]);
        let (mut a, mut b) = (vec![0u8; 4096], vec![0u8; 4096]);
        let mut map = ReverseMap::default();
        let (oa, ob) = (map.owner(here(&mut a)), map.owner(here(&mut b)));
        map.add(oa, PageRun { addr: 0, pfn: 0x12, count: 1 });
        map.add(ob, PageRun { addr: 0, pfn: 0x1f, count: 2 });
        let poured = map.pour(&mem, &mut |_| {});
        assert_eq!(poured.failed.keys().collect::<Vec<_>>(), [&ob]);
        assert_eq!(a[0], 0x12);
    }

    #[test]
    fn writing_behind_the_end_of_an_owner_is_refused() {
        let mem = Mem::new(&[0x10000]);
        let mut a = vec![0u8; 4096];
        let mut map = ReverseMap::default();
        let oa = map.owner(here(&mut a));
        map.add(oa, PageRun { addr: 0, pfn: 0x12, count: 2 });
        assert_eq!(map.pour(&mem, &mut |_| {}).failed.len(), 1);
    }
}
