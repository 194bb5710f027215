//! Page tables: all levels, all leaf sizes, everything that Linux puts into entries.

use synth::Synth;
use vmcore::{
    Entry, EntryKind, Error, LastTable, NotMapped, PageSize, PageTables, PteFormat, SpecialEntries, Vmcore,
};

const PRESENT: u64 = 1;
const RW_USER: u64 = 6;
const PSE: u64 = 1 << 7;
const PROTNONE: u64 = 1 << 8;
const NX: u64 = 1 << 63;
const G: u64 = 1 << 30;
const M: u64 = 1 << 20;

struct Space {
    synth: Synth,
    pgd: u64,
    levels: u8,
}

impl Space {
    fn each(test: impl Fn(Space)) {
        for (mut synth, levels) in [(Synth::new(), 4), (Synth::five_level(), 5)] {
            let pgd = synth.new_pgd();
            test(Space { synth, pgd, levels });
        }
    }

    fn map(&mut self, va: u64, size: PageSize, pte: u64) {
        self.synth.map(self.pgd, va, size, pte);
    }

    fn with_tables<R>(&self, test: impl FnOnce(&PageTables<'_>) -> R) -> R {
        let core: Vmcore = self.synth.build();
        test(&PageTables::new(&core, self.synth.phys(self.pgd), self.levels, 0))
    }

    fn walk(&self, range: std::ops::Range<u64>) -> Vec<Entry> {
        self.with_tables(|tables| {
            let mut entries = Vec::new();
            tables.walk(range, &mut |entry| entries.push(entry)).unwrap();
            entries
        })
    }
}

#[test]
fn leaves_of_all_sizes() {
    Space::each(|mut space| {
        space.map(0x1000, PageSize::Size4K, 0x5000 | PRESENT | RW_USER | NX);
        space.map(6 * M, PageSize::Size2M, (64 * M) | PRESENT | PSE | (1 << 12));
        space.map(3 * G, PageSize::Size1G, (7 * G) | PRESENT | RW_USER | PSE);
        space.map(0x7fff_ffff_f000, PageSize::Size4K, 0x9000 | PRESENT);
        space.with_tables(|tables| {
            assert_eq!(tables.translate(0x1234).unwrap(), 0x5234);
            // Bit 12 of a large entry is the PAT bit, not part of the address.
            assert_eq!(tables.translate(7 * M + 5).unwrap(), 65 * M + 5);
            assert_eq!(tables.translate(3 * G + 123 * M).unwrap(), 7 * G + 123 * M);
            for (va, empty) in [(0x2000, 1), (20 * M, 2), (5 * G, 3), (0x5555_5555_5000, 4)] {
                let error = tables.translate(va).unwrap_err();
                assert!(
                    matches!(error, Error::NotMapped { va: at, why: NotMapped::NoEntry { level } }
                        if at == va && level == empty),
                    "{error}"
                );
            }
            let entry = tables.lookup(0x1fff).unwrap().unwrap();
            assert_eq!((entry.va, entry.size), (0x1000, PageSize::Size4K));
            assert!(entry.is_present() && entry.is_writable() && entry.is_user() && entry.is_no_execute());
            assert!(!tables.lookup(6 * M).unwrap().unwrap().is_writable());
        });
        let places: Vec<_> = space.walk(0..1 << 47).iter().map(|entry| (entry.va, entry.size)).collect();
        assert_eq!(
            places,
            [
                (0x1000, PageSize::Size4K),
                (6 * M, PageSize::Size2M),
                (3 * G, PageSize::Size1G),
                (0x7fff_ffff_f000, PageSize::Size4K)
            ]
        );
        // An entry that reaches into the range counts; one beside it does not.
        assert_eq!(space.walk(7 * M..8 * M).len(), 1);
        assert_eq!(space.walk(8 * M..3 * G).len(), 0);
        assert_eq!(space.walk(0x1fff..0x2000).len(), 1);
        assert_eq!(space.walk(0x2000..0x2000).len(), 0);
    });
}

#[test]
fn addresses_that_five_levels_have_and_four_do_not() {
    let va = 0x00ff_1234_5678_9000;
    Space::each(|mut space| {
        if space.levels == 5 {
            space.map(va, PageSize::Size4K, 0x5000 | PRESENT);
            assert_eq!(space.with_tables(|tables| tables.translate(va)).unwrap(), 0x5000);
            assert_eq!(space.walk(0..1 << 56).len(), 1);
        } else {
            let error = space.with_tables(|tables| tables.translate(va)).unwrap_err();
            assert!(matches!(error, Error::NotMapped { why: NotMapped::NonCanonical, .. }));
            assert!(space.with_tables(|tables| tables.walk(0..va, &mut |_| {})).is_err());
        }
    });
}

#[test]
fn walks_in_order_over_many_tables() {
    Space::each(|mut space| {
        let vas: Vec<u64> = (0..600).map(|i| 0x7f00_0000_0000 + i * 0x1000 + i / 200 * G).collect();
        for (i, va) in vas.iter().enumerate() {
            space.map(*va, PageSize::Size4K, (i as u64) << 12 | PRESENT);
        }
        let walked: Vec<u64> = space.walk(0..1 << 47).iter().map(|entry| entry.va).collect();
        assert_eq!(walked, vas);
        let some = space.walk(vas[10]..vas[500] + 1);
        assert_eq!(some.len(), 491);
        assert_eq!((some[0].va, some[490].va), (vas[10], vas[500]));
    });
}

#[test]
fn the_last_tables_of_a_range_in_order_with_their_empty_entries() {
    Space::each(|mut space| {
        // Two tables side by side, a large page, a third table far away.
        let start = 0x7f00_0000_0000;
        for page in [0, 1, 3, 511, 512, 513] {
            space.map(start + page * 0x1000, PageSize::Size4K, page << 12 | PRESENT);
        }
        space.map(start + 4 * M, PageSize::Size2M, (64 * M) | PRESENT | PSE);
        // What is not present, but not zero either, is not empty.
        space.map(start + 5 * G, PageSize::Size4K, swap_entry(0, 9));
        space.with_tables(|tables| {
            let last = |from, to| tables.last_tables(start + from..start + to).unwrap();
            let all = last(0, 6 * G);
            let empty = |tables: &[LastTable]| tables.iter().map(|table| table.empty).collect::<Vec<_>>();
            assert_eq!(empty(&all), [508, 510, 511]);
            // Only the entries that were asked for count; part of a page asks for its entry.
            let some = last(0x1000, 2 * M + 0x3000);
            assert_eq!(empty(&some), [508, 1]);
            assert_eq!((some[0].phys, some[1].phys), (all[0].phys, all[1].phys));
            assert_eq!(last(0x1fff, 0x3001), [LastTable { phys: all[0].phys, empty: 1 }]);
            assert_eq!(last(5 * G, 5 * G + 1), [LastTable { phys: all[2].phys, empty: 0 }]);
            // A large page has no table of the lowest level, nor has what is not mapped, nor nothing.
            for (from, to) in [(4 * M, 6 * M), (6 * M, 5 * G), (0x1000, 0x1000)] {
                assert_eq!(last(from, to), []);
            }
        });
        // They are the tables that hold the entries.
        let table = space.with_tables(|tables| tables.last_tables(start..start + 1).unwrap()[0].phys);
        space.synth.write_phys(table + 2 * 8, &(0x9000 | PRESENT).to_le_bytes());
        space.with_tables(|tables| {
            assert_eq!(tables.translate(start + 0x2000).unwrap(), 0x9000);
            assert_eq!(
                tables.last_tables(start..start + 0x4000).unwrap(),
                [LastTable { phys: table, empty: 0 }]
            );
        });
    });
}

/// 6.12 with CONFIG_MEMORY_FAILURE, as on Debian: 27 swap areas.
fn format(levels: u8) -> PteFormat {
    PteFormat::new(levels, SpecialEntries::new(true, true, false, true, false))
}

/// As the kernel's __swp_entry().
fn swap_entry(kind: u64, offset: u64) -> u64 {
    (!offset << 14 >> 5) | kind << 59
}

#[test]
fn entries_that_are_not_present() {
    Space::each(|mut space| {
        let format = format(space.levels);
        let pfn = 0x1_2345;
        // Shut pages have their page number inverted.
        let shut = |phys: u64, size: u64| !phys & ((1 << 52) - 1) & !(size - 1);
        let young_dirty = 3u64 << format.pfn_bits;
        let cases = [
            (
                PageSize::Size4K,
                shut(pfn << 12, 4096) | PROTNONE | RW_USER,
                EntryKind::ProtNone { phys: pfn << 12 },
            ),
            (PageSize::Size2M, shut(64 * M, 2 * M) | PROTNONE | PSE, EntryKind::ProtNone { phys: 64 * M }),
            // pmd_mkinvalid() leaves PSE alone.
            (PageSize::Size2M, shut(66 * M, 2 * M) | PSE, EntryKind::ProtNone { phys: 66 * M }),
            (PageSize::Size4K, swap_entry(0, 0), EntryKind::Swap { kind: 0, offset: 0 }),
            (
                PageSize::Size4K,
                swap_entry(3, 0x77_7777) | 0b1110,
                EntryKind::Swap { kind: 3, offset: 0x77_7777 },
            ),
            (PageSize::Size4K, swap_entry(26, 1), EntryKind::Swap { kind: 26, offset: 1 }),
            (PageSize::Size4K, swap_entry(27, pfn), EntryKind::HwPoison { phys: pfn << 12 }),
            (
                PageSize::Size4K,
                swap_entry(28, pfn | young_dirty),
                EntryKind::Migration { phys: pfn << 12, writable: false, exclusive: false },
            ),
            (
                PageSize::Size4K,
                swap_entry(29, pfn),
                EntryKind::Migration { phys: pfn << 12, writable: false, exclusive: true },
            ),
            (
                PageSize::Size2M,
                swap_entry(30, pfn & !511),
                EntryKind::Migration { phys: (pfn & !511) << 12, writable: true, exclusive: true },
            ),
            (PageSize::Size4K, swap_entry(31, 1), EntryKind::Marker { bits: 1 }),
        ];
        for (i, (size, pte, _)) in cases.iter().enumerate() {
            space.map((i as u64 + 1) * G, *size, *pte);
        }
        let entries = space.walk(0..1 << 40);
        assert_eq!(entries.len(), cases.len());
        for (entry, (size, _, kind)) in entries.iter().zip(&cases) {
            assert_eq!((entry.size, entry.kind(&format)), (*size, *kind), "{entry:?}");
            assert!(!entry.is_present());
            let translated = space.with_tables(|tables| tables.translate(entry.va));
            assert!(matches!(translated, Err(Error::NotMapped { .. })));
        }
        let swap = entries[4];
        assert!(swap.swap_exclusive() && swap.swap_uffd_wp() && swap.swap_soft_dirty());
        assert!(!entries[3].swap_exclusive());
        assert!(!swap.is_dirty() && !swap.is_mapped() && swap.phys(&format).is_none());
    });
}

#[test]
fn special_types_by_configuration() {
    // 6.1 as Debian's cloud kernel is configured: no memory failure, but a type for failed swap-ins.
    let special = SpecialEntries::new(false, true, false, true, true);
    assert_eq!(
        special,
        SpecialEntries {
            max_swapfiles: 27,
            hwpoison: None,
            migration: Some(27),
            device: None,
            marker: Some(30),
            swapin_error: Some(31)
        }
    );
    let format = PteFormat::new(4, special);
    let kind = |kind| Entry { va: 0, size: PageSize::Size4K, pte: swap_entry(kind, 5) }.kind(&format);
    assert_eq!(kind(27), EntryKind::Migration { phys: 5 << 12, writable: false, exclusive: false });
    assert_eq!(kind(31), EntryKind::SwapinError);
    let with_devices = SpecialEntries::new(true, true, true, true, false);
    assert_eq!((with_devices.max_swapfiles, with_devices.device), (23, Some(27)));
    let format = PteFormat::new(4, with_devices);
    let kind = |kind| Entry { va: 0, size: PageSize::Size4K, pte: swap_entry(kind, 5) }.kind(&format);
    assert_eq!(kind(27), EntryKind::DevicePrivate { phys: 5 << 12, writable: true });
    assert_eq!(kind(30), EntryKind::DeviceExclusive { phys: 5 << 12, writable: false });
    // A kernel without any of them, and an entry of none of the types.
    let format = PteFormat::new(4, SpecialEntries { marker: None, ..special });
    let entry = Entry { va: 0, size: PageSize::Size4K, pte: swap_entry(30, 9) };
    assert_eq!(entry.kind(&format), EntryKind::Unknown { kind: 30, offset: 9 });
}

#[test]
fn damaged_tables_end() {
    Space::each(|mut space| {
        // A table that points at itself, at every index, at every level.
        let pgd = space.synth.phys(space.pgd);
        for index in 0..512 {
            space.synth.write_phys(pgd + index * 8, &(pgd | PRESENT | RW_USER).to_le_bytes());
        }
        let result = space.with_tables(|tables| tables.walk(0..1 << 47, &mut |_| {}));
        assert!(
            matches!(result, Err(Error::NotMapped { why: NotMapped::TableTwice { level: 3 | 4, .. }, .. })),
            "{result:?}"
        );
    });
    Space::each(|mut space| {
        // A table beyond the end of memory.
        space.map(0x1000, PageSize::Size4K, 0x5000 | PRESENT);
        let pgd = space.synth.phys(space.pgd);
        space.synth.write_phys(pgd, &(1u64 << 40 | PRESENT | RW_USER).to_le_bytes());
        let result = space.with_tables(|tables| tables.translate(0x1000));
        assert!(matches!(
            result,
            Err(Error::NotMapped { why: NotMapped::TableUnreadable { table: 0x100_0000_0000, .. }, .. })
        ));
        assert!(space.with_tables(|tables| tables.walk(0..1 << 47, &mut |_| {})).is_err());
        // An entry in the top table that is not zero and not present.
        space.synth.write_phys(pgd, &0x1234_0000u64.to_le_bytes());
        let result = space.with_tables(|tables| tables.walk(0..1 << 47, &mut |_| {}));
        assert!(matches!(result, Err(Error::NotMapped { why: NotMapped::BadEntry { .. }, .. })));
    });
}

#[test]
fn the_encryption_bit_is_no_address() {
    let mut synth = Synth::new();
    let c_bit = 1 << 47;
    let pgd = synth.new_pgd();
    synth.map(pgd, 0x1000, PageSize::Size4K, 0x5000 | PRESENT | c_bit);
    let core = synth.build();
    let tables = PageTables::new(&core, synth.phys(pgd) | c_bit, 4, c_bit);
    assert_eq!(tables.translate(0x1001).unwrap(), 0x5001);
}

#[test]
fn what_is_damaged_is_walked_around() {
    Space::each(|mut space| {
        for va in [0x1000, 4 * M, G, 2 * G, 512 * G] {
            space.map(va, PageSize::Size4K, 0x5000 | PRESENT);
        }
        let entry = |space: &Space, va, level| space.synth.phys(space.synth.entry_of(space.pgd, va, level));
        let walked = |space: &Space, none: Option<u64>| {
            let (mut found, mut lost) = (Vec::new(), Vec::new());
            space.with_tables(|tables| {
                tables
                    .walk_around(
                        0x1000..1 << 47,
                        &|table| Some(table.phys) != none,
                        &mut |entry| found.push(entry.va),
                        &mut |range, error| lost.push((range.start, range.end, error.to_string())),
                    )
                    .unwrap();
            });
            (found, lost)
        };
        assert_eq!(walked(&space, None), (vec![0x1000, 4 * M, G, 2 * G, 512 * G], vec![]));

        // A table that is far away, one that is none, and one that is its own.
        let far = entry(&space, 0x1000, 2);
        space.synth.write_phys(far, &(1u64 << 40 | PRESENT | RW_USER).to_le_bytes());
        let slot = entry(&space, G, 2);
        let none = space.synth.read_u64(space.synth.direct(slot)) & 0x000f_ffff_ffff_f000;
        let own = entry(&space, 2 * G, 3);
        space.synth.write_phys(own, &(own & !0xfff | PRESENT | RW_USER).to_le_bytes());
        let (found, lost) = walked(&space, Some(none));
        assert_eq!(found, [4 * M, 512 * G]);
        let ranges: Vec<_> = lost.iter().map(|(start, end, _)| (*start, *end)).collect();
        assert_eq!(ranges, [(0x1000, 2 * M), (G, G + 2 * M), (2 * G, 3 * G)]);
        assert!(lost[0].2.contains("not in the core"), "{}", lost[0].2);
        assert!(lost[1].2.contains("is none"), "{}", lost[1].2);
        assert!(lost[2].2.contains("comes up twice"), "{}", lost[2].2);

        // A page full of addresses that lead nowhere.
        let table = entry(&space, 4 * M, 3) & !0xfff;
        for n in 0..512 {
            space.synth.write_phys(table + n * 8, &(((1 << 40) + (n << 12)) | PRESENT).to_le_bytes());
        }
        let result = space
            .with_tables(|tables| tables.walk_around(0..1 << 47, &|_| true, &mut |_| {}, &mut |_, _| {}));
        assert!(matches!(result, Err(Error::NotMapped { why: NotMapped::TableUnreadable { .. }, .. })));
    });
}
