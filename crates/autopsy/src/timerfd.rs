//! Timer descriptors: `timerfd_ctx` (fs/timerfd.c), `hrtimer` (include/linux/hrtimer_defs.h), `alarm` (include/linux/alarmtimer.h;
//! 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{TimerFd, TimerFdExpiry};

use crate::Autopsy;
use crate::error::Result;
use crate::syscall::Expiry;

// include/uapi/linux/time.h
const CLOCK_REALTIME: i32 = 0;
const CLOCK_REALTIME_ALARM: i32 = 8;
const CLOCK_BOOTTIME_ALARM: i32 = 9;
/// HRTIMER_STATE_ENQUEUED, ALARMTIMER_STATE_ENQUEUED.
const ENQUEUED: u32 = 1;

#[derive(KernelType)]
#[kernel("timerfd_ctx")]
struct Context {
    #[kernel("t.tmr._softexpires")]
    expires: i64,
    #[kernel("t.tmr.state")]
    state: u8,
    #[kernel("t.tmr.base")]
    base: u64,
    #[kernel("t.alarm.node.expires")]
    alarm_expires: i64,
    #[kernel("t.alarm.state")]
    alarm_state: u32,
    tintv: i64,
    ticks: u64,
    clockid: i32,
    expired: u16,
    settime_flags: u16,
}

impl Autopsy<'_> {
    /// `addr`: of the `timerfd_ctx`.
    pub(crate) fn timerfd(&self, addr: u64) -> Result<TimerFd> {
        let context: Context = self.kernel.read(addr)?;
        let is_alarm = matches!(context.clockid, CLOCK_REALTIME_ALARM | CLOCK_BOOTTIME_ALARM);
        let (expiry, enqueued) = match is_alarm {
            true => {
                let expiry = Expiry { clock: context.clockid, ns: context.alarm_expires };
                (Some(expiry), context.alarm_state & ENQUEUED != 0)
            }
            // One that was never set has no base.
            false if context.base == 0 => (None, false),
            false => {
                let clock = self.timers().clock_of(context.base);
                let expiry = clock.map(|clock| Expiry { clock, ns: context.expires });
                (expiry, u32::from(context.state) & ENQUEUED != 0)
            }
        };
        let interval_ns = u64::try_from(context.tintv).unwrap_or(0);
        let runs = enqueued || context.expired != 0 && interval_ns > 0;
        let expiry = expiry.filter(|_| runs).and_then(|expiry| {
            let follows_wall_clock = matches!(expiry.clock, CLOCK_REALTIME | CLOCK_REALTIME_ALARM);
            Some(TimerFdExpiry {
                realtime_ns: follows_wall_clock.then_some(expiry.ns),
                left_ns: expiry.remaining(self.now())?,
            })
        });
        if runs && expiry.is_none() {
            return Err(crate::error::corrupt("timerfd_ctx", addr, "runs on a clock that is not known"));
        }
        Ok(TimerFd {
            clock: context.clockid,
            expiry,
            interval_ns,
            ticks: context.ticks,
            settime_flags: context.settime_flags.into(),
        })
    }
}
