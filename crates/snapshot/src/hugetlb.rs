//! Pools of huge pages (hugetlb).

use serde::{Deserialize, Serialize};

/// The pool of one page size (`hstate`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    /// Bytes of a page.
    pub page_size: u64,
    /// Pages in the pool, without those beyond its limit that a program had asked for (surplus).
    pub total: u64,
}

impl HugePages {
    /// As directories of /sys/kernel/mm/hugepages are called.
    pub fn name(&self) -> String {
        format!("hugepages-{}kB", self.page_size >> 10)
    }
}
