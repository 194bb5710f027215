//! Namespaces other than the initial ones.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{Bytes, FileKind, Mode, Mount, OpenFile, Process, Reason, Snapshot};

/// Address of a namespace (`struct mnt_namespace`, `struct uts_namespace`) in the dead kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NamespaceId(pub u64);

/// A mount namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountNamespace {
    /// Parents before children. Mount points are absolute in this namespace.
    pub mounts: Vec<Mount>,
}

/// A UTS namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UtsNamespace {
    /// As uname(2) gives it.
    pub nodename: Bytes,
    #[allow(missing_docs)]
    pub domainname: Bytes,
}

/// File systems of which a further mount is the same one (as long as its super block is mounted), or that begin empty.
const ANYWHERE: [&str; 4] = ["tmpfs", "ramfs", "proc", "mqueue"];

impl MountNamespace {
    /// Of all mounts of a namespace, parents before children, those that names lead to: what is on top at the root, and all below. (Whoever
    /// makes a namespace may leave the tree that he came from under the new root.)
    pub fn of_reachable(all: Vec<Mount>) -> Self {
        let Some(mut root) = all.first().map(|m| m.id) else { return Self::default() };
        for m in &all {
            if m.parent == root && m.id != root && m.mountpoint.as_bytes() == b"/" {
                root = m.id;
            }
        }
        let mut known = BTreeSet::from([root]);
        let is_reachable = |m: &Mount| m.id == root || known.contains(&m.parent) && known.insert(m.id);
        Self { mounts: all.into_iter().filter(is_reachable).collect() }
    }

    /// What cannot be mounted again, for people: file systems that are mounted nowhere else.
    pub fn obstacles<'a>(&'a self, snapshot: &'a Snapshot) -> impl Iterator<Item = String> + 'a {
        let is_elsewhere = |m: &Mount| {
            let same = |source: &Mount| (m.dev_major, m.dev_minor) == (source.dev_major, source.dev_minor);
            snapshot.mounts.iter().any(|source| same(source) && source.is_above(m))
        };
        let begins_anew =
            |m: &Mount| ANYWHERE.iter().any(|fs_type| m.fs_type.as_bytes() == fs_type.as_bytes());
        let unknown = self.mounts.iter().filter(move |m| !is_elsewhere(m) && !begins_anew(m));
        unknown.map(|m| format!("{} at {} is mounted nowhere else", m.fs_type, m.mountpoint))
    }
}

/// What of a process's namespaces cannot be as it was.
pub(crate) fn judge(
    snapshot: &Snapshot,
    process: &Process,
    mode: Mode,
    reasons: &mut Vec<Reason>,
    losses: &mut Vec<Reason>,
) {
    let ns = &process.namespaces;
    let is_known =
        |id: Option<NamespaceId>, known: &dyn Fn(&NamespaceId) -> bool| id.is_some_and(|id| known(&id));
    let others = [
        (ns.cgroup, "cgroup"),
        (ns.ipc, "ipc"),
        (
            ns.mnt || is_known(process.mount_namespace, &|id| snapshot.mount_namespaces.contains_key(id)),
            "mount",
        ),
        (ns.net, "network"),
        (ns.pid, "PID"),
        (ns.time, "time"),
        (ns.user, "user"),
        (ns.uts || is_known(process.uts_namespace, &|id| snapshot.uts_namespaces.contains_key(id)), "uts"),
    ];
    let names: Vec<&str> = others.iter().filter(|(can_be, _)| !can_be).map(|(_, name)| *name).collect();
    if !names.is_empty() {
        let text =
            format!("it lives in its own {} namespace: not brought back by this version", names.join(", "));
        reasons.push(Reason::new("namespace", text));
    }
    let mounts = process.mount_namespace.and_then(|id| snapshot.mount_namespaces.get(&id));
    for what in mounts.into_iter().flat_map(|mounts| mounts.obstacles(snapshot)) {
        let text = format!("its mount namespace: {what}");
        match mode {
            Mode::All => losses.push(Reason::new("mount", text)),
            Mode::Selected | Mode::Programs => reasons.push(Reason::new("mount", text)),
        }
    }
}

/// Why a file's place is out of reach, if it is.
pub(crate) fn obstacle_of_place(snapshot: &Snapshot, file: &OpenFile) -> Option<String> {
    let namespace = file.mount_namespace.filter(|_| !matches!(file.kind, FileKind::Memfd { .. }))?;
    let is_known = snapshot.mount_namespaces.contains_key(&namespace);
    (!is_known).then(|| "it belongs to a mount namespace that is not known".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MountFlags;

    fn mount(at: &str, root: &str, fs_type: &str, dev_minor: u32) -> Mount {
        Mount {
            id: 1,
            parent: 0,
            mountpoint: at.into(),
            root: root.into(),
            fs_type: fs_type.into(),
            source: "none".into(),
            dev_major: 0,
            dev_minor,
            flags: MountFlags::empty(),
            peer_group: 0,
            master: 0,
        }
    }

    #[test]
    fn what_lies_under_the_root_is_out_of_reach() {
        let numbered = |id, parent, at| Mount { id, parent, ..mount(at, "/", "ext4", 1) };
        let all = vec![
            numbered(41, 41, "/"),
            numbered(42, 41, "/"),
            numbered(43, 42, "/dev"),
            numbered(69, 42, "/"),
            numbered(70, 69, "/dev"),
            numbered(71, 70, "/dev/shm"),
            numbered(44, 43, "/dev/pts"),
        ];
        let ids: Vec<i32> = MountNamespace::of_reachable(all).mounts.iter().map(|m| m.id).collect();
        assert_eq!(ids, [69, 70, 71]);
        assert_eq!(MountNamespace::of_reachable(Vec::new()), MountNamespace::default());
    }

    #[test]
    fn what_is_mounted_elsewhere_or_begins_empty_can_be_mounted_again() {
        let mounts = vec![mount("/", "/", "ext4", 1), mount("/srv/a", "/a", "ext4", 2)];
        let snapshot = Snapshot { mounts, ..Snapshot::default() };
        let namespace = MountNamespace {
            mounts: vec![
                mount("/", "/", "ext4", 1),
                mount("/tmp", "/tmp/private/tmp", "ext4", 1),
                mount("/x", "/a/b", "ext4", 2),
                mount("/y", "/ab", "ext4", 2),
                mount("/dev", "/", "tmpfs", 7),
                mount("/z", "/", "fuse.x", 8),
            ],
        };
        let obstacles: Vec<String> = namespace.obstacles(&snapshot).collect();
        assert_eq!(obstacles, ["ext4 at /y is mounted nowhere else", "fuse.x at /z is mounted nowhere else"]);
    }
}
