//! Running helpers within a deadline.

use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::console::say;

/// Runs `command` to its end; kills it at the deadline. `None`: it was killed.
pub fn within(command: &mut Command, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    let mut child = command.stdin(Stdio::null()).spawn()?;
    wait(&mut child, deadline)
}

/// Waits for the end of somebody else's child; kills it at the deadline, which is an error.
pub fn await_end(child: &Child, deadline: Instant) -> anyhow::Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("it has no PID")?;
    // Whoever waits for it may have done so.
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => {
                _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
                bail!("the worker did not end after its work and was killed");
            }
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Has this program write the dead kernel's own pages into a file.
pub fn vmcore(path: &Path, deadline: Instant) -> anyhow::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["vmcore", "--output"]).arg(path).stdin(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // It says one line at most, which fits into the pipe.
    let Some(status) = wait(&mut child, deadline)? else {
        _ = std::fs::remove_file(path.with_extension("vmcore.part"));
        bail!("it was not done within its deadline");
    };
    if !status.success() {
        let mut words = String::new();
        if let Some(stderr) = child.stderr.take() {
            _ = stderr.take(4096).read_to_string(&mut words);
        }
        bail!("{} ({status})", words.trim());
    }
    Ok(())
}

/// How long a killed process may take to be gone.
const LAST_BREATH: Duration = Duration::from_secs(5);

/// Waits for the end of `child`; kills it at the deadline. `None`: it was killed.
pub fn wait(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
        return child.wait().map(Some);
    };
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => {
                kill(child)?;
                return Ok(None);
            }
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Kills `child` and waits until it is gone, but not for ever: one that waits for a disk that does not answer cannot die, and is
/// left behind.
pub fn kill(child: &mut Child) -> io::Result<()> {
    child.kill()?;
    let deadline = Instant::now() + LAST_BREATH;
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            say(&format!("process {} does not die: it is left behind", child.id()));
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Ends all processes but this one.
///
/// With a worker die those of its processes that it had taken hold of; those that it had only begun would wait for it for ever.
pub fn kill_everybody() {
    // An error means that there was nobody.
    _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), nix::sys::signal::Signal::SIGKILL);
}

/// A shell on the console, until it ends.
pub fn shell() {
    say("a shell; the machine reboots when it ends");
    if let Err(error) = Command::new("/bin/sh").status() {
        say(&format!("cannot start /bin/sh: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_that_ends_is_waited_for() {
        let status =
            within(Command::new("/bin/sh").args(["-c", "exit 3"]), Instant::now() + Duration::from_secs(20));
        assert_eq!(status.unwrap().unwrap().code(), Some(3));
    }

    #[test]
    fn a_helper_that_hangs_is_killed() {
        let began = Instant::now();
        let status =
            within(Command::new("/bin/sleep").arg("1000"), began + Duration::from_millis(50)).unwrap();
        assert!(status.is_none());
        assert!(began.elapsed() < Duration::from_secs(100));
    }
}
