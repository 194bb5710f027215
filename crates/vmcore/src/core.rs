//! A core as a whole: file, notes, memory.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::elf::{self, Notes, Segment};
use crate::mapping::FileMemory;
use crate::{Error, PhysMap, PhysRange, PhysicalMemory, Result, VmcoreInfo};

/// No machine has more notes than this: 8192 CPUs at 400 bytes each, and a page of vmcoreinfo.
const MAX_NOTES: u64 = 16 << 20;

/// The registers of one CPU as it entered the crash: *kernel* state (NT_PRSTATUS, written by
/// `crash_save_cpu`). The user's registers are at the top of the task's kernel stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrStatus {
    /// Position among the CPUs that saved their registers. That is the CPU's number unless a CPU
    /// with a lower number was offline or never answered.
    pub cpu: u32,
    /// The task that was running there (0 for idle tasks; QEMU's own dumps have the CPU's number
    /// plus one).
    pub pid: i32,
    /// In the order of `struct user_regs_struct`: r15 … ss, fs_base, gs_base, ds, es, fs, gs.
    pub regs: [u64; 27],
}

impl PrStatus {
    /// Index of the instruction pointer in [`regs`](Self::regs).
    pub const RIP: usize = 16;
    /// Index of the stack pointer in [`regs`](Self::regs).
    pub const RSP: usize = 19;

    // struct elf_prstatus on x86-64 (include/linux/elfcore.h): part of the ABI for decades.
    const PID: usize = 32;
    const REGS: usize = 112;

    pub(crate) fn parse(cpu: u32, desc: &[u8]) -> Option<PrStatus> {
        let pid = i32::from_le_bytes(desc.get(Self::PID..)?.first_chunk().copied()?);
        let words = desc.get(Self::REGS..Self::REGS + 27 * 8)?.chunks_exact(8);
        let mut regs = [0; 27];
        for (reg, word) in regs.iter_mut().zip(words) {
            *reg = u64::from_le_bytes(word.try_into().ok()?);
        }
        Some(PrStatus { cpu, pid, regs })
    }
}

/// How much of a core is missing at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Truncation {
    /// How large the file must be for what its headers promise.
    pub expected_size: u64,
    /// How large it is.
    pub actual_size: u64,
    /// Bytes of memory that are missing for that.
    pub missing_bytes: u64,
}

impl fmt::Display for Truncation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the core ends at {:#x} instead of {:#x}: {} MiB of memory are missing",
            self.actual_size,
            self.expected_size,
            self.missing_bytes.div_ceil(1 << 20)
        )
    }
}

/// The memory of a dead machine and the notes that came with it.
pub struct Vmcore {
    memory: Box<dyn PhysicalMemory>,
    info: VmcoreInfo,
    prstatus: Vec<PrStatus>,
    notes: Vec<u8>,
    truncated: Option<Truncation>,
}

impl Vmcore {
    /// Opens a core: `/proc/vmcore`, or an ELF64 file.
    ///
    /// A truncated file opens as long as its headers and notes are whole: see
    /// [`truncated`](Self::truncated).
    pub fn open(path: &Path) -> Result<Vmcore> {
        let io = |action| move |source| Error::Io { path: path.to_owned(), action, source };
        let bad = |why| Error::BadElf { path: path.to_owned(), why };
        let file = File::open(path).map_err(io("open"))?;
        let size = file.metadata().map_err(io("stat"))?.len();

        let head = read_up_to(&file, 0, 4096).map_err(io("read"))?;
        reject_other_formats(path, &head)?;
        let end = elf::headers_end(&head).map_err(bad)?;
        let head = read_up_to(&file, 0, end).map_err(io("read"))?;
        let headers = elf::headers(&head).map_err(bad)?;

        let (mut notes, mut raw, mut cut) = (Notes::default(), Vec::new(), false);
        for (offset, len) in headers.notes {
            if len > MAX_NOTES {
                return Err(bad(format!("a note segment of {len} bytes")));
            }
            let bytes = read_up_to(&file, offset, len).map_err(io("read"))?;
            cut |= (bytes.len() as u64) < len;
            notes.add(&bytes);
            raw.extend_from_slice(&bytes);
            if raw.len() as u64 > MAX_NOTES {
                return Err(bad(format!("notes of more than {MAX_NOTES} bytes")));
            }
        }
        let info = match notes.vmcoreinfo {
            Some(info) => info,
            None if cut => return Err(bad(format!("the file ends at {size:#x}, before its notes do"))),
            None => return Err(Error::NoVmcoreInfo),
        };

        let expected_size = headers.loads.iter().map(|s| s.file_offset + s.len).max().unwrap_or(0);
        // Cut first, then made disjoint: the kernel's image has a PT_LOAD of its own at the
        // beginning of the file, and a core that lacks the RAM which holds it still has names.
        let present = headers.loads.iter().filter_map(|s| {
            let len = s.len.min(size.saturating_sub(s.file_offset));
            (len > 0).then_some(Segment { len, ..*s })
        });
        let present = elf::disjoint(present.collect());
        let promised = elf::disjoint(headers.loads);
        let total = |segments: &[Segment]| segments.iter().map(|s| s.len).sum::<u64>();
        let missing_bytes = total(&promised) - total(&present);
        let truncated =
            (missing_bytes > 0).then_some(Truncation { expected_size, actual_size: size, missing_bytes });
        Ok(Vmcore {
            memory: Box::new(FileMemory::new(file, path, promised, present)),
            info: VmcoreInfo::new(&info),
            prstatus: notes.prstatus,
            notes: raw,
            truncated,
        })
    }

    /// A core made of anything that can be read by physical address: for tests and fakes.
    pub fn from_memory(memory: Box<dyn PhysicalMemory>, info: VmcoreInfo, prstatus: Vec<PrStatus>) -> Vmcore {
        Vmcore { memory, info, prstatus, notes: Vec::new(), truncated: None }
    }

    /// The vmcoreinfo text.
    pub fn info(&self) -> &VmcoreInfo {
        &self.info
    }

    /// The registers of each CPU that saved them, in the order of the notes.
    pub fn prstatus(&self) -> &[PrStatus] {
        &self.prstatus
    }

    /// All notes as they are in the file, one after the other; empty for a core that is no file.
    pub fn notes(&self) -> &[u8] {
        &self.notes
    }

    /// Whether memory is missing at the end of the file, and how much.
    pub fn truncated(&self) -> Option<Truncation> {
        self.truncated
    }

    /// The memory behind it.
    pub fn memory(&self) -> &dyn PhysicalMemory {
        &*self.memory
    }

    /// See [`PhysicalMemory::read_phys`].
    pub fn read_phys(&self, addr: u64, buf: &mut [u8]) -> Result<()> {
        self.memory.read_phys(addr, buf)
    }

    /// See [`PhysicalMemory::map_phys`].
    pub fn map_phys(&self, addr: u64, len: usize) -> Result<PhysMap<'_>> {
        self.memory.map_phys(addr, len)
    }

    /// See [`PhysicalMemory::after_fork`].
    pub fn after_fork(&self) {
        self.memory.after_fork();
    }

    /// See [`PhysicalMemory::ranges`].
    pub fn ranges(&self) -> &[PhysRange] {
        self.memory.ranges()
    }
}

impl PhysicalMemory for Vmcore {
    fn read_phys(&self, addr: u64, buf: &mut [u8]) -> Result<()> {
        self.memory.read_phys(addr, buf)
    }
    fn map_phys(&self, addr: u64, len: usize) -> Result<PhysMap<'_>> {
        self.memory.map_phys(addr, len)
    }
    fn ranges(&self) -> &[PhysRange] {
        self.memory.ranges()
    }
    fn after_fork(&self) {
        self.memory.after_fork();
    }
}

impl fmt::Debug for Vmcore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vmcore")
            .field("osrelease", &self.info.get("OSRELEASE"))
            .field("cpus", &self.prstatus.len())
            .field("ranges", &self.ranges())
            .field("truncated", &self.truncated)
            .finish_non_exhaustive()
    }
}

/// The names of dumps that people may well pass, and what to do then.
fn reject_other_formats(path: &Path, head: &[u8]) -> Result<()> {
    let (format, remedy) = match head {
        [b'K', b'D', b'U', b'M', b'P', ..] | [b'D', b'I', b'S', b'K', b'D', b'U', b'M', b'P', ..] => (
            "the kdump-compressed format (makedumpfile, or QEMU's dump-guest-memory -z/-l/-s)",
            "convert it with `makedumpfile -E`, or copy /proc/vmcore itself",
        ),
        [b'm', b'a', b'k', b'e', b'd', b'u', b'm', b'p', b'f', b'i', b'l', b'e', ..] => {
            ("makedumpfile's flattened format", "restore the ELF file with `makedumpfile -R`")
        }
        [0x1f, 0x8b, ..] | [0xfd, b'7', b'z', b'X', b'Z', ..] | [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            ("a compressed file", "decompress it first")
        }
        _ => return Ok(()),
    };
    Err(Error::UnsupportedFormat { path: path.to_owned(), format, remedy })
}

/// Reads up to `len` bytes at `offset`; fewer where the file ends.
fn read_up_to(file: &File, offset: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    let mut done = 0;
    while done < bytes.len() {
        let Some(at) = offset.checked_add(done as u64) else { break };
        match file.read_at(&mut bytes[done..], at) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}
