//! Timers that send signals. The kernel numbers POSIX timers itself, one after the other: whoever wants number 5 makes and deletes
//! those before it.

use std::iter::once_with;
use std::ops::Range;
use std::time::Duration;

use snapshot::{IntervalTimer, Pid, PosixExpiry, PosixTimer, Process, Reason, Timers};

use crate::inject::{Call, call};
use crate::sys;

/// Numbers that are used up in one go.
const BATCH: i32 = 200;
/// Bytes of a `struct sigevent`.
const SIGEVENT: usize = 64;

/// What one thread has to do for the process's timers, in this order.
pub(crate) struct Errand {
    /// `None`: any thread.
    pub(crate) thread: Option<Pid>,
    pub(crate) calls: Vec<Call>,
}

/// Makes all POSIX timers and starts those that ran; then the interval timers. `gone_by` says for how long clocks have gone on; it is asked
/// when an errand's turn has come, since what is set by how much is left is late by the time in between.
pub(crate) fn errands(
    process: &Process,
    gone_by: impl Fn() -> Duration + Copy,
) -> impl Iterator<Item = Errand> {
    let timers = &process.timers;
    let mut next = 0;
    let posix = timers.posix.iter().flat_map(move |timer| {
        let unused = next..timer.id;
        next = timer.id.saturating_add(1);
        let skips = batches(unused).map(|ids| Errand { thread: None, calls: ids.flat_map(skip).collect() });
        // A thread's own clock is that of whoever makes the timer.
        let thread = timer.measures.filter(|whom| *whom != process.pid || timer.clock & PER_THREAD != 0);
        skips.chain(once_with(move || Errand { thread, calls: make(timer, gone_by()) }))
    });
    let intervals = move || Errand { thread: None, calls: intervals(process.pid, timers, gone_by()) };
    posix.chain(once_with(intervals))
}

/// CPUCLOCK_PERTHREAD_MASK of clocks below zero (include/linux/posix-timers_types.h).
const PER_THREAD: i32 = 4;

fn batches(ids: Range<i32>) -> impl Iterator<Item = Range<i32>> {
    let end = ids.end;
    ids.step_by(BATCH as usize).map(move |from| from..end.min(from.saturating_add(BATCH)))
}

fn create(clock: i32, notify: i32, signo: i32, value: u64, target: Pid) -> Call {
    let mut event = [0u8; SIGEVENT];
    event[..8].copy_from_slice(&value.to_ne_bytes());
    event[8..12].copy_from_slice(&signo.to_ne_bytes());
    event[12..16].copy_from_slice(&notify.to_ne_bytes());
    event[16..20].copy_from_slice(&target.to_ne_bytes());
    // The number is known: who got another one fails with the next call.
    call!("timer_create", libc::SYS_timer_create, clock, event.to_vec(), vec![0u8; 4])
}

fn skip(id: i32) -> [Call; 2] {
    let make = create(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0);
    [make, call!("timer_delete", libc::SYS_timer_delete, id)]
}

fn make(timer: &PosixTimer, gone_by: Duration) -> Vec<Call> {
    let mut calls = vec![create(timer.clock, timer.notify, timer.signo, timer.value, timer.target)];
    let (flags, ns) = match timer.expiry {
        None => return calls,
        Some(PosixExpiry::At { ns }) => (libc::TIMER_ABSTIME, u64::try_from(ns).unwrap_or(0)),
        // CPU time has stood still.
        Some(PosixExpiry::In { ns }) if timer.measures.is_some() => (0, ns),
        Some(PosixExpiry::In { ns }) => (0, since(ns, gone_by)),
    };
    // Zero would stop it.
    let spec = [timespec(timer.interval_ns), timespec(ns.max(1))].concat();
    calls.push(call!("timer_settime", libc::SYS_timer_settime, timer.id, flags, spec, 0u64));
    calls
}

fn since(ns: u64, gone_by: Duration) -> u64 {
    ns.saturating_sub(u64::try_from(gone_by.as_nanos()).unwrap_or(u64::MAX))
}

fn timespec(ns: u64) -> Vec<u8> {
    const SECOND: u64 = 1_000_000_000;
    [ns / SECOND, ns % SECOND].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// To the next microsecond.
fn timeval(ns: u64) -> Vec<u8> {
    let us = ns.div_ceil(1000);
    [us / 1_000_000, us % 1_000_000].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn intervals(pid: Pid, timers: &Timers, gone_by: Duration) -> Vec<Call> {
    let set = |what: &str, which: libc::c_int, left_ns: u64, interval_ns: u64| {
        let spec = [timeval(interval_ns), timeval(left_ns.max(1))].concat();
        call!(format!("setitimer {what}"), libc::SYS_setitimer, which, spec, 0u64)
    };
    let of_cpu = [
        ("ITIMER_VIRTUAL", libc::ITIMER_VIRTUAL, timers.virtual_time),
        ("ITIMER_PROF", libc::ITIMER_PROF, timers.profiling),
    ];
    let of_cpu = of_cpu.into_iter().filter_map(|(what, which, timer)| Some((what, which, timer?)));
    let mut calls: Vec<Call> =
        of_cpu.map(|(what, which, timer)| set(what, which, timer.left_ns, timer.interval_ns)).collect();
    if let Some(timer) = timers.real {
        let (is_due, left_ns) = next(timer, gone_by);
        if is_due {
            // What it_real_fn() (kernel/time/itimer.c) sends.
            let mut info = vec![0u8; 128];
            info[..4].copy_from_slice(&libc::SIGALRM.to_ne_bytes());
            info[8..12].copy_from_slice(&libc::SI_KERNEL.to_ne_bytes());
            calls.push(call!("SIGALRM", libc::SYS_rt_sigqueueinfo, pid, libc::SIGALRM, info));
        }
        calls.push(set("ITIMER_REAL", libc::ITIMER_REAL, left_ns, timer.interval_ns));
    }
    calls
}

/// Whether a periodic timer's time has come meanwhile, and what is left up to its next one: it keeps to its times, however late it is.
fn next(timer: IntervalTimer, gone_by: Duration) -> (bool, u64) {
    let IntervalTimer { left_ns, interval_ns } = timer;
    let gone_by = u64::try_from(gone_by.as_nanos()).unwrap_or(u64::MAX);
    match gone_by.checked_sub(left_ns) {
        Some(late) if interval_ns > 0 => (true, interval_ns - late % interval_ns),
        _ => (false, left_ns.saturating_sub(gone_by)),
    }
}

/// POSIX timers whose signals are pending since before this kernel began: it has no time that is as early, and counts from its own start.
pub(crate) fn losses(process: &Process, is_before_boot: &dyn Fn(i32, i64) -> bool) -> Vec<Reason> {
    let periodic = process.timers.posix.iter().filter(|timer| timer.is_pending && timer.interval_ns > 0);
    let early = periodic.filter(|timer| match timer.expiry {
        Some(PosixExpiry::At { ns }) => is_before_boot(timer.clock, ns),
        _ => false,
    });
    let text = |timer: &PosixTimer| {
        format!("of its POSIX timer {} the overruns before this kernel's start are not counted", timer.id)
    };
    early.map(|timer| Reason::new("timer", text(timer))).collect()
}

/// Signals that timers may have sent by now, to the process and to this thread; bit n-1 is signal n.
pub(crate) fn signals(process: &Process, tid: Pid) -> (u64, u64) {
    let bit = |signo: i32| if (1..=64).contains(&signo) { 1u64 << (signo - 1) } else { 0 };
    let timers = &process.timers;
    let intervals = [
        (timers.real.is_some(), libc::SIGALRM),
        (timers.virtual_time.is_some(), libc::SIGVTALRM),
        (timers.profiling.is_some(), libc::SIGPROF),
    ];
    let intervals = intervals.into_iter().filter(|(runs, _)| *runs).map(|(_, signo)| bit(signo));
    let is_running = |timer: &&PosixTimer| timer.expiry.is_some() && timer.notify != libc::SIGEV_NONE;
    let (to_threads, to_process): (Vec<&PosixTimer>, Vec<&PosixTimer>) =
        timers.posix.iter().filter(is_running).partition(|timer| timer.notify & libc::SIGEV_THREAD_ID != 0);
    let to_this = to_threads.into_iter().filter(|timer| timer.target == tid);
    let all = |signals: &mut dyn Iterator<Item = u64>| signals.fold(0, |set, signal| set | signal);
    (
        all(&mut intervals.chain(to_process.into_iter().map(|timer| bit(timer.signo)))),
        all(&mut to_this.map(|timer| bit(timer.signo))),
    )
}

/// POSIX timers that are not as they were, in words.
pub(crate) fn differences(process: &Process) -> Vec<String> {
    let Ok(now) = sys::read_proc(&format!("/proc/{}/timers", process.pid)) else {
        // A kernel without CONFIG_CHECKPOINT_RESTORE: the calls have succeeded.
        return vec![];
    };
    let now = String::from_utf8_lossy(&now);
    let count = now.lines().filter(|line| line.starts_with("ID: ")).count();
    let missing =
        process.timers.posix.iter().map(PosixTimer::proc_entry).filter(|entry| !now.contains(entry));
    let mut found: Vec<_> = missing
        .map(|entry| format!("it lacks the POSIX timer {}", entry.trim().replace('\n', ", ")))
        .collect();
    if found.is_empty() && count != process.timers.posix.len() {
        found.push(format!("it has {count} POSIX timers and had {}", process.timers.posix.len()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_numbers_are_skipped_in_batches() {
        let all: Vec<_> = batches(0..450).collect();
        assert_eq!(all, [0..200, 200..400, 400..450]);
        assert_eq!(batches(3..3).count(), 0);
    }

    #[test]
    fn only_running_timers_send_signals() {
        let timer = |id, notify, signo, target, runs: bool| PosixTimer {
            id,
            clock: libc::CLOCK_MONOTONIC,
            notify,
            signo,
            value: 0,
            target,
            measures: None,
            expiry: runs.then_some(PosixExpiry::In { ns: 1 }),
            interval_ns: 0,
            is_pending: false,
            overruns: 0,
        };
        let text = r#"{"pid":5,"ppid":1,"pgid":5,"sid":5,"comm":"x","state":{"type":"alive"},"threads":[],"address_space":null,
            "files_id":0,"descriptors":[],"fs":{"id":0,"cwd":"/","root":"/","umask":0,"cwd_deleted":false},"signals":{"id":0,"actions":[],"pending":[]},
            "rlimits":[],"ctty":null,"exit_signal":17,"child_subreaper":false,"oom_score_adj":0,"cgroup":"","unit":null,
            "namespaces":{"cgroup":true,"ipc":true,"mnt":true,"net":true,"pid":true,"time":true,"user":true,"uts":true},
            "start_boottime_ns":0,"unsupported":[],"decision":{"do":"undecided"}}"#;
        let mut process: Process = serde_json::from_str(text).unwrap();
        assert_eq!(signals(&process, 5), (0, 0));
        process.timers.real = Some(IntervalTimer { left_ns: 1, interval_ns: 0 });
        process.timers.posix = vec![
            timer(0, libc::SIGEV_SIGNAL, 10, 5, true),
            timer(1, libc::SIGEV_SIGNAL, 11, 5, false),
            timer(2, libc::SIGEV_NONE, 12, 5, true),
            timer(3, libc::SIGEV_THREAD_ID, 13, 6, true),
        ];
        assert_eq!(signals(&process, 5), (1 << 13 | 1 << 9, 0));
        assert_eq!(signals(&process, 6), (1 << 13 | 1 << 9, 1 << 12));
    }

    #[test]
    fn a_periodic_timer_keeps_to_its_times() {
        let timer = |left_ns, interval_ns| IntervalTimer { left_ns, interval_ns };
        let gone_by = Duration::from_nanos(25);
        assert_eq!(next(timer(40, 10), gone_by), (false, 15));
        assert_eq!(next(timer(21, 10), gone_by), (true, 6));
        assert_eq!(next(timer(5, 10), gone_by), (true, 10));
        assert_eq!(next(timer(5, 0), gone_by), (false, 0));
    }

    #[test]
    fn times_are_rounded_up() {
        assert_eq!(timeval(1_000_001), [0u64.to_ne_bytes(), 1001u64.to_ne_bytes()].concat());
        assert_eq!(timeval(1), [0u64.to_ne_bytes(), 1u64.to_ne_bytes()].concat());
        assert_eq!(since(5, Duration::from_secs(1)), 0);
    }
}
