//! A core with other bytes in some places.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use vmcore::{Error, PAGE_SHIFT, PhysMap, PhysRange, PhysicalMemory, Result, Vmcore};

/// Reads, as (physical address, length).
pub type Reads = BTreeSet<(u64, u32)>;

/// What a run leaves behind.
#[derive(Default)]
pub struct Account {
    /// Reads.
    pub reads: AtomicU64,
    /// Reads that returned at least one byte that is not the core's.
    pub mutated: AtomicU64,
    /// What was read, if that is asked for.
    pub record: Option<Mutex<Reads>>,
    /// CPU time of this thread at which the run is taken for one that will not end, ns; 0 for none.
    pub deadline: u64,
}

/// The core, with what was changed over it.
pub struct Overlay {
    core: Arc<Vmcore>,
    account: Arc<Account>,
    /// A bit for each page frame in which something is changed: nearly all reads need no more than a look here.
    changed: Vec<u64>,
    /// By page frame: where in the page, and what.
    patches: HashMap<u64, Vec<(u16, u8)>>,
}

/// CPU time of this thread, ns: on a busy machine nothing else can be compared.
pub fn cpu_time() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is there to be filled.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The payload of the panic with which a run ends that takes too long.
pub struct Hang;

impl Overlay {
    /// `bytes`: address and value; of several for one address the last counts.
    pub fn new(core: Arc<Vmcore>, account: Arc<Account>, bytes: &[(u64, u8)]) -> Overlay {
        let end = core.ranges().last().map_or(0, |range| range.end());
        let mut changed = vec![0; (end >> PAGE_SHIFT) as usize / 64 + 1];
        let mut patches: HashMap<u64, Vec<(u16, u8)>> = HashMap::new();
        for (addr, value) in bytes {
            let pfn = addr >> PAGE_SHIFT;
            if let Some(word) = changed.get_mut(pfn as usize / 64) {
                *word |= 1 << (pfn % 64);
                patches.entry(pfn).or_default().push(((addr % 4096) as u16, *value));
            }
        }
        Overlay { core, account, changed, patches }
    }

    /// The same as a core; `info` and `prstatus` are part of it.
    pub fn into_core(self, info: vmcore::VmcoreInfo, prstatus: Vec<vmcore::PrStatus>) -> Vmcore {
        Vmcore::from_memory(Box::new(self), info, prstatus)
    }

    fn is_changed(&self, pfn: u64) -> bool {
        self.changed.get(pfn as usize / 64).is_some_and(|word| word >> (pfn % 64) & 1 != 0)
    }
}

impl PhysicalMemory for Overlay {
    fn read_phys(&self, addr: u64, buf: &mut [u8]) -> Result<()> {
        let count = self.account.reads.fetch_add(1, Relaxed);
        if count % 256 == 0 && self.account.deadline != 0 && cpu_time() > self.account.deadline {
            std::panic::panic_any(Hang);
        }
        self.core.read_phys(addr, buf)?;
        if let Some(record) = &self.account.record {
            let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
            record.insert((addr, buf.len() as u32));
        }
        if buf.is_empty() {
            return Ok(());
        }
        let last = addr + (buf.len() as u64 - 1);
        let mut hit = false;
        for pfn in addr >> PAGE_SHIFT..=last >> PAGE_SHIFT {
            if !self.is_changed(pfn) {
                continue;
            }
            for (at, value) in self.patches.get(&pfn).into_iter().flatten() {
                let place = (pfn << PAGE_SHIFT) + u64::from(*at);
                if (addr..=last).contains(&place) {
                    buf[(place - addr) as usize] = *value;
                    hit = true;
                }
            }
        }
        self.account.mutated.fetch_add(u64::from(hit), Relaxed);
        Ok(())
    }

    fn map_phys(&self, addr: u64, len: usize) -> Result<PhysMap<'_>> {
        let end = addr.checked_add(len as u64).ok_or(Error::Overflow { addr, len })?;
        // Who cannot have the bytes themselves reads them.
        if self.account.record.is_some()
            || (addr >> PAGE_SHIFT..=end >> PAGE_SHIFT).any(|pfn| self.is_changed(pfn))
        {
            return Err(Error::Overflow { addr, len });
        }
        self.core.map_phys(addr, len)
    }

    fn ranges(&self) -> &[PhysRange] {
        self.core.ranges()
    }
}
