//! Lists, trees, pages and slabs, whole and broken, on fakes.

use ktypes::{Corruption, Error, Kernel, XaEntry};
use proptest::prelude::*;
use synth::{PTR, Record, Synth, U64, XaItem, named};

fn open(synth: &Synth) -> Kernel {
    Kernel::open(synth.build()).unwrap()
}

fn synth() -> Synth {
    let mut synth = Synth::new();
    synth.structure(
        "item",
        Record::new()
            .field("value", U64)
            .field_at(256, "node", named("list_head"))
            .field("hash", named("hlist_node"))
            .field("rb", named("rb_node")),
    );
    synth
}

/// Items the address of whose member is returned.
fn items(synth: &mut Synth, count: usize, member: &str) -> Vec<u64> {
    (0..count)
        .map(|_| {
            let item = synth.alloc("item");
            synth.address_of("item", item, member)
        })
        .collect()
}

fn collect(items: impl Iterator<Item = ktypes::Result<u64>>) -> (Vec<u64>, Option<Error>) {
    let mut good = Vec::new();
    for item in items {
        match item {
            Ok(item) => good.push(item),
            Err(error) => return (good, Some(error)),
        }
    }
    (good, None)
}

#[test]
fn lists() {
    let mut synth = synth();
    let head_item = synth.alloc("item");
    let head = synth.list_init("item", head_item, "node");
    assert_eq!(open(&synth).list_head(head, 0).count(), 0);
    let nodes = items(&mut synth, 5, "node");
    for node in &nodes {
        synth.list_add_tail(*node, head);
    }
    let whole = synth.clone();
    let kernel = open(&whole);
    assert_eq!(collect(kernel.list_head(head, 5)).0, nodes);
    let (good, error) = collect(kernel.list_head(head, 4));
    assert_eq!(good, nodes[..4]);
    assert!(
        matches!(error, Some(Error::CorruptList { head: h, why: Corruption::TooLong { max: 4 } }) if h == head)
    );

    // A cycle that does not have the head in it: every node comes once, then the error.
    let mut synth = whole.clone();
    synth.write_u64(nodes[3], nodes[1]);
    let kernel = open(&synth);
    let mut list = kernel.list_head(head, 1000);
    let (good, error) = collect(&mut list);
    assert_eq!(good, nodes[..4]);
    let cycle = Corruption::Cycle { node: nodes[1] };
    assert!(matches!(error, Some(Error::CorruptList { why, .. }) if why == cycle));
    assert!(list.next().is_none());

    // Wild pointers: NULL, poison, user space, unaligned, unmapped.
    for wild in [0, 0xdead_0000_0000_0100, 0x7fff_0000_1000, nodes[0] + 1, synth.page_offset() + (1 << 40)] {
        let mut synth = whole.clone();
        synth.write_u64(nodes[2], wild);
        let kernel = open(&synth);
        let (good, error) = collect(kernel.list_head(head, 1000));
        assert_eq!(good[..3], nodes[..3]);
        // What looks like a kernel address comes out, since only following it tells.
        assert!(good.len() <= 4);
        match error {
            Some(Error::CorruptList { why: Corruption::WildPointer { node, .. }, .. }) => {
                assert_eq!(node, wild)
            }
            other => panic!("{wild:#x}: {other:?}"),
        }
    }
    // A wild head is the caller's.
    let kernel = open(&whole);
    assert!(matches!(kernel.list_head(0x10, 10).next(), Some(Err(Error::Unreadable { .. }))));
}

#[test]
fn hlists() {
    let mut synth = synth();
    let head = synth.alloc("hlist_head");
    assert_eq!(open(&synth).hlist(head, 0).count(), 0);
    let nodes = items(&mut synth, 3, "hash");
    for node in nodes.iter().rev() {
        synth.hlist_add_head(*node, head);
    }
    let kernel = open(&synth);
    assert_eq!(collect(kernel.hlist(head, 3)).0, nodes);
    assert!(matches!(
        collect(kernel.hlist(head, 2)).1,
        Some(Error::CorruptList { why: Corruption::TooLong { max: 2 }, .. })
    ));
    // The end of a hlist_nulls.
    let mut nulls = synth.clone();
    nulls.set("hlist_node", nodes[2], "next", 77u64);
    assert_eq!(collect(open(&nulls).hlist(head, 9)).0, nodes);
    synth.set("hlist_node", nodes[2], "next", nodes[0]);
    let (good, error) = collect(open(&synth).hlist(head, 9));
    assert_eq!(good, nodes);
    assert!(matches!(error, Some(Error::CorruptList { why: Corruption::Cycle { .. }, .. })));
}

#[test]
fn rb_trees() {
    for count in [0, 1, 2, 3, 10, 100] {
        let mut synth = synth();
        let root = synth.alloc("rb_root");
        let nodes = items(&mut synth, count, "rb");
        synth.rb_tree(root, &nodes);
        let kernel = open(&synth);
        let (good, error) = collect(kernel.rb_tree(root, count));
        assert!(error.is_none(), "{error:?}");
        assert_eq!(good, nodes);
        if count > 3 {
            let (good, error) = collect(kernel.rb_tree(root, 3));
            assert_eq!(good, nodes[..3]);
            assert!(matches!(error, Some(Error::CorruptTree { why: Corruption::TooLong { max: 3 }, .. })));
            // The leftmost node's left child is the root.
            let mut synth = synth.clone();
            synth.set("rb_node", nodes[0], "rb_left", nodes[count / 2]);
            let (good, error) = collect(open(&synth).rb_tree(root, 1000));
            assert!(good.is_empty());
            let root_node = nodes[count / 2];
            assert!(
                matches!(error, Some(Error::CorruptTree { why: Corruption::Cycle { node }, .. }) if node == root_node)
            );
            // And the rightmost's right one: nothing gets deeper by that.
            let mut right = synth.clone();
            right.set("rb_node", nodes[0], "rb_left", 0u64);
            right.set("rb_node", nodes[count - 1], "rb_right", root_node);
            let (good, error) = collect(open(&right).rb_tree(root, usize::MAX));
            assert_eq!(good, nodes[..count - 1]);
            assert!(matches!(error, Some(Error::CorruptTree { why: Corruption::Cycle { .. }, .. })));
            // A wild one on the right.
            synth.set("rb_node", nodes[0], "rb_left", 0u64).set("rb_node", nodes[0], "rb_right", 0x1234u64);
            let (_, error) = collect(open(&synth).rb_tree(root, 1000));
            assert!(matches!(
                error,
                Some(Error::CorruptTree {
                    kind: "rb-tree",
                    why: Corruption::WildPointer { node: 0x1234, .. },
                    ..
                })
            ));
        }
    }
}

fn maple(kernel: &Kernel, tree: u64, max: usize) -> ktypes::Result<Vec<(u64, u64, u64)>> {
    let mut entries = Vec::new();
    kernel.maple_for_each(tree, max, |first, last, entry| {
        entries.push((first, last, entry));
        Ok(())
    })?;
    Ok(entries)
}

#[test]
fn maple_trees_of_any_size() {
    for count in [0u64, 1, 2, 7, 8, 15, 16, 40, 150, 1600] {
        let mut synth = synth();
        let tree = synth.alloc("maple_tree");
        let object = synth.alloc("item");
        let entries: Vec<_> = (0..count)
            .map(|i| {
                let base = 0x40_0000 + i * 0x1_0000;
                // Every third touches the next one.
                let last = if i % 3 == 2 { base + 0xffff } else { base + 0xefff };
                (base + i % 3 * 0x1000, last, object + i * 8)
            })
            .collect();
        synth.maple_tree(tree, &entries);
        let kernel = open(&synth);
        assert_eq!(maple(&kernel, tree, count as usize).unwrap(), entries);
        if count > 0 {
            let error = maple(&kernel, tree, count as usize - 1).unwrap_err();
            assert!(matches!(error, Error::CorruptTree { why: Corruption::TooLong { .. }, .. }));
        }
    }
}

#[test]
fn maple_nodes_of_all_types() {
    let mut synth = synth();
    let tree = synth.alloc("maple_tree");
    let object = synth.alloc("item");
    // An arange_64 above a range_64 above leaves; one leaf is full, with a pivot in each place and
    // an entry in the last slot; one dense node at the end.
    let full: Vec<(u64, u64)> = (0..16).map(|i| (100 + i, object + i * 8)).collect();
    let full = synth.maple_node(1, &full);
    let sparse = synth.maple_node(1, &[(199, 0), (299, object), (u64::MAX, 0)]);
    let leaf_to_end_of_parent = synth.maple_node(1, &[(999, object + 8)]);
    let range = synth.maple_node(2, &[(115, full), (399, sparse), (u64::MAX, leaf_to_end_of_parent)]);
    let dense: Vec<(u64, u64)> = (0..31).map(|i| (0, if i % 10 == 3 { object + i * 8 } else { 0 })).collect();
    let dense = synth.maple_node(0, &dense);
    // Indices 0 to 99 hold nothing but a reserved (zero) entry.
    let first = synth.maple_node(1, &[(49, 0), (59, 1030), (99, 0)]);
    let root = synth.maple_node(3, &[(99, first), (999, range), (1030, dense), (u64::MAX, 0)]);
    synth.set("maple_tree", tree, "ma_root", root | 2);
    let kernel = open(&synth);
    let mut expected: Vec<_> = (0..16).map(|i| (100 + i, 100 + i, object + i * 8)).collect();
    expected.extend([(200, 299, object), (400, 999, object + 8)]);
    expected.extend([3, 13, 23].map(|i| (1000 + i, 1000 + i, object + i * 8)));
    assert_eq!(maple(&kernel, tree, 100).unwrap(), expected);

    // The root itself can be an entry, for index 0.
    for (root, entries) in [(0, vec![]), (object, vec![(0, 0, object)]), (1030, vec![]), (7, vec![(0, 0, 7)])]
    {
        synth.set("maple_tree", tree, "ma_root", root);
        assert_eq!(maple(&open(&synth), tree, 100).unwrap(), entries);
    }
}

#[test]
fn broken_maple_trees() {
    let mut synth = synth();
    let tree = synth.alloc("maple_tree");
    let object = synth.alloc("item");
    let leaf = synth.maple_node(1, &[(99, object), (u64::MAX, 0)]);
    let mut broken = |root: u64| -> Corruption {
        synth.set("maple_tree", tree, "ma_root", root);
        match maple(&open(&synth), tree, 50).unwrap_err() {
            Error::CorruptTree { kind: "maple tree", root, why } if root == tree => why,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(broken(0x1234_5600 | 1 << 3 | 2), Corruption::WildPointer { node: 0x1234_5600, .. }));
    assert!(matches!(broken(leaf & !0xff | 9 << 3 | 6), Corruption::BadNode { .. }));
    // A child that is of an unknown type, or nowhere.
    let mut synth = super_synth(&[(99, leaf & !0x78 | 15 << 3), (u64::MAX, 0)]);
    assert!(matches!(error_of(&synth), Corruption::BadNode { .. }));
    synth = super_synth(&[(99, 0xffff_8d00_0000_0000 | 1 << 3 | 4), (u64::MAX, 0)]);
    assert!(matches!(error_of(&synth), Corruption::WildPointer { .. }));
    // Pivots that do not ascend.
    synth = super_synth(&[(99, 0), (50, 0), (u64::MAX, 0)]);
    assert!(matches!(error_of(&synth), Corruption::BadNode { why, .. } if why.contains("ascend")));

    // A node that is its own child, in one place and in all.
    for slots in [1, 10] {
        let mut synth = self::synth();
        let tree = synth.alloc("maple_tree");
        let node = synth.maple_node(3, &[(u64::MAX, 0)]);
        for i in 0..slots {
            synth.set("maple_arange_64", node & !0xff, &format!("slot[{i}]"), node);
            if i + 1 < slots {
                synth.set("maple_arange_64", node & !0xff, &format!("pivot[{i}]"), i);
            }
        }
        synth.set("maple_tree", tree, "ma_root", node | 2);
        let error = maple(&open(&synth), tree, 50).unwrap_err();
        assert!(matches!(error, Error::CorruptTree { why: Corruption::Cycle { .. }, .. }), "{error}");
    }
}

const TREE: &str = "the_tree";

/// A kernel with a tree whose root has these slots.
fn super_synth(slots: &[(u64, u64)]) -> Synth {
    let mut synth = synth();
    let tree = synth.variable(TREE, "maple_tree");
    let root = synth.maple_node(2, slots);
    synth.set("maple_tree", tree, "ma_root", root | 2);
    synth
}

fn error_of(synth: &Synth) -> Corruption {
    let kernel = open(synth);
    match maple(&kernel, kernel.symbol(TREE).unwrap(), 50).unwrap_err() {
        Error::CorruptTree { why, .. } => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_walk_ends_with_its_callers_error() {
    let mut synth = synth();
    let tree = synth.alloc("maple_tree");
    synth.maple_tree(tree, &[(1, 2, 0x1000), (3, 4, 0x2000)]);
    let array = synth.alloc("xarray");
    synth.xarray(array, &[item(0, 0, 8), item(1, 0, 16)]);
    let kernel = open(&synth);
    let mut calls = 0;
    let mut fail = || {
        calls += 1;
        kernel.symbol("nothing").map(drop)
    };
    let result = kernel.maple_for_each(tree, 10, |_, _, _| fail());
    assert!(matches!(result, Err(Error::MissingSymbol { .. })));
    let result = kernel.xarray_for_each(array, 10, |_, _| fail());
    assert!(matches!(result, Err(Error::MissingSymbol { .. })));
    assert_eq!(calls, 2);
}

fn item(index: u64, order: u32, entry: u64) -> XaItem {
    XaItem { index, order, entry, marks: 0 }
}

fn xarray(kernel: &Kernel, array: u64, max: usize) -> ktypes::Result<Vec<(u64, XaEntry)>> {
    let mut entries = Vec::new();
    kernel.xarray_for_each(array, max, |index, entry| {
        entries.push((index, entry));
        Ok(())
    })?;
    Ok(entries)
}

fn check_xarray(items: &[XaItem]) {
    let mut synth = synth();
    let array = synth.alloc("xarray");
    synth.xarray(array, items);
    let kernel = open(&synth);
    let expected: Vec<_> = items
        .iter()
        .map(|item| {
            let last = item.index + (1 << item.order) - 1;
            (item.index, XaEntry { raw: item.entry, last, marks: item.marks })
        })
        .collect();
    assert_eq!(xarray(&kernel, array, items.len()).unwrap(), expected);
    for mark in 0..3 {
        let any = items.iter().any(|item| item.marks >> mark & 1 != 0);
        assert_eq!(kernel.xarray_marked(array, mark).unwrap(), any, "mark {mark} of {items:?}");
    }
    assert!(!kernel.xarray_marked(array, 3).unwrap());
    assert_eq!(kernel.xarray_dirty(array).unwrap(), items.iter().any(|item| item.marks & 1 != 0));
    if !items.is_empty() && (items.len() > 1 || items[0].index > 0) {
        let error = xarray(&kernel, array, items.len() - 1).unwrap_err();
        assert!(matches!(error, Error::CorruptTree { why: Corruption::TooLong { .. }, .. }));
    }
}

#[test]
fn xarrays() {
    let page = 0xffff_ea00_0001_0000;
    check_xarray(&[]);
    check_xarray(&[item(0, 0, page)]);
    check_xarray(&[XaItem { marks: 0b001, ..item(0, 0, page) }]);
    check_xarray(&[XaItem { marks: 0b110, ..item(0, 0, page) }]);
    check_xarray(&[item(1, 0, page)]);
    check_xarray(&[item(0, 0, page), XaItem { marks: 1, ..item(63, 0, page + 64) }]);
    check_xarray(&[item(64, 0, page), item(1 << 40, 0, page + 64), item((1 << 40) + 1, 0, 5 << 1 | 1)]);
    // Large folios: within a node, a whole slot of a higher node, several of them.
    check_xarray(&[
        XaItem { marks: 0b010, ..item(0, 2, page) },
        item(4, 0, page + 64),
        item(8, 3, page + 128),
        item(64, 6, page + 192),
        XaItem { marks: 0b100, ..item(512, 9, page + 256) },
        item(1024, 4, page + 512),
    ]);
    // A large folio alone at 0 needs a node.
    check_xarray(&[XaItem { marks: 1, ..item(0, 2, page) }]);

    let entry = XaEntry { raw: 5 << 1 | 1, last: 0, marks: 0 };
    assert_eq!((entry.value(), entry.pointer()), (Some(5), None));
    let entry = XaEntry { raw: page, last: 0, marks: 0 };
    assert_eq!((entry.value(), entry.pointer()), (None, Some(page)));
}

#[test]
fn broken_xarrays() {
    let page = 0xffff_ea00_0001_0000;
    let mut synth = synth();
    let array = synth.alloc("xarray");
    synth.xarray(array, &[item(0, 0, page), item(100, 0, page)]);
    let head = synth.get_u64("xarray", array, "xa_head");
    let error = |synth: &Synth| match xarray(&open(synth), array, 50).unwrap_err() {
        Error::CorruptTree { kind: "xarray", root, why } if root == array => why,
        other => panic!("{other:?}"),
    };
    // A node that is its own child: its shift gives it away.
    let mut broken = synth.clone();
    broken.set("xa_node", head - 2, "slots[5]", head);
    assert!(matches!(error(&broken), Corruption::BadNode { .. }));
    broken.set("xa_node", head - 2, "slots[5]", 0u64).set("xa_node", head - 2, "shift", 200u8);
    assert!(matches!(error(&broken), Corruption::BadNode { .. }));
    let mut broken = synth.clone();
    broken.set("xarray", array, "xa_head", 0xffff_8d00_0000_0002u64);
    assert!(matches!(error(&broken), Corruption::WildPointer { .. }));
    assert!(open(&broken).xarray_marked(array, 0).is_err());
    // A node in two places: a tree of such nodes, each with itself in all places of the one above, is walked for ever.
    let mut broken = synth.clone();
    let child = broken.get_u64("xa_node", head - 2, "slots[1]");
    broken.set("xa_node", head - 2, "slots[9]", child);
    assert!(matches!(error(&broken), Corruption::Cycle { node } if node == child - 2));
    // Retry and zero entries are skipped.
    synth.set("xa_node", head - 2, "slots[7]", 256u64 << 2 | 2).set(
        "xa_node",
        head - 2,
        "slots[8]",
        257u64 << 2 | 2,
    );
    assert_eq!(xarray(&open(&synth), array, 50).unwrap().len(), 2);
    synth.set("xarray", array, "xa_head", 1030u64);
    assert_eq!(xarray(&open(&synth), array, 50).unwrap().len(), 0);
}

#[test]
fn an_xarray_node_whose_shift_does_not_fit_its_parents_is_refused() {
    let page = 0xffff_ea00_0001_0000;
    let mut synth = synth();
    let array = synth.alloc("xarray");
    // Nodes of shifts 12, 6 and 0.
    synth.xarray(array, &[item(0, 0, page), item(1 << 12, 0, page)]);
    let head = synth.get_u64("xarray", array, "xa_head") - 2;
    let middle = synth.get_u64("xa_node", head, "slots[0]") - 2;
    let leaf = synth.get_u64("xa_node", middle, "slots[0]") - 2;
    assert_eq!(xarray(&open(&synth), array, 10).unwrap().len(), 2);
    // Lower than the parent's is not enough, nor is what a node at another level has.
    for (node, own, others) in [(head, 12, [1, 8, 11]), (middle, 6, [0, 5, 12]), (leaf, 0, [1, 6, 12])] {
        for other in others {
            synth.set("xa_node", node, "shift", other);
            let error = xarray(&open(&synth), array, 10).unwrap_err();
            assert!(
                matches!(&error, Error::CorruptTree { why: Corruption::BadNode { node: at, .. }, .. } if *at == node),
                "{other} in place of {own}: {error}"
            );
        }
        synth.set("xa_node", node, "shift", own);
    }
    assert_eq!(xarray(&open(&synth), array, 10).unwrap().len(), 2);
}

#[test]
fn pages_and_slabs() {
    for mut synth in [synth(), Synth::five_level()] {
        synth.structure("task_struct", Record::new().field("pid", U64).size(2900));
        let size = synth.size_of("task_struct");
        let cache = synth.slab_cache("task_struct", size);
        let first = synth.slab_alloc(cache);
        let task = synth.slab_alloc(cache);
        let third = synth.slab_alloc(cache);
        let elsewhere = synth.alloc("task_struct");
        let kernel = open(&synth);
        for (addr, start) in [(first, first), (task, task), (task + size - 1, task), (third + 8, third)] {
            let object = kernel.slab_cache_of(addr).unwrap();
            assert_eq!(object.cache_name, "task_struct");
            assert_eq!((object.cache, object.object_start, object.object_size), (cache, start, size));
            assert_eq!(object.starts_at(addr), addr == start);
        }
        // Padding between objects, the rest behind the last one, no slab, no memory, vmalloc, NULL.
        let objects = 8 * 4096 / size.next_multiple_of(64);
        let behind = first + objects * size.next_multiple_of(64);
        for addr in [task + size, behind, elsewhere, 0, u64::MAX, kernel.symbol("init_top_pgt").unwrap()] {
            assert_eq!(kernel.slab_cache_of(addr), None, "{addr:#x}");
        }
        assert_eq!(kernel.slab_cache_of(synth.page_offset() + (1 << 40)), None);

        // Red zones push the object away from the beginning of its place.
        let mut padded = synth.clone();
        padded.set("kmem_cache", cache, "size", size.next_multiple_of(64) + 64);
        padded.set("kmem_cache", cache, "red_left_pad", 64);
        let kernel = open(&padded);
        assert_eq!(kernel.slab_cache_of(first), None);
        assert!(kernel.slab_cache_of(first + 64).unwrap().starts_at(first + 64));
        // A cache with impossible numbers.
        padded.set("kmem_cache", cache, "size", 0);
        assert_eq!(open(&padded).slab_cache_of(first), None);
        padded.set("slab", padded.page_of(padded.phys(first)), "slab_cache", 0x1000u64);
        assert_eq!(open(&padded).slab_cache_of(first), None);

        let phys = synth.phys(task);
        let kernel = open(&synth);
        let page = kernel.pfn_to_page(phys >> 12);
        assert_eq!(page, synth.page_of(phys));
        assert_eq!(kernel.page_to_pfn(page).unwrap(), phys >> 12);
        for wild in [page + 1, 0, 0x1000, u64::MAX] {
            assert!(kernel.page_to_pfn(wild).is_err(), "{wild:#x}");
        }
        assert_eq!(
            kernel.compound_head(synth.page_of(synth.phys(first) + 4096)).unwrap(),
            synth.page_of(synth.phys(first))
        );
    }
}

#[test]
fn slabs_of_newer_kernels() {
    let mut synth = synth();
    synth
        .enumeration("pageflags", &[("PG_locked", 0), ("PG_head", 6)])
        .enumeration("pagetype", &[("PGTY_buddy", 0xf0), ("PGTY_slab", 0xf5)])
        .structure(
            "page",
            Record::new()
                .field("flags", U64)
                .field("compound_head", U64)
                .field_at(48, "page_type", synth::U32)
                .size(64),
        );
    let cache = synth.slab_cache("mm_struct", 1000);
    let object = synth.slab_alloc(cache);
    assert_eq!(open(&synth).slab_cache_of(object), None);
    let head = synth.page_of(synth.phys(object));
    synth.set("page", head, "page_type", 0xf5u32 << 24);
    assert_eq!(open(&synth).slab_cache_of(object).unwrap().cache_name, "mm_struct");
    synth.set("page", head, "page_type", 0xf0u32 << 24);
    assert_eq!(open(&synth).slab_cache_of(object), None);
}

#[test]
fn user_page_tables_through_the_kernel() {
    let mut synth = Synth::five_level();
    synth.structure("mm_struct", Record::new().field("pgd", PTR));
    let pgd = synth.new_pgd();
    let phys = synth.map_user_page(pgd, 0x40_0000, b"user memory");
    let kernel = open(&synth);
    let tables = kernel.page_tables(pgd).unwrap();
    assert_eq!(tables.translate(0x40_0005).unwrap(), phys + 5);
    let mut bytes = [0; 6];
    kernel.phys().read_phys(phys + 5, &mut bytes).unwrap();
    assert_eq!(&bytes, b"memory");
    assert!(kernel.page_tables(0x1000).is_err());
    let format = kernel.pte_format();
    assert_eq!(tables.lookup(0x40_0000).unwrap().unwrap().phys(&format), Some(phys));
    // 6.1 without CONFIG_MEMORY_FAILURE and CONFIG_DEVICE_PRIVATE.
    assert_eq!((format.special.max_swapfiles, format.special.migration), (27, Some(27)));
    synth.info_line("NUMBER(PG_hwpoison)=21").release("6.12.1");
    assert_eq!(open(&synth).pte_format().special.hwpoison, Some(27));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever stands in the nodes of trees and lists, the walks end without a panic.
    #[test]
    fn damaged_nodes_end(damage in proptest::collection::vec((0u64..0x2400, any::<u64>(), 0u8..4), 1..40)) {
        let mut synth = synth();
        let start = synth.alloc_bytes(8, 4096);
        let tree = synth.alloc("maple_tree");
        let array = synth.alloc("xarray");
        let root = synth.alloc("rb_root");
        let head_item = synth.alloc("item");
        let head = synth.list_init("item", head_item, "node");
        let object = synth.alloc("item");
        let entries: Vec<_> = (0..60).map(|i| (i * 10, i * 10 + 5, object)).collect();
        synth.maple_tree(tree, &entries);
        let pages: Vec<_> = (0..100).map(|i| item(i * 7, 0, object)).collect();
        synth.xarray(array, &pages);
        let nodes = items(&mut synth, 5, "rb");
        synth.rb_tree(root, &nodes);
        let nodes = items(&mut synth, 5, "node");
        for node in nodes {
            synth.list_add_tail(node, head);
        }
        for (at, value, kind) in damage {
            let at = start + at / 8 * 8;
            let value = match kind {
                0 => value,
                1 => start + value % 0x2400,
                2 => (start + value % 0x2400) & !0xff | value & 0x7e,
                _ => value % 5000,
            };
            synth.write_u64(at, value);
        }
        let kernel = open(&synth);
        let _ = maple(&kernel, tree, 1000);
        let _ = xarray(&kernel, array, 1000);
        let _ = kernel.xarray_dirty(array);
        prop_assert!(kernel.rb_tree(root, 1000).count() <= 1001);
        prop_assert!(kernel.list_head(head, 1000).count() <= 1001);
    }
}
