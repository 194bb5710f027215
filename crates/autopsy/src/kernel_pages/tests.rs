use synth::Synth;
use vmcore::PAGE_SIZE;

use super::*;
use crate::testing::open;

const BUDDY: u32 = 0xffff_ff7f;

/// The kernel's pages among the first eight frames behind an address.
fn kept(synth: &Synth, phys: u64) -> Vec<u64> {
    let kernel = open(synth);
    let ranges = Autopsy::new(&kernel).kernel_pages().unwrap();
    let is_in = |page: &u64| {
        let at = phys + page * PAGE_SIZE;
        ranges.iter().any(|range| (range.start..range.end()).contains(&at))
    };
    (0..8).filter(is_in).collect()
}

fn machine() -> (Synth, u64) {
    let mut synth = Synth::new();
    synth.info_line(&format!("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)={}", BUDDY as i32));
    let phys = synth.alloc_phys(8 * PAGE_SIZE, 8 * PAGE_SIZE);
    for page in 0..8 {
        let at = synth.page_of(phys + page * PAGE_SIZE);
        synth.set("page", at, "_mapcount.counter", -1);
    }
    (synth, phys)
}

#[test]
fn all_but_free_pages_and_those_of_programs_are_the_kernels() {
    let (mut synth, phys) = machine();
    assert_eq!(kept(&synth, phys), [0, 1, 2, 3, 4, 5, 6, 7]);
    let page = |synth: &Synth, n: u64| synth.page_of(phys + n * PAGE_SIZE);
    let (first, lru) = (page(&synth, 1), page(&synth, 4));
    synth.set("page", first, "page_type", BUDDY).set("page", first, "private", 1_u64);
    synth.set("page", lru, "flags", 1_u64 << 5);
    assert_eq!(kept(&synth, phys), [0, 3, 5, 6, 7], "a block of two, and one of a file");
    let head = page(&synth, 5);
    for n in [6, 7] {
        let part = page(&synth, n);
        synth.set("page", part, "compound_head", head | 1);
    }
    assert_eq!(kept(&synth, phys), [0, 3, 5, 6, 7], "a compound page of the kernel's");
    synth.set("page", head, "flags", 1_u64 << 5);
    assert_eq!(kept(&synth, phys), [0, 3], "a huge page of a program's");
}

#[test]
fn an_order_that_no_block_has_does_not_hide_memory() {
    let (mut synth, phys) = machine();
    let first = synth.page_of(phys);
    synth.set("page", first, "page_type", BUDDY).set("page", first, "private", u64::MAX);
    let kernel = open(&synth);
    // It hides what a block of the largest size would, and the walk ends.
    assert!(Autopsy::new(&kernel).kernel_pages().is_ok());
}

#[test]
fn pages_of_hugetlbfs_are_a_programs() {
    let (mut synth, phys) = machine();
    synth.enumeration("pagetype", &[("PGTY_hugetlb", 0xf4), ("PGTY_slab", 0xf5)]);
    let (head, part) = (synth.page_of(phys), synth.page_of(phys + PAGE_SIZE));
    synth.set("page", head, "page_type", 0xf4ff_ffff_u32).set("page", part, "compound_head", head | 1);
    assert_eq!(kept(&synth, phys), [2, 3, 4, 5, 6, 7]);
}

#[test]
fn pieces_are_joined_where_the_gaps_are_least() {
    let piece =
        |start: u64, end: u64| PhysRange { start: start << PAGE_SHIFT, len: (end - start) << PAGE_SHIFT };
    let found = || vec![vec![piece(0, 1), piece(2, 3), piece(9, 10)], vec![piece(10, 11)]];
    assert_eq!(few(found(), 9), found().concat());
    assert_eq!(few(found(), 3), [piece(0, 3), piece(9, 10), piece(10, 11)]);
    assert_eq!(few(found(), 0), [piece(0, 10), piece(10, 11)], "ranges of memory stay apart");
}
