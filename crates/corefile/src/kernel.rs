//! A part of the dead machine's memory as an ELF core of its kernel, as /proc/vmcore has all of it.

use std::fs::File;

use snapshot::{PhysMem, PhysRange, Prot};

use crate::elf::{Layout, Load};
use crate::{Error, copy};

/// A core file of the kernel that is to be written.
pub struct KernelCore {
    ranges: Vec<PhysRange>,
    notes: Vec<u8>,
    loads: Vec<Load>,
    layout: Layout,
}

impl KernelCore {
    /// Of these ranges, ascending and without overlap. `notes`: those of the whole core (registers, vmcoreinfo); `direct_map`: where the kernel
    /// has all memory mapped.
    pub fn new(ranges: Vec<PhysRange>, notes: Vec<u8>, direct_map: u64) -> Self {
        let load = |range: &PhysRange| Load {
            prot: Prot::READ | Prot::WRITE | Prot::EXEC,
            virt: direct_map.wrapping_add(range.start),
            phys: range.start,
            size: range.len,
            file_size: range.len,
        };
        let loads: Vec<Load> = ranges.iter().map(load).collect();
        let layout = Layout::new(&loads, notes.len() as u64);
        Self { ranges, notes, loads, layout }
    }

    /// The file's length. Pages of zeroes will be holes in it.
    pub fn bytes(&self) -> u64 {
        self.layout.len
    }

    /// Writes it into an empty file.
    ///
    /// # Errors
    /// When `out` cannot be written, or `mem` does not have what it is asked for: then the file is of no use.
    pub fn write(&self, mem: &dyn PhysMem, out: &File) -> Result<(), Error> {
        self.layout.write(&self.loads, &self.notes, out)?;
        for (range, offset) in self.ranges.iter().zip(&self.layout.offsets) {
            copy(mem, *range, out, *offset, range.start)?;
        }
        Ok(())
    }
}
