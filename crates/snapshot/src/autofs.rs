//! Mount points of automounters.

use serde::{Deserialize, Serialize};

use crate::PipeId;

/// An autofs file system (`autofs_sb_info`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Autofs {
    /// Device number of the super block (`st_dev`).
    pub dev_major: u32,
    #[allow(missing_docs)]
    pub dev_minor: u32,
    /// Where the kernel sends its requests. `None`: nobody serves them any more (it is catatonic).
    pub pipe: Option<PipeId>,
    /// The process group that sees the directories as they are.
    pub pgrp: i32,
    /// `indirect`, `direct` or `offset`.
    pub kind: String,
    /// Lowest version of the protocol.
    pub min_proto: i32,
    /// Highest version of the protocol.
    pub max_proto: i32,
    /// Seconds after which unused mounts go, 0: never.
    pub timeout: u64,
}
