//! The whole machine: PID 1 steps aside, so that it can be made into what PID 1 was.
//!
//! A child, the steward, goes on with all that this program has to do; PID 1 itself waits for it, in a single thread. If PID 1 comes back, the
//! steward ends when the report is written. If not, PID 1 goes on as the small init that it is otherwise: from where it waits, or, when its
//! memory had been given away already, anew ([`COMMAND`]).

use std::ffi::OsString;
use std::process::exit;

use arm::config::FailureAction;
use nix::sys::signal::SigSet;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::{console, shutdown, stay};

/// The argument with which PID 1 begins anew as a small init; the commands to start follow.
pub const COMMAND: &str = "stay";

/// The arguments for that.
pub fn fallback(commands: &[String]) -> Vec<OsString> {
    ["otherworld", COMMAND]
        .into_iter()
        .map(OsString::from)
        .chain(commands.iter().map(OsString::from))
        .collect()
}

/// Goes on in a child; returns there. PID 1 returns never: it stays or ends as the child's end says.
pub fn step_aside(commands: &[String]) -> nix::Result<()> {
    // SAFETY: the only other thread, the watchdog's, has ended.
    match unsafe { fork() }? {
        ForkResult::Child => Ok(()),
        ForkResult::Parent { child } => {
            // Whatever comes is for who it is to become, or for the init that it goes on as.
            _ = SigSet::all().thread_block();
            loop {
                match waitpid(None, None) {
                    Ok(WaitStatus::Exited(pid, 0)) if pid == child => shutdown::end(stay::stay(commands)),
                    Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) if pid == child => {
                        shutdown::end(FailureAction::Reboot)
                    }
                    // Somebody else's end, or an interruption.
                    _ => {}
                }
            }
        }
    }
}

/// The steward's end; PID 1, if it still waits, stays.
pub fn end() -> ! {
    exit(0)
}

/// PID 1 anew, with nothing open. Returns when that is what it was started for: how the machine is to end.
pub fn begin_anew() -> Option<FailureAction> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(COMMAND) {
        return None;
    }
    console::open();
    console::say("PID 1 does not come back: this program goes on in its place");
    Some(stay::stay(&arguments.collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_handed_on() {
        assert_eq!(fallback(&["/bin/agetty tty1".into()]), ["otherworld", "stay", "/bin/agetty tty1"]);
    }
}
