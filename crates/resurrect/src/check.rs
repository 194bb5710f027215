//! The check before anybody is let go: what /proc says of a rebuilt process, against the snapshot.
//!
//! What may differ is listed in `docs/kernel-objects.md`; anything else means that the process is given up before it has run.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;

use snapshot::{
    AddressSpace, Bytes, Credentials, FileKind, OpenFile, PendingSignal, Pid, Process, ProcessState, Prot,
    Snapshot, Thread, VmaFlags, VmaKind,
};

use crate::credentials::{parse_status, status_field};
use crate::file::{Files, comparable_flags};
use crate::memory::{MapsLine, parse_maps};
use crate::{lock, seccomp, sys, timer};

/// More differences than this are not listed.
const LIMIT: usize = 8;

/// What a process is compared with beyond its own entry.
pub(crate) struct Expected<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) files: &'a Files,
    pub(crate) process: &'a Process,
    pub(crate) mm: &'a AddressSpace,
    /// Threads that live.
    pub(crate) threads: Vec<&'a Thread>,
    /// The parent comes back and must be the parent again.
    pub(crate) parent: Option<Pid>,
    /// Its terminal is its controlling terminal again.
    pub(crate) has_ctty: bool,
}

/// Differences, in words; empty if the process is as it was.
pub(crate) fn differences(e: &Expected<'_>) -> Vec<String> {
    let mut found = Vec::new();
    // A leader that has exited shows nothing: look through a thread that lives.
    let Some(main) = e.threads.first() else { return vec!["it has no thread".into()] };
    let dir = format!("/proc/{}/task/{}", e.process.pid, main.tid);
    found.extend(maps(e, &dir));
    found.extend(relations(e));
    found.extend(threads(e));
    found.extend(descriptors(e, &dir));
    found.extend(lock::differences(e.snapshot, e.process, &dir));
    found.extend(places(e, &dir));
    found.extend(limits(e.process));
    found.extend(timer::differences(e.process));
    found.truncate(LIMIT);
    found
}

/// A zombie must be one, with its status.
pub(crate) fn zombie_differences(process: &Process) -> Vec<String> {
    let ProcessState::Zombie { status } = process.state else { return vec![] };
    let Some(stat) = Stat::read(&format!("/proc/{}/stat", process.pid)) else {
        return vec!["it is not there".into()];
    };
    const CORE_DUMPED: i64 = 0x80;
    let mut found = Vec::new();
    found.extend(differ("state", stat.state, 'Z'));
    found.extend(differ("exit status", stat.field(52) & !CORE_DUMPED, i64::from(status) & !CORE_DUMPED));
    found.extend(differ("parent", stat.field(4), process.ppid.into()));
    found.extend(differ("process group", stat.field(5), process.pgid.into()));
    found.extend(differ("session", stat.field(6), process.sid.into()));
    found
}

fn differ<T: PartialEq + std::fmt::Display>(what: &str, is: T, was: T) -> Option<String> {
    (is != was).then(|| format!("{what} is {is} and was {was}"))
}

/// /proc/PID/stat.
struct Stat {
    state: char,
    /// From the third field (the state) on.
    fields: Vec<i64>,
}

impl Stat {
    fn read(path: &str) -> Option<Self> {
        let text = sys::read_proc(path).ok()?;
        // The name may contain blanks and parentheses.
        let rest = text.get(text.iter().rposition(|&b| b == b')')? + 2..)?;
        let rest = std::str::from_utf8(rest).ok()?;
        let fields = rest.split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
        Some(Self { state: rest.chars().next()?, fields })
    }

    /// By its number in proc(5), from 1.
    fn field(&self, number: usize) -> i64 {
        self.fields.get(number - 3).copied().unwrap_or(0)
    }
}

/// Whether the process of a `/proc/PID/stat` is stopped by job control, or runs no more.
pub(crate) fn has_stopped(path: &str) -> bool {
    Stat::read(path).is_none_or(|stat| matches!(stat.state, 'T' | 'Z' | 'X'))
}

/// What is compared of a mapping: labels such as `[heap]` are derived from addresses that are set elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    start: u64,
    end: u64,
    prot: Prot,
    shared: bool,
    /// `None`: anonymous.
    object: Option<(Bytes, u64)>,
}

impl Shown {
    fn describe(&self) -> String {
        let flag = |p, c| if self.prot.contains(p) { c } else { '-' };
        let object =
            self.object.as_ref().map_or(String::new(), |(path, offset)| format!(" {path}+{offset:x}"));
        format!(
            "{:x}-{:x} {}{}{}{}{object}",
            self.start,
            self.end,
            flag(Prot::READ, 'r'),
            flag(Prot::WRITE, 'w'),
            flag(Prot::EXEC, 'x'),
            if self.shared { 's' } else { 'p' },
        )
    }

    fn continues_in(&self, next: &Self) -> bool {
        let same_object = match (&self.object, &next.object) {
            (None, None) => true,
            (Some((a, x)), Some((b, y))) => {
                a == b && x + (self.end - self.start) == *y && !a.as_bytes().starts_with(b"[")
            }
            _ => false,
        };
        self.end == next.start && self.prot == next.prot && self.shared == next.shared && same_object
    }
}

/// Neighbours joined: where the kernel cuts equal neighbours depends on the order in which they came to be.
fn joined(all: impl Iterator<Item = Shown>) -> Vec<Shown> {
    let mut list: Vec<Shown> = Vec::new();
    for next in all {
        match list.last_mut() {
            Some(last) if last.continues_in(&next) => last.end = next.end,
            _ => list.push(next),
        }
    }
    list
}

fn shown_now(line: MapsLine) -> Shown {
    let path = line.path.as_bytes();
    let label = [&b"[heap]"[..], b"[stack]", b"[anon"].iter().any(|l| path.starts_with(l));
    let object = (!path.is_empty() && !label).then_some((without_lost_name(line.path), line.offset));
    Shown { start: line.start, end: line.end, prot: line.prot, shared: line.shared, object }
}

const DELETED: &[u8] = b" (deleted)";
/// What /proc shows for memory that was mapped with MAP_HUGETLB.
const ANONYMOUS_HUGE: &str = "/anon_hugepage (deleted)";

/// How /proc shows a file; see [`without_lost_name`].
fn shown_path(file: &OpenFile) -> Bytes {
    let suffix = if file.deleted { DELETED } else { b"" };
    without_lost_name(Bytes([file.path.as_bytes(), suffix].concat()))
}

/// A file that has lost its name may have none at all when it is back: somebody else may have that name now.
fn without_lost_name(path: Bytes) -> Bytes {
    const MEMORY: [&[u8]; 4] = [b"/dev/zero", b"/SYSV", b"/memfd:", b"/anon_hugepage"];
    let is_lost =
        path.as_bytes().ends_with(DELETED) && !MEMORY.iter().any(|m| path.as_bytes().starts_with(m));
    if is_lost { Bytes(DELETED.to_vec()) } else { path }
}

fn maps(e: &Expected<'_>, dir: &str) -> Vec<String> {
    let now = sys::read_proc(&format!("{dir}/maps")).ok().and_then(|text| parse_maps(&text));
    let Some(now) = now else { return vec!["its maps cannot be read".into()] };
    let now = joined(now.into_iter().map(shown_now));
    let then = joined(e.mm.vmas.iter().map(|vma| {
        let object = match &vma.kind {
            VmaKind::Anonymous | VmaKind::Unsupported { .. } => None,
            VmaKind::File { file, offset } => {
                let file = e.snapshot.files.get(file);
                Some((file.map(shown_path).unwrap_or_default(), *offset))
            }
            VmaKind::SysvShm { id, offset } => {
                let segment = e.snapshot.shm_segment(*id);
                segment.map(|s| (s.file_name().as_str().into(), *offset))
            }
            VmaKind::SharedAnonymous { offset, .. } if vma.flags.contains(VmaFlags::HUGETLB) => {
                Some((ANONYMOUS_HUGE.into(), *offset))
            }
            VmaKind::SharedAnonymous { offset, .. } => Some(("/dev/zero (deleted)".into(), *offset)),
            VmaKind::AnonymousHuge { .. } => Some((ANONYMOUS_HUGE.into(), 0)),
            VmaKind::AioRing { .. } => Some((without_lost_name("/[aio] (deleted)".into()), 0)),
            VmaKind::Special { name } => Some((name.clone(), 0)),
        };
        Shown { start: vma.start, end: vma.end, prot: vma.prot, shared: vma.shared, object }
    }));
    let extra = now.iter().filter(|l| !then.contains(l)).map(|l| format!("has mapping {}", l.describe()));
    let missing = then.iter().filter(|l| !now.contains(l)).map(|l| format!("lacks mapping {}", l.describe()));
    missing.chain(extra).collect()
}

fn relations(e: &Expected<'_>) -> Vec<String> {
    let p = e.process;
    let Some(stat) = Stat::read(&format!("/proc/{}/stat", p.pid)) else {
        return vec!["it is not there".into()];
    };
    let mut found = Vec::new();
    if let Some(parent) = e.parent {
        found.extend(differ("parent", stat.field(4), parent.into()));
    }
    found.extend(differ("process group", stat.field(5), p.pgid.into()));
    found.extend(differ("session", stat.field(6), p.sid.into()));
    let tty = p.ctty.filter(|_| e.has_ctty).and_then(|id| e.snapshot.ttys.get(&id));
    // new_encode_dev: minor bits 0 to 7, major, minor bits 8 and up.
    let device = tty.map_or(0, |t| i64::from(t.minor & 0xff | t.major << 8 | (t.minor & !0xff) << 12));
    found.extend(differ("controlling terminal", stat.field(7), device));
    found
}

fn set_of(pending: &[PendingSignal]) -> u64 {
    let bits = pending.iter().map(|s| s.signo).filter(|s| (1..=64).contains(s));
    let all = bits.fold(0, |set, s| set | 1u64 << (s - 1));
    all & !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1) | 1 << (libc::SIGTRAP - 1))
}

fn threads(e: &Expected<'_>) -> Vec<String> {
    let p = e.process;
    let mut found = Vec::new();
    let listed: BTreeSet<Pid> = numbers(&format!("/proc/{}/task", p.pid)).into_iter().collect();
    let expected: BTreeSet<Pid> = e.threads.iter().map(|t| t.tid).chain([p.pid]).collect();
    if listed != expected {
        found.push(format!("its threads are {listed:?} and were {expected:?}"));
    }
    let action_set = |f: fn(u64) -> bool| {
        let numbered = p.signals.actions.iter().zip(0..64);
        numbered.filter(|(a, _)| f(a.handler)).fold(0u64, |set, (_, bit)| set | 1 << bit)
    };
    let ignored = action_set(|h| h == libc::SIG_IGN as u64);
    let caught = action_set(|h| h > libc::SIG_IGN as u64);
    for t in &e.threads {
        let path = format!("/proc/{}/task/{}/status", p.pid, t.tid);
        let Some(now) = sys::read_proc(&path).ok().and_then(|s| Some((parse_status(&s)?, s))) else {
            found.push(format!("thread {}: no status", t.tid));
            continue;
        };
        let (credentials, status) = now;
        let then = Credentials { securebits: 0, ..t.credentials.clone() };
        // The order of groups is the kernel's own.
        let sorted = |mut c: Credentials| {
            c.groups.sort_unstable();
            c
        };
        if sorted(credentials.clone()) != sorted(then.clone()) {
            found.push(format!("thread {}: credentials are {credentials:?} and were {then:?}", t.tid));
        }
        let set = |name: &str| status_field(&status, name).and_then(|v| u64::from_str_radix(v, 16).ok());
        let mut compare = |name: &str, was: u64| {
            let is = set(name).unwrap_or(!was);
            if is != was {
                found.push(format!("thread {}: {name} is {is:x} and was {was:x}", t.tid));
            }
        };
        // These two can never be blocked.
        compare("SigBlk", t.blocked & !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1)));
        compare("SigIgn", ignored);
        compare("SigCgt", caught);
        // Timers run already.
        let (of_process, of_thread) = timer::signals(p, t.tid);
        compare("SigPnd", set_of(&t.pending) | set("SigPnd").unwrap_or(0) & of_thread);
        // A child that was given up is a child that died: one more SIGCHLD.
        let children = 1 << (libc::SIGCHLD - 1);
        let pending = set_of(&p.signals.pending);
        compare("ShdPnd", pending | set("ShdPnd").unwrap_or(0) & (children | of_process));
        let (mode, filters) = seccomp::shown(t);
        for (name, was) in [("Seccomp", mode.to_string()), ("Seccomp_filters", filters.to_string())] {
            found.extend(differ(name, status_field(&status, name).unwrap_or("?"), was.as_str()));
        }
        found.extend(differ(
            "no_new_privs",
            status_field(&status, "NoNewPrivs").unwrap_or("?"),
            if t.no_new_privs { "1" } else { "0" },
        ));
    }
    found
}

/// Names of a /proc directory that are numbers.
fn numbers(dir: &str) -> Vec<i32> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|d| d.file_name().to_str()?.parse().ok()).collect()
}

fn descriptors(e: &Expected<'_>, dir: &str) -> Vec<String> {
    let mut found = Vec::new();
    let now: BTreeSet<i32> = numbers(&format!("{dir}/fd")).into_iter().collect();
    let then: BTreeSet<i32> = e.process.descriptors.iter().map(|d| d.fd).collect();
    if now != then {
        found.push(format!("its descriptors are {now:?} and were {then:?}"));
    }
    for d in &e.process.descriptors {
        let Some(file) = e.snapshot.files.get(&d.file).filter(|_| !e.files.is_dead(d.file)) else { continue };
        let info = sys::read_proc(&format!("{dir}/fdinfo/{}", d.fd)).unwrap_or_default();
        let number = |name, radix| status_field(&info, name).and_then(|v| i64::from_str_radix(v, radix).ok());
        let at = |what: &str| format!("descriptor {} ({}): {what}", d.fd, file.path);
        if let Some(flags) = number("flags", 8) {
            let (is, was) = (comparable_flags(flags as i32), comparable_flags(file.flags));
            if is != was {
                found.push(at(&format!("flags are {is:o} and were {was:o}")));
            }
            let cloexec = flags as i32 & libc::O_CLOEXEC != 0;
            found.extend(differ(&at("close-on-exec"), cloexec, d.cloexec));
        } else {
            found.push(at("its state cannot be read"));
        }
        found.extend(counters(&file.kind, &info).map(|what| at(&what)));
        let has_path = matches!(
            file.kind,
            FileKind::Regular
                | FileKind::Memfd { .. }
                | FileKind::Directory
                | FileKind::Path
                | FileKind::Proc(_)
        );
        if has_path && !e.files.is_of_nobody(d.file) {
            if file.flags & libc::O_PATH == 0 {
                found.extend(differ(&at("position"), number("pos", 10).unwrap_or(-1), file.pos));
            }
            let link = std::fs::read_link(format!("{dir}/fd/{}", d.fd)).unwrap_or_default();
            if without_lost_name(Bytes(link.as_os_str().as_bytes().to_vec())) != shown_path(file) {
                found.push(at(&format!("it is {} now", link.display())));
            }
        }
    }
    found
}

/// What fdinfo says of files that count or keep time, where it is not as it was.
fn counters(kind: &FileKind, info: &[u8]) -> Option<String> {
    let (name, was) = match kind {
        FileKind::EventFd(state) => ("eventfd-count", format!("{:x}", state.count)),
        FileKind::SignalFd(state) => ("sigmask", format!("{:016x}", state.mask)),
        FileKind::TimerFd(state) => {
            let second = 1_000_000_000;
            let interval = format!("({}, {})", state.interval_ns / second, state.interval_ns % second);
            let clock = differ("clockid", status_field(info, "clockid")?, state.clock.to_string().as_str());
            return clock
                .or_else(|| differ("it_interval", status_field(info, "it_interval")?, interval.as_str()));
        }
        _ => return None,
    };
    differ(name, status_field(info, name)?, was.as_str())
}

fn places(e: &Expected<'_>, dir: &str) -> Vec<String> {
    let fs = &e.process.fs;
    let mut found = Vec::new();
    let mut compare = |name: &str, was: &Bytes| {
        let is = std::fs::read_link(format!("{dir}/{name}")).unwrap_or_default();
        if is.as_os_str().as_bytes() != was.as_bytes() {
            found.push(format!("its {name} is {} and was {was}", is.display()));
        }
    };
    if !fs.cwd_deleted {
        compare("cwd", &fs.cwd);
    }
    if !fs.root.is_empty() {
        compare("root", &fs.root);
    }
    if let Some(exe) = e.mm.exe.and_then(|id| e.snapshot.files.get(&id)) {
        let is = std::fs::read_link(format!("{dir}/exe")).unwrap_or_default();
        if without_lost_name(Bytes(is.as_os_str().as_bytes().to_vec())) != shown_path(exe) {
            found.push(format!("its exe is {} and was {}", is.display(), exe.path));
        }
    }
    found
}

fn limits(process: &Process) -> Vec<String> {
    let Ok(now) = sys::limits(process.pid) else { return vec!["its limits cannot be read".into()] };
    let limits = process.rlimits.iter().zip(now).enumerate();
    let different = limits.filter(|(_, (was, is))| (is.rlim_cur, is.rlim_max) != (was.cur, was.max));
    let describe = |(resource, (was, is)): (usize, (&snapshot::Rlimit, libc::rlimit64))| {
        format!("limit {resource} is {}:{} and was {}:{}", is.rlim_cur, is.rlim_max, was.cur, was.max)
    };
    different.map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(start: u64, end: u64, object: Option<(&str, u64)>) -> Shown {
        let object = object.map(|(p, o)| (p.into(), o));
        Shown { start, end, prot: Prot::READ, shared: false, object }
    }

    #[test]
    fn equal_neighbours_are_joined_and_others_are_not() {
        let list = vec![
            shown(0, 1, None),
            shown(1, 2, None),
            shown(2, 3, Some(("/f", 0))),
            shown(3, 4, Some(("/f", 1))),
            shown(4, 5, Some(("/f", 9))),
            shown(5, 6, Some(("[vvar]", 0))),
            shown(6, 7, Some(("[vvar]", 1))),
        ];
        let joined: Vec<_> = joined(list.into_iter()).iter().map(|s| (s.start, s.end)).collect();
        assert_eq!(joined, [(0, 2), (2, 4), (4, 5), (5, 6), (6, 7)]);
    }

    #[test]
    fn counters_are_compared_with_their_fdinfo() {
        let eventfd = |count| FileKind::EventFd(snapshot::EventFd { count, semaphore: false });
        let info = b"pos:\t0\neventfd-count:               2a\neventfd-id: 3\n";
        assert_eq!(counters(&eventfd(42), info), None);
        assert!(counters(&eventfd(7), info).unwrap().contains("is 2a and was 7"));
        let signalfd = |mask| FileKind::SignalFd(snapshot::SignalFd { mask });
        let info = b"sigmask:\t0000000000000200\n";
        assert_eq!(counters(&signalfd(1 << 9), info), None);
        assert!(counters(&signalfd(1), info).is_some());
        let timerfd = |clock, interval_ns| {
            FileKind::TimerFd(snapshot::TimerFd { clock, interval_ns, ..snapshot::TimerFd::default() })
        };
        let info = b"clockid: 1\nticks: 0\nit_value: (0, 0)\nit_interval: (3, 500)\n";
        assert_eq!(counters(&timerfd(1, 3_000_000_500), info), None);
        assert!(counters(&timerfd(7, 3_000_000_500), info).is_some());
        assert!(counters(&timerfd(1, 3_000_000_501), info).is_some());
        assert_eq!(counters(&FileKind::Regular, info), None);
    }

    #[test]
    fn stat_survives_any_name() {
        let stat = Stat::read("/proc/self/stat").unwrap();
        assert_eq!(stat.field(4), i64::from(nix::unistd::getppid().as_raw()));
        assert_eq!(stat.field(6), i64::from(nix::unistd::getsid(None).unwrap().as_raw()));
    }
}
