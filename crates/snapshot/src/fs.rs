//! File-system context of a process, and the mount table.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use crate::Bytes;

/// Working directory, root and umask (`struct fs_struct`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsContext {
    /// Address of the `fs_struct`: threads and CLONE_FS processes share it.
    pub id: u64,
    /// Current directory, absolute in the initial mount namespace.
    pub cwd: Bytes,
    /// The directory had been removed.
    pub cwd_deleted: bool,
    /// Root directory: `/` unless chroot(2) was used.
    pub root: Bytes,
    #[allow(missing_docs)]
    pub umask: u32,
}

/// Seconds and nanoseconds since the epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp {
    #[allow(missing_docs)]
    pub sec: i64,
    #[allow(missing_docs)]
    pub nsec: u32,
}

bitflags! {
    /// Mount flags as mount(2) knows them.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct MountFlags: u32 {
        #[allow(missing_docs)] const READ_ONLY = 1;
        #[allow(missing_docs)] const NOSUID = 1 << 1;
        #[allow(missing_docs)] const NODEV = 1 << 2;
        #[allow(missing_docs)] const NOEXEC = 1 << 3;
        #[allow(missing_docs)] const NOATIME = 1 << 4;
        #[allow(missing_docs)] const NODIRATIME = 1 << 5;
        #[allow(missing_docs)] const RELATIME = 1 << 6;
        /// The super block itself is read-only.
        const SB_READ_ONLY = 1 << 7;
        #[allow(missing_docs)] const SYNCHRONOUS = 1 << 8;
    }
}

/// One mount (`struct mount`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// `mnt_id`, as in /proc/PID/mountinfo.
    pub id: i32,
    /// `mnt_id` of the mount that this one is mounted on.
    pub parent: i32,
    /// Where it is mounted.
    pub mountpoint: Bytes,
    /// Which directory of the file system is mounted: `/`, or another for bind mounts.
    pub root: Bytes,
    /// File system type (`ext4`, `tmpfs`, …).
    pub fs_type: Bytes,
    /// What was mounted (`/dev/vda1`, `tmpfs`): the kernel's `mnt_devname`.
    pub source: Bytes,
    /// Device number of the super block (`st_dev`).
    pub dev_major: u32,
    #[allow(missing_docs)]
    pub dev_minor: u32,
    #[allow(missing_docs)]
    pub flags: MountFlags,
    /// Number of the group of mounts that share what is mounted below them, 0: it is private.
    #[serde(default)]
    pub peer_group: i32,
    /// Number of the group from which it gets what is mounted below, 0: none.
    #[serde(default)]
    pub master: i32,
}

impl Mount {
    /// Whether all that another mount of the same file system shows can be reached through this one.
    pub fn is_above(&self, other: &Mount) -> bool {
        other.root.as_path().starts_with(self.root.as_path())
    }
}
