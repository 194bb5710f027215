//! Threads: the program's registers at the top of each kernel stack, against each other and the mappings (arch/x86/entry/entry_64.S, 6.1 and 6.12).

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use snapshot::{AddressSpace, FindingKind, Process, Prot, Registers, Resume, VmaFlags};

use super::{Doubts, Subject};
use crate::syscall::ENOSYS;
use crate::thread::USER_CS;

/// The flags that there are (arch/x86/include/uapi/asm/processor-flags.h).
const FLAGS: u64 = 0x3f_7fd7;
const RLIMIT_STACK: usize = 3;

/// Registers of all threads that are to go on with them.
pub(super) fn check_threads(
    process: &Process,
    subject: &Subject<'_>,
    space: &AddressSpace,
    doubts: &mut Doubts,
) {
    if space.vmas.is_empty() {
        return;
    }
    let stack = process.rlimits.get(RLIMIT_STACK).map_or(u64::MAX, |limit| limit.cur);
    let living: HashMap<_, _> = subject.living.iter().map(|member| (member.task.pid, member)).collect();
    for thread in &process.threads {
        let Some(member) = living.get(&thread.tid) else { continue };
        // Who executes another program gets new ones.
        if matches!(thread.resume, Resume::Exec(_) | Resume::Exit { .. }) {
            continue;
        }
        let (on_cpu, traced) = (thread.on_cpu.is_some(), member.task.ptrace != 0);
        if let Some(text) = contradiction(&thread.regs, on_cpu, traced, space, stack) {
            let text = format!("thread {}: {text}", thread.tid);
            doubts.doubt(FindingKind::Registers, "thread", member.addr, text);
        }
    }
}

/// What is wrong with a thread's registers, if anything is. `stack`: RLIMIT_STACK.
fn contradiction(
    regs: &Registers,
    on_cpu: bool,
    traced: bool,
    space: &AddressSpace,
    stack: u64,
) -> Option<String> {
    let in_call = regs.orig_rax as i32 >= 0;
    // A CPU that was in an exception may just have come upon an address that leads nowhere.
    if regs.cs != USER_CS || on_cpu && !in_call {
        return None;
    }
    if !traced && in_call && regs.rax as i64 == -ENOSYS {
        // SYSCALL leaves them in these two as well, which no program relies on. With FRED it does not, and then both differ.
        let (name, its, copy) = match (regs.rcx != regs.rip, regs.r11 != regs.eflags) {
            (true, false) if is_code(space, regs.rcx) => ("instruction pointer", regs.rip, regs.rcx),
            (false, true) if regs.r11 & !FLAGS == 0 => ("flags", regs.eflags, regs.r11),
            _ => return leads_nowhere(regs, space, stack),
        };
        return Some(format!("its {name} is {its:#x}, and was {copy:#x} when it entered the kernel"));
    }
    leads_nowhere(regs, space, stack)
}

fn is_code(space: &AddressSpace, address: u64) -> bool {
    space.vma_at(address).is_some_and(|vma| vma.prot.contains(Prot::EXEC))
}

/// Whether a thread's next instruction or its stack is where the program has nothing.
fn leads_nowhere(regs: &Registers, space: &AddressSpace, stack: u64) -> Option<String> {
    if !is_code(space, regs.rip) {
        return Some(format!("its instruction pointer, {:#x}, is not that of code", regs.rip));
    }
    // An empty stack begins behind its mapping; one that grows may not have done so yet.
    let is_stack = |vma: &snapshot::Vma| {
        let grows = vma.flags.contains(VmaFlags::GROWSDOWN) && vma.end - vma.start.min(vma.end) <= stack;
        let start = if grows { vma.end.saturating_sub(stack) } else { vma.start };
        (start..=vma.end).contains(&regs.rsp)
    };
    let is_there = space.vmas.iter().any(is_stack);
    (!is_there).then(|| format!("its stack pointer, {:#x}, leads nowhere", regs.rsp))
}
