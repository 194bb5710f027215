//! Where the crash kernel enters: a few instructions that call the procedure and stop.

// rdi: context, rsi: procedure, rdx: data; the stack is aligned. The procedure's result stays in rax; whoever has called waits for the breakpoint.
core::arch::global_asm!(
    ".pushsection .text.otherworld_entry, \"ax\", @progbits",
    ".hidden otherworld_entry",
    ".globl otherworld_entry",
    ".type otherworld_entry, @function",
    "otherworld_entry:",
    "xor ebp, ebp",
    "mov rax, rsi",
    "mov rsi, rdx",
    "call rax",
    "int3",
    "ud2",
    ".size otherworld_entry, . - otherworld_entry",
    ".popsection",
);

unsafe extern "C" {
    fn otherworld_entry();
}

/// Its address.
pub(crate) fn address() -> u64 {
    otherworld_entry as *const () as u64
}
