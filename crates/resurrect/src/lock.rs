//! File locks and leases.
//!
//! Record locks belong to a process and are gone when it closes any descriptor of the file: it takes them itself, when the only
//! descriptors that it has are its own. So it does with those of its open files, to be named in /proc/locks. What nobody has taken then
//! (because the one who had done it before is not there any more) is taken from here.

use std::collections::BTreeSet;
use std::os::fd::RawFd;

use nix::errno::Errno;
use snapshot::{FileId, InodeId, Lock, LockKind, LockOwner, Process, Snapshot};

use crate::file::Files;
use crate::inject::{Call, call};
use crate::sys;

const F_OFD_SETLK: i32 = 37;
const F_SETLEASE: i32 = 1024;
const F_GETLEASE: i32 = 1025;

/// `struct flock` of x86-64.
fn flock(lock: &Lock) -> [u8; 32] {
    let mut bytes = [0; 32];
    let kind = if lock.exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as i16;
    bytes[..2].copy_from_slice(&kind.to_ne_bytes());
    bytes[2..4].copy_from_slice(&(libc::SEEK_SET as i16).to_ne_bytes());
    bytes[8..16].copy_from_slice(&lock.start.to_ne_bytes());
    bytes[16..24].copy_from_slice(&lock.length().to_ne_bytes());
    bytes
}

fn operation(lock: &Lock) -> i32 {
    (if lock.exclusive { libc::LOCK_EX } else { libc::LOCK_SH }) | libc::LOCK_NB
}

fn lease(lock: &Lock) -> i32 {
    if lock.exclusive { libc::F_WRLCK } else { libc::F_RDLCK }
}

/// The calls with which a process takes its locks, through its own descriptors.
pub(crate) fn take(snapshot: &Snapshot, process: &Process) -> Vec<Call> {
    let mut calls = Vec::new();
    for lock in &snapshot.locks {
        let what = || {
            let path = snapshot.inodes.get(&lock.inode).map(|i| i.path.to_string()).unwrap_or_default();
            format!("{:?} lock on {path}", lock.kind).to_lowercase()
        };
        let fd = match lock.owner {
            LockOwner::Table(table) if table != process.files_id => continue,
            LockOwner::Table(_) => lock.descriptor_for(snapshot, process),
            LockOwner::File(_) if lock.pid != process.pid => continue,
            LockOwner::File(file) => process
                .descriptors
                .iter()
                .find(|d| d.file == file && (lock.kind != LockKind::Lease || d.fd == lock.descriptor)),
        };
        let Some(fd) = fd.map(|d| d.fd) else { continue };
        calls.push(match lock.kind {
            LockKind::Flock => call!(what(), libc::SYS_flock, fd, operation(lock)),
            LockKind::Posix => {
                call!(what(), libc::SYS_fcntl, fd, libc::F_SETLK, flock(lock).to_vec())
            }
            LockKind::Ofd => call!(what(), libc::SYS_fcntl, fd, F_OFD_SETLK, flock(lock).to_vec()),
            LockKind::Lease => call!(what(), libc::SYS_fcntl, fd, F_SETLEASE, lease(lock)),
        });
    }
    calls
}

/// Takes what belongs to open files and is not held yet; says for which files that failed.
pub(crate) fn take_rest(snapshot: &Snapshot, files: &Files) -> Vec<(FileId, Errno)> {
    let mut failed = Vec::new();
    for lock in &snapshot.locks {
        let LockOwner::File(file) = lock.owner else { continue };
        let Some(fd) = files.fd(file) else { continue };
        if let Err(errno) = take_here(fd, lock) {
            failed.push((file, errno));
        }
    }
    failed
}

/// Taking a lock again that the open file holds changes nothing.
fn take_here(fd: RawFd, lock: &Lock) -> Result<(), Errno> {
    match lock.kind {
        LockKind::Posix => Ok(()),
        LockKind::Flock => {
            let args = [fd as u64, operation(lock) as u64, 0, 0, 0, 0];
            // SAFETY: numbers only.
            unsafe { sys::raw(libc::SYS_flock, args) }.map(drop)
        }
        LockKind::Ofd => {
            let range = flock(lock);
            let args = [fd as u64, F_OFD_SETLK as u64, range.as_ptr() as u64, 0, 0, 0];
            // SAFETY: the kernel reads a struct flock, which `range` is.
            unsafe { sys::raw(libc::SYS_fcntl, args) }.map(drop)
        }
        LockKind::Lease if sys::fcntl(fd, F_GETLEASE, 0)? == lease(lock) => Ok(()),
        LockKind::Lease => sys::fcntl(fd, F_SETLEASE, lease(lock).into()).map(drop),
    }
}

/// A lock as far as it is compared: the file, the kind and type as fdinfo names them, the range.
type Shown = (InodeId, &'static str, &'static str, i64, i64);

fn shown(lock: &Lock) -> Shown {
    let kind = match lock.kind {
        LockKind::Flock => "FLOCK",
        LockKind::Posix => "POSIX",
        LockKind::Ofd => "OFDLCK",
        LockKind::Lease => "LEASE",
    };
    (lock.inode, kind, if lock.exclusive { "WRITE" } else { "READ" }, lock.start, lock.end)
}

/// A line of fdinfo: `lock: 1: POSIX  ADVISORY  WRITE 4711 08:01:42 100 EOF`.
fn shown_in(line: &str, inode: InodeId) -> Option<Shown> {
    let mut words = line.strip_prefix("lock:")?.split_whitespace().skip(1);
    let kind = words.next()?;
    let kind = ["FLOCK", "POSIX", "OFDLCK", "LEASE"].into_iter().find(|known| *known == kind)?;
    let exclusive = words.nth(1)?;
    let exclusive = ["READ", "WRITE"].into_iter().find(|known| *known == exclusive)?;
    let start = words.nth(2)?.parse().ok()?;
    let end = words.next()?;
    Some((inode, kind, exclusive, start, if end == "EOF" { i64::MAX } else { end.parse().ok()? }))
}

/// Locks that the process has and did not have, or the other way round, by what /proc says. `dir`: its directory there.
pub(crate) fn differences(snapshot: &Snapshot, process: &Process, dir: &str) -> Vec<String> {
    let mut then = BTreeSet::new();
    for lock in &snapshot.locks {
        let is_own = match lock.owner {
            LockOwner::Table(table) => {
                table == process.files_id && lock.descriptor_for(snapshot, process).is_some()
            }
            LockOwner::File(file) => process.descriptors.iter().any(|d| d.file == file),
        };
        if is_own {
            then.insert(shown(lock));
        }
    }
    let mut now = BTreeSet::new();
    for d in &process.descriptors {
        let Some(file) = snapshot.files.get(&d.file) else { continue };
        let info = sys::read_proc(&format!("{dir}/fdinfo/{}", d.fd)).unwrap_or_default();
        now.extend(String::from_utf8_lossy(&info).lines().filter_map(|line| shown_in(line, file.inode)));
    }
    let describe = |what: &str, (inode, kind, exclusive, start, end): &Shown| {
        let path = snapshot.inodes.get(inode).map(|i| i.path.to_string()).unwrap_or_default();
        format!("{what} lock {kind} {exclusive} {start} to {end} on {path}")
    };
    let missing = then.difference(&now).map(|lock| describe("lacks", lock));
    missing.chain(now.difference(&then).map(|lock| describe("has", lock))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn lock(kind: LockKind, exclusive: bool, start: i64, end: i64) -> Lock {
        let owner = LockOwner::File(FileId(1));
        let (pid, descriptor, breaking) = (0, -1, false);
        Lock { kind, inode: InodeId(1), owner, exclusive, start, end, pid, descriptor, breaking }
    }

    #[test]
    fn locks_of_open_files_are_held_and_taken_again_without_effect() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let open = || {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).open(&path).unwrap()
        };
        let (mine, other) = (open(), open());
        let whole = lock(LockKind::Flock, true, 0, i64::MAX);
        assert_eq!(take_here(mine.as_raw_fd(), &whole), Ok(()));
        assert_eq!(take_here(mine.as_raw_fd(), &whole), Ok(()));
        assert_eq!(take_here(other.as_raw_fd(), &whole), Err(Errno::EWOULDBLOCK));
        let range = |start, end| lock(LockKind::Ofd, true, start, end);
        assert_eq!(take_here(mine.as_raw_fd(), &range(10, 19)), Ok(()));
        assert_eq!(take_here(mine.as_raw_fd(), &range(100, i64::MAX)), Ok(()));
        assert_eq!(take_here(other.as_raw_fd(), &range(0, 9)), Ok(()));
        assert_eq!(take_here(other.as_raw_fd(), &range(20, 99)), Ok(()));
        assert_eq!(take_here(other.as_raw_fd(), &range(19, 20)), Err(Errno::EAGAIN));
        assert_eq!(take_here(other.as_raw_fd(), &range(1 << 40, i64::MAX)), Err(Errno::EAGAIN));
    }

    #[test]
    fn lines_of_fdinfo_are_understood() {
        let line = |text| shown_in(text, InodeId(1));
        let whole = Some(shown(&lock(LockKind::Flock, true, 0, i64::MAX)));
        assert_eq!(line("lock:\t1: FLOCK  ADVISORY  WRITE 0 08:01:42 0 EOF"), whole);
        let range = Some(shown(&lock(LockKind::Posix, false, 100, 199)));
        assert_eq!(line("lock:\t12: POSIX  ADVISORY  READ 4711 08:01:42 100 199"), range);
        let lease = Some(shown(&lock(LockKind::Lease, true, 0, i64::MAX)));
        assert_eq!(line("lock:\t1: LEASE  ACTIVE    WRITE 4711 08:01:42 0 EOF"), lease);
        assert_eq!(line("flags:\t0100002"), None);
        assert_eq!(line("lock:\t1: POSIX"), None);
    }
}
