//! `otherworld inspect`: the dead kernel as a book. One file per kind of thing.

pub mod check;
mod files;
mod maps;
mod modules;
mod mounts;
mod panic;
mod ps;
mod slab;
mod sockets;
mod threads;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use autopsy::Autopsy;
use clap::Subcommand;
use ktypes::Kernel;
use snapshot::{Finding, Panic, Pid, Process, Severity, Snapshot};
use vmcore::Vmcore;

use crate::cli::Exit;

pub use panic::log_line;

#[derive(clap::Args)]
pub struct Args {
    /// The core: /proc/vmcore in a crash kernel, or an ELF file.
    #[arg(long, value_name = "FILE", global = true, default_value = "/proc/vmcore")]
    core: PathBuf,
    /// For programs.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The processes that were running.
    ///
    /// PAGES and SWAPPED are the kernel's own counts of a process's pages in memory and in swap.
    Ps,
    /// All threads, the kernel's own too: where each one was.
    ///
    /// CPU: the one that a thread was running on, with `!` the one that panicked. SYSTEM CALL: the call that a thread of a program
    /// was in; `?` where that cannot be told, with the reason at the end. WAITS IN: the kernel function in which it slept. The
    /// kernel's own threads are in brackets.
    Threads,
    /// The kernel stacks of all threads of a process.
    ///
    /// Innermost function first. Functions of modules have the module's name behind them; a `?` is before what was guessed, as in
    /// `inspect panic`. A thread that was running its program has no kernel stack.
    Stack {
        /// PID, or the TID of one thread.
        #[arg(value_name = "PID")]
        pid: Pid,
    },
    /// The memory mappings of a process.
    Maps {
        #[allow(missing_docs)]
        pid: Pid,
    },
    /// The open files of a process.
    Files {
        #[allow(missing_docs)]
        pid: Pid,
    },
    /// The sockets that programs had open, in the manner of `ss -a`.
    ///
    /// RECV-Q and SEND-Q are bytes; of a listening socket the connections that wait, and the backlog. INODE is the number in
    /// `socket:[N]`. Sockets that no program has open are not listed: the kernel's own, and TCP's that nobody has accepted or
    /// that are over.
    Sockets,
    /// What was mounted, in every mount namespace, in the manner of findmnt.
    Mounts,
    /// The loaded modules, the latest first, in the manner of lsmod.
    ///
    /// TAINT: `P` proprietary, `O` out of tree, `E` not signed, `C` staging, `K` live patch, `N` test.
    Modules,
    /// The slab caches, the largest first, in the manner of slabtop.
    ///
    /// ACTIVE is the number of /proc/slabinfo, which takes what CPUs have in reserve for active; IN USE is without that.
    SlabSummary,
    /// The kernel log.
    Dmesg,
    /// The panic: message, task, stack.
    Panic,
    /// What contradicts itself in the dead kernel's memory.
    ///
    /// Everything that is read is compared with what duplicates it: slab caches, task lists and PIDs, page tables and the pages' own
    /// account, descriptors, names and inodes, sockets, credentials. DONE says what the strict policy ([integrity] in the
    /// configuration) does about it.
    Check,
    /// Everything that would be used to rebuild the processes (as JSON), and what was noticed on the way.
    Snapshot,
}

pub fn run(args: &Args) -> Result<Exit> {
    let core = open(&args.core)?;
    let text = super::with_spinner("reading the dead kernel", || answer(args, core))?;
    super::print(&text)?;
    Ok(Exit::Done)
}

/// Opens a core.
pub fn open(path: &Path) -> Result<Vmcore> {
    let core = Vmcore::open(path).with_context(|| {
        if path.as_os_str() == "/proc/vmcore" {
            "there is no dead kernel here (name a core file with --core)".to_owned()
        } else {
            format!("cannot use {}", path.display())
        }
    })?;
    if let Some(truncation) = core.truncated() {
        tracing::warn!("{truncation}");
    }
    Ok(core)
}

fn answer(args: &Args, core: Vmcore) -> Result<String> {
    let kernel = Kernel::open(core)?;
    let autopsy = Autopsy::new(&kernel);
    let answered = match &args.what {
        What::Dmesg => show(args, &autopsy.kernel_log()?, |log| log.iter().map(log_line).collect()),
        What::Panic => show(args, &Panic { log: Vec::new(), ..autopsy.panic_report() }, panic::text),
        What::Ps => show(args, &autopsy.process_summaries()?, |all| ps::text(all)),
        What::Threads => show(args, &autopsy.thread_summaries()?, |all| threads::text(all)),
        What::Stack { pid } => {
            let stacks = autopsy.stacks(*pid)?;
            if stacks.is_empty() {
                tell(&autopsy.findings());
                bail!("there was no process or thread {pid} (`otherworld inspect threads` lists them)");
            }
            show(args, &stacks, |all| threads::stacks(all))
        }
        What::Sockets => show(args, &autopsy.socket_summaries()?, |all| sockets::text(all)),
        What::Mounts => show(args, &autopsy.all_mounts()?, |all| mounts::text(all)),
        What::Modules => show(args, &autopsy.modules()?, |all| modules::text(all)),
        What::SlabSummary => show(args, &autopsy.slab_caches()?, |all| slab::text(all)),
        // The answer to this is all findings.
        What::Check => {
            let findings = check::findings(autopsy.snapshot()?);
            return show(args, &findings, |all| check::table(all));
        }
        What::Maps { .. } | What::Files { .. } | What::Snapshot => {
            let snapshot = autopsy.snapshot()?;
            tell(&snapshot.findings);
            return of_snapshot(args, &snapshot);
        }
    };
    // The log and the panic are all that those who ask for them want to know.
    if !matches!(args.what, What::Dmesg | What::Panic) {
        tell(&autopsy.findings());
    }
    answered
}

/// What needs more of a process than a glance.
fn of_snapshot(args: &Args, snapshot: &Snapshot) -> Result<String> {
    match args.what {
        What::Maps { pid } => {
            let process = find(snapshot, pid)?;
            let id = process.address_space.context("a zombie has no memory")?;
            let mm = snapshot.address_spaces.get(&id).context("its mappings could not be read")?;
            show(args, mm, |mm| maps::text(snapshot, mm))
        }
        What::Files { pid } => {
            let process = find(snapshot, pid)?;
            if args.json { json(&files::json(snapshot, process)) } else { Ok(files::text(snapshot, process)) }
        }
        _ => json(snapshot),
    }
}

/// What is missing from the answer, or may be, is said unasked.
fn tell(findings: &[Finding]) {
    for finding in findings {
        let process = finding.pid.map(|p| format!("process {p}: ")).unwrap_or_default();
        if finding.pid.is_none() || finding.severity == Severity::Broken {
            tracing::warn!("{process}{}: {}", finding.object, finding.text);
        } else {
            tracing::info!("{:?}: {process}{}: {}", finding.severity, finding.object, finding.text);
        }
    }
}

/// As JSON, or as `text` makes it.
fn show<T: serde::Serialize + ?Sized>(
    args: &Args,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<String> {
    if args.json { json(value) } else { Ok(text(value)) }
}

fn json(value: &(impl serde::Serialize + ?Sized)) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Rows under a header, each column as wide as it must be; the columns of `right` have their text at the right.
fn table<const N: usize>(
    header: &[&str; N],
    right: &[usize],
    rows: impl Iterator<Item = [String; N]>,
) -> String {
    let rows: Vec<[String; N]> = std::iter::once(header.map(str::to_owned)).chain(rows).collect();
    let width = |n: usize| rows.iter().map(|row| row[n].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut out = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(n, (cell, width))| match right.contains(&n) {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

fn find(snapshot: &Snapshot, pid: Pid) -> Result<&Process> {
    match snapshot.process(pid) {
        Some(process) => Ok(process),
        None => bail!("there was no process {pid} (`otherworld inspect ps` lists them)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [["a", "1", ""], ["longer", "200", "x"]].map(|row| row.map(str::to_owned));
        assert_eq!(
            table(&["NAME", "N", "LAST"], &[1], rows.into_iter()),
            "NAME      N  LAST\na         1\nlonger  200  x\n"
        );
    }
}
