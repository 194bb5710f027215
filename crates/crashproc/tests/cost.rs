//! What a registered crash procedure costs while nothing happens: nothing. Counted instruction by instruction, under ptrace(2), in a child that does the
//! same work with and without one.

use std::ffi::c_void;
use std::io;

use otherworld::{Context, Options, Outcome};

/// What a child did between two stops.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counted {
    instructions: u64,
    system_calls: u64,
}

extern "C" fn procedure(_: &Context, _: *mut c_void) -> Outcome {
    Outcome::Continue
}

fn register() {
    if otherworld::register(procedure, std::ptr::null_mut(), &Options::default()).is_err() {
        // SAFETY: ends the child.
        unsafe { libc::_exit(1) };
    }
}

/// What stands for the program's own work: arithmetic, memory, a system call now and then.
#[inline(never)]
fn work() {
    let mut table = [0u64; 64];
    for n in 0..500u64 {
        let at = (n % 64) as usize;
        table[at] = table[at].wrapping_mul(n | 1).wrapping_add(n);
        if n % 50 == 0 {
            // SAFETY: no arguments.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
    }
    std::hint::black_box(&table);
}

fn wait_stopped(pid: i32) -> bool {
    let mut status = 0;
    // SAFETY: a child of ours.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid, "{}", io::Error::last_os_error());
    assert!(libc::WIFSTOPPED(status) || libc::WIFEXITED(status), "status {status:x}");
    libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGSTOP
}

/// Runs `before`, then counts what `counted` does, in a child.
fn count(before: fn(), counted: fn()) -> Counted {
    // The code runs once here, so that what is bound or allocated at first use is not counted.
    // SAFETY: the child calls only what makes system calls and writes memory, and ends with _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: as above.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            before();
            libc::raise(libc::SIGSTOP);
            counted();
            libc::raise(libc::SIGSTOP);
            libc::_exit(0);
        }
    }
    assert!(pid > 0, "{}", io::Error::last_os_error());
    assert!(wait_stopped(pid), "the child did not begin");
    let mut sum = Counted::default();
    loop {
        // SAFETY: a stopped child that is traced by us; the structure is plain numbers.
        let regs = unsafe {
            let mut regs: libc::user_regs_struct = std::mem::zeroed();
            assert_eq!(libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut regs), 0);
            regs
        };
        // SAFETY: as above; errors read as -1, which is no system call.
        let word = unsafe { libc::ptrace(libc::PTRACE_PEEKTEXT, pid, regs.rip, 0) };
        sum.instructions += 1;
        sum.system_calls += u64::from(word as u16 == 0x050f);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, pid, 0, 0) }, 0);
        if wait_stopped(pid) {
            break;
        }
    }
    // SAFETY: as above.
    unsafe {
        libc::ptrace(libc::PTRACE_CONT, pid, 0, 0);
        libc::waitpid(pid, std::ptr::null_mut(), 0);
    }
    sum
}

fn nothing() {}

#[test]
fn a_registered_procedure_costs_no_instruction_and_no_system_call() {
    let without = count(nothing, work);
    let with = count(register, work);
    assert_eq!(with, without);
    assert!(with.instructions > 3_000 && with.system_calls >= 10, "{with:?}: the work was not counted");
    // It is able to tell a difference.
    let more = count(nothing, || {
        work();
        // SAFETY: no arguments.
        unsafe { libc::syscall(libc::SYS_getppid) };
    });
    assert!(
        more.instructions > without.instructions && more.system_calls == without.system_calls + 1,
        "{more:?}"
    );
}

#[test]
fn registering_costs_a_mapping_with_its_properties_once() {
    let stops = count(nothing, nothing).system_calls;
    let first = count(nothing, register).system_calls - stops;
    let again = count(register, register).system_calls - stops;
    assert_eq!((first, again), (5, 0), "mmap, three times madvise, mlock; then nothing");
}
