//! Threads, and what the kernel keeps for each of them.

use std::arch::asm;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::Builder;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::unistd::{Pid, gettid};

use crate::Stage;
use crate::procfs::{self, same};
use crate::stage::sleep;

/// An interrupted critical section is aborted at once; this is for a machine that has other things to do.
const ABORT_DEADLINE: Duration = Duration::from_secs(20);

fn joined<T>(thread: std::thread::JoinHandle<Result<T>>) -> Result<T> {
    match thread.join() {
        Ok(result) => result,
        Err(_) => bail!("a thread panicked"),
    }
}

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(0) };
}

/// Six threads, each with its own TID, TLS, name and mask, asleep on a condition variable.
pub fn tls(stage: &mut Stage) -> Result<()> {
    let gate = Arc::new((Mutex::new(None), Condvar::new()));
    let (sender, started) = channel();
    let mut threads = Vec::new();
    for index in 0..6u64 {
        let gate = Arc::clone(&gate);
        let sender = sender.clone();
        let thread = Builder::new().name(format!("survivor-{index}")).spawn(move || -> Result<()> {
            OWN.set(1000 + index);
            let mut mask = SigSet::empty();
            mask.add([Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGHUP][index as usize % 3]);
            pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&mask), None)?;
            let look = || -> Result<_> {
                let fields = ["Name", "Pid", "Tgid", "SigBlk"];
                Ok((gettid(), OWN.get(), thread_pointer(), procfs::status(&fields)?))
            };
            let before = look()?;
            sender.send(())?;
            let (lock, condition) = &*gate;
            let mut open = lock.lock().unwrap_or_else(|e| e.into_inner());
            while open.is_none() {
                open = condition.wait(open).unwrap_or_else(|e| e.into_inner());
            }
            if *open == Some(true) && index == 3 {
                OWN.set(0);
            }
            same(&format!("thread {index}"), &before, &look()?)
        })?;
        threads.push(thread);
    }
    for _ in 0..6 {
        started.recv()?;
    }

    let crash = stage.crash()?;
    *gate.0.lock().unwrap_or_else(|e| e.into_inner()) = Some(crash.damage);
    gate.1.notify_all();
    threads.into_iter().try_for_each(joined)
}

/// FS base, which is where TLS hangs.
fn thread_pointer() -> u64 {
    let pointer;
    // SAFETY: on x86-64 the word at fs:0 is the thread pointer itself (ELF TLS ABI).
    unsafe { asm!("mov {}, fs:[0]", out(reg) pointer, options(nostack, readonly, preserves_flags)) };
    pointer
}

/// One thread holds a mutex, two wait for it in the kernel.
pub fn mutex(stage: &mut Stage) -> Result<()> {
    let shared = Arc::new((Mutex::new(0u32), Condvar::new(), AtomicU32::new(0)));
    let held = shared.0.lock().unwrap_or_else(|e| e.into_inner());
    let mut threads = Vec::new();
    for _ in 0..2 {
        let shared = Arc::clone(&shared);
        threads.push(Builder::new().spawn(move || -> Result<()> {
            shared.2.fetch_add(1, Ordering::Relaxed);
            let mut count = shared.0.lock().unwrap_or_else(|e| e.into_inner());
            *count += 1;
            shared.1.notify_all();
            Ok(())
        })?);
    }
    let waiter = {
        let shared = Arc::clone(&shared);
        let other = Arc::new((Mutex::new(()), Condvar::new()));
        let own = Arc::clone(&other);
        let thread = Builder::new().spawn(move || -> Result<()> {
            let guard = own.0.lock().unwrap_or_else(|e| e.into_inner());
            shared.2.fetch_add(1, Ordering::Relaxed);
            drop(own.1.wait(guard).unwrap_or_else(|e| e.into_inner()));
            Ok(())
        })?;
        (thread, other)
    };
    while shared.2.load(Ordering::Relaxed) < 3 {
        std::thread::yield_now();
    }

    let crash = stage.crash()?;
    let mut count = held;
    if crash.damage {
        // Lets go for a moment.
        count = shared.1.wait_while(count, |count| *count < 2).unwrap_or_else(|e| e.into_inner());
    }
    ensure!(*count == 0, "somebody had the mutex meanwhile");
    while *count < 2 {
        count = shared.1.wait(count).unwrap_or_else(|e| e.into_inner());
    }
    drop(count);
    threads.into_iter().try_for_each(joined)?;
    // The mutex of the condition variable is free again only once its owner waits.
    drop(waiter.1.0.lock().unwrap_or_else(|e| e.into_inner()));
    waiter.1.1.notify_one();
    joined(waiter.0)
}

/// A robust mutex as glibc makes it: the kernel marks it when its owner ends (through the robust list).
struct RobustMutex(Box<libc::pthread_mutex_t>);

// SAFETY: a pthread mutex is made to be used by several threads; it stays in its box.
unsafe impl Send for RobustMutex {}
// SAFETY: as above.
unsafe impl Sync for RobustMutex {}

impl RobustMutex {
    fn new() -> Result<Self> {
        let mut attributes = MaybeUninit::uninit();
        let mut mutex = Box::new(libc::PTHREAD_MUTEX_INITIALIZER);
        // SAFETY: initialises the attributes, then the mutex, which is already in its final place.
        let result = unsafe {
            libc::pthread_mutexattr_init(attributes.as_mut_ptr());
            libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST);
            libc::pthread_mutex_init(&mut *mutex, attributes.as_ptr())
        };
        ensure!(result == 0, "pthread_mutex_init: {}", Errno::from_raw(result));
        Ok(Self(mutex))
    }

    fn lock(&self) -> Errno {
        // SAFETY: an initialised mutex, which lock and unlock may be called on by any thread.
        Errno::from_raw(unsafe { libc::pthread_mutex_lock(ptr::from_ref(&*self.0).cast_mut()) })
    }

    fn make_consistent(&self) -> Errno {
        // SAFETY: as in lock(); called by the owner.
        Errno::from_raw(unsafe { libc::pthread_mutex_consistent(ptr::from_ref(&*self.0).cast_mut()) })
    }

    fn unlock(&self) -> Errno {
        // SAFETY: as in lock(); called by the owner.
        Errno::from_raw(unsafe { libc::pthread_mutex_unlock(ptr::from_ref(&*self.0).cast_mut()) })
    }
}

const OK: Errno = Errno::UnknownErrno; // what Errno makes of 0

/// The owner ends after the crash without letting go.
pub fn robust(stage: &mut Stage) -> Result<()> {
    let mutex = Arc::new(RobustMutex::new()?);
    let (tell_owned, owned) = channel();
    let (end, ends) = channel();
    let owner = {
        let mutex = Arc::clone(&mutex);
        Builder::new().spawn(move || -> Result<()> {
            same("pthread_mutex_lock", &OK, &mutex.lock())?;
            tell_owned.send(())?;
            if ends.recv()? {
                mutex.unlock();
            }
            Ok(())
        })?
    };
    owned.recv()?;

    let crash = stage.crash()?;
    end.send(crash.damage)?;
    joined(owner)?;
    // Blocks for ever if the kernel has forgotten the owner's robust list: then this survivor never has a verdict.
    same("pthread_mutex_lock after the owner's death", &Errno::EOWNERDEAD, &mutex.lock())?;
    same("pthread_mutex_consistent", &OK, &mutex.make_consistent())?;
    same("pthread_mutex_unlock", &OK, &mutex.unlock())
}

/// pthread_join waits for the kernel to clear the thread's TID when it exits.
pub fn join(stage: &mut Stage) -> Result<()> {
    let (end, ends) = channel::<u32>();
    let thread = Builder::new().spawn(move || -> Result<u32> { Ok(ends.recv()? + 1) })?;
    let (started, has_started) = channel();
    // A thread that is blocked in pthread_join itself when the kernel dies.
    let joiner = Builder::new().spawn(move || -> Result<u32> {
        started.send(())?;
        joined(thread)
    })?;
    has_started.recv()?;

    let crash = stage.crash()?;
    end.send(if crash.damage { 0 } else { 41 })?;
    same("what the thread returned", &42, &joined(joiner)?)
}

// What glibc registers for each thread lies at this offset from the thread pointer.
unsafe extern "C" {
    static __rseq_offset: isize;
    static __rseq_size: u32;
}

/// Written by the assembly in [`critical_section`].
#[repr(C)]
#[derive(Default)]
struct Progress {
    stop: AtomicU64,
    rounds: AtomicU64,
    aborts: AtomicU64,
    /// The kernel had taken the section away, but had not gone to the abort handler.
    lost: AtomicU64,
}

/// A thread that is in a restartable sequence practically always, and another one that is merely registered.
pub fn rseq(stage: &mut Stage) -> Result<()> {
    // SAFETY: glibc sets these before main and never again.
    let (offset, size) = unsafe { (__rseq_offset, __rseq_size) };
    ensure!(size > 0, "glibc has not registered rseq (GLIBC_TUNABLES?)");
    let progress = Arc::new(Progress::default());
    let (sender, tid) = channel();
    let thread = {
        let progress = Arc::clone(&progress);
        Builder::new().spawn(move || -> Result<()> {
            sender.send(gettid())?;
            let area = thread_pointer().wrapping_add_signed(offset as i64);
            critical_section(area, &progress);
            registered(area)
        })?
    };
    let tid = tid.recv()?;
    while progress.rounds.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    let own_area = thread_pointer().wrapping_add_signed(offset as i64);
    registered(own_area)?;

    let crash = stage.crash()?;
    if crash.damage {
        progress.lost.fetch_add(1, Ordering::Relaxed);
    }
    // What counts is that it is still aborted now. Both on one CPU, each wake-up here takes it from the other.
    let before = progress.aborts.load(Ordering::Relaxed);
    let only = first_allowed_cpu()?;
    for thread in [tid, gettid()] {
        sched_setaffinity(thread, &only).context("sched_setaffinity")?;
    }
    let deadline = Instant::now() + ABORT_DEADLINE;
    while progress.aborts.load(Ordering::Relaxed) == before && Instant::now() < deadline {
        sleep(Duration::from_millis(10));
    }
    let aborted = progress.aborts.load(Ordering::Relaxed) > before;
    progress.stop.store(1, Ordering::Relaxed);
    joined(thread)?;
    let lost = progress.lost.load(Ordering::Relaxed);
    ensure!(lost == 0, "{lost} times the critical section was interrupted but not aborted");
    ensure!(aborted, "the critical section is no longer aborted when it is interrupted");
    registered(own_area)
}

/// One CPU of those that this thread may run on.
fn first_allowed_cpu() -> Result<CpuSet> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")?;
    let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut only = CpuSet::new();
    only.set(first.context("no CPU is allowed")?)?;
    Ok(only)
}

/// getcpu(2) itself: the C library would ask the registered area.
fn cpu_by_call() -> Result<u32> {
    let mut cpu = 0u32;
    // SAFETY: the call writes one word.
    let result = unsafe { libc::syscall(libc::SYS_getcpu, &raw mut cpu, 0, 0) };
    Errno::result(result).context("getcpu")?;
    Ok(cpu)
}

/// The kernel keeps the CPU number in the registered area right.
fn registered(area: u64) -> Result<()> {
    // It may change between two looks, but not every time.
    let mut seen = (0, 0);
    for _ in 0..1000 {
        // SAFETY: glibc's rseq area of this thread: cpu_id_start and cpu_id, both u32, written by the kernel.
        let by_rseq = unsafe { AtomicU32::from_ptr((area + 4) as *mut u32) }.load(Ordering::Relaxed);
        let by_call = cpu_by_call()?;
        seen = (by_rseq, by_call);
        if by_rseq == by_call {
            return Ok(());
        }
    }
    bail!("rseq says CPU {}, the system call says {}", seen.0, seen.1)
}

/// Spins inside a restartable sequence until told to stop. Whenever the kernel aborts it, it enters again.
///
/// As long as nothing interrupts, `rseq_cs` in the area points to the descriptor. If it does not and we are still inside,
/// somebody has resumed us in the middle without going to the abort handler: a real section would go wrong there.
fn critical_section(area: u64, progress: &Progress) {
    // SAFETY: writes to rseq_cs (offset 8) of this thread's own rseq area, by the protocol of rseq(2), and to
    // `progress`, with plain stores to words that no one else writes meanwhile; no stack is used.
    unsafe {
        asm!(
            ".pushsection .data.rel.ro.survivor_rseq, \"aw\"",
            ".balign 32",
            "3: .long 0, 0",           // version, flags
            ".quad 4f, 5f - 4f, 6f",   // start, length, abort handler
            ".popsection",
            "7:",
            "lea {section}, [rip + 3b]",
            "mov [{area} + 8], {section}",
            "4:",
            "inc qword ptr [{progress} + 8]",
            "cmp qword ptr [{area} + 8], {section}",
            "jne 9f",
            "cmp qword ptr [{progress}], 0",
            "je 4b",
            "5:",
            "jmp 8f",
            "9:",
            "inc qword ptr [{progress} + 24]",
            "jmp 7b",
            ".long 0x53053053",        // the signature that glibc registered
            "6:",
            "inc qword ptr [{progress} + 16]",
            "jmp 7b",
            "8:",
            "mov qword ptr [{area} + 8], 0",
            area = in(reg) area,
            progress = in(reg) ptr::from_ref(progress),
            section = out(reg) _,
            options(nostack),
        );
    }
    const { assert!(std::mem::offset_of!(Progress, lost) == 24) };
}
