//! System calls in flight: with which registers a thread goes on.
//!
//! Every thread is let go from a stop in which the new kernel looks at `orig_rax` and `rax` as it does after a signal that had no
//! handler: a `rax` of -ERESTART* with `orig_rax` ≥ 0 makes it issue the call again. So the old kernel's way of restarting is asked
//! of the new one, signals that are pending included.

use std::time::Duration;

use snapshot::{Registers, Resume, SyscallInFlight, Thread};

use crate::exec;

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Not in a system call: what was an interrupt vector or an error code must not be taken for a call's number.
const NONE: u64 = u64::MAX;

/// What has to be done for a thread to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Continuation {
    /// Registers to go on with; `rax` and `orig_rax` may be replaced by the result of `timed`.
    pub(crate) regs: Registers,
    /// A call to be begun and interrupted first, so that the new kernel holds its deadline.
    pub(crate) timed: Option<Timed>,
    /// Bytes to be stored in the process first.
    pub(crate) store: Option<(u64, Vec<u8>)>,
}

/// A call with a timeout, begun again with the time that was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timed {
    pub(crate) call: SyscallInFlight,
    /// Which argument is (or points to) the timeout.
    pub(crate) argument: usize,
    pub(crate) timeout: Timeout,
}

/// The form of a timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timeout {
    /// The argument itself, milliseconds.
    Milliseconds(u64),
    /// A pointer to this `struct timespec`.
    Timespec([u8; 16]),
}

/// How `thread` goes on; `Err` says why it cannot. `gone_by`: since when its clocks go on, which is time that it has waited.
pub(crate) fn continuation(thread: &Thread, gone_by: Duration) -> Result<Continuation, String> {
    let mut regs = thread.regs;
    let mut timed = None;
    let mut store = None;
    match &thread.resume {
        // In user mode, or in an exception: all registers are the program's.
        Resume::UserMode => regs.orig_rax = NONE,
        // The result is in place.
        Resume::Finished => regs.orig_rax = NONE,
        // Issued again by the new kernel.
        Resume::Restart => restart(&mut regs, thread)?,
        Resume::RestartChanged { argument, value } => {
            Argument { number: *argument, value: *value }.apply(&mut regs);
            restart(&mut regs, thread)?;
        }
        // A sleep, or a wait with a relative timeout: a plain restart would wait for the full time again.
        Resume::RestartTimed { call, remaining_ns } => {
            timed = Some(timed_call(*call, less(*remaining_ns, gone_by))?);
            regs.orig_rax = call.nr as u64;
        }
        // select and its kin have the time left written to the structure that they were given, and are issued again; others get it in the
        // place of their argument.
        Resume::RestartUpdated { .. } | Resume::RestartShortened { .. } => {
            if let Some(left) = timeout(thread, gone_by) {
                store = left.store;
                left.argument.into_iter().for_each(|argument| argument.apply(&mut regs));
            }
            restart(&mut regs, thread)?;
        }
        // It has done what it could.
        Resume::Return { value, .. } => {
            regs.rax = *value as u64;
            regs.orig_rax = NONE;
        }
        Resume::Exec(exec) => {
            let (call, bytes) = exec::continuation(exec, &regs);
            regs = Registers { rax: ERESTARTNOINTR as u64, ..call };
            store = Some(bytes);
        }
        Resume::Exit { .. } => return Err("it was exiting".into()),
        Resume::Impossible { why } => return Err(why.clone()),
    }
    Ok(Continuation { regs, timed, store })
}

/// The time left of a call that is issued again from its beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// Bytes to be stored in the process.
    pub(crate) store: Option<(u64, Vec<u8>)>,
    pub(crate) argument: Option<Argument>,
}

/// Another value for an argument of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Argument {
    number: usize,
    value: u64,
}

impl Argument {
    pub(crate) fn apply(self, regs: &mut Registers) {
        let Registers { rdi, rsi, rdx, r10, r8, r9, .. } = regs;
        if let Some(register) = [rdi, rsi, rdx, r10, r8, r9].into_iter().nth(self.number) {
            *register = self.value;
        }
    }
}

/// What the timeout of an interrupted call has to be, when it is the program's to have and not the kernel's.
pub(crate) fn timeout(thread: &Thread, gone_by: Duration) -> Option<Left> {
    const SECOND: i64 = 1_000_000_000;
    match &thread.resume {
        Resume::RestartUpdated { timeout_addr, timeval, remaining_ns } => {
            let left = less(*remaining_ns, gone_by).max(0);
            let fraction = if *timeval { left % SECOND / 1000 } else { left % SECOND };
            let store = Some((*timeout_addr, two_words(left / SECOND, fraction).to_vec()));
            Some(Left { store, argument: None })
        }
        Resume::RestartShortened { argument, timespec, remaining_ns } => {
            let left = less(*remaining_ns, gone_by).max(0);
            let at = below_stack(&thread.regs);
            let store = timespec.then(|| (at, two_words(left / SECOND, left % SECOND).to_vec()));
            let value = if *timespec { at } else { milliseconds(left) };
            Some(Left { store, argument: Some(Argument { number: *argument, value }) })
        }
        _ => None,
    }
}

fn less(remaining_ns: i64, gone_by: Duration) -> i64 {
    remaining_ns.saturating_sub(i64::try_from(gone_by.as_nanos()).unwrap_or(i64::MAX))
}

fn restart(regs: &mut Registers, thread: &Thread) -> Result<(), String> {
    let nr = thread.syscall.map_or(regs.orig_rax as i64, |s| s.nr);
    if nr < 0 {
        return Err("a system call is to be restarted, and its number is not known".into());
    }
    regs.orig_rax = nr as u64;
    let old = regs.rax as i64;
    // A call that the old kernel had interrupted already says itself how it is restarted.
    regs.rax = if (ERESTARTNOHAND..=ERESTARTSYS).contains(&old) { old } else { restart_code(nr) } as u64;
    Ok(())
}

/// What the call returns inside the kernel when a signal interrupts it. The difference only shows when a handler runs: whether the call is
/// restarted after it always, if the handler has SA_RESTART, or never.
fn restart_code(nr: i64) -> i64 {
    match nr {
        libc::SYS_pause
        | libc::SYS_rt_sigsuspend
        | libc::SYS_select
        | libc::SYS_pselect6
        | libc::SYS_poll
        | libc::SYS_ppoll
        | libc::SYS_epoll_wait
        | libc::SYS_epoll_pwait
        | libc::SYS_epoll_pwait2
        | libc::SYS_rt_sigtimedwait
        | libc::SYS_semtimedop
        | libc::SYS_nanosleep
        | libc::SYS_clock_nanosleep => ERESTARTNOHAND,
        libc::SYS_fork | libc::SYS_vfork | libc::SYS_clone | libc::SYS_clone3 => ERESTARTNOINTR,
        _ => ERESTARTSYS,
    }
}

fn timed_call(call: SyscallInFlight, remaining_ns: i64) -> Result<Timed, String> {
    let left = remaining_ns.max(0);
    let timespec = Timeout::Timespec(two_words(left / 1_000_000_000, left % 1_000_000_000));
    let (argument, timeout) = match call.nr {
        libc::SYS_nanosleep => (0, timespec),
        libc::SYS_clock_nanosleep => (2, timespec),
        libc::SYS_poll => (2, Timeout::Milliseconds(milliseconds(left))),
        libc::SYS_futex => (3, timespec),
        nr => return Err(format!("system call {nr} cannot be begun with the time that was left")),
    };
    Ok(Timed { call, argument, timeout })
}

/// Rounded up: never early.
fn milliseconds(left_ns: i64) -> u64 {
    (left_ns.max(0) as u64).div_ceil(1_000_000)
}

/// A place on the stack that no program uses: below the 128 bytes that are a function's own. Whatever comes there later, a signal's frame say,
/// comes after the kernel has read it, or in its place.
fn below_stack(regs: &Registers) -> u64 {
    regs.rsp.wrapping_sub(256) & !15
}

fn two_words(a: i64, b: i64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&a.to_ne_bytes());
    bytes[8..].copy_from_slice(&b.to_ne_bytes());
    bytes
}

impl Continuation {
    /// Takes in what the begun call came back with: still waiting, or finished at once.
    pub(crate) fn begun(&mut self, result: i64) {
        self.regs.rax = result as u64;
        if !(ERESTART_RESTARTBLOCK..=ERESTARTSYS).contains(&result) {
            self.regs.orig_rax = NONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(nr: i64, rax: i64, resume: Resume) -> Thread {
        let json = serde_json::json!({
            "tid": 1, "comm": "x", "state": "sleeping", "on_cpu": null, "panicked": false, "regs": Registers::default(),
            "syscall": {"nr": nr, "args": [1, 2, 3, 4, 5, 6]}, "wchan": null, "resume": resume, "fpu": {"type": "lost"},
            "credentials": snapshot::Credentials::default(), "blocked": 0, "pending": [],
            "altstack": {"sp": 0, "size": 0, "flags": 0}, "robust_list": 0, "clear_child_tid": 0, "rseq": null,
            "scheduling": snapshot::Scheduling::default(), "no_new_privs": false, "pdeath_signal": 0, "timer_slack_ns": 50000,
            "personality": 0, "seccomp": {"type": "off"},
        });
        let mut t: Thread = serde_json::from_value(json).unwrap();
        t.regs.orig_rax = nr as u64;
        t.regs.rax = rax as u64;
        t
    }

    fn result(t: &Thread) -> (i64, i64) {
        let c = continuation(t, Duration::ZERO).unwrap();
        (c.regs.rax as i64, c.regs.orig_rax as i64)
    }

    #[test]
    fn user_mode_is_never_taken_for_a_system_call() {
        // A page fault leaves its error code in orig_rax.
        assert_eq!(result(&thread(6, 77, Resume::UserMode)), (77, -1));
        assert_eq!(result(&thread(1, 5, Resume::Finished)), (5, -1));
    }

    #[test]
    fn restarts_use_the_codes_that_the_kernel_would() {
        assert_eq!(result(&thread(libc::SYS_read, -38, Resume::Restart)), (ERESTARTSYS, libc::SYS_read));
        assert_eq!(result(&thread(libc::SYS_pause, -38, Resume::Restart)), (ERESTARTNOHAND, libc::SYS_pause));
        let interrupted = thread(libc::SYS_read, ERESTARTNOINTR, Resume::Restart);
        assert_eq!(result(&interrupted), (ERESTARTNOINTR, libc::SYS_read));
    }

    #[test]
    fn a_timed_call_keeps_its_place_and_gets_the_time_left() {
        let call = SyscallInFlight { nr: libc::SYS_poll, args: [1, 2, 60_000, 0, 0, 0] };
        let resume = Resume::RestartTimed { call, remaining_ns: 2_000_001 };
        let mut c = continuation(&thread(219, -38, resume), Duration::from_nanos(500_000)).unwrap();
        let timed = c.timed.unwrap();
        assert_eq!((timed.argument, timed.timeout), (2, Timeout::Milliseconds(2)));
        c.begun(ERESTART_RESTARTBLOCK);
        assert_eq!((c.regs.rax as i64, c.regs.orig_rax as i64), (ERESTART_RESTARTBLOCK, libc::SYS_poll));
        c.begun(1);
        assert_eq!((c.regs.rax, c.regs.orig_rax), (1, NONE));
        let bad = SyscallInFlight { nr: libc::SYS_read, args: [0; 6] };
        let resume = Resume::RestartTimed { call: bad, remaining_ns: 0 };
        assert!(continuation(&thread(0, -38, resume), Duration::ZERO).is_err());
    }

    #[test]
    fn updated_timeouts_are_stored_in_their_own_unit() {
        let updated = |timeval| {
            let resume =
                Resume::RestartUpdated { timeout_addr: 0x1000, timeval, remaining_ns: 3_000_003_000 };
            continuation(&thread(libc::SYS_select, -38, resume), Duration::from_secs(1))
                .unwrap()
                .store
                .unwrap()
        };
        assert_eq!(updated(true), (0x1000, two_words(2, 3).to_vec()));
        assert_eq!(updated(false), (0x1000, two_words(2, 3000).to_vec()));
    }

    #[test]
    fn a_shortened_timeout_takes_the_place_of_the_argument() {
        let shortened = |nr, argument, timespec| {
            let mut t =
                thread(nr, -38, Resume::RestartShortened { argument, timespec, remaining_ns: 3_000_001 });
            t.regs.rsp = 0x7fff_1008;
            continuation(&t, Duration::from_nanos(1_000_000)).unwrap()
        };
        let c = shortened(libc::SYS_epoll_wait, 3, false);
        assert_eq!((c.regs.r10, c.store, c.regs.rax as i64), (3, None, ERESTARTNOHAND));
        let c = shortened(libc::SYS_rt_sigtimedwait, 2, true);
        assert_eq!(
            (c.regs.rdx, c.store),
            (0x7fff_0f00, Some((0x7fff_0f00, two_words(0, 2_000_001).to_vec())))
        );
    }

    #[test]
    fn partial_results_are_returned() {
        let resume = Resume::Return { value: 100, why: "half written".into() };
        assert_eq!(result(&thread(libc::SYS_write, -38, resume)), (100, -1));
    }
}
