//! Timeouts of sleeping threads: the timers that would have woken them, and restart blocks.
//!
//! `hrtimer_cpu_base`, `hrtimer_clock_base`, `hrtimer_sleeper` (include/linux/hrtimer_defs.h, hrtimer.h;
//! kernel/time/hrtimer.c) and `restart_block` (include/linux/restart_block.h). The same in 6.1 and 6.12.

use std::collections::HashMap;

use ktypes::{Kernel, KernelType, Result};
use snapshot::Clocks;

/// A timer per task would be many; a longer tree is a damaged one.
const MAX_TIMERS: usize = 1 << 20;

// include/uapi/linux/time.h
const CLOCK_REALTIME: i32 = 0;
const CLOCK_MONOTONIC: i32 = 1;
const CLOCK_BOOTTIME: i32 = 7;
const CLOCK_REALTIME_ALARM: i32 = 8;
const CLOCK_BOOTTIME_ALARM: i32 = 9;
const CLOCK_TAI: i32 = 11;
/// enum hrtimer_base_type: which of a CPU's bases is of which clock. Each has a second one, `_SOFT`, for timers that expire in a softirq.
const BASES: [(&str, i32); 4] = [
    ("HRTIMER_BASE_MONOTONIC", CLOCK_MONOTONIC),
    ("HRTIMER_BASE_REALTIME", CLOCK_REALTIME),
    ("HRTIMER_BASE_BOOTTIME", CLOCK_BOOTTIME),
    ("HRTIMER_BASE_TAI", CLOCK_TAI),
];

/// A point in time on one of the kernel's clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expiry {
    /// CLOCK_*.
    pub clock: i32,
    /// Nanoseconds on that clock (of the initial time namespace).
    pub ns: i64,
}

impl Expiry {
    pub(super) fn monotonic(ns: i64) -> Expiry {
        Expiry { clock: CLOCK_MONOTONIC, ns }
    }

    /// Nanoseconds left, negative when over; `None` for clocks whose time is not known.
    pub fn remaining(self, now: &Clocks) -> Option<i64> {
        let now = match self.clock {
            CLOCK_REALTIME | CLOCK_REALTIME_ALARM => now.realtime_ns,
            CLOCK_MONOTONIC => now.monotonic_ns,
            CLOCK_BOOTTIME | CLOCK_BOOTTIME_ALARM => now.boottime_ns,
            _ => return None,
        };
        Some(self.ns.saturating_sub(now))
    }
}

#[derive(KernelType)]
#[kernel("hrtimer_clock_base")]
struct ClockBase {
    clockid: i32,
    #[kernel("active.rb_root", address)]
    active: u64,
}

#[derive(KernelType)]
#[kernel("hrtimer")]
struct Timer {
    function: u64,
    #[kernel("_softexpires")]
    soft_expires: i64,
    base: u64,
}

/// The timers that wake tasks, of all CPUs.
#[derive(Clone, Debug, Default)]
pub struct Timers {
    /// By the task's address.
    sleepers: HashMap<u64, Expiry>,
    /// The clock of each `hrtimer_clock_base`, by its address.
    clocks: HashMap<u64, i32>,
    /// What could not be read, for findings.
    pub damage: Vec<String>,
}

impl Timers {
    /// Reads the timer queues of all possible CPUs (`hrtimer_bases`): every queued timer with the function
    /// `hrtimer_wakeup` belongs to a `hrtimer_sleeper`. Which clock a queue is of is told by its place, whatever it says itself. A damaged queue
    /// is noted in [`damage`](Self::damage).
    ///
    /// # Errors
    /// When a symbol or a layout is missing.
    pub fn read(kernel: &Kernel) -> Result<Timers> {
        let per_cpu = kernel.symbol("hrtimer_bases")?;
        let wakeup = kernel.symbol("hrtimer_wakeup")?;
        let bases = kernel.member("hrtimer_cpu_base", "clock_base")?;
        let base_size = kernel.size_of("hrtimer_clock_base")?.max(1);
        let mut clocks = Vec::new();
        for (name, clock) in BASES {
            for name in [name.to_owned(), format!("{name}_SOFT")] {
                clocks.push((kernel.enum_value_in("hrtimer_base_type", &name)? as u64, clock));
            }
        }
        clocks.retain(|(index, _)| *index < bases.size / base_size);
        let to_node = kernel.offset_of("hrtimer", "node.node")?;
        let to_timer = kernel.offset_of("hrtimer_sleeper", "timer")?;
        let to_task = kernel.offset_of("hrtimer_sleeper", "task")?;
        kernel.check::<ClockBase>()?;
        kernel.check::<Timer>()?;

        let mut timers = Timers::default();
        for cpu in kernel.possible_cpus()? {
            let first = kernel.per_cpu(per_cpu, cpu)?.wrapping_add(bases.offset);
            for (index, clock) in &clocks {
                let addr = first.wrapping_add(index * base_size);
                timers.clocks.insert(addr, *clock);
                let read_base = |said: &mut i32| -> Result<Vec<(u64, Expiry)>> {
                    let mut found = Vec::new();
                    let base: ClockBase = kernel.read(addr)?;
                    *said = base.clockid;
                    for node in kernel.rb_tree(base.active, MAX_TIMERS) {
                        let addr = node?.wrapping_sub(to_node);
                        let timer: Timer = kernel.read(addr)?;
                        if timer.function == wakeup {
                            let sleeper = addr.wrapping_sub(to_timer);
                            let task = kernel.read_u64(sleeper.wrapping_add(to_task))?;
                            found.push((task, Expiry { clock: *clock, ns: timer.soft_expires }));
                        }
                    }
                    Ok(found)
                };
                let mut said = *clock;
                match read_base(&mut said) {
                    Ok(found) => timers.sleepers.extend(found),
                    Err(error) => timers.damage.push(format!("timer queue {index} of CPU {cpu}: {error}")),
                }
                if said != *clock {
                    let text =
                        format!("timer queue {index} of CPU {cpu}: it is of clock {clock}, and says {said}");
                    timers.damage.push(text);
                }
            }
        }
        Ok(timers)
    }

    /// When the timer of a sleeping task (by its address) would have woken it.
    pub fn of_task(&self, task: u64) -> Option<Expiry> {
        self.sleepers.get(&task).copied()
    }

    /// The clock (CLOCK_*) of a `hrtimer_clock_base`; `None` if there is none at this address.
    pub(crate) fn clock_of(&self, base: u64) -> Option<i32> {
        self.clocks.get(&base).copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sleepers.len()
    }

    /// Whether no task sleeps with a timeout.
    pub fn is_empty(&self) -> bool {
        self.sleepers.is_empty()
    }
}

/// The timer of a task's `hrtimer_sleeper` on its own kernel stack: the only trace of one that has just fired (it is no
/// longer queued). `words` is the live part of the stack, from `base` on.
pub(super) fn on_stack(
    kernel: &Kernel,
    timers: &Timers,
    task: u64,
    base: u64,
    words: &[u64],
) -> Option<Expiry> {
    let wakeup = kernel.symbol_opt("hrtimer_wakeup")?;
    let to_function = kernel.offset_of("hrtimer", "function").ok()?;
    let to_timer = kernel.offset_of("hrtimer_sleeper", "timer").ok()?;
    let to_task = kernel.offset_of("hrtimer_sleeper", "task").ok()?;
    let functions = words.iter().enumerate().filter(|(_, word)| **word == wakeup);
    let mut sleepers =
        functions.map(|(index, _)| base.wrapping_add(index as u64 * 8).wrapping_sub(to_function));
    // One that has fired names nobody any more; one of an earlier call may lie there still.
    let is_own = |timer: &u64| {
        let owner = kernel.read_u64(timer.wrapping_sub(to_timer).wrapping_add(to_task));
        owner.is_ok_and(|owner| owner == task || owner == 0)
    };
    let timer: Timer = kernel.read(sleepers.find(is_own)?).ok()?;
    Some(Expiry { clock: timers.clock_of(timer.base)?, ns: timer.soft_expires })
}

/// What a `restart_block` continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartBlock {
    /// A sleep until then. On a CPU-time clock the clock is that one, and the time left cannot be told.
    Nanosleep {
        #[allow(missing_docs)]
        until: Expiry,
        /// Where the program wants to know the time left; 0: nowhere.
        rmtp: u64,
    },
    /// poll(2); `None`: without a timeout.
    Poll(Option<Expiry>),
    /// futex(2) waiting with a timeout; the clock is CLOCK_MONOTONIC unless the operation says otherwise.
    Futex {
        /// Nanoseconds.
        until_ns: i64,
    },
    /// None is set, or one of a kind that is not known here.
    Other,
}

/// `restart_block` as it stands in the task; the union's members by their names.
#[derive(Clone, Copy, Debug, Default, KernelType)]
#[kernel("restart_block")]
pub(super) struct RawRestartBlock {
    #[kernel("fn")]
    pub function: u64,
    #[kernel("nanosleep.clockid")]
    pub sleep_clock: i32,
    #[kernel("nanosleep.type")]
    pub sleep_type: u32,
    #[kernel("nanosleep.rmtp")]
    pub sleep_rmtp: u64,
    #[kernel("nanosleep.expires")]
    pub sleep_expires: i64,
    #[kernel("poll.has_timeout")]
    pub poll_has_timeout: i32,
    #[kernel("poll.tv_sec")]
    pub poll_sec: i64,
    #[kernel("poll.tv_nsec")]
    pub poll_nsec: i64,
    #[kernel("futex.uaddr")]
    pub futex_uaddr: u64,
    #[kernel("futex.val")]
    pub futex_val: u32,
    #[kernel("futex.time")]
    pub futex_time: i64,
}

impl RawRestartBlock {
    /// By the name of its function. `args` are those of the call in flight.
    pub(super) fn interpret(&self, function: Option<&str>, args: &[u64; 6]) -> RestartBlock {
        let sleep = |clock| RestartBlock::Nanosleep {
            until: Expiry { clock, ns: self.sleep_expires },
            // TT_NONE: the member holds nothing.
            rmtp: if self.sleep_type == 0 { 0 } else { self.sleep_rmtp },
        };
        match function {
            Some("hrtimer_nanosleep_restart" | "posix_cpu_nsleep_restart") => sleep(self.sleep_clock),
            // enum alarmtimer_type: ALARM_REALTIME, ALARM_BOOTTIME.
            Some("alarm_timer_nsleep_restart") => {
                sleep(if self.sleep_clock == 0 { CLOCK_REALTIME_ALARM } else { CLOCK_BOOTTIME_ALARM })
            }
            Some("do_restart_poll") => RestartBlock::Poll((self.poll_has_timeout != 0).then(|| {
                Expiry::monotonic(self.poll_sec.saturating_mul(1_000_000_000).saturating_add(self.poll_nsec))
            })),
            Some("futex_wait_restart") => RestartBlock::Futex { until_ns: self.futex_time },
            // futex_wait_restart() takes its own name out before it waits again, and leaves the rest.
            Some("do_no_restart_syscall")
                if self.futex_uaddr == args[0]
                    && self.futex_uaddr != 0
                    && self.futex_val == args[2] as u32 =>
            {
                RestartBlock::Futex { until_ns: self.futex_time }
            }
            _ => RestartBlock::Other,
        }
    }
}

/// The restart block of a task that is, or was, in a call with these arguments.
pub(super) fn restart_block(kernel: &Kernel, task: u64, args: &[u64; 6]) -> Result<RestartBlock> {
    let addr = task.wrapping_add(kernel.offset_of("task_struct", "restart_block")?);
    let raw: RawRestartBlock = kernel.read(addr)?;
    Ok(raw.interpret(kernel.symbol_at(raw.function), args))
}

#[cfg(test)]
mod tests {
    use synth::{I32, Record, Synth, U64, array, named};

    use super::*;
    use crate::testing::open;

    const NOW: Clocks = Clocks { realtime_ns: 1_000_000, monotonic_ns: 2_000, boottime_ns: 30_000 };

    const ARGS: [u64; 6] = [0x5000, 0, 7, 0x6000, 0, 0];

    #[test]
    fn remaining_time_is_counted_on_the_timers_own_clock() {
        let left = |clock, ns| Expiry { clock, ns }.remaining(&NOW);
        assert_eq!(left(CLOCK_REALTIME, 1_000_500), Some(500));
        assert_eq!(left(CLOCK_MONOTONIC, 2_500), Some(500));
        assert_eq!(left(CLOCK_BOOTTIME, 30_001), Some(1));
        assert_eq!(left(CLOCK_MONOTONIC, 1_999), Some(-1), "over");
        assert_eq!(left(CLOCK_MONOTONIC, i64::MIN), Some(i64::MIN), "nonsense does not overflow");
        assert_eq!(left(2, 5), None, "CLOCK_PROCESS_CPUTIME_ID");
        assert_eq!(left(11, 5), None, "CLOCK_TAI");
    }

    #[test]
    fn a_queues_clock_is_told_by_its_place() {
        let mut synth = Synth::new();
        let queue = Record::new().field("rb_root", named("rb_root_cached"));
        synth.structure("timerqueue_head", queue);
        let base = Record::new().field("clockid", I32).field("active", named("timerqueue_head"));
        synth.structure("hrtimer_clock_base", base);
        let bases = Record::new().field("clock_base", array(named("hrtimer_clock_base"), 8));
        synth.structure("hrtimer_cpu_base", bases);
        synth.structure("timerqueue_node", Record::new().field("node", named("rb_node")));
        let timer = Record::new().field("node", named("timerqueue_node")).field("_softexpires", U64);
        synth.structure("hrtimer", timer.field("function", U64).field("base", U64));
        synth.structure("hrtimer_sleeper", Record::new().field("timer", named("hrtimer")).field("task", U64));
        let names = BASES.map(|(name, _)| name.to_owned()).into_iter();
        let names: Vec<String> = names.clone().chain(names.map(|name| format!("{name}_SOFT"))).collect();
        let values: Vec<(&str, i64)> = names.iter().map(String::as_str).zip(0..).collect();
        synth.enumeration("hrtimer_base_type", &values);
        let wakeup = synth.variable("hrtimer_wakeup", "hrtimer");

        let bases = synth.per_cpu_variable("hrtimer_bases", synth.size_of("hrtimer_cpu_base"));
        let size = synth.size_of("hrtimer_clock_base");
        for cpu in 0..2 {
            for (index, (_, clock)) in (0..).zip(BASES.iter().chain(&BASES)) {
                let base = synth.per_cpu(bases, cpu) + index * size;
                synth.set("hrtimer_clock_base", base, "clockid", *clock);
            }
        }
        let [boottime, soft] = [2, 5].map(|index| synth.per_cpu(bases, 1) + index * size);
        let [sleeper, task] = [synth.alloc("hrtimer_sleeper"), 0xffff_8880_0000_7000];
        synth.set("hrtimer_sleeper", sleeper, "timer.function", wakeup);
        synth.set("hrtimer_sleeper", sleeper, "timer._softexpires", 700_u64);
        synth.set("hrtimer_sleeper", sleeper, "task", task);
        let root = synth.address_of("hrtimer_clock_base", boottime, "active.rb_root.rb_root");
        synth.rb_tree(root, &[synth.address_of("hrtimer_sleeper", sleeper, "timer.node.node")]);
        let read = |synth: &Synth| Timers::read(&open(synth)).unwrap();
        let until = Some(Expiry { clock: CLOCK_BOOTTIME, ns: 700 });
        let timers = read(&synth);
        assert_eq!((timers.of_task(task), timers.damage.len()), (until, 0));
        assert_eq!(timers.clock_of(soft), Some(CLOCK_REALTIME));
        assert_eq!(timers.clock_of(soft + 8), None);
        synth.set("hrtimer_clock_base", boottime, "clockid", 0x2000_0007);
        let timers = read(&synth);
        assert_eq!((timers.of_task(task), timers.damage.len()), (until, 1), "{:?}", timers.damage);
    }

    #[test]
    fn restart_blocks_are_told_by_their_function() {
        let raw = RawRestartBlock {
            sleep_clock: CLOCK_BOOTTIME,
            sleep_type: 1,
            sleep_rmtp: 0x7000,
            sleep_expires: 99,
            poll_has_timeout: 1,
            poll_sec: 3,
            poll_nsec: 7,
            futex_time: 42,
            ..Default::default()
        };
        let until = Expiry { clock: CLOCK_BOOTTIME, ns: 99 };
        let sleep = RestartBlock::Nanosleep { until, rmtp: 0x7000 };
        assert_eq!(raw.interpret(Some("hrtimer_nanosleep_restart"), &ARGS), sleep);
        let unwanted = RawRestartBlock { sleep_type: 0, ..raw };
        let sleep = RestartBlock::Nanosleep { until, rmtp: 0 };
        assert_eq!(unwanted.interpret(Some("hrtimer_nanosleep_restart"), &ARGS), sleep);
        let poll = RestartBlock::Poll(Some(Expiry::monotonic(3_000_000_007)));
        assert_eq!(raw.interpret(Some("do_restart_poll"), &ARGS), poll);
        let endless = RawRestartBlock { poll_has_timeout: 0, ..raw };
        assert_eq!(endless.interpret(Some("do_restart_poll"), &ARGS), RestartBlock::Poll(None));
        assert_eq!(raw.interpret(Some("futex_wait_restart"), &ARGS), RestartBlock::Futex { until_ns: 42 });
        assert_eq!(raw.interpret(Some("do_no_restart_syscall"), &ARGS), RestartBlock::Other);
        assert_eq!(raw.interpret(None, &ARGS), RestartBlock::Other);
        let waiting_again = RawRestartBlock { futex_uaddr: 0x5000, futex_val: 7, ..raw };
        let futex = RestartBlock::Futex { until_ns: 42 };
        assert_eq!(waiting_again.interpret(Some("do_no_restart_syscall"), &ARGS), futex);
        let other_value = RawRestartBlock { futex_val: 8, ..waiting_again };
        assert_eq!(other_value.interpret(Some("do_no_restart_syscall"), &ARGS), RestartBlock::Other);
        let alarm = RawRestartBlock { sleep_clock: 1, ..raw };
        assert!(matches!(
            alarm.interpret(Some("alarm_timer_nsleep_restart"), &ARGS),
            RestartBlock::Nanosleep { until: Expiry { clock: CLOCK_BOOTTIME_ALARM, .. }, .. }
        ));
    }
}
