//! Block devices: which ones hold the mounted file systems, what identifies them, and whose drivers they need.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Root;

/// What stands for the type of file system of a swap area.
const SWAP: &str = "swap";

/// A block device with a mounted file system or a swap area, described so that the crash kernel finds it again.
///
/// Names such as `vda1` and device numbers depend on the order in which drivers probe; the UUID that the file system carries
/// does not, nor does the place in the device tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDevice {
    /// Device number in the main kernel.
    pub major: u32,
    #[allow(missing_docs)]
    pub minor: u32,
    /// Name in the main kernel, `vda1`.
    pub name: String,
    /// File system on it, `ext4`, or `swap`.
    pub fs_type: String,
    /// UUID in the file system's super block, 16 bytes as lower-case hexadecimal with dashes; `None` when the type is not known here.
    pub uuid: Option<String>,
    /// Mount options of the super block that mount(2) takes as data (`commit=600`).
    pub options: String,
    /// Where it is mounted first; `none` for a swap area.
    pub mountpoint: PathBuf,
}

/// One line of `/proc/self/mountinfo`, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountLine {
    #[allow(missing_docs)]
    pub major: u32,
    #[allow(missing_docs)]
    pub minor: u32,
    #[allow(missing_docs)]
    pub mountpoint: PathBuf,
    #[allow(missing_docs)]
    pub fs_type: String,
    #[allow(missing_docs)]
    pub source: String,
    /// Options of the super block.
    pub options: String,
}

/// Parses `/proc/self/mountinfo` (proc(5)); lines that make no sense are left out.
pub fn parse_mountinfo(text: &str) -> Vec<MountLine> {
    let line = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let (major, minor) = left.get(2)?.split_once(':')?;
        let mut right = right.split(' ');
        Some(MountLine {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            mountpoint: PathBuf::from(unescape_octal(left.get(4)?)),
            fs_type: right.next()?.to_owned(),
            source: unescape_octal(right.next()?),
            options: right.next()?.to_owned(),
        })
    };
    text.lines().filter_map(line).collect()
}

/// Undoes the `\040` escapes of mountinfo.
fn unescape_octal(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&b, tail)) = rest.split_first() {
        let code = (b == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(b);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Why the file system at `/` cannot be mounted by the crash kernel.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RootError {
    /// mountinfo has no `/`.
    #[error("/proc/self/mountinfo names no file system at /")]
    NotMounted,
    /// Not on a block device.
    #[error("the root file system is {fs_type} ({from}), which is not on a block device")]
    NoBlockDevice {
        #[allow(missing_docs)]
        fs_type: String,
        /// What is mounted.
        from: String,
    },
    /// Its mounts do not tell their devices.
    #[error("the root file system is Btrfs ({from}), which this version does not bring back")]
    Btrfs {
        /// What is mounted.
        from: String,
    },
    /// Built by user space out of other devices.
    #[error("the root file system is on {name}, which user space puts together ({kind})")]
    Stacked {
        /// `dm-0`
        name: String,
        /// What does it.
        kind: &'static str,
    },
}

/// All block devices with a mounted file system, that of `/` first.
pub fn mounted(root: &Root) -> Result<Vec<BlockDevice>, RootError> {
    let lines = parse_mountinfo(&root.read("/proc/self/mountinfo").unwrap_or_default());
    // Later lines cover earlier ones.
    let top = lines.iter().rfind(|l| l.mountpoint == Path::new("/")).ok_or(RootError::NotMounted)?;
    if top.fs_type == "btrfs" {
        return Err(RootError::Btrfs { from: top.source.clone() });
    }
    let first = describe(root, top)
        .ok_or_else(|| RootError::NoBlockDevice { fs_type: top.fs_type.clone(), from: top.source.clone() })?;
    if let Some(kind) = stacked(root, &first) {
        return Err(RootError::Stacked { name: first.name, kind });
    }
    let mut all = vec![first];
    for line in &lines {
        if let Some(device) = describe(root, line)
            && stacked(root, &device).is_none()
            && !all.iter().any(|d| (d.major, d.minor) == (device.major, device.minor))
        {
            all.push(device);
        }
    }
    Ok(all)
}

/// All block devices that are swap areas, in use or not.
pub fn swap(root: &Root) -> Vec<BlockDevice> {
    let Ok(entries) = fs::read_dir(root.join("/sys/dev/block")) else { return Vec::new() };
    let numbers = entries.filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        let (major, minor) = name.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    let mut numbers: Vec<(u32, u32)> = numbers.collect();
    numbers.sort_unstable();
    let device = |(major, minor)| {
        let line = MountLine {
            major,
            minor,
            mountpoint: PathBuf::from("none"),
            fs_type: SWAP.to_owned(),
            source: String::new(),
            options: String::new(),
        };
        describe(root, &line).filter(|device| device.uuid.is_some() && stacked(root, device).is_none())
    };
    numbers.into_iter().filter_map(device).collect()
}

fn describe(root: &Root, line: &MountLine) -> Option<BlockDevice> {
    let dir = sysfs_dir(root, line.major, line.minor)?;
    let name = dir.file_name()?.to_str()?.to_owned();
    let uuid = File::open(root.join("/dev").join(&name))
        .ok()
        .and_then(|f| file_system_uuid(&f, &line.fs_type).ok()?);
    Some(BlockDevice {
        major: line.major,
        minor: line.minor,
        name,
        fs_type: line.fs_type.clone(),
        uuid,
        options: mount_data(&line.options),
        mountpoint: line.mountpoint.clone(),
    })
}

/// The device's directory below `/sys/devices`.
fn sysfs_dir(root: &Root, major: u32, minor: u32) -> Option<PathBuf> {
    fs::canonicalize(root.join(format!("/sys/dev/block/{major}:{minor}"))).ok()
}

/// What assembles the device, if it is not simply there once its driver is loaded.
fn stacked(root: &Root, device: &BlockDevice) -> Option<&'static str> {
    let dir = sysfs_dir(root, device.major, device.minor)?;
    [("dm", "device mapper: LVM, LUKS or multipath"), ("md", "software RAID"), ("loop", "a loop device")]
        .into_iter()
        .find(|(attribute, _)| {
            dir.join(attribute).is_dir() || dir.parent().is_some_and(|p| p.join(attribute).is_dir())
        })
        .map(|(_, kind)| kind)
}

/// Super-block options without those that mount(2) takes as flags.
fn mount_data(options: &str) -> String {
    const FLAGS: [&str; 6] = ["rw", "ro", "sync", "dirsync", "lazytime", "mand"];
    let data = options.split(',').filter(|o| !FLAGS.contains(o) && !o.starts_with("errors="));
    data.collect::<Vec<_>>().join(",")
}

/// The UUID in the super block of an ext2/3/4 or XFS file system, or in the header of a swap area, on `device`.
pub fn file_system_uuid(device: &File, fs_type: &str) -> io::Result<Option<String>> {
    // Position of the super block, of the magic in it, the magic, position of the UUID.
    let (block, magic_at, magic, uuid_at): (u64, u64, &[u8], u64) = match fs_type {
        "ext2" | "ext3" | "ext4" => (1024, 0x38, &[0x53, 0xef], 0x68),
        "xfs" => (0, 0, b"XFSB", 32),
        // The magic ends the first page.
        SWAP => (0, 4086, b"SWAPSPACE2", 1036),
        _ => return Ok(None),
    };
    let mut found = vec![0; magic.len()];
    device.read_exact_at(&mut found, block + magic_at)?;
    if found != magic {
        return Ok(None);
    }
    let mut uuid = [0; 16];
    device.read_exact_at(&mut uuid, block + uuid_at)?;
    let mut text = String::new();
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    Ok(Some(text))
}

/// What the way from a block device up to the root of the device tree asks to be loaded: modules of bound drivers, and the
/// modaliases of devices that have no driver bound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drivers {
    /// Module names, the outermost bus first.
    pub modules: Vec<String>,
    /// For [`crate::modules::ModuleTree::by_alias`].
    pub aliases: Vec<String>,
}

/// Walks from `/sys/dev/block/MAJOR:MINOR` up its parents.
pub fn drivers(root: &Root, major: u32, minor: u32) -> io::Result<Drivers> {
    let top = fs::canonicalize(root.join("/sys"))?;
    let start = fs::canonicalize(root.join(format!("/sys/dev/block/{major}:{minor}")))?;
    let mut found = Drivers::default();
    let mut seen = BTreeSet::new();
    walk_up(&start, &top, &mut found, &mut seen);
    found.modules.reverse();
    found.aliases.reverse();
    let mut once = BTreeSet::new();
    found.modules.retain(|m| once.insert(m.clone()));
    Ok(found)
}

fn walk_up(start: &Path, top: &Path, found: &mut Drivers, seen: &mut BTreeSet<PathBuf>) {
    for dir in start.ancestors().take_while(|d| d.starts_with(top) && *d != top) {
        if !seen.insert(dir.to_owned()) {
            continue;
        }
        let driver = dir.join("driver");
        if driver.exists() {
            // Drivers that are built in may have the link too, to a name that no module of the tree has (pcieport: pcieportdrv);
            // only what can be loaded has a state.
            let module = driver.join("module");
            if module.join("initstate").exists()
                && let Ok(module) = fs::read_link(module)
            {
                found.modules.extend(module.file_name().map(|n| n.to_string_lossy().into_owned()));
            }
        } else if let Ok(alias) = fs::read_to_string(dir.join("modalias")) {
            found.aliases.push(alias.trim().to_owned());
        }
        // A multipath NVMe name space hangs off a virtual subsystem; its controllers are links beside it.
        let is_nvme_subsystem =
            dir.file_name().is_some_and(|n| n.to_string_lossy().starts_with("nvme-subsys"));
        if is_nvme_subsystem && let Ok(entries) = fs::read_dir(dir) {
            for entry in entries.flatten().filter(|e| e.path().is_symlink()) {
                if entry.file_name().to_string_lossy().starts_with("nvme")
                    && let Ok(controller) = fs::canonicalize(entry.path())
                {
                    walk_up(&controller, top, found, seen);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const MOUNTINFO: &str = "\
22 28 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
28 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro,commit=600
30 28 254:17 / /srv/a\\040b rw,relatime shared:3 - xfs /dev/vdb1 rw,attr2,noquota
31 28 254:17 /sub /mnt rw,relatime shared:3 - xfs /dev/vdb1 rw,attr2,noquota
";

    /// A virtio disk behind PCI, as sysfs shows it, with a partition.
    fn machine(dir: &Path) -> Root {
        let root = Root::new(dir);
        let disk = |pci: &str, virtio: &str, name: &str, number: &str| {
            let device = root.join(format!("/sys/devices/pci0000:00/{pci}/{virtio}"));
            let partition = device.join(format!("block/{name}/{name}1"));
            fs::create_dir_all(&partition).unwrap();
            fs::create_dir_all(root.join("/sys/dev/block")).unwrap();
            let link = root.join(format!("/sys/dev/block/{number}"));
            symlink(
                partition.strip_prefix(root.join("/sys")).map(|p| Path::new("../..").join(p)).unwrap(),
                link,
            )
            .unwrap();
            for (at, driver, module) in [
                (device.clone(), "bus/virtio/drivers/virtio_blk", Some("virtio_blk")),
                (device.parent().unwrap().to_owned(), "bus/pci/drivers/virtio-pci", Some("virtio_pci")),
            ] {
                let driver = root.join("/sys").join(driver);
                fs::create_dir_all(&driver).unwrap();
                if let Some(module) = module {
                    let module_dir = root.join("/sys/module").join(module);
                    fs::create_dir_all(&module_dir).unwrap();
                    fs::write(module_dir.join("initstate"), "live\n").unwrap();
                    _ = symlink(&module_dir, driver.join("module"));
                }
                symlink(&driver, at.join("driver")).unwrap();
                fs::write(at.join("modalias"), "is:bound\n").unwrap();
            }
        };
        disk("0000:00:04.0", "virtio1", "vda", "254:1");
        disk("0000:00:05.0", "virtio2", "vdb", "254:17");
        fs::write(root.join("/sys/devices/pci0000:00/modalias"), "acpi:PNP0A03:\n").unwrap();
        fs::create_dir_all(root.join("/proc/self")).unwrap();
        fs::write(root.join("/proc/self/mountinfo"), MOUNTINFO).unwrap();
        fs::create_dir_all(root.join("/dev")).unwrap();
        let mut ext4 = vec![0u8; 4096];
        ext4[1024 + 0x38..][..2].copy_from_slice(&[0x53, 0xef]);
        for (i, b) in ext4[1024 + 0x68..][..16].iter_mut().enumerate() {
            *b = i as u8;
        }
        fs::write(root.join("/dev/vda1"), ext4).unwrap();
        root
    }

    #[test]
    fn mounted_devices_are_found_with_their_identity() {
        let dir = tempfile::tempdir().unwrap();
        let all = mounted(&machine(dir.path())).unwrap();
        assert_eq!(all.len(), 2, "bind mounts are not devices of their own");
        assert_eq!((all[0].name.as_str(), all[0].fs_type.as_str()), ("vda1", "ext4"));
        assert_eq!(all[0].uuid.as_deref(), Some("00010203-0405-0607-0809-0a0b0c0d0e0f"));
        assert_eq!(all[0].options, "commit=600");
        assert_eq!((all[1].name.as_str(), all[1].uuid.as_deref()), ("vdb1", None));
        assert_eq!(all[1].mountpoint, Path::new("/srv/a b"));
    }

    #[test]
    fn drivers_are_found_outermost_first() {
        let dir = tempfile::tempdir().unwrap();
        let found = drivers(&machine(dir.path()), 254, 1).unwrap();
        assert_eq!(found.modules, ["virtio_pci", "virtio_blk"]);
        assert_eq!(found.aliases, ["acpi:PNP0A03:"], "only of devices without a driver");
    }

    #[test]
    fn built_in_drivers_ask_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        let (port, driver) =
            (root.join("/sys/devices/pci0000:00"), root.join("/sys/bus/pci/drivers/pcieport"));
        fs::create_dir_all(&driver).unwrap();
        fs::create_dir_all(root.join("/sys/module/pcieportdrv")).unwrap();
        symlink(root.join("/sys/module/pcieportdrv"), driver.join("module")).unwrap();
        symlink(&driver, port.join("driver")).unwrap();
        let found = drivers(&root, 254, 1).unwrap();
        assert_eq!(found.modules, ["virtio_pci", "virtio_blk"]);
        assert!(found.aliases.is_empty());
    }

    #[test]
    fn a_multipath_nvme_leads_to_its_controller() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        let disk = root.join("/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1");
        let controller = root.join("/sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0");
        let driver = root.join("/sys/bus/pci/drivers/nvme");
        for d in [&disk, &controller, &driver, &root.join("/sys/module/nvme"), &root.join("/sys/dev/block")] {
            fs::create_dir_all(d).unwrap();
        }
        fs::write(root.join("/sys/module/nvme/initstate"), "live\n").unwrap();
        symlink(&disk, root.join("/sys/dev/block/259:0")).unwrap();
        symlink(&controller, disk.parent().unwrap().join("nvme0")).unwrap();
        symlink(root.join("/sys/module/nvme"), driver.join("module")).unwrap();
        symlink(&driver, root.join("/sys/devices/pci0000:00/0000:01:00.0/driver")).unwrap();
        assert_eq!(drivers(&root, 259, 0).unwrap().modules, ["nvme"]);
    }

    #[test]
    fn roots_that_are_not_understood_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        let nfs = "28 1 0:44 / / rw - nfs4 server:/export rw,vers=4.2\n";
        fs::write(root.join("/proc/self/mountinfo"), nfs).unwrap();
        assert_eq!(
            mounted(&root).unwrap_err().to_string(),
            "the root file system is nfs4 (server:/export), which is not on a block device"
        );
        let btrfs = "28 1 0:26 /@ / rw - btrfs /dev/vda1 rw,subvol=/@\n";
        fs::write(root.join("/proc/self/mountinfo"), btrfs).unwrap();
        assert!(mounted(&root).unwrap_err().to_string().contains("Btrfs (/dev/vda1)"));
        fs::write(root.join("/proc/self/mountinfo"), MOUNTINFO).unwrap();
        fs::create_dir_all(root.join("/sys/dev/block/254:1/dm")).unwrap();
        assert!(matches!(mounted(&root), Err(RootError::Stacked { .. })));
        fs::write(root.join("/proc/self/mountinfo"), "").unwrap();
        assert_eq!(mounted(&root), Err(RootError::NotMounted));
    }
}
