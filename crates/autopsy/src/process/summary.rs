//! Processes at a glance: what ps(1) shows, without reading what they consist of.

use ktypes::KernelType;
use serde::Serialize;
use snapshot::{Bytes, Pid, ProcessState, Severity};

use super::{Group, Member, Task};
use crate::Autopsy;
use crate::error::{Error, Result};
use crate::file::File;
use crate::memory::counters::SWAP_ENTRIES;

/// `struct mm_struct` (include/linux/mm_types.h), as far as ps needs it.
#[derive(KernelType)]
#[kernel("mm_struct")]
struct Mm {
    exe_file: u64,
}

/// A process as ps(1) would list it.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessSummary {
    #[allow(missing_docs)]
    pub pid: Pid,
    /// 0: none.
    pub ppid: Pid,
    #[allow(missing_docs)]
    pub pgid: Pid,
    #[allow(missing_docs)]
    pub sid: Pid,
    /// The real one; `None` if it could not be read.
    pub uid: Option<u32>,
    /// Threads, with those that had exited and had not been taken off the list (a zombie has one).
    pub threads: usize,
    /// Pages in memory, by the kernel's own count; `None` for who has no memory, or if it could not be read.
    pub resident_pages: Option<u64>,
    /// Pages in swap, likewise.
    pub swapped_pages: Option<u64>,
    #[allow(missing_docs)]
    pub state: ProcessState,
    #[allow(missing_docs)]
    pub comm: Bytes,
    /// The program's path; `None` for who has no memory, or if it could not be read.
    pub exe: Option<Bytes>,
}

impl Autopsy<'_> {
    /// All user processes, by ascending PID. What of one cannot be read is left out, and a finding says why.
    ///
    /// # Errors
    /// When neither the task list nor the PID table can be read, a structure is not as expected in this kernel, or not one
    /// process can be read.
    pub fn process_summaries(&self) -> Result<Vec<ProcessSummary>> {
        let (mut summaries, mut first_loss) = (Vec::new(), None);
        // Who had not begun to run is no process yet.
        let (groups, _) = self.groups_of(|leader| !leader.is_kernel_thread() && !leader.is_new())?;
        self.kernel.check::<Mm>()?;
        for group in groups {
            let before = self.set_subject(Some(group.leader.pid));
            match self.summary(&group) {
                Ok(summary) => summaries.push(summary),
                Err(error) => {
                    self.lost(&group.leader, &error);
                    first_loss = first_loss.or(Some(error));
                }
            }
            self.set_subject(before);
        }
        match first_loss {
            Some(error) if summaries.is_empty() => Err(error),
            _ => Ok(summaries),
        }
    }

    fn summary(&self, group: &Group) -> Result<ProcessSummary> {
        let Group { leader, signal, members } = group;
        let gone = |task: &Task| task.has_exited() || task.is_exiting();
        let living: Vec<&Member> = members.iter().filter(|member| !gone(&member.task)).collect();
        let representative = living.first().map_or(leader, |member| &member.task);
        let mut summary = ProcessSummary {
            pid: leader.pid,
            ppid: self.parent_pid(leader),
            pgid: self.pid_number(signal.pgrp)?,
            sid: self.pid_number(signal.session)?,
            uid: self.glance("credentials", self.credentials(representative.real_cred)).map(|(c, _)| c.uid),
            threads: members.len(),
            resident_pages: None,
            swapped_pages: None,
            state: self.process_state(leader, signal, !living.is_empty()),
            comm: leader.name(),
            exe: None,
        };
        if representative.mm != 0
            && let Some(mm) = self.glance("memory", self.kernel.read::<Mm>(representative.mm))
        {
            let users = members.iter().filter(|member| member.task.mm != 0).map(|member| member.addr);
            if let Some(counters) = self.glance("memory", self.memory_counters(representative.mm, users)) {
                // While threads count on, one of the parts can be less than nothing.
                let pages = |count: i64| u64::try_from(count).unwrap_or(0);
                let all: i64 = counters.iter().fold(0, |sum, count| sum.saturating_add(*count));
                summary.resident_pages = Some(pages(all.saturating_sub(counters[SWAP_ENTRIES])));
                summary.swapped_pages = Some(pages(counters[SWAP_ENTRIES]));
            }
            if mm.exe_file != 0 {
                summary.exe = self.glance("file", self.program(mm.exe_file));
            }
        }
        Ok(summary)
    }

    /// The path of an open file.
    fn program(&self, file: u64) -> Result<Bytes> {
        let file: File = self.kernel.read(file)?;
        Ok(self.path(&file.f_path)?.path)
    }

    /// What one can do without at a glance: `None` with a finding when it is damaged.
    fn glance<T, E: Into<Error>>(&self, object: &str, result: Result<T, E>) -> Option<T> {
        let told = |error: E| self.find(Severity::Broken, object, error.into().to_string());
        result.map_err(told).ok()
    }
}
