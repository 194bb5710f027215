//! Names to layouts: a dead kernel's symbols, types, and typed reads of its structures.
//!
//! **In:** a [`vmcore::Vmcore`]. Nothing else: kallsyms and BTF come out of the dead kernel's own
//! memory, so no debug package is needed.
//!
//! **Out:** a [`Kernel`]: addresses by name and names by address, structures read into Rust structs
//! ([`KernelType`]), walks over the kernel's lists and trees.
//!
//! **Never:** has an offset as a number; loops for ever, however damaged the memory is (every walk
//! has a limit that the caller gives); says what a structure means (that is `autopsy`'s).
//!
//! ```no_run
//! use ktypes::{Kernel, KernelType};
//!
//! #[derive(KernelType)]
//! #[kernel("task_struct")]
//! struct Task {
//!     pid: i32,
//!     comm: [u8; 16],
//!     #[kernel("tasks", address)]
//!     tasks: u64,
//! }
//!
//! # fn main() -> Result<(), ktypes::Error> {
//! let kernel = Kernel::open(vmcore::Vmcore::open("/proc/vmcore".as_ref())?)?;
//! let init: Task = kernel.read(kernel.symbol("init_task")?)?;
//! for node in kernel.list_head(init.tasks, 100_000) {
//!     let task: Task = kernel.read(kernel.container_of::<Task>(node?, "tasks")?)?;
//!     println!("{:7} {}", task.pid, String::from_utf8_lossy(&task.comm));
//! }
//! # Ok(()) }
//! ```

// The derive macro writes `::ktypes::…`, also when it is used in this crate.
extern crate self as ktypes;

mod btf;
mod error;
#[cfg(fuzzing)]
pub mod fuzz;
mod kallsyms;
mod kernel;
mod layout;
mod list;
mod maple;
mod modules;
mod page;
mod rbtree;
mod xarray;

pub use btf::{Btf, Member, TypeId};
pub use error::{Corruption, Error, Result};
pub use kernel::{Kernel, MAX_READ};
pub use ktypes_derive::KernelType;
pub use layout::{Decoder, FieldKind, FieldSpec, KernelType, KernelValue};
pub use list::{HlistIter, ListIter};
pub use page::SlabObject;
pub use rbtree::RbIter;
pub use xarray::{MARK_DIRTY, MARK_WRITEBACK, XaEntry};

pub use vmcore;
