//! TCP and UDP sockets that do not depend on anybody elsewhere.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockaddrIn, SockaddrIn6};
use snapshot::{InetProtocol, InetSocket, InetState, ProtocolOption};

use crate::socket;

/// Options that decide about who may have an address: set before it is taken.
const BEFORE_BINDING: [&str; 5] =
    ["IPV6_V6ONLY", "IP_TRANSPARENT", "SO_BINDTOIFINDEX", "IP_BIND_ADDRESS_NO_PORT", "IP_FREEBIND"];
const IPV6_FREEBIND: i32 = 78;
/// A reset goes through the loopback device at once, unless the machine is busy.
const PATIENCE: Duration = Duration::from_secs(1);

type Made = Result<OwnedFd, String>;

fn say(what: &'static str) -> impl Fn(Errno) -> String {
    move |e| format!("{what}: {e}")
}

/// Makes one.
pub(crate) fn restore(state: &InetSocket) -> Made {
    bring_up_loopback().map_err(say("bring up the loopback device"))?;
    let fd = match state.state {
        InetState::Over => over(state.v6)?,
        _ => new_socket(state)?,
    };
    let raw = fd.as_raw_fd();
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::fchown(raw, state.uid, u32::MAX) }).map_err(say("set its owner"))?;
    let is_early = |option: &&ProtocolOption| BEFORE_BINDING.contains(&option.name.as_str());
    socket::set_protocol_options(raw, state.protocol_options.iter().filter(is_early))?;
    if !matches!(state.state, InetState::Over) {
        take_address(raw, state)?;
    }
    match &state.state {
        InetState::Listening { backlog, .. } => socket::listen(raw, *backlog).map_err(say("listen"))?,
        InetState::Connected { peer } if state.protocol == InetProtocol::Udp => {
            connect(raw, *peer).map_err(say("connect"))?;
        }
        InetState::Connected { .. } => return Err("a connection".into()),
        InetState::Idle | InetState::Over => {}
    }
    socket::set_options(raw, &state.options)?;
    socket::set_protocol_options(raw, &state.protocol_options)?;
    if let Some(name) = &state.congestion_control {
        set_congestion_control(raw, name).map_err(|e| format!("TCP_CONGESTION ({name}): {e}"))?;
    }
    Ok(fd)
}

fn new_socket(state: &InetSocket) -> Made {
    let family = if state.v6 { libc::AF_INET6 } else { libc::AF_INET };
    let kind = match state.protocol {
        InetProtocol::Tcp => libc::SOCK_STREAM,
        InetProtocol::Udp => libc::SOCK_DGRAM,
    };
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, 0);
        Ok(OwnedFd::from_raw_fd(Errno::result(fd).map_err(say("socket"))?))
    }
}

/// bind(2), also to an address that no interface has yet.
fn take_address(fd: RawFd, state: &InetSocket) -> Result<(), String> {
    let any: SocketAddr = match state.v6 {
        true => (Ipv6Addr::UNSPECIFIED, state.local.port()).into(),
        false => (Ipv4Addr::UNSPECIFIED, state.local.port()).into(),
    };
    // connect(2) chooses the address again, if it was the one who did.
    let local = if state.address_is_bound { state.local } else { any };
    if local.port() == 0 && local.ip().is_unspecified() {
        return Ok(());
    }
    for (on, option, name) in [
        (state.options.reuse_address, libc::SO_REUSEADDR, "SO_REUSEADDR"),
        (state.options.reuse_port, libc::SO_REUSEPORT, "SO_REUSEPORT"),
    ] {
        if on {
            socket::set_option(fd, libc::SOL_SOCKET, option, 1).map_err(say(name))?;
        }
    }
    let (level, option) = match state.v6 {
        true => (libc::SOL_IPV6, IPV6_FREEBIND),
        false => (libc::SOL_IP, libc::IP_FREEBIND),
    };
    let before = socket::get_option(fd, level, option).map_err(say("IP_FREEBIND"))?;
    socket::set_option(fd, level, option, 1).map_err(say("IP_FREEBIND"))?;
    bind(fd, local).map_err(|e| format!("bind to {local}: {e}"))?;
    socket::set_option(fd, level, option, before).map_err(say("IP_FREEBIND"))
}

fn bind(fd: RawFd, address: SocketAddr) -> Result<(), Errno> {
    match address {
        SocketAddr::V4(address) => nix::sys::socket::bind(fd, &SockaddrIn::from(address)),
        SocketAddr::V6(address) => nix::sys::socket::bind(fd, &SockaddrIn6::from(address)),
    }
}

fn connect(fd: RawFd, address: SocketAddr) -> Result<(), Errno> {
    match address {
        SocketAddr::V4(address) => nix::sys::socket::connect(fd, &SockaddrIn::from(address)),
        SocketAddr::V6(address) => nix::sys::socket::connect(fd, &SockaddrIn6::from(address)),
    }
}

/// A TCP socket whose connection is over: the other end has gone, and that has been told.
pub(crate) fn over(v6: bool) -> Made {
    let io = |e: std::io::Error| format!("make a connection that is over: {e}");
    let any: SocketAddr = match v6 {
        true => (Ipv6Addr::LOCALHOST, 0).into(),
        false => (Ipv4Addr::LOCALHOST, 0).into(),
    };
    let listener = TcpListener::bind(any).map_err(io)?;
    let near = TcpStream::connect(listener.local_addr().map_err(io)?).map_err(io)?;
    let (far, _) = listener.accept().map_err(io)?;
    // With this, closing means a reset.
    let now = libc::linger { l_onoff: 1, l_linger: 0 };
    socket::set_structure(far.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &now)
        .map_err(say("SO_LINGER"))?;
    drop(far);
    // Told when it is there; taking the error clears it.
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(near.as_fd(), PollFlags::POLLIN)], timeout).map_err(say("wait for the reset"))?;
    match near.take_error().map_err(io)? {
        Some(_) => Ok(near.into()),
        None => Err("make a connection that is over: the reset does not come".into()),
    }
}

fn set_congestion_control(fd: RawFd, name: &str) -> Result<(), Errno> {
    // SAFETY: the kernel reads as many bytes as it is told.
    let r = unsafe {
        libc::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, name.as_ptr().cast(), name.len() as u32)
    };
    Errno::result(r).map(drop)
}

/// `ip link set lo up`.
fn bring_up_loopback() -> Result<(), Errno> {
    // SAFETY: an all-zero ifreq is valid; the calls read and write it.
    unsafe {
        let fd = Errno::result(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?;
        let fd = OwnedFd::from_raw_fd(fd);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        Errno::result(libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request))?;
        let up = libc::IFF_UP as i16;
        if request.ifr_ifru.ifru_flags & up == 0 {
            request.ifr_ifru.ifru_flags |= up;
            Errno::result(libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::SocketOptions;
    use std::io::{Read, Write};

    fn socket(v6: bool, protocol: InetProtocol, local: &str, state: InetState) -> InetSocket {
        InetSocket {
            v6,
            protocol,
            uid: nix::unistd::getuid().as_raw(),
            local: local.parse().unwrap(),
            address_is_bound: true,
            state,
            error: 0,
            unread: 0,
            options: SocketOptions { peek_offset: -1, receive_low_water: 1, ..SocketOptions::default() },
            protocol_options: vec![],
            congestion_control: None,
            unsupported: None,
        }
    }

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn a_listening_socket_listens() {
        let local = format!("127.0.0.1:{}", free_port());
        let listening = InetState::Listening { backlog: 5, waiting: vec![] };
        let fd = restore(&socket(false, InetProtocol::Tcp, &local, listening)).unwrap();
        let listener = TcpListener::from(fd);
        let mut near = TcpStream::connect(&local).unwrap();
        near.write_all(b"x").unwrap();
        let (mut far, _) = listener.accept().unwrap();
        far.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn an_address_that_nobody_has_can_be_bound() {
        let local = format!("192.0.2.7:{}", free_port());
        let fd = restore(&socket(false, InetProtocol::Udp, &local, InetState::Idle)).unwrap();
        assert_eq!(std::net::UdpSocket::from(fd).local_addr().unwrap(), local.parse().unwrap());
    }

    #[test]
    fn a_connection_that_is_over_reads_nothing_and_takes_nothing() {
        let fd = restore(&socket(false, InetProtocol::Tcp, "127.0.0.1:1", InetState::Over)).unwrap();
        let mut stream = TcpStream::from(fd);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        assert_eq!(stream.write(b"x").unwrap_err().raw_os_error(), Some(libc::EPIPE));
        assert_eq!(stream.peer_addr().unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    }

    #[test]
    fn options_are_set_where_they_differ() {
        let mut state = socket(false, InetProtocol::Tcp, "127.0.0.1:0", InetState::Idle);
        let option =
            |name: &str, level, option, value| ProtocolOption { name: name.into(), level, option, value };
        state.protocol_options = vec![
            option("TCP_NODELAY", libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
            option("IP_TTL", libc::SOL_IP, libc::IP_TTL, 7),
            // One that no kernel has.
            option("?", libc::SOL_IP, 9999, 0),
        ];
        state.congestion_control = Some("reno".into());
        let fd = restore(&state).unwrap();
        let get = |level, option| socket::get_option(fd.as_raw_fd(), level, option);
        assert_eq!(get(libc::IPPROTO_TCP, libc::TCP_NODELAY), Ok(1));
        assert_eq!(get(libc::SOL_IP, libc::IP_TTL), Ok(7));
        state.protocol_options.push(option("?", libc::SOL_IP, 9999, 1));
        assert!(restore(&state).is_err());
    }
}
