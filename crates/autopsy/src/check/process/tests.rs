use ktypes::KernelType;
use snapshot::Severity;
use synth::{Record, Synth, U8, U32, array, named};

use super::*;
use crate::process::Task;
use crate::testing::{declare, open};

/// Init, its child of two threads, and that one's child.
struct Fake {
    synth: Synth,
    init: u64,
    leader: u64,
    thread: u64,
    child: u64,
}

/// What is used by offset only.
#[derive(KernelType)]
#[kernel("pid_namespace")]
struct Namespace {
    #[kernel("idr.idr_rt", address)]
    _idr: u64,
}

#[derive(KernelType)]
#[kernel("upid")]
struct Upid {
    #[kernel("nr")]
    _nr: i32,
}

impl Fake {
    fn new() -> Self {
        let mut synth = Synth::new();
        let lists = ["tasks", "thread_node", "sibling", "children"].map(|name| (name, named("list_head")));
        let links = [("pid_links", array(named("hlist_node"), 4)), ("stack_canary", synth::U64)];
        let all: Vec<_> = lists.into_iter().chain(links).collect();
        declare::<Task>(&mut synth, &all);
        synth.structure(
            "signal_struct",
            Record::new()
                .field("nr_threads", synth::I32)
                .field("thread_head", named("list_head"))
                .field("shared_pending", array(synth::U64, 2))
                .field("group_exit_code", synth::I32)
                .field("group_stop_count", synth::I32)
                .field("flags", U32)
                .field("is_child_subreaper", synth::BOOL)
                .field("pids", array(synth::PTR, 4))
                .field("tty", synth::PTR)
                .field("rlim", array(synth::U64, 32))
                .field("oom_score_adj", synth::I16),
        );
        synth.structure(
            "pid",
            Record::new()
                .field("level", U32)
                .field("tasks", array(named("hlist_head"), 4))
                .field("numbers", array(synth::U64, 2)),
        );
        declare::<Namespace>(&mut synth, &[("idr_rt", named("xarray"))]);
        declare::<Upid>(&mut synth, &[("nr", U32)]);
        synth.structure("qrwlock", Record::new().field("wlocked", U8).field("rest", array(U8, 7)));
        synth.variable("tasklist_lock", "qrwlock");
        synth.structure("rq", Record::new().field("curr", synth::PTR));
        synth.per_cpu_variable("runqueues", 8);
        synth.variable("init_pid_ns", "pid_namespace");
        let idle = synth.variable("init_task", "task_struct");
        let tasks = synth.list_init("task_struct", idle, "tasks");
        synth.list_init("task_struct", idle, "children");
        synth.set("task_struct", idle, "group_leader", idle);
        let cache = synth.slab_cache("task_struct", synth.size_of("task_struct"));
        let mut fake = Self { synth, init: 0, leader: 0, thread: 0, child: 0 };
        fake.init = fake.task(cache, 1, None, idle);
        fake.leader = fake.task(cache, 20, None, fake.init);
        fake.thread = fake.task(cache, 21, Some(fake.leader), fake.init);
        fake.child = fake.task(cache, 30, None, fake.leader);
        for task in [fake.init, fake.leader, fake.child] {
            let node = fake.at(task, "tasks");
            fake.synth.list_add_tail(node, tasks);
        }
        fake
    }

    fn at(&self, task: u64, member: &str) -> u64 {
        self.synth.address_of("task_struct", task, member)
    }

    /// A thread of `leader`, or a process of its own.
    fn task(&mut self, cache: u64, pid: i32, leader: Option<u64>, parent: u64) -> u64 {
        let task = self.synth.slab_alloc(cache);
        let own = leader.unwrap_or(task);
        let tgid = if own == task {
            u64::from(pid.unsigned_abs())
        } else {
            self.synth.get_u64("task_struct", own, "pid")
        };
        let number = self.synth.alloc("pid");
        let nr = self.synth.address_of("pid", number, "numbers");
        self.synth.set("upid", nr, "nr", pid);
        let signal = match leader {
            Some(leader) => self.synth.get_u64("task_struct", leader, "signal"),
            None => {
                let signal = self.synth.alloc("signal_struct");
                self.synth.list_init("signal_struct", signal, "thread_head");
                self.synth.set("signal_struct", signal, "pids[1]", number);
                signal
            }
        };
        self.synth
            .set("task_struct", task, "pid", pid)
            .set("task_struct", task, "tgid", tgid)
            .set("task_struct", task, "group_leader", own)
            .set("task_struct", task, "real_parent", parent)
            .set("task_struct", task, "thread_pid", number)
            .set("task_struct", task, "signal", signal)
            .set("task_struct", task, "sighand", signal + 8)
            .set("task_struct", task, "stack_canary", 0x1234_5678_9abc_de00_u64);
        self.synth.list_init("task_struct", task, "children");
        let (head, node) =
            (self.synth.address_of("signal_struct", signal, "thread_head"), self.at(task, "thread_node"));
        self.synth.list_add_tail(node, head);
        let threads = self.synth.get_u64("signal_struct", signal, "nr_threads");
        self.synth.set("signal_struct", signal, "nr_threads", threads + 1);
        let kinds = if leader.is_none() { 0..2 } else { 0..1 };
        for kind in kinds {
            let bucket = self.synth.address_of("pid", number, &format!("tasks[{kind}]"));
            let link = self.at(task, &format!("pid_links[{kind}]"));
            self.synth.hlist_add_head(link, bucket);
        }
        if leader.is_none() {
            let (head, node) = (self.at(parent, "children"), self.at(task, "sibling"));
            self.synth.list_add_tail(node, head);
        }
        task
    }

    /// What is said about the process of `leader`, and how much it matters.
    fn said(&self) -> Vec<(Severity, String)> {
        let kernel = open(&self.synth);
        let autopsy = Autopsy::new(&kernel);
        let groups = autopsy.groups().unwrap();
        let machine = autopsy.machine(&groups, &[]);
        let group = groups.iter().find(|group| group.leader.pid == 20).unwrap();
        let subject = Subject { group, living: group.members.iter().collect() };
        let mut doubts = Doubts::default();
        autopsy.check_process(&subject, &machine, &mut Parents::default(), &mut doubts);
        let left_out = autopsy.findings().into_iter().map(|finding| finding.text);
        assert_eq!(left_out.collect::<Vec<_>>(), Vec::<String>::new());
        doubts.0.into_iter().map(|doubt| (doubt.severity, doubt.text)).collect()
    }

    /// What one wrong value leads to.
    fn damaged(change: impl FnOnce(&mut Self)) -> Vec<(Severity, String)> {
        let mut fake = Self::new();
        change(&mut fake);
        fake.said()
    }
}

#[track_caller]
fn assert_doubt(said: &[(Severity, String)], what: &str) {
    assert!(
        said.iter().any(|(severity, text)| *severity == Severity::Doubt && text.contains(what)),
        "{said:?}"
    );
}

#[test]
fn a_whole_process_raises_no_doubt() {
    assert_eq!(Fake::new().said(), []);
}

#[test]
fn threads_are_counted() {
    let said = Fake::damaged(|f| {
        let signal = f.synth.get_u64("task_struct", f.leader, "signal");
        f.synth.set("signal_struct", signal, "nr_threads", 3);
    });
    assert_doubt(&said, "2 threads were found, the kernel counted 3");
}

#[test]
fn pids_lead_there_and_back() {
    let said = Fake::damaged(|f| {
        let number = f.synth.get_u64("task_struct", f.init, "thread_pid");
        f.synth.set("task_struct", f.thread, "thread_pid", number);
    });
    assert_doubt(&said, "thread 21 has the PID 1 in its struct pid");
    assert_doubt(&said, "the PID 21 leads to another task");
    let said = Fake::damaged(|f| {
        let signal = f.synth.get_u64("task_struct", f.leader, "signal");
        f.synth.set("signal_struct", signal, "pids[1]", 0);
    });
    assert_doubt(&said, "its PID as a process");
}

#[test]
fn a_child_is_among_its_parents_children() {
    let said = Fake::damaged(|f| _ = f.synth.set("task_struct", f.leader, "real_parent", f.child));
    assert_doubt(&said, "another task's child");
    let said = Fake::damaged(|f| _ = f.synth.set("task_struct", f.leader, "real_parent", f.leader + 8));
    assert_doubt(&said, "its parent is none");
    // In one direction it is still found, in none only the list is to blame.
    let cut = |f: &mut Fake, back: bool| {
        let (head, own) = (f.at(f.init, "children"), f.at(f.leader, "sibling"));
        f.synth.set("list_head", head, "next", 8_u64);
        if back {
            f.synth.set("list_head", head, "prev", 8_u64).set("list_head", own, "next", 8_u64);
        }
    };
    assert_eq!(Fake::damaged(|f| cut(f, false)), []);
    let said = Fake::damaged(|f| cut(f, true));
    assert_eq!(said, [(Severity::Note, "its parent's list of children is damaged".to_owned())]);
}

#[test]
fn poison_and_canaries_are_looked_at() {
    for (member, poison) in [("thread_node.next", LIST_POISON[0]), ("tasks.prev", LIST_POISON[1])] {
        let mut fake = Fake::new();
        let kernel = open(&fake.synth);
        let groups = Autopsy::new(&kernel).groups().unwrap();
        assert_eq!(groups.len(), 3);
        // Forwards through the threads nobody would get past it.
        let task = if member.starts_with("thread") { fake.thread } else { fake.leader };
        let at = fake.at(task, member);
        fake.synth.write_u64(at, poison);
        let kernel = open(&fake.synth);
        let autopsy = Autopsy::new(&kernel);
        match autopsy.groups().unwrap().iter().find(|group| group.leader.pid == 20) {
            Some(_) => assert_doubt(&fake.said(), "taken out of a list"),
            None => assert!(autopsy.findings().iter().any(|f| f.text.contains("process 20")), "it is lost"),
        }
    }
    let said = Fake::damaged(|f| _ = f.synth.set("task_struct", f.thread, "stack_canary", 0x1234_5678_u64));
    assert_doubt(&said, "canary");
}

#[test]
fn threads_share_what_makes_them_threads() {
    let said = Fake::damaged(|f| _ = f.synth.set("task_struct", f.thread, "sighand", f.init));
    assert_doubt(&said, "signal handlers of its own");
}

#[test]
fn where_the_lists_were_being_changed_nothing_is_held_against_them() {
    let said = Fake::damaged(|f| {
        let signal = f.synth.get_u64("task_struct", f.leader, "signal");
        f.synth.set("signal_struct", signal, "nr_threads", 3);
        let kernel = open(&f.synth);
        let lock = kernel.symbol("tasklist_lock").unwrap();
        f.synth.write(lock, &[0xff]);
    });
    assert!(said.len() == 1 && said[0].0 == Severity::Note, "{said:?}");
}
