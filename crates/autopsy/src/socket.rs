//! Sockets: which kind one is, what all kinds have in common, and names for those that are not brought back (include/linux/net.h,
//! include/net/sock.h, linux/filter.h; 6.1 and 6.12).

mod summary;

pub(crate) use summary::STATES;
pub use summary::{SocketHolder, SocketSummary};

use ktypes::KernelType;
use snapshot::{FileKind, SocketOptions};

use crate::Autopsy;
use crate::error::{Result, corrupt};

const AF_UNIX: u16 = 1;
pub(crate) const AF_INET: u16 = 2;
pub(crate) const AF_INET6: u16 = 10;
const AF_NETLINK: u16 = 16;
const AF_PACKET: u16 = 17;
const AF_VSOCK: u16 = 40;
const IPPROTO_TCP: u16 = 6;
const IPPROTO_UDP: u16 = 17;
/// MAX_SCHEDULE_TIMEOUT: for ever.
const FOR_EVER: i64 = i64::MAX;
/// BPF_MAXINSNS.
const MAX_INSTRUCTIONS: u16 = 4096;

// Bits of socket.flags (include/linux/net.h).
const SOCK_PASSCRED: u32 = 3;
const SOCK_PASSSEC: u32 = 4;
const SOCK_PASSPIDFD: u32 = 7;
// Bits of sock.sk_userlocks (include/net/sock.h).
const SOCK_SNDBUF_LOCK: u8 = 1;
const SOCK_RCVBUF_LOCK: u8 = 2;

#[derive(KernelType)]
#[kernel("socket")]
struct Socket {
    #[kernel("type")]
    kind: i16,
    flags: u64,
    sk: u64,
}

#[derive(KernelType)]
#[kernel("sock")]
struct Sock {
    #[kernel("__sk_common.skc_family")]
    family: u16,
    sk_protocol: u16,
}

/// What setsockopt(2) sets.
#[derive(KernelType)]
#[kernel("sock")]
struct Options {
    #[kernel("__sk_common.skc_family")]
    family: u16,
    #[kernel("__sk_common.skc_reuse")]
    reuse: u8,
    #[kernel("__sk_common.skc_reuseport")]
    reuse_port: bool,
    #[kernel("__sk_common.skc_flags")]
    flags: u64,
    sk_rcvlowat: i32,
    sk_rcvbuf: i32,
    sk_sndbuf: i32,
    sk_filter: u64,
    sk_peek_off: i32,
    sk_sndtimeo: i64,
    sk_rcvtimeo: i64,
    sk_priority: u32,
    sk_mark: u32,
    sk_lingertime: u64,
    sk_userlocks: u8,
}

#[derive(KernelType)]
#[kernel("sk_filter")]
struct SkFilter {
    prog: u64,
}

#[derive(KernelType)]
#[kernel("bpf_prog")]
struct BpfProg {
    /// What the program was made of, if that was classic BPF.
    orig_prog: u64,
}

#[derive(KernelType)]
#[kernel("sock_fprog_kern")]
struct Program {
    len: u16,
    filter: u64,
}

impl Autopsy<'_> {
    /// The kind of the open file that a socket has; unix sockets' state goes into the table.
    pub(crate) fn socket_kind(&self, addr: u64) -> Result<FileKind> {
        let socket: Socket = self.kernel.read(addr)?;
        if socket.sk != 0 {
            let sock: Sock = self.kernel.read(socket.sk)?;
            match (sock.family, socket.kind, sock.sk_protocol) {
                (AF_UNIX, ..) => return Ok(FileKind::Unix { socket: self.unix(socket.sk)? }),
                (AF_INET | AF_INET6, 1, IPPROTO_TCP) | (AF_INET | AF_INET6, 2, IPPROTO_UDP) => {
                    return Ok(FileKind::Inet(Box::new(self.inet(socket.sk, socket.flags)?)));
                }
                (AF_NETLINK, ..) => {
                    return Ok(FileKind::Netlink(Box::new(self.netlink(socket.sk, socket.flags)?)));
                }
                _ => {}
            }
        }
        Ok(FileKind::Unsupported { what: self.socket_description(&socket)? })
    }

    /// What a socket is, for people.
    fn socket_description(&self, socket: &Socket) -> Result<String> {
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
            AF_INET | AF_INET6 if matches!(sock.sk_protocol, 1 | 58) => format!("{kind} ICMP socket"),
            AF_INET | AF_INET6 => format!("{kind} Internet socket (protocol {})", sock.sk_protocol),
            AF_PACKET => "packet socket".into(),
            AF_VSOCK => "vsock socket".into(),
            other => format!("{kind} socket of address family {other}"),
        })
    }

    /// A bit of `sock.sk_flags` (include/net/sock.h, enum sock_flags).
    pub(crate) fn socket_flag(&self, flags: u64, name: &str, documented: u64) -> bool {
        let bit = self.enumerator(name, documented);
        bit < 64 && flags >> bit & 1 != 0
    }

    /// What is set on level SOL_SOCKET, and what of it is not brought back. `addr`: of the `sock`; `flags`: of its `socket`.
    pub(crate) fn socket_options(&self, addr: u64, flags: u64) -> Result<(SocketOptions, Option<String>)> {
        let sock: Options = self.kernel.read(addr)?;
        let timeout = |jiffies: i64| match jiffies {
            FOR_EVER => Ok(None),
            ticks if ticks >= 0 => Ok(Some((ticks as u64).saturating_mul(self.tick_us()?))),
            ticks => Err(corrupt("sock", addr, format!("a timeout of {ticks} ticks"))),
        };
        let flag = |name, documented| self.socket_flag(sock.flags, name, documented);
        let pass = |bit: u32| flags >> bit & 1 != 0;
        let linger = match flag("SOCK_LINGER", 4) {
            true => {
                Some((sock.sk_lingertime.saturating_mul(self.tick_us()?) / 1_000_000).min(i32::MAX as u64))
            }
            false => None,
        };
        let timestamps = (flag("SOCK_RCVTSTAMP", 11), flag("SOCK_RCVTSTAMPNS", 12));
        // The kernel sizes those of Internet sockets itself until somebody sets them.
        let chosen = |lock: u8| ![AF_INET, AF_INET6].contains(&sock.family) || sock.sk_userlocks & lock != 0;
        let filter = self.socket_filter(sock.sk_filter)?;
        let mut obstacle =
            filter.is_none().then(|| "it has a filter of eBPF: not brought back by this version".to_owned());
        let unusual = [
            ("SOCK_DBG", 10),
            ("SOCK_TIMESTAMPING_RX_SOFTWARE", 15),
            ("SOCK_RXQ_OVFL", 17),
            ("SOCK_ZEROCOPY", 18),
            ("SOCK_SELECT_ERR_QUEUE", 22),
            ("SOCK_TXTIME", 24),
            ("SOCK_TSTAMP_NEW", 26),
            ("SOCK_RCVMARK", 27),
        ];
        if let Some((name, _)) = unusual.iter().find(|(name, documented)| flag(name, *documented)) {
            obstacle =
                Some(format!("an unusual option is set on it ({name}): not brought back by this version"));
        }
        let options = SocketOptions {
            send_buffer: chosen(SOCK_SNDBUF_LOCK).then_some(sock.sk_sndbuf.max(0) as u32),
            receive_buffer: chosen(SOCK_RCVBUF_LOCK).then_some(sock.sk_rcvbuf.max(0) as u32),
            receive_low_water: sock.sk_rcvlowat.max(1) as u32,
            send_timeout_us: timeout(sock.sk_sndtimeo)?,
            receive_timeout_us: timeout(sock.sk_rcvtimeo)?,
            peek_offset: sock.sk_peek_off,
            priority: sock.sk_priority,
            mark: sock.sk_mark,
            linger: linger.map(|seconds| seconds as u32),
            reuse_address: sock.reuse & 0xf != 0,
            reuse_port: sock.reuse_port,
            pass_credentials: pass(SOCK_PASSCRED),
            pass_security: pass(SOCK_PASSSEC),
            pass_pidfd: pass(SOCK_PASSPIDFD),
            keep_alive: flag("SOCK_KEEPOPEN", 3),
            broadcast: flag("SOCK_BROADCAST", 6),
            dont_route: flag("SOCK_LOCALROUTE", 13),
            out_of_band_inline: flag("SOCK_URGINLINE", 2),
            timestamp: timestamps.0 && !timestamps.1,
            timestamp_ns: timestamps.1,
            filter: filter.unwrap_or_default(),
            filter_locked: flag("SOCK_FILTER_LOCKED", 21),
        };
        Ok((options, obstacle))
    }

    /// The instructions of a filter, none for no filter; `None` for one that is not of classic BPF.
    fn socket_filter(&self, addr: u64) -> Result<Option<Vec<u64>>> {
        if addr == 0 {
            return Ok(Some(vec![]));
        }
        let filter: SkFilter = self.kernel.read(addr)?;
        self.classic_bpf(filter.prog)
    }

    /// The instructions that a BPF program was made of; `None` if those were not of classic BPF. `addr`: of the `bpf_prog`.
    pub(crate) fn classic_bpf(&self, addr: u64) -> Result<Option<Vec<u64>>> {
        let prog: BpfProg = self.kernel.read(addr)?;
        if prog.orig_prog == 0 {
            return Ok(None);
        }
        let program: Program = self.kernel.read(prog.orig_prog)?;
        if program.len > MAX_INSTRUCTIONS {
            return Err(corrupt("sock_fprog_kern", prog.orig_prog, format!("{} instructions", program.len)));
        }
        let bytes = self.kernel.read_bytes(program.filter, usize::from(program.len) * 8)?;
        Ok(Some(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()))
    }
}

/// For tests of those who have BPF programs.
#[cfg(test)]
pub(crate) fn declare_programs(synth: &mut synth::Synth) {
    crate::testing::declare::<BpfProg>(synth, &[]);
    crate::testing::declare::<Program>(synth, &[]);
}
