//! What can go wrong in the lab.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// An error of the lab; its text is meant for the developer at the terminal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host lacks something; the text says what to install.
    #[error("{0}")]
    Host(String),
    /// A file operation failed.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A command of the host failed.
    #[error("`{command}` failed ({status}){}", if .output.is_empty() { String::new() } else { format!(":\n{}", .output) })]
    Command {
        /// The command line.
        command: String,
        /// Its exit status or why it could not start.
        status: String,
        /// The last lines that it printed.
        output: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {:.1} s", .after.as_secs_f64())]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// QEMU refused or ended.
    #[error("QEMU: {0}")]
    Qemu(String),
    /// The agent in the guest could not do what it was asked.
    #[error("guest: {0}")]
    Guest(String),
    /// A program in the guest did not exit with 0.
    #[error("in the guest, `{program}` {how}{}", if .output.is_empty() { String::new() } else { format!(":\n{}", .output) })]
    Program {
        /// Its argv.
        program: String,
        /// How it ended.
        how: String,
        /// What it printed.
        output: String,
    },
}

/// Result with the lab's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Names the file in an I/O error.
pub(crate) trait FileContext<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> FileContext<T> for std::io::Result<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::File { path: path.as_ref().into(), source })
    }
}
