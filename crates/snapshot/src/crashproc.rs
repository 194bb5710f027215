//! Crash procedures: what an application has registered with libotherworld.

use serde::{Deserialize, Serialize};

/// What becomes of a process whose crash procedure crashes, or does not return in its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailedProcedure {
    /// It is given up: nobody knows what the procedure has left half done.
    #[default]
    GiveUp,
    /// It goes on as it would without a procedure; the report says so.
    Continue,
}

/// A registration, as the record in the process's memory has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CrashProcedure {
    /// Where the library is entered.
    pub entry: u64,
    /// The application's function.
    pub procedure: u64,
    /// What it is called with.
    pub data: u64,
    /// Bytes of stack.
    pub stack_size: u64,
    /// How long it may take, milliseconds.
    pub time_limit_ms: u64,
    /// The other threads run meanwhile.
    pub threads_run: bool,
    /// Memory whose contents are checked before: address, bytes, checksum.
    pub regions: Vec<(u64, u64, u64)>,
    /// Locks whose owners it is told.
    #[serde(default)]
    pub locks: Vec<WatchedLock>,
}

/// A lock that an application has made known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchedLock {
    #[allow(missing_docs)]
    pub address: u64,
    /// Which words it consists of (libotherworld's `LOCK_*`).
    pub kind: u32,
    /// The application's.
    pub tag: u32,
}
