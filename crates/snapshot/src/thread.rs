//! Threads: registers and everything else that is per `task_struct`.

use serde::{Deserialize, Serialize};

use crate::{AltStack, Bytes, Credentials, PendingSignal, Pid, Resume, Seccomp, SyscallInFlight};

/// One thread.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Thread {
    #[allow(missing_docs)]
    pub tid: Pid,
    /// Thread name (at most 15 bytes).
    pub comm: Bytes,
    #[allow(missing_docs)]
    pub state: ThreadState,
    /// It was running on a CPU when the kernel died.
    pub on_cpu: Option<u32>,
    /// It was the task that panicked.
    pub panicked: bool,
    /// General registers on entry to the kernel.
    pub regs: Registers,
    /// The call that it was in, if any.
    pub syscall: Option<SyscallInFlight>,
    /// Where it slept (`schedule`'s caller), for people.
    pub wchan: Option<String>,
    /// How it goes on.
    pub resume: Resume,
    #[allow(missing_docs)]
    pub fpu: Fpu,
    #[allow(missing_docs)]
    pub credentials: Credentials,
    /// Blocked signals to go on with (the saved mask, when sigsuspend, ppoll … had replaced it); bit n-1 = signal n.
    pub blocked: u64,
    /// Signals pending for this thread alone, in queue order.
    pub pending: Vec<PendingSignal>,
    #[allow(missing_docs)]
    pub altstack: AltStack,
    /// set_robust_list head, 0: none.
    pub robust_list: u64,
    /// set_tid_address / CLONE_CHILD_CLEARTID, 0: none.
    pub clear_child_tid: u64,
    /// Restartable sequences registration.
    pub rseq: Option<Rseq>,
    #[allow(missing_docs)]
    pub scheduling: Scheduling,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// PR_SET_PDEATHSIG.
    pub pdeath_signal: i32,
    /// PR_SET_TIMERSLACK, nanoseconds.
    pub timer_slack_ns: u64,
    /// personality(2).
    pub personality: u32,
    #[allow(missing_docs)]
    pub seccomp: Seccomp,
}

/// What a thread was doing, as the letter in /proc/PID/stat says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ThreadState {
    /// R
    Running,
    /// S
    Sleeping,
    /// D
    DiskSleep,
    /// T
    Stopped,
    /// t
    Traced,
    /// Z, X: exited.
    Dead,
    /// I and everything else.
    Other,
}

/// `struct user_regs_struct`, the same names and order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

impl Registers {
    /// In the order of `struct user_regs_struct`.
    pub fn words(&self) -> [u64; 27] {
        let r = self;
        [
            r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi,
            r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs,
            r.gs,
        ]
    }
}

/// FPU, SSE, AVX … state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum Fpu {
    /// Known.
    Saved {
        /// XSAVE area in the standard (not compacted) layout, as NT_X86_XSTATE takes it; `xcomp_bv` is 0.
        xstate: Vec<u8>,
        /// Where it was found.
        source: FpuSource,
    },
    /// It was only in a CPU's registers and nobody saved it.
    #[default]
    Lost,
    /// The registers were lost, but the thread was inside a system call and the psABI lets a call clobber the vector registers; control
    /// words (x87 CW, MXCSR) come from the last state that the kernel had saved.
    LostInSyscall {
        /// As in `Saved`: the last known state.
        xstate: Vec<u8>,
    },
}

/// Who had the FPU state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FpuSource {
    /// `thread.fpu.fpstate`: the task was switched out.
    Memory,
    /// The register saver's slot: the task was on a CPU.
    Saver,
}

/// rseq(2) registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Address of the `struct rseq`.
    pub addr: u64,
    /// Registered length, bytes.
    pub len: u32,
    #[allow(missing_docs)]
    pub signature: u32,
}

/// sched(7).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// SCHED_*.
    pub policy: u32,
    /// -20 … 19.
    pub nice: i32,
    /// 1 … 99 for real-time policies.
    pub rt_priority: u32,
    /// SCHED_FLAG_RESET_ON_FORK.
    pub reset_on_fork: bool,
    /// CPUs that it may run on, as the user asked; empty: all.
    pub affinity: Vec<u32>,
}
