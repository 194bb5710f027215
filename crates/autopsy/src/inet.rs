//! TCP and UDP sockets: `inet_sock`, `inet_connection_sock`, `tcp_sock`, `udp_sock`, `ipv6_pinfo` (include/net/inet_sock.h,
//! inet_connection_sock.h, request_sock.h, linux/tcp.h, udp.h, ipv6.h; net/ipv4/, net/ipv6/; 6.1 and 6.12).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use ktypes::KernelType;
use snapshot::{InetProtocol, InetSocket, InetState, ProtocolOption};

use crate::Autopsy;
use crate::error::{Result, Visited, corrupt};
use crate::socket::{AF_INET, AF_INET6};

/// Connections that wait to be accepted, and messages; backlogs and buffers are smaller.
const MAX_QUEUE: usize = 1 << 20;

const SOCK_STREAM: u16 = 1;
// include/net/tcp_states.h
const TCP_CLOSE: u8 = 7;
const TCP_LISTEN: u8 = 10;
/// sock.sk_userlocks: bind(2) chose the address.
const SOCK_BINDADDR_LOCK: u8 = 4;
/// The loopback device's index.
const LOOPBACK: i32 = 1;
/// The longest time that TCP waits before it sends again (TCP_RTO_MAX), seconds.
const RTO_MAX: u32 = 120;

// Levels.
const SOL_IP: i32 = 0;
const SOL_SOCKET: i32 = 1;
const SOL_TCP: i32 = 6;
const SOL_UDP: i32 = 17;
const SOL_IPV6: i32 = 41;

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
    #[kernel("__sk_common.skc_ipv6only")]
    v6only: bool,
    #[kernel("__sk_common.skc_bound_dev_if")]
    bound_device: i32,
    #[kernel("sk_receive_queue.qlen")]
    received: u32,
    #[kernel("sk_write_queue.qlen")]
    corked: u32,
    sk_type: u16,
    sk_shutdown: u8,
    sk_userlocks: u8,
    sk_err: i32,
    sk_max_ack_backlog: u32,
    sk_no_check_tx: bool,
    sk_uid: u32,
}

#[derive(KernelType)]
#[kernel("inet_sock")]
struct Inet {
    /// Since 6.7.
    #[kernel(optional)]
    inet_flags: Option<u64>,
    /// Until then.
    #[kernel(optional)]
    cmsg_flags: Option<u16>,
    #[kernel(optional)]
    recverr: Option<bool>,
    #[kernel(optional)]
    freebind: Option<bool>,
    #[kernel(optional)]
    transparent: Option<bool>,
    #[kernel(optional)]
    mc_loop: Option<bool>,
    #[kernel(optional)]
    mc_all: Option<bool>,
    #[kernel(optional)]
    bind_address_no_port: Option<bool>,
    uc_ttl: i16,
    tos: u8,
    min_ttl: u8,
    mc_ttl: u8,
    pmtudisc: u8,
    inet_opt: u64,
    uc_index: i32,
    mc_index: i32,
    mc_list: u64,
    pinet6: u64,
}

#[derive(KernelType)]
#[kernel("ipv6_pinfo")]
struct Inet6 {
    // Nine bits in 6.1.
    hop_limit: u16,
    pmtudisc: u8,
    tclass: u8,
    min_hopcount: u8,
    #[kernel("rxopt.bits.rxinfo")]
    rxinfo: bool,
    #[kernel("rxopt.bits.rxhlim")]
    rxhlim: bool,
    #[kernel("rxopt.bits.rxtclass")]
    rxtclass: bool,
    #[kernel("rxopt.bits.rxorigdstaddr")]
    rxorigdstaddr: bool,
    #[kernel("rxopt.all")]
    rxopt: u16,
    #[kernel(optional)]
    recverr: Option<bool>,
    #[kernel(optional)]
    dontfrag: Option<bool>,
    #[kernel(optional)]
    mc_all: Option<bool>,
    #[kernel(optional)]
    mc_loop: Option<bool>,
    opt: u64,
    ipv6_mc_list: u64,
    ipv6_ac_list: u64,
}

#[derive(KernelType)]
#[kernel("inet_connection_sock")]
struct Connection {
    #[kernel("icsk_accept_queue.rskq_accept_head")]
    accept_head: u64,
    #[kernel("icsk_accept_queue.rskq_defer_accept")]
    defer_accept: u8,
    #[kernel("icsk_accept_queue.fastopenq.max_qlen")]
    fastopen: i32,
    icsk_ca_ops: u64,
    icsk_ca_setsockopt: bool,
    icsk_ulp_ops: u64,
    icsk_syn_retries: u8,
    icsk_user_timeout: u32,
}

#[derive(KernelType)]
#[kernel("tcp_sock")]
struct Tcp {
    nonagle: u8,
    keepalive_time: u32,
    keepalive_intvl: u32,
    keepalive_probes: u8,
    linger2: i32,
    notsent_lowat: u32,
    #[kernel("rx_opt.user_mss")]
    user_mss: u16,
    save_syn: u8,
    thin_lto: bool,
    recvmsg_inq: bool,
    fastopen_connect: bool,
    repair: bool,
    #[kernel(optional)]
    md5sig_info: Option<u64>,
}

#[derive(KernelType)]
#[kernel("udp_sock")]
struct Udp {
    encap_type: u8,
    gso_size: u16,
    #[kernel("reader_queue.qlen")]
    read_ahead: u32,
}

#[derive(KernelType)]
#[kernel("request_sock")]
struct Request {
    dl_next: u64,
    sk: u64,
}

#[derive(KernelType)]
#[kernel("tcp_congestion_ops")]
struct CongestionOps {
    name: [u8; 16],
}

impl Sock {
    fn address(&self, v4: [u8; 4], v6: Option<[u8; 16]>, port: u16) -> SocketAddr {
        match (self.family, v6) {
            (AF_INET6, Some(v6)) => {
                let ip = Ipv6Addr::from(v6);
                let scope = if ip.is_unicast_link_local() { self.bound_device as u32 } else { 0 };
                SocketAddrV6::new(ip, port, 0, scope).into()
            }
            _ => (Ipv4Addr::from(v4), port).into(),
        }
    }

    fn local(&self) -> SocketAddr {
        self.address(self.saddr, self.saddr6, self.sport)
    }

    fn peer(&self) -> Option<SocketAddr> {
        let port = u16::from_be_bytes(self.dport);
        (port != 0).then(|| self.address(self.daddr, self.daddr6, port))
    }
}

fn option(name: &str, level: i32, option: i32, value: impl Into<i64>) -> ProtocolOption {
    ProtocolOption { name: name.into(), level, option, value: value.into() as i32 }
}

/// TCP_DEFER_ACCEPT in seconds, from the number of answers that are sent again (retrans_to_secs(), net/ipv4/tcp.c).
fn deferred_seconds(retransmissions: u8) -> u32 {
    let mut timeout = 1u32;
    (0..retransmissions).fold(0u32, |sum, _| {
        let period = timeout;
        timeout = (timeout * 2).min(RTO_MAX);
        sum.saturating_add(period)
    })
}

impl Autopsy<'_> {
    /// The own address of any Internet socket, and the one that it is connected to. `addr`: of its `sock`.
    pub(crate) fn inet_addresses(&self, addr: u64) -> Result<(SocketAddr, Option<SocketAddr>)> {
        let sock: Sock = self.kernel.read(addr)?;
        Ok((sock.local(), sock.peer()))
    }

    /// `addr`: of the `sock` of a TCP or UDP socket; `flags`: of its `socket`.
    pub(crate) fn inet(&self, addr: u64, flags: u64) -> Result<InetSocket> {
        let sock: Sock = self.kernel.read(addr)?;
        let protocol = if sock.sk_type == SOCK_STREAM { InetProtocol::Tcp } else { InetProtocol::Udp };
        let (options, mut unsupported) = self.socket_options(addr, flags)?;
        let mut protocol_options = self.ip_options(addr, &sock, &mut unsupported)?;
        let (mut congestion_control, mut unread) = (None, 0);
        let state = match protocol {
            InetProtocol::Tcp => {
                let connection: Connection = self.kernel.read(addr)?;
                protocol_options.extend(self.tcp_options(addr, &connection, &mut unsupported)?);
                if connection.icsk_ca_setsockopt {
                    let ops: CongestionOps = self.kernel.read(connection.icsk_ca_ops)?;
                    let name = ops.name.split(|byte| *byte == 0).next().unwrap_or_default();
                    congestion_control = Some(String::from_utf8_lossy(name).into_owned());
                }
                match (sock.state, sock.peer()) {
                    (TCP_LISTEN, _) => InetState::Listening {
                        backlog: sock.sk_max_ack_backlog,
                        waiting: self.waiting(connection.accept_head)?,
                    },
                    (TCP_CLOSE, _) if sock.sk_shutdown != 0 && sock.received > 0 => {
                        unsupported.get_or_insert_with(|| {
                            "its connection is over, with data that nobody has read: not brought back by this version".into()
                        });
                        InetState::Over
                    }
                    (TCP_CLOSE, _) if sock.sk_shutdown != 0 => InetState::Over,
                    (TCP_CLOSE, _) => InetState::Idle,
                    (_, Some(peer)) => InetState::Connected { peer },
                    (state, None) => {
                        return Err(corrupt("tcp_sock", addr, format!("is in state {state} with nobody")));
                    }
                }
            }
            InetProtocol::Udp => {
                let udp: Udp = self.kernel.read(addr)?;
                unread = sock.received.saturating_add(udp.read_ahead).min(MAX_QUEUE as u32);
                if udp.encap_type != 0 {
                    unsupported =
                        Some("it carries a tunnel (UDP_ENCAP): not brought back by this version".into());
                }
                if sock.corked > 0 {
                    unsupported =
                        Some("it holds half a message (UDP_CORK): not brought back by this version".into());
                }
                protocol_options.push(option("UDP_SEGMENT", SOL_UDP, 103, udp.gso_size));
                match sock.peer() {
                    Some(peer) => InetState::Connected { peer },
                    None => InetState::Idle,
                }
            }
        };
        Ok(InetSocket {
            v6: sock.family == AF_INET6,
            protocol,
            uid: sock.sk_uid,
            local: sock.local(),
            address_is_bound: sock.sk_userlocks & SOCK_BINDADDR_LOCK != 0,
            state,
            error: sock.sk_err,
            unread,
            options,
            protocol_options,
            congestion_control,
            unsupported,
        })
    }

    /// Whom the connections come from that nobody has accepted.
    fn waiting(&self, mut request: u64) -> Result<Vec<SocketAddr>> {
        let mut waiting = Vec::new();
        let mut visited = Visited::default();
        while request != 0 {
            visited.visit("request_sock", request)?;
            if waiting.len() >= MAX_QUEUE {
                return Err(corrupt("request_sock", request, "the queue does not end"));
            }
            let entry: Request = self.kernel.read(request)?;
            let sock: Sock = self.kernel.read(entry.sk)?;
            waiting.push(sock.peer().unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, 0).into()));
            request = entry.dl_next;
        }
        Ok(waiting)
    }

    /// Options of IP and IPv6 (and one of SOL_SOCKET that only these have).
    fn ip_options(
        &self,
        addr: u64,
        sock: &Sock,
        unsupported: &mut Option<String>,
    ) -> Result<Vec<ProtocolOption>> {
        let inet: Inet = self.kernel.read(addr)?;
        let mut lacks = |what: &str| {
            unsupported.get_or_insert_with(|| format!("{what}: not brought back by this version"));
        };
        if !matches!(sock.bound_device, 0 | LOOPBACK) {
            lacks("it is bound to a network interface (SO_BINDTODEVICE)");
        }
        if inet.mc_list != 0 {
            lacks("it is a member of a multicast group");
        }
        if inet.inet_opt != 0 {
            lacks("it has IP options");
        }
        if inet.uc_index != 0 || !matches!(inet.mc_index, 0 | LOOPBACK) {
            lacks("an interface is chosen for what it sends");
        }
        let word = inet.inet_flags.unwrap_or(0);
        // enum in include/net/inet_sock.h, since 6.7.
        let flag = |older: Option<bool>, name: &str, documented| {
            older.unwrap_or_else(|| word >> (self.enumerator(name, documented) & 63) & 1 != 0)
        };
        // The lowest bits are the same in both (IP_CMSG_PKTINFO …).
        let message = |bit: u32| (u64::from(inet.cmsg_flags.unwrap_or(0)) | word) >> bit & 1 != 0;
        let mut options = vec![
            option("SO_BINDTOIFINDEX", SOL_SOCKET, 62, sock.bound_device),
            option("SO_NO_CHECK", SOL_SOCKET, 11, sock.sk_no_check_tx),
            option("IP_TOS", SOL_IP, 1, inet.tos),
            option("IP_TTL", SOL_IP, 2, inet.uc_ttl),
            option("IP_RECVOPTS", SOL_IP, 6, message(3)),
            option("IP_RETOPTS", SOL_IP, 7, message(4)),
            option("IP_PKTINFO", SOL_IP, 8, message(0)),
            option("IP_MTU_DISCOVER", SOL_IP, 10, inet.pmtudisc),
            option("IP_RECVERR", SOL_IP, 11, flag(inet.recverr, "INET_FLAGS_RECVERR", 9)),
            option("IP_RECVTTL", SOL_IP, 12, message(1)),
            option("IP_RECVTOS", SOL_IP, 13, message(2)),
            option("IP_FREEBIND", SOL_IP, 15, flag(inet.freebind, "INET_FLAGS_FREEBIND", 11)),
            option("IP_TRANSPARENT", SOL_IP, 19, flag(inet.transparent, "INET_FLAGS_TRANSPARENT", 15)),
            option("IP_RECVORIGDSTADDR", SOL_IP, 20, message(6)),
            option("IP_MINTTL", SOL_IP, 21, inet.min_ttl),
            option(
                "IP_BIND_ADDRESS_NO_PORT",
                SOL_IP,
                24,
                flag(inet.bind_address_no_port, "INET_FLAGS_BIND_ADDRESS_NO_PORT", 18),
            ),
            option("IP_MULTICAST_TTL", SOL_IP, 33, inet.mc_ttl),
            option("IP_MULTICAST_LOOP", SOL_IP, 34, flag(inet.mc_loop, "INET_FLAGS_MC_LOOP", 13)),
            option("IP_MULTICAST_ALL", SOL_IP, 49, flag(inet.mc_all, "INET_FLAGS_MC_ALL", 14)),
        ];
        if sock.family == AF_INET {
            return Ok(options);
        }
        let inet6: Inet6 = self.kernel.read(inet.pinet6)?;
        if inet6.ipv6_mc_list != 0 || inet6.ipv6_ac_list != 0 {
            lacks("it is a member of a multicast or anycast group");
        }
        if inet6.opt != 0 {
            lacks("it has IPv6 options");
        }
        let known = [inet6.rxinfo, inet6.rxhlim, inet6.rxtclass, inet6.rxorigdstaddr];
        if inet6.rxopt.count_ones() as usize > known.iter().filter(|on| **on).count() {
            lacks("it receives unusual IPv6 headers");
        }
        options.extend([
            option("IPV6_UNICAST_HOPS", SOL_IPV6, 16, ((inet6.hop_limit << 7) as i16) >> 7),
            option("IPV6_MULTICAST_LOOP", SOL_IPV6, 19, flag(inet6.mc_loop, "INET_FLAGS_MC6_LOOP", 20)),
            option("IPV6_MTU_DISCOVER", SOL_IPV6, 23, inet6.pmtudisc),
            option("IPV6_RECVERR", SOL_IPV6, 25, flag(inet6.recverr, "INET_FLAGS_RECVERR6", 26)),
            option("IPV6_V6ONLY", SOL_IPV6, 26, sock.v6only),
            option("IPV6_MULTICAST_ALL", SOL_IPV6, 29, flag(inet6.mc_all, "INET_FLAGS_MC6_ALL", 22)),
            option("IPV6_RECVPKTINFO", SOL_IPV6, 49, inet6.rxinfo),
            option("IPV6_RECVHOPLIMIT", SOL_IPV6, 51, inet6.rxhlim),
            option("IPV6_DONTFRAG", SOL_IPV6, 62, flag(inet6.dontfrag, "INET_FLAGS_DONTFRAG", 25)),
            option("IPV6_RECVTCLASS", SOL_IPV6, 66, inet6.rxtclass),
            option("IPV6_TCLASS", SOL_IPV6, 67, inet6.tclass),
            option("IPV6_MINHOPCOUNT", SOL_IPV6, 73, inet6.min_hopcount),
            option("IPV6_RECVORIGDSTADDR", SOL_IPV6, 74, inet6.rxorigdstaddr),
        ]);
        Ok(options)
    }

    fn tcp_options(
        &self,
        addr: u64,
        connection: &Connection,
        unsupported: &mut Option<String>,
    ) -> Result<Vec<ProtocolOption>> {
        let tcp: Tcp = self.kernel.read(addr)?;
        let mut lacks = |what: &str| {
            unsupported.get_or_insert_with(|| format!("{what}: not brought back by this version"));
        };
        if tcp.md5sig_info.is_some_and(|keys| keys != 0) {
            lacks("it has keys to sign with (TCP_MD5SIG)");
        }
        if connection.icsk_ulp_ops != 0 {
            lacks("another protocol is layered on it (TCP_ULP)");
        }
        if tcp.repair {
            lacks("it is being repaired (TCP_REPAIR)");
        }
        let seconds = |jiffies: u64| -> Result<i64> {
            Ok((jiffies.saturating_mul(self.tick_us()?) / 1_000_000).min(i32::MAX as u64) as i64)
        };
        let linger2 = if tcp.linger2 < 0 { -1 } else { seconds(tcp.linger2 as u64)? };
        let always = [
            option("TCP_NODELAY", SOL_TCP, 1, tcp.nonagle & 1),
            option("TCP_CORK", SOL_TCP, 3, tcp.nonagle >> 1 & 1),
            option("TCP_THIN_LINEAR_TIMEOUTS", SOL_TCP, 16, tcp.thin_lto),
            option("TCP_USER_TIMEOUT", SOL_TCP, 18, connection.icsk_user_timeout),
            option("TCP_SAVE_SYN", SOL_TCP, 27, tcp.save_syn),
            option("TCP_FASTOPEN_CONNECT", SOL_TCP, 30, tcp.fastopen_connect),
            option("TCP_INQ", SOL_TCP, 36, tcp.recvmsg_inq),
        ];
        // 0: what the system's settings say.
        let chosen = [
            option("TCP_MAXSEG", SOL_TCP, 2, tcp.user_mss),
            option("TCP_KEEPIDLE", SOL_TCP, 4, seconds(tcp.keepalive_time.into())?),
            option("TCP_KEEPINTVL", SOL_TCP, 5, seconds(tcp.keepalive_intvl.into())?),
            option("TCP_KEEPCNT", SOL_TCP, 6, tcp.keepalive_probes),
            option("TCP_SYNCNT", SOL_TCP, 7, connection.icsk_syn_retries),
            option("TCP_LINGER2", SOL_TCP, 8, linger2),
            option("TCP_DEFER_ACCEPT", SOL_TCP, 9, deferred_seconds(connection.defer_accept)),
            option("TCP_FASTOPEN", SOL_TCP, 23, connection.fastopen),
            option("TCP_NOTSENT_LOWAT", SOL_TCP, 25, tcp.notsent_lowat),
        ];
        let chosen = chosen.into_iter().filter(|option| option.value != 0);
        Ok(always.into_iter().chain(chosen).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_sent_again_are_seconds() {
        assert_eq!([0, 1, 2, 3, 8, 9].map(deferred_seconds), [0, 1, 3, 7, 247, 367]);
    }
}
