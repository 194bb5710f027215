//! From a [`Snapshot`] to live processes.
//!
//! *In*: a snapshot with decisions made, and the dead machine's memory for page contents ([`PhysMem`]). *Out*: the processes
//! that are to continue, running, and a [`Report`] that says for every process of the snapshot what became of it and what it lost.
//! *Never*: looks at a kernel structure of the dead kernel, resumes a process half, or lets one process's failure cost another
//! its life.
//!
//! [`resurrect`] goes through these phases for all processes together:
//!
//! 1. *plan*: who can come back here at all (PIDs free, same vDSO …), who makes whom;
//! 2. *files*: what only the dead page cache had goes to disk ([`page_cache`]), then each open file is opened once, under descriptors
//!    that no process uses;
//! 3. *clock*: a time namespace in which the monotonic clocks go on;
//! 4. *skeletons*: forks of this program with the right PIDs, which do in their own code what does not depend on the address space;
//!    those that share memory with others since fork(2) fill it before they make them ([`copy_on_write`]);
//!    when all exist, files about processes (pidfds, /proc) are opened, which they then fetch;
//! 5. *map*: each is taken over with ptrace and its address space replaced by the old mappings, still empty;
//! 6. *pour*: page contents, for all processes at once in physical order;
//! 7. *finish*: protections, file locks, threads, credentials, pending signals, interrupted system calls, registers;
//! 8. *check*: `/proc` of every process against the snapshot;
//! 9. *release*: all at once; but who waits in vfork(2) goes on after the child ([`vfork`]).
//!
//! Until they are released, the processes die with this one. One file per kind of kernel object, named as in the `snapshot` crate.
//!
//! # What the caller has to provide
//!
//! Root in the initial namespaces, the real root file system, a single-threaded process that is not PID 1 and has no rseq registration (for
//! glibc: `GLIBC_TUNABLES=glibc.pthread.rseq=0`). Processes whose parent does not come back become children of the *caller's*
//! parent, which should be PID 1 or reap them.

mod aio;
mod autofs;
pub mod block;
mod cgroup;
mod check;
mod clock;
mod company;
mod copy_on_write;
mod crashproc;
mod credentials;
mod dead;
mod deadline;
mod epoll;
mod eventfd;
mod exec;
mod extent;
mod file;
mod first;
mod handle;
mod hugetlb;
mod inet;
mod inject;
mod inotify;
mod ipc;
mod lock;
mod lost_found;
mod lzo;
mod memfd;
mod memory;
mod mount;
mod names;
mod namespace;
mod netlink;
pub mod page_cache;
mod pidfd;
mod pipe;
mod plan;
mod pour;
mod proc;
mod process;
mod pty;
mod seccomp;
mod shared_memory;
mod signal;
mod signalfd;
mod skeleton;
mod socket;
pub mod swap;
mod sys;
mod syscall;
#[cfg(test)]
mod testing;
mod text;
mod thread;
mod timer;
mod timerfd;
mod tmpfs;
mod tty;
mod unix;
mod vfork;
mod vt;
mod xattr;
mod zram;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use snapshot::{
    Action, Bytes, Decision, FailedProcedure, Finding, FindingKind, Integrity, MAX_DESCRIPTOR, PhysMem, Pid,
    Process, ProcessState, Reason, Severity, Snapshot,
};

use crate::company::Company;
pub use crate::crashproc::CODE as CRASH_PROCEDURE;
use crate::deadline::{Alarm, Deadline};
use crate::file::{Files, Prepared};
use crate::first::First;
use crate::inject::{InjectError, Scratch};
use crate::memory::Specials;
use crate::namespace::Namespaces;
use crate::plan::{Plan, Role};
use crate::pour::{OwnerId, ReverseMap};
use crate::process::{Build, Common, Failure, Own};
use crate::skeleton::State;

/// As /proc/self/maps calls the dead kernel's memory.
const DUMP: &[u8] = b"/proc/vmcore";
/// How long program text may be read from the disk for comparison.
const TEXT_PATIENCE: Duration = Duration::from_secs(10);

/// Bounds for [`resurrect`].
#[derive(Clone, Debug)]
pub struct Options {
    /// For everything.
    pub deadline: Duration,
    /// For each step of each process.
    pub process_deadline: Duration,
    /// The whole machine: descriptors that cannot be rebuilt become dead ones, and PID 1 is rebuilt in the place of the caller's parent, which
    /// has to be PID 1, with a single thread, and waiting.
    pub whole_machine: bool,
    /// Should PID 1 not come back although it has been begun: arguments with which it runs the caller's program again.
    pub fallback: Vec<std::ffi::OsString>,
    /// How many kernels have died since the machine was switched on, this one included.
    pub generation: u32,
    /// What becomes of a process whose crash procedure fails.
    pub failed_procedure: FailedProcedure,
    /// What becomes of a process that has executed other text than its program's.
    pub integrity: Integrity,
    /// Where the block devices are that swap areas are on.
    pub block_devices: swap::BlockDevices,
    /// Where the caller keeps files of its own: what the disk has there is newer than what the dead kernel knew.
    pub own_places: Vec<std::path::PathBuf>,
    /// What of file systems in memory is not made again, unless PID 1 comes back.
    pub leave_out: Vec<std::path::PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(60),
            process_deadline: Duration::from_secs(10),
            whole_machine: false,
            fallback: Vec::new(),
            generation: 1,
            failed_procedure: FailedProcedure::default(),
            integrity: Integrity::default(),
            block_devices: swap::BlockDevices::new(),
            own_places: Vec::new(),
            leave_out: Vec::new(),
        }
    }
}

/// Where the resurrection has come to.
#[derive(Clone, Debug)]
pub enum Step<'a> {
    /// The open files of all processes are open, the page cache's news on disk.
    FilesReopened,
    /// Processes with the right PIDs exist, without their memory.
    Skeletons {
        #[allow(missing_docs)]
        count: usize,
    },
    /// Their memory has its contents.
    Poured {
        #[allow(missing_docs)]
        bytes: u64,
    },
    /// One process is complete, stopped and not yet checked.
    Rebuilt {
        #[allow(missing_docs)]
        pid: Pid,
        #[allow(missing_docs)]
        comm: &'a Bytes,
    },
    /// One process, running or (zombies) back.
    Back {
        #[allow(missing_docs)]
        pid: Pid,
        #[allow(missing_docs)]
        comm: &'a Bytes,
    },
    /// One process that was to come back and does not.
    Lost {
        #[allow(missing_docs)]
        pid: Pid,
        #[allow(missing_docs)]
        comm: &'a Bytes,
        /// For people.
        why: &'a str,
    },
    /// All that come back are running, or wait in vfork(2) for one that is.
    Released,
}

impl Step<'_> {
    /// Name in the timeline; steps of single processes have none.
    fn name(&self) -> Option<&'static str> {
        match self {
            Self::FilesReopened => Some("files-reopened"),
            Self::Skeletons { .. } => Some("skeletons"),
            Self::Poured { .. } => Some("poured"),
            Self::Released => Some("released"),
            Self::Rebuilt { .. } | Self::Back { .. } | Self::Lost { .. } => None,
        }
    }
}

/// Is told how it goes, while it goes.
pub trait Progress {
    /// A step has been taken.
    fn step(&mut self, step: Step<'_>);
}

/// Nobody listens.
impl Progress for () {
    fn step(&mut self, _: Step<'_>) {}
}

/// What became of everybody.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// One for each process of the snapshot, in its order.
    pub outcomes: Vec<Outcome>,
    /// Since the call, when each step was reached.
    pub timeline: Vec<Reached>,
    /// Bytes of memory copied into processes.
    pub poured_bytes: u64,
    /// Bytes read from swap areas.
    #[serde(default)]
    pub swapped_bytes: u64,
    /// Time that the copying took.
    pub pour_time: Duration,
    /// What was written to disk file systems because it was in the dead kernel's memory only.
    #[serde(default)]
    pub write_back: WriteBack,
    /// Files that were brought up to date from the dead page cache.
    pub files_written: Vec<FileWritten>,
    /// Files of which the disk has an older state than the dead kernel had, or none.
    #[serde(default)]
    pub files_stale: Vec<FileStale>,
    /// Names on disk file systems that the disk did not have, or had for something else.
    #[serde(default)]
    pub names_put: u64,
    /// Names that the disk had and that were no more.
    #[serde(default)]
    pub names_removed: u64,
    /// Files of file systems in memory, and mount points of automounters, that are not there again.
    #[serde(default)]
    pub places_lost: Vec<FileStale>,
    /// Pools of huge pages that are smaller than they were.
    #[serde(default)]
    pub pools_short: Vec<FileStale>,
    /// Swap areas that are not in use again.
    #[serde(default)]
    pub swap_off: Vec<FileStale>,
    /// What was noticed only here, where there is a disk.
    #[serde(default)]
    pub findings: Vec<Finding>,
}

/// An amount of file contents, and how long it took.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct WriteBack {
    #[allow(missing_docs)]
    pub bytes: u64,
    /// Microseconds, names and attributes included.
    pub us: u64,
}

/// One entry of the timeline.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reached {
    /// Name of the step: `files-reopened`, `skeletons`, `poured`, `released`.
    pub step: String,
    #[allow(missing_docs)]
    pub after: Duration,
}

/// A file that had news in the dead page cache.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileWritten {
    #[allow(missing_docs)]
    pub path: Bytes,
    /// Bytes written.
    pub bytes: u64,
    /// The disk did not have it at all.
    pub created: bool,
}

/// A file that could not be brought up to date.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileStale {
    #[allow(missing_docs)]
    pub path: Bytes,
    /// For people.
    pub why: String,
}

/// What became of a process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    #[allow(missing_docs)]
    pub pid: Pid,
    /// Its parent's PID.
    pub ppid: Pid,
    #[allow(missing_docs)]
    pub comm: Bytes,
    #[allow(missing_docs)]
    pub fate: Fate,
}

/// See [`Outcome`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum Fate {
    /// It runs again (or, a zombie, waits again).
    Resumed {
        /// What is different for it.
        losses: Vec<Reason>,
    },
    /// Its crash procedure had its program begin anew, or executed one.
    Restarted {
        /// What its procedure was told of as different, and what the procedure did.
        losses: Vec<Reason>,
    },
    /// Its crash procedure ended it.
    Ended {
        /// As of [`Fate::Restarted`].
        losses: Vec<Reason>,
    },
    /// It was found before that it cannot come back faithfully.
    GaveUp {
        #[allow(missing_docs)]
        reasons: Vec<Reason>,
    },
    /// The configuration did not ask for it.
    NotSelected {
        #[allow(missing_docs)]
        why: String,
    },
    /// Its rebuilding failed, and what there was of it was removed before it ran.
    Failed {
        /// Where.
        step: String,
        #[allow(missing_docs)]
        reason: String,
    },
}

/// Why nothing could be resurrected at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program that calls has what its children must not inherit.
    #[error("the calling program is not fit for it: {0}")]
    Caller(String),
    /// A system call that everything depends on.
    #[error("{what}: {source}")]
    System {
        #[allow(missing_docs)]
        what: &'static str,
        #[allow(missing_docs)]
        source: std::io::Error,
    },
}

fn system<E: Into<std::io::Error>>(what: &'static str) -> impl Fn(E) -> Error {
    move |e| Error::System { what, source: e.into() }
}

/// Brings back all processes whose decision is to continue.
///
/// `rescued`: what has been read of file systems that have been written to since; of the others it is read here.
///
/// When it returns, those that came back are running and nothing of the others exists. `Err` means that none came back. The snapshot
/// gets the address spaces from which interrupted execve(2) calls are issued again; it is not for a second try.
pub fn resurrect(
    snapshot: &mut Snapshot,
    mem: &dyn PhysMem,
    mut rescued: block::Rescued,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<Report, Error> {
    verify_caller()?;
    let maps = sys::read_proc("/proc/self/maps").map_err(system("read /proc/self/maps"))?;
    let maps =
        memory::parse_maps(&maps).ok_or_else(|| Error::Caller("its memory map cannot be read".into()))?;
    let specials = Specials::of(&maps);
    exec::insert_stand_ins(snapshot, &specials);
    let mem = swap::Memory::open(mem, snapshot, &options.block_devices);
    rescued.add(snapshot, std::path::Path::new("/"));
    let mem = block::Memory::new(mem, rescued);
    let snapshot = &*snapshot;
    let mut run = Run {
        snapshot,
        options,
        progress,
        start: Instant::now(),
        deadline: Deadline::after(options.deadline),
        alarm: Alarm::new().map_err(system("set up the alarm"))?,
        report: Report::default(),
        fates: BTreeMap::new(),
        losses: BTreeMap::new(),
    };
    run.all(mem, &maps, &specials)
}

/// rseq and further threads of the caller would be inherited as pointers into memory that is about to go.
fn verify_caller() -> Result<(), Error> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(system("read /proc"))?.count();
    if threads != 1 {
        return Err(Error::Caller(format!("it has {threads} threads")));
    }
    if sys::has_rseq() {
        return Err(Error::Caller(
            "it has registered rseq (start it with GLIBC_TUNABLES=glibc.pthread.rseq=0)".into(),
        ));
    }
    if nix::unistd::getpid().as_raw() == 1 {
        return Err(Error::Caller("it is PID 1".into()));
    }
    Ok(())
}

/// One resurrection.
struct Run<'a> {
    snapshot: &'a Snapshot,
    options: &'a Options,
    progress: &'a mut dyn Progress,
    start: Instant,
    deadline: Deadline,
    alarm: Alarm,
    report: Report,
    /// Of those that do not come back.
    fates: BTreeMap<Pid, Fate>,
    /// Of those that do.
    losses: BTreeMap<Pid, Vec<Reason>>,
}

impl<'a> Run<'a> {
    fn all(
        &mut self,
        mem: block::Memory<swap::Memory<'_>>,
        maps: &[memory::MapsLine],
        specials: &Specials,
    ) -> Result<Report, Error> {
        let vdso = specials.vdso().ok_or_else(|| Error::Caller("it has no vDSO".into()))?;
        let syscall_offset = memory::syscall_instruction(vdso)
            .ok_or_else(|| Error::Caller("the vDSO has no system call".into()))?;

        // Plan.
        let mut wanted = self.select();
        let first = self.look_at_first(&mut wanted, syscall_offset);
        self.raise_last_pid(&wanted)?;
        self.refuse_occupied(&mut wanted);
        self.refuse_memory(&mut wanted, specials, vdso);
        let of_first = first.iter().flat_map(First::taken);
        let scratch = self.find_scratch(&wanted, maps, of_first.collect())?;

        // Files and shared memory.
        self.refuse_high_descriptors(&mut wanted);
        let base = Files::lowest_own(self.snapshot, &self.processes(&wanted))
            .map_err(system("raise the limit on descriptors"))?;
        let prepared = self.prepare_places(&mut wanted, &mem, base);
        let processes = self.processes(&wanted);
        let mut files = Files::open(self.snapshot, &processes, &mem, base, prepared);
        self.refuse_files(&mut wanted, &files);
        self.compare_text(&mut wanted, &files, &mem);
        self.report.files_written = files.written(self.snapshot);
        self.report.files_stale.extend(files.stale(self.snapshot));
        let mut reverse = ReverseMap::default();
        let shared =
            shared_memory::Objects::make(self.snapshot, &self.processes(&wanted), files.base, &mut reverse);
        let ipc = match wanted.is_empty() {
            true => ipc::Objects::default(),
            false => ipc::Objects::make(self.snapshot, &mut reverse),
        };
        self.refuse_shared_memory(&mut wanted, &shared, &ipc);
        self.step(Step::FilesReopened);

        // Clock, skeletons.
        let clocks_go_on =
            clock::enter_time_namespace(&self.snapshot.clocks).map_err(system("enter a time namespace"))?;
        files.start_timers(self.snapshot, &clocks_go_on);
        let time_namespace = match first {
            Some(_) => Some(clock::namespace(files.base).map_err(system("open the time namespace"))?),
            None => None,
        };
        self.refuse_files(&mut wanted, &files);
        self.note_file_losses(&wanted, &files);
        let plan = self.plan(&mut wanted)?;
        let own = Own::read().map_err(system("read our own properties"))?;
        scratch.map().map_err(system("map the scratch area"))?;
        // Of the dump nothing is mapped in those that are forked from here (MADV_DONTFORK).
        let stays = |line: &&memory::MapsLine| line.path.as_bytes() != DUMP;
        let taken: Vec<(u64, u64)> =
            maps.iter().filter(stays).map(|l| (l.start, l.end)).chain([scratch.reserved()]).collect();
        let copy_on_write = copy_on_write::Plan::new(self.snapshot, &plan, &mem, &taken)
            .map_err(system("share memory with the processes"))?;
        let deadline = self.deadline.or_after(self.options.process_deadline + copy_on_write.patience());
        self.alarm.set(deadline);
        let states = skeleton::create(self.snapshot, &plan, &mut files, (&copy_on_write, &mem), deadline);
        scratch.unmap();
        let states = states.map_err(system("create processes"))?;
        self.sort_out_skeletons(&mut wanted, &plan, &states, &files);
        let epoll_calls = self.watch(&wanted, &files);
        self.step(Step::Skeletons { count: wanted.len() });

        // Memory.
        let common = Common {
            snapshot: self.snapshot,
            files: &files,
            epoll_calls: &epoll_calls,
            shared: &shared.descriptors(),
            specials,
            scratch,
            syscall_offset,
            own,
            copy_on_write: &copy_on_write,
            clocks_go_on,
            time_namespace: time_namespace.as_ref().map(AsRawFd::as_raw_fd),
            first: first.as_ref().filter(|_| wanted.contains(&first::PID)),
            fallback: first::arguments(&self.options.fallback),
        };
        self.report.poured_bytes = copy_on_write.bytes();
        let mut builds = self.map_memory(&wanted, &plan, &common);
        self.pour(&mem, reverse, &shared, &ipc, &mut builds);
        self.report.swapped_bytes = mem.inner.bytes();
        self.report.swap_off = mem.inner.switch_on(self.snapshot);

        // The rest.
        leave_files_to_the_last(&mut builds);
        self.each(&mut builds, |build, common, deadline| build.finish(common, deadline), &common, true);
        for (id, errno) in files.seal(self.snapshot) {
            let text = format!("a memory file that it uses has not got its seals again: {errno}");
            for build in builds.iter_mut().filter(|b| file::uses_inode(self.snapshot, b.process, id)) {
                build.losses.push(Reason::new("memfd", text.clone()));
            }
        }
        self.take_locks(&mut builds, &files);
        for (id, errno) in files.set_owners(self.snapshot) {
            for build in &mut builds {
                if build.process.descriptors.iter().any(|d| d.file == id) {
                    let text =
                        format!("the owner of one of its open files cannot be set ({errno}): no SIGIO");
                    build.losses.push(Reason::new("file-owner", text));
                }
            }
        }
        let zombies = self.check(&mut builds, &common, &plan, &wanted);
        self.each(&mut builds, |build, common, _| build.shorten_timeouts(common), &common, false);
        wanted.retain(|pid| !self.fates.contains_key(pid));
        self.note_lost_company(&wanted, &plan);
        // Ends of pipes must not seem open because we have them.
        drop(files);
        drop(time_namespace);
        drop(shared);
        // Segments that were to go with the last who is attached must not find us.
        drop(ipc);
        self.release(builds, zombies);
        cgroup::freeze_all(self.snapshot);
        Ok(self.conclude())
    }

    /// PID 1 as it is now, if it is to come back and can.
    fn look_at_first(&mut self, wanted: &mut BTreeSet<Pid>, syscall_offset: u64) -> Option<First> {
        if !wanted.contains(&first::PID) {
            return None;
        }
        let looked = match self.options.whole_machine {
            true => First::look(syscall_offset),
            false => Err("only the whole machine comes back with its PID 1".into()),
        };
        match looked {
            Ok(first) => Some(first),
            Err(why) => {
                self.give_up(wanted, first::PID, vec![Reason::new("first-process", why)]);
                None
            }
        }
    }

    /// What must be there before files are opened: control groups, the contents of file systems in memory, automounters' mount points,
    /// what the disk does not have yet, namespaces. Descriptors are `base` or higher.
    fn prepare_places(&mut self, wanted: &mut BTreeSet<Pid>, mem: &dyn PhysMem, base: i32) -> Prepared {
        let processes = self.processes(wanted);
        if processes.is_empty() {
            let (inodes, _) = self.write_back(mem, base);
            return Prepared { inodes, ..Prepared::default() };
        }
        for (group, why) in cgroup::make_all(self.snapshot, &processes) {
            for p in processes.iter().filter(|p| p.cgroup.as_path().starts_with(group.as_path())) {
                let text = format!("its control group {group} is not as it was: {why}");
                self.losses.entry(p.pid).or_default().push(Reason::new("cgroup", text));
            }
        }
        let with_system = wanted.contains(&first::PID);
        self.report.pools_short = hugetlb::fill_pools(self.snapshot, &processes);
        let leave_out = if with_system { &[][..] } else { &self.options.leave_out };
        self.report.places_lost = tmpfs::fill_all(self.snapshot, leave_out, mem);
        let (pipes, failed) = autofs::mount_all(self.snapshot, &processes, mem, base);
        self.report.places_lost.extend(failed);
        // Before the namespaces: what is mounted there may be mounted on directories that the disk does not have yet.
        let (inodes, held) = self.write_back(mem, base);
        let namespaces = Namespaces::make(self.snapshot, &processes, mem, base);
        for p in processes {
            match namespaces.failure(p) {
                Some(why) => self.give_up(wanted, p.pid, vec![Reason::new("namespace", why)]),
                None => self.losses.entry(p.pid).or_default().extend(namespaces.losses(p)),
            }
        }
        Prepared { inodes, held, namespaces, pipes, with_dead: self.options.whole_machine }
    }

    /// What the disk does not have yet; what it has of files that have lost their names.
    fn write_back(&mut self, mem: &dyn PhysMem, base: i32) -> (file::WrittenBack, file::Held) {
        let start = Instant::now();
        let names::Reconciled { inodes, held, stale, put, removed } =
            file::write_back(self.snapshot, mem, base, &self.options.own_places);
        let bytes = inodes.values().flatten().map(|restored| restored.written).sum();
        self.report.write_back = WriteBack { bytes, us: start.elapsed().as_micros() as u64 };
        self.report.files_stale.extend(stale);
        (self.report.names_put, self.report.names_removed) = (put, removed);
        (inodes, held)
    }

    /// Locks of open files that their processes have not taken themselves.
    fn take_locks(&mut self, builds: &mut Vec<Build<'a>>, files: &Files) {
        for (id, errno) in lock::take_rest(self.snapshot, files) {
            let has_it = |build: &Build<'_>| file::needed(self.snapshot, build.process).any(|(f, _)| f == id);
            let (losers, kept): (Vec<_>, Vec<_>) = builds.drain(..).partition(has_it);
            *builds = kept;
            for build in losers {
                let reason = format!("one of its open files cannot be locked: {errno}");
                self.abandon(build, Failure { step: "file locks", reason });
            }
        }
    }

    fn step(&mut self, step: Step<'_>) {
        if let Some(name) = step.name() {
            self.report.timeline.push(Reached { step: name.into(), after: self.start.elapsed() });
        }
        self.progress.step(step);
    }

    /// A deadline for one step, with the alarm set to it.
    fn process_deadline(&self) -> Deadline {
        let deadline = self.deadline.or_after(self.options.process_deadline);
        self.alarm.set(deadline);
        deadline
    }

    fn give_up(&mut self, wanted: &mut BTreeSet<Pid>, pid: Pid, reasons: Vec<Reason>) {
        wanted.remove(&pid);
        let why = reasons.first().map(|r| r.text.clone()).unwrap_or_default();
        self.fates.insert(pid, Fate::GaveUp { reasons });
        self.tell_lost(pid, &why);
    }

    fn fail(&mut self, pid: Pid, failure: Failure) {
        let why = format!("{}: {}", failure.step, failure.reason);
        self.fates.insert(pid, Fate::Failed { step: failure.step.into(), reason: failure.reason });
        self.tell_lost(pid, &why);
    }

    fn tell_lost(&mut self, pid: Pid, why: &str) {
        if let Some(p) = self.snapshot.process(pid) {
            self.progress.step(Step::Lost { pid, comm: &p.comm, why });
        }
    }

    fn processes(&self, wanted: &BTreeSet<Pid>) -> Vec<&'a Process> {
        self.snapshot.processes.iter().filter(|p| wanted.contains(&p.pid)).collect()
    }

    /// Those that are to continue.
    fn select(&mut self) -> BTreeSet<Pid> {
        let mut wanted = BTreeSet::new();
        for p in &self.snapshot.processes {
            match &p.decision {
                Decision::Continue { losses } => {
                    wanted.insert(p.pid);
                    self.losses.insert(p.pid, losses.clone());
                }
                Decision::GiveUp { reasons } => {
                    self.fates.insert(p.pid, Fate::GaveUp { reasons: reasons.clone() });
                }
                Decision::NotSelected { why } => {
                    self.fates.insert(p.pid, Fate::NotSelected { why: why.clone() });
                }
                Decision::Undecided => {
                    self.fates.insert(p.pid, Fate::NotSelected { why: "it was not decided".into() });
                }
            }
        }
        wanted
    }

    /// The kernel hands out PIDs upwards: what it makes from now on must not take one that is needed.
    fn raise_last_pid(&self, wanted: &BTreeSet<Pid>) -> Result<(), Error> {
        let ids = self.processes(wanted).into_iter().flat_map(plan::ids);
        let Some(highest) = ids.max() else { return Ok(()) };
        let path = "/proc/sys/kernel/ns_last_pid";
        let text = sys::read_proc(path).map_err(system("read ns_last_pid"))?;
        let last: Pid = String::from_utf8_lossy(&text).trim().parse().unwrap_or(0);
        if last < highest {
            sys::write_proc(path, &highest.to_string()).map_err(system("write ns_last_pid"))?;
        }
        Ok(())
    }

    fn refuse_occupied(&mut self, wanted: &mut BTreeSet<Pid>) {
        for p in self.processes(wanted) {
            let leaders = [p.sid, p.pgid].into_iter().filter(|id| *id > 0 && !wanted.contains(id));
            let own = plan::ids(p).filter(|id| *id != first::PID);
            let occupied = own.chain(leaders).find_map(|id| sys::occupant(id).map(|who| (id, who)));
            if let Some((id, who)) = occupied.filter(|(id, _)| !self.is_own_session_or_group(*id)) {
                let reason = Reason::new("pid-taken", format!("PID {id} is taken by {who}"));
                self.give_up(wanted, p.pid, vec![reason]);
            }
        }
    }

    fn is_own_session_or_group(&self, id: Pid) -> bool {
        let (session, group) = own_session_and_group();
        id == session || id == group
    }

    fn refuse_memory(&mut self, wanted: &mut BTreeSet<Pid>, specials: &Specials, vdso: &[u8]) {
        let same_vdso = self.snapshot.kernel.vdso == Some(snapshot::vdso_fingerprint(vdso));
        for p in self.processes(wanted) {
            if matches!(p.state, ProcessState::Zombie { .. }) {
                continue;
            }
            let mm = p.address_space.and_then(|id| self.snapshot.address_spaces.get(&id));
            let obstacle = match mm {
                None => Some(("memory", "its address space is not in the snapshot".to_owned())),
                Some(_) if !same_vdso => {
                    Some(("vdso", "this kernel's vDSO is another one than it was running with".to_owned()))
                }
                Some(mm) => memory::obstacle(mm, specials).map(|why| ("memory", why)),
            };
            let reasons = match obstacle {
                Some((code, why)) => vec![Reason::new(code, why)],
                None => snapshot::swapped_out_of_reach(self.snapshot, p),
            };
            if !reasons.is_empty() {
                self.give_up(wanted, p.pid, reasons);
            }
        }
    }

    fn find_scratch(
        &self,
        wanted: &BTreeSet<Pid>,
        own_maps: &[memory::MapsLine],
        of_first: Vec<(u64, u64)>,
    ) -> Result<Scratch, Error> {
        let mut taken: Vec<(u64, u64)> = own_maps.iter().map(|l| (l.start, l.end)).chain(of_first).collect();
        for p in self.processes(wanted) {
            let mm = p.address_space.and_then(|id| self.snapshot.address_spaces.get(&id));
            taken.extend(mm.into_iter().flat_map(|mm| &mm.vmas).map(|v| (v.start, v.end)));
        }
        let addr = memory::find_hole(Scratch::LEN + memory::PARKING, &mut taken)
            .ok_or_else(|| Error::Caller("no address is free in all processes".into()))?;
        Ok(Scratch { addr })
    }

    /// Descriptors of our own lie above everybody's: one process with a very high one would cost each a large table, or all their lives.
    fn refuse_high_descriptors(&mut self, wanted: &mut BTreeSet<Pid>) {
        for p in self.processes(wanted) {
            if let Some(d) = p.descriptors.iter().find(|d| d.fd >= MAX_DESCRIPTOR) {
                let text = format!("its descriptor {} is higher than {}", d.fd, MAX_DESCRIPTOR);
                self.give_up(wanted, p.pid, vec![Reason::new("descriptor", text)]);
            }
        }
    }

    fn refuse_files(&mut self, wanted: &mut BTreeSet<Pid>, files: &Files) {
        for p in self.processes(wanted) {
            let failures = files.failures(self.snapshot, p);
            if !failures.is_empty() {
                self.give_up(wanted, p.pid, failures);
            }
        }
    }

    /// Programs whose text in memory was not what their files have.
    fn compare_text(&mut self, wanted: &mut BTreeSet<Pid>, files: &Files, mem: &dyn PhysMem) {
        let processes = self.processes(wanted);
        let deadline = self.deadline.or_after(TEXT_PATIENCE);
        let differences = text::Differences::find(self.snapshot, &processes, files, mem, deadline);
        let find = |severity, pid, text: &str| Finding {
            kind: FindingKind::Text,
            ..Finding::new(severity, pid, "memory", text)
        };
        if differences.is_incomplete {
            let text = "not all program text has been compared with the disk: it takes too long";
            self.report.findings.push(find(Severity::Note, None, text));
        }
        for p in processes {
            let Some(why) = differences.of(self.snapshot, p) else { continue };
            let comes_back = snapshot::doubt(p, FindingKind::Text, self.options.integrity);
            let action = match (comes_back, p.crash_procedure.is_some()) {
                (false, _) => Action::GivenUp,
                (true, true) => Action::CrashProcedure,
                (true, false) => Action::Reported,
            };
            self.report.findings.push(Finding { action, ..find(Severity::Doubt, Some(p.pid), &why) });
            let reason = Reason::new("text", why);
            match comes_back {
                true => self.losses.entry(p.pid).or_default().push(reason),
                false => self.give_up(wanted, p.pid, vec![reason]),
            }
        }
    }

    fn note_file_losses(&mut self, wanted: &BTreeSet<Pid>, files: &Files) {
        for p in self.processes(wanted) {
            self.losses.entry(p.pid).or_default().extend(files.losses(self.snapshot, p));
        }
    }

    /// Lets epoll instances watch again.
    fn watch(&mut self, wanted: &BTreeSet<Pid>, files: &Files) -> BTreeMap<Pid, Vec<inject::Call>> {
        let processes = self.processes(wanted);
        let watched = epoll::watch(self.snapshot, &processes, files, self.process_deadline());
        for p in processes.into_iter().filter(|_| !watched.failed.is_empty()) {
            for d in &p.descriptors {
                for what in watched.failed.get(&d.file).into_iter().flatten() {
                    let text = format!("its epoll instance (descriptor {}) no longer watches: {what}", d.fd);
                    self.losses.entry(p.pid).or_default().push(Reason::new("epoll", text));
                }
            }
        }
        watched.calls
    }

    fn refuse_shared_memory(
        &mut self,
        wanted: &mut BTreeSet<Pid>,
        shared: &shared_memory::Objects,
        ipc: &ipc::Objects,
    ) {
        for p in self.processes(wanted) {
            if let Some(why) = shared.failure(self.snapshot, p).or_else(|| ipc.failure(self.snapshot, p)) {
                self.give_up(wanted, p.pid, vec![Reason::new("shared-memory", why)]);
            } else {
                self.losses.entry(p.pid).or_default().extend(ipc.losses(self.snapshot, p));
            }
        }
    }

    fn plan(&mut self, wanted: &mut BTreeSet<Pid>) -> Result<Plan, Error> {
        let (session, group) = own_session_and_group();
        // Each round gives up at least one process.
        for _ in 0..=wanted.len() {
            // PID 1 is there.
            let to_make = wanted.iter().copied().filter(|pid| *pid != first::PID).collect();
            match Plan::new(self.snapshot, &to_make, session, group) {
                Ok(plan) => return Ok(plan),
                Err(failures) => {
                    for (pid, reason) in failures {
                        self.give_up(wanted, pid, vec![reason]);
                    }
                }
            }
        }
        Err(Error::Caller("the processes cannot be put in an order".into()))
    }

    fn sort_out_skeletons(
        &mut self,
        wanted: &mut BTreeSet<Pid>,
        plan: &Plan,
        states: &BTreeMap<Pid, State>,
        files: &Files,
    ) {
        for p in self.processes(wanted).into_iter().filter(|p| p.pid != first::PID) {
            let state = states.get(&p.pid).unwrap_or(&State::Missing);
            let reason = match state {
                State::Ready => continue,
                // Files that were to be opened when it was there.
                State::Failed(why) => match files.failures(self.snapshot, p).first() {
                    Some(failure) => failure.text.clone(),
                    None => why.clone(),
                },
                State::Born => "it did not get ready in time".into(),
                State::Missing => {
                    let parent = plan.node(p.pid).and_then(|n| n.parent).and_then(|id| states.get(&id));
                    match parent {
                        Some(State::Failed(why)) => format!("its parent could not be made ({why})"),
                        _ => "it was not made in time".into(),
                    }
                }
            };
            if *state == State::Born {
                // SAFETY: a signal to a process that has told us that it is ours.
                unsafe { libc::kill(p.pid, libc::SIGKILL) };
            }
            wanted.remove(&p.pid);
            self.fail(p.pid, Failure { step: "skeleton", reason });
        }
    }

    /// Whom a process had to do with and who does not come back.
    fn note_lost_company(&mut self, wanted: &BTreeSet<Pid>, plan: &Plan) {
        let new_parent = nix::unistd::getppid().as_raw();
        let company = Company::new(self.snapshot, wanted);
        for p in self.processes(wanted) {
            let mut losses = pipe::lost_peers(&company, p);
            losses.extend(pty::lost_peers(&company, p));
            losses.extend(pidfd::lost_processes(&company, p));
            losses.extend(unix::lost_peers(&company, p));
            if !wanted.contains(&p.ppid) && p.ppid != new_parent {
                let text = format!(
                    "its parent, PID {}, does not come back: PID {new_parent} takes its place",
                    p.ppid
                );
                losses.push(Reason::new("parent", text));
            }
            let exited = |c: &Process| matches!(c.state, ProcessState::Exiting { .. });
            for child in company.children(p.pid).gone.into_iter().filter(|child| !exited(child)) {
                let text = format!("its child, PID {} ({}), does not come back", child.pid, child.comm);
                losses.push(Reason::new("child", text));
            }
            if p.ctty.is_some() && !wanted.contains(&p.sid) {
                let text = format!(
                    "it has no controlling terminal: the leader of its session, PID {}, does not come back",
                    p.sid
                );
                losses.push(Reason::new("controlling-terminal", text));
            }
            if let Some(other) =
                company.of_directory(p).back.first().filter(|_| !plan.share_fs(self.snapshot, p.fs.id))
            {
                let text = format!(
                    "its working directory and umask are no longer those of PID {} (CLONE_FS)",
                    other.pid
                );
                losses.push(Reason::new("shared-directory", text));
            }
            self.losses.entry(p.pid).or_default().extend(losses);
        }
    }

    fn map_memory(&mut self, wanted: &BTreeSet<Pid>, plan: &Plan, common: &Common<'_>) -> Vec<Build<'a>> {
        let mut builds = Vec::new();
        let is_zombie_of_first = |p: &&&Process| {
            p.ppid == first::PID && plan.node(p.pid).is_some_and(|n| matches!(n.role, Role::Zombie(_)))
        };
        let zombies: Vec<Pid> =
            self.processes(wanted).iter().filter(is_zombie_of_first).map(|p| p.pid).collect();
        for p in self.processes(wanted) {
            let mm = p.address_space.and_then(|id| self.snapshot.address_spaces.get(&id));
            let Some(mm) = mm.filter(|_| !matches!(p.state, ProcessState::Zombie { .. })) else { continue };
            let deadline = self.process_deadline();
            match Build::seize(p, mm, common, &zombies, deadline) {
                Ok(build) => builds.push(build),
                Err(failure) => {
                    if p.pid != first::PID {
                        process::abandon(p.pid, &[p.pid], deadline);
                    }
                    self.fail(p.pid, failure);
                }
            }
        }
        self.each(&mut builds, |build, common, deadline| build.map(common, deadline), common, false);
        builds
    }

    /// Does one step for all processes; those that fail go.
    fn each(
        &mut self,
        builds: &mut Vec<Build<'a>>,
        step: impl Fn(&mut Build<'a>, &Common<'_>, Deadline) -> Result<(), Failure>,
        common: &Common<'_>,
        completes: bool,
    ) {
        let mut kept = Vec::new();
        for mut build in builds.drain(..) {
            let deadline = self.process_deadline();
            match step(&mut build, common, deadline) {
                Ok(()) => {
                    if completes {
                        let p = build.process;
                        self.progress.step(Step::Rebuilt { pid: p.pid, comm: &p.comm });
                    }
                    kept.push(build);
                }
                Err(failure) => self.abandon(build, failure),
            }
        }
        *builds = kept;
    }

    fn abandon(&mut self, build: Build<'a>, failure: Failure) {
        let deadline = self.process_deadline();
        let (process, Failure { step, mut reason }) = (build.process, failure);
        if process.pid == first::PID {
            match build.give_back(&first::arguments(&self.options.fallback), deadline) {
                Ok(()) => {}
                Err(e) => reason.push_str(&format!("; and it cannot be given back: {e}")),
            }
        } else {
            process::abandon(process.pid, &build.traced(), deadline);
        }
        self.fail(process.pid, Failure { step, reason });
    }

    fn pour(
        &mut self,
        mem: &dyn PhysMem,
        mut reverse: ReverseMap,
        shared: &shared_memory::Objects,
        ipc: &ipc::Objects,
        builds: &mut Vec<Build<'a>>,
    ) {
        let start = Instant::now();
        let step = "pour memory";
        let mut owners: BTreeMap<Pid, Vec<OwnerId>> = BTreeMap::new();
        let mut claimed = Vec::new();
        for build in builds.drain(..) {
            match build.claim_pages(&mut reverse) {
                Ok(mut ids) => {
                    ids.extend(shared.owners(self.snapshot, build.process));
                    ids.extend(ipc.owners(self.snapshot, build.process));
                    owners.insert(build.process.pid, ids);
                    claimed.push(build);
                }
                Err(failure) => self.abandon(build, failure),
            }
        }
        // Blocks that have been poured could be given to the kernel here.
        let poured = reverse.pour(mem, &mut |_block| {});
        self.report.poured_bytes += poured.bytes;
        self.report.pour_time = start.elapsed();
        for build in claimed {
            let ids = owners.get(&build.process.pid).map_or(&[][..], Vec::as_slice);
            match ids.iter().find_map(|id| poured.failed.get(id)) {
                None => builds.push(build),
                Some(why) => {
                    let reason = why.clone();
                    self.abandon(build, Failure { step, reason });
                }
            }
        }
        self.step(Step::Poured { bytes: poured.bytes });
    }

    /// Compares everybody with the snapshot. Returns the zombies that passed.
    fn check(
        &mut self,
        builds: &mut Vec<Build<'a>>,
        common: &Common<'_>,
        plan: &Plan,
        wanted: &BTreeSet<Pid>,
    ) -> Vec<&'a Process> {
        let step = "check";
        let mut good = Vec::new();
        // Parents first: whose parent does not come back has another one.
        builds.sort_by_key(|build| plan.depth(build.process.pid));
        for build in builds.drain(..) {
            let p = build.process;
            let is_back = |pid: &Pid| !self.fates.contains_key(pid);
            let parent = plan.node(p.pid).and_then(|n| n.parent).filter(is_back);
            // The terminal comes with the session, and that with its leader.
            let has_ctty = wanted.contains(&p.sid) && is_back(&p.sid);
            let mut differences = build.differences(common, parent, has_ctty);
            let hung_up = |d: &&snapshot::Descriptor| common.files.is_hung_up(self.snapshot, d.file);
            if let Some(d) = p.descriptors.iter().find(hung_up) {
                differences.push(format!(
                    "the terminal of its descriptor {} was hung up: the leader of a session does not come back",
                    d.fd
                ));
            }
            if differences.is_empty() {
                good.push(build);
            } else {
                self.abandon(build, Failure { step, reason: differences.join("; ") });
            }
        }
        *builds = good;
        let mut zombies = Vec::new();
        for p in self.processes(wanted) {
            if !matches!(p.state, ProcessState::Zombie { .. }) || self.fates.contains_key(&p.pid) {
                continue;
            }
            if self.fates.contains_key(&p.ppid) {
                let why = format!("it had exited, and its parent, PID {}, does not come back", p.ppid);
                self.fates.insert(p.pid, Fate::NotSelected { why });
                continue;
            }
            let differences = check::zombie_differences(p);
            if differences.is_empty() {
                zombies.push(p);
            } else {
                self.fail(p.pid, Failure { step, reason: differences.join("; ") });
            }
        }
        zombies
    }

    fn release(&mut self, mut builds: Vec<Build<'a>>, zombies: Vec<&'a Process>) {
        let mut back = zombies;
        let mut families =
            vfork::Families::take_from(&mut builds, self.options.process_deadline, self.deadline);
        // Whoever stopped a process must find it stopped, not traced.
        builds.sort_by_key(|build| !matches!(build.process.state, ProcessState::Stopped { .. }));
        let has_procedure = |build: &Build<'_>| build.process.crash_procedure.is_some();
        let (with_procedure, builds): (Vec<_>, Vec<_>) = builds.into_iter().partition(has_procedure);
        let hurry = Hurry::begin();
        for build in builds {
            let released = build.release();
            if released.is_ok() && matches!(build.process.state, ProcessState::Stopped { .. }) {
                build.await_stop(self.process_deadline());
            }
            back.extend(self.note_release(build, released));
        }
        families.begin();
        drop(hurry);
        self.step(Step::Released);
        for p in back.drain(..) {
            self.progress.step(Step::Back { pid: p.pid, comm: &p.comm });
        }
        for (build, released) in families.await_all(&self.alarm) {
            back.extend(self.note_release(build, released));
        }
        back.extend(self.call_procedures(with_procedure));
        for p in back {
            self.progress.step(Step::Back { pid: p.pid, comm: &p.comm });
        }
    }

    /// Those who have a crash procedure go on as it says.
    fn call_procedures(&mut self, builds: Vec<Build<'a>>) -> Vec<&'a Process> {
        let mut with = Vec::new();
        for build in builds {
            if let Some(procedure) = &build.process.crash_procedure {
                with.push((build, procedure));
            }
        }
        let step = self.options.process_deadline;
        let procedures =
            crashproc::Procedures::begin(with, self.snapshot, self.options.generation, step, self.deadline);
        let mut back = Vec::new();
        for ended in procedures.await_all(&self.alarm) {
            let reason = crashproc::reason(&ended);
            let deadline = self.process_deadline();
            let goes_on = self.options.failed_procedure == FailedProcedure::Continue;
            let is_failed = matches!(ended.end, crashproc::End::Failed(_));
            let recovered = if is_failed && goes_on { Some(ended.recover(deadline)) } else { None };
            let crashproc::Ended { build, end, .. } = ended;
            let released = match &end {
                crashproc::End::Failed(_) if matches!(recovered, Some(Ok(()))) => build.release(),
                crashproc::End::Failed(_) => {
                    self.abandon(build, Failure { step: "crash procedure", reason: reason.text });
                    continue;
                }
                crashproc::End::Executed | crashproc::End::Exited => Ok(()),
                crashproc::End::Answered(crashproc::Answer::Continue) => build.release(),
                crashproc::End::Answered(crashproc::Answer::Exit) => crashproc::exit(&build),
                crashproc::End::Answered(crashproc::Answer::Restart) => {
                    let exe = build.mm.exe.and_then(|id| self.snapshot.files.get(&id));
                    let program = exe.map_or(&b"/proc/self/exe"[..], |file| file.path.as_bytes());
                    crashproc::restart(&build, program, deadline)
                }
            };
            let pid = build.process.pid;
            self.losses.entry(pid).or_default().push(reason);
            let lives = self.note_release(build, released);
            let mut losses = || self.losses.remove(&pid).unwrap_or_default();
            let fate = match end {
                _ if lives.is_none() => None,
                crashproc::End::Answered(crashproc::Answer::Restart) | crashproc::End::Executed => {
                    Some(Fate::Restarted { losses: losses() })
                }
                crashproc::End::Answered(crashproc::Answer::Exit) | crashproc::End::Exited => {
                    Some(Fate::Ended { losses: losses() })
                }
                crashproc::End::Answered(crashproc::Answer::Continue) | crashproc::End::Failed(_) => None,
            };
            self.fates.extend(fate.map(|fate| (pid, fate)));
            back.extend(lives);
        }
        back
    }

    fn note_release(
        &mut self,
        mut build: Build<'a>,
        released: Result<(), InjectError>,
    ) -> Option<&'a Process> {
        match released {
            Ok(()) => {
                self.losses.entry(build.process.pid).or_default().append(&mut build.losses);
                Some(build.process)
            }
            Err(e) => {
                self.abandon(build, Failure { step: "release", reason: e.to_string() });
                None
            }
        }
    }

    fn conclude(&mut self) -> Report {
        let mut report = std::mem::take(&mut self.report);
        let fate = |pid| match self.fates.remove(&pid) {
            Some(fate) => fate,
            None => Fate::Resumed { losses: self.losses.remove(&pid).unwrap_or_default() },
        };
        let mut fate = fate;
        report.outcomes = self
            .snapshot
            .processes
            .iter()
            .map(|p| Outcome { pid: p.pid, ppid: p.ppid, comm: p.comm.clone(), fate: fate(p.pid) })
            .collect();
        report
    }
}

/// Whoever is released runs, and there is one CPU: those who are released last would come late, and their timeouts with them.
struct Hurry {
    nice: Option<i32>,
}

impl Hurry {
    const NICE: i32 = -20;

    fn begin() -> Self {
        let nice = rustix::process::getpriority_process(None).ok();
        // Without it, it takes longer.
        Self { nice: nice.filter(|_| rustix::process::setpriority_process(None, Self::NICE).is_ok()) }
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        if let Some(nice) = self.nice {
            _ = rustix::process::setpriority_process(None, nice);
        }
    }
}

/// Of those who share a descriptor table the last one to be finished closes what is not theirs.
fn leave_files_to_the_last(builds: &mut [Build<'_>]) {
    let mut seen = BTreeSet::new();
    for build in builds.iter_mut().rev() {
        let table = build.process.files_id;
        build.leaves_files_open = table != 0 && !seen.insert(table);
    }
}

fn own_session_and_group() -> (Pid, Pid) {
    let session = nix::unistd::getsid(None).map_or(-1, nix::unistd::Pid::as_raw);
    (session, nix::unistd::getpgrp().as_raw())
}
