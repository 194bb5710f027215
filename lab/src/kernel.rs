//! The kernels under test: Debian's own packages, unpacked.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, FileContext as _, Result};
use crate::{Lab, host};

/// A kernel series that the project is tested on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Series {
    /// Debian 12's kernel.
    #[serde(rename = "6.1")]
    V6_1,
    /// The newer kernel that Debian 12 also offers.
    #[serde(rename = "6.12")]
    V6_12,
}

impl Series {
    /// All series.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// What comes before and after the number that counts up, in the names of its packages.
    fn package_pattern(self) -> (&'static str, &'static str) {
        match self {
            Self::V6_1 => ("linux-image-6.1.0-", "-cloud-amd64"),
            Self::V6_12 => ("linux-image-6.12.", "+deb12-cloud-amd64"),
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

impl FromStr for Series {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|series| series.to_string() == text)
            .ok_or_else(|| format!("no such kernel: {text} (there are 6.1 and 6.12)"))
    }
}

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Which series.
    pub series: Series,
    /// `uname -r`.
    pub release: String,
    /// Where the package is unpacked: `boot/vmlinuz-RELEASE`, `lib/modules/RELEASE`.
    pub tree: PathBuf,
}

impl Kernel {
    /// The kernel's image on the host.
    pub fn image(&self) -> PathBuf {
        self.tree.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// Its modules' directory on the host.
    pub fn modules(&self) -> PathBuf {
        self.tree.join("lib/modules").join(&self.release)
    }
}

impl Lab {
    /// The kernel of a series: the one that was taken last time, or the newest that apt offers if there is none yet
    /// or the lab was asked to refresh.
    pub fn kernel(&self, series: Series) -> Result<Kernel> {
        let _lock = self.lock("kernels")?;
        let dir = self.cache().join("kernels");
        let current = dir.join(series.to_string());
        let at = |release: String| Kernel { series, tree: dir.join(&release), release };
        if let Ok(release) = fs::read_to_string(&current) {
            let kernel = at(release.trim().to_owned());
            if kernel.image().exists() && !self.wants_refresh(&current) {
                return Ok(kernel);
            }
        }
        let package = self.newest_package(series)?;
        let kernel = at(package.trim_start_matches("linux-image-").to_owned());
        if !kernel.image().exists() {
            self.note(&format!("downloading {package}"));
            let part = dir.join("part");
            let _ = fs::remove_dir_all(&part);
            fs::create_dir_all(part.join("tree")).at(&part)?;
            host::run(Command::new("apt-get").arg("download").arg(&package).current_dir(&part))?;
            let deb = fs::read_dir(&part)
                .at(&part)?
                .flatten()
                .map(|entry| entry.path())
                .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
                .ok_or_else(|| Error::Host(format!("apt-get download {package} left no package")))?;
            host::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(part.join("tree")))?;
            let _ = fs::remove_dir_all(&kernel.tree);
            fs::rename(part.join("tree"), &kernel.tree).at(&kernel.tree)?;
            let _ = fs::remove_dir_all(&part);
        }
        fs::write(&current, &kernel.release).at(&current)?;
        Ok(kernel)
    }

    /// The kernel of a series with its debugging information (`vmlinux`, some 600 MB), from Debian's package; what else is in that is not kept.
    pub fn debug_image(&self, series: Series) -> Result<PathBuf> {
        let release = self.kernel(series)?.release;
        let _lock = self.lock("debug")?;
        let dir = self.cache().join("debug");
        let name = format!("vmlinux-{release}");
        let image = dir.join(&name);
        if image.exists() {
            return Ok(image);
        }
        let part = dir.join("part");
        let _ = fs::remove_dir_all(&part);
        fs::create_dir_all(&part).at(&part)?;
        let package = format!("linux-image-{release}-dbg");
        self.note(&format!("downloading {package}"));
        // The shell, since the package is more than there should be on the disk at once.
        let script = r#"apt-get download "$1" && dpkg-deb --fsys-tarfile ./*.deb | tar x --to-stdout "./usr/lib/debug/boot/$2" > "$2""#;
        host::run(
            Command::new("bash")
                .args(["-o", "pipefail", "-ec", script, "bash", &package, &name])
                .current_dir(&part),
        )?;
        fs::rename(part.join(&name), &image).at(&image)?;
        let _ = fs::remove_dir_all(&part);
        Ok(image)
    }

    fn newest_package(&self, series: Series) -> Result<String> {
        if host::is_root() {
            self.update_apt_once()?;
        }
        let (prefix, suffix) = series.package_pattern();
        let names = host::run(Command::new("apt-cache").arg("pkgnames").arg(prefix))?;
        newest(names.lines(), prefix, suffix).map(str::to_owned).ok_or_else(|| {
            Error::Host(format!(
                "apt knows no package {prefix}*{suffix}: the lab needs the package sources of Debian 12 with its security updates (and `apt-get update`)"
            ))
        })
    }
}

/// The name whose counting number is highest.
fn newest<'a>(names: impl Iterator<Item = &'a str>, prefix: &str, suffix: &str) -> Option<&'a str> {
    names
        .filter_map(|name| {
            Some((name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse::<u32>().ok()?, name))
        })
        .max()
        .map(|(_, name)| name)
}

/// Modules that a guest needs to find its disk and the control channel, in the order of loading. What a kernel has built in
/// is simply not there as a file.
const BOOT_MODULES: &[&str] = &[
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
    "char/virtio_console",
];

/// The boot modules of a kernel, decompressed: file name and contents.
pub(crate) fn boot_modules(kernel: &Kernel) -> Result<Vec<(String, Vec<u8>)>> {
    let drivers = kernel.modules().join("kernel/drivers");
    let mut found = Vec::new();
    for module in BOOT_MODULES {
        let name =
            Path::new(module).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let plain = drivers.join(format!("{module}.ko"));
        let compressed = drivers.join(format!("{module}.ko.xz"));
        let data = if plain.exists() {
            fs::read(&plain).at(&plain)?
        } else if compressed.exists() {
            let output = Command::new("xz").arg("-dc").arg(&compressed).output().at(&compressed)?;
            if !output.status.success() {
                return Err(Error::Host(format!("xz cannot unpack {}", compressed.display())));
            }
            output.stdout
        } else {
            continue;
        };
        found.push((format!("{:02}-{name}.ko", found.len()), data));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_is_found_by_number() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64-unsigned",
            "linux-image-6.1.0-7-amd64",
        ];
        let (prefix, suffix) = Series::V6_1.package_pattern();
        assert_eq!(newest(names.into_iter(), prefix, suffix), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(
            newest(
                ["linux-image-6.12.9+deb13-cloud-amd64"].into_iter(),
                "linux-image-6.12.",
                "+deb12-cloud-amd64"
            ),
            None
        );
    }

    #[test]
    fn series_are_named_as_people_write_them() {
        assert_eq!("6.12".parse(), Ok(Series::V6_12));
        assert_eq!(Series::V6_1.to_string(), "6.1");
        assert!("5.10".parse::<Series>().is_err());
    }
}
