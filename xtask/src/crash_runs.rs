//! `cargo xtask crash-runs`: a campaign of panics at random moments.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};
use clap::Args;
use lab::{Lab, MachineConfig, Series};
use serde::{Deserialize, Serialize};

use crate::crash::{self, Outcome, Quiet};
use crate::guest::{self, Installation};
use crate::workload::{self, WORKLOADS};
use crate::{Global, build, ui};

/// Panics a guest N times at random moments with the demo's five programs running, and counts those whose output is right.
/// Ends with the line "N passed, N failed"; each failed run's artifacts are kept and the line says how to repeat it.
#[derive(Debug, Args)]
pub struct CrashRuns {
    /// The guest's kernel: 6.1 or 6.12.
    #[arg(long, default_value = "6.1")]
    kernel: Series,
    /// How many panics.
    #[arg(long, default_value_t = 20)]
    runs: u32,
    /// Draws the runs' own seeds; a random one, which is printed, if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// Runs just one panic with this run seed, as a failed run's line says.
    #[arg(long, conflicts_with_all = ["seed", "runs", "resume"])]
    only: Option<u64>,
    /// Goes on with the last campaign on this kernel if it was interrupted.
    #[arg(long, conflicts_with = "seed")]
    resume: bool,
    /// How many guests at a time (each wants two CPUs and 2 GB).
    #[arg(long, default_value_t = 1)]
    jobs: u32,
}

/// The state of a campaign, kept on disk after each run.
#[derive(Debug, Serialize, Deserialize)]
struct Campaign {
    seed: u64,
    runs: u32,
    /// Outcomes of finished runs, by number.
    done: BTreeMap<u32, Outcome>,
}

impl Campaign {
    fn path(series: Series) -> PathBuf {
        build::target_dir().join("lab").join(format!("campaign-{series}.json"))
    }

    fn save(&self, series: Series) -> Result<()> {
        let path = Self::path(series);
        let part = path.with_extension("part");
        fs::write(&part, serde_json::to_string_pretty(self)?)?;
        fs::rename(part, path)?;
        Ok(())
    }

    /// The seed of one run.
    fn run_seed(&self, n: u32) -> u64 {
        fastrand::Rng::with_seed(self.seed ^ (u64::from(n) << 32)).u64(..1 << 40)
    }
}

/// How many programs came through.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    /// Outputs that were right.
    pub passed: usize,
    /// Those that were not.
    pub failed: usize,
}

impl Tally {
    /// Counts another one in.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }

    /// Ends a command: says the numbers in its last line; whether something was counted and nothing has failed.
    pub fn close(self) -> bool {
        ui::finish();
        println!("{} passed, {} failed", self.passed, self.failed);
        self.failed == 0 && self.passed > 0
    }
}

impl CrashRuns {
    /// A campaign by itself, as part of the tests.
    pub fn new(kernel: Series, runs: u32) -> Self {
        Self { kernel, runs, seed: None, only: None, resume: false, jobs: 1 }
    }

    /// Runs it; whether nothing failed.
    pub fn run(self, global: &Global) -> Result<bool> {
        Ok(self.campaign(global)?.close())
    }

    /// Runs it and counts.
    pub fn campaign(self, global: &Global) -> Result<Tally> {
        let lab = global.lab()?;
        let prepared = workload::prepared(&lab, &MachineConfig::new(self.kernel, global.accel()))?;
        let armed = guest::armed(&lab, &prepared, &Installation::for_demo())?;
        let shot = |n: Option<u32>, seed: u64| -> Outcome {
            let name = match n {
                Some(n) => format!("crash-{}-{n:03}", self.kernel),
                None => format!("crash-{}-only", self.kernel),
            };
            let outcome = crash::once(&lab, &armed, &prepared, &name, seed, &mut Quiet)
                .unwrap_or_else(|error| lost(seed, &format!("{error:#}")));
            tell(&lab, self.kernel, n, &name, &outcome);
            outcome
        };
        if let Some(seed) = self.only {
            let outcome = shot(None, seed);
            return Ok(tally(std::iter::once(&outcome)));
        }
        let campaign = if self.resume {
            let text =
                fs::read_to_string(Campaign::path(self.kernel)).context("there is no campaign to resume")?;
            serde_json::from_str(&text)?
        } else {
            let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
            Campaign { seed, runs: self.runs, done: BTreeMap::new() }
        };
        ui::line(format!(
            "{} panics of kernel {}, campaign seed {}{}",
            campaign.runs,
            lab.kernel(self.kernel)?.release,
            campaign.seed,
            if campaign.done.is_empty() {
                String::new()
            } else {
                format!(", {} done before", campaign.done.len())
            }
        ));
        let next = AtomicU32::new(0);
        let campaign = Mutex::new(campaign);
        let lock = || campaign.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::thread::scope(|scope| {
            for _ in 0..self.jobs.max(1) {
                scope.spawn(|| {
                    loop {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        let seed = {
                            let campaign = lock();
                            if n >= campaign.runs {
                                return;
                            }
                            if campaign.done.contains_key(&n) {
                                continue;
                            }
                            campaign.run_seed(n)
                        };
                        ui::note(&format!("run {} of {}", n + 1, self.runs));
                        let outcome = shot(Some(n), seed);
                        let mut campaign = lock();
                        campaign.done.insert(n, outcome);
                        if let Err(error) = campaign.save(self.kernel) {
                            ui::line(format!("cannot save the campaign: {error:#}"));
                        }
                    }
                });
            }
        });
        let campaign = lock();
        Ok(tally(campaign.done.values()))
    }
}

fn tally<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Tally {
    outcomes.fold(Tally::default(), |sum, outcome| Tally {
        passed: sum.passed + outcome.passed(),
        failed: sum.failed + WORKLOADS.len() - outcome.passed(),
    })
}

/// A run that could not even be judged.
fn lost(seed: u64, trouble: &str) -> Outcome {
    let fates = WORKLOADS
        .iter()
        .map(|workload| crash::Fate { name: workload.name.into(), failure: Some(trouble.into()) });
    Outcome {
        seed,
        moment_ms: 0,
        cpu: 0,
        fates: fates.collect(),
        timeline: Vec::new(),
        trouble: Some(trouble.into()),
    }
}

fn tell(lab: &Lab, series: Series, n: Option<u32>, name: &str, outcome: &Outcome) {
    let released = outcome.timeline.iter().find(|moment| moment.name == "released");
    let released = released
        .map_or_else(String::new, |moment| format!(", running again after {} ms", moment.since_panic_ms));
    ui::line(format!(
        "{}seed {:<13} panic at {:>5} ms on CPU {}{released}: {} of {} survived",
        n.map_or_else(String::new, |n| format!("run {:>3}  ", n + 1)),
        outcome.seed,
        outcome.moment_ms,
        outcome.cpu,
        outcome.passed(),
        WORKLOADS.len()
    ));
    if outcome.passed() == WORKLOADS.len() {
        return;
    }
    for fate in &outcome.fates {
        if let Some(why) = &fate.failure {
            let name = &fate.name;
            ui::failure(format!("         {name} (kernel {series}, seed {}): {why}", outcome.seed));
        }
    }
    ui::line(format!("         artifacts: {}", lab.cache().join("runs").join(name).display()));
    ui::line(format!("         again:     cargo xtask crash-runs --kernel {series} --only {}", outcome.seed));
}
