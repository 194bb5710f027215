//! Control groups (v2): the directories, what is set for them, and who is in them.

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use snapshot::{Bytes, Cgroup, Pid, Process, Snapshot};

use crate::sys;

const ROOT: &str = "/sys/fs/cgroup";
/// Set when everybody is in it and runs.
const FREEZE: &str = "cgroup.freeze";

/// Makes the groups of `processes` and those above them, or, if PID 1 is among them, which answers for all, all groups there were. Returns
/// what could not be set, with the path of the group.
pub(crate) fn make_all(snapshot: &Snapshot, processes: &[&Process]) -> Vec<(Bytes, String)> {
    let mut failed = Vec::new();
    if processes.is_empty() || !is_mounted() {
        return failed;
    }
    let all = processes.iter().any(|p| p.pid == 1);
    let needed = |group: &&Cgroup| {
        all || processes.iter().any(|p| p.cgroup.as_path().starts_with(group.path.as_path()))
    };
    for group in snapshot.cgroups.iter().filter(needed) {
        if let Err(why) = make(group) {
            failed.push((group.path.clone(), why));
        }
    }
    failed
}

fn make(group: &Cgroup) -> Result<(), String> {
    let directory = directory(&group.path)?;
    create(&directory)?;
    let mut failed = Vec::new();
    if (group.uid, group.gid) != (0, 0) {
        // To whom a group is delegated, these are as well (cgroups(7)).
        for name in [".", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
            let owned = chown(directory.join(name), Some(group.uid), Some(group.gid));
            failed.extend(owned.err().map(|e| format!("owner of {name}: {e}")));
        }
    }
    for (name, text) in group.settings.iter().filter(|(name, _)| name != FREEZE) {
        // A controller that this kernel does not have must not keep the others from being there.
        let words: Vec<&str> = match name.as_str() {
            "cgroup.subtree_control" => text.split(' ').collect(),
            _ => vec![text],
        };
        for word in words {
            if let Err(e) = set(&directory, name, word) {
                failed.push(format!("{name} {word}: {e}"));
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join(", ")) }
}

/// Freezes again what was frozen.
pub(crate) fn freeze_all(snapshot: &Snapshot) {
    for group in &snapshot.cgroups {
        let is_frozen = group.settings.iter().any(|(name, _)| name == FREEZE);
        if let Some(directory) = directory(&group.path).ok().filter(|_| is_frozen) {
            // Who is not frozen runs on: nothing that a program could take harm from.
            _ = set(&directory, FREEZE, "1");
        }
    }
}

/// Puts a process with all its threads into a group, which is made if it is not there. `path`: as in /proc/PID/cgroup.
pub(crate) fn join(pid: Pid, path: &Bytes) -> Result<(), String> {
    if matches!(path.as_bytes(), b"" | b"/") {
        return Ok(());
    }
    if !is_mounted() {
        return Err(format!("{ROOT} is not mounted"));
    }
    let directory = directory(path)?;
    create(&directory)?;
    set(&directory, "cgroup.procs", &pid.to_string()).map_err(|e| format!("{}: {e}", directory.display()))
}

fn is_mounted() -> bool {
    statfs(ROOT).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

fn directory(path: &Bytes) -> Result<PathBuf, String> {
    let relative = path.as_path().strip_prefix("/").map_err(|_| "its path is not absolute")?;
    if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err("its path leads elsewhere".into());
    }
    Ok(Path::new(ROOT).join(relative))
}

fn create(directory: &Path) -> Result<(), String> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(directory);
    made.map_err(|e| format!("make {}: {e}", directory.display()))
}

fn set(directory: &Path, name: &str, text: &str) -> std::io::Result<()> {
    sys::write_proc(&directory.join(name).to_string_lossy(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_group_is_where_everybody_is_and_strange_paths_are_refused() {
        let own = nix::unistd::getpid().as_raw();
        assert_eq!(join(own, &"/".into()), Ok(()));
        assert_eq!(join(own, &"".into()), Ok(()));
        for path in ["/../x", "x", "/a/../../b"] {
            assert!(directory(&path.into()).is_err(), "{path}");
        }
        assert_eq!(directory(&"/".into()), Ok(ROOT.into()));
    }
}
