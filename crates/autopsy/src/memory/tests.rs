//! Page tables of fake processes, entry by entry.

use ktypes::Kernel;
use snapshot::{Decision, Mode, Policy, Process, Snapshot, decide};
use synth::{PTR, Record, Synth, U32, U64, array, named};
use vmcore::{PageSize, PageTables, PrStatus};

use super::fault::VmFault;
use super::*;
use crate::process::Task;
use crate::testing::declare;

const START: u64 = 0x7f00_0000_0000;
const PRESENT: u64 = 0x67;
const PROTNONE: u64 = 1 << 8;
const PID: i32 = 100;
/// Not all RAM is in the core: what is used lies far below.
const CORE_END: u64 = 24 << 20;
// Types of swap entries of a kernel 6.1 with memory failure, migration and markers.
const HWPOISON: u64 = 26;
const MIGRATION: u64 = 27;

/// A process with one private anonymous mapping, on CPU 0, within the kernel.
struct Machine {
    synth: Synth,
    task: u64,
    mm: u64,
    area: u64,
    pgd: u64,
    /// Where the thread's kernel stack is in use: from here on.
    rsp: u64,
    /// The registers with which the thread entered the kernel.
    entry: u64,
}

/// As the kernel's __swp_entry().
fn swap_entry(kind: u64, offset: u64) -> u64 {
    (!offset << 14 >> 5) | kind << 59
}

fn run(page: u64, phys: u64, count: u32) -> PageRun {
    PageRun { addr: START + page * PAGE_SIZE, pfn: phys / PAGE_SIZE, count }
}

impl Machine {
    /// The mapping has so many pages.
    fn new(pages: u64) -> Self {
        Self::died_on(pages, |_, rsp| rsp)
    }

    /// A machine that died where the stack pointer is what `on` makes of that of the thread.
    fn died_on(pages: u64, on: impl Fn(&mut Synth, u64) -> u64) -> Self {
        let mut synth = Synth::new();
        synth.info_line("NUMBER(PG_hwpoison)=22");
        declare::<Mm>(&mut synth, &[("mm_mt", named("maple_tree")), ("saved_auxv", array(U64, 2))]);
        declare::<VmArea>(&mut synth, &[]);
        declare::<VmFault>(&mut synth, &[]);
        declare::<Task>(&mut synth, &[("tasks", named("list_head"))]);
        synth
            .structure("rq", Record::new().field("curr", PTR))
            .structure("pt_regs", Record::new().field("words", array(U64, 21)))
            .structure("stack", Record::new().field("words", array(U64, 2048)));
        // Larger than a page: there is a whole one in it.
        let zeroes = synth.variable("zeroes", "stack").next_multiple_of(PAGE_SIZE);
        synth.symbol("empty_zero_page", zeroes);
        let stack = synth.variable("init_stack", "stack");
        synth.symbol("__end_init_stack", stack + synth.size_of("stack"));

        let (pgd, mm, area) = (synth.new_pgd(), synth.alloc("mm_struct"), synth.alloc("vm_area_struct"));
        let end = START + pages * PAGE_SIZE;
        synth
            .set("vm_area_struct", area, "vm_start", START)
            .set("vm_area_struct", area, "vm_end", end)
            .set("vm_area_struct", area, "vm_mm", mm)
            .set("vm_area_struct", area, "vm_flags", VM_READ | VM_WRITE)
            .set("mm_struct", mm, "pgd", pgd)
            .set("mm_struct", mm, "map_count", 1);
        let tree = synth.address_of("mm_struct", mm, "mm_mt");
        synth.maple_tree(tree, &[(START, end - 1, area)]);

        let stack = synth.vmalloc(synth.size_of("stack"));
        let entry = stack + synth.size_of("stack") - synth.size_of("pt_regs");
        for (register, value) in [(16, 0x40_1000), (17, 0x33), (18, 0x246), (19, 0x7fff_0000), (20, 0x2b)] {
            synth.write_u64(entry + register * 8, value);
        }
        let init = synth.variable("init_task", "task_struct");
        let head = synth.list_init("task_struct", init, "tasks");
        let task = synth.alloc("task_struct");
        synth.set("task_struct", task, "pid", PID).set("task_struct", task, "mm", mm).set(
            "task_struct",
            task,
            "stack",
            stack,
        );
        let node = synth.address_of("task_struct", task, "tasks");
        synth.list_add_tail(node, head);
        let queues = synth.per_cpu_variable("runqueues", 8);
        for (cpu, current) in [(0, task), (1, init)] {
            synth.write_u64(synth.per_cpu(queues, cpu), current);
        }
        let rsp = entry - 0x400;
        let mut registers = [0; 27];
        registers[PrStatus::RSP] = on(&mut synth, rsp);
        registers[PrStatus::RIP] = 0xffff_ffff_8100_0000;
        synth.prstatus(PID, registers);
        Machine { synth, task, mm, area, pgd, rsp, entry }
    }

    fn va(page: u64) -> u64 {
        START + page * PAGE_SIZE
    }

    fn map(&mut self, page: u64, pte: u64) {
        self.synth.map(self.pgd, Self::va(page), PageSize::Size4K, pte);
    }

    /// An anonymous page that nothing maps yet.
    fn page(&mut self) -> u64 {
        let phys = self.synth.alloc_phys(PAGE_SIZE, PAGE_SIZE);
        self.anonymous(phys)
    }

    fn anonymous(&mut self, phys: u64) -> u64 {
        let page = self.synth.page_of(phys);
        self.synth.set("page", page, "mapping", 0xffff_8d0f_c030_0000 | MAPPING_ANON);
        phys
    }

    /// What is found of the mapping, and what is said about it.
    fn look(&self) -> (Vma, String) {
        self.look_at(self.synth.build_cut(CORE_END))
    }

    fn look_at(&self, core: vmcore::Vmcore) -> (Vma, String) {
        self.look_with(core, Swap::default())
    }

    fn look_with(&self, core: vmcore::Vmcore, swap: Swap) -> (Vma, String) {
        let kernel = Kernel::open(core).unwrap();
        let autopsy = Autopsy::new(&kernel);
        assert!(autopsy.swap.set(swap).is_ok());
        let id = AddressSpaceId(self.mm);
        autopsy.address_space(id, &|_| None, &mut Vec::new()).unwrap();
        let space = autopsy.address_spaces.borrow_mut().remove(&id).unwrap();
        // What the pages say of themselves is compared in tests of its own.
        let said = autopsy.findings().into_iter().map(|finding| finding.text);
        let said: Vec<String> = said.filter(|text| !text.contains("cross-check is left out")).collect();
        let [vma] = <[Vma; 1]>::try_from(space.vmas).unwrap();
        (vma, said.join("\n"))
    }

    /// The pages that are found, and how many are lost.
    fn pages(&self) -> (Vec<PageRun>, u64) {
        let (vma, _) = self.look();
        (vma.pages, vma.lost_pages)
    }

    /// The lowest page table of the mapping, by its physical address.
    fn table(&self) -> u64 {
        let core = self.synth.build();
        let tables = PageTables::new(&core, self.synth.phys(self.pgd), 4, 0);
        tables.last_tables(START..START + 1).unwrap()[0].phys
    }

    /// The address of the lock of the mapping's lowest page table.
    fn lock(&self) -> u64 {
        let page = self.synth.page_of(self.table());
        self.synth.address_of("page", page, "ptl")
    }

    fn take_lock(&mut self) {
        let lock = self.lock();
        self.synth.write(lock, &1_u32.to_le_bytes());
    }

    /// A fault at a page of the mapping, described on the thread's stack, that found `orig_pte` there.
    fn fault(&mut self, page: u64, orig_pte: u64) -> u64 {
        let at = self.rsp + 0x88;
        let slot = self.synth.direct(self.table()) + page * 8;
        let lock = self.lock();
        self.synth
            .set("vm_fault", at, "vma", self.area)
            .set("vm_fault", at, "address", Self::va(page) + 0x123)
            .set("vm_fault", at, "orig_pte.pte", orig_pte)
            .set("vm_fault", at, "pte", slot)
            .set("vm_fault", at, "ptl", lock);
        at
    }

    /// The thread is in mprotect(2), over so many pages of the mapping.
    fn mprotect(&mut self, page: u64, pages: u64) {
        for (register, value) in [(13, pages * PAGE_SIZE), (14, Self::va(page)), (15, 10)] {
            self.synth.write_u64(self.entry + register * 8, value);
        }
    }
}

/// Why a process that consists of this mapping does not come back.
fn reasons(vma: Vma) -> Vec<String> {
    let id = AddressSpaceId(1);
    let process = Process { address_space: Some(id), files_id: 1, ..Process::new(PID, "program".into()) };
    let mut snapshot = Snapshot { processes: vec![process], ..Snapshot::default() };
    snapshot
        .address_spaces
        .insert(id, AddressSpace { vmas: vec![vma], exe: Some(FileId(1)), ..AddressSpace::default() });
    decide(&mut snapshot, &Policy { mode: Mode::Programs, ..Policy::default() });
    match snapshot.processes.remove(0).decision {
        Decision::GiveUp { reasons } => reasons.into_iter().map(|reason| reason.code).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn pages_that_are_neighbours_in_both_memories_are_one_run() {
    let mut machine = Machine::new(8);
    let (first, second, third) = (machine.page(), machine.page(), machine.page());
    for (page, phys) in [(1, first), (2, second), (4, third)] {
        machine.map(page, phys | PRESENT);
    }
    let (vma, said) = machine.look();
    assert_eq!(vma.pages, [run(1, first, 2), run(4, third, 1)]);
    assert_eq!((vma.lost_pages, said.as_str()), (0, ""));
}

#[test]
fn pages_of_private_memory_that_is_not_brought_back_are_found_but_not_those_of_a_driver() {
    for (flags, count) in [(VM_UFFD_MISSING, 1), (VM_UFFD_MISSING | VM_PFNMAP, 0)] {
        let mut machine = Machine::new(4);
        machine.synth.set("vm_area_struct", machine.area, "vm_flags", VM_READ | VM_WRITE | flags);
        let phys = machine.page();
        machine.map(1, phys | PRESENT);
        let (vma, _) = machine.look();
        assert!(matches!(vma.kind, VmaKind::Unsupported { .. }));
        assert_eq!((vma.pages.len(), vma.lost_pages), (count, 0));
    }
}

#[test]
fn a_page_without_an_entry_is_not_lost() {
    assert_eq!(Machine::new(8).pages(), (vec![], 0));
}

#[test]
fn a_swapped_out_page_is_where_its_slot_says() {
    let mut machine = Machine::new(8);
    // Read ahead of time, and not mapped yet.
    let cached = machine.synth.alloc_phys(PAGE_SIZE, PAGE_SIZE);
    for (page, slot) in [(1, 0x77), (2, 0x78), (3, 0x20), (4, 0x30), (6, 0x79)] {
        machine.map(page, swap_entry(2, slot));
    }
    let swap = Swap::of_area(2, 0x100, &[(0x20, Slot::Frame(cached / PAGE_SIZE))], &[0x30]);
    let (vma, said) = machine.look_with(machine.synth.build_cut(CORE_END), swap);
    let slot = |page, slot, count| run(page, SwapArea::frame(2, slot) * PAGE_SIZE, count);
    assert_eq!(vma.pages, [slot(1, 0x77, 2), run(3, cached, 1), slot(6, 0x79, 1)], "and one is zeroes");
    assert_eq!((vma.lost_pages, said.as_str()), (0, ""));
}

#[test]
fn a_swap_entry_that_leads_nowhere_is_a_lost_page() {
    let mut machine = Machine::new(8);
    machine.map(1, swap_entry(2, 0x77));
    let (vma, said) = machine.look();
    assert_eq!((vma.pages.as_slice(), vma.lost_pages), ([].as_slice(), 1));
    assert!(said.contains("swap area that is not there"), "{said}");
    assert_eq!(reasons(vma), ["lost-pages"]);
}

#[test]
fn a_page_under_migration_is_found() {
    let mut machine = Machine::new(8);
    let phys = machine.page();
    machine.map(3, swap_entry(MIGRATION, phys / PAGE_SIZE));
    assert_eq!(machine.pages(), (vec![run(3, phys, 1)], 0));
}

#[test]
fn a_page_that_nobody_may_touch_is_found() {
    let mut machine = Machine::new(8);
    let phys = machine.page();
    // The page number of shut entries is inverted.
    let shut = !phys & ((1 << 52) - 1) & !(PAGE_SIZE - 1);
    machine.map(3, shut | PROTNONE | 6);
    assert_eq!(machine.pages(), (vec![run(3, phys, 1)], 0));
}

#[test]
fn a_page_lost_to_a_hardware_error_gives_the_process_up() {
    let mut machine = Machine::new(8);
    let (phys, poisoned) = (machine.page(), machine.page());
    machine.map(3, swap_entry(HWPOISON, phys / PAGE_SIZE));
    // Noted before anyone has touched it: the entry is as always.
    machine.map(5, poisoned | PRESENT);
    let page = machine.synth.page_of(poisoned);
    machine.synth.set("page", page, "flags", 1_u64 << 22);
    let (vma, said) = machine.look();
    assert_eq!((vma.pages.as_slice(), vma.lost_pages), ([].as_slice(), 2));
    assert!(said.contains("2 pages lost to a hardware error"), "{said}");
    assert_eq!(reasons(vma), ["lost-pages"]);
}

#[test]
fn the_page_of_zeroes_is_nobodys() {
    let mut machine = Machine::new(8);
    let symbol = Kernel::open(machine.synth.build()).unwrap().symbol("empty_zero_page").unwrap();
    let zeroes = machine.synth.phys(symbol);
    machine.map(3, zeroes | PRESENT);
    assert_eq!(machine.pages(), (vec![], 0));
}

#[test]
fn a_page_that_is_not_anonymous_is_lost_to_an_anonymous_mapping() {
    let mut machine = Machine::new(8);
    let phys = machine.synth.alloc_phys(PAGE_SIZE, PAGE_SIZE);
    machine.map(3, phys | PRESENT);
    assert_eq!(machine.pages(), (vec![], 1));
}

#[test]
fn a_page_beyond_the_core_gives_the_process_up() {
    // Behind the core's last byte, and half behind it.
    for end in [CORE_END, CORE_END + 0x800] {
        let mut machine = Machine::new(8);
        let there = machine.page();
        let beyond = machine.anonymous(CORE_END);
        machine.map(2, there | PRESENT);
        machine.map(3, beyond | PRESENT);
        let (vma, said) = machine.look_at(machine.synth.build_cut(end));
        assert_eq!((vma.pages.as_slice(), vma.lost_pages), ([run(2, there, 1)].as_slice(), 1));
        assert!(said.contains("1 pages are not in the core"), "{said}");
        assert_eq!(reasons(vma), ["lost-pages"]);
        // With all of the core it is there.
        let (vma, said) = machine.look_at(machine.synth.build());
        assert_eq!((vma.pages, vma.lost_pages), (vec![run(2, there, 1), run(3, beyond, 1)], 0), "{said}");
    }
}

/// A page that a copy-on-write fault had taken out, between two that are there: physical addresses in their order.
fn taken_out() -> (Machine, [u64; 3]) {
    taken_out_of(Machine::new(8))
}

fn taken_out_of(mut machine: Machine) -> (Machine, [u64; 3]) {
    let pages = [machine.page(), machine.page(), machine.page()];
    machine.map(1, pages[0] | PRESENT);
    machine.map(3, pages[2] | PRESENT);
    machine.fault(2, pages[1] | PRESENT);
    (machine, pages)
}

#[test]
fn a_page_that_a_fault_had_taken_out_comes_back_from_its_stack() {
    let (mut machine, [first, ..]) = taken_out();
    machine.take_lock();
    assert_eq!(machine.pages(), (vec![run(1, first, 3)], 0));
}

#[test]
fn a_fault_that_was_interrupted_had_taken_out_the_same() {
    // The first word of the stack for interrupts says where the thread's own was left (call_on_irqstack()).
    let on_interrupt_stack = |synth: &mut Synth, rsp: u64| {
        let stack = synth.vmalloc(16 << 10);
        let top = stack + (16 << 10) - 8;
        synth.write_u64(top, rsp);
        let pointers = synth.per_cpu_variable("hardirq_stack_ptr", 8);
        let pointer = synth.per_cpu(pointers, 0);
        synth.write_u64(pointer, top);
        top - 0x300
    };
    let (mut machine, [first, ..]) = taken_out_of(Machine::died_on(8, on_interrupt_stack));
    machine.take_lock();
    assert_eq!(machine.pages(), (vec![run(1, first, 3)], 0));

    // From a stack that leads nowhere it cannot be told what was taken out.
    let (mut machine, [first, _, third]) =
        taken_out_of(Machine::died_on(8, |synth, _| synth.vmalloc(16 << 10)));
    assert_eq!(machine.pages(), (vec![run(1, first, 1), run(3, third, 1)], 0), "nobody holds the lock");
    machine.take_lock();
    let (vma, said) = machine.look();
    assert_eq!(vma.lost_pages, 1);
    assert!(said.contains("a CPU was changing their page table"), "{said}");
}

#[test]
fn a_fault_without_the_lock_is_over() {
    let (machine, [first, _, third]) = taken_out();
    assert_eq!(machine.pages(), (vec![run(1, first, 1), run(3, third, 1)], 0));
}

#[test]
fn a_fault_that_has_put_its_copy_in_has_nothing_to_give_back() {
    let (mut machine, [first, _, third]) = taken_out();
    machine.take_lock();
    let copy = machine.page();
    machine.map(2, copy | PRESENT);
    let (vma, _) = machine.look();
    let pages: Vec<(u64, u64)> = vma.pages.iter().flat_map(frames).collect();
    let frame = |page, phys: u64| (Machine::va(page), phys / PAGE_SIZE);
    assert_eq!(pages, [frame(1, first), frame(2, copy), frame(3, third)]);
}

fn frames(run: &PageRun) -> impl Iterator<Item = (u64, u64)> + use<> {
    let PageRun { addr, pfn, count } = *run;
    (0..u64::from(count)).map(move |i| (addr + i * PAGE_SIZE, pfn + i))
}

#[test]
fn a_fault_that_does_not_fit_the_mapping_gives_nothing_back() {
    let (mut machine, [first, _, third]) = taken_out();
    machine.take_lock();
    let without = (vec![run(1, first, 1), run(3, third, 1)], 0);
    let at = machine.rsp + 0x88;
    let slot = machine.synth.get_u64("vm_fault", at, "pte");
    for (member, value) in [
        ("pte", slot + 8),
        ("address", Machine::va(2 + 512)),
        ("orig_pte.pte", 0),
        ("orig_pte.pte", swap_entry(0, 5)),
        ("vma", machine.mm),
        ("ptl", 0),
    ] {
        let before = machine.synth.get_u64("vm_fault", at, member);
        machine.synth.set("vm_fault", at, member, value);
        assert_eq!(machine.pages(), without, "{member} is {value:#x}");
        machine.synth.set("vm_fault", at, member, before);
    }
    // Below the part of the stack that is in use lies what is over.
    let words = machine.synth.read(at, machine.synth.size_of("vm_fault") as usize);
    machine.synth.write(at, &vec![0; words.len()]).write(machine.rsp - 0x200, &words);
    assert_eq!(machine.pages(), without);
}

#[test]
fn a_thread_that_is_on_no_cpu_takes_nothing_out() {
    let (mut machine, [first, _, third]) = taken_out();
    machine.take_lock();
    machine.synth.set("task_struct", machine.task, "pid", PID + 1);
    assert_eq!(
        machine.pages(),
        (vec![run(1, first, 1), run(3, third, 1)], 0),
        "the note is another thread's"
    );
}

#[test]
fn an_empty_entry_under_mprotect_may_be_a_page() {
    let mut machine = Machine::new(8);
    let pages = [machine.page(), machine.page(), machine.page()];
    for (page, phys) in (0..).zip(pages) {
        machine.map(page, phys | PRESENT);
    }
    machine.mprotect(1, 3);
    assert_eq!(machine.pages().1, 0, "nobody holds the lock");
    machine.take_lock();
    let (vma, said) = machine.look();
    assert_eq!((vma.pages.as_slice(), vma.lost_pages), ([run(0, pages[0], 3)].as_slice(), 1));
    assert!(said.contains("a CPU was changing their page table"), "{said}");
    assert_eq!(reasons(vma), ["lost-pages"]);
    machine.mprotect(1, 2);
    assert_eq!(machine.pages().1, 0, "all that it changes is there");
}

#[test]
fn the_lock_of_a_page_table_is_where_its_own_type_has_it() {
    let mut machine = Machine::new(8);
    // As since 6.6.
    machine
        .synth
        .structure("ptdesc", Record::new().field("_pt_pad", array(U64, 7)).field("ptl", U32).size(64));
    let phys = machine.page();
    machine.map(0, phys | PRESENT);
    machine.mprotect(0, 2);
    machine.take_lock();
    let page = machine.synth.page_of(machine.table());
    let lock = machine.synth.address_of("ptdesc", page, "ptl");
    // There `struct page` has nothing that matters here.
    machine.synth.write(lock, &0_u32.to_le_bytes());
    assert_eq!(machine.pages(), (vec![run(0, phys, 1)], 0), "where `struct page` had it");
    machine.synth.write(lock, &1_u32.to_le_bytes());
    assert_eq!(machine.pages(), (vec![run(0, phys, 1)], 1));
}

#[test]
fn pages_of_a_mapping_that_nobody_may_write_are_the_drivers() {
    let own = |flags: u64| {
        let mut machine = Machine::new(3);
        machine.synth.set("vm_area_struct", machine.area, "vm_flags", VM_READ | VM_PFNMAP | VM_IO | flags);
        let kernel = Kernel::open(machine.synth.build_cut(CORE_END)).unwrap();
        let autopsy = Autopsy::new(&kernel);
        let mut mm: Mm = kernel.read(machine.mm).unwrap();
        mm.map_count = 1;
        let area: VmArea = kernel.read(machine.area).unwrap();
        let id = AddressSpaceId(machine.mm);
        autopsy.count_own_pages(id, Some(7));
        autopsy.vma(id, &mm, &area, Belonging::default(), true).unwrap();
        autopsy.own_pages.borrow().get(&id).copied().flatten()
    };
    assert_eq!(own(0), Some(7), "as [vvar]: what the others have is all");
    assert_eq!(own(VM_MAYWRITE), None, "it can have pages of both kinds");
}

#[test]
fn who_executes_a_program_is_known_by_its_call() {
    for (number, expected) in [(59, true), (322, true), (0, false), (u64::MAX, false)] {
        let mut machine = Machine::new(1);
        machine.synth.write_u64(machine.entry + 15 * 8, number);
        let kernel = Kernel::open(machine.synth.build_cut(CORE_END)).unwrap();
        assert_eq!(Autopsy::new(&kernel).is_executing(machine.task), expected, "{number}");
    }
}
