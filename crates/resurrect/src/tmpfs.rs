//! File systems in memory are filled again with what was in them.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{FsType, statfs};
use snapshot::{Bytes, Inode, InodeId, MountFlags, PhysMem, Snapshot, Tmpfs, TmpfsEntry, TmpfsKind};

use crate::{FileStale, mount, page_cache, sys, xattr};

/// TMPFS_MAGIC, RAMFS_MAGIC and HUGETLBFS_MAGIC (include/uapi/linux/magic.h).
const IN_MEMORY: [FsType; 3] = [FsType(0x0102_1994), FsType(0x8584_58f6), FsType(0x9584_58f6)];
/// Of the memory that is free, the part that one file may take.
const SHARE: u64 = 2;

/// Fills all those that are mounted in the initial mount namespace, but for these places. Returns the files that could not be made.
pub(crate) fn fill_all(snapshot: &Snapshot, left_out: &[PathBuf], mem: &dyn PhysMem) -> Vec<FileStale> {
    let mut lost = Vec::new();
    for m in snapshot.mounts.iter().filter(|m| m.root.as_bytes() == b"/") {
        let number = (m.dev_major, m.dev_minor);
        let Some(tmpfs) = snapshot.tmpfs.iter().find(|t| (t.dev_major, t.dev_minor) == number) else {
            continue;
        };
        let at = m.mountpoint.as_path();
        if !statfs(at).is_ok_and(|fs| IN_MEMORY.contains(&fs.filesystem_type())) {
            lost.push(FileStale {
                path: m.mountpoint.clone(),
                why: "it is not mounted, and its files are gone".into(),
            });
            continue;
        }
        let leave_out = |path: &Path| left_out.iter().any(|of| path.starts_with(of));
        let read_only = m.flags.intersects(MountFlags::READ_ONLY | MountFlags::SB_READ_ONLY);
        if let Some(Err(e)) = read_only.then(|| mount::remount(m, false)) {
            lost.push(FileStale { path: m.mountpoint.clone(), why: format!("it cannot be written to: {e}") });
            continue;
        }
        lost.extend(fill(snapshot, tmpfs, at, &leave_out, mem));
        if let Some(Err(e)) = read_only.then(|| mount::remount(m, true)) {
            lost.push(FileStale {
                path: m.mountpoint.clone(),
                why: format!("it is not read-only any more: {e}"),
            });
        }
    }
    lost
}

/// Makes everything that was in one of them below `at`. What is there stays. Returns what could not be made.
pub(crate) fn fill(
    snapshot: &Snapshot,
    tmpfs: &Tmpfs,
    at: &Path,
    leave_out: &dyn Fn(&Path) -> bool,
    mem: &dyn PhysMem,
) -> Vec<FileStale> {
    let mut filling = Filling {
        snapshot,
        at,
        devices: tmpfs.fs_type.as_bytes() == b"devtmpfs",
        names: BTreeMap::new(),
        mem,
    };
    let mut lost = Vec::new();
    if !filling.devices {
        // Through the link that a descriptor in /proc is.
        let top = set_owner_and_mode(&at.join("."), tmpfs.uid, tmpfs.gid, tmpfs.mode);
        if let Err(e) = top {
            lost.push(FileStale { path: Bytes::from("/"), why: format!("set its owner: {e}") });
        }
    }
    for entry in &tmpfs.entries {
        let path = filling.path(entry);
        if leave_out(&path) {
            continue;
        }
        if let Err(why) = filling.make(entry, &path) {
            let path = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec();
            lost.push(FileStale { path: Bytes(path), why });
        }
    }
    // What is made in a directory changes its times.
    for entry in tmpfs.entries.iter().filter(|entry| entry.kind == TmpfsKind::Directory) {
        if let Some(inode) = snapshot.inodes.get(&entry.inode) {
            _ = set_times(&filling.path(entry), inode);
        }
    }
    lost
}

struct Filling<'a> {
    snapshot: &'a Snapshot,
    at: &'a Path,
    /// It is a devtmpfs: the kernel makes the devices that there are.
    devices: bool,
    /// Files that have been made, by which a further name is a link to them.
    names: BTreeMap<InodeId, PathBuf>,
    mem: &'a dyn PhysMem,
}

impl Filling<'_> {
    fn path(&self, entry: &TmpfsEntry) -> PathBuf {
        let path = entry.path.as_path();
        self.at.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn make(&mut self, entry: &TmpfsEntry, path: &Path) -> Result<(), String> {
        let say = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
        let inode = self.snapshot.inodes.get(&entry.inode).ok_or("its inode could not be read")?;
        if let Some(first) = self.names.get(&entry.inode).filter(|_| entry.kind != TmpfsKind::Directory) {
            return std::fs::hard_link(first, path).map_err(say("link"));
        }
        let there = path.symlink_metadata().is_ok();
        let is_device = matches!(inode.mode & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK);
        match &entry.kind {
            _ if there && !(self.devices && is_device) && entry.kind != TmpfsKind::Directory => return Ok(()),
            TmpfsKind::Directory => {
                if !there {
                    DirBuilder::new().mode(0o700).create(path).map_err(say("make the directory"))?;
                }
                if there && self.devices {
                    return Ok(());
                }
                set_owner_and_mode(path, inode.uid, inode.gid, inode.mode).map_err(say("set its owner"))?;
            }
            TmpfsKind::Regular => self.regular(path, inode)?,
            TmpfsKind::Symlink { target } => {
                symlink(target.as_path(), path).map_err(say("make the link"))?;
                lchown(path, Some(inode.uid), Some(inode.gid)).map_err(say("set its owner"))?;
                set_times(path, inode).map_err(say("set its times"))?;
            }
            TmpfsKind::Special { major, minor } => {
                if !there {
                    // A device that this kernel does not have is not there.
                    if self.devices && is_device {
                        return Ok(());
                    }
                    mknod(path, inode.mode, (*major, *minor)).map_err(|e| format!("mknod: {e}"))?;
                }
                set_owner_and_mode(path, inode.uid, inode.gid, inode.mode).map_err(say("set its owner"))?;
                set_times(path, inode).map_err(say("set its times"))?;
            }
        }
        self.names.insert(entry.inode, path.to_owned());
        match &inode.xattrs {
            Some(wanted) if !there => {
                let fd =
                    sys::open(path, libc::O_PATH | libc::O_NOFOLLOW, 0).map_err(|e| format!("open: {e}"))?;
                xattr::set(fd.as_fd(), wanted).map(drop)
            }
            _ => Ok(()),
        }
    }

    fn regular(&self, path: &Path, inode: &Inode) -> Result<(), String> {
        if let Some(obstacle) = self.snapshot.obstacles_to_contents(inode).first() {
            return Err(obstacle.text.clone());
        }
        // Huge pages have been set aside.
        let room = if inode.huge_page.is_some() { u64::MAX } else { sys::available_memory() / SHARE };
        let needed: u64 = inode.pages.iter().map(|run| u64::from(run.count) * snapshot::PAGE_SIZE).sum();
        if needed > room {
            return Err(format!("its {} MiB do not fit into this kernel's memory", needed >> 20));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file: File = options.open(path).map_err(|e| format!("create: {e}"))?;
        page_cache::copy_contents(&file, inode, self.mem).map_err(|e| {
            // Half a file is none.
            _ = std::fs::remove_file(path);
            e.to_string()
        })
    }
}

fn mknod(path: &Path, mode: u32, (major, minor): (u32, u32)) -> Result<(), Errno> {
    let path = sys::c_path(path)?;
    // SAFETY: the path is NUL-terminated.
    Errno::result(unsafe { libc::mknod(path.as_ptr(), mode, libc::makedev(major, minor)) }).map(drop)
}

fn set_owner_and_mode(path: &Path, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
    lchown(path, Some(uid), Some(gid))?;
    // After the owner: chown clears set-id bits.
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode & 0o7777))
}

fn set_times(path: &Path, inode: &Inode) -> io::Result<()> {
    let times =
        [inode.atime, inode.mtime].map(|t| libc::timespec { tv_sec: t.sec, tv_nsec: i64::from(t.nsec) });
    let path = sys::c_path(path)?;
    // SAFETY: a NUL-terminated path and two timespecs.
    let r =
        unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), libc::AT_SYMLINK_NOFOLLOW) };
    Ok(Errno::result(r).map(drop)?)
}
