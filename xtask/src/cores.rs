//! `cargo xtask cores`: core files out of a dead kernel, against what gdb and /proc said of the living processes.
//!
//! A C program of many threads and kinds of memory, python3 and mariadbd run in a guest. Before the panic gdb is attached to each and tells
//! the backtrace and the registers of every thread, and their memory is recorded through /proc. In the crash kernel `otherworld core` writes
//! their core files, gdb has to tell the same of these, and their memory has to be the same, byte for byte.

mod programs;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use lab::{Channel, Guest, Lab, Panic, Program, Series, Snapshot};

use crate::crash::{self, Quiet};
use crate::crash_runs::Tally;
use crate::guest::Processes;
use crate::in_guest::{file, shell};
use crate::{Global, build, ui};

/// Where everything is in the guest.
const DIR: &str = "/root/cores";
/// The crash kernel's command line; its initramfs is the lab's own, which only starts the agent.
const CRASH_CMDLINE: &str = "console=ttyS0 maxcpus=1 reset_devices panic=1 quiet cgroup_disable=memory";
const DEADLINE: Duration = Duration::from_secs(240);
const ORACLE: &str = include_str!("../programs/cores.py");

/// Functions in which the threads of the C program are, innermost first.
const CHAINS: &[(&str, &[&str])] = &[
    ("main", &["wait_for_all", "main"]),
    ("locker", &["wait_for_lock", "wait_for_lock", "wait_for_lock", "wait_for_lock", "locker"]),
    ("reader", &["read", "read_pipe", "reader"]),
    ("sleeper", &["nanosleep", "sleep_long", "sleeper"]),
    ("registers", &["pause_with_registers", "registers"]),
    (SPINNER, &["spin", "spinner"]),
];
/// The one that does not stand still.
const SPINNER: &str = "spinner";
/// Registers that a thread has kept when gdb has let go of it. Not so `rax` and `orig_rax`: its system call has begun anew.
const REGISTERS: &str = "rip rsp rbp rbx rdx rsi rdi r8 r9 r10 r12 r13 r14 r15 eflags cs ss fs_base gs_base mxcsr ymm6 ymm15 st0 fctrl";
/// What pause(2) has in `rax` (-ENOSYS) and `orig_rax` while it waits, as gdb prints it.
const IN_PAUSE: [&str; 2] = ["0xffffffffffffffda", "0x22"];

/// Writes core files of processes of a dead kernel, and compares them with what gdb and /proc told of the living ones: a C program, python3,
/// and mariadbd; two checks each.
#[derive(Debug, Args)]
pub struct Cores {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// Changes a byte of memory and a register of each thread in every core file: all checks must fail (to see that they can).
    #[arg(long)]
    damage: bool,
}

impl Cores {
    /// One kernel, as part of the tests.
    pub fn new(kernel: Series) -> Self {
        Self { kernel: Some(kernel), damage: false }
    }

    /// Runs it; whether all core files are right.
    pub fn run(self, global: &Global) -> Result<bool> {
        Ok(self.count(global)?.close())
    }

    /// Runs it and counts the checks.
    pub fn count(self, global: &Global) -> Result<Tally> {
        let lab = global.lab()?;
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            tally.add(self.on(&lab, global, series).with_context(|| format!("cores on kernel {series}"))?);
        }
        Ok(tally)
    }

    fn on(&self, lab: &Lab, global: &Global, series: Series) -> Result<Tally> {
        let (running, processes) = programs::running(lab, global, series)?;
        let mut guest = lab.start(&running, &format!("cores-{series}"))?;
        let tally = self.once(lab, &mut guest, &running, &processes);
        if !matches!(tally, Ok(Tally { failed: 0, .. })) {
            guest.keep_artifacts()?;
            ui::line(format!("artifacts: {}", guest.dir.display()));
        }
        tally
    }

    fn once(&self, lab: &Lab, guest: &mut Guest, running: &Snapshot, processes: &Processes) -> Result<Tally> {
        let release = lab.kernel(running.config.series)?.release;
        let agent = &mut guest.agent;
        agent.push(&build::static_binaries()?.otherworld, "/usr/local/sbin/otherworld", 0o755)?;
        agent.push(&lab::saver::build(&release, lab.cache())?, "/root/saver.ko", 0o644)?;
        agent.push(&lab.boot_initramfs(running)?, "/root/initramfs", 0o644)?;
        agent.write_file(format!("{DIR}/cores.py"), 0o644, ORACLE.as_bytes())?;
        shell(agent, "insmod /root/saver.ko && mkswap -q /dev/vdb && swapon /dev/vdb")?;
        agent.load_crash_kernel(&format!("/boot/vmlinuz-{release}"), "/root/initramfs", CRASH_CMDLINE)?;
        let said = file(agent, &format!("{DIR}/c.out"))?;
        let mut subjects = Vec::new();
        for (name, program) in programs::ALL {
            let pid =
                *processes.get(*name).and_then(|pids| pids.first()).context("a program without a process")?;
            ui::note(&format!("asking gdb and /proc about {name}"));
            subjects.push(Subject::new(agent, name, program, pid, &said)?);
        }
        let words =
            |what: &str| said.lines().find_map(|line| line.strip_prefix(what)).context("threads.c is silent");
        oracle(agent, &format!("pageout {} {}", subjects[0].pid, words("swap ")?))?;
        agent.sync()?;

        let panic =
            Panic { alive: subjects.iter().map(|s| s.pid).collect(), cpu: Some(0), ..Panic::default() };
        crash::crash(guest, &panic, &mut Quiet)?.context("some program had ended before the panic")?;
        ui::note("waiting for the crash kernel");
        guest.wait_crash_agent(DEADLINE)?;
        let agent = &mut guest.agent;
        ui::note("writing core files");
        let command = Program::new(["otherworld", "core", "--all", "-o", &format!("{DIR}/all"), "--json"]);
        let exit = agent.exec(&command, DEADLINE)?;
        let complaints = String::from_utf8_lossy(&exit.stderr).into_owned();
        std::fs::write(guest.dir.join("cores.json"), &exit.stdout)?;
        std::fs::write(guest.dir.join("cores.txt"), &complaints)?;
        ensure!(matches!(exit.code, Some(0 | 4)), "otherworld core: {:?}: {complaints}", exit.code);
        let rows: serde_json::Value = serde_json::from_slice(&exit.stdout).context("its JSON")?;

        let mut tally = Tally::default();
        for subject in &subjects {
            if self.damage {
                oracle(agent, &format!("damage {} {DIR} {}", subject.pid, subject.core()))?;
            }
            ui::note(&format!("comparing the core file of {}", subject.name));
            let checks = [
                ("threads", subject.check_threads(agent, &said, &guest.dir)),
                ("memory", subject.check_memory(agent, &rows)),
            ];
            for (what, result) in checks {
                let row = format!("kernel {}, {}: {what}", running.config.series, subject.name);
                let row = match &result {
                    Ok(what) => format!("{row}: {what}"),
                    Err(error) => format!("{row}: {error:#}"),
                };
                if result.is_ok() != self.damage {
                    tally.passed += 1;
                    ui::line(row);
                } else {
                    tally.failed += 1;
                    ui::failure(row);
                }
            }
        }
        Ok(tally)
    }
}

/// Runs the oracle in the guest.
fn oracle(agent: &mut Channel, arguments: &str) -> Result<String> {
    let text = agent.shell(&format!("python3 {DIR}/cores.py {arguments}"), DEADLINE);
    text.with_context(|| format!("cores.py {arguments}"))
}

/// What gdb says of each thread, by its TID: the lines of its backtrace, then those of its registers.
type Threads = BTreeMap<i32, Vec<String>>;

fn gdb(agent: &mut Channel, arguments: &[&str]) -> Result<(Threads, String)> {
    let registers = format!("thread apply all info registers {REGISTERS}");
    let mut argv = vec!["gdb", "-nx", "-nh", "-batch", "-iex", "set debuginfod enabled off"];
    for command in ["set width 0", "set height 0", "thread apply all bt 200", &registers] {
        argv.extend(["-ex", command]);
    }
    argv.extend(arguments);
    let exit = agent.exec(&Program::new(argv), DEADLINE)?;
    let text = [exit.stdout, exit.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    ensure!(exit.code == Some(0), "gdb: {:?}: {text}", exit.code);
    Ok((threads(&text), text))
}

fn threads(text: &str) -> Threads {
    let mut threads = Threads::new();
    let mut current = None;
    for line in text.lines() {
        if line.starts_with("Thread ") {
            let tid =
                line.split_once("LWP ").map(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next());
            current = tid.flatten().and_then(|tid| tid.parse().ok());
        } else if line.is_empty() || line.starts_with('[') {
            current = None;
        } else if let Some(tid) = current {
            threads.entry(tid).or_default().push(line.to_owned());
        }
    }
    threads
}

/// Names of the functions in a backtrace, innermost first.
fn functions(lines: &[String]) -> Vec<&str> {
    let frames = lines.iter().filter(|line| line.starts_with('#'));
    frames.filter_map(|line| line.split_once(" (")?.0.split_whitespace().last()).collect()
}

/// A process, and what was said of it when it lived.
struct Subject {
    name: &'static str,
    program: &'static str,
    pid: i32,
    threads: Threads,
    /// The thread that does not stand still.
    restless: Option<i32>,
    /// How many pages it had.
    pages: u64,
}

impl Subject {
    fn new(
        agent: &mut Channel,
        name: &'static str,
        program: &'static str,
        pid: i32,
        said: &str,
    ) -> Result<Self> {
        let restless = if name == "threads" { Some(tid_of(said, SPINNER)?) } else { None };
        if name == "mariadbd" {
            agent.kill(pid, SIGSTOP)?;
        }
        let still = format!("still {pid} {}", restless.unwrap_or(0));
        oracle(agent, &still)?;
        let (threads, text) = gdb(agent, &["-p", &pid.to_string()])?;
        ensure!(!threads.is_empty(), "gdb says nothing of {name}: {text}");
        oracle(agent, &still)?;
        let pages = oracle(agent, &format!("record {pid} {DIR}"))?;
        let pages = pages.trim().parse().context("the number of its pages")?;
        Ok(Self { name, program, pid, threads, restless, pages })
    }

    fn core(&self) -> String {
        format!("{DIR}/all/core.{}.{}", self.name, self.pid)
    }

    /// That gdb says the same of the core file.
    fn check_threads(&self, agent: &mut Channel, said: &str, dir: &std::path::Path) -> Result<String> {
        let mut more = Vec::new();
        let (registers, file);
        if self.name == "threads" {
            registers = "thread apply all info registers rax orig_rax".to_owned();
            let page =
                said.lines().find_map(|line| line.strip_prefix("file ")).context("threads.c is silent")?;
            file = format!("x/2xg {page}");
            more = vec!["-ex", &registers, "-ex", &file];
        }
        let core = self.core();
        more.extend([self.program, &core]);
        let (found, text) = gdb(agent, &more)?;
        std::fs::write(dir.join(format!("gdb-{}.txt", self.name)), &text)?;
        let lines = |threads: &Threads| -> Vec<String> {
            threads
                .iter()
                .flat_map(|(tid, lines)| lines.iter().map(move |line| format!("{tid}: {line}")))
                .collect()
        };
        std::fs::write(dir.join(format!("live-{}.txt", self.name)), lines(&self.threads).join("\n"))?;
        for trouble in ["may not match", "Cannot access memory", "Couldn't find", "not available"] {
            ensure!(!text.contains(trouble), "gdb says `{trouble}` ({})", dir.display());
        }
        let tids = |threads: &Threads| threads.keys().copied().collect::<Vec<_>>();
        ensure!(
            tids(&self.threads) == tids(&found),
            "threads {:?} became {:?}",
            tids(&self.threads),
            tids(&found)
        );
        for (tid, live) in &self.threads {
            let dead = found.get(tid).context("a thread is missing")?;
            if Some(*tid) == self.restless {
                ensure!(functions(live) == functions(dead), "thread {tid}: {live:?} became {dead:?}");
                continue;
            }
            for (n, line) in live.iter().enumerate() {
                let now = dead.get(n).map_or("nothing", String::as_str);
                ensure!(line == now, "thread {tid}:\n  {line}\nbecame\n  {now}");
            }
        }
        if self.name == "threads" {
            check_known(said, &found, &text)?;
        }
        let frames: usize = found.values().map(|lines| functions(lines).len()).sum();
        Ok(format!("{} threads, {frames} frames", found.len()))
    }

    /// That the memory is the same, and that nothing is said to be missing.
    fn check_memory(&self, agent: &mut Channel, rows: &serde_json::Value) -> Result<String> {
        let mut all = rows.as_array().into_iter().flatten();
        let row = all.find(|row| row["pid"] == self.pid).context("otherworld core does not list it")?;
        ensure!(row["missing"] == serde_json::json!([]), "missing: {}", row["missing"]);
        ensure!(row["doubts"] == serde_json::json!([]), "in doubt: {}", row["doubts"]);
        ensure!(
            row["threads"] == self.threads.len(),
            "{} threads became {}",
            self.threads.len(),
            row["threads"]
        );
        let counts = oracle(agent, &format!("compare {} {DIR} {}", self.pid, self.core()))?;
        let found: BTreeMap<String, u64> =
            serde_json::from_str(counts.trim()).context("the oracle's answer")?;
        let memory = found.get("memory").copied().unwrap_or(0);
        ensure!(memory == self.pages, "{memory} of {} pages were compared", self.pages);
        Ok(format!(
            "{memory} pages the same, as are {} of files that nobody had touched",
            found.get("file").unwrap_or(&0)
        ))
    }
}

const SIGSTOP: i32 = 19;

/// The TID of a thread of the C program.
fn tid_of(said: &str, name: &str) -> Result<i32> {
    let line =
        said.lines().find_map(|line| line.strip_prefix("thread ")?.strip_prefix(name)?.trim().parse().ok());
    line.with_context(|| format!("threads.c does not name its thread {name}"))
}

/// What is known of the C program without gdb's having looked at it before.
fn check_known(said: &str, found: &Threads, text: &str) -> Result<()> {
    for (name, chain) in CHAINS {
        let lines = found.get(&tid_of(said, name)?).with_context(|| format!("no thread {name}"))?;
        let functions = functions(lines);
        let is_there = functions.windows(chain.len()).any(|part| part == *chain);
        ensure!(is_there, "the thread {name} is in {functions:?}");
    }
    let lines = found.get(&tid_of(said, "registers")?).context("no thread registers")?;
    let of = |name: &str| {
        let line = lines.iter().find(|line| line.split_whitespace().next() == Some(name));
        line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default()
    };
    ensure!(
        [of("rax"), of("orig_rax")] == IN_PAUSE,
        "in pause(2): rax {}, orig_rax {}",
        of("rax"),
        of("orig_rax")
    );
    ensure!(of("r12") == "0x1111222233334444", "r12 is {}", of("r12"));
    // A page that only the file has: gdb finds it there. Its words are those that threads.c has written.
    let word = |n: u64| format!("0x{:016x}", (16_u64 << 32) + (9 * 512 + n) * 0x9e37_79b1);
    let words = format!("{}\t{}", word(0), word(1));
    if !text.contains(&words) {
        bail!("the page that only a file has: {words} is not what gdb finds");
    }
    Ok(())
}
