//! A report on one page: what happened, where, who survived, how long it took.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{Fate, FateKind, Report, State};

/// Frames of the kernel stack.
const FRAMES: usize = 16;
/// Names of those that live.
const NAMES: usize = 24;
/// Lines for one fate, and for mounts, troubles and losses that are no process's.
const ROWS: usize = 8;
/// Where the names of what is told end.
const INDENT: usize = 10;

impl Report {
    /// The report on one page. What there is more of than fits is counted, with the word how to see it.
    pub fn to_page(&self) -> String {
        let mut page = Page::default();
        self.what_happened(&mut page);
        self.who_survived(&mut page);
        self.what_else(&mut page);
        self.how_long(&mut page);
        if page.cut {
            page.text.push_str("(`otherworld report --all` leaves nothing out)\n");
        }
        page.text
    }

    fn what_happened(&self, page: &mut Page) {
        let kernel = self.dead_kernel.as_ref();
        let outcome = match self.state {
            State::Complete => "all that was to come back lives",
            State::Partial => "not all that was to come back lives",
            State::Failed => "nothing came back",
            State::Resurrecting => "the crash kernel died before the processes were rebuilt",
        };
        let generation = match self.generation {
            0 | 1 => String::new(),
            n => format!(" (panic {n} since the machine was switched on)"),
        };
        page.row("When", &format!("{}{generation}: {outcome}", self.started));
        match kernel {
            Some(kernel) => {
                let name = kernel.nodename.to_string();
                let on = if name.is_empty() { name } else { format!(" on {name}") };
                let tainted = if kernel.tainted == 0 { "" } else { ", tainted" };
                page.row(
                    "Kernel",
                    &format!("Linux {}{on}, {} CPUs{tainted}", kernel.release, kernel.online_cpus),
                );
            }
            None => page.row("Kernel", "the dead kernel could not be read"),
        }
        page.row("Panic", self.panic_text());
        let Some(panic) = &self.panic else { return };
        if let Some(tid) = panic.tid {
            let cpu = panic.cpu.map_or(String::new(), |cpu| format!(" on CPU {cpu}"));
            page.row("In", &format!("{} ({tid}){cpu}", panic.comm));
        }
        if let Some(last) =
            panic.log.iter().find(|record| record.text.as_bytes().starts_with(b"Kernel panic"))
        {
            page.row("Uptime", &seconds(last.ts_ns / 1_000_000));
        }
        let stack = panic.stack.iter().map(|f| format!("{}{}", if f.guessed { "? " } else { "" }, f.symbol));
        page.list("Stack", stack.collect(), FRAMES);
    }

    fn who_survived(&self, page: &mut Page) {
        let of =
            |kind: FateKind| -> Vec<&Fate> { self.processes.iter().filter(|p| p.fate == kind).collect() };
        page.row("Survived", &self.counts());
        for kind in [FateKind::Resurrected, FateKind::Restarted, FateKind::Ended] {
            let all = of(kind);
            if !all.is_empty() {
                page.list(&capital(kind.word()), vec![names(&all)], 1);
            }
        }
        // What many have lost alike is told once.
        let lost = of(FateKind::ResurrectedWithLosses);
        let mut by_code: BTreeMap<&str, (Vec<&Fate>, &str)> = BTreeMap::new();
        for fate in &lost {
            for reason in &fate.reasons {
                let (who, _) = by_code.entry(&reason.code).or_insert_with(|| (Vec::new(), &reason.text));
                if who.last().is_none_or(|last| last.pid != fate.pid) {
                    who.push(fate);
                }
            }
        }
        let mut losses: Vec<(Vec<&Fate>, &str)> = by_code.into_values().collect();
        losses.sort_by_key(|(who, _)| std::cmp::Reverse(who.len()));
        let line = |(who, text): &(Vec<&Fate>, &str)| match who.as_slice() {
            [one] => format!("{} ({}): {text}", one.comm, one.pid),
            all => format!("{}: such as: {text}", names(all)),
        };
        page.list("Losses", losses.iter().map(line).collect(), ROWS);
        for kind in [FateKind::GivenUp, FateKind::Failed] {
            let line = |fate: &&Fate| {
                let why = fate.reasons.first().map_or("no reason was written down", |reason| &reason.text);
                let more = match fate.reasons.len().saturating_sub(1) {
                    0 => String::new(),
                    more => format!(" (and {more} more)"),
                };
                format!("{} ({}): {why}{more}", fate.comm, fate.pid)
            };
            page.list(&capital(kind.word()), of(kind).iter().map(line).collect(), ROWS);
        }
    }

    fn what_else(&self, page: &mut Page) {
        let noted = self.mounts.iter().filter_map(|mount| {
            let state = if mount.mounted { "mounted" } else { "not mounted" };
            Some(format!("{} ({}): {state}: {}", mount.mountpoint, mount.fs_type, mount.note.as_ref()?))
        });
        page.list("Mounts", noted.collect(), ROWS);
        page.list("Trouble", self.failures.clone(), ROWS);
        if let Some(vmcore) = &self.vmcore {
            page.row("Vmcore", &vmcore.display().to_string());
        }
        let machine =
            self.findings.iter().filter(|f| f.pid.is_none() && f.severity > snapshot::Severity::Note);
        page.list("Noticed", machine.map(|f| format!("{}: {}", f.object, f.text)).collect(), ROWS);
    }

    fn how_long(&self, page: &mut Page) {
        let at = |name: &str| self.timeline.iter().find(|mark| mark.name == name).map(|mark| mark.ms);
        let steps = [
            ("init", "the crash kernel's start"),
            ("snapshot-complete", "reading the dead kernel"),
            ("released", "rebuilding the processes"),
            ("report-written", "what came after"),
        ];
        let (mut before, mut parts) = (0, Vec::new());
        for (mark, what) in steps {
            if let Some(ms) = at(mark) {
                parts.push(format!("{what} {}", seconds(ms.saturating_sub(before))));
                before = ms;
            }
        }
        if parts.is_empty() {
            return;
        }
        let whole = match at("released") {
            Some(ms) if self.state != State::Failed => {
                format!("{} until the programs went on: ", seconds(ms))
            }
            _ => String::new(),
        };
        page.row("Took", &format!("{whole}{}", parts.join(", ")));
        if let Some(pour) = &self.pour {
            let (mib, rate) = (pour.bytes >> 20, pour.rate() >> 20);
            page.row("Memory", &format!("{mib} MiB were put back at {rate} MiB/s"));
        }
    }
}

/// Text with names in front.
#[derive(Default)]
struct Page {
    text: String,
    /// Not everything is on it.
    cut: bool,
}

impl Page {
    fn row(&mut self, name: &str, value: &str) {
        let row = format!("{name:<INDENT$}{value}");
        _ = writeln!(self.text, "{}", row.trim_end());
    }

    /// Rows with one name, not more than `most`; nothing if there are none.
    fn list(&mut self, name: &str, rows: Vec<String>, most: usize) {
        // A name that is too long has a row of its own.
        let own_row = name.len() + 1 > INDENT;
        if own_row && !rows.is_empty() {
            self.row(name, "");
        }
        let left_out = rows.len().saturating_sub(most);
        let more = (left_out > 0).then(|| format!("… and {left_out} more"));
        self.cut |= left_out > 0;
        for (n, row) in rows.iter().take(most).chain(&more).enumerate() {
            self.row(if n == 0 && !own_row { name } else { "" }, row);
        }
    }
}

/// Names of programs, each with how often it is there.
fn names(fates: &[&Fate]) -> String {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for fate in fates {
        let name = fate.comm.to_string();
        match counts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name, 1)),
        }
    }
    let name = |(name, count): &(String, usize)| match count {
        1 => name.clone(),
        count => format!("{name} ×{count}"),
    };
    let mut text = counts.iter().take(NAMES).map(name).collect::<Vec<_>>().join(", ");
    let more: usize = counts.iter().skip(NAMES).map(|(_, count)| count).sum();
    if more > 0 {
        _ = write!(text, " and {more} more");
    }
    text
}

fn seconds(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{}.{:02} s", ms / 1000, ms % 1000 / 10),
        10_000..600_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        _ => format!("{} h {:02} min {:02} s", ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60),
    }
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use snapshot::{Frame, LogRecord, Panic, Reason};

    use super::super::Mark;
    use super::*;

    fn fate(pid: i32, comm: &str, fate: FateKind, reasons: &[(&str, &str)]) -> Fate {
        let reasons = reasons.iter().map(|(code, text)| Reason::new(code, *text)).collect();
        Fate { pid, ppid: 1, comm: comm.into(), fate, reasons }
    }

    fn report() -> Report {
        let frame = |symbol: &str, guessed| Frame { address: 1, symbol: symbol.into(), guessed };
        let log = LogRecord {
            seq: 1,
            ts_ns: 61_250_000_000,
            level: 0,
            text: "Kernel panic - not syncing: x".into(),
        };
        Report {
            started: "2026-01-01T00:00:00Z".into(),
            state: State::Partial,
            panic: Some(Panic {
                message: "x".into(),
                cpu: Some(1),
                tid: Some(340),
                comm: "agent".into(),
                stack: vec![frame("panic+0x13d", false), frame("ext4_sync+0x1 [ext4]", true)],
                log: vec![log],
            }),
            timeline: [("init", 2400), ("snapshot-complete", 3900), ("released", 5500)]
                .map(|(name, ms)| Mark { name: name.into(), ms })
                .into(),
            ..Report::default()
        }
    }

    #[test]
    fn the_page_says_what_where_and_how_long() {
        let page = report().to_page();
        for line in [
            "When      2026-01-01T00:00:00Z: not all that was to come back lives\n",
            "Panic     x\n",
            "In        agent (340) on CPU 1\n",
            "Uptime    61.2 s\n",
            "Stack     panic+0x13d\n          ? ext4_sync+0x1 [ext4]\n",
            "Took      5.50 s until the programs went on: the crash kernel's start 2.40 s, \
             reading the dead kernel 1.50 s, rebuilding the processes 1.60 s\n",
        ] {
            assert!(page.contains(line), "{line}\n{page}");
        }
        assert!(!page.contains("--all"), "{page}");
    }

    #[test]
    fn a_thousand_processes_are_still_a_page() {
        let mut r = report();
        r.processes.extend((0..300).map(|n| fate(n, "worker", FateKind::Resurrected, &[])));
        r.processes.push(fate(900, "cron", FateKind::Resurrected, &[]));
        let lost =
            |n| fate(1000 + n, "httpd", FateKind::ResurrectedWithLosses, &[("socket", "a peer is gone")]);
        r.processes.extend((0..300).map(lost));
        let given_up =
            |n| fate(2000 + n, "redis", FateKind::GivenUp, &[("a", "its io_uring"), ("b", "its trace")]);
        r.processes.extend((0..300).map(given_up));
        let page = r.to_page();
        assert!(page.lines().count() < 40, "{page}");
        assert!(page.contains("Lives     worker ×300, cron\n"), "{page}");
        assert!(page.contains("Losses    httpd ×300: such as: a peer is gone\n"), "{page}");
        assert!(page.contains("redis (2000): its io_uring (and 1 more)\n"), "{page}");
        assert!(page.contains("… and 292 more\n"), "{page}");
        assert!(page.contains("601 live (300 with losses), 300 given up"), "{page}");
        assert!(page.ends_with("(`otherworld report --all` leaves nothing out)\n"), "{page}");
    }
}
