//! Clocks: the timekeeper (include/linux/timekeeper_internal.h, kernel/time/timekeeping.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Clocks, Severity};

use crate::Autopsy;
use crate::error::{Result, corrupt};

const NS_PER_S: i128 = 1_000_000_000;
/// No machine ran for longer than this without ticking: the time since the last tick is then not believed.
const MAX_SINCE_TICK: i128 = 60 * NS_PER_S;

#[derive(KernelType)]
#[kernel("timekeeper")]
struct Timekeeper {
    #[kernel("tkr_mono.clock")]
    clock: u64,
    #[kernel("tkr_mono.mask")]
    mask: u64,
    #[kernel("tkr_mono.cycle_last")]
    cycle_last: u64,
    #[kernel("tkr_mono.mult")]
    mult: u32,
    #[kernel("tkr_mono.shift")]
    shift: u32,
    #[kernel("tkr_mono.xtime_nsec")]
    xtime_nsec: u64,
    xtime_sec: u64,
    #[kernel("wall_to_monotonic.tv_sec")]
    to_mono_sec: i64,
    #[kernel("wall_to_monotonic.tv_nsec")]
    to_mono_nsec: i64,
    offs_boot: i64,
}

#[derive(KernelType)]
#[kernel("timekeeper")]
struct Tick {
    #[kernel("tkr_mono.shift")]
    shift: u32,
    xtime_interval: u64,
}

#[derive(KernelType)]
#[kernel("clocksource")]
struct ClockSource {
    name: u64,
}

impl Autopsy<'_> {
    /// The clocks when the machine died: at the panic itself if the register saver noted the time-stamp counter, else at
    /// the last tick before it.
    ///
    /// # Errors
    /// When the timekeeper cannot be read, or cannot be one.
    pub fn clocks(&self) -> Result<Clocks> {
        let own = self.timekeeper().and_then(|addr| self.clocks_of(addr));
        // What every tick begins from, and is copied from afterwards: it is one tick older at most.
        let Some(shadow) = self.kernel.symbol_opt("shadow_timekeeper") else { return own };
        let (own, shadow) = match (own, self.clocks_of(shadow)) {
            (Ok(own), Ok(shadow)) => (own, shadow),
            (Ok(own), Err(_)) => return Ok(own),
            (Err(error), Ok(shadow)) => {
                let text = format!("the timekeeper is damaged ({error}); its copy is taken");
                self.find(Severity::Note, "clock", text);
                return Ok(shadow);
            }
            (Err(error), Err(_)) => return Err(error),
        };
        if own.realtime_ns.abs_diff(shadow.realtime_ns) < MAX_SINCE_TICK as u64 {
            return Ok(own);
        }
        // The kernel log has another clock of its own.
        let log = self.kernel_log().unwrap_or_default();
        let last = log.last().map_or(0, |record| record.ts_ns);
        let distance = |clocks: &Clocks| (clocks.monotonic_ns as u64).abs_diff(last);
        let text = "the timekeeper and its copy do not agree; the one is taken that fits the kernel log";
        self.find(Severity::Note, "clock", text);
        Ok(if distance(&own) <= distance(&shadow) { own } else { shadow })
    }

    fn clocks_of(&self, addr: u64) -> Result<Clocks> {
        let keeper: Timekeeper = self.kernel.read(addr)?;
        if keeper.shift > 63 {
            return Err(corrupt("timekeeper", addr, format!("a shift of {}", keeper.shift)));
        }
        let fraction = i128::from(keeper.xtime_nsec >> keeper.shift);
        let realtime = i128::from(keeper.xtime_sec) * NS_PER_S + fraction + self.since_tick(&keeper);
        let monotonic =
            realtime + i128::from(keeper.to_mono_sec) * NS_PER_S + i128::from(keeper.to_mono_nsec);
        let boottime = monotonic + i128::from(keeper.offs_boot);
        let ns = |value: i128| {
            let why = || corrupt("timekeeper", addr, format!("a clock of {value} ns"));
            i64::try_from(value).ok().filter(|ns| *ns >= 0).ok_or_else(why)
        };
        Ok(Clocks { realtime_ns: ns(realtime)?, monotonic_ns: ns(monotonic)?, boottime_ns: ns(boottime)? })
    }

    /// The clocks, read once; zero with a finding if they cannot be read.
    pub(crate) fn now(&self) -> &Clocks {
        self.now.get_or_init(|| {
            let subject = self.set_subject(None);
            let clocks = self.clocks().unwrap_or_else(|error| {
                self.find(Severity::Doubt, "clock", format!("the clocks cannot be read: {error}"));
                Clocks::default()
            });
            self.set_subject(subject);
            clocks
        })
    }

    /// Microseconds of a tick (jiffy): what the timekeeper adds at each, rounded to one of the values that the kernel can be
    /// configured with (CONFIG_HZ).
    ///
    /// # Errors
    /// When the timekeeper cannot be read, or cannot be one.
    pub(crate) fn tick_us(&self) -> Result<u64> {
        const HZ: [u64; 4] = [100, 250, 300, 1000];
        let addr = self.timekeeper()?;
        let tick: Tick = self.kernel.read(addr)?;
        let ns = tick.xtime_interval.checked_shr(tick.shift).unwrap_or(0);
        let near = |hz: &&u64| (1_000_000_000 / **hz).abs_diff(ns) < 100_000;
        let hz = HZ.iter().find(near);
        hz.map(|hz| 1_000_000 / hz).ok_or_else(|| corrupt("timekeeper", addr, format!("a tick of {ns} ns")))
    }

    /// The address of the timekeeper in `tk_core`: a structure without a name that holds a sequence counter and, aligned
    /// for its 64-bit members, the timekeeper.
    fn timekeeper(&self) -> Result<u64> {
        let counter = self.kernel.size_of("seqcount_raw_spinlock_t")?;
        let align = self.kernel.size_of("u64")?;
        Ok(self.kernel.symbol("tk_core")?.wrapping_add(counter.next_multiple_of(align)))
    }

    /// Nanoseconds from the last tick to the panic; 0 if that is not known.
    fn since_tick(&self, keeper: &Timekeeper) -> i128 {
        let is_tsc = || -> Result<bool> {
            let source: ClockSource = self.kernel.read(keeper.clock)?;
            Ok(self.kernel.read_cstr(source.name, 16)?.starts_with(b"tsc"))
        };
        let panicking = self.cpus().panicking;
        let Some(tsc) = self.saver().and_then(|saver| saver.tsc(panicking?)) else { return 0 };
        if !is_tsc().unwrap_or(false) {
            return 0;
        }
        let cycles = tsc.wrapping_sub(keeper.cycle_last) & keeper.mask;
        let ns = (i128::from(cycles) * i128::from(keeper.mult)) >> keeper.shift;
        if ns > MAX_SINCE_TICK {
            let text = "the time of the panic and the last tick do not fit together; the tick's is taken";
            self.find(Severity::Note, "clock", text);
            return 0;
        }
        ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use ktypes::Kernel;
    use synth::{Record, Synth, U64, named};

    #[test]
    fn the_copy_serves_when_the_timekeeper_is_damaged() {
        let mut synth = Synth::new();
        declare::<Timekeeper>(&mut synth, &[]);
        synth.typedef("u64", U64);
        synth.typedef("seqcount_raw_spinlock_t", U64);
        synth.structure("tk_core", Record::new().field("seq", U64).field("timekeeper", named("timekeeper")));
        let own = synth.variable("tk_core", "tk_core") + synth.offset_of("tk_core", "timekeeper");
        let shadow = synth.variable("shadow_timekeeper", "timekeeper");
        for at in [own, shadow] {
            synth.set("timekeeper", at, "xtime_sec", 1_700_000_000u64);
            synth.set("timekeeper", at, "wall_to_monotonic.tv_sec", -1_699_999_000i64);
        }
        let seconds = |synth: &Synth| {
            let kernel: Kernel = open(synth);
            let autopsy = Autopsy::new(&kernel);
            let clocks = autopsy.clocks().map(|clocks| clocks.realtime_ns / 1_000_000_000);
            (clocks.ok(), autopsy.findings().iter().any(|f| f.object == "clock"))
        };
        assert_eq!(seconds(&synth), (Some(1_700_000_000), false));
        let mut one = synth.clone();
        one.set("timekeeper", own, "xtime_sec", u64::MAX);
        assert_eq!(seconds(&one), (Some(1_700_000_000), true));
        // Both can be: the one is taken that fits the log, which ends where it begins here.
        synth.set("timekeeper", shadow, "xtime_sec", 1_800_000_000u64);
        assert_eq!(seconds(&synth), (Some(1_700_000_000), true));
        synth.set("timekeeper", own, "xtime_sec", 1_900_000_000u64);
        assert_eq!(seconds(&synth), (Some(1_800_000_000), true));
    }
}
