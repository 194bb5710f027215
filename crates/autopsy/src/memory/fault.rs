//! Page-table entries that another CPU had taken out for a moment when it was stopped. Who holds a page table's lock cannot be switched
//! out, so only threads that were on a CPU are asked.
//!
//! - A copy-on-write fault takes the old page's entry out, and puts the copy's in a little later (`wp_page_copy`, mm/memory.c). What it
//!   took out is in its `struct vm_fault`, on the thread's kernel stack (`orig_pte`), and maps the same contents.
//! - mprotect(2) takes one entry after the other out and puts it in again (`change_pte_range`, mm/mprotect.c), with the entry in a
//!   register. 6.1 and 6.12.

use std::ops::Range;

use ktypes::KernelType;
use snapshot::PAGE_SIZE;
use vmcore::{Entry, PageSize, PrStatus};

use super::VmArea;
use crate::Autopsy;
use crate::process::Task;
use crate::thread::CpuRegisters;

/// A kernel stack has 16 KiB (32 with KASAN).
const MAX_STACK: u64 = 32 << 10;
/// Entries of a page table are eight bytes long, and a table is as large as a page.
const ENTRY: u64 = 8;
const PRESENT: u64 = 1;
/// `orig_ax` of mprotect(2) and pkey_mprotect(2).
const MPROTECT: [u64; 2] = [10, 329];

#[derive(KernelType)]
#[kernel("vm_fault")]
pub(super) struct VmFault {
    vma: u64,
    address: u64,
    #[kernel("orig_pte.pte")]
    orig_pte: u64,
    pte: u64,
    ptl: u64,
}

/// An entry that a fault may have taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Address of the `mm_struct`.
    mm: u64,
    entry: Entry,
}

/// Memory whose protection a thread was changing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Changing {
    mm: u64,
    start: u64,
    end: u64,
}

/// What threads on CPUs were doing to page tables.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    taken: Vec<Taken>,
    changing: Vec<Changing>,
}

impl InFlight {
    /// Entries within a mapping that a fault had found there, ascending.
    pub(super) fn taken(&self, mm: u64, start: u64, end: u64) -> Vec<Entry> {
        let within = |taken: &&Taken| taken.mm == mm && (start..end).contains(&taken.entry.va);
        let mut entries: Vec<Entry> = self.taken.iter().filter(within).map(|taken| taken.entry).collect();
        entries.sort_by_key(|entry| entry.va);
        entries.dedup_by_key(|entry| entry.va);
        entries
    }

    /// The parts of a mapping whose protection was being changed.
    pub(super) fn changing(&self, mm: u64, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let of = self.changing.iter().filter(move |changing| changing.mm == mm);
        of.map(move |changing| (changing.start.max(start), changing.end.min(end)))
            .filter(|(from, to)| from < to)
    }
}

impl Autopsy<'_> {
    /// What threads on CPUs were doing to page tables; read once.
    pub(super) fn page_tables_in_flight(&self) -> &InFlight {
        self.in_flight.get_or_init(|| {
            let mut found = InFlight::default();
            for (&task, &cpu) in &self.cpus().current {
                // What cannot be read is found again, and named, when the thread itself is read.
                _ = self.look_at_cpu(task, cpu, &mut found);
            }
            found
        })
    }

    fn look_at_cpu(&self, addr: u64, cpu: u32, found: &mut InFlight) -> crate::Result<()> {
        let task: Task = self.kernel.read(addr)?;
        let Some(live) = self.crash_registers(cpu, task.pid) else { return Ok(()) };
        let top = task.stack.saturating_add(self.stack_layout()?.pt_regs);
        if task.mm == 0 || live[PrStatus::RIP] >> 63 == 0 {
            return Ok(());
        }
        let Some(rsp) = self.stack_in_use(cpu, &live, task.stack..top) else {
            // It may have taken out anything, wherever a table is locked.
            found.changing.push(Changing { mm: task.mm, start: 0, end: u64::MAX });
            return Ok(());
        };
        let stack = self.kernel.read_bytes(rsp, (top - rsp) as usize)?;
        let size = self.kernel.size_of("vm_fault")?;
        for at in (rsp..top.saturating_sub(size)).step_by(8) {
            if let Some(entry) = self.taken_at(at, rsp, &stack, task.mm) {
                found.taken.push(Taken { mm: task.mm, entry });
            }
        }
        let call = self.stored_registers(&task)?;
        if MPROTECT.contains(&call.orig_rax) {
            let end = call.rdi.saturating_add(call.rsi);
            found.changing.push(Changing { mm: task.mm, start: call.rdi & !(PAGE_SIZE - 1), end });
        }
        Ok(())
    }

    /// From where on a thread's stack is in use. An interrupt may have come in between, and what has died is on another stack.
    fn stack_in_use(&self, cpu: u32, live: &CpuRegisters, stack: Range<u64>) -> Option<u64> {
        let is_there = |sp: &u64| {
            sp.is_multiple_of(8) && stack.contains(sp) && stack.end.saturating_sub(*sp) <= MAX_STACK
        };
        let rsp = live[PrStatus::RSP];
        let interrupted = || self.interrupted_at(cpu, rsp).filter(is_there);
        let unwound = || self.places(live).into_iter().map(|place| place.sp).find(is_there);
        Some(rsp).filter(is_there).or_else(interrupted).or_else(unwound)
    }

    /// The entry that a fault described at an address of a stack has found, if one can be there that holds its page table's lock.
    fn taken_at(&self, at: u64, base: u64, stack: &[u8], mm: u64) -> Option<Entry> {
        // Most words are no kernel pointers: spares reading the rest.
        let offset = self.kernel.offset_of("vm_fault", "vma").ok()?;
        let index = usize::try_from(at.checked_sub(base)?.checked_add(offset)?).ok()?;
        let vma = u64::from_le_bytes(*stack.get(index..)?.first_chunk()?);
        if vma >> 63 == 0 {
            return None;
        }
        let fault: VmFault = self.kernel.read(at).ok()?;
        let slot = (fault.address / PAGE_SIZE * ENTRY) & (PAGE_SIZE - 1);
        if fault.orig_pte & PRESENT == 0 || fault.pte & (PAGE_SIZE - 1) != slot || !self.is_locked(fault.ptl)
        {
            return None;
        }
        let area: VmArea = self.kernel.read(fault.vma).ok()?;
        let within = area.vm_mm == mm && (area.vm_start..area.vm_end).contains(&fault.address);
        let va = fault.address & !(PAGE_SIZE - 1);
        within.then_some(Entry { va, size: PageSize::Size4K, pte: fault.orig_pte })
    }

    /// Whether a spinlock is held.
    fn is_locked(&self, lock: u64) -> bool {
        lock >> 63 != 0 && self.kernel.read_u32(lock).is_ok_and(|value| value != 0)
    }

    /// Whether the lock of the page table at a physical address is held.
    pub(super) fn is_table_locked(&self, table: u64) -> crate::Result<bool> {
        // A type of its own since 6.6, laid over `struct page`.
        let ptl = match self.kernel.offset_of("ptdesc", "ptl") {
            Ok(offset) => offset,
            Err(_) => self.kernel.offset_of("page", "ptl")?,
        };
        let page = self.kernel.pfn_to_page(table / PAGE_SIZE);
        Ok(self.is_locked(page.wrapping_add(ptl)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MM: u64 = 0xffff_8880_0000_1000;

    fn entry(va: u64, pte: u64) -> Entry {
        Entry { va, size: PageSize::Size4K, pte }
    }

    #[test]
    fn entries_of_a_mapping_come_once_and_in_order() {
        let taken = |mm, va, pte| Taken { mm, entry: entry(va, pte) };
        let in_flight = InFlight {
            taken: vec![
                taken(MM, 0x5000, 1),
                taken(MM, 0x3000, 2),
                taken(MM, 0x5000, 1),
                taken(MM + 64, 0x4000, 3),
                taken(MM, 0x2000, 4),
                taken(MM, 0x6000, 5),
            ],
            ..InFlight::default()
        };
        assert_eq!(in_flight.taken(MM, 0x3000, 0x6000), [entry(0x3000, 2), entry(0x5000, 1)]);
        assert_eq!(in_flight.taken(MM + 64, 0, 0x9000), [entry(0x4000, 3)]);
        assert_eq!(in_flight.taken(MM, 0x6000, 0x6000), []);
    }

    #[test]
    fn of_what_is_being_changed_the_mappings_part_counts() {
        let changing = |mm, start, end| Changing { mm, start, end };
        let in_flight = InFlight {
            changing: vec![
                changing(MM, 0x1000, 0x4000),
                changing(MM, 0x5000, 0x6000),
                changing(MM, 0x7000, u64::MAX),
                changing(MM + 64, 0, u64::MAX),
            ],
            ..InFlight::default()
        };
        let parts = |start, end| in_flight.changing(MM, start, end).collect::<Vec<_>>();
        assert_eq!(parts(0x2000, 0x8000), [(0x2000, 0x4000), (0x5000, 0x6000), (0x7000, 0x8000)]);
        assert_eq!(parts(0, 0x9000)[0], (0x1000, 0x4000));
        assert_eq!(parts(0x4000, 0x5000), [], "beside them");
        assert_eq!(parts(0x6000, 0x7000), []);
    }
}
