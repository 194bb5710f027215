//! File systems in memory: tmpfs, ramfs, devtmpfs, hugetlbfs (mm/shmem.c, fs/ramfs/inode.c, fs/hugetlbfs/inode.c; their names are dentries that are never dropped, d_subdirs
//! or d_children of include/linux/dcache.h; 6.1 and 6.12).

use std::collections::BTreeSet;

use ktypes::KernelType;
use snapshot::{Bytes, InodeId, Mount, PAGE_SIZE, Severity, Tmpfs, TmpfsEntry, TmpfsKind};

use crate::Autopsy;
use crate::error::{Result, corrupt};
use crate::fs::{children, device};
use crate::inode::{S_IFDIR, S_IFLNK, S_IFREG};

/// Names in one file system.
const MAX_ENTRIES: usize = 1 << 22;
/// Directories within directories.
const MAX_DEPTH: usize = 512;
/// PATH_MAX.
const MAX_TARGET: u64 = 4096;
/// In memory without a super block of one's own: what only the kernel mounts is not asked for.
const TYPES: [&[u8]; 4] = [b"tmpfs", b"ramfs", b"devtmpfs", b"hugetlbfs"];

#[derive(KernelType)]
#[kernel("super_block")]
struct SuperBlockRoot {
    s_dev: u32,
    s_root: u64,
    s_fs_info: u64,
}

#[derive(KernelType)]
#[kernel("inode")]
struct Links {
    i_mode: u16,
    i_uid: u32,
    i_gid: u32,
    i_sb: u64,
    i_link: u64,
}

#[derive(KernelType)]
#[kernel("shmem_sb_info")]
struct ShmemSbInfo {
    max_blocks: u64,
}

impl Autopsy<'_> {
    /// What is in all file systems in memory that are mounted among `mounts`; their inodes go into the table.
    pub(crate) fn tmpfs(&self, mounts: &[&Mount]) -> Vec<Tmpfs> {
        let mounted: BTreeSet<(u32, u32)> = mounts
            .iter()
            .filter(|m| TYPES.contains(&m.fs_type.as_bytes()))
            .map(|m| (m.dev_major, m.dev_minor))
            .collect();
        let mut all = Vec::new();
        if let Err(error) = self.all_tmpfs(mounts, &mounted, &mut all) {
            let text = format!("not all file systems in memory could be found: {error}");
            self.find(Severity::Loss, "tmpfs", text);
        }
        all
    }

    fn all_tmpfs(
        &self,
        mounts: &[&Mount],
        mounted: &BTreeSet<(u32, u32)>,
        all: &mut Vec<Tmpfs>,
    ) -> Result<()> {
        for addr in self.super_blocks()? {
            let root: SuperBlockRoot = self.kernel.read(addr)?;
            let number = device(root.s_dev);
            if !mounted.contains(&number) {
                continue;
            }
            let Some(mount) = mounts.iter().find(|m| (m.dev_major, m.dev_minor) == number) else { continue };
            match self.one_tmpfs(&root, mount) {
                Ok(tmpfs) => all.push(tmpfs),
                Err(error) => {
                    let text =
                        format!("the files of {} at {} are lost: {error}", mount.fs_type, mount.mountpoint);
                    self.find(Severity::Loss, "tmpfs", text);
                }
            }
        }
        Ok(())
    }

    fn one_tmpfs(&self, root: &SuperBlockRoot, mount: &Mount) -> Result<Tmpfs> {
        let top: Links = self.kernel.read(self.dentry(root.s_root)?.d_inode)?;
        let blocks = match mount.fs_type.as_bytes() {
            b"tmpfs" => self.kernel.read::<ShmemSbInfo>(root.s_fs_info)?.max_blocks,
            _ => 0,
        };
        let mut tmpfs = Tmpfs {
            dev_major: mount.dev_major,
            dev_minor: mount.dev_minor,
            fs_type: mount.fs_type.clone(),
            mode: u32::from(top.i_mode) & 0o7777,
            uid: top.i_uid,
            gid: top.i_gid,
            size: (blocks > 0).then(|| blocks.saturating_mul(PAGE_SIZE)),
            entries: Vec::new(),
        };
        let mut pending = vec![(root.s_root, Vec::new(), 0)];
        // Directories have one name: whoever has two makes a ring.
        let mut known = BTreeSet::from([root.s_root]);
        while let Some((directory, path, depth)) = pending.pop() {
            if depth > MAX_DEPTH {
                return Err(corrupt("dentry", directory, "is too deep"));
            }
            for child in children(self.kernel, directory)? {
                if tmpfs.entries.len() >= MAX_ENTRIES {
                    return Err(corrupt("dentry", directory, "has too many names below it"));
                }
                match self.tmpfs_entry(child, &path, mount) {
                    Ok(None) => {}
                    Ok(Some(entry)) => {
                        if entry.kind == TmpfsKind::Directory {
                            if !known.insert(child) {
                                return Err(corrupt("dentry", child, "is in two directories"));
                            }
                            pending.push((child, entry.path.as_bytes().to_vec(), depth + 1));
                        }
                        tmpfs.entries.push(entry);
                    }
                    Err(error) => {
                        let text =
                            format!("a file in {}{} is lost: {error}", mount.mountpoint, Bytes(path.clone()));
                        self.find(Severity::Loss, "tmpfs", text);
                    }
                }
            }
        }
        Ok(tmpfs)
    }

    /// `None`: a name of nothing, or a cursor of somebody who reads the directory.
    fn tmpfs_entry(&self, addr: u64, directory: &[u8], mount: &Mount) -> Result<Option<TmpfsEntry>> {
        let dentry = self.dentry(addr)?;
        if dentry.d_inode == 0 || dentry.hashed == 0 {
            return Ok(None);
        }
        let path = [directory, b"/", self.name(&dentry, addr)?.as_slice()].concat();
        let facts = self.inode_facts(dentry.d_inode)?;
        let at = mount.mountpoint.as_bytes().strip_suffix(b"/").unwrap_or(mount.mountpoint.as_bytes());
        self.inode(dentry.d_inode, &facts, &Bytes([at, &path].concat()))?;
        let kind = match facts.mode & 0o170_000 {
            S_IFREG => TmpfsKind::Regular,
            S_IFDIR => TmpfsKind::Directory,
            S_IFLNK => TmpfsKind::Symlink { target: self.symlink_target(dentry.d_inode)? },
            _ => {
                let (major, minor) = device(facts.rdev);
                TmpfsKind::Special { major, minor }
            }
        };
        Ok(Some(TmpfsEntry { path: Bytes(path), inode: InodeId(dentry.d_inode), kind }))
    }

    /// Where a symbolic link leads whose inode is in the table: beside the inode if it is short, else on a page.
    pub(crate) fn symlink_target(&self, inode: u64) -> Result<Bytes> {
        let link: Links = self.kernel.read(inode)?;
        if link.i_link != 0 {
            return Ok(Bytes(self.kernel.read_cstr(link.i_link, MAX_TARGET as usize)?));
        }
        let known = self.inodes.borrow();
        let known = known.get(&InodeId(inode)).ok_or_else(|| corrupt("inode", inode, "is not known"))?;
        let target = match known.fs_type.as_bytes() {
            b"ext4" => self.target_in_block(inode, link.i_sb, known.size)?,
            b"xfs" => self.xfs_target(inode, known.size)?,
            _ => None,
        };
        if let Some(target) = target {
            return Ok(Bytes(target));
        }
        let mapping =
            self.kernel.read_u64(inode.wrapping_add(self.kernel.offset_of("inode", "i_mapping")?))?;
        let pages = mapping.wrapping_add(self.kernel.offset_of("address_space", "i_pages")?);
        let mut first = None;
        self.kernel.xarray_for_each(pages, 2, |index, entry| {
            if index == 0 {
                first = entry.pointer();
            }
            Ok(())
        })?;
        let page = first.ok_or_else(|| corrupt("inode", inode, "is a symbolic link without a page"))?;
        let mut target = vec![0; known.size.min(MAX_TARGET) as usize];
        let at = self.kernel.page_to_pfn(page)?.saturating_mul(PAGE_SIZE);
        self.kernel.vmcore().read_phys(at, &mut target).map_err(ktypes::Error::from)?;
        Ok(Bytes(target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::{Synth, U64, array};

    /// A directory with two names in it, held as kernels up to 6.7 or as later ones do.
    fn directory(is_list: bool) -> (Synth, u64, Vec<u64>) {
        let mut synth = Synth::new();
        let (head, node) = if is_list { ("d_subdirs", "d_child") } else { ("d_children", "d_sib") };
        declare::<crate::fs::Dentry>(&mut synth, &[(head, array(U64, 2)), (node, array(U64, 2))]);
        let dir = synth.alloc("dentry");
        let mut names = vec![synth.alloc("dentry"), synth.alloc("dentry")];
        let at = |synth: &Synth, dentry: u64, member: &str| synth.address_of("dentry", dentry, member);
        let list = at(&synth, dir, head);
        if is_list {
            synth.write_u64(list, list).write_u64(list + 8, list);
        }
        for name in &names {
            let node = at(&synth, *name, node);
            if is_list {
                synth.list_add_tail(node, list);
            } else {
                synth.hlist_add_head(node, list);
            }
        }
        if !is_list {
            names.reverse();
        }
        (synth, dir, names)
    }

    #[test]
    fn names_in_a_directory_are_found_in_both_forms() {
        for is_list in [true, false] {
            let (synth, dir, names) = directory(is_list);
            let kernel = open(&synth);
            assert_eq!(children(&kernel, dir).unwrap(), names);
        }
    }

    #[test]
    fn a_damaged_directory_is_an_error() {
        let (mut synth, dir, names) = directory(true);
        let node = synth.address_of("dentry", names[1], "d_child");
        synth.write_u64(node, 0xdead_0000_0000_0100);
        let kernel = open(&synth);
        assert!(children(&kernel, dir).is_err());
    }

    #[test]
    fn short_links_lie_beside_the_inode() {
        let mut synth = Synth::new();
        declare::<Links>(&mut synth, &[]);
        let (inode, target) = (synth.alloc("inode"), synth.string("../target"));
        synth.set("inode", inode, "i_link", target);
        let kernel = open(&synth);
        let autopsy = Autopsy::new(&kernel);
        assert_eq!(autopsy.symlink_target(inode).unwrap(), "../target".into());
        assert!(autopsy.symlink_target(0xdead_0000_0000_0000).is_err());
    }
}
