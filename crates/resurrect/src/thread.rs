//! Threads: made by injected clone3, then given everything that is per thread; registers last.

use snapshot::{Credentials, Fpu, Pid, Process, Reason, Rseq, Scheduling, Snapshot, Thread};

use crate::deadline::Deadline;
use crate::inject::{Arg, Call, InjectError, Missed, Tracee, call};
use crate::syscall::{Continuation, Timeout};
use crate::{credentials, seccomp, signal, sys};

const NT_X86_XSTATE: u32 = 0x202;
/// Size of `struct robust_list_head`.
const ROBUST_LIST_HEAD: u64 = 24;

/// clone3 of one more thread, to be run by the leader. It inherits what the leader has now.
pub(crate) fn create(tid: Pid) -> Call {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup.
    let mut args = [0u64; 11];
    args[0] = flags as u64;
    args[9] = 1;
    let bytes: Vec<u8> = args.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let size = bytes.len() as u64;
    let args = Arg::Data { bytes, pointers: vec![(8 * 8, tid.to_ne_bytes().to_vec())] };
    call!(format!("create thread {tid}"), libc::SYS_clone3, args, size)
}

/// Everything that a thread does for itself before it goes on, privileges given up at the end.
pub(crate) fn set_up(
    snapshot: &Snapshot,
    process: &Process,
    t: &Thread,
    own: &Credentials,
    own_slack: u64,
    losses: &mut Vec<Reason>,
) -> Vec<Call> {
    let mut calls = Vec::new();
    let prctl = |what: &str, option: i32, arg: Arg| {
        call!(format!("prctl {what}"), libc::SYS_prctl, option, arg, 0u64, 0u64, 0u64)
    };
    if t.robust_list != 0 {
        calls.push(call!("set_robust_list", libc::SYS_set_robust_list, t.robust_list, ROBUST_LIST_HEAD));
    }
    if t.clear_child_tid != 0 {
        calls.push(call!("set_tid_address", libc::SYS_set_tid_address, t.clear_child_tid));
    }
    if let Some(Rseq { addr, len, signature }) = t.rseq {
        calls.push(call!("rseq", libc::SYS_rseq, addr, len, 0u64, signature));
    }
    if t.altstack.size != 0 {
        const SS_AUTODISARM: u32 = 1 << 31;
        let a = &t.altstack;
        let words = [a.sp, u64::from(a.flags & SS_AUTODISARM), a.size];
        let stack: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        calls.push(call!("sigaltstack", libc::SYS_sigaltstack, stack));
    }
    let mut name = t.comm.as_bytes().to_vec();
    name.truncate(15);
    name.push(0);
    calls.push(prctl("PR_SET_NAME", libc::PR_SET_NAME, name.into()));
    if t.personality != 0 {
        calls.push(call!("personality", libc::SYS_personality, t.personality));
    }
    if t.timer_slack_ns != own_slack {
        calls.push(prctl("PR_SET_TIMERSLACK", libc::PR_SET_TIMERSLACK, t.timer_slack_ns.into()));
    }
    calls.extend(seccomp::restrict(snapshot, t));
    calls.extend(credentials::change(own, &t.credentials));
    // A change of credentials clears it.
    if t.pdeath_signal != 0 {
        calls.push(prctl("PR_SET_PDEATHSIG", libc::PR_SET_PDEATHSIG, t.pdeath_signal.into()));
    }
    if t.no_new_privs {
        calls.push(prctl("PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS, 1u64.into()));
    }
    let queue = signal::Queue::Thread(process.pid, t.tid);
    calls.extend(signal::queue(queue, process.without_timers(&t.pending), losses));
    calls
}

/// Scheduling policy, priority and CPUs: set from outside.
pub(crate) fn schedule(
    tid: Pid,
    s: &Scheduling,
    own_nice: i32,
    losses: &mut Vec<Reason>,
) -> Result<(), String> {
    const SCHED_FLAG_RESET_ON_FORK: u64 = 1;
    let real_time = [libc::SCHED_FIFO as u32, libc::SCHED_RR as u32].contains(&s.policy);
    if s.policy != 0 || s.nice != own_nice || s.reset_on_fork {
        // struct sched_attr, its first version of 48 bytes.
        let mut attr = [0u8; 48];
        attr[..4].copy_from_slice(&48u32.to_ne_bytes());
        attr[4..8].copy_from_slice(&s.policy.to_ne_bytes());
        let flags = if s.reset_on_fork { SCHED_FLAG_RESET_ON_FORK } else { 0 };
        attr[8..16].copy_from_slice(&flags.to_ne_bytes());
        attr[16..20].copy_from_slice(&s.nice.to_ne_bytes());
        attr[20..24].copy_from_slice(&(if real_time { s.rt_priority } else { 0 }).to_ne_bytes());
        // SAFETY: the kernel reads as many bytes as the structure says it has.
        unsafe { sys::raw(libc::SYS_sched_setattr, [tid as u64, attr.as_ptr() as u64, 0, 0, 0, 0]) }
            .map_err(|e| format!("sched_setattr: {e}"))?;
    }
    if !s.affinity.is_empty() {
        let mut mask = [0u8; 1024];
        for cpu in &s.affinity {
            if let Some(byte) = mask.get_mut(*cpu as usize / 8) {
                *byte |= 1 << (cpu % 8);
            }
        }
        // SAFETY: the kernel reads 1024 bytes.
        let r = unsafe {
            sys::raw(libc::SYS_sched_setaffinity, [tid as u64, 1024, mask.as_ptr() as u64, 0, 0, 0])
        };
        if let Err(e) = r {
            let text =
                format!("thread {tid}: its CPUs {:?} cannot be chosen ({e}): it runs on any", s.affinity);
            losses.push(Reason::new("affinity", text));
        }
    }
    Ok(())
}

/// Optional calls that failed, as losses.
pub(crate) fn losses_of(missed: Vec<Missed>) -> impl Iterator<Item = Reason> {
    missed.into_iter().map(|m| Reason::new("not-set", format!("{}: {}", m.what, m.errno)))
}

/// A thread caught inside a restartable sequence must go on at its abort handler: registering rseq anew makes the kernel forget
/// that it was inside. Reads the process's memory, which must have been poured.
pub(crate) fn leave_rseq_section(
    tracee: &Tracee,
    rseq: &Rseq,
    regs: &mut snapshot::Registers,
) -> Result<(), InjectError> {
    let word = |addr| {
        let mut bytes = [0; 8];
        tracee.read(addr, &mut bytes).map(|()| u64::from_ne_bytes(bytes))
    };
    let pointer = rseq.addr.wrapping_add(8);
    let section = word(pointer)?;
    if section == 0 {
        return Ok(());
    }
    // struct rseq_cs: version and flags (4 bytes each), start_ip, post_commit_offset, abort_ip.
    let (start, len, abort) =
        (word(section.wrapping_add(8))?, word(section.wrapping_add(16))?, word(section.wrapping_add(24))?);
    if regs.rip.wrapping_sub(start) >= len {
        return Ok(());
    }
    let mut signature = [0; 4];
    tracee.read(abort.wrapping_sub(4), &mut signature)?;
    if u32::from_ne_bytes(signature) != rseq.signature {
        let text = format!("the abort handler {abort:#x} of its restartable sequence has no signature");
        return Err(InjectError::Unexpected(text));
    }
    regs.rip = abort;
    tracee.write(pointer, &[0; 8])
}

/// Begins the timed call, if there is one, and stores what has to be stored. The thread ends in a stop from which it can be let go.
pub(crate) fn prepare(
    tracee: &Tracee,
    c: &mut Continuation,
    instruction: u64,
    deadline: Deadline,
) -> Result<(), InjectError> {
    if let Some((addr, bytes)) = &c.store {
        tracee.write(*addr, bytes)?;
    }
    if let Some(timed) = c.timed {
        let mut args = timed.call.args;
        args[timed.argument] = match timed.timeout {
            Timeout::Milliseconds(ms) => ms,
            Timeout::Timespec(bytes) => {
                tracee.write(tracee.scratch_data(), &bytes)?;
                tracee.scratch_data()
            }
        };
        let result =
            tracee.call_and_interrupt(instruction, "begin the timed call", timed.call.nr, args, deadline)?;
        c.begun(result);
    }
    Ok(())
}

/// FPU, general registers, signal mask: the last things, in this order.
pub(crate) fn set_state(tracee: &Tracee, t: &Thread, regs: &snapshot::Registers) -> Result<(), InjectError> {
    if let Fpu::Saved { xstate, .. } | Fpu::LostInSyscall { xstate } = &t.fpu {
        let mut buf = vec![0; 16 << 10];
        let len = tracee.register_set(NT_X86_XSTATE, &mut buf)?;
        buf.truncate(len);
        fit_xstate(xstate, &mut buf).map_err(InjectError::Unexpected)?;
        tracee.set_register_set(NT_X86_XSTATE, &buf)?;
    }
    tracee.set_registers(regs)?;
    tracee.set_signal_mask(t.blocked)
}

/// Overwrites this kernel's XSAVE area with the saved one, whose size may differ.
fn fit_xstate(saved: &[u8], area: &mut [u8]) -> Result<(), String> {
    const LEGACY: usize = 464;
    const HEADER: usize = 512;
    const EXTENDED: usize = 576;
    if saved.len() < EXTENDED || area.len() < EXTENDED {
        return Err(format!("XSAVE areas of {} and {} bytes", saved.len(), area.len()));
    }
    let word = |bytes: &[u8], at: usize| -> u64 {
        bytes[at..at + 8].iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
    };
    // Software-reserved bytes 464 to 511: the kernel says there which components it handles.
    let supported = word(area, LEGACY);
    let present = word(saved, HEADER);
    if present & !supported != 0 {
        return Err(format!("FPU state components {:#x} are unknown to this kernel", present & !supported));
    }
    area[..LEGACY].copy_from_slice(&saved[..LEGACY]);
    area[HEADER..].fill(0);
    area[HEADER..HEADER + 8].copy_from_slice(&present.to_ne_bytes());
    let common = saved.len().min(area.len());
    area[EXTENDED..common].copy_from_slice(&saved[EXTENDED..common]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(len: usize, supported: u64) -> Vec<u8> {
        let mut a = vec![0xee; len];
        a[464..472].copy_from_slice(&supported.to_ne_bytes());
        a
    }

    #[test]
    fn the_kernels_own_bytes_stay_and_sizes_may_differ() {
        let mut saved = vec![1; 832];
        saved[512..520].copy_from_slice(&7u64.to_ne_bytes());
        let mut now = area(1000, 0x207);
        fit_xstate(&saved, &mut now).unwrap();
        assert_eq!((now[463], now[464], now[465], now[472]), (1, 7, 2, 0xee));
        assert_eq!(now[512..520], 7u64.to_ne_bytes());
        assert!(now[520..576].iter().all(|&b| b == 0), "xcomp_bv must be 0");
        assert_eq!((now[576], now[831], now[832], now[999]), (1, 1, 0, 0));
    }

    #[test]
    fn unknown_components_are_refused() {
        let mut saved = vec![0; 2696];
        saved[512..520].copy_from_slice(&0xe7u64.to_ne_bytes());
        assert!(fit_xstate(&saved, &mut area(832, 7)).unwrap_err().contains("0xe0"));
        assert!(fit_xstate(&[0; 10], &mut area(832, 7)).is_err());
    }
}
