//! Control groups of the unified hierarchy: `cgrp_dfl_root`, `cgroup` (include/linux/cgroup-defs.h), and what is set for them: `pids_cgroup`
//! (kernel/cgroup/pids.c), `mem_cgroup` (include/linux/memcontrol.h), `task_group` (kernel/sched/sched.h; 6.1 and 6.12).

use std::collections::BTreeSet;

use ktypes::KernelType;
use snapshot::{Cgroup, PAGE_SIZE, Severity};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// Groups of one machine.
const MAX_CGROUPS: usize = 1 << 20;
/// What pids.max is without a limit: PID_MAX_LIMIT + 1 (kernel/cgroup/pids.c, include/linux/threads.h).
const PIDS_MAX: i64 = (4 << 20) + 1;
/// PAGE_COUNTER_MAX (include/linux/page_counter.h).
const PAGES_MAX: u64 = i64::MAX as u64 / PAGE_SIZE;
/// A task group's shares by default, in the scheduler's fixed-point numbers (NICE_0_LOAD, kernel/sched/sched.h).
const DEFAULT_SHARES: u64 = 1024 << 10;
/// CGROUP_WEIGHT_DFL.
const DEFAULT_WEIGHT: u64 = 100;
/// RUNTIME_INF (kernel/sched/sched.h).
const NO_QUOTA: u64 = u64::MAX;
/// Kinds of attachment of BPF programs: fewer than this.
const MAX_BPF_TYPES: u64 = 64;

/// Controllers by name; their numbers are those of `enum cgroup_subsys_id`.
const CONTROLLERS: [&str; 9] = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc", "dmem"];

#[derive(KernelType)]
#[kernel("cgroup")]
struct CgroupStruct {
    #[kernel("self.children", address)]
    children: u64,
    kn: u64,
    subtree_control: u16,
    #[kernel(address)]
    subsys: u64,
    #[kernel("freezer.freeze")]
    freeze: bool,
    dom_cgrp: u64,
    #[kernel("bpf.progs", optional, address)]
    bpf: Option<u64>,
}

#[derive(KernelType)]
#[kernel("kernfs_node")]
struct KernfsNode {
    iattr: u64,
}

#[derive(KernelType)]
#[kernel("kernfs_iattrs")]
struct KernfsIattrs {
    ia_uid: u32,
    ia_gid: u32,
}

#[derive(KernelType)]
#[kernel("pids_cgroup")]
struct PidsCgroup {
    #[kernel("limit.counter")]
    limit: i64,
}

#[derive(KernelType)]
#[kernel("mem_cgroup")]
struct MemCgroup {
    #[kernel("memory.min")]
    min: u64,
    #[kernel("memory.low")]
    low: u64,
    #[kernel("memory.high")]
    high: u64,
    #[kernel("memory.max")]
    max: u64,
    #[kernel("swap.max")]
    swap_max: u64,
    oom_group: bool,
}

#[derive(KernelType)]
#[kernel("task_group")]
struct TaskGroup {
    shares: u64,
    #[kernel("cfs_bandwidth.quota", optional)]
    quota: Option<u64>,
    #[kernel("cfs_bandwidth.period", optional)]
    period: Option<u64>,
}

impl Autopsy<'_> {
    /// All groups but the root, parents before children. What cannot be read becomes a finding.
    pub(crate) fn cgroups(&self) -> Vec<Cgroup> {
        let mut found = Vec::new();
        if let Err(error) = self.all_cgroups(&mut found) {
            let text = format!("not all control groups could be read: {error}");
            self.find(Severity::Loss, "cgroup", text);
        }
        found
    }

    fn all_cgroups(&self, found: &mut Vec<Cgroup>) -> Result<()> {
        let root = self.kernel.symbol("cgrp_dfl_root")?;
        let root = root.wrapping_add(self.kernel.offset_of("cgroup_root", "cgrp")?);
        let to_sibling = self
            .kernel
            .offset_of("cgroup", "self")?
            .wrapping_add(self.kernel.offset_of("cgroup_subsys_state", "sibling")?);
        let mut pending = vec![root];
        let mut known = BTreeSet::new();
        while let Some(addr) = pending.pop() {
            if known.len() > MAX_CGROUPS || !known.insert(addr) {
                return Err(corrupt("cgroup", addr, "is one of too many, or in two groups"));
            }
            let group: CgroupStruct = self.kernel.read(addr)?;
            let described = self.cgroup(addr, &group)?;
            // The root has no settings but which controllers its children have.
            if addr != root || !described.settings.is_empty() {
                found.push(described);
            }
            let children = self.list(group.children, MAX_CGROUPS)?;
            pending.extend(children.into_iter().rev().map(|node| node.wrapping_sub(to_sibling)));
        }
        Ok(())
    }

    fn cgroup(&self, addr: u64, group: &CgroupStruct) -> Result<Cgroup> {
        let (uid, gid) = self.kernfs_owner(group.kn)?;
        let mut this = Cgroup { path: self.kernfs_path(group.kn)?, uid, gid, ..Cgroup::default() };
        let mut set = |name: &str, text: String| this.settings.push((name.to_owned(), text));
        let mut for_children = Vec::new();
        let mut others = Vec::new();
        for name in CONTROLLERS {
            let Ok(id) = self.kernel.enum_value(&format!("{name}_cgrp_id")) else { continue };
            let id = u64::try_from(id).unwrap_or(0);
            if id < 16 && group.subtree_control >> id & 1 != 0 {
                for_children.push(format!("+{name}"));
            }
            let css = self.kernel.read_u64(group.subsys.wrapping_add(8 * id))?;
            if css == 0 || this.path.as_bytes() == b"/" {
                continue;
            }
            let container =
                |kind: &str| Ok::<_, ktypes::Error>(css.wrapping_sub(self.kernel.offset_of(kind, "css")?));
            match name {
                "pids" => {
                    let pids: PidsCgroup = self.kernel.read(container("pids_cgroup")?)?;
                    if pids.limit < PIDS_MAX {
                        set("pids.max", pids.limit.to_string());
                    }
                }
                "memory" => {
                    let memory: MemCgroup = self.kernel.read(container("mem_cgroup")?)?;
                    let limits = [
                        ("memory.min", memory.min, 0),
                        ("memory.low", memory.low, 0),
                        ("memory.high", memory.high, PAGES_MAX),
                        ("memory.max", memory.max, PAGES_MAX),
                        ("memory.swap.max", memory.swap_max, PAGES_MAX),
                    ];
                    for (name, pages, default) in
                        limits.into_iter().filter(|(_, pages, default)| pages != default)
                    {
                        let unlimited = pages >= PAGES_MAX && default == 0;
                        set(
                            name,
                            if unlimited {
                                "max".into()
                            } else {
                                pages.saturating_mul(PAGE_SIZE).to_string()
                            },
                        );
                    }
                    if memory.oom_group {
                        set("memory.oom.group", "1".into());
                    }
                }
                "cpu" => {
                    let cpu: TaskGroup = self.kernel.read(container("task_group")?)?;
                    if cpu.shares != DEFAULT_SHARES {
                        // cpu_weight_read_u64(), kernel/sched/core.c.
                        let weight = ((cpu.shares >> 10).saturating_mul(DEFAULT_WEIGHT) + 512) / 1024;
                        set("cpu.weight", weight.clamp(1, 10_000).to_string());
                    }
                    if let (Some(quota), Some(period)) = (cpu.quota.filter(|q| *q != NO_QUOTA), cpu.period) {
                        set("cpu.max", format!("{} {}", quota / 1000, period / 1000));
                    }
                }
                other => others.push(other),
            }
        }
        if !for_children.is_empty() {
            this.settings.insert(0, ("cgroup.subtree_control".into(), for_children.join(" ")));
        }
        if group.freeze {
            this.settings.push(("cgroup.freeze".into(), "1".into()));
        }
        if !others.is_empty() {
            this.unsupported.push(format!("what is set for its {}", others.join(" and ")));
        }
        if group.dom_cgrp != addr && group.dom_cgrp != 0 {
            this.unsupported.push("that it is threaded".into());
        }
        if self.has_bpf_programs(group)? {
            this.unsupported.push("its BPF programs (which devices it may use, who may be talked to)".into());
        }
        Ok(this)
    }

    /// Root, unless somebody has changed it.
    fn kernfs_owner(&self, node: u64) -> Result<(u32, u32)> {
        let node: KernfsNode = self.kernel.read(node)?;
        if node.iattr == 0 {
            return Ok((0, 0));
        }
        let owner: KernfsIattrs = self.kernel.read(node.iattr)?;
        Ok((owner.ia_uid, owner.ia_gid))
    }

    fn has_bpf_programs(&self, group: &CgroupStruct) -> Result<bool> {
        let Some(lists) = group.bpf else { return Ok(false) };
        let types = self.kernel.enum_value("MAX_CGROUP_BPF_ATTACH_TYPE").unwrap_or(0);
        for number in 0..u64::try_from(types).unwrap_or(0).min(MAX_BPF_TYPES) {
            if self.kernel.read_u64(lists.wrapping_add(8 * number))? != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use snapshot::Cgroup;
    use synth::{Record, Synth, U64, array, named};

    /// The root and one group below it, which has a limit of 77 processes and passes that controller on.
    fn machine() -> (Synth, u64, u64) {
        let mut synth = Synth::new();
        let css = Record::new().field("children", array(U64, 2)).field("sibling", array(U64, 2));
        synth.structure("cgroup_subsys_state", css);
        declare::<CgroupStruct>(
            &mut synth,
            &[("self", named("cgroup_subsys_state")), ("subsys", array(U64, 8)), ("bpf", array(U64, 4))],
        );
        synth.structure("cgroup_root", Record::new().field("cgrp", named("cgroup")));
        declare::<PidsCgroup>(&mut synth, &[("css", named("cgroup_subsys_state"))]);
        declare::<KernfsNode>(&mut synth, &[("parent", U64), ("name", U64)]);
        declare::<KernfsIattrs>(&mut synth, &[]);
        synth.enumeration("cgroup_subsys_id", &[("pids_cgrp_id", 3)]);
        let root = synth.variable("cgrp_dfl_root", "cgroup_root");
        let root = synth.address_of("cgroup_root", root, "cgrp");
        let group = synth.alloc("cgroup");
        let (top, node) = (synth.alloc("kernfs_node"), synth.alloc("kernfs_node"));
        let name = synth.string("a.slice");
        synth.set("kernfs_node", node, "parent", top).set("kernfs_node", node, "name", name);
        let owner = synth.alloc("kernfs_iattrs");
        synth.set("kernfs_iattrs", owner, "ia_uid", 1000u32).set("kernfs_node", node, "iattr", owner);
        for (addr, kn) in [(root, top), (group, node)] {
            synth.set("cgroup", addr, "kn", kn);
            synth.list_init("cgroup", addr, "self.children");
        }
        let pids = synth.alloc("pids_cgroup");
        synth.set("pids_cgroup", pids, "limit.counter", 77u64);
        let css = synth.address_of("pids_cgroup", pids, "css");
        let subsys = synth.address_of("cgroup", group, "subsys");
        synth.write_u64(subsys + 3 * 8, css);
        synth.set("cgroup", group, "subtree_control", 1u16 << 3);
        let sibling = synth.address_of("cgroup", group, "self.sibling");
        let children = synth.address_of("cgroup", root, "self.children");
        synth.list_add_tail(sibling, children);
        (synth, root, group)
    }

    #[test]
    fn limits_and_controllers_are_read() {
        let (synth, ..) = machine();
        let kernel = open(&synth);
        let autopsy = Autopsy::new(&kernel);
        let setting = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        let expected = Cgroup {
            path: "/a.slice".into(),
            uid: 1000,
            gid: 0,
            settings: vec![setting("cgroup.subtree_control", "+pids"), setting("pids.max", "77")],
            unsupported: vec![],
        };
        assert_eq!(autopsy.cgroups(), [expected]);
        assert!(autopsy.findings().is_empty(), "{:?}", autopsy.findings());
    }

    #[test]
    fn a_group_within_itself_ends_the_walk() {
        let (mut synth, _, group) = machine();
        let children = synth.list_init("cgroup", group, "self.children");
        let other = synth.address_of("cgroup", group, "self.sibling");
        synth.list_add_tail(other, children);
        let kernel = open(&synth);
        let autopsy = Autopsy::new(&kernel);
        assert!(autopsy.cgroups().len() <= 1);
        assert!(autopsy.findings()[0].text.contains("control groups"));
    }
}
