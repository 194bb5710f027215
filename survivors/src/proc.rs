//! Open files of /proc and /sys.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use anyhow::{Result, ensure};
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Stage;
use crate::child::Child;
use crate::procfs::same;

fn text(file: &mut File) -> Result<String> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// About the process itself, about its child, and about the machine; a directory.
pub fn file(stage: &mut Stage) -> Result<()> {
    let mut own = File::open("/proc/self/status")?;
    let mut memory = File::open("/proc/meminfo")?;
    let mut child = Child::fork(stage, "other", |stage, ready| {
        ready.announce()?;
        stage.wait();
        Ok(())
    })?;
    let mut name = File::options().read(true).write(true).open(format!("/proc/{}/comm", child.pid()))?;
    let dir = File::open("/proc/self/task")?;

    let crash = stage.crash()?;
    if crash.damage {
        text(&mut own)?;
    }
    let pid = format!("\nPid:\t{}\n", std::process::id());
    ensure!(text(&mut own)?.contains(&pid), "its own status does not name it");
    ensure!(text(&mut memory)?.starts_with("MemTotal:"), "strange /proc/meminfo");
    same("name of the child", &text(&mut File::open("/proc/self/comm")?)?, &text(&mut name)?)?;
    let place = fs::metadata("/proc/self/task")?;
    same("inode of the directory", &(place.dev(), place.ino()), &{
        let meta = dir.metadata()?;
        (meta.dev(), meta.ino())
    })?;
    child.join()
}

/// Files about a process that has ended: reading them fails as before.
pub fn ended(stage: &mut Stage) -> Result<()> {
    let mut child = Child::fork(stage, "ended", |_, ready| ready.announce())?;
    let mut dead = File::open(format!("/proc/{}/stat", child.pid()))?;
    let directory = nix::dir::Dir::open(
        format!("/proc/{}/task", child.pid()).as_str(),
        nix::fcntl::OFlag::O_DIRECTORY,
        nix::sys::stat::Mode::empty(),
    )?;
    child.join()?;

    let crash = stage.crash()?;
    let error = |file: &mut File| text(file).map_err(|e| e.downcast::<std::io::Error>().ok()?.raw_os_error());
    let expected = if crash.damage { libc::EIO } else { libc::ESRCH };
    same("what reading about the dead gives", &Err(Some(expected)), &error(&mut dead))?;
    drop(directory);
    Ok(())
}

/// Who watches the table of mounts is told when it changes.
pub fn mountinfo(stage: &mut Stage) -> Result<()> {
    let mut table = File::open("/proc/self/mountinfo")?;
    let place = stage.path("place");
    fs::create_dir(&place)?;

    let crash = stage.crash()?;
    if crash.damage {
        text(&mut table)?;
    }
    ensure!(text(&mut table)?.contains(" / / "), "no root in the table of mounts");
    mount(Some("none"), &place, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    let mut fds = [PollFd::new(table.as_fd(), PollFlags::POLLPRI)];
    let told = poll(&mut fds, PollTimeout::ZERO);
    umount2(&place, MntFlags::empty())?;
    same("a mount is told", &1, &told?)
}

/// An attribute, a directory of /sys, a file of the cgroup hierarchy, and a namespace.
pub fn sysfs(stage: &mut Stage) -> Result<()> {
    const ATTRIBUTE: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    let mut attribute = File::open(ATTRIBUTE)?;
    let dir = File::open("/sys/kernel/mm")?;
    // Not on every machine.
    let mut controllers = File::open("/sys/fs/cgroup/cgroup.controllers").ok();
    let namespace = File::open("/proc/self/ns/net")?;

    let crash = stage.crash()?;
    if crash.damage {
        text(&mut attribute)?;
    }
    same("attribute", &fs::read_to_string(ATTRIBUTE)?, &text(&mut attribute)?)?;
    ensure!(dir.metadata()?.is_dir(), "the directory is none");
    if let Some(controllers) = &mut controllers {
        ensure!(text(controllers)?.ends_with('\n'), "no controllers can be read");
    }
    same("the namespace", &fs::metadata("/proc/self/ns/net")?.ino(), &namespace.metadata()?.ino())
}
