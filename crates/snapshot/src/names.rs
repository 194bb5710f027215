//! Names on disk file systems that were made, changed or removed so lately that the disk may not know.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{Bytes, InodeId, TmpfsKind};

/// What the dead kernel knew of one disk file system and the disk may not know. What is not in here is as on the disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DiskNames {
    /// Where its root directory is mounted.
    pub mountpoint: Bytes,
    /// Device of the file system (`st_dev`).
    pub dev_major: u32,
    #[allow(missing_docs)]
    pub dev_minor: u32,
    /// Directories that were changed lately, each before those that are in it.
    pub directories: Vec<DirectoryNames>,
    /// Inodes of all types that were changed lately: also those without a name, which the disk may still have under one. What else
    /// is known of them is in [`Snapshot::inodes`](crate::Snapshot::inodes).
    pub inodes: BTreeMap<InodeId, NamedInode>,
}

/// Names in one directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DirectoryNames {
    #[allow(missing_docs)]
    pub inode: InodeId,
    /// Names of inodes that were changed lately, and such that there are not.
    pub names: Vec<Name>,
    /// All names that there were, if that is known (ext4).
    #[serde(default)]
    pub listing: Option<BTreeSet<Bytes>>,
}

/// One name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    #[allow(missing_docs)]
    pub name: Bytes,
    /// Whose it is, among [`DiskNames::inodes`]. `None`: there is nothing of that name.
    pub inode: Option<InodeId>,
}

/// An inode and its names.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NamedInode {
    #[allow(missing_docs)]
    pub kind: TmpfsKind,
    /// Those that the kernel had in memory.
    pub names: Vec<Link>,
}

/// Where one of an inode's names is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Number of the directory's inode.
    pub directory: u64,
    #[allow(missing_docs)]
    pub name: Bytes,
}
