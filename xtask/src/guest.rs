//! Guests in which Otherworld is installed and armed.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::image::Flavour;
use lab::{Accel, Channel, Guest, Key, Lab, MachineConfig, Series, Snapshot};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{build, ui};

const ARM_DEADLINE: Duration = Duration::from_secs(120);
/// The command that starts the lab's agent, for `[after] start` of the configuration.
pub const AGENT_COMMAND: &str = "/usr/local/lib/lab/agent serve";

/// Sets huge pages aside, and makes two swap areas that are used in turns: a file whose blocks the file system takes for unwritten, and a whole disk.
const MEMORY: &str = "sysctl -qw vm.nr_hugepages=12 && fallocate -l 64M /swapfile && chmod 600 /swapfile && for area in /swapfile /dev/vdb; do mkswap -q $area && swapon -p 5 $area || exit 1; done";

/// What is installed in a guest.
#[derive(Debug, Clone, Default)]
pub struct Installation {
    /// Contents of `/etc/otherworld.toml`.
    pub config: String,
    /// Whether the register saver module is there.
    pub saver: bool,
    /// Whether a file and a disk are swap areas, and huge pages are set aside.
    pub memory: bool,
    /// Commands before it is armed.
    pub prepare: String,
}

impl Installation {
    /// Resurrects what the unprivileged user runs, with the register saver.
    pub fn for_demo() -> Self {
        let config = format!("[[select]]\nuser = \"demo\"\n\n[after]\nstart = [\"{AGENT_COMMAND}\"]\n");
        Self { config, saver: true, ..Self::default() }
    }

    /// Resurrects what runs this program, whoever runs it, and what the unprivileged user runs.
    pub fn for_programs(exe: &str) -> Self {
        let demo = Self::for_demo();
        Self { config: format!("[[select]]\nexe = \"{exe}\"\n\n{}", demo.config), ..demo }
    }

    /// Resurrects all that can be.
    pub fn for_all() -> Self {
        let config = format!(
            "mode = \"programs\"\n\n[[never]]\nexe = \"/usr/local/lib/lab/agent\"\n\n[after]\nstart = [\"{AGENT_COMMAND}\"]\n"
        );
        Self { config, saver: true, ..Self::default() }
    }
}

/// A layer on top of `parent` with the current binaries installed and `otherworld arm` done.
pub fn armed(lab: &Lab, parent: &Snapshot, installation: &Installation) -> Result<Snapshot> {
    let files = files(lab, parent.config.series, installation)?;
    let mut inputs = Key::new("installation")
        .with(if installation.memory { MEMORY } else { "" })
        .with(&installation.prepare);
    for (path, data) in &files {
        inputs = inputs.with(path).with_bytes(data);
    }
    let snapshot = lab.derive(parent, "armed", &inputs, |agent, _| {
        lab.note("installing and arming otherworld (once per build)");
        push(agent, &files)?;
        if installation.memory {
            agent.shell(MEMORY, ARM_DEADLINE)?;
        }
        agent.shell(&installation.prepare, ARM_DEADLINE)?;
        agent.shell("otherworld arm", ARM_DEADLINE)?;
        Ok(())
    });
    snapshot.context("arming failed")
}

/// Writes what became of each program beside the other artifacts of a run, and keeps them if something failed.
pub fn keep_table(guest: &Guest, rows: &[impl std::fmt::Display], failed: bool) -> Result<()> {
    fs::write(guest.dir.join("table.txt"), rows.iter().map(|row| format!("{row}\n")).collect::<String>())?;
    if failed {
        guest.keep_artifacts()?;
        ui::line(format!("artifacts: {}", guest.dir.display()));
    }
    Ok(())
}

/// A machine for real programs: what comes back of them has to fit into the crash kernel's memory.
pub fn for_programs(series: Series, accel: Accel) -> MachineConfig {
    MachineConfig {
        flavour: Flavour::Programs,
        // Below 4 GiB there is not always room for as much in one piece, depending on where the kernel puts itself: above there is.
        memory_mib: 5120,
        crashkernel_mib: 1536,
        ..MachineConfig::new(series, accel)
    }
}

/// By which processes the report names a program.
pub type Processes = BTreeMap<String, Vec<i32>>;

/// A layer in which programs run that `start` has started, and what it says of them: by which processes the report names them, at least.
/// `inputs` must name everything that `start` depends on.
pub fn running<T: Serialize + DeserializeOwned>(
    lab: &Lab,
    booted: &Snapshot,
    label: &str,
    inputs: &Key,
    start: impl FnOnce(&mut Channel) -> Result<T>,
) -> Result<(Snapshot, T)> {
    let snapshot = lab.derive(booted, label, inputs, |agent, machine| {
        let failed = |error: anyhow::Error| lab::Error::Guest(format!("{error:#}"));
        lab.note(&format!("starting programs for {label} (once)"));
        let processes = start(agent).map_err(failed)?;
        let text = serde_json::to_string(&processes).map_err(|error| failed(error.into()))?;
        fs::write(machine.dir.join("processes.json"), text).map_err(|error| failed(error.into()))
    })?;
    let path = snapshot.dir.join("processes.json");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok((snapshot, serde_json::from_str(&text)?))
}

/// Copies the current binaries and the configuration into a guest, and arms nothing.
pub fn install(lab: &Lab, agent: &mut Channel, series: Series, installation: &Installation) -> Result<()> {
    Ok(push(agent, &files(lab, series, installation)?)?)
}

fn push(agent: &mut Channel, files: &[(String, Vec<u8>)]) -> lab::Result<()> {
    for (path, data) in files {
        let mode = if path.ends_with(".toml") || path.ends_with(".ko") { 0o644 } else { 0o755 };
        agent.write_file(path, mode, data)?;
    }
    if files.iter().any(|(path, _)| path.ends_with(".ko")) {
        agent.shell("depmod", ARM_DEADLINE)?;
    }
    Ok(())
}

/// Path in the guest and contents of everything to be installed.
fn files(lab: &Lab, series: Series, installation: &Installation) -> Result<Vec<(String, Vec<u8>)>> {
    let binaries = build::static_binaries()?;
    let read = |path: &PathBuf| fs::read(path).with_context(|| path.display().to_string());
    let mut files = vec![
        ("/usr/local/sbin/otherworld".to_owned(), read(&binaries.otherworld)?),
        ("/etc/otherworld.toml".to_owned(), installation.config.clone().into_bytes()),
    ];
    for survivor in &binaries.survivors {
        let name = survivor.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        files.push((format!("/usr/local/lib/otherworld/survivors/{name}"), read(survivor)?));
    }
    if installation.saver {
        let release = lab.kernel(series)?.release;
        lab.note("building the register saver module");
        let module = lab::saver::build(&release, lab.cache())?;
        files.push((format!("/lib/modules/{release}/updates/{}", lab::saver::MODULE_FILE), read(&module)?));
    }
    Ok(files)
}

/// Feeds a guest's random number generator from a seed, so that its address spaces differ from run to run and can be drawn again.
pub fn seed(guest: &mut Guest, seed: u64) -> Result<()> {
    let mut draw = fastrand::Rng::with_seed(seed);
    let bytes: Vec<u8> = std::iter::repeat_with(|| draw.u8(..)).take(64).collect();
    Ok(guest.agent.seed(&bytes)?)
}
