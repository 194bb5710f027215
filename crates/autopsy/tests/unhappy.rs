//! Dead kernels that are broken where the processes are named: the rest is still found, in bounded time, and what happened is said.
//!
//! On fakes always; on a real core too, where the lab has left one (`OTHERWORLD_CORE=path`, or `target/cores/vmcore-*`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use autopsy::Autopsy;
use ktypes::Kernel;
use synth::{BOOL, I32, PTR, Record, Synth, Type, U8, U16, U32, U64, XaItem, array, named};
use vmcore::{PhysMap, PhysRange, PhysicalMemory, Vmcore};

/// Generous: a walk that is not bounded never ends.
const BOUND: Duration = Duration::from_secs(120);
const PROCESSES: u64 = 12;

/// A kernel with processes 1 to [`PROCESSES`], in the task list and in the PID table.
struct Fake {
    synth: Synth,
    /// `init_task`, then the processes, by PID.
    tasks: Vec<u64>,
    idr: u64,
}

impl Fake {
    fn new() -> Self {
        let mut synth = Synth::new();
        declare(&mut synth);
        let init = synth.variable("init_task", "task_struct");
        synth.set("task_struct", init, "group_leader", init).set("task_struct", init, "real_parent", init);
        synth.set("task_struct", init, "comm", "swapper/0");
        let head = synth.list_init("task_struct", init, "tasks");
        let cache = synth.slab_cache("task_struct", synth.size_of("task_struct"));
        let mut tasks = vec![init];
        let mut table = Vec::new();
        for pid in 1..=PROCESSES {
            let task = synth.slab_alloc(cache);
            for (member, value) in
                [("pid", pid), ("tgid", pid), ("group_leader", task), ("real_parent", tasks[0])]
            {
                synth.set("task_struct", task, member, value);
            }
            synth.set("task_struct", task, "comm", "sleep");
            let node = synth.address_of("task_struct", task, "tasks");
            synth.list_add_tail(node, head);
            let number = synth.alloc("pid");
            let link = synth.address_of("task_struct", task, "pid_links[1]");
            synth.set("pid", number, "tasks[1].first", link).set("pid", number, "numbers[0].nr", pid);
            table.push(XaItem { index: pid, order: 0, entry: number, marks: 0 });
            tasks.push(task);
        }
        let namespace = synth.variable("init_pid_ns", "pid_namespace");
        let idr = synth.address_of("pid_namespace", namespace, "idr.idr_rt");
        synth.xarray(idr, &table);
        Self { synth, tasks, idr }
    }

    fn next(&self, pid: usize) -> u64 {
        self.synth.address_of("task_struct", self.tasks[pid], "tasks.next")
    }

    fn prev(&self, pid: usize) -> u64 {
        self.synth.address_of("task_struct", self.tasks[pid], "tasks.prev")
    }

    fn node(&self, pid: usize) -> u64 {
        self.synth.address_of("task_struct", self.tasks[pid], "tasks")
    }

    /// The PIDs that are found and what is said, or the error.
    fn look(&self) -> Result<(Vec<i32>, String), String> {
        let began = Instant::now();
        let kernel = Kernel::open(self.synth.build()).map_err(|e| e.to_string())?;
        let found = look(&kernel);
        assert!(began.elapsed() < BOUND);
        found
    }
}

fn look(kernel: &Kernel) -> Result<(Vec<i32>, String), String> {
    let autopsy = Autopsy::new(kernel);
    let tasks = autopsy.tasks().map_err(|e| e.to_string())?;
    let said: Vec<String> = autopsy.findings().into_iter().map(|f| f.text).collect();
    Ok((tasks.iter().map(|t| t.pid).collect(), said.join("\n")))
}

/// The structures that name the processes, with the members that are read.
fn declare(synth: &mut Synth) {
    let record = |fields: &[(&str, Type)]| {
        fields.iter().fold(Record::new(), |record, (name, ty)| record.field(name, ty.clone()))
    };
    let inner = |fields: &[(&str, Type)]| Type::Record(record(fields));
    let list = || named("list_head");
    synth
        .structure("upid", record(&[("nr", I32), ("ns", PTR)]))
        .structure(
            "pid",
            record(&[
                ("level", U32),
                ("tasks", array(named("hlist_head"), 4)),
                ("numbers", array(named("upid"), 1)),
            ]),
        )
        .structure("idr", record(&[("idr_rt", named("xarray"))]))
        .structure("pid_namespace", record(&[("idr", named("idr"))]))
        .structure(
            "task_struct",
            record(&[
                ("thread_info", inner(&[("flags", U64)])),
                ("__state", U32),
                ("stack", PTR),
                ("flags", U32),
                ("ptrace", U32),
                ("on_cpu", I32),
                ("static_prio", I32),
                ("rt_priority", U32),
                ("policy", U32),
                ("sched_reset_on_fork", BOOL),
                ("user_cpus_ptr", PTR),
                ("cpus_mask", U64),
                ("tasks", list()),
                ("mm", PTR),
                ("exit_state", I32),
                ("exit_code", I32),
                ("exit_signal", I32),
                ("pdeath_signal", I32),
                ("jobctl", U64),
                ("personality", U32),
                ("restore_sigmask", BOOL),
                ("atomic_flags", U64),
                ("pid", I32),
                ("tgid", I32),
                ("real_parent", PTR),
                ("parent", PTR),
                ("thread_pid", PTR),
                ("pid_links", array(named("hlist_node"), 4)),
                ("group_leader", PTR),
                ("ptraced", list()),
                ("clear_child_tid", PTR),
                ("start_boottime", U64),
                ("vfork_done", U64),
                ("real_cred", PTR),
                ("comm", array(U8, 16)),
                ("fs", PTR),
                ("files", PTR),
                ("nsproxy", PTR),
                ("signal", PTR),
                ("sighand", PTR),
                ("blocked", U64),
                ("real_blocked", U64),
                ("saved_sigmask", U64),
                ("pending", list()),
                ("sas_ss_sp", U64),
                ("sas_ss_size", U64),
                ("sas_ss_flags", U32),
                ("timer_slack_ns", U64),
                (
                    "thread",
                    inner(&[
                        ("sp", U64),
                        ("es", U16),
                        ("ds", U16),
                        ("fsindex", U16),
                        ("gsindex", U16),
                        ("fsbase", U64),
                        ("gsbase", U64),
                        ("fpu", inner(&[("fpstate", PTR)])),
                    ]),
                ),
            ]),
        );
}

fn everybody() -> Vec<i32> {
    (1..=PROCESSES as i32).collect()
}

#[test]
fn a_whole_fake_names_everybody_without_a_word() {
    let (pids, said) = Fake::new().look().unwrap();
    assert_eq!(pids, everybody());
    assert_eq!(said, "");
}

#[test]
fn a_cycle_in_the_task_list_costs_nobody() {
    for (from, to) in [(5, 2), (7, 7), (PROCESSES as usize, 1), (0, 0)] {
        let mut fake = Fake::new();
        let target = fake.node(to);
        if to != 0 {
            fake.synth.write_u64(fake.next(from), target);
        }
        // Backwards too: only the PID table is left to know those in between.
        let last = PROCESSES as usize;
        fake.synth.write_u64(fake.prev(last), fake.node(last));
        let (pids, said) = fake.look().unwrap();
        assert_eq!(pids, everybody(), "{from} leads to {to}: {said}");
        if to != 0 {
            assert!(said.contains("the task list is damaged") && said.contains("comes up twice"), "{said}");
            assert!(said.contains("PID table"), "{said}");
        }
    }
}

#[test]
fn a_wild_pointer_in_the_task_list_costs_nobody() {
    let fake = Fake::new();
    let amid = fake.node(8) + 8;
    let elsewhere = fake.synth.direct(0x1234);
    for wild in [0, 8, 0x4141_4141_4141_4141, 0x7fff_f000_0000, u64::MAX - 7, amid, elsewhere, fake.idr] {
        for pid in [0, 1, 6, PROCESSES as usize] {
            let mut fake = Fake::new();
            let (next, prev) = (fake.next(pid), fake.prev(pid));
            fake.synth.write_u64(next, wild).write_u64(prev, wild);
            let (pids, said) = fake.look().unwrap();
            assert_eq!(pids, everybody(), "{pid} leads to {wild:#x}: {said}");
            assert!(said.contains("the task list is damaged"), "{said}");
        }
    }
}

#[test]
fn without_the_pid_table_the_list_is_walked_from_both_ends() {
    let mut fake = Fake::new();
    fake.synth.set("xarray", fake.idr, "xa_head", 0x4141_4141_4141_4142u64);
    let (pids, said) = fake.look().unwrap();
    assert_eq!(pids, everybody());
    assert!(said.contains("the PID table cannot be read to the end"), "{said}");
    fake.synth.write_u64(fake.next(4), 0x4141_4141_4141_4141);
    let (pids, said) = fake.look().unwrap();
    assert_eq!(pids, everybody(), "{said}");
    assert!(said.contains("the task list is damaged"), "{said}");
}

#[test]
fn a_broken_task_costs_that_task() {
    let mut fake = Fake::new();
    fake.synth.set("task_struct", fake.tasks[5], "pid", -7);
    fake.synth.set("task_struct", fake.tasks[9], "group_leader", 0x4141_4141_4141_4141u64);
    let (pids, said) = fake.look().unwrap();
    assert_eq!(pids, [1, 2, 3, 4, 6, 7, 8, 10, 11, 12]);
    assert!(said.contains("a task is lost") && said.contains("PID -7"), "{said}");
    assert!(said.contains("PID 9 is not its group's leader"), "{said}");
}

#[test]
fn without_list_and_table_it_is_an_error() {
    let mut fake = Fake::new();
    let (next, prev) = (fake.next(0), fake.prev(0));
    fake.synth.write_u64(next, 0).write_u64(prev, 0);
    fake.synth.set("xarray", fake.idr, "xa_head", 0x4141_4141_4141_4142u64);
    let error = fake.look().unwrap_err();
    assert!(error.contains("lies in no slab"), "{error}");
}

#[test]
fn a_member_that_this_kernel_does_not_have_is_named() {
    for (structure, member) in
        [("task_struct", "exit_state"), ("task_struct", "tasks"), ("pid_namespace", "idr"), ("pid", "level")]
    {
        let mut fake = Fake::new();
        fake.synth.without_member(structure, member);
        let wanted = format!("Linux 6.1.0-synth: `{structure}` has no member `{member}");
        match fake.look() {
            Err(error) => assert!(error.contains(&wanted), "{error}"),
            // Where there is another way, it is taken, and the failure told.
            Ok((pids, said)) => {
                assert_ne!((structure, member), ("task_struct", "exit_state"), "{pids:?} {said}");
                assert_eq!(pids, everybody(), "{structure}.{member}: {said}");
                assert!(said.contains(&wanted), "{structure}.{member}: {said}");
            }
        }
    }
}

#[test]
fn a_structure_that_every_process_needs_is_named_once() {
    // The fakes have no signal_struct.
    let kernel = Kernel::open(Fake::new().synth.build()).unwrap();
    let error = Autopsy::new(&kernel).processes().map(|all| all.len()).unwrap_err().to_string();
    assert_eq!(error, "Linux 6.1.0-synth has no type `signal_struct`");
}

#[test]
fn a_kernel_without_btf_is_named() {
    let mut fake = Fake::new();
    fake.synth.without_btf();
    let error = fake.look().unwrap_err();
    assert!(
        error.contains("Linux 6.1.0-synth: no BTF") && error.contains("CONFIG_DEBUG_INFO_BTF"),
        "{error}"
    );
}

// ---- real cores

fn cores() -> Vec<PathBuf> {
    let named = std::env::var_os("OTHERWORLD_CORE").map(|paths| std::env::split_paths(&paths).collect());
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/cores");
    let found =
        || ["vmcore-6.1", "vmcore-6.12"].map(|name| target.join(name)).into_iter().filter(|p| p.exists());
    let cores = named.unwrap_or_else(|| found().collect::<Vec<_>>());
    if cores.is_empty() {
        eprintln!("there is no core of a real machine: nothing tested");
    }
    cores
}

/// A core with some words that are different.
struct Patched {
    core: Vmcore,
    /// Pages with a word in them that is different, by physical address.
    pages: Vec<(u64, Vec<u8>)>,
}

const PAGE: usize = 4096;

impl Patched {
    fn open(path: &Path, words: &[(u64, u64)]) -> Vmcore {
        let core = Vmcore::open(path).unwrap();
        let mut pages: Vec<(u64, Vec<u8>)> = Vec::new();
        for (phys, value) in words {
            let (base, at) = (phys & !(PAGE as u64 - 1), *phys as usize % PAGE);
            if pages.iter().all(|page| page.0 != base) {
                let mut page = vec![0; PAGE];
                core.read_phys(base, &mut page).unwrap();
                pages.push((base, page));
            }
            let page = pages.iter_mut().find(|page| page.0 == base).unwrap();
            page.1[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let (info, prstatus) = (core.info().clone(), core.prstatus().to_vec());
        Vmcore::from_memory(Box::new(Self { core, pages }), info, prstatus)
    }
}

impl PhysicalMemory for Patched {
    fn read_phys(&self, addr: u64, buf: &mut [u8]) -> vmcore::Result<()> {
        self.core.read_phys(addr, buf)?;
        for (base, page) in &self.pages {
            let (from, to) = (addr.max(*base), (addr + buf.len() as u64).min(base + PAGE as u64));
            if from < to {
                let source = &page[(from - base) as usize..(to - base) as usize];
                buf[(from - addr) as usize..(to - addr) as usize].copy_from_slice(source);
            }
        }
        Ok(())
    }

    fn map_phys(&self, addr: u64, len: usize) -> vmcore::Result<PhysMap<'_>> {
        let end = addr + len as u64;
        if self.pages.iter().all(|(base, _)| end <= *base || base + PAGE as u64 <= addr) {
            return self.core.map_phys(addr, len);
        }
        let mut bytes = vec![0; len];
        self.read_phys(addr, &mut bytes)?;
        // Lives until the test ends.
        Ok(PhysMap::borrowed(bytes.leak()))
    }

    fn ranges(&self) -> &[PhysRange] {
        self.core.ranges()
    }
}

#[test]
fn a_real_machine_with_a_damaged_task_list_keeps_its_processes() {
    for path in cores() {
        let kernel = Kernel::open(Vmcore::open(&path).unwrap()).unwrap();
        let tasks = Autopsy::new(&kernel).tasks().unwrap();
        let pids: Vec<i32> = tasks.iter().map(|t| t.pid).collect();
        assert!(pids.len() > 20, "{pids:?}");
        let link = kernel.offset_of("task_struct", "tasks").unwrap();
        let next = |n: usize| kernel.virt_to_phys(tasks[n].task + link).unwrap();
        let prev = |n: usize| next(n) + 8;
        let (early, middle, late) = (3, pids.len() / 2, pids.len() - 3);
        let node = |n: usize| tasks[n].task + link;
        let wild = 0x4141_4141_4141_4141;
        let damages: [(&str, Vec<(u64, u64)>); 5] = [
            ("a cycle", vec![(next(late), node(early)), (prev(early), node(late))]),
            ("to itself", vec![(next(middle), node(middle)), (prev(middle), node(middle))]),
            ("a wild pointer", vec![(next(early), wild), (prev(late), wild)]),
            ("amid an object", vec![(next(early), node(middle) + 16), (prev(late), node(middle) + 16)]),
            ("zeros", vec![(next(early), 0), (prev(early), 0), (next(late), 0), (prev(late), 0)]),
        ];
        for (what, words) in damages {
            let began = Instant::now();
            let kernel = Kernel::open(Patched::open(&path, &words)).unwrap();
            let (found, said) = look(&kernel).unwrap();
            assert_eq!(found, pids, "{}: {what}: {said}", path.display());
            assert!(said.contains("the task list is damaged"), "{}: {what}: {said}", path.display());
            assert!(began.elapsed() < BOUND);
        }
    }
}

#[test]
fn a_real_machine_loses_only_the_process_whose_memory_is_damaged() {
    for path in cores() {
        let kernel = Kernel::open(Vmcore::open(&path).unwrap()).unwrap();
        let whole = Autopsy::new(&kernel).snapshot().unwrap();
        let named =
            |snapshot: &snapshot::Snapshot| snapshot.processes.iter().map(|p| p.pid).collect::<BTreeSet<_>>();
        let autopsy = Autopsy::new(&kernel);
        let victim = autopsy.tasks().unwrap().into_iter().rfind(|t| !t.kernel_thread && t.pid > 1).unwrap();
        // Its pointer to its files leads nowhere, its neighbour in the list too.
        let files = victim.task + kernel.offset_of("task_struct", "files").unwrap();
        let tasks = victim.task + kernel.offset_of("task_struct", "tasks").unwrap();
        let words = [files, tasks].map(|at| (kernel.virt_to_phys(at).unwrap(), 0x4141_4141_4141_4141));
        let began = Instant::now();
        let kernel = Kernel::open(Patched::open(&path, &words)).unwrap();
        let damaged = Autopsy::new(&kernel).snapshot().unwrap();
        assert!(began.elapsed() < BOUND);
        let lost: Vec<i32> = named(&whole).difference(&named(&damaged)).copied().collect();
        let said: Vec<String> = damaged.findings.iter().map(|f| f.text.clone()).collect();
        assert!(lost.is_empty() || lost == [victim.pid], "{}: {lost:?} lost", path.display());
        assert!(said.iter().any(|text| text.contains("the task list is damaged")), "{said:?}");
        // It is not brought back as if it were whole.
        let all = snapshot::Policy { mode: snapshot::Mode::Programs, ..snapshot::Policy::default() };
        let mut decided = damaged;
        snapshot::decide(&mut decided, &all);
        let decision = decided.process(victim.pid).map(|p| p.decision.clone());
        assert!(!decision.is_some_and(|d| d.is_continue()), "{}: {} continues", path.display(), victim.comm);
        for process in decided.processes.iter().filter(|p| p.pid != victim.pid) {
            let before = whole.process(process.pid).unwrap();
            assert_eq!(process.descriptors, before.descriptors, "{}: {}", path.display(), process.comm);
        }
    }
}
