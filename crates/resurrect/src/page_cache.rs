//! Brings files on disk up to what the dead kernel's page cache held of them.
//!
//! What a program had written and the dead kernel had not yet written to disk is only in dirty pages of its memory. [`restore`]
//! does one file; it knows nothing of processes, so that it serves open files now and all other dirty inodes later.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;

use memmap2::MmapOptions;
use rustix::fs::{AtFlags, FallocateFlags, Gid, Uid};
use snapshot::{Extent, Inode, PAGE_SIZE, PageCacheRun, PhysMem, PhysMemError};

use crate::extent;

/// Bytes that are compared at a time.
const COMPARED: usize = 256 << 10;

/// What [`restore`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// The file was not on the disk and has been created.
    pub created: bool,
    /// Bytes written.
    pub written: u64,
    /// The size on disk was another one.
    pub resized: bool,
}

/// Why a file cannot be brought up to date. Nothing has been written to it, except with `Io` and `Memory`.
#[derive(Debug, thiserror::Error)]
pub enum PageCacheError {
    /// Another inode than the dead kernel's has this name.
    #[error("{path} is inode {found} now and was inode {expected}: it was replaced meanwhile")]
    Replaced {
        #[allow(missing_docs)]
        path: String,
        #[allow(missing_docs)]
        found: u64,
        #[allow(missing_docs)]
        expected: u64,
    },
    /// It is there, but no regular file.
    #[error("{path} is not a regular file any more")]
    NotAFile {
        #[allow(missing_docs)]
        path: String,
    },
    /// It was a directory, and is something else.
    #[error("{path} is not a directory any more")]
    NotADirectory {
        #[allow(missing_docs)]
        path: String,
    },
    /// The names of the dead kernel lead through no symbolic link. Following one, somebody could have a file made where he may not.
    #[error("{path}: a symbolic link is in its way now")]
    Redirected {
        #[allow(missing_docs)]
        path: String,
    },
    /// The disk does not have the file, and the page cache not all of its contents.
    #[error("{path} is not on the disk, and the dead page cache has {have} of its {want} pages only")]
    Incomplete {
        #[allow(missing_docs)]
        path: String,
        #[allow(missing_docs)]
        have: u64,
        #[allow(missing_docs)]
        want: u64,
    },
    /// Some pages are on the disk only, where the disk does not look for them.
    #[error("{path}: {count} of its pages are on the disk only, and not where the disk has the file")]
    Elsewhere {
        #[allow(missing_docs)]
        path: String,
        #[allow(missing_docs)]
        count: u64,
    },
    /// A page cannot be read.
    #[error("{path}: {source}")]
    Memory {
        #[allow(missing_docs)]
        path: String,
        #[allow(missing_docs)]
        source: PhysMemError,
    },
    /// A system call failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// Which step.
        what: &'static str,
        #[allow(missing_docs)]
        path: String,
        #[allow(missing_docs)]
        source: io::Error,
    },
}

/// Inode numbers mean something across a reboot on this file system.
fn has_lasting_inodes(inode: &Inode) -> bool {
    !inode.lives_in_memory()
}

/// Writes what is newer in the dead page cache than on the disk to the regular file at `path`.
///
/// Dirty pages are written, and all cached pages when size or modification time on disk are other ones than they were in memory (pages
/// may be clean because their data had been written, while the transaction that says where to find it was never committed); then the size
/// and the times are set. A file that the disk never saw is created with its owner, mode and parent directories, if all of its contents
/// are known. A file that is up to date is not touched. Of a directory only this counts: that it is there.
///
/// `doubt`: the file was changed lately. Pages may then be clean because they had been written (or were being written) to blocks of which the disk does not know
/// yet whose they are, with nothing else to tell by: the page cache is compared with the disk.
pub fn restore(
    path: &Path,
    inode: &Inode,
    doubt: bool,
    mem: &dyn PhysMem,
) -> Result<Restored, PageCacheError> {
    let name = || path.display().to_string();
    let io = |what| move |source| PageCacheError::Io { what, path: path.display().to_string(), source };
    let mut done = Restored::default();
    if inode.mode & libc::S_IFMT == libc::S_IFDIR {
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(PageCacheError::NotADirectory { path: name() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                refuse_links(path)?;
                create_directory(path, inode).map_err(io("create"))?;
                done.created = true;
            }
            Err(e) => return Err(io("look for")(e)),
        }
        return Ok(done);
    }
    let on_disk = match std::fs::metadata(path) {
        Ok(meta) => {
            verify(path, inode, &meta)?;
            Some(meta)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            require_all_pages(path, inode)?;
            refuse_links(path)?;
            done.created = true;
            None
        }
        Err(e) => return Err(io("look for")(e)),
    };
    done.resized = on_disk.as_ref().is_some_and(|meta| meta.size() != inode.size);
    let all = done.created
        || done.resized
        || on_disk.is_some_and(|meta| is_older(&meta, inode))
        || doubt && differs(path, inode, mem)?;
    if !all && !inode.pages.iter().any(|r| r.dirty) {
        return Ok(done);
    }
    let file = if done.created {
        create(path, inode).map_err(io("create"))?
    } else {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io("open for writing"))?;
        if doubt {
            require_disk_only(&file, path, inode)?;
        }
        file
    };
    done.written = fill(&file, path, inode, all, mem)?;
    Ok(done)
}

/// That the disk has, where the dead kernel had it, what the page cache has not.
fn require_disk_only(file: &File, path: &Path, inode: &Inode) -> Result<(), PageCacheError> {
    let wanted = inode.on_disk_only();
    if wanted.is_empty() {
        return Ok(());
    }
    let io = |source| PageCacheError::Io { what: "map", path: path.display().to_string(), source };
    let mapped = extent::of(file).map_err(io)?;
    let is_there = |part: &&Extent| extent::covers(&mapped, part);
    let elsewhere: u64 = wanted.iter().filter(|part| !is_there(part)).map(|part| part.count).sum();
    match elsewhere {
        0 => Ok(()),
        count => Err(PageCacheError::Elsewhere { path: path.display().to_string(), count }),
    }
}

/// Makes holes again where the disk has something.
fn punch_holes(file: &File, inode: &Inode) -> io::Result<()> {
    for hole in inode.holes() {
        let (start, end) = (hole.start.saturating_mul(PAGE_SIZE), hole.end.saturating_mul(PAGE_SIZE));
        if has_data(file, start, end)? {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, start, end - start)?;
        }
    }
    Ok(())
}

/// Whether a file has anything but a hole there.
fn has_data(file: &File, start: u64, end: u64) -> io::Result<bool> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(start)) {
        Ok(at) => Ok(at < end),
        Err(rustix::io::Errno::NXIO) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Makes a regular file that the disk never saw under a name of the caller's, with all it held.
///
/// # Errors
/// As [`restore`]; nothing is left of it then.
pub(crate) fn make(path: &Path, inode: &Inode, mem: &dyn PhysMem) -> Result<Restored, PageCacheError> {
    require_all_pages(inode.path.as_path(), inode)?;
    let io = |what| move |source| PageCacheError::Io { what, path: inode.path.to_string(), source };
    let file = create(path, inode).map_err(io("create"))?;
    match fill(&file, inode.path.as_path(), inode, true, mem) {
        Ok(written) => Ok(Restored { created: true, written, resized: false }),
        Err(error) => {
            _ = std::fs::remove_file(path);
            Err(error)
        }
    }
}

/// Whether the disk has other contents than the page cache, where that is clean.
fn differs(path: &Path, inode: &Inode, mem: &dyn PhysMem) -> Result<bool, PageCacheError> {
    let io = |what| move |source| PageCacheError::Io { what, path: path.display().to_string(), source };
    if inode.huge_page.is_some() {
        return Ok(false);
    }
    let file = File::open(path).map_err(io("open for reading"))?;
    for hole in inode.holes() {
        let (start, end) = (hole.start.saturating_mul(PAGE_SIZE), hole.end.saturating_mul(PAGE_SIZE));
        if has_data(&file, start, end).map_err(io("look for holes in"))? {
            return Ok(true);
        }
    }
    let mut on_disk = vec![0; COMPARED];
    let mut in_memory = vec![0; COMPARED];
    for run in inode.pages.iter().filter(|run| !run.dirty) {
        let start = run.index.saturating_mul(PAGE_SIZE);
        let end = start.saturating_add(u64::from(run.count) * PAGE_SIZE).min(inode.size);
        let mut at = start;
        while at < end {
            let len = (end - at).min(COMPARED as u64) as usize;
            let (on_disk, in_memory) = (&mut on_disk[..len], &mut in_memory[..len]);
            let from = run.pfn.saturating_mul(PAGE_SIZE).saturating_add(at - start);
            let memory = |source| PageCacheError::Memory { path: path.display().to_string(), source };
            mem.read(from, in_memory).map_err(memory)?;
            match file.read_exact_at(on_disk, at) {
                Ok(()) if on_disk == in_memory => {}
                Ok(()) => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(true),
                Err(e) => return Err(io("read")(e)),
            }
            at += len as u64;
        }
    }
    Ok(false)
}

/// Makes a regular file that has lost its name again, with all it held: under the old name, which then goes as well, or, if somebody
/// else has that name, without any. Open for reading and writing.
pub fn restore_unnamed(path: &Path, inode: &Inode, mem: &dyn PhysMem) -> Result<File, PageCacheError> {
    let directory = path.parent().and_then(|parent| File::open(parent).ok());
    let before = directory.as_ref().and_then(|directory| rustix::fs::fstat(directory).ok());
    let made = make_unnamed(path, inode, mem);
    // For programs nothing has happened in it.
    if let (Some(directory), Some(before)) = (directory, before) {
        _ = rustix::fs::futimens(directory, &times_of(&before));
    }
    made
}

/// Times of access and modification, to be set again.
pub(crate) fn times_of(stat: &rustix::fs::Stat) -> rustix::fs::Timestamps {
    let stamp = |tv_sec, nsec: u64| rustix::fs::Timespec { tv_sec, tv_nsec: nsec as i64 };
    rustix::fs::Timestamps {
        last_access: stamp(stat.st_atime, stat.st_atime_nsec),
        last_modification: stamp(stat.st_mtime, stat.st_mtime_nsec),
    }
}

fn make_unnamed(path: &Path, inode: &Inode, mem: &dyn PhysMem) -> Result<File, PageCacheError> {
    let io = |what| move |source| PageCacheError::Io { what, path: path.display().to_string(), source };
    require_all_pages(path, inode)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let directory = path.ancestors().skip(1).find(|above| above.is_dir()).unwrap_or(Path::new("/"));
    match path.symlink_metadata() {
        Err(_) if path.parent() == Some(directory) => {
            refuse_links(path)?;
            let file = create(path, inode).map_err(io("create"))?;
            std::fs::remove_file(path).map_err(io("remove"))?;
            fill(&file, path, inode, true, mem)?;
            Ok(file)
        }
        // The disk had not heard yet that the name was to go.
        Ok(meta) if has_lasting_inodes(inode) && meta.is_file() && meta.ino() == inode.ino => {
            restore(path, inode, true, mem)?;
            let file = options.open(path).map_err(io("open"))?;
            std::fs::remove_file(path).map_err(io("remove"))?;
            Ok(file)
        }
        // Somebody else has the name, or the directory is gone as well.
        Ok(_) | Err(_) => {
            if !directory.canonicalize().is_ok_and(|real| real == directory) {
                return Err(PageCacheError::Redirected { path: path.display().to_string() });
            }
            let file = options.mode(0o600).custom_flags(libc::O_TMPFILE).open(directory);
            let file = file.map_err(io("create a file without a name beside"))?;
            set_owner_and_mode(&file, inode).map_err(io("set the owner of"))?;
            fill(&file, path, inode, true, mem)?;
            Ok(file)
        }
    }
}

/// That the page cache has all of a file's contents: nobody else has them.
fn require_all_pages(path: &Path, inode: &Inode) -> Result<(), PageCacheError> {
    match inode.missing_pages() {
        (0, _) => Ok(()),
        (missing, want) => {
            let path = path.display().to_string();
            Err(PageCacheError::Incomplete { path, have: want - missing, want })
        }
    }
}

/// Gives an empty file all that the page cache held of another one.
pub(crate) fn copy_contents(file: &File, inode: &Inode, mem: &dyn PhysMem) -> Result<(), PageCacheError> {
    let path = inode.path.as_path();
    let io = |what| move |source| PageCacheError::Io { what, path: path.display().to_string(), source };
    set_owner_and_mode(file, inode).map_err(io("set the owner of"))?;
    fill(file, path, inode, true, mem).map(drop)
}

/// Cuts a run into pieces that can be mapped at a time: a swapped-out page is mapped by reading it.
fn parts(run: &PageCacheRun) -> impl Iterator<Item = PageCacheRun> {
    const PART: u32 = 2048;
    let run = *run;
    (0..run.count).step_by(PART as usize).map(move |skip| PageCacheRun {
        index: run.index.saturating_add(skip.into()),
        pfn: run.pfn.saturating_add(skip.into()),
        count: (run.count - skip).min(PART),
        dirty: run.dirty,
    })
}

/// Writes what the page cache held, or only what of it was dirty, into a file, and gives it its size and times; returns the bytes written.
fn fill(
    file: &File,
    path: &Path,
    inode: &Inode,
    all: bool,
    mem: &dyn PhysMem,
) -> Result<u64, PageCacheError> {
    let name = || path.display().to_string();
    let io = |what| move |source| PageCacheError::Io { what, path: path.display().to_string(), source };
    let mut buffer = vec![0; 64 << 10];
    let mut written = 0;
    if let Some(page_size) = inode.huge_page {
        written = fill_huge(file, page_size, inode, mem).map_err(io("fill"))?;
    }
    let wanted = |run: &&PageCacheRun| inode.huge_page.is_none() && (all || run.dirty);
    for run in inode.pages.iter().filter(wanted).flat_map(parts) {
        let start = run.index.saturating_mul(PAGE_SIZE);
        let len = (u64::from(run.count) * PAGE_SIZE).min(inode.size.saturating_sub(start));
        if len == 0 {
            continue;
        }
        let at = run.pfn.saturating_mul(PAGE_SIZE);
        let memory = |source| PageCacheError::Memory { path: name(), source };
        // Mapping a few pages takes longer than copying them.
        if len <= buffer.len() as u64 {
            let buffer = &mut buffer[..len as usize];
            mem.read(at, buffer).map_err(memory)?;
            written += write_but_holes(file, buffer, start).map_err(io("write"))?;
        } else {
            let bytes = mem.map(at, len as usize).map_err(memory)?;
            written += write_but_holes(file, &bytes, start).map_err(io("write"))?;
        }
    }
    punch_holes(file, inode).map_err(io("make holes in"))?;
    file.set_len(inode.size).map_err(io("set the size of"))?;
    let times =
        [inode.atime, inode.mtime].map(|t| libc::timespec { tv_sec: t.sec, tv_nsec: i64::from(t.nsec) });
    // SAFETY: two timespecs, as futimens reads them.
    nix::errno::Errno::result(unsafe { libc::futimens(file.as_raw_fd(), times.as_ptr()) })
        .map_err(|e| io("set the times of")(e.into()))?;
    Ok(written)
}

/// Writes, but zeroes where there is a hole: who had read a hole, had its pages in the page cache. Returns the bytes written.
fn write_but_holes(file: &File, bytes: &[u8], start: u64) -> io::Result<u64> {
    let mut written = 0;
    let mut rest = bytes;
    let mut at = start;
    while !rest.is_empty() {
        let is_zero = |chunk: &[u8]| chunk.iter().all(|byte| *byte == 0);
        let pages = |zero| rest.chunks(PAGE_SIZE as usize).take_while(move |page| is_zero(page) == zero);
        let zeroes: usize = pages(true).map(<[u8]>::len).sum();
        let len = if zeroes > 0 { zeroes } else { pages(false).map(<[u8]>::len).sum() };
        let (part, behind) = rest.split_at(len);
        if zeroes == 0 || has_data(file, at, at + len as u64)? {
            file.write_all_at(part, at)?;
            written += len as u64;
        }
        (rest, at) = (behind, at + len as u64);
    }
    Ok(written)
}

/// The same for a file on a hugetlbfs, which cannot be written to by write(2).
fn fill_huge(file: &File, page_size: u64, inode: &Inode, mem: &dyn PhysMem) -> io::Result<u64> {
    let block = file.metadata()?.blksize();
    if block != page_size {
        return Err(io::Error::other(format!("its pages are of {block} bytes, and were of {page_size}")));
    }
    file.set_len(inode.size)?;
    let mut written = 0;
    for run in inode.pages.iter().flat_map(parts) {
        let (at, len) = (run.index.saturating_mul(PAGE_SIZE), u64::from(run.count) * PAGE_SIZE);
        if at.checked_add(len).is_none_or(|end| end > inode.size) {
            return Err(io::Error::other(format!("page {} is behind its end", run.index)));
        }
        // Mappings are of whole huge pages.
        let (start, end) = (at / page_size * page_size, (at + len).next_multiple_of(page_size));
        // SAFETY: of a file that is nobody else's yet; its pages are promised to the mapping or it is refused.
        let mut map = unsafe { MmapOptions::new().offset(start).len((end - start) as usize).map_mut(file) }?;
        let to = map.get_mut((at - start) as usize..).and_then(|tail| tail.get_mut(..len as usize));
        let to = to.ok_or_else(|| io::Error::other("a mapping that is too short"))?;
        mem.read(run.pfn.saturating_mul(PAGE_SIZE), to).map_err(io::Error::other)?;
        written += len;
    }
    Ok(written)
}

pub(crate) fn verify(path: &Path, inode: &Inode, meta: &Metadata) -> Result<(), PageCacheError> {
    let path = || path.display().to_string();
    if !meta.is_file() {
        return Err(PageCacheError::NotAFile { path: path() });
    }
    if has_lasting_inodes(inode) && meta.ino() != inode.ino {
        return Err(PageCacheError::Replaced { path: path(), found: meta.ino(), expected: inode.ino });
    }
    Ok(())
}

/// The disk knows another modification time than the dead kernel did. File systems that keep whole seconds only say 0 nanoseconds.
pub(crate) fn is_older(meta: &Metadata, inode: &Inode) -> bool {
    let nsec = meta.mtime_nsec();
    meta.mtime() != inode.mtime.sec || (nsec != 0 && nsec != i64::from(inode.mtime.nsec))
}

/// Whether what there is of a path that is to be made is what it says.
fn refuse_links(path: &Path) -> Result<(), PageCacheError> {
    let there = path.ancestors().skip(1).find(|above| above.symlink_metadata().is_ok());
    let is_straight = |above: &Path| above.canonicalize().is_ok_and(|real| real == above);
    // The name itself may be a link that leads nowhere.
    if path.symlink_metadata().is_ok() || !there.is_some_and(is_straight) {
        return Err(PageCacheError::Redirected { path: path.display().to_string() });
    }
    Ok(())
}

/// Gives an inode of any type, open as by O_PATH, the owner, permission bits, extended attributes and times that it had; whether something
/// was different.
pub(crate) fn set_attributes(fd: BorrowedFd<'_>, inode: &Inode) -> io::Result<bool> {
    let empty = AtFlags::EMPTY_PATH;
    let now = rustix::fs::statat(fd, "", empty)?;
    let is_owned = now.st_uid == inode.uid && now.st_gid == inode.gid;
    let is_link = now.st_mode & libc::S_IFMT == libc::S_IFLNK;
    if !is_owned {
        let owner = (Uid::from_raw(inode.uid), Gid::from_raw(inode.gid));
        rustix::fs::chownat(fd, "", Some(owner.0), Some(owner.1), empty)?;
    }
    // After the owner: chown takes capabilities away. What cannot be set is said when the rest has been done.
    let xattrs = inode.xattrs.as_ref().map_or(Ok(false), |wanted| crate::xattr::set(fd, wanted));
    let had_xattrs = xattrs == Ok(false);
    // After the owner: chown clears set-id bits; and after access control lists, which have permission bits in them.
    let has_mode = now.st_mode & 0o7777 == inode.mode & 0o7777;
    if !(is_link || has_mode && is_owned && had_xattrs) {
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(inode.mode & 0o7777);
        std::fs::set_permissions(crate::handle::path_of(&fd), permissions)?;
    }
    let stamp = |t: snapshot::Timestamp| rustix::fs::Timespec { tv_sec: t.sec, tv_nsec: t.nsec.into() };
    let same =
        |t: snapshot::Timestamp, sec, nsec: u64| t.sec == sec && (nsec == 0 || u64::from(t.nsec) == nsec);
    let has_times = same(inode.mtime, now.st_mtime, now.st_mtime_nsec)
        && same(inode.atime, now.st_atime, now.st_atime_nsec);
    if !has_times {
        let times =
            rustix::fs::Timestamps { last_access: stamp(inode.atime), last_modification: stamp(inode.mtime) };
        rustix::fs::utimensat(fd, "", &times, empty)?;
    }
    xattrs.map_err(io::Error::other)?;
    Ok(!is_owned || !had_xattrs || !has_mode && !is_link || !has_times)
}

fn create_directory(path: &Path, inode: &Inode) -> io::Result<()> {
    create_parents(path)?;
    DirBuilder::new().mode(0o700).create(path)?;
    set_owner_and_mode(&File::open(path)?, inode)
}

fn create(path: &Path, inode: &Inode) -> io::Result<File> {
    create_parents(path)?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    set_owner_and_mode(&file, inode)?;
    Ok(file)
}

fn create_parents(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| DirBuilder::new().recursive(true).mode(0o755).create(parent))
}

fn set_owner_and_mode(file: &File, inode: &Inode) -> io::Result<()> {
    fchown(file, Some(inode.uid), Some(inode.gid))?;
    // After the owner: chown clears set-id bits.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(inode.mode & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_made_behind_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        std::fs::create_dir(dir.join("real")).unwrap();
        std::os::unix::fs::symlink("real", dir.join("link")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.join("dangling")).unwrap();
        assert!(refuse_links(&dir.join("real/a")).is_ok());
        assert!(refuse_links(&dir.join("real/a/b/c")).is_ok());
        for path in ["link/a", "link/a/b", "dangling", "dangling/a"] {
            let refused = refuse_links(&dir.join(path));
            assert!(matches!(refused, Err(PageCacheError::Redirected { .. })), "{path}: {refused:?}");
        }
    }
    use snapshot::{PageCacheRun, PhysMap, PhysRange};
    use std::os::unix::fs::PermissionsExt;

    struct Mem(Vec<u8>, [PhysRange; 1]);

    impl PhysMem for Mem {
        fn ranges(&self) -> &[PhysRange] {
            &self.1
        }
        fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
            let start = addr as usize;
            let absent = PhysMemError::NotPresent { addr, len: len as u64 };
            self.0.get(start..start + len).map(PhysMap::borrowed).ok_or(absent)
        }
    }

    /// Page frame n is filled with the letter 'a' + n.
    fn mem() -> Mem {
        let bytes: Vec<u8> = (0..8u8).flat_map(|n| [b'a' + n; 4096]).collect();
        let len = bytes.len() as u64;
        Mem(bytes, [PhysRange { start: 0, len }])
    }

    fn inode(size: u64, pages: &[(u64, u64, u32, bool)]) -> Inode {
        let pages = pages.iter().map(|&(index, pfn, count, dirty)| PageCacheRun { index, pfn, count, dirty });
        let json = serde_json::json!({
            "ino": 0, "dev_major": 8, "dev_minor": 1, "fs_type": "ext4", "mode": 0o100640, "uid": 1, "gid": 2, "nlink": 1,
            "size": size, "atime": {"sec": 5, "nsec": 0}, "mtime": {"sec": 1_000_000_000, "nsec": 7},
            "ctime": {"sec": 0, "nsec": 0}, "path": "", "dirty": true, "pages": [], "lost_pages": 0,
        });
        Inode { pages: pages.collect(), ..serde_json::from_value(json).unwrap() }
    }

    fn on_disk(dir: &Path, contents: &[u8], mut inode: Inode) -> (std::path::PathBuf, Inode) {
        let path = dir.join("file");
        std::fs::write(&path, contents).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        inode.ino = meta.ino();
        inode.mtime = snapshot::Timestamp { sec: meta.mtime(), nsec: meta.mtime_nsec() as u32 };
        (path, inode)
    }

    #[test]
    fn a_directory_that_the_disk_never_saw_is_made_with_its_owner_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let inode = Inode { mode: 0o041_731, ..inode(4096, &[]) };
        assert!(restore(&path, &inode, false, &mem()).unwrap().created);
        let meta = std::fs::metadata(&path).unwrap();
        assert!(meta.is_dir());
        assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o1731, 1, 2));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(
            restore(&path, &inode, false, &mem()).unwrap(),
            Restored::default(),
            "one that is there stays"
        );
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(restore(&file, &inode, false, &mem()), Err(PageCacheError::NotADirectory { .. })));
    }

    #[test]
    fn only_dirty_pages_are_written_when_the_size_fits() {
        let dir = tempfile::tempdir().unwrap();
        let (path, inode) =
            on_disk(dir.path(), &[b'.'; 8292], inode(8292, &[(0, 1, 1, false), (1, 4, 2, true)]));
        let done = restore(&path, &inode, false, &mem()).unwrap();
        assert_eq!(done, Restored { created: false, written: 4196, resized: false });
        let now = std::fs::read(&path).unwrap();
        assert!(now[..4096].iter().all(|&b| b == b'.'), "a clean page was written");
        assert!(now[4096..8192].iter().all(|&b| b == b'e') && now[8192..].iter().all(|&b| b == b'f'));
        assert_eq!(now.len(), 8292);
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (inode.mtime.sec, i64::from(inode.mtime.nsec)));
    }

    #[test]
    fn all_pages_are_written_when_the_disk_has_an_older_file_of_the_same_size() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut inode) = on_disk(dir.path(), &[b'.'; 4096], inode(4096, &[(0, 1, 1, false)]));
        inode.mtime = snapshot::Timestamp { sec: 1_000_000_000, nsec: 7 };
        assert_eq!(restore(&path, &inode, false, &mem()).unwrap().written, 4096);
        assert_eq!(std::fs::read(&path).unwrap(), [b'b'; 4096]);
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_000_000_000, 7));
    }

    #[test]
    fn all_pages_are_written_and_the_size_is_set_when_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let (path, inode) = on_disk(dir.path(), b"", inode(5000, &[(0, 1, 2, false)]));
        assert!(restore(&path, &inode, false, &mem()).unwrap().resized);
        let now = std::fs::read(&path).unwrap();
        assert_eq!((now.len(), now[0], now[4999]), (5000, b'b', b'c'));

        let (path, inode) = on_disk(dir.path(), &[b'x'; 9000], Inode { pages: vec![], size: 10, ..inode });
        assert!(restore(&path, &inode, false, &mem()).unwrap().resized);
        assert_eq!(std::fs::read(&path).unwrap(), [b'x'; 10]);
    }

    #[test]
    fn a_file_that_is_up_to_date_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let (path, inode) = on_disk(dir.path(), &[b'x'; 100], inode(100, &[(0, 1, 1, false)]));
        let before = std::fs::metadata(&path).unwrap();
        assert_eq!(restore(&path, &inode, false, &mem()).unwrap(), Restored::default());
        assert_eq!(std::fs::metadata(&path).unwrap().mtime_nsec(), before.mtime_nsec());
    }

    #[test]
    fn clean_pages_that_the_disk_does_not_have_are_written_where_there_is_doubt() {
        let dir = tempfile::tempdir().unwrap();
        // Size and times are right: only the transaction that says where the data is was lost.
        let (path, inode) =
            on_disk(dir.path(), &[0; 8192], inode(8192, &[(0, 1, 1, true), (1, 2, 1, false)]));
        let clean = Inode { pages: inode.pages[1..].to_vec(), ..inode.clone() };
        assert_eq!(restore(&path, &clean, false, &mem()).unwrap(), Restored::default());
        assert_eq!(restore(&path, &clean, true, &mem()).unwrap().written, 4096);
        assert_eq!(std::fs::read(&path).unwrap()[4096..], [b'c'; 4096]);
        assert_eq!(restore(&path, &clean, true, &mem()).unwrap().written, 0, "now it has them");
        assert_eq!(restore(&path, &inode, true, &mem()).unwrap().written, 4096, "the dirty page only");
    }

    #[test]
    fn a_file_that_the_disk_never_saw_is_created() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/new");
        let inode = inode(4097, &[(0, 2, 2, true)]);
        assert!(restore(&path, &inode, false, &mem()).unwrap().created);
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.permissions().mode() & 0o7777), (4097, 0o640));
        assert_eq!((meta.uid(), meta.gid()), (1, 2));
    }

    #[test]
    fn a_file_without_a_name_needs_no_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("gone/too/file");
        let inode = inode(4096, &[(0, 2, 1, true)]);
        let file = restore_unnamed(&path, &inode, &mem()).unwrap();
        assert_eq!(std::io::read_to_string(&file).unwrap(), "c".repeat(4096));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left of it");
    }

    #[test]
    fn a_missing_file_with_missing_pages_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let error = restore(&path, &inode(8192, &[(1, 2, 1, true)]), false, &mem()).unwrap_err();
        assert!(matches!(error, PageCacheError::Incomplete { have: 1, want: 2, .. }), "{error}");
        assert!(!path.exists());
        // On tmpfs they are holes.
        let tmpfs = Inode { fs_type: "tmpfs".into(), ..inode(8192, &[(1, 2, 1, true)]) };
        restore(&path, &tmpfs, false, &mem()).unwrap();
        let now = std::fs::read(&path).unwrap();
        assert_eq!((now[0], now[4096], now.len()), (0, b'c', 8192));
    }

    #[test]
    fn another_file_of_that_name_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut inode) = on_disk(dir.path(), b"other", inode(4096, &[(0, 1, 1, true)]));
        inode.ino += 1;
        assert!(matches!(restore(&path, &inode, false, &mem()), Err(PageCacheError::Replaced { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"other");
    }

    #[test]
    fn pages_that_the_dump_does_not_have_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (path, inode) = on_disk(dir.path(), &[0; 4096], inode(4096, &[(0, 100, 1, true)]));
        assert!(matches!(restore(&path, &inode, false, &mem()), Err(PageCacheError::Memory { .. })));
    }
}
