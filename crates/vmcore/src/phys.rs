//! Access to physical memory, wherever it comes from.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

use crate::{Error, Result};

/// A range of physical addresses whose bytes can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhysRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub len: u64,
}

impl PhysRange {
    /// The first address behind the range.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether the address lies in the range.
    pub fn contains(&self, addr: u64) -> bool {
        addr >= self.start && addr - self.start < self.len
    }
}

/// Physical memory of a dead machine: a core, or a fake for tests.
///
/// The memory never changes while it is looked at.
pub trait PhysicalMemory: Send + Sync {
    /// Fills `buf` from `addr` on. On error `buf` may be partly filled.
    fn read_phys(&self, addr: u64, buf: &mut [u8]) -> Result<()>;

    /// The bytes themselves, for large reads and for system calls that take addresses. The range
    /// may not run over the end of one of [`ranges`](Self::ranges).
    fn map_phys(&self, addr: u64, len: usize) -> Result<PhysMap<'_>>;

    /// What can be read: sorted and disjoint. Neighbours may touch.
    fn ranges(&self) -> &[PhysRange];

    /// To be called first in a forked child that is going to read: mappings are not inherited.
    fn after_fork(&self) {}
}

/// Bytes of physical memory; derefs to them.
pub struct PhysMap<'a>(Inner<'a>);

enum Inner<'a> {
    Borrowed(&'a [u8]),
    Window(Arc<Mmap>, Range<usize>),
}

impl<'a> PhysMap<'a> {
    /// Bytes that are in our memory anyway.
    pub fn borrowed(bytes: &'a [u8]) -> Self {
        PhysMap(Inner::Borrowed(bytes))
    }

    /// The same bytes for as long as they are wanted: the mapping stays until then. `None` for
    /// borrowed bytes.
    pub fn to_static(&self) -> Option<PhysMap<'static>> {
        match &self.0 {
            Inner::Borrowed(_) => None,
            Inner::Window(map, range) => Some(PhysMap(Inner::Window(map.clone(), range.clone()))),
        }
    }

    /// `range` must lie within the mapping.
    pub(crate) fn window(map: Arc<Mmap>, range: Range<usize>) -> Self {
        debug_assert!(range.start <= range.end && range.end <= map.len());
        PhysMap(Inner::Window(map, range))
    }
}

impl Deref for PhysMap<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Inner::Borrowed(bytes) => bytes,
            Inner::Window(map, range) => &map[range.clone()],
        }
    }
}

impl fmt::Debug for PhysMap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PhysMap({} bytes)", self.len())
    }
}

/// Physical memory in our own heap: chunks of bytes at addresses. For tests and fakes.
#[derive(Debug, Default, Clone)]
pub struct FlatMemory {
    chunks: Vec<(u64, Vec<u8>)>,
    ranges: Vec<PhysRange>,
}

impl FlatMemory {
    /// Memory made of `(start address, bytes)`. Chunks may touch but not overlap.
    ///
    /// # Panics
    /// If two chunks overlap: that is a mistake in a test.
    pub fn new(mut chunks: Vec<(u64, Vec<u8>)>) -> Self {
        chunks.retain(|(_, bytes)| !bytes.is_empty());
        chunks.sort_by_key(|(start, _)| *start);
        for pair in chunks.windows(2) {
            assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0, "chunks overlap");
        }
        let ranges = chunks
            .iter()
            .map(|(start, bytes)| PhysRange { start: *start, len: bytes.len() as u64 })
            .collect();
        FlatMemory { chunks, ranges }
    }

    /// The bytes from `addr` to the end of the chunk that holds it.
    fn tail(&self, addr: u64) -> Result<&[u8]> {
        let after = self.chunks.partition_point(|(start, _)| *start <= addr);
        after
            .checked_sub(1)
            .and_then(|i| {
                let (start, bytes) = &self.chunks[i];
                bytes.get(usize::try_from(addr - start).ok()?..)
            })
            .filter(|tail| !tail.is_empty())
            .ok_or(Error::NotInCore { addr })
    }
}

impl PhysicalMemory for FlatMemory {
    fn read_phys(&self, addr: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = addr.checked_add(done as u64).ok_or(Error::Overflow { addr, len: buf.len() })?;
            let tail = self.tail(at)?;
            let n = tail.len().min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&tail[..n]);
            done += n;
        }
        Ok(())
    }

    fn map_phys(&self, addr: u64, len: usize) -> Result<PhysMap<'_>> {
        let tail = self.tail(addr)?;
        let bytes = tail.get(..len).ok_or(Error::NotInCore { addr: addr + tail.len() as u64 })?;
        Ok(PhysMap::borrowed(bytes))
    }

    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }
}
