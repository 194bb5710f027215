//! Credentials of a thread (`struct cred`).

use serde::{Deserialize, Serialize};

/// Who a thread is and what it may do, credentials(7).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved and file-system user id.
    pub uid: u32,
    #[allow(missing_docs)]
    pub euid: u32,
    #[allow(missing_docs)]
    pub suid: u32,
    #[allow(missing_docs)]
    pub fsuid: u32,
    /// Real, effective, saved and file-system group id.
    pub gid: u32,
    #[allow(missing_docs)]
    pub egid: u32,
    #[allow(missing_docs)]
    pub sgid: u32,
    #[allow(missing_docs)]
    pub fsgid: u32,
    /// Supplementary groups, in the kernel's order.
    pub groups: Vec<u32>,
    /// The five capability sets.
    pub capabilities: Capabilities,
    /// `PR_SET_SECUREBITS` flags.
    pub securebits: u32,
}

/// Capability sets as bit masks (bit n = capability n), capabilities(7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    #[allow(missing_docs)]
    pub inheritable: u64,
    #[allow(missing_docs)]
    pub permitted: u64,
    #[allow(missing_docs)]
    pub effective: u64,
    #[allow(missing_docs)]
    pub bounding: u64,
    #[allow(missing_docs)]
    pub ambient: u64,
}
