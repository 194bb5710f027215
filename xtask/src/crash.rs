//! One crash: the five programs, a panic at a moment drawn from a seed, and what became of them.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lab::{Error, Guest, Lab, Line, Panic, Snapshot};
use serde::{Deserialize, Serialize};

use crate::guest;
use crate::workload::{self, Reference, WORKLOADS};

const PANIC_DEADLINE: Duration = Duration::from_secs(120);
const AGENT_DEADLINE: Duration = Duration::from_secs(240);
const FINISH_DEADLINE: Duration = Duration::from_secs(400);
/// The moment is drawn from this part of the time in which all five were alive in the uninterrupted run: the host's load
/// makes some runs faster than that one.
const WINDOW: std::ops::Range<f64> = 0.03..0.85;
/// A moment after some program's end is drawn again, this often at most, each time from half as much of that time: the machine is
/// faster than it was in the uninterrupted run.
const DRAWS: i32 = 5;

/// What became of one program.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fate {
    /// Its name.
    pub name: String,
    /// Why it does not count as survived; none if its output is right.
    pub failure: Option<String>,
}

/// A moment of the resurrection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Moment {
    /// What was reached.
    pub name: String,
    /// Milliseconds on the host's clock since the panic's line on the console.
    pub since_panic_ms: u64,
}

/// The outcome of one crash.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// What all of it was drawn from.
    pub seed: u64,
    /// When the panic was asked for, in milliseconds after the programs' start.
    pub moment_ms: u64,
    /// On which CPU.
    pub cpu: usize,
    /// The programs.
    pub fates: Vec<Fate>,
    /// The crash kernel's progress.
    pub timeline: Vec<Moment>,
    /// What went wrong as a whole.
    pub trouble: Option<String>,
}

impl Outcome {
    /// How many programs survived.
    pub fn passed(&self) -> usize {
        self.fates.iter().filter(|fate| fate.failure.is_none()).count()
    }
}

/// What the caller wants to see while it happens.
pub trait Watch {
    /// The guest runs, for this long; the programs' outputs have these sizes in bytes.
    fn running(&mut self, _ms: u64) {}
    /// The panic's first line was on the console.
    fn panicked(&mut self) {}
    /// A moment of the timeline.
    fn moment(&mut self, _moment: &Moment) {}
    /// A line that the crash kernel's PID 1 printed.
    fn console(&mut self, _since_panic_ms: u64, _text: &str) {}
    /// The programs go on under the crash kernel.
    fn finishing(&mut self, _left: usize) {}
}

/// Watches nothing.
pub struct Quiet;

impl Watch for Quiet {}

/// Crashes once. `snapshot` is a layer in which the programs are prepared (`reference` says what they write) and Otherworld is armed.
pub fn once(
    lab: &Lab,
    snapshot: &Snapshot,
    prepared: &Snapshot,
    name: &str,
    seed: u64,
    watch: &mut dyn Watch,
) -> Result<Outcome> {
    let reference_dir = prepared.dir.join("reference");
    let reference: Reference =
        serde_json::from_str(&fs::read_to_string(reference_dir.join("reference.json"))?)?;
    let mut draw = fastrand::Rng::with_seed(seed);
    for n in 0..DRAWS {
        let share = WINDOW.start + draw.f64() * (WINDOW.end - WINDOW.start) * 0.5_f64.powi(n);
        let moment_us = (reference.all_alive_ms() as f64 * 1000.0 * share) as u64;
        let cpu = draw.usize(..snapshot.config.cpus as usize);
        let mut guest = lab.start(snapshot, name)?;
        guest::seed(&mut guest, draw.u64(..))?;
        let pids = workload::start(&mut guest.agent)?;
        let panic = Panic { after_us: moment_us, cpu: Some(cpu), alive: pids.clone() };
        let Some(panic_line) = crash(&mut guest, &panic, watch)? else { continue };
        let mut outcome = Outcome {
            seed,
            moment_ms: moment_us / 1000,
            cpu,
            fates: Vec::new(),
            timeline: Vec::new(),
            trouble: None,
        };
        if let Err(error) = follow(&mut guest, &pids, &panic_line, &mut outcome, watch) {
            outcome.trouble = Some(format!("{error:#}"));
        }
        outcome.fates = judge(&mut guest, &reference_dir, &pids, outcome.trouble.as_deref())?;
        explain(&guest, &pids, &mut outcome.fates);
        fs::write(guest.dir.join("outcome.json"), serde_json::to_string_pretty(&outcome)?)?;
        if outcome.passed() < WORKLOADS.len() {
            guest.keep_artifacts()?;
        }
        return Ok(outcome);
    }
    bail!(
        "in {DRAWS} draws of seed {seed}, some program had ended before the panic: the programs are too short for this machine"
    )
}

/// Panics; the console's line of it, or none if a program had ended before.
pub fn crash(guest: &mut Guest, panic: &Panic, watch: &mut dyn Watch) -> Result<Option<Line>> {
    let from = guest.machine.console.len();
    guest.agent.panic(panic)?;
    let start = Instant::now();
    let is_panic = |line: &Line| line.text.contains("Kernel panic - not syncing").then(|| line.clone());
    loop {
        watch.running(start.elapsed().as_millis() as u64);
        match guest.machine.console.wait_for(from, "the panic", Duration::from_millis(100), is_panic) {
            Ok(line) => {
                watch.panicked();
                return Ok(Some(line));
            }
            Err(Error::Timeout { .. }) if start.elapsed() < PANIC_DEADLINE => {
                let due = start.elapsed() > Duration::from_micros(panic.after_us);
                if due && guest.agent.not_crashed(Duration::from_millis(1))?.is_some() {
                    return Ok(None);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// From the panic to the end of the programs.
fn follow(
    guest: &mut Guest,
    pids: &[i32],
    panic: &Line,
    outcome: &mut Outcome,
    watch: &mut dyn Watch,
) -> Result<()> {
    let mut next = wait_agent(guest, panic, &mut outcome.timeline, watch)?;
    fetch_report(guest)?;
    let deadline = Instant::now() + FINISH_DEADLINE;
    let mut left = pids.to_vec();
    while !left.is_empty() {
        watch.finishing(left.len());
        left = guest.agent.wait(&left, Duration::from_millis(250))?;
        drain(guest, &mut next, panic.ms, &mut outcome.timeline, watch);
        if Instant::now() > deadline {
            bail!("processes {left:?} did not end within {} s", FINISH_DEADLINE.as_secs());
        }
    }
    Ok(())
}

/// From the panic to the first words of the crash kernel's agent, which is started when all else is done; the number of the
/// console's next line.
pub fn wait_agent(
    guest: &mut Guest,
    panic: &Line,
    timeline: &mut Vec<Moment>,
    watch: &mut dyn Watch,
) -> Result<usize> {
    let console = guest.machine.console.clone();
    let mut next = console.lines(0).iter().position(|line| line == panic).unwrap_or(0);
    let deadline = Instant::now() + AGENT_DEADLINE;
    loop {
        drain(guest, &mut next, panic.ms, timeline, watch);
        if let Some(failed) = timeline.iter().find(|moment| moment.name == "failed") {
            bail!("the resurrection failed {} ms after the panic (see console.log)", failed.since_panic_ms);
        }
        match guest.agent.wait_hello(true, Duration::from_millis(100)) {
            Ok(_) => {
                drain(guest, &mut next, panic.ms, timeline, watch);
                return Ok(next);
            }
            Err(Error::Timeout { .. }) if Instant::now() < deadline => {}
            Err(error) => {
                drain(guest, &mut next, panic.ms, timeline, watch);
                return Err(error.into());
            }
        }
    }
}

/// Takes what the console has said since.
fn drain(guest: &Guest, next: &mut usize, panic_ms: u64, timeline: &mut Vec<Moment>, watch: &mut dyn Watch) {
    for line in guest.machine.console.lines(*next) {
        *next += 1;
        let since_panic_ms = line.ms.saturating_sub(panic_ms);
        let Some(text) = line.text.split_once("otherworld: ").map(|(_, text)| text) else { continue };
        match text.strip_prefix("mark ").and_then(|mark| mark.split_whitespace().next()) {
            Some(name) => {
                let moment = Moment { name: name.to_owned(), since_panic_ms };
                watch.moment(&moment);
                timeline.push(moment);
            }
            None => watch.console(since_panic_ms, text),
        }
    }
}

/// Copies the newest report out of the guest.
pub fn fetch_report(guest: &mut Guest) -> Result<()> {
    let report =
        guest.agent.read_file("/var/lib/otherworld/reports/latest.json").context("there is no report")?;
    fs::write(guest.dir.join("report.json"), report)?;
    Ok(())
}

/// Holds each output against the uninterrupted run's, byte by byte.
fn judge(
    guest: &mut Guest,
    reference: &std::path::Path,
    pids: &[i32],
    trouble: Option<&str>,
) -> Result<Vec<Fate>> {
    let outputs = guest.dir.join("outputs");
    fs::create_dir_all(&outputs)?;
    let mut reachable =
        trouble.is_none() || guest.agent.ping(Duration::from_secs(5)).is_ok_and(|hello| hello.crash_kernel);
    let mut fates = Vec::new();
    for (n, workload) in WORKLOADS.iter().enumerate() {
        let failure = if reachable {
            let expected =
                fs::read(reference.join(workload.output)).context("the reference is incomplete")?;
            let found = workload::output(&mut guest.agent, workload);
            if let Some(found) = &found {
                fs::write(outputs.join(workload.output), found)?;
            }
            let complaints = workload::complaints(&mut guest.agent, n);
            reachable = guest.agent.ping(Duration::from_secs(30)).is_ok();
            let alive = reachable
                && guest.agent.wait(&[pids[n]], Duration::ZERO).is_ok_and(|alive| !alive.is_empty());
            difference(&expected, found.as_deref(), alive, &complaints)
        } else {
            Some(trouble.unwrap_or("the guest does not answer").to_owned())
        };
        fates.push(Fate { name: workload.name.to_owned(), failure });
    }
    Ok(fates)
}

/// Adds to each failure what the report says of the program's process, and of all that have not come back: a program may be several.
fn explain(guest: &Guest, pids: &[i32], fates: &mut [Fate]) {
    let Ok(text) = fs::read_to_string(guest.dir.join("report.json")) else { return };
    let Ok(report) = serde_json::from_str::<serde_json::Value>(&text) else { return };
    let lost: String = lost_processes(&report).iter().map(|lost| format!("; {lost}")).collect();
    for (fate, &pid) in fates.iter_mut().zip(pids) {
        if let (Some(failure), Some(word)) = (&mut fate.failure, reported_fate(&report, pid)) {
            *failure = format!("{failure}; the report says: {word}{lost}");
        }
    }
}

/// Those that were to come back and have not.
fn lost_processes(report: &serde_json::Value) -> Vec<String> {
    let processes = report["processes"].as_array().into_iter().flatten();
    let lost = processes.filter(|process| process["fate"] == "given-up" || process["fate"] == "failed");
    let tell = |process: &serde_json::Value| {
        let pid = i32::try_from(process["pid"].as_i64()?).ok()?;
        let comm = process["comm"].as_str().unwrap_or_default();
        Some(format!("PID {pid} ({comm}) {}", reported_fate(report, pid)?))
    };
    lost.filter_map(tell).collect()
}

/// What a report says of a process: its fate and the reasons, as one text.
pub fn reported_fate(report: &serde_json::Value, pid: i32) -> Option<String> {
    let process = report["processes"].as_array()?.iter().find(|process| process["pid"] == pid)?;
    let reasons = process["reasons"].as_array().into_iter().flatten();
    let reasons: Vec<&str> = reasons.filter_map(|reason| reason["text"].as_str()).collect();
    let word = process["fate"].as_str()?;
    Some(if reasons.is_empty() { word.to_owned() } else { format!("{word}: {}", reasons.join("; ")) })
}

fn difference(expected: &[u8], found: Option<&[u8]>, alive: bool, complaints: &str) -> Option<String> {
    let state = if alive { " (the process is still there)" } else { "" };
    let words =
        if complaints.is_empty() { String::new() } else { format!("; it said: {}", complaints.trim()) };
    let Some(found) = found else { return Some(format!("no output{state}{words}")) };
    if found == expected && complaints.is_empty() {
        return None;
    }
    let same = expected.iter().zip(found).take_while(|(a, b)| a == b).count();
    if found == expected {
        return Some(format!("the output is right, but it complained{words}"));
    }
    Some(format!(
        "output of {} bytes instead of {}, different from byte {same} on{state}{words}",
        found.len(),
        expected.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_every_process_that_was_lost() {
        let report = serde_json::json!({ "processes": [
            { "pid": 1, "comm": "sh", "fate": "resurrected", "reasons": [] },
            { "pid": 2, "comm": "awk", "fate": "given-up", "reasons": [{ "code": "fpu", "text": "no registers" }] },
            { "pid": 3, "comm": "cron", "fate": "not-selected", "reasons": [] },
        ] });
        assert_eq!(lost_processes(&report), ["PID 2 (awk) given-up: no registers"]);
    }

    #[test]
    fn only_the_same_bytes_without_complaint_pass() {
        assert_eq!(difference(b"abc", Some(b"abc"), false, ""), None);
        assert!(difference(b"abc", Some(b"abd"), false, "").unwrap().contains("from byte 2 on"));
        assert!(difference(b"abc", Some(b"ab"), true, "").unwrap().contains("still there"));
        assert!(difference(b"abc", None, false, "Killed").unwrap().contains("Killed"));
        assert!(difference(b"abc", Some(b"abc"), false, "I/O error").is_some());
    }
}
