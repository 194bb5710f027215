//! The last resort, should PID 1 itself get stuck: in a driver, in a file system, behind a disk that does not answer.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::SigSet;
use rustix::system::RebootCommand;

/// Ends the machine after a time, unless it is dropped before.
#[derive(Debug)]
pub struct Watchdog {
    alive: Option<Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Watchdog {
    /// Its thread has ended then.
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

impl Watchdog {
    /// Begins to watch. `None` when there can be no thread: then there is no last resort.
    pub fn start(patience: Duration, how: RebootCommand) -> Option<Self> {
        // Nothing is synced first: that may be what PID 1 is stuck in.
        Self::with(patience, move || _ = rustix::system::reboot(how))
    }

    fn with(patience: Duration, act: impl FnOnce() + Send + 'static) -> Option<Self> {
        let (alive, dropped) = channel();
        let watch = move || {
            // Signals are for the main thread, which waits for them.
            _ = SigSet::all().thread_block();
            if dropped.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                act();
            }
        };
        let thread = thread::Builder::new().name("watchdog".into()).spawn(watch).ok()?;
        Some(Self { alive: Some(alive), thread: Some(thread) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn it_acts_unless_it_is_dropped() {
        let (acted, seen) = mpsc::channel();
        let quick = acted.clone();
        let watchdog = Watchdog::with(Duration::from_millis(10), move || quick.send("quick").unwrap());
        assert_eq!(seen.recv_timeout(Duration::from_secs(20)), Ok("quick"));
        drop(watchdog);
        drop(Watchdog::with(Duration::from_secs(3600), move || acted.send("slow").unwrap()));
        // Its thread has ended, and with it the last sender.
        assert_eq!(seen.recv_timeout(Duration::from_secs(20)), Err(RecvTimeoutError::Disconnected));
    }
}
