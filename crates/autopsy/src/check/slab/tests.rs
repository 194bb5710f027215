use synth::{Record, Synth, U64, array};

use super::*;
use crate::testing::open;

/// A cache of `cred`s in its variable, with two objects, and one of something else with one.
fn machine() -> (Synth, [u64; 3]) {
    let mut synth = Synth::new();
    synth.structure("cred", Record::new().field("words", array(U64, 20)));
    let cache = synth.slab_cache("cred_jar", 160);
    let other = synth.slab_cache("filp", 160);
    let variable = synth.variable("cred_jar", "list_head");
    synth.write_u64(variable, cache);
    let objects = [synth.slab_alloc(cache), synth.slab_alloc(cache), synth.slab_alloc(other)];
    (synth, objects)
}

fn why(synth: &Synth, addr: u64) -> Option<String> {
    let kernel = open(synth);
    Autopsy::new(&kernel).slab_contradiction(CRED, addr)
}

#[test]
fn objects_begin_where_their_cache_has_them() {
    let (mut synth, [first, second, other]) = machine();
    assert_eq!(why(&synth, first), None);
    assert_eq!(why(&synth, second), None);
    assert!(why(&synth, first + 16).is_some_and(|why| why.contains("amid")));
    assert!(why(&synth, other).is_some_and(|why| why.contains("`filp`")));
    let page = synth.alloc_bytes(4096, 4096);
    assert!(why(&synth, page).is_some_and(|why| why.contains("no slab")));
    assert!(why(&synth, 8).is_some());
    let first = synth.variable("init_cred", "cred");
    assert_eq!(why(&synth, first), None, "the first one of all is the image's");
}

#[test]
fn a_damaged_variable_is_not_held_against_the_objects() {
    let (synth, [first, _, other]) = machine();
    let mut without = synth.clone();
    without.without_symbol("cred_jar");
    assert_eq!(why(&without, other), None);
    let kernel = open(&synth);
    let variable = kernel.symbol("cred_jar").unwrap();
    for wild in [0, 8, first] {
        let mut damaged = synth.clone();
        damaged.write_u64(variable, wild);
        assert_eq!(why(&damaged, first), None, "{wild:#x}");
    }
}

#[test]
fn what_lies_in_the_pool_of_kfence_cannot_be_told() {
    let (mut synth, [_, _, other]) = machine();
    let pool = synth.variable("__kfence_pool", "list_head");
    synth.write_u64(pool, other - 0x1000);
    assert_eq!(why(&synth, other), None);
    synth.write_u64(pool, other + 8);
    assert!(why(&synth, other).is_some());
}
