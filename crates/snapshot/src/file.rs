//! Open files: descriptors, open file descriptions and the inodes behind them.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{
    Bytes, Device, Epoll, EventFd, InetSocket, Inotify, NamespaceFile, NamespaceId, NetlinkSocket, PAGE_SIZE,
    PidFd, PipeEnd, PipeId, ProcFile, SignalFd, TimerFd, Timestamp, TtyId, UnixId,
};

/// Address of a `struct file` in the dead kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FileId(pub u64);

/// Descriptors of processes that come back are below this number.
pub const MAX_DESCRIPTOR: i32 = 1 << 16;

/// Address of a `struct inode` in the dead kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InodeId(pub u64);

/// One entry of a process's descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// The number that the program uses.
    pub fd: i32,
    /// The open file description, shared by all descriptors that name it.
    pub file: FileId,
    /// FD_CLOEXEC.
    pub cloexec: bool,
}

/// An open file description (`struct file`): what dup(2) and fork(2) share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpenFile {
    /// What it is.
    pub kind: FileKind,
    /// Absolute path in its mount namespace, as /proc/PID/fd shows it but without ` (deleted)`. For objects
    /// without a path the kernel's own name, such as `pipe:[4711]`.
    pub path: Bytes,
    /// The name was gone: unlinked, or never had one (O_TMPFILE).
    pub deleted: bool,
    /// The mount namespace of the path, if that is not the initial one.
    #[serde(default)]
    pub mount_namespace: Option<NamespaceId>,
    /// O_* access mode and status flags, as F_GETFL shows them.
    pub flags: i32,
    /// File position, bytes.
    pub pos: i64,
    /// The inode.
    pub inode: InodeId,
    /// F_SETOWN target: 0 none, positive process, negative process group.
    pub owner_pid: i32,
    /// The target is a single thread (F_SETOWN_EX with F_OWNER_TID).
    #[serde(default)]
    pub owner_is_thread: bool,
    /// F_SETSIG signal, 0 for the default.
    pub owner_signal: i32,
    /// `f_count` as the dead kernel had it (for cross-checks).
    pub count: i64,
}

/// What an open file description leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum FileKind {
    /// A regular file on a file system.
    Regular,
    /// A directory.
    Directory,
    /// A character device without state of its own (`/dev/null`, `/dev/zero`, `/dev/full`, `/dev/random`, …): opening the
    /// same device again gives the same.
    CharDevice {
        #[allow(missing_docs)]
        major: u32,
        #[allow(missing_docs)]
        minor: u32,
    },
    /// Another character device that the machine has again.
    Device(Device),
    /// One or both ends of a pipe or FIFO.
    Pipe {
        #[allow(missing_docs)]
        pipe: PipeId,
        /// Which end.
        end: PipeEnd,
    },
    /// A terminal.
    Tty {
        #[allow(missing_docs)]
        tty: TtyId,
    },
    /// A file in memory that never had a name (memfd_create(2)).
    Memfd {
        /// F_SEAL_*, as F_GET_SEALS gives them.
        seals: u32,
    },
    /// A unix socket.
    Unix {
        #[allow(missing_docs)]
        socket: UnixId,
    },
    /// A TCP or UDP socket.
    Inet(Box<InetSocket>),
    /// A netlink socket.
    Netlink(Box<NetlinkSocket>),
    /// Opened with O_PATH: a place in the tree, nothing more.
    Path,
    /// A terminal that was hung up: nobody can use it any more.
    HungUpTty,
    /// An epoll instance.
    Epoll(Epoll),
    /// An event counter.
    EventFd(EventFd),
    /// A timer.
    TimerFd(TimerFd),
    /// A signal descriptor.
    SignalFd(SignalFd),
    /// A pidfd.
    PidFd(PidFd),
    /// An inotify instance.
    Inotify(Inotify),
    /// A file or directory of /proc, /sys or the like.
    Proc(ProcFile),
    /// A file that stands for a namespace.
    Namespace(NamespaceFile),
    /// Something that is not brought back; the text names it for people (`unix stream socket to …`).
    Unsupported {
        /// For people: what it is.
        what: String,
    },
}

/// An inode, with what the dead page cache held of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Inode {
    /// Inode number.
    pub ino: u64,
    /// Which of the inodes that have had this number one after the other (`i_generation`).
    #[serde(default)]
    pub generation: u32,
    /// Device of the file system (`st_dev`).
    pub dev_major: u32,
    #[allow(missing_docs)]
    pub dev_minor: u32,
    /// File system type, `ext4`.
    pub fs_type: Bytes,
    /// Type and permission bits (`st_mode`).
    pub mode: u32,
    #[allow(missing_docs)]
    pub uid: u32,
    #[allow(missing_docs)]
    pub gid: u32,
    /// Links on the file system.
    pub nlink: u32,
    /// `i_size` in memory, bytes: what programs saw, not what the disk has.
    pub size: u64,
    #[allow(missing_docs)]
    pub atime: Timestamp,
    #[allow(missing_docs)]
    pub mtime: Timestamp,
    #[allow(missing_docs)]
    pub ctime: Timestamp,
    /// Path of the inode under the mount through which it was found.
    pub path: Bytes,
    /// The inode or any of its pages had not been written to disk (`i_state`, page cache tags).
    pub dirty: bool,
    /// What the page cache held, by ascending index. Regular files (also on tmpfs) and shared anonymous memory.
    pub pages: Vec<PageCacheRun>,
    /// Dirty pages that were among these and do not agree that they are its own.
    #[serde(default)]
    pub doubtful: Vec<DoubtfulPage>,
    /// Where its contents are on the disk, in ascending order; what is in none of these, and not in the page cache, is a hole. `None`: not known.
    #[serde(default)]
    pub extents: Option<Vec<Extent>>,
    /// Bytes of its pages, if it is on a hugetlbfs; the numbers of pages below count small ones nevertheless.
    #[serde(default)]
    pub huge_page: Option<u64>,
    /// Its extended attributes, access control lists included, by name; `None` if they are as the file system has them, as far as is known.
    #[serde(default)]
    pub xattrs: Option<Vec<Xattr>>,
    /// Pages of shared memory or tmpfs that existed but cannot be had, with the reason in the findings.
    pub lost_pages: u64,
}

/// Dirty pages in the page cache that contradict their place in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoubtfulPage {
    /// Where they were found: page index in the file.
    pub index: u64,
    #[allow(missing_docs)]
    pub pfn: u64,
    /// How many.
    pub count: u32,
    /// What does not agree.
    pub why: String,
}

/// One extended attribute, as getxattr(2) gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xattr {
    /// With what it begins with: `user.`, `security.` …
    pub name: Bytes,
    #[allow(missing_docs)]
    pub value: Bytes,
}

impl Inode {
    /// Whether all there is of its contents is in memory anyway: what the page cache lacks is a hole.
    pub fn lives_in_memory(&self) -> bool {
        matches!(self.fs_type.as_bytes(), b"tmpfs" | b"ramfs" | b"devtmpfs" | b"rootfs" | b"hugetlbfs")
    }

    /// How many pages of its contents the page cache lacks, and of how many.
    pub fn missing_pages(&self) -> (u64, u64) {
        let want = self.size.div_ceil(PAGE_SIZE);
        let missing: u64 = self.gaps().iter().map(|gap| gap.end - gap.start).sum();
        let holes: u64 = self.holes().iter().map(|hole| hole.end - hole.start).sum();
        (if self.lives_in_memory() { 0 } else { missing.saturating_sub(holes) }, want)
    }

    /// Pages of its contents that the page cache lacks.
    fn gaps(&self) -> Vec<Range<u64>> {
        without(0..self.size.div_ceil(PAGE_SIZE), self.pages.iter().map(|run| (run.index, run.count.into())))
    }

    /// Pages of its contents that are zero, and neither in the page cache nor on the disk; none if that is not known.
    pub fn holes(&self) -> Vec<Range<u64>> {
        let Some(extents) = &self.extents else { return Vec::new() };
        let written =
            extents.iter().filter(|extent| extent.written).map(|extent| (extent.index, extent.count));
        self.gaps().into_iter().flat_map(|gap| without(gap, written.clone())).collect()
    }

    /// What of its contents is on the disk only, as far as that is known.
    pub fn on_disk_only(&self) -> Vec<Extent> {
        let extents = self.extents.iter().flatten().filter(|extent| extent.written);
        let gaps = self.gaps();
        let part = |extent: &Extent, gap: &Range<u64>| {
            let start = extent.index.max(gap.start);
            let end = extent.index.saturating_add(extent.count).min(gap.end);
            let block = extent.block.saturating_add(start.saturating_sub(extent.index));
            (start < end).then(|| Extent { index: start, count: end - start, block, written: true })
        };
        extents.flat_map(|extent| gaps.iter().filter_map(move |gap| part(extent, gap))).collect()
    }

    /// Why the contents of a file without a name cannot be given to a new one, if so.
    pub fn obstacle_without_name(&self) -> Option<String> {
        if self.nlink > 0 {
            return Some("its name had been removed, and it has another one that is not known".into());
        }
        match self.missing_pages() {
            (0, _) => None,
            (missing, want) => Some(format!(
                "it had been deleted, and {missing} of its {want} pages were on the disk only: not brought back by this version"
            )),
        }
    }
}

/// A range without others, which are in ascending order and given by start and length.
fn without(range: Range<u64>, others: impl Iterator<Item = (u64, u64)>) -> Vec<Range<u64>> {
    let (mut left, mut at) = (Vec::new(), range.start);
    for (start, count) in others {
        let (start, end) = (start.min(range.end), start.saturating_add(count).min(range.end));
        if start > at {
            left.push(at..start);
        }
        at = at.max(end);
    }
    if at < range.end {
        left.push(at..range.end);
    }
    left
}

/// Consecutive blocks of a file in consecutive blocks of the disk, all of the size of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First page index in the file.
    pub index: u64,
    /// How many blocks.
    pub count: u64,
    /// First block on the disk (of the file system's device).
    pub block: u64,
    /// Unwritten ones are there, and read as zeroes.
    pub written: bool,
}

/// Consecutive page cache pages in consecutive page frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCacheRun {
    /// First page index in the file (file offset / 4096).
    pub index: u64,
    /// First page frame number, or [what stands for a swap slot](crate::SwapArea::frame).
    pub pfn: u64,
    /// How many 4 KiB pages.
    pub count: u32,
    /// Newer than the disk.
    pub dirty: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_neither_cached_nor_written_is_a_hole() {
        let json = serde_json::json!({
            "ino": 0, "dev_major": 8, "dev_minor": 1, "fs_type": "ext4", "mode": 0, "uid": 1, "gid": 2, "nlink": 1,
            "size": 10 * PAGE_SIZE - 5, "atime": {"sec": 0, "nsec": 0}, "mtime": {"sec": 0, "nsec": 0},
            "ctime": {"sec": 0, "nsec": 0}, "path": "", "dirty": true, "lost_pages": 0,
            "pages": [{"index": 1, "pfn": 7, "count": 2, "dirty": true}, {"index": 12, "pfn": 7, "count": 2, "dirty": true}],
        });
        let mut inode: Inode = serde_json::from_value(json).unwrap();
        assert_eq!((inode.missing_pages(), inode.holes()), ((8, 10), vec![]), "nothing is known");
        let extent = |index, count, written| Extent { index, count, block: 100 + index, written };
        inode.extents = Some(vec![extent(0, 2, true), extent(4, 1, false), extent(8, 9, true)]);
        assert_eq!(inode.holes(), vec![Range { start: 3, end: 8 }]);
        assert_eq!(inode.missing_pages(), (3, 10));
        assert_eq!(inode.on_disk_only(), [extent(0, 1, true), extent(8, 2, true)]);
        inode.extents = Some(vec![]);
        assert_eq!((inode.missing_pages(), inode.holes()), ((0, 10), vec![0..1, 3..10]));
    }
}
