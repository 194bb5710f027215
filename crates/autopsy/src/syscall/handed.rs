//! Calls that somebody else finishes: who raises a semaphore, sends a message or takes one does for the thread that sleeps what that had asked for, and
//! wakes it then (ipc/sem.c, ipc/msg.c, ipc/mqueue.c; 6.1 and 6.12). What has been done stands in a queue entry on the sleeper's own stack.

use ktypes::{Kernel, KernelType};

use super::iov_iter::Stack;
use super::{EINTR, is_part};

const EAGAIN: i64 = 11;
/// MAX_ERRNO.
const MAX_ERRNO: i64 = 4095;
/// STATE_NONE and STATE_READY (ipc/mqueue.c).
const WAITS: i32 = 0;
const READY: i32 = 1;

/// What has become of what a sleeper had asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handed {
    /// Nothing.
    Waiting,
    /// It has been done, and this is its result.
    Done(i64),
    /// A message has been handed over, and is not in the program's memory yet.
    Message,
}

/// Calls of that kind, and the function in which each waits for the other.
const CALLS: [(&str, &[&str]); 6] = [
    ("semop", &["do_semtimedop", "__do_semtimedop"]),
    ("semtimedop", &["do_semtimedop", "__do_semtimedop"]),
    ("msgrcv", &["do_msgrcv"]),
    // It only waits for room.
    ("msgsnd", &[]),
    ("mq_timedreceive", &["wq_sleep"]),
    ("mq_timedsend", &["wq_sleep"]),
];

/// Whether a call is of that kind.
pub(super) fn is_handed_over(name: &str) -> bool {
    CALLS.iter().any(|(call, _)| *call == name)
}

/// Whether it puts something into the program's memory when it is done: that can take time, in which it may sleep.
pub(super) fn receives(name: &str) -> bool {
    matches!(name, "msgrcv" | "mq_timedreceive")
}

#[derive(KernelType)]
#[kernel("sem_queue")]
struct SemQueue {
    #[kernel("list", address)]
    list: u64,
    #[kernel("list.next")]
    next: u64,
    status: i32,
}

#[derive(KernelType)]
#[kernel("msg_receiver")]
struct MsgReceiver {
    #[kernel("r_list", address)]
    list: u64,
    #[kernel("r_list.next")]
    next: u64,
    r_msg: u64,
}

#[derive(KernelType)]
#[kernel("ext_wait_queue")]
struct ExtWaitQueue {
    #[kernel("list", address)]
    list: u64,
    #[kernel("list.next")]
    next: u64,
    state: i32,
}

/// What the entry on the stack of a `task` says that waits in a function (`wchan`). `None` where it waits for something else, and where the stack
/// has no entry, or several that say different things.
pub(super) fn look(kernel: &Kernel, stack: Stack<'_>, task: u64, name: &str, wchan: &str) -> Option<Handed> {
    let (_, functions) = CALLS.iter().find(|(call, _)| *call == name)?;
    functions.iter().any(|function| is_part(wchan, function)).then_some(())?;
    let (structure, sleeper) = match name {
        "semop" | "semtimedop" => ("sem_queue", "sleeper"),
        "msgrcv" => ("msg_receiver", "r_tsk"),
        _ => ("ext_wait_queue", "task"),
    };
    let offset = kernel.offset_of(structure, sleeper).ok()?;
    let slots = stack.addresses().filter(|at| stack.word(*at) == Some(task));
    let mut all = slots.filter_map(|slot| {
        let at = slot.wrapping_sub(offset);
        match structure {
            "sem_queue" => semaphore(kernel, &kernel.read(at).ok()?),
            "msg_receiver" => message(kernel, &kernel.read(at).ok()?),
            _ => posix_message(kernel, &kernel.read(at).ok()?, name),
        }
    });
    let first = all.next()?;
    all.all(|other| other == first).then_some(first)
}

/// LIST_POISON1 (include/linux/poison.h), which is left where an entry is taken off its list.
const POISON: u64 = 0xdead_0000_0000_0100;

/// Whether an entry is on a list, or was: much on a stack looks like one.
fn is_linked(kernel: &Kernel, list: u64, next: u64) -> bool {
    let back = || kernel.read_u64(next.wrapping_add(kernel.offset_of("list_head", "prev").ok()?)).ok();
    next == POISON || back() == Some(list)
}

fn semaphore(kernel: &Kernel, queue: &SemQueue) -> Option<Handed> {
    match i64::from(queue.status) {
        _ if !is_linked(kernel, queue.list, queue.next) => None,
        status if status == -EINTR => Some(Handed::Waiting),
        status if (-MAX_ERRNO..=0).contains(&status) => Some(Handed::Done(status)),
        _ => None,
    }
}

fn message(kernel: &Kernel, receiver: &MsgReceiver) -> Option<Handed> {
    match receiver.r_msg as i64 {
        _ if !is_linked(kernel, receiver.list, receiver.next) => None,
        error if error == -EAGAIN => Some(Handed::Waiting),
        error if (-MAX_ERRNO..0).contains(&error) => Some(Handed::Done(error)),
        pointer if pointer < 0 => Some(Handed::Message),
        _ => None,
    }
}

fn posix_message(kernel: &Kernel, queue: &ExtWaitQueue, name: &str) -> Option<Handed> {
    match queue.state {
        _ if !is_linked(kernel, queue.list, queue.next) => None,
        WAITS => Some(Handed::Waiting),
        READY if receives(name) => Some(Handed::Message),
        READY => Some(Handed::Done(0)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use synth::{Synth, named};

    use super::*;
    use crate::testing::{declare, open};

    /// What is said of a thread whose stack has an entry with this in the member that tells.
    fn said(
        name: &str,
        wchan: &str,
        structure: &str,
        (sleeper, list): (&str, &str),
        (member, value): (&str, u64),
    ) -> Option<Handed> {
        let mut synth = Synth::new();
        let own = [("sleeper", synth::U64), ("r_tsk", synth::U64), ("task", synth::U64)];
        declare::<SemQueue>(&mut synth, &[("list", named("list_head")), own[0].clone()]);
        declare::<MsgReceiver>(&mut synth, &[("r_list", named("list_head")), own[1].clone()]);
        declare::<ExtWaitQueue>(&mut synth, &[("list", named("list_head")), own[2].clone()]);
        let task = 0xffff_8880_0000_4000;
        let base = synth.alloc_bytes(0x200, 64);
        let at = base + 0x80;
        let list = synth.address_of(structure, at, list);
        synth.write_u64(list, 0xdead_0000_0000_0100);
        synth.set(structure, at, sleeper, task);
        match member {
            "r_msg" => synth.set(structure, at, member, value),
            _ => synth.set(structure, at, member, value as u32),
        };
        // Others have the task's address, too, and pointers before it.
        for n in 0x1a..0x40 {
            synth.write_u64(base + 8 * n, base);
        }
        synth.write_u64(base + 8 * 0x20, task);
        let kernel = open(&synth);
        let words: Vec<u64> = (0..64).map(|n| synth.read_u64(base + 8 * n)).collect();
        look(&kernel, Stack { base, words: &words }, task, name, wchan)
    }

    fn error(number: i64) -> u64 {
        (-number) as u64
    }

    #[test]
    fn a_semaphore_operation_is_done_by_whoever_raises_it() {
        let said = |wchan, status| said("semop", wchan, "sem_queue", ("sleeper", "list"), ("status", status));
        assert_eq!(said("do_semtimedop", error(EINTR)), Some(Handed::Waiting));
        assert_eq!(said("__do_semtimedop.constprop.0", 0), Some(Handed::Done(0)));
        assert_eq!(said("do_semtimedop", error(43)), Some(Handed::Done(-43)), "it was removed");
        assert_eq!(said("do_semtimedop", 17), None);
        assert_eq!(said("folio_wait_bit_common", 0), None, "an entry of an earlier call");
    }

    #[test]
    fn a_message_is_handed_over() {
        let said =
            |message| said("msgrcv", "do_msgrcv", "msg_receiver", ("r_tsk", "r_list"), ("r_msg", message));
        assert_eq!(said(error(EAGAIN)), Some(Handed::Waiting));
        assert_eq!(said(error(43)), Some(Handed::Done(-43)));
        assert_eq!(said(0xffff_8880_0012_3400), Some(Handed::Message));
        assert_eq!(said(0x1234), None);
    }

    #[test]
    fn a_posix_message_is_taken_or_handed_over() {
        let said = |name, state| said(name, "wq_sleep", "ext_wait_queue", ("task", "list"), ("state", state));
        assert_eq!(said("mq_timedsend", 0), Some(Handed::Waiting));
        assert_eq!(said("mq_timedsend", 1), Some(Handed::Done(0)));
        assert_eq!(said("mq_timedreceive", 1), Some(Handed::Message));
        assert_eq!(said("mq_timedreceive", 2), None);
    }
}
