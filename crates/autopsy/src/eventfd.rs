//! Event counters: `eventfd_ctx` (fs/eventfd.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::EventFd;

use crate::Autopsy;
use crate::error::Result;

/// EFD_SEMAPHORE (include/uapi/linux/eventfd.h).
const EFD_SEMAPHORE: u32 = 1;

#[derive(KernelType)]
#[kernel("eventfd_ctx")]
struct Context {
    count: u64,
    flags: u32,
}

impl Autopsy<'_> {
    /// `addr`: of the `eventfd_ctx`.
    pub(crate) fn eventfd(&self, addr: u64) -> Result<EventFd> {
        let context: Context = self.kernel.read(addr)?;
        Ok(EventFd { count: context.count, semaphore: context.flags & EFD_SEMAPHORE != 0 })
    }
}
