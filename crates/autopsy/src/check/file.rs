//! Open files: descriptor bitmap and table, `struct file` and its users, `dentry`, inode, super block (include/linux/fdtable.h, fs.h,
//! dcache.h; fs/file.c, fs/dcache.c; 6.1 and 6.12).

#[cfg(test)]
mod tests;

use ktypes::KernelType;
use snapshot::{FileId, FindingKind, Process};

use super::slab::{CRED, DENTRY, FILE};
use super::{Doubts, Machine};
use crate::Autopsy;
use crate::error::Result;
use crate::fs::Path;
use crate::inode::{S_IFREG, S_IFSOCK};

const OBJECT: &str = "file";
/// fs.nr_open is a million by default.
const MAX_FDS: u32 = 2 << 20;
/// FMODE_BACKING, 1 << 25 in 6.5, 1 << 24 since: of files under an overlay, which are larger objects (include/linux/fs.h).
const FMODE_BACKING: u32 = 3 << 24;

#[derive(KernelType)]
#[kernel("files_struct")]
struct Table {
    fdt: u64,
    #[kernel(address)]
    file_lock: u64,
}

#[derive(KernelType)]
#[kernel("fdtable")]
struct FdTable {
    max_fds: u32,
    fd: u64,
    open_fds: u64,
}

#[derive(KernelType)]
#[kernel("file")]
struct File {
    #[kernel(nested)]
    f_path: Path,
    f_inode: u64,
    f_mapping: u64,
    f_mode: u32,
    f_cred: u64,
    #[kernel("f_count.counter")]
    f_count: i64,
    private_data: u64,
}

#[derive(KernelType)]
#[kernel("dentry")]
struct Dentry {
    d_inode: u64,
    d_sb: u64,
    #[kernel("d_u.d_alias", address)]
    alias: u64,
    #[kernel("d_u.d_alias.pprev")]
    alias_pprev: u64,
}

#[derive(KernelType)]
#[kernel("vfsmount")]
struct VfsMount {
    mnt_sb: u64,
}

#[derive(KernelType)]
#[kernel("inode")]
struct Inode {
    i_mode: u16,
    i_sb: u64,
    i_mapping: u64,
    #[kernel(address)]
    i_lock: u64,
}

#[derive(KernelType)]
#[kernel("address_space")]
struct Mapping {
    host: u64,
}

#[derive(KernelType)]
#[kernel("super_block")]
struct SuperBlock {
    s_root: u64,
}

impl Autopsy<'_> {
    /// Every file in a descriptor table has its bit in the table's bitmap.
    pub(super) fn check_descriptors(&self, process: &Process, doubts: &mut Doubts) {
        if process.files_id != 0 {
            let checked = self.check_table(process.files_id, doubts);
            self.outcome(checked, FindingKind::Link, OBJECT, process.files_id, doubts);
        }
    }

    fn check_table(&self, files: u64, doubts: &mut Doubts) -> Result<()> {
        let table: Table = self.kernel.read(files)?;
        let fds: FdTable = self.kernel.read(table.fdt)?;
        if fds.max_fds > MAX_FDS {
            // Told by whoever reads the descriptors.
            return Ok(());
        }
        let open = self.kernel.read_bytes(fds.open_fds, fds.max_fds.div_ceil(64) as usize * 8)?;
        let pointers = self.kernel.read_bytes(fds.fd, fds.max_fds as usize * 8)?;
        let is_open = |fd: usize| open.get(fd / 8).is_some_and(|byte| byte >> (fd % 8) & 1 != 0);
        // The other way round it is a number that is reserved for an open() in flight. dup2(2) sets the bit after the pointer.
        let stray = pointers.as_chunks::<8>().0.iter().enumerate();
        let stray = stray.filter(|(fd, pointer)| **pointer != [0; 8] && !is_open(*fd)).map(|(fd, _)| fd);
        if let Some(fd) = { stray }.next()
            && !self.is_word_set(table.file_lock)
        {
            let text = format!("descriptor {fd} has a file, and is closed by the bitmap");
            doubts.doubt(FindingKind::Link, OBJECT, table.fdt, text);
        }
        Ok(())
    }

    /// What an open file and those that it refers to say of each other.
    pub(super) fn check_file(&self, id: FileId, machine: &Machine) -> Doubts {
        let mut doubts = Doubts::default();
        let path = self.files.borrow().get(&id).map(|file| file.path.to_string());
        // What could not be read is told already.
        let Some(path) = path else { return doubts };
        let checked = self.check_links_of(id.0, &path, machine, &mut doubts);
        self.outcome(checked, FindingKind::Link, OBJECT, id.0, &mut doubts);
        doubts
    }

    fn check_links_of(&self, addr: u64, path: &str, machine: &Machine, doubts: &mut Doubts) -> Result<()> {
        let file: File = self.kernel.read(addr)?;
        let mut say = |kind, at, why: &str| doubts.doubt(kind, OBJECT, at, format!("{path}: {why}"));
        if let Some(why) = self.slab_contradiction(FILE, addr)
            && !(file.f_mode & FMODE_BACKING != 0 && self.is_allocated(addr))
        {
            say(FindingKind::Slab, addr, &format!("no file is at {addr:#x}: {why}"));
            return Ok(());
        }
        // A reference is taken before the pointer is written, and given back after that is gone (fd_install(), __fput()).
        let known = machine.file_users.get(&addr).copied().unwrap_or(0);
        if file.f_count < known {
            let why = format!("{known} descriptors and mappings use it, the kernel counted {}", file.f_count);
            say(FindingKind::Count, addr, &why);
        }
        if let Some(why) = self.slab_contradiction(CRED, file.f_cred) {
            say(FindingKind::Slab, file.f_cred, &format!("the credentials that opened it are none: {why}"));
        }
        if let Some(why) = self.slab_contradiction(DENTRY, file.f_path.dentry) {
            say(FindingKind::Slab, file.f_path.dentry, &format!("its dentry is none: {why}"));
            return Ok(());
        }
        let dentry: Dentry = self.kernel.read(file.f_path.dentry)?;
        let inode: Inode = self.kernel.read(file.f_inode)?;
        let mount: VfsMount = self.kernel.read(file.f_path.mnt)?;
        if mount.mnt_sb != dentry.d_sb {
            say(FindingKind::Link, addr, "it is on another file system than its mount");
        }
        let fs_type = self.super_block(dentry.d_sb).and_then(|sb| self.fs_type(&sb))?;
        // Files of an overlay may have its names and the inodes of what is below (open_with_fake_path()).
        let is_stacked = matches!(fs_type.as_bytes(), b"overlay" | b"ecryptfs");
        if !is_stacked {
            // A dentry keeps its inode for as long as somebody has it open, though the name may go (d_delete()).
            if dentry.d_inode != file.f_inode {
                say(FindingKind::Link, addr, "its name and its inode do not belong together");
            }
            if inode.i_sb != dentry.d_sb {
                say(FindingKind::Link, addr, "its inode is on another file system");
            }
            if dentry.d_inode == file.f_inode && !self.is_alias(&dentry)? && !self.is_word_set(inode.i_lock) {
                say(FindingKind::Link, file.f_inode, "its inode does not know its name");
            }
        }
        if let Some(why) = self.inode_contradiction(file.f_inode, inode.i_sb)? {
            say(FindingKind::Slab, file.f_inode, &why);
        }
        let kind = u32::from(inode.i_mode) & 0o170_000;
        if kind == S_IFREG && !is_stacked {
            if file.f_mapping != inode.i_mapping {
                say(FindingKind::Link, addr, "its page cache is not its inode's");
            } else if self.kernel.read::<Mapping>(inode.i_mapping)?.host != file.f_inode {
                say(FindingKind::Link, inode.i_mapping, "its page cache is another inode's");
            }
        }
        // A name of a unix socket can be open as well, as a place (O_PATH).
        if kind == S_IFSOCK && fs_type.as_bytes() == b"sockfs" {
            let checked = self.check_socket(addr, file.f_inode, file.private_data, path, doubts);
            self.outcome(checked, FindingKind::Link, "socket", file.private_data, doubts);
        }
        Ok(())
    }

    /// Whether an address is the beginning of memory from kmalloc().
    fn is_allocated(&self, addr: u64) -> bool {
        let slab = self.kernel.slab_cache_of(addr);
        slab.is_some_and(|slab| slab.starts_at(addr))
    }

    /// Whether a dentry is in the list that its inode has of its names: what points at it is pointed at.
    fn is_alias(&self, dentry: &Dentry) -> Result<bool> {
        Ok(dentry.alias_pprev >> 63 != 0 && self.kernel.read_u64(dentry.alias_pprev)? == dentry.alias)
    }

    /// All inodes of a file system come from the same cache, and lie at the same place in its objects: as its root directory's does.
    fn inode_contradiction(&self, inode: u64, sb: u64) -> Result<Option<String>> {
        let sb: SuperBlock = self.kernel.read(sb)?;
        if sb.s_root == 0 {
            return Ok(None);
        }
        let root = self.kernel.read::<Dentry>(sb.s_root)?.d_inode;
        let Some(expected) = self.kernel.slab_cache_of(root).filter(|_| !self.is_kfence(root)) else {
            return Ok(None);
        };
        let place = root - expected.object_start;
        Ok(match self.kernel.slab_cache_of(inode) {
            Some(slab) if slab.cache == expected.cache && inode - slab.object_start == place => None,
            _ if self.is_kfence(inode) => None,
            Some(slab) => Some(format!(
                "its inode lies in a slab of `{}` objects, the file system's lie in one of `{}`",
                slab.cache_name, expected.cache_name
            )),
            None => Some("its inode lies in no slab".to_owned()),
        })
    }
}
