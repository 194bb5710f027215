//! Timer descriptors.

use serde::{Deserialize, Serialize};

/// A timer that is read from a descriptor (`struct timerfd_ctx`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerFd {
    /// CLOCK_* as given to timerfd_create(2).
    pub clock: i32,
    /// When it expires, or has expired for the first time since it was looked at.
    pub expiry: Option<TimerFdExpiry>,
    /// 0: once. Nanoseconds.
    pub interval_ns: u64,
    /// Expirations that have not been read.
    pub ticks: u64,
    /// TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET.
    pub settime_flags: u32,
}

/// A point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerFdExpiry {
    /// Nanoseconds on the wall clock, for timers that follow it when it is set.
    pub realtime_ns: Option<i64>,
    /// Nanoseconds from the moment of the panic; negative for what was over.
    pub left_ns: i64,
}

impl TimerFd {
    /// The timer as it was when last looked at: what has expired since, and goes on, has become ticks.
    ///
    /// A periodic timer stands still from its expiry until somebody reads it; then the kernel counts the intervals that went by.
    pub fn brought_up_to_date(mut self) -> Self {
        let Some(expiry) = self.expiry.as_mut().filter(|e| e.left_ns <= 0) else { return self };
        let Ok(interval @ 1..) = i64::try_from(self.interval_ns) else {
            self.expiry = None;
            return self;
        };
        let missed = expiry.left_ns.unsigned_abs() / interval.unsigned_abs() + 1;
        let forward = i64::try_from(missed).unwrap_or(i64::MAX).saturating_mul(interval);
        expiry.left_ns = expiry.left_ns.saturating_add(forward);
        expiry.realtime_ns = expiry.realtime_ns.map(|at| at.saturating_add(forward));
        // The first of them has been counted when it fired.
        self.ticks = self.ticks.saturating_add(missed - u64::from(self.ticks > 0));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer(left_ns: i64, interval_ns: u64, ticks: u64) -> TimerFd {
        let expiry = Some(TimerFdExpiry { realtime_ns: Some(1000 + left_ns), left_ns });
        TimerFd { expiry, interval_ns, ticks, ..TimerFd::default() }
    }

    #[test]
    fn a_timer_that_runs_is_left_alone() {
        assert_eq!(timer(5, 10, 0).brought_up_to_date(), timer(5, 10, 0));
    }

    #[test]
    fn a_timer_that_was_over_is_over() {
        let now = timer(-5, 0, 1).brought_up_to_date();
        assert_eq!((now.expiry, now.ticks), (None, 1));
    }

    #[test]
    fn intervals_that_went_by_are_counted() {
        for (left, ticks, then_left, then_ticks) in
            [(-5, 1, 5, 1), (-25, 1, 5, 3), (0, 1, 10, 1), (-5, 0, 5, 1)]
        {
            let now = timer(left, 10, ticks).brought_up_to_date();
            let expiry = now.expiry.unwrap();
            assert_eq!((expiry.left_ns, now.ticks), (then_left, then_ticks), "{left} {ticks}");
            assert_eq!(expiry.realtime_ns, Some(1000 + then_left));
        }
    }
}
