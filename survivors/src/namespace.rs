//! Mount and UTS namespaces of one's own.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::Stage;
use crate::procfs::same;

/// The table of mounts without the numbers, which the kernel gives as it likes,
/// and without those of other survivors: what they mount in the meantime comes here as well.
fn table(own: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let line = |line: &str| -> Option<String> {
        let fields: Vec<&str> = line.split(' ').collect();
        let place = Path::new(fields[4]);
        if own.parent().is_some_and(|all| place.starts_with(all)) && !place.starts_with(own) {
            return None;
        }
        let dash = fields.iter().position(|field| *field == "-")?;
        let ways = fields[6..dash].iter().map(|way| way.split(':').next().unwrap_or(way));
        Some(format!(
            "{} {} {} {} {}",
            fields[3],
            fields[4],
            fields[5],
            ways.collect::<Vec<_>>().join(","),
            fields.get(dash + 1)?
        ))
    };
    // The automounter (systemd) need not come back, and what it serves goes with it.
    let mut lines: Vec<String> =
        text.lines().filter_map(line).filter(|line| !line.ends_with(" autofs")).collect();
    lines.sort();
    Ok(lines)
}

/// That it is not in the namespace of PID 1.
fn is_its_own(kind: &str) -> Result<()> {
    let of = |whom: &str| fs::read_link(format!("/proc/{whom}/ns/{kind}"));
    // Containers may not let it look.
    ensure!(of("1").ok() != Some(of("self")?), "it is in the namespace of PID 1");
    Ok(())
}

/// A sandbox as systemd makes them: a file system in memory, a directory that is read-only, one that is somewhere else.
pub fn mounts(stage: &mut Stage) -> Result<()> {
    let (private, read_only, moved) = (stage.path("private"), stage.path("read-only"), stage.path("moved"));
    for dir in [&private, &read_only, &moved] {
        fs::create_dir(dir)?;
    }
    let landmark = read_only.join("landmark");
    fs::File::create(&landmark)?.sync_all()?;
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).context("make slaves")?;
    mount(none, "/", none, MsFlags::MS_SHARED | MsFlags::MS_REC, none).context("share")?;
    mount(Some("none"), &private, Some("tmpfs"), MsFlags::MS_NODEV, none).context("mount tmpfs")?;
    fs::write(private.join("secret"), "nobody else sees this")?;
    let mut open = fs::File::open(private.join("secret"))?;
    open.seek(SeekFrom::Start(7))?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC;
    mount(Some(&read_only), &read_only, none, MsFlags::MS_BIND, none).context("bind")?;
    mount(none, &read_only, none, flags, none).context("make read-only")?;
    mount(Some(&read_only), &moved, none, MsFlags::MS_BIND, none).context("bind elsewhere")?;
    mount(none, &moved, none, MsFlags::MS_PRIVATE, none).context("make private")?;
    let own = private.parent().context("no directory")?;
    let was = table(own)?;

    let crash = stage.crash()?;
    if crash.damage {
        umount2(&moved, MntFlags::MNT_DETACH)?;
    }
    let is = table(own)?;
    same("number of mounts", &was.len(), &is.len())?;
    for (was, is) in was.iter().zip(&is) {
        same("a mount", was, is)?;
    }
    let mut text = String::new();
    open.read_to_string(&mut text)?;
    same("rest of an open file", &"else sees this".to_owned(), &text)?;
    same("a file", &"nobody else sees this".to_owned(), &fs::read_to_string(private.join("secret"))?)?;
    let denied = fs::write(&landmark, "x").map_err(|e| e.raw_os_error());
    same("writing where it is read-only", &Err(Some(Errno::EROFS as i32)), &denied)?;
    ensure!(moved.join("landmark").exists(), "nothing is at the other place");
    is_its_own("mnt")
}

/// A socket that listens under a name that only those in its mount namespace see.
pub fn socket(stage: &mut Stage) -> Result<()> {
    let private = stage.path("private");
    fs::create_dir(&private)?;
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).context("make slaves")?;
    mount(Some("none"), &private, Some("tmpfs"), MsFlags::empty(), none).context("mount tmpfs")?;
    let name = private.join("socket");
    let listener = UnixListener::bind(&name)?;
    fs::set_permissions(&name, PermissionsExt::from_mode(0o624))?;
    let mut waiting = UnixStream::connect(&name)?;
    waiting.write_all(b"early")?;

    let crash = stage.crash()?;
    if crash.damage {
        fs::remove_file(&name)?;
    }
    same("mode of its name", &0o624, &(fs::metadata(&name)?.permissions().mode() & 0o777))?;
    let mut late = UnixStream::connect(&name)?;
    late.write_all(b"late")?;
    drop((waiting, late));
    for expected in ["early", "late"] {
        let mut text = String::new();
        listener.accept()?.0.read_to_string(&mut text)?;
        same("what was sent", &expected.to_owned(), &text)?;
    }
    Ok(())
}

/// Host and domain name of its own.
pub fn uts(stage: &mut Stage) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWUTS).context("unshare")?;
    nix::unistd::sethostname("survivor").context("sethostname")?;
    fs::write("/proc/sys/kernel/domainname", "otherworld")?;

    let crash = stage.crash()?;
    if crash.damage {
        nix::unistd::sethostname("somebody")?;
    }
    let names = nix::sys::utsname::uname()?;
    same("host name", &Some("survivor"), &names.nodename().to_str())?;
    same("domain name", &Some("otherworld"), &names.domainname().to_str())?;
    is_its_own("uts")
}
