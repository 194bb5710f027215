//! Swap areas and what is in them: `swap_info_struct`, `swap_extent` (include/linux/swap.h, mm/swapfile.c), the swap cache (mm/swap_state.c)
//! and the compressed pages of zswap (mm/zswap.c); 6.1 and 6.12.

use std::collections::{BTreeMap, HashMap, HashSet};

use ktypes::KernelType;
use snapshot::{Severity, SwapArea, SwapExtent, Zram};

use crate::error::{Result, corrupt};
use crate::fs::device;
use crate::memory::Frames;
use crate::{Autopsy, file};

/// Extents of a swap file on a badly fragmented file system.
const MAX_EXTENTS: usize = 1 << 20;
/// Pages in the swap cache, or in zswap: as many as a large machine has frames.
const MAX_PAGES: usize = 1 << 28;
/// An area of a tebibyte, for bitmaps of its slots.
const MAX_SLOTS: u32 = 1 << 28;
/// DISK_NAME_LEN (include/linux/blkdev.h).
const DISK_NAME_LEN: usize = 32;
/// SWAP_ADDRESS_SPACE_SHIFT (mm/swap.h): log2 of the slots for which there is one cache.
const CACHE_SHIFT: u32 = 14;
/// SWP_TYPE_SHIFT (include/linux/swapops.h): a `swp_entry_t` has its slot below and its area above.
const TYPE_SHIFT: u32 = 58;
/// Subpages of the largest folio.
const MAX_FOLIO: u64 = 512;

// swap_info_struct.flags (include/linux/swap.h).
const SWP_USED: u64 = 1 << 0;
const SWP_DISCARDABLE: u64 = 1 << 2;
const SWP_BLKDEV: u64 = 1 << 6;
const SWP_FS_OPS: u64 = 1 << 8;
const SWP_AREA_DISCARD: u64 = 1 << 9;
const SWP_PAGE_DISCARD: u64 = 1 << 10;

// What swapon(2) takes (include/linux/swap.h).
const SWAP_FLAG_PREFER: i32 = 0x8000;
const SWAP_FLAG_PRIO_MASK: i32 = 0x7fff;
const SWAP_FLAG_DISCARD: i32 = 0x10000;
const SWAP_FLAG_DISCARD_ONCE: i32 = 0x20000;
const SWAP_FLAG_DISCARD_PAGES: i32 = 0x40000;

#[derive(KernelType)]
#[kernel("swap_info_struct")]
struct SwapInfo {
    flags: u64,
    prio: i16,
    max: u32,
    #[kernel(address)]
    swap_extent_root: u64,
    bdev: u64,
    swap_file: u64,
    /// Bitmap of slots whose pages were all zeroes, and were not written (since 6.12).
    #[kernel(optional)]
    zeromap: Option<u64>,
}

#[derive(KernelType)]
#[kernel("swap_extent")]
struct Extent {
    #[kernel(address)]
    #[allow(dead_code, reason = "for container_of")]
    rb_node: u64,
    start_page: u64,
    nr_pages: u64,
    start_block: u64,
}

#[derive(KernelType)]
#[kernel("block_device")]
struct BlockDevice {
    bd_dev: u32,
    bd_disk: u64,
}

/// Until 6.7, when trees of the kernel's own became xarrays.
#[derive(KernelType)]
#[kernel("zswap_entry")]
struct ZswapEntry {
    #[kernel(address)]
    #[allow(dead_code, reason = "for container_of")]
    rbnode: u64,
    offset: u64,
}

/// Where the page of a swap slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// In this frame: of memory (the swap cache), or the one that stands for the slot itself.
    Frame(u64),
    /// It is all zeroes.
    Zero,
    /// Nowhere where it could be had; the text goes on a sentence that begins with pages.
    Lost(&'static str),
}

/// What is known of the swap areas.
#[derive(Default)]
pub(crate) struct Swap {
    areas: BTreeMap<u32, Contents>,
    described: Vec<SwapArea>,
}

/// An area, and those of its slots whose pages are elsewhere.
#[derive(Default)]
struct Contents {
    slots: u32,
    zeroes: Vec<u8>,
    cached: HashMap<u32, Slot>,
    compressed: HashSet<u32>,
    /// If it is in compressed memory, those that are to be found there.
    stored: Option<HashSet<u32>>,
}

impl Contents {
    fn slot(&self, index: u32, slot: u32) -> Slot {
        let is_zero = || self.zeroes.get(slot as usize / 8).is_some_and(|byte| byte >> (slot % 8) & 1 != 0);
        if slot == 0 || slot >= self.slots {
            Slot::Lost("are in a swap area behind its end")
        } else if let Some(cached) = self.cached.get(&slot) {
            *cached
        } else if is_zero() {
            Slot::Zero
        } else if self.compressed.contains(&slot) {
            Slot::Lost("were swapped out into compressed memory (zswap)")
        } else if self.stored.as_ref().is_some_and(|stored| !stored.contains(&slot)) {
            Slot::Lost("are not to be found in compressed memory (zram)")
        } else {
            Slot::Frame(SwapArea::frame(index, slot))
        }
    }
}

impl Swap {
    /// One area; the frames of those of its slots that are in the cache, and the slots that are zero.
    #[cfg(test)]
    pub(crate) fn of_area(index: u32, slots: u32, cached: &[(u32, Slot)], zero: &[u32]) -> Self {
        let mut zeroes = vec![0; slots.div_ceil(8) as usize];
        zero.iter().for_each(|slot| zeroes[*slot as usize / 8] |= 1 << (slot % 8));
        let contents =
            Contents { slots, zeroes, cached: cached.iter().copied().collect(), ..Contents::default() };
        Self { areas: [(index, contents)].into(), described: Vec::new() }
    }

    /// Where the page of a slot is.
    pub(crate) fn slot(&self, area: u32, slot: u64) -> Slot {
        match (self.areas.get(&area), u32::try_from(slot)) {
            (Some(contents), Ok(slot)) => contents.slot(area, slot),
            _ => Slot::Lost("are in a swap area that is not there"),
        }
    }
}

impl Autopsy<'_> {
    /// All swap areas, read once.
    pub(crate) fn swap(&self) -> &Swap {
        self.swap.get_or_init(|| {
            let mut swap = Swap::default();
            if let Err(error) = self.read_areas(&mut swap) {
                let text =
                    format!("the swap areas cannot be read, and whoever has pages there is lost: {error}");
                self.find(Severity::Broken, "swap", text);
            }
            swap
        })
    }

    pub(crate) fn swap_areas(&self) -> Vec<SwapArea> {
        self.swap().described.clone()
    }

    /// Where the page of a `swp_entry_t` is, such as files in memory have in the places of swapped-out pages.
    pub(crate) fn swapped_page(&self, entry: u64) -> Slot {
        self.swap().slot((entry >> TYPE_SHIFT) as u32, entry & ((1 << TYPE_SHIFT) - 1))
    }

    fn read_areas(&self, swap: &mut Swap) -> Result<()> {
        // Without CONFIG_SWAP there is none.
        let Some(table) = self.kernel.symbol_opt("swap_info") else { return Ok(()) };
        let max = self.kernel.pte_format().special.max_swapfiles.into();
        let count = self.kernel.read_u32(self.kernel.symbol("nr_swapfiles")?)?.min(max);
        for index in 0..count {
            let addr = self.kernel.read_u64(table + u64::from(index) * 8)?;
            if addr == 0 {
                continue;
            }
            let info: SwapInfo = self.kernel.read(addr)?;
            // While one is being switched off it still has pages, though none are added.
            if info.flags & SWP_USED == 0 || info.swap_file == 0 || info.max == 0 {
                continue;
            }
            match self.area(index, &info) {
                Ok((area, contents)) => {
                    swap.described.push(area);
                    swap.areas.insert(index, contents);
                }
                Err(error) => {
                    let text = format!("swap area {index} cannot be read: {error}");
                    self.find(Severity::Broken, "swap", text);
                }
            }
        }
        Ok(())
    }

    fn area(&self, index: u32, info: &SwapInfo) -> Result<(SwapArea, Contents)> {
        let file: file::File = self.kernel.read(info.swap_file)?;
        let device_of: BlockDevice = self.kernel.read(info.bdev)?;
        let (dev_major, dev_minor) = device(device_of.bd_dev);
        if info.max > MAX_SLOTS {
            return Err(corrupt("swap_info_struct", info.swap_file, format!("has {} slots", info.max)));
        }
        let (mut extents, mut end) = (Vec::new(), 0);
        for node in self.kernel.rb_tree(info.swap_extent_root, MAX_EXTENTS) {
            let extent: Extent = self.kernel.read(self.kernel.container_of::<Extent>(node?, "rb_node")?)?;
            let next = extent.start_page.checked_add(extent.nr_pages);
            let Some(next) = next.filter(|next| extent.start_page == end && *next > end) else {
                return Err(corrupt(
                    "swap_info_struct",
                    info.swap_file,
                    "its extents do not follow each other",
                ));
            };
            end = next;
            extents.push(SwapExtent {
                slot: extent.start_page,
                count: extent.nr_pages,
                block: extent.start_block,
            });
        }
        if end < info.max.into() {
            return Err(corrupt("swap_info_struct", info.swap_file, "its extents end before its slots do"));
        }
        let area = SwapArea {
            index,
            path: self.path(&file.f_path)?.path,
            is_device: info.flags & SWP_BLKDEV != 0,
            dev_major,
            dev_minor,
            slots: info.max,
            extents,
            flags: flags(info),
            zram: self.zram_of(&device_of)?,
            unsupported: self.area_obstacle(info)?,
        };
        let zeroes = match info.zeromap {
            Some(map) if map != 0 => self.kernel.read_bytes(map, (info.max as usize).div_ceil(8))?,
            _ => Vec::new(),
        };
        let stored = area.zram.as_ref().map(|zram| zram.slots.keys().copied().collect());
        let contents = Contents {
            slots: info.max,
            zeroes,
            stored,
            cached: self.swap_cache(index, info.max)?,
            compressed: self.zswap(index)?,
        };
        Ok((area, contents))
    }

    /// Why an area's slots are not on a disk that the crash kernel could read.
    fn area_obstacle(&self, info: &SwapInfo) -> Result<Option<String>> {
        let is_remote = info.flags & SWP_FS_OPS != 0;
        Ok(is_remote.then(|| "its file system is one of the network: not read by this version".into()))
    }

    /// What is in an area that is compressed memory.
    fn zram_of(&self, device: &BlockDevice) -> Result<Option<Zram>> {
        let name = device.bd_disk.wrapping_add(self.kernel.offset_of("gendisk", "disk_name")?);
        let is_compressed = self.kernel.read_cstr(name, DISK_NAME_LEN)?.starts_with(b"zram");
        is_compressed.then(|| self.zram(device.bd_disk)).transpose()
    }

    /// The slots of an area whose pages are in memory as well, up to date; and in which frames.
    fn swap_cache(&self, index: u32, slots: u32) -> Result<HashMap<u32, Slot>> {
        let table = self.kernel.symbol("swapper_spaces")?;
        let first = self.kernel.read_u64(table + u64::from(index) * 8)?;
        let size = self.kernel.size_of("address_space")?;
        let pages = self.kernel.offset_of("address_space", "i_pages")?;
        let private = self.kernel.offset_of("page", "private")?;
        let frames = self.frames()?;
        let (mut found, mut strange) = (HashMap::new(), 0u64);
        for number in 0..u64::from(slots).div_ceil(1 << CACHE_SHIFT) {
            let space = first.wrapping_add(number * size).wrapping_add(pages);
            self.kernel.xarray_for_each(space, MAX_PAGES, |at, entry| {
                // What is left of evicted ones is a value.
                let Some(folio) = entry.pointer() else { return Ok(()) };
                let own = self.kernel.read_u64(folio.wrapping_add(private))?;
                for at in at..=entry.last.min(at.saturating_add(MAX_FOLIO)) {
                    match self.cached(frames, folio, own, at) {
                        Some((area, slot, page)) if area == index => {
                            found.extend(page.map(|page| (slot, page)))
                        }
                        _ => strange += 1,
                    }
                }
                Ok(())
            })?;
        }
        if strange > 0 {
            let text = format!("{strange} pages of the swap cache are not of the area whose cache it is");
            self.find(Severity::Doubt, "swap", text);
        }
        Ok(found)
    }

    /// The area and slot of what a swap cache has at an index and, if it is up to date, the page. A folio bears the entry of its first page. The
    /// index is the slot, without its upper bits since 6.11.
    fn cached(&self, frames: &Frames<'_>, folio: u64, own: u64, at: u64) -> Option<(u32, u32, Option<Slot>)> {
        let part = at.wrapping_sub(own) & ((1 << CACHE_SHIFT) - 1);
        if part >= MAX_FOLIO {
            return None;
        }
        let slot = u32::try_from((own & ((1 << TYPE_SHIFT) - 1)) + part).ok()?;
        let pfn = self.kernel.page_to_pfn(folio).ok()? + part;
        let frame = frames.get(pfn).ok()?;
        // Until it is read in, the slot has it.
        let page = match frame.poisoned {
            true => Some(Slot::Lost("lost to a hardware error")),
            false => frame.uptodate.then_some(Slot::Frame(pfn)),
        };
        Some(((own >> TYPE_SHIFT) as u32, slot, page))
    }

    /// The slots of an area whose pages zswap has.
    fn zswap(&self, index: u32) -> Result<HashSet<u32>> {
        let Some(trees) = self.kernel.symbol_opt("zswap_trees") else { return Ok(HashSet::new()) };
        let tree = self.kernel.read_u64(trees + u64::from(index) * 8)?;
        let mut found = HashSet::new();
        if tree == 0 {
            return Ok(found);
        }
        let Some(counts) = self.kernel.symbol_opt("nr_zswap_trees") else {
            let root = tree.wrapping_add(self.kernel.offset_of("zswap_tree", "rbroot")?);
            for node in self.kernel.rb_tree(root, MAX_PAGES) {
                let entry = self.kernel.container_of::<ZswapEntry>(node?, "rbnode")?;
                found.extend(u32::try_from(self.kernel.read::<ZswapEntry>(entry)?.offset));
            }
            return Ok(found);
        };
        let count =
            u64::from(self.kernel.read_u32(counts + u64::from(index) * 4)?).min(1 << (32 - CACHE_SHIFT));
        let size = self.kernel.size_of("xarray")?;
        for number in 0..count {
            self.kernel.xarray_for_each(tree.wrapping_add(number * size), MAX_PAGES, |at, _| {
                found.extend(u32::try_from(at));
                Ok(())
            })?;
        }
        Ok(found)
    }
}

/// The flags with which swapon(2) makes the area what it was. Priorities below zero are the kernel's own choice.
fn flags(info: &SwapInfo) -> i32 {
    let mut flags =
        if info.prio < 0 { 0 } else { SWAP_FLAG_PREFER | i32::from(info.prio) & SWAP_FLAG_PRIO_MASK };
    if info.flags & SWP_DISCARDABLE != 0 {
        flags |= SWAP_FLAG_DISCARD;
        match (info.flags & SWP_AREA_DISCARD != 0, info.flags & SWP_PAGE_DISCARD != 0) {
            (true, false) => flags |= SWAP_FLAG_DISCARD_ONCE,
            (false, true) => flags |= SWAP_FLAG_DISCARD_PAGES,
            _ => {}
        }
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_looked_for_where_its_page_is_newest() {
        let contents = Contents {
            slots: 100,
            zeroes: vec![0, 0b1000_0010],
            cached: [(9, Slot::Frame(0x777))].into(),
            stored: None,
            compressed: [10, 15].into(),
        };
        assert_eq!(contents.slot(1, 9), Slot::Frame(0x777), "in the cache, zero when it was last written");
        assert_eq!(contents.slot(1, 15), Slot::Zero);
        assert!(matches!(contents.slot(1, 10), Slot::Lost(why) if why.contains("zswap")));
        assert_eq!(contents.slot(1, 99), Slot::Frame(SwapArea::frame(1, 99)));
        assert!(matches!(contents.slot(1, 100), Slot::Lost(_)), "behind the end");
        assert!(matches!(contents.slot(1, 0), Slot::Lost(_)), "the header is no page");
        let swap = Swap { areas: [(1, contents)].into(), described: Vec::new() };
        assert_eq!(swap.slot(1, 99), Slot::Frame(SwapArea::frame(1, 99)));
        assert!(matches!(swap.slot(2, 99), Slot::Lost(_)));
        assert!(matches!(swap.slot(1, 1 << 32 | 99), Slot::Lost(_)));
    }

    /// A page of the swap cache knows its entry; the index has the lower bits only, or all.
    #[test]
    fn the_swap_cache_is_believed_where_its_pages_say_the_same() {
        use ktypes::Kernel;
        use synth::{PTR, Record, Synth, XaItem, array, named};

        for bits in [u64::MAX, (1 << CACHE_SHIFT) - 1] {
            let mut synth = Synth::new();
            synth.structure(
                "address_space",
                Record::new().field("host", PTR).field("i_pages", named("xarray")),
            );
            synth.structure("spaces", Record::new().field("each", array(named("address_space"), 2)));
            synth.structure("table", Record::new().field("each", array(PTR, 27)));
            let table = synth.variable("swapper_spaces", "table");
            let spaces = synth.alloc("spaces");
            synth.write_u64(table + 8, spaces);
            let second = spaces + synth.size_of("address_space");
            let page = |synth: &mut Synth, slot: u64, area: u64, uptodate: bool| {
                let phys = synth.alloc_phys(4096, 4096);
                let page = synth.page_of(phys);
                let flag = if uptodate { 1u64 << 3 } else { 0 };
                synth
                    .set("page", page, "private", area << TYPE_SHIFT | slot)
                    .set("page", page, "flags", flag);
                (phys / 4096, page)
            };
            let base = 1 << CACHE_SHIFT;
            let (frame, good) = page(&mut synth, base + 5, 1, true);
            let (_, coming) = page(&mut synth, base + 6, 1, false);
            let (_, foreign) = page(&mut synth, base + 7, 3, true);
            let (_, elsewhere) = page(&mut synth, base + 900, 1, true);
            let at =
                |slot: u64, page| XaItem { index: (base + slot) & bits, order: 0, entry: page, marks: 0 };
            let items = [at(5, good), at(6, coming), at(7, foreign), at(8, elsewhere)];
            let i_pages = synth.address_of("address_space", second, "i_pages");
            synth.xarray(i_pages, &items);
            let kernel = Kernel::open(synth.build()).unwrap();
            let autopsy = Autopsy::new(&kernel);
            let cached = autopsy.swap_cache(1, 2 << CACHE_SHIFT).unwrap();
            assert_eq!(cached, [(base as u32 + 5, Slot::Frame(frame))].into());
            let said: Vec<String> = autopsy.findings().into_iter().map(|finding| finding.text).collect();
            assert!(matches!(said.as_slice(), [one] if one.starts_with("2 pages")), "{said:?}");
        }
    }

    #[test]
    fn swapon_is_told_what_it_was_told_before() {
        let info = |flags, prio| SwapInfo {
            flags,
            prio,
            max: 1,
            swap_extent_root: 0,
            bdev: 0,
            swap_file: 0,
            zeromap: None,
        };
        assert_eq!(flags(&info(SWP_USED, -2)), 0, "the kernel had chosen the priority");
        assert_eq!(flags(&info(SWP_USED, 5)), 0x8005);
        assert_eq!(flags(&info(SWP_DISCARDABLE | SWP_AREA_DISCARD | SWP_PAGE_DISCARD, -2)), 0x10000);
        assert_eq!(flags(&info(SWP_DISCARDABLE | SWP_PAGE_DISCARD, 0)), 0x58000);
    }
}
