//! System calls in flight: how each thread of the dead machine goes on.
//!
//! A thread was in a call if `orig_ax` of its `pt_regs` is not negative; `ax` says how far it was (arch/x86/entry,
//! arch/x86/kernel/signal.c, 6.1 and 6.12):
//!
//! - `-ENOSYS`, put there at the entry: not finished. [`table`] knows the call; the deciders here look at what it had done.
//! - `-ERESTARTSYS`, `-ERESTARTNOINTR`, `-ERESTARTNOHAND`: a signal (or a stop) had interrupted it, without an effect.
//! - `-ERESTART_RESTARTBLOCK`: the same, and the task's `restart_block` knows until when it is to wait.
//! - anything else is its result.
//!
//! What is returned is what the program may see without noticing the panic, in this order: the call's true result, the
//! call issued again where that makes no difference, an error that the program must expect at any time. Where none of
//! them is true, the process is given up.
//!
//! What cannot be told, because only a few instructions of a call that was running on a CPU decide it, and is accepted:
//! a transfer whose iterator has moved on and whose terminal or TCP socket has not been told yet (or the other way round); a call
//! that had done all, moved no position by it, and had not yet stored its result. A thread that was not on a CPU is never there: nothing sleeps in
//! these places.

mod exec;
mod flow;
mod handed;
mod iov_iter;
mod namei;
mod table;
mod timers;

use std::ops::Range;

use crate::panic::orc::Place;
use crate::thread::CpuRegisters;
use ktypes::{Kernel, KernelType};
use snapshot::{Clocks, Exec, Pid, Registers, Resume, SyscallInFlight};

use flow::{Account, Entry, Phase};
use handed::Handed;
use iov_iter::{Buffers, Layout, Progress, Search, Stack, Wanted};
pub use table::name;
use table::{Class, Row, Shape, Transfer, row_of};
use timers::RestartBlock;
pub use timers::{Expiry, Timers};

/// A kernel stack has 16 KiB (32 with KASAN).
const MAX_STACK: u64 = 32 << 10;
/// What the functions of a transfer have on the stack, outside of the file's own.
const MAX_FRAME: u64 = 1024;
/// fs.nr_open, as a rule.
const MAX_FDS: u32 = 1 << 20;
/// vm.max_map_count is 65,530 as a rule.
const MAX_VMAS: usize = 1 << 20;
/// A child that was started so long before the end may be that of the call in flight (nanoseconds).
const JUST_STARTED: i64 = 20_000_000;

const EINTR: i64 = 4;
const EIO: i64 = 5;
pub(crate) const ENOSYS: i64 = 38;
// include/linux/errno.h
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;
/// __USER32_CS.
const USER32_CS: u64 = 0x23;
/// __X32_SYSCALL_BIT.
const X32: i64 = 0x4000_0000;
/// thread_info.status: the call came in through a 32-bit entry (arch/x86/include/asm/thread_info.h).
const TS_COMPAT: u32 = 0x2;

const NR_READ: i64 = 0;
const NR_WRITE: i64 = 1;
const NR_POLL: i64 = 7;
const NR_READV: i64 = 19;
const NR_WRITEV: i64 = 20;
const NR_NANOSLEEP: i64 = 35;
const NR_FUTEX: i64 = 202;
const NR_RESTART_SYSCALL: i64 = 219;
const NR_CLOCK_NANOSLEEP: i64 = 230;
const NR_EPOLL_PWAIT2: i64 = 441;
const NR_CLONE: i64 = 56;
const NR_CLONE3: i64 = 435;
const NR_SENDFILE: i64 = 40;
const NR_RECVFROM: i64 = 45;
const NR_RECVMSG: i64 = 47;
const NR_WAITID: i64 = 247;
const NR_EXECVEAT: i64 = 322;
const NR_PREADV2: i64 = 327;
const NR_PWRITEV2: i64 = 328;

// File types of inode.i_mode.
const S_IFMT: u32 = 0o170_000;
const S_IFIFO: u32 = 0o010_000;
const O_APPEND: u32 = 0o2000;
const O_EXCL: u64 = 0o200;
/// O_CREAT | O_EXCL.
const O_EXCLUSIVE: u64 = 0o100 | O_EXCL;
const RWF_APPEND: u64 = 0x10;
const MSG_WAITALL: u64 = 0x100;
/// task_struct.__state (include/linux/sched.h).
const TASK_INTERRUPTIBLE: u32 = 1;
/// task_struct.exit_state.
const EXIT_ZOMBIE: u32 = 0x20;
const EXIT_DEAD: u32 = 0x10;
const TASK_RUNNING: u32 = 0;
const CLONE_THREAD: u64 = 0x1_0000;

/// What the caller knows about the thread and its machine.
pub struct Context<'a> {
    /// Address of the `task_struct`.
    pub task: u64,
    /// The user's registers (`pt_regs`).
    pub registers: &'a Registers,
    /// This task's call brought the kernel down.
    pub panicked: bool,
    /// It was on a CPU.
    pub on_cpu: bool,
    /// Its kernel stack, from the lowest address to the user's `pt_regs`.
    pub stack: Range<u64>,
    /// The kernel's stack pointer: `thread.sp` if it was switched out, else what the CPU's NT_PRSTATUS note says; `None` if
    /// the CPU left none. One that is not within the stack (the CPU was on an interrupt's stack) counts as `None`.
    pub stack_pointer: Option<u64>,
    /// The kernel's instruction pointer, from the same note; `None` if it was switched out.
    pub instruction_pointer: Option<u64>,
    /// The kernel's registers, from the same note; `None` if it was switched out, or has left none.
    pub cpu_registers: Option<&'a CpuRegisters>,
    /// The frames of its CPU's stack by these, the deepest first, as far as they are certain; none if it was switched out.
    pub frames: &'a [Place],
    /// The clocks at the end.
    pub now: Clocks,
    /// The function in which it waits, if it was switched out and that is certain.
    pub wchan: Option<&'a str>,
    /// All sleepers.
    pub timers: &'a Timers,
    /// All tasks of the machine, to find the child of a clone in flight.
    pub tasks: &'a [KnownTask],
}

/// A task, as far as a clone in flight asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownTask {
    /// Address of the `task_struct`.
    pub addr: u64,
    #[allow(missing_docs)]
    pub tid: Pid,
    #[allow(missing_docs)]
    pub tgid: Pid,
    /// Address of `real_parent`.
    pub parent: u64,
    /// It is no longer TASK_NEW: it has been woken for the first time.
    pub started: bool,
    /// `vfork_done`: on the stack of the thread that waits for it in vfork(2).
    pub vfork_done: u64,
    /// `start_boottime`.
    pub start_boottime_ns: i64,
}

/// The call that a thread was in, and how the thread goes on.
///
/// The call is the one that is to be issued if it is to be issued again: `restart_syscall` is replaced by the call that
/// it continues. Never fails: what cannot be read makes the thread's way on [`Resume::Impossible`] where it matters.
pub fn resume(kernel: &Kernel, ctx: &Context) -> (Option<SyscallInFlight>, Resume) {
    let regs = ctx.registers;
    if (regs.orig_rax as i32) < 0 {
        return (None, Resume::UserMode);
    }
    let dead = Dead::new(kernel, ctx);
    let call = SyscallInFlight {
        nr: i64::from(regs.orig_rax as u32),
        args: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9],
    };
    let thread = Thread {
        call,
        result: regs.rax as i64,
        compat: regs.cs == USER32_CS || dead.task.as_ref().is_some_and(|task| task.status & TS_COMPAT != 0),
        panicked: ctx.panicked,
        on_cpu: ctx.on_cpu,
        now: ctx.now,
    };
    let (call, resume) = decide(&thread, &dead);
    (Some(call), resume)
}

/// A thread in a system call.
#[derive(Clone, Copy, Debug)]
struct Thread {
    call: SyscallInFlight,
    /// `ax`.
    result: i64,
    compat: bool,
    panicked: bool,
    on_cpu: bool,
    now: Clocks,
}

impl Thread {
    fn arg(&self, index: usize) -> u64 {
        self.call.args.get(index).copied().unwrap_or(0)
    }
}

/// What a decider may ask about the dead machine.
trait Facts {
    /// The open file behind a descriptor.
    fn file(&self, fd: i32) -> Option<File>;
    /// Eight-byte words of the program's memory, if they were in memory.
    fn user_words(&self, addr: u64, count: usize) -> Option<Vec<u64>>;
    /// Whether the program has something mapped there.
    fn is_mapped(&self, addr: u64) -> Option<bool>;
    /// Whether the call was made by code of the C library, or of one that is for nothing but making system calls.
    fn is_in_c_library(&self) -> bool;
    /// Whether the live part of the kernel stack is known.
    fn has_stack(&self) -> bool;
    /// How far a transfer has come.
    fn transfer(&self, wanted: Wanted<'_>) -> Search;
    /// Of the `done` bytes that a terminal's writer has taken from the program: those that it has handed to the driver.
    fn tty_sent(&self, file: u64, done: u64) -> Option<u64>;
    /// When the thread's timer would have woken it.
    fn expiry(&self) -> Option<Expiry>;
    /// Of a thread that was switched out in a call that somebody else finishes: what has become of that.
    fn handed_over(&self, name: &str) -> Option<Handed>;
    /// Whether it sleeps.
    fn sleeps(&self) -> bool;
    /// A futex waiter that has been woken, and has not yet run.
    fn futex_woken(&self) -> bool;
    /// What a restart would continue.
    fn restart_block(&self) -> RestartBlock;
    /// Whether the thread is taking down an inode without names.
    fn is_removing_inode(&self) -> bool;
    /// Whether a call that makes, removes or changes a name has done so.
    fn is_name_changed(&self, name: &str, call: &SyscallInFlight) -> Option<bool>;
    /// In which function the CPU was, for people; empty if that is not known.
    fn place(&self) -> String;
    /// Whether an open(2) with O_EXCL has made its file.
    fn has_made_file(&self, call: &SyscallInFlight, flags_arg: usize) -> Option<bool>;
    /// Whether it is in the middle of what moves a file's bytes; an iterator outside of that is an earlier call's.
    fn is_moving(&self, file: &File, write: bool) -> bool;
    /// Of a thread on a CPU: whether a pipe or a stream socket between processes may not know yet of what was copied last: it takes, or gives up, the
    /// bytes after that.
    fn is_unaccounted(&self, file: &File, write: bool) -> bool;
    /// Of a thread on a CPU: where it was on its way to the file and back.
    fn phase(&self) -> Option<Phase>;
    /// Whether the thread is before what moves a file's position, or in the middle of it.
    fn is_position_unmoved(&self) -> bool;
    /// Of a thread on a CPU that has come back from the file: what it had transferred, by the remains of it.
    fn transferred(&self, wanted: Wanted<'_>) -> Option<Progress>;
    /// Whether the thread has written to `/proc/sysrq-trigger`.
    fn is_trigger(&self) -> bool;
    /// Whether the thread, a parent on a CPU that waits for this child or for any, has taken one off the list.
    fn has_reaped(&self, awaited: Option<Pid>) -> Option<bool>;
    /// The started child (or, with CLONE_THREAD, thread) of the clone in flight.
    fn child(&self, thread: bool) -> Option<Pid>;
    /// Whether an execve has begun to take the old program apart; `None` if that cannot be told.
    fn past_no_return(&self, filename: u64) -> Option<bool>;
    /// What the execve was asked for.
    fn program(&self) -> Result<Exec, &'static str>;
}

/// An open file, as far as a transfer asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct File {
    addr: u64,
    kind: Kind,
    append: bool,
    size: i64,
    /// `f_pos`.
    position: i64,
    /// A pipe or FIFO.
    is_pipe: bool,
    /// A socket whose messages go out whole or not at all (SOCK_DGRAM, SOCK_RAW, SOCK_SEQPACKET).
    is_message_socket: bool,
    /// The thread sleeps, and a socket's reader sleeps (so that a signal can wake it) only as long as it has got nothing: SO_RCVLOWAT is 1.
    waits_for_first: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// With a position, and nothing but contents: regular files, block devices, directories.
    Positioned,
    /// `/dev/null` and its like: what is read or written twice makes no difference.
    Memory,
    Tty,
    Socket,
    /// Pipes and everything else that gives and takes each byte once.
    Stream,
}

fn impossible(why: impl Into<String>) -> Resume {
    Resume::Impossible { why: why.into() }
}

fn finish(value: i64, why: impl Into<String>) -> Resume {
    Resume::Return { value, why: why.into() }
}

/// The call to be issued, and how the thread goes on.
fn decide(thread: &Thread, facts: &dyn Facts) -> (SyscallInFlight, Resume) {
    let call = thread.call;
    if thread.compat {
        return (call, impossible("a 32-bit system call"));
    }
    if call.nr & X32 != 0 {
        return (call, impossible("a system call of the x32 ABI"));
    }
    let unfinished = matches!(-thread.result, ENOSYS | ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND);
    if thread.result == -ERESTART_RESTARTBLOCK || unfinished && call.nr == NR_RESTART_SYSCALL {
        return continue_restart_block(thread, facts);
    }
    let resume = match -thread.result {
        ENOSYS if thread.panicked => finish_panicked(thread, facts),
        ENOSYS => match row_of(call.nr) {
            Some(row) => decide_by_class(thread, facts, row),
            None => impossible(format!("system call {} is not known", call.nr)),
        },
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Resume::Restart,
        _ => Resume::Finished,
    };
    (call, resume)
}

/// The call during which the kernel died. As a rule it has only come upon what was broken: it goes on like any other that was on a CPU, and where that
/// cannot be, it fails. Should it bring down the second kernel too, the machine reboots, as it would have done without that.
fn finish_panicked(thread: &Thread, facts: &dyn Facts) -> Resume {
    let row = row_of(thread.call.nr);
    match row.map(|row| row.class) {
        // What it had asked for has happened.
        Some(Class::Transfer(transfer)) if transfer.write && facts.is_trigger() => {
            let total = buffers(thread, facts, transfer.shape).total();
            let total = total.or((transfer.shape == Shape::Flat).then(|| thread.arg(2)));
            match total {
                Some(total) => finish(total as i64, "the call during which the kernel died counts as done"),
                None => finish(-EIO, "the call during which the kernel died"),
            }
        }
        _ => match row.map(|row| decide_by_class(thread, facts, row)) {
            None => finish(-EIO, "the call during which the kernel died"),
            Some(Resume::Impossible { why }) => {
                finish(-EIO, format!("the call during which the kernel died; {why}"))
            }
            Some(resume) => resume,
        },
    }
}

fn decide_by_class(thread: &Thread, facts: &dyn Facts, row: &Row) -> Resume {
    let parked = !thread.on_cpu;
    if handed::is_handed_over(row.name) {
        match facts.handed_over(row.name) {
            Some(Handed::Done(value)) => return finish(value, "it had been done by whoever woke it"),
            Some(Handed::Message) => {
                return impossible(format!(
                    "{}: a message had been handed to it that was not yet in its memory",
                    row.name
                ));
            }
            Some(Handed::Waiting) => {}
            // It has not come there yet, as a rule.
            None if facts.sleeps() && !handed::receives(row.name) => {}
            None => {
                let place = facts.place();
                return impossible(format!("{}: whether it was done cannot be told{place}", row.name));
            }
        }
    }
    match row.class {
        Class::Again | Class::NewDescriptor => Resume::Restart,
        Class::Wait if !parked && facts.has_reaped(awaited(thread)).is_none() => impossible(format!(
            "{}: whether it had taken a child off the list, and which one, cannot be told{}",
            row.name,
            facts.place()
        )),
        Class::Wait => Resume::Restart,
        Class::Open { flags_arg } if thread.arg(flags_arg) & O_EXCLUSIVE == O_EXCLUSIVE => {
            match facts.has_made_file(&thread.call, flags_arg) {
                Some(false) => Resume::Restart,
                // It is this call's own: now it is there.
                Some(true) if facts.is_in_c_library() => {
                    Resume::RestartChanged { argument: flags_arg, value: thread.arg(flags_arg) & !O_EXCL }
                }
                // Whoever waits has not made the file yet.
                None if parked => Resume::Restart,
                _ => {
                    let place = facts.place();
                    impossible(format!("{}: whether it has made the file cannot be told{place}", row.name))
                }
            }
        }
        Class::Open { .. } => Resume::Restart,
        Class::Sleep => sleep(thread, facts),
        Class::Poll => match thread.arg(2) as i32 {
            // Without a timeout, or without waiting.
            ..=0 => Resume::Restart,
            _ => timed(thread, facts.expiry()),
        },
        Class::Select { timeout_arg, timeval } => select(thread, facts, timeout_arg, timeval),
        Class::Futex => futex(thread, facts),
        Class::EpollWait => {
            let timeout = thread.arg(3);
            let waits = if thread.call.nr == NR_EPOLL_PWAIT2 { timeout != 0 } else { timeout as i32 > 0 };
            match waits {
                true => shortened(thread, facts, 3, thread.call.nr == NR_EPOLL_PWAIT2),
                false => Resume::Restart,
            }
        }
        // What it has taken so far is in the program's memory, how much it was in no place that is known.
        Class::Shorten { .. }
            if matches!(row.name, "io_getevents" | "io_pgetevents") && thread.arg(1) as i64 > 1 =>
        {
            impossible(format!("{}: how many events it has taken cannot be told", row.name))
        }
        Class::Shorten { timeout_arg } if thread.arg(timeout_arg) == 0 => Resume::Restart,
        Class::Shorten { timeout_arg } => shortened(thread, facts, timeout_arg, true),
        // Handled before, whatever its state.
        Class::Restarted => finish(-EINTR, "no call to continue"),
        Class::Transfer(kind) => transfer(thread, facts, kind),
        Class::Batch if parked && thread.arg(2) <= 1 => Resume::Restart,
        Class::Batch => impossible(format!("{}: how many messages are through cannot be told", row.name)),
        Class::Splice { input, output } => splice(thread, facts, row.name, input, output),
        Class::Seek => {
            const SEEK_CUR: u64 = 1;
            // Who waits for the position's lock has not moved it.
            let relative = thread.arg(2) == SEEK_CUR && thread.arg(1) != 0;
            if relative && !parked {
                impossible("lseek: whether the position has moved cannot be told")
            } else {
                Resume::Restart
            }
        }
        // Whoever waits does so before, as a rule.
        Class::ReadDirectory if parked || facts.is_position_unmoved() => Resume::Restart,
        Class::ReadDirectory => impossible(format!(
            "{}: whether the position in the directory has moved cannot be told{}",
            row.name,
            facts.place()
        )),
        Class::Close => match facts.file(thread.arg(0) as i32) {
            Some(_) => Resume::Restart,
            None => finish(0, "the descriptor was already closed"),
        },
        // What shows in the dead kernel's names is put on the disk, whatever had become of the file system's transaction. The last inode is
        // taken down after all that.
        Class::Name if facts.is_removing_inode() => {
            finish(0, "the name was gone, the inode was being removed")
        }
        Class::Name => match facts.is_name_changed(row.name, &thread.call) {
            Some(true) => finish(0, "the name was changed"),
            Some(false) => Resume::Restart,
            // Whoever waits has not changed it yet, as a rule.
            None if parked => Resume::Restart,
            None => impossible(format!("{}: whether it was done cannot be told{}", row.name, facts.place())),
        },
        Class::Clone => clone(thread, facts),
        Class::Exec => {
            let filename = thread.arg(usize::from(thread.call.nr == NR_EXECVEAT));
            match facts.past_no_return(filename) {
                Some(false) => Resume::Restart,
                Some(true) => match facts.program() {
                    Ok(program) => Resume::Exec(program),
                    Err(why) => impossible(format!(
                        "execve: the old program was gone, the new one not complete; {why}"
                    )),
                },
                None => impossible("execve: whether the old program is still whole cannot be told"),
            }
        }
        // Nothing of it is done before the thread counts as exiting; what comes after that does no harm twice.
        Class::Exit => Resume::Restart,
        Class::Remap => match facts.is_mapped(thread.arg(0)) {
            Some(true) => Resume::Restart,
            Some(false) => impossible("mremap: the mapping has moved, where to cannot be told"),
            None => impossible("mremap: whether the mapping has moved cannot be told"),
        },
        Class::Impossible => impossible(format!("{}: {}", row.name, row.why)),
    }
}

/// The only child that a wait4 or waitid asks for.
fn awaited(thread: &Thread) -> Option<Pid> {
    const P_PID: u64 = 1;
    let pid = match thread.call.nr {
        NR_WAITID if thread.arg(0) != P_PID => return None,
        NR_WAITID => thread.arg(1),
        _ => thread.arg(0),
    };
    Some(pid as Pid).filter(|pid| *pid > 0)
}

/// Issued again with the time left on the timer. Without a timer the time has not begun to run.
fn timed(thread: &Thread, expiry: Option<Expiry>) -> Resume {
    match expiry {
        None => Resume::Restart,
        Some(expiry) => match expiry.remaining(&thread.now) {
            Some(remaining_ns) => Resume::RestartTimed { call: thread.call, remaining_ns },
            // All that wait for a time have to expect that.
            None => finish(-EINTR, "the time left on its clock is not known"),
        },
    }
}

/// Issued again with another timeout in its register, and nothing taken so far. The register keeps it: the functions of the C library do not
/// look at it again, nor may their callers; of other code nobody knows.
fn shortened(thread: &Thread, facts: &dyn Facts, argument: usize, timespec: bool) -> Resume {
    let expiry = if facts.is_in_c_library() { facts.expiry() } else { None };
    match expiry.map(|expiry| expiry.remaining(&thread.now)) {
        Some(Some(remaining_ns)) => Resume::RestartShortened { argument, timespec, remaining_ns },
        _ => finish(-EINTR, "it waited with a timeout; nothing had been taken"),
    }
}

/// nanosleep(2), clock_nanosleep(2).
fn sleep(thread: &Thread, facts: &dyn Facts) -> Resume {
    const TIMER_ABSTIME: u64 = 1;
    let (clock, absolute, rmtp) = match thread.call.nr {
        NR_CLOCK_NANOSLEEP => (thread.arg(0) as i32, thread.arg(1) & TIMER_ABSTIME != 0, thread.arg(3)),
        _ => (1, false, thread.arg(1)),
    };
    if absolute {
        return Resume::Restart;
    }
    match clock {
        // CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_TAI: hrtimers.
        0 | 1 | 7 | 11 => match facts.expiry() {
            Some(expiry) if expiry.remaining(&thread.now).is_none() => sleep_of_unknown_rest(rmtp),
            expiry => timed(thread, expiry),
        },
        // CPU-time clocks and alarm clocks have other timers.
        _ => sleep_of_unknown_rest(rmtp),
    }
}

fn sleep_of_unknown_rest(rmtp: u64) -> Resume {
    match rmtp {
        0 => finish(-EINTR, "the time left on its clock is not known"),
        _ => impossible("the time left on its clock is not known, and the program asks for it"),
    }
}

fn select(thread: &Thread, facts: &dyn Facts, timeout_arg: usize, timeval: bool) -> Resume {
    let timeout_addr = thread.arg(timeout_arg);
    let expiry = if timeout_addr == 0 { None } else { facts.expiry() };
    match expiry.map(|expiry| expiry.remaining(&thread.now)) {
        None => Resume::Restart,
        Some(Some(left)) => Resume::RestartUpdated { timeout_addr, timeval, remaining_ns: left.max(0) },
        Some(None) => finish(-EINTR, "the time left on its clock is not known"),
    }
}

fn futex(thread: &Thread, facts: &dyn Facts) -> Resume {
    const FUTEX_CMD_MASK: u64 = 0x7f;
    const WAIT: u64 = 0;
    const WAKE_OP: u64 = 5;
    const WAIT_BITSET: u64 = 9;
    match thread.arg(1) & FUTEX_CMD_MASK {
        // The word may be as it was, and nobody wakes it a second time.
        WAIT | WAIT_BITSET if facts.futex_woken() => finish(0, "it had been woken"),
        WAIT if thread.arg(3) != 0 => timed(thread, facts.expiry()),
        WAKE_OP if thread.on_cpu => {
            impossible("futex: whether the second word has been changed cannot be told")
        }
        // Other timeouts are absolute; waking twice is a spurious wake-up, which is allowed.
        _ => Resume::Restart,
    }
}

/// Interrupted with a restart block, or continued from one with restart_syscall.
fn continue_restart_block(thread: &Thread, facts: &dyn Facts) -> (SyscallInFlight, Resume) {
    let block = facts.restart_block();
    let mut call = thread.call;
    if call.nr == NR_RESTART_SYSCALL {
        // restart_syscall has the registers of the call that it continues, but for the number.
        call.nr = match block {
            // A clock is a small number, a pointer is not.
            RestartBlock::Nanosleep { .. }
                if call.args[0] < 4096 || (call.args[0] as i32) < 0 && call.args[0] >> 32 == 0 =>
            {
                NR_CLOCK_NANOSLEEP
            }
            RestartBlock::Nanosleep { .. } => NR_NANOSLEEP,
            RestartBlock::Poll(_) => NR_POLL,
            RestartBlock::Futex { .. } => NR_FUTEX,
            RestartBlock::Other => NR_RESTART_SYSCALL,
        };
    }
    let thread = &Thread { call, ..*thread };
    let resume = match block {
        RestartBlock::Nanosleep { until, rmtp } => match until.remaining(&thread.now) {
            Some(_) => timed(thread, Some(until)),
            None => sleep_of_unknown_rest(rmtp),
        },
        RestartBlock::Poll(None) => Resume::Restart,
        RestartBlock::Poll(until) => timed(thread, until),
        RestartBlock::Futex { until_ns } => match thread.arg(1) & 0x7f {
            // FUTEX_WAIT: relative, always on CLOCK_MONOTONIC.
            0 => timed(thread, Some(Expiry::monotonic(until_ns))),
            _ => Resume::Restart,
        },
        RestartBlock::Other => finish(-EINTR, "interrupted, with nothing to continue"),
    };
    (call, resume)
}

/// The program's buffers.
fn buffers(thread: &Thread, facts: &dyn Facts, shape: Shape) -> Buffers {
    let (vector, count) = match shape {
        Shape::Flat => return Buffers::Known(vec![(thread.arg(1), thread.arg(2))]),
        Shape::Vector => (thread.arg(1), thread.arg(2)),
        // struct msghdr: name, namelen, iov, iovlen.
        Shape::Message => match facts.user_words(thread.arg(1), 4).as_deref() {
            Some([_, _, iov, iovlen]) => (*iov, *iovlen),
            _ => return Buffers::Unknown(0),
        },
    };
    if count > iov_iter::MAX_SEGMENTS {
        return Buffers::Unknown(0);
    }
    match facts.user_words(vector, count as usize * 2) {
        Some(words) => {
            Buffers::Known(words.as_chunks::<2>().0.iter().map(|[base, len]| (*base, *len)).collect())
        }
        None => Buffers::Unknown(count),
    }
}

/// read, write and their kin.
fn transfer(thread: &Thread, facts: &dyn Facts, transfer: Transfer) -> Resume {
    let Some(file) = facts.file(thread.arg(0) as i32) else {
        return match thread.on_cpu {
            true => Resume::Restart,
            false => impossible("its descriptor was closed while it waited"),
        };
    };
    let append =
        transfer.write && (file.append || thread.call.nr == NR_PWRITEV2 && thread.arg(5) & RWF_APPEND != 0);
    if file.kind == Kind::Memory || file.kind == Kind::Positioned && !append && !thread.on_cpu {
        // The position moves when the call is done, not before: the same bytes go to, or come from, the same place.
        return Resume::Restart;
    }
    if file.kind == Kind::Positioned && !append {
        return positioned(thread, facts, transfer, &file);
    }
    // A message goes out whole or not at all. It is copied first; then its sender may wait for room in the receiver's queue.
    if transfer.write && file.is_message_socket && !thread.on_cpu {
        return Resume::Restart;
    }
    // An iterator that there may be is an earlier call's.
    if thread.on_cpu && facts.phase() == Some(Phase::Before) {
        return Resume::Restart;
    }
    if !facts.has_stack() {
        return impossible(
            "a transfer on a CPU whose registers were not saved: how far it had come cannot be told",
        );
    }
    let buffers = buffers(thread, facts, transfer.shape);
    let wanted = Wanted {
        buffers: &buffers,
        write: transfer.write,
        file: transfer.kiocb.then_some(file.addr),
        socket: file.kind == Kind::Socket,
    };
    match facts.transfer(wanted) {
        // A read that never got to its file, or a file with a `read` of its own, which waits before it takes.
        Search::Nothing if !thread.on_cpu => Resume::Restart,
        Search::Nothing => match facts.transferred(wanted) {
            Some(Progress { done: 0, .. }) => Resume::Restart,
            Some(Progress { done, total, .. }) if !append && file.kind != Kind::Tty => {
                finish(done as i64, format!("{done} of {total} bytes had been transferred"))
            }
            _ => on_the_edge(facts),
        },
        // Other accounts are those of earlier calls.
        Search::Contradiction if !transfer.write && file.waits_for_first && !waits_for_all(thread) => {
            Resume::Restart
        }
        Search::Contradiction => {
            impossible("the kernel stack has several accounts of how far the transfer had come")
        }
        Search::Found(Progress { done: 0, .. }) => Resume::Restart,
        Search::Found(_) if transfer.write && file.is_message_socket => {
            impossible("a message was being sent on a CPU: whether it has been cannot be told")
        }
        Search::Found(_)
            if thread.on_cpu
                && !facts.is_moving(&file, transfer.write)
                && facts.phase() != Some(Phase::After) =>
        {
            on_the_edge(facts)
        }
        Search::Found(_)
            if thread.on_cpu
                && facts.phase() != Some(Phase::After)
                && facts.is_unaccounted(&file, transfer.write) =>
        {
            impossible(match transfer.write {
                true => "a write on a CPU: whether the other side has what was copied last cannot be told",
                false => "a read on a CPU: whether what was copied last is still there cannot be told",
            })
        }
        Search::Found(progress) if append => appended(thread, file.size, progress),
        Search::Found(progress) if file.kind == Kind::Tty && transfer.write => {
            tty_written(thread, facts, &file, progress)
        }
        Search::Found(Progress { done, total, .. }) => {
            finish(done as i64, format!("{done} of {total} bytes had been transferred"))
        }
    }
}

/// A transfer on a CPU with a file that has contents and a position: the same bytes go to, or come from, the same place until the position
/// moves, a few instructions before the call is over.
fn positioned(thread: &Thread, facts: &dyn Facts, transfer: Transfer, file: &File) -> Resume {
    if !at_the_files_position(thread) || facts.is_position_unmoved() {
        return Resume::Restart;
    }
    let buffers = buffers(thread, facts, transfer.shape);
    let file_addr = transfer.kiocb.then_some(file.addr);
    let wanted = Wanted { buffers: &buffers, write: transfer.write, file: file_addr, socket: false };
    match facts.transferred(wanted) {
        Some(Progress { done: 0, .. }) => Resume::Restart,
        Some(Progress { done, total, ki_pos: Some(end) }) if file.position == end => {
            finish(done as i64, format!("{done} of {total} bytes had been transferred"))
        }
        Some(Progress { done, ki_pos: Some(end), .. })
            if end.checked_sub_unsigned(done) == Some(file.position) =>
        {
            Resume::Restart
        }
        _ => impossible(format!("whether the file's position has moved cannot be told{}", facts.place())),
    }
}

/// Whether a transfer is one at the position that the open file has (fs/read_write.c), and not at one that it was given.
fn at_the_files_position(thread: &Thread) -> bool {
    match thread.call.nr {
        NR_READ | NR_WRITE | NR_READV | NR_WRITEV => true,
        NR_PREADV2 | NR_PWRITEV2 => thread.arg(3) == u64::MAX,
        _ => false,
    }
}

fn on_the_edge(facts: &dyn Facts) -> Resume {
    impossible(format!("a transfer on a CPU, before its beginning or after its end{}", facts.place()))
}

/// MSG_WAITALL.
fn waits_for_all(thread: &Thread) -> bool {
    let flags = match thread.call.nr {
        NR_RECVFROM => thread.arg(3),
        NR_RECVMSG => thread.arg(2),
        _ => 0,
    };
    flags & MSG_WAITALL != 0
}

/// A write with O_APPEND: where it began is in its kiocb, and what is in the file by now shows in the file's size.
///
/// The iterator moves on when a page has been copied, the size right after (generic_perform_write(), mm/filemap.c). A
/// thread that sleeps is never in between. `ki_pos` itself moves at the end.
fn appended(thread: &Thread, size: i64, progress: Progress) -> Resume {
    let Progress { done, total, ki_pos } = progress;
    let finish = |done: u64| finish(done as i64, format!("{done} of {total} bytes had been appended"));
    if !thread.on_cpu {
        return finish(done);
    }
    match ki_pos.and_then(|start| size.checked_sub(start)) {
        Some(0) if done < total => Resume::Restart,
        Some(grown @ 1..) => finish(done.min(grown as u64)),
        _ => impossible("an append on a CPU: whether its last page is part of the file cannot be told"),
    }
}

/// A write to a terminal: the text goes to the driver in chunks, and the iterator is ahead by what is left of one.
fn tty_written(thread: &Thread, facts: &dyn Facts, file: &File, progress: Progress) -> Resume {
    let Progress { done, total, .. } = progress;
    match facts.tty_sent(file.addr, done) {
        Some(0) if !thread.on_cpu => Resume::Restart,
        Some(sent) if !thread.on_cpu => {
            finish(sent as i64, format!("{sent} of {total} bytes had been printed"))
        }
        _ => finish(
            done as i64,
            format!("{done} of {total} bytes had been taken; the last of them may not have been printed"),
        ),
    }
}

/// sendfile, splice, tee, copy_file_range: what has moved is only in local variables.
fn splice(thread: &Thread, facts: &dyn Facts, name: &str, input: usize, output: usize) -> Resume {
    let file = |index| facts.file(thread.arg(index) as i32);
    let (Some(input), Some(output)) = (file(input), file(output)) else { return Resume::Restart };
    // Of a file that was given a position it would not matter; that is rare.
    let unmoved = || !thread.on_cpu || facts.is_position_unmoved();
    match (input.kind, output.kind) {
        (Kind::Positioned | Kind::Memory, Kind::Positioned) if !output.append && unmoved() => Resume::Restart,
        (_, Kind::Memory) if input.kind != Kind::Stream && unmoved() => Resume::Restart,
        // splice and tee wait for a pipe before the first buffer, and return rather than wait again.
        (Kind::Stream, Kind::Stream) | (Kind::Positioned, Kind::Stream)
            if !thread.on_cpu && thread.call.nr != NR_SENDFILE =>
        {
            Resume::Restart
        }
        _ => impossible(format!("{name}: how far it had come cannot be told")),
    }
}

fn clone(thread: &Thread, facts: &dyn Facts) -> Resume {
    let flags = match thread.call.nr {
        NR_CLONE => thread.arg(0),
        // struct clone_args begins with the flags.
        NR_CLONE3 => facts.user_words(thread.arg(0), 1).and_then(|words| words.first().copied()).unwrap_or(0),
        _ => 0,
    };
    match facts.child(flags & CLONE_THREAD != 0) {
        Some(pid) => finish(pid.into(), "the child was running"),
        None => Resume::Restart,
    }
}

// ---- what the dead machine says

#[derive(Clone, Copy, KernelType)]
#[kernel("task_struct")]
struct Task {
    #[kernel("thread_info.status")]
    status: u32,
    #[kernel("__state")]
    state: u32,
    mm: u64,
    files: u64,
    signal: u64,
    in_execve: bool,
    tgid: i32,
}

#[derive(KernelType)]
#[kernel("fdtable")]
struct FdTable {
    max_fds: u32,
    fd: u64,
}

#[derive(KernelType)]
#[kernel("file")]
struct FileStruct {
    f_op: u64,
    f_flags: u32,
    f_inode: u64,
    f_pos: i64,
    private_data: u64,
}

#[derive(KernelType)]
#[kernel("inode")]
struct Inode {
    i_mode: u16,
    i_size: i64,
    i_rdev: u32,
}

#[derive(KernelType)]
#[kernel("inode")]
struct DyingInode {
    #[kernel(address)]
    i_state: u64,
    i_nlink: u32,
    i_count: i32,
    i_sb: u64,
}

#[derive(KernelType)]
#[kernel("tty_struct")]
struct Tty {
    write_buf: u64,
    write_cnt: i32,
}

/// The dead machine, from one thread's point of view.
struct Dead<'a> {
    kernel: &'a Kernel,
    ctx: &'a Context<'a>,
    task: Option<Task>,
    /// The stack pointer, and what lies from there to the user's registers.
    stack: Option<(u64, Vec<u64>)>,
}

impl<'a> Dead<'a> {
    fn new(kernel: &'a Kernel, ctx: &'a Context<'a>) -> Self {
        let is_on_stack = |sp: &u64| ctx.stack.contains(sp) && sp.is_multiple_of(8);
        // An exception with a stack of its own (a double fault) has left its registers there.
        let pointer = ctx.stack_pointer.filter(is_on_stack);
        let pointer = pointer.or_else(|| ctx.frames.iter().map(|frame| frame.sp).find(is_on_stack));
        let live = pointer.and_then(|sp| {
            let len = ctx.stack.end.checked_sub(sp).filter(|len| *len <= MAX_STACK)?;
            let bytes = kernel.read_bytes(sp, len as usize).ok()?;
            Some((sp, words(&bytes)))
        });
        Dead { kernel, ctx, task: kernel.read(ctx.task).ok(), stack: live }
    }

    fn live(&self) -> Stack<'_> {
        match &self.stack {
            Some((base, words)) => Stack { base: *base, words },
            None => Stack { base: self.ctx.stack.end, words: &[] },
        }
    }

    /// The pointer that a member of a structure is, unless it is NULL.
    fn follow(&self, from: u64, kind: &str, member: &str) -> Option<u64> {
        let at = from.wrapping_add(self.kernel.offset_of(kind, member).ok()?);
        self.kernel.read_u64(at).ok().filter(|to| *to != 0)
    }

    fn descriptors(&self) -> Option<FdTable> {
        let fdt = self.task?.files.wrapping_add(self.kernel.offset_of("files_struct", "fdt").ok()?);
        self.kernel.read(self.kernel.read_u64(fdt).ok()?).ok()
    }

    /// Addresses of the process's open files.
    fn open_files(&self) -> Vec<u64> {
        let Some(table) = self.descriptors() else { return Vec::new() };
        let len = table.max_fds.min(MAX_FDS) as usize * 8;
        self.kernel.read_bytes(table.fd, len).map(|bytes| words(&bytes)).unwrap_or_default()
    }

    /// Address of the `struct file` behind a descriptor.
    fn file_pointer(&self, fd: i32) -> Option<u64> {
        let fd = u32::try_from(fd).ok()?;
        let table = self.descriptors()?;
        if fd >= table.max_fds {
            return None;
        }
        self.kernel.read_u64(table.fd.wrapping_add(u64::from(fd) * 8)).ok().filter(|addr| *addr != 0)
    }

    fn try_file(&self, fd: i32) -> Option<File> {
        let addr = self.file_pointer(fd)?;
        let file: FileStruct = self.kernel.read(addr).ok()?;
        let inode: Inode = self.kernel.read(file.f_inode).ok()?;
        let kind = kind_of(inode.i_mode, inode.i_rdev, self.kernel.symbol_at(file.f_op));
        let is_pipe = u32::from(inode.i_mode) & S_IFMT == S_IFIFO;
        let is_message_socket = kind == Kind::Socket && {
            let of_type = self.kernel.offset_of("socket", "type").ok()?;
            matches!(self.kernel.read_u16(file.private_data.wrapping_add(of_type)).ok()?, 2 | 3 | 5)
        };
        let waits_for_first =
            kind == Kind::Socket && self.waits_for_first(file.private_data).unwrap_or(false);
        let append = file.f_flags & O_APPEND != 0;
        let (size, position) = (inode.i_size, file.f_pos);
        Some(File { addr, kind, append, size, position, is_pipe, is_message_socket, waits_for_first })
    }

    /// `socket`: address of the `struct socket` that the thread reads.
    fn waits_for_first(&self, socket: u64) -> Option<bool> {
        let kernel = self.kernel;
        let state = self.ctx.task.wrapping_add(kernel.offset_of("task_struct", "__state").ok()?);
        let sock = kernel.read_u64(socket.wrapping_add(kernel.offset_of("socket", "sk").ok()?)).ok()?;
        let low = sock.wrapping_add(kernel.offset_of("sock", "sk_rcvlowat").ok()?);
        let sleeps = !self.ctx.on_cpu && sleeps_interruptibly(kernel.read_u32(state).ok()?);
        Some(sleeps && kernel.read_i32(low).ok()? <= 1)
    }

    fn try_tty_sent(&self, file: u64, done: u64) -> Option<u64> {
        let kernel = self.kernel;
        let private =
            kernel.read_u64(file.wrapping_add(kernel.offset_of("file", "private_data").ok()?)).ok()?;
        let tty =
            kernel.read_u64(private.wrapping_add(kernel.offset_of("tty_file_private", "tty").ok()?)).ok()?;
        let tty: Tty = kernel.read(tty).ok()?;
        tty_sent(self.live(), tty.write_buf, u64::try_from(tty.write_cnt).ok()?, done)
    }

    /// With what is known of this thread for [`namei`]; `None` if its live stack is not known.
    fn with_walker<T>(&self, ask: impl FnOnce(&namei::Walker<'_>) -> Option<T>) -> Option<T> {
        let (_, stack) = self.stack.as_ref()?;
        let directory = |fd| match fd {
            namei::AT_FDCWD => {
                self.follow(self.follow(self.ctx.task, "task_struct", "fs")?, "fs_struct", "pwd.dentry")
            }
            _ => self.follow(self.file_pointer(fd)?, "file", "f_path.dentry"),
        };
        ask(&namei::Walker {
            kernel: self.kernel,
            task: self.ctx.task,
            stack,
            registers: self.ctx.cpu_registers.map_or(&[], CpuRegisters::as_slice),
            now_ns: self.ctx.now.realtime_ns,
            path: &|addr| self.user_path(addr),
            directory: &directory,
            is_open: &|addr| self.open_files().contains(&addr),
        })
    }

    /// A path in the program's memory.
    fn user_path(&self, addr: u64) -> Option<Vec<u8>> {
        let mut path = Vec::new();
        while path.len() < namei::MAX_PATH {
            let at = addr.checked_add(path.len() as u64)?;
            let mut part = vec![0; (vmcore::PAGE_SIZE - at % vmcore::PAGE_SIZE) as usize];
            self.read_user(at, &mut part)?;
            let end = part.iter().position(|byte| *byte == 0);
            path.extend(&part[..end.unwrap_or(part.len())]);
            if end.is_some() {
                return Some(path);
            }
        }
        None
    }

    /// Reads the program's memory through its page tables.
    fn read_user(&self, addr: u64, bytes: &mut [u8]) -> Option<()> {
        let pgd = self
            .kernel
            .read_u64(self.task?.mm.wrapping_add(self.kernel.offset_of("mm_struct", "pgd").ok()?))
            .ok()?;
        let tables = self.kernel.page_tables(pgd).ok()?;
        let mut at = addr;
        let mut rest = bytes;
        while !rest.is_empty() {
            let in_page = (vmcore::PAGE_SIZE - at % vmcore::PAGE_SIZE) as usize;
            let (part, next) = rest.split_at_mut(in_page.min(rest.len()));
            self.kernel.vmcore().read_phys(tables.translate(at).ok()?, part).ok()?;
            at = at.checked_add(part.len() as u64)?;
            rest = next;
        }
        Some(())
    }

    fn try_user_words(&self, addr: u64, count: usize) -> Option<Vec<u64>> {
        let mut bytes = vec![0; count.checked_mul(8)?];
        self.read_user(addr, &mut bytes)?;
        Some(words(&bytes))
    }

    /// The `vm_area_struct` of the program's mapping at an address; `Some(None)` if there is none.
    fn mapping_at(&self, addr: u64) -> Option<Option<u64>> {
        let tree = self.task?.mm.wrapping_add(self.kernel.offset_of("mm_struct", "mm_mt").ok()?);
        let mut found = None;
        let walk = self.kernel.maple_for_each(tree, MAX_VMAS, |first, last, area| {
            if (first..=last).contains(&addr) {
                found = Some(area);
            }
            Ok(())
        });
        walk.ok().map(|()| found)
    }

    fn try_is_in_c_library(&self) -> Option<bool> {
        const NAMES: [&[u8]; 3] = [b"libc.so", b"ld-musl", b"libaio.so"];
        const LONGEST: usize = 16;
        let kernel = self.kernel;
        let area = self.mapping_at(self.ctx.registers.rip)??;
        let file = self.follow(area, "vm_area_struct", "vm_file")?;
        let dentry = self.follow(file, "file", "f_path.dentry")?;
        let name = kernel.read_cstr(self.follow(dentry, "dentry", "d_name.name")?, LONGEST).ok()?;
        Some(NAMES.iter().any(|known| name.starts_with(known)))
    }

    fn try_past_no_return(&self, filename: u64) -> Option<bool> {
        let task = self.task?;
        let group_exec = self.kernel.offset_of("signal_struct", "group_exec_task").ok()?;
        // Set while the other threads are being ended (de_thread(), fs/exec.c).
        if self.kernel.read_u64(task.signal.wrapping_add(group_exec)).ok()? != 0 {
            return Some(true);
        }
        // Not begun.
        if !task.in_execve {
            return Some(false);
        }
        if let Some(bprm) = exec::binprm(self.kernel, self.live()) {
            return Some(bprm.point_of_no_return);
        }
        // The next step replaces the address space: the old program is no longer where the registers point.
        let regs = self.ctx.registers;
        let mut whole = true;
        for addr in [regs.rip, regs.rsp, filename] {
            whole &= self.is_mapped(addr)?;
        }
        Some(!whole)
    }
}

impl Facts for Dead<'_> {
    fn file(&self, fd: i32) -> Option<File> {
        self.try_file(fd)
    }

    fn user_words(&self, addr: u64, count: usize) -> Option<Vec<u64>> {
        self.try_user_words(addr, count)
    }

    fn is_mapped(&self, addr: u64) -> Option<bool> {
        self.mapping_at(addr).map(|area| area.is_some())
    }

    fn is_in_c_library(&self) -> bool {
        self.try_is_in_c_library() == Some(true)
    }

    fn has_stack(&self) -> bool {
        self.stack.is_some()
    }

    fn transfer(&self, wanted: Wanted<'_>) -> Search {
        self.find_iterator(self.live(), wanted)
    }

    fn tty_sent(&self, file: u64, done: u64) -> Option<u64> {
        self.try_tty_sent(file, done)
    }

    fn expiry(&self) -> Option<Expiry> {
        let live = self.live();
        let timers = self.ctx.timers;
        let on_stack = || timers::on_stack(self.kernel, timers, self.ctx.task, live.base, live.words);
        timers.of_task(self.ctx.task).or_else(on_stack)
    }

    fn handed_over(&self, name: &str) -> Option<Handed> {
        handed::look(self.kernel, self.live(), self.ctx.task, name, self.ctx.wchan?)
    }

    fn sleeps(&self) -> bool {
        self.task.is_some_and(|task| task.state != TASK_RUNNING) && !self.ctx.on_cpu
    }

    fn futex_woken(&self) -> bool {
        let offset = |member| self.kernel.offset_of("futex_q", member).ok();
        let (Some(task), Some(lock_ptr), Some(bitset)) =
            (offset("task"), offset("lock_ptr"), offset("bitset"))
        else {
            return false;
        };
        let runs = self.task.is_some_and(|task| task.state == TASK_RUNNING) && !self.ctx.on_cpu;
        runs && futex_woken(self.live(), self.ctx.task, FutexQ { task, lock_ptr, bitset })
    }

    fn restart_block(&self) -> RestartBlock {
        let regs = self.ctx.registers;
        let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
        timers::restart_block(self.kernel, self.ctx.task, &args).unwrap_or(RestartBlock::Other)
    }

    fn is_removing_inode(&self) -> bool {
        // The return address alone may be left over from an earlier call.
        self.is_within("evict")
            && self.live().words.iter().any(|word| self.is_being_removed(*word).unwrap_or(false))
    }

    fn is_name_changed(&self, name: &str, call: &SyscallInFlight) -> Option<bool> {
        self.with_walker(|walker| walker.is_done(name, call))
    }

    fn place(&self) -> String {
        let symbol = self.ctx.instruction_pointer.and_then(|ip| self.kernel.symbolize(ip));
        symbol.map_or_else(String::new, |(name, offset)| format!(" (in {name}+{offset:#x})"))
    }

    fn has_made_file(&self, call: &SyscallInFlight, flags_arg: usize) -> Option<bool> {
        let path = flags_arg.checked_sub(1)?;
        let directory = path.checked_sub(1).map_or(namei::AT_FDCWD, |n| call.args[n] as i32);
        let given = namei::Given { directory, path: call.args[path] };
        self.with_walker(|walker| walker.has_made(given, call.args[flags_arg] as u32))
    }

    fn is_moving(&self, file: &File, write: bool) -> bool {
        // Others have parts of their own, whose callers may have left the stack.
        file.kind != Kind::Stream
            || !file.is_pipe
            || self.is_within(if write { "pipe_write" } else { "pipe_read" })
    }

    fn is_unaccounted(&self, file: &File, write: bool) -> bool {
        // fs/pipe.c and net/unix/af_unix.c, 6.1 and 6.12.
        let (function, copies): (&str, &[&str]) = match (file.is_pipe, file.kind == Kind::Socket, write) {
            (true, _, true) => ("pipe_write", &["copy_page_from_iter"]),
            (true, _, false) => ("pipe_read", &["copy_page_to_iter"]),
            (_, true, true) => {
                ("unix_stream_sendmsg", &["skb_copy_datagram_from_iter", "skb_splice_from_iter"])
            }
            (_, true, false) => ("unix_stream_read_generic", &[flow::INDIRECT]),
            _ => return false,
        };
        // There are other sockets.
        if !file.is_pipe && !self.is_within(function) {
            return false;
        }
        let offset = |structure, member| self.kernel.offset_of(structure, member).ok();
        let entry = match (file.is_pipe, write) {
            (true, _) => offset("pipe_buffer", "len").map(Entry::Store),
            (false, true) => Some(Entry::Call("skb_queue_tail")),
            // UNIXCB(skb).consumed.
            (false, false) => offset("sk_buff", "cb")
                .zip(offset("unix_skb_parms", "consumed"))
                .map(|(cb, consumed)| Entry::Sum(cb + consumed)),
        };
        let is_open = |entry| {
            let account = Account { function, copies, in_pieces: !file.is_pipe, entry };
            flow::is_open(self.kernel, self.ctx.frames, &account)
        };
        entry.and_then(is_open).unwrap_or(true)
    }

    fn phase(&self) -> Option<Phase> {
        flow::phase(self.kernel, self.ctx.frames, &flow::TO_THE_FILE).map(|(phase, _)| phase)
    }

    fn is_position_unmoved(&self) -> bool {
        let phase = flow::phase(self.kernel, self.ctx.frames, &flow::TO_THE_POSITION);
        matches!(phase, Some((Phase::Before | Phase::Within, _)))
    }

    fn transferred(&self, wanted: Wanted<'_>) -> Option<Progress> {
        self.stack.as_ref()?;
        let (Phase::After, place) = flow::phase(self.kernel, self.ctx.frames, &flow::TO_THE_FILE)? else {
            return None;
        };
        // The frames of what it has called lie below its own, with what they had in them.
        let base = place.sp.checked_sub(MAX_FRAME)?.max(self.ctx.stack.start) & !7;
        let len = self.ctx.stack.end.checked_sub(base).filter(|len| *len <= MAX_STACK)?;
        let words = words(&self.kernel.read_bytes(base, len as usize).ok()?);
        let Search::Found(progress) = self.find_iterator(Stack { base, words: &words }, wanted) else {
            return None;
        };
        // It is also what the call returns: a register has it, or, meanwhile, the live stack.
        let mut live = self.ctx.cpu_registers.into_iter().flatten().chain(self.live().words);
        live.any(|word| *word == progress.done).then_some(progress)
    }

    fn is_trigger(&self) -> bool {
        self.is_within("write_sysrq_trigger")
    }

    fn has_reaped(&self, awaited: Option<Pid>) -> Option<bool> {
        let exit_state = self.kernel.offset_of("task_struct", "exit_state").ok()?;
        let has_state = |child: &KnownTask, wanted: u32| {
            self.kernel.read_u32(child.addr.wrapping_add(exit_state)).is_ok_and(|state| state == wanted)
        };
        let tgid = self.task?.tgid;
        let mut children = self.ctx.tasks.iter().filter(|other| self.is_child(other, tgid));
        if self.is_within("release_task") {
            // Until it is off the lists it is as whole as before (__exit_signal(), kernel/exit.c), and the caller has been told nothing: it can be waited for
            // once more.
            let taken =
                |child: &KnownTask| has_state(child, EXIT_DEAD) && awaited.is_none_or(|pid| child.tid == pid);
            return children.any(taken).then_some(false);
        }
        if matches!(flow::phase(self.kernel, self.ctx.frames, &flow::TO_THE_CHILD), Some((Phase::Before, _)))
        {
            return Some(false);
        }
        // It goes to sleep, or comes back, when there is nothing to take (do_wait(), kernel/exit.c).
        let sleeps = |frame: &Place| {
            let symbol = self.kernel.symbolize(frame.address);
            symbol.is_some_and(|(name, _)| ["schedule", "add_wait_queue"].contains(&name))
        };
        if self.ctx.frames.iter().any(sleeps) {
            return Some(false);
        }
        // What it would take is still there.
        let left = match awaited {
            Some(pid) => children.any(|child| child.tid == pid),
            None => children.any(|child| has_state(child, EXIT_ZOMBIE)),
        };
        left.then_some(false)
    }

    fn child(&self, thread: bool) -> Option<Pid> {
        let task = self.task?;
        let is_own = |other: &KnownTask| match thread {
            true => other.tgid == task.tgid && other.addr != self.ctx.task,
            false => self.is_child(other, task.tgid),
        };
        let own = || self.ctx.tasks.iter().filter(|other| is_own(other));
        if let Some(awaited) = own().find(|other| self.ctx.stack.contains(&other.vfork_done)) {
            return awaited.started.then_some(awaited.tid);
        }
        let youngest = own().max_by_key(|other| other.start_boottime_ns)?;
        if !youngest.started {
            return None;
        }
        // kernel_clone() holds the child's address while it waits for a vfork to end.
        if self.live().words.contains(&youngest.addr) && !self.is_within("copy_process") {
            return Some(youngest.tid);
        }
        // A few instructions from waking the child to the end of the call.
        let recent = self.ctx.now.boottime_ns.saturating_sub(youngest.start_boottime_ns) < JUST_STARTED;
        (recent && self.is_within("kernel_clone") && !self.is_within("copy_process")).then_some(youngest.tid)
    }

    fn past_no_return(&self, filename: u64) -> Option<bool> {
        self.try_past_no_return(filename)
    }

    fn program(&self) -> Result<Exec, &'static str> {
        let bprm = exec::binprm(self.kernel, self.live()).ok_or("what it was cannot be told")?;
        exec::program(self.kernel, &bprm, self.task.map_or(0, |task| task.mm))
    }
}

impl Dead<'_> {
    fn find_iterator(&self, stack: Stack<'_>, wanted: Wanted<'_>) -> Search {
        let Ok(layout) = Layout::read(self.kernel) else { return Search::Contradiction };
        let read = |addr, count: usize| Some(words(&self.kernel.read_bytes(addr, count * 8).ok()?));
        iov_iter::find(&layout, stack, wanted, &read)
    }

    /// Whether a task is a process whose parent is a thread of the process `tgid`, to which this thread belongs.
    fn is_child(&self, other: &KnownTask, tgid: Pid) -> bool {
        other.tid == other.tgid && other.tgid != tgid && self.is_ours(other.parent, tgid)
    }

    /// Whether a return address into the function is on the live stack, or the CPU was in it.
    fn is_within(&self, function: &str) -> bool {
        let words = self.live().words.iter().chain(&self.ctx.instruction_pointer);
        let mut symbols = words.filter_map(|addr| self.kernel.symbolize(*addr));
        // A return address is never the first of its function.
        symbols.any(|(name, offset)| offset != 0 && name == function)
    }

    /// Whether an address is that of an inode in evict() (fs/inode.c): without names and references, not yet cleared.
    fn is_being_removed(&self, addr: u64) -> Option<bool> {
        if addr >> 63 == 0 || !addr.is_multiple_of(8) {
            return None;
        }
        let inode: DyingInode = self.kernel.read(addr).ok()?;
        let state = self.kernel.read_u32(inode.i_state).ok()?;
        // I_FREEING and I_CLEAR moved when i_state became a u32 (in 6.12; an unsigned long before).
        let (freeing, clear) = match self.kernel.member("inode", "i_state").ok()?.size {
            4 => (1 << 7, 1 << 8),
            _ => (1 << 5, 1 << 6),
        };
        let in_evict = state & (freeing | clear) == freeing && inode.i_nlink == 0 && inode.i_count == 0;
        // What else could look like that has no file system.
        let s_type = inode.i_sb.wrapping_add(self.kernel.offset_of("super_block", "s_type").ok()?);
        Some(in_evict && self.kernel.read_u64(s_type).ok()? >> 63 != 0)
    }

    /// A parent's address is that of a thread of the process (`real_parent` is the thread that called fork).
    fn is_ours(&self, parent: u64, tgid: Pid) -> bool {
        parent == self.ctx.task || self.ctx.tasks.iter().any(|task| task.addr == parent && task.tgid == tgid)
    }
}

/// The compiler moves parts of a function elsewhere, under names like `vfs_read.cold`.
fn is_part(name: &str, function: &str) -> bool {
    name.strip_prefix(function).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// By `task_struct.__state`: a signal would wake it. There may be more bits: readers of unix sockets may be frozen too
/// (TASK_FREEZABLE).
fn sleeps_interruptibly(state: u32) -> bool {
    state & TASK_INTERRUPTIBLE != 0
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

/// By `i_mode`, `i_rdev` (a `dev_t` with 20 bits of minor number) and the name of `f_op`.
fn kind_of(mode: u16, rdev: u32, operations: Option<&str>) -> Kind {
    const S_IFMT: u16 = 0o170_000;
    const S_IFSOCK: u16 = 0o140_000;
    const S_IFREG: u16 = 0o100_000;
    const S_IFBLK: u16 = 0o060_000;
    const S_IFDIR: u16 = 0o040_000;
    const S_IFCHR: u16 = 0o020_000;
    const MEM_MAJOR: u32 = 1;
    const KMSG_MINOR: u32 = 11;
    match mode & S_IFMT {
        S_IFREG | S_IFBLK | S_IFDIR => Kind::Positioned,
        S_IFSOCK => Kind::Socket,
        S_IFCHR => match operations {
            Some("tty_fops" | "console_fops" | "hung_up_tty_fops") => Kind::Tty,
            _ if rdev >> 20 == MEM_MAJOR && rdev & 0xf_ffff != KMSG_MINOR => Kind::Memory,
            _ => Kind::Stream,
        },
        _ => Kind::Stream,
    }
}

/// How much of `done` bytes n_tty_write() (drivers/tty/n_tty.c) has handed to the driver.
///
/// iterate_tty_write() (do_tty_write() in 6.1) copies a chunk into `tty_struct.write_buf`; the line discipline goes through it with
/// a pointer and a number of bytes left. Both are in registers that must be on the stack while it sleeps: words that
/// point into the chunk and words that say how much is left, which fit together in one way. `write_buf` and the size of the chunk are
/// always there, so a pair further on counts more.
fn tty_sent(stack: Stack<'_>, write_buf: u64, write_cnt: u64, done: u64) -> Option<u64> {
    // 2 KiB, or 64 KiB under TTY_NO_WRITE_SPLIT, for which the buffer then has been made larger.
    let chunk = if write_cnt > 2048 { 65536 } else { 2048 };
    let before = done.checked_sub(1)? / chunk * chunk;
    let size = done - before;
    let mut sent: Vec<u64> = stack
        .words
        .iter()
        .filter_map(|word| word.checked_sub(write_buf).filter(|sent| (1..=size).contains(sent)))
        .filter(|sent| stack.words.contains(&(size - sent)))
        .collect();
    sent.sort_unstable();
    sent.dedup();
    match sent[..] {
        [] => Some(before),
        [sent] => Some(before + sent),
        _ => None,
    }
}

/// Offsets in `struct futex_q` (kernel/futex/futex.h).
#[derive(Clone, Copy)]
struct FutexQ {
    task: u64,
    lock_ptr: u64,
    bitset: u64,
}

/// The waiter's `futex_q` is on its stack; whoever wakes it clears `lock_ptr` (futex_wake_mark(), kernel/futex/waitwake.c).
/// Remains of earlier waits look like that too: while the true one is queued, its `lock_ptr` is the address of a lock.
fn futex_woken(stack: Stack<'_>, task: u64, offsets: FutexQ) -> bool {
    let candidates = stack.addresses().filter_map(|at| {
        let member = |offset: u64| stack.word(at.wrapping_add(offset));
        let bitset = (member(offsets.bitset & !7)? >> ((offsets.bitset & 7) * 8)) as u32;
        let is_queue_entry = member(offsets.task)? == task && bitset == u32::MAX;
        is_queue_entry.then_some(member(offsets.lock_ptr)?)
    });
    let locks: Vec<u64> = candidates.collect();
    locks.contains(&0) && locks.iter().all(|lock| lock >> 63 == 0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::table::TABLE;
    use super::*;

    const NOW: Clocks = Clocks { realtime_ns: 5_000_000, monotonic_ns: 1_000, boottime_ns: 1_000 };

    /// A dead machine that says what it is told to.
    #[derive(Default)]
    struct Fake {
        files: HashMap<i32, File>,
        words: HashMap<u64, Vec<u64>>,
        mapped: Option<bool>,
        c_library: bool,
        no_stack: bool,
        search: Option<Search>,
        tty_sent: Option<u64>,
        expiry: Option<Expiry>,
        woken: bool,
        handed: Option<Handed>,
        sleeps: bool,
        block: Option<RestartBlock>,
        removing: bool,
        renamed: Option<bool>,
        made: Option<bool>,
        reaping: bool,
        trigger: bool,
        /// The iterator is an earlier call's.
        leftover: bool,
        unaccounted: bool,
        phase: Option<Phase>,
        transferred: Option<Progress>,
        child: Option<Pid>,
        past: Option<bool>,
        program: Option<Exec>,
    }

    impl Facts for Fake {
        fn file(&self, fd: i32) -> Option<File> {
            self.files.get(&fd).copied()
        }
        fn user_words(&self, addr: u64, count: usize) -> Option<Vec<u64>> {
            self.words.get(&addr).filter(|words| words.len() == count).cloned()
        }
        fn is_mapped(&self, _: u64) -> Option<bool> {
            self.mapped
        }
        fn is_in_c_library(&self) -> bool {
            self.c_library
        }
        fn has_stack(&self) -> bool {
            !self.no_stack
        }
        fn transfer(&self, _: Wanted<'_>) -> Search {
            self.search.unwrap_or(Search::Nothing)
        }
        fn tty_sent(&self, _: u64, _: u64) -> Option<u64> {
            self.tty_sent
        }
        fn expiry(&self) -> Option<Expiry> {
            self.expiry
        }
        fn handed_over(&self, _: &str) -> Option<Handed> {
            self.handed
        }
        fn sleeps(&self) -> bool {
            self.sleeps
        }
        fn futex_woken(&self) -> bool {
            self.woken
        }
        fn restart_block(&self) -> RestartBlock {
            self.block.unwrap_or(RestartBlock::Other)
        }
        fn is_removing_inode(&self) -> bool {
            self.removing
        }
        fn is_name_changed(&self, _: &str, _: &SyscallInFlight) -> Option<bool> {
            self.renamed
        }
        fn place(&self) -> String {
            String::new()
        }
        fn has_made_file(&self, _: &SyscallInFlight, _: usize) -> Option<bool> {
            self.made
        }
        fn is_moving(&self, _: &File, _: bool) -> bool {
            !self.leftover
        }
        fn is_unaccounted(&self, _: &File, _: bool) -> bool {
            self.unaccounted
        }
        fn phase(&self) -> Option<Phase> {
            self.phase
        }
        fn is_position_unmoved(&self) -> bool {
            matches!(self.phase, Some(Phase::Before | Phase::Within))
        }
        fn transferred(&self, _: Wanted<'_>) -> Option<Progress> {
            self.transferred
        }
        fn is_trigger(&self) -> bool {
            self.trigger
        }
        fn has_reaped(&self, _: Option<Pid>) -> Option<bool> {
            (!self.reaping).then_some(false)
        }
        fn child(&self, _: bool) -> Option<Pid> {
            self.child
        }
        fn past_no_return(&self, _: u64) -> Option<bool> {
            self.past
        }
        fn program(&self) -> Result<Exec, &'static str> {
            self.program.clone().ok_or("nobody knows")
        }
    }

    impl Fake {
        fn with_file(kind: Kind, append: bool, size: i64) -> Fake {
            let addr = 0xffff_8880_0000_1000;
            let file = File {
                addr,
                kind,
                append,
                size,
                position: 0,
                is_pipe: false,
                is_message_socket: false,
                waits_for_first: false,
            };
            Fake { files: HashMap::from([(0, file), (1, file)]), ..Fake::default() }
        }

        fn found(self, done: u64, total: u64, ki_pos: i64) -> Fake {
            Fake { search: Some(Search::Found(Progress { done, total, ki_pos: Some(ki_pos) })), ..self }
        }
    }

    fn nr(name: &str) -> i64 {
        TABLE.iter().find(|row| row.name == name).map(|row| row.nr).expect("such a call")
    }

    fn thread(name: &str, args: &[u64]) -> Thread {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        let call = SyscallInFlight { nr: nr(name), args: all };
        Thread { call, result: -ENOSYS, compat: false, panicked: false, on_cpu: false, now: NOW }
    }

    fn go(thread: &Thread, facts: &Fake) -> Resume {
        decide(thread, facts).1
    }

    fn on_cpu(thread: Thread) -> Thread {
        Thread { on_cpu: true, ..thread }
    }

    fn is_impossible(resume: &Resume) -> bool {
        matches!(resume, Resume::Impossible { .. })
    }

    fn returns(resume: &Resume) -> Option<i64> {
        match resume {
            Resume::Return { value, why } if !why.is_empty() => Some(*value),
            _ => None,
        }
    }

    fn left(resume: &Resume) -> Option<i64> {
        match resume {
            Resume::RestartTimed { remaining_ns, .. } => Some(*remaining_ns),
            _ => None,
        }
    }

    fn at(ns: i64) -> Fake {
        Fake { expiry: Some(Expiry::monotonic(ns)), ..Fake::default() }
    }

    #[test]
    fn what_the_other_side_does_not_know_of_is_not_finished() {
        for (unaccounted, on_cpu, phase, expected) in [
            (true, true, None, None),
            (false, true, None, Some(40)),
            (true, false, None, Some(40)),
            (true, true, Some(Phase::After), Some(40)),
        ] {
            let fake = Fake { unaccounted, phase, ..Fake::with_file(Kind::Stream, false, 0) };
            let fake = fake.found(40, 100, 0);
            for name in ["read", "write"] {
                let resume = go(&Thread { on_cpu, ..thread(name, &[0, 0x1000, 100]) }, &fake);
                assert_eq!(returns(&resume), expected, "{name}");
                assert_eq!(is_impossible(&resume), expected.is_none(), "{name}");
            }
        }
    }

    #[test]
    fn what_somebody_else_has_done_is_not_done_again() {
        let of = |name: &str, on_cpu, handed, sleeps| {
            let fake = Fake { handed, sleeps, ..Fake::default() };
            go(&Thread { on_cpu, ..thread(name, &[]) }, &fake)
        };
        for name in ["semop", "semtimedop", "msgrcv", "mq_timedreceive", "mq_timedsend"] {
            assert_eq!(of(name, false, Some(Handed::Waiting), true), Resume::Restart, "{name}");
            let done = of(name, false, Some(Handed::Done(-43)), false);
            assert_eq!(returns(&done), Some(-43), "{name}");
            assert!(is_impossible(&of(name, false, Some(Handed::Message), false)), "{name}");
            assert!(is_impossible(&of(name, false, None, false)), "{name}: preempted");
            assert!(is_impossible(&of(name, true, None, false)), "{name}: on a CPU");
        }
        assert_eq!(of("msgsnd", false, None, true), Resume::Restart, "waits for room");
        assert!(is_impossible(&of("msgrcv", false, None, true)), "it may be copying it out");
    }

    #[test]
    fn who_may_be_frozen_sleeps_too() {
        const TASK_FREEZABLE: u32 = 0x2000;
        const TASK_KILLABLE: u32 = 0x102;
        assert!(sleeps_interruptibly(1) && sleeps_interruptibly(1 | TASK_FREEZABLE));
        assert!(!sleeps_interruptibly(0) && !sleeps_interruptibly(TASK_KILLABLE));
    }

    #[test]
    fn ax_says_how_far_a_call_was() {
        let with = |result| go(&Thread { result, ..thread("accept", &[]) }, &Fake::default());
        for finished in [0, 7, -4, -11, i64::MIN + 1] {
            assert_eq!(with(finished), Resume::Finished);
        }
        for interrupted in [-512, -513, -514, -38] {
            assert_eq!(with(interrupted), Resume::Restart);
        }
    }

    #[test]
    fn other_abis_and_unknown_numbers_are_refused() {
        let fake = Fake::default();
        assert!(is_impossible(&go(&Thread { compat: true, ..thread("read", &[]) }, &fake)));
        for number in [X32 | 1, 5000] {
            let call = SyscallInFlight { nr: number, args: [0; 6] };
            assert!(is_impossible(&go(&Thread { call, ..thread("read", &[]) }, &fake)), "{number}");
        }
        for refused in ["io_submit", "io_uring_enter", "ptrace", "mount", "init_module"] {
            assert!(is_impossible(&go(&thread(refused, &[]), &fake)), "{refused}");
        }
    }

    #[test]
    fn waits_are_begun_anew() {
        for call in [
            "wait4",
            "accept",
            "pause",
            "rt_sigsuspend",
            "flock",
            "futex_waitv",
            "fsync",
            "munmap",
            "openat",
            "getpid",
        ] {
            assert_eq!(go(&thread(call, &[]), &Fake::default()), Resume::Restart, "{call}");
        }
    }

    #[test]
    fn sleeps_keep_the_time_that_was_left() {
        assert_eq!(left(&go(&thread("nanosleep", &[0x1000]), &at(1_700))), Some(700));
        assert_eq!(left(&go(&thread("nanosleep", &[0x1000]), &at(900))), Some(-100), "already over");
        assert_eq!(
            go(&thread("nanosleep", &[0x1000]), &Fake::default()),
            Resume::Restart,
            "timer not set yet"
        );
        let realtime = Fake { expiry: Some(Expiry { clock: 0, ns: 5_000_250 }), ..Fake::default() };
        assert_eq!(left(&go(&thread("clock_nanosleep", &[0, 0, 0x1000]), &realtime)), Some(250));
        assert_eq!(go(&thread("clock_nanosleep", &[1, 1, 0x1000]), &at(1_700)), Resume::Restart, "absolute");
        let cpu_time = |rmtp| go(&thread("clock_nanosleep", &[2, 0, 0x1000, rmtp]), &Fake::default());
        assert_eq!(returns(&cpu_time(0)), Some(-EINTR));
        assert!(is_impossible(&cpu_time(0x2000)), "the time left would have to be written there");
    }

    #[test]
    fn poll_and_futex_keep_the_time_that_was_left() {
        let poll = |timeout: i32| go(&thread("poll", &[0x1000, 1, timeout as u32 as u64]), &at(4_000));
        assert_eq!(left(&poll(10)), Some(3_000));
        assert_eq!(poll(-1), Resume::Restart);
        assert_eq!(poll(0), Resume::Restart);
        let unknown = Fake { expiry: Some(Expiry { clock: 99, ns: 4_000 }), ..Fake::default() };
        assert_eq!(
            returns(&go(&thread("poll", &[0x1000, 1, 10]), &unknown)),
            Some(-EINTR),
            "a damaged timer"
        );
        let futex = |op, timeout| go(&thread("futex", &[0x1000, op, 0, timeout]), &at(4_000));
        assert_eq!(left(&futex(128, 0x2000)), Some(3_000), "FUTEX_WAIT_PRIVATE: relative");
        assert_eq!(futex(128, 0), Resume::Restart);
        assert_eq!(futex(9 | 128 | 256, 0x2000), Resume::Restart, "FUTEX_WAIT_BITSET: absolute");
        assert_eq!(futex(1, 0), Resume::Restart, "FUTEX_WAKE");
        assert!(
            is_impossible(&go(&on_cpu(thread("futex", &[0x1000, 5])), &Fake::default())),
            "FUTEX_WAKE_OP"
        );
        let woken = Fake { woken: true, ..at(4_000) };
        assert_eq!(returns(&go(&thread("futex", &[0x1000, 128]), &woken)), Some(0));
    }

    #[test]
    fn select_gets_its_timeout_updated_in_place() {
        let args = [1, 2, 3, 4, 0x5000, 0];
        let updated =
            |timeval, remaining_ns| Resume::RestartUpdated { timeout_addr: 0x5000, timeval, remaining_ns };
        assert_eq!(go(&thread("select", &args), &at(1_500)), updated(true, 500));
        assert_eq!(go(&thread("pselect6", &args), &at(1_500)), updated(false, 500));
        assert_eq!(go(&thread("pselect6", &args), &at(1)), updated(false, 0), "never negative");
        assert_eq!(go(&thread("ppoll", &[1, 1, 0x5000]), &at(1_500)), updated(false, 500));
        assert_eq!(go(&thread("select", &[1, 2, 3, 4, 0]), &at(1_500)), Resume::Restart, "no timeout");
    }

    #[test]
    fn a_timeout_is_shortened_where_the_register_does_not_matter_else_the_wait_is_interrupted() {
        let epoll = |name, timeout: i64| go(&thread(name, &[3, 0x1000, 8, timeout as u64]), &Fake::default());
        assert_eq!(epoll("epoll_wait", -1), Resume::Restart);
        assert_eq!(epoll("epoll_wait", 0xffff_ffff), Resume::Restart, "an int");
        assert_eq!(returns(&epoll("epoll_wait", 100)), Some(-EINTR));
        assert_eq!(returns(&epoll("epoll_pwait", 100)), Some(-EINTR));
        assert_eq!(returns(&epoll("epoll_pwait2", 0x2000)), Some(-EINTR));
        assert_eq!(epoll("epoll_pwait2", 0), Resume::Restart);
        let wait = |timeout| go(&thread("rt_sigtimedwait", &[0x1000, 0, timeout, 8]), &Fake::default());
        assert_eq!(wait(0), Resume::Restart);
        assert_eq!(returns(&wait(0x2000)), Some(-EINTR));
        let in_library = Fake { c_library: true, expiry: Some(Expiry::monotonic(1_300)), ..Fake::default() };
        let shortened =
            |argument, timespec| Resume::RestartShortened { argument, timespec, remaining_ns: 300 };
        let go = |name, args: &[u64]| go(&thread(name, args), &in_library);
        assert_eq!(go("epoll_pwait", &[3, 0x1000, 8, 100]), shortened(3, false));
        assert_eq!(go("epoll_pwait2", &[3, 0x1000, 8, 0x2000]), shortened(3, true));
        assert_eq!(go("rt_sigtimedwait", &[0x1000, 0, 0x2000, 8]), shortened(2, true));
        assert_eq!(go("epoll_wait", &[3, 0x1000, 8, u64::MAX]), Resume::Restart);
    }

    #[test]
    fn restart_blocks_name_the_call_and_its_time() {
        let restart = |args: &[u64], block| {
            let fake = Fake { block: Some(block), ..Fake::default() };
            decide(&thread("restart_syscall", args), &fake)
        };
        let until = Expiry::monotonic(1_300);
        let (call, how) = restart(&[0x7000, 0x7100], RestartBlock::Nanosleep { until, rmtp: 0 });
        assert_eq!((call.nr, left(&how)), (NR_NANOSLEEP, Some(300)));
        let Resume::RestartTimed { call: again, .. } = how else { panic!("{how:?}") };
        assert_eq!(again, call, "never restart_syscall itself");
        let (call, how) = restart(&[1, 0, 0x7000, 0x7100], RestartBlock::Nanosleep { until, rmtp: 0x7100 });
        assert_eq!((call.nr, left(&how)), (NR_CLOCK_NANOSLEEP, Some(300)));
        let (call, how) = restart(&[0x7000, 1, 400], RestartBlock::Poll(Some(until)));
        assert_eq!((call.nr, left(&how)), (NR_POLL, Some(300)));
        let (call, how) = restart(&[0x7000, 1, 0xffff_ffff], RestartBlock::Poll(None));
        assert_eq!((call.nr, how), (NR_POLL, Resume::Restart));
        let (call, how) = restart(&[0x7000, 128, 1, 0x7100], RestartBlock::Futex { until_ns: 1_300 });
        assert_eq!((call.nr, left(&how)), (NR_FUTEX, Some(300)));
        let (call, how) = restart(&[0x7000, 137, 1, 0x7100], RestartBlock::Futex { until_ns: 1_300 });
        assert_eq!((call.nr, how), (NR_FUTEX, Resume::Restart));
        assert_eq!(returns(&restart(&[], RestartBlock::Other).1), Some(-EINTR));
        // The same while it is stopped and has not been restarted yet.
        let stopped = Thread { result: -ERESTART_RESTARTBLOCK, ..thread("nanosleep", &[0x7000]) };
        let fake = Fake { block: Some(RestartBlock::Nanosleep { until, rmtp: 0 }), ..Fake::default() };
        assert_eq!(left(&go(&stopped, &fake)), Some(300));
        let cpu_time = RestartBlock::Nanosleep { until: Expiry { clock: -6, ns: 1 }, rmtp: 0x7100 };
        assert!(is_impossible(&go(&stopped, &Fake { block: Some(cpu_time), ..Fake::default() })));
    }

    #[test]
    fn files_with_a_position_are_read_and_written_again() {
        for (call, args) in
            [("read", [1, 0x1000, 5000]), ("write", [1, 0x1000, 5000]), ("writev", [1, 0x1000, 2])]
        {
            let fake = Fake::with_file(Kind::Positioned, false, 100).found(4096, 5000, 100);
            assert_eq!(go(&thread(call, &args), &fake), Resume::Restart, "{call}");
            let lost = Fake { no_stack: true, ..fake };
            assert!(is_impossible(&go(&on_cpu(thread(call, &args)), &lost)), "{call} may have moved it");
        }
        let null = Fake { no_stack: true, ..Fake::with_file(Kind::Memory, false, 0) };
        assert_eq!(go(&on_cpu(thread("write", &[1, 0x1000, 5000])), &null), Resume::Restart);
    }

    #[test]
    fn streams_give_and_take_each_byte_once() {
        let pipe = || Fake::with_file(Kind::Stream, false, 0);
        for name in ["read", "write"] {
            let call = || thread(name, &[1, 0x1000, 5000]);
            assert_eq!(go(&call(), &pipe().found(0, 5000, 0)), Resume::Restart);
            assert_eq!(returns(&go(&call(), &pipe().found(4096, 5000, 0))), Some(4096));
            assert_eq!(returns(&go(&on_cpu(call()), &pipe().found(5000, 5000, 0))), Some(5000));
            assert_eq!(go(&call(), &pipe()), Resume::Restart, "it waits and has not begun");
            assert!(is_impossible(&go(&on_cpu(call()), &pipe())), "before or after");
            let doubtful = Fake { search: Some(Search::Contradiction), ..pipe() };
            assert!(is_impossible(&go(&call(), &doubtful)));
            assert!(is_impossible(&go(&on_cpu(call()), &Fake { no_stack: true, ..pipe() })));
            assert!(is_impossible(&go(&call(), &Fake::default())), "descriptor closed meanwhile");
        }
    }

    #[test]
    fn messages_go_out_whole_or_not_at_all() {
        let mut datagram = Fake::with_file(Kind::Socket, false, 0).found(100, 100, 0);
        datagram.files.values_mut().for_each(|file| file.is_message_socket = true);
        let send = || thread("sendto", &[1, 0x1000, 100]);
        assert_eq!(go(&send(), &datagram), Resume::Restart, "copied, and waits for room");
        assert!(is_impossible(&go(&on_cpu(send()), &datagram)));
        let doubtful = Fake { search: Some(Search::Contradiction), ..datagram };
        assert_eq!(go(&send(), &doubtful), Resume::Restart, "whatever the stack says");
        let stream = Fake::with_file(Kind::Socket, false, 0).found(60, 100, 0);
        assert_eq!(returns(&go(&send(), &stream)), Some(60));
    }

    #[test]
    fn a_reader_that_waits_for_the_first_byte_has_none() {
        let mut socket =
            Fake { search: Some(Search::Contradiction), ..Fake::with_file(Kind::Socket, false, 0) };
        let read = || thread("read", &[1, 0x1000, 100]);
        let receive = |flags| thread("recvfrom", &[1, 0x1000, 100, flags]);
        assert!(is_impossible(&go(&read(), &socket)));
        socket.files.values_mut().for_each(|file| file.waits_for_first = true);
        assert_eq!(go(&read(), &socket), Resume::Restart);
        assert_eq!(go(&receive(0x40), &socket), Resume::Restart);
        assert!(is_impossible(&go(&receive(MSG_WAITALL), &socket)));
        assert!(is_impossible(&go(&thread("write", &[1, 0x1000, 100]), &socket)));
    }

    #[test]
    fn appends_are_finished_as_far_as_the_file_has_grown() {
        let call = || thread("write", &[1, 0x1000, 9000]);
        let log = |size, done| Fake::with_file(Kind::Positioned, true, size).found(done, 9000, 100);
        assert_eq!(go(&call(), &log(100, 0)), Resume::Restart);
        assert_eq!(returns(&go(&call(), &log(4196, 4096))), Some(4096));
        assert_eq!(returns(&go(&call(), &log(9100, 9000))), Some(9000));
        // On a CPU the size may be behind the iterator, and counts.
        assert_eq!(returns(&go(&on_cpu(call()), &log(4196, 8192))), Some(4096));
        assert_eq!(go(&on_cpu(call()), &log(100, 4096)), Resume::Restart);
        assert!(is_impossible(&go(&on_cpu(call()), &log(100, 9000))), "all or nothing");
        assert!(is_impossible(&go(&on_cpu(call()), &log(50, 4096))), "shrunk");
        assert_eq!(returns(&go(&call(), &log(i64::MIN, 4096))), Some(4096));
        let plain = Fake::with_file(Kind::Positioned, false, 4196).found(4096, 9000, 100);
        let flagged = thread("pwritev2", &[1, 0x1000, 1, 0, 0, RWF_APPEND]);
        assert_eq!(returns(&go(&flagged, &plain)), Some(4096));
    }

    #[test]
    fn a_position_that_has_moved_does_not_move_again() {
        let end = 1100;
        let progress = |done| Some(Progress { done, total: 100, ki_pos: Some(end) });
        let at = |position, phase, transferred| {
            let mut fake = Fake { phase, transferred, ..Fake::with_file(Kind::Positioned, false, 0) };
            fake.files.values_mut().for_each(|file| file.position = position);
            fake
        };
        let after = |position, transferred| at(position, Some(Phase::After), transferred);
        for name in ["read", "write", "readv", "writev", "preadv2", "pwritev2"] {
            let call = || on_cpu(thread(name, &[1, 0x1000, 100, u64::MAX]));
            for phase in [Phase::Before, Phase::Within] {
                assert_eq!(go(&call(), &at(1000, Some(phase), None)), Resume::Restart, "{name}");
            }
            assert_eq!(returns(&go(&call(), &after(end, progress(100)))), Some(100), "{name}");
            assert_eq!(returns(&go(&call(), &after(end, progress(40)))), Some(40), "{name}");
            assert_eq!(go(&call(), &after(1000, progress(100))), Resume::Restart, "not yet");
            assert!(is_impossible(&go(&call(), &after(1040, progress(100)))), "somebody else's doing");
            assert_eq!(go(&call(), &after(end, progress(0))), Resume::Restart, "nothing to repeat");
            assert!(is_impossible(&go(&call(), &after(end, None))));
            assert!(is_impossible(&go(&call(), &at(end, None, None))), "its stack is lost");
            assert_eq!(go(&Thread { on_cpu: false, ..call() }, &at(end, None, None)), Resume::Restart);
        }
        for name in ["pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2"] {
            let call = on_cpu(thread(name, &[1, 0x1000, 100, 4096]));
            assert_eq!(go(&call, &after(end, None)), Resume::Restart, "{name} has a place of its own");
        }
        for name in ["getdents", "getdents64"] {
            let call = || on_cpu(thread(name, &[1, 0x1000, 100]));
            assert_eq!(go(&call(), &at(end, Some(Phase::Within), None)), Resume::Restart);
            assert!(is_impossible(&go(&call(), &after(end, None))));
            assert_eq!(go(&Thread { on_cpu: false, ..call() }, &after(end, None)), Resume::Restart);
        }
    }

    #[test]
    fn terminals_have_printed_what_their_driver_took() {
        let call = || thread("write", &[1, 0x1000, 5000]);
        let tty = |tty_sent| Fake { tty_sent, ..Fake::with_file(Kind::Tty, false, 0).found(2048, 5000, 0) };
        assert_eq!(returns(&go(&call(), &tty(Some(100)))), Some(100));
        assert_eq!(go(&call(), &tty(Some(0))), Resume::Restart);
        assert_eq!(returns(&go(&call(), &tty(None))), Some(2048));
        assert_eq!(returns(&go(&on_cpu(call()), &tty(Some(0)))), Some(2048));
        let read = thread("read", &[1, 0x1000, 5000]);
        assert_eq!(returns(&go(&read, &tty(Some(100)))), Some(2048), "reading is another thing");
    }

    #[test]
    fn the_call_that_killed_the_kernel_is_like_others_on_a_cpu() {
        let died = |name, args: &[u64], fake: &Fake| {
            go(&on_cpu(Thread { panicked: true, ..thread(name, args) }), fake)
        };
        for row in TABLE {
            let how = died(row.name, &[1; 6], &Fake::default());
            assert!(!is_impossible(&how), "{}: it fails rather than end its process: {how:?}", row.name);
        }
        let within = Some(Phase::Within);
        let file = || Fake { phase: within, ..Fake::with_file(Kind::Positioned, false, 0) };
        let pipe = || Fake { leftover: true, ..Fake::with_file(Kind::Stream, false, 0) };
        assert_eq!(died("write", &[1, 0x1000, 2], &file()), Resume::Restart);
        assert_eq!(returns(&died("write", &[1, 0x1000, 2], &pipe())), Some(-EIO), "who knows");
        let trigger = Fake { trigger: true, ..file() };
        assert_eq!(returns(&died("write", &[1, 0x1000, 2], &trigger)), Some(2));
        let vector = Fake { words: HashMap::from([(0x1000, vec![0x2000, 3, 0x3000, 4])]), ..trigger };
        assert_eq!(returns(&died("writev", &[1, 0x1000, 2], &vector)), Some(7));
        assert_eq!(died("read", &[1, 0x1000, 2], &vector), Resume::Restart);
        assert_eq!(died("exit_group", &[3], &vector), Resume::Restart);
    }

    #[test]
    fn data_between_files_is_moved_again_only_where_positions_tell() {
        let file = |kind, append| File {
            addr: 1,
            kind,
            append,
            size: 0,
            position: 0,
            is_pipe: false,
            is_message_socket: false,
            waits_for_first: false,
        };
        let ends =
            |input, output| Fake { files: HashMap::from([(3, input), (4, output)]), ..Fake::default() };
        let (regular, stream) = (file(Kind::Positioned, false), file(Kind::Stream, false));
        let sendfile = |fake: &Fake| go(&thread("sendfile", &[4, 3, 0, 9]), fake);
        assert_eq!(sendfile(&ends(regular, regular)), Resume::Restart);
        assert!(is_impossible(&sendfile(&ends(regular, stream))));
        assert!(is_impossible(&sendfile(&ends(regular, file(Kind::Positioned, true)))));
        let splice = thread("splice", &[3, 0, 4, 0, 9]);
        assert_eq!(go(&splice, &ends(stream, stream)), Resume::Restart);
        assert!(is_impossible(&go(&on_cpu(splice), &ends(stream, stream))));
        assert!(is_impossible(&go(&splice, &ends(stream, file(Kind::Tty, false)))));
        let copy = || thread("copy_file_range", &[3, 0, 4, 0, 9]);
        assert_eq!(go(&copy(), &ends(regular, regular)), Resume::Restart);
        for (phase, again) in [(Some(Phase::Within), true), (Some(Phase::After), false), (None, false)] {
            let moved = |output| Fake { phase, ..ends(regular, output) };
            for output in [regular, file(Kind::Memory, false)] {
                assert_eq!(go(&on_cpu(copy()), &moved(output)) == Resume::Restart, again, "{phase:?}");
            }
        }
        assert!(is_impossible(&go(&thread("sendmmsg", &[3, 0x1000, 2]), &Fake::default())));
    }

    #[test]
    fn a_child_that_runs_was_forked() {
        for call in ["fork", "vfork", "clone", "clone3"] {
            assert_eq!(go(&thread(call, &[0; 6]), &Fake::default()), Resume::Restart);
            let child = Fake { child: Some(77), ..Fake::default() };
            assert_eq!(returns(&go(&thread(call, &[0; 6]), &child)), Some(77));
        }
    }

    #[test]
    fn exec_goes_back_only_while_the_old_program_is_whole() {
        for call in ["execve", "execveat"] {
            let with = |past| go(&thread(call, &[0x1000]), &Fake { past, ..Fake::default() });
            assert_eq!(with(Some(false)), Resume::Restart);
            assert!(is_impossible(&with(Some(true))));
            assert!(is_impossible(&with(None)));
            let program = Exec { filename: "/bin/true".into(), ..Exec::default() };
            let known = Fake { past: Some(true), program: Some(program.clone()), ..Fake::default() };
            assert_eq!(go(&thread(call, &[0x1000]), &known), Resume::Exec(program));
        }
    }

    #[test]
    fn on_a_cpu_the_code_says_on_which_side_of_the_file_a_transfer_was() {
        let read = on_cpu(thread("read", &[0, 0x1000, 100]));
        let edge = |phase, transferred: Option<u64>| {
            let transferred = transferred.map(|done| Progress { done, total: 100, ki_pos: None });
            Fake { phase, transferred, leftover: true, ..Fake::with_file(Kind::Stream, false, 0) }
        };
        assert_eq!(go(&read, &edge(Some(Phase::Before), None)), Resume::Restart);
        assert_eq!(
            go(&read, &edge(Some(Phase::Before), None).found(40, 100, 0)),
            Resume::Restart,
            "an earlier one's"
        );
        assert_eq!(returns(&go(&read, &edge(Some(Phase::After), None).found(40, 100, 0))), Some(40));
        assert!(is_impossible(&go(&read, &edge(Some(Phase::Within), None).found(40, 100, 0))));
        assert!(is_impossible(&go(&read, &edge(None, None))));
        assert_eq!(returns(&go(&read, &edge(Some(Phase::After), Some(40)))), Some(40), "what is left of it");
        assert_eq!(go(&read, &edge(Some(Phase::After), Some(0))), Resume::Restart);
        assert_eq!(go(&thread("read", &[0, 0x1000, 100]), &edge(None, None)), Resume::Restart, "it waits");
    }

    #[test]
    fn the_rest_of_the_deciders() {
        assert_eq!(go(&thread("exit", &[258]), &Fake::default()), Resume::Restart);
        let open = Fake::with_file(Kind::Stream, false, 0);
        assert_eq!(go(&thread("close", &[1]), &open), Resume::Restart);
        assert_eq!(returns(&go(&thread("close", &[9]), &open)), Some(0));
        assert_eq!(go(&thread("unlink", &[1]), &open), Resume::Restart);
        assert!(is_impossible(&go(&on_cpu(thread("rename", &[1])), &open)), "done or not");
        for call in ["rename", "mkdirat", "unlink"] {
            let told = |renamed| Fake { renamed: Some(renamed), ..Fake::default() };
            for on_cpu in [false, true] {
                let thread = Thread { on_cpu, ..thread(call, &[1]) };
                assert_eq!(returns(&go(&thread, &told(true))), Some(0));
                assert_eq!(go(&thread, &told(false)), Resume::Restart);
            }
        }
        let evicting = Fake { removing: true, ..Fake::default() };
        assert_eq!(returns(&go(&thread("unlinkat", &[1]), &evicting)), Some(0));
        assert_eq!(returns(&go(&on_cpu(thread("unlinkat", &[1])), &evicting)), Some(0));
        let exclusive = [0xffff_ffff_ffff_ff9c, 1, 0o302];
        assert_eq!(go(&thread("openat", &exclusive), &open), Resume::Restart, "waits before it makes it");
        assert!(is_impossible(&go(&on_cpu(thread("openat", &exclusive)), &open)));
        let made = |made, c_library| Fake { made: Some(made), c_library, ..Fake::default() };
        let open_on_cpu = |fake: &Fake| go(&on_cpu(thread("openat", &exclusive)), fake);
        assert_eq!(open_on_cpu(&made(false, false)), Resume::Restart);
        assert_eq!(open_on_cpu(&made(true, true)), Resume::RestartChanged { argument: 2, value: 0o102 });
        assert!(is_impossible(&open_on_cpu(&made(true, false))), "others may look at the register again");
        assert_eq!(go(&on_cpu(thread("openat", &[1, 1, 0o102])), &open), Resume::Restart, "either way");
        let reaping = Fake { reaping: true, ..Fake::default() };
        assert!(is_impossible(&go(&on_cpu(thread("wait4", &[1])), &reaping)));
        assert_eq!(go(&on_cpu(thread("wait4", &[1])), &open), Resume::Restart);
        assert_eq!(go(&on_cpu(thread("lseek", &[1, 0, 1])), &open), Resume::Restart, "asks only");
        assert_eq!(go(&thread("lseek", &[1, 9, 1]), &open), Resume::Restart, "waits for the lock");
        assert!(is_impossible(&go(&on_cpu(thread("lseek", &[1, 9, 1])), &open)));
        let remap = |mapped| go(&thread("mremap", &[0x1000]), &Fake { mapped, ..Fake::default() });
        assert_eq!(remap(Some(true)), Resume::Restart);
        assert!(is_impossible(&remap(Some(false))) && is_impossible(&remap(None)));
    }

    #[test]
    fn descriptors_lead_to_kinds() {
        assert_eq!(kind_of(0o100_644, 0, Some("ext4_file_operations")), Kind::Positioned);
        assert_eq!(kind_of(0o010_600, 0, Some("pipefifo_fops")), Kind::Stream);
        assert_eq!(kind_of(0o140_777, 0, Some("socket_file_ops")), Kind::Socket);
        assert_eq!(kind_of(0o020_620, 4 << 20 | 64, Some("tty_fops")), Kind::Tty);
        assert_eq!(kind_of(0o020_666, 1 << 20 | 3, Some("null_fops")), Kind::Memory);
        assert_eq!(kind_of(0o020_666, 1 << 20 | 11, Some("kmsg_fops")), Kind::Stream);
        assert_eq!(kind_of(0, 0, Some("eventfd_fops")), Kind::Stream);
    }

    const STACK: u64 = 0xffff_c900_0000_3000;

    fn stack(words: &[u64]) -> Stack<'_> {
        Stack { base: STACK, words }
    }

    #[test]
    fn a_terminals_chunk_is_counted_by_pointer_and_rest() {
        let buffer = 0xffff_8880_0040_0000;
        let sent = |words: &[u64], cnt, done| tty_sent(stack(words), buffer, cnt, done);
        // 2048 bytes taken, 1500 of them printed.
        assert_eq!(sent(&[3, buffer, 2048, buffer + 1500, 548], 2048, 2048), Some(1500));
        assert_eq!(sent(&[3, buffer, 2048], 2048, 2048), Some(0), "the chunk is still whole");
        assert_eq!(sent(&[3, buffer, 952, buffer + 52, 900], 2048, 3000), Some(2100), "the second chunk");
        assert_eq!(sent(&[buffer + 52, 5000 - 52], 65536, 5000), Some(52), "one large chunk");
        assert_eq!(sent(&[buffer + 1500, 548, buffer + 2000, 48], 2048, 2048), None, "two accounts");
        assert_eq!(sent(&[buffer + 1500, 17], 2048, 2048), Some(0), "the rest does not fit");
        assert_eq!(sent(&[], 2048, 0), None);
    }

    #[test]
    fn a_woken_futex_waiter_has_lost_its_lock() {
        let task = 0xffff_8880_0123_4000;
        let offsets = FutexQ { task: 8, lock_ptr: 16, bitset: 28 };
        let woken = |words: &[u64]| futex_woken(stack(words), task, offsets);
        let bitset = 0xffff_ffff_0000_0000;
        assert!(woken(&[7, 1, task, 0, bitset]));
        assert!(!woken(&[7, 1, task, 0xffff_8880_0000_0040, bitset]), "queued");
        assert!(
            !woken(&[7, 1, task, 0, bitset, 1, task, 0xffff_8880_0000_0040, bitset]),
            "an earlier one was woken"
        );
        assert!(!woken(&[7, 1, task, 0, 0]), "something else");
        assert!(!woken(&[]));
    }
}
