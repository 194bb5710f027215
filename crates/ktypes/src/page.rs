//! `struct page` and what it says about a piece of memory (include/linux/mm_types.h, mm/slab.h).

use vmcore::PAGE_SHIFT;

use crate::{Error, Kernel, Result};

/// A slab object that an address lies in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlabObject {
    /// The `kmem_cache`.
    pub cache: u64,
    /// The cache's name, as in `/proc/slabinfo`. Caches of the same size and flags may be merged:
    /// the name is then that of the first of them. Those with a constructor, with
    /// SLAB_TYPESAFE_BY_RCU or SLAB_ACCOUNT apart from those without, and those with a usercopy
    /// region (`task_struct`, `mm_struct`, `signal_cache`) are not merged.
    pub cache_name: String,
    /// Where the object begins.
    pub object_start: u64,
    /// Its size, without padding and debugging data.
    pub object_size: u64,
}

impl SlabObject {
    /// Whether an address is the object's beginning.
    pub fn starts_at(&self, addr: u64) -> bool {
        self.object_start == addr
    }
}

impl Kernel {
    /// The address of the `struct page` of a page frame.
    pub fn pfn_to_page(&self, pfn: u64) -> u64 {
        self.vmemmap.wrapping_add(pfn.wrapping_mul(self.struct_page_size))
    }

    /// The page frame that a `struct page` stands for.
    ///
    /// # Errors
    /// [`Error::Implausible`] if the address is not that of a `struct page`, or of one beyond the
    /// end of memory.
    pub fn page_to_pfn(&self, page: u64) -> Result<u64> {
        let offset = page.wrapping_sub(self.vmemmap);
        let pfn = offset / self.struct_page_size;
        let end = self.vmcore().ranges().last().map_or(0, |range| range.end());
        // Device memory and the crash kernel's own have struct pages too, so only the end counts.
        let most = end.max(1 << 36) >> PAGE_SHIFT;
        if !offset.is_multiple_of(self.struct_page_size) || pfn > most {
            return Err(Error::Implausible { what: "the address of a page".into(), value: page });
        }
        Ok(pfn)
    }

    /// The head page of a compound page; the page itself if it is not a tail page.
    pub fn compound_head(&self, page: u64) -> Result<u64> {
        let link = self.read::<PageLink>(page)?.compound_head;
        if link & 1 == 0 {
            return Ok(page);
        }
        let head = link - 1;
        self.page_to_pfn(head)?;
        Ok(head)
    }

    /// Whether a page frame is marked as a page table; all those of the two lowest levels are (pgtable_pte_page_ctor(), pgtable_pmd_page_ctor();
    /// include/linux/mm.h, 6.1 and 6.12). `None` if it is not known how this kernel does that.
    ///
    /// # Errors
    /// If the frame has no `struct page`.
    pub fn is_page_table(&self, pfn: u64) -> Result<Option<bool>> {
        let Some(tables) = self.table_type.get_or_init(|| PageType::of_tables(self)) else { return Ok(None) };
        let at = self.pfn_to_page(pfn).wrapping_add(self.offset_of("page", "page_type")?);
        Ok(Some(self.read_u32(at)? & tables.mask == tables.value))
    }

    /// The slab object that an address of the direct map lies in: `None` if that page is no slab,
    /// if the address lies in padding, or if anything on the way cannot be read.
    ///
    /// Use it to find out whether a pointer can be what it says: a `task_struct` lies at the
    /// beginning of an object of the cache `task_struct`. Whether the object is in use is not
    /// looked at. Objects in KFENCE's pool are not recognised.
    ///
    /// SLUB only, 6.1 to 6.12 (mm/slub.c); SLAB and SLOB lack the members it needs.
    pub fn slab_cache_of(&self, addr: u64) -> Option<SlabObject> {
        let phys = self.virt_to_phys(addr).ok()?;
        // Slabs are used through the direct map only.
        if self.memory().direct_map_of(phys) != addr {
            return None;
        }
        let shape = self.slab.get_or_init(|| SlabShape::of(self)).as_ref()?;
        let page = self.compound_head(self.pfn_to_page(phys >> PAGE_SHIFT)).ok()?;
        let marker = self.read_u64(page.wrapping_add(shape.marker)).ok()?;
        if marker >> shape.shift & shape.mask != shape.value {
            return None;
        }
        let slab: Slab = self.read(page).ok()?;
        let cache: KmemCache = self.read(slab.slab_cache).ok()?;
        let (size, object_size) = (u64::from(cache.size), u64::from(cache.object_size));
        let pad = u64::from(cache.red_left_pad.unwrap_or(0));
        if object_size == 0 || pad.checked_add(object_size)? > size {
            return None;
        }
        let start = self.memory().direct_map_of(self.page_to_pfn(page).ok()? << PAGE_SHIFT);
        let index = addr.checked_sub(start)? / size;
        let object_start = start + index * size + pad;
        let inside = addr >= object_start && addr - object_start < object_size;
        if index >= slab.objects.into() || !inside {
            return None;
        }
        let name = self.read_cstr(cache.name, 128).ok()?;
        Some(SlabObject {
            cache: slab.slab_cache,
            cache_name: String::from_utf8_lossy(&name).into_owned(),
            object_start,
            object_size,
        })
    }
}

/// The type that a page of a kind has in `page_type`: `u32 & mask == value`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageType {
    mask: u32,
    value: u32,
}

impl PageType {
    /// Page tables: a number in the upper byte since 6.11; until 6.9 a bit that is cleared, below others that are set (PAGE_TYPE_BASE and
    /// PG_table, which are macros). 6.10 had another bit.
    fn of_tables(kernel: &Kernel) -> Option<PageType> {
        const BASE: u32 = 0xf000_0000;
        const PG_TABLE: u32 = 0x200;
        if let Ok(kind) = kernel.enum_value_in("pagetype", "PGTY_table") {
            return Some(PageType { mask: 0xff << 24, value: (kind as u32) << 24 });
        }
        kernel.enum_value_in("pageflags", "PG_slab").ok()?;
        Some(PageType { mask: BASE | PG_TABLE, value: BASE })
    }
}

/// How a slab's head page is told from others: `u64 at marker >> shift & mask == value`.
#[derive(Debug)]
pub(crate) struct SlabShape {
    marker: u64,
    shift: u32,
    mask: u64,
    value: u64,
}

impl SlabShape {
    /// A page type in the upper byte of a u32 since 6.11, a page flag until 6.9. (6.10 had a page
    /// type of another form, and neither of these names.)
    fn of(kernel: &Kernel) -> Option<SlabShape> {
        if let Ok(kind) = kernel.enum_value_in("pagetype", "PGTY_slab") {
            let marker = kernel.offset_of("page", "page_type").ok()?;
            return Some(SlabShape { marker, shift: 24, mask: 0xff, value: kind as u64 });
        }
        let bit = kernel.enum_value_in("pageflags", "PG_slab").ok()?;
        let marker = kernel.offset_of("page", "flags").ok()?;
        Some(SlabShape { marker, shift: bit as u32 & 63, mask: 1, value: 1 })
    }
}

/// The part of `struct page` that a slab uses for itself.
#[derive(crate::KernelType)]
#[kernel("slab")]
struct Slab {
    slab_cache: u64,
    /// How many objects the slab has room for.
    objects: u16,
}

#[derive(crate::KernelType)]
#[kernel("kmem_cache")]
struct KmemCache {
    /// Bytes from one object to the next.
    size: u32,
    object_size: u32,
    name: u64,
    /// Bytes in front of the object, for red zones (CONFIG_SLUB_DEBUG).
    #[kernel(optional)]
    red_left_pad: Option<u32>,
}

#[derive(crate::KernelType)]
#[kernel("page")]
struct PageLink {
    compound_head: u64,
}
