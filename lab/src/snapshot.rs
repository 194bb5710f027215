//! Saved guests, in layers: booted; armed; with the demo's input made … Each layer is a disk overlay over the one below
//! plus the machine's state, and is made once for the same inputs. Runs start from a layer and never change it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::channel::Channel;
use crate::error::{Error, FileContext as _, Result};
use crate::keep::Held;
use crate::machine::{Begin, Machine, MachineConfig};
use crate::{Key, Lab, host, initramfs};

/// Changed when this file or `machine.rs` makes other machines from the same inputs.
const LAYOUT: &str = "5";
const BOOT_DEADLINE: Duration = Duration::from_secs(300);
const AGENT_DEADLINE: Duration = Duration::from_secs(60);

/// A saved guest.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Names it and all that it is made of.
    pub key: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Its machine.
    pub config: MachineConfig,
    _held: Held,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Meta {
    pub(crate) label: String,
    pub(crate) parent: Option<String>,
    pub(crate) config: MachineConfig,
}

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    /// The machine.
    pub machine: Machine,
    /// The agent in it.
    pub agent: Channel,
    /// Its artifacts' directory.
    pub dir: PathBuf,
    _lock: host::Lock,
}

impl Guest {
    /// Keeps the run's directory from being cleaned up later.
    pub fn keep_artifacts(&self) -> Result<()> {
        let path = self.dir.join("keep");
        fs::write(&path, "").at(&path)
    }

    /// Connects to the channel anew, as after a panic, and waits for the crash kernel's agent.
    pub fn wait_crash_agent(&mut self, timeout: Duration) -> Result<crate::channel::Hello> {
        self.agent.wait_hello(true, timeout)
    }
}

impl Lab {
    /// A guest of this configuration that has booted and settled.
    pub fn booted(&self, config: &MachineConfig) -> Result<Snapshot> {
        let kernel = self.kernel(config.series)?;
        let image = self.image(config.flavour)?;
        let agent = fs::read(self.agent_binary()).at(self.agent_binary())?;
        let config_text = serde_json::to_string(config).unwrap_or_default();
        let key = Key::new("boot")
            .with(LAYOUT)
            .with(&image.id)
            .with(&kernel.release)
            .with(&config_text)
            .with_bytes(&agent);
        let label = format!("boot-{}", config.series);
        // Only who wants the same layer waits.
        let _lock = self.lock(&format!("{label}-{}", key.text()))?;
        if let Some(snapshot) = self.existing(&label, &key, config) {
            return Ok(snapshot);
        }
        self.note(&format!("booting {} once, to be saved", kernel.release));
        self.create(&label, &key, None, config, &image.disk, "raw", |dir| {
            initramfs::write(&dir.join("initramfs"), &kernel, &agent)?;
            let machine = Machine::start(dir, config, &kernel.image(), &dir.join("initramfs"), &Begin::Boot)?;
            let mut channel = machine.channel()?;
            channel.ping(BOOT_DEADLINE)?;
            channel.shell("systemctl is-system-running --wait && udevadm settle", BOOT_DEADLINE)?;
            channel.sync()?;
            Ok(machine)
        })
    }

    /// The layer that `set_up` makes of `parent`. `inputs` must name everything that `set_up` depends on.
    pub fn derive(
        &self,
        parent: &Snapshot,
        label: &str,
        inputs: &Key,
        set_up: impl FnOnce(&mut Channel, &Machine) -> Result<()>,
    ) -> Result<Snapshot> {
        let key = Key::new(label).with(LAYOUT).with(&parent.key).with(&inputs.text());
        let label = format!("{label}-{}", parent.config.series);
        let _lock = self.lock(&format!("{label}-{}", key.text()))?;
        if let Some(snapshot) = self.existing(&label, &key, &parent.config) {
            return Ok(snapshot);
        }
        self.create(
            &label,
            &key,
            Some(parent),
            &parent.config,
            &parent.dir.join("disk.qcow2"),
            "qcow2",
            |dir| {
                let machine = self.resume(parent, dir)?;
                let mut channel = machine.channel()?;
                greet(&mut channel)?;
                set_up(&mut channel, &machine)?;
                channel.sync()?;
                Ok(machine)
            },
        )
    }

    /// Starts a guest from a layer, with a fresh directory `runs/NAME`.
    pub fn start(&self, snapshot: &Snapshot, name: &str) -> Result<Guest> {
        let runs = self.cache().join("runs");
        self.prune_runs(&runs);
        let dir = runs.join(name);
        fs::create_dir_all(&runs).at(&runs)?;
        let lock = host::Lock::take(&runs.join(format!(".{name}.lock")))?;
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).at(&dir)?;
        overlay(&dir, &snapshot.dir.join("disk.qcow2"), "qcow2")?;
        scratch(&dir, Some(snapshot), &snapshot.config)?;
        let machine = self.resume(snapshot, &dir)?;
        let mut agent = machine.channel()?;
        greet(&mut agent)?;
        Ok(Guest { machine, agent, dir, _lock: lock })
    }

    /// Boots a guest from the base image, without any snapshot.
    pub fn cold_start(&self, config: &MachineConfig, name: &str) -> Result<Guest> {
        let kernel = self.kernel(config.series)?;
        let image = self.image(config.flavour)?;
        let agent_binary = fs::read(self.agent_binary()).at(self.agent_binary())?;
        let runs = self.cache().join("runs");
        let dir = runs.join(name);
        fs::create_dir_all(&runs).at(&runs)?;
        let lock = host::Lock::take(&runs.join(format!(".{name}.lock")))?;
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).at(&dir)?;
        overlay(&dir, &image.disk, "raw")?;
        scratch(&dir, None, config)?;
        initramfs::write(&dir.join("initramfs"), &kernel, &agent_binary)?;
        let machine = Machine::start(&dir, config, &kernel.image(), &dir.join("initramfs"), &Begin::Boot)?;
        let mut agent = machine.channel()?;
        agent.ping(BOOT_DEADLINE)?;
        Ok(Guest { machine, agent, dir, _lock: lock })
    }

    /// Switches a guest that has ended on again, with the disk as it left it. `snapshot` is the one that it was started from.
    pub fn boot_again(&self, guest: Guest, snapshot: &Snapshot) -> Result<Guest> {
        let Guest { machine, agent, dir, _lock } = guest;
        drop((machine, agent));
        let console = dir.join("console.log");
        fs::rename(&console, dir.join("console-before.log")).at(&console)?;
        let kernel = self.kernel(snapshot.config.series)?;
        let initramfs = self.boot_initramfs(snapshot)?;
        let machine = Machine::start(&dir, &snapshot.config, &kernel.image(), &initramfs, &Begin::Boot)?;
        let mut agent = machine.channel()?;
        agent.ping(BOOT_DEADLINE)?;
        Ok(Guest { machine, agent, dir, _lock })
    }

    /// A connection to the agent of a guest that another process of the lab runs under this name. It must not hold one itself.
    pub fn attach(&self, name: &str) -> Result<Channel> {
        let dir = self.cache().join("runs").join(name);
        crate::machine::connect(&dir, "control.sock").map(Channel::new).at(dir.join("control.sock"))
    }

    fn resume(&self, snapshot: &Snapshot, dir: &Path) -> Result<Machine> {
        let kernel = self.kernel(snapshot.config.series)?;
        // QEMU wants the files that the guest once booted from to be of the same size.
        let initramfs = self.boot_initramfs(snapshot)?;
        Machine::start(
            dir,
            &snapshot.config,
            &kernel.image(),
            &initramfs,
            &Begin::Resume(&snapshot.dir.join("state")),
        )
    }

    /// The initramfs of the boot layer that a snapshot stands on. As a crash kernel's it starts the agent and nothing else.
    pub fn boot_initramfs(&self, snapshot: &Snapshot) -> Result<PathBuf> {
        let mut dir = snapshot.dir.clone();
        loop {
            let file = dir.join("initramfs");
            if file.exists() {
                return Ok(file);
            }
            match meta(&dir).and_then(|meta| meta.parent) {
                Some(parent) => dir = self.snapshots().join(parent),
                None => {
                    return Err(Error::Host(format!(
                        "{} is incomplete; run `cargo xtask lab clean`",
                        dir.display()
                    )));
                }
            }
        }
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.cache().join("snapshots")
    }

    fn existing(&self, label: &str, key: &Key, config: &MachineConfig) -> Option<Snapshot> {
        let name = format!("{label}-{}", key.text());
        let dir = self.snapshots().join(&name);
        let meta = meta(&dir)?;
        let held = Held::take(&dir).ok()?;
        (meta.config == *config).then(|| Snapshot { key: name, dir, config: config.clone(), _held: held })
    }

    #[expect(clippy::too_many_arguments, reason = "a private step of two functions")]
    fn create(
        &self,
        label: &str,
        key: &Key,
        parent: Option<&Snapshot>,
        config: &MachineConfig,
        backing: &Path,
        format: &str,
        run: impl FnOnce(&Path) -> Result<Machine>,
    ) -> Result<Snapshot> {
        let name = format!("{label}-{}", key.text());
        let dir = self.snapshots().join(&name);
        let part = self.snapshots().join(format!("{name}.part"));
        let _ = fs::remove_dir_all(&part);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&part).at(&part)?;
        overlay(&part, backing, format)?;
        scratch(&part, parent, config)?;
        run(&part)?.save(&part.join("state"))?;
        let meta = Meta {
            label: label.into(),
            parent: parent.map(|parent| parent.key.clone()),
            config: config.clone(),
        };
        let meta_path = part.join("meta.json");
        fs::write(&meta_path, serde_json::to_string_pretty(&meta).unwrap_or_default()).at(&meta_path)?;
        let held = Held::take(&part)?;
        fs::rename(&part, &dir).at(&dir)?;
        self.prune_snapshots(label);
        Ok(Snapshot { key: name, dir, config: config.clone(), _held: held })
    }
}

pub(crate) fn meta(dir: &Path) -> Option<Meta> {
    serde_json::from_str(&fs::read_to_string(dir.join("meta.json")).ok()?).ok()
}

/// The first words with a guest that went on from a snapshot: its clock stands where it was saved.
fn greet(agent: &mut Channel) -> Result<()> {
    agent.ping(AGENT_DEADLINE)?;
    agent.set_clock()
}

/// `disk.qcow2` in `dir`, on top of another disk that stays as it is.
fn overlay(dir: &Path, backing: &Path, format: &str) -> Result<()> {
    on_top(&dir.join("disk.qcow2"), backing, format)
}

/// `scratch.qcow2` in `dir`, if the machine has a second disk: on top of that of a layer, or empty.
fn scratch(dir: &Path, below: Option<&Snapshot>, config: &MachineConfig) -> Result<()> {
    let disk = dir.join("scratch.qcow2");
    match below {
        _ if config.scratch_mib == 0 => Ok(()),
        Some(layer) => on_top(&disk, &layer.dir.join("scratch.qcow2"), "qcow2"),
        None => {
            let size = format!("{}M", config.scratch_mib);
            let mut create = Command::new("qemu-img");
            host::run(create.args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg(size)).map(drop)
        }
    }
}

fn on_top(disk: &Path, backing: &Path, format: &str) -> Result<()> {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]).arg(backing).arg(disk);
    host::run(&mut create).map(drop)
}
