//! The dead kernel's machine code, as it lies in its memory.

use iced_x86::{Decoder, DecoderOptions, Instruction};
use ktypes::Kernel;

/// The instruction at an address; `None` if there is none.
pub(crate) fn instruction(kernel: &Kernel, at: u64) -> Option<Instruction> {
    /// No instruction is longer, bytes.
    const LONGEST: usize = 15;
    let bytes = kernel.read_bytes(at, LONGEST).ok()?;
    let instruction = Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction)
}
