//! Pseudo-terminals.

use std::fs::File;
use std::io::{Read, Write};

use anyhow::Result;
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, OutputFlags, SetArg, tcgetattr, tcsetattr};

use crate::Stage;
use crate::procfs::same;

/// Both ends, with characters on their way.
pub fn pair(stage: &mut Stage) -> Result<()> {
    let ends = openpty(None, None)?;
    let mut settings = tcgetattr(&ends.slave)?;
    settings.local_flags.remove(LocalFlags::ECHO);
    settings.output_flags.remove(OutputFlags::OPOST);
    tcsetattr(&ends.slave, SetArg::TCSANOW, &settings)?;
    let (mut master, mut slave) = (File::from(ends.master), File::from(ends.slave));
    slave.write_all(b"output")?;

    let crash = stage.crash()?;
    if crash.damage {
        master.read_exact(&mut [0; 1])?;
    }
    let mut word = [0; 64];
    let count = master.read(&mut word)?;
    same("at the master", &b"output"[..], &word[..count])?;
    master.write_all(b"input\n")?;
    let count = slave.read(&mut word)?;
    same("at the slave", &b"input\n"[..], &word[..count])?;
    same("settings", &settings, &tcgetattr(&slave)?)
}
