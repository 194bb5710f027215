//! Processes (thread groups).

use serde::{Deserialize, Serialize};

use crate::{
    AddressSpaceId, Bytes, CrashProcedure, Decision, Descriptor, FsContext, NamespaceId, Pid, SignalState,
    Thread, Timers, TtyId,
};

/// A process: what `fork` makes (`task_struct` of a thread group leader, `signal_struct`).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    #[allow(missing_docs)]
    pub pid: Pid,
    /// Parent (`real_parent`), 0 for none.
    pub ppid: Pid,
    /// Process group.
    pub pgid: Pid,
    /// Session.
    pub sid: Pid,
    /// Name of the leader (at most 15 bytes).
    pub comm: Bytes,
    #[allow(missing_docs)]
    pub state: ProcessState,
    /// Leader first, then by TID. A leader that has exited while others live is listed with [`crate::ThreadState::Dead`].
    pub threads: Vec<Thread>,
    /// The address space; `None` for a zombie.
    pub address_space: Option<AddressSpaceId>,
    /// Made by vfork(2), with neither a program executed nor exited since: its memory is its parent's, and the thread of the parent
    /// that made it waits in that call.
    #[serde(default)]
    pub vfork: bool,
    /// Identity of the descriptor table (`files_struct`): processes with the same one share it (CLONE_FILES).
    pub files_id: u64,
    /// Open descriptors by ascending number.
    pub descriptors: Vec<Descriptor>,
    #[allow(missing_docs)]
    pub fs: FsContext,
    /// Handlers and signals pending for the process as a whole.
    pub signals: SignalState,
    #[allow(missing_docs)]
    #[serde(default)]
    pub timers: Timers,
    /// Sixteen limits, indexed by RLIMIT_*.
    pub rlimits: Vec<Rlimit>,
    /// Controlling terminal.
    pub ctty: Option<TtyId>,
    /// Signal that the parent gets when the process ends (SIGCHLD as a rule).
    pub exit_signal: i32,
    /// PR_SET_CHILD_SUBREAPER.
    pub child_subreaper: bool,
    #[allow(missing_docs)]
    pub oom_score_adj: i32,
    /// Path of the cgroup (v2), `/system.slice/cron.service`.
    pub cgroup: Bytes,
    /// systemd unit that the cgroup path names, `cron.service`.
    pub unit: Option<String>,
    #[allow(missing_docs)]
    pub namespaces: Namespaces,
    /// Its mount namespace, if that is not the initial one.
    #[serde(default)]
    pub mount_namespace: Option<NamespaceId>,
    /// Its UTS namespace, if that is not the initial one.
    #[serde(default)]
    pub uts_namespace: Option<NamespaceId>,
    /// What it has registered with libotherworld.
    #[serde(default)]
    pub crash_procedure: Option<CrashProcedure>,
    /// Start time on the dead kernel's CLOCK_BOOTTIME, nanoseconds.
    pub start_boottime_ns: u64,
    /// State that this version does not bring back, named for people: the process is given up because of it.
    pub unsupported: Vec<String>,
    /// What is to be done with it.
    pub decision: Decision,
}

impl Process {
    /// One that lives and has nothing yet, leader of a session of its own.
    pub fn new(pid: Pid, comm: Bytes) -> Self {
        const SIGCHLD: i32 = 17;
        Self {
            pid,
            ppid: 0,
            pgid: pid,
            sid: pid,
            comm,
            state: ProcessState::Alive,
            threads: Vec::new(),
            address_space: None,
            vfork: false,
            files_id: 0,
            descriptors: Vec::new(),
            fs: FsContext::default(),
            signals: SignalState::default(),
            timers: Timers::default(),
            rlimits: Vec::new(),
            ctty: None,
            exit_signal: SIGCHLD,
            child_subreaper: false,
            oom_score_adj: 0,
            cgroup: Bytes::default(),
            unit: None,
            namespaces: Namespaces::default(),
            mount_namespace: None,
            uts_namespace: None,
            crash_procedure: None,
            start_boottime_ns: 0,
            unsupported: Vec::new(),
            decision: Decision::Undecided,
        }
    }

    /// The leader's entry.
    pub fn leader(&self) -> Option<&Thread> {
        self.threads.iter().find(|t| t.tid == self.pid)
    }
}

/// Life stage of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum ProcessState {
    /// Has an address space and at least one living thread.
    Alive,
    /// Stopped by job control.
    Stopped {
        /// The stopping signal.
        signal: i32,
    },
    /// Exited, not yet waited for.
    Zombie {
        /// Status as wait4(2) gives it.
        status: i32,
    },
    /// On its way out when the kernel died, and without a parent that would wait for it: it does not come back.
    Exiting {
        /// Status that it would have had.
        status: i32,
    },
}

/// One resource limit, getrlimit(2); `u64::MAX` is RLIM_INFINITY.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    #[allow(missing_docs)]
    pub cur: u64,
    #[allow(missing_docs)]
    pub max: u64,
}

/// Whether the process lived in the machine's initial namespaces (`true`: initial).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Namespaces {
    pub cgroup: bool,
    pub ipc: bool,
    pub mnt: bool,
    pub net: bool,
    pub pid: bool,
    pub time: bool,
    pub user: bool,
    pub uts: bool,
}

impl Default for Namespaces {
    fn default() -> Self {
        Self { cgroup: true, ipc: true, mnt: true, net: true, pid: true, time: true, user: true, uts: true }
    }
}
