//! Source packages of Debian's: fetched when an application is built, and never kept in the project.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::{build, ui};

/// A source package.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    pub package: &'static str,
    /// As Debian has it.
    pub version: &'static str,
    /// The file in it that is fetched.
    pub tar: &'static str,
}

impl Source {
    /// Fetches it once; its upstream tar.
    fn tar(&self) -> Result<PathBuf> {
        let dir = build::target_dir().join("apps/sources");
        let tar = dir.join(self.tar);
        if tar.exists() {
            return Ok(tar);
        }
        ui::note(&format!("fetching the source of {} {}", self.package, self.version));
        let part = dir.join(format!("{}.part", self.package));
        _ = fs::remove_dir_all(&part);
        fs::create_dir_all(part.join("lists/partial"))?;
        fs::write(part.join("sources.list"), lab::image::debian_sources("deb-src")?)?;
        let apt = |arguments: &[&str]| {
            let mut apt = Command::new("apt-get");
            apt.current_dir(&part).arg("-q").args(["-o", "APT::Sandbox::User=root"]);
            for (option, value) in [("Dir::Etc::sourcelist", "sources.list"), ("Dir::State::lists", "lists")]
            {
                apt.args(["-o", &format!("{option}={}", part.join(value).display())]);
            }
            apt.args(["-o", "Dir::Etc::sourceparts=/dev/null"]).args(arguments);
            run(&mut apt)
        };
        apt(&["update"])?;
        apt(&["source", "--download-only", "--tar-only", &format!("{}={}", self.package, self.version)])?;
        fs::rename(part.join(self.tar), &tar).with_context(|| tar.display().to_string())?;
        fs::remove_dir_all(&part)?;
        Ok(tar)
    }

    /// Unpacks these files or directories of it (all, if none) into `into`, which is made anew.
    pub fn unpack(&self, into: &Path, only: &[&str]) -> Result<()> {
        let tar = self.tar()?;
        _ = fs::remove_dir_all(into);
        fs::create_dir_all(into)?;
        let mut unpack = Command::new("tar");
        unpack.arg("xf").arg(tar).arg("-C").arg(into).args([
            "--strip-components=1",
            "--no-same-owner",
            "--wildcards",
        ]);
        run(unpack.args(only))
    }
}

/// Runs a command; its output is shown if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(std::process::Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    let words =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} failed: {}", words.trim());
    Ok(())
}
