//! Huge pages that are set aside (hugetlbfs).

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};

use crate::Stage;
use crate::child::Child;
use crate::map::{Map, PAGE};
use crate::prng;
use crate::procfs::{self, same};

/// The default size.
const HUGE: usize = 2 << 20;

fn is_huge(map: &Map) -> Result<bool> {
    let flags = procfs::mapping(map.address())?.flags;
    let kib = procfs::smaps_value(std::process::id() as i32, map.address(), "KernelPageSize")?;
    Ok(flags.split_whitespace().any(|flag| flag == "ht") && kib == (HUGE / 1024) as u64)
}

/// Private memory: parent and child after a fork, one page written by the child; and a page that may only be read.
pub fn private(stage: &mut Stage) -> Result<()> {
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB;
    let mut map = Map::anonymous(2 * HUGE, flags)?;
    prng::fill(1, map.bytes_mut());
    let mut read_only = Map::anonymous(HUGE, flags)?;
    prng::fill(2, read_only.bytes_mut());
    read_only.protect(0, HUGE / PAGE, ProtFlags::PROT_READ)?;
    let before = [&map, &read_only].map(|map| procfs::mapping(map.address()).ok());
    let mut child = Child::fork(stage, "private", |stage, ready| {
        prng::fill(3, &mut map.bytes_mut()[..HUGE]);
        ready.announce()?;
        if stage.wait().damage {
            map.bytes_mut()[HUGE] ^= 1;
        }
        prng::verify(3, &map.bytes()[..HUGE]).context("what the child wrote")?;
        ensure!(map.bytes()[HUGE..] == prng::bytes(1, 2 * HUGE)[HUGE..], "what the child shares differs");
        Ok(())
    })?;

    stage.crash()?;
    prng::verify(1, map.bytes())?;
    prng::verify(2, read_only.bytes()).context("the read-only page")?;
    same("mappings", &before, &[&map, &read_only].map(|map| procfs::mapping(map.address()).ok()))?;
    ensure!(is_huge(&map)? && is_huge(&read_only)?, "its pages are small");
    child.join()
}

/// Shared memory: of a process and its child, and of a file without a name.
pub fn shared(stage: &mut Stage) -> Result<()> {
    let mut map = Map::anonymous(2 * HUGE, MapFlags::MAP_SHARED | MapFlags::MAP_HUGETLB)?;
    prng::fill(4, map.bytes_mut());
    let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB;
    // SAFETY: a NUL-terminated name; the descriptor is ours.
    let memfd = unsafe { File::from_raw_fd(Errno::result(libc::memfd_create(c"huge".as_ptr(), flags))?) };
    memfd.set_len(2 * HUGE as u64)?;
    {
        let mut part = Map::file(&memfd, HUGE, MapFlags::MAP_SHARED)?;
        prng::fill(5, part.bytes_mut());
    }
    let mut child = Child::fork(stage, "shared", |stage, ready| {
        ready.announce()?;
        if stage.wait().damage {
            map.bytes_mut()[HUGE + 7] ^= 1;
        }
        prng::verify(4, map.bytes()).context("in the child")?;
        map.bytes_mut()[0] ^= 0xff;
        Ok(())
    })?;

    stage.crash()?;
    child.join()?;
    ensure!(map.bytes()[0] == prng::bytes(4, 1)[0] ^ 0xff, "what the child wrote does not show");
    ensure!(map.bytes()[1..] == prng::bytes(4, 2 * HUGE)[1..], "the shared memory differs");
    ensure!(is_huge(&map)?, "its pages are small");
    same("size of the memfd", &(2 * HUGE as u64), &memfd.metadata()?.len())?;
    let link = fs::read_link(format!("/proc/self/fd/{}", memfd.as_raw_fd()))?;
    same("its name", "/memfd:huge (deleted)", &link.to_string_lossy())?;
    let part = Map::file(&memfd, HUGE, MapFlags::MAP_SHARED)?;
    prng::verify(5, part.bytes()).context("the memfd")
}

/// What nobody has mapped: a System V segment, and a file on a hugetlbfs.
pub fn unmapped(stage: &mut Stage) -> Result<()> {
    // SAFETY: numbers only.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, HUGE, libc::IPC_CREAT | libc::SHM_HUGETLB | 0o600) };
    let id = Errno::result(id).context("shmget")?;
    let path = format!("/dev/hugepages/survivor-{}", std::process::id());
    // SAFETY: attaches one huge page at an address of the kernel's choice, which is detached before the slice could be used again.
    let with_segment = |f: &mut dyn FnMut(&mut [u8]) -> Result<()>| unsafe {
        let start = libc::shmat(id, std::ptr::null(), 0);
        ensure!(start as isize != -1, "shmat: {}", Errno::last());
        let outcome = f(std::slice::from_raw_parts_mut(start.cast(), HUGE));
        libc::shmdt(start);
        outcome
    };
    let work = |stage: &mut Stage| -> Result<()> {
        with_segment(&mut |bytes| {
            prng::fill(6, bytes);
            Ok(())
        })?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        file.set_len(HUGE as u64)?;
        prng::fill(7, Map::file(&file, HUGE, MapFlags::MAP_SHARED)?.bytes_mut());
        drop(file);

        let crash = stage.crash()?;
        with_segment(&mut |bytes| {
            if crash.damage {
                bytes[9] ^= 1;
            }
            prng::verify(6, bytes).context("the segment")
        })?;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        prng::verify(7, Map::file(&file, HUGE, MapFlags::MAP_SHARED)?.bytes()).context("the file")
    };
    let outcome = work(stage);
    _ = fs::remove_file(&path);
    // SAFETY: IPC_RMID looks at no buffer.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    outcome
}
