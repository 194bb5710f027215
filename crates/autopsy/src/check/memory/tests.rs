use synth::{PTR, Record, Synth, U64, named};

use super::*;
use crate::testing::open;

const ID: AddressSpaceId = AddressSpaceId(0xffff_8880_0000_1000);
const BOUNDS: (u64, u64) = (0x1000, 0x9000);

/// A mapping of a file, in a tree of three.
struct Fake {
    synth: Synth,
    vma: u64,
    mapping: u64,
    anon_vma: u64,
    parent: u64,
}

impl Fake {
    fn new() -> Self {
        let mut synth = Synth::new();
        let record = Record::new;
        synth
            .structure("shared", record().field("rb", named("rb_node")))
            .structure(
                "vm_area_struct",
                record().field("anon_vma", PTR).field("vm_file", PTR).field("shared", named("shared")),
            )
            .structure("file", record().field("f_mapping", PTR))
            .structure("count", record().field("counter", synth::I64))
            .structure("rwsem", record().field("count", named("count")))
            .structure(
                "address_space",
                record().field("i_mmap", named("rb_root_cached")).field("i_mmap_rwsem", named("rwsem")),
            )
            .structure("anon_vma", record().field("root", U64));
        let (file, mapping) = (synth.alloc("file"), synth.alloc("address_space"));
        let vmas = [0; 3].map(|_| synth.alloc("vm_area_struct"));
        let anon_vma = synth.alloc("anon_vma");
        let rb = vmas.map(|vma| synth.address_of("vm_area_struct", vma, "shared.rb"));
        synth
            .set("file", file, "f_mapping", mapping)
            .set("address_space", mapping, "i_mmap.rb_root.rb_node", rb[1])
            .set("rb_node", rb[1], "rb_left", rb[0])
            .set("rb_node", rb[1], "rb_right", rb[2])
            .set("rb_node", rb[1], "__rb_parent_color", 1_u64)
            .set("rb_node", rb[2], "__rb_parent_color", rb[1])
            .set("vm_area_struct", vmas[2], "vm_file", file)
            .set("vm_area_struct", vmas[2], "anon_vma", anon_vma)
            .set("anon_vma", anon_vma, "root", anon_vma);
        Self { synth, vma: vmas[2], mapping, anon_vma, parent: rb[1] }
    }

    fn said_of(&self, range: (u64, u64), settled: bool) -> Vec<String> {
        let kernel = open(&self.synth);
        let autopsy = Autopsy::new(&kernel);
        let belonging = autopsy.check_mapping(ID, self.vma, range, BOUNDS, settled);
        assert!(autopsy.findings().is_empty());
        let doubts = autopsy.memory_doubts.take().remove(&ID).unwrap_or_default();
        if doubts.0.is_empty() {
            assert_eq!((belonging.anon_root, belonging.mapping), (self.anon_vma, self.mapping));
        }
        doubts.0.into_iter().map(|doubt| doubt.text).collect()
    }
}

#[test]
fn a_mapping_is_where_its_tree_and_its_file_have_it() {
    let fake = Fake::new();
    assert_eq!(fake.said_of(BOUNDS, true), Vec::<String>::new());
    assert_eq!(fake.said_of((0x1000, 0xa000), true), ["the mapping 1000-9000 is in the place of 1000-a000"]);
    assert_eq!(fake.said_of((0x1000, 0xa000), false), Vec::<String>::new(), "it is being changed");
    let unknown = ["the mapping 1000-9000 is not among those that its file knows of"];
    for (ty, at, member, value) in [
        ("address_space", fake.mapping, "i_mmap.rb_root.rb_node", fake.vma),
        ("rb_node", fake.parent, "rb_right", 0),
        ("rb_node", fake.parent, "__rb_parent_color", fake.parent),
    ] {
        let mut synth = fake.synth.clone();
        synth.set(ty, at, member, value);
        let mut damaged = Fake { synth, ..fake };
        assert_eq!(damaged.said_of(BOUNDS, true), unknown, "{member}");
        damaged.synth.set("address_space", fake.mapping, "i_mmap_rwsem.count.counter", 1);
        assert_eq!(damaged.said_of(BOUNDS, true), Vec::<String>::new(), "the tree is being changed");
    }
    let mut synth = fake.synth.clone();
    synth.set("vm_area_struct", fake.vma, "vm_file", 8_u64);
    assert!(Fake { synth, ..fake }.said_of(BOUNDS, true)[0].contains("cannot read"));
}
