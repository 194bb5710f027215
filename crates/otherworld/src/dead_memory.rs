//! The dead machine's memory, as those ask for it who want page contents.

use std::ops::Deref;

use snapshot::{PhysMap, PhysMem, PhysMemError, PhysRange, StableBytes};
use vmcore::Vmcore;

/// A core, as a source of page contents.
pub struct DeadMemory<'a> {
    core: &'a Vmcore,
    ranges: Vec<PhysRange>,
}

impl<'a> DeadMemory<'a> {
    /// Of a whole core.
    pub fn new(core: &'a Vmcore) -> Self {
        let ranges = core.ranges().iter().map(|r| PhysRange { start: r.start, len: r.len }).collect();
        Self { core, ranges }
    }
}

/// A part of the core that is mapped, or borrowed, for as long as this lives.
struct Window<'a>(vmcore::PhysMap<'a>);

impl Deref for Window<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

// SAFETY: the bytes are those of a memory map that the window holds a share of, or of somebody else's slice; both stay where they are
// when the window moves.
unsafe impl StableBytes for Window<'_> {}

fn no_memory(error: vmcore::Error, addr: u64, len: u64) -> PhysMemError {
    match error {
        vmcore::Error::Io { source, .. } => PhysMemError::Io { addr, len, source },
        _ => PhysMemError::NotPresent { addr, len },
    }
}

impl PhysMem for DeadMemory<'_> {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
        let window = self.core.map_phys(addr, len).map_err(|e| no_memory(e, addr, len as u64))?;
        PhysMap::owned(Window(window), 0..len).ok_or(PhysMemError::NotPresent { addr, len: len as u64 })
    }

    fn after_fork(&self) {
        self.core.after_fork();
    }

    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), PhysMemError> {
        self.core.read_phys(addr, buf).map_err(|e| no_memory(e, addr, buf.len() as u64))
    }
}
