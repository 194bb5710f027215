//! File systems in memory: what is in them exists nowhere else.

use serde::{Deserialize, Serialize};

use crate::{Bytes, InodeId};

/// A tmpfs, ramfs or devtmpfs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Device number of the super block (`st_dev`).
    pub dev_major: u32,
    #[allow(missing_docs)]
    pub dev_minor: u32,
    /// `tmpfs`, `ramfs`, `devtmpfs`.
    pub fs_type: Bytes,
    /// Permission bits of its root directory.
    pub mode: u32,
    /// Owner of its root directory.
    pub uid: u32,
    #[allow(missing_docs)]
    pub gid: u32,
    /// Bytes that its files may take, if there is a limit.
    pub size: Option<u64>,
    /// Everything below the root directory that has a name, directories before what is in them.
    pub entries: Vec<TmpfsEntry>,
}

/// One name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsEntry {
    /// From the root of the file system, absolute.
    pub path: Bytes,
    /// Two names of the same file have the same.
    pub inode: InodeId,
    #[allow(missing_docs)]
    pub kind: TmpfsKind,
}

/// What a name is the name of. Owner, mode, times and contents are the inode's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum TmpfsKind {
    #[allow(missing_docs)]
    Regular,
    #[allow(missing_docs)]
    Directory,
    /// A symbolic link.
    Symlink {
        /// Where it leads.
        target: Bytes,
    },
    /// A FIFO, socket or device.
    Special {
        /// Of a device.
        major: u32,
        #[allow(missing_docs)]
        minor: u32,
    },
}
