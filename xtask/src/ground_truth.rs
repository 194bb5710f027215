//! `cargo xtask ground-truth`: /proc before the panic against autopsy's reading, and against /proc after the resurrection.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use autopsy::Autopsy;
use autopsy::ground_truth::{Comparison, Record, compare};
use clap::Args;
use lab::image::DEMO_UID;
use lab::{Guest, Lab, MachineConfig, Panic, Program, Series};

use crate::crash::{self, Quiet};
use crate::crash_runs::Tally;
use crate::guest::{self, Installation};
use crate::{Global, ui, workload};

/// Fields of /proc in which a resurrected process may differ from what it was, and why.
const MAY_DIFFER: &[(&str, &str)] = &[
    ("stat.starttime", "the process was made again: the kernel notes the new time"),
    ("fdinfo.mnt_id", "the file systems were mounted again"),
    ("fdinfo.ino", "pipes and terminals are new objects with new numbers"),
    (
        "smaps.Anonymous",
        "pages that were never written, or were shared after fork, may be counted differently",
    ),
    ("ns.time", "resurrected processes live in a time namespace that continues the dead kernel's clocks"),
    ("ns.time_for_children", "as ns.time"),
    ("ns.mnt", "a service's own mount namespace is gone"),
    ("thread.syscall", "an interrupted call is restarted, some as restart_syscall"),
    ("cgroup", "control groups are not rebuilt"),
];

/// Programs that do nothing on their own before and after: every field of them is compared. Name and shell script.
const STILL: &[(&str, &str)] = &[
    ("sleep", "exec sleep 5000"),
    ("cat-on-fifo", "mkfifo -m 600 /home/demo/fifo; exec 3<>/home/demo/fifo; exec cat <&3 >/dev/null"),
    (
        "threads",
        "exec python3 -c 'import threading, time
for n in range(3): threading.Thread(target=time.sleep, args=(5000,)).start()'",
    ),
    (
        "files",
        "cd /home/demo; umask 027; echo one > shared; exec 4>>shared 5<shared 6<>other; read -r line <&5; exec sleep 5001",
    ),
    ("wait", "ulimit -n 77; sleep 5002 & wait"),
    ("signals", "trap '' USR1; trap 'echo term' TERM; sleep 5003; :"),
    ("nice", "exec nice -n 7 sleep 5004"),
];

/// Compares what the running kernel said in /proc with what is read from its memory after the panic, and with what the
/// resurrected processes show.
#[derive(Debug, Args)]
pub struct GroundTruth {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many differences are printed.
    #[arg(long, default_value_t = 40)]
    show: usize,
}

impl GroundTruth {
    /// One kernel, as part of the tests.
    pub fn new(kernel: Series) -> Self {
        Self { kernel: Some(kernel), show: 40 }
    }

    /// Runs it; whether all fields agree.
    pub fn run(self, global: &Global) -> Result<bool> {
        let tally = self.count(global)?;
        ui::finish();
        println!("{} passed, {} failed", tally.passed, tally.failed);
        Ok(tally.failed == 0 && tally.passed > 0)
    }

    /// Runs it; each of the two comparisons counts as one test.
    pub fn count(self, global: &Global) -> Result<Tally> {
        let lab = global.lab()?;
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            let config = MachineConfig::new(series, global.accel());
            let failed =
                self.on(&lab, &config).with_context(|| format!("ground truth on kernel {series}"))?;
            tally.passed += 2 - failed;
            tally.failed += failed;
        }
        Ok(tally)
    }

    /// How many of the two comparisons failed.
    fn on(&self, lab: &Lab, config: &MachineConfig) -> Result<usize> {
        let armed = guest::armed(lab, &workload::with_input(lab, config)?, &Installation::for_demo())?;
        let mut guest = lab.start(&armed, &format!("ground-truth-{}", config.series))?;
        let busy = workload::start(&mut guest.agent)?;
        let mut still = Vec::new();
        for (_, script) in STILL {
            still.push(guest.agent.spawn(&Program::shell(script).uid(DEMO_UID))?);
        }
        // Time to get where they stay; five seconds of work for the others.
        guest.agent.wait(&busy, Duration::from_secs(5))?;
        ui::note("recording /proc before the panic");
        let before_dir = guest.dir.join("proc-before");
        guest.agent.record()?.write_to(&before_dir)?;
        let panic = Panic { alive: still.clone(), ..Panic::default() };
        let Some(line) = crash::crash(&mut guest, &panic, &mut Quiet)? else {
            bail!("some program had ended before the panic")
        };
        ui::note("waiting for the processes under the second kernel");
        crash::wait_agent(&mut guest, &line, &mut Vec::new(), &mut Quiet)?;
        let after_dir = guest.dir.join("proc-after");
        guest.agent.record()?.write_to(&after_dir)?;
        crash::fetch_report(&mut guest)?;
        ui::note("reading the dead kernel's memory");
        let core = guest.dir.join("vmcore");
        let mut file = File::create(&core)?;
        guest.agent.read_pieces("/proc/vmcore", |piece| file.write_all(piece))?;
        drop(file);

        let before = Record::read(&before_dir)?;
        let kernel = ktypes::Kernel::open(vmcore::Vmcore::open(&core)?)?;
        let (_, found) = Autopsy::new(&kernel).snapshot_with_record()?;
        let read = compare(&before, &found);
        self.tell(
            &format!("kernel {}: /proc before the panic, and what is read from memory", config.series),
            &read,
        );
        let shown = self.resurrected(&guest, before, &Record::read(&after_dir)?, &still)?;
        self.tell(
            &format!("kernel {}: /proc before the panic, and of the resurrected processes", config.series),
            &shown,
        );
        let failed = [&read, &shown].into_iter().filter(|result| !agrees(result)).count();
        if failed > 0 {
            guest.keep_artifacts()?;
            ui::line(format!("artifacts: {}", guest.dir.display()));
        } else {
            fs::remove_file(&core)?;
        }
        Ok(failed)
    }

    /// Compares two recordings for the processes that came back.
    fn resurrected(
        &self,
        guest: &Guest,
        mut before: Record,
        after: &Record,
        still: &[i32],
    ) -> Result<Comparison> {
        let lives = resurrected_pids(&guest.dir)?;
        if let Some(gone) = still.iter().find(|pid| !lives.contains(pid)) {
            bail!("process {gone} did not come back (see report.json in {})", guest.dir.display());
        }
        let families = families(&before, still);
        let mut after = after.clone();
        for record in [&mut before, &mut after] {
            record.processes.retain(|pid, _| lives.contains(pid));
            for (pid, fields) in &mut record.processes {
                fields.retain(|(name, _), _| !MAY_DIFFER.iter().any(|(free, _)| free == name));
                for ((name, _), value) in fields.iter_mut() {
                    if *name == "fd" && value.starts_with("pipe:[") {
                        "pipe".clone_into(value);
                    }
                }
                // Context switches tell the comparison who has run meanwhile; these have not, but are new threads.
                if families.contains(pid) {
                    fields.retain(|(name, _), _| *name != "thread.switches");
                }
            }
        }
        Ok(compare(&before, &after))
    }

    fn tell(&self, what: &str, result: &Comparison) {
        let fields: usize = result.compared.values().sum();
        ui::line(format!("{what}: {fields} fields, {} differences", result.differences.len()));
        for difference in result.differences.iter().take(self.show) {
            ui::line(format!("  {difference}"));
        }
        if result.differences.len() > self.show {
            ui::line(format!("  … and {} more", result.differences.len() - self.show));
        }
    }
}

fn agrees(result: &Comparison) -> bool {
    result.differences.is_empty() && !result.compared.is_empty()
}

/// The still programs and their children.
fn families(record: &Record, still: &[i32]) -> BTreeSet<i32> {
    let parents: BTreeMap<i32, i32> = record
        .processes
        .iter()
        .filter_map(|(pid, fields)| Some((*pid, fields.get(&("stat.ppid", 0))?.parse().ok()?)))
        .collect();
    let descends = |mut pid: i32| {
        for _ in 0..parents.len() {
            if still.contains(&pid) {
                return true;
            }
            let Some(parent) = parents.get(&pid) else { return false };
            pid = *parent;
        }
        false
    };
    record.processes.keys().copied().filter(|pid| descends(*pid)).collect()
}

/// Who lives, by the report.
fn resurrected_pids(dir: &Path) -> Result<BTreeSet<i32>> {
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(dir.join("report.json"))?)?;
    let processes = report["processes"].as_array().context("the report names no processes")?;
    let lives = processes
        .iter()
        .filter(|process| process["fate"].as_str().is_some_and(|fate| fate.starts_with("resurrected")));
    Ok(lives.filter_map(|process| Some(process["pid"].as_i64()? as i32)).collect())
}
