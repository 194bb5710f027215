//! Netlink sockets.

use serde::{Deserialize, Serialize};

use crate::{Descriptor, ProtocolOption, Reason, SocketOptions};

/// A socket to the kernel (`struct netlink_sock`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkSocket {
    /// SOCK_RAW or SOCK_DGRAM.
    pub kind: i32,
    /// NETLINK_ROUTE and so on.
    pub protocol: i32,
    /// Its own port; `None`: it is not bound yet.
    pub port: Option<u32>,
    /// Groups whose messages it gets, from 1 on.
    pub groups: Vec<u32>,
    /// Where connect(2) has led it: port and group.
    pub peer: Option<(u32, u32)>,
    /// Messages that nobody has read.
    pub unread: u32,
    /// The error that the next call returns (ENOBUFS as a rule), 0: none.
    pub error: i32,
    #[allow(missing_docs)]
    pub options: SocketOptions,
    /// NETLINK_* options.
    pub protocol_options: Vec<ProtocolOption>,
    /// Why it cannot be brought back; for people.
    pub unsupported: Option<String>,
}

impl NetlinkSocket {
    /// For people.
    pub fn description(&self) -> String {
        format!("netlink socket (protocol {})", self.protocol)
    }
}

/// What of a netlink socket cannot be as it was.
pub(crate) fn judge(
    descriptor: &Descriptor,
    socket: &NetlinkSocket,
    reasons: &mut Vec<Reason>,
    losses: &mut Vec<Reason>,
) {
    let at = |text: String| format!("descriptor {} ({}): {text}", descriptor.fd, socket.description());
    if let Some(why) = &socket.unsupported {
        reasons.push(Reason::new("socket", at(why.clone())));
    }
    if socket.unread > 0 {
        let text = format!("{} messages from the kernel that nobody had read are lost", socket.unread);
        losses.push(Reason::new("socket-data", at(text)));
    }
    if socket.error != 0 {
        let text = format!("the error {} that it was to return is not returned", socket.error);
        losses.push(Reason::new("socket-error", at(text)));
    }
}
