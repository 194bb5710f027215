//! Whom the processes have to do with: an index from what can be shared to who has it, made once.

use std::collections::{BTreeMap, BTreeSet};

use snapshot::{FileId, FileKind, Pid, PipeEnd, PipeId, Process, Snapshot, TtyId, UnixId};

/// Who has what.
pub(crate) struct Company<'a> {
    pub(crate) snapshot: &'a Snapshot,
    comes_back: &'a BTreeSet<Pid>,
    files: BTreeMap<FileId, Vec<&'a Process>>,
    pipes: BTreeMap<(PipeId, PipeEnd), Vec<&'a Process>>,
    ttys: BTreeMap<TtyId, Vec<&'a Process>>,
    /// The sockets at which connections wait to be accepted.
    listeners: BTreeMap<UnixId, UnixId>,
    directories: BTreeMap<u64, Vec<&'a Process>>,
    children: BTreeMap<Pid, Vec<&'a Process>>,
}

/// Those who had something: who comes back, and who does not.
pub(crate) struct Holders<'a> {
    pub(crate) back: Vec<&'a Process>,
    pub(crate) gone: Vec<&'a Process>,
}

impl Holders<'_> {
    /// For people: `12 (cat), 13 (sh)`.
    pub(crate) fn names_of_gone(&self) -> String {
        let names: Vec<String> = self.gone.iter().map(|p| format!("{} ({})", p.pid, p.comm)).collect();
        names.join(", ")
    }
}

impl<'a> Company<'a> {
    pub(crate) fn new(snapshot: &'a Snapshot, comes_back: &'a BTreeSet<Pid>) -> Self {
        let mut company = Self {
            snapshot,
            comes_back,
            files: BTreeMap::new(),
            pipes: BTreeMap::new(),
            ttys: BTreeMap::new(),
            listeners: BTreeMap::new(),
            directories: BTreeMap::new(),
            children: BTreeMap::new(),
        };
        for (id, socket) in &snapshot.unix_sockets {
            company.listeners.extend(socket.waiting.iter().map(|waiting| (*waiting, *id)));
        }
        for process in &snapshot.processes {
            company.children.entry(process.ppid).or_default().push(process);
            if process.fs.id != 0 {
                company.directories.entry(process.fs.id).or_default().push(process);
            }
            let own: BTreeSet<FileId> = process.descriptors.iter().map(|d| d.file).collect();
            for file in &own {
                match snapshot.files.get(file).map(|f| &f.kind) {
                    Some(FileKind::Pipe { pipe, end }) => add(&mut company.pipes, (*pipe, *end), process),
                    Some(FileKind::Tty { tty }) => add(&mut company.ttys, *tty, process),
                    _ => {}
                }
            }
            let held: BTreeSet<FileId> = own.iter().flat_map(|file| snapshot.held_by(*file)).collect();
            for file in own.union(&held) {
                add(&mut company.files, *file, process);
            }
        }
        company
    }

    fn sort(&self, holders: impl IntoIterator<Item = &'a Process>) -> Holders<'a> {
        let (back, gone) = holders.into_iter().partition(|p| self.comes_back(p.pid));
        Holders { back, gone }
    }

    pub(crate) fn comes_back(&self, pid: Pid) -> bool {
        self.comes_back.contains(&pid)
    }

    /// Of an open file: as a descriptor, or on its way through a socket of theirs.
    pub(crate) fn of_file(&self, file: FileId) -> Holders<'a> {
        self.sort(self.files.get(&file).into_iter().flatten().copied())
    }

    /// Of one of a pipe's ends; who has opened a FIFO for both has each.
    pub(crate) fn of_pipe(&self, pipe: PipeId, end: PipeEnd) -> Holders<'a> {
        let ends = [end, PipeEnd::Both].into_iter().filter_map(|end| self.pipes.get(&(pipe, end)));
        self.sort(ends.flatten().copied())
    }

    pub(crate) fn of_tty(&self, tty: TtyId) -> Holders<'a> {
        self.sort(self.ttys.get(&tty).into_iter().flatten().copied())
    }

    pub(crate) fn children(&self, pid: Pid) -> Holders<'a> {
        self.sort(self.children.get(&pid).into_iter().flatten().copied())
    }

    /// Who shares the working directory and umask of a process (CLONE_FS).
    pub(crate) fn of_directory(&self, process: &Process) -> Holders<'a> {
        let all = self.directories.get(&process.fs.id).into_iter().flatten().copied();
        self.sort(all.filter(|other| other.pid != process.pid))
    }

    /// The socket at which a connection waits to be accepted.
    pub(crate) fn listener(&self, waiting: UnixId) -> Option<UnixId> {
        self.listeners.get(&waiting).copied()
    }
}

fn add<'a, K: Ord>(to: &mut BTreeMap<K, Vec<&'a Process>>, key: K, process: &'a Process) {
    to.entry(key).or_default().push(process);
}
