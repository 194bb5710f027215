//! Files in memory that never had a name (memfd_create(2)).

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

use nix::errno::Errno;
use snapshot::{Bytes, Inode, PhysMem, Reason};

use crate::{hugetlb, page_cache, sys};

/// What the kernel puts before the name (mm/memfd.c).
const PREFIX: &[u8] = b"/memfd:";
/// Forbids mappings that do not exist yet, so that it has to wait until they do; and with it the seal of seals.
const LATE: u32 = libc::F_SEAL_FUTURE_WRITE as u32;
const SEAL_SEAL: u32 = libc::F_SEAL_SEAL as u32;

/// Makes one with its contents, and with those seals that do not stand in the way of anybody.
pub(crate) fn make(path: &Bytes, seals: u32, inode: &Inode, mem: &dyn PhysMem) -> Result<File, Reason> {
    let io = |what: &str, e: Errno| Reason::new("memfd", format!("{what}: {e}"));
    let name = path.as_bytes().strip_prefix(PREFIX).unwrap_or(path.as_bytes());
    let name = CString::new(name).map_err(|_| Reason::new("memfd", "its name has a NUL byte"))?;
    // Without permission to seal the only seal is that against seals.
    let huge = inode.huge_page.map_or(0, |size| libc::MFD_HUGETLB | hugetlb::size_flags(size));
    let flags = libc::MFD_CLOEXEC | huge | if seals == SEAL_SEAL { 0 } else { libc::MFD_ALLOW_SEALING };
    // SAFETY: a NUL-terminated name; the descriptor that comes back is nobody else's.
    let file = unsafe {
        let fd =
            Errno::result(libc::memfd_create(name.as_ptr(), flags)).map_err(|e| io("memfd_create", e))?;
        File::from_raw_fd(fd)
    };
    page_cache::copy_contents(&file, inode, mem).map_err(|e| Reason::new("memfd", e.to_string()))?;
    if seals != SEAL_SEAL && seals & LATE == 0 {
        add_seals(&file, seals).map_err(|e| io("F_ADD_SEALS", e))?;
    }
    Ok(file)
}

/// Adds the seals that [`make`] had to leave out. `made`: the file, however it is open.
pub(crate) fn seal_late(made: &File, seals: u32) -> Result<(), Errno> {
    if seals & LATE == 0 {
        return Ok(());
    }
    let path = format!("/proc/self/fd/{}", made.as_raw_fd());
    add_seals(&File::from(sys::open(path.as_ref(), libc::O_RDWR, 0)?), seals)
}

fn add_seals(file: &File, seals: u32) -> Result<(), Errno> {
    if seals != 0 {
        sys::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals.into())?;
    }
    Ok(())
}
