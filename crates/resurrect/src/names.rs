//! Names on disk file systems as the dead kernel had them: what was made, renamed, linked or removed and the disk has not heard of.
//!
//! The contents of files come first, so that no name ever leads to half a file. Then every name is put, then those that are no more are
//! taken away, last the attributes are set. A name that leads elsewhere is exchanged in one step for the right one, and nothing is deleted before all
//! names are where they belong: until then it lies in a directory of ours at the top of the file system.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, Timestamps};
use rustix::io::Errno;
use snapshot::{Bytes, DirectoryNames, DiskNames, Inode, InodeId, NamedInode, PhysMem, Snapshot, TmpfsKind};

use crate::file::{self, Held, WrittenBack};
use crate::handle::{Handles, path_of};
use crate::page_cache::Restored;
use crate::{FileStale, page_cache, sys};

/// Directories within directories that are gone.
const MAX_DEPTH: usize = 512;
/// Not to be read or written, and no link is followed.
const AS_PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What has been done on one file system.
#[derive(Default)]
pub(crate) struct Reconciled {
    /// Files and directories that had changed, and why one could not be brought up to date.
    pub(crate) inodes: WrittenBack,
    /// Files that programs have open and that the disk had not heard were removed: open, not for writing.
    pub(crate) held: Held,
    /// Names that are not as they were.
    pub(crate) stale: Vec<FileStale>,
    /// Names that the disk did not have, or had for something else.
    pub(crate) put: u64,
    /// Names that the disk had and that were no more.
    pub(crate) removed: u64,
}

/// Brings the names on one mounted file system up to date, with the files that are unwritten. Descriptors are `base` or higher.
///
/// `None` if its inodes cannot be found by number: nothing has been done.
pub(crate) fn reconcile(
    snapshot: &Snapshot,
    names: &DiskNames,
    mem: &dyn PhysMem,
    base: RawFd,
    own: &[PathBuf],
) -> Option<Reconciled> {
    let handles = Handles::of(names.mountpoint.as_path())?;
    let by_ino = names.inodes.keys().filter_map(|id| Some((snapshot.inodes.get(id)?.ino, *id))).collect();
    let mut work = Work {
        snapshot,
        names,
        mem,
        base,
        own,
        handles,
        by_ino,
        made: BTreeMap::new(),
        staging: None,
        holding: BTreeMap::new(),
        done: Reconciled::default(),
    };
    work.write_contents();
    work.hold_removed();
    for directory in &names.directories {
        work.tell(directory.inode, Work::put_names, directory);
    }
    for directory in &names.directories {
        work.tell(directory.inode, Work::remove_names, directory);
    }
    work.open_held();
    work.clear_away();
    work.set_attributes();
    Some(work.done)
}

struct Work<'a> {
    snapshot: &'a Snapshot,
    names: &'a DiskNames,
    mem: &'a dyn PhysMem,
    base: RawFd,
    /// Names on the way to these places, and in them, stay.
    own: &'a [PathBuf],
    handles: Handles,
    /// Inodes that were changed lately, by number.
    by_ino: BTreeMap<u64, InodeId>,
    /// Those that the disk did not have: number and generation now.
    made: BTreeMap<InodeId, (u64, u32)>,
    staging: Option<Staging>,
    /// Files that have lost their names, with the last of these.
    holding: BTreeMap<InodeId, (Bytes, OwnedFd)>,
    done: Reconciled,
}

/// Where inodes lie that have lost their names, or are to get one.
struct Staging {
    fd: OwnedFd,
    path: PathBuf,
    ino: u64,
    count: u64,
    /// Of the directory above, before.
    times: Timestamps,
}

fn say(what: &'static str) -> impl Fn(Errno) -> String {
    move |errno| format!("{what}: {errno}")
}

impl<'a> Work<'a> {
    fn inode(&self, id: InodeId) -> Result<&'a Inode, String> {
        self.snapshot.inodes.get(&id).ok_or_else(|| "its inode could not be read".into())
    }

    /// Number and generation that an inode has on the disk, if it is there.
    fn numbers(&self, id: InodeId) -> Result<(u64, u32), String> {
        let inode = self.inode(id)?;
        Ok(self.made.get(&id).copied().unwrap_or((inode.ino, inode.generation)))
    }

    /// The inode as the disk has it by now, as by O_PATH.
    fn on_disk(&self, id: InodeId) -> Result<Option<OwnedFd>, String> {
        let (ino, generation) = self.numbers(id)?;
        let look = |e: nix::errno::Errno| format!("look for it: {e}");
        let Some(fd) = self.handles.open(ino, generation).map_err(look)? else { return Ok(None) };
        let found = rustix::fs::statat(&fd, "", AtFlags::EMPTY_PATH).map_err(say("look at it"))?;
        let is_same = found.st_mode & libc::S_IFMT == self.inode(id)?.mode & libc::S_IFMT;
        Ok(is_same.then_some(fd))
    }

    /// Does something to a directory; what goes wrong is noted.
    fn tell(
        &mut self,
        id: InodeId,
        act: fn(&mut Self, &DirectoryNames, BorrowedFd<'_>) -> Result<(), String>,
        directory: &DirectoryNames,
    ) {
        let opened = self.on_disk(id).and_then(|fd| {
            let fd = fd.ok_or("it is not on the disk, and could not be made")?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::openat(CWD, path_of(&fd), flags, Mode::empty()).map_err(say("open the directory"))
        });
        if let Err(why) = opened.and_then(|fd| act(self, directory, fd.as_fd())) {
            self.stale(id, None, why);
        }
    }

    fn stale(&mut self, directory: InodeId, name: Option<&Bytes>, why: String) {
        let mut path =
            self.snapshot.inodes.get(&directory).map_or(Vec::new(), |i| i.path.as_bytes().to_vec());
        if let Some(name) = name {
            path.push(b'/');
            path.extend(name.as_bytes());
        }
        self.done.stale.push(FileStale { path: Bytes(path), why });
    }

    /// Brings the contents of files up to date that the disk has. Those that it does not have are made where their first name is put.
    fn write_contents(&mut self) {
        for id in &self.snapshot.unwritten {
            let Some(named) = self.names.inodes.get(id) else { continue };
            let restored = match (&named.kind, self.on_disk(*id)) {
                (_, Err(why)) => Err(why),
                (TmpfsKind::Regular, Ok(Some(fd))) => self.write_content(*id, &fd),
                (_, Ok(Some(_))) => Ok(Restored::default()),
                (_, Ok(None)) if self.is_own(self.path(*id)) => Ok(Restored::default()),
                (_, Ok(None)) => Err("none of its names could be put".into()),
            };
            self.done.inodes.insert(*id, restored);
        }
    }

    fn write_content(&self, id: InodeId, fd: &OwnedFd) -> Result<Restored, String> {
        let (inode, place) = (self.inode(id)?, path_of(fd));
        page_cache::restore(&place, inode, file::is_doubtful(self.snapshot, inode), self.mem)
            .map_err(|e| e.to_string().replace(&place.display().to_string(), &inode.path.to_string()))
    }

    /// Files that are open and have lost their last name, of which the disk has not heard: they are still whole there.
    fn hold_removed(&mut self) {
        let is_here = |i: &Inode| (i.dev_major, i.dev_minor) == (self.names.dev_major, self.names.dev_minor);
        let is_removed = |i: &Inode| i.nlink == 0 && i.mode & libc::S_IFMT == libc::S_IFREG;
        let open =
            self.snapshot.files.values().filter(|file| file.deleted).map(|file| (file.inode, &file.path));
        for (id, path) in open.collect::<BTreeMap<_, _>>() {
            let inode = self.snapshot.inodes.get(&id);
            if !inode.is_some_and(|inode| is_removed(inode) && is_here(inode)) {
                continue;
            }
            let held = self
                .on_disk(id)
                .and_then(|fd| fd.map(|fd| self.write_content(id, &fd).map(|_| fd)).transpose());
            match held {
                Ok(Some(fd)) => _ = self.holding.insert(id, (path.clone(), fd)),
                Ok(None) => {}
                Err(why) => self.done.stale.push(FileStale { path: path.clone(), why }),
            }
        }
    }

    /// Opens them when all else has its name: each under the one that it had, for a moment, if that is free.
    fn open_held(&mut self) {
        for (id, (path, fd)) in std::mem::take(&mut self.holding) {
            match self.open_without_name(&path, &fd) {
                Ok(file) => _ = self.done.held.insert(id, file),
                Err(why) => self.done.stale.push(FileStale { path, why }),
            }
        }
    }

    fn open_without_name(&mut self, path: &Bytes, fd: &OwnedFd) -> Result<File, String> {
        let link = |directory: BorrowedFd<'_>, name: &Path| {
            rustix::fs::linkat(fd, "", directory, name, AtFlags::EMPTY_PATH)
        };
        let mut place = (CWD, path.as_path().to_owned());
        if link(place.0, &place.1).is_err() {
            let staging = self.staging()?;
            place.1 = staging.next().into();
            place.0 = staging.fd.as_fd();
            link(place.0, &place.1).map_err(say("link it"))?;
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(place.0, &place.1, flags, Mode::empty()).map_err(say("open it"));
        rustix::fs::unlinkat(place.0, &place.1, AtFlags::empty()).map_err(say("remove it"))?;
        sys::lift(opened?, self.base).map(File::from).map_err(|e| format!("open it: {e}"))
    }

    /// Puts the names that are to be in a directory.
    fn put_names(&mut self, directory: &DirectoryNames, fd: BorrowedFd<'_>) -> Result<(), String> {
        let entries = entries(fd)?;
        let above = self.path(directory.inode);
        for name in &directory.names {
            let Some(id) = name.inode.filter(|_| !self.is_own(above.join(name.name.as_path()))) else {
                continue;
            };
            let put = match self.numbers(id) {
                Ok((ino, _)) => {
                    let is_there = entries.get(name.name.as_bytes()) == Some(&ino)
                        && self.on_disk(id).is_ok_and(|fd| fd.is_some());
                    if is_there { Ok(()) } else { self.put(fd, OsStr::from_bytes(name.name.as_bytes()), id) }
                }
                Err(why) => Err(why),
            };
            if let Err(why) = put {
                if self.snapshot.unwritten.contains(&id) {
                    self.done.inodes.insert(id, Err(why));
                } else {
                    self.stale(directory.inode, Some(&name.name), why);
                }
            }
        }
        Ok(())
    }

    /// The path of an inode.
    fn path(&self, id: InodeId) -> &'a Path {
        self.snapshot.inodes.get(&id).map_or(Path::new("/"), |inode| inode.path.as_path())
    }

    /// Whether a path leads to a place of the caller's, or into one.
    fn is_own(&self, path: impl AsRef<Path>) -> bool {
        self.own.iter().any(|own| own.starts_with(&path) || path.as_ref().starts_with(own))
    }

    fn put(&mut self, directory: BorrowedFd<'_>, name: &OsStr, id: InodeId) -> Result<(), String> {
        let named = self.names.inodes.get(&id).ok_or("its inode could not be read")?;
        if named.kind == TmpfsKind::Directory {
            self.put_directory(directory, name, id)?;
        } else {
            let staged = self.stage(id, named)?;
            let staging = self.staging()?;
            let place = |flags| rustix::fs::renameat_with(&staging.fd, &staged, directory, name, flags);
            match place(RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => place(RenameFlags::EXCHANGE),
                placed => placed,
            }
            .map_err(say("put its name"))?;
        }
        self.done.put += 1;
        Ok(())
    }

    /// A new link to an inode, among what lies aside; it is made if the disk does not have it.
    fn stage(&mut self, id: InodeId, named: &NamedInode) -> Result<String, String> {
        let on_disk = self.on_disk(id)?;
        let inode = self.inode(id)?;
        let mem = self.mem;
        let staging = self.staging()?;
        let staged = staging.next();
        let Some(fd) = on_disk else {
            let mut restored = None;
            match &named.kind {
                TmpfsKind::Directory => return Err("a directory has one name only".into()),
                TmpfsKind::Regular => {
                    let made = page_cache::make(&staging.path.join(&staged), inode, mem);
                    restored = Some(made.map_err(|e| e.to_string())?);
                }
                TmpfsKind::Symlink { target } => {
                    rustix::fs::symlinkat(target.as_path(), &staging.fd, &staged)
                        .map_err(say("make the link"))?;
                }
                TmpfsKind::Special { major, minor } => {
                    let (kind, mode) =
                        (FileType::from_raw_mode(inode.mode), Mode::from_raw_mode(inode.mode & 0o7777));
                    let device = rustix::fs::makedev(*major, *minor);
                    rustix::fs::mknodat(&staging.fd, &staged, kind, mode, device).map_err(say("mknod"))?;
                }
            }
            let made =
                rustix::fs::openat(&staging.fd, &staged, AS_PATH, Mode::empty()).map_err(say("open it"))?;
            self.remember(id, &made)?;
            if let Some(restored) = restored {
                self.done.inodes.insert(id, Ok(restored));
            }
            return Ok(staged);
        };
        rustix::fs::linkat(&fd, "", &staging.fd, &staged, AtFlags::EMPTY_PATH).map_err(say("link it"))?;
        Ok(staged)
    }

    fn put_directory(&mut self, parent: BorrowedFd<'_>, name: &OsStr, id: InodeId) -> Result<(), String> {
        self.set_aside(parent, name)?;
        let Some(fd) = self.on_disk(id)? else {
            rustix::fs::mkdirat(parent, name, Mode::RWXU).map_err(say("make the directory"))?;
            let made = rustix::fs::openat(parent, name, AS_PATH, Mode::empty()).map_err(say("open it"))?;
            self.remember(id, &made)?;
            self.done.inodes.insert(id, Ok(Restored { created: true, ..Restored::default() }));
            return Ok(());
        };
        // Only now: it may be in what has been set aside.
        let from = rustix::fs::readlinkat(CWD, path_of(&fd), Vec::new()).map_err(say("look where it is"))?;
        rustix::fs::renameat_with(CWD, &from, parent, name, RenameFlags::NOREPLACE).map_err(say("rename it"))
    }

    fn remember(&mut self, id: InodeId, made: &OwnedFd) -> Result<(), String> {
        let numbers = self.handles.numbers(made).map_err(|e| format!("look at it: {e}"))?;
        self.made.insert(id, numbers);
        Ok(())
    }

    /// Takes away the names in a directory that were no more.
    fn remove_names(&mut self, directory: &DirectoryNames, fd: BorrowedFd<'_>) -> Result<(), String> {
        let here = self.inode(directory.inode)?.ino;
        let above = self.path(directory.inode);
        let known: BTreeMap<&[u8], Option<InodeId>> =
            directory.names.iter().map(|name| (name.name.as_bytes(), name.inode)).collect();
        for (name, ino) in entries(fd)? {
            let is_gone = match known.get(name.as_slice()) {
                Some(whose) => whose.is_none(),
                None => match &directory.listing {
                    Some(all) => !all.contains(&Bytes(name.clone())),
                    None => self.has_gone(ino, here, &name)?,
                },
            };
            let is_staging = self.staging.as_ref().is_some_and(|staging| staging.ino == ino);
            let is_gone = is_gone && !is_staging && !self.is_own(above.join(OsStr::from_bytes(&name)));
            let gone = if is_gone { self.set_aside(fd, OsStr::from_bytes(&name)) } else { Ok(false) };
            match gone {
                Ok(gone) => self.done.removed += u64::from(gone),
                Err(why) => self.stale(directory.inode, Some(&Bytes(name)), why),
            }
        }
        Ok(())
    }

    /// The inode of this number, if it was changed lately, and whether the number is the same inode's on the disk.
    fn changed(&self, ino: u64) -> Result<Option<(InodeId, &'a Inode, bool)>, String> {
        let Some(id) = self.by_ino.get(&ino) else { return Ok(None) };
        let inode = self.inode(*id)?;
        let same = self.handles.open(ino, inode.generation).map_err(|e| format!("look at it: {e}"))?;
        Ok(Some((*id, inode, same.is_some())))
    }

    /// Whether a name that the disk has, and of which nothing is known, leads to an inode that is known to have other ones only.
    fn has_gone(&self, ino: u64, directory: u64, name: &[u8]) -> Result<bool, String> {
        let Some((id, inode, is_same)) = self.changed(ino)? else { return Ok(false) };
        if !is_same || inode.nlink == 0 {
            // Its number is another inode's, or nobody's.
            return Ok(true);
        }
        let names = self.names.inodes.get(&id).map_or(&[][..], |named| &named.names);
        let is_this = names.iter().any(|link| link.directory == directory && link.name.as_bytes() == name);
        Ok(!is_this && knows_all(inode, names.len()))
    }

    /// Moves what has a name out of the way; whether there was anything.
    fn set_aside(&mut self, directory: BorrowedFd<'_>, name: &OsStr) -> Result<bool, String> {
        match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            other => _ = other.map_err(say("look at what has its name"))?,
        }
        let staging = self.staging()?;
        let aside = staging.next();
        rustix::fs::renameat_with(directory, name, &staging.fd, &aside, RenameFlags::NOREPLACE)
            .map_err(say("set aside what had its name"))?;
        Ok(true)
    }

    fn staging(&mut self) -> Result<&mut Staging, String> {
        if self.staging.is_none() {
            self.staging =
                Some(Staging::make(&self.handles, self.names).map_err(say("make room for what is moved"))?);
        }
        self.staging.as_mut().ok_or_else(|| "no room for what is moved".into())
    }

    /// Deletes what has been set aside.
    fn clear_away(&mut self) {
        let Some(staging) = self.staging.take() else { return };
        let kept = self.clear_directory(staging.fd.as_fd(), &staging.path, 0);
        match kept {
            Ok(true) => _ = rustix::fs::unlinkat(self.handles.root(), staging.name(), AtFlags::REMOVEDIR),
            Ok(false) => {}
            Err(why) => {
                let path = Bytes(staging.path.as_os_str().as_bytes().to_vec());
                self.done
                    .stale
                    .push(FileStale { path, why: format!("what had lost its names is left: {why}") });
            }
        }
        _ = rustix::fs::futimens(self.handles.root(), &staging.times);
    }

    /// Deletes what is in a directory, but not the only name of something that lived; whether it is empty now.
    fn clear_directory(&mut self, fd: BorrowedFd<'_>, path: &Path, depth: usize) -> Result<bool, String> {
        if depth > MAX_DEPTH {
            return Err("directories are too deep".into());
        }
        let mut is_empty = true;
        for name in entries(fd)?.into_keys() {
            let name = OsStr::from_bytes(&name);
            let found = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(say("look"))?;
            let below = path.join(name);
            if found.st_mode & libc::S_IFMT == libc::S_IFDIR {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let child = rustix::fs::openat(fd, name, flags, Mode::empty()).map_err(say("open"))?;
                if self.clear_directory(child.as_fd(), &below, depth + 1)? {
                    rustix::fs::unlinkat(fd, name, AtFlags::REMOVEDIR).map_err(say("remove a directory"))?;
                } else {
                    is_empty = false;
                }
            } else if let Some(inode) = self.last_of(&found)? {
                let why =
                    format!("the only name that is known of it had gone: it is kept as {}", below.display());
                self.done.stale.push(FileStale { path: inode.path.clone(), why });
                is_empty = false;
            } else {
                rustix::fs::unlinkat(fd, name, AtFlags::empty()).map_err(say("remove"))?;
            }
        }
        Ok(is_empty)
    }

    /// The inode, if the name that is to go is its last and the dead kernel had one for it.
    fn last_of(&self, found: &rustix::fs::Stat) -> Result<Option<&'a Inode>, String> {
        if found.st_nlink != 1 {
            return Ok(None);
        }
        let changed = self.changed(found.st_ino)?;
        Ok(changed.filter(|(_, inode, is_same)| *is_same && inode.nlink > 0).map(|(_, inode, _)| inode))
    }

    /// Owners, permissions and times of all that was changed; those of directories are right when nothing in them is touched any more.
    fn set_attributes(&mut self) {
        for (id, named) in &self.names.inodes {
            let Ok(inode) = self.inode(*id) else { continue };
            if inode.nlink == 0 || named.names.is_empty() && named.kind != TmpfsKind::Directory {
                continue;
            }
            let set = self.on_disk(*id).and_then(|fd| match fd {
                Some(fd) => page_cache::set_attributes(fd.as_fd(), inode).map_err(|e| e.to_string()),
                None => Ok(false),
            });
            if let Err(why) = set {
                let why = format!("its owner, mode, times or extended attributes: {why}");
                self.done.stale.push(FileStale { path: inode.path.clone(), why });
            }
        }
    }
}

/// Whether all names of an inode are known, if so many are.
fn knows_all(inode: &Inode, names: usize) -> bool {
    let has = if inode.mode & libc::S_IFMT == libc::S_IFDIR { 1 } else { inode.nlink as usize };
    names >= has
}

impl Staging {
    fn make(handles: &Handles, names: &DiskNames) -> Result<Self, Errno> {
        let times = page_cache::times_of(&rustix::fs::fstat(handles.root())?);
        // One that is there is of a resurrection that was cut short.
        let mut number = 0u32;
        let path = loop {
            let name = format!(".otherworld-{number}");
            match rustix::fs::mkdirat(handles.root(), &name, Mode::RWXU) {
                Ok(()) => break names.mountpoint.as_path().join(name),
                Err(Errno::EXIST) if number < 1000 => number += 1,
                Err(e) => return Err(e),
            }
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, &path, flags, Mode::empty())?;
        let ino = rustix::fs::fstat(&fd)?.st_ino;
        Ok(Self { fd, path, ino, count: 0, times })
    }

    fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }

    /// A name that nothing in it has.
    fn next(&mut self) -> String {
        self.count += 1;
        self.count.to_string()
    }
}

/// The names in a directory with the numbers of their inodes.
fn entries(directory: BorrowedFd<'_>) -> Result<BTreeMap<Vec<u8>, u64>, String> {
    let mut all = BTreeMap::new();
    for entry in Dir::read_from(directory).map_err(say("read the directory"))? {
        let entry = entry.map_err(say("read the directory"))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            all.insert(name.to_vec(), entry.ino());
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use crate::testing::Mem;
    use snapshot::{Link, Name, PAGE_SIZE, PageCacheRun, Timestamp};

    /// A directory that is taken for a file system, and what the dead kernel knew of it.
    struct Case {
        dir: tempfile::TempDir,
        snapshot: Snapshot,
        names: DiskNames,
        handles: Handles,
    }

    const OLD: Timestamp = Timestamp { sec: 1_000_000_000, nsec: 7 };

    impl Case {
        /// `None` for whoever may not open files by their numbers.
        fn new() -> Option<Self> {
            if !nix::unistd::geteuid().is_root() {
                eprintln!("only root can open files by number: left out");
                return None;
            }
            let dir = tempfile::tempdir().unwrap();
            let handles = Handles::of(dir.path()).expect("the directory for temporary files is on no disk");
            let mountpoint = Bytes(dir.path().as_os_str().as_bytes().to_vec());
            let names = DiskNames { mountpoint, ..DiskNames::default() };
            Some(Self { dir, snapshot: Snapshot::default(), names, handles })
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn write(&self, name: &str, text: &str) -> u64 {
            fs::write(self.path(name), text).unwrap();
            fs::metadata(self.path(name)).unwrap().ino()
        }

        fn mkdir(&self, name: &str) {
            fs::create_dir(self.path(name)).unwrap();
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.path(name)).unwrap()
        }

        fn list(&self, name: &str) -> Vec<String> {
            let names = fs::read_dir(self.path(name)).unwrap();
            let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }

        fn add(&mut self, inode: Inode, kind: TmpfsKind) -> InodeId {
            let id = InodeId(1 + self.names.inodes.len() as u64);
            if kind == TmpfsKind::Directory {
                self.names.directories.push(DirectoryNames { inode: id, names: Vec::new(), listing: None });
            }
            self.snapshot.inodes.insert(id, inode);
            self.names.inodes.insert(id, NamedInode { kind, names: Vec::new() });
            id
        }

        fn inode(mode: u32, size: u64) -> Inode {
            let json = serde_json::json!({
                "ino": 0x7fff_ff00u32, "generation": 1, "dev_major": 0, "dev_minor": 0, "fs_type": "ext4", "mode": mode,
                "uid": 1, "gid": 2, "nlink": 0, "size": size, "atime": OLD, "mtime": OLD, "ctime": OLD, "path": "/what",
                "dirty": true, "pages": [], "lost_pages": 0,
            });
            serde_json::from_value(json).unwrap()
        }

        /// Something that the disk has under this name.
        fn known(&mut self, name: &str) -> InodeId {
            let path = self.path(name);
            let fd = sys::open(&path, libc::O_PATH | libc::O_NOFOLLOW, 0).unwrap();
            let (ino, generation) = self.handles.numbers(&fd).unwrap();
            let meta = fs::symlink_metadata(&path).unwrap();
            let mtime = Timestamp { sec: meta.mtime(), nsec: meta.mtime_nsec() as u32 };
            let inode = Inode {
                ino,
                generation,
                uid: meta.uid(),
                gid: meta.gid(),
                mtime,
                atime: mtime,
                ..Self::inode(meta.mode(), meta.size())
            };
            let kind = if meta.is_dir() { TmpfsKind::Directory } else { TmpfsKind::Regular };
            self.add(inode, kind)
        }

        /// A file of whole pages that the disk does not have.
        fn fresh(&mut self, pages: &[u64]) -> InodeId {
            let run = |(index, pfn): (usize, &u64)| PageCacheRun {
                index: index as u64,
                pfn: *pfn,
                count: 1,
                dirty: true,
            };
            let runs = pages.iter().enumerate().map(run).collect();
            let inode = Inode { pages: runs, ..Self::inode(0o100_640, pages.len() as u64 * PAGE_SIZE) };
            self.add_fresh(inode, TmpfsKind::Regular)
        }

        fn add_fresh(&mut self, mut inode: Inode, kind: TmpfsKind) -> InodeId {
            inode.ino += self.names.inodes.len() as u64;
            let id = self.add(inode, kind);
            self.snapshot.unwritten.push(id);
            id
        }

        /// What a name was the name of.
        fn name(&mut self, directory: InodeId, name: &str, inode: Option<InodeId>) {
            let number = self.snapshot.inodes[&directory].ino;
            let known = self.names.directories.iter_mut().find(|known| known.inode == directory).unwrap();
            known.names.push(Name { name: name.into(), inode });
            if let Some(id) = inode {
                let names = &mut self.names.inodes.get_mut(&id).unwrap().names;
                names.push(Link { directory: number, name: name.into() });
                self.snapshot.inodes.get_mut(&id).unwrap().nlink += 1;
            }
        }

        fn run(&self) -> Reconciled {
            // Page frame n is filled with the letter 'a' + n.
            let mem = Mem((0..8u8).flat_map(|n| [b'a' + n; PAGE_SIZE as usize]).collect());
            reconcile(&self.snapshot, &self.names, &mem, 0, &["/what/own/place".into()]).unwrap()
        }

        /// Runs it; nothing may go wrong, nothing may be left.
        fn done(&self) -> Reconciled {
            let done = self.run();
            assert!(done.stale.is_empty(), "{:?}", done.stale);
            assert!(done.inodes.values().all(Result::is_ok), "{:?}", done.inodes);
            assert!(!self.list(".").iter().any(|name| name.starts_with(".otherworld")));
            let again = self.run();
            assert_eq!((again.put, again.removed), (0, 0), "all is as it was, and yet something was done");
            done
        }
    }

    macro_rules! case {
        () => {
            match Case::new() {
                Some(case) => case,
                None => return,
            }
        };
    }

    #[test]
    fn a_file_that_was_written_and_renamed_over_another_is_the_new_one_under_its_name_only() {
        let mut case = case!();
        let new = case.write("f.tmp", "new");
        case.write("f", "old");
        let (root, file) = (case.known("."), case.known("f.tmp"));
        case.name(root, "f", Some(file));
        let done = case.done();
        assert_eq!((done.put, done.removed), (1, 1));
        assert_eq!(case.list("."), ["f"]);
        assert_eq!((case.read("f").as_str(), fs::metadata(case.path("f")).unwrap().ino()), ("new", new));
    }

    #[test]
    fn what_the_disk_never_saw_is_made_with_all_its_names() {
        let mut case = case!();
        let root = case.known(".");
        let file = case.fresh(&[2, 3]);
        let directory = case.add_fresh(Case::inode(0o041_731, 4096), TmpfsKind::Directory);
        let link = case.add(Case::inode(0o120_777, 2), TmpfsKind::Symlink { target: "to".into() });
        let fifo = case.add(Case::inode(0o010_600, 0), TmpfsKind::Special { major: 0, minor: 0 });
        case.name(root, "d", Some(directory));
        case.name(root, "f", Some(file));
        case.name(directory, "f2", Some(file));
        case.name(directory, "l", Some(link));
        case.name(directory, "p", Some(fifo));
        let done = case.run();
        assert!(done.stale.is_empty(), "{:?}", done.stale);
        assert!(done.inodes.values().all(|made| made.as_ref().is_ok_and(|made| made.created)));
        let file = fs::metadata(case.path("f")).unwrap();
        assert_eq!(case.read("f"), "c".repeat(4096) + &"d".repeat(4096));
        assert_eq!((file.ino(), file.nlink()), (fs::metadata(case.path("d/f2")).unwrap().ino(), 2));
        for (name, mode) in [("d", 0o1731), ("f", 0o640), ("d/l", 0o777), ("d/p", 0o600)] {
            let meta = fs::symlink_metadata(case.path(name)).unwrap();
            let times = (meta.mtime(), meta.mtime_nsec());
            assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (mode, 1, 2), "{name}");
            assert_eq!(times, (OLD.sec, OLD.nsec.into()), "{name}");
        }
        assert_eq!(fs::read_link(case.path("d/l")).unwrap(), Path::new("to"));
    }

    #[test]
    fn names_that_were_exchanged_are() {
        let mut case = case!();
        case.write("a", "was a");
        case.write("b", "was b");
        let (root, a, b) = (case.known("."), case.known("a"), case.known("b"));
        case.name(root, "a", Some(b));
        case.name(root, "b", Some(a));
        case.done();
        assert_eq!((case.read("a").as_str(), case.read("b").as_str()), ("was b", "was a"));
    }

    #[test]
    fn a_directory_that_took_the_place_of_the_one_it_was_in_comes_out() {
        let mut case = case!();
        case.mkdir("n");
        case.mkdir("n/x");
        case.write("n/x/f", "text");
        let (root, x) = (case.known("."), case.known("n/x"));
        case.name(root, "n", Some(x));
        case.done();
        assert_eq!((case.list("."), case.read("n/f").as_str()), (vec!["n".to_owned()], "text"));
    }

    #[test]
    fn directories_change_places_with_what_is_in_them() {
        let mut case = case!();
        case.mkdir("a");
        case.mkdir("a/b");
        case.write("a/f", "in a");
        let (root, a, b) = (case.known("."), case.known("a"), case.known("a/b"));
        case.name(root, "b", Some(b));
        case.name(root, "a", None);
        case.name(b, "a", Some(a));
        // Parents before children, as they were.
        case.names.directories.swap(1, 2);
        case.done();
        assert_eq!((case.list("."), case.read("b/a/f").as_str()), (vec!["b".to_owned()], "in a"));
    }

    #[test]
    fn what_was_removed_is_with_all_in_it() {
        let mut case = case!();
        case.mkdir("d");
        case.mkdir("d/e");
        case.write("d/e/f", "x");
        case.write("stays", "x");
        let root = case.known(".");
        case.name(root, "d", None);
        case.name(root, "never", None);
        assert_eq!(case.done().removed, 1);
        assert_eq!(case.list("."), ["stays"]);
    }

    #[test]
    fn a_number_that_another_file_has_got_is_no_name_of_it() {
        let mut case = case!();
        case.write("old", "old");
        let (root, old) = (case.known("."), case.known("old"));
        let reused = case.fresh(&[1]);
        let numbers = {
            let old = &case.snapshot.inodes[&old];
            (old.ino, old.generation + 1)
        };
        let inode = case.snapshot.inodes.get_mut(&reused).unwrap();
        (inode.ino, inode.generation) = numbers;
        case.names.inodes.remove(&old);
        case.name(root, "new", Some(reused));
        let done = case.run();
        assert!(done.stale.is_empty() && done.inodes[&reused].is_ok());
        assert_eq!((case.list("."), case.read("new")), (vec!["new".to_owned()], "b".repeat(4096)));
    }

    #[test]
    fn the_callers_own_places_stay() {
        let mut case = case!();
        case.mkdir("own");
        let root = case.known(".");
        // They are as old as nothing for the dead kernel.
        let new = case.add_fresh(Case::inode(0o040_700, 4096), TmpfsKind::Directory);
        case.name(root, "own", Some(new));
        case.name(root, "other", None);
        case.write("own/report", "new");
        case.run();
        assert_eq!(case.read("own/report"), "new");
    }

    #[test]
    fn links_come_and_go() {
        let mut case = case!();
        case.write("a", "text");
        fs::hard_link(case.path("a"), case.path("gone")).unwrap();
        let (root, a) = (case.known("."), case.known("a"));
        case.name(root, "a", Some(a));
        case.name(root, "b", Some(a));
        case.done();
        assert_eq!(case.list("."), ["a", "b"]);
        assert_eq!(fs::metadata(case.path("b")).unwrap().nlink(), 2);
    }

    #[test]
    fn the_last_that_is_left_of_a_living_file_is_kept() {
        let mut case = case!();
        case.mkdir("d");
        case.write("d/f", "dear");
        let (root, file) = (case.known("."), case.known("d/f"));
        // It lives under a name that is not known.
        case.snapshot.inodes.get_mut(&file).unwrap().nlink = 1;
        case.name(root, "d", None);
        let done = case.run();
        assert_eq!(done.stale.len(), 1);
        let aside = case.list(".").into_iter().find(|name| name.starts_with(".otherworld")).unwrap();
        assert!(done.stale[0].why.contains(&aside), "{:?}", done.stale);
        assert_eq!(case.read(&format!("{aside}/1/f")), "dear");
    }

    #[test]
    fn what_is_not_in_a_listing_has_gone() {
        let mut case = case!();
        for name in ["stays", "gone"] {
            case.write(name, "text");
        }
        let root = case.known(".");
        case.names.directories[0].listing = Some(["stays", "new"].map(Bytes::from).into());
        case.name(root, "never", None);
        // Which needs room for what is moved: that is in no listing either.
        case.write("old", "text");
        let renamed = case.known("old");
        case.name(root, "new", Some(renamed));
        let done = case.done();
        assert_eq!((done.put, done.removed), (1, 2));
        assert_eq!(case.list("."), ["new", "stays"]);
    }

    #[test]
    fn a_name_of_which_nothing_is_known_stays() {
        let mut case = case!();
        case.write("a", "text");
        fs::hard_link(case.path("a"), case.path("b")).unwrap();
        let (root, a) = (case.known("."), case.known("a"));
        case.name(root, "a", Some(a));
        // One of two names: the other may be any.
        case.snapshot.inodes.get_mut(&a).unwrap().nlink = 2;
        assert_eq!(case.done().removed, 0);
        assert_eq!(case.list("."), ["a", "b"]);
    }

    #[test]
    fn a_removed_file_that_is_open_is_held() {
        let mut case = case!();
        case.write("gone", "still here");
        let (root, gone) = (case.known("."), case.known("gone"));
        case.name(root, "gone", None);
        let file = serde_json::json!({
            "kind": { "type": "regular" }, "path": "/gone", "deleted": true, "flags": 0, "pos": 0, "inode": gone,
            "owner_pid": 0, "owner_signal": 0, "count": 1,
        });
        case.snapshot.files.insert(snapshot::FileId(9), serde_json::from_value(file).unwrap());
        let done = case.run();
        assert!(case.list(".").is_empty() && done.stale.is_empty(), "{:?}", done.stale);
        assert_eq!(std::io::read_to_string(&done.held[&gone]).unwrap(), "still here");
        assert_eq!(done.held[&gone].metadata().unwrap().nlink(), 0);
    }

    #[test]
    fn owners_modes_and_times_are_set_and_a_file_without_its_pages_is_not_made() {
        let mut case = case!();
        case.write("a", "text");
        let (root, a) = (case.known("."), case.known("a"));
        case.name(root, "a", Some(a));
        let inode = case.snapshot.inodes.get_mut(&a).unwrap();
        (inode.uid, inode.mode, inode.mtime) = (77, 0o104_750, OLD);
        let missing = case.fresh(&[1, 2]);
        case.snapshot.inodes.get_mut(&missing).unwrap().pages.pop();
        case.name(root, "missing", Some(missing));
        let done = case.run();
        let meta = fs::metadata(case.path("a")).unwrap();
        assert_eq!((meta.uid(), meta.permissions().mode(), meta.mtime()), (77, 0o104_750, OLD.sec));
        assert!(
            done.inodes[&missing].as_ref().is_err_and(|why| why.contains("1 of its 2 pages")),
            "{:?}",
            done.inodes
        );
        assert_eq!(case.list("."), ["a"]);
    }
}
