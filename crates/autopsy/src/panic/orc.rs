//! Unwinding a kernel stack by the ORC tables that the kernel carries (CONFIG_UNWINDER_ORC).
//!
//! Two parallel tables, sorted by address: `__start_orc_unwind_ip` (32-bit offsets from the entry's own place) and `__start_orc_unwind`
//! (`struct orc_entry`: how to find the caller's stack pointer from here). arch/x86/include/asm/orc_types.h and
//! arch/x86/kernel/unwind_orc.c; 6.1 and 6.12 differ in how an entry's type is coded. Modules have tables of their own of the same form.
//! Where there is no table (code that BPF has made) the unwinder falls back to the frame pointer, and says that it guesses.

use std::collections::BTreeSet;
use std::ops::Range;

use iced_x86::FlowControl;
use ktypes::{Kernel, KernelType};
use snapshot::Frame;
use vmcore::PrStatus;

use crate::Result;
use crate::error::corrupt;
use crate::instruction::instruction;
use crate::module::ModuleCode;
use crate::thread::{CpuRegisters, RBP};

#[derive(KernelType)]
#[kernel("orc_entry")]
struct OrcEntry {
    sp_offset: i16,
    bp_offset: i16,
    sp_reg: u8,
    bp_reg: u8,
    #[kernel("type")]
    kind: u8,
    /// Until 6.3: this is the bottom of the stack. Later a `kind` of its own.
    #[kernel("end", optional)]
    end: Option<u8>,
}

/// `struct pt_regs` (arch/x86/include/asm/ptrace.h) as an exception leaves it on the stack.
#[derive(KernelType)]
#[kernel("pt_regs")]
struct PtRegs {
    bp: u64,
    r10: u64,
    r13: u64,
    di: u64,
    dx: u64,
    ip: u64,
    sp: u64,
    /// 2 bytes, and what FRED adds behind them (since 6.9); 8 before.
    #[kernel(address)]
    cs: u64,
}

/// ORC_REG_*: what an offset is relative to.
mod reg {
    pub const UNDEFINED: u8 = 0;
    pub const PREV_SP: u8 = 1;
    pub const DX: u8 = 2;
    pub const DI: u8 = 3;
    pub const BP: u8 = 4;
    pub const SP: u8 = 5;
    pub const R10: u8 = 6;
    pub const R13: u8 = 7;
    pub const BP_INDIRECT: u8 = 8;
    pub const SP_INDIRECT: u8 = 9;
}

/// What kind of frame an entry describes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Undefined,
    EndOfStack,
    Call,
    Regs,
    RegsPartial,
}

impl OrcEntry {
    /// The coding changed in 6.4, together with the removal of `end`.
    fn frame_kind(&self) -> Kind {
        match (self.end, self.kind) {
            (Some(1..), _) => Kind::EndOfStack,
            (Some(0), _) if self.sp_reg == reg::UNDEFINED => Kind::Undefined,
            (Some(0), 0) | (None, 2) => Kind::Call,
            (Some(0), 1) | (None, 3) => Kind::Regs,
            (Some(0), 2) | (None, 4) => Kind::RegsPartial,
            (None, 1) => Kind::EndOfStack,
            _ => Kind::Undefined,
        }
    }
}

/// A frame of a kernel stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where the CPU was, or a return address.
    pub address: u64,
    /// The stack pointer there.
    pub sp: u64,
    /// The CPU was there.
    pub exact: bool,
    /// `struct pt_regs` of the exception that came upon it there.
    pub regs: Option<u64>,
}

impl Place {
    /// An address within the instruction: a return address may belong to the function behind a call that never returns.
    pub(crate) fn within(&self) -> u64 {
        if self.exact { self.address } else { self.address.wrapping_sub(1) }
    }
}

/// Where an unwinding stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    ip: u64,
    sp: u64,
    bp: u64,
    /// Full registers at this place, if an exception left them.
    regs: Option<u64>,
    /// `ip` is where the CPU was, not a return address.
    exact: bool,
    /// A step was made without unwind data.
    guessed: bool,
}

/// What `__switch_to_asm` leaves at the stack pointer of a task that is on no CPU (arch/x86/include/asm/switch_to.h).
#[derive(KernelType)]
#[kernel("inactive_task_frame")]
struct InactiveTaskFrame {
    bp: u64,
    ret_addr: u64,
}

impl State {
    fn place(self) -> Place {
        Place { address: self.ip, sp: self.sp, exact: self.exact, regs: self.regs }
    }

    /// Where a CPU was when it saved these registers for the dump.
    pub(crate) fn new(registers: &CpuRegisters) -> State {
        State {
            ip: registers[PrStatus::RIP],
            sp: registers[PrStatus::RSP],
            bp: registers[RBP],
            regs: None,
            exact: true,
            guessed: false,
        }
    }

    /// Where a task that is on no CPU was switched away from; `sp`: its `thread.sp`.
    pub(crate) fn of_inactive(kernel: &Kernel, sp: u64) -> Result<State> {
        let frame: InactiveTaskFrame = kernel.read(sp)?;
        Ok(State {
            ip: frame.ret_addr,
            sp: sp.wrapping_add(kernel.size_of("inactive_task_frame")?),
            bp: frame.bp,
            regs: None,
            // Who has never run begins there.
            exact: kernel.symbolize(frame.ret_addr).is_some_and(|(_, offset)| offset == 0),
            guessed: false,
        })
    }
}

/// Deeper stacks than this are endless.
pub(crate) const MAX_FRAMES: usize = 64;

/// Two parallel tables.
#[derive(Clone, Copy)]
struct Table {
    ips: u64,
    entries: u64,
    count: u64,
}

/// The dead kernel's unwind tables.
pub(crate) struct Unwinder<'k> {
    kernel: &'k Kernel,
    entry_size: u64,
    own: Table,
    modules: Vec<ModuleCode>,
}

impl<'k> Unwinder<'k> {
    /// `modules`: where those have their code and tables.
    pub(crate) fn new(kernel: &'k Kernel, modules: Vec<ModuleCode>) -> Result<Self> {
        let ips = kernel.symbol("__start_orc_unwind_ip")?;
        let entries = kernel.symbol("__start_orc_unwind")?;
        let entry_size = kernel.size_of("orc_entry")?;
        let count = kernel.symbol("__stop_orc_unwind_ip")?.saturating_sub(ips) / 4;
        let room = kernel.symbol("__stop_orc_unwind")?.saturating_sub(entries);
        if count == 0 || entry_size == 0 || room / entry_size != count {
            return Err(corrupt(
                "orc_unwind table",
                ips,
                format!("{count} addresses for {room} bytes of entries"),
            ));
        }
        Ok(Unwinder { kernel, entry_size, own: Table { ips, entries, count }, modules })
    }

    /// The frames from `state` outwards, until user mode, the bottom of the stack, something that cannot be
    /// followed, or until there are `most`.
    pub(crate) fn unwind(&self, state: State, most: usize) -> Vec<Frame> {
        self.states(state).take(most).map(|state| frame(self.kernel, state.ip, state.guessed)).collect()
    }

    /// The same, as far as nothing is guessed.
    pub(crate) fn places(&self, state: State) -> Vec<Place> {
        let certain = self.states(state).take_while(|state| !state.guessed);
        certain.map(State::place).collect()
    }

    /// The frames of a CPU that had lost its stack pointer at `lost`, with this frame pointer: if there is just one place in `stack` where
    /// somebody had called the function, or one that jumps to it, and from which the frames lead to a program's registers at the end of `stack`.
    pub(crate) fn found_again(&self, lost: &Place, bp: u64, stack: &Range<u64>) -> Option<Vec<Place>> {
        let (_, offset) = self.kernel.symbolize(lost.address)?;
        let start = lost.address.wrapping_sub(offset);
        let at = |sp| State { ip: lost.address, sp, bp, regs: lost.regs, exact: true, guessed: false };
        let mut ways = stack.clone().step_by(8).filter_map(|sp| {
            let way: Vec<State> = self.states(at(sp)).collect();
            // Without it, each return address further up would do as well.
            way.get(1).filter(|caller| self.can_come_back_to(caller.ip, start))?;
            let last = way.last().filter(|state| !state.guessed)?;
            (self.program_registers(last).ok()? == Some(stack.end)).then_some(way)
        });
        let only = ways.next()?;
        ways.next().is_none().then(|| only.into_iter().map(State::place).collect())
    }

    /// Where the registers lie that the code at a place has saved of a program.
    fn program_registers(&self, state: &State) -> Result<Option<u64>> {
        let Some(entry) = self.find(state.place().within())? else { return Ok(None) };
        let Some(at) = self.caller_sp(&entry, state)?.filter(|_| entry.frame_kind() == Kind::Regs) else {
            return Ok(None);
        };
        let frame: PtRegs = self.kernel.read(at)?;
        Ok((self.kernel.read_u16(frame.cs)? & 3 != 0).then_some(at))
    }

    fn states(&self, state: State) -> impl Iterator<Item = State> {
        let caller = |state: &State| {
            let next = self.step(*state).ok()??;
            // Upwards within a stack; an exception frame may lead to another stack, anywhere.
            (next.sp > state.sp || next.regs.is_some()).then_some(next)
        };
        std::iter::successors(Some(state), caller).take(MAX_FRAMES)
    }

    /// The caller of `state`; `None` at the end.
    fn step(&self, state: State) -> Result<Option<State>> {
        let mut guessed = state.guessed;
        let entry = match self.find(state.place().within())? {
            Some(entry) => entry,
            None => {
                guessed = true;
                OrcEntry {
                    sp_offset: 16,
                    bp_offset: -16,
                    sp_reg: reg::BP,
                    bp_reg: reg::PREV_SP,
                    kind: 2,
                    end: None,
                }
            }
        };
        let kind = entry.frame_kind();
        match kind {
            Kind::Undefined => return Ok(self.step_to_caller_of(state)),
            Kind::EndOfStack => return Ok(None),
            Kind::Call | Kind::Regs | Kind::RegsPartial => {}
        }
        let word = |addr: u64| self.kernel.read_u64(addr);
        let Some(sp) = self.caller_sp(&entry, &state)? else { return Ok(None) };
        let bp = match entry.bp_reg {
            reg::PREV_SP => word(sp.wrapping_add_signed(entry.bp_offset.into()))?,
            reg::BP => word(state.bp.wrapping_add_signed(entry.bp_offset.into()))?,
            _ => state.bp,
        };
        let next = match kind {
            Kind::Call => State { ip: word(sp.wrapping_sub(8))?, sp, bp, regs: None, exact: false, guessed },
            _ => {
                // Partial registers are the iret frame alone, at the place where it is in a full one.
                let at = match kind {
                    Kind::RegsPartial => sp.wrapping_sub(PtRegs::offset_of(self.kernel, "ip")?),
                    _ => sp,
                };
                let frame: PtRegs = self.kernel.read(at)?;
                if self.kernel.read_u16(frame.cs)? & 3 != 0 {
                    return Ok(None);
                }
                let full = (kind == Kind::Regs).then_some(at);
                let bp = if full.is_some() { frame.bp } else { bp };
                State { ip: frame.ip, sp: frame.sp, bp, regs: full, exact: true, guessed }
            }
        };
        Ok((next.ip != 0).then_some(next))
    }

    /// The stack pointer that a caller had, or the place of the registers that an exception has saved.
    fn caller_sp(&self, entry: &OrcEntry, state: &State) -> Result<Option<u64>> {
        let word = |addr: u64| self.kernel.read_u64(addr);
        let regs = state.regs.map(|at| self.kernel.read::<PtRegs>(at)).transpose()?;
        let offset = i64::from(entry.sp_offset);
        Ok(Some(match (entry.sp_reg, &regs) {
            (reg::SP, _) => state.sp.wrapping_add_signed(offset),
            (reg::BP, _) => state.bp.wrapping_add_signed(offset),
            (reg::SP_INDIRECT, _) => word(state.sp)?.wrapping_add_signed(offset),
            (reg::BP_INDIRECT, _) => word(state.bp.wrapping_add_signed(offset))?,
            (reg::R10, Some(r)) => r.r10,
            (reg::R13, Some(r)) => r.r13,
            (reg::DI, Some(r)) => r.di,
            (reg::DX, Some(r)) => r.dx,
            _ => return Ok(None),
        }))
    }

    /// The entry that covers an address; `None` where no table does.
    fn find(&self, ip: u64) -> Result<Option<OrcEntry>> {
        let module = self.modules.iter().find(|module| (module.start..module.end).contains(&ip));
        let table = match module {
            Some(module) => {
                Table { ips: module.orc_ips, entries: module.orc_entries, count: module.orc_count }
            }
            None => self.own,
        };
        let Some(index) = self.index_of(&table, ip)? else { return Ok(None) };
        Ok(Some(self.kernel.read(table.entries.wrapping_add(index * self.entry_size))?))
    }

    fn index_of(&self, table: &Table, ip: u64) -> Result<Option<u64>> {
        let (mut low, mut high) = (0, table.count);
        // The last entry whose address is not above ip: section terminators share an address with the entry behind them.
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry_ip(table, middle)? <= ip { low = middle + 1 } else { high = middle }
        }
        let beyond =
            low == table.count && self.kernel.symbolize(ip).is_none_or(|(_, offset)| offset >= MAX_FUNCTION);
        Ok(if beyond { None } else { low.checked_sub(1) })
    }

    /// The caller of a function without unwind data, such as `__crash_kexec` itself (STACK_FRAME_NON_STANDARD, kernel/kexec_core.c): the
    /// first return address on the stack that lies behind a call of just this function.
    fn step_to_caller_of(&self, state: State) -> Option<State> {
        /// No frame without unwind data is larger, bytes.
        const MAX_FRAME: u64 = 1024;
        let (_, offset) = self.kernel.symbolize(state.ip)?;
        let start = state.ip.wrapping_sub(offset);
        (state.sp..state.sp.saturating_add(MAX_FRAME)).step_by(8).find_map(|at| {
            let ip = self.kernel.read_u64(at).ok().filter(|&ret| self.is_behind_call(ret, start))?;
            Some(State { ip, sp: at + 8, regs: None, exact: false, ..state })
        })
    }

    /// Whether an address is that behind a call of the function that begins at `start`.
    fn is_behind_call(&self, ret: u64, start: u64) -> bool {
        self.called_before(ret) == Some(start)
    }

    /// What is called by name by the instruction before an address.
    fn called_before(&self, ret: u64) -> Option<u64> {
        /// `call rel32`: opcode and length.
        const CALL: (u8, u64) = (0xe8, 5);
        let call = ret.wrapping_sub(CALL.1);
        self.kernel.read_u8(call).ok().filter(|opcode| *opcode == CALL.0)?;
        Some(ret.wrapping_add_signed(self.kernel.read_i32(call.wrapping_add(1)).ok()?.into()))
    }

    /// Whether the function that begins at `start` can return to `ret`: what is called there is that function, or comes to it without a call.
    /// x64_sys_call() ends in a jump to `__x64_sys_read`, and that in one to ksys_read().
    fn can_come_back_to(&self, ret: u64, start: u64) -> bool {
        /// More than x64_sys_call() and the first few of each system call.
        const MAX_INSTRUCTIONS: usize = 16 << 10;
        let mut to_do = Vec::from_iter(self.called_before(ret));
        let mut seen = BTreeSet::new();
        while let Some(at) = to_do.pop() {
            if at == start {
                return true;
            }
            if !seen.insert(at) {
                continue;
            }
            if seen.len() > MAX_INSTRUCTIONS {
                return false;
            }
            let Some(instruction) = instruction(self.kernel, at) else { continue };
            match instruction.flow_control() {
                FlowControl::Next => to_do.push(instruction.next_ip()),
                FlowControl::UnconditionalBranch => to_do.push(instruction.near_branch_target()),
                FlowControl::ConditionalBranch => {
                    to_do.extend([instruction.next_ip(), instruction.near_branch_target()]);
                }
                _ => {}
            }
        }
        false
    }

    fn entry_ip(&self, table: &Table, index: u64) -> Result<u64> {
        let at = table.ips.wrapping_add(index * 4);
        Ok(at.wrapping_add_signed(self.kernel.read_i32(at)?.into()))
    }
}

/// No function is longer; an address that far behind a symbol does not belong to it.
const MAX_FUNCTION: u64 = 1 << 20;

/// Without unwind tables: every word of the stack that points into the kernel's text, in order.
pub(crate) fn scan(kernel: &Kernel, state: State, most: usize) -> Vec<Frame> {
    /// Bytes of stack looked at: the size of a kernel stack.
    const REACH: u64 = 16 << 10;
    let text = kernel.symbol_opt("_stext").zip(kernel.symbol_opt("_etext")).map_or(0..0, |(s, e)| s..e);
    let words = (state.sp..state.sp.saturating_add(REACH)).step_by(8);
    let addresses = words.map_while(|addr| kernel.read_u64(addr).ok()).filter(|word| text.contains(word));
    let mut frames = vec![frame(kernel, state.ip, false)];
    frames.extend(addresses.take(most).map(|address| frame(kernel, address, true)));
    frames
}

fn frame(kernel: &Kernel, address: u64, guessed: bool) -> Frame {
    let symbol = match kernel.symbolize(address) {
        Some((name, offset)) if offset < MAX_FUNCTION => match kernel.module_of(address) {
            Some(module) => format!("{name}+{offset:#x} [{module}]"),
            None => format!("{name}+{offset:#x}"),
        },
        _ => format!("{address:#x}"),
    };
    Frame { address, symbol, guessed }
}

#[cfg(test)]
mod tests {
    use synth::{I16, Record, Synth, U16, U64, array};

    use super::*;
    use crate::testing::open;

    // `orc_entry` since 6.4: sp_reg SP, and the kind.
    const CALL: u16 = 0x205;
    const REGS: u16 = 0x305;
    const END: u16 = 0x100;

    /// A kernel with these functions, each of 512 bytes, how far above the stack pointer their callers' are, and of which kind their frames; and where they are.
    fn machine<const N: usize>(cs: Record, functions: [(&str, i16, u16); N]) -> (Synth, [u64; N]) {
        let mut synth = Synth::new();
        let bits = Record::new().field("sp_offset", I16).field("bp_offset", I16);
        let bits = bits.bits("sp_reg", U16, 4).bits("bp_reg", U16, 4).bits("type", U16, 3);
        synth.structure("orc_entry", bits.size(6));
        let regs = ["bp", "r10", "r13", "di", "dx", "ip"]
            .iter()
            .fold(Record::new(), |regs, name| regs.field(name, U64));
        synth.structure("pt_regs", regs.anonymous(cs).field("sp", U64));
        synth.structure("bytes", Record::new().field("bytes", array(U64, 64)));
        let code = functions.map(|(name, ..)| synth.variable(name, "bytes"));
        let ips = synth.variable("__start_orc_unwind_ip", "bytes");
        let entries = synth.variable("__start_orc_unwind", "bytes");
        let count = N as u64;
        synth
            .symbol("__stop_orc_unwind_ip", ips + 4 * count)
            .symbol("__stop_orc_unwind", entries + 6 * count);
        for ((ip, (_, offset, kind)), n) in code.iter().zip(functions).zip(0..) {
            synth.write(ips + n * 4, &(ip.wrapping_sub(ips + n * 4) as i32).to_le_bytes());
            synth.write(entries + n * 6, &offset.to_le_bytes());
            synth.write(entries + n * 6 + 4, &kind.to_le_bytes());
        }
        (synth, code)
    }

    #[test]
    fn a_lost_stack_pointer_is_where_the_frames_lead_to_the_program() {
        let functions =
            [("entry", 0, REGS), ("outer", 0x10, CALL), ("other", 0x20, CALL), ("function", 0x20, CALL)];
        let (mut synth, [entry, outer, other, function]) = machine(Record::new().field("cs", U64), functions);
        let [stack, lost] = ["bytes", "pt_regs"].map(|name| synth.alloc(name));
        let end = stack + 0x180;
        synth.set("pt_regs", end, "cs", 0x33u64);
        // function, called by outer, called by entry.
        let sp = end - 0x30;
        synth.write_u64(sp + 0x18, outer + 8).write_u64(sp + 0x28, entry + 4);
        for caller in [outer, other] {
            let distance = function.wrapping_sub(caller + 8) as i32;
            synth.write(caller + 3, &[0xe8]).write(caller + 4, &distance.to_le_bytes());
        }
        let found = |synth: &Synth| {
            let kernel = open(synth);
            let unwinder = Unwinder::new(&kernel, Vec::new()).unwrap();
            let lost = Place { address: function + 9, sp: 0xdead << 48, exact: true, regs: Some(lost) };
            let places = unwinder.found_again(&lost, 0, &(stack..end))?;
            Some(places.iter().map(|place| (place.address, place.sp)).collect::<Vec<_>>())
        };
        let expected = vec![(function + 9, sp), (outer + 8, sp + 0x20), (entry + 4, end)];
        assert_eq!(found(&synth), Some(expected));
        // Where it could have been elsewhere as well, nobody knows.
        synth.write_u64(sp + 8, other + 8);
        assert_eq!(found(&synth), None);
        synth.write_u64(sp + 8, 0).write_u64(sp + 0x18, 0);
        assert_eq!(found(&synth), None);
    }

    #[test]
    fn a_function_that_is_jumped_to_returns_to_who_called_the_other() {
        let functions = [("outer", 0x10, CALL), ("entry", 0x10, CALL), ("function", 0x20, CALL)];
        let (mut synth, [outer, entry, function]) = machine(Record::new().field("cs", U64), functions);
        let branch = |synth: &mut Synth, at: u64, opcode: u8, to: u64| {
            let distance = to.wrapping_sub(at + 5) as i32;
            synth.write(at, &[opcode]).write(at + 1, &distance.to_le_bytes());
        };
        let returns = |synth: &Synth| {
            let kernel = open(synth);
            let unwinder = Unwinder::new(&kernel, Vec::new()).unwrap();
            (unwinder.can_come_back_to(outer + 8, function), unwinder.is_behind_call(outer + 8, function))
        };
        branch(&mut synth, outer + 3, 0xe8, entry);
        // test %eax,%eax; jne over ret; jmp function
        synth.write(entry, &[0x85, 0xc0, 0x75, 0x01, 0xc3]);
        branch(&mut synth, entry + 5, 0xe9, function);
        assert_eq!(returns(&synth), (true, false));
        // Called, it returns there.
        branch(&mut synth, entry + 5, 0xe8, function);
        assert_eq!(returns(&synth), (false, false));
        branch(&mut synth, outer + 3, 0xe8, function);
        assert_eq!(returns(&synth), (true, true));
        // A loop without an end.
        branch(&mut synth, outer + 3, 0xe8, entry);
        branch(&mut synth, entry + 5, 0xe9, entry);
        assert_eq!(returns(&synth), (false, false));
    }

    /// An interrupt upon a function: entry code with the registers at its stack pointer, and the end of the stack behind it.
    #[test]
    fn an_exception_leads_on_to_what_it_came_upon() {
        let places = |cs: Record, selector: u64| {
            let (mut synth, [entry, function]) = machine(cs, [("entry", 0, REGS), ("function", 0, END)]);
            let frame = synth.alloc("pt_regs");
            synth.set("pt_regs", frame, "ip", function + 8).set("pt_regs", frame, "sp", frame + 0x100);
            synth.write(synth.address_of("pt_regs", frame, "cs"), &selector.to_le_bytes()[..2]);
            let kernel = open(&synth);
            let unwinder = Unwinder::new(&kernel, Vec::new()).unwrap();
            let state = State { ip: entry + 4, sp: frame, bp: 0, regs: None, exact: true, guessed: false };
            let places = unwinder.places(state);
            places
                .iter()
                .map(|place| kernel.symbolize(place.address).unwrap().0.to_owned())
                .collect::<Vec<_>>()
        };
        let narrow = || Record::union().field("cs", U16).field("csx", U64);
        let wide = || Record::new().field("cs", U64);
        for cs in [narrow, wide] as [fn() -> Record; 2] {
            assert_eq!(places(cs(), 0x10), ["entry", "function"]);
            assert_eq!(places(cs(), 0x33), ["entry"], "a program");
        }
    }

    fn kind(kind: u8, end: Option<u8>, sp_reg: u8) -> Kind {
        OrcEntry { sp_offset: 0, bp_offset: 0, sp_reg, bp_reg: 0, kind, end }.frame_kind()
    }

    #[test]
    fn both_codings_of_the_frame_kind() {
        assert_eq!(kind(0, Some(0), reg::SP), Kind::Call);
        assert_eq!(kind(1, Some(0), reg::SP), Kind::Regs);
        assert_eq!(kind(2, Some(0), reg::SP), Kind::RegsPartial);
        assert_eq!(kind(0, Some(1), reg::UNDEFINED), Kind::EndOfStack);
        assert_eq!(kind(0, Some(0), reg::UNDEFINED), Kind::Undefined);
        assert_eq!(kind(0, None, reg::SP), Kind::Undefined);
        assert_eq!(kind(1, None, reg::UNDEFINED), Kind::EndOfStack);
        assert_eq!(kind(2, None, reg::SP), Kind::Call);
        assert_eq!(kind(3, None, reg::SP), Kind::Regs);
        assert_eq!(kind(4, None, reg::SP), Kind::RegsPartial);
    }
}
