//! Sockets: which kind one is, and names for those that are not brought back (include/linux/net.h, include/net/sock.h; 6.1 and
//! 6.12).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ktypes::KernelType;
use snapshot::FileKind;

use crate::Autopsy;
use crate::error::Result;

const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const AF_NETLINK: u16 = 16;
const AF_PACKET: u16 = 17;
const AF_VSOCK: u16 = 40;
/// TCP_LISTEN (include/net/tcp_states.h).
const LISTEN: u8 = 10;

#[derive(KernelType)]
#[kernel("socket")]
struct Socket {
    #[kernel("type")]
    kind: i16,
    sk: u64,
}

#[derive(KernelType)]
#[kernel("sock")]
struct Sock {
    #[kernel("__sk_common.skc_family")]
    family: u16,
    #[kernel("__sk_common.skc_state")]
    state: u8,
    #[kernel("__sk_common.skc_daddr")]
    daddr: [u8; 4],
    #[kernel("__sk_common.skc_rcv_saddr")]
    saddr: [u8; 4],
    #[kernel("__sk_common.skc_dport")]
    dport: [u8; 2],
    #[kernel("__sk_common.skc_num")]
    sport: u16,
    #[kernel("__sk_common.skc_v6_daddr", optional)]
    daddr6: Option<[u8; 16]>,
    #[kernel("__sk_common.skc_v6_rcv_saddr", optional)]
    saddr6: Option<[u8; 16]>,
    sk_protocol: u16,
}

impl Autopsy<'_> {
    /// The kind of the open file that a socket has; its state goes into the table.
    pub(crate) fn socket_kind(&self, addr: u64) -> Result<FileKind> {
        let socket: Socket = self.kernel.read(addr)?;
        if socket.sk != 0 && self.kernel.read::<Sock>(socket.sk)?.family == AF_UNIX {
            return Ok(FileKind::Unix { socket: self.unix(socket.sk)? });
        }
        Ok(FileKind::Unsupported { what: self.socket_description(addr)? })
    }

    /// What a socket is and whom it talks to, for people.
    fn socket_description(&self, addr: u64) -> Result<String> {
        let socket: Socket = self.kernel.read(addr)?;
        let kind = match socket.kind {
            1 => "stream",
            2 => "datagram",
            3 => "raw",
            5 => "seqpacket",
            _ => "unusual",
        };
        if socket.sk == 0 {
            return Ok(format!("a {kind} socket that is closing"));
        }
        let sock: Sock = self.kernel.read(socket.sk)?;
        Ok(match sock.family {
            AF_INET | AF_INET6 => inet_description(&sock, kind),
            AF_NETLINK => format!("netlink socket (protocol {})", sock.sk_protocol),
            AF_PACKET => "packet socket".into(),
            AF_VSOCK => "vsock socket".into(),
            other => format!("{kind} socket of address family {other}"),
        })
    }
}

fn inet_description(sock: &Sock, kind: &str) -> String {
    let protocol = match sock.sk_protocol {
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        1 | 58 => "ICMP".to_owned(),
        other => format!("{kind} (protocol {other})"),
    };
    let address = |v4: [u8; 4], v6: Option<[u8; 16]>, port: u16| match (sock.family, v6) {
        (AF_INET6, Some(v6)) => SocketAddr::from((Ipv6Addr::from(v6), port)),
        _ => SocketAddr::from((Ipv4Addr::from(v4), port)),
    };
    let own = address(sock.saddr, sock.saddr6, sock.sport);
    let peer_port = u16::from_be_bytes(sock.dport);
    match (sock.state == LISTEN, peer_port) {
        (true, _) => format!("{protocol} socket listening at {own}"),
        (false, 0) => format!("{protocol} socket at {own}"),
        (false, port) => {
            format!("{protocol} connection from {own} to {}", address(sock.daddr, sock.daddr6, port))
        }
    }
}
