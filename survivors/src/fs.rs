//! Where a process stands in the file system.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::stat::{Mode, umask};

use crate::Stage;
use crate::child::{Child, Ready};
use crate::procfs::same;

/// Working directory and umask.
pub fn context(stage: &mut Stage) -> Result<()> {
    let dir = stage.path("here");
    fs::create_dir(&dir)?;
    write_to_disk(&dir.join("landmark"), "here")?;
    std::env::set_current_dir(&dir)?;
    umask(Mode::from_bits_truncate(0o037));

    let crash = stage.crash()?;
    if crash.damage {
        umask(Mode::from_bits_truncate(0o022));
    }
    same("working directory", &dir, &std::env::current_dir()?)?;
    same("file by its relative name", &"here".to_owned(), &fs::read_to_string("landmark")?)?;
    fs::write("made-after", "")?;
    let mode = fs::metadata("made-after")?.permissions().mode() & 0o777;
    same("mode of a new file", &0o640, &mode)
}

/// What becomes of a closed file that was never synced is not the question here.
fn write_to_disk(path: &Path, text: &str) -> Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(text.as_bytes())?;
    Ok(file.sync_all()?)
}

/// Working directory and umask that a child shares (CLONE_FS).
pub fn shared(stage: &mut Stage) -> Result<()> {
    let dirs = ["first", "second"].map(|name| stage.path(name));
    for dir in &dirs {
        fs::create_dir(dir)?;
        write_to_disk(&dir.join("landmark"), "here")?;
    }
    let (looked, moved) = (stage.path("looked"), stage.path("moved"));
    let wait = || crate::stage::sleep(std::time::Duration::from_millis(20));
    let mut child = Child::sharing(stage, "shared", nix::libc::CLONE_FS, |stage, ready| {
        std::env::set_current_dir(&dirs[0])?;
        ready.announce()?;
        if stage.wait().damage {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        }
        fs::write(&looked, "")?;
        while !moved.exists() {
            wait();
        }
        same("working directory", &dirs[1], &std::env::current_dir()?)?;
        same("umask", &0o027, &umask(Mode::empty()).bits())
    })?;
    same("before the crash", &dirs[0], &std::env::current_dir()?)?;

    stage.crash()?;
    while !looked.exists() && child.is_alive()? {
        wait();
    }
    same("after the crash", &dirs[0], &std::env::current_dir()?)?;
    std::env::set_current_dir(&dirs[1])?;
    umask(Mode::from_bits_truncate(0o027));
    fs::write(&moved, "")?;
    child.join()
}

/// Root directory. In a child, which then sees no /proc; its parent tells it of the crash by making a file.
pub fn root(stage: &mut Stage) -> Result<()> {
    let jail = stage.path("jail");
    fs::create_dir_all(jail.join("inside"))?;
    write_to_disk(&jail.join("landmark"), "jail")?;
    let jailed = |ready: Ready| -> Result<()> {
        nix::unistd::chroot(&jail).context("chroot")?;
        std::env::set_current_dir("/inside")?;
        ready.announce()?;
        let word = loop {
            match fs::read_to_string("/word") {
                Ok(word) if !word.is_empty() => break word,
                _ => crate::stage::sleep(std::time::Duration::from_millis(200)),
            }
        };
        if word == "damage" {
            nix::unistd::chroot("/inside")?;
        }
        same("/landmark", &Some("jail".to_owned()), &fs::read_to_string("/landmark").ok())?;
        same("working directory", &"/inside".into(), &std::env::current_dir()?)?;
        ensure!(!fs::exists("/../proc/self")?, "the jail is open");
        Ok(())
    };
    // From inside, its usual place for messages is out of reach.
    let mut child = Child::fork(stage, "root", |_, ready| {
        jailed(ready).inspect_err(|error| drop(fs::write("/message", format!("{error:#}"))))
    })?;

    let crash = stage.crash()?;
    fs::write(stage.path("jail/word"), if crash.damage { "damage" } else { "go" })?;
    child.join().with_context(|| fs::read_to_string(stage.path("jail/message")).unwrap_or_default())
}
