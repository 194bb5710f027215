//! Contents of files that are in the blocks of a disk, of which its file system does not know whose they are, or that it has given up with the
//! file: they are read before anything is written to it.
//!
//! As with swap slots, such a page gets a frame number that no memory has, and whoever copies frames need not know the difference.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use snapshot::{
    Extent, FIRST_BLOCK_FRAME, Inode, InodeId, PAGE_SIZE, PageCacheRun, PhysMap, PhysMem, PhysMemError,
    PhysRange, Snapshot,
};

use crate::handle::{Handles, path_of};
use crate::{extent, file, sys};

/// One part of what is free is for what is read here.
const SHARE: u64 = 4;
const START: u64 = FIRST_BLOCK_FRAME * PAGE_SIZE;

/// Blocks that have been read.
#[derive(Debug, Default)]
pub struct Rescued {
    blocks: Vec<u8>,
}

impl Rescued {
    /// Reads what is only in blocks of the file systems that are mounted below `root`, and puts it among the pages of the inodes. To be called
    /// before anything is written to them: for a file system that does not know whose these blocks are, they are free.
    ///
    /// What cannot be read, or does not fit, stays missing: whoever needs the contents notices.
    pub fn add(&mut self, snapshot: &mut Snapshot, root: &Path) {
        let mut seen = BTreeSet::new();
        let room = sys::available_memory() / SHARE;
        let mounts: Vec<_> = snapshot
            .mounts
            .iter()
            .filter(|m| m.root.as_bytes() == b"/")
            .filter(|m| seen.insert((m.dev_major, m.dev_minor)))
            .map(|m| (below(root, m.mountpoint.as_path()), (m.dev_major, m.dev_minor)))
            .collect();
        let open: BTreeSet<InodeId> =
            snapshot.files.values().filter(|f| f.deleted).map(|f| f.inode).collect();
        let unwritten: BTreeSet<InodeId> = snapshot.unwritten.iter().copied().collect();
        for (mountpoint, device) in mounts {
            let wanted = snapshot.inodes.iter_mut().filter(|(id, inode)| {
                let is_wanted = if inode.nlink == 0 { open.contains(id) } else { unwritten.contains(id) };
                is_wanted && (inode.dev_major, inode.dev_minor) == device && !inode.on_disk_only().is_empty()
            });
            let wanted: Vec<&mut Inode> = wanted.map(|(_, inode)| inode).collect();
            if !wanted.is_empty() && file::is_mount_point(&mountpoint) {
                rescue(&mountpoint, wanted, room, &mut self.blocks);
            }
        }
    }
}

/// Where a path is, while the machine's root is at another place.
fn below(root: &Path, path: &Path) -> PathBuf {
    match path.strip_prefix("/") {
        Ok(rest) if !rest.as_os_str().is_empty() => root.join(rest),
        _ => root.to_owned(),
    }
}

/// The dead kernel's memory, and blocks of disks.
pub(crate) struct Memory<M> {
    /// What holds the rest.
    pub(crate) inner: M,
    ranges: Vec<PhysRange>,
    blocks: Vec<u8>,
}

impl<M: PhysMem> Memory<M> {
    /// What has been read as well, in the place of the frames that stand for it.
    pub(crate) fn new(inner: M, rescued: Rescued) -> Self {
        let Rescued { blocks } = rescued;
        let own = PhysRange { start: START, len: blocks.len() as u64 };
        let ranges = inner.ranges().iter().copied().chain([own]).collect();
        Self { inner, ranges, blocks }
    }

    fn bytes(&self, addr: u64, len: usize) -> Option<Result<&[u8], PhysMemError>> {
        let at = usize::try_from(addr.checked_sub(START)?).ok();
        let bytes = at.and_then(|at| self.blocks.get(at..at.checked_add(len)?));
        Some(bytes.ok_or(PhysMemError::NotPresent { addr, len: len as u64 }))
    }
}

/// Reads the missing parts of some files of one file system, as long as there is room.
fn rescue(mountpoint: &Path, wanted: Vec<&mut Inode>, room: u64, blocks: &mut Vec<u8>) {
    let (Some(handles), Some(device)) = (Handles::of(mountpoint), device(mountpoint)) else { return };
    for inode in wanted {
        for part in parts(&handles, inode) {
            let len = part.count.saturating_mul(PAGE_SIZE);
            let (Ok(count), Some(at)) = (u32::try_from(part.count), part.block.checked_mul(PAGE_SIZE)) else {
                continue;
            };
            if (blocks.len() as u64).saturating_add(len) > room {
                continue;
            }
            let start = blocks.len();
            blocks.resize(start + len as usize, 0);
            let Some(target) = blocks.get_mut(start..) else { continue };
            if device.read_exact_at(target, at).is_err() {
                blocks.truncate(start);
                continue;
            }
            let pfn = FIRST_BLOCK_FRAME + start as u64 / PAGE_SIZE;
            inode.pages.push(PageCacheRun { index: part.index, pfn, count, dirty: true });
        }
        inode.pages.sort_by_key(|run| run.index);
    }
}

/// Which parts of a file cannot be read through the file system.
fn parts(handles: &Handles, inode: &Inode) -> Vec<Extent> {
    let all = inode.on_disk_only();
    let on_disk = handles.open(inode.ino, inode.generation).ok().flatten();
    let Some(file) = on_disk.and_then(|fd| File::open(path_of(&fd)).ok()) else { return all };
    let (Ok(mapped), Ok(meta)) = (extent::of(&file), file.metadata()) else { return all };
    let is_hidden = |part: &Extent| {
        let end = part.index.saturating_add(part.count).saturating_mul(PAGE_SIZE).min(inode.size);
        end > meta.size() || !extent::covers(&mapped, part)
    };
    all.into_iter().filter(is_hidden).collect()
}

/// The block device that is mounted there.
fn device(mountpoint: &Path) -> Option<File> {
    let number = std::fs::metadata(mountpoint).ok()?.dev();
    let path = format!("/sys/dev/block/{}:{}/uevent", libc::major(number), libc::minor(number));
    let facts = std::fs::read_to_string(path).ok()?;
    let name = facts.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    File::open(PathBuf::from("/dev").join(name)).ok()
}

impl<M: PhysMem> PhysMem for Memory<M> {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
        match self.bytes(addr, len) {
            Some(bytes) => bytes.map(PhysMap::borrowed),
            None => self.inner.map(addr, len),
        }
    }

    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), PhysMemError> {
        match self.bytes(addr, buf.len()) {
            Some(bytes) => bytes.map(|bytes| buf.copy_from_slice(bytes)),
            None => self.inner.read(addr, buf),
        }
    }

    fn after_fork(&self) {
        self.inner.after_fork();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl PhysMem for Nothing {
        fn ranges(&self) -> &[PhysRange] {
            &[]
        }
        fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
            Err(PhysMemError::NotPresent { addr, len: len as u64 })
        }
    }

    #[test]
    fn blocks_are_read_like_frames() {
        let blocks = [1u8, 2].iter().flat_map(|n| [*n; PAGE_SIZE as usize]).collect();
        let memory = Memory::new(Nothing, Rescued { blocks });
        assert_eq!(memory.ranges().len(), 1);
        assert_eq!(below(Path::new("/newroot"), Path::new("/srv")), Path::new("/newroot/srv"));
        assert_eq!(below(Path::new("/newroot"), Path::new("/")), Path::new("/newroot"));
        let mut buf = [0; 4];
        memory.read(START + PAGE_SIZE - 2, &mut buf).unwrap();
        assert_eq!(buf, [1, 1, 2, 2]);
        assert_eq!(&*memory.map(START + PAGE_SIZE, 3).unwrap(), [2, 2, 2]);
        assert!(memory.map(START + PAGE_SIZE, 5000).is_err(), "behind the end");
        assert!(memory.read(START - 1, &mut buf).is_err(), "memory itself is asked");
    }
}
