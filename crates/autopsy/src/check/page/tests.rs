use synth::{Record, Synth, U64};
use vmcore::PAGE_SIZE;

use super::*;
use crate::testing::open;

const START: u64 = 0x7f00_0000_0000;
/// Number of the mapping's first page.
const PGOFF: u64 = 0x0007_f000_0000;

/// Four pages in a row that a mapping has: physical address, and the roots of its `anon_vma`s and of somebody else's.
struct Fake {
    synth: Synth,
    phys: u64,
    anon_vma: u64,
    stranger: u64,
    belonging: Belonging,
}

impl Fake {
    fn new() -> Self {
        let mut synth = Synth::new();
        synth.structure("anon_vma", Record::new().field("root", U64).field("rest", U64));
        let (anon_vma, root, stranger) =
            (synth.alloc("anon_vma"), synth.alloc("anon_vma"), synth.alloc("anon_vma"));
        synth.set("anon_vma", anon_vma, "root", root).set("anon_vma", stranger, "root", stranger);
        let phys = synth.alloc_phys(4 * PAGE_SIZE, PAGE_SIZE);
        let belonging = Belonging { anon_root: root, mapping: 0 };
        let mut fake = Self { synth, phys, anon_vma, stranger, belonging };
        for i in 0..4 {
            fake.set(i, "mapping", anon_vma | ANON);
            fake.set(i, "index", PGOFF + i);
            fake.set(i, "_refcount", 1);
        }
        fake
    }

    fn set(&mut self, page: u64, member: &str, value: u64) {
        let at = self.synth.page_of(self.phys + page * PAGE_SIZE);
        match member {
            "_refcount" | "_mapcount" => {
                _ = self.synth.set("page", at, &format!("{member}.counter"), value as i64 as i32)
            }
            _ => _ = self.synth.set("page", at, member, value),
        }
    }

    /// How many pages do not belong there, where the first is, and why.
    fn look(&self) -> (u64, Option<(u64, &'static str)>) {
        let kernel = open(&self.synth);
        let autopsy = Autopsy::new(&kernel);
        let mut pages = autopsy.pages_of(START, PGOFF, self.belonging).unwrap();
        for i in 0..4 {
            pages.see(START + i * PAGE_SIZE, self.phys / PAGE_SIZE + i);
        }
        assert_eq!(pages.run.2, 4, "one run");
        pages.finish()
    }

    #[track_caller]
    fn assert_wrong(&self, page: u64, what: &str) {
        let (wrong, why) = self.look();
        let (addr, why) = why.unwrap();
        assert_eq!((wrong, addr), (1, START + page * PAGE_SIZE));
        assert!(why.contains(what), "{why}");
    }
}

#[test]
fn pages_that_belong_to_a_mapping_raise_no_doubt() {
    let mut fake = Fake::new();
    assert_eq!(fake.look(), (0, None));
    fake.set(2, "_mapcount", 5);
    fake.set(2, "_refcount", 6);
    assert_eq!(fake.look(), (0, None), "six processes have it");
    fake.set(2, "_refcount", 4);
    assert_eq!(fake.look(), (0, None), "each CPU may have one reference to add");
    fake.set(3, "mapping", fake.stranger | FLAGS);
    fake.set(3, "index", 99);
    assert_eq!(fake.look(), (0, None), "of several that had the same contents");
}

#[test]
fn pages_of_others_are_found() {
    let with = |page, member: &str, value| {
        let mut fake = Fake::new();
        fake.set(page, member, value);
        fake
    };
    let fake = Fake::new();
    with(1, "mapping", fake.stranger | ANON).assert_wrong(1, "other processes");
    with(0, "mapping", 8 | ANON).assert_wrong(0, "other processes");
    with(3, "mapping", fake.anon_vma | MOVABLE).assert_wrong(3, "driver");
    with(2, "index", PGOFF + 3).assert_wrong(2, "other addresses");
    with(2, "_refcount", 0).assert_wrong(2, "free");
    with(2, "_mapcount", u64::MAX).assert_wrong(2, "nowhere");
    with(2, "_mapcount", 50).assert_wrong(2, "more often");
    let mut fake = Fake::new();
    fake.belonging.anon_root = 0;
    assert_eq!(fake.look().0, 4, "a mapping that never had a page of its own");
}

#[test]
fn pages_of_a_file_are_where_they_are_in_the_file() {
    let mut fake = Fake::new();
    fake.belonging.mapping = 0xffff_8880_0000_1000;
    for i in 1..4 {
        fake.set(i, "mapping", fake.belonging.mapping);
    }
    assert_eq!(fake.look(), (0, None), "and one has been written to");
    let mut other = Fake { synth: fake.synth.clone(), ..fake };
    other.set(2, "mapping", fake.belonging.mapping + 8);
    other.assert_wrong(2, "none of its file's");
    fake.set(1, "index", PGOFF + 7);
    fake.assert_wrong(1, "other places in the file");
}

#[test]
fn parts_of_a_compound_page_are_judged_by_its_head() {
    let mut fake = Fake::new();
    let head = fake.synth.page_of(fake.phys);
    fake.set(0, "flags", 1 << 16);
    fake.set(0, "_mapcount", u64::MAX);
    for i in 1..4 {
        fake.set(i, "compound_head", head | 1);
        fake.set(i, "_refcount", 0);
        fake.set(i, "index", 0);
    }
    assert_eq!(fake.look(), (0, None));
    fake.set(0, "index", PGOFF + 1);
    assert_eq!(fake.look().0, 4);
    fake.set(0, "index", PGOFF);
    fake.set(3, "compound_head", 0xffff_0000_0000_0001);
    fake.assert_wrong(3, "not there");
}

#[test]
fn frames_that_are_no_memory_are_found() {
    let kernel = open(&Fake::new().synth);
    let autopsy = Autopsy::new(&kernel);
    let mut pages = autopsy.pages_of(START, PGOFF, Belonging::default()).unwrap();
    pages.see(START, 1 << 39);
    assert_eq!(pages.finish(), (1, Some((START, "are no memory"))));
}
