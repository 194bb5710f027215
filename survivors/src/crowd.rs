//! Many processes, threads, descriptors or pages at once: what the benchmark counts the cost of.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::{ForkResult, Pid, fork, pipe, setsid};

use crate::child;
use crate::map::{Map, PAGE};
use crate::prng;

/// How many of each; all but the processes are for each process.
#[derive(Clone, Copy, Debug)]
pub struct Crowd {
    /// Processes, children of one more that does nothing.
    pub processes: usize,
    /// Threads beside the first one.
    pub threads: usize,
    /// Open files beside the standard descriptors, each opened for itself.
    pub descriptors: usize,
    /// Memory that has been written to, MiB.
    pub mib: usize,
}

impl Crowd {
    /// Starts them in the background and comes back when all have what they are to have; the PID of their parent.
    ///
    /// Must be called while this process has one thread only.
    pub fn start(self) -> Result<Pid> {
        let (mut ready, announce) = ends()?;
        // SAFETY: one thread, as promised by the caller.
        if let ForkResult::Parent { child } = unsafe { fork() }? {
            drop(announce);
            let mut words = Vec::new();
            ready.read_to_end(&mut words)?;
            ensure!(words.len() == self.processes, "{} of {} got ready", words.len(), self.processes);
            return Ok(child);
        }
        drop(ready);
        let _ = setsid();
        for seed in 0..self.processes {
            // SAFETY: still one thread.
            match unsafe { fork() } {
                Ok(ForkResult::Child) => self.live(seed as u64, announce),
                Ok(ForkResult::Parent { .. }) => {}
                Err(_) => child::end(1),
            }
        }
        drop(announce);
        sleep_for_ever()
    }

    /// The life of one; what does not work out makes it end, which is noticed by the missing word.
    fn live(self, seed: u64, announce: File) -> ! {
        match self.set_up(seed, announce) {
            Ok(_all) => sleep_for_ever(),
            Err(_) => child::end(1),
        }
    }

    fn set_up(self, seed: u64, mut announce: File) -> Result<(Option<Map>, Vec<File>)> {
        let mut memory = None;
        if self.mib > 0 {
            let mut map = Map::anonymous(self.mib << 20, nix::sys::mman::MapFlags::MAP_PRIVATE)?;
            // One word on each page is enough to make it this process's own.
            for (page, bytes) in (0..).zip(map.bytes_mut().chunks_mut(PAGE)) {
                prng::fill(seed << 32 | page, &mut bytes[..8]);
            }
            memory = Some(map);
        }
        let path = std::env::current_exe()?;
        let files = (0..self.descriptors).map(|_| File::open(&path)).collect::<std::io::Result<Vec<_>>>()?;
        for _ in 0..self.threads {
            std::thread::Builder::new().stack_size(64 << 10).spawn(|| sleep_for_ever()).context("spawn")?;
        }
        announce.write_all(b"r")?;
        Ok((memory, files))
    }
}

fn ends() -> Result<(File, File)> {
    let (reader, writer): (OwnedFd, OwnedFd) = pipe()?;
    Ok((reader.into(), writer.into()))
}

fn sleep_for_ever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
