//! The host's own tools: found, or installed through apt, or asked for in one clear line.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Error, FileContext as _, Result};

/// What the lab needs on the host: a command and the Debian package that has it.
const TOOLS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("dpkg-deb", "dpkg"),
    ("xz", "xz-utils"),
    ("depmod", "kmod"),
    // For the register saver, with the compiler that the kernels were built with.
    ("make", "make"),
    ("x86_64-linux-gnu-gcc-12", "gcc-12"),
];

/// apt may take one package away to make room for another (a backport of qemu-utils for the QEMU of the release): what is missing
/// then is installed in a second round.
const ROUNDS: usize = 2;

/// Makes sure that all of the lab's tools are there.
pub fn ensure_own_tools() -> Result<()> {
    ensure_tools(TOOLS)
}

/// Makes sure that these tools (a command, or a file's path; the Debian package that has it) are there. Installs what is missing when it may, and
/// says so first.
pub fn ensure_tools(tools: &[(&str, &'static str)]) -> Result<()> {
    for _ in 0..ROUNDS {
        let packages = missing_packages(tools);
        if packages.is_empty() || !is_root() {
            break;
        }
        eprintln!("lab: installing on this machine through apt: {}", packages.join(" "));
        apt_update()?;
        apt(&[&["install", "-y", "--no-install-recommends"][..], &packages].concat())?;
    }
    let packages = missing_packages(tools);
    if packages.is_empty() {
        return Ok(());
    }
    let packages = packages.join(" ");
    Err(Error::Host(format!("missing on this machine; run: sudo apt-get install {packages}")))
}

/// Packages of the tools that this machine does not have.
fn missing_packages(tools: &[(&str, &'static str)]) -> Vec<&'static str> {
    let is_there = |tool: &str| if tool.starts_with('/') { Path::new(tool).exists() } else { has(tool) };
    tools.iter().filter(|(tool, _)| !is_there(tool)).map(|&(_, package)| package).collect()
}

/// Refreshes apt's package lists.
pub fn apt_update() -> Result<()> {
    apt(&["update"])
}

/// Runs apt-get when no other lab does: not all of its locks can be waited for.
fn apt(arguments: &[&str]) -> Result<()> {
    let _lock = Lock::take(&std::env::temp_dir().join("otherworld-lab-apt.lock"))?;
    run(Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive")).map(drop)
}

/// Whether this process may do what only root may.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn has(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(tool).exists())
}

/// Runs a command to its end and returns its standard output; with its last words if it fails.
pub fn run(command: &mut Command) -> Result<String> {
    let line = std::iter::once(command.get_program()).chain(command.get_args()).map(OsStr::to_string_lossy);
    let line = line.collect::<Vec<_>>().join(" ");
    let path = std::env::var("PATH").unwrap_or_default();
    let output = command
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::Command {
            command: line.clone(),
            status: error.to_string(),
            output: String::new(),
        })?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        return Err(Error::Command { command: line, status: output.status.to_string(), output: tail });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// An exclusive lock on a file for as long as the value lives; waits for its turn.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock; says so if it has to wait.
    pub fn take(path: &Path) -> Result<Self> {
        let file = File::create(path).at(path)?;
        if file.try_lock().is_err() {
            eprintln!("lab: waiting for another lab that holds {}", path.display());
            file.lock().at(path)?;
        }
        Ok(Self { _file: file })
    }
}
