//! The command `survivors`: see the library for the protocol.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use survivors::{Crowd, Expect, Needs, Options, Paths, TABLE};

#[derive(Parser)]
#[command(about = "Small programs that must survive a kernel panic", version)]
struct Cli {
    #[command(subcommand)]
    command: Sub,
}

#[derive(Subcommand)]
enum Sub {
    /// Print all survivors: name, kind, expectation, need, what it shows (separated by tabs)
    List,
    /// Run one survivor to its verdict
    Run {
        /// Its name
        name: String,
        /// Where the verdict goes
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        #[command(flatten)]
        how: How,
    },
    /// Start many processes in the background, wait until they are ready and print the PID of their parent
    Crowd {
        /// How many
        #[arg(long)]
        processes: usize,
        /// Threads of each, beside the first
        #[arg(long, default_value_t = 0)]
        threads: usize,
        /// Open files of each
        #[arg(long, default_value_t = 0)]
        descriptors: usize,
        /// Memory of each, MiB
        #[arg(long, default_value_t = 0)]
        mib: usize,
    },
    /// What some survivors start
    #[command(hide = true)]
    CrashprocChild { how: String, log: PathBuf },
    /// Do random operations on files in a new directory, the same ones each time
    Operate {
        /// The directory
        #[arg(long)]
        dir: PathBuf,
        /// Draws the operations
        #[arg(long)]
        seed: u64,
        /// How many
        #[arg(long)]
        count: u32,
    },
    /// Count how many files of a tree another one does not have, has other ones of, or has beside them
    Compare {
        /// What there was
        #[arg(long)]
        before: PathBuf,
        /// What there is
        #[arg(long)]
        after: PathBuf,
    },
    /// Start survivors in the background and wait until they are ready
    Start {
        /// Their names; none: all
        names: Vec<String>,
        /// Where their files go (FILE is DIR/NAME)
        #[arg(long)]
        dir: PathBuf,
        /// Give up waiting after this many seconds
        #[arg(long, default_value_t = 120)]
        timeout: u64,
        #[command(flatten)]
        how: How,
    },
}

#[derive(Args)]
struct How {
    /// Damage the state just before checking: the survivor must fail
    #[arg(long)]
    damage: bool,
    /// Run on this CPU only
    #[arg(long)]
    cpu: Option<usize>,
    /// Length of the sleeps whose duration is checked, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 5000)]
    period: u64,
    /// Serial line for the tty survivors
    #[arg(long, default_value = "/dev/ttyS1")]
    tty: PathBuf,
    /// The file whose change means that another kernel runs
    #[arg(long, value_name = "PATH", default_value = "/proc/sys/kernel/random/boot_id")]
    boot_id: PathBuf,
}

impl How {
    fn options(&self) -> Result<Options> {
        Ok(Options {
            damage: self.damage,
            cpu: self.cpu,
            period: Duration::from_millis(self.period),
            tty: self.tty.clone(),
            boot_id: std::path::absolute(&self.boot_id)?,
        })
    }
}

fn main() -> ExitCode {
    match command() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("survivors: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn command() -> Result<ExitCode> {
    match Cli::parse().command {
        Sub::List => {
            list();
            Ok(ExitCode::SUCCESS)
        }
        Sub::Run { name, out, how } => {
            let survivor = survivors::find(&name).with_context(|| format!("no survivor is called {name}"))?;
            Ok(ExitCode::from(survivors::run(survivor, &out, how.options()?)?))
        }
        Sub::Crowd { processes, threads, descriptors, mib } => {
            println!("{}", Crowd { processes, threads, descriptors, mib }.start()?);
            Ok(ExitCode::SUCCESS)
        }
        Sub::Operate { dir, seed, count } => {
            survivors::names::operate(&dir, seed, count)?;
            Ok(ExitCode::SUCCESS)
        }
        Sub::Compare { before, after } => {
            println!("{}", survivors::names::differences(&before, &after)?);
            Ok(ExitCode::SUCCESS)
        }
        Sub::CrashprocChild { how, log } => {
            survivors::crashproc::child(&how, &log)?;
            Ok(ExitCode::SUCCESS)
        }
        Sub::Start { names, dir, timeout, how } => {
            let names = match names.is_empty() {
                true => TABLE.iter().filter(|s| s.needs != Needs::Alone).map(|s| s.name.to_owned()).collect(),
                false => names,
            };
            start(&names, &dir, Duration::from_secs(timeout), &how)
        }
    }
}

fn list() {
    for survivor in TABLE {
        let expect = match survivor.expect {
            Expect::Survives => "survives",
            Expect::GivenUp(_) => "given-up",
        };
        let needs = match survivor.needs {
            Needs::Nothing => "-",
            Needs::Root => "root",
            Needs::Avx2 => "avx2",
            Needs::Tty => "tty",
            Needs::Console => "console",
            Needs::Swap => "swap",
            Needs::CrashKernel => "crash-kernel",
            Needs::HugePages => "huge-pages",
            Needs::Alone => "alone",
        };
        println!("{}\t{}\t{expect}\t{needs}\t{}", survivor.name, survivor.kind, survivor.shows);
    }
}

/// Starts each survivor as a process of its own and returns when all are ready; they live on.
fn start(names: &[String], dir: &Path, timeout: Duration, how: &How) -> Result<ExitCode> {
    let options = how.options()?;
    std::fs::create_dir_all(dir)?;
    // The verdicts go here: the disk must know the directory, whenever the crash comes.
    for dir in std::path::absolute(dir)?.ancestors().take(2) {
        std::fs::File::open(dir)
            .and_then(|dir| dir.sync_all())
            .with_context(|| format!("cannot sync {}", dir.display()))?;
    }
    let program = std::env::current_exe()?;
    let mut waiting = Vec::new();
    for name in names {
        let survivor = survivors::find(name).with_context(|| format!("no survivor is called {name}"))?;
        let paths = Paths::new(&dir.join(survivor.name));
        // What an earlier run left must not pass for this one's.
        for file in [&paths.ready, &paths.out] {
            if file.exists() {
                std::fs::remove_file(file)?;
            }
        }
        let mut command = Command::new(&program);
        command.args(["run", name, "--out"]).arg(&paths.out);
        command.args(["--period", &options.period.as_millis().to_string()]);
        command.arg("--tty").arg(&options.tty).arg("--boot-id").arg(&options.boot_id);
        if options.damage {
            command.arg("--damage");
        }
        if let Some(cpu) = options.cpu {
            command.args(["--cpu", &cpu.to_string()]);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        waiting.push((name, paths, child));
    }

    let deadline = Instant::now() + timeout;
    let mut failed = false;
    while !waiting.is_empty() {
        let mut still = Vec::new();
        for (name, paths, mut child) in waiting {
            if paths.ready.exists() {
                println!("ready {name} {}", child.id());
            } else if let Some(status) = child.try_wait()? {
                let why = std::fs::read_to_string(&paths.out).unwrap_or_default();
                println!("{} ({status})", if why.is_empty() { "no word" } else { why.trim() });
                failed = true;
            } else {
                still.push((name, paths, child));
            }
        }
        waiting = still;
        if !waiting.is_empty() && Instant::now() > deadline {
            let names: Vec<&str> = waiting.iter().map(|(name, ..)| name.as_str()).collect();
            bail!("not ready in time: {}", names.join(", "));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
