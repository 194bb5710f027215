//! Shared anonymous memory (`MAP_SHARED | MAP_ANONYMOUS`): each object is made once, here, and mapped by all who had it.
//!
//! The kernel makes such an object for a mapping only. So it is mapped here, and handed on as the open file that
//! `/proc/self/map_files` gives for the mapping: it looks the same in /proc/PID/maps as the original.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use snapshot::{InodeId, PAGE_SIZE, PageRun, Process, Snapshot, VmaKind};

use crate::pour::{Owner, OwnerId, ReverseMap};
use crate::{hugetlb, sys};

struct Object {
    start: *mut libc::c_void,
    len: usize,
    file: OwnedFd,
    owner: OwnerId,
}

/// The objects of all processes that come back. Unmapped here when dropped.
pub(crate) struct Objects(BTreeMap<InodeId, Result<Object, String>>);

fn used_by<'a>(snapshot: &'a Snapshot, process: &Process) -> impl Iterator<Item = InodeId> + 'a {
    let mm = process.address_space.and_then(|id| snapshot.address_spaces.get(&id));
    mm.into_iter().flat_map(|mm| &mm.vmas).filter_map(|vma| match vma.kind {
        VmaKind::SharedAnonymous { inode, .. } => Some(inode),
        _ => None,
    })
}

impl Objects {
    /// Makes them, and says which frames belong into them.
    pub(crate) fn make(
        snapshot: &Snapshot,
        processes: &[&Process],
        base: RawFd,
        reverse: &mut ReverseMap,
    ) -> Self {
        let ids: BTreeSet<InodeId> = processes.iter().flat_map(|p| used_by(snapshot, p)).collect();
        Self(ids.into_iter().map(|id| (id, Object::make(snapshot, id, base, reverse))).collect())
    }

    /// Under which descriptors they are open.
    pub(crate) fn descriptors(&self) -> BTreeMap<InodeId, RawFd> {
        self.0.iter().filter_map(|(id, o)| Some((*id, o.as_ref().ok()?.file.as_raw_fd()))).collect()
    }

    /// Why the memory of this process cannot be had.
    pub(crate) fn failure(&self, snapshot: &Snapshot, process: &Process) -> Option<String> {
        used_by(snapshot, process).find_map(|id| self.0.get(&id)?.as_ref().err().cloned())
    }

    /// What has to be poured for this process.
    pub(crate) fn owners(&self, snapshot: &Snapshot, process: &Process) -> Vec<OwnerId> {
        let ids: BTreeSet<InodeId> = used_by(snapshot, process).collect();
        ids.iter().filter_map(|id| Some(self.0.get(id)?.as_ref().ok()?.owner)).collect()
    }
}

impl Object {
    fn make(snapshot: &Snapshot, id: InodeId, base: RawFd, reverse: &mut ReverseMap) -> Result<Self, String> {
        let inode = snapshot.inodes.get(&id).ok_or("shared memory that is not in the snapshot")?;
        let len = usize::try_from(inode.size.next_multiple_of(PAGE_SIZE)).map_err(|e| e.to_string())?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let mut flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        flags |= match inode.huge_page {
            None => libc::MAP_NORESERVE,
            // Rather refused now than killed when they are touched.
            Some(size) => libc::MAP_HUGETLB | hugetlb::size_flags(size) as i32,
        };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(format!("{len} bytes of shared memory: {}", Errno::last()));
        }
        // SAFETY: our own mapping. Children map it again where they need it.
        unsafe { libc::madvise(start, len, libc::MADV_DONTFORK) };
        let path = format!("/proc/self/map_files/{:x}-{:x}", start as usize, start as usize + len);
        let file = sys::open(path.as_ref(), libc::O_RDWR, 0)
            .and_then(|fd| sys::lift(fd, base))
            .map_err(|e| format!("open shared memory: {e}"))?;
        let owner = reverse.owner(Owner::Here { start: start.cast(), len });
        for run in &inode.pages {
            let addr = run.index.checked_mul(PAGE_SIZE).ok_or("a page index that is out of range")?;
            reverse.add(owner, PageRun { addr, pfn: run.pfn, count: run.count });
        }
        Ok(Self { start, len, file, owner })
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: mapped in `make`; the reverse map that points into it has been used up before.
        unsafe { libc::munmap(self.start, self.len) };
    }
}
