//! File locks and leases.
//!
//! Record locks belong to a process and are gone when it closes any descriptor of the file: it takes them itself, when the only
//! descriptors that it has are its own. So it does with those of its open files, to be named in /proc/locks. What nobody has taken then
//! (because the one who had done it before is not there any more) is taken from here.

use std::os::fd::RawFd;

use nix::errno::Errno;
use snapshot::{FileId, Lock, LockKind, LockOwner, Process, Snapshot};

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

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::InodeId;
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
}
