//! Blocked signals, and taking them.

use std::mem::MaybeUninit;

use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::libc;

/// What a signal says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    #[allow(missing_docs)]
    pub signo: i32,
    /// `si_fd` of signals that are about a descriptor.
    pub fd: i32,
    /// `si_timerid` of a timer's signal.
    pub timer: i32,
    /// `si_overrun` of a timer's signal.
    pub overrun: i32,
    /// `si_value`.
    pub value: u64,
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, sigaddset adds to it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Blocks signals in the calling thread.
pub fn block(signals: &[i32]) -> Result<()> {
    let set = set_of(signals);
    // SAFETY: the set is valid, and no old one is asked for.
    Errno::result(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) })?;
    Ok(())
}

/// Takes the first of these signals, which must be blocked; an error if none comes within a minute.
pub fn await_signal(signals: &[i32]) -> Result<Told> {
    let set = set_of(signals);
    let limit = libc::timespec { tv_sec: 60, tv_nsec: 0 };
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: the pointers are to valid objects of these types.
    let result = Errno::result(unsafe { libc::sigtimedwait(&set, info.as_mut_ptr(), &limit) });
    match result {
        Ok(signo) => {
            // On x86-64: the band, a long, is at byte 16, the descriptor behind it; or a timer's number, the overrun, the value.
            // SAFETY: a siginfo has 128 bytes, all of them initialised.
            let words = unsafe { info.as_ptr().cast::<[i32; 8]>().read() };
            let value = words[6] as u32 as u64 | (words[7] as u32 as u64) << 32;
            Ok(Told { signo, fd: words[6], timer: words[4], overrun: words[5], value })
        }
        Err(e) => bail!("no signal: {e}"),
    }
}
