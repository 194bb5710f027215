//! What several tests need.

use snapshot::{Inode, PhysMap, PhysMem, PhysMemError, PhysRange};

/// Memory that begins at address 0.
pub(crate) struct Mem(pub(crate) Vec<u8>);

impl PhysMem for Mem {
    fn ranges(&self) -> &[PhysRange] {
        &[]
    }
    fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
        let absent = PhysMemError::NotPresent { addr, len: len as u64 };
        self.0.get(addr as usize..addr as usize + len).map(PhysMap::borrowed).ok_or(absent)
    }
}

/// A regular file of which nothing is in memory.
pub(crate) fn inode() -> Inode {
    let none = serde_json::json!({ "sec": 0, "nsec": 0 });
    let json = serde_json::json!({
        "ino": 0, "dev_major": 8, "dev_minor": 1, "fs_type": "ext4", "mode": 0o100_644, "uid": 0, "gid": 0, "nlink": 1,
        "size": 0, "atime": none, "mtime": none, "ctime": none, "path": "", "dirty": false, "pages": [], "lost_pages": 0,
    });
    serde_json::from_value(json).expect("an inode")
}
