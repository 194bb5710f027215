//! inotify instances: `fsnotify_group`, `inotify_inode_mark` (fs/notify/inotify, include/linux/fsnotify_backend.h; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Bytes, Inotify, Mount, Watch};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// fs.inotify.max_user_watches is at most about a million by default.
const MAX_WATCHES: usize = 1 << 21;
/// Names in memory of one inode that are looked at.
const MAX_ALIASES: usize = 64;

/// The events that a program can ask for.
const IN_ALL_EVENTS: u32 = 0xfff;
const IN_EXCL_UNLINK: u32 = 1 << 26;
const IN_ONESHOT: u32 = 1 << 31;
// fsnotify_mark.flags.
const FSNOTIFY_MARK_FLAG_EXCL_UNLINK: u32 = 0x10;
const FSNOTIFY_MARK_FLAG_IN_ONESHOT: u32 = 0x20;

#[derive(KernelType)]
#[kernel("fsnotify_group")]
struct Group {
    q_len: u32,
    #[kernel("inotify_data.idr.idr_rt", address)]
    marks: u64,
    #[kernel("inotify_data.idr.idr_next")]
    next: u32,
}

#[derive(KernelType)]
#[kernel("inotify_inode_mark")]
struct Mark {
    #[kernel("fsn_mark.mask")]
    mask: u32,
    #[kernel("fsn_mark.flags")]
    flags: u32,
    #[kernel("fsn_mark.connector")]
    connector: u64,
    wd: i32,
}

#[derive(KernelType)]
#[kernel("fsnotify_mark_connector")]
struct Connector {
    obj: u64,
}

#[derive(KernelType)]
#[kernel("inode")]
struct Watched {
    i_mode: u16,
    i_nlink: u32,
    i_ino: u64,
    i_generation: u32,
    i_sb: u64,
    #[kernel("i_dentry", address)]
    names: u64,
}

impl Autopsy<'_> {
    /// `group`: private_data of the file.
    pub(crate) fn inotify(&self, group: u64) -> Result<Inotify> {
        let group: Group = self.kernel.read(group)?;
        let mut marks = Vec::new();
        self.kernel.xarray_for_each(group.marks, MAX_WATCHES, |_, entry| {
            marks.extend(entry.pointer());
            Ok(())
        })?;
        let mut watches = Vec::new();
        for mark in marks {
            watches.push(self.watch(mark)?);
        }
        watches.sort_by_key(|watch| watch.wd);
        Ok(Inotify { watches, next: group.next, unread: group.q_len })
    }

    fn watch(&self, addr: u64) -> Result<Watch> {
        let mark: Mark = self.kernel.read(addr)?;
        if mark.wd <= 0 {
            return Err(corrupt("inotify_inode_mark", addr, format!("watch descriptor {}", mark.wd)));
        }
        let flag = |kernels: u32, ours: u32| if mark.flags & kernels != 0 { ours } else { 0 };
        let mask = mark.mask & IN_ALL_EVENTS
            | flag(FSNOTIFY_MARK_FLAG_EXCL_UNLINK, IN_EXCL_UNLINK)
            | flag(FSNOTIFY_MARK_FLAG_IN_ONESHOT, IN_ONESHOT);
        let addr = self.watched_inode(mark.connector)?;
        let inode: Watched = self.kernel.read(addr)?;
        let sb = self.super_block(inode.i_sb)?;
        let fs_type = self.fs_type(&sb)?;
        let by_number = || -> Result<Option<Bytes>> {
            match has_handles(fs_type.as_bytes()) {
                true => self.mountpoint_of(sb.s_dev),
                false => Ok(None),
            }
        };
        let mut generation = None;
        let (path, unsupported) = match self.name_of(addr, &inode, sb.s_dev)? {
            _ if inode.i_nlink == 0 => {
                (Bytes::default(), Some("what it watches has been deleted".to_owned()))
            }
            Some(path) => (path, None),
            None => match by_number()? {
                Some(mountpoint) => {
                    generation = Some(inode.i_generation);
                    (mountpoint, None)
                }
                None => {
                    let what =
                        format!("inode {} on {fs_type}, which it watches, has no known name", inode.i_ino);
                    (Bytes::default(), Some(what))
                }
            },
        };
        Ok(Watch {
            wd: mark.wd,
            path,
            generation,
            mask,
            ino: inode.i_ino,
            file_type: u32::from(inode.i_mode) & 0o170_000,
            volatile: self.has_volatile_numbers(fs_type.as_bytes()),
            unsupported,
        })
    }

    /// Inode numbers of the others are on their disks.
    fn has_volatile_numbers(&self, fs_type: &[u8]) -> bool {
        !matches!(fs_type, b"ext2" | b"ext3" | b"ext4" | b"xfs" | b"btrfs" | b"f2fs")
    }

    /// The inode that a mark is for. The connector leads to the inode (6.12) or to the inode's pointer back to it (6.1).
    fn watched_inode(&self, connector: u64) -> Result<u64> {
        let obj = self.kernel.read::<Connector>(connector)?.obj;
        let back = self.kernel.offset_of("inode", "i_fsnotify_marks")?;
        for inode in [obj, obj.wrapping_sub(back)] {
            if self.kernel.read_u64(inode.wrapping_add(back)).is_ok_and(|pointer| pointer == connector) {
                return Ok(inode);
            }
        }
        Err(corrupt("fsnotify_mark_connector", connector, "belongs to no inode"))
    }

    /// A path in the initial mount namespace that leads to an inode, if the kernel still knew one.
    fn name_of(&self, inode: u64, watched: &Watched, dev: u32) -> Result<Option<Bytes>> {
        let to_dentry = self.kernel.offset_of("dentry", "d_u.d_alias")?;
        for node in self.kernel.hlist(watched.names, MAX_ALIASES) {
            let addr = node?.wrapping_sub(to_dentry);
            let dentry = self.dentry(addr)?;
            if dentry.d_inode != inode || dentry.hashed == 0 && dentry.d_parent != addr {
                continue;
            }
            let path = self.path_in_fs(addr)?;
            if let Some(path) = self.below_a_mount(dev, &path)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// The mounts of a file system, in the initial mount namespace.
    fn mounts_of_device(&self, dev: u32) -> Result<impl Iterator<Item = &Mount>> {
        if self.mount_table.get().is_none() {
            let _ = self.mount_table.set(self.mounts()?);
        }
        let mounts = self.mount_table.get().map_or(&[][..], Vec::as_slice);
        Ok(mounts.iter().filter(move |m| (m.dev_major, m.dev_minor) == crate::fs::device(dev)))
    }

    fn mountpoint_of(&self, dev: u32) -> Result<Option<Bytes>> {
        Ok(self.mounts_of_device(dev)?.next().map(|mount| mount.mountpoint.clone()))
    }

    fn below_a_mount(&self, dev: u32, path: &Bytes) -> Result<Option<Bytes>> {
        let slashless = |path: &Bytes| path.as_bytes().strip_suffix(b"/").unwrap_or(path.as_bytes()).to_vec();
        for mount in self.mounts_of_device(dev)? {
            let rest = slashless(path).strip_prefix(slashless(&mount.root).as_slice()).map(<[u8]>::to_vec);
            if let Some(rest) = rest.filter(|rest| rest.is_empty() || rest.starts_with(b"/")) {
                let full = [slashless(&mount.mountpoint), rest].concat();
                return Ok(Some(if full.is_empty() { Bytes::from("/") } else { Bytes(full) }));
            }
        }
        Ok(None)
    }
}

/// Whether files of such a file system can be found by inode number and generation number alone (fs/exportfs/expfs.c, fs/xfs/xfs_export.c; 6.1 and 6.12).
fn has_handles(fs_type: &[u8]) -> bool {
    matches!(fs_type, b"ext2" | b"ext3" | b"ext4" | b"xfs" | b"f2fs")
}
