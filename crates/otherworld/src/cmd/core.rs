//! `otherworld core`

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use corefile::{Core, Missing, Summary};
use ktypes::Kernel;
use resurrect::swap::{BlockDevices, Memory};
use serde::Serialize;
use snapshot::{Bytes, PhysMem, Pid, Process, ProcessState, Severity, Snapshot, SwapArea};
use vmcore::Vmcore;

use crate::cli::Exit;
use crate::dead_memory::DeadMemory;

/// The dead kernel of this machine.
pub(super) const VMCORE: &str = "/proc/vmcore";

/// Write core files of processes of a dead kernel, for gdb.
///
/// Each is an ELF core file as the kernel would have written it, had the process crashed: registers of all threads, and all of its memory that
/// was there when the kernel died. Nothing is changed, no process is needed: it works in the crash kernel, and anywhere on a copy of
/// /proc/vmcore.
///
/// What cannot be read is left out, so that gdb says "Cannot access memory", and is named: on standard error, with --json, and by exit
/// status 4. Pages of mapped files that were not in memory are not missing: gdb takes them from the files, which should be those that the
/// machine had (`set sysroot DIR` in gdb for a copy of them).
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The processes (`otherworld inspect ps` lists them).
    #[arg(value_name = "PID", required_unless_present = "all", conflicts_with = "all")]
    pids: Vec<Pid>,
    /// All processes that have memory.
    #[arg(long)]
    all: bool,
    /// Where to put the files, `core.NAME.PID`; made if it is not there. Others than the owner cannot read them.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// The core of the kernel: /proc/vmcore in a crash kernel, or an ELF file.
    #[arg(long, value_name = "FILE", default_value = VMCORE)]
    core: PathBuf,
    /// Where a swap area's device is now, or an image of it: AREA as /proc/swaps named it; for a file, the device that it is on. In the crash
    /// kernel devices are found by their numbers.
    #[arg(long, value_name = "AREA=DEVICE", value_parser = parse_swap)]
    swap: Vec<(String, PathBuf)>,
    /// For programs: the table as JSON.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "Examples:
  otherworld core 1234 -o /var/crash          in the crash kernel
  otherworld core --all -o cores --core vmcore
  gdb -ex 'thread apply all bt' /usr/sbin/mariadbd cores/core.mariadbd.1234";

fn parse_swap(text: &str) -> Result<(String, PathBuf), String> {
    let (area, device) = text.split_once('=').ok_or("AREA=DEVICE is expected, as in /dev/vdb=vdb.img")?;
    Ok((area.to_owned(), device.into()))
}

/// What became of one process.
#[derive(Serialize)]
struct Row {
    pid: Pid,
    comm: Bytes,
    /// `None` if there is no file.
    file: Option<PathBuf>,
    #[serde(flatten)]
    contents: Option<Contents>,
    /// Why there is no file.
    error: Option<String>,
    /// With `--all`, a process without memory is none that is missing.
    #[serde(skip)]
    is_expected: bool,
}

#[derive(Serialize)]
struct Contents {
    threads: usize,
    bytes: u64,
    /// What the file takes on the disk.
    bytes_on_disk: u64,
    pages: u64,
    file_pages: u64,
    missing_pages: u64,
    missing: Vec<Missing>,
    doubts: Vec<String>,
}

pub fn run(args: &Args) -> Result<Exit> {
    let core = super::inspect::open(&args.core)?;
    fs::create_dir_all(&args.output)
        .with_context(|| format!("cannot make the directory {}", args.output.display()))?;
    let rows = super::with_spinner("reading the dead kernel", || write_all(args, core))?;
    for row in &rows {
        complain(row);
    }
    if args.json {
        super::print_json(&rows)?;
    } else {
        super::print(&table(&rows))?;
    }
    let is_whole = |row: &Row| match &row.contents {
        Some(contents) => contents.missing.is_empty() && contents.doubts.is_empty(),
        None => row.is_expected,
    };
    Ok(if rows.iter().all(is_whole) { Exit::Done } else { Exit::Incomplete })
}

fn write_all(args: &Args, core: Vmcore) -> Result<Vec<Row>> {
    let kernel = Kernel::open(core)?;
    let mut snapshot = autopsy::autopsy(&kernel)?;
    let broken = snapshot.findings.iter().filter(|f| f.pid.is_none() && f.severity == Severity::Broken);
    broken.for_each(|finding| tracing::warn!("{}: {}", finding.object, finding.text));
    let dead = DeadMemory::new(kernel.vmcore());
    let devices = swap_devices(args, &mut snapshot)?;
    let memory = Memory::open(&dead, &mut snapshot, &devices);
    let chosen: Vec<&Process> = if args.all {
        snapshot.processes.iter().collect()
    } else {
        args.pids.iter().map(|pid| find(&snapshot, *pid)).collect::<Result<_>>()?
    };
    Ok(chosen.into_iter().map(|process| row(args, &snapshot, process, &memory)).collect())
}

fn find(snapshot: &Snapshot, pid: Pid) -> Result<&Process> {
    if let Some(process) = snapshot.process(pid) {
        return Ok(process);
    }
    match snapshot.processes.iter().find(|process| process.threads.iter().any(|thread| thread.tid == pid)) {
        Some(process) => {
            bail!("{pid} is a thread of process {} ({}): ask for that one", process.pid, process.comm)
        }
        None => bail!(
            "there was no process {pid}, or it is a thread of the kernel (`otherworld inspect ps` lists them)"
        ),
    }
}

fn row(args: &Args, snapshot: &Snapshot, process: &Process, memory: &dyn PhysMem) -> Row {
    let gone = matches!(process.state, ProcessState::Zombie { .. } | ProcessState::Exiting { .. });
    let row = Row {
        pid: process.pid,
        comm: process.comm.clone(),
        file: None,
        contents: None,
        error: None,
        is_expected: args.all && gone,
    };
    let path = args.output.join(format!("core.{}.{}", file_name(&process.comm), process.pid));
    match write(snapshot, process, memory, &path) {
        Ok(contents) => Row { file: Some(path), contents: Some(contents), ..row },
        Err(error) => Row { error: Some(format!("{error:#}")), ..row },
    }
}

/// A process's name, as a part of a file's.
fn file_name(comm: &Bytes) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+-".contains(&byte);
    comm.as_bytes().iter().map(|byte| if is_plain(*byte) { char::from(*byte) } else { '_' }).collect()
}

/// Writes a core file.
fn write(snapshot: &Snapshot, process: &Process, memory: &dyn PhysMem, path: &Path) -> Result<Contents> {
    let core = Core::new(snapshot, process, memory)?;
    let bytes_on_disk = write_whole(path, |file| Ok(core.write(memory, file)?))?;
    let missing_pages = core.summary().missing_pages();
    let Summary { threads, bytes, pages, file_pages, missing, doubts, .. } = core.summary().clone();
    Ok(Contents { threads, bytes, bytes_on_disk, pages, file_pages, missing_pages, missing, doubts })
}

/// Has a file written that only its owner can read; one of the same name is replaced when the new one is whole. Returns how many bytes it takes on the
/// disk.
pub(super) fn write_whole(path: &Path, write: impl FnOnce(&File) -> Result<()>) -> Result<u64> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let result = write_part(&part, write).and_then(|disk| {
        fs::rename(&part, path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(disk)
    });
    if result.is_err() {
        _ = fs::remove_file(&part);
    }
    result
}

fn write_part(part: &Path, write: impl FnOnce(&File) -> Result<()>) -> Result<u64> {
    const SECTOR: u64 = 512;
    // A link that somebody has put there is not followed.
    match fs::remove_file(part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", part.display()));
        }
        _ => {}
    }
    let file: File = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(part)
        .with_context(|| format!("cannot make {}", part.display()))?;
    write(&file)?;
    Ok(file.metadata()?.blocks() * SECTOR)
}

/// Where swap areas are, as far as they can still be believed.
fn swap_devices(args: &Args, snapshot: &mut Snapshot) -> Result<BlockDevices> {
    let is_here = args.core.as_os_str() == VMCORE;
    let in_use = if is_here { fs::read_to_string("/proc/swaps").unwrap_or_default() } else { String::new() };
    let mut devices = BlockDevices::new();
    for (name, _) in &args.swap {
        if !snapshot.swap_areas.iter().any(|area| area.path.to_string() == *name) {
            let known: Vec<String> = snapshot.swap_areas.iter().map(|area| area.path.to_string()).collect();
            bail!("--swap {name}: the machine had no such swap area; it had: {}", known.join(" "));
        }
    }
    for area in snapshot.swap_areas.iter_mut().filter(|area| area.zram.is_none()) {
        let number = (area.dev_major, area.dev_minor);
        let told = args.swap.iter().find(|(name, _)| area.path.to_string() == *name);
        let device = match told {
            Some((_, device)) => Some(device.clone()),
            None if is_here => device_here(number),
            None => None,
        };
        match device {
            // What this kernel has put there is nobody's.
            Some(device) if told.is_none() && is_used(&in_use, area, &device) => {
                area.unsupported = Some("this kernel uses it, and may have overwritten it".into());
            }
            Some(device) => {
                devices.insert(number, device);
            }
            None if !is_here && area.unsupported.is_none() => {
                area.unsupported =
                    Some("its device is not in the dump (name it, or an image of it, with --swap)".into());
            }
            None => {}
        }
    }
    Ok(devices)
}

/// The device that has a number in this kernel. Whether the area is on it is seen by its header.
fn device_here((major, minor): (u32, u32)) -> Option<PathBuf> {
    let name = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).ok()?;
    let name = name.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

/// Whether the area, or its device, is in a text like that of /proc/swaps.
fn is_used(swaps: &str, area: &SwapArea, device: &Path) -> bool {
    let names = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let own = area.path.to_string();
    names.into_iter().any(|name| name == own || Path::new(name) == device)
}

/// Names what is missing, and what is in doubt.
fn complain(row: &Row) {
    let who = format!("otherworld: process {} ({})", row.pid, row.comm);
    if let Some(error) = row.error.as_ref().filter(|_| !row.is_expected) {
        eprintln!("{who}: no core file: {error}");
    }
    let Some(contents) = &row.contents else { return };
    for part in &contents.missing {
        let pages = (part.end - part.start) / snapshot::PAGE_SIZE;
        eprintln!(
            "{who}: missing: {:x}-{:x} ({pages} pages of {}): {}",
            part.start, part.end, part.mapping, part.why
        );
    }
    for doubt in &contents.doubts {
        eprintln!("{who}: {doubt}");
    }
}

fn table(rows: &[Row]) -> String {
    let mut out = format!(
        "{:>7} {:>7} {:>9} {:>9} {:>7} {:>14} {:>12}  FILE\n",
        "PID", "THREADS", "PAGES", "IN FILES", "MISSING", "BYTES", "ON DISK"
    );
    for row in rows {
        let line = match (&row.contents, &row.file) {
            (Some(c), Some(file)) => format!(
                "{:>7} {:>7} {:>9} {:>9} {:>7} {:>14} {:>12}  {}",
                row.pid,
                c.threads,
                c.pages,
                c.file_pages,
                c.missing_pages,
                c.bytes,
                c.bytes_on_disk,
                file.display()
            ),
            _ => format!(
                "{:>7} {:>62}  ({}: {})",
                row.pid,
                "-",
                row.comm,
                row.error.as_deref().unwrap_or_default()
            ),
        };
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_processes_are_parts_of_file_names_only() {
        assert_eq!(file_name(&"mariadbd".into()), "mariadbd");
        assert_eq!(file_name(&Bytes(b"../a b\xff".to_vec())), ".._a_b_");
    }

    #[test]
    fn areas_that_this_kernel_uses_are_recognised() {
        let area = SwapArea {
            index: 0,
            path: "/swapfile".into(),
            is_device: false,
            dev_major: 254,
            dev_minor: 0,
            slots: 8,
            extents: Vec::new(),
            flags: 0,
            zram: None,
            unsupported: None,
        };
        let head = "Filename\tType\tSize\tUsed\tPriority\n";
        assert!(!is_used(head, &area, Path::new("/dev/vda")));
        assert!(is_used(&format!("{head}/swapfile file 4 0 -2\n"), &area, Path::new("/dev/vda")));
        assert!(is_used(&format!("{head}/dev/vda partition 4 0 -2\n"), &area, Path::new("/dev/vda")));
        assert!(!is_used(&format!("{head}/dev/vdb partition 4 0 -2\n"), &area, Path::new("/dev/vda")));
    }
}
