//! inotify instances.
//!
//! Watch descriptors are given out by counting, so that the right numbers are had by watching something else for those that were given
//! up before. What that leaves in the queue is read away.

use std::ffi::CString;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use snapshot::{Inotify, MAX_WATCH_DESCRIPTOR, Watch};

use crate::handle::{Handles, path_of};
use crate::sys;

/// Removed watches leave an event each; the queue holds 16384 by default.
const DUMMIES_AT_ONCE: i32 = 256;
/// Longer queues than this (fs.inotify.max_queued_events) are not filled.
const MAX_QUEUE: usize = 1 << 20;
/// `struct inotify_event` without a name.
const EVENT: usize = 16;

/// An instance that watches nothing yet, non-blocking.
pub(crate) fn create() -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = Errno::result(libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Watches what was watched, under the same numbers. `is_new`: whether the file with this name has been made anew.
///
/// With `can_be_gone` a watch of something that is not there is removed, as the kernel does when a file goes; these are returned.
///
/// To be done when everything else has been opened: watched directories would report that.
pub(crate) fn watch(
    fd: BorrowedFd<'_>,
    inotify: &Inotify,
    is_new: &dyn Fn(&snapshot::Bytes) -> bool,
    can_be_gone: bool,
) -> Result<Vec<String>, String> {
    let (mut gone, mut kept) = (Vec::new(), Vec::new());
    let flags = sys::fcntl(fd.as_raw_fd(), libc::F_GETFL, 0).map_err(|e| e.to_string())?;
    set_flags(fd, flags | libc::O_NONBLOCK)?;
    let group = Group::new(fd)?;
    let mut next = 1;
    for watch in &inotify.watches {
        if watch.wd < next || watch.wd > MAX_WATCH_DESCRIPTOR {
            return Err(format!("watch descriptor {}", watch.wd));
        }
        group.skip(next, watch.wd)?;
        match group.add_as(watch, is_new) {
            Ok(()) => {}
            Err(why) if can_be_gone => {
                kept.push(group.add_gone(watch)?);
                gone.push((watch, why));
            }
            Err(why) => return Err(why),
        }
        next = watch.wd + 1;
    }
    // Numbers that were in use must not come up again soon.
    let wanted = i32::try_from(inotify.next).unwrap_or(i32::MAX);
    if (next..=MAX_WATCH_DESCRIPTOR).contains(&wanted) {
        group.skip(next, wanted)?;
    }
    group.drain()?;
    for (watch, _) in &gone {
        // It is told that there is nothing to watch any more (IN_IGNORED).
        group.remove(watch.wd)?;
    }
    if inotify.unread > 0 {
        group.overflow()?;
    }
    drop(kept);
    set_flags(fd, flags)?;
    Ok(gone.into_iter().map(|(_, why)| why).collect())
}

fn set_flags(fd: BorrowedFd<'_>, flags: i32) -> Result<(), String> {
    sys::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags.into()).map(drop).map_err(|e| format!("F_SETFL: {e}"))
}

/// What has these numbers on the file system that is mounted there.
fn by_number(mountpoint: &Path, ino: u64, generation: u32) -> Result<OwnedFd, String> {
    let handles = Handles::of(mountpoint).ok_or("its file system does not find files by number")?;
    handles.open(ino, generation).map_err(|e| e.to_string())?.ok_or_else(|| "it is not there any more".into())
}

struct Group<'a> {
    fd: BorrowedFd<'a>,
    /// Something that nobody else watches, opened by its name: what is done to it is reported.
    dummy: File,
    dummy_path: CString,
}

impl<'a> Group<'a> {
    fn new(fd: BorrowedFd<'a>) -> Result<Self, String> {
        let say = |e: std::io::Error| format!("a file to watch meanwhile: {e}");
        let memory = memfd_create(c"inotify", MFdFlags::MFD_CLOEXEC).map_err(|e| say(e.into()))?;
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let dummy = File::options().read(true).write(true).open(path).map_err(say)?;
        let dummy_path = format!("/proc/self/fd/{}", dummy.as_fd().as_raw_fd());
        let dummy_path = CString::new(dummy_path).map_err(|e| say(e.into()))?;
        Ok(Self { fd, dummy, dummy_path })
    }

    fn add(&self, path: &CString, mask: u32) -> Result<i32, Errno> {
        // SAFETY: the path is NUL-terminated.
        Errno::result(unsafe { libc::inotify_add_watch(self.fd.as_raw_fd(), path.as_ptr(), mask) })
    }

    fn remove(&self, wd: i32) -> Result<(), String> {
        // SAFETY: numbers only.
        Errno::result(unsafe { libc::inotify_rm_watch(self.fd.as_raw_fd(), wd) })
            .map(drop)
            .map_err(|e| format!("inotify_rm_watch: {e}"))
    }

    fn add_as(&self, watch: &Watch, is_new: &dyn Fn(&snapshot::Bytes) -> bool) -> Result<(), String> {
        let path = watch.path.as_path();
        let at = |what: &dyn std::fmt::Display| match watch.generation {
            None => format!("watch {} on {}: {what}", watch.wd, path.display()),
            Some(_) => format!("watch {} on inode {} below {}: {what}", watch.wd, watch.ino, path.display()),
        };
        let found = watch.generation.map(|generation| by_number(path, watch.ino, generation));
        let found = found.transpose().map_err(|why| at(&why))?;
        let name = found.as_ref().map_or_else(|| path.to_owned(), path_of);
        let meta = if found.is_some() { name.metadata() } else { name.symlink_metadata() };
        let meta = meta.map_err(|e| at(&e))?;
        if meta.mode() & libc::S_IFMT != watch.file_type
            || !watch.volatile && meta.ino() != watch.ino && !is_new(&watch.path)
        {
            return Err(at(&"it is another file now"));
        }
        let follow = if found.is_some() { 0 } else { libc::IN_DONT_FOLLOW };
        let name = sys::c_path(&name).map_err(|e| at(&e))?;
        match self.add(&name, watch.mask | follow | libc::IN_MASK_CREATE) {
            Ok(wd) if wd == watch.wd => Ok(()),
            Ok(wd) => Err(at(&format!("it got the watch descriptor {wd}"))),
            Err(e) => Err(at(&e)),
        }
    }

    /// Watches nothing of interest under the number of a watch that has to go; lasts as long as what comes back.
    fn add_gone(&self, watch: &Watch) -> Result<OwnedFd, String> {
        let dummy = memfd_create(c"gone", MFdFlags::MFD_CLOEXEC).map_err(|e| format!("memfd_create: {e}"))?;
        let path = CString::new(format!("/proc/self/fd/{}", dummy.as_raw_fd())).map_err(|e| e.to_string())?;
        match self.add(&path, libc::IN_MOVE_SELF) {
            Ok(wd) if wd == watch.wd => Ok(dummy),
            Ok(wd) => Err(format!("it got the watch descriptor {wd} instead of {}", watch.wd)),
            Err(e) => Err(format!("inotify_add_watch: {e}")),
        }
    }

    /// Lets the numbers from `next` up to `wanted`, without that, pass by.
    fn skip(&self, next: i32, wanted: i32) -> Result<(), String> {
        for number in next..wanted {
            let wd =
                self.add(&self.dummy_path, libc::IN_MODIFY).map_err(|e| format!("inotify_add_watch: {e}"))?;
            self.remove(wd)?;
            if wd != number {
                return Err(format!("watch descriptor {wd} came after {}", number - 1));
            }
            if number % DUMMIES_AT_ONCE == 0 {
                self.drain()?;
            }
        }
        Ok(())
    }

    fn drain(&self) -> Result<(), String> {
        let mut buffer = [0; 1 << 16];
        loop {
            match nix::unistd::read(self.fd, &mut buffer) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(format!("read: {e}")),
            }
        }
    }

    /// Makes the kernel say that events were lost (IN_Q_OVERFLOW), and nothing else.
    fn overflow(&self) -> Result<(), String> {
        let say = |e: std::io::Error| format!("fill the queue: {e}");
        let text = sys::read_proc("/proc/sys/fs/inotify/max_queued_events").map_err(say)?;
        let limit: usize =
            String::from_utf8_lossy(&text).trim().parse().map_err(|_| say(ErrorKind::InvalidData.into()))?;
        if limit > MAX_QUEUE {
            return Err(format!("a queue of {limit} events is not filled"));
        }
        // A number of its own, which then is passed.
        let wd = self
            .add(&self.dummy_path, libc::IN_MODIFY | libc::IN_ACCESS)
            .map_err(|e| format!("inotify_add_watch: {e}"))?;
        // The same event twice is one: two kinds, alternately.
        let mut dummy = &self.dummy;
        for _ in 0..=limit / 2 {
            dummy.write_all(b"x").map_err(say)?;
            std::os::unix::fs::FileExt::read_at(dummy, &mut [0], 0).map_err(say)?;
        }
        // Its own event finds the queue full.
        self.remove(wd)?;
        let mut buffer = vec![0; limit * EVENT];
        let mut taken = 0;
        while taken < buffer.len() {
            match (&File::from(self.fd.try_clone_to_owned().map_err(say)?)).read(&mut buffer[taken..]) {
                Ok(0) => break,
                Ok(n) => taken += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(say(e)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(fd: &OwnedFd) -> Vec<(i32, u32)> {
        let mut buffer = [0; 4096];
        let n = nix::unistd::read(fd, &mut buffer).unwrap_or(0);
        let mut rest = &buffer[..n];
        let mut found = Vec::new();
        let word = |b: &[u8], at: usize| u32::from_ne_bytes(b[at..at + 4].try_into().unwrap());
        while rest.len() >= EVENT {
            found.push((word(rest, 0) as i32, word(rest, 4)));
            rest = &rest[EVENT + word(rest, 12) as usize..];
        }
        found
    }

    fn watch_on(path: &std::path::Path, wd: i32, mask: u32) -> Watch {
        use std::os::unix::ffi::OsStrExt;
        let meta = std::fs::metadata(path).unwrap();
        Watch {
            wd,
            path: path.as_os_str().as_bytes().into(),
            generation: None,
            mask,
            ino: meta.ino(),
            file_type: meta.mode() & libc::S_IFMT,
            volatile: false,
            unsupported: None,
        }
    }

    #[test]
    fn watches_have_their_numbers_and_the_queue_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, "").unwrap();
        std::fs::write(&b, "").unwrap();
        let watches = vec![watch_on(&a, 3, libc::IN_MODIFY), watch_on(&b, 700, libc::IN_MODIFY)];
        let fd = create().unwrap();
        watch(fd.as_fd(), &Inotify { watches, next: 1000, unread: 0 }, &|_| false, false).unwrap();
        assert_eq!(events(&fd), []);
        std::fs::write(&b, "b").unwrap();
        std::fs::write(&a, "a").unwrap();
        assert_eq!(events(&fd), [(700, libc::IN_MODIFY), (3, libc::IN_MODIFY)]);
        let path = sys::c_path(dir.path()).unwrap();
        // SAFETY: the path is NUL-terminated.
        assert_eq!(unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), libc::IN_CREATE) }, 1000);
    }

    #[test]
    fn lost_events_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let watches = vec![watch_on(dir.path(), 1, libc::IN_CREATE)];
        let fd = create().unwrap();
        watch(fd.as_fd(), &Inotify { watches, next: 2, unread: 5 }, &|_| false, false).unwrap();
        assert_eq!(events(&fd), [(-1, libc::IN_Q_OVERFLOW)]);
        std::fs::write(dir.path().join("new"), "").unwrap();
        assert_eq!(events(&fd), [(1, libc::IN_CREATE)]);
    }

    #[test]
    fn another_file_is_not_watched() {
        let dir = tempfile::tempdir().unwrap();
        let other = Watch { ino: 1, ..watch_on(dir.path(), 1, libc::IN_CREATE) };
        let inotify = Inotify { watches: vec![other], next: 2, unread: 0 };
        assert!(watch(create().unwrap().as_fd(), &inotify, &|_| false, false).is_err());
        assert!(watch(create().unwrap().as_fd(), &inotify, &|_| true, false).is_ok());
    }

    #[test]
    fn a_watch_of_what_is_not_there_is_told_to_be_gone() {
        let dir = tempfile::tempdir().unwrap();
        let there = watch_on(dir.path(), 2, libc::IN_CREATE);
        let gone = Watch { path: "/nowhere".into(), wd: 5, ..there.clone() };
        let inotify = Inotify { watches: vec![there, gone], next: 6, unread: 0 };
        assert!(watch(create().unwrap().as_fd(), &inotify, &|_| false, false).is_err());
        let fd = create().unwrap();
        assert_eq!(watch(fd.as_fd(), &inotify, &|_| false, true).unwrap().len(), 1);
        assert_eq!(events(&fd), [(5, libc::IN_IGNORED)]);
        std::fs::write(dir.path().join("new"), "").unwrap();
        assert_eq!(events(&fd), [(2, libc::IN_CREATE)]);
    }
}
