//! Sockets, as far as they are named: none is brought back by this version (include/linux/net.h, include/net/sock.h,
//! af_unix.h; 6.1 and 6.12).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ktypes::KernelType;
use snapshot::Bytes;

use crate::Autopsy;
use crate::error::Result;

const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const AF_NETLINK: u16 = 16;
const AF_PACKET: u16 = 17;
const AF_VSOCK: u16 = 40;
/// TCP_LISTEN (include/net/tcp_states.h), also used by unix sockets.
const LISTEN: u8 = 10;
/// sizeof(struct sockaddr_un).
const MAX_UNIX_ADDRESS: i32 = 110;

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

#[derive(KernelType)]
#[kernel("unix_sock")]
struct UnixSock {
    addr: u64,
    peer: u64,
}

#[derive(KernelType)]
#[kernel("unix_address")]
struct UnixAddress {
    len: i32,
    #[kernel(address)]
    name: u64,
}

impl Autopsy<'_> {
    /// What a socket is and whom it talks to, for people.
    pub(crate) fn socket_description(&self, addr: u64) -> Result<String> {
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
            AF_UNIX => self.unix_description(socket.sk, &sock, kind)?,
            AF_INET | AF_INET6 => inet_description(&sock, kind),
            AF_NETLINK => format!("netlink socket (protocol {})", sock.sk_protocol),
            AF_PACKET => "packet socket".into(),
            AF_VSOCK => "vsock socket".into(),
            other => format!("{kind} socket of address family {other}"),
        })
    }

    fn unix_description(&self, addr: u64, sock: &Sock, kind: &str) -> Result<String> {
        let unix: UnixSock = self.kernel.read(addr)?;
        let own = self.unix_name(unix.addr)?;
        let peer = if unix.peer == 0 {
            None
        } else {
            self.unix_name(self.kernel.read::<UnixSock>(unix.peer)?.addr)?
        };
        let mut text = format!("unix {kind} socket");
        if sock.state == LISTEN {
            text.push_str(", listening");
        }
        if let Some(name) = own {
            text.push_str(&format!(" at {name}"));
        }
        match peer {
            Some(name) => text.push_str(&format!(" connected to {name}")),
            None if unix.peer != 0 => text.push_str(", connected"),
            None => {}
        }
        Ok(text)
    }

    /// The name that a unix socket is bound to; abstract ones begin with `@`.
    fn unix_name(&self, addr: u64) -> Result<Option<Bytes>> {
        if addr == 0 {
            return Ok(None);
        }
        let address: UnixAddress = self.kernel.read(addr)?;
        // The address family comes first.
        let len = address.len.clamp(2, MAX_UNIX_ADDRESS) as usize - 2;
        let mut name = self.kernel.read_bytes(address.name.wrapping_add(2), len)?;
        match name.first_mut() {
            Some(first @ 0) => *first = b'@',
            _ => {
                let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
                name.truncate(end);
            }
        }
        Ok(Some(Bytes(name)))
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
