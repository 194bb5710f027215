//! The console: lines for people, marks for programs.

use std::io::Write;

use crate::report::{Mark, uptime_ms};

/// Makes `/dev/console` the standard streams, now that `/dev` is the machine's.
pub fn open() {
    use rustix::fs::{Mode, OFlags};
    // Without O_NOCTTY the console would become PID 1's controlling terminal.
    if let Ok(console) = rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty()) {
        _ = rustix::stdio::dup2_stdin(&console);
        _ = rustix::stdio::dup2_stdout(&console);
        _ = rustix::stdio::dup2_stderr(&console);
    }
}

/// Prints a line for people. A console that does not work is no reason to stop.
pub fn say(text: &str) {
    _ = writeln!(std::io::stdout().lock(), "otherworld: {text}");
}

/// Takes the time, prints it for programs, and returns it for the report.
pub fn mark(name: &str) -> Mark {
    let mark = Mark { name: name.to_owned(), ms: uptime_ms() };
    print_mark(&mark);
    mark
}

/// Prints a point in time that somebody else has taken.
pub fn print_mark(mark: &Mark) {
    _ = writeln!(std::io::stdout().lock(), "otherworld: mark {} {}", mark.name, mark.ms);
}
