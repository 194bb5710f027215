//! `cargo xtask test`: everything that must hold.

use anyhow::{Result, bail};
use clap::Args;
use lab::Series;

use crate::crash_runs::{CrashRuns, Tally};
use crate::ground_truth::GroundTruth;
use crate::survive::Survivors;
use crate::unhappy::Unhappy;
use crate::whole_machine::WholeMachine;
use crate::{Global, build, ui};

/// Runs the unit tests (cargo nextest if it is there, else cargo test), then the tests in virtual machines. The last line counts
/// the latter.
#[derive(Debug, Args)]
pub struct Test {
    /// One panic per kernel instead of three.
    #[arg(long)]
    quick: bool,
    /// The kernel of the tests in virtual machines: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// Leaves out the unit tests.
    #[arg(long)]
    vm_only: bool,
}

impl Test {
    /// Runs it; whether nothing failed.
    pub fn run(&self, global: &Global) -> Result<bool> {
        if !self.vm_only {
            unit_tests()?;
        }
        // Once, before several want it.
        global.lab()?;
        build::static_binaries()?;
        let all = crate::series_or_all(self.kernel);
        // Side by side: a crash kernel runs on one CPU only.
        let tallies: Vec<Tally> = std::thread::scope(|scope| {
            let started: Vec<_> =
                all.into_iter().map(|series| scope.spawn(move || self.in_guests(global, series))).collect();
            // A panic of ours is a failure like any other.
            let failed = Tally { passed: 0, failed: 1 };
            started.into_iter().map(|thread| thread.join().unwrap_or(failed)).collect()
        });
        let mut sum = Tally::default();
        tallies.into_iter().for_each(|tally| sum.add(tally));
        ui::finish();
        ui::failures().iter().for_each(|text| println!("failed: {}", text.trim()));
        println!("{} passed, {} failed", sum.passed, sum.failed);
        Ok(sum.failed == 0 && sum.passed > 0)
    }
}

impl Test {
    /// Everything that runs on one kernel.
    fn in_guests(&self, global: &Global, series: Series) -> Tally {
        let mut sum = Tally::default();
        // What breaks off has failed, and the rest is worth knowing all the same.
        let mut add = |what: &str, tally: Result<Tally>| {
            let tally = tally.unwrap_or_else(|error| {
                ui::failure(format!("kernel {series}, {what}: {error:#}"));
                Tally { passed: 0, failed: 1 }
            });
            ui::line(format!("kernel {series}, {what}: {} passed, {} failed", tally.passed, tally.failed));
            sum.add(tally);
        };
        let runs = if self.quick { 1 } else { 3 };
        add(&format!("programs through {runs} panics"), CrashRuns::new(series, runs).campaign(global));
        add("survivors", Survivors::new(series).count(global));
        add("unhappy paths", Unhappy::new(series).count(global));
        add("the whole machine", WholeMachine::new(series).count(global));
        add("ground truth", GroundTruth::new(series).count(global));
        sum
    }
}

fn unit_tests() -> Result<()> {
    let has_nextest =
        build::cargo().args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success());
    let mut runs = vec![];
    if has_nextest {
        // Processes are ended and brought back under their old PIDs there: one test at a time, and nothing else beside it.
        runs.push(vec!["nextest", "run", "--workspace", "-E", "not binary(live)"]);
        runs.push(vec!["test", "--package", "resurrect", "--test", "live"]);
        runs.push(vec!["test", "--workspace", "--doc", "--quiet"]);
    } else {
        runs.push(vec!["test", "--workspace"]);
    }
    for arguments in runs {
        if !build::cargo().args(&arguments).status()?.success() {
            bail!("cargo {} failed", arguments.join(" "));
        }
    }
    Ok(())
}
