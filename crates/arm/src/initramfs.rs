//! Building the crash kernel's initramfs.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use snapshot::KernelText;

use crate::Root;
use crate::cpio;
use crate::manifest::Manifest;
use crate::modules::read_module;

/// What goes into the initramfs.
#[derive(Debug)]
pub struct Contents<'a> {
    /// The program that becomes `/init`: a static one.
    pub init: Vec<u8>,
    /// Modules as they lie on the machine, in load order.
    pub modules: &'a [PathBuf],
    /// Programs and libraries, copied to where they lie on the machine.
    pub files: &'a [PathBuf],
    /// Written last; its `modules` and `kernel_text` are filled in.
    pub manifest: Manifest,
    /// What the running kernel's code is.
    pub kernel_text: &'a KernelText,
    /// zstd-compress it.
    pub compress: bool,
}

/// A file that could not be taken into the initramfs.
#[derive(Debug, thiserror::Error)]
#[error("cannot put {} into the crash initramfs", path.display())]
pub struct BuildError {
    #[allow(missing_docs)]
    pub path: PathBuf,
    #[allow(missing_docs)]
    pub source: io::Error,
}

/// Builds the initramfs in memory.
pub fn build(root: &Root, mut contents: Contents<'_>) -> Result<Vec<u8>, BuildError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| BuildError { path, source }
    };
    let mut archive = cpio::Writer::new(Vec::new());
    for dir in ["/dev", "/proc", "/sys", "/run", "/tmp", "/newroot", "/etc"] {
        archive.directory(dir).map_err(failed(Path::new(dir)))?;
    }
    // The kernel opens it for init's standard streams before init can mount /dev.
    archive.char_device("/dev/console", 0o600, 5, 1).map_err(failed(Path::new("/dev/console")))?;
    // Where that fails, the program's runtime opens this one instead, and aborts if it is not there.
    archive.char_device("/dev/null", 0o666, 1, 3).map_err(failed(Path::new("/dev/null")))?;
    archive.file("/init", 0o755, &contents.init).map_err(failed(Path::new("/init")))?;

    contents.manifest.modules.clear();
    for module in contents.modules {
        let plain = read_module(&root.join(module)).map_err(failed(module))?;
        let name = uncompressed_name(module);
        archive.file(&name, 0o644, &plain).map_err(failed(module))?;
        contents.manifest.modules.push(name);
    }
    for file in contents.files {
        let data = std::fs::read(root.join(file)).map_err(failed(file))?;
        archive.file(file, 0o755, &data).map_err(failed(file))?;
    }
    contents.manifest.kernel_text = contents.kernel_text.pieces().to_vec();
    let sums: Vec<u8> = contents.kernel_text.sums().iter().flat_map(|sum| sum.to_le_bytes()).collect();
    let place = Path::new(Manifest::KERNEL_TEXT_PATH);
    archive.file(place, 0o600, &sums).map_err(failed(place))?;
    let manifest = serde_json::to_vec_pretty(&contents.manifest)
        .map_err(io::Error::from)
        .map_err(failed(Path::new(Manifest::PATH)))?;
    archive.file(Manifest::PATH, 0o600, &manifest).map_err(failed(Path::new(Manifest::PATH)))?;
    let plain = archive.finish().map_err(failed(Path::new("the end of the archive")))?;
    if contents.compress { compress(&plain).map_err(failed(Path::new("the archive"))) } else { Ok(plain) }
}

/// One zstd frame, as the kernel's decompressor wants it (lib/decompress_unzstd.c: windows up to 128 MiB).
fn compress(plain: &[u8]) -> io::Result<Vec<u8>> {
    // Higher levels take much longer to arm and save little: the kernel's start is what counts, and that is short either way.
    const LEVEL: i32 = 3;
    zstd::encode_all(plain, LEVEL)
}

/// `virtio.ko.xz` → `virtio.ko`
fn uncompressed_name(module: &Path) -> PathBuf {
    let name = module.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.find(".ko").map_or(&*name, |at| &name[..at + 3]);
    module.with_file_name(stem)
}

/// Writes `data` to `path` so that a crash at any time leaves the old file or the new one.
pub fn replace_file(path: &Path, data: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.write_all(data)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    // The new name must be on the disk too: a panic may come at any time, that is what all this is for.
    std::fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn modules_are_listed_as_they_lie_in_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        let module = PathBuf::from("/lib/modules/1/kernel/a.ko");
        std::fs::create_dir_all(root.join("/lib/modules/1/kernel")).unwrap();
        std::fs::write(root.join(&module), b"\x7fELF module").unwrap();
        let manifest = Manifest {
            format: Manifest::FORMAT,
            kernel: "1".into(),
            modules: vec![],
            devices: vec![],
            swap: vec![],
            fsck: vec![],
            kernel_text: vec![],
            pid_max: 32768,
            config: Config::default(),
        };
        let kernel_text = KernelText::default();
        let contents = |compress| Contents {
            init: b"\x7fELF init".to_vec(),
            modules: std::slice::from_ref(&module),
            files: &[],
            manifest: manifest.clone(),
            kernel_text: &kernel_text,
            compress,
        };
        let plain = build(&root, contents(false)).unwrap();
        let text = String::from_utf8_lossy(&plain);
        assert!(text.contains("dev/console") && text.contains("dev/null"));
        assert!(text.contains("\"/lib/modules/1/kernel/a.ko\""));
        let packed = build(&root, contents(true)).unwrap();
        assert_eq!(zstd::decode_all(&packed[..]).unwrap(), plain);

        std::fs::remove_file(root.join(&module)).unwrap();
        let error = build(&root, contents(false)).unwrap_err();
        assert_eq!(error.to_string(), "cannot put /lib/modules/1/kernel/a.ko into the crash initramfs");
    }

    #[test]
    fn compression_suffixes_go() {
        let name = |s: &str| uncompressed_name(Path::new(s)).display().to_string();
        assert_eq!(name("/m/a.ko.xz"), "/m/a.ko");
        assert_eq!(name("/m/a.ko.zst"), "/m/a.ko");
        assert_eq!(name("/m/a.ko"), "/m/a.ko");
    }
}
