//! Who held a lock when the kernel died. To be asked in a crash procedure while the other threads stand still: what a held lock protects may be half
//! changed.

use std::sync::atomic::{AtomicU32, Ordering};

/// The state of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockState {
    /// Nobody had it.
    Free,
    /// This thread had it.
    HeldBy(i32),
    /// So many readers had it.
    Read(u32),
}

/// State of a `pthread_mutex_t` of glibc (nptl's `__pthread_mutex_s`: `__lock`, `__count`, `__owner`).
///
/// # Safety
/// `mutex` points to an initialised mutex.
pub unsafe fn mutex_state(mutex: *const libc::pthread_mutex_t) -> LockState {
    const OWNER: usize = 2;
    // SAFETY: the mutex begins with these words; the caller's promise.
    let (lock, owner) = unsafe { (word(mutex.cast(), 0), word(mutex.cast(), OWNER)) };
    match lock {
        0 => LockState::Free,
        // Between taking it and noting whose it is, or the other way round.
        _ => LockState::HeldBy(owner as i32),
    }
}

/// State of a `pthread_rwlock_t` of glibc (nptl's `__pthread_rwlock_arch_t`: `__readers`, …, `__cur_writer`).
///
/// # Safety
/// `lock` points to an initialised lock.
pub unsafe fn rwlock_state(lock: *const libc::pthread_rwlock_t) -> LockState {
    // The lowest bits of `__readers` are the phase and two about writers; the readers are counted above them.
    const READER_SHIFT: u32 = 3;
    const WRITE_PHASE: u32 = 1;
    const CUR_WRITER: usize = 6;
    // SAFETY: the lock begins with these words; the caller's promise.
    let (readers, writer) = unsafe { (word(lock.cast(), 0), word(lock.cast(), CUR_WRITER)) };
    match (writer, readers >> READER_SHIFT) {
        (0, 0) => LockState::Free,
        (0, _) if readers & WRITE_PHASE != 0 => LockState::Free,
        (0, count) => LockState::Read(count),
        (writer, _) => LockState::HeldBy(writer as i32),
    }
}

/// State of a lock that is zero when it is free, and its owner's TID otherwise.
pub fn word_state(lock: &AtomicU32) -> LockState {
    match lock.load(Ordering::Relaxed) {
        0 => LockState::Free,
        owner => LockState::HeldBy(owner as i32),
    }
}

/// # Safety
/// There are `index + 1` readable words at `base`.
unsafe fn word(base: *const u32, index: usize) -> u32 {
    // SAFETY: the caller's promise. Others may write there when they run.
    unsafe { base.add(index).read_volatile() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tid() -> i32 {
        // SAFETY: no arguments.
        unsafe { libc::syscall(libc::SYS_gettid) as i32 }
    }

    #[test]
    fn a_mutex_tells_who_has_it() {
        let mut mutex = libc::PTHREAD_MUTEX_INITIALIZER;
        // SAFETY: an initialised mutex that nobody else has.
        unsafe {
            assert_eq!(mutex_state(&raw const mutex), LockState::Free);
            libc::pthread_mutex_lock(&raw mut mutex);
            assert_eq!(mutex_state(&raw const mutex), LockState::HeldBy(tid()));
            libc::pthread_mutex_unlock(&raw mut mutex);
            assert_eq!(mutex_state(&raw const mutex), LockState::Free);
        }
    }

    #[test]
    fn a_rwlock_tells_readers_from_a_writer() {
        let mut lock = libc::PTHREAD_RWLOCK_INITIALIZER;
        // SAFETY: an initialised lock that nobody else has.
        unsafe {
            assert_eq!(rwlock_state(&raw const lock), LockState::Free);
            libc::pthread_rwlock_rdlock(&raw mut lock);
            libc::pthread_rwlock_rdlock(&raw mut lock);
            assert_eq!(rwlock_state(&raw const lock), LockState::Read(2));
            libc::pthread_rwlock_unlock(&raw mut lock);
            libc::pthread_rwlock_unlock(&raw mut lock);
            assert_eq!(rwlock_state(&raw const lock), LockState::Free);
            libc::pthread_rwlock_wrlock(&raw mut lock);
            assert_eq!(rwlock_state(&raw const lock), LockState::HeldBy(tid()));
            libc::pthread_rwlock_unlock(&raw mut lock);
            assert_eq!(rwlock_state(&raw const lock), LockState::Free);
        }
    }
}
