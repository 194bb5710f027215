//! libotherworld: an application's say in its own resurrection.
//!
//! *In*: a function of the application, the *crash procedure*, registered once. *Out*: should the kernel die, the crash kernel calls it, on a
//! stack of its own, in the resurrected process, before any of its threads goes on; what it returns decides how the process goes on. *Never*: a system
//! call, a signal or a thread before that, but for the mapping that [`register`] makes.
//!
//! ```no_run
//! extern "C" fn save(context: &otherworld::Context, _data: *mut std::ffi::c_void) -> otherworld::Outcome {
//!     eprintln!("{}; saving", context.panic());
//!     otherworld::Outcome::Continue
//! }
//! otherworld::register(save, std::ptr::null_mut(), &otherworld::Options::default()).unwrap();
//! ```
//!
//! What is registered lies in a [record](mod@record) in the process's own memory. C programs have the same in `otherworld.h`.

pub mod record;

mod c;
mod context;
mod entry;
mod locks;
mod registry;
mod rehearsal;

pub use context::{
    Context, Descriptor, DescriptorState, HeldLock, Loss, Outcome, Procedure, SyscallOutcome, Thread,
};
pub use locks::{LockState, WORDS as LOCK_WORDS, mutex_state, rwlock_state, state as lock_state, word_state};
pub use registry::{Error, Options, protect, register, unprotect, unregister, unwatch_lock, watch_lock};
pub use rehearsal::rehearse;
