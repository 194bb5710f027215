//! Where page contents come from.

use std::ops::Deref;

/// Size of a page frame, bytes.
pub const PAGE_SIZE: u64 = 4096;

/// A range of the dead machine's physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysRange {
    /// First physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// The dead machine's physical memory, read-only.
///
/// Frames are asked for in blocks, low to high, so that a reader can map what it needs and let go of it: memory is poured in
/// physical order.
pub trait PhysMem {
    /// The ranges that can be had, ascending, without overlap.
    fn ranges(&self) -> &[PhysRange];

    /// Maps `len` bytes from physical address `addr` on; all of them must lie in one range.
    fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError>;

    /// Copies `buf.len()` bytes from physical address `addr` on.
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), PhysMemError> {
        buf.copy_from_slice(&self.map(addr, buf.len())?);
        Ok(())
    }

    /// To be called first in a forked child that is going to ask: what had been mapped before need not be mapped there.
    fn after_fork(&self) {}
}

/// Whatever keeps bytes alive.
trait Keep {}
impl<T> Keep for T {}

/// Bytes of the dead machine's memory; unmapped when dropped.
pub struct PhysMap<'a> {
    bytes: &'a [u8],
    _owner: Option<Box<dyn Keep + 'a>>,
}

impl<'a> PhysMap<'a> {
    /// Bytes that live as long as the source itself.
    pub fn borrowed(bytes: &'a [u8]) -> Self {
        Self { bytes, _owner: None }
    }

    /// Bytes that `owner` (a mapping) keeps alive, a part of them given by `range`.
    ///
    /// `None` when `range` does not lie in the owner's bytes.
    pub fn owned<O>(owner: O, range: std::ops::Range<usize>) -> Option<Self>
    where
        O: Deref<Target = [u8]> + StableBytes + 'a,
    {
        let owner = Box::new(owner);
        let part: *const [u8] = owner.get(range)?;
        // SAFETY: StableBytes promises that the bytes neither move nor change hands while the owner lives, and the owner is kept
        // in the same struct, behind the slice, for as long as the slice can be reached.
        let bytes = unsafe { &*part };
        Some(Self { bytes, _owner: Some(owner) })
    }
}

/// # Safety
///
/// The bytes that `Deref` gives stay at the same address, even when the value itself is moved, until it is dropped. (A memory map or a
/// boxed slice does; an array does not.)
pub unsafe trait StableBytes {}

// SAFETY: the heap buffer of a Vec that nobody changes stays where it is.
unsafe impl StableBytes for Vec<u8> {}

impl Deref for PhysMap<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

/// Physical memory that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PhysMemError {
    /// Not part of the dump.
    #[error("physical memory {addr:#x}+{len:#x} is not in the dump")]
    NotPresent {
        #[allow(missing_docs)]
        addr: u64,
        #[allow(missing_docs)]
        len: u64,
    },
    /// The dump has it, but reading it failed.
    #[error("cannot map physical memory {addr:#x}+{len:#x}")]
    Io {
        #[allow(missing_docs)]
        addr: u64,
        #[allow(missing_docs)]
        len: u64,
        #[allow(missing_docs)]
        #[source]
        source: std::io::Error,
    },
}
