//! Builds the register saver (`kmod/`) for a guest kernel.
//!
//! In: the release of a Debian kernel. Out: the path of an `otherworld_saver.ko` for exactly that kernel, kept in a
//! cache directory. Nothing is installed on the host: the kernel's headers are fetched with `apt-get download` and
//! unpacked into the cache. The host needs `make`, the compiler that built the kernel, and `dpkg-deb`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// Why there is no module.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program failed.
    #[error("{what}: `{program}` ended with {status}\n{output}")]
    Tool {
        /// What was attempted.
        what: String,
        /// The program's name.
        program: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// Everything that it printed.
        output: String,
    },
    /// The compiler that built the kernel is not there.
    #[error(
        "the register saver needs the kernel's compiler, {compiler}: install it with `apt install {package} make`"
    )]
    NoCompiler {
        /// The program that was looked for.
        compiler: String,
        /// The Debian package that has it.
        package: String,
    },
    /// Headers or module are not what they should be.
    #[error("{0}")]
    Unusable(String),
}

/// What this file's functions return.
pub type Result<T> = std::result::Result<T, Error>;

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what: what.into(), source }
}

/// File name of the built module.
pub const MODULE_FILE: &str = "otherworld_saver.ko";

const SOURCE_DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../kmod");
const SOURCES: [&str; 4] = ["Kbuild", "Makefile", "otherworld_saver.c", "otherworld_saver.h"];

/// Builds the register saver for `kernel_release` (as `uname -r` prints it, such as `6.1.0-56-cloud-amd64`).
///
/// `cache_dir` holds the unpacked headers and the built modules, under names made of the release and of a hash of the
/// module's sources: a second call finds the module there and does nothing. Several processes may call at once; each
/// works in a temporary directory of its own and renames what is finished into place.
///
/// Fails if the headers cannot be fetched, if the compiler is missing (the message names the package) or if the module
/// does not compile (the message holds the compiler's output).
pub fn build(kernel_release: &str, cache_dir: &Path) -> Result<PathBuf> {
    let cache_dir = std::path::absolute(cache_dir).map_err(io_error("the cache directory"))?.join("saver");
    let module_dir = cache_dir.join(format!("{kernel_release}-{}", source_hash()?));
    let module = module_dir.join(MODULE_FILE);
    if module.exists() {
        return Ok(module);
    }
    let headers = headers(kernel_release, &cache_dir)?;
    check_compiler(&headers)?;

    let work = WorkDir::new(&cache_dir, &format!("build-{kernel_release}"))?;
    for name in SOURCES {
        fs::copy(Path::new(SOURCE_DIR).join(name), work.join(name))
            .map_err(io_error(format!("cannot copy kmod/{name}")))?;
    }
    run(
        Command::new("make").arg("-C").arg(&*work).arg(format!("KDIR={}", headers.display())),
        &format!("cannot build the register saver for {kernel_release}"),
    )?;
    let built = work.join(MODULE_FILE);
    check_vermagic(&built, kernel_release)?;

    let finished = WorkDir::new(&cache_dir, &format!("finished-{kernel_release}"))?;
    fs::copy(&built, finished.join(MODULE_FILE)).map_err(io_error("cannot keep the built module"))?;
    publish(&finished, &module_dir)?;
    Ok(module)
}

/// The kernel's build directory (`KDIR`), unpacked into the cache.
fn headers(kernel_release: &str, cache_dir: &Path) -> Result<PathBuf> {
    let tree = cache_dir.join(format!("headers-{kernel_release}"));
    let kdir = |root: &Path| root.join("usr/src").join(format!("linux-headers-{kernel_release}"));
    if tree.exists() {
        return Ok(kdir(&tree));
    }

    let work = WorkDir::new(cache_dir, &format!("headers-{kernel_release}"))?;
    let main = download(&work, &format!("linux-headers-{kernel_release}"))?;
    // What it is built upon comes from the same source package, in the same version. The names are in its own
    // dependencies: 6.1 has one linux-kbuild-6.1 for all its releases, 6.12 one for each.
    let version = deb_field(&main, "Version")?;
    let depends = deb_field(&main, "Depends")?;
    let mut debs = vec![main];
    for package in build_dependencies(&depends) {
        debs.push(download(&work, &format!("{package}={version}"))?);
    }
    let root = work.join("root");
    for deb in &debs {
        run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&root), "cannot unpack kernel headers")?;
        fs::remove_file(deb).map_err(io_error("cannot remove an unpacked package"))?;
    }

    // The headers' Makefile includes the common one by its absolute installed path. Relative to itself, it also works
    // after the rename below: make has changed into the build directory then.
    let makefile = kdir(&root).join("Makefile");
    let text = fs::read_to_string(&makefile).map_err(io_error("the kernel headers have no Makefile"))?;
    fs::write(&makefile, text.replace("include /usr/src/", "include ../"))
        .map_err(io_error("the headers' Makefile"))?;
    // 6.12 brings a vmlinux to make the module's BTF from, and then insists on pahole. Nobody reads that BTF.
    let vmlinux = kdir(&root).join("vmlinux");
    if vmlinux.exists() {
        fs::remove_file(vmlinux).map_err(io_error("the headers' vmlinux"))?;
    }
    publish(&root, &tree)?;
    Ok(kdir(&tree))
}

/// Of a Debian `Depends` field, the packages whose files take part in building a module.
fn build_dependencies(depends: &str) -> Vec<&str> {
    depends
        .split(',')
        .filter_map(|entry| entry.split_whitespace().next())
        .filter(|name| name.starts_with("linux-headers-") || name.starts_with("linux-kbuild-"))
        .collect()
}

/// Downloads one package (`name` or `name=version`) into `dir` and returns the file.
fn download(dir: &Path, package: &str) -> Result<PathBuf> {
    let download_dir = dir.join("download");
    fs::create_dir_all(&download_dir).map_err(io_error("the download directory"))?;
    run(
        // As root, apt would try to hand the directory to its own user, and complain that it cannot.
        Command::new("apt-get")
            .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
            .current_dir(&download_dir),
        &format!("cannot download {package} (is `apt-get update` due?)"),
    )?;
    let file = fs::read_dir(&download_dir)
        .and_then(|mut files| files.next().transpose())
        .map_err(io_error("the download directory"))?
        .ok_or_else(|| Error::Unusable(format!("apt-get downloaded nothing for {package}")))?;
    let deb = dir.join(file.file_name());
    fs::rename(file.path(), &deb).map_err(io_error("the download directory"))?;
    Ok(deb)
}

fn deb_field(deb: &Path, field: &str) -> Result<String> {
    let text = run(Command::new("dpkg-deb").arg("-f").arg(deb).arg(field), "cannot read a package's fields")?;
    if text.trim().is_empty() {
        return Err(Error::Unusable(format!("{} has no field {field}", deb.display())));
    }
    Ok(text.trim().to_owned())
}

/// A module must come from the compiler that built the kernel; the headers' configuration names it.
fn check_compiler(kdir: &Path) -> Result<()> {
    let config =
        fs::read_to_string(kdir.join(".config")).map_err(io_error("the kernel headers have no .config"))?;
    let compiler = config_compiler(&config)
        .ok_or_else(|| Error::Unusable("the kernel's .config does not name its compiler".to_owned()))?;
    if Command::new(compiler).arg("--version").output().is_err() {
        let package = compiler[compiler.find("gcc").unwrap_or(0)..].to_owned();
        return Err(Error::NoCompiler { compiler: compiler.to_owned(), package });
    }
    Ok(())
}

fn config_compiler(config: &str) -> Option<&str> {
    let text = config.lines().find_map(|line| line.strip_prefix("CONFIG_CC_VERSION_TEXT=\""))?;
    text.split_whitespace().next()
}

/// A module for another release would be refused only in the guest, minutes later.
fn check_vermagic(module: &Path, kernel_release: &str) -> Result<()> {
    let bytes = fs::read(module).map_err(io_error(format!("the build left no {MODULE_FILE}")))?;
    let wanted = format!("vermagic={kernel_release} ");
    if !bytes.windows(wanted.len()).any(|window| window == wanted.as_bytes()) {
        return Err(Error::Unusable(format!("the built {MODULE_FILE} is not for {kernel_release}")));
    }
    Ok(())
}

/// Names the module's sources in 16 hexadecimal digits.
fn source_hash() -> Result<String> {
    let mut hasher = Sha256::new();
    for name in SOURCES {
        let text = fs::read(Path::new(SOURCE_DIR).join(name))
            .map_err(io_error(format!("cannot read kmod/{name}")))?;
        hasher.update(text);
    }
    Ok(hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// An empty directory of this process's own, beside its later place so that a rename works. Gone when dropped.
struct WorkDir(PathBuf);

impl WorkDir {
    fn new(cache_dir: &Path, name: &str) -> Result<Self> {
        let dir = cache_dir.join(format!(".{name}.{}", std::process::id()));
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(io_error(format!("cannot empty {}", dir.display())))?;
        }
        fs::create_dir_all(&dir).map_err(io_error(format!("cannot create {}", dir.display())))?;
        Ok(Self(dir))
    }
}

impl std::ops::Deref for WorkDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // After publish() it has already moved; otherwise what cannot be removed only takes room.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Moves a finished directory to its place in the cache, unless another process was faster.
fn publish(finished: &Path, place: &Path) -> Result<()> {
    match fs::rename(finished, place) {
        Ok(()) => Ok(()),
        Err(_) if place.exists() => Ok(()),
        Err(source) => Err(Error::Io { what: format!("cannot create {}", place.display()), source }),
    }
}

/// Runs a command to its end and returns its standard output.
fn run(command: &mut Command, what: &str) -> Result<String> {
    let output =
        command.output().map_err(io_error(format!("{what}: cannot run {:?}", command.get_program())))?;
    if !output.status.success() {
        return Err(Error::Tool {
            what: what.to_owned(),
            program: command.get_program().to_string_lossy().into_owned(),
            status: output.status,
            output: [output.stdout, output.stderr]
                .map(|text| String::from_utf8_lossy(&text).into_owned())
                .concat(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_headers_and_kbuild_are_fetched() {
        let depends = "linux-base (>= 4.3~), linux-headers-6.12.1-common (= 6.12.1-1), linux-image-6.12.1 (= 6.12.1-1) | \
                       linux-image-6.12.1-unsigned, linux-kbuild-6.12.1, gcc-12";
        assert_eq!(build_dependencies(depends), ["linux-headers-6.12.1-common", "linux-kbuild-6.12.1"]);
    }

    #[test]
    fn compiler_is_read_from_the_configuration() {
        let config =
            "CONFIG_CC_IS_GCC=y\nCONFIG_CC_VERSION_TEXT=\"x86_64-linux-gnu-gcc-12 (Debian 12.2.0) 12.2.0\"\n";
        assert_eq!(config_compiler(config), Some("x86_64-linux-gnu-gcc-12"));
        assert_eq!(config_compiler(""), None);
    }
}
