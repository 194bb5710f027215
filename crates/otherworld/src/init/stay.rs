//! What is left of PID 1 once the processes live: a small init.

use std::os::unix::process::CommandExt;
use std::process::Command;

use arm::config::FailureAction;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use rustix::system::RebootCommand;

use super::console::say;

/// Starts the commands, then reaps orphans until somebody asks for the end; returns how it is to be.
///
/// Signals mean what they mean to other small inits: SIGTERM and SIGINT (ctrl-alt-del) reboot, SIGUSR1 halts, SIGUSR2 powers off.
pub fn stay(commands: &[String]) -> FailureAction {
    let mut wanted = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2] {
        wanted.add(signal);
    }
    // Blocked for good, and waited for below: none gets lost between two waits.
    _ = wanted.thread_block();
    // Ctrl-alt-del becomes SIGINT instead of an immediate reset.
    _ = rustix::system::reboot(RebootCommand::CadOff);
    start_all(commands);
    say("ready");
    loop {
        reap();
        match wanted.wait() {
            Ok(Signal::SIGTERM | Signal::SIGINT) => return FailureAction::Reboot,
            Ok(Signal::SIGUSR1 | Signal::SIGUSR2) => return FailureAction::Halt,
            _ => {}
        }
    }
}

/// Starts the commands that the configuration names.
pub fn start_all(commands: &[String]) {
    commands.iter().for_each(|command| start(command));
}

/// Starts a command line in a session of its own, with the console as its terminal.
fn start(command: &str) {
    let mut child = Command::new("/bin/sh");
    child.args(["-c", command]).env_clear().envs([
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("TERM", "linux"),
        ("OTHERWORLD", "1"),
    ]);
    // SAFETY: between fork and exec only async-signal-safe calls are made: setsid, sigprocmask.
    unsafe {
        child.pre_exec(|| {
            _ = rustix::process::setsid();
            _ = SigSet::empty().thread_set_mask();
            Ok(())
        });
    }
    match child.spawn() {
        Ok(_) => say(&format!("started {command}")),
        Err(error) => say(&format!("cannot start {command}: {error}")),
    }
}

/// Waits for whatever has ended.
fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            break;
        }
    }
}
