//! Stacks that overflow or are gone, and memory that is used up.

use std::time::Duration;

use fastrand::Rng;

use crate::gdb::Register;
use crate::live::{Live, Symbols};
use crate::{Injected, places_in, reach, start_in_guest};
use lab::Guest;
use lab::Result;

const WAIT: Duration = Duration::from_secs(8);
/// THREAD_SIZE, to which stacks are aligned (CONFIG_VMAP_STACK).
const STACK: u64 = 16 << 10;
/// An address that none can be.
const NOWHERE: u64 = 0xdead_0000_0000_0000;
/// Takes all memory there is.
const EXHAUST: &str =
    "sysctl -q vm.panic_on_oom=2; exec python3 -c \"b = [bytearray(b'x') * (64 << 20) for n in range(999)]\"";

const PLACES: &[&str] = &[
    "ksys_read",
    "ksys_write",
    "vfs_read",
    "handle_mm_fault",
    "do_futex",
    "do_sys_poll",
    "copy_process",
    "do_exit",
    "path_openat",
];

pub(super) fn inject(guest: &mut Guest, symbols: &Symbols, draw: &mut Rng) -> Result<Injected> {
    let overflow = match draw.u32(..3) {
        0 => true,
        1 => false,
        _ => {
            start_in_guest(guest, EXHAUST)?;
            return Ok(Injected::Done("memory is used up (vm.panic_on_oom)".into()));
        }
    };
    let mut live = Live::stop(&guest.machine, symbols)?;
    let places = places_in(&mut live, PLACES, draw)?;
    let cpu = draw.usize(..live.gdb.cpus());
    let Some(reached) = reach(&mut live, &places, Some(cpu), WAIT)? else {
        live.leave()?;
        return Ok(Injected::Not("stack".into()));
    };
    let stack = reached.registers.general[Register::Rsp as usize];
    let (what, pointer) = match overflow {
        true => ("stack overflow", (stack & !(STACK - 1)) + 16),
        false => ("stack pointer lost", NOWHERE),
    };
    live.gdb.set(reached.cpu, Register::Rsp, pointer)?;
    live.leave()?;
    let at = symbols.name(reached.at);
    Ok(Injected::Done(format!("{what} in {at} on CPU {}", reached.cpu)))
}
