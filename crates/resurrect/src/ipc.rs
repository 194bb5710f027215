//! System V shared memory, semaphores and message queues: made once for all, with their old identifiers, before the processes that use
//! them. Segments are attached here while they are filled, by the processes themselves as part of their memory.

use std::collections::BTreeMap;

use nix::errno::Errno;
use snapshot::{
    Ipc, IpcPerm, MsgQueue, PAGE_SIZE, PageRun, Pid, Process, Reason, SemArray, ShmSegment, Snapshot, VmaKind,
};

use crate::inject::{Call, call};
use crate::pour::{Owner, OwnerId, ReverseMap};
use crate::{hugetlb, sys};

/// Largest value of a semaphore (SEMVMX).
const MAX_VALUE: i32 = 32767;
/// In a segment's mode: removed when nobody is attached any more.
const SHM_LOCK: i32 = 11;

/// The objects of the machine. Segments are detached here when dropped, and those that had been removed are removed.
#[derive(Default)]
pub(crate) struct Objects {
    segments: BTreeMap<i32, Result<Segment, String>>,
    /// What could not be made, for people.
    failed: Vec<(i32, &'static str, String)>,
}

struct Segment {
    start: *mut libc::c_void,
    owner: OwnerId,
    removed: bool,
    id: i32,
}

/// Identifiers of the segments that a process has attached.
fn attached<'a>(snapshot: &'a Snapshot, process: &Process) -> impl Iterator<Item = i32> + 'a {
    let mm = process.address_space.and_then(|id| snapshot.address_spaces.get(&id));
    mm.into_iter().flat_map(|mm| &mm.vmas).filter_map(|vma| match vma.kind {
        VmaKind::SysvShm { id, .. } => Some(id),
        _ => None,
    })
}

impl Objects {
    /// Makes all objects, and says which frames belong into the segments.
    pub(crate) fn make(snapshot: &Snapshot, reverse: &mut ReverseMap) -> Self {
        let mut objects = Self::default();
        let Ipc { shm, sem, msg } = &snapshot.ipc;
        for segment in shm {
            let made = Segment::make(snapshot, segment, reverse);
            if let Err(why) = &made {
                objects.failed.push((segment.perm.id, "shared memory segment", why.clone()));
            }
            objects.segments.insert(segment.perm.id, made);
        }
        for array in sem {
            if let Err(why) = make_semaphores(array) {
                objects.failed.push((array.perm.id, "set of semaphores", why));
            }
        }
        for queue in msg {
            if let Err(why) = make_queue(queue) {
                objects.failed.push((queue.perm.id, "message queue", why));
            }
        }
        objects
    }

    /// Why the memory of this process cannot be had.
    pub(crate) fn failure(&self, snapshot: &Snapshot, process: &Process) -> Option<String> {
        attached(snapshot, process).find_map(|id| match self.segments.get(&id) {
            Some(Ok(_)) => None,
            Some(Err(why)) => Some(format!("shared memory segment {id}: {why}")),
            None => Some(format!("shared memory segment {id} is not in the snapshot")),
        })
    }

    /// What has to be poured for this process.
    pub(crate) fn owners(&self, snapshot: &Snapshot, process: &Process) -> Vec<OwnerId> {
        let mut ids: Vec<i32> = attached(snapshot, process).collect();
        ids.dedup();
        ids.iter().filter_map(|id| Some(self.segments.get(id)?.as_ref().ok()?.owner)).collect()
    }

    /// What everybody has lost who may use these objects. Nobody can tell who would: identifiers are only numbers in the programs'
    /// memory. So those are told that have the creator's or owner's user.
    pub(crate) fn losses(&self, snapshot: &Snapshot, process: &Process) -> Vec<Reason> {
        let uid = process.leader().map(|t| t.credentials.uid);
        let Ipc { shm, sem, msg } = &snapshot.ipc;
        let perms: Vec<&IpcPerm> = shm
            .iter()
            .map(|s| &s.perm)
            .chain(sem.iter().map(|s| &s.perm))
            .chain(msg.iter().map(|q| &q.perm))
            .collect();
        let may_use =
            |id: i32| perms.iter().any(|p| p.id == id && (Some(p.uid) == uid || Some(p.cuid) == uid));
        let failed = self.failed.iter().filter(|(id, ..)| may_use(*id));
        failed.map(|(id, what, why)| Reason::new("ipc", format!("{what} {id} is lost: {why}"))).collect()
    }
}

/// Makes an object with its old identifier: `next_id` is the sysctl that says which the next one gets. The creator is who we are then.
fn with_identity<T>(
    perm: &IpcPerm,
    next_id: &str,
    make: impl FnOnce() -> Result<T, String>,
) -> Result<T, String> {
    let path = format!("/proc/sys/kernel/{next_id}");
    sys::write_proc(&path, &perm.id.to_string()).map_err(|e| format!("{path}: {e}"))?;
    let set = |uid: u32, gid: u32| {
        // SAFETY: numbers only. The group first: whoever is not root cannot change it.
        unsafe {
            sys::raw(libc::SYS_setresuid, [u64::MAX, 0, u64::MAX, 0, 0, 0])?;
            sys::raw(libc::SYS_setresgid, [u64::MAX, gid.into(), u64::MAX, 0, 0, 0])?;
            sys::raw(libc::SYS_setresuid, [u64::MAX, uid.into(), u64::MAX, 0, 0, 0])
        }
    };
    let made = set(perm.cuid, perm.cgid).map_err(|e| format!("become its creator: {e}")).and_then(|_| make());
    set(0, 0).map_err(|e| format!("become root again: {e}"))?;
    made
}

fn failed(what: &'static str) -> impl Fn(Errno) -> String {
    move |e| format!("{what}: {e}")
}

fn same_id(made: i64, perm: &IpcPerm) -> Result<(), String> {
    if made == i64::from(perm.id) { Ok(()) } else { Err(format!("it got the identifier {made}")) }
}

fn key(perm: &IpcPerm) -> u64 {
    perm.key as u32 as u64
}

/// Owner and permissions, for IPC_SET: the structures of the three kinds begin with an `ipc_perm` (glibc's is the kernel's).
fn set_perm(to: &mut libc::ipc_perm, perm: &IpcPerm) {
    to.uid = perm.uid;
    to.gid = perm.gid;
    to.mode = perm.mode as _;
}

impl Segment {
    fn make(snapshot: &Snapshot, segment: &ShmSegment, reverse: &mut ReverseMap) -> Result<Self, String> {
        let perm = &segment.perm;
        let inode = snapshot.inodes.get(&segment.inode).ok_or("its contents are not in the snapshot")?;
        if !matches!(inode.fs_type.as_bytes(), b"tmpfs" | b"hugetlbfs") {
            return Err(format!("its pages are those of {}", inode.fs_type));
        }
        if let Some(obstacle) = snapshot.obstacles_to_contents(inode).first() {
            return Err(obstacle.text.clone());
        }
        let huge = segment.huge_page.map_or(0, |size| libc::SHM_HUGETLB | hugetlb::size_flags(size) as i32);
        let flags = libc::IPC_CREAT | libc::IPC_EXCL | huge | perm.mode as i32;
        let args = [key(perm), segment.size, flags as u64, 0, 0, 0];
        // SAFETY: numbers only.
        let make = || unsafe { sys::raw(libc::SYS_shmget, args) }.map_err(failed("shmget"));
        let id = with_identity(perm, "shm_next_id", make)?;
        same_id(id, perm)?;
        // SAFETY: attaches at an address of the kernel's choice.
        let start = unsafe { libc::shmat(perm.id, std::ptr::null(), 0) };
        if start as isize == -1 {
            return Err(failed("shmat")(Errno::last()));
        }
        let len = segment.mapped_len();
        // SAFETY: our own mapping; children attach it again where they need it.
        unsafe { libc::madvise(start, len as usize, libc::MADV_DONTFORK) };
        // SAFETY: an all-zero structure is valid, and the kernel reads owner and mode of it only.
        let set = unsafe {
            let mut ds: libc::shmid_ds = std::mem::zeroed();
            set_perm(&mut ds.shm_perm, perm);
            let set = libc::shmctl(perm.id, libc::IPC_SET, &mut ds);
            if segment.locked { set | libc::shmctl(perm.id, SHM_LOCK, &mut ds) } else { set }
        };
        Errno::result(set).map_err(failed("shmctl"))?;
        let owner = reverse.owner(Owner::Here { start: start.cast(), len: len as usize });
        for run in &inode.pages {
            let addr = run.index.checked_mul(PAGE_SIZE).ok_or("a page index that is out of range")?;
            reverse.add(owner, PageRun { addr, pfn: run.pfn, count: run.count });
        }
        Ok(Self { start, owner, removed: segment.removed, id: perm.id })
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: attached in `make`; the reverse map that points into it has been used up before.
        unsafe {
            if self.removed {
                libc::shmctl(self.id, libc::IPC_RMID, std::ptr::null_mut());
            }
            libc::shmdt(self.start);
        }
    }
}

/// Values so that what the processes do later ([`undo`]) makes them what they were.
fn make_semaphores(array: &SemArray) -> Result<(), String> {
    let perm = &array.perm;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | perm.mode as i32;
    let args = [key(perm), array.values.len() as u64, flags as u64, 0, 0, 0];
    // SAFETY: numbers only.
    let make = || unsafe { sys::raw(libc::SYS_semget, args) }.map_err(failed("semget"));
    same_id(with_identity(perm, "sem_next_id", make)?, perm)?;
    let values = array.values.clone();
    // SAFETY: SETALL reads one number for each semaphore; IPC_SET reads owner and mode.
    unsafe {
        Errno::result(libc::semctl(perm.id, 0, libc::SETALL, values.as_ptr())).map_err(failed("SETALL"))?;
        let mut ds: libc::semid_ds = std::mem::zeroed();
        set_perm(&mut ds.sem_perm, perm);
        Errno::result(libc::semctl(perm.id, 0, libc::IPC_SET, &mut ds)).map_err(failed("IPC_SET"))?;
    }
    Ok(())
}

fn make_queue(queue: &MsgQueue) -> Result<(), String> {
    let perm = &queue.perm;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | perm.mode as i32;
    let make = || {
        // SAFETY: numbers only.
        unsafe { sys::raw(libc::SYS_msgget, [key(perm), flags as u64, 0, 0, 0, 0]) }.map_err(failed("msgget"))
    };
    same_id(with_identity(perm, "msg_next_id", make)?, perm)?;
    // SAFETY: an all-zero structure is valid, and the kernel reads owner, mode and size of it only.
    unsafe {
        let mut ds: libc::msqid_ds = std::mem::zeroed();
        set_perm(&mut ds.msg_perm, perm);
        ds.msg_qbytes = queue.max_bytes;
        Errno::result(libc::msgctl(perm.id, libc::IPC_SET, &mut ds)).map_err(failed("msgctl"))?;
    }
    for message in &queue.messages {
        let mut bytes = message.kind.to_ne_bytes().to_vec();
        bytes.extend_from_slice(message.text.as_bytes());
        let args = [
            perm.id as u64,
            bytes.as_ptr() as u64,
            message.text.as_bytes().len() as u64,
            libc::IPC_NOWAIT as u64,
            0,
            0,
        ];
        // SAFETY: the kernel reads the type and as many bytes as follow it.
        unsafe { sys::raw(libc::SYS_msgsnd, args) }.map_err(failed("msgsnd"))?;
    }
    Ok(())
}

/// What a process does so that its exit will undo what it would have undone. Each operation with SEM_UNDO changes a value, and is
/// followed by its opposite without: what remains is the adjustment.
pub(crate) fn undo(ipc: &Ipc, pid: Pid) -> Vec<Call> {
    let mut calls = Vec::new();
    for array in &ipc.sem {
        for undo in array.undo.iter().filter(|u| u.pid == pid) {
            let mut bytes = Vec::new();
            for ((index, &adjustment), &value) in (0u16..).zip(&undo.adjustments).zip(&array.values) {
                // The values stay within their bounds in between: up first where it goes up.
                for op in operations(value, adjustment) {
                    bytes.extend(index.to_ne_bytes());
                    bytes.extend(op.0.to_ne_bytes());
                    bytes.extend(op.1.to_ne_bytes());
                }
            }
            // One call does them all at once, or none. More than kernel.sem allows are done in several.
            for chunk in bytes.chunks(6 * 32) {
                let what = format!("semop on {}", array.perm.id);
                let n = chunk.len() as u64 / 6;
                calls.push(call!(what, libc::SYS_semop, array.perm.id, chunk.to_vec(), n).optional());
            }
        }
    }
    calls
}

/// Pairs of operation and flags that leave `value` as it is and make `adjustment` what the exit adds.
fn operations(value: u16, adjustment: i16) -> Vec<(i16, i16)> {
    let (with_undo, nowait) = (libc::SEM_UNDO as i16 | libc::IPC_NOWAIT as i16, libc::IPC_NOWAIT as i16);
    let mut operations = Vec::new();
    // An operation adds its opposite to the adjustment.
    let mut left = -i32::from(adjustment);
    while left != 0 {
        let room = if left > 0 { MAX_VALUE - i32::from(value) } else { i32::from(value) };
        let (step, first_back) = match room {
            // Nothing can be added to, or taken from, what is at its bound: the opposite first.
            0 => (left.signum() * left.abs().min(MAX_VALUE), true),
            room => (left.signum() * left.abs().min(room), false),
        };
        let (undone, back) = ((step as i16, with_undo), (-step as i16, nowait));
        operations.extend(if first_back { [back, undone] } else { [undone, back] });
        left -= step;
    }
    operations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn undoing_leaves_the_value_alone() {
        for (value, adjustment) in
            [(0u16, 1i16), (0, -1), (5, 3), (5, -3), (1, 32767), (32767, -5), (32767, 5), (3, -32768)]
        {
            let (mut now, mut adj) = (i32::from(value), 0);
            for (op, flags) in operations(value, adjustment) {
                now += i32::from(op);
                assert!((0..=MAX_VALUE).contains(&now), "{value} {adjustment}: {now}");
                if flags & libc::SEM_UNDO as i16 != 0 {
                    adj -= i32::from(op);
                }
            }
            assert_eq!((now, adj), (value.into(), adjustment.into()), "{value} {adjustment}");
        }
    }
}
