//! What runs while kernels are killed: saved guests with programs in them that check themselves.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use faults::live::Symbols;
use lab::{Accel, Channel, Guest, Key, Lab, Series, Snapshot};
use serde::{Deserialize, Serialize};
use survivors::Survivor;

use super::{Fate, Outcome};
use crate::guest::{self, AGENT_COMMAND, Installation, Processes};
use crate::real_programs::{self, PROGRAMS};
use crate::survive::{self, Claim, PROGRAM};
use crate::ui;

/// From the resurrection to all verdicts.
const VERDICT_DEADLINE: Duration = Duration::from_secs(90);
/// The CPU of computing survivors.
const COMPUTING_CPU: usize = 1;
/// Warnings kill, as BUGs do, and the watchdogs bark soon.
const SYSCTLS: &str = "sysctl -q kernel.panic_on_warn=1 kernel.watchdog_thresh=4 kernel.hung_task_panic=1 kernel.hung_task_timeout_secs=10
    echo 10 > /sys/module/rcupdate/parameters/rcu_cpu_stall_timeout; exit 0";

/// One or two of each kind. Those that wait for a certain time are not among them: a saved guest's clock is set when it goes on.
const SURVIVORS: &[&str] = &[
    "memory-small",
    "memory-fork",
    "memory-shared-anonymous",
    "memory-file-private",
    "memory-file-shared",
    "memory-brk",
    "memory-layout",
    "fpu-sleep",
    "fpu-loop",
    "edge-calls",
    "edge-faults",
    "thread-tls",
    "thread-mutex",
    "thread-robust",
    "thread-join",
    "signal-handlers",
    "signal-pending",
    "rlimit-all",
    "credentials-ids",
    "credentials-capabilities",
    "fs-context",
    "file-offset",
    "file-append",
    "file-unsynced",
    "file-new",
    "file-deleted",
    "memfd-content",
    "ipc-shm",
    "ipc-sem",
    "lock-posix",
    "lock-waiter",
    "pidfd-child",
    "inotify-watch",
    "tmpfs-tree",
    "pipe-content",
    "pipe-reader",
    "pipe-writer",
    "process-wait",
    "process-zombie",
    "process-exec",
    "process-exits",
    "process-tree",
    "process-stopped",
    "epoll-pipe",
    "epoll-waiter",
    "eventfd-counter",
    "unix-pair",
    "unix-datagrams",
    "unix-reader",
    "unix-server",
    "inet-listen",
    "inet-udp",
    "pty-pair",
    "pty-reader",
    "seccomp-filter",
    "aio-contexts",
];
/// What runs beside what. All at once would have the emulated machines take most of a crash's time to find out that all of them are well.
struct Selection {
    name: &'static str,
    real: &'static [&'static str],
    /// The survivors, or every third of them, from this one on.
    third: Option<usize>,
}

const THIRDS: usize = 3;
const SELECTIONS: [Selection; 4] = [
    Selection { name: "first", real: &["bash", "tmux"], third: Some(0) },
    Selection { name: "second", real: &["python3", "redis"], third: Some(1) },
    Selection { name: "third", real: &["nginx"], third: Some(2) },
    // Not vim, whose screen changes when the pane beside it is gone.
    Selection {
        name: "large",
        real: &["bash", "top", "tmux", "python3", "redis", "nginx", "postgres", "mariadb"],
        third: None,
    },
];

impl Selection {
    fn survivors(&self) -> impl Iterator<Item = &'static Survivor> {
        let third = self.third.into_iter().flat_map(|first| SURVIVORS.iter().skip(first).step_by(THIRDS));
        third.filter_map(|name| survivors::find(name))
    }
}

/// A saved guest.
pub struct Load {
    selection: &'static Selection,
    /// With everything running, and armed.
    pub snapshot: Snapshot,
    /// Of its kernel.
    pub symbols: Symbols,
    running: Running,
}

/// What runs in it, and what that showed just before it was saved.
#[derive(Serialize, Deserialize)]
struct Running {
    processes: Processes,
    shown: BTreeMap<String, String>,
}

/// The loads of one kernel, made when they are first drawn.
pub struct Loads<'a> {
    lab: &'a Lab,
    series: Series,
    accel: Accel,
    made: [Option<Load>; SELECTIONS.len()],
}

impl<'a> Loads<'a> {
    /// None yet.
    pub fn new(lab: &'a Lab, series: Series, accel: Accel) -> Self {
        Self { lab, series, accel, made: Default::default() }
    }

    /// One of them.
    pub fn draw(&mut self, draw: &mut fastrand::Rng) -> Result<&Load> {
        let drawn = draw.usize(..SELECTIONS.len());
        let slot = &mut self.made[drawn];
        if slot.is_none() {
            *slot = Some(make(self.lab, self.series, self.accel, &SELECTIONS[drawn])?);
        }
        slot.as_ref().context("no load")
    }
}

fn make(lab: &Lab, series: Series, accel: Accel, selection: &'static Selection) -> Result<Load> {
    let config =
        real_programs::selection(&[PROGRAM]) + &format!("\n[after]\nstart = [\"{AGENT_COMMAND}\"]\n");
    let installation =
        Installation { config, saver: true, prepare: SYSCTLS.into(), ..Installation::default() };
    let booted = lab.booted(&guest::for_programs(series, accel))?;
    let armed = guest::armed(lab, &booted, &installation)?;
    let name = selection.name;
    let inputs = Key::new(name).with(include_str!("load.rs")).with(&real_programs::inputs().text());
    let label = format!("campaign-{name}");
    let (snapshot, running) = guest::running(lab, &armed, &label, &inputs, |agent| start(agent, selection))?;
    let symbols_dir = snapshot.dir.join("symbols");
    if !symbols_dir.join("done").exists() {
        // The kernel is where it is for as long as the guest is not booted again.
        std::fs::create_dir_all(&symbols_dir)?;
        let mut guest = lab.start(&snapshot, &format!("campaign-symbols-{name}-{series}"))?;
        Symbols::save(&mut guest.agent, &symbols_dir)?;
        std::fs::write(symbols_dir.join("done"), "")?;
    }
    Ok(Load { selection, symbols: Symbols::load(&symbols_dir)?, snapshot, running })
}

fn start(agent: &mut Channel, selection: &Selection) -> Result<Running> {
    let mut processes = real_programs::start(agent, |name| selection.real.contains(&name))?;
    for computing in [false, true] {
        let these: Vec<_> =
            selection.survivors().filter(|survivor| survivor.is_computing() == computing).collect();
        if !these.is_empty() {
            ui::note(&format!("starting {} survivors", these.len()));
            let started = survive::start(agent, &these, computing.then_some(COMPUTING_CPU), false)?;
            processes.extend(started.into_iter().map(|(name, pid)| (name, vec![pid])));
        }
    }
    // In a machine that is busy it takes as long as everything else that is done for a crash: once will do.
    ui::note("looking at what they show");
    let real = PROGRAMS.iter().filter(|real| processes.contains_key(real.name));
    let mut look = |real: &real_programs::Real| {
        let shown = (real.look)(agent).with_context(|| format!("look at {}", real.name));
        Ok((real.name.to_owned(), shown?))
    };
    let shown: Result<_> = real.map(&mut look).collect();
    Ok(Running { shown: shown?, processes })
}

impl Load {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.selection.name
    }

    /// The same outcome for all.
    pub fn all(&self, fate: Fate, words: &str) -> Vec<Outcome> {
        let outcome =
            |program: &String| Outcome { program: program.clone(), fate, passed: false, words: words.into() };
        self.running.processes.keys().map(outcome).collect()
    }

    /// What became of each.
    pub fn judge(&self, guest: &mut Guest, claims: &BTreeMap<i32, Claim>) -> Vec<Outcome> {
        let Running { processes, shown } = &self.running;
        let pids = |name: &str| processes.get(name).map_or(&[][..], Vec::as_slice);
        let told = |name: &str| -> Vec<Claim> {
            pids(name).iter().map(|pid| claims.get(pid).cloned().unwrap_or_default()).collect()
        };
        let mut outcomes = Vec::new();
        let mut add = |name: &str, trouble: Option<String>| {
            let own = told(name);
            // A program's are those that its processes have made, too.
            let theirs: Vec<Claim> =
                pids(name).iter().flat_map(|pid| survive::descendants(claims, *pid)).collect();
            let fate = Fate::judge(trouble.is_none(), &own, &theirs);
            let notable = own.iter().chain(&theirs).filter(|claim| !claim.whole()).map(Claim::to_string);
            let words: Vec<String> = trouble.clone().into_iter().chain(notable).collect();
            let (program, passed) = (name.to_owned(), trouble.is_none());
            outcomes.push(Outcome { program, fate, passed, words: words.join("; ") });
        };
        for real in PROGRAMS.iter().filter(|real| processes.contains_key(real.name)) {
            ui::note(&format!("checking {}", real.name));
            let before = shown.get(real.name).map_or("", String::as_str);
            // Who is given up, or was gone before, shows nothing, and asking takes its time.
            let trouble = match told(real.name).iter().find(|claim| !claim.lives()) {
                Some(_) => Some("it is not there".to_owned()),
                None => (real.check)(&mut guest.agent, before).err().map(|error| format!("{error:#}")),
            };
            add(real.name, trouble);
        }
        let running: Vec<_> = self.selection.survivors().collect();
        let pids: Vec<i32> = running
            .iter()
            .flat_map(|survivor| processes.get(survivor.name).into_iter().flatten())
            .copied()
            .collect();
        // Who does not end has come to no verdict.
        _ = guest.agent.wait(&pids, if pids.is_empty() { Duration::ZERO } else { VERDICT_DEADLINE });
        for survivor in running {
            let line = survive::verdict(guest, survivor);
            let passed = line == format!("pass {}", survivor.name);
            let words = || if line.is_empty() { "no verdict".to_owned() } else { line.clone() };
            add(survivor.name, (!passed).then(words));
        }
        outcomes
    }
}
