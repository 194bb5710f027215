//! Pouring: page frames of the dead memory go to their owners, in physical order.
//!
//! One [`ReverseMap`] says for each needed frame who owns it and where. The dead memory is walked once from low to high,
//! block by block; within a block the frames of each owner are collected and copied with few system calls. A frame with
//! several owners (copy-on-write after fork, shared memory) is read once and copied to each: this is where sharing such
//! frames again belongs. When a block has been poured nothing in it is needed any more, and the caller is told so, so
//! that it can be given to the new kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use snapshot::{PAGE_SIZE, PageRun, PhysMem, PhysRange, Pid};

use crate::sys;

/// Bytes of physical memory that are mapped at a time: the unit in which Linux adds memory.
pub(crate) const BLOCK: u64 = 128 << 20;
const FRAMES_PER_BLOCK: u64 = BLOCK / PAGE_SIZE;
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
            let n = count.min((FRAMES_PER_BLOCK - pfn % FRAMES_PER_BLOCK) as u32);
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
                result.fail(first.owner, format!("page frame {:#x} is not in the dump", first.pfn));
                rest = &rest[1..];
                continue;
            };
            let block = first.pfn / FRAMES_PER_BLOCK;
            let here =
                |e: &&Entry| e.pfn / FRAMES_PER_BLOCK == block && range_of(mem.ranges(), e) == Some(range);
            let n = rest.iter().take_while(here).count();
            let (group, tail) = rest.split_at(n);
            rest = tail;
            let start = first.pfn * PAGE_SIZE;
            let end = group.iter().map(|e| (e.pfn + u64::from(e.count)) * PAGE_SIZE).max().unwrap_or(start);
            match mem.map(start, (end - start) as usize) {
                Ok(bytes) => self.pour_group(group, start, &bytes, &mut result),
                Err(e) => group.iter().for_each(|entry| result.fail(entry.owner, e.to_string())),
            }
            poured(PhysRange { start, len: end - start });
        }
        result
    }

    fn pour_group(&self, group: &[Entry], start: u64, bytes: &[u8], result: &mut Poured) {
        let mut batches: BTreeMap<OwnerId, Batch> = BTreeMap::new();
        for entry in group.iter() {
            let offset = (entry.pfn * PAGE_SIZE - start) as usize;
            let source = &bytes[offset..][..entry.count as usize * PAGE_SIZE as usize];
            match &self.owners[entry.owner.0 as usize] {
                Owner::Process(pid) => {
                    let batch = batches.entry(entry.owner).or_default();
                    if !batch.push(source, entry.addr) {
                        batch.flush(*pid, entry.owner, result);
                        batch.push(source, entry.addr);
                    }
                }
                Owner::Mem(file) => match file.write_all_at(source, entry.addr) {
                    Ok(()) => result.bytes += source.len() as u64,
                    Err(e) => result.fail(entry.owner, format!("write to {:#x}: {e}", entry.addr)),
                },
                Owner::Here { start, len } => {
                    let at = entry.addr as usize;
                    if at.checked_add(source.len()).is_none_or(|end| end > *len) {
                        result.fail(entry.owner, format!("page at offset {at:#x} lies behind its end"));
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
        for (owner, mut batch) in batches {
            if let Owner::Process(pid) = self.owners[owner.0 as usize] {
                batch.flush(pid, owner, result);
            }
        }
    }
}

impl Poured {
    fn fail(&mut self, owner: OwnerId, why: String) {
        self.failed.entry(owner).or_insert(why);
    }
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
