//! The machine's surroundings: kernel file systems, PIDs, host name, loopback.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

/// Mounts /proc, /sys and /dev.
pub fn mount_api_file_systems() -> Result<()> {
    let hardened = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for (fs_type, at, flags) in
        [("proc", "/proc", hardened), ("sysfs", "/sys", hardened), ("devtmpfs", "/dev", MountFlags::NOSUID)]
    {
        _ = fs::create_dir(at);
        mount(fs_type, at, fs_type, flags, None).with_context(|| format!("cannot mount {at}"))?;
    }
    Ok(())
}

/// Lets the kernel number new tasks from the top of the range, so that kernel threads and helpers do not take the PIDs of
/// processes that are to come back.
pub fn keep_old_pids_free(pid_max: u32) {
    /// Room for the crash kernel's own tasks until the processes are back.
    const ROOM: u32 = 8192;
    _ = fs::write("/proc/sys/kernel/pid_max", pid_max.to_string());
    _ = fs::write("/proc/sys/kernel/ns_last_pid", pid_max.saturating_sub(ROOM).max(300).to_string());
}

/// Goes on numbering where the dead kernel stopped.
pub fn continue_pids_after(highest: i32) {
    _ = fs::write("/proc/sys/kernel/ns_last_pid", highest.to_string());
}

/// The machine keeps its name.
pub fn set_hostname(name: &[u8]) {
    if !name.is_empty() {
        _ = rustix::system::sethostname(name);
    }
}

/// `ip link set lo up`
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: plain system calls on a descriptor of our own and a structure that lives across them.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let result = libc::ioctl(fd, libc::SIOCSIFFLAGS, &request);
        let error = io::Error::last_os_error();
        libc::close(fd);
        if result < 0 { Err(error) } else { Ok(()) }
    }
}

/// Whether something is mounted at `path`.
pub fn is_mount_point(path: &Path) -> bool {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    arm::devices::parse_mountinfo(&text).iter().any(|line| line.mountpoint == path)
}
