//! A CPU at the edge of the kernel: after a program's last instruction and before all its registers lie in the `pt_regs` of the task's
//! stack, or after the first of them has been taken from there and before the program's next instruction
//! (arch/x86/entry/entry_64.S and calling.h, `sync_regs` in arch/x86/kernel/traps.c; 6.1 and 6.12).
//!
//! Every interrupt, page fault and system call passes through these few dozen instructions, so of many panics one meets a CPU there.
//! What the CPU was doing tells where each register is at that moment:
//!
//! - *System call, entering*: the program's registers are the CPU's own until all are stored. The call has not begun: the thread goes
//!   on at the `syscall` instruction.
//! - *Interrupt or fault, entering*: the CPU has stored the instruction and stack pointers at the top of its entry stack; the others
//!   follow one by one, and all are copied to the task's stack. It will happen again if need be.
//! - *Leaving*: what lies on the task's stack is final and stays there while the registers are loaded from it.

use std::ops::Range;

use ktypes::{Kernel, KernelType};
use snapshot::Registers;

use super::{NO_SYSTEM_CALL, USER_CS, USER_DS, decode};
use crate::error::{Result, corrupt};

/// Bytes of the instruction `syscall`.
const SYSCALL_INSTRUCTION: u64 = 2;
/// `swapgs`.
const SWAPGS: [u8; 3] = [0x0f, 0x01, 0xf8];
/// `call` with a relative address.
const CALL: u8 = 0xe8;
/// The entry code of system calls is some 300 bytes long.
const MAX_ENTRY: u64 = 4096;
/// What `ax` is while a call has no result.
const ENOSYS: u64 = -38_i64 as u64;

/// Words of `pt_regs`, in its order.
const R15: u64 = 0;
const RSI: u64 = 13;
const RDI: u64 = 14;
const RIP: u64 = 16;
const CS: u64 = 17;
const WORDS: u64 = 21;

/// Functions that lead back to where an interrupt or a fault came from, to a program or to the kernel.
const RETURNING: &[&str] = &[
    "error_return",
    "common_interrupt_return",
    "swapgs_restore_regs_and_return_to_usermode",
    "restore_regs_and_return_to_kernel",
    "early_xen_iret_patch",
    "native_iret",
    "native_irq_return_iret",
];
/// Entries after which the program does not repeat what led to them: traps, and system calls by another way.
const NOT_REPEATED: &[&str] =
    &["asm_exc_int3", "asm_exc_overflow", "asm_exc_debug", "asm_exc_nmi", "asm_int80_emulation"];

/// See [`find`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Edge {
    /// These are the program's registers.
    Program(Box<Registers>),
    /// Where they are cannot be told.
    Unknown,
}

impl Edge {
    /// To the kernel that lets it go on, the program was in user mode.
    fn program(registers: Registers) -> Option<Self> {
        Some(Self::Program(Box::new(Registers { orig_rax: NO_SYSTEM_CALL, ..registers })))
    }
}

/// The CPU and the stacks that it may be on.
pub(super) struct Moment<'a> {
    /// The CPU's registers, of the kernel.
    pub cpu: &'a Registers,
    /// The task's stack, from its lowest address to `pt_regs`.
    pub stack: Range<u64>,
    /// What lies in `pt_regs` there.
    pub frame: &'a Registers,
    /// The CPU's number.
    pub number: u32,
}

/// Whether a CPU was at the edge of the kernel, and the program's registers if it was. `None`: it was not, and `pt_regs` has them.
///
/// # Errors
/// When the entry code, or the CPU's TSS, cannot be read.
pub(super) fn find(kernel: &Kernel, moment: &Moment<'_>) -> Result<Option<Edge>> {
    if moment.cpu.cs & 3 != 0 {
        return Ok(None);
    }
    let code = EntryCode::read(kernel)?;
    let cpu = Cpu::read(kernel, moment.number)?;
    let word = |addr| kernel.read_u64(addr).ok();
    let name = |addr| kernel.symbolize(addr).map(|(name, _)| name);
    Ok(at(&code, &cpu, moment, &word, &name))
}

/// Where the entry code has what matters here.
#[derive(Clone, Debug)]
struct EntryCode {
    /// All of it, system calls and interrupts.
    text: Range<u64>,
    /// System calls: up to the return from the C part.
    entering: Range<u64>,
    /// Behind the `swapgs` there. The next instruction puts the program's stack pointer into the TSS.
    swapped: u64,
    /// System calls: from there on.
    leaving: Range<u64>,
}

impl EntryCode {
    fn read(kernel: &Kernel) -> Result<Self> {
        let start = kernel.symbol("entry_SYSCALL_64")?;
        let end = kernel.symbol("entry_SYSRETQ_end")?;
        let len = end.checked_sub(start).filter(|len| *len <= MAX_ENTRY);
        let len = len.ok_or_else(|| corrupt("entry code", start, "it has no end"))?;
        let bytes = kernel.read_bytes(start, len as usize)?;
        let find = |what| corrupt("entry code", start, format!("it has no {what}"));
        let swapped = after_swapgs(&bytes).ok_or_else(|| find("swapgs"))?;
        let do_syscall = kernel.symbol("do_syscall_64")?;
        let returned = after_call(&bytes, start, do_syscall).ok_or_else(|| find("call of do_syscall_64"))?;
        Ok(Self {
            text: kernel.symbol("__entry_text_start")?..kernel.symbol("__entry_text_end")?,
            entering: start..start + returned,
            swapped: start + swapped,
            leaving: start + returned..end,
        })
    }
}

/// The offset behind the first `swapgs`.
fn after_swapgs(code: &[u8]) -> Option<u64> {
    let at = code.windows(SWAPGS.len()).position(|bytes| bytes == SWAPGS)?;
    Some((at + SWAPGS.len()) as u64)
}

/// The offset behind the first `call` of `target` in code that lies at `start`.
fn after_call(code: &[u8], start: u64, target: u64) -> Option<u64> {
    const LEN: usize = 5;
    code.windows(LEN).enumerate().find_map(|(at, bytes)| {
        let [CALL, distance @ ..] = bytes else { return None };
        let distance = i32::from_le_bytes(distance.try_into().ok()?);
        let after = (at + LEN) as u64;
        (start.wrapping_add(after).wrapping_add_signed(distance.into()) == target).then_some(after)
    })
}

#[derive(KernelType)]
#[kernel("tss_struct")]
struct Tss {
    /// Where a CPU begins to push when a program is interrupted: the end of the entry stack (arch/x86/include/asm/processor.h,
    /// `load_sp0`).
    #[kernel("x86_tss.sp0")]
    sp0: u64,
    /// Scratch space of the entry code: the program's stack pointer.
    #[kernel("x86_tss.sp2")]
    sp2: u64,
}

/// What a CPU has for itself.
#[derive(Clone, Debug)]
struct Cpu {
    /// The entry stack.
    entry_stack: Range<u64>,
    /// The program's stack pointer, since a system call began.
    user_stack_pointer: u64,
}

impl Cpu {
    fn read(kernel: &Kernel, number: u32) -> Result<Self> {
        let tss: Tss = kernel.read(kernel.per_cpu(kernel.symbol("cpu_tss_rw")?, number)?)?;
        let size = kernel.size_of("entry_stack")?;
        Ok(Self { entry_stack: tss.sp0.saturating_sub(size)..tss.sp0, user_stack_pointer: tss.sp2 })
    }
}

/// [`find`], of what has been read: `word` reads one of the kernel's memory, `name` is the function at an address.
fn at<'n>(
    code: &EntryCode,
    cpu: &Cpu,
    moment: &Moment<'_>,
    word: &dyn Fn(u64) -> Option<u64>,
    name: &dyn Fn(u64) -> Option<&'n str>,
) -> Option<Edge> {
    let Moment { cpu: now, stack, frame, .. } = moment;
    if code.entering.contains(&now.rip) {
        return entering_call(code, cpu, moment);
    }
    let symbol = name(now.rip).unwrap_or_default();
    let leaving = RETURNING.contains(&symbol) || code.leaving.contains(&now.rip);
    // A stack pointer at the end of a stack is on it: nothing has been pushed yet, or all has been popped.
    if cpu.entry_stack.start < now.rsp && now.rsp <= cpu.entry_stack.end {
        return if leaving {
            Edge::program(**frame)
        } else {
            interrupted(cpu, now, word, name).or(Some(Edge::Unknown))
        };
    }
    if symbol == "sync_regs" {
        return Some(Edge::Unknown);
    }
    // In the C part, or in the entry code of an interrupt that came within it.
    if !code.text.contains(&now.rip) || (stack.start..stack.end).contains(&now.rsp) {
        return None;
    }
    let on_frame = (stack.end..=stack.end.saturating_add(WORDS * 8)).contains(&now.rsp);
    let is_user = now.rsp >> 63 == 0;
    let copied = now.rsp == stack.end && symbol.starts_with("asm_") && is_repeated(symbol);
    if leaving && (on_frame || is_user) || copied {
        return Edge::program(**frame);
    }
    Some(Edge::Unknown)
}

/// Whether the program does again what led to an entry into the kernel.
fn is_repeated(entry: &str) -> bool {
    !NOT_REPEATED.contains(&entry) && !entry.starts_with("asm_fred")
}

/// A system call that has not come to its C part: as if the program were before the instruction.
fn entering_call(code: &EntryCode, cpu: &Cpu, moment: &Moment<'_>) -> Option<Edge> {
    let Moment { cpu: now, stack, frame, .. } = moment;
    if (stack.start..=stack.end).contains(&now.rsp) {
        // All is stored, and the CPU's registers are the kernel's.
        if frame.rax != ENOSYS {
            return Some(Edge::Unknown);
        }
        let rip = frame.rip.wrapping_sub(SYSCALL_INSTRUCTION);
        return Edge::program(Registers { rip, rax: frame.orig_rax, ..**frame });
    }
    // The instruction itself has put the instruction pointer and the flags into registers.
    let rip = now.rcx.wrapping_sub(SYSCALL_INSTRUCTION);
    let rsp = if now.rip <= code.swapped { now.rsp } else { cpu.user_stack_pointer };
    Edge::program(Registers { rip, rsp, eflags: now.r11, cs: USER_CS, ss: USER_DS, ..**now })
}

/// An interrupt or a fault on the entry stack. None where it is of a kind that the program would not repeat.
fn interrupted<'n>(
    cpu: &Cpu,
    now: &Registers,
    word: &dyn Fn(u64) -> Option<u64>,
    name: &dyn Fn(u64) -> Option<&'n str>,
) -> Option<Edge> {
    let base = cpu.entry_stack.end.checked_sub(WORDS * 8)?;
    let slot = |index: u64| base + index * 8;
    let pushed = |index: u64| now.rsp <= slot(index);
    if !pushed(RIP) || word(slot(CS))? & 3 == 0 {
        return None;
    }
    // PUSH_REGS of error_entry: its return address moves from the stack to rsi, and from there to below the registers.
    let below = base.checked_sub(8)?;
    let returns_to = match now.rsp {
        rsp if rsp <= below => [word(below), None],
        _ if pushed(RSI) => [Some(now.rsi), word(slot(RDI))],
        _ if pushed(RDI) => [word(slot(RDI)), None],
        _ => [None, None],
    };
    let is_entry = |name: &&str| {
        name.starts_with("asm_") || ["irq_entries_start", "spurious_entries_start"].contains(name)
    };
    let entry = std::iter::once(Some(now.rip)).chain(returns_to).flatten().filter_map(name).find(is_entry);
    if !is_repeated(entry?) {
        return None;
    }
    let mut bytes = Vec::with_capacity(WORDS as usize * 8);
    for index in R15..WORDS {
        let value = match index {
            // Its place holds the return address at first; the CPU's own is good until all are pushed.
            RDI if !pushed(R15) => now.rdi,
            _ if pushed(index) => word(slot(index))?,
            _ => own_word(now, index),
        };
        bytes.extend(value.to_le_bytes());
    }
    Edge::program(decode(&bytes))
}

/// A word of `pt_regs` that is still in the CPU.
fn own_word(now: &Registers, index: u64) -> u64 {
    let words = [
        now.r15, now.r14, now.r13, now.r12, now.rbp, now.rbx, now.r11, now.r10, now.r9, now.r8, now.rax,
        now.rcx, now.rdx, now.rsi, now.rdi,
    ];
    words.get(index as usize).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const ENTRY: u64 = 0xffff_ffff_81e0_0000;
    const STACK: u64 = 0xffff_c900_0010_0000;
    const FRAME: u64 = STACK + 0x3f58;
    const ENTRY_STACK: u64 = 0xffff_fe00_0000_2000;
    const C_CODE: u64 = 0xffff_ffff_8100_0000;

    const SWAPPED: u64 = ENTRY + 7;
    const PUSHING: u64 = ENTRY + 30;
    const RETURNED: u64 = ENTRY + 0x100;
    const UNSAFE_STACK: u64 = ENTRY + 0x180;
    const ASM_FAULT: u64 = ENTRY + 0x1000;
    const ASM_INT3: u64 = ENTRY + 0x1100;
    const ERROR_ENTRY: u64 = ENTRY + 0x1200;
    const TO_USER: u64 = ENTRY + 0x1300;
    const SYNC_REGS: u64 = C_CODE + 0x100;

    fn code() -> EntryCode {
        EntryCode {
            text: ENTRY..ENTRY + 0x2000,
            entering: ENTRY..RETURNED,
            swapped: SWAPPED,
            leaving: RETURNED..ENTRY + 0x190,
        }
    }

    fn name(addr: u64) -> Option<&'static str> {
        Some(match addr {
            ASM_FAULT..ASM_INT3 => "asm_exc_page_fault",
            ASM_INT3..ERROR_ENTRY => "asm_exc_int3",
            ERROR_ENTRY..TO_USER => "error_entry",
            TO_USER..=0xffff_ffff_81e0_1400 => "swapgs_restore_regs_and_return_to_usermode",
            SYNC_REGS => "sync_regs",
            ENTRY.. => "entry_SYSCALL_64",
            _ => return None,
        })
    }

    /// Registers that are all different.
    fn user() -> Registers {
        let bytes: Vec<u8> = (0..WORDS).flat_map(|n| (0x1000 + n).to_le_bytes()).collect();
        let (rip, rsp, eflags) = (0x40_1000, 0x7ffc_0000_1000, 0x246);
        Registers { rip, rsp, eflags, cs: USER_CS, ss: USER_DS, ..decode(&bytes) }
    }

    fn words(regs: &Registers) -> Vec<u64> {
        let mut words: Vec<u64> = (R15..=RDI).map(|index| own_word(regs, index)).collect();
        words.extend([regs.orig_rax, regs.rip, regs.cs, regs.eflags, regs.rsp, regs.ss]);
        words
    }

    /// A CPU that runs the entry code's instructions as far as they matter.
    #[derive(Clone)]
    struct Machine {
        now: Registers,
        sp2: u64,
        memory: BTreeMap<u64, u64>,
        /// What `find` says before each instruction.
        seen: Vec<Option<Edge>>,
    }

    impl Machine {
        /// All of a task's stack is that of an earlier entry.
        fn new(now: Registers) -> Self {
            let memory = (0..WORDS).map(|n| (FRAME + n * 8, 0xdead_0000 + n)).collect();
            Self { now: Registers { cs: 0x10, ss: 0x18, ..now }, sp2: 0xdead, memory, seen: Vec::new() }
        }

        fn look(&mut self, rip: u64) {
            self.now.rip = rip;
            let frame = (0..WORDS).flat_map(|n| self.memory[&(FRAME + n * 8)].to_le_bytes());
            let frame = decode(&frame.collect::<Vec<u8>>());
            let moment = Moment { cpu: &self.now, stack: STACK..FRAME, frame: &frame, number: 0 };
            let cpu = Cpu { entry_stack: ENTRY_STACK - 0x1000..ENTRY_STACK, user_stack_pointer: self.sp2 };
            let word = |addr| self.memory.get(&addr).copied();
            self.seen.push(at(&code(), &cpu, &moment, &word, &name));
        }

        fn push(&mut self, rip: u64, value: u64) {
            self.look(rip);
            self.now.rsp -= 8;
            self.memory.insert(self.now.rsp, value);
        }

        /// As the kernel does it when all is stored.
        fn clear(&mut self, rip: u64) {
            self.look(rip);
            let Registers { rip: _, rsp, cs, ss, rax, rdi, .. } = self.now;
            self.now = Registers { rsp, cs, ss, rax, rdi, ..Registers::default() };
            self.look(rip);
        }

        fn all_are(&self, expected: &Registers) {
            for (n, seen) in self.seen.iter().enumerate() {
                let expected = Edge::program(*expected);
                assert_eq!(*seen, expected, "at step {n}");
            }
        }
    }

    #[test]
    fn a_call_that_enters_is_not_begun() {
        let before = user();
        // syscall: the next instruction's address and the flags are in registers.
        let next = before.rip + SYSCALL_INSTRUCTION;
        let mut machine = Machine::new(Registers { rcx: next, r11: before.eflags, ..before });
        let expected = Registers { rcx: next, r11: before.eflags, ..before };
        machine.look(ENTRY);
        machine.look(SWAPPED);
        machine.sp2 = machine.now.rsp;
        machine.look(SWAPPED + 9);
        machine.now.rsp = 0x8000_0000_0123_4001; // CR3
        machine.look(SWAPPED + 12);
        machine.now.rsp = FRAME + WORDS * 8;
        let Registers { r11, rcx, rax, .. } = machine.now;
        for value in [USER_DS, machine.sp2, r11, USER_CS, rcx, rax] {
            machine.push(PUSHING, value);
        }
        for index in (R15..=RDI).rev() {
            let value = if index == 10 { ENOSYS } else { own_word(&machine.now, index) };
            machine.push(PUSHING, value);
        }
        machine.clear(PUSHING);
        machine.now.rsp -= 8; // a call within the entry code
        machine.look(PUSHING);
        machine.all_are(&expected);
    }

    #[test]
    fn a_stored_call_with_a_result_is_not_entering() {
        let mut machine = Machine::new(user());
        machine.now.rsp = FRAME;
        machine.look(PUSHING);
        assert_eq!(machine.seen, [Some(Edge::Unknown)]);
    }

    /// From the interrupted instruction to the task's stack.
    fn fault(asm: u64) -> Machine {
        let program = user();
        let mut machine = Machine::new(program);
        let Registers { rip, rsp, eflags, .. } = program;
        for (n, value) in [USER_DS, rsp, eflags, USER_CS, rip, 6].into_iter().enumerate() {
            machine.memory.insert(ENTRY_STACK - 8 * (n as u64 + 1), value);
        }
        machine.now.rsp = ENTRY_STACK - 48;
        machine.look(asm);
        machine.push(asm, asm + 5);
        // error_entry.
        machine.push(ERROR_ENTRY, machine.now.rsi);
        machine.look(ERROR_ENTRY);
        let above = machine.now.rsp + 8;
        machine.now.rsi = machine.memory[&above];
        machine.look(ERROR_ENTRY);
        machine.memory.insert(above, machine.now.rdi);
        for index in (R15..RSI).rev() {
            machine.push(ERROR_ENTRY, own_word(&machine.now, index));
        }
        machine.push(ERROR_ENTRY, machine.now.rsi);
        machine.clear(ERROR_ENTRY);
        machine.now.rdi = 0x1234;
        machine.look(ERROR_ENTRY);
        machine.push(ERROR_ENTRY, ERROR_ENTRY + 0x80);
        // Half of it copied.
        for (n, word) in words(&program).into_iter().enumerate().take(9) {
            machine.memory.insert(FRAME + 8 * n as u64, word);
        }
        machine.look(SYNC_REGS);
        for (n, word) in words(&program).into_iter().enumerate() {
            machine.memory.insert(FRAME + 8 * n as u64, word);
        }
        machine.now.rsp += 16;
        machine.look(asm + 5);
        machine.now.rsp = FRAME;
        machine.look(asm + 8);
        machine
    }

    #[test]
    fn a_fault_that_enters_will_happen_again() {
        fault(ASM_FAULT).all_are(&user());
    }

    #[test]
    fn a_trap_that_enters_would_not() {
        let machine = fault(ASM_INT3);
        assert!(machine.seen.iter().all(|seen| *seen == Some(Edge::Unknown)), "{:?}", machine.seen);
    }

    #[test]
    fn the_way_out_has_everything_on_the_tasks_stack() {
        let after = Registers { rax: 17, orig_rax: 1, ..user() };
        let mut machine = Machine::new(after);
        machine.memory.extend(words(&after).into_iter().enumerate().map(|(n, w)| (FRAME + 8 * n as u64, w)));
        // sysret: popping, on the trampoline, on the program's stack.
        for rsp in (FRAME..=FRAME + 14 * 8).step_by(8).chain([ENTRY_STACK, ENTRY_STACK - 16]) {
            machine.now.rsp = rsp;
            machine.look(RETURNED);
        }
        machine.now.rsp = after.rsp;
        machine.look(UNSAFE_STACK);
        // iret, with and without a trampoline.
        for rsp in [FRAME, FRAME + 128, ENTRY_STACK, ENTRY_STACK - 40] {
            machine.now.rsp = rsp;
            machine.look(TO_USER);
        }
        machine.all_are(&after);
    }

    #[test]
    fn the_kernel_proper_is_no_edge() {
        let mut machine = Machine::new(user());
        machine.now.rsp = FRAME - 200;
        machine.look(C_CODE);
        // An interrupt in the kernel, arriving and returning.
        machine.look(ASM_FAULT);
        machine.look(TO_USER);
        assert_eq!(machine.seen, [None, None, None]);
        machine.seen.clear();
        // On a stack that nobody knows.
        machine.now.rsp = 0xffff_fe00_1234_0000;
        machine.look(ASM_FAULT);
        machine.look(SYNC_REGS);
        assert_eq!(machine.seen, [Some(Edge::Unknown), Some(Edge::Unknown)]);
    }

    #[test]
    fn landmarks_are_found_in_the_code() {
        let mut bytes = vec![0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x01, 0xf8, 0x90];
        assert_eq!(after_swapgs(&bytes), Some(7));
        assert_eq!(after_swapgs(&bytes[..6]), None);
        bytes.extend([CALL, 1, 2, 3, 4, CALL]);
        bytes.extend(0x100_i32.to_le_bytes());
        assert_eq!(after_call(&bytes, ENTRY, ENTRY + 18 + 0x100), Some(18));
        assert_eq!(after_call(&bytes, ENTRY, ENTRY), None);
    }
}
