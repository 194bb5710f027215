//! Descriptors of processes (pidfd).

use serde::{Deserialize, Serialize};

use crate::{Descriptor, Pid, Process, Reason, Snapshot};

/// What pidfd_open(2) makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidFd {
    /// The process, or with `thread` the thread.
    pub pid: Pid,
    /// PIDFD_THREAD.
    pub thread: bool,
    /// It had ended and been waited for: nobody has this number any more.
    pub gone: bool,
}

impl PidFd {
    /// Whether it means a thread that is not the first of its process: such threads exist too late to be opened.
    fn is_inner_thread(&self, snapshot: &Snapshot) -> bool {
        let is_other = |p: &Process| p.pid != self.pid && p.threads.iter().any(|t| t.tid == self.pid);
        self.thread && !self.gone && snapshot.processes.iter().any(is_other)
    }
}

pub(crate) fn judge(snapshot: &Snapshot, d: &Descriptor, pidfd: &PidFd, reasons: &mut Vec<Reason>) {
    if pidfd.is_inner_thread(snapshot) {
        let text = format!(
            "descriptor {}: a pidfd of thread {}, which is not the first of its process: not brought back by this version",
            d.fd, pidfd.pid
        );
        reasons.push(Reason::new("descriptor", text));
    }
}
