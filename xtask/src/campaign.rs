//! `cargo xtask campaign`: kernels killed in a thousand ways.
//!
//! Each crash starts from a saved guest in which programs run that check themselves, and Otherworld is armed. Everything about it (what is running,
//! which fault, where and when) is drawn from its own seed. What became of each program is one of a few outcomes that exclude each other; the worst is
//! a program that the report calls whole and that is not.

mod load;
mod table;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use faults::{Injected, Kind};
use lab::{Error, Guest, Lab, Line, Series};
use serde::{Deserialize, Serialize};

use crate::crash::{self, Quiet};
use crate::crash_runs::Tally;
use crate::survive::{Claim, claims};
use crate::{Global, build, guest, ui};

/// The guest goes on for a while before the fault.
const MOMENTS: std::ops::Range<u64> = 0..1500;
/// From the panic to the first words of the crash kernel's PID 1, which come within seconds.
const BOOT_DEADLINE: Duration = Duration::from_secs(90);
/// A guest that answers is alive.
const PING: Duration = Duration::from_secs(15);
/// A kernel that answers no more and has not panicked has watchdogs.
const WATCHDOGS: Duration = Duration::from_secs(30);
/// From the NMI that a processor's performance counter would send (the hard lockup detector; emulated processors have none) to the panic.
const NMI: Duration = Duration::from_secs(15);
/// How long the hard lockup detector would take: twice the `watchdog_thresh` of the guests at most.
const HARD_LOCKUP: Duration = Duration::from_secs(8);
/// Faults that are drawn for each that counts, at most.
const MAX_DRAWS: u32 = 8;

/// Kills a guest's kernel N times, each time by another fault, with the survivors and real programs running in it. Ends with a table by kind of
/// fault and by outcome, and the line "N passed, N failed" (crashes). Goes on where it stopped if it is run again with the same seed.
#[derive(Debug, Args)]
pub struct Campaign {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many crashes on each; faults that are never reached do not count.
    #[arg(long, default_value_t = 20)]
    crashes: u32,
    /// Draws the crashes' own seeds; a random one, which is printed, if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// Runs just one crash with this seed of its own, as its line says.
    #[arg(long, conflicts_with_all = ["seed", "crashes"])]
    only: Option<u64>,
    /// Only faults of this kind: check, panic, text, data, hang, fatal.
    #[arg(long, value_parser = parse_kind)]
    kind: Option<Kind>,
    /// Keeps the dead kernel's core of each crash that a program did not survive, in the run's directory (`vmcore`); those of silent damage are always kept.
    #[arg(long)]
    cores: bool,
    /// Prints the table of what has been run with the seed, and runs nothing.
    #[arg(long, requires = "seed")]
    table: bool,
}

fn parse_kind(text: &str) -> Result<Kind, String> {
    serde_json::from_value(serde_json::Value::String(text.into())).map_err(|error| error.to_string())
}

/// What became of one program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Fate {
    /// It goes on, and nothing is missing.
    Whole,
    /// It goes on, and the report names what it has lost.
    WithLoss,
    /// It does not go on, and the report says why.
    GivenUp,
    /// The fault had ended it before the kernel died: it is not among the dead kernel's processes.
    EndedBefore,
    /// There was no second kernel.
    NoCrashKernel,
    /// The second kernel came, and the resurrection failed.
    ResurrectorFailed,
    /// The report calls it whole, and it is not.
    SilentDamage,
}

impl Fate {
    const ALL: [Fate; 7] = [
        Fate::Whole,
        Fate::WithLoss,
        Fate::GivenUp,
        Fate::EndedBefore,
        Fate::NoCrashKernel,
        Fate::ResurrectorFailed,
        Fate::SilentDamage,
    ];

    fn heading(self) -> &'static str {
        match self {
            Fate::Whole => "whole",
            Fate::WithLoss => "with reported loss",
            Fate::GivenUp => "given up, with reason",
            Fate::EndedBefore => "ended by the fault before",
            Fate::NoCrashKernel => "no crash kernel",
            Fate::ResurrectorFailed => "resurrector failed",
            Fate::SilentDamage => "silent damage",
        }
    }

    /// By what the program's own check says, by what the report claims of its processes, and of those that these have made.
    fn judge(passed: bool, claims: &[Claim], descendants: &[Claim]) -> Self {
        let known = |claim: &Claim| !claim.fate.is_empty();
        let mut all = claims.iter().chain(descendants);
        match passed {
            _ if !claims.iter().all(known) => Fate::EndedBefore,
            _ if !claims.iter().all(Claim::lives) => Fate::GivenUp,
            true if all.all(Claim::whole) => Fate::Whole,
            false if all.all(explains_nothing) => Fate::SilentDamage,
            _ => Fate::WithLoss,
        }
    }
}

/// Whether what a report says a process has lost is nothing that a program's check can have failed for.
fn explains_nothing(claim: &Claim) -> bool {
    // The crash kernel has one CPU, and its network is not set up.
    const HARMLESS: [&str; 5] = ["affinity", "network", "cgroup", "crash-procedure", "memory-sharing"];
    claim.lives() && claim.reasons.iter().all(|(code, _)| HARMLESS.contains(&code.as_str()))
}

/// One program after one crash.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Outcome {
    program: String,
    fate: Fate,
    /// Its own check was content.
    passed: bool,
    /// What its check and the report say, if there is anything to say.
    words: String,
}

impl Outcome {
    fn survived(&self) -> bool {
        self.passed && matches!(self.fate, Fate::Whole | Fate::WithLoss)
    }
}

/// One crash.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Crash {
    seed: u64,
    /// What was tested, by the name of its commit.
    #[serde(default)]
    commit: String,
    load: String,
    kind: Kind,
    /// What was done to the kernel, or was to be done.
    what: String,
    /// It was done, and killed the kernel in time.
    killed: bool,
    /// What the kernel said when it died.
    panic: String,
    /// The console's time from the fault to the panic, and from there to the agent's first words, in milliseconds.
    panic_ms: u64,
    resurrected_ms: u64,
    programs: Vec<Outcome>,
}

impl Crash {
    fn survived(&self) -> bool {
        !self.programs.is_empty() && self.programs.iter().all(Outcome::survived)
    }

    /// Whether it went as it must go each time. What a kernel with damaged code or data has told programs before it died, and whether it could still start
    /// another one, is not in our hands.
    fn is_as_it_must_be(&self) -> bool {
        let damaged = matches!(self.kind, Kind::Text | Kind::Data);
        let must_not = |outcome: &Outcome| match outcome.fate {
            Fate::SilentDamage | Fate::NoCrashKernel => !damaged,
            Fate::ResurrectorFailed => true,
            Fate::Whole | Fate::WithLoss | Fate::GivenUp | Fate::EndedBefore => false,
        };
        !self.programs.iter().any(must_not)
    }
}

/// What has been run with a seed; kept on disk after each crash.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Log {
    crashes: BTreeMap<u32, Crash>,
}

impl Log {
    fn path(series: Series, seed: u64, kind: Option<Kind>) -> PathBuf {
        let kind = kind.map(|kind| format!("-{kind:?}").to_lowercase()).unwrap_or_default();
        build::target_dir().join("lab/campaigns").join(format!("{series}-{seed}{kind}.json"))
    }

    fn load(path: &PathBuf) -> Result<Self> {
        match fs::read_to_string(path) {
            Ok(text) => serde_json::from_str(&text).with_context(|| path.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    fn save(&self, path: &PathBuf) -> Result<()> {
        let part = path.with_extension("part");
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(&part, serde_json::to_string_pretty(self)?)?;
        Ok(fs::rename(part, path)?)
    }

    fn counted(&self) -> impl Iterator<Item = &Crash> {
        self.crashes.values().filter(|crash| crash.killed)
    }

    /// Prints the table, and counts the crashes that are good.
    fn report(&self, series: Series, seed: u64, is_good: fn(&Crash) -> bool) -> Tally {
        ui::line(table::markdown(&format!("Kernel {series}, seed {seed}"), self.counted()));
        let passed = self.counted().filter(|crash| is_good(crash)).count();
        Tally { passed, failed: self.counted().count() - passed }
    }
}

impl Campaign {
    /// So many crashes of a kernel, as part of the tests.
    pub fn new(kernel: Series, crashes: u32, seed: Option<u64>) -> Self {
        Self { kernel: Some(kernel), crashes, seed, only: None, kind: None, cores: false, table: false }
    }

    /// Runs it from the beginning, and counts crashes: failed are those in which something happened that must not, whatever the fault.
    pub fn test(&self, global: &Global) -> Result<Tally> {
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            _ = fs::remove_file(Log::path(series, seed, self.kind));
            let log = self.campaign(&global.lab()?, global, series, seed)?;
            tally.add(log.report(series, seed, Crash::is_as_it_must_be));
        }
        Ok(tally)
    }

    /// Runs it; whether all programs survived all crashes.
    pub fn run(self, global: &Global) -> Result<bool> {
        let tally = self.count(global)?;
        Ok(tally.close() || self.table)
    }

    /// Runs it and counts crashes: passed are those that all programs survived.
    pub fn count(&self, global: &Global) -> Result<Tally> {
        let lab = global.lab()?;
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            let log = match self.only {
                Some(seed) => {
                    let mut loads = load::Loads::new(&lab, series, global.accel());
                    let crash = self.once(&lab, &mut loads, &format!("campaign-{series}-only"), seed)?;
                    tell(series, &crash);
                    Log { crashes: BTreeMap::from([(0, crash)]) }
                }
                None => self.campaign(&lab, global, series, seed)?,
            };
            tally.add(log.report(series, seed, Crash::survived));
        }
        Ok(tally)
    }

    fn campaign(&self, lab: &Lab, global: &Global, series: Series, seed: u64) -> Result<Log> {
        let path = Log::path(series, seed, self.kind);
        let mut log = Log::load(&path)?;
        if self.table {
            return Ok(log);
        }
        let release = lab.kernel(series)?.release;
        // Of what is built now, not of what is there when the first crash is over.
        _ = commit();
        let before = log.counted().count();
        ui::line(format!(
            "{} crashes of kernel {release}, seed {seed}{}",
            self.crashes,
            if before > 0 { format!(", {before} done before") } else { String::new() }
        ));
        let mut loads = load::Loads::new(lab, series, global.accel());
        for n in 0..self.crashes.saturating_mul(MAX_DRAWS) {
            if log.counted().count() >= self.crashes as usize {
                break;
            }
            if log.crashes.contains_key(&n) {
                continue;
            }
            let own = fastrand::Rng::with_seed(seed ^ (u64::from(n) << 32)).u64(..1 << 40);
            ui::note(&format!("kernel {series}: crash {} of {}", log.counted().count() + 1, self.crashes));
            let name = format!("campaign-{series}-{n:04}");
            let crash = self.once(lab, &mut loads, &name, own)?;
            tell(series, &crash);
            log.crashes.insert(n, crash);
            log.save(&path)?;
        }
        Ok(log)
    }

    /// One guest, one fault.
    fn once(&self, lab: &Lab, loads: &mut load::Loads, name: &str, seed: u64) -> Result<Crash> {
        let mut draw = fastrand::Rng::with_seed(seed);
        let load = loads.draw(&mut draw)?;
        let kind = draw.choice(Kind::ALL).unwrap_or(Kind::Check);
        let kind = self.kind.unwrap_or(kind);
        let mut guest = lab.start(&load.snapshot, name)?;
        guest::seed(&mut guest, draw.u64(..))?;
        std::thread::sleep(Duration::from_millis(draw.u64(MOMENTS)));
        let from = guest.machine.console.len();
        let mut crash = Crash {
            seed,
            commit: commit().to_owned(),
            load: load.name().into(),
            kind,
            what: String::new(),
            killed: false,
            panic: String::new(),
            panic_ms: 0,
            resurrected_ms: 0,
            programs: Vec::new(),
        };
        let injected = faults::inject(&mut guest, &load.symbols, kind, &mut draw);
        let is_deaf = matches!(injected, Ok(Injected::Deaf(_)));
        crash.what = match injected.with_context(|| format!("injecting a fault ({kind}, seed {seed})"))? {
            Injected::Done(what) | Injected::Deaf(what) => what,
            Injected::Not(what) => {
                crash.what = what;
                return Ok(crash);
            }
        };
        let injected = guest.machine.now_ms();
        let died = match is_deaf {
            true => died_of_nmi(&mut guest, from, HARD_LOCKUP)?,
            false => died(&mut guest, from, kind)?,
        };
        let trouble = match died {
            Death::Lives => return Ok(crash),
            Death::Unseen(why) => Some((Fate::NoCrashKernel, why)),
            Death::Panic(line) => {
                crash.panic_ms = line.ms.saturating_sub(injected);
                crash.panic = reason(&guest, from);
                // The device may be gone with the machine.
                _ = faults::clear(&mut guest, kind);
                resurrected(&mut guest, &line).err()
            }
        };
        crash.killed = true;
        crash.programs = match trouble {
            Some((fate, words)) => load.all(fate, &words),
            None => {
                let panicked = injected + crash.panic_ms;
                crash.resurrected_ms = guest.machine.now_ms().saturating_sub(panicked);
                let report = fs::read_to_string(guest.dir.join("report.json"))?;
                let claims = claims(&serde_json::from_str(&report).context("the report is not JSON")?);
                load.judge(&mut guest, &claims)
            }
        };
        fs::write(guest.dir.join("crash.json"), serde_json::to_string_pretty(&crash)?)?;
        let is_case = |outcome: &Outcome| {
            matches!(outcome.fate, Fate::SilentDamage | Fate::ResurrectorFailed | Fate::NoCrashKernel)
        };
        if crash.programs.iter().any(is_case) {
            guest.keep_artifacts()?;
        }
        let is_wanted =
            |outcome: &Outcome| outcome.fate == Fate::SilentDamage || self.cores && !outcome.survived();
        if crash.programs.iter().any(is_wanted) {
            // What was not noticed is still in there.
            let mut core = fs::File::create(guest.dir.join("vmcore"))?;
            guest.agent.read_pieces("/proc/vmcore", |piece| core.write_all(piece))?;
        }
        Ok(crash)
    }
}

/// The commit that is checked out when it is first asked for, with a `+` if something has been changed since.
fn commit() -> &'static str {
    static COMMIT: OnceLock<String> = OnceLock::new();
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").args(arguments).output().ok().filter(|output| output.status.success());
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    COMMIT.get_or_init(|| {
        let name = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
        let changed =
            git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
        name + if changed { "+" } else { "" }
    })
}

/// How a kernel ended.
enum Death {
    /// It has not.
    Lives,
    /// With a panic.
    Panic(Line),
    /// Without a word, or by hanging for good.
    Unseen(String),
}

/// Waits for a kernel's end; `None` if the time is over.
fn end(guest: &Guest, from: usize, time: Duration) -> Result<Option<Death>> {
    // An oops goes to the crash kernel directly (oops_end(), arch/x86/kernel/dumpstack.c), and may have no time for words.
    const ENDS: [&str; 3] = ["Kernel panic - not syncing", "[#1]", "otherworld: "];
    let is_end = |line: &Line| ENDS.iter().any(|end| line.text.contains(end)).then(|| line.clone());
    match guest.machine.console.wait_for(from, "the panic", time, is_end) {
        Ok(line) => Ok(Some(Death::Panic(line))),
        Err(Error::Qemu(_)) => Ok(Some(Death::Unseen("the machine was reset without a panic".into()))),
        Err(Error::Timeout { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What became of a kernel after a fault of this kind.
fn died(guest: &mut Guest, from: usize, kind: Kind) -> Result<Death> {
    if let Some(death) = end(guest, from, kind.patience())? {
        return Ok(death);
    }
    if guest.agent.ping(PING).is_ok() {
        return Ok(Death::Lives);
    }
    // The agent may be dead, and the kernel not.
    died_of_nmi(guest, from, WATCHDOGS)
}

/// What became of a kernel that is sent an NMI if it has not died within some time.
fn died_of_nmi(guest: &mut Guest, from: usize, time: Duration) -> Result<Death> {
    if let Some(death) = end(guest, from, time)? {
        return Ok(death);
    }
    guest.machine.inject_nmi()?;
    let unseen = || Death::Unseen("the kernel answers no more, not even to an NMI".into());
    Ok(end(guest, from, NMI)?.unwrap_or_else(unseen))
}

/// The first line that tells why the kernel died.
fn reason(guest: &Guest, from: usize) -> String {
    const STARTS: [&str; 8] = [
        "BUG:",
        "kernel BUG at",
        "WARNING:",
        "Oops:",
        "[#1]",
        "watchdog:",
        "NMI: ",
        "Kernel panic - not syncing",
    ];
    let lines = guest.machine.console.lines(from);
    let told = lines.iter().find_map(|line| {
        let at = STARTS.iter().filter_map(|start| line.text.find(start)).min()?;
        Some(line.text[at..].to_owned())
    });
    told.unwrap_or_default()
}

/// Waits for the second kernel and what it makes of the first one's processes; the report is in the run's directory.
fn resurrected(guest: &mut Guest, panic: &Line) -> Result<(), (Fate, String)> {
    let console = guest.machine.console.clone();
    let after = console.lines(0).iter().position(|line| line == panic).unwrap_or(0);
    let ours = |line: &Line| line.text.contains("otherworld: ").then_some(());
    if let Err(error) = console.wait_for(after, "the crash kernel", BOOT_DEADLINE, ours) {
        return Err((Fate::NoCrashKernel, error.to_string()));
    }
    let failed = |error: anyhow::Error| (Fate::ResurrectorFailed, format!("{error:#}"));
    crash::wait_agent(guest, panic, &mut Vec::new(), &mut Quiet).map_err(failed)?;
    crash::fetch_report(guest).map_err(failed)
}

fn tell(series: Series, crash: &Crash) {
    if !crash.killed {
        let Crash { seed, kind, what, .. } = crash;
        return ui::line(format!("  {series} {seed:13} {kind:15} never reached, or it lives on: {what}"));
    }
    let survived = crash.programs.iter().filter(|outcome| outcome.survived()).count();
    let line = format!(
        "  {series} {:13} {:15} {:9} {survived} of {} survived, {:.1} + {:.1} s: {}; {}",
        crash.seed,
        crash.kind,
        crash.load,
        crash.programs.len(),
        crash.panic_ms as f64 / 1000.0,
        crash.resurrected_ms as f64 / 1000.0,
        crash.what,
        crash.panic,
    );
    let say = |line: String| if crash.is_as_it_must_be() { ui::line(line) } else { ui::failure(line) };
    say(line);
    let mut by_words: BTreeMap<(Fate, &str), Vec<&str>> = BTreeMap::new();
    for outcome in crash.programs.iter().filter(|outcome| !outcome.survived()) {
        by_words.entry((outcome.fate, &outcome.words)).or_default().push(&outcome.program);
    }
    for ((fate, words), programs) in by_words {
        let who =
            if programs.len() > 8 { format!("{} programs", programs.len()) } else { programs.join(", ") };
        say(format!("      {}: {who}: {words}", fate.heading()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_exclude_each_other() {
        let claim = |fate: &str, reason: &str| {
            let reasons = (!reason.is_empty()).then(|| ("file".to_owned(), reason.to_owned()));
            Claim { ppid: 1, fate: fate.into(), reasons: reasons.into_iter().collect() }
        };
        let whole = claim("resurrected", "");
        let loss = claim("resurrected-with-losses", "a file");
        let judge = |passed, claims: &[&Claim], descendants: &[&Claim]| {
            let [claims, descendants] =
                [claims, descendants].map(|all| all.iter().copied().cloned().collect::<Vec<_>>());
            Fate::judge(passed, &claims, &descendants)
        };
        let given_up = claim("given-up", "x");
        assert_eq!(judge(true, &[&whole, &whole], &[&whole]), Fate::Whole);
        assert_eq!(judge(false, &[&whole], &[]), Fate::SilentDamage);
        assert_eq!(judge(true, &[&whole, &loss], &[]), Fate::WithLoss);
        assert_eq!(judge(false, &[&loss], &[]), Fate::WithLoss);
        assert_eq!(judge(false, &[&loss, &given_up], &[]), Fate::GivenUp);
        assert_eq!(judge(false, &[&whole, &Claim::default()], &[]), Fate::EndedBefore);
        // A child or grandchild that does not come back is a loss of who made it, and explains what it says.
        assert_eq!(judge(false, &[&whole], &[&whole, &given_up]), Fate::WithLoss);
        assert_eq!(judge(true, &[&whole], &[&given_up]), Fate::WithLoss);
        assert_eq!(judge(false, &[&whole], &[&whole]), Fate::SilentDamage);
        let elsewhere = Claim {
            reasons: vec![("affinity".into(), "CPU 1".into())],
            ..claim("resurrected-with-losses", "")
        };
        assert_eq!(judge(false, &[&elsewhere], &[]), Fate::SilentDamage, "that is no explanation");
        let lost = Outcome { program: "x".into(), fate: Fate::WithLoss, passed: false, words: String::new() };
        assert!(!lost.survived(), "its check has failed");
    }
}
