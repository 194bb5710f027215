//! System V IPC: shared memory, semaphores, message queues.

use serde::{Deserialize, Serialize};

use crate::{Bytes, InodeId, PAGE_SIZE, Pid};

/// All objects of the initial IPC namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipc {
    /// By ascending identifier.
    pub shm: Vec<ShmSegment>,
    /// By ascending identifier.
    pub sem: Vec<SemArray>,
    /// By ascending identifier.
    pub msg: Vec<MsgQueue>,
}

/// What the three kinds have in common (`struct kern_ipc_perm`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcPerm {
    /// The identifier that shmget(2) and its kin return.
    pub id: i32,
    /// The key, 0 for IPC_PRIVATE and for what has been removed.
    pub key: i32,
    #[allow(missing_docs)]
    pub uid: u32,
    #[allow(missing_docs)]
    pub gid: u32,
    /// Of the creator.
    pub cuid: u32,
    /// Of the creator.
    pub cgid: u32,
    /// Permissions, nine bits.
    pub mode: u32,
}

/// A shared memory segment. Its contents are those of the inode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShmSegment {
    #[allow(missing_docs)]
    pub perm: IpcPerm,
    /// The unnamed file that holds the pages.
    pub inode: InodeId,
    /// As given to shmget, bytes.
    pub size: u64,
    /// Bytes of its pages, if it was made with SHM_HUGETLB.
    #[serde(default)]
    pub huge_page: Option<u64>,
    /// IPC_RMID was called while it was attached.
    pub removed: bool,
    /// SHM_LOCK.
    pub locked: bool,
}

impl ShmSegment {
    /// What its mappings are called in /proc/PID/maps.
    pub fn file_name(&self) -> String {
        format!("/SYSV{:08x} (deleted)", self.perm.key)
    }

    /// Bytes of address space that it takes.
    pub fn mapped_len(&self) -> u64 {
        self.size.next_multiple_of(self.huge_page.unwrap_or(PAGE_SIZE))
    }
}

/// A set of semaphores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemArray {
    #[allow(missing_docs)]
    pub perm: IpcPerm,
    #[allow(missing_docs)]
    pub values: Vec<u16>,
    /// What is to be undone when processes exit (SEM_UNDO).
    pub undo: Vec<SemUndo>,
}

/// What one process's exit does to a set of semaphores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemUndo {
    #[allow(missing_docs)]
    pub pid: Pid,
    /// Added to each value.
    pub adjustments: Vec<i16>,
}

/// A message queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsgQueue {
    #[allow(missing_docs)]
    pub perm: IpcPerm,
    /// `msg_qbytes`: how many bytes it takes.
    pub max_bytes: u64,
    /// Oldest first.
    pub messages: Vec<Message>,
}

/// A message that nobody has received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `mtype`.
    pub kind: i64,
    #[allow(missing_docs)]
    pub text: Bytes,
}
