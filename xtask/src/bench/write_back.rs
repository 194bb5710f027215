//! How fast what is dirty in the dead page cache is written to its disk, beside dd to the same disk in the same crash kernel; the crash kernel has
//! an eighth of that memory.

use std::fmt;

use anyhow::{Context as _, Result, ensure};
use lab::{Channel, Lab, MachineConfig, Panic, Program, Snapshot};
use serde::Serialize;

use super::{Spread, peak_mib, report};
use crate::crash::{self, Quiet};
use crate::guest::{self, Installation};
use crate::survive::PROGRAM;
use crate::{Global, ui};

/// What is dirty.
const MIB: u64 = 2048;
const MEMORY_MIB: u32 = 5120;
const CRASHKERNEL_MIB: u32 = 256;
const DISK_MIB: u32 = 6144;
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(300);
const PREPARE: &str = "mkfs.ext4 -q /dev/vdb && mkdir /srv/data && mount /dev/vdb /srv/data";
/// Nothing is written before the panic, however much it is.
const HOLD: &str = "sysctl -qw vm.dirty_writeback_centisecs=0 vm.dirty_expire_centisecs=360000 vm.dirty_ratio=95 \
    vm.dirty_background_ratio=95 && mount -o remount,commit=600 /srv/data";
/// Blocks that are all different.
const WRITE: &str = "
import random
block = random.Random(1).randbytes((1 << 20) - 8)
with open('/srv/data/large', 'wb') as file:
    for n in range(COUNT):
        file.write(n.to_bytes(8, 'little') + block)
";
const CHECK: &str = "
import random
block = random.Random(1).randbytes((1 << 20) - 8)
with open('/srv/data/large', 'rb') as file:
    for n in range(COUNT):
        assert file.read(1 << 20) == n.to_bytes(8, 'little') + block, n
    assert not file.read(1)
";

/// One crash.
#[derive(Debug, Serialize)]
struct Run {
    /// Until the last byte is on the disk.
    ours_mb_per_s: f64,
    dd_mb_per_s: f64,
    peak_mib: f64,
}

/// All of one kernel.
#[derive(Debug, Serialize)]
struct Measured {
    kernel: String,
    runs: Vec<Run>,
}

/// Measures on these kernels and prints what comes out.
pub fn run(global: &Global, kernel: Option<lab::Series>, runs: usize, json: bool) -> Result<()> {
    let lab = global.lab()?;
    let mut all = Vec::new();
    for series in crate::series_or_all(kernel) {
        let config = MachineConfig {
            memory_mib: MEMORY_MIB,
            crashkernel_mib: CRASHKERNEL_MIB,
            scratch_mib: DISK_MIB,
            ..MachineConfig::new(series, global.accel())
        };
        let installation = Installation { prepare: PREPARE.into(), ..Installation::for_programs(PROGRAM) };
        let armed = guest::armed(&lab, &lab.booted(&config)?, &installation)?;
        let runs = (0..runs).map(|_| once(&lab, &armed)).collect::<Result<_>>()?;
        let measured = Measured { kernel: series.to_string(), runs };
        if !json {
            ui::line(measured.to_string());
        }
        all.push(measured);
    }
    ui::finish();
    if json {
        println!("{}", serde_json::to_string_pretty(&all)?);
    }
    Ok(())
}

fn python(agent: &mut Channel, script: &str) -> Result<()> {
    let script = script.replace("COUNT", &MIB.to_string());
    agent.run(&Program::new(["python3", "-c", &script]), DEADLINE).map(drop).context("python3")
}

fn once(lab: &Lab, armed: &Snapshot) -> Result<Run> {
    let series = armed.config.series;
    ui::note(&format!("kernel {series}: {MIB} MiB are written, and held"));
    let mut guest = lab.start(armed, &format!("write-back-{series}"))?;
    guest.agent.shell(HOLD, DEADLINE)?;
    python(&mut guest.agent, WRITE)?;
    let output = guest.agent.run(&Program::new([PROGRAM, "crowd", "--processes", "1"]), DEADLINE)?;
    let parent: i32 = output.trim().parse().context("the crowd's parent")?;
    let panic = Panic { alive: vec![parent], ..Panic::default() };
    let line = crash::crash(&mut guest, &panic, &mut Quiet)?.context("the guest did not panic")?;
    crash::wait_agent(&mut guest, &line, &mut Vec::new(), &mut Quiet)?;
    let agent = &mut guest.agent;
    let seconds = |agent: &mut Channel, what: &str| -> Result<f64> {
        let script = format!("start=$(date +%s%N); {what} && echo $(($(date +%s%N) - start))");
        let text = agent.shell(&script, DEADLINE)?;
        Ok(text.trim().parse::<f64>().with_context(|| format!("`{what}` says {text:?}"))? / 1e9)
    };
    let synced = seconds(agent, "sync")?;
    let dd =
        seconds(agent, &format!("dd if=/dev/zero of=/srv/data/dd bs=1M count={MIB} conv=fsync 2>/dev/null"))?;
    ui::note("checking what was written");
    python(agent, CHECK)?;
    crash::fetch_report(&mut guest)?;
    let report = report(&guest.dir.join("report.json"))?;
    let written = &report["resurrection"]["write_back"];
    let number = |name: &str| written[name].as_f64().with_context(|| format!("the report has no {name}"));
    let (bytes, us) = (number("bytes")?, number("us")?);
    ensure!(bytes >= (MIB << 20) as f64, "only {bytes} bytes were written back");
    Ok(Run {
        ours_mb_per_s: bytes / 1e6 / (us / 1e6 + synced),
        dd_mb_per_s: (MIB << 20) as f64 / 1e6 / dd,
        peak_mib: peak_mib(&report)?,
    })
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |what: fn(&Run) -> f64| Spread::of(self.runs.iter().map(what).collect()).median;
        let (ours, dd) = (of(|run| run.ours_mb_per_s), of(|run| run.dd_mb_per_s));
        write!(
            f,
            "kernel {}: {MIB} MiB of dirty page cache through a crash kernel of {CRASHKERNEL_MIB} MiB: {ours:.0} MB/s, dd {dd:.0} MB/s, ratio {:.2}; \
             its memory at its fullest {:.0} MiB; medians of {}",
            self.kernel,
            ours / dd,
            of(|run| run.peak_mib),
            self.runs.len()
        )
    }
}
