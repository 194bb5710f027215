//! Checks of the kernel's own that fail: the sites in `__bug_table` (include/asm-generic/bug.h, arch/x86/include/asm/bug.h).
//!
//! A site is an `ud2` that is jumped to when a condition holds. The jump is taken whatever the condition says.

use std::time::Duration;

use fastrand::Rng;

use crate::Injected;
use iced_x86::FlowControl;

use crate::gdb::Register;
use crate::live::{Live, Symbols, is_conditional};
use crate::reach;
use lab::Guest;
use lab::Result;

/// Checks that wait to be made, at a time.
const SITES: usize = 96;
/// So often others are drawn.
const ROUNDS: usize = 6;
const WAIT: Duration = Duration::from_millis(1500);
/// From the jump's target to the `ud2` there may be a few instructions that load what is printed.
const MAX_BLOCK: usize = 8;
/// Entries that are looked at to find a site whose jump can be told.
const MAX_DRAWS: usize = 800;

/// A jump that leads to the `ud2` of a site.
#[derive(Clone, Copy)]
struct Site {
    jump: u64,
    target: u64,
    ud2: u64,
}

pub(super) fn inject(guest: &mut Guest, symbols: &Symbols, draw: &mut Rng) -> Result<Injected> {
    let mut live = Live::stop(&guest.machine, symbols)?;
    let table = addresses(&mut live)?;
    for _ in 0..ROUNDS {
        let mut sites = Vec::new();
        for _ in 0..MAX_DRAWS {
            if sites.len() == SITES {
                break;
            }
            let Some(ud2) = draw.choice(&table) else { break };
            sites.extend(site(&mut live, *ud2)?);
        }
        let jumps: Vec<u64> = sites.iter().map(|site| site.jump).collect();
        let Some(reached) = reach(&mut live, &jumps, None, WAIT)? else { continue };
        let Some(site) = sites.iter().find(|site| site.jump == reached.at) else { continue };
        live.gdb.set(reached.cpu, Register::Rip, site.target)?;
        let what = format!("the check at {} fails on CPU {}", symbols.name(site.ud2), reached.cpu);
        live.leave()?;
        return Ok(Injected::Done(what));
    }
    live.leave()?;
    Ok(Injected::Not(format!("{ROUNDS} times {SITES} checks")))
}

/// Where the `ud2` of each entry is (CONFIG_GENERIC_BUG_RELATIVE_POINTERS).
fn addresses(live: &mut Live<'_>) -> Result<Vec<u64>> {
    let (start, end) =
        (live.symbols.address("__start___bug_table")?, live.symbols.address("__stop___bug_table")?);
    let size = live.symbols.size("bug_entry")?;
    let (displacement, _) = live.symbols.member("bug_entry", "bug_addr_disp")?;
    let bytes = live.read(start, (end - start) as usize)?;
    let entries = bytes.chunks_exact(size as usize).zip(0..);
    let address = |(entry, n): (&[u8], u64)| {
        let at = start + n * size + displacement;
        let relative = entry.get(displacement as usize..)?.first_chunk()?;
        Some(at.wrapping_add_signed(i32::from_le_bytes(*relative).into()))
    };
    Ok(entries.filter_map(address).collect())
}

/// The jump that leads there, if there is one that can be told.
fn site(live: &mut Live<'_>, ud2: u64) -> Result<Option<Site>> {
    let mut code = Vec::new();
    for (start, end) in live.symbols.parts(ud2) {
        code.extend(live.code(start, end)?);
    }
    let Some(last) = code.iter().position(|instruction| instruction.ip() == ud2) else { return Ok(None) };
    // Straight on, backwards from the `ud2`.
    let mut block = vec![ud2];
    for before in code[..last].iter().rev().take(MAX_BLOCK) {
        if before.next_ip() != *block.last().unwrap_or(&ud2) || before.flow_control() != FlowControl::Next {
            break;
        }
        block.push(before.ip());
    }
    let leads =
        |jump: &&iced_x86::Instruction| is_conditional(jump) && block.contains(&jump.near_branch_target());
    let jump = code.iter().find(leads);
    Ok(jump.map(|jump| Site { jump: jump.ip(), target: jump.near_branch_target(), ud2 }))
}
