//! `cargo xtask fuzz`: broken input. libFuzzer, with a stable compiler, on what reads data that nobody vouches for, and mutations of captured
//! memory under full autopsies.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::{build, ui};

/// Coverage for libFuzzer, as cargo-fuzz asks for it.
const COVERAGE: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cdebug-assertions -Coverflow-checks";
/// The same checks without it.
const CHECKED: &str = "-Cdebug-assertions -Coverflow-checks";
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Feeds broken input to what reads it: nothing may panic, hang, or need memory without bounds. What libFuzzer finds on the way it keeps
/// below target/fuzz.
#[derive(Debug, Args)]
pub struct Fuzz {
    /// What to fuzz; all that need no captured memory if nothing is named.
    #[arg(value_enum)]
    targets: Vec<Target>,
    /// How many inputs, or runs over each core; in place of each target's own number.
    #[arg(long)]
    runs: Option<u64>,
    /// memory: captured memory (made by `cargo xtask vmcore`); target/cores/vmcore-* if none is named.
    #[arg(long, value_name = "FILE")]
    core: Vec<PathBuf>,
    /// memory: seed of the first run; drawn if it is not given.
    #[arg(long)]
    seed: Option<u64>,
    /// memory: does the run of this seed once more, alone.
    #[arg(long, value_name = "SEED")]
    only: Option<u64>,
}

/// What can be fuzzed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// The reader of crash procedures' records.
    Record,
    /// ELF cores, notes, vmcoreinfo, page tables.
    Core,
    /// BTF.
    Btf,
    /// Symbols, modules, lists and trees of a fake kernel.
    Kernel,
    /// Each walker of autopsy in a fake kernel.
    Walkers,
    /// Full autopsies of captured memory in which some of what they read is changed.
    Memory,
}

impl Target {
    /// All that run anywhere.
    pub const ALL: [Target; 5] = [Target::Record, Target::Core, Target::Btf, Target::Kernel, Target::Walkers];

    fn name(self) -> &'static str {
        match self {
            Target::Record => "record",
            Target::Core => "core",
            Target::Btf => "btf",
            Target::Kernel => "kernel",
            Target::Walkers => "walkers",
            Target::Memory => "memory",
        }
    }

    /// Inputs that take some seconds.
    fn few(self) -> u64 {
        match self {
            Target::Record => 1_000_000,
            Target::Core | Target::Btf => 300_000,
            Target::Kernel | Target::Walkers => 20_000,
            Target::Memory => 200,
        }
    }
}

impl Fuzz {
    /// Runs it.
    pub fn run(self) -> Result<bool> {
        let targets = if self.targets.is_empty() { Target::ALL.to_vec() } else { self.targets.clone() };
        for target in targets {
            if target == Target::Memory {
                if !self.memory()? {
                    return Ok(false);
                }
                continue;
            }
            let runs = self.runs.unwrap_or(20 * target.few());
            coverage_guided(target, runs)?;
            ui::line(format!("{}: nothing found in {runs} inputs", target.name()));
        }
        ui::finish();
        Ok(true)
    }

    fn memory(&self) -> Result<bool> {
        let mut cores = self.core.clone();
        if cores.is_empty() {
            let dir = build::target_dir().join("cores");
            let known = ["6.1", "6.12"].map(|series| dir.join(format!("vmcore-{series}")));
            cores.extend(known.into_iter().filter(|core| core.exists()));
        }
        ensure!(!cores.is_empty(), "there is no captured memory; `cargo xtask vmcore` makes some");
        let seed = self.only.or(self.seed).unwrap_or_else(|| fastrand::u64(..1 << 40));
        let runs = if self.only.is_some() { 1 } else { self.runs.unwrap_or(2000) };
        mutate(&cores, seed, runs)
    }
}

/// All targets that need nothing, on some seconds' inputs each; an error if one finds something.
pub fn run_few() -> Result<()> {
    Target::ALL.into_iter().try_for_each(|target| coverage_guided(target, target.few()))
}

/// Builds binaries of a fuzzing package, below target/fuzz/`kind`; the directory that they are in.
fn built(package: &str, kind: &str, flags: &str, arguments: &[&str]) -> Result<PathBuf> {
    let crates = build::workspace().join("crates").join(package).join("fuzz");
    let dir = build::target_dir().join("fuzz").join(kind);
    let mut cargo = build::cargo();
    // With --target the flags are for the target alone, and not for build scripts.
    cargo.args(["build", "--release", "--quiet", "--locked", "--target", TRIPLE]).args(arguments);
    let built = cargo.current_dir(&crates).env("RUSTFLAGS", flags).env("CARGO_TARGET_DIR", &dir).status()?;
    ensure!(built.success(), "building what is to be fuzzed failed");
    Ok(dir.join(TRIPLE).join("release"))
}

/// Runs a target of libFuzzer on so many inputs; an error if it finds something.
fn coverage_guided(target: Target, runs: u64) -> Result<()> {
    lab::host::ensure_tools(&[("g++", "g++")])?;
    let name = target.name();
    ui::note(&format!("fuzzing {name}, {runs} inputs"));
    let binaries = match target {
        Target::Record => built("crashproc", "coverage", COVERAGE, &[])?,
        _ => built("autopsy", "coverage", COVERAGE, &["--features", "libfuzzer", "--bin", name])?,
    };
    let dir = build::target_dir().join("fuzz");
    let corpus = dir.join(format!("corpus-{name}"));
    fs::create_dir_all(&corpus)?;
    let log_path = dir.join(format!("log-{name}"));
    let log = fs::File::create(&log_path)?;
    let mut fuzz = Command::new(binaries.join(name));
    fuzz.arg(&corpus).current_dir(&dir).args([&format!("-runs={runs}"), "-max_len=8192", "-timeout=10"]);
    let ended = fuzz.stdout(log.try_clone()?).stderr(log).status()?;
    ensure!(ended.success(), "{name} failed: {} says on what", log_path.display());
    Ok(())
}

/// A line of what mutates memory.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Clean {
        ms: f64,
        reads: u64,
        peak: u64,
        places: u64,
        processes: u64,
    },
    Bad {
        seed: u64,
        what: String,
        why: String,
    },
    /// A finding, of a run that is done alone.
    Said(String),
    Sum(Sum),
}

/// How far it is.
#[derive(Deserialize, Default, Clone)]
struct Sum {
    runs: u64,
    mutated: u64,
    panics: u64,
    hangs: u64,
    slow: u64,
    large: u64,
    peak: u64,
    slowest: f64,
    slowest_seed: u64,
    whole: u64,
}

/// Mutates captured memory, so many runs for each core, with seeds from `seed` on; whether all went well.
fn mutate(cores: &[PathBuf], seed: u64, runs: u64) -> Result<bool> {
    ui::note("building");
    let program = built("autopsy", "checked", CHECKED, &["--bin", "memory"])?.join("memory");
    ui::line(format!("seeds from {seed} on; one run again: --core FILE --only SEED"));
    let mut rows = Vec::new();
    for core in cores {
        rows.push((core, mutate_one(&program, core, seed, runs)?));
    }
    ui::finish();
    println!(
        "\n{:<28} {:>8} {:>14} {:>7} {:>6} {:>6} {:>6} {:>10} {:>9}",
        "core", "runs", "mutated reads", "panics", "hangs", "slow", "large", "peak MiB", "slowest"
    );
    let mut fine = true;
    for (core, sum) in rows {
        let name = core.file_name().unwrap_or_default().to_string_lossy();
        println!(
            "{name:<28} {:>8} {:>14} {:>7} {:>6} {:>6} {:>6} {:>10.1} {:>8.1}x",
            sum.runs,
            sum.mutated,
            sum.panics,
            sum.hangs,
            sum.slow,
            sum.large,
            sum.peak as f64 / f64::from(1 << 20),
            sum.slowest
        );
        fine &= sum.panics + sum.hangs + sum.slow + sum.large == 0 && sum.runs > 0;
    }
    Ok(fine)
}

fn mutate_one(program: &Path, core: &Path, seed: u64, runs: u64) -> Result<Sum> {
    // A run that takes 30 times as long as the clean one will not end.
    let mut child = Command::new(program)
        .arg(core)
        .args([seed, runs, 0, 30].map(|number| number.to_string()))
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| program.display().to_string())?;
    let out = child.stdout.take().context("no output")?;
    let (mut sum, mut next) = (Sum::default(), seed);
    for line in BufReader::new(out).lines() {
        match serde_json::from_str(&line?).context("a line that is none of the fuzzer's")? {
            Line::Clean { ms, reads, peak, places, processes } => ui::line(format!(
                "{}: untouched {ms:.0} ms, {reads} reads at {places} places, {:.1} MiB, {processes} processes",
                core.display(),
                peak as f64 / f64::from(1 << 20)
            )),
            Line::Said(text) => ui::line(format!("  {text}")),
            Line::Bad { seed, what, why } => ui::failure(format!("seed {seed}: {what}: {why}")),
            Line::Sum(now) => {
                next = seed + now.runs;
                ui::note(&format!(
                    "{} of {runs} runs, {} mutated reads, {} with a snapshot, slowest {:.1}x (seed {})",
                    now.runs, now.mutated, now.whole, now.slowest, now.slowest_seed
                ));
                sum = now;
            }
        }
    }
    let ended = child.wait()?;
    if !ended.success() {
        bail!("it ended ({ended}) in one of the runs of seed {next} and later, over {}", core.display());
    }
    Ok(sum)
}
