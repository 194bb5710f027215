//! `otherworld inspect`

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use autopsy::Autopsy;
use clap::Subcommand;
use ktypes::Kernel;
use snapshot::{
    Decision, FileKind, LogRecord, Panic, Pid, Process, Prot, Severity, Snapshot, SwapArea, ThreadState,
    VmaKind,
};
use vmcore::Vmcore;

use crate::cli::Exit;
use crate::report::state_word;

#[derive(clap::Args)]
pub struct Args {
    /// The core: /proc/vmcore in a crash kernel, or an ELF file.
    #[arg(long, value_name = "FILE", global = true, default_value = "/proc/vmcore")]
    core: PathBuf,
    /// For programs.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The processes that were running.
    Ps,
    /// The memory mappings of a process.
    Maps {
        #[allow(missing_docs)]
        pid: Pid,
    },
    /// The open files of a process.
    Files {
        #[allow(missing_docs)]
        pid: Pid,
    },
    /// The kernel log.
    Dmesg,
    /// The panic: message, task, stack.
    Panic,
    /// What contradicts itself in the dead kernel's memory.
    ///
    /// Everything that is read is compared with what duplicates it: slab caches, task lists and PIDs, page tables and the pages' own
    /// account, descriptors, names and inodes, sockets, credentials. DONE says what the strict policy ([integrity] in the
    /// configuration) does about it.
    Check,
    /// Everything that would be used to rebuild the processes (as JSON), and what was noticed on the way.
    Snapshot,
}

pub fn run(args: &Args) -> Result<Exit> {
    let core = Vmcore::open(&args.core).with_context(|| {
        if args.core.as_os_str() == "/proc/vmcore" {
            "there is no dead kernel here (name a core file with --core)".to_owned()
        } else {
            format!("cannot use {}", args.core.display())
        }
    })?;
    if let Some(truncation) = core.truncated() {
        tracing::warn!("{truncation}");
    }
    let text = super::with_spinner("reading the dead kernel", || answer(args, core))?;
    super::print(&text)?;
    Ok(Exit::Done)
}

fn answer(args: &Args, core: Vmcore) -> Result<String> {
    let kernel = Kernel::open(core)?;
    let autopsy = Autopsy::new(&kernel);
    let what = match &args.what {
        // These need no process to be readable.
        What::Dmesg => {
            let log = autopsy.kernel_log()?;
            return if args.json { json(&log) } else { Ok(log.iter().map(log_line).collect()) };
        }
        What::Panic => {
            let panic = Panic { log: Vec::new(), ..autopsy.panic_report() };
            return if args.json { json(&panic) } else { Ok(panic_text(&panic)) };
        }
        what => what,
    };
    let snapshot = autopsy.snapshot()?;
    // The answer to this is all of them.
    let untold = !matches!(what, What::Check);
    for finding in snapshot.findings.iter().filter(|_| untold) {
        let process = finding.pid.map(|p| format!("process {p}: ")).unwrap_or_default();
        // What is missing from the answer, or may be, is said unasked.
        if finding.pid.is_none() || finding.severity == Severity::Broken {
            tracing::warn!("{process}{}: {}", finding.object, finding.text);
        } else {
            tracing::info!("{:?}: {process}{}: {}", finding.severity, finding.object, finding.text);
        }
    }
    match what {
        What::Maps { pid } => {
            let process = find(&snapshot, *pid)?;
            let id = process.address_space.context("a zombie has no memory")?;
            let mm = snapshot.address_spaces.get(&id).context("its mappings could not be read")?;
            if args.json { json(mm) } else { Ok(maps(&snapshot, mm)) }
        }
        What::Files { pid } => {
            let process = find(&snapshot, *pid)?;
            if args.json { json(&files_json(&snapshot, process)) } else { Ok(files(&snapshot, process)) }
        }
        What::Check => {
            let findings = super::check::findings(snapshot);
            if args.json { json(&findings) } else { Ok(super::check::table(&findings)) }
        }
        What::Snapshot => json(&snapshot),
        _ if args.json => json(&snapshot.processes),
        _ => Ok(ps(&snapshot)),
    }
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn find(snapshot: &Snapshot, pid: Pid) -> Result<&Process> {
    match snapshot.process(pid) {
        Some(process) => Ok(process),
        None => bail!("there was no process {pid} (`otherworld inspect ps` lists them)"),
    }
}

/// A record as dmesg(1) prints it.
pub fn log_line(record: &LogRecord) -> String {
    let (seconds, micros) = (record.ts_ns / 1_000_000_000, record.ts_ns / 1000 % 1_000_000);
    format!("[{seconds:5}.{micros:06}] {}\n", record.text)
}

fn panic_text(panic: &Panic) -> String {
    let message = if panic.message.is_empty() { "no message in the log" } else { &panic.message };
    let mut out = format!("Kernel panic - not syncing: {message}\n");
    if let (Some(cpu), Some(tid)) = (panic.cpu, panic.tid) {
        out.push_str(&format!("CPU {cpu}, task {tid} ({})\n", panic.comm));
    }
    for frame in &panic.stack {
        let mark = if frame.guessed { "? " } else { "" };
        out.push_str(&format!("  [<{:016x}>] {mark}{}\n", frame.address, frame.symbol));
    }
    out
}

fn ps(snapshot: &Snapshot) -> String {
    let mut out = format!(
        "{:>7} {:>7} {:>7} {:>7} {:>5} {:>7} {:>9} {:<8} {:<15} {}\n",
        "PID", "PPID", "PGID", "SID", "UID", "THREADS", "PAGES", "STATE", "NAME", "COMMAND"
    );
    for p in &snapshot.processes {
        let mm = p.address_space.and_then(|id| snapshot.address_spaces.get(&id));
        let pages: u64 =
            mm.iter().flat_map(|mm| &mm.vmas).flat_map(|v| &v.pages).map(|r| u64::from(r.count)).sum();
        let exe =
            mm.and_then(|mm| snapshot.files.get(&mm.exe?)).map(|f| f.path.to_string()).unwrap_or_default();
        let uid = p.threads.first().map_or(0, |t| t.credentials.uid);
        let alive = p.threads.iter().filter(|t| t.state != ThreadState::Dead).count();
        out.push_str(&format!(
            "{:>7} {:>7} {:>7} {:>7} {uid:>5} {alive:>7} {pages:>9} {:<8} {:<15} {exe}\n",
            p.pid,
            p.ppid,
            p.pgid,
            p.sid,
            state_word(&p.state),
            p.comm.to_string()
        ));
        if let Decision::GiveUp { reasons } = &p.decision {
            for reason in reasons {
                out.push_str(&format!("{:>8}{}\n", "", reason.text));
            }
        }
    }
    out
}

/// In the manner of /proc/PID/maps.
fn maps(snapshot: &Snapshot, mm: &snapshot::AddressSpace) -> String {
    let mut out = String::new();
    for vma in &mm.vmas {
        let bit = |prot, letter| if vma.prot.contains(prot) { letter } else { '-' };
        let (offset, inode, name) = match &vma.kind {
            VmaKind::File { file, offset } => {
                let file = snapshot.files.get(file);
                let inode = file.and_then(|f| snapshot.inodes.get(&f.inode)).map_or(0, |i| i.ino);
                let name = file.map(|f| format!("{}{}", f.path, if f.deleted { " (deleted)" } else { "" }));
                (*offset, inode, name.unwrap_or_else(|| "(unknown file)".into()))
            }
            VmaKind::AioRing { .. } => (0, 0, "/[aio] (deleted)".into()),
            VmaKind::AnonymousHuge { .. } => (0, 0, "/anon_hugepage (deleted)".into()),
            VmaKind::Anonymous => (0, 0, special_name(mm, vma.start, vma.end)),
            VmaKind::SharedAnonymous { offset, .. } => (*offset, 0, "/dev/zero (deleted)".into()),
            VmaKind::SysvShm { id, offset } => {
                (*offset, *id as u64, snapshot.shm_segment(*id).map(|s| s.file_name()).unwrap_or_default())
            }
            VmaKind::Special { name } => (0, 0, name.to_string()),
            VmaKind::Unsupported { what } => (0, 0, format!("({what})")),
        };
        let name = vma.name.as_ref().map_or(name, |n| format!("[anon:{n}]"));
        let pages: u64 = vma.pages.iter().map(|r| u64::from(r.count)).sum();
        let in_swap = vma.pages.iter().filter(|r| SwapArea::slot_of(r.pfn).is_some());
        let swapped: u64 = in_swap.map(|r| u64::from(r.count)).sum();
        let row = format!(
            "{:012x}-{:012x} {}{}{}{} {offset:08x} {inode:>8} {pages:>7} {swapped:>5}  {name}",
            vma.start,
            vma.end,
            bit(Prot::READ, 'r'),
            bit(Prot::WRITE, 'w'),
            bit(Prot::EXEC, 'x'),
            if vma.shared { 's' } else { 'p' },
        );
        out.push_str(row.trim_end());
        out.push('\n');
    }
    out
}

fn special_name(mm: &snapshot::AddressSpace, start: u64, end: u64) -> String {
    let layout = &mm.layout;
    if start <= layout.brk && end >= layout.start_brk && layout.brk > layout.start_brk {
        "[heap]".into()
    } else if start <= layout.start_stack && end > layout.start_stack {
        "[stack]".into()
    } else {
        String::new()
    }
}

fn kind_word(kind: &FileKind) -> String {
    match kind {
        FileKind::Regular => "file".into(),
        FileKind::Directory => "dir".into(),
        FileKind::CharDevice { major, minor } => format!("char {major}:{minor}"),
        FileKind::Pipe { end, .. } => format!("pipe {end:?}").to_lowercase(),
        FileKind::Tty { .. } => "tty".into(),
        FileKind::Memfd { .. } => "memfd".into(),
        FileKind::HungUpTty => "tty that was hung up".into(),
        FileKind::Epoll(epoll) => format!("epoll of {}", epoll.items.len()),
        FileKind::EventFd(_) => "eventfd".into(),
        FileKind::TimerFd(_) => "timerfd".into(),
        FileKind::SignalFd(_) => "signalfd".into(),
        FileKind::Unix { .. } => "unix".into(),
        FileKind::Inet(_) => "inet".into(),
        FileKind::Netlink(_) => "netlink".into(),
        FileKind::Path => "path".into(),
        FileKind::PidFd(pidfd) => format!("pidfd {}", pidfd.pid),
        FileKind::Inotify(inotify) => format!("inotify {}", inotify.watches.len()),
        FileKind::Proc(_) => "proc".into(),
        FileKind::Namespace(namespace) => format!("ns {}", namespace.name),
        FileKind::Unsupported { what } => what.clone(),
        #[allow(unreachable_patterns)]
        _ => "?".into(),
    }
}

fn files(snapshot: &Snapshot, process: &Process) -> String {
    let mut out = format!("{:>5} {:>10} {:>12}  {:<14} {}\n", "FD", "FLAGS", "POSITION", "KIND", "NAME");
    for d in &process.descriptors {
        let Some(file) = snapshot.files.get(&d.file) else {
            out.push_str(&format!("{:>5} (could not be read)\n", d.fd));
            continue;
        };
        let cloexec = if d.cloexec { libc::O_CLOEXEC } else { 0 };
        let name = match &file.kind {
            FileKind::Unix { socket } => snapshot.unix_description(*socket),
            FileKind::Inet(socket) => socket.description(),
            FileKind::Netlink(socket) => socket.description(),
            _ => file.path.to_string(),
        };
        out.push_str(&format!(
            "{:>5} {:>#10o} {:>12}  {:<14} {}{}\n",
            d.fd,
            file.flags | cloexec,
            file.pos,
            kind_word(&file.kind),
            name,
            if file.deleted { " (deleted)" } else { "" }
        ));
    }
    out
}

/// Descriptors together with what they lead to.
fn files_json(snapshot: &Snapshot, process: &Process) -> Vec<serde_json::Value> {
    let entry = |d: &snapshot::Descriptor| {
        let file = snapshot.files.get(&d.file);
        let inode = file.and_then(|f| snapshot.inodes.get(&f.inode));
        // The list of page frames is for programs that pour, not for this table.
        let size = inode.map(|i| i.size);
        serde_json::json!({ "fd": d.fd, "cloexec": d.cloexec, "id": d.file, "file": file, "size": size })
    };
    process.descriptors.iter().map(entry).collect()
}
