//! seccomp.

use std::sync::mpsc::channel;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;

use crate::Stage;
use crate::child::Child;
use crate::procfs::{self, same};

/// A filter that allows everything but one system call, which fails with this error.
fn refuse(call: i64, error: i32) -> Result<()> {
    let result = |k| libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k };
    let mut program = [
        libc::sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: 0 },
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: call as u32,
        },
        result(libc::SECCOMP_RET_ERRNO | error as u32),
        result(libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: the kernel copies the program.
    let result = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER as u64, &raw const filter, 0u64, 0u64)
    };
    Errno::result(result).context("PR_SET_SECCOMP")?;
    Ok(())
}

/// What becomes of acct(2), which nobody here may call in earnest.
fn acct() -> Result<i32, Errno> {
    // SAFETY: refused by a filter, or for want of privileges, before it does anything.
    Errno::result(unsafe { libc::acct(c"/".as_ptr()) })
}

fn state() -> Result<(String, String)> {
    let status = procfs::status(&["Seccomp", "Seccomp_filters"])?;
    Ok((status["Seccomp"].clone(), status["Seccomp_filters"].clone()))
}

/// Two filters on top of each other, which a child has inherited and added to.
pub fn filter(stage: &mut Stage) -> Result<()> {
    refuse(libc::SYS_acct, libc::EXDEV)?;
    refuse(libc::SYS_swapoff, libc::EDOM)?;
    let mut child = Child::fork(stage, "filter", |stage, ready| {
        // The newest filter that refuses does not win, but the most severe action; of equal ones the newest.
        refuse(libc::SYS_acct, libc::ENOTBLK)?;
        ready.announce()?;
        let damage = stage.wait().damage;
        let expected = if damage { "0" } else { "3" };
        same("mode and filters", &("2".to_owned(), expected.to_owned()), &state()?)?;
        same("filtered call", &Err(Errno::ENOTBLK), &acct())
    })?;

    stage.crash()?;
    same("mode and filters", &("2".to_owned(), "2".to_owned()), &state()?)?;
    same("filtered call", &Err(Errno::EXDEV), &acct())?;
    // SAFETY: refused by the filter before it does anything.
    let swapoff = Errno::result(unsafe { libc::swapoff(c"/".as_ptr()) });
    same("the other filtered call", &Err(Errno::EDOM), &swapoff)?;
    child.join()
}

/// Threads with different filters.
pub fn threads(stage: &mut Stage) -> Result<()> {
    let (ready, is_ready) = channel();
    let (go, gone) = channel::<bool>();
    let thread = std::thread::spawn(move || -> Result<()> {
        refuse(libc::SYS_acct, libc::ENOTBLK)?;
        ready.send(())?;
        let damage = gone.recv()?;
        let error = if damage { Errno::EXDEV } else { Errno::ENOTBLK };
        same("filtered call in the thread", &Err(error), &acct())?;
        same("its mode and filters", &("2".to_owned(), "1".to_owned()), &state()?)
    });
    is_ready.recv()?;

    let crash = stage.crash()?;
    same("mode and filters of the other thread", &("0".to_owned(), "0".to_owned()), &state()?)?;
    go.send(crash.damage)?;
    thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
}

/// A child in strict mode, blocked in read: it can write and exit, and nothing else.
pub fn strict(stage: &mut Stage) -> Result<()> {
    let (question, ask) = nix::unistd::pipe()?;
    let (answer, reply) = nix::unistd::pipe()?;
    let damage = stage.options().damage;
    let mut child = Child::fork(stage, "strict", |_, ready| {
        use std::os::fd::AsRawFd;
        let mut word = [0u8; 4];
        ready.announce()?;
        // SAFETY: numbers only; then calls on descriptors that stay open, and the end, without anything else in between.
        unsafe {
            Errno::result(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT as u64))?;
            libc::read(question.as_raw_fd(), word.as_mut_ptr().cast(), 4);
            libc::write(reply.as_raw_fd(), word.as_ptr().cast(), 4);
            if damage {
                libc::getppid();
            }
            libc::syscall(libc::SYS_exit, 0);
        }
        Ok(())
    })?;
    let mode = |pid| -> Result<String> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Seccomp:"));
        Ok(line.unwrap_or_default().trim().to_owned())
    };
    while mode(child.pid())? != "1" {
        crate::stage::sleep(std::time::Duration::from_millis(5));
    }

    stage.crash()?;
    same("mode", "1", &mode(child.pid())?)?;
    nix::unistd::write(&ask, b"ping")?;
    let mut word = [0; 4];
    nix::unistd::read(&answer, &mut word)?;
    same("answer", b"ping", &word)?;
    child.join()
}
