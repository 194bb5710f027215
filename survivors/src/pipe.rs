//! Pipes and FIFOs: what is in them, and who waits at their ends.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{pipe, pipe2};

use crate::Stage;
use crate::child::Child;
use crate::prng;
use crate::procfs::same;

fn files(ends: (std::os::fd::OwnedFd, std::os::fd::OwnedFd)) -> (File, File) {
    (ends.0.into(), ends.1.into())
}

/// Bytes on their way, some of the first page already read.
pub fn content(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 50_000;
    let (mut reader, mut writer) = files(pipe()?);
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 18))?;
    writer.write_all(&prng::bytes(1, LEN))?;
    let mut head = [0; 777];
    reader.read_exact(&mut head)?;

    let crash = stage.crash()?;
    if crash.damage {
        reader.read_exact(&mut [0; 1])?;
    }
    same("capacity", &(1 << 18), &fcntl(&reader, FcntlArg::F_GETPIPE_SZ)?)?;
    writer.write_all(b"tail")?;
    drop(writer);
    let mut rest = head.to_vec();
    reader.read_to_end(&mut rest)?;
    same("bytes", &(LEN + 4), &rest.len())?;
    prng::verify(1, &rest[..LEN])?;
    same("what was written after the crash", &b"tail"[..], &rest[LEN..])
}

/// O_DIRECT: one read, one packet.
pub fn packet(stage: &mut Stage) -> Result<()> {
    let (mut reader, mut writer) = files(pipe2(OFlag::O_DIRECT)?);
    let sizes = [10, 4096, 1, 300];
    for (index, size) in sizes.into_iter().enumerate() {
        writer.write_all(&prng::bytes(index as u64, size))?;
    }

    let crash = stage.crash()?;
    let mut buffer = [0; 8192];
    if crash.damage {
        same("size of the packet taken away", &10, &reader.read(&mut buffer)?)?;
    }
    writer.write_all(&prng::bytes(4, 20))?;
    writer.write_all(&prng::bytes(5, 30))?;
    for (index, size) in sizes.into_iter().chain([20, 30]).enumerate() {
        same(&format!("size of packet {index}"), &size, &reader.read(&mut buffer)?)?;
        prng::verify(index as u64, &buffer[..size]).with_context(|| format!("packet {index}"))?;
    }
    Ok(())
}

/// A child blocked in read(2) on an empty pipe.
pub fn reader(stage: &mut Stage) -> Result<()> {
    let (mut reader, mut writer) = files(pipe()?);
    let mut child = Child::fork(stage, "reader", |_, ready| {
        drop(writer.try_clone()); // not closed here: the child must not see an end of file by accident
        ready.announce()?;
        let mut bytes = [0; 5000];
        reader.read_exact(&mut bytes)?;
        prng::verify(2, &bytes)
    })?;

    let crash = stage.crash()?;
    writer.write_all(&prng::bytes(if crash.damage { 3 } else { 2 }, 5000))?;
    child.join()
}

/// A child blocked in write(2), with the pipe full and the rest in its memory.
///
/// Whether the interrupted call itself returns short is not judged (write may); that no byte is lost or doubled is.
pub fn writer(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 1 << 20;
    let (mut reader, mut writer) = files(pipe()?);
    let mut child = Child::fork(stage, "writer", |_, ready| {
        let bytes = prng::bytes(4, LEN);
        ready.announce()?;
        writer.write_all(&bytes)?;
        Ok(())
    })?;
    drop(writer);

    let crash = stage.crash()?;
    if crash.damage {
        reader.read_exact(&mut [0; 8])?;
    }
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes)?;
    child.join()?;
    same("bytes", &LEN, &bytes.len())?;
    prng::verify(4, &bytes)
}

/// The other end is closed already.
pub fn closed(stage: &mut Stage) -> Result<()> {
    let (mut reader, mut writer) = files(pipe()?);
    writer.write_all(b"last words")?;
    drop(writer);
    let (gone, mut lonely) = files(pipe()?);
    drop(gone);

    let crash = stage.crash()?;
    if crash.damage {
        reader.read_exact(&mut [0; 4])?;
    }
    let mut words = String::new();
    reader.read_to_string(&mut words)?;
    same("content", &"last words".to_owned(), &words)?;
    let error = lonely.write(b"x").map_err(|error| error.raw_os_error());
    same("write without a reader", &Err(Some(Errno::EPIPE as i32)), &error)
}

/// A pipe with a name. Opened again by that name it is the same one.
pub fn fifo(stage: &mut Stage) -> Result<()> {
    let path = stage.path("fifo");
    nix::unistd::mkfifo(&path, Mode::S_IRWXU)?;
    let mut both = OpenOptions::new().read(true).write(true).open(&path)?;
    both.write_all(&prng::bytes(6, 3000))?;

    let crash = stage.crash()?;
    if crash.damage {
        both.read_exact(&mut [0; 1])?;
    }
    OpenOptions::new().write(true).open(&path)?.write_all(b"tail")?;
    let mut bytes = vec![0; 3004];
    let count = both.read(&mut bytes)?;
    same("bytes", &3004, &count)?;
    prng::verify(6, &bytes[..3000])?;
    ensure!(bytes.ends_with(b"tail"), "what was written by name is not in it");
    Ok(())
}
