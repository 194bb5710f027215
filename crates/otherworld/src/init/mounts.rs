//! Mounting again what the dead kernel had mounted.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use arm::Manifest;
use arm::config::FsckMode;
use arm::devices::BlockDevice;
use rustix::mount::{MountFlags, mount, mount_bind, mount_remount};
use snapshot::{Bytes, Mount, MountFlags as OldFlags};

use super::{device, run, sys};

/// One mount to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub mountpoint: Bytes,
    pub fs_type: Bytes,
    pub flags: OldFlags,
    pub how: How,
}

impl Step {
    /// Whether the processes need not wait for it: interfaces for administrators, which take their time (some load a module).
    pub fn can_wait(&self) -> bool {
        let waits = [
            "securityfs",
            "debugfs",
            "tracefs",
            "bpf",
            "pstore",
            "configfs",
            "fusectl",
            "efivarfs",
            "binfmt_misc",
        ];
        self.how == How::Virtual && waits.iter().any(|fs_type| self.fs_type.as_bytes() == fs_type.as_bytes())
    }
}

/// How a mount comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// A file system on a block device.
    Disk(Box<BlockDevice>),
    /// A file system without a device, in its initial state.
    Virtual,
    /// A directory of a file system that an earlier step has mounted.
    Bind { from: PathBuf },
    /// Not possible, or not needed.
    Skip { why: String },
}

/// File systems that the kernel makes up: mounting them again gives the same.
const KERNEL: [&str; 16] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
    "pstore",
    "mqueue",
    "hugetlbfs",
    "configfs",
    "fusectl",
    "binfmt_misc",
    "efivarfs",
];

/// Decides for each mount of the dead kernel except the root, which is mounted already. Parents come before children.
pub fn plan(old: &[Mount], devices: &[BlockDevice]) -> Vec<Step> {
    // Where the whole of each file system is mounted, for bind mounts to take their part from.
    let mut whole: BTreeMap<(u32, u32), PathBuf> = BTreeMap::new();
    let root_id = old.iter().rfind(|m| m.mountpoint.as_bytes() == b"/").map(|m| m.id);
    let mut steps = Vec::new();
    for m in old {
        let number = (m.dev_major, m.dev_minor);
        if m.mountpoint.as_bytes() == b"/" {
            if Some(m.id) == root_id && m.root.as_bytes() == b"/" {
                whole.insert(number, "/".into());
            }
            continue;
        }
        let fs_type = String::from_utf8_lossy(m.fs_type.as_bytes()).into_owned();
        let known = devices.iter().find(|d| (d.major, d.minor) == number);
        let how = if let Some(base) = whole.get(&number) {
            let part = Path::new(m.root.as_path()).strip_prefix("/").unwrap_or(Path::new(""));
            How::Bind { from: base.join(part) }
        } else if m.root.as_bytes() != b"/" {
            How::Skip { why: format!("shows {} of a file system that is not mounted as a whole", m.root) }
        } else if let Some(device) = known {
            How::Disk(Box::new(device.clone()))
        } else if fs_type == "tmpfs" || fs_type == "ramfs" || KERNEL.contains(&fs_type.as_str()) {
            How::Virtual
        } else if fs_type == "autofs" {
            How::Skip { why: "its automounter is gone".into() }
        } else if m.source.as_bytes().starts_with(b"/dev/") && fs_type != "btrfs" {
            How::Skip { why: format!("{} was mounted after arming, or is not a plain disk", m.source) }
        } else {
            How::Skip { why: format!("file systems of type {fs_type} are not brought back by this version") }
        };
        if matches!(how, How::Disk(_) | How::Virtual) {
            whole.insert(number, m.mountpoint.as_path().to_owned());
        }
        steps.push(Step {
            mountpoint: m.mountpoint.clone(),
            fs_type: m.fs_type.clone(),
            flags: m.flags,
            how,
        });
    }
    steps
}

/// The dead kernel's flags as mount(2) takes them.
pub fn flags(old: OldFlags) -> MountFlags {
    let pairs = [
        (OldFlags::READ_ONLY, MountFlags::RDONLY),
        (OldFlags::SB_READ_ONLY, MountFlags::RDONLY),
        (OldFlags::NOSUID, MountFlags::NOSUID),
        (OldFlags::NODEV, MountFlags::NODEV),
        (OldFlags::NOEXEC, MountFlags::NOEXEC),
        (OldFlags::NOATIME, MountFlags::NOATIME),
        (OldFlags::NODIRATIME, MountFlags::NODIRATIME),
        (OldFlags::RELATIME, MountFlags::RELATIME),
        (OldFlags::SYNCHRONOUS, MountFlags::SYNCHRONOUS),
    ];
    pairs.iter().filter(|(o, _)| old.contains(*o)).fold(MountFlags::empty(), |all, (_, new)| all | *new)
}

/// Lets all mounts pass on what is mounted below them, as systemd has it.
pub fn share_all() -> std::io::Result<()> {
    let flags = rustix::mount::MountPropagationFlags::SHARED | rustix::mount::MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change("/", flags)?)
}

/// Makes one mount. What is worth telling about a success comes back as text.
pub fn carry_out(step: &Step, manifest: &Manifest, until: Instant) -> Result<Option<String>> {
    let at = step.mountpoint.as_path();
    let fs_type = step.fs_type.to_string();
    let flags = flags(step.flags);
    let within = |seconds: u64| (Instant::now() + Duration::from_secs(seconds)).min(until);
    match &step.how {
        How::Skip { why } => bail!("{why}"),
        How::Virtual => {
            if matches!(fs_type.as_str(), "proc" | "sysfs" | "devtmpfs") && sys::is_mount_point(at) {
                return Ok(None);
            }
            // A module that has to be loaded may make the directory.
            _ = rustix::mount::fsopen(fs_type.as_str(), rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC);
            make_directory(at)?;
            mount_with_data(&fs_type, at, &fs_type, flags, &virtual_options(&fs_type, at))?;
            // Its files, owner and mode come with the processes.
            Ok(None)
        }
        How::Bind { from } => {
            if from.is_dir() {
                make_directory(at)?;
            }
            mount_bind(from, at).with_context(|| format!("binding {}", from.display()))?;
            // A bind mount takes its flags from its file system; its own come with a second call.
            let own = mount_remount(at, MountFlags::BIND | flags, c"");
            Ok(own.err().map(|e| format!("it has the flags of its file system instead of its own: {e}")))
        }
        How::Disk(device) => {
            let node =
                device::find(device).ok_or_else(|| anyhow!("its device {} is not there", device.name))?;
            if manifest.config.fsck.mode == FsckMode::Preen {
                fsck(&node, &device.fs_type, within(manifest.config.deadlines.fsck))?;
            }
            make_directory(at)?;
            mount_device(
                &node,
                at,
                &device.fs_type,
                flags,
                &device.options,
                within(manifest.config.deadlines.mount),
            )
        }
    }
}

/// Options of a file system that starts empty. The dead kernel's are not known; these are what systems use at the usual places.
fn virtual_options(fs_type: &str, at: &Path) -> String {
    match fs_type {
        // What login programs expect: group tty, no writing by others.
        "devpts" => "gid=5,mode=620,ptmxmode=666".into(),
        "tmpfs" => tmpfs_options(at).unwrap_or_else(|| "mode=755".into()),
        _ => String::new(),
    }
}

/// Owner and mode of a tmpfs at the places where systems have one.
fn tmpfs_options(at: &Path) -> Option<String> {
    match at.to_str()? {
        "/tmp" | "/var/tmp" | "/dev/shm" | "/run/lock" => Some("mode=1777".into()),
        "/run" => Some("mode=755".into()),
        at => {
            let uid = at.strip_prefix("/run/user/")?;
            uid.bytes().all(|b| b.is_ascii_digit()).then(|| format!("mode=700,uid={uid},gid={uid}"))
        }
    }
}

fn make_directory(at: &Path) -> Result<()> {
    if at.exists() {
        return Ok(());
    }
    fs::create_dir_all(at).with_context(|| format!("cannot make {}", at.display()))
}

fn mount_with_data(source: &str, at: &Path, fs_type: &str, flags: MountFlags, data: &str) -> Result<()> {
    let data = CString::new(data).context("mount options")?;
    mount(source, at, fs_type, flags, data.as_c_str()).map_err(Into::into)
}

/// Mounts a disk file system in a child, since the replay of a damaged journal may take for ever.
///
/// When the options of old are refused (they may have been for this mount's moment only), the file system is mounted without, which
/// is returned as text.
pub fn mount_device(
    node: &Path,
    at: &Path,
    fs_type: &str,
    flags: MountFlags,
    options: &str,
    deadline: Instant,
) -> Result<Option<String>> {
    let text = |p: &Path| p.to_str().map(str::to_owned).context("a path that is not UTF-8");
    let (source, target, bits) = (text(node)?, text(at)?, flags.bits().to_string());
    let mounted = |options: &str| {
        let mut command = Command::new("/proc/self/exe");
        command.args([crate::worker::MOUNT_COMMAND, &source, &target, fs_type, &bits, options]);
        match run::within(&mut command, deadline)? {
            Some(status) => Ok(status.success()),
            None => bail!("mounting {source} did not end in time"),
        }
    };
    if mounted(options)? {
        Ok(None)
    } else if !options.is_empty() && mounted("")? {
        Ok(Some(format!("its options {options} were refused: it has the default ones")))
    } else {
        bail!("mounting {source} as {fs_type} failed")
    }
}

/// The child's part of [`mount_device`].
pub fn mount_in_child(node: &str, at: &str, fs_type: &str, bits: &str, options: &str) -> Result<()> {
    let flags = MountFlags::from_bits_truncate(bits.parse()?);
    let at = Path::new(at);
    mount_with_data(node, at, fs_type, flags, options)
        .with_context(|| format!("mount {node} at {}", at.display()))
}

/// Checks a file system and repairs what is safe to repair (fsck -p). A type without a checker is taken as it is.
pub fn fsck(node: &Path, fs_type: &str, deadline: Instant) -> Result<()> {
    let Some(program) = ["/sbin", "/usr/sbin"]
        .map(|d| PathBuf::from(format!("{d}/fsck.{fs_type}")))
        .into_iter()
        .find(|p| p.exists())
    else {
        return Ok(());
    };
    let Some(status) = run::within(Command::new(program).arg("-p").arg(node), deadline)? else {
        bail!("the check of {} did not end in time", node.display());
    };
    // fsck(8): 1 errors corrected, 2 corrected and a reboot is advised (for mounted ones), 4 errors left, 8 and more it failed.
    match status.code() {
        Some(0..=3) => Ok(()),
        Some(code) if code & 4 != 0 => {
            bail!(
                "{} has errors that only an administrator can repair: run fsck.{fs_type} on it",
                node.display()
            )
        }
        _ => bail!("the check of {} failed with {status}", node.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn old(id: i32, at: &str, root: &str, fs_type: &str, source: &str, number: (u32, u32)) -> Mount {
        Mount {
            id,
            parent: 0,
            mountpoint: at.into(),
            root: root.into(),
            fs_type: fs_type.into(),
            source: source.into(),
            dev_major: number.0,
            dev_minor: number.1,
            flags: OldFlags::RELATIME,
            peer_group: 0,
            master: 0,
        }
    }

    fn disk(name: &str, number: (u32, u32)) -> BlockDevice {
        BlockDevice {
            major: number.0,
            minor: number.1,
            name: name.into(),
            fs_type: "ext4".into(),
            uuid: None,
            options: String::new(),
            mountpoint: "/".into(),
        }
    }

    #[test]
    fn every_mount_is_accounted_for() {
        let mounts = [
            old(1, "/", "/", "ext4", "/dev/vda1", (254, 1)),
            old(2, "/proc", "/", "proc", "proc", (0, 20)),
            old(3, "/run", "/", "tmpfs", "tmpfs", (0, 21)),
            old(4, "/srv", "/", "ext4", "/dev/vdb", (254, 16)),
            old(5, "/srv/www", "/data/www", "ext4", "/dev/vdb", (254, 16)),
            old(6, "/var/tmp", "/var/scratch", "ext4", "/dev/vda1", (254, 1)),
            old(7, "/run/lock", "/lock", "tmpfs", "tmpfs", (0, 21)),
            old(8, "/home", "/", "nfs4", "server:/home", (0, 44)),
            old(9, "/mnt", "/", "ext4", "/dev/vdc", (254, 32)),
            old(10, "/net", "/", "autofs", "systemd-1", (0, 30)),
        ];
        let steps = plan(&mounts, &[disk("vda1", (254, 1)), disk("vdb", (254, 16))]);
        let how: Vec<(String, &How)> = steps.iter().map(|s| (s.mountpoint.to_string(), &s.how)).collect();
        assert_eq!(how.len(), mounts.len() - 1, "all but the root");
        assert_eq!(how[0], ("/proc".into(), &How::Virtual));
        assert_eq!(how[1], ("/run".into(), &How::Virtual));
        assert!(matches!(how[2].1, How::Disk(d) if d.name == "vdb"));
        assert!(!steps.iter().any(Step::can_wait), "programs may have files open in all of these");
        assert_eq!(how[3].1, &How::Bind { from: "/srv/data/www".into() });
        assert_eq!(how[4].1, &How::Bind { from: "/var/scratch".into() });
        assert_eq!(how[5].1, &How::Bind { from: "/run/lock".into() });
        for (n, part) in [(6, "nfs4"), (7, "/dev/vdc was mounted after arming"), (8, "automounter")] {
            assert!(matches!(how[n].1, How::Skip { why } if why.contains(part)), "{:?}", how[n]);
        }
    }

    #[test]
    fn interfaces_for_administrators_can_wait() {
        let steps = plan(&[old(1, "/sys/kernel/debug", "/", "debugfs", "debugfs", (0, 7))], &[]);
        assert!(steps[0].can_wait());
    }

    #[test]
    fn temporary_directories_are_for_everybody_and_others_are_not() {
        assert_eq!(virtual_options("tmpfs", Path::new("/tmp")), "mode=1777");
        assert_eq!(virtual_options("tmpfs", Path::new("/run")), "mode=755");
        assert_eq!(virtual_options("tmpfs", Path::new("/run/user/1000")), "mode=700,uid=1000,gid=1000");
        assert_eq!(virtual_options("tmpfs", Path::new("/srv/fast")), "mode=755");
        assert_eq!(tmpfs_options(Path::new("/srv/fast")), None, "a guess, which is told");
        assert_eq!(virtual_options("sysfs", Path::new("/sys")), "");
    }

    #[test]
    fn flags_are_kept() {
        let both = OldFlags::NOSUID | OldFlags::SB_READ_ONLY;
        assert_eq!(flags(both), MountFlags::NOSUID | MountFlags::RDONLY);
        assert_eq!(flags(OldFlags::empty()), MountFlags::empty());
    }
}
