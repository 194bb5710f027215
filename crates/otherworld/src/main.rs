//! The `otherworld` command, and the crash kernel's PID 1: one static binary.
//!
//! As PID 1 it is [`init`]; as `otherworld resurrect-worker` it is init's [`worker`]; otherwise it is what an administrator
//! types, one file per command in `cmd/`.

mod cli;
mod cmd;
mod dead_memory;
mod init;
mod protocol;
mod report;
mod worker;

use std::process::ExitCode;

use init::mounts::mount_in_child as init_mount;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::main();
    }
    cli::main()
}
