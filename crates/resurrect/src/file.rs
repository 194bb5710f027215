//! Open files: each open file description is made once, here, and handed to the processes by inheritance, so that what was shared
//! between descriptors and processes is shared again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use snapshot::{
    FileId, FileKind, Inode, InodeId, OpenFile, PhysMem, PipeId, Process, Reason, Snapshot, TtyId, VmaKind,
};

use crate::{FileStale, FileWritten, page_cache, pipe, sys, tty, unix};

/// Flags that only mean something to the open call itself.
const CREATION_FLAGS: i32 = libc::O_CREAT
    | libc::O_EXCL
    | libc::O_NOCTTY
    | libc::O_TRUNC
    | libc::O_CLOEXEC
    | libc::O_TMPFILE & !libc::O_DIRECTORY;
/// Flags that fcntl(F_SETFL) changes.
const STATUS_FLAGS: i32 =
    libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME | libc::O_ASYNC;

/// The open files of all processes that come back, and why some could not be opened.
#[derive(Default)]
pub(crate) struct Files {
    /// Lowest descriptor that is ours: above every number that a process uses.
    pub(crate) base: RawFd,
    open: BTreeMap<FileId, Result<OwnedFd, Reason>>,
    pipes: BTreeMap<PipeId, Result<pipe::Opened, String>>,
    ttys: BTreeMap<TtyId, Result<tty::Restored, String>>,
    inodes: BTreeMap<InodeId, Result<page_cache::Restored, String>>,
    /// What is different for whoever has a file.
    losses: BTreeMap<FileId, Vec<Reason>>,
}

/// No descriptor of a process may be as high as this: our own lie above, within fs.nr_open, and each process is made with a table
/// for all of them.
pub(crate) const MAX_DESCRIPTOR: RawFd = 1 << 16;

/// What a process needs open: its descriptors, mappings and executable.
pub(crate) fn needed<'a>(
    snapshot: &'a Snapshot,
    process: &'a Process,
) -> impl Iterator<Item = (FileId, String)> + 'a {
    let mm = process.address_space.and_then(|id| snapshot.address_spaces.get(&id));
    let descriptors = process.descriptors.iter().map(|d| (d.file, format!("descriptor {}", d.fd)));
    let mapped = mm.into_iter().flat_map(|mm| &mm.vmas).filter_map(|v| match v.kind {
        VmaKind::File { file, .. } => Some((file, format!("mapping {:x}-{:x}", v.start, v.end))),
        _ => None,
    });
    let exe = mm.and_then(|mm| mm.exe).map(|id| (id, "its executable".to_owned()));
    descriptors.chain(mapped).chain(exe)
}

/// `files` and all that they hold, directly or through others.
fn with_held(snapshot: &Snapshot, files: impl Iterator<Item = FileId>) -> BTreeSet<FileId> {
    let mut all = BTreeSet::new();
    let mut todo: Vec<FileId> = files.collect();
    while let Some(id) = todo.pop() {
        if all.insert(id) {
            todo.extend(snapshot.held_by(id));
        }
    }
    all
}

impl Files {
    /// Opens what `processes` need. Contents that only the dead page cache has go to disk first.
    pub(crate) fn open(
        snapshot: &Snapshot,
        processes: &[&Process],
        mem: &dyn PhysMem,
    ) -> Result<Self, Errno> {
        let highest = processes.iter().flat_map(|p| &p.descriptors).map(|d| d.fd).max().unwrap_or(0);
        let ids = with_held(snapshot, processes.iter().flat_map(|p| needed(snapshot, p)).map(|(id, _)| id));
        let mut files = Self { base: (highest + 1).max(500), ..Self::default() };
        // Beside files and pipes one for the memory of each process.
        files.make_room(
            ids.len()
                + 2 * snapshot.pipes.len()
                + snapshot.unix_sockets.len()
                + snapshot.inodes.len()
                + processes.len(),
        )?;
        files.write_back(snapshot, mem);
        for id in ids {
            let opened = match snapshot.files.get(&id) {
                Some(file) => files.open_one(snapshot, file, mem),
                None => Err(Reason::new("descriptor", "it is not in the snapshot")),
            };
            files.open.insert(id, opened);
        }
        files.connect(snapshot, mem);
        Ok(files)
    }

    /// What needs several files to be open: contents of sockets that hold open files, and the like.
    fn connect(&mut self, snapshot: &Snapshot, mem: &dyn PhysMem) {
        let numbers = self.open.iter().filter_map(|(id, fd)| Some((*id, fd.as_ref().ok()?.as_raw_fd())));
        let made = unix::make_all(snapshot, mem, self.base, &numbers.collect());
        self.losses.extend(made.losses);
        for (id, why) in made.failed {
            self.open.insert(id, Err(Reason::new("socket", why)));
        }
        for (id, fd) in &mut self.open {
            let is_unix = |file: &&OpenFile| matches!(file.kind, FileKind::Unix { .. });
            let (Some(file), Ok(socket)) = (snapshot.files.get(id).filter(is_unix), &fd) else { continue };
            if let Err(e) = set_status_flags(socket, file) {
                *fd = Err(Reason::new("descriptor", format!("F_SETFL: {e}")));
            }
        }
    }

    /// The limit on descriptor numbers must hold ours above everybody's.
    fn make_room(&self, count: usize) -> Result<(), Errno> {
        let wanted = self.base as u64 + count as u64 + 64;
        let mut limit = sys::prlimit(0, libc::RLIMIT_NOFILE, None)?;
        if limit.rlim_cur < wanted {
            limit.rlim_cur = wanted;
            limit.rlim_max = limit.rlim_max.max(wanted);
            sys::prlimit(0, libc::RLIMIT_NOFILE, Some(limit))?;
        }
        Ok(())
    }

    /// Whether it is a terminal that was hung up since it was opened: nobody can use it any more.
    pub(crate) fn is_hung_up(&self, snapshot: &Snapshot, id: FileId) -> bool {
        let is_tty = snapshot.files.get(&id).is_some_and(|file| matches!(file.kind, FileKind::Tty { .. }));
        let Some(Ok(file)) = self.open.get(&id).filter(|_| is_tty) else { return false };
        nix::sys::termios::tcgetattr(file).is_err_and(|errno| errno == Errno::EIO)
    }

    /// The descriptor under which a file is open here and in all children.
    pub(crate) fn fd(&self, id: FileId) -> Option<RawFd> {
        self.open.get(&id)?.as_ref().ok().map(AsRawFd::as_raw_fd)
    }

    /// Why what the process needs could not be opened; empty if all is there.
    pub(crate) fn failures(&self, snapshot: &Snapshot, process: &Process) -> Vec<Reason> {
        let mut reasons: Vec<Reason> = Vec::new();
        for (id, what) in needed(snapshot, process) {
            if let Some(Err(reason)) = self.open.get(&id) {
                let path = snapshot.files.get(&id).map(|f| f.path.to_string()).unwrap_or_default();
                reasons.push(Reason::new(&reason.code, format!("{what} ({path}): {}", reason.text)));
            }
        }
        reasons
    }

    /// Brings all files up to date that the dead kernel had not written, whoever may open them.
    fn write_back(&mut self, snapshot: &Snapshot, mem: &dyn PhysMem) {
        let inodes = snapshot.unwritten.iter().filter_map(|id| Some((*id, snapshot.inodes.get(id)?)));
        let mut inodes: Vec<_> = inodes.collect();
        // Directories before what is in them.
        inodes.sort_by(|(_, a), (_, b)| a.path.cmp(&b.path));
        for (id, inode) in inodes {
            let restored = restore(snapshot, inode.path.as_path(), inode, mem);
            self.inodes.insert(id, restored);
        }
    }

    /// Files that could not be brought up to date: what the disk has of them is older, or nothing.
    pub(crate) fn stale(&self, snapshot: &Snapshot) -> Vec<FileStale> {
        let failed = self.inodes.iter().filter_map(|(id, r)| Some((id, r.as_ref().err()?)));
        let stale = |(id, why): (&InodeId, &String)| {
            Some(FileStale { path: snapshot.inodes.get(id)?.path.clone(), why: why.clone() })
        };
        failed.filter_map(stale).collect()
    }

    /// Files that had news in the dead page cache.
    pub(crate) fn written(&self, snapshot: &Snapshot) -> Vec<FileWritten> {
        let done = self.inodes.iter().filter_map(|(id, r)| Some((id, r.as_ref().ok()?)));
        done.filter(|(_, r)| r.created || r.resized || r.written > 0)
            .filter_map(|(id, r)| {
                let path = snapshot.inodes.get(id)?.path.clone();
                Some(FileWritten { path, bytes: r.written, created: r.created })
            })
            .collect()
    }

    /// What is different for this process although all its files are open.
    pub(crate) fn losses(&self, snapshot: &Snapshot, process: &Process) -> Vec<Reason> {
        let ttys: BTreeSet<TtyId> = process
            .descriptors
            .iter()
            .filter_map(|d| match snapshot.files.get(&d.file)?.kind {
                FileKind::Tty { tty } => Some(tty),
                _ => None,
            })
            .collect();
        let of_ttys =
            ttys.iter().filter_map(|id| self.ttys.get(id)?.as_ref().ok()).flat_map(|tty| tty.losses.clone());
        let own: BTreeSet<FileId> = process.descriptors.iter().map(|d| d.file).collect();
        let of_files = own.iter().filter_map(|id| self.losses.get(id)).flatten().cloned();
        of_ttys.chain(of_files).collect()
    }

    fn open_one(
        &mut self,
        snapshot: &Snapshot,
        file: &OpenFile,
        mem: &dyn PhysMem,
    ) -> Result<OwnedFd, Reason> {
        let io = |what: &str, e: Errno| Reason::new("descriptor", format!("{what}: {e}"));
        let path = file.path.as_path();
        let flags = file.flags & !CREATION_FLAGS;
        let fd = match &file.kind {
            FileKind::Regular => {
                self.bring_up_to_date(snapshot, file, mem)?;
                let fd = sys::open(path, flags | libc::O_NOCTTY, 0).map_err(|e| io("open", e))?;
                self.seek(fd, file)?
            }
            FileKind::Directory => {
                let fd = sys::open(path, flags | libc::O_DIRECTORY, 0).map_err(|e| io("open", e))?;
                self.seek(fd, file)?
            }
            FileKind::Path => sys::open(path, flags | libc::O_PATH, 0).map_err(|e| io("open", e))?,
            FileKind::CharDevice { major, minor } => {
                let fd = sys::open(path, flags | libc::O_NOCTTY | libc::O_NONBLOCK, 0)
                    .map_err(|e| io("open", e))?;
                verify_device(path, *major, *minor)?;
                fd
            }
            FileKind::Pipe { pipe, end } => {
                let base = self.base;
                let opened = self.pipes.entry(*pipe).or_insert_with(|| {
                    let contents = snapshot.pipes.get(pipe).ok_or("it is not in the snapshot")?;
                    pipe::Opened::new(contents, mem, base)
                });
                let pipe = opened.as_mut().map_err(|why| Reason::new("pipe", why.clone()))?;
                pipe.end(*end, base).map_err(|why| Reason::new("pipe", why))?
            }
            FileKind::Tty { tty: id } => {
                let tty = snapshot.ttys.get(id);
                let tty = tty.ok_or_else(|| Reason::new("terminal", "it is not in the snapshot"))?;
                let base = self.base;
                let restored = self.ttys.entry(*id).or_insert_with(|| tty::restore(tty, base));
                restored.as_ref().map_err(|why| Reason::new("terminal", why.clone()))?;
                if path == Path::new("/dev/console") {
                    sys::open(path, flags | libc::O_NOCTTY | libc::O_NONBLOCK, 0)
                } else {
                    tty::open(tty, flags)
                }
                .map_err(|e| Reason::new("terminal", format!("open: {e}")))?
            }
            // Sockets are made when all files are there.
            FileKind::Unix { .. } => {
                return unix::placeholder(self.base).map_err(|e| io("placeholder", e));
            }
            FileKind::Unsupported { what } => return Err(Reason::new("descriptor", what.clone())),
        };
        let fd = sys::lift(fd, self.base).map_err(|e| io("dup", e))?;
        if file.kind != FileKind::Path {
            set_status_flags(&fd, file).map_err(|e| io("F_SETFL", e))?;
        }
        Ok(fd)
    }

    fn bring_up_to_date(
        &mut self,
        snapshot: &Snapshot,
        file: &OpenFile,
        mem: &dyn PhysMem,
    ) -> Result<(), Reason> {
        let inode = snapshot.inodes.get(&file.inode);
        let inode = inode.ok_or_else(|| Reason::new("file", "its inode is not in the snapshot"))?;
        if is_kernel_made(inode.fs_type.as_bytes()) {
            return match process_of_proc_path(file.path.as_bytes()) {
                true => Err(Reason::new("descriptor", "a file about a process in /proc")),
                false => Ok(()),
            };
        }
        let path = file.path.as_path();
        let restored = self.inodes.entry(file.inode).or_insert_with(|| restore(snapshot, path, inode, mem));
        restored.as_ref().map(drop).map_err(|why| Reason::new("file", why.clone()))
    }

    fn seek(&self, fd: OwnedFd, file: &OpenFile) -> Result<OwnedFd, Reason> {
        if file.pos != 0 {
            // SAFETY: numbers only.
            let r = unsafe { libc::lseek(fd.as_raw_fd(), file.pos, libc::SEEK_SET) };
            Errno::result(r).map_err(|e| Reason::new("descriptor", format!("seek: {e}")))?;
        }
        Ok(fd)
    }

    /// Sets the receivers of SIGIO. They must exist, hence after the skeletons.
    pub(crate) fn set_owners(&self, snapshot: &Snapshot) -> Vec<(FileId, Errno)> {
        let mut failed = Vec::new();
        for (id, fd) in self.open.iter().filter_map(|(id, fd)| Some((id, fd.as_ref().ok()?))) {
            let Some(file) = snapshot.files.get(id) else { continue };
            let mut set = |cmd, arg: i32| {
                if arg != 0
                    && let Err(e) = sys::fcntl(fd.as_raw_fd(), cmd, arg.into())
                {
                    failed.push((*id, e));
                }
            };
            set(libc::F_SETOWN, file.owner_pid);
            set(F_SETSIG, file.owner_signal);
        }
        failed
    }
}

const F_SETSIG: i32 = 10;

/// The kernel makes up the contents of such files: there is nothing on a disk to compare with.
/// Brings one file up to date, unless its file system is not there: then the name would lead to another one.
fn restore(
    snapshot: &Snapshot,
    path: &Path,
    inode: &Inode,
    mem: &dyn PhysMem,
) -> Result<page_cache::Restored, String> {
    let mounts = snapshot.mounts.iter().map(|m| m.mountpoint.as_path()).filter(|m| path.starts_with(m));
    let mount = mounts.max_by_key(|m| m.components().count());
    if let Some(mount) = mount.filter(|m| !is_mount_point(m)) {
        return Err(format!("the file system at {} is not mounted", mount.display()));
    }
    page_cache::restore(path, inode, mem).map_err(|e| e.to_string())
}

/// Whether another file system begins at `path` than that of the directory above, or it is the root.
fn is_mount_point(path: &Path) -> bool {
    let device = |p: &Path| std::fs::metadata(p).map(|meta| meta.dev()).ok();
    match path.parent() {
        None => true,
        Some(parent) => device(path).is_some_and(|here| device(parent) != Some(here)),
    }
}

fn is_kernel_made(fs_type: &[u8]) -> bool {
    const TYPES: [&[u8]; 10] = [
        b"proc",
        b"sysfs",
        b"cgroup2",
        b"cgroup",
        b"debugfs",
        b"tracefs",
        b"securityfs",
        b"efivarfs",
        b"configfs",
        b"bpf",
    ];
    TYPES.contains(&fs_type)
}

fn process_of_proc_path(path: &[u8]) -> bool {
    path.strip_prefix(b"/proc/").is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit))
}

fn verify_device(path: &Path, major: u32, minor: u32) -> Result<(), Reason> {
    let same = std::fs::metadata(path).is_ok_and(|m| {
        m.file_type().is_char_device() && (libc::major(m.rdev()), libc::minor(m.rdev())) == (major, minor)
    });
    if same {
        Ok(())
    } else {
        Err(Reason::new("descriptor", format!("no character device {major}:{minor} any more")))
    }
}

fn set_status_flags(fd: &OwnedFd, file: &OpenFile) -> Result<(), Errno> {
    let wanted = file.flags & STATUS_FLAGS;
    let now = sys::fcntl(fd.as_raw_fd(), libc::F_GETFL, 0)? & STATUS_FLAGS;
    if now != wanted {
        sys::fcntl(fd.as_raw_fd(), libc::F_SETFL, wanted.into())?;
    }
    Ok(())
}

/// The part of the O_* flags that must be the same again.
pub(crate) fn comparable_flags(flags: i32) -> i32 {
    flags & (libc::O_ACCMODE | STATUS_FLAGS | libc::O_PATH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_told_from_directories() {
        assert!(is_mount_point(Path::new("/")) && is_mount_point(Path::new("/proc")));
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_mount_point(dir.path()) && !is_mount_point(&dir.path().join("missing")));
    }
}
