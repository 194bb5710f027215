//! System calls in flight.

use serde::{Deserialize, Serialize};

use crate::{Bytes, FileId};

/// A system call that had been entered and not left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyscallInFlight {
    /// Number (x86-64).
    pub nr: i64,
    /// rdi, rsi, rdx, r10, r8, r9.
    pub args: [u64; 6],
}

/// What execve(2) had been asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Path, as it was given.
    pub filename: Bytes,
    /// What was being loaded: that file, or a script's interpreter.
    pub file: FileId,
    #[allow(missing_docs)]
    pub argv: Vec<Bytes>,
    #[allow(missing_docs)]
    pub envp: Vec<Bytes>,
}

/// How a thread goes on. Decided by `autopsy` (which knows what the call had done), carried out by `resurrect`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum Resume {
    /// It was in user mode, or in an exception or interrupt from user mode: the registers are right as they are.
    #[default]
    UserMode,
    /// The call had finished; its result is in `rax`.
    Finished,
    /// Issue the call again, as the kernel does after a signal without a handler (ERESTARTSYS); `rax` becomes its number.
    Restart,
    /// Issue the call again, but with the time that was left, not the full timeout, held by a restart block as the kernel would
    /// (nanosleep, clock_nanosleep, poll, futex with a relative timeout).
    RestartTimed {
        /// The call to issue (never restart_syscall itself).
        call: SyscallInFlight,
        /// Nanoseconds left on the call's own clock; negative when already over.
        remaining_ns: i64,
    },
    /// Issue the call again after the `timespec`/`timeval` that it was given has been overwritten with the time left, as the kernel
    /// itself does when it is interrupted (select, pselect6, ppoll).
    RestartUpdated {
        /// Where the structure is in the process.
        timeout_addr: u64,
        /// `struct timeval` (microseconds) instead of `struct timespec`.
        timeval: bool,
        /// Nanoseconds left; not negative.
        remaining_ns: i64,
    },
    /// Issue the call again with the time left in the place of its timeout argument, which stays changed (epoll_wait, sigtimedwait and
    /// their kin: the kernel would not continue them).
    RestartShortened {
        /// Which argument.
        argument: usize,
        /// A pointer to a `struct timespec`, instead of milliseconds.
        timespec: bool,
        /// Nanoseconds left; negative when already over.
        remaining_ns: i64,
    },
    /// Issue the call again with another value for an argument, which stays changed: without O_EXCL, when the call itself has made the file.
    RestartChanged {
        /// Which argument.
        argument: usize,
        #[allow(missing_docs)]
        value: u64,
    },
    /// The call has been carried out as far as it will be: return this (a partial count, or a negative errno that programs must
    /// expect). The text says why.
    Return {
        #[allow(missing_docs)]
        value: i64,
        /// For the report.
        why: String,
    },
    /// It was executing another program, and the old one was gone already: it is asked for again. Of the address space
    /// only the name of the program is known.
    Exec(Exec),
    /// The thread was inside exit: it is not rebuilt.
    Exit {
        /// Status as wait4(2) gives it.
        status: i32,
    },
    /// There is no faithful way to go on; the text says why. The process is given up.
    Impossible {
        #[allow(missing_docs)]
        why: String,
    },
}
