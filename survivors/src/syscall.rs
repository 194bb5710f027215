//! System calls that were sleeping when the kernel died: they must sleep the rest, no less and no more.
//!
//! Measured by CLOCK_MONOTONIC. The time before the crash counts. The time while the machine was dead counts as far as the
//! clock does: the main thread measures how long it was away by that same clock, and that much a sleep may last longer.
//! A call that is simply started anew lasts longer than that, and is found out, unless it had only just begun.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags};
use rustix::thread::futex;

use crate::Stage;
use crate::stage::{monotonic, sleep};

/// Sleepers wake late on a busy machine, in QEMU above all.
const LATE: Duration = Duration::from_millis(1500);
/// A remaining time that was read from a dead kernel and set up anew may be rounded.
const EARLY: Duration = Duration::from_millis(10);

macro_rules! survivors {
    ($($(#[$doc:meta])* $name:ident: $call:expr;)*) => {
        $($(#[$doc])* pub fn $name(stage: &mut Stage) -> Result<()> { sleeper(stage, $call) })*
    };
}

survivors! {
    /// nanosleep(2)
    nanosleep: |time| {
        let request = timespec(time);
        // SAFETY: reads one timespec.
        let result = unsafe { libc::syscall(libc::SYS_nanosleep, &raw const request, 0) };
        Errno::result(result).map(drop).context("nanosleep")
    };
    /// clock_nanosleep(2), relative
    clock_nanosleep: |time| {
        let request = TimeSpec::from_duration(time);
        nix::time::clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::empty(), &request)
            .map(drop)
            .context("clock_nanosleep")
    };
    /// clock_nanosleep(2), to a point of time
    clock_nanosleep_absolute: |time| {
        let until = TimeSpec::from_duration(monotonic() + time);
        nix::time::clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &until)
            .map(drop)
            .context("clock_nanosleep")
    };
    /// poll(2)
    poll: |time| {
        let (reader, _writer) = nix::unistd::pipe()?;
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&reader), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(time)?;
        let events = nix::poll::poll(&mut fds, timeout).context("poll")?;
        ensure!(events == 0, "poll found {events} events on an empty pipe");
        Ok(())
    };
    /// ppoll(2)
    ppoll: |time| {
        let (reader, _writer) = nix::unistd::pipe()?;
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&reader), PollFlags::POLLIN)];
        let events = nix::poll::ppoll(&mut fds, Some(TimeSpec::from_duration(time)), None).context("ppoll")?;
        ensure!(events == 0, "ppoll found {events} events on an empty pipe");
        Ok(())
    };
    /// select(2), which is pselect6 to the kernel
    select: |time| {
        let mut timeout = nix::sys::time::TimeVal::new(time.as_secs() as i64, time.subsec_micros().into());
        let events = nix::sys::select::select(None, None, None, None, &mut timeout).context("select")?;
        ensure!(events == 0, "select found {events} events");
        Ok(())
    };
    /// futex(2) FUTEX_WAIT with a timeout
    futex: |time| {
        let word = std::sync::atomic::AtomicU32::new(1);
        let timeout = rustix::thread::Timespec {
            tv_sec: time.as_secs() as i64,
            tv_nsec: time.subsec_nanos().into(),
        };
        let result = futex::wait(&word, futex::Flags::PRIVATE, 1, Some(&timeout));
        ensure!(result == Err(rustix::io::Errno::TIMEDOUT), "futex returned {result:?}");
        Ok(())
    };
    /// rt_sigtimedwait(2). Its timeout is in the program's memory and not to be written to, and in a static program nobody knows whether the
    /// register matters: as after a stop signal it ends with EINTR, and the program waits for the rest (sigwaitinfo(2)).
    sigtimedwait: |time| {
        let mut set = nix::sys::signal::SigSet::empty();
        set.add(nix::sys::signal::Signal::SIGUSR2);
        let end = monotonic() + time;
        loop {
            let left = timespec(end.saturating_sub(monotonic()));
            // SAFETY: reads the set and the timespec.
            let result = unsafe { libc::sigtimedwait(set.as_ref(), std::ptr::null_mut(), &raw const left) };
            match Errno::result(result) {
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                other => bail!("sigtimedwait returned {other:?}"),
            }
        }
    };
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
}

/// Lets a thread sleep again and again; one of its sleeps meets the crash.
fn sleeper(stage: &mut Stage, call: fn(Duration) -> Result<()>) -> Result<()> {
    let period = stage.options().period;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<Duration> {
            let mut longest = Duration::ZERO;
            loop {
                let start = monotonic();
                call(period)?;
                let elapsed = monotonic().saturating_sub(start);
                ensure!(elapsed + EARLY >= period, "a sleep of {period:?} ended after {elapsed:?}");
                longest = longest.max(elapsed);
                if stop.load(Ordering::Relaxed) {
                    return Ok(longest);
                }
            }
        });
        let crash = stage.crash();
        stop.store(true, Ordering::Relaxed);
        let crash = crash?;
        let late = late_until(|| Ok(thread.is_finished()))?;
        let mut longest = match thread.join() {
            Ok(result) => result?,
            Err(_) => anyhow::bail!("the sleeping thread panicked"),
        };
        if crash.damage {
            longest += crash.gap + 2 * late;
        }
        ensure!(
            longest <= period + crash.gap + late,
            "a sleep of {period:?} lasted {longest:?}, this process was away {:?}",
            crash.gap
        );
        // The caller may look at its clocks at once: they go on.
        sleep(Duration::from_millis(1));
        Ok(())
    })
}

/// How late a sleeper may be that is waited for: [`LATE`], and all that this process itself is late until `is_over`, for no reason but that all
/// the others want the CPU too. (All, not the most at a time: whoever comes back waits for its turn at each of its steps, and for each page that it
/// runs on.)
fn late_until(mut is_over: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let short = Duration::from_millis(20);
    let mut late = LATE;
    while !is_over()? {
        let start = monotonic();
        sleep(short);
        late += monotonic().saturating_sub(start + short);
    }
    Ok(late)
}

/// epoll_wait(2) of a program that has the C library as a shared one.
pub fn epoll_wait(stage: &mut Stage) -> Result<()> {
    perl_sleeper(stage, "syscall(232, $epoll, $events, 8, $ms + 0)", "0 0")
}

/// rt_sigtimedwait(2) of such a program.
pub fn sigtimedwait_shared(stage: &mut Stage) -> Result<()> {
    perl_sleeper(stage, "syscall(128, $set, 0, $timeout, 8)", "-1 11")
}

/// What a sleeper is, in Perl: each line of its log is the call's result, errno and how long it took, in milliseconds.
const SLEEPER: &str = r#"
my ($ms, $log, $stop) = @ARGV;
my ($spec, $events, $set) = ("\0" x 16, "\0" x 128, pack("Q", 1 << 11));
my $timeout = pack("qq", int($ms / 1000), $ms % 1000 * 1e6);
my $epoll = syscall(291, 0);
# mlockall: what it runs on must not have to be read from the disk when its time has come.
syscall(151, 1) == 0 or die;
sub now { syscall(228, 1, $spec); my ($s, $ns) = unpack("qq", $spec); return $s * 1000 + $ns / 1e6; }
open(my $out, ">", $log) or die;
$out->autoflush(1);
print $out "begun\n";
until (-e $stop) {
    my $start = now();
    $! = 0;
    my $result = CALL;
    printf $out "%d %d %d\n", $result, $! + 0, now() - $start;
}
"#;

/// As [`sleeper`], for a dynamically linked program.
fn perl_sleeper(stage: &mut Stage, call: &str, outcome: &str) -> Result<()> {
    let period = stage.options().period;
    let (log, stop) = (stage.path("log"), stage.path("stop"));
    let mut perl = std::process::Command::new("perl");
    perl.args(["-MIO::Handle", "-e", &SLEEPER.replace("CALL", call)]).arg(period.as_millis().to_string());
    let mut child = perl.arg(&log).arg(&stop).spawn().context("perl")?;
    while std::fs::read_to_string(&log).unwrap_or_default().is_empty() {
        ensure!(child.try_wait()?.is_none(), "perl has ended");
        sleep(Duration::from_millis(20));
    }

    let crash = stage.crash()?;
    std::fs::write(&stop, "")?;
    let late = late_until(|| Ok(child.try_wait()?.is_some()))?;
    ensure!(child.wait()?.success(), "perl has failed");
    let mut longest = Duration::ZERO;
    for line in std::fs::read_to_string(&log)?.lines().skip(1) {
        let (result, elapsed) = line.rsplit_once(' ').context("a strange line")?;
        let elapsed = Duration::from_millis(elapsed.parse()?);
        ensure!(result == outcome, "the call gave {result} after {elapsed:?}");
        ensure!(elapsed + EARLY >= period, "a wait of {period:?} ended after {elapsed:?}");
        longest = longest.max(elapsed);
    }
    if crash.damage {
        longest += crash.gap + 2 * late;
    }
    ensure!(
        longest <= period + crash.gap + late,
        "a wait of {period:?} lasted {longest:?}, this process was away {:?}",
        crash.gap
    );
    Ok(())
}
