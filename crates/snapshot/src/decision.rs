//! What is to be done with each process: decided for the whole snapshot before the first process is created.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    AddressSpaceId, Descriptor, EventFd, FileKind, FindingKind, Fpu, OpenFile, Pid, Process, ProcessState,
    Resume, Severity, Snapshot, ThreadState, UnixSocket, VmaKind,
};

/// The kernel's return value of an interrupted call (-EINTR).
const EINTR: i64 = -4;

/// What is to be done with a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Decision {
    /// Not decided yet.
    #[default]
    Undecided,
    /// The configuration does not ask for it.
    NotSelected {
        /// Why: which rule.
        why: String,
    },
    /// Rebuild it and let it go on from its registers.
    Continue {
        /// What will be different for it; empty when nothing is known to be.
        losses: Vec<Reason>,
    },
    /// It does not come back.
    GiveUp {
        /// Every reason that was found, the first being enough.
        reasons: Vec<Reason>,
    },
}

impl Decision {
    /// Whether the process is to be rebuilt.
    pub fn is_continue(&self) -> bool {
        matches!(self, Self::Continue { .. })
    }
}

/// Why something is given up or lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// For programs: stable, kebab-case (`live-fpu`, `descriptor`, `swapped`).
    pub code: String,
    /// For people.
    pub text: String,
}

impl Reason {
    /// A reason from its two forms.
    pub fn new(code: &str, text: impl Into<String>) -> Self {
        Self { code: code.to_owned(), text: text.into() }
    }
}

/// Which processes an entry of the configuration means. All fields that are given must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selector {
    /// systemd unit, `redis-server.service`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Path of the executable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    /// User name or numeric id (real uid).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// One process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<Pid>,
}

/// What to do with a thread whose live FPU registers nobody saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LiveFpu {
    /// Its process is given up.
    #[default]
    GiveUp,
    /// Its process enters its crash procedure, or is given up when it has none.
    CrashProcedure,
    /// It goes on with the FPU in its initial state, and the report warns.
    ResumeAnyway,
}

/// What to do with a process when there is doubt about its own state: two sources disagree, and which of them is damaged cannot be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Integrity {
    /// It enters its crash procedure, which is told of it, or is given up when it has none.
    #[default]
    Strict,
    /// It goes on, and the report warns. Doubt about credentials still gives it up.
    Permissive,
}

/// How much of the machine goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The processes that are selected, and what they have started.
    #[default]
    Selected,
    /// Every program but those that make up the running system: PID 1, its daemons, login prompts.
    Programs,
    /// The whole machine, PID 1 included. Descriptors that cannot be rebuilt become dead ones, instead of taking their processes with
    /// them.
    All,
}

/// The part of the configuration that decides over processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// How much goes on, apart from what `never` means.
    pub mode: Mode,
    /// With [`Mode::Selected`]: the processes that one of these means, and their descendants.
    pub select: Vec<Selector>,
    /// Wins over everything else.
    pub never: Vec<Selector>,
    #[allow(missing_docs)]
    pub live_fpu: LiveFpu,
    #[allow(missing_docs)]
    #[serde(default)]
    pub integrity: Integrity,
    /// User names of the selectors as numbers (from the main kernel's user database, resolved when arming).
    pub users: BTreeMap<String, u32>,
}

impl Policy {
    fn matches(&self, selector: &Selector, process: &Process, exe: &str) -> bool {
        let uid = process.threads.first().map(|t| t.credentials.uid);
        let user_fits = |name: &String| {
            let id = self.users.get(name).copied().or_else(|| name.parse().ok());
            id.is_some() && id == uid
        };
        *selector != Selector::default()
            && selector.unit.as_ref().is_none_or(|u| process.unit.as_ref() == Some(u))
            && selector.exe.as_ref().is_none_or(|e| e == exe)
            && selector.user.as_ref().is_none_or(user_fits)
            && selector.pid.is_none_or(|p| p == process.pid)
    }
}

/// Fills in [`Process::decision`] of every process.
///
/// Nothing is created or changed outside the snapshot. A process is only continued when everything it consists of can be
/// brought back; each thing that cannot is a [`Reason`].
pub fn decide(snapshot: &mut Snapshot, policy: &Policy) {
    let selection = select(snapshot, policy);
    let mm_users = address_space_users(snapshot);
    let mut decisions: BTreeMap<Pid, Decision> = BTreeMap::new();
    for process in &snapshot.processes {
        let decision = match selection.get(&process.pid) {
            Some(Err(why)) => Decision::NotSelected { why: why.clone() },
            // Nothing is known of a process without threads that a rule for its user could be held against.
            None if is_unreadable(process) && policy.select.iter().any(|rule| rule.user.is_some()) => {
                judge(snapshot, process, policy, &mm_users)
            }
            None => Decision::NotSelected { why: "no rule asks for it".into() },
            Some(Ok(())) if matches!(process.state, ProcessState::Exiting { .. }) => {
                Decision::NotSelected { why: "it was exiting, and nobody waits for it".into() }
            }
            Some(Ok(())) => judge(snapshot, process, policy, &mm_users),
        };
        decisions.insert(process.pid, decision);
    }
    // A zombie is there for its parent to wait for; without the parent nobody would.
    for process in &snapshot.processes {
        if let ProcessState::Zombie { .. } = process.state
            && decisions.get(&process.pid).is_some_and(Decision::is_continue)
            && !decisions.get(&process.ppid).is_some_and(Decision::is_continue)
        {
            let why = "it had exited, and the parent that would wait for it does not come back".into();
            decisions.insert(process.pid, Decision::NotSelected { why });
        }
    }
    for process in &mut snapshot.processes {
        if let Some(d) = decisions.remove(&process.pid) {
            process.decision = d;
        }
    }
    let known: BTreeMap<Pid, usize> =
        snapshot.processes.iter().enumerate().map(|(i, p)| (p.pid, i)).collect();
    for finding in &mut snapshot.findings {
        let process = finding.pid.and_then(|pid| snapshot.processes.get(*known.get(&pid)?));
        finding.action = finding.action_for(process);
    }
    snapshot.dead_files.clear();
    if policy.mode == Mode::All {
        let back = snapshot.processes.iter().filter(|p| p.decision.is_continue());
        let descriptors = back.flat_map(|p| &p.descriptors);
        let is_dead = |d: &&Descriptor| !judge_descriptor(snapshot, d).0.is_empty();
        snapshot.dead_files = descriptors.filter(is_dead).map(|d| d.file).collect();
    }
}

/// Whether nothing could be read of a process but that it was there.
fn is_unreadable(process: &Process) -> bool {
    process.threads.is_empty() && matches!(process.state, ProcessState::Alive | ProcessState::Stopped { .. })
}

/// Who is asked for: `Ok` selected, `Err` excluded by name; absent: no rule applies.
fn select(snapshot: &Snapshot, policy: &Policy) -> BTreeMap<Pid, Result<(), String>> {
    let mut result = BTreeMap::new();
    for process in &snapshot.processes {
        let exe = exe_path(snapshot, process);
        if let Some(rule) = policy.never.iter().find(|s| policy.matches(s, process, &exe)) {
            result.insert(process.pid, Err(format!("never resurrected: {}", describe(rule))));
        } else if policy.mode != Mode::Selected
            || policy.select.iter().any(|s| policy.matches(s, process, &exe))
        {
            result.insert(process.pid, Ok(()));
        }
    }
    // What a selected program started belongs to it. Parents may have higher PIDs than their children, hence until
    // nothing changes; each round adds one generation at least, so the number of processes bounds it.
    for _ in 0..snapshot.processes.len() {
        let added: Vec<Pid> = snapshot
            .processes
            .iter()
            .filter(|p| !result.contains_key(&p.pid) && matches!(result.get(&p.ppid), Some(Ok(()))))
            .map(|p| p.pid)
            .collect();
        if added.is_empty() {
            break;
        }
        result.extend(added.into_iter().map(|pid| (pid, Ok(()))));
    }
    result
}

fn describe(s: &Selector) -> String {
    let parts = [
        s.unit.as_ref().map(|v| format!("unit {v}")),
        s.exe.as_ref().map(|v| format!("executable {v}")),
        s.user.as_ref().map(|v| format!("user {v}")),
        s.pid.map(|v| format!("PID {v}")),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Path of the program, without escapes.
fn exe_path(snapshot: &Snapshot, process: &Process) -> String {
    process
        .address_space
        .and_then(|id| snapshot.address_spaces.get(&id))
        .and_then(|mm| mm.exe)
        .and_then(|id| snapshot.files.get(&id))
        .map(|f| String::from_utf8_lossy(f.path.as_bytes()).into_owned())
        .unwrap_or_default()
}

fn address_space_users(snapshot: &Snapshot) -> BTreeMap<AddressSpaceId, Vec<Pid>> {
    let mut users: BTreeMap<AddressSpaceId, Vec<Pid>> = BTreeMap::new();
    for p in &snapshot.processes {
        if let Some(id) = p.address_space {
            users.entry(id).or_default().push(p.pid);
        }
    }
    users
}

fn judge(
    snapshot: &Snapshot,
    process: &Process,
    policy: &Policy,
    mm_users: &BTreeMap<AddressSpaceId, Vec<Pid>>,
) -> Decision {
    let mut reasons = Vec::new();
    let mut losses = Vec::new();
    for finding in snapshot.findings.iter().filter(|f| f.pid == Some(process.pid)) {
        let reason = Reason::new(&finding.object, &finding.text);
        match finding.severity {
            Severity::Note => {}
            Severity::Loss => losses.push(reason),
            Severity::Doubt if doubt(process, finding.kind, policy.integrity) => losses.push(reason),
            Severity::Doubt | Severity::Broken => reasons.push(reason),
        }
    }
    // What a kernel tells programs while its code is not its own is nobody's matter more than the others'.
    let everybody = snapshot.findings.iter().filter(|f| f.pid.is_none() && f.kind == FindingKind::KernelText);
    losses.extend(everybody.filter(|f| f.severity > Severity::Note).map(|f| Reason::new(&f.object, &f.text)));
    reasons.extend(
        process
            .unsupported
            .iter()
            .map(|what| Reason::new("unsupported", format!("{what}: not brought back by this version"))),
    );
    if let ProcessState::Zombie { .. } = process.state {
        return conclude(reasons, losses);
    }
    crate::cgroup::judge(snapshot, process, &mut losses);
    crate::namespace::judge(snapshot, process, policy.mode, &mut reasons, &mut losses);
    judge_memory(snapshot, process, mm_users, &mut reasons);
    judge_descriptors(snapshot, process, policy.mode, &mut reasons, &mut losses);
    crate::lock::judge(snapshot, process, &mut reasons, &mut losses);
    crate::timer::judge(process, &mut reasons, &mut losses);
    for thread in process.threads.iter().filter(|t| t.state != ThreadState::Dead) {
        let tid = thread.tid;
        if let Resume::Impossible { why } = &thread.resume {
            reasons.push(Reason::new("system-call", format!("thread {tid}: {why}")));
        }
        // Programs must expect this of the calls that it is done to, but without the crash it would not have happened.
        if let Resume::Return { value: error @ ..0, why } = &thread.resume {
            let error = if *error == EINTR { "EINTR".to_owned() } else { format!("error {}", -error) };
            let text = format!("thread {tid}: its system call returns {error}: {why}");
            losses.push(Reason::new("interrupted", text));
        }
        crate::seccomp::judge(snapshot, thread, &mut reasons);
        if let Fpu::LostInSyscall { .. } = thread.fpu {
            let text = format!(
                "thread {tid} was in a system call on a CPU: the vector registers that it had before are lost, which compiled \
                 programs do not rely on"
            );
            losses.push(Reason::new("call-fpu", text));
        }
        if thread.fpu == Fpu::Lost {
            let text = format!(
                "thread {tid} was computing on CPU {}; its FPU registers were live there and nobody saved them (is the \
                 otherworld_saver module installed?)",
                thread.on_cpu.map_or("?".into(), |c| c.to_string())
            );
            let reason = Reason::new("live-fpu", text);
            match policy.live_fpu {
                LiveFpu::ResumeAnyway => losses.push(reason),
                // The procedure is told of it, and decides.
                LiveFpu::CrashProcedure if process.crash_procedure.is_some() => losses.push(reason),
                LiveFpu::GiveUp | LiveFpu::CrashProcedure => reasons.push(reason),
            }
        }
    }
    conclude(reasons, losses)
}

/// Whether a process comes back although there is doubt about it: as `policy` says, but never with credentials that may be somebody else's.
pub fn doubt(process: &Process, kind: FindingKind, policy: Integrity) -> bool {
    match (kind, policy) {
        (FindingKind::Credentials, _) => false,
        (_, Integrity::Permissive) => true,
        (_, Integrity::Strict) => process.crash_procedure.is_some(),
    }
}

fn conclude(reasons: Vec<Reason>, losses: Vec<Reason>) -> Decision {
    if reasons.is_empty() { Decision::Continue { losses } } else { Decision::GiveUp { reasons } }
}

fn judge_memory(
    snapshot: &Snapshot,
    process: &Process,
    mm_users: &BTreeMap<AddressSpaceId, Vec<Pid>>,
    reasons: &mut Vec<Reason>,
) {
    let Some((id, mm)) =
        process.address_space.and_then(|id| snapshot.address_spaces.get(&id).map(|mm| (id, mm)))
    else {
        reasons.push(Reason::new("memory", "its address space could not be read"));
        return;
    };
    let users = mm_users.get(&id).map_or(&[][..], Vec::as_slice);
    let sharers: Vec<String> = users.iter().filter(|&&pid| pid != process.pid).map(Pid::to_string).collect();
    if !sharers.is_empty() && !share_by_vfork(snapshot, users) {
        let text = format!("it shares its memory with PID {} (CLONE_VM)", sharers.join(", "));
        reasons.push(Reason::new("shared-memory", text));
    }
    // Who is executed anew leaves it all behind.
    let is_executing = process.threads.iter().any(|t| matches!(t.resume, Resume::Exec(_)));
    if mm.write_locked && !is_executing {
        let text = "its memory map was being changed when the kernel died (mmap_lock held for writing)";
        reasons.push(Reason::new("memory-locked", text));
    }
    // Of what could not be read only the program is known.
    if mm.vmas.is_empty() && !is_executing {
        reasons.push(Reason::new("memory", "its address space could not be read"));
    }
    if mm.exe.is_none() {
        reasons.push(Reason::new("memory", "its executable could not be found"));
    }
    crate::aio::judge(mm, reasons);
    let mut inodes = BTreeSet::new();
    for vma in &mm.vmas {
        let at = format!("mapping {:x}-{:x}", vma.start, vma.end);
        match &vma.kind {
            VmaKind::Unsupported { what } => {
                reasons
                    .push(Reason::new("mapping", format!("{at}: {what}: not brought back by this version")));
            }
            VmaKind::File { file, .. } => match snapshot.files.get(file) {
                None => reasons.push(Reason::new("mapping", format!("{at}: its file could not be read"))),
                Some(f) => {
                    if let FileKind::Unsupported { what } = &f.kind {
                        reasons.push(Reason::new(
                            "mapping",
                            format!("{at}: {what}: not brought back by this version"),
                        ));
                    } else if let FileKind::Proc(_) = f.kind {
                        let text = format!("{at}: {}: memory of the kernel or a device", f.path);
                        reasons.push(Reason::new("mapping", text));
                    } else if let Some(why) = obstacle_without_name(snapshot, f) {
                        reasons.push(Reason::new("deleted-file", format!("{at}: {}: {why}", f.path)));
                    }
                    inodes.insert(f.inode);
                }
            },
            VmaKind::SharedAnonymous { inode, .. } => {
                inodes.insert(*inode);
            }
            VmaKind::SysvShm { id, .. } => match snapshot.shm_segment(*id) {
                Some(segment) => {
                    inodes.insert(segment.inode);
                }
                None => {
                    let text = format!("{at}: its shared memory segment {id} could not be read");
                    reasons.push(Reason::new("mapping", text));
                }
            },
            VmaKind::Anonymous
            | VmaKind::AnonymousHuge { .. }
            | VmaKind::AioRing { .. }
            | VmaKind::Special { .. } => {}
        }
        crate::swap::judge_mapping(snapshot, &at, vma, reasons);
    }
    for inode in inodes.iter().filter_map(|id| snapshot.inodes.get(id)) {
        crate::swap::judge_inode(snapshot, &inode.path.to_string(), inode, reasons);
    }
}

/// Why pages of a process that are in swap areas cannot be had, as far as it is known by now.
pub fn swapped_out_of_reach(snapshot: &Snapshot, process: &Process) -> Vec<Reason> {
    let mut reasons = Vec::new();
    judge_memory(snapshot, process, &BTreeMap::new(), &mut reasons);
    reasons.retain(|reason| reason.code == "swapped");
    reasons
}

/// Why a file without a name cannot be made again; `None` if it can, or has a name.
fn obstacle_without_name(snapshot: &Snapshot, file: &OpenFile) -> Option<String> {
    if !file.deleted {
        return None;
    }
    match &file.kind {
        FileKind::Regular | FileKind::Memfd { .. } => match snapshot.inodes.get(&file.inode) {
            // The disk may not have heard of it, and still have all; or its blocks are known.
            Some(inode) if lost_its_name_lately(snapshot, inode) || is_mapped_without_name(inode) => None,
            Some(inode) => inode.obstacle_without_name(),
            None => Some("its inode could not be read".into()),
        },
        _ => Some("it had been deleted: not brought back by this version".into()),
    }
}

/// Whether it is known where on the disk the contents of a file without a name are.
fn is_mapped_without_name(inode: &crate::Inode) -> bool {
    inode.nlink == 0 && inode.extents.is_some()
}

/// Whether the last name of an inode was removed so lately that the disk may have it still.
fn lost_its_name_lately(snapshot: &Snapshot, inode: &crate::Inode) -> bool {
    let now = snapshot.clocks.realtime_ns / 1_000_000_000;
    inode.nlink == 0
        && !inode.lives_in_memory()
        && inode.ctime.sec >= now.saturating_sub(crate::RECENT_SECONDS)
}

/// Whether all but one of those who share an address space do so as the vfork children of another of them.
fn share_by_vfork(snapshot: &Snapshot, users: &[Pid]) -> bool {
    let processes = users.iter().filter_map(|pid| snapshot.process(*pid));
    processes.filter(|p| !(p.vfork && p.ppid != p.pid && users.contains(&p.ppid))).count() == 1
}

fn judge_descriptors(
    snapshot: &Snapshot,
    process: &Process,
    mode: Mode,
    reasons: &mut Vec<Reason>,
    losses: &mut Vec<Reason>,
) {
    for d in &process.descriptors {
        let (obstacles, of_file) = judge_descriptor(snapshot, d);
        match mode {
            Mode::All if !obstacles.is_empty() => losses.extend(obstacles.into_iter().map(dead)),
            _ => {
                reasons.extend(obstacles);
                losses.extend(of_file);
            }
        }
    }
}

/// What an obstacle is for a process that comes back nevertheless.
fn dead(obstacle: Reason) -> Reason {
    let text = format!("{}; it answers with errors and the end of the file from now on", obstacle.text);
    Reason::new("dead-descriptor", text)
}

/// Why a descriptor's file cannot be brought back; and what is different when it can.
fn judge_descriptor(snapshot: &Snapshot, d: &Descriptor) -> (Vec<Reason>, Vec<Reason>) {
    let (mut reasons, mut losses) = (Vec::new(), Vec::new());
    let Some(file) = snapshot.files.get(&d.file) else {
        let text = format!("descriptor {}: its file could not be read", d.fd);
        return (vec![Reason::new("descriptor", text)], losses);
    };
    let fd = format!("descriptor {} ({})", d.fd, file.path);
    let mut give_up = |code: &str, why: String| reasons.push(Reason::new(code, format!("{fd}: {why}")));
    match &file.kind {
        FileKind::Unsupported { what } => {
            give_up("descriptor", format!("{what}: not brought back by this version"));
        }
        FileKind::Tty { tty } => match snapshot.ttys.get(tty) {
            Some(t) => {
                if let Some(why) = &t.unsupported {
                    give_up("terminal", why.clone());
                }
                if t.pty.as_ref().is_some_and(|pty| !snapshot.ttys.contains_key(&pty.other)) {
                    give_up("terminal", "its other end could not be read".into());
                }
            }
            None => give_up("terminal", "its terminal could not be read".into()),
        },
        FileKind::Pipe { pipe, .. } if !snapshot.pipes.contains_key(pipe) => {
            give_up("pipe", "its pipe could not be read".into());
        }
        FileKind::Unix { socket: id } => match snapshot.unix_sockets.get(id) {
            Some(socket) => {
                if let Some(why) = unix_obstacle(snapshot, socket) {
                    give_up("socket", format!("{}: {why}", snapshot.unix_description(*id)));
                }
            }
            None => give_up("socket", "its socket could not be read".into()),
        },
        // A pipe has no name that could be gone, a FIFO has.
        FileKind::Pipe { .. } if !file.path.as_bytes().starts_with(b"/") => {}
        FileKind::Regular
        | FileKind::Memfd { .. }
        | FileKind::Directory
        | FileKind::Path
        | FileKind::Pipe { .. } => {
            if let Some(why) = obstacle_without_name(snapshot, file) {
                give_up("deleted-file", why);
            } else if let Some(why) = crate::namespace::obstacle_of_place(snapshot, file) {
                give_up("descriptor", why);
            }
            if let Some(inode) = snapshot.inodes.get(&file.inode) {
                crate::swap::judge_inode(snapshot, &fd, inode, &mut reasons);
            }
        }
        FileKind::EventFd(EventFd { count: EventFd::OVERFLOW, .. }) => {
            give_up("eventfd", "its counter has overflowed".into());
        }
        FileKind::Epoll(epoll) => losses.extend(epoll.losses(snapshot, d.fd)),
        FileKind::Device(device) => {
            let text = format!("{fd}: {}", device.loss());
            losses.push(Reason::new("device", text));
        }
        FileKind::CharDevice { .. }
        | FileKind::EventFd(_)
        | FileKind::TimerFd(_)
        | FileKind::SignalFd(_)
        | FileKind::HungUpTty => {}
        FileKind::PidFd(pidfd) => crate::pidfd::judge(snapshot, d, pidfd, &mut reasons),
        FileKind::Inotify(inotify) => crate::inotify::judge(d, inotify, &mut reasons, &mut losses),
        FileKind::Proc(_) | FileKind::Namespace(_) => {
            crate::proc::judge(snapshot, d, file, &mut reasons, &mut losses);
        }
        FileKind::Inet(socket) => crate::inet::judge(d, socket, &mut reasons, &mut losses),
        FileKind::Netlink(socket) => crate::netlink::judge(d, socket, &mut reasons, &mut losses),
    }
    (reasons, losses)
}

/// Why a unix socket cannot be brought back.
fn unix_obstacle(snapshot: &Snapshot, socket: &UnixSocket) -> Option<String> {
    let waiting = socket.waiting.iter();
    if let Some(why) = waiting.clone().find_map(|id| snapshot.unix_sockets.get(id)?.unsupported.as_ref()) {
        return Some(format!("of a connection that waits to be accepted: {why}"));
    }
    if waiting.clone().any(|id| !snapshot.unix_sockets.contains_key(id)) {
        return Some("a connection that waits to be accepted could not be read".into());
    }
    if socket.peer.is_some_and(|id| !snapshot.unix_sockets.contains_key(&id)) {
        return Some("the socket that it is connected to could not be read".into());
    }
    let is_unknown = |id| !snapshot.mount_namespaces.contains_key(&id);
    if socket.owns_address && socket.place.as_ref().and_then(|p| p.mount_namespace).is_some_and(is_unknown) {
        return Some("its name belongs to a mount namespace that is not known".into());
    }
    // What is on its way through it must be there, too: nobody else would miss it.
    let messages = waiting.filter_map(|id| snapshot.unix_sockets.get(id)).chain([socket]);
    let files = messages.flat_map(|socket| &socket.queue).flat_map(|message| &message.files);
    for id in files {
        match snapshot.files.get(id).map(|file| &file.kind) {
            None => return Some("an open file on its way through it could not be read".into()),
            Some(FileKind::Unsupported { what }) => {
                return Some(format!("an open file is on its way through it: {what}"));
            }
            Some(_) => {}
        }
    }
    socket.unsupported.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::*;

    /// A process of which everything can be brought back.
    fn process(pid: Pid, ppid: Pid, uid: u32) -> Process {
        let thread = Thread {
            tid: pid,
            comm: "program".into(),
            state: ThreadState::Sleeping,
            on_cpu: None,
            panicked: false,
            regs: Registers::default(),
            syscall: None,
            wchan: None,
            resume: Resume::UserMode,
            fpu: Fpu::Saved { xstate: Vec::new(), source: FpuSource::Memory },
            credentials: Credentials { uid, ..Credentials::default() },
            blocked: 0,
            pending: Vec::new(),
            altstack: AltStack::default(),
            robust_list: 0,
            clear_child_tid: 0,
            rseq: None,
            scheduling: Scheduling::default(),
            no_new_privs: false,
            pdeath_signal: 0,
            timer_slack_ns: 50_000,
            personality: 0,
            seccomp: Seccomp::Off,
        };
        Process {
            ppid,
            threads: vec![thread],
            address_space: Some(AddressSpaceId(pid as u64)),
            files_id: pid as u64,
            ..Process::new(pid, "program".into())
        }
    }

    fn machine(processes: Vec<Process>) -> Snapshot {
        let mut s = Snapshot { processes, ..Snapshot::default() };
        for p in &s.processes {
            let exe = FileId(1000 + p.pid as u64);
            s.files.insert(exe, open_file(FileKind::Regular, &format!("/usr/bin/program{}", p.pid)));
            let vmas = vec![anonymous(0x10_0000, 0x20_0000)];
            let mm = AddressSpace { exe: Some(exe), vmas, ..AddressSpace::default() };
            s.address_spaces.insert(AddressSpaceId(p.pid as u64), mm);
        }
        s
    }

    fn anonymous(start: u64, end: u64) -> Vma {
        Vma {
            start,
            end,
            prot: Prot::READ,
            shared: false,
            flags: VmaFlags::default(),
            kind: VmaKind::Anonymous,
            name: None,
            pages: vec![],
            lost_pages: 0,
        }
    }

    fn open_file(kind: FileKind, path: &str) -> OpenFile {
        OpenFile {
            kind,
            path: path.into(),
            deleted: false,
            mount_namespace: None,
            flags: 0,
            pos: 0,
            inode: InodeId(1),
            owner_pid: 0,
            owner_is_thread: false,
            owner_signal: 0,
            count: 1,
        }
    }

    fn unix_socket() -> UnixSocket {
        UnixSocket {
            kind: UnixKind::Stream,
            file: Some(FileId(7)),
            closed: false,
            address: None,
            owns_address: false,
            place: None,
            peer: None,
            listening: None,
            waiting: Vec::new(),
            queue: Vec::new(),
            shutdown: 0,
            error: 0,
            peer_credentials: None,
            max_queue: 10,
            options: SocketOptions::default(),
            unsupported: None,
        }
    }

    fn inode_with_lost_pages(lost_pages: u64) -> Inode {
        Inode {
            ino: 1,
            generation: 0,
            extents: None,
            doubtful: Vec::new(),
            xattrs: None,
            dev_major: 0,
            dev_minor: 1,
            fs_type: "tmpfs".into(),
            mode: 0o100_644,
            uid: 0,
            gid: 0,
            nlink: 1,
            size: 4096,
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            path: "/run/x".into(),
            dirty: false,
            pages: Vec::new(),
            huge_page: None,
            lost_pages,
        }
    }

    fn all() -> Policy {
        Policy { mode: Mode::Programs, ..Policy::default() }
    }

    fn decision(s: &Snapshot, pid: Pid) -> &Decision {
        &s.process(pid).unwrap().decision
    }

    /// The codes of the reasons for which a change to a sound process makes it be given up.
    fn reasons(change: impl FnOnce(&mut Snapshot)) -> Vec<String> {
        let mut s = machine(vec![process(500, 1, 1000)]);
        change(&mut s);
        decide(&mut s, &all());
        match decision(&s, 500) {
            Decision::GiveUp { reasons } => reasons.iter().map(|r| r.code.clone()).collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn of_the_whole_machine_descriptors_die_before_processes_do() {
        let mut s = machine(vec![process(500, 1, 1000), process(501, 1, 1000)]);
        let program = FileKind::Unsupported { what: "a BPF program".into() };
        s.files.insert(FileId(7), open_file(program, "anon_inode:bpf-prog"));
        s.processes[0].descriptors.push(Descriptor { fd: 9, file: FileId(7), cloexec: true });
        s.processes[1].unsupported.push("io_uring".into());
        decide(&mut s, &Policy { mode: Mode::All, ..Policy::default() });
        let Decision::Continue { losses } = decision(&s, 500) else { panic!("given up") };
        assert!(
            losses.iter().any(|loss| loss.code == "dead-descriptor" && loss.text.contains("descriptor 9"))
        );
        assert_eq!(s.dead_files, BTreeSet::from([FileId(7)]));
        assert!(!decision(&s, 501).is_continue(), "what is no descriptor's matter");
        decide(&mut s, &all());
        assert!(!decision(&s, 500).is_continue());
    }

    #[test]
    fn sound_process_continues() {
        let mut s = machine(vec![process(500, 1, 1000)]);
        decide(&mut s, &all());
        assert_eq!(*decision(&s, 500), Decision::Continue { losses: vec![] });
    }

    #[test]
    fn selection_follows_descendants_and_never_wins() {
        let mut s = machine(vec![
            process(500, 1, 1000),
            process(499, 500, 0), // child with a lower PID than its parent
            process(600, 499, 0),
            process(700, 1, 0),
        ]);
        let user = |name: &str| Selector { user: Some(name.into()), ..Selector::default() };
        let policy = Policy {
            select: vec![user("demo")],
            never: vec![Selector { exe: Some("/usr/bin/program600".into()), ..Selector::default() }],
            users: [("demo".to_owned(), 1000)].into(),
            ..Policy::default()
        };
        decide(&mut s, &policy);
        assert!(decision(&s, 500).is_continue());
        assert!(decision(&s, 499).is_continue());
        assert!(matches!(decision(&s, 600), Decision::NotSelected { why } if why.contains("program600")));
        assert!(matches!(decision(&s, 700), Decision::NotSelected { .. }));
    }

    #[test]
    fn unknown_user_or_empty_selector_selects_nobody() {
        let mut s = machine(vec![process(500, 1, 0)]);
        let nobody = Selector { user: Some("gone".into()), ..Selector::default() };
        let policy = Policy { select: vec![nobody, Selector::default()], ..Policy::default() };
        decide(&mut s, &policy);
        assert!(!decision(&s, 500).is_continue());
    }

    #[test]
    fn an_interrupted_call_is_a_loss_and_a_short_count_is_none() {
        let losses = |value| {
            let mut s = machine(vec![process(500, 1, 0)]);
            s.processes[0].threads[0].resume = Resume::Return { value, why: "it waited".into() };
            decide(&mut s, &Policy { mode: Mode::Programs, ..Policy::default() });
            let Decision::Continue { losses } = decision(&s, 500).clone() else { panic!("it is to go on") };
            losses.into_iter().map(|reason| reason.code).collect::<Vec<_>>()
        };
        assert_eq!(losses(-4), ["interrupted"]);
        assert_eq!(losses(-5), ["interrupted"]);
        assert!(losses(100).is_empty());
    }

    #[test]
    fn each_thing_that_cannot_come_back_is_a_reason() {
        let with_vma = |s: &mut Snapshot, kind, pages, lost_pages| {
            let mm = s.address_spaces.get_mut(&AddressSpaceId(500)).unwrap();
            mm.vmas.push(Vma { kind, pages, lost_pages, ..anonymous(0x1000, 0x2000) });
        };
        let with_fd = |s: &mut Snapshot, file: OpenFile| {
            s.files.insert(FileId(7), file);
            s.processes[0].descriptors.push(Descriptor { fd: 3, file: FileId(7), cloexec: false });
        };
        assert_eq!(reasons(|s| s.processes[0].threads[0].fpu = Fpu::Lost), ["live-fpu"]);
        let unknown = || Seccomp::Filter { filters: vec![SeccompFilterId(7)] };
        assert_eq!(reasons(|s| s.processes[0].threads[0].seccomp = unknown()), ["seccomp"]);
        assert_eq!(
            reasons(|s| s.processes[0].threads[0].resume = Resume::Impossible { why: "execve".into() }),
            ["system-call"]
        );
        assert_eq!(reasons(|s| s.processes[0].unsupported.push("POSIX timers".into())), ["unsupported"]);
        assert_eq!(reasons(|s| s.processes[0].namespaces.pid = false), ["namespace"]);
        assert_eq!(reasons(|s| s.address_spaces.clear()), ["memory"]);
        let unread = |s: &mut Snapshot| s.address_spaces.get_mut(&AddressSpaceId(500)).unwrap().vmas.clear();
        assert_eq!(reasons(unread), ["memory"], "though its program is known");
        assert_eq!(
            reasons(|s| s.address_spaces.get_mut(&AddressSpaceId(500)).unwrap().write_locked = true),
            ["memory-locked"]
        );
        let executing = |s: &mut Snapshot| {
            s.address_spaces.get_mut(&AddressSpaceId(500)).unwrap().write_locked = true;
            s.processes[0].threads[0].resume = Resume::Exec(Exec {
                filename: "/bin/true".into(),
                file: FileId(1),
                argv: vec![],
                envp: vec![],
            });
        };
        assert!(reasons(executing).is_empty(), "what it had is not needed");
        assert_eq!(
            reasons(|s| with_vma(s, VmaKind::Unsupported { what: "hugetlb".into() }, vec![], 0)),
            ["mapping"]
        );
        let swapped = |unsupported: Option<&str>| {
            let area = SwapArea {
                index: 2,
                path: "/dev/vdb1".into(),
                is_device: true,
                dev_major: 254,
                dev_minor: 17,
                slots: 100,
                extents: Vec::new(),
                flags: 0,
                zram: None,
                unsupported: unsupported.map(Into::into),
            };
            reasons(|s| {
                s.swap_areas.push(area);
                let run = PageRun { addr: 0x1000, pfn: SwapArea::frame(2, 1), count: 1 };
                with_vma(s, VmaKind::Anonymous, vec![run], 0);
            })
        };
        assert!(swapped(None).is_empty());
        assert_eq!(swapped(Some("compressed memory")), ["swapped"]);
        let elsewhere = PageRun { addr: 0x1000, pfn: SwapArea::frame(3, 1), count: 1 };
        assert_eq!(reasons(|s| with_vma(s, VmaKind::Anonymous, vec![elsewhere], 0)), ["swapped"]);
        assert_eq!(reasons(|s| with_vma(s, VmaKind::Anonymous, vec![], 1)), ["lost-pages"]);
        let socket = FileKind::Unsupported { what: "unix stream socket".into() };
        assert_eq!(reasons(|s| with_fd(s, open_file(socket, "socket:[1]"))), ["descriptor"]);
        let deleted = OpenFile { deleted: true, ..open_file(FileKind::Regular, "/tmp/x") };
        assert_eq!(reasons(|s| with_fd(s, deleted)), ["deleted-file"]);
        let pipe = |path: &str, deleted: bool| {
            let kind = FileKind::Pipe { pipe: PipeId(1), end: PipeEnd::Read };
            let elsewhere = deleted.then_some(NamespaceId(9));
            let file = OpenFile { deleted, mount_namespace: elsewhere, ..open_file(kind, path) };
            reasons(|s| {
                let contents = Pipe { path: None, capacity: 0, buffers: vec![], readers: 1, writers: 1 };
                s.pipes.insert(PipeId(1), contents);
                with_fd(s, file);
            })
        };
        let elsewhere =
            OpenFile { mount_namespace: Some(NamespaceId(9)), ..open_file(FileKind::Regular, "/private/x") };
        assert_eq!(reasons(|s| with_fd(s, elsewhere.clone())), ["descriptor"], "its namespace was not read");
        let known =
            |s: &mut Snapshot| _ = s.mount_namespaces.insert(NamespaceId(9), MountNamespace::default());
        assert!(
            reasons(|s| {
                known(s);
                with_fd(s, elsewhere);
            })
            .is_empty()
        );
        assert_eq!(pipe("/tmp/fifo", true), ["deleted-file"]);
        assert!(pipe("/tmp/fifo", false).is_empty());
        assert!(pipe("pipe:[7]", true).is_empty());
        let unix = |change: fn(&mut Snapshot, &mut UnixSocket)| {
            let file = open_file(FileKind::Unix { socket: UnixId(1) }, "socket:[7]");
            reasons(|s| {
                let mut socket = unix_socket();
                change(s, &mut socket);
                s.unix_sockets.insert(UnixId(1), socket);
                with_fd(s, file);
            })
        };
        assert!(unix(|_, _| {}).is_empty());
        assert_eq!(unix(|_, socket| socket.unsupported = Some("a filter".into())), ["socket"]);
        assert_eq!(unix(|_, socket| socket.peer = Some(UnixId(2))), ["socket"], "the other end was not read");
        assert_eq!(unix(|_, socket| socket.waiting = vec![UnixId(2)]), ["socket"]);
        let holds: fn(&mut Snapshot, &mut UnixSocket) = |s, socket| {
            s.files.insert(FileId(8), open_file(FileKind::Unsupported { what: "epoll".into() }, "anon"));
            socket.queue.push(UnixMessage { files: vec![FileId(8)], ..UnixMessage::default() });
        };
        let mut s = Snapshot::default();
        let named = UnixSocket { address: Some(Bytes(b"\0name".to_vec())), ..unix_socket() };
        let peer = UnixSocket { peer: Some(UnixId(1)), closed: true, ..unix_socket() };
        s.unix_sockets.extend([(UnixId(1), named), (UnixId(2), peer)]);
        assert_eq!(s.unix_description(UnixId(1)), "unix stream socket at @name");
        assert_eq!(s.unix_description(UnixId(2)), "unix stream socket connected to @name");
        assert_eq!(unix(holds), ["socket"], "what is on its way through it does not come back");
        assert_eq!(
            reasons(|s| with_fd(s, open_file(FileKind::Unix { socket: UnixId(1) }, "socket:[7]"))),
            ["socket"]
        );
        let in_memory = open_file(FileKind::Regular, "/run/x");
        assert_eq!(
            reasons(|s| {
                s.inodes.insert(in_memory.inode, inode_with_lost_pages(1));
                with_fd(s, in_memory);
            }),
            ["lost-pages"]
        );
        let doubt = |severity| Finding::new(severity, Some(500), "memory", "x");
        assert_eq!(reasons(|s| s.findings.push(doubt(Severity::Doubt))), ["memory"]);
        assert!(reasons(|s| s.findings.push(doubt(Severity::Note))).is_empty());
    }

    /// What becomes of a process with one more descriptor: codes of losses, or of reasons.
    fn with_descriptor(
        kind: FileKind,
        change: impl FnOnce(&mut Snapshot, &mut OpenFile),
    ) -> Result<Vec<String>, Vec<String>> {
        let mut s = machine(vec![process(500, 1, 1000)]);
        let mut file = open_file(kind, "/x");
        change(&mut s, &mut file);
        s.files.insert(FileId(7), file);
        s.processes[0].descriptors.push(Descriptor { fd: 3, file: FileId(7), cloexec: false });
        decide(&mut s, &all());
        let codes = |list: &[Reason]| list.iter().map(|r| r.code.clone()).collect();
        match decision(&s, 500) {
            Decision::Continue { losses } => Ok(codes(losses)),
            Decision::GiveUp { reasons } => Err(codes(reasons)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn views_of_the_kernel_are_opened_again_where_they_show_the_same() {
        let view = |task| FileKind::Proc(ProcFile { task, gone: false });
        let codes = |code: &str| vec![code.to_owned()];
        assert_eq!(with_descriptor(view(None), |_, _| {}), Ok(vec![]));
        assert_eq!(with_descriptor(view(Some(500)), |_, _| {}), Ok(vec![]));
        assert_eq!(with_descriptor(view(None), |_, f| f.pos = 5), Ok(codes("proc-file")));
        assert_eq!(with_descriptor(view(None), |_, f| (f.pos, f.flags) = (5, 1)), Ok(vec![]));
        assert_eq!(with_descriptor(view(Some(501)), |_, _| {}), Ok(codes("proc-file")), "as if it had ended");
        let gone = FileKind::Proc(ProcFile { task: Some(500), gone: true });
        assert_eq!(with_descriptor(gone, |_, _| {}), Ok(vec![]), "it reads as before");
        assert_eq!(
            with_descriptor(view(Some(500)), |s, _| s.processes[0].fs.root = "/srv".into()),
            Err(codes("descriptor"))
        );
        let namespace =
            |name: &str, initial| FileKind::Namespace(NamespaceFile { name: name.into(), initial });
        assert_eq!(with_descriptor(namespace("net", true), |_, _| {}), Ok(vec![]));
        assert_eq!(with_descriptor(namespace("net", false), |_, _| {}), Err(codes("descriptor")));
        assert_eq!(with_descriptor(namespace("time", true), |_, _| {}), Err(codes("descriptor")));
    }

    #[test]
    fn pidfds_and_watches_come_back_or_are_named() {
        let codes = |code: &str| vec![code.to_owned()];
        let pidfd = |pid, thread| FileKind::PidFd(PidFd { pid, thread, gone: false });
        assert_eq!(with_descriptor(pidfd(7, false), |_, _| {}), Ok(vec![]));
        assert_eq!(with_descriptor(pidfd(500, true), |_, _| {}), Ok(vec![]));
        let inner = with_descriptor(pidfd(501, true), |s, _| {
            let thread = Thread { tid: 501, ..s.processes[0].threads[0].clone() };
            s.processes[0].threads.push(thread);
        });
        assert_eq!(inner, Err(codes("descriptor")));
        let watch = |wd, unsupported: Option<String>| Watch {
            generation: None,
            wd,
            path: "/x".into(),
            mask: 1,
            ino: 1,
            file_type: 0,
            volatile: false,
            unsupported,
        };
        let inotify = |watch, unread| FileKind::Inotify(Inotify { watches: vec![watch], next: 9, unread });
        assert_eq!(with_descriptor(inotify(watch(1, None), 0), |_, _| {}), Ok(vec![]));
        assert_eq!(with_descriptor(inotify(watch(1, None), 2), |_, _| {}), Ok(codes("inotify")));
        assert_eq!(
            with_descriptor(inotify(watch(1, Some("gone".into())), 0), |_, _| {}),
            Err(codes("inotify"))
        );
        assert_eq!(with_descriptor(inotify(watch(i32::MAX, None), 0), |_, _| {}), Err(codes("inotify")));
    }

    #[test]
    fn locks_need_a_descriptor_and_a_local_file_system() {
        let locked = |owner, fs_type: &str, flags| {
            let lock = Lock {
                kind: LockKind::Posix,
                inode: InodeId(1),
                owner,
                exclusive: true,
                start: 0,
                end: i64::MAX,
                pid: 500,
                descriptor: -1,
                breaking: false,
            };
            with_descriptor(FileKind::Regular, |s, f| {
                f.flags = flags;
                s.locks.push(lock);
                let inode = Inode { fs_type: fs_type.into(), ..inode_with_lost_pages(0) };
                s.inodes.insert(InodeId(1), inode);
            })
        };
        let codes = |code: &str| vec![code.to_owned()];
        assert_eq!(locked(LockOwner::Table(500), "ext4", 2), Ok(vec![]));
        assert_eq!(locked(LockOwner::Table(500), "nfs4", 2), Err(codes("file-lock")));
        assert_eq!(locked(LockOwner::Table(500), "fuse.sshfs", 2), Err(codes("file-lock")));
        assert_eq!(locked(LockOwner::Table(500), "ext4", 0), Ok(codes("file-lock")));
        assert_eq!(locked(LockOwner::Table(501), "nfs4", 0), Ok(vec![]));
        assert_eq!(locked(LockOwner::File(FileId(7)), "nfs4", 2), Err(codes("file-lock")));
    }

    #[test]
    fn memory_is_shared_by_vfork_only() {
        // Who shares the memory of 500: PID, parent, by vfork?
        let reasons = |sharers: &[(Pid, Pid, bool)]| {
            let mut all = vec![process(500, 1, 1000)];
            all.extend(sharers.iter().map(|&(pid, ppid, vfork)| Process {
                address_space: Some(AddressSpaceId(500)),
                vfork,
                ..process(pid, ppid, 1000)
            }));
            let mut s = machine(all);
            decide(&mut s, &self::all());
            let given_up = |p: &&Process| !p.decision.is_continue();
            s.processes.iter().filter(given_up).map(|p| p.pid).collect::<Vec<_>>()
        };
        assert!(reasons(&[(501, 500, true)]).is_empty());
        // Two of its threads at the same time; a child's child.
        assert!(reasons(&[(501, 500, true), (502, 500, true)]).is_empty());
        assert!(reasons(&[(501, 500, true), (502, 501, true)]).is_empty());
        assert_eq!(reasons(&[(501, 500, false)]), [500, 501]);
        assert_eq!(reasons(&[(501, 1, true)]), [500, 501]);
        assert_eq!(reasons(&[(501, 500, true), (502, 500, false)]), [500, 501, 502]);
    }

    #[test]
    fn leaving_a_control_group_is_a_loss() {
        let mut s = machine(vec![process(500, 1, 1000)]);
        s.processes[0].cgroup = "/system.slice/redis.service".into();
        decide(&mut s, &all());
        assert!(matches!(decision(&s, 500), Decision::Continue { losses } if losses[0].code == "cgroup"));
    }

    fn procedure() -> crate::CrashProcedure {
        crate::CrashProcedure {
            entry: 0x1000,
            procedure: 0x2000,
            data: 0,
            stack_size: 1 << 16,
            time_limit_ms: 1000,
            threads_run: false,
            regions: vec![],
            locks: vec![],
        }
    }

    #[test]
    fn live_fpu_follows_the_policy() {
        let mut s = machine(vec![process(500, 1, 1000)]);
        s.processes[0].threads[0].fpu = Fpu::Lost;
        decide(&mut s, &Policy { live_fpu: LiveFpu::ResumeAnyway, ..all() });
        assert!(matches!(decision(&s, 500), Decision::Continue { losses } if losses.len() == 1));
        decide(&mut s, &Policy { live_fpu: LiveFpu::CrashProcedure, ..all() });
        assert!(matches!(decision(&s, 500), Decision::GiveUp { .. }));
        s.processes[0].crash_procedure = Some(procedure());
        decide(&mut s, &Policy { live_fpu: LiveFpu::CrashProcedure, ..all() });
        assert!(matches!(decision(&s, 500), Decision::Continue { losses } if losses[0].code == "live-fpu"));
        decide(&mut s, &Policy { live_fpu: LiveFpu::GiveUp, ..all() });
        assert!(matches!(decision(&s, 500), Decision::GiveUp { .. }));
    }

    #[test]
    fn doubt_follows_the_policy_and_says_what_was_done() {
        // What becomes of the process, and what is said to have been done about the finding.
        let outcome = |severity, kind, integrity, with_procedure: bool| {
            let mut s = machine(vec![process(500, 1, 1000)]);
            s.processes[0].crash_procedure = with_procedure.then(procedure);
            s.findings.push(Finding { kind, ..Finding::new(severity, Some(500), "memory", "x") });
            decide(&mut s, &Policy { integrity, ..all() });
            (decision(&s, 500).is_continue(), s.findings[0].action)
        };
        use FindingKind::{Credentials, Page};
        use Integrity::{Permissive, Strict};
        use Severity::{Broken, Doubt, Loss, Note};
        assert_eq!(outcome(Doubt, Page, Strict, false), (false, Action::GivenUp));
        assert_eq!(outcome(Doubt, Page, Strict, true), (true, Action::CrashProcedure));
        assert_eq!(outcome(Doubt, Page, Permissive, false), (true, Action::Reported));
        assert_eq!(outcome(Broken, Page, Permissive, true), (false, Action::GivenUp));
        for (integrity, with_procedure) in [(Strict, true), (Permissive, false), (Permissive, true)] {
            assert_eq!(outcome(Doubt, Credentials, integrity, with_procedure), (false, Action::GivenUp));
        }
        assert_eq!(outcome(Loss, Page, Strict, false), (true, Action::Reported));
        assert_eq!(outcome(Note, Page, Strict, false), (true, Action::None));
        let mut s = machine(vec![process(500, 1, 1000)]);
        s.findings.push(Finding::new(Doubt, Some(500), "memory", "x"));
        s.findings.push(Finding::new(Doubt, None, "memory", "x"));
        decide(&mut s, &Policy::default());
        assert!(s.findings.iter().all(|f| f.action == Action::None), "nobody asked for it");
    }

    #[test]
    fn who_cannot_be_read_is_not_called_not_asked_for() {
        let by_user = Selector { user: Some("1000".into()), ..Selector::default() };
        let by_pid = Selector { pid: Some(7), ..Selector::default() };
        for (rule, given_up) in [(by_user, true), (by_pid, false)] {
            let mut unread = process(500, 1, 1000);
            unread.threads.clear();
            let mut s = machine(vec![unread]);
            s.findings.push(Finding::new(Severity::Broken, Some(500), "process", "it is lost"));
            decide(&mut s, &Policy { select: vec![rule], ..Policy::default() });
            assert_eq!(matches!(decision(&s, 500), Decision::GiveUp { .. }), given_up);
        }
    }

    #[test]
    fn a_changed_kernel_is_everybodys_loss() {
        let mut s = machine(vec![process(500, 1, 1000)]);
        let changed = |severity| Finding {
            kind: FindingKind::KernelText,
            ..Finding::new(severity, None, "kernel-text", "it was changed")
        };
        s.findings.push(changed(Severity::Note));
        decide(&mut s, &all());
        assert_eq!(decision(&s, 500), &Decision::Continue { losses: vec![] });
        s.findings.push(changed(Severity::Doubt));
        decide(&mut s, &all());
        let losses = vec![Reason::new("kernel-text", "it was changed")];
        assert_eq!(decision(&s, 500), &Decision::Continue { losses });
    }

    #[test]
    fn zombie_goes_with_its_parent() {
        let mut zombie = process(501, 500, 1000);
        zombie.state = ProcessState::Zombie { status: 0x300 };
        zombie.address_space = None;
        let mut s = machine(vec![process(500, 1, 1000), zombie]);
        decide(&mut s, &all());
        assert!(decision(&s, 501).is_continue());
        s.processes[0].unsupported.push("something".into());
        decide(&mut s, &all());
        assert!(matches!(decision(&s, 501), Decision::NotSelected { .. }));
    }
}
