//! Filters for system calls: `seccomp`, `seccomp_filter` (include/linux/seccomp.h, kernel/seccomp.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Seccomp, SeccompFilter, SeccompFilterId, Severity};

use crate::Autopsy;
use crate::error::{Result, Visited, corrupt};

/// All filters of a thread have 32,768 instructions at most (MAX_INSNS_PER_PATH), and each counts as four more.
const MAX_FILTERS: usize = 1 << 13;
const MODE_STRICT: i32 = 1;
const MODE_FILTER: i32 = 2;

#[derive(KernelType)]
#[kernel("task_struct")]
struct Task {
    #[kernel("seccomp.mode", optional)]
    mode: Option<i32>,
    #[kernel("seccomp.filter", optional)]
    filter: Option<u64>,
}

#[derive(KernelType)]
#[kernel("seccomp_filter")]
struct Filter {
    log: bool,
    wait_killable_recv: bool,
    prev: u64,
    prog: u64,
    notif: u64,
}

impl Autopsy<'_> {
    /// What a thread may call; its filters go into the table. `task`: address of the `task_struct`.
    pub(crate) fn seccomp(&self, task: u64) -> Result<Seccomp> {
        let task: Task = self.kernel.read(task)?;
        match task.mode {
            Some(MODE_STRICT) => Ok(Seccomp::Strict),
            Some(MODE_FILTER) => {
                let filters = self.seccomp_filters(task.filter.unwrap_or(0)).unwrap_or_else(|error| {
                    let text = format!("its seccomp filters cannot be read: {error}");
                    self.find(Severity::Broken, "seccomp", text);
                    vec![]
                });
                Ok(Seccomp::Filter { filters })
            }
            _ => Ok(Seccomp::Off),
        }
    }

    fn seccomp_filters(&self, newest: u64) -> Result<Vec<SeccompFilterId>> {
        let mut filters = Vec::new();
        let mut at = newest;
        let mut visited = Visited::default();
        while at != 0 {
            visited.visit("seccomp_filter", at)?;
            if filters.len() >= MAX_FILTERS {
                return Err(corrupt("seccomp_filter", at, "the list does not end"));
            }
            let filter: Filter = self.kernel.read(at)?;
            let id = SeccompFilterId(at);
            if !self.seccomp_filters.borrow().contains_key(&id) {
                let read = self.seccomp_filter(&filter)?;
                self.seccomp_filters.borrow_mut().insert(id, read);
            }
            filters.push(id);
            at = filter.prev;
        }
        filters.reverse();
        Ok(filters)
    }

    fn seccomp_filter(&self, filter: &Filter) -> Result<SeccompFilter> {
        let instructions = self.classic_bpf(filter.prog)?;
        let unsupported = match &instructions {
            None => Some("it was not kept in the form in which it was given"),
            Some(_) if filter.notif != 0 || filter.wait_killable_recv => {
                Some("another process decides for it (SECCOMP_RET_USER_NOTIF)")
            }
            Some(_) => None,
        };
        Ok(SeccompFilter {
            log: filter.log,
            instructions: instructions.unwrap_or_default(),
            unsupported: unsupported.map(|why| format!("{why}: not brought back by this version")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::Synth;

    #[test]
    fn a_list_of_filters_that_leads_in_a_circle_ends() {
        let mut synth = Synth::new();
        declare::<Task>(&mut synth, &[]);
        declare::<Filter>(&mut synth, &[]);
        crate::socket::declare_programs(&mut synth);
        let (task, filter) = (synth.alloc("task_struct"), synth.alloc("seccomp_filter"));
        let prog = synth.alloc("bpf_prog");
        synth.set("task_struct", task, "seccomp.mode", 2);
        synth.set("task_struct", task, "seccomp.filter", filter);
        synth.set("seccomp_filter", filter, "prev", filter);
        synth.set("seccomp_filter", filter, "prog", prog);
        let kernel = open(&synth);
        let autopsy = Autopsy::new(&kernel);
        assert_eq!(autopsy.seccomp(task).unwrap(), Seccomp::Filter { filters: vec![] });
        assert!(autopsy.findings()[0].text.contains("comes up twice"));
    }
}
