//! TCP and UDP sockets.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::Stage;
use crate::child::Child;
use crate::procfs::same;

fn option(fd: RawFd, level: i32, option: i32) -> Result<i32, Errno> {
    let (mut value, mut len) = (0i32, 4u32);
    // SAFETY: the kernel writes an int.
    let r = unsafe { libc::getsockopt(fd, level, option, (&raw mut value).cast(), &raw mut len) };
    Errno::result(r).map(|_| value)
}

fn set(fd: RawFd, level: i32, option: i32, value: i32) -> Result<()> {
    // SAFETY: the kernel reads an int.
    let r = unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), 4) };
    Errno::result(r).with_context(|| format!("option {level}/{option}"))?;
    Ok(())
}

fn new_socket(family: i32, kind: i32) -> Result<OwnedFd> {
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(Errno::result(libc::socket(family, kind | libc::SOCK_CLOEXEC, 0))?) })
}

/// Somebody connects, and is understood.
fn greet(listener: &TcpListener, word: &[u8; 5]) -> Result<()> {
    let mut caller = TcpStream::connect(listener.local_addr()?)?;
    caller.write_all(word)?;
    let (mut callee, _) = listener.accept()?;
    let mut heard = [0; 5];
    callee.read_exact(&mut heard)?;
    same("what arrived", b"hello", &heard)
}

fn word(damage: bool) -> &'static [u8; 5] {
    if damage { b"noise" } else { b"hello" }
}

/// Still listening, and somebody can connect.
pub fn listen(stage: &mut Stage) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;

    let crash = stage.crash()?;
    same("address", &address, &listener.local_addr()?)?;
    greet(&listener, word(crash.damage))
}

/// The same with IPv6, and its port with IPv4 beside it.
pub fn listen_v6(stage: &mut Stage) -> Result<()> {
    let only = new_socket(libc::AF_INET6, libc::SOCK_STREAM)?;
    set(only.as_raw_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    nix::sys::socket::bind(
        only.as_raw_fd(),
        &nix::sys::socket::SockaddrIn6::from(std::net::SocketAddrV6::new(
            std::net::Ipv6Addr::LOCALHOST,
            0,
            0,
            0,
        )),
    )?;
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::listen(only.as_raw_fd(), 3) })?;
    let listener = TcpListener::from(only);
    let address = listener.local_addr()?;
    let beside = TcpListener::bind(("127.0.0.1", address.port()))?;

    let crash = stage.crash()?;
    same("address", &address, &listener.local_addr()?)?;
    same("IPV6_V6ONLY", &Ok(1), &option(listener.as_raw_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY))?;
    greet(&listener, word(crash.damage))?;
    greet(&beside, word(crash.damage))
}

/// A child blocked in accept(2).
pub fn accept(stage: &mut Stage) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut child = Child::fork(stage, "accept", |_, ready| {
        ready.announce()?;
        let (mut callee, _) = listener.accept()?;
        let mut heard = [0; 5];
        callee.read_exact(&mut heard)?;
        same("what arrived", b"hello", &heard)
    })?;

    let crash = stage.crash()?;
    TcpStream::connect(listener.local_addr()?)?.write_all(word(crash.damage))?;
    child.join()
}

/// Two sockets at one port share the work (SO_REUSEPORT); and one that is bound and does not listen.
pub fn reuse_port(stage: &mut Stage) -> Result<()> {
    let one = |address: SocketAddr| -> Result<UdpSocket> {
        let socket = new_socket(libc::AF_INET, libc::SOCK_DGRAM)?;
        set(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        let SocketAddr::V4(v4) = address else { unreachable!("an IPv4 address") };
        nix::sys::socket::bind(socket.as_raw_fd(), &nix::sys::socket::SockaddrIn::from(v4))?;
        Ok(socket.into())
    };
    let first = one("127.0.0.1:0".parse()?)?;
    let address = first.local_addr()?;
    let second = one(address)?;
    let bound = new_socket(libc::AF_INET, libc::SOCK_STREAM)?;
    let SocketAddr::V4(v4) = address else { unreachable!("an IPv4 address") };
    nix::sys::socket::bind(bound.as_raw_fd(), &nix::sys::socket::SockaddrIn::from(v4))?;

    let crash = stage.crash()?;
    let second = if crash.damage { UdpSocket::bind("127.0.0.1:0")? } else { second };
    same("addresses", &[address; 2], &[first.local_addr()?, second.local_addr()?])?;
    let third = one(address).context("a third one")?;
    [&first, &second, &third].iter().try_for_each(|socket| socket.set_nonblocking(true))?;
    let mut heard = [0; 3];
    for _ in 0..200 {
        UdpSocket::bind("127.0.0.1:0")?.send_to(b"x", address)?;
        // On a busy machine it takes its time, even from here to here.
        let mut any = [&first, &second, &third].map(|socket| PollFd::new(socket, PollFlags::IN));
        let patience = Timespec { tv_sec: 60, tv_nsec: 0 };
        ensure!(rustix::event::poll(&mut any, Some(&patience))? > 0, "nobody got a datagram");
        for (socket, heard) in [&first, &second, &third].iter().zip(&mut heard) {
            *heard += u32::from(socket.recv(&mut [0; 8]).is_ok());
        }
    }
    ensure!(heard.iter().all(|count| *count > 20), "of 200 datagrams the three got {heard:?}");
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::listen(bound.as_raw_fd(), 3) })?;
    greet(&TcpListener::from(bound), b"hello")
}

/// UDP sockets, one of them connected, and a reader that is blocked.
pub fn udp(stage: &mut Stage) -> Result<()> {
    let (bound, connected, blocked) =
        (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("[::1]:0")?);
    connected.connect(bound.local_addr()?)?;
    let mut child = Child::fork(stage, "reader", |_, ready| {
        ready.announce()?;
        let mut heard = [0; 16];
        let (len, _) = blocked.recv_from(&mut heard)?;
        same("what the child heard", &&b"hello"[..], &&heard[..len])
    })?;
    let names = (bound.local_addr()?, connected.local_addr()?, connected.peer_addr()?, blocked.local_addr()?);

    let crash = stage.crash()?;
    let now = (bound.local_addr()?, connected.local_addr()?, connected.peer_addr()?, blocked.local_addr()?);
    same("addresses", &names, &now)?;
    bound.set_read_timeout(Some(Duration::from_secs(60)))?;
    connected.set_read_timeout(Some(Duration::from_secs(60)))?;
    connected.send(word(crash.damage))?;
    let mut heard = [0; 16];
    let (len, from) = bound.recv_from(&mut heard)?;
    same("a datagram", &(&b"hello"[..], names.1), &(&heard[..len], from))?;
    // One that is not from its peer.
    UdpSocket::bind("127.0.0.1:0")?.send_to(b"stranger", names.1)?;
    bound.send_to(b"answer", names.1)?;
    let len = connected.recv(&mut heard)?;
    same("an answer", &&b"answer"[..], &&heard[..len])?;
    UdpSocket::bind("[::1]:0")?.send_to(b"hello", names.3)?;
    child.join()
}

/// Options of sockets, IP and TCP; those who are accepted inherit them.
pub fn options(stage: &mut Stage) -> Result<()> {
    const TCP: i32 = libc::IPPROTO_TCP;
    const IP: i32 = libc::IPPROTO_IP;
    const IPV6: i32 = libc::IPPROTO_IPV6;
    const SOCKET: i32 = libc::SOL_SOCKET;
    let tcp = [
        (SOCKET, libc::SO_REUSEADDR, 1),
        (SOCKET, libc::SO_KEEPALIVE, 1),
        (SOCKET, libc::SO_RCVBUF, 50_000),
        (SOCKET, libc::SO_PRIORITY, 3),
        (TCP, libc::TCP_NODELAY, 1),
        (TCP, libc::TCP_KEEPIDLE, 77),
        (TCP, libc::TCP_KEEPINTVL, 7),
        (TCP, libc::TCP_KEEPCNT, 5),
        (TCP, libc::TCP_SYNCNT, 4),
        (TCP, libc::TCP_LINGER2, 11),
        (TCP, libc::TCP_DEFER_ACCEPT, 7),
        (TCP, libc::TCP_USER_TIMEOUT, 12_345),
        (TCP, libc::TCP_FASTOPEN, 9),
        (TCP, libc::TCP_MAXSEG, 600),
        (IP, libc::IP_TTL, 33),
        (IP, libc::IP_TOS, 0x10),
        (IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
    ];
    let udp = [
        (SOCKET, libc::SO_BROADCAST, 1),
        (SOCKET, libc::SO_SNDBUF, 40_000),
        (IP, libc::IP_PKTINFO, 1),
        (IP, libc::IP_RECVTTL, 1),
        (IP, libc::IP_RECVERR, 1),
        (IP, libc::IP_FREEBIND, 1),
        (IP, libc::IP_MULTICAST_TTL, 5),
        (IP, libc::IP_MULTICAST_LOOP, 0),
    ];
    let udp6 = [
        (IPV6, libc::IPV6_V6ONLY, 1),
        (IPV6, libc::IPV6_UNICAST_HOPS, 44),
        (IPV6, libc::IPV6_RECVPKTINFO, 1),
        (IPV6, libc::IPV6_RECVTCLASS, 1),
        (IPV6, libc::IPV6_TCLASS, 0x20),
        (IPV6, libc::IPV6_RECVERR, 1),
    ];
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (datagrams, datagrams6) =
        (new_socket(libc::AF_INET, libc::SOCK_DGRAM)?, new_socket(libc::AF_INET6, libc::SOCK_DGRAM)?);
    let all = [
        (listener.as_raw_fd(), &tcp[..]),
        (datagrams.as_raw_fd(), &udp[..]),
        (datagrams6.as_raw_fd(), &udp6[..]),
    ];
    for (fd, options) in all {
        options.iter().try_for_each(|(level, option, value)| set(fd, *level, *option, *value))?;
    }
    let look = || {
        let one = |(fd, options): &(RawFd, &[(i32, i32, i32)])| {
            let values = options.iter().map(|(level, name, _)| (*level, *name, option(*fd, *level, *name)));
            values.collect::<Vec<_>>()
        };
        all.iter().map(one).collect::<Vec<_>>()
    };
    let before = look();

    let crash = stage.crash()?;
    if crash.damage {
        set(listener.as_raw_fd(), TCP, libc::TCP_KEEPIDLE, 78)?;
    }
    same("options (level, option, value)", &before, &look())?;
    let mut caller = TcpStream::connect(listener.local_addr()?)?;
    caller.write_all(b"x")?;
    let (accepted, _) = listener.accept()?;
    same("inherited TCP_KEEPIDLE", &Ok(77), &option(accepted.as_raw_fd(), TCP, libc::TCP_KEEPIDLE))?;
    same("inherited TCP_NODELAY", &Ok(1), &option(accepted.as_raw_fd(), TCP, libc::TCP_NODELAY))
}

/// A socket whose connection the other end has reset.
pub fn over(stage: &mut Stage) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    let now = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: the kernel reads the structure.
    unsafe {
        let len = size_of_val(&now) as u32;
        libc::setsockopt(far.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const now).cast(), len);
    }
    drop(far);
    let reset = near.read(&mut [0]).map_err(|e| e.raw_os_error());
    same("what the reset was told with", &Err(Some(libc::ECONNRESET)), &reset)?;

    let crash = stage.crash()?;
    if crash.damage {
        near = TcpStream::connect(listener.local_addr()?)?;
    }
    same("what is written", &Err(Some(libc::EPIPE)), &near.write(b"x").map_err(|e| e.raw_os_error()))?;
    same("what is read", &Ok(0), &near.read(&mut [0]).map_err(|e| e.raw_os_error()))
}

/// An established connection, to somebody who would have to come back too.
pub fn established(stage: &mut Stage) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;

    let crash = stage.crash()?;
    near.write_all(word(crash.damage))?;
    let mut heard = [0; 5];
    far.read_exact(&mut heard)?;
    same("what arrived", b"hello", &heard)
}
