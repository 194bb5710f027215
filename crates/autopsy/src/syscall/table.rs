//! Every system call of x86-64, and what is to be done with one that was in flight.
//!
//! Numbers and names as in arch/x86/entry/syscalls/syscall_64.tbl up to Linux 6.12, without the numbers that only the x32
//! ABI has. This table is the authority: the deciders in the parent module carry out what a row's [`Class`] says.

/// One system call.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    #[allow(missing_docs)]
    pub nr: i64,
    /// As in `SYS_read`, without the prefix.
    pub name: &'static str,
    /// What is to be done with it.
    pub class: Class,
    /// Why, in a few words.
    pub why: &'static str,
}

/// Kinds of system calls by what an interruption by the kernel's death means for them.
///
/// Arguments are named by their position, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It is issued again: it had no effect yet, or the same effect again does no harm.
    Again,
    /// nanosleep, clock_nanosleep: issued again with the time left, unless the time was absolute.
    Sleep,
    /// poll: issued again with the time left.
    Poll,
    /// select and its kin: issued again after the timeout in the program's memory has been set to the time left.
    Select {
        /// The pointer to the timeout; NULL: none.
        timeout_arg: usize,
        /// `struct timeval` instead of `struct timespec`.
        timeval: bool,
    },
    /// futex: by its operation.
    Futex,
    /// epoll_wait and its kin: again if there is no timeout, else with the time left.
    EpollWait,
    /// Again if the pointer to the timeout is NULL, else with the time left.
    Shorten {
        /// The pointer to the timeout.
        timeout_arg: usize,
    },
    /// restart_syscall: what its restart block says.
    Restarted,
    /// Data between the program and a file: as far as it has come.
    Transfer(Transfer),
    /// sendmmsg, recvmmsg: several messages, of which some may be through.
    Batch,
    /// Data between two files, without the program's memory.
    Splice {
        /// The descriptor that is read.
        input: usize,
        /// The descriptor that is written.
        output: usize,
    },
    /// lseek.
    Seek,
    /// getdents: moves the position in a directory.
    ReadDirectory,
    /// close.
    Close,
    /// Waits for a child.
    Wait,
    /// Makes a descriptor.
    NewDescriptor,
    /// open, openat: makes a descriptor, and perhaps a file.
    Open {
        /// The flags.
        flags_arg: usize,
    },
    /// Makes, removes or changes a directory entry.
    Name,
    /// Makes a task.
    Clone,
    /// execve.
    Exec,
    /// Ends the thread or the process.
    Exit,
    /// mremap.
    Remap,
    /// There is no faithful way to go on.
    Impossible,
}

/// How a call hands over data. The descriptor is the first argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The program's data goes out.
    pub write: bool,
    /// How the buffers are given.
    pub shape: Shape,
    /// The kernel keeps a `struct kiocb` beside the iterator.
    pub kiocb: bool,
}

/// How a transfer's buffers are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Address and length, the second and third argument.
    Flat,
    /// Address and number of `struct iovec`s, the second and third argument.
    Vector,
    /// `struct msghdr`, the second argument.
    Message,
}

impl Transfer {
    const READ: Transfer = Transfer { write: false, shape: Shape::Flat, kiocb: true };
    const WRITE: Transfer = Transfer { write: true, shape: Shape::Flat, kiocb: true };

    const fn vector(self) -> Transfer {
        Transfer { shape: Shape::Vector, ..self }
    }

    const fn message(self) -> Transfer {
        Transfer { shape: Shape::Message, kiocb: false, ..self }
    }

    const fn without_kiocb(self) -> Transfer {
        Transfer { kiocb: false, ..self }
    }
}

/// The row of a number.
pub fn row_of(nr: i64) -> Option<&'static Row> {
    let index = TABLE.binary_search_by_key(&nr, |row| row.nr).ok()?;
    TABLE.get(index)
}

/// The name of a system call; `None` for numbers that are not assigned.
pub fn name(nr: i64) -> Option<&'static str> {
    row_of(nr).map(|row| row.name)
}

const fn row(nr: i64, name: &'static str, class: Class, why: &'static str) -> Row {
    Row { nr, name, class, why }
}

use Class::*;

/// All of them, by number.
#[rustfmt::skip]
pub const TABLE: &[Row] = &[
    row(0, "read", Transfer(Transfer::READ), "as far as its iterator has come"),
    row(1, "write", Transfer(Transfer::WRITE), "as far as its iterator has come"),
    row(2, "open", Open { flags_arg: 1 }, "a descriptor is put into the table last"),
    row(3, "close", Close, "the descriptor leaves the table first"),
    row(4, "stat", Again, "only reads state"),
    row(5, "fstat", Again, "only reads state"),
    row(6, "lstat", Again, "only reads state"),
    row(7, "poll", Poll, "the time left is in its timer"),
    row(8, "lseek", Seek, "SEEK_CUR moves on from where the first attempt left the position"),
    row(9, "mmap", Again, "a second mapping at worst, of which nobody knows; with MAP_FIXED the same place"),
    row(10, "mprotect", Again, "sets the same again"),
    row(11, "munmap", Again, "unmapping twice does no harm"),
    row(12, "brk", Again, "sets the end of the heap to an absolute address"),
    row(13, "rt_sigaction", Again, "sets the same again"),
    row(14, "rt_sigprocmask", Again, "sets the same again"),
    row(15, "rt_sigreturn", Again, "the signal frame is still on the stack: it is read again"),
    row(16, "ioctl", Again, "reads or sets state, or waits for a device to drain"),
    row(17, "pread64", Transfer(Transfer::READ), "as far as its iterator has come"),
    row(18, "pwrite64", Transfer(Transfer::WRITE), "as far as its iterator has come"),
    row(19, "readv", Transfer(Transfer::READ.vector()), "as far as its iterator has come"),
    row(20, "writev", Transfer(Transfer::WRITE.vector()), "as far as its iterator has come"),
    row(21, "access", Again, "only reads state"),
    row(22, "pipe", NewDescriptor, "a descriptor is put into the table last"),
    row(23, "select", Select { timeout_arg: 4, timeval: true }, "the kernel writes the time left into the argument when interrupted"),
    row(24, "sched_yield", Again, "a hint"),
    row(25, "mremap", Remap, "moving a mapping cannot be done twice"),
    row(26, "msync", Again, "the data is written before it returns, however often"),
    row(27, "mincore", Again, "only reads state"),
    row(28, "madvise", Again, "a hint"),
    row(29, "shmget", Again, "finds what the first attempt has made"),
    row(30, "shmat", Again, "a second mapping at worst, of which nobody knows; with MAP_FIXED the same place"),
    row(31, "shmctl", Again, "removing what has been removed is answered with an error as after a race"),
    row(32, "dup", NewDescriptor, "a descriptor is put into the table last"),
    row(33, "dup2", Again, "puts the same file at the same number again"),
    row(34, "pause", Again, "waits; nothing has been taken"),
    row(35, "nanosleep", Sleep, "the time left is in its timer"),
    row(36, "getitimer", Again, "only reads state"),
    row(37, "alarm", Again, "never waits once the timer is set: the time runs from now"),
    row(38, "setitimer", Again, "never waits once the timer is set: the time runs from now"),
    row(39, "getpid", Again, "only reads state"),
    row(40, "sendfile", Splice { input: 1, output: 0 }, "file to file is done again at the same positions"),
    row(41, "socket", NewDescriptor, "a descriptor is put into the table last"),
    row(42, "connect", Again, "a connection under way is waited for again"),
    row(43, "accept", Again, "waits; nothing has been taken"),
    row(44, "sendto", Transfer(Transfer::WRITE.without_kiocb()), "as far as its iterator has come"),
    row(45, "recvfrom", Transfer(Transfer::READ.without_kiocb()), "as far as its iterator has come"),
    row(46, "sendmsg", Transfer(Transfer::WRITE.message()), "as far as its iterator has come"),
    row(47, "recvmsg", Transfer(Transfer::READ.message()), "as far as its iterator has come"),
    row(48, "shutdown", Again, "sets the same again"),
    row(49, "bind", Again, "sets the same again"),
    row(50, "listen", Again, "sets the same again"),
    row(51, "getsockname", Again, "only reads state"),
    row(52, "getpeername", Again, "only reads state"),
    row(53, "socketpair", NewDescriptor, "a descriptor is put into the table last"),
    row(54, "setsockopt", Again, "sets the same again"),
    row(55, "getsockopt", Again, "only reads state"),
    row(56, "clone", Clone, "the child exists or it does not"),
    row(57, "fork", Clone, "the child exists or it does not"),
    row(58, "vfork", Clone, "the child exists or it does not"),
    row(59, "execve", Exec, "up to the point of no return the old program is whole"),
    row(60, "exit", Exit, "it was ending"),
    row(61, "wait4", Wait, "waits; whom it has reaped is no longer there to be waited for"),
    row(62, "kill", Again, "a standard signal that is sent twice is merged"),
    row(63, "uname", Again, "only reads state"),
    row(64, "semget", Again, "finds what the first attempt has made"),
    row(65, "semop", Again, "waits; whoever wakes it has done it"),
    row(66, "semctl", Again, "removing what has been removed is answered with an error as after a race"),
    row(67, "shmdt", Again, "unmapping twice does no harm"),
    row(68, "msgget", Again, "finds what the first attempt has made"),
    row(69, "msgsnd", Again, "waits before it queues or takes a message"),
    row(70, "msgrcv", Again, "waits before it takes a message; whoever wakes it has handed it over"),
    row(71, "msgctl", Again, "removing what has been removed is answered with an error as after a race"),
    row(72, "fcntl", Again, "locks wait before they take; the rest reads or sets state"),
    row(73, "flock", Again, "waits; nothing has been taken"),
    row(74, "fsync", Again, "the data is written before it returns, however often"),
    row(75, "fdatasync", Again, "the data is written before it returns, however often"),
    row(76, "truncate", Again, "cuts or reserves the same range again"),
    row(77, "ftruncate", Again, "cuts or reserves the same range again"),
    row(78, "getdents", ReadDirectory, "the position moves only when it is done, so the same entries are read again"),
    row(79, "getcwd", Again, "only reads state"),
    row(80, "chdir", Again, "sets the same again"),
    row(81, "fchdir", Again, "sets the same again"),
    row(82, "rename", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(83, "mkdir", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(84, "rmdir", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(85, "creat", NewDescriptor, "a descriptor is put into the table last"),
    row(86, "link", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(87, "unlink", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(88, "symlink", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(89, "readlink", Again, "only reads state"),
    row(90, "chmod", Again, "sets the same again"),
    row(91, "fchmod", Again, "sets the same again"),
    row(92, "chown", Again, "sets the same again"),
    row(93, "fchown", Again, "sets the same again"),
    row(94, "lchown", Again, "sets the same again"),
    row(95, "umask", Again, "sets the same again"),
    row(96, "gettimeofday", Again, "only reads state"),
    row(97, "getrlimit", Again, "only reads state"),
    row(98, "getrusage", Again, "only reads state"),
    row(99, "sysinfo", Again, "only reads state"),
    row(100, "times", Again, "only reads state"),
    row(101, "ptrace", Impossible, "tracing is not brought back"),
    row(102, "getuid", Again, "only reads state"),
    row(103, "syslog", Again, "reads or clears the ring; syslog(2) READ waits before it takes"),
    row(104, "getgid", Again, "only reads state"),
    row(105, "setuid", Again, "sets the same again"),
    row(106, "setgid", Again, "sets the same again"),
    row(107, "geteuid", Again, "only reads state"),
    row(108, "getegid", Again, "only reads state"),
    row(109, "setpgid", Again, "sets the same again"),
    row(110, "getppid", Again, "only reads state"),
    row(111, "getpgrp", Again, "only reads state"),
    row(112, "setsid", Again, "a session that exists already is answered with EPERM, which programs that call it expect"),
    row(113, "setreuid", Again, "sets the same again"),
    row(114, "setregid", Again, "sets the same again"),
    row(115, "getgroups", Again, "only reads state"),
    row(116, "setgroups", Again, "sets the same again"),
    row(117, "setresuid", Again, "sets the same again"),
    row(118, "getresuid", Again, "only reads state"),
    row(119, "setresgid", Again, "sets the same again"),
    row(120, "getresgid", Again, "only reads state"),
    row(121, "getpgid", Again, "only reads state"),
    row(122, "setfsuid", Again, "sets the same again"),
    row(123, "setfsgid", Again, "sets the same again"),
    row(124, "getsid", Again, "only reads state"),
    row(125, "capget", Again, "only reads state"),
    row(126, "capset", Again, "sets the same again"),
    row(127, "rt_sigpending", Again, "only reads state"),
    row(128, "rt_sigtimedwait", Shorten { timeout_arg: 2 }, "nothing taken; the time left goes into the register, else EINTR, as after any signal (signal(7))"),
    row(129, "rt_sigqueueinfo", Again, "a standard signal that is sent twice is merged"),
    row(130, "rt_sigsuspend", Again, "waits; nothing has been taken"),
    row(131, "sigaltstack", Again, "sets the same again"),
    row(132, "utime", Again, "sets the same again"),
    row(133, "mknod", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(134, "uselib", Again, "not there: ENOSYS again"),
    row(135, "personality", Again, "sets the same again"),
    row(136, "ustat", Again, "only reads state"),
    row(137, "statfs", Again, "only reads state"),
    row(138, "fstatfs", Again, "only reads state"),
    row(139, "sysfs", Again, "only reads state"),
    row(140, "getpriority", Again, "only reads state"),
    row(141, "setpriority", Again, "sets the same again"),
    row(142, "sched_setparam", Again, "sets the same again"),
    row(143, "sched_getparam", Again, "only reads state"),
    row(144, "sched_setscheduler", Again, "sets the same again"),
    row(145, "sched_getscheduler", Again, "only reads state"),
    row(146, "sched_get_priority_max", Again, "only reads state"),
    row(147, "sched_get_priority_min", Again, "only reads state"),
    row(148, "sched_rr_get_interval", Again, "only reads state"),
    row(149, "mlock", Again, "sets the same again"),
    row(150, "munlock", Again, "sets the same again"),
    row(151, "mlockall", Again, "sets the same again"),
    row(152, "munlockall", Again, "sets the same again"),
    row(153, "vhangup", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(154, "modify_ldt", Again, "sets the same again"),
    row(155, "pivot_root", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(156, "_sysctl", Again, "not there: ENOSYS again"),
    row(157, "prctl", Again, "sets the same again"),
    row(158, "arch_prctl", Again, "sets the same again"),
    row(159, "adjtimex", Again, "sets the same again"),
    row(160, "setrlimit", Again, "sets the same again"),
    row(161, "chroot", Again, "sets the same again"),
    row(162, "sync", Again, "the data is written before it returns, however often"),
    row(163, "acct", Again, "sets the same again"),
    row(164, "settimeofday", Again, "sets the same again"),
    row(165, "mount", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(166, "umount2", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(167, "swapon", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(168, "swapoff", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(169, "reboot", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(170, "sethostname", Again, "sets the same again"),
    row(171, "setdomainname", Again, "sets the same again"),
    row(172, "iopl", Again, "sets the same again"),
    row(173, "ioperm", Again, "sets the same again"),
    row(174, "create_module", Again, "not there: ENOSYS again"),
    row(175, "init_module", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(176, "delete_module", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(177, "get_kernel_syms", Again, "not there: ENOSYS again"),
    row(178, "query_module", Again, "not there: ENOSYS again"),
    row(179, "quotactl", Again, "sets the same again"),
    row(180, "nfsservctl", Again, "not there: ENOSYS again"),
    row(181, "getpmsg", Again, "not there: ENOSYS again"),
    row(182, "putpmsg", Again, "not there: ENOSYS again"),
    row(183, "afs_syscall", Again, "not there: ENOSYS again"),
    row(184, "tuxcall", Again, "not there: ENOSYS again"),
    row(185, "security", Again, "not there: ENOSYS again"),
    row(186, "gettid", Again, "only reads state"),
    row(187, "readahead", Again, "a hint"),
    row(188, "setxattr", Again, "sets the same again"),
    row(189, "lsetxattr", Again, "sets the same again"),
    row(190, "fsetxattr", Again, "sets the same again"),
    row(191, "getxattr", Again, "only reads state"),
    row(192, "lgetxattr", Again, "only reads state"),
    row(193, "fgetxattr", Again, "only reads state"),
    row(194, "listxattr", Again, "only reads state"),
    row(195, "llistxattr", Again, "only reads state"),
    row(196, "flistxattr", Again, "only reads state"),
    row(197, "removexattr", Again, "removing what has been removed is answered with an error as after a race"),
    row(198, "lremovexattr", Again, "removing what has been removed is answered with an error as after a race"),
    row(199, "fremovexattr", Again, "removing what has been removed is answered with an error as after a race"),
    row(200, "tkill", Again, "a standard signal that is sent twice is merged"),
    row(201, "time", Again, "only reads state"),
    row(202, "futex", Futex, "the time left is in its timer"),
    row(203, "sched_setaffinity", Again, "sets the same again"),
    row(204, "sched_getaffinity", Again, "only reads state"),
    row(205, "set_thread_area", Again, "not there: ENOSYS again"),
    row(206, "io_setup", Impossible, "contexts and requests of asynchronous I/O are not brought back"),
    row(207, "io_destroy", Impossible, "contexts and requests of asynchronous I/O are not brought back"),
    row(208, "io_getevents", Shorten { timeout_arg: 4 }, "nothing taken; the time left goes into the register, else EINTR, as after any signal (signal(7))"),
    row(209, "io_submit", Impossible, "contexts and requests of asynchronous I/O are not brought back"),
    row(210, "io_cancel", Impossible, "contexts and requests of asynchronous I/O are not brought back"),
    row(211, "get_thread_area", Again, "not there: ENOSYS again"),
    row(212, "lookup_dcookie", Again, "not there: ENOSYS again"),
    row(213, "epoll_create", NewDescriptor, "a descriptor is put into the table last"),
    row(214, "epoll_ctl_old", Again, "not there: ENOSYS again"),
    row(215, "epoll_wait_old", Again, "not there: ENOSYS again"),
    row(216, "remap_file_pages", Again, "replaces the same pages again"),
    row(217, "getdents64", ReadDirectory, "the position moves only when it is done, so the same entries are read again"),
    row(218, "set_tid_address", Again, "sets the same again"),
    row(219, "restart_syscall", Restarted, "continues the call that its restart block names"),
    row(220, "semtimedop", Shorten { timeout_arg: 3 }, "nothing taken; the time left goes into the register, else EINTR, as after any signal (signal(7))"),
    row(221, "fadvise64", Again, "a hint"),
    row(222, "timer_create", Again, "a second timer at worst, of which nobody knows"),
    row(223, "timer_settime", Again, "never waits once the timer is set: the time runs from now"),
    row(224, "timer_gettime", Again, "only reads state"),
    row(225, "timer_getoverrun", Again, "only reads state"),
    row(226, "timer_delete", Again, "removing what has been removed is answered with an error as after a race"),
    row(227, "clock_settime", Again, "sets the same again"),
    row(228, "clock_gettime", Again, "only reads state"),
    row(229, "clock_getres", Again, "only reads state"),
    row(230, "clock_nanosleep", Sleep, "the time left is in its timer"),
    row(231, "exit_group", Exit, "it was ending"),
    row(232, "epoll_wait", EpollWait, "no event is taken before it returns; the time left goes into the register, else EINTR, as after any signal (signal(7))"),
    row(233, "epoll_ctl", Again, "removing what has been removed is answered with an error as after a race"),
    row(234, "tgkill", Again, "a standard signal that is sent twice is merged"),
    row(235, "utimes", Again, "sets the same again"),
    row(236, "vserver", Again, "not there: ENOSYS again"),
    row(237, "mbind", Again, "sets the same again"),
    row(238, "set_mempolicy", Again, "sets the same again"),
    row(239, "get_mempolicy", Again, "only reads state"),
    row(240, "mq_open", NewDescriptor, "a descriptor is put into the table last"),
    row(241, "mq_unlink", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(242, "mq_timedsend", Again, "waits; whoever wakes it has done it; its timeout is an absolute time, which the time namespace keeps right"),
    row(243, "mq_timedreceive", Again, "waits; whoever wakes it has done it; its timeout is an absolute time, which the time namespace keeps right"),
    row(244, "mq_notify", Again, "removing what has been removed is answered with an error as after a race"),
    row(245, "mq_getsetattr", Again, "only reads state"),
    row(246, "kexec_load", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(247, "waitid", Wait, "waits; whom it has reaped is no longer there to be waited for"),
    row(248, "add_key", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(249, "request_key", Again, "waits; nothing has been taken"),
    row(250, "keyctl", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(251, "ioprio_set", Again, "sets the same again"),
    row(252, "ioprio_get", Again, "only reads state"),
    row(253, "inotify_init", NewDescriptor, "a descriptor is put into the table last"),
    row(254, "inotify_add_watch", Again, "sets the same again"),
    row(255, "inotify_rm_watch", Again, "removing what has been removed is answered with an error as after a race"),
    row(256, "migrate_pages", Again, "replaces the same pages again"),
    row(257, "openat", Open { flags_arg: 2 }, "a descriptor is put into the table last"),
    row(258, "mkdirat", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(259, "mknodat", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(260, "fchownat", Again, "sets the same again"),
    row(261, "futimesat", Again, "sets the same again"),
    row(262, "newfstatat", Again, "only reads state"),
    row(263, "unlinkat", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(264, "renameat", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(265, "linkat", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(266, "symlinkat", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(267, "readlinkat", Again, "only reads state"),
    row(268, "fchmodat", Again, "sets the same again"),
    row(269, "faccessat", Again, "only reads state"),
    row(270, "pselect6", Select { timeout_arg: 4, timeval: false }, "the kernel writes the time left into the argument when interrupted"),
    row(271, "ppoll", Select { timeout_arg: 2, timeval: false }, "the kernel writes the time left into the argument when interrupted"),
    row(272, "unshare", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(273, "set_robust_list", Again, "sets the same again"),
    row(274, "get_robust_list", Again, "only reads state"),
    row(275, "splice", Splice { input: 0, output: 2 }, "file to file is done again at the same positions"),
    row(276, "tee", Splice { input: 0, output: 1 }, "waits before the first buffer"),
    row(277, "sync_file_range", Again, "the data is written before it returns, however often"),
    row(278, "vmsplice", Transfer(Transfer::WRITE.vector().without_kiocb()), "as far as its iterator has come"),
    row(279, "move_pages", Again, "replaces the same pages again"),
    row(280, "utimensat", Again, "sets the same again"),
    row(281, "epoll_pwait", EpollWait, "no event is taken before it returns; the time left goes into the register, else EINTR, as after any signal (signal(7))"),
    row(282, "signalfd", NewDescriptor, "a descriptor is put into the table last"),
    row(283, "timerfd_create", NewDescriptor, "a descriptor is put into the table last"),
    row(284, "eventfd", NewDescriptor, "a descriptor is put into the table last"),
    row(285, "fallocate", Again, "cuts or reserves the same range again"),
    row(286, "timerfd_settime", Again, "sets the same again"),
    row(287, "timerfd_gettime", Again, "only reads state"),
    row(288, "accept4", Again, "waits; nothing has been taken"),
    row(289, "signalfd4", NewDescriptor, "a descriptor is put into the table last"),
    row(290, "eventfd2", NewDescriptor, "a descriptor is put into the table last"),
    row(291, "epoll_create1", NewDescriptor, "a descriptor is put into the table last"),
    row(292, "dup3", Again, "puts the same file at the same number again"),
    row(293, "pipe2", NewDescriptor, "a descriptor is put into the table last"),
    row(294, "inotify_init1", NewDescriptor, "a descriptor is put into the table last"),
    row(295, "preadv", Transfer(Transfer::READ.vector()), "as far as its iterator has come"),
    row(296, "pwritev", Transfer(Transfer::WRITE.vector()), "as far as its iterator has come"),
    row(297, "rt_tgsigqueueinfo", Again, "a standard signal that is sent twice is merged"),
    row(298, "perf_event_open", NewDescriptor, "a descriptor is put into the table last"),
    row(299, "recvmmsg", Batch, "messages before the one that waits have been transferred"),
    row(300, "fanotify_init", NewDescriptor, "a descriptor is put into the table last"),
    row(301, "fanotify_mark", Again, "sets the same again"),
    row(302, "prlimit64", Again, "sets the same again"),
    row(303, "name_to_handle_at", Again, "only reads state"),
    row(304, "open_by_handle_at", NewDescriptor, "a descriptor is put into the table last"),
    row(305, "clock_adjtime", Again, "sets the same again"),
    row(306, "syncfs", Again, "the data is written before it returns, however often"),
    row(307, "sendmmsg", Batch, "messages before the one that waits have been transferred"),
    row(308, "setns", Again, "sets the same again"),
    row(309, "getcpu", Again, "only reads state"),
    row(310, "process_vm_readv", Again, "copies the same bytes again"),
    row(311, "process_vm_writev", Again, "copies the same bytes again"),
    row(312, "kcmp", Again, "only reads state"),
    row(313, "finit_module", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(314, "sched_setattr", Again, "sets the same again"),
    row(315, "sched_getattr", Again, "only reads state"),
    row(316, "renameat2", Name, "a directory entry changes in one step, inside one transaction of the file system"),
    row(317, "seccomp", Again, "sets the same again"),
    row(318, "getrandom", Again, "fresh random bytes are as good as others"),
    row(319, "memfd_create", NewDescriptor, "a descriptor is put into the table last"),
    row(320, "kexec_file_load", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(321, "bpf", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(322, "execveat", Exec, "up to the point of no return the old program is whole"),
    row(323, "userfaultfd", NewDescriptor, "a descriptor is put into the table last"),
    row(324, "membarrier", Again, "sets the same again"),
    row(325, "mlock2", Again, "sets the same again"),
    row(326, "copy_file_range", Splice { input: 0, output: 2 }, "file to file is done again at the same positions"),
    row(327, "preadv2", Transfer(Transfer::READ.vector()), "as far as its iterator has come"),
    row(328, "pwritev2", Transfer(Transfer::WRITE.vector()), "as far as its iterator has come"),
    row(329, "pkey_mprotect", Again, "sets the same again"),
    row(330, "pkey_alloc", Again, "finds what the first attempt has made"),
    row(331, "pkey_free", Again, "removing what has been removed is answered with an error as after a race"),
    row(332, "statx", Again, "only reads state"),
    row(333, "io_pgetevents", Shorten { timeout_arg: 4 }, "nothing taken; the time left goes into the register, else EINTR, as after any signal (signal(7))"),
    row(334, "rseq", Again, "sets the same again"),
    row(335, "uretprobe", Impossible, "only the trampoline of a probe calls it"),
    row(424, "pidfd_send_signal", Again, "a standard signal that is sent twice is merged"),
    row(425, "io_uring_setup", Impossible, "contexts and requests of asynchronous I/O are not brought back"),
    row(426, "io_uring_enter", Impossible, "contexts and requests of asynchronous I/O are not brought back"),
    row(427, "io_uring_register", Impossible, "contexts and requests of asynchronous I/O are not brought back"),
    row(428, "open_tree", NewDescriptor, "a descriptor is put into the table last"),
    row(429, "move_mount", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(430, "fsopen", NewDescriptor, "a descriptor is put into the table last"),
    row(431, "fsconfig", Impossible, "it may or may not have changed the machine, which a second attempt does not find out"),
    row(432, "fsmount", NewDescriptor, "a descriptor is put into the table last"),
    row(433, "fspick", NewDescriptor, "a descriptor is put into the table last"),
    row(434, "pidfd_open", NewDescriptor, "a descriptor is put into the table last"),
    row(435, "clone3", Clone, "the child exists or it does not"),
    row(436, "close_range", Again, "closes what is still open"),
    row(437, "openat2", NewDescriptor, "a descriptor is put into the table last"),
    row(438, "pidfd_getfd", NewDescriptor, "a descriptor is put into the table last"),
    row(439, "faccessat2", Again, "only reads state"),
    row(440, "process_madvise", Again, "a hint"),
    row(441, "epoll_pwait2", EpollWait, "no event is taken before it returns; the time left goes into the register, else EINTR, as after any signal (signal(7))"),
    row(442, "mount_setattr", Again, "sets the same again"),
    row(443, "quotactl_fd", Again, "sets the same again"),
    row(444, "landlock_create_ruleset", NewDescriptor, "a descriptor is put into the table last"),
    row(445, "landlock_add_rule", Again, "sets the same again"),
    row(446, "landlock_restrict_self", Again, "sets the same again"),
    row(447, "memfd_secret", NewDescriptor, "a descriptor is put into the table last"),
    row(448, "process_mrelease", Again, "a hint"),
    row(449, "futex_waitv", Again, "its timeout is an absolute time; the time namespace keeps it right"),
    row(450, "set_mempolicy_home_node", Again, "sets the same again"),
    row(451, "cachestat", Again, "only reads state"),
    row(452, "fchmodat2", Again, "sets the same again"),
    row(453, "map_shadow_stack", Again, "a second mapping at worst, of which nobody knows; with MAP_FIXED the same place"),
    row(454, "futex_wake", Again, "waking twice is a spurious wake-up, which is allowed"),
    row(455, "futex_wait", Again, "its timeout is an absolute time; the time namespace keeps it right"),
    row(456, "futex_requeue", Again, "waking twice is a spurious wake-up, which is allowed"),
    row(457, "statmount", Again, "only reads state"),
    row(458, "listmount", Again, "only reads state"),
    row(459, "lsm_get_self_attr", Again, "only reads state"),
    row(460, "lsm_set_self_attr", Again, "sets the same again"),
    row(461, "lsm_list_modules", Again, "only reads state"),
    row(462, "mseal", Again, "sets the same again"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers that are assigned to the 64-bit ABI in 6.12: without a gap in two ranges.
    #[test]
    fn no_number_is_missing() {
        let numbers: Vec<i64> = TABLE.iter().map(|row| row.nr).collect();
        let assigned: Vec<i64> = (0..=335).chain(424..=462).collect();
        assert_eq!(numbers, assigned, "sorted, complete, without duplicates");
    }

    #[test]
    fn every_row_has_a_name_of_its_own_and_a_reason() {
        let names: std::collections::HashSet<_> = TABLE.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), TABLE.len());
        assert!(TABLE.iter().all(|row| !row.why.is_empty()));
    }

    /// Checked against the numbers of the C library's headers, at places where a slip would show.
    #[test]
    fn numbers_and_names_agree() {
        let known = [
            (0, "read"),
            (35, "nanosleep"),
            (56, "clone"),
            (85, "creat"),
            (128, "rt_sigtimedwait"),
            (174, "create_module"),
            (202, "futex"),
            (219, "restart_syscall"),
            (231, "exit_group"),
            (257, "openat"),
            (270, "pselect6"),
            (302, "prlimit64"),
            (334, "rseq"),
            (335, "uretprobe"),
            (424, "pidfd_send_signal"),
            (435, "clone3"),
            (449, "futex_waitv"),
            (462, "mseal"),
        ];
        for (nr, expected) in known {
            assert_eq!(name(nr), Some(expected));
        }
        for unassigned in [-1, 336, 423, 463, 512, 0x4000_0000] {
            assert_eq!(name(unassigned), None);
        }
    }

    #[test]
    fn arguments_that_rows_name_exist() {
        for row in TABLE {
            let args = match row.class {
                Select { timeout_arg, .. } | Shorten { timeout_arg } => [timeout_arg, 0],
                Splice { input, output } => [input, output],
                _ => [0, 0],
            };
            assert!(args.iter().all(|arg| *arg < 6), "{}", row.name);
        }
    }
}
