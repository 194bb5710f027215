//! Threads: registers and what else is per `task_struct` (include/linux/sched.h, arch/x86; 6.1 and 6.12).

mod edge;
mod summary;

pub use summary::{ThreadStack, ThreadSummary};

use std::collections::HashMap;
use std::ops::Range;

use ktypes::KernelType;
use snapshot::{
    AltStack, Registers, Resume, Rseq, Scheduling, Severity, SyscallInFlight, Thread, ThreadState,
};

use vmcore::PrStatus;

use edge::Edge;

use crate::Autopsy;
use crate::error::{Result, corrupt};
use crate::panic::orc::{self, Place};
use crate::process::{Member, Task};
use crate::syscall::{self, Timers};

/// More CPUs than any kernel is built for (CONFIG_NR_CPUS).
const MAX_CPUS: u32 = 8192;
/// The size that every rseq registration had before 6.3.
const ORIG_RSEQ_SIZE: u32 = 32;
/// static_prio of nice 0 (DEFAULT_PRIO).
const DEFAULT_PRIO: i32 = 120;
/// The bit of task_struct.atomic_flags (PFA_NO_NEW_PRIVS).
const NO_NEW_PRIVS: u64 = 1;
/// First word of every kernel stack (STACK_END_MAGIC, include/uapi/linux/magic.h): overwritten when it overflowed.
const STACK_END_MAGIC: u64 = 0x57ac_6e9d;
/// `__USER_CS`, `__USER32_CS` and `__USER_DS` (arch/x86/include/asm/segment.h).
pub(crate) const USER_CS: u64 = 0x33;
const USER32_CS: u64 = 0x23;
const USER_DS: u64 = 0x2b;
/// The flag that is always set (X86_EFLAGS_FIXED).
const ALWAYS_ONE: u64 = 2;
/// First address that no user program can have (five-level page tables).
const USER_END: u64 = 1 << 56;
/// Where `struct user_regs_struct` has the frame pointer and the segment bases.
pub(crate) const RBP: usize = 4;
const FS_BASE: usize = 21;
const GS_BASE: usize = 22;
/// IRQ_STACK_SIZE (arch/x86/include/asm/page_64_types.h); twice that with KASAN.
const IRQ_STACK_SIZE: u64 = 16 << 10;
/// A CPU's registers as its NT_PRSTATUS note has them: the words of `struct user_regs_struct`.
pub(crate) type CpuRegisters = [u64; 27];
/// `orig_ax` of who is in no system call.
const NO_SYSTEM_CALL: u64 = u64::MAX;
/// exit(2), of one thread.
const NR_EXIT: i64 = 60;
/// Frames of a kernel stack that are looked at for where a thread sleeps: as many as the kernel looks at (get_wchan()).
const WCHAN_FRAMES: usize = 16;

#[derive(KernelType)]
#[kernel("rq")]
struct RunQueue {
    curr: u64,
}

/// An area of the kernel's own mappings (include/linux/vmalloc.h).
#[derive(KernelType)]
#[kernel("vm_struct")]
struct VmStruct {
    addr: u64,
}

/// Who was where when the kernel died.
pub(crate) struct Cpus {
    /// CPU on which a task (by address) was current.
    pub current: HashMap<u64, u32>,
    /// Bit map of the CPUs that were online.
    online: Vec<u8>,
    /// The CPU that panicked.
    pub panicking: Option<u32>,
    /// The task that was current there.
    pub panicking_task: u64,
}

impl Cpus {
    /// Online CPUs by number.
    pub(crate) fn online(&self) -> impl Iterator<Item = u32> {
        bits(&self.online)
    }
}

/// Numbers of the bits that are set.
fn bits(mask: &[u8]) -> impl Iterator<Item = u32> {
    let bit = |(i, byte): (usize, &u8)| {
        let byte = *byte;
        (0..8).filter(move |b| byte >> b & 1 != 0).map(move |b| i as u32 * 8 + b)
    };
    mask.iter().enumerate().flat_map(bit)
}

/// Where the user's registers lie on a kernel stack.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StackLayout {
    /// THREAD_SIZE.
    pub size: u64,
    /// Offset of the user's `pt_regs` from the stack's lowest address.
    pub pt_regs: u64,
}

/// Bytes at the lowest end of a stack: whose stack pointer is there has come to its guard, and what is found from there is what was pushed last.
const OVERFLOWED: u64 = 512;

/// What a thread that was on a CPU used of its stack, and where it was.
struct InUse {
    stack_pointer: Option<u64>,
    instruction_pointer: Option<u64>,
    frames: Vec<Place>,
    registers: Option<CpuRegisters>,
}

impl Autopsy<'_> {
    /// Reads a thread.
    pub(crate) fn thread(&self, member: &Member, unsupported: &mut Vec<String>) -> Result<Thread> {
        let Member { addr, task } = member;
        let tid = task.pid;
        let (credentials, _) = self.credentials(task.real_cred)?;
        let state = task.thread_state();
        let on_cpu = self.cpu_of(*addr, task);
        let mut thread = Thread {
            tid,
            comm: task.name(),
            state,
            on_cpu,
            panicked: self.cpus().panicking_task == *addr,
            regs: Registers::default(),
            syscall: None,
            wchan: None,
            resume: Resume::UserMode,
            fpu: Default::default(),
            credentials,
            blocked: task.blocked,
            pending: self.pending_signals(task.pending)?,
            altstack: AltStack { sp: task.sas_ss_sp, size: task.sas_ss_size, flags: task.sas_ss_flags },
            robust_list: task.robust_list.unwrap_or(0),
            clear_child_tid: task.clear_child_tid,
            rseq: self.rseq(task),
            scheduling: self.scheduling(task)?,
            no_new_privs: task.atomic_flags & NO_NEW_PRIVS != 0,
            pdeath_signal: task.pdeath_signal,
            timer_slack_ns: task.timer_slack_ns,
            personality: task.personality,
            seccomp: self.seccomp(*addr)?,
        };
        if state == ThreadState::Dead || task.stack == 0 {
            thread.state = ThreadState::Dead;
            thread.resume = Resume::Exit { status: task.exit_code };
            return Ok(thread);
        }
        let live = on_cpu.and_then(|cpu| self.crash_registers(cpu, tid));
        let edge = match (on_cpu, live) {
            (Some(cpu), Some(live)) => self.edge(task, cpu, &live)?,
            _ => None,
        };
        thread.regs = self.registers(*addr, task, on_cpu, live, edge.as_ref())?;
        if thread.regs.cs == USER32_CS {
            unsupported.push(format!("thread {tid} runs 32-bit code"));
        }
        thread.wchan = if on_cpu.is_none() { self.wchan(task) } else { None };
        (thread.syscall, thread.resume) = match edge {
            Some(Edge::Unknown) => {
                let why =
                    "its CPU was entering or leaving the kernel: where its registers are cannot be told";
                (None, Resume::Impossible { why: why.into() })
            }
            Some(Edge::Program(_)) | None => self.resume(*addr, task, &thread, live)?,
        };
        thread.blocked = signal_mask(task, &thread);
        match thread.resume {
            // What it has done of that does no harm twice, and where it was waited for is forgotten (mm_release(), kernel/fork.c).
            _ if task.is_exiting() && thread.syscall.is_some_and(|call| call.nr == NR_EXIT) => {
                thread.resume = Resume::Restart;
            }
            _ if task.is_exiting() => thread.resume = Resume::Exit { status: task.exit_code },
            // All that belongs to the old program's memory is gone with it.
            Resume::Exec(_) => {
                (thread.rseq, thread.altstack) = (None, AltStack::default());
                (thread.robust_list, thread.clear_child_tid) = (0, 0);
            }
            _ => {}
        }
        thread.fpu = self.fpu(*addr, task, on_cpu, thread.syscall.is_some())?;
        Ok(thread)
    }

    /// The call that a thread was in, and how the thread goes on.
    fn resume(
        &self,
        addr: u64,
        task: &Task,
        thread: &Thread,
        live: Option<CpuRegisters>,
    ) -> Result<(Option<SyscallInFlight>, Resume)> {
        let layout = self.stack_layout()?;
        let (stack_pointer, instruction_pointer) = match (thread.on_cpu, live) {
            (None, _) => (Some(task.kernel_sp), None),
            (Some(_), live) => (live.map(|r| r[PrStatus::RSP]), live.map(|r| r[PrStatus::RIP])),
        };
        let stack = task.stack..task.stack.saturating_add(layout.pt_regs);
        let is_on_stack = stack_pointer.is_some_and(|sp| stack.contains(&sp));
        // On the way from one task to the next the stack is already the other's, and its own is as it will be when it is on no CPU.
        let switching = instruction_pointer
            .and_then(|ip| self.kernel.symbolize(ip))
            .is_some_and(|(name, _)| ["__switch_to_asm", "__switch_to"].contains(&name));
        let stack_pointer = match (stack_pointer, thread.on_cpu) {
            (Some(_), _) if switching && !is_on_stack => Some(task.kernel_sp),
            (Some(sp), Some(cpu)) if !is_on_stack => self.interrupted_at(cpu, sp),
            (sp, _) => sp,
        };
        let mut found = InUse {
            stack_pointer,
            instruction_pointer,
            frames: live.map_or_else(Vec::new, |registers| self.places(&registers)),
            registers: live,
        };
        let is_found = self.find_lost_stack(&stack, &mut found);
        let context = syscall::Context {
            task: addr,
            registers: &thread.regs,
            // On another stack it was an interrupt that died; the thread that it came upon had nothing to do with it.
            panicked: thread.panicked && (is_on_stack || is_found),
            on_cpu: thread.on_cpu.is_some(),
            stack,
            stack_pointer: found.stack_pointer,
            instruction_pointer: found.instruction_pointer,
            cpu_registers: found.registers.as_ref(),
            frames: &found.frames,
            wchan: thread.wchan.as_deref(),
            now: *self.now(),
            timers: self.timers(),
            tasks: self.known_tasks.get().map_or(&[], Vec::as_slice),
        };
        Ok(syscall::resume(self.kernel, &context))
    }

    /// Where a thread on a CPU was that has no stack pointer any more, or one at the very end of an overflowed stack: what is on the stack says it.
    /// Returns whether it has been found.
    fn find_lost_stack(&self, stack: &Range<u64>, found: &mut InUse) -> bool {
        // The note has the CPU's registers, or, if an exception was the end of it, those that the exception came upon (crash_kexec()).
        let is_lost = |(index, place): (usize, &Place)| {
            let overflowed = stack.start..stack.start.saturating_add(OVERFLOWED);
            (index == 0 || place.regs.is_some())
                && (overflowed.contains(&place.sp) || self.kernel.read_u64(place.sp).is_err())
        };
        let Some(index) = found.frames.iter().enumerate().position(is_lost) else { return false };
        let (lost, Some(mut registers)) = (found.frames[index], found.registers) else { return false };
        if let Some(at) = lost.regs {
            let len = self.kernel.size_of("pt_regs").unwrap_or(0) as usize;
            let Ok(bytes) = self.kernel.read_bytes(at, len) else { return false };
            let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
            // In the order of the note's.
            registers.iter_mut().zip(words).for_each(|(register, word)| *register = word);
        }
        let unwinder = self.unwinder();
        let frames = unwinder.and_then(|unwinder| unwinder.found_again(&lost, registers[RBP], stack));
        let Some(frames) = frames else { return false };
        let Some(&first) = frames.first() else { return false };
        found.registers = Some(registers);
        found.stack_pointer = Some(first.sp);
        found.instruction_pointer = Some(first.address);
        found.frames.truncate(index);
        found.frames.extend(frames);
        true
    }

    /// The stack pointer of what an interrupt has come upon, if the CPU was on the stack for interrupts: the first thing on that one
    /// (in_irq_stack(), arch/x86/kernel/dumpstack_64.c, 6.1 and 6.12). The registers are below it, where the interrupt has put them.
    pub(crate) fn interrupted_at(&self, cpu: u32, sp: u64) -> Option<u64> {
        let kernel = self.kernel;
        let pointer = match kernel.symbol_opt("pcpu_hot") {
            Some(hot) => {
                let offset = kernel.offset_of("pcpu_hot", "hardirq_stack_ptr").ok()?;
                kernel.per_cpu(hot, cpu).ok()?.wrapping_add(offset)
            }
            None => kernel.per_cpu(kernel.symbol_opt("hardirq_stack_ptr")?, cpu).ok()?,
        };
        let top = kernel.read_u64(pointer).ok()?;
        let is_on_it = sp <= top && top - sp < IRQ_STACK_SIZE;
        is_on_it.then(|| kernel.read_u64(top).ok()).flatten()
    }

    /// Everybody who slept with a timeout.
    pub(crate) fn timers(&self) -> &Timers {
        self.timers.get_or_init(|| {
            let subject = self.set_subject(None);
            let timers = Timers::read(self.kernel).unwrap_or_else(|error| {
                self.find(Severity::Doubt, "syscall", format!("the timers cannot be read: {error}"));
                Timers::default()
            });
            for damage in &timers.damage {
                self.find(Severity::Doubt, "syscall", damage.clone());
            }
            self.set_subject(subject);
            timers
        })
    }

    fn rseq(&self, task: &Task) -> Option<Rseq> {
        let addr = task.rseq.filter(|addr| *addr != 0)?;
        let len = task.rseq_len.unwrap_or(ORIG_RSEQ_SIZE);
        Some(Rseq { addr, len, signature: task.rseq_sig.unwrap_or(0) })
    }

    fn scheduling(&self, task: &Task) -> Result<Scheduling> {
        // What the user asked for, where the kernel remembers it apart (since 6.2); otherwise what is in force.
        let mask = if task.user_cpus_ptr != 0 { task.user_cpus_ptr } else { task.cpus_mask };
        let mask = self.kernel.read_bytes(mask, self.cpu_mask_len())?;
        let everywhere = self
            .cpus()
            .online()
            .all(|cpu| mask.get(cpu as usize / 8).is_some_and(|b| b >> (cpu % 8) & 1 != 0));
        Ok(Scheduling {
            policy: task.policy,
            nice: task.static_prio.saturating_sub(DEFAULT_PRIO),
            rt_priority: task.rt_priority,
            reset_on_fork: task.sched_reset_on_fork,
            affinity: if everywhere { Vec::new() } else { bits(&mask).collect() },
        })
    }

    /// Bytes of a CPU mask that can have bits set.
    fn cpu_mask_len(&self) -> usize {
        let cpus = self.kernel.symbol("nr_cpu_ids").and_then(|addr| self.kernel.read_u32(addr));
        cpus.unwrap_or(64).clamp(1, MAX_CPUS).div_ceil(64) as usize * 8
    }

    /// Which task was on which CPU.
    pub(crate) fn cpus(&self) -> &Cpus {
        self.cpus.get_or_init(|| {
            let online = self.kernel.symbol("__cpu_online_mask");
            let online = online.and_then(|addr| self.kernel.read_bytes(addr, self.cpu_mask_len()));
            let mut cpus = Cpus {
                current: HashMap::new(),
                online: online.unwrap_or_default(),
                panicking: None,
                panicking_task: 0,
            };
            let run_queues = self.kernel.symbol("runqueues");
            for cpu in bits(&cpus.online) {
                let queue = run_queues.as_ref().map_err(|e| e.to_string()).and_then(|base| {
                    let addr = self.kernel.per_cpu(*base, cpu).map_err(|e| e.to_string())?;
                    self.kernel.read::<RunQueue>(addr).map_err(|e| e.to_string())
                });
                match queue {
                    Ok(queue) => {
                        cpus.current.insert(queue.curr, cpu);
                    }
                    Err(error) => {
                        let text = format!("what CPU {cpu} was running is not known: {error}");
                        self.find(Severity::Doubt, "thread", text);
                    }
                }
            }
            let cpu_of = |name| self.kernel.symbol(name).and_then(|addr| self.kernel.read_i32(addr)).ok();
            let panicking =
                ["panic_cpu", "crashing_cpu"].into_iter().filter_map(cpu_of).find(|cpu| *cpu >= 0);
            cpus.panicking = panicking.map(|cpu| cpu as u32);
            let on_it = cpus.current.iter().find(|(_, cpu)| Some(**cpu) == cpus.panicking);
            cpus.panicking_task = on_it.map_or(0, |(task, _)| *task);
            cpus
        })
    }

    /// The CPU on which a task was running.
    ///
    /// What a run queue calls its current task is, for some hundred instructions of each switch, only the next one. Who has the CPU's
    /// registers is who was `current` when the CPU wrote its note; that one counts where every CPU has left a note.
    pub(crate) fn cpu_of(&self, addr: u64, task: &Task) -> Option<u32> {
        let notes = self.kernel.memory().core().prstatus();
        if notes.len() == self.cpus().online().count() {
            let note = notes.iter().find(|note| note.pid == task.pid)?;
            return self.cpus().online().nth(note.cpu as usize);
        }
        let current = self.cpus().current.get(&addr).copied();
        if current.is_none() && task.on_cpu != 0 {
            let text = format!("thread {} was being switched to or from a CPU", task.pid);
            self.find(Severity::Note, "thread", text);
        }
        current
    }

    /// THREAD_SIZE and the place of `pt_regs`, from the dead kernel's own first stack, tried on tasks.
    pub(crate) fn stack_layout(&self) -> Result<StackLayout> {
        let layout = self.stacks.get_or_init(|| self.find_stack_layout());
        layout.ok_or_else(|| corrupt("kernel stack", 0, "its size cannot be found out"))
    }

    fn find_stack_layout(&self) -> Option<StackLayout> {
        let symbol = |name| self.kernel.symbol_opt(name);
        let start = symbol("__start_init_stack").or_else(|| symbol("init_stack"))?;
        let end = symbol("__end_init_stack").or_else(|| symbol("__end_init_task"))?;
        let size = end
            .checked_sub(start)
            .filter(|size| size.is_power_of_two() && (8192..=131_072).contains(size))?;
        let regs = self.kernel.size_of("pt_regs").ok()?;
        // TOP_OF_KERNEL_STACK_PADDING: 0, or 16 where the kernel can do FRED. The linker knows (since 6.7).
        let told = symbol("__top_init_kernel_stack").and_then(|top| top.checked_sub(start));
        let candidates = [told, Some(size - regs), size.checked_sub(regs + 16)];
        let tasks: Vec<u64> = {
            let link = self.kernel.offset_of("task_struct", "tasks").ok()?;
            let head = self.kernel.symbol("init_task").ok()?.wrapping_add(link);
            self.kernel.list_head(head, 4096).map_while(|n| n.ok()).map(|n| n.wrapping_sub(link)).collect()
        };
        let stacks: Vec<u64> = tasks
            .iter()
            .filter_map(|addr| self.kernel.read::<Task>(*addr).ok())
            .filter(|task| !task.is_kernel_thread() && task.mm != 0 && task.stack != 0)
            .map(|task| task.stack)
            .take(32)
            .collect();
        let fits = |pt_regs: u64| {
            let good = stacks.iter().filter(|stack| {
                let words = self.kernel.read_bytes(stack.wrapping_add(pt_regs), regs as usize);
                words.is_ok_and(|bytes| plausible(&decode(&bytes)))
            });
            good.count() * 2 > stacks.len() || stacks.is_empty()
        };
        let pt_regs = candidates.into_iter().flatten().find(|offset| fits(*offset))?;
        Some(StackLayout { size, pt_regs })
    }

    /// The user's registers of a thread, as they were when it entered the kernel.
    fn registers(
        &self,
        addr: u64,
        task: &Task,
        on_cpu: Option<u32>,
        live: Option<CpuRegisters>,
        edge: Option<&Edge>,
    ) -> Result<Registers> {
        self.check_stack(task, on_cpu)?;
        let mut regs = match edge {
            Some(Edge::Program(regs)) => **regs,
            Some(Edge::Unknown) | None => self.stored_registers(task)?,
        };
        if !plausible(&regs) {
            return Err(corrupt(
                "pt_regs",
                task.stack,
                format!("of thread {} are not those of a program", task.pid),
            ));
        }
        // execve(2) does not set it until 6.1 (start_thread()): the CPU does.
        regs.eflags |= ALWAYS_ONE;
        (regs.fs_base, regs.gs_base) = (task.fsbase, task.gsbase);
        // The bases that the CPU had: the program may have changed them itself (WRFSBASE) since it was switched in.
        if let Some(cpu) = on_cpu {
            let note = live.map(|live| (live[FS_BASE], live[GS_BASE]));
            let slot = || self.saver()?.slot(cpu).filter(|slot| slot.pid == task.pid);
            if let Some(bases) = note.or_else(|| slot().map(|slot| (slot.fs_base, slot.gs_base))) {
                (regs.fs_base, regs.gs_base) =
                    user_bases(bases, (task.fsbase, task.gsbase), self.bases_of_next(addr, cpu));
            }
        }
        regs.ds = task.ds.into();
        regs.es = task.es.into();
        regs.fs = task.fsindex.into();
        regs.gs = task.gsindex.into();
        Ok(regs)
    }

    /// The bases of the thread that a CPU was about to switch to from this one. It has them a few instructions before the other thread is `current`, and
    /// has saved this one's before (__switch_to(), arch/x86/kernel/process_64.c, 6.1 and 6.12).
    fn bases_of_next(&self, addr: u64, cpu: u32) -> Option<(u64, u64)> {
        let current = &self.cpus().current;
        let (&next, _) = current.iter().find(|&(&task, &its)| its == cpu && task != addr)?;
        let next: Task = self.kernel.read(next).ok()?;
        Some((next.fsbase, next.gsbase))
    }

    /// What became of the last word of a thread's stack.
    fn check_stack(&self, task: &Task, on_cpu: Option<u32>) -> Result<()> {
        if self.kernel.read_u64(task.stack)? == STACK_END_MAGIC {
            return Ok(());
        }
        let text = format!("thread {}: its kernel stack overflowed", task.pid);
        // Who goes further than that comes to the guarding page, and the machine dies of it: nothing else has been overwritten.
        if on_cpu.is_some() && on_cpu == self.cpus().panicking && self.is_guarded(task) {
            self.find(Severity::Note, "thread", text + ", as far as the page that guards it");
        } else {
            self.find(Severity::Doubt, "thread", text);
        }
        Ok(())
    }

    /// Whether what overflows a thread's stack stops the machine and overwrites nothing: it is mapped alone
    /// (alloc_thread_stack_node(), kernel/fork.c), and behind each such area there is nothing (__get_vm_area_node(), mm/vmalloc.c).
    fn is_guarded(&self, task: &Task) -> bool {
        let area = task.stack_vm_area.filter(|area| *area != 0);
        area.and_then(|area| self.kernel.read::<VmStruct>(area).ok())
            .is_some_and(|area| area.addr == task.stack)
    }

    /// `pt_regs` at the top of a thread's stack.
    pub(crate) fn stored_registers(&self, task: &Task) -> Result<Registers> {
        let len = self.kernel.size_of("pt_regs")? as usize;
        let addr = task.stack.wrapping_add(self.stack_layout()?.pt_regs);
        Ok(decode(&self.kernel.read_bytes(addr, len)?))
    }

    /// Whether the thread's CPU was just entering or leaving the kernel, by the registers in its note.
    fn edge(&self, task: &Task, cpu: u32, live: &CpuRegisters) -> Result<Option<Edge>> {
        let bytes: Vec<u8> = live.iter().flat_map(|word| word.to_le_bytes()).collect();
        let top = task.stack.saturating_add(self.stack_layout()?.pt_regs);
        let moment = edge::Moment {
            cpu: &decode(&bytes),
            stack: task.stack..top,
            frame: &self.stored_registers(task)?,
            number: cpu,
        };
        edge::find(self.kernel, &moment)
    }

    /// The registers that a CPU left in its NT_PRSTATUS note (`crash_save_cpu`); none if it never got there.
    pub(crate) fn crash_registers(&self, cpu: u32, pid: i32) -> Option<CpuRegisters> {
        let index = self.cpus().online().position(|n| n == cpu)?;
        let notes = self.kernel.memory().core().prstatus();
        let note = notes.iter().find(|note| note.cpu as usize == index)?;
        // A CPU that never answered has no note, and then the numbers do not fit: the PID tells.
        (note.pid == pid).then_some(note.regs)
    }

    /// The function in which a sleeping thread waits, as /proc/PID/wchan has it: the first one on its stack outside the scheduler. `None` if
    /// that would be a guess.
    fn wchan(&self, task: &Task) -> Option<String> {
        let layout = self.stack_layout().ok()?;
        if !(task.stack..task.stack.checked_add(layout.size)?).contains(&task.kernel_sp) {
            return None;
        }
        let scheduler =
            self.kernel.symbol("__sched_text_start").ok()?..self.kernel.symbol("__sched_text_end").ok()?;
        let state = orc::State::of_inactive(self.kernel, task.kernel_sp).ok()?;
        let frames = self.unwind(state, WCHAN_FRAMES);
        let frame = frames.iter().find(|frame| frame.guessed || !scheduler.contains(&frame.address))?;
        if frame.guessed {
            return None;
        }
        Some(self.kernel.symbolize(frame.address)?.0.to_owned())
    }
}

/// The bases that a CPU had, where they are a program's: a CPU that was between the first instruction of an entry into the kernel and its
/// `swapgs` (or behind the last one of an exit) leaves the kernel's own GS base in its note, and one that is switching to another thread may
/// have that one's (`next`). Then those of the last switch count.
fn user_bases(cpu: (u64, u64), switched: (u64, u64), next: Option<(u64, u64)>) -> (u64, u64) {
    // The highest bit is the kernel's, with four and with five levels of page tables.
    let base = |cpu: u64, switched: u64, next: Option<u64>| {
        if cpu >> 63 == 0 && next != Some(cpu) { cpu } else { switched }
    };
    (base(cpu.0, switched.0, next.map(|n| n.0)), base(cpu.1, switched.1, next.map(|n| n.1)))
}

/// The signal mask to go on with: not the one that a call had put in force for its own duration.
fn signal_mask(task: &Task, thread: &Thread) -> u64 {
    const RT_SIGTIMEDWAIT: i64 = 128;
    const RT_SIGSUSPEND: i64 = 130;
    if task.restore_sigmask {
        return task.saved_sigmask;
    }
    match thread.syscall.map(|call| call.nr) {
        // It says that the mask is to be restored only when it returns (kernel/signal.c, sigsuspend()).
        // Woken, it is still within the call until it has run.
        Some(RT_SIGSUSPEND)
            if thread.on_cpu.is_none()
                && matches!(thread.state, ThreadState::Sleeping | ThreadState::Running) =>
        {
            task.saved_sigmask
        }
        // While it waits it lets through what it waits for (do_sigtimedwait()).
        Some(RT_SIGTIMEDWAIT) if task.real_blocked != 0 => task.real_blocked,
        _ => task.blocked,
    }
}

/// `pt_regs` of x86-64: the order of `struct user_regs_struct`, up to ss. In the words of `cs` and `ss` FRED keeps more
/// above the selectors.
fn decode(bytes: &[u8]) -> Registers {
    let (words, _) = bytes.as_chunks::<8>();
    let word = |i: usize| words.get(i).map_or(0, |w| u64::from_le_bytes(*w));
    Registers {
        r15: word(0),
        r14: word(1),
        r13: word(2),
        r12: word(3),
        rbp: word(4),
        rbx: word(5),
        r11: word(6),
        r10: word(7),
        r9: word(8),
        r8: word(9),
        rax: word(10),
        rcx: word(11),
        rdx: word(12),
        rsi: word(13),
        rdi: word(14),
        orig_rax: word(15),
        rip: word(16),
        cs: word(17) & 0xffff,
        eflags: word(18),
        rsp: word(19),
        ss: word(20) & 0xffff,
        ..Registers::default()
    }
}

/// Whether these can be a program's registers.
fn plausible(regs: &Registers) -> bool {
    const INTERRUPTS: u64 = 0x200;
    (regs.cs == USER_CS || regs.cs == USER32_CS)
        && regs.ss == USER_DS
        && regs.eflags & INTERRUPTS != 0
        && regs.rip < USER_END
        && regs.rsp < USER_END
}

#[cfg(test)]
mod tests {
    use synth::{Synth, named};

    use super::*;
    use crate::testing::{declare, open};

    #[test]
    fn registers_of_the_kernel_are_refused() {
        let user = Registers {
            cs: 0x33,
            ss: 0x2b,
            eflags: 0x246,
            rip: 0x40_1000,
            rsp: 0x7fff_0000,
            ..Default::default()
        };
        assert!(plausible(&user));
        assert!(!plausible(&Registers { cs: 0x10, ss: 0x18, ..user }));
        assert!(!plausible(&Registers { rip: 0xffff_ffff_8100_0000, ..user }));
        assert!(plausible(&Registers { eflags: 0x200, ..user }), "as execve(2) leaves them");
        assert!(!plausible(&Registers { eflags: 2, ..user }));
    }

    #[test]
    fn a_stack_that_overflowed_into_its_guard_has_damaged_nothing() {
        let mut synth = Synth::new();
        declare::<Task>(&mut synth, &[("tasks", named("list_head"))]);
        declare::<RunQueue>(&mut synth, &[]);
        declare::<VmStruct>(&mut synth, &[]);
        let [task, area] = ["task_struct", "vm_struct"].map(|name| synth.alloc(name));
        let stack = synth.vmalloc(16 << 10);
        synth.set("task_struct", task, "stack", stack).set("task_struct", task, "stack_vm_area", area);
        synth.set("vm_struct", area, "addr", stack);
        let queues = synth.per_cpu_variable("runqueues", synth.size_of("rq"));
        synth.write_u64(synth.per_cpu(queues, 1), task);
        let panicked = synth.variable("panic_cpu", "rq");
        synth.write_u64(panicked, 1);
        let said = |synth: &Synth, cpu| {
            let kernel = open(synth);
            let autopsy = Autopsy::new(&kernel);
            let task = kernel.read::<Task>(task).unwrap();
            autopsy.check_stack(&task, Some(cpu)).unwrap();
            let found = autopsy.findings().into_iter().find(|finding| finding.text.contains("overflowed"));
            found.map(|finding| finding.severity)
        };
        assert_eq!(said(&synth, 1), Some(Severity::Note));
        assert_eq!(said(&synth, 0), Some(Severity::Doubt), "it did not die of it");
        synth.set("vm_struct", area, "addr", stack + 0x1000);
        assert_eq!(said(&synth, 1), Some(Severity::Doubt), "nothing guards it");
        synth.write_u64(stack, STACK_END_MAGIC);
        assert_eq!(said(&synth, 1), None);
    }

    #[test]
    fn the_kernels_own_base_is_nobodys() {
        let kernel = 0xffff_8880_7d80_0000;
        let changed = user_bases((0x7f00_1000, 0x10), (1, 2), None);
        assert_eq!(changed, (0x7f00_1000, 0x10), "changed since the switch");
        assert_eq!(user_bases((0x7f00_1000, kernel), (1, 2), None), (0x7f00_1000, 2));
    }

    #[test]
    fn the_bases_of_the_next_thread_are_not_those_of_the_last() {
        let mut synth = Synth::new();
        declare::<Task>(&mut synth, &[("tasks", named("list_head"))]);
        declare::<RunQueue>(&mut synth, &[]);
        let [task, next] = ["task_struct"; 2].map(|name| synth.alloc(name));
        synth.set("task_struct", next, "thread.fsbase", 0x7f00_2000_u64);
        let queues = synth.per_cpu_variable("runqueues", synth.size_of("rq"));
        for (cpu, current) in [(0, next), (1, task)] {
            synth.write_u64(synth.per_cpu(queues, cpu), current);
        }
        let kernel = open(&synth);
        let autopsy = Autopsy::new(&kernel);
        let next = autopsy.bases_of_next(task, 0);
        assert_eq!(next, Some((0x7f00_2000, 0)));
        assert_eq!(
            user_bases((0x7f00_2000, 0), (0x7f00_1000, 5), next),
            (0x7f00_1000, 5),
            "it has them already"
        );
        assert_eq!(user_bases((0x7f00_3000, 6), (0x7f00_1000, 5), next), (0x7f00_3000, 6), "not yet");
        assert_eq!(autopsy.bases_of_next(task, 1), None, "nobody comes next");
    }

    #[test]
    fn masks_are_read_bit_by_bit() {
        assert_eq!(bits(&[0b101, 0, 0x80]).collect::<Vec<_>>(), [0, 2, 23]);
    }
}
