//! Sockets at a glance: what ss(8) shows.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use ktypes::KernelType;
use serde::Serialize;
use snapshot::{Bytes, Pid, Severity, unix_name};

use super::{AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, AF_VSOCK, IPPROTO_TCP, IPPROTO_UDP};
use crate::Autopsy;
use crate::error::Result;
use crate::file::File;

// include/net/tcp_states.h: also used by sockets that know nothing of TCP.
const TCP_LISTEN: u8 = 10;
pub(crate) const STATES: [&str; 14] = [
    "-",
    "ESTAB",
    "SYN-SENT",
    "SYN-RECV",
    "FIN-WAIT-1",
    "FIN-WAIT-2",
    "TIME-WAIT",
    "UNCONN",
    "CLOSE-WAIT",
    "LAST-ACK",
    "LISTEN",
    "CLOSING",
    "NEW-SYN-RECV",
    "BOUND",
];
/// What `inode.i_mode` says of sockets.
const S_IFSOCK: u16 = 0o140_000;
/// NETLINK_* by number (include/uapi/linux/netlink.h); the gaps are no longer in use.
const NETLINK: [(u16, &str); 12] = [
    (0, "route"),
    (2, "usersock"),
    (4, "sock_diag"),
    (6, "xfrm"),
    (7, "selinux"),
    (8, "iscsi"),
    (9, "audit"),
    (10, "fiblookup"),
    (11, "connector"),
    (12, "netfilter"),
    (15, "uevent"),
    (16, "generic"),
];

#[derive(KernelType)]
#[kernel("socket")]
struct Socket {
    sk: u64,
}

#[derive(KernelType)]
#[kernel("sock")]
struct Sock {
    #[kernel("__sk_common.skc_family")]
    family: u16,
    #[kernel("__sk_common.skc_state")]
    state: u8,
    #[kernel("__sk_common.skc_net.net")]
    net: u64,
    sk_type: u16,
    sk_protocol: u16,
    sk_uid: u32,
    #[kernel("sk_backlog.rmem_alloc.counter")]
    received: i32,
    /// One more than there are bytes on their way.
    #[kernel("sk_wmem_alloc.refs.counter")]
    sent: i32,
    #[kernel("sk_receive_queue.qlen")]
    queued: u32,
    sk_ack_backlog: u32,
    sk_max_ack_backlog: u32,
}

#[derive(KernelType)]
#[kernel("tcp_sock")]
struct Tcp {
    rcv_nxt: u32,
    copied_seq: u32,
    write_seq: u32,
    snd_una: u32,
}

#[derive(KernelType)]
#[kernel("udp_sock")]
struct Udp {
    /// What its reader has taken off the queue and not off the count.
    forward_deficit: i32,
}

#[derive(KernelType)]
#[kernel("netlink_sock")]
struct Netlink {
    portid: u32,
    dst_portid: u32,
    dst_group: u32,
}

#[derive(KernelType)]
#[kernel("packet_sock")]
struct Packet {
    ifindex: i32,
    /// In network order.
    num: [u8; 2],
}

/// Which program has a socket, and as what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SocketHolder {
    #[allow(missing_docs)]
    pub pid: Pid,
    /// The name of its main thread.
    pub comm: Bytes,
    /// Descriptor.
    pub fd: i32,
}

/// A socket that a program has open, as ss(8) shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SocketSummary {
    /// `unix`, `inet`, `inet6`, `netlink`, `packet`, `vsock`, or `family N`.
    pub family: String,
    /// `stream`, `dgram`, `raw`, `seqpacket`, or `type N`.
    pub kind: String,
    /// `tcp`, `udp`, a netlink protocol's name, or the number; empty for unix.
    pub protocol: String,
    /// As ss(8) names it: `ESTAB`, `LISTEN`, `UNCONN` …
    pub state: String,
    /// Bytes that nobody has read; connections that nobody has accepted.
    pub receive_queue: u64,
    /// Bytes that are on their way (TCP: not acknowledged); the backlog of who listens.
    pub send_queue: u64,
    /// Its own address; empty for none.
    pub local: String,
    /// Whom it is connected to: an address, or `socket:[N]` for a socket without name; empty for nobody.
    pub peer: String,
    /// Inode number, as in /proc/net and in `socket:[N]`.
    pub inode: u64,
    #[allow(missing_docs)]
    pub uid: u32,
    /// Number of its network namespace; `None`: the initial one.
    pub net_namespace: Option<u32>,
    /// Who has it open.
    pub holders: Vec<SocketHolder>,
}

impl Autopsy<'_> {
    /// The sockets that programs had open, by family, protocol and inode number. One that is damaged is left out, and a finding says so.
    ///
    /// Sockets that no program has open are not among them: the kernel's own, connections that wait to be accepted or are over.
    ///
    /// # Errors
    /// When neither the task list nor the PID table can be read.
    pub fn socket_summaries(&self) -> Result<Vec<SocketSummary>> {
        let mut sockets: BTreeMap<u64, Option<SocketSummary>> = BTreeMap::new();
        let (mut tables, mut comm) = (Vec::new(), Bytes::default());
        for member in self.all_threads()? {
            let task = &member.task;
            if task.pid == task.tgid {
                comm = task.name();
            }
            let key = (task.tgid, task.files);
            if task.is_kernel_thread() || task.files == 0 || tables.last() == Some(&key) {
                continue;
            }
            tables.push(key);
            let before = self.set_subject(Some(task.tgid));
            let descriptors = self.descriptor_table(task.files).unwrap_or_else(|error| {
                self.find(Severity::Broken, "file", format!("its descriptors cannot be read: {error}"));
                Vec::new()
            });
            for descriptor in descriptors {
                match self.socket_of(descriptor.file.0) {
                    Ok(None) => {}
                    Ok(Some((socket, inode))) => {
                        let holder = SocketHolder { pid: task.tgid, comm: comm.clone(), fd: descriptor.fd };
                        let known = match sockets.entry(socket) {
                            Entry::Occupied(known) => known.into_mut(),
                            Entry::Vacant(new) => new.insert(self.read_summary(socket, inode, descriptor.fd)),
                        };
                        if let Some(known) = known
                            && !known.holders.contains(&holder)
                        {
                            known.holders.push(holder);
                        }
                    }
                    Err(error) => {
                        let text = format!("descriptor {} cannot be read: {error}", descriptor.fd);
                        self.find(Severity::Broken, "file", text);
                    }
                }
            }
            self.set_subject(before);
        }
        let mut all: Vec<SocketSummary> = sockets.into_values().flatten().collect();
        all.sort_by(|a, b| (&a.family, &a.protocol, a.inode).cmp(&(&b.family, &b.protocol, b.inode)));
        Ok(all)
    }

    /// The `socket` behind an open file, and its inode's number; `None` if the file is something else.
    fn socket_of(&self, file: u64) -> Result<Option<(u64, u64)>> {
        let file: File = self.kernel.read(file)?;
        let mode =
            self.kernel.read_u16(file.f_inode.wrapping_add(self.kernel.offset_of("inode", "i_mode")?))?;
        // The path of a unix socket in the file system has an inode of this type too, but no `socket`.
        if mode & 0o170_000 != S_IFSOCK || self.kernel.symbol_at(file.f_op) != Some("socket_file_ops") {
            return Ok(None);
        }
        let ino =
            self.kernel.read_u64(file.f_inode.wrapping_add(self.kernel.offset_of("inode", "i_ino")?))?;
        Ok(Some((file.private_data, ino)))
    }

    fn read_summary(&self, socket: u64, inode: u64, fd: i32) -> Option<SocketSummary> {
        self.socket_summary(socket, inode).unwrap_or_else(|error| {
            self.find(Severity::Broken, "socket", format!("descriptor {fd}: a socket is lost: {error}"));
            None
        })
    }

    /// `Ok(None)` for one that is closing, of which nothing is left.
    fn socket_summary(&self, addr: u64, inode: u64) -> Result<Option<SocketSummary>> {
        let kernel = self.kernel;
        let addr = kernel.read::<Socket>(addr)?.sk;
        if addr == 0 {
            return Ok(None);
        }
        let sock: Sock = kernel.read(addr)?;
        let listens = sock.state == TCP_LISTEN;
        let (mut received, mut sent) = (
            u64::try_from(sock.received).unwrap_or(0),
            u64::try_from(sock.sent).unwrap_or(0).saturating_sub(1),
        );
        let (mut local, mut peer, mut protocol) =
            (String::new(), String::new(), sock.sk_protocol.to_string());
        match sock.family {
            AF_UNIX => {
                let (name, other) = self.unix_names(addr)?;
                local = name.as_ref().map(unix_name).unwrap_or_default();
                if let Some(other) = other {
                    peer = match self.unix_names(other)?.0 {
                        Some(name) => unix_name(&name),
                        None => format!("socket:[{}]", self.unix_inode(other)?),
                    };
                }
                protocol.clear();
                received = if listens { sock.queued.into() } else { self.unix_unread(addr)? };
            }
            AF_INET | AF_INET6 => {
                let (own, other) = self.inet_addresses(addr)?;
                local = own.to_string();
                peer = other.map(|address| address.to_string()).unwrap_or_default();
                match sock.sk_protocol {
                    IPPROTO_TCP => {
                        "tcp".clone_into(&mut protocol);
                        let tcp: Tcp = kernel.read(addr)?;
                        // Sequence numbers go round.
                        let pending = |end: u32, start: u32| (end.wrapping_sub(start) as i32).max(0) as u64;
                        received = pending(tcp.rcv_nxt, tcp.copied_seq);
                        sent = pending(tcp.write_seq, tcp.snd_una);
                        if listens {
                            received = sock.sk_ack_backlog.into();
                        }
                    }
                    IPPROTO_UDP => {
                        "udp".clone_into(&mut protocol);
                        let deficit = kernel.read::<Udp>(addr)?.forward_deficit;
                        received = u64::try_from(sock.received.saturating_sub(deficit)).unwrap_or(0);
                    }
                    1 | 58 => "icmp".clone_into(&mut protocol),
                    _ => {}
                }
            }
            AF_NETLINK => {
                let netlink: Netlink = kernel.read(addr)?;
                if let Some((_, name)) = NETLINK.iter().find(|(number, _)| *number == sock.sk_protocol) {
                    (*name).clone_into(&mut protocol);
                }
                local = netlink.portid.to_string();
                if (netlink.dst_portid, netlink.dst_group) != (0, 0) {
                    peer = format!("{} group {}", netlink.dst_portid, netlink.dst_group);
                }
            }
            AF_PACKET if kernel.has_type("packet_sock") => {
                let packet: Packet = kernel.read(addr)?;
                protocol = format!("{:#06x}", u16::from_be_bytes(packet.num));
                if packet.ifindex != 0 {
                    local = format!("interface {}", packet.ifindex);
                }
            }
            _ => {}
        }
        if listens {
            sent = sock.sk_max_ack_backlog.into();
        }
        Ok(Some(SocketSummary {
            family: match sock.family {
                AF_UNIX => "unix".into(),
                AF_INET => "inet".into(),
                AF_INET6 => "inet6".into(),
                AF_NETLINK => "netlink".into(),
                AF_PACKET => "packet".into(),
                AF_VSOCK => "vsock".into(),
                other => format!("family {other}"),
            },
            kind: match sock.sk_type {
                1 => "stream".into(),
                2 => "dgram".into(),
                3 => "raw".into(),
                5 => "seqpacket".into(),
                other => format!("type {other}"),
            },
            protocol,
            state: STATES
                .get(usize::from(sock.state))
                .map_or_else(|| format!("state {}", sock.state), |s| (*s).to_owned()),
            receive_queue: received,
            send_queue: sent,
            local,
            peer,
            inode,
            uid: sock.sk_uid,
            net_namespace: self.net_namespace(sock.net)?,
            holders: Vec::new(),
        }))
    }

    /// The number of a network namespace; `None` for the initial one.
    fn net_namespace(&self, addr: u64) -> Result<Option<u32>> {
        if addr == self.kernel.symbol("init_net")? {
            return Ok(None);
        }
        Ok(Some(self.kernel.read_u32(addr.wrapping_add(self.kernel.offset_of("net", "ns.inum")?))?))
    }
}
