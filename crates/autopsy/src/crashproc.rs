//! Crash procedures. Nothing of the kernel's is read for them but page tables: the record lies in a mapping of a size and with properties that no other
//! has by chance (see `crashproc`'s `record`), and says itself whether it is one.

use otherworld::record::{self, RecordError};
use snapshot::{
    AddressSpace, CrashProcedure, PAGE_SIZE, Prot, Severity, SwapArea, Vma, VmaFlags, VmaKind, WatchedLock,
};

use crate::Autopsy;

impl Autopsy<'_> {
    /// What a process has registered. What looks like a record and is none becomes a finding.
    pub(crate) fn crash_procedure(&self, mm: &AddressSpace) -> Option<CrashProcedure> {
        mm.vmas.iter().filter(|vma| fits(vma)).find_map(|vma| {
            if vma.pages.iter().any(|run| SwapArea::slot_of(run.pfn).is_some()) {
                let text = format!(
                    "what may be its crash procedure's record, at {:x}, was swapped out: nothing is called",
                    vma.start
                );
                self.find(Severity::Loss, "crashproc", text);
                return None;
            }
            let record = match record::parse(&self.record_bytes(vma)?) {
                Ok(record) => record,
                Err(RecordError::NotARecord | RecordError::Empty) => return None,
                Err(error) => {
                    self.find(
                        Severity::Loss,
                        "crashproc",
                        format!("its crash procedure is not called: at {:x}: {error}", vma.start),
                    );
                    return None;
                }
            };
            Some(CrashProcedure {
                entry: record.entry,
                procedure: record.procedure,
                data: record.data,
                stack_size: record.stack_size,
                time_limit_ms: record.time_limit_ms,
                threads_run: record.threads_run,
                regions: record.regions.iter().map(|r| (r.address, r.len, r.checksum)).collect(),
                locks: record.locks.iter().map(watched).collect(),
            })
        })
    }

    fn record_bytes(&self, vma: &Vma) -> Option<Vec<u8>> {
        let mut bytes = vec![0; record::SIZE];
        for run in &vma.pages {
            let at = run.addr.checked_sub(vma.start)? as usize;
            let part = bytes.get_mut(at..at + run.count as usize * PAGE_SIZE as usize)?;
            self.kernel.vmcore().read_phys(run.pfn * PAGE_SIZE, part).ok()?;
        }
        Some(bytes)
    }
}

fn watched(lock: &record::Lock) -> WatchedLock {
    WatchedLock { address: lock.address, kind: lock.kind, tag: lock.tag }
}

/// Whether a mapping can be a record.
fn fits(vma: &Vma) -> bool {
    vma.kind == VmaKind::Anonymous
        && vma.end - vma.start == record::SIZE as u64
        && vma.prot == Prot::READ | Prot::WRITE
        && !vma.shared
        && vma.flags.contains(VmaFlags::DONTDUMP | VmaFlags::RAND_READ)
}
