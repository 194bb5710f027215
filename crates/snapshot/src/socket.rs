//! What all sockets have in common.

use serde::{Deserialize, Serialize};

/// What setsockopt(2) sets on level SOL_SOCKET.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOptions {
    /// SO_SNDBUF, as getsockopt(2) gives it; `None`: the kernel chooses.
    pub send_buffer: Option<u32>,
    /// SO_RCVBUF, likewise.
    pub receive_buffer: Option<u32>,
    /// SO_RCVLOWAT.
    pub receive_low_water: u32,
    /// SO_SNDTIMEO, microseconds; `None`: none.
    pub send_timeout_us: Option<u64>,
    /// SO_RCVTIMEO.
    pub receive_timeout_us: Option<u64>,
    /// SO_PEEK_OFF, -1: not used.
    pub peek_offset: i32,
    /// SO_PRIORITY.
    pub priority: u32,
    /// SO_MARK.
    pub mark: u32,
    /// SO_LINGER, seconds; `None`: off.
    pub linger: Option<u32>,
    /// SO_REUSEADDR.
    pub reuse_address: bool,
    /// SO_REUSEPORT.
    #[serde(default)]
    pub reuse_port: bool,
    /// SO_PASSCRED.
    pub pass_credentials: bool,
    /// SO_PASSSEC.
    pub pass_security: bool,
    /// SO_PASSPIDFD (since 6.5).
    pub pass_pidfd: bool,
    /// SO_KEEPALIVE.
    pub keep_alive: bool,
    /// SO_BROADCAST.
    pub broadcast: bool,
    /// SO_DONTROUTE.
    #[serde(default)]
    pub dont_route: bool,
    /// SO_OOBINLINE.
    pub out_of_band_inline: bool,
    /// SO_TIMESTAMP.
    pub timestamp: bool,
    /// SO_TIMESTAMPNS.
    pub timestamp_ns: bool,
    /// SO_ATTACH_FILTER: instructions of classic BPF, eight bytes each; empty: none.
    #[serde(default)]
    pub filter: Vec<u64>,
    /// SO_LOCK_FILTER.
    #[serde(default)]
    pub filter_locked: bool,
}

/// An option of a protocol that is a number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtocolOption {
    /// Its name in the manual pages.
    pub name: String,
    /// IPPROTO_*, SOL_*.
    pub level: i32,
    #[allow(missing_docs)]
    pub option: i32,
    #[allow(missing_docs)]
    pub value: i32,
}
