//! Who a process is and what it may do. The changes are made in a child: the parent stays what it is, and can write the
//! verdict.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::Stage;
use crate::child::{Child, Ready};
use crate::procfs::{self, same};

fn in_child(stage: &mut Stage, body: fn(&Stage, Ready) -> Result<()>) -> Result<()> {
    let mut child = Child::fork(stage, "credentials", body)?;
    stage.crash()?;
    child.join()
}

/// Four uids, four gids, three supplementary groups.
pub fn ids(stage: &mut Stage) -> Result<()> {
    in_child(stage, |stage, ready| {
        setgroups(&[Gid::from_raw(4001), Gid::from_raw(4002), Gid::from_raw(70000)])?;
        setresgid(Gid::from_raw(3001), Gid::from_raw(3002), Gid::from_raw(3003))?;
        setresuid(Uid::from_raw(2001), Uid::from_raw(2002), Uid::from_raw(2003))?;
        nix::unistd::setfsuid(Uid::from_raw(2001));
        nix::unistd::setfsgid(Gid::from_raw(3001));
        let look =
            || procfs::status(&["Uid", "Gid", "Groups", "CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb"]);
        let before = look()?;
        ensure!(before["Uid"] == "2001\t2002\t2003\t2001", "unexpected: {before:?}");
        ready.announce()?;
        if stage.wait().damage {
            nix::unistd::setfsuid(Uid::from_raw(2003));
        }
        same("credentials", &before, &look()?)?;
        // Without rights it stays: root is out of reach.
        same("setuid(0)", &Err(Errno::EPERM), &nix::unistd::setuid(Uid::from_raw(0)))
    })
}

const CAP_KILL: u32 = 5;
const CAP_NET_BIND_SERVICE: u32 = 10;
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_TIME: u32 = 25;

/// One capability dropped from the bounding set, few permitted, one inheritable and ambient.
pub fn capabilities(stage: &mut Stage) -> Result<()> {
    in_child(stage, |stage, ready| {
        prctl(libc::PR_CAPBSET_DROP, CAP_SYS_TIME.into(), 0)?;
        let permitted = 1 << CAP_KILL | 1 << CAP_NET_BIND_SERVICE | 1 << CAP_NET_ADMIN;
        set_capabilities(1 << CAP_NET_ADMIN, permitted, 1 << CAP_NET_BIND_SERVICE)?;
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, CAP_NET_BIND_SERVICE.into())?;
        prctl(libc::PR_SET_SECUREBITS, 1 << 0, 0).or_else(|error| {
            // SECBIT_NOROOT needs CAP_SETPCAP, which is gone here; that it is refused is as good a state.
            if error.downcast_ref() == Some(&Errno::EPERM) { Ok(()) } else { Err(error) }
        })?;
        let look = || procfs::status(&["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Uid"]);
        let before = look()?;
        ready.announce()?;
        if stage.wait().damage {
            set_capabilities(0, permitted, 1 << CAP_NET_BIND_SERVICE)?;
        }
        same("capabilities", &before, &look()?)
    })
}

/// capset(2), version 3, of this thread; only capabilities below 32 are used.
fn set_capabilities(effective: u32, permitted: u32, inheritable: u32) -> Result<()> {
    const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    let header = [LINUX_CAPABILITY_VERSION_3, 0];
    let data = [effective, permitted, inheritable, 0, 0, 0];
    // SAFETY: capset reads a header of two words and, in this version, two times three words.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    Errno::result(result).context("capset")?;
    Ok(())
}

fn prctl(option: libc::c_int, first: u64, second: u64) -> Result<()> {
    // SAFETY: these options take numbers only.
    Errno::result(unsafe { libc::prctl(option, first, second, 0u64, 0u64) })?;
    Ok(())
}

/// Once set, it is set for good.
pub fn no_new_privs(stage: &mut Stage) -> Result<()> {
    nix::sys::prctl::set_no_new_privs()?;
    let crash = stage.crash()?;
    let found = nix::sys::prctl::get_no_new_privs()? && !crash.damage;
    same("no_new_privs", &true, &found)?;
    same("status", &"1".to_owned(), &procfs::status(&["NoNewPrivs"])?["NoNewPrivs"])
}
