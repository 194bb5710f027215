//! Memory that was swapped out.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise};

use crate::Stage;
use crate::child::Child;
use crate::map::{Map, PAGE};
use crate::prng;
use crate::procfs::{self, same};
use crate::stage::sleep;

/// Of an entry of /proc/PID/pagemap: the page is swapped out.
const SWAPPED: u64 = 1 << 62;
const ATTEMPTS: u32 = 200;

/// Whether all of a mapping is swapped out. The kernel forgets where pages of shared memory were mapped when it swaps them out; smaps
/// asks the file.
fn is_swapped_out(map: &Map) -> Result<bool> {
    let pages = map.bytes().len() / PAGE;
    let kib = || procfs::smaps_value(std::process::id() as i32, map.address(), "Swap");
    Ok(swapped_out(map.address(), pages)? == pages || kib()? == (pages * PAGE / 1024) as u64)
}

/// How many pages of private memory from an address on are swapped out.
fn swapped_out(address: usize, pages: usize) -> Result<usize> {
    let mut entries = vec![0; pages * 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entries, (address / PAGE * 8) as u64)?;
    let entries = entries.as_chunks::<8>().0.iter().map(|entry| u64::from_ne_bytes(*entry));
    Ok(entries.filter(|entry| entry & SWAPPED != 0).count())
}

/// Has the kernel swap out all of a mapping.
fn swap_out(map: &Map) -> Result<()> {
    // Pages that are on their way to the kernel's lists are passed over.
    for _ in 0..ATTEMPTS {
        map.advise(MmapAdvise::MADV_PAGEOUT)?;
        if is_swapped_out(map)? {
            return Ok(());
        }
        sleep(Duration::from_millis(10));
    }
    bail!("not all of its pages can be swapped out")
}

/// Private memory: pages in a swap area, pages that are in memory again as well, pages of zeroes.
pub fn private(stage: &mut Stage) -> Result<()> {
    const PAGES: usize = 1024;
    let mut map = Map::anonymous(PAGES * PAGE, MapFlags::MAP_PRIVATE)?;
    map.advise(MmapAdvise::MADV_NOHUGEPAGE)?;
    prng::fill(1, &mut map.bytes_mut()[..PAGES / 2 * PAGE]);
    map.bytes_mut()[PAGES / 2 * PAGE..].chunks_mut(PAGE).for_each(|page| page[0] = 1);
    map.bytes_mut()[PAGES / 2 * PAGE..].chunks_mut(PAGE).for_each(|page| page[0] = 0);
    swap_out(&map)?;
    prng::verify(1, &map.bytes()[..16 * PAGE])?;
    ensure!(swapped_out(map.address(), PAGES)? > PAGES / 4, "it was all read in again");
    let before = procfs::mapping(map.address())?;
    // That begins anew with the next boot.
    let is_zram = std::fs::read_to_string("/proc/swaps")?.contains("/dev/zram");

    let crash = stage.crash()?;
    if crash.damage {
        map.bytes_mut()[100 * PAGE + 1] ^= 1;
    }
    prng::verify(1, &map.bytes()[..PAGES / 2 * PAGE])?;
    ensure!(map.bytes()[PAGES / 2 * PAGE..].iter().all(|byte| *byte == 0), "zeroes are not zero");
    same("mapping", &before, &procfs::mapping(map.address())?)?;
    // It can be swapped out as before.
    prng::fill(2, map.bytes_mut());
    if !is_zram {
        swap_out(&map).context("after the crash")?;
    }
    prng::verify(2, map.bytes())
}

/// Pages that a process and its forked child share, swapped out once for both.
pub fn fork(stage: &mut Stage) -> Result<()> {
    const PAGES: usize = 256;
    let half = PAGES / 2 * PAGE;
    let mut map = Map::anonymous(PAGES * PAGE, MapFlags::MAP_PRIVATE)?;
    prng::fill(3, map.bytes_mut());
    swap_out(&map)?;
    let mut child = Child::fork(stage, "fork", |stage, ready| {
        prng::fill(4, &mut map.bytes_mut()[..half]);
        ready.announce()?;
        if stage.wait().damage {
            map.bytes_mut()[half] ^= 1;
        }
        prng::verify(4, &map.bytes()[..half]).context("what the child wrote")?;
        ensure!(map.bytes()[half..] == prng::bytes(3, PAGES * PAGE)[half..], "what the child shares differs");
        Ok(())
    })?;
    ensure!(swapped_out(map.address() + half, PAGES / 2)? > 0, "all is in memory");

    stage.crash()?;
    prng::verify(3, map.bytes()).context("in the parent")?;
    child.join()
}

/// Shared memory: of a process and its child, a file without a name, and one on a tmpfs.
pub fn shared(stage: &mut Stage) -> Result<()> {
    const PAGES: usize = 256;
    const LEN: usize = PAGES * PAGE;
    let mut map = Map::anonymous(LEN, MapFlags::MAP_SHARED)?;
    prng::fill(5, map.bytes_mut());
    swap_out(&map)?;
    let memfd = File::from(memfd_create("swapped", MFdFlags::MFD_CLOEXEC)?);
    let path = format!("/dev/shm/swap-shared-{}", std::process::id());
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    for (seed, file) in [(6, &memfd), (7, &file)] {
        file.set_len(LEN as u64)?;
        let mut map = Map::file(file, LEN, MapFlags::MAP_SHARED)?;
        prng::fill(seed, map.bytes_mut());
        swap_out(&map)?;
    }
    let mut child = Child::fork(stage, "shared", |stage, ready| {
        ready.announce()?;
        if stage.wait().damage {
            map.bytes_mut()[7 * PAGE] ^= 1;
        }
        prng::verify(5, map.bytes()).context("in the child")
    })?;

    stage.crash()?;
    let outcome = child.join().and_then(|()| {
        prng::verify(5, map.bytes()).context("shared with a child")?;
        for (seed, file) in [(6, &memfd), (7, &file)] {
            let mut bytes = vec![0; LEN];
            file.read_exact_at(&mut bytes, 0)?;
            prng::verify(seed, &bytes).with_context(|| format!("descriptor {}", file.as_raw_fd()))?;
        }
        prng::verify(7, &fs::read(&path)?).context("under its name")
    });
    fs::remove_file(&path)?;
    outcome
}

/// A private mapping of a file, whose own pages were swapped out; some are zero where the file is not.
pub fn file_private(stage: &mut Stage) -> Result<()> {
    const PAGES: usize = 64;
    let path = stage.path("file");
    fs::write(&path, prng::bytes(8, PAGES * PAGE))?;
    File::open(&path)?.sync_all()?;
    let mut map = Map::file(File::open(&path)?, PAGES * PAGE, MapFlags::MAP_PRIVATE)?;
    let mut expected = prng::bytes(8, PAGES * PAGE);
    for page in (0..PAGES).step_by(2) {
        let own = &mut expected[page * PAGE..][..PAGE];
        if page % 4 == 0 {
            own.fill(0)
        } else {
            prng::fill(page as u64, own)
        }
        map.bytes_mut()[page * PAGE..][..PAGE].copy_from_slice(own);
    }
    for _ in 0..ATTEMPTS {
        map.advise(MmapAdvise::MADV_PAGEOUT)?;
        if swapped_out(map.address(), PAGES)? == PAGES / 2 {
            break;
        }
        sleep(Duration::from_millis(10));
    }
    same("swapped-out pages", &(PAGES / 2), &swapped_out(map.address(), PAGES)?)?;

    let crash = stage.crash()?;
    if crash.damage {
        map.bytes_mut()[0] ^= 1;
    }
    let wrong = map.bytes().chunks(PAGE).zip(expected.chunks(PAGE)).filter(|(is, should)| is != should);
    same("pages that differ", &0, &wrong.count())
}

/// A process of which everything that can be is swapped out, its stack too, while it waits.
pub fn everything(stage: &mut Stage) -> Result<()> {
    let mut child = Child::fork(stage, "everything", |stage, ready| {
        let heap: Vec<u64> = (0..100_000).collect();
        let on_stack = [0x5a_u8; 3 * PAGE];
        let mut swapped = 0;
        for _ in 0..ATTEMPTS {
            page_all_out()?;
            swapped = swapped_kib()?;
            if swapped > 800 {
                break;
            }
            sleep(Duration::from_millis(10));
        }
        ensure!(swapped > 800, "only {swapped} KiB are swapped out");
        ready.announce()?;
        let crash = stage.wait();
        let damage = u64::from(crash.damage);
        ensure!(heap.iter().sum::<u64>() + damage == 4_999_950_000, "the heap differs");
        ensure!(on_stack.iter().all(|byte| *byte == 0x5a), "the stack differs");
        Ok(())
    })?;

    stage.crash()?;
    child.join()
}

/// Has the kernel swap out all writable private memory of this process.
fn page_all_out() -> Result<()> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
        let range =
            line.split_once(' ').and_then(|(range, _)| range.split_once('-')).context("a strange line")?;
        let (start, end) = (usize::from_str_radix(range.0, 16)?, usize::from_str_radix(range.1, 16)?);
        // SAFETY: contents stay what they are.
        unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_PAGEOUT) };
    }
    Ok(())
}

fn swapped_kib() -> Result<u64> {
    let swap = procfs::status(&["VmSwap"])?;
    let value = swap.get("VmSwap").context("no VmSwap")?;
    Ok(value.trim().trim_end_matches(" kB").parse()?)
}
