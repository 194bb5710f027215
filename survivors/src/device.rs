//! Character devices that the machine has again.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Result, ensure};
use nix::libc;

use crate::Stage;

/// The kernel's log, open for reading and writing: what is written comes out again.
pub fn kmsg(stage: &mut Stage) -> Result<()> {
    let open = || File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
    let Ok(mut log) = open() else {
        let crash = stage.crash()?;
        ensure!(!crash.damage, "there is no log to damage");
        return Ok(());
    };
    let crash = stage.crash()?;
    if crash.damage {
        log = File::open("/dev/null")?;
    }
    let text = format!("otherworld survivor {}", std::process::id());
    log.write_all(format!("<6>{text}\n").as_bytes())?;
    let mut record = [0; 8192];
    // The log holds fewer than this.
    for _ in 0..100_000 {
        match log.read(&mut record) {
            Ok(len) if String::from_utf8_lossy(&record[..len]).contains(&text) => return Ok(()),
            Ok(0) => break,
            Ok(_) => {}
            // Records were overwritten meanwhile.
            Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e.into()),
        }
    }
    anyhow::bail!("what was written to the log does not come out of it")
}
