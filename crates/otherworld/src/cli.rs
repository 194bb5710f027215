//! What an administrator types.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::{cmd, init_mount, worker};

/// Keeps programs alive through a kernel panic.
///
/// `otherworld arm` loads a crash kernel. When the kernel panics, that one takes over, reads the dead kernel's memory and rebuilds the
/// processes that /etc/otherworld.toml selects; they go on where they were.
#[derive(Parser)]
#[command(name = "otherworld", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    /// Say more about what is done (repeat for more).
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes:
  0  done; for `status`: the machine is armed and up to date
  1  failed
  2  wrong usage, or a mistake in the configuration
  3  not possible on this machine, or (`status`) not armed or not up to date
  4  `core`: done, but something is missing from what was written; it is named";

#[derive(Subcommand)]
enum Command {
    /// Make the machine ready for a panic.
    ///
    /// Checks that everything is there, builds the crash initramfs, loads the crash kernel, and sets the sysctls that turn oopses
    /// and lockups into panics. Arming an armed machine brings it up to date. Lasts until the next boot or `otherworld disarm`.
    Arm(cmd::arm::Args),
    /// Unload the crash kernel and put the sysctls back.
    Disarm,
    /// Tell whether the machine is armed, whether that is up to date, and what is missing.
    Status(cmd::status::Args),
    /// Look into a dead kernel: /proc/vmcore, or a core file.
    Inspect(cmd::inspect::Args),
    /// Write core files of processes of a dead kernel, for gdb.
    Core(cmd::core::Args),
    /// Keep the kernel's own pages of a dead kernel's memory: a small core for `inspect`, crash(8) or drgn.
    Vmcore(cmd::vmcore::Args),
    /// Show the report of a panic.
    Report(cmd::report::Args),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
    /// (PID 1's worker)
    #[command(name = worker::COMMAND, hide = true)]
    Worker {
        #[allow(missing_docs)]
        channel: i32,
    },
    /// (PID 1's helper)
    #[command(name = worker::MOUNT_COMMAND, hide = true)]
    Mount {
        #[allow(missing_docs)]
        node: String,
        #[allow(missing_docs)]
        at: PathBuf,
        #[allow(missing_docs)]
        fs_type: String,
        #[allow(missing_docs)]
        bits: String,
        #[allow(missing_docs)]
        options: String,
    },
}

/// How a command ended, when it ended badly without being an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0
    Done,
    /// 3: not possible on this machine, or not armed.
    NotPossible,
    /// 4: something is missing from what was written.
    Incomplete,
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    cmd::log::start(cli.verbose);
    let result = match cli.command {
        Command::Arm(args) => cmd::arm::run(&args),
        Command::Disarm => cmd::disarm::run(),
        Command::Status(args) => cmd::status::run(&args),
        Command::Inspect(args) => cmd::inspect::run(&args),
        Command::Core(args) => cmd::core::run(&args),
        Command::Vmcore(args) => cmd::vmcore::run(&args),
        Command::Report(args) => cmd::report::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "otherworld", &mut std::io::stdout());
            Ok(Exit::Done)
        }
        Command::Man => cmd::man::run(Cli::command()),
        Command::Worker { channel } => worker::run(channel).map(|()| Exit::Done),
        Command::Mount { node, at, fs_type, bits, options } => {
            init_mount(&node, &at.to_string_lossy(), &fs_type, &bits, &options).map(|()| Exit::Done)
        }
    };
    match result {
        Ok(Exit::Done) => ExitCode::SUCCESS,
        Ok(Exit::NotPossible) => ExitCode::from(3),
        Ok(Exit::Incomplete) => ExitCode::from(4),
        Err(error) => {
            eprintln!("otherworld: {error:#}");
            ExitCode::from(cmd::exit_code(&error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
