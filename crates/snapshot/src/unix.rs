//! Unix domain sockets.

use serde::{Deserialize, Serialize};

use crate::{Bytes, FileId, NamespaceId, Snapshot, SocketOptions};

/// Address of a `struct unix_sock` in the dead kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixId(pub u64);

/// How data goes through a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnixKind {
    /// SOCK_STREAM.
    Stream,
    /// SOCK_DGRAM.
    Datagram,
    /// SOCK_SEQPACKET.
    Seqpacket,
}

/// A unix socket with what it has received and nobody has read.
///
/// The table holds the sockets of open files and, so that their state can be told, those that they are connected to, those that wait
/// to be accepted, and those that were closed while others still were connected to them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnixSocket {
    #[allow(missing_docs)]
    pub kind: UnixKind,
    /// The open file; `None` for a socket that waits to be accepted or was closed.
    pub file: Option<FileId>,
    /// It was closed, and lives on because others are connected to it.
    pub closed: bool,
    /// The name as `getsockname(2)` gives it, behind the address family: a path with its NUL, or NUL and an abstract name.
    pub address: Option<Bytes>,
    /// The name leads to this socket (the socket that accept(2) returns shows its listener's name, and does not own it).
    pub owns_address: bool,
    /// The file that a path name made.
    pub place: Option<UnixPlace>,
    /// Where it is connected to.
    pub peer: Option<UnixId>,
    /// The backlog, if it listens.
    pub listening: Option<u32>,
    /// Connections that wait to be accepted, oldest first.
    pub waiting: Vec<UnixId>,
    /// What it has received, oldest first.
    pub queue: Vec<UnixMessage>,
    /// RCV_SHUTDOWN (1) and SEND_SHUTDOWN (2).
    pub shutdown: u8,
    /// The error that the next call returns (SO_ERROR), 0: none.
    pub error: i32,
    /// SO_PEERCRED and SO_PEERGROUPS; of a listening socket what those who connect will see.
    pub peer_credentials: Option<UnixCredentials>,
    /// Messages that a datagram socket may hold before senders wait (net.unix.max_dgram_qlen when it was made).
    pub max_queue: u32,
    #[allow(missing_docs)]
    pub options: SocketOptions,
    /// Why it cannot be brought back; for people.
    pub unsupported: Option<String>,
}

/// The file in the file system that a bound socket has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnixPlace {
    /// Absolute path, which need not be what the socket was bound to (working and root directories, symbolic links).
    pub path: Bytes,
    /// The name was gone.
    pub deleted: bool,
    /// The mount namespace of the path, if that is not the initial one.
    #[serde(default)]
    pub mount_namespace: Option<NamespaceId>,
    /// Permission bits.
    pub mode: u32,
    #[allow(missing_docs)]
    pub uid: u32,
    #[allow(missing_docs)]
    pub gid: u32,
    /// The directories above it within its file system, the top one first: they may have to be made again.
    pub directories: Vec<UnixDirectory>,
}

/// A directory above a socket's file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnixDirectory {
    #[allow(missing_docs)]
    pub path: Bytes,
    /// Permission bits.
    pub mode: u32,
    #[allow(missing_docs)]
    pub uid: u32,
    #[allow(missing_docs)]
    pub gid: u32,
}

/// Who somebody is, as sockets tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixCredentials {
    #[allow(missing_docs)]
    pub pid: i32,
    #[allow(missing_docs)]
    pub uid: u32,
    #[allow(missing_docs)]
    pub gid: u32,
    /// Supplementary groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<u32>,
}

/// What one send has put into a queue, or what is left of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    /// The bytes: stretches of physical memory, in order.
    pub data: Vec<UnixData>,
    /// The socket that sent it.
    pub sender: Option<UnixId>,
    /// That socket's name.
    pub sender_address: Option<Bytes>,
    /// SCM_CREDENTIALS, as receivers with SO_PASSCRED see them.
    pub credentials: Option<UnixCredentials>,
    /// SCM_RIGHTS: open files on their way.
    pub files: Vec<FileId>,
}

impl UnixMessage {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.data.iter().map(|data| u64::from(data.len)).sum()
    }
}

/// A stretch of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixData {
    /// Physical address of the first byte.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
}

impl UnixSocket {
    /// For people: its name; abstract ones begin with `@`.
    pub fn name(&self) -> Option<String> {
        self.address.as_ref().map(unix_name)
    }

    /// Messages arrive whole or not at all.
    pub fn has_messages(&self) -> bool {
        self.kind != UnixKind::Stream
    }
}

impl Snapshot {
    /// For people: what a unix socket is and whom it talks to.
    pub fn unix_description(&self, id: UnixId) -> String {
        let Some(socket) = self.unix_sockets.get(&id) else { return "unix socket".into() };
        let kind = match socket.kind {
            UnixKind::Stream => "stream",
            UnixKind::Datagram => "datagram",
            UnixKind::Seqpacket => "seqpacket",
        };
        let mut text = format!("unix {kind} socket");
        if socket.listening.is_some() {
            text.push_str(", listening");
        }
        if let Some(name) = socket.name() {
            text.push_str(&format!(" at {name}"));
        }
        match socket.peer.map(|peer| self.unix_sockets.get(&peer)) {
            Some(Some(peer)) if peer.closed => text.push_str(", its other end closed"),
            Some(peer) => match peer.and_then(UnixSocket::name) {
                Some(name) => text.push_str(&format!(" connected to {name}")),
                None => text.push_str(", connected"),
            },
            None => {}
        }
        text
    }
}

/// For people: a unix socket's name; abstract ones begin with `@`.
pub fn unix_name(address: &Bytes) -> String {
    match address.as_bytes() {
        [0, name @ ..] => format!("@{}", Bytes(name.to_vec())),
        path => {
            let end = path.iter().position(|b| *b == 0).unwrap_or(path.len());
            Bytes(path.get(..end).unwrap_or_default().to_vec()).to_string()
        }
    }
}
