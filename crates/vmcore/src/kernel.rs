//! The dead kernel's virtual addresses.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::paging::{PAGE_SIZE, PageTables};
use crate::{Error, PhysMap, Result, Vmcore};

/// Where the kernel's image is mapped (`__START_KERNEL_map`): address x of the image lies at
/// physical x - this + phys_base.
pub const KERNEL_TEXT_START: u64 = 0xffff_ffff_8000_0000;

/// A kernel of that many bytes of RAM is read once and no more, even if all of it were the smallest
/// structures there are. Machines stay below a hundredth of it; damage that makes walks meet the
/// same memory again and again, each within its own limit, ends here.
const BYTES_PER_READ: u64 = 16;
/// For machines with next to no memory: symbols and types have to be read in any case.
const FREE_READS: u64 = 1 << 20;

/// How many translations of the vmalloc and vmemmap areas are remembered.
const CACHED_TRANSLATIONS: usize = 256;

/// A core seen through the dead kernel's own address space.
///
/// Three ways lead to a physical address, the quick ones first: the kernel's image (linear, by
/// `phys_base`), the direct map of all RAM (linear, once its base is known), and everything else
/// (vmalloc, modules, vmemmap, vmapped stacks) through `init_top_pgt`.
pub struct KernelMemory {
    core: Vmcore,
    image: std::ops::Range<u64>,
    phys_base: u64,
    direct_map: std::ops::Range<u64>,
    root_phys: u64,
    levels: u8,
    encryption_mask: u64,
    /// (virtual page, physical page), by the virtual page's number. The memory is dead, so an
    /// entry never goes stale.
    translations: Box<[Mutex<(u64, u64)>]>,
    /// How much has been read, and how much may be; in reads of up to 64 bytes.
    work: AtomicU64,
    most_work: u64,
}

impl KernelMemory {
    /// Takes what it needs from vmcoreinfo. The direct map's base is not in there: until
    /// [`set_direct_map`](Self::set_direct_map), its addresses are found through page tables.
    pub fn new(core: Vmcore) -> Result<KernelMemory> {
        let info = core.info();
        let phys_base = info.number("phys_base")? as u64;
        let size = info.number("KERNEL_IMAGE_SIZE").unwrap_or(512 << 20) as u64;
        let levels = if info.number("pgtable_l5_enabled").unwrap_or(0) != 0 { 5 } else { 4 };
        let encryption_mask = info.number("sme_mask").unwrap_or(0) as u64;
        let top = info.symbol("init_top_pgt").or_else(|_| info.symbol("swapper_pg_dir"))?;
        let root_phys = top.wrapping_sub(KERNEL_TEXT_START).wrapping_add(phys_base);
        let ram: u64 = core.ranges().iter().map(|range| range.len).sum();
        Ok(KernelMemory {
            core,
            image: KERNEL_TEXT_START..KERNEL_TEXT_START.saturating_add(size.min(1 << 30)),
            phys_base,
            direct_map: 0..0,
            root_phys,
            levels,
            encryption_mask,
            translations: (0..CACHED_TRANSLATIONS).map(|_| Mutex::new((u64::MAX, 0))).collect(),
            work: AtomicU64::new(0),
            most_work: ram / BYTES_PER_READ + FREE_READS,
        })
    }

    /// Tells where the direct map of all RAM lies: from the variable `page_offset_base` up to
    /// anything below `vmalloc_base`.
    pub fn set_direct_map(&mut self, direct_map: std::ops::Range<u64>) {
        self.direct_map = direct_map;
    }

    /// Tells where the image really begins and ends (`_text` and `_end`), so that addresses in its
    /// mapping's unused rest are not taken for memory.
    pub fn set_image(&mut self, image: std::ops::Range<u64>) {
        self.image = image.start.max(KERNEL_TEXT_START)..image.end;
    }

    /// The core behind it.
    pub fn core(&self) -> &Vmcore {
        &self.core
    }

    /// 4 or 5: levels of all page tables of that machine.
    pub fn levels(&self) -> u8 {
        self.levels
    }

    /// AMD's memory encryption bit in page tables; 0 without it.
    pub fn encryption_mask(&self) -> u64 {
        self.encryption_mask
    }

    /// The kernel's own page tables.
    pub fn kernel_tables(&self) -> PageTables<'_> {
        self.tables_at(self.root_phys)
    }

    /// Page tables of this machine whose top table lies at a physical address.
    pub fn tables_at(&self, root_phys: u64) -> PageTables<'_> {
        PageTables::new(&self.core, root_phys, self.levels, self.encryption_mask)
    }

    /// The physical address behind a kernel virtual address.
    ///
    /// # Errors
    /// [`Error::NotMapped`] with the reason. The result of the linear mappings may still lie
    /// outside of the core.
    pub fn translate(&self, va: u64) -> Result<u64> {
        self.extent(va).map(|(phys, _)| phys)
    }

    /// The direct map's address of a physical address.
    pub fn direct_map_of(&self, phys: u64) -> u64 {
        self.direct_map.start.wrapping_add(phys)
    }

    /// Where the direct map begins; 0 if not known.
    pub fn page_offset(&self) -> u64 {
        self.direct_map.start
    }

    /// The physical address, and how many bytes from there on are surely linear.
    fn extent(&self, va: u64) -> Result<(u64, u64)> {
        if self.direct_map.contains(&va) {
            return Ok((va - self.direct_map.start, self.direct_map.end - va));
        }
        if self.image.contains(&va) {
            let phys = (va - KERNEL_TEXT_START).wrapping_add(self.phys_base);
            return Ok((phys, self.image.end - va));
        }
        let (page, skip) = (va & !(PAGE_SIZE - 1), va & (PAGE_SIZE - 1));
        let slot = &self.translations[(page / PAGE_SIZE) as usize % CACHED_TRANSLATIONS];
        let known = *slot.lock().unwrap_or_else(PoisonError::into_inner);
        let phys = if known.0 == page {
            known.1
        } else {
            let phys = self.kernel_tables().translate(page).map_err(|error| match error {
                Error::NotMapped { why, .. } => Error::NotMapped { va, why },
                other => other,
            })?;
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = (page, phys);
            phys
        };
        Ok((phys + skip, PAGE_SIZE - skip))
    }

    /// Whether so much has been read that nothing more is: see [`Error::Exhausted`].
    pub fn is_exhausted(&self) -> bool {
        self.work.load(Ordering::Relaxed) > self.most_work
    }

    /// Fills `buf` from a kernel virtual address on, across pages.
    ///
    /// # Errors
    /// [`Error::NotMapped`], [`Error::NotInCore`] and the like; [`Error::Exhausted`] once more has
    /// been read than any kernel with this much memory is worth.
    pub fn read_virt(&self, va: u64, buf: &mut [u8]) -> Result<()> {
        let total = buf.len();
        let work = self.work.fetch_add(1 + total as u64 / 64, Ordering::Relaxed);
        if work > self.most_work {
            return Err(Error::Exhausted { most: self.most_work });
        }
        let mut done = 0;
        while done < total {
            let at = va.checked_add(done as u64).ok_or(Error::Overflow { addr: va, len: total })?;
            let (phys, linear) = self.extent(at)?;
            let n = linear.min((total - done) as u64) as usize;
            self.core.read_phys(phys, &mut buf[done..done + n])?;
            done += n;
        }
        Ok(())
    }

    /// The bytes themselves, if they are physically contiguous.
    ///
    /// # Errors
    /// [`Error::NotMapped`], [`Error::NotInCore`]; also when the range is not contiguous, so that
    /// callers should fall back to [`read_virt`](Self::read_virt).
    pub fn map_virt(&self, va: u64, len: usize) -> Result<PhysMap<'_>> {
        let (phys, linear) = self.extent(va)?;
        if (len as u64) > linear {
            return Err(Error::Overflow { addr: va, len });
        }
        self.core.map_phys(phys, len)
    }
}

impl std::fmt::Debug for KernelMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelMemory")
            .field("core", &self.core)
            .field("image", &format_args!("{:#x?}", self.image))
            .field("phys_base", &format_args!("{:#x}", self.phys_base))
            .field("direct_map", &format_args!("{:#x?}", self.direct_map))
            .field("levels", &self.levels)
            .finish_non_exhaustive()
    }
}
