//! Which page frames are the kernel's own: all but free ones, and those of programs and files (include/linux/page-flags.h, mm_types.h, mm/page_alloc.c;
//! 6.1 and 6.12). As with makedumpfile's dump level 31, but for a few pages that were on their way from one list to another.

#[cfg(test)]
mod tests;

use ktypes::Kernel;
use vmcore::{PAGE_SHIFT, PhysRange};

use crate::Autopsy;
use crate::error::Result;
use crate::raw::{half, word};

/// Frames whose `struct page`s are read in one go.
const BLOCK: u64 = 64;
/// No buddy has more frames than this power of two (MAX_ORDER, MAX_PAGE_ORDER).
const MAX_ORDER: u64 = 20;
/// Ranges that there may be at the end: as many as ELF has program headers for, and some less.
const MAX_RANGES: usize = 60_000;

/// How the first page of a free block is told, and how huge pages of hugetlbfs are.
struct Layout {
    size: usize,
    flags: usize,
    compound_head: usize,
    private: usize,
    mapcount: usize,
    /// PG_lru
    lru: u64,
    /// `_mapcount` of a free block's first page.
    buddy: Option<u32>,
    huge: Option<Huge>,
}

/// What marks a page of hugetlbfs.
enum Huge {
    /// The uppermost byte of `page_type` (since 6.11, in the place of `_mapcount`).
    Type(u8),
    /// `compound_dtor` of the second page, with its offset (until 6.5).
    Destructor(usize, u8),
}

/// What a page frame is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Kernel,
    /// With so many others behind it.
    Free(u64),
    Program,
}

impl Layout {
    fn of(kernel: &Kernel) -> Result<Self> {
        let offset = |path: &str| -> Result<usize> { Ok(kernel.offset_of("page", path)? as usize) };
        let number = |name: &str| kernel.vmcore().info().number(name).ok();
        let destructor = || {
            let value = kernel.enum_value_in("compound_dtor_id", "HUGETLB_PAGE_DTOR").ok()?;
            Some(Huge::Destructor(offset("compound_dtor").ok()?, value as u8))
        };
        let huge = kernel.enum_value_in("pagetype", "PGTY_hugetlb").ok().map(|value| Huge::Type(value as u8));
        Ok(Self {
            size: kernel.size_of("page")? as usize,
            flags: offset("flags")?,
            compound_head: offset("compound_head")?,
            private: offset("private")?,
            mapcount: offset("_mapcount.counter")?,
            lru: 1 << (kernel.enum_value_in("pageflags", "PG_lru")? as u64 & 63),
            // Exported for makedumpfile, and named after what it once was.
            buddy: number("PAGE_BUDDY_MAPCOUNT_VALUE").map(|value| value as u32),
            huge: huge.or_else(destructor),
        })
    }

    /// What a page is used for that is not a part of another one. `second`: reads the page behind it.
    fn use_of(&self, page: &[u8], second: impl FnOnce() -> Option<Vec<u8>>) -> Use {
        let mapcount = half(page, self.mapcount);
        if self.buddy == Some(mapcount) {
            return Use::Free(1 << word(page, self.private).min(MAX_ORDER));
        }
        let is_huge = match &self.huge {
            Some(Huge::Type(value)) => mapcount >> 24 == u32::from(*value),
            Some(Huge::Destructor(offset, value)) => {
                let is_head = |second: &Vec<u8>| word(second, self.compound_head) & 1 != 0;
                second().filter(is_head).is_some_and(|second| second.get(*offset) == Some(value))
            }
            None => false,
        };
        match is_huge || word(page, self.flags) & self.lru != 0 {
            true => Use::Program,
            false => Use::Kernel,
        }
    }
}

impl Autopsy<'_> {
    /// The memory that is the kernel's own, in ascending ranges. Where a `struct page` cannot be read, the page counts as one of them.
    ///
    /// # Errors
    /// When this kernel's `struct page` does not have what tells pages apart.
    pub fn kernel_pages(&self) -> Result<Vec<PhysRange>> {
        let layout = Layout::of(self.kernel)?;
        let mut found = Vec::new();
        for range in self.kernel.phys().ranges() {
            let (first, end) = (range.start.div_ceil(1 << PAGE_SHIFT), range.end() >> PAGE_SHIFT);
            let mut own = Own { pages: Vec::new(), free_until: 0, head: (0, Use::Kernel) };
            let mut pfn = first;
            while pfn < end {
                let next = ((pfn / BLOCK + 1) * BLOCK).min(end);
                self.look_at_block(&layout, pfn, next - pfn, &mut own);
                pfn = next;
            }
            found.push(own.pages);
        }
        Ok(few(found, MAX_RANGES))
    }

    fn look_at_block(&self, layout: &Layout, first: u64, count: u64, own: &mut Own) {
        let at = self.kernel.pfn_to_page(first);
        let Ok(bytes) = self.kernel.read_bytes(at, layout.size * count as usize) else {
            return (first..first + count).for_each(|pfn| own.add(pfn));
        };
        for (pfn, page) in (first..).zip(bytes.chunks_exact(layout.size)) {
            if pfn < own.free_until {
                continue;
            }
            let link = word(page, layout.compound_head);
            let used = match link & 1 {
                0 => {
                    let behind = self.kernel.pfn_to_page(pfn + 1);
                    layout.use_of(page, || self.kernel.read_bytes(behind, layout.size).ok())
                }
                _ if own.head.0 == link => own.head.1,
                _ => {
                    let head = link - 1;
                    let behind = head.wrapping_add(layout.size as u64);
                    let read = |at| self.kernel.read_bytes(at, layout.size).ok();
                    read(head).map_or(Use::Kernel, |page| layout.use_of(&page, || read(behind)))
                }
            };
            if link & 1 != 0 {
                own.head = (link, used);
            }
            match used {
                Use::Kernel => own.add(pfn),
                // A part of a block is no beginning of one.
                Use::Free(pages) if link & 1 == 0 => own.free_until = pfn.saturating_add(pages),
                Use::Free(_) | Use::Program => {}
            }
        }
    }
}

/// The kernel's pages of one range of memory, as they are found.
struct Own {
    pages: Vec<PhysRange>,
    /// Up to this frame all are free.
    free_until: u64,
    /// The compound page that was met last: the link to its head, and its use.
    head: (u64, Use),
}

impl Own {
    fn add(&mut self, pfn: u64) {
        const PAGE: u64 = 1 << PAGE_SHIFT;
        let start = pfn << PAGE_SHIFT;
        match self.pages.last_mut() {
            Some(last) if last.end() == start => last.len += PAGE,
            _ => self.pages.push(PhysRange { start, len: PAGE }),
        }
    }
}

/// All of them, in not many more pieces than `most`: what lies between two, in the same range of memory, is taken in where it is least.
fn few(mut found: Vec<Vec<PhysRange>>, most: usize) -> Vec<PhysRange> {
    let mut gap = 1 << PAGE_SHIFT;
    while found.iter().map(Vec::len).sum::<usize>() > most.max(found.len()) {
        for pieces in &mut found {
            let mut joined: Vec<PhysRange> = Vec::with_capacity(pieces.len());
            for piece in pieces.drain(..) {
                match joined.last_mut() {
                    Some(last) if piece.start - last.end() <= gap => last.len = piece.end() - last.start,
                    _ => joined.push(piece),
                }
            }
            *pieces = joined;
        }
        gap *= 2;
    }
    found.concat()
}
