//! The report of a panic: `/var/lib/otherworld/reports/<UTC time>.json`, and its form for people.

mod page;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use snapshot::{
    Action, Bytes, Decision, Finding, Kernel, Panic, Pid, Process, ProcessState, Reason, Severity, Snapshot,
};

/// Everything about one panic and what came after it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// [`Report::FORMAT`] of the writer.
    pub format: u32,
    /// How far it went.
    pub state: State,
    /// When the crash kernel's init started, UTC, RFC 3339.
    pub started: String,
    /// How many panics ago the machine was cold-booted.
    pub generation: u32,
    /// The kernel that died; absent when it could not be read.
    pub dead_kernel: Option<Kernel>,
    /// Its panic and log; absent when they could not be read.
    pub panic: Option<Panic>,
    /// The kernel that took over.
    pub crash_kernel: CrashKernel,
    /// Milliseconds of the crash kernel's uptime.
    pub timeline: Vec<Mark>,
    /// What became of the dead kernel's mounts.
    pub mounts: Vec<MountFate>,
    /// What became of its processes.
    pub processes: Vec<Fate>,
    /// What was noticed on the way.
    pub findings: Vec<Finding>,
    /// How fast memory was poured.
    pub pour: Option<Pour>,
    /// The rebuilding half's own account.
    pub resurrection: serde_json::Value,
    /// Why the resurrection as a whole failed, and lesser troubles of init.
    pub failures: Vec<String>,
    /// The dead kernel's own pages, if they were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmcore: Option<PathBuf>,
}

/// How far a resurrection went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The report was written before the processes were rebuilt; if it still says so, the crash kernel died then.
    #[default]
    Resurrecting,
    /// Everything that was to come back lives.
    Complete,
    /// Some came back, others were given up or failed.
    Partial,
    /// Nothing came back.
    Failed,
}

/// A point of the timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// `init`, `vmcore-open`, …
    pub name: String,
    /// Uptime of the crash kernel, milliseconds.
    pub ms: u64,
}

/// The kernel that took over, and how it got by.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CrashKernel {
    #[allow(missing_docs)]
    pub release: String,
    /// MemTotal, KiB.
    pub mem_total_kib: u64,
    /// Least MemAvailable seen, KiB.
    pub mem_available_min_kib: u64,
}

/// What became of a mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountFate {
    #[allow(missing_docs)]
    pub mountpoint: Bytes,
    #[allow(missing_docs)]
    pub fs_type: Bytes,
    /// It is there again.
    pub mounted: bool,
    /// Why not, or what is different.
    pub note: Option<String>,
}

/// What became of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fate {
    #[allow(missing_docs)]
    pub pid: Pid,
    /// Its parent's PID; zero if it had none that could be seen, or in a report that does not say.
    #[serde(default)]
    pub ppid: Pid,
    #[allow(missing_docs)]
    pub comm: Bytes,
    /// In a word.
    pub fate: FateKind,
    /// Why, or what it lost.
    pub reasons: Vec<Reason>,
}

/// [`Fate`] in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FateKind {
    /// Goes on, nothing lost.
    Resurrected,
    /// Goes on, with losses that are named.
    ResurrectedWithLosses,
    /// Its crash procedure had its program begin anew.
    Restarted,
    /// Its crash procedure ended it.
    Ended,
    /// Cannot be brought back faithfully.
    GivenUp,
    /// Was to come back; rebuilding it failed.
    Failed,
    /// Was not asked for.
    NotSelected,
}

impl FateKind {
    fn word(self) -> &'static str {
        match self {
            Self::Resurrected => "lives",
            Self::ResurrectedWithLosses => "lives, with losses",
            Self::Restarted => "began anew",
            Self::Ended => "ended itself",
            Self::GivenUp => "given up",
            Self::Failed => "failed",
            Self::NotSelected => "not selected",
        }
    }
}

/// How much memory was poured, how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pour {
    #[allow(missing_docs)]
    pub bytes: u64,
    #[allow(missing_docs)]
    pub us: u64,
}

impl Pour {
    /// Bytes per second.
    pub fn rate(&self) -> u64 {
        (u128::from(self.bytes) * 1_000_000 / u128::from(self.us.max(1))) as u64
    }
}

/// What has been decided for each process, as fates: those that are to continue are `continued`.
pub fn fates(
    snapshot: &Snapshot,
    mut continued: impl FnMut(&Process) -> (FateKind, Vec<Reason>),
) -> Vec<Fate> {
    let fate = |process: &Process| {
        let (fate, reasons) = match &process.decision {
            Decision::Undecided => (FateKind::NotSelected, vec![]),
            Decision::NotSelected { why } => {
                (FateKind::NotSelected, vec![Reason::new("not-selected", why.clone())])
            }
            Decision::GiveUp { reasons } => (FateKind::GivenUp, reasons.clone()),
            Decision::Continue { .. } => continued(process),
        };
        Fate { pid: process.pid, ppid: process.ppid, comm: process.comm.clone(), fate, reasons }
    };
    snapshot.processes.iter().map(fate).collect()
}

/// Puts right the fates that the worker has left behind: of those that it had let go, only what they lost is not known.
pub fn went_on(processes: &mut [Fate], back: &[Pid]) {
    for fate in processes.iter_mut().filter(|p| p.fate == FateKind::Failed && back.contains(&p.pid)) {
        fate.fate = FateKind::ResurrectedWithLosses;
        fate.reasons =
            vec![Reason::new("losses-unknown", "the worker ended before it told what the process has lost")];
    }
}

/// In a word, what a process was doing when the kernel died.
pub fn state_word(state: &ProcessState) -> &'static str {
    match state {
        ProcessState::Alive => "alive",
        ProcessState::Stopped { .. } => "stopped",
        ProcessState::Zombie { .. } => "zombie",
        ProcessState::Exiting { .. } => "exiting",
    }
}

/// How the names of files with the kernel's pages end.
const VMCORE_EXTENSION: &str = "vmcore";

impl Report {
    /// The present version.
    pub const FORMAT: u32 = 1;

    /// File name of a report that started at `started`.
    fn file_name(&self) -> String {
        format!("{}.json", self.started.replace(':', ""))
    }

    /// Where the dead kernel's own pages go, beside the report.
    pub fn vmcore_path(&self, dir: &Path) -> PathBuf {
        dir.join(self.file_name()).with_extension(VMCORE_EXTENSION)
    }

    /// Writes the report into `dir`, also as `latest.json`, and removes the oldest beyond `keep`. Returns its path.
    ///
    /// Called again, it replaces the file: at every moment the disk has a whole report.
    pub fn save(&self, dir: &Path, keep: usize) -> io::Result<PathBuf> {
        let name = self.file_name();
        let path = dir.join(&name);
        arm::replace_file(&path, &serde_json::to_vec_pretty(self)?, 0o600)?;
        let (link, fresh) = (dir.join("latest.json"), dir.join("latest.json.new"));
        _ = std::fs::remove_file(&fresh);
        std::os::unix::fs::symlink(&name, &fresh)?;
        std::fs::rename(&fresh, &link)?;
        prune(dir, keep.max(1), &name)?;
        rustix::fs::fsync(std::fs::File::open(dir)?)?;
        Ok(path)
    }

    /// The report as lines of text, every process that was asked for.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| {
            out.push_str(&text);
            out.push('\n');
        };
        if let Some(kernel) = &self.dead_kernel {
            line(format!("Linux {} died: {}", kernel.release, self.panic_text()));
        } else {
            line("The dead kernel could not be read.".into());
        }
        if let Some(panic) = &self.panic {
            let place = panic.cpu.map_or(String::new(), |cpu| format!(" on CPU {cpu}"));
            if let Some(tid) = panic.tid {
                line(format!("  in {} ({tid}){place}", panic.comm));
            }
            for frame in panic.stack.iter().take(12) {
                line(format!("    {}{}", if frame.guessed { "? " } else { "" }, frame.symbol));
            }
        }
        let timeline: Vec<String> = self.timeline.iter().map(|m| format!("{} {} ms", m.name, m.ms)).collect();
        line(format!("Timeline: {}", timeline.join(", ")));
        if let Some(pour) = &self.pour {
            let (mib, rate) = (pour.bytes >> 20, pour.rate() >> 20);
            line(format!("Memory: {mib} MiB poured at {rate} MiB/s"));
        }
        for mount in self.mounts.iter().filter(|m| m.note.is_some()) {
            let note = mount.note.as_deref().unwrap_or_default();
            let state = if mount.mounted { "mounted" } else { "not mounted" };
            line(format!("{} ({}): {state}: {note}", mount.mountpoint, mount.fs_type));
        }
        for failure in &self.failures {
            line(format!("Trouble: {failure}"));
        }
        if let Some(vmcore) = &self.vmcore {
            line(format!("The kernel's pages: {}", vmcore.display()));
        }
        for doubt in self.findings.iter().filter(|f| f.severity >= Severity::Doubt) {
            let whose = doubt.pid.map(|pid| format!(" of process {pid}")).unwrap_or_default();
            let done = match doubt.action {
                Action::None => String::new(),
                action => format!(" ({})", crate::cmd::inspect::check::action(action)),
            };
            line(format!("Doubt: {}{whose}: {}{done}", doubt.object, doubt.text));
        }
        // Nobody wants to read what was never asked for.
        let asked: Vec<&Fate> = self.processes.iter().filter(|p| p.fate != FateKind::NotSelected).collect();
        if !asked.is_empty() {
            line(format!("{:>7}  {:<15}  {:<18}  reason", "PID", "name", "fate"));
        }
        for p in &asked {
            let mut reasons = p.reasons.iter().map(|r| r.text.as_str());
            let row = format!(
                "{:>7}  {:<15}  {:<18}  {}",
                p.pid,
                p.comm.to_string(),
                p.fate.word(),
                reasons.next().unwrap_or("")
            );
            line(row.trim_end().to_owned());
            for more in reasons {
                line(format!("{:>46}{more}", ""));
            }
        }
        line(self.counts());
        out
    }

    /// How many processes had which fate.
    fn counts(&self) -> String {
        let count = |kinds: &[FateKind]| self.processes.iter().filter(|p| kinds.contains(&p.fate)).count();
        let some = |kind: FateKind, text: &dyn Fn(usize) -> String| match count(&[kind]) {
            0 => String::new(),
            n => text(n),
        };
        format!(
            "{} live{}{}, {} given up, {} failed, {} not selected",
            count(&[FateKind::Resurrected, FateKind::ResurrectedWithLosses, FateKind::Restarted]),
            some(FateKind::ResurrectedWithLosses, &|n| format!(" ({n} with losses)")),
            some(FateKind::Ended, &|n| format!(", {n} ended as they wanted to")),
            count(&[FateKind::GivenUp]),
            count(&[FateKind::Failed]),
            count(&[FateKind::NotSelected])
        )
    }

    fn panic_text(&self) -> &str {
        self.panic
            .as_ref()
            .map(|p| p.message.as_str())
            .filter(|m| !m.is_empty())
            .unwrap_or("no message in its log")
    }
}

/// Removes the oldest reports until `keep` are left. Their names sort by time; `current` stays even where a wrong clock makes it the
/// oldest.
/// Removes all cores but one: they are large.
pub fn prune_vmcores(dir: &Path, current: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ext| ext == VMCORE_EXTENSION) && path != current {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

fn prune(dir: &Path, keep: usize, current: &str) -> io::Result<()> {
    let mut names: Vec<_> = std::fs::read_dir(dir)?
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| n.ends_with(".json") && n.starts_with(|c: char| c.is_ascii_digit()))
        .collect();
    names.sort_by(|a, b| (a == current).cmp(&(b == current)).then(a.cmp(b)));
    for name in names.iter().take(names.len().saturating_sub(keep)) {
        std::fs::remove_file(dir.join(name))?;
    }
    Ok(())
}

/// Milliseconds since the kernel started.
pub fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// The present time as `2026-01-31T23:59:59Z`.
pub fn utc_now() -> String {
    utc(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
}

/// Seconds since the epoch as `2026-01-31T23:59:59Z`.
pub fn utc(seconds: u64) -> String {
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while month < 11 && days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_right() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_767_225_599), "2025-12-31T23:59:59Z");
    }

    fn report(started: &str) -> Report {
        Report { format: Report::FORMAT, started: started.into(), ..Report::default() }
    }

    #[test]
    fn the_newest_reports_stay_and_latest_leads_to_the_last() {
        let dir = tempfile::tempdir().unwrap();
        for second in 0..5 {
            report(&format!("2026-01-01T00:00:0{second}Z")).save(dir.path(), 3).unwrap();
        }
        let mut last = report("2026-01-01T00:00:04Z");
        last.state = State::Complete;
        last.save(dir.path(), 3).unwrap();
        let mut names: Vec<String> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            ["2026-01-01T000002Z.json", "2026-01-01T000003Z.json", "2026-01-01T000004Z.json", "latest.json"]
        );
        let read: Report =
            serde_json::from_slice(&std::fs::read(dir.path().join("latest.json")).unwrap()).unwrap();
        assert_eq!((read.started.as_str(), read.state), ("2026-01-01T00:00:04Z", State::Complete));
    }

    #[test]
    fn a_report_with_a_wrong_time_stays() {
        let dir = tempfile::tempdir().unwrap();
        for second in 0..3 {
            report(&format!("2026-01-01T00:00:0{second}Z")).save(dir.path(), 3).unwrap();
        }
        assert!(report("1970-01-01T00:00:07Z").save(dir.path(), 3).unwrap().exists());
        assert!(!dir.path().join("2026-01-01T000000Z.json").exists());
        assert!(dir.path().join("2026-01-01T000001Z.json").exists());
    }

    #[test]
    fn who_was_let_go_is_not_called_failed() {
        let fate = |pid, fate| Fate { pid, ppid: 1, comm: "x".into(), fate, reasons: vec![] };
        let mut all = [fate(7, FateKind::Failed), fate(8, FateKind::Failed), fate(9, FateKind::Resurrected)];
        went_on(&mut all, &[7, 9]);
        let words: Vec<FateKind> = all.iter().map(|f| f.fate).collect();
        assert_eq!(words, [FateKind::ResurrectedWithLosses, FateKind::Failed, FateKind::Resurrected]);
        assert_eq!(all[0].reasons[0].code, "losses-unknown");
    }

    #[test]
    fn people_see_every_process_that_was_asked_for() {
        let mut r = report("2026-01-01T00:00:00Z");
        let fate = |pid, comm: &str, fate, reasons: &[&str]| Fate {
            pid,
            ppid: 1,
            comm: comm.into(),
            fate,
            reasons: reasons.iter().map(|t| Reason::new("x", *t)).collect(),
        };
        r.processes = vec![
            fate(7, "python3", FateKind::Resurrected, &[]),
            fate(
                8,
                "redis",
                FateKind::GivenUp,
                &["descriptor 5 is a socket", "it lives in its own net namespace"],
            ),
            fate(9, "cron", FateKind::NotSelected, &["no rule asks for it"]),
        ];
        r.failures.push("/srv: no such device".into());
        let doubt = Finding::new(Severity::Doubt, Some(8), "file", "two sources disagree");
        r.findings.push(Finding { action: Action::GivenUp, ..doubt });
        r.findings.push(Finding::new(Severity::Note, None, "file", "a trifle"));
        let text = r.to_text();
        assert!(text.contains("      7  python3          lives\n"), "{text}");
        assert!(
            text.contains("      8  redis            given up            descriptor 5 is a socket\n"),
            "{text}"
        );
        assert!(text.contains("its own net namespace"));
        assert!(!text.contains("cron"));
        assert!(text.contains("Trouble: /srv: no such device"));
        assert!(text.contains("Doubt: file of process 8: two sources disagree (given up)\n"), "{text}");
        assert!(!text.contains("a trifle"));
        assert!(text.ends_with("1 live, 1 given up, 0 failed, 1 not selected\n"));
    }
}
