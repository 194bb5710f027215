//! Files of which the disk may not have the last state, open or not: every super block's list of inodes, s_inodes (fs/inode.c,
//! include/linux/fs.h; 6.1 and 6.12).
//!
//! A program that goes on may open again what it had written and closed before. Found here are contents; `names` finds the names.

use ktypes::KernelType;
use snapshot::{Bytes, DiskNames, InodeId, Mount, RECENT_SECONDS, Severity};

use crate::Autopsy;
use crate::error::{Result, corrupt};
use crate::fs::device;
use crate::inode::{S_IFDIR, S_IFREG};
use crate::names::Gathered;

/// Inodes in memory of one file system.
const MAX_INODES: usize = 1 << 24;
const SB_RDONLY: u64 = 1;

/// file_system_type.fs_flags (include/linux/fs.h): it is on a block device.
const FS_REQUIRES_DEV: u32 = 1;
/// Inodes one behind the other that can be damaged without the list being so.
const MAX_STRANGERS: u32 = 16;

#[derive(KernelType)]
#[kernel("super_block")]
struct SuperBlockInodes {
    s_dev: u32,
    s_flags: u64,
    s_type: u64,
    s_bdev: u64,
    #[kernel(address)]
    s_inodes: u64,
}

#[derive(KernelType)]
#[kernel("file_system_type")]
struct FileSystemType {
    fs_flags: u32,
}

#[derive(KernelType)]
#[kernel("inode")]
struct Candidate {
    i_mode: u16,
    i_nlink: u32,
    i_mapping: u64,
    i_ino: u64,
    #[kernel("i_mtime.tv_sec", or = "__i_mtime.tv_sec", or = "i_mtime_sec")]
    mtime: i64,
    #[kernel("i_ctime.tv_sec", or = "__i_ctime.tv_sec", or = "i_ctime_sec")]
    ctime: i64,
    i_sb: u64,
    /// The first of its names.
    #[kernel("i_dentry.first")]
    alias: u64,
}

impl Autopsy<'_> {
    /// Puts the files of all writable disk file systems whose state may not be on the disk into the table of inodes, and tells which they
    /// are: regular files and directories that have a name, and all names that were changed.
    ///
    /// `now_s`: the dead machine's wall clock, seconds. What cannot be read becomes a finding.
    pub(crate) fn unwritten_files(&self, mounts: &[Mount], now_s: i64) -> (Vec<InodeId>, Vec<DiskNames>) {
        let (mut found, mut names) = (Vec::new(), Vec::new());
        if let Err(error) = self.all_super_blocks(mounts, now_s, &mut found, &mut names) {
            let text = format!("not all files that the disk does not have yet could be found: {error}");
            self.find(Severity::Loss, "writeback", text);
        }
        (found, names)
    }

    fn all_super_blocks(
        &self,
        mounts: &[Mount],
        now_s: i64,
        found: &mut Vec<InodeId>,
        names: &mut Vec<DiskNames>,
    ) -> Result<()> {
        for addr in self.super_blocks()? {
            let sb: SuperBlockInodes = self.kernel.read(addr)?;
            let is_root_of =
                |m: &&Mount| (m.dev_major, m.dev_minor) == device(sb.s_dev) && m.root == "/".into();
            let Some(mount) = mounts.iter().find(is_root_of) else { continue };
            if let Some(why) = left_alone(&sb, mount) {
                let text = format!("{} ({}) is left alone: {why}", mount.mountpoint, mount.fs_type);
                self.find(Severity::Note, "writeback", text);
            }
            if sb.s_bdev != 0 && sb.s_flags & SB_RDONLY == 0 {
                let kind: FileSystemType = self.kernel.read(sb.s_type)?;
                if kind.fs_flags & FS_REQUIRES_DEV == 0 {
                    let text = format!(
                        "{} ({}) is left alone: it is on a disk, and file systems of its type never are",
                        mount.mountpoint, mount.fs_type
                    );
                    self.find(Severity::Doubt, "writeback", text);
                    continue;
                }
                let mut gathered = Gathered::new(self, mount);
                let whole = self.inodes_of(addr, &sb, mount, now_s, found, &mut gathered);
                names.push(gathered.finish());
                whole?;
            }
        }
        Ok(())
    }

    fn inodes_of(
        &self,
        sb_addr: u64,
        sb: &SuperBlockInodes,
        mount: &Mount,
        now_s: i64,
        found: &mut Vec<InodeId>,
        names: &mut Gathered<'_, '_>,
    ) -> Result<()> {
        let to_list = self.kernel.offset_of("inode", "i_sb_list")?;
        let mut strangers = 0;
        for node in self.kernel.list_head(sb.s_inodes, MAX_INODES) {
            let addr = node?.wrapping_sub(to_list);
            let inode: Candidate = self.kernel.read(addr)?;
            if inode.i_sb != sb_addr {
                strangers += 1;
                // One can be damaged; where there is no other any more, the list leads into another one.
                if strangers > MAX_STRANGERS {
                    return Err(corrupt("super_block", sb_addr, "has a list that leads into another's"));
                }
                let text = format!(
                    "inode {} is in the list of {} and says it is not of it",
                    inode.i_ino, mount.source
                );
                self.find(Severity::Loss, "writeback", text);
                continue;
            }
            strangers = 0;
            let recent = inode.mtime.max(inode.ctime) >= now_s.saturating_sub(RECENT_SECONDS);
            if recent && let Err(error) = names.add(addr) {
                let text = format!(
                    "the names of inode {} of {} may be other ones on the disk: {error}",
                    inode.i_ino, mount.source
                );
                self.find(Severity::Loss, "names", text);
            }
            let concerned = match u32::from(inode.i_mode) & 0o170_000 {
                _ if inode.i_nlink == 0 => false,
                S_IFREG => recent || self.has_dirty_pages(inode.i_mapping),
                S_IFDIR => recent,
                _ => false,
            };
            if !concerned {
                continue;
            }
            match self.unwritten_file(addr, &inode, mount) {
                Ok(true) => found.push(InodeId(addr)),
                // A file system's own (the journal), or forgotten by name: nobody can open it without asking the disk.
                Ok(false) => {}
                Err(error) => {
                    let text = format!(
                        "inode {} of {} may be older on the disk: {error}",
                        inode.i_ino, mount.source
                    );
                    self.find(Severity::Loss, "writeback", text);
                }
            }
        }
        Ok(())
    }

    fn has_dirty_pages(&self, mapping: u64) -> bool {
        let pages =
            self.kernel.offset_of("address_space", "i_pages").map(|offset| mapping.wrapping_add(offset));
        let is_dirty = |pages| -> ktypes::Result<bool> {
            Ok(self.kernel.xarray_dirty(pages)? || self.kernel.xarray_under_writeback(pages)?)
        };
        mapping != 0 && pages.is_ok_and(|pages| is_dirty(pages).unwrap_or(true))
    }

    /// Whether it has a name, and then is in the table.
    fn unwritten_file(&self, addr: u64, inode: &Candidate, mount: &Mount) -> Result<bool> {
        if inode.alias == 0 {
            return Ok(false);
        }
        let dentry = inode.alias.wrapping_sub(self.kernel.offset_of("dentry", "d_u.d_alias")?);
        if self.dentry(dentry)?.d_inode != addr {
            return Ok(false);
        }
        let path = join(&mount.mountpoint, &self.path_in_fs(dentry)?);
        let facts = self.inode_facts(addr)?;
        self.inode(addr, &facts, &path)?;
        Ok(true)
    }
}

/// Why what had not been written to a file system is not looked for, if there may be such.
fn left_alone(sb: &SuperBlockInodes, mount: &Mount) -> Option<&'static str> {
    const NETWORK: [&[u8]; 9] =
        [b"nfs", b"nfs4", b"cifs", b"smb3", b"9p", b"ceph", b"afs", b"ocfs2", b"gfs2"];
    let fs_type = mount.fs_type.as_bytes();
    if fs_type == b"fuse" || fs_type == b"fuseblk" || fs_type.starts_with(b"fuse.") {
        Some("what it had not handed to its program is gone")
    } else if NETWORK.contains(&fs_type) {
        Some("what had not been sent over the network is gone")
    } else if sb.s_bdev != 0 && sb.s_flags & SB_RDONLY != 0 {
        Some("it was read-only, or had become so after errors")
    } else {
        None
    }
}

/// A path in a file system, from the root of the machine.
pub(crate) fn join(mountpoint: &Bytes, path: &Bytes) -> Bytes {
    let at = mountpoint.as_bytes().strip_suffix(b"/").unwrap_or(mountpoint.as_bytes());
    Bytes([at, path.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_written_to_is_named() {
        let why = |fs_type: &str, s_bdev, s_flags| {
            let mount = serde_json::json!({
                "id": 1, "parent": 0, "mountpoint": "/", "root": "/", "fs_type": fs_type, "source": "x",
                "dev_major": 8, "dev_minor": 1, "flags": "", "peer_group": 0, "master": 0,
            });
            let sb = SuperBlockInodes { s_dev: 0, s_flags, s_type: 0, s_bdev, s_inodes: 0 };
            left_alone(&sb, &serde_json::from_value(mount).unwrap())
        };
        assert_eq!(why("ext4", 8, 0), None);
        assert_eq!(why("tmpfs", 0, 0), None);
        assert!(why("ext4", 8, SB_RDONLY).is_some_and(|why| why.contains("read-only")));
        assert!(why("nfs4", 0, 0).is_some_and(|why| why.contains("network")));
        assert!(why("fuse.sshfs", 0, 0).is_some_and(|why| why.contains("program")));
    }

    #[test]
    fn a_list_of_inodes_that_leads_into_another_is_not_followed() {
        use crate::testing::{declare, open};
        use synth::{Synth, named};

        let mount = serde_json::json!({
            "id": 1, "parent": 0, "mountpoint": "/", "root": "/", "fs_type": "ext4", "source": "x",
            "dev_major": 8, "dev_minor": 1, "flags": "", "peer_group": 0, "master": 0,
        });
        let mount: Mount = serde_json::from_value(mount).unwrap();
        let look = |strangers: u32| {
            let mut synth = Synth::new();
            declare::<SuperBlockInodes>(&mut synth, &[("s_inodes", named("list_head"))]);
            declare::<Candidate>(&mut synth, &[("i_sb_list", named("list_head"))]);
            let sb = synth.alloc("super_block");
            let head = synth.list_init("super_block", sb, "s_inodes");
            for n in 0..strangers + 2 {
                let inode = synth.alloc("inode");
                synth.set("inode", inode, "i_sb", if n < 2 { sb } else { 0xffff_8880_0000_0000 });
                let node = synth.address_of("inode", inode, "i_sb_list");
                synth.list_add_tail(node, head);
            }
            let kernel = open(&synth);
            let autopsy = Autopsy::new(&kernel);
            let raw: SuperBlockInodes = kernel.read(sb).unwrap();
            let mut gathered = Gathered::new(&autopsy, &mount);
            let done = autopsy.inodes_of(sb, &raw, &mount, 1 << 40, &mut Vec::new(), &mut gathered);
            (done.is_ok(), autopsy.findings().len())
        };
        assert_eq!(look(0), (true, 0));
        assert_eq!(look(1), (true, 1));
        assert!(!look(MAX_STRANGERS + 1).0);
    }

    #[test]
    fn paths_go_on_from_their_mount() {
        assert_eq!(join(&"/".into(), &"/a/b".into()), "/a/b".into());
        assert_eq!(join(&"/srv".into(), &"/a".into()), "/srv/a".into());
    }
}
