//! The dead machine's memory.
//!
//! **In:** `/proc/vmcore`, or any ELF64 core of an x86-64 machine on disk (a copy of
//! `/proc/vmcore`, or what QEMU's `dump-guest-memory` writes).
//!
//! **Out:** bytes at physical addresses ([`PhysicalMemory`]), bytes at kernel virtual addresses
//! ([`KernelMemory`]), page-table entries ([`PageTables`]), the per-CPU registers and the
//! vmcoreinfo text that the dead kernel left behind.
//!
//! **Never:** writes anything, knows a kernel structure, or trusts what it reads. Reads of what is
//! not in the core are typed errors; nothing is ever mapped beyond the end of a file, so a short
//! core cannot raise SIGBUS.
//!
//! ```no_run
//! # fn main() -> Result<(), vmcore::Error> {
//! let core = vmcore::Vmcore::open("/proc/vmcore".as_ref())?;
//! println!("Linux {}", core.info().osrelease()?);
//! let memory = vmcore::KernelMemory::new(core)?;
//! let mut banner = [0; 64];
//! memory.read_virt(memory.core().info().symbol("init_uts_ns")?, &mut banner)?;
//! # Ok(()) }
//! ```

mod core;
mod elf;
mod error;
mod info;
mod kernel;
mod mapping;
mod paging;
mod phys;

pub use crate::core::{PrStatus, Truncation, Vmcore};
pub use crate::elf::Segment;
pub use crate::error::{Error, NotMapped, Result};
pub use crate::info::VmcoreInfo;
pub use crate::kernel::{KERNEL_TEXT_START, KernelMemory};
pub use crate::paging::{
    Entry, EntryKind, LastTable, PAGE_SHIFT, PAGE_SIZE, PageSize, PageTables, PteFormat, SpecialEntries,
    Table, Tables,
};
pub use crate::phys::{FlatMemory, PhysMap, PhysRange, PhysicalMemory};
