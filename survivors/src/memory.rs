//! Memory: contents, sharing, protection, flags, and the fields of the mm.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags};

use crate::Stage;
use crate::child::Child;
use crate::map::{Map, PAGE, READ_WRITE};
use crate::prng;
use crate::procfs::{self, same};

const MIB: usize = 1 << 20;
const PRIVATE: MapFlags = MapFlags::MAP_PRIVATE;

/// 64 MiB in small pages.
pub fn small(stage: &mut Stage) -> Result<()> {
    random_pages(stage, 0x5ea1, MmapAdvise::MADV_NOHUGEPAGE)
}

/// 64 MiB in huge pages, as far as the machine has them.
pub fn huge(stage: &mut Stage) -> Result<()> {
    random_pages(stage, 0xb16, MmapAdvise::MADV_HUGEPAGE)
}

fn random_pages(stage: &mut Stage, seed: u64, advice: MmapAdvise) -> Result<()> {
    // One huge page more, so that 64 MiB are aligned whatever the start is.
    let mut map = Map::anonymous(66 * MIB, PRIVATE)?;
    map.advise(advice)?;
    prng::fill(seed, map.bytes_mut());
    let before = procfs::mapping(map.address())?;

    let crash = stage.crash()?;
    if crash.damage {
        map.bytes_mut()[33 * MIB + 5] ^= 1;
    }
    prng::verify(seed, map.bytes())?;
    same("mapping", &before, &procfs::mapping(map.address())?)?;
    // And they are still memory that can be written.
    prng::fill(seed + 1, map.bytes_mut());
    prng::verify(seed + 1, map.bytes())
}

/// Parent and child after a fork: pages that neither wrote, that one wrote, that both wrote.
pub fn fork(stage: &mut Stage) -> Result<()> {
    const PART: usize = 64 * PAGE;
    let mut map = Map::anonymous(4 * PART, PRIVATE)?;
    for part in 0..4 {
        prng::fill(part as u64, &mut map.bytes_mut()[part * PART..][..PART]);
    }
    let parts = |map: &Map, seeds: [u64; 4]| {
        (0..4).try_for_each(|part| {
            prng::verify(seeds[part], &map.bytes()[part * PART..][..PART])
                .with_context(|| format!("part {part}"))
        })
    };
    let mut child = Child::fork(stage, "fork", |stage, ready| {
        prng::fill(11, &mut map.bytes_mut()[PART..][..PART]);
        prng::fill(13, &mut map.bytes_mut()[3 * PART..][..PART]);
        ready.announce()?;
        if stage.wait().damage {
            map.bytes_mut()[0] ^= 1;
        }
        parts(&map, [0, 11, 2, 13]).context("in the child")
    })?;
    prng::fill(22, &mut map.bytes_mut()[2 * PART..][..PART]);
    prng::fill(23, &mut map.bytes_mut()[3 * PART..][..PART]);

    stage.crash()?;
    parts(&map, [0, 1, 22, 23]).context("in the parent")?;
    child.join()
}

/// A large parent and its forked children (and a grandchild) need the memory of one, before and after.
pub fn fork_family(stage: &mut Stage) -> Result<()> {
    const PAGES: usize = 4096;
    let mut map = Map::anonymous(PAGES * PAGE, PRIVATE)?;
    let half = PAGES / 2 * PAGE;
    prng::fill(5, &mut map.bytes_mut()[half..]);
    map.bytes_mut()[..half].chunks_mut(PAGE).for_each(|page| page[0] = 1);
    let address = map.address();
    // Who is there stays until the other end is closed: by reading nobody unshares anything.
    let (hold, release) = nix::unistd::pipe()?;
    let hold = &File::from(hold);
    let verify = |map: &Map, own_page: usize, seed: u64| -> Result<()> {
        prng::verify(seed, &map.bytes()[own_page * PAGE..][..PAGE]).context("a page that it had written")?;
        prng::verify(5, &map.bytes()[half..]).context("the shared half")
    };
    let mut children = Vec::new();
    for n in 1..5usize {
        let release = release.as_raw_fd();
        children.push(Child::fork(stage, &format!("family-{n}"), |stage, ready| {
            nix::unistd::close(release)?;
            prng::fill(n as u64, &mut map.bytes_mut()[n * PAGE..][..PAGE]);
            let grandchild = (n == 1).then(|| {
                Child::fork(stage, "family-grandchild", |stage, ready| {
                    prng::fill(77, &mut map.bytes_mut()[77 * PAGE..][..PAGE]);
                    ready.announce()?;
                    stage.wait();
                    verify(&map, 77, 77)?;
                    verify(&map, 1, 1)?;
                    Ok(())
                })
            });
            let grandchild = grandchild.transpose()?;
            ready.announce()?;
            let crash = stage.wait();
            verify(&map, n, n as u64)?;
            if crash.damage {
                // Unshares all of it.
                map.bytes_mut().chunks_mut(PAGE).for_each(|page| page[0] ^= 1);
                map.bytes_mut().chunks_mut(PAGE).for_each(|page| page[0] ^= 1);
            }
            fs::write(stage.path(&format!("verified-{n}")), "")?;
            let mut hold = hold;
            hold.read_exact(&mut [0]).err().context("the parent writes nothing")?;
            grandchild.map_or(Ok(()), |mut grandchild| grandchild.join())
        })?);
    }
    prng::fill(99, &mut map.bytes_mut()[99 * PAGE..][..PAGE]);
    let pids: Vec<i32> = children.iter().map(|child| child.pid().as_raw()).collect();
    let proportional = || -> Result<u64> {
        let all = pids.iter().copied().chain([std::process::id() as i32]);
        all.map(|pid| procfs::smaps_value(pid, address, "Pss")).sum()
    };
    let before = proportional()?;

    stage.crash()?;
    for n in 1..5 {
        let done = stage.path(&format!("verified-{n}"));
        while !done.exists() && children[n - 1].is_alive()? {
            crate::stage::sleep(std::time::Duration::from_millis(20));
        }
    }
    let after = proportional()?;
    drop(release);
    children.iter_mut().try_for_each(Child::join)?;
    verify(&map, 99, 99)?;
    let size = (PAGES * PAGE / 1024) as u64;
    ensure!(before < 2 * size, "the five took {before} KiB before");
    ensure!(after < 2 * size, "the five share {size} KiB, took {before} KiB and take {after} KiB now");
    Ok(())
}

/// What one writes, the other reads: before and after.
pub fn shared_anonymous(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 256 * PAGE;
    let mut map = Map::anonymous(LEN, MapFlags::MAP_SHARED)?;
    // The last page carries the messages.
    prng::fill(1, &mut map.bytes_mut()[..LEN - PAGE]);
    let mailbox = map.address() + LEN - PAGE;
    let word = move |index: usize| {
        // SAFETY: an aligned word of the shared page, which stays mapped in both processes as long as they use it;
        // atomic, since the other process writes it.
        unsafe { AtomicU64::from_ptr((mailbox + 8 * index) as *mut u64) }
    };
    let mut child = Child::fork(stage, "shared", |stage, ready| {
        ready.announce()?;
        let damage = stage.wait().damage;
        prng::verify(1, &map.bytes()[..LEN - PAGE]).context("in the child")?;
        word(0).store(if damage { 0 } else { 0x0123_4567_89ab_cdef }, Ordering::Release);
        Ok(())
    })?;

    stage.crash()?;
    child.join()?;
    prng::verify(1, &map.bytes()[..LEN - PAGE]).context("in the parent")?;
    let message = word(0).load(Ordering::Acquire);
    ensure!(message == 0x0123_4567_89ab_cdef, "the child's message did not arrive: {message:#x}");
    Ok(())
}

fn noise_file(stage: &Stage, name: &str, seed: u64, len: usize) -> Result<File> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(stage.path(name))
        .context("create file")?;
    file.write_all(&prng::bytes(seed, len))?;
    file.sync_all()?;
    Ok(file)
}

/// A private file mapping: the file's pages, and copies of our own.
pub fn file_private(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 64 * PAGE;
    let file = noise_file(stage, "file", 3, LEN)?;
    let mut map = Map::file(&file, LEN, PRIVATE)?;
    drop(file);
    let mut expected = prng::bytes(3, LEN);
    for page in (0..64).step_by(3) {
        map.bytes_mut()[page * PAGE + 17] ^= 0xff;
        expected[page * PAGE + 17] ^= 0xff;
    }
    let before = procfs::mapping(map.address())?;

    let crash = stage.crash()?;
    if crash.damage {
        map.bytes_mut()[30 * PAGE + 18] ^= 1;
    }
    let wrong =
        (0..64).filter(|page| map.bytes()[page * PAGE..][..PAGE] != expected[page * PAGE..][..PAGE]).count();
    ensure!(wrong == 0, "{wrong} of 64 pages differ");
    same("mapping", &before, &procfs::mapping(map.address())?)?;
    let on_disk = fs::read(stage.path("file"))?;
    prng::verify(3, &on_disk).context("private changes reached the file")
}

/// A shared file mapping: stores before the crash and after it are the file's.
pub fn file_shared(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 64 * PAGE;
    let mut file = noise_file(stage, "file", 4, LEN)?;
    let mut map = Map::file(&file, LEN, MapFlags::MAP_SHARED)?;
    prng::fill(5, &mut map.bytes_mut()[..32 * PAGE]);

    let crash = stage.crash()?;
    if crash.damage {
        map.bytes_mut()[PAGE] ^= 1;
    }
    prng::verify(5, &map.bytes()[..32 * PAGE]).context("stored before the crash, in memory")?;
    let content = fs::read(stage.path("file"))?;
    prng::verify(5, &content[..32 * PAGE]).context("stored before the crash, in the file")?;
    ensure!(
        content[32 * PAGE..] == prng::bytes(4, LEN)[32 * PAGE..],
        "the untouched half of the file differs"
    );
    // Shared still: a write to the file is seen in memory, a store in memory is seen in the file.
    file.seek(SeekFrom::Start(40 * PAGE as u64))?;
    file.write_all(&prng::bytes(6, PAGE))?;
    prng::verify(6, &map.bytes()[40 * PAGE..41 * PAGE]).context("written to the file after the crash")?;
    prng::fill(7, &mut map.bytes_mut()[50 * PAGE..51 * PAGE]);
    prng::verify(7, &fs::read(stage.path("file"))?[50 * PAGE..51 * PAGE]).context("stored after the crash")
}

/// No access stays no access; the contents under it stay too.
pub fn protection(stage: &mut Stage) -> Result<()> {
    let mut map = Map::anonymous(24 * PAGE, PRIVATE)?;
    prng::fill(8, map.bytes_mut());
    map.protect(0, 8, ProtFlags::PROT_NONE)?;
    map.protect(8, 8, ProtFlags::PROT_READ)?;
    let before = [0, 8, 16].map(|page| procfs::mapping(map.address() + page * PAGE).ok());

    let crash = stage.crash()?;
    if crash.damage {
        map.protect(0, 8, ProtFlags::PROT_READ)?;
    }
    let after = [0, 8, 16].map(|page| procfs::mapping(map.address() + page * PAGE).ok());
    same("mappings", &before, &after)?;
    // The kernel itself looks at the protection when it copies: no need to catch a SIGSEGV.
    let (reader, writer) = nix::unistd::pipe()?;
    same("write from PROT_NONE", &Err(Errno::EFAULT), &raw_write(&writer, map.address()))?;
    same("write from read-only", &Ok(1), &raw_write(&writer, map.address() + 8 * PAGE))?;
    same("read into read-only", &Err(Errno::EFAULT), &raw_read(&reader, map.address() + 8 * PAGE))?;
    map.protect(0, 24, ProtFlags::PROT_READ)?;
    prng::verify(8, map.bytes())
}

/// Terabytes that are reserved, with an island in them that is used.
pub fn reservation(stage: &mut Stage) -> Result<()> {
    const SIZE: usize = 8 << 40;
    const ISLAND: usize = (3 << 40) / PAGE;
    let mut map = Map::reserved(SIZE)?;
    map.protect(ISLAND, 16, READ_WRITE)?;
    prng::fill(31, &mut map.bytes_mut()[ISLAND * PAGE..][..16 * PAGE]);
    let look = || -> Result<Vec<_>> {
        [0, ISLAND, ISLAND + 16]
            .into_iter()
            .map(|page| procfs::mapping(map.address() + page * PAGE))
            .collect()
    };
    let before = look()?;

    let crash = stage.crash()?;
    if crash.damage {
        map.protect(0, 1, ProtFlags::PROT_READ)?;
    }
    same("mappings", &before, &look()?)?;
    prng::verify(31, &map.bytes()[ISLAND * PAGE..][..16 * PAGE])?;
    let (_reader, writer) = nix::unistd::pipe()?;
    same("write from the reservation", &Err(Errno::EFAULT), &raw_write(&writer, map.address()))?;
    // It can be taken into use.
    map.protect(0, 1, READ_WRITE)?;
    map.bytes_mut()[0] = 1;
    Ok(())
}

/// mlockall: what there is, and what comes later.
pub fn lock_all(stage: &mut Stage) -> Result<()> {
    let mut map = Map::anonymous(8 * PAGE, PRIVATE)?;
    prng::fill(41, map.bytes_mut());
    use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)?;
    let is_locked = |map: &Map| -> Result<bool> {
        Ok(procfs::mapping(map.address())?.flags.split_whitespace().any(|flag| flag == "lo"))
    };

    let crash = stage.crash()?;
    if crash.damage {
        munlockall()?;
    }
    same("what was there is locked", &true, &is_locked(&map)?)?;
    same("what is new is locked", &true, &is_locked(&Map::anonymous(8 * PAGE, PRIVATE)?)?)?;
    prng::verify(41, map.bytes())
}

/// A mapped file that was truncated: what is behind its end is out of reach, and comes back when it grows.
pub fn truncated(stage: &mut Stage) -> Result<()> {
    let path = stage.path("truncated");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    file.set_len(8 * PAGE as u64)?;
    let mut map = Map::file(&file, 8 * PAGE, MapFlags::MAP_SHARED)?;
    prng::fill(51, map.bytes_mut());
    file.set_len(2 * PAGE as u64)?;
    let (reader, writer) = nix::unistd::pipe()?;

    let crash = stage.crash()?;
    if crash.damage {
        file.set_len(3 * PAGE as u64)?;
    }
    prng::verify(51, &map.bytes()[..2 * PAGE])?;
    same("behind the end", &Err(Errno::EFAULT), &raw_write(&writer, map.address() + 2 * PAGE))?;
    file.set_len(8 * PAGE as u64)?;
    same("when it has grown", &Ok(1), &raw_write(&writer, map.address() + 2 * PAGE))?;
    let mut byte = [9];
    nix::unistd::read(&reader, &mut byte)?;
    same("what is there", &[0], &byte)
}

/// write(2) of one byte at an address that need not be readable.
fn raw_write(fd: impl AsFd, address: usize) -> Result<isize, Errno> {
    use std::os::fd::AsRawFd;
    // SAFETY: the kernel checks the address; that is what is tested.
    Errno::result(unsafe { libc::write(fd.as_fd().as_raw_fd(), address as *const libc::c_void, 1) })
}

/// read(2) of one byte to an address that must not be writable.
fn raw_read(fd: impl AsFd, address: usize) -> Result<isize, Errno> {
    use std::os::fd::AsRawFd;
    // SAFETY: the kernel checks the address; callers pass memory that no reference covers.
    Errno::result(unsafe { libc::read(fd.as_fd().as_raw_fd(), address as *mut libc::c_void, 1) })
}

/// A stack-like mapping grows downwards when touched below its start.
pub fn growsdown(stage: &mut Stage) -> Result<()> {
    // Room below it: a large reservation, of which all but the top is given back. The kernel keeps 256 pages free below what grows
    // (stack_guard_gap).
    const ROOM: usize = 1024 * PAGE;
    let room = Map::anonymous(ROOM, PRIVATE)?;
    let top = room.address() + ROOM;
    let start = top - 4 * PAGE;
    drop(room);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN | libc::MAP_FIXED_NOREPLACE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: FIXED_NOREPLACE: only where nothing is mapped.
    let address = unsafe { libc::mmap(start as *mut _, 4 * PAGE, protection, flags, -1, 0) };
    ensure!(address as usize == start, "mmap MAP_GROWSDOWN: {}", Errno::last());
    store(start, 0x1111);
    store(start - PAGE, 0x2222); // one page grown before the crash
    let before = procfs::mapping(start)?;
    ensure!(before.start == start - PAGE, "it did not grow: {before:?}");

    let crash = stage.crash()?;
    if crash.damage {
        store(start - PAGE, 0);
    }
    same("mapping", &before, &procfs::mapping(start)?)?;
    same("contents", &(0x1111, 0x2222), &(load(start), load(start - PAGE)))?;
    store(start - 3 * PAGE, 0x3333);
    let grown = procfs::mapping(start)?;
    ensure!(grown.start == start - 3 * PAGE, "it grows no more: {grown:?}");
    Ok(())
}

fn store(address: usize, value: u64) {
    // SAFETY: callers pass an aligned address inside (or growing) their own mapping, which no reference covers.
    unsafe { (address as *mut u64).write_volatile(value) }
}

fn load(address: usize) -> u64 {
    // SAFETY: as in store().
    unsafe { (address as *const u64).read_volatile() }
}

/// What madvise and mlock have set shows in `VmFlags`.
pub fn advice(stage: &mut Stage) -> Result<()> {
    let advices = [
        MmapAdvise::MADV_DONTFORK,
        MmapAdvise::MADV_DONTDUMP,
        MmapAdvise::MADV_WIPEONFORK,
        MmapAdvise::MADV_SEQUENTIAL,
        MmapAdvise::MADV_RANDOM,
        MmapAdvise::MADV_HUGEPAGE,
        MmapAdvise::MADV_NOHUGEPAGE,
    ];
    let mut maps = Vec::new();
    for (index, advice) in advices.into_iter().enumerate() {
        let mut map = Map::anonymous(4 * PAGE, PRIVATE)?;
        map.advise(advice)?;
        prng::fill(index as u64, map.bytes_mut());
        maps.push(map);
    }
    let mut locked = Map::anonymous(4 * PAGE, PRIVATE)?;
    locked.lock()?;
    prng::fill(advices.len() as u64, locked.bytes_mut());
    maps.push(locked);
    let flags = |maps: &[Map]| -> Result<Vec<String>> {
        maps.iter().map(|map| Ok(procfs::mapping(map.address())?.flags)).collect()
    };
    let before = flags(&maps)?;

    let crash = stage.crash()?;
    if crash.damage {
        maps[1].advise(MmapAdvise::MADV_DODUMP)?;
    }
    same("VmFlags", &before, &flags(&maps)?)?;
    maps.iter().enumerate().try_for_each(|(index, map)| prng::verify(index as u64, map.bytes()))
}

/// The break and what lies below it.
pub fn brk(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 32 * PAGE;
    let start = grow(LEN)?;
    fill_heap(start, 9, LEN);
    let end = grow(0)?;

    let crash = stage.crash()?;
    if crash.damage {
        store(start.next_multiple_of(8), 0);
    }
    same("program break", &end, &grow(0)?)?;
    let verify = |from: usize, seed: u64| -> Result<()> {
        // SAFETY: from sbrk, not freed by anybody, and nobody writes while the slice lives.
        prng::verify(seed, unsafe { std::slice::from_raw_parts(from as *const u8, LEN) })
    };
    verify(start, 9)?;
    let more = grow(LEN)?;
    same("where the heap grows", &end, &more)?;
    fill_heap(more, 10, LEN);
    verify(start, 9)?;
    verify(more, 10)
}

/// sbrk(2): the old break.
fn grow(by: usize) -> Result<usize> {
    // SAFETY: only ever grows; the allocator copes with others' sbrk.
    let old = unsafe { libc::sbrk(by as isize) };
    ensure!(old as isize != -1, "sbrk: {}", Errno::last());
    Ok(old as usize)
}

fn fill_heap(start: usize, seed: u64, len: usize) {
    // SAFETY: fresh from sbrk, no other reference exists.
    prng::fill(seed, unsafe { std::slice::from_raw_parts_mut(start as *mut u8, len) });
}

/// What `/proc` shows about the layout of the address space.
pub fn layout(stage: &mut Stage) -> Result<()> {
    const ARG_START: usize = 48;
    let fields = [26, 27, 28, 45, 46, 47, ARG_START, 49, 50, 51];
    let own = std::process::id() as i32;
    let look = || -> Result<_> {
        let addresses: Vec<String> =
            fields.iter().map(|&number| procfs::stat_field(own, number)).collect::<Result<_>>()?;
        let files =
            ["cmdline", "environ", "auxv", "comm"].map(|name| fs::read(format!("/proc/self/{name}")).ok());
        Ok((addresses, files, fs::read_link("/proc/self/exe")?))
    };
    let before = look()?;
    ensure!(before.0.iter().any(|address| address != "0"), "/proc/self/stat hides the addresses");

    let crash = stage.crash()?;
    if crash.damage {
        let arg_start: usize = procfs::stat_field(own, ARG_START)?.parse()?;
        // SAFETY: the argument area is this process's writable memory, aligned or not; nobody uses argv[0] any more.
        unsafe { (arg_start as *mut u8).write_volatile(b'?') };
    }
    let after = look()?;
    same("addresses in /proc/self/stat", &before.0, &after.0)?;
    for (index, name) in ["cmdline", "environ", "auxv", "comm"].iter().enumerate() {
        ensure!(before.1[index] == after.1[index], "/proc/self/{name} differs");
    }
    same("exe", &before.2, &after.2)
}
