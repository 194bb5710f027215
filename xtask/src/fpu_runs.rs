//! `cargo xtask fpu-runs`: vector registers that the panic finds in a CPU and nowhere else.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use lab::{Lab, MachineConfig, Panic, Series, Snapshot};
use survivors::Survivor;

use crate::crash_runs::Tally;
use crate::guest::{self, Installation};
use crate::survive::{self, Claim, PROGRAM};
use crate::{Global, ui};

/// The panic comes within so many microseconds after both are ready.
const MOMENTS_US: u64 = 3_000_000;
/// A panic that met no live registers is drawn again, so often per run at most.
const DRAWS: u32 = 5;
/// The code of the report's reasons that are about lost live registers.
const LIVE_FPU: &str = "live-fpu";

/// Per run one panic with a survivor that sleeps and one that computes on the CPU that does not panic. With the register saver
/// every register of both must be right; without it the computing one must be noticed and treated as configured.
#[derive(Debug, Args)]
pub struct FpuRuns {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many panics.
    #[arg(long, default_value_t = 20)]
    runs: u32,
    /// Draws the moments and the CPUs; a random one, which is printed, if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// Leaves the register saver module out.
    #[arg(long)]
    without_saver: bool,
    /// What the guest's configuration says of threads whose registers are lost.
    #[arg(long, value_enum, default_value = "give-up")]
    live_fpu: LiveFpu,
}

/// What one panic has shown.
enum Outcome {
    /// It met what it was to meet; what was not as it should be.
    Met(Vec<String>),
    /// There was no saver, and still every register of the loop is right: something else was on its CPU at that moment, and the
    /// kernel had its registers in memory. That says nothing about live ones. (Lost registers are millions of rounds off and fail.)
    NothingLost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LiveFpu {
    /// Their process is given up.
    GiveUp,
    /// They go on all the same, and the report warns.
    ResumeAnyway,
    /// Their process enters its crash procedure; these have none, so they are given up.
    CrashProcedure,
}

impl LiveFpu {
    fn installation(self, saver: bool) -> Installation {
        let value = self.to_possible_value();
        let value = value.as_ref().map_or("give-up", |value| value.get_name());
        let usual = Installation::for_programs(PROGRAM);
        Installation {
            config: format!("live_fpu = \"{value}\"\n\n{}", usual.config),
            saver,
            ..Installation::default()
        }
    }
}

impl FpuRuns {
    /// Runs it; whether all runs were as they should be.
    pub fn run(self, global: &Global) -> Result<bool> {
        Ok(self.count(global)?.close())
    }

    /// Runs it and counts runs.
    pub fn count(self, global: &Global) -> Result<Tally> {
        let lab = global.lab()?;
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let mut draw = fastrand::Rng::with_seed(seed);
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            let config = MachineConfig::new(series, global.accel());
            let armed =
                guest::armed(&lab, &lab.booted(&config)?, &self.live_fpu.installation(!self.without_saver))?;
            let saver = if self.without_saver { "without" } else { "with" };
            ui::line(format!(
                "{} panics of kernel {series} {saver} the register saver, seed {seed}",
                self.runs
            ));
            for n in 1..=self.runs {
                let name = format!("fpu-{series}-{n:03}");
                let mut draws = 0;
                let (cpu, after_us, trouble) = loop {
                    let (cpu, after_us) = (draw.usize(..2), draw.u64(..MOMENTS_US));
                    draws += 1;
                    let (found, trouble) = match self.once(&lab, &armed, &name, cpu, after_us, draw.u64(..)) {
                        Ok(Outcome::Met(trouble)) => (true, trouble),
                        Ok(Outcome::NothingLost) => {
                            (false, vec![format!("nothing was lost in {DRAWS} panics")])
                        }
                        Err(error) => (true, vec![format!("{error:#}")]),
                    };
                    if found || draws == DRAWS {
                        break (cpu, after_us, trouble);
                    }
                    ui::line(format!(
                        "run {n:>3}  panic at {:>4} ms on CPU {cpu}: the loop was not on its CPU and every register of it is right; again",
                        after_us / 1000
                    ));
                };
                let verdict = if trouble.is_empty() { "as it should be" } else { "WRONG" };
                ui::line(format!("run {n:>3}  panic at {:>4} ms on CPU {cpu}: {verdict}", after_us / 1000));
                for line in &trouble {
                    ui::line(format!("         {line}"));
                }
                if trouble.is_empty() {
                    tally.passed += 1;
                } else {
                    tally.failed += 1;
                    ui::line(format!(
                        "         artifacts: {}",
                        lab.cache().join("runs").join(name).display()
                    ));
                }
            }
        }
        Ok(tally)
    }

    /// One panic.
    fn once(
        &self,
        lab: &Lab,
        armed: &Snapshot,
        name: &str,
        cpu: usize,
        after_us: u64,
        seed: u64,
    ) -> Result<Outcome> {
        let find = |name| survivors::find(name).with_context(|| format!("there is no survivor {name}"));
        let (sleep, compute) = (find("fpu-sleep")?, find("fpu-loop")?);
        let mut guest = lab.start(armed, name)?;
        guest::seed(&mut guest, seed)?;
        let mut pids = survive::start(&mut guest.agent, &[sleep], None, false)?;
        pids.extend(survive::start(&mut guest.agent, &[compute], Some(1 - cpu), false)?);
        let panic = Panic { after_us, cpu: Some(cpu), alive: pids.values().copied().collect() };
        let claims = survive::through(&mut guest, &panic).inspect_err(|_| _ = guest.keep_artifacts())?;
        let mut trouble = Vec::new();
        for survivor in [sleep, compute] {
            let line = survive::verdict(&mut guest, survivor);
            let survived = kept(survivor, &line, &claim(&claims, &pids, survivor)).is_none();
            if self.without_saver && survivor.name == compute.name && survived && trouble.is_empty() {
                return Ok(Outcome::NothingLost);
            }
            let wrong = if self.without_saver && survivor.name == compute.name {
                lost(self.live_fpu, &line, &claim(&claims, &pids, survivor))
            } else {
                kept(survivor, &line, &claim(&claims, &pids, survivor))
            };
            trouble.extend(wrong.map(|why| format!("{}: {why}", survivor.name)));
        }
        if !trouble.is_empty() {
            guest.keep_artifacts()?;
        }
        Ok(Outcome::Met(trouble))
    }
}

fn claim(claims: &BTreeMap<i32, Claim>, pids: &BTreeMap<String, i32>, survivor: &Survivor) -> Claim {
    pids.get(survivor.name).and_then(|pid| claims.get(pid)).cloned().unwrap_or_default()
}

/// Why a survivor whose registers had to be kept was not.
fn kept(survivor: &Survivor, line: &str, claim: &Claim) -> Option<String> {
    if line != format!("pass {}", survivor.name) {
        return Some(format!("{}; {claim}", if line.is_empty() { "no verdict" } else { line }));
    }
    (!claim.lives() || claim.has(LIVE_FPU)).then(|| format!("it passed, but the report says: {claim}"))
}

/// Why a survivor whose registers had to be lost was not treated as configured.
fn lost(configured: LiveFpu, line: &str, claim: &Claim) -> Option<String> {
    if !claim.has(LIVE_FPU) {
        return Some(format!("the loss of its registers was not noticed: {claim}; {line}"));
    }
    let right = match configured {
        LiveFpu::GiveUp | LiveFpu::CrashProcedure => claim.fate == "given-up" && line.is_empty(),
        // Whether its numbers are still right is chance; that it runs is not.
        LiveFpu::ResumeAnyway => claim.fate == "resurrected-with-losses" && !line.is_empty(),
    };
    (!right).then(|| format!("not treated as configured: {claim}; {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(fate: &str, code: &str) -> Claim {
        let reasons = if code.is_empty() { vec![] } else { vec![(code.to_owned(), String::new())] };
        Claim { ppid: 1, fate: fate.into(), reasons }
    }

    #[test]
    fn kept_registers_are_right_and_reported_so() {
        let survivor = survivors::find("fpu-loop").unwrap();
        assert_eq!(kept(survivor, "pass fpu-loop", &claim("resurrected", "")), None);
        assert!(kept(survivor, "pass fpu-loop", &claim("resurrected-with-losses", LIVE_FPU)).is_some());
        assert!(kept(survivor, "fail fpu-loop: ymm3", &claim("resurrected", "")).is_some());
        assert!(kept(survivor, "", &claim("given-up", LIVE_FPU)).is_some());
    }

    #[test]
    fn lost_registers_are_noticed_and_treated_as_configured() {
        assert_eq!(lost(LiveFpu::GiveUp, "", &claim("given-up", LIVE_FPU)), None);
        assert_eq!(lost(LiveFpu::CrashProcedure, "", &claim("given-up", LIVE_FPU)), None);
        assert!(lost(LiveFpu::GiveUp, "pass fpu-loop", &claim("resurrected", "")).is_some());
        assert!(lost(LiveFpu::GiveUp, "", &claim("given-up", "descriptor")).is_some());
        assert!(lost(LiveFpu::GiveUp, "", &claim("resurrected-with-losses", LIVE_FPU)).is_some());
        assert_eq!(
            lost(LiveFpu::ResumeAnyway, "fail fpu-loop: ymm1", &claim("resurrected-with-losses", LIVE_FPU)),
            None
        );
        assert!(lost(LiveFpu::ResumeAnyway, "", &claim("given-up", LIVE_FPU)).is_some());
    }

    #[test]
    fn the_configuration_says_what_was_asked_for() {
        assert!(
            LiveFpu::ResumeAnyway.installation(false).config.starts_with("live_fpu = \"resume-anyway\"\n")
        );
    }
}
