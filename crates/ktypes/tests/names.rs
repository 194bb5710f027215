//! Symbols, types and typed reads, on fakes.

use std::sync::Arc;

use ktypes::{Btf, Error, Kernel, KernelType};
use proptest::prelude::*;
use synth::{BOOL, I8, I32, I64, PTR, Record, Synth, U8, U16, U32, U64, array, constant, named, volatile};

fn open(synth: &Synth) -> Kernel {
    Kernel::open(synth.build()).unwrap()
}

#[test]
fn symbols() {
    let mut synth = Synth::new();
    let long = "a_function_with_a_name_of_rust_".repeat(10);
    let text = synth.variable("first_variable", "list_head");
    synth
        .symbol_of_kind("__alias_of_first", 'D', text)
        .symbol_of_kind("a_static_one", 'd', text)
        .symbol_of_kind(&long, 'T', text + 100)
        .symbol_of_kind("twice", 't', text + 200)
        .symbol_of_kind("twice", 't', text + 300)
        .symbol_of_kind("größe", 't', text + 400);
    let per_cpu = synth.per_cpu_variable("current_task", 8);
    for (cpu, value) in [(0, 111), (1, 222)] {
        synth.write_u64(synth.per_cpu(per_cpu, cpu), value);
    }
    for i in 0..700 {
        synth.symbol_of_kind(&format!("function_{i}"), 't', text + 0x1000 + i * 16);
    }
    let kernel = open(&synth);
    assert_eq!(kernel.symbol("first_variable").unwrap(), text);
    assert_eq!(kernel.symbol(&long).unwrap(), text + 100);
    assert_eq!(kernel.symbol("twice").unwrap(), text + 200);
    assert_eq!(kernel.symbol("größe").unwrap(), text + 400);
    for i in 0..700 {
        let name = format!("function_{i}");
        let addr = kernel.symbol(&name).unwrap();
        assert_eq!((addr, kernel.symbol_at(addr)), (text + 0x1000 + i * 16, Some(name.as_str())));
        assert_eq!(kernel.symbolize(addr + 15), Some((name.as_str(), 15)));
    }
    assert!(
        matches!(kernel.symbol("third_variable"), Err(Error::MissingSymbol { name, .. }) if name == "third_variable")
    );
    assert_eq!(kernel.symbol_opt(""), None);

    assert_eq!(kernel.symbol_at(text), Some("first_variable"));
    let mut names = kernel.symbols_at(text);
    names.sort_unstable();
    assert_eq!(names, ["__alias_of_first", "a_static_one", "first_variable"]);
    assert_eq!(kernel.symbol_at(text + 1), None);
    assert_eq!(kernel.symbolize(text + 104), Some((long.as_str(), 4)));
    // User space, the per-CPU area, behind the image, the very end.
    for addr in [0x1000, per_cpu, 0xffff_ffff_c000_0000, u64::MAX] {
        assert_eq!(kernel.symbolize(addr), None, "{addr:#x}");
    }

    assert_eq!(kernel.symbol("current_task").unwrap(), per_cpu);
    assert_eq!(kernel.read_u64(kernel.per_cpu(per_cpu, 0).unwrap()).unwrap(), 111);
    assert_eq!(kernel.read_u64(kernel.per_cpu(per_cpu, 1).unwrap()).unwrap(), 222);
    assert!(matches!(kernel.per_cpu(per_cpu, 2), Err(Error::Implausible { .. })));
    assert_eq!((kernel.nr_cpus().unwrap(), kernel.online_cpus().unwrap()), (2, vec![0, 1]));
    assert_eq!(kernel.version(), (6, 1));
}

/// All kinds of members in one structure.
fn declare(synth: &mut Synth) {
    synth
        .enumeration("colour", &[("RED", 1), ("GREEN", 7), ("BLUE", 8)])
        .enumeration("sign", &[("MINUS", -3), ("PLUS", 3)])
        .enumeration64("large", &[("LARGE", 1 << 40), ("LARGE_MINUS", -1)])
        .typedef("pid_t", I32)
        .typedef("loop_a", named("pid_t"))
        .structure("kuid_t_tag", Record::new().field("val", U32))
        .typedef("kuid_t", named("kuid_t_tag"))
        .typedef("unnamed_t", synth::Type::Record(Record::new().field("a", U8).field("b", U64)))
        .structure("upid", Record::new().field("nr", I32).field("ns", PTR))
        .structure(
            "pid",
            Record::new().field("count", named("atomic_t")).field("numbers", array(named("upid"), 0)),
        )
        .structure(
            "task_struct",
            Record::new()
                .field("flags", volatile(constant(U32)))
                .field("pid", constant(named("loop_a")))
                .field("comm", array(U8, 16))
                .field("uid", named("kuid_t"))
                .field("colour", named("colour"))
                .anonymous(
                    Record::union().field("as_word", U64).anonymous(
                        Record::new()
                            .field("low", U32)
                            .anonymous(Record::union().field("high", U32).field("high_half", array(U16, 2))),
                    ),
                )
                .bits("first", U32, 1)
                .bits("three", U32, 3)
                .bits("long_one", U32, 28)
                .bits("wide", U64, 40)
                .bits("tail", U64, 23)
                .field("yes", BOOL)
                .field("small", I8)
                .field_at(
                    4096,
                    "thread",
                    synth::Type::Record(Record::new().field("fsbase", U64).field("fpu", PTR)),
                )
                .field("tasks", named("list_head"))
                .field("numbers", array(named("upid"), 3))
                .field("matrix", array(array(U16, 4), 2))
                .field("state", I64),
        );
}

#[derive(Debug, KernelType)]
#[kernel("task_struct")]
struct Task {
    flags: u32,
    pid: i32,
    comm: [u8; 16],
    uid: u32,
    #[kernel("uid.val")]
    uid_val: u32,
    colour: u32,
    as_word: u64,
    low: u32,
    high: u32,
    high_half: [u16; 2],
    first: bool,
    three: u8,
    long_one: u32,
    wide: u64,
    tail: u64,
    yes: bool,
    small: i8,
    #[kernel("thread.fsbase")]
    fsbase: u64,
    #[kernel("tasks", address)]
    tasks: u64,
    #[kernel("numbers[2].nr")]
    third: i32,
    #[kernel("numbers[1]", nested)]
    second: Upid,
    matrix: [[u16; 4]; 2],
    #[kernel("matrix[1][2]")]
    element: u16,
    #[kernel("__state", or = "state")]
    state: i64,
    #[kernel("rseq_len", optional)]
    rseq_len: Option<u32>,
    #[kernel("rseq", or = "thread.fpu", optional)]
    fpu: Option<u64>,
    #[kernel("nowhere", optional, nested)]
    nowhere: Option<Upid>,
    #[kernel("nowhere", optional, address)]
    nowhere_at: Option<u64>,
}

#[derive(Debug, PartialEq, KernelType)]
#[kernel("upid")]
struct Upid {
    nr: i32,
    #[kernel("ns", address)]
    ns_at: u64,
    ns: u64,
}

#[test]
fn typed_reads() {
    for in_vmalloc in [false, true] {
        let mut synth = Synth::new();
        declare(&mut synth);
        // Across pages that are no neighbours in physical memory, too.
        let addr = if in_vmalloc { synth.vmalloc(3 * 4096) + 4000 } else { synth.alloc("task_struct") };
        synth
            .set("task_struct", addr, "flags", 0x8000_0001u32)
            .set("task_struct", addr, "pid", -5)
            .set("task_struct", addr, "comm", "a program")
            .set("task_struct", addr, "uid.val", 1000)
            .set("task_struct", addr, "colour", 7)
            .set("task_struct", addr, "as_word", 0x1122_3344_5566_7788u64)
            .set("task_struct", addr, "first", 1u8)
            .set("task_struct", addr, "three", 0b101u8)
            .set("task_struct", addr, "long_one", 0x0abc_def0u32)
            .set("task_struct", addr, "wide", 0x12_3456_789au64)
            .set("task_struct", addr, "tail", 0x7f_fffeu32)
            .set("task_struct", addr, "yes", true)
            .set("task_struct", addr, "small", -1)
            .set("task_struct", addr, "thread.fsbase", 0x7fff_1234u64)
            .set("task_struct", addr, "thread.fpu", 99u64)
            .set("task_struct", addr, "numbers[1].nr", 41)
            .set("task_struct", addr, "numbers[1].ns", 42u64)
            .set("task_struct", addr, "numbers[2].nr", 43)
            .set("task_struct", addr, "matrix[1][2]", 77u16)
            .set("task_struct", addr, "state", -2i64);
        let kernel = open(&synth);
        kernel.check::<Task>().unwrap();
        let task: Task = kernel.read(addr).unwrap();
        assert_eq!((task.flags, task.pid), (0x8000_0001, -5));
        assert_eq!(&task.comm, b"a program\0\0\0\0\0\0\0");
        assert_eq!((task.uid, task.uid_val, task.colour), (1000, 1000, 7));
        assert_eq!((task.as_word, task.low, task.high), (0x1122_3344_5566_7788, 0x5566_7788, 0x1122_3344));
        assert_eq!(task.high_half, [0x3344, 0x1122]);
        assert_eq!((task.first, task.three, task.long_one), (true, 5, 0x0abc_def0));
        assert_eq!((task.wide, task.tail), (0x12_3456_789a, 0x7f_fffe));
        assert_eq!((task.yes, task.small), (true, -1));
        assert_eq!(task.fsbase, 0x7fff_1234);
        assert_eq!(task.tasks, addr + synth.offset_of("task_struct", "tasks"));
        let second = addr + synth.offset_of("task_struct", "numbers[1]");
        assert_eq!(task.second, Upid { nr: 41, ns_at: second + 8, ns: 42 });
        assert_eq!((task.third, task.element, task.matrix[1][2], task.matrix[0]), (43, 77, 77, [0; 4]));
        assert_eq!((task.state, task.rseq_len, task.fpu), (-2, None, Some(99)));
        assert_eq!((task.nowhere, task.nowhere_at), (None, None));
        assert_eq!(kernel.container_of::<Task>(task.tasks, "tasks").unwrap(), addr);
        assert_eq!(Task::offset_of(&kernel, "fsbase").unwrap(), 4096);
        assert!(Task::offset_of(&kernel, "rseq_len").is_err());
        assert!(Task::offset_of(&kernel, "no_field").is_err());
    }
}

#[test]
fn sizes_offsets_and_enumerators() {
    let mut synth = Synth::new();
    declare(&mut synth);
    let kernel = open(&synth);
    for name in
        ["task_struct", "upid", "pid", "list_head", "maple_node", "xa_node", "unnamed_t", "pid_t", "colour"]
    {
        assert_eq!(kernel.size_of(name).unwrap(), synth.size_of(name), "{name}");
    }
    for path in ["pid", "high_half", "thread.fpu", "tasks.prev", "numbers[2].ns", "matrix[1]", "matrix[1][3]"]
    {
        assert_eq!(
            kernel.offset_of("task_struct", path).unwrap(),
            synth.offset_of("task_struct", path),
            "{path}"
        );
    }
    assert_eq!(kernel.offset_of("unnamed_t", "b").unwrap(), 8);
    // A flexible array has any number of elements.
    assert_eq!(kernel.offset_of("pid", "numbers[5].nr").unwrap(), 8 + 5 * 16);
    assert_eq!(kernel.member("task_struct", "three").unwrap().bits, Some((1, 3)));
    for path in [
        "nothing",
        "pid.x",
        "numbers[3]",
        "numbers[x]",
        "comm[16]",
        "pid[0]",
        "three.x",
        "",
        ".",
        "a..b",
        "numbers[",
    ] {
        assert!(!kernel.has_member("task_struct", path), "{path}");
        assert!(matches!(kernel.offset_of("task_struct", path), Err(Error::MissingMember { .. })));
    }
    assert!(kernel.has_member("task_struct", "low") && !kernel.has_member("no_struct", "low"));
    assert!(
        matches!(kernel.size_of("no_struct"), Err(Error::MissingType { name, .. }) if name == "no_struct")
    );
    for (name, value) in [("GREEN", 7), ("MINUS", -3), ("PLUS", 3), ("LARGE", 1 << 40), ("LARGE_MINUS", -1)] {
        assert_eq!(kernel.enum_value(name).unwrap(), value, "{name}");
    }
    assert_eq!(kernel.enum_value_in("pageflags", "PG_slab").unwrap(), 9);
    assert!(matches!(
        kernel.enum_value_in("colour", "PG_slab"),
        Err(Error::MissingEnumerator { name, .. }) if name == "colour::PG_slab"
    ));
    assert!(kernel.enum_value("BROWN").is_err());
}

#[derive(Debug, KernelType)]
#[kernel("task_struct")]
#[allow(dead_code)]
struct Missing {
    pid: i32,
    #[kernel("mnt_ns.mounts", or = "mnt_ns.list")]
    mounts: u64,
}

#[derive(Debug, KernelType)]
#[kernel("task_struct")]
#[allow(dead_code)]
struct WrongSize {
    #[kernel("pid")]
    pid: u64,
}

#[derive(Debug, KernelType)]
#[kernel("task_struct")]
#[allow(dead_code)]
struct TooFewBits {
    long_one: u16,
}

#[derive(Debug, KernelType)]
#[kernel("task_struct")]
#[allow(dead_code)]
struct WrongNested {
    #[kernel("numbers[0]", nested)]
    number: Deeper,
}

#[derive(Debug, KernelType)]
#[kernel("upid")]
#[allow(dead_code)]
struct Deeper {
    #[kernel("ns", nested)]
    ns: Upid,
}

#[derive(Debug, KernelType)]
#[kernel("no_struct")]
#[allow(dead_code)]
struct NoStruct {
    x: u64,
}

#[test]
fn declarations_that_do_not_fit_are_named() {
    let mut synth = Synth::new();
    declare(&mut synth);
    let kernel = open(&synth);
    let message = |result: ktypes::Result<()>| result.unwrap_err().to_string();
    assert_eq!(
        message(kernel.check::<Missing>()),
        "Linux 6.1.0-synth: `task_struct` has no member `mnt_ns.mounts` or `mnt_ns.list`"
    );
    assert_eq!(
        message(kernel.check::<WrongSize>()),
        "Linux 6.1.0-synth: `task_struct.pid` has 4 bytes, but its declaration expects 8"
    );
    assert_eq!(
        message(kernel.check::<TooFewBits>()),
        "Linux 6.1.0-synth: `task_struct.long_one` has 28 bits, but its declaration expects 16"
    );
    assert_eq!(
        message(kernel.check::<WrongNested>()),
        "Linux 6.1.0-synth: `task_struct.numbers[0].ns` is not a structure"
    );
    assert_eq!(message(kernel.check::<NoStruct>()), "Linux 6.1.0-synth has no type `no_struct`");

    synth.without_member("task_struct", "pid").release("6.99");
    let kernel = open(&synth);
    let error = kernel.read::<Task>(0).unwrap_err();
    assert!(
        matches!(&error, Error::MissingMember { release, paths, .. } if release == "6.99" && paths == &["pid"])
    );
    // The other members have not moved.
    assert_eq!(kernel.offset_of("task_struct", "comm").unwrap(), 8);
}

#[test]
fn reads_that_fail_say_where_and_why() {
    let mut synth = Synth::new();
    declare(&mut synth);
    let kernel = open(&synth);
    for addr in [0, 0x10, 0xdead_beef_dead_beef, u64::MAX, u64::MAX - 2, 0xffff_8800_0000_0000] {
        let error = kernel.read::<Task>(addr).unwrap_err();
        assert!(matches!(error, Error::Unreadable { what: Some("task_struct"), .. }), "{addr:#x}: {error}");
        assert!(kernel.read_u64(addr).is_err());
        assert!(kernel.read_cstr(addr, 100).is_err());
    }
    let far = synth.page_offset() + (64 << 20);
    assert!(kernel.read_u8(far).unwrap_err().to_string().contains(&format!("{far:#x}")));
    assert!(matches!(kernel.read_bytes(synth.page_offset(), usize::MAX), Err(Error::TooLong { .. })));
}

/// A BTF section of these types' words and these strings.
fn btf_section(types: &[&[u32]], strings: &str) -> Vec<u8> {
    let types = types.concat();
    let (types_len, strings_len) = (types.len() as u32 * 4, strings.len() as u32);
    let head = [0x1_eb9f, 24, 0, types_len, types_len, strings_len];
    let words = head.iter().chain(&types).flat_map(|word| word.to_le_bytes());
    words.chain(strings.bytes()).collect()
}

#[test]
fn a_modules_btf_goes_on_where_the_kernels_ends() {
    const INT: u32 = 1 << 24;
    const STRUCT: u32 = 4 << 24;
    const ARRAY: u32 = 3 << 24;
    const ENUM: u32 = 6 << 24;
    let strings = "\0int\0item\0id\0";
    let at = |strings: &str, name: &str| strings.find(&format!("\0{name}\0")).unwrap() as u32 + 1;
    let old = |name| at(strings, name);
    let base = btf_section(
        &[
            // 1: int.
            &[old("int"), INT, 4, 1 << 24 | 32],
            // 2: struct item { int id; }
            &[old("item"), STRUCT | 1, 4, old("id"), 1, 0],
        ],
        strings,
    );
    let own = "\0driver\0items\0count\0colour\0GREEN\0";
    let new = |name| strings.len() as u32 + at(own, name);
    let module = btf_section(
        &[
            // 3: struct driver { int count; struct item items[3]; int id; }
            &[new("driver"), STRUCT | 3, 20, new("count"), 1, 0, new("items"), 4, 32, old("id"), 1, 128],
            // 4: struct item[3].
            &[0, ARRAY, 0, 2, 1, 3],
            // 5: enum colour { GREEN = 7 }
            &[new("colour"), ENUM | 1, 4, new("GREEN"), 7],
        ],
        own,
    );
    let base = Arc::new(Btf::parse(base, None).unwrap());
    let module = Btf::parse(module, Some(base.clone())).unwrap();
    assert_eq!((base.len(), module.len()), (2, 3));
    assert_eq!((module.find_struct("driver"), module.find_struct("item")), (Some(3), Some(2)));
    assert_eq!(base.find_struct("driver"), None);
    assert_eq!((module.type_name(3), module.type_name(2)), (Some("driver"), Some("item")));
    assert_eq!((module.size(3), module.size(4), module.size(1)), (Some(20), Some(12), Some(4)));
    // By way of the module's types and strings into the kernel's.
    let member = |path: &str| module.member(3, path).map(|member| (member.offset, member.size));
    assert_eq!(member("count"), Some((0, 4)));
    assert_eq!(member("items"), Some((4, 12)));
    assert_eq!(member("items[2].id"), Some((12, 4)));
    assert_eq!(member("id"), Some((16, 4)));
    assert_eq!(module.array(4), Some((3, 2)));
    assert_eq!((module.enumerator_in("colour", "GREEN"), module.enumerator("GREEN")), (Some(7), Some(7)));
    assert_eq!((base.enumerator("GREEN"), module.type_name(6), module.size(6)), (None, None, None));
}

#[test]
fn strings_end_where_they_end() {
    let mut synth = Synth::new();
    let area = synth.vmalloc(4096);
    synth.write(area + 4096 - 5, b"last\0");
    synth.write(area, &[b'x'; 1000]);
    let kernel = open(&synth);
    // The next page is not mapped, and is not touched.
    assert_eq!(kernel.read_cstr(area + 4096 - 5, 4096).unwrap(), b"last");
    assert_eq!(kernel.read_cstr(area, 4096).unwrap().len(), 1000);
    assert_eq!(kernel.read_cstr(area, 10).unwrap(), b"xxxxxxxxxx");
    assert_eq!(kernel.read_cstr(area + 1000, 10).unwrap(), b"");
}

#[test]
fn kernels_that_lack_what_is_needed() {
    let error = |synth: &Synth| Kernel::open(synth.build()).unwrap_err();
    assert!(matches!(error(Synth::new().without_btf()), Error::NoBtf { .. }));
    assert!(error(Synth::new().without_btf()).to_string().contains("CONFIG_DEBUG_INFO_BTF"));
    let old = error(Synth::new().release("5.10").without_info("SYMBOL(kallsyms_names)"));
    assert!(old.to_string().contains("since Linux 6.0"), "{old}");
    assert!(matches!(error(Synth::new().without_info("OSRELEASE")), Error::Core(_)));
    assert!(matches!(error(Synth::new().without_info("NUMBER(phys_base)")), Error::Core(_)));
    assert!(matches!(
        error(Synth::new().without_type("rb_root_cached").without_type("rb_root")),
        Error::MissingType { name, .. } if name == "rb_root"
    ));
    // Wrong place of the tables.
    let mut synth = Synth::new();
    synth.info_line("SYMBOL(kallsyms_names)=0");
    assert!(matches!(error(&synth), Error::NoKallsyms { .. }));
    let mut synth = Synth::new();
    synth.info_line("NUMBER(phys_base)=123456789012");
    assert!(matches!(error(&synth), Error::NoKallsyms { .. }));
}

#[test]
fn a_core_file_opens_like_memory() {
    let mut synth = Synth::five_level();
    declare(&mut synth);
    let addr = synth.alloc("task_struct");
    synth.set("task_struct", addr, "pid", 321);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmcore");
    synth.write_elf(&path);
    let kernel = Kernel::open(vmcore::Vmcore::open(&path).unwrap()).unwrap();
    assert_eq!(kernel.read::<Task>(addr).unwrap().pid, 321);
    // Cut within the object: an error of its own, and the rest goes on.
    let size = std::fs::metadata(&path).unwrap().len();
    let cut = size - (32 << 20) + synth.phys(addr) + 100;
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
    let kernel = Kernel::open(vmcore::Vmcore::open(&path).unwrap()).unwrap();
    assert!(kernel.vmcore().truncated().is_some());
    let error = kernel.read::<Task>(addr).unwrap_err();
    assert!(matches!(error, Error::Unreadable { source: vmcore::Error::Truncated { .. }, .. }), "{error}");
    assert_eq!(kernel.read_i32(addr + 4).unwrap(), 321);
}

/// Asks for everything that has to do with names.
fn ask(core: vmcore::Vmcore) {
    let Ok(kernel) = Kernel::open(core) else { return };
    for addr in [0, 0x1000, 0xffff_ffff_b500_1000, u64::MAX] {
        let _ = kernel.symbol_at(addr);
        let _ = kernel.symbols_at(addr);
        let _ = kernel.symbolize(addr);
        let _ = kernel.read::<Task>(addr);
    }
    for name in ["init_top_pgt", "__start_BTF", "no_such_symbol"] {
        let _ = kernel.symbol(name);
    }
    for name in ["task_struct", "unnamed_t", "pid_t", "maple_tree"] {
        let _ = kernel.size_of(name);
    }
    for path in ["numbers[1].nr", "thread.fsbase", "high_half", "three", "none"] {
        let _ = kernel.member("task_struct", path);
    }
    let _ = kernel.enum_value("GREEN");
    let _ = kernel.enum_value_in("colour", "BLUE");
    let _ = kernel.online_cpus();
    let _ = kernel.slab_cache_of(kernel.memory().page_offset() + (4 << 20));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_tables_never_panic(
        damage in proptest::collection::vec((0usize..24_000, any::<[u8; 4]>()), 1..12)
    ) {
        let mut synth = Synth::new();
        declare(&mut synth);
        let image = synth.image().start as usize;
        ask(synth.build_damaged(|ram| {
            for (at, bytes) in damage {
                ram[image + at..][..4].copy_from_slice(&bytes);
            }
        }));
    }
}

/// BTF and kallsyms are a few KiB in this kernel: damage them word by word, with values that have
/// a meaning somewhere.
#[test]
fn every_damaged_word_of_the_tables_is_survived() {
    let mut synth = Synth::new();
    declare(&mut synth);
    let image = synth.image().start as usize;
    let end = {
        let mut used = 0;
        synth.build_damaged(|ram| {
            let image = &ram[image..synth.image().end as usize];
            used = image.len() - image.iter().rev().take_while(|byte| **byte == 0).count();
        });
        used
    };
    assert!(end > 8192 && end < 64 << 10, "{end}");
    for (i, at) in (8192..end - 4).step_by(20).enumerate() {
        let word = [u32::MAX, 0, 0x8000_0000, 1, 0x0400_ffff][i % 5];
        ask(synth.build_damaged(|ram| ram[image + at..][..4].copy_from_slice(&word.to_le_bytes())));
    }
}
