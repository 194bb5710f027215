//! `inspect dmesg`, `inspect panic`

use snapshot::{Frame, LogRecord, Panic};

/// A record as dmesg(1) prints it.
pub fn log_line(record: &LogRecord) -> String {
    let (seconds, micros) = (record.ts_ns / 1_000_000_000, record.ts_ns / 1000 % 1_000_000);
    format!("[{seconds:5}.{micros:06}] {}\n", record.text)
}

pub fn text(panic: &Panic) -> String {
    let message = if panic.message.is_empty() { "no message in the log" } else { &panic.message };
    let mut out = format!("Kernel panic - not syncing: {message}\n");
    if let (Some(cpu), Some(tid)) = (panic.cpu, panic.tid) {
        out.push_str(&format!("CPU {cpu}, task {tid} ({})\n", panic.comm));
    }
    out.extend(panic.stack.iter().map(frame_line));
    out
}

/// A line of a kernel stack; what is guessed has a question mark.
pub fn frame_line(frame: &Frame) -> String {
    let mark = if frame.guessed { "? " } else { "" };
    format!("  [<{:016x}>] {mark}{}\n", frame.address, frame.symbol)
}
