use snapshot::{Vma, VmaKind};

use super::*;

const CODE: u64 = 0x40_0000;
const STACK_END: u64 = 0x7fff_0000_0000;
const LIMIT: u64 = 8 << 20;

fn vma(start: u64, end: u64, prot: Prot, flags: VmaFlags) -> Vma {
    Vma {
        start,
        end,
        prot,
        shared: false,
        flags,
        kind: VmaKind::Anonymous,
        name: None,
        pages: Vec::new(),
        lost_pages: 0,
    }
}

fn space() -> AddressSpace {
    let stack = STACK_END - 0x2_1000;
    let vmas = vec![
        vma(CODE, CODE + 0x1000, Prot::READ | Prot::EXEC, VmaFlags::empty()),
        vma(CODE + 0x1000, CODE + 0x2000, Prot::READ | Prot::WRITE, VmaFlags::empty()),
        vma(stack, STACK_END, Prot::READ | Prot::WRITE, VmaFlags::GROWSDOWN),
    ];
    AddressSpace { vmas, ..AddressSpace::default() }
}

/// Of a thread that sleeps in a system call.
fn regs() -> Registers {
    Registers {
        cs: USER_CS,
        rip: CODE + 0x123,
        rcx: CODE + 0x123,
        eflags: 0x246,
        r11: 0x246,
        rsp: STACK_END - 0x100,
        orig_rax: 0,
        rax: (-ENOSYS) as u64,
        ..Registers::default()
    }
}

fn judge(regs: Registers, traced: bool, on_cpu: bool) -> Option<String> {
    contradiction(&regs, on_cpu, traced, &space(), LIMIT)
}

/// A thread in user mode, preempted.
fn preempted() -> Registers {
    Registers { orig_rax: u64::MAX, rax: 0, rcx: 5, r11: 6, ..regs() }
}

#[test]
fn registers_that_agree_are_accepted() {
    for on_cpu in [false, true] {
        assert_eq!(judge(regs(), false, on_cpu), None);
        assert_eq!(judge(preempted(), false, on_cpu), None);
    }
    let fred = Registers { rcx: 1, r11: 2, ..regs() };
    assert_eq!(judge(fred, false, false), None, "SYSCALL has left them alone");
    let returned = Registers { rax: 0, rcx: 1, ..regs() };
    assert_eq!(judge(returned, false, false), None, "a new thread, or one with a result");
    for copy in [Registers { rcx: 5, ..regs() }, Registers { r11: 0x100_0000_0246, ..regs() }] {
        assert_eq!(judge(copy, false, false), None, "the copy is damaged, which the program never sees");
    }
}

#[test]
fn a_damaged_word_is_found_by_its_copy() {
    let text = judge(Registers { rip: regs().rip ^ 0x10, ..regs() }, false, false);
    assert_eq!(
        text.as_deref(),
        Some("its instruction pointer is 0x400133, and was 0x400123 when it entered the kernel")
    );
    assert!(judge(Registers { eflags: 0x646, ..regs() }, false, true).is_some());
    assert_eq!(
        judge(Registers { rip: regs().rip ^ 0x10, ..regs() }, true, false),
        None,
        "its tracer may do that"
    );
}

#[test]
fn pointers_that_lead_nowhere_are_found() {
    for regs in [regs(), preempted()] {
        let with = |rip, rsp| judge(Registers { rip, rcx: rip, rsp, ..regs }, false, false);
        assert!(with(CODE + 0x1000, regs.rsp).is_some(), "data");
        assert!(with(0, regs.rsp).is_some());
        for rsp in [0, regs.rsp ^ 1 << 46, STACK_END - LIMIT - 8, STACK_END + 8] {
            assert!(with(regs.rip, rsp).is_some(), "{rsp:#x}");
        }
        for rsp in [STACK_END, STACK_END - LIMIT, CODE + 0x1800] {
            assert_eq!(with(regs.rip, rsp), None, "{rsp:#x}");
        }
    }
    let fault = Registers { rip: 0, ..preempted() };
    assert_eq!(judge(fault, false, true), None, "it is about to get SIGSEGV");
}
