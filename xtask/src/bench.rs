//! `cargo xtask bench`: how long each part takes, beside the floor.
//!
//! Three crashes per run, so that what is compared has been measured side by side: the demo's programs under an init that does
//! nothing (the floor); the same programs resurrected (the times); and with much more memory (pouring, beside a plain copy in
//! the same crash kernel).

mod inspect;
mod scaling;
mod write_back;

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use lab::{Guest, Key, Lab, MachineConfig, Panic, Series, Snapshot};
use serde::Serialize;
use serde_json::Value;

use crate::crash::{self, Moment, Quiet};
use crate::guest::{self, Installation};
use crate::survive;
use crate::workload::WORKLOADS;
use crate::{Global, build, ui, workload};

/// How long the programs run before the panic.
const WORK: Duration = Duration::from_secs(3);
/// A program that is over before this, in the uninterrupted run, may be over before the panic: it need not come back.
const LASTING: Duration = Duration::from_secs(8);
const FLOOR_DEADLINE: Duration = Duration::from_secs(120);
const ARM_DEADLINE: Duration = Duration::from_secs(120);
/// Survivors with much memory, for the rate of pouring.
const BIG: [&str; 2] = ["memory-small", "memory-huge"];
/// Where `otherworld arm` leaves the crash kernel's initramfs.
const INITRAMFS: &str = "/var/lib/otherworld/crash-initramfs.img";
/// Where the init that does nothing lies in the guest.
const IDLE: &str = "/root/lab-idle";

/// Measures, medians of several runs with the demo's programs: panic to the crash kernel's init, init to the snapshot, snapshot to
/// the release of all processes; beside them the same crash kernel with an init that does nothing. Worth something only on a
/// machine that does nothing else.
#[derive(Debug, Args)]
pub struct Bench {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many runs.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Measures what each process, thread, descriptor and MiB costs instead: the same with 1, 10, 100 and 1000 of them.
    #[arg(long)]
    scaling: bool,
    /// Measures how fast dirty page cache is written to its disk instead, beside dd.
    #[arg(long, conflicts_with = "scaling")]
    write_back: bool,
    /// Measures `otherworld inspect ps` on a vmcore of 2 GB instead, beside drgn and crash doing the same.
    #[arg(long, conflicts_with_all = ["scaling", "write_back"])]
    inspect: bool,
    /// With --scaling: the largest number of each.
    #[arg(long, default_value_t = 1000)]
    most: usize,
}

/// One run's numbers. Times are milliseconds; those from the panic on by the host's clock and the console's lines.
#[derive(Debug, Clone, Serialize)]
struct Numbers {
    /// Panic to the first words of an init that does nothing.
    floor: f64,
    /// Panic to the first words of our init.
    panic_to_init: f64,
    init_to_snapshot: f64,
    snapshot_to_released: f64,
    /// The report's whole timeline, since init.
    marks: Vec<(String, f64)>,
    /// MiB; the crash kernel's memory at its fullest, of the demo's resurrection.
    peak_mib: f64,
    /// MiB; memory copied into processes, in the run with much of it.
    poured_mib: f64,
    /// GB/s, from the first frame looked up to the last one copied.
    pour: f64,
    /// GB/s; the same amount out of a mapping of the vmcore into fresh memory.
    copy: f64,
}

/// All of one kernel.
#[derive(Debug, Serialize)]
struct Measured {
    kernel: String,
    /// The demo's programs that were there at the panic.
    programs: Vec<&'static str>,
    initramfs_bytes: u64,
    binary_bytes: u64,
    runs: Vec<Numbers>,
}

impl Bench {
    /// Runs it.
    pub fn run(self, global: &Global) -> Result<bool> {
        if self.scaling {
            scaling::run(global, self.kernel, self.most, self.json)?;
            return Ok(true);
        }
        if self.write_back {
            write_back::run(global, self.kernel, self.runs, self.json)?;
            return Ok(true);
        }
        if self.inspect {
            inspect::run(global, self.kernel, self.json)?;
            return Ok(true);
        }
        let lab = global.lab()?;
        let mut all = Vec::new();
        for series in crate::series_or_all(self.kernel) {
            let measured = self.measure(&lab, &MachineConfig::new(series, global.accel()))?;
            if !self.json {
                ui::line(measured.to_string());
            }
            all.push(measured);
        }
        ui::finish();
        if self.json {
            println!("{}", serde_json::to_string_pretty(&all)?);
        }
        Ok(true)
    }

    fn measure(&self, lab: &Lab, config: &MachineConfig) -> Result<Measured> {
        let series = config.series;
        let prepared = workload::prepared(lab, config)?;
        let ended_ms = workload::reference(&prepared)?.ended_ms;
        let lasting: Vec<usize> =
            (0..WORKLOADS.len()).filter(|&n| u128::from(ended_ms[n]) >= LASTING.as_millis()).collect();
        let armed = guest::armed(lab, &prepared, &Installation::for_demo())?;
        let idle = with_idle_init(lab, &armed)?;
        // Now, since it is these that are measured: the work tree may change meanwhile.
        let binary_bytes = fs::metadata(build::static_binaries()?.otherworld)?.len();
        let mut initramfs_bytes = 0;
        let mut runs = Vec::new();
        for n in 1..=self.runs.max(1) {
            let note = |what: &str| ui::note(&format!("kernel {series}, run {n} of {}: {what}", self.runs));
            note("an init that does nothing");
            let floor = floor(lab, &idle, n)?;
            note("the demo's programs");
            let (mut guest, report, host) =
                crashed(lab, &armed, &format!("bench-{series}-{n}"), n, &lasting, &[])?;
            let marks = since_init(&report)?;
            let mark = |name: &str| time_of(&marks, name);
            let size = guest.agent.shell(&format!("stat -c %s {INITRAMFS}"), ARM_DEADLINE)?;
            initramfs_bytes = size.trim().parse().context("the size of the initramfs")?;
            let peak_mib = peak_mib(&report)?;
            let panic_to_init =
                host.iter().find(|m| m.name == "init").context("no mark of init on the console")?;
            drop(guest);
            note("much memory");
            let (mut guest, report, _) =
                crashed(lab, &armed, &format!("pour-{series}-{n}"), n, &lasting, &BIG)?;
            let (bytes, pour) = poured(&report)?;
            runs.push(Numbers {
                floor,
                panic_to_init: panic_to_init.since_panic_ms as f64,
                init_to_snapshot: mark("snapshot-complete")?,
                snapshot_to_released: mark("released")? - mark("snapshot-complete")?,
                marks,
                peak_mib,
                poured_mib: bytes as f64 / f64::from(1 << 20),
                pour,
                copy: copy_rate(&mut guest, bytes)?,
            });
        }
        Ok(Measured {
            kernel: lab.kernel(series)?.release,
            programs: lasting.iter().map(|&n| WORKLOADS[n].name).collect(),
            initramfs_bytes,
            binary_bytes,
            runs,
        })
    }
}

/// The armed layer with another init in the crash kernel's initramfs.
fn with_idle_init(lab: &Lab, armed: &Snapshot) -> Result<Snapshot> {
    let init = fs::read(build::idle()?)?;
    let layer = lab.derive(armed, "floor", &Key::new("floor").with_bytes(&init), |agent, _| {
        agent.write_file(IDLE, 0o755, &init)?;
        agent.shell(&format!("otherworld arm --init {IDLE}"), ARM_DEADLINE).map(drop)
    });
    layer.context("arming with an init that does nothing failed")
}

/// Milliseconds from the panic to the first words of an init that does nothing, under the same crash kernel and command line.
fn floor(lab: &Lab, idle: &Snapshot, n: usize) -> Result<f64> {
    let mut guest = lab.start(idle, &format!("floor-{}-{n}", idle.config.series))?;
    guest::seed(&mut guest, n as u64)?;
    workload::start(&mut guest.agent)?;
    let from = guest.machine.console.len();
    let panic = Panic { after_us: WORK.as_micros() as u64, ..Panic::default() };
    let panic = crash::crash(&mut guest, &panic, &mut Quiet)?.context("the guest did not panic")?;
    let console = &guest.machine.console;
    let ms = console.wait_for(from, "the init that does nothing", FLOOR_DEADLINE, |line| {
        line.text.contains("lab-idle: init").then_some(line.ms)
    })?;
    Ok((ms - panic.ms) as f64)
}

/// A guest after its resurrection, the report, and the console's marks.
fn crashed(
    lab: &Lab,
    armed: &Snapshot,
    name: &str,
    n: usize,
    lasting: &[usize],
    survivors: &[&str],
) -> Result<(Guest, Value, Vec<Moment>)> {
    let mut guest = lab.start(armed, name)?;
    guest::seed(&mut guest, n as u64)?;
    let survivors = survivors.iter().filter_map(|name| survivors::find(name)).collect::<Vec<_>>();
    let mut pids: Vec<i32> =
        survive::start(&mut guest.agent, &survivors, None, false)?.into_values().collect();
    let programs = workload::start(&mut guest.agent)?;
    pids.extend(lasting.iter().map(|&n| programs[n]));
    let panic = Panic { after_us: WORK.as_micros() as u64, alive: pids.clone(), ..Panic::default() };
    let Some(line) = crash::crash(&mut guest, &panic, &mut Quiet)? else {
        let alive = guest.agent.wait(&pids, Duration::ZERO)?;
        let gone: Vec<i32> = pids.iter().copied().filter(|pid| !alive.contains(pid)).collect();
        bail!("processes {gone:?} of {pids:?} had ended {} ms after the last one's start", WORK.as_millis())
    };
    let mut timeline = Vec::new();
    crash::wait_agent(&mut guest, &line, &mut timeline, &mut Quiet)?;
    crash::fetch_report(&mut guest)?;
    let report = report(&guest.dir.join("report.json"))?;
    // Processes that are not there cost nothing: the reader has to know.
    let mut missing = 0;
    for pid in &pids {
        let fate = crash::reported_fate(&report, *pid).unwrap_or_default();
        if !fate.starts_with("resurrected") {
            ui::line(format!("{name}: without process {pid}: {fate}"));
            missing += 1;
        }
    }
    if missing * 4 > pids.len() {
        guest.keep_artifacts()?;
        bail!("{missing} of {} processes did not come back ({})", pids.len(), guest.dir.display());
    }
    Ok((guest, report, timeline))
}

fn report(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

/// The report's timeline, from init on, in order of time.
fn since_init(report: &Value) -> Result<Vec<(String, f64)>> {
    let marks = report["timeline"].as_array().context("the report has no timeline")?;
    let mut marks: Vec<(String, f64)> = marks
        .iter()
        .filter_map(|mark| Some((mark["name"].as_str()?.to_owned(), mark["ms"].as_f64()?)))
        .collect();
    let init = time_of(&marks, "init")?;
    marks.iter_mut().for_each(|(_, ms)| *ms -= init);
    marks.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    Ok(marks)
}

fn time_of(marks: &[(String, f64)], name: &str) -> Result<f64> {
    let mark = marks.iter().find(|(found, _)| found == name);
    mark.map(|(_, ms)| *ms).with_context(|| format!("the timeline has no {name}"))
}

fn peak_mib(report: &Value) -> Result<f64> {
    let memory = &report["crash_kernel"];
    let kib = memory["mem_total_kib"].as_f64().zip(memory["mem_available_min_kib"].as_f64());
    let (total, least) = kib.context("the report does not tell the crash kernel's memory")?;
    Ok((total - least) / 1024.0)
}

/// How many bytes were poured, and GB/s.
fn poured(report: &Value) -> Result<(u64, f64)> {
    let (bytes, us) = (report["pour"]["bytes"].as_u64(), report["pour"]["us"].as_f64());
    let (bytes, us) = bytes.zip(us).context("the report does not tell how fast memory was poured")?;
    Ok((bytes, bytes as f64 / us / 1000.0))
}

/// GB/s of a plain copy out of an mmap of /proc/vmcore into fresh memory, in the crash kernel, with nothing else at work.
fn copy_rate(guest: &mut Guest, bytes: u64) -> Result<f64> {
    guest.agent.shell("pkill -STOP -u demo; true", Duration::from_secs(30))?;
    Ok(guest.agent.copy_rate(bytes)? / 1000.0)
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |pick: &dyn Fn(&Numbers) -> f64| Spread::of(self.runs.iter().map(pick).collect());
        let row = |f: &mut fmt::Formatter<'_>, what: &str, spread: Spread, unit: &str, digits: usize| {
            let Spread { median, least, most } = spread;
            writeln!(f, "  {what:44} {median:>9.digits$} {least:>9.digits$} {most:>9.digits$} {unit}")
        };
        writeln!(f, "kernel {}, {} runs with {}", self.kernel, self.runs.len(), self.programs.join(", "))?;
        writeln!(f, "  {:44} {:>9} {:>9} {:>9}", "", "median", "min", "max")?;
        row(f, "panic → an init that does nothing (floor)", of(&|run| run.floor), "ms", 0)?;
        row(f, "panic → our init", of(&|run| run.panic_to_init), "ms", 0)?;
        row(f, "init → snapshot complete", of(&|run| run.init_to_snapshot), "ms", 0)?;
        row(f, "snapshot complete → all released", of(&|run| run.snapshot_to_released), "ms", 0)?;
        let added = |run: &Numbers| (run.init_to_snapshot + run.snapshot_to_released) / run.floor;
        row(f, "init → all released, of the floor", of(&added), "(aim: ≤ 0.50)", 2)?;
        row(f, "crash kernel's peak memory", of(&|run| run.peak_mib), "MiB", 0)?;
        row(f, "memory poured", of(&|run| run.poured_mib), "MiB", 0)?;
        row(f, "pouring", of(&|run| run.pour), "GB/s", 3)?;
        row(f, "plain copy out of the vmcore", of(&|run| run.copy), "GB/s", 3)?;
        row(f, "pouring, of the plain copy", of(&|run| run.pour / run.copy), "(aim: ≥ 0.70)", 2)?;
        let kib = |bytes: u64| bytes.div_ceil(1024);
        writeln!(f, "  initramfs {} KiB, binary {} KiB", kib(self.initramfs_bytes), kib(self.binary_bytes))?;
        writeln!(f, "  since init, with the demo's programs:")?;
        for (name, _) in self.runs.first().map_or(&[][..], |run| &run.marks) {
            let times = self.runs.iter().filter_map(|run| time_of(&run.marks, name).ok()).collect();
            row(f, &format!("  {name}"), Spread::of(times), "ms", 0)?;
        }
        Ok(())
    }
}

/// Of some numbers.
#[derive(Debug, PartialEq)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    /// Not a number for none.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |n: usize| values.get(n).copied().unwrap_or(f64::NAN);
        let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
        Self {
            median: (at(low) + at(high)) / 2.0,
            least: at(0),
            most: values.last().copied().unwrap_or(f64::NAN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Spread::of(vec![9.0, 1.0, 5.0]), Spread { median: 5.0, least: 1.0, most: 9.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, least: 1.0, most: 4.0 });
        assert!(Spread::of(Vec::new()).median.is_nan());
    }

    #[test]
    fn times_count_from_init() {
        let report = serde_json::json!({ "timeline": [
            { "name": "init", "ms": 100 }, { "name": "released", "ms": 350 }, { "name": "vmcore-open", "ms": 120 },
        ]});
        let marks = since_init(&report).unwrap();
        assert_eq!(
            marks.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["init", "vmcore-open", "released"]
        );
        assert_eq!(time_of(&marks, "released").unwrap(), 250.0);
        assert!(time_of(&marks, "poured").is_err());
        assert!(since_init(&serde_json::json!({})).is_err());
    }
}
