//! Descriptors of processes.

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;
use snapshot::{FileKind, Pid, PidFd, ProcFile, Process, Reason};

use crate::company::Company;
use crate::sys;

/// pidfd_open(2).
pub(crate) fn open(pid: Pid, flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = sys::raw(libc::SYS_pidfd_open, [pid as u64, flags as u64, 0, 0, 0, 0])?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// The same open file as descriptor `fd` of the process of `pidfd`: pidfd_getfd(2).
pub(crate) fn get(pidfd: i32, fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = sys::raw(libc::SYS_pidfd_getfd, [pidfd as u64, fd as u64, 0, 0, 0, 0])?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// What a pidfd is now. `exists`: whether its process comes back, and is there already.
pub(crate) fn restore(pidfd: &PidFd, exists: bool) -> Result<OwnedFd, Errno> {
    // PIDFD_THREAD.
    let flags = if pidfd.thread { libc::O_EXCL } else { 0 };
    if exists && !pidfd.gone {
        return open(pidfd.pid, flags);
    }
    // One of a process that has ended.
    let child = sys::fork(0, 0, 0)?;
    if child == 0 {
        sys::exit(0);
    }
    let opened = open(child, flags);
    let mut status = 0;
    // SAFETY: waits for the child that has just been made.
    Errno::result(unsafe { libc::waitpid(child, &mut status, libc::__WALL) })?;
    opened
}

/// Processes that `process` has a pidfd of, and that do not come back: for it, they have exited.
pub(crate) fn lost_processes(company: &Company<'_>, process: &Process) -> Vec<Reason> {
    let mut losses = Vec::new();
    for d in &process.descriptors {
        let kind = company.snapshot.files.get(&d.file).map(|file| &file.kind);
        if let Some(FileKind::PidFd(pidfd)) = kind
            && !pidfd.gone
            && !company.comes_back(pidfd.pid)
        {
            let text = format!(
                "its descriptor {} is of PID {}, which does not come back: it looks as if that had exited",
                d.fd, pidfd.pid
            );
            losses.push(Reason::new("pidfd", text));
        }
        if let Some(FileKind::Proc(ProcFile { task: Some(task), gone: false })) = kind
            && company.snapshot.process(*task).is_some()
            && !company.comes_back(*task)
        {
            let text = format!(
                "its descriptor {} is a file about PID {task}, which does not come back: it reads as if that had ended",
                d.fd
            );
            losses.push(Reason::new("proc-file", text));
        }
    }
    losses
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::{AsFd, AsRawFd};

    #[test]
    fn a_pidfd_of_nobody_looks_like_one_of_an_exited_process() {
        let fd = restore(&PidFd { pid: 1, thread: false, gone: true }, true).unwrap();
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::ZERO), Ok(1));
        // SAFETY: numbers only.
        let sent = unsafe { sys::raw(libc::SYS_pidfd_send_signal, [fd.as_raw_fd() as u64, 0, 0, 0, 0, 0]) };
        assert_eq!(sent, Err(Errno::ESRCH));
    }

    #[test]
    fn files_can_be_fetched() {
        let own = open(std::process::id() as Pid, 0).unwrap();
        let dir = tempfile::tempfile().unwrap();
        let twin = get(own.as_raw_fd(), dir.as_raw_fd()).unwrap();
        // SAFETY: numbers only.
        assert_eq!(unsafe { libc::lseek(twin.as_raw_fd(), 7, libc::SEEK_SET) }, 7);
        // SAFETY: numbers only.
        assert_eq!(unsafe { libc::lseek(dir.as_raw_fd(), 0, libc::SEEK_CUR) }, 7);
    }
}
