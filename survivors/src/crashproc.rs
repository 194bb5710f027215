//! Crash procedures (libotherworld): called once under the second kernel, and then the process goes on as they say.

use std::ffi::{CString, c_void};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc;
use nix::sys::wait::WaitStatus;
use otherworld::record::LOCK_MUTEX;
use otherworld::{Context, DescriptorState, LockState, Options, Outcome};

use crate::Stage;
use crate::procfs::same;
use crate::stage::sleep;

static CALLS: AtomicU32 = AtomicU32::new(0);
static THREADS: AtomicU64 = AtomicU64::new(0);
static HOLDER: AtomicI32 = AtomicI32::new(0);
static DAMAGED: AtomicU64 = AtomicU64::new(0);
static WATCHED: AtomicI32 = AtomicI32::new(-1);
static FLOAT: AtomicU64 = AtomicU64::new(0);
/// What the context says of the watched lock.
static TOLD_HOLDER: AtomicI32 = AtomicI32::new(0);
/// The application's name for it.
const TAG: u32 = 42;
static MESSAGE: Mutex<String> = Mutex::new(String::new());
static EXECUTED: Mutex<Vec<CString>> = Mutex::new(Vec::new());
static mut LOCK: libc::pthread_mutex_t = libc::PTHREAD_MUTEX_INITIALIZER;

extern "C" fn look(context: &Context, data: *mut c_void) -> Outcome {
    CALLS.fetch_add(1, Ordering::Relaxed);
    THREADS.store(context.threads().len() as u64, Ordering::Relaxed);
    DAMAGED.store(context.damaged_regions().first().copied().unwrap_or(0), Ordering::Relaxed);
    let told = context.locks().iter().find(|lock| lock.tag == TAG && lock.known == 1);
    TOLD_HOLDER.store(told.map_or(0, |lock| lock.owner), Ordering::Relaxed);
    // SAFETY: a mutex that lives as long as the program.
    let state = unsafe { otherworld::mutex_state(&raw const LOCK) };
    HOLDER.store(if let LockState::HeldBy(tid) = state { tid } else { 0 }, Ordering::Relaxed);
    let watched = WATCHED.load(Ordering::Relaxed);
    let is_back = |d: &&otherworld::Descriptor| d.fd == watched && d.state == DescriptorState::Back;
    if context.descriptors().iter().any(|d| is_back(&d)) {
        *MESSAGE.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = context.panic().to_owned();
    }
    // Uses what must not be seen afterwards: the vector registers.
    let root = (data as u64 as f64).sqrt();
    FLOAT.store(root.to_bits(), Ordering::Relaxed);
    Outcome::Continue
}

/// It is called once, with what it is to know, and every thread goes on.
pub fn goes_on(stage: &mut Stage) -> Result<()> {
    let file = fs::File::open("/dev/null")?;
    WATCHED.store(file.as_raw_fd(), Ordering::Relaxed);
    let (whole, mut changed) = (vec![1u8; 100_000], vec![2u8; 100_000]);
    otherworld::register(look, 1_000_000 as *mut c_void, &Options::default())?;
    // SAFETY: vectors of our own.
    unsafe {
        otherworld::protect(whole.as_ptr(), whole.len())?;
        otherworld::protect(changed.as_ptr(), changed.len())?;
    }
    changed[77_777] ^= 1;
    otherworld::watch_lock((&raw const LOCK).cast(), LOCK_MUTEX, TAG)?;
    let (ready, is_ready) = std::sync::mpsc::channel();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let holder = scope.spawn(|| {
            // SAFETY: a mutex that lives as long as the program.
            unsafe { libc::pthread_mutex_lock(&raw mut LOCK) };
            // SAFETY: no arguments.
            let tid = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
            _ = ready.send(tid);
            while !done.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(50));
            }
            // SAFETY: it is ours.
            unsafe { libc::pthread_mutex_unlock(&raw mut LOCK) };
        });
        let outcome = (|| -> Result<()> {
            let tid = is_ready.recv()?;
            let crash = stage.crash()?;
            if crash.damage {
                CALLS.store(0, Ordering::Relaxed);
            }
            same("calls", &1, &CALLS.load(Ordering::Relaxed))?;
            same("threads", &2, &THREADS.load(Ordering::Relaxed))?;
            same("who held the lock", &tid, &HOLDER.load(Ordering::Relaxed))?;
            same("who the context says held it", &tid, &TOLD_HOLDER.load(Ordering::Relaxed))?;
            same("the damaged region", &(changed.as_ptr() as u64), &DAMAGED.load(Ordering::Relaxed))?;
            same("square root", &1000f64.to_bits(), &FLOAT.load(Ordering::Relaxed))?;
            let message = MESSAGE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
            ensure!(
                !message.is_empty(),
                "it was not told why the kernel died, or not that a descriptor is back"
            );
            Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        if holder.join().is_err() {
            bail!("the other thread panicked");
        }
        outcome
    })
}

/// What the hidden command does: registers a procedure that answers so, and says in `log` that it has begun.
pub fn child(how: &str, log: &Path) -> Result<()> {
    extern "C" fn restart(_: &Context, _: *mut c_void) -> Outcome {
        Outcome::Restart
    }
    extern "C" fn exit(_: &Context, _: *mut c_void) -> Outcome {
        Outcome::Exit
    }
    extern "C" fn crash(_: &Context, _: *mut c_void) -> Outcome {
        // SAFETY: it is meant to crash, and does.
        unsafe { std::ptr::null_mut::<u8>().write_volatile(1) };
        Outcome::Continue
    }
    extern "C" fn execute(_: &Context, _: *mut c_void) -> Outcome {
        let Ok(mut words) = EXECUTED.lock() else { return Outcome::Exit };
        let program: Vec<CString> = std::mem::take(&mut *words);
        _ = nix::unistd::execv(c"/proc/self/exe", &program);
        Outcome::Exit
    }
    extern "C" fn forever(_: &Context, _: *mut c_void) -> Outcome {
        loop {
            std::hint::spin_loop();
        }
    }
    let before = fs::read_to_string(log).unwrap_or_default();
    fs::write(log, format!("{before}begun {}\n", std::process::id()))?;
    if !before.is_empty() {
        ensure!(how != "execute", "it was to execute something else");
        return Ok(());
    }
    let options = Options { time_limit: Duration::from_secs(2), ..Options::default() };
    let log_name = CString::new(log.as_os_str().as_encoded_bytes())?;
    *EXECUTED.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
        vec![c"other".into(), c"crashproc-child".into(), c"executed".into(), log_name];
    let procedure = match how {
        "execute" => execute,
        "restart" => restart,
        "exit" => exit,
        "crash" => crash,
        "forever" => forever,
        _ => bail!("no such answer"),
    };
    otherworld::register(procedure, std::ptr::null_mut(), &options)?;
    // A second thread, which ends with a restart.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                sleep(Duration::from_secs(3600));
            }
        });
        fs::write(log.with_extension("ready"), "")?;
        loop {
            sleep(Duration::from_secs(3600));
        }
    })
}

/// A child that has a procedure with this answer; how it ends, and how often it has begun.
fn with_child(
    stage: &mut Stage,
    how: &str,
    check: impl FnOnce(WaitStatus, usize) -> Result<()>,
) -> Result<()> {
    let log = stage.path("log");
    let mut command = Command::new("/proc/self/exe");
    let mut child = command.args(["crashproc-child", how]).arg(&log).spawn()?;
    while !log.with_extension("ready").exists() {
        ensure!(child.try_wait()?.is_none(), "the child has ended");
        sleep(Duration::from_millis(20));
    }
    let crash = stage.crash()?;
    if crash.damage {
        child.kill()?;
        fs::write(&log, "")?;
    }
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    let status = nix::sys::wait::waitpid(pid, None).context("waitpid")?;
    let text = fs::read_to_string(&log)?;
    ensure!(text.lines().all(|line| line == format!("begun {pid}")), "another process has begun: {text}");
    check(status, text.lines().count())
}

/// The program begins anew, in the same process.
pub fn restarts(stage: &mut Stage) -> Result<()> {
    ends(stage, "restart", 2)
}

/// It executes a program, which ends all its threads.
pub fn executes(stage: &mut Stage) -> Result<()> {
    ends(stage, "execute", 2)
}

/// Its other thread goes on meanwhile: the procedure waits for it.
pub fn others_run(stage: &mut Stage) -> Result<()> {
    static ROUNDS: AtomicU64 = AtomicU64::new(0);
    static SEEN: AtomicU64 = AtomicU64::new(0);
    extern "C" fn wait(_: &Context, _: *mut c_void) -> Outcome {
        let before = ROUNDS.load(Ordering::Relaxed);
        while ROUNDS.load(Ordering::Relaxed) < before + 2 {
            sleep(Duration::from_millis(5));
        }
        SEEN.fetch_add(1, Ordering::Relaxed);
        Outcome::Continue
    }
    let options = Options { threads_run: true, ..Options::default() };
    otherworld::register(wait, std::ptr::null_mut(), &options)?;
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                ROUNDS.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(20));
            }
        });
        let outcome = stage.crash().and_then(|crash| {
            if crash.damage {
                SEEN.store(0, Ordering::Relaxed);
            }
            same("how often the procedure has seen the other thread go on", &1, &SEEN.load(Ordering::Relaxed))
        });
        done.store(true, Ordering::Relaxed);
        outcome
    })
}

/// The process ends.
pub fn exits(stage: &mut Stage) -> Result<()> {
    ends(stage, "exit", 1)
}

/// It ends with 0, having begun so often.
fn ends(stage: &mut Stage, how: &str, times: usize) -> Result<()> {
    with_child(stage, how, |status, begun| {
        same("how often it has begun", &times, &begun)?;
        ensure!(matches!(status, WaitStatus::Exited(_, 0)), "it ended with {status:?}");
        Ok(())
    })
}

/// A procedure that crashes costs its process, and nobody else.
pub fn crashes(stage: &mut Stage) -> Result<()> {
    is_given_up(stage, "crash")
}

/// One that does not return is given up in its time.
pub fn never_returns(stage: &mut Stage) -> Result<()> {
    is_given_up(stage, "forever")
}

fn is_given_up(stage: &mut Stage, how: &str) -> Result<()> {
    with_child(stage, how, |status, begun| {
        same("how often it has begun", &1, &begun)?;
        ensure!(matches!(status, WaitStatus::Signaled(..)), "it ended with {status:?}");
        Ok(())
    })
}
