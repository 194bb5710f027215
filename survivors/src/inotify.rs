//! inotify: what is watched, under which numbers.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::libc;

use crate::Stage;
use crate::child::Child;
use crate::procfs::same;

/// Watch descriptor, mask, name.
type Event = (i32, u32, String);

struct Inotify(OwnedFd);

impl Inotify {
    fn new(flags: i32) -> Result<Self> {
        // SAFETY: numbers only; the descriptor that comes back is nobody else's.
        unsafe {
            let fd = Errno::result(libc::inotify_init1(flags | libc::IN_CLOEXEC))?;
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }

    fn add(&self, path: &Path, mask: u32) -> Result<i32> {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the path is NUL-terminated.
        Ok(Errno::result(unsafe { libc::inotify_add_watch(self.0.as_raw_fd(), path.as_ptr(), mask) })?)
    }

    fn remove(&self, wd: i32) -> Result<(), Errno> {
        // SAFETY: numbers only.
        Errno::result(unsafe { libc::inotify_rm_watch(self.0.as_raw_fd(), wd) }).map(drop)
    }

    /// What is there; waits for something if the instance blocks.
    fn read(&self) -> Result<Vec<Event>> {
        let mut buffer = [0; 4096];
        let count = match nix::unistd::read(&self.0, &mut buffer) {
            Err(Errno::EAGAIN) => 0,
            other => other?,
        };
        let mut rest = &buffer[..count];
        let mut events = Vec::new();
        while let Some((head, tail)) = rest.split_first_chunk::<16>() {
            let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            let (name, next) = tail.split_at((word(12) as usize).min(tail.len()));
            let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
            events.push((word(0) as i32, word(4), name));
            rest = next;
        }
        Ok(events)
    }
}

/// A directory and a file.
pub fn watch(stage: &mut Stage) -> Result<()> {
    // Who has them open keeps their names in memory.
    watched(stage, |dir, file| Ok(vec![File::open(dir)?, File::open(file)?]))
}

/// The same, when the kernel has forgotten what they are called: a watch keeps the inode in memory, not its names.
pub fn forgotten(stage: &mut Stage) -> Result<()> {
    watched(stage, |_, _| {
        // Inodes with something to write stay; names that were just used are passed over once.
        nix::unistd::sync();
        (0..4).try_for_each(|_| fs::write("/proc/sys/vm/drop_caches", "2"))?;
        Ok(Vec::new())
    })
}

/// `prepare` is told of both, and what it opens stays open.
fn watched(stage: &mut Stage, prepare: impl FnOnce(&Path, &Path) -> Result<Vec<File>>) -> Result<()> {
    let dir = stage.path("directory");
    fs::create_dir(&dir)?;
    let file = stage.path("file");
    fs::write(&file, "")?;
    let inotify = Inotify::new(libc::IN_NONBLOCK)?;
    let of_dir = inotify.add(&dir, libc::IN_CREATE | libc::IN_DELETE)?;
    let of_file = inotify.add(&file, libc::IN_MODIFY | libc::IN_ATTRIB)?;
    let open = prepare(&dir, &file)?;

    let crash = stage.crash()?;
    if crash.damage {
        inotify.remove(of_dir)?;
    }
    same("events", &Vec::<Event>::new(), &inotify.read()?)?;
    fs::write(dir.join("new"), "")?;
    fs::write(&file, "changed")?;
    fs::remove_file(dir.join("new"))?;
    let expected = vec![
        (of_dir, libc::IN_CREATE, "new".to_owned()),
        (of_file, libc::IN_MODIFY, String::new()),
        (of_dir, libc::IN_DELETE, "new".to_owned()),
    ];
    same("events", &expected, &inotify.read()?)?;
    drop(open);
    same("the same watch once more", &of_dir, &inotify.add(&dir, libc::IN_CREATE)?)
}

/// Watches that were removed have left gaps between the numbers.
pub fn numbers(stage: &mut Stage) -> Result<()> {
    let inotify = Inotify::new(libc::IN_NONBLOCK)?;
    let path = |index: usize| stage.path(&format!("file{index}"));
    for index in 0..6 {
        fs::write(path(index), "")?;
    }
    let wds: Vec<i32> =
        (0..5).map(|index| inotify.add(&path(index), libc::IN_MODIFY)).collect::<Result<_>>()?;
    for index in [0, 2, 4] {
        inotify.remove(wds[index])?;
    }
    same("removed watches", &3, &inotify.read()?.len())?;

    let crash = stage.crash()?;
    if crash.damage {
        inotify.remove(wds[3])?;
    }
    let path = |index: usize| stage.path(&format!("file{index}"));
    fs::write(path(3), "x")?;
    fs::write(path(1), "x")?;
    let modified = |index: usize| (wds[index], libc::IN_MODIFY, String::new());
    same("events", &vec![modified(3), modified(1)], &inotify.read()?)?;
    same("removing what is not watched", &Err(Errno::EINVAL), &inotify.remove(wds[2]))?;
    same("number of a new watch", &(wds[4] + 1), &inotify.add(&path(5), libc::IN_MODIFY)?)
}

/// Events that nobody has read yet: they are there, or the kernel says that some were lost.
pub fn unread(stage: &mut Stage) -> Result<()> {
    let dir = stage.path("directory");
    fs::create_dir(&dir)?;
    let inotify = Inotify::new(0)?;
    let wd = inotify.add(&dir, libc::IN_CREATE)?;
    let created = |name: &str| (wd, libc::IN_CREATE, name.to_owned());
    fs::write(dir.join("one"), "")?;
    fs::write(dir.join("two"), "")?;

    let crash = stage.crash()?;
    if crash.damage {
        inotify.read()?;
    }
    fs::write(dir.join("three"), "")?;
    let events = inotify.read()?;
    let overflow = (-1, libc::IN_Q_OVERFLOW, String::new());
    let there = [created("one"), created("two"), created("three")];
    ensure!(events == there || events == [overflow, created("three")], "unexpected: {events:?}");
    Ok(())
}

/// A child blocked in read(2).
pub fn blocked(stage: &mut Stage) -> Result<()> {
    let dir = stage.path("directory");
    fs::create_dir(&dir)?;
    let mut child = Child::fork(stage, "blocked", |stage, ready| {
        let inotify = Inotify::new(0)?;
        let wd = inotify.add(&dir, libc::IN_CREATE)?;
        ready.announce()?;
        let events = inotify.read()?;
        ensure!(stage.in_another_kernel(), "it read {events:?} before the crash");
        same("events", &vec![(wd, libc::IN_CREATE, "good".to_owned())], &events)
    })?;

    let crash = stage.crash()?;
    fs::write(dir.join(if crash.damage { "bad" } else { "good" }), "")?;
    child.join()
}
