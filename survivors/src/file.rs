//! Open files: position, flags, sharing, and contents that the disk has not seen.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::libc;
use nix::sys::mman::MapFlags;
use rustix::fs::{Mode, OFlags, RawDir};

use crate::Stage;
use crate::await_signal::{await_signal, block};
use crate::child::Child;
use crate::map::{Map, PAGE};
use crate::prng;
use crate::procfs::same;

fn read_write() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options
}

fn status_flags(file: impl AsFd) -> Result<OFlag> {
    Ok(OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?))
}

/// Three files at different places, opened in different ways, and a descriptor that is only a place in the tree.
pub fn offset(stage: &mut Stage) -> Result<()> {
    let path = stage.path("file");
    fs::write(&path, prng::bytes(1, 10_000))?;
    File::open(&path)?.sync_all()?;
    let mut reader = File::open(&path)?;
    let mut writer = OpenOptions::new().write(true).open(&path)?;
    let mut both = read_write().open(&path)?;
    let place = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    reader.seek(SeekFrom::Start(1234))?;
    writer.seek(SeekFrom::Start(99_999))?; // beyond the end
    both.seek(SeekFrom::Start(5000))?;
    let flags = |reader: &File, writer: &File, both: &File| -> Result<_> {
        Ok([status_flags(reader)?, status_flags(writer)?, status_flags(both)?, status_flags(&place)?])
    };
    let before = flags(&reader, &writer, &both)?;

    let crash = stage.crash()?;
    if crash.damage {
        both.seek(SeekFrom::Start(5001))?;
    }
    same("flags", &before, &flags(&reader, &writer, &both)?)?;
    let positions = [reader.stream_position()?, writer.stream_position()?, both.stream_position()?];
    same("positions", &[1234, 99_999, 5000], &positions)?;
    let mut content = vec![0; 100];
    reader.read_exact(&mut content)?;
    ensure!(content == prng::bytes(1, 10_000)[1234..1334], "the wrong bytes were read");
    writer.write_all(b"x")?;
    same("size after writing beyond the end", &100_000, &fs::metadata(&path)?.len())?;
    let error = rustix::io::read(&place, &mut [0]);
    same("read from O_PATH", &Err(rustix::io::Errno::BADF), &error)?;
    same("inode of O_PATH", &rustix::fs::stat(&path)?.st_ino, &rustix::fs::fstat(&place)?.st_ino)
}

/// Each write goes to the end, wherever that is by then.
pub fn append(stage: &mut Stage) -> Result<()> {
    let path = stage.path("file");
    let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
    file.write_all(b"one\n")?;

    let crash = stage.crash()?;
    if crash.damage {
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
    }
    OpenOptions::new().append(true).open(&path)?.write_all(b"two\n")?;
    file.write_all(b"three\n")?;
    same("content", &"one\ntwo\nthree\n".to_owned(), &fs::read_to_string(&path)?)?;
    ensure!(status_flags(&file)?.contains(OFlag::O_APPEND), "O_APPEND is gone");
    Ok(())
}

/// Data that has been written to blocks of which the disk does not know yet whose they are: size and times on the disk are right, and the pages
/// clean.
pub fn uncommitted(stage: &mut Stage) -> Result<()> {
    let (path, content) = (stage.path("file"), prng::bytes(6, 8 * PAGE));
    let file = read_write().open(&path)?;
    file.set_len(content.len() as u64)?;
    file.write_all_at(&content, 0)?;
    // Commits what is known of the file, which has no blocks as yet.
    let other = File::create(stage.path("other"))?;
    other.sync_all()?;
    let all =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: no pointers.
    nix::errno::Errno::result(unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, all) })?;

    let crash = stage.crash()?;
    if crash.damage {
        file.write_all_at(b"x", 5000)?;
    }
    let mut now = vec![0; content.len()];
    file.read_exact_at(&mut now, 0)?;
    prng::verify(6, &now)
}

/// The position belongs to the open file, not to the descriptor, and not to the file.
pub fn shared_offset(stage: &mut Stage) -> Result<()> {
    let path = stage.path("file");
    fs::write(&path, prng::bytes(2, 4096))?;
    let mut file = File::open(&path)?;
    let mut twin = file.try_clone()?;
    let mut stranger = File::open(&path)?;
    file.seek(SeekFrom::Start(100))?;
    stranger.seek(SeekFrom::Start(7))?;
    let mut child = Child::fork(stage, "shared", |stage, ready| {
        ready.announce()?;
        let crash = stage.wait();
        let mut bytes = [0; 100];
        file.read_exact(&mut bytes)?;
        if crash.damage {
            file.seek(SeekFrom::Start(1))?;
        }
        ensure!(bytes[..] == prng::bytes(2, 4096)[100..200], "the child read the wrong bytes");
        Ok(())
    })?;

    stage.crash()?;
    child.join()?;
    same("position after the child's read", &200, &file.stream_position()?)?;
    twin.seek(SeekFrom::Start(300))?;
    same("position after the twin's seek", &300, &file.stream_position()?)?;
    same("position of a file opened apart", &7, &stranger.stream_position()?)
}

/// Numbers that a program has chosen, and what execve would close.
pub fn cloexec(stage: &mut Stage) -> Result<()> {
    let path = stage.path("file");
    let file = read_write().open(&path)?;
    let own = std::process::id();
    // SAFETY: these numbers are free: everything above 2 was closed at the start, and few are open.
    unsafe {
        nix::errno::Errno::result(nix::libc::dup3(file.as_raw_fd(), 77, nix::libc::O_CLOEXEC))?;
        nix::errno::Errno::result(nix::libc::dup2(file.as_raw_fd(), 200))?;
    }
    let look = || -> Result<_> {
        let mut table = Vec::new();
        for number in
            (0..1024).filter(|number| fs::symlink_metadata(format!("/proc/{own}/fd/{number}")).is_ok())
        {
            // SAFETY: F_GETFD on a number; it may be closed, then the result says so.
            let flags = unsafe { nix::libc::fcntl(number, nix::libc::F_GETFD) };
            let target = fs::read_link(format!("/proc/{own}/fd/{number}"))?;
            table.push((number, FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC), target));
        }
        Ok(table)
    };
    let before = look()?;
    ensure!(before.iter().any(|entry| (entry.0, entry.1) == (77, true)), "unexpected: {before:?}");

    let crash = stage.crash()?;
    if crash.damage {
        // SAFETY: clears FD_CLOEXEC of a number that this survivor has opened.
        unsafe { nix::libc::fcntl(77, nix::libc::F_SETFD, 0) };
    }
    same("descriptors", &before, &look()?)
}

/// Appended since the last sync.
pub fn unsynced(stage: &mut Stage) -> Result<()> {
    let path = stage.path("file");
    let mut file = read_write().open(&path)?;
    file.write_all(&prng::bytes(3, 10_000))?;
    file.sync_all()?;
    file.write_all(&prng::bytes(4, 1 << 20))?;

    check_file(stage, &mut file, |content| {
        same("size", &(10_000 + (1 << 20)), &content.len())?;
        prng::verify(3, &content[..10_000]).context("synced part")?;
        prng::verify(4, &content[10_000..]).context("unsynced part")
    })
}

/// Never on any disk before the crash.
pub fn new(stage: &mut Stage) -> Result<()> {
    let mut file = read_write().create_new(true).open(stage.path("file"))?;
    file.write_all(&prng::bytes(5, 123_457))?;

    check_file(stage, &mut file, |content| {
        same("size", &123_457, &content.len())?;
        prng::verify(5, content)
    })
}

/// On the disk it is longer, and other.
pub fn truncated(stage: &mut Stage) -> Result<()> {
    let path = stage.path("file");
    fs::write(&path, prng::bytes(6, 200_000))?;
    File::open(&path)?.sync_all()?;
    let mut file = OpenOptions::new().write(true).truncate(true).open(&path)?;
    file.write_all(&prng::bytes(7, 5_000))?;

    check_file(stage, &mut file, |content| {
        same("size", &5_000, &content.len())?;
        prng::verify(7, content)
    })
}

/// After the crash: the content by its name, the position of `file`, and that it goes on.
fn check_file(stage: &mut Stage, file: &mut File, check: impl Fn(&[u8]) -> Result<()>) -> Result<()> {
    let position = file.stream_position()?;
    let crash = stage.crash()?;
    let path = stage.path("file");
    if crash.damage {
        file.write_all_at(b"damaged", 1000)?;
    }
    check(&fs::read(&path)?)?;
    same("position", &position, &file.stream_position()?)?;
    file.write_all(b"and on")?;
    let content = fs::read(&path)?;
    ensure!(content.ends_with(b"and on"), "what was written after the crash is missing");
    check(&content[..content.len() - 6])
}

/// Each entry comes once, though the kernel changes in the middle.
pub fn directory(stage: &mut Stage) -> Result<()> {
    const FILES: usize = 200;
    let path = stage.path("entries");
    fs::create_dir(&path)?;
    for index in 0..FILES {
        fs::write(path.join(format!("entry-with-a-longish-name-{index:03}")), "")?;
    }
    let dir = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    let mut read = |limit: usize| -> Result<()> {
        // As small as possible: what a getdents call has returned, the kernel need not remember.
        let mut buffer = [MaybeUninit::uninit(); 512];
        let mut entries = RawDir::new(&dir, &mut buffer);
        while names.len() < limit || !entries.is_buffer_empty() {
            match entries.next() {
                Some(entry) => names.push(entry?.file_name().to_string_lossy().into_owned()),
                None => break,
            }
        }
        Ok(())
    };
    read(FILES / 2)?;

    let crash = stage.crash()?;
    if crash.damage {
        rustix::fs::seek(&dir, rustix::fs::SeekFrom::Start(0))?;
    }
    read(usize::MAX)?;
    let unique: BTreeSet<_> = names.iter().collect();
    same("entries and different entries", &(FILES + 2, FILES + 2), &(names.len(), unique.len()))
}

/// Devices without a state of their own.
pub fn devices(stage: &mut Stage) -> Result<()> {
    let open = |name: &str| read_write().create(false).open(format!("/dev/{name}"));
    let (mut null, mut zero, mut full, mut random) =
        (open("null")?, open("zero")?, open("full")?, open("urandom")?);

    let crash = stage.crash()?;
    if crash.damage {
        std::mem::swap(&mut null, &mut zero);
    }
    let mut bytes = [1; 64];
    null.write_all(&bytes)?;
    same("bytes from /dev/null", &0, &null.read(&mut bytes)?)?;
    zero.read_exact(&mut bytes)?;
    same("/dev/zero", &[0; 64], &bytes)?;
    let error = full.write(&bytes).map_err(|error| error.raw_os_error());
    same("write to /dev/full", &Err(Some(nix::libc::ENOSPC)), &error)?;
    random.read_exact(&mut bytes)?;
    ensure!(bytes != [0; 64], "/dev/urandom gave zeros");
    Ok(())
}

/// 0 on one file, 1 and 2 together on another.
pub fn redirected(stage: &mut Stage) -> Result<()> {
    fs::write(stage.path("in"), "first line\nsecond line\n")?;
    let mut input = File::open(stage.path("in"))?;
    input.seek(SeekFrom::Start(11))?;
    nix::unistd::dup2_stdin(&input)?;
    let output = File::create(stage.path("out"))?;
    nix::unistd::dup2_stdout(&output)?;
    nix::unistd::dup2_stderr(&output)?;
    drop((input, output));
    std::io::stdout().write_all(b"before, ")?;
    std::io::stdout().flush()?;

    let crash = stage.crash()?;
    if crash.damage {
        nix::unistd::dup2_stderr(File::open("/dev/null")?)?;
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    same("standard input", &"second line\n".to_owned(), &line)?;
    // An error here is told by the content.
    let _ = std::io::stderr().write_all(b"after, ");
    std::io::stdout().write_all(b"end\n")?;
    std::io::stdout().flush()?;
    same("output", &"before, after, end\n".to_owned(), &fs::read_to_string(stage.path("out"))?)
}

/// The name is gone, the file is not.
pub fn deleted(stage: &mut Stage) -> Result<()> {
    let path = stage.path("file");
    let mut file = read_write().open(&path)?;
    fs::remove_file(&path)?;
    file.write_all(&prng::bytes(8, 50_000))?;

    let crash = stage.crash()?;
    if crash.damage {
        file.set_len(49_999)?;
    }
    file.rewind()?;
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    same("size", &50_000, &content.len())?;
    prng::verify(8, &content)?;
    same("links", &0, &rustix::fs::fstat(&file)?.st_nlink)
}

/// The disk has heard of the file and not of its removal.
pub fn deleted_synced(stage: &mut Stage) -> Result<()> {
    let path = stage.path("file");
    let mut file = read_write().open(&path)?;
    file.write_all(&prng::bytes(9, 50_000))?;
    file.sync_all()?;
    File::open(stage.dir())?.sync_all()?;
    fs::remove_file(&path)?;
    file.write_all(b"after")?;

    let crash = stage.crash()?;
    if crash.damage {
        file.set_len(49_999)?;
    }
    file.rewind()?;
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    same("size", &50_005, &content.len())?;
    prng::verify(9, &content[..50_000])?;
    same("end", &b"after"[..], &content[50_000..])?;
    same("the name", &false, &path.exists())?;
    same("links", &0, &rustix::fs::fstat(&file)?.st_nlink)
}

/// Replaced as package managers do it: the old file lives on in a mapping, the new one has the name.
pub fn deleted_mapped(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 16 * PAGE;
    let path = stage.path("file");
    let mut file = read_write().open(&path)?;
    file.write_all(&prng::bytes(10, LEN))?;
    let mut map = Map::file(&file, LEN, MapFlags::MAP_PRIVATE)?;
    drop(file);
    fs::write(stage.path("new"), b"new")?;
    fs::rename(stage.path("new"), &path)?;
    for name in [&path, stage.dir()] {
        File::open(name)?.sync_all()?;
    }
    map.bytes_mut()[5 * PAGE] ^= 0xff;
    let mut expected = prng::bytes(10, LEN);
    expected[5 * PAGE] ^= 0xff;

    let crash = stage.crash()?;
    if crash.damage {
        map.bytes_mut()[0] ^= 1;
    }
    same("what is mapped", &true, &(map.bytes() == expected))?;
    same("the file of that name", &b"new"[..], &fs::read(&path)?)
}

/// SIGIO for one thread, with a signal of its own.
pub fn owner_thread(stage: &mut Stage) -> Result<()> {
    const F_SETSIG: i32 = 10;
    const F_SETOWN_EX: i32 = 15;
    const F_GETOWN_EX: i32 = 16;
    const F_OWNER_TID: i32 = 0;
    let signals = [nix::libc::SIGRTMIN() + 4, nix::libc::SIGRTMIN() + 5];
    block(&signals)?;
    let (reader, writer) = nix::unistd::pipe()?;
    let (tid_sender, tid_receiver) = std::sync::mpsc::channel();
    let (go_sender, go_receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        tid_sender.send(nix::unistd::gettid().as_raw())?;
        go_receiver.recv()?;
        await_signal(&signals)
    });
    let mut owner = [F_OWNER_TID, tid_receiver.recv()?];
    let number = reader.as_raw_fd();
    // SAFETY: the kernel reads a struct f_owner_ex, two ints; the others take numbers.
    unsafe {
        nix::errno::Errno::result(nix::libc::fcntl(number, F_SETOWN_EX, owner.as_ptr()))?;
        nix::errno::Errno::result(nix::libc::fcntl(number, F_SETSIG, signals[0]))?;
    }
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_ASYNC))?;
    let before = owner;

    let crash = stage.crash()?;
    if crash.damage {
        // SAFETY: takes a number.
        unsafe { nix::libc::fcntl(number, F_SETSIG, signals[1]) };
    }
    // SAFETY: the kernel writes a struct f_owner_ex, two ints.
    unsafe { nix::errno::Errno::result(nix::libc::fcntl(number, F_GETOWN_EX, owner.as_mut_ptr())) }?;
    same("owner", &before, &owner)?;
    File::from(writer).write_all(b"x")?;
    go_sender.send(())?;
    let told = thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    same("signal and descriptor", &(signals[0], number), &(told.signo, told.fd))
}

/// A descriptor table that a child and a grandchild share (CLONE_FILES): what one opens or closes, all have or have not.
pub fn shared_table(stage: &mut Stage) -> Result<()> {
    const FAR: RawFd = 300;
    let names = ["by-parent", "by-child", "by-grandchild"].map(|name| stage.path(name));
    for name in &names {
        let mut file = File::create(name)?;
        file.write_all(name.as_os_str().as_encoded_bytes())?;
        file.sync_all()?;
    }
    let [by_parent, by_child, by_grandchild] = &names;
    let late = stage.path("late");
    let own = File::open(by_parent)?;
    let open_as = |path: &Path, number: RawFd| -> Result<()> {
        let file = File::open(path)?;
        nix::fcntl::fcntl(&file, FcntlArg::F_DUPFD(number)).map(drop).context("F_DUPFD")
    };
    let behind = |number: RawFd| fs::read_link(format!("/proc/self/fd/{number}"));
    let mut child = Child::sharing(stage, "child", libc::CLONE_FILES, |stage, ready| {
        open_as(by_child, FAR)?;
        let mut grandchild = Child::sharing(stage, "grandchild", libc::CLONE_FILES, |stage, ready| {
            open_as(by_grandchild, FAR + 1)?;
            ready.announce()?;
            stage.wait();
            // The parent opens it when all live again.
            while behind(FAR + 2).is_err() {
                crate::stage::sleep(Duration::from_millis(20));
            }
            same("opened after the crash", &late, &behind(FAR + 2)?)?;
            nix::unistd::close(FAR + 1).context("close")
        })?;
        ready.announce()?;
        if stage.wait().damage {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES)?;
            nix::unistd::close(own.as_raw_fd())?;
        }
        same("the parent's", by_parent, &behind(own.as_raw_fd())?)?;
        same("the grandchild's", by_grandchild, &behind(FAR + 1)?)?;
        fs::write(&late, "")?;
        open_as(&late, FAR + 2)?;
        grandchild.join()?;
        ensure!(behind(FAR + 1).is_err(), "what the grandchild closed is open");
        Ok(())
    })?;
    same("the child's", by_child, &behind(FAR)?)?;

    stage.crash()?;
    same("the child's", by_child, &behind(FAR)?)?;
    child.join()?;
    same("opened by the child after the crash", &late, &behind(FAR + 2)?)?;
    ensure!(behind(FAR + 1).is_err(), "what the grandchild closed is open");
    same("its own", by_parent, &behind(own.as_raw_fd())?)
}
