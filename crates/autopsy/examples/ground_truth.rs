//! Compares a core with a recording of /proc: `cargo run --example ground_truth -- CORE DIRECTORY [--all]`.
//!
//! `--all`: also what processes have changed by running on after the recording.

use std::path::PathBuf;

use anyhow::Context;
use autopsy::Autopsy;
use autopsy::ground_truth::{MOVING, Record, compare_except};

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (core, recording) = (args.next().context("CORE?")?, args.next().context("DIRECTORY?")?);
    let kernel = ktypes::Kernel::open(vmcore::Vmcore::open(&core)?)?;
    let (_, found) = Autopsy::new(&kernel).snapshot_with_record()?;
    let all = args.next().is_some();
    let result = compare_except(&Record::read(&recording)?, &found, if all { &[] } else { MOVING });
    for difference in &result.differences {
        println!("{difference}");
    }
    println!("compared: {:?}", result.compared);
    println!("ran since: {:?}; in one only: {:?}", result.moved, result.alone);
    println!(
        "{} differences in {} fields",
        result.differences.len(),
        result.compared.values().sum::<usize>()
    );
    Ok(())
}
