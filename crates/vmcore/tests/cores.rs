//! Cores on disk: whole, truncated, and not cores at all.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use synth::Synth;
use vmcore::{Error, KernelMemory, PrStatus, Vmcore};

fn core(name: &str, synth: &Synth) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    synth.write_elf(&path);
    (dir, path)
}

fn synth_with_an_object() -> (Synth, u64) {
    let mut synth = Synth::new();
    let addr = synth.alloc_bytes(64, 64);
    synth.write(addr, b"a dead kernel's memory");
    let mut regs = [0; 27];
    regs[PrStatus::RIP] = 0xffff_ffff_b600_1234;
    synth.prstatus(77, regs).prstatus(0, [1; 27]).info_line("OWFPU=1f000");
    (synth, addr)
}

#[test]
fn memory_notes_and_info_of_an_elf_core() {
    let (synth, addr) = synth_with_an_object();
    let (_dir, path) = core("vmcore", &synth);
    let core = Vmcore::open(&path).unwrap();
    assert_eq!(core.truncated(), None);
    assert_eq!(core.info().osrelease().unwrap(), "6.1.0-synth");
    assert_eq!(core.info().get("OWFPU"), Some("1f000"));
    assert!(core.info().number("phys_base").unwrap() < 0);
    assert_eq!(core.prstatus().len(), 2);
    assert_eq!((core.prstatus()[0].pid, core.prstatus()[0].regs[PrStatus::RIP]), (77, 0xffff_ffff_b600_1234));
    assert_eq!((core.prstatus()[1].cpu, core.prstatus()[1].regs), (1, [1; 27]));
    // The image has a PT_LOAD of its own, but no byte is there twice.
    let len: u64 = core.ranges().iter().map(|range| range.len).sum();
    assert_eq!(len, 32 << 20);

    let mut bytes = [0; 22];
    core.read_phys(synth.phys(addr), &mut bytes).unwrap();
    assert_eq!(&bytes, b"a dead kernel's memory");
    assert_eq!(&*core.map_phys(synth.phys(addr), 6).unwrap(), b"a dead");
    // All of it in one piece.
    assert_eq!(core.map_phys(0, 32 << 20).unwrap().len(), 32 << 20);
    assert!(matches!(core.read_phys((32 << 20) - 4, &mut bytes), Err(Error::NotInCore { addr: 0x200_0000 })));
    assert!(matches!(core.map_phys((32 << 20) - 4, 8), Err(Error::NotInCore { addr: 0x200_0000 })));
}

#[test]
fn a_truncated_core_gives_what_it_has() {
    let (synth, addr) = synth_with_an_object();
    let (_dir, path) = core("vmcore", &synth);
    let size = fs::metadata(&path).unwrap().len();
    // The object lies in the first few MiB; cut behind it, in the middle of a page.
    let cut = size - (20 << 20) - 1000;
    OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
    let core = Vmcore::open(&path).unwrap();
    let truncation = core.truncated().unwrap();
    assert_eq!(truncation.expected_size, size);
    assert_eq!(truncation.actual_size, cut);
    assert_eq!(truncation.missing_bytes, (20 << 20) + 1000);

    let mut bytes = [0; 6];
    core.read_phys(synth.phys(addr), &mut bytes).unwrap();
    assert_eq!(&bytes, b"a dead");
    let end = (12 << 20) - 1000;
    core.read_phys(end - 6, &mut bytes).unwrap();
    assert!(matches!(core.read_phys(end - 5, &mut bytes), Err(Error::Truncated { addr }) if addr == end));
    assert!(matches!(core.read_phys(31 << 20, &mut bytes), Err(Error::Truncated { .. })));
    assert!(matches!(core.map_phys(end - 4096, 8192), Err(Error::Truncated { .. })));
    assert!(matches!(core.read_phys(33 << 20, &mut bytes), Err(Error::NotInCore { .. })));
    assert_eq!(core.ranges().last().unwrap().end(), end);
}

#[test]
fn the_image_outlives_the_ram_that_holds_it() {
    let (mut synth, _) = synth_with_an_object();
    let variable = synth.variable("some_variable", "list_head");
    synth.write(variable, b"in the image");
    let (_dir, path) = core("vmcore", &synth);
    let size = fs::metadata(&path).unwrap().len();
    // The RAM comes last; of it, only what is below the image is left.
    let cut = size - (32 << 20) + synth.image().start;
    OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
    let core = Vmcore::open(&path).unwrap();
    let missing = (32 << 20) - synth.image().end;
    assert_eq!(core.truncated().unwrap().missing_bytes, missing);
    let mut bytes = [0; 12];
    core.read_phys(synth.phys(variable), &mut bytes).unwrap();
    assert_eq!(&bytes, b"in the image");
    assert!(matches!(core.read_phys(synth.image().end, &mut bytes), Err(Error::Truncated { .. })));
}

#[test]
fn a_core_cut_within_its_headers_is_refused() {
    let (synth, _) = synth_with_an_object();
    let (_dir, path) = core("vmcore", &synth);
    let whole = fs::read(&path).unwrap();
    for len in [0, 10, 63, 64, 100, 64 + 56 * 3 - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(Vmcore::open(&path), Err(Error::BadElf { .. })), "{len} bytes");
    }
    // Headers whole, notes missing.
    fs::write(&path, &whole[..64 + 56 * 3]).unwrap();
    let error = Vmcore::open(&path).unwrap_err().to_string();
    assert!(error.contains("the file ends at 0xe8, before its notes do"), "{error}");
}

#[test]
fn other_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let open = |bytes: &[u8]| {
        File::create(&path).unwrap().write_all(bytes).unwrap();
        Vmcore::open(&path).unwrap_err()
    };
    for (bytes, remedy) in [
        (&b"KDUMP   \x06\0\0\0"[..], "makedumpfile -E"),
        (b"DISKDUMP", "makedumpfile -E"),
        (b"makedumpfile\0\0\0\0", "makedumpfile -R"),
        (b"\x1f\x8b\x08", "decompress"),
    ] {
        let error = open(bytes);
        assert!(matches!(error, Error::UnsupportedFormat { .. }));
        assert!(error.to_string().contains(remedy), "{error}");
    }
    let own = fs::read(std::env::current_exe().unwrap()).unwrap();
    let error = open(&own[..4096]);
    assert!(error.to_string().contains("not a core"), "{error}");
    assert!(matches!(Vmcore::open(Path::new("/nonexistent/core")), Err(Error::Io { .. })));
}

#[test]
fn kernel_addresses_of_all_kinds() {
    for mut synth in [Synth::new(), Synth::five_level()] {
        let variable = synth.variable("some_variable", "list_head");
        synth.write(variable, b"in the image");
        let object = synth.alloc_bytes(64, 64);
        synth.write(object, b"in the direct map");
        let stack = synth.vmalloc(3 * 4096);
        synth.write(stack + 4090, b"across two pages");
        let mut memory = KernelMemory::new(synth.build()).unwrap();
        let read = |memory: &KernelMemory, va, len| {
            let mut bytes = vec![0; len];
            memory.read_virt(va, &mut bytes).map(|()| bytes)
        };
        assert_eq!(read(&memory, variable, 12).unwrap(), b"in the image");
        // The direct map is not in the fake's page tables: only its base leads there.
        assert!(matches!(read(&memory, object, 1), Err(Error::NotMapped { va, .. }) if va == object));
        memory.set_direct_map(synth.page_offset()..synth.page_offset() + (1 << 40));
        assert_eq!(read(&memory, object, 17).unwrap(), b"in the direct map");
        assert_eq!(read(&memory, stack + 4090, 16).unwrap(), b"across two pages");
        // A second time out of the remembered translations.
        assert_eq!(read(&memory, stack + 4090, 16).unwrap(), b"across two pages");
        assert_eq!(memory.translate(stack + 5).unwrap(), synth.phys(stack + 5));
        // The page behind it is not mapped, and named.
        let end = stack + 3 * 4096;
        assert!(matches!(read(&memory, end - 4, 8), Err(Error::NotMapped { va, .. }) if va == end));
        assert_eq!(&*memory.map_virt(stack + 4090, 6).unwrap(), b"across");
        assert!(memory.map_virt(stack + 4090, 7).is_err());
        // Not canonical, user space, the very end.
        for va in [0x0123_4567_89ab_cdef, 0x7000_0000_0000, 0, u64::MAX - 3] {
            assert!(read(&memory, va, 8).is_err(), "{va:#x}");
        }
        // Beyond the RAM within the direct map.
        assert!(read(&memory, synth.page_offset() + (32 << 20) - 4, 8).is_err());
        memory.set_image(variable & !0xfff..variable + 16);
        assert!(read(&memory, variable + 8, 16).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A file with a good ELF header and anything behind it.
    #[test]
    fn arbitrary_cores_never_panic(
        phnum in 0u16..6,
        words in proptest::collection::vec(prop_oneof![Just(0u64), 0u64..0x3000, any::<u64>()], 50),
        kinds in proptest::collection::vec(prop_oneof![Just(1u32), Just(4), any::<u32>()], 6),
        addr in prop_oneof![0u64..0x3000, any::<u64>()],
    ) {
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
        file.resize(64, 0);
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&phnum.to_le_bytes());
        for (i, word) in words.iter().enumerate() {
            if i % 7 == 0 {
                file.extend(kinds[i / 7 % 6].to_le_bytes());
                file.extend([0; 4]);
            } else {
                file.extend(word.to_le_bytes());
            }
        }
        // A note that may or may not be hit.
        file.resize(0x1000, 0);
        file.extend(b"\x0b\0\0\0\x0e\0\0\0\0\0\0\0VMCOREINFO\0\0OSRELEASE=6.1\n\0\0\0");
        file.resize(0x2000, 7);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("core");
        fs::write(&path, &file).unwrap();
        if let Ok(core) = Vmcore::open(&path) {
            let mut buf = [0; 100];
            let _ = core.read_phys(addr, &mut buf);
            for range in core.ranges() {
                prop_assert!(core.read_phys(range.start, &mut buf[..1]).is_ok());
                prop_assert!(core.read_phys(range.end() - 1, &mut buf[..1]).is_ok());
            }
        }
    }
}

/// Walks that lead round and round, each within its own limit, end all the same.
#[test]
fn a_kernel_is_not_read_for_ever() {
    let mut synth = Synth::new();
    let variable = synth.variable("some_variable", "list_head");
    let memory = KernelMemory::new(synth.build()).unwrap();
    let mut bytes = [0; 8];
    let mut reads = 0u64;
    let error = loop {
        match memory.read_virt(variable, &mut bytes) {
            Ok(()) => reads += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Exhausted { most } if reads == most + 1), "{reads} {error}");
    // 32 MiB in pieces of 16 bytes, and a million.
    assert_eq!(reads, (2 << 20) + (1 << 20) + 1);
    assert!(memory.is_exhausted());
}
