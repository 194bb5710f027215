//! Child processes of a survivor.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe};

use crate::Stage;

/// Longer than any check takes, even on a slow machine.
const JOIN: Duration = Duration::from_secs(60);

/// A forked child that checks something of its own. Killed when dropped.
pub struct Child {
    pid: Pid,
    message: PathBuf,
    reaped: bool,
}

/// With this a child tells its parent that it is set up. It costs no descriptor afterwards.
pub struct Ready(OwnedFd);

impl Ready {
    /// Set up.
    pub fn announce(self) -> Result<()> {
        fs::File::from(self.0).write_all(b"r")?;
        Ok(())
    }
}

impl Child {
    /// Forks a child that runs `body`, and waits until it has announced that it is ready.
    ///
    /// An error of `body` comes back from [`Child::join`]; the child leaves its text in a file. Must be called while this
    /// process has one thread only.
    pub fn fork(stage: &Stage, label: &str, body: impl FnOnce(&Stage, Ready) -> Result<()>) -> Result<Self> {
        let message = stage.path(&format!("child-{label}"));
        let (reader, writer) = pipe()?;
        // SAFETY: this process has a single thread (survivors start their threads after their children).
        let pid = match unsafe { fork() }? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                drop(reader);
                let result = body(stage, Ready(writer));
                exit_with(result, &message);
            }
        };
        drop(writer);
        let mut child = Self { pid, message, reaped: false };
        let mut word = [0];
        if fs::File::from(reader).read(&mut word)? == 0 {
            child.join()?;
            bail!("child {label} ended before it was ready");
        }
        Ok(child)
    }

    /// Forks a child that shares with this process what `flags` say (CLONE_FILES, CLONE_FS). What is open in both when they share a table
    /// stays open until the child is ready.
    pub fn sharing(
        stage: &Stage,
        label: &str,
        flags: i32,
        body: impl FnOnce(&Stage, Ready) -> Result<()>,
    ) -> Result<Self> {
        let message = stage.path(&format!("child-{label}"));
        let (reader, writer) = pipe()?;
        let flags = flags | Signal::SIGCHLD as i32;
        // SAFETY: without CLONE_VM it is fork(2); this process has a single thread.
        let pid = unsafe { nix::libc::syscall(nix::libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid == 0 {
            // The parent has it, too, or a copy.
            std::mem::forget(reader);
            let result = body(stage, Ready(writer));
            exit_with(result, &message);
        }
        let pid = Pid::from_raw(nix::errno::Errno::result(pid)? as i32);
        let mut child = Self { pid, message, reaped: false };
        let mut word = [0];
        if fs::File::from(reader).read(&mut word)? == 0 {
            child.join()?;
            bail!("child {label} ended before it was ready");
        }
        if flags & nix::libc::CLONE_FILES != 0 {
            // The child has closed it for both.
            std::mem::forget(writer);
        }
        Ok(child)
    }

    /// Its PID.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether it runs; its end is left to be waited for.
    pub fn is_alive(&self) -> Result<bool> {
        use nix::sys::wait::{Id, waitid};
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        Ok(waitid(Id::Pid(self.pid), flags)? == WaitStatus::StillAlive)
    }

    /// It has been waited for by other means.
    pub fn forget(&mut self) {
        self.reaped = true;
    }

    /// Waits for its end (with a deadline); its error is ours.
    pub fn join(&mut self) -> Result<()> {
        match self.wait()? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, 1) => {
                bail!("child: {}", fs::read_to_string(&self.message).unwrap_or_else(|_| "no message".into()))
            }
            other => bail!("child ended unexpectedly: {other:?}"),
        }
    }

    /// Waits for its end (with a deadline), whatever it is.
    pub fn wait(&mut self) -> Result<WaitStatus> {
        let deadline = Instant::now() + JOIN;
        loop {
            let status = waitpid(self.pid, Some(WaitPidFlag::WNOHANG)).context("waitpid for a child")?;
            if status != WaitStatus::StillAlive {
                self.reaped = true;
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("child {} does not end", self.pid);
            }
            crate::stage::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            // Nothing to be done about an error: it is gone, or it is not ours any more, and both have been judged.
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// Ends a forked child without running anything of the parent's.
fn exit_with(result: Result<()>, message: &PathBuf) -> ! {
    let code = match result {
        Ok(()) => 0,
        Err(error) => {
            // It may have given away the right to write here: then the exit code alone has to do.
            let _ = fs::write(message, format!("{error:#}"));
            1
        }
    };
    end(code)
}

/// Ends a child with this exit code, at once.
pub fn end(code: i32) -> ! {
    // SAFETY: _exit ends the process; it touches no memory.
    unsafe { nix::libc::_exit(code) }
}
