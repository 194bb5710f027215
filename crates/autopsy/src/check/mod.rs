//! Cross-checks: everything that was read is compared with what duplicates it.
//!
//! **In:** the thread groups, address spaces and open files that have been read. **Out:** findings, each about one process: a
//! [`Severity::Doubt`] where two sources disagree and the process's own state may be the damaged one, a [`Severity::Note`] where the
//! disagreement costs nothing. **Never:** changes what was read, or calls that damaged which a kernel goes through.
//!
//! The other CPUs were stopped by NMIs, anywhere: structures are found as they are between two instructions of whoever changes them. Each
//! check therefore compares what agrees at every such moment, either because of the order in which the kernel writes (said there), or
//! because whoever changes it holds a lock, which is looked at.
//!
//! One file per kind of kernel object. Each declares the members that it compares; where a kernel does not have them, the check is left out
//! and a note about the machine says so.

pub(crate) mod credentials;
mod file;
mod kernel_text;
pub(crate) mod memory;
pub(crate) mod page;
mod page_table;
mod process;
mod slab;
mod socket;
mod thread;

pub(crate) use page_table::{Doing, user_end};
pub(crate) use slab::Caches;
use thread::check_threads;

use std::collections::{BTreeMap, HashMap, HashSet};

use snapshot::{AddressSpaceId, FileId, Finding, FindingKind, Pid, Process, Severity, VmaKind};

use crate::Autopsy;
use crate::error::{Error, Result};
use crate::process::{Group, Member};

/// Findings about one process; one damaged tree can give rise to thousands.
const MAX_PER_PROCESS: usize = 16;

/// What a check has found, before it is known whom it concerns.
#[derive(Clone, Debug)]
pub(crate) struct Doubt {
    severity: Severity,
    kind: FindingKind,
    object: &'static str,
    address: u64,
    text: String,
}

/// What the checks of one thing have found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Doubts(Vec<Doubt>);

impl Doubts {
    /// Nothing was found.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Two sources disagree.
    pub(crate) fn doubt(
        &mut self,
        kind: FindingKind,
        object: &'static str,
        address: u64,
        text: impl Into<String>,
    ) {
        self.add(Severity::Doubt, kind, object, address, text);
    }

    /// They disagree, but it costs nothing.
    pub(crate) fn note(
        &mut self,
        kind: FindingKind,
        object: &'static str,
        address: u64,
        text: impl Into<String>,
    ) {
        self.add(Severity::Note, kind, object, address, text);
    }

    fn add(
        &mut self,
        severity: Severity,
        kind: FindingKind,
        object: &'static str,
        address: u64,
        text: impl Into<String>,
    ) {
        if self.0.len() < MAX_PER_PROCESS {
            self.0.push(Doubt { severity, kind, object, address, text: text.into() });
        }
    }
}

/// A thread group that was on its way when the kernel died, or not.
struct Subject<'a> {
    group: &'a Group,
    /// Threads that have neither exited nor begun to, nor are still being made.
    living: Vec<&'a Member>,
}

/// What is true of the machine as a whole.
struct Machine {
    /// Somebody was changing task lists, parents and children, PIDs: tasklist_lock was held for writing.
    tasks_change: bool,
    /// Address spaces of threads that were on a CPU.
    running: HashSet<u64>,
    /// The tasks that use each address space.
    users: HashMap<u64, Vec<u64>>,
    /// References to open files from descriptors, mappings and programs.
    file_users: HashMap<u64, i64>,
    /// What is in doubt about address spaces' mappings and page tables.
    page_tables: HashMap<AddressSpaceId, Doubts>,
}

impl Autopsy<'_> {
    /// Compares what was read of all processes with what duplicates it.
    pub(crate) fn cross_check(&self, groups: &[Group], processes: &[Process]) {
        let machine = self.machine(groups, processes);
        let read: HashMap<Pid, &Process> = processes.iter().map(|p| (p.pid, p)).collect();
        let mut parents = process::Parents::default();
        let mut files: BTreeMap<FileId, Doubts> = BTreeMap::new();
        for group in groups.iter().filter(|group| !group.leader.is_new()) {
            // Who could not be read is lost already.
            let Some(process) = read.get(&group.leader.pid) else { continue };
            let is_living = |m: &&Member| !m.task.has_exited() && !m.task.is_exiting() && !m.task.is_new();
            let subject = Subject { group, living: group.members.iter().filter(is_living).collect() };
            let mut all = Doubts::default();
            self.check_process(&subject, &machine, &mut parents, &mut all);
            self.check_credentials(&subject, process, groups, &mut all);
            if let Some(id) = process.address_space {
                self.check_address_space(id, &subject, &machine, &mut all);
                if let Some(space) = self.address_spaces.borrow().get(&id) {
                    check_threads(process, &subject, space, &mut all);
                }
            }
            self.check_descriptors(process, &mut all);
            let mapped = process.address_space.into_iter().flat_map(|id| self.mapped_by(id));
            let opened = process.descriptors.iter().map(|d| d.file);
            let mut seen = HashSet::new();
            for id in opened.chain(mapped).filter(|id| seen.insert(*id)) {
                let found = files.entry(id).or_insert_with(|| self.check_file(id, &machine));
                all.0.extend(found.0.iter().cloned());
            }
            self.tell(process.pid, all);
        }
    }

    fn machine(&self, groups: &[Group], processes: &[Process]) -> Machine {
        let mut machine = Machine {
            tasks_change: self.is_task_list_locked(),
            running: HashSet::new(),
            users: HashMap::new(),
            file_users: HashMap::new(),
            page_tables: HashMap::new(),
        };
        let current = &self.cpus().current;
        for member in groups.iter().flat_map(|group| &group.members).filter(|m| m.task.mm != 0) {
            machine.users.entry(member.task.mm).or_default().push(member.addr);
            if current.contains_key(&member.addr) || member.task.on_cpu != 0 {
                machine.running.insert(member.task.mm);
            }
        }
        // A table that several processes share has one reference for each of its descriptors.
        let mut tables = HashSet::new();
        let own = processes.iter().filter(|p| p.files_id != 0 && tables.insert(p.files_id));
        let opened = own.flat_map(|p| p.descriptors.iter().map(|d| d.file));
        // Where mappings are in doubt, that they use a file must not be held against the file.
        let doubted = self.memory_doubts.borrow();
        let spaces = self.address_spaces.borrow();
        let sound = spaces.keys().filter(|id| !doubted.contains_key(id));
        for id in opened.chain(sound.flat_map(|id| self.mapped_by(*id))) {
            *machine.file_users.entry(id.0).or_default() += 1;
        }
        drop((doubted, spaces));
        machine.page_tables = self.check_all_page_tables(&machine);
        machine
    }

    /// The files that an address space has mapped, once for each mapping, and its program.
    fn mapped_by(&self, id: AddressSpaceId) -> Vec<FileId> {
        let spaces = self.address_spaces.borrow();
        // Of a process that executes another program only that program is known, and not by a pointer of the kernel's.
        let Some(space) = spaces.get(&id).filter(|space| !space.vmas.is_empty()) else { return Vec::new() };
        let mapped = space.vmas.iter().filter_map(|vma| match vma.kind {
            VmaKind::File { file, .. } => Some(file),
            _ => None,
        });
        mapped.chain(space.exe).collect()
    }

    fn tell(&self, pid: Pid, doubts: Doubts) {
        let count = doubts.0.len();
        for Doubt { severity, kind, object, address, text } in doubts.0.into_iter().take(MAX_PER_PROCESS) {
            self.note(Finding {
                kind,
                address: Some(address),
                ..Finding::new(severity, Some(pid), object, text)
            });
        }
        if count > MAX_PER_PROCESS {
            let text = format!("{} more contradictions", count - MAX_PER_PROCESS);
            self.note(Finding::new(Severity::Note, Some(pid), "process", text));
        }
    }

    /// The outcome of a check that may not be possible: nothing if this kernel lacks what it compares, a doubt if what it needs cannot
    /// be read.
    pub(crate) fn outcome(
        &self,
        result: Result<()>,
        kind: FindingKind,
        object: &'static str,
        address: u64,
        doubts: &mut Doubts,
    ) {
        use ktypes::Error as E;
        match result {
            Ok(()) => {}
            Err(Error::Kernel(
                error @ (E::MissingType { .. }
                | E::MissingMember { .. }
                | E::MissingSymbol { .. }
                | E::MissingEnumerator { .. }
                | E::WrongSize { .. }
                | E::NotAStruct { .. }),
            )) => {
                let text = format!("a cross-check is left out: {error}");
                self.note(Finding { kind, ..Finding::new(Severity::Note, None, object, text) });
            }
            Err(error) => doubts.doubt(kind, object, address, error.to_string()),
        }
    }

    /// Whether a lock (spinlock, or the first word of another) is held; `false` if that cannot be told.
    pub(crate) fn is_word_set(&self, lock: u64) -> bool {
        lock >> 63 != 0 && self.kernel.read_u32(lock).is_ok_and(|value| value != 0)
    }
}
