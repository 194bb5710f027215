//! The C ABI (`otherworld.h`).

use std::ffi::{c_int, c_void};
use std::time::Duration;

use crate::context::Procedure;
use crate::registry::{self, Error, Options};

/// `otherworld_options`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct COptions {
    stack_size: u64,
    time_limit_ms: u64,
    flags: u32,
    reserved: u32,
}

fn code(result: Result<(), Error>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(Error::NoMemory) => libc::ENOMEM,
        Err(Error::Invalid) => libc::EINVAL,
        Err(Error::Full) => libc::ENOSPC,
        Err(Error::Unknown) => libc::ENOENT,
    }
}

/// # Safety
/// `options` is NULL or points to options.
#[unsafe(no_mangle)]
unsafe extern "C" fn otherworld_register(
    procedure: Option<Procedure>,
    data: *mut c_void,
    options: *const COptions,
) -> c_int {
    let Some(procedure) = procedure else { return libc::EINVAL };
    let mut chosen = Options::default();
    // SAFETY: the caller's promise.
    if let Some(options) = unsafe { options.as_ref() } {
        if options.stack_size != 0 {
            chosen.stack_size = options.stack_size as usize;
        }
        if options.time_limit_ms != 0 {
            chosen.time_limit = Duration::from_millis(options.time_limit_ms);
        }
        chosen.threads_run = options.flags & crate::record::FLAG_THREADS_RUN != 0;
    }
    code(registry::register(procedure, data, &chosen))
}

#[unsafe(no_mangle)]
extern "C" fn otherworld_unregister() {
    registry::unregister();
}

/// # Safety
/// See [`registry::protect`].
#[unsafe(no_mangle)]
unsafe extern "C" fn otherworld_protect(start: *const c_void, len: usize) -> c_int {
    // SAFETY: the caller's promise.
    code(unsafe { registry::protect(start.cast(), len) })
}

#[unsafe(no_mangle)]
extern "C" fn otherworld_unprotect(start: *const c_void) -> c_int {
    code(registry::unprotect(start.cast()))
}

#[unsafe(no_mangle)]
extern "C" fn otherworld_unwatch_lock(lock: *const c_void) -> c_int {
    code(registry::unwatch_lock(lock))
}

#[unsafe(no_mangle)]
extern "C" fn otherworld_rehearse() -> c_int {
    crate::rehearse().map_or(-1, |outcome| outcome as c_int)
}

#[unsafe(no_mangle)]
extern "C" fn otherworld_watch_lock(lock: *const c_void, kind: u32, tag: u32) -> c_int {
    code(registry::watch_lock(lock, kind, tag))
}

/// # Safety
/// See [`crate::mutex_state`].
#[unsafe(no_mangle)]
unsafe extern "C" fn otherworld_mutex_owner(mutex: *const libc::pthread_mutex_t) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { crate::locks::mutex_state(mutex) }.owner()
}

/// # Safety
/// See [`crate::rwlock_state`].
#[unsafe(no_mangle)]
unsafe extern "C" fn otherworld_rwlock_owner(lock: *const libc::pthread_rwlock_t) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { crate::locks::rwlock_state(lock) }.owner()
}
