//! What each process, thread, descriptor and MiB costs: the same with one, ten, a hundred and a thousand of them.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use lab::{Lab, MachineConfig, Panic, Program, Series, Snapshot};
use serde::Serialize;

use super::{peak_mib, report, since_init, time_of};
use crate::crash::{self, Quiet};
use crate::guest::{self, Installation};
use crate::survive::PROGRAM;
use crate::{Global, ui};

/// A thousand processes of 1 MiB have to fit into the crash kernel's memory.
/// Wherever the kernel has put itself, there is room for the crash kernel above it or below: 3 GiB lie below the devices, 4 above.
const MEMORY_MIB: u32 = 7168;
const CRASHKERNEL_MIB: u32 = 2048;
const COUNTS: [usize; 4] = [1, 10, 100, 1000];
const READY_DEADLINE: Duration = Duration::from_secs(240);

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Processes,
    Threads,
    Descriptors,
    /// Processes of 1 MiB each.
    Memory,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Processes, Kind::Threads, Kind::Descriptors, Kind::Memory];

    fn name(self) -> &'static str {
        match self {
            Kind::Processes => "processes",
            Kind::Threads => "threads",
            Kind::Descriptors => "descriptors",
            Kind::Memory => "memory",
        }
    }

    /// Options of `survivors crowd`.
    fn options(self, count: usize) -> Vec<String> {
        let of = |name: &str, n: usize| [format!("--{name}"), n.to_string()];
        match self {
            Kind::Processes => of("processes", count).into(),
            Kind::Memory => [of("processes", count), of("mib", 1)].concat(),
            other => [of("processes", 1), of(other.name(), count)].concat(),
        }
    }
}

/// One crash.
#[derive(Debug, Serialize)]
struct Point {
    kernel: String,
    kind: Kind,
    count: usize,
    /// Milliseconds.
    init_to_snapshot: f64,
    snapshot_to_released: f64,
    peak_mib: f64,
}

impl Point {
    fn total(&self) -> f64 {
        self.init_to_snapshot + self.snapshot_to_released
    }
}

/// Measures all kinds on these kernels, up to `most` of each, and prints what comes out.
pub fn run(global: &Global, kernel: Option<Series>, most: usize, json: bool) -> Result<()> {
    let lab = global.lab()?;
    let mut points = Vec::new();
    for series in crate::series_or_all(kernel) {
        let config = MachineConfig {
            memory_mib: MEMORY_MIB,
            crashkernel_mib: CRASHKERNEL_MIB,
            ..MachineConfig::new(series, global.accel())
        };
        let armed = guest::armed(&lab, &lab.booted(&config)?, &Installation::for_programs(PROGRAM))?;
        for kind in Kind::ALL {
            for count in COUNTS.into_iter().filter(|count| *count <= most) {
                let point = measure(&lab, &armed, kind, count)?;
                if !json {
                    ui::line(point.to_string());
                }
                points.push(point);
            }
        }
    }
    ui::finish();
    match json {
        true => println!("{}", serde_json::to_string_pretty(&points)?),
        false => print!("{}", Table(&points)),
    }
    Ok(())
}

fn measure(lab: &Lab, armed: &Snapshot, kind: Kind, count: usize) -> Result<Point> {
    let series = armed.config.series;
    ui::note(&format!("kernel {series}: {count} {}", kind.name()));
    let mut guest = lab.start(armed, &format!("scaling-{series}-{}-{count}", kind.name()))?;
    guest::seed(&mut guest, count as u64)?;
    let argv: Vec<String> =
        [PROGRAM.to_owned(), "crowd".to_owned()].into_iter().chain(kind.options(count)).collect();
    let output = guest.agent.run(&Program::new(argv), READY_DEADLINE)?;
    let parent: i32 = output.trim().parse().context("the crowd's parent")?;
    let panic = Panic { alive: vec![parent], ..Panic::default() };
    let line = crash::crash(&mut guest, &panic, &mut Quiet)?.context("the guest did not panic")?;
    crash::wait_agent(&mut guest, &line, &mut Vec::new(), &mut Quiet)?;
    crash::fetch_report(&mut guest)?;
    let report = report(&guest.dir.join("report.json"))?;
    let processes = report["processes"].as_array().map_or(&[][..], Vec::as_slice);
    let back =
        processes.iter().filter(|p| p["fate"].as_str().is_some_and(|f| f.starts_with("resurrected"))).count();
    let expected = if matches!(kind, Kind::Processes | Kind::Memory) { count } else { 1 } + 1;
    if back < expected {
        guest.keep_artifacts()?;
        bail!("{back} of {expected} processes came back ({})", guest.dir.display());
    }
    let marks = since_init(&report)?;
    let snapshot = time_of(&marks, "snapshot-complete")?;
    Ok(Point {
        kernel: series.to_string(),
        kind,
        count,
        init_to_snapshot: snapshot,
        snapshot_to_released: time_of(&marks, "released")? - snapshot,
        peak_mib: peak_mib(&report)?,
    })
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "kernel {} {:>5} {:12} init → snapshot {:>7.0} ms, → released {:>7.0} ms, peak {:>5.0} MiB",
            self.kernel,
            self.count,
            self.kind.name(),
            self.init_to_snapshot,
            self.snapshot_to_released,
            self.peak_mib
        )
    }
}

/// The cost of one more, between each count and the next.
struct Table<'a>(&'a [Point]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "cost of one more, ms")?;
        for pair in self.0.windows(2) {
            let [a, b] = pair else { continue };
            if (&a.kernel, a.kind) != (&b.kernel, b.kind) {
                continue;
            }
            let each = (b.total() - a.total()) / (b.count - a.count) as f64;
            let (kernel, kind, ratio) = (&b.kernel, b.kind.name(), b.total() / a.total());
            writeln!(
                f,
                "  kernel {kernel} {kind:12} {:>4} to {:>4}: {each:>8.3} each, {ratio:.1} times the time",
                a.count, b.count
            )?;
        }
        Ok(())
    }
}
