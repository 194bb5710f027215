//! What several tests need.

use snapshot::{PhysMap, PhysMem, PhysMemError, PhysRange};

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
