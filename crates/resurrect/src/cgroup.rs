//! Control groups (v2): the directories, and who is in them. What was set for them is not known here.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use snapshot::{Bytes, Pid};

use crate::sys;

const ROOT: &str = "/sys/fs/cgroup";

/// Puts a process with all its threads into a group, which is made if it is not there. `path`: as in /proc/PID/cgroup.
pub(crate) fn join(pid: Pid, path: &Bytes) -> Result<(), String> {
    if matches!(path.as_bytes(), b"" | b"/") {
        return Ok(());
    }
    if !statfs(ROOT).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC) {
        return Err(format!("{ROOT} is not mounted"));
    }
    let relative = path.as_path().strip_prefix("/").map_err(|_| "its path is not absolute")?;
    if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err("its path leads elsewhere".into());
    }
    let directory = Path::new(ROOT).join(relative);
    let made = DirBuilder::new().recursive(true).mode(0o755).create(&directory);
    made.map_err(|e| format!("make {}: {e}", directory.display()))?;
    let procs = directory.join("cgroup.procs");
    sys::write_proc(&procs.to_string_lossy(), &pid.to_string())
        .map_err(|e| format!("{}: {e}", procs.display()))
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
            assert!(join(own, &path.into()).is_err(), "{path}");
        }
    }
}
