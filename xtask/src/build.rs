//! Building the static binaries that run inside guests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The static binaries of this work tree.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// Directory of all.
    pub dir: PathBuf,
    /// The product.
    pub otherworld: PathBuf,
    /// The survivors (test programs), by name.
    pub survivors: Vec<PathBuf>,
}

/// The workspace's root.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where artifacts go: `target/` of the workspace, whatever cargo's own target directory is.
pub fn target_dir() -> PathBuf {
    workspace().join("target")
}

/// Keeps other builds of the same thing away until it is dropped: of other threads, and of other runs.
pub fn lock(what: &str) -> Result<fs::File> {
    let path = target_dir().join(format!("{what}.lock"));
    let file = fs::File::create(&path).with_context(|| path.display().to_string())?;
    file.lock().with_context(|| path.display().to_string())?;
    Ok(file)
}

/// cargo, for the workspace.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace());
    cargo
}

/// Builds them (or finds that they are up to date).
pub fn static_binaries() -> Result<Binaries> {
    let dir = target_dir().join("static");
    fs::create_dir_all(dir.join("survivors"))?;
    let mut survivors = Vec::new();
    for executable in build_static(&["otherworld", "survivors"])? {
        let to = if executable.package == "survivors" { dir.join("survivors") } else { dir.clone() };
        let to = to.join(executable.path.file_name().context("an executable without a name")?);
        copy_if_changed(&executable.path, &to)?;
        if executable.package == "survivors" {
            survivors.push(to);
        }
    }
    survivors.sort();
    Ok(Binaries { otherworld: dir.join("otherworld"), survivors, dir })
}

/// Builds an example of a package, as a program for guests; its path.
pub fn example(package: &str, name: &str) -> Result<PathBuf> {
    let target = target_dir().join("libotherworld-build");
    let mut cargo = cargo();
    cargo.args(["build", "--release", "--quiet", "-p", package, "--example", name]);
    if !cargo.env("CARGO_TARGET_DIR", &target).status().context("cannot run cargo")?.success() {
        bail!("building the example {name} failed");
    }
    Ok(target.join("release/examples").join(name))
}

/// Builds the product alone; its path.
pub fn otherworld() -> Result<PathBuf> {
    static_binary("otherworld", "otherworld")
}

/// Builds the lab's agent; its path.
pub fn agent() -> Result<PathBuf> {
    static_binary("lab", "lab-agent")
}

/// Builds the init that does nothing; its path.
pub fn idle() -> Result<PathBuf> {
    static_binary("lab", "lab-idle")
}

fn static_binary(package: &str, name: &str) -> Result<PathBuf> {
    let dir = target_dir().join("static");
    fs::create_dir_all(&dir)?;
    let built = build_static(&[package])?;
    let binary = built.iter().find(|executable| executable.path.ends_with(name));
    copy_if_changed(&binary.with_context(|| format!("{package} has no {name}"))?.path, &dir.join(name))?;
    Ok(dir.join(name))
}

struct Executable {
    package: String,
    path: PathBuf,
}

fn build_static(packages: &[&str]) -> Result<Vec<Executable>> {
    crate::ui::note(&format!("building static binaries: {}", packages.join(", ")));
    let mut cargo = cargo();
    cargo.args([
        "build",
        "--release",
        "--quiet",
        "--target",
        TARGET,
        "--bins",
        "--message-format",
        "json-render-diagnostics",
    ]);
    for package in packages {
        cargo.args(["-p", package]);
    }
    let output = cargo
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        // One directory for all, so that work trees' own target directories do not each build everything again.
        .env("CARGO_TARGET_DIR", target_dir().join("static-build"))
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("building {} failed", packages.join(", "));
    }
    let mut executables = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let Some(path) = message["executable"].as_str().map(PathBuf::from) else { continue };
        let manifest = Path::new(message["manifest_path"].as_str().unwrap_or_default());
        let package =
            manifest.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        executables.push(Executable { package, path });
    }
    Ok(executables)
}

/// Copies through a temporary name, so that a parallel reader never sees half a file.
fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let data = fs::read(from).with_context(|| from.display().to_string())?;
    if fs::read(to).is_ok_and(|old| old == data) {
        return Ok(());
    }
    let part = to.with_extension(format!("part{}", std::process::id()));
    fs::copy(from, &part)?;
    fs::rename(&part, to)?;
    Ok(())
}
