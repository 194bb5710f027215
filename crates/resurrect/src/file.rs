//! Open files: each open file description is made once, here, and handed to the processes by inheritance, so that what was shared
//! between descriptors and processes is shared again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use snapshot::{
    Bytes, Descriptor, FileId, FileKind, Inode, InodeId, MAX_DESCRIPTOR, OpenFile, PhysMem, Pid, PipeId,
    ProcFile, Process, RECENT_SECONDS, Reason, Snapshot, TtyId, VmaKind,
};

use crate::inject::{Call, call};
use crate::names::{self, Reconciled};
use crate::namespace::Namespaces;
use crate::{
    FileStale, FileWritten, autofs, clock, dead, epoll, eventfd, inet, inotify, lost_found, memfd, netlink,
    page_cache, pidfd, pipe, proc, pty, signalfd, sys, timerfd, tty, unix,
};

/// Flags that only mean something to the open call itself.
const CREATION_FLAGS: i32 = libc::O_CREAT
    | libc::O_EXCL
    | libc::O_NOCTTY
    | libc::O_TRUNC
    | libc::O_CLOEXEC
    | libc::O_TMPFILE & !libc::O_DIRECTORY;
/// Flags that fcntl(F_SETFL) changes.
const STATUS_FLAGS: i32 =
    libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME | libc::O_ASYNC;

/// What has become of files and directories that had changed.
pub(crate) type WrittenBack = BTreeMap<InodeId, Result<page_cache::Restored, String>>;
/// Files that have lost their names lately, open.
pub(crate) type Held = BTreeMap<InodeId, File>;

/// What is made before files are opened.
#[derive(Default)]
pub(crate) struct Prepared {
    pub(crate) inodes: WrittenBack,
    pub(crate) held: Held,
    /// Where files of other mount namespaces are.
    pub(crate) namespaces: Namespaces,
    /// Pipes that have been made already.
    pub(crate) pipes: autofs::Pipes,
    /// Files that cannot be opened become dead ones.
    pub(crate) with_dead: bool,
}

/// The open files of all processes that come back, and why some could not be opened.
#[derive(Default)]
pub(crate) struct Files {
    pub(crate) namespaces: Namespaces,
    with_dead: bool,
    /// Those that stand in for what could not be rebuilt.
    dead: BTreeSet<FileId>,
    /// Lowest descriptor that is ours: above every number that a process uses.
    pub(crate) base: RawFd,
    open: BTreeMap<FileId, Result<OwnedFd, Reason>>,
    /// Files about processes: opened when those exist ([`Files::open_late`]). Until then, something else is under their numbers.
    late: BTreeSet<FileId>,
    /// Those about somebody who is not there.
    of_nobody: BTreeSet<FileId>,
    /// A pidfd of this program, through which its children get such files.
    own_pidfd: Option<OwnedFd>,
    pipes: BTreeMap<PipeId, Result<pipe::Opened, String>>,
    ttys: BTreeMap<TtyId, Result<tty::Restored, String>>,
    ptys: pty::Pairs,
    inodes: WrittenBack,
    /// Files without a name, each made once.
    unnamed: BTreeMap<InodeId, Result<File, Reason>>,
    /// What is different for whoever has a file.
    losses: BTreeMap<FileId, Vec<Reason>>,
}

/// What a process needs open: its descriptors, mappings and executable.
pub(crate) fn needed<'a>(
    snapshot: &'a Snapshot,
    process: &'a Process,
) -> impl Iterator<Item = (FileId, String)> + 'a {
    let mm = process.address_space.and_then(|id| snapshot.address_spaces.get(&id));
    let descriptors = process.descriptors.iter().map(|d| (d.file, format!("descriptor {}", d.fd)));
    let mapped = mm.into_iter().flat_map(|mm| &mm.vmas).filter_map(|v| match v.kind {
        VmaKind::File { file, .. } => Some((file, format!("mapping {:x}-{:x}", v.start, v.end))),
        _ => None,
    });
    let exe = mm.and_then(|mm| mm.exe).map(|id| (id, "its executable".to_owned()));
    descriptors.chain(mapped).chain(exe)
}

/// `files` and all that they hold, directly or through others.
fn with_held(snapshot: &Snapshot, files: impl Iterator<Item = FileId>) -> BTreeSet<FileId> {
    let mut all = BTreeSet::new();
    let mut todo: Vec<FileId> = files.collect();
    while let Some(id) = todo.pop() {
        if all.insert(id) {
            todo.extend(snapshot.held_by(id));
        }
    }
    all
}

/// Terminals that are open or control a session.
fn terminals(snapshot: &Snapshot, ids: &BTreeSet<FileId>, processes: &[&Process]) -> BTreeSet<TtyId> {
    let open = ids.iter().filter_map(|id| match snapshot.files.get(id)?.kind {
        FileKind::Tty { tty } => Some(tty),
        _ => None,
    });
    open.chain(processes.iter().filter_map(|p| p.ctty)).collect()
}

/// Descriptor numbers that are part of what epoll instances watch.
fn watched_numbers(snapshot: &Snapshot, ids: &BTreeSet<FileId>) -> impl Iterator<Item = RawFd> {
    let kinds = ids.iter().filter_map(|id| Some(&snapshot.files.get(id)?.kind));
    let epolls = kinds.filter_map(|kind| if let FileKind::Epoll(epoll) = kind { Some(epoll) } else { None });
    epolls.flat_map(|epoll| &epoll.items).map(|item| item.fd).filter(|fd| (0..MAX_DESCRIPTOR).contains(fd))
}

/// Whether a process has a file open or mapped.
pub(crate) fn uses_inode(snapshot: &Snapshot, process: &Process, inode: InodeId) -> bool {
    needed(snapshot, process).any(|(id, _)| snapshot.files.get(&id).is_some_and(|f| f.inode == inode))
}

impl Files {
    /// Opens what `processes` need.
    pub(crate) fn open(
        snapshot: &Snapshot,
        processes: &[&Process],
        mem: &dyn PhysMem,
        base: RawFd,
        prepared: Prepared,
    ) -> Self {
        let ids = with_held(snapshot, processes.iter().flat_map(|p| needed(snapshot, p)).map(|(id, _)| id));
        let Prepared { inodes, held, namespaces, pipes, with_dead } = prepared;
        let unnamed = held.into_iter().map(|(id, file)| (id, Ok(file))).collect();
        let mut files = Self { base, inodes, unnamed, namespaces, pipes, with_dead, ..Self::default() };
        files.ptys = pty::Pairs::make(snapshot, &terminals(snapshot, &ids, processes), files.base);
        for id in ids {
            let opened = match snapshot.files.get(&id) {
                file if snapshot.dead_files.contains(&id) => files.make_dead(id, file),
                Some(file) if is_late(file) => files.reserve_late(id),
                Some(file) => files.open_one(snapshot, file, mem),
                None => Err(Reason::new("descriptor", "it is not in the snapshot")),
            };
            files.open.insert(id, opened);
        }
        files.connect(snapshot, mem);
        files.watch(snapshot);
        files.bury(snapshot, processes);
        files
    }

    /// The lowest number that is above all that `processes` use, within fs.nr_open: each process is made with a table up to there. The limit
    /// on descriptors of this program is raised so that all that it opens for them lies above.
    pub(crate) fn lowest_own(snapshot: &Snapshot, processes: &[&Process]) -> Result<RawFd, Errno> {
        let ids = with_held(snapshot, processes.iter().flat_map(|p| needed(snapshot, p)).map(|(id, _)| id));
        let used = processes.iter().flat_map(|p| &p.descriptors).map(|d| d.fd);
        let highest = used.chain(watched_numbers(snapshot, &ids)).max().unwrap_or(0);
        let base = (highest + 1).max(500);
        let spaces = processes.iter().filter_map(|p| snapshot.address_spaces.get(p.address_space.as_ref()?));
        let shared: BTreeSet<InodeId> = spaces
            .flat_map(|mm| &mm.vmas)
            .filter_map(|vma| match vma.kind {
                VmaKind::SharedAnonymous { inode, .. } => Some(inode),
                _ => None,
            })
            .collect();
        // A file without a name has a second one; one for the memory of each process; two for each pipe and each namespace.
        let count = 1
            + 2 * ids.len()
            + shared.len()
            + snapshot.ipc.shm.len()
            + 2 * (snapshot.pipes.len() + snapshot.mount_namespaces.len() + snapshot.uts_namespaces.len())
            + snapshot.unix_sockets.len()
            + processes.len();
        make_room(base as u64 + count as u64 + 64)?;
        Ok(base)
    }

    fn make_dead(&mut self, id: FileId, file: Option<&OpenFile>) -> Result<OwnedFd, Reason> {
        let fd = dead::restore(file).and_then(|fd| sys::lift(fd, self.base));
        self.dead.insert(id);
        fd.map_err(|e| Reason::new("descriptor", format!("a dead descriptor: {e}")))
    }

    /// What could not be opened becomes dead, if that is asked for, unless programs or mappings need it.
    fn bury(&mut self, snapshot: &Snapshot, processes: &[&Process]) {
        if !self.with_dead {
            return;
        }
        let failed: Vec<(FileId, Reason)> =
            self.open.iter().filter_map(|(id, opened)| Some((*id, opened.as_ref().err()?.clone()))).collect();
        let descriptors = |p: &Process| p.descriptors.iter().map(|d| d.file).collect::<Vec<_>>();
        for (id, reason) in failed {
            let users = processes.iter().filter(|p| descriptors(p).contains(&id));
            let is_needed_otherwise = |p: &&&Process| {
                needed(snapshot, p).filter(|(file, _)| *file == id).count()
                    > p.descriptors.iter().filter(|d| d.file == id).count()
            };
            if users.clone().next().is_none() || users.clone().any(|p| is_needed_otherwise(&p)) {
                continue;
            }
            let file = snapshot.files.get(&id);
            let dead = self.make_dead(id, file);
            self.open.insert(id, dead);
            let path = file.map(|file| file.path.to_string()).unwrap_or_default();
            let text = format!(
                "{path} could not be opened ({}); it answers with errors and the end of the file from now on",
                reason.text
            );
            self.losses.entry(id).or_default().push(Reason::new("dead-descriptor", text));
        }
    }

    /// Whether it stands in for what could not be rebuilt.
    pub(crate) fn is_dead(&self, id: FileId) -> bool {
        self.dead.contains(&id)
    }

    /// All numbers under which something is open for processes.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.open.keys().filter_map(|id| self.number(*id))
    }

    /// What needs several files to be open: contents of sockets that hold open files, and the like.
    fn connect(&mut self, snapshot: &Snapshot, mem: &dyn PhysMem) {
        let numbers = self.open.iter().filter_map(|(id, fd)| Some((*id, fd.as_ref().ok()?.as_raw_fd())));
        let made =
            unix::make_all(snapshot, mem, self.base, &numbers.collect(), &|id| self.namespaces.root(id));
        self.losses.extend(made.losses);
        for (id, why) in made.failed {
            self.open.insert(id, Err(Reason::new("socket", why)));
        }
        for (id, fd) in &mut self.open {
            let is_unix = |file: &&OpenFile| matches!(file.kind, FileKind::Unix { .. });
            let (Some(file), Ok(socket)) = (snapshot.files.get(id).filter(is_unix), &fd) else { continue };
            if let Err(e) = set_status_flags(socket, file) {
                *fd = Err(Reason::new("descriptor", format!("F_SETFL: {e}")));
            }
        }
    }

    /// Lets inotify instances watch, when all has been made that they could notice.
    fn watch(&mut self, snapshot: &Snapshot) {
        let created = self.inodes.iter().filter(|(_, r)| r.as_ref().is_ok_and(|r| r.created));
        let created: BTreeSet<_> =
            created.filter_map(|(id, _)| Some(snapshot.inodes.get(id)?.path.clone())).collect();
        for (id, opened) in &mut self.open {
            let Some(FileKind::Inotify(state)) = snapshot.files.get(id).map(|file| &file.kind) else {
                continue;
            };
            let Some(fd) = opened.as_ref().ok().filter(|_| !self.dead.contains(id)) else { continue };
            match inotify::watch(fd.as_fd(), state, &|path| created.contains(path), self.with_dead) {
                Ok(gone) => {
                    let text = |why| format!("its inotify instance is told that a watch has gone: {why}");
                    let losses = gone.into_iter().map(|why| Reason::new("inotify", text(why)));
                    self.losses.entry(*id).or_default().extend(losses);
                }
                Err(why) => *opened = Err(Reason::new("inotify", why)),
            }
        }
    }

    /// Keeps a number for a file about a process that is still to be made.
    fn reserve_late(&mut self, id: FileId) -> Result<OwnedFd, Reason> {
        let io = |e: Errno| Reason::new("descriptor", format!("keep its number: {e}"));
        if self.own_pidfd.is_none() {
            let own = pidfd::open(nix::unistd::getpid().as_raw(), 0).map_err(io)?;
            self.own_pidfd = Some(sys::lift(own, self.base).map_err(io)?);
        }
        let reserved = sys::open(Path::new("/dev/null"), libc::O_RDONLY, 0).map_err(io)?;
        self.late.insert(id);
        sys::lift(reserved, self.base).map_err(io)
    }

    /// Opens the files about processes, now that all processes are there. `exists`: whether a process that comes back is.
    /// A file that cannot be opened is gone from its number: whoever fetches it fails.
    pub(crate) fn open_late(&mut self, snapshot: &Snapshot, exists: &dyn Fn(Pid) -> bool) {
        let mut failed = Vec::new();
        for id in std::mem::take(&mut self.late) {
            let (Some(file), Some(Ok(reserved))) = (snapshot.files.get(&id), self.open.get(&id)) else {
                continue;
            };
            let number = reserved.as_raw_fd();
            let flags = file.flags & !CREATION_FLAGS;
            let mut nobody = None;
            let opened = match &file.kind {
                FileKind::PidFd(pidfd) => pidfd::restore(pidfd, exists(pidfd.pid)),
                FileKind::Proc(ProcFile { task: Some(task), gone }) if *gone || !exists(*task) => {
                    self.of_nobody.insert(id);
                    proc::open_of_nobody(file.path.as_path(), flags | libc::O_NOCTTY).map(|(fd, process)| {
                        nobody = Some(process);
                        fd
                    })
                }
                _ => match self.namespaces.place(file) {
                    Ok(path) => sys::open(&path, flags | libc::O_NOCTTY, 0),
                    Err(_) => Err(Errno::ENOENT),
                },
            };
            let done = opened.map_err(|e| Reason::new("descriptor", format!("open: {e}"))).and_then(|fd| {
                let fd = if file.flags & libc::O_PATH == 0 { self.seek(fd, file)? } else { fd };
                let io = |what: &str, e: Errno| Reason::new("descriptor", format!("{what}: {e}"));
                if file.flags & libc::O_PATH == 0 {
                    set_status_flags(&fd, file).map_err(|e| io("F_SETFL", e))?;
                }
                sys::dup3(fd.as_raw_fd(), number, true).map_err(|e| io("dup", e))
            });
            // It has to be there up to here: a position is looked for by reading.
            drop(nobody);
            if let Err(reason) = done {
                failed.push((id, number, reason));
            }
        }
        for (id, number, reason) in failed {
            let stand_in = dead::restore(snapshot.files.get(&id)).ok().filter(|_| self.with_dead);
            match stand_in.map(|fd| sys::dup3(fd.as_raw_fd(), number, true)) {
                Some(Ok(())) => {
                    self.dead.insert(id);
                    let text = format!(
                        "{}; it answers with errors and the end of the file from now on",
                        reason.text
                    );
                    self.losses.entry(id).or_default().push(Reason::new("dead-descriptor", text));
                }
                _ => _ = self.open.insert(id, Err(reason)),
            }
        }
    }

    /// Whether it is a file about somebody who is not there.
    pub(crate) fn is_of_nobody(&self, id: FileId) -> bool {
        self.of_nobody.contains(&id)
    }

    /// A file of this program for the calling child: under which number it is, and through which pidfd it is to be fetched if it was
    /// not there yet when the child was made.
    pub(crate) fn inherited(&self, id: FileId) -> Option<(RawFd, Option<RawFd>)> {
        let own = self.own_pidfd.as_ref().map(AsRawFd::as_raw_fd);
        Some((self.number(id)?, own.filter(|_| self.late.contains(&id))))
    }

    /// Whether it is a terminal that was hung up since it was opened: nobody can use it any more.
    pub(crate) fn is_hung_up(&self, snapshot: &Snapshot, id: FileId) -> bool {
        let is_tty = snapshot.files.get(&id).is_some_and(|file| matches!(file.kind, FileKind::Tty { .. }));
        let Some(Ok(file)) = self.open.get(&id).filter(|_| is_tty) else { return false };
        nix::sys::termios::tcgetattr(file).is_err_and(|errno| errno == Errno::EIO)
    }

    /// The descriptor under which a file is open here and in all children. Files about processes are not before
    /// [`Files::open_late`].
    pub(crate) fn fd(&self, id: FileId) -> Option<RawFd> {
        if self.late.contains(&id) { None } else { self.number(id) }
    }

    /// What is open here.
    pub(crate) fn opened(&self) -> impl Iterator<Item = (FileId, RawFd)> + '_ {
        self.open.keys().filter_map(|id| Some((*id, self.fd(*id)?)))
    }

    /// Lets the timers run, as the clocks do since `clocks_go_on`.
    pub(crate) fn start_timers(&mut self, snapshot: &Snapshot, clocks_go_on: &clock::GoOn) {
        for (id, opened) in &mut self.open {
            if let Some(FileKind::TimerFd(state)) = snapshot.files.get(id).map(|file| &file.kind)
                && let Ok(fd) = opened
                && let Err(e) = timerfd::start(fd.as_fd(), state, clocks_go_on)
            {
                *opened = Err(Reason::new("timerfd", format!("start it: {e}")));
            }
        }
    }

    fn number(&self, id: FileId) -> Option<RawFd> {
        self.open.get(&id)?.as_ref().ok().map(AsRawFd::as_raw_fd)
    }

    /// Why what the process needs could not be opened; empty if all is there.
    pub(crate) fn failures(&self, snapshot: &Snapshot, process: &Process) -> Vec<Reason> {
        let mut reasons: Vec<Reason> = Vec::new();
        if let Some(why) = process.ctty.and_then(|id| self.ptys.failure(snapshot, id)) {
            reasons.push(Reason::new("terminal", format!("its controlling terminal: {why}")));
        }
        for (id, what) in needed(snapshot, process) {
            if let Some(Err(reason)) = self.open.get(&id) {
                let path = snapshot.files.get(&id).map(|f| f.path.to_string()).unwrap_or_default();
                reasons.push(Reason::new(&reason.code, format!("{what} ({path}): {}", reason.text)));
            }
        }
        reasons
    }

    /// Files that could not be brought up to date: what the disk has of them is older, or nothing.
    pub(crate) fn stale(&self, snapshot: &Snapshot) -> Vec<FileStale> {
        let failed = self.inodes.iter().filter_map(|(id, r)| Some((id, r.as_ref().err()?)));
        let stale = |(id, why): (&InodeId, &String)| {
            Some(FileStale { path: snapshot.inodes.get(id)?.path.clone(), why: why.clone() })
        };
        failed.filter_map(stale).collect()
    }

    /// Files that had news in the dead page cache.
    pub(crate) fn written(&self, snapshot: &Snapshot) -> Vec<FileWritten> {
        let done = self.inodes.iter().filter_map(|(id, r)| Some((id, r.as_ref().ok()?)));
        done.filter(|(_, r)| r.created || r.resized || r.written > 0)
            .filter_map(|(id, r)| {
                let path = snapshot.inodes.get(id)?.path.clone();
                Some(FileWritten { path, bytes: r.written, created: r.created })
            })
            .collect()
    }

    /// What is different for this process although all its files are open.
    pub(crate) fn losses(&self, snapshot: &Snapshot, process: &Process) -> Vec<Reason> {
        let ttys: BTreeSet<TtyId> = process
            .descriptors
            .iter()
            .filter_map(|d| match snapshot.files.get(&d.file)?.kind {
                FileKind::Tty { tty } => Some(tty),
                _ => None,
            })
            .collect();
        let of_ttys =
            ttys.iter().filter_map(|id| self.ttys.get(id)?.as_ref().ok()).flat_map(|tty| tty.losses.clone());
        let of_ttys = of_ttys.chain(ttys.iter().flat_map(|id| self.ptys.losses(snapshot, *id)));
        let own: BTreeSet<FileId> = process.descriptors.iter().map(|d| d.file).collect();
        let of_files = own.iter().filter_map(|id| self.losses.get(id)).flatten().cloned();
        of_ttys.chain(of_files).collect()
    }

    fn open_one(
        &mut self,
        snapshot: &Snapshot,
        file: &OpenFile,
        mem: &dyn PhysMem,
    ) -> Result<OwnedFd, Reason> {
        let io = |what: &str, e: Errno| Reason::new("descriptor", format!("{what}: {e}"));
        let place = self.namespaces.place(file).map_err(|why| Reason::new("descriptor", why))?;
        let path = place.as_path();
        let flags = file.flags & !CREATION_FLAGS;
        let fd = match &file.kind {
            FileKind::Regular | FileKind::Memfd { .. } if file.deleted => {
                let fd = self.open_unnamed(snapshot, file, flags, mem)?;
                self.seek(fd, file)?
            }
            FileKind::Memfd { .. } => return Err(Reason::new("file", "a memory file with a name")),
            FileKind::Regular => {
                self.bring_up_to_date(snapshot, file, path, mem)?;
                let fd = sys::open(path, flags | libc::O_NOCTTY, 0).map_err(|e| io("open", e))?;
                self.seek(fd, file)?
            }
            FileKind::Directory => {
                // Beforehand, as the flags stay with the open file.
                let is_directory = libc::O_PATH | libc::O_DIRECTORY | flags & libc::O_NOFOLLOW;
                sys::open(path, is_directory, 0).map_err(|e| io("open", e))?;
                let fd = sys::open(path, flags, 0).map_err(|e| io("open", e))?;
                self.seek(fd, file)?
            }
            FileKind::Path => sys::open(path, flags | libc::O_PATH, 0).map_err(|e| io("open", e))?,
            FileKind::CharDevice { major, minor } => {
                let fd = sys::open(path, flags | libc::O_NOCTTY | libc::O_NONBLOCK, 0)
                    .map_err(|e| io("open", e))?;
                verify_device(path, *major, *minor)?;
                fd
            }
            FileKind::Device(device) => {
                let fd = sys::open(path, flags | libc::O_NOCTTY | libc::O_NONBLOCK, 0)
                    .map_err(|e| io("open", e))?;
                verify_device(path, device.major, device.minor)?;
                fd
            }
            FileKind::Pipe { pipe, end } => {
                let base = self.base;
                let opened = self.pipes.entry(*pipe).or_insert_with(|| {
                    let contents = snapshot.pipes.get(pipe).ok_or("it is not in the snapshot")?;
                    pipe::Opened::new(contents, Some(path), mem, base)
                });
                let pipe = opened.as_mut().map_err(|why| Reason::new("pipe", why.clone()))?;
                pipe.end(*end, base).map_err(|why| Reason::new("pipe", why))?
            }
            FileKind::Tty { tty: id } => {
                let tty = snapshot.ttys.get(id);
                let tty = tty.ok_or_else(|| Reason::new("terminal", "it is not in the snapshot"))?;
                let base = self.base;
                if let Some(opened) = self.ptys.open(snapshot, *id, flags) {
                    let fd = opened.map_err(|why| Reason::new("terminal", why))?;
                    let fd = sys::lift(fd, base).map_err(|e| io("dup", e))?;
                    set_status_flags(&fd, file).map_err(|e| io("F_SETFL", e))?;
                    return Ok(fd);
                }
                let restored = self.ttys.entry(*id).or_insert_with(|| tty::restore(tty, base));
                restored.as_ref().map_err(|why| Reason::new("terminal", why.clone()))?;
                if file.path.as_path() == Path::new("/dev/console") {
                    sys::open(path, flags | libc::O_NOCTTY | libc::O_NONBLOCK, 0)
                } else {
                    tty::open(tty, flags)
                }
                .map_err(|e| Reason::new("terminal", format!("open: {e}")))?
            }
            FileKind::HungUpTty => pty::hung_up(flags).map_err(|e| io("a terminal that is hung up", e))?,
            FileKind::Epoll(_) => epoll::restore().map_err(|e| io("epoll_create", e))?,
            FileKind::EventFd(state) => eventfd::restore(state).map_err(|e| io("eventfd", e))?,
            FileKind::TimerFd(state) => timerfd::restore(state).map_err(|e| io("timerfd_create", e))?,
            FileKind::SignalFd(state) => signalfd::restore(state).map_err(|e| io("signalfd", e))?,
            FileKind::Proc(_) => {
                let fd = sys::open(path, flags | libc::O_NOCTTY, 0).map_err(|e| io("open", e))?;
                if flags & libc::O_PATH == 0 { self.seek(fd, file)? } else { fd }
            }
            FileKind::Namespace(namespace) => {
                proc::open_namespace(namespace, flags).map_err(|e| io("open", e))?
            }
            FileKind::Inotify(_) => inotify::create().map_err(|e| io("inotify_init", e))?,
            FileKind::PidFd(_) => return Err(Reason::new("descriptor", "its process is not there yet")),
            FileKind::Inet(state) => inet::restore(state).map_err(|why| Reason::new("socket", why))?,
            FileKind::Netlink(state) => netlink::restore(state).map_err(|why| Reason::new("socket", why))?,
            // Unix sockets are made when all files are there.
            FileKind::Unix { .. } => {
                return unix::placeholder(self.base).map_err(|e| io("placeholder", e));
            }
            FileKind::Unsupported { what } => return Err(Reason::new("descriptor", what.clone())),
        };
        let fd = sys::lift(fd, self.base).map_err(|e| io("dup", e))?;
        if file.flags & libc::O_PATH == 0 {
            set_status_flags(&fd, file).map_err(|e| io("F_SETFL", e))?;
        }
        Ok(fd)
    }

    fn bring_up_to_date(
        &mut self,
        snapshot: &Snapshot,
        file: &OpenFile,
        path: &Path,
        mem: &dyn PhysMem,
    ) -> Result<(), Reason> {
        let inode = snapshot.inodes.get(&file.inode);
        let inode = inode.ok_or_else(|| Reason::new("file", "its inode is not in the snapshot"))?;
        let restored = self.inodes.entry(file.inode).or_insert_with(|| restore(snapshot, path, inode, mem));
        restored.as_ref().map(drop).map_err(|why| Reason::new("file", why.clone()))
    }

    /// Opens a file that has no name, after making it.
    fn open_unnamed(
        &mut self,
        snapshot: &Snapshot,
        file: &OpenFile,
        flags: i32,
        mem: &dyn PhysMem,
    ) -> Result<OwnedFd, Reason> {
        let base = self.base;
        let made = self.unnamed.entry(file.inode).or_insert_with(|| make_unnamed(snapshot, file, mem, base));
        let fd = made.as_ref().map_err(Reason::clone)?.as_raw_fd();
        // O_TMPFILE contains O_DIRECTORY.
        let flags = flags & !(libc::O_NOFOLLOW | libc::O_DIRECTORY);
        sys::open(format!("/proc/self/fd/{fd}").as_ref(), flags, 0)
            .map_err(|e| Reason::new("descriptor", format!("open: {e}")))
    }

    fn seek(&self, fd: OwnedFd, file: &OpenFile) -> Result<OwnedFd, Reason> {
        if file.pos != 0 {
            // SAFETY: numbers only.
            let r = unsafe { libc::lseek(fd.as_raw_fd(), file.pos, libc::SEEK_SET) };
            Errno::result(r).map_err(|e| Reason::new("descriptor", format!("seek: {e}")))?;
        }
        Ok(fd)
    }

    /// Seals that would have hindered mapping. Those who had it mapped writable have it mapped by now.
    pub(crate) fn seal(&self, snapshot: &Snapshot) -> Vec<(InodeId, Errno)> {
        let mut failed = Vec::new();
        let mut done = BTreeSet::new();
        for file in self.open.keys().filter_map(|id| snapshot.files.get(id)) {
            let FileKind::Memfd { seals } = file.kind else { continue };
            let Some(Ok(made)) = self.unnamed.get(&file.inode).filter(|_| done.insert(file.inode)) else {
                continue;
            };
            if let Err(e) = memfd::seal_late(made, seals) {
                failed.push((file.inode, e));
            }
        }
        failed
    }

    /// Sets the receivers of SIGIO, and who is to get it at all. They must exist, hence after the processes are complete.
    pub(crate) fn set_owners(&self, snapshot: &Snapshot) -> Vec<(FileId, Errno)> {
        let mut failed = Vec::new();
        for (id, fd) in self.open.iter().filter_map(|(id, fd)| Some((id, fd.as_ref().ok()?))) {
            let Some(file) = snapshot.files.get(id) else { continue };
            let mut set = |done: Result<i32, Errno>| {
                if let Err(e) = done {
                    failed.push((*id, e));
                }
            };
            let raw = fd.as_raw_fd();
            if file.owner_is_thread {
                set(set_owning_thread(raw, file.owner_pid));
            } else if file.owner_pid != 0 {
                set(sys::fcntl(raw, libc::F_SETOWN, file.owner_pid.into()));
            }
            if file.flags & libc::O_ASYNC != 0 {
                set(sys::fcntl(raw, libc::F_SETFL, (file.flags & STATUS_FLAGS).into()));
            }
            if file.owner_signal != 0 {
                set(sys::fcntl(raw, F_SETSIG, file.owner_signal.into()));
            }
        }
        failed
    }
}

const F_SETSIG: i32 = 10;

/// Raises the limit on descriptor numbers of this program.
fn make_room(wanted: u64) -> Result<(), Errno> {
    let mut limit = sys::prlimit(0, libc::RLIMIT_NOFILE, None)?;
    if limit.rlim_cur < wanted {
        limit.rlim_cur = wanted;
        limit.rlim_max = limit.rlim_max.max(wanted);
        sys::prlimit(0, libc::RLIMIT_NOFILE, Some(limit))?;
    }
    Ok(())
}

/// Whether it can be opened only when a certain process is there.
fn is_late(file: &OpenFile) -> bool {
    match &file.kind {
        FileKind::PidFd(_) => true,
        FileKind::Proc(proc) => proc.task.is_some(),
        _ => false,
    }
}

/// Brings all files and names up to date that the dead kernel had not written, whoever may open them, but names on the
/// way to, and in, the caller's `own` places. Descriptors are `base` or higher.
pub(crate) fn write_back(snapshot: &Snapshot, mem: &dyn PhysMem, base: RawFd, own: &[PathBuf]) -> Reconciled {
    let mut all = Reconciled::default();
    for names in snapshot.names.iter().filter(|names| is_mount_point(names.mountpoint.as_path())) {
        let Some(done) = names::reconcile(snapshot, names, mem, base, own) else {
            if !names.inodes.is_empty() {
                let why = format!(
                    "names and attributes that were changed in the last {RECENT_SECONDS} seconds are as the disk has them: \
                     on this file system inodes cannot be found by number"
                );
                all.stale.push(FileStale { path: names.mountpoint.clone(), why });
            }
            continue;
        };
        all.inodes.extend(done.inodes);
        all.held.extend(done.held);
        all.stale.extend(done.stale);
        all.put += done.put;
        all.removed += done.removed;
    }
    // Those of file systems whose inodes do not last.
    let inodes = snapshot.unwritten.iter().filter(|id| !all.inodes.contains_key(id));
    let mut inodes: Vec<_> = inodes.filter_map(|id| Some((*id, snapshot.inodes.get(id)?))).collect();
    // Directories before what is in them.
    inodes.sort_by(|(_, a), (_, b)| a.path.cmp(&b.path));
    for (id, inode) in inodes {
        all.inodes.insert(id, restore(snapshot, inode.path.as_path(), inode, mem));
    }
    for (id, why) in lost_found::keep(snapshot, mem, Path::new(lost_found::DIRECTORY)) {
        let path = snapshot.inodes.get(&id).map_or_else(Bytes::default, |inode| inode.path.clone());
        all.stale.push(FileStale { path, why: why.clone() });
        all.inodes.insert(id, Err(why));
    }
    all
}

/// Brings one file up to date, unless its file system is not there: then the name would lead to another one.
fn restore(
    snapshot: &Snapshot,
    path: &Path,
    inode: &Inode,
    mem: &dyn PhysMem,
) -> Result<page_cache::Restored, String> {
    let mounts = snapshot.mounts.iter().map(|m| m.mountpoint.as_path()).filter(|m| path.starts_with(m));
    let mount = mounts.max_by_key(|m| m.components().count());
    if let Some(mount) = mount.filter(|m| !is_mount_point(m)) {
        return Err(format!("the file system at {} is not mounted", mount.display()));
    }
    page_cache::restore(path, inode, is_doubtful(snapshot, inode), mem).map_err(|e| e.to_string())
}

/// Whether a file was changed so lately that the disk may not know its contents although they were written.
pub(crate) fn is_doubtful(snapshot: &Snapshot, inode: &Inode) -> bool {
    let now = snapshot.clocks.realtime_ns / 1_000_000_000;
    !inode.lives_in_memory() && inode.mtime.sec.max(inode.ctime.sec) >= now.saturating_sub(RECENT_SECONDS)
}

/// Whether another file system begins at `path` than that of the directory above, or it is the root.
pub(crate) fn is_mount_point(path: &Path) -> bool {
    let device = |p: &Path| std::fs::metadata(p).map(|meta| meta.dev()).ok();
    match path.parent() {
        None => true,
        Some(parent) => device(path).is_some_and(|here| device(parent) != Some(here)),
    }
}

/// Makes a file that has no name. What comes back is not open for writing: a program that is to be run from it must not be.
fn make_unnamed(
    snapshot: &Snapshot,
    file: &OpenFile,
    mem: &dyn PhysMem,
    base: RawFd,
) -> Result<File, Reason> {
    let reason = |why: String| Reason::new("deleted-file", why);
    let inode =
        snapshot.inodes.get(&file.inode).ok_or_else(|| reason("its inode is not in the snapshot".into()))?;
    let made = match file.kind {
        FileKind::Memfd { seals } => memfd::make(&file.path, seals, inode, mem)?,
        _ => {
            page_cache::restore_unnamed(file.path.as_path(), inode, mem).map_err(|e| reason(e.to_string()))?
        }
    };
    let path = format!("/proc/self/fd/{}", made.as_raw_fd());
    let handle = sys::open(path.as_ref(), libc::O_RDONLY, 0).and_then(|fd| sys::lift(fd, base));
    handle.map(File::from).map_err(|e| reason(format!("open: {e}")))
}

fn verify_device(path: &Path, major: u32, minor: u32) -> Result<(), Reason> {
    let same = std::fs::metadata(path).is_ok_and(|m| {
        m.file_type().is_char_device() && (libc::major(m.rdev()), libc::minor(m.rdev())) == (major, minor)
    });
    if same {
        Ok(())
    } else {
        Err(Reason::new("descriptor", format!("no character device {major}:{minor} any more")))
    }
}

fn set_status_flags(fd: &OwnedFd, file: &OpenFile) -> Result<(), Errno> {
    // Signals name the descriptor through which they were asked for: that is the process's to do (`ask_for_signals`).
    let wanted = file.flags & STATUS_FLAGS & !libc::O_ASYNC;
    let now = sys::fcntl(fd.as_raw_fd(), libc::F_GETFL, 0)? & STATUS_FLAGS;
    if now != wanted {
        sys::fcntl(fd.as_raw_fd(), libc::F_SETFL, wanted.into())?;
    }
    Ok(())
}

/// The calls with which a process asks for SIGIO again.
pub(crate) fn ask_for_signals(snapshot: &Snapshot, process: &Process) -> Vec<Call> {
    let flags = |d: &Descriptor| snapshot.files.get(&d.file).map_or(0, |file| file.flags);
    let asked = process.descriptors.iter().filter(|d| flags(d) & libc::O_ASYNC != 0);
    let ask =
        |d: &Descriptor| call!("O_ASYNC", libc::SYS_fcntl, d.fd, libc::F_SETFL, flags(d) & STATUS_FLAGS);
    asked.map(ask).collect()
}

/// F_SETOWN_EX with F_OWNER_TID.
fn set_owning_thread(fd: RawFd, tid: Pid) -> Result<i32, Errno> {
    const F_SETOWN_EX: i32 = 15;
    const F_OWNER_TID: i32 = 0;
    let owner = [F_OWNER_TID, tid];
    // SAFETY: the kernel reads a struct f_owner_ex, two ints.
    Errno::result(unsafe { libc::fcntl(fd, F_SETOWN_EX, owner.as_ptr()) })
}

/// The part of the O_* flags that must be the same again.
pub(crate) fn comparable_flags(flags: i32) -> i32 {
    flags & (libc::O_ACCMODE | STATUS_FLAGS | libc::O_PATH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_told_from_directories() {
        assert!(is_mount_point(Path::new("/")) && is_mount_point(Path::new("/proc")));
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_mount_point(dir.path()) && !is_mount_point(&dir.path().join("missing")));
    }
}
