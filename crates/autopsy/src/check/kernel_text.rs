//! Whether the kernel's own instructions are what they were when the machine was armed.
//!
//! Instructions that a fault has changed show in no data: what a kernel told programs while it ran them looks like any answer. Only what was
//! recorded before can tell (`arm/kernel_text`).
//!
//! The kernel changes its code itself, at places that it keeps lists of: jump labels (kernel/jump_label.c), static calls
//! (kernel/static_call_inline.c, arch/x86/kernel/static_call.c), calls of ftrace at the beginning of functions (arch/x86/kernel/ftrace.c), kprobes
//! (kernel/kprobes.c). A line of code that differs is as it was if one of the other instructions that can stand at such places makes it so.

use std::collections::BTreeMap;

use ktypes::KernelType;
use snapshot::{Finding, FindingKind, KernelText, PAGE_SIZE, Severity, TEXT_LINE};

use crate::Autopsy;
use crate::error::Result;

/// A kernel has some 10,000 jump labels and as many static calls; damaged ends of a table must not make it longer than this.
const MAX_ENTRIES: u64 = 1 << 20;
/// KPROBE_TABLE_SIZE (kernel/kprobes.c).
const KPROBE_TABLE: u64 = 64;
const MAX_PROBES: usize = 1 << 16;
/// Changed lines that are looked at: more of them say nothing more.
const MAX_CHANGED: usize = 1024;
/// Places that are named.
const NAMED: usize = 4;
/// Ways in which a line can have been that are tried.
const MAX_WAYS: usize = 1 << 12;

/// x86_nops[5] and x86_nops[2] (arch/x86/kernel/alternative.c).
const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
const NOP2: [u8; 2] = [0x66, 0x90];
const JMP32: u8 = 0xe9;
const JMP8: u8 = 0xeb;
/// Where IBT is compiled in, functions begin with it, and ftrace's place is behind.
const ENDBR64: u64 = 4;
/// The longest instruction that is patched: jcc with 32 bits, in a static call at a function's end.
const LONGEST: u64 = 6;
/// Symbols of ftrace's own places (arch/x86/kernel/ftrace_64.S).
const FTRACE_CALLS: [&str; 3] = ["ftrace_call", "ftrace_regs_call", "ftrace_graph_call"];
/// What the symbols of the trampolines of static calls begin with (STATIC_CALL_TRAMP_PREFIX).
const TRAMPOLINE: &str = "__SCT__";

/// `struct jump_entry` (include/linux/jump_label.h, HAVE_ARCH_JUMP_LABEL_RELATIVE): addresses relative to where they are written.
#[derive(KernelType)]
#[kernel("jump_entry")]
struct JumpEntry {
    code: i32,
    target: i32,
    #[kernel("code", address)]
    code_at: u64,
    #[kernel("target", address)]
    target_at: u64,
}

/// `struct static_call_site` (include/linux/static_call_types.h), relative likewise.
#[derive(KernelType)]
#[kernel("static_call_site")]
struct StaticCallSite {
    addr: i32,
    #[kernel("addr", address)]
    addr_at: u64,
}

/// `struct kprobe` (include/linux/kprobes.h).
#[derive(KernelType)]
#[kernel("kprobe")]
struct Kprobe {
    #[kernel("hlist", address)]
    #[allow(dead_code, reason = "for container_of")]
    hlist: u64,
    addr: u64,
}

/// The lists of a module (include/linux/module.h).
#[derive(KernelType)]
#[kernel("module")]
struct ModuleTables {
    #[kernel(optional)]
    jump_entries: Option<u64>,
    #[kernel(optional)]
    num_jump_entries: Option<u32>,
    #[kernel(optional)]
    static_call_sites: Option<u64>,
    #[kernel(optional)]
    num_static_call_sites: Option<u32>,
}

/// What the kernel writes at one of its places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patch {
    /// A nop, or a jump to there.
    Jump(u64),
    /// A call to wherever, or none: it cannot be told what it was.
    Call,
}

type Patches = BTreeMap<u64, Patch>;

impl Autopsy<'_> {
    /// Compares the kernel's code with what it was; a change is a finding about the machine that becomes a loss of everybody.
    ///
    /// `armed` is empty when nothing was recorded, which is noted.
    pub fn check_kernel_text(&self, armed: &KernelText) {
        if armed.is_empty() {
            let text = "the kernel's code was not recorded when the machine was armed: whether it has changed is not known";
            self.note(finding(Severity::Note, text.to_owned()));
            return;
        }
        let mut patches = None;
        let mut changed: Vec<u64> = Vec::new();
        let modules = self.module_code();
        for (piece, pages) in armed.pages() {
            let end = match &piece.module {
                None => u64::MAX,
                // One that was unloaded since, and perhaps another one loaded there, is not compared.
                Some(name) if self.kernel.module_of(piece.start) != Some(name) => continue,
                Some(_) => modules.iter().find(|code| code.start == piece.start).map_or(0, |code| code.end),
            };
            // What was recorded behind a module's code was not the module's.
            for (at, whole, lines) in pages.take_while(|(at, ..)| *at < end) {
                let mut page = [0; PAGE_SIZE as usize];
                if let Err(error) = self.kernel.read_into(at, &mut page) {
                    self.note(finding(Severity::Doubt, format!("the kernel's code cannot be read: {error}")));
                    break;
                }
                if KernelText::sum(&page) == whole {
                    continue;
                }
                let (all, _) = page.as_chunks::<TEXT_LINE>();
                for ((line, sum), at) in all.iter().zip(lines).zip((at..).step_by(TEXT_LINE)) {
                    if KernelText::sum(line) != *sum
                        && changed.len() < MAX_CHANGED
                        && !self.was(*sum, at, line, patches.get_or_insert_with(|| self.patches()))
                    {
                        changed.push(at);
                    }
                }
            }
        }
        if changed.is_empty() {
            return;
        }
        let mut names: Vec<String> = changed.iter().map(|at| self.function(*at)).collect();
        names.dedup();
        let more = match names.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more functions"),
        };
        names.truncate(NAMED);
        let text = format!(
            "the kernel's code was no longer what it was when the machine was armed, in {}{more}: what it told programs before it died \
             cannot be relied on",
            names.join(", ")
        );
        self.note(Finding { address: changed.first().copied(), ..finding(Severity::Doubt, text) });
    }

    /// The function that most of a line is of.
    fn function(&self, line: u64) -> String {
        let name =
            self.kernel.symbolize(line.wrapping_add(TEXT_LINE as u64 / 2)).map(|(name, _)| name.to_owned());
        name.unwrap_or_else(|| format!("{line:#x}"))
    }

    /// Whether a line can have had this checksum before the kernel itself changed it.
    fn was(&self, sum: u32, at: u64, line: &[u8; TEXT_LINE], patches: &Patches) -> bool {
        let end = at.wrapping_add(TEXT_LINE as u64);
        let mut ways = vec![*line];
        let mut other = |place: u64, instructions: &[&[u8]]| {
            let before = ways.len();
            for instruction in instructions {
                for n in 0..before.min(MAX_WAYS.saturating_sub(ways.len())) {
                    let way = with(&ways[n], at, place, instruction);
                    ways.push(way);
                }
            }
        };
        for (place, patch) in patches.range(at.saturating_sub(LONGEST - 1)..end) {
            match patch {
                Patch::Call => return true,
                Patch::Jump(target) => {
                    let distance = |length: u64| target.wrapping_sub(place.wrapping_add(length)) as i64;
                    let [a, b, c, d] = (distance(5) as i32).to_le_bytes();
                    other(*place, &[&NOP5, &[JMP32, a, b, c, d], &NOP2, &[JMP8, distance(2) as u8]]);
                }
            }
        }
        for entry in at.saturating_sub(LONGEST - 1 + ENDBR64)..end {
            let names = self.kernel.symbols_at(entry);
            if names.iter().any(|name| name.starts_with(TRAMPOLINE) || FTRACE_CALLS.contains(name)) {
                return true;
            }
            if !names.is_empty() {
                other(entry, &[&NOP5]);
                other(entry.wrapping_add(ENDBR64), &[&NOP5]);
            }
        }
        ways.iter().any(|way| KernelText::sum(way) == sum)
    }

    /// All places where the kernel changes its code.
    fn patches(&self) -> Patches {
        let mut patches = Patches::new();
        let tables = self.each_module(|addr, _| Ok(self.kernel.read::<ModuleTables>(addr)?));
        for tables in tables.unwrap_or_default() {
            let table = |start: Option<u64>, count: Option<u32>| start.zip(count.map(u64::from));
            if let Some((start, count)) = table(tables.jump_entries, tables.num_jump_entries) {
                self.noted("jump labels", self.jumps(start, count, &mut patches));
            }
            if let Some((start, count)) = table(tables.static_call_sites, tables.num_static_call_sites) {
                self.noted("static calls", self.calls(start, count, &mut patches));
            }
        }
        let own = |name: &str, entry: &str| -> Result<(u64, u64)> {
            let start = self.kernel.symbol(&format!("__start_{name}"))?;
            let end = self.kernel.symbol(&format!("__stop_{name}"))?;
            Ok((start, end.saturating_sub(start) / self.kernel.size_of(entry)?.max(1)))
        };
        let jumps = own("__jump_table", "jump_entry")
            .and_then(|(start, count)| self.jumps(start, count, &mut patches));
        self.noted("jump labels", jumps);
        let calls = own("static_call_sites", "static_call_site")
            .and_then(|(start, count)| self.calls(start, count, &mut patches));
        self.noted("static calls", calls);
        self.noted("kprobes", self.probes(&mut patches));
        patches
    }

    /// Without a list, what the kernel did itself passes for damage: that is said.
    fn noted(&self, what: &str, result: Result<()>) {
        if let Err(error) = result {
            let text = format!("the places of {what} in the kernel's code are not all known: {error}");
            self.note(finding(Severity::Note, text));
        }
    }

    fn jumps(&self, start: u64, count: u64, patches: &mut Patches) -> Result<()> {
        self.each_entry(start, count, |entry: JumpEntry| {
            let target = entry.target_at.wrapping_add_signed(entry.target.into());
            patches.insert(entry.code_at.wrapping_add_signed(entry.code.into()), Patch::Jump(target));
        })
    }

    fn calls(&self, start: u64, count: u64, patches: &mut Patches) -> Result<()> {
        self.each_entry(start, count, |site: StaticCallSite| {
            patches.insert(site.addr_at.wrapping_add_signed(site.addr.into()), Patch::Call);
        })
    }

    fn each_entry<T: KernelType>(&self, start: u64, count: u64, mut read: impl FnMut(T)) -> Result<()> {
        let size = self.kernel.size_of(T::NAME)?;
        for n in 0..count.min(MAX_ENTRIES) {
            read(self.kernel.read(start.wrapping_add(n * size))?);
        }
        Ok(())
    }

    fn probes(&self, patches: &mut Patches) -> Result<()> {
        let table = self.kernel.symbol("kprobe_table")?;
        let stride = self.kernel.size_of("hlist_head")?;
        for n in 0..KPROBE_TABLE {
            for node in self.kernel.hlist(table.wrapping_add(n * stride), MAX_PROBES) {
                let probe: Kprobe = self.kernel.read(self.kernel.container_of::<Kprobe>(node?, "hlist")?)?;
                patches.insert(probe.addr, Patch::Call);
            }
        }
        Ok(())
    }
}

fn finding(severity: Severity, text: String) -> Finding {
    Finding { kind: FindingKind::KernelText, ..Finding::new(severity, None, "kernel-text", text) }
}

/// A line that begins at `at` with another instruction at `place`, which may begin before it or end behind it.
fn with(line: &[u8; TEXT_LINE], at: u64, place: u64, instruction: &[u8]) -> [u8; TEXT_LINE] {
    let mut line = *line;
    for (byte, at_byte) in instruction.iter().zip(place..) {
        let slot = at_byte.checked_sub(at).and_then(|skip| line.get_mut(usize::try_from(skip).ok()?));
        if let Some(slot) = slot {
            *slot = *byte;
        }
    }
    line
}

#[cfg(test)]
mod tests;
