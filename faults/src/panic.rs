//! panic(), called wherever kernels panic.

use std::time::Duration;

use fastrand::Rng;
use serde_json::json;

use crate::live::{Live, Symbols};
use crate::{Injected, call, places_in, reach, start_in_guest};
use lab::Guest;
use lab::Result;

const WAIT: Duration = Duration::from_secs(8);
/// What panic() prints: a text without anything to be formatted.
const MESSAGE: &str = "hex_asc";
/// Shrinks the page cache and pages out.
const RECLAIM: &str = "for n in 1 2 3 4 5 6 7 8; do echo 24M > /sys/fs/cgroup/memory.reclaim; done";
/// Files that are written.
const WRITE: &str = "for n in 1 2 3 4; do dd if=/dev/zero of=/root/fault bs=64k count=64 conv=fsync; done";

/// A place of a kind, and what has to be done in the guest to get there.
struct Context {
    name: &'static str,
    functions: &'static [&'static str],
    /// Run in the guest.
    script: &'static str,
    nmi: bool,
}

const fn context(name: &'static str, functions: &'static [&'static str]) -> Context {
    Context { name, functions, script: "", nmi: false }
}

const CONTEXTS: [Context; 15] = [
    context(
        "system call",
        &[
            "do_syscall_64",
            "ksys_read",
            "ksys_write",
            "do_epoll_wait",
            "do_sys_poll",
            "do_futex",
            "__sys_sendto",
        ],
    ),
    context(
        "page fault",
        &["handle_mm_fault", "__handle_mm_fault", "do_user_addr_fault", "do_anonymous_page"],
    ),
    context(
        "interrupt",
        &["hrtimer_interrupt", "tick_sched_handle", "update_process_times", "scheduler_tick", "sched_tick"],
    ),
    context(
        "softirq",
        &["__do_softirq", "handle_softirqs", "run_timer_softirq", "rcu_core", "net_rx_action"],
    ),
    Context { nmi: true, ..context("NMI", &["default_do_nmi", "nmi_handle"]) },
    context(
        "run queue locked",
        &["update_curr", "enqueue_task_fair", "dequeue_task_fair", "pick_next_task_fair"],
    ),
    context(
        "lock held",
        &["_raw_spin_unlock", "__mutex_unlock_slowpath", "up_write", "up_read", "rwsem_down_read_slowpath"],
    ),
    context("preemption off", &["try_to_wake_up", "ttwu_do_activate", "select_task_rq_fair", "__schedule"]),
    Context {
        script: WRITE,
        ..context(
            "write",
            &[
                "generic_perform_write",
                "ext4_da_write_end",
                "ext4_da_write_begin",
                "ext4_dirty_inode",
                "jbd2_journal_dirty_metadata",
            ],
        )
    },
    context("pipe", &["pipe_read", "pipe_write", "unix_stream_sendmsg", "unix_stream_read_generic"]),
    context("fork", &["copy_process", "copy_page_range", "dup_task_struct", "wake_up_new_task", "dup_mm"]),
    context("exit", &["do_exit", "exit_mm", "release_task", "wait_consider_task", "exit_notify"]),
    context(
        "exec",
        &["begin_new_exec", "load_elf_binary", "setup_arg_pages", "bprm_execve", "copy_string_kernel"],
    ),
    context(
        "mmap",
        &["mmap_region", "__mmap_region", "do_mmap", "unmap_region", "mas_store_prealloc", "vma_complete"],
    ),
    Context {
        script: RECLAIM,
        ..context(
            "page-out",
            &[
                "shrink_folio_list",
                "shrink_lruvec",
                "isolate_lru_folios",
                "__remove_mapping",
                "try_to_unmap_one",
            ],
        )
    },
];

pub(super) fn inject(guest: &mut Guest, symbols: &Symbols, draw: &mut Rng) -> Result<Injected> {
    let Some(context) = draw.choice(&CONTEXTS) else { return Ok(Injected::Not("no context".into())) };
    if !context.script.is_empty() {
        start_in_guest(guest, context.script)?;
    }
    if context.nmi {
        // It comes as soon as the guest goes on.
        let live = Live::stop(&guest.machine, symbols)?;
        let entries: Vec<u64> = context.functions.iter().filter_map(|name| symbols.find(name)).collect();
        guest.machine.monitor().command("inject-nmi", json!({}))?;
        return strike(live, context, &entries, None);
    }
    let mut live = Live::stop(&guest.machine, symbols)?;
    let places = places_in(&mut live, context.functions, draw)?;
    let cpu = draw.usize(..live.gdb.cpus());
    strike(live, context, &places, Some(cpu))
}

fn strike(mut live: Live<'_>, context: &Context, places: &[u64], cpu: Option<usize>) -> Result<Injected> {
    let symbols = live.symbols;
    let Some(reached) = reach(&mut live, places, cpu, WAIT)? else {
        live.leave()?;
        return Ok(Injected::Not(context.name.into()));
    };
    let message = symbols.address(MESSAGE)?;
    call(&mut live, &reached, "panic", message)?;
    live.leave()?;
    let at = symbols.name(reached.at);
    Ok(Injected::Done(format!("{}: panic in {at} on CPU {}", context.name, reached.cpu)))
}
