//! The dead kernel and its last words.

use serde::{Deserialize, Serialize};

use crate::{Bytes, PAGE_SIZE, Pid};

/// Which kernel died, on what machine.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// `uname -v`.
    pub version: String,
    /// `uname -n`.
    pub nodename: Bytes,
    /// CPUs that were online.
    pub online_cpus: u32,
    /// 4 or 5.
    pub page_table_levels: u8,
    /// `randomize_va_space`-independent: where the kernel text was moved to, bytes (KERNELOFFSET).
    pub kaslr_offset: u64,
    /// `/proc/sys/kernel/tainted`.
    pub tainted: u64,
    /// [`vdso_fingerprint`] of the dead kernel's 64-bit vDSO, to see whether this kernel's fits the old
    /// processes. `None` when it could not be read.
    pub vdso: Option<(u64, u64)>,
    /// The first of the page frames, one after the other, that hold that image.
    #[serde(default)]
    pub vdso_frame: Option<u64>,
    /// Modules that were loaded, in the order in which they were.
    #[serde(default)]
    pub modules: Vec<String>,
}

impl Kernel {
    /// The frames that hold the image of the vDSO: the first one, and how many.
    pub fn vdso_frames(&self) -> Option<(u64, u64)> {
        let (len, _) = self.vdso?;
        Some((self.vdso_frame?, len.div_ceil(PAGE_SIZE)))
    }
}

/// How it died.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Panic {
    /// The text behind `Kernel panic - not syncing: `; empty when there was none in the log.
    pub message: String,
    /// CPU that panicked.
    pub cpu: Option<u32>,
    /// Task that was current on it.
    pub tid: Option<Pid>,
    #[allow(missing_docs)]
    pub comm: Bytes,
    /// Its kernel stack, innermost first.
    pub stack: Vec<Frame>,
    /// The kernel log, oldest first.
    pub log: Vec<LogRecord>,
}

/// One return address on a kernel stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// The address.
    pub address: u64,
    /// `symbol+0x12/0x34`-like text; the bare address when it belongs to no symbol.
    pub symbol: String,
    /// Found by scanning, not by unwinding: may be left over from an earlier call.
    pub guessed: bool,
}

/// One record of the kernel log (`struct printk_info` and its text).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    /// Sequence number.
    pub seq: u64,
    /// Nanoseconds since boot.
    pub ts_ns: u64,
    /// 0 emergency … 7 debug.
    pub level: u8,
    #[allow(missing_docs)]
    pub text: Bytes,
}

/// Fingerprint of a vDSO image ([`Kernel::vdso`]): its length in bytes and the FNV-1a hash of them.
pub fn vdso_fingerprint(image: &[u8]) -> (u64, u64) {
    let hash = image.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (image.len() as u64, hash)
}
