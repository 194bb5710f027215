//! Crash procedures: functions of the applications, called on a stack of their own in the rebuilt processes before anything else of them runs.
//!
//! All run at the same time, each under ptrace, so that one that crashes or never returns costs nobody else anything. A procedure ends at the
//! breakpoint behind the call in libotherworld's entry, with its answer in `rax`.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use snapshot::{CrashProcedure, FileKind, PAGE_SIZE, Pid, Reason, Registers, Resume, Snapshot, Thread};

use crate::deadline::{Alarm, Deadline};
use crate::inject::{self, InjectError, Tracee};
use crate::process::Build;

/// From the end of the time for everything, for what comes after.
const RESERVE: Duration = Duration::from_secs(3);
/// `NT_X86_XSTATE`: the vector registers, which a procedure may use.
const NT_X86_XSTATE: u32 = 0x202;
const XSTATE_MAX: usize = 16 << 10;
/// Length of the breakpoint.
const INT3: u64 = 1;

/// How the process goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Continue,
    Restart,
    Exit,
}

impl Answer {
    fn from_register(rax: u64) -> Option<Self> {
        // An enum of C: the upper half of the register is not its.
        Some(match rax as u32 {
            0 => Self::Continue,
            1 => Self::Restart,
            2 => Self::Exit,
            _ => return None,
        })
    }
}

/// What has come of a procedure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It has returned.
    Answered(Answer),
    /// It has executed a program, or ended the process, itself.
    Left(&'static str),
    /// It crashed, took too long, or could not be called; for people.
    Failed(String),
}

/// A process in its procedure.
pub(crate) struct Running<'a> {
    pub(crate) build: Build<'a>,
    call: Call,
    began: Instant,
    deadline: Deadline,
}

/// What has to be undone when the procedure has returned.
struct Call {
    tid: Pid,
    registers: Registers,
    mask: u64,
    xstate: Vec<u8>,
    /// Stack and context.
    area: (u64, u64),
}

/// Lays a context out for an address: what the `Context` of libotherworld points to lies behind it.
struct Layout {
    base: u64,
    bytes: Vec<u8>,
}

impl Layout {
    fn new(base: u64, head: usize) -> Self {
        Self { base, bytes: vec![0; head] }
    }

    /// Where the next bytes will be.
    fn next(&mut self) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        self.base + self.bytes.len() as u64
    }

    fn text(&mut self, text: &str) -> u64 {
        let at = self.next();
        self.bytes.extend(text.bytes().filter(|byte| *byte != 0));
        self.bytes.push(0);
        at
    }

    fn list(&mut self, bytes: &[u8]) -> u64 {
        let at = self.next();
        self.bytes.extend_from_slice(bytes);
        at
    }

    fn put(&mut self, at: usize, value: u64) {
        if let Some(field) = self.bytes.get_mut(at..at + 8) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
    }
}
