//! `cargo xtask ground-truth`: /proc before the panic against autopsy's reading, and against /proc after the resurrection.

//!
//! Which fields are compared, and which may differ and why, is told in `docs/ground-truth.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use autopsy::Autopsy;
use autopsy::ground_truth::{Comparison, Record, compare, compare_machine};
use clap::Args;
use lab::image::DEMO_UID;
use lab::{Guest, Lab, MachineConfig, Panic, Program, Series};
use survivors::{Expect, Needs, Survivor, TABLE};

use crate::crash::{self, Quiet};
use crate::crash_runs::Tally;
use crate::guest::{self, Installation};
use crate::survive::{PROGRAM, needs_root};
use crate::{Global, ui, workload};

/// Fields of /proc in which a resurrected process may differ from what it was, and why (`docs/ground-truth.md`).
const MAY_DIFFER: &[(&str, &str)] = &[
    ("stat.starttime", "the process was made again: the kernel notes the new time"),
    ("fdinfo.mnt_id", "the file systems were mounted again"),
    ("ns.time", "resurrected processes live in a time namespace that continues the dead kernel's clocks"),
    ("ns.time_for_children", "as ns.time"),
    ("mounts", "mounts, devices and groups of mounts have other numbers"),
];

/// Open files whose names in /proc have the number of an inode that exists in memory only: it is a new one, with a new number.
const NUMBERED_ANEW: &[&str] = &["pipe:[", "socket:["];

/// File systems in memory: their inodes are new ones.
const IN_MEMORY: &[&str] = &["/proc/", "/sys/", "/dev/", "/run/", "/memfd:"];

/// As /proc/PID/fdinfo shows it.
const O_LARGEFILE: u32 = 0o100_000;

/// What the kernel writes behind a name that is gone. Such files are made again, under another name if theirs is taken.
const DELETED: &str = " (deleted)";

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

/// Where survivors look for the sign of another kernel. Once all are ready a FIFO without a writer takes its place: whoever
/// looks stays in open(2), before the panic and after it, and so keeps the state that it has set up.
const BOOT_ID: &str = "/var/lib/boot-id";
/// The lab's agent in a guest.
const AGENT: &str = "/usr/local/lib/lab/agent";
const READY_DEADLINE: Duration = Duration::from_secs(240);
/// Length of the sleeps of survivors that sleep, in milliseconds: longer than all this takes.
const LONG: &str = "3000000";

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
    /// Alters one field of one process in the recording: both comparisons must fail (to see that they can).
    #[arg(long)]
    damage: bool,
}

impl GroundTruth {
    /// One kernel, as part of the tests.
    pub fn new(kernel: Series) -> Self {
        Self { kernel: Some(kernel), show: 40, damage: false }
    }

    /// Runs it; whether all processes agree.
    pub fn run(self, global: &Global) -> Result<bool> {
        Ok(self.count(global)?.close())
    }

    /// Runs it; each process counts once in each of the two comparisons.
    pub fn count(self, global: &Global) -> Result<Tally> {
        let lab = global.lab()?;
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            let config = MachineConfig::new(series, global.accel());
            let found = self.on(&lab, &config).with_context(|| format!("ground truth on kernel {series}"))?;
            tally.passed += found.passed;
            tally.failed += found.failed;
        }
        Ok(tally)
    }

    fn on(&self, lab: &Lab, config: &MachineConfig) -> Result<Tally> {
        let armed =
            guest::armed(lab, &workload::with_input(lab, config)?, &Installation::for_programs(PROGRAM))?;
        let mut guest = lab.start(&armed, &format!("ground-truth-{}", config.series))?;
        // Without this, khugepaged makes huge pages of what stands still, between the recording and the panic.
        guest.agent.shell("echo 0 > /sys/kernel/mm/transparent_hugepage/khugepaged/defrag && echo 4000000000 > /sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs", READY_DEADLINE)?;
        let mut still = start_survivors(&mut guest)?;
        for (_, script) in STILL {
            still.push(guest.agent.spawn(&Program::shell(script).uid(DEMO_UID))?);
        }
        let busy = workload::start(&mut guest.agent)?;
        // Time to get where they stay; five seconds of work for the others.
        guest.agent.wait(&busy, Duration::from_secs(5))?;
        ui::note("recording /proc before the panic");
        let before_dir = guest.dir.join("proc-before");
        guest.agent.record()?.write_to(&before_dir)?;
        // On another CPU than the first a kernel from 6.9 on leaves the first one alone for good: see docs/ground-truth.md.
        let panic = Panic { alive: still.clone(), cpu: Some(0), ..Panic::default() };
        let Some(line) = crash::crash(&mut guest, &panic, &mut Quiet)? else {
            bail!("some program had ended before the panic")
        };
        // From here on there is something to look at if it goes wrong.
        let tally = self.after_panic(&mut guest, config, &line, &still, &busy);
        if !matches!(tally, Ok(Tally { failed: 0, .. })) {
            guest.keep_artifacts()?;
            ui::line(format!("artifacts: {}", guest.dir.display()));
        }
        tally
    }

    fn after_panic(
        &self,
        guest: &mut Guest,
        config: &MachineConfig,
        line: &lab::Line,
        still: &[i32],
        busy: &[i32],
    ) -> Result<Tally> {
        ui::note("waiting for the processes under the second kernel");
        crash::wait_agent(guest, line, &mut Vec::new(), &mut Quiet)?;
        let after_dir = guest.dir.join("proc-after");
        guest.agent.record()?.write_to(&after_dir)?;
        crash::fetch_report(guest)?;
        ui::note("reading the dead kernel's memory");
        let core = guest.dir.join("vmcore");
        let mut file = File::create(&core)?;
        guest.agent.read_pieces("/proc/vmcore", |piece| file.write_all(piece))?;
        drop(file);

        let mut before = Record::read(&guest.dir.join("proc-before"))?;
        if self.damage {
            damage(&mut before, still)?;
        }
        let kernel = ktypes::Kernel::open(vmcore::Vmcore::open(&core)?)?;
        let (_, mut found) = Autopsy::new(&kernel).snapshot_with_record()?;
        let still_ones = families(&before, still);
        // What demo programs start and wait for may come and go between the recording and the panic.
        let restless = &families(&before, busy) | &families(&found, busy);
        // Whoever records and panics cannot stand still meanwhile.
        for record in [&mut before, &mut found] {
            record.processes.retain(|_, fields| fields.get(&("exe", 0)).is_none_or(|exe| exe != AGENT));
        }
        let read = Verdict::of(&before, &found, |pid| !restless.contains(&pid));
        self.tell(&format!("kernel {}: /proc and the dead kernel's memory", config.series), &read);

        let lives = resurrected_pids(&guest.dir)?;
        let gone: Vec<i32> = still.iter().copied().filter(|pid| !lives.contains(pid)).collect();
        let mut after = Record::read(&after_dir)?;
        let unmoved = |pid: &i32| still_ones.contains(pid) && !read.comparison.moved.contains(pid);
        for record in [&mut before, &mut after] {
            record.processes.retain(|pid, _| lives.contains(pid));
            for (pid, fields) in &mut record.processes {
                make_comparable(fields);
                // Context switches tell the comparison who has run meanwhile; these have not, but are new threads.
                if unmoved(pid) {
                    fields.retain(|(name, _), _| *name != "thread.switches");
                }
            }
        }
        allow_new_forms(&mut before, &after);
        let mut shown = Verdict::of(&before, &after, |pid| still_ones.contains(&pid));
        // Whoever has not come back has shown nothing.
        shown.missing.extend(gone);
        self.tell(&format!("kernel {}: /proc before and after the resurrection", config.series), &shown);
        let glance = compare_machine(&Autopsy::new(&kernel), &guest.dir.join("proc-before"))?;
        ui::line(format!(
            "kernel {}: /proc and what `otherworld inspect` shows: {} things ({}), {} differences",
            config.series,
            glance.compared.values().sum::<usize>(),
            glance.compared.iter().map(|(kind, n)| format!("{kind} {n}")).collect::<Vec<_>>().join(", "),
            glance.differences.len()
        ));
        for difference in glance.differences.iter().take(self.show) {
            ui::failure(format!("  {difference}"));
        }
        let is_found = self.pages_by_owner(&kernel, config.series)?;
        let differing = glance.differences.len();
        if read.failed() + differing == 0 && is_found {
            fs::remove_file(&core)?;
        }
        let failed = read.failed() + shown.failed() + usize::from(differing > 0) + usize::from(!is_found);
        let passed = read.passed() + shown.passed() + usize::from(differing == 0) + usize::from(is_found);
        Ok(Tally { passed, failed })
    }

    /// Whether what the kernel knows of each page leads to the same pages as page tables do, for most processes, and never to others.
    fn pages_by_owner(&self, kernel: &ktypes::Kernel, series: Series) -> Result<bool> {
        let all = Autopsy::new(kernel).pages_by_owner()?;
        let found = all.iter().filter(|process| process.found.iter().all(Result::is_ok));
        ui::line(format!(
            "kernel {series}: found without page tables: all {} pages of {} of {} processes",
            found.clone().map(|process| process.shown).sum::<u64>(),
            found.clone().count(),
            all.len()
        ));
        let differ: Vec<_> = all.iter().filter(|process| process.differ).map(|process| process.pid).collect();
        if !differ.is_empty() {
            ui::failure(format!("  other pages than page tables show: of {differ:?}"));
        }
        let mut why_not: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
        for process in &all {
            if let Some(why) = process.found.iter().find_map(|found| found.as_ref().err()) {
                why_not.entry(why).or_default().push(process.pid);
            }
        }
        for (why, pids) in why_not.iter().take(self.show) {
            ui::line(format!("  not of {pids:?}: {why}"));
        }
        Ok(differ.is_empty() && found.count() * 2 > all.len())
    }

    fn tell(&self, what: &str, verdict: &Verdict) {
        let result = &verdict.comparison;
        ui::line(format!(
            "{what}: {} processes ({} of them had moved on), {} fields, {} differences",
            verdict.compared.len(),
            result.moved.len(),
            result.compared.values().sum::<usize>(),
            result.differences.len()
        ));
        for difference in result.differences.iter().take(self.show) {
            ui::failure(format!("  {difference}"));
        }
        if result.differences.len() > self.show {
            ui::line(format!("  … and {} more", result.differences.len() - self.show));
        }
        for pid in &verdict.missing {
            ui::failure(format!("  process {pid} is in one of the two only"));
        }
    }
}

/// A comparison, counted by processes.
struct Verdict {
    comparison: Comparison,
    /// Processes that both records have.
    compared: BTreeSet<i32>,
    /// Processes with a difference.
    differing: BTreeSet<i32>,
    /// Processes that only one record has although both should.
    missing: BTreeSet<i32>,
}

impl Verdict {
    fn of(expected: &Record, found: &Record, must_be_in_both: impl Fn(i32) -> bool) -> Self {
        let comparison = compare(expected, found);
        let in_both = |pid: &&i32| found.processes.contains_key(pid);
        let compared = expected.processes.keys().filter(in_both).copied().collect();
        let differing = comparison.differences.iter().map(|difference| difference.pid).collect();
        let missing = comparison.alone.iter().copied().filter(|pid| must_be_in_both(*pid)).collect();
        Self { comparison, compared, differing, missing }
    }

    fn failed(&self) -> usize {
        self.differing.len() + self.missing.len()
    }

    fn passed(&self) -> usize {
        self.compared.len() - self.differing.len()
    }
}

/// Takes out of a process's fields what may differ after the resurrection.
fn make_comparable(fields: &mut BTreeMap<(&'static str, u64), String>) {
    let descriptors = |is_meant: &dyn Fn(&str) -> bool| -> BTreeSet<u64> {
        let all = fields.iter().filter(|((name, _), path)| *name == "fd" && is_meant(path));
        all.map(|((_, fd), _)| *fd).collect()
    };
    let numbered = descriptors(&|path| NUMBERED_ANEW.iter().any(|kind| path.starts_with(kind)));
    let is_lasting = |path: &str| {
        path.starts_with('/')
            && !path.ends_with(DELETED)
            && !IN_MEMORY.iter().any(|dir| path.starts_with(dir))
    };
    let anew = descriptors(&|path| !is_lasting(path));
    fields.retain(|(name, which), _| {
        let is_free = MAY_DIFFER.iter().any(|(free, _)| free == name);
        let is_made_anew = *name == "fdinfo.ino" && anew.contains(which);
        !is_free && !is_made_anew
    });
    for ((name, which), value) in fields.iter_mut() {
        if *name == "fd" && numbered.contains(which) {
            value.truncate(value.find('[').unwrap_or(value.len()));
        }
        // Open(2) sets it for 64-bit programs, and other ways to a file do not; it means nothing to them.
        if *name == "fdinfo.flags"
            && let Ok(flags) = u32::from_str_radix(value, 8)
        {
            *value = format!("0{:o}", flags & !O_LARGEFILE);
        }
        // End, permissions and offset remain of a mapping.
        if *name == "maps" && value.ends_with(DELETED) && !value.contains("/dev/zero") {
            *value = value.split(' ').take(3).collect::<Vec<_>>().join(" ");
        }
        // The inode of shared anonymous memory exists in memory only, too.
        if *name == "maps"
            && let Some((rest, name)) = value.split_once(" 00:01 ")
        {
            let name = name.split_once(' ').map_or("", |(_, name)| name);
            *value = format!("{rest} 00:01 {name}");
        }
    }
}

/// Takes over what the resurrected processes show where it says the same in another form, or allows more.
fn allow_new_forms(before: &mut Record, after: &Record) {
    for (pid, fields) in &mut before.processes {
        let Some(now) = after.processes.get(pid) else { continue };
        for (field, value) in fields.iter_mut() {
            let Some(new) = now.get(field) else { continue };
            let same = match field.0 {
                "thread.syscall" => is_same_call(value, new),
                // A huge page where there were small ones: the rest of it is zero, as it would have been when touched.
                "smaps.Anonymous+Swap" => value.parse::<u64>().ok() < new.parse().ok(),
                // It waits for the disk on the way: a page of a file that the new kernel has not read yet.
                // The terminal itself has taken the place of the name that means whichever controls the session.
                "fd" => value == "/dev/tty" && new.starts_with("/dev/"),
                "thread.state" => value == "S" && new == "D",
                _ => false,
            };
            if same {
                value.clone_from(new);
            }
        }
    }
}

/// Whether two lists are the same, except at one place.
fn all_but(at: usize, old: &[&str], new: &[&str]) -> bool {
    let rest = |list: &[&str]| {
        list.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, w)| (*w).to_owned()).collect::<Vec<_>>()
    };
    rest(old) == rest(new)
}

/// Whether a thread waits for the same in both lines of `PID/task/TID/syscall`, although it shows it differently.
fn is_same_call(before: &str, after: &str) -> bool {
    let (old, new): (Vec<&str>, Vec<&str>) = (before.split(' ').collect(), after.split(' ').collect());
    let (Some(old_nr), Some(new_nr)) = (old.first(), new.first()) else { return false };
    match (*old_nr, *new_nr) {
        // The kernel continues a wait with a timeout as restart_syscall(2).
        (_, "219") => old[1..] == new[1..],
        // It had done all but return (a signal to itself): it shows no call any more.
        (_, "-1") => old.len() > 2 && old[old.len() - 2..] == new[1..],
        // epoll_wait, epoll_pwait, semtimedop; rt_sigtimedwait: the time left is in the place of the timeout.
        ("232", "232") | ("281", "281") | ("220", "220") => all_but(4, &old, &new),
        ("128", "128") => all_but(3, &old, &new),
        // A write or sendto that had moved a part goes on with the rest: the end of the buffer is the same.
        ("1", "1") | ("44", "44") => {
            let end = |call: &[&str]| -> Option<u64> {
                let number = |at: usize| u64::from_str_radix(call.get(at)?.trim_start_matches("0x"), 16).ok();
                number(2)?.checked_add(number(3)?)
            };
            end(&old).is_some() && end(&old) == end(&new) && old[1] == new[1] && old[4..] == new[4..]
        }
        _ => false,
    }
}

/// Starts all survivors that are to survive and can stand still; their process ids.
fn start_survivors(guest: &mut Guest) -> Result<Vec<i32>> {
    let script = format!("cp /proc/sys/kernel/random/boot_id {BOOT_ID} && chmod 644 {BOOT_ID}");
    guest.agent.shell(&script, READY_DEADLINE)?;
    let restless = [
        // Its wait ends with EINTR, as after any interruption (signal(7)), and its thread with it.
        "syscall-sigtimedwait",
        // Other programs, or other processes, each moment.
        "process-exec",
        "process-exits",
        // A parent does not wait for ever for a child that stays in vfork: after a deadline it goes on.
        "process-vfork",
        "process-vfork-exit",
    ];
    let chosen: Vec<&Survivor> = TABLE
        .iter()
        // Of who computes there is no moment at which /proc and its memory could agree.
        .filter(|survivor| survivor.expect == Expect::Survives && !survivor.is_computing())
        .filter(|survivor| !restless.contains(&survivor.name))
        // Files without a name whose name is another's, or that never had one, are shown in another way afterwards.
        .filter(|survivor| survivor.name != "names-files")
        // No swap area is in use here, no huge page set aside, and others are there.
        .filter(|survivor| !matches!(survivor.needs, Needs::Swap | Needs::HugePages | Needs::Alone))
        .collect();
    let mut pids = Vec::new();
    for (root, dir) in [(false, "/home/demo/survivors"), (true, "/root/survivors")] {
        let names =
            chosen.iter().filter(|survivor| needs_root(survivor) == root).map(|survivor| survivor.name);
        let how =
            [PROGRAM, "start", "--dir", dir, "--timeout", "200", "--period", LONG, "--boot-id", BOOT_ID];
        let program = Program::new(how.into_iter().chain(names)).uid(if root { 0 } else { DEMO_UID });
        let output = guest.agent.run(&program, READY_DEADLINE)?;
        pids.extend(output.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("ready")).then(|| words.nth(1)?.parse::<i32>().ok()).flatten()
        }));
    }
    if pids.len() != chosen.len() {
        bail!("{} of {} survivors are ready", pids.len(), chosen.len());
    }
    let script = format!("mkfifo -m 644 {BOOT_ID}.new && mv {BOOT_ID}.new {BOOT_ID} && sync");
    guest.agent.shell(&script, READY_DEADLINE)?;
    Ok(pids)
}

/// Alters one field of the first of these processes.
fn damage(record: &mut Record, still: &[i32]) -> Result<()> {
    let fields = still.first().and_then(|pid| record.processes.get_mut(pid)).context("nothing to damage")?;
    let umask = fields.get_mut(&("status.Umask", 0)).context("the recording has no umask")?;
    umask.push('1');
    Ok(())
}

/// These processes and all their children.
fn families(record: &Record, roots: &[i32]) -> BTreeSet<i32> {
    let parents: BTreeMap<i32, i32> = record
        .processes
        .iter()
        .filter_map(|(pid, fields)| Some((*pid, fields.get(&("stat.ppid", 0))?.parse().ok()?)))
        .collect();
    let descends = |mut pid: i32| {
        for _ in 0..parents.len() {
            if roots.contains(&pid) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_that_was_issued_again_has_another_timeout_and_nothing_else() {
        let before = "232 0x3 0x1000 0x8 0x1388 0x0 0x0 0x7fff 0x7f00";
        assert!(is_same_call(before, "232 0x3 0x1000 0x8 0x10 0x0 0x0 0x7fff 0x7f00"));
        assert!(!is_same_call(before, "232 0x4 0x1000 0x8 0x10 0x0 0x0 0x7fff 0x7f00"));
        assert!(!is_same_call(before, "1 0x3 0x1000 0x8 0x1388 0x0 0x0 0x7fff 0x7f00"));
    }

    #[test]
    fn a_call_may_look_different_when_it_is_the_same() {
        assert!(is_same_call("230 0x1 0x0 0x7f 0x70", "219 0x1 0x0 0x7f 0x70"));
        assert!(!is_same_call("230 0x1 0x0 0x7f 0x70", "219 0x1 0x0 0x7f 0x71"));
        assert!(is_same_call("1 0x4 0x1000 0x300 0x22 0x7f 0x70", "1 0x4 0x1100 0x200 0x22 0x7f 0x70"));
        assert!(!is_same_call("1 0x4 0x1000 0x300 0x22 0x7f 0x70", "1 0x4 0x1100 0x300 0x22 0x7f 0x70"));
        assert!(is_same_call("234 0x1 0x2 0x7f 0x70", "-1 0x7f 0x70"));
        assert!(!is_same_call("234 0x1 0x2 0x7f 0x70", "-1 0x7e 0x70"));
        assert!(!is_same_call("0 0x1 0x2 0x7f 0x70", "1 0x1 0x2 0x7f 0x70"));
    }

    #[test]
    fn whatever_may_differ_is_documented() {
        let text = include_str!("../../docs/ground-truth.md");
        for (field, why) in MAY_DIFFER {
            assert!(text.contains(&format!("| `{field}` | {why} |")), "{field}");
        }
    }
}
