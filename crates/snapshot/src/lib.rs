//! The plain data between the reading half (`autopsy`) and the rebuilding half (`resurrect`).
//!
//! *In*: what `autopsy` found in the dead kernel, filled in field by field.
//! *Out*: the same data, with a [`Decision`] for every process once [`decide`] has run; serialisable as
//! JSON, so that it can be read by people, compared with `/proc` and replayed in tests.
//! *Never*: reads a kernel structure, makes a system call, or holds the contents of process memory. Contents
//! stay where they are; the snapshot names the page frames that hold them ([`PageRun`]) and whoever needs the
//! bytes asks a [`PhysMem`].
//!
//! Objects that several processes can share (open files, inodes, pipes, terminals) live once in a table of the
//! [`Snapshot`] under the address that the dead kernel knew them by: identity is the pointer.
//!
//! One file per kind of kernel object, with the same name as in `autopsy`, `resurrect` and `survivors`.

mod aio;
mod autofs;
mod bytes;
mod cgroup;
mod clock;
mod crashproc;
mod credentials;
mod decision;
mod device;
mod epoll;
mod eventfd;
mod file;
mod finding;
mod fs;
mod hugetlb;
mod inet;
mod inotify;
mod ipc;
mod kernel_text;
mod lock;
mod memory;
mod names;
mod namespace;
mod netlink;
mod panic;
mod physmem;
mod pidfd;
mod pipe;
mod proc;
mod process;
mod pty;
mod seccomp;
mod signal;
mod signalfd;
mod socket;
mod swap;
mod syscall;
mod thread;
mod timer;
mod timerfd;
mod tmpfs;
mod tty;
mod unix;
mod vt;

pub use aio::AioContext;
pub use autofs::Autofs;
pub use bytes::Bytes;
pub use cgroup::Cgroup;
pub use clock::Clocks;
/// A file that was changed so many seconds before the panic may be clean in memory and still unknown to the disk: its journal commits every 5 s by
/// default, but what it commits can wait for write-back before (vm.dirty_expire_centisecs: 30 s).
pub const RECENT_SECONDS: i64 = 120;

pub use crashproc::{CrashProcedure, FailedProcedure, WatchedLock};
pub use credentials::{Capabilities, Credentials};
pub use decision::{
    Decision, Integrity, LiveFpu, Mode, Policy, Reason, Selector, decide, doubt, swapped_out_of_reach,
};
pub use device::{Device, DeviceKind};
pub use epoll::{Epoll, EpollItem};
pub use eventfd::EventFd;
pub use file::{
    Descriptor, DoubtfulPage, Extent, FileId, FileKind, Inode, InodeId, MAX_DESCRIPTOR, OpenFile,
    PageCacheRun, Xattr,
};
pub use finding::{Action, Finding, FindingKind, Severity};
pub use fs::{FsContext, Mount, MountFlags, Timestamp};
pub use hugetlb::HugePages;
pub use inet::{InetProtocol, InetSocket, InetState};
pub use inotify::{Inotify, MAX_WATCH_DESCRIPTOR, Watch};
pub use ipc::{Ipc, IpcPerm, Message, MsgQueue, SemArray, SemUndo, ShmSegment};
pub use kernel_text::{KernelText, TEXT_LINE, TextPiece};
pub use lock::{Lock, LockKind, LockOwner};
pub use memory::{AddressSpace, AddressSpaceId, MmLayout, PageRun, Prot, Vma, VmaFlags, VmaKind};
pub use names::{DirectoryNames, DiskNames, Link, Name, NamedInode};
pub use namespace::{MountNamespace, NamespaceId, UtsNamespace};
pub use netlink::NetlinkSocket;
pub use panic::{Frame, Kernel, LogRecord, Panic, vdso_fingerprint};
pub use physmem::{PAGE_SIZE, PhysMap, PhysMem, PhysMemError, PhysRange, StableBytes};
pub use pidfd::PidFd;
pub use pipe::{Pipe, PipeBuffer, PipeEnd, PipeId};
pub use proc::{NamespaceFile, ProcFile};
pub use process::{Namespaces, Process, ProcessState, Rlimit};
pub use pty::Pty;
pub use seccomp::{Seccomp, SeccompFilter, SeccompFilterId};
pub use signal::{AltStack, PendingSignal, SigAction, SignalState};
pub use signalfd::SignalFd;
pub use socket::{ProtocolOption, SocketOptions};
pub use swap::{FIRST_BLOCK_FRAME, FIRST_SWAP_FRAME, SwapArea, SwapExtent, Zram, ZramSlot};
pub use syscall::{Exec, Resume, SyscallInFlight};
pub use thread::{Fpu, FpuSource, Registers, Rseq, Scheduling, Thread, ThreadState};
pub use timer::{IntervalTimer, MAX_TIMER_ID, PosixExpiry, PosixTimer, Timers, timer_of};
pub use timerfd::{TimerFd, TimerFdExpiry};
pub use tmpfs::{Tmpfs, TmpfsEntry, TmpfsKind};
pub use tty::{Termios, Tty, TtyId, WindowSize};
pub use unix::{
    UnixCredentials, UnixData, UnixDirectory, UnixId, UnixKind, UnixMessage, UnixPlace, UnixSocket, unix_name,
};
pub use vt::{VirtualConsole, VtMode};

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// A process or thread id, as the programs saw it (initial PID namespace).
pub type Pid = i32;

/// Version of the serialised form; raised whenever a reader of older snapshots would misunderstand a field.
pub const FORMAT: u32 = 2;

/// Everything that is known about the dead machine and needed to rebuild its processes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// [`FORMAT`] of the writer.
    pub format: u32,
    /// The kernel that died.
    pub kernel: Kernel,
    /// How it died.
    pub panic: Panic,
    /// The dead kernel's clocks at the moment of death.
    pub clocks: Clocks,
    /// Mount table of the dead machine's initial mount namespace, parents before children.
    pub mounts: Vec<Mount>,
    /// Mount namespaces other than the initial one.
    #[serde(default)]
    pub mount_namespaces: BTreeMap<NamespaceId, MountNamespace>,
    /// UTS namespaces other than the initial one.
    #[serde(default)]
    pub uts_namespaces: BTreeMap<NamespaceId, UtsNamespace>,
    /// What was in file systems that are in memory only.
    #[serde(default)]
    pub tmpfs: Vec<Tmpfs>,
    /// Mount points of automounters.
    #[serde(default)]
    pub autofs: Vec<Autofs>,
    /// Pools of huge pages.
    #[serde(default)]
    pub huge_pages: Vec<HugePages>,
    /// Swap areas in use.
    #[serde(default)]
    pub swap_areas: Vec<SwapArea>,
    /// Control groups (v2), parents before children.
    #[serde(default)]
    pub cgroups: Vec<Cgroup>,
    /// User processes (thread groups), by ascending PID. Kernel threads are not listed.
    pub processes: Vec<Process>,
    /// Address spaces, shared by the processes that name them.
    pub address_spaces: BTreeMap<AddressSpaceId, AddressSpace>,
    /// Open file descriptions (`struct file`).
    pub files: BTreeMap<FileId, OpenFile>,
    /// Those that cannot be rebuilt and, as was decided, become dead ones: they answer with errors and the end of the file.
    #[serde(default)]
    pub dead_files: BTreeSet<FileId>,
    /// Inodes behind the files and mappings, with what the page cache held of them.
    pub inodes: BTreeMap<InodeId, Inode>,
    /// Regular files with a name, open or not, of which the disk may not have the last state.
    #[serde(default)]
    pub unwritten: Vec<InodeId>,
    /// Names that the disks may not know.
    #[serde(default)]
    pub names: Vec<DiskNames>,
    /// Filters for system calls.
    #[serde(default)]
    pub seccomp_filters: BTreeMap<SeccompFilterId, SeccompFilter>,
    /// Pipes and FIFOs.
    pub pipes: BTreeMap<PipeId, Pipe>,
    /// File locks and leases, those of processes and open files that do not come back among them.
    #[serde(default)]
    pub locks: Vec<Lock>,
    /// Terminals.
    pub ttys: BTreeMap<TtyId, Tty>,
    /// System V shared memory, semaphores and message queues.
    #[serde(default)]
    pub ipc: Ipc,
    /// Unix sockets.
    #[serde(default)]
    pub unix_sockets: BTreeMap<UnixId, UnixSocket>,
    /// What was noticed on the way: doubts, losses, damage.
    pub findings: Vec<Finding>,
}

impl Snapshot {
    /// The process with this PID.
    pub fn process(&self, pid: Pid) -> Option<&Process> {
        self.processes.iter().find(|p| p.pid == pid)
    }

    /// The System V shared memory segment with this identifier.
    pub fn shm_segment(&self, id: i32) -> Option<&ShmSegment> {
        self.ipc.shm.iter().find(|s| s.perm.id == id)
    }

    /// The open files that an open file keeps or refers to besides the descriptors of processes: what is on its way through a
    /// socket, what an epoll instance watches.
    pub fn held_by(&self, file: FileId) -> Vec<FileId> {
        match self.files.get(&file).map(|f| &f.kind) {
            Some(FileKind::Epoll(epoll)) => epoll.items.iter().map(|item| item.file).collect(),
            Some(FileKind::Unix { socket }) => self.held_by_unix(*socket),
            Some(_) | None => Vec::new(),
        }
    }

    /// What is on its way to a socket, and through connections to it that nobody has accepted yet.
    fn held_by_unix(&self, socket: UnixId) -> Vec<FileId> {
        let Some(own) = self.unix_sockets.get(&socket) else { return Vec::new() };
        let waiting = own.waiting.iter().filter_map(|id| self.unix_sockets.get(id));
        let messages = waiting.chain([own]).flat_map(|socket| &socket.queue);
        messages.flat_map(|message| message.files.iter().copied()).collect()
    }
}
