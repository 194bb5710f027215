use synth::{I32, Record, Synth, U64, array, named};
use vmcore::PageSize;

use super::*;
use crate::memory::counters::SWAP_ENTRIES;
use crate::testing::{declare, open};

const START: u64 = 0x7f00_0000_0000;
const HUGE: u64 = START + (1 << 21);
const PRESENT: u64 = 0x67;
const PSE: u64 = 1 << 7;
/// MAPPING_ANON
const ANON: u64 = 1;

/// An address space with three pages of its own and a huge one, below one table of each lower level, used by a task that is on no CPU.
struct Fake {
    synth: Synth,
    mm: u64,
    pgd: u64,
    task: u64,
    own: Option<u64>,
}

impl Fake {
    fn new() -> Self {
        let mut synth = Synth::new();
        declare::<Mm>(&mut synth, &[("rss_stat", named("mm_rss_stat"))]);
        synth
            .structure("mm_rss_stat", Record::new().field("count", array(U64, 4)))
            .structure("task_rss_stat", Record::new().field("count", array(I32, 4)))
            .structure("task_struct", Record::new().field("rss_stat", named("task_rss_stat")));
        let (mm, task, pgd) = (synth.alloc("mm_struct"), synth.alloc("task_struct"), synth.new_pgd());
        for page in 0..3 {
            synth.map_user_page(pgd, START + page * PAGE_SIZE, &[]);
        }
        let huge = synth.alloc_phys(1 << 21, 1 << 21);
        synth.map(pgd, HUGE, PageSize::Size2M, huge | PRESENT | PSE);
        let page = synth.page_of(huge);
        synth.set("page", page, "mapping", 0xffff_8d0f_c030_0000 | ANON);
        // The huge page's own table is kept for it.
        synth.set("mm_struct", mm, "pgd", pgd).set("mm_struct", mm, "pgtables_bytes.counter", 4 * PAGE_SIZE);
        let mut fake = Self { synth, mm, pgd, task, own: Some(515) };
        fake.count(ANON_PAGES, 514);
        fake.count(SWAP_ENTRIES, 0);
        let split = fake.synth.address_of("task_struct", task, "rss_stat.count");
        fake.synth.write(split + 4 * ANON_PAGES as u64, &1_i32.to_le_bytes());
        fake
    }

    fn count(&mut self, what: usize, pages: u64) {
        let at = self.synth.address_of("mm_struct", self.mm, "rss_stat.count") + 8 * what as u64;
        self.synth.write_u64(at, pages);
    }

    /// The entry of an upper table.
    fn entry(&self, va: u64, level: u8) -> u64 {
        self.synth.entry_of(self.pgd, va, level)
    }

    /// What is said about it; `doing` is what CPUs did, with the task that each had.
    fn said_beside(&self, doing: &[(u64, Doing)]) -> Vec<String> {
        let kernel = open(&self.synth);
        let autopsy = Autopsy::new(&kernel);
        assert!(autopsy.page_table_changers.set(doing.to_vec()).is_ok());
        autopsy.own_pages.borrow_mut().insert(AddressSpaceId(self.mm), self.own);
        let machine = Machine {
            tasks_change: false,
            running: Default::default(),
            users: [(self.mm, vec![self.task])].into(),
            file_users: Default::default(),
            page_tables: Default::default(),
        };
        let mut doubts = Doubts::default();
        autopsy.check_page_tables(AddressSpaceId(self.mm), &machine, &mut doubts).unwrap();
        doubts.0.into_iter().map(|doubt| doubt.text).collect()
    }

    fn said(&self) -> Vec<String> {
        self.said_beside(&[])
    }
}

#[test]
fn what_was_counted_is_there() {
    let mut fake = Fake::new();
    assert_eq!(fake.said(), Vec::<String>::new());
    fake.own = Some(600);
    assert_eq!(fake.said(), Vec::<String>::new(), "more than was counted is no loss");
    fake.count(SWAP_ENTRIES, 86);
    assert_eq!(fake.said(), ["600 pages of its own were found, the kernel counted 601"]);
    fake.own = None;
    assert_eq!(fake.said(), Vec::<String>::new(), "a driver's mapping has pages of both kinds");
}

#[test]
fn a_table_that_is_gone_is_missed() {
    for (va, level, left) in [(START, 2, 3), (HUGE, 2, 3), (START, 3, 1), (START, 4, 0)] {
        let mut fake = Fake::new();
        let entry = fake.entry(va, level);
        fake.synth.write_u64(entry, 0);
        let text = format!("{left} page tables were found, the kernel counted 4");
        assert_eq!(fake.said(), [text], "{va:x} {level}");
    }
    // What is neither a table nor empty.
    for level in [3, 4] {
        let mut fake = Fake::new();
        let entry = fake.entry(START, level);
        let value = fake.synth.read_u64(entry);
        fake.synth.write_u64(entry, value ^ 1);
        assert_eq!(fake.said().len(), 1, "level {level}");
    }
}

#[test]
fn what_is_in_a_tables_place_is_a_table() {
    for level in [2, 3] {
        let mut fake = Fake::new();
        let other = fake.synth.alloc_phys(PAGE_SIZE, PAGE_SIZE);
        let entry = fake.entry(START, level);
        fake.synth.write_u64(entry, other | PRESENT);
        let said = fake.said();
        assert_eq!(
            said[0], "what is in the place of the page table for 7f0000000000 is none",
            "level {level}"
        );
    }
    // Twice the same: the program would see its own memory at another address.
    let mut fake = Fake::new();
    let table = fake.synth.read_u64(fake.entry(START, 2));
    let entry = fake.entry(HUGE, 2);
    fake.synth.write_u64(entry, table);
    assert!(fake.said()[0].starts_with("its page tables: "));
}

#[test]
fn who_was_changing_them_is_allowed_for() {
    let mut fake = Fake::new();
    let entry = fake.entry(START, 2);
    fake.synth.write_u64(entry, 0);
    let kernel = |names: &[&str]| Doing::Kernel(names.iter().map(|name| (*name).to_owned()).collect());
    let own = fake.task;
    let silent = |fake: &Fake, task: u64, doing: Doing| fake.said_beside(&[(task, doing)]).is_empty();
    assert!(silent(&fake, own, kernel(&["pmd_install", "__pte_alloc", "handle_mm_fault"])));
    assert!(silent(&fake, own + 8, kernel(&[])), "nobody knows");
    assert!(!silent(&fake, own, kernel(&["handle_mm_fault", "do_user_addr_fault"])), "elsewhere in a fault");
    assert!(!silent(&fake, own, Doing::User));
    assert!(!silent(&fake, own + 8, kernel(&["free_pgtables", "unmap_region"])), "somebody's else");
    fake.synth.set("mm_struct", fake.mm, "pgtables_bytes.counter", 5 * PAGE_SIZE);
    assert!(!silent(&fake, own, kernel(&["free_pgtables", "unmap_region"])), "one table after the other");

    let mut fake = Fake::new();
    fake.own = Some(514);
    assert!(silent(&fake, own, kernel(&["wp_page_copy", "handle_mm_fault"])));
    assert!(silent(&fake, own + 8, kernel(&["ptep_clear_flush", "try_to_migrate_one", "rmap_walk_anon"])));
    assert!(!silent(&fake, own + 8, kernel(&["ksys_read", "do_syscall_64"])), "it has no business there");
    fake.own = Some(513);
    assert!(!silent(&fake, own, kernel(&["wp_page_copy", "handle_mm_fault"])), "one page after the other");
    fake.own = Some(3);
    assert!(silent(&fake, own, kernel(&["zap_pte_range", "unmap_page_range"])));
    fake.own = Some(2);
    assert!(!silent(&fake, own, kernel(&["zap_pte_range", "unmap_page_range"])), "more than a table's pages");
}
