use snapshot::{AddressSpace, PageRun, Prot};
use synth::{I32, PTR, Record, Synth, U64, array, named};
use vmcore::PageSize;

use super::*;
use crate::swap::Swap;
use crate::testing::{declare, open};

const START: u64 = 0x7f00_0000_0000;
const PGOFF: u64 = 0x0007_f000_0000;
const PAGES: u64 = 6;
const PRESENT: u64 = 0x67;
const ANON: u64 = 1;

/// An address space with one mapping, all of whose pages are its own, and another that may have some of them, too.
struct Fake {
    synth: Synth,
    mm: u64,
    pgd: u64,
    anon_vma: u64,
    first: u64,
    /// Frames that the other one has.
    others: Vec<u64>,
}

impl Fake {
    fn new() -> Self {
        let mut synth = Synth::new();
        synth.info_line("NUMBER(PG_hwpoison)=22");
        declare::<Mm>(&mut synth, &[("mm_mt", named("maple_tree")), ("rss_stat", named("mm_rss_stat"))]);
        let record = Record::new;
        synth
            .structure("mm_rss_stat", record().field("count", array(U64, 4)))
            .structure("task_rss_stat", record().field("count", array(I32, 4)))
            .structure("task_struct", record().field("rss_stat", named("task_rss_stat")))
            .structure("shared", record().field("rb", named("rb_node")))
            .structure(
                "vm_area_struct",
                record()
                    .field("vm_start", U64)
                    .field("vm_end", U64)
                    .field("vm_pgoff", U64)
                    .field("anon_vma_chain", named("list_head"))
                    .field("anon_vma", PTR)
                    .field("vm_file", PTR)
                    .field("shared", named("shared")),
            )
            .structure(
                "anon_vma_chain",
                record().field("vma", PTR).field("anon_vma", PTR).field("same_vma", named("list_head")),
            )
            .structure("anon_vma", record().field("root", U64).field("rest", U64));
        let (mm, area, anon_vma, link) = (
            synth.alloc("mm_struct"),
            synth.alloc("vm_area_struct"),
            synth.alloc("anon_vma"),
            synth.alloc("anon_vma_chain"),
        );
        let pgd = synth.new_pgd();
        let end = START + 512 * PAGE_SIZE;
        synth
            .set("mm_struct", mm, "pgd", pgd)
            .set("vm_area_struct", area, "vm_start", START)
            .set("vm_area_struct", area, "vm_end", end)
            .set("vm_area_struct", area, "vm_pgoff", PGOFF)
            .set("vm_area_struct", area, "anon_vma", anon_vma)
            .set("anon_vma", anon_vma, "root", anon_vma)
            .set("anon_vma_chain", link, "vma", area)
            .set("anon_vma_chain", link, "anon_vma", anon_vma);
        let head = synth.list_init("vm_area_struct", area, "anon_vma_chain");
        let node = synth.address_of("anon_vma_chain", link, "same_vma");
        synth.list_add_tail(node, head);
        let tree = synth.address_of("mm_struct", mm, "mm_mt");
        synth.maple_tree(tree, &[(START, end - 1, area)]);
        let first = synth.alloc_phys(PAGES * PAGE_SIZE, PAGE_SIZE);
        let mut fake = Self { synth, mm, pgd, anon_vma, first, others: vec![] };
        for n in 0..PAGES {
            let phys = first + n * PAGE_SIZE;
            fake.page(phys, PGOFF + n, 1);
            fake.synth.map(pgd, START + n * PAGE_SIZE, PageSize::Size4K, phys | PRESENT);
        }
        fake.count(ANON_PAGES, PAGES);
        fake.count(SWAP_ENTRIES, 0);
        fake
    }

    /// A page of this owner, mapped so often.
    fn page(&mut self, phys: u64, index: u64, mapped: i32) {
        let at = self.synth.page_of(phys);
        self.synth
            .set("page", at, "mapping", self.anon_vma | ANON)
            .set("page", at, "index", index)
            .set("page", at, "_refcount.counter", mapped)
            .set("page", at, "_mapcount.counter", mapped - 1);
    }

    fn count(&mut self, what: usize, pages: u64) {
        let at = self.synth.address_of("mm_struct", self.mm, "rss_stat.count") + 8 * what as u64;
        self.synth.write_u64(at, pages);
    }

    /// Where the entry for one of the pages is, in the table of this level.
    fn entry(&self, page: u64, level: u8) -> u64 {
        self.synth.entry_of(self.pgd, START + page * PAGE_SIZE, level)
    }

    fn damage(&mut self, page: u64, level: u8, value: u64) {
        let at = self.entry(page, level);
        self.synth.write_u64(at, value);
    }

    /// How many pages are found.
    fn found(&self) -> Option<u64> {
        self.found_again().map(|found| found.pages)
    }

    /// What is found; all has to be there then.
    fn found_again(&self) -> Option<FoundAgain> {
        let kernel = open(&self.synth);
        let autopsy = Autopsy::new(&kernel);
        assert!(autopsy.swap.set(Swap::default()).is_ok());
        let space = |pages: Vec<PageRun>| AddressSpace {
            vmas: vec![Vma {
                start: START,
                end: START + 512 * PAGE_SIZE,
                prot: Prot::READ,
                shared: false,
                flags: VmaFlags::default(),
                kind: VmaKind::Anonymous,
                name: None,
                pages,
                lost_pages: 1,
            }],
            ..AddressSpace::default()
        };
        let id = AddressSpaceId(self.mm);
        let run = |(n, pfn): (u64, &u64)| PageRun { addr: START + n * PAGE_SIZE, pfn: *pfn, count: 1 };
        let theirs = (0..).zip(&self.others).map(run).collect();
        autopsy.address_spaces.borrow_mut().extend([(id, space(vec![])), (AddressSpaceId(1), space(theirs))]);
        let outcomes = autopsy.find_pages_again(&[(id, &[])], &|table| autopsy.is_table(table));
        let found = outcomes[&id].clone().ok();
        let spaces = autopsy.address_spaces.borrow();
        let vma = &spaces[&id].vmas[0];
        let all = PageRun { addr: START, pfn: self.first / PAGE_SIZE, count: PAGES as u32 };
        match found {
            Some(_) => assert_eq!((vma.pages.as_slice(), vma.lost_pages), ([all].as_slice(), 0)),
            None => assert_eq!((vma.pages.as_slice(), vma.lost_pages), ([].as_slice(), 1)),
        }
        found
    }
}

#[test]
fn whole_page_tables_show_everything() {
    assert_eq!(Fake::new().found(), Some(0));
}

#[test]
fn pages_behind_damaged_entries_are_found() {
    let pte = |fake: &Fake| fake.synth.read_u64(fake.entry(3, 1));
    for change in [
        |_| 0,
        |pte| pte ^ 1,
        |pte| pte ^ 1 << 40,
        |pte| pte ^ 1 << 12,
        |_| 0x45_8493_35f1_5ebf,
        |_| 0x9b06_5a27_d36d_6d81,
    ] {
        let mut fake = Fake::new();
        let value = change(pte(&fake));
        fake.damage(3, 1, value);
        assert_eq!(fake.found(), Some(1), "{value:#x}");
    }
    for level in 2..=4 {
        for value in [0, 0x100_0000_0000 | PRESENT, 0x1234_0000] {
            let mut fake = Fake::new();
            fake.damage(0, level, value);
            assert_eq!(fake.found(), Some(PAGES), "level {level}, {value:#x}");
        }
    }
    // A table's entry leads to what is none.
    let mut fake = Fake::new();
    fake.damage(0, 2, fake.first | PRESENT);
    assert_eq!(fake.found(), Some(PAGES));
}

#[test]
fn pages_that_others_have_too_are_found_where_these_are_known() {
    let mut fake = Fake::new();
    fake.page(fake.first, PGOFF, 3);
    fake.damage(0, 1, 0);
    fake.others = vec![fake.first / PAGE_SIZE; 1];
    assert_eq!(fake.found(), None, "one of the three is not known");
    fake.page(fake.first, PGOFF, 2);
    assert_eq!(fake.found(), Some(1));
}

#[test]
fn what_is_not_certain_is_not_taken() {
    let damaged = || {
        let mut fake = Fake::new();
        fake.damage(2, 1, 0);
        fake
    };
    assert_eq!(damaged().found(), Some(1));
    let mut fake = damaged();
    let other = fake.synth.alloc_phys(PAGE_SIZE, PAGE_SIZE);
    fake.page(other, PGOFF + 2, 1);
    assert_eq!(fake.found(), None, "two pages can be the one");
    fake.others = vec![other / PAGE_SIZE];
    assert_eq!(fake.found(), Some(1), "one of them is another process's");

    let mut fake = damaged();
    fake.count(ANON_PAGES, PAGES + 1);
    assert_eq!(fake.found(), None, "one more is missing");
    let mut fake = damaged();
    fake.count(ANON_PAGES, PAGES - 1);
    assert_eq!(fake.found(), None, "the page is not missed");
    let mut fake = damaged();
    fake.count(SWAP_ENTRIES, 1);
    assert_eq!(fake.found(), None, "a swap entry is missing");
    let mut fake = damaged();
    fake.synth.set("mm_struct", fake.mm, "mmap_lock.count", 1_u64);
    assert_eq!(fake.found(), None, "mappings are being changed");
    let mut fake = damaged();
    fake.page(fake.first + 2 * PAGE_SIZE, PGOFF + 2, 0);
    assert_eq!(fake.found(), None, "it is mapped nowhere");
    let mut fake = damaged();
    let at = fake.synth.page_of(fake.first + 2 * PAGE_SIZE);
    fake.synth.set("page", at, "mapping", fake.mm | ANON);
    assert_eq!(fake.found(), None, "it belongs to others");
}

#[test]
fn whether_the_damage_led_anywhere_is_told() {
    let misled = |level, value: u64| {
        let mut fake = Fake::new();
        let at = fake.entry(3, level);
        let before = fake.synth.read_u64(at);
        fake.damage(3, level, if value == 0 { 0 } else { before ^ value });
        fake.found_again().unwrap().misled
    };
    for level in 1..=2 {
        assert!(misled(level, 1 << 13), "to another page");
        assert!(!misled(level, 1 << 40), "behind all memory");
        assert!(!misled(level, 1), "not present");
        assert!(!misled(level, 0));
    }
    assert!(!misled(4, 1), "an entry that no CPU takes");
}
