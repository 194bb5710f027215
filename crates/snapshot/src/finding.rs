//! What was noticed while reading.

use serde::{Deserialize, Serialize};

use crate::{Decision, Pid, Process};

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

/// How something was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// By reading it for the snapshot.
    #[default]
    Reading,
    /// A pointer does not lead to the beginning of an object of the slab cache that such objects come from.
    Slab,
    /// Lists and tables, or pointers there and back, do not agree about who belongs to what.
    Link,
    /// A reference count is too low for those that refer to the object.
    Count,
    /// A page that is mapped does not belong where it is mapped.
    Page,
    /// Credentials contradict what vouches for them.
    Credentials,
    /// A mark that the kernel puts beside its data was overwritten.
    Canary,
    /// Program text in memory is not what the program's file has.
    Text,
    /// The kernel's own instructions are not what they were when the machine was armed.
    KernelText,
    /// A program's registers contradict each other, or lead nowhere.
    Registers,
}

/// What was done about a [`Finding`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Nothing: it changes nothing, or concerns no process that would have come back.
    #[default]
    None,
    /// The process comes back, and its losses name it.
    Reported,
    /// The process's crash procedure is told of it, and decides.
    CrashProcedure,
    /// The process is given up.
    GivenUp,
}

/// One thing that was noticed, for people and for the decision.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finding {
    #[allow(missing_docs)]
    pub severity: Severity,
    /// How it was found.
    #[serde(default)]
    pub kind: FindingKind,
    /// The process concerned, if it is one process's matter.
    pub pid: Option<Pid>,
    /// The kind of kernel object: the file name in `autopsy` (`process`, `memory`, `file` …).
    pub object: String,
    /// Address of the object in the dead kernel, where the text concerns a certain one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
    /// What is wrong, in a sentence.
    pub text: String,
    /// What was done about it; known once [`crate::decide`] has run.
    #[serde(default)]
    pub action: Action,
}

impl Finding {
    /// One that was made by reading.
    pub fn new(severity: Severity, pid: Option<Pid>, object: &str, text: impl Into<String>) -> Self {
        Self {
            severity,
            kind: FindingKind::Reading,
            pid,
            object: object.to_owned(),
            address: None,
            text: text.into(),
            action: Action::None,
        }
    }

    /// What the decision on its process did about it.
    pub(crate) fn action_for(&self, process: Option<&Process>) -> Action {
        let Some(process) = process else { return Action::None };
        match (&process.decision, self.severity) {
            (_, Severity::Note) | (Decision::NotSelected { .. } | Decision::Undecided, _) => Action::None,
            (Decision::GiveUp { .. }, Severity::Loss) => Action::None,
            (Decision::GiveUp { .. }, Severity::Doubt | Severity::Broken) => Action::GivenUp,
            (Decision::Continue { .. }, Severity::Doubt) if process.crash_procedure.is_some() => {
                Action::CrashProcedure
            }
            (Decision::Continue { .. }, _) => Action::Reported,
        }
    }
}
