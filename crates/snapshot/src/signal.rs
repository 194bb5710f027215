//! Signals.

use serde::{Deserialize, Serialize};

/// Signal state that all threads of a process share (`sighand_struct`, `signal_struct`).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SignalState {
    /// Identity of the `sighand_struct` (CLONE_SIGHAND).
    pub id: u64,
    /// 64 actions; index = signal number - 1.
    pub actions: Vec<SigAction>,
    /// Pending for the process as a whole, in queue order.
    pub pending: Vec<PendingSignal>,
}

/// `struct kernel_sigaction`, as rt_sigaction(2) takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigAction {
    /// Handler address; 0 SIG_DFL, 1 SIG_IGN.
    pub handler: u64,
    /// SA_*.
    pub flags: u64,
    #[allow(missing_docs)]
    pub restorer: u64,
    /// Blocked while the handler runs; bit n-1 = signal n.
    pub mask: u64,
}

/// A signal that was sent and not yet delivered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingSignal {
    #[allow(missing_docs)]
    pub signo: i32,
    /// `siginfo_t` as far as the kernel stores it (48 bytes); empty when the signal was pending without a queue entry.
    pub info: Vec<u8>,
}

/// sigaltstack(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AltStack {
    #[allow(missing_docs)]
    pub sp: u64,
    /// Bytes; 0: none set.
    pub size: u64,
    /// SS_*.
    pub flags: u32,
}
