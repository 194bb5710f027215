//! Skeletons: the new processes before they get their memory.
//!
//! A skeleton is a fork of this program that does, in its own code, everything that does not depend on the address space:
//! session, process group, controlling terminal, directories, signal actions, descriptors. It makes its own children. Then it
//! waits to be taken over with ptrace. Skeletons report to the worker through a pipe and keep in step by reading from pipes that the
//! worker closes; nobody polls, and a skeleton that dies is noticed by the pipe's end.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use snapshot::{PhysMem, Pid, Process, ProcessState, SigAction, Snapshot};

use crate::deadline::Deadline;
use crate::file::Files;
use crate::plan::{Birth, Node, NodeId, Plan, Role};
use crate::{copy_on_write, pidfd, sys, tty};

/// Which step a skeleton failed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Create = 1,
    Session,
    Group,
    Terminal,
    Foreground,
    Directory,
    Root,
    Signals,
    Descriptors,
    Children,
    Identity,
    Subreaper,
    Namespaces,
}

impl Step {
    const ALL: [(Step, &'static str); 13] = [
        (Step::Create, "create the process"),
        (Step::Session, "start the session"),
        (Step::Group, "join the process group"),
        (Step::Terminal, "take the controlling terminal"),
        (Step::Foreground, "set the terminal's foreground group"),
        (Step::Directory, "enter the working directory"),
        (Step::Root, "enter the root directory"),
        (Step::Signals, "set the signal actions"),
        (Step::Descriptors, "set up the descriptors"),
        (Step::Children, "wait for exited children"),
        (Step::Identity, "set the user of the exited process"),
        (Step::Subreaper, "become a subreaper"),
        (Step::Namespaces, "enter its namespaces"),
    ];

    fn describe(code: u8) -> &'static str {
        Self::ALL.iter().find(|(s, _)| *s as u8 == code).map_or("an unknown step", |(_, text)| text)
    }
}

/// How far a skeleton has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Never heard of.
    Missing,
    /// Exists.
    Born,
    /// Waits for its memory (or, a zombie, has exited).
    Ready,
    /// Could not; for people.
    Failed(String),
}

const BORN: u8 = 1;
const READY: u8 = 2;
const FAILED: u8 = 3;

/// What skeletons write to the worker; small enough to be written whole.
#[derive(Clone, Copy)]
struct Message {
    pid: Pid,
    kind: u8,
    step: u8,
    errno: i32,
}

impl Message {
    const SIZE: usize = 12;

    fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut b = [0; Self::SIZE];
        b[..4].copy_from_slice(&self.pid.to_ne_bytes());
        b[4] = self.kind;
        b[5] = self.step;
        b[8..].copy_from_slice(&self.errno.to_ne_bytes());
        b
    }

    fn from_bytes(b: &[u8]) -> Option<Self> {
        let word = |i: usize| Some(i32::from_ne_bytes(b.get(i..i + 4)?.try_into().ok()?));
        Some(Self { pid: word(0)?, kind: *b.get(4)?, step: *b.get(5)?, errno: word(8)? })
    }
}

/// A pipe whose ends have numbers that no process uses.
fn high_pipe(base: RawFd) -> Result<(OwnedFd, OwnedFd), Errno> {
    let (r, w) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    Ok((sys::lift(r, base)?, sys::lift(w, base)?))
}

/// What all skeletons inherit.
struct Context<'a> {
    snapshot: &'a Snapshot,
    plan: &'a Plan,
    files: &'a Files,
    copy_on_write: &'a copy_on_write::Plan,
    mem: &'a dyn PhysMem,
    /// Reports of the first stage (existing), then of the second (ready). Closing them is part of the message.
    reports: Cell<[RawFd; 2]>,
    /// End-of-file there starts the second stage, and ends the placeholders.
    gates: [RawFd; 2],
    /// Other ends of the gates: to be closed at birth.
    gate_holds: [RawFd; 2],
    /// Signals for which the worker itself has another than the default action.
    inherited_actions: Vec<i32>,
}

/// All signals but SIGTRAP, with which the injected code reports.
const BLOCKED: u64 = !(1 << (libc::SIGTRAP - 1));

/// Creates all processes of the plan. Comes back when each of them has reported, is dead, or the deadline is over.
pub(crate) fn create(
    snapshot: &Snapshot,
    plan: &Plan,
    files: &mut Files,
    (copy_on_write, mem): (&copy_on_write::Plan, &dyn PhysMem),
    deadline: Deadline,
) -> Result<BTreeMap<Pid, State>, Errno> {
    let base = files.base;
    let (reports1, reports1_w) = high_pipe(base)?;
    let (reports2, reports2_w) = high_pipe(base)?;
    let (gate1, gate1_w) = high_pipe(base)?;
    let (gate2, gate2_w) = high_pipe(base)?;
    let context = Context {
        snapshot,
        plan,
        files: &*files,
        copy_on_write,
        mem,
        reports: Cell::new([reports1_w.as_raw_fd(), reports2_w.as_raw_fd()]),
        gates: [gate1.as_raw_fd(), gate2.as_raw_fd()],
        gate_holds: [gate1_w.as_raw_fd(), gate2_w.as_raw_fd()],
        inherited_actions: (1..=64).filter(|&s| !sys::has_default_action(s)).collect(),
    };
    let mut states: BTreeMap<Pid, State> = plan.nodes.iter().map(|n| (n.pid, State::Missing)).collect();
    // Children start with these, and must not be ended by a stray signal before they have arranged themselves.
    let all = nix::sys::signal::SigSet::all();
    let mut before = nix::sys::signal::SigSet::empty();
    nix::sys::signal::sigprocmask(nix::sys::signal::SigmaskHow::SIG_SETMASK, Some(&all), Some(&mut before))?;
    for &(id, birth) in &plan.roots {
        if let Err(e) = context.make(id, birth) {
            states.insert(plan.nodes[id].pid, State::Failed(creation_failed(plan.nodes[id].pid, e)));
        }
    }
    nix::sys::signal::sigprocmask(nix::sys::signal::SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    drop((reports1_w, reports2_w));
    collect(&reports1, &mut states, deadline)?;
    files.open_late(snapshot, &|pid| {
        let is_placeholder = plan.node(pid).is_none_or(|node| node.role == Role::Placeholder);
        !is_placeholder && states.get(&pid) == Some(&State::Born)
    });
    drop(gate1_w);
    collect(&reports2, &mut states, deadline)?;
    drop(gate2_w);
    Ok(states)
}

fn creation_failed(pid: Pid, errno: Errno) -> String {
    match (errno, sys::occupant(pid)) {
        (Errno::EEXIST, Some(who)) => format!("PID {pid} is taken by {who}"),
        _ => format!("create the process: {errno}"),
    }
}

/// Reads reports until all writers are gone.
fn collect(from: &OwnedFd, states: &mut BTreeMap<Pid, State>, deadline: Deadline) -> Result<(), Errno> {
    use std::os::fd::AsFd;
    let mut pending = Vec::new();
    loop {
        let timeout = PollTimeout::try_from(deadline.left()).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(Errno::EINTR) if !deadline.is_over() => continue,
            Err(Errno::EINTR) => return Ok(()),
            Err(e) => return Err(e),
        }
        let mut buf = [0; 4096];
        let n = match nix::unistd::read(from, &mut buf) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e),
        };
        pending.extend_from_slice(&buf[..n]);
        let whole = pending.len() / Message::SIZE * Message::SIZE;
        for message in pending[..whole].chunks(Message::SIZE).filter_map(Message::from_bytes) {
            let errno = Errno::from_raw(message.errno);
            let state = match message.kind {
                BORN => State::Born,
                READY => State::Ready,
                _ if message.step == Step::Create as u8 => State::Failed(creation_failed(message.pid, errno)),
                _ => State::Failed(format!("{}: {errno}", Step::describe(message.step))),
            };
            states.insert(message.pid, state);
        }
        pending.drain(..whole);
    }
}

impl Context<'_> {
    /// Creates a node's process; does not return in it.
    fn make(&self, id: NodeId, birth: Birth) -> Result<(), Errno> {
        let node = &self.plan.nodes[id];
        let exit_signal = match node.role {
            Role::Process(i) | Role::Zombie(i) => self.snapshot.processes[i].exit_signal,
            Role::Placeholder => 0,
        };
        match birth {
            Birth::Child => self.fork(node, 0, exit_signal).map(drop),
            Birth::Sibling => self.fork(node, libc::CLONE_PARENT as u64, 0).map(drop),
            Birth::Orphan => {
                // The helper ends without a signal to us; its child is adopted.
                let helper = sys::fork(0, 0, 0)?;
                if helper == 0 {
                    let status = self.fork(node, 0, exit_signal).err().map_or(0, |e| e as i32);
                    sys::exit(status);
                }
                let mut status = 0;
                // SAFETY: waits for the helper that has just been made.
                Errno::result(unsafe { libc::waitpid(helper, &mut status, libc::__WALL) })?;
                match libc::WEXITSTATUS(status) {
                    0 => Ok(()),
                    e => Err(Errno::from_raw(e)),
                }
            }
        }
    }

    fn fork(&self, node: &Node, flags: u64, exit_signal: i32) -> Result<Pid, Errno> {
        let mut flags = flags;
        if node.shared.fs {
            flags |= libc::CLONE_FS as u64;
        }
        if node.shared.files {
            return self.fork_sharing_files(node, flags | libc::CLONE_FILES as u64, exit_signal);
        }
        let pid = sys::fork(flags, node.pid, exit_signal)?;
        if pid == 0 {
            for fd in self.gate_holds {
                let _ = sys::close_range(fd, fd as u32);
            }
            self.live(node);
        }
        Ok(pid)
    }

    /// Whoever has the table too closes its ends when it has reported: the new one gets ends of its own.
    fn fork_sharing_files(&self, node: &Node, flags: u64, exit_signal: i32) -> Result<Pid, Errno> {
        let [first, second] = self.reports.get();
        let duplicate = |fd| sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, self.files.base.into());
        let own = [duplicate(first)?, duplicate(second)?];
        let pid = sys::fork(flags, node.pid, exit_signal);
        if pid == Ok(0) {
            self.reports.set(own);
            self.live(node);
        }
        if pid.is_err() {
            own.into_iter().for_each(close);
        }
        pid
    }

    fn report(&self, stage: usize, pid: Pid, kind: u8, step: u8, errno: Errno) {
        let bytes = Message { pid, kind, step, errno: errno as i32 }.to_bytes();
        // SAFETY: writes a local array to a descriptor number.
        unsafe { libc::write(self.reports.get()[stage], bytes.as_ptr().cast(), bytes.len()) };
    }

    /// Says goodbye: nothing half-made stays, nor what others share.
    fn fail(&self, pid: Pid, step: Step, errno: Errno) -> ! {
        self.report(1, pid, FAILED, step as u8, errno);
        self.reports.get().into_iter().for_each(close);
        sys::exit(1)
    }

    fn wait_for_gate(&self, gate: usize) {
        let mut byte = 0u8;
        // SAFETY: reads at most one byte into a local variable.
        unsafe { libc::read(self.gates[gate], (&raw mut byte).cast(), 1) };
    }

    /// The life of a skeleton.
    fn live(&self, node: &Node) -> ! {
        let attempt = |step: Step, result: Result<(), Errno>| {
            if let Err(e) = result {
                self.fail(node.pid, step, e);
            }
        };
        attempt(Step::Signals, sys::set_signal_mask(BLOCKED));
        for &signo in &self.inherited_actions {
            // SAFETY: the default action calls nothing.
            attempt(Step::Signals, unsafe { sys::set_signal_action(signo, &SigAction::default()) });
        }
        let process = match node.role {
            Role::Process(i) | Role::Zombie(i) => Some(&self.snapshot.processes[i]),
            Role::Placeholder => None,
        };
        if let Some(p) = process.filter(|p| p.child_subreaper) {
            attempt(Step::Subreaper, sys::prctl(libc::PR_SET_CHILD_SUBREAPER, p.child_subreaper.into()));
        }
        if let (Role::Process(_), Some(p)) = (node.role, process) {
            self.copy_on_write.fill(p, self.mem);
        }
        self.make_all(&node.makes_first);
        if node.sid == node.pid {
            attempt(Step::Session, nix::unistd::setsid().map(drop));
            if let Some(tty) = process.and_then(|p| p.ctty).and_then(|id| self.snapshot.ttys.get(&id)) {
                attempt(Step::Terminal, tty::take_control(tty));
            }
        } else if node.pgid == node.pid {
            attempt(Step::Group, set_group(0));
        }
        self.make_all(&node.makes);
        self.report(0, node.pid, BORN, 0, Errno::UnknownErrno);
        close(self.reports.get()[0]);

        // All leaders exist now.
        self.wait_for_gate(0);
        if node.pgid != node.pid && nix::unistd::getpgrp().as_raw() != node.pgid {
            attempt(Step::Group, set_group(node.pgid));
        }
        match (node.role, process) {
            (Role::Placeholder, _) | (_, None) => {
                self.report(1, node.pid, READY, 0, Errno::UnknownErrno);
                close(self.reports.get()[1]);
                self.wait_for_gate(1);
                sys::exit(0)
            }
            (Role::Zombie(_), Some(p)) => self.end_as(node, p),
            (Role::Process(_), Some(p)) => self.become_ready(node, p),
        }
    }

    fn make_all(&self, list: &[(NodeId, Birth)]) {
        for &(id, birth) in list {
            if let Err(e) = self.make(id, birth) {
                self.report(1, self.plan.nodes[id].pid, FAILED, Step::Create as u8, e);
            }
        }
    }

    fn become_ready(&self, node: &Node, p: &Process) -> ! {
        let attempt = |step: Step, result: Result<(), Errno>| {
            if let Err(e) = result {
                self.fail(node.pid, step, e);
            }
        };
        attempt(Step::Children, self.await_zombies(node));
        let fg = p.ctty.and_then(|id| self.snapshot.ttys.get(&id)).filter(|t| t.session == p.pid);
        if let Some(tty) = fg.filter(|t| t.foreground != 0 && t.foreground != p.pgid) {
            // The foreground group may have died with nobody of it coming back: then nobody misses it.
            match tty::set_foreground(tty, tty.foreground) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(e) => self.fail(node.pid, Step::Foreground, e),
            }
        }
        attempt(Step::Signals, set_actions(p));
        // Nothing is opened by path from here on: it may mean something else below another root.
        attempt(Step::Namespaces, self.files.namespaces.enter(p));
        // What is shared is the maker's to set.
        if !node.shared.fs {
            attempt(Step::Directory, enter_directories(p));
        }
        if !node.shared.files {
            attempt(Step::Descriptors, self.set_descriptors(p));
        }
        self.report(1, node.pid, READY, 0, Errno::UnknownErrno);
        close(self.reports.get()[1]);
        loop {
            // SAFETY: pause has no arguments.
            unsafe { libc::pause() };
        }
    }

    /// Exited children must have exited, and their SIGCHLD must be gone, before this process gets its own pending signals.
    fn await_zombies(&self, node: &Node) -> Result<(), Errno> {
        let children = self.plan.nodes.iter().filter(|n| n.parent == Some(node.pid));
        let zombies = children.filter(|n| matches!(n.role, Role::Zombie(_)));
        let mut any = false;
        for zombie in zombies {
            any = true;
            let flags = libc::WEXITED | libc::WNOWAIT | libc::__WALL;
            // SAFETY: an all-zero siginfo is valid, and is only written to.
            let r = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                libc::waitid(libc::P_PID, zombie.pid as u32, &mut info, flags)
            };
            match Errno::result(r) {
                // It could not be made, and has been reported.
                Ok(_) | Err(Errno::ECHILD) => {}
                Err(e) => return Err(e),
            }
        }
        if any {
            let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            let all = u64::MAX;
            // SAFETY: the kernel reads an eight-byte set and a timespec, and writes nothing.
            while unsafe {
                sys::raw(
                    libc::SYS_rt_sigtimedwait,
                    [&raw const all as u64, 0, &raw const none as u64, 8, 0, 0],
                )
            }
            .is_ok()
            {}
        }
        Ok(())
    }

    fn set_descriptors(&self, p: &Process) -> Result<(), Errno> {
        sys::close_range(0, self.files.base as u32 - 1)?;
        for d in &p.descriptors {
            let (fd, fetch) = self.files.inherited(d.file).ok_or(Errno::EBADF)?;
            let Some(own_pidfd) = fetch else {
                sys::dup3(fd, d.fd, d.cloexec)?;
                continue;
            };
            // It comes under the lowest free number.
            let fetched = pidfd::get(own_pidfd, fd)?;
            if fetched.as_raw_fd() == d.fd {
                let flag = if d.cloexec { libc::FD_CLOEXEC } else { 0 };
                sys::fcntl(fetched.into_raw_fd(), libc::F_SETFD, flag.into())?;
            } else {
                sys::dup3(fetched.as_raw_fd(), d.fd, d.cloexec)?;
            }
        }
        Ok(())
    }

    /// Exits as the old process did.
    fn end_as(&self, node: &Node, p: &Process) -> ! {
        let status = match p.state {
            ProcessState::Zombie { status } => status,
            _ => 0,
        };
        if let Some(c) = p.threads.first().map(|t| &t.credentials) {
            // SAFETY: numbers only.
            let r = unsafe {
                sys::raw(libc::SYS_setresgid, [c.gid.into(), c.egid.into(), c.sgid.into(), 0, 0, 0]).and_then(
                    |_| sys::raw(libc::SYS_setresuid, [c.uid.into(), c.euid.into(), c.suid.into(), 0, 0, 0]),
                )
            };
            if let Err(e) = r {
                self.fail(node.pid, Step::Identity, e);
            }
        }
        set_name(p);
        self.report(1, node.pid, READY, 0, Errno::UnknownErrno);
        let signal = status & 0x7f;
        if signal == 0 {
            sys::exit(status >> 8 & 0xff);
        }
        let none = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
        let _ = sys::prlimit(0, libc::RLIMIT_CORE, Some(none));
        let _ = sys::set_signal_mask(0);
        // SAFETY: a signal to ourselves; its action is the default one.
        unsafe { libc::kill(node.pid, signal) };
        sys::exit(1)
    }
}

fn close(fd: RawFd) {
    let _ = sys::close_range(fd, fd as u32);
}

fn set_group(pgid: Pid) -> Result<(), Errno> {
    let me = nix::unistd::Pid::from_raw(0);
    nix::unistd::setpgid(me, nix::unistd::Pid::from_raw(pgid))
}

fn set_name(p: &Process) {
    let mut name = [0; 16];
    for (to, from) in name.iter_mut().zip(p.comm.as_bytes().iter().take(15)) {
        *to = *from;
    }
    let _ = sys::prctl(libc::PR_SET_NAME, name.as_ptr() as u64);
}

fn set_actions(p: &Process) -> Result<(), Errno> {
    for (action, signo) in p.signals.actions.iter().zip(1..=64) {
        if signo == libc::SIGKILL || signo == libc::SIGSTOP || *action == SigAction::default() {
            continue;
        }
        if crate::signal::is_set_late(signo, action) {
            continue;
        }
        // SAFETY: all signals but SIGTRAP are blocked until the handlers' code is in place, and SIGTRAP goes to the tracer.
        unsafe { sys::set_signal_action(signo, action)? };
    }
    Ok(())
}

fn enter_directories(p: &Process) -> Result<(), Errno> {
    let fs = &p.fs;
    nix::unistd::chdir(fs.cwd.as_path()).or_else(|e| match e {
        Errno::ENOENT if fs.cwd_deleted => enter_deleted(&fs.cwd),
        e => Err(e),
    })?;
    if fs.root.as_bytes() != b"/" && !fs.root.is_empty() {
        nix::unistd::chroot(fs.root.as_path())?;
    }
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(fs.umask));
    Ok(())
}

/// A directory that is made, entered and removed is as gone as the old one.
fn enter_deleted(path: &snapshot::Bytes) -> Result<(), Errno> {
    let path = path.as_path();
    nix::unistd::mkdir(path, nix::sys::stat::Mode::from_bits_truncate(0o700))?;
    let entered = nix::unistd::chdir(path);
    // SAFETY: the path is NUL-terminated.
    Errno::result(unsafe { libc::rmdir(sys::c_path(path)?.as_ptr()) })?;
    entered
}
