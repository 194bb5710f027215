//! Contexts of asynchronous I/O (io_setup(2)).

use serde::{Deserialize, Serialize};

use crate::{AddressSpace, Reason, VmaKind};

/// A context without requests in flight (`kioctx`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AioContext {
    /// Its name for programs: where its ring is mapped.
    pub address: u64,
    /// Bytes of the ring.
    pub len: u64,
    /// How many requests io_setup(2) was asked for.
    pub max_reqs: u32,
    /// What has been completed and not been taken, oldest first: `struct io_event`.
    pub events: Vec<[u64; 4]>,
}

/// Rings and contexts that do not belong together.
pub(crate) fn judge(mm: &AddressSpace, reasons: &mut Vec<Reason>) {
    let rings = || mm.vmas.iter().filter(|vma| matches!(vma.kind, VmaKind::AioRing { .. }));
    let has_context =
        |start: u64, end: u64| mm.aio.iter().any(|c| c.address == start && c.len == end - start);
    for vma in rings().filter(|vma| !has_context(vma.start, vma.end)) {
        let text = format!("mapping {:x}-{:x}: a ring of another's asynchronous I/O", vma.start, vma.end);
        reasons.push(Reason::new("mapping", text));
    }
    for context in mm.aio.iter().filter(|c| !rings().any(|vma| vma.start == c.address)) {
        let text = format!("the asynchronous I/O context {:x} has no ring in memory", context.address);
        reasons.push(Reason::new("mapping", text));
    }
}
