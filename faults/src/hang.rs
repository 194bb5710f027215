//! CPUs and tasks that go on no more. The kernel's watchdogs have to notice.

use std::time::Duration;

use fastrand::Rng;
use serde_json::json;

use crate::gdb::Register;
use crate::live::{Live, Symbols};
use crate::{Injected, call, places_in, reach, start_in_guest};
use lab::Guest;
use lab::Result;

const WAIT: Duration = Duration::from_secs(8);
/// Interrupts are let through (EFLAGS.IF).
const INTERRUPTS: u64 = 0x200;
/// What a CPU that panics second does: nothing, for ever (kernel/panic.c).
const LOOP: &str = "panic_smp_self_stop";
/// Bytes a second of a disk on which one request keeps a task longer than the guests' `hung_task_timeout_secs`: 64 KiB take half a minute.
const SLOW: u32 = 2048;
/// QEMU's name for the guest's disk.
const DISK: &str = "virtio0";
/// Writes that wait for the disk.
const WRITE: &str =
    "for n in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of=/root/fault bs=64k count=64 conv=fsync; done";

const SYSTEM_CALLS: &[&str] =
    &["ksys_read", "ksys_write", "do_futex", "vfs_read", "do_sys_poll", "do_epoll_wait", "handle_mm_fault"];
const SOFTIRQS: &[&str] = &["__do_softirq", "handle_softirqs", "run_timer_softirq", "rcu_core"];

pub(super) fn inject(guest: &mut Guest, symbols: &Symbols, draw: &mut Rng) -> Result<Injected> {
    match draw.u32(..4) {
        0 => endless(guest, symbols, "endless loop", SYSTEM_CALLS, true, draw),
        1 => endless(guest, symbols, "endless loop with interrupts off", SYSTEM_CALLS, false, draw),
        2 => endless(guest, symbols, "endless loop in a softirq", SOFTIRQS, true, draw),
        _ => {
            throttle(guest, SLOW)?;
            start_in_guest(guest, WRITE)?;
            Ok(Injected::Done(format!("tasks hang: the disk does {SLOW} bytes a second")))
        }
    }
}

pub(super) fn clear(guest: &mut Guest) -> Result<()> {
    throttle(guest, 0)
}

/// `bytes` per second; 0 for as many as it can.
fn throttle(guest: &mut Guest, bytes: u32) -> Result<()> {
    let limits = json!({ "device": DISK, "bps": bytes, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0 });
    guest.machine.monitor().command("block_set_io_throttle", limits).map(drop)
}

fn endless(
    guest: &mut Guest,
    symbols: &Symbols,
    what: &str,
    functions: &[&str],
    interrupts: bool,
    draw: &mut Rng,
) -> Result<Injected> {
    let mut live = Live::stop(&guest.machine, symbols)?;
    let places = places_in(&mut live, functions, draw)?;
    let cpu = draw.usize(..live.gdb.cpus());
    let Some(reached) = reach(&mut live, &places, Some(cpu), WAIT)? else {
        live.leave()?;
        return Ok(Injected::Not(what.into()));
    };
    call(&mut live, &reached, LOOP, 0)?;
    let mut flags = u64::from(reached.registers.eflags);
    if !interrupts {
        flags &= !INTERRUPTS;
        live.gdb.set(reached.cpu, Register::Eflags, flags)?;
    }
    live.leave()?;
    let at = symbols.name(reached.at);
    let done = format!("{what}, from {at} on CPU {}", reached.cpu);
    // They may have been off there already.
    Ok(if flags & INTERRUPTS != 0 { Injected::Done(done) } else { Injected::Deaf(done) })
}
