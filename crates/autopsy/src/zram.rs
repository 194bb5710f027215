//! Compressed memory that is used as a swap area: `struct zram` (drivers/block/zram/zram_drv.h), and where zsmalloc has its objects (mm/zsmalloc.c);
//! 6.1 and 6.12.
//!
//! A handle is the address of a word that says in which page frame the object begins. The object begins with its handle (if it has not a page for
//! itself), by which it is found there; what does not fit goes on in the next page, to which `page.index` leads.

use ktypes::KernelType;
use snapshot::{Severity, Zram, ZramSlot};
use vmcore::PAGE_SIZE;

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// ZRAM_FLAG_SHIFT: the lower bits of an entry's flags are its size.
const SIZE_BITS: u32 = 13;
/// OBJ_INDEX_BITS with OBJ_TAG_BITS: what an object's word has below the page frame number.
const PFN_SHIFT: u32 = 24;
/// OBJ_ALLOCATED_TAG.
const ALLOCATED: u64 = 1;
/// ZS_HANDLE_SIZE.
const HANDLE_SIZE: u64 = 8;
/// Of 4 TiB.
const MAX_SLOTS: u64 = 1 << 30;
/// CRYPTO_MAX_ALG_NAME.
const MAX_NAME: usize = 128;
/// Entries of the table that are read at a time.
const AT_A_TIME: u64 = 1 << 14;

#[derive(KernelType)]
#[kernel("zram")]
struct ZramStruct {
    table: u64,
    disksize: u64,
}

/// Where the entries of the table have their members.
struct Layout {
    size: u64,
    handle: usize,
    flags: usize,
    flags_size: usize,
    same: u64,
    written_back: u64,
}

impl Autopsy<'_> {
    /// What is in a device. `gendisk`: address of its disk.
    pub(crate) fn zram(&self, gendisk: u64) -> Result<Zram> {
        let kernel = self.kernel;
        let addr = kernel.read_u64(gendisk.wrapping_add(kernel.offset_of("gendisk", "private_data")?))?;
        let zram: ZramStruct = kernel.read(addr)?;
        // One of several since 6.2.
        let name = match kernel.has_member("zram", "compressor") {
            true => addr.wrapping_add(kernel.offset_of("zram", "compressor")?),
            false => kernel.read_u64(addr.wrapping_add(kernel.offset_of("zram", "comp_algs")?))?,
        };
        let algorithm = String::from_utf8_lossy(&kernel.read_cstr(name, MAX_NAME)?).into_owned();
        let count = zram.disksize / PAGE_SIZE;
        if count > MAX_SLOTS {
            return Err(corrupt("zram", addr, format!("has {count} pages")));
        }
        let flags = kernel.member("zram_table_entry", "flags")?;
        // ZRAM_SAME and ZRAM_WB, behind ZRAM_LOCK until entries got a lock of their own (6.12). BTF does not have the enumeration.
        let first_flag = SIZE_BITS + u32::from(!kernel.has_member("zram_table_entry", "lock"));
        let layout = Layout {
            size: kernel.size_of("zram_table_entry")?,
            handle: kernel.offset_of("zram_table_entry", "handle")? as usize,
            flags: flags.offset as usize,
            flags_size: flags.size.min(8) as usize,
            same: 1 << first_flag,
            written_back: 1 << (first_flag + 1),
        };
        let mut all = Zram { algorithm, slots: Default::default() };
        let mut damage = None;
        let mut damaged = 0u64;
        for first in (0..count).step_by(AT_A_TIME as usize) {
            let here = (count - first).min(AT_A_TIME);
            let at = zram.table.wrapping_add(first * layout.size);
            let bytes = kernel.read_bytes(at, (here * layout.size) as usize)?;
            for (n, entry) in (first..).zip(bytes.chunks_exact(layout.size.max(1) as usize)) {
                match self.zram_slot(&layout, entry) {
                    Ok(Some(slot)) => _ = all.slots.insert(n as u32, slot),
                    Ok(None) => {}
                    Err(error) => {
                        damaged += 1;
                        damage.get_or_insert_with(|| error.to_string());
                    }
                }
            }
        }
        if let Some(error) = damage {
            let text = format!("{damaged} pages in compressed memory cannot be found: {error}");
            self.find(Severity::Doubt, "swap", text);
        }
        Ok(all)
    }

    /// What an entry of the table leads to; `None` if that is nothing, or on another device (ZRAM_WB).
    fn zram_slot(&self, layout: &Layout, entry: &[u8]) -> Result<Option<ZramSlot>> {
        let number = |at: usize, size: usize| {
            let mut word = [0; 8];
            let bytes = entry.get(at..at.checked_add(size)?)?;
            word.get_mut(..size)?.copy_from_slice(bytes);
            Some(u64::from_le_bytes(word))
        };
        let short = || corrupt("zram_table_entry", 0, "is too short");
        let handle = number(layout.handle, 8).ok_or_else(short)?;
        let flags = number(layout.flags, layout.flags_size).ok_or_else(short)?;
        if flags & layout.same != 0 {
            return Ok(Some(ZramSlot::Same(handle)));
        }
        let size = flags & ((1 << SIZE_BITS) - 1);
        if handle == 0 || flags & layout.written_back != 0 {
            return Ok(None);
        }
        let pfn = self.kernel.read_u64(handle)? >> PFN_SHIFT;
        let start = pfn.saturating_mul(PAGE_SIZE);
        if size == PAGE_SIZE {
            return Ok(Some(ZramSlot::Stored { addr: start, next: 0, size: size as u16 }));
        }
        let wrong = |what: &str| corrupt("zspage", handle, what);
        let mut page = vec![0; PAGE_SIZE as usize];
        self.kernel.vmcore().read_phys(start, &mut page).map_err(ktypes::Error::from)?;
        let head = (handle | ALLOCATED).to_le_bytes();
        let mut found = page.as_chunks::<8>().0.iter().enumerate().filter(|(_, word)| **word == head);
        let (index, _) = found.next().ok_or_else(|| wrong("is not where its object should be"))?;
        if found.next().is_some() || size == 0 || size > PAGE_SIZE {
            return Err(wrong("cannot be told from others, or has no size"));
        }
        let within = index as u64 * 8 + HANDLE_SIZE;
        let next = match within + size > PAGE_SIZE {
            false => 0,
            true => {
                let page = self.kernel.pfn_to_page(pfn);
                let index = self.kernel.offset_of("page", "index")?;
                let next = self.kernel.page_to_pfn(self.kernel.read_u64(page.wrapping_add(index))?)?;
                next.saturating_mul(PAGE_SIZE)
            }
        };
        Ok(Some(ZramSlot::Stored { addr: start + within, next, size: size as u16 }))
    }
}
