//! Event counters.

use serde::{Deserialize, Serialize};

/// `struct eventfd_ctx`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventFd {
    #[allow(missing_docs)]
    pub count: u64,
    /// EFD_SEMAPHORE.
    pub semaphore: bool,
}

impl EventFd {
    /// A value that nobody can write, but the kernel can reach.
    pub const OVERFLOW: u64 = u64::MAX;
}
