//! Timers that send signals: `signal_struct.real_timer`, `.it` (include/linux/sched/signal.h, kernel/time/itimer.c), `k_itimer`
//! (include/linux/posix-timers.h, kernel/time/posix-timers.c, posix-cpu-timers.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{IntervalTimer, PendingSignal, PosixExpiry, PosixTimer, Timers, timer_of};

use crate::Autopsy;
use crate::error::{Result, Visited, corrupt};
use crate::syscall::Expiry;

/// A queue entry is allocated for each, and their number is limited (RLIMIT_SIGPENDING).
const MAX_TIMERS: usize = 1 << 17;

// include/uapi/linux/time.h
const CLOCK_REALTIME_ALARM: i32 = 8;
const CLOCK_BOOTTIME_ALARM: i32 = 9;
const CLOCK_TAI: i32 = 11;
/// HRTIMER_STATE_ENQUEUED.
const ENQUEUED: u8 = 1;
/// SIGEV_NONE.
const NONE: i32 = 1;
// Clocks of CPU time are below zero (include/linux/posix-timers_types.h): what they measure, and whether of a thread.
const CPUCLOCK_PROF: i32 = 0;
const CPUCLOCK_VIRT: i32 = 1;
const CPUCLOCK_SCHED: i32 = 2;
const CPUCLOCK_WHICH: i32 = 3;
const CPUCLOCK_PERTHREAD: i32 = 4;

#[derive(KernelType)]
#[kernel("signal_struct")]
struct Signal {
    // A list_head in 6.1, an hlist_head in 6.12: either way the first word leads to the first timer.
    #[kernel("posix_timers.next", or = "posix_timers.first")]
    first_posix_timer: u64,
    #[kernel("posix_timers", address)]
    posix_timers: u64,
    #[kernel("real_timer._softexpires")]
    real_expires: i64,
    #[kernel("real_timer.state")]
    real_state: u8,
    it_real_incr: i64,
    #[kernel("it[0].expires")]
    profiling_expires: u64,
    #[kernel("it[0].incr")]
    profiling_interval: u64,
    #[kernel("it[1].expires")]
    virtual_expires: u64,
    #[kernel("it[1].incr")]
    virtual_interval: u64,
    // What the process has used, kept while anything of it is measured.
    #[kernel("cputimer.cputime_atomic.utime.counter")]
    utime: u64,
    #[kernel("cputimer.cputime_atomic.stime.counter")]
    stime: u64,
    #[kernel("cputimer.cputime_atomic.sum_exec_runtime.counter")]
    runtime: u64,
}

#[derive(KernelType)]
#[kernel("task_struct")]
struct CpuTime {
    utime: u64,
    stime: u64,
    #[kernel("se.sum_exec_runtime")]
    runtime: u64,
}

#[derive(KernelType)]
#[kernel("k_itimer")]
struct KItimer {
    // The first word of a list_head (6.1) and of an hlist_node (6.12).
    #[kernel("list.next")]
    next: u64,
    it_clock: i32,
    it_id: i32,
    it_active: i32,
    it_overrun_last: i64,
    it_sigev_notify: i32,
    it_interval: i64,
    it_signal: u64,
    it_pid: u64,
    sigq: u64,
    #[kernel("it.real.timer._softexpires")]
    expires: i64,
    #[kernel("it.real.timer.base")]
    base: u64,
    #[kernel("it.alarm.alarmtimer.node.expires")]
    alarm_expires: i64,
    #[kernel("it.cpu.node.expires")]
    cpu_expires: i64,
    #[kernel("it.cpu.pid")]
    cpu_of: u64,
}

#[derive(KernelType)]
#[kernel("sigqueue")]
struct SigQueue {
    #[kernel("info.si_signo")]
    signo: i32,
    #[kernel("info._sifields._timer._sigval.sival_ptr")]
    value: u64,
}

/// What is left of a timer that may be over: of a periodic one that is to be set again, up to the next of its times.
fn left(left_ns: i64, interval_ns: u64, is_set: bool) -> u64 {
    match u64::try_from(left_ns) {
        Ok(left) => left,
        Err(_) if is_set || interval_ns == 0 => 0,
        Err(_) => interval_ns - left_ns.unsigned_abs() % interval_ns,
    }
}

impl Autopsy<'_> {
    /// `signal`: address of a `signal_struct`; `task_of`: address of the `task_struct` of a thread; `pending`: all signals that wait in the
    /// process's queues.
    pub(crate) fn process_timers(
        &self,
        addr: u64,
        task_of: &dyn Fn(i32) -> Option<u64>,
        pending: &[&PendingSignal],
    ) -> Result<Timers> {
        let signal: Signal = self.kernel.read(addr)?;
        let mut timers = Timers {
            real: self.real_timer(&signal),
            profiling: cpu_timer(
                signal.profiling_expires,
                signal.profiling_interval,
                signal.utime.saturating_add(signal.stime),
            ),
            virtual_time: cpu_timer(signal.virtual_expires, signal.virtual_interval, signal.utime),
            posix: vec![],
        };
        let link = self.kernel.offset_of("k_itimer", "list")?;
        let mut node = signal.first_posix_timer;
        let mut visited = Visited::default();
        for count in 0.. {
            if node == 0 || node == signal.posix_timers {
                break;
            }
            let at = node.wrapping_sub(link);
            if count >= MAX_TIMERS {
                return Err(corrupt("k_itimer", at, "the list does not end"));
            }
            visited.visit("k_itimer", at)?;
            let timer: KItimer = self.kernel.read(at)?;
            node = timer.next;
            // One that is being deleted belongs to nobody.
            if timer.it_signal == addr {
                timers.posix.push(self.posix_timer(at, &timer, &signal, task_of, pending)?);
            }
        }
        timers.posix.sort_by_key(|timer| timer.id);
        match timers.posix.windows(2).find(|pair| pair[0].id == pair[1].id) {
            Some([timer, _]) => {
                Err(corrupt("k_itimer", addr, format!("two timers have the number {}", timer.id)))
            }
            _ => Ok(timers),
        }
    }

    fn real_timer(&self, signal: &Signal) -> Option<IntervalTimer> {
        let is_set = signal.real_state & ENQUEUED != 0;
        let interval_ns = u64::try_from(signal.it_real_incr).unwrap_or(0);
        // One that has expired is set again when the signal is delivered.
        if !is_set && interval_ns == 0 {
            return None;
        }
        let left_ns = signal.real_expires.saturating_sub(self.now().monotonic_ns);
        Some(IntervalTimer { left_ns: left(left_ns, interval_ns, is_set), interval_ns })
    }

    fn posix_timer(
        &self,
        addr: u64,
        timer: &KItimer,
        signal: &Signal,
        task_of: &dyn Fn(i32) -> Option<u64>,
        pending: &[&PendingSignal],
    ) -> Result<PosixTimer> {
        if timer.it_id < 0 {
            return Err(corrupt("k_itimer", addr, format!("has the number {}", timer.it_id)));
        }
        let entry: SigQueue = self.kernel.read(timer.sigq)?;
        let target = self.pid_number(timer.it_pid)?;
        let interval_ns = u64::try_from(timer.it_interval).unwrap_or(0);
        let has_signal = pending.iter().any(|signal| timer_of(signal) == Some(timer.it_id));
        let (mut expiry, mut measures) = (None, None);
        if timer.it_clock < 0 {
            let whom = self.pid_number(timer.cpu_of)?;
            let used = self.used_time(timer.it_clock, whom, signal, task_of);
            if let (expires @ 1.., Some(used)) = (timer.cpu_expires, used?) {
                let left_ns = expires.saturating_sub_unsigned(used);
                expiry = Some(PosixExpiry::In { ns: left(left_ns, interval_ns, false) });
            }
            measures = Some(whom);
        } else if let Some((clock, ns)) = self.posix_expiry(timer)? {
            let is_set = timer.it_active != 0 || timer.it_sigev_notify == NONE;
            let is_own = clock == timer.it_clock && clock != CLOCK_TAI;
            let left_ns = Expiry { clock, ns }.remaining(self.now());
            expiry = match (is_set || has_signal, left_ns) {
                (true, _) if is_own => Some(PosixExpiry::At { ns }),
                (false, _) if interval_ns == 0 => None,
                (is_set, Some(left_ns)) => Some(PosixExpiry::In { ns: left(left_ns, interval_ns, is_set) }),
                (_, None) => {
                    return Err(corrupt(
                        "k_itimer",
                        addr,
                        format!("runs on clock {clock}, whose time is not known"),
                    ));
                }
            };
        }
        Ok(PosixTimer {
            id: timer.it_id,
            clock: timer.it_clock,
            notify: timer.it_sigev_notify,
            signo: entry.signo,
            value: entry.value,
            target,
            measures,
            expiry,
            interval_ns,
            is_pending: has_signal && expiry.is_some() && timer.it_clock >= 0,
            overruns: timer.it_overrun_last,
        })
    }

    /// The clock that a timer of a wall clock or a monotonic one waits for, and the time on it; `None` for one that was never set.
    fn posix_expiry(&self, timer: &KItimer) -> Result<Option<(i32, i64)>> {
        let (clock, ns) = match timer.it_clock {
            CLOCK_REALTIME_ALARM | CLOCK_BOOTTIME_ALARM => (timer.it_clock, timer.alarm_expires),
            _ if timer.base == 0 => return Ok(None),
            _ => match self.timers().clock_of(timer.base) {
                Some(clock) => (clock, timer.expires),
                None => return Err(corrupt("hrtimer_clock_base", timer.base, "is of no CPU")),
            },
        };
        Ok((ns != 0).then_some((clock, ns)))
    }

    /// What a clock of CPU time shows; `None` if it is not a thread of this process.
    fn used_time(
        &self,
        clock: i32,
        whom: i32,
        signal: &Signal,
        task_of: &dyn Fn(i32) -> Option<u64>,
    ) -> Result<Option<u64>> {
        let used = match clock & CPUCLOCK_PERTHREAD {
            0 => CpuTime { utime: signal.utime, stime: signal.stime, runtime: signal.runtime },
            _ => match task_of(whom) {
                Some(task) => self.kernel.read(task)?,
                None => return Ok(None),
            },
        };
        Ok(match clock & CPUCLOCK_WHICH {
            CPUCLOCK_PROF => Some(used.utime.saturating_add(used.stime)),
            CPUCLOCK_VIRT => Some(used.utime),
            CPUCLOCK_SCHED => Some(used.runtime),
            _ => None,
        })
    }
}

/// An interval timer of CPU time.
fn cpu_timer(expires: u64, interval_ns: u64, used: u64) -> Option<IntervalTimer> {
    (expires != 0).then(|| IntervalTimer { left_ns: expires.saturating_sub(used), interval_ns })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::{Synth, array, named};

    /// Declares what is only used by offset.
    #[derive(KernelType)]
    #[kernel("cpu_itimer")]
    struct CpuTimer {
        #[kernel("expires")]
        _expires: u64,
        #[kernel("incr")]
        _incr: u64,
    }

    #[test]
    fn what_is_over_is_due_or_waits_for_its_next_time() {
        assert_eq!(left(5, 0, true), 5);
        assert_eq!(left(-5, 10, true), 0);
        assert_eq!(left(-5, 0, false), 0);
        assert_eq!(left(-5, 10, false), 5);
        assert_eq!(left(-25, 10, false), 5);
        assert_eq!(left(i64::MIN, 10, false), 10 - (1u64 << 63) % 10);
    }

    fn machine() -> (Synth, u64) {
        let mut synth = Synth::new();
        declare::<CpuTimer>(&mut synth, &[]);
        declare::<Signal>(&mut synth, &[("it", array(named("cpu_itimer"), 2))]);
        declare::<KItimer>(&mut synth, &[]);
        declare::<SigQueue>(&mut synth, &[]);
        declare::<CpuTime>(&mut synth, &[]);
        let signal = synth.alloc("signal_struct");
        (synth, signal)
    }

    #[test]
    fn a_process_without_timers_has_none() {
        let (synth, signal) = machine();
        let kernel = open(&synth);
        let timers = Autopsy::new(&kernel).process_timers(signal, &|_| None, &[]).unwrap();
        assert_eq!(timers, Timers::default());
    }

    #[test]
    fn interval_timers_of_cpu_time_have_what_is_left() {
        let (mut synth, signal) = machine();
        synth.set("signal_struct", signal, "it[0].expires", 700);
        synth.set("signal_struct", signal, "it[0].incr", 50);
        synth.set("signal_struct", signal, "cputimer.cputime_atomic.utime.counter", 400);
        synth.set("signal_struct", signal, "cputimer.cputime_atomic.stime.counter", 100);
        let kernel = open(&synth);
        let timers = Autopsy::new(&kernel).process_timers(signal, &|_| None, &[]).unwrap();
        assert_eq!(timers.profiling, Some(IntervalTimer { left_ns: 200, interval_ns: 50 }));
        assert_eq!(timers.virtual_time, None);
    }

    #[test]
    fn a_list_that_leads_in_a_circle_ends() {
        let (mut synth, signal) = machine();
        let timer = synth.alloc("k_itimer");
        let node = synth.address_of("k_itimer", timer, "list");
        synth.set("signal_struct", signal, "posix_timers.next", node);
        synth.set("k_itimer", timer, "list.next", node);
        let kernel = open(&synth);
        let error = Autopsy::new(&kernel).process_timers(signal, &|_| None, &[]);
        // Timers of nobody are passed over, but not for ever.
        assert!(error.is_err());
    }
}
