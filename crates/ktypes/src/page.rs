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
        if offset % self.struct_page_size != 0 || pfn > most {
            return Err(Error::Implausible { what: "the address of a page".into(), value: page });
        }
        Ok(pfn)
    }

    /// The head page of a compound page; the page itself if it is not a tail page.
    pub fn compound_head(&self, page: u64) -> Result<u64> {
        let link = self.read_u64(page.wrapping_add(self.offset_of("page", "compound_head")?))?;
        if link & 1 == 0 {
            return Ok(page);
        }
        let head = link - 1;
        self.page_to_pfn(head)?;
        Ok(head)
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
        let page = self.compound_head(self.pfn_to_page(phys >> PAGE_SHIFT)).ok()?;
        if !self.is_slab(page).ok()? {
            return None;
        }
        let member = |path: &str| self.offset_of("slab", path).ok();
        let cache = self.read_u64(page.wrapping_add(member("slab_cache")?)).ok()?;
        let cache: KmemCache = self.read(cache).map(|c: KmemCacheFields| c.at(cache)).ok()?;
        let size = u64::from(cache.fields.size);
        let object_size = u64::from(cache.fields.object_size);
        let pad = u64::from(cache.fields.red_left_pad.unwrap_or(0));
        if size == 0 || object_size == 0 || pad.checked_add(object_size)? > size {
            return None;
        }
        // Number of objects, from the counters: inuse 16 bits, objects 15, frozen 1.
        let objects = self.member("slab", "objects").ok()?;
        let word = self.read_u64(page.wrapping_add(member("counters")?)).ok()?;
        let (first_bit, bits) = objects.bits?;
        let skip = (objects.offset.checked_sub(member("counters")?)?) * 8 + u64::from(first_bit);
        let objects = word.checked_shr(skip as u32)? & ((1 << bits) - 1);

        let start = self.memory().direct_map_of(self.page_to_pfn(page).ok()? << PAGE_SHIFT);
        let index = addr.checked_sub(start)? / size;
        let object_start = start + index * size + pad;
        if index >= objects || addr < object_start || addr - object_start >= object_size {
            return None;
        }
        let name = self.read_cstr(cache.fields.name, 128).ok()?;
        Some(SlabObject {
            cache: cache.addr,
            cache_name: String::from_utf8_lossy(&name).into_owned(),
            object_start,
            object_size,
        })
    }

    /// Whether a head page belongs to the slab allocator.
    fn is_slab(&self, page: u64) -> Result<bool> {
        // A page type in the upper byte since 6.11, a page flag until 6.9. (6.10 had a page type
        // of another form, and neither of these names.)
        if let Ok(kind) = self.enum_value_in("pagetype", "PGTY_slab") {
            let at = page.wrapping_add(self.offset_of("page", "page_type")?);
            return Ok(i64::from(self.read_u32(at)? >> 24) == kind);
        }
        let bit = self.enum_value_in("pageflags", "PG_slab")?;
        let flags = self.read_u64(page.wrapping_add(self.offset_of("page", "flags")?))?;
        Ok(flags.checked_shr(bit as u32).is_some_and(|flags| flags & 1 != 0))
    }
}

#[derive(crate::KernelType)]
#[kernel("kmem_cache")]
struct KmemCacheFields {
    /// Bytes from one object to the next.
    size: u32,
    object_size: u32,
    name: u64,
    /// Bytes in front of the object, for red zones (CONFIG_SLUB_DEBUG).
    #[kernel(optional)]
    red_left_pad: Option<u32>,
}

struct KmemCache {
    addr: u64,
    fields: KmemCacheFields,
}

impl KmemCacheFields {
    fn at(self, addr: u64) -> KmemCache {
        KmemCache { addr, fields: self }
    }
}
