//! Netlink sockets.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::libc;

use crate::Stage;
use crate::child::Child;
use crate::procfs::same;

fn new_socket(protocol: i32, port: u32, groups: u32) -> Result<OwnedFd> {
    // SAFETY: the descriptor that comes back is nobody else's; an all-zero address is valid, and the kernel reads it.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = OwnedFd::from_raw_fd(Errno::result(libc::socket(libc::AF_NETLINK, kind, protocol))?);
        let mut address: libc::sockaddr_nl = std::mem::zeroed();
        address.nl_family = libc::AF_NETLINK as u16;
        (address.nl_pid, address.nl_groups) = (port, groups);
        let len = size_of_val(&address) as u32;
        Errno::result(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len))?;
        Ok(fd)
    }
}

/// Port and groups.
fn name(fd: RawFd) -> Result<(u32, u32)> {
    // SAFETY: the kernel writes an address.
    unsafe {
        let mut address: libc::sockaddr_nl = std::mem::zeroed();
        let mut len = size_of_val(&address) as u32;
        Errno::result(libc::getsockname(fd, (&raw mut address).cast(), &mut len))?;
        Ok((address.nl_pid, address.nl_groups))
    }
}

/// struct nlmsghdr and what follows.
fn message(kind: u16, flags: i32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (16 + payload.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags as u16).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(payload);
    bytes
}

fn send(fd: RawFd, bytes: &[u8]) -> Result<()> {
    // SAFETY: the kernel reads the bytes.
    let n = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), 0) };
    same("bytes sent", &(bytes.len() as isize), &Errno::result(n)?)
}

fn receive(fd: RawFd) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 64 << 10];
    // SAFETY: the kernel writes into the buffer.
    let n = unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    bytes.truncate(Errno::result(n)? as usize);
    Ok(bytes)
}

/// Changes a flag of the loopback device that means nothing, so that the kernel tells about it.
fn mark_loopback(on: bool) -> Result<()> {
    // SAFETY: an all-zero ifreq is valid; the calls read and write it.
    unsafe {
        let fd = Errno::result(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?;
        let fd = OwnedFd::from_raw_fd(fd);
        let mut request: libc::ifreq = std::mem::zeroed();
        (request.ifr_name[0], request.ifr_name[1]) = (b'l' as libc::c_char, b'o' as libc::c_char);
        Errno::result(libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request))?;
        let debug = libc::IFF_DEBUG as i16;
        let flags = &mut request.ifr_ifru.ifru_flags;
        *flags = if on { *flags | debug } else { *flags & !debug };
        Errno::result(libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request))?;
    }
    Ok(())
}

/// A question to the kernel is answered; port, groups and options are as they were.
pub fn route(stage: &mut Stage) -> Result<()> {
    const RTM_GETLINK: u16 = 18;
    const NLMSG_DONE: u16 = 3;
    let socket = new_socket(libc::NETLINK_ROUTE, 3_000_000_000 + std::process::id(), 1)?;
    let fd = socket.as_raw_fd();
    set(fd, libc::NETLINK_EXT_ACK, 1)?;
    // RTNLGRP_NSID and later ones have no bit in an address.
    set(fd, libc::NETLINK_ADD_MEMBERSHIP, HIGH)?;
    let look = || -> Result<_> { Ok((name(fd)?, memberships(fd)?, ext_ack(fd)?)) };
    let before = look()?;

    let crash = stage.crash()?;
    if crash.damage {
        set(fd, libc::NETLINK_DROP_MEMBERSHIP, HIGH)?;
    }
    same("port, groups, NETLINK_EXT_ACK", &before, &look()?)?;
    send(fd, &message(RTM_GETLINK, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, &[0; 16]))?;
    let mut links = 0;
    loop {
        let answer = receive(fd)?;
        let mut rest = &answer[..];
        while let Some(header) = rest.get(..16) {
            let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let kind = u16::from_ne_bytes([header[4], header[5]]);
            if kind == NLMSG_DONE {
                ensure!(links > 0, "the machine has no links");
                return Ok(());
            }
            links += 1;
            rest = rest.get(len.next_multiple_of(4).max(16)..).unwrap_or_default();
        }
    }
}

const HIGH: i32 = 34;

fn set(fd: RawFd, option: i32, value: i32) -> Result<()> {
    // SAFETY: the kernel reads an int.
    let r = unsafe { libc::setsockopt(fd, libc::SOL_NETLINK, option, (&raw const value).cast(), 4) };
    Errno::result(r).map(drop).map_err(Into::into)
}

fn memberships(fd: RawFd) -> Result<Vec<u32>> {
    let (mut words, mut len) = ([0u32; 8], 32u32);
    // SAFETY: the kernel writes at most the array.
    let r = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_NETLINK,
            libc::NETLINK_LIST_MEMBERSHIPS,
            words.as_mut_ptr().cast(),
            &mut len,
        )
    };
    Errno::result(r)?;
    Ok(words.into())
}

fn ext_ack(fd: RawFd) -> Result<i32> {
    let (mut value, mut len) = (0i32, 4u32);
    // SAFETY: the kernel writes an int.
    let r = unsafe {
        libc::getsockopt(fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, (&raw mut value).cast(), &mut len)
    };
    Errno::result(r)?;
    Ok(value)
}

/// A process that is blocked until a link changes, and another one with a filter in front of it.
pub fn waiter(stage: &mut Stage) -> Result<()> {
    let waiter = new_socket(libc::NETLINK_ROUTE, 0, 1)?;
    let filtered = new_socket(libc::NETLINK_ROUTE, 0, 1)?;
    // Of each message the first seven bytes.
    let mut program = [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 7 }];
    let filter = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program.
    let r = unsafe {
        let len = size_of_val(&filter) as u32;
        libc::setsockopt(
            filtered.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            len,
        )
    };
    Errno::result(r)?;
    let damage = stage.options().damage;
    let mut child = Child::fork(stage, "waiter", |_, ready| {
        ready.announce()?;
        let heard = receive(waiter.as_raw_fd())?;
        // RTM_NEWLINK.
        same(
            "message",
            &Some(if damage { 17 } else { 16 }),
            &heard.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]])),
        )
    })?;

    stage.crash()?;
    mark_loopback(true)?;
    mark_loopback(false)?;
    same("what passes the filter", &7, &receive(filtered.as_raw_fd())?.len())?;
    child.join()
}
