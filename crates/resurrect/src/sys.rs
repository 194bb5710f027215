//! Thin, checked wrappers around the system calls that neither std nor nix offer in the form that is needed here.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use snapshot::Pid;

pub(crate) type Result<T> = std::result::Result<T, Errno>;

/// A system call by number, arguments as they are.
///
/// # Safety
///
/// As for the call itself: pointers among the arguments must fit what the kernel does with them.
pub(crate) unsafe fn raw(nr: libc::c_long, args: [u64; 6]) -> Result<i64> {
    // SAFETY: promised by the caller.
    let r = unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], args[5]) };
    Errno::result(r)
}

/// A path for a system call.
pub(crate) fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

/// open(2).
pub(crate) fn open(path: &Path, flags: i32, mode: u32) -> Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: the path is NUL-terminated; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = Errno::result(libc::open(path.as_ptr(), flags | libc::O_CLOEXEC, mode))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// fcntl(2) with a number as argument.
pub(crate) fn fcntl(fd: RawFd, cmd: i32, arg: i64) -> Result<i32> {
    // SAFETY: only commands that take a number are used.
    Errno::result(unsafe { libc::fcntl(fd, cmd, arg) })
}

/// Bytes of memory that are free or can be freed without swapping; 0 if that is not known.
pub(crate) fn available_memory() -> u64 {
    let text = read_proc("/proc/meminfo").unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// The same open file under the lowest free descriptor from `base` on; the old descriptor is closed.
pub(crate) fn lift(fd: OwnedFd, base: RawFd) -> Result<OwnedFd> {
    if fd.as_raw_fd() >= base {
        return Ok(fd);
    }
    let high = fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, base.into())?;
    // SAFETY: the duplicate is ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(high) })
}

/// dup3(2).
pub(crate) fn dup3(old: RawFd, new: RawFd, cloexec: bool) -> Result<()> {
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: works on descriptor numbers only; whoever owned `new` has been closed before.
    Errno::result(unsafe { libc::dup3(old, new, flags) }).map(drop)
}

/// close_range(2): closes `first` to `last`, both included.
pub(crate) fn close_range(first: RawFd, last: u32) -> Result<()> {
    // SAFETY: numbers only; called where no owner of these descriptors is used afterwards.
    unsafe { raw(libc::SYS_close_range, [first as u64, last.into(), 0, 0, 0, 0]) }.map(drop)
}

/// clone3(2) without shared resources, that is fork(2), with a chosen PID.
///
/// Returns 0 in the child, which must not return from the function that the caller is in but `exit`.
/// `tid` 0 lets the kernel choose. With CLONE_PARENT in `flags` the child becomes a sibling of the caller and inherits the exit signal.
pub(crate) fn fork(flags: u64, tid: Pid, exit_signal: i32) -> Result<Pid> {
    let set_tid = [tid];
    // SAFETY: clone_args is plain data, zero is valid for all fields.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.exit_signal = if flags & libc::CLONE_PARENT as u64 == 0 { exit_signal as u64 } else { 0 };
    if tid != 0 {
        args.set_tid = set_tid.as_ptr() as u64;
        args.set_tid_size = 1;
    }
    // SAFETY: memory is not shared (no CLONE_VM), so that parent and child go on independently on copies of this stack; the process
    // has a single thread, so that no lock is held by somebody who is not there in the child.
    let r = unsafe {
        raw(libc::SYS_clone3, [&raw const args as u64, size_of::<libc::clone_args>() as u64, 0, 0, 0, 0])
    }?;
    Ok(r as Pid)
}

/// Ends the process without running anything of the parent's.
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}

/// rt_sigprocmask(SIG_SETMASK): bit n-1 is signal n.
pub(crate) fn set_signal_mask(mask: u64) -> Result<()> {
    let how = libc::SIG_SETMASK as u64;
    // SAFETY: the kernel reads eight bytes.
    unsafe { raw(libc::SYS_rt_sigprocmask, [how, &raw const mask as u64, 0, 8, 0, 0]) }.map(drop)
}

/// rt_sigaction(2) with the kernel's own structure.
///
/// # Safety
///
/// The handler must be an address that can be called when the signal comes, or the signal must not come before it can.
pub(crate) unsafe fn set_signal_action(signo: i32, action: &snapshot::SigAction) -> Result<()> {
    let raw_action = [action.handler, action.flags, action.restorer, action.mask];
    // SAFETY: the kernel reads 32 bytes in this order; the handler is the caller's responsibility.
    unsafe { raw(libc::SYS_rt_sigaction, [signo as u64, raw_action.as_ptr() as u64, 0, 8, 0, 0]) }.map(drop)
}

/// The action for a signal is SIG_DFL (or cannot be anything else).
pub(crate) fn has_default_action(signo: i32) -> bool {
    let mut old = [0u64; 4];
    // SAFETY: the kernel writes 32 bytes.
    let r = unsafe { raw(libc::SYS_rt_sigaction, [signo as u64, 0, old.as_mut_ptr() as u64, 8, 0, 0]) };
    r.is_err() || old[0] == 0
}

/// clock_gettime(2).
pub(crate) fn clock(id: libc::clockid_t) -> Result<libc::timespec> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    Errno::result(unsafe { libc::clock_gettime(id, &mut now) })?;
    Ok(now)
}

/// prctl(2) with numbers.
pub(crate) fn prctl(option: i32, arg: u64) -> Result<()> {
    // SAFETY: only options whose argument is a number are used.
    unsafe { raw(libc::SYS_prctl, [option as u64, arg, 0, 0, 0, 0]) }.map(drop)
}

/// prlimit(2) of another process: sets, and returns what was before.
pub(crate) fn prlimit(pid: Pid, resource: u32, new: Option<libc::rlimit64>) -> Result<libc::rlimit64> {
    let mut old = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let new = new.as_ref().map_or(0, |n| std::ptr::from_ref(n) as u64);
    // SAFETY: both pointers are null or to structures of the size that the kernel uses.
    unsafe {
        raw(libc::SYS_prlimit64, [pid as u64, resource.into(), new, &raw mut old as u64, 0, 0])?;
    }
    Ok(old)
}

/// All limits of a process, by RLIMIT_*. From /proc: that needs no privilege over its user, unlike prlimit(2).
pub(crate) fn limits(pid: Pid) -> std::io::Result<[libc::rlimit64; 16]> {
    // The order of the lines is that of the numbers.
    let text = String::from_utf8_lossy(&read_proc(&format!("/proc/{pid}/limits"))?).into_owned();
    let mut limits = [libc::rlimit64 { rlim_cur: 0, rlim_max: 0 }; 16];
    for (line, limit) in text.lines().skip(1).zip(&mut limits) {
        // Names have up to 25 columns and blanks in them.
        let mut values = line.get(25..).unwrap_or("").split_whitespace().map(|v| match v {
            "unlimited" => Some(u64::MAX),
            v => v.parse().ok(),
        });
        let mut next = || values.next().flatten().ok_or(std::io::ErrorKind::InvalidData);
        (limit.rlim_cur, limit.rlim_max) = (next()?, next()?);
    }
    Ok(limits)
}

/// ioctl(2) whose argument is a structure.
///
/// # Safety
///
/// `T` must be the type that the request works on.
pub(crate) unsafe fn ioctl<T>(fd: RawFd, request: u64, arg: *mut T) -> Result<i32> {
    // SAFETY: promised by the caller.
    Errno::result(unsafe { libc::ioctl(fd, request as _, arg) })
}

/// ioctl(2) whose argument is a number.
pub(crate) fn ioctl_number(fd: RawFd, request: u64, arg: u64) -> Result<i32> {
    // SAFETY: used with requests that take a number only.
    Errno::result(unsafe { libc::ioctl(fd, request as _, arg) })
}

/// A whole file of /proc. Short reads do not happen there as long as the file is read to its end.
pub(crate) fn read_proc(path: &str) -> std::io::Result<Vec<u8>> {
    std::fs::read(path)
}

/// Writes `text` to a file of /proc or /sys in one write(2).
pub(crate) fn write_proc(path: &str, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    File::options().write(true).open(path)?.write_all(text.as_bytes())
}

/// Copies into another process: `local` and `remote` describe the same number of bytes, in order. Returns how many were copied.
///
/// # Safety
///
/// The local ranges must be readable memory.
pub(crate) unsafe fn write_memory(pid: Pid, local: &[libc::iovec], remote: &[libc::iovec]) -> Result<usize> {
    // SAFETY: the kernel checks the remote ranges; the local ones are the caller's responsibility.
    let n = unsafe {
        libc::process_vm_writev(
            pid,
            local.as_ptr(),
            local.len() as u64,
            remote.as_ptr(),
            remote.len() as u64,
            0,
        )
    };
    Errno::result(n).map(|n| n as usize)
}

/// Reads memory of another process; all of it or an error.
pub(crate) fn read_memory(pid: Pid, addr: u64, buf: &mut [u8]) -> Result<()> {
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let remote = libc::iovec { iov_base: addr as *mut _, iov_len: buf.len() };
    // SAFETY: the local range is `buf`; the kernel checks the remote one.
    let n = Errno::result(unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) })?;
    if n as usize == buf.len() { Ok(()) } else { Err(Errno::EFAULT) }
}

/// The process is somebody: `comm` of whoever has this PID or TID, if anybody has.
pub(crate) fn occupant(id: Pid) -> Option<String> {
    let comm = read_proc(&format!("/proc/{id}/comm")).ok()?;
    Some(String::from_utf8_lossy(&comm).trim_end().to_owned())
}

/// This thread has registered rseq(2).
pub(crate) fn has_rseq() -> bool {
    const ENOUGH: u64 = 32;
    // An address that is aligned but cannot be used: without a registration the kernel gets as far as the address (EFAULT),
    // with one it does not (EINVAL, EBUSY or EPERM).
    let nowhere = !(ENOUGH - 1);
    // SAFETY: nothing at such an address can be registered.
    let r = unsafe { raw(libc::SYS_rseq, [nowhere, ENOUGH, 0, 0x5305_3053, 0, 0]) };
    !matches!(r, Err(Errno::EFAULT | Errno::ENOSYS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_in_order() {
        let all = limits(std::process::id() as Pid).unwrap();
        for (resource, limit) in (0u32..).zip(all) {
            let direct = prlimit(0, resource, None).unwrap();
            assert_eq!((limit.rlim_cur, limit.rlim_max), (direct.rlim_cur, direct.rlim_max), "{resource}");
        }
    }
}
