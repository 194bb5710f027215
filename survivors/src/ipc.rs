//! System V shared memory, semaphores, message queues.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;

use crate::Stage;
use crate::child::Child;
use crate::map::PAGE;
use crate::prng;
use crate::procfs::same;

const PRIVATE: libc::key_t = libc::IPC_PRIVATE;
const MODE: i32 = 0o640;

/// An object that goes when it is dropped in the process that made it.
struct Object {
    id: i32,
    maker: u32,
    remove: fn(i32) -> i32,
}

impl Object {
    fn new(id: i32, remove: fn(i32) -> i32) -> Result<Self> {
        Ok(Self { id: Errno::result(id)?, maker: std::process::id(), remove })
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if std::process::id() == self.maker {
            (self.remove)(self.id);
        }
    }
}

fn remove_segment(id: i32) -> i32 {
    // SAFETY: IPC_RMID looks at no buffer.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }
}

fn remove_semaphores(id: i32) -> i32 {
    // SAFETY: IPC_RMID takes no argument.
    unsafe { libc::semctl(id, 0, libc::IPC_RMID) }
}

fn remove_queue(id: i32) -> i32 {
    // SAFETY: IPC_RMID looks at no buffer.
    unsafe { libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()) }
}

/// Attached memory; stays until the process ends.
fn attach(id: i32, len: usize, flags: i32) -> Result<&'static mut [u8]> {
    // SAFETY: attaches at an address of the kernel's choice, at least `len` bytes that are never detached while the slice is used.
    unsafe {
        let start = libc::shmat(id, std::ptr::null(), flags);
        if start as isize == -1 {
            return Err(Errno::last()).context("shmat");
        }
        Ok(std::slice::from_raw_parts_mut(start.cast(), len))
    }
}

fn segment_status(id: i32) -> Result<libc::shmid_ds> {
    // SAFETY: IPC_STAT fills a structure of this type.
    unsafe {
        let mut ds: libc::shmid_ds = std::mem::zeroed();
        Errno::result(libc::shmctl(id, libc::IPC_STAT, &mut ds))?;
        Ok(ds)
    }
}

/// A segment with a key, attached by parent and child, the child's part of it read-only; and one that is attached by nobody.
pub fn shm(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 40 * PAGE + 100;
    let key = 0x5eed_0000 | (std::process::id() as i32 & 0xffff);
    // SAFETY: numbers only.
    let make = |key, len| unsafe { libc::shmget(key, len, libc::IPC_CREAT | libc::IPC_EXCL | MODE) };
    let object = Object::new(make(key, LEN), remove_segment)?;
    let lonely = Object::new(make(PRIVATE, PAGE), remove_segment)?;
    attach(lonely.id, PAGE, 0)?[..4].copy_from_slice(b"left");
    detach_last(lonely.id)?;
    let bytes = attach(object.id, LEN, 0)?;
    prng::fill(1, bytes);
    let id = object.id;
    let mut child = Child::fork(stage, "reader", |stage, ready| {
        let again = attach(id, LEN, libc::SHM_RDONLY)?;
        ready.announce()?;
        stage.wait();
        prng::verify(1, again)
    })?;
    let before = segment_status(object.id)?;

    let crash = stage.crash()?;
    if crash.damage {
        bytes[LEN - 1] ^= 1;
    }
    child.join()?;
    prng::verify(1, bytes)?;
    // SAFETY: numbers only.
    same("identifier by key", &object.id, &Errno::result(unsafe { libc::shmget(key, 0, 0) })?)?;
    let after = segment_status(object.id)?;
    let facts = |ds: &libc::shmid_ds| (ds.shm_segsz, ds.shm_perm.mode, ds.shm_perm.uid, ds.shm_perm.cuid);
    same("segment", &facts(&before), &facts(&after))?;
    // The child is gone with what it had attached: once by fork, once by itself.
    same("attached", &1, &after.shm_nattch)?;
    same("what nobody had attached", &b"left"[..], &attach(lonely.id, PAGE, 0)?[..4])
}

fn detach_last(id: i32) -> Result<()> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let line =
        maps.lines().find(|line| line.contains("/SYSV") && line.split(' ').nth(4) == Some(&id.to_string()));
    let start = line.and_then(|line| line.split('-').next()).context("it is not attached")?;
    let start = usize::from_str_radix(start, 16)?;
    // SAFETY: nobody has a reference into it any more.
    Errno::result(unsafe { libc::shmdt(start as *const _) })?;
    Ok(())
}

/// Removed while attached, the middle unmapped, a page protected: it goes with the last who has it.
pub fn shm_removed(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 10 * PAGE;
    // SAFETY: numbers only.
    let id = Errno::result(unsafe { libc::shmget(PRIVATE, LEN, libc::IPC_CREAT | MODE) })?;
    let bytes = attach(id, LEN, 0)?;
    prng::fill(2, bytes);
    let (head, tail) = bytes.split_at_mut(6 * PAGE);
    let head = &mut head[..4 * PAGE];
    // SAFETY: the pages between the two slices, which nobody has; and pages that are only read from now on.
    unsafe {
        Errno::result(libc::munmap(head.as_mut_ptr().add(4 * PAGE).cast(), 2 * PAGE))?;
        Errno::result(libc::mprotect(tail.as_mut_ptr().cast(), PAGE, libc::PROT_READ))?;
    }
    Errno::result(remove_segment(id))?;

    let crash = stage.crash()?;
    if crash.damage {
        head[0] ^= 1;
    }
    let expected = prng::bytes(2, LEN);
    ensure!(head == &expected[..4 * PAGE] && tail == &expected[6 * PAGE..], "the contents differ");
    let protected = crate::procfs::mapping(tail.as_ptr() as usize)?.permissions;
    same("permissions of the protected page", "r--s", protected.as_str())?;
    const SHM_DEST: u32 = 0o1000;
    ensure!(u32::from(segment_status(id)?.shm_perm.mode) & SHM_DEST != 0, "it is not marked as removed");
    // SAFETY: nobody uses the two slices below.
    unsafe {
        Errno::result(libc::munmap(head.as_ptr() as *mut _, head.len()))?;
        Errno::result(libc::munmap(tail.as_ptr() as *mut _, tail.len()))?;
    }
    same(
        "the segment after the last was gone",
        &Some(Errno::EINVAL),
        &segment_status(id).err().and_then(|e| e.downcast().ok()),
    )
}

fn operate(id: i32, index: u16, op: i16, flags: i32) -> Result<(), Errno> {
    let mut op = libc::sembuf { sem_num: index, sem_op: op, sem_flg: flags as i16 };
    // SAFETY: one operation.
    Errno::result(unsafe { libc::semop(id, &mut op, 1) }).map(drop)
}

fn value(id: i32, index: i32) -> Result<i32> {
    // SAFETY: GETVAL takes no argument.
    Ok(Errno::result(unsafe { libc::semctl(id, index, libc::GETVAL) })?)
}

/// Values; a child's exit undoes what it did, and a child that waits is woken.
pub fn sem(stage: &mut Stage) -> Result<()> {
    // SAFETY: numbers only.
    let object = Object::new(unsafe { libc::semget(PRIVATE, 4, libc::IPC_CREAT | MODE) }, remove_semaphores)?;
    let id = object.id;
    for (index, value) in [7, 1, 0, 0].into_iter().enumerate() {
        // SAFETY: SETVAL takes a number.
        Errno::result(unsafe { libc::semctl(id, index as i32, libc::SETVAL, value) })?;
    }
    let mut holder = Child::fork(stage, "holder", |stage, ready| {
        operate(id, 1, -1, libc::SEM_UNDO)?;
        operate(id, 2, 2, libc::SEM_UNDO)?;
        ready.announce()?;
        stage.wait();
        Ok(())
    })?;
    let mut waiter = Child::fork(stage, "waiter", |_, ready| {
        ready.announce()?;
        operate(id, 3, -1, 0)?;
        Ok(())
    })?;

    let crash = stage.crash()?;
    if crash.damage {
        operate(id, 0, 1, 0)?;
    }
    holder.join()?;
    operate(id, 3, 1, 0)?;
    waiter.join()?;
    let values = (0..4).map(|index| value(id, index)).collect::<Result<Vec<_>>>()?;
    same("values after the exit of who had changed them", &vec![7, 1, 0, 0], &values)
}

#[repr(C)]
struct Message<const LEN: usize> {
    kind: libc::c_long,
    text: [u8; LEN],
}

fn send<const LEN: usize>(id: i32, kind: i64, seed: u64) -> Result<()> {
    let mut message = Message { kind, text: [0; LEN] };
    prng::fill(seed, &mut message.text);
    // SAFETY: a type and LEN bytes.
    Errno::result(unsafe { libc::msgsnd(id, (&raw const message).cast(), LEN, 0) })?;
    Ok(())
}

fn receive(id: i32, kind: i64, seed: u64, len: usize) -> Result<()> {
    let mut message = Message { kind: 0, text: [0; 8000] };
    // SAFETY: a type and room for 8000 bytes.
    let n = unsafe { libc::msgrcv(id, (&raw mut message).cast(), 8000, kind, 0) };
    same("length", &len, &(Errno::result(n)? as usize))?;
    prng::verify(seed, &message.text[..len])
}

/// Messages of different types and sizes keep their order; a child waits for one more.
pub fn msg(stage: &mut Stage) -> Result<()> {
    // SAFETY: numbers only.
    let object = Object::new(unsafe { libc::msgget(PRIVATE, libc::IPC_CREAT | MODE) }, remove_queue)?;
    let id = object.id;
    send::<100>(id, 1, 1)?;
    send::<6000>(id, 2, 2)?;
    send::<0>(id, 1, 3)?;
    send::<4048>(id, 1, 4)?;
    let mut waiter = Child::fork(stage, "waiter", |_, ready| {
        ready.announce()?;
        receive(id, 9, 9, 50)
    })?;

    let crash = stage.crash()?;
    if crash.damage {
        receive(id, 1, 1, 100)?;
    }
    send::<50>(id, 9, 9)?;
    waiter.join()?;
    receive(id, 2, 2, 6000)?;
    for (seed, len) in [(1, 100), (3, 0), (4, 4048)] {
        receive(id, 1, seed, len).with_context(|| format!("message {seed}"))?;
    }
    Ok(())
}
