//! `cargo xtask lab`: guests to try things in.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand, ValueEnum};
use lab::{Guest, MachineConfig, Panic, Program, Series};

use crate::guest::{self, Installation};
use crate::{Global, build, ui, workload};

/// Boots guests to try things in, and cleans up.
#[derive(Debug, Args)]
pub struct LabCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Starts a guest from a snapshot and keeps it until this command is interrupted; work in it with `lab exec`, `push`, `pull`.
    Boot(Boot),
    /// Runs a command in a guest that `lab boot` keeps: `cargo xtask lab exec -- ps ax`. One word is given to a shell.
    Exec {
        /// The guest's name.
        #[arg(long, default_value = "guest")]
        name: String,
        /// User id to run it as.
        #[arg(long, default_value_t = 0)]
        uid: u32,
        /// Start it detached and print its process id; its output goes nowhere.
        #[arg(long)]
        detach: bool,
        /// Seconds until it is killed.
        #[arg(long, default_value_t = 300)]
        timeout: u64,
        /// The command.
        #[arg(required = true, last = true)]
        argv: Vec<String>,
    },
    /// Copies a file of the host into a kept guest.
    Push {
        /// The guest's name.
        #[arg(long, default_value = "guest")]
        name: String,
        /// The host's file.
        from: PathBuf,
        /// The guest's file.
        to: PathBuf,
    },
    /// Copies a file of a kept guest to the host.
    Pull {
        /// The guest's name.
        #[arg(long, default_value = "guest")]
        name: String,
        /// The guest's file.
        from: PathBuf,
        /// The host's file.
        to: PathBuf,
    },
    /// Panics a kept guest and waits for the agent under its crash kernel.
    Panic {
        /// The guest's name.
        #[arg(long, default_value = "guest")]
        name: String,
        /// CPU to panic on.
        #[arg(long)]
        cpu: Option<usize>,
        /// Seconds to wait for the crash kernel's agent.
        #[arg(long, default_value_t = 120)]
        timeout: u64,
    },
    /// Records a kept guest's /proc into a directory of plain files.
    Record {
        /// The guest's name.
        #[arg(long, default_value = "guest")]
        name: String,
        /// The new directory.
        to: PathBuf,
    },
    /// Makes the images and snapshots of a kernel (of all if none is named) ahead of time.
    Snapshot {
        /// The kernel: 6.1 or 6.12.
        #[arg(long)]
        kernel: Option<Series>,
    },
    /// Removes what the lab has cached: runs and snapshots, and with --all images and kernels too.
    Clean {
        /// Also the images and kernels, which have to be downloaded again.
        #[arg(long)]
        all: bool,
    },
}

/// What a kept guest starts from.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Layer {
    /// A freshly booted Debian, nothing installed.
    Booted,
    /// The demo's programs and input are there.
    Programs,
    /// Otherworld is installed and armed for the user demo.
    Armed,
    /// Both.
    Demo,
}

#[derive(Debug, Args)]
struct Boot {
    /// The kernel: 6.1 or 6.12.
    #[arg(long, default_value = "6.1")]
    kernel: Series,
    /// The guest's name.
    #[arg(long, default_value = "guest")]
    name: String,
    /// What to start from.
    #[arg(long, value_enum, default_value = "booted")]
    layer: Layer,
    /// When installing: resurrect all processes that can be, instead of the user demo's.
    #[arg(long)]
    all: bool,
    /// Copies the current static binaries into the guest.
    #[arg(long)]
    install: bool,
    /// RAM in MiB.
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// RAM for the crash kernel in MiB.
    #[arg(long, default_value_t = 768)]
    crashkernel: u32,
    /// Added to the kernel's command line.
    #[arg(long, default_value = "")]
    cmdline: String,
    /// Prints the console.
    #[arg(long)]
    console: bool,
}

impl LabCommand {
    /// Runs it.
    pub fn run(self, global: &Global) -> Result<bool> {
        match self.action {
            Action::Boot(boot) => boot.run(global),
            Action::Exec { name, uid, detach, timeout, argv } => {
                exec(global, &name, uid, detach, timeout, argv)
            }
            Action::Push { name, from, to } => {
                attach(global, &name)?.push(&from, to, 0o755)?;
                Ok(true)
            }
            Action::Pull { name, from, to } => {
                let data = attach(global, &name)?.read_file(from)?;
                std::fs::write(&to, data).with_context(|| to.display().to_string())?;
                Ok(true)
            }
            Action::Panic { name, cpu, timeout } => {
                let mut agent = attach(global, &name)?;
                agent.panic(&Panic { cpu, ..Panic::default() })?;
                let hello = agent.wait_hello(true, Duration::from_secs(timeout))?;
                println!(
                    "the crash kernel's agent is there, {} ms after that kernel's boot",
                    hello.uptime_ms
                );
                Ok(true)
            }
            Action::Record { name, to } => {
                attach(global, &name)?.record()?.write_to(&to)?;
                Ok(true)
            }
            Action::Snapshot { kernel } => {
                let lab = global.lab()?;
                for series in crate::series_or_all(kernel) {
                    let snapshot = workload::prepared(&lab, &MachineConfig::new(series, global.accel()))?;
                    ui::line(snapshot.dir.display().to_string());
                }
                ui::finish();
                Ok(true)
            }
            Action::Clean { all } => {
                let cache = build::target_dir().join("lab");
                let mut dirs = vec!["runs", "snapshots"];
                if all {
                    dirs.extend(["images", "kernels", "saver"]);
                }
                for dir in dirs {
                    match std::fs::remove_dir_all(cache.join(dir)) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                            return Err(error.into());
                        }
                        _ => {}
                    }
                }
                Ok(true)
            }
        }
    }
}

/// A connection to a kept guest's agent, without building anything.
fn attach(global: &Global, name: &str) -> Result<lab::Channel> {
    let _ = global;
    let lab =
        lab::Lab::open(&build::target_dir().join("lab"), &build::target_dir().join("static/lab-agent"))?;
    let mut agent =
        lab.attach(name).context("is there a guest of that name? `cargo xtask lab boot` keeps one")?;
    agent.ping(Duration::from_secs(30))?;
    Ok(agent)
}

fn exec(
    global: &Global,
    name: &str,
    uid: u32,
    detach: bool,
    timeout: u64,
    argv: Vec<String>,
) -> Result<bool> {
    let mut agent = attach(global, name)?;
    let program = match argv.as_slice() {
        [script] => Program::shell(script),
        _ => Program::new(argv),
    };
    let program = program.uid(uid);
    if detach {
        println!("{}", agent.spawn(&program)?);
        return Ok(true);
    }
    let exit = agent.exec(&program, Duration::from_secs(timeout))?;
    std::io::stdout().write_all(&exit.stdout)?;
    std::io::stderr().write_all(&exit.stderr)?;
    if exit.timed_out {
        eprintln!("killed after {timeout} s");
    }
    if exit.code != Some(0) {
        std::process::exit(exit.code.unwrap_or(128 + exit.signal.unwrap_or(0)));
    }
    Ok(true)
}

impl Boot {
    fn run(self, global: &Global) -> Result<bool> {
        let lab = global.lab()?;
        let config = MachineConfig {
            memory_mib: self.memory,
            crashkernel_mib: self.crashkernel,
            cmdline: self.cmdline.clone(),
            ..MachineConfig::new(self.kernel, global.accel())
        };
        let installation = if self.all { Installation::for_all() } else { Installation::for_demo() };
        let snapshot = match self.layer {
            Layer::Booted => lab.booted(&config)?,
            Layer::Programs => workload::prepared(&lab, &config)?,
            Layer::Armed => guest::armed(&lab, &lab.booted(&config)?, &installation)?,
            Layer::Demo => guest::armed(&lab, &workload::prepared(&lab, &config)?, &installation)?,
        };
        let mut guest = lab.start(&snapshot, &self.name)?;
        if self.install {
            guest::install(&lab, &mut guest.agent, self.kernel, &installation)?;
        }
        ui::finish();
        let Guest { machine, agent, dir, .. } = &mut guest;
        println!("guest {} runs in {} (QEMU {})", self.name, dir.display(), machine.pid());
        println!("  console.log, ttyS1.log (socket ttyS1.sock) are there; Ctrl-C ends it");
        println!("  cargo xtask lab exec --name {} -- uname -a", self.name);
        std::io::stdout().flush()?;
        // `lab exec` wants the channel for itself.
        let (left, _) = std::os::unix::net::UnixStream::pair()?;
        drop(std::mem::replace(agent, lab::Channel::new(left)));
        let mut next = machine.console.len();
        loop {
            if self.console {
                for line in machine.console.lines(next) {
                    next += 1;
                    println!("[{:>7}] {}", line.ms, line.text);
                }
            }
            match machine.wait_exit(Duration::from_millis(200)) {
                Ok(status) => {
                    println!("the machine has ended ({status})");
                    return Ok(true);
                }
                Err(lab::Error::Timeout { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
