//! What a crash procedure is told, and what it answers. All of it lies in memory of the process while the procedure runs, as C has it in
//! `otherworld.h`.

use std::ffi::{CStr, c_char, c_void};

/// The application's function. It runs on a stack of its own, in one of the process's threads, while the others stand still (unless
/// [`Options`](crate::Options) says otherwise).
pub type Procedure = extern "C" fn(context: &Context, data: *mut c_void) -> Outcome;

/// How the process goes on.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every thread where it was.
    Continue = 0,
    /// The same program is executed anew, with the arguments and the environment that it had.
    Restart = 1,
    /// The process ends, with exit code 0.
    Exit = 2,
}

/// What had happened.
#[repr(C)]
#[derive(Debug)]
pub struct Context {
    size: u32,
    generation: u32,
    panic: *const c_char,
    threads: *const Thread,
    thread_count: u64,
    descriptors: *const Descriptor,
    descriptor_count: u64,
    losses: *const Loss,
    loss_count: u64,
    damaged_regions: *const u64,
    damaged_region_count: u64,
    locks: *const HeldLock,
    lock_count: u64,
}

/// A [watched](crate::watch_lock) lock, as it was when the kernel died.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldLock {
    /// Where it is.
    pub address: u64,
    /// One of the record's `LOCK_*`.
    pub kind: u32,
    /// The application's.
    pub tag: u32,
    /// 0 nobody, a TID, or minus the number of readers.
    pub owner: i32,
    /// 0: it could not be read.
    pub known: u32,
}

/// A thread, as it was interrupted.
#[repr(C)]
#[derive(Debug)]
pub struct Thread {
    /// Its thread id.
    pub tid: i32,
    /// It was computing on a CPU.
    pub on_cpu: u32,
    /// The system call that it was in; -1 if none.
    pub syscall: i64,
    /// What becomes of that call.
    pub syscall_outcome: SyscallOutcome,
    padding: u32,
    /// What it returns, where that is known.
    pub syscall_result: i64,
    /// r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp, ss, fs_base, gs_base, ds, es,
    /// fs, gs: `struct user_regs_struct`.
    pub registers: [u64; 27],
}

/// What becomes of a system call in flight.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyscallOutcome {
    /// There was none.
    None = 0,
    /// It is issued again.
    Again = 1,
    /// It returns what is said.
    Returns = 2,
}

/// A descriptor, and what has become of it.
#[repr(C)]
#[derive(Debug)]
pub struct Descriptor {
    #[allow(missing_docs)]
    pub fd: i32,
    #[allow(missing_docs)]
    pub state: DescriptorState,
    why: *const c_char,
}

/// Whether a descriptor is what it was.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DescriptorState {
    /// As before.
    Back = 0,
    /// Back, and something about it is different.
    Changed = 1,
    /// It answers with errors and the end of the file.
    Dead = 2,
}

/// Something that is not as it was.
#[repr(C)]
#[derive(Debug)]
pub struct Loss {
    code: *const c_char,
    text: *const c_char,
}

/// # Safety
/// The pointer is NULL or to a string that lives as long as the result is used.
unsafe fn text<'a>(pointer: *const c_char) -> &'a str {
    if pointer.is_null() {
        return "";
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(pointer) }.to_str().unwrap_or("")
}

/// # Safety
/// The pointer is NULL or to so many values that live as long as the result is used.
unsafe fn list<'a, T>(pointer: *const T, count: u64) -> &'a [T] {
    if pointer.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(pointer, count as usize) }
}

// SAFETY (all below): whoever calls the procedure has laid the context out, and keeps it until the procedure has returned.
impl Context {
    /// Why the kernel died.
    pub fn panic(&self) -> &str {
        // SAFETY: see above.
        unsafe { text(self.panic) }
    }

    /// How many kernels have died since the machine was switched on.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The process's threads.
    pub fn threads(&self) -> &[Thread] {
        // SAFETY: see above.
        unsafe { list(self.threads, self.thread_count) }
    }

    /// Its descriptors.
    pub fn descriptors(&self) -> &[Descriptor] {
        // SAFETY: see above.
        unsafe { list(self.descriptors, self.descriptor_count) }
    }

    /// What is different from before, also memory that could not be restored.
    pub fn losses(&self) -> &[Loss] {
        // SAFETY: see above.
        unsafe { list(self.losses, self.loss_count) }
    }

    /// The [protected](crate::protect) regions whose contents are not what they were, by their addresses.
    pub fn damaged_regions(&self) -> &[u64] {
        // SAFETY: see above.
        unsafe { list(self.damaged_regions, self.damaged_region_count) }
    }
}

impl Context {
    /// The watched locks.
    pub fn locks(&self) -> &[HeldLock] {
        // SAFETY: see above.
        unsafe { list(self.locks, self.lock_count) }
    }

    /// The list has to live as long as the context is used.
    pub(crate) fn set_damaged_regions(&mut self, list: &[u64]) {
        self.damaged_regions = list.as_ptr();
        self.damaged_region_count = list.len() as u64;
    }

    /// One that no crash has made.
    pub(crate) fn rehearsed(panic: &CStr, threads: &[Thread]) -> Self {
        Self {
            size: size_of::<Self>() as u32,
            generation: 0,
            panic: panic.as_ptr(),
            threads: threads.as_ptr(),
            thread_count: threads.len() as u64,
            descriptors: std::ptr::null(),
            descriptor_count: 0,
            losses: std::ptr::null(),
            loss_count: 0,
            damaged_regions: std::ptr::null(),
            damaged_region_count: 0,
            locks: std::ptr::null(),
            lock_count: 0,
        }
    }
}

impl Thread {
    pub(crate) fn rehearsed(tid: i32) -> Self {
        Self {
            tid,
            on_cpu: 1,
            syscall: -1,
            syscall_outcome: SyscallOutcome::None,
            padding: 0,
            syscall_result: 0,
            registers: [0; 27],
        }
    }
}

/// As `tests/abi.c` has them for C.
const _: () =
    assert!(size_of::<Context>() == 96 && size_of::<Thread>() == 248 && size_of::<HeldLock>() == 24);
const _: () = assert!(size_of::<Descriptor>() == 16 && size_of::<Loss>() == 16);

impl Descriptor {
    /// What is different about it, or why it is dead.
    pub fn why(&self) -> &str {
        // SAFETY: see above.
        unsafe { text(self.why) }
    }
}

impl Loss {
    /// For programs, as in the report.
    pub fn code(&self) -> &str {
        // SAFETY: see above.
        unsafe { text(self.code) }
    }

    /// For people.
    pub fn text(&self) -> &str {
        // SAFETY: see above.
        unsafe { text(self.text) }
    }
}
