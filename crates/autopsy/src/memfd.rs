//! Files in memory that never had a name: what memfd_create(2) makes (mm/memfd.c, mm/shmem.c; 6.1 and 6.12).

use snapshot::FileKind;

use crate::Autopsy;
use crate::error::Result;

impl Autopsy<'_> {
    /// `inode`: address of an inode of tmpfs.
    pub(crate) fn memfd_kind(&self, inode: u64) -> Result<FileKind> {
        let info = inode.wrapping_sub(self.kernel.offset_of("shmem_inode_info", "vfs_inode")?);
        let seals = info.wrapping_add(self.kernel.offset_of("shmem_inode_info", "seals")?);
        Ok(FileKind::Memfd { seals: self.kernel.read_u32(seals)? })
    }
}
