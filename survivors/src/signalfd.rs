//! Signal descriptors.

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;

use anyhow::Result;
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::unistd::Pid;

use crate::Stage;
use crate::child::Child;
use crate::procfs::same;

/// A descriptor for signals, which are blocked from now on.
pub(crate) fn new(signals: &[i32]) -> Result<File> {
    let mut set = SigSet::empty();
    for &signal in signals {
        set.add(Signal::try_from(signal)?);
    }
    set.thread_block()?;
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: the kernel reads the set; the descriptor that comes back is nobody else's.
    Ok(unsafe { File::from_raw_fd(Errno::result(libc::signalfd(-1, set.as_ref(), flags))?) })
}

/// Number of the next signal.
fn next(mut file: &File) -> Result<u32, Errno> {
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    let read = file.read_exact(&mut info).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)));
    read.map(|()| u32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
}

/// The set, and a signal that was pending.
pub fn mask(stage: &mut Stage) -> Result<()> {
    let file = new(&[libc::SIGUSR1, libc::SIGHUP])?;
    // Blocked, and not in the set.
    let other = new(&[libc::SIGUSR2])?;
    raise(Signal::SIGUSR1)?;
    raise(Signal::SIGUSR2)?;

    let crash = stage.crash()?;
    if crash.damage {
        next(&file)?;
    }
    same("pending signal", &Ok(libc::SIGUSR1 as u32), &next(&file))?;
    same("nothing else", &Err(Errno::EAGAIN), &next(&file))?;
    raise(Signal::SIGHUP)?;
    same("next signal", &Ok(libc::SIGHUP as u32), &next(&file))?;
    same("the other set", &Ok(libc::SIGUSR2 as u32), &next(&other))
}

/// A child blocked in poll(2) on one gets the signal.
pub fn waiter(stage: &mut Stage) -> Result<()> {
    let mut child = Child::fork(stage, "waiter", |_, ready| {
        let file = new(&[libc::SIGUSR1, libc::SIGUSR2])?;
        ready.announce()?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry.
        Errno::result(unsafe { libc::poll(&mut poll, 1, -1) })?;
        same("signal", &Ok(libc::SIGUSR1 as u32), &next(&file))
    })?;

    let crash = stage.crash()?;
    kill(Pid::from_raw(child.pid().as_raw()), if crash.damage { Signal::SIGUSR2 } else { Signal::SIGUSR1 })?;
    child.join()
}
