//! Processes: who is whose child, and in which group, session and state.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, bail, ensure};
use nix::libc;
use nix::sched::{CloneFlags, CpuSet, clone, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill, killpg, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpgid, getpid, getppid, getsid, setpgid, setsid};

use crate::Stage;
use crate::child::{Child, end};
use crate::procfs::{self, same};

const SELF: Pid = Pid::from_raw(0);

/// Blocked in wait4(2) for a child that ends after the crash.
pub fn wait(stage: &mut Stage) -> Result<()> {
    let mut child = Child::fork(stage, "wait", |stage, ready| {
        ready.announce()?;
        end(if stage.wait().damage { 43 } else { 42 })
    })?;

    stage.ready()?;
    let status = waitpid(child.pid(), None)?;
    child.forget();
    same("status", &WaitStatus::Exited(child.pid(), 42), &status)?;
    ensure!(stage.in_another_kernel(), "the child ended before the crash");
    Ok(())
}

/// Two dead children that nobody has waited for: one exited, one was killed.
pub fn zombie(stage: &mut Stage) -> Result<()> {
    let mut exited = Child::fork(stage, "exited", |_, ready| {
        ready.announce()?;
        end(37)
    })?;
    let mut killed = Child::fork(stage, "killed", |_, ready| {
        ready.announce()?;
        raise(Signal::SIGTERM)?;
        Ok(())
    })?;
    let look = |child: &Child, flags: WaitPidFlag| {
        waitid(Id::Pid(child.pid()), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | flags)
    };
    // Until they are dead.
    look(&exited, WaitPidFlag::empty())?;
    look(&killed, WaitPidFlag::empty())?;

    let crash = stage.crash()?;
    if crash.damage {
        exited.wait()?;
    }
    let exited_status = look(&exited, WaitPidFlag::WNOHANG)?;
    same("exited child", &WaitStatus::Exited(exited.pid(), 37), &exited_status)?;
    same("its state", &"Z".to_owned(), &procfs::stat_field(exited.pid().as_raw(), 3)?)?;
    same("exit code", &WaitStatus::Exited(exited.pid(), 37), &exited.wait()?)?;
    same("killed child", &WaitStatus::Signaled(killed.pid(), Signal::SIGTERM, false), &killed.wait()?)
}

/// Parent, child, grandchild.
pub fn tree(stage: &mut Stage) -> Result<()> {
    let top = getpid();
    let mut child = Child::fork(stage, "middle", |stage, ready| {
        let (middle, before) = (getpid(), getppid());
        let mut grandchild = Child::fork(stage, "bottom", |stage, ready| {
            let own = getpid();
            ready.announce()?;
            if stage.wait().damage {
                end(9);
            }
            same("grandchild's parent and PID", &(middle, own), &(getppid(), getpid()))
        })?;
        ready.announce()?;
        stage.wait();
        same("child's parent and PID", &(before, middle), &(getppid(), getpid()))?;
        grandchild.join()
    })?;

    stage.crash()?;
    same("PID", &top, &getpid())?;
    child.join()
}

/// Children that do nothing but execute a shell, again and again: most crashes meet one of them with its old program gone and the
/// new one not complete.
pub fn exec(stage: &mut Stage) -> Result<()> {
    // $0: this text, $1: how often, $2: the file whose end it ends with.
    const SCRIPT: &str = r#"[ -e "$2" ] || exit 42; exec /bin/sh -c "$0" "$0" $(($1 + 1)) "$2""#;
    let on = stage.path("on");
    std::fs::write(&on, "on")?;
    let mut children = Vec::new();
    for label in ["first", "second", "third"] {
        let on = on.clone();
        children.push(Child::fork(stage, label, |_, ready| {
            be_modest()?;
            ready.announce()?;
            let error = Command::new("/bin/sh").args(["-c", SCRIPT, SCRIPT, "1"]).arg(on).exec();
            Err(error.into())
        })?);
    }
    let crash = stage.crash()?;
    std::fs::remove_file(&on)?;
    let expected = if crash.damage { 41 } else { 42 };
    for child in &mut children {
        same("child", &WaitStatus::Exited(child.pid(), expected), &child.wait()?)?;
    }
    Ok(())
}

/// Children that are forked, exit and are waited for, as fast as it goes: crashes meet them in the middle of it.
pub fn exits(stage: &mut Stage) -> Result<()> {
    let mut parent = Child::fork(stage, "parent", |stage, ready| {
        be_modest()?;
        ready.announce()?;
        for n in 0.. {
            let last = n % 16 == 0 && stage.in_another_kernel();
            let code = n % 100;
            // SAFETY: this process has a single thread.
            let pid = match unsafe { fork() }? {
                ForkResult::Parent { child } => child,
                ForkResult::Child => end(if last && stage.options().damage { 101 } else { code }),
            };
            same("child", &WaitStatus::Exited(pid, code), &waitpid(pid, None)?)?;
            if last {
                break;
            }
        }
        Ok(())
    })?;
    stage.crash()?;
    parent.join()
}

/// Lets everybody else go first.
fn be_modest() -> Result<()> {
    rustix::process::nice(19)?;
    Ok(())
}

/// Two children in a group that the first one leads.
pub fn group(stage: &mut Stage) -> Result<()> {
    let mut leader = Child::fork(stage, "leader", |_, ready| {
        setpgid(SELF, SELF)?;
        ready.announce()?;
        wait_for_death()
    })?;
    let group = leader.pid();
    let mut member = Child::fork(stage, "member", |_, ready| {
        setpgid(SELF, group)?;
        ready.announce()?;
        wait_for_death()
    })?;
    let own = getpgid(None)?;

    let crash = stage.crash()?;
    if crash.damage {
        setpgid(member.pid(), member.pid())?;
    }
    let groups = (getpgid(Some(leader.pid()))?, getpgid(Some(member.pid()))?, getpgid(None)?);
    same("groups of leader, member and parent", &(group, group, own), &groups)?;
    killpg(group, Signal::SIGUSR1)?;
    for child in [&mut leader, &mut member] {
        same("child", &WaitStatus::Signaled(child.pid(), Signal::SIGUSR1, false), &child.wait()?)?;
    }
    Ok(())
}

fn wait_for_death() -> ! {
    loop {
        nix::unistd::pause();
    }
}

/// A child that leads a session of its own.
pub fn session(stage: &mut Stage) -> Result<()> {
    let mut child = Child::fork(stage, "session", |stage, ready| {
        let session = setsid()?;
        ready.announce()?;
        stage.wait();
        same("child's session and group", &(session, session), &(getsid(None)?, getpgid(None)?))
    })?;
    let own = getsid(None)?;

    let crash = stage.crash()?;
    let expected = if crash.damage { own } else { child.pid() };
    same("the child's session, seen from outside", &expected, &getsid(Some(child.pid()))?)?;
    same("own session", &own, &getsid(None)?)?;
    child.join()
}

/// Stopped it sleeps through everything.
pub fn stopped(stage: &mut Stage) -> Result<()> {
    let mut child = Child::fork(stage, "stopped", |stage, ready| {
        ready.announce()?;
        raise(Signal::SIGSTOP)?;
        ensure!(stage.in_another_kernel(), "it went on before the crash");
        Ok(())
    })?;
    let status = waitpid(child.pid(), Some(WaitPidFlag::WUNTRACED))?;
    same("child", &WaitStatus::Stopped(child.pid(), Signal::SIGSTOP), &status)?;

    let crash = stage.crash()?;
    if crash.damage {
        kill(child.pid(), Signal::SIGCONT)?;
        child.join()?;
    }
    same("state", &"T".to_owned(), &procfs::stat_field(child.pid().as_raw(), 3)?)?;
    kill(child.pid(), Signal::SIGCONT)?;
    child.join()
}

/// Waits in vfork(2) for a child that, after the crash, writes to their memory and executes a program.
pub fn vfork(stage: &mut Stage) -> Result<()> {
    let written = AtomicU32::new(0);
    stage.ready()?;
    let status = through_vfork(stage, |stage| {
        if !stage.wait().damage {
            written.store(4711, Ordering::Relaxed);
        }
        let arguments = [c"true".as_ptr(), std::ptr::null()];
        // SAFETY: strings and array end as they should.
        unsafe { libc::execv(c"/bin/true".as_ptr(), arguments.as_ptr()) };
        127
    })?;
    ensure!(stage.in_another_kernel(), "the child ended before the crash");
    same("what the child wrote", &4711, &written.load(Ordering::Relaxed))?;
    same("exit code of the program", &0, &status)
}

/// The same with a child that maps memory, fills it, and exits.
pub fn vfork_exit(stage: &mut Stage) -> Result<()> {
    const SMALL: usize = 60 << 10;
    const LARGE: usize = 3 << 20;
    let mut small: Vec<Vec<u8>> = Vec::new();
    let mut large = Vec::new();
    stage.ready()?;
    let status = through_vfork(stage, |stage| {
        if !stage.wait().damage {
            // The heap has to grow for the small ones; large ones are mapped.
            small = (0..40).map(|n| vec![n; SMALL]).collect();
            large = vec![7u8; LARGE];
        }
        7
    })?;
    ensure!(stage.in_another_kernel(), "the child ended before the crash");
    same("number of small pieces", &40, &small.len())?;
    ensure!((0..40).zip(&small).all(|(n, piece)| *piece == vec![n; SMALL]), "a small piece is different");
    ensure!(large == vec![7; LARGE], "the large piece is different");
    drop((small, large));
    // And it grows on.
    ensure!((0..80u8).map(|n| vec![n; SMALL]).all(|piece| piece.len() == SMALL), "no memory");
    same("exit code of the child", &7, &status)
}

/// Runs `body` in a child that uses this memory, on a stack of its own, while this process waits in clone(2); the exit code, which `body`
/// returns unless it executes a program.
fn through_vfork(stage: &Stage, mut body: impl FnMut(&Stage) -> i32) -> Result<i32> {
    let mut stack = vec![0; 512 << 10];
    let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_VFORK;
    let run = Box::new(|| body(stage) as isize);
    // SAFETY: the stack outlives the call, which ends when the child no longer uses the memory; this process has a single thread.
    let child = unsafe { clone(run, &mut stack, flags, Some(libc::SIGCHLD)) }?;
    match waitpid(child, None)? {
        WaitStatus::Exited(pid, code) if pid == child => Ok(code),
        other => bail!("the child ended unexpectedly: {other:?}"),
    }
}

/// Many small things that nobody misses until they are gone.
pub fn attributes(stage: &mut Stage) -> Result<()> {
    let mut child = Child::fork(stage, "attributes", |stage, ready| {
        // The first CPU only: a crash kernel may have no other one.
        let allowed = sched_getaffinity(SELF)?;
        let mut first = CpuSet::new();
        first.set((0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu).unwrap_or(false)).unwrap_or(0))?;
        sched_setaffinity(SELF, &first)?;
        set_nice(7)?;
        std::fs::write("/proc/self/oom_score_adj", "300")?;
        prctl(libc::PR_SET_TIMERSLACK, 123_456)?;
        prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
        prctl(libc::PR_SET_PDEATHSIG, Signal::SIGUSR2 as u64)?;
        prctl(libc::PR_SET_THP_DISABLE, 1)?;
        prctl(libc::PR_SET_NAME, c"renamed)( name".as_ptr() as u64)?;
        prctl(libc::PR_SET_DUMPABLE, 0)?;
        // SAFETY: sets a flag of this process that later mappings are placed by.
        unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as u64) };
        let look = || -> Result<_> {
            let mut words = [0i32; 2];
            prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut words[0] as u64)?;
            prctl(libc::PR_GET_PDEATHSIG, &raw mut words[1] as u64)?;
            Ok([
                ("nice", procfs::stat_field(getpid().as_raw(), 19)?),
                ("affinity", format!("{:?}", sched_getaffinity(SELF)?)),
                ("oom_score_adj", std::fs::read_to_string("/proc/self/oom_score_adj")?),
                ("timer slack", prctl(libc::PR_GET_TIMERSLACK, 0)?.to_string()),
                ("subreaper", words[0].to_string()),
                ("pdeathsig", words[1].to_string()),
                ("THP disabled", prctl(libc::PR_GET_THP_DISABLE, 0)?.to_string()),
                ("dumpable", prctl(libc::PR_GET_DUMPABLE, 0)?.to_string()),
                ("name", procfs::status(&["Name"])?["Name"].clone()),
                // SAFETY: this value means: only ask.
                ("personality", unsafe { libc::personality(0xffff_ffff) }.to_string()),
            ])
        };
        let before = look()?;
        ready.announce()?;
        if stage.wait().damage {
            prctl(libc::PR_SET_TIMERSLACK, 1)?;
        }
        for (before, after) in before.iter().zip(&look()?) {
            same(before.0, &before.1, &after.1)?;
        }
        Ok(())
    })?;
    stage.crash()?;
    child.join()
}

fn set_nice(nice: libc::c_int) -> Result<()> {
    // SAFETY: takes numbers only.
    nix::errno::Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) })?;
    Ok(())
}

fn prctl(option: libc::c_int, value: u64) -> Result<libc::c_int> {
    // SAFETY: the options used here take a number, or (PR_SET_NAME, two PR_GET_…) the address of a valid string or int.
    let result = unsafe { libc::prctl(option, value, 0u64, 0u64, 0u64) };
    Ok(nix::errno::Errno::result(result)?)
}
