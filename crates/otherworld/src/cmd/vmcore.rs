//! `otherworld vmcore`

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use autopsy::Autopsy;
use corefile::KernelCore;
use ktypes::Kernel;
use serde::Serialize;
use snapshot::{PAGE_SIZE, PhysRange};

use super::core::{VMCORE, write_whole};
use crate::cli::Exit;
use crate::dead_memory::DeadMemory;

/// Part of a file system that stays free.
const RESERVE: u64 = 20;

/// Keep the kernel's own pages of a dead kernel's memory: a small core for `inspect`, crash(8) or drgn.
///
/// Left out are pages of programs and of files, and free ones; what is left tells how the kernel died, and little of what its programs had in memory.
/// (Pipes, sockets and the like are the kernel's. A few pages that were being moved from one list to another may be in it.) Processes cannot be
/// brought back from it, nor core files be made. init does this when a resurrection fails, as `[failure] vmcore` says.
///
/// A twentieth of the file system stays free; if the file would not fit, none is written.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The file to write. Others than the owner cannot read it.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// The core of the kernel: /proc/vmcore in a crash kernel, or an ELF file.
    #[arg(long, value_name = "FILE", default_value = VMCORE)]
    core: PathBuf,
    /// For programs: the sizes as JSON.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "Examples:
  otherworld vmcore -o /var/crash/kernel
  otherworld vmcore --core vmcore -o small && otherworld inspect ps --core small";

#[derive(Serialize)]
struct Kept {
    file: PathBuf,
    /// Pages (4 KiB) of the dead machine's memory, and those that were kept.
    all_pages: u64,
    pages: u64,
    bytes: u64,
    /// What the file takes on the disk.
    bytes_on_disk: u64,
}

pub fn run(args: &Args) -> Result<Exit> {
    let core = super::inspect::open(&args.core)?;
    let kept = super::with_spinner("copying the kernel's pages", || copy(args, core))?;
    if args.json {
        super::print_json(&kept)?;
    } else {
        super::print(&format!(
            "{}: {} of {} pages, {} MiB on the disk\n",
            kept.file.display(),
            kept.pages,
            kept.all_pages,
            kept.bytes_on_disk.div_ceil(1 << 20)
        ))?;
    }
    Ok(Exit::Done)
}

fn copy(args: &Args, core: vmcore::Vmcore) -> Result<Kept> {
    let kernel = Kernel::open(core)?;
    let pages = Autopsy::new(&kernel).kernel_pages().context("which pages are the kernel's")?;
    let ranges: Vec<PhysRange> = pages.iter().map(|r| PhysRange { start: r.start, len: r.len }).collect();
    let count = |len: u64| len / PAGE_SIZE;
    let (pages, all_pages) = (
        count(ranges.iter().map(|range| range.len).sum()),
        count(kernel.vmcore().ranges().iter().map(|range| range.len).sum()),
    );
    let file = KernelCore::new(ranges, kernel.vmcore().notes().to_vec(), kernel.memory().page_offset());
    let bytes = file.bytes();
    has_room(&args.output, bytes)?;
    let memory = DeadMemory::new(kernel.vmcore());
    let bytes_on_disk = write_whole(&args.output, |out| {
        file.write(&memory, out)?;
        Ok(out.sync_all()?)
    })?;
    Ok(Kept { file: args.output.clone(), all_pages, pages, bytes, bytes_on_disk })
}

fn has_room(file: &Path, bytes: u64) -> Result<()> {
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let disk = rustix::fs::statvfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    let (free, all) = (disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize);
    ensure!(
        fits(bytes, free, all),
        "no room in {}: {} MiB are needed, {} MiB are free, and a {RESERVE}th of {} MiB stays free",
        dir.display(),
        bytes.div_ceil(1 << 20),
        free >> 20,
        all >> 20
    );
    Ok(())
}

fn fits(bytes: u64, free: u64, all: u64) -> bool {
    free.checked_sub(all / RESERVE).is_some_and(|room| bytes <= room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_disk_stays_free() {
        assert!(fits(50, 100, 1000));
        assert!(!fits(51, 100, 1000));
        assert!(!fits(0, 49, 1000));
    }
}
