//! One file per command.

pub mod arm;
pub mod disarm;
pub mod inspect;
pub mod log;
pub mod man;
pub mod report;
pub mod status;

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;

/// This program, as the machine names it.
pub fn this_program() -> Result<PathBuf> {
    Ok(std::env::current_exe()?)
}

/// The exit code for an error: see `otherworld --help`.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<arm_crate::ConfigError>() {
        2
    } else if matches!(error.downcast_ref(), Some(arm_crate::Error::NotPossible(_))) {
        3
    } else {
        1
    }
}

/// The library; the module of the same name is the command.
use ::arm as arm_crate;

/// Prints a value as JSON.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// Prints text. A reader that went away early (`| head`) is no error.
pub fn print(text: &str) -> Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// A spinner with `message` on a terminal, for what may take more than a second.
pub fn spinner(message: &str) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new_spinner().with_message(message.to_owned());
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    bar
}
