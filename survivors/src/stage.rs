//! What a survivor plays on: announcing, waiting, noticing.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::{Timespec, nanosleep};
use rustix::time::{ClockId, clock_gettime};

/// Between two looks at the boot id. Long enough that a crash hits the sleep and not the look.
const POLL: Duration = Duration::from_millis(200);

/// How a survivor is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Damage the state just before checking.
    pub damage: bool,
    /// Run on this CPU only.
    pub cpu: Option<usize>,
    /// Length of the sleeps whose duration is checked.
    pub period: Duration,
    /// A serial line (or, in tests, what behaves like one).
    pub tty: PathBuf,
    /// The file whose change means: another kernel.
    pub boot_id: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            damage: false,
            cpu: None,
            period: Duration::from_secs(5),
            tty: "/dev/ttyS1".into(),
            boot_id: "/proc/sys/kernel/random/boot_id".into(),
        }
    }
}

/// What [`Stage::crash`] learned.
#[derive(Clone, Copy, Debug)]
pub struct Crash {
    /// `--damage`: the survivor is to spoil its state now.
    pub damage: bool,
    /// The longest time by CLOCK_MONOTONIC between two looks: how long this process was away, plus at most one poll.
    pub gap: Duration,
}

/// Handed to a survivor's function.
pub struct Stage {
    name: &'static str,
    options: Options,
    dir: PathBuf,
    ready_file: PathBuf,
    boot_id: Vec<u8>,
    boot_id_trace: Trace,
    is_ready: bool,
}

impl Stage {
    pub(crate) fn new(
        name: &'static str,
        options: Options,
        dir: PathBuf,
        ready_file: PathBuf,
    ) -> Result<Self> {
        let boot_id = fs::read(&options.boot_id)
            .with_context(|| format!("cannot read {}", options.boot_id.display()))?;
        let boot_id_trace = trace(&options.boot_id)
            .with_context(|| format!("cannot look at {}", options.boot_id.display()))?;
        Ok(Self { name, options, dir, ready_file, boot_id, boot_id_trace, is_ready: false })
    }

    /// How this survivor is run.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// A directory of its own, for its files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in [`Stage::dir`].
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Whether [`Stage::ready`] has been called.
    pub(crate) fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Tells the world that everything is set up.
    pub fn ready(&mut self) -> Result<()> {
        let unfinished = self.ready_file.with_extension("ready-unfinished");
        let mut file = fs::File::create(&unfinished)?;
        writeln!(file, "ready {} {}", self.name, std::process::id())?;
        drop(file);
        fs::rename(&unfinished, &self.ready_file)?;
        self.is_ready = true;
        Ok(())
    }

    /// Whether another kernel runs than at the start.
    ///
    /// The file is opened only when it seems to be another one: a crash that met the descriptor would find a program with a file of
    /// the kernel's open, which is not what any survivor is about.
    pub fn in_another_kernel(&self) -> bool {
        if trace(&self.options.boot_id).is_ok_and(|trace| trace == self.boot_id_trace) {
            return false;
        }
        // A file that cannot be read (or is just being rewritten by a test) says nothing.
        fs::read(&self.options.boot_id).is_ok_and(|id| !id.is_empty() && id != self.boot_id)
    }

    /// Sleeps until another kernel runs.
    pub fn wait(&self) -> Crash {
        let mut gap = Duration::ZERO;
        let mut last = monotonic();
        loop {
            sleep(POLL);
            let crashed = self.in_another_kernel();
            let now = monotonic();
            gap = gap.max(now.saturating_sub(last));
            last = now;
            if crashed {
                return Crash { damage: self.options.damage, gap };
            }
        }
    }

    /// Ready; and then it happens. Returns in another kernel.
    pub fn crash(&mut self) -> Result<Crash> {
        self.ready()?;
        Ok(self.wait())
    }
}

/// What a file looks like from outside: device, inode, length, time of last change. The kernel makes the inodes of its own files anew
/// in each boot, with that moment as their time.
type Trace = (u64, u64, u64, i64, i64);

fn trace(path: &Path) -> std::io::Result<Trace> {
    let file = fs::metadata(path)?;
    Ok((file.dev(), file.ino(), file.len(), file.ctime(), file.ctime_nsec()))
}

/// CLOCK_MONOTONIC as a duration.
pub fn monotonic() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Sleeps at least this long, whatever interrupts.
pub fn sleep(duration: Duration) {
    let mut rest = Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() };
    while let rustix::thread::NanosleepRelativeResult::Interrupted(remaining) = nanosleep(&rest) {
        rest = remaining;
    }
}
