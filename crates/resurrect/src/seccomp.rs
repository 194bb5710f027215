//! Filters for system calls. As long as a thread is held, they are suspended (PTRACE_O_SUSPEND_SECCOMP): they do not hinder what is
//! still to be done in it.

use snapshot::{Seccomp, SeccompFilter, Snapshot, Thread};

use crate::inject::{Arg, Call, call};

const SECCOMP_SET_MODE_STRICT: u64 = 0;
const SECCOMP_SET_MODE_FILTER: u64 = 1;
const SECCOMP_FILTER_FLAG_LOG: u64 = 2;

/// Puts a thread under its filters. It needs privileges, or to have given up getting any.
pub(crate) fn restrict(snapshot: &Snapshot, thread: &Thread) -> Vec<Call> {
    match &thread.seccomp {
        Seccomp::Off => vec![],
        Seccomp::Strict => {
            vec![call!("seccomp", libc::SYS_seccomp, SECCOMP_SET_MODE_STRICT, 0u64, 0u64)]
        }
        Seccomp::Filter { filters } => {
            filters.iter().filter_map(|id| snapshot.seccomp_filters.get(id)).map(add).collect()
        }
    }
}

fn add(filter: &SeccompFilter) -> Call {
    let code: Vec<u8> = filter.instructions.iter().flat_map(|word| word.to_ne_bytes()).collect();
    // struct sock_fprog: how many, and where.
    let mut program = vec![0u8; 16];
    program[..2].copy_from_slice(&(filter.instructions.len() as u16).to_ne_bytes());
    let program = Arg::Data { bytes: program, pointers: vec![(8, code)] };
    let flags = if filter.log { SECCOMP_FILTER_FLAG_LOG } else { 0 };
    call!("seccomp filter", libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, program)
}

/// What /proc/PID/status says: mode and number of filters.
pub(crate) fn shown(thread: &Thread) -> (u32, usize) {
    match &thread.seccomp {
        Seccomp::Off => (0, 0),
        Seccomp::Strict => (1, 0),
        Seccomp::Filter { filters } => (2, filters.len()),
    }
}
