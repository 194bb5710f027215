//! What the crash kernel's init finds in its initramfs.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::devices::BlockDevice;

/// Everything that the crash kernel's init must know and could no longer find out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`Manifest::FORMAT`] of the writer.
    pub format: u32,
    /// Kernel that was running, and whose modules are in the initramfs.
    pub kernel: String,
    /// Modules as absolute paths in the initramfs, in load order.
    pub modules: Vec<PathBuf>,
    /// Devices with mounted file systems; the first one has the root file system.
    pub devices: Vec<BlockDevice>,
    /// Devices that are swap areas.
    #[serde(default)]
    pub swap: Vec<BlockDevice>,
    /// `fsck.TYPE` programs in the initramfs, by file system type.
    pub fsck: Vec<String>,
    /// `kernel.pid_max` of the main kernel: old PIDs go up to there.
    pub pid_max: u32,
    /// The configuration, user names resolved.
    pub config: Config,
}

impl Manifest {
    /// The present version.
    pub const FORMAT: u32 = 1;
    /// Where it lies in the initramfs.
    pub const PATH: &str = "/etc/otherworld-manifest.json";

    /// Reads it in the crash kernel.
    pub fn load() -> io::Result<Self> {
        let manifest: Self = serde_json::from_slice(&std::fs::read(Path::new(Self::PATH))?)?;
        if manifest.format != Self::FORMAT {
            let text = format!("manifest of format {}, understood is {}", manifest.format, Self::FORMAT);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(manifest)
    }
}
