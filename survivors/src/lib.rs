//! Small programs that must survive a kernel panic, one per kind of kernel state.
//!
//! *In*: a machine that is going to crash. *Out*: per program one line that says whether its state was the same in
//! the kernel that came after. *Never*: signals, helpers or knowledge from outside; a survivor notices the crash alone,
//! and decides alone.
//!
//! # A survivor's life
//!
//! `survivors run NAME --out FILE`
//!
//! 1. It makes itself independent of who started it: own session, standard descriptors on `/dev/null`, every other
//!    inherited descriptor closed, `/` as working directory, no blocked signals.
//! 2. *Set up*: it builds its state, files in the directory `FILE.d/`.
//! 3. *Ready*: it writes `ready NAME PID` to `FILE.ready` (created under another name, then renamed: who sees the file
//!    sees it whole). From here on the machine may crash at any moment.
//! 4. *Wait*: it looks at `/proc/sys/kernel/random/boot_id` between short sleeps (computing ones: rarely). As long as it is
//!    unchanged, nothing has happened. A changed one means that it lives in another kernel.
//! 5. *Check and verdict*: it appends one line to FILE, `pass NAME` or `fail NAME: reason`, syncs it to disk and ends with
//!    exit code 0 or 1. A set-up that did not work is `fail NAME: set-up: …` and exit code 2, at any time.
//!
//! A survivor that was given up leaves no line. So FILE holds the whole truth: one line, or nothing.
//!
//! Options of `run`: `--damage` makes the survivor damage its own state just before checking (to see that it is able to
//! fail); `--cpu N` pins it; `--period MS` is the length of the sleeps that are measured; `--tty PATH` the serial line;
//! `--boot-id PATH` another file in the place of the boot id, with which the tests play the crash.
//! `survivors start --dir DIR [NAME…]` starts several (all, without names) in the background, waits until they are
//! ready, and leaves their files in DIR as `NAME`, `NAME.ready` and `NAME.d/`. `survivors list` prints the table.
//!
//! # Adding one
//!
//! One function `fn(&mut Stage) -> Result<()>` in the file of its kind (the kinds are those of `autopsy`, `snapshot` and
//! `resurrect`), and one line in [`TABLE`]. It sets up, calls [`Stage::crash`], damages if told to, and
//! checks; an error is the verdict `fail`. The test `every_survivor_passes_and_can_fail` then covers it.

mod aio;
mod await_signal;
mod cgroup;
mod child;
mod clock;
pub mod crashproc;
mod credentials;
mod crowd;
mod device;
mod edge;
mod epoll;
mod eventfd;
mod file;
mod fpu;
mod fs;
mod hugetlb;
mod inet;
mod inotify;
mod ipc;
mod lock;
mod map;
mod memfd;
mod memory;
pub mod names;
mod namespace;
mod netlink;
mod pidfd;
mod pipe;
mod prng;
mod proc;
mod process;
mod procfs;
mod pty;
mod rlimit;
mod run;
mod seccomp;
mod signal;
mod signalfd;
mod stage;
mod swap;
mod syscall;
mod thread;
mod timer;
mod timerfd;
mod tmpfs;
mod tty;
mod unix;
mod vt;

pub use crowd::Crowd;
pub use run::{Paths, run};
pub use stage::{Options, Stage};

/// What is to become of a survivor in a resurrection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It goes on, and passes.
    Survives,
    /// It is given up by name, with a reason that contains this text, and leaves no line.
    GivenUp(&'static str),
}

/// What a survivor asks of the machine beyond a file system and `/proc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// To be started as root.
    Root,
    /// A CPU with AVX2 (and XSAVE).
    Avx2,
    /// A serial line that nobody else uses (`--tty`).
    Tty,
    /// Virtual consoles.
    Console,
    /// A swap area.
    Swap,
    /// A second kernel that calls crash procedures.
    CrashKernel,
    /// Huge pages that are set aside, and to be started as root.
    HugePages,
    /// The disk for itself, which it keeps busy: it runs only where it is named.
    Alone,
}

/// One survivor.
#[derive(Clone, Copy)]
pub struct Survivor {
    /// Its name: the kind, and what about it.
    pub name: &'static str,
    /// Kind of kernel state, as the files in `autopsy`, `snapshot` and `resurrect` are called.
    pub kind: &'static str,
    /// What its survival shows.
    pub shows: &'static str,
    /// What is to become of it.
    pub expect: Expect,
    /// What it asks for.
    pub needs: Needs,
    /// Set-up, wait and check.
    pub body: fn(&mut Stage) -> anyhow::Result<()>,
}

impl Survivor {
    /// Whether it takes a CPU for itself, and never stands still.
    pub fn is_computing(&self) -> bool {
        self.name == "fpu-loop" || self.kind == "edge"
    }
}

/// Looks a survivor up by name.
pub fn find(name: &str) -> Option<&'static Survivor> {
    TABLE.iter().find(|survivor| survivor.name == name)
}

macro_rules! table {
    ($($name:literal $kind:ident::$body:ident $expect:expr, $needs:ident, $shows:literal;)*) => {
        /// All survivors.
        pub const TABLE: &[Survivor] = &[$(Survivor {
            name: $name,
            kind: stringify!($kind),
            shows: $shows,
            expect: $expect,
            needs: Needs::$needs,
            body: $kind::$body,
        }),*];
    };
}

use Expect::{GivenUp, Survives};

table! {
    "memory-small" memory::small Survives, Nothing, "64 MiB of random 4 KiB pages";
    "memory-huge" memory::huge Survives, Nothing, "64 MiB of random huge pages (MADV_HUGEPAGE)";
    "memory-fork" memory::fork Survives, Nothing, "pages shared copy-on-write with a child, some written by either";
    "memory-fork-family" memory::fork_family Survives, Nothing, "16 MiB shared copy-on-write by five processes and a grandchild take the memory of one";
    "memory-shared-anonymous" memory::shared_anonymous Survives, Nothing, "anonymous memory shared with a child stays shared";
    "memory-file-private" memory::file_private Survives, Nothing, "private file mapping: pages written to and pages of the file";
    "memory-file-shared" memory::file_shared Survives, Nothing, "shared file mapping: what was stored reaches the file";
    "memory-protection" memory::protection Survives, Nothing, "PROT_NONE and read-only pages: contents, and no access";
    "memory-reservation" memory::reservation Survives, Nothing, "8 TiB of PROT_NONE with an island in it";
    "memory-lock-all" memory::lock_all Survives, Root, "mlockall, also for what comes later";
    "memory-truncated" memory::truncated Survives, Nothing, "a shared mapping of a file that was truncated";
    "memory-growsdown" memory::growsdown Survives, Nothing, "MAP_GROWSDOWN mapping still grows";
    "memory-advice" memory::advice Survives, Nothing, "madvise flags and mlock";
    "memory-brk" memory::brk Survives, Nothing, "heap that was grown by brk, and grows on";
    "memory-layout" memory::layout Survives, Nothing, "cmdline, environ, exe, auxv and the mm fields in /proc/self/stat";
    "names-files" names::cases Survives, Root, "names, contents and attributes that the disk had not heard of";
    "names-large" names::large Survives, Alone, "ten thousand new files, and a new one of 1 GiB";
    "names-random" names::random Survives, Alone, "random operations on files go on, and all they have led to is there";
    "fpu-sleep" fpu::sleep Survives, Avx2, "x87, SSE, AVX registers and MXCSR across a sleep";
    "fpu-loop" fpu::compute_loop Survives, Avx2, "all YMM registers in a loop that never enters the kernel";
    "edge-calls" edge::calls Survives, Nothing, "all general registers in a loop of system calls, each of which is made once";
    "edge-faults" edge::faults Survives, Nothing, "all general registers in a loop of page faults";
    "thread-tls" thread::tls Survives, Nothing, "threads with their TIDs, TLS, names and signal masks";
    "thread-mutex" thread::mutex Survives, Nothing, "a mutex held and waited for, a condition variable waited on";
    "thread-robust" thread::robust Survives, Nothing, "robust mutex: the next owner learns that the owner died";
    "thread-join" thread::join Survives, Nothing, "pthread_join of a thread that exits later (clear_child_tid)";
    "thread-rseq" thread::rseq Survives, Nothing, "rseq registration, and a thread caught in a critical section";
    "signal-handlers" signal::handlers Survives, Nothing, "dispositions, flags and masks; a handler runs";
    "signal-pending" signal::pending Survives, Nothing, "pending standard and queued real-time signals with values";
    "signal-thread" signal::thread_directed Survives, Nothing, "a signal pending for one thread stays that thread's";
    "signal-altstack" signal::altstack Survives, Nothing, "a handler runs on the alternate stack";
    "rlimit-all" rlimit::all Survives, Nothing, "soft and hard resource limits";
    "credentials-ids" credentials::ids Survives, Root, "real, effective, saved and fs ids; supplementary groups";
    "credentials-capabilities" credentials::capabilities Survives, Root, "dropped, bounding, inheritable and ambient capabilities";
    "credentials-no-new-privs" credentials::no_new_privs Survives, Nothing, "no_new_privs";
    "fs-context" fs::context Survives, Nothing, "umask and working directory";
    "fs-shared" fs::shared Survives, Nothing, "working directory and umask of a process and its child (CLONE_FS)";
    "fs-root" fs::root Survives, Root, "root directory after chroot";
    "file-offset" file::offset Survives, Nothing, "position and mode of open files; O_PATH";
    "file-uncommitted" file::uncommitted Survives, Nothing, "data in blocks that the file system's journal does not tell of yet";
    "file-append" file::append Survives, Nothing, "O_APPEND";
    "file-shared-offset" file::shared_offset Survives, Nothing, "dup and fork share one position, open does not";
    "file-cloexec" file::cloexec Survives, Nothing, "descriptor numbers and FD_CLOEXEC";
    "file-unsynced" file::unsynced Survives, Nothing, "1 MiB appended and never synced";
    "file-new" file::new Survives, Nothing, "a file that the disk has never seen";
    "file-truncated" file::truncated Survives, Nothing, "a synced file rewritten shorter, never synced";
    "file-directory" file::directory Survives, Nothing, "an open directory, half read";
    "file-devices" file::devices Survives, Nothing, "/dev/null, zero, full and urandom";
    "file-redirected" file::redirected Survives, Nothing, "standard input, output and error on files";
    "file-deleted" file::deleted Survives, Nothing, "an open file without a name";
    "file-deleted-synced" file::deleted_synced Survives, Nothing, "an open file whose name the disk still has";
    "file-deleted-mapped" file::deleted_mapped Survives, Nothing, "a mapped file without a name, and another one in its place";
    "memfd-content" memfd::content Survives, Nothing, "memory file: contents, hole, size, name, two open files of one object";
    "memfd-seals" memfd::seals Survives, Nothing, "seals of memory files";
    "memfd-mapped" memfd::mapped Survives, Nothing, "a memory file mapped by parent and child";
    "memfd-posix-shm" memfd::posix Survives, Nothing, "POSIX shared memory after shm_unlink, mapped by two";
    "ipc-shm" ipc::shm Survives, Nothing, "System V shared memory: key, owner, attached by two, by nobody";
    "ipc-shm-removed" ipc::shm_removed Survives, Nothing, "a removed segment, unmapped and protected in part";
    "ipc-sem" ipc::sem Survives, Nothing, "System V semaphores: values, SEM_UNDO, a process that waits";
    "ipc-msg" ipc::msg Survives, Nothing, "System V messages: order, types, a receiver that waits";
    "file-owner-thread" file::owner_thread Survives, Nothing, "O_ASYNC with a thread as owner and a signal of its own";
    "file-shared-table" file::shared_table Survives, Nothing, "a descriptor table of a process, its child and grandchild (CLONE_FILES)";
    "lock-flock" lock::whole Survives, Nothing, "flock: held, also by a duplicate, and released by the last close";
    "lock-posix" lock::records Survives, Nothing, "record locks of two processes on one file";
    "lock-ofd" lock::description Survives, Nothing, "record locks of an open file description";
    "lock-waiter" lock::record_waiter Survives, Nothing, "a child blocked in F_SETLKW gets the lock when it is released";
    "lock-flock-waiter" lock::whole_waiter Survives, Nothing, "a child blocked in flock gets the lock when it is released";
    "lock-lease" lock::lease Survives, Nothing, "a lease, and the signal when somebody opens the file";
    "pidfd-child" pidfd::child Survives, Nothing, "a child's exit is seen through a pidfd, and waited for";
    "pidfd-zombie" pidfd::zombie Survives, Nothing, "pidfds of a zombie, and of a process that is gone";
    "pidfd-send-signal" pidfd::send_signal Survives, Nothing, "a signal to the parent through an inherited pidfd";
    "inotify-watch" inotify::watch Survives, Nothing, "events in a directory and of a file, with their watch descriptors";
    "inotify-forgotten" inotify::forgotten Survives, Root, "the same when the kernel has forgotten the names of both";
    "inotify-numbers" inotify::numbers Survives, Nothing, "watch descriptors with gaps between them, and the next one";
    "inotify-unread" inotify::unread Survives, Nothing, "unread events are there or told to be lost";
    "inotify-blocked" inotify::blocked Survives, Nothing, "a reader that is blocked on an inotify instance";
    "tmpfs-tree" tmpfs::tree Survives, Nothing, "files in memory that nobody has open: a tree with links, modes, times";
    "namespace-mount" namespace::mounts Survives, Root, "a mount namespace with a tmpfs, a read-only directory, its ways of passing mounts on";
    "namespace-socket" namespace::socket Survives, Root, "a socket whose name is in a mount namespace of its own, with a connection that waits";
    "namespace-uts" namespace::uts Survives, Root, "host and domain name of one's own";
    "cgroup-settings" cgroup::settings Survives, Root, "control groups with limits and enabled controllers";
    "device-kmsg" device::kmsg Survives, Root, "the kernel's log, open for reading and writing";
    "proc-file" proc::file Survives, Nothing, "open files and a directory of /proc, about itself, a child and the machine";
    "proc-ended" proc::ended Survives, Nothing, "open files of /proc about a process that has ended";
    "proc-mountinfo" proc::mountinfo Survives, Root, "changes of the mount table are told to who polls it";
    "proc-sysfs" proc::sysfs Survives, Nothing, "an attribute and a directory of /sys, and a namespace";
    "pipe-content" pipe::content Survives, Nothing, "bytes in a pipe, half read; its capacity";
    "pipe-packet" pipe::packet Survives, Nothing, "packet mode keeps the borders";
    "pipe-reader" pipe::reader Survives, Nothing, "a reader that is blocked on an empty pipe";
    "pipe-writer" pipe::writer Survives, Nothing, "a writer that is blocked in the middle of 1 MiB";
    "pipe-closed" pipe::closed Survives, Nothing, "end of file and EPIPE where the other end is gone";
    "pipe-fifo" pipe::fifo Survives, Nothing, "a FIFO with bytes in it";
    "tty-serial" tty::serial Survives, Tty, "controlling terminal: termios, session, foreground group";
    "process-wait" process::wait Survives, Nothing, "a parent blocked in wait4 gets the exit code";
    "process-zombie" process::zombie Survives, Nothing, "zombies keep their exit status";
    "process-exec" process::exec Survives, Nothing, "processes that execute one program after the other";
    "process-exits" process::exits Survives, Nothing, "children that are forked, exit and are waited for, one after the other";
    "process-tree" process::tree Survives, Nothing, "three generations know their parents";
    "process-group" process::group Survives, Nothing, "process groups, and a signal to one";
    "process-session" process::session Survives, Nothing, "sessions";
    "process-stopped" process::stopped Survives, Nothing, "a stopped job stays stopped until SIGCONT";
    "process-vfork" process::vfork Survives, Nothing, "a parent in vfork sees what the child wrote before it executed a program";
    "process-vfork-exit" process::vfork_exit Survives, Nothing, "a parent in vfork has the memory that the child mapped before it exited";
    "process-attributes" process::attributes Survives, Nothing, "nice, affinity, oom_score_adj, timer slack, subreaper, pdeathsig, dumpable, THP, name, personality";
    "clock-monotonic" clock::monotonic Survives, Nothing, "CLOCK_MONOTONIC and BOOTTIME never go back";
    "clock-vdso" clock::vdso Survives, Nothing, "clock_gettime through the vDSO agrees with the system call";
    "aio-contexts" aio::contexts Survives, Nothing, "contexts of asynchronous I/O, with events that were not taken";
    "aio-waiter" aio::waiter Survives, Nothing, "a thread that waits in io_getevents";
    "crashproc-continue" crashproc::goes_on Survives, CrashKernel, "a crash procedure is told what there is to know, and every thread goes on";
    "crashproc-restart" crashproc::restarts Survives, CrashKernel, "a crash procedure has its program begin anew";
    "crashproc-execute" crashproc::executes Survives, CrashKernel, "a crash procedure executes another program";
    "crashproc-threads-run" crashproc::others_run Survives, CrashKernel, "a crash procedure while the other threads run";
    "crashproc-exit" crashproc::exits Survives, CrashKernel, "a crash procedure ends its process";
    "crashproc-crash" crashproc::crashes Survives, CrashKernel, "a crash procedure that crashes costs nobody else anything";
    "crashproc-forever" crashproc::never_returns Survives, CrashKernel, "a crash procedure that does not return is given up";
    "hugetlb-private" hugetlb::private Survives, HugePages, "private memory in huge pages, shared copy-on-write with a child; read-only";
    "hugetlb-shared" hugetlb::shared Survives, HugePages, "shared memory and a memfd in huge pages";
    "hugetlb-unmapped" hugetlb::unmapped Survives, HugePages, "a System V segment and a file of a hugetlbfs that nobody has mapped";
    "swap-private" swap::private Survives, Swap, "swapped-out memory: in a swap area, in memory again as well, zeroes";
    "swap-fork" swap::fork Survives, Swap, "swapped-out pages that a process and its child share";
    "swap-shared" swap::shared Survives, Swap, "swapped-out pages of shared memory, a memfd and a file on a tmpfs";
    "swap-file-private" swap::file_private Survives, Swap, "swapped-out pages of a private file mapping, some of them zero";
    "swap-everything" swap::everything Survives, Swap, "heap and stack of a process that waits";
    "syscall-epoll-wait" syscall::epoll_wait Survives, Root, "epoll_wait of a dynamically linked program waits the rest";
    "syscall-sigtimedwait-shared" syscall::sigtimedwait_shared Survives, Root, "rt_sigtimedwait of a dynamically linked program waits the rest";
    "syscall-nanosleep" syscall::nanosleep Survives, Nothing, "nanosleep sleeps the rest";
    "syscall-clock-nanosleep" syscall::clock_nanosleep Survives, Nothing, "clock_nanosleep sleeps the rest";
    "syscall-clock-nanosleep-absolute" syscall::clock_nanosleep_absolute Survives, Nothing, "clock_nanosleep wakes at its time";
    "syscall-poll" syscall::poll Survives, Nothing, "poll times out right";
    "syscall-ppoll" syscall::ppoll Survives, Nothing, "ppoll times out right";
    "syscall-select" syscall::select Survives, Nothing, "select times out right";
    "syscall-futex" syscall::futex Survives, Nothing, "futex wait times out right";
    "syscall-sigtimedwait" syscall::sigtimedwait Survives, Nothing, "sigtimedwait times out right";
    "inet-listen" inet::listen Survives, Nothing, "listening with TCP: somebody can connect";
    "inet-listen-v6" inet::listen_v6 Survives, Nothing, "listening with IPv6 and IPv4 at one port";
    "inet-accept" inet::accept Survives, Nothing, "a process blocked in accept";
    "inet-reuse-port" inet::reuse_port Survives, Nothing, "two UDP sockets at one port; a TCP socket that is bound and does not listen";
    "inet-udp" inet::udp Survives, Nothing, "UDP sockets, connected and not; a reader that is blocked";
    "inet-options" inet::options Survives, Nothing, "options of sockets, IP, IPv6 and TCP, and who inherits them";
    "inet-over" inet::over Survives, Nothing, "a TCP socket whose connection was reset";
    "inet-established" inet::established GivenUp("TCP connection from 127.0.0.1"), Nothing, "a TCP connection";
    "netlink-route" netlink::route Survives, Nothing, "a netlink socket: port, groups, options; the kernel answers";
    "netlink-waiter" netlink::waiter Survives, Root, "a process blocked on a netlink socket; a filter";
    "epoll-pipe" epoll::pipe Survives, Nothing, "an epoll that watches a pipe";
    "epoll-edge" epoll::edge Survives, Nothing, "edges that were reported, and such that were not";
    "epoll-oneshot" epoll::oneshot Survives, Nothing, "one-shot items that have fired, and such that have not";
    "epoll-nested" epoll::nested Survives, Nothing, "an epoll that watches another one; an event that waits";
    "epoll-closed-number" epoll::closed_number Survives, Nothing, "an item whose descriptor number is closed";
    "epoll-shared" epoll::shared Survives, Nothing, "one epoll in parent and child";
    "epoll-waiter" epoll::waiter Survives, Nothing, "a process blocked in epoll_wait";
    "epoll-kinds" epoll::kinds Survives, Nothing, "a timer, a counter and a signal descriptor under watch";
    "eventfd-counter" eventfd::counter Survives, Nothing, "counts of eventfds";
    "eventfd-semaphore" eventfd::semaphore Survives, Nothing, "an eventfd that is a semaphore";
    "eventfd-blocked" eventfd::blocked Survives, Nothing, "a process blocked in read on an eventfd";
    "timer-real" timer::real Survives, Nothing, "ITIMER_REAL, once and then periodic";
    "timer-alarm" timer::alarm Survives, Nothing, "alarm";
    "timer-cpu" timer::cpu Survives, Nothing, "ITIMER_VIRTUAL and ITIMER_PROF";
    "timer-posix" timer::posix Survives, Nothing, "POSIX timers: numbers with gaps, clocks, values, time left";
    "timer-posix-thread" timer::posix_thread Survives, Nothing, "a POSIX timer that signals a thread";
    "timer-posix-pending" timer::posix_pending Survives, Nothing, "POSIX timers whose signals are pending; overruns";
    "timer-posix-cpu" timer::posix_cpu Survives, Nothing, "POSIX timers of CPU time";
    "timerfd-running" timerfd::running Survives, Nothing, "timerfds of three clocks, relative and absolute";
    "timerfd-unread" timerfd::unread Survives, Nothing, "timerfds with expirations that nobody has read";
    "timerfd-stopped" timerfd::stopped Survives, Nothing, "timerfds that do not run";
    "signalfd-mask" signalfd::mask Survives, Nothing, "signalfds and a pending signal";
    "signalfd-waiter" signalfd::waiter Survives, Nothing, "a process that polls a signalfd";
    "unix-pair" unix::pair Survives, Nothing, "a pair of Unix sockets with bytes in it";
    "unix-queue" unix::queue Survives, Nothing, "many bytes both ways between Unix sockets, half read";
    "unix-datagrams" unix::datagrams Survives, Nothing, "datagrams of several senders: their borders and the senders' names";
    "unix-seqpacket" unix::seqpacket Survives, Nothing, "records keep their borders";
    "unix-abstract" unix::abstract_name Survives, Nothing, "listening under an abstract name: somebody can connect";
    "unix-path" unix::path Survives, Nothing, "listening under a path: its mode, and somebody can connect";
    "unix-backlog" unix::backlog Survives, Nothing, "connections not accepted yet, with bytes in them";
    "unix-files" unix::files Survives, Nothing, "open files on their way through sockets";
    "unix-credentials" unix::credentials Survives, Root, "who is at the other end, and who sent a message (SO_PEERCRED, SCM_CREDENTIALS)";
    "unix-reader" unix::reader Survives, Nothing, "a reader that is blocked on a Unix socket";
    "unix-writer" unix::writer Survives, Nothing, "a writer that is blocked in the middle of 1 MiB";
    "unix-sender" unix::sender Survives, Nothing, "a sender that is blocked on a full queue of datagrams";
    "unix-shutdown" unix::shutdown Survives, Nothing, "closed, half closed and reset connections";
    "unix-server" unix::server Survives, Nothing, "a server and its client, requests and answers on their way";
    "unix-connect" unix::connect Survives, Nothing, "a client blocked on a full queue of connections, and a server blocked in accept";
    "unix-lost-peer" unix::lost_peer Survives, Nothing, "the other end of a connection does not come back: end of file, EPIPE, ECONNREFUSED";
    "unix-options" unix::options Survives, Nothing, "socket options and file flags of Unix sockets";
    "unix-out-of-band" unix::out_of_band GivenUp("out-of-band"), Nothing, "an out-of-band byte";
    "pty-pair" pty::pair Survives, Nothing, "a pseudo-terminal, both ends: name, owner, settings, size, output on its way";
    "pty-lines" pty::lines Survives, Nothing, "typed lines, an end of file and a part of a line that nobody has read";
    "pty-unread" pty::unread Survives, Nothing, "much output and raw input that nobody has read";
    "pty-reader" pty::reader Survives, Nothing, "a process blocked in read on a pseudo-terminal";
    "pty-session" pty::session Survives, Nothing, "a session on a pseudo-terminal: foreground group, /dev/tty, the interrupt key";
    "pty-masters" pty::masters Survives, Nothing, "packet mode; masters without a slave";
    "pty-hung-up" pty::hung_up Survives, Nothing, "a terminal whose master is gone";
    "vt-console" vt::console Survives, Console, "a virtual console: screen, cursor, colours, modes, settings";
    "seccomp-filter" seccomp::filter Survives, Nothing, "seccomp filters, and a child that has inherited them and added one";
    "seccomp-threads" seccomp::threads Survives, Nothing, "threads with different seccomp filters";
    "seccomp-strict" seccomp::strict Survives, Nothing, "a child in seccomp's strict mode, blocked in read";
}
