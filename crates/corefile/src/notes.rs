//! The notes of a core file, in the kernel's order: of the first thread NT_PRSTATUS, then what is of the whole process, then its floating-point
//! registers; then those of the other threads. Structures: include/linux/elfcore.h, include/linux/elfcore-compat.h, fs/binfmt_elf.c; x86-64.

use object::elf::{NT_AUXV, NT_FILE, NT_PRFPREG, NT_PRPSINFO, NT_PRSTATUS, NT_SIGINFO, NT_X86_XSTATE};
use snapshot::{
    AddressSpace, Fpu, PAGE_SIZE, PendingSignal, PhysMem, Process, Snapshot, Thread, ThreadState, VmaKind,
};

use crate::memory::Memory;

/// `__USER32_CS` (arch/x86/include/asm/segment.h).
pub(crate) const USER32_CS: u64 = 0x23;
/// `siginfo_t`, bytes.
const SIGINFO: usize = 128;
/// What FXSAVE stores, `user_fpregs_struct`: the first part of an XSAVE area.
const FPREGS: usize = 512;
/// pr_psargs (ELF_PRARGSZ).
const ARGUMENTS: usize = 80;
/// SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS: what a program does to itself.
const SYNCHRONOUS: [i32; 6] = [4, 5, 7, 8, 11, 31];

/// Little-endian bytes, one field after the other.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn i32(self, value: i32) -> Self {
        self.u32(value as u32)
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    /// At most `len` bytes, the last of them 0.
    fn text(mut self, text: &[u8], len: usize) -> Self {
        let end = self.0.len() + len;
        self.0.extend(text.iter().take(len.saturating_sub(1)));
        self.0.resize(end, 0);
        self
    }
    fn zeroes(mut self, len: usize) -> Self {
        self.0.resize(self.0.len() + len, 0);
        self
    }
}

/// Threads that have registers: leader first, then by TID.
pub(crate) fn living(process: &Process) -> impl Iterator<Item = &Thread> {
    process.threads.iter().filter(|thread| thread.state != ThreadState::Dead)
}

/// All notes.
pub(crate) fn all(
    snapshot: &Snapshot,
    process: &Process,
    space: &AddressSpace,
    memory: &Memory,
    mem: &dyn PhysMem,
) -> Vec<u8> {
    let mut notes = Vec::new();
    for (n, thread) in living(process).enumerate() {
        let signal = fault(process, thread);
        note(&mut notes, b"CORE\0", NT_PRSTATUS, &prstatus(process, thread, signal));
        if n == 0 {
            note(&mut notes, b"CORE\0", NT_PRPSINFO, &prpsinfo(process, thread, space, memory, mem));
        }
        if let Some(signal) = signal {
            note(&mut notes, b"CORE\0", NT_SIGINFO, &siginfo(signal));
        }
        if n == 0 {
            let auxv: Vec<u8> = space.layout.auxv.iter().flat_map(|word| word.to_le_bytes()).collect();
            note(&mut notes, b"CORE\0", NT_AUXV, &auxv);
            note(&mut notes, b"CORE\0", NT_FILE, &files(snapshot, space));
        }
        if let Some(xstate) = xstate(thread) {
            if let Some(fpregs) = xstate.get(..FPREGS) {
                note(&mut notes, b"CORE\0", NT_PRFPREG, fpregs);
            }
            note(&mut notes, b"LINUX\0", NT_X86_XSTATE, xstate);
        }
    }
    notes
}

/// Elf64_Nhdr: sizes of name and description, and the type; then these two, each filled up to a multiple of 4.
fn note(notes: &mut Vec<u8>, name: &[u8], kind: u32, desc: &[u8]) {
    notes.extend([name.len() as u32, desc.len() as u32, kind].iter().flat_map(|word| word.to_le_bytes()));
    for part in [name, desc] {
        notes.extend(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

/// The registers that are known; what was only ever in a CPU is not replaced by what had been saved before.
fn xstate(thread: &Thread) -> Option<&[u8]> {
    match &thread.fpu {
        Fpu::Saved { xstate, .. } => Some(xstate),
        Fpu::Lost | Fpu::LostInSyscall { .. } => None,
    }
}

/// The signal for a mistake of its own that the thread was about to get. Nothing else would have made the kernel write a core file.
fn fault<'a>(process: &'a Process, thread: &'a Thread) -> Option<&'a PendingSignal> {
    let of_process = process.signals.pending.iter().filter(|_| thread.tid == process.pid);
    let mut pending = thread.pending.iter().chain(of_process);
    pending.find(|signal| {
        SYNCHRONOUS.contains(&signal.signo)
            && thread.blocked & bit(signal.signo) == 0
            && !signal.info.is_empty()
    })
}

/// The bit of a signal in a mask.
fn bit(signo: i32) -> u64 {
    u32::try_from(signo - 1).ok().and_then(|n| 1_u64.checked_shl(n)).unwrap_or(0)
}

fn siginfo(signal: &PendingSignal) -> Vec<u8> {
    let mut info = signal.info.clone();
    info.resize(SIGINFO, 0);
    info
}

/// `struct elf_prstatus`, 336 bytes.
fn prstatus(process: &Process, thread: &Thread, signal: Option<&PendingSignal>) -> Vec<u8> {
    const TIMES: usize = 4 * 16;
    // The first three words of a siginfo_t: si_signo, si_errno, si_code; here the last two are the other way round.
    let word = |n: usize| {
        let bytes = signal.and_then(|signal| signal.info.get(4 * n..4 * n + 4)?.first_chunk());
        bytes.map_or(0, |bytes| i32::from_le_bytes(*bytes))
    };
    let signo = signal.map_or(0, |signal| signal.signo);
    let pending = thread.pending.iter().fold(0, |mask, signal| mask | bit(signal.signo));
    let mut fields = Fields::default()
        .i32(signo)
        .i32(word(2))
        .i32(word(1))
        // pr_cursig, a short, and what fills it up.
        .i32(signo)
        .u64(pending)
        .u64(thread.blocked)
        .i32(thread.tid)
        .i32(process.ppid)
        .i32(process.pgid)
        .i32(process.sid)
        .zeroes(TIMES);
    for word in thread.regs.words() {
        fields = fields.u64(word);
    }
    // pr_fpvalid.
    fields.u32(xstate(thread).is_some().into()).zeroes(4).0
}

/// `struct elf_prpsinfo`, 136 bytes.
fn prpsinfo(
    process: &Process,
    thread: &Thread,
    space: &AddressSpace,
    memory: &Memory,
    mem: &dyn PhysMem,
) -> Vec<u8> {
    // Where the letter is in fill_psinfo().
    let (state, letter) = match thread.state {
        ThreadState::Running => (0, b'R'),
        ThreadState::Sleeping => (1, b'S'),
        ThreadState::DiskSleep => (2, b'D'),
        ThreadState::Stopped | ThreadState::Traced => (3, b'T'),
        ThreadState::Dead => (4, b'Z'),
        ThreadState::Other => (6, b'.'),
    };
    let layout = &space.layout;
    let len = layout.arg_end.saturating_sub(layout.arg_start).min(ARGUMENTS as u64 - 1);
    let mut arguments = vec![0; len as usize];
    let got = memory.read(mem, layout.arg_start, &mut arguments);
    arguments.truncate(got);
    arguments.iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = b' ');
    Fields::default()
        .bytes(&[state, letter, 0, thread.scheduling.nice as u8])
        .zeroes(4)
        // pr_flag, the kernel's PF_*: not in the snapshot.
        .u64(0)
        .u32(thread.credentials.uid)
        .u32(thread.credentials.gid)
        .i32(process.pid)
        .i32(process.ppid)
        .i32(process.pgid)
        .i32(process.sid)
        .text(process.comm.as_bytes(), 16)
        .text(&arguments, ARGUMENTS)
        .0
}

/// NT_FILE: number of mappings and the unit of offsets; start, end and offset of each; their names.
fn files(snapshot: &Snapshot, space: &AddressSpace) -> Vec<u8> {
    let mut mapped = Vec::new();
    for vma in &space.vmas {
        let (name, offset) = match &vma.kind {
            VmaKind::File { file, offset } => {
                let Some(open) = snapshot.files.get(file) else { continue };
                let deleted: &[u8] = if open.deleted { b" (deleted)" } else { b"" };
                ([open.path.as_bytes(), deleted].concat(), *offset)
            }
            VmaKind::SharedAnonymous { offset, .. } => (b"/dev/zero (deleted)".to_vec(), *offset),
            VmaKind::SysvShm { id, offset } => {
                (snapshot.shm_segment(*id).map(|s| s.file_name().into()).unwrap_or_default(), *offset)
            }
            VmaKind::AioRing { .. } => (b"/[aio] (deleted)".to_vec(), 0),
            _ => continue,
        };
        mapped.push((vma, offset / PAGE_SIZE, name));
    }
    let mut fields = Fields::default().u64(mapped.len() as u64).u64(PAGE_SIZE);
    for (vma, offset, _) in &mapped {
        fields = fields.u64(vma.start).u64(vma.end).u64(*offset);
    }
    for (.., name) in &mapped {
        // Of a snapshot that somebody has edited.
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        fields = fields.bytes(&name[..end]).zeroes(1);
    }
    fields.0
}
