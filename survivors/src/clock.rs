//! Clocks go on, and never back.

use anyhow::{Context, Result, ensure};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};

use crate::Stage;
use crate::stage::sleep;

/// Watched every few milliseconds, across the crash.
pub fn monotonic(stage: &mut Stage) -> Result<()> {
    let clocks = [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_BOOTTIME, ClockId::CLOCK_MONOTONIC_RAW];
    // MONOTONIC_RAW follows a time namespace's monotonic offset, see time_namespaces(7).
    let mut last = [0; 3];
    stage.ready()?;
    let mut damage = stage.options().damage;
    loop {
        let crashed = stage.in_another_kernel();
        for _ in 0..50 {
            for (clock, last) in clocks.iter().zip(&mut last) {
                let now = nanoseconds(*clock)?;
                ensure!(now >= *last, "{clock:?} went back by {} ns", *last - now);
                *last = now;
            }
            if crashed && std::mem::take(&mut damage) {
                last[0] += 1_000_000_000_000;
            }
            sleep(std::time::Duration::from_millis(4));
        }
        if crashed {
            return Ok(());
        }
    }
}

fn nanoseconds(clock: ClockId) -> Result<i64> {
    Ok(clock_gettime(clock).with_context(|| format!("{clock:?}"))?.num_nanoseconds())
}

/// The vDSO's answers lie between the system call's.
pub fn vdso(stage: &mut Stage) -> Result<()> {
    let check = |offset: i64| -> Result<()> {
        for clock in [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_BOOTTIME, ClockId::CLOCK_REALTIME] {
            for _ in 0..100 {
                let before = by_system_call(clock)?;
                let between = nanoseconds(clock)? + offset;
                let after = by_system_call(clock)?;
                ensure!(
                    before <= between && between <= after,
                    "{clock:?} by vDSO is {between}, by system call {before} before and {after} after"
                );
            }
        }
        Ok(())
    };
    let address = vdso_address();
    ensure!(address != 0, "this process has no vDSO");
    check(0)?;

    let crash = stage.crash()?;
    crate::procfs::same("address of the vDSO", &address, &vdso_address())?;
    crate::procfs::mapping(address).context("the vDSO is gone")?;
    check(if crash.damage { 3_600_000_000_000 } else { 0 })
}

fn vdso_address() -> usize {
    // SAFETY: reads the auxiliary vector.
    unsafe { nix::libc::getauxval(nix::libc::AT_SYSINFO_EHDR) as usize }
}

fn by_system_call(clock: ClockId) -> Result<i64> {
    let mut time = nix::libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes one timespec.
    let result = unsafe { nix::libc::syscall(nix::libc::SYS_clock_gettime, clock.as_raw(), &raw mut time) };
    nix::errno::Errno::result(result)?;
    Ok(time.tv_sec * 1_000_000_000 + time.tv_nsec)
}
