//! Control groups (v2).

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// A control group other than the root.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// From the top of the hierarchy, as in /proc/PID/cgroup.
    pub path: Bytes,
    /// What the files of its directory are to say that is not their default, in the order in which it is to be written: name and text.
    /// `cgroup.subtree_control` comes first; `cgroup.freeze` is last.
    pub settings: Vec<(String, String)>,
    /// What it had and does not get again, for people.
    pub unsupported: Vec<String>,
}
