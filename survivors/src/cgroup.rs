//! Control groups: who is in them, and what is set for them.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::Stage;
use crate::procfs::same;

const ROOT: &str = "/sys/fs/cgroup";
/// What is set, if the controller is there.
const SETTINGS: [(&str, &str); 4] =
    [("pids.max", "1234"), ("memory.high", "268435456"), ("memory.low", "1048576"), ("cpu.weight", "250")];

/// A group with limits, in a group for which controllers are enabled.
pub fn settings(stage: &mut Stage) -> Result<()> {
    let damage = if stage.options().damage { "-damage" } else { "" };
    let outer = Path::new(ROOT).join(format!("otherworld-{}{damage}", std::process::id()));
    let inner = outer.join("inner");
    let is_there = Path::new(ROOT).join("cgroup.controllers").exists();
    if !is_there || fs::create_dir(&outer).is_err() {
        // A place without control groups of one's own has nothing to show.
        let crash = stage.crash()?;
        ensure!(!crash.damage, "there are no control groups to damage");
        return Ok(());
    }
    let mut enabled = Vec::new();
    for controller in ["pids", "memory", "cpu"] {
        let one = format!("+{controller}");
        if fs::write(outer.join("cgroup.subtree_control"), one).is_ok() {
            enabled.push(controller);
        }
    }
    fs::create_dir(&inner)?;
    let set: Vec<_> = SETTINGS.iter().filter(|(name, _)| inner.join(name).exists()).collect();
    for (name, text) in &set {
        fs::write(inner.join(name), text).with_context(|| format!("{name} {text}"))?;
    }
    fs::write(inner.join("cgroup.procs"), std::process::id().to_string()).context("join the group")?;
    // Delegated to somebody.
    let (uid, gid) = (Some(4711), Some(4712));
    chown(&inner, uid, gid)?;
    let controllers = fs::read_to_string(outer.join("cgroup.subtree_control"))?;
    let own = fs::read_to_string("/proc/self/cgroup")?;

    let crash = stage.crash()?;
    if crash.damage {
        fs::write(inner.join(set.first().context("nothing could be set")?.0), "max")?;
    }
    same("its group", &own, &fs::read_to_string("/proc/self/cgroup")?)?;
    same("controllers", &controllers, &fs::read_to_string(outer.join("cgroup.subtree_control"))?)?;
    same("owner", &(4711, 4712), &fs::metadata(&inner).map(|meta| (meta.uid(), meta.gid()))?)?;
    for (name, text) in set {
        same(name, &(*text).to_owned(), &fs::read_to_string(inner.join(name))?.trim().to_owned())?;
    }
    fs::write(Path::new(ROOT).join("cgroup.procs"), std::process::id().to_string())?;
    fs::remove_dir(&inner)?;
    Ok(fs::remove_dir(&outer)?)
}
