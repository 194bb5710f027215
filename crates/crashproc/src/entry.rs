//! Where the crash kernel enters: the protected regions are checked, in the process's own time, and the procedure is called.

use std::ffi::{c_int, c_void};

use crate::context::Context;
use crate::record::MAX_REGIONS;
use crate::registry;

// rdi: context, rsi: procedure, rdx: data; the stack is aligned. The answer stays in rax and rdx; whoever has called waits for the breakpoint.
core::arch::global_asm!(
    ".pushsection .text.otherworld_entry, \"ax\", @progbits",
    ".hidden otherworld_entry",
    ".globl otherworld_entry",
    ".type otherworld_entry, @function",
    "otherworld_entry:",
    "xor ebp, ebp",
    "call {enter}",
    "xor ebp, ebp",
    "int3",
    "ud2",
    ".size otherworld_entry, . - otherworld_entry",
    ".popsection",
    enter = sym enter,
);

unsafe extern "C" {
    fn otherworld_entry();
}

/// Its address.
pub(crate) fn address() -> u64 {
    otherworld_entry as *const () as u64
}

/// What is left in rax and rdx.
#[repr(C)]
struct Answer {
    outcome: u64,
    damaged_regions: u64,
}

/// A procedure, which may return any number.
type Called = extern "C" fn(&Context, *mut c_void) -> c_int;

/// No lock is taken and nothing allocated: other threads may have all of it.
///
/// # Safety
/// `context` was laid out by the crash kernel; what is registered is mapped.
unsafe extern "C" fn enter(context: &mut Context, procedure: Called, data: *mut c_void) -> Answer {
    let mut damaged = [0; MAX_REGIONS];
    let mut count = 0;
    let mut note = |address| {
        if let Some(next) = damaged.get_mut(count) {
            *next = address;
            count += 1;
        }
    };
    // Those that are not mapped any more are there already.
    context.damaged_regions().iter().copied().for_each(&mut note);
    for region in registry::regions_in_place() {
        if context.damaged_regions().contains(&region.address) {
            continue;
        }
        // SAFETY: the application has promised it, and the crash kernel has looked that it is mapped.
        let bytes = unsafe { std::slice::from_raw_parts(region.address as *const u8, region.len as usize) };
        if crate::record::checksum(bytes) != region.checksum {
            note(region.address);
        }
    }
    context.set_damaged_regions(damaged.get(..count).unwrap_or_default());
    let outcome = procedure(context, data);
    Answer { outcome: u64::from(outcome as u32), damaged_regions: count as u64 }
}
