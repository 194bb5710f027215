//! Loading the modules that the manifest lists, and those that the dead kernel had.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::io::Errno;

/// Loads the modules in their order. One that fails costs only what needs it: the missing device will be noticed, with this
/// complaint above it on the console.
pub fn load(modules: &[PathBuf], complain: impl Fn(String)) {
    for path in modules {
        let done = File::open(path).map_err(|e| e.to_string()).and_then(|file| {
            match rustix::system::finit_module(&file, c"", 0) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(e) => Err(e.to_string()),
            }
        });
        match done {
            // The initramfs is memory, and there is little: what has been loaded is needed no more.
            Ok(()) => _ = std::fs::remove_file(path),
            Err(why) => complain(format!("cannot load {}: {why}", path.display())),
        }
    }
}

/// Loads the modules that the dead kernel had, from the machine's own file system.
pub fn load_all(names: &[String], deadline: Instant) -> Result<()> {
    let mut command = Command::new("/sbin/modprobe");
    command.args(["--all", "--quiet", "--use-blacklist"]).args(names);
    match super::run::within(&mut command, deadline).context("cannot run modprobe")? {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("modprobe: {status}"),
        None => bail!("modprobe did not end in time"),
    }
}
