//! System calls inside another, stopped process.
//!
//! Two ways. The usual one runs a whole table of calls in one go: the *scratch area*, mapped at an address that no old process
//! uses, holds a few instructions ([`STUB`](stub)) that make one call after the other and trap at the end or at the first
//! error. That is two context switches for any number of calls. The other one makes a single call with the `syscall`
//! instruction of the process's own vDSO; it needs nothing of ours in the process and ends in a ptrace event stop,
//! from which the new kernel handles interrupted calls as after any signal.

use std::collections::BTreeSet;
use std::ops::Range;

use nix::errno::Errno;
use nix::sys::wait::WaitStatus;
use snapshot::{Pid, Registers};

use crate::deadline::Deadline;
use crate::sys;

/// Where the code and the tables for injected calls are, the same in all processes that are being rebuilt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scratch {
    /// First address.
    pub(crate) addr: u64,
}

const PAGE: u64 = 4096;
/// Calls in one table.
const TABLE_CALLS: usize = 512;
/// One call: number (overwritten by nothing, kept for debugging), six arguments.
const CALL_SIZE: usize = 56;
const TABLE: u64 = PAGE;
const DATA: u64 = TABLE + 8 * PAGE;
const DATA_SIZE: usize = 512 << 10;

// r12 points to the current call, r13 counts what is left. A result in -4095..=-1 stops the run with r12 at the call that failed.
core::arch::global_asm!(
    ".pushsection .rodata.resurrect_stub, \"a\"",
    ".hidden resurrect_stub_start",
    ".globl resurrect_stub_start",
    "resurrect_stub_start:",
    "2: test r13, r13",
    "jz 3f",
    "mov rax, [r12]",
    "mov rdi, [r12 + 8]",
    "mov rsi, [r12 + 16]",
    "mov rdx, [r12 + 24]",
    "mov r10, [r12 + 32]",
    "mov r8, [r12 + 40]",
    "mov r9, [r12 + 48]",
    "syscall",
    "cmp rax, -4095",
    "jae 3f",
    "add r12, 56",
    "dec r13",
    "jmp 2b",
    "3: int3",
    ".hidden resurrect_stub_end",
    ".globl resurrect_stub_end",
    "resurrect_stub_end:",
    ".popsection",
);

unsafe extern "C" {
    static resurrect_stub_start: u8;
    static resurrect_stub_end: u8;
}

fn stub() -> &'static [u8] {
    // SAFETY: the two symbols delimit the read-only bytes assembled above.
    unsafe {
        let start = &raw const resurrect_stub_start;
        let len = (&raw const resurrect_stub_end).offset_from(start);
        std::slice::from_raw_parts(start, len as usize)
    }
}

impl Scratch {
    /// Bytes of address space.
    pub(crate) const LEN: u64 = DATA + DATA_SIZE as u64;

    /// Addresses that it takes.
    pub(crate) fn range(self) -> Range<u64> {
        self.addr..self.addr + Self::LEN
    }

    /// Where the data of calls are; free between two runs.
    pub(crate) fn data(self) -> u64 {
        self.addr + DATA
    }

    /// First and last address, with the room behind it.
    pub(crate) fn reserved(self) -> (u64, u64) {
        (self.addr, self.addr + Self::LEN + crate::memory::PARKING)
    }

    /// What is to be at its beginning.
    pub(crate) fn code() -> &'static [u8] {
        stub()
    }

    /// Address of a `syscall` instruction in it.
    pub(crate) fn instruction(self) -> u64 {
        let at = stub().windows(2).position(|bytes| bytes == [0x0f, 0x05]);
        self.addr + at.unwrap_or(0) as u64
    }

    /// Maps the area in the calling process, for its children to inherit.
    pub(crate) fn map(self) -> sys::Result<()> {
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
        // SAFETY: NOREPLACE: nothing that exists is touched.
        let p = unsafe { libc::mmap(self.addr as *mut _, Self::LEN as usize, prot, flags, -1, 0) };
        if p == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        if p as u64 != self.addr {
            return Err(Errno::EEXIST);
        }
        // SAFETY: the mapping has just been made, is writable and longer than the stub.
        unsafe { std::ptr::copy_nonoverlapping(stub().as_ptr(), p.cast(), stub().len()) };
        Ok(())
    }

    /// Unmaps it in the calling process.
    pub(crate) fn unmap(self) {
        // SAFETY: the area was mapped by `map` and holds nothing that is referenced.
        unsafe { libc::munmap(self.addr as *mut _, Self::LEN as usize) };
    }
}

/// An argument of an injected call.
#[derive(Clone, Debug)]
pub(crate) enum Arg {
    Value(u64),
    /// A pointer to a copy of these bytes, with pointers to further bytes stored at the given offsets.
    Data {
        bytes: Vec<u8>,
        pointers: Vec<(usize, Vec<u8>)>,
    },
}

impl From<u64> for Arg {
    fn from(v: u64) -> Self {
        Self::Value(v)
    }
}

impl From<u32> for Arg {
    fn from(v: u32) -> Self {
        Self::Value(v.into())
    }
}

impl From<i32> for Arg {
    /// Sign-extended: -1 stays -1.
    fn from(v: i32) -> Self {
        Self::Value(v as i64 as u64)
    }
}

impl From<Vec<u8>> for Arg {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Data { bytes, pointers: Vec::new() }
    }
}

impl Arg {
    fn size(&self) -> usize {
        let round = |n: usize| n.next_multiple_of(16);
        match self {
            Self::Value(_) => 0,
            Self::Data { bytes, pointers } => {
                round(bytes.len()) + pointers.iter().map(|(_, p)| round(p.len())).sum::<usize>()
            }
        }
    }
}

/// A system call to be made inside a process.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// What it does, for error messages: `mmap 7f…-7f…`.
    pub(crate) what: String,
    pub(crate) nr: libc::c_long,
    pub(crate) args: Vec<Arg>,
    /// Its failure is reported as a loss and the next call is made.
    pub(crate) optional: bool,
    /// Of an optional one: nor is it reported.
    unheard: bool,
}

impl Call {
    pub(crate) fn new(what: impl Into<String>, nr: libc::c_long, args: Vec<Arg>) -> Self {
        Self { what: what.into(), nr, args, optional: false, unheard: false }
    }

    pub(crate) fn optional(self) -> Self {
        Self { optional: true, ..self }
    }

    /// Nor does it matter that it failed.
    pub(crate) fn unheard(self) -> Self {
        Self { unheard: true, ..self }
    }
}

/// Builds a `Call` whose arguments may be of any type that converts into [`Arg`].
macro_rules! call {
    ($what:expr, $nr:expr $(, $arg:expr)* $(,)?) => {
        $crate::inject::Call::new($what, $nr, vec![$($crate::inject::Arg::from($arg)),*])
    };
}
pub(crate) use call;

/// What can go wrong inside another process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InjectError {
    #[error("{what}: {errno}")]
    Call { what: String, errno: Errno },
    #[error("{what}: it was killed by a fault (signal {signal})")]
    Fault { what: String, signal: i32 },
    #[error("{what}: {how}")]
    Died { what: String, how: String },
    #[error("{what}: not done in time")]
    Deadline { what: String },
    #[error("ptrace {request}: {errno}")]
    Ptrace { request: &'static str, errno: Errno },
    #[error("{0}")]
    Unexpected(String),
}

/// A failed optional call.
#[derive(Debug)]
pub(crate) struct Missed {
    pub(crate) what: String,
    pub(crate) errno: Errno,
}

/// A stop of a traced thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// PTRACE_EVENT_STOP: trapped by PTRACE_INTERRUPT, or new.
    Event,
    /// PTRACE_EVENT_CLONE.
    Clone,
    /// PTRACE_EVENT_EXIT.
    Exit,
    /// PTRACE_EVENT_EXEC.
    Exec,
    /// Entry to or exit from a system call (PTRACE_O_TRACESYSGOOD).
    Syscall,
    /// About to get this signal.
    Signal(i32),
}

/// A thread under our ptrace, stopped between calls of its methods.
#[derive(Debug)]
pub(crate) struct Tracee {
    pub(crate) tid: Pid,
    scratch: Scratch,
    /// Segment registers and flags of a well-behaved thread.
    base: Registers,
}

fn ptrace(
    request: &'static str,
    code: libc::c_uint,
    tid: Pid,
    addr: u64,
    data: u64,
) -> Result<i64, InjectError> {
    // SAFETY: requests that read or write through `data` are given valid pointers by the typed functions below.
    let r = unsafe { libc::ptrace(code, tid, addr as *mut libc::c_void, data as *mut libc::c_void) };
    Errno::result(r).map_err(|errno| InjectError::Ptrace { request, errno })
}

/// Waits for a child or tracee to change state; `Err(EINTR)` only after the deadline.
pub(crate) fn wait(tid: Pid, deadline: Deadline) -> Result<i32, Errno> {
    wait_for(tid, deadline).map(|(_, status)| status)
}

/// Waits for any tracee to change state; `Err(EINTR)` only after the deadline.
pub(crate) fn wait_any(deadline: Deadline) -> Result<(Pid, i32), Errno> {
    wait_for(-1, deadline)
}

/// `whom`: as waitpid(2) takes it.
fn wait_for(whom: Pid, deadline: Deadline) -> Result<(Pid, i32), Errno> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is an int.
        match Errno::result(unsafe { libc::waitpid(whom, &mut status, libc::__WALL) }) {
            Ok(tid) => return Ok((tid, status)),
            Err(Errno::EINTR) if !deadline.is_over() => {}
            Err(e) => return Err(e),
        }
    }
}

fn wait_stop(tid: Pid, what: &str, deadline: Deadline) -> Result<Stop, InjectError> {
    let status = wait(tid, deadline).map_err(|errno| match errno {
        Errno::EINTR => InjectError::Deadline { what: what.into() },
        errno => InjectError::Ptrace { request: "wait", errno },
    })?;
    if !libc::WIFSTOPPED(status) {
        return Err(InjectError::Died { what: what.into(), how: describe_end(tid, status) });
    }
    Ok(match (status >> 16, libc::WSTOPSIG(status)) {
        (libc::PTRACE_EVENT_STOP, _) => Stop::Event,
        (libc::PTRACE_EVENT_CLONE, _) => Stop::Clone,
        (libc::PTRACE_EVENT_EXIT, _) => Stop::Exit,
        (libc::PTRACE_EVENT_EXEC, _) => Stop::Exec,
        (0, s) if s == libc::SIGTRAP | 0x80 => Stop::Syscall,
        (0, s) => Stop::Signal(s),
        (e, s) => return Err(InjectError::Unexpected(format!("{what}: ptrace event {e}, signal {s}"))),
    })
}

const SEIZE_OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;

impl Tracee {
    /// Takes control of a process that has mapped `scratch` and blocks all signals but SIGTRAP. From here on it dies with us.
    pub(crate) fn seize(pid: Pid, scratch: Scratch, deadline: Deadline) -> Result<Self, InjectError> {
        ptrace("SEIZE", libc::PTRACE_SEIZE, pid, 0, SEIZE_OPTIONS as u64)?;
        ptrace("INTERRUPT", libc::PTRACE_INTERRUPT, pid, 0, 0)?;
        Self::adopt(pid, scratch, deadline)
    }

    /// Takes over a thread that is being traced already because the thread that cloned it is.
    pub(crate) fn adopt(tid: Pid, scratch: Scratch, deadline: Deadline) -> Result<Self, InjectError> {
        match wait_stop(tid, "first stop", deadline)? {
            Stop::Event => {}
            other => return Err(InjectError::Unexpected(format!("first stop of {tid} is {other:?}"))),
        }
        let mut tracee = Self { tid, scratch, base: Registers::default() };
        tracee.base = tracee.registers()?;
        Ok(tracee)
    }

    pub(crate) fn scratch(&self) -> Scratch {
        self.scratch
    }

    pub(crate) fn registers(&self) -> Result<Registers, InjectError> {
        let mut regs = Registers::default();
        // `Registers` has the layout of user_regs_struct.
        ptrace("GETREGS", libc::PTRACE_GETREGS, self.tid, 0, &raw mut regs as u64)?;
        Ok(regs)
    }

    pub(crate) fn set_registers(&self, regs: &Registers) -> Result<(), InjectError> {
        ptrace("SETREGS", libc::PTRACE_SETREGS, self.tid, 0, std::ptr::from_ref(regs) as u64).map(drop)
    }

    /// A register set (NT_X86_XSTATE …), at most `buf.len()` bytes; returns its real length.
    pub(crate) fn register_set(&self, note: u32, buf: &mut [u8]) -> Result<usize, InjectError> {
        let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        ptrace("GETREGSET", libc::PTRACE_GETREGSET, self.tid, note.into(), &raw mut iov as u64)?;
        Ok(iov.iov_len)
    }

    pub(crate) fn set_register_set(&self, note: u32, buf: &[u8]) -> Result<(), InjectError> {
        let mut iov = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
        ptrace("SETREGSET", libc::PTRACE_SETREGSET, self.tid, note.into(), &raw mut iov as u64).map(drop)
    }

    /// Bit n-1 is signal n.
    pub(crate) fn set_signal_mask(&self, mask: u64) -> Result<(), InjectError> {
        ptrace("SETSIGMASK", libc::PTRACE_SETSIGMASK, self.tid, 8, &raw const mask as u64).map(drop)
    }

    /// Bit n-1 is signal n.
    pub(crate) fn signal_mask(&self) -> Result<u64, InjectError> {
        let mut mask = 0u64;
        ptrace("GETSIGMASK", libc::PTRACE_GETSIGMASK, self.tid, 8, &raw mut mask as u64)?;
        Ok(mask)
    }

    /// Lets go; the thread runs.
    pub(crate) fn detach(&self) -> Result<(), InjectError> {
        self.detach_with(0)
    }

    /// Lets go; the thread gets this signal, which it has stopped for, unless it is 0.
    pub(crate) fn detach_with(&self, signal: i32) -> Result<(), InjectError> {
        ptrace("DETACH", libc::PTRACE_DETACH, self.tid, 0, signal as u64).map(drop)
    }

    /// Filters for system calls count when it has been let go, not before.
    pub(crate) fn suspend_seccomp(&self) -> Result<(), InjectError> {
        self.set_options(SEIZE_OPTIONS | libc::PTRACE_O_SUSPEND_SECCOMP)
    }

    /// Sets what is told of it (PTRACE_O_*).
    pub(crate) fn set_options(&self, options: i32) -> Result<(), InjectError> {
        ptrace("SETOPTIONS", libc::PTRACE_SETOPTIONS, self.tid, 0, options as u64).map(drop)
    }

    /// Lets it run under observation ([`Tracee::go_on`]), no longer to die with us.
    pub(crate) fn observe(&self) -> Result<(), InjectError> {
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACEEXEC | libc::PTRACE_O_TRACEEXIT;
        self.set_options(options)?;
        self.go_on(0)
    }

    /// Lets it run up to its next system call, signal, execution of a program, or end.
    pub(crate) fn go_on(&self, signal: i32) -> Result<(), InjectError> {
        ptrace("SYSCALL", libc::PTRACE_SYSCALL, self.tid, 0, signal as u64).map(drop)
    }

    /// Leaves it stopped, as job control wants it, up to the signal to continue.
    pub(crate) fn stay_stopped(&self) -> Result<(), InjectError> {
        ptrace("LISTEN", libc::PTRACE_LISTEN, self.tid, 0, 0).map(drop)
    }

    /// Makes it stop soon.
    pub(crate) fn interrupt(&self) -> Result<(), InjectError> {
        ptrace("INTERRUPT", libc::PTRACE_INTERRUPT, self.tid, 0, 0).map(drop)
    }

    /// The number of the 64-bit system call at whose entry it has stopped; `None` elsewhere.
    pub(crate) fn entered_call(&self) -> Result<Option<i64>, InjectError> {
        // struct ptrace_syscall_info: operation, architecture (at 4), at an entry the number (at 24).
        const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
        let mut info = [0u64; 11];
        let size = size_of_val(&info) as u64;
        let request = libc::PTRACE_GET_SYSCALL_INFO;
        ptrace("GET_SYSCALL_INFO", request, self.tid, size, &raw mut info as u64)?;
        let is_entry = info[0] as u8 == libc::PTRACE_SYSCALL_INFO_ENTRY;
        Ok((is_entry && (info[0] >> 32) as u32 == AUDIT_ARCH_X86_64).then_some(info[3] as i64))
    }

    /// Makes calls between two instructions of a thread that is stopped with its final state: it notices nothing.
    pub(crate) fn call_aside(
        &self,
        instruction: u64,
        calls: &[(&str, i64, [u64; 6])],
        deadline: Deadline,
    ) -> Result<Vec<i64>, InjectError> {
        let (regs, mask) = (self.registers()?, self.signal_mask()?);
        // A pending signal would come in between.
        self.set_signal_mask(u64::MAX)?;
        let call = |&(what, nr, args): &(&str, i64, [u64; 6])| {
            self.call_and_interrupt(instruction, what, nr, args, deadline)
        };
        let results = calls.iter().map(call).collect();
        self.set_registers(&regs)?;
        self.set_signal_mask(mask)?;
        results
    }

    /// Makes all calls in order. Optional ones that failed are returned; any other failure ends the run.
    pub(crate) fn run(&self, calls: &[Call], deadline: Deadline) -> Result<Vec<Missed>, InjectError> {
        let mut missed = Vec::new();
        let mut rest = calls;
        while !rest.is_empty() {
            let n = chunk_len(rest)?;
            let (chunk, tail) = rest.split_at(n);
            self.run_chunk(chunk, deadline, &mut missed)?;
            rest = tail;
        }
        Ok(missed)
    }

    fn run_chunk(
        &self,
        calls: &[Call],
        deadline: Deadline,
        missed: &mut Vec<Missed>,
    ) -> Result<(), InjectError> {
        let (table, data) = lay_out(self.scratch.addr + DATA, calls);
        self.write(self.scratch.addr + TABLE, &table)?;
        if !data.is_empty() {
            self.write(self.scratch.addr + DATA, &data)?;
        }
        let mut done = 0;
        while done < calls.len() {
            let regs = Registers {
                rip: self.scratch.addr,
                rsp: self.scratch.addr + Scratch::LEN,
                r12: self.scratch.addr + TABLE + (done * CALL_SIZE) as u64,
                r13: (calls.len() - done) as u64,
                orig_rax: u64::MAX,
                ..self.base
            };
            self.set_registers(&regs)?;
            let what = || calls.get(done).map_or("", |c| c.what.as_str());
            self.resume()?;
            loop {
                match wait_stop(self.tid, what(), deadline)? {
                    Stop::Signal(libc::SIGTRAP) => break,
                    // The new thread waits in its own first stop; this one goes on.
                    Stop::Clone | Stop::Event => self.resume()?,
                    Stop::Signal(signal) => return Err(InjectError::Fault { what: what().into(), signal }),
                    other => {
                        return Err(InjectError::Unexpected(format!("{}: {other:?} stop", what())));
                    }
                }
            }
            let after = self.registers()?;
            let left = (after.r13 as usize).min(calls.len());
            done = calls.len() - left;
            let Some(failed) = calls.get(done) else { break };
            let errno = Errno::from_raw(-(after.rax as i64) as i32);
            if !failed.optional {
                return Err(InjectError::Call { what: failed.what.clone(), errno });
            }
            if !failed.unheard {
                missed.push(Missed { what: failed.what.clone(), errno });
            }
            done += 1;
        }
        Ok(())
    }

    /// Makes one call with the `syscall` instruction at `instruction` and comes back in a ptrace event stop, even from a call that
    /// blocks: it is interrupted on the spot, as by a signal without a handler. Returns what the call returned, which may be
    /// one of the kernel's internal restart codes (-512 … -516).
    pub(crate) fn call_and_interrupt(
        &self,
        instruction: u64,
        what: &str,
        nr: i64,
        args: [u64; 6],
        deadline: Deadline,
    ) -> Result<i64, InjectError> {
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        let regs = Registers {
            rip: instruction,
            rax: nr as u64,
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.base
        };
        self.set_registers(&regs)?;
        ptrace("SYSCALL", libc::PTRACE_SYSCALL, self.tid, 0, 0)?;
        match wait_stop(self.tid, what, deadline)? {
            Stop::Syscall => {}
            other => return Err(InjectError::Unexpected(format!("{what}: {other:?} stop before it"))),
        }
        // Pending from now on: a call that would sleep sees it and returns at once.
        ptrace("INTERRUPT", libc::PTRACE_INTERRUPT, self.tid, 0, 0)?;
        self.resume()?;
        match wait_stop(self.tid, what, deadline)? {
            Stop::Event => Ok(self.registers()?.rax as i64),
            Stop::Signal(signal) => Err(InjectError::Fault { what: what.into(), signal }),
            other => Err(InjectError::Unexpected(format!("{what}: {other:?} stop after it"))),
        }
    }

    /// Lets the thread exit while others of its process live on.
    pub(crate) fn exit(&self, instruction: u64, deadline: Deadline) -> Result<(), InjectError> {
        let options = SEIZE_OPTIONS | libc::PTRACE_O_TRACEEXIT;
        self.set_options(options)?;
        let nr = libc::SYS_exit as u64;
        let regs = Registers { rip: instruction, rax: nr, orig_rax: u64::MAX, rdi: 0, ..self.base };
        self.set_registers(&regs)?;
        self.resume()?;
        match wait_stop(self.tid, "exit", deadline)? {
            Stop::Exit => self.resume(),
            other => Err(InjectError::Unexpected(format!("exit: {other:?} stop"))),
        }
    }

    /// The rseq(2) registration of a thread, as the call that ends it; `None` if there is none.
    pub(crate) fn rseq_unregistration(&self) -> Result<Option<[u64; 6]>, InjectError> {
        // struct ptrace_rseq_configuration: address, size, signature, flags.
        const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
        const RSEQ_FLAG_UNREGISTER: u64 = 1;
        let mut words = [0u32; 6];
        let len = size_of_val(&words) as u64;
        ptrace("GET_RSEQ", PTRACE_GET_RSEQ_CONFIGURATION, self.tid, len, &raw mut words as u64)?;
        let address = u64::from(words[0]) | u64::from(words[1]) << 32;
        let args = [address, words[2].into(), RSEQ_FLAG_UNREGISTER, words[3].into(), 0, 0];
        Ok((address != 0).then_some(args))
    }

    /// Lets it run another program: `args` are those of execve(2). It is stopped before that program's first instruction, and let go.
    pub(crate) fn replace_program(
        &self,
        instruction: u64,
        args: [u64; 3],
        deadline: Deadline,
    ) -> Result<(), InjectError> {
        let what = "execve";
        let [rdi, rsi, rdx] = args;
        let nr = libc::SYS_execve as u64;
        let options = SEIZE_OPTIONS | libc::PTRACE_O_TRACEEXEC;
        self.set_options(options)?;
        self.set_registers(&Registers {
            rip: instruction,
            rax: nr,
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            ..self.base
        })?;
        self.resume()?;
        match wait_stop(self.tid, what, deadline)? {
            Stop::Exec => {}
            Stop::Signal(signal) => return Err(InjectError::Fault { what: what.into(), signal }),
            other => return Err(InjectError::Unexpected(format!("{what}: {other:?} stop"))),
        }
        self.set_signal_mask(0)?;
        self.detach()
    }

    pub(crate) fn resume(&self) -> Result<(), InjectError> {
        ptrace("CONT", libc::PTRACE_CONT, self.tid, 0, 0).map(drop)
    }

    /// Copies into the memory of the process, whatever its protection.
    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), InjectError> {
        let local = [libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }];
        let remote = [libc::iovec { iov_base: addr as *mut _, iov_len: bytes.len() }];
        // SAFETY: `bytes` is readable.
        let n = unsafe { sys::write_memory(self.tid, &local, &remote) };
        match n {
            Ok(n) if n == bytes.len() => Ok(()),
            Ok(_) => Err(InjectError::Call { what: format!("write to {addr:#x}"), errno: Errno::EFAULT }),
            Err(errno) => Err(InjectError::Call { what: format!("write to {addr:#x}"), errno }),
        }
    }

    pub(crate) fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), InjectError> {
        sys::read_memory(self.tid, addr, buf)
            .map_err(|errno| InjectError::Call { what: format!("read from {addr:#x}"), errno })
    }

    /// Where data for a single call can be put.
    pub(crate) fn scratch_data(&self) -> u64 {
        self.scratch.addr + DATA
    }
}

/// Kills a process that is being rebuilt and waits until it is gone. `traced` are its threads under ptrace.
pub(crate) fn kill(pid: Pid, traced: &[Pid], deadline: Deadline) {
    // Threads that were made a moment ago are under ptrace too, although nobody knows them yet.
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let all = tasks.filter_map(|task| task.file_name().to_str()?.parse::<Pid>().ok());
    let mut threads: BTreeSet<Pid> = all.chain(traced.iter().copied()).collect();
    // The leader last: it is reported when the other threads have been.
    let leader = threads.take(&pid);
    // SAFETY: a signal to a process that we created.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    for tid in threads.into_iter().chain(leader) {
        while let Ok(status) = wait(tid, deadline) {
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                break;
            }
            let _ = ptrace("CONT", libc::PTRACE_CONT, tid, 0, 0);
        }
    }
}

/// How many calls from the front fit into one table with their data.
fn chunk_len(calls: &[Call]) -> Result<usize, InjectError> {
    let mut size = 0;
    let mut n = 0;
    for call in calls.iter().take(TABLE_CALLS) {
        size += call.args.iter().map(Arg::size).sum::<usize>();
        if size > DATA_SIZE {
            break;
        }
        n += 1;
    }
    if n == 0 {
        let what = calls.first().map_or("", |c| c.what.as_str());
        return Err(InjectError::Unexpected(format!("{what}: its arguments are too long")));
    }
    Ok(n)
}

/// The table for the stub, and the bytes that its pointers lead to, to be placed at `data_addr`.
fn lay_out(data_addr: u64, calls: &[Call]) -> (Vec<u8>, Vec<u8>) {
    let mut table = Vec::with_capacity(calls.len() * CALL_SIZE);
    let mut data = Vec::new();
    let mut place = |bytes: &[u8]| -> u64 {
        let addr = data_addr + data.len() as u64;
        data.extend_from_slice(bytes);
        data.resize(data.len().next_multiple_of(16), 0);
        addr
    };
    for call in calls {
        table.extend((call.nr as u64).to_ne_bytes());
        for i in 0..6 {
            let value = match call.args.get(i) {
                None => 0,
                Some(Arg::Value(v)) => *v,
                Some(Arg::Data { bytes, pointers }) => {
                    let mut bytes = bytes.clone();
                    for (offset, target) in pointers {
                        let addr = place(target);
                        bytes[*offset..*offset + 8].copy_from_slice(&addr.to_ne_bytes());
                    }
                    place(&bytes)
                }
            };
            table.extend(value.to_ne_bytes());
        }
    }
    (table, data)
}

/// For people: what became of a process that ended unexpectedly.
fn describe_end(pid: Pid, status: i32) -> String {
    match WaitStatus::from_raw(nix::unistd::Pid::from_raw(pid), status) {
        Ok(WaitStatus::Exited(_, code)) => format!("it exited with {code}"),
        Ok(WaitStatus::Signaled(_, signal, _)) => format!("it was killed by {signal}"),
        _ => format!("it ended with status {status:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_hold_arguments_and_pointers_to_their_data() {
        let nested = Arg::Data { bytes: vec![0; 16], pointers: vec![(8, b"inner".to_vec())] };
        let calls = [call!("a", 7, 1u64, -1i32, b"name\0".to_vec()), call!("b", 8, nested)];
        let (table, data) = lay_out(0x1000, &calls);
        let word = |bytes: &[u8], i: usize| u64::from_ne_bytes(bytes[i * 8..][..8].try_into().unwrap());
        assert_eq!((word(&table, 0), word(&table, 1), word(&table, 2)), (7, 1, u64::MAX));
        assert_eq!((word(&table, 3), word(&table, 4)), (0x1000, 0));
        assert_eq!(&data[..5], b"name\0");
        // The inner bytes come first, then the structure with their address at offset 8.
        assert_eq!(&data[16..21], b"inner");
        assert_eq!((word(&table, 7), word(&table, 8)), (8, 0x1020));
        assert_eq!(word(&data[0x20..], 1), 0x1010);
    }

    #[test]
    fn long_lists_are_cut_into_tables() {
        let many: Vec<Call> = (0..1000).map(|i| call!("x", i as libc::c_long)).collect();
        assert_eq!(chunk_len(&many).unwrap(), TABLE_CALLS);
        let big = |n: usize| call!("big", 1, vec![0u8; n]);
        assert_eq!(chunk_len(&[big(300 << 10), big(300 << 10)]).unwrap(), 1);
        assert!(chunk_len(&[big(DATA_SIZE + 1)]).is_err());
    }
}
