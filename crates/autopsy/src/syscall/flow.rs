//! Where a CPU was in a system call: before, within or behind the part that has an effect, by the code of the kernel itself.
//!
//! On its way there and back a call goes through a few functions, each of which makes one call that matters: ksys_read() that of
//! vfs_read(), vfs_read() that of the file's `read_iter`. From the instruction at which such a function was, that
//! call can still be reached or it cannot: the machine code says.

use std::collections::BTreeSet;

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};
use ktypes::Kernel;

use super::is_part;
use crate::instruction::instruction;
use crate::panic::orc::Place;

/// Calls have so many bytes: `call *%rax` to `call *disp32(%r12)`.
const MIN_CALL: u64 = 2;
const MAX_CALL: u64 = 8;
/// Instructions of one function that are looked at.
const MAX_INSTRUCTIONS: usize = 4096;
/// A call through a pointer; also by way of a thunk, where the kernel has mitigations for Spectre.
pub(super) const INDIRECT: &str = "";
const THUNK: &str = "__x86_indirect_";

/// Functions, and the calls in them that lead on.
pub(super) type Way = [(&'static str, &'static [&'static str])];

/// From read, write and their kin to what the file does (fs/read_write.c, 6.1 and 6.12).
pub(super) const TO_THE_FILE: [(&str, &[&str]); 17] = [
    ("vfs_read", &["new_sync_read", INDIRECT]),
    ("vfs_write", &["new_sync_write", INDIRECT]),
    ("new_sync_read", &[INDIRECT]),
    ("new_sync_write", &[INDIRECT]),
    ("do_iter_readv_writev", &[INDIRECT]),
    ("do_iter_read", &["do_iter_readv_writev", "do_loop_readv_writev", INDIRECT]),
    ("do_iter_write", &["do_iter_readv_writev", "do_loop_readv_writev", INDIRECT]),
    ("vfs_readv", &["do_iter_read", "do_iter_readv_writev", "do_loop_readv_writev", INDIRECT]),
    ("vfs_writev", &["do_iter_write", "do_iter_readv_writev", "do_loop_readv_writev", INDIRECT]),
    ("do_readv", &["vfs_readv"]),
    ("do_writev", &["vfs_writev"]),
    ("ksys_read", &["vfs_read"]),
    ("ksys_write", &["vfs_write"]),
    ("__x64_sys_read", &["ksys_read"]),
    ("__x64_sys_write", &["ksys_write"]),
    ("__x64_sys_readv", &["do_readv"]),
    ("__x64_sys_writev", &["do_writev"]),
];
/// From calls that move a file's position by what they have read or written to the last thing that they do before (fs/read_write.c,
/// fs/readdir.c, 6.1 and 6.12).
pub(super) const TO_THE_POSITION: [(&str, &[&str]); 17] = [
    ("ksys_read", &["vfs_read"]),
    ("ksys_write", &["vfs_write"]),
    ("do_readv", &["vfs_readv"]),
    ("do_writev", &["vfs_writev"]),
    ("do_sendfile", &["do_splice_direct", "splice_file_to_pipe"]),
    ("iterate_dir", &[INDIRECT]),
    ("__x64_sys_read", &["ksys_read"]),
    ("__x64_sys_write", &["ksys_write"]),
    ("__x64_sys_readv", &["do_readv", "vfs_readv"]),
    ("__x64_sys_writev", &["do_writev", "vfs_writev"]),
    ("__x64_sys_preadv2", &["do_readv", "vfs_readv"]),
    ("__x64_sys_pwritev2", &["do_writev", "vfs_writev"]),
    ("__x64_sys_sendfile64", &["do_sendfile"]),
    ("__x64_sys_copy_file_range", &["vfs_copy_file_range", "__do_sys_copy_file_range"]),
    ("__do_sys_copy_file_range", &["vfs_copy_file_range"]),
    ("__x64_sys_getdents", &["iterate_dir"]),
    ("__x64_sys_getdents64", &["iterate_dir"]),
];
/// From wait4 and waitid to where a child is taken off the list (kernel/exit.c, 6.1 and 6.12).
pub(super) const TO_THE_CHILD: [(&str, &[&str]); 9] = [
    ("wait_task_zombie", &["release_task"]),
    ("wait_consider_task", &["wait_task_zombie", "release_task"]),
    ("kernel_wait4", &["do_wait"]),
    ("kernel_waitid", &["do_wait"]),
    ("__do_sys_wait4", &["kernel_wait4"]),
    ("__do_sys_waitid", &["kernel_waitid"]),
    ("__se_sys_waitid", &["kernel_waitid", "__do_sys_waitid"]),
    ("__x64_sys_wait4", &["kernel_wait4", "__do_sys_wait4"]),
    ("__x64_sys_waitid", &["kernel_waitid", "__do_sys_waitid", "__se_sys_waitid"]),
];

/// Where a call was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing has been done.
    Before,
    /// In the call that leads on.
    Within,
    /// Back from it, or on the way out without it.
    After,
}

/// By the frames of the thread's kernel stack, the deepest first; and the frame of the function on the way that says it. `None` if that cannot be
/// told.
pub(super) fn phase(kernel: &Kernel, frames: &[Place], way: &Way) -> Option<(Phase, Place)> {
    let on_the_way = |place: &Place| {
        let (name, _) = kernel.symbolize(place.within())?;
        way.iter().find(|(function, _)| is_part(name, function)).map(|(_, calls)| (*place, *calls))
    };
    let (place, calls) = frames.iter().find_map(on_the_way)?;
    let code = Code { kernel, calls };
    if !place.exact && code.returns_from_wanted(place.address) {
        return Some((Phase::Within, place));
    }
    let next = code.next(&place);
    let ahead = code.reachable(next)?;
    if ahead.wanted.is_empty() {
        return Some((Phase::After, place));
    }
    // In a loop it is ahead and behind.
    let mut behind = false;
    for wanted in ahead.wanted {
        behind |= code.reachable(wanted)?.seen.contains(&next);
    }
    (!behind).then_some((Phase::Before, place))
}

/// A function that copies bytes, which moves the iterator on, and accounts for them after that.
pub(super) struct Account<'a> {
    pub function: &'a str,
    /// Its calls that copy.
    pub copies: &'a [&'a str],
    /// One copy may move the iterator several times.
    pub in_pieces: bool,
    pub entry: Entry<'a>,
}

/// How they are accounted for.
pub(super) enum Entry<'a> {
    /// By a store to a member of four bytes at this offset.
    Store(u64),
    /// By an addition to it.
    Sum(u64),
    /// In this call.
    Call(&'a str),
}

/// Whether a CPU had the entry of what it had copied last still ahead of it. `None` if that cannot be told.
pub(super) fn is_open(kernel: &Kernel, frames: &[Place], account: &Account) -> Option<bool> {
    let is_in = |place: &&Place| {
        kernel.symbolize(place.within()).is_some_and(|(name, _)| is_part(name, account.function))
    };
    let place = frames.iter().find(is_in)?;
    let code = Code { kernel, calls: account.copies };
    if !place.exact && code.returns_from_wanted(place.address) {
        return Some(account.in_pieces);
    }
    if let Entry::Call(name) = account.entry
        && !place.exact
        && (Code { kernel, calls: &[name] }).returns_from_wanted(place.address)
    {
        return Some(true);
    }
    let is_entry = |at: u64| {
        let instruction = code.instruction(at)?;
        let stores = |offset| {
            // Its own variables are on the stack.
            instruction.op0_kind() == OpKind::Memory
                && instruction.memory_base() != Register::RSP
                && instruction.memory_displacement64() == offset
                && instruction.memory_size().size() == 4
        };
        let mnemonic = instruction.mnemonic();
        Some(match account.entry {
            Entry::Store(offset) => stores(offset) && !matches!(mnemonic, Mnemonic::Cmp | Mnemonic::Test),
            Entry::Sum(offset) => {
                stores(offset) && mnemonic == Mnemonic::Add && instruction.op1_kind() == OpKind::Register
            }
            Entry::Call(name) => {
                is_call(&instruction) && code.function(instruction.near_branch_target()) == Some(name)
            }
        })
    };
    let among = |from, beyond| {
        code.follow(from, beyond)?.seen.into_iter().map(is_entry).try_fold(false, |any, is| Some(any | is?))
    };
    let (_, offset) = kernel.symbolize(place.within())?;
    // A compiler may have made something else of it.
    let is_known = among(place.within().wrapping_sub(offset), true)?;
    if is_known { among(code.next(place), false) } else { None }
}

/// The machine code of one function, and the calls that are wanted of it.
struct Code<'a> {
    kernel: &'a Kernel,
    calls: &'a [&'a str],
}

/// What can be reached from an instruction.
struct Reachable {
    seen: BTreeSet<u64>,
    /// Behind the wanted calls.
    wanted: Vec<u64>,
}

impl Code<'_> {
    fn instruction(&self, at: u64) -> Option<Instruction> {
        instruction(self.kernel, at)
    }

    /// The function whose first instruction is at an address.
    fn function(&self, at: u64) -> Option<&str> {
        self.kernel.symbolize(at).filter(|(_, offset)| *offset == 0).map(|(name, _)| name)
    }

    fn is_wanted(&self, instruction: &Instruction) -> bool {
        let target = match instruction.op0_kind() {
            OpKind::NearBranch64 => self.function(instruction.near_branch_target()),
            _ => Some(INDIRECT),
        };
        target.is_some_and(|name| self.calls.contains(&if name.starts_with(THUNK) { INDIRECT } else { name }))
    }

    /// The instruction that comes next. A return address that no call precedes was put on the stack by hand, by a debugger that had a function called:
    /// it lies within the instruction that was about to be executed.
    fn next(&self, place: &Place) -> u64 {
        let is_behind_call =
            || (MIN_CALL..=MAX_CALL).any(|len| self.call_before(place.address, len).is_some());
        match place.exact || is_behind_call() {
            true => place.address,
            false => place.within(),
        }
    }

    /// The call of so many bytes that ends at an address, if there is one.
    fn call_before(&self, address: u64, length: u64) -> Option<Instruction> {
        let call = self.instruction(address.wrapping_sub(length))?;
        (call.next_ip() == address && is_call(&call)).then_some(call)
    }

    /// Whether the instruction before a return address is a wanted call.
    fn returns_from_wanted(&self, address: u64) -> bool {
        let call = |length| self.call_before(address, length);
        // A call by name; the last bytes of its instruction may look like another one.
        let by_name = call(5).filter(|call| {
            call.flow_control() == FlowControl::Call && self.function(call.near_branch_target()).is_some()
        });
        match by_name {
            Some(call) => self.is_wanted(&call),
            // By way of a thunk, with a prefix; `call *%rax` and its like.
            None => [6, 3, 2].into_iter().filter_map(call).any(|call| self.is_wanted(&call)),
        }
    }

    /// Everything that can come after the instruction at `from`, within its function; `None` if it cannot be followed.
    fn reachable(&self, from: u64) -> Option<Reachable> {
        self.follow(from, true)
    }

    /// The same, and not `beyond` the wanted calls if they end it.
    fn follow(&self, from: u64, beyond: bool) -> Option<Reachable> {
        let (function, _) = self.kernel.symbolize(from)?;
        let function = function.split('.').next()?;
        let mut reachable = Reachable { seen: BTreeSet::new(), wanted: Vec::new() };
        let mut to_do = vec![from];
        while let Some(at) = to_do.pop() {
            let inside = self.kernel.symbolize(at).is_some_and(|(name, _)| is_part(name, function));
            if !inside || !reachable.seen.insert(at) {
                continue;
            }
            if reachable.seen.len() > MAX_INSTRUCTIONS {
                return None;
            }
            let instruction = self.instruction(at)?;
            match instruction.flow_control() {
                FlowControl::Next => to_do.push(instruction.next_ip()),
                // A part of the function, or the last call of it.
                FlowControl::UnconditionalBranch => {
                    if self.is_wanted(&instruction) {
                        reachable.wanted.push(instruction.next_ip());
                    }
                    to_do.push(instruction.near_branch_target());
                }
                FlowControl::ConditionalBranch => {
                    to_do.extend([instruction.next_ip(), instruction.near_branch_target()]);
                }
                FlowControl::Call | FlowControl::IndirectCall => {
                    let is_wanted = self.is_wanted(&instruction);
                    if is_wanted {
                        reachable.wanted.push(instruction.next_ip());
                    }
                    if beyond || !is_wanted {
                        to_do.push(instruction.next_ip());
                    }
                }
                FlowControl::Return | FlowControl::Exception => {}
                // Jump tables: none of these functions has one.
                _ => return None,
            }
        }
        Some(reachable)
    }
}

fn is_call(instruction: &Instruction) -> bool {
    matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
}

#[cfg(test)]
mod tests {
    use synth::{Record, Synth, U64, array};

    use super::*;
    use crate::testing::open;

    const WAY: [(&str, &[&str]); 2] = [("outer", &["inner"]), ("inner", &[INDIRECT])];
    const CALL_LEN: u64 = 5;

    /// Functions one after the other, of 128 bytes each.
    struct Text {
        synth: Synth,
        start: u64,
    }

    impl Text {
        fn new() -> Self {
            let mut synth = Synth::new();
            synth.structure("functions", Record::new().field("text", array(U64, 128)));
            let start = synth.variable("text", "functions") + 128;
            for (n, name) in
                ["outer", "inner", "look_up", "put", "__x86_indirect_thunk_rax"].iter().enumerate()
            {
                synth.symbol(name, start + n as u64 * 128);
            }
            Self { synth, start }
        }

        fn at(&self, name: &str, offset: u64) -> u64 {
            let names = ["outer", "inner", "look_up", "put", "__x86_indirect_thunk_rax"];
            self.start + names.iter().position(|own| *own == name).unwrap_or(9) as u64 * 128 + offset
        }

        /// Writes code; a name is a call of that function.
        fn code(&mut self, function: &str, code: &[Result<&[u8], &str>]) {
            let mut at = self.at(function, 0);
            for part in code {
                let bytes = match part {
                    Ok(bytes) => bytes.to_vec(),
                    Err(callee) => {
                        let relative = self.at(callee, 0).wrapping_sub(at + CALL_LEN) as i32;
                        [&[0xe8][..], &relative.to_le_bytes()].concat()
                    }
                };
                self.synth.write(at, &bytes);
                at += bytes.len() as u64;
            }
        }

        fn phase(&self, frames: &[(u64, bool)]) -> Option<Phase> {
            let frames: Vec<Place> = frames
                .iter()
                .map(|(address, exact)| Place { address: *address, sp: 0, exact: *exact, regs: None })
                .collect();
            phase(&open(&self.synth), &frames, &WAY).map(|(phase, _)| phase)
        }

        /// Of a CPU in `outer`, which copies by calling `inner`.
        fn is_open(&self, offset: u64, exact: bool, in_pieces: bool, entry: Entry<'_>) -> Option<bool> {
            let frames = [Place { address: self.at("outer", offset), sp: 0, exact, regs: None }];
            let account = Account { function: "outer", copies: &["inner"], in_pieces, entry };
            is_open(&open(&self.synth), &frames, &account)
        }
    }

    /// push rbx | look_up | test eax,eax | js +5 | inner | put | pop rbx; ret
    fn straight() -> Text {
        let mut text = Text::new();
        let (test, leave): (&[u8], &[u8]) = (&[0x85, 0xc0, 0x78, 0x05], &[0x5b, 0xc3]);
        text.code("outer", &[Ok(&[0x53]), Err("look_up"), Ok(test), Err("inner"), Err("put"), Ok(leave)]);
        let thunk = "__x86_indirect_thunk_rax";
        text.code("inner", &[Ok(&[0x90]), Err(thunk), Ok(&[0xc3])]);
        text
    }

    #[test]
    fn what_can_still_be_reached_has_not_happened() {
        let text = straight();
        let outer = |offset, exact| text.phase(&[(text.at("outer", offset), exact)]);
        assert_eq!(outer(0, true), Some(Phase::Before));
        assert_eq!(outer(6, false), Some(Phase::Before), "back from look_up");
        assert_eq!(outer(10, true), Some(Phase::Before), "at the call itself");
        assert_eq!(outer(15, false), Some(Phase::Within));
        assert_eq!(outer(15, true), Some(Phase::After));
        assert_eq!(outer(20, false), Some(Phase::After), "back from put");
        assert_eq!(outer(20, true), Some(Phase::After));
    }

    #[test]
    fn the_deepest_function_on_the_way_counts() {
        let text = straight();
        let (outer, look_up) = ((text.at("outer", 15), false), (text.at("look_up", 3), true));
        let inner = |offset, exact| text.phase(&[look_up, (text.at("inner", offset), exact), outer]);
        assert_eq!(inner(1, true), Some(Phase::Before));
        assert_eq!(inner(6, false), Some(Phase::Within), "through a thunk");
        assert_eq!(inner(6, true), Some(Phase::After));
        assert_eq!(text.phase(&[look_up]), None);
    }

    #[test]
    fn a_store_that_follows_a_call_is_ahead_until_it_is_done() {
        let mut text = Text::new();
        // inner | add [rbx+8],eax | sub [rbx+12],eax | cmp [rbx+12],0 | mov [rsp+12],eax | jne back to inner | ret
        let rest: &[u8] = &[
            0x01, 0x43, 0x08, 0x29, 0x43, 0x0c, 0x83, 0x7b, 0x0c, 0x00, 0x89, 0x44, 0x24, 0x0c, 0x75, 0xeb,
            0xc3,
        ];
        text.code("outer", &[Err("inner"), Ok(rest)]);
        let ahead = |offset, exact| {
            let is_open = |in_pieces, entry| text.is_open(offset, exact, in_pieces, entry);
            if exact {
                assert_eq!(is_open(false, Entry::Sum(8)), Some((5..8).contains(&offset)));
                assert_eq!(is_open(false, Entry::Sum(12)), None, "there is none");
            }
            (is_open(false, Entry::Store(12)), is_open(true, Entry::Store(12)))
        };
        let both = |ahead| (Some(ahead), Some(ahead));
        assert_eq!(ahead(0, true), both(false), "before the call");
        assert_eq!(ahead(5, false), (Some(false), Some(true)), "in it");
        assert_eq!(ahead(5, true), both(true));
        assert_eq!(ahead(8, true), both(true), "between the two stores");
        assert_eq!(ahead(11, true), both(false), "done");
        assert_eq!(ahead(9, false), both(true), "made to call another one at the second store");
        assert_eq!(ahead(12, false), both(false), "made to call another one at the comparison");
    }

    #[test]
    fn a_call_that_follows_a_copy_is_ahead_until_it_is_over() {
        let mut text = Text::new();
        // look_up | inner | look_up | put | test eax,eax | jne back to the first | ret
        let rest: &[u8] = &[0x85, 0xc0, 0x75, 0xe8, 0xc3];
        let calls = [Err("look_up"), Err("inner"), Err("look_up"), Err("put"), Ok(rest)];
        text.code("outer", &calls);
        let ahead = |offset, exact| text.is_open(offset, exact, false, Entry::Call("put"));
        assert_eq!(ahead(5, false), Some(false), "before the copy");
        assert_eq!(ahead(10, false), Some(false), "in it");
        assert_eq!(ahead(15, false), Some(true), "behind it");
        assert_eq!(ahead(20, false), Some(true), "in the call");
        assert_eq!(ahead(20, true), Some(false), "done, though another round may come");
    }

    #[test]
    fn in_a_loop_nobody_knows() {
        let mut text = Text::new();
        // look_up | inner | test eax,eax | jne back to inner | ret
        let back: &[u8] = &[0x85, 0xc0, 0x75, 0xf7, 0xc3];
        text.code("outer", &[Err("look_up"), Err("inner"), Ok(back)]);
        let outer = |offset| text.phase(&[(text.at("outer", offset), true)]);
        assert_eq!(outer(0), Some(Phase::Before));
        assert_eq!(outer(5), None, "once more, or for the first time");
        assert_eq!(outer(10), None);
        assert_eq!(outer(14), Some(Phase::After));
    }

    #[test]
    fn code_that_is_none_says_nothing() {
        let mut text = straight();
        let broken = text.at("outer", 1);
        text.synth.write(broken, &[0x06, 0x06, 0x06, 0x06, 0x06]);
        assert_eq!(text.phase(&[(text.at("outer", 0), true)]), None);
    }
}
