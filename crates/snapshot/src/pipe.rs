//! Pipes and FIFOs.

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// Address of a `struct pipe_inode_info` in the dead kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PipeId(pub u64);

/// Which end of a pipe an open file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PipeEnd {
    #[allow(missing_docs)]
    Read,
    #[allow(missing_docs)]
    Write,
    /// A FIFO opened O_RDWR.
    Both,
}

/// A pipe with its contents.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pipe {
    /// Name in the file system, for FIFOs.
    pub path: Option<Bytes>,
    /// F_GETPIPE_SZ, bytes.
    pub capacity: u64,
    /// Unread data, oldest first.
    pub buffers: Vec<PipeBuffer>,
    /// Open read ends, as the kernel counted them (for cross-checks).
    pub readers: u32,
    /// Open write ends.
    pub writers: u32,
}

/// One stretch of unread data in a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeBuffer {
    /// Physical address of the first byte.
    pub addr: u64,
    /// Bytes (at most a page).
    pub len: u32,
    /// Written in packet mode (O_DIRECT): a read returns at most this.
    pub packet: bool,
}
