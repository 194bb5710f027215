//! Timer descriptors.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use snapshot::TimerFd;

use crate::clock::GoOn;

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

/// Lets it run on, from the moment from which the clocks of its processes go on. What follows the wall clock expires by that.
pub(crate) fn start(fd: BorrowedFd<'_>, state: &TimerFd, clocks_go_on: &GoOn) -> Result<(), Errno> {
    let now = state.brought_up_to_date();
    if let Some(expiry) = now.expiry {
        // By absolute times: however late this call is made.
        let absolute = expiry.realtime_ns.map(|at| (state.settime_flags as i32, at));
        let absolute = absolute.or_else(|| Some((0, clocks_go_on.own_time(state.clock, expiry.left_ns)?)));
        let (flags, value) = match absolute {
            Some((flags, at)) => (flags | libc::TFD_TIMER_ABSTIME, at),
            None => (0, expiry.left_ns.saturating_sub_unsigned(clocks_go_on.at.elapsed().as_nanos() as u64)),
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
