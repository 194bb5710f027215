//! Pages that page tables map, against their `struct page` (include/linux/mm_types.h, mm/rmap.c, mm/memory.c; 6.1 and 6.12).
//!
//! A page gets its owner and its count before it gets into a page table, and keeps both until after it is out of it again; so that nothing
//! here can be caught half done, except that counts lag behind by what each CPU was about to add (filemap_map_pages() since 6.7).

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use ktypes::Kernel;
use snapshot::FindingKind;
use vmcore::PAGE_SHIFT;

use super::Doubts;
use super::memory::Belonging;
use crate::Autopsy;
use crate::error::Result;
use crate::raw::{half, word};

/// Pages that are looked at in one go: those of one huge page.
const MAX_RUN: u64 = 512;
// The lowest bits of `page.mapping` (include/linux/page-flags.h).
const ANON: u64 = 1;
const MOVABLE: u64 = 2;
const FLAGS: u64 = 3;

/// Where `struct page` has what is compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    size: usize,
    flags: usize,
    head: u64,
    mapping: usize,
    index: usize,
    mapcount: usize,
    refcount: usize,
    compound_head: usize,
    /// Of an `anon_vma`.
    root: u64,
    cpus: i64,
}

impl Layout {
    fn of(kernel: &Kernel) -> Result<Self> {
        let offset = |path: &str| -> Result<usize> { Ok(kernel.offset_of("page", path)? as usize) };
        Ok(Self {
            size: kernel.size_of("page")? as usize,
            flags: offset("flags")?,
            head: 1 << (kernel.enum_value_in("pageflags", "PG_head")? as u64 & 63),
            mapping: offset("mapping")?,
            index: offset("index")?,
            mapcount: offset("_mapcount.counter")?,
            refcount: offset("_refcount.counter")?,
            compound_head: offset("compound_head")?,
            root: kernel.offset_of("anon_vma", "root")?,
            cpus: i64::from(kernel.nr_cpus().unwrap_or(1)),
        })
    }
}

/// The pages of one mapping, as they are met.
pub(crate) struct Pages<'k> {
    kernel: &'k Kernel,
    layout: Layout,
    /// Start of the mapping, and number of the page there within what is mapped.
    start: u64,
    pgoff: u64,
    belonging: Belonging,
    /// Pages that follow each other in both memories: address, frame, count.
    run: (u64, u64, u64),
    buffer: Vec<u8>,
    /// Of compound pages, the head that was read last.
    head: (u64, Vec<u8>),
    /// Roots of the `anon_vma`s that were met.
    roots: HashMap<u64, Option<u64>>,
    wrong: u64,
    why: Option<(u64, &'static str)>,
}

/// What is compared of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts {
    /// Owner and place in it, of the page itself where it is part of a compound one.
    mapping: u64,
    index: u64,
    references: i32,
    /// How often it is mapped, where the page itself counts that.
    mapped: Option<i32>,
}

impl<'k> Pages<'k> {
    fn new(kernel: &'k Kernel, layout: Layout, start: u64, pgoff: u64, belonging: Belonging) -> Self {
        Self {
            kernel,
            layout,
            start,
            pgoff,
            belonging,
            run: (0, 0, 0),
            buffer: Vec::new(),
            head: (0, Vec::new()),
            roots: HashMap::new(),
            wrong: 0,
            why: None,
        }
    }

    /// A page that is mapped at an address.
    pub(crate) fn see(&mut self, addr: u64, pfn: u64) {
        let (first, frame, count) = self.run;
        if count > 0 && count < MAX_RUN && frame + count == pfn && first + (count << PAGE_SHIFT) == addr {
            self.run.2 += 1;
            return;
        }
        self.look();
        self.run = (addr, pfn, 1);
    }

    /// Whether a page can be mapped at an address.
    pub(crate) fn belongs(&mut self, addr: u64, pfn: u64) -> bool {
        let page = self.kernel.read_bytes(self.kernel.pfn_to_page(pfn), self.layout.size);
        let facts = page.ok().and_then(|page| self.facts(pfn, &page));
        facts.is_some_and(|facts| self.contradiction(addr, facts).is_none())
    }

    /// How many pages do not belong where they are, and of the first its address and the reason.
    pub(crate) fn finish(mut self) -> (u64, Option<(u64, &'static str)>) {
        self.look();
        (self.wrong, self.why)
    }

    fn look(&mut self) {
        let (addr, pfn, count) = std::mem::take(&mut self.run);
        if count == 0 {
            return;
        }
        let size = self.layout.size;
        let mut bytes = std::mem::take(&mut self.buffer);
        bytes.resize(size * count as usize, 0);
        let at = self.kernel.pfn_to_page(pfn);
        if self.kernel.read_into(at, &mut bytes).is_err() {
            self.blame(addr, count, "are no memory");
        } else {
            for (i, page) in (0..count).zip(bytes.chunks_exact(size)) {
                let address = addr + (i << PAGE_SHIFT);
                let why = match self.facts(pfn + i, page) {
                    Some(facts) => self.contradiction(address, facts),
                    None => Some("are parts of compound pages that are not there"),
                };
                if let Some(why) = why {
                    self.blame(address, 1, why);
                }
            }
        }
        self.buffer = bytes;
    }

    fn blame(&mut self, addr: u64, count: u64, why: &'static str) {
        self.wrong += count;
        self.why.get_or_insert((addr, why));
    }

    fn facts(&mut self, pfn: u64, page: &[u8]) -> Option<Facts> {
        let layout = self.layout;
        let link = word(page, layout.compound_head);
        if link & 1 == 0 {
            let is_head = word(page, layout.flags) & layout.head != 0;
            return Some(Facts {
                mapping: word(page, layout.mapping),
                index: word(page, layout.index),
                references: half(page, layout.refcount) as i32,
                mapped: (!is_head).then(|| (half(page, layout.mapcount) as i32).wrapping_add(1)),
            });
        }
        let head = link - 1;
        if self.head.0 != head {
            let bytes = self.kernel.read_bytes(head, layout.size).ok()?;
            self.head = (head, bytes);
        }
        let within = pfn.checked_sub(self.kernel.page_to_pfn(head).ok()?)?;
        let page = &self.head.1;
        Some(Facts {
            mapping: word(page, layout.mapping),
            index: word(page, layout.index).wrapping_add(within),
            references: half(page, layout.refcount) as i32,
            mapped: None,
        })
    }

    /// Why a page cannot be mapped at an address of this mapping; `None` if it can.
    fn contradiction(&mut self, addr: u64, page: Facts) -> Option<&'static str> {
        if page.references <= 0 {
            return Some("are free");
        }
        if let Some(mapped) = page.mapped {
            if mapped <= 0 {
                return Some("are mapped nowhere, as they say, or no pages of a program");
            }
            if i64::from(page.references) + self.layout.cpus < i64::from(mapped) {
                return Some("are mapped more often than they are used");
            }
        }
        let index = ((addr - self.start) >> PAGE_SHIFT).wrapping_add(self.pgoff);
        match page.mapping & FLAGS {
            // Of several processes with the same contents (KSM).
            FLAGS => {
                (self.belonging.anon_root == 0).then_some("are in a mapping that has no pages of its own")
            }
            MOVABLE => Some("belong to a driver"),
            ANON if self.belonging.anon_root == 0 => Some("are in a mapping that has no pages of its own"),
            ANON if self.root(page.mapping & !FLAGS) != Some(self.belonging.anon_root) => {
                Some("belong to other processes")
            }
            ANON => (page.index != index).then_some("belong to other addresses"),
            // That a mapping of no file has pages of one is told where they are collected.
            _ if self.belonging.mapping == 0 => None,
            0 if page.mapping != self.belonging.mapping => Some("are none of its file's"),
            _ => (page.index != index).then_some("belong to other places in the file"),
        }
    }

    fn root(&mut self, anon_vma: u64) -> Option<u64> {
        let (kernel, offset) = (self.kernel, self.layout.root);
        let read = || kernel.read_u64(anon_vma.wrapping_add(offset)).ok();
        *self.roots.entry(anon_vma).or_insert_with(read)
    }
}

/// A page of memory of the programs' own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Anonymous {
    pub pfn: u64,
    /// Its `anon_vma`.
    pub owner: u64,
    /// Its place there, in pages.
    pub index: u64,
    /// How often it is mapped; unknown for parts of compound pages.
    pub mapped: Option<i32>,
}

impl Autopsy<'_> {
    /// All anonymous pages that are mapped somewhere, by ascending address. Of what cannot be read there is nothing.
    pub(crate) fn anonymous_pages(&self, each: &mut dyn FnMut(Anonymous)) -> Result<()> {
        let layout = Layout::of(self.kernel)?;
        let mut pages = Pages::new(self.kernel, layout, 0, 0, Belonging::default());
        for range in self.kernel.phys().ranges() {
            let (mut pfn, end) = (range.start >> PAGE_SHIFT, range.end() >> PAGE_SHIFT);
            while pfn < end {
                let count = MAX_RUN.min(end - pfn);
                let bytes =
                    self.kernel.read_bytes(self.kernel.pfn_to_page(pfn), layout.size * count as usize);
                for (page, pfn) in bytes.unwrap_or_default().chunks_exact(layout.size).zip(pfn..) {
                    let Some(facts) = pages.facts(pfn, page) else { continue };
                    let Facts { mapping, index, references, mapped } = facts;
                    if mapping & FLAGS == ANON && references > 0 && mapped.is_none_or(|mapped| mapped > 0) {
                        each(Anonymous { pfn, owner: mapping & !FLAGS, index, mapped });
                    }
                }
                pfn += count;
            }
        }
        Ok(())
    }

    /// To look at the pages of a mapping that begins with page `pgoff` of what it shows; `None` where this kernel does not have what is
    /// compared, which is noted.
    pub(crate) fn pages_of(&self, start: u64, pgoff: u64, belonging: Belonging) -> Option<Pages<'_>> {
        let layout = self.page_layout.get_or_init(|| {
            let layout = Layout::of(self.kernel);
            layout
                .map_err(|error| {
                    self.outcome(Err(error), FindingKind::Page, "memory", 0, &mut Doubts::default())
                })
                .ok()
        });
        Some(Pages::new(self.kernel, (*layout)?, start, pgoff, belonging))
    }

    /// What the pages of a mapping have shown.
    pub(crate) fn pages_doubts(&self, pages: Pages<'_>, vma: (u64, u64)) -> Doubts {
        let mut doubts = Doubts::default();
        if let (wrong, Some((addr, why))) = pages.finish() {
            let text =
                format!("mapping {:x}-{:x}: {wrong} pages {why} (the first at {addr:x})", vma.0, vma.1);
            doubts.doubt(FindingKind::Page, "memory", addr, text);
        }
        doubts
    }
}
