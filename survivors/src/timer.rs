//! Timers that send signals.

use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::libc;
use rustix::time::ClockId::{self, Boottime, Monotonic, Realtime};

use crate::Stage;
use crate::await_signal::{await_signal, block};
use crate::procfs::same;
use crate::stage::monotonic;

const HOUR: Duration = Duration::from_secs(3600);
/// What a slow machine may be late.
const PATIENCE: Duration = Duration::from_secs(30);
/// Timers go by microseconds and clock ticks.
const ROUNDING: Duration = Duration::from_millis(12);
/// A timer that is known by what is left of it is set anew with that, some time after it was computed: whoever has the CPU
/// meanwhile makes it late, as with any relative timer.
const SET_LATE: Duration = Duration::from_secs(1);

fn now(clock: ClockId) -> Duration {
    let now = rustix::time::clock_gettime(clock);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// setitimer(2).
fn set_interval(which: libc::c_int, value: Duration, interval: Duration) -> Result<()> {
    let timeval =
        |t: Duration| libc::timeval { tv_sec: t.as_secs() as i64, tv_usec: t.subsec_micros().into() };
    let timer = libc::itimerval { it_interval: timeval(interval), it_value: timeval(value) };
    // SAFETY: a valid timer is read, nothing written.
    Errno::result(unsafe { libc::setitimer(which, &timer, std::ptr::null_mut()) })?;
    Ok(())
}

/// What is left, and the interval.
fn interval(which: libc::c_int) -> Result<(Duration, Duration)> {
    // SAFETY: a timer is written.
    let timer = unsafe {
        let mut timer: libc::itimerval = std::mem::zeroed();
        Errno::result(libc::getitimer(which, &mut timer))?;
        timer
    };
    let duration = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    Ok((duration(timer.it_value), duration(timer.it_interval)))
}

/// A POSIX timer, by the kernel's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timer(i32);

impl Timer {
    /// `notify`: SIGEV_*, the thread that it names.
    fn new(clock: i32, notify: (i32, i32), signo: i32, value: u64) -> Result<Self> {
        let mut id = 0i32;
        // SAFETY: an all-zero sigevent is valid; the kernel reads it and writes the number.
        let result = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = notify.0;
            event.sigev_notify_thread_id = notify.1;
            event.sigev_signo = signo;
            event.sigev_value.sival_ptr = value as *mut _;
            libc::syscall(libc::SYS_timer_create, clock, &raw const event, &raw mut id)
        };
        Errno::result(result)?;
        Ok(Self(id))
    }

    fn signalling(clock: i32, signo: i32, value: u64) -> Result<Self> {
        Self::new(clock, (libc::SIGEV_SIGNAL, 0), signo, value)
    }

    fn delete(self) -> Result<()> {
        // SAFETY: a number only.
        Errno::result(unsafe { libc::syscall(libc::SYS_timer_delete, self.0) })?;
        Ok(())
    }

    fn set(self, flags: i32, value: Duration, interval: Duration) -> Result<()> {
        let timespec =
            |t: Duration| libc::timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() };
        let timer = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(value) };
        // SAFETY: a valid timer is read, nothing written.
        Errno::result(unsafe {
            libc::syscall(libc::SYS_timer_settime, self.0, flags, &raw const timer, 0usize)
        })?;
        Ok(())
    }

    /// What is left, and the interval.
    fn get(self) -> Result<(Duration, Duration)> {
        // SAFETY: a timer is written.
        let timer = unsafe {
            let mut timer: libc::itimerspec = std::mem::zeroed();
            Errno::result(libc::syscall(libc::SYS_timer_gettime, self.0, &raw mut timer))?;
            timer
        };
        let duration = |t: libc::timespec| Duration::new(t.tv_sec as u64, t.tv_nsec as u32);
        Ok((duration(timer.it_value), duration(timer.it_interval)))
    }

    /// That it has the time left that it must have if it expires between `ends.0` and `ends.1` by this clock.
    fn has_left(self, clock: ClockId, ends: (Duration, Duration), every: Duration) -> Result<()> {
        let (before, (left, interval), after) = (now(clock), self.get()?, now(clock));
        same(&format!("interval of timer {}", self.0), &every, &interval)?;
        is_left(&format!("timer {}", self.0), left, (before, after), ends)
    }

    fn overruns(self) -> Result<i64> {
        // SAFETY: a number only.
        Ok(Errno::result(unsafe { libc::syscall(libc::SYS_timer_getoverrun, self.0) })?)
    }
}

/// `asked`: before and after it was asked for what is left.
fn is_left(
    what: &str,
    left: Duration,
    asked: (Duration, Duration),
    ends: (Duration, Duration),
) -> Result<()> {
    let expected = ends.0.saturating_sub(asked.1 + ROUNDING)..=ends.1.saturating_sub(asked.0) + ROUNDING;
    ensure!(expected.contains(&left), "{what} has {left:?} left, and not {expected:?}");
    Ok(())
}

/// Waits for a signal that is due between `ends.0` and `ends.1`.
fn comes(signo: i32, ends: (Duration, Duration)) -> Result<crate::await_signal::Told> {
    // Who asks late is told at once.
    let due = monotonic().max(ends.1);
    let told = await_signal(&[signo])?;
    let now = monotonic();
    ensure!(now + ROUNDING >= ends.0, "signal {signo} came {:?} early", ends.0 - now);
    ensure!(now < due + PATIENCE, "signal {signo} came {:?} late", now - due);
    Ok(told)
}

/// Keeps the CPU busy in user space until a signal is pending.
fn work_until_pending(signo: i32) -> Result<()> {
    let start = monotonic();
    let is_pending = || -> Result<bool> {
        Ok(crate::procfs::status(&["SigPnd", "ShdPnd"])?.values().any(|set| has(set, signo)))
    };
    while !is_pending()? {
        ensure!(monotonic() < start + 2 * PATIENCE, "signal {signo} does not come");
        (0..200_000u64).for_each(|n| {
            std::hint::black_box(n);
        });
    }
    Ok(())
}

fn has(set: &str, signo: i32) -> bool {
    u64::from_str_radix(set, 16).is_ok_and(|set| set >> (signo - 1) & 1 != 0)
}

/// ITIMER_REAL: its time comes, and then the interval.
pub fn real(stage: &mut Stage) -> Result<()> {
    block(&[libc::SIGALRM])?;
    let length = stage.options().period * 4;
    let start = monotonic();
    set_interval(libc::ITIMER_REAL, length, HOUR)?;
    let set = monotonic();
    let ends = (start + length, set + length + SET_LATE);

    let crash = stage.crash()?;
    if crash.damage {
        set_interval(libc::ITIMER_REAL, 3 * HOUR, 2 * HOUR)?;
    }
    let (before, (left, every), after) = (monotonic(), interval(libc::ITIMER_REAL)?, monotonic());
    same("interval", &HOUR, &every)?;
    if after + ROUNDING < ends.0 {
        is_left("the timer", left, (before, after), ends)?;
    }
    comes(libc::SIGALRM, ends)?;
    let (before, (left, _), after) = (monotonic(), interval(libc::ITIMER_REAL)?, monotonic());
    is_left("the timer, then,", left, (before, after), (ends.0 + HOUR, ends.1 + HOUR))
}

/// alarm: once.
pub fn alarm(stage: &mut Stage) -> Result<()> {
    // SAFETY: a number only.
    let set = |seconds| unsafe { libc::alarm(seconds) };
    let start = monotonic();
    set(3600);
    let after_start = monotonic();

    let crash = stage.crash()?;
    if crash.damage {
        set(9000);
    }
    let (before, left, after) = (monotonic(), Duration::from_secs(set(0).into()), monotonic());
    // Whole seconds, rounded.
    let second = Duration::from_secs(1);
    is_left(
        "the alarm",
        left,
        (before, after + second),
        (start + HOUR, after_start + HOUR + second + SET_LATE),
    )
}

/// ITIMER_VIRTUAL and ITIMER_PROF run on with the CPU time.
pub fn cpu(stage: &mut Stage) -> Result<()> {
    block(&[libc::SIGVTALRM, libc::SIGPROF])?;
    let short = Duration::from_millis(400);
    set_interval(libc::ITIMER_VIRTUAL, short, 7 * HOUR)?;
    set_interval(libc::ITIMER_PROF, HOUR, 5 * HOUR)?;

    let crash = stage.crash()?;
    if crash.damage {
        set_interval(libc::ITIMER_PROF, Duration::ZERO, Duration::ZERO)?;
    }
    let (left, every) = interval(libc::ITIMER_PROF)?;
    same("profiling interval", &(5 * HOUR), &every)?;
    ensure!((HOUR - PATIENCE..=HOUR + ROUNDING).contains(&left), "{left:?} of profiling time are left");
    let (left, every) = interval(libc::ITIMER_VIRTUAL)?;
    same("virtual interval", &(7 * HOUR), &every)?;
    ensure!(left <= short + ROUNDING || left > 6 * HOUR, "{left:?} of virtual time are left");
    work_until_pending(libc::SIGVTALRM)
}

/// POSIX timers of three clocks, relative and absolute, with gaps in their numbers.
pub fn posix(stage: &mut Stage) -> Result<()> {
    let signo = libc::SIGRTMIN() + 3;
    block(&[signo])?;
    let unused = Timer::signalling(libc::CLOCK_MONOTONIC, signo, 0)?;
    let absolute = Timer::signalling(libc::CLOCK_MONOTONIC, signo, 1)?;
    let wall = Timer::signalling(libc::CLOCK_REALTIME, libc::SIGUSR1, 2)?;
    let relative = Timer::signalling(libc::CLOCK_REALTIME, libc::SIGUSR1, 3)?;
    let unused_too = Timer::signalling(libc::CLOCK_MONOTONIC, signo, 0)?;
    let silent = Timer::new(libc::CLOCK_BOOTTIME, (libc::SIGEV_NONE, 0), 0, 4)?;
    let stopped = Timer::signalling(libc::CLOCK_MONOTONIC, libc::SIGUSR2, 5)?;
    let short = Timer::signalling(libc::CLOCK_MONOTONIC, signo, 0xfeed_0000_beef)?;
    unused.delete()?;
    unused_too.delete()?;
    let (end, wall_end) = (now(Monotonic) + HOUR, now(Realtime) + 2 * HOUR);
    absolute.set(libc::TIMER_ABSTIME, end, 9 * HOUR)?;
    wall.set(libc::TIMER_ABSTIME, wall_end, Duration::ZERO)?;
    let before = (now(Monotonic), now(Boottime));
    relative.set(0, HOUR, 7 * HOUR)?;
    silent.set(0, 3 * HOUR, HOUR)?;
    let length = stage.options().period * 4;
    short.set(0, length, Duration::ZERO)?;
    let after = (now(Monotonic), now(Boottime));
    let listed = std::fs::read_to_string("/proc/self/timers")?;

    let crash = stage.crash()?;
    if crash.damage {
        stopped.delete()?;
    }
    same("timers", &listed, &std::fs::read_to_string("/proc/self/timers")?)?;
    absolute.has_left(Monotonic, (end, end), 9 * HOUR)?;
    wall.has_left(Realtime, (wall_end, wall_end), Duration::ZERO)?;
    relative.has_left(Monotonic, (before.0 + HOUR, after.0 + HOUR + SET_LATE), 7 * HOUR)?;
    silent.has_left(Boottime, (before.1 + 3 * HOUR, after.1 + 3 * HOUR), HOUR)?;
    same("the stopped one", &(Duration::ZERO, Duration::ZERO), &stopped.get()?)?;
    let told = comes(signo, (before.0 + length, after.0 + length))?;
    same("timer and value", &(short.0, 0xfeed_0000_beef), &(told.timer, told.value))?;
    short.delete()?;
    Ok(())
}

/// A POSIX timer that signals one of two threads.
pub fn posix_thread(stage: &mut Stage) -> Result<()> {
    let signo = libc::SIGRTMIN() + 4;
    block(&[signo])?;
    let (tell_tid, tid) = channel();
    let (go, gone) = channel::<()>();
    let thread = std::thread::spawn(move || -> Result<_> {
        // SAFETY: no arguments.
        tell_tid.send(unsafe { libc::gettid() })?;
        gone.recv()?;
        await_signal(&[signo])
    });
    let tid = tid.recv()?;
    let first = Timer::new(libc::CLOCK_MONOTONIC, (libc::SIGEV_THREAD_ID, tid), signo, 6)?;
    let second = Timer::new(libc::CLOCK_MONOTONIC, (libc::SIGEV_THREAD_ID, tid), signo, 7)?;
    first.set(0, HOUR, HOUR)?;

    let crash = stage.crash()?;
    if crash.damage {
        first.set(0, Duration::from_millis(1), Duration::ZERO)?;
        crate::stage::sleep(Duration::from_millis(50));
    }
    second.set(0, Duration::from_millis(100), Duration::ZERO)?;
    go.send(())?;
    let told = thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    same("timer and value", &(second.0, 7), &(told.timer, told.value))
}

/// A POSIX timer whose signal nobody has taken yet; the expirations since are counted.
pub fn posix_pending(stage: &mut Stage) -> Result<()> {
    let signo = libc::SIGRTMIN() + 5;
    block(&[signo, libc::SIGUSR1])?;
    let every = Duration::from_millis(20);
    let once = Timer::signalling(libc::CLOCK_MONOTONIC, libc::SIGUSR1, 11)?;
    let timer = Timer::signalling(libc::CLOCK_MONOTONIC, signo, 12)?;
    let before = monotonic();
    timer.set(0, every, every)?;
    let after = monotonic();
    once.set(0, Duration::from_millis(1), Duration::ZERO)?;
    crate::stage::sleep(5 * every);

    let crash = stage.crash()?;
    if crash.damage {
        timer.set(0, HOUR, every)?;
        await_signal(&[signo])?;
    }
    // A kernel counts from its own start at most.
    let noticed = monotonic();
    let told = await_signal(&[libc::SIGUSR1])?;
    same("the single one", &(once.0, 11, 0), &(told.timer, told.value, told.overrun))?;
    let earliest = (monotonic() - noticed.max(after)).as_millis() / every.as_millis();
    let told = await_signal(&[signo])?;
    let latest = (monotonic() - before).as_millis() / every.as_millis();
    same("the periodic one", &(timer.0, 12), &(told.timer, told.value))?;
    // One has been counted by coming.
    let expected = earliest.saturating_sub(2)..=latest;
    ensure!(
        expected.contains(&(told.overrun as u128)),
        "{} more expirations, and not {expected:?}",
        told.overrun
    );
    same("timer_getoverrun", &i64::from(told.overrun), &timer.overruns()?)?;
    await_signal(&[signo]).map(drop)
}

/// POSIX timers of CPU time.
pub fn posix_cpu(stage: &mut Stage) -> Result<()> {
    let (process_signal, thread_signal) = (libc::SIGRTMIN() + 6, libc::SIGRTMIN() + 7);
    block(&[process_signal, thread_signal])?;
    let process = Timer::signalling(libc::CLOCK_PROCESS_CPUTIME_ID, process_signal, 21)?;
    let thread = Timer::signalling(libc::CLOCK_THREAD_CPUTIME_ID, thread_signal, 22)?;
    process.set(0, HOUR, HOUR)?;
    thread.set(0, Duration::from_millis(600), 7 * HOUR)?;

    let crash = stage.crash()?;
    if crash.damage {
        process.delete()?;
    }
    let (left, every) = process.get()?;
    same("interval", &HOUR, &every)?;
    ensure!((HOUR - PATIENCE..=HOUR + ROUNDING).contains(&left), "{left:?} of the process's time are left");
    work_until_pending(thread_signal)?;
    let told = await_signal(&[thread_signal])?;
    same("timer and value", &(thread.0, 22), &(told.timer, told.value))
}
