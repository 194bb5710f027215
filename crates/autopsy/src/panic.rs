//! Which kernel died, and its last words: the log, the panic message, the stack of the CPU that panicked.

pub(crate) mod orc;
mod printk;

use ktypes::KernelType;
use snapshot::{Frame, LogRecord, Panic, Severity};

use vmcore::PAGE_SIZE;

use crate::error::corrupt;
use crate::thread::CpuRegisters;
use crate::{Autopsy, Result};

/// `struct uts_namespace` (include/linux/utsname.h).
#[derive(KernelType)]
#[kernel("uts_namespace")]
struct UtsNamespace {
    #[kernel("name.version")]
    version: [u8; 65],
    #[kernel("name.nodename")]
    nodename: [u8; 65],
}

/// `struct vdso_image` (arch/x86/include/asm/vdso.h).
#[derive(KernelType)]
#[kernel("vdso_image")]
struct VdsoImage {
    data: u64,
    size: u64,
}

/// The part of `struct rq` (kernel/sched/sched.h) that says who runs on a CPU.
#[derive(KernelType)]
#[kernel("rq")]
struct RunQueue {
    curr: u64,
}

/// The part of a task that names it.
#[derive(KernelType)]
#[kernel("task_struct")]
struct TaskName {
    pid: i32,
    comm: [u8; 16],
}

/// `panic_cpu` before anybody panicked (`PANIC_CPU_INVALID`, include/linux/panic.h).
const NO_CPU: i32 = -1;

/// What `panic` prints in front of its message (kernel/panic.c).
const PANIC_PREFIX: &str = "Kernel panic - not syncing: ";

/// Beginnings of the first line of an oops that went straight into kdump, without `panic` (arch/x86/kernel/dumpstack.c, mm/fault.c,
/// traps.c, lib/bug.c).
const OOPS_PREFIXES: [&str; 6] =
    ["BUG: ", "kernel BUG at ", "Oops: ", "general protection fault", "divide error: ", "invalid opcode: "];

/// No vDSO comes near this (it has two or three pages).
const MAX_VDSO: u64 = 1 << 20;

impl Autopsy<'_> {
    /// Release, version, name of the machine, taint, vDSO. What cannot be read stays empty and becomes a finding.
    pub fn kernel_facts(&self) -> snapshot::Kernel {
        let kernel = self.kernel;
        let uts = self.attempt("the kernel's version", || {
            Ok(kernel.read::<UtsNamespace>(kernel.symbol("init_uts_ns")?)?)
        });
        let online = self.attempt("the CPUs that were online", || Ok(kernel.online_cpus()?.len() as u32));
        let tainted = self.attempt("the taint mask", || Ok(kernel.read_u64(kernel.symbol("tainted_mask")?)?));
        snapshot::Kernel {
            release: kernel.release().to_owned(),
            version: uts.as_ref().map(|u| text(&u.version)).unwrap_or_default(),
            nodename: uts.map(|u| until_nul(&u.nodename).into()).unwrap_or_default(),
            online_cpus: online.unwrap_or_default(),
            page_table_levels: kernel.memory().levels(),
            kaslr_offset: kernel.info().kerneloffset().unwrap_or_default(),
            tainted: tainted.unwrap_or_default(),
            vdso: self.attempt("the vDSO", || self.vdso_fingerprint()),
            vdso_frame: self.attempt("where the vDSO is", || self.vdso_frame()),
            modules: self.loaded_modules(),
        }
    }

    fn loaded_modules(&self) -> Vec<String> {
        let mut names: Vec<String> = self.kernel.module_names().map(str::to_owned).collect();
        names.reverse();
        names
    }

    /// The message, who panicked and where, and the whole log.
    pub fn panic_report(&self) -> Panic {
        let log = self.attempt("the kernel log", || self.kernel_log()).unwrap_or_default();
        let cpu = self.attempt("which CPU panicked", || self.panic_cpu()).flatten();
        let task = cpu.and_then(|cpu| self.attempt("who was running on it", || self.task_on(cpu)));
        Panic {
            message: panic_message(&log),
            cpu,
            tid: task.as_ref().map(|t| t.pid),
            comm: task.map(|t| until_nul(&t.comm).into()).unwrap_or_default(),
            stack: cpu.map(|cpu| self.kernel_stack(cpu)).unwrap_or_default(),
            log,
        }
    }

    /// The kernel log, oldest record first.
    ///
    /// # Errors
    /// When the ring buffer cannot be found, or has nothing that can be read. Records that are damaged or were being written are left out.
    pub fn kernel_log(&self) -> Result<Vec<LogRecord>> {
        let log = printk::read(self.kernel)?;
        // A kernel speaks from its first moment on.
        if log.is_empty() {
            let at = self.kernel.symbol("prb")?;
            return Err(corrupt("printk_ringbuffer", at, "has no record that can be read"));
        }
        Ok(log)
    }

    /// Runs a reading step of which the rest does not depend: an error becomes a finding.
    fn attempt<T>(&self, what: &str, step: impl FnOnce() -> Result<T>) -> Option<T> {
        step()
            .map_err(|error| self.find(Severity::Note, "panic", format!("{what} cannot be read: {error}")))
            .ok()
    }

    fn vdso_fingerprint(&self) -> Result<(u64, u64)> {
        let image: VdsoImage = self.kernel.read(self.kernel.symbol("vdso_image_64")?)?;
        let bytes = self.kernel.read_bytes(image.data, image.size.min(MAX_VDSO) as usize)?;
        Ok(snapshot::vdso_fingerprint(&bytes))
    }

    /// The image is a part of the kernel's, which is in one piece.
    fn vdso_frame(&self) -> Result<u64> {
        let image: VdsoImage = self.kernel.read(self.kernel.symbol("vdso_image_64")?)?;
        let at = self.kernel.virt_to_phys(image.data)?;
        if !at.is_multiple_of(PAGE_SIZE) {
            return Err(corrupt("vdso_image", image.data, "does not begin with a page"));
        }
        Ok(at / PAGE_SIZE)
    }

    /// `panic_cpu` (kernel/panic.c): set by whoever wins the race to panic or to `crash_kexec`.
    fn panic_cpu(&self) -> Result<Option<u32>> {
        let cpu = self.kernel.read_i32(self.kernel.symbol("panic_cpu")?)?;
        Ok((cpu != NO_CPU).then_some(cpu as u32))
    }

    fn task_on(&self, cpu: u32) -> Result<TaskName> {
        let queue = self.kernel.per_cpu(self.kernel.symbol("runqueues")?, cpu)?;
        let queue: RunQueue = self.kernel.read(queue)?;
        Ok(self.kernel.read(queue.curr)?)
    }

    /// The kernel's stack on a CPU, from the registers that the CPU saved for the dump.
    fn kernel_stack(&self, cpu: u32) -> Vec<Frame> {
        let status = self.kernel.vmcore().prstatus().iter().find(|status| status.cpu == cpu);
        let Some(status) = status else {
            self.find(
                Severity::Note,
                "panic",
                format!("the dump has no registers of CPU {cpu}: no kernel stack"),
            );
            return Vec::new();
        };
        self.unwind(orc::State::new(&status.regs), orc::MAX_FRAMES)
    }

    /// The frames of a kernel stack from a place on it outwards, not more than `most`; without unwind tables they are guessed, and a finding
    /// says so.
    pub(crate) fn unwind(&self, state: orc::State, most: usize) -> Vec<Frame> {
        match self.unwinder() {
            Some(unwinder) => unwinder.unwind(state, most),
            None => orc::scan(self.kernel, state, most),
        }
    }

    /// The frames of a CPU's stack from the registers that it saved for the dump, as far as nothing is guessed.
    pub(crate) fn places(&self, registers: &CpuRegisters) -> Vec<orc::Place> {
        self.unwinder().map_or_else(Vec::new, |unwinder| unwinder.places(orc::State::new(registers)))
    }

    pub(crate) fn unwinder(&self) -> Option<&orc::Unwinder<'_>> {
        let unwinder = self.unwinder.get_or_init(|| {
            orc::Unwinder::new(self.kernel, self.module_code())
                .inspect_err(|error| {
                    let text = format!("no unwind tables, stacks are guessed: {error}");
                    self.find(Severity::Note, "panic", text);
                })
                .ok()
        });
        unwinder.as_ref()
    }
}

/// The text behind the prefix of `panic`, or the first line of the oops that killed the kernel without it; the last one counts.
fn panic_message(log: &[LogRecord]) -> String {
    let lines = || log.iter().rev().map(|record| text(record.text.as_bytes()));
    let panic = lines().find_map(|line| Some(line.strip_prefix(PANIC_PREFIX)?.to_owned()));
    let oops = || lines().find(|line| OOPS_PREFIXES.iter().any(|prefix| line.starts_with(prefix)));
    panic.or_else(oops).unwrap_or_default()
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(until_nul(bytes)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: &[&str]) -> Vec<LogRecord> {
        let record = |(seq, line): (usize, &&str)| LogRecord {
            seq: seq as u64,
            ts_ns: 0,
            level: 0,
            text: (*line).into(),
        };
        lines.iter().enumerate().map(record).collect()
    }

    #[test]
    fn message_is_what_panic_said_or_the_oops() {
        let panicked =
            log(&["BUG: something", "Kernel panic - not syncing: sysrq triggered crash", "CPU: 0 PID: 1"]);
        assert_eq!(panic_message(&panicked), "sysrq triggered crash");
        let oopsed =
            log(&["BUG: kernel NULL pointer dereference, address: 0", "#PF: supervisor read", "RIP: 0010:x"]);
        assert_eq!(panic_message(&oopsed), "BUG: kernel NULL pointer dereference, address: 0");
        assert_eq!(panic_message(&log(&["fine"])), "");
    }
}
