//! Event counters.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;

use anyhow::Result;
use nix::errno::Errno;
use nix::libc;

use crate::Stage;
use crate::child::Child;
use crate::procfs::same;

/// A counter.
pub(crate) fn new(count: u32, flags: i32) -> Result<File> {
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    Ok(unsafe { File::from_raw_fd(Errno::result(libc::eventfd(count, flags | libc::EFD_CLOEXEC))?) })
}

fn read(mut file: &File) -> Result<u64, Errno> {
    let mut word = [0; 8];
    let read = file.read_exact(&mut word);
    read.map(|()| u64::from_ne_bytes(word)).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))
}

/// Its count, and that of one that nobody blocks on.
pub fn counter(stage: &mut Stage) -> Result<()> {
    let many = new(0, 0)?;
    (&many).write_all(&0x1_2345_6789u64.to_ne_bytes())?;
    let none = new(0, libc::EFD_NONBLOCK)?;

    let crash = stage.crash()?;
    if crash.damage {
        (&many).write_all(&1u64.to_ne_bytes())?;
    }
    same("count", &Ok(0x1_2345_6789), &read(&many))?;
    same("count of nothing", &Err(Errno::EAGAIN), &read(&none))?;
    (&none).write_all(&5u64.to_ne_bytes())?;
    same("new count", &Ok(5), &read(&none))
}

/// EFD_SEMAPHORE: one for each read.
pub fn semaphore(stage: &mut Stage) -> Result<()> {
    let file = new(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK)?;
    same("one", &Ok(1), &read(&file))?;

    let crash = stage.crash()?;
    if crash.damage {
        same("one taken away", &Ok(1), &read(&file))?;
    }
    for n in 0..2 {
        same(&format!("read {n}"), &Ok(1), &read(&file))?;
    }
    same("nothing left", &Err(Errno::EAGAIN), &read(&file))
}

/// A child blocked in read(2).
pub fn blocked(stage: &mut Stage) -> Result<()> {
    let file = new(0, 0)?;
    let mut child = Child::fork(stage, "reader", |_, ready| {
        ready.announce()?;
        same("count", &Ok(42), &read(&file))
    })?;

    let crash = stage.crash()?;
    (&file).write_all(&if crash.damage { 41u64 } else { 42 }.to_ne_bytes())?;
    child.join()
}
