//! Pseudo-terminals.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::termios::{InputFlags, LocalFlags, OutputFlags, SetArg, Termios, tcgetattr, tcsetattr};

use crate::Stage;
use crate::child::Child;
use crate::procfs::same;

/// A pair whose slave has these settings changed.
fn pair_with(change: impl FnOnce(&mut Termios)) -> Result<(File, File)> {
    let OpenptyResult { master, slave } = openpty(None, None)?;
    let mut settings = tcgetattr(&slave)?;
    change(&mut settings);
    tcsetattr(&slave, SetArg::TCSANOW, &settings)?;
    Ok((master.into(), slave.into()))
}

fn quiet(settings: &mut Termios) {
    settings.local_flags.remove(LocalFlags::ECHO);
    settings.output_flags.remove(OutputFlags::OPOST);
}

fn raw(settings: &mut Termios) {
    quiet(settings);
    settings.local_flags.remove(LocalFlags::ICANON | LocalFlags::ISIG | LocalFlags::IEXTEN);
    settings.input_flags.remove(InputFlags::ICRNL | InputFlags::IXON);
}

fn take(file: &mut File, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn winsize(file: &File) -> Result<(u16, u16)> {
    let mut size = Winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes a winsize.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TIOCGWINSZ, &mut size) })?;
    Ok((size.ws_row, size.ws_col))
}

/// Waits for bytes without taking them.
fn wait_for_input(file: &File) -> Result<()> {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    Errno::result(unsafe { libc::poll(&mut poll, 1, -1) })?;
    Ok(())
}

/// Both ends, with characters on their way; name, owner, settings and size.
pub fn pair(stage: &mut Stage) -> Result<()> {
    let (mut master, mut slave) = pair_with(quiet)?;
    let settings = tcgetattr(&slave)?;
    let size = Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize.
    Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSWINSZ, &size) })?;
    slave.write_all(b"output")?;
    let name = nix::unistd::ttyname(&slave)?;
    let meta = slave.metadata()?;
    let owner = (meta.uid(), meta.gid(), meta.mode());

    let crash = stage.crash()?;
    if crash.damage {
        master.read_exact(&mut [0; 1])?;
    }
    same("name", &name, &nix::unistd::ttyname(&slave)?)?;
    let meta = slave.metadata()?;
    same("owner and mode", &owner, &(meta.uid(), meta.gid(), meta.mode()))?;
    same("size", &(33, 77), &winsize(&master)?)?;
    same("settings", &settings, &tcgetattr(&slave)?)?;
    let mut word = [0; 64];
    let count = master.read(&mut word)?;
    same("at the master", &b"output"[..], &word[..count])?;
    master.write_all(b"input\n")?;
    let count = slave.read(&mut word)?;
    same("at the slave", &b"input\n"[..], &word[..count])
}

/// Two whole lines, the end of a file and a part of a line, typed and not read.
pub fn lines(stage: &mut Stage) -> Result<()> {
    let (mut master, mut slave) = pair_with(quiet)?;
    master.write_all(b"first\nsecond\n\x04thi")?;
    wait_for_input(&slave)?;

    let crash = stage.crash()?;
    if crash.damage {
        take(&mut slave, 1)?;
    }
    let mut line = || -> Result<Vec<u8>> {
        let mut bytes = vec![0; 100];
        let count = slave.read(&mut bytes)?;
        bytes.truncate(count);
        Ok(bytes)
    };
    same("first line", &b"first\n"[..], &line()?[..])?;
    same("second line", &b"second\n"[..], &line()?[..])?;
    same("end of file", &b""[..], &line()?[..])?;
    // DEL is the erase character.
    master.write_all(b"\x7f\x7fhird\n")?;
    same("third line", &b"third\n"[..], &line()?[..])
}

/// Much output that nobody has read, and raw input.
pub fn unread(stage: &mut Stage) -> Result<()> {
    let (mut master, mut slave) = pair_with(raw)?;
    let output = crate::prng::bytes(1, 9000);
    slave.write_all(&output)?;
    let input: Vec<u8> = (0..=255).collect();
    master.write_all(&input)?;
    wait_for_input(&slave)?;

    let crash = stage.crash()?;
    if crash.damage {
        slave.write_all(b"?")?;
    }
    same("input", &input, &take(&mut slave, 256)?)?;
    slave.write_all(b"!")?;
    let all = take(&mut master, 9001)?;
    ensure!(all[..9000] == output && all[9000] == b'!', "the output differs");
    Ok(())
}

/// A child blocked in read(2) on the slave gets what is typed.
pub fn reader(stage: &mut Stage) -> Result<()> {
    let (mut master, slave) = pair_with(quiet)?;
    let mut child = Child::fork(stage, "reader", |_, ready| {
        ready.announce()?;
        let mut word = [0; 64];
        let count = (&slave).read(&mut word)?;
        same("line", &b"typed\n"[..], &word[..count])
    })?;

    let crash = stage.crash()?;
    master.write_all(if crash.damage { b"other\n" } else { b"typed\n" })?;
    child.join()
}

/// A child leads a session on the terminal: foreground group, /dev/tty, and the interrupt key.
pub fn session(stage: &mut Stage) -> Result<()> {
    extern "C" fn nothing(_: i32) {}
    let (mut master, slave) = pair_with(|settings| settings.local_flags.remove(LocalFlags::ECHO))?;
    let mut child = Child::fork(stage, "session", |stage, ready| {
        nix::unistd::setsid()?;
        // SAFETY: takes a number.
        Errno::result(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
        let tty = OpenOptions::new().read(true).write(true).open("/dev/tty")?;
        let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(Signal::SIGINT, &action) }?;
        let mut set = SigSet::empty();
        set.add(Signal::SIGINT);
        set.add(Signal::SIGUSR1);
        set.thread_block()?;
        ready.announce()?;
        stage.wait();
        let own = nix::unistd::getpgrp();
        same("foreground group", &own, &nix::unistd::tcgetpgrp(&tty)?)?;
        same("session", &own, &nix::sys::termios::tcgetsid(&slave)?)?;
        OpenOptions::new().read(true).open("/dev/tty").context("open /dev/tty again")?;
        (&tty).write_all(b"ready\n")?;
        same("signal", &Signal::SIGINT, &set.wait()?)
    })?;

    let crash = stage.crash()?;
    let word = take(&mut master, 7)?;
    same("the child's word", &b"ready\r\n"[..], &word[..])?;
    match crash.damage {
        true => nix::sys::signal::kill(child.pid(), Signal::SIGUSR1)?,
        // The interrupt key.
        false => master.write_all(b"\x03")?,
    }
    child.join()
}

/// Packet mode, a master without a slave, and a slave that was closed.
pub fn masters(stage: &mut Stage) -> Result<()> {
    let (packets, mut writer) = pair_with(raw)?;
    let on = 1i32;
    // SAFETY: TIOCPKT reads an int.
    Errno::result(unsafe { libc::ioctl(packets.as_raw_fd(), libc::TIOCPKT, &on) })?;
    let mut packets = packets;
    let flags = OFlag::O_NONBLOCK.bits() | OFlag::O_NOCTTY.bits();
    let lonely = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/ptmx")?;
    let (mut closed, slave) = pair_with(raw)?;
    (&slave).write_all(b"last words")?;
    drop(slave);

    let crash = stage.crash()?;
    if crash.damage {
        take(&mut closed, 1)?;
    }
    writer.write_all(b"x")?;
    same("packet", &b"\0x"[..], &take(&mut packets, 2)?[..])?;
    same("last words", &b"last words"[..], &take(&mut closed, 10)?[..])?;
    let error = |file: &File| {
        let mut file = file;
        file.read(&mut [0]).map_err(|e| e.raw_os_error())
    };
    same("behind them", &Err(Some(libc::EIO)), &error(&closed))?;
    same("a master that never had a slave", &Err(Some(libc::EAGAIN)), &error(&lonely))
}

/// A slave whose master is gone: end of file and EIO.
pub fn hung_up(stage: &mut Stage) -> Result<()> {
    let (master, mut slave) = pair_with(raw)?;
    drop(master);

    let crash = stage.crash()?;
    if crash.damage {
        slave = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    }
    same("end of file", &0, &slave.read(&mut [0])?)?;
    let error = slave.write(b"x").map_err(|e| e.raw_os_error());
    same("write", &Err(Some(libc::EIO)), &error)
}
