//! `cargo xtask demo`.

use anyhow::Result;
use clap::Args;
use lab::{MachineConfig, Series};

use crate::crash::{self, Moment, Watch};
use crate::guest::{self, Installation};
use crate::workload::{self, WORKLOADS};
use crate::{Global, ui};

/// Five unmodified programs run in a guest; its kernel panics at a random moment; they go on under a second kernel and finish
/// with the output that they would have had. The exit status is 0 only if every byte is right.
#[derive(Debug, Args)]
pub struct Demo {
    /// The guest's kernel: 6.1 or 6.12.
    #[arg(long, default_value = "6.1")]
    kernel: Series,
    /// Draws the moment of the panic; a random one, which is printed, if none is given.
    #[arg(long)]
    seed: Option<u64>,
}

impl Demo {
    /// Runs it; whether all survived.
    pub fn run(self, global: &Global) -> Result<bool> {
        let lab = global.lab()?;
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let prepared = workload::prepared(&lab, &MachineConfig::new(self.kernel, global.accel()))?;
        let armed = guest::armed(&lab, &prepared, &Installation::for_demo())?;
        ui::line(format!("Debian 12 with kernel {}, seed {seed}", lab.kernel(self.kernel)?.release));
        for workload in &WORKLOADS {
            ui::line(format!("  {:9} {}", workload.name, workload.what));
        }
        ui::note("starting the guest");
        let name = format!("demo-{}-{seed}", self.kernel);
        let outcome = crash::once(&lab, &armed, &prepared, &name, seed, &mut Stage::default())?;
        ui::finish();
        if let Some(trouble) = &outcome.trouble {
            println!("\n{trouble}");
        }
        println!("\nThe verdict: each output against the uninterrupted run's, byte by byte");
        for fate in &outcome.fates {
            match &fate.failure {
                None => println!("  {:9} identical", fate.name),
                Some(why) => println!("  {:9} FAILED: {why}", fate.name),
            }
        }
        let passed = outcome.passed();
        println!("\n{passed} of {} programs survived the panic.", WORKLOADS.len());
        println!("Artifacts: target/lab/runs/{name}/ (console.log, report.json, outputs/)");
        Ok(passed == WORKLOADS.len())
    }
}

/// Shows the crash as it happens.
#[derive(Default)]
struct Stage {
    running: bool,
}

impl Watch for Stage {
    fn running(&mut self, ms: u64) {
        if !self.running {
            self.running = true;
            ui::line("\nThe machine is running, all five programs at work.");
            ui::note("running");
        }
        ui::live(&format!("running for {:.1} s", ms as f64 / 1000.0));
    }

    fn panicked(&mut self) {
        ui::line("\nKernel panic. Everything from here on happens under the second kernel.");
        ui::line("      0 ms  panic");
        ui::live("the crash kernel boots");
    }

    fn moment(&mut self, moment: &Moment) {
        ui::line(format!("{:>7} ms  {}", moment.since_panic_ms, describe(&moment.name)));
        ui::live(describe(&moment.name));
    }

    fn console(&mut self, since_panic_ms: u64, text: &str) {
        // The rest of the report is in console.log.
        if text.starts_with("back: ") || text.contains("given up  ") || text.contains("failed  ") {
            ui::line(format!("{since_panic_ms:>7} ms    {}", text.trim()));
        }
    }

    fn finishing(&mut self, left: usize) {
        ui::live(&format!(
            "{left} of {} programs are still at work under the second kernel",
            WORKLOADS.len()
        ));
    }
}

/// The crash kernel's marks in people's words.
fn describe(mark: &str) -> &str {
    match mark {
        "init" => "the crash kernel has booted; PID 1 starts",
        "vmcore-open" => "the dead kernel's memory is readable",
        "snapshot-complete" => "all processes are read, checked and decided",
        "root-mounted" => "the file systems are mounted again",
        "files-reopened" => "open files are open again, lost writes written",
        "skeletons" => "the processes exist again, empty",
        "poured" => "their memory is back",
        "released" => "they run",
        "report-written" => "the report is written",
        "failed" => "the resurrection failed",
        other => other,
    }
}
