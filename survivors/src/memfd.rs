//! Files in memory without a name: memfd_create, and POSIX shared memory after shm_unlink.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, shm_open, shm_unlink};
use nix::sys::stat::Mode;

use crate::Stage;
use crate::child::Child;
use crate::map::{Map, PAGE};
use crate::prng;
use crate::procfs::same;

/// Contents, holes, size, position and name; two open files of one object.
pub fn content(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 300_000;
    const HOLE: u64 = 4 << 20;
    let mut file = File::from(memfd_create("content", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&prng::bytes(1, LEN))?;
    file.set_len(HOLE + 7)?;
    file.seek(std::io::SeekFrom::Start(1000))?;
    let mut second = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    second.seek(std::io::SeekFrom::Start(2000))?;

    let crash = stage.crash()?;
    if crash.damage {
        nix::sys::uio::pwrite(&file, b"x", 5000)?;
    }
    same("position", &1000, &file.stream_position()?)?;
    same("size", &(HOLE + 7), &file.metadata()?.len())?;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    same("name", "/memfd:content (deleted)", &link.to_string_lossy())?;
    let mut rest = vec![0; LEN - 2000];
    second.read_exact(&mut rest)?;
    ensure!(rest == prng::bytes(1, LEN)[2000..], "the contents differ");
    // Both are still one object.
    nix::sys::uio::pwrite(&file, b"after", HOLE as i64 - 5)?;
    let mut word = [0; 5];
    nix::sys::uio::pread(&second, &mut word, HOLE as i64 - 5)?;
    same("what was written through the other one", b"after", &word)
}

/// Seals hold, and one that forbids new writable mappings does not hinder the old one.
pub fn seals(stage: &mut Stage) -> Result<()> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let open = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    let sealed = open | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    let future = SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE);
    let mut first = File::from(memfd_create("sealed", flags)?);
    first.write_all(&prng::bytes(2, 2 * PAGE))?;
    fcntl(&first, FcntlArg::F_ADD_SEALS(sealed))?;
    let second = File::from(memfd_create("future", flags)?);
    second.set_len(PAGE as u64)?;
    let mut map = Map::file(&second, PAGE, MapFlags::MAP_SHARED)?;
    fcntl(&second, FcntlArg::F_ADD_SEALS(future))?;
    let plain = File::from(memfd_create("plain", MFdFlags::MFD_CLOEXEC)?);

    let crash = stage.crash()?;
    if crash.damage {
        fcntl(&second, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW))?;
    }
    for (name, file, seals) in
        [("sealed", &first, sealed), ("future", &second, future), ("plain", &plain, SealFlag::F_SEAL_SEAL)]
    {
        same(name, &seals.bits(), &fcntl(file, FcntlArg::F_GET_SEALS)?)?;
    }
    same("write to what is sealed", &Err(Errno::EPERM), &nix::sys::uio::pwrite(&first, b"x", 0))?;
    map.bytes_mut()[0] = 9;
    ensure!(Map::file(&second, PAGE, MapFlags::MAP_SHARED).is_err(), "a new writable mapping was allowed");
    let mut bytes = vec![0; 2 * PAGE];
    first.rewind()?;
    first.read_exact(&mut bytes)?;
    prng::verify(2, &bytes)
}

/// Mapped by a parent and a child, the descriptor closed.
pub fn mapped(stage: &mut Stage) -> Result<()> {
    let file = File::from(memfd_create("mapped", MFdFlags::MFD_CLOEXEC)?);
    shared_by_two(stage, file)
}

/// POSIX shared memory whose name has been unlinked, mapped by a parent and a child.
pub fn posix(stage: &mut Stage) -> Result<()> {
    let name = format!("/survivor-{}", std::process::id());
    let fd = shm_open(name.as_str(), OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR, Mode::S_IRWXU)?;
    shm_unlink(name.as_str())?;
    shared_by_two(stage, File::from(fd))
}

fn shared_by_two(stage: &mut Stage, file: File) -> Result<()> {
    const LEN: usize = 64 * PAGE;
    file.set_len(LEN as u64)?;
    let mut map = Map::file(&file, LEN, MapFlags::MAP_SHARED)?;
    drop(file);
    prng::fill(3, map.bytes_mut());
    let damage = stage.options().damage;
    let mut child = Child::fork(stage, "other", |stage, ready| {
        ready.announce()?;
        stage.wait();
        prng::verify(3, &map.bytes()[..LEN - PAGE])?;
        map.bytes_mut()[LEN - 1] = if damage { 0 } else { 0x5a };
        Ok(())
    })?;

    map.bytes_mut()[LEN - 1] = 0;
    stage.crash()?;
    child.join()?;
    prng::verify(3, &map.bytes()[..LEN - PAGE])?;
    same("what the child wrote", &0x5a, &map.bytes()[LEN - 1])
}
