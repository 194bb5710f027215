//! Programs that enter the kernel and leave it all the time, so that a crash meets their CPU at the edge: every general register has
//! to be the program's own all the same, and every call and every access has to happen once.

use std::arch::asm;

use anyhow::{Result, ensure};
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise};

use crate::Stage;
use crate::map::{Map, PAGE};
use crate::prng::Prng;

/// Some ten milliseconds of calls between two looks for the crash.
const CALLS: u64 = 20_000;
/// Pages that are touched for the first time between two looks.
const PAGES: usize = 1024;

/// The general registers that neither calls nor the loops below change, in the order of [`NAMES`].
#[repr(C)]
#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers([u64; 9]);

const NAMES: [&str; 9] = ["rbx", "rdx", "r8", "r9", "r10", "r12", "r13", "r14", "rsi"];

impl Registers {
    fn noise(seed: u64) -> Self {
        let mut prng = Prng::new(seed);
        Self(std::array::from_fn(|_| prng.next()))
    }

    fn compare(&self, expected: &Self) -> Result<()> {
        for ((name, found), wanted) in NAMES.iter().zip(self.0).zip(expected.0) {
            ensure!(found == wanted, "{name} is {found:#x} instead of {wanted:#x}");
        }
        Ok(())
    }
}

/// System calls, one after the other.
pub fn calls(stage: &mut Stage) -> Result<()> {
    repeat(stage, |registers, number| {
        let (count, differences) = call(registers, i64::from(std::process::id()));
        ensure!(count == CALLS, "block {number}: {count} calls instead of {CALLS}");
        ensure!(differences == 0, "block {number}: a call returned something else: {differences:#x}");
        Ok(())
    })
}

/// Page faults, one after the other.
pub fn faults(stage: &mut Stage) -> Result<()> {
    let mut map = Map::anonymous(PAGES * PAGE, MapFlags::MAP_PRIVATE)?;
    map.advise(MmapAdvise::MADV_NOHUGEPAGE)?;
    repeat(stage, move |registers, number| {
        map.advise(MmapAdvise::MADV_DONTNEED)?;
        let end = touch(registers, map.bytes_mut(), number);
        let expected = map.address() + PAGES * PAGE;
        ensure!(end == expected as u64, "block {number}: it ended at {end:#x} instead of {expected:#x}");
        for (page, bytes) in map.bytes().chunks_exact(PAGE).enumerate() {
            let found = u64::from_ne_bytes(std::array::from_fn(|at| bytes[at]));
            let expected = number + 1;
            ensure!(found == expected, "block {number}: page {page} was added {found} instead of {expected}");
        }
        Ok(())
    })
}

/// Blocks of work until another kernel runs, and one there.
fn repeat(stage: &mut Stage, mut block: impl FnMut(&mut Registers, u64) -> Result<()>) -> Result<()> {
    let expected = Registers::noise(7);
    stage.ready()?;
    for number in 0.. {
        let crashed = stage.in_another_kernel();
        let mut registers = expected.clone();
        block(&mut registers, number)?;
        if crashed && stage.options().damage {
            registers.0[3] ^= 1 << 50;
        }
        registers.compare(&expected)?;
        if crashed {
            break;
        }
    }
    Ok(())
}

/// Calls getpid(2) [`CALLS`] times with these registers. Returns how often the loop was run, and all bits in which a result differed
/// from `pid`.
fn call(registers: &mut Registers, pid: i64) -> (u64, u64) {
    let (mut count, mut differences) = (0u64, 0u64);
    let frame =
        [registers as *mut Registers as u64, pid as u64, &raw mut count as u64, &raw mut differences as u64];
    // SAFETY: the frame and what it points to live on this function's stack, above what is pushed here; rbx and rbp are put back, all
    // other registers that are used are named; getpid touches no memory.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "push rdi",
            "mov rax, [rdi]",
            "mov rbx, [rax]",
            "mov rdx, [rax + 8]",
            "mov r8, [rax + 16]",
            "mov r9, [rax + 24]",
            "mov r10, [rax + 32]",
            "mov r12, [rax + 40]",
            "mov r13, [rax + 48]",
            "mov r14, [rax + 56]",
            "mov rsi, [rax + 64]",
            "mov rdi, [rdi + 8]",
            "mov r15, {calls}",
            "xor ebp, ebp",
            // The results' differences are gathered below the stack pointer's word.
            "push 0",
            "2:",
            "mov eax, {getpid}",
            "syscall",
            "xor rax, rdi",
            "or [rsp], rax",
            "inc rbp",
            "dec r15",
            "jnz 2b",
            "pop rcx",
            "pop rdi",
            "mov rax, [rdi]",
            "mov [rax], rbx",
            "mov [rax + 8], rdx",
            "mov [rax + 16], r8",
            "mov [rax + 24], r9",
            "mov [rax + 32], r10",
            "mov [rax + 40], r12",
            "mov [rax + 48], r13",
            "mov [rax + 56], r14",
            "mov [rax + 64], rsi",
            "mov rax, [rdi + 16]",
            "mov [rax], rbp",
            "mov rax, [rdi + 24]",
            "mov [rax], rcx",
            "pop rbp",
            "pop rbx",
            calls = const CALLS,
            getpid = const libc::SYS_getpid,
            inout("rdi") frame.as_ptr() => _,
            out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("r8") _, out("r9") _, out("r10") _,
            out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
    (count, differences)
}

/// Adds `number` + 1 to the first word of each page, with these registers; where it ended.
fn touch(registers: &mut Registers, bytes: &mut [u8], number: u64) -> u64 {
    let mut end = 0u64;
    let frame =
        [registers as *mut Registers as u64, bytes.as_mut_ptr() as u64, number + 1, &raw mut end as u64];
    let pages = bytes.len() / PAGE;
    // SAFETY: as above; the loop writes to the first word of each page of `bytes`, which is borrowed mutably and aligned to pages.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "push rdi",
            "mov rax, [rdi]",
            "mov rbx, [rax]",
            "mov rdx, [rax + 8]",
            "mov r8, [rax + 16]",
            "mov r9, [rax + 24]",
            "mov r10, [rax + 32]",
            "mov r12, [rax + 40]",
            "mov r13, [rax + 48]",
            "mov r14, [rax + 56]",
            "mov rsi, [rax + 64]",
            "mov rbp, [rdi + 8]",
            "mov rdi, [rdi + 16]",
            "2:",
            "add [rbp], rdi",
            "add rbp, {page}",
            "dec r15",
            "jnz 2b",
            "pop rdi",
            "mov rax, [rdi]",
            "mov [rax], rbx",
            "mov [rax + 8], rdx",
            "mov [rax + 16], r8",
            "mov [rax + 24], r9",
            "mov [rax + 32], r10",
            "mov [rax + 40], r12",
            "mov [rax + 48], r13",
            "mov [rax + 56], r14",
            "mov [rax + 64], rsi",
            "mov rax, [rdi + 24]",
            "mov [rax], rbp",
            "pop rbp",
            "pop rbx",
            page = const PAGE,
            inout("r15") pages => _,
            inout("rdi") frame.as_ptr() => _,
            out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("r8") _, out("r9") _, out("r10") _,
            out("r11") _, out("r12") _, out("r13") _, out("r14") _,
        );
    }
    end
}
