//! epoll instances.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::Stage;
use crate::child::Child;
use crate::procfs::same;

const IN: EpollFlags = EpollFlags::EPOLLIN;
const EDGE: EpollFlags = EpollFlags::EPOLLET;
const ONCE: EpollFlags = EpollFlags::EPOLLONESHOT;

fn pipe_files() -> Result<(File, File)> {
    let (reader, writer) = nix::unistd::pipe()?;
    Ok((reader.into(), writer.into()))
}

fn instance() -> Result<Epoll> {
    Ok(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?)
}

fn add(epoll: &Epoll, file: impl AsFd, flags: EpollFlags, data: u64) -> Result<()> {
    epoll.add(file, EpollEvent::new(flags, data)).context("EPOLL_CTL_ADD")
}

/// Data of all events that are there now, in ascending order.
fn events(epoll: &Epoll) -> Result<Vec<u64>> {
    let mut events = [EpollEvent::empty(); 16];
    let count = epoll.wait(&mut events, EpollTimeout::ZERO)?;
    let mut data: Vec<u64> = events[..count].iter().map(|event| event.data()).collect();
    data.sort_unstable();
    Ok(data)
}

/// A pipe under watch becomes readable after the crash.
pub fn pipe(stage: &mut Stage) -> Result<()> {
    let (reader, mut writer) = pipe_files()?;
    let epoll = instance()?;
    add(&epoll, &reader, IN | EDGE, 0x1234_5678_9abc)?;

    let crash = stage.crash()?;
    if crash.damage {
        epoll.delete(&reader)?;
    }
    same("events before", &Vec::<u64>::new(), &events(&epoll)?)?;
    writer.write_all(b"x")?;
    same("events", &vec![0x1234_5678_9abc], &events(&epoll)?)
}

/// Edges that were reported are not reported again; those that were not are; and the next ones.
pub fn edge(stage: &mut Stage) -> Result<()> {
    let (seen, mut seen_writer) = pipe_files()?;
    let (unseen, mut unseen_writer) = pipe_files()?;
    let epoll = instance()?;
    add(&epoll, &seen, IN | EDGE, 1)?;
    seen_writer.write_all(b"old")?;
    same("events in between", &vec![1], &events(&epoll)?)?;
    add(&epoll, &unseen, IN | EDGE, 2)?;
    unseen_writer.write_all(b"old")?;

    let crash = stage.crash()?;
    if crash.damage {
        seen_writer.write_all(b"early")?;
    }
    same("events", &vec![2], &events(&epoll)?)?;
    same("events once more", &Vec::<u64>::new(), &events(&epoll)?)?;
    seen_writer.write_all(b"new")?;
    same("events of new data", &vec![1], &events(&epoll)?)
}

/// One-shot items that fired stay silent until they are armed; those that did not fire do it once.
pub fn oneshot(stage: &mut Stage) -> Result<()> {
    let (fired, mut fired_writer) = pipe_files()?;
    let (armed, mut armed_writer) = pipe_files()?;
    let (empty, _empty_writer) = pipe_files()?;
    let epoll = instance()?;
    add(&epoll, &fired, IN | ONCE, 1)?;
    add(&epoll, &empty, IN | ONCE, 3)?;
    fired_writer.write_all(b"x")?;
    same("events in between", &vec![1], &events(&epoll)?)?;
    add(&epoll, &armed, IN | ONCE, 2)?;

    let crash = stage.crash()?;
    if crash.damage {
        epoll.modify(&fired, &mut EpollEvent::new(IN | ONCE, 1))?;
    }
    fired_writer.write_all(b"y")?;
    same("events", &Vec::<u64>::new(), &events(&epoll)?)?;
    armed_writer.write_all(b"x")?;
    same("events of the armed one", &vec![2], &events(&epoll)?)?;
    armed_writer.write_all(b"x")?;
    same("its events once more", &Vec::<u64>::new(), &events(&epoll)?)?;
    epoll.modify(&fired, &mut EpollEvent::new(IN | ONCE, 4))?;
    same("events after arming it again", &vec![4], &events(&epoll)?)
}

/// An instance that watches another one; level-triggered items that are ready at the crash.
pub fn nested(stage: &mut Stage) -> Result<()> {
    let (reader, mut writer) = pipe_files()?;
    let (quiet, mut quiet_writer) = pipe_files()?;
    let (inner, outer) = (instance()?, instance()?);
    add(&inner, &reader, IN, 1)?;
    add(&inner, &quiet, IN, 2)?;
    add(&outer, &inner.0, IN, 3)?;
    writer.write_all(b"x")?;

    let crash = stage.crash()?;
    if crash.damage {
        inner.delete(&reader)?;
    }
    same("events outside", &vec![3], &events(&outer)?)?;
    same("events inside", &vec![1], &events(&inner)?)?;
    (&reader).read_exact(&mut [0])?;
    same("events when all is read", &Vec::<u64>::new(), &events(&outer)?)?;
    quiet_writer.write_all(b"x")?;
    same("events outside of the other one", &vec![3], &events(&outer)?)?;
    same("events inside of the other one", &vec![2], &events(&inner)?)
}

/// An item whose number has been closed while a duplicate keeps the file: it reports, and no number reaches it.
pub fn closed_number(stage: &mut Stage) -> Result<()> {
    let (reader, mut writer) = pipe_files()?;
    let epoll = instance()?;
    let duplicate = reader.try_clone()?;
    let number = reader.as_raw_fd();
    add(&epoll, &reader, IN, 1)?;
    drop(reader);
    let other = File::open("/dev/null")?;
    same("the number is taken by another file", &number, &other.as_raw_fd())?;

    let crash = stage.crash()?;
    if !crash.damage {
        writer.write_all(b"x")?;
    }
    same("events", &vec![1], &events(&epoll)?)?;
    same("removing it by its duplicate's number", &Err(Errno::ENOENT), &epoll.delete(&duplicate))?;
    drop(other);
    let back = nix::unistd::dup(&duplicate)?;
    same("the number is that of the file again", &number, &back.as_raw_fd())?;
    epoll.delete(&back)?;
    same("events when it is removed", &Vec::<u64>::new(), &events(&epoll)?)
}

/// One instance in parent and child: what one adds, the other sees.
pub fn shared(stage: &mut Stage) -> Result<()> {
    let (reader, mut writer) = pipe_files()?;
    let (late, mut late_writer) = pipe_files()?;
    let epoll = instance()?;
    add(&epoll, &reader, IN, 1)?;
    let damage = stage.options().damage;
    let mut child = Child::fork(stage, "other", |stage, ready| {
        ready.announce()?;
        stage.wait();
        if !damage {
            add(&epoll, &late, IN, 2)?;
        }
        Ok(())
    })?;

    stage.crash()?;
    child.join()?;
    writer.write_all(b"x")?;
    late_writer.write_all(b"x")?;
    same("events", &vec![1, 2], &events(&epoll)?)
}

/// A child blocked in epoll_wait without a timeout is woken.
pub fn waiter(stage: &mut Stage) -> Result<()> {
    let (reader, mut writer) = pipe_files()?;
    let epoll = instance()?;
    add(&epoll, &reader, IN, 7)?;
    let mut child = Child::fork(stage, "waiter", |_, ready| {
        ready.announce()?;
        let mut events = [EpollEvent::empty(); 2];
        let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
        same("event", &(1, 7), &(count, events[0].data()))
    })?;

    let crash = stage.crash()?;
    if crash.damage {
        epoll.modify(&reader, &mut EpollEvent::new(IN, 8))?;
    }
    writer.write_all(b"x")?;
    child.join()
}

/// A timer, a counter and a signal descriptor under watch, all waiting.
pub fn kinds(stage: &mut Stage) -> Result<()> {
    let epoll = instance()?;
    let counter = crate::eventfd::new(0, 0)?;
    let timer = crate::timerfd::new(libc::CLOCK_MONOTONIC)?;
    let signals = crate::signalfd::new(&[libc::SIGUSR1])?;
    for (data, file) in [(1, &counter), (2, &timer), (3, &signals)] {
        add(&epoll, file, IN | EDGE, data)?;
    }
    same("events in between", &Vec::<u64>::new(), &events(&epoll)?)?;

    let crash = stage.crash()?;
    same("events", &Vec::<u64>::new(), &events(&epoll)?)?;
    if !crash.damage {
        (&counter).write_all(&1u64.to_ne_bytes())?;
    }
    same("event of the counter", &vec![1], &events(&epoll)?)?;
    crate::timerfd::set(&timer, 0, 1, 0)?;
    let mut events_now = [EpollEvent::empty(); 2];
    same("event of the timer", &1, &epoll.wait(&mut events_now, 10_000u16)?)?;
    same("which", &2, &events_now[0].data())?;
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGUSR1)?;
    same("event of the signal", &vec![3], &events(&epoll)?)
}
