//! Signal descriptors.

use serde::{Deserialize, Serialize};

/// `struct signalfd_ctx`: nothing is kept in it but the set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalFd {
    /// Signals that it reads; bit 0 is signal 1.
    pub mask: u64,
}
