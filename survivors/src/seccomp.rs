//! seccomp.

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;

use crate::Stage;
use crate::procfs::{self, same};

/// A filter that allows everything but one system call, which fails with an unusual error.
pub fn filter(stage: &mut Stage) -> Result<()> {
    let refused = |k| libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k };
    let mut program = [
        libc::sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: 0 },
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: libc::SYS_acct as u32,
        },
        refused(libc::SECCOMP_RET_ERRNO | libc::EXDEV as u32),
        refused(libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: the kernel copies the program.
    let result = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER as u64, &raw const filter, 0u64, 0u64)
    };
    Errno::result(result).context("PR_SET_SECCOMP")?;

    let crash = stage.crash()?;
    let mode = if crash.damage { "0" } else { "2" };
    same("mode", &mode.to_owned(), &procfs::status(&["Seccomp"])?["Seccomp"])?;
    // SAFETY: refused by the filter before it does anything.
    let result = unsafe { libc::acct(std::ptr::null()) };
    same("filtered call", &Err(Errno::EXDEV), &Errno::result(result))
}
