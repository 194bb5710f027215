//! `inspect ps`

use autopsy::ProcessSummary;

use crate::report::state_word;

pub fn text(processes: &[ProcessSummary]) -> String {
    let mut out = format!(
        "{:>7} {:>7} {:>7} {:>7} {:>5} {:>7} {:>9} {:>9} {:<8} {:<15} {}\n",
        "PID", "PPID", "PGID", "SID", "UID", "THREADS", "PAGES", "SWAPPED", "STATE", "NAME", "COMMAND"
    );
    let number = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    for p in processes {
        let row = format!(
            "{:>7} {:>7} {:>7} {:>7} {:>5} {:>7} {:>9} {:>9} {:<8} {:<15} {}",
            p.pid,
            p.ppid,
            p.pgid,
            p.sid,
            number(p.uid.map(u64::from)),
            p.threads,
            number(p.resident_pages),
            number(p.swapped_pages),
            state_word(&p.state),
            p.comm.to_string(),
            p.exe.as_ref().map(ToString::to_string).unwrap_or_default()
        );
        out.push_str(row.trim_end());
        out.push('\n');
    }
    out
}
