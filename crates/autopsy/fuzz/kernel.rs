//! Hostile names, modules, lists and trees, in a small fake kernel: the input says what stands where.

#![no_main]

#[path = "memory/overlay.rs"]
#[allow(dead_code, reason = "the mutations of captured memory use the rest")]
mod overlay;

use std::sync::{Arc, LazyLock};

use ktypes::Kernel;
use libfuzzer_sys::fuzz_target;
use overlay::{Account, Overlay};
use synth::{Record, Synth, U8, U32, U64, XaItem, array, named};
use vmcore::Vmcore;

/// More elements no walk may return.
const MOST: usize = 1000;

struct World {
    core: Arc<Vmcore>,
    /// Physical: where the objects are, and the tables of names and types.
    objects: std::ops::Range<u64>,
    image: std::ops::Range<u64>,
    page_offset: u64,
    list: u64,
    hlist: u64,
    tree: u64,
    array: u64,
    maple: u64,
    task: u64,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
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
        .structure("task_struct", Record::new().field("pid", U32).field_at(512, "tasks", named("list_head")));
    synth.structure(
        "mod_kallsyms",
        Record::new()
            .field("symtab", U64)
            .field("num_symtab", U32)
            .field("strtab", U64)
            .field("typetab", U64),
    );
    synth.structure("module_layout", Record::new().field("base", U64).field("size", U32));
    synth.structure(
        "module",
        Record::new()
            .field("state", U32)
            .field("list", named("list_head"))
            .field("name", array(U8, 56))
            .field("core_kallsyms", named("mod_kallsyms_pointers"))
            .field("core_layout", named("module_layout"))
            .field("btf_data", U64)
            .field("btf_data_size", U32),
    );
    synth.structure(
        "mod_kallsyms_pointers",
        Record::new()
            .field("symtab", U64)
            .field("num_symtab", U32)
            .field("strtab", U64)
            .field("typetab", U64),
    );
    let begin = synth.alloc_bytes(8, 4096);
    let head = synth.alloc("item");
    let list = synth.list_init("item", head, "node");
    let hlist = synth.alloc("hlist_head");
    let tree = synth.alloc("rb_root");
    let mut nodes = Vec::new();
    for _ in 0..6 {
        let item = synth.alloc("item");
        let node = synth.address_of("item", item, "node");
        synth.list_add_tail(node, list);
        let node = synth.address_of("item", item, "hash");
        synth.hlist_add_head(node, hlist);
        nodes.push(synth.address_of("item", item, "rb"));
    }
    synth.rb_tree(tree, &nodes);
    let array = synth.alloc("xarray");
    let entry = |index| XaItem { index, order: 0, entry: head, marks: 1 };
    synth.xarray(array, &[entry(0), entry(1), entry(70), entry(5000)]);
    let maple = synth.alloc("maple_tree");
    let entries: Vec<_> = (0..40).map(|i| (i * 10, i * 10 + 5, head)).collect();
    synth.maple_tree(maple, &entries);
    // Modules with two symbols each.
    let modules = synth.variable("modules", "list_head");
    synth.write_u64(modules, modules);
    synth.write_u64(modules + 8, modules);
    for name in ["one", "two"] {
        let module = synth.alloc("module");
        synth.set("module", module, "name", name);
        let symbols = synth.alloc_bytes(72, 8);
        let strings = synth.alloc_bytes(32, 8);
        let kinds = synth.alloc_bytes(8, 8);
        synth.write(strings, b"\0first\0second\0");
        synth.write(kinds, b"tTd");
        for (i, text) in [0u64, 1, 7].into_iter().enumerate() {
            synth.write_u64(symbols + i as u64 * 24, text | 1 << 48);
            synth.write_u64(symbols + i as u64 * 24 + 8, 0xffff_ffff_c000_0000 + text * 16);
        }
        synth.set("module", module, "core_kallsyms.symtab", symbols);
        synth.set("module", module, "core_kallsyms.num_symtab", 3);
        synth.set("module", module, "core_kallsyms.strtab", strings);
        synth.set("module", module, "core_kallsyms.typetab", kinds);
        synth.set("module", module, "core_layout.base", 0xffff_ffff_c000_0000u64);
        synth.set("module", module, "core_layout.size", 0x1000);
        let node = synth.address_of("module", module, "list");
        synth.list_add_tail(node, modules);
    }
    let cache = synth.slab_cache("task_struct", synth.size_of("task_struct"));
    let task = synth.slab_alloc(cache);
    let end = synth.alloc_bytes(8, 4096);
    let image = synth.image();
    World {
        objects: synth.phys(begin)..synth.phys(end),
        image: image.start..image.start + (256 << 10),
        page_offset: synth.page_offset(),
        core: Arc::new(synth.build()),
        list,
        hlist,
        tree,
        array,
        maple,
        task,
    }
});

fuzz_target!(|bytes: &[u8]| {
    let world = &*WORLD;
    let mut changed = Vec::new();
    // Each 12 bytes are one word: where, what kind of value, and which.
    for piece in bytes.chunks_exact(12) {
        let at = u64::from(u16::from_le_bytes([piece[0], piece[1]])) << 1 | u64::from(piece[2] & 1);
        let value = u64::from_le_bytes([
            piece[4], piece[5], piece[6], piece[7], piece[8], piece[9], piece[10], piece[11],
        ]);
        let place = match piece[2] >> 1 & 1 {
            0 => world.objects.start + at * 8 % (world.objects.end - world.objects.start),
            _ => world.image.start + at * 8 % (world.image.end - world.image.start),
        };
        let object =
            world.page_offset + world.objects.start + value % (world.objects.end - world.objects.start);
        let value = match piece[3] % 8 {
            0 => value,
            1 => object,
            2 => object & !7,
            3 => object & !0xff | value & 0x7e,
            4 => object & !3 | 2,
            5 => value % 5000,
            6 => world.page_offset.wrapping_add(place),
            _ => value as i32 as u64,
        };
        let len = if piece[2] & 4 != 0 { 1 } else { 8 };
        changed.extend((place..).zip(value.to_le_bytes().into_iter().take(len)));
    }
    let account = Arc::new(Account::default());
    let overlay = Overlay::new(world.core.clone(), account.clone(), &changed);
    let core = overlay.into_core(world.core.info().clone(), world.core.prstatus().to_vec());
    let Ok(kernel) = Kernel::open(core) else { return };
    _ = (kernel.online_cpus(), kernel.possible_cpus(), kernel.pte_format(), kernel.nr_cpus());
    for name in ["init_task", "first", "second", "nothing"] {
        _ = kernel.symbol_opt(name);
    }
    for addr in [0xffff_ffff_c000_0010, 0xffff_ffff_c000_0070, world.list, 0xffff_ffff_b500_0100] {
        _ = (kernel.symbol_at(addr), kernel.symbolize(addr), kernel.module_of(addr), kernel.symbols_at(addr));
    }
    _ = kernel.size_of("nothing");
    assert!(kernel.list_head(world.list, MOST).count() <= MOST + 1);
    assert!(kernel.hlist(world.hlist, MOST).count() <= MOST + 1);
    assert!(kernel.rb_tree(world.tree, MOST).count() <= MOST + 1);
    let mut count = 0;
    _ = kernel.maple_for_each(world.maple, MOST, |_, _, _| {
        count += 1;
        Ok(())
    });
    assert!(count <= MOST);
    count = 0;
    _ = kernel.xarray_for_each(world.array, MOST, |_, _| {
        count += 1;
        Ok(())
    });
    assert!(count <= MOST);
    _ = (kernel.xarray_dirty(world.array), kernel.slab_cache_of(world.task), kernel.page_tables(world.list));
    let reads = account.reads.load(std::sync::atomic::Ordering::Relaxed);
    assert!(reads < 200_000, "{reads} reads");
});
