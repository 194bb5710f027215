//! `cargo xtask fuzz`: libFuzzer on what reads data of untrusted processes, with a stable compiler.

use std::fs;

use anyhow::{Result, ensure};
use clap::Args;

use crate::{build, ui};

/// Coverage for libFuzzer, as cargo-fuzz asks for it.
const COVERAGE: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cdebug-assertions -Coverflow-checks";

/// Runs the fuzz target `record` (what reads the records of crash procedures) on so many inputs. What it finds on the way it keeps below target/fuzz.
#[derive(Debug, Args)]
pub struct Fuzz {
    /// How many inputs.
    #[arg(long, default_value_t = 5_000_000)]
    runs: u64,
}

impl Fuzz {
    /// Runs it.
    pub fn run(self) -> Result<bool> {
        run(self.runs)?;
        ui::finish();
        println!("nothing found in {} inputs", self.runs);
        Ok(true)
    }
}

/// Runs the target on so many inputs; an error if it finds something.
pub fn run(runs: u64) -> Result<()> {
    lab::host::ensure_tools(&[("g++", "g++")])?;
    ui::note(&format!("fuzzing the reader of records, {runs} inputs"));
    let dir = build::target_dir().join("fuzz");
    let corpus = dir.join("corpus");
    fs::create_dir_all(&corpus)?;
    let crates = build::workspace().join("crates/crashproc/fuzz");
    let target = "x86_64-unknown-linux-gnu";
    let mut cargo = build::cargo();
    // With --target the flags are for the target alone, and not for build scripts.
    cargo.args(["build", "--release", "--quiet", "--locked", "--target", target]).current_dir(&crates);
    let built = cargo.env("RUSTFLAGS", COVERAGE).env("CARGO_TARGET_DIR", &dir).status()?;
    ensure!(built.success(), "building the fuzz target failed");
    let log = fs::File::create(dir.join("log"))?;
    let mut fuzz = std::process::Command::new(dir.join(target).join("release/record"));
    fuzz.arg(&corpus).current_dir(&dir).args([&format!("-runs={runs}"), "-max_len=8192"]);
    let ended = fuzz.stdout(log.try_clone()?).stderr(log).status()?;
    ensure!(ended.success(), "the fuzz target failed; input and log are in {}", dir.display());
    Ok(())
}
