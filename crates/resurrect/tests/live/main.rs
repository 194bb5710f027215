//! Processes of this machine are frozen, killed, and brought back from the record: see `freeze.rs` and `programs.rs`.
//!
//! Needs root. Runs one after another; a word on the command line selects the tests whose name contains it.

// Processes are handled with bare system calls all over these tests; each line is as safe as the program that it is done to.
#![allow(clippy::undocumented_unsafe_blocks)]

mod freeze;
mod programs;

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use freeze::{Frozen, Memory, freeze};
use resurrect::{Fate, Options, Progress, Report, Step};
use snapshot::*;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("program") => programs::run(&args[2]),
        Some("worker") => worker(Path::new(&args[2]), args.get(3).map(String::as_str)),
        _ => run_tests(&args[1..]),
    }
}

const TESTS: &[(&str, fn())] = &[
    ("memory", memory),
    ("memory_shared_since_fork", family_memory),
    ("threads", || survives("threads")),
    ("sleep_with_the_time_that_was_left", || timed("sleep")),
    ("poll_with_the_time_that_was_left", || timed("poll")),
    ("pipe_and_shared_position", || survives("pipes")),
    ("files", || survives("files")),
    ("locks_pidfds_and_proc_files", locks),
    ("pending_signals", || survives("signals")),
    ("credentials", || survives("credentials")),
    ("vector_registers", || survives("vectors")),
    ("restartable_sequence", || survives("rseq")),
    ("zombies", || survives("zombie")),
    ("shared_anonymous_memory", || survives("shared")),
    ("dead_leader", || survives_with("dead-leader", 7)),
    ("terminal", terminal),
    ("stopped_process", stopped_process),
    ("running_writer", running_writer),
    ("lost_group_leader", lost_group_leader),
    ("page_cache", page_cache),
    ("replaced_file_is_given_up", replaced_file_is_given_up),
    ("taken_pid_is_given_up", taken_pid_is_given_up),
    ("failure_costs_one_process_only", failure_costs_one_process_only),
    ("missing_frame_costs_one_process_only", missing_frame_costs_one_process_only),
    ("check_finds_what_is_wrong", check_finds_what_is_wrong),
    ("other_vdso_is_given_up", other_vdso_is_given_up),
    ("vfork", vfork),
    ("vfork_that_takes_long", vfork_that_takes_long),
    ("vfork_child_that_is_killed", vfork_child_that_is_killed),
    ("twenty_at_once", twenty_at_once),
    ("nothing_survives_a_dead_worker", nothing_survives_a_dead_worker),
];

fn run_tests(args: &[String]) {
    let words: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    if args.iter().any(|a| a == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        println!("live: skipped, needs root");
        return;
    }
    let mut failed = Vec::new();
    let selected =
        TESTS.iter().filter(|(name, _)| words.is_empty() || words.iter().any(|w| name.contains(w.as_str())));
    let selected: Vec<_> = selected.collect();
    for (name, test) in &selected {
        let start = Instant::now();
        let ok = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {} ({} ms)", if ok { "ok" } else { "FAILED" }, start.elapsed().as_millis());
        if !ok {
            failed.push(*name);
        }
    }
    println!("\nlive: {} passed, {} failed", selected.len() - failed.len(), failed.len());
    if !failed.is_empty() {
        println!("failed: {failed:?}");
        std::process::exit(1);
    }
}

// ---------------------------------------------------------------- running and freezing

/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(20);

const CLONE_NEWTIME: i32 = 0x80;

/// A program that has said that it is ready.
struct Running {
    pid: Pid,
    dir: tempfile::TempDir,
}

struct Start<'a> {
    program: &'a str,
    /// Terminal to run on.
    terminal: Option<&'a OwnedFd>,
    /// How far its monotonic clocks are ahead of ours, seconds.
    clocks_ahead: i64,
}

fn start(program: &str) -> Running {
    Start { program, terminal: None, clocks_ahead: 0 }.start()
}

impl Start<'_> {
    fn start(self) -> Running {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        nix::unistd::mkfifo(&dir.path().join("go"), nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
        let (ready_r, ready_w) = nix::unistd::pipe().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["program", self.program]).current_dir(dir.path());
        command.env_clear().env("MARK", "otherworld").env("RUST_BACKTRACE", "0");
        let errors = fs::File::create(dir.path().join("stderr")).unwrap();
        command.stdin(Stdio::null()).stdout(errors.try_clone().unwrap()).stderr(errors);
        if let Some(tty) = self.terminal {
            command.stdin(tty.try_clone().unwrap()).stdout(tty.try_clone().unwrap());
        }
        let (ready, on_terminal, ahead) = (ready_w.as_raw_fd(), self.terminal.is_some(), self.clocks_ahead);
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                if ahead != 0 {
                    // Takes effect with exec.
                    if libc::unshare(CLONE_NEWTIME) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                    let offsets = format!("monotonic {ahead} 0\nboottime {ahead} 0\n");
                    fs::write("/proc/self/timens_offsets", offsets)?;
                }
                if on_terminal && libc::ioctl(0, libc::TIOCSCTTY, 1) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                if libc::dup2(ready, 3) != 3 || libc::close_range(4, u32::MAX, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = spawn_keeping_exec_errors_quiet(&mut command);
        drop(ready_w);
        let mut poll = libc::pollfd { fd: ready_r.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        assert_eq!(
            unsafe { libc::poll(&mut poll, 1, PATIENCE.as_millis() as i32) },
            1,
            "{} does not get ready",
            self.program
        );
        let got = fs::File::from(ready_r).read(&mut [0]).unwrap();
        let stderr = fs::read_to_string(dir.path().join("stderr")).unwrap();
        assert_eq!(got, 1, "{} ended: {stderr}", self.program);
        Running { pid: child, dir }
    }
}

/// `Command::spawn` reports exec errors through a descriptor that the above closes: that is fine.
fn spawn_keeping_exec_errors_quiet(command: &mut Command) -> Pid {
    command.spawn().unwrap().id() as Pid
}

/// The process and its descendants.
fn family(pid: Pid) -> Vec<Pid> {
    let mut all = vec![pid];
    let mut i = 0;
    while let Some(&p) = all.get(i) {
        let tasks = fs::read_dir(format!("/proc/{p}/task")).unwrap();
        for task in tasks {
            let children = fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
            all.extend(children.split_whitespace().map(|c| c.parse::<Pid>().unwrap()));
        }
        i += 1;
    }
    all
}

/// Waits until all threads of a process sleep in a system call.
fn settle(pid: Pid) {
    let deadline = Instant::now() + PATIENCE;
    let tasks = || fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|t| t.unwrap().path());
    let state = |task: std::path::PathBuf| {
        let stat = fs::read_to_string(task.join("stat")).unwrap();
        stat[stat.rfind(')').unwrap() + 2..].chars().next().unwrap()
    };
    while !tasks().all(|t| "SZTt".contains(state(t))) {
        assert!(Instant::now() < deadline, "{pid} does not settle");
        std::thread::yield_now();
    }
}

/// Records processes and kills them.
fn record_and_kill(pids: &[Pid]) -> Frozen {
    let frozen = freeze(pids);
    for &pid in pids.iter().rev() {
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    for &pid in pids {
        let traced = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let tids: Vec<Pid> = traced.filter_map(|d| d.file_name().to_str()?.parse().ok()).collect();
        for tid in tids.into_iter().filter(|&t| t != pid).chain([pid]) {
            let mut status = 0;
            unsafe { libc::waitpid(tid, &mut status, libc::__WALL) };
        }
    }
    // Orphans come to us: we are a subreaper.
    let deadline = Instant::now() + PATIENCE;
    while pids.iter().any(|p| Path::new(&format!("/proc/{p}")).exists()) {
        unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL | libc::WNOHANG) };
        assert!(Instant::now() < deadline, "the dead are still there");
        std::thread::yield_now();
    }
    frozen
}

fn freeze_family(running: &Running) -> Frozen {
    let pids = family(running.pid);
    record_and_kill(&pids)
}

// ---------------------------------------------------------------- resurrecting

fn spawn_worker(frozen: &Frozen, dir: &Path, sabotage: Option<&str>) -> Pid {
    fs::write(dir.join("snapshot.json"), serde_json::to_vec(&frozen.snapshot).unwrap()).unwrap();
    fs::write(dir.join("memory"), &frozen.memory.bytes).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("worker").arg(dir).args(sabotage).env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    command.spawn().unwrap().id() as Pid
}

fn resurrect(frozen: &Frozen) -> Report {
    resurrect_sabotaged(frozen, None)
}

fn resurrect_sabotaged(frozen: &Frozen, sabotage: Option<&str>) -> Report {
    let dir = tempfile::tempdir().unwrap();
    let worker = spawn_worker(frozen, dir.path(), sabotage);
    let status = wait_for(worker);
    assert_eq!(status, 0, "the worker failed");
    let report: Report = serde_json::from_slice(&fs::read(dir.path().join("report.json")).unwrap()).unwrap();
    let expected: Vec<Pid> = frozen.snapshot.processes.iter().map(|p| p.pid).collect();
    assert_eq!(report.outcomes.iter().map(|o| o.pid).collect::<Vec<_>>(), expected);
    report
}

fn worker(dir: &Path, sabotage: Option<&str>) {
    let mut snapshot: Snapshot =
        serde_json::from_slice(&fs::read(dir.join("snapshot.json")).unwrap()).unwrap();
    let memory = Memory::of(fs::read(dir.join("memory")).unwrap());
    let options =
        Options { deadline: PATIENCE, process_deadline: Duration::from_secs(5), ..Options::default() };
    let mut watcher = Watcher { sabotage, dir };
    let report =
        resurrect::resurrect(&mut snapshot, &memory, Default::default(), &options, &mut watcher).unwrap();
    if std::env::var_os("SHOW_REPORT").is_some() {
        eprintln!("{:?} poured {} in {:?}", report.timeline, report.poured_bytes, report.pour_time);
    }
    fs::write(dir.join("report.json"), serde_json::to_vec(&report).unwrap()).unwrap();
}

/// Damages what has been rebuilt, so that the check has something to find.
struct Watcher<'a> {
    dir: &'a Path,
    sabotage: Option<&'a str>,
}

impl Progress for Watcher<'_> {
    fn step(&mut self, step: Step<'_>) {
        if let Step::Released = step {
            fs::write(self.dir.join("released"), "").unwrap();
        }
        let Step::Rebuilt { pid, .. } = step else { return };
        match self.sabotage {
            Some("limit") => {
                let limit = libc::rlimit64 { rlim_cur: 1, rlim_max: 1 };
                unsafe { libc::prlimit64(pid, libc::RLIMIT_CORE, &limit, std::ptr::null_mut()) };
            }
            Some("mask") => {
                let mask = 1u64 << 30;
                unsafe { libc::ptrace(libc::PTRACE_SETSIGMASK, pid, 8, &raw const mask) };
            }
            Some("die") => unsafe {
                libc::kill(libc::getpid(), libc::SIGKILL);
            },
            _ => {}
        }
    }
}

fn fate(report: &Report, pid: Pid) -> &Fate {
    &report.outcomes.iter().find(|o| o.pid == pid).unwrap().fate
}

#[track_caller]
fn assert_resumed(report: &Report, pid: Pid) {
    assert_eq!(fate(report, pid), &Fate::Resumed { losses: vec![] });
}

fn say_go(running: &Running, times: usize) {
    let mut fifo = fs::File::options().read(true).write(true).open(running.dir.path().join("go")).unwrap();
    fifo.write_all(&vec![b'g'; times]).unwrap();
}

/// Status of a child, within bounds.
fn wait_for(pid: Pid) -> i32 {
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    assert!(pidfd >= 0, "{pid} is not there");
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let n = unsafe { libc::poll(&mut poll, 1, PATIENCE.as_millis() as i32) };
    if n != 1 {
        let stack = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        unsafe { libc::kill(pid, libc::SIGKILL) };
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
        panic!("{pid} did not end in time; it was in {stack}");
    }
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, libc::__WALL) }, pid);
    status
}

#[track_caller]
fn assert_ends_with(running: &Running, code: i32) {
    let status = wait_for(running.pid);
    let stderr = fs::read_to_string(running.dir.path().join("stderr")).unwrap();
    assert_eq!(status, code << 8, "{} ended with status {status:#x}\n{stderr}", running.pid);
}

// ---------------------------------------------------------------- tests

fn survives(program: &str) {
    survives_with(program, 0)
}

fn survives_with(program: &str, code: i32) {
    become_subreaper();
    let running = start(program);
    if program != "rseq" {
        family(running.pid).into_iter().for_each(settle);
    }
    let frozen = freeze_family(&running);
    let report = resurrect(&frozen);
    for p in &frozen.snapshot.processes {
        assert_resumed(&report, p.pid);
    }
    say_go(&running, frozen.snapshot.processes.len());
    assert_ends_with(&running, code);
}

fn locks() {
    become_subreaper();
    let running = start("locks");
    settle(running.pid);
    let frozen = freeze_family(&running);
    assert_eq!(frozen.snapshot.locks.len(), 3);
    let report = resurrect(&frozen);
    match fate(&report, running.pid) {
        Fate::Resumed { losses } => {
            let codes: Vec<&str> = losses.iter().map(|loss| loss.code.as_str()).collect();
            assert_eq!(codes, ["pidfd"]);
        }
        other => panic!("{other:?}"),
    }
    say_go(&running, 1);
    assert_ends_with(&running, 0);
}

fn become_subreaper() {
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, 0);
}

fn memory() {
    let running = start("memory");
    let frozen = freeze_family(&running);
    assert!(frozen.memory.bytes.len() > 50 << 20);
    let report = resurrect(&frozen);
    assert_resumed(&report, running.pid);
    assert!(report.poured_bytes > 50 << 20);
    say_go(&running, 1);
    assert_ends_with(&running, 0);
}

/// Memory that is shared copy-on-write comes back once, and stays shared.
fn family_memory() {
    become_subreaper();
    let running = start("family");
    family(running.pid).into_iter().for_each(settle);
    let frozen = freeze_family(&running);
    assert_eq!(frozen.snapshot.processes.len(), 5);
    let report = resurrect(&frozen);
    for p in &frozen.snapshot.processes {
        assert_resumed(&report, p.pid);
    }
    assert!((20 << 20..60 << 20).contains(&report.poured_bytes), "{} bytes were poured", report.poured_bytes);
    say_go(&running, 5);
    assert_ends_with(&running, 0);
}

/// The kernel does not tell how much was left; the program wrote down when it expects to be woken.
fn timed(program: &str) {
    const AHEAD: i64 = 5000;
    let running = Start { program, terminal: None, clocks_ahead: AHEAD }.start();
    settle(running.pid);
    let mut frozen = freeze_family(&running);
    frozen.snapshot.clocks.monotonic_ns += AHEAD * 1_000_000_000;
    frozen.snapshot.clocks.boottime_ns += AHEAD * 1_000_000_000;
    let end: i64 = fs::read_to_string(running.dir.path().join("end")).unwrap().parse().unwrap();
    let left = end - frozen.snapshot.clocks.monotonic_ns;
    assert!(left > 0 && left < programs::WAIT);
    match &mut frozen.snapshot.processes[0].threads[0].resume {
        Resume::RestartTimed { remaining_ns, .. } => *remaining_ns = left,
        other => panic!("{other:?}"),
    }
    // The dead kernel's clocks were far ahead of this one's, and must go on from there.
    let report = resurrect(&frozen);
    assert_resumed(&report, running.pid);
    assert_ends_with(&running, 0);
}

fn open_terminal() -> (fs::File, OwnedFd) {
    let pty = nix::pty::openpty(None, None).unwrap();
    unsafe {
        let mut t: libc::termios = std::mem::zeroed();
        libc::tcgetattr(pty.slave.as_raw_fd(), &mut t);
        t.c_lflag &= !libc::ECHO;
        libc::tcsetattr(pty.slave.as_raw_fd(), libc::TCSANOW, &t);
        let w = libc::winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
        libc::ioctl(pty.slave.as_raw_fd(), libc::TIOCSWINSZ, &w);
    }
    (pty.master.into(), pty.slave)
}

/// The terminal is a pseudo-terminal whose other end we keep; that makes it as good as a serial port.
fn terminal() {
    become_subreaper();
    let (mut master, slave) = open_terminal();
    let running = Start { program: "terminal", terminal: Some(&slave), clocks_ahead: 0 }.start();
    let pids = family(running.pid);
    pids.iter().copied().for_each(settle);
    let mut frozen = record_and_kill(&pids);
    // /dev/tty is another name for the controlling terminal.
    let id = *frozen.snapshot.ttys.keys().next().unwrap();
    let tty = frozen.snapshot.ttys.get_mut(&id).unwrap();
    (tty.session, tty.foreground) = (pids[0], pids[1]);
    tty.input = b"typed\n".to_vec();
    tty.output = b"unsent\n\r\n".as_slice().into();
    for file in frozen.snapshot.files.values_mut().filter(|f| f.path.as_bytes() == b"/dev/tty") {
        file.kind = FileKind::Tty { tty: id };
    }
    for p in &mut frozen.snapshot.processes {
        p.ctty = Some(id);
    }
    let report = resurrect(&frozen);
    pids.iter().for_each(|&p| assert_resumed(&report, p));
    say_go(&running, 1);
    assert_ends_with(&running, 0);
    drop(slave);
    let mut text = Vec::new();
    let _ = master.read_to_end(&mut text);
    assert_eq!(text, b"unsent\n\r\ndone", "the terminal shows what was not written");
}

fn stopped_process() {
    let running = start("idle");
    settle(running.pid);
    unsafe { libc::kill(running.pid, libc::SIGSTOP) };
    settle(running.pid);
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(running.pid, &mut status, libc::WUNTRACED) }, running.pid);
    let frozen = freeze_family(&running);
    assert!(matches!(frozen.snapshot.processes[0].state, ProcessState::Stopped { .. }));
    let report = resurrect(&frozen);
    assert_resumed(&report, running.pid);
    say_go(&running, 1);
    assert_eq!(unsafe { libc::waitpid(running.pid, &mut status, libc::WUNTRACED) }, running.pid);
    assert!(libc::WIFSTOPPED(status), "it did not stay stopped: {status:#x}");
    unsafe { libc::kill(running.pid, libc::SIGCONT) };
    assert_ends_with(&running, 0);
}

/// Frozen at any moment, in user mode or in the middle of a call.
fn running_writer() {
    let running = start("log");
    let frozen = freeze_family(&running);
    let report = resurrect(&frozen);
    assert_resumed(&report, running.pid);
    say_go(&running, 1);
    assert_ends_with(&running, 0);
    let text = fs::read_to_string(running.dir.path().join("lines")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    for (i, line) in lines[..lines.len() - 1].iter().enumerate() {
        assert_eq!(*line, i.to_string());
    }
    assert_eq!(*lines.last().unwrap(), format!("end {}", lines.len() - 1));
}

fn lost_group_leader() {
    become_subreaper();
    let running = start("groups");
    let second: Pid = fs::read_to_string(running.dir.path().join("second")).unwrap().parse().unwrap();
    settle(second);
    let pids = family(running.pid);
    let mut frozen = record_and_kill(&pids);
    frozen.snapshot.processes.retain(|p| p.pid == second);
    let report = resurrect(&frozen);
    match fate(&report, second) {
        Fate::Resumed { losses } => {
            assert_eq!(losses.iter().map(|l| &*l.code).collect::<Vec<_>>(), ["parent"])
        }
        other => panic!("{other:?}"),
    }
    let me = Running { pid: second, dir: running.dir };
    say_go(&me, 1);
    assert_ends_with(&me, 0);
    // Placeholders of session and group are ours to reap, and have ended.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) } > 0 {}
}

/// The disk has an old state of one file and has never seen the other.
fn page_cache() {
    let running = start("files");
    settle(running.pid);
    let mut frozen = freeze_family(&running);
    let contents = [b'x'; 10000];
    let addr = frozen.memory.store_bytes(&contents);
    let log = frozen.memory.store_bytes(b"one\n");
    let memory = std::mem::take(&mut frozen.memory.bytes);
    frozen.memory = Memory::of(memory);
    for inode in frozen.snapshot.inodes.values_mut() {
        let run =
            |addr: u64, count| vec![PageCacheRun { index: 0, pfn: addr / PAGE_SIZE, count, dirty: true }];
        if inode.path.as_bytes().ends_with(b"/random") {
            inode.pages = run(addr, 3);
        } else if inode.path.as_bytes().ends_with(b"/log") {
            inode.pages = run(log, 1);
            inode.mode = libc::S_IFREG | 0o640;
        }
    }
    fs::write(running.dir.path().join("random"), b"old").unwrap();
    fs::remove_file(running.dir.path().join("log")).unwrap();
    let report = resurrect(&frozen);
    assert_resumed(&report, running.pid);
    let mut written: Vec<(bool, u64)> = report.files_written.iter().map(|f| (f.created, f.bytes)).collect();
    written.sort_unstable();
    assert_eq!(written, [(false, 10000), (true, 4)]);
    assert_eq!(fs::metadata(running.dir.path().join("log")).unwrap().mode() & 0o7777, 0o640);
    say_go(&running, 1);
    assert_ends_with(&running, 0);
}

fn replaced_file_is_given_up() {
    let (good, bad) = (start("idle"), start("files"));
    settle(good.pid);
    settle(bad.pid);
    let frozen = record_and_kill(&[good.pid, bad.pid]);
    let path = bad.dir.path().join("random");
    fs::write(bad.dir.path().join("other"), "other").unwrap();
    fs::rename(bad.dir.path().join("other"), &path).unwrap();
    let report = resurrect(&frozen);
    assert_given_up(&report, bad.pid, "replaced meanwhile");
    assert_eq!(fs::read(&path).unwrap(), b"other");
    assert_resumed(&report, good.pid);
    say_go(&good, 1);
    assert_ends_with(&good, 0);
}

#[track_caller]
fn assert_given_up(report: &Report, pid: Pid, text: &str) {
    match fate(report, pid) {
        Fate::GaveUp { reasons } if reasons.iter().any(|r| r.text.contains(text)) => {}
        other => panic!("{other:?} does not say {text:?}"),
    }
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid} exists");
}

#[track_caller]
fn assert_failed(report: &Report, pid: Pid, step: &str, text: &str) {
    match fate(report, pid) {
        Fate::Failed { step: s, reason } if s == step && reason.contains(text) => {}
        other => panic!("{other:?} is not {step:?}, {text:?}"),
    }
    // It was killed before it ran; its end is ours to see.
    let mut status = 0;
    unsafe { libc::waitpid(pid, &mut status, libc::__WALL) };
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid} exists");
    assert_eq!(status & 0x7f, libc::SIGKILL);
}

fn two_idle() -> (Running, Running, Frozen) {
    let (good, bad) = (start("idle"), start("idle"));
    settle(good.pid);
    settle(bad.pid);
    let frozen = record_and_kill(&[good.pid, bad.pid]);
    (good, bad, frozen)
}

fn taken_pid_is_given_up() {
    let (good, bad, frozen) = two_idle();
    let name = CString::new("occupant").unwrap();
    let set_tid = [bad.pid];
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.exit_signal = libc::SIGCHLD as u64;
    args.set_tid = set_tid.as_ptr() as u64;
    args.set_tid_size = 1;
    let (r, w) = nix::unistd::pipe().unwrap();
    let occupant = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    if occupant == 0 {
        unsafe {
            libc::prctl(libc::PR_SET_NAME, name.as_ptr());
            libc::close(w.as_raw_fd());
            libc::pause();
            libc::_exit(0);
        }
    }
    assert_eq!(occupant, i64::from(bad.pid));
    drop(w);
    fs::File::from(r).read_to_end(&mut Vec::new()).unwrap();
    let report = resurrect(&frozen);
    match fate(&report, bad.pid) {
        Fate::GaveUp { reasons } => {
            assert_eq!(reasons[0], Reason::new("pid-taken", format!("PID {} is taken by occupant", bad.pid)));
        }
        other => panic!("{other:?}"),
    }
    unsafe { libc::kill(bad.pid, libc::SIGKILL) };
    wait_for(bad.pid);
    assert_resumed(&report, good.pid);
    say_go(&good, 1);
    assert_ends_with(&good, 0);
}

fn process_mut(frozen: &mut Frozen, pid: Pid) -> (&mut Process, &mut AddressSpace) {
    let process = frozen.snapshot.processes.iter_mut().find(|p| p.pid == pid).unwrap();
    let mm = frozen.snapshot.address_spaces.get_mut(&process.address_space.unwrap()).unwrap();
    (process, mm)
}

fn failure_costs_one_process_only() {
    let (good, bad, mut frozen) = two_idle();
    let (_, mm) = process_mut(&mut frozen, bad.pid);
    let vma = mm.vmas.iter_mut().find(|v| matches!(v.kind, VmaKind::File { .. })).unwrap();
    if let VmaKind::File { offset, .. } = &mut vma.kind {
        *offset += 1;
    }
    let report = resurrect(&frozen);
    assert_failed(&report, bad.pid, "map memory", "EINVAL");
    assert_resumed(&report, good.pid);
    say_go(&good, 1);
    assert_ends_with(&good, 0);
}

fn missing_frame_costs_one_process_only() {
    let (good, bad, mut frozen) = two_idle();
    let (_, mm) = process_mut(&mut frozen, bad.pid);
    let stack = mm.vmas.iter_mut().rev().find(|v| !v.pages.is_empty()).unwrap();
    stack.pages[0].pfn = 0x7_0000_0000;
    let report = resurrect(&frozen);
    assert_failed(&report, bad.pid, "pour memory", "not in the dump");
    assert_resumed(&report, good.pid);
    say_go(&good, 1);
    assert_ends_with(&good, 0);
}

fn check_finds_what_is_wrong() {
    for (sabotage, text) in [("limit", "limit 4 is 1:1"), ("mask", "SigBlk is 40000000")] {
        let running = start("idle");
        settle(running.pid);
        let frozen = freeze_family(&running);
        let report = resurrect_sabotaged(&frozen, Some(sabotage));
        assert_failed(&report, running.pid, "check", text);
    }
}

fn other_vdso_is_given_up() {
    let running = start("idle");
    settle(running.pid);
    let mut frozen = freeze_family(&running);
    frozen.snapshot.kernel.vdso = frozen.snapshot.kernel.vdso.map(|(len, hash)| (len, hash ^ 1));
    let report = resurrect(&frozen);
    assert_given_up(&report, running.pid, "vDSO");
}

/// Two processes, recorded as if the parent waited in vfork(2) for the child, whose PID it gets then.
fn freeze_vfork(program: &str) -> (Running, Pid, Frozen) {
    become_subreaper();
    let running = start(program);
    let pids = family(running.pid);
    pids.iter().copied().for_each(settle);
    let mut frozen = record_and_kill(&pids);
    let (parent, child) = (pids[0], pids[1]);
    let (process, _) = process_mut(&mut frozen, parent);
    let resume = &mut process.threads[0].resume;
    assert_eq!(*resume, Resume::Restart);
    *resume = Resume::Return { value: child.into(), why: String::new() };
    let memory = process.address_space;
    let (process, _) = process_mut(&mut frozen, child);
    (process.address_space, process.vfork) = (memory, true);
    (running, child, frozen)
}

/// The report, after `during` has been done with the processes released.
fn resurrect_meanwhile(frozen: &Frozen, during: impl FnOnce()) -> Report {
    let dir = tempfile::tempdir().unwrap();
    let worker = spawn_worker(frozen, dir.path(), None);
    let deadline = Instant::now() + PATIENCE;
    while !dir.path().join("released").exists() {
        assert!(Instant::now() < deadline, "they are not released");
        std::thread::sleep(Duration::from_millis(1));
    }
    during();
    assert_eq!(wait_for(worker), 0, "the worker failed");
    serde_json::from_slice(&fs::read(dir.path().join("report.json")).unwrap()).unwrap()
}

#[track_caller]
fn assert_vfork_loss(report: &Report, pid: Pid, text: &str) {
    let Fate::Resumed { losses } = fate(report, pid) else { panic!("{:?}", fate(report, pid)) };
    assert!(losses.len() == 1 && losses[0].code == "vfork" && losses[0].text.contains(text), "{losses:?}");
}

fn vfork() {
    let (running, child, frozen) = freeze_vfork("vfork");
    let report = resurrect_meanwhile(&frozen, || say_go(&running, 1));
    assert_resumed(&report, running.pid);
    assert_resumed(&report, child);
    assert_ends_with(&running, 0);
}

/// The parent goes on in the end, and that is told.
fn vfork_that_takes_long() {
    let (running, child, frozen) = freeze_vfork("vfork-late");
    let report = resurrect(&frozen);
    assert_vfork_loss(&report, running.pid, &format!("before PID {child}"));
    assert_resumed(&report, child);
    say_go(&running, 1);
    assert_ends_with(&running, 0);
}

/// Killed, it is a child that exits like others.
fn vfork_child_that_is_killed() {
    let (running, child, frozen) = freeze_vfork("vfork-late");
    let report = resurrect_meanwhile(&frozen, || assert_eq!(unsafe { libc::kill(child, libc::SIGKILL) }, 0));
    assert_resumed(&report, child);
    assert_resumed(&report, running.pid);
    // It expected another status.
    assert_ends_with(&running, 101);
}

fn twenty_at_once() {
    let all: Vec<Running> = (0..20).map(|_| start("idle")).collect();
    let pids: Vec<Pid> = all.iter().map(|r| r.pid).collect();
    pids.iter().copied().for_each(settle);
    let frozen = record_and_kill(&pids);
    let report = resurrect(&frozen);
    for running in &all {
        assert_resumed(&report, running.pid);
        say_go(running, 1);
        assert_ends_with(running, 0);
    }
}

fn nothing_survives_a_dead_worker() {
    let running = start("idle");
    settle(running.pid);
    let frozen = freeze_family(&running);
    let dir = tempfile::tempdir().unwrap();
    let worker = spawn_worker(&frozen, dir.path(), Some("die"));
    assert_eq!(wait_for(worker), libc::SIGKILL);
    assert_eq!(wait_for(running.pid), libc::SIGKILL);
}
