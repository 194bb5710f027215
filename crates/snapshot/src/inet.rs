//! Internet sockets.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{Descriptor, ProtocolOption, Reason, SocketOptions};

/// A TCP or UDP socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InetSocket {
    /// AF_INET6, not AF_INET.
    pub v6: bool,
    #[allow(missing_docs)]
    pub protocol: InetProtocol,
    /// Who made it.
    pub uid: u32,
    /// Its own address and port, as getsockname(2) gives them; port 0: it has none.
    pub local: SocketAddr,
    /// The address was chosen by bind(2), not by connect(2).
    pub address_is_bound: bool,
    #[allow(missing_docs)]
    pub state: InetState,
    /// The error that the next call returns (SO_ERROR), 0: none.
    pub error: i32,
    /// Messages that nobody has read (UDP).
    pub unread: u32,
    #[allow(missing_docs)]
    pub options: SocketOptions,
    /// Options of IP, IPv6, TCP and UDP that a new socket may not have.
    pub protocol_options: Vec<ProtocolOption>,
    /// TCP_CONGESTION, where the program has chosen.
    pub congestion_control: Option<String>,
    /// Why it cannot be brought back; for people.
    pub unsupported: Option<String>,
}

#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InetProtocol {
    Tcp,
    Udp,
}

/// What an [`InetSocket`] is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum InetState {
    /// Neither connected nor listening.
    Idle,
    /// Waiting for connections.
    Listening {
        #[allow(missing_docs)]
        backlog: u32,
        /// Who had connected and was not accepted yet.
        waiting: Vec<SocketAddr>,
    },
    /// Connected, or (TCP) on the way to it or from it.
    Connected {
        #[allow(missing_docs)]
        peer: SocketAddr,
    },
    /// TCP: the connection is over; reading gives end-of-file, writing EPIPE.
    Over,
}

impl InetSocket {
    /// For people: what it is and whom it talks to.
    pub fn description(&self) -> String {
        let protocol = match self.protocol {
            InetProtocol::Tcp => "TCP",
            InetProtocol::Udp => "UDP",
        };
        let local = self.local;
        match (&self.state, self.protocol) {
            (InetState::Idle, _) if local.port() == 0 => format!("{protocol} socket"),
            (InetState::Idle, _) => format!("{protocol} socket at {local}"),
            (InetState::Listening { .. }, _) => format!("{protocol} socket listening at {local}"),
            (InetState::Connected { peer }, InetProtocol::Tcp) => {
                format!("{protocol} connection from {local} to {peer}")
            }
            (InetState::Connected { peer }, _) => format!("{protocol} socket at {local} for {peer}"),
            (InetState::Over, _) => format!("{protocol} socket whose connection is over"),
        }
    }

    /// Whether others than programs of this machine may be meant by its address.
    fn is_on_the_network(&self) -> bool {
        let ip = match self.local.ip() {
            IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4),
            ip => ip,
        };
        self.local.port() != 0 && !ip.is_loopback()
    }
}

/// What of an Internet socket cannot be as it was.
pub(crate) fn judge(
    descriptor: &Descriptor,
    socket: &InetSocket,
    reasons: &mut Vec<Reason>,
    losses: &mut Vec<Reason>,
) {
    let at = |text: String| format!("descriptor {} ({}): {text}", descriptor.fd, socket.description());
    if let Some(why) = &socket.unsupported {
        reasons.push(Reason::new("socket", at(why.clone())));
    }
    match &socket.state {
        InetState::Connected { .. } if socket.protocol == InetProtocol::Tcp => {
            reasons.push(Reason::new("socket", at("not brought back by this version".into())));
        }
        InetState::Listening { waiting, .. } if !waiting.is_empty() => {
            let who: Vec<String> = waiting.iter().take(8).map(SocketAddr::to_string).collect();
            let text = format!(
                "{} connections that nobody had accepted yet are lost: {}",
                waiting.len(),
                who.join(", ")
            );
            losses.push(Reason::new("socket-data", at(text)));
        }
        _ => {}
    }
    if socket.unread > 0 {
        let text = format!("{} datagrams that nobody had read are lost", socket.unread);
        losses.push(Reason::new("socket-data", at(text)));
    }
    if socket.error != 0 {
        let text = format!("the error {} that it was to return is not returned", socket.error);
        losses.push(Reason::new("socket-error", at(text)));
    }
    if socket.is_on_the_network() {
        let text = "reachable from this machine only, until somebody sets up the network again".into();
        losses.push(Reason::new("network", at(text)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_not_the_network() {
        let socket = |local: &str| InetSocket {
            v6: false,
            protocol: InetProtocol::Udp,
            uid: 0,
            local: local.parse().unwrap(),
            address_is_bound: true,
            state: InetState::Idle,
            error: 0,
            unread: 0,
            options: SocketOptions::default(),
            protocol_options: vec![],
            congestion_control: None,
            unsupported: None,
        };
        for local in ["127.0.0.1:53", "[::1]:53", "[::ffff:127.0.0.9]:53", "0.0.0.0:0"] {
            assert!(!socket(local).is_on_the_network(), "{local}");
        }
        for local in ["0.0.0.0:53", "[::]:53", "10.0.2.15:53"] {
            assert!(socket(local).is_on_the_network(), "{local}");
        }
    }
}
