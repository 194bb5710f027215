//! Descriptors of processes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::Result;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getpid, pipe};

use crate::Stage;
use crate::await_signal::{await_signal, block};
use crate::child::{Child, end};
use crate::procfs::same;

fn open(pid: Pid) -> Result<OwnedFd> {
    Ok(open_with(pid, 0)?)
}

fn open_with(pid: Pid, flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), flags))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

fn send(pidfd: &OwnedFd, signal: i32) -> Result<(), Errno> {
    // SAFETY: numbers, and no siginfo.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, 0, 0) };
    Errno::result(result).map(drop)
}

/// Whether the process has exited, or does within `timeout` milliseconds.
fn has_exited(pidfd: &OwnedFd, timeout: u16) -> Result<bool> {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::from(timeout))? == 1)
}

fn wait(pidfd: &OwnedFd) -> nix::Result<WaitStatus> {
    waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)
}

/// A child that exits after the crash.
pub fn child(stage: &mut Stage) -> Result<()> {
    let (reader, writer) = pipe()?;
    let (mut reader, mut writer) = (File::from(reader), File::from(writer));
    let mut child = Child::fork(stage, "child", |_, ready| {
        ready.announce()?;
        reader.read_exact(&mut [0])?;
        end(5)
    })?;
    let pidfd = open(child.pid())?;
    let twin = pidfd.try_clone()?;

    let crash = stage.crash()?;
    if crash.damage {
        kill(child.pid(), Signal::SIGKILL)?;
    }
    same("it has exited", &false, &(has_exited(&pidfd, 0)? && !crash.damage))?;
    writer.write_all(b"x")?;
    same("its exit is seen", &true, &has_exited(&twin, 60_000)?)?;
    let status = wait(&pidfd)?;
    child.forget();
    same("exit code", &WaitStatus::Exited(child.pid(), 5), &status)
}

/// One child that has exited, and one that has been waited for as well.
pub fn zombie(stage: &mut Stage) -> Result<()> {
    let body = |_: &Stage, ready: crate::child::Ready| {
        ready.announce()?;
        end(7)
    };
    let mut zombie = Child::fork(stage, "zombie", body)?;
    let pidfd = open(zombie.pid())?;
    same("its exit is seen", &true, &has_exited(&pidfd, 60_000)?)?;
    let mut gone = Child::fork(stage, "gone", body)?;
    let pidfd_of_gone = open(gone.pid())?;
    gone.wait()?;

    let crash = stage.crash()?;
    if crash.damage {
        zombie.wait()?;
    }
    same("both have exited", &(true, true), &(has_exited(&pidfd, 0)?, has_exited(&pidfd_of_gone, 0)?))?;
    same("a signal to who is gone", &Err(Errno::ESRCH), &send(&pidfd_of_gone, 0))?;
    same("waiting for who is gone", &Err(Errno::ECHILD), &wait(&pidfd_of_gone))?;
    let status = wait(&pidfd)?;
    zombie.forget();
    same("exit code", &WaitStatus::Exited(zombie.pid(), 7), &status)?;
    same("a signal to who was waited for", &Err(Errno::ESRCH), &send(&pidfd, 0))
}

/// A child has a pidfd of its parent, inherited: of the first thread, where the kernel knows such (PIDFD_THREAD).
pub fn send_signal(stage: &mut Stage) -> Result<()> {
    let signals = [libc::SIGUSR1, libc::SIGUSR2];
    block(&signals)?;
    const PIDFD_THREAD: i32 = libc::O_EXCL;
    let pidfd = open_with(getpid(), PIDFD_THREAD | libc::O_NONBLOCK)
        .or_else(|_| open_with(getpid(), libc::O_NONBLOCK))?;
    let mut child = Child::fork(stage, "sender", |stage, ready| {
        ready.announce()?;
        let crash = stage.wait();
        send(&pidfd, signals[usize::from(crash.damage)])?;
        Ok(())
    })?;

    stage.crash()?;
    child.join()?;
    same("signal", &libc::SIGUSR1, &await_signal(&signals)?.signo)?;
    send(&pidfd, libc::SIGUSR2)?;
    same("own signal", &libc::SIGUSR2, &await_signal(&signals)?.signo)
}
