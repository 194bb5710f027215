//! Page tables against the kernel's own counts of them and of what they map (include/linux/mm.h, mm/memory.c, mm/huge_memory.c; 6.1 and 6.12).
//!
//! An entry that has become empty says nothing of what was there: the program would find zeroes. But a table is counted before it gets into the
//! tree and until after it is out of it, and a page's entry and its count change under one lock, so that only who was on a CPU can have been
//! between the two.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use ktypes::KernelType;
use snapshot::{AddressSpaceId, FindingKind, PAGE_SIZE, Severity};
use vmcore::{Entry, EntryKind, PAGE_SHIFT, PrStatus, Tables};

use super::{Doubt, Doubts, Machine};
use crate::Autopsy;
use crate::error::Result;
use crate::memory::FoundAgain;
use crate::memory::counters::{ANON_PAGES, SWAP_ENTRIES};
use crate::process::Task;

const OBJECT: &str = "memory";
/// The kernel counts tables of three levels (mm_inc_nr_ptes(), mm_inc_nr_pmds(), mm_inc_nr_puds()).
const COUNTED_LEVELS: u8 = 3;
/// Address spaces whose pages are looked for: more than a few have other reasons.
const MAX_DAMAGED: usize = 64;
/// Pages of arguments and environment that who executes another program has counted among its old ones (acct_arg_size(); 3/4 of _STK_LIM at most,
/// prepare_arg_pages(), fs/exec.c).
const MAX_ARGUMENTS: u64 = 1536;
const EXECVE: [u64; 2] = [59, 322];
/// Pages of a table: so many are taken out before they are counted, where a range is unmapped (zap_pte_range()).
const BATCH: u64 = 512;
/// First address that no program can have, with page tables of four levels and of five.
pub(crate) const fn user_end(levels: u8) -> u64 {
    1 << (PAGE_SHIFT + 9 * levels as u32 - 1)
}
/// How functions begin that change other processes' page tables: reclaim, migration, truncation, huge pages, what one process does to another.
const CHANGES_OTHERS: &[&str] = &[
    "rmap_walk",
    "try_to_",
    "unmap_mapping_",
    "retract_page_tables",
    "collapse_",
    "__split_huge_",
    "handle_mm_fault",
    "madvise_",
    "write_protect_page",
    "replace_page",
    "unuse_",
];
/// Those that put tables in or take them out.
const CHANGES_TABLES: &[&str] = &[
    "pmd_install",
    "__pte_alloc",
    "__pmd_alloc",
    "__pud_alloc",
    "do_huge_pmd_",
    "do_set_pmd",
    "zap_huge_pmd",
    "free_pg",
    "move_page_tables",
    "retract_page_tables",
    "collapse_",
    "__split_huge_",
];
/// Those that take out many entries before they count them.
const UNMAPS: &[&str] = &["zap_", "unmap_", "try_to_", "__split_huge_", "collapse_"];
/// Those that do so entry by entry.
const CHANGES_PAGES: &[&str] = &[
    "handle_mm_fault",
    "rmap_walk",
    "change_p",
    "move_p",
    "madvise_",
    "write_protect_page",
    "replace_page",
    "unuse_",
    "clear_refs_",
];

#[derive(KernelType)]
#[kernel("mm_struct")]
struct Mm {
    pgd: u64,
    #[kernel("pgtables_bytes.counter")]
    pgtables_bytes: i64,
    #[kernel("context.ldt", optional)]
    ldt: Option<u64>,
}

/// What may have been counted and not yet be there, or no more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Allowance {
    tables: u64,
    pages: u64,
}

/// What a CPU was doing, as far as it matters here.
#[derive(Clone, Debug)]
pub(crate) enum Doing {
    /// It ran a program.
    User,
    /// It was in the kernel, in these functions; none if that is not known.
    Kernel(Vec<String>),
}

impl Autopsy<'_> {
    /// Whether an address space has the page tables and the pages of its own that the kernel has counted.
    pub(super) fn check_page_tables(
        &self,
        id: AddressSpaceId,
        machine: &Machine,
        doubts: &mut Doubts,
    ) -> Result<()> {
        let mm: Mm = self.kernel.read(id.0)?;
        let users = machine.users.get(&id.0).map_or(&[][..], Vec::as_slice);
        let mut allowed = self.allowance(users);
        if users.iter().any(|task| self.is_executing(*task)) {
            allowed.pages = allowed.pages.saturating_add(MAX_ARGUMENTS);
        }
        let trees = self.kernel.page_tables(mm.pgd)?;
        let found = match trees.tables(0..user_end(trees.levels())) {
            Ok(found) => found,
            Err(error) => {
                doubts.doubt(FindingKind::Page, OBJECT, id.0, format!("its page tables: {error}"));
                return Ok(());
            }
        };
        for table in found.tables.iter().filter(|table| !self.is_table(**table)) {
            let text = format!("what is in the place of the page table for {:x} is none", table.va);
            doubts.doubt(FindingKind::Page, OBJECT, table.phys, text);
        }
        let tables = self.counted_tables(&found);
        let counted = u64::try_from(mm.pgtables_bytes).unwrap_or(0) / PAGE_SIZE;
        // A local descriptor table has page tables in the upper half (map_ldt_struct()).
        if counted > tables.saturating_add(allowed.tables) && mm.ldt.is_none_or(|ldt| ldt == 0) {
            let text = format!("{tables} page tables were found, the kernel counted {counted}");
            doubts.doubt(FindingKind::Page, OBJECT, id.0, text);
        }
        let own = self.own_pages.borrow().get(&id).copied();
        let Some(Some(own)) = own else { return Ok(()) };
        let counters = self.memory_counters(id.0, users.iter().copied())?;
        let counted = counters[ANON_PAGES].saturating_add(counters[SWAP_ENTRIES]);
        if u64::try_from(counted).unwrap_or(0) > own.saturating_add(allowed.pages) {
            let text = format!("{own} pages of its own were found, the kernel counted {counted}");
            doubts.doubt(FindingKind::Page, OBJECT, id.0, text);
        }
        Ok(())
    }

    /// Tables that the kernel counts: those in the tree, and those that are kept for each huge page of an address space's own
    /// (pgtable_trans_huge_deposit()).
    fn counted_tables(&self, found: &Tables) -> u64 {
        let levels = found.tables.iter().filter(|table| table.level <= COUNTED_LEVELS);
        let deposits = found.huge.iter().filter(|entry| self.has_deposit(entry));
        (levels.count() + deposits.count()) as u64
    }

    fn has_deposit(&self, huge: &Entry) -> bool {
        let Ok(frames) = self.frames() else { return false };
        match huge.kind(&frames.format) {
            EntryKind::Present { phys }
            | EntryKind::ProtNone { phys }
            | EntryKind::Migration { phys, .. } => {
                let pfn = phys >> PAGE_SHIFT;
                frames.is_zero(pfn) || frames.get(pfn).is_ok_and(|frame| frame.anonymous)
            }
            _ => false,
        }
    }

    /// What is in doubt about the page tables of all address spaces. Where they are damaged, what they do not show is found if it can be, and what was in
    /// doubt because of them is told no longer.
    pub(super) fn check_all_page_tables(&self, machine: &Machine) -> HashMap<AddressSpaceId, Doubts> {
        let ids: Vec<AddressSpaceId> = self.address_spaces.borrow().keys().copied().collect();
        let mut all = HashMap::new();
        for id in ids.into_iter().filter(|id| machine.users.contains_key(&id.0)) {
            let mut doubts = Doubts::default();
            let checked = self.check_page_tables(id, machine, &mut doubts);
            self.outcome(checked, FindingKind::Page, OBJECT, id.0, &mut doubts);
            if let Some(found) = self.memory_doubts.borrow().get(&id) {
                doubts.0.extend(found.0.iter().cloned());
            }
            all.insert(id, doubts);
        }
        let is_lost = |id: &AddressSpaceId| {
            let spaces = self.address_spaces.borrow();
            spaces.get(id).is_some_and(|space| space.vmas.iter().any(|vma| vma.lost_pages > 0))
        };
        let damaged = all.iter().filter(|(id, doubts)| doubts.0.iter().any(is_of_pages) || is_lost(id));
        let damaged: Vec<(AddressSpaceId, &[u64])> = damaged
            .filter_map(|(id, _)| Some((*id, machine.users.get(&id.0)?.as_slice())))
            .take(MAX_DAMAGED)
            .collect();
        if damaged.is_empty() {
            return all;
        }
        for (id, found) in self.find_pages_again(&damaged, &|table| self.is_table(table)) {
            let doubts = all.entry(id).or_default();
            let (severity, text) = match found {
                Ok(FoundAgain { pages, misled }) => {
                    let damage = doubts.0.iter_mut().filter(|doubt| is_of_pages(doubt));
                    damage.for_each(|doubt| doubt.severity = Severity::Note);
                    let found = format!(
                        "its page tables are damaged; {pages} pages were found by what the kernel knows of each page, and all that it has counted are there"
                    );
                    // Who has run meanwhile may have read anything that they led to.
                    match (misled, machine.running.contains(&id.0)) {
                        (false, _) => (Severity::Note, found + "; with what they led to it cannot have run"),
                        (true, true) => {
                            (Severity::Doubt, found + "; it was running with them when the kernel died")
                        }
                        (true, false) => {
                            (Severity::Loss, found + "; whether it had run with them is not known")
                        }
                    }
                }
                Err(why) => (
                    Severity::Note,
                    format!(
                        "what its page tables do not show cannot be found by what the kernel knows of each page: {why}"
                    ),
                ),
            };
            // First: the others can be many.
            let mut first = Doubts::default();
            first.add(severity, FindingKind::Page, OBJECT, id.0, text);
            first.0.append(&mut doubts.0);
            *doubts = first;
        }
        all
    }

    /// How far the counts may be ahead of what is there, for an address space with these users.
    fn allowance(&self, users: &[u64]) -> Allowance {
        let all = self.page_table_changers.get_or_init(|| self.what_cpus_do());
        let mut sum = Allowance::default();
        for (task, doing) in all {
            let Some(more) = allow(doing, users.contains(task)) else { continue };
            sum.tables = sum.tables.saturating_add(more.tables);
            sum.pages = sum.pages.saturating_add(more.pages);
        }
        sum
    }

    /// Whether a task is in execve(2).
    pub(crate) fn is_executing(&self, task: u64) -> bool {
        let entered = self.kernel.read::<Task>(task).ok().filter(|task| task.stack != 0);
        let registers = entered.and_then(|task| self.stored_registers(&task).ok());
        registers.is_some_and(|registers| EXECVE.contains(&registers.orig_rax))
    }

    /// What each CPU was doing, with the task that it had.
    fn what_cpus_do(&self) -> Vec<(u64, Doing)> {
        let current = self.cpus().current.iter();
        current
            .map(|(&task, &cpu)| (task, self.what_cpu_does(task, cpu).unwrap_or(Doing::Kernel(Vec::new()))))
            .collect()
    }

    fn what_cpu_does(&self, task: u64, cpu: u32) -> Option<Doing> {
        let task: Task = self.kernel.read(task).ok()?;
        let registers = self.crash_registers(cpu, task.pid)?;
        if registers[PrStatus::RIP] >> 63 == 0 {
            return Some(Doing::User);
        }
        let names = self
            .places(&registers)
            .into_iter()
            .filter_map(|place| Some(self.kernel.symbolize(place.within())?.0.to_owned()));
        Some(Doing::Kernel(names.collect()))
    }
}

fn is_of_pages(doubt: &Doubt) -> bool {
    doubt.severity == Severity::Doubt && doubt.kind == FindingKind::Page && doubt.object == OBJECT
}

/// What a CPU may have counted differently of an address space, if anything. `its_own`: it ran one of the space's threads.
fn allow(doing: &Doing, its_own: bool) -> Option<Allowance> {
    let Doing::Kernel(functions) = doing else { return None };
    if functions.is_empty() {
        return Some(Allowance { tables: 1, pages: BATCH });
    }
    let is_in =
        |starts: &[&str]| functions.iter().any(|name| starts.iter().any(|start| name.starts_with(start)));
    (its_own || is_in(CHANGES_OTHERS)).then(|| Allowance {
        tables: is_in(CHANGES_TABLES).into(),
        pages: if is_in(UNMAPS) { BATCH } else { is_in(CHANGES_PAGES).into() },
    })
}
