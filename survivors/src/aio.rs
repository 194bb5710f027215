//! Contexts of asynchronous I/O, between two requests.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::libc;

use crate::Stage;
use crate::map::PAGE;
use crate::prng;
use crate::procfs::same;

/// `struct iocb` (include/uapi/linux/aio_abi.h).
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    result_fd: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Event {
    data: u64,
    iocb: u64,
    result: i64,
    result2: i64,
}

#[derive(Clone, Copy)]
struct Context(u64);

impl Context {
    fn new(requests: u32) -> Result<Self> {
        let mut name = 0u64;
        // SAFETY: the kernel writes eight bytes.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut name) };
        Errno::result(result).context("io_setup")?;
        Ok(Self(name))
    }

    /// Reads from a file into `buf`; complete when the event has been taken.
    fn read(self, file: &File, buf: &mut [u8], offset: i64, data: u64) -> Result<u64> {
        let iocb = Iocb {
            data,
            fd: file.as_raw_fd() as u32,
            buf: buf.as_mut_ptr() as u64,
            len: buf.len() as u64,
            offset,
            ..Iocb::default()
        };
        let list = [&raw const iocb];
        // SAFETY: the kernel copies the request; the buffer outlives it, since reads of cached files are done within the call.
        let result = unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, list.as_ptr()) };
        same("submitted", &1, &Errno::result(result).context("io_submit")?)?;
        Ok(&raw const iocb as u64)
    }

    /// Takes so many events, and waits for them.
    fn events(self, count: usize) -> Result<Vec<Event>> {
        let mut events = vec![Event::default(); count];
        // SAFETY: the kernel writes at most `count` events.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                1,
                count,
                events.as_mut_ptr(),
                std::ptr::null_mut::<u8>(),
            )
        };
        events.truncate(Errno::result(result).context("io_getevents")? as usize);
        Ok(events)
    }
}

fn noise(stage: &Stage) -> Result<File> {
    let path = stage.path("file");
    let mut file = File::create(&path)?;
    file.write_all(&prng::bytes(1, 8 * PAGE))?;
    file.sync_all()?;
    Ok(File::open(&path)?)
}

/// Two contexts: events that were not taken yet; and one that is used up to the end of its ring and beyond.
pub fn contexts(stage: &mut Stage) -> Result<()> {
    let file = noise(stage)?;
    let (large, small) = (Context::new(200)?, Context::new(1)?);
    let mut buf = vec![0; PAGE];
    for n in 0..100 {
        small.read(&file, &mut buf, 0, n)?;
        same("taken before", &n, &small.events(1)?.first().map_or(0, |event| event.data))?;
    }
    let mut expected = Vec::new();
    for n in 0..3u64 {
        let iocb = large.read(&file, &mut buf[..100 + n as usize], 0, 70 + n)?;
        expected.push(Event { data: 70 + n, iocb, result: 100 + n as i64, result2: 0 });
    }

    let crash = stage.crash()?;
    if crash.damage {
        expected.pop();
    }
    same("events from before the crash", &expected, &large.events(8)?)?;
    for context in [large, small] {
        buf.fill(0);
        context.read(&file, &mut buf, PAGE as i64, 5)?;
        let event = context.events(4)?;
        same("results", &vec![PAGE as i64], &event.iter().map(|event| event.result).collect())?;
        ensure!(buf == prng::bytes(1, 2 * PAGE)[PAGE..], "what was read after the crash differs");
    }
    Ok(())
}

/// A thread that waits in io_getevents(2) for a request that comes after the crash.
pub fn waiter(stage: &mut Stage) -> Result<()> {
    let file = noise(stage)?;
    let context = Context::new(16)?;
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || context.events(4));
        let outcome = stage.crash().and_then(|crash| {
            let mut buf = vec![0; PAGE];
            context.read(&file, &mut buf, 0, if crash.damage { 8 } else { 9 })?;
            Ok(())
        });
        let events = match waiter.join() {
            Ok(events) => events?,
            Err(_) => anyhow::bail!("the waiting thread panicked"),
        };
        outcome?;
        same("data of the event", &vec![9], &events.iter().map(|event| event.data).collect())
    })
}
