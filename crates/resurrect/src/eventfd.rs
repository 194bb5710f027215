//! Event counters.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use snapshot::EventFd;

/// Makes one with its count.
pub(crate) fn restore(state: &EventFd) -> Result<OwnedFd, Errno> {
    let flags =
        libc::EFD_CLOEXEC | libc::EFD_NONBLOCK | if state.semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: numbers only; the descriptor that comes back is nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(Errno::result(libc::eventfd(0, flags))?) };
    if state.count > 0 {
        let bytes = state.count.to_ne_bytes();
        // SAFETY: eight readable bytes.
        Errno::result(unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) })?;
    }
    Ok(fd)
}
