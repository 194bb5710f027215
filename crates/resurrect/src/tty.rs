//! Terminals: the device is opened by name and given its settings, window size, unread input and unsent output.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use snapshot::{Bytes, Pid, Reason, Termios, Tty};

use crate::deadline::Deadline;
use crate::{sys, vt};

/// How long a terminal may take to accept the dead kernel's unsent output. Its own ring has room for all of it, unless somebody
/// else writes there, too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// `struct termios2`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Termios2 {
    iflag: u32,
    oflag: u32,
    cflag: u32,
    lflag: u32,
    line: u8,
    cc: [u8; 19],
    ispeed: u32,
    ospeed: u32,
}

const TCSETS2: u64 = 0x402c_542b;

impl From<&Termios> for Termios2 {
    fn from(t: &Termios) -> Self {
        let mut cc = [0; 19];
        for (to, from) in cc.iter_mut().zip(&t.cc) {
            *to = *from;
        }
        Self {
            iflag: t.iflag,
            oflag: t.oflag,
            cflag: t.cflag,
            lflag: t.lflag,
            line: t.line,
            cc,
            ispeed: t.ispeed,
            ospeed: t.ospeed,
        }
    }
}

/// Path of the device.
pub(crate) fn device(tty: &Tty) -> PathBuf {
    let mut path = b"/dev/".to_vec();
    path.extend_from_slice(tty.name.as_bytes());
    Bytes(path).as_path().to_owned()
}

/// Opens the terminal without making it anybody's controlling terminal and without waiting for a carrier.
pub(crate) fn open(tty: &Tty, flags: i32) -> Result<OwnedFd, Errno> {
    sys::open(&device(tty), (flags & libc::O_ACCMODE) | libc::O_NOCTTY | libc::O_NONBLOCK, 0)
}

/// A terminal that has its state again.
pub(crate) struct Restored {
    /// What could not be given back.
    pub(crate) losses: Vec<Reason>,
    /// Keeps it open: with its last descriptor a terminal loses its window size and what was typed.
    _open: OwnedFd,
}

/// Gives the terminal its settings, window size, unread input and unsent output. It keeps them while the result, or a process, has it open.
pub(crate) fn restore(tty: &Tty, above: RawFd) -> Result<Restored, String> {
    let fd = open(tty, libc::O_RDWR).map_err(|e| format!("open {}: {e}", device(tty).display()))?;
    let mut losses = fill(&fd, tty, &tty.output)?;
    if let Some(console) = &tty.console {
        losses.extend(vt::fill(&fd, tty, console));
    }
    let open = sys::lift(fd, above).map_err(|e| format!("dup: {e}"))?;
    Ok(Restored { losses, _open: open })
}

/// Gives an open terminal all that it had. `output`: what is to go out as it is.
pub(crate) fn fill(fd: &OwnedFd, tty: &Tty, output: &Bytes) -> Result<Vec<Reason>, String> {
    let mut losses = Vec::new();
    let wanted = Termios2::from(&tty.termios);
    if !output.is_empty() {
        // It has been through the line discipline.
        let mut raw = wanted;
        raw.oflag &= !libc::OPOST;
        raw.lflag &= !libc::TOSTOP;
        set(fd.as_raw_fd(), &mut raw)?;
        if let Err((left, e)) = send(fd, output.as_bytes(), Deadline::after(PATIENCE)) {
            let text = format!("{}: {left} bytes written and not yet sent are lost ({e})", tty.name);
            losses.push(Reason::new("terminal-output", text));
        }
    }
    if !tty.input.is_empty() {
        // Typed again by the kernel's TIOCSTI: without echo, and without acting on what is a special character.
        let mut quiet = wanted;
        quiet.iflag &= !(libc::IXON | libc::IXOFF | libc::ISTRIP | libc::ICRNL | libc::INLCR | libc::IGNCR);
        quiet.lflag &= !(libc::ISIG
            | libc::IEXTEN
            | libc::ECHO
            | libc::ECHOE
            | libc::ECHOK
            | libc::ECHONL
            | libc::ECHOCTL
            | libc::ECHOKE);
        set(fd.as_raw_fd(), &mut quiet)?;
        if let Some(e) = tty.input.iter().find_map(|&b| type_in(fd.as_raw_fd(), b).err()) {
            let text =
                format!("{}: {} bytes typed and not yet read are lost ({e})", tty.name, tty.input.len());
            losses.push(Reason::new("terminal-input", text));
        }
    }
    configure(fd, tty)?;
    Ok(losses)
}

/// Gives a terminal its settings and window size; through a master: those of the slave.
pub(crate) fn configure(fd: &OwnedFd, tty: &Tty) -> Result<(), String> {
    set(fd.as_raw_fd(), &mut Termios2::from(&tty.termios))?;
    let w = tty.window;
    let mut size = libc::winsize { ws_row: w.rows, ws_col: w.cols, ws_xpixel: w.xpixel, ws_ypixel: w.ypixel };
    // SAFETY: TIOCSWINSZ reads a winsize.
    match unsafe { sys::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &mut size) } {
        // A console has the size of its display, which is told with its screen.
        Err(_) if tty.console.is_some() => Ok(()),
        done => done.map(drop).map_err(|e| format!("TIOCSWINSZ: {e}")),
    }
}

/// Gives a terminal settings.
pub(crate) fn set_termios(fd: &OwnedFd, termios: &Termios) -> Result<(), String> {
    set(fd.as_raw_fd(), &mut Termios2::from(termios))
}

fn set(fd: RawFd, termios: &mut Termios2) -> Result<(), String> {
    // SAFETY: TCSETS2 reads a termios2.
    unsafe { sys::ioctl(fd, TCSETS2, termios) }.map(drop).map_err(|e| format!("TCSETS2: {e}"))
}

/// Writes to a terminal that does not block; if not all of it by the deadline, says how many bytes are left.
pub(crate) fn send(fd: &OwnedFd, mut bytes: &[u8], deadline: Deadline) -> Result<(), (usize, Errno)> {
    while !bytes.is_empty() {
        match nix::unistd::write(fd, bytes) {
            Ok(0) => return Err((bytes.len(), Errno::EIO)),
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(Errno::EINTR) if !deadline.is_over() => {}
            Err(Errno::EAGAIN) if !deadline.is_over() => {
                let timeout = PollTimeout::try_from(deadline.left()).unwrap_or(PollTimeout::MAX);
                match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)], timeout) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(e) => return Err((bytes.len(), e)),
                }
            }
            Err(e) => return Err((bytes.len(), e)),
        }
    }
    Ok(())
}

fn type_in(fd: RawFd, mut byte: u8) -> Result<(), Errno> {
    // SAFETY: TIOCSTI reads one byte.
    unsafe { sys::ioctl(fd, libc::TIOCSTI, &mut byte) }.map(drop)
}

/// Makes the terminal the caller's controlling terminal; the caller leads its session.
pub(crate) fn take_control(tty: &Tty) -> Result<(), Errno> {
    let fd = open(tty, libc::O_RDWR)?;
    // 1: even if another session has it.
    sys::ioctl_number(fd.as_raw_fd(), libc::TIOCSCTTY, 1).map(drop)
}

/// Makes `group` the foreground process group; the terminal is the caller's controlling terminal.
pub(crate) fn set_foreground(tty: &Tty, mut group: Pid) -> Result<(), Errno> {
    let fd = open(tty, libc::O_RDWR)?;
    // SAFETY: TIOCSPGRP reads a pid_t.
    unsafe { sys::ioctl(fd.as_raw_fd(), libc::TIOCSPGRP, &mut group) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sending_ends_at_the_deadline() {
        let pty = nix::pty::openpty(None, None).unwrap();
        // Nobody reads the other end.
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&pty.slave, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
        assert_eq!(send(&pty.slave, b"hello", Deadline::after(Duration::ZERO)), Ok(()));
        let much = vec![b'.'; 1 << 20];
        let (left, e) = send(&pty.slave, &much, Deadline::after(Duration::from_millis(50))).unwrap_err();
        assert!(e == Errno::EAGAIN && left > 0 && left < much.len(), "{left} {e}");
        drop(pty.master);
        assert_eq!(send(&pty.slave, b"hello", Deadline::after(PATIENCE)), Err((5, Errno::EIO)));
    }
}
