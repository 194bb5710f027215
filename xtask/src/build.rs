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
    /// The lab's agent.
    pub agent: PathBuf,
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

/// cargo, for the workspace.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace());
    cargo
}

/// Builds them (or finds that they are up to date).
pub fn static_binaries() -> Result<Binaries> {
    crate::ui::note("building the static binaries");
    let cargo_target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(target_dir, PathBuf::from);
    let output = cargo()
        .args(["build", "--release", "--quiet", "--target", TARGET, "--bins"])
        .args(["-p", "otherworld", "-p", "survivors", "-p", "lab", "--message-format", "json-render-diagnostics"])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_TARGET_DIR", &cargo_target)
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("building the static binaries failed");
    }
    let dir = target_dir().join("static");
    fs::create_dir_all(dir.join("survivors"))?;
    let mut survivors = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let Some(executable) = message["executable"].as_str().map(PathBuf::from) else { continue };
        let name = executable.file_name().context("an executable without a name")?.to_owned();
        let package = message["manifest_path"].as_str().unwrap_or_default();
        let is_survivor = Path::new(package).parent().is_some_and(|dir| dir.ends_with("survivors"));
        let to = if is_survivor { dir.join("survivors").join(&name) } else { dir.join(&name) };
        copy_if_changed(&executable, &to)?;
        if is_survivor {
            survivors.push(to);
        }
    }
    survivors.sort();
    Ok(Binaries { otherworld: dir.join("otherworld"), agent: dir.join("lab-agent"), survivors, dir })
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
