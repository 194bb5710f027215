//! What is remembered between `arm` and `disarm`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::sysctl::Sysctls;
use crate::{Root, checks, replace_file};

/// Everything of ours on disk lies below.
pub const STATE_DIR: &str = "/var/lib/otherworld";
/// Present while the machine is armed.
pub const STATE_FILE: &str = "/var/lib/otherworld/armed.json";

/// What was armed, when, with what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Armed {
    /// [`Armed::FORMAT`] of the writer.
    pub format: u32,
    /// `/proc/sys/kernel/random/boot_id`: arming does not outlive the boot.
    pub boot_id: String,
    /// Seconds since the epoch.
    pub armed_at: u64,
    #[allow(missing_docs)]
    pub kernel_release: String,
    /// The image that was loaded.
    pub kernel: PathBuf,
    /// The crash kernel's command line.
    pub cmdline: String,
    #[allow(missing_docs)]
    pub initramfs_bytes: u64,
    /// The crash kernel's generation.
    pub generation: u32,
    /// Physical address of the register saver's header.
    pub saver: Option<u64>,
    /// The program that becomes init.
    pub init: PathBuf,
    #[allow(missing_docs)]
    pub init_fingerprint: Option<u64>,
    #[allow(missing_docs)]
    pub config_path: PathBuf,
    #[allow(missing_docs)]
    pub config_fingerprint: Option<u64>,
    /// Of the set of block devices with mounted file systems.
    pub mounts_fingerprint: u64,
    /// Another program's crash kernel was loaded before ours.
    #[serde(default)]
    pub replaced_foreign: bool,
    /// Values to put back.
    pub sysctls_before: Sysctls,
    /// Values that were set.
    pub sysctls_set: Sysctls,
}

impl Armed {
    /// The present version of the file.
    pub const FORMAT: u32 = 1;

    /// What was armed since this boot; `None` when nothing was, or another version did it. A file that may not be read says
    /// neither, and is an error.
    pub fn load(root: &Root) -> io::Result<Option<Self>> {
        let bytes = match std::fs::read(root.join(STATE_FILE)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let armed: Option<Self> = serde_json::from_slice(&bytes).ok();
        Ok(armed.filter(|a| a.format == Self::FORMAT && a.boot_id == boot_id(root)))
    }

    pub(crate) fn save(&self, root: &Root) -> io::Result<()> {
        replace_file(&root.join(STATE_FILE), &serde_json::to_vec_pretty(self)?, 0o600)
    }

    pub(crate) fn forget(root: &Root) -> io::Result<()> {
        match std::fs::remove_file(root.join(STATE_FILE)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// What has changed since, in words.
    pub fn stale(&self, root: &Root) -> Vec<String> {
        let mut all = Vec::new();
        if fingerprint(&root.join(&self.init)) != self.init_fingerprint {
            all.push(format!("{} has changed", self.init.display()));
        }
        if fingerprint(&root.join(&self.config_path)) != self.config_fingerprint {
            all.push(format!("{} has changed", self.config_path.display()));
        }
        if checks::release(root) != self.kernel_release {
            all.push(format!("another kernel runs than the {} that was armed", self.kernel_release));
        }
        if mounts_fingerprint(root) != self.mounts_fingerprint {
            all.push("file systems on other devices have been mounted or unmounted".into());
        }
        all
    }
}

pub(crate) fn boot_id(root: &Root) -> String {
    root.read("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Tells whether a file is still the same: FNV-1a of its contents. `None` when it cannot be read.
pub fn fingerprint(path: &Path) -> Option<u64> {
    std::fs::read(path).ok().map(|bytes| fnv(&bytes))
}

pub(crate) fn mounts_fingerprint(root: &Root) -> u64 {
    let mut devices = crate::devices::mounted(root).unwrap_or_default();
    devices.extend(crate::devices::swap(root));
    devices.sort_by_key(|d| (d.major, d.minor));
    let names: Vec<String> =
        devices.iter().map(|d| format!("{}:{}:{}:{:?}", d.major, d.minor, d.fs_type, d.uuid)).collect();
    fnv(names.join(" ").as_bytes())
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

/// The running kernel's log; `None` where it may not be read.
pub(crate) fn kernel_log() -> Option<String> {
    const SYSLOG_ACTION_READ_ALL: i32 = 3;
    let mut buf = vec![0u8; 1 << 20];
    // SAFETY: the kernel writes at most `len` bytes to the buffer, which has as many.
    let n = unsafe { libc::klogctl(SYSLOG_ACTION_READ_ALL, buf.as_mut_ptr().cast(), buf.len() as i32) };
    buf.truncate(usize::try_from(n).ok()?);
    Some(String::from_utf8_lossy(&buf).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn machine(dir: &Path) -> Root {
        let root = Root::new(dir);
        for (path, text) in [
            ("/proc/sys/kernel/random/boot_id", "one\n"),
            ("/proc/sys/kernel/osrelease", "6.1\n"),
            ("/init", "program"),
            ("/etc/otherworld.toml", ""),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn armed(root: &Root) -> Armed {
        Armed {
            format: Armed::FORMAT,
            boot_id: boot_id(root),
            armed_at: 1,
            kernel_release: "6.1".into(),
            kernel: "/boot/vmlinuz".into(),
            cmdline: "quiet".into(),
            initramfs_bytes: 1,
            generation: 1,
            saver: Some(4096),
            init: "/init".into(),
            init_fingerprint: fingerprint(&root.join("/init")),
            config_path: "/etc/otherworld.toml".into(),
            config_fingerprint: fingerprint(&root.join("/etc/otherworld.toml")),
            mounts_fingerprint: mounts_fingerprint(root),
            replaced_foreign: false,
            sysctls_before: Sysctls::new(),
            sysctls_set: Sysctls::new(),
        }
    }

    #[test]
    fn arming_does_not_outlive_the_boot() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        armed(&root).save(&root).unwrap();
        assert_eq!(Armed::load(&root).unwrap(), Some(armed(&root)));
        fs::write(root.join("/proc/sys/kernel/random/boot_id"), "two\n").unwrap();
        assert_eq!(Armed::load(&root).unwrap(), None);
        Armed::forget(&root).unwrap();
        Armed::forget(&root).unwrap();
        assert_eq!(Armed::load(&root).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_read_does_not_pass_for_not_armed() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        // Not even root reads a directory as a file.
        fs::create_dir_all(root.join(STATE_FILE)).unwrap();
        assert!(Armed::load(&root).is_err());
        assert!(matches!(crate::disarm(&root), Err(crate::Error::State(_))));
    }

    #[test]
    fn changes_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        let armed = armed(&root);
        assert!(armed.stale(&root).is_empty());
        fs::write(root.join("/init"), "new program").unwrap();
        fs::remove_file(root.join("/etc/otherworld.toml")).unwrap();
        fs::write(root.join("/proc/sys/kernel/osrelease"), "6.12\n").unwrap();
        assert_eq!(
            armed.stale(&root),
            [
                "/init has changed",
                "/etc/otherworld.toml has changed",
                "another kernel runs than the 6.1 that was armed"
            ]
        );
    }
}
