//! Resource limits.

use anyhow::Result;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::Stage;
use crate::procfs::same;

const ALL: [Resource; 16] = [
    Resource::RLIMIT_AS,
    Resource::RLIMIT_CORE,
    Resource::RLIMIT_CPU,
    Resource::RLIMIT_DATA,
    Resource::RLIMIT_FSIZE,
    Resource::RLIMIT_LOCKS,
    Resource::RLIMIT_MEMLOCK,
    Resource::RLIMIT_MSGQUEUE,
    Resource::RLIMIT_NICE,
    Resource::RLIMIT_NOFILE,
    Resource::RLIMIT_NPROC,
    Resource::RLIMIT_RSS,
    Resource::RLIMIT_RTPRIO,
    Resource::RLIMIT_RTTIME,
    Resource::RLIMIT_SIGPENDING,
    Resource::RLIMIT_STACK,
];

/// All sixteen, several of them lowered, some with soft and hard apart.
pub fn all(stage: &mut Stage) -> Result<()> {
    for (resource, soft, hard) in [
        (Resource::RLIMIT_NOFILE, 123, 456),
        (Resource::RLIMIT_CORE, 0, 4096),
        (Resource::RLIMIT_FSIZE, 1 << 30, 1 << 31),
        (Resource::RLIMIT_SIGPENDING, 77, 78),
        (Resource::RLIMIT_STACK, 4 << 20, 6 << 20),
        (Resource::RLIMIT_RTTIME, 1_000_000, 2_000_000),
    ] {
        setrlimit(resource, soft, hard)?;
    }
    let look = || ALL.map(|resource| (resource, getrlimit(resource)));
    let before = look();

    let crash = stage.crash()?;
    if crash.damage {
        setrlimit(Resource::RLIMIT_NOFILE, 124, 456)?;
    }
    for (before, after) in before.iter().zip(&look()) {
        same("limit", before, after)?;
    }
    Ok(())
}
