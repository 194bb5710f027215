//! Threads: the program's registers at the top of each kernel stack, against each other and the mappings (arch/x86/entry/entry_64.S, 6.1 and 6.12).

#[cfg(test)]
mod tests;

use snapshot::{AddressSpace, FindingKind, Prot, Registers, Resume, Thread, VmaFlags};

use super::{Doubts, Subject};
use crate::Autopsy;

const ENOSYS: i64 = 38;
/// `__USER_CS`.
const USER_CS: u64 = 0x33;
/// The flags that there are (arch/x86/include/uapi/asm/processor-flags.h).
const FLAGS: u64 = 0x3f_7fd7;

impl Autopsy<'_> {
    /// Registers of a thread that is to go on with them. `stack`: RLIMIT_STACK.
    pub(super) fn check_thread(
        &self,
        thread: &Thread,
        subject: &Subject<'_>,
        space: &AddressSpace,
        stack: u64,
        doubts: &mut Doubts,
    ) {
        let Some(member) = subject.living.iter().find(|member| member.task.pid == thread.tid) else { return };
        // Who executes another program gets new ones.
        if matches!(thread.resume, Resume::Exec(_) | Resume::Exit { .. }) || space.vmas.is_empty() {
            return;
        }
        let (on_cpu, traced) = (thread.on_cpu.is_some(), member.task.ptrace != 0);
        if let Some(text) = contradiction(&thread.regs, on_cpu, traced, space, stack) {
            let text = format!("thread {}: {text}", thread.tid);
            doubts.doubt(FindingKind::Registers, "thread", member.addr, text);
        }
    }
}

/// What is wrong with a thread's registers, if anything is.
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
    let vma = space.vmas.iter().find(|vma| (vma.start..vma.end).contains(&address));
    vma.is_some_and(|vma| vma.prot.contains(Prot::EXEC))
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
