//! Crash procedures: functions of the applications, called on a stack of their own in the rebuilt processes before anything else of them runs.
//!
//! All run at the same time, each under ptrace, so that one that crashes or never returns costs nobody else anything. A procedure ends at the
//! breakpoint behind the call in libotherworld's entry, with its answer in `rax`.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use otherworld::LockState;
use otherworld::record::MAX_REGIONS;
use snapshot::{
    CrashProcedure, PAGE_SIZE, Pid, Prot, Reason, Registers, Resume, Snapshot, Thread, WatchedLock,
};

use crate::deadline::{Alarm, Deadline};
use crate::inject::{self, InjectError, Tracee};
use crate::process::Build;

/// From the end of the time for everything, for what comes after.
const RESERVE: Duration = Duration::from_secs(3);
/// `NT_X86_XSTATE`: the vector registers, which a procedure may use.
const NT_X86_XSTATE: u32 = 0x202;
const XSTATE_MAX: usize = 16 << 10;
/// The code of what the report says of a procedure that did what it was to do.
pub const CODE: &str = "crash-procedure";

/// How the process goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Continue,
    Restart,
    Exit,
}

impl Answer {
    fn from_register(rax: u64) -> Option<Self> {
        // An enum of C: the upper half of the register is not its.
        Some(match rax as u32 {
            0 => Self::Continue,
            1 => Self::Restart,
            2 => Self::Exit,
            _ => return None,
        })
    }
}

/// What has come of a procedure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It has returned.
    Answered(Answer),
    /// It has executed a program.
    Executed,
    /// It has ended the process.
    Exited,
    /// It crashed, took too long, or could not be called; for people.
    Failed(String),
}

/// A process in its procedure.
pub(crate) struct Running<'a> {
    pub(crate) build: Build<'a>,
    call: Call,
    began: Instant,
    deadline: Deadline,
}

/// What has to be undone when the procedure has returned.
struct Call {
    tid: Pid,
    registers: Registers,
    mask: u64,
    xstate: Vec<u8>,
    /// Stack and context.
    area: (u64, u64),
    /// How many of its locks were held.
    held: usize,
}

/// What a procedure is told beside what the report says of its process.
struct Told<'a> {
    panic: &'a str,
    generation: u32,
    unmapped_regions: Vec<u64>,
    locks: Vec<(WatchedLock, Option<LockState>)>,
}

/// Lays a context out for an address: what the `Context` of libotherworld points to lies behind it.
struct Layout {
    base: u64,
    bytes: Vec<u8>,
}

impl Layout {
    fn new(base: u64, head: usize) -> Self {
        Self { base, bytes: vec![0; head] }
    }

    /// Where the next bytes will be.
    fn next(&mut self) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        self.base + self.bytes.len() as u64
    }

    fn text(&mut self, text: &str) -> u64 {
        let at = self.next();
        self.bytes.extend(text.bytes().filter(|byte| *byte != 0));
        self.bytes.push(0);
        at
    }

    fn list(&mut self, bytes: &[u8]) -> u64 {
        let at = self.next();
        self.bytes.extend_from_slice(bytes);
        at
    }

    fn put(&mut self, at: usize, value: u64) {
        if let Some(field) = self.bytes.get_mut(at..at + 8) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
    }
}

/// What a procedure is told, as `otherworld.h` has it, for the address `base`.
fn context(base: u64, snapshot: &Snapshot, build: &Build<'_>, told: &Told<'_>) -> Vec<u8> {
    const HEAD: usize = 96;
    let process = build.process;
    let mut layout = Layout::new(base, HEAD);
    let panic = layout.text(told.panic);
    let threads: Vec<u8> = process.threads.iter().flat_map(thread).collect();
    let threads_at = layout.list(&threads);
    let mut descriptors = Vec::new();
    for d in &process.descriptors {
        let number = format!("descriptor {} ", d.fd);
        let loss = build.losses.iter().find(|loss| loss.text.starts_with(&number));
        let state: u32 = match loss {
            _ if snapshot.dead_files.contains(&d.file) => 2,
            Some(_) => 1,
            None => 0,
        };
        let why = loss.map_or(0, |loss| layout.text(&loss.text));
        descriptors.extend(d.fd.to_ne_bytes());
        descriptors.extend(state.to_ne_bytes());
        descriptors.extend(why.to_ne_bytes());
    }
    let descriptors_at = layout.list(&descriptors);
    let mut losses = Vec::new();
    for loss in &build.losses {
        losses.extend(layout.text(&loss.code).to_ne_bytes());
        losses.extend(layout.text(&loss.text).to_ne_bytes());
    }
    let losses_at = layout.list(&losses);
    let unmapped: Vec<u8> = told.unmapped_regions.iter().flat_map(|at| at.to_ne_bytes()).collect();
    let unmapped_at = layout.list(&unmapped);
    let mut locks = Vec::new();
    for (lock, state) in &told.locks {
        locks.extend(lock.address.to_ne_bytes());
        locks.extend(lock.kind.to_ne_bytes());
        locks.extend(lock.tag.to_ne_bytes());
        locks.extend(state.map_or(0, LockState::owner).to_ne_bytes());
        locks.extend(u32::from(state.is_some()).to_ne_bytes());
    }
    let locks_at = layout.list(&locks);
    let words = [
        HEAD as u64 | u64::from(told.generation) << 32,
        panic,
        threads_at,
        process.threads.len() as u64,
        descriptors_at,
        process.descriptors.len() as u64,
        losses_at,
        build.losses.len() as u64,
        unmapped_at,
        told.unmapped_regions.len() as u64,
        locks_at,
        told.locks.len() as u64,
    ];
    words.into_iter().enumerate().for_each(|(n, word)| layout.put(n * 8, word));
    layout.bytes
}

fn thread(t: &Thread) -> Vec<u8> {
    let (outcome, result): (u32, i64) = match &t.resume {
        _ if t.syscall.is_none() => (0, 0),
        Resume::Return { value, .. } => (2, *value),
        Resume::Finished => (2, t.regs.rax as i64),
        _ => (1, 0),
    };
    let mut bytes = Vec::with_capacity(248);
    bytes.extend(t.tid.to_ne_bytes());
    bytes.extend(u32::from(t.on_cpu.is_some()).to_ne_bytes());
    bytes.extend(t.syscall.map_or(-1, |call| call.nr).to_ne_bytes());
    bytes.extend(outcome.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend(result.to_ne_bytes());
    bytes.extend(t.regs.words().into_iter().flat_map(u64::to_ne_bytes));
    bytes
}

// ---- calling

/// Options while a procedure runs: it dies with us; that it executes a program is told. What it forks is its own.
const OPTIONS: i32 = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACEEXEC;

impl Call {
    /// Puts the process's main thread at the beginning of the procedure, on a new stack, and lets it go.
    fn enter(
        build: &Build<'_>,
        procedure: &CrashProcedure,
        snapshot: &Snapshot,
        generation: u32,
        deadline: Deadline,
    ) -> Result<Self, InjectError> {
        let main = build.main()?;
        let (registers, mask) = (main.registers()?, main.signal_mask()?);
        let mut xstate = vec![0; XSTATE_MAX];
        let len = main.register_set(NT_X86_XSTATE, &mut xstate)?;
        xstate.truncate(len);

        let panic = &snapshot.panic.message;
        let told = Told {
            panic: if panic.is_empty() { "no message in its log" } else { panic },
            generation,
            unmapped_regions: unmapped_regions(build, procedure),
            locks: procedure.locks.iter().map(|lock| (*lock, lock_state(main, lock))).collect(),
        };
        let stack = procedure.stack_size.next_multiple_of(PAGE_SIZE);
        // How long it is does not depend on where it lies.
        let told_len = context(0, snapshot, build, &told).len() as u64;
        // Below the stack lies a page that cannot be touched.
        let len = PAGE_SIZE + stack + told_len.next_multiple_of(PAGE_SIZE);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let map = [0, len, prot as u64, (flags | libc::MAP_NORESERVE) as u64, u64::MAX, 0];
        let start = call(build, "mmap", libc::SYS_mmap, map, deadline)?;
        let guard = [start, PAGE_SIZE, libc::PROT_NONE as u64, 0, 0, 0];
        call(build, "mprotect", libc::SYS_mprotect, guard, deadline)?;
        let top = start + PAGE_SIZE + stack;
        main.write(top, &context(top, snapshot, build, &told))?;
        if procedure.threads_run {
            build.release_others()?;
        }
        main.set_options(OPTIONS)?;
        // Nothing comes in between; the breakpoint at its end is to be told.
        main.set_signal_mask(!(1 << (libc::SIGTRAP - 1)))?;
        main.set_registers(&Registers {
            rip: procedure.entry,
            rsp: top,
            rdi: top,
            rsi: procedure.procedure,
            rdx: procedure.data,
            rbp: 0,
            orig_rax: u64::MAX,
            eflags: 0x202,
            ..registers
        })?;
        main.resume()?;
        let held =
            told.locks.iter().filter(|(_, state)| state.is_some_and(|state| state.owner() != 0)).count();
        Ok(Self { tid: main.tid, registers, mask, xstate, area: (start, len), held })
    }

    /// The thread is where it was before.
    fn undo(&self, build: &Build<'_>, deadline: Deadline) -> Result<(), InjectError> {
        let main = build.main()?;
        main.set_register_set(NT_X86_XSTATE, &self.xstate)?;
        let (start, len) = self.area;
        main.set_registers(&self.registers)?;
        main.set_signal_mask(self.mask)?;
        build.call_aside(&[("munmap", libc::SYS_munmap, [start, len, 0, 0, 0, 0])], deadline).map(drop)
    }

    /// Whether a stop for SIGTRAP is the end of the entry: there the stack is as it was at its beginning.
    fn answer(&self, registers: &Registers) -> Option<(Answer, u64)> {
        let (start, len) = self.area;
        let is_end = (start + PAGE_SIZE..start + len).contains(&registers.rsp) && registers.rbp == 0;
        let answer = is_end.then(|| Answer::from_register(registers.rax)).flatten()?;
        Some((answer, registers.rdx))
    }
}

fn call(
    build: &Build<'_>,
    what: &str,
    nr: i64,
    args: [u64; 6],
    deadline: Deadline,
) -> Result<u64, InjectError> {
    let results = build.call_aside(&[(what, nr, args)], deadline)?;
    match results.first() {
        Some(&result) if !(-4095..0).contains(&result) => Ok(result as u64),
        result => {
            let errno = Errno::from_raw(-result.copied().unwrap_or(-1) as i32);
            Err(InjectError::Call { what: what.into(), errno })
        }
    }
}

/// Who had a lock; `None` if it cannot be read.
fn lock_state(process: &Tracee, lock: &WatchedLock) -> Option<LockState> {
    // Fewer words than the largest have may be all that there is before the end of a mapping.
    (1..=otherworld::LOCK_WORDS).rev().find_map(|count| {
        let mut bytes = vec![0; 4 * count];
        process.read(lock.address, &mut bytes).ok()?;
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .filter_map(|word| Some(u32::from_ne_bytes(word.try_into().ok()?)))
            .collect();
        otherworld::lock_state(lock.kind, &words)
    })
}

/// The protected regions that are not mapped any more, as far as they can be read. The others are checked by the library, in the process's own time.
fn unmapped_regions(build: &Build<'_>, procedure: &CrashProcedure) -> Vec<u64> {
    let is_mapped = |&&(start, len, _): &&(u64, u64, u64)| {
        let Some(end) = start.checked_add(len) else { return false };
        let mut at = start;
        for vma in &build.mm.vmas {
            if at < end && vma.start <= at && at < vma.end && vma.prot.contains(Prot::READ) {
                at = vma.end;
            }
        }
        at >= end
    };
    procedure.regions.iter().filter(|region| !is_mapped(region)).map(|(start, ..)| *start).collect()
}

// ---- all at the same time

/// What has become of a process with a procedure.
pub(crate) struct Ended<'a> {
    pub(crate) build: Build<'a>,
    pub(crate) end: End,
    pub(crate) took: Duration,
    /// How many of its regions were damaged, and of its locks held.
    pub(crate) damaged: u64,
    pub(crate) held: usize,
    /// Of one that has failed and stands still: what leads back.
    call: Option<Call>,
}

impl Ended<'_> {
    /// Its threads are where they were before the procedure, which has done nobody knows how much.
    pub(crate) fn recover(&self, deadline: Deadline) -> Result<(), InjectError> {
        match &self.call {
            Some(call) => call.undo(&self.build, deadline),
            None => Err(InjectError::Unexpected("it does not stand still".into())),
        }
    }
}

/// Those that are running.
pub(crate) struct Procedures<'a> {
    running: Vec<Running<'a>>,
    ended: Vec<Ended<'a>>,
    whole: Deadline,
}

impl<'a> Procedures<'a> {
    /// Begins them all.
    pub(crate) fn begin(
        builds: Vec<(Build<'a>, &CrashProcedure)>,
        snapshot: &Snapshot,
        generation: u32,
        step: Duration,
        whole: Deadline,
    ) -> Self {
        let mut this = Self { running: Vec::new(), ended: Vec::new(), whole };
        for (build, procedure) in builds {
            let began = Instant::now();
            match Call::enter(&build, procedure, snapshot, generation, whole.or_after(step)) {
                Ok(call) => {
                    let limit = Duration::from_millis(procedure.time_limit_ms);
                    let deadline = whole.before(RESERVE).or_after(limit);
                    this.running.push(Running { build, call, began, deadline });
                }
                Err(error) => {
                    let end = End::Failed(format!("it could not be called: {error}"));
                    let took = began.elapsed();
                    this.ended.push(Ended { build, end, took, damaged: 0, held: 0, call: None });
                }
            }
        }
        this
    }

    /// Waits until all have ended, each within its time.
    pub(crate) fn await_all(mut self, alarm: &Alarm) -> Vec<Ended<'a>> {
        while let Some(nearest) = self.running.iter().map(|r| r.deadline).min() {
            alarm.set(nearest);
            match inject::wait_any(nearest) {
                Ok((tid, status)) => {
                    let Some(i) = self.running.iter().position(|r| r.call.tid == tid) else { continue };
                    self.stopped(i, status);
                }
                Err(Errno::EINTR) => {
                    while let Some(i) = self.running.iter().position(|r| r.deadline.is_over()) {
                        self.stop(i);
                        self.end(i, End::Failed("it did not return in time".into()));
                    }
                }
                Err(_) => {
                    while !self.running.is_empty() {
                        self.end(0, End::Failed("it is gone".into()));
                    }
                }
            }
        }
        self.ended
    }

    fn stopped(&mut self, i: usize, status: i32) {
        let running = &self.running[i];
        if !libc::WIFSTOPPED(status) {
            return self.end(i, End::Exited);
        }
        let Ok(main) = running.build.main() else { return self.end(i, End::Failed("it is gone".into())) };
        match (status >> 16, libc::WSTOPSIG(status)) {
            (libc::PTRACE_EVENT_EXEC, _) => {
                _ = main.detach();
                self.end(i, End::Executed);
            }
            (0, libc::SIGTRAP) => {
                let answer = main.registers().ok().and_then(|registers| running.call.answer(&registers));
                match answer {
                    Some((answer, damaged)) => self.answered(i, answer, damaged),
                    None => self.end(
                        i,
                        End::Failed("it ran into a breakpoint, or gave no answer that there is".into()),
                    ),
                }
            }
            (0, signal) => {
                let name =
                    nix::sys::signal::Signal::try_from(signal).map_or("a signal", |signal| signal.as_str());
                self.end(i, End::Failed(format!("it crashed ({name})")));
            }
            // Stops of job control, and our own.
            _ => _ = main.resume(),
        }
    }

    /// One whose time is over stands still.
    fn stop(&self, i: usize) {
        const PATIENCE: Duration = Duration::from_secs(1);
        if let Ok(main) = self.running[i].build.main()
            && main.interrupt().is_ok()
        {
            // Should it not stop, it cannot be led back either.
            _ = inject::wait(main.tid, Deadline::after(PATIENCE));
        }
    }

    fn answered(&mut self, i: usize, answer: Answer, damaged: u64) {
        let running = &self.running[i];
        let deadline = self.whole.or_after(Duration::from_secs(10));
        match running.call.undo(&running.build, deadline) {
            Ok(()) => {
                self.end(i, End::Answered(answer));
                if let Some(ended) = self.ended.last_mut() {
                    ended.damaged = damaged;
                }
            }
            Err(error) => self.end(i, End::Failed(format!("it could not be left: {error}"))),
        }
    }

    fn end(&mut self, i: usize, end: End) {
        let Running { build, began, call, .. } = self.running.swap_remove(i);
        let held = call.held;
        let call = matches!(end, End::Failed(_)).then_some(call);
        self.ended.push(Ended { build, end, took: began.elapsed(), damaged: 0, held, call });
    }
}

/// What the report says of it.
pub(crate) fn reason(ended: &Ended<'_>) -> Reason {
    let (code, what) = match &ended.end {
        End::Answered(Answer::Continue) => (CODE, "had it continue".to_owned()),
        End::Answered(Answer::Restart) => (CODE, "had it begin anew".to_owned()),
        End::Answered(Answer::Exit) => (CODE, "had it end".to_owned()),
        End::Executed => (CODE, "executed a program".to_owned()),
        End::Exited => (CODE, "ended the process".to_owned()),
        End::Failed(why) => ("crash-procedure-failed", format!("failed: {why}")),
    };
    let mut text = format!("its crash procedure ran for {} ms and {what}", ended.took.as_millis());
    let mut note = |count, one, many| match count {
        0 => {}
        1 => text.push_str(&format!("; {one}")),
        count => text.push_str(&format!("; {count} {many}")),
    };
    note(
        ended.damaged.min(MAX_REGIONS as u64) as usize,
        "a protected region was damaged",
        "protected regions were damaged",
    );
    note(ended.held, "a lock that it watches was held", "locks that it watches were held");
    Reason::new(code, text)
}

// ---- going on otherwise

/// Executes the program anew, with its arguments and its environment. Its other threads end, as with any execve(2).
pub(crate) fn restart(build: &Build<'_>, program: &[u8], deadline: Deadline) -> Result<(), InjectError> {
    let main = build.main()?;
    let layout = &build.mm.layout;
    let strings = |start: u64, end: u64| -> Result<Vec<Vec<u8>>, InjectError> {
        // ARG_MAX is a quarter of the stack's limit; nobody has more.
        let len = end.saturating_sub(start).min(8 << 20) as usize;
        let mut bytes = vec![0; len];
        main.read(start, &mut bytes)?;
        Ok(bytes.split_inclusive(|byte| *byte == 0).map(<[u8]>::to_vec).collect())
    };
    let (argv, envp) =
        (strings(layout.arg_start, layout.arg_end)?, strings(layout.env_start, layout.env_end)?);
    let size: usize =
        argv.iter().chain(&envp).map(|text| text.len() + 16 + 8).sum::<usize>() + program.len() + 64;
    let len = (size as u64).next_multiple_of(PAGE_SIZE);
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let map = [0, len, prot as u64, flags as u64, u64::MAX, 0];
    let start = call(build, "mmap", libc::SYS_mmap, map, deadline)?;
    let mut area = Layout::new(start, 0);
    let path = area.list(&[program, b"\0"].concat());
    let mut list = |texts: &[Vec<u8>]| {
        let pointers: Vec<u64> = texts.iter().map(|text| area.list(text)).chain([0]).collect();
        area.list(&pointers.iter().flat_map(|at| at.to_ne_bytes()).collect::<Vec<_>>())
    };
    let (argv, envp) = (list(&argv), list(&envp));
    main.write(start, &area.bytes)?;
    main.set_options(OPTIONS)?;
    main.set_registers(&Registers {
        rip: build.instruction(),
        rax: libc::SYS_execve as u64,
        orig_rax: u64::MAX,
        rdi: path,
        rsi: argv,
        rdx: envp,
        ..main.registers()?
    })?;
    main.resume()?;
    // Its other threads have to be waited for, or it waits for them.
    loop {
        let (tid, status) =
            inject::wait_any(deadline).map_err(|_| InjectError::Deadline { what: "execve".into() })?;
        if tid != main.tid {
            continue;
        }
        return match (libc::WIFSTOPPED(status), status >> 16) {
            (true, libc::PTRACE_EVENT_EXEC) => main.detach(),
            // The call has come back, to an instruction that means nothing.
            _ => Err(InjectError::Unexpected("execve failed".into())),
        };
    }
}

/// Ends the process.
pub(crate) fn exit(build: &Build<'_>) -> Result<(), InjectError> {
    let main = build.main()?;
    let nr = libc::SYS_exit_group as u64;
    main.set_registers(&Registers {
        rip: build.instruction(),
        rax: nr,
        orig_rax: u64::MAX,
        rdi: 0,
        ..main.registers()?
    })?;
    build.release()
}
