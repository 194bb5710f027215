//! On the core of a real machine: OTHERWORLD_CORE names it, OTHERWORLD_PROC a recording of /proc from just before its
//! panic. Without them these tests say so and pass.

use std::path::PathBuf;
use std::sync::Arc;

use autopsy::ground_truth::{Record, compare};
use autopsy::{Autopsy, autopsy};
use ktypes::Kernel;
use snapshot::{Severity, Snapshot};
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

/// A core with some bytes changed.
struct Damaged {
    core: Arc<Vmcore>,
    patches: Vec<(u64, [u8; 8])>,
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
    let path = std::env::var_os("OTHERWORLD_CORE").expect("checked before");
    let healthy = core().expect("checked before");
    let core = Arc::new(Vmcore::open(path.as_ref()).expect("a core"));
    let patches =
        patches.iter().map(|(va, value)| (healthy.virt_to_phys(*va).expect("mapped"), value.to_le_bytes()));
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
