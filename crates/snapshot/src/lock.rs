//! File locks and leases.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{Descriptor, FileId, InodeId, Pid, Process, Reason, Snapshot, VmaKind};

/// A lock that somebody held on a file. Who waited for one is in the middle of a system call, which is issued again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    #[allow(missing_docs)]
    pub kind: LockKind,
    /// The locked file.
    pub inode: InodeId,
    #[allow(missing_docs)]
    pub owner: LockOwner,
    /// F_WRLCK or LOCK_EX; otherwise F_RDLCK or LOCK_SH.
    pub exclusive: bool,
    /// First byte of the range; 0 for locks of whole files.
    pub start: i64,
    /// Last byte of the range, `i64::MAX` for one without end.
    pub end: i64,
    /// The process that took it, as /proc/locks shows it.
    pub pid: Pid,
    /// Leases: the descriptor that their signals name (`si_fd`), else -1.
    pub descriptor: i32,
    /// Leases: the holder had been asked to give it up.
    pub breaking: bool,
}

/// What a lock is called in fcntl(2) and flock(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockKind {
    /// flock(2).
    Flock,
    /// F_SETLK: goes when the process closes any descriptor of the file.
    Posix,
    /// F_OFD_SETLK.
    Ofd,
    /// F_SETLEASE.
    Lease,
}

/// Whose end is the end of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockOwner {
    /// An open file description.
    File(FileId),
    /// A descriptor table ([`Process::files_id`]).
    Table(u64),
}

impl Lock {
    /// Length of the range as `struct flock` has it: 0 for one without end.
    pub fn length(&self) -> i64 {
        if self.end == i64::MAX { 0 } else { self.end.saturating_sub(self.start).saturating_add(1) }
    }

    /// A descriptor of the process through which a record lock of this kind can be taken.
    pub fn descriptor_for<'p>(&self, snapshot: &Snapshot, process: &'p Process) -> Option<&'p Descriptor> {
        const O_ACCMODE: i32 = 3;
        const O_PATH: i32 = 0o10_000_000;
        process.descriptors.iter().find(|d| {
            let Some(file) = snapshot.files.get(&d.file) else { return false };
            let mode = file.flags & O_ACCMODE;
            let (reads, writes) = (mode == 0 || mode == 2, mode == 1 || mode == 2);
            file.inode == self.inode
                && file.flags & O_PATH == 0
                && if self.exclusive { writes } else { reads }
        })
    }
}

/// File systems whose locks are held by a server or another machine as well.
const REMOTE: [&str; 13] = [
    "nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "gfs2", "ocfs2", "lustre", "coda", "orangefs", "fuse",
];

pub(crate) fn judge(
    snapshot: &Snapshot,
    process: &Process,
    reasons: &mut Vec<Reason>,
    losses: &mut Vec<Reason>,
) {
    if snapshot.locks.is_empty() {
        return;
    }
    let mm = process.address_space.and_then(|id| snapshot.address_spaces.get(&id));
    let mapped = mm.into_iter().flat_map(|mm| &mm.vmas).filter_map(|vma| match vma.kind {
        VmaKind::File { file, .. } => Some(file),
        _ => None,
    });
    let files: BTreeSet<FileId> = process.descriptors.iter().map(|d| d.file).chain(mapped).collect();
    for lock in &snapshot.locks {
        let is_own = match lock.owner {
            LockOwner::File(file) => files.contains(&file),
            LockOwner::Table(table) => table != 0 && table == process.files_id,
        };
        if !is_own {
            continue;
        }
        let inode = snapshot.inodes.get(&lock.inode);
        let name = inode.map_or(String::new(), |inode| inode.path.to_string());
        let fs_type = inode.map_or(String::new(), |inode| inode.fs_type.to_string());
        if REMOTE.contains(&fs_type.split('.').next().unwrap_or_default()) {
            let text =
                format!("a lock on {name}, on the file system {fs_type}: not brought back by this version");
            reasons.push(Reason::new("file-lock", text));
        } else if lock.kind == LockKind::Posix && lock.descriptor_for(snapshot, process).is_none() {
            let text = format!("a lock on {name} is gone: its last descriptor was just being closed");
            losses.push(Reason::new("file-lock", text));
        } else if lock.breaking {
            let text = format!("the lease on {name}, which was to be given up, is whole again");
            losses.push(Reason::new("file-lock", text));
        }
    }
}
