//! Netlink sockets.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use snapshot::NetlinkSocket;

use crate::socket;

const NETLINK_ADD_MEMBERSHIP: i32 = 1;

fn say(what: &'static str) -> impl Fn(Errno) -> String {
    move |e| format!("{what}: {e}")
}

/// Makes one.
pub(crate) fn restore(state: &NetlinkSocket) -> Result<OwnedFd, String> {
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    let fd = unsafe {
        let fd = libc::socket(libc::AF_NETLINK, state.kind | libc::SOCK_CLOEXEC, state.protocol);
        OwnedFd::from_raw_fd(Errno::result(fd).map_err(say("socket"))?)
    };
    let raw = fd.as_raw_fd();
    // Before it hears of anything.
    socket::set_options(raw, &state.options)?;
    socket::set_protocol_options(raw, &state.protocol_options)?;
    if let Some(port) = state.port {
        with_address(raw, libc::bind, port, 0).map_err(|e| format!("bind to port {port}: {e}"))?;
    }
    for group in &state.groups {
        socket::set_option(raw, libc::SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, *group as i32)
            .map_err(|e| format!("join group {group}: {e}"))?;
    }
    if let Some((port, group)) = state.peer {
        // An address has a set of groups, of which the lowest one counts.
        let groups = if (1..=32).contains(&group) { 1 << (group - 1) } else { 0 };
        with_address(raw, libc::connect, port, groups).map_err(say("connect"))?;
    }
    Ok(fd)
}

type Call = unsafe extern "C" fn(RawFd, *const libc::sockaddr, u32) -> i32;

fn with_address(fd: RawFd, call: Call, port: u32, groups: u32) -> Result<(), Errno> {
    // SAFETY: an all-zero address is valid, and the kernel reads it.
    let r = unsafe {
        let mut address: libc::sockaddr_nl = std::mem::zeroed();
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_pid = port;
        address.nl_groups = groups;
        call(fd, (&raw const address).cast(), size_of_val(&address) as u32)
    };
    Errno::result(r).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::SocketOptions;

    #[test]
    fn port_and_groups_are_as_they_were() {
        let state = NetlinkSocket {
            kind: libc::SOCK_RAW,
            protocol: libc::NETLINK_ROUTE,
            port: Some(4_000_000_017),
            groups: vec![1, 5],
            peer: None,
            unread: 0,
            error: 0,
            options: SocketOptions { peek_offset: -1, receive_low_water: 1, ..SocketOptions::default() },
            protocol_options: vec![],
            unsupported: None,
        };
        let fd = restore(&state).unwrap();
        // SAFETY: the kernel writes an address.
        let address = unsafe {
            let mut address: libc::sockaddr_nl = std::mem::zeroed();
            let mut len = size_of_val(&address) as u32;
            libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &mut len);
            address
        };
        assert_eq!((address.nl_pid, address.nl_groups), (4_000_000_017, 0b10001));
        // It is taken now.
        assert!(restore(&state).unwrap_err().contains("bind"));
    }
}
