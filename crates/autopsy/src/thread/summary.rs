//! Threads at a glance: where each one was, and its kernel stack.

use ktypes::KernelType;
use serde::Serialize;
use snapshot::{Bytes, Frame, Pid, Severity, ThreadState};
use vmcore::PrStatus;

use super::{CpuRegisters, Edge, USER32_CS};
use crate::Autopsy;
use crate::error::{Result, corrupt};
use crate::panic::orc;
use crate::process::{Member, Task};
use crate::syscall;

/// thread_info.status: the call came in through a 32-bit entry (arch/x86/include/asm/thread_info.h).
const TS_COMPAT: u32 = 0x2;
/// Place of cs in `struct user_regs_struct`.
const CS: usize = 17;

#[derive(KernelType)]
#[kernel("task_struct")]
struct Status {
    #[kernel("thread_info.status")]
    status: u32,
}

/// A thread: where it was.
#[derive(Clone, Debug, Serialize)]
pub struct ThreadSummary {
    #[allow(missing_docs)]
    pub tid: Pid,
    #[allow(missing_docs)]
    pub pid: Pid,
    /// The thread's own name.
    pub comm: Bytes,
    #[allow(missing_docs)]
    pub state: ThreadState,
    /// A thread of the kernel's own.
    pub kernel_thread: bool,
    /// The CPU that it was running on.
    pub cpu: Option<u32>,
    /// It was running on the CPU that panicked.
    pub panicked: bool,
    /// Number of the system call that it was in.
    pub syscall: Option<i64>,
    /// Its name; `syscall N` for one that this version does not know, `32-bit syscall N` for one of the other table.
    pub syscall_name: Option<String>,
    /// Why it cannot be told whether it was in a system call.
    pub syscall_unknown: Option<String>,
    /// The kernel function in which it slept.
    pub wchan: Option<String>,
}

/// The kernel stack of a thread.
#[derive(Clone, Debug, Serialize)]
pub struct ThreadStack {
    #[allow(missing_docs)]
    pub tid: Pid,
    #[allow(missing_docs)]
    pub pid: Pid,
    #[allow(missing_docs)]
    pub comm: Bytes,
    #[allow(missing_docs)]
    pub state: ThreadState,
    /// The CPU that it was running on.
    pub cpu: Option<u32>,
    /// Innermost first; empty for a thread that ran its program, has exited, or of which nothing is known.
    pub frames: Vec<Frame>,
    /// Why there are no frames.
    pub note: Option<String>,
}

impl Autopsy<'_> {
    /// All threads, the kernel's own too: by ascending PID, of a process the main thread first. What of one cannot be read is left out,
    /// and a finding says why.
    ///
    /// # Errors
    /// When neither the task list nor the PID table can be read.
    pub fn thread_summaries(&self) -> Result<Vec<ThreadSummary>> {
        let summary = |member: &Member| {
            let Member { addr, task } = member;
            let before = self.set_subject(Some(task.tgid));
            let cpu = self.cpu_of(*addr, task);
            let mut summary = ThreadSummary {
                tid: task.pid,
                pid: task.tgid,
                comm: task.name(),
                state: task.thread_state(),
                kernel_thread: task.is_kernel_thread(),
                cpu,
                panicked: self.cpus().panicking_task == *addr,
                syscall: None,
                syscall_name: None,
                syscall_unknown: None,
                wchan: None,
            };
            let asleep = cpu.is_none() && summary.state != ThreadState::Running;
            if asleep && summary.state != ThreadState::Dead && task.stack != 0 {
                summary.wchan = self.wchan(task);
            }
            match self.current_syscall(*addr, task, cpu) {
                Ok(None) => {}
                Ok(Some((nr, compat))) => {
                    summary.syscall = Some(nr);
                    summary.syscall_name = Some(match syscall::name(nr) {
                        _ if compat => format!("32-bit syscall {nr}"),
                        Some(name) => name.to_owned(),
                        None => format!("syscall {nr}"),
                    });
                }
                Err(error) => summary.syscall_unknown = Some(error.to_string()),
            }
            self.set_subject(before);
            summary
        };
        Ok(self.all_threads()?.iter().map(summary).collect())
    }

    /// Number of the call that a thread is in, and whether it came in by a 32-bit entry; `None`: it is in none.
    fn current_syscall(&self, addr: u64, task: &Task, cpu: Option<u32>) -> Result<Option<(i64, bool)>> {
        // Those of the kernel, and of a program that run in the kernel only, have never been in one.
        if task.is_kernel_thread()
            || task.is_worker()
            || task.has_exited()
            || task.is_new()
            || task.stack == 0
        {
            return Ok(None);
        }
        let live = cpu.and_then(|cpu| self.crash_registers(cpu, task.pid));
        let edge = match (cpu, &live) {
            (Some(cpu), Some(live)) => self.edge(task, cpu, live)?,
            (Some(cpu), None) => {
                let why = format!("CPU {cpu}, which it ran on, left no registers");
                return Err(corrupt("task_struct", addr, why));
            }
            (None, _) => None,
        };
        if edge == Some(Edge::Unknown) {
            return Err(corrupt("task_struct", addr, "its CPU was entering or leaving the kernel"));
        }
        let registers = self.registers(addr, task, cpu, live, edge.as_ref())?;
        if (registers.orig_rax as i32) < 0 {
            return Ok(None);
        }
        let compat = registers.cs == USER32_CS || self.kernel.read::<Status>(addr)?.status & TS_COMPAT != 0;
        Ok(Some((i64::from(registers.orig_rax as u32), compat)))
    }

    /// The kernel stacks of all threads of a process, the main one first, or, if `id` is the number of another thread, of that one. Empty:
    /// there is neither.
    ///
    /// # Errors
    /// When neither the task list nor the PID table can be read.
    pub fn stacks(&self, id: Pid) -> Result<Vec<ThreadStack>> {
        let threads = self.all_threads()?;
        let of = |pid: fn(&Task) -> Pid| threads.iter().filter(move |member| pid(&member.task) == id);
        let of_process: Vec<&Member> = of(|task| task.tgid).collect();
        let wanted = if of_process.is_empty() { of(|task| task.pid).collect() } else { of_process };
        Ok(wanted.into_iter().map(|member| self.stack(member)).collect())
    }

    fn stack(&self, member: &Member) -> ThreadStack {
        let Member { addr, task } = member;
        let before = self.set_subject(Some(task.tgid));
        let cpu = self.cpu_of(*addr, task);
        let (frames, note) = match self.stack_frames(task, cpu) {
            Ok(frames) => (frames, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        self.set_subject(before);
        ThreadStack {
            tid: task.pid,
            pid: task.tgid,
            comm: task.name(),
            state: task.thread_state(),
            cpu,
            frames,
            note,
        }
    }

    /// A thread's frames, or why there are none; for people.
    fn stack_frames(&self, task: &Task, cpu: Option<u32>) -> std::result::Result<Vec<Frame>, String> {
        if task.stack == 0 {
            return Err("it has exited and given its kernel stack back".into());
        }
        let state = match cpu {
            Some(cpu) => {
                let registers: CpuRegisters = self
                    .crash_registers(cpu, task.pid)
                    .ok_or_else(|| format!("CPU {cpu}, which it ran on, left no registers"))?;
                if registers[CS] & 3 != 0 {
                    return Err(format!("it was running its program, at {:#x}", registers[PrStatus::RIP]));
                }
                orc::State::new(&registers)
            }
            None => {
                let layout = self.stack_layout().map_err(|error| error.to_string())?;
                let stack = task.stack..task.stack.saturating_add(layout.size);
                if !stack.contains(&task.kernel_sp) {
                    let text = format!("the stack pointer {:#x} is not on its stack", task.kernel_sp);
                    self.find(Severity::Doubt, "thread", format!("thread {}: {text}", task.pid));
                    return Err(text);
                }
                orc::State::of_inactive(self.kernel, task.kernel_sp).map_err(|error| error.to_string())?
            }
        };
        Ok(self.unwind(state, orc::MAX_FRAMES))
    }
}
