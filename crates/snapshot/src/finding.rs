//! What was noticed while reading.

use serde::{Deserialize, Serialize};

use crate::Pid;

/// How much a [`Finding`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth knowing; changes nothing.
    Note,
    /// Something will be different after the resurrection, and programs may see it.
    Loss,
    /// Two sources disagree; the object may be damaged.
    Doubt,
    /// The structure could not be read; what hangs off it is missing.
    Broken,
}

/// One thing that was noticed, for people and for the decision.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finding {
    #[allow(missing_docs)]
    pub severity: Severity,
    /// The process concerned, if it is one process's matter.
    pub pid: Option<Pid>,
    /// The kind of kernel object: the file name in `autopsy` (`process`, `memory`, `file` …).
    pub object: String,
    /// What is wrong, in a sentence.
    pub text: String,
}
