//! Who held a lock when the kernel died: what a held lock protects may be half changed.
//!
//! A crash procedure may ask while the other threads stand still. Of the locks that are [watched](crate::watch_lock) the crash kernel asks itself,
//! from their words in the process's memory.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::record::{LOCK_MUTEX, LOCK_RWLOCK, LOCK_WORD};

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

impl LockState {
    /// As `otherworld.h` has it: 0 for free, a TID, or minus the number of readers.
    pub fn owner(self) -> i32 {
        match self {
            Self::Free => 0,
            Self::HeldBy(tid) => tid,
            Self::Read(count) => i32::try_from(count).map_or(i32::MIN, |count| -count),
        }
    }
}

/// How many words [`state`] looks at.
pub const WORDS: usize = 7;

/// The state of a lock of this kind (one of the record's `LOCK_*`) that begins with these words. `None`: no such kind, or not enough words.
///
/// For glibc's locks (nptl, the same since 2.25): `__pthread_mutex_s` begins with `__lock`, `__count`, `__owner`; `__pthread_rwlock_arch_t` with
/// `__readers`, and its seventh word is `__cur_writer`.
pub fn state(kind: u32, words: &[u32]) -> Option<LockState> {
    // The lowest bits of `__readers` are the phase and two about writers; the readers are counted above them.
    const READER_SHIFT: u32 = 3;
    const WRITE_PHASE: u32 = 1;
    let word = |at: usize| words.get(at).copied();
    let held_by = |owner: u32| LockState::HeldBy(owner as i32);
    Some(match kind {
        LOCK_MUTEX => match (word(0)?, word(2)?) {
            (0, _) => LockState::Free,
            // Owner 0: between taking it and noting whose it is, or the other way round.
            (_, owner) => held_by(owner),
        },
        LOCK_RWLOCK => match (word(0)?, word(6)?) {
            (readers, 0) if readers >> READER_SHIFT == 0 || readers & WRITE_PHASE != 0 => LockState::Free,
            (readers, 0) => LockState::Read(readers >> READER_SHIFT),
            (_, writer) => held_by(writer),
        },
        LOCK_WORD => match word(0)? {
            0 => LockState::Free,
            owner => held_by(owner),
        },
        _ => return None,
    })
}

/// State of a `pthread_mutex_t` of glibc.
///
/// # Safety
/// `mutex` points to an initialised mutex.
pub unsafe fn mutex_state(mutex: *const libc::pthread_mutex_t) -> LockState {
    // SAFETY: the caller's promise; a mutex has more words than that.
    unsafe { state_at(LOCK_MUTEX, mutex.cast()) }
}

/// State of a `pthread_rwlock_t` of glibc.
///
/// # Safety
/// `lock` points to an initialised lock.
pub unsafe fn rwlock_state(lock: *const libc::pthread_rwlock_t) -> LockState {
    // SAFETY: the caller's promise; a rwlock has more words than that.
    unsafe { state_at(LOCK_RWLOCK, lock.cast()) }
}

/// State of a lock that is zero when it is free, and its owner's TID otherwise.
pub fn word_state(lock: &AtomicU32) -> LockState {
    state(LOCK_WORD, &[lock.load(Ordering::Relaxed)]).unwrap_or(LockState::Free)
}

/// # Safety
/// There are [`WORDS`] readable words at `base`.
unsafe fn state_at(kind: u32, base: *const u32) -> LockState {
    let mut words = [0; WORDS];
    for (n, word) in words.iter_mut().enumerate() {
        // SAFETY: the caller's promise. Others may write there when they run.
        *word = unsafe { base.add(n).read_volatile() };
    }
    state(kind, &words).unwrap_or(LockState::Free)
}

const _: () = assert!(
    size_of::<libc::pthread_mutex_t>() >= WORDS * 4 && size_of::<libc::pthread_rwlock_t>() >= WORDS * 4
);

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

    #[test]
    fn a_word_tells_its_owner_and_nobody_else_anything() {
        assert_eq!(word_state(&AtomicU32::new(0)), LockState::Free);
        assert_eq!(word_state(&AtomicU32::new(7)), LockState::HeldBy(7));
        assert_eq!((state(99, &[1; WORDS]), state(LOCK_RWLOCK, &[1; 2])), (None, None));
        assert_eq!(
            [LockState::Free, LockState::HeldBy(9), LockState::Read(3), LockState::Read(u32::MAX)]
                .map(LockState::owner),
            [0, 9, -3, i32::MIN]
        );
    }
}
