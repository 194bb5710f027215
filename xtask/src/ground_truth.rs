//! `cargo xtask ground-truth`: /proc before the panic against autopsy's reading, and against /proc after the resurrection.

use anyhow::{Result, bail};
use clap::Args;
use lab::Series;

use crate::Global;

/// Compares what the running kernel said in /proc with what is read from its memory and with what the resurrected processes show.
#[derive(Debug, Args)]
pub struct GroundTruth {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
}

impl GroundTruth {
    /// Runs it; whether all fields agree.
    pub fn run(self, _global: &Global) -> Result<bool> {
        bail!("not there yet")
    }
}
