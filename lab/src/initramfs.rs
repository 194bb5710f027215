//! The initramfs that the main kernel of a guest boots from: the agent as `/init` and the modules of disk and channel.

use std::fs;
use std::path::Path;

use crate::error::{FileContext as _, Result};
use crate::kernel::{Kernel, boot_modules};

/// Writes it to `path`.
pub(crate) fn write(path: &Path, kernel: &Kernel, agent: &[u8]) -> Result<()> {
    let mut archive = Cpio::default();
    for dir in ["dev", "proc", "sys", "modules"] {
        archive.add(dir, 0o040_755, &[]);
    }
    archive.add("init", 0o100_755, agent);
    for (name, data) in boot_modules(kernel)? {
        archive.add(&format!("modules/{name}"), 0o100_644, &data);
    }
    fs::write(path, archive.finish()).at(path)
}

/// A cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    files: u32,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.files += 1;
        self.header(name, self.files, mode, data.len());
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn header(&mut self, name: &str, inode: u32, mode: u32, len: usize) {
        let fields = [inode, mode, 0, 0, 1, 0, len as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.header("TRAILER!!!", 0, 0, 0);
        self.bytes
    }
}
