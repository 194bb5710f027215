//! The host's end of the control channel.

use std::io::{BufReader, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, FileContext as _, Result};
use crate::protocol::{Frame, Panic, Program, Request, Response, read_frame, write_frame};
use crate::record::Record;

/// Files move in pieces of this size, in bytes.
const PIECE: usize = 4 << 20;
/// Time for the agent to answer what takes no time.
const PROMPT: Duration = Duration::from_secs(60);
/// Some seconds on an idle host.
const RECORD: Duration = Duration::from_secs(300);

/// A connection to the agent in a guest.
#[derive(Debug)]
pub struct Channel {
    reader: BufReader<UnixStream>,
    last_id: u32,
    /// A greeting that came while something else was waited for, until it is asked for.
    greeting: Option<Hello>,
}

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// `uname -r`.
    pub kernel: String,
    /// Whether it is a crash kernel.
    pub crash_kernel: bool,
    /// Milliseconds since that kernel's boot.
    pub uptime_ms: u64,
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit status; none if a signal killed it.
    pub code: Option<i32>,
    /// That signal.
    pub signal: Option<i32>,
    /// It was killed because its time was over.
    pub timed_out: bool,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Channel {
    /// A channel over any stream. Over one whose other end is closed, every call fails at once.
    pub fn new(stream: UnixStream) -> Self {
        Self { reader: BufReader::with_capacity(1 << 16, stream), last_id: 0, greeting: None }
    }

    fn send(&mut self, request: &Request, payload: &[u8]) -> Result<u32> {
        self.last_id += 1;
        let stream = self.reader.get_mut();
        stream.set_write_timeout(Some(PROMPT)).map_err(lost)?;
        write_frame(stream, self.last_id, request, payload).map_err(lost)?;
        Ok(self.last_id)
    }

    /// The next frame that `wanted` accepts; late answers are dropped, greetings are kept.
    fn receive(
        &mut self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Frame<Response>) -> bool,
    ) -> Result<Frame<Response>> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { what: what.into(), after: timeout });
            }
            self.reader.get_ref().set_read_timeout(Some(left)).map_err(lost)?;
            match read_frame(&mut self.reader) {
                Ok(frame) if wanted(&frame) => return Ok(frame),
                // Who had been asked is gone, and another is there.
                Ok(Frame { id: 0, message: Response::Hello { kernel, crash_kernel, uptime_ms }, .. }) => {
                    self.greeting = Some(Hello { kernel, crash_kernel, uptime_ms });
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(lost(error)),
            }
        }
    }

    fn call(&mut self, request: &Request, payload: &[u8], timeout: Duration) -> Result<(Response, Vec<u8>)> {
        let id = self.send(request, payload)?;
        let frame = self
            .receive(&format!("the agent's answer to {}", short(request)), timeout, |frame| frame.id == id)?;
        match frame.message {
            Response::Failed(reason) => Err(Error::Guest(format!("{}: {reason}", short(request)))),
            message => Ok((message, frame.payload)),
        }
    }

    /// Asks who is there.
    pub fn ping(&mut self, timeout: Duration) -> Result<Hello> {
        match self.call(&Request::Ping, &[], timeout)?.0 {
            Response::Hello { kernel, crash_kernel, uptime_ms } => {
                Ok(Hello { kernel, crash_kernel, uptime_ms })
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Waits for the agent's first words, those of the crash kernel's agent if `crash_kernel`.
    pub fn wait_hello(&mut self, crash_kernel: bool, timeout: Duration) -> Result<Hello> {
        let what = if crash_kernel { "the start of the crash kernel's agent" } else { "the agent's start" };
        if let Some(hello) = self.greeting.take().filter(|hello| hello.crash_kernel == crash_kernel) {
            return Ok(hello);
        }
        let wanted = |frame: &Frame<Response>| matches!(frame.message, Response::Hello { crash_kernel: found, .. } if found == crash_kernel);
        match self.receive(what, timeout, wanted)?.message {
            Response::Hello { kernel, crash_kernel, uptime_ms } => {
                Ok(Hello { kernel, crash_kernel, uptime_ms })
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Runs a program to its end, however it ends.
    pub fn exec(&mut self, program: &Program, timeout: Duration) -> Result<Exit> {
        let request = Request::Exec { program: program.clone(), timeout_ms: timeout.as_millis() as u64 };
        match self.call(&request, &[], timeout + PROMPT)? {
            (Response::Exited { code, signal, stdout_len, timed_out }, mut stdout) => {
                let stderr = stdout.split_off(stdout_len.min(stdout.len()));
                Ok(Exit { code, signal, timed_out, stdout, stderr })
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Runs a program that must exit with 0; its standard output as text.
    pub fn run(&mut self, program: &Program, timeout: Duration) -> Result<String> {
        let exit = self.exec(program, timeout)?;
        if exit.code == Some(0) {
            return Ok(String::from_utf8_lossy(&exit.stdout).into_owned());
        }
        let how = match (exit.timed_out, exit.code, exit.signal) {
            (true, ..) => format!("did not end within {:.1} s", timeout.as_secs_f64()),
            (_, Some(code), _) => format!("exited with {code}"),
            (_, _, signal) => format!("was killed by signal {}", signal.unwrap_or(0)),
        };
        let output = [exit.stdout, exit.stderr].concat();
        Err(Error::Program {
            program: program.argv.join(" "),
            how,
            output: String::from_utf8_lossy(&output).trim_end().to_owned(),
        })
    }

    /// Runs a shell script that must exit with 0; its standard output as text.
    pub fn shell(&mut self, script: &str, timeout: Duration) -> Result<String> {
        self.run(&Program::shell(script), timeout)
    }

    /// Starts a detached program; its process id.
    pub fn spawn(&mut self, program: &Program) -> Result<i32> {
        match self.call(&Request::Spawn(program.clone()), &[], PROMPT)?.0 {
            Response::Started { pid } => Ok(pid),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until all of the processes have ended; those that have not after `timeout`.
    pub fn wait(&mut self, pids: &[i32], timeout: Duration) -> Result<Vec<i32>> {
        let request = Request::Wait { pids: pids.to_vec(), timeout_ms: timeout.as_millis() as u64 };
        match self.call(&request, &[], timeout + PROMPT)?.0 {
            Response::Waited { alive } => Ok(alive),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a signal.
    pub fn kill(&mut self, pid: i32, signal: i32) -> Result<()> {
        self.call(&Request::Kill { pid, signal }, &[], PROMPT).map(drop)
    }

    /// A whole file of the guest.
    pub fn read_file(&mut self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        let mut data = Vec::new();
        self.read_pieces(path, |piece| {
            data.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(data)
    }

    /// A file of the guest, piece by piece.
    pub fn read_pieces(
        &mut self,
        path: impl AsRef<Path>,
        mut take: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<()> {
        let path = path.as_ref();
        let mut offset = 0;
        loop {
            let request = Request::Read { path: path.into(), offset, len: PIECE };
            let (_, piece) = self.call(&request, &[], PROMPT)?;
            take(&piece).at(path)?;
            offset += piece.len() as u64;
            if piece.len() < PIECE {
                return Ok(());
            }
        }
    }

    /// Creates or replaces a file of the guest, with the directories above it.
    pub fn write_file(&mut self, path: impl AsRef<Path>, mode: u32, data: &[u8]) -> Result<()> {
        let mut offset = 0;
        loop {
            let piece = &data[offset..data.len().min(offset + PIECE)];
            let request = Request::Write { path: path.as_ref().into(), offset: offset as u64, mode };
            self.call(&request, piece, PROMPT)?;
            offset += piece.len();
            if offset >= data.len() {
                return Ok(());
            }
        }
    }

    /// Copies a file of the host into the guest.
    pub fn push(&mut self, from: &Path, to: impl AsRef<Path>, mode: u32) -> Result<()> {
        let data = std::fs::read(from).at(from)?;
        self.write_file(to, mode, &data)
    }

    /// Records the guest's `/proc`: thousands of small files, perhaps on one CPU beside programs that want all of it.
    pub fn record(&mut self) -> Result<Record> {
        let (_, payload) = self.call(&Request::Record, &[], RECORD)?;
        Record::decode(&payload).ok_or_else(|| Error::Guest("the recording is malformed".into()))
    }

    /// Gives the guest the host's wall clock.
    pub fn set_clock(&mut self) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        self.call(&Request::SetClock { unix_ns: now.as_nanos() as i64 }, &[], PROMPT).map(drop)
    }

    /// Seeds the guest's random number generator (up to 64 bytes count).
    pub fn seed(&mut self, bytes: &[u8]) -> Result<()> {
        self.call(&Request::Seed, bytes, PROMPT).map(drop)
    }

    /// Loads a crash kernel from files of the guest.
    pub fn load_crash_kernel(&mut self, kernel: &str, initramfs: &str, cmdline: &str) -> Result<()> {
        let cmdline = cmdline.to_owned();
        self.call(
            &Request::LoadCrashKernel { kernel: kernel.into(), initramfs: initramfs.into(), cmdline },
            &[],
            PROMPT,
        )
        .map(drop)
    }

    /// In a crash kernel: MB/s of a plain copy of up to `bytes` out of a mapping of `/proc/vmcore` into fresh memory.
    pub fn copy_rate(&mut self, bytes: u64) -> Result<f64> {
        match self.call(&Request::CopyRate { bytes }, &[], PROMPT)?.0 {
            Response::Copied { bytes, ns } => Ok(bytes as f64 * 1000.0 / ns.max(1) as f64),
            other => Err(unexpected(&other)),
        }
    }

    /// Writes all dirty pages to the guest's disk.
    pub fn sync(&mut self) -> Result<()> {
        self.call(&Request::Sync, &[], PROMPT).map(drop)
    }

    /// Sends the panic on its way; comes back when the agent has understood, which is before the panic.
    pub fn panic(&mut self, panic: &Panic) -> Result<()> {
        match self.call(&Request::Panic(panic.clone()), &[], PROMPT)?.0 {
            Response::Crashing => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Looks for the agent's word that it did not crash because processes had ended; who was gone.
    pub fn not_crashed(&mut self, timeout: Duration) -> Result<Option<Vec<i32>>> {
        let wanted = |frame: &Frame<Response>| matches!(frame.message, Response::NotCrashed { .. });
        match self.receive("", timeout, wanted) {
            Ok(Frame { message: Response::NotCrashed { gone }, .. }) => Ok(Some(gone)),
            Ok(_) | Err(Error::Timeout { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn short(request: &Request) -> String {
    match request {
        Request::Exec { program, .. } | Request::Spawn(program) => format!("`{}`", program.argv.join(" ")),
        Request::Read { path, .. } => format!("reading {}", path.display()),
        Request::Write { path, .. } => format!("writing {}", path.display()),
        other => format!("{other:?}"),
    }
}

fn lost(error: std::io::Error) -> Error {
    Error::Guest(format!("control channel: {error}"))
}

fn unexpected(response: &Response) -> Error {
    Error::Guest(format!("unexpected answer {response:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_while_somebody_else_is_asked_is_not_forgotten() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(ours);
        let hello = Response::Hello { kernel: "6.1".into(), crash_kernel: true, uptime_ms: 7 };
        write_frame(&mut theirs, 0, &hello, &[]).unwrap();
        // The one that was asked died of the question.
        let moment = Duration::from_millis(20);
        assert!(matches!(channel.ping(moment), Err(Error::Timeout { .. })));
        assert_eq!(channel.wait_hello(true, moment).unwrap().uptime_ms, 7);
        assert!(matches!(channel.wait_hello(true, moment), Err(Error::Timeout { .. })), "it came once");
    }
}
