//! The lab's hands inside a guest. One static binary, three lives:
//!
//! - `/init` of the lab's initramfs: loads the modules packed beside it, mounts the root disk, installs itself there as a
//!   systemd service and hands over to the real init. So the guest's image holds distribution packages and nothing of ours.
//! - `lab-agent serve`: answers the host on a virtio-serial port, in the main kernel and in the crash kernel.
//! - `lab-agent spawn`: starts one detached program for `serve` (a single-threaded process may fork safely).

mod boot;
mod copy;
mod serve;
mod spawn;

use std::process::ExitCode;

fn main() -> ExitCode {
    let done = match std::env::args().nth(1).as_deref() {
        Some("serve") => serve::run(),
        Some("spawn") => spawn::helper(),
        // The kernel passes words of its command line that it does not know to /init.
        _ if std::process::id() == 1 => {
            println!("lab: init failed: {}", boot::run());
            boot::power_off();
        }
        _ => Err(std::io::Error::other("usage: lab-agent serve | spawn")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
