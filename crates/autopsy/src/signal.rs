//! Signals: `sighand_struct`, `sigpending`, `sigqueue` (include/linux/sched/signal.h, signal_types.h; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{PendingSignal, SigAction};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// RLIMIT_SIGPENDING is a few thousand; a longer queue is a damaged one.
const MAX_QUEUED: usize = 1 << 17;
/// Signals of Linux on x86-64 (_NSIG).
pub(crate) const SIGNALS: usize = 64;
/// `struct sigaction` as the kernel keeps it on x86-64: handler, flags, restorer, mask.
const ACTION_SIZE: usize = 32;

#[derive(KernelType)]
#[kernel("sigpending")]
struct SigPending {
    #[kernel(address)]
    list: u64,
    signal: u64,
}

#[derive(KernelType)]
#[kernel("sigqueue")]
struct SigQueue {
    info: [u8; 48],
}

/// The bit of a signal in a `sigset_t`.
pub(crate) fn mask(signo: i32) -> u64 {
    if (1..=SIGNALS as i32).contains(&signo) { 1 << (signo - 1) } else { 0 }
}

impl Autopsy<'_> {
    /// The 64 actions of a `sighand_struct`.
    pub(crate) fn signal_actions(&self, sighand: u64) -> Result<Vec<SigAction>> {
        let addr = sighand.wrapping_add(self.kernel.offset_of("sighand_struct", "action")?);
        // The layout is the system call's (rt_sigaction), so it needs no binding; its size is checked all the same.
        let size = self.kernel.size_of("k_sigaction")?;
        if size != ACTION_SIZE as u64 {
            return Err(corrupt("k_sigaction", addr, format!("has {size} bytes, not {ACTION_SIZE}")));
        }
        let bytes = self.kernel.read_bytes(addr, SIGNALS * ACTION_SIZE)?;
        let words = |action: &[u8; ACTION_SIZE]| {
            let (words, _) = action.as_chunks::<8>();
            let word = |i: usize| words.get(i).map_or(0, |w| u64::from_le_bytes(*w));
            SigAction { handler: word(0), flags: word(1), restorer: word(2), mask: word(3) }
        };
        Ok(bytes.as_chunks::<ACTION_SIZE>().0.iter().map(words).collect())
    }

    /// What is pending in a `sigpending`, in queue order. A signal can be pending without a queue entry (when the queue was
    /// full, and for SIGKILL to all threads): those come last, by number, without `siginfo`.
    pub(crate) fn pending_signals(&self, addr: u64) -> Result<Vec<PendingSignal>> {
        let pending: SigPending = self.kernel.read(addr)?;
        let to_entry = self.kernel.offset_of("sigqueue", "list")?;
        let mut queued = 0;
        let mut signals = Vec::new();
        for node in self.list(pending.list, MAX_QUEUED)? {
            let entry: SigQueue = self.kernel.read(node.wrapping_sub(to_entry))?;
            let signo = i32::from_le_bytes([entry.info[0], entry.info[1], entry.info[2], entry.info[3]]);
            if mask(signo) == 0 {
                return Err(corrupt("sigqueue", node, format!("holds signal {signo}")));
            }
            queued |= mask(signo);
            signals.push(PendingSignal { signo, info: entry.info.to_vec() });
        }
        let unqueued = pending.signal & !queued;
        let numbers = (1..=SIGNALS as i32).filter(|signo| unqueued & mask(*signo) != 0);
        signals.extend(numbers.map(|signo| PendingSignal { signo, info: Vec::new() }));
        Ok(signals)
    }
}
