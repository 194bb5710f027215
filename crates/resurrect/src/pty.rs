//! Pseudo-terminals: pairs with their old numbers.
//!
//! The kernel gives the lowest free number, so that gaps are filled while the pairs are made. Both ends stay open here until the processes are
//! released; whoever then has no other end any more is told by the kernel as if a terminal emulator had ended.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use snapshot::{Process, Pty, Reason, Snapshot, Tty, TtyId};

use crate::company::Company;
use crate::deadline::Deadline;
use crate::{sys, tty};

/// Largest number that is made: each one below it has to be taken on the way.
const MAX_INDEX: u32 = 4096;
// include/uapi/asm-generic/ioctls.h
const TIOCGPTN: u64 = 0x8004_5430;
const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCPKT: u64 = 0x5420;
/// PTYs are quick, but everybody may be.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);

/// A pair.
struct Pair {
    master: OwnedFd,
    /// Open as long as the old one was.
    _slave: Option<OwnedFd>,
    /// Nobody has been given the master yet: there is one open file of it only.
    master_is_here: bool,
    losses: Vec<Reason>,
}

/// All pairs, by their slaves.
#[derive(Default)]
pub(crate) struct Pairs(BTreeMap<TtyId, Result<Pair, String>>);

fn pty_of(snapshot: &Snapshot, id: TtyId) -> Option<(&Tty, &Pty)> {
    let tty = snapshot.ttys.get(&id)?;
    Some((tty, tty.pty.as_ref()?))
}

/// The slave of the pair that a terminal is an end of.
fn slave_of(snapshot: &Snapshot, id: TtyId) -> Option<TtyId> {
    let (_, pty) = pty_of(snapshot, id)?;
    Some(if pty.master { pty.other } else { id })
}

impl Pairs {
    /// Makes the pairs of these terminals.
    pub(crate) fn make(snapshot: &Snapshot, ttys: &BTreeSet<TtyId>, base: RawFd) -> Self {
        let mut wanted: Vec<(u32, TtyId)> = ttys
            .iter()
            .filter_map(|id| slave_of(snapshot, *id))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .filter_map(|id| Some((pty_of(snapshot, id)?.1.index, id)))
            .collect();
        wanted.sort_unstable();
        let mut pairs = BTreeMap::new();
        let mut gaps = Vec::new();
        for (index, id) in wanted {
            let made = master(index, &mut gaps, base).and_then(|fd| Pair::new(snapshot, id, index, fd, base));
            pairs.insert(id, made);
        }
        Self(pairs)
    }

    /// An open file of a terminal; `None` if it is no pseudo-terminal.
    pub(crate) fn open(
        &mut self,
        snapshot: &Snapshot,
        id: TtyId,
        flags: i32,
    ) -> Option<Result<OwnedFd, String>> {
        let (tty, pty) = pty_of(snapshot, id)?;
        let pair = match self.0.get_mut(&slave_of(snapshot, id)?) {
            Some(Ok(pair)) => pair,
            Some(Err(why)) => return Some(Err(why.clone())),
            None => return Some(Err("its pair has not been made".into())),
        };
        if !pty.master {
            return Some(tty::open(tty, flags).map_err(|e| format!("open: {e}")));
        }
        if !std::mem::take(&mut pair.master_is_here) {
            return Some(Err("its master is open twice".into()));
        }
        Some(pair.master.try_clone().map_err(|e| format!("dup: {e}")))
    }

    /// What the users of a terminal have lost.
    pub(crate) fn losses(&self, snapshot: &Snapshot, id: TtyId) -> Vec<Reason> {
        let pair = slave_of(snapshot, id).and_then(|slave| self.0.get(&slave)?.as_ref().ok());
        pair.map(|pair| pair.losses.clone()).unwrap_or_default()
    }

    /// Why there is no such terminal, for the leader of a session.
    pub(crate) fn failure(&self, snapshot: &Snapshot, id: TtyId) -> Option<&str> {
        self.0.get(&slave_of(snapshot, id)?)?.as_ref().err().map(String::as_str)
    }
}

/// A terminal of which the other end has been closed: reading gives the end of the file, writing EIO.
pub(crate) fn hung_up(flags: i32) -> Result<OwnedFd, Errno> {
    let master = open_master()?;
    unlock(&master, false)?;
    let path = format!("/dev/pts/{}", index_of(&master)?);
    sys::open(path.as_ref(), flags & libc::O_ACCMODE | libc::O_NOCTTY | libc::O_NONBLOCK, 0)
}

fn open_master() -> Result<OwnedFd, Errno> {
    sys::open(Path::new("/dev/ptmx"), libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK, 0)
}

fn index_of(master: &OwnedFd) -> Result<u32, Errno> {
    let mut index = 0u32;
    // SAFETY: TIOCGPTN writes an int.
    unsafe { sys::ioctl(master.as_raw_fd(), TIOCGPTN, &mut index) }?;
    Ok(index)
}

fn unlock(master: &OwnedFd, locked: bool) -> Result<(), Errno> {
    let mut locked = i32::from(locked);
    // SAFETY: TIOCSPTLCK reads an int.
    unsafe { sys::ioctl(master.as_raw_fd(), TIOCSPTLCK, &mut locked) }.map(drop)
}

/// The master with this number; those with lower ones go to `gaps`, so that nobody gets them.
fn master(index: u32, gaps: &mut Vec<OwnedFd>, base: RawFd) -> Result<OwnedFd, String> {
    if index > MAX_INDEX {
        return Err(format!("its number {index} is higher than {MAX_INDEX}"));
    }
    loop {
        let master =
            open_master().and_then(|fd| sys::lift(fd, base)).map_err(|e| format!("open /dev/ptmx: {e}"))?;
        match index_of(&master).map_err(|e| format!("TIOCGPTN: {e}"))? {
            n if n == index => return Ok(master),
            n if n < index => gaps.push(master),
            _ => return Err(format!("/dev/pts/{index} is in use here")),
        }
    }
}

impl Pair {
    fn new(snapshot: &Snapshot, id: TtyId, index: u32, master: OwnedFd, base: RawFd) -> Result<Self, String> {
        let io = |what: &'static str| move |e: Errno| format!("{what}: {e}");
        let (slave_tty, slave_pty) = pty_of(snapshot, id).ok_or("its slave is not in the snapshot")?;
        let (master_tty, master_pty) =
            pty_of(snapshot, slave_pty.other).ok_or("its master is not in the snapshot")?;
        if let Some((uid, gid, mode)) = slave_pty.owner {
            let path = format!("/dev/pts/{index}");
            std::os::unix::fs::chown(&path, Some(uid), Some(gid))
                .map_err(|e| format!("chown {path}: {e}"))?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(&path, mode).map_err(|e| format!("chmod {path}: {e}"))?;
        }
        let mut losses = Vec::new();
        let was_open = slave_pty.open_count > 0 || master_pty.other_closed;
        let to_master = [&master_tty.input[..], &master_pty.arriving[..]].concat();
        let slave = match was_open || !to_master.is_empty() || !slave_tty.input.is_empty() {
            true => {
                unlock(&master, false).map_err(io("unlock"))?;
                let fd = tty::open(slave_tty, libc::O_RDWR).map_err(io("open the slave"))?;
                // Both directions are filled by the slave: what goes out, and what was typed.
                let output = snapshot::Bytes(to_master);
                losses = tty::fill(&fd, slave_tty, &output)?;
                Some(sys::lift(fd, base).map_err(io("dup"))?)
            }
            // Settings and size can be set through the master.
            false => {
                tty::configure(&master, slave_tty)?;
                None
            }
        };
        if !slave_pty.arriving.is_empty()
            && let Err((left, e)) = tty::send(&master, &slave_pty.arriving, Deadline::after(PATIENCE))
        {
            let text = format!("{}: {left} bytes typed are lost ({e})", slave_tty.name);
            losses.push(Reason::new("terminal-input", text));
        }
        unlock(&master, slave_pty.locked).map_err(io("lock"))?;
        if master_pty.packet {
            let mut on = 1i32;
            // SAFETY: TIOCPKT reads an int.
            unsafe { sys::ioctl(master.as_raw_fd(), TIOCPKT, &mut on) }.map_err(io("TIOCPKT"))?;
        }
        // Closing it again tells the master.
        let _slave = slave.filter(|_| slave_pty.open_count > 0);
        Ok(Self { master, _slave, master_is_here: true, losses })
    }
}

/// Whose other end does not come back: to be told by the kernel when this program closes it.
pub(crate) fn lost_peers(company: &Company<'_>, process: &Process) -> Vec<Reason> {
    let kinds = process.descriptors.iter().filter_map(|d| Some(&company.snapshot.files.get(&d.file)?.kind));
    let ttys = kinds.filter_map(|kind| match kind {
        snapshot::FileKind::Tty { tty } => Some(*tty),
        _ => None,
    });
    let mut losses = Vec::new();
    let ttys: BTreeSet<TtyId> = ttys.collect();
    for (tty, pty) in ttys.into_iter().filter_map(|id| pty_of(company.snapshot, id)) {
        let holders = company.of_tty(pty.other);
        if holders.back.is_empty() && !holders.gone.is_empty() {
            let text = format!(
                "{}: at the other end was PID {}, which does not come back",
                tty.name,
                holders.names_of_gone()
            );
            losses.push(Reason::new("terminal-peer", text));
        }
    }
    losses
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use nix::poll::{PollFd, PollFlags, PollTimeout};

    use super::*;

    #[test]
    fn a_terminal_that_was_hung_up() {
        let fd = hung_up(libc::O_RDWR).unwrap();
        // Another test's child may have inherited the other end, and closes it when it executes something.
        let mut hangup = [PollFd::new(fd.as_fd(), PollFlags::empty())];
        assert_eq!(nix::poll::poll(&mut hangup, PollTimeout::NONE), Ok(1));
        let mut byte = [0];
        assert_eq!(nix::unistd::read(&fd, &mut byte), Ok(0));
        assert_eq!(nix::unistd::write(&fd, &byte), Err(Errno::EIO));
    }

    #[test]
    fn numbers_are_taken_on_the_way() {
        // Others take numbers too, except where they cannot get: of terminals that only this thread has.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        crate::mount::propagate_all(libc::MS_PRIVATE).unwrap();
        let devpts = crate::mount::new(c"devpts").unwrap();
        crate::mount::attach(&devpts, Path::new("/dev/pts")).unwrap();
        let mut gaps = Vec::new();
        let lowest = index_of(&open_master().unwrap()).unwrap();
        let fd = master(lowest + 3, &mut gaps, 500).unwrap();
        assert!(index_of(&fd) == Ok(lowest + 3) && gaps.len() <= 3);
        assert!(master(lowest, &mut gaps, 500).is_err());
    }
}
