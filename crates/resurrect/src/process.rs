//! One process on its way back: from a skeleton to a stopped copy of what it was.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::RawFd;
use std::time::Duration;

use nix::errno::Errno;
use snapshot::{
    AddressSpace, Credentials, InodeId, PageRun, Pid, Process, ProcessState, Reason, Resume, Seccomp,
    ShmSegment, Snapshot, Thread, ThreadState,
};

use crate::check::{self, Expected};
use crate::copy_on_write::Kept;
use crate::deadline::Deadline;
use crate::file::Files;
use crate::first::{self, First};
use crate::inject::{self, Call, InjectError, Missed, Scratch, Tracee, call};
use crate::memory::{self, Area, Sources, Specials};
use crate::pour::{Owner, OwnerId, ReverseMap};
use crate::syscall::{self, Continuation};
use crate::{aio, cgroup, clock, copy_on_write, file, ipc, lock, signal, sys, thread, timer};

/// What all rebuilt processes have in common.
pub(crate) struct Common<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) files: &'a Files,
    /// What processes have to tell their epoll instances themselves.
    pub(crate) epoll_calls: &'a BTreeMap<Pid, Vec<Call>>,
    pub(crate) shared: &'a BTreeMap<InodeId, RawFd>,
    pub(crate) specials: &'a Specials,
    pub(crate) scratch: Scratch,
    /// Offset of a `syscall` instruction in the vDSO.
    pub(crate) syscall_offset: u64,
    /// What skeletons inherit from this program.
    pub(crate) own: Own,
    pub(crate) copy_on_write: &'a copy_on_write::Plan,
    /// Since when the processes' clocks go on.
    pub(crate) clocks_go_on: clock::GoOn,
    /// A descriptor of the time namespace of the processes.
    pub(crate) time_namespace: Option<RawFd>,
    /// What PID 1 is now, if it comes back.
    pub(crate) first: Option<&'a First>,
    /// What it runs if it does not.
    pub(crate) fallback: Vec<CString>,
}

impl Common<'_> {
    /// Where the kernel's own mappings are in a process before it has its memory.
    fn specials_of(&self, pid: Pid) -> &Specials {
        self.first.filter(|_| pid == first::PID).map_or(self.specials, |first| &first.specials)
    }
}

/// Properties of this program that a new process starts with.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    pub(crate) credentials: Credentials,
    pub(crate) nice: i32,
    pub(crate) timer_slack_ns: u64,
    pub(crate) oom_score_adj: i32,
    /// Device and inode of the executable.
    pub(crate) exe: (u64, u64),
}

impl Own {
    pub(crate) fn read() -> std::io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let number = |path| -> std::io::Result<i64> {
            let text = String::from_utf8_lossy(&sys::read_proc(path)?).into_owned();
            text.trim().parse().map_err(|_| std::io::ErrorKind::InvalidData.into())
        };
        let exe = std::fs::metadata("/proc/self/exe")?;
        // SAFETY: numbers only; 20 minus the value is returned, so that an error cannot be taken for one.
        let nice = unsafe { sys::raw(libc::SYS_getpriority, [libc::PRIO_PROCESS as u64, 0, 0, 0, 0, 0]) }?;
        Ok(Self {
            credentials: crate::credentials::own()?,
            nice: 20 - nice as i32,
            timer_slack_ns: number("/proc/self/timerslack_ns")? as u64,
            oom_score_adj: number("/proc/self/oom_score_adj")? as i32,
            exe: (exe.dev(), exe.ino()),
        })
    }
}

/// What went wrong, and in which step.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) step: &'static str,
    pub(crate) reason: String,
}

fn failure<E: ToString>(step: &'static str) -> impl Fn(E) -> Failure {
    move |e| Failure { step, reason: e.to_string() }
}

/// Whether a thread goes on; others are not made.
pub(crate) fn lives(t: &Thread) -> bool {
    t.state != ThreadState::Dead && !matches!(t.resume, Resume::Exit { .. })
}

fn living(process: &Process) -> impl Iterator<Item = &Thread> {
    process.threads.iter().filter(|t| lives(t))
}

/// A process being rebuilt.
pub(crate) struct Build<'a> {
    pub(crate) process: &'a Process,
    pub(crate) mm: &'a AddressSpace,
    areas: Vec<Area>,
    /// Memory that is in place already.
    kept: Vec<Kept>,
    leader: Tracee,
    /// Living threads other than the leader.
    others: Vec<Tracee>,
    pub(crate) losses: Vec<Reason>,
    /// The descriptors that are not its own are closed by another process, which shares its table and is finished later.
    pub(crate) leaves_files_open: bool,
    leader_lives: bool,
    /// Address of a `syscall` instruction in its vDSO.
    instruction: u64,
}

impl<'a> Build<'a> {
    /// Takes over a skeleton.
    pub(crate) fn seize(
        process: &'a Process,
        mm: &'a AddressSpace,
        common: &Common<'_>,
        zombies: &[Pid],
        deadline: Deadline,
    ) -> Result<Self, Failure> {
        let first = common.first.filter(|_| process.pid == first::PID);
        let leader = match first {
            Some(first) => {
                let time = common.time_namespace.ok_or("no time namespace").map_err(failure("seize"))?;
                let others: Vec<RawFd> = common.shared.values().copied().collect();
                first.prepare(
                    process,
                    (common.snapshot, common.files),
                    zombies,
                    (&others, time),
                    (common.scratch, &common.fallback),
                    deadline,
                )
            }
            None => Tracee::seize(process.pid, common.scratch, deadline),
        }
        .map_err(failure("seize"))?;
        let leader_lives = process.leader().is_some_and(lives);
        let areas = memory::areas(mm);
        let vdso = memory::vdso_start(mm).ok_or("no vDSO").map_err(failure("seize"))?;
        let instruction = vdso + common.syscall_offset;
        let others = vec![];
        let losses = common.copy_on_write.lost(process.pid, mm, &areas);
        let kept = common.copy_on_write.kept(process.pid, &areas);
        let leaves_files_open = false;
        Ok(Self {
            process,
            mm,
            areas,
            kept,
            leader,
            others,
            losses,
            leaves_files_open,
            leader_lives,
            instruction,
        })
    }

    fn tracee(&self, tid: Pid) -> Option<&Tracee> {
        std::iter::once(&self.leader).chain(&self.others).find(|t| t.tid == tid)
    }

    /// All threads that are under ptrace.
    pub(crate) fn traced(&self) -> Vec<Pid> {
        std::iter::once(&self.leader).chain(&self.others).map(|t| t.tid).collect()
    }

    fn lose(&mut self, missed: Vec<Missed>) {
        self.losses.extend(thread::losses_of(missed));
    }

    /// Replaces the address space by the old one's mappings, still empty.
    pub(crate) fn map(&mut self, common: &Common<'_>, deadline: Deadline) -> Result<(), Failure> {
        let step = "map memory";
        let mut calls =
            memory::clear(self.mm, common.specials_of(self.process.pid), common.scratch, &self.kept);
        let fd = |id| common.files.fd(id);
        let segments = |id| common.snapshot.shm_segment(id).map(ShmSegment::mapped_len);
        let sources = Sources { files: &fd, shared: common.shared, segments: &segments };
        calls.extend(memory::map(&self.areas, &sources, &self.kept).map_err(failure(step))?);
        let all: Vec<PageRun> = self.mm.vmas.iter().flat_map(|vma| vma.pages.iter().copied()).collect();
        for kept in &self.kept {
            calls.extend(memory::drop_pages(&kept.to_drop(&all)));
        }
        let missed = self.leader.run(&calls, deadline).map_err(failure(step))?;
        self.lose(missed);
        Ok(())
    }

    /// Says which frames it needs, and where.
    pub(crate) fn claim_pages(&self, map: &mut ReverseMap) -> Result<Vec<OwnerId>, Failure> {
        let pid = self.process.pid;
        let writable = map.owner(Owner::Process(pid));
        let mut owners = vec![writable];
        let mut through_mem = None;
        for (is_writable, run) in memory::pages(self.mm, &self.areas, &self.kept) {
            let owner = match (is_writable, through_mem) {
                (true, _) => writable,
                (false, Some(owner)) => owner,
                (false, None) => {
                    let path = format!("/proc/{pid}/mem");
                    let mem =
                        OpenOptions::new().write(true).open(path).map_err(failure("open its memory"))?;
                    let owner = map.owner(Owner::Mem(mem));
                    through_mem = Some(owner);
                    owners.push(owner);
                    owner
                }
            };
            map.add(owner, run);
        }
        Ok(owners)
    }

    /// Everything after the memory's contents, up to the registers. The process is then as it was, and stopped.
    pub(crate) fn finish(&mut self, common: &Common<'_>, deadline: Deadline) -> Result<(), Failure> {
        self.finish_memory(common, deadline)?;
        self.adopt_threads(common, deadline)?;
        let mut continuations = self.continuations(common.clocks_go_on.at.elapsed())?;
        // Before it changes user, after all that a low limit could hinder.
        self.set_from_outside(common)?;
        self.set_up_threads(common, deadline)?;
        self.start_timers(common, deadline)?;
        if !self.leader_lives {
            self.leader.exit(self.instruction, deadline).map_err(failure("end the first thread"))?;
            self.await_leaders_end(deadline)?;
        }
        self.set_registers(common, &mut continuations, deadline)
    }

    /// Protection, layout, descriptors; and the other threads, while there are all privileges.
    fn finish_memory(&mut self, common: &Common<'_>, deadline: Deadline) -> Result<(), Failure> {
        aio::set_up(self.mm, &self.leader, self.instruction, deadline).map_err(failure("set up aio"))?;
        let mut calls = memory::finish(&self.areas);
        let exe =
            self.mm.exe.and_then(|id| common.files.fd(id)).filter(|&fd| !is_same_file(fd, common.own.exe));
        calls.push(memory::set_layout(&self.mm.layout, exe));
        calls.extend(common.epoll_calls.get(&self.process.pid).into_iter().flatten().cloned());
        if !self.leaves_files_open {
            calls.push(call!("close our files", libc::SYS_close_range, common.files.base, u32::MAX, 0u64));
        }
        calls.extend(file::ask_for_signals(common.snapshot, self.process));
        calls.extend(lock::take(common.snapshot, self.process));
        if self.mm.thp_disabled {
            let (option, on) = (libc::PR_SET_THP_DISABLE, 1u64);
            let call = call!("PR_SET_THP_DISABLE", libc::SYS_prctl, option, on, 0u64, 0u64, 0u64);
            calls.push(call.optional());
        }
        if self.mm.lock_future {
            let on_fault = if self.mm.lock_on_fault { libc::MCL_ONFAULT } else { 0 };
            calls.push(call!("mlockall", libc::SYS_mlockall, libc::MCL_FUTURE | on_fault).optional());
        }
        let others = living(self.process).filter(|t| t.tid != self.process.pid);
        calls.extend(others.map(|t| thread::create(t.tid)));
        let missed = self.leader.run(&calls, deadline).map_err(failure("finish memory"))?;
        self.lose(missed);
        Ok(())
    }

    fn adopt_threads(&mut self, common: &Common<'_>, deadline: Deadline) -> Result<(), Failure> {
        for t in living(self.process).filter(|t| t.tid != self.process.pid) {
            let tracee =
                Tracee::adopt(t.tid, common.scratch, deadline).map_err(failure("take over a thread"))?;
            self.others.push(tracee);
        }
        Ok(())
    }

    fn set_up_threads(&mut self, common: &Common<'_>, deadline: Deadline) -> Result<(), Failure> {
        let step = "set up threads";
        let p = self.process;
        let own = &common.own;
        // Threads first that are not the one that does the rest for the process.
        let mut living: Vec<&Thread> = living(self.process).collect();
        living.reverse();
        let main = living.last().map(|t| t.tid).ok_or("it has no living thread").map_err(failure(step))?;
        for t in living {
            let slack = own.timer_slack_ns;
            let mut calls = thread::set_up(common.snapshot, p, t, &own.credentials, slack, &mut self.losses);
            if t.tid == main {
                let pending = p.without_timers(&p.signals.pending);
                calls.extend(signal::queue(signal::Queue::Process(p.pid), pending, &mut self.losses));
                calls.extend(self.set_dumpable());
                calls.extend(ipc::undo(&common.snapshot.ipc, p.pid));
            }
            let tracee = self.tracee(t.tid).ok_or("a thread is missing").map_err(failure(step))?;
            if t.seccomp != Seccomp::Off {
                tracee.suspend_seccomp().map_err(failure(step))?;
            }
            let missed = tracee.run(&calls, deadline).map_err(failure(step))?;
            self.lose(missed);
        }
        Ok(())
    }

    /// Late: whatever expires from now on is pending when the process goes on.
    fn start_timers(&mut self, common: &Common<'_>, deadline: Deadline) -> Result<(), Failure> {
        let step = "start timers";
        let clocks = &common.snapshot.clocks;
        let is_before_boot = |clock, ns| common.clocks_go_on.is_before_boot(clocks, clock, ns);
        self.losses.extend(timer::losses(self.process, &is_before_boot));
        for errand in timer::errands(self.process, || common.clocks_go_on.at.elapsed()) {
            let tracee = match errand.thread {
                Some(tid) => self.tracee(tid).ok_or("a thread is missing").map_err(failure(step))?,
                None => self.main().map_err(failure(step))?,
            };
            tracee.run(&errand.calls, deadline).map_err(failure(step))?;
        }
        Ok(())
    }

    /// After the last change of credentials, which resets it.
    fn set_dumpable(&mut self) -> Option<Call> {
        match self.mm.dumpable {
            value @ (0 | 1) => {
                let option = libc::PR_SET_DUMPABLE;
                Some(call!("PR_SET_DUMPABLE", libc::SYS_prctl, option, value, 0u64, 0u64, 0u64))
            }
            other => {
                let text = format!("dumpable was {other}, which cannot be set; it is what the kernel chose");
                self.losses.push(Reason::new("dumpable", text));
                None
            }
        }
    }

    /// What needs our privileges rather than the process's own hands.
    fn set_from_outside(&mut self, common: &Common<'_>) -> Result<(), Failure> {
        let step = "set limits and priorities";
        let p = self.process;
        for t in living(self.process) {
            thread::schedule(t.tid, &t.scheduling, common.own.nice, &mut self.losses)
                .map_err(failure(step))?;
        }
        let now = sys::limits(p.pid).map_err(failure(step))?;
        for ((limit, resource), now) in p.rlimits.iter().zip(0u32..).zip(now) {
            if (now.rlim_cur, now.rlim_max) != (limit.cur, limit.max) {
                let wanted = libc::rlimit64 { rlim_cur: limit.cur, rlim_max: limit.max };
                sys::prlimit(p.pid, resource, Some(wanted))
                    .map_err(|e| Failure { step, reason: format!("limit {resource}: {e}") })?;
            }
        }
        if let Err(why) = cgroup::join(p.pid, &p.cgroup) {
            let text = format!("it was in the control group {}, and runs in the root group: {why}", p.cgroup);
            self.losses.push(Reason::new("cgroup", text));
        }
        if p.oom_score_adj != common.own.oom_score_adj {
            let path = format!("/proc/{}/oom_score_adj", p.pid);
            sys::write_proc(&path, &p.oom_score_adj.to_string()).map_err(failure(step))?;
        }
        Ok(())
    }

    /// The leader reports nothing when it is gone: its threads still live. It is on its way, so this takes no time worth a name.
    fn await_leaders_end(&self, deadline: Deadline) -> Result<(), Failure> {
        let path = format!("/proc/{0}/task/{0}/stat", self.process.pid);
        loop {
            let stat = sys::read_proc(&path).map_err(failure("end the first thread"))?;
            let state = stat.iter().rposition(|&b| b == b')').and_then(|i| stat.get(i + 2));
            if state == Some(&b'Z') {
                return Ok(());
            }
            if deadline.is_over() {
                let reason = "not done in time".to_owned();
                return Err(Failure { step: "end the first thread", reason });
            }
            // SAFETY: no arguments.
            unsafe { libc::sched_yield() };
        }
    }

    /// How each living thread goes on. Read before rseq is registered: that makes the kernel forget who was inside a sequence.
    fn continuations(&self, gone_by: Duration) -> Result<Vec<(&'a Thread, Continuation)>, Failure> {
        let step = "read restartable sequences";
        let mut continuations = Vec::new();
        for t in living(self.process) {
            let mut c = syscall::continuation(t, gone_by).map_err(failure(step))?;
            let tracee = self.tracee(t.tid).ok_or("a thread is missing").map_err(failure(step))?;
            if let Some(rseq) = &t.rseq {
                thread::leave_rseq_section(tracee, rseq, &mut c.regs).map_err(failure(step))?;
            }
            continuations.push((t, c));
        }
        Ok(continuations)
    }

    /// Interrupted calls, registers, signal masks; the scratch area goes.
    fn set_registers(
        &mut self,
        common: &Common<'_>,
        continuations: &mut [(&Thread, Continuation)],
        deadline: Deadline,
    ) -> Result<(), Failure> {
        let step = "set registers";
        for (t, c) in continuations.iter_mut() {
            let tracee = self.tracee(t.tid).ok_or("a thread is missing").map_err(failure(step))?;
            thread::prepare(tracee, c, self.instruction, deadline).map_err(failure(step))?;
        }
        let main = self.main().map_err(failure(step))?;
        remove_scratch(self.process, main, common.scratch, self.instruction, deadline)
            .map_err(failure(step))?;
        for (t, c) in continuations.iter() {
            let tracee = self.tracee(t.tid).ok_or("a thread is missing").map_err(failure(step))?;
            thread::set_state(tracee, t, &c.regs).map_err(failure(step))?;
        }
        Ok(())
    }

    /// Timeouts that the kernel does not count down itself: while others were rebuilt time has passed.
    pub(crate) fn shorten_timeouts(&self, common: &Common<'_>) -> Result<(), Failure> {
        let step = "shorten timeouts";
        let gone_by = common.clocks_go_on.at.elapsed();
        for t in living(self.process) {
            let Some(shorter) = syscall::timeout(t, gone_by) else { continue };
            let tracee = self.tracee(t.tid).ok_or("a thread is missing").map_err(failure(step))?;
            if let Some((addr, bytes)) = shorter.store {
                tracee.write(addr, &bytes).map_err(failure(step))?;
            }
            if let Some(change) = shorter.argument {
                let mut regs = tracee.registers().map_err(failure(step))?;
                change.apply(&mut regs);
                tracee.set_registers(&regs).map_err(failure(step))?;
            }
        }
        Ok(())
    }

    /// What is not as it was.
    pub(crate) fn differences(
        &self,
        common: &Common<'_>,
        parent: Option<Pid>,
        has_ctty: bool,
    ) -> Vec<String> {
        check::differences(&Expected {
            snapshot: common.snapshot,
            files: common.files,
            process: self.process,
            mm: self.mm,
            threads: living(self.process).collect(),
            parent,
            has_ctty,
        })
    }

    /// Address of a `syscall` instruction of its own.
    pub(crate) fn instruction(&self) -> u64 {
        self.instruction
    }

    /// The first thread that lives.
    pub(crate) fn main(&self) -> Result<&Tracee, InjectError> {
        let main = living(self.process).next().and_then(|t| self.tracee(t.tid));
        main.ok_or_else(|| InjectError::Unexpected("it has no living thread".into()))
    }

    /// Makes system calls in it before it is released; what they returned.
    pub(crate) fn call_aside(
        &self,
        calls: &[(&str, i64, [u64; 6])],
        deadline: Deadline,
    ) -> Result<Vec<i64>, InjectError> {
        self.main()?.call_aside(self.instruction, calls, deadline)
    }

    /// Whether it shares its memory with whoever made it, who waits for it.
    pub(crate) fn is_vfork_child_of(&self, other: &Build<'_>) -> bool {
        self.process.vfork
            && self.process.ppid == other.process.pid
            && self.process.address_space == other.process.address_space
    }

    /// PID 1 cannot be killed: it runs the caller's program again.
    pub(crate) fn give_back(&self, fallback: &[CString], deadline: Deadline) -> Result<(), InjectError> {
        first::give_back(&self.leader, self.instruction, self.leader.scratch(), fallback, deadline)
    }

    /// Lets all threads go.
    pub(crate) fn release(&self) -> Result<(), InjectError> {
        self.stop_again();
        for t in living(self.process) {
            match self.tracee(t.tid).map(Tracee::detach) {
                // Another thread, or another process, that was let go before has ended it already.
                Some(Err(InjectError::Ptrace { errno: Errno::ESRCH, .. })) | None => {}
                Some(detached) => detached?,
            }
        }
        Ok(())
    }

    /// Lets all threads go but the main one.
    pub(crate) fn release_others(&self) -> Result<(), InjectError> {
        let main = self.main()?.tid;
        living(self.process)
            .filter(|t| t.tid != main)
            .filter_map(|t| self.tracee(t.tid))
            .try_for_each(Tracee::detach)
    }

    /// Lets it go as far as its memory is its own; it has a single thread.
    pub(crate) fn release_observed(&self) -> Result<(), InjectError> {
        self.stop_again();
        self.main()?.observe()
    }

    /// Waits until it has been on a CPU, and stands still or is gone: nobody is to see it run.
    pub(crate) fn await_stop(&self, deadline: Deadline) {
        /// Nothing tells of the stop of another one's child.
        const LOOK_AGAIN: Duration = Duration::from_micros(200);
        let path = format!("/proc/{}/stat", self.process.pid);
        while !check::has_stopped(&path) && !deadline.is_over() {
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn stop_again(&self) {
        if let ProcessState::Stopped { .. } = self.process.state {
            // Stops before its first instruction, whatever it does with other stopping signals. Its parent is told (again).
            // SAFETY: a signal to a process that we hold.
            unsafe { libc::kill(self.process.pid, libc::SIGSTOP) };
        }
    }
}

fn is_same_file(fd: RawFd, (dev, ino): (u64, u64)) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(format!("/proc/self/fd/{fd}")).is_ok_and(|m| (m.dev(), m.ino()) == (dev, ino))
}

/// The last traces of us, removed with the process's own instruction.
fn remove_scratch(
    process: &Process,
    tracee: &Tracee,
    scratch: Scratch,
    instruction: u64,
    deadline: Deadline,
) -> Result<(), InjectError> {
    let call = |what: &str, nr, args| {
        let result = tracee.call_and_interrupt(instruction, what, nr, args, deadline)?;
        if result < 0 {
            let errno = nix::errno::Errno::from_raw(-result as i32);
            return Err(InjectError::Call { what: what.into(), errno });
        }
        Ok(())
    };
    if let Some(action) = signal::late_action(&process.signals.actions) {
        tracee.write(tracee.scratch_data(), &action)?;
        let args = [libc::SIGTRAP as u64, tracee.scratch_data(), 0, 8, 0, 0];
        call("rt_sigaction SIGTRAP", libc::SYS_rt_sigaction, args)?;
    }
    call("unmap the scratch area", libc::SYS_munmap, [scratch.addr, Scratch::LEN, 0, 0, 0, 0])
}

/// Kills what has been built of a process.
pub(crate) fn abandon(pid: Pid, traced: &[Pid], deadline: Deadline) {
    inject::kill(pid, traced, deadline);
}
