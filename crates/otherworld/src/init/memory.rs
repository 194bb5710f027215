//! How much memory the crash kernel needed.

/// Watches MemAvailable.
pub struct MemoryWatch {
    /// MemTotal.
    pub total_kib: u64,
    /// The least MemAvailable so far.
    pub least_available_kib: u64,
}

impl MemoryWatch {
    /// Begins to watch.
    pub fn new() -> Self {
        let mut watch = Self { total_kib: 0, least_available_kib: u64::MAX };
        watch.look();
        watch
    }

    /// Looks once.
    pub fn look(&mut self) {
        let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return };
        if let Some(total) = field(&text, "MemTotal:") {
            self.total_kib = total;
        }
        if let Some(available) = field(&text, "MemAvailable:") {
            self.least_available_kib = self.least_available_kib.min(available);
        }
    }
}

/// A field of /proc/meminfo, KiB.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn fields_are_found() {
        let text = "MemTotal:         100 kB\nMemFree: 1 kB\nMemAvailable:   70 kB\n";
        assert_eq!(super::field(text, "MemTotal:"), Some(100));
        assert_eq!(super::field(text, "MemAvailable:"), Some(70));
        assert_eq!(super::field(text, "Buffers:"), None);
    }
}
