//! File locks and leases: who holds them, and who waits.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{getpid, pipe};

use crate::Stage;
use crate::await_signal::{await_signal, block};
use crate::child::Child;
use crate::procfs::same;

fn open(path: &Path) -> Result<File> {
    Ok(OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?)
}

fn flock(file: &File, operation: i32) -> Result<(), Errno> {
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::flock(file.as_raw_fd(), operation) }).map(drop)
}

/// A range: type, first byte, length (0: to the end), and in answers the holder.
type Range = (i32, i64, i64, i32);

fn range(file: &File, command: i32, kind: i32, start: i64, len: i64) -> Result<Range, Errno> {
    let mut lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: all commands used here take a struct flock.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) })?;
    Ok((lock.l_type.into(), lock.l_start, lock.l_len, lock.l_pid))
}

/// What stands in the way of a lock of this type.
fn obstacle(file: &File, kind: i32, start: i64, len: i64) -> Result<Option<Range>> {
    let found = range(file, libc::F_GETLK, kind, start, len)?;
    Ok((found.0 != libc::F_UNLCK).then_some(found))
}

/// flock: held across dup, until the last descriptor is closed.
pub fn whole(stage: &mut Stage) -> Result<()> {
    let file = open(&stage.path("exclusive"))?;
    flock(&file, libc::LOCK_EX)?;
    let twin = file.try_clone()?;
    let shared = open(&stage.path("shared"))?;
    flock(&shared, libc::LOCK_SH)?;

    let crash = stage.crash()?;
    if crash.damage {
        flock(&twin, libc::LOCK_UN)?;
    }
    let other = open(&stage.path("exclusive"))?;
    let attempt = |operation| flock(&other, operation | libc::LOCK_NB);
    same("exclusive lock of another", &Err(Errno::EWOULDBLOCK), &attempt(libc::LOCK_EX))?;
    same("shared lock of another", &Err(Errno::EWOULDBLOCK), &attempt(libc::LOCK_SH))?;
    drop(file);
    same("after one of two descriptors is closed", &Err(Errno::EWOULDBLOCK), &attempt(libc::LOCK_EX))?;
    drop(twin);
    same("after the other one is closed", &Ok(()), &attempt(libc::LOCK_EX))?;
    let reader = open(&stage.path("shared"))?;
    same("a second shared lock", &Ok(()), &flock(&reader, libc::LOCK_SH | libc::LOCK_NB))?;
    same("but no exclusive one", &Err(Errno::EWOULDBLOCK), &flock(&reader, libc::LOCK_EX | libc::LOCK_NB))?;
    flock(&shared, libc::LOCK_UN)?;
    same("until it is released", &Ok(()), &flock(&reader, libc::LOCK_EX | libc::LOCK_NB))
}

/// Record locks of two processes on one file.
pub fn records(stage: &mut Stage) -> Result<()> {
    let path = stage.path("file");
    let file = open(&path)?;
    let (reader, writer) = pipe()?;
    let (mut reader, mut writer) = (File::from(reader), File::from(writer));
    let parent = getpid().as_raw();
    let mut child = Child::fork(stage, "records", |_, ready| {
        let file = open(&path)?;
        range(&file, libc::F_SETLK, libc::F_WRLCK, 0, 50)?;
        ready.announce()?;
        reader.read_exact(&mut [0])?;
        let found = |kind, start, len| obstacle(&file, kind, start, len);
        same("the write lock", &Some((libc::F_WRLCK, 100, 100, parent)), &found(libc::F_RDLCK, 150, 1)?)?;
        same("the read lock", &Some((libc::F_RDLCK, 300, 0, parent)), &found(libc::F_WRLCK, 1 << 40, 5)?)?;
        same("reading beside it", &None, &found(libc::F_RDLCK, 300, 0)?)?;
        same("between them", &None, &found(libc::F_WRLCK, 200, 100)?)?;
        same("before them", &None, &found(libc::F_WRLCK, 0, 100)?)?;
        let taken = range(&file, libc::F_SETLK, libc::F_WRLCK, 199, 1);
        same("taking it", &Err(Errno::EAGAIN), &taken)
    })?;
    range(&file, libc::F_SETLK, libc::F_WRLCK, 100, 100)?;
    range(&file, libc::F_SETLK, libc::F_RDLCK, 300, 0)?;

    let crash = stage.crash()?;
    if crash.damage {
        range(&file, libc::F_SETLK, libc::F_UNLCK, 150, 1)?;
    }
    let of_child = Some((libc::F_WRLCK, 0, 50, child.pid().as_raw()));
    same("the child's lock", &of_child, &obstacle(&file, libc::F_WRLCK, 0, 0)?)?;
    writer.write_all(b"x")?;
    child.join()?;
    same("after the child's end", &None, &obstacle(&file, libc::F_WRLCK, 0, 50)?)
}

/// Open file description locks.
pub fn description(stage: &mut Stage) -> Result<()> {
    const F_OFD_SETLK: i32 = 37;
    let path = stage.path("file");
    let file = open(&path)?;
    range(&file, F_OFD_SETLK, libc::F_WRLCK, 10, 10)?;
    let twin = file.try_clone()?;

    let crash = stage.crash()?;
    if crash.damage {
        range(&twin, F_OFD_SETLK, libc::F_UNLCK, 10, 1)?;
    }
    let other = open(&path)?;
    let attempt = |start, len| range(&other, F_OFD_SETLK, libc::F_WRLCK, start, len).map(drop);
    same("its first byte", &Err(Errno::EAGAIN), &attempt(10, 1))?;
    same("its last byte", &Err(Errno::EAGAIN), &attempt(19, 1))?;
    same("before it", &Ok(()), &attempt(0, 10))?;
    same("after it", &Ok(()), &attempt(20, 0))?;
    drop(file);
    same("after one of two descriptors is closed", &Err(Errno::EAGAIN), &attempt(10, 10))?;
    drop(twin);
    same("after the other one is closed", &Ok(()), &attempt(10, 10))
}

/// A child that waits for what its parent holds.
fn waiter(
    stage: &mut Stage,
    lock: impl Fn(&File) -> Result<(), Errno>,
    unlock: impl Fn(&File) -> Result<(), Errno>,
) -> Result<()> {
    let path = stage.path("file");
    let file = open(&path)?;
    lock(&file)?;
    let mut child = Child::fork(stage, "waiter", |stage, ready| {
        let file = open(&path)?;
        ready.announce()?;
        lock(&file)?;
        ensure!(stage.in_another_kernel(), "it got the lock before the crash");
        Ok(())
    })?;

    let crash = stage.crash()?;
    if crash.damage {
        kill(child.pid(), Signal::SIGKILL)?;
    }
    let state = waitpid(child.pid(), Some(WaitPidFlag::WNOHANG))?;
    same("the child", &WaitStatus::StillAlive, &state)?;
    unlock(&file)?;
    child.join()
}

/// Blocked in fcntl(F_SETLKW).
pub fn record_waiter(stage: &mut Stage) -> Result<()> {
    waiter(
        stage,
        |file| range(file, libc::F_SETLKW, libc::F_WRLCK, 5, 5).map(drop),
        |file| range(file, libc::F_SETLK, libc::F_UNLCK, 0, 0).map(drop),
    )
}

/// Blocked in flock.
pub fn whole_waiter(stage: &mut Stage) -> Result<()> {
    waiter(stage, |file| flock(file, libc::LOCK_EX), |file| flock(file, libc::LOCK_UN))
}

/// A write lease: who opens the file is held up, and the holder is told by a signal that names its descriptor.
pub fn lease(stage: &mut Stage) -> Result<()> {
    const F_SETSIG: i32 = 10;
    let signal = libc::SIGRTMIN() + 3;
    block(&[signal])?;
    let path = stage.path("file");
    let file = open(&path)?;
    let fcntl = |command: i32, argument: i32| {
        // SAFETY: all commands used here take a number.
        Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, argument) })
    };
    fcntl(F_SETSIG, signal)?;
    fcntl(libc::F_SETLEASE, libc::F_WRLCK)?;

    let crash = stage.crash()?;
    if crash.damage {
        fcntl(libc::F_SETLEASE, libc::F_UNLCK)?;
    }
    same("the lease", &libc::F_WRLCK, &fcntl(libc::F_GETLEASE, 0)?)?;
    let open_now =
        || rustix::fs::open(&path, rustix::fs::OFlags::NONBLOCK, rustix::fs::Mode::empty()).map(drop);
    same("opening it", &Err(rustix::io::Errno::AGAIN), &open_now())?;
    let told = await_signal(&[signal])?;
    same("signal and descriptor", &(signal, file.as_raw_fd()), &(told.signo, told.fd))?;
    fcntl(libc::F_SETLEASE, libc::F_UNLCK)?;
    same("opening it without a lease", &Ok(()), &open_now())
}
