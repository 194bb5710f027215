//! Clocks: the rebuilt processes live in a time namespace in which the monotonic clocks go on from where they stopped.

use std::time::Instant;

use nix::sched::{CloneFlags, unshare};
use snapshot::Clocks;

use crate::sys;

const SECOND: i64 = 1_000_000_000;

/// Seconds and nanoseconds (0 … 999,999,999) to be added to a clock.
fn offset(dead_ns: i64, own: libc::timespec) -> (i64, i64) {
    let own = i128::from(own.tv_sec) * i128::from(SECOND) + i128::from(own.tv_nsec);
    let offset = i128::from(dead_ns) - own;
    // Both clocks count from a boot: far below what an i64 of seconds holds.
    (offset.div_euclid(SECOND.into()) as i64, offset.rem_euclid(SECOND.into()) as i64)
}

/// The moment from which the clocks of the processes go on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GoOn {
    /// By this program's clock, for what may be late.
    pub(crate) at: Instant,
    monotonic: libc::timespec,
    boottime: libc::timespec,
}

impl GoOn {
    /// A point in time after that moment, as this program's own CLOCK_MONOTONIC or CLOCK_BOOTTIME (or its alarm clock) will show it,
    /// nanoseconds; `None` for other clocks.
    pub(crate) fn own_time(&self, clock: libc::clockid_t, left_ns: i64) -> Option<i64> {
        let from = match clock {
            libc::CLOCK_MONOTONIC => self.monotonic,
            libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => self.boottime,
            _ => return None,
        };
        Some((from.tv_sec.saturating_mul(SECOND) + from.tv_nsec).saturating_add(left_ns))
    }
}

impl GoOn {
    /// Whether a time of the processes lies before this kernel's start. `dead`: their clocks when they stopped.
    pub(crate) fn is_before_boot(&self, dead: &Clocks, clock: libc::clockid_t, ns: i64) -> bool {
        let dead = match clock {
            libc::CLOCK_MONOTONIC => dead.monotonic_ns,
            libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => dead.boottime_ns,
            _ => return false,
        };
        self.own_time(clock, ns.saturating_sub(dead)).is_some_and(|own| own < 0)
    }
}

/// The time namespace that children are made in, for one that is there already. The descriptor is `base` or higher.
pub(crate) fn namespace(base: std::os::fd::RawFd) -> Result<std::os::fd::OwnedFd, nix::errno::Errno> {
    let path = std::path::Path::new("/proc/self/ns/time_for_children");
    sys::open(path, libc::O_RDONLY, 0).and_then(|fd| sys::lift(fd, base))
}

/// Children forked from now on see CLOCK_MONOTONIC and CLOCK_BOOTTIME continue from `dead`; the caller itself does not. Returns the moment
/// from which they go on.
pub(crate) fn enter_time_namespace(dead: &Clocks) -> std::io::Result<GoOn> {
    // CLONE_NEWTIME, which nix does not know.
    unshare(CloneFlags::from_bits_retain(0x80))?;
    let (monotonic, boottime) = (sys::clock(libc::CLOCK_MONOTONIC)?, sys::clock(libc::CLOCK_BOOTTIME)?);
    let at = Instant::now();
    let (mono, mono_ns) = offset(dead.monotonic_ns, monotonic);
    let (boot, boot_ns) = offset(dead.boottime_ns, boottime);
    let text = format!("monotonic {mono} {mono_ns}\nboottime {boot} {boot_ns}\n");
    sys::write_proc("/proc/self/timens_offsets", &text)?;
    Ok(GoOn { at, monotonic, boottime })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(tv_sec: i64, tv_nsec: i64) -> libc::timespec {
        libc::timespec { tv_sec, tv_nsec }
    }

    #[test]
    fn offsets_have_a_nonnegative_fraction() {
        assert_eq!(offset(5_500_000_000, at(2, 700_000_000)), (2, 800_000_000));
        assert_eq!(offset(2_700_000_000, at(5, 500_000_000)), (-3, 200_000_000));
        assert_eq!(offset(i64::MAX, at(0, 0)).0, i64::MAX / SECOND);
    }
}
