//! Finding block devices again, and waiting for them.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use arm::devices::{BlockDevice, file_system_uuid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

/// The kernel's announcements of devices.
struct Uevents(OwnedFd);

impl Uevents {
    fn listen() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        // Group 1 is the kernel itself; 2 would be udev.
        bind(&socket, &SocketAddrNetlink::new(0, 1))?;
        Ok(Self(socket))
    }

    /// Waits for an announcement; `false` when the deadline has passed.
    fn wait(&self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        // What it says does not matter, only that something has changed.
        let mut buf = [0u8; 8192];
        while recv(&self.0, &mut buf[..], RecvFlags::empty()).is_ok() {}
        Ok(true)
    }
}

/// Waits until the device is there; returns its node in /dev.
pub fn wait_for(wanted: &BlockDevice, deadline: Instant) -> Result<PathBuf> {
    // Listens before it looks: what appears in between is not missed.
    let uevents = Uevents::listen()?;
    loop {
        if let Some(node) = find(wanted) {
            return Ok(node);
        }
        if !uevents.wait(deadline)? {
            let there = names();
            let there = if there.is_empty() { "no block device at all".to_owned() } else { there.join(", ") };
            bail!("the root device {} did not appear; there is: {there}", describe(wanted));
        }
    }
}

fn describe(wanted: &BlockDevice) -> String {
    let uuid = wanted.uuid.as_ref().map(|u| format!(", UUID {u}")).unwrap_or_default();
    format!("{} ({}{uuid})", wanted.name, wanted.fs_type)
}

/// The device's node, if it is there: the one whose file system has the right UUID, or, when that is not known, the right name.
pub fn find(wanted: &BlockDevice) -> Option<PathBuf> {
    let mut all = names();
    // Most likely it has its old name.
    all.sort_by_key(|name| *name != wanted.name);
    let fits = |name: &String| match &wanted.uuid {
        None => *name == wanted.name,
        Some(uuid) => File::open(node(name))
            .and_then(|file| file_system_uuid(&file, &wanted.fs_type))
            .is_ok_and(|found| found.as_ref() == Some(uuid)),
    };
    all.iter().find(|name| fits(name)).map(|name| node(name))
}

fn node(name: &str) -> PathBuf {
    // A slash in a device name stands as an exclamation mark in sysfs.
    PathBuf::from("/dev").join(name.replace('!', "/"))
}

fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/class/block") else { return Vec::new() };
    let mut names: Vec<String> = entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names
}
