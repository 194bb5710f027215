//! `cargo xtask test`: everything that must hold.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use lab::Series;
use lab::image::Flavour;

use crate::apps::{self, Apps};
use crate::campaign::Campaign;
use crate::cores::Cores;
use crate::crash_runs::{CrashRuns, Tally};
use crate::ground_truth::GroundTruth;
use crate::libotherworld::Library;
use crate::survive::Survivors;
use crate::unhappy::Unhappy;
use crate::whole_machine::WholeMachine;
use crate::{Global, build, fuzz, ui};

/// The campaign's crashes that are the same each time.
const FAULTS_SEED: u64 = 6;

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
        let lab = global.lab()?;
        let all = crate::series_or_all(self.kernel);
        if !self.vm_only {
            // Making images and applications takes one CPU and the network, and the unit tests mostly wait. What goes wrong there will go wrong
            // again, where it is somebody's failure.
            std::thread::scope(|scope| {
                let ready = scope.spawn(|| {
                    _ = lab.image(Flavour::Small);
                    _ = lab.image(Flavour::Programs);
                    _ = apps::prepare();
                });
                let tests = unit_tests();
                _ = ready.join();
                tests
            })?;
            Library::in_place()?.check()?;
            fuzz::run_few()?;
            alone()?;
        }
        // Once, before several want it.
        build::static_binaries()?;
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
        Ok(sum.close())
    }
}

impl Test {
    /// Everything that runs on one kernel.
    fn in_guests(&self, global: &Global, series: Series) -> Tally {
        let mut sum = Tally::default();
        let mut began = Instant::now();
        // What breaks off has failed, and the rest is worth knowing all the same.
        let mut add = |what: &str, tally: Result<Tally>| {
            let tally = tally.unwrap_or_else(|error| {
                ui::failure(format!("kernel {series}, {what}: {error:#}"));
                Tally { passed: 0, failed: 1 }
            });
            let took = std::mem::replace(&mut began, Instant::now()).elapsed().as_secs();
            ui::line(format!(
                "kernel {series}, {what}: {} passed, {} failed, in {}:{:02}",
                tally.passed,
                tally.failed,
                took / 60,
                took % 60
            ));
            sum.add(tally);
        };
        let runs = if self.quick { 1 } else { 3 };
        add(&format!("programs through {runs} panics"), CrashRuns::new(series, runs).campaign(global));
        add("survivors", Survivors::new(series).count(global));
        add("unhappy paths", Unhappy::new(series).count(global));
        add("the whole machine", WholeMachine::new(series).count(global));
        let (fixed, fresh) = if self.quick { (2, 1) } else { (10, 5) };
        add("kernels killed in drawn ways", Campaign::new(series, fixed, Some(FAULTS_SEED)).test(global));
        add("kernels killed in fresh ways", Campaign::new(series, fresh, None).test(global));
        add("applications", Apps::new(series).count(global));
        add("core files", Cores::new(series).count(global));
        add("ground truth", GroundTruth::new(series).count(global));
        sum
    }
}

/// Those that can run beside others.
fn unit_tests() -> Result<()> {
    let has_nextest =
        build::cargo().args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success());
    match has_nextest {
        true => cargo(&[&["nextest", "run", "--workspace", "-E", "not binary(live)"]]),
        false => cargo(&[
            &["test", "--workspace", "--exclude", "resurrect", "--lib", "--bins", "--tests"],
            &["test", "--package", "resurrect", "--lib"],
        ]),
    }
}

/// Processes are ended and brought back under their old PIDs here: one test at a time, and nothing else beside it.
fn alone() -> Result<()> {
    cargo(&[
        &["test", "--package", "resurrect", "--test", "live"],
        &["test", "--workspace", "--doc", "--quiet"],
    ])
}

fn cargo(runs: &[&[&str]]) -> Result<()> {
    for arguments in runs {
        if !build::cargo().args(*arguments).status()?.success() {
            bail!("cargo {} failed", arguments.join(" "));
        }
    }
    Ok(())
}
