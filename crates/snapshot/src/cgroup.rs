//! Control groups (v2).

use serde::{Deserialize, Serialize};

use crate::{Bytes, Process, Reason, Snapshot};

/// A control group other than the root.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// From the top of the hierarchy, as in /proc/PID/cgroup.
    pub path: Bytes,
    /// Who may make groups in it and move processes (it is delegated to them).
    #[serde(default)]
    pub uid: u32,
    #[allow(missing_docs)]
    #[serde(default)]
    pub gid: u32,
    /// What the files of its directory are to say that is not their default, in the order in which it is to be written: name and text.
    /// `cgroup.subtree_control` comes first; `cgroup.freeze` is last.
    pub settings: Vec<(String, String)>,
    /// What it had and does not get again, for people.
    pub unsupported: Vec<String>,
}

/// What a process's control group, and those above it, are without.
pub(crate) fn judge(snapshot: &Snapshot, process: &Process, losses: &mut Vec<Reason>) {
    judge_path(snapshot, &process.cgroup, losses);
}

fn judge_path(snapshot: &Snapshot, path: &Bytes, losses: &mut Vec<Reason>) {
    if matches!(path.as_bytes(), b"" | b"/") {
        return;
    }
    let above =
        |group: &&Cgroup| group.path.as_bytes() != b"/" && path.as_path().starts_with(group.path.as_path());
    let mut is_known = false;
    for group in snapshot.cgroups.iter().filter(above) {
        is_known |= group.path == *path;
        if !group.unsupported.is_empty() {
            let text =
                format!("the control group {} is without {}", group.path, group.unsupported.join(", "));
            losses.push(Reason::new("cgroup", text));
        }
    }
    if !is_known {
        let text = format!("its control group {path} is without the limits and settings that it had");
        losses.push(Reason::new("cgroup", text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_groups_lack_is_named() {
        let group = |path: &str, lacks: &[&str]| Cgroup {
            path: path.into(),
            uid: 0,
            gid: 0,
            settings: Vec::new(),
            unsupported: lacks.iter().map(|&what| what.to_owned()).collect(),
        };
        let cgroups = vec![
            group("/", &["x"]),
            group("/a", &["its BPF programs"]),
            group("/a/b", &[]),
            group("/ab", &["y"]),
        ];
        let snapshot = Snapshot { cgroups, ..Snapshot::default() };
        let judged = |path: &str| {
            let mut losses = Vec::new();
            judge_path(&snapshot, &path.into(), &mut losses);
            losses.into_iter().map(|loss| loss.text).collect::<Vec<_>>()
        };
        assert_eq!(judged("/a/b"), ["the control group /a is without its BPF programs"]);
        assert!(judged("/").is_empty());
        assert!(judged("/c")[0].contains("without the limits"));
    }
}
