//! From a dead kernel's memory to a [`Snapshot`].
//!
//! **In:** a [`ktypes::Kernel`]: the dead machine's memory with names and layouts.
//!
//! **Out:** a [`Snapshot`]: the processes that were running and everything they consist of, how each thread goes on,
//! the kernel log, the panic. What could not be read, or contradicts itself, is a [`snapshot::Finding`].
//!
//! **Never:** changes anything, makes a system call beyond reading the core, believes a pointer or a length before it
//! has been checked, or lets one damaged object take others with it: a broken process costs that process.
//!
//! [`autopsy`] does everything. [`Autopsy`] does parts, for tools that want just one and for cores where other parts are
//! damaged.
//!
//! One file per kind of kernel object, with the same name as in `snapshot` and `resurrect`. Each declares the kernel
//! structures that it walks and says where they live in the kernel's sources. Known to work on Linux 6.1 and 6.12 (x86-64).

mod aio;
mod autofs;
mod cgroup;
mod check;
mod clock;
mod crashproc;
mod credentials;
mod epoll;
mod error;
mod eventfd;
mod extent;
mod file;
mod fpu;
mod fs;
#[cfg(fuzzing)]
mod fuzz;
pub mod ground_truth;
mod hugetlb;
mod inet;
mod inode;
mod inotify;
mod instruction;
mod ipc;
mod kernel_pages;
mod lock;
mod memfd;
mod memory;
mod module;
mod names;
mod namespace;
mod netlink;
mod panic;
mod pidfd;
mod pipe;
mod proc;
mod process;
mod pty;
mod raw;
mod saver;
mod seccomp;
mod signal;
mod signalfd;
mod slab;
mod socket;
mod swap;
pub mod syscall;
#[cfg(test)]
mod testing;
mod thread;
mod timer;
mod timerfd;
mod tmpfs;
mod tty;
mod unix;
mod vt;
mod writeback;
mod xattr;
mod xfs;
mod zram;

pub use error::{Error, Result};
pub use fs::NamespaceMounts;
#[cfg(fuzzing)]
pub use fuzz::WALKERS;
pub use module::Module;
pub use process::{ProcessSummary, TaskSummary};
pub use slab::SlabCache;
pub use socket::{SocketHolder, SocketSummary};
pub use syscall::name as syscall_name;
pub use thread::{ThreadStack, ThreadSummary};

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};

use ktypes::Kernel;
use snapshot::{
    AddressSpace, AddressSpaceId, Clocks, FileId, Finding, Inode, InodeId, Lock, Mount, MountNamespace,
    NamespaceId, OpenFile, Pid, Pipe, PipeId, SeccompFilter, SeccompFilterId, Severity, Snapshot, Tty, TtyId,
    UnixId, UnixSocket, UtsNamespace,
};

/// Findings of one severity about one process: nobody reads more, and each can be a line on the console.
const MAX_FINDINGS: usize = 1000;

/// Reads everything.
///
/// # Errors
/// Only when nothing can be said about the processes at all: without a task list and without a PID table. Everything
/// else becomes a finding of the snapshot.
pub fn autopsy(kernel: &Kernel) -> Result<Snapshot> {
    Autopsy::new(kernel).snapshot()
}

/// The texts of the findings, by process, severity and kind.
type Texts = BTreeMap<(Option<Pid>, Severity, snapshot::FindingKind), BTreeSet<String>>;
/// What was read once for many who ask for it, or why it could not be.
pub(crate) type OrWhyNot<T> = Result<T, String>;

/// A dead kernel under examination: what was learned so far, so that shared objects are read once.
pub struct Autopsy<'k> {
    pub(crate) kernel: &'k Kernel,
    findings: RefCell<Vec<Finding>>,
    found: RefCell<Texts>,
    /// The process that is being read: findings are about it.
    subject: Cell<Option<Pid>>,
    pub(crate) files: RefCell<BTreeMap<FileId, OpenFile>>,
    pub(crate) inodes: RefCell<BTreeMap<InodeId, Inode>>,
    pub(crate) pipes: RefCell<BTreeMap<PipeId, Pipe>>,
    pub(crate) locks: RefCell<BTreeMap<InodeId, Vec<Lock>>>,
    pub(crate) ttys: RefCell<BTreeMap<TtyId, Tty>>,
    pub(crate) unix_sockets: RefCell<BTreeMap<UnixId, UnixSocket>>,
    pub(crate) seccomp_filters: RefCell<BTreeMap<SeccompFilterId, SeccompFilter>>,
    /// Open files that other open files hold, still to be read.
    pub(crate) held: RefCell<Vec<u64>>,
    pub(crate) address_spaces: RefCell<BTreeMap<AddressSpaceId, AddressSpace>>,
    pub(crate) paths: RefCell<HashMap<(u64, u64), fs::FullPath>>,
    pub(crate) mount_namespaces: RefCell<BTreeMap<NamespaceId, MountNamespace>>,
    pub(crate) uts_namespaces: RefCell<BTreeMap<NamespaceId, UtsNamespace>>,
    pub(crate) mount_ids: RefCell<BTreeMap<FileId, i32>>,
    pub(crate) mount_table: OnceCell<Vec<Mount>>,
    /// How many epoll instances are being read, one within the other.
    pub(crate) epoll_depth: Cell<u32>,
    pub(crate) frames: OnceCell<memory::Frames<'k>>,
    pub(crate) swap: OnceCell<swap::Swap>,
    pub(crate) in_flight: OnceCell<memory::fault::InFlight>,
    pub(crate) page_table_changers: OnceCell<Vec<(u64, check::Doing)>>,
    pub(crate) cpus: OnceCell<thread::Cpus>,
    pub(crate) stacks: OnceCell<Option<thread::StackLayout>>,
    pub(crate) unwinder: OnceCell<Option<panic::orc::Unwinder<'k>>>,
    pub(crate) xstate: OnceCell<Option<fpu::XstateLayout>>,
    pub(crate) saver: OnceCell<Option<saver::Saver>>,
    pub(crate) timers: OnceCell<syscall::Timers>,
    /// Page caches of block devices, by the address of these.
    block_pages: RefCell<BTreeMap<u64, OrWhyNot<extent::BlockPages>>>,
    /// Addresses of what is in the buffers of XFS, by place on the disk; by allocation group.
    xfs_buffers: RefCell<BTreeMap<u64, OrWhyNot<BTreeMap<u64, u64>>>>,
    pub(crate) known_tasks: OnceCell<Vec<syscall::KnownTask>>,
    pub(crate) now: OnceCell<Clocks>,
    pub(crate) caches: check::Caches,
    pub(crate) page_layout: OnceCell<Option<check::page::Layout>>,
    /// Anonymous pages of each address space that were found, in memory and in swap; `None` if that cannot be known.
    pub(crate) own_pages: RefCell<HashMap<AddressSpaceId, Option<u64>>>,
    /// What was noticed about address spaces while they were read, for all who use them.
    pub(crate) memory_doubts: RefCell<BTreeMap<AddressSpaceId, check::Doubts>>,
}

impl<'k> Autopsy<'k> {
    /// Begins; nothing is read yet.
    pub fn new(kernel: &'k Kernel) -> Self {
        Autopsy {
            kernel,
            findings: RefCell::default(),
            found: RefCell::default(),
            subject: Cell::new(None),
            files: RefCell::default(),
            inodes: RefCell::default(),
            pipes: RefCell::default(),
            locks: RefCell::default(),
            ttys: RefCell::default(),
            unix_sockets: RefCell::default(),
            seccomp_filters: RefCell::default(),
            held: RefCell::default(),
            address_spaces: RefCell::default(),
            paths: RefCell::default(),
            mount_namespaces: RefCell::default(),
            uts_namespaces: RefCell::default(),
            mount_ids: RefCell::default(),
            mount_table: OnceCell::new(),
            epoll_depth: Cell::new(0),
            frames: OnceCell::new(),
            swap: OnceCell::new(),
            in_flight: OnceCell::new(),
            page_table_changers: OnceCell::new(),
            cpus: OnceCell::new(),
            stacks: OnceCell::new(),
            unwinder: OnceCell::new(),
            xstate: OnceCell::new(),
            saver: OnceCell::new(),
            timers: OnceCell::new(),
            block_pages: RefCell::default(),
            xfs_buffers: RefCell::default(),
            known_tasks: OnceCell::new(),
            now: OnceCell::new(),
            caches: check::Caches::default(),
            page_layout: OnceCell::new(),
            own_pages: RefCell::default(),
            memory_doubts: RefCell::default(),
        }
    }

    /// Everything, as a snapshot.
    ///
    /// # Errors
    /// See [`autopsy`](crate::autopsy).
    pub fn snapshot(self) -> Result<Snapshot> {
        self.take_snapshot()
    }

    /// Everything that is in the tables moves into the snapshot.
    pub(crate) fn take_snapshot(&self) -> Result<Snapshot> {
        let kernel = self.kernel_facts();
        let panic = self.panic_report();
        let clocks = *self.now();
        let mounts = self.mounts().unwrap_or_else(|error| {
            self.find(Severity::Broken, "fs", format!("the mount table cannot be read: {error}"));
            Vec::new()
        });
        let processes = self.processes()?;
        self.set_subject(None);
        let ipc = self.ipc();
        let autofs = self.autofs(&mounts);
        let cgroups = self.cgroups();
        let mount_namespaces = self.mount_namespaces.take();
        let everywhere: Vec<&Mount> =
            mounts.iter().chain(mount_namespaces.values().flat_map(|ns| &ns.mounts)).collect();
        let tmpfs = self.tmpfs(&everywhere);
        let (unwritten, names) = self.unwritten_files(&mounts, clocks.realtime_ns / 1_000_000_000);
        if self.kernel.memory().is_exhausted() {
            let text = "the dead kernel's structures lead round and round: reading them was broken off, and what is missing may be anything";
            self.find(Severity::Broken, "process", text);
        }
        Ok(Snapshot {
            format: snapshot::FORMAT,
            kernel,
            panic,
            clocks,
            mounts,
            mount_namespaces,
            uts_namespaces: self.uts_namespaces.take(),
            tmpfs,
            autofs,
            huge_pages: self.huge_pages(),
            swap_areas: self.swap_areas(),
            cgroups,
            processes,
            address_spaces: self.address_spaces.take(),
            files: self.files.take(),
            dead_files: BTreeSet::new(),
            inodes: self.inodes.take(),
            unwritten,
            names,
            pipes: self.pipes.take(),
            locks: self.locks.take().into_values().flatten().collect(),
            ttys: self.ttys.take(),
            ipc,
            unix_sockets: self.unix_sockets.take(),
            seccomp_filters: self.seccomp_filters.take(),
            findings: self.findings.take(),
        })
    }

    /// What was noticed so far.
    pub fn findings(&self) -> Vec<Finding> {
        self.findings.borrow().clone()
    }

    /// Notes something about the process that is being read, or about the machine.
    pub(crate) fn find(&self, severity: Severity, object: &str, text: impl Into<String>) {
        self.note(Finding::new(severity, self.subject.get(), object, text));
    }

    fn note(&self, mut finding: Finding) {
        let mut found = self.found.borrow_mut();
        let known = found.entry((finding.pid, finding.severity, finding.kind)).or_default();
        if known.len() == MAX_FINDINGS {
            finding.text = "there is more like that".to_owned();
        }
        // The same object can be met on several ways.
        if known.len() <= MAX_FINDINGS && known.insert(finding.text.clone()) {
            self.findings.borrow_mut().push(finding);
        }
    }

    /// Says whose state is being read from now on; returns whose it was.
    pub(crate) fn set_subject(&self, pid: Option<Pid>) -> Option<Pid> {
        self.subject.replace(pid)
    }

    /// The nodes of a circular list, without the head; an error if it is damaged or longer than `max`.
    pub(crate) fn list(&self, head: u64, max: usize) -> Result<Vec<u64>> {
        self.kernel.list_head(head, max).map(|node| node.map_err(Error::from)).collect()
    }

    /// A value of the kernel's own enums; documented values serve where BTF lacks the enum.
    pub(crate) fn enumerator(&self, name: &str, documented: u64) -> u64 {
        self.kernel.enum_value(name).map_or(documented, |value| value as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_said_once_and_not_without_end() {
        let kernel = testing::open(&synth::Synth::new());
        let autopsy = Autopsy::new(&kernel);
        for n in 0..3 * MAX_FINDINGS {
            autopsy.find(Severity::Note, "file", format!("number {}", n / 2));
        }
        autopsy.set_subject(Some(7));
        autopsy.find(Severity::Note, "file", "number 1");
        let findings = autopsy.findings();
        assert_eq!(findings.len(), MAX_FINDINGS + 2);
        assert_eq!(findings[MAX_FINDINGS].text, "there is more like that");
        assert_eq!(findings[MAX_FINDINGS + 1].pid, Some(7));
    }
}
