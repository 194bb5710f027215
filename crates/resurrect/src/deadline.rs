//! Bounded waiting: every wait of this crate ends at a [`Deadline`].

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// A moment after which a step has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(d: Duration) -> Self {
        Self(Instant::now() + d)
    }

    /// The earlier of this one and `d` from now.
    pub(crate) fn or_after(self, d: Duration) -> Self {
        Self(self.0.min(Instant::now() + d))
    }

    /// As much earlier.
    pub(crate) fn before(self, d: Duration) -> Self {
        Self(self.0.checked_sub(d).unwrap_or(self.0))
    }

    pub(crate) fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    pub(crate) fn is_over(self) -> bool {
        self.left().is_zero()
    }
}

/// Makes blocking system calls of this thread return `EINTR` again and again once a deadline is over.
///
/// waitpid(2) has no timeout. While the alarm is set, a SIGALRM with an empty handler interrupts it at the deadline; and then every ten
/// milliseconds, so that an alarm that comes between looking at the clock and entering the call is not the last one.
pub(crate) struct Alarm(libc::timer_t);

extern "C" fn interrupted(_: i32) {}

impl Alarm {
    /// Takes over SIGALRM of this process.
    pub(crate) fn new() -> Result<Self, Errno> {
        let action = SigAction::new(SigHandler::Handler(interrupted), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(Signal::SIGALRM, &action)? };
        SigSet::from(Signal::SIGALRM).thread_unblock()?;
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: a null sigevent means SIGALRM to the process; the id is written to `timer`.
        Errno::result(unsafe {
            libc::timer_create(libc::CLOCK_MONOTONIC, std::ptr::null_mut(), &mut timer)
        })?;
        Ok(Self(timer))
    }

    /// Interrupts from `deadline` on.
    pub(crate) fn set(&self, deadline: Deadline) {
        let left = deadline.left().max(Duration::from_nanos(1));
        let spec = libc::itimerspec {
            it_value: libc::timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            },
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 10_000_000 },
        };
        // SAFETY: the timer lives as long as self.
        unsafe { libc::timer_settime(self.0, 0, &spec, std::ptr::null_mut()) };
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: created in `new`, deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}
