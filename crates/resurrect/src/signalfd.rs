//! Signal descriptors.

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;
use snapshot::SignalFd;

use crate::sys;

/// Makes one. It reads the signals of whoever reads it.
pub(crate) fn restore(state: &SignalFd) -> Result<OwnedFd, Errno> {
    let mask = state.mask;
    let args = [u64::MAX, &raw const mask as u64, 8, libc::SFD_CLOEXEC as u64, 0, 0];
    // SAFETY: the kernel reads a set of eight bytes; the descriptor that comes back is nobody else's.
    unsafe { Ok(OwnedFd::from_raw_fd(sys::raw(libc::SYS_signalfd4, args)? as i32)) }
}
