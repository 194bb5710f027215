//! Contexts of asynchronous I/O (io_setup(2)): made by the process itself, whose ring then moves to where it was.

use nix::errno::Errno;
use snapshot::{AddressSpace, AioContext};

use crate::deadline::Deadline;
use crate::inject::{Arg, Call, InjectError, Tracee, call};

const PAGE_SIZE: u64 = snapshot::PAGE_SIZE;
/// `struct io_event`, and what comes before the events (`struct aio_ring`, fs/aio.c).
const EVENT_SIZE: u64 = 32;
const HEADER_SIZE: u64 = 32;
/// `struct iocb`.
const IOCB_SIZE: usize = 64;
/// Requests per io_submit(2).
const BATCH: usize = 256;

/// Makes the contexts. What has been completed before and not been taken is in the ring again.
pub(crate) fn set_up(
    mm: &AddressSpace,
    process: &Tracee,
    instruction: u64,
    deadline: Deadline,
) -> Result<(), InjectError> {
    for context in &mm.aio {
        let requests = requests_for(context);
        let (at, mut name) = (process.scratch().data(), [0; 8]);
        process.write(at, &name)?;
        process.run(&[call!("io_setup", libc::SYS_io_setup, requests, at)], deadline)?;
        process.read(at, &mut name)?;
        let made = u64::from_ne_bytes(name);
        let (len, to) = (context.len, context.address);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        process.run(&[call!("move the ring", libc::SYS_mremap, made, len, len, flags, to)], deadline)?;
        if !context.events.is_empty() {
            fill(context, process, instruction, deadline)?;
        }
    }
    Ok(())
}

/// With how many requests the ring gets its size again: the kernel doubles them, adds some, and rounds up to pages. It takes a few for each
/// CPU at least, of which there may be fewer now.
fn requests_for(context: &AioContext) -> u64 {
    const LEAST: u64 = 4;
    let len = |requests: u64| {
        (HEADER_SIZE + EVENT_SIZE * (2 * requests.max(LEAST) + 2)).next_multiple_of(PAGE_SIZE)
    };
    let asked = u64::from(context.max_reqs);
    if len(asked) == context.len {
        return asked;
    }
    ((context.len.saturating_sub(HEADER_SIZE) / EVENT_SIZE).saturating_sub(2) / 2).max(1)
}

/// Events can only be had from requests: as many reads of nothing are made, and what they leave is overwritten.
fn fill(
    context: &AioContext,
    process: &Tracee,
    instruction: u64,
    deadline: Deadline,
) -> Result<(), InjectError> {
    let path = process.scratch().data();
    process.write(path, b"/dev/null\0")?;
    let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
    let open = [libc::AT_FDCWD as u64, path, flags, 0, 0, 0];
    let fd = process.call_and_interrupt(instruction, "open /dev/null", libc::SYS_openat, open, deadline)?;
    if fd < 0 {
        let errno = Errno::from_raw(-fd as i32);
        return Err(InjectError::Call { what: "open /dev/null".into(), errno });
    }
    let batches = context.events.chunks(BATCH).map(|events| submit(context.address, fd, events.len()));
    let mut calls: Vec<Call> = batches.collect();
    calls.push(call!("close /dev/null", libc::SYS_close, fd as u64));
    process.run(&calls, deadline)?;
    let bytes: Vec<u8> = context.events.iter().flatten().flat_map(|word| word.to_ne_bytes()).collect();
    process.write(context.address + HEADER_SIZE, &bytes)
}

/// io_submit(2) of reads of no bytes, which are complete at once.
fn submit(context: u64, fd: i64, count: usize) -> Call {
    // IOCB_CMD_PREAD is 0; the descriptor is at 20.
    let mut iocb = vec![0; 20];
    iocb.extend((fd as u32).to_ne_bytes());
    iocb.resize(IOCB_SIZE, 0);
    let pointers = (0..count).map(|n| (n * 8, iocb.clone())).collect();
    let list = Arg::Data { bytes: vec![0; count * 8], pointers };
    let args = vec![Arg::Value(context), Arg::Value(count as u64), list];
    Call::new("io_submit", libc::SYS_io_submit, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_gets_its_old_size_with_fewer_cpus() {
        let requests = |max_reqs, pages: u64| {
            let context = AioContext { address: 0, len: pages * PAGE_SIZE, max_reqs, events: Vec::new() };
            requests_for(&context)
        };
        assert_eq!(requests(128, 3), 128);
        assert_eq!(requests(1, 1), 1);
        // 64 CPUs, four requests each, doubled.
        let n = requests(1, 5);
        let len = (HEADER_SIZE + EVENT_SIZE * (2 * n + 2)).next_multiple_of(PAGE_SIZE);
        assert_eq!(len, 5 * PAGE_SIZE);
    }
}
