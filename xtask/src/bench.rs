//! `cargo xtask bench`: how long each part takes, beside the floor.

use anyhow::{Result, bail};
use clap::Args;
use lab::Series;

use crate::Global;

/// Measures, medians of several runs: panic to the crash kernel's init, init to the snapshot, snapshot to the release of all
/// processes; beside them the same crash kernel with an init that does nothing.
#[derive(Debug, Args)]
pub struct Bench {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many runs of each.
    #[arg(long, default_value_t = 5)]
    runs: u32,
}

impl Bench {
    /// Runs it.
    pub fn run(self, _global: &Global) -> Result<bool> {
        bail!("not there yet")
    }
}
