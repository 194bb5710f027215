//! What can go wrong with a part of the dead kernel's state.

/// Why an object could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name, a layout or a piece of memory could not be had.
    #[error(transparent)]
    Kernel(#[from] ktypes::Error),
    /// Physical memory or page tables could not be read.
    #[error(transparent)]
    Memory(#[from] vmcore::Error),
    /// It was read, and cannot be what the kernel had there.
    #[error("{what} at {addr:#x}: {why}")]
    Corrupt {
        /// Kind of object.
        what: &'static str,
        /// Its address in the dead kernel.
        addr: u64,
        /// What is wrong with it.
        why: String,
    },
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An object that contradicts itself.
pub(crate) fn corrupt(what: &'static str, addr: u64, why: impl Into<String>) -> Error {
    Error::Corrupt { what, addr, why: why.into() }
}
