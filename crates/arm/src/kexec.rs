//! kexec_file_load(2).

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::Root;

// include/uapi/linux/kexec.h
const KEXEC_FILE_UNLOAD: libc::c_ulong = 1;
const KEXEC_FILE_ON_CRASH: libc::c_ulong = 2;
const KEXEC_FILE_NO_INITRAMFS: libc::c_ulong = 4;

/// Where the kernel keeps a loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The one started by a panic.
    Crash,
    /// The one started by reboot(2).
    Reboot,
}

impl Slot {
    fn flags(self) -> libc::c_ulong {
        if self == Self::Crash { KEXEC_FILE_ON_CRASH } else { 0 }
    }

    /// Whether a kernel is loaded, as sysfs tells.
    pub fn is_loaded(self, root: &Root) -> bool {
        let file = if self == Self::Crash { "kexec_crash_loaded" } else { "kexec_loaded" };
        root.read(format!("/sys/kernel/{file}")).is_ok_and(|v| v == "1")
    }
}

/// Loads `kernel` with `initramfs` into `slot`.
///
/// The kernel drops what a crash slot held *before* it looks at the new files: after an error the slot is empty.
pub fn load(slot: Slot, kernel: &File, initramfs: &File, cmdline: &str) -> io::Result<()> {
    let cmdline = CString::new(cmdline).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    let bytes = cmdline.as_bytes_with_nul();
    // SAFETY: both descriptors are open for the time of the call, and the command line is readable for its whole length.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            bytes.len(),
            bytes.as_ptr(),
            slot.flags(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Empties `slot`.
pub fn unload(slot: Slot) -> io::Result<()> {
    let flags = slot.flags() | KEXEC_FILE_UNLOAD | KEXEC_FILE_NO_INITRAMFS;
    // SAFETY: with these flags the kernel looks at no other argument.
    let result =
        unsafe { libc::syscall(libc::SYS_kexec_file_load, -1, -1, 0, std::ptr::null::<u8>(), flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What to do about an error of [`load`] or [`unload`].
pub fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            "run as root; if you are, kernel.kexec_load_disabled=1 or kernel lockdown forbids it until the next boot"
        }
        Some(libc::ENOSYS) => {
            "this kernel has no kexec_file_load (CONFIG_KEXEC_FILE): use the distribution's kernel"
        }
        Some(libc::EBUSY) => "another program is loading a kernel at this moment: try again",
        Some(libc::EADDRNOTAVAIL | libc::ENOMEM) => {
            "the reserved region is missing or too small: enlarge crashkernel= on the kernel's command line and reboot"
        }
        Some(libc::ENOEXEC) => "the kernel image is not one that can be loaded (a bzImage is needed)",
        Some(libc::EKEYREJECTED | libc::ENOKEY | libc::EBADMSG | libc::ENODATA) => {
            "the kernel wants a signed image: use the distribution's signed kernel package"
        }
        _ => "see the last lines of the kernel log (dmesg)",
    }
}
