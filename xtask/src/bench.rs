//! `cargo xtask bench`: how long each part takes, beside the floor.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use lab::{Guest, Lab, MachineConfig, Panic, Series, Snapshot};
use serde_json::Value;

use crate::crash::{self, Quiet};
use crate::guest::{self, Installation};
use crate::{Global, ui, workload};

/// How long the programs run before the panic.
const WORK: Duration = Duration::from_secs(6);
const FLOOR_DEADLINE: Duration = Duration::from_secs(120);
/// How much of the vmcore is copied for comparison, in bytes.
const COPY_BYTES: u64 = 256 << 20;
/// Where `otherworld arm` leaves the crash kernel's initramfs.
const INITRAMFS: &str = "/var/lib/otherworld/crash-initramfs.img";

/// Measures, medians of several runs with the demo's programs: panic to the crash kernel's init, init to the snapshot, snapshot to
/// the release of all processes; beside them the same crash kernel and initramfs with an init that does nothing.
#[derive(Debug, Args)]
pub struct Bench {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many runs of each.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Also print the numbers as JSON.
    #[arg(long)]
    json: bool,
}

/// One run's numbers; times in milliseconds, rates in MB/s, memory in MiB.
#[derive(Debug, Clone, Copy, serde::Serialize)]
struct Numbers {
    floor: f64,
    panic_to_init: f64,
    init_to_snapshot: f64,
    snapshot_to_released: f64,
    pour: f64,
    copy: f64,
    peak_memory: f64,
    poured_mib: f64,
}

impl Bench {
    /// Runs it.
    pub fn run(self, global: &Global) -> Result<bool> {
        let lab = global.lab()?;
        for series in crate::series_or_all(self.kernel) {
            let input = workload::with_input(&lab, &MachineConfig::new(series, global.accel()))?;
            let armed = guest::armed(&lab, &input, &Installation::for_demo())?;
            let mut all = Vec::new();
            for n in 0..self.runs.max(1) {
                ui::note(&format!("kernel {series}, run {} of {}", n + 1, self.runs));
                let floor = floor(&lab, &armed, n)?;
                all.push(measure(&lab, &armed, n, floor)?);
            }
            let of = |pick: fn(&Numbers) -> f64| median(all.iter().map(pick).collect());
            let added = of(|run| run.init_to_snapshot + run.snapshot_to_released);
            ui::line(format!(
                "kernel {}, medians of {} runs, the demo's five programs",
                lab.kernel(series)?.release,
                all.len()
            ));
            ui::line(format!("  panic → init that does nothing (floor) {:>8.0} ms", of(|run| run.floor)));
            ui::line(format!(
                "  panic → otherworld's init              {:>8.0} ms",
                of(|run| run.panic_to_init)
            ));
            ui::line(format!(
                "  init → snapshot complete               {:>8.0} ms",
                of(|run| run.init_to_snapshot)
            ));
            ui::line(format!(
                "  snapshot → all released                {:>8.0} ms",
                of(|run| run.snapshot_to_released)
            ));
            ui::line(format!(
                "  added after init, as part of the floor {:>8.2}    (aim: ≤ 0.50)",
                added / of(|run| run.floor)
            ));
            ui::line(format!(
                "  poured                                 {:>8.1} MiB",
                of(|run| run.poured_mib)
            ));
            ui::line(format!(
                "  pouring                                {:>8.3} GB/s",
                of(|run| run.pour) / 1000.0
            ));
            ui::line(format!(
                "  memcpy from vmcore to fresh memory     {:>8.3} GB/s",
                of(|run| run.copy) / 1000.0
            ));
            ui::line(format!(
                "  pouring as part of memcpy              {:>8.2}    (aim: ≥ 0.70)",
                of(|run| run.pour / run.copy)
            ));
            ui::line(format!(
                "  crash kernel's peak memory             {:>8.0} MiB",
                of(|run| run.peak_memory)
            ));
            if self.json {
                println!("{}", serde_json::to_string_pretty(&all)?);
            }
        }
        ui::finish();
        Ok(true)
    }
}

/// Milliseconds from the panic to the first words of an init that does nothing, under the same crash kernel, command line and initramfs.
fn floor(lab: &Lab, armed: &Snapshot, n: usize) -> Result<f64> {
    let mut guest = lab.start(armed, &format!("floor-{}-{n}", armed.config.series))?;
    workload::start(&mut guest.agent)?;
    let status = guest.agent.shell("otherworld status --json", Duration::from_secs(60))?;
    let status: Value = serde_json::from_str(&status)?;
    let details = &status["details"];
    let (kernel, cmdline) = (details["kernel"].as_str(), details["cmdline"].as_str());
    let (kernel, cmdline) =
        kernel.zip(cmdline).context("`otherworld status --json` does not tell kernel and command line")?;
    // A later archive's /init replaces an earlier one's.
    let own = fs::read(lab.boot_initramfs(armed)?)?;
    let mut initramfs = guest.agent.read_file(INITRAMFS)?;
    initramfs.resize(initramfs.len().next_multiple_of(4), 0);
    initramfs.extend(own);
    guest.agent.write_file("/root/floor.img", 0o600, &initramfs)?;
    guest.agent.load_crash_kernel(kernel, "/root/floor.img", &format!("{cmdline} lab.probe"))?;
    guest.agent.wait(&[1], WORK)?;
    let from = guest.machine.console.len();
    let panic =
        crash::crash(&mut guest, &Panic::default(), &mut Quiet)?.context("the guest did not panic")?;
    let console = &guest.machine.console;
    let ms = console.wait_for(from, "the init that does nothing", FLOOR_DEADLINE, |line| {
        line.text.contains("lab: probe ok").then_some(line.ms)
    })?;
    Ok((ms - panic.ms) as f64)
}

fn measure(lab: &Lab, armed: &Snapshot, n: usize, floor: f64) -> Result<Numbers> {
    let mut guest = lab.start(armed, &format!("bench-{}-{n}", armed.config.series))?;
    guest::seed(&mut guest, n as u64)?;
    let pids = workload::start(&mut guest.agent)?;
    guest.agent.wait(&[1], WORK)?;
    let panic = Panic { alive: pids, ..Panic::default() };
    let Some(line) = crash::crash(&mut guest, &panic, &mut Quiet)? else {
        bail!("some program had ended before the panic")
    };
    let mut timeline = Vec::new();
    crash::wait_agent(&mut guest, &line, &mut timeline, &mut Quiet)?;
    crash::fetch_report(&mut guest)?;
    let report: Value = serde_json::from_str(&fs::read_to_string(guest.dir.join("report.json"))?)?;
    let mark = |name: &str| -> Result<f64> {
        let marks = report["timeline"].as_array().context("the report has no timeline")?;
        let mark = marks.iter().find(|mark| mark["name"] == name);
        mark.and_then(|mark| mark["ms"].as_f64()).with_context(|| format!("the timeline has no {name}"))
    };
    let init =
        timeline.iter().find(|moment| moment.name == "init").context("no mark of init on the console")?;
    let (bytes, us) = (&report["pour"]["bytes"], &report["pour"]["us"]);
    let (bytes, us) =
        bytes.as_f64().zip(us.as_f64()).context("the report does not tell how fast memory was poured")?;
    let memory = &report["crash_kernel"];
    let peak = memory["mem_total_kib"].as_f64().zip(memory["mem_available_min_kib"].as_f64());
    let (total, least) = peak.context("the report does not tell the crash kernel's memory")?;
    Ok(Numbers {
        floor,
        panic_to_init: init.since_panic_ms as f64,
        init_to_snapshot: mark("snapshot-complete")? - mark("init")?,
        snapshot_to_released: mark("released")? - mark("snapshot-complete")?,
        pour: bytes / us,
        copy: copy_rate(&mut guest)?,
        peak_memory: (total - least) / 1024.0,
        poured_mib: bytes / f64::from(1 << 20),
    })
}

/// MB/s of a plain copy out of an mmap of /proc/vmcore into fresh memory, in the crash kernel, with nothing else at work.
fn copy_rate(guest: &mut Guest) -> Result<f64> {
    guest.agent.shell("pkill -STOP -u demo; true", Duration::from_secs(30))?;
    Ok(guest.agent.copy_rate(COPY_BYTES)?)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
    }
}
