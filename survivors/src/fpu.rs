//! Vector registers. The assembly below loads them all, keeps them where nobody but the kernel can reach them, and
//! stores them all, so that what comes out can be compared with what went in.

use std::arch::asm;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::libc;

use crate::Stage;
use crate::prng::Prng;

/// x87, SSE and AVX: what XSAVE is asked for.
const COMPONENTS: u32 = 7;
/// Where XSAVE's standard format has the upper halves of the YMM registers on every CPU made so far; checked by CPUID.
const YMM_HIGH: usize = 576;
/// A control word that is not the default: all exceptions masked, double precision, round up.
const FCW: u16 = 0x0a7f;
/// Not the default either: all exceptions masked, round towards zero, flush to zero.
const MXCSR: u32 = 0xff80;

/// An XSAVE area in the standard format.
#[repr(C, align(64))]
#[derive(Clone)]
struct Area([u8; 832]);

impl Area {
    fn zeroed() -> Self {
        Self([0; 832])
    }

    /// All registers filled with noise, both control words unusual.
    fn noise(seed: u64) -> Self {
        let mut area = Self::zeroed();
        area.0[0..2].copy_from_slice(&FCW.to_le_bytes());
        area.0[4] = 0xff; // FTW, abridged: all eight x87 registers hold something
        area.0[24..28].copy_from_slice(&MXCSR.to_le_bytes());
        area.0[512..520].copy_from_slice(&u64::from(COMPONENTS).to_le_bytes()); // XSTATE_BV
        let mut prng = Prng::new(seed);
        for register in 0..8 {
            // A normal number: explicit integer bit, an exponent near one.
            let at = 32 + 16 * register;
            area.0[at..at + 8].copy_from_slice(&(prng.next() | 1 << 63).to_le_bytes());
            area.0[at + 8..at + 10].copy_from_slice(&(0x3fff + register as u16).to_le_bytes());
        }
        for register in 0..16 {
            area.set_ymm(register, std::array::from_fn(|_| prng.next()));
        }
        area
    }

    /// Where the four 64-bit lanes of a YMM register lie.
    fn lane(register: usize, lane: usize) -> usize {
        let half = if lane < 2 { 160 } else { YMM_HIGH };
        half + 16 * register + 8 * (lane % 2)
    }

    fn ymm(&self, register: usize) -> [u64; 4] {
        std::array::from_fn(|lane| {
            let at = Self::lane(register, lane);
            u64::from_le_bytes(std::array::from_fn(|byte| self.0[at + byte]))
        })
    }

    fn set_ymm(&mut self, register: usize, lanes: [u64; 4]) {
        for (lane, value) in lanes.into_iter().enumerate() {
            let at = Self::lane(register, lane);
            self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Everything that a program can rely on; the error names each register that differs.
    fn compare(&self, expected: &Self, when: &str) -> Result<()> {
        let mut wrong = Vec::new();
        let mut field = |name: String, range: std::ops::Range<usize>| {
            let (found, wanted) = (&self.0[range.clone()], &expected.0[range]);
            if found != wanted {
                wrong.push(format!("{name} is {found:02x?} instead of {wanted:02x?}"));
            }
        };
        field("x87 control word".into(), 0..2);
        field("x87 tag word".into(), 4..5);
        field("MXCSR".into(), 24..28);
        for register in 0..8 {
            field(format!("st({register})"), 32 + 16 * register..42 + 16 * register);
        }
        for register in 0..16 {
            let (found, wanted) = (self.ymm(register), expected.ymm(register));
            if found != wanted {
                wrong.push(format!("ymm{register} is {found:x?} instead of {wanted:x?}"));
            }
        }
        ensure!(wrong.is_empty(), "{when}: {} registers lost: {}", wrong.len(), wrong.join(", "));
        Ok(())
    }
}

fn check_cpu() -> Result<()> {
    ensure!(is_x86_feature_detected!("avx2"), "this CPU (or this kernel) has no AVX2");
    let leaf = std::arch::x86_64::__cpuid_count(0xd, 2);
    ensure!(leaf.ebx as usize == YMM_HIGH, "XSAVE keeps the YMM registers at {}", leaf.ebx);
    Ok(())
}

/// Registers held across a sleep. By the ABI a call may spoil them; the kernel promises to leave them alone.
pub fn sleep(stage: &mut Stage) -> Result<()> {
    check_cpu()?;
    let expected = Area::noise(1);
    stage.ready()?;
    let mut count = 0u64;
    loop {
        let mut found = sleep_with(&expected, Duration::from_millis(200))?;
        count += 1;
        let crashed = stage.in_another_kernel();
        if crashed && stage.options().damage {
            found.set_ymm(9, [0; 4]);
        }
        found.compare(&expected, &format!("after sleep {count}"))?;
        if crashed {
            return Ok(());
        }
    }
}

fn sleep_with(registers: &Area, duration: Duration) -> Result<Area> {
    let time =
        libc::timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) };
    let mut own = Area::zeroed();
    let mut found = Area::zeroed();
    let result: i64;
    // SAFETY: the compiler's own vector state is saved first and put back last, so that to it nothing has changed;
    // the system call reads one timespec; the three areas are as large and as aligned as XSAVE demands.
    unsafe {
        asm!(
            "mov eax, {mask}",
            "xor edx, edx",
            "xsave64 [{own}]",
            "xrstor64 [{registers}]",
            "mov eax, {nanosleep}",
            "xor esi, esi",
            "syscall",
            "mov {result}, rax",
            "mov eax, {mask}",
            "xor edx, edx",
            "xsave64 [{found}]",
            "xrstor64 [{own}]",
            mask = const COMPONENTS,
            nanosleep = const libc::SYS_nanosleep,
            own = in(reg) own.0.as_mut_ptr(),
            registers = in(reg) registers.0.as_ptr(),
            found = in(reg) found.0.as_mut_ptr(),
            result = out(reg) result,
            in("rdi") &raw const time,
            out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("r11") _,
            options(nostack),
        );
    }
    ensure!(result == 0, "nanosleep returned {result}");
    Ok(found)
}

/// All YMM registers in a loop that does not enter the kernel.
///
/// ymm15 holds a step, each other register a number that grows by it in every round. After a block of rounds each
/// register has one right value. Verifying and looking for the crash take microseconds between blocks of about 100 ms, so
/// that a crash practically always meets the loop. The x87 registers and the control words stand still and are verified too.
pub fn compute_loop(stage: &mut Stage) -> Result<()> {
    check_cpu()?;
    let mut state = Area::noise(2);
    let rounds = calibrate(&mut state)?;
    stage.ready()?;
    let mut count = 0u64;
    loop {
        block(&mut state, rounds, count)?;
        count += 1;
        if stage.in_another_kernel() {
            break;
        }
    }
    // The block that was interrupted has been verified. One more, with what it left.
    let mut expected = state.clone();
    advance(&mut expected, rounds);
    let general = spin(&mut state, rounds);
    if stage.options().damage {
        let mut ymm = state.ymm(5);
        ymm[2] ^= 1 << 40;
        state.set_ymm(5, ymm);
    }
    same_general(general, rounds)?;
    state.compare(&expected, "in the block after the crash")
}

fn block(state: &mut Area, rounds: u64, number: u64) -> Result<()> {
    let mut expected = state.clone();
    advance(&mut expected, rounds);
    same_general(spin(state, rounds), rounds)?;
    state.compare(&expected, &format!("in block {number} of {rounds} rounds"))
}

/// The general registers go with the loop, too.
fn same_general(found: u64, rounds: u64) -> Result<()> {
    let expected = rounds.wrapping_mul(STRIDE);
    ensure!(found == expected, "the sum in a general register is {found:#x} instead of {expected:#x}");
    Ok(())
}

const STRIDE: u64 = 0x1234_5678_9abc_def1;

fn advance(area: &mut Area, rounds: u64) {
    let step = area.ymm(15);
    for register in 0..15 {
        let mut lanes = area.ymm(register);
        for (lane, step) in lanes.iter_mut().zip(step) {
            *lane = lane.wrapping_add(step.wrapping_mul(rounds));
        }
        area.set_ymm(register, lanes);
    }
}

/// So many rounds take at least 100 ms here.
fn calibrate(state: &mut Area) -> Result<u64> {
    let mut rounds = 10_000;
    loop {
        let start = Instant::now();
        block(state, rounds, 0)?;
        if start.elapsed() >= Duration::from_millis(100) {
            return Ok(rounds);
        }
        rounds *= 2;
    }
}

/// Runs the loop; returns the sum that was built in a general register.
fn spin(state: &mut Area, rounds: u64) -> u64 {
    let mut own = Area::zeroed();
    let sum: u64;
    // SAFETY: the compiler's vector state is saved first and put back last; memory is touched through the two areas
    // only, which are as large and as aligned as XSAVE demands; AVX2 has been checked.
    unsafe {
        asm!(
            "mov eax, {mask}",
            "xor edx, edx",
            "xsave64 [{own}]",
            "xrstor64 [{state}]",
            "xor {sum:e}, {sum:e}",
            "2:",
            "vpaddq ymm0, ymm0, ymm15",
            "vpaddq ymm1, ymm1, ymm15",
            "vpaddq ymm2, ymm2, ymm15",
            "vpaddq ymm3, ymm3, ymm15",
            "vpaddq ymm4, ymm4, ymm15",
            "vpaddq ymm5, ymm5, ymm15",
            "vpaddq ymm6, ymm6, ymm15",
            "vpaddq ymm7, ymm7, ymm15",
            "vpaddq ymm8, ymm8, ymm15",
            "vpaddq ymm9, ymm9, ymm15",
            "vpaddq ymm10, ymm10, ymm15",
            "vpaddq ymm11, ymm11, ymm15",
            "vpaddq ymm12, ymm12, ymm15",
            "vpaddq ymm13, ymm13, ymm15",
            "vpaddq ymm14, ymm14, ymm15",
            "add {sum}, {stride}",
            "dec {rounds}",
            "jnz 2b",
            "mov eax, {mask}",
            "xor edx, edx",
            "xsave64 [{state}]",
            "xrstor64 [{own}]",
            mask = const COMPONENTS,
            own = in(reg) own.0.as_mut_ptr(),
            state = in(reg) state.0.as_mut_ptr(),
            stride = in(reg) STRIDE,
            rounds = inout(reg) rounds => _,
            sum = out(reg) sum,
            out("rax") _, out("rdx") _,
            options(nostack),
        );
    }
    sum
}
