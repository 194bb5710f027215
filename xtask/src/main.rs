//! `cargo xtask`: everything that a developer of Otherworld runs, with all its set-up done by itself.
//!
//! One file per command. In goes the command line; out come lines for people, an exit status for scripts, and artifacts
//! below `target/lab/`. Nothing outside `target/` is touched, except that missing host tools are installed through apt when root.

mod apps;
mod bench;
mod build;
mod campaign;
mod cores;
mod crash;
mod crash_runs;
mod demo;
mod durability;
mod fpu_runs;
mod fuzz;
mod ground_truth;
mod guest;
mod in_guest;
mod lab_cmd;
mod libotherworld;
mod real_programs;
mod survive;
mod test;
mod ui;
mod unhappy;
mod vmcore_cmd;
mod whole_machine;
mod workload;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use lab::{Accel, Lab, Series};

/// Project automation. Every command makes what it needs (guest images, static binaries, snapshots) and keeps it below target/.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
struct Global {
    /// What runs the guests: "tcg" works everywhere, "kvm" needs a host where stock kernels boot under it.
    #[arg(long, global = true, value_enum, default_value = "tcg")]
    accel: AccelArg,
    /// Look for newer kernels and packages instead of using those in the cache.
    #[arg(long, global = true)]
    refresh: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum AccelArg {
    Tcg,
    Kvm,
}

impl Global {
    fn accel(&self) -> Accel {
        match self.accel {
            AccelArg::Tcg => Accel::Tcg,
            AccelArg::Kvm => Accel::Kvm,
        }
    }

    /// The lab, with its agent built.
    fn lab(&self) -> anyhow::Result<Lab> {
        let lab = Lab::open(&build::target_dir().join("lab"), &build::agent()?)?.on_progress(ui::note);
        Ok(if self.refresh { lab.refresh() } else { lab })
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows it: five unmodified programs survive a panic of the kernel under them, before your eyes.
    Demo(demo::Demo),
    /// Takes applications with crash procedures through panics: JOE, MariaDB, the examples of libotherworld.
    Apps(apps::Apps),
    /// Builds libotherworld (crash procedures) for C programs.
    Libotherworld(libotherworld::Libotherworld),
    /// Feeds broken input to what reads it: records, cores, BTF, kernel structures, captured memory.
    Fuzz(fuzz::Fuzz),
    /// Runs the unit tests and the tests in virtual machines.
    Test(test::Test),
    /// Panics a guest at random moments, many times, and counts the programs whose output is right.
    CrashRuns(crash_runs::CrashRuns),
    /// Kills kernels in a thousand ways, and counts what became of the programs.
    Campaign(campaign::Campaign),
    /// Takes one small program per kind of kernel state through a panic.
    Survivors(survive::Survivors),
    /// Takes real programs, as Debian ships them, through panics at random moments.
    RealPrograms(real_programs::RealPrograms),
    /// Takes databases that sync nothing, and random operations on files, through panics, and looks at what is on the disk.
    Durability(durability::Durability),
    /// Takes a whole Debian with systemd, PID 1 included, through panics at random moments.
    WholeMachine(whole_machine::WholeMachine),
    /// Takes live vector registers through panics, with and without the register saver.
    FpuRuns(fpu_runs::FpuRuns),
    /// Breaks one thing at a time on a machine, and looks whether it is named and nothing else is lost.
    Unhappy(unhappy::Unhappy),
    /// Compares what the running kernel says in /proc with what is read from its memory after the panic, and with what the
    /// resurrected processes show.
    GroundTruth(ground_truth::GroundTruth),
    /// Writes core files of processes of a dead kernel, and compares them with what gdb and /proc told of the living ones.
    Cores(cores::Cores),
    /// Measures how long each part of a resurrection takes, beside the floor that no one can go below.
    Bench(bench::Bench),
    /// Makes a /proc/vmcore file of a crashed guest, with a recording of its /proc just before, for work on the reading half.
    Vmcore(vmcore_cmd::Vmcore),
    /// Boots guests to try things in, and cleans up.
    Lab(lab_cmd::LabCommand),
    /// Builds the static binaries that go into guests (target/static).
    BuildStatic,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Apps(command) => command.run(&cli.global),
        Command::Fuzz(command) => command.run(),
        Command::Libotherworld(command) => command.run(),
        Command::Demo(command) => command.run(&cli.global),
        Command::Test(command) => command.run(&cli.global),
        Command::CrashRuns(command) => command.run(&cli.global),
        Command::Campaign(command) => command.run(&cli.global),
        Command::Survivors(command) => command.run(&cli.global),
        Command::RealPrograms(command) => command.run(&cli.global),
        Command::Durability(command) => command.run(&cli.global),
        Command::WholeMachine(command) => command.run(&cli.global),
        Command::FpuRuns(command) => command.run(&cli.global),
        Command::Unhappy(command) => command.run(&cli.global),
        Command::GroundTruth(command) => command.run(&cli.global),
        Command::Cores(command) => command.run(&cli.global),
        Command::Bench(command) => command.run(&cli.global),
        Command::Vmcore(command) => command.run(&cli.global),
        Command::Lab(command) => command.run(&cli.global),
        Command::BuildStatic => build::static_binaries().map(|binaries| {
            println!("{}", binaries.dir.display());
            true
        }),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            ui::finish();
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Kernels named on the command line; all if none is.
fn series_or_all(named: Option<Series>) -> Vec<Series> {
    named.map_or_else(|| Series::ALL.to_vec(), |series| vec![series])
}
