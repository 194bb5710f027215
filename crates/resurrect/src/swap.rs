//! Swap areas: their slots are read as if they were page frames; when all have been, the areas are used again.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use snapshot::{PAGE_SIZE, PhysMap, PhysMem, PhysMemError, PhysRange, Snapshot, SwapArea, Zram};

use crate::{FileStale, zram};

/// What ends the first page of an area (`union swap_header`, include/linux/swap.h), unless the machine is hibernating in it.
const MAGIC: &[u8; 10] = b"SWAPSPACE2";
/// Where the number of the last slot stands in the first page: behind the boot block and the version.
const LAST_PAGE: usize = 1028;

/// Block devices of the dead machine, by their numbers there, and where they are now.
pub type BlockDevices = BTreeMap<(u32, u32), PathBuf>;

/// The dead machine's memory, and the swap areas that can be read, which look as if they were memory behind its end.
pub struct Memory<'a> {
    memory: &'a dyn PhysMem,
    areas: Vec<Open>,
    ranges: Vec<PhysRange>,
    /// Bytes that were read from the areas.
    bytes: Cell<u64>,
}

/// What slots are that have no page: whoever maps some maps those between them as well, and does not look at these.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Between {
    Zero,
    Absent,
}

/// An area, and the device that it is on; none if it is in compressed memory.
struct Open {
    area: SwapArea,
    device: Option<(File, PathBuf)>,
}

impl<'a> Memory<'a> {
    /// Opens the areas, where they are needed or will be. What cannot be opened is noted in the snapshot.
    pub fn open(memory: &'a dyn PhysMem, snapshot: &mut Snapshot, devices: &BlockDevices) -> Self {
        let mut areas = Vec::new();
        for area in snapshot.swap_areas.iter_mut().filter(|area| area.unsupported.is_none()) {
            match Open::new(area, devices) {
                Ok(open) => areas.push(open),
                Err(why) => area.unsupported = Some(why),
            }
        }
        areas.sort_by_key(|open| open.area.index);
        let ranges = memory.ranges().iter().copied().chain(areas.iter().map(|open| open.area.range()));
        Self { memory, ranges: ranges.collect(), areas, bytes: Cell::new(0) }
    }

    /// Uses the areas again, in the order in which the dead kernel had them. Nothing is read from them afterwards. Returns those that are
    /// not in use.
    pub(crate) fn switch_on(self, snapshot: &Snapshot) -> Vec<FileStale> {
        let mut off = Vec::new();
        for area in &snapshot.swap_areas {
            let open = self.areas.iter().find(|open| open.area.index == area.index);
            let outcome = match (open, &area.unsupported) {
                (Some(open), _) => match open.path() {
                    Some(path) => swapon(path, area.flags).map_err(|errno| format!("swapon: {errno}")),
                    None => Err("it was compressed memory (zram), which begins anew at the next boot".into()),
                },
                (None, Some(why)) => Err(why.clone()),
                (None, None) => continue,
            };
            off.extend(outcome.err().map(|why| FileStale { path: area.path.clone(), why }));
        }
        off
    }

    /// Bytes that were read from swap areas, by this process.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// The area that an address lies in.
    fn area_of(&self, addr: u64) -> Option<&Open> {
        let (index, _) = SwapArea::slot_of(addr / PAGE_SIZE)?;
        self.areas.iter().find(|open| open.area.index == index)
    }
}

impl PhysMem for Memory<'_> {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
        let Some(open) = self.area_of(addr) else { return self.memory.map(addr, len) };
        let mut bytes = vec![0; len];
        open.read(addr, &mut bytes, self.memory, Between::Zero)?;
        self.bytes.set(self.bytes.get() + len as u64);
        PhysMap::owned(bytes, 0..len).ok_or(PhysMemError::NotPresent { addr, len: len as u64 })
    }

    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), PhysMemError> {
        match self.area_of(addr) {
            Some(open) => {
                self.bytes.set(self.bytes.get() + buf.len() as u64);
                open.read(addr, buf, self.memory, Between::Absent)
            }
            None => self.memory.read(addr, buf),
        }
    }

    fn after_fork(&self) {
        self.memory.after_fork();
    }
}

impl Open {
    /// The error is for people.
    fn new(area: &SwapArea, devices: &BlockDevices) -> Result<Self, String> {
        if let Some(zram) = &area.zram {
            if !zram::is_known(&zram.algorithm) {
                return Err(format!("it is compressed with {}: not read by this version", zram.algorithm));
            }
            return Ok(Self { area: area.clone(), device: None });
        }
        let node = devices.get(&(area.dev_major, area.dev_minor)).ok_or(
            "its device is not here: it was not known when the crash kernel was armed, or is not a plain disk",
        )?;
        let device = File::open(node).map_err(|e| format!("open {}: {e}", node.display()))?;
        let open = Self { area: area.clone(), device: Some((device, node.clone())) };
        open.check_header(node)?;
        Ok(open)
    }

    /// The device under its present name, or the file.
    fn path(&self) -> Option<&Path> {
        let (_, node) = self.device.as_ref()?;
        Some(if self.area.is_device { node } else { self.area.path.as_path() })
    }

    /// Another disk with the same number would have something else there.
    fn check_header(&self, node: &Path) -> Result<(), String> {
        let mut header = [0; PAGE_SIZE as usize];
        let start = SwapArea::frame(self.area.index, 0) * PAGE_SIZE;
        self.read_blocks(start, &mut header).map_err(|e| e.to_string())?;
        if !header.ends_with(MAGIC) {
            return Err(format!("{} has no swap area there", node.display()));
        }
        let last_page =
            header.get(LAST_PAGE..).and_then(|tail| tail.first_chunk()).map(|n| u32::from_le_bytes(*n));
        match last_page {
            Some(last) if last.checked_add(1).is_none_or(|slots| slots >= self.area.slots) => Ok(()),
            _ => Err(format!("the swap area on {} is another one: it has fewer slots", node.display())),
        }
    }

    /// Reads from an address on.
    fn read(
        &self,
        addr: u64,
        buf: &mut [u8],
        memory: &dyn PhysMem,
        between: Between,
    ) -> Result<(), PhysMemError> {
        match &self.area.zram {
            Some(zram) => read_pages(zram, addr, buf, memory, between),
            None => self.read_blocks(addr, buf),
        }
    }

    /// Extent by extent, from the device.
    fn read_blocks(&self, addr: u64, mut buf: &mut [u8]) -> Result<(), PhysMemError> {
        let (range, len) = (self.area.range(), buf.len() as u64);
        let absent = || PhysMemError::NotPresent { addr, len };
        let (device, _) = self.device.as_ref().ok_or_else(absent)?;
        let mut at = addr.checked_sub(range.start).ok_or_else(absent)?;
        if at.checked_add(len).is_none_or(|end| end > range.len) {
            return Err(absent());
        }
        while !buf.is_empty() {
            let slot = at / PAGE_SIZE;
            let i = self.area.extents.partition_point(|extent| extent.slot <= slot);
            let extent = i.checked_sub(1).and_then(|i| self.area.extents.get(i)).ok_or_else(absent)?;
            let within = at - extent.slot.saturating_mul(PAGE_SIZE);
            let left = extent.count.saturating_mul(PAGE_SIZE).saturating_sub(within);
            let here = left.min(buf.len() as u64) as usize;
            if here == 0 {
                return Err(absent());
            }
            let from = extent.block.checked_mul(PAGE_SIZE).and_then(|start| start.checked_add(within));
            let (now, rest) = buf.split_at_mut(here);
            let failed = |source: io::Error| PhysMemError::Io { addr, len, source };
            device.read_exact_at(now, from.ok_or_else(absent)?).map_err(failed)?;
            at += here as u64;
            buf = rest;
        }
        Ok(())
    }
}

/// Reads from an address on, page by page, out of compressed memory.
fn read_pages(
    zram: &Zram,
    addr: u64,
    mut buf: &mut [u8],
    memory: &dyn PhysMem,
    between: Between,
) -> Result<(), PhysMemError> {
    let mut at = addr;
    while !buf.is_empty() {
        let within = (at % PAGE_SIZE) as usize;
        let here = (PAGE_SIZE as usize - within).min(buf.len());
        let (now, rest) = buf.split_at_mut(here);
        let absent = PhysMemError::NotPresent { addr: at, len: here as u64 };
        let (_, slot) = SwapArea::slot_of(at / PAGE_SIZE).ok_or(absent)?;
        if zram.slots.contains_key(&slot) || between == Between::Absent {
            let page = zram::page(zram, slot, memory)?;
            now.copy_from_slice(page.get(within..within + here).unwrap_or_default());
        } else {
            now.fill(0);
        }
        at += here as u64;
        buf = rest;
    }
    Ok(())
}

fn swapon(path: &Path, flags: i32) -> Result<(), Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: a string that outlives the call, and a number.
    Errno::result(unsafe { libc::swapon(path.as_ptr(), flags) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::SwapExtent;

    struct Nothing;

    impl PhysMem for Nothing {
        fn ranges(&self) -> &[PhysRange] {
            &[PhysRange { start: 0, len: 0x1000 }]
        }
        fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
            Err(PhysMemError::NotPresent { addr, len: len as u64 })
        }
    }

    /// A file of 16 pages, each full of its number plus one, with an area of 8 slots: pages 4 to 6, 1, 9 to 12. The header is in page 4.
    fn device(dir: &Path, slots: u32) -> PathBuf {
        let mut bytes: Vec<u8> = (1..=16).flat_map(|n| [n; PAGE_SIZE as usize]).collect();
        let header = &mut bytes[4 * PAGE_SIZE as usize..][..PAGE_SIZE as usize];
        header[PAGE_SIZE as usize - MAGIC.len()..].copy_from_slice(MAGIC);
        header[LAST_PAGE..LAST_PAGE + 4].copy_from_slice(&(slots - 1).to_le_bytes());
        let path = dir.join("device");
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn area() -> SwapArea {
        let extents = [(0, 3, 4), (3, 1, 1), (4, 4, 9)];
        SwapArea {
            index: 3,
            path: "/swapfile".into(),
            is_device: false,
            dev_major: 254,
            dev_minor: 1,
            slots: 8,
            extents: extents.map(|(slot, count, block)| SwapExtent { slot, count, block }).into(),
            flags: 0,
            zram: None,
            unsupported: None,
        }
    }

    fn open<'a>(slots: u32, number: (u32, u32), snapshot: &mut Snapshot) -> Memory<'a> {
        let dir = tempfile::tempdir().unwrap();
        let devices = BlockDevices::from([(number, device(dir.path(), slots))]);
        snapshot.swap_areas = vec![area()];
        Memory::open(&Nothing, snapshot, &devices)
    }

    #[test]
    fn slots_are_read_like_frames_across_extents() {
        let mut snapshot = Snapshot::default();
        let memory = open(8, (254, 1), &mut snapshot);
        assert_eq!(snapshot.swap_areas[0].unsupported, None);
        assert_eq!(memory.ranges().len(), 2);
        let at = |slot| SwapArea::frame(3, slot) * PAGE_SIZE;
        let bytes = memory.map(at(1), 5 * PAGE_SIZE as usize).unwrap();
        let pages: Vec<u8> = bytes.chunks(PAGE_SIZE as usize).map(|page| page[0]).collect();
        assert_eq!(pages, [6, 7, 2, 10, 11]);
        let mut buf = [0; 4];
        memory.read(at(4) - 2, &mut buf).unwrap();
        assert_eq!(buf, [2, 2, 10, 10]);
        assert!(memory.map(at(7), 2 * PAGE_SIZE as usize).is_err(), "behind the end");
        assert!(memory.map(SwapArea::frame(2, 1) * PAGE_SIZE, 1).is_err(), "another area");
        assert!(memory.map(0, 1).is_err(), "memory itself is asked");
    }

    #[test]
    fn an_area_that_is_not_what_it_was_is_not_read() {
        for (slots, number, why) in [(7, (254, 1), "fewer slots"), (8, (254, 2), "not here")] {
            let mut snapshot = Snapshot::default();
            let memory = open(slots, number, &mut snapshot);
            let said = snapshot.swap_areas[0].unsupported.clone().unwrap();
            assert!(said.contains(why), "{said}");
            assert_eq!(memory.ranges().len(), 1);
            let off = memory.switch_on(&snapshot);
            assert!(matches!(off.as_slice(), [one] if one.why == said), "and is told to be off");
        }
    }
}
