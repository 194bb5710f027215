//! The running kernel's instructions, for the crash kernel to see whether they have changed.
//!
//! `/proc/kcore` (fs/proc/kcore.c) is an ELF core of the running kernel, `/proc/kallsyms` says where its code is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;

use object::Endianness;
use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use snapshot::{KernelText, PAGE_SIZE};

use crate::Root;

/// The ELF header and the program headers of more areas of memory than a machine has.
const MAX_HEADERS: u64 = 1 << 20;
/// More than any kernel or module has of code: 64 MiB.
const MAX_CODE: u64 = 64 << 20;
/// While an instruction is being patched, what is read is neither the one nor the other.
const MAX_READS: usize = 8;

/// Records the code of the kernel and of the modules that are loaded.
///
/// # Errors
/// When `/proc/kcore` or `/proc/kallsyms` may not be read, or do not say where the code is.
pub fn record(root: &Root) -> io::Result<KernelText> {
    let core = Kcore::open(root)?;
    let mut text = KernelText::default();
    for code in places(root)? {
        text.add(code.module, code.start, &core.read_settled(code.start, code.end)?);
    }
    Ok(text)
}

#[derive(Debug, PartialEq, Eq)]
struct Code {
    module: Option<String>,
    /// Of its first page, and behind its last one.
    start: u64,
    end: u64,
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Where there is code.
fn places(root: &Root) -> io::Result<Vec<Code>> {
    let modules = live_modules(&root.read("/proc/modules").unwrap_or_default());
    let (mut start, mut end) = (None, None);
    // Where the last function of each module begins.
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    let symbols = root.read("/proc/kallsyms")?;
    for line in symbols.lines() {
        let mut words = line.split_whitespace();
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let address = u64::from_str_radix(address, 16).unwrap_or(0);
        match (words.next(), name) {
            (None, "_stext") => start = Some(address),
            (None, "_etext") => end = Some(address),
            (Some(module), _) if matches!(kind, "t" | "T" | "w" | "W") => {
                let module = module.trim_matches(['[', ']']);
                let last = last.entry(module).or_insert(0);
                *last = address.max(*last);
            }
            _ => {}
        }
    }
    let code = |module: Option<&str>, start: u64, last: u64| Code {
        module: module.map(str::to_owned),
        start: start & !(PAGE_SIZE - 1),
        end: (last & !(PAGE_SIZE - 1)).saturating_add(PAGE_SIZE),
    };
    let (Some(start), Some(end)) = (start, end) else {
        return Err(invalid("/proc/kallsyms does not have _stext and _etext"));
    };
    if start == 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "/proc/kallsyms does not tell addresses",
        ));
    }
    let mut all = vec![code(None, start, end.saturating_sub(1))];
    for (name, base) in modules {
        // A function that begins in the last page and ends beyond it is left out there.
        if let Some(&last) = last.get(name.as_str()).filter(|&&last| base != 0 && last >= base) {
            all.push(code(Some(&name), base, last));
        }
    }
    all.retain(|code| code.start < code.end && code.end - code.start <= MAX_CODE);
    Ok(all)
}

/// Name and base of the modules that are loaded: `/proc/modules` has their size, users and state in between (kernel/module/procfs.c).
fn live_modules(text: &str) -> Vec<(String, u64)> {
    let module = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, _, _, _, "Live", base, ..] = words[..] else { return None };
        Some((name.to_owned(), u64::from_str_radix(base.trim_start_matches("0x"), 16).ok()?))
    };
    text.lines().filter_map(module).collect()
}

/// The running kernel's memory.
struct Kcore {
    file: File,
    /// Address, length, and place in the file.
    segments: Vec<(u64, u64, u64)>,
}

impl Kcore {
    fn open(root: &Root) -> io::Result<Self> {
        let file = File::open(root.join("/proc/kcore"))?;
        let broken = |error: object::Error| invalid(format!("/proc/kcore: {error}"));
        let mut start = [0; size_of::<FileHeader64<Endianness>>()];
        file.read_exact_at(&mut start, 0)?;
        let header = FileHeader64::<Endianness>::parse(&start[..]).map_err(broken)?;
        let endian = header.endian().map_err(broken)?;
        let count = u64::from(header.e_phnum.get(endian)) * u64::from(header.e_phentsize.get(endian));
        let end = header.e_phoff.get(endian).saturating_add(count).min(MAX_HEADERS);
        let mut headers = Vec::new();
        (&file).take(end).read_to_end(&mut headers)?;
        let header = FileHeader64::<Endianness>::parse(&headers[..]).map_err(broken)?;
        let all = header.program_headers(endian, &headers[..]).map_err(broken)?;
        let memory = all.iter().filter(|segment| segment.p_type(endian) == PT_LOAD);
        let segments = memory.map(|s| (s.p_vaddr(endian), s.p_memsz(endian), s.p_offset(endian))).collect();
        Ok(Self { file, segments })
    }

    fn read(&self, start: u64, end: u64) -> io::Result<Vec<u8>> {
        let place = self.segments.iter().find_map(|&(address, length, offset)| {
            let skip = start.checked_sub(address)?;
            (end - address <= length).then(|| offset.checked_add(skip)).flatten()
        });
        let Some(place) = place else { return Err(invalid(format!("/proc/kcore does not have {start:#x}"))) };
        let mut bytes = vec![0; (end - start) as usize];
        self.file.read_exact_at(&mut bytes, place)?;
        Ok(bytes)
    }

    /// What was the same twice.
    fn read_settled(&self, start: u64, end: u64) -> io::Result<Vec<u8>> {
        let mut before = self.read(start, end)?;
        for _ in 1..MAX_READS {
            let now = self.read(start, end)?;
            if now == before {
                return Ok(now);
            }
            before = now;
        }
        Err(io::Error::other("the kernel's code changes all the time"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const MODULE: u64 = 0xffff_ffff_c020_0000;

    /// A machine whose kernel has two pages of code, and one module with one.
    fn machine(dir: &Path) -> Root {
        let root = Root::new(dir);
        fs::create_dir_all(root.join("/proc")).unwrap();
        let kallsyms = format!(
            "0 A fixed_percpu_data\n{TEXT:x} T _stext\n{:x} t do_nanosleep\n{:x} T _etext\n\
             {:x} t ext4_iget\t[ext4]\n{:x} d ext4_data\t[ext4]\n{:x} t prog\t[bpf]\n",
            TEXT + 0x1100,
            TEXT + 0x1234,
            MODULE + 0x40,
            MODULE + 0x8000,
            MODULE + 0x10_0000,
        );
        fs::write(root.join("/proc/kallsyms"), kallsyms).unwrap();
        let modules = format!(
            "ext4 983040 1 - Live {MODULE:#x}\nhalf 4096 0 - Loading 0xffffffffc0500000\nnone 4096 0 - Live 0x0\n"
        );
        fs::write(root.join("/proc/modules"), modules).unwrap();
        let mut core = vec![0u8; 64];
        core[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        core[20] = 1;
        core[32] = 64;
        core[52] = 64;
        core[54] = 56;
        core[56] = 2;
        for (address, pages, offset) in [(TEXT, 2, 0x1000u64), (MODULE, 1, 0x3000)] {
            let words = [1 | 7 << 32, offset, address, 0, pages * PAGE_SIZE, pages * PAGE_SIZE, PAGE_SIZE];
            words.iter().for_each(|word: &u64| core.extend(word.to_le_bytes()));
        }
        core.resize(0x1000, 0);
        for page in 1..=3u8 {
            core.extend([page; PAGE_SIZE as usize]);
        }
        fs::write(root.join("/proc/kcore"), core).unwrap();
        root
    }

    #[test]
    fn the_code_of_the_kernel_and_its_modules_is_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let text = record(&machine(dir.path())).unwrap();
        let mut expected = KernelText::default();
        expected.add(None, TEXT, &[[1; PAGE_SIZE as usize], [2; PAGE_SIZE as usize]].concat());
        expected.add(Some("ext4".into()), MODULE, &[3; PAGE_SIZE as usize]);
        assert_eq!(text, expected);
    }

    #[test]
    fn what_is_not_told_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        let kallsyms = fs::read_to_string(root.join("/proc/kallsyms")).unwrap();
        let hidden = kallsyms.replace(&format!("{TEXT:x}"), "0000000000000000");
        fs::write(root.join("/proc/kallsyms"), hidden).unwrap();
        assert_eq!(record(&root).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        fs::write(root.join("/proc/kallsyms"), kallsyms.replace("_etext", "x")).unwrap();
        assert!(record(&root).unwrap_err().to_string().contains("_etext"));
        let elsewhere =
            kallsyms.replace(&format!("{:x} T _etext", TEXT + 0x1234), "ffffffff82000000 T _etext");
        fs::write(root.join("/proc/kallsyms"), elsewhere).unwrap();
        assert!(record(&root).unwrap_err().to_string().contains("/proc/kcore does not have"));
        fs::write(root.join("/proc/kcore"), "none").unwrap();
        assert!(record(&root).is_err());
    }
}
