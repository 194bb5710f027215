//! What PID 1 and its worker tell each other: one JSON value a line, over a socket pair.
//!
//! ```text
//! worker                                  init
//!   Panic     (last words, log)      ──▶
//!   Surveyed  (mounts, host name)    ──▶
//!                                    ◀──  RootMounted   (below /newroot)
//!   Holding   (has it open)          ──▶
//!                                    ◀──  Go            (init has switched, everything is mounted)
//!   Mark, Back, Note …               ──▶
//!   Done | Failed                    ──▶
//! ```

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use snapshot::{Bytes, Finding, Kernel, Mount, Panic, Pid};

use crate::report::{Fate, Mark, Pour};

/// From the worker.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromWorker {
    /// How the kernel died.
    Panic { kernel: Box<Kernel>, panic: Box<Panic> },
    /// What init needs to rebuild the surroundings; and what to report of the processes should this be the last word.
    Surveyed { survey: Survey, processes: Vec<Fate>, findings: Vec<Finding> },
    /// It has the directory open that init named.
    Holding,
    /// A point in time for the report.
    Mark(Mark),
    /// This process goes on.
    Back { pid: Pid, comm: Bytes },
    /// For people, on the console.
    Note(String),
    /// All that could be brought back lives.
    Done { processes: Vec<Fate>, findings: Vec<Finding>, pour: Option<Pour>, resurrection: serde_json::Value },
    /// Nothing was brought back.
    Failed { why: String, processes: Vec<Fate>, findings: Vec<Finding> },
}

/// What init needs to know of the dead machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct Survey {
    /// Of the initial mount namespace.
    pub mounts: Vec<Mount>,
    /// Modules that were loaded.
    pub modules: Vec<String>,
    /// The highest PID or TID that anybody had.
    pub highest_pid: i32,
    /// PID 1 is to come back.
    pub with_first: bool,
    /// Some of those who are to come back have mounts of their own, copies of the machine's.
    pub has_namespaces: bool,
}

/// To the worker.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToWorker {
    /// The root file system is mounted at this directory: open it.
    RootMounted(String),
    /// The directory that was held is the machine's root now; everything else is mounted. Who is not rebuilt within that time
    /// is to be given up, so that the others live.
    Go { time_left: Duration },
}

/// The longest message: a report of tens of thousands of processes is shorter.
const LONGEST: usize = 64 << 20;

/// One end of the conversation.
pub struct Channel {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

/// Why there is no message.
#[derive(Debug, thiserror::Error)]
pub enum NoMessage {
    /// The deadline has passed.
    #[error("no answer within {0:.0?}")]
    Deadline(Duration),
    /// The other side is gone.
    #[error("it ended without a word")]
    Closed,
    /// It does not come to an end.
    #[error("it sent a message of more than {} MiB", LONGEST >> 20)]
    TooLong,
    /// Anything else.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Channel {
    /// Talks over `stream`.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        Ok(Self { writer: stream.try_clone()?, reader: BufReader::with_capacity(64 << 10, stream) })
    }

    /// Says something.
    pub fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.writer.write_all(&line)
    }

    /// Waits for a message until `deadline`; calls `idle` now and then meanwhile.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        deadline: Instant,
        mut idle: impl FnMut(),
    ) -> Result<T, NoMessage> {
        let began = Instant::now();
        let mut line = Vec::new();
        loop {
            if self.reader.buffer().is_empty() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(NoMessage::Deadline(began.elapsed()));
                }
                // Short naps only so that `idle` can look at the memory.
                let nap = left.min(Duration::from_millis(100)).as_millis().max(1) as u16;
                let mut fds = [PollFd::new(self.reader.get_ref().as_fd(), PollFlags::POLLIN)];
                match poll(&mut fds, PollTimeout::from(nap)) {
                    Ok(0) | Err(Errno::EINTR) => {
                        idle();
                        continue;
                    }
                    Ok(_) => {}
                    Err(e) => return Err(NoMessage::Io(e.into())),
                }
            }
            // Takes what is there, up to the line's end: never blocks, since something is there.
            let available = self.reader.fill_buf()?;
            if available.is_empty() {
                return Err(NoMessage::Closed);
            }
            let end = available.iter().position(|&b| b == b'\n');
            let take = end.map_or(available.len(), |n| n + 1);
            if line.len() + take > LONGEST {
                return Err(NoMessage::TooLong);
            }
            line.extend_from_slice(&available[..take]);
            self.reader.consume(take);
            if end.is_some() {
                return Ok(serde_json::from_slice(&line).map_err(io::Error::from)?);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn messages_arrive_whole_and_in_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Channel::new(a).unwrap(), Channel::new(b).unwrap());
        let long = "x".repeat(300_000);
        let sender = std::thread::spawn(move || {
            a.send(&FromWorker::Note(long)).unwrap();
            a.send(&FromWorker::Holding).unwrap();
        });
        let FromWorker::Note(text) = b.receive(soon(), || ()).unwrap() else { panic!() };
        assert_eq!(text.len(), 300_000);
        assert!(matches!(b.receive(soon(), || ()).unwrap(), FromWorker::Holding));
        sender.join().unwrap();
        assert!(matches!(b.receive::<FromWorker>(soon(), || ()), Err(NoMessage::Closed)));
    }

    #[test]
    fn a_message_without_an_end_is_not_kept() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut b = Channel::new(b).unwrap();
        let sender = std::thread::spawn(move || {
            let mut a = a;
            // Until nobody listens any more.
            while a.write_all(&[b'x'; 1 << 20]).is_ok() {}
        });
        let long = Instant::now() + Duration::from_secs(60);
        assert!(matches!(b.receive::<FromWorker>(long, || ()), Err(NoMessage::TooLong)));
        drop(b);
        sender.join().unwrap();
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut b = Channel::new(b).unwrap();
        let near = Instant::now() + Duration::from_millis(20);
        assert!(matches!(b.receive::<ToWorker>(near, || ()), Err(NoMessage::Deadline(_))));
        drop(a);
    }
}
