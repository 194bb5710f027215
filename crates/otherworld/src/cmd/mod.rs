//! One file per command.

pub mod arm;
pub mod core;
pub mod disarm;
pub mod inspect;
pub mod log;
pub mod man;
pub mod report;
pub mod status;
pub mod vmcore;

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

/// Does `work`; when it takes longer than a second, a terminal shows a spinner with `message`.
pub fn with_spinner<T>(message: &'static str, work: impl FnOnce() -> T) -> T {
    use std::sync::mpsc;
    use std::time::Duration;
    let (done, ended) = mpsc::channel::<()>();
    let spinner = std::thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(1)) == Err(mpsc::RecvTimeoutError::Timeout) {
            let bar = indicatif::ProgressBar::new_spinner().with_message(message);
            bar.enable_steady_tick(Duration::from_millis(250));
            // Until the sender is dropped.
            _ = ended.recv();
            bar.finish_and_clear();
        }
    });
    let result = work();
    drop(done);
    _ = spinner.join();
    result
}
