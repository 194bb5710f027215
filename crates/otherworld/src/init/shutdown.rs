//! The end of the crash kernel.

use std::path::Path;
use std::time::{Duration, Instant};

use arm::config::FailureAction;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::system::RebootCommand;

use super::console::say;
use super::watchdog::Watchdog;

/// How long ending the processes and writing what is not yet on the disks may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// Ends all processes, brings the disks into order, and reboots or powers off.
pub fn end(action: FailureAction) -> ! {
    say(if action == FailureAction::Halt { "powering off" } else { "rebooting" });
    let how = if action == FailureAction::Halt { RebootCommand::PowerOff } else { RebootCommand::Restart };
    // A disk that does not answer must not keep the machine from it.
    let _watchdog = Watchdog::start(PATIENCE, how);
    end_processes(Duration::from_secs(5));
    rustix::fs::sync();
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for mount in arm::devices::parse_mountinfo(&text).iter().rev() {
        if mount.mountpoint == Path::new("/") || unmount(&mount.mountpoint, UnmountFlags::empty()).is_err() {
            // In use, or the root: at least its journal is clean.
            _ = mount_remount(&mount.mountpoint, MountFlags::RDONLY, c"");
        }
    }
    rustix::fs::sync();
    _ = rustix::system::reboot(how);
    // The kernel refused, which leaves nothing to do; but PID 1 must not end.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// SIGTERM, and SIGKILL for those that have not ended by then.
fn end_processes(patience: Duration) {
    let everybody = Pid::from_raw(-1);
    _ = kill(everybody, Signal::SIGTERM);
    _ = kill(everybody, Signal::SIGCONT);
    if !all_ended(Instant::now() + patience) {
        _ = kill(everybody, Signal::SIGKILL);
        all_ended(Instant::now() + Duration::from_secs(2));
    }
}

/// Reaps until nobody is left, or the deadline has passed.
fn all_ended(deadline: Instant) -> bool {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(WaitStatus::StillAlive) => return false,
            Ok(_) => {}
            Err(_) => return true,
        }
    }
}
