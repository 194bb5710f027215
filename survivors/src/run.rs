//! Runs one survivor from its start to its verdict.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::Pid;

use crate::{Options, Stage, Survivor};

/// Where a survivor leaves its traces, all named after its result file.
#[derive(Clone, Debug)]
pub struct Paths {
    /// `FILE`: the verdict.
    pub out: PathBuf,
    /// `FILE.ready`: it is set up.
    pub ready: PathBuf,
    /// `FILE.d`: its own files.
    pub dir: PathBuf,
}

impl Paths {
    /// For a result file.
    pub fn new(out: &Path) -> Self {
        let with = |suffix: &str| {
            let mut name = OsString::from(out);
            name.push(suffix);
            PathBuf::from(name)
        };
        Self { out: out.to_owned(), ready: with(".ready"), dir: with(".d") }
    }
}

/// Runs a survivor in this process, which must have no other thread; returns the exit code.
///
/// Old results at the same place are removed first. Returns after the verdict has been written and synced; fails only
/// if it cannot be written.
pub fn run(survivor: &Survivor, out: &Path, options: Options) -> Result<u8> {
    let out = std::path::absolute(out)?;
    let paths = Paths::new(&out);
    for file in [&paths.out, &paths.ready] {
        remove_if_there(fs::remove_file(file))
            .with_context(|| format!("cannot remove {}", file.display()))?;
    }
    remove_if_there(fs::remove_dir_all(&paths.dir))?;

    let mut stage = None;
    let result = catch_unwind(AssertUnwindSafe(|| {
        fs::create_dir(&paths.dir).with_context(|| format!("cannot create {}", paths.dir.display()))?;
        become_independent(&options)?;
        let stage = stage.insert(Stage::new(survivor.name, options, paths.dir.clone(), paths.ready.clone())?);
        (survivor.body)(stage)
    }))
    .unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(anyhow::anyhow!("it panicked: {text}"))
    });
    let was_ready = stage.is_some_and(|stage| stage.is_ready());

    let name = survivor.name;
    let (line, code) = match result {
        Ok(()) => (format!("pass {name}"), 0),
        Err(error) if was_ready => (format!("fail {name}: {error:#}"), 1),
        Err(error) => (format!("fail {name}: set-up: {error:#}"), 2),
    };
    write_verdict(&paths.out, &line.replace('\n', " "))?;
    Ok(code)
}

fn remove_if_there(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Leaves behind whatever the starter handed down, so that a survivor's fate depends on its own state only.
fn become_independent(options: &Options) -> Result<()> {
    // Fails for a process group leader only: then the session is that of who started it, on purpose.
    let _ = nix::unistd::setsid();
    let null =
        OpenOptions::new().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    drop(null);
    close_all_but_stdio()?;
    std::env::set_current_dir("/")?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    if let Some(cpu) = options.cpu {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on CPU {cpu}"))?;
    }
    Ok(())
}

fn close_all_but_stdio() -> Result<()> {
    // SAFETY: called before this process has opened anything that it wants to keep: no owned descriptor is above 2.
    let result = unsafe { nix::libc::close_range(3, nix::libc::c_uint::MAX, 0) };
    nix::errno::Errno::result(result).context("close_range")?;
    Ok(())
}

/// The line must be on the disk when it is said: the next crash may be near.
fn write_verdict(out: &Path, line: &str) -> Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(out)
        .with_context(|| format!("cannot open {}", out.display()))?;
    writeln!(file, "{line}")?;
    file.sync_all()?;
    if let Some(dir) = out.parent() {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}
