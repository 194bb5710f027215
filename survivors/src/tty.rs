//! Terminals on a serial line.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{
    InputFlags, SetArg, SpecialCharacterIndices, cfmakeraw, tcgetattr, tcgetsid, tcsetattr,
};
use nix::unistd::{Pid, getsid, setpgid, tcgetpgrp, tcsetpgrp};
use rustix::termios::{Winsize, tcgetwinsize, tcsetwinsize};

use crate::Stage;
use crate::child::Child;
use crate::procfs::{self, same};

/// The controlling terminal of a session: raw, of an unusual size, with a child in the foreground.
pub fn serial(stage: &mut Stage) -> Result<()> {
    let path = stage.options().tty.clone();
    let tty = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    // SAFETY: takes a number only.
    Errno::result(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSCTTY, 0) }).context("TIOCSCTTY")?;
    // Once we are in the background, changing the terminal would stop us.
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGTTOU);
    blocked.thread_block()?;

    let mut termios = tcgetattr(&tty)?;
    cfmakeraw(&mut termios);
    termios.input_flags |= InputFlags::IXANY;
    termios.control_chars[SpecialCharacterIndices::VMIN as usize] = 3;
    termios.control_chars[SpecialCharacterIndices::VTIME as usize] = 7;
    termios.control_chars[SpecialCharacterIndices::VINTR as usize] = b'q';
    tcsetattr(&tty, SetArg::TCSANOW, &termios)?;
    // Not nix's cfsetspeed: the libc crate wants a versioned symbol for it, which a static link does not have.
    let mut speed = rustix::termios::tcgetattr(&tty)?;
    speed.set_speed(38_400)?;
    rustix::termios::tcsetattr(&tty, rustix::termios::OptionalActions::Now, &speed)?;
    tcsetwinsize(&tty, Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 7, ws_ypixel: 8 })?;

    let mut child = Child::fork(stage, "foreground", |stage, ready| {
        setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
        ready.announce()?;
        stage.wait();
        Ok(())
    })?;
    tcsetpgrp(&tty, child.pid())?;
    let own = std::process::id() as i32;
    let look = || -> Result<_> {
        let size = tcgetwinsize(&tty)?;
        let size = (size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel);
        Ok((tcgetattr(&tty)?, size, tcgetpgrp(&tty)?, tcgetsid(&tty)?, procfs::stat_field(own, 7)?))
    };
    let before = look()?;
    ensure!((before.2, before.3) == (child.pid(), getsid(None)?), "unexpected: {before:?}");

    let crash = stage.crash()?;
    if crash.damage {
        tcsetpgrp(&tty, Pid::from_raw(own))?;
    }
    let after = look()?;
    same("termios", &before.0, &after.0)?;
    same("window size", &before.1, &after.1)?;
    same("foreground group", &before.2, &after.2)?;
    same("session", &before.3, &after.3)?;
    same("controlling terminal", &before.4, &after.4)?;
    OpenOptions::new().read(true).open("/dev/tty").context("/dev/tty")?;
    child.join()
}
