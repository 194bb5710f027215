//! Faults: ways to kill a kernel from outside, without its knowing. The guest runs an untouched kernel.
//!
//! In goes a running guest with its [`Symbols`], a [`Kind`] and a stream of random numbers; out comes what was done to it, in words, or that it
//! was not reached in time. What became of the guest is for the caller to see.
//!
//! Each kind follows what the literature has used: failed checks (Otherworld), changed code and wild writes (Rio, Nooks), and what else brings
//! kernels down: hangs, overflowing stacks, exhausted memory.

mod check;
mod data;
mod fatal;
pub mod gdb;
mod hang;
pub mod live;
mod panic;
mod text;

use std::fmt;
use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Serialize};

use crate::gdb::{Register, Registers};
use crate::live::{Live, Symbols};
use lab::Guest;
use lab::{Error, Result};

/// A way to kill a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A check of the kernel's own (BUG, WARN) fails when it is next made.
    Check,
    /// panic() is called: in system calls, page faults, interrupts, softirqs, NMIs, with locks held, amid writes, forks, exits.
    Panic,
    /// Instructions of often used code are changed.
    Text,
    /// Slab objects, kernel stacks, per-CPU areas, page tables, `struct page`s or the page cache are overwritten in places.
    Data,
    /// A CPU or a task goes on no more, and a watchdog notices.
    Hang,
    /// A stack overflows or is gone, or there is no memory left.
    Fatal,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 6] = [Kind::Check, Kind::Panic, Kind::Text, Kind::Data, Kind::Hang, Kind::Fatal];

    /// How long after the injection the kernel may live on: longer, and the fault does not count.
    pub fn patience(self) -> Duration {
        Duration::from_secs(match self {
            Kind::Check | Kind::Panic => 10,
            Kind::Text | Kind::Data => 12,
            // The watchdogs' own times.
            Kind::Hang | Kind::Fatal => 75,
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Check => "failed check",
            Kind::Panic => "explicit panic",
            Kind::Text => "text fault",
            Kind::Data => "data fault",
            Kind::Hang => "hang",
            Kind::Fatal => "stack or memory",
        })
    }
}

/// What has become of a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Injected {
    /// What was done, in words.
    Done(String),
    /// The same, and a CPU hears nothing but an NMI any more. The performance counters that would send it after a few seconds (the hard lockup
    /// detector) are not there in an emulated machine: it is for the caller to send.
    Deaf(String),
    /// Its place was not reached in time, or there was none: what was to be done.
    Not(String),
}

/// Injects a fault. The guest runs on.
pub fn inject(guest: &mut Guest, symbols: &Symbols, kind: Kind, draw: &mut Rng) -> Result<Injected> {
    match kind {
        Kind::Check => check::inject(guest, symbols, draw),
        Kind::Panic => panic::inject(guest, symbols, draw),
        Kind::Text => text::inject(guest, symbols, draw),
        Kind::Data => data::inject(guest, symbols, draw),
        Kind::Hang => hang::inject(guest, symbols, draw),
        Kind::Fatal => fatal::inject(guest, symbols, draw),
    }
}

/// Takes back what would hinder the crash kernel: what was done to devices, not to the dead kernel.
pub fn clear(guest: &mut Guest, kind: Kind) -> Result<()> {
    match kind {
        Kind::Hang => hang::clear(guest),
        _ => Ok(()),
    }
}

/// A CPU that has come to one of several places.
struct Reached {
    cpu: usize,
    at: u64,
    registers: Registers,
}

/// Lets the guest run until a CPU comes to one of these places; none if the time is over. It stands still then, and the places are forgotten. With
/// `cpu` one that is on this CPU, if that can be had.
fn reach(
    live: &mut Live<'_>,
    places: &[u64],
    cpu: Option<usize>,
    timeout: Duration,
) -> Result<Option<Reached>> {
    /// Other CPUs are let pass so often.
    const PASSES: u32 = 200;
    let mut places = places.to_vec();
    places.sort_unstable();
    places.dedup();
    for place in &places {
        live.gdb.break_at(*place)?;
    }
    let mut passes = 0;
    let stopped = loop {
        live.gdb.go_on()?;
        let Some(stopped) = live.gdb.stopped(timeout)? else {
            live.gdb.stop()?;
            break None;
        };
        if cpu.is_none_or(|cpu| cpu == stopped) || passes == PASSES {
            break Some(stopped);
        }
        passes += 1;
        let at = live.gdb.registers(stopped)?.rip;
        if places.binary_search(&at).is_ok() {
            live.gdb.forget(at)?;
            live.gdb.step(stopped)?;
            live.gdb.break_at(at)?;
        }
    };
    for place in &places {
        live.gdb.forget(*place)?;
    }
    let Some(cpu) = stopped else { return Ok(None) };
    let registers = live.gdb.registers(cpu)?;
    Ok(Some(Reached { cpu, at: registers.rip, registers }))
}

/// Has a CPU call a function that does not return, from where it is.
fn call(live: &mut Live<'_>, reached: &Reached, function: &str, argument: u64) -> Result<()> {
    let target = live.symbols.address(function)?;
    let stack = reached.registers.general[Register::Rsp as usize].wrapping_sub(8);
    // Who unwinds a stack looks for what was before the address to which it returns: that is the instruction that was about to be executed.
    live.write(stack, &(reached.at + 1).to_le_bytes())?;
    live.gdb.set(reached.cpu, Register::Rsp, stack)?;
    live.gdb.set(reached.cpu, Register::Rdi, argument)?;
    live.gdb.set(reached.cpu, Register::Rax, 0)?;
    live.gdb.set(reached.cpu, Register::Rip, target)
}

/// A random instruction of a function, not its first one (which ftrace owns).
fn instruction_of(live: &mut Live<'_>, function: &str, draw: &mut Rng) -> Result<Option<u64>> {
    let Some((start, end)) = live.symbols.find(function).and_then(|at| live.symbols.extent(at)) else {
        return Ok(None);
    };
    let code = live.code(start, end)?;
    // What comes after the last return is padding.
    let is_padding = |instruction: &iced_x86::Instruction| {
        matches!(instruction.mnemonic(), iced_x86::Mnemonic::Nop | iced_x86::Mnemonic::Int3)
    };
    let real: Vec<u64> = code
        .iter()
        .skip(2)
        .filter(|instruction| !is_padding(instruction))
        .map(iced_x86::Instruction::ip)
        .collect();
    Ok(draw.choice(real))
}

/// Places in some of several functions, of those that this kernel has: not every instruction is reached.
fn places_in(live: &mut Live<'_>, functions: &[&str], draw: &mut Rng) -> Result<Vec<u64>> {
    const PLACES: usize = 12;
    (0..PLACES).map(|_| place_in(live, functions, draw)).collect()
}

fn place_in(live: &mut Live<'_>, functions: &[&str], draw: &mut Rng) -> Result<u64> {
    let known: Vec<&str> =
        functions.iter().copied().filter(|name| live.symbols.find(name).is_some()).collect();
    let function = draw
        .choice(known)
        .ok_or_else(|| Error::Guest(format!("its kernel has none of {}", functions.join(", "))))?;
    let entry = live.symbols.address(function)?;
    Ok(instruction_of(live, function, draw)?.unwrap_or(entry))
}

/// Runs a script in the guest that need not come back.
fn start_in_guest(guest: &mut Guest, script: &str) -> Result<()> {
    guest.agent.spawn(&lab::Program::shell(script)).map(drop)
}
