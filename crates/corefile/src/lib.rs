//! A process of the dead machine as an ELF core file, as the kernel would have written it had the process crashed (core(5)); and parts of the
//! machine's memory as a core of its kernel ([`KernelCore`]).
//!
//! **In:** a [`Snapshot`], one of its processes, and a [`PhysMem`] for page contents.
//!
//! **Out:** a file for `gdb PROGRAM CORE`, and a [`Summary`] that names what is not in it.
//!
//! **Never:** shows bytes that were not the process's. There are four kinds of pages, and each looks different in the file:
//!
//! - *in memory* (or in a swap area that can be read): their contents, in a PT_LOAD whose `p_filesz` covers them. That includes the pages of
//!   programs and libraries that the page cache had: a core of the kernel's own leaves them out, but the file on the disk need not
//!   be what was mapped;
//! - *never touched*: zeroes, as holes of a sparse file. From [`BIG_HOLE`] on they are a PT_LOAD without contents, which debuggers do not read;
//! - *in a file only* (never read, or evicted and clean): a PT_LOAD without contents; debuggers take them from the file, which NT_FILE names;
//! - *missing* (on a swap device that is not there, lost to a hardware error, not in the dump …): no PT_LOAD at all, so that a
//!   debugger says that it cannot access them; named in [`Summary::missing`].
//!
//! What the kernel maps for its own ends is left out (`[vvar]`, memory behind the end of a file), but for `[vdso]`: backtraces go through it.
//!
//! Registers are those with which the threads entered the kernel: in a system call, `rax` is as the kernel had left it so far
//! (-ENOSYS, as a rule) and `orig_rax` the call's number. Times that a process has used are not known, and 0.

mod elf;
mod kernel;
mod memory;
mod notes;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::Serialize;
use snapshot::{
    Bytes, Fpu, PAGE_SIZE, PhysMem, PhysMemError, PhysRange, Pid, Process, Resume, Severity, Snapshot,
};

use elf::Load;
pub use kernel::KernelCore;
use memory::Segment;
pub use memory::{BIG_HOLE, Missing};

/// Bytes of memory that are asked for at a time.
const PIECE: u64 = 1 << 20;

/// Why there is no core file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process has no address space, or none is known.
    #[error("process {pid} has no memory: {why}")]
    NoMemory {
        #[allow(missing_docs)]
        pid: Pid,
        #[allow(missing_docs)]
        why: &'static str,
    },
    /// Memory that could be read a moment ago.
    #[error("memory at {addr:#x}")]
    Read {
        /// In the process, or a physical one of the kernel.
        addr: u64,
        #[allow(missing_docs)]
        source: PhysMemError,
    },
    /// The file cannot be written.
    #[error("writing the core file")]
    Write(#[from] io::Error),
}

/// What is in a core file, and what is not.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    #[allow(missing_docs)]
    pub pid: Pid,
    #[allow(missing_docs)]
    pub comm: Bytes,
    /// How many have their registers in the file.
    pub threads: usize,
    /// Length of the file; holes take no room on most file systems.
    pub bytes: u64,
    /// Pages (4 KiB) whose contents are in the file.
    pub pages: u64,
    /// Pages that a debugger takes from the mapped files.
    pub file_pages: u64,
    /// What existed and cannot be had.
    pub missing: Vec<Missing>,
    /// What is in the file, but may not be what it was, or is not there; for people.
    pub doubts: Vec<String>,
}

impl Summary {
    /// Whether all that the process had is in the file, as it was.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.doubts.is_empty()
    }

    /// Pages (4 KiB) that are missing.
    pub fn missing_pages(&self) -> u64 {
        self.missing.iter().map(|part| (part.end - part.start) / PAGE_SIZE).sum()
    }
}

/// A core file that is to be written.
pub struct Core {
    segments: Vec<Segment>,
    loads: Vec<Load>,
    notes: Vec<u8>,
    layout: elf::Layout,
    summary: Summary,
}

impl Core {
    /// Decides what goes into the file. Swap slots are read once to see whether they can be: `mem` has to have them as frames.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn new(snapshot: &Snapshot, process: &Process, mem: &dyn PhysMem) -> Result<Self, Error> {
        let no_memory = |why| Error::NoMemory { pid: process.pid, why };
        let id = process.address_space.ok_or_else(|| no_memory(why_none(process)))?;
        let space = snapshot.address_spaces.get(&id);
        let space = space.ok_or_else(|| no_memory("its mappings could not be read"))?;
        if space.vmas.is_empty() {
            let executes = process.threads.iter().any(|thread| matches!(thread.resume, Resume::Exec(_)));
            return Err(no_memory(match executes {
                true => "it was executing another program, which had none yet",
                false => "its mappings could not be read",
            }));
        }
        let memory = memory::Memory::new(snapshot, space, mem);
        let threads = notes::living(process).count();
        let notes = notes::all(snapshot, process, space, &memory, mem);
        let loads: Vec<Load> = memory.segments.iter().map(Segment::load).collect();
        let layout = elf::Layout::new(&loads, notes.len() as u64);
        let summary = Summary {
            pid: process.pid,
            comm: process.comm.clone(),
            threads,
            bytes: layout.len,
            pages: memory.pages,
            file_pages: memory.file_pages,
            missing: memory.missing,
            doubts: doubts(snapshot, process, space.write_locked),
        };
        Ok(Self { segments: memory.segments, loads, notes, layout, summary })
    }

    /// What it will have.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Writes it into an empty file. Pages of zeroes become holes.
    ///
    /// # Errors
    /// When `out` cannot be written, or `mem` no longer has what it had: then the file is of no use.
    pub fn write(&self, mem: &dyn PhysMem, out: &File) -> Result<(), Error> {
        self.layout.write(&self.loads, &self.notes, out)?;
        for (segment, offset) in self.segments.iter().zip(&self.layout.offsets) {
            for run in &segment.pages {
                let range = PhysRange { start: run.pfn * PAGE_SIZE, len: u64::from(run.count) * PAGE_SIZE };
                copy(mem, range, out, offset + (run.addr - segment.start), run.addr)?;
            }
        }
        Ok(())
    }
}

/// Writes memory into the file at an offset. `addr`: what it is called in errors.
fn copy(mem: &dyn PhysMem, range: PhysRange, out: &File, offset: u64, addr: u64) -> Result<(), Error> {
    let mut done = 0;
    while done < range.len {
        let now = PIECE.min(range.len - done);
        let bytes = mem
            .map(range.start + done, now as usize)
            .map_err(|source| Error::Read { addr: addr + done, source })?;
        write_sparse(out, &bytes, offset + done)?;
        done += now;
    }
    Ok(())
}

/// Writes those pages that are not all zeroes.
fn write_sparse(out: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    const PAGE: usize = PAGE_SIZE as usize;
    const ZEROES: &[u8] = &[0; PAGE];
    let mut offset = at;
    let is_zero = |page: &[u8]| ZEROES.starts_with(page);
    let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
    for same in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len: usize = same.iter().map(|page| page.len()).sum();
        if same.first().is_some_and(|page| !is_zero(page)) {
            let from = (offset - at) as usize;
            out.write_all_at(&bytes[from..from + len], offset)?;
        }
        offset += len as u64;
    }
    Ok(())
}

fn why_none(process: &Process) -> &'static str {
    use snapshot::ProcessState;
    match process.state {
        ProcessState::Zombie { .. } => "it is a zombie",
        ProcessState::Exiting { .. } => "it was exiting",
        ProcessState::Alive | ProcessState::Stopped { .. } => "its mappings could not be read",
    }
}

/// What of the process's own state may not be what it was.
fn doubts(snapshot: &Snapshot, process: &Process, write_locked: bool) -> Vec<String> {
    let mut doubts = Vec::new();
    if write_locked {
        doubts.push("its mappings were being changed and may be half changed".to_owned());
    }
    for thread in notes::living(process) {
        let tid = thread.tid;
        if let (None, Resume::Impossible { why }) = (thread.syscall, &thread.resume) {
            doubts.push(format!("thread {tid}: its registers may be those of an earlier moment: {why}"));
        }
        match thread.fpu {
            Fpu::Saved { .. } => {}
            Fpu::Lost | Fpu::LostInSyscall { .. } => doubts.push(format!(
                "thread {tid} was on a CPU: its floating-point and vector registers were saved by nobody"
            )),
        }
        if thread.regs.cs == notes::USER32_CS {
            doubts.push(format!("thread {tid} ran 32-bit code; its registers are written as 64-bit ones"));
        }
    }
    let about = snapshot.findings.iter().filter(|finding| {
        finding.pid == Some(process.pid)
            && finding.severity >= Severity::Doubt
            && ["process", "thread", "memory", "fpu"].contains(&finding.object.as_str())
    });
    doubts.extend(about.map(|finding| finding.text.clone()));
    doubts
}
