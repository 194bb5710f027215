//! What the host and the agent in the guest say to each other.
//!
//! One frame is a fixed header, a JSON text and a binary payload (file contents, recordings):
//!
//! ```text
//! "OWLB"  id: u32 LE  json length: u32 LE  payload length: u32 LE  json  payload
//! ```
//!
//! The magic lets the host find the next frame after a panic has cut one off in the middle. Responses carry the `id` of
//! their request; the agent's own first words ([`Response::Hello`]) carry id 0.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port, as `/sys/class/virtio-ports/*/name` shows it.
pub const PORT_NAME: &str = "org.otherworld.lab";
/// The first bytes of each frame.
pub const MAGIC: [u8; 4] = *b"OWLB";
/// Largest JSON part that a peer accepts, in bytes.
pub const MAX_JSON: usize = 4 << 20;
/// Largest payload that a peer accepts, in bytes; longer files are moved in pieces.
pub const MAX_PAYLOAD: usize = 64 << 20;

/// A program to run in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// argv; the first is looked up in PATH.
    pub argv: Vec<String>,
    /// Added to a small clean environment (PATH, HOME, USER, LANG=C.UTF-8).
    pub env: BTreeMap<String, String>,
    /// Working directory; `/` if none.
    pub cwd: Option<PathBuf>,
    /// User (and group) id; 0 if none.
    pub uid: Option<u32>,
    /// File for standard input; `/dev/null` if none.
    pub stdin: Option<PathBuf>,
    /// File for standard output (created, truncated unless `append`).
    pub stdout: Option<PathBuf>,
    /// File for standard error; where standard output goes if none.
    pub stderr: Option<PathBuf>,
    /// Open the output files with O_APPEND instead of truncating them.
    pub append: bool,
    /// Make `stdin`, which must be a terminal, the controlling terminal (detached programs only).
    pub controlling_tty: bool,
    /// Run on these CPUs only (detached programs only).
    pub cpus: Vec<usize>,
}

impl Program {
    /// A program by its argv.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self { argv: argv.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// A shell script for `sh -c`.
    pub fn shell(script: &str) -> Self {
        Self::new(["sh", "-c", script])
    }

    /// Sets the user id.
    pub fn uid(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    /// Sets the working directory.
    pub fn cwd(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = Some(dir.into());
        self
    }

    /// Sets the file of standard input.
    pub fn stdin(mut self, path: impl Into<PathBuf>) -> Self {
        self.stdin = Some(path.into());
        self
    }

    /// Sets the file of standard output.
    pub fn stdout(mut self, path: impl Into<PathBuf>) -> Self {
        self.stdout = Some(path.into());
        self
    }

    /// Sets the file of standard error.
    pub fn stderr(mut self, path: impl Into<PathBuf>) -> Self {
        self.stderr = Some(path.into());
        self
    }
}

/// What the host asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Says nothing, answers [`Response::Hello`].
    Ping,
    /// Runs a program to its end and returns its output ([`Response::Exited`]; payload: stdout, then stderr, unless they are files).
    Exec {
        /// The program.
        program: Program,
        /// It is killed after this many milliseconds.
        timeout_ms: u64,
    },
    /// Starts a program in its own session, as a child of PID 1 ([`Response::Started`]).
    Spawn(Program),
    /// Waits until all of these processes have ended ([`Response::Waited`]).
    Wait {
        /// Process ids.
        pids: Vec<i32>,
        /// Gives up after this many milliseconds.
        timeout_ms: u64,
    },
    /// Sends a signal.
    Kill {
        /// Process id, negative for a group.
        pid: i32,
        /// Signal number.
        signal: i32,
    },
    /// Reads a piece of a file ([`Response::Data`]).
    Read {
        /// The file.
        path: PathBuf,
        /// Where to start.
        offset: u64,
        /// At most this many bytes.
        len: usize,
    },
    /// Writes the payload to a file at an offset, creating it and its directories.
    Write {
        /// The file.
        path: PathBuf,
        /// Where to start; 0 also truncates.
        offset: u64,
        /// Permission bits.
        mode: u32,
    },
    /// Copies `/proc/PID` of all processes ([`Response::Data`]; the payload is a [`crate::record::Record`]).
    Record,
    /// Sets the wall clock.
    SetClock {
        /// Nanoseconds since 1970.
        unix_ns: i64,
    },
    /// Feeds the payload into the kernel's random number generator and makes it take notice.
    Seed,
    /// Loads a crash kernel (kexec_file_load), in place of the one that is loaded.
    LoadCrashKernel {
        /// Kernel image in the guest.
        kernel: PathBuf,
        /// Initramfs in the guest.
        initramfs: PathBuf,
        /// Its command line.
        cmdline: String,
    },
    /// Copies memory out of a mapping of `/proc/vmcore` into fresh memory and takes the time ([`Response::Copied`]).
    CopyRate {
        /// At most this many bytes.
        bytes: u64,
    },
    /// sync(2).
    Sync,
    /// Crashes the kernel; see [`Panic`].
    Panic(Panic),
}

/// How and when to crash.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Panic {
    /// Microseconds from now.
    pub after_us: u64,
    /// CPU that is to run the panic; any if none.
    pub cpu: Option<usize>,
    /// The processes that must be alive at that moment, else nothing is crashed ([`Response::NotCrashed`]).
    pub alive: Vec<i32>,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// The agent is there.
    Hello {
        /// `uname -r`.
        kernel: String,
        /// Whether this is the crash kernel (`/proc/vmcore` exists).
        crash_kernel: bool,
        /// Milliseconds since boot.
        uptime_ms: u64,
    },
    /// Done, nothing to tell.
    Done,
    /// A program has ended.
    Exited {
        /// Exit status, none if killed by a signal.
        code: Option<i32>,
        /// The signal that killed it.
        signal: Option<i32>,
        /// How many bytes of the payload are standard output; the rest is standard error.
        stdout_len: usize,
        /// The agent killed it because its time was over.
        timed_out: bool,
    },
    /// A detached program runs.
    Started {
        /// Its process id.
        pid: i32,
    },
    /// See [`Request::Wait`].
    Waited {
        /// Those that are still there.
        alive: Vec<i32>,
    },
    /// The payload.
    Data {
        /// Whole length of the file at this time.
        file_len: u64,
    },
    /// See [`Request::CopyRate`].
    Copied {
        /// How much.
        bytes: u64,
        /// In how many nanoseconds.
        ns: u64,
    },
    /// The panic is on its way.
    Crashing,
    /// A process that had to be alive was not.
    NotCrashed {
        /// Who was gone.
        gone: Vec<i32>,
    },
    /// It could not be done.
    Failed(String),
}

/// One message of either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame<T> {
    /// Number of the request.
    pub id: u32,
    /// The message.
    pub message: T,
    /// Bytes that go with it.
    pub payload: Vec<u8>,
}

/// Writes one frame.
pub fn write_frame<T: Serialize>(
    to: &mut impl Write,
    id: u32,
    message: &T,
    payload: &[u8],
) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    let mut head = Vec::with_capacity(16 + json.len());
    head.extend_from_slice(&MAGIC);
    for n in [id as usize, json.len(), payload.len()] {
        let n = u32::try_from(n).map_err(|_| io::Error::other("frame too large"))?;
        head.extend_from_slice(&n.to_le_bytes());
    }
    head.extend_from_slice(&json);
    to.write_all(&head)?;
    to.write_all(payload)?;
    to.flush()
}

/// Reads up to the next whole frame; bytes before its magic are skipped, frames that make no sense too.
pub fn read_frame<T: for<'de> Deserialize<'de>>(from: &mut impl Read) -> io::Result<Frame<T>> {
    loop {
        let mut window = [0u8; 4];
        from.read_exact(&mut window)?;
        while window != MAGIC {
            window.rotate_left(1);
            from.read_exact(&mut window[3..])?;
        }
        let mut head = [0u8; 12];
        from.read_exact(&mut head)?;
        let word = |i: usize| u32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        let (id, json_len, payload_len) = (word(0), word(4) as usize, word(8) as usize);
        if json_len > MAX_JSON || payload_len > MAX_PAYLOAD {
            continue;
        }
        let mut json = vec![0; json_len];
        from.read_exact(&mut json)?;
        let Ok(message) = serde_json::from_slice(&json) else { continue };
        let mut payload = vec![0; payload_len];
        from.read_exact(&mut payload)?;
        return Ok(Frame { id, message, payload });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was_sent() {
        let mut wire = Vec::new();
        let request = Request::Write { path: "/tmp/x".into(), offset: 3, mode: 0o644 };
        write_frame(&mut wire, 7, &request, b"OWLB in the payload").unwrap();
        let frame: Frame<Request> = read_frame(&mut wire.as_slice()).unwrap();
        assert_eq!(frame, Frame { id: 7, message: request, payload: b"OWLB in the payload".to_vec() });
    }

    #[test]
    fn the_next_frame_is_found_after_rubbish() {
        let mut wire = b"OWOWLOWLB\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff..OWL".to_vec();
        write_frame(&mut wire, 1, &Request::Ping, b"").unwrap();
        let frame: Frame<Request> = read_frame(&mut wire.as_slice()).unwrap();
        assert_eq!(frame.message, Request::Ping);
    }

    #[test]
    fn a_cut_frame_is_an_error() {
        let mut wire = Vec::new();
        write_frame(&mut wire, 1, &Request::Ping, b"payload").unwrap();
        wire.pop();
        assert!(read_frame::<Request>(&mut wire.as_slice()).is_err());
    }
}
