//! Where the libraries' log goes: standard error, as plain lines.

use std::fmt::Write;
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Prints events down to a level. Spans are not used by anybody here.
struct Lines {
    level: Level,
    began: Instant,
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = format!("otherworld: {}:", event.metadata().level().as_str().to_lowercase());
        // Whoever asks for more wants to know what takes so long.
        if self.level > Level::WARN {
            _ = write!(line, " [{:.3} s]", self.began.elapsed().as_secs_f64());
        }
        event.record(&mut Text(&mut line));
        eprintln!("{line}");
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Text<'a>(&'a mut String);

impl Visit for Text<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

/// Begins to log: warnings, and with each `-v` one level more.
pub fn start(verbose: u8) {
    let level = [Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE][usize::from(verbose.min(3))];
    // Fails only when there is a log already.
    _ = tracing::subscriber::set_global_default(Lines { level, began: Instant::now() });
}
