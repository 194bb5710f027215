//! Timer descriptors.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use std::time::Duration;

use nix::errno::Errno;
use snapshot::TimerFd;

/// TFD_IOC_SET_TICKS (include/uapi/linux/timerfd.h).
const SET_TICKS: u64 = 0x4008_5400;

/// Makes one, not running yet.
pub(crate) fn restore(state: &TimerFd) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = Errno::result(libc::timerfd_create(state.clock, libc::TFD_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Lets it run on, so long after the moment from which the clocks of its processes go on. What follows the wall clock expires by that.
pub(crate) fn start(fd: BorrowedFd<'_>, state: &TimerFd, gone_by: Duration) -> Result<(), Errno> {
    let mut now = *state;
    if let Some(expiry) = &mut now.expiry {
        expiry.left_ns = expiry.left_ns.saturating_sub(i64::try_from(gone_by.as_nanos()).unwrap_or(i64::MAX));
    }
    let now = now.brought_up_to_date();
    if let Some(expiry) = now.expiry {
        let (flags, value) = match expiry.realtime_ns {
            Some(at) => (state.settime_flags as i32 | libc::TFD_TIMER_ABSTIME, at),
            None => (0, expiry.left_ns),
        };
        // Zero would stop it.
        let value = timespec(u64::try_from(value).unwrap_or(0).max(1));
        let timer = libc::itimerspec { it_interval: timespec(now.interval_ns), it_value: value };
        // SAFETY: a valid timer is read, and nothing written.
        Errno::result(unsafe { libc::timerfd_settime(fd.as_raw_fd(), flags, &timer, std::ptr::null_mut()) })?;
    }
    if now.ticks > 0 {
        // SAFETY: the kernel reads eight bytes.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), SET_TICKS, &raw const now.ticks) })?;
    }
    Ok(())
}

fn timespec(ns: u64) -> libc::timespec {
    libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 }
}
