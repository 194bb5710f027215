//! Timers that send signals: interval timers (setitimer, alarm) and POSIX timers (timer_create).

use serde::{Deserialize, Serialize};

use crate::{PendingSignal, Pid, Process, Reason};

/// POSIX timers whose numbers reach this are not made again: each lower number has to be used up first.
pub const MAX_TIMER_ID: i32 = 1 << 17;

/// SI_TIMER (include/uapi/asm-generic/siginfo.h).
const SI_TIMER: i32 = -2;
/// SIGEV_THREAD_ID.
const THREAD_ID: i32 = 4;

/// All timers of a process (`signal_struct`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timers {
    /// ITIMER_REAL, which alarm(2) sets too.
    pub real: Option<IntervalTimer>,
    /// ITIMER_VIRTUAL.
    pub virtual_time: Option<IntervalTimer>,
    /// ITIMER_PROF.
    pub profiling: Option<IntervalTimer>,
    /// By ascending number.
    pub posix: Vec<PosixTimer>,
}

/// setitimer(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    /// Nanoseconds from the moment of the panic, or of CPU time; 0 for one that was about to expire.
    pub left_ns: u64,
    /// Nanoseconds; 0: once.
    pub interval_ns: u64,
}

/// timer_create(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    #[allow(missing_docs)]
    pub id: i32,
    /// CLOCK_*, or the clock of a process's or thread's CPU time.
    pub clock: i32,
    /// SIGEV_*.
    pub notify: i32,
    #[allow(missing_docs)]
    pub signo: i32,
    /// Comes with the signal.
    pub value: u64,
    /// The process that gets the signal, or the thread (SIGEV_THREAD_ID).
    pub target: Pid,
    /// Of a clock of CPU time: the thread that is measured, or the process.
    pub measures: Option<Pid>,
    /// `None`: it does not run.
    pub expiry: Option<PosixExpiry>,
    /// Nanoseconds; 0: once.
    pub interval_ns: u64,
    /// It has expired, and its signal waits in a queue.
    pub is_pending: bool,
    /// What timer_getoverrun(2) returns.
    pub overruns: i64,
}

/// When a [`PosixTimer`] expires (or has expired, when its signal is pending).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum PosixExpiry {
    /// At a time of its clock.
    At {
        /// Nanoseconds.
        ns: i64,
    },
    /// Some time after the panic, whatever becomes of its clock; or after so much CPU time.
    In {
        /// Nanoseconds, 0 for what is over.
        ns: u64,
    },
}

impl PosixTimer {
    /// Its entry in /proc/PID/timers.
    pub fn proc_entry(&self) -> String {
        let how = ["signal", "none", "thread"].get((self.notify & !THREAD_ID) as usize).unwrap_or(&"?");
        let whom = if self.notify & THREAD_ID != 0 { "tid" } else { "pid" };
        let Self { id, signo, value, target, clock, .. } = self;
        format!("ID: {id}\nsignal: {signo}/{value:016x}\nnotify: {how}/{whom}.{target}\nClockID: {clock}\n")
    }
}

impl Process {
    /// Pending signals but those that their timers send again when they are set to the time at which they expired.
    pub fn without_timers<'a>(
        &'a self,
        pending: &'a [PendingSignal],
    ) -> impl Iterator<Item = &'a PendingSignal> {
        let sends = |id| self.timers.posix.iter().any(|t| t.is_pending && t.id == id);
        pending.iter().filter(move |signal| !timer_of(signal).is_some_and(sends))
    }
}

/// The POSIX timer that a pending signal comes from.
pub fn timer_of(signal: &PendingSignal) -> Option<i32> {
    // siginfo_t: number, errno and code, padding, for timers their number.
    let word = |i: usize| Some(i32::from_le_bytes(signal.info.get(4 * i..4 * i + 4)?.try_into().ok()?));
    (word(2)? == SI_TIMER).then(|| word(4)).flatten()
}

/// What of a process's timers cannot be as it was.
pub(crate) fn judge(process: &Process, reasons: &mut Vec<Reason>, losses: &mut Vec<Reason>) {
    let lives =
        |tid: Pid| process.threads.iter().any(|t| t.tid == tid && t.state != crate::ThreadState::Dead);
    for timer in &process.timers.posix {
        let id = timer.id;
        if id >= MAX_TIMER_ID {
            let text = format!("its POSIX timer {id} has a number above {MAX_TIMER_ID}");
            reasons.push(Reason::new("timer", text));
        }
        if timer.notify & THREAD_ID != 0 && !lives(timer.target) {
            let text = format!("its POSIX timer {id} signals a thread that is gone ({})", timer.target);
            reasons.push(Reason::new("timer", text));
        }
        if timer.measures.is_some_and(|whom| whom != process.pid && !lives(whom)) {
            let text =
                format!("its POSIX timer {id} measures the CPU time of others, or of a thread that is gone");
            reasons.push(Reason::new("timer", text));
        }
        if timer.overruns > 0 {
            let text = format!(
                "timer_getoverrun of its POSIX timer {id} returns 0 and would have returned {}",
                timer.overruns
            );
            losses.push(Reason::new("timer", text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_look_as_in_proc() {
        let mut timer = PosixTimer {
            id: 3,
            clock: 1,
            notify: 4,
            signo: 34,
            value: 0xbeef,
            target: 77,
            measures: None,
            expiry: None,
            interval_ns: 0,
            is_pending: false,
            overruns: 0,
        };
        assert_eq!(
            timer.proc_entry(),
            "ID: 3\nsignal: 34/000000000000beef\nnotify: signal/tid.77\nClockID: 1\n"
        );
        timer.notify = 1;
        assert!(timer.proc_entry().contains("notify: none/pid.77\n"));
    }

    #[test]
    fn timers_are_named_by_their_signals() {
        let mut info = vec![0; 48];
        info[8..12].copy_from_slice(&SI_TIMER.to_le_bytes());
        info[16..20].copy_from_slice(&9i32.to_le_bytes());
        assert_eq!(timer_of(&PendingSignal { signo: 34, info: info.clone() }), Some(9));
        info[8] = 0;
        assert_eq!(timer_of(&PendingSignal { signo: 34, info }), None);
        assert_eq!(timer_of(&PendingSignal { signo: 34, info: vec![] }), None);
    }
}
