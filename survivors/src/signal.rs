//! Signals: what happens when one comes, and those that have come already.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use anyhow::{Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, pthread_sigmask, raise, sigaction,
};

use crate::Stage;
use crate::map::{Map, PAGE};
use crate::procfs::{self, same};

static SEEN: AtomicI32 = AtomicI32::new(0);
static VALUE: AtomicUsize = AtomicUsize::new(0);
static STACK: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let here = 0u8;
    STACK.store(ptr::from_ref(&here) as usize, Ordering::Relaxed);
    // SAFETY: the kernel hands a valid siginfo to an SA_SIGINFO handler.
    VALUE.store(unsafe { (*info).si_value().sival_ptr } as usize, Ordering::Relaxed);
    SEEN.store(signal, Ordering::Relaxed);
}

fn install(signal: Signal, flags: SaFlags, mask: &[Signal]) -> Result<()> {
    let mask = mask.iter().copied().collect();
    let action = SigAction::new(SigHandler::SigAction(note), flags | SaFlags::SA_SIGINFO, mask);
    // SAFETY: the handler stores to atomics, nothing else.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

/// The kernel's own view of a disposition: handler, flags, restorer, mask.
fn action_of(signal: libc::c_int) -> Result<[u64; 4]> {
    let mut action = [0u64; 4];
    // SAFETY: rt_sigaction with a null new action writes the kernel's structure: four words on x86-64.
    let result = unsafe {
        libc::syscall(libc::SYS_rt_sigaction, signal, ptr::null::<u64>(), action.as_mut_ptr(), 8usize)
    };
    Errno::result(result)?;
    Ok(action)
}

/// All 64 dispositions, and one of the handlers is called after the crash.
pub fn handlers(stage: &mut Stage) -> Result<()> {
    install(Signal::SIGUSR1, SaFlags::SA_RESTART | SaFlags::SA_NODEFER, &[Signal::SIGHUP, Signal::SIGINT])?;
    install(Signal::SIGUSR2, SaFlags::SA_RESETHAND, &[])?;
    install(Signal::SIGCHLD, SaFlags::SA_NOCLDSTOP | SaFlags::SA_NOCLDWAIT, &[Signal::SIGTERM])?;
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: ignoring a signal runs no code.
    unsafe { sigaction(Signal::SIGQUIT, &ignore) }?;
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGWINCH);
    blocked.add(Signal::SIGALRM);
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None)?;
    let look = || -> Result<_> {
        let actions: Vec<_> = (1..=64).map(action_of).collect::<Result<_>>()?;
        Ok((actions, procfs::status(&["SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"])?))
    };
    let before = look()?;

    let crash = stage.crash()?;
    if crash.damage {
        install(Signal::SIGUSR1, SaFlags::empty(), &[])?;
    }
    let after = look()?;
    for (index, (before, after)) in before.0.iter().zip(&after.0).enumerate() {
        same(&format!("disposition of signal {}", index + 1), before, after)?;
    }
    same("signal sets", &before.1, &after.1)?;
    raise(Signal::SIGUSR1)?;
    same("signal that the handler saw", &libc::SIGUSR1, &SEEN.load(Ordering::Relaxed))
}

/// sigqueue(3) to this process, with a value.
fn queue(signal: libc::c_int, value: usize) -> Result<()> {
    let value = libc::sigval { sival_ptr: value as *mut libc::c_void };
    // SAFETY: sends a signal; the pointer is a number that nobody follows.
    Errno::result(unsafe { libc::sigqueue(libc::getpid(), signal, value) })?;
    Ok(())
}

fn block(signals: &[libc::c_int]) -> Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, the others read or change it.
    let (set, result) = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for &signal in signals {
            libc::sigaddset(&mut set, signal);
        }
        let result = libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
        (set, result)
    };
    ensure!(result == 0, "pthread_sigmask: {}", Errno::from_raw(result));
    Ok(set)
}

/// Takes the next pending signal: number, code, sender, value.
fn take(set: &libc::sigset_t) -> Option<(libc::c_int, libc::c_int, libc::pid_t, usize)> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one siginfo, whose sender and value are valid for kill and sigqueue.
    unsafe {
        let signal = libc::sigtimedwait(set, info.as_mut_ptr(), &now);
        let info = info.assume_init();
        (signal > 0).then(|| (signal, info.si_code, info.si_pid(), info.si_value().sival_ptr as usize))
    }
}

/// Blocked signals wait: a standard one once, real-time ones all, in order, with their values.
pub fn pending(stage: &mut Stage) -> Result<()> {
    let realtime = libc::SIGRTMIN() + 3;
    let set = block(&[libc::SIGUSR1, libc::SIGUSR2, realtime, realtime + 1])?;
    let own = std::process::id() as libc::pid_t;
    // SAFETY: sends a blocked signal to ourselves.
    Errno::result(unsafe { libc::kill(own, libc::SIGUSR1) })?;
    queue(libc::SIGUSR2, 77)?;
    queue(realtime + 1, 0xdead_beef_0000_0001)?;
    for value in 1..=5 {
        queue(realtime, value << 32 | 0x5eed)?;
    }

    let crash = stage.crash()?;
    if crash.damage {
        take(&set);
    }
    let mut found = Vec::new();
    while let Some(signal) = take(&set) {
        found.push(signal);
    }
    // SI_USER carries no value: what the kernel leaves there is not compared.
    for signal in found.iter_mut().filter(|signal| signal.1 == libc::SI_USER) {
        signal.3 = 0;
    }
    let mut expected = vec![(libc::SIGUSR1, libc::SI_USER, own, 0), (libc::SIGUSR2, libc::SI_QUEUE, own, 77)];
    expected.extend((1..=5).map(|value| (realtime, libc::SI_QUEUE, own, value << 32 | 0x5eed)));
    expected.push((realtime + 1, libc::SI_QUEUE, own, 0xdead_beef_0000_0001));
    same("pending signals", &expected, &found)
}

/// Sent to one thread with tgkill: no other one may get it.
pub fn thread_directed(stage: &mut Stage) -> Result<()> {
    let set = block(&[libc::SIGUSR1, libc::SIGUSR2])?;
    let (tell_tid, tids) = channel();
    let (go, goes) = channel::<bool>();
    let thread = std::thread::spawn(move || -> Result<Vec<libc::c_int>> {
        tell_tid.send(nix::unistd::gettid())?;
        if goes.recv()? {
            take(&set);
        }
        Ok(std::iter::from_fn(|| take(&set)).map(|signal| signal.0).collect())
    });
    let tid = tids.recv()?;
    // SAFETY: sends a signal that all threads block.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid.as_raw(), libc::SIGUSR1) };
    Errno::result(result)?;

    let crash = stage.crash()?;
    same("signals for the main thread", &None, &take(&set).map(|signal| signal.0))?;
    go.send(crash.damage)?;
    match thread.join() {
        Ok(found) => same("signals for the thread", &vec![libc::SIGUSR1], &found?),
        Err(_) => bail!("the thread panicked"),
    }
}

/// The alternate stack is still registered, and used.
pub fn altstack(stage: &mut Stage) -> Result<()> {
    let map = Map::anonymous(16 * PAGE, nix::sys::mman::MapFlags::MAP_PRIVATE)?;
    set_altstack(map.address(), 16 * PAGE, 0)?;
    install(Signal::SIGUSR1, SaFlags::SA_ONSTACK, &[])?;

    let crash = stage.crash()?;
    if crash.damage {
        set_altstack(0, 0, libc::SS_DISABLE)?;
    }
    raise(Signal::SIGUSR1)?;
    same("signal that the handler saw", &libc::SIGUSR1, &SEEN.load(Ordering::Relaxed))?;
    let stack = STACK.load(Ordering::Relaxed);
    let range = map.address()..map.address() + 16 * PAGE;
    ensure!(range.contains(&stack), "the handler ran at {stack:#x}, the alternate stack is {range:#x?}");
    // Before the memory goes away.
    set_altstack(0, 0, libc::SS_DISABLE)
}

fn set_altstack(address: usize, size: usize, flags: libc::c_int) -> Result<()> {
    let stack = libc::stack_t { ss_sp: address as *mut libc::c_void, ss_flags: flags, ss_size: size };
    // SAFETY: the memory, if any, stays mapped until the stack is disabled again.
    Errno::result(unsafe { libc::sigaltstack(&stack, ptr::null_mut()) })?;
    Ok(())
}
