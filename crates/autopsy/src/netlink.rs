//! Netlink sockets: `netlink_sock` (net/netlink/af_netlink.h, af_netlink.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{NetlinkSocket, ProtocolOption};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// Groups of one protocol; the kernel's have some dozens, generic netlink hands them out as needed.
const MAX_GROUPS: u32 = 1 << 16;
const SOL_NETLINK: i32 = 270;

#[derive(KernelType)]
#[kernel("netlink_sock")]
struct Netlink {
    flags: u64,
    portid: u32,
    dst_portid: u32,
    dst_group: u32,
    ngroups: u32,
    groups: u64,
    bound: bool,
    cb_running: bool,
    #[kernel("sk.sk_type")]
    kind: u16,
    #[kernel("sk.sk_protocol")]
    protocol: u16,
    #[kernel("sk.sk_receive_queue.qlen")]
    unread: u32,
    #[kernel("sk.sk_err")]
    error: i32,
}

impl Autopsy<'_> {
    /// `addr`: of the `netlink_sock`; `flags`: of its `socket`.
    pub(crate) fn netlink(&self, addr: u64, flags: u64) -> Result<NetlinkSocket> {
        let sock: Netlink = self.kernel.read(addr)?;
        let (options, mut unsupported) = self.socket_options(addr, flags)?;
        if sock.cb_running {
            unsupported = Some("the kernel was giving it a list: not brought back by this version".into());
        }
        // The bits' numbers (enum in af_netlink.h, the same in both), and the options that set them.
        let known = [
            ("NETLINK_PKTINFO", "NETLINK_F_RECV_PKTINFO", 1, 3),
            ("NETLINK_BROADCAST_ERROR", "NETLINK_F_BROADCAST_SEND_ERROR", 2, 4),
            ("NETLINK_NO_ENOBUFS", "NETLINK_F_RECV_NO_ENOBUFS", 3, 5),
            ("NETLINK_LISTEN_ALL_NSID", "NETLINK_F_LISTEN_ALL_NSID", 4, 8),
            ("NETLINK_CAP_ACK", "NETLINK_F_CAP_ACK", 5, 10),
            ("NETLINK_EXT_ACK", "NETLINK_F_EXT_ACK", 6, 11),
            ("NETLINK_GET_STRICT_CHK", "NETLINK_F_STRICT_CHK", 7, 12),
        ];
        let protocol_options = known.map(|(name, bit, documented, option)| {
            let on = sock.flags >> (self.enumerator(bit, documented) & 63) & 1;
            ProtocolOption { name: name.into(), level: SOL_NETLINK, option, value: on as i32 }
        });
        Ok(NetlinkSocket {
            kind: sock.kind.into(),
            protocol: sock.protocol.into(),
            port: sock.bound.then_some(sock.portid),
            groups: self.netlink_groups(addr, &sock)?,
            peer: (sock.dst_portid != 0 || sock.dst_group != 0).then_some((sock.dst_portid, sock.dst_group)),
            unread: sock.unread,
            error: sock.error,
            options,
            protocol_options: protocol_options.into(),
            unsupported,
        })
    }

    fn netlink_groups(&self, addr: u64, sock: &Netlink) -> Result<Vec<u32>> {
        if sock.groups == 0 {
            return Ok(vec![]);
        }
        if sock.ngroups > MAX_GROUPS {
            return Err(corrupt("netlink_sock", addr, format!("{} groups", sock.ngroups)));
        }
        let words = self.kernel.read_bytes(sock.groups, sock.ngroups.div_ceil(64) as usize * 8)?;
        let is_member =
            |bit: &u32| words.get(*bit as usize / 8).is_some_and(|byte| byte >> (bit % 8) & 1 != 0);
        Ok((0..sock.ngroups).filter(is_member).map(|bit| bit + 1).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::Synth;

    #[test]
    fn groups_are_the_bits_of_their_map() {
        let mut synth = Synth::new();
        declare::<Netlink>(&mut synth, &[]);
        let addr = synth.alloc("netlink_sock");
        let map = synth.alloc("netlink_sock");
        synth.write_u64(map, 1 << 5 | 1);
        let kernel = open(&synth);
        let autopsy = Autopsy::new(&kernel);
        let mut sock: Netlink = kernel.read(addr).unwrap();
        assert_eq!(autopsy.netlink_groups(addr, &sock).unwrap(), [] as [u32; 0]);
        (sock.groups, sock.ngroups) = (map, 32);
        assert_eq!(autopsy.netlink_groups(addr, &sock).unwrap(), [1, 6]);
        sock.ngroups = u32::MAX;
        assert!(autopsy.netlink_groups(addr, &sock).is_err());
    }
}
