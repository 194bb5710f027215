//! The general structures that every fake kernel has, shaped like those of 6.1.

use crate::{I32, PTR, Record, Synth, U8, U32, U64, array, named, volatile};

pub(crate) fn declare(synth: &mut Synth) {
    let record = Record::new;
    let union = Record::union;
    synth
        .structure("list_head", record().field("next", PTR).field("prev", PTR))
        .structure("hlist_head", record().field("first", PTR))
        .structure("hlist_node", record().field("next", PTR).field("pprev", PTR))
        .structure(
            "rb_node",
            record().field("__rb_parent_color", U64).field("rb_right", PTR).field("rb_left", PTR),
        )
        .structure("rb_root", record().field("rb_node", PTR))
        .structure("rb_root_cached", record().field("rb_root", named("rb_root")).field("rb_leftmost", PTR))
        .structure("atomic", record().field("counter", volatile(I32)))
        .typedef("atomic_t", named("atomic"))
        .structure("xarray", record().field("xa_lock", U32).field("xa_flags", U32).field("xa_head", PTR))
        .structure(
            "xa_node",
            record()
                .field("shift", U8)
                .field("offset", U8)
                .field("count", U8)
                .field("nr_values", U8)
                .field("parent", PTR)
                .field("array", PTR)
                .field("private_list", named("list_head"))
                .field("slots", array(PTR, 64))
                .anonymous(
                    union().field("tags", array(array(U64, 1), 3)).field("marks", array(array(U64, 1), 3)),
                ),
        )
        .structure(
            "maple_tree",
            record()
                .anonymous(
                    union().field("ma_lock", U32).field("ma_external_lock", crate::Type::Record(record())),
                )
                .field("ma_root", PTR)
                .field("ma_flags", U32),
        )
        .structure("maple_metadata", record().field("end", U8).field("gap", U8))
        .structure(
            "maple_range_64",
            record().field("parent", PTR).field("pivot", array(U64, 15)).anonymous(
                union()
                    .field("slot", array(PTR, 16))
                    .anonymous(record().field("pad", array(PTR, 15)).field("meta", named("maple_metadata"))),
            ),
        )
        .structure(
            "maple_arange_64",
            record()
                .field("parent", PTR)
                .field("pivot", array(U64, 9))
                .field("slot", array(PTR, 10))
                .field("gap", array(U64, 10))
                .field("meta", named("maple_metadata")),
        )
        .structure(
            "maple_node",
            record().anonymous(
                union()
                    .anonymous(record().field("parent", PTR).field("slot", array(PTR, 31)))
                    .field("mr64", named("maple_range_64"))
                    .field("ma64", named("maple_arange_64")),
            ),
        )
        .enumeration(
            "maple_type",
            &[("maple_dense", 0), ("maple_leaf_64", 1), ("maple_range_64", 2), ("maple_arange_64", 3)],
        )
        .structure(
            "page",
            record()
                .field("flags", U64)
                .anonymous(
                    union()
                        .anonymous(
                            record()
                                .field("lru", named("list_head"))
                                .field("mapping", PTR)
                                .field("index", U64)
                                .field("private", U64),
                        )
                        .anonymous(record().field("compound_head", U64))
                        // Of a page table: `ptdesc` since 6.6.
                        .anonymous(record().field("_pt_pad", array(U64, 4)).field("ptl", U32)),
                )
                .anonymous(union().field("_mapcount", named("atomic_t")).field("page_type", U32))
                .field("_refcount", named("atomic_t"))
                .size(64),
        )
        .structure(
            "slab",
            record()
                .field("__page_flags", U64)
                .field("slab_list", named("list_head"))
                .field("slab_cache", PTR)
                .field("freelist", PTR)
                .anonymous(union().field("counters", U64).anonymous(
                    record().bits("inuse", U32, 16).bits("objects", U32, 15).bits("frozen", U32, 1),
                ))
                .size(64),
        )
        .structure(
            "kmem_cache",
            record()
                .field("flags", U32)
                .field("size", U32)
                .field("object_size", U32)
                .field("red_left_pad", U32)
                .field("name", PTR)
                .field("list", named("list_head")),
        )
        .enumeration(
            "pageflags",
            &[
                ("PG_locked", 0),
                ("PG_referenced", 2),
                ("PG_uptodate", 3),
                ("PG_dirty", 4),
                ("PG_lru", 5),
                ("PG_slab", 9),
                ("PG_writeback", 15),
                ("PG_head", 16),
                ("PG_hwpoison", 22),
            ],
        );
}
