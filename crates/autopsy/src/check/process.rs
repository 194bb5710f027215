//! Task list, PIDs, thread lists, parents and children (kernel/fork.c, kernel/exit.c, kernel/pid.c, include/linux/sched.h; 6.1 and 6.12).
//!
//! All of these are changed with tasklist_lock held for writing: where it was held, a disagreement is only noted.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use ktypes::KernelType;
use snapshot::FindingKind;

use super::slab::{FILES, FS, NSPROXY, SIGHAND, SIGNAL};
use super::{Doubts, Machine, Subject};
use crate::Autopsy;
use crate::error::Result;
use crate::process::Member;

/// Children of one task.
const MAX_CHILDREN: usize = 1 << 20;
/// Steps along one child's siblings: only taken when its parent does not know it.
const MAX_SIBLINGS: usize = 1 << 12;
/// `list_del()` leaves these behind (include/linux/poison.h, CONFIG_ILLEGAL_POINTER_VALUE of x86-64).
const LIST_POISON: [u64; 2] = [0xdead_0000_0000_0100, 0xdead_0000_0000_0122];
/// The lowest byte of a stack's canary is zero (CANARY_MASK, include/linux/random.h).
const CANARY_MASK: u64 = !0xff;

#[derive(KernelType)]
#[kernel("qrwlock")]
struct Lock {
    wlocked: u8,
}

#[derive(KernelType)]
#[kernel("task_struct")]
struct Links {
    #[kernel("tasks.next")]
    tasks_next: u64,
    #[kernel("tasks.prev")]
    tasks_prev: u64,
    #[kernel("thread_node.next")]
    thread_next: u64,
    #[kernel("thread_node.prev")]
    thread_prev: u64,
    #[kernel("pid_links", address)]
    pid_links: u64,
    #[kernel(optional)]
    stack_canary: Option<u64>,
}

#[derive(KernelType)]
#[kernel("signal_struct")]
struct Threads {
    nr_threads: i32,
    #[kernel("pids[1]")]
    tgid: u64,
}

#[derive(KernelType)]
#[kernel("pid")]
struct PidTasks {
    #[kernel("tasks[0].first")]
    first: u64,
}

/// Children that parents (by address) know of, as addresses of their `sibling` members.
#[derive(Default)]
pub(super) struct Parents(HashMap<u64, HashSet<u64>>);

impl Autopsy<'_> {
    /// Whether tasklist_lock was held for writing. If that cannot be told, it may have been.
    pub(super) fn is_task_list_locked(&self) -> bool {
        let lock = self.kernel.symbol("tasklist_lock").and_then(|at| self.kernel.read::<Lock>(at));
        lock.map_or(true, |lock| lock.wlocked != 0)
    }

    pub(super) fn check_process(
        &self,
        subject: &Subject<'_>,
        machine: &Machine,
        parents: &mut Parents,
        doubts: &mut Doubts,
    ) {
        let (leader, object) = (&subject.group.members[0], "process");
        let mut found = Doubts::default();
        let checked = self.check_links(subject, parents, &mut found);
        self.outcome(checked, FindingKind::Link, object, leader.addr, &mut found);
        for doubt in found.0 {
            let severity = if machine.tasks_change { snapshot::Severity::Note } else { doubt.severity };
            doubts.add(severity, doubt.kind, doubt.object, doubt.address, doubt.text);
        }
        self.check_slab(SIGNAL, leader.task.signal, object, doubts);
        let Some(first) = subject.living.first() else { return };
        for Member { addr, task } in &subject.living {
            // Threads are one process by sharing these (copy_process() refuses anything else); an execve(2) that gives a thread new ones
            // has ended the others before.
            if (task.mm, task.sighand) != (first.task.mm, first.task.sighand) {
                let text = format!("thread {} has memory or signal handlers of its own", task.pid);
                doubts.doubt(FindingKind::Link, "thread", *addr, text);
            }
        }
        let task = &first.task;
        for (kind, addr) in
            [(SIGHAND, task.sighand), (FILES, task.files), (FS, task.fs), (NSPROXY, task.nsproxy)]
        {
            if addr != 0 {
                self.check_slab(kind, addr, object, doubts);
            }
        }
    }

    fn check_links(&self, subject: &Subject<'_>, parents: &mut Parents, doubts: &mut Doubts) -> Result<()> {
        let (leader, members) = (&subject.group.members[0], &subject.group.members);
        let threads: Threads = self.kernel.read(leader.task.signal)?;
        if usize::try_from(threads.nr_threads) != Ok(members.len()) {
            let text =
                format!("{} threads were found, the kernel counted {}", members.len(), threads.nr_threads);
            doubts.doubt(FindingKind::Count, "process", leader.task.signal, text);
        }
        if threads.tgid != leader.task.thread_pid {
            let text = "its PID as a process is another one than as a thread";
            doubts.doubt(FindingKind::Link, "process", leader.addr, text);
        }
        for Member { addr, task } in members.iter().filter(|m| !m.task.is_new() && !m.task.has_exited()) {
            let links: Links = self.kernel.read(*addr)?;
            let own = [links.thread_next, links.thread_prev, links.tasks_next, links.tasks_prev];
            if own.iter().any(|link| LIST_POISON.contains(link)) {
                let text =
                    format!("thread {} has been taken out of a list that living ones are in", task.pid);
                doubts.doubt(FindingKind::Canary, "thread", *addr, text);
            }
            if links.stack_canary.is_some_and(|canary| canary & !CANARY_MASK != 0 || canary == 0) {
                let text = format!("thread {}: the canary of its stack cannot be one", task.pid);
                doubts.doubt(FindingKind::Canary, "thread", *addr, text);
            }
            let number = self.pid_number(task.thread_pid)?;
            if number != task.pid {
                let text = format!("thread {} has the PID {number} in its struct pid", task.pid);
                doubts.doubt(FindingKind::Link, "thread", *addr, text);
            }
            let pid: PidTasks = self.kernel.read(task.thread_pid)?;
            if pid.first != links.pid_links {
                let text = format!("the PID {} leads to another task", task.pid);
                doubts.doubt(FindingKind::Link, "thread", *addr, text);
            }
        }
        self.check_parent(leader, parents, doubts)
    }

    /// A process is among the children of its parent.
    fn check_parent(&self, leader: &Member, parents: &mut Parents, doubts: &mut Doubts) -> Result<()> {
        let parent = leader.task.real_parent;
        if let Err(error) = self.task(parent) {
            doubts.doubt(FindingKind::Link, "process", leader.addr, format!("its parent is none: {error}"));
            return Ok(());
        }
        let head = parent.wrapping_add(self.kernel.offset_of("task_struct", "children")?);
        let to_sibling = self.kernel.offset_of("task_struct", "sibling")?;
        let own = leader.addr.wrapping_add(to_sibling);
        let known = parents.0.entry(parent).or_insert_with(|| self.children_of(head));
        if known.contains(&own) {
            return Ok(());
        }
        // Its siblings lead to the list that it is in.
        match self.head_of(own, to_sibling)? {
            Some(found) if found != head => {
                let text = "it is another task's child than the one that it calls its parent";
                doubts.doubt(FindingKind::Link, "process", leader.addr, text);
            }
            _ => {
                let text = "its parent's list of children is damaged";
                doubts.note(FindingKind::Link, "process", parent, text);
            }
        }
        Ok(())
    }

    /// All that can be reached from a head, in either direction, up to where it breaks.
    fn children_of(&self, head: u64) -> HashSet<u64> {
        let mut children = HashSet::new();
        let back = self.kernel.offset_of("list_head", "prev").unwrap_or(0);
        for step in [0, back] {
            let (mut node, mut seen) = (head, HashSet::new());
            while seen.len() < MAX_CHILDREN {
                node = match self.kernel.read_u64(node.wrapping_add(step)) {
                    Ok(next) if next != head => next,
                    _ => break,
                };
                if !seen.insert(node) {
                    break;
                }
            }
            children.extend(seen);
        }
        children
    }

    /// The head of the list of children that a child is in: the node that is no `sibling` of a task; `None` if the way there is broken.
    fn head_of(&self, child: u64, to_sibling: u64) -> Result<Option<u64>> {
        let to_children = self.kernel.offset_of("task_struct", "children")?;
        let mut node = child;
        for _ in 0..MAX_SIBLINGS {
            let Ok(next) = self.kernel.read_u64(node) else { return Ok(None) };
            if self.task(next.wrapping_sub(to_sibling)).is_err() {
                return Ok(self.task(next.wrapping_sub(to_children)).is_ok().then_some(next));
            }
            node = next;
        }
        Ok(None)
    }
}
