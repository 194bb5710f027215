//! On the core of a real machine: OTHERWORLD_CORE names it, OTHERWORLD_PROC a recording of /proc from just before its
//! panic. Without them these tests say so and pass.

use std::path::PathBuf;
use std::sync::Arc;

use autopsy::ground_truth::{Record, compare, compare_machine};
use autopsy::{Autopsy, autopsy};
use ktypes::Kernel;
use snapshot::{FileKind, FindingKind, Severity, Snapshot, VmaKind};
use vmcore::{Error, PhysMap, PhysRange, PhysicalMemory, Vmcore};

fn env(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).map(PathBuf::from);
    if value.is_none() {
        eprintln!("skipped: {name} is not set");
    }
    value
}

fn core() -> Option<Kernel> {
    let path = env("OTHERWORLD_CORE")?;
    Some(Kernel::open(Vmcore::open(&path).expect("a core")).expect("a kernel"))
}

/// Bytes, and where they go.
type Patches = Vec<(u64, Vec<u8>)>;

/// A core with some bytes changed.
struct Damaged {
    core: Arc<Vmcore>,
    patches: Patches,
}

impl PhysicalMemory for Damaged {
    fn read_phys(&self, addr: u64, buf: &mut [u8]) -> Result<(), Error> {
        self.core.read_phys(addr, buf)?;
        for (at, bytes) in &self.patches {
            for (i, byte) in bytes.iter().enumerate() {
                let place =
                    (at + i as u64).checked_sub(addr).and_then(|n| buf.get_mut(usize::try_from(n).ok()?));
                if let Some(place) = place {
                    *place = *byte;
                }
            }
        }
        Ok(())
    }

    fn map_phys(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, Error> {
        self.core.map_phys(addr, len)
    }

    fn ranges(&self) -> &[PhysRange] {
        self.core.ranges()
    }
}

/// The same core with 64-bit words at kernel addresses replaced.
fn damage(patches: &[(u64, u64)]) -> Kernel {
    let bytes: Vec<_> = patches.iter().map(|(va, value)| (*va, value.to_le_bytes().to_vec())).collect();
    overwrite(&bytes)
}

/// The same core with bytes at kernel addresses replaced.
fn overwrite(patches: &[(u64, Vec<u8>)]) -> Kernel {
    let path = std::env::var_os("OTHERWORLD_CORE").expect("checked before");
    let healthy = core().expect("checked before");
    let core = Arc::new(Vmcore::open(path.as_ref()).expect("a core"));
    let patches =
        patches.iter().map(|(va, bytes)| (healthy.virt_to_phys(*va).expect("mapped"), bytes.clone()));
    let memory = Damaged { core: core.clone(), patches: patches.collect() };
    let (info, notes) = (core.info().clone(), core.prstatus().to_vec());
    Kernel::open(Vmcore::from_memory(Box::new(memory), info, notes)).expect("a kernel")
}

fn pids(snapshot: &Snapshot) -> Vec<i32> {
    snapshot.processes.iter().map(|p| p.pid).collect()
}

#[test]
fn the_snapshot_agrees_with_proc() {
    let (Some(kernel), Some(recording)) = (core(), env("OTHERWORLD_PROC")) else { return };
    let (_, found) = Autopsy::new(&kernel).snapshot_with_record().unwrap();
    let result = compare(&Record::read(&recording).unwrap(), &found);
    for difference in &result.differences {
        eprintln!("{difference}");
    }
    assert!(result.differences.is_empty(), "{} fields differ", result.differences.len());
    // Something must have been compared.
    for field in
        ["maps", "thread.SigBlk", "thread.CapEff", "fdinfo.pos", "thread.syscall", "stat.ppid", "exe"]
    {
        assert!(
            result.compared.get(field).is_some_and(|n| *n > 5),
            "{field}: {:?}",
            result.compared.get(field)
        );
    }
}

#[test]
fn what_is_seen_at_a_glance_agrees_with_proc() {
    let (Some(kernel), Some(recording)) = (core(), env("OTHERWORLD_PROC")) else { return };
    let autopsy = Autopsy::new(&kernel);
    let result = compare_machine(&autopsy, &recording).unwrap();
    for difference in &result.differences {
        eprintln!("{difference}");
    }
    eprintln!("{:?}", result.compared);
    assert!(result.differences.is_empty(), "{} differences", result.differences.len());
    for kind in [
        "system call",
        "wait channel",
        "kernel stack",
        "unix",
        "inet",
        "mount",
        "module",
        "slab cache",
        "pages",
    ] {
        assert!(result.compared.get(kind).is_some_and(|n| *n > 5), "{kind}: {:?}", result.compared.get(kind));
    }
    let findings: Vec<_> = autopsy.findings().into_iter().filter(|f| f.severity >= Severity::Doubt).collect();
    assert!(findings.is_empty(), "{findings:?}");
}

#[test]
fn a_damaged_process_costs_no_other_one_its_place_in_the_lists() {
    let Some(kernel) = core() else { return };
    let autopsy = Autopsy::new(&kernel);
    let healthy = autopsy.process_summaries().unwrap();
    let victim = healthy.iter().rev().find(|p| p.exe.is_some()).expect("a process").pid;
    let task = autopsy.tasks().unwrap().iter().find(|t| t.pid == victim).expect("known").task;
    for member in ["signal", "mm", "files", "real_cred", "stack", "thread.sp", "nsproxy"] {
        let at = task + kernel.offset_of("task_struct", member).unwrap();
        for wild in [0xffff_f000_dead_0000, 8] {
            let damaged = damage(&[(at, wild)]);
            let autopsy = Autopsy::new(&damaged);
            let others = |all: Vec<i32>| all.into_iter().filter(|pid| *pid != victim).collect::<Vec<_>>();
            let found = autopsy.process_summaries().unwrap().iter().map(|p| p.pid).collect();
            let expected = healthy.iter().map(|p| p.pid).collect();
            assert_eq!(others(found), others(expected), "{member} {wild:#x}");
            autopsy.thread_summaries().unwrap();
            autopsy.socket_summaries().unwrap();
            autopsy.all_mounts().unwrap();
            let stacks = autopsy.stacks(victim).unwrap();
            let all_told = stacks.iter().all(|s| !s.frames.is_empty() || s.note.is_some());
            assert!(all_told, "{member} {wild:#x}: {stacks:?}");
            let told = autopsy.findings().iter().any(|f| f.pid == Some(victim));
            // A thread's own stack that is elsewhere is said with the stack.
            let silent = member == "stack" || member == "thread.sp";
            assert!(told || silent, "{member} {wild:#x}: {:?}", autopsy.findings());
        }
    }
}

#[test]
fn a_whole_machine_raises_no_alarm() {
    let Some(kernel) = core() else { return };
    let snapshot = autopsy(&kernel).unwrap();
    let alarms: Vec<_> = snapshot.findings.iter().filter(|f| f.severity >= Severity::Doubt).collect();
    assert!(alarms.is_empty(), "{alarms:?}");
    assert!(snapshot.clocks.monotonic_ns > 0 && snapshot.clocks.realtime_ns > snapshot.clocks.monotonic_ns);
    for space in snapshot.address_spaces.values() {
        assert!(space.exe.is_some());
        let lost: u64 = space.vmas.iter().map(|vma| vma.lost_pages).sum();
        assert_eq!(lost, 0);
    }
}

#[test]
fn a_damaged_task_list_loses_nobody() {
    let Some(kernel) = core() else { return };
    let healthy = autopsy(&kernel).unwrap();
    let tasks = Autopsy::new(&kernel).tasks().unwrap();
    let link = |pid: i32| {
        let task = tasks.iter().find(|t| t.pid == pid).expect("known").task;
        task + kernel.offset_of("task_struct", "tasks").unwrap()
    };
    let victim = pids(&healthy)[5];
    for wild in [link(pids(&healthy)[2]), 0, 0xdead_beef_0000_0000, kernel.symbol("init_task").unwrap() + 64]
    {
        let snapshot = autopsy(&damage(&[(link(victim), wild)])).unwrap();
        assert_eq!(pids(&snapshot), pids(&healthy), "{wild:#x}");
        assert!(
            snapshot.findings.iter().any(|f| f.text.contains("task list is damaged")),
            "{:?}",
            snapshot.findings
        );
    }
}

#[test]
fn a_damaged_process_costs_itself_alone() {
    let Some(kernel) = core() else { return };
    let healthy = autopsy(&kernel).unwrap();
    let tasks = Autopsy::new(&kernel).tasks().unwrap();
    let victim = healthy.processes.iter().rev().find(|p| p.address_space.is_some()).expect("a process");
    let task = tasks.iter().find(|t| t.pid == victim.pid).expect("known").task;
    for member in ["signal", "sighand", "mm", "files", "fs", "real_cred", "stack", "nsproxy", "cgroups"] {
        let at = task + kernel.offset_of("task_struct", member).unwrap();
        let snapshot = autopsy(&damage(&[(at, 0xffff_f000_dead_0000)])).unwrap();
        let others = |s: &Snapshot| pids(s).into_iter().filter(|pid| *pid != victim.pid).collect::<Vec<_>>();
        assert_eq!(others(&snapshot), others(&healthy), "{member}");
        let told = snapshot.findings.iter().any(|f| f.pid == Some(victim.pid));
        assert!(told, "{member}: {:?}", snapshot.findings);
        // And nobody else is blamed.
        let blamed: Vec<_> = snapshot
            .findings
            .iter()
            .filter(|f| f.severity >= Severity::Doubt && f.pid.is_some_and(|pid| pid != victim.pid))
            .collect();
        assert!(blamed.is_empty(), "{member}: {blamed:?}");
    }
}

/// Autopsy tells by these names whether a CPU was between a program and the kernel.
#[test]
fn the_edge_of_the_kernel_has_names() {
    let Some(kernel) = core() else { return };
    let symbol = |name| kernel.symbol(name).expect("a symbol");
    let text = symbol("__entry_text_start")..symbol("__entry_text_end");
    for name in ["entry_SYSCALL_64", "entry_SYSRETQ_end", "swapgs_restore_regs_and_return_to_usermode"] {
        let addr = symbol(name);
        assert!(text.contains(&addr), "{name}");
        assert_eq!(kernel.symbolize(addr), Some((name, 0)));
    }
}

/// Each structure is cross-checked: one wrong value anywhere raises a doubt about the process, and about nobody else.
#[test]
fn planted_damage_is_found() {
    let Some(kernel) = core() else { return };
    let healthy = autopsy(&kernel).unwrap();
    let offset = |ty: &str, member: &str| kernel.offset_of(ty, member).unwrap();
    let word = |addr: u64, ty: &str, member: &str| kernel.read_u64(addr + offset(ty, member)).unwrap();
    let tasks = Autopsy::new(&kernel).tasks().unwrap();
    let task_of = |pid: i32| tasks.iter().find(|t| t.pid == pid).expect("known").task;
    // A program that a user executed, off the CPUs.
    const AT_UID: u64 = 11;
    let is_fit = |p: &&snapshot::Process| {
        let on_cpu = p.threads.iter().any(|t| t.on_cpu.is_some());
        let space = p.address_space.and_then(|id| healthy.address_spaces.get(&id));
        let auxv = space.map_or(&[][..], |space| &space.layout.auxv);
        let of_user = auxv.as_chunks::<2>().0.iter().any(|pair| pair[0] == AT_UID && pair[1] != 0);
        !on_cpu && of_user && !p.descriptors.is_empty()
    };
    let victim = healthy.processes.iter().find(is_fit).expect("a program of a user");
    let task = task_of(victim.pid);
    let cred = word(task, "task_struct", "real_cred");
    let mm = victim.address_space.unwrap();
    let space = &healthy.address_spaces[&mm];
    let signal = word(task, "task_struct", "signal");
    let files = word(task, "task_struct", "files");
    let fdt = word(files, "files_struct", "fdt");
    // A mapping with a page of its own that nobody else has.
    let users = |pfn: u64| {
        let runs = healthy.address_spaces.values().flat_map(|s| &s.vmas).flat_map(|v| &v.pages);
        runs.filter(|r| (r.pfn..r.pfn + u64::from(r.count)).contains(&pfn)).count()
    };
    let own =
        space.vmas.iter().flat_map(|v| &v.pages).find(|r| users(r.pfn) == 1).expect("a page of its own");
    let page = kernel.pfn_to_page(own.pfn);
    let root_file = {
        let root = healthy.process(1).expect("init");
        root.descriptors
            .iter()
            .find(|d| healthy.files[&d.file].kind == FileKind::Regular)
            .map_or(root.descriptors[0].file, |d| d.file)
    };
    let own_file = victim.descriptors.iter().map(|d| d.file).find(|id| {
        let has = |p: &snapshot::Process| p.descriptors.iter().any(|d| d.file == *id);
        healthy.processes.iter().filter(|p| has(p)).count() == 1
            && healthy.files[id].kind == FileKind::Regular
    });
    let is_file = |v: &&snapshot::Vma| matches!(v.kind, VmaKind::File { .. });
    let mapped = space.vmas.iter().find(is_file).expect("a mapped file");
    let vma = {
        let tree = mm.0 + offset("mm_struct", "mm_mt");
        let mut found = None;
        kernel
            .maple_for_each(tree, 1 << 20, |first, _, vma| {
                if first == mapped.start {
                    found = Some(vma)
                }
                Ok(())
            })
            .unwrap();
        found.expect("in the tree")
    };
    let init = task_of(1);
    let init_cred = word(init, "task_struct", "real_cred");
    use FindingKind::{Canary, Count, Credentials, Link, Page, Slab};
    let at = |base: u64, ty: &str, member: &str| base + offset(ty, member);
    let long = |v: u64| v.to_le_bytes().to_vec();
    let int = |v: u32| v.to_le_bytes().to_vec();
    let mut damages: Vec<(&str, FindingKind, Patches)> = vec![
        ("uid", Credentials, vec![(at(cred, "cred", "uid"), int(0))]),
        ("euid", Credentials, vec![(at(cred, "cred", "euid"), int(0))]),
        ("suid", Credentials, vec![(at(cred, "cred", "suid"), int(0))]),
        ("egid", Credentials, vec![(at(cred, "cred", "egid"), int(0))]),
        ("capabilities", Credentials, vec![(at(cred, "cred", "cap_permitted"), long(0x1ff_ffff_ffff))]),
        ("a capability", Credentials, vec![(at(cred, "cred", "cap_effective"), long(1 << 21))]),
        ("unknown capability", Credentials, vec![(at(cred, "cred", "cap_bset"), long(1 << 50))]),
        ("user", Credentials, vec![(at(cred, "cred", "user"), long(word(init_cred, "cred", "user")))]),
        ("real_cred", Credentials, vec![(at(task, "task_struct", "real_cred"), long(init_cred))]),
        (
            "both credentials",
            Credentials,
            vec![
                (at(task, "task_struct", "real_cred"), long(init_cred)),
                (at(task, "task_struct", "cred"), long(init_cred)),
            ],
        ),
        ("cred amid", Credentials, vec![(at(task, "task_struct", "real_cred"), long(cred + 16))]),
        ("sighand", Slab, vec![(at(task, "task_struct", "sighand"), long(files))]),
        ("real_parent", Link, vec![(at(task, "task_struct", "real_parent"), long(task))]),
        ("wild parent", Link, vec![(at(task, "task_struct", "real_parent"), long(signal))]),
        (
            "thread_pid",
            Link,
            vec![(at(task, "task_struct", "thread_pid"), long(word(init, "task_struct", "thread_pid")))],
        ),
        ("nr_threads", Count, vec![(at(signal, "signal_struct", "nr_threads"), int(7))]),
        ("canary", Canary, vec![(at(task, "task_struct", "stack_canary"), long(0x1234_5678_9abc_def1))]),
        ("mm_users", Count, vec![(at(mm.0, "mm_struct", "mm_users"), int(0))]),
        ("active_mm", Link, vec![(at(task, "task_struct", "active_mm"), long(mm.0 + 64))]),
        ("mapping", Page, vec![(at(page, "page", "mapping"), long(word(page, "page", "mapping") ^ 0x4000))]),
        ("index", Page, vec![(at(page, "page", "index"), long(word(page, "page", "index") ^ 0x10))]),
        ("refcount", Page, vec![(at(page, "page", "_refcount"), int(0))]),
        (
            "bitmap",
            Link,
            vec![(
                word(fdt, "fdtable", "open_fds"),
                vec![0xfe & kernel.read_u8(word(fdt, "fdtable", "open_fds")).unwrap()],
            )],
        ),
        ("vm_file", Link, vec![(at(vma, "vm_area_struct", "vm_file"), long(root_file.0))]),
        ("vma", Slab, vec![(at(vma, "vm_area_struct", "anon_vma"), long(vma))]),
    ];
    if let Some(file) = own_file {
        let dentry = word(file.0, "file", "f_path.dentry");
        damages.extend([
            (
                "f_inode",
                Link,
                vec![(at(file.0, "file", "f_inode"), long(word(root_file.0, "file", "f_inode")))],
            ),
            (
                "f_count",
                Count,
                vec![(at(file.0, "file", "f_count"), long(0x7fff_ffff_0000_0000 | 1 << 63 | 1))],
            ),
            (
                "f_mapping",
                Link,
                vec![(at(file.0, "file", "f_mapping"), long(word(root_file.0, "file", "f_mapping")))],
            ),
            (
                "d_inode",
                Link,
                vec![(at(dentry, "dentry", "d_inode"), long(word(root_file.0, "file", "f_inode")))],
            ),
            ("dentry", Slab, vec![(at(file.0, "file", "f_path.dentry"), long(dentry + 8))]),
        ]);
    }
    let mut missed = Vec::new();
    for (name, kind, patches) in damages {
        let snapshot = autopsy(&overwrite(&patches)).unwrap();
        let alarms: Vec<_> = snapshot.findings.iter().filter(|f| f.severity >= Severity::Doubt).collect();
        if !alarms
            .iter()
            .any(|f| f.pid == Some(victim.pid) && (f.kind == kind || f.severity == Severity::Broken))
        {
            missed.push((name, format!("{alarms:?}")));
        }
        let others: Vec<_> =
            alarms.iter().filter(|f| f.pid != Some(victim.pid) && f.severity == Severity::Doubt).collect();
        if !others.is_empty() {
            eprintln!("{name}: also {others:?}");
        }
        for f in alarms.iter().take(4) {
            eprintln!("{name}: {:?} {:?} {:?} {}", f.severity, f.kind, f.pid, f.text);
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}
