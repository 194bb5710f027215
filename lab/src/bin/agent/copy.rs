//! The yardstick for pouring: a plain copy out of the dead kernel's memory.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::time::{Duration, Instant};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Mapped at a time, in bytes.
const WINDOW: usize = 4 << 20;

/// Copies up to `limit` bytes out of `/proc/vmcore`'s largest segment, window by window, each into fresh memory. How many bytes, in what
/// time.
///
/// What has been copied is kept to the end: freed at once, it would be what the next window gets, still in all caches and known to
/// the host, as no memory is that processes are poured into. Therefore also no more than half of what is free.
pub fn measure(limit: u64) -> io::Result<(u64, Duration)> {
    let core = File::open("/proc/vmcore")?;
    let (offset, size) = largest_segment(&core)?;
    let windows = (size.min(limit).min(available()? / 2) / WINDOW as u64).max(1);
    let length = NonZeroUsize::new(WINDOW).ok_or_else(|| io::Error::other("empty window"))?;
    let mut time = Duration::ZERO;
    let mut kept = Vec::new();
    for n in 0..windows {
        let at = (offset + n * WINDOW as u64) as i64;
        let start = Instant::now();
        // SAFETY: new mappings of WINDOW bytes each, at addresses that the kernel chooses; both are unmapped below and nothing else
        // keeps a pointer. What is copied is plain bytes.
        unsafe {
            let from = mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, &core, at)?;
            let to = mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE,
            )?;
            ptr::copy_nonoverlapping(from.as_ptr().cast::<u8>(), to.as_ptr().cast::<u8>(), WINDOW);
            time += start.elapsed();
            munmap(from, WINDOW)?;
            kept.push(to);
        }
    }
    for to in kept {
        // SAFETY: mapped above, and nothing points into it.
        unsafe { munmap(to, WINDOW)? };
    }
    Ok((windows * WINDOW as u64, time))
}

/// Bytes of memory that can be had, by /proc/meminfo.
fn available() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other("/proc/meminfo does not tell what is available"))
}

/// File offset and size of the largest PT_LOAD (elf(5)).
fn largest_segment(core: &File) -> io::Result<(u64, u64)> {
    let mut header = [0; 64];
    core.read_exact_at(&mut header, 0)?;
    let table = u64::from_le_bytes(header[32..40].try_into().map_err(io::Error::other)?);
    let count = u16::from_le_bytes(header[56..58].try_into().map_err(io::Error::other)?);
    let mut largest = (0, 0);
    for n in 0..u64::from(count) {
        let mut entry = [0; 56];
        core.read_exact_at(&mut entry, table + n * 56)?;
        let word =
            |at: usize| entry[at..at + 8].iter().rev().fold(0u64, |word, &byte| word << 8 | u64::from(byte));
        let is_load = entry[..4] == [1, 0, 0, 0];
        if is_load && word(32) > largest.1 {
            largest = (word(8), word(32));
        }
    }
    if largest.1 < WINDOW as u64 {
        return Err(io::Error::other("/proc/vmcore has no segment of memory"));
    }
    Ok(largest)
}
