//! Hostile cores: ELF headers, notes, vmcoreinfo, page tables.

#![no_main]

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vmcore::{FlatMemory, KernelMemory, PageTables, PteFormat, SpecialEntries, Vmcore, VmcoreInfo};

static FILE: LazyLock<File> = LazyLock::new(|| {
    // SAFETY: a file of our own, made now.
    unsafe { File::from_raw_fd(libc::memfd_create(c"core".as_ptr(), 0)) }
});

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => open(bytes),
        // With what a core begins with, and headers where they should be.
        1 => {
            let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
            file.extend([[0; 8], 64u64.to_le_bytes(), [0; 8]].concat());
            file.extend([0, 0, 0, 0, 64, 0, 56, 0, kind >> 2 & 7, 0, 0, 0, 0, 0, 0, 0]);
            file.extend(bytes);
            open(&file);
        }
        2 => info(bytes),
        _ => tables(kind >> 2, bytes),
    }
});

fn open(bytes: &[u8]) {
    let mut file: &File = &FILE;
    file.set_len(0).expect("a file in memory");
    file.rewind().expect("a file in memory");
    file.write_all(bytes).expect("a file in memory");
    let path = format!("/proc/self/fd/{}", FILE.as_raw_fd());
    let Ok(core) = Vmcore::open(path.as_ref()) else { return };
    _ = core.info().osrelease();
    _ = core.truncated();
    let mut buf = [0; 64];
    for range in core.ranges() {
        for at in [range.start, range.end() - 1, range.end().saturating_sub(32), range.start.wrapping_sub(8)]
        {
            let whole = core.read_phys(at, &mut buf).is_ok();
            let mapped = core.map_phys(at, buf.len());
            if let (true, Ok(mapped)) = (whole, mapped) {
                assert_eq!(&*mapped, buf);
            }
        }
    }
    if let Ok(memory) = KernelMemory::new(core) {
        _ = memory.read_virt(0xffff_ffff_8100_0000, &mut buf);
        _ = memory.read_virt(0xffff_8880_0000_0000, &mut buf);
    }
}

fn info(bytes: &[u8]) {
    let info = VmcoreInfo::new(bytes);
    _ = (info.osrelease().is_ok(), info.kerneloffset(), info.number("a"), info.symbol("b"), info.size("c"));
    let core = Vmcore::from_memory(Box::new(FlatMemory::new(vec![(0, vec![0; 4096])])), info, Vec::new());
    let Ok(memory) = KernelMemory::new(core) else { return };
    let mut buf = [0; 16];
    for va in [0, 8, 0xffff_8000_0000_0000, 0xffff_ffff_8000_0000, u64::MAX - 7] {
        _ = memory.read_virt(va, &mut buf);
        _ = memory.map_virt(va, 16);
    }
}

/// Eight tables, whose entries the input sets: table and index in 12 bits, then what it leads to.
fn tables(kind: u8, bytes: &[u8]) {
    let mut ram = vec![0; 8 * 4096];
    for entry in bytes.chunks_exact(4) {
        let at = usize::from(u16::from_le_bytes([entry[0], entry[1]])) % 4096 * 8;
        // Few tables, so that they meet again; sometimes anything.
        let value = match entry[3] & 0xf {
            0xf => u64::from_le_bytes([entry[2]; 8]),
            flags => u64::from(entry[2] % 12) << 12 | u64::from(flags) | u64::from(entry[3] >> 4) << 5,
        };
        ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    let memory = FlatMemory::new(vec![(0, ram)]);
    let levels = if kind & 1 == 0 { 4 } else { 5 };
    let tables = PageTables::new(&memory, 0, levels, 0);
    let format = PteFormat::new(levels, SpecialEntries::new(true, true, kind & 2 != 0, true, false));
    let mut entries = 0;
    let whole = tables.walk(0..1 << 47, &mut |entry| {
        entries += 1;
        _ = entry.kind(&format);
    });
    // Each table at most once.
    assert!(entries <= 8 * 512 && (whole.is_err() || entries <= 8 * 512));
    _ = tables.last_tables(0x1000..0x4000_0000);
    for va in [0, 0x1000, 0x7fff_ffff_f000, 0xffff_8000_0000_0000, 1 << 47, u64::MAX] {
        _ = tables.translate(va);
        _ = tables.lookup(va);
    }
}
