//! Swap areas.
//!
//! A slot of a swap area is a page frame that lies on a disk: such pages are listed beside those in memory, with frame numbers that no
//! memory has, and whoever copies frames need not know the difference.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Bytes, Inode, PAGE_SIZE, PhysRange, Reason, Snapshot, Vma};

/// The first frame number that is a swap slot: physical addresses of x86-64 have 52 bits.
pub const FIRST_SWAP_FRAME: u64 = 1 << (52 - PAGE_SIZE.trailing_zeros());
/// The first frame number that is neither memory nor a swap slot, but a block of a file system that was read beforehand.
pub const FIRST_BLOCK_FRAME: u64 = FIRST_SWAP_FRAME << 1;
/// Slots are numbered with 32 bits (`swap_info_struct.max`).
const SLOT_BITS: u32 = 32;

/// A swap area that was in use (`swap_info_struct`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapArea {
    /// Index in `swap_info[]`; page-table entries name it.
    pub index: u32,
    /// The device's or file's path, as in /proc/swaps.
    pub path: Bytes,
    /// It is a block device, as opposed to a file.
    pub is_device: bool,
    /// The block device that the slots are on: the area itself, or what the file system with the file is on.
    pub dev_major: u32,
    #[allow(missing_docs)]
    pub dev_minor: u32,
    /// How many slots it has; the first one is the area's header.
    pub slots: u32,
    /// Where on the device they are, by ascending slot.
    pub extents: Vec<SwapExtent>,
    /// As swapon(2) takes them: the priority that an administrator gave it, and whether freed slots are discarded.
    pub flags: i32,
    /// Where its pages are, if it is in compressed memory.
    #[serde(default)]
    pub zram: Option<Zram>,
    /// Why it cannot be read, for people.
    pub unsupported: Option<String>,
}

/// A swap area in compressed memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zram {
    /// How its pages are compressed, as `/sys/block/zram0/comp_algorithm` has it.
    pub algorithm: String,
    /// Those that it has.
    pub slots: BTreeMap<u32, ZramSlot>,
}

/// Where a page in compressed memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZramSlot {
    /// It is this word over and over.
    Same(u64),
    /// In physical memory.
    Stored {
        /// Where it begins.
        addr: u64,
        /// Where it goes on, if the page in which it begins does not have all of it.
        next: u64,
        /// Bytes; a whole page is not compressed.
        size: u16,
    },
}

/// Consecutive slots in consecutive blocks of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapExtent {
    /// First slot.
    pub slot: u64,
    /// How many.
    pub count: u64,
    /// Where the first one is on the device, in pages.
    pub block: u64,
}

impl SwapArea {
    /// The frame number that stands for a slot of an area.
    pub const fn frame(index: u32, slot: u32) -> u64 {
        FIRST_SWAP_FRAME + ((index as u64) << SLOT_BITS) + slot as u64
    }

    /// The area's index and the slot that a frame number stands for; `None` for a frame of memory.
    pub const fn slot_of(pfn: u64) -> Option<(u32, u32)> {
        match pfn.checked_sub(FIRST_SWAP_FRAME) {
            Some(slot) if pfn < FIRST_BLOCK_FRAME => Some(((slot >> SLOT_BITS) as u32, slot as u32)),
            Some(_) | None => None,
        }
    }

    /// The addresses that its slots have as frames.
    pub fn range(&self) -> PhysRange {
        let start = Self::frame(self.index, 0) * PAGE_SIZE;
        PhysRange { start, len: u64::from(self.slots) * PAGE_SIZE }
    }
}

impl Snapshot {
    /// Why not all pages of a file that lives in memory can be had.
    pub fn obstacles_to_contents(&self, inode: &Inode) -> Vec<Reason> {
        obstacles(self, inode.lost_pages, inode.pages.iter().map(|run| (run.pfn, run.count)))
    }
}

/// Why pages of a mapping, which is named by `at`, cannot be had.
pub(crate) fn judge_mapping(snapshot: &Snapshot, at: &str, vma: &Vma, reasons: &mut Vec<Reason>) {
    let obstacles = obstacles(snapshot, vma.lost_pages, vma.pages.iter().map(|run| (run.pfn, run.count)));
    reasons.extend(named(at, obstacles));
}

/// The same for pages of a file that lives in memory.
pub(crate) fn judge_inode(snapshot: &Snapshot, at: &str, inode: &Inode, reasons: &mut Vec<Reason>) {
    reasons.extend(named(at, snapshot.obstacles_to_contents(inode)));
}

fn named(at: &str, obstacles: Vec<Reason>) -> impl Iterator<Item = Reason> {
    obstacles.into_iter().map(move |reason| Reason { text: format!("{at}: {}", reason.text), ..reason })
}

/// `lost`: pages that are in no frame at all.
fn obstacles(snapshot: &Snapshot, lost: u64, runs: impl Iterator<Item = (u64, u32)>) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if lost > 0 {
        reasons.push(Reason::new("lost-pages", format!("{lost} pages cannot be read")));
    }
    reasons.extend(out_of_reach(snapshot, runs).map(|why| Reason::new("swapped", why)));
    reasons
}

/// Which of these frames are in swap areas that cannot be read.
fn out_of_reach(snapshot: &Snapshot, runs: impl Iterator<Item = (u64, u32)>) -> impl Iterator<Item = String> {
    let mut by_area: BTreeMap<u32, u64> = BTreeMap::new();
    for (pfn, count) in runs {
        if let Some((index, _)) = SwapArea::slot_of(pfn) {
            *by_area.entry(index).or_default() += u64::from(count);
        }
    }
    by_area.into_iter().filter_map(|(index, count)| {
        match snapshot.swap_areas.iter().find(|area| area.index == index) {
            None => Some(format!("{count} pages are in swap area {index}, which could not be read")),
            Some(area) => {
                let why = area.unsupported.as_ref()?;
                Some(format!("{count} pages are in the swap area {}: {why}", area.path))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_frames_that_no_memory_has() {
        assert_eq!(SwapArea::slot_of(FIRST_SWAP_FRAME - 1), None);
        assert_eq!(SwapArea::slot_of(FIRST_BLOCK_FRAME), None);
        for (index, slot) in [(0, 0), (0, u32::MAX), (1, 0), (31, u32::MAX)] {
            assert_eq!(SwapArea::slot_of(SwapArea::frame(index, slot)), Some((index, slot)));
        }
        assert!(SwapArea::frame(31, u32::MAX).checked_mul(PAGE_SIZE).is_some(), "has an address");
    }
}
