//! Pipes and FIFOs: made anew, filled with what had not been read.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use snapshot::{FileKind, PhysMem, Pipe, PipeEnd, Process, Reason};

use crate::company::Company;
use crate::sys;

/// A pipe of this kernel. Both ends stay open here until all processes have theirs, so that nothing that happens in between
/// looks like a hang-up.
pub(crate) struct Opened {
    /// `None` for a FIFO, whose one descriptor is open for both.
    read: Option<OwnedFd>,
    write: OwnedFd,
    /// The ends that `pipe2` gave have found their (first) owners.
    given: [bool; 2],
}

impl Opened {
    /// Makes the pipe and fills it. Its descriptors are `base` or higher. `place`: where a FIFO is.
    pub(crate) fn new(
        pipe: &Pipe,
        place: Option<&Path>,
        mem: &dyn PhysMem,
        base: i32,
    ) -> Result<Self, String> {
        let say = |what: &'static str| move |e: Errno| format!("{what}: {e}");
        let opened = if let Some(path) = pipe.path.as_ref().map(|path| place.unwrap_or(path.as_path())) {
            match nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(say("mkfifo")(e)),
            }
            let is_fifo = |m: std::fs::Metadata| std::os::unix::fs::FileTypeExt::is_fifo(&m.file_type());
            if !std::fs::symlink_metadata(path).is_ok_and(is_fifo) {
                return Err(format!("{} is no FIFO any more", path.display()));
            }
            let both = sys::open(path, libc::O_RDWR | libc::O_NONBLOCK, 0).map_err(say("open"))?;
            let write = sys::lift(both, base).map_err(say("dup"))?;
            Self { read: None, write, given: [true; 2] }
        } else {
            let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(say("pipe2"))?;
            let read = sys::lift(read, base).map_err(say("dup"))?;
            let write = sys::lift(write, base).map_err(say("dup"))?;
            Self { read: Some(read), write, given: [false; 2] }
        };
        opened.fill(pipe, mem)?;
        Ok(opened)
    }

    fn fill(&self, pipe: &Pipe, mem: &dyn PhysMem) -> Result<(), String> {
        let fd = self.write.as_raw_fd();
        let fcntl = |what, cmd, arg: i64| sys::fcntl(fd, cmd, arg).map_err(|e: Errno| format!("{what}: {e}"));
        let capacity = fcntl("F_GETPIPE_SZ", libc::F_GETPIPE_SZ, 0)?;
        if pipe.capacity != 0 && capacity as u64 != pipe.capacity {
            fcntl("F_SETPIPE_SZ", libc::F_SETPIPE_SZ, pipe.capacity as i64)?;
        }
        let mut packet = false;
        for buffer in &pipe.buffers {
            if buffer.packet != packet {
                packet = buffer.packet;
                let direct = if packet { libc::O_DIRECT } else { 0 };
                fcntl("F_SETFL", libc::F_SETFL, (libc::O_NONBLOCK | direct).into())?;
            }
            let bytes = mem.map(buffer.addr, buffer.len as usize).map_err(|e| e.to_string())?;
            let written = nix::unistd::write(&self.write, &bytes).map_err(|e| format!("write: {e}"))?;
            if written != bytes.len() {
                return Err(format!("only {written} of {} unread bytes went in", bytes.len()));
            }
        }
        Ok(())
    }

    /// The number of a descriptor through which it can be written to.
    pub(crate) fn writing_end(&self) -> i32 {
        self.write.as_raw_fd()
    }

    /// An open file of this pipe with the given O_* access mode.
    pub(crate) fn end(&mut self, end: PipeEnd, base: i32) -> Result<OwnedFd, String> {
        let (slot, own, mode) = match end {
            PipeEnd::Read => (0, self.read.as_ref().unwrap_or(&self.write), libc::O_RDONLY),
            PipeEnd::Write => (1, &self.write, libc::O_WRONLY),
            PipeEnd::Both => (1, &self.write, libc::O_RDWR),
        };
        let first = end != PipeEnd::Both && !std::mem::replace(&mut self.given[slot], true);
        let fd = if first {
            // The same `struct file` under another number; ours is closed before any process runs.
            sys::fcntl(own.as_raw_fd(), libc::F_DUPFD_CLOEXEC, base.into()).map(|fd| {
                // SAFETY: the duplicate is ours alone.
                unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
            })
        } else {
            let path = format!("/proc/self/fd/{}", own.as_raw_fd());
            sys::open(path.as_ref(), mode | libc::O_NONBLOCK, 0).and_then(|fd| sys::lift(fd, base))
        };
        fd.map_err(|e| format!("open: {e}"))
    }
}

/// Pipes of `process` that had somebody at the other end, and nobody of those comes back. What the program will see is what it would
/// have seen if they had died.
pub(crate) fn lost_peers(company: &Company<'_>, process: &Process) -> Vec<Reason> {
    let kinds = process.descriptors.iter().filter_map(|d| Some(&company.snapshot.files.get(&d.file)?.kind));
    let ends = kinds.filter_map(|kind| match kind {
        FileKind::Pipe { pipe, end } => Some((*pipe, *end)),
        _ => None,
    });
    let mut losses = Vec::new();
    for (pipe, end) in ends.collect::<BTreeSet<_>>() {
        let other = match end {
            PipeEnd::Read => PipeEnd::Write,
            PipeEnd::Write => PipeEnd::Read,
            PipeEnd::Both => continue,
        };
        let holders = company.of_pipe(pipe, other);
        if holders.back.is_empty() && !holders.gone.is_empty() {
            let text = format!(
                "at the other end of one of its pipes was PID {}, which does not come back",
                holders.names_of_gone()
            );
            losses.push(Reason::new("pipe-peer", text));
        }
    }
    losses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Mem;
    use snapshot::PipeBuffer;

    fn pipe(buffers: Vec<PipeBuffer>) -> Pipe {
        Pipe { path: None, capacity: 16384, buffers, readers: 1, writers: 1 }
    }

    #[test]
    fn contents_capacity_and_packets_come_back() {
        let mem = Mem(b"abcdefgh".to_vec());
        let buffer = |addr, len, packet| PipeBuffer { addr, len, packet };
        let pipe =
            pipe(vec![buffer(4, 3, true), buffer(2, 2, true), buffer(0, 2, false), buffer(6, 2, false)]);
        let mut opened = Opened::new(&pipe, None, &mem, 700).unwrap();
        let read = opened.end(PipeEnd::Read, 700).unwrap();
        assert!(read.as_raw_fd() >= 700);
        assert_eq!(sys::fcntl(read.as_raw_fd(), libc::F_GETPIPE_SZ, 0), Ok(16384));
        let next = || {
            let mut buf = [0; 100];
            let n = nix::unistd::read(&read, &mut buf).unwrap();
            buf[..n].to_vec()
        };
        assert_eq!(next(), b"efg");
        assert_eq!(next(), b"cd");
        assert_eq!(next(), b"abgh");
    }

    #[test]
    fn a_second_open_file_of_an_end_is_another_one() {
        let mem = Mem(vec![]);
        let mut opened = Opened::new(&pipe(vec![]), None, &mem, 700).unwrap();
        let first = opened.end(PipeEnd::Write, 700).unwrap();
        let second = opened.end(PipeEnd::Write, 700).unwrap();
        sys::fcntl(first.as_raw_fd(), libc::F_SETFL, 0).unwrap();
        let flags = |fd: &OwnedFd| sys::fcntl(fd.as_raw_fd(), libc::F_GETFL, 0).unwrap();
        assert_eq!(flags(&first) & libc::O_NONBLOCK, 0);
        assert_eq!(flags(&second) & libc::O_NONBLOCK, libc::O_NONBLOCK);
    }

    #[test]
    fn more_than_fits_is_an_error() {
        let mem = Mem(vec![0; 5 * 4096]);
        let buffer = PipeBuffer { addr: 0, len: 5 * 4096, packet: false };
        assert!(Opened::new(&pipe(vec![buffer]), None, &mem, 700).is_err());
    }
}
