//! Which kernel modules must be loaded, in what order, and their bytes.
//!
//! Follows depmod(8)'s text files in `/lib/modules/RELEASE`, as modprobe(8) follows their binary forms.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::Root;
use crate::fnmatch::fnmatch;

/// `/lib/modules/RELEASE`, indexed.
#[derive(Debug, Default)]
pub struct ModuleTree {
    /// The directory, as the machine names it.
    dir: PathBuf,
    /// Module name to its file and the files it needs, relative to `dir`, as modules.dep lists them.
    files: BTreeMap<String, (PathBuf, Vec<PathBuf>)>,
    builtin: BTreeSet<String>,
    /// Pattern (in canonical form) and module name.
    aliases: Vec<(String, String)>,
    /// What to load before a module, and after it.
    softdeps: BTreeMap<String, (Vec<String>, Vec<String>)>,
}

/// A module that nothing is known about.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("there is no module {name} in {} and it is not built into the kernel", dir.display())]
pub struct UnknownModule {
    /// Its name or alias.
    pub name: String,
    /// Where it was looked for.
    pub dir: PathBuf,
}

impl ModuleTree {
    /// Reads the index of the kernel `release`.
    ///
    /// Only `modules.dep` must exist; a kernel without modules has no directory at all, which is for the caller to decide.
    pub fn open(root: &Root, release: &str) -> io::Result<Self> {
        let dir = PathBuf::from(format!("/lib/modules/{release}"));
        let optional = |name: &str| root.read(dir.join(name)).unwrap_or_default();
        let mut tree = Self {
            files: parse_dep(&root.read(dir.join("modules.dep"))?),
            builtin: optional("modules.builtin").lines().map(|l| module_name(Path::new(l.trim()))).collect(),
            aliases: parse_alias(&optional("modules.alias")),
            softdeps: parse_softdep(&optional("modules.softdep")),
            dir: PathBuf::new(),
        };
        tree.aliases.extend(parse_builtin_modinfo(&optional("modules.builtin.modinfo")));
        tree.dir = dir;
        Ok(tree)
    }

    /// The directory of the index.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the kernel has it without loading anything.
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&canonical(name))
    }

    /// Modules that `alias` (a modalias, or an alias such as `fs-ext4`) stands for, built-in ones included.
    pub fn by_alias(&self, alias: &str) -> Vec<String> {
        let mut names = Vec::new();
        let alias = canonical_pattern(alias);
        for (pattern, name) in &self.aliases {
            if fnmatch(pattern, &alias) && !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// Files to load for the modules `wanted` (names or aliases), in load order, each once. Paths are absolute.
    pub fn load_order<'a>(
        &self,
        wanted: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<PathBuf>, UnknownModule> {
        let mut order = Order { tree: self, done: BTreeSet::new(), files: Vec::new() };
        for name in wanted {
            if !order.add(name) {
                return Err(UnknownModule { name: name.to_owned(), dir: self.dir.clone() });
            }
        }
        Ok(order.files)
    }
}

struct Order<'a> {
    tree: &'a ModuleTree,
    done: BTreeSet<String>,
    files: Vec<PathBuf>,
}

impl Order<'_> {
    /// Adds a module by name or alias, with everything it needs before it. `false`: there is none.
    fn add(&mut self, name_or_alias: &str) -> bool {
        let name = canonical(name_or_alias);
        if self.tree.files.contains_key(&name) {
            self.add_module(&name);
            return true;
        }
        if self.tree.builtin.contains(&name) {
            return true;
        }
        let names = self.tree.by_alias(name_or_alias);
        for name in &names {
            if self.tree.files.contains_key(name) {
                self.add_module(name);
            }
        }
        !names.is_empty()
    }

    fn add_module(&mut self, name: &str) {
        // Marked before its dependencies: soft dependencies may form cycles.
        if !self.done.insert(name.to_owned()) {
            return;
        }
        let Some((file, needs)) = self.tree.files.get(name) else { return };
        let (before, after) = self.tree.softdeps.get(name).map(|(b, a)| (&b[..], &a[..])).unwrap_or_default();
        // A soft dependency that does not exist is nobody's mistake.
        before.iter().for_each(|soft| _ = self.add(soft));
        // modules.dep lists what is needed in the order of unloading.
        needs.iter().rev().for_each(|file| self.add_module(&module_name(file)));
        self.files.push(self.tree.dir.join(file));
        after.iter().for_each(|soft| _ = self.add(soft));
    }
}

/// The module's name: file name without directory and `.ko*`, dashes as underscores.
pub fn module_name(file: &Path) -> String {
    let base = file.file_name().unwrap_or_default().to_string_lossy();
    canonical(base.split_once(".ko").map_or(&*base, |(stem, _)| stem))
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// As [`canonical`], but leaves ranges inside brackets alone.
fn canonical_pattern(pattern: &str) -> String {
    let mut inside = false;
    let translate = |c| {
        inside = (inside || c == '[') && c != ']';
        if c == '-' && !inside { '_' } else { c }
    };
    pattern.chars().map(translate).collect()
}

fn parse_dep(text: &str) -> BTreeMap<String, (PathBuf, Vec<PathBuf>)> {
    let entry = |line: &str| {
        let (file, needs) = line.split_once(':')?;
        let file = PathBuf::from(file.trim());
        Some((module_name(&file), (file, needs.split_whitespace().map(PathBuf::from).collect())))
    };
    text.lines().filter_map(entry).collect()
}

fn parse_alias(text: &str) -> Vec<(String, String)> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next()? == "alias").then_some(())?;
        Some((canonical_pattern(words.next()?), canonical(words.next()?)))
    };
    text.lines().filter_map(entry).collect()
}

/// Aliases of what is built in: NUL-separated `module.alias=pattern`.
fn parse_builtin_modinfo(text: &str) -> Vec<(String, String)> {
    let entry = |item: &str| {
        let (key, value) = item.split_once('=')?;
        let module = key.strip_suffix(".alias")?;
        Some((canonical_pattern(value), canonical(module)))
    };
    text.split('\0').filter_map(entry).collect()
}

fn parse_softdep(text: &str) -> BTreeMap<String, (Vec<String>, Vec<String>)> {
    let mut all: BTreeMap<String, (Vec<String>, Vec<String>)> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("softdep") {
            continue;
        }
        let Some(module) = words.next() else { continue };
        let (before, after) = all.entry(canonical(module)).or_default();
        let mut to_after = false;
        for word in words {
            match word {
                "pre:" => to_after = false,
                "post:" => to_after = true,
                name if to_after => after.push(name.to_owned()),
                name => before.push(name.to_owned()),
            }
        }
    }
    all
}

/// A module as finit_module(2) takes it everywhere: decompressed. Tells by its content how it is compressed.
pub fn read_module(path: &Path) -> io::Result<Vec<u8>> {
    /// No module is larger: a bound for what a damaged file may claim.
    const MAX: u64 = 256 << 20;
    let bytes = std::fs::read(path)?;
    let mut plain = Vec::new();
    match bytes.get(..4) {
        Some([0xfd, b'7', b'z', b'X']) => {
            lzma_rust2::XzReader::new(&bytes[..], true).take(MAX).read_to_end(&mut plain)?;
        }
        Some([0x28, 0xb5, 0x2f, 0xfd]) => {
            zstd::Decoder::new(&bytes[..])?.take(MAX).read_to_end(&mut plain)?;
        }
        _ => plain = bytes,
    }
    if !plain.starts_with(b"\x7fELF") {
        let what = "is not a kernel module, or compressed in a way that is not known here (xz and zstd are)";
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::{Command, Stdio};

    /// A tree in the manner of Debian's kernels.
    fn tree(dir: &Path) -> ModuleTree {
        let root = Root::new(dir);
        let base = root.join("/lib/modules/6.12.0-test");
        fs::create_dir_all(&base).unwrap();
        let dep = "\
kernel/drivers/virtio/virtio.ko.xz:
kernel/drivers/virtio/virtio_ring.ko.xz:
kernel/drivers/virtio/virtio_pci_modern_dev.ko.xz:
kernel/drivers/virtio/virtio_pci_legacy_dev.ko.xz:
kernel/drivers/virtio/virtio_pci.ko.xz: kernel/drivers/virtio/virtio_pci_legacy_dev.ko.xz kernel/drivers/virtio/virtio_pci_modern_dev.ko.xz kernel/drivers/virtio/virtio.ko.xz kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio.ko.xz kernel/drivers/virtio/virtio_ring.ko.xz
kernel/crypto/crc32c-generic.ko.zst:
kernel/fs/jbd2/jbd2.ko:
kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko
kernel/a/a.ko:
kernel/a/b.ko:
";
        fs::write(base.join("modules.dep"), dep).unwrap();
        fs::write(base.join("modules.builtin"), "kernel/fs/tmpfs/ram-disk.ko\nkernel/lib/crc16.ko\n")
            .unwrap();
        let alias = "\
# Aliases extracted from modules themselves.
alias virtio:d00000002v* virtio_blk
alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci
alias fs-ext4 ext4
alias crypto-crc32c crc32c_generic
alias crc32c crc32c_generic
";
        fs::write(base.join("modules.alias"), alias).unwrap();
        fs::write(base.join("modules.builtin.modinfo"), "x.license=GPL\0ram_disk.alias=fs-ramdisk\0")
            .unwrap();
        let softdep = "# Soft dependencies\nsoftdep ext4 pre: crc32c nonexistent post: a\nsoftdep a pre: b\nsoftdep b post: a\n";
        fs::write(base.join("modules.softdep"), softdep).unwrap();
        ModuleTree::open(&root, "6.12.0-test").unwrap()
    }

    fn names(files: &[PathBuf]) -> Vec<String> {
        files.iter().map(|f| module_name(f)).collect()
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        let order = tree.load_order(["virtio_pci", "virtio-blk", "fs-ext4"]).unwrap();
        let expected = [
            "virtio_ring",
            "virtio",
            "virtio_pci_modern_dev",
            "virtio_pci_legacy_dev",
            "virtio_pci",
            "virtio_blk",
            "crc32c_generic",
            "jbd2",
            "ext4",
            "b",
            "a",
        ];
        // a and b name each other softly: whichever comes first, both come once and ext4 is not held up.
        let got = names(&order);
        assert_eq!(got[..9], expected[..9]);
        assert_eq!(got.iter().filter(|n| *n == "a" || *n == "b").count(), 2);
        let virtio_blk = "/lib/modules/6.12.0-test/kernel/drivers/block/virtio_blk.ko.xz";
        assert_eq!(order[5], PathBuf::from(virtio_blk));
    }

    #[test]
    fn modaliases_are_understood() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        assert_eq!(tree.by_alias("virtio:d00000002v00001AF4"), ["virtio_blk"]);
        assert_eq!(
            names(&tree.load_order(["virtio:d00000002v00001AF4"]).unwrap()).last().unwrap(),
            "virtio_blk"
        );
        assert!(tree.by_alias("pci:v00008086d00001237").is_empty());
    }

    #[test]
    fn builtin_modules_need_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        assert_eq!(tree.load_order(["ram-disk", "crc16", "fs-ramdisk"]), Ok(vec![]));
        assert!(tree.is_builtin("ram_disk"));
    }

    #[test]
    fn a_module_that_does_not_exist_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = tree(dir.path()).load_order(["virtio_blk", "zfs"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no module zfs in /lib/modules/6.12.0-test and it is not built into the kernel"
        );
    }

    fn compressed(program: &str, args: &[&str], data: &[u8]) -> Option<Vec<u8>> {
        use std::io::Write;
        let mut child =
            Command::new(program).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
        child.stdin.take()?.write_all(data).ok()?;
        Some(child.wait_with_output().ok()?.stdout)
    }

    #[test]
    fn modules_are_decompressed() {
        let dir = tempfile::tempdir().unwrap();
        let module: Vec<u8> =
            b"\x7fELF".iter().copied().chain((0..40_000u32).map(|i| (i / 7) as u8)).collect();
        let path = dir.path().join("m.ko");
        fs::write(&path, &module).unwrap();
        assert_eq!(read_module(&path).unwrap(), module);
        // As scripts/Makefile.modinst compresses them.
        for (program, args) in
            [("xz", &["--check=crc32", "--lzma2=dict=1MiB"][..]), ("zstd", &["-T0", "--rm", "-f", "-q"][..])]
        {
            let Some(bytes) = compressed(program, args, &module) else { continue };
            assert!(bytes.len() < module.len());
            fs::write(&path, bytes).unwrap();
            assert_eq!(read_module(&path).unwrap(), module, "{program}");
        }
        fs::write(&path, b"\x1f\x8b nonsense").unwrap();
        assert_eq!(read_module(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
