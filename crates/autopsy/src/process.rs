//! Processes: the task list, thread groups, `signal_struct` (include/linux/sched.h, sched/signal.h; 6.1 and 6.12).
//!
//! Two tables of the kernel name every thread group: the list through `init_task.tasks` and the PID table of the initial
//! PID namespace. Both are read: where one is damaged the other helps, and where they disagree there is a finding.

mod summary;

pub use summary::ProcessSummary;

use std::collections::{BTreeMap, HashSet};

use ktypes::KernelType;
use snapshot::{
    AddressSpace, AddressSpaceId, Bytes, Namespaces, PendingSignal, Pid, Process, ProcessState, Resume,
    Rlimit, Severity, SigAction, SignalState, Thread, ThreadState, TtyId,
};

use crate::Autopsy;
use crate::error::{Error, Result, corrupt};
use crate::syscall::KnownTask;

/// PID_MAX_LIMIT of 64-bit kernels.
const MAX_TASKS: usize = 4 << 20;
/// Resource limits (RLIM_NLIMITS).
const LIMITS: usize = 16;

// task_struct.flags (include/linux/sched.h).
const PF_EXITING: u32 = 0x4;
const PF_IO_WORKER: u32 = 0x10;
const PF_DUMPCORE: u32 = 0x200;
const PF_USER_WORKER: u32 = 0x4000;
const PF_KTHREAD: u32 = 0x0020_0000;
/// task_struct.__state: made by fork, never ran.
const TASK_NEW: u32 = 0x800;
/// task_struct.exit_state: EXIT_ZOMBIE and EXIT_DEAD.
const EXITED: i32 = 0x30;
// signal_struct.flags (include/linux/sched/signal.h).
const SIGNAL_STOP_STOPPED: u32 = 0x1;
const SIGNAL_GROUP_EXIT: u32 = 0x4;
/// task_struct.jobctl: number of the last stopping signal.
const JOBCTL_STOP_SIGMASK: u64 = 0xffff;
const SIGCHLD: i32 = 17;
const SIG_DFL: u64 = 0;
const SIG_IGN: u64 = 1;
const SA_NOCLDWAIT: u64 = 2;

/// A thread, as far as autopsy looks at it.
#[derive(KernelType, Clone)]
#[kernel("task_struct")]
pub(crate) struct Task {
    #[kernel("thread_info.flags")]
    pub tif: u64,
    #[kernel("__state")]
    pub state: u32,
    pub stack: u64,
    pub flags: u32,
    pub ptrace: u32,
    pub on_cpu: i32,
    pub static_prio: i32,
    pub rt_priority: u32,
    pub policy: u32,
    pub sched_reset_on_fork: bool,
    pub user_cpus_ptr: u64,
    #[kernel("cpus_mask", address)]
    pub cpus_mask: u64,
    pub mm: u64,
    pub exit_state: i32,
    pub exit_code: i32,
    pub exit_signal: i32,
    pub pdeath_signal: i32,
    pub jobctl: u64,
    pub personality: u32,
    pub restore_sigmask: bool,
    pub atomic_flags: u64,
    pub pid: i32,
    pub tgid: i32,
    pub real_parent: u64,
    /// The tracer, while traced.
    pub parent: u64,
    pub thread_pid: u64,
    pub group_leader: u64,
    #[kernel("ptraced.next")]
    pub ptraced: u64,
    #[kernel("ptraced", address)]
    pub ptraced_head: u64,
    pub clear_child_tid: u64,
    pub start_boottime: u64,
    /// What the maker waits for, while it waits in vfork(2).
    pub vfork_done: u64,
    pub real_cred: u64,
    pub comm: [u8; 16],
    pub fs: u64,
    pub files: u64,
    #[kernel(optional)]
    pub io_uring: Option<u64>,
    pub nsproxy: u64,
    pub signal: u64,
    pub sighand: u64,
    pub blocked: u64,
    pub real_blocked: u64,
    pub saved_sigmask: u64,
    #[kernel(address)]
    pub pending: u64,
    pub sas_ss_sp: u64,
    pub sas_ss_size: u64,
    pub sas_ss_flags: u32,
    #[kernel(optional)]
    pub cgroups: Option<u64>,
    #[kernel(optional)]
    pub robust_list: Option<u64>,
    #[kernel("perf_event_list.next", optional)]
    pub perf_events: Option<u64>,
    #[kernel("perf_event_list", address, optional)]
    pub perf_event_list: Option<u64>,
    #[kernel(optional)]
    pub rseq: Option<u64>,
    // Since 6.3; before, it was always the original size.
    #[kernel(optional)]
    pub rseq_len: Option<u32>,
    #[kernel(optional)]
    pub rseq_sig: Option<u32>,
    pub timer_slack_ns: u64,
    #[kernel("syscall_dispatch.selector", optional)]
    pub dispatch_selector: Option<u64>,
    /// Where the stack is mapped with a page below it that is not (CONFIG_VMAP_STACK).
    #[kernel(optional)]
    pub stack_vm_area: Option<u64>,
    #[kernel("thread.sp")]
    pub kernel_sp: u64,
    #[kernel("thread.es")]
    pub es: u16,
    #[kernel("thread.ds")]
    pub ds: u16,
    #[kernel("thread.fsindex")]
    pub fsindex: u16,
    #[kernel("thread.gsindex")]
    pub gsindex: u16,
    #[kernel("thread.fsbase")]
    pub fsbase: u64,
    #[kernel("thread.gsbase")]
    pub gsbase: u64,
    #[kernel("thread.io_bitmap", optional)]
    pub io_bitmap: Option<u64>,
    #[kernel("thread.features", optional)]
    pub shadow_stack: Option<u64>,
    #[kernel("thread.fpu", address)]
    pub fpu: u64,
    #[kernel("thread.fpu.fpstate")]
    pub fpstate: u64,
}

impl Task {
    pub(crate) fn is_kernel_thread(&self) -> bool {
        self.flags & PF_KTHREAD != 0
    }

    /// A thread of a process, but one that runs in the kernel only (io_uring's workers, vhost).
    pub(crate) fn is_worker(&self) -> bool {
        self.flags & (PF_IO_WORKER | PF_USER_WORKER) != 0
    }

    pub(crate) fn is_new(&self) -> bool {
        self.state & TASK_NEW != 0
    }

    pub(crate) fn has_exited(&self) -> bool {
        self.exit_state & EXITED != 0
    }

    pub(crate) fn is_exiting(&self) -> bool {
        self.flags & PF_EXITING != 0
    }

    pub(crate) fn name(&self) -> Bytes {
        let len = self.comm.iter().position(|b| *b == 0).unwrap_or(self.comm.len());
        Bytes(self.comm[..len].to_vec())
    }

    /// The letter of /proc/PID/stat (`task_state_index()`, include/linux/sched.h).
    pub(crate) fn thread_state(&self) -> ThreadState {
        const UNINTERRUPTIBLE_NOLOAD: u32 = 0x402;
        const RTLOCK_WAIT: u32 = 0x1000;
        if self.has_exited() {
            return ThreadState::Dead;
        }
        if self.state & UNINTERRUPTIBLE_NOLOAD == UNINTERRUPTIBLE_NOLOAD {
            return ThreadState::Other;
        }
        // The highest bit counts.
        match (self.state & 0x7f).checked_ilog2() {
            None if self.state & RTLOCK_WAIT != 0 => ThreadState::DiskSleep,
            None => ThreadState::Running,
            Some(0) => ThreadState::Sleeping,
            Some(1) => ThreadState::DiskSleep,
            Some(2) => ThreadState::Stopped,
            Some(3) => ThreadState::Traced,
            Some(4 | 5) => ThreadState::Dead,
            Some(_) => ThreadState::Other,
        }
    }
}

#[derive(KernelType)]
#[kernel("signal_struct")]
struct Signal {
    nr_threads: i32,
    #[kernel(address)]
    thread_head: u64,
    #[kernel(address)]
    shared_pending: u64,
    group_exit_code: i32,
    group_stop_count: i32,
    flags: u32,
    is_child_subreaper: bool,
    #[kernel("pids[2]")]
    pgrp: u64,
    #[kernel("pids[3]")]
    session: u64,
    tty: u64,
    rlim: [u64; 2 * LIMITS],
    oom_score_adj: i16,
}

#[derive(KernelType)]
#[kernel("pid")]
struct PidStruct {
    level: u32,
    #[kernel("tasks[1].first")]
    first_leader: u64,
    #[kernel(address)]
    numbers: u64,
}

#[derive(KernelType)]
#[kernel("nsproxy")]
struct NsProxy {
    uts_ns: u64,
    ipc_ns: u64,
    mnt_ns: u64,
    pid_ns_for_children: u64,
    net_ns: u64,
    time_ns: u64,
    time_ns_for_children: u64,
    cgroup_ns: u64,
}

#[derive(KernelType)]
#[kernel("css_set")]
struct CssSet {
    dfl_cgrp: u64,
}

#[derive(KernelType)]
#[kernel("cgroup")]
struct Cgroup {
    kn: u64,
}

/// One line of `inspect ps`: what can be said of a thread group without reading anything else.
#[derive(Clone, Debug)]
pub struct TaskSummary {
    /// Address of the leader's `task_struct`.
    pub task: u64,
    /// PID.
    pub pid: Pid,
    /// PID of the parent.
    pub ppid: Pid,
    /// Name of the leader.
    pub comm: Bytes,
    /// What the leader was doing.
    pub state: ThreadState,
    /// A thread of the kernel's own.
    pub kernel_thread: bool,
    /// Threads in the group.
    pub threads: i32,
}

/// A thread and where its `task_struct` is.
#[derive(Clone)]
pub(crate) struct Member {
    pub addr: u64,
    pub task: Task,
}

/// A thread group.
pub(crate) struct Group {
    pub leader: Task,
    signal: Signal,
    /// Leader first, then by TID.
    pub members: Vec<Member>,
}

impl Autopsy<'_> {
    /// All thread groups, kernel threads too, by ascending PID.
    ///
    /// # Errors
    /// When neither the task list nor the PID table can be read.
    pub fn tasks(&self) -> Result<Vec<TaskSummary>> {
        let summary = |leader: Member| TaskSummary {
            task: leader.addr,
            pid: leader.task.pid,
            ppid: self.parent_pid(&leader.task),
            comm: leader.task.name(),
            state: leader.task.thread_state(),
            kernel_thread: leader.task.is_kernel_thread(),
            threads: self.kernel.read::<Signal>(leader.task.signal).map_or(1, |s| s.nr_threads),
        };
        Ok(self.leaders()?.into_iter().map(summary).collect())
    }

    /// All user processes, by ascending PID.
    ///
    /// # Errors
    /// When neither the task list nor the PID table can be read, a structure is not as expected in this kernel, or not one
    /// process can be read.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let (mut processes, mut first_loss) = (Vec::new(), None);
        let (groups, mut lost) = self.groups_and_lost()?;
        for group in &groups {
            match self.process_of(group) {
                Ok(process) => processes.extend(process),
                Err(error) => {
                    first_loss = first_loss.or(Some(error));
                    lost.extend(group.members.first().cloned());
                }
            }
        }
        self.cross_check(&groups, &processes);
        finish_exits(&mut processes);
        // When nobody is left, it is not the processes that are broken.
        if let Some(error) = first_loss.filter(|_| processes.is_empty()) {
            return Err(error);
        }
        processes.extend(
            lost.iter().filter(|leader| !leader.task.is_new()).map(|leader| self.lost_process(leader)),
        );
        processes.sort_by_key(|process| process.pid);
        Ok(processes)
    }

    /// One user process; `None` if there is none with this PID, or it cannot be read (a finding says why).
    ///
    /// # Errors
    /// When neither the task list nor the PID table can be read.
    pub fn process(&self, pid: Pid) -> Result<Option<Process>> {
        let groups = self.groups()?;
        let group = groups.iter().find(|group| group.leader.pid == pid);
        Ok(group.and_then(|group| self.process_of(group).ok().flatten()))
    }

    /// The thread groups of those leaders that are wanted; and the leaders of those that cannot be read, for which there are findings.
    fn groups_of(&self, is_wanted: impl Fn(&Task) -> bool) -> Result<(Vec<Group>, Vec<Member>)> {
        let leaders = self.leaders()?;
        // Without it all would be lost, one by one.
        self.kernel.check::<Signal>()?;
        let (mut groups, mut lost) = (Vec::new(), Vec::new());
        for leader in leaders.into_iter().filter(|l| is_wanted(&l.task)) {
            let before = self.set_subject(Some(leader.task.pid));
            match self.group(&leader) {
                Ok(group) => groups.push(group),
                Err(error) => {
                    self.lost(&leader.task, &error);
                    lost.push(leader);
                }
            }
            self.set_subject(before);
        }
        Ok((groups, lost))
    }

    /// All threads, the kernel's own too: by process, the leader first.
    pub(crate) fn all_threads(&self) -> Result<Vec<Member>> {
        Ok(self.groups_of(|_| true)?.0.into_iter().flat_map(|group| group.members).collect())
    }

    /// The thread groups of all user processes; makes their threads known to each other.
    pub(crate) fn groups(&self) -> Result<Vec<Group>> {
        Ok(self.groups_and_lost()?.0)
    }

    /// Those, and the leaders of the ones that cannot be read.
    fn groups_and_lost(&self) -> Result<(Vec<Group>, Vec<Member>)> {
        let (groups, lost) = self.groups_of(|leader| !leader.is_kernel_thread())?;
        let known = |member: &Member| KnownTask {
            addr: member.addr,
            tid: member.task.pid,
            tgid: member.task.tgid,
            parent: member.task.real_parent,
            started: !member.task.is_new(),
            vfork_done: member.task.vfork_done,
            start_boottime_ns: i64::try_from(member.task.start_boottime).unwrap_or(i64::MAX),
        };
        let all = groups.iter().flat_map(|group| &group.members).map(known).collect();
        self.known_tasks.get_or_init(|| all);
        Ok((groups, lost))
    }

    /// Addresses, TIDs and PIDs of all user threads.
    pub(crate) fn user_threads(&self) -> Result<Vec<(u64, Pid, Pid)>> {
        let members = self.groups()?.into_iter().flat_map(|group| group.members);
        Ok(members.map(|member| (member.addr, member.task.pid, member.task.tgid)).collect())
    }

    fn lost(&self, task: &Task, error: &Error) {
        let text = format!("process {} ({}) is lost: {error}", task.pid, task.name());
        self.find(Severity::Broken, "process", text);
    }

    /// The leaders of all thread groups.
    pub(crate) fn leaders(&self) -> Result<Vec<Member>> {
        self.kernel.check::<Task>()?;
        let mut leaders: BTreeMap<Pid, Member> = BTreeMap::new();
        let mut add = |addr: u64| match self.leader(addr) {
            Ok(task) => {
                leaders.entry(task.pid).or_insert(Member { addr, task });
            }
            Err(error) => self.find(Severity::Broken, "process", format!("a task is lost: {error}")),
        };
        let list_damage = match self.task_list() {
            Ok((tasks, damage)) => {
                tasks.into_iter().for_each(&mut add);
                damage
            }
            Err(error) => Some(error),
        };
        if let Some(damage) = &list_damage {
            let text = format!("the task list is damaged ({damage}); the rest is taken from the PID table");
            self.find(Severity::Note, "process", text);
        }
        match self.pid_table() {
            Ok(tasks) => tasks.into_iter().for_each(&mut add),
            Err(error) => match list_damage {
                Some(damage) if leaders.is_empty() => return Err(damage),
                _ => {
                    let text = format!("the PID table cannot be read to the end: {error}");
                    self.find(Severity::Note, "process", text);
                }
            },
        }
        // init_task itself is the idle task, not a process.
        leaders.remove(&0);
        Ok(leaders.into_values().collect())
    }

    /// A task that must be a thread group's leader.
    fn leader(&self, addr: u64) -> Result<Task> {
        let task = self.task(addr)?;
        if task.group_leader != addr {
            return Err(corrupt("task_struct", addr, format!("PID {} is not its group's leader", task.pid)));
        }
        Ok(task)
    }

    /// A `task_struct`, if there can be one.
    pub(crate) fn task(&self, addr: u64) -> Result<Task> {
        self.check_task_address(addr)?;
        let task: Task = self.kernel.read(addr)?;
        if task.pid < 0 || task.pid as usize >= MAX_TASKS || task.tgid < 0 {
            return Err(corrupt("task_struct", addr, format!("PID {}, group {}", task.pid, task.tgid)));
        }
        Ok(task)
    }

    /// Whether an address can be a `task_struct`: objects of the slab cache of that name, and `init_task`.
    fn check_task_address(&self, addr: u64) -> Result<()> {
        if addr == self.kernel.symbol("init_task")? {
            return Ok(());
        }
        match self.kernel.slab_cache_of(addr) {
            Some(slab) if slab.cache_name == "task_struct" && slab.starts_at(addr) => Ok(()),
            Some(slab) => {
                let why = format!("lies in a slab of `{}` objects, or amid one", slab.cache_name);
                Err(corrupt("task_struct", addr, why))
            }
            None => Err(corrupt("task_struct", addr, "lies in no slab")),
        }
    }

    /// Leaders by the list through `init_task.tasks`; walked from both ends when it is damaged.
    fn task_list(&self) -> Result<(Vec<u64>, Option<Error>)> {
        let link = self.kernel.offset_of("task_struct", "tasks")?;
        let head = self.kernel.symbol("init_task")?.wrapping_add(link);
        let to_prev = self.kernel.offset_of("list_head", "prev")?;
        let mut seen = HashSet::new();
        let (mut tasks, damage) = self.half_list(head, link, 0, &mut seen);
        if damage.is_some() {
            tasks.extend(self.half_list(head, link, to_prev, &mut seen).0);
        }
        Ok((tasks, damage))
    }

    /// Follows one direction of the task list until it ends or breaks.
    fn half_list(
        &self,
        head: u64,
        link: u64,
        step: u64,
        seen: &mut HashSet<u64>,
    ) -> (Vec<u64>, Option<Error>) {
        let mut tasks = Vec::new();
        let mut node = head;
        while tasks.len() < MAX_TASKS {
            let next = match self.kernel.read_u64(node.wrapping_add(step)) {
                Ok(next) => next,
                Err(error) => return (tasks, Some(error.into())),
            };
            if next == head {
                return (tasks, None);
            }
            let task = next.wrapping_sub(link);
            if let Err(error) = self.check_task_address(task) {
                return (tasks, Some(error));
            }
            if !seen.insert(next) {
                return (tasks, Some(corrupt("task list", next, "comes up twice")));
            }
            tasks.push(task);
            node = next;
        }
        (tasks, Some(corrupt("task list", head, "does not end")))
    }

    /// Leaders by the PID table of the initial PID namespace (`init_pid_ns.idr`).
    fn pid_table(&self) -> Result<Vec<u64>> {
        self.kernel.check::<PidStruct>()?;
        let idr = self
            .kernel
            .symbol("init_pid_ns")?
            .wrapping_add(self.kernel.offset_of("pid_namespace", "idr.idr_rt")?);
        // The thread group type: the hash list of the processes that have this PID.
        let leader_type = self.enumerator("PIDTYPE_TGID", 1);
        let links = self.kernel.offset_of("task_struct", "pid_links")?;
        let link = links + leader_type * self.kernel.size_of("hlist_node")?;
        let mut tasks = Vec::new();
        self.kernel.xarray_for_each(idr, MAX_TASKS, |_, entry| {
            // Also holds process groups and sessions that outlived their leader.
            if let Some(pid) = entry.pointer()
                && let Ok(pid) = self.kernel.read::<PidStruct>(pid)
                && pid.first_leader != 0
            {
                tasks.push(pid.first_leader.wrapping_sub(link));
            }
            Ok(())
        })?;
        Ok(tasks)
    }

    /// The number of a `struct pid` in the initial PID namespace; 0 for none.
    pub(crate) fn pid_number(&self, addr: u64) -> Result<Pid> {
        if addr == 0 {
            return Ok(0);
        }
        let pid: PidStruct = self.kernel.read(addr)?;
        let number = self.kernel.read_i32(pid.numbers.wrapping_add(self.kernel.offset_of("upid", "nr")?))?;
        if number < 0 || number as usize >= MAX_TASKS || pid.level > 32 {
            return Err(corrupt("pid", addr, format!("number {number}, level {}", pid.level)));
        }
        Ok(number)
    }

    /// The PID of the parent, 0 for none.
    fn parent_pid(&self, task: &Task) -> Pid {
        self.task(task.real_parent).map_or(0, |parent| parent.tgid)
    }

    /// A process; for an error there is a finding too.
    fn process_of(&self, group: &Group) -> Result<Option<Process>> {
        let before = self.set_subject(Some(group.leader.pid));
        let process = self.read_process(group).inspect_err(|error| self.lost(&group.leader, error));
        self.set_subject(before);
        process
    }

    /// Reads a process; `Ok(None)` for one that had not begun to run.
    fn read_process(&self, group: &Group) -> Result<Option<Process>> {
        let Group { leader: task, signal, members } = group;
        if task.is_new() {
            // Its parent is still inside fork, which will be issued again.
            return Ok(None);
        }
        let mut living = members.iter().filter(|m| !m.task.has_exited() && !m.task.is_exiting()).peekable();
        let alive = living.peek().is_some();
        let representative = living.next().map_or(task, |member| &member.task);
        let mut unsupported = Vec::new();
        let state = self.process_state(task, signal, alive);
        let mut threads: Vec<Thread> = Vec::new();
        let gone = matches!(state, ProcessState::Zombie { .. } | ProcessState::Exiting { .. });
        for member in members {
            if member.task.is_worker() {
                unsupported.push(format!(
                    "kernel worker thread {} ({})",
                    member.task.pid,
                    member.task.name()
                ));
            } else if !member.task.is_new() && (!gone || member.task.pid == task.pid) {
                threads.push(self.thread(member, &mut unsupported)?);
            }
        }
        let mut process = Process {
            pgid: self.pid_number(signal.pgrp)?,
            sid: self.pid_number(signal.session)?,
            state,
            threads,
            address_space: (representative.mm != 0).then_some(AddressSpaceId(representative.mm)),
            files_id: representative.files,
            rlimits: signal
                .rlim
                .as_chunks::<2>()
                .0
                .iter()
                .map(|[cur, max]| Rlimit { cur: *cur, max: *max })
                .collect(),
            child_subreaper: signal.is_child_subreaper,
            oom_score_adj: i32::from(signal.oom_score_adj),
            ..self.bare(task)
        };
        if gone {
            process.address_space = None;
            process.files_id = 0;
            for thread in &mut process.threads {
                thread.state = ThreadState::Dead;
            }
            return Ok(Some(process));
        }
        process.namespaces = self.namespaces(representative)?;
        self.own_namespaces(representative, &mut process);
        match self.cgroup_path(representative) {
            Ok(path) => {
                process.unit = unit_of(&path);
                process.cgroup = path;
            }
            Err(error) => self.find(Severity::Note, "process", format!("its cgroup cannot be read: {error}")),
        }
        process.signals = SignalState {
            id: representative.sighand,
            actions: if representative.sighand == 0 {
                Vec::new()
            } else {
                self.signal_actions(representative.sighand)?
            },
            pending: self.pending_signals(signal.shared_pending)?,
        };
        let pending = process.threads.iter().flat_map(|thread| &thread.pending);
        let pending: Vec<&PendingSignal> = pending.chain(&process.signals.pending).collect();
        let task_of = |tid| members.iter().find(|member| member.task.pid == tid).map(|member| member.addr);
        let timers = self.process_timers(task.signal, &task_of, &pending);
        process.timers = self.part("timer", timers).unwrap_or_default();
        // One of each is read, and every living thread has to have the same.
        let of = |task: &Task| (task.files, task.fs, task.nsproxy);
        let is_living =
            |task: &&Task| !task.has_exited() && !task.is_exiting() && !task.is_new() && !task.is_worker();
        let living = members.iter().map(|member| &member.task).filter(is_living);
        for other in living.filter(|task| of(task) != of(representative)) {
            let text = format!("thread {} has descriptors, a directory or namespaces of its own", other.pid);
            unsupported.push(text);
        }
        if signal.tty != 0 {
            process.ctty = self.part("tty", self.tty(signal.tty)).map(|()| TtyId(signal.tty));
        }
        if representative.fs != 0 {
            process.fs = self.part("fs", self.fs_context(representative.fs)).unwrap_or_default();
        }
        if representative.files != 0 {
            let descriptors = self.descriptors(representative.files);
            process.descriptors = self.part("file", descriptors).unwrap_or_default();
        }
        // Who executes gets an address space from the program.
        if !self.executes(&mut process, members)
            && let Some(id) = process.address_space
        {
            let call_of = |task: u64| {
                let tid = members.iter().find(|member| member.addr == task)?.task.pid;
                process.threads.iter().find(|thread| thread.tid == tid)?.syscall.map(|call| call.nr)
            };
            let space = self.address_space(id, &call_of, &mut unsupported);
            if self.part("memory", space).is_none() {
                // For who asks for it by its program.
                let member = members.iter().find(|member| member.task.mm == id.0);
                let program = member.and_then(|member| Some((member, self.program_file(id.0)?)));
                process.address_space = program.map(|(member, file)| self.program_alone(member, file));
            }
            process.crash_procedure =
                self.address_spaces.borrow().get(&id).and_then(|mm| self.crash_procedure(mm));
        }
        process.vfork = self.is_vfork_child(&process, members);
        self.name_unsupported(members, &mut unsupported);
        unsupported.sort();
        unsupported.dedup();
        process.unsupported = unsupported;
        Ok(Some(process))
    }

    /// Whether the process was executing another program, with the old one gone: an address space of its own is noted then, of which
    /// only the program is known.
    fn executes(&self, process: &mut Process, members: &[Member]) -> bool {
        let mut living = process.threads.iter_mut().filter(|t| t.state != ThreadState::Dead);
        let (Some(thread), others) = (living.next(), living.next().is_some()) else { return false };
        let Resume::Exec(program) = &thread.resume else { return false };
        if others {
            let why = "execve: the process's other threads were being ended".into();
            thread.resume = Resume::Impossible { why };
            return false;
        }
        let Some(member) = members.iter().find(|member| member.task.pid == thread.tid) else { return false };
        process.address_space = Some(self.program_alone(member, program.file.0));
        for action in process.signals.actions.iter_mut().filter(|action| action.handler != SIG_IGN) {
            *action = SigAction::default();
        }
        true
    }

    /// An address space of which only the program is known, by its open file.
    fn program_alone(&self, member: &Member, file: u64) -> AddressSpaceId {
        // The thread's address: the kernel has nothing else there.
        let id = AddressSpaceId(member.addr);
        let space = AddressSpace { exe: self.mapped_file(file), dumpable: 1, ..AddressSpace::default() };
        self.address_spaces.borrow_mut().insert(id, space);
        id
    }

    /// What is left of a process that cannot be read: who it was. It does not come back, and a finding says why, but it is named, and its parent is told.
    fn lost_process(&self, leader: &Member) -> Process {
        let before = self.set_subject(Some(leader.task.pid));
        // For who asks for it by its program.
        let file = self.program_file(leader.task.mm);
        let address_space = file.map(|file| self.program_alone(leader, file));
        self.set_subject(before);
        Process { address_space, ..self.bare(&leader.task) }
    }

    /// The open file of an address space's program; `None` if there is none to be found.
    fn program_file(&self, mm: u64) -> Option<u64> {
        let offset = self.kernel.offset_of("mm_struct", "exe_file").ok().filter(|_| mm != 0)?;
        self.kernel.read_u64(mm.wrapping_add(offset)).ok().filter(|file| *file != 0)
    }

    /// What a leader's own task says of a process.
    fn bare(&self, task: &Task) -> Process {
        Process {
            ppid: self.parent_pid(task),
            state: match task.has_exited() {
                true => ProcessState::Zombie { status: task.exit_code },
                false => ProcessState::Alive,
            },
            exit_signal: task.exit_signal,
            start_boottime_ns: task.start_boottime,
            ..Process::new(task.pid, task.name())
        }
    }

    /// Whether the process is of one thread, and whoever made it waits in vfork(2) for it to give the memory back.
    fn is_vfork_child(&self, process: &Process, members: &[Member]) -> bool {
        let [Member { task, .. }] = members else { return false };
        let shared = |parent: &Task| process.address_space == Some(AddressSpaceId(parent.mm));
        task.vfork_done != 0 && self.task(task.real_parent).is_ok_and(|parent| shared(&parent))
    }

    /// A part of a process that others can do without: `None` with a finding when it is damaged.
    fn part<T>(&self, object: &str, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.find(Severity::Broken, object, error.to_string())).ok()
    }

    /// All threads of a group: leader first, then by TID.
    fn group(&self, leader: &Member) -> Result<Group> {
        let signal: Signal = self.kernel.read(leader.task.signal)?;
        let link = self.kernel.offset_of("task_struct", "thread_node")?;
        let mut members = vec![leader.clone()];
        for node in self.list(signal.thread_head, MAX_TASKS)? {
            let addr = node.wrapping_sub(link);
            if addr == leader.addr {
                continue;
            }
            let task = self.task(addr)?;
            if task.signal != leader.task.signal || task.tgid != leader.task.tgid {
                return Err(corrupt(
                    "task_struct",
                    addr,
                    format!("thread {} belongs to another process", task.pid),
                ));
            }
            members.push(Member { addr, task });
        }
        members[1..].sort_by_key(|member| member.task.pid);
        Ok(Group { leader: leader.task.clone(), signal, members })
    }

    fn process_state(&self, leader: &Task, signal: &Signal, alive: bool) -> ProcessState {
        let group_exit = signal.flags & SIGNAL_GROUP_EXIT != 0;
        let status = if group_exit { signal.group_exit_code } else { leader.exit_code };
        if !alive {
            return match leader.has_exited() {
                true => ProcessState::Zombie { status },
                false => ProcessState::Exiting { status },
            };
        }
        if group_exit || leader.flags & PF_DUMPCORE != 0 {
            return ProcessState::Exiting { status };
        }
        if signal.flags & SIGNAL_STOP_STOPPED != 0 || signal.group_stop_count > 0 {
            const SIGSTOP: i32 = 19;
            let signals = [(leader.jobctl & JOBCTL_STOP_SIGMASK) as i32, signal.group_exit_code];
            let signal = signals.into_iter().find(|s| crate::signal::mask(*s) != 0).unwrap_or(SIGSTOP);
            return ProcessState::Stopped { signal };
        }
        ProcessState::Alive
    }

    /// Which of the process's namespaces are the initial ones.
    fn namespaces(&self, task: &Task) -> Result<Namespaces> {
        if task.nsproxy == 0 {
            return Ok(Namespaces::default());
        }
        let init: NsProxy = self.kernel.read(self.kernel.symbol("init_nsproxy")?)?;
        let own: NsProxy = self.kernel.read(task.nsproxy)?;
        let (_, user_ns) = self.credentials(task.real_cred)?;
        Ok(Namespaces {
            cgroup: own.cgroup_ns == init.cgroup_ns,
            ipc: own.ipc_ns == init.ipc_ns,
            mnt: own.mnt_ns == init.mnt_ns,
            net: own.net_ns == init.net_ns,
            pid: own.pid_ns_for_children == init.pid_ns_for_children
                && self.is_in_initial_pid_namespace(task)?,
            time: own.time_ns == init.time_ns && own.time_ns_for_children == init.time_ns_for_children,
            user: user_ns == self.kernel.symbol("init_user_ns")?,
            uts: own.uts_ns == init.uts_ns,
        })
    }

    /// Reads those namespaces that are not the initial ones and can be made again.
    fn own_namespaces(&self, task: &Task, process: &mut Process) {
        let read = || -> Result<_> {
            let own: NsProxy = self.kernel.read(task.nsproxy)?;
            let initial = &process.namespaces;
            let mount = if initial.mnt { None } else { Some(self.mount_namespace(own.mnt_ns)?) };
            let uts = if initial.uts { None } else { Some(self.uts_namespace(own.uts_ns)?) };
            Ok((mount, uts))
        };
        if process.namespaces.mnt && process.namespaces.uts {
            return;
        }
        match read() {
            Ok(own) => (process.mount_namespace, process.uts_namespace) = own,
            Err(error) => {
                self.find(Severity::Broken, "namespace", format!("its namespaces cannot be read: {error}"));
            }
        }
    }

    fn is_in_initial_pid_namespace(&self, task: &Task) -> Result<bool> {
        let pid: PidStruct = self.kernel.read(task.thread_pid)?;
        Ok(pid.level == 0)
    }

    /// The path of the process's cgroup in the unified hierarchy (v2), as in /proc/PID/cgroup.
    fn cgroup_path(&self, task: &Task) -> Result<Bytes> {
        let Some(css_set) = task.cgroups.filter(|addr| *addr != 0) else { return Ok(Bytes::from("/")) };
        let css_set: CssSet = self.kernel.read(css_set)?;
        let cgroup: Cgroup = self.kernel.read(css_set.dfl_cgrp)?;
        self.kernfs_path(cgroup.kn)
    }

    /// State that this version does not bring back, beyond what the parts have named.
    fn name_unsupported(&self, tasks: &[Member], unsupported: &mut Vec<String>) {
        for Member { task, .. } in tasks.iter().filter(|t| !t.task.has_exited()) {
            let tid = task.pid;
            if task.ptrace != 0 {
                let tracer = self.task(task.parent).map_or(0, |t| t.tgid);
                unsupported.push(format!("thread {tid} is traced by PID {tracer}"));
            }
            if task.ptraced != task.ptraced_head {
                unsupported.push(format!("thread {tid} traces others (ptrace)"));
            }
            if task.io_uring.is_some_and(|ctx| ctx != 0) {
                unsupported.push("io_uring".into());
            }
            if task.perf_events.is_some_and(|next| Some(next) != task.perf_event_list) {
                unsupported.push(format!("thread {tid} has performance events"));
            }
            if task.dispatch_selector.is_some_and(|selector| selector != 0) {
                unsupported.push(format!("thread {tid} uses syscall user dispatch"));
            }
            if task.io_bitmap.is_some_and(|bitmap| bitmap != 0) {
                unsupported.push(format!("thread {tid} has I/O port permissions"));
            }
            if task.shadow_stack.is_some_and(|features| features != 0) {
                unsupported.push(format!("thread {tid} has a shadow stack"));
            }
        }
    }
}

/// Those that were on their way out become what they would have been a moment later (exit_notify(), kernel/exit.c): their children go
/// to the next reaper, they are zombies, and their parents have the signal. One that nobody waits for stays
/// [`ProcessState::Exiting`].
fn finish_exits(processes: &mut [Process]) {
    let exiting = |p: &Process| matches!(p.state, ProcessState::Exiting { .. });
    for i in 0..processes.len() {
        let ProcessState::Exiting { status } = processes[i].state else { continue };
        let (pid, exit_signal) = (processes[i].pid, processes[i].exit_signal);
        let reaper = reaper(processes, i);
        for child in processes.iter_mut().filter(|p| p.ppid == pid) {
            child.ppid = reaper;
        }
        let info = exit_info(&processes[i], status);
        let ppid = processes[i].ppid;
        let Some(parent) = processes.iter_mut().find(|p| p.pid == ppid && !exiting(p)) else { continue };
        let actions = &parent.signals.actions;
        let action =
            usize::try_from(exit_signal - 1).ok().and_then(|n| actions.get(n)).copied().unwrap_or_default();
        let blocked = parent.threads.first().map_or(0, |t| t.blocked) & crate::signal::mask(exit_signal) != 0;
        let pending = parent.signals.pending.iter().any(|p| p.signo == exit_signal);
        let (ignored, default) = (action.handler == SIG_IGN, action.handler == SIG_DFL);
        let unheard = exit_signal == SIGCHLD && !blocked && (ignored || default);
        if crate::signal::mask(exit_signal) != 0 && !unheard && !pending {
            parent.signals.pending.push(PendingSignal { signo: exit_signal, info });
        }
        if exit_signal != SIGCHLD || !ignored && action.flags & SA_NOCLDWAIT == 0 {
            processes[i].state = ProcessState::Zombie { status };
        }
    }
}

/// Who gets the children of a process that exits: the nearest living subreaper among its ancestors, or init
/// (find_new_reaper(), kernel/exit.c).
fn reaper(processes: &[Process], of: usize) -> Pid {
    let mut pid = processes.get(of).map_or(0, |p| p.ppid);
    for _ in 0..processes.len() {
        let Some(ancestor) = processes.iter().find(|p| p.pid == pid) else { break };
        let lives = matches!(ancestor.state, ProcessState::Alive | ProcessState::Stopped { .. });
        if lives && ancestor.child_subreaper {
            return pid;
        }
        pid = ancestor.ppid;
    }
    1
}

/// The `siginfo_t` of a child's end (do_notify_parent(), kernel/signal.c), without times.
fn exit_info(child: &Process, status: i32) -> Vec<u8> {
    const CLD_EXITED: i32 = 1;
    const CLD_KILLED: i32 = 2;
    const CLD_DUMPED: i32 = 3;
    let (code, value) = match status & 0x7f {
        0 => (CLD_EXITED, status >> 8 & 0xff),
        signal if status & 0x80 != 0 => (CLD_DUMPED, signal),
        signal => (CLD_KILLED, signal),
    };
    let uid = child.threads.first().map_or(0, |t| t.credentials.uid);
    let words = [child.exit_signal, 0, code, 0, child.pid, uid as i32, value, 0, 0, 0, 0, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The systemd unit that a cgroup path names: the last component that is a service, a scope or the like, but not a
/// slice.
fn unit_of(path: &Bytes) -> Option<String> {
    const KINDS: [&str; 6] = [".service", ".scope", ".socket", ".mount", ".swap", ".timer"];
    let text = std::str::from_utf8(path.as_bytes()).ok()?;
    let unit = text.split('/').find(|part| KINDS.iter().any(|kind| part.ends_with(kind)))?;
    Some(unit.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use ktypes::Kernel;
    use synth::{Synth, U32, XaItem, array, named};

    /// A machine with the idle task and four processes, PIDs 1 to 4, on the task list and in the PID table.
    struct Machine {
        synth: Synth,
        tasks: Vec<u64>,
        link: u64,
    }

    impl Machine {
        fn new() -> Self {
            let mut synth = Synth::new();
            declare::<Task>(
                &mut synth,
                &[("tasks", named("list_head")), ("pid_links", array(named("hlist_node"), 4))],
            );
            declare::<Signal>(&mut synth, &[]);
            declare::<PidStruct>(&mut synth, &[("tasks", array(named("hlist_head"), 4))]);
            declare::<Holder>(&mut synth, &[("idr_rt", named("xarray"))]);
            declare::<Upid>(&mut synth, &[("nr", U32)]);
            let init = synth.variable("init_task", "task_struct");
            let head = synth.list_init("task_struct", init, "tasks");
            synth.set("task_struct", init, "group_leader", init);
            let cache = synth.slab_cache("task_struct", synth.size_of("task_struct"));
            let mut tasks = Vec::new();
            let mut items = Vec::new();
            for pid in 1..=4 {
                let task = synth.slab_alloc(cache);
                synth.set("task_struct", task, "pid", pid);
                synth.set("task_struct", task, "tgid", pid);
                synth.set("task_struct", task, "group_leader", task);
                synth.set("task_struct", task, "comm", "survivor");
                let link = synth.address_of("task_struct", task, "tasks");
                synth.list_add_tail(link, head);
                let number = synth.alloc("pid");
                let bucket = synth.address_of("pid", number, "tasks[1]");
                let in_bucket = synth.address_of("task_struct", task, "pid_links[1]");
                synth.hlist_add_head(in_bucket, bucket);
                items.push(XaItem { index: pid as u64, order: 0, entry: number, marks: 0 });
                tasks.push(task);
            }
            let namespace = synth.variable("init_pid_ns", "pid_namespace");
            let idr = synth.address_of("pid_namespace", namespace, "idr.idr_rt");
            synth.xarray(idr, &items);
            let link = synth.offset_of("task_struct", "tasks");
            Machine { synth, tasks, link }
        }

        /// PIDs that are found, and what is said about it.
        fn found(&self) -> (Vec<Pid>, Vec<String>) {
            let kernel: Kernel = open(&self.synth);
            let autopsy = Autopsy::new(&kernel);
            let pids = autopsy.tasks().unwrap().into_iter().map(|task| task.pid).collect();
            (pids, autopsy.findings().into_iter().map(|finding| finding.text).collect())
        }

        fn next_of(&self, index: usize) -> u64 {
            self.tasks[index] + self.link
        }
    }

    /// Declares what is only used by offset.
    #[derive(KernelType)]
    #[kernel("pid_namespace")]
    struct Holder {
        #[kernel("idr.idr_rt", address)]
        _idr: u64,
    }

    #[derive(KernelType)]
    #[kernel("upid")]
    struct Upid {
        #[kernel("nr")]
        _nr: i32,
    }

    #[test]
    fn a_healthy_task_list_raises_no_finding() {
        assert_eq!(Machine::new().found(), (vec![1, 2, 3, 4], vec![]));
    }

    #[test]
    fn a_cycle_in_the_task_list_costs_nobody() {
        let mut machine = Machine::new();
        let (second, first) = (machine.next_of(1), machine.next_of(0));
        machine.synth.write_u64(second, first);
        let (pids, findings) = machine.found();
        assert_eq!(pids, [1, 2, 3, 4]);
        assert!(findings.len() == 1 && findings[0].contains("twice"), "{findings:?}");
    }

    #[test]
    fn a_wild_pointer_in_the_task_list_costs_nobody() {
        for wild in [0, 8, 0xdead_beef_dead_beef, u64::MAX - 7, 0xffff_8880_0000_1000] {
            let mut machine = Machine::new();
            let second = machine.next_of(1);
            machine.synth.write_u64(second, wild);
            let (pids, findings) = machine.found();
            assert_eq!(pids, [1, 2, 3, 4], "{wild:#x}");
            assert!(findings[0].contains("task list is damaged"), "{findings:?}");
        }
    }

    #[test]
    fn a_task_list_broken_in_both_directions_is_mended_by_the_pid_table() {
        let mut machine = Machine::new();
        let (first, last) = (machine.next_of(0), machine.next_of(3));
        let prev = machine.synth.offset_of("list_head", "prev");
        machine.synth.write_u64(first, 0);
        machine.synth.write_u64(last + prev, 0);
        let (pids, findings) = machine.found();
        assert_eq!(pids, [1, 2, 3, 4]);
        assert!(findings[0].contains("PID table"), "{findings:?}");
    }

    #[test]
    fn a_process_that_cannot_be_read_is_named() {
        let mut machine = Machine::new();
        for &task in &machine.tasks {
            machine.synth.set("task_struct", task, "signal", 0x4141_u64);
            machine.synth.set("task_struct", task, "real_parent", machine.tasks[0]);
        }
        // That one had not begun to run: its parent forks again.
        machine.synth.set("task_struct", machine.tasks[3], "__state", TASK_NEW);
        let kernel = open(&machine.synth);
        let autopsy = Autopsy::new(&kernel);
        let processes = autopsy.processes().unwrap();
        let found: Vec<_> = processes.iter().map(|p| (p.pid, p.ppid, p.comm.to_string())).collect();
        assert_eq!(found, [1, 2, 3].map(|pid| (pid, 1, "survivor".to_owned())));
        let findings = autopsy.findings();
        let is_lost = |pid: Pid| {
            findings
                .iter()
                .any(|f| f.pid == Some(pid) && f.severity == Severity::Broken && f.text.contains("is lost"))
        };
        assert!([1, 2, 3].into_iter().all(is_lost), "{findings:?}");
    }

    #[test]
    fn a_destroyed_task_costs_only_itself() {
        let mut machine = Machine::new();
        machine.synth.set("task_struct", machine.tasks[2], "pid", -5);
        let (pids, findings) = machine.found();
        assert_eq!(pids, [1, 2, 4]);
        assert!(findings.iter().all(|f| f.contains("a task is lost")), "{findings:?}");
    }

    #[test]
    fn a_missing_member_is_named() {
        let mut machine = Machine::new();
        machine.synth.without_member("task_struct", "group_leader");
        let kernel = open(&machine.synth);
        let autopsy = Autopsy::new(&kernel);
        let text = match autopsy.tasks() {
            Ok(tasks) => {
                assert!(tasks.is_empty());
                autopsy.findings().into_iter().map(|f| f.text).collect::<Vec<_>>().join("\n")
            }
            Err(error) => error.to_string(),
        };
        assert!(text.contains("`task_struct` has no member `group_leader`"), "{text}");
        assert!(text.contains(kernel.release()), "{text}");
    }

    #[test]
    fn units_are_named_by_the_cgroup() {
        let unit = |path: &str| unit_of(&Bytes::from(path));
        assert_eq!(unit("/system.slice/cron.service").as_deref(), Some("cron.service"));
        // Delegated services have cgroups of their own below.
        assert_eq!(unit("/system.slice/docker.service/payload").as_deref(), Some("docker.service"));
        assert_eq!(unit("/user.slice/user-0.slice/session-1.scope").as_deref(), Some("session-1.scope"));
        assert_eq!(unit("/init.scope").as_deref(), Some("init.scope"));
        assert_eq!(unit("/"), None);
        assert_eq!(unit("/user.slice"), None);
    }
}
