//! A serial console, line by line, with the host's time.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, FileContext as _, Result};

/// A longer line is cut here.
const MAX_LINE: usize = 4096;

/// One line of a console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Milliseconds on the host's monotonic clock from the machine's start to the line's end.
    pub ms: u64,
    /// The text without its line end.
    pub text: String,
}

/// A console that is being read. Clones share it.
#[derive(Debug, Clone)]
pub struct Console {
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<Line>,
    ended: bool,
}

impl Console {
    /// Reads `from` in a thread of its own until it ends. Each line also goes to `log`, with its time.
    pub(crate) fn follow(mut from: impl Read + Send + 'static, log: &Path, start: Instant) -> Result<Self> {
        let console = Self { state: Arc::default() };
        let mut log = BufWriter::new(File::create(log).at(log)?);
        let shared = console.clone();
        std::thread::spawn(move || {
            let (mut buf, mut line) = ([0; 4096], Vec::new());
            loop {
                let n = match from.read(&mut buf) {
                    Ok(0) | Err(_) => break,
                    Ok(n) => n,
                };
                let ms = start.elapsed().as_millis() as u64;
                for &byte in &buf[..n] {
                    match byte {
                        b'\n' => shared.push(&mut log, ms, &mut line),
                        b'\r' => {}
                        _ if line.len() < MAX_LINE => line.push(byte),
                        _ => {}
                    }
                }
                let _ = log.flush();
            }
            if !line.is_empty() {
                shared.push(&mut log, start.elapsed().as_millis() as u64, &mut line);
                let _ = log.flush();
            }
            shared.lock().ended = true;
            shared.state.1.notify_all();
        });
        Ok(console)
    }

    fn push(&self, log: &mut impl Write, ms: u64, line: &mut Vec<u8>) {
        let text = String::from_utf8_lossy(line).into_owned();
        line.clear();
        let _ = writeln!(log, "[{ms:>7}] {text}");
        self.lock().lines.push(Line { ms, text });
        self.state.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many lines there are now: where to start reading what comes next.
    pub fn len(&self) -> usize {
        self.lock().lines.len()
    }

    /// Whether nothing has been printed yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The lines from number `from` on.
    pub fn lines(&self, from: usize) -> Vec<Line> {
        self.lock().lines.get(from..).unwrap_or_default().to_vec()
    }

    /// Waits for the first line, from number `from` on, for which `pick` returns something.
    ///
    /// # Errors
    /// [`Error::Timeout`] with `what`, [`Error::Qemu`] if the machine ended first.
    pub fn wait_for<T>(
        &self,
        from: usize,
        what: &str,
        timeout: Duration,
        mut pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        let mut next = from;
        let mut state = self.lock();
        loop {
            while let Some(line) = state.lines.get(next) {
                if let Some(found) = pick(line) {
                    return Ok(found);
                }
                next += 1;
            }
            if state.ended {
                return Err(Error::Qemu(format!("the machine ended while {what} was waited for")));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { what: what.into(), after: timeout });
            }
            state = self.state.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_and_an_end_is_told_from_a_timeout() {
        let dir = tempfile::tempdir().unwrap();
        let (read, mut write) = std::io::pipe().unwrap();
        let console = Console::follow(read, &dir.path().join("log"), Instant::now()).unwrap();
        let find = |what: &str, timeout| {
            let what = what.to_owned();
            console.wait_for(0, &what, timeout, |line| line.text.contains(&what).then(|| line.text.clone()))
        };
        write.write_all(b"one\r\nKernel panic - not syncing\nhalf").unwrap();
        assert_eq!(find("panic", Duration::from_secs(5)).unwrap(), "Kernel panic - not syncing");
        assert!(matches!(find("half", Duration::from_millis(50)), Err(Error::Timeout { .. })));
        drop(write);
        assert_eq!(find("half", Duration::from_secs(5)).unwrap(), "half");
        assert!(matches!(find("nothing", Duration::from_secs(5)), Err(Error::Qemu(_))));
        assert_eq!(console.len(), 3);
    }
}
