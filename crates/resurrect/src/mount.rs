//! Mounts as objects: open_tree(2), move_mount(2) and the like. None of these lets an automounter be asked.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use snapshot::{Bytes, Mount, MountFlags};

use crate::sys::{self, Result};

const OPEN_TREE_CLONE: u64 = 1;
const MOVE_MOUNT_F_EMPTY_PATH: u64 = 4;
const FSCONFIG_CMD_CREATE: u64 = 6;

// MOUNT_ATTR_* (include/uapi/linux/mount.h).
const ATTR_RDONLY: u64 = 0x1;
const ATTR_NOSUID: u64 = 0x2;
const ATTR_NODEV: u64 = 0x4;
const ATTR_NOEXEC: u64 = 0x8;
const ATTR_ATIME: u64 = 0x70;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;

/// A copy of the mount at `path` (below `dir`, if that is one), which is mounted nowhere.
pub(crate) fn copy(dir: Option<RawFd>, path: &Path) -> Result<OwnedFd> {
    let at = dir.unwrap_or(libc::AT_FDCWD);
    let flags = OPEN_TREE_CLONE
        | libc::O_CLOEXEC as u64
        | (libc::AT_NO_AUTOMOUNT | libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW) as u64;
    let path = sys::c_path(path)?;
    // SAFETY: the path is NUL-terminated; what comes back is ours.
    unsafe {
        let fd = sys::raw(libc::SYS_open_tree, [at as u64, path.as_ptr() as u64, flags, 0, 0, 0])?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// A new file system without a device, which is mounted nowhere, and goes with its last user; its top directory.
pub(crate) fn new(fs_type: &CStr) -> Result<OwnedFd> {
    // SAFETY: the kernel reads NUL-terminated names; what comes back is ours.
    unsafe {
        let context = sys::raw(libc::SYS_fsopen, [fs_type.as_ptr() as u64, 1, 0, 0, 0, 0])?;
        let context = OwnedFd::from_raw_fd(context as RawFd);
        let fd = context.as_raw_fd() as u64;
        sys::raw(libc::SYS_fsconfig, [fd, FSCONFIG_CMD_CREATE, 0, 0, 0, 0])?;
        let mount = sys::raw(libc::SYS_fsmount, [fd, 1, 0, 0, 0, 0])?;
        Ok(OwnedFd::from_raw_fd(mount as RawFd))
    }
}

/// Mounts what is mounted nowhere at a path, on top of what is there.
pub(crate) fn attach(mount: &OwnedFd, at: &Path) -> Result<()> {
    let at = sys::c_path(at)?;
    let args = [
        mount.as_raw_fd() as u64,
        c"".as_ptr() as u64,
        libc::AT_FDCWD as u64,
        at.as_ptr() as u64,
        MOVE_MOUNT_F_EMPTY_PATH,
        0,
    ];
    // SAFETY: both paths are NUL-terminated.
    unsafe { sys::raw(libc::SYS_move_mount, args) }.map(drop)
}

/// Unmounts what is mounted on top at a path; who uses it keeps it.
pub(crate) fn detach(at: &Path) -> Result<()> {
    let at = sys::c_path(at)?;
    // SAFETY: the path is NUL-terminated.
    Errno::result(unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) }).map(drop)
}

/// Changes how all mounts from the root on pass on what is mounted below them: MS_SLAVE, MS_SHARED, MS_PRIVATE.
pub(crate) fn propagate_all(how: libc::c_ulong) -> Result<()> {
    let none = std::ptr::null();
    // SAFETY: the path is NUL-terminated; nothing else is read.
    let r = unsafe { libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | how, std::ptr::null()) };
    Errno::result(r).map(drop)
}

/// Makes the file system that is mounted like an old one was writable, or read-only (again).
pub(crate) fn remount(like: &Mount, read_only: bool) -> Result<()> {
    let table = [
        (MountFlags::NOSUID, libc::MS_NOSUID),
        (MountFlags::NODEV, libc::MS_NODEV),
        (MountFlags::NOEXEC, libc::MS_NOEXEC),
        (MountFlags::NOATIME, libc::MS_NOATIME),
        (MountFlags::NODIRATIME, libc::MS_NODIRATIME),
        (MountFlags::RELATIME, libc::MS_RELATIME),
    ];
    let flags =
        table.iter().filter(|(flag, _)| like.flags.contains(*flag)).fold(0, |all, (_, bit)| all | bit);
    let flags = flags | libc::MS_REMOUNT | if read_only { libc::MS_RDONLY } else { 0 };
    let at = sys::c_path(like.mountpoint.as_path())?;
    let none = std::ptr::null();
    // SAFETY: the path is NUL-terminated; nothing else is read.
    Errno::result(unsafe { libc::mount(none, at.as_ptr(), none, flags, std::ptr::null()) }).map(drop)
}

/// Gives a mount the flags of an old one, and its way of passing on what is mounted below.
pub(crate) fn set_attributes(mount: &OwnedFd, like: &Mount) -> Result<()> {
    let table = [
        (MountFlags::READ_ONLY, ATTR_RDONLY),
        (MountFlags::NOSUID, ATTR_NOSUID),
        (MountFlags::NODEV, ATTR_NODEV),
        (MountFlags::NOEXEC, ATTR_NOEXEC),
        (MountFlags::NODIRATIME, ATTR_NODIRATIME),
    ];
    let set =
        table.iter().filter(|(flag, _)| like.flags.contains(*flag)).fold(0, |all, (_, attr)| all | attr);
    let clear = table.iter().fold(ATTR_ATIME, |all, (_, attr)| all | attr);
    let atime = if like.flags.contains(MountFlags::NOATIME) {
        ATTR_NOATIME
    } else if like.flags.contains(MountFlags::RELATIME) {
        0
    } else {
        ATTR_STRICTATIME
    };
    change(mount, set | atime, clear & !set, 0)?;
    // First whom it follows, then who follows it.
    if like.master == 0 {
        change(mount, 0, 0, libc::MS_PRIVATE)?;
    }
    if like.peer_group != 0 {
        change(mount, 0, 0, libc::MS_SHARED)?;
    }
    Ok(())
}

/// mount_setattr(2).
fn change(mount: &OwnedFd, set: u64, clear: u64, propagation: u64) -> Result<()> {
    // struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
    let attr = [set, clear, propagation, 0];
    let args = [
        mount.as_raw_fd() as u64,
        c"".as_ptr() as u64,
        libc::AT_EMPTY_PATH as u64,
        attr.as_ptr() as u64,
        size_of_val(&attr) as u64,
        0,
    ];
    // SAFETY: the kernel reads a NUL-terminated path and a structure of the given size.
    unsafe { sys::raw(libc::SYS_mount_setattr, args) }.map(drop)
}

/// What is mounted where now, in the order in which it was: mount point and type of each.
pub(crate) fn table() -> std::io::Result<Vec<(Bytes, Bytes)>> {
    let text = sys::read_proc("/proc/self/mountinfo")?;
    let entry = |line: &[u8]| {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let dash = fields.iter().position(|field| *field == b"-")?;
        Some((Bytes(unescape(fields.get(4)?)), Bytes(fields.get(dash + 1)?.to_vec())))
    };
    Ok(text.split(|b| *b == b'\n').filter_map(entry).collect())
}

/// Blanks and the like are octal there.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| std::str::from_utf8(tail.get(..3)?).ok()).flatten();
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_mounts_is_read() {
        let table = table().unwrap();
        assert!(table.iter().any(|(at, fs_type)| at.as_bytes() == b"/proc" && fs_type.as_bytes() == b"proc"));
        assert_eq!(unescape(br"/a\040b\\"), b"/a b\\\\");
        assert_eq!(unescape(br"/a\0"), br"/a\0");
    }
}
