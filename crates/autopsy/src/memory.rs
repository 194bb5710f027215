//! Address spaces: `mm_struct`, `vm_area_struct`, page tables (include/linux/mm_types.h, mm.h; maple trees: 6.1 and later).

pub(crate) mod counters;
pub(crate) mod fault;
mod rmap;
pub(crate) use rmap::FoundAgain;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};

use ktypes::{Kernel, KernelType};
use snapshot::{
    AddressSpace, AddressSpaceId, Bytes, FileId, FileKind, MmLayout, PageRun, Prot, Severity, SwapArea, Vma,
    VmaFlags, VmaKind,
};
use vmcore::{Entry, EntryKind, PAGE_SHIFT, PAGE_SIZE, PageSize, PteFormat, Table};

use crate::check::memory::Belonging;
use crate::check::page::Pages;
use crate::error::{Result, corrupt};
use crate::raw::word;
use crate::swap::{Slot, Swap};
use crate::{Autopsy, syscall_name};

/// `vm.max_map_count` can be raised; nobody has this many.
const MAX_VMAS: usize = 16 << 20;
/// First address that no user program can have (five-level page tables).
const USER_END: u64 = 1 << 56;
/// Words of the auxiliary vector: AT_VECTOR_SIZE is some 50.
const MAX_AUXV: u64 = 256;
/// The lock is held for writing (RWSEM_WRITER_LOCKED, kernel/locking/rwsem.c).
pub(crate) const WRITER_LOCKED: u64 = 1;
/// ANON_VMA_NAME_MAX_LEN, include/uapi/linux/prctl.h.
const MAX_ANON_NAME: usize = 80;
/// _PAGE_BIT_DEVMAP (arch/x86/include/asm/pgtable_types.h) until 6.5, and since 6.6, where the other one means something else (_PAGE_BIT_SAVED_DIRTY).
const PAGE_DEVMAP: [u64; 2] = [1 << 58, 1 << 57];
/// PAGE_MAPPING_ANON: the lowest bit of `page.mapping` (KSM pages have it, too).
const MAPPING_ANON: u64 = 1;

// vm_area_struct.vm_flags (include/linux/mm.h). Macros, so not in BTF; unchanged from 6.1 to 6.12 unless it is said.
const VM_READ: u64 = 0x1;
const VM_WRITE: u64 = 0x2;
const VM_EXEC: u64 = 0x4;
const VM_SHARED: u64 = 0x8;
const VM_GROWSDOWN: u64 = 0x100;
const VM_MAYWRITE: u64 = 0x20;
const VM_MAYSHARE: u64 = 0x80;
const VM_UFFD_MISSING: u64 = 0x200;
const VM_PFNMAP: u64 = 0x400;
const VM_UFFD_WP: u64 = 0x1000;
const VM_IO: u64 = 0x4000;
const VM_LOCKED: u64 = 0x2000;
const VM_LOCKONFAULT: u64 = 0x8_0000;
const VM_HUGETLB: u64 = 0x40_0000;
const VM_MIXEDMAP: u64 = 0x1000_0000;
/// Protection key, four bits.
const VM_PKEY: u64 = 0xf << 32;
/// VM_SHADOW_STACK since 6.6 (VM_UFFD_MINOR before: not to be brought back either).
const VM_HIGH_ARCH_5: u64 = 1 << 37;
const VM_UFFD_MINOR: u64 = 1 << 38;
/// Since 6.11.
const VM_DROPPABLE: u64 = 1 << 40;
/// Since 6.10.
const VM_SEALED: u64 = 1 << 63;

/// VM_* and what it is in a snapshot.
const FLAGS: [(u64, VmaFlags); 18] = [
    (0x10, VmaFlags::MAYREAD),
    (0x20, VmaFlags::MAYWRITE),
    (0x40, VmaFlags::MAYEXEC),
    (VM_GROWSDOWN, VmaFlags::GROWSDOWN),
    (VM_HUGETLB, VmaFlags::HUGETLB),
    (VM_LOCKED, VmaFlags::LOCKED),
    (0x8000, VmaFlags::SEQ_READ),
    (0x1_0000, VmaFlags::RAND_READ),
    (0x2_0000, VmaFlags::DONTCOPY),
    (VM_LOCKONFAULT, VmaFlags::LOCKONFAULT),
    (0x10_0000, VmaFlags::ACCOUNT),
    (0x20_0000, VmaFlags::NORESERVE),
    (0x80_0000, VmaFlags::SYNC),
    (0x200_0000, VmaFlags::WIPEONFORK),
    (0x400_0000, VmaFlags::DONTDUMP),
    (0x2000_0000, VmaFlags::HUGEPAGE),
    (0x4000_0000, VmaFlags::NOHUGEPAGE),
    (0x8000_0000, VmaFlags::MERGEABLE),
];

/// Page tables of so many levels, counted from the lowest, are marked as such in their `struct page`s (until 6.12).
const MARKED_LEVELS: u8 = 2;

// mm_struct.flags (include/linux/sched/coredump.h).
const MMF_DUMPABLE_MASK: u64 = 3;
const MMF_DISABLE_THP: u64 = 1 << 24;
const MMF_HAS_MDWE: u64 = 1 << 28;

#[derive(KernelType)]
#[kernel("mm_struct")]
pub(crate) struct Mm {
    #[kernel(address)]
    mm_mt: u64,
    pgd: u64,
    map_count: i32,
    #[kernel("mmap_lock.count")]
    mmap_lock: u64,
    #[kernel("mmap_lock.owner", optional)]
    mmap_lock_owner: Option<u64>,
    def_flags: u64,
    start_code: u64,
    end_code: u64,
    start_data: u64,
    end_data: u64,
    start_brk: u64,
    brk: u64,
    start_stack: u64,
    arg_start: u64,
    arg_end: u64,
    env_start: u64,
    env_end: u64,
    #[kernel(address)]
    saved_auxv: u64,
    flags: u64,
    #[kernel(optional)]
    ioctx_table: Option<u64>,
    exe_file: u64,
    #[kernel("context.ldt", optional)]
    ldt: Option<u64>,
    #[kernel(optional)]
    notifier_subscriptions: Option<u64>,
}

#[derive(KernelType)]
#[kernel("vm_area_struct")]
struct VmArea {
    vm_start: u64,
    vm_end: u64,
    vm_mm: u64,
    vm_flags: u64,
    vm_ops: u64,
    vm_pgoff: u64,
    vm_file: u64,
    vm_private_data: u64,
    // CONFIG_ANON_VMA_NAME; shares its place with file mappings' tree nodes until 6.2.
    #[kernel(optional)]
    anon_name: Option<u64>,
    #[kernel("vm_userfaultfd_ctx.ctx", optional)]
    userfaultfd: Option<u64>,
    vm_policy: u64,
}

/// Calls that hold `mmap_lock` and can be issued again, whatever they have done, as long as the tree of mappings is whole: what is
/// below intact mappings they leave where it is. (For a moment, mprotect does not: see [`fault`]. mremap moves page tables; so
/// does the kernel thread khugepaged.)
fn keeps_mappings_whole(nr: i64) -> bool {
    matches!(
        syscall_name(nr),
        Some(
            "mmap"
                | "mprotect"
                | "munmap"
                | "brk"
                | "clone"
                | "fork"
                | "vfork"
                | "clone3"
                | "mlock"
                | "munlock"
                | "mlock2"
        )
    )
}

/// What the kernel's `struct page` says about page frames, read in blocks of 64 and remembered as bits.
pub(crate) struct Frames<'k> {
    kernel: &'k Kernel,
    page_size: usize,
    layout: PageLayout,
    bits: PageBits,
    /// How page-table entries of this kernel are to be read.
    pub(crate) format: PteFormat,
    blocks: RefCell<HashMap<u64, Block>>,
    /// Those that cannot be read: each would take as long again for all of its pages.
    unreadable: RefCell<HashSet<u64>>,
    /// The block that was asked for last: neighbours are often neighbours in physical memory.
    last: Cell<(u64, Block)>,
    /// The bit of entries for pages of a device.
    devmap: u64,
    /// Page frame of the page of zeroes that reads of untouched memory get.
    zero_pfn: u64,
    /// The same, of 2 MiB.
    huge_zero_pfn: u64,
}

struct PageLayout {
    flags: usize,
    mapping: usize,
    compound_head: usize,
}

struct PageBits {
    dirty: u64,
    writeback: u64,
    uptodate: u64,
    poisoned: u64,
}

/// 64 page frames; one bit each.
#[derive(Clone, Copy, Default)]
struct Block {
    anonymous: u64,
    /// Newer than the disk: dirty, or on its way there.
    dirty: u64,
    uptodate: u64,
    poisoned: u64,
}

const BLOCK: u64 = 64;

/// What is known about one page frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub anonymous: bool,
    pub dirty: bool,
    pub uptodate: bool,
    pub poisoned: bool,
}

impl<'k> Frames<'k> {
    fn new(kernel: &'k Kernel) -> Result<Self> {
        let bit =
            |name: &str| -> Result<u64> { Ok(1 << (kernel.enum_value_in("pageflags", name)? as u64 & 63)) };
        let offset = |path: &str| -> Result<usize> { Ok(kernel.offset_of("page", path)? as usize) };
        let zero = kernel.symbol("empty_zero_page").and_then(|addr| kernel.virt_to_phys(addr));
        let huge = kernel.symbol("huge_zero_pfn").and_then(|addr| kernel.read_u64(addr));
        Ok(Frames {
            kernel,
            page_size: kernel.size_of("page")? as usize,
            layout: PageLayout {
                flags: offset("flags")?,
                mapping: offset("mapping")?,
                compound_head: offset("compound_head")?,
            },
            bits: PageBits {
                dirty: bit("PG_dirty")?,
                writeback: bit("PG_writeback")?,
                uptodate: bit("PG_uptodate")?,
                poisoned: bit("PG_hwpoison").unwrap_or(0),
            },
            format: kernel.pte_format(),
            // `struct ptdesc` is as old as the change.
            devmap: PAGE_DEVMAP[usize::from(kernel.size_of("ptdesc").is_ok())],
            blocks: RefCell::default(),
            unreadable: RefCell::default(),
            last: Cell::new((u64::MAX, Block::default())),
            zero_pfn: zero.map_or(u64::MAX, |phys| phys >> PAGE_SHIFT),
            huge_zero_pfn: huge.unwrap_or(u64::MAX),
        })
    }

    pub(crate) fn is_zero(&self, pfn: u64) -> bool {
        pfn == self.zero_pfn || (self.huge_zero_pfn != u64::MAX && pfn.wrapping_sub(self.huge_zero_pfn) < 512)
    }

    pub(crate) fn get(&self, pfn: u64) -> Result<Frame> {
        let number = pfn / BLOCK;
        let (last, block) = self.last.get();
        let block = if last == number { block } else { self.block(number)? };
        let bit = |mask: u64| mask >> (pfn % BLOCK) & 1 != 0;
        Ok(Frame {
            anonymous: bit(block.anonymous),
            dirty: bit(block.dirty),
            uptodate: bit(block.uptodate),
            poisoned: bit(block.poisoned),
        })
    }

    fn block(&self, number: u64) -> Result<Block> {
        let known = self.blocks.borrow().get(&number).copied();
        let block = match known {
            Some(block) => block,
            None if self.unreadable.borrow().contains(&number) => {
                let at = self.kernel.pfn_to_page(number.wrapping_mul(BLOCK));
                return Err(corrupt("page", at, "cannot be read"));
            }
            None => {
                let block = self.read_block(number).inspect_err(|_| {
                    self.unreadable.borrow_mut().insert(number);
                })?;
                self.blocks.borrow_mut().insert(number, block);
                block
            }
        };
        self.last.set((number, block));
        Ok(block)
    }

    fn read_block(&self, number: u64) -> Result<Block> {
        let first = self.kernel.pfn_to_page(number * BLOCK);
        let bytes = self.kernel.read_bytes(first, self.page_size * BLOCK as usize)?;
        let mut block = Block::default();
        let mut last_head = (0, Vec::new());
        for (i, page) in bytes.chunks_exact(self.page_size).enumerate() {
            let head = word(page, self.layout.compound_head);
            // The state of a compound page is that of its head; only hardware errors are noted page by page.
            let state = if head & 1 == 0 {
                page
            } else {
                if last_head.0 != head {
                    last_head = (head, self.kernel.read_bytes(head - 1, self.page_size).unwrap_or_default());
                }
                last_head.1.as_slice()
            };
            let flags = word(state, self.layout.flags);
            let set = |mask: &mut u64, on: bool| *mask |= u64::from(on) << i;
            set(&mut block.anonymous, word(state, self.layout.mapping) & MAPPING_ANON != 0);
            set(&mut block.dirty, flags & (self.bits.dirty | self.bits.writeback) != 0);
            set(&mut block.uptodate, flags & self.bits.uptodate != 0);
            set(&mut block.poisoned, word(page, self.layout.flags) & self.bits.poisoned != 0);
        }
        Ok(block)
    }
}

/// Collects the pages of one mapping into runs.
struct Collector<'a, 'k> {
    frames: &'a Frames<'k>,
    ranges: &'a [vmcore::PhysRange],
    /// Only anonymous pages count: the others are the file's.
    file: bool,
    swap: &'a Swap,
    /// Whether they belong there is looked at in passing.
    check: Option<Pages<'k>>,
    pages: Vec<PageRun>,
    /// Pages that huge ones can still have.
    huge_left: u64,
    /// Pages of the mapping's own, whatever has become of them.
    own: u64,
    lost: u64,
    why_lost: Option<String>,
}

impl<'a, 'k> Collector<'a, 'k> {
    fn new(frames: &'a Frames<'k>, ranges: &'a [vmcore::PhysRange], swap: &'a Swap, file: bool) -> Self {
        let huge_left = ranges.iter().map(|range| range.len >> PAGE_SHIFT).sum();
        Self {
            frames,
            ranges,
            file,
            swap,
            check: None,
            pages: Vec::new(),
            huge_left,
            own: 0,
            lost: 0,
            why_lost: None,
        }
    }

    fn entry(&mut self, entry: &Entry, start: u64, end: u64) {
        let from = entry.va.max(start);
        let to = (entry.va + entry.size.bytes()).min(end);
        let count = to.saturating_sub(from) >> PAGE_SHIFT;
        let skip = (from - entry.va) >> PAGE_SHIFT;
        let kind = entry.kind(&self.frames.format);
        // The page of an entry that waits for a migration is about to lose its owner.
        // Pages of a device (DAX) have other rules than those of memory.
        let is_settled = matches!(kind, EntryKind::Present { .. } | EntryKind::ProtNone { .. })
            && entry.pte & self.frames.devmap == 0;
        match kind {
            EntryKind::Present { phys }
            | EntryKind::ProtNone { phys }
            | EntryKind::Migration { phys, .. }
            | EntryKind::DeviceExclusive { phys, .. } => {
                let first = (phys >> PAGE_SHIFT) + skip;
                if count > 1 && self.frames.is_zero(first) {
                    return;
                }
                // Huge pages are nobody else's: there are no more than there is memory. (Small ones can be the same many times, but
                // then their entries are in memory.)
                if count > 1 {
                    match self.huge_left.checked_sub(count) {
                        Some(left) => self.huge_left = left,
                        None => {
                            self.own += count;
                            return self.lose(count, "are more huge pages than there is memory");
                        }
                    }
                }
                for i in 0..count {
                    if let Some(check) =
                        self.check.as_mut().filter(|_| is_settled && !self.frames.is_zero(first + i))
                    {
                        check.see(from + (i << PAGE_SHIFT), first + i);
                    }
                    self.page(from + (i << PAGE_SHIFT), first + i);
                }
            }
            EntryKind::Swap { kind, offset } => {
                self.own += count;
                for i in 0..count {
                    self.swapped(from + (i << PAGE_SHIFT), self.swap.slot(kind.into(), offset + skip + i));
                }
            }
            // Of a huge page there are none (make_pte_marker()).
            EntryKind::Marker { bits } if bits & !1 == 0 && entry.size == PageSize::Size4K => {}
            EntryKind::HwPoison { .. } => self.lose(count, "lost to a hardware error"),
            EntryKind::DevicePrivate { .. } => self.lose(count, "in a device's own memory"),
            EntryKind::SwapinError | EntryKind::Marker { .. } => self.lose(count, "could not be swapped in"),
            other => self.lose(count, &format!("have page-table entries that make no sense ({other:?})")),
        }
    }

    fn page(&mut self, addr: u64, pfn: u64) {
        if self.frames.is_zero(pfn) {
            return;
        }
        match self.frames.get(pfn) {
            Ok(frame) if frame.poisoned => {
                self.own += 1;
                return self.lose(1, "lost to a hardware error");
            }
            Ok(frame) if !frame.anonymous => {
                if !self.file {
                    self.lose(1, "are not anonymous pages");
                }
                return;
            }
            Ok(_) => self.own += 1,
            Err(error) => {
                self.own += 1;
                // Only the first one is said.
                if self.why_lost.is_none() {
                    self.why_lost = Some(error.to_string());
                }
                self.lost += 1;
                return;
            }
        }
        self.frame(addr, pfn);
    }

    fn frame(&mut self, addr: u64, pfn: u64) {
        let at = pfn << PAGE_SHIFT;
        let candidate = self.ranges.partition_point(|range| range.start <= at);
        let in_dump = candidate > 0
            && self.ranges.get(candidate - 1).is_some_and(|range| at + PAGE_SIZE <= range.end());
        if !in_dump {
            return self.lose(1, "are not in the core");
        }
        self.push(addr, pfn);
    }

    fn push(&mut self, addr: u64, pfn: u64) {
        match self.pages.last_mut() {
            Some(run)
                if run.addr + (u64::from(run.count) << PAGE_SHIFT) == addr
                    && run.pfn + u64::from(run.count) == pfn
                    && run.count < u32::MAX =>
            {
                run.count += 1;
            }
            _ => self.pages.push(PageRun { addr, pfn, count: 1 }),
        }
    }

    fn swapped(&mut self, addr: u64, slot: Slot) {
        match slot {
            // One that was only read ahead of time is nobody's yet: not marked as anonymous.
            Slot::Frame(pfn) if SwapArea::slot_of(pfn).is_none() => self.frame(addr, pfn),
            Slot::Frame(pfn) => self.push(addr, pfn),
            // Where there is no page, a file's shows.
            Slot::Zero if self.file => self.push(addr, self.frames.zero_pfn),
            Slot::Zero => {}
            Slot::Lost(why) => self.lose(1, why),
        }
    }

    fn lose(&mut self, count: u64, why: &str) {
        self.lost = self.lost.saturating_add(count);
        self.why_lost.get_or_insert_with(|| why.to_owned());
    }
}

impl Autopsy<'_> {
    /// What `struct page` says; read as needed.
    pub(crate) fn frames(&self) -> Result<&Frames<'_>> {
        if let Some(frames) = self.frames.get() {
            return Ok(frames);
        }
        let frames = Frames::new(self.kernel)?;
        Ok(self.frames.get_or_init(|| frames))
    }

    /// Whether a table of an address space can be one, as far as its `struct page` says.
    pub(crate) fn is_table(&self, table: Table) -> bool {
        use ktypes::Error::{MissingMember, MissingType};
        if table.level > MARKED_LEVELS {
            return true;
        }
        match self.kernel.is_page_table(table.phys >> PAGE_SHIFT) {
            Ok(mark) => mark != Some(false),
            Err(error) => matches!(error, MissingMember { .. } | MissingType { .. }),
        }
    }

    /// Reads an address space into the table, unless it is there. `call_of`: the system call that a task (by address) of the process
    /// was in.
    pub(crate) fn address_space(
        &self,
        id: AddressSpaceId,
        call_of: &dyn Fn(u64) -> Option<i64>,
        unsupported: &mut Vec<String>,
    ) -> Result<()> {
        let mm: Mm = self.kernel.read(id.0)?;
        let (aio, in_flight) = self.aio_contexts(mm.ioctx_table.unwrap_or(0))?;
        if in_flight > 0 {
            unsupported.push(format!("{in_flight} requests of asynchronous I/O in flight (io_submit)"));
        }
        if mm.ldt.is_some_and(|ldt| ldt != 0) {
            unsupported.push("a local descriptor table (modify_ldt)".into());
        }
        if mm.notifier_subscriptions.is_some_and(|list| list != 0) {
            unsupported.push("a device or virtual machine follows its memory (MMU notifier)".into());
        }
        if mm.flags & MMF_HAS_MDWE != 0 {
            unsupported.push("PR_SET_MDWE".into());
        }
        if self.address_spaces.borrow().contains_key(&id) {
            return Ok(());
        }
        let space = AddressSpace { aio, ..self.read_address_space(id, &mm, call_of)? };
        self.address_spaces.borrow_mut().insert(id, space);
        Ok(())
    }

    fn read_address_space(
        &self,
        id: AddressSpaceId,
        mm: &Mm,
        call_of: &dyn Fn(u64) -> Option<i64>,
    ) -> Result<AddressSpace> {
        // RWSEM_READER_OWNED, RWSEM_NONSPINNABLE (kernel/locking/rwsem.c).
        const OWNER_FLAGS: u64 = 3;
        let mut addresses = Vec::new();
        self.kernel.maple_for_each(mm.mm_mt, MAX_VMAS, |first, last, vma| {
            addresses.push((first, last, vma));
            Ok(())
        })?;
        let locked = mm.mmap_lock & WRITER_LOCKED != 0;
        let mut vmas: Vec<Vma> = Vec::with_capacity(addresses.len());
        let mut agree = mm.map_count == addresses.len() as i32;
        for (first, last, addr) in addresses {
            let area: VmArea = self.kernel.read(addr)?;
            let after = vmas.last().map_or(0, |vma| vma.end);
            let sane = area.vm_mm == id.0
                && area.vm_start < area.vm_end
                && area.vm_end <= USER_END
                && area.vm_start >= after
                && (area.vm_start | area.vm_end).is_multiple_of(PAGE_SIZE);
            if !sane {
                let why = format!("{:x}-{:x} cannot be the next mapping", area.vm_start, area.vm_end);
                return Err(corrupt("vm_area_struct", addr, why));
            }
            let range = (first, last.wrapping_add(1));
            let bounds = (area.vm_start, area.vm_end);
            agree &= bounds == range;
            // A stack grows downwards in a page fault, with the lock held for reading only (until 6.4).
            let grows = area.vm_flags & VM_GROWSDOWN != 0 && range.1 == bounds.1;
            let belonging =
                self.check_mapping(id, addr, range, bounds, !(locked || grows && range != bounds));
            vmas.push(self.vma(id, mm, &area, belonging, !locked && range == bounds)?);
        }
        let holder = mm.mmap_lock_owner.filter(|_| locked).map(|owner| owner & !OWNER_FLAGS);
        // Without an owner it has just been taken, or is about to be released.
        let is_harmless = |holder| holder == 0 || call_of(holder).is_some_and(keeps_mappings_whole);
        let write_locked = locked && !(agree && holder.is_some_and(is_harmless));
        if mm.map_count != vmas.len() as i32 && !write_locked {
            let text = format!("{} mappings were found, the kernel counted {}", vmas.len(), mm.map_count);
            self.find(Severity::Doubt, "memory", text);
        }
        let exe = if mm.exe_file == 0 { None } else { self.mapped_file(mm.exe_file) };
        Ok(AddressSpace {
            vmas,
            aio: Vec::new(),
            layout: MmLayout {
                start_code: mm.start_code,
                end_code: mm.end_code,
                start_data: mm.start_data,
                end_data: mm.end_data,
                start_brk: mm.start_brk,
                brk: mm.brk,
                start_stack: mm.start_stack,
                arg_start: mm.arg_start,
                arg_end: mm.arg_end,
                env_start: mm.env_start,
                env_end: mm.env_end,
                auxv: self.auxv(mm)?,
            },
            exe,
            dumpable: (mm.flags & MMF_DUMPABLE_MASK) as u32,
            thp_disabled: mm.flags & MMF_DISABLE_THP != 0,
            lock_future: mm.def_flags & VM_LOCKED != 0,
            lock_on_fault: mm.def_flags & VM_LOCKONFAULT != 0,
            write_locked,
        })
    }

    fn auxv(&self, mm: &Mm) -> Result<Vec<u64>> {
        let size = self.kernel.member("mm_struct", "saved_auxv")?.size.min(MAX_AUXV * 8);
        let bytes = self.kernel.read_bytes(mm.saved_auxv, size as usize)?;
        let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        let pairs = words.as_chunks::<2>().0;
        let used = pairs.iter().position(|[key, _]| *key == 0).map_or(pairs.len(), |null| null + 1);
        Ok(words[..used * 2].to_vec())
    }

    /// A file that is mapped or run: into the table; `None` with a finding if it cannot be read.
    pub(crate) fn mapped_file(&self, addr: u64) -> Option<FileId> {
        match self.file(addr) {
            Ok(()) => Some(FileId(addr)),
            Err(error) => {
                self.find(Severity::Broken, "file", format!("a mapped file is lost: {error}"));
                None
            }
        }
    }

    /// `settled`: nobody was changing mappings.
    fn vma(
        &self,
        id: AddressSpaceId,
        mm: &Mm,
        area: &VmArea,
        belonging: Belonging,
        settled: bool,
    ) -> Result<Vma> {
        let flags = area.vm_flags;
        let on = |bit: u64| flags & bit != 0;
        let mut prot = Prot::empty();
        prot.set(Prot::READ, on(VM_READ));
        prot.set(Prot::WRITE, on(VM_WRITE));
        prot.set(Prot::EXEC, on(VM_EXEC));
        let shared = on(VM_SHARED) || on(VM_MAYSHARE);
        let mut vma = Vma {
            start: area.vm_start,
            end: area.vm_end,
            prot,
            shared,
            flags: FLAGS.into_iter().filter(|(bit, _)| on(*bit)).map(|(_, flag)| flag).collect(),
            kind: self.vma_kind(area, shared)?,
            name: self.anon_name(area),
            pages: Vec::new(),
            lost_pages: 0,
        };
        let own_pages = match vma.kind {
            VmaKind::Anonymous | VmaKind::AnonymousHuge { .. } => true,
            VmaKind::File { .. } => !shared,
            // Not brought back, but there.
            VmaKind::Unsupported { .. } => {
                area.vm_file == 0 && !shared && flags & (VM_PFNMAP | VM_MIXEDMAP | VM_IO) == 0
            }
            _ => false,
        };
        let is_drivers = flags & (VM_PFNMAP | VM_MIXEDMAP | VM_IO) != 0;
        if own_pages || !(shared || is_drivers) {
            // hugetlbfs counts in its own pages.
            let check = (own_pages && settled && flags & VM_HUGETLB == 0)
                .then(|| self.pages_of(area.vm_start, area.vm_pgoff, belonging))
                .flatten();
            self.pages(id, mm, &mut vma, check, own_pages)?;
        } else if !shared && on(VM_MAYWRITE) {
            // It can have pages of both kinds (is_cow_mapping(), include/linux/mm.h); where nobody may ever write, as in [vvar], it has only the driver's.
            self.count_own_pages(id, None);
        }
        Ok(vma)
    }

    fn vma_kind(&self, area: &VmArea, shared: bool) -> Result<VmaKind> {
        let flags = area.vm_flags;
        let unsupported = |what: &str| Ok(VmaKind::Unsupported { what: what.to_owned() });
        if self.kernel.symbol_opt("special_mapping_vmops").is_some_and(|ops| ops == area.vm_ops) {
            let name = self.kernel.offset_of("vm_special_mapping", "name")?;
            let name = self.kernel.read_u64(area.vm_private_data.wrapping_add(name))?;
            return Ok(VmaKind::Special { name: Bytes(self.kernel.read_cstr(name, 64)?) });
        }
        if self.kernel.symbol_opt("aio_ring_vm_ops").is_some_and(|ops| ops == area.vm_ops) {
            let file = self.mapped_file(area.vm_file);
            return match file.and_then(|id| self.files.borrow().get(&id).map(|file| file.inode)) {
                Some(inode) => Ok(VmaKind::AioRing { inode }),
                None => unsupported("a ring of asynchronous I/O whose file cannot be read"),
            };
        }
        if flags & (VM_UFFD_MISSING | VM_UFFD_WP | VM_UFFD_MINOR) != 0
            || area.userfaultfd.is_some_and(|ctx| ctx != 0)
        {
            return unsupported("memory registered with userfaultfd");
        }
        let rare = [
            (VM_PKEY, "a protection key"),
            (VM_HIGH_ARCH_5, "a shadow stack"),
            (VM_DROPPABLE, "droppable memory"),
            (VM_SEALED, "sealed memory (mseal)"),
        ];
        if let Some((_, what)) = rare.iter().find(|(bit, _)| flags & bit != 0) {
            return unsupported(what);
        }
        if area.vm_policy != 0 {
            return unsupported("memory with a NUMA policy");
        }
        if area.vm_file == 0 {
            return match flags & (VM_PFNMAP | VM_MIXEDMAP | VM_IO) != 0 || shared {
                true => unsupported("memory of a driver"),
                false => Ok(VmaKind::Anonymous),
            };
        }
        let Some(file) = self.mapped_file(area.vm_file) else {
            return unsupported("a file that cannot be read");
        };
        let files = self.files.borrow();
        let open = &files[&file];
        let offset = area.vm_pgoff << PAGE_SHIFT;
        if flags & (VM_PFNMAP | VM_MIXEDMAP | VM_IO) != 0 {
            return unsupported(&format!("memory of the device {}", open.path));
        }
        match &open.kind {
            // "/dev/zero", deleted, on tmpfs' internal mount: what mmap makes of MAP_SHARED | MAP_ANONYMOUS.
            FileKind::Unsupported { .. } if self.is_shared_anonymous(open) => {
                Ok(VmaKind::SharedAnonymous { inode: open.inode, offset })
            }
            FileKind::Unsupported { .. } if self.is_huge_anonymous(open) && shared => {
                Ok(VmaKind::SharedAnonymous { inode: open.inode, offset })
            }
            FileKind::Unsupported { .. } if self.is_huge_anonymous(open) => {
                match self.inodes.borrow().get(&open.inode).and_then(|inode| inode.huge_page) {
                    Some(page_size) => Ok(VmaKind::AnonymousHuge { page_size }),
                    None => unsupported("huge pages of unknown size"),
                }
            }
            FileKind::Unsupported { .. } if self.is_sysv_shm(open) => {
                let data = self.kernel.offset_of("file", "private_data")?;
                let data = self.kernel.read_u64(area.vm_file.wrapping_add(data))?;
                Ok(VmaKind::SysvShm { id: self.shm_id(data)?, offset })
            }
            FileKind::Unsupported { what } => unsupported(what),
            _ => Ok(VmaKind::File { file, offset }),
        }
    }

    fn anon_name(&self, area: &VmArea) -> Option<Bytes> {
        let name = area.anon_name.filter(|name| *name != 0 && area.vm_file == 0)?;
        // Without CONFIG_ANON_VMA_NAME the member is there, but holds something else where there is a file.
        self.kernel.symbol_opt("anon_vma_name_alloc")?;
        let at = name.wrapping_add(self.kernel.offset_of("anon_vma_name", "name").ok()?);
        Some(Bytes(self.kernel.read_cstr(at, MAX_ANON_NAME).ok()?))
    }

    /// Notes how many pages of its own one of an address space's mappings has; `None` if that is not known.
    fn count_own_pages(&self, id: AddressSpaceId, pages: Option<u64>) {
        let mut all = self.own_pages.borrow_mut();
        let known = all.entry(id).or_insert(Some(0));
        *known = known.zip(pages).map(|(known, more)| known.saturating_add(more));
    }

    /// The frames that belong to the mapping itself; just counted unless they are to be `kept`.
    fn pages<'s>(
        &'s self,
        id: AddressSpaceId,
        mm: &Mm,
        vma: &mut Vma,
        check: Option<Pages<'s>>,
        kept: bool,
    ) -> Result<()> {
        let is_file = !kept || matches!(vma.kind, VmaKind::File { .. });
        let ranges = self.kernel.phys().ranges();
        let mut collector =
            Collector { check, ..Collector::new(self.frames()?, ranges, self.swap(), is_file) };
        let (start, end) = (vma.start, vma.end);
        let tables = self.kernel.page_tables(mm.pgd)?;
        let in_flight = self.page_tables_in_flight();
        let mut taken = in_flight.taken(id.0, start, end);
        taken.retain(|entry| matches!(tables.lookup(entry.va), Ok(None)));
        let mut taken = taken.into_iter().peekable();
        let mut damaged = 0;
        tables.walk_around(
            start..end,
            &|table| self.is_table(table),
            &mut |entry| {
                while let Some(before) = taken.next_if(|taken| taken.va < entry.va) {
                    collector.entry(&before, start, end);
                }
                collector.entry(&entry, start, end);
            },
            &mut |range, _| damaged += (range.end - range.start) >> PAGE_SHIFT,
        )?;
        if damaged > 0 {
            collector.lose(damaged, "are behind damaged page tables");
        }
        taken.for_each(|entry| collector.entry(&entry, start, end));
        for (from, to) in in_flight.changing(id.0, start, end) {
            // Where they cannot be walked they are damaged, which has been noted.
            for table in tables.last_tables(from..to).unwrap_or_default() {
                if table.empty > 0 && self.is_table_locked(table.phys)? {
                    collector.lose(1, "may be missing: a CPU was changing their page table");
                }
            }
        }
        if let Some(check) = collector.check {
            self.note_memory_doubts(id, self.pages_doubts(check, (start, end)));
        }
        // hugetlbfs' pages are counted elsewhere.
        let is_huge = vma.flags.contains(VmaFlags::HUGETLB);
        self.count_own_pages(id, Some(if is_huge { 0 } else { collector.own }));
        if !kept {
            return Ok(());
        }
        if let Some(why) = collector.why_lost {
            let text = format!("mapping {start:x}-{end:x}: {} pages {why}", collector.lost);
            self.find(Severity::Note, "memory", text);
        }
        vma.pages = collector.pages;
        vma.lost_pages = collector.lost;
        Ok(())
    }
}
