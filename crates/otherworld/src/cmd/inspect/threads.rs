//! `inspect threads`, `inspect stack`

use autopsy::{ThreadStack, ThreadSummary};
use snapshot::ThreadState;

use super::panic::frame_line;

/// The letter of /proc/PID/stat.
fn letter(state: ThreadState) -> char {
    match state {
        ThreadState::Running => 'R',
        ThreadState::Sleeping => 'S',
        ThreadState::DiskSleep => 'D',
        ThreadState::Stopped => 'T',
        ThreadState::Traced => 't',
        ThreadState::Dead => 'Z',
        ThreadState::Other => 'I',
    }
}

pub fn text(threads: &[ThreadSummary]) -> String {
    let mut out = format!(
        "{:>7} {:>7} {:<5} {:>4}  {:<20} {:<28} {}\n",
        "TID", "PID", "STATE", "CPU", "SYSTEM CALL", "WAITS IN", "NAME"
    );
    for t in threads {
        let cpu = t.cpu.map_or_else(String::new, |cpu| format!("{cpu}{}", if t.panicked { "!" } else { "" }));
        let call = match (&t.syscall_name, &t.syscall_unknown) {
            (Some(name), _) => name.as_str(),
            (None, Some(_)) => "?",
            (None, None) => "",
        };
        // As ps(1) tells the kernel's own.
        let name = if t.kernel_thread { format!("[{}]", t.comm) } else { t.comm.to_string() };
        out.push_str(&format!(
            "{:>7} {:>7} {:<5} {cpu:>4}  {call:<20} {:<28} {name}\n",
            t.tid,
            t.pid,
            letter(t.state),
            t.wchan.as_deref().unwrap_or_default(),
        ));
    }
    let unknown = threads.iter().filter_map(|t| Some((t.tid, t.syscall_unknown.as_ref()?)));
    for (tid, why) in unknown {
        out.push_str(&format!("? thread {tid}: whether it was in a system call cannot be told: {why}\n"));
    }
    out
}

pub fn stacks(stacks: &[ThreadStack]) -> String {
    let mut out = String::new();
    for s in stacks {
        let cpu = s.cpu.map_or_else(String::new, |cpu| format!(" on CPU {cpu}"));
        out.push_str(&format!("thread {} of {} ({}), {}{cpu}\n", s.tid, s.pid, s.comm, letter(s.state)));
        out.extend(s.frames.iter().map(frame_line));
        if let Some(note) = &s.note {
            out.push_str(&format!("  no kernel stack: {note}\n"));
        }
    }
    out
}
