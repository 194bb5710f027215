//! A core file's memory, through mapped windows.
//!
//! Reads of kernel structures must be copies out of a mapping, not system calls. Mapping all of
//! `/proc/vmcore` at once is too dear: it is mapped with 4 KiB entries right at mmap(2), 2 MiB of
//! page tables per GiB, in a crash kernel that may have 200 MiB. So it is mapped in windows as
//! they are needed, and the number of windows is bounded. What is often needed (the kernel's data,
//! its slabs) lies in few of them.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use memmap2::{Advice, Mmap, MmapOptions};

use crate::elf::{self, Segment};
use crate::{Error, PhysMap, PhysRange, PhysicalMemory, Result};

/// Bytes of a window: a multiple of the page size. 8 KiB of page tables each.
const WINDOW: u64 = 4 << 20;

/// Windows mapped at the same time: 4 GiB in all, at most 8 MiB of page tables.
const MAX_WINDOWS: usize = 1024;

const PAGE: u64 = 4096;

pub(crate) struct FileMemory {
    file: File,
    path: PathBuf,
    /// What the headers promise; sorted, disjoint.
    promised: Vec<PhysRange>,
    segments: Vec<MappedSegment>,
    ranges: Vec<PhysRange>,
    /// The mapped windows, oldest first, as (segment, window).
    order: Mutex<VecDeque<(usize, usize)>>,
    max_windows: usize,
}

struct MappedSegment {
    segment: Segment,
    /// Window i covers the bytes from i * WINDOW to (i + 1) * WINDOW of the segment.
    windows: Box<[Window]>,
}

#[derive(Default)]
struct Window {
    /// The mapping, and how far into it the window's first byte is (file offsets need not be
    /// multiples of the page size).
    map: RwLock<Option<(Arc<Mmap>, usize)>>,
    /// Used since the last look by the eviction.
    used: AtomicBool,
}

impl FileMemory {
    /// `present` are the parts of `promised` that lie within the file.
    pub fn new(file: File, path: &Path, promised: Vec<Segment>, present: Vec<Segment>) -> Self {
        let ranges = elf::ranges(&present);
        let segments = present
            .into_iter()
            .map(|segment| MappedSegment {
                segment,
                windows: (0..segment.len.div_ceil(WINDOW)).map(|_| Window::default()).collect(),
            })
            .collect();
        FileMemory {
            file,
            path: path.to_owned(),
            promised: elf::ranges(&promised),
            segments,
            ranges,
            order: Mutex::default(),
            max_windows: MAX_WINDOWS,
        }
    }

    /// The segment that holds `addr`.
    fn find(&self, addr: u64) -> Result<usize> {
        let after = self.ranges.partition_point(|range| range.start <= addr);
        match after.checked_sub(1) {
            Some(i) if self.ranges[i].contains(addr) => Ok(i),
            _ => Err(self.missing(addr)),
        }
    }

    fn missing(&self, addr: u64) -> Error {
        if self.promised.iter().any(|range| range.contains(addr)) {
            Error::Truncated { addr }
        } else {
            Error::NotInCore { addr }
        }
    }

    /// Maps `len` bytes at `skip` bytes into a segment; the caller has checked that the segment
    /// has them, so they are within the file.
    fn map(&self, segment: &Segment, skip: u64, len: u64) -> Result<(Arc<Mmap>, usize)> {
        let start = segment.file_offset + skip;
        let lead = start % PAGE;
        // SAFETY: the mapping is private and read-only, and the dead machine's memory does not
        // change. For a file on disk, whoever truncates or rewrites it while we read breaks that,
        // as with every memory-mapped file; it was not truncated when it was opened, and we never
        // map beyond the size that it had.
        let map =
            unsafe { MmapOptions::new().offset(start - lead).len((len + lead) as usize).map(&self.file) }
                .map_err(|source| Error::Io { path: self.path.clone(), action: "map", source })?;
        // Children of the tool have no use for it, and copying its page tables makes fork slow.
        // A kernel that refuses only makes forks slower.
        let _ = map.advise(Advice::DontFork);
        Ok((Arc::new(map), lead as usize))
    }

    /// The window's mapping, if there is one.
    fn mapped(&self, segment: usize, window: usize) -> Option<(Arc<Mmap>, usize)> {
        let slot = &self.segments[segment].windows[window];
        slot.used.store(true, Ordering::Relaxed);
        slot.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The window's mapping, made now if need be.
    fn window(&self, segment: usize, window: usize) -> Result<(Arc<Mmap>, usize)> {
        let MappedSegment { segment: at, windows } = &self.segments[segment];
        let slot = &windows[window];
        if let Some(map) = self.mapped(segment, window) {
            return Ok(map);
        }
        // One thread maps at a time; readers of mapped windows go on.
        let mut mapped = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = &*slot.map.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(map.clone());
        }
        while mapped.len() >= self.max_windows {
            let Some((s, w)) = mapped.pop_front() else { break };
            let oldest = &self.segments[s].windows[w];
            if oldest.used.swap(false, Ordering::Relaxed) {
                mapped.push_back((s, w));
            } else {
                // Whoever still reads from it holds the mapping itself.
                *oldest.map.write().unwrap_or_else(PoisonError::into_inner) = None;
            }
        }
        let skip = window as u64 * WINDOW;
        let made = self.map(at, skip, WINDOW.min(at.len - skip))?;
        *slot.map.write().unwrap_or_else(PoisonError::into_inner) = Some(made.clone());
        mapped.push_back((segment, window));
        Ok(made)
    }
}

impl PhysicalMemory for FileMemory {
    fn read_phys(&self, addr: u64, buf: &mut [u8]) -> Result<()> {
        let total = buf.len();
        let mut done = 0;
        while done < total {
            let at = addr.checked_add(done as u64).ok_or(Error::Overflow { addr, len: total })?;
            let i = self.find(at)?;
            let skip = at - self.segments[i].segment.phys;
            let (map, lead) = self.window(i, (skip / WINDOW) as usize)?;
            let bytes = &map[lead + (skip % WINDOW) as usize..];
            let n = bytes.len().min(total - done);
            buf[done..done + n].copy_from_slice(&bytes[..n]);
            done += n;
        }
        Ok(())
    }

    fn map_phys(&self, addr: u64, len: usize) -> Result<PhysMap<'_>> {
        let i = self.find(addr)?;
        let range = self.ranges[i];
        let end = addr.checked_add(len as u64).ok_or(Error::Overflow { addr, len })?;
        if end > range.end() {
            return Err(self.missing(range.end()));
        }
        let skip = addr - range.start;
        // A window that is there serves; making one would map much that nobody may ever ask for.
        let there = if skip % WINDOW + len as u64 <= WINDOW {
            self.mapped(i, (skip / WINDOW) as usize)
        } else {
            None
        };
        let (map, start) = match there {
            Some((map, lead)) => (map, lead + (skip % WINDOW) as usize),
            None => self.map(&self.segments[i].segment, skip, len as u64)?,
        };
        Ok(PhysMap::window(map, start..start + len))
    }

    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn after_fork(&self) {
        let windows = self.segments.iter().flat_map(|segment| &segment.windows);
        for window in windows {
            // It is not there (MADV_DONTFORK), and something else may be by now: nothing must be unmapped.
            std::mem::forget(window.map.write().unwrap_or_else(PoisonError::into_inner).take());
        }
        self.order.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// The byte that stands at a physical address in these tests.
    fn byte(addr: u64) -> u8 {
        (addr.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    /// Memory of `mib` MiB at 1 MiB, at an unaligned place in a file.
    fn memory(mib: u64, max_windows: usize) -> FileMemory {
        let segment = Segment { phys: 1 << 20, len: mib << 20, file_offset: 777 };
        let mut bytes = vec![0; 777];
        bytes.extend((segment.phys..segment.phys + segment.len).map(byte));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let mut memory = FileMemory::new(file, Path::new("test"), vec![segment], vec![segment]);
        memory.max_windows = max_windows;
        memory
    }

    fn check(memory: &FileMemory, addr: u64, len: usize) {
        let expected: Vec<u8> = (addr..addr + len as u64).map(byte).collect();
        let mut buf = vec![0; len];
        memory.read_phys(addr, &mut buf).unwrap();
        assert!(buf == expected, "read of {len:#x} at {addr:#x}");
        assert!(*memory.map_phys(addr, len).unwrap() == expected[..], "map of {len:#x} at {addr:#x}");
    }

    #[test]
    fn reads_within_and_across_windows() {
        let memory = memory(10, 64);
        let base = 1 << 20;
        for (skip, len) in [(0, 1), (5, 4096), (WINDOW - 3, 6), (WINDOW - 1, WINDOW as usize + 2)] {
            check(&memory, base + skip, len);
        }
        check(&memory, base + (10 << 20) - 8, 8);
    }

    #[test]
    fn windows_are_bounded_and_come_back() {
        let memory = memory(13, 2);
        let held = memory.map_phys(1 << 20, 16).unwrap();
        for round in 0..3 {
            for window in 0..4 {
                check(&memory, (1 << 20) + window * WINDOW + round, 100);
                assert!(memory.order.lock().unwrap().len() <= 2);
            }
        }
        // A mapping that somebody holds outlives its eviction.
        assert_eq!(held[3], byte((1 << 20) + 3));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let promised = Segment { phys: 0x1000, len: 0x3000, file_offset: 0 };
        let present = Segment { len: 0x1800, ..promised };
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 0x1800]).unwrap();
        let memory = FileMemory::new(file, Path::new("test"), vec![promised], vec![present]);
        let mut buf = [0; 16];
        memory.read_phys(0x27f0, &mut buf).unwrap();
        assert_eq!(buf, [7; 16]);
        let read = |addr, buf: &mut [u8]| memory.read_phys(addr, buf).unwrap_err();
        assert!(matches!(read(0x27f8, &mut buf), Error::Truncated { addr: 0x2800 }));
        assert!(matches!(read(0x3fff, &mut [0]), Error::Truncated { addr: 0x3fff }));
        assert!(matches!(read(0x4000, &mut [0]), Error::NotInCore { addr: 0x4000 }));
        assert!(matches!(read(0xfff, &mut buf), Error::NotInCore { addr: 0xfff }));
        assert!(memory.read_phys(u64::MAX - 3, &mut buf).is_err());
        assert!(matches!(memory.map_phys(0x27f8, 16), Err(Error::Truncated { addr: 0x2800 })));
    }
}
