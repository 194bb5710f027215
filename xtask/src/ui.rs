//! What the developer sees: one line that moves at a terminal, plain lines elsewhere.

use std::io::IsTerminal as _;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

static START: LazyLock<Instant> = LazyLock::new(Instant::now);
static FAILURES: Mutex<Vec<String>> = Mutex::new(Vec::new());
static SPINNER: LazyLock<Mutex<Option<ProgressBar>>> = LazyLock::new(|| Mutex::new(None));

/// Says what is going on now; the next note takes its place. Not at a terminal: a line with the time since the first one, in minutes and
/// seconds.
pub fn note(text: &str) {
    if !std::io::stderr().is_terminal() {
        let seconds = START.elapsed().as_secs();
        eprintln!("… {:2}:{:02} {text}", seconds / 60, seconds % 60);
        return;
    }
    let mut spinner = SPINNER.lock().unwrap_or_else(PoisonError::into_inner);
    let bar = spinner.get_or_insert_with(|| {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    });
    bar.reset_elapsed();
    bar.set_message(text.to_owned());
}

/// Like [`note`] for what changes many times a second: only at a terminal.
pub fn live(text: &str) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    if let Some(bar) = &*SPINNER.lock().unwrap_or_else(PoisonError::into_inner) {
        bar.set_message(text.to_owned());
    }
}

/// A line that stays, on standard output.
pub fn line(text: impl AsRef<str>) {
    match &*SPINNER.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(bar) => bar.suspend(|| println!("{}", text.as_ref())),
        None => println!("{}", text.as_ref()),
    }
}

/// A line about something that failed: it stays, and is repeated by [`failures`].
pub fn failure(text: impl AsRef<str>) {
    line(&text);
    FAILURES.lock().unwrap_or_else(PoisonError::into_inner).push(text.as_ref().to_owned());
}

/// What has failed so far: where much is printed, nobody should have to search for it.
pub fn failures() -> Vec<String> {
    FAILURES.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Takes the moving line away.
pub fn finish() {
    if let Some(bar) = SPINNER.lock().unwrap_or_else(PoisonError::into_inner).take() {
        bar.finish_and_clear();
    }
}
