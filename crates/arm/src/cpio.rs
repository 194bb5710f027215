//! Writing cpio archives in the "newc" format, as the kernel unpacks them into its initial root file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Component, Path};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;

/// Writes one archive. Owner of everything is root, times are 0: the same input gives the same bytes.
pub struct Writer<W> {
    out: W,
    written: u64,
    next_inode: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Writer<W> {
    /// Begins an archive.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, next_inode: 1, directories: BTreeSet::new() }
    }

    /// Adds a directory and what leads to it; nothing when it is there already.
    pub fn directory(&mut self, path: impl AsRef<Path>) -> io::Result<()> {
        let mut so_far = String::new();
        for component in path.as_ref().components() {
            let Component::Normal(name) = component else { continue };
            let name = name.to_str().ok_or_else(|| io::Error::other("file name is not UTF-8"))?;
            if !so_far.is_empty() {
                so_far.push('/');
            }
            so_far.push_str(name);
            if self.directories.insert(so_far.clone()) {
                self.entry(&so_far, S_IFDIR | 0o755, 0, 0, &[])?;
            }
        }
        Ok(())
    }

    /// Adds a regular file with permission bits `mode`.
    pub fn file(&mut self, path: impl AsRef<Path>, mode: u32, data: &[u8]) -> io::Result<()> {
        let name = self.name(path.as_ref())?;
        self.entry(&name, S_IFREG | mode, 0, 0, data)
    }

    /// Adds a character device.
    pub fn char_device(
        &mut self,
        path: impl AsRef<Path>,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> io::Result<()> {
        let name = self.name(path.as_ref())?;
        self.entry(&name, S_IFCHR | mode, major, minor, &[])
    }

    /// Ends the archive and gives the underlying writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, 0, 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// The name as it stands in the archive, without the leading slash; makes its directories.
    fn name(&mut self, path: &Path) -> io::Result<String> {
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        let name = path.strip_prefix("/").unwrap_or(path).to_str();
        name.map(str::to_owned).ok_or_else(|| io::Error::other("file name is not UTF-8"))
    }

    fn entry(&mut self, name: &str, mode: u32, rmajor: u32, rminor: u32, data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len())
            .map_err(|_| io::Error::other(format!("{name} is too large for a cpio archive")))?;
        let links = if mode & 0o170_000 == S_IFDIR { 2 } else { 1 };
        let inode = self.next_inode;
        self.next_inode += 1;
        let fields = [
            inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            size,
            0, // device of the archive's file system
            0,
            rmajor,
            rminor,
            name.len() as u32 + 1,
            0, // checksum: not used by this variant
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = (4 - self.written % 4) % 4;
        self.put(&[0; 4][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut w = Writer::new(Vec::new());
        w.file("/init", 0o755, b"#!/bin/sh\n").unwrap();
        w.char_device("/dev/console", 0o600, 5, 1).unwrap();
        w.file("/lib/modules/a/b.ko", 0o644, b"module").unwrap();
        w.file("/lib/modules/a/c.ko", 0o644, b"").unwrap();
        w.file("/sbin/fsck.ext4", 0o755, b"e2fsck").unwrap();
        w.finish().unwrap()
    }

    /// Name, mode, device, contents.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// Reads the archive back with nothing but the format's description.
    fn parse(mut bytes: &[u8]) -> Vec<Entry> {
        let total = bytes.len();
        let mut out = Vec::new();
        loop {
            assert_eq!((total - bytes.len()) % 4, 0, "headers are aligned");
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_len) = (field(1), field(6) as usize, field(11) as usize);
            let device = (field(9), field(10));
            let name = String::from_utf8(bytes[110..110 + name_len - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name_len - 1], 0);
            let data = (110 + name_len).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), data);
                return out;
            }
            out.push((name, mode, device, bytes[data..data + size].to_vec()));
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let entries = parse(&sample());
        let names: Vec<&str> = entries.iter().map(|e| e.0.as_str()).collect();
        let expected = [
            "init",
            "dev",
            "dev/console",
            "lib",
            "lib/modules",
            "lib/modules/a",
            "lib/modules/a/b.ko",
            "lib/modules/a/c.ko",
            "sbin",
            "sbin/fsck.ext4",
        ];
        assert_eq!(names, expected, "parents come first, and once");
        assert_eq!((entries[0].1, entries[0].3.as_slice()), (0o100_755, b"#!/bin/sh\n".as_slice()));
        assert_eq!((entries[2].1, entries[2].2), (0o020_600, (5, 1)));
        assert_eq!((entries[9].1, entries[9].3.as_slice()), (0o100_755, b"e2fsck".as_slice()));
    }

    #[test]
    fn the_same_input_gives_the_same_bytes() {
        assert_eq!(sample(), sample());
    }

    /// A second opinion, where the machine has one.
    #[test]
    fn cpio_lists_it() {
        let Ok(mut child) =
            Command::new("cpio").args(["-t", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
        else {
            return;
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success());
        let listing = String::from_utf8(out.stdout).unwrap();
        assert!(listing.lines().any(|l| l == "lib/modules/a/c.ko"), "{listing}");
        assert_eq!(listing.lines().count(), 10);
    }
}
