//! Making the mounted root file system the root.

use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};
use rustix::process::{chdir, chroot};

/// Moves what is mounted at `new_root` to `/`, as switch_root(8) does, and this process with it.
///
/// The initramfs is emptied: it is memory. The kernel's file systems are mounted again by the plan of mounts, /dev at once, since
/// everything needs it.
pub fn root(new_root: &Path) -> Result<()> {
    free_initramfs();
    let hardened = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for (fs_type, at, flags) in
        [("devtmpfs", "dev", MountFlags::NOSUID), ("proc", "proc", hardened), ("sysfs", "sys", hardened)]
    {
        let target = new_root.join(at);
        mount(fs_type, &target, fs_type, flags, None)
            .with_context(|| format!("cannot mount {}", target.display()))?;
        // Only hides the initramfs's own instance; whoever has files open in it keeps them.
        _ = unmount(Path::new("/").join(at), UnmountFlags::DETACH);
    }
    chdir(new_root).context("cannot enter the root file system")?;
    mount_move(".", "/").context("cannot move the root file system to /")?;
    chroot(".").context("cannot change the root")?;
    chdir("/").context("cannot enter /")
}

/// Removes the large files of the initramfs. The running program keeps its own pages until it ends.
fn free_initramfs() {
    for path in ["/lib", "/usr", "/sbin", "/lib64"] {
        _ = std::fs::remove_dir_all(path);
    }
}
