//! Filters for system calls.

use serde::{Deserialize, Serialize};

use crate::{Reason, Snapshot, Thread};

/// Address of a `struct seccomp_filter` in the dead kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SeccompFilterId(pub u64);

/// seccomp(2), per thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum Seccomp {
    #[allow(missing_docs)]
    #[default]
    Off,
    #[allow(missing_docs)]
    Strict,
    #[allow(missing_docs)]
    Filter {
        /// Filters in force, oldest first. Threads and processes share what they have inherited.
        filters: Vec<SeccompFilterId>,
    },
}

/// A filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompFilter {
    /// SECCOMP_FILTER_FLAG_LOG.
    pub log: bool,
    /// Instructions of classic BPF, eight bytes each.
    pub instructions: Vec<u64>,
    /// Why it cannot be brought back; for people.
    pub unsupported: Option<String>,
}

/// What of a thread's filters cannot be as it was.
pub(crate) fn judge(snapshot: &Snapshot, thread: &Thread, reasons: &mut Vec<Reason>) {
    let Seccomp::Filter { filters } = &thread.seccomp else { return };
    let mut lacks = |why: &str| {
        reasons.push(Reason::new(
            "seccomp",
            format!("thread {} runs under a seccomp filter: {why}", thread.tid),
        ));
    };
    if filters.is_empty() {
        lacks("which one could not be read");
    }
    for id in filters {
        match snapshot.seccomp_filters.get(id) {
            None => lacks("it could not be read"),
            Some(SeccompFilter { unsupported: Some(why), .. }) => lacks(why),
            Some(_) => {}
        }
    }
}
