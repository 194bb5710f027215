//! `otherworld inspect ps` on a large vmcore beside drgn and crash, which do the same: seconds and peak memory.
//!
//! All read the same file in the same run, one after the other and in turns; before that each has read it once, so that what it needs of the
//! core is in the page cache. drgn comes from PyPI, crash from Debian; both need the kernel's debugging information, which otherworld does not.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use lab::{Lab, Series, host};
use serde::Serialize;

use crate::vmcore_cmd::Vmcore;
use crate::{Global, build, ui};

/// RAM of the guest, of which half is the crash kernel's.
const MEMORY_MIB: u32 = 4096;
/// A core must not be smaller, bytes.
const LARGE: u64 = 2_000_000_000;
/// How often each is measured; the median counts.
const RUNS: usize = 3;
/// What drgn is to do.
const DRGN_SCRIPT: &str = include_str!("ps.py");

/// One that lists processes.
struct Tool {
    name: String,
    command: Vec<String>,
    /// Not every kernel's core can be read by every version of it.
    may_fail: bool,
}

/// What it took.
#[derive(Debug, Serialize)]
struct Measured {
    tool: String,
    /// Wall-clock time, median, seconds.
    seconds: f64,
    /// Processor time of user and kernel, median, seconds: what other programs on the machine do not change.
    cpu_seconds: f64,
    /// Largest resident set of all runs, mapped pages of files included, bytes.
    peak_bytes: u64,
    /// User processes that it listed.
    processes: usize,
    /// Of those that otherworld lists, the ones that are missing.
    missing: usize,
    /// It ended with an error.
    failed: bool,
    /// The first word that it said beside the list.
    said: Option<String>,
}

#[derive(Debug, Serialize)]
struct Table {
    kernel: String,
    core_bytes: u64,
    debug_image_bytes: u64,
    tools: Vec<Measured>,
}

/// Measures on each kernel and prints a table, or JSON.
pub fn run(global: &Global, kernel: Option<Series>, json: bool) -> Result<()> {
    let lab = global.lab()?;
    let otherworld = build::otherworld()?;
    let dir = build::target_dir().join("bench-inspect");
    fs::create_dir_all(&dir)?;
    let mut tables = Vec::new();
    for series in crate::series_or_all(kernel) {
        let core = large_core(global, series, &dir)?;
        ui::note("the kernel with its debugging information");
        let image = lab.debug_image(series)?;
        let tools = tools(&lab, &otherworld, &core, &image, &dir)?;
        let table = Table {
            kernel: series.to_string(),
            core_bytes: fs::metadata(&core)?.len(),
            debug_image_bytes: fs::metadata(&image)?.len(),
            tools: measure(&tools)?,
        };
        if !json {
            ui::line(table.to_string());
        }
        tables.push(table);
    }
    ui::finish();
    if json {
        println!("{}", serde_json::to_string_pretty(&tables)?);
    }
    Ok(())
}

/// The core of a crashed guest; the one of the last time if it is still there.
fn large_core(global: &Global, series: Series, dir: &Path) -> Result<PathBuf> {
    let core = dir.join(format!("vmcore-{series}"));
    let size = || fs::metadata(&core).map_or(0, |metadata| metadata.len());
    if size() < LARGE {
        Vmcore::new(series, MEMORY_MIB, dir.to_owned()).run(global)?;
    }
    if size() < LARGE {
        bail!("{} has {} bytes only", core.display(), size());
    }
    Ok(core)
}

fn tools(lab: &Lab, otherworld: &Path, core: &Path, image: &Path, dir: &Path) -> Result<Vec<Tool>> {
    let text = |path: &Path| path.display().to_string();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let mut tools = vec![Tool {
        name: "otherworld inspect ps".into(),
        command: words(&[&text(otherworld), "inspect", "--core", &text(core), "ps"]),
        may_fail: false,
    }];
    lab.note("drgn and crash");
    let python = dir.join("drgn/bin");
    if !python.join("drgn").exists() {
        host::run(Command::new("python3").args(["-m", "venv"]).arg(dir.join("drgn")))?;
        host::run(Command::new(python.join("pip")).args(["install", "--quiet", "drgn"]))?;
    }
    let script = dir.join("ps.py");
    fs::write(&script, DRGN_SCRIPT)?;
    let drgn = text(&python.join("drgn"));
    let version = host::run(Command::new(&drgn).arg("--version"))?;
    tools.push(Tool {
        name: version.split(" (").next().unwrap_or("drgn").to_owned(),
        command: words(&[&drgn, "-q", "-c", &text(core), "-s", &text(image), &text(&script)]),
        may_fail: true,
    });
    host::ensure_tools(&[("crash", "crash"), ("time", "time")])?;
    let commands = dir.join("crash-commands");
    fs::write(&commands, "ps -u\nquit\n")?;
    let version = host::run(Command::new("crash").arg("--version"))?;
    tools.push(Tool {
        name: version.lines().find(|line| line.starts_with("crash ")).unwrap_or("crash").to_owned(),
        command: words(&["crash", "-s", "-i", &text(&commands), &text(image), &text(core)]),
        may_fail: true,
    });
    Ok(tools)
}

fn measure(tools: &[Tool]) -> Result<Vec<Measured>> {
    let mut times = vec![Vec::new(); tools.len()];
    let mut cpu_times = vec![Vec::new(); tools.len()];
    let mut peaks = vec![0; tools.len()];
    let mut listed = vec![BTreeSet::new(); tools.len()];
    let mut said = vec![None; tools.len()];
    let mut failed = vec![false; tools.len()];
    // The first round is not counted.
    for round in 0..=RUNS {
        for (n, tool) in tools.iter().enumerate() {
            ui::note(&format!("{}, run {round} of {RUNS}", tool.name));
            let run = once(tool)?;
            if round > 0 {
                times[n].push(run.seconds);
                cpu_times[n].push(run.cpu_seconds);
                peaks[n] = peaks[n].max(run.peak_bytes);
                failed[n] |= run.failed;
                (listed[n], said[n]) = (run.pids, run.said);
            }
        }
    }
    let all = listed.first().cloned().unwrap_or_default();
    let measured = tools.iter().enumerate().map(|(n, tool)| Measured {
        tool: tool.name.clone(),
        seconds: median(&mut times[n]),
        cpu_seconds: median(&mut cpu_times[n]),
        peak_bytes: peaks[n],
        processes: listed[n].len(),
        missing: all.difference(&listed[n]).count(),
        failed: failed[n],
        said: said[n].take(),
    });
    Ok(measured.collect())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

struct Run {
    seconds: f64,
    cpu_seconds: f64,
    peak_bytes: u64,
    pids: BTreeSet<i32>,
    failed: bool,
    said: Option<String>,
}

/// Runs one under time(1), which has the peak from wait4(2).
fn once(tool: &Tool) -> Result<Run> {
    /// Before what time(1) says: KiB at the most, seconds in user mode and in the kernel.
    const MARK: &str = "measured:";
    let began = Instant::now();
    let output = Command::new("/usr/bin/time")
        .args(["-f", &format!("{MARK}%M %U %S")])
        .args(&tool.command)
        .stdin(Stdio::null())
        .env("LC_ALL", "C.UTF-8")
        .output()
        .with_context(|| tool.command.join(" "))?;
    let seconds = began.elapsed().as_secs_f64();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let failed = !output.status.success();
    if failed && !tool.may_fail {
        bail!("{} failed: {err}", tool.command.join(" "));
    }
    let measured = err.lines().find_map(|line| line.strip_prefix(MARK)).context("time(1) said nothing")?;
    let numbers: Vec<f64> = measured.split(' ').filter_map(|number| number.parse().ok()).collect();
    let [kib, user, system] = numbers[..] else { bail!("time(1) said {measured}") };
    let pid = |line: &str| line.trim_start_matches('>').split_whitespace().next()?.parse().ok();
    let is_message =
        |line: &&str| !line.trim().is_empty() && pid(line).is_none() && !line.trim_start().starts_with("PID");
    // time(1) has its own word on a failure.
    let is_its = |line: &&str| !line.starts_with(MARK) && !line.starts_with("Command exited");
    let messages = err.lines().filter(is_its).chain(out.lines());
    let mut said = messages.filter(is_message).map(str::to_owned);
    Ok(Run {
        seconds,
        cpu_seconds: user + system,
        peak_bytes: kib as u64 * 1024,
        pids: out.lines().filter_map(pid).filter(|pid| *pid > 0).collect(),
        failed,
        said: said.next(),
    })
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "kernel {}, a core of {:.2} GB; median of {RUNS} runs, the core in the page cache",
            self.kernel,
            self.core_bytes as f64 / 1e9
        )?;
        writeln!(f, "{:<24} {:>8} {:>8} {:>9} {:>10}", "", "seconds", "CPU s", "peak MiB", "processes")?;
        for tool in &self.tools {
            let mib = tool.peak_bytes as f64 / f64::from(1 << 20);
            writeln!(
                f,
                "{:<24} {:>8.2} {:>8.2} {mib:>9.1} {:>10}",
                tool.tool, tool.seconds, tool.cpu_seconds, tool.processes
            )?;
            if tool.failed {
                writeln!(f, "{:26}it failed: it cannot read this core", "")?;
            } else if tool.missing > 0 {
                writeln!(f, "{:26}{} of otherworld's processes are missing", "", tool.missing)?;
            }
            if let Some(said) = &tool.said {
                writeln!(f, "{:26}it says: {said}", "")?;
            }
        }
        write!(
            f,
            "drgn and crash have the kernel's debugging information beside ({:.0} MB)",
            self.debug_image_bytes as f64 / 1e6
        )
    }
}
