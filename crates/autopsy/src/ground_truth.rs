//! Comparing a snapshot with what /proc said.
//!
//! Just before a panic somebody copies /proc/PID of all processes into a directory, as plain files and symbolic links under
//! the same names (`PID/stat`, `PID/status`, `PID/maps`, `PID/fd/3` …, `PID/task/TID/…`). From that recording and from the
//! snapshot the same [`Record`] is made: by process, what each field says. Two records are compared field by field; two
//! recordings too, such as one from before the panic and one from after the resurrection.
//!
//! Time goes on between a recording and the panic. A thread that has not been switched in since has changed nothing: the
//! numbers of its context switches tell, unless it was running all the time. Of a process with a thread that has run, the fields of [`MOVING`] are not compared.

mod machine;

pub use machine::{MachineComparison, compare_machine};

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ktypes::KernelType;
use snapshot::{
    AddressSpace, Bytes, FileKind, MountFlags, OpenFile, PAGE_SIZE, PageRun, Pid, Process, ProcessState,
    Prot, Seccomp, Snapshot, Thread, ThreadState, Vma, VmaFlags, VmaKind,
};

use crate::Autopsy;
use crate::error::Result;
use crate::memory::FoundAgain;

/// Fields that a process changes as it runs: compared only if none of its threads has run since the recording.
///
/// Everything else that a record has is compared in any case.
pub const MOVING: &[&str] = &[
    "maps",
    "smaps.VmFlags",
    "smaps.Anonymous+Swap",
    "fd",
    "fdinfo.pos",
    "fdinfo.flags",
    "fdinfo.mnt_id",
    "fdinfo.ino",
    "stat.num_threads",
    "status.ShdPnd",
    "status.SigIgn",
    "status.SigCgt",
    "thread.state",
    "thread.syscall",
    "thread.SigPnd",
    "thread.SigBlk",
    "cmdline",
    "environ",
];

/// How many context switches a thread has behind it.
const SWITCHES: &str = "thread.switches";
/// How many bytes of a recording's file are looked at.
const MAX_FILE: u64 = 64 << 20;
/// Longest command line or environment that is compared, bytes.
const MAX_TEXT: u64 = 1 << 20;
/// Nanoseconds of a tick of /proc (USER_HZ is 100).
const TICK_NS: u64 = 10_000_000;

/// A field of a process: its name, and which one of several (a descriptor, an address, a thread).
pub type Field = (&'static str, u64);

/// What the fields of processes say, as text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// By PID. Kernel threads are not in it.
    pub processes: BTreeMap<Pid, BTreeMap<Field, String>>,
}

/// A field that two records disagree about; `None`: it is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    #[allow(missing_docs)]
    pub pid: Pid,
    /// Name of the program.
    pub comm: String,
    #[allow(missing_docs)]
    pub field: Field,
    /// What the recording says.
    pub expected: Option<String>,
    /// What the other record says.
    pub found: Option<String>,
}

/// The outcome of a comparison.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// What differs.
    pub differences: Vec<Difference>,
    /// How often each field was compared.
    pub compared: BTreeMap<&'static str, usize>,
    /// Processes that ran after the recording: their moving fields were not compared.
    pub moved: BTreeSet<Pid>,
    /// Processes that only one of the records has: they ended, or began, in between.
    pub alone: BTreeSet<Pid>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, which) = self.field;
        write!(f, "{} ({}) {name}", self.pid, self.comm)?;
        if which != 0 {
            write!(f, "[{which:#x}]")?;
        }
        let side = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".into());
        write!(f, ": expected {}, found {}", side(&self.expected), side(&self.found))
    }
}

/// Compares what was recorded with what was found; [`MOVING`] fields only of processes that stood still.
pub fn compare(expected: &Record, found: &Record) -> Comparison {
    compare_except(expected, found, MOVING)
}

/// Compares two records; the fields of `moving` only of processes whose threads have not run in between.
pub fn compare_except(expected: &Record, found: &Record, moving: &[&str]) -> Comparison {
    let mut result = Comparison::default();
    let both: Vec<Pid> =
        expected.processes.keys().filter(|pid| found.processes.contains_key(pid)).copied().collect();
    let all = expected.processes.keys().chain(found.processes.keys());
    result.alone = all.filter(|pid| !both.contains(pid)).copied().collect();
    let ran = |pid: &Pid| {
        let switches = |record: &Record| -> Vec<(u64, String)> {
            let fields = record.processes[pid].iter().filter(|((name, _), _)| *name == SWITCHES);
            fields.map(|((_, tid), count)| (*tid, count.clone())).collect()
        };
        // Who is running all the time is not switched in again.
        let is_running = |record: &Record| {
            record.processes[pid].iter().any(|((name, _), state)| *name == "thread.state" && state == "R")
        };
        switches(expected) != switches(found) || is_running(expected) || is_running(found)
    };
    result.moved = both.iter().filter(|pid| ran(pid)).copied().collect();
    // A position belongs to the open file, which another process may have used.
    let busy: BTreeSet<&String> = result
        .moved
        .iter()
        .flat_map(|pid| found.processes[pid].iter())
        .filter(|((name, _), _)| *name == "fd")
        .map(|(_, path)| path)
        .collect();
    for pid in &both {
        let (old, new) = (&expected.processes[pid], &found.processes[pid]);
        let keys: BTreeSet<&Field> = old.keys().chain(new.keys()).collect();
        for field in keys {
            let (name, which) = *field;
            let moved = result.moved.contains(pid) && moving.contains(&name);
            let used =
                name == "fdinfo.pos" && new.get(&("fd", which)).is_some_and(|path| busy.contains(path));
            // It may have started or ended a thread.
            let other_threads = result.moved.contains(pid)
                && name.starts_with("thread.")
                && old.contains_key(field) != new.contains_key(field);
            if name == SWITCHES || moved || used || other_threads {
                continue;
            }
            let (expected, found) = (old.get(field).cloned(), new.get(field).cloned());
            *result.compared.entry(name).or_default() += 1;
            if expected != found {
                let comm = old.get(&("stat.comm", 0)).cloned().unwrap_or_default();
                result.differences.push(Difference { pid: *pid, comm, field: *field, expected, found });
            }
        }
    }
    result
}

#[derive(KernelType)]
#[kernel("task_struct")]
struct Switches {
    nvcsw: u64,
    nivcsw: u64,
    blocked: u64,
}

/// Calls that put another signal mask in force for as long as they wait: rt_sigtimedwait, rt_sigsuspend, pselect6, ppoll,
/// epoll_pwait, io_pgetevents, epoll_pwait2. /proc shows that mask, the snapshot the one that the program goes on with.
const MASKING: [&str; 7] = ["128 ", "130 ", "270 ", "271 ", "281 ", "333 ", "441 "];

/// What of a process's own pages is found without its page tables ([`Autopsy::pages_by_owner`]).
#[derive(Clone, Debug)]
pub struct FoundPages {
    #[allow(missing_docs)]
    pub pid: Pid,
    /// How many the page tables show.
    pub shown: u64,
    /// How many were found with whole page tables (there are none to be found), and with none of the lowest; or why not all were.
    pub found: [Result<u64, String>; 2],
    /// Those that were found are others.
    pub differ: bool,
}

impl Autopsy<'_> {
    /// Looks for all processes' own pages by what the kernel knows of each page, as if page tables were damaged.
    ///
    /// # Errors
    /// As [`autopsy`](crate::autopsy).
    pub fn pages_by_owner(&self) -> Result<Vec<FoundPages>> {
        let processes = self.processes()?;
        let mut users: HashMap<u64, Vec<u64>> = HashMap::new();
        for member in self.groups()?.iter().flat_map(|group| &group.members) {
            users.entry(member.task.mm).or_default().push(member.addr);
        }
        let runs = |id| -> Vec<Vec<snapshot::PageRun>> {
            let spaces = self.address_spaces.borrow();
            spaces.get(&id).into_iter().flat_map(|space| &space.vmas).map(|vma| vma.pages.clone()).collect()
        };
        let users: Vec<(snapshot::AddressSpaceId, &[u64])> = processes
            .iter()
            .filter_map(|process| process.address_space)
            .map(|id| (id, users.get(&id.0).map_or(&[][..], Vec::as_slice)))
            .collect();
        let shown: Vec<_> = users.iter().map(|(id, _)| runs(*id)).collect();
        let found = [0, 1].map(|lowest| {
            let is_table = |table: vmcore::Table| table.level > lowest && self.is_table(table);
            self.find_pages_again(&users, &is_table)
        });
        let mut all = Vec::new();
        let known = processes.iter().filter_map(|process| Some((process.pid, process.address_space?)));
        for ((pid, id), shown) in known.zip(shown) {
            let of = |found: &BTreeMap<_, Result<FoundAgain, String>>| {
                let found = found.get(&id).cloned().unwrap_or_else(|| Err("it is not known".into()));
                found.map(|found| found.pages)
            };
            all.push(FoundPages {
                pid,
                differ: runs(id) != shown,
                shown: shown.iter().flatten().map(|run| u64::from(run.count)).sum(),
                found: [of(&found[0]), of(&found[1])],
            });
        }
        Ok(all)
    }

    /// Everything, and beside the snapshot the record of it that can be compared with a recording of /proc.
    ///
    /// # Errors
    /// As [`autopsy`](crate::autopsy).
    pub fn snapshot_with_record(self) -> Result<(Snapshot, Record)> {
        let threads = self.user_threads()?;
        let snapshot = self.take_snapshot()?;
        let mut record = Record::of_snapshot(&snapshot);
        let mount_ids = self.mount_ids.borrow();
        for process in &snapshot.processes {
            let Some(fields) = record.processes.get_mut(&process.pid) else { continue };
            if let Some(space) = process.address_space.and_then(|id| snapshot.address_spaces.get(&id)) {
                let layout = &space.layout;
                let texts = [
                    ("cmdline", layout.arg_start..layout.arg_end),
                    ("environ", layout.env_start..layout.env_end),
                ];
                for (name, range) in texts {
                    if let Some(bytes) = self.contents(space, range) {
                        put(fields, name, 0, Bytes(bytes));
                    }
                }
            }
            for descriptor in &process.descriptors {
                if let Some(id) = mount_ids.get(&descriptor.file) {
                    put(fields, "fdinfo.mnt_id", descriptor.fd as u64, id);
                }
            }
        }
        for (addr, tid, tgid) in threads {
            let count: Switches = self.kernel.read(addr)?;
            if let Some(fields) = record.processes.get_mut(&tgid) {
                let tid = tid as u64;
                fields.insert((SWITCHES, tid), format!("{} {}", count.nvcsw, count.nivcsw));
                let call = fields.get(&("thread.syscall", tid));
                if call.is_some_and(|call| MASKING.iter().any(|masking| call.starts_with(masking))) {
                    fields.insert(("thread.SigBlk", tid), format!("{:016x}", count.blocked));
                }
            }
        }
        drop(mount_ids);
        Ok((snapshot, record))
    }
}

impl Autopsy<'_> {
    /// What a process had in its own pages; `None` if some of it was elsewhere.
    fn contents(&self, space: &AddressSpace, range: Range<u64>) -> Option<Vec<u8>> {
        let len = range.end.checked_sub(range.start).filter(|len| *len <= MAX_TEXT)?;
        let mut bytes = vec![0; len as usize];
        let mut done = 0;
        while done < bytes.len() {
            let at = range.start + done as u64;
            let vma = space.vma_at(at)?;
            let within =
                |run: &&PageRun| (run.addr..run.addr + u64::from(run.count) * PAGE_SIZE).contains(&at);
            let run = vma.pages.iter().find(within)?;
            let n = (PAGE_SIZE - at % PAGE_SIZE).min((bytes.len() - done) as u64) as usize;
            let phys = run.pfn * PAGE_SIZE + (at - run.addr);
            self.kernel.vmcore().read_phys(phys, &mut bytes[done..done + n]).ok()?;
            done += n;
        }
        Some(bytes)
    }
}

impl Record {
    /// What /proc would have said.
    pub fn of_snapshot(snapshot: &Snapshot) -> Record {
        let processes = snapshot.processes.iter().map(|p| (p.pid, of_process(snapshot, p))).collect();
        Record { processes }
    }

    /// What /proc did say: a recording of all processes.
    ///
    /// # Errors
    /// When the directory cannot be read. Files that are missing in it (because the process had ended) are left out.
    pub fn read(directory: &Path) -> io::Result<Record> {
        let mut record = Record::default();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let Some(pid) = number(&path) else { continue };
            // Kernel threads have no program, and neither has who is about to end.
            if std::fs::read_link(path.join("exe")).is_ok() || is_zombie(&path) {
                record.processes.insert(pid as Pid, recorded_process(&path));
            }
        }
        let init = record.processes.get(&1).cloned().unwrap_or_default();
        for fields in record.processes.values_mut() {
            for ((name, which), value) in fields.iter_mut().filter(|((name, _), _)| name.starts_with("ns.")) {
                *value = if init.get(&(name, *which)) == Some(value) { "initial" } else { "own" }.to_owned();
            }
        }
        // All were translated by what the first process's links said, its own too.
        if let Some(fields) = record.processes.get_mut(&1) {
            fields
                .iter_mut()
                .filter(|((name, _), _)| name.starts_with("ns."))
                .for_each(|(_, v)| *v = "initial".into());
        }
        Ok(record)
    }
}

const NAMESPACES: [&str; 8] =
    ["ns.cgroup", "ns.ipc", "ns.mnt", "ns.net", "ns.pid_for_children", "ns.time", "ns.user", "ns.uts"];

const LIMITS: [&str; 16] = [
    "limits.cpu time",
    "limits.file size",
    "limits.data size",
    "limits.stack size",
    "limits.core file size",
    "limits.resident set",
    "limits.processes",
    "limits.open files",
    "limits.locked memory",
    "limits.address space",
    "limits.file locks",
    "limits.pending signals",
    "limits.msgqueue size",
    "limits.nice priority",
    "limits.realtime priority",
    "limits.realtime timeout",
];

/// Flags of smaps' `VmFlags` that a snapshot has.
const VM_FLAGS: [(&str, VmaFlags); 17] = [
    ("mr", VmaFlags::MAYREAD),
    ("mw", VmaFlags::MAYWRITE),
    ("me", VmaFlags::MAYEXEC),
    ("gd", VmaFlags::GROWSDOWN),
    ("lo", VmaFlags::LOCKED),
    ("sr", VmaFlags::SEQ_READ),
    ("rr", VmaFlags::RAND_READ),
    ("dc", VmaFlags::DONTCOPY),
    ("lf", VmaFlags::LOCKONFAULT),
    ("ac", VmaFlags::ACCOUNT),
    ("nr", VmaFlags::NORESERVE),
    ("sf", VmaFlags::SYNC),
    ("wf", VmaFlags::WIPEONFORK),
    ("dd", VmaFlags::DONTDUMP),
    ("hg", VmaFlags::HUGEPAGE),
    ("nh", VmaFlags::NOHUGEPAGE),
    ("mg", VmaFlags::MERGEABLE),
];

/// Numbers in /proc/PID/stat, counted from 1 as in proc(5).
const STAT: [(usize, &str); 16] = [
    (4, "stat.ppid"),
    (5, "stat.pgrp"),
    (6, "stat.session"),
    (7, "stat.tty_nr"),
    (20, "stat.num_threads"),
    (22, "stat.starttime"),
    (26, "stat.startcode"),
    (27, "stat.endcode"),
    (28, "stat.startstack"),
    (38, "stat.exit_signal"),
    (45, "stat.start_data"),
    (46, "stat.end_data"),
    (47, "stat.start_brk"),
    (48, "stat.arg_start"),
    (49, "stat.arg_end"),
    (50, "stat.env_start"),
];

/// Numbers in /proc/PID/task/TID/stat.
const THREAD_STAT: [(usize, &str); 3] =
    [(19, "thread.nice"), (40, "thread.rt_priority"), (41, "thread.policy")];

/// Lines of /proc/PID/status.
const STATUS: [(&str, &str); 4] = [
    ("Umask", "status.Umask"),
    ("ShdPnd", "status.ShdPnd"),
    ("SigIgn", "status.SigIgn"),
    ("SigCgt", "status.SigCgt"),
];

/// Lines of /proc/PID/task/TID/status.
const THREAD_STATUS: [(&str, &str); 14] = [
    ("Uid", "thread.Uid"),
    ("Gid", "thread.Gid"),
    ("Groups", "thread.Groups"),
    ("SigPnd", "thread.SigPnd"),
    ("SigBlk", "thread.SigBlk"),
    ("CapInh", "thread.CapInh"),
    ("CapPrm", "thread.CapPrm"),
    ("CapEff", "thread.CapEff"),
    ("CapBnd", "thread.CapBnd"),
    ("CapAmb", "thread.CapAmb"),
    ("NoNewPrivs", "thread.NoNewPrivs"),
    ("Seccomp", "thread.Seccomp"),
    ("Seccomp_filters", "thread.Seccomp_filters"),
    ("Cpus_allowed_list", "thread.Cpus_allowed_list"),
];

type Fields = BTreeMap<Field, String>;

fn put(fields: &mut Fields, name: &'static str, which: u64, value: impl ToString) {
    fields.insert((name, which), value.to_string());
}

// ---- the recording's side

fn number(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.parse().ok()
}

fn text(path: PathBuf) -> Option<String> {
    std::fs::metadata(&path).ok().filter(|m| m.len() <= MAX_FILE && m.is_file())?;
    std::fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn link(path: PathBuf) -> Option<String> {
    let target = std::fs::read_link(path).ok()?;
    Some(Bytes(target.as_os_str().as_bytes().to_vec()).to_string())
}

/// The fields of a stat line: the state comes third, what precedes it is `comm`.
fn stat(path: PathBuf) -> Option<(String, Vec<String>)> {
    let line = text(path)?;
    let (head, tail) = line.rsplit_once(')')?;
    let comm = head.split_once('(')?.1.to_owned();
    Some((comm, tail.split_whitespace().map(str::to_owned).collect()))
}

fn is_zombie(path: &Path) -> bool {
    stat(path.join("stat")).is_some_and(|(_, fields)| fields.first().is_some_and(|state| state == "Z"))
}

fn recorded_process(path: &Path) -> Fields {
    let mut fields = Fields::new();
    let f = &mut fields;
    if let Some((comm, numbers)) = stat(path.join("stat")) {
        put(f, "stat.comm", 0, comm);
        put(f, "stat.state", 0, process_letter(numbers.first().map_or("", String::as_str)));
        // The list begins with the third field.
        for (index, name) in STAT {
            if let Some(value) = numbers.get(index - 3) {
                put(f, name, 0, value);
            }
        }
    }
    if is_zombie(path) {
        f.retain(|(name, _), _| {
            ["stat.comm", "stat.state", "stat.ppid", "stat.pgrp", "stat.session"].contains(name)
        });
        return fields;
    }
    recorded_lines(f, &path.join("status"), &STATUS, 0);
    for (line, name) in text(path.join("limits")).unwrap_or_default().lines().skip(1).zip(LIMITS) {
        let values: Vec<&str> = line.get(26..).unwrap_or("").split_whitespace().take(2).collect();
        put(f, name, 0, values.join(" "));
    }
    for (file, name) in [("oom_score_adj", "oom_score_adj"), ("cgroup", "cgroup")] {
        if let Some(value) = text(path.join(file)) {
            let value = value
                .lines()
                .find_map(|line| line.strip_prefix("0::").or(Some(line)))
                .unwrap_or("")
                .to_owned();
            put(f, name, 0, value);
        }
    }
    for (id, mount) in text(path.join("mountinfo")).unwrap_or_default().lines().filter_map(recorded_mount) {
        put(f, "mounts", id, mount);
    }
    let timers = format!("\n{}", text(path.join("timers")).unwrap_or_default());
    for entry in timers.split("\nID: ").skip(1) {
        let id = entry.split_whitespace().next().and_then(|id| id.parse().ok()).unwrap_or(u64::MAX);
        put(f, "timers", id, format!("ID: {entry}").replace('\n', " ").trim());
    }
    for name in ["cmdline", "environ"] {
        if let Ok(bytes) = std::fs::read(path.join(name)) {
            put(f, name, 0, Bytes(bytes));
        }
    }
    if let Ok(bytes) = std::fs::read(path.join("auxv")) {
        let words = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w));
        put(f, "auxv", 0, hex_words(words));
    }
    for (file, name) in [("exe", "exe"), ("cwd", "cwd"), ("root", "root")] {
        if let Some(target) = link(path.join(file)) {
            put(f, name, 0, target);
        }
    }
    for name in NAMESPACES {
        if let Some(target) = link(path.join("ns").join(&name[3..])) {
            put(f, name, 0, target);
        }
    }
    recorded_mappings(f, path);
    recorded_descriptors(f, path);
    for thread in std::fs::read_dir(path.join("task")).into_iter().flatten().flatten() {
        if let Some(tid) = number(&thread.path()) {
            recorded_thread(f, &thread.path(), tid);
        }
    }
    fields
}

/// Lines `Key:\tvalue` of a file.
fn recorded_lines(fields: &mut Fields, path: &Path, wanted: &[(&str, &'static str)], which: u64) {
    for line in text(path.to_owned()).unwrap_or_default().lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        if let Some((_, name)) = wanted.iter().find(|(wanted, _)| *wanted == key) {
            put(fields, name, which, value.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
}

fn recorded_mappings(fields: &mut Fields, path: &Path) {
    let mut start = None;
    let mut private = false;
    let mut anonymous: u64 = 0;
    for line in text(path.join("smaps")).unwrap_or_default().lines() {
        if let Some((range, rest)) = line.split_once(' ')
            && let Some((from, to)) = range.split_once('-')
            && let Ok(from) = u64::from_str_radix(from, 16)
        {
            let parts: Vec<&str> = rest.splitn(5, ' ').map(str::trim).collect();
            start = (!rest.ends_with("[vsyscall]")).then_some(from);
            private = parts.first().is_some_and(|perms| perms.ends_with('p'));
            if let Some(start) = start {
                let words = [to].into_iter().chain(parts.iter().copied()).filter(|part| !part.is_empty());
                put(fields, "maps", start, words.collect::<Vec<_>>().join(" "));
            }
        } else if let Some(start) = start
            && let Some((key, value)) = line.split_once(':')
        {
            let kib = value.trim().trim_end_matches(" kB");
            match key {
                "VmFlags" => put(fields, "smaps.VmFlags", start, known_flags(value)),
                "Anonymous" => anonymous = kib.parse().unwrap_or(0),
                // A page can be in memory and count as swapped out nevertheless.
                "Swap" if private => {
                    let swap: u64 = kib.parse().unwrap_or(0);
                    put(fields, "smaps.Anonymous+Swap", start, anonymous + swap);
                }
                _ => {}
            }
        }
    }
}

fn known_flags(flags: &str) -> String {
    let wanted = |flag: &&str| VM_FLAGS.iter().any(|(name, _)| name == flag);
    flags.split_whitespace().filter(wanted).collect::<Vec<_>>().join(" ")
}

fn recorded_descriptors(fields: &mut Fields, path: &Path) {
    for entry in std::fs::read_dir(path.join("fd")).into_iter().flatten().flatten() {
        if let (Some(fd), Some(target)) = (number(&entry.path()), link(entry.path())) {
            put(fields, "fd", fd, target);
            let info = path.join("fdinfo").join(fd.to_string());
            let wanted = [
                ("pos", "fdinfo.pos"),
                ("flags", "fdinfo.flags"),
                ("mnt_id", "fdinfo.mnt_id"),
                ("ino", "fdinfo.ino"),
            ];
            recorded_lines(fields, &info, &wanted, fd);
        }
    }
}

fn recorded_thread(fields: &mut Fields, path: &Path, tid: u64) {
    let f = fields;
    if let Some((comm, numbers)) = stat(path.join("stat")) {
        put(f, "thread.comm", tid, comm);
        put(f, "thread.state", tid, numbers.first().map_or("", String::as_str));
        for (index, name) in THREAD_STAT {
            if let Some(value) = numbers.get(index - 3) {
                put(f, name, tid, value);
            }
        }
    }
    recorded_lines(f, &path.join("status"), &THREAD_STATUS, tid);
    if let Some(value) = text(path.join("personality")) {
        put(f, "thread.personality", tid, value.trim());
    }
    if let Some(value) = text(path.join("syscall")).filter(|value| value.trim() != "running") {
        put(f, "thread.syscall", tid, value.trim());
    }
    let mut switches = Fields::new();
    let wanted = [("voluntary_ctxt_switches", "a"), ("nonvoluntary_ctxt_switches", "b")];
    recorded_lines(&mut switches, &path.join("status"), &wanted, 0);
    let counts: Vec<&str> = switches.values().map(String::as_str).collect();
    put(f, SWITCHES, tid, counts.join(" "));
}

// ---- the snapshot's side

fn hex_words(words: impl Iterator<Item = u64>) -> String {
    words.map(|word| format!("{word:x}")).collect::<Vec<_>>().join(" ")
}

fn signal_set(signals: impl Iterator<Item = i32>) -> String {
    format!("{:016x}", signals.map(crate::signal::mask).fold(0, |all, bit| all | bit))
}

/// Running and sleeping is a matter of the moment, for a process.
fn process_letter(state: &str) -> &str {
    match state {
        "R" | "S" | "D" => "alive",
        other => other,
    }
}

fn state_letter(state: ThreadState) -> &'static str {
    match state {
        ThreadState::Running => "R",
        ThreadState::Sleeping => "S",
        ThreadState::DiskSleep => "D",
        ThreadState::Stopped => "T",
        ThreadState::Traced => "t",
        ThreadState::Dead => "Z",
        ThreadState::Other => "I",
    }
}

fn of_process(snapshot: &Snapshot, process: &Process) -> Fields {
    let mut fields = Fields::new();
    let f = &mut fields;
    put(f, "stat.comm", 0, &process.comm);
    let leader = process.leader().map_or("Z", |leader| state_letter(leader.state));
    put(f, "stat.state", 0, process_letter(leader));
    put(f, "stat.ppid", 0, process.ppid);
    put(f, "stat.pgrp", 0, process.pgid);
    put(f, "stat.session", 0, process.sid);
    if matches!(process.state, ProcessState::Zombie { .. }) {
        return fields;
    }
    let tty = process.ctty.and_then(|id| snapshot.ttys.get(&id));
    // new_encode_dev(): 12 bits of major above the lower 8 of minor.
    let tty_nr = tty.map_or(0, |t| t.minor & 0xff | t.major << 8 | (t.minor & !0xff) << 12);
    put(f, "stat.tty_nr", 0, tty_nr);
    put(f, "stat.num_threads", 0, process.threads.len());
    put(f, "stat.starttime", 0, process.start_boottime_ns / TICK_NS);
    put(f, "stat.exit_signal", 0, process.exit_signal);
    put(f, "status.Umask", 0, format!("{:04o}", process.fs.umask));
    put(f, "status.ShdPnd", 0, signal_set(process.signals.pending.iter().map(|s| s.signo)));
    for timer in &process.timers.posix {
        put(f, "timers", timer.id as u64, timer.proc_entry().replace('\n', " ").trim());
    }
    let handled = |wanted: fn(u64) -> bool| {
        let actions = process.signals.actions.iter().zip(1..);
        signal_set(actions.filter(|(action, _)| wanted(action.handler)).map(|(_, signo)| signo))
    };
    put(f, "status.SigIgn", 0, handled(|handler| handler == 1));
    put(f, "status.SigCgt", 0, handled(|handler| handler > 1));
    for (limit, name) in process.rlimits.iter().zip(LIMITS) {
        let show = |value: u64| if value == u64::MAX { "unlimited".to_owned() } else { value.to_string() };
        put(f, name, 0, format!("{} {}", show(limit.cur), show(limit.max)));
    }
    put(f, "oom_score_adj", 0, process.oom_score_adj);
    put(f, "cgroup", 0, &process.cgroup);
    put(f, "cwd", 0, format!("{}{}", process.fs.cwd, if process.fs.cwd_deleted { " (deleted)" } else { "" }));
    put(f, "root", 0, &process.fs.root);
    // As seen from there, others are not in the recording.
    if process.fs.root.as_bytes() == b"/" {
        let own = process.mount_namespace.and_then(|id| snapshot.mount_namespaces.get(&id));
        let mounts = own.map_or(&snapshot.mounts, |namespace| &namespace.mounts);
        for m in mounts.iter().filter(|m| m.fs_type.as_bytes() != b"rootfs") {
            put(f, "mounts", m.id as u64, mount_line(m));
        }
    }
    let ns = &process.namespaces;
    let initial = [ns.cgroup, ns.ipc, ns.mnt, ns.net, ns.pid, ns.time, ns.user, ns.uts];
    for (name, initial) in NAMESPACES.into_iter().zip(initial) {
        put(f, name, 0, if initial { "initial" } else { "own" });
    }
    if let Some(space) = process.address_space.and_then(|id| snapshot.address_spaces.get(&id)) {
        of_address_space(f, snapshot, space);
    }
    for descriptor in &process.descriptors {
        of_descriptor(
            f,
            snapshot,
            descriptor.fd as u64,
            descriptor.cloexec,
            snapshot.files.get(&descriptor.file),
        );
    }
    for thread in &process.threads {
        of_thread(f, snapshot, thread);
    }
    fields
}

/// A line of mountinfo: its number, and the rest as [`mount_line`] has it.
fn recorded_mount(line: &str) -> Option<(u64, String)> {
    let fields: Vec<&str> = line.split(' ').collect();
    let dash = fields.iter().position(|field| *field == "-")?;
    let [id, parent, device, root, at, flags] = fields.get(..6)?.try_into().ok()?;
    let group = |name: &str| fields[6..dash].iter().find_map(|field| field.strip_prefix(name)).unwrap_or("0");
    let fs_type = fields.get(dash + 1)?;
    let (shared, master) = (group("shared:"), group("master:"));
    Some((id.parse().ok()?, format!("{parent} {device} {root} {at} {flags} {shared} {master} {fs_type}")))
}

/// Parent, device, root, mount point, flags, groups and type of a mount, as mountinfo shows them (show_mountinfo(), fs/proc_namespace.c).
fn mount_line(m: &snapshot::Mount) -> String {
    let table = [
        (MountFlags::NOSUID, ",nosuid"),
        (MountFlags::NODEV, ",nodev"),
        (MountFlags::NOEXEC, ",noexec"),
        (MountFlags::NOATIME, ",noatime"),
        (MountFlags::NODIRATIME, ",nodiratime"),
        (MountFlags::RELATIME, ",relatime"),
    ];
    let access = if m.flags.contains(MountFlags::READ_ONLY) { "ro" } else { "rw" };
    let others = table.iter().filter(|(flag, _)| m.flags.contains(*flag)).map(|(_, text)| *text);
    let flags: String = std::iter::once(access).chain(others).collect();
    format!(
        "{} {}:{} {} {} {flags} {} {} {}",
        m.parent, m.dev_major, m.dev_minor, m.root, m.mountpoint, m.peer_group, m.master, m.fs_type
    )
}

fn of_address_space(f: &mut Fields, snapshot: &Snapshot, space: &AddressSpace) {
    let layout = &space.layout;
    let numbers = [
        ("stat.startcode", layout.start_code),
        ("stat.endcode", layout.end_code),
        ("stat.startstack", layout.start_stack),
        ("stat.start_data", layout.start_data),
        ("stat.end_data", layout.end_data),
        ("stat.start_brk", layout.start_brk),
        ("stat.arg_start", layout.arg_start),
        ("stat.arg_end", layout.arg_end),
        ("stat.env_start", layout.env_start),
    ];
    for (name, value) in numbers {
        put(f, name, 0, value);
    }
    put(f, "auxv", 0, hex_words(layout.auxv.iter().copied()));
    if let Some(exe) = space.exe.and_then(|id| snapshot.files.get(&id)) {
        put(f, "exe", 0, shown_path(exe));
    }
    for vma in &space.vmas {
        let name = mapping_name(snapshot, space, vma);
        put(f, "maps", vma.start, mapping_line(snapshot, vma, &name));
        let flags: Vec<&str> =
            VM_FLAGS.iter().filter(|(_, flag)| vma.flags.contains(*flag)).map(|(n, _)| *n).collect();
        put(f, "smaps.VmFlags", vma.start, flags.join(" "));
        if !vma.shared {
            let pages: u64 = vma.pages.iter().map(|run| u64::from(run.count)).sum();
            put(f, "smaps.Anonymous+Swap", vma.start, pages * 4);
        }
    }
}

/// As /proc/PID/maps shows a mapping, without the first address and the padding.
fn mapping_line(snapshot: &Snapshot, vma: &Vma, name: &str) -> String {
    let letter = |flag: Prot, letter: char| if vma.prot.contains(flag) { letter } else { '-' };
    let (inode, offset) = match &vma.kind {
        VmaKind::File { file, offset } => (snapshot.files.get(file).map(|f| f.inode), *offset),
        VmaKind::SharedAnonymous { inode, offset } => (Some(*inode), *offset),
        VmaKind::AioRing { inode } => (Some(*inode), 0),
        VmaKind::SysvShm { id, offset } => (snapshot.shm_segment(*id).map(|s| s.inode), *offset),
        _ => (None, 0),
    };
    let inode = inode.and_then(|id| snapshot.inodes.get(&id));
    let (major, minor, ino) = inode.map_or((0, 0, 0), |i| (i.dev_major, i.dev_minor, i.ino));
    let mut line = format!(
        "{:08x} {}{}{}{} {offset:08x} {major:02x}:{minor:02x} {ino}",
        vma.end,
        letter(Prot::READ, 'r'),
        letter(Prot::WRITE, 'w'),
        letter(Prot::EXEC, 'x'),
        if vma.shared { 's' } else { 'p' },
    );
    if !name.is_empty() {
        let _ = write!(line, " {name}");
    }
    line
}

/// The last column of /proc/PID/maps (`show_map_vma()`, fs/proc/task_mmu.c).
fn mapping_name(snapshot: &Snapshot, space: &AddressSpace, vma: &Vma) -> String {
    let layout = &space.layout;
    match &vma.kind {
        VmaKind::File { file, .. } => snapshot.files.get(file).map(shown_path).unwrap_or_default(),
        VmaKind::SharedAnonymous { .. } => match &vma.name {
            Some(name) => format!("[anon_shmem:{name}]"),
            None => "/dev/zero (deleted)".into(),
        },
        VmaKind::SysvShm { id, .. } => snapshot.shm_segment(*id).map(|s| s.file_name()).unwrap_or_default(),
        VmaKind::Special { name } => name.to_string(),
        VmaKind::AioRing { .. } => "/[aio] (deleted)".into(),
        VmaKind::AnonymousHuge { .. } => "/anon_hugepage (deleted)".into(),
        VmaKind::Unsupported { .. } => String::new(),
        VmaKind::Anonymous if vma.start <= layout.brk && vma.end >= layout.start_brk => "[heap]".into(),
        VmaKind::Anonymous if vma.start <= layout.start_stack && vma.end >= layout.start_stack => {
            "[stack]".into()
        }
        VmaKind::Anonymous => vma.name.as_ref().map(|name| format!("[anon:{name}]")).unwrap_or_default(),
    }
}

fn shown_path(file: &OpenFile) -> String {
    format!("{}{}", file.path, if file.deleted { " (deleted)" } else { "" })
}

fn of_descriptor(f: &mut Fields, snapshot: &Snapshot, fd: u64, cloexec: bool, file: Option<&OpenFile>) {
    const O_CLOEXEC: i32 = 0o2_000_000;
    let Some(file) = file else { return };
    let shown = match (&file.kind, snapshot.inodes.get(&file.inode)) {
        (FileKind::Namespace(namespace), Some(inode)) => format!("{}:[{}]", namespace.name, inode.ino),
        _ => shown_path(file),
    };
    put(f, "fd", fd, shown);
    put(f, "fdinfo.pos", fd, file.pos);
    put(f, "fdinfo.flags", fd, format!("0{:o}", file.flags | if cloexec { O_CLOEXEC } else { 0 }));
    if let Some(inode) = snapshot.inodes.get(&file.inode) {
        put(f, "fdinfo.ino", fd, inode.ino);
    }
}

fn of_thread(f: &mut Fields, snapshot: &Snapshot, thread: &Thread) {
    let tid = thread.tid as u64;
    put(f, "thread.comm", tid, &thread.comm);
    put(f, "thread.state", tid, state_letter(thread.state));
    put(f, "thread.nice", tid, thread.scheduling.nice);
    put(f, "thread.rt_priority", tid, thread.scheduling.rt_priority);
    put(f, "thread.policy", tid, thread.scheduling.policy);
    put(f, "thread.personality", tid, format!("{:08x}", thread.personality));
    let c = &thread.credentials;
    put(f, "thread.Uid", tid, format!("{} {} {} {}", c.uid, c.euid, c.suid, c.fsuid));
    put(f, "thread.Gid", tid, format!("{} {} {} {}", c.gid, c.egid, c.sgid, c.fsgid));
    put(f, "thread.Groups", tid, c.groups.iter().map(u32::to_string).collect::<Vec<_>>().join(" "));
    let caps = [
        ("thread.CapInh", c.capabilities.inheritable),
        ("thread.CapPrm", c.capabilities.permitted),
        ("thread.CapEff", c.capabilities.effective),
        ("thread.CapBnd", c.capabilities.bounding),
        ("thread.CapAmb", c.capabilities.ambient),
    ];
    for (name, set) in caps {
        put(f, name, tid, format!("{set:016x}"));
    }
    put(f, "thread.NoNewPrivs", tid, u8::from(thread.no_new_privs));
    let (mode, filters) = match &thread.seccomp {
        Seccomp::Off => (0, 0),
        Seccomp::Strict => (1, 0),
        Seccomp::Filter { filters } => (2, filters.len()),
    };
    put(f, "thread.Seccomp", tid, mode);
    put(f, "thread.Seccomp_filters", tid, filters);
    put(f, "thread.SigPnd", tid, signal_set(thread.pending.iter().map(|s| s.signo)));
    put(f, "thread.SigBlk", tid, format!("{:016x}", thread.blocked));
    put(
        f,
        "thread.Cpus_allowed_list",
        tid,
        cpu_list(&thread.scheduling.affinity, snapshot.kernel.online_cpus),
    );
    if thread.state != ThreadState::Running && thread.on_cpu.is_none() {
        let r = &thread.regs;
        let nr = r.orig_rax as i32;
        let args = match nr {
            -1 => String::new(),
            _ => [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9].iter().map(|arg| format!(" {arg:#x}")).collect(),
        };
        put(f, "thread.syscall", tid, format!("{nr}{args} {:#x} {:#x}", r.rsp, r.rip));
    }
}

/// `0-2,5`; no CPUs: all.
fn cpu_list(cpus: &[u32], online: u32) -> String {
    let all: Vec<u32> = (0..online).collect();
    let cpus = if cpus.is_empty() { &all } else { cpus };
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *cpu => *last = *cpu,
            _ => ranges.push((*cpu, *cpu)),
        }
    }
    let show = |(a, b): &(u32, u32)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    ranges.iter().map(show).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(fields: &[(Field, &str)]) -> Record {
        let fields = fields.iter().map(|(field, value)| (*field, (*value).to_owned())).collect();
        Record { processes: BTreeMap::from([(7, fields)]) }
    }

    #[test]
    fn what_moved_is_not_held_against_a_process_that_ran() {
        let old = record(&[((SWITCHES, 7), "1 1"), (("fd", 3), "/a"), (("exe", 0), "/x")]);
        let ran = record(&[((SWITCHES, 7), "2 1"), (("fd", 3), "/b"), (("exe", 0), "/y")]);
        let result = compare(&old, &ran);
        assert_eq!(result.differences.len(), 1, "{:?}", result.differences);
        assert_eq!(result.differences[0].field.0, "exe");
        let new_thread = record(&[((SWITCHES, 7), "2 1"), (("thread.comm", 8), "x")]);
        assert!(compare(&record(&[((SWITCHES, 7), "1 1")]), &new_thread).differences.is_empty());
        let state = ("thread.state", 7);
        let on_cpu = |fd| record(&[((SWITCHES, 7), "1 1"), (("fd", 3), fd), (state, "R")]);
        assert!(compare(&on_cpu("/a"), &on_cpu("/b")).differences.is_empty());
        let still = record(&[((SWITCHES, 7), "1 1"), (("fd", 3), "/b"), (("exe", 0), "/x")]);
        let result = compare(&old, &still);
        assert_eq!(result.differences[0].to_string(), "7 () fd[0x3]: expected /a, found /b");
    }

    #[test]
    fn what_is_missing_is_a_difference() {
        let old = record(&[((SWITCHES, 7), "1 1"), (("fd", 3), "/a")]);
        let new = record(&[((SWITCHES, 7), "1 1"), (("cwd", 0), "/")]);
        assert_eq!(compare(&old, &new).differences.len(), 2);
        assert!(compare(&old, &old).differences.is_empty());
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list(&[], 4), "0-3");
        assert_eq!(cpu_list(&[0, 1, 2, 5, 7], 8), "0-2,5,7");
    }
}
