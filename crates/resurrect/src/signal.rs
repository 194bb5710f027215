//! Signals: what is pending is queued again; actions are set by the skeletons, the mask with the registers.

use snapshot::{PendingSignal, Pid, Process, Reason, SigAction, timer_of};

use crate::inject::{Call, call};

/// Bytes of a `siginfo_t` in user space; the kernel keeps the first 48 of them.
const SIGINFO_SIZE: usize = 128;

/// Injected code reports with SIGTRAP. Were it ignored, the kernel would reset its action on the way: such an action is set when
/// nothing is injected any more.
pub(crate) fn is_set_late(signo: i32, action: &SigAction) -> bool {
    signo == libc::SIGTRAP && action.handler == libc::SIG_IGN as u64
}

/// The SIGTRAP action that [`is_set_late`] put off, as rt_sigaction(2) reads it.
pub(crate) fn late_action(actions: &[SigAction]) -> Option<Vec<u8>> {
    actions.get(libc::SIGTRAP as usize - 1).filter(|a| is_set_late(libc::SIGTRAP, a)).map(raw)
}

/// The actions for all signals, those by default among them, as rt_sigaction(2) reads them.
pub(crate) fn actions(process: &Process) -> impl Iterator<Item = (i32, Vec<u8>)> + '_ {
    let default = SigAction::default();
    let action = move |signo: i32| *process.signals.actions.get(signo as usize - 1).unwrap_or(&default);
    let can_be_set = |(signo, action): &(i32, SigAction)| {
        !matches!(*signo, libc::SIGKILL | libc::SIGSTOP) && !is_set_late(*signo, action)
    };
    (1..=64)
        .map(move |signo| (signo, action(signo)))
        .filter(can_be_set)
        .map(|(signo, action)| (signo, raw(&action)))
}

fn raw(action: &SigAction) -> Vec<u8> {
    let words = [action.handler, action.flags, action.restorer, action.mask];
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// To whom signals are queued.
#[derive(Clone, Copy)]
pub(crate) enum Queue {
    Process(Pid),
    Thread(Pid, Pid),
}

/// Queues signals again, in order. To be run by a thread of the process itself: nobody else may say that a signal came from
/// the kernel.
pub(crate) fn queue<'a>(
    queue: Queue,
    pending: impl IntoIterator<Item = &'a PendingSignal>,
    losses: &mut Vec<Reason>,
) -> Vec<Call> {
    let mut calls = Vec::new();
    for signal in pending {
        let signo = signal.signo;
        // Cannot be blocked, or would end or stop the process while it is being built.
        if [libc::SIGKILL, libc::SIGSTOP, libc::SIGTRAP].contains(&signo) || !(1..=64).contains(&signo) {
            losses.push(Reason::new("pending-signal", format!("pending signal {signo} is not delivered")));
            continue;
        }
        // A signal without a queue entry reads as one from nobody.
        let mut info = vec![0; SIGINFO_SIZE];
        info[..4].copy_from_slice(&signo.to_ne_bytes());
        for (to, from) in info.iter_mut().zip(signal.info.iter().take(48)) {
            *to = *from;
        }
        if timer_of(signal).is_some() {
            // si_sys_private, for the kernel's own use.
            info[32..36].fill(0);
        }
        let what = format!("queue signal {signo}");
        calls.push(match queue {
            Queue::Process(pid) => call!(what, libc::SYS_rt_sigqueueinfo, pid, signo, info),
            Queue::Thread(pid, tid) => call!(what, libc::SYS_rt_tgsigqueueinfo, pid, tid, signo, info),
        });
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_cannot_be_queued_are_losses() {
        let pending = |signo| PendingSignal { signo, info: vec![] };
        let mut losses = Vec::new();
        let calls = queue(Queue::Process(7), &[pending(10), pending(9), pending(65)], &mut losses);
        assert_eq!((calls.len(), losses.len()), (1, 2));
    }

    #[test]
    fn only_an_ignored_sigtrap_is_put_off() {
        let mut actions = vec![SigAction::default(); 64];
        assert_eq!(late_action(&actions), None);
        actions[4].handler = 0x4000;
        assert_eq!(late_action(&actions), None);
        actions[4].handler = 1;
        assert_eq!(late_action(&actions).unwrap()[0], 1);
    }
}
