//! Page tables of x86-64: walking them, and what their entries mean.
//!
//! Tables of four and five levels, leaves of 4 KiB, 2 MiB and 1 GiB. What Linux puts into entries
//! that the CPU ignores is decoded here and nowhere else (arch/x86/include/asm/pgtable.h,
//! pgtable_64.h, pgtable-invert.h; include/linux/swap.h, swapops.h; 6.1 to 6.12).

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use crate::{Error, NotMapped, PhysicalMemory, Result};

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a page, and of a page table.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

const ENTRIES: usize = 512;
/// Damaged entries that are walked around. A wrong one can lead to a page full of such.
const MAX_LOST: usize = 64;
/// Bits of an entry that hold a physical address: the architecture's maximum of 52.
const ADDRESS_BITS: u64 = (1 << 52) - PAGE_SIZE;

// Bits of an entry (arch/x86/include/asm/pgtable_types.h).
const PRESENT: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PSE: u64 = 1 << 7;
/// With PRESENT clear: the PROT_NONE marker (the GLOBAL bit otherwise).
const PROTNONE: u64 = 1 << 8;
const SPECIAL: u64 = 1 << 9;
const NX: u64 = 1 << 63;
// Bits of a swap entry.
const SWP_SOFT_DIRTY: u64 = 1 << 1;
const SWP_UFFD_WP: u64 = 1 << 2;
const SWP_EXCLUSIVE: u64 = 1 << 3;
/// The offset starts above the PROT_NONE bit and ends below the five bits of the type.
const SWP_TYPE_BITS: u32 = 5;
const SWP_OFFSET_SHIFT: u32 = 9 + SWP_TYPE_BITS;

/// How much memory an entry maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB: a PTE.
    Size4K,
    /// 2 MiB: a PMD.
    Size2M,
    /// 1 GiB: a PUD.
    Size1G,
}

impl PageSize {
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            PageSize::Size4K => 1 << 12,
            PageSize::Size2M => 1 << 21,
            PageSize::Size1G => 1 << 30,
        }
    }

    fn of_level(level: u8) -> Option<PageSize> {
        match level {
            1 => Some(PageSize::Size4K),
            2 => Some(PageSize::Size2M),
            3 => Some(PageSize::Size1G),
            _ => None,
        }
    }
}

/// A table of the lowest level, as far as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastTable {
    /// Where it lies.
    pub phys: u64,
    /// How many of its entries for the addresses in question are zero.
    pub empty: usize,
}

/// A table of any level but the highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// 1 is the lowest.
    pub level: u8,
    /// Where it lies.
    pub phys: u64,
    /// The first address that it was asked for.
    pub va: u64,
}

/// A tree of page tables without the entries of its lowest ones.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// In the order of the addresses, upper ones first.
    pub tables: Vec<Table>,
    /// Entries of upper tables that are not zero and lead to no table: huge pages.
    pub huge: Vec<Entry>,
}

/// A leaf entry that is not zero: present, or holding something of Linux's own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The first virtual address that it covers.
    pub va: u64,
    /// How much it covers.
    pub size: PageSize,
    /// The entry itself.
    pub pte: u64,
}

impl Entry {
    /// Whether the CPU would use it.
    pub fn is_present(&self) -> bool {
        self.pte & PRESENT != 0
    }

    /// Whether user mode could write through it (present entries).
    pub fn is_writable(&self) -> bool {
        self.pte & RW != 0
    }

    /// Whether user mode may use it at all (present entries).
    pub fn is_user(&self) -> bool {
        self.pte & USER != 0
    }

    /// Whether the CPU has written through it.
    pub fn is_dirty(&self) -> bool {
        self.is_mapped() && self.pte & DIRTY != 0
    }

    /// Whether the CPU has used it.
    pub fn is_accessed(&self) -> bool {
        self.is_mapped() && self.pte & ACCESSED != 0
    }

    /// Whether the kernel keeps no account of the page (`pte_special`: the zero page, device
    /// memory). Only meaningful for 4 KiB entries.
    pub fn is_special(&self) -> bool {
        self.is_mapped() && self.size == PageSize::Size4K && self.pte & SPECIAL != 0
    }

    /// Whether code may not run from it.
    pub fn is_no_execute(&self) -> bool {
        self.pte & NX != 0
    }

    /// What `pte_present()` / `pmd_present()` of the kernel say: present for the CPU, or a page
    /// kept in place that is shut by PROT_NONE (or, for a huge page, invalid for a moment).
    pub fn is_mapped(&self) -> bool {
        let shut = match self.size {
            PageSize::Size4K => PROTNONE,
            _ => PROTNONE | PSE,
        };
        self.pte & (PRESENT | shut) != 0
    }

    /// The physical address of the page, if [`is_mapped`](Self::is_mapped).
    ///
    /// The page number in an entry that is not present is stored inverted, so that speculation
    /// (L1TF) finds no memory there.
    pub fn phys(&self, format: &PteFormat) -> Option<u64> {
        if !self.is_mapped() {
            return None;
        }
        let pte = if self.is_present() { self.pte } else { !self.pte };
        Some(pte & format.address_mask & !(self.size.bytes() - 1))
    }

    /// What the entry means.
    pub fn kind(&self, format: &PteFormat) -> EntryKind {
        if let Some(phys) = self.phys(format) {
            return match self.is_present() {
                true => EntryKind::Present { phys },
                false => EntryKind::ProtNone { phys },
            };
        }
        let kind = (self.pte >> (64 - SWP_TYPE_BITS)) as u8;
        let offset = !self.pte << SWP_TYPE_BITS >> SWP_OFFSET_SHIFT;
        // Migration entries keep young and dirty above the page number.
        let phys = (offset & ((1 << format.pfn_bits) - 1)) << PAGE_SHIFT;
        let special = &format.special;
        let is = |entry: Option<u8>| entry == Some(kind);
        if kind < special.max_swapfiles {
            EntryKind::Swap { kind, offset }
        } else if is(special.hwpoison) {
            EntryKind::HwPoison { phys }
        } else if is(special.migration) {
            EntryKind::Migration { phys, writable: false, exclusive: false }
        } else if is(special.migration.map(|first| first + 1)) {
            EntryKind::Migration { phys, writable: false, exclusive: true }
        } else if is(special.migration.map(|first| first + 2)) {
            EntryKind::Migration { phys, writable: true, exclusive: true }
        } else if is(special.device) {
            EntryKind::DevicePrivate { phys, writable: true }
        } else if is(special.device.map(|first| first + 1)) {
            EntryKind::DevicePrivate { phys, writable: false }
        } else if is(special.device.map(|first| first + 2)) {
            EntryKind::DeviceExclusive { phys, writable: true }
        } else if is(special.device.map(|first| first + 3)) {
            EntryKind::DeviceExclusive { phys, writable: false }
        } else if is(special.marker) {
            EntryKind::Marker { bits: offset }
        } else if is(special.swapin_error) {
            EntryKind::SwapinError
        } else {
            EntryKind::Unknown { kind, offset }
        }
    }

    /// Soft-dirty bit of an entry that is not mapped.
    pub fn swap_soft_dirty(&self) -> bool {
        !self.is_mapped() && self.pte & SWP_SOFT_DIRTY != 0
    }

    /// Whether a swap entry is write-protected by userfaultfd.
    pub fn swap_uffd_wp(&self) -> bool {
        !self.is_mapped() && self.pte & SWP_UFFD_WP != 0
    }

    /// Whether a swapped-out anonymous page belongs to this process alone.
    pub fn swap_exclusive(&self) -> bool {
        !self.is_mapped() && self.pte & SWP_EXCLUSIVE != 0
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry {{ va: {:#x}, {:?}, pte: {:#x} }}", self.va, self.size, self.pte)
    }
}

/// What an entry means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum EntryKind {
    /// A page that the CPU can use.
    Present {
        /// Its physical address.
        phys: u64,
    },
    /// A page that is there, but shut: PROT_NONE, NUMA balancing, or a huge page in the middle of
    /// a change.
    ProtNone {
        /// Its physical address.
        phys: u64,
    },
    /// A page in swap space.
    Swap {
        /// Index into `swap_info`.
        kind: u8,
        /// Page number within the swap area.
        offset: u64,
    },
    /// A page that was just being moved; until that was done, the page at `phys` is the truth.
    Migration {
        /// Its physical address.
        phys: u64,
        /// Whether it was mapped writable.
        writable: bool,
        /// Whether an anonymous page belongs to this process alone.
        exclusive: bool,
    },
    /// A page in a device's own memory, out of the CPU's reach.
    DevicePrivate {
        /// The address of the device's struct page.
        phys: u64,
        /// Whether it was mapped writable.
        writable: bool,
    },
    /// A page in RAM that a device has for itself for the moment.
    DeviceExclusive {
        /// Its physical address.
        phys: u64,
        /// Whether it was mapped writable.
        writable: bool,
    },
    /// A page lost to a hardware error.
    HwPoison {
        /// Its physical address.
        phys: u64,
    },
    /// No page, but a mark for when one comes (bit 0: write-protected by userfaultfd; bit 1, since
    /// 6.6: poisoned).
    Marker {
        /// The mark's bits.
        bits: u64,
    },
    /// A page whose swap-in failed (before 6.2; a marker since).
    SwapinError,
    /// None of the above: an unknown kernel, or a damaged table.
    Unknown {
        /// The swap type.
        kind: u8,
        /// The swap offset.
        offset: u64,
    },
}

/// Which swap types are not swap areas. They are counted down from 32 (include/linux/swap.h), and
/// how many there are depends on the kernel's configuration and version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialEntries {
    /// Types below are real swap areas (`MAX_SWAPFILES`).
    pub max_swapfiles: u8,
    /// A page lost to a hardware error (CONFIG_MEMORY_FAILURE).
    pub hwpoison: Option<u8>,
    /// First of three: read, read exclusive, write (CONFIG_MIGRATION; since 5.19 with the middle
    /// one).
    pub migration: Option<u8>,
    /// First of four: private write, private read, exclusive write, exclusive read
    /// (CONFIG_DEVICE_PRIVATE).
    pub device: Option<u8>,
    /// A PTE marker (CONFIG_PTE_MARKER; unconditional since 6.3).
    pub marker: Option<u8>,
    /// A failed swap-in (until 6.1).
    pub swapin_error: Option<u8>,
}

impl SpecialEntries {
    /// Lays the types out as the kernel does: hwpoison, migration, device, marker, swapin error,
    /// ending at 31.
    pub fn new(
        hwpoison: bool,
        migration: bool,
        device: bool,
        marker: bool,
        swapin_error: bool,
    ) -> SpecialEntries {
        let counts = [(hwpoison, 1), (migration, 3), (device, 4), (marker, 1), (swapin_error, 1)];
        let total: u8 = counts.iter().filter(|(on, _)| *on).map(|(_, n)| n).sum();
        let max_swapfiles = (1 << SWP_TYPE_BITS) - total;
        let mut next = max_swapfiles;
        let mut take = |(on, n): (bool, u8)| {
            let first = on.then_some(next);
            next += if on { n } else { 0 };
            first
        };
        SpecialEntries {
            max_swapfiles,
            hwpoison: take(counts[0]),
            migration: take(counts[1]),
            device: take(counts[2]),
            marker: take(counts[3]),
            swapin_error: take(counts[4]),
        }
    }
}

/// How entries of this machine are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PteFormat {
    /// Bits that hold the physical address of a page (without AMD's encryption bit).
    pub address_mask: u64,
    /// Bits of a page number in a migration entry (`SWP_PFN_BITS`): 34 with four levels, 40 with
    /// five.
    pub pfn_bits: u32,
    /// The swap types that are not swap areas.
    pub special: SpecialEntries,
}

impl PteFormat {
    /// The format for tables of so many levels, on a machine without memory encryption.
    pub fn new(levels: u8, special: SpecialEntries) -> PteFormat {
        let max_physmem_bits = if levels == 5 { 52 } else { 46 };
        PteFormat { address_mask: ADDRESS_BITS, pfn_bits: max_physmem_bits - PAGE_SHIFT, special }
    }
}

/// A tree of page tables in a dead machine's memory.
#[derive(Clone, Copy)]
pub struct PageTables<'m> {
    memory: &'m dyn PhysicalMemory,
    root_phys: u64,
    levels: u8,
    address_mask: u64,
}

impl<'m> PageTables<'m> {
    /// Tables of 4 or 5 `levels` whose top table lies at `root_phys` (flag bits of a CR3 value are
    /// ignored). `encryption_mask` is the kernel's `sme_mask`, 0 on most machines.
    pub fn new(
        memory: &'m dyn PhysicalMemory,
        root_phys: u64,
        levels: u8,
        encryption_mask: u64,
    ) -> PageTables<'m> {
        let address_mask = ADDRESS_BITS & !encryption_mask;
        PageTables { memory, root_phys: root_phys & address_mask, levels, address_mask }
    }

    /// Where the top table lies.
    pub fn root_phys(&self) -> u64 {
        self.root_phys
    }

    /// 4 or 5.
    pub fn levels(&self) -> u8 {
        self.levels
    }

    /// The physical address behind a virtual one, through entries that are present (for the CPU).
    pub fn translate(&self, va: u64) -> Result<u64> {
        let level = match self.find(va)? {
            Ok(entry) if entry.is_present() => {
                let page = entry.pte & self.address_mask & !(entry.size.bytes() - 1);
                return Ok(page + (va & (entry.size.bytes() - 1)));
            }
            Ok(entry) => entry.size as u8 + 1,
            Err(level) => level,
        };
        Err(Error::NotMapped { va, why: NotMapped::NoEntry { level } })
    }

    /// The leaf entry for an address: `None` if it, or a table above it, is empty.
    pub fn lookup(&self, va: u64) -> Result<Option<Entry>> {
        Ok(self.find(va)?.ok())
    }

    /// The leaf entry for an address, or else the level at which there is nothing.
    fn find(&self, va: u64) -> Result<std::result::Result<Entry, u8>> {
        self.check_canonical(va)?;
        let mut table = self.root_phys;
        let mut level = self.levels;
        loop {
            let mut bytes = [0; 8];
            let index = (va >> shift(level)) & (ENTRIES as u64 - 1);
            self.memory.read_phys(table + index * 8, &mut bytes).map_err(|_| unreadable(va, level, table))?;
            let pte = u64::from_le_bytes(bytes);
            match classify(pte, level) {
                Step::Empty => return Ok(Err(level)),
                Step::Leaf(size) => return Ok(Ok(Entry { va: va & !(size.bytes() - 1), size, pte })),
                Step::Table => table = pte & self.address_mask,
                Step::Bad => return Err(Error::NotMapped { va, why: NotMapped::BadEntry { level, pte } }),
            }
            level -= 1;
        }
    }

    /// Calls `f` for every leaf entry that is not zero and covers part of `range`, in ascending
    /// order. Empty subtrees are skipped as a whole.
    ///
    /// An entry at either end of the range may reach beyond it. Each table is walked once: damaged
    /// tables that point at themselves, or at the same table twice, end as an error.
    pub fn walk(&self, range: Range<u64>, f: &mut dyn FnMut(Entry)) -> Result<()> {
        self.visit(range, 1, f, &mut |_, _| {})
    }

    /// As [`walk`](Self::walk), around what is damaged: `lost` is told of the addresses (of `range`) below each entry or table that is none, with the
    /// reason. `is_table` is asked whether a table can be one.
    ///
    /// # Errors
    /// If the highest table cannot be read, or too much is damaged for this to lead anywhere.
    pub fn walk_around(
        &self,
        range: Range<u64>,
        is_table: &dyn Fn(Table) -> bool,
        f: &mut dyn FnMut(Entry),
        lost: &mut dyn FnMut(Range<u64>, Error),
    ) -> Result<()> {
        let mut count = 0;
        let mut lose = |range, error| {
            count += 1;
            if count > MAX_LOST {
                return Err(error);
            }
            lost(range, error);
            Ok(())
        };
        self.visit_with(range, 1, f, &mut |_, _| {}, is_table, &mut lose)
    }

    /// The tables that cover part of `range`, but for the highest one, whose level is [`levels`](Self::levels). Those of the lowest level are not read.
    pub fn tables(&self, range: Range<u64>) -> Result<Tables> {
        let (mut tables, mut huge) = (Vec::new(), Vec::new());
        let top = self.levels;
        self.visit(range, 2, &mut |entry| huge.push(entry), &mut |table, _| {
            if table.level < top {
                tables.push(table);
            }
        })?;
        Ok(Tables { tables, huge })
    }

    /// The tables of the lowest level that cover part of `range`, in ascending order.
    pub fn last_tables(&self, range: Range<u64>) -> Result<Vec<LastTable>> {
        let mut found = Vec::new();
        self.visit(range, 1, &mut |_| {}, &mut |table, empty| {
            if table.level == 1 {
                found.push(LastTable { phys: table.phys, empty });
            }
        })?;
        Ok(found)
    }

    /// `on_table` is told of each table before those below it, and how many of its entries in the range are zero. Tables below the level
    /// `lowest` are not read: as if all of their entries were.
    fn visit(
        &self,
        range: Range<u64>,
        lowest: u8,
        f: &mut dyn FnMut(Entry),
        on_table: &mut dyn FnMut(Table, usize),
    ) -> Result<()> {
        self.visit_with(range, lowest, f, on_table, &|_| true, &mut |_, error| Err(error))
    }

    fn visit_with(
        &self,
        range: Range<u64>,
        lowest: u8,
        f: &mut dyn FnMut(Entry),
        on_table: &mut dyn FnMut(Table, usize),
        is_table: &dyn Fn(Table) -> bool,
        lose: &mut Lose<'_>,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.check_canonical(range.start)?;
        self.check_canonical(range.end - 1)?;
        let mut walk = Walk { tables: self, lowest, f, on_table, is_table, lose, seen: HashSet::new() };
        walk.table(self.root_phys, self.levels, range.start, range.end - 1)
    }

    fn check_canonical(&self, va: u64) -> Result<()> {
        let unused = 64 - (PAGE_SHIFT + 9 * u32::from(self.levels));
        if ((va << unused) as i64 >> unused) as u64 == va {
            Ok(())
        } else {
            Err(Error::NotMapped { va, why: NotMapped::NonCanonical })
        }
    }
}

impl fmt::Debug for PageTables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageTables {{ root_phys: {:#x}, levels: {} }}", self.root_phys, self.levels)
    }
}

/// Told of addresses that are lost, and why; goes on unless that is an error.
type Lose<'a> = dyn FnMut(Range<u64>, Error) -> Result<()> + 'a;

struct Walk<'a, 'm> {
    tables: &'a PageTables<'m>,
    lowest: u8,
    f: &'a mut dyn FnMut(Entry),
    on_table: &'a mut dyn FnMut(Table, usize),
    is_table: &'a dyn Fn(Table) -> bool,
    lose: &'a mut Lose<'a>,
    /// Tables that were there already. (Two mappings can have a table of huge pages together, but
    /// not one mapping with itself.)
    seen: HashSet<u64>,
}

impl Walk<'_, '_> {
    /// Entries of one table for the addresses `first..=last`, which lie within what it covers.
    fn table(&mut self, table: u64, level: u8, first: u64, last: u64) -> Result<()> {
        if !self.seen.insert(table) {
            return Err(Error::NotMapped { va: first, why: NotMapped::TableTwice { level, table } });
        }
        if level < self.tables.levels && !(self.is_table)(Table { level, phys: table, va: first }) {
            return Err(Error::NotMapped { va: first, why: NotMapped::NoTable { level, table } });
        }
        let shift = shift(level);
        let index = |va: u64| (va >> shift) as usize % ENTRIES;
        let (low, high) = (index(first), index(last));
        let mut bytes = [0; ENTRIES * 8];
        let bytes = &mut bytes[low * 8..(high + 1) * 8];
        if level >= self.lowest {
            self.tables
                .memory
                .read_phys(table + low as u64 * 8, bytes)
                .map_err(|_| unreadable(first, level, table))?;
        }
        let empty = bytes.as_chunks::<8>().0.iter().filter(|entry| **entry == [0; 8]).count();
        (self.on_table)(Table { level, phys: table, va: first }, empty);
        // Where the memory of entry `low` begins.
        let base = first >> shift << shift;
        for (i, pte) in bytes.chunks_exact(8).enumerate() {
            let pte = u64::from_le_bytes(pte.try_into().expect("8 bytes"));
            if pte == 0 {
                continue;
            }
            let va = base + ((i as u64) << shift);
            let (start, end) = (first.max(va), last.min(va | ((1 << shift) - 1)));
            let below = match classify(pte, level) {
                Step::Empty => Ok(()),
                Step::Leaf(size) => {
                    (self.f)(Entry { va, size, pte });
                    Ok(())
                }
                Step::Table => self.table(pte & self.tables.address_mask, level - 1, start, end),
                Step::Bad => Err(Error::NotMapped { va, why: NotMapped::BadEntry { level, pte } }),
            };
            if let Err(error) = below {
                (self.lose)(start..end.saturating_add(1), error)?;
            }
        }
        Ok(())
    }
}

enum Step {
    Empty,
    Leaf(PageSize),
    Table,
    Bad,
}

/// What an entry of a table of some level is.
fn classify(pte: u64, level: u8) -> Step {
    if pte == 0 {
        return Step::Empty;
    }
    let size = PageSize::of_level(level);
    match size {
        Some(PageSize::Size4K) => Step::Leaf(PageSize::Size4K),
        _ if pte & (PRESENT | PSE) == PRESENT => Step::Table,
        // A huge page: present, shut, or (without any of those bits) a migration or swap entry.
        Some(size) => Step::Leaf(size),
        None => Step::Bad,
    }
}

fn shift(level: u8) -> u32 {
    PAGE_SHIFT + 9 * (u32::from(level) - 1)
}

fn unreadable(va: u64, level: u8, table: u64) -> Error {
    Error::NotMapped { va, why: NotMapped::TableUnreadable { level, table } }
}
