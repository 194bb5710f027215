use synth::{I32, Record, Synth, U64, array, named};

use super::*;
use crate::testing::{declare, open};

const CODE: usize = 2 * PAGE_SIZE as usize;
/// Places in the code: of a jump label and what it jumps to, of a static call, of a kprobe.
const LABEL: u64 = 0x21e;
const TARGET: u64 = 0x400;
const CALL: u64 = 0x600;
const PROBE: u64 = 0x700;
/// The second function.
const SECOND: u64 = 0x1000;

/// A kernel with two functions, the address of its code, and what was recorded of it.
fn machine() -> (Synth, u64, KernelText) {
    let mut synth = Synth::new();
    synth
        .structure("code", Record::new().field("words", array(U64, CODE as u32 / 8)))
        .structure("jump_entry", Record::new().field("code", I32).field("target", I32).field("key", U64))
        .structure("static_call_site", Record::new().field("addr", I32).field("key", I32))
        .structure(
            "kprobe_heads",
            Record::new().field("heads", array(named("hlist_head"), KPROBE_TABLE as u32)),
        );
    declare::<Kprobe>(&mut synth, &[("hlist", named("hlist_node"))]);
    let code = synth.variable("do_nanosleep", "code");
    synth.symbol("hrtimer_wakeup", code + SECOND);
    let bytes: Vec<u8> = (0..CODE).map(|n| (n * 7 + n / 256) as u8).collect();
    synth.write(code, &bytes);
    synth.write(code + LABEL, &NOP5).write(code + SECOND + ENDBR64, &NOP5);
    let jumps = synth.variable("__start___jump_table", "jump_entry");
    synth.symbol("__stop___jump_table", jumps + synth.size_of("jump_entry"));
    let relative = |to: u64, at: u64| to.wrapping_sub(at) as u32;
    let target_at = synth.address_of("jump_entry", jumps, "target");
    synth.set("jump_entry", jumps, "code", relative(code + LABEL, jumps)).set(
        "jump_entry",
        jumps,
        "target",
        relative(code + TARGET, target_at),
    );
    let sites = synth.variable("__start_static_call_sites", "static_call_site");
    synth.symbol("__stop_static_call_sites", sites + synth.size_of("static_call_site"));
    synth.set("static_call_site", sites, "addr", relative(code + CALL, sites));
    let heads = synth.variable("kprobe_table", "kprobe_heads");
    let probe = synth.alloc("kprobe");
    synth.set("kprobe", probe, "addr", code + PROBE);
    let node = synth.address_of("kprobe", probe, "hlist");
    synth.hlist_add_head(node, heads + 5 * synth.size_of("hlist_head"));
    let mut armed = KernelText::default();
    armed.add(None, code, &synth.read(code, CODE));
    (synth, code, armed)
}

/// What is found beyond notes, and the notes.
fn found(synth: &Synth, armed: &KernelText) -> (Vec<String>, Vec<String>) {
    let kernel = open(synth);
    let autopsy = Autopsy::new(&kernel);
    autopsy.check_kernel_text(armed);
    let (doubts, notes): (Vec<Finding>, Vec<Finding>) =
        autopsy.findings().into_iter().partition(|finding| finding.severity > Severity::Note);
    let texts = |findings: Vec<Finding>| findings.into_iter().map(|finding| finding.text).collect();
    (texts(doubts), texts(notes))
}

/// What is found when something else stands at a place.
fn changed(place: u64, bytes: &[u8]) -> Vec<String> {
    let (mut synth, code, armed) = machine();
    synth.write(code + place, bytes);
    found(&synth, &armed).0
}

fn jump(from: u64, to: u64) -> [u8; 5] {
    let [a, b, c, d] = (to.wrapping_sub(from + 5) as i32).to_le_bytes();
    [JMP32, a, b, c, d]
}

#[test]
fn a_changed_instruction_is_named_with_its_function() {
    assert_eq!(changed(0x100, &[]), [] as [&str; 0]);
    for (place, function) in [(0x100, "do_nanosleep"), (SECOND + 0x100, "hrtimer_wakeup")] {
        let (mut synth, code, armed) = machine();
        let flipped = synth.read(code + place, 1)[0] ^ 0x10;
        synth.write(code + place, &[flipped]);
        let doubts = found(&synth, &armed).0;
        assert_eq!(doubts.len(), 1, "{doubts:?}");
        assert!(doubts[0].contains(&format!("in {function}:")), "{doubts:?}");
    }
}

#[test]
fn what_the_kernel_changes_itself_is_no_damage() {
    let (_, code, _) = machine();
    let label = code + LABEL;
    assert_eq!(changed(LABEL, &jump(label, code + TARGET)), [] as [&str; 0], "a jump label, over two lines");
    assert_eq!(changed(LABEL, &[0xcc]), [] as [&str; 0], "one that was just being changed");
    assert_eq!(changed(SECOND + ENDBR64, &[0xe8, 1, 2, 3, 4]), [] as [&str; 0], "ftrace");
    assert_eq!(changed(CALL, &[0xe8, 1, 2, 3, 4]), [] as [&str; 0], "a static call");
    assert_eq!(changed(PROBE, &[0xcc]), [] as [&str; 0], "a kprobe");
}

#[test]
fn what_the_kernel_would_not_write_is_damage_at_its_own_places_too() {
    let (_, code, _) = machine();
    assert_eq!(
        changed(LABEL, &jump(code + LABEL, code + TARGET + 1)).len(),
        0,
        "the bytes before can be told"
    );
    let mut both = jump(code + LABEL, code + TARGET).to_vec();
    both.push(0xff);
    assert_eq!(changed(LABEL, &both).len(), 1, "the byte behind it");
    assert_eq!(changed(SECOND + ENDBR64, &[0xe8, 1, 2, 3, 4, 0xff]).len(), 1, "the byte behind ftrace's");
    assert_eq!(changed(SECOND - 6, &[0xff]).len(), 1, "before a function");
}

#[test]
fn code_that_was_recorded_while_a_label_was_on_is_known_when_it_is_off() {
    let (mut synth, code, _) = machine();
    synth.write(code + LABEL, &jump(code + LABEL, code + TARGET));
    let mut armed = KernelText::default();
    armed.add(None, code, &synth.read(code, CODE));
    synth.write(code + LABEL, &NOP5);
    assert_eq!(found(&synth, &armed).0, [] as [&str; 0]);
}

#[test]
fn a_module_that_is_gone_is_not_compared() {
    let (mut synth, code, _) = machine();
    let mut armed = KernelText::default();
    armed.add(Some("ext4".into()), code, &synth.read(code, CODE));
    synth.write(code + 0x100, &[0; 64]);
    assert_eq!(found(&synth, &armed).0, [] as [&str; 0]);
}

#[test]
fn what_cannot_be_told_is_said() {
    let (mut synth, code, armed) = machine();
    let (doubts, notes) = found(&synth, &KernelText::default());
    assert_eq!(doubts, [] as [&str; 0]);
    assert!(notes[0].contains("was not recorded"), "{notes:?}");
    synth.without_symbol("kprobe_table").without_symbol("__stop___jump_table");
    synth.write(code + PROBE, &[0xcc]);
    let (doubts, notes) = found(&synth, &armed);
    assert_eq!(doubts.len(), 1);
    assert!(
        ["kprobes", "jump labels"].iter().all(|what| notes.iter().any(|note| note.contains(what))),
        "{notes:?}"
    );
}

#[test]
fn damaged_tables_come_to_an_end() {
    let (mut synth, code, armed) = machine();
    synth.symbol("__stop_static_call_sites", u64::MAX);
    synth.without_symbol("__stop_static_call_sites");
    synth.write(code + 0x100, &[0; 64]);
    let heads = synth.variable("kprobe_table", "kprobe_heads");
    synth.write_u64(heads, 0x4141_4141_4141_4141);
    assert_eq!(found(&synth, &armed).0.len(), 1);
}
