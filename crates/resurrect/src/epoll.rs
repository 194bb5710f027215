//! epoll instances: each is made empty, and watches again when all files are there.
//!
//! An item's key is the open file and the number under which it was added. So the numbers are taken again for a moment, by a child that shares
//! the open files but not the numbers.

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use snapshot::{Epoll, EpollItem, FileId, FileKind, Pid, Process, Snapshot};

use crate::deadline::Deadline;
use crate::file::Files;
use crate::inject::{Call, call};
use crate::{inject, sys};

/// What one-shot items are armed with to make them fire.
const ANY: u32 = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLPRI | libc::EPOLLRDHUP) as u32;

/// Makes an instance that watches nothing.
pub(crate) fn restore() -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    unsafe { Ok(OwnedFd::from_raw_fd(Errno::result(libc::epoll_create1(libc::EPOLL_CLOEXEC))?)) }
}

/// One instance, and what it can watch: the descriptors here.
struct Instance<'a> {
    id: FileId,
    fd: RawFd,
    items: Vec<Item<'a>>,
}

#[derive(Clone, Copy)]
struct Item<'a> {
    item: &'a EpollItem,
    fd: RawFd,
    /// It becomes ready by what the snapshot says of it, and by nothing that may have happened since.
    is_settled: bool,
}

/// What became of the instances.
#[derive(Default)]
pub(crate) struct Watched {
    /// What they cannot watch: by instance, for people.
    pub(crate) failed: BTreeMap<FileId, Vec<String>>,
    /// Calls that processes have to make themselves, while our files are there: a signal descriptor tells of the signals of whoever
    /// adds it.
    pub(crate) calls: BTreeMap<Pid, Vec<Call>>,
}

/// Lets all instances of `processes` watch.
pub(crate) fn watch(
    snapshot: &Snapshot,
    processes: &[&Process],
    files: &Files,
    deadline: Deadline,
) -> Watched {
    let Watched { mut failed, mut calls } = Watched::default();
    let mut instances = Vec::new();
    for (id, fd, epoll) in files.opened().filter_map(|(id, fd)| Some((id, fd, epoll_of(snapshot, id)?))) {
        let mut items = Vec::new();
        for item in &epoll.items {
            if is_signalfd(snapshot, item.file) {
                match add_by_process(processes, id, fd, item) {
                    Some((pid, call)) => calls.entry(pid).or_default().push(call),
                    None => failed.entry(id).or_default().push(format!("descriptor {}", item.fd)),
                }
                continue;
            }
            match files.fd(item.file).filter(|_| item.obstacle(snapshot).is_none()) {
                Some(fd) => items.push(Item { item, fd, is_settled: is_settled(snapshot, item.file) }),
                // What cannot be watched whatever happens here has been told when it was decided.
                None if item.obstacle(snapshot).is_some() => {}
                None => failed.entry(id).or_default().push(format!("descriptor {}", item.fd)),
            }
        }
        if !items.is_empty() {
            instances.push(Instance { id, fd, items });
        }
    }
    let count = instances.iter().map(|i| i.items.len()).sum();
    if count == 0 {
        return Watched { failed, calls };
    }
    let errors = match in_child(&instances, count, files.base, deadline) {
        Ok(errors) => errors,
        Err(e) => vec![e as i32; count],
    };
    let all = instances.iter().flat_map(|i| i.items.iter().map(|item| (i.id, item)));
    for ((id, item), errno) in all.zip(errors).filter(|(_, errno)| *errno != 0) {
        let text = format!("descriptor {}: {}", item.item.fd, Errno::from_raw(errno));
        failed.entry(id).or_default().push(text);
    }
    Watched { failed, calls }
}

fn is_signalfd(snapshot: &Snapshot, id: FileId) -> bool {
    snapshot.files.get(&id).is_some_and(|f| matches!(f.kind, FileKind::SignalFd(_)))
}

/// The first process that has both, and what it has to do. `fd`: the instance's number here and, for the time being, there.
fn add_by_process(processes: &[&Process], epoll: FileId, fd: RawFd, item: &EpollItem) -> Option<(Pid, Call)> {
    let has = |p: &Process, file: FileId, fd: Option<i32>| {
        p.descriptors.iter().any(|d| d.file == file && fd.is_none_or(|fd| d.fd == fd))
    };
    let process = processes.iter().find(|p| has(p, epoll, None) && has(p, item.file, Some(item.fd)))?;
    // struct epoll_event is packed.
    let event = [&item.events.to_ne_bytes()[..], &item.data.to_ne_bytes()].concat();
    let what = format!("watch descriptor {}", item.fd);
    let call = call!(what, libc::SYS_epoll_ctl, fd, libc::EPOLL_CTL_ADD, item.fd, event);
    Some((process.pid, call.optional()))
}

fn epoll_of(snapshot: &Snapshot, id: FileId) -> Option<&Epoll> {
    match &snapshot.files.get(&id)?.kind {
        FileKind::Epoll(epoll) => Some(epoll),
        _ => None,
    }
}

fn is_settled(snapshot: &Snapshot, id: FileId) -> bool {
    let kind = snapshot.files.get(&id).map(|f| &f.kind);
    !matches!(
        kind,
        None | Some(
            FileKind::TimerFd(_)
                | FileKind::SignalFd(_)
                | FileKind::PidFd(_)
                | FileKind::Inotify(_)
                | FileKind::Epoll(_)
                | FileKind::Proc(_)
        )
    )
}

/// Runs [`Instance::watch`] for all in a child; the error of each item, 0 for none.
fn in_child(
    instances: &[Instance<'_>],
    count: usize,
    base: RawFd,
    deadline: Deadline,
) -> Result<Vec<i32>, Errno> {
    let len = count * size_of::<i32>();
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let shared = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
    if shared == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    // SAFETY: the mapping has room for as many numbers, all zero; child and parent use it one after the other.
    let results = unsafe { std::slice::from_raw_parts_mut(shared.cast::<i32>(), count) };
    results.fill(Errno::ECANCELED as i32);
    let done = sys::fork(0, 0, libc::SIGCHLD).and_then(|child| {
        if child == 0 {
            // Only numbers above are needed: nobody's but ours.
            let cleared = sys::close_range(0, base as u32 - 1);
            let mut results = results.iter_mut();
            for instance in instances.iter().filter(|_| cleared.is_ok()) {
                instance.watch(&mut results);
            }
            sys::exit(0);
        }
        inject::wait(child, deadline)
    });
    let results = results.to_vec();
    // SAFETY: mapped above; the slice is not used any more.
    unsafe { libc::munmap(shared, len) };
    done.map(|_| results)
}

impl Instance<'_> {
    /// Adds all items; the order makes what had been reported stay reported.
    fn watch<'r>(&self, results: &mut impl Iterator<Item = &'r mut i32>) {
        let mut slots: Vec<(Item<'_>, &mut i32)> = self.items.iter().copied().zip(results).collect();
        // One-shot items that have fired fire again, unseen. Those that find nothing to fire for now keep waiting for errors.
        for (item, slot) in slots.iter_mut().filter(|(item, _)| item.item.is_disarmed()) {
            let now = item.ready_events();
            let arm = if now != 0 { item.item.events | ANY } else { item.item.events };
            **slot = code(self.control(item, arm));
        }
        self.drain();
        // So do edges that had been reported; of what is not settled rather one too many than none.
        let had_edge = |item: &Item<'_>| {
            let i = item.item;
            i.is_edge_triggered() && !i.is_one_shot() && !i.ready && item.is_settled
        };
        for (item, slot) in slots.iter_mut().filter(|(item, _)| !item.item.is_disarmed() && had_edge(item)) {
            **slot = code(self.control(item, item.item.events));
        }
        self.drain();
        for (item, slot) in slots.iter_mut().filter(|(item, _)| !item.item.is_disarmed() && !had_edge(item)) {
            **slot = code(self.control(item, item.item.events));
        }
    }

    /// Adds an item under its number.
    fn control(&self, item: &Item<'_>, events: u32) -> Result<(), Errno> {
        let number = item.item.fd;
        sys::dup3(item.fd, number, true)?;
        let mut event = libc::epoll_event { events, u64: item.item.data };
        // SAFETY: the kernel reads the event.
        let added = unsafe { libc::epoll_ctl(self.fd, libc::EPOLL_CTL_ADD, number, &mut event) };
        let added = Errno::result(added).map(drop);
        sys::close_range(number, number as u32)?;
        added
    }

    /// Takes all events that there are.
    fn drain(&self) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        // Each item reports once at most: what is level-triggered is not there yet.
        for _ in 0..=self.items.len() / events.len() {
            // SAFETY: room for as many events as are told.
            let n = unsafe { libc::epoll_wait(self.fd, events.as_mut_ptr(), events.len() as i32, 0) };
            if n <= 0 {
                break;
            }
        }
    }
}

impl Item<'_> {
    /// What poll(2) says of it.
    fn ready_events(&self) -> i16 {
        let mut poll = libc::pollfd { fd: self.fd, events: ANY as i16, revents: 0 };
        // SAFETY: one entry.
        unsafe { libc::poll(&mut poll, 1, 0) };
        poll.revents
    }
}

fn code(result: Result<(), Errno>) -> i32 {
    result.err().map_or(0, |e| e as i32)
}
