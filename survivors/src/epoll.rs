//! epoll.

use std::io::Write;

use anyhow::Result;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::Stage;
use crate::procfs::same;

/// A pipe under watch becomes readable after the crash.
pub fn pipe(stage: &mut Stage) -> Result<()> {
    let (reader, writer) = nix::unistd::pipe()?;
    let mut writer = std::fs::File::from(writer);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&reader, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0x1234_5678_9abc))?;

    let crash = stage.crash()?;
    if crash.damage {
        epoll.delete(&reader)?;
    }
    writer.write_all(b"x")?;
    let mut events = [EpollEvent::empty(); 2];
    let count = epoll.wait(&mut events, EpollTimeout::ZERO)?;
    same("events", &(1, 0x1234_5678_9abc), &(count, events[0].data()))
}
