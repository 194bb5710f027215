//! Signal descriptors: `signalfd_ctx` (fs/signalfd.c; 6.1 and 6.12).

use snapshot::SignalFd;

use crate::Autopsy;
use crate::error::Result;

impl Autopsy<'_> {
    /// `addr`: of the `signalfd_ctx`. It holds the set of the signals that are *not* read.
    pub(crate) fn signalfd(&self, addr: u64) -> Result<SignalFd> {
        let mask = addr.wrapping_add(self.kernel.offset_of("signalfd_ctx", "sigmask")?);
        Ok(SignalFd { mask: !self.kernel.read_u64(mask)? })
    }
}
