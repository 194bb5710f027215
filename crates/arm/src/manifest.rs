//! What the crash kernel's init finds in its initramfs.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use snapshot::{KernelText, TextPiece};

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
    /// Where the running kernel had code that was recorded; none if it could not be.
    #[serde(default)]
    pub kernel_text: Vec<TextPiece>,
    /// The configuration, user names resolved.
    pub config: Config,
}

impl Manifest {
    /// The present version.
    pub const FORMAT: u32 = 1;
    /// Where it lies in the initramfs.
    pub const PATH: &str = "/etc/otherworld-manifest.json";

    /// Where the checksums of the kernel's code lie, little-endian.
    pub const KERNEL_TEXT_PATH: &str = "/etc/otherworld-kernel-text";

    /// Reads in the crash kernel what the dead kernel's code was; empty if it was not recorded.
    pub fn kernel_text(&self) -> io::Result<KernelText> {
        if self.kernel_text.is_empty() {
            return Ok(KernelText::default());
        }
        let bytes = std::fs::read(Path::new(Self::KERNEL_TEXT_PATH))?;
        let (sums, _) = bytes.as_chunks();
        let sums = sums.iter().map(|sum| u32::from_le_bytes(*sum)).collect();
        let damaged =
            || io::Error::new(io::ErrorKind::InvalidData, "checksums of the kernel's code are missing");
        KernelText::new(self.kernel_text.clone(), sums).ok_or_else(damaged)
    }

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
