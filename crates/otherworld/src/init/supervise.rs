//! PID 1's view of its worker.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::memory::MemoryWatch;
use super::run;
use crate::protocol::{Channel, FromWorker, NoMessage, ToWorker};
use crate::worker;

/// The worker process. Dropping it kills it, and with it the processes that it has not released yet.
pub struct Worker {
    child: Child,
    channel: Channel,
    ended: bool,
    /// PID 1 has it as its child, and waits for it.
    is_child: bool,
}

impl Worker {
    /// Starts this program again as the worker.
    pub fn start() -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
        let child = Command::new("/proc/self/exe")
            .args([worker::COMMAND, &theirs.as_raw_fd().to_string()])
            // The registration would be inherited by the processes that the worker makes, and point into memory that they
            // do not have.
            .env("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
            .spawn()?;
        drop(theirs);
        Ok(Self { child, channel: Channel::new(ours)?, ended: false, is_child: true })
    }

    /// This process has become the child of the one that started the worker.
    pub fn is_no_child(&mut self) {
        self.is_child = false;
    }

    /// Says something to it.
    pub fn send(&mut self, message: &ToWorker) -> io::Result<()> {
        self.channel.send(message)
    }

    /// Waits for what it says next. When it dies or is late, that is an error, and it is dead afterwards.
    pub fn receive(&mut self, deadline: Instant, memory: &mut MemoryWatch) -> Result<FromWorker> {
        match self.channel.receive(deadline, || memory.look()) {
            Ok(message) => Ok(message),
            Err(NoMessage::Closed) => {
                self.ended = true;
                if !self.is_child {
                    bail!("the worker died");
                }
                let status = run::wait(&mut self.child, Instant::now() + Duration::from_secs(2))?;
                bail!("the worker died ({})", status.map_or("it hung at its end".into(), |s| s.to_string()))
            }
            Err(error) => {
                self.kill();
                Err(anyhow::Error::new(error).context("the worker gave no answer"))
            }
        }
    }

    /// Waits for its end, once it has said that it is done.
    pub fn end(&mut self, patience: Duration) -> Result<()> {
        self.ended = true;
        if !self.is_child {
            return run::await_end(&self.child, Instant::now() + patience);
        }
        let status =
            run::wait(&mut self.child, Instant::now() + patience).context("waiting for the worker")?;
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the worker ended with {status} after its work"),
            None => bail!("the worker did not end after its work and was killed"),
        }
    }

    fn kill(&mut self) {
        if !self.ended {
            self.ended = true;
            _ = run::kill(&mut self.child);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}
