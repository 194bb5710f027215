//! Clocks.

use serde::{Deserialize, Serialize};

/// The dead kernel's clocks at its last tick, in nanoseconds.
///
/// Processes that go on must not see them jump back: `resurrect` puts the processes into a time namespace that
/// continues the monotonic clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// CLOCK_REALTIME, nanoseconds since the epoch.
    pub realtime_ns: i64,
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME.
    pub boottime_ns: i64,
}
