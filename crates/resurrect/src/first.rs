//! PID 1: the one process that exists already. The caller's parent waits where it is, and is made into what PID 1 was.
//!
//! What skeletons do in their own code is done here by injected calls. Files come from this program through a pidfd. Should the rebuilding
//! fail, PID 1 is given back: it runs the caller's program again, with the arguments that the caller named.

use std::ffi::CString;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;

use snapshot::{FileKind, Pid, Process, Snapshot};

use crate::deadline::Deadline;
use crate::file::Files;
use crate::inject::{Call, InjectError, Scratch, Tracee, call};
use crate::memory::{self, MapsLine, Specials};
use crate::{signal, sys};

/// Its number.
pub(crate) const PID: Pid = 1;

/// What is known of the process that PID 1 is made of.
pub(crate) struct First {
    /// Its memory as it is now.
    maps: Vec<MapsLine>,
    pub(crate) specials: Specials,
    /// A `syscall` instruction of its own.
    instruction: u64,
}

impl First {
    /// Looks at the caller's parent, which has to be PID 1. `syscall_offset`: of a `syscall` instruction in the vDSO.
    pub(crate) fn look(syscall_offset: u64) -> Result<Self, String> {
        if nix::unistd::getppid().as_raw() != PID {
            return Err("the caller's parent is not PID 1".into());
        }
        let maps = sys::read_proc("/proc/1/maps").map_err(|e| format!("read its maps: {e}"))?;
        let maps = memory::parse_maps(&maps).ok_or("its maps cannot be read")?;
        let specials = Specials::of(&maps);
        let vdso = specials.vdso_start().ok_or("it has no vDSO")?;
        Ok(Self { maps, specials, instruction: vdso + syscall_offset })
    }

    /// Addresses that it uses.
    pub(crate) fn taken(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.maps.iter().map(|line| (line.start, line.end))
    }

    /// Takes it over, up to where a skeleton is ready: descriptors, session, directories, signal actions. `zombies`: children of it that
    /// have exited, or are about to. `others`: descriptors that it maps beside `files`. `time`: one of this program's time namespace for
    /// children.
    pub(crate) fn prepare(
        &self,
        process: &Process,
        (snapshot, files): (&Snapshot, &Files),
        zombies: &[Pid],
        (others, time): (&[RawFd], RawFd),
        (scratch, fallback): (Scratch, &[CString]),
        deadline: Deadline,
    ) -> Result<Tracee, InjectError> {
        let tracee = Tracee::seize(PID, scratch, deadline)?;
        let (registers, mask) = (tracee.registers()?, tracee.signal_mask()?);
        // From here on signals are kept for who it becomes.
        tracee.set_signal_mask(!(1 << (libc::SIGTRAP - 1)))?;
        if let Err(error) = map_scratch(&tracee, self.instruction, scratch, deadline) {
            // Nothing has happened to it.
            tracee.set_registers(&registers)?;
            tracee.set_signal_mask(mask)?;
            tracee.detach()?;
            return Err(error);
        }
        let arranged = self.arrange(&tracee, process, (snapshot, files), zombies, (others, time), deadline);
        match arranged {
            Ok(()) => Ok(tracee),
            Err(error) => {
                give_back(&tracee, self.instruction, scratch, fallback, deadline)?;
                Err(error)
            }
        }
    }

    fn arrange(
        &self,
        tracee: &Tracee,
        process: &Process,
        (snapshot, files): (&Snapshot, &Files),
        zombies: &[Pid],
        (others, time): (&[RawFd], RawFd),
        deadline: Deadline,
    ) -> Result<(), InjectError> {
        let limit = sys::prlimit(0, libc::RLIMIT_NOFILE, None);
        limit
            .and_then(|limit| sys::prlimit(PID, libc::RLIMIT_NOFILE, Some(limit)))
            .map_err(|errno| InjectError::Call { what: "raise its limit on descriptors".into(), errno })?;
        // The kernel would write where nothing is any more.
        if let Some(args) = tracee.rseq_unregistration()? {
            let what = "rseq";
            let done = tracee.call_and_interrupt(self.instruction, what, libc::SYS_rseq, args, deadline)?;
            if done != 0 {
                return Err(InjectError::Unexpected(format!("{what}: {done}")));
            }
        }
        tracee.run(&fetch(files, others, time), deadline)?;
        tracee.run(&arrangements(process, snapshot, files, zombies), deadline)?;
        self.forget_signals(tracee, deadline)
    }

    /// What was pending for it is not for the one it becomes.
    fn forget_signals(&self, tracee: &Tracee, deadline: Deadline) -> Result<(), InjectError> {
        let data = tracee.scratch_data();
        // All signals; no time to wait.
        tracee.write(data, &[[0xff; 8], [0; 8], [0; 8]].concat())?;
        for _ in 0..1024 {
            let args = [data, 0, data + 8, 8, 0, 0];
            let what = "rt_sigtimedwait";
            if tracee.call_and_interrupt(self.instruction, what, libc::SYS_rt_sigtimedwait, args, deadline)?
                < 0
            {
                break;
            }
        }
        Ok(())
    }
}

/// Brings all our files under our own numbers, and nothing else.
fn fetch(files: &Files, others: &[RawFd], time: RawFd) -> Vec<Call> {
    let own = std::process::id();
    let mut calls = vec![
        call!("close everything", libc::SYS_close_range, 0u32, u32::MAX, 0u32),
        // The lowest number that is free, and so is the next one.
        call!("pidfd_open", libc::SYS_pidfd_open, own, 0u32),
    ];
    let numbers: std::collections::BTreeSet<RawFd> =
        files.numbers().chain(others.iter().copied()).chain([time]).collect();
    for fd in numbers {
        calls.push(call!(format!("fetch file {fd}"), libc::SYS_pidfd_getfd, 0u32, fd, 0u32));
        calls.push(call!(format!("dup3 {fd}"), libc::SYS_dup3, 1u32, fd, libc::O_CLOEXEC));
        calls.push(call!("close", libc::SYS_close, 1u32));
    }
    calls.push(call!("enter the time namespace", libc::SYS_setns, time, libc::CLONE_NEWTIME));
    calls.push(call!("close the pidfd", libc::SYS_close, 0u32));
    calls
}

/// What a skeleton does for itself.
fn arrangements(process: &Process, snapshot: &Snapshot, files: &Files, zombies: &[Pid]) -> Vec<Call> {
    let mut calls = Vec::new();
    if process.sid == PID {
        calls.push(call!("setsid", libc::SYS_setsid));
    }
    let subreaper = u64::from(process.child_subreaper);
    calls.push(call!(
        "PR_SET_CHILD_SUBREAPER",
        libc::SYS_prctl,
        libc::PR_SET_CHILD_SUBREAPER,
        subreaper,
        0u64,
        0u64,
        0u64
    ));
    for zombie in zombies {
        let flags = libc::WEXITED | libc::WNOWAIT | libc::__WALL;
        calls.push(
            call!(
                "wait for exited children",
                libc::SYS_waitid,
                libc::P_PID as i32,
                *zombie,
                0u64,
                flags,
                0u64
            )
            .optional(),
        );
    }
    for (signo, action) in signal::actions(process) {
        calls.push(call!(format!("rt_sigaction {signo}"), libc::SYS_rt_sigaction, signo, action, 0u64, 8u32));
    }
    let path = |bytes: &[u8]| [bytes, b"\0"].concat();
    let fs = &process.fs;
    calls.push(call!("chdir", libc::SYS_chdir, path(fs.cwd.as_bytes())));
    if fs.root.as_bytes() != b"/" && !fs.root.is_empty() {
        calls.push(call!("chroot", libc::SYS_chroot, path(fs.root.as_bytes())));
    }
    calls.push(call!("umask", libc::SYS_umask, fs.umask));
    for d in &process.descriptors {
        let flags = if d.cloexec { libc::O_CLOEXEC } else { 0 };
        // A file that is not there has been the reason to give up before.
        let from = files.inherited(d.file).map_or(-1, |(fd, _)| fd);
        let name = snapshot.files.get(&d.file).map(|file| file.path.to_string()).unwrap_or_default();
        calls.push(call!(format!("descriptor {} ({name})", d.fd), libc::SYS_dup3, from, d.fd, flags));
        // Who listens is whom those who connect see (SO_PEERCRED).
        if let Some(FileKind::Unix { socket }) = snapshot.files.get(&d.file).map(|file| &file.kind)
            && let Some(socket) = snapshot.unix_sockets.get(socket)
            && let Some(backlog) = socket.listening
            && socket.peer_credentials.as_ref().is_some_and(|who| who.pid == PID)
            && !files.is_dead(d.file)
        {
            calls.push(call!(format!("listen {}", d.fd), libc::SYS_listen, d.fd, backlog));
        }
    }
    calls
}

fn map_scratch(
    tracee: &Tracee,
    instruction: u64,
    scratch: Scratch,
    deadline: Deadline,
) -> Result<(), InjectError> {
    let what = "map the scratch area";
    let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
    let args = [scratch.addr, Scratch::LEN, prot as u64, flags as u64, u64::MAX, 0];
    let at = tracee.call_and_interrupt(instruction, what, libc::SYS_mmap, args, deadline)?;
    if at as u64 != scratch.addr {
        return Err(InjectError::Unexpected(format!("{what}: {at}")));
    }
    tracee.write(scratch.addr, Scratch::code())
}

/// Lets PID 1, in whatever state it is, run this program anew with these arguments. `instruction`: a `syscall` of its own, should the
/// scratch area be gone.
pub(crate) fn give_back(
    tracee: &Tracee,
    instruction: u64,
    scratch: Scratch,
    arguments: &[CString],
    deadline: Deadline,
) -> Result<(), InjectError> {
    if tracee.write(scratch.addr, Scratch::code()).is_err() {
        map_scratch(tracee, instruction, scratch, deadline)?;
    }
    let data = tracee.scratch_data();
    let path = CString::new(format!("/proc/{}/exe", std::process::id())).unwrap_or_default();
    let mut strings = Vec::new();
    let mut pointers = Vec::new();
    for text in std::iter::once(&path).chain(arguments) {
        pointers.push(data + strings.len() as u64);
        strings.extend_from_slice(text.as_bytes_with_nul());
    }
    // The path, then the arguments; the vector of their addresses lies behind the strings.
    strings.resize(strings.len().next_multiple_of(8), 0);
    let vector_at = data + strings.len() as u64;
    let vector = pointers.iter().skip(1).copied().chain([0]);
    let bytes: Vec<u8> = strings.into_iter().chain(vector.flat_map(u64::to_ne_bytes)).collect();
    tracee.write(data, &bytes)?;
    let no_environment = vector_at + 8 * arguments.len() as u64;
    tracee.replace_program(scratch.instruction(), [data, vector_at, no_environment], deadline)
}

/// The arguments as C strings; one with a NUL is left out.
pub(crate) fn arguments(arguments: &[std::ffi::OsString]) -> Vec<CString> {
    arguments.iter().filter_map(|text| CString::new(text.as_bytes()).ok()).collect()
}
