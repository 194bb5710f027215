//! Calling the procedure without a crash, for an application's own tests.

use std::ffi::{c_int, c_void};

use crate::context::{Context, Outcome, Thread};
use crate::registry;

type Called = extern "C" fn(&Context, *mut c_void) -> c_int;

/// Calls the registered procedure here and now, in a thread with a stack of the size that it asked for and with a context that has the calling
/// thread and no losses; its answer, on which nobody acts. `None`: nothing is registered, there is no memory for the thread, or it gives
/// no answer that there is.
pub fn rehearse() -> Option<Outcome> {
    let (procedure, data, stack) = registry::registered()?;
    // SAFETY: no arguments.
    let tid = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
    let run = move || {
        // SAFETY: what was registered is a procedure; one in C may return any number.
        let procedure = unsafe { std::mem::transmute::<*const c_void, Called>(procedure as *const c_void) };
        let threads = [Thread::rehearsed(tid)];
        procedure(&Context::rehearsed(c"rehearsal", &threads), data as *mut c_void)
    };
    match std::thread::Builder::new().stack_size(stack).spawn(run).ok()?.join().ok()? {
        0 => Some(Outcome::Continue),
        1 => Some(Outcome::Restart),
        2 => Some(Outcome::Exit),
        _ => None,
    }
}
