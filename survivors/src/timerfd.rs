//! Timer descriptors.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::libc;

use crate::Stage;
use crate::procfs::same;
use crate::stage::monotonic;

/// A timer that does not run.
pub(crate) fn new(clock: i32) -> Result<File> {
    let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    Ok(unsafe { File::from_raw_fd(Errno::result(libc::timerfd_create(clock, flags))?) })
}

fn spec(ns: u64) -> libc::timespec {
    libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 }
}

/// Starts it; nanoseconds.
pub(crate) fn set(file: &File, flags: i32, value: u64, interval: u64) -> Result<()> {
    let timer = libc::itimerspec { it_interval: spec(interval), it_value: spec(value) };
    // SAFETY: a valid timer is read, and nothing written.
    Errno::result(unsafe { libc::timerfd_settime(file.as_raw_fd(), flags, &timer, std::ptr::null_mut()) })?;
    Ok(())
}

/// What is left, and the interval.
fn get(file: &File) -> Result<(Duration, Duration)> {
    // SAFETY: a timer is written.
    let timer = unsafe {
        let mut timer: libc::itimerspec = std::mem::zeroed();
        Errno::result(libc::timerfd_gettime(file.as_raw_fd(), &mut timer))?;
        timer
    };
    let duration = |t: libc::timespec| Duration::new(t.tv_sec as u64, t.tv_nsec as u32);
    Ok((duration(timer.it_value), duration(timer.it_interval)))
}

fn ticks(mut file: &File) -> Result<u64, Errno> {
    let mut word = [0; 8];
    let read = file.read_exact(&mut word);
    read.map(|()| u64::from_ne_bytes(word)).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))
}

/// The end of a wait by the program's own clock, within what a slow machine may be late.
fn ends_at(file: &File, end: Duration) -> Result<()> {
    // Who asks late is told at once.
    let due = monotonic().max(end);
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    Errno::result(unsafe { libc::poll(&mut poll, 1, 600_000) })?;
    let now = monotonic();
    ensure!(now >= end, "it expired {:?} early", end - now);
    ensure!(now < due + Duration::from_secs(30), "it expired {:?} late", now - due);
    Ok(())
}

fn now(clock: rustix::time::ClockId) -> Duration {
    let now = rustix::time::clock_gettime(clock);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// That a timer which expires between `ends.0` and `ends.1` by this clock has the right time left.
fn has_left(
    what: &str,
    file: &File,
    clock: rustix::time::ClockId,
    ends: (Duration, Duration),
    interval: Duration,
) -> Result<()> {
    const ROUNDING: Duration = Duration::from_millis(2);
    let (before, (left, every), after) = (now(clock), get(file)?, now(clock));
    same(&format!("interval of the {what} one"), &interval, &every)?;
    let expected = ends.0.saturating_sub(after + ROUNDING)..=ends.1.saturating_sub(before) + ROUNDING;
    ensure!(expected.contains(&left), "the {what} one has {left:?} left, and not {expected:?}");
    Ok(())
}

/// Relative and absolute timers that are still running keep their time.
pub fn running(stage: &mut Stage) -> Result<()> {
    use rustix::time::ClockId::{Boottime, Monotonic, Realtime};
    const HOUR: Duration = Duration::from_secs(3600);
    let ns = |time: Duration| time.as_nanos() as u64;
    let (relative, absolute, wall) =
        (new(libc::CLOCK_MONOTONIC)?, new(libc::CLOCK_BOOTTIME)?, new(libc::CLOCK_REALTIME)?);
    let short = new(libc::CLOCK_MONOTONIC)?;
    let not_before = now(Monotonic);
    set(&relative, 0, ns(HOUR), ns(7 * HOUR))?;
    let not_after = now(Monotonic);
    let (boot_end, wall_end) = (now(Boottime) + HOUR, now(Realtime) + 2 * HOUR);
    set(&absolute, libc::TFD_TIMER_ABSTIME, ns(boot_end), 0)?;
    set(&wall, libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET, ns(wall_end), 0)?;
    let length = stage.options().period * 4;
    let start = monotonic();
    set(&short, 0, ns(length), 0)?;

    let crash = stage.crash()?;
    if crash.damage {
        set(&relative, 0, ns(2 * HOUR), ns(7 * HOUR))?;
    }
    has_left("relative", &relative, Monotonic, (not_before + HOUR, not_after + HOUR), 7 * HOUR)?;
    has_left("absolute", &absolute, Boottime, (boot_end, boot_end), Duration::ZERO)?;
    has_left("wall clock's", &wall, Realtime, (wall_end, wall_end), Duration::ZERO)?;
    ends_at(&short, start + length)?;
    same("ticks", &Ok(1), &ticks(&short))
}

/// Expirations that nobody has read, of one that is over and of one that goes on.
pub fn unread(stage: &mut Stage) -> Result<()> {
    let (once, periodic) = (new(libc::CLOCK_MONOTONIC)?, new(libc::CLOCK_MONOTONIC)?);
    let start = monotonic();
    set(&once, 0, 1, 0)?;
    let not_before = monotonic();
    set(&periodic, 0, 10_000_000, 10_000_000)?;
    let not_after = monotonic();
    ends_at(&once, start)?;

    let crash = stage.crash()?;
    if crash.damage {
        ticks(&once)?;
        ticks(&periodic)?;
    }
    same("left of the one that is over", &(Duration::ZERO, Duration::ZERO), &get(&once)?)?;
    same("its ticks", &Ok(1), &ticks(&once))?;
    let (before, count, after) = (monotonic() - not_after, ticks(&periodic)?, monotonic() - not_before);
    let expected = (before.as_millis() as u64 / 10).saturating_sub(1)..=(after.as_millis() as u64 / 10 + 1);
    ensure!(expected.contains(&count), "{count} ticks, and not {expected:?}");
    let (left, every) = get(&periodic)?;
    same("interval", &Duration::from_millis(10), &every)?;
    ensure!(left <= every, "{left:?} are left of an interval of {every:?}");
    Ok(())
}

/// Timers that do not run.
pub fn stopped(stage: &mut Stage) -> Result<()> {
    let (never, stopped, read) =
        (new(libc::CLOCK_REALTIME)?, new(libc::CLOCK_MONOTONIC)?, new(libc::CLOCK_MONOTONIC)?);
    set(&stopped, 0, 1_000_000_000_000, 0)?;
    set(&stopped, 0, 0, 0)?;
    let start = monotonic();
    set(&read, 0, 1, 0)?;
    ends_at(&read, start)?;
    ticks(&read)?;

    let crash = stage.crash()?;
    if crash.damage {
        // Far away: one that expires at once may have done so too late for the look at it.
        set(&stopped, 0, 1_000_000_000_000, 0)?;
    }
    for (name, file) in [("never set", &never), ("stopped", &stopped), ("read", &read)] {
        same(name, &(Duration::ZERO, Duration::ZERO), &get(file)?)?;
        same(name, &Err(Errno::EAGAIN), &ticks(file))?;
    }
    let start = monotonic();
    set(&never, 0, 1_000_000, 0)?;
    ends_at(&never, start)
}
