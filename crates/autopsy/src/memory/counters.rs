//! How many pages an address space has, by the kernel's own count (include/linux/mm_types.h, mm_types_task.h, percpu_counter.h).

use ktypes::KernelType;

use crate::Autopsy;
use crate::error::Result;

/// MM_FILEPAGES, MM_ANONPAGES, MM_SWAPENTS, MM_SHMEMPAGES: the same in 6.1 and 6.12.
const COUNTERS: usize = 4;
/// Anonymous pages in memory.
pub(crate) const ANON_PAGES: usize = 1;
/// Those in swap.
pub(crate) const SWAP_ENTRIES: usize = 2;

#[derive(KernelType)]
#[kernel("mm_struct")]
struct Counters {
    /// `struct mm_rss_stat` until 6.1, an array of `struct percpu_counter` since 6.2.
    #[kernel("rss_stat", address)]
    rss_stat: u64,
}

/// The sum, and what each CPU has not added to it yet.
#[derive(KernelType)]
#[kernel("percpu_counter")]
struct PerCpuCounter {
    count: i64,
    counters: u64,
}

/// What a thread has not added to its mm's counters yet (SPLIT_RSS_COUNTING; until 6.1).
#[derive(KernelType)]
#[kernel("task_struct")]
struct SplitCounters {
    #[kernel("rss_stat.count", optional)]
    count: Option<[i32; COUNTERS]>,
}

impl Autopsy<'_> {
    /// The page counters of an mm, with what CPUs or threads had not added yet. `users`: the tasks that use it.
    pub(crate) fn memory_counters(
        &self,
        mm: u64,
        users: impl Iterator<Item = u64>,
    ) -> Result<[i64; COUNTERS]> {
        let mm: Counters = self.kernel.read(mm)?;
        let mut counters = [0i64; COUNTERS];
        if self.kernel.has_member("mm_struct", "rss_stat.count") {
            for (n, counter) in counters.iter_mut().enumerate() {
                *counter = self.kernel.read_i64(mm.rss_stat.wrapping_add(n as u64 * 8))?;
            }
            for task in users {
                let split = self.kernel.read::<SplitCounters>(task)?.count.unwrap_or_default();
                for (counter, more) in counters.iter_mut().zip(split) {
                    *counter = counter.saturating_add(more.into());
                }
            }
            return Ok(counters);
        }
        let size = self.kernel.size_of("percpu_counter")?;
        for (n, counter) in counters.iter_mut().enumerate() {
            let parts: PerCpuCounter = self.kernel.read(mm.rss_stat.wrapping_add(n as u64 * size))?;
            *counter = parts.count;
            for cpu in self.cpus().online() {
                let part = self.kernel.read_i32(self.kernel.per_cpu(parts.counters, cpu)?)?;
                *counter = counter.saturating_add(part.into());
            }
        }
        Ok(counters)
    }
}
