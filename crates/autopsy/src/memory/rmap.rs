//! Pages that damaged page tables no longer show, found again by what the kernel knows of each page: whose it is and at which place there
//! (`page.mapping`, `page.index`), and how often it is mapped (reverse mapping: mm/rmap.c, include/linux/rmap.h; 6.1 and 6.12).
//!
//! Nothing is guessed. A page is taken for one of an address space's only where it can be no other's (all but one of the places in which it is
//! mapped are known) and the place can have no other; and all of it counts only if afterwards the address space has exactly as many pages as
//! the kernel has counted, in memory and in swap. So who was changing entries when the kernel died needs no allowance: what had been taken out, and
//! is still a page of the mapping's, may as well be there; where two pages can be the one, and where a count was ahead, nothing is found. What swap entries were cannot be found out: whoever has lost one does not come back.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use ktypes::KernelType;
use snapshot::{AddressSpaceId, Vma, VmaFlags, VmaKind};
use vmcore::{Entry, EntryKind, NotMapped, PAGE_SHIFT, PAGE_SIZE, PageTables, Table};

use super::counters::{ANON_PAGES, SWAP_ENTRIES};
use super::{Collector, MAX_VMAS, WRITER_LOCKED};
use crate::check::Doubts;
use crate::check::page::{Anonymous, Pages};
use crate::check::user_end;
use crate::error::Result;
use crate::swap::Slot;
use crate::{Autopsy, OrWhyNot};

/// `anon_vma`s that one mapping can have pages of: one for each fork(2) between it and its oldest ancestor.
const MAX_CHAIN: usize = 1 << 16;

#[derive(KernelType)]
#[kernel("mm_struct")]
struct Mm {
    #[kernel(address)]
    mm_mt: u64,
    pgd: u64,
    #[kernel("mmap_lock.count")]
    mmap_lock: u64,
}

#[derive(KernelType)]
#[kernel("vm_area_struct")]
struct Area {
    vm_start: u64,
    vm_end: u64,
    vm_pgoff: u64,
    #[kernel(address)]
    anon_vma_chain: u64,
}

/// Links a mapping to an `anon_vma` that its pages can be of.
#[derive(KernelType)]
#[kernel("anon_vma_chain")]
struct Link {
    vma: u64,
    anon_vma: u64,
}

/// A mapping that has pages of its own.
struct Mapping {
    /// Its place among the address space's.
    number: usize,
    start: u64,
    end: u64,
    pgoff: u64,
    owners: HashSet<u64>,
    /// Entries that are as they must be, by address.
    sound: Vec<Entry>,
    /// What is below entries and tables that are damaged.
    damaged: Vec<Range<u64>>,
    /// Pages that were found again, by address.
    found: BTreeMap<u64, u64>,
    swapped: u64,
    /// The CPU can have used what is damaged.
    misled: bool,
}

/// What was found of an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FoundAgain {
    /// Pages that page tables do not show.
    pub pages: u64,
    /// Damaged entries lead to memory: whoever used them got something else. Where none does, the first use ended in a fault.
    pub misled: bool,
}

/// Pages that may be the ones that are missing, by address.
type Candidates = BTreeMap<u64, Vec<Anonymous>>;

impl Autopsy<'_> {
    /// Looks for the pages of address spaces whose page tables are damaged, and puts them into these. `users`: the tasks that use each. `is_table`
    /// says which tables may be used. Returns how many pages were found for each; or why not all of them can be, and nothing is changed then.
    pub(crate) fn find_pages_again(
        &self,
        users: &[(AddressSpaceId, &[u64])],
        is_table: &dyn Fn(Table) -> bool,
    ) -> BTreeMap<AddressSpaceId, OrWhyNot<FoundAgain>> {
        let mut outcomes = BTreeMap::new();
        let mut spaces = Vec::new();
        for (id, users) in users {
            match self.mappings(*id, is_table) {
                Ok(Ok(mappings)) => spaces.push((*id, *users, mappings)),
                Ok(Err(why)) => _ = outcomes.insert(*id, Err(why)),
                Err(error) => _ = outcomes.insert(*id, Err(error.to_string())),
            }
        }
        let all: Vec<&Mapping> = spaces.iter().flat_map(|(.., mappings)| mappings).collect();
        let (mut candidates, failed) = match self.candidates(&all) {
            Ok(candidates) => (candidates.into_iter(), None),
            Err(error) => (Vec::new().into_iter(), Some(error.to_string())),
        };
        for (id, users, mut mappings) in spaces {
            let candidates: Vec<_> = candidates.by_ref().take(mappings.len()).collect();
            let outcome = match &failed {
                Some(why) => Err(why.clone()),
                None => self
                    .complete(id, users, &mut mappings, &candidates)
                    .unwrap_or_else(|error| Err(error.to_string())),
            };
            outcomes.insert(id, outcome);
        }
        outcomes
    }

    /// Completes an address space with those candidates (for each of its mappings) that can be nothing else.
    fn complete(
        &self,
        id: AddressSpaceId,
        users: &[u64],
        mappings: &mut [Mapping],
        candidates: &[Candidates],
    ) -> Result<OrWhyNot<FoundAgain>> {
        let mapped = self.mapped_elsewhere(id, candidates);
        let mut count = 0;
        for (mapping, candidates) in mappings.iter_mut().zip(candidates) {
            for (&address, pages) in candidates {
                let damaged = mapping.damaged.iter().any(|range| range.contains(&address));
                let mut missing = pages.iter().filter(|page| {
                    let known = mapped.get(&page.pfn).copied().unwrap_or(0);
                    match page.mapped {
                        Some(mapped) => i64::from(mapped) - known == 1,
                        // Of parts of huge pages it is not known how often they are mapped: only where something is missing.
                        None => known == 0 && damaged,
                    }
                });
                match (missing.next(), missing.next()) {
                    (Some(page), None) => {
                        mapping.found.insert(address, page.pfn);
                        count += 1;
                    }
                    (None, _) => {}
                    (Some(_), Some(_)) => {
                        return Ok(Err(format!("more than one page can be the one at {address:x}")));
                    }
                }
            }
        }
        let counters = self.memory_counters(id.0, users.iter().copied())?;
        let [in_memory, swapped] =
            [ANON_PAGES, SWAP_ENTRIES].map(|n| u64::try_from(counters[n]).unwrap_or(0));
        let mut spaces = self.address_spaces.borrow_mut();
        let Some(space) = spaces.get_mut(&id) else { return Ok(Err("its mappings are not known".into())) };
        let mut all = Vec::new();
        let (mut own, mut in_swap) = (0, 0);
        for mapping in &*mappings {
            let Some(vma) = space.vmas.get(mapping.number) else { continue };
            let collected = self.collect(vma, mapping)?;
            own += collected.own;
            in_swap += mapping.swapped;
            if let Some(why) = collected.why_lost {
                return Ok(Err(format!("{} pages {why}", collected.lost)));
            }
            all.push((mapping.number, collected.pages));
        }
        let own = own.saturating_sub(in_swap);
        if (own, in_swap) != (in_memory, swapped) {
            return Ok(Err(format!(
                "with {count} that were found it has {own} pages in memory and {in_swap} in swap, and the kernel counted {in_memory} and {swapped}"
            )));
        }
        for (number, pages) in all {
            if let Some(vma) = space.vmas.get_mut(number) {
                (vma.pages, vma.lost_pages) = (pages, 0);
            }
        }
        Ok(Ok(FoundAgain { pages: count, misled: mappings.iter().any(|mapping| mapping.misled) }))
    }

    /// The mappings of an address space that have pages of their own, with what is sound and what is damaged; or why that cannot be told.
    fn mappings(
        &self,
        id: AddressSpaceId,
        is_table: &dyn Fn(Table) -> bool,
    ) -> Result<OrWhyNot<Vec<Mapping>>> {
        let why_not = |why: &str| Ok(Err(why.to_owned()));
        let mm: Mm = self.kernel.read(id.0)?;
        if mm.mmap_lock & WRITER_LOCKED != 0 {
            return why_not("its mappings were being changed");
        }
        let tables = &self.kernel.page_tables(mm.pgd)?;
        // Tables of what it shares with others count here, too.
        let mut misled = false;
        tables.walk_around(0..user_end(tables.levels()), is_table, &mut |_| {}, &mut |_, error| {
            misled |= self.can_mislead(&error);
        })?;
        let mut addresses = Vec::new();
        self.kernel.maple_for_each(mm.mm_mt, MAX_VMAS, |_, _, vma| {
            addresses.push(vma);
            Ok(())
        })?;
        let spaces = self.address_spaces.borrow();
        let Some(space) = spaces.get(&id).filter(|space| space.vmas.len() == addresses.len()) else {
            return why_not("its mappings are not known");
        };
        let mut mappings = Vec::new();
        for (number, (vma, addr)) in space.vmas.iter().zip(addresses).enumerate() {
            let area: Area = self.kernel.read(addr)?;
            match vma.kind {
                _ if (vma.start, vma.end) != (area.vm_start, area.vm_end) => {
                    return why_not("its mappings are not known");
                }
                VmaKind::Anonymous | VmaKind::File { .. } if !vma.shared => {}
                VmaKind::Unsupported { .. } => return why_not("there is memory that is not known"),
                _ if vma.lost_pages > 0 => return why_not("pages of another kind are missing, too"),
                // Those have no pages of their own, or do not count here.
                _ => continue,
            }
            if vma.flags.contains(VmaFlags::HUGETLB) {
                return why_not("it has huge pages");
            }
            let mut mapping = Mapping {
                number,
                start: vma.start,
                end: vma.end,
                pgoff: area.vm_pgoff,
                owners: self.owners(addr, area.anon_vma_chain)?,
                sound: Vec::new(),
                damaged: Vec::new(),
                found: BTreeMap::new(),
                swapped: 0,
                misled,
            };
            let (mut belonging, mut doubts) = (Default::default(), Doubts::default());
            self.check_belonging(addr, (vma.start, vma.end), false, &mut belonging, &mut doubts)?;
            let pages = self.pages_of(vma.start, area.vm_pgoff, belonging).filter(|_| doubts.is_empty());
            let Some(mut pages) = pages else { return why_not("whose its pages are is in doubt") };
            if let Some(entry) = self.sort_entries(vma, (tables, is_table), &mut mapping, &mut pages)? {
                let what = entry.kind(&self.frames()?.format);
                return Ok(Err(format!("what the entry for {:x} shows cannot be told ({what:?})", entry.va)));
            }
            mappings.push(mapping);
        }
        Ok(Ok(mappings))
    }

    /// The `anon_vma`s that a mapping's pages can be of.
    fn owners(&self, vma: u64, chain: u64) -> Result<HashSet<u64>> {
        let offset = self.kernel.offset_of("anon_vma_chain", "same_vma")?;
        let mut owners = HashSet::new();
        for node in self.kernel.list_head(chain, MAX_CHAIN) {
            let link: Link = self.kernel.read(node?.wrapping_sub(offset))?;
            if link.vma == vma {
                owners.insert(link.anon_vma);
            }
        }
        Ok(owners)
    }

    /// What of a mapping's page tables is sound; an entry that is neither sound nor damaged, if there is one.
    fn sort_entries(
        &self,
        vma: &Vma,
        (tables, is_table): (&PageTables<'_>, &dyn Fn(Table) -> bool),
        mapping: &mut Mapping,
        pages: &mut Pages<'_>,
    ) -> Result<Option<Entry>> {
        let frames = self.frames()?;
        let mut entries = Vec::new();
        let damaged = &mut mapping.damaged;
        tables.walk_around(
            vma.start..vma.end,
            is_table,
            &mut |entry| entries.push(entry),
            &mut |range, _| damaged.push(range),
        )?;
        for entry in entries {
            let from = entry.va.max(vma.start);
            let to = (entry.va + entry.size.bytes()).min(vma.end);
            let (skip, count) = ((from - entry.va) >> PAGE_SHIFT, to.saturating_sub(from) >> PAGE_SHIFT);
            let is_sound = match entry.kind(&frames.format) {
                EntryKind::Present { phys } | EntryKind::ProtNone { phys }
                    if entry.pte & frames.devmap == 0 =>
                {
                    let first = (phys >> PAGE_SHIFT) + skip;
                    let is_sound = |i: u64| {
                        frames.is_zero(first + i) || pages.belongs(from + (i << PAGE_SHIFT), first + i)
                    };
                    (0..count).all(is_sound)
                }
                EntryKind::Swap { kind, offset } => {
                    let there = (0..count)
                        .all(|i| !matches!(self.swap().slot(kind.into(), offset + skip + i), Slot::Lost(_)));
                    mapping.swapped += if there { count } else { 0 };
                    there
                }
                EntryKind::Marker { bits } if bits & !1 == 0 => true,
                EntryKind::Unknown { .. } => false,
                // On its way, or a device's: if there is such a page.
                EntryKind::Present { phys }
                | EntryKind::ProtNone { phys }
                | EntryKind::Migration { phys, .. }
                | EntryKind::HwPoison { phys }
                | EntryKind::DevicePrivate { phys, .. }
                | EntryKind::DeviceExclusive { phys, .. }
                    if frames.get(phys >> PAGE_SHIFT).is_err() =>
                {
                    false
                }
                _ => return Ok(Some(entry)),
            };
            if is_sound {
                mapping.sound.push(entry);
                continue;
            }
            mapping.damaged.push(from..to);
            let phys = entry.phys(&frames.format).filter(|_| entry.is_present());
            mapping.misled |= phys.is_some_and(|phys| self.can_be_memory(phys));
        }
        Ok(None)
    }

    /// Whether what is damaged leads the CPU anywhere.
    fn can_mislead(&self, error: &vmcore::Error) -> bool {
        match error {
            vmcore::Error::NotMapped {
                why:
                    NotMapped::NoTable { table, .. }
                    | NotMapped::TableTwice { table, .. }
                    | NotMapped::TableUnreadable { table, .. },
                ..
            } => self.can_be_memory(*table),
            // It would have refused it.
            vmcore::Error::NotMapped { why: NotMapped::BadEntry { .. }, .. } => false,
            _ => true,
        }
    }

    /// Whether an address can be memory, or a device's, rather than nothing.
    fn can_be_memory(&self, phys: u64) -> bool {
        const DEVICES_END: u64 = 1 << 32;
        let end = self.kernel.phys().ranges().last().map_or(0, vmcore::PhysRange::end);
        phys < end.max(DEVICES_END)
    }

    /// All anonymous pages that are of one of a mapping's owners and belong where nothing sound is, for each of these mappings.
    fn candidates(&self, mappings: &[&Mapping]) -> Result<Vec<Candidates>> {
        let mut by_owner: HashMap<u64, Vec<usize>> = HashMap::new();
        for (n, mapping) in mappings.iter().enumerate() {
            mapping.owners.iter().for_each(|owner| by_owner.entry(*owner).or_default().push(n));
        }
        let mut all = vec![Candidates::new(); mappings.len()];
        self.anonymous_pages(&mut |page| {
            for n in by_owner.get(&page.owner).into_iter().flatten() {
                let (Some(mapping), Some(candidates)) = (mappings.get(*n), all.get_mut(*n)) else { continue };
                let address = mapping.address_of(page.index).filter(|address| !mapping.is_sound(*address));
                if let Some(address) = address {
                    candidates.entry(address).or_default().push(page);
                }
            }
        })?;
        Ok(all)
    }

    /// How often each candidate is known to be mapped, by other address spaces.
    fn mapped_elsewhere(&self, id: AddressSpaceId, candidates: &[Candidates]) -> BTreeMap<u64, i64> {
        let pages = candidates.iter().flat_map(Candidates::values).flatten();
        let mut mapped: BTreeMap<u64, i64> = pages.map(|page| (page.pfn, 0)).collect();
        let spaces = self.address_spaces.borrow();
        let others = spaces.iter().filter(|(other, _)| **other != id);
        for run in others.flat_map(|(_, space)| &space.vmas).flat_map(|vma| &vma.pages) {
            let end = run.pfn.saturating_add(run.count.into());
            mapped.range_mut(run.pfn..end).for_each(|(_, count)| *count += 1);
        }
        mapped
    }

    /// The mapping's pages, as if its page tables had been whole.
    fn collect(&self, vma: &Vma, mapping: &Mapping) -> Result<Collector<'_, '_>> {
        let is_file = matches!(vma.kind, VmaKind::File { .. });
        let mut collector = Collector::new(self.frames()?, self.kernel.phys().ranges(), self.swap(), is_file);
        let mut found = mapping.found.iter().peekable();
        for entry in &mapping.sound {
            while let Some((address, pfn)) = found.next_if(|(address, _)| **address < entry.va) {
                collector.page(*address, *pfn);
            }
            collector.entry(entry, mapping.start, mapping.end);
        }
        found.for_each(|(address, pfn)| collector.page(*address, *pfn));
        Ok(collector)
    }
}

impl Mapping {
    /// Where a page with this index is, if it is in this mapping.
    fn address_of(&self, index: u64) -> Option<u64> {
        let within = index.checked_sub(self.pgoff)?.checked_mul(PAGE_SIZE)?;
        self.start.checked_add(within).filter(|address| *address < self.end)
    }

    /// Whether there is an entry for an address that is as it must be.
    fn is_sound(&self, address: u64) -> bool {
        let after = self.sound.partition_point(|entry| entry.va <= address);
        let entry = after.checked_sub(1).and_then(|n| self.sound.get(n));
        entry.is_some_and(|entry| address - entry.va < entry.size.bytes())
    }
}
