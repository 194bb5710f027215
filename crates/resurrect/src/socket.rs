//! What all sockets have in common.

use std::os::fd::RawFd;

use nix::errno::Errno;
use snapshot::{ProtocolOption, SocketOptions};

use crate::sys;

const SO_PASSPIDFD: i32 = 76;
const SOMAXCONN: &str = "/proc/sys/net/core/somaxconn";

type Done = Result<(), String>;

fn say(what: &'static str) -> impl Fn(Errno) -> String {
    move |e| format!("{what}: {e}")
}

pub(crate) fn set_option(fd: RawFd, level: i32, option: i32, value: i32) -> Result<(), Errno> {
    set_structure(fd, level, option, &value)
}

pub(crate) fn get_option(fd: RawFd, level: i32, option: i32) -> Result<i32, Errno> {
    let (mut value, mut len) = (0i32, size_of::<i32>() as u32);
    // SAFETY: the kernel writes an int.
    let r = unsafe { libc::getsockopt(fd, level, option, (&raw mut value).cast(), &raw mut len) };
    Errno::result(r).map(|_| value)
}

/// setsockopt(2) on level SOL_SOCKET for all that differs from a new socket's.
pub(crate) fn set_options(fd: RawFd, options: &SocketOptions) -> Done {
    let set = |option, value| set_option(fd, libc::SOL_SOCKET, option, value);
    // What getsockopt(2) gives is twice what setsockopt(2) takes.
    let sizes = [
        (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, options.send_buffer),
        (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, options.receive_buffer),
    ];
    for (get, force, wanted) in sizes {
        let Some(wanted) = wanted.map(|size| size as i32) else { continue };
        if get_option(fd, libc::SOL_SOCKET, get).map_err(say("buffer size"))? != wanted {
            set(force, wanted / 2).map_err(say("buffer size"))?;
        }
    }
    let flags = [
        (libc::SO_PASSCRED, "SO_PASSCRED", options.pass_credentials),
        (libc::SO_PASSSEC, "SO_PASSSEC", options.pass_security),
        (SO_PASSPIDFD, "SO_PASSPIDFD", options.pass_pidfd),
        (libc::SO_KEEPALIVE, "SO_KEEPALIVE", options.keep_alive),
        (libc::SO_BROADCAST, "SO_BROADCAST", options.broadcast),
        (libc::SO_DONTROUTE, "SO_DONTROUTE", options.dont_route),
        (libc::SO_OOBINLINE, "SO_OOBINLINE", options.out_of_band_inline),
        (libc::SO_REUSEADDR, "SO_REUSEADDR", options.reuse_address),
        (libc::SO_REUSEPORT, "SO_REUSEPORT", options.reuse_port),
        (libc::SO_TIMESTAMP, "SO_TIMESTAMP", options.timestamp),
        (libc::SO_TIMESTAMPNS, "SO_TIMESTAMPNS", options.timestamp_ns),
    ];
    let numbers = [
        (libc::SO_RCVLOWAT, "SO_RCVLOWAT", options.receive_low_water as i32, 1),
        (libc::SO_PEEK_OFF, "SO_PEEK_OFF", options.peek_offset, -1),
        (libc::SO_PRIORITY, "SO_PRIORITY", options.priority as i32, 0),
        (libc::SO_MARK, "SO_MARK", options.mark as i32, 0),
    ];
    let flags = flags.into_iter().map(|(option, name, on)| (option, name, i32::from(on), 0));
    for (option, name, value, default) in flags.chain(numbers) {
        if value != default {
            set(option, value).map_err(say(name))?;
        }
    }
    let times = [
        (libc::SO_SNDTIMEO, "SO_SNDTIMEO", options.send_timeout_us),
        (libc::SO_RCVTIMEO, "SO_RCVTIMEO", options.receive_timeout_us),
    ];
    for (option, name, time) in times {
        let Some(us) = time else { continue };
        let value = libc::timeval { tv_sec: (us / 1_000_000) as i64, tv_usec: (us % 1_000_000) as i64 };
        set_structure(fd, libc::SOL_SOCKET, option, &value).map_err(say(name))?;
    }
    if let Some(seconds) = options.linger {
        let value = libc::linger { l_onoff: 1, l_linger: seconds as i32 };
        set_structure(fd, libc::SOL_SOCKET, libc::SO_LINGER, &value).map_err(say("SO_LINGER"))?;
    }
    if !options.filter.is_empty() {
        attach_filter(fd, &options.filter).map_err(say("SO_ATTACH_FILTER"))?;
    }
    if options.filter_locked {
        set(libc::SO_LOCK_FILTER, 1).map_err(say("SO_LOCK_FILTER"))?;
    }
    Ok(())
}

fn attach_filter(fd: RawFd, instructions: &[u64]) -> Result<(), Errno> {
    let len = u16::try_from(instructions.len()).map_err(|_| Errno::EINVAL)?;
    // The kernel only reads them; an instruction is as large as a word, in the same byte order.
    let program = libc::sock_fprog { len, filter: instructions.as_ptr().cast_mut().cast() };
    set_structure(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// setsockopt(2) for options of a protocol, where they are not as they were. An option that this kernel does not know and that has
/// the value 0 is as it was.
pub(crate) fn set_protocol_options<'a>(
    fd: RawFd,
    options: impl IntoIterator<Item = &'a ProtocolOption>,
) -> Done {
    for option in options {
        let ProtocolOption { name, level, option, value } = option;
        match get_option(fd, *level, *option) {
            Ok(now) if now == *value => {}
            Err(_) if *value == 0 => {}
            _ => set_option(fd, *level, *option, *value).map_err(|e| format!("{name} ({value}): {e}"))?,
        }
    }
    Ok(())
}

pub(crate) fn set_structure<T>(fd: RawFd, level: i32, option: i32, value: &T) -> Result<(), Errno> {
    // SAFETY: the kernel reads the structure; each option is used with the one that belongs to it.
    let r = unsafe {
        let value = std::ptr::from_ref(value).cast();
        libc::setsockopt(fd, level, option, value, size_of::<T>() as u32)
    };
    Errno::result(r).map(drop)
}

/// listen(2) with a backlog that the system's limit may not allow any more.
pub(crate) fn listen(fd: RawFd, backlog: u32) -> Result<(), Errno> {
    let limit = || std::fs::read_to_string(SOMAXCONN).ok()?.trim().parse::<u32>().ok();
    let before = limit().filter(|limit| *limit < backlog);
    if before.is_some() {
        // Where it cannot be raised fewer can wait, and nothing is lost.
        let _ = sys::write_proc(SOMAXCONN, &backlog.to_string());
    }
    // SAFETY: numbers only.
    let done = Errno::result(unsafe { libc::listen(fd, backlog.min(i32::MAX as u32) as i32) }).map(drop);
    if let Some(before) = before {
        let _ = sys::write_proc(SOMAXCONN, &before.to_string());
    }
    done
}
