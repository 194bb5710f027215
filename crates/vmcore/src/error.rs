//! What can go wrong with a core.

use std::path::PathBuf;

/// Why something of the dead machine's memory could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to open, read or map the core.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The core.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The file is a dump, but of a kind that is not read here.
    #[error("{}: {format} is not supported; {remedy}", path.display())]
    UnsupportedFormat {
        /// The file.
        path: PathBuf,
        /// The name of the format.
        format: &'static str,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The file is not a usable ELF core.
    #[error("{}: not an ELF64 x86-64 core: {why}", path.display())]
    BadElf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The core has no VMCOREINFO note.
    #[error(
        "the core has no VMCOREINFO note; it must come from kdump (/proc/vmcore), \
         or from QEMU's dump-guest-memory with `-device vmcoreinfo`"
    )]
    NoVmcoreInfo,
    /// vmcoreinfo lacks an entry.
    #[error("vmcoreinfo has no {0}")]
    MissingInfo(String),
    /// A vmcoreinfo entry is not the number that it should be.
    #[error("vmcoreinfo: {key}={value} is not a number")]
    BadInfo {
        /// The whole key, such as `NUMBER(phys_base)`.
        key: String,
        /// What stands after the `=`.
        value: String,
    },
    /// The physical address is not RAM, or the dump does not have it (the crash kernel's own
    /// memory never is in `/proc/vmcore`).
    #[error("physical address {addr:#x} is not in the core")]
    NotInCore {
        /// The first address that is not there.
        addr: u64,
    },
    /// The headers promise this memory, but the file ends before it.
    #[error("physical address {addr:#x} is missing: the core is truncated")]
    Truncated {
        /// The first address that is not there.
        addr: u64,
    },
    /// A virtual address has no translation in the dead kernel's page tables.
    #[error("virtual address {va:#x} is not mapped: {why}")]
    NotMapped {
        /// The address.
        va: u64,
        /// What was met instead.
        why: NotMapped,
    },
    /// Damaged structures lead round and round.
    #[error("no more is read: {most} reads are more than all structures of this kernel can need")]
    Exhausted {
        /// How many there may be.
        most: u64,
    },
    /// A range runs over the end of the address space.
    #[error("{len} bytes at {addr:#x} run over the end of the address space")]
    Overflow {
        /// First byte.
        addr: u64,
        /// Number of bytes.
        len: usize,
    },
}

/// Why a virtual address has no translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotMapped {
    /// Not an address that the CPU would accept.
    #[error("not a canonical address")]
    NonCanonical,
    /// The entry of this page-table level (1 = PTE … 5 = PGD) is empty or not present.
    #[error("no entry in page-table level {level}")]
    NoEntry {
        /// Level of the table that holds the entry.
        level: u8,
    },
    /// An entry that no kernel makes.
    #[error("bad entry {pte:#x} in page-table level {level}")]
    BadEntry {
        /// Level of the table that holds the entry.
        level: u8,
        /// The entry.
        pte: u64,
    },
    /// A page table that has another place already.
    #[error("the page tables are damaged: the one of level {level} at physical {table:#x} comes up twice")]
    TableTwice {
        /// Level that it would have here.
        level: u8,
        /// Where it is.
        table: u64,
    },
    /// What is in the place of a page table is none.
    #[error("what is in the place of the page table of level {level}, at physical {table:#x}, is none")]
    NoTable {
        /// Level of the table.
        level: u8,
        /// Where it should be.
        table: u64,
    },
    /// The page table itself lies outside the core.
    #[error("the page table of level {level} at physical {table:#x} is not in the core")]
    TableUnreadable {
        /// Level of the table.
        level: u8,
        /// Where it should be.
        table: u64,
    },
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;
