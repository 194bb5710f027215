//! Memory mappings, as owned values.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{
    MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap, mmap_anonymous, mprotect, munmap,
};

/// Size of a small page.
pub const PAGE: usize = 4096;

/// A mapping of this process; unmapped when dropped.
pub struct Map {
    start: NonNull<u8>,
    len: usize,
}

/// Readable and writable.
pub const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

impl Map {
    /// Anonymous memory; `flags` say private or shared.
    pub fn anonymous(len: usize, flags: MapFlags) -> Result<Self> {
        let size = NonZeroUsize::new(len).context("an empty mapping")?;
        // SAFETY: a new mapping at an address that the kernel chooses (no MAP_FIXED) touches no existing memory.
        let start = unsafe { mmap_anonymous(None, size, READ_WRITE, flags) }.context("mmap")?;
        Ok(Self { start: start.cast(), len })
    }

    /// Address space that nothing can be done with yet (PROT_NONE, MAP_NORESERVE).
    pub fn reserved(len: usize) -> Result<Self> {
        let size = NonZeroUsize::new(len).context("an empty mapping")?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: as above.
        let start = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, flags) }.context("mmap")?;
        Ok(Self { start: start.cast(), len })
    }

    /// A file from its start; `flags` say private or shared.
    pub fn file(file: impl AsFd, len: usize, flags: MapFlags) -> Result<Self> {
        let size = NonZeroUsize::new(len).context("an empty mapping")?;
        // SAFETY: as above; the survivor's files are changed and truncated by nobody else.
        let start = unsafe { mmap(None, size, READ_WRITE, flags, file, 0) }.context("mmap")?;
        Ok(Self { start: start.cast(), len })
    }

    /// First address.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// The contents. The mapping must be readable (the survivors that change protections ask for what they may have).
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for as long as self lives; memory shared with a child is read when the child does not write.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The contents, to be written. The mapping must be writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// mprotect(2) of pages `first..first + count`.
    pub fn protect(&self, first: usize, count: usize, protection: ProtFlags) -> Result<()> {
        let start = self.page(first, count)?;
        // SAFETY: inside this mapping; who takes access away does not use it.
        unsafe { mprotect(start.cast(), count * PAGE, protection) }.context("mprotect")
    }

    /// madvise(2) of the whole.
    pub fn advise(&self, advice: MmapAdvise) -> Result<()> {
        // SAFETY: only advice that leaves the contents alone is used here.
        unsafe { madvise(self.start.cast(), self.len, advice) }.with_context(|| format!("madvise {advice:?}"))
    }

    /// mlock(2) of the whole.
    pub fn lock(&self) -> Result<()> {
        // SAFETY: locking pages changes nothing that a program can see.
        unsafe { mlock(self.start.cast(), self.len) }.context("mlock")
    }

    fn page(&self, first: usize, count: usize) -> Result<NonNull<u8>> {
        anyhow::ensure!((first + count) * PAGE <= self.len, "beyond the mapping");
        // SAFETY: just checked.
        Ok(unsafe { self.start.add(first * PAGE) })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody can hold a reference to it any more.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}
