//! Who makes whom: the tree of processes to be created so that parents, sessions and process groups come out right.
//!
//! A process cannot choose its parent or its session; both come from whoever forks it. So a process is made by its parent where
//! that is in the right session, and otherwise by a member of the right session in such a way that it ends up below its
//! parent ([`Birth`]). Sessions and groups whose leader does not come back are led by *placeholders*, which end when
//! everybody has joined.

use std::collections::{BTreeMap, BTreeSet};

use crate::first;
use snapshot::{Pid, Process, ProcessState, Reason, Snapshot};

/// Index into [`Plan::nodes`].
pub(crate) type NodeId = usize;

/// What a created process becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A living process: index into [`Snapshot::processes`].
    Process(usize),
    /// One that has exited and waits to be waited for.
    Zombie(usize),
    /// Leads a session or group in place of a process that does not come back.
    Placeholder,
}

/// How a process comes below its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Birth {
    /// By fork: the maker is the parent.
    Child,
    /// By fork with CLONE_PARENT: the maker's parent is the parent.
    Sibling,
    /// By a helper that ends at once: whoever adopts orphans (the nearest subreaper, PID 1) is the parent.
    Orphan,
}

/// What a process has in common with its maker; it can be had at birth only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shared {
    /// The descriptor table (CLONE_FILES).
    pub(crate) files: bool,
    /// Working directory, root and umask (CLONE_FS).
    pub(crate) fs: bool,
}

/// One process to be created.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) pid: Pid,
    pub(crate) role: Role,
    /// `None`: its parent does not come back.
    pub(crate) parent: Option<Pid>,
    pub(crate) pgid: Pid,
    pub(crate) sid: Pid,
    pub(crate) shared: Shared,
    /// Whom it makes before it starts a session of its own.
    pub(crate) makes_first: Vec<(NodeId, Birth)>,
    /// Whom it makes afterwards.
    pub(crate) makes: Vec<(NodeId, Birth)>,
}

/// The whole tree.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) nodes: Vec<Node>,
    /// Made by the worker itself.
    pub(crate) roots: Vec<(NodeId, Birth)>,
    index: BTreeMap<Pid, NodeId>,
}

/// Who makes a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maker {
    Worker,
    Node(Pid),
    /// A node, before its setsid.
    NodeFirst(Pid),
}

impl Plan {
    /// Works out the tree for the processes of `wanted`. Those that cannot be placed are returned instead, with the reason.
    ///
    /// `own_session` and `own_group` are the worker's.
    pub(crate) fn new(
        snapshot: &Snapshot,
        wanted: &BTreeSet<Pid>,
        own_session: Pid,
        own_group: Pid,
    ) -> Result<Self, Vec<(Pid, Reason)>> {
        let mut nodes = Vec::new();
        for (i, p) in snapshot.processes.iter().enumerate().filter(|(_, p)| wanted.contains(&p.pid)) {
            let role = match p.state {
                ProcessState::Zombie { .. } => Role::Zombie(i),
                _ => Role::Process(i),
            };
            // Of whoever is not among them the caller's parent takes the place, which may be PID 1 itself.
            let parent = wanted.contains(&p.ppid).then_some(p.ppid);
            nodes.push(Node {
                pid: p.pid,
                role,
                parent,
                pgid: p.pgid,
                sid: p.sid,
                shared: Shared::default(),
                makes_first: vec![],
                makes: vec![],
            });
        }
        add_placeholders(&mut nodes, own_session, own_group);
        let index: BTreeMap<Pid, NodeId> = nodes.iter().enumerate().map(|(i, n)| (n.pid, i)).collect();
        let mut failures = Vec::new();
        let mut makers = Vec::new();
        for node in &nodes {
            match maker(snapshot, &nodes, &index, node, own_session) {
                Ok(maker) => makers.push(maker),
                Err(reason) => {
                    failures.push((node.pid, reason));
                    makers.push((Maker::Worker, Birth::Sibling));
                }
            }
        }
        for (node, (maker, birth)) in nodes.iter_mut().zip(&makers) {
            node.shared = shared(snapshot, node, *maker, *birth);
        }
        failures.extend(apart(snapshot, &nodes));
        let mut plan = Self { nodes, roots: Vec::new(), index };
        for (id, (maker, birth)) in makers.into_iter().enumerate() {
            match maker {
                Maker::Worker => plan.roots.push((id, birth)),
                Maker::Node(pid) => plan.nodes[plan.index[&pid]].makes.push((id, birth)),
                Maker::NodeFirst(pid) => plan.nodes[plan.index[&pid]].makes_first.push((id, birth)),
            }
        }
        // Whoever cannot be reached from the worker is part of a ring of parents: the tables of the dead kernel were damaged.
        let mut reached = BTreeSet::new();
        let mut queue: Vec<NodeId> = plan.roots.iter().map(|(id, _)| *id).collect();
        while let Some(id) = queue.pop() {
            if reached.insert(id) {
                let node = &plan.nodes[id];
                queue.extend(node.makes_first.iter().chain(&node.makes).map(|(id, _)| *id));
            }
        }
        for (id, node) in plan.nodes.iter().enumerate().filter(|(id, _)| !reached.contains(id)) {
            debug_assert_eq!(plan.index[&node.pid], id);
            let text = "its ancestors form a ring";
            failures.push((node.pid, Reason::new("process-tree", text)));
        }
        if failures.is_empty() { Ok(plan) } else { Err(failures) }
    }

    pub(crate) fn node(&self, pid: Pid) -> Option<&Node> {
        self.nodes.get(*self.index.get(&pid)?)
    }

    /// Whether all who had this `fs_struct` share it again.
    pub(crate) fn share_fs(&self, snapshot: &Snapshot, id: u64) -> bool {
        let has_own = |node: &&Node| match node.role {
            Role::Process(i) => snapshot.processes[i].fs.id == id && !node.shared.fs,
            _ => false,
        };
        self.nodes.iter().filter(has_own).count() <= 1
    }

    /// How many ancestors of a process come back with it.
    pub(crate) fn depth(&self, pid: Pid) -> usize {
        let parent = |pid: &Pid| self.node(*pid).and_then(|node| node.parent);
        // Nobody is its own ancestor, but then it must end too.
        std::iter::successors(parent(&pid), parent).take(self.nodes.len()).count()
    }
}

/// Leaders that do not come back are stood in for.
fn add_placeholders(nodes: &mut Vec<Node>, own_session: Pid, own_group: Pid) {
    let mut known: BTreeSet<Pid> = nodes.iter().map(|n| n.pid).collect();
    let members: Vec<(Pid, Pid)> = nodes.iter().map(|n| (n.pgid, n.sid)).collect();
    let placeholder = |pid, sid| Node {
        pid,
        role: Role::Placeholder,
        parent: None,
        pgid: pid,
        sid,
        shared: Shared::default(),
        makes_first: vec![],
        makes: vec![],
    };
    for &(_, sid) in &members {
        if sid != own_session && known.insert(sid) {
            nodes.push(placeholder(sid, sid));
        }
    }
    for &(pgid, sid) in &members {
        if pgid != own_group && known.insert(pgid) {
            nodes.push(placeholder(pgid, sid));
        }
    }
}

fn maker(
    snapshot: &Snapshot,
    nodes: &[Node],
    index: &BTreeMap<Pid, NodeId>,
    node: &Node,
    own_session: Pid,
) -> Result<(Maker, Birth), Reason> {
    let get = |pid: Pid| index.get(&pid).map(|&i| &nodes[i]);
    let parent = node.parent.and_then(get);
    if let Some(parent) = parent {
        if node.sid == node.pid || parent.sid == node.sid {
            return Ok((Maker::Node(parent.pid), Birth::Child));
        }
        // A leader was in the session of whoever made it until it called setsid.
        let born_in = parent.parent.and_then(get).map_or(own_session, |p| p.sid);
        if parent.sid == parent.pid && born_in == node.sid {
            return Ok((Maker::NodeFirst(parent.pid), Birth::Child));
        }
    } else if node.sid == node.pid || node.sid == own_session {
        return Ok((Maker::Worker, Birth::Sibling));
    }
    let Some(leader) = get(node.sid).filter(|l| l.sid == l.pid && !matches!(l.role, Role::Zombie(_))) else {
        let text = format!("its session {} cannot be made", node.sid);
        return Err(Reason::new("session", text));
    };
    match parent {
        None if leader.parent.is_none() => Ok((Maker::Node(leader.pid), Birth::Sibling)),
        None => Ok((Maker::Node(leader.pid), Birth::Orphan)),
        // Adopted by a subreaper.
        Some(p) if snapshot.process(p.pid).is_some_and(|p| p.child_subreaper) => {
            Ok((Maker::Node(leader.pid), Birth::Orphan))
        }
        Some(p) => {
            let text = format!("it is in session {}, its parent {} is not and was not", node.sid, p.pid);
            Err(Reason::new("session", text))
        }
    }
}

/// What a node can share with its maker.
fn shared(snapshot: &Snapshot, node: &Node, maker: Maker, birth: Birth) -> Shared {
    let (Maker::Node(maker) | Maker::NodeFirst(maker)) = maker else { return Shared::default() };
    let (Role::Process(i), Some(maker)) = (node.role, snapshot.process(maker)) else {
        return Shared::default();
    };
    let process = &snapshot.processes[i];
    let is_made_by_it = birth != Birth::Orphan;
    Shared {
        files: is_made_by_it && process.files_id != 0 && process.files_id == maker.files_id,
        // Who shares them cannot enter a mount namespace.
        fs: is_made_by_it
            && process.fs.id != 0
            && process.fs.id == maker.fs.id
            && process.mount_namespace.is_none(),
    }
}

/// Those who shared their descriptor table with somebody with whom they cannot.
fn apart(snapshot: &Snapshot, nodes: &[Node]) -> Vec<(Pid, Reason)> {
    let mut firsts: BTreeMap<u64, Pid> = BTreeMap::new();
    // That one is there already.
    firsts.extend(snapshot.process(first::PID).map(|p| (p.files_id, p.pid)));
    let mut failures = Vec::new();
    for node in nodes {
        let Role::Process(i) = node.role else { continue };
        let process = &snapshot.processes[i];
        let why = if node.shared.files {
            let leads = process.sid == process.pid && process.ctty.is_some();
            leads.then(|| "which is made before it: it leads a session with a terminal".to_owned())
        } else if process.files_id == 0 {
            None
        } else {
            let other = firsts.insert(process.files_id, process.pid);
            other.map(|other| format!("PID {other}, which is neither its parent nor its child"))
        };
        if let Some(why) = why {
            let text = format!("it shares its descriptor table (CLONE_FILES) with {why}");
            failures.push((process.pid, Reason::new("shared-descriptors", text)));
        }
    }
    failures
}

/// All PIDs and TIDs that a process needs.
pub(crate) fn ids(process: &Process) -> impl Iterator<Item = Pid> + '_ {
    std::iter::once(process.pid).chain(process.threads.iter().map(|t| t.tid).filter(|&t| t != process.pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: Pid, ppid: Pid, pgid: Pid, sid: Pid) -> Process {
        Process { ppid, pgid, sid, cgroup: "/".into(), ..Process::new(pid, "x".into()) }
    }

    fn plan(processes: Vec<Process>) -> Result<Plan, Vec<(Pid, Reason)>> {
        let wanted = processes.iter().map(|p| p.pid).collect();
        Plan::new(&Snapshot { processes, ..Snapshot::default() }, &wanted, 0, 0)
    }

    /// Who is made by whom and how, 0 for the worker.
    fn made(plan: &Plan) -> BTreeMap<Pid, (Pid, Birth)> {
        let of = |list: &[(NodeId, Birth)], by: Pid| -> Vec<_> {
            list.iter().map(|(id, birth)| (plan.nodes[*id].pid, (by, *birth))).collect()
        };
        let mut all = of(&plan.roots, 0);
        for n in &plan.nodes {
            all.extend(of(&n.makes, n.pid));
            all.extend(of(&n.makes_first, n.pid));
        }
        all.into_iter().collect()
    }

    #[test]
    fn a_shell_makes_its_pipeline() {
        let p =
            plan(vec![process(100, 1, 100, 100), process(101, 100, 101, 100), process(102, 100, 101, 100)])
                .unwrap();
        assert_eq!(
            made(&p),
            [(100, (0, Birth::Sibling)), (101, (100, Birth::Child)), (102, (100, Birth::Child))].into()
        );
    }

    #[test]
    fn a_lost_session_leader_gets_a_placeholder() {
        let p = plan(vec![process(102, 1, 101, 100)]).unwrap();
        assert_eq!(p.nodes.iter().filter(|n| n.role == Role::Placeholder).count(), 2);
        assert_eq!(
            made(&p),
            [(100, (0, Birth::Sibling)), (101, (100, Birth::Sibling)), (102, (100, Birth::Sibling))].into()
        );
    }

    #[test]
    fn an_orphan_in_the_session_of_somebody_elses_child_is_orphaned_again() {
        let p = plan(vec![process(50, 1, 50, 50), process(100, 50, 100, 100), process(102, 1, 102, 100)])
            .unwrap();
        assert_eq!(made(&p)[&102], (100, Birth::Orphan));
    }

    #[test]
    fn a_child_from_before_its_parents_setsid() {
        let p = plan(vec![process(50, 1, 50, 50), process(60, 50, 60, 60), process(61, 60, 61, 50)]).unwrap();
        assert_eq!(made(&p)[&61], (60, Birth::Child));
        assert_eq!(p.node(60).unwrap().makes_first.len(), 1);
    }

    #[test]
    fn an_impossible_session_is_named() {
        let failures =
            plan(vec![process(50, 1, 50, 50), process(60, 50, 60, 50), process(61, 60, 61, 99)]).unwrap_err();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].0, 61);
    }

    #[test]
    fn a_descriptor_table_is_shared_with_the_maker_or_with_nobody() {
        let sharing = |pid, ppid, files_id, fs_id| {
            let mut p = process(pid, ppid, 50, 50);
            (p.files_id, p.fs.id) = (files_id, fs_id);
            p
        };
        let p = plan(vec![sharing(50, 1, 7, 3), sharing(60, 50, 7, 4), sharing(61, 60, 7, 4)]).unwrap();
        let shared = |pid| p.node(pid).unwrap().shared;
        assert_eq!(shared(50), Shared::default());
        assert_eq!(shared(60), Shared { files: true, fs: false });
        assert_eq!(shared(61), Shared { files: true, fs: true });
        let failures =
            plan(vec![sharing(50, 1, 6, 3), sharing(60, 50, 7, 4), sharing(61, 50, 7, 4)]).unwrap_err();
        assert!(matches!(failures.as_slice(), [(61, reason)] if reason.code == "shared-descriptors"));
        let with_first = plan(vec![sharing(1, 0, 7, 3), sharing(60, 1, 7, 4)]);
        assert!(with_first.is_err(), "PID 1 is not made");
    }

    #[test]
    fn a_ring_of_parents_is_refused() {
        let failures = plan(vec![process(50, 51, 50, 50), process(51, 50, 50, 50)]).unwrap_err();
        assert_eq!(failures.len(), 2);
    }
}
