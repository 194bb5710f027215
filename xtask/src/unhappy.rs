//! `cargo xtask unhappy`: what goes wrong on a machine, on purpose.
//!
//! Each case breaks one thing in a guest and looks whether it is named, within bounded time, and whether nothing else is lost. What
//! can go wrong with a dead kernel's memory is tested without guests, in `crates/autopsy/tests` and `crates/otherworld/tests`.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use lab::image::DEMO_UID;
use lab::{Guest, Key, Lab, Line, MachineConfig, Panic, Program, Series, Snapshot};
use serde_json::Value;

use crate::crash::{self, Quiet};
use crate::crash_runs::Tally;
use crate::guest::{self, AGENT_COMMAND, Installation};
use crate::{Global, build, ui};

const COMMAND_DEADLINE: Duration = Duration::from_secs(120);
/// From the panic to the end of a crash kernel that has to give up within seconds.
const END_DEADLINE: Duration = Duration::from_secs(180);
const LATEST: &str = "/var/lib/otherworld/reports/latest.json";
/// All that `arm` may change outside of files.
const STATE: &str = "sysctl -a 2>/dev/null | grep -E '^kernel\\.(panic|panic_on_[a-z_]*|[a-z_]*_panic)( |$)' | sort; \
                     cat /sys/kernel/kexec_crash_loaded /sys/kernel/kexec_loaded; cat /var/lib/otherworld/armed.json 2>&1 | md5sum";

/// Breaks one thing at a time and looks whether it is named and nothing else is lost. One line per case; the last line is
/// "N passed, N failed".
#[derive(Debug, Args)]
pub struct Unhappy {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// Only the cases whose name contains one of these words.
    names: Vec<String>,
}

/// Something that goes wrong.
struct Case {
    name: &'static str,
    /// What must happen.
    expected: &'static str,
    /// Returns what was seen; an error if that is something else.
    run: fn(&Setting) -> Result<String>,
}

const CASES: &[Case] = &[
    Case {
        name: "no-crashkernel",
        expected: "`arm` exits with 3, names the cause and the remedy, changes nothing",
        run: no_crashkernel,
    },
    Case {
        name: "kexec-forbidden",
        expected: "`arm` exits with 3 and changes nothing; a crash kernel that is loaded stays",
        run: kexec_forbidden,
    },
    Case {
        name: "kexec-refused",
        expected: "the kernel refuses an image: `arm` exits with 1, the former crash kernel stays and still works",
        run: kexec_refused,
    },
    Case {
        name: "bad-configuration",
        expected: "`arm` exits with 2, names the line, changes nothing",
        run: bad_configuration,
    },
    Case {
        name: "no-root-device",
        expected: "the panic is told on the console, the device is named, the machine reboots in time",
        run: no_root_device,
    },
    Case {
        name: "deleted-file",
        expected: "a file that lost the name by which it was opened, and has another one: its process is given up and says so; the others live",
        run: deleted_file,
    },
    Case {
        name: "replaced-file",
        expected: "its process does not come back, the other file is not written to, the others live",
        run: replaced_file,
    },
    Case {
        name: "procedure-fails",
        expected: "a crash procedure that crashes, and one that does not return: configured to go on, they do, and the report says so",
        run: procedure_fails,
    },
    Case {
        name: "worker-dies",
        expected: "the report is on the disk, nothing half-built runs, the configured action is taken",
        run: worker_dies,
    },
    Case {
        name: "worker-hangs",
        expected: "it is ended at its deadline; the report is on the disk, nothing half-built runs",
        run: worker_hangs,
    },
    Case {
        name: "reboot",
        expected: "nobody comes back: the machine reboots, boots as usual and has the report and the kernel's pages",
        run: reboot,
    },
];

/// Where a case plays.
struct Setting<'a> {
    lab: &'a Lab,
    config: MachineConfig,
    /// Otherworld is installed, not armed.
    installed: Snapshot,
    name: String,
}

impl Unhappy {
    /// All cases on one kernel, as part of the tests.
    pub fn new(kernel: Series) -> Self {
        Self { kernel: Some(kernel), names: Vec::new() }
    }

    /// Runs it; whether all went as it must.
    pub fn run(self, global: &Global) -> Result<bool> {
        Ok(self.count(global)?.close())
    }

    /// Runs it and counts.
    pub fn count(self, global: &Global) -> Result<Tally> {
        let chosen = |case: &&Case| {
            self.names.is_empty() || self.names.iter().any(|name| case.name.contains(name.as_str()))
        };
        let cases: Vec<&Case> = CASES.iter().filter(chosen).collect();
        if cases.is_empty() {
            bail!("no case's name contains {}", self.names.join(" or "));
        }
        let lab = global.lab()?;
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            // The second disk's check is where the cases get a word in while the crash kernel works.
            let config = MachineConfig::new(series, global.accel());
            let installed = installed(&lab, &lab.booted(&config)?, series)?;
            for case in &cases {
                ui::note(&format!("{} on kernel {series}", case.name));
                let name = format!("unhappy-{series}-{}", case.name);
                let setting =
                    Setting { lab: &lab, config: config.clone(), installed: installed.clone(), name };
                let (word, tell, seen): (_, fn(String), _) = match (case.run)(&setting) {
                    Ok(seen) => {
                        tally.passed += 1;
                        ("ok", ui::line, seen)
                    }
                    Err(error) => {
                        tally.failed += 1;
                        let dir = lab.cache().join("runs").join(&setting.name);
                        // A run that failed is kept for whoever wants to know why.
                        let _ = fs::write(dir.join("keep"), "");
                        ("FAILED", ui::failure, format!("{error:#} (artifacts: {})", dir.display()))
                    }
                };
                tell(format!(
                    "kernel {series:<5} {:<18} {word:<7} expected: {}; seen: {seen}",
                    case.name, case.expected
                ));
            }
        }
        Ok(tally)
    }
}

/// A layer with the current binaries installed and nothing armed.
fn installed(lab: &Lab, parent: &Snapshot, series: Series) -> Result<Snapshot> {
    let binaries = build::static_binaries()?;
    let mut inputs = Key::new("unhappy");
    for file in binaries.survivors.iter().chain([&binaries.otherworld]) {
        inputs = inputs.with_bytes(&fs::read(file)?);
    }
    let installation = Installation::default();
    let snapshot = lab.derive(parent, "installed", &inputs, |agent, _| {
        lab.note("installing otherworld (once per build)");
        guest::install(lab, agent, series, &installation)
            .map_err(|error| lab::Error::Guest(format!("{error:#}")))
    });
    snapshot.context("installing failed")
}

/// How a command in a guest ended.
struct Ended {
    code: Option<i32>,
    /// Both streams.
    words: String,
}

impl Ended {
    /// It must have exited with `code` and said all of `parts`.
    fn must(&self, code: i32, parts: &[&str]) -> Result<()> {
        ensure!(
            self.code == Some(code),
            "exit code {:?} instead of {code}: {}",
            self.code,
            self.words.trim()
        );
        for part in parts {
            ensure!(self.words.contains(part), "it does not say \"{part}\": {}", self.words.trim());
        }
        Ok(())
    }

    fn first_line(&self) -> &str {
        self.words.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim()
    }
}

fn otherworld(guest: &mut Guest, arguments: &str) -> Result<Ended> {
    let exit =
        guest.agent.exec(&Program::shell(&format!("otherworld {arguments} 2>&1")), COMMAND_DEADLINE)?;
    ensure!(!exit.timed_out, "`otherworld {arguments}` did not end within {} s", COMMAND_DEADLINE.as_secs());
    Ok(Ended { code: exit.code, words: String::from_utf8_lossy(&exit.stdout).into_owned() })
}

fn state(guest: &mut Guest) -> Result<String> {
    Ok(guest.agent.shell(STATE, COMMAND_DEADLINE)?)
}

fn configure(guest: &mut Guest, text: &str) -> Result<()> {
    Ok(guest.agent.write_file("/etc/otherworld.toml", 0o644, text.as_bytes())?)
}

fn arm(guest: &mut Guest, config: &str) -> Result<()> {
    configure(guest, config)?;
    otherworld(guest, "arm")?.must(0, &["armed"])
}

/// A configuration that selects the unprivileged user's processes and has the agent started.
fn select_demo(more: &str) -> String {
    format!("[[select]]\nuser = \"demo\"\n[after]\nstart = [\"{AGENT_COMMAND}\"]\n{more}")
}

/// Counts in a file, ten times a second, after `before`; ends if a number cannot be written.
fn counter(guest: &mut Guest, name: &str, before: &str) -> Result<i32> {
    let script = format!(
        "import os, time\n{before}\nout = open('/home/demo/{name}.count', 'w')\nn = 0\n\
         while True:\n    n += 1\n    out.write(f'{{n}}\\n')\n    out.flush()\n    time.sleep(0.1)\n"
    );
    let program =
        Program::new(["python3", "-c", &script]).uid(DEMO_UID).stderr(format!("/home/demo/{name}.err"));
    let pid = guest.agent.spawn(&program)?;
    let ready = format!(
        "for i in $(seq 300); do test -s /home/demo/{name}.count && exit 0; sleep 0.1; done; cat /home/demo/{name}.err; exit 1"
    );
    guest.agent.shell(&ready, COMMAND_DEADLINE)?;
    Ok(pid)
}

/// The counter is the process it was, has left out no number, and goes on counting.
fn still_counts(guest: &mut Guest, name: &str, pid: i32) -> Result<()> {
    let script = format!(
        "f=/home/demo/{name}.count; a=$(wc -l < $f); for i in $(seq 200); do b=$(wc -l < $f); test $b -gt $a && break; sleep 0.1; done; \
         test $b -gt $a || {{ echo stopped at $a; exit 1; }}; grep -q python3 /proc/{pid}/comm || {{ echo no such process; exit 1; }}; \
         head -n $b $f | awk '$1 != NR {{ print \"line \" NR \" is \" $0; exit 1 }}'"
    );
    guest.agent.shell(&script, COMMAND_DEADLINE).with_context(|| format!("process {pid} does not go on"))?;
    Ok(())
}

fn panic(guest: &mut Guest, alive: &[i32]) -> Result<Line> {
    let panic = Panic { alive: alive.to_vec(), ..Panic::default() };
    crash::crash(guest, &panic, &mut Quiet)?.context("a process had ended before the panic")
}

/// From the panic until the crash kernel's agent is there, whatever became of the resurrection; the report.
fn report_of(guest: &mut Guest) -> Result<Value> {
    let agent = guest.wait_crash_agent(END_DEADLINE);
    agent.with_context(|| format!("no agent in the crash kernel; its last words: {}", last_words(guest)))?;
    crash::fetch_report(guest)?;
    Ok(serde_json::from_str(&fs::read_to_string(guest.dir.join("report.json"))?)?)
}

fn last_words(guest: &Guest) -> String {
    let lines = guest.machine.console.lines(0);
    lines.iter().rev().take(3).rev().map(|line| line.text.as_str()).collect::<Vec<_>>().join(" / ")
}

/// What the report says of a process: its fate, and all reasons as one text.
fn fate(report: &Value, pid: i32) -> Result<(String, String)> {
    let process =
        report["processes"].as_array().and_then(|all| all.iter().find(|process| process["pid"] == pid));
    let process = process.with_context(|| format!("the report does not know process {pid}"))?;
    Ok((process["fate"].as_str().unwrap_or_default().to_owned(), process["reasons"].to_string()))
}

/// The report tells how the kernel died, with its log.
fn tells_the_panic(report: &Value) -> Result<()> {
    let panic = &report["panic"];
    ensure!(
        panic["message"].as_str().is_some_and(|text| text.contains("sysrq")),
        "no panic message: {}",
        panic["message"]
    );
    ensure!(panic["log"].as_array().is_some_and(|log| log.len() > 100), "no kernel log in the report");
    Ok(())
}

/// Nothing runs under this PID: at once, but for the time that a killed process needs to give its memory back.
fn is_gone(guest: &mut Guest, pid: i32) -> Result<()> {
    let left = guest.agent.wait(&[pid], Duration::from_secs(20))?;
    ensure!(left.is_empty(), "something is left of process {pid}");
    Ok(())
}

fn no_crashkernel(setting: &Setting) -> Result<String> {
    let config = MachineConfig { crashkernel_mib: 0, ..setting.config.clone() };
    let bare = installed(setting.lab, &setting.lab.booted(&config)?, config.series)?;
    let mut guest = setting.lab.start(&bare, &setting.name)?;
    let before = state(&mut guest)?;
    let ended = otherworld(&mut guest, "arm")?;
    ended.must(
        3,
        &["no memory is reserved for a crash kernel", "remedy:", "crashkernel=", "update-grub", "reboot"],
    )?;
    ensure!(state(&mut guest)? == before, "something has changed");
    otherworld(&mut guest, "status")?.must(3, &["not armed", "no memory is reserved"])?;
    guest
        .agent
        .shell("! test -e /var/lib/otherworld/crash-initramfs.img", COMMAND_DEADLINE)
        .context("an initramfs is left")?;
    Ok(format!("3, \"{}\"", ended.words.lines().nth(1).unwrap_or_default().trim()))
}

fn kexec_forbidden(setting: &Setting) -> Result<String> {
    const FORBID: &str = "sysctl -q kernel.kexec_load_disabled=1";
    let said = ["kernel.kexec_load_disabled", "remedy:", "reboot"];
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    guest.agent.shell(FORBID, COMMAND_DEADLINE)?;
    let before = state(&mut guest)?;
    otherworld(&mut guest, "arm")?.must(3, &said)?;
    ensure!(state(&mut guest)? == before, "the first `arm` has changed something");
    drop(guest);

    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    arm(&mut guest, &select_demo(""))?;
    guest.agent.shell(FORBID, COMMAND_DEADLINE)?;
    let before = state(&mut guest)?;
    let ended = otherworld(&mut guest, "arm")?;
    ended.must(3, &said)?;
    ensure!(state(&mut guest)? == before, "arming again has changed something");
    ensure!(loaded(&mut guest)?, "the crash kernel is no longer loaded");
    Ok(format!("3, \"{}\"; the former one is loaded", ended.words.lines().nth(1).unwrap_or_default().trim()))
}

fn loaded(guest: &mut Guest) -> Result<bool> {
    Ok(guest.agent.shell("cat /sys/kernel/kexec_crash_loaded", COMMAND_DEADLINE)?.trim() == "1")
}

fn kexec_refused(setting: &Setting) -> Result<String> {
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    arm(&mut guest, &select_demo(""))?;
    let pid = counter(&mut guest, "good", "")?;
    // The right name, and no kernel.
    guest.agent.write_file("/boot/no-kernel", 0o644, &[b'x'; 100_000])?;
    configure(&mut guest, &select_demo("[crash_kernel]\nimage = \"/boot/no-kernel\"\n"))?;
    let before = state(&mut guest)?;
    let ended = otherworld(&mut guest, "arm")?;
    ended.must(
        1,
        &["the kernel refused the crash kernel /boot/no-kernel", "not one that can be loaded", "still there"],
    )?;
    ensure!(state(&mut guest)? == before, "something has changed");
    let leftovers = "ls /var/lib/otherworld | grep fresh && exit 1; exit 0";
    guest.agent.shell(leftovers, COMMAND_DEADLINE).context("a half-made initramfs is left")?;
    // What is loaded is whole: it brings the process back.
    panic(&mut guest, &[pid])?;
    report_of(&mut guest)?;
    still_counts(&mut guest, "good", pid)?;
    Ok(format!("1, \"{}\"; after a panic the process lives", ended.first_line()))
}

fn bad_configuration(setting: &Setting) -> Result<String> {
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    configure(&mut guest, "mode = \"programs\"\n[deadlines]\nwhole = 0\n")?;
    let before = state(&mut guest)?;
    let ended = otherworld(&mut guest, "arm")?;
    ended.must(2, &["/etc/otherworld.toml, line 3", "whole"])?;
    configure(&mut guest, "mode = \"programs\"\n[failure]\naktion = \"reboot\"\n")?;
    otherworld(&mut guest, "arm")?.must(2, &["/etc/otherworld.toml, line 3", "aktion"])?;
    ensure!(state(&mut guest)? == before, "something has changed");
    Ok(format!("2, \"{}\"", ended.first_line()))
}

fn no_root_device(setting: &Setting) -> Result<String> {
    const PATIENCE: u64 = 5;
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    // The crash kernel refuses the driver of the disk.
    let config = format!(
        "[deadlines]\nroot_device = {PATIENCE}\n[failure]\ndelay = 1\n[crash_kernel]\nextra_cmdline = \"module_blacklist=virtio_blk\"\n"
    );
    arm(&mut guest, &select_demo(&config))?;
    let line = panic(&mut guest, &[])?;
    let console = guest.machine.console.clone();
    // QEMU ends instead of rebooting.
    guest.machine.wait_exit(END_DEADLINE).context("the machine does not reboot")?;
    let text: Vec<Line> = console.lines(0).into_iter().skip_while(|l| *l != line).collect();
    let find = |part: &str| {
        let found = text.iter().find(|l| l.text.contains("otherworld: ") && l.text.contains(part));
        found.with_context(|| format!("the console does not say \"{part}\""))
    };
    // By the guest's clock: how long a line takes to the host says nothing.
    let mark = |name: &str| -> Result<u64> {
        let text = &find(name)?.text;
        let ms = text.rsplit(name).next().and_then(|rest| rest.split_whitespace().next());
        ms.and_then(|ms| ms.parse().ok()).with_context(|| format!("no time in \"{text}\""))
    };
    let (start, failed) = (mark("mark init ")?, mark("mark failed ")?);
    let why = find("the root device vda (ext4")?;
    find("did not appear; there is: no block device at all")?;
    find("died: sysrq triggered crash").or_else(|_| find("died: "))?;
    find("sysrq")?;
    find("rebooting")?;
    let took = failed.saturating_sub(start);
    ensure!(took >= PATIENCE * 1000, "gave up after {took} ms instead of {PATIENCE} s");
    ensure!(took < (PATIENCE + 40) * 1000, "gave up after {took} ms, {PATIENCE} s were configured");
    Ok(format!(
        "\"{}\" after {took} ms, then a reboot",
        why.text.split("otherworld: ").nth(1).unwrap_or_default()
    ))
}

fn deleted_file(setting: &Setting) -> Result<String> {
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    arm(&mut guest, &select_demo(""))?;
    let good = counter(&mut guest, "good", "")?;
    let bad = counter(
        &mut guest,
        "bad",
        "f = open('/home/demo/gone', 'wb'); f.write(b'x' * 65536); f.flush(); os.fsync(f.fileno())\n\
         os.link('/home/demo/gone', '/home/demo/other'); os.unlink('/home/demo/gone')",
    )?;
    panic(&mut guest, &[good, bad])?;
    let report = report_of(&mut guest)?;
    tells_the_panic(&report)?;
    let (word, reasons) = fate(&report, bad)?;
    ensure!(
        word == "given-up" && reasons.contains("deleted-file") && reasons.contains("/home/demo/gone"),
        "its fate: {word} {reasons}"
    );
    is_gone(&mut guest, bad)?;
    still_counts(&mut guest, "good", good)?;
    ensure!(report["state"] == "partial", "the report's state is {}", report["state"]);
    Ok(format!("{word} {reasons}; the other counts on"))
}

fn replaced_file(setting: &Setting) -> Result<String> {
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    arm(&mut guest, &select_demo(""))?;
    // Until the panic, nothing of the renaming reaches the disk.
    guest.agent.shell("mount -o remount,commit=600 /", COMMAND_DEADLINE)?;
    let good = counter(&mut guest, "good", "")?;
    let hold = "open('/home/demo/name', 'w').write('another file\\n')\nf = open('/home/demo/new', 'w'); f.write('mine\\n'); f.flush()";
    let bad = counter(&mut guest, "bad", hold)?;
    // Its fsync would commit everything.
    guest.agent.shell("systemctl kill -s STOP systemd-journald.service", COMMAND_DEADLINE)?;
    guest.agent.sync()?;
    // As if long ago: names that were changed lately would be put right.
    let rename = "mv /home/demo/new /home/demo/name && date -s '+10 minutes'";
    guest.agent.shell(rename, COMMAND_DEADLINE)?;
    panic(&mut guest, &[good, bad])?;
    let report = report_of(&mut guest)?;
    let (word, reasons) = fate(&report, bad)?;
    ensure!(
        matches!(word.as_str(), "given-up" | "failed")
            && reasons.contains("/home/demo/name")
            && reasons.contains("was replaced meanwhile"),
        "its fate: {word} {reasons}"
    );
    is_gone(&mut guest, bad)?;
    let contents = guest.agent.read_file("/home/demo/name")?;
    ensure!(
        contents == b"another file\n",
        "the other file has been written to: {}",
        String::from_utf8_lossy(&contents)
    );
    still_counts(&mut guest, "good", good)?;
    Ok(format!("{word} {reasons}; the other file is whole, the other process counts on"))
}

fn procedure_fails(setting: &Setting) -> Result<String> {
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    let mut pids = Vec::new();
    for how in ["crash", "forever"] {
        let log = format!("/home/demo/{how}.log");
        let program = Program::new([crate::survive::PROGRAM, "crashproc-child", how, &log]).uid(DEMO_UID);
        pids.push(guest.agent.spawn(&program)?);
        let ready = format!(
            "for i in $(seq 300); do test -e /home/demo/{how}.ready && exit 0; sleep 0.1; done; exit 1"
        );
        guest.agent.shell(&ready, COMMAND_DEADLINE)?;
    }
    // The top level of the file comes first.
    arm(&mut guest, &format!("failed_procedure = \"continue\"\n{}", select_demo("")))?;
    panic(&mut guest, &pids)?;
    let report = report_of(&mut guest)?;
    let mut seen = Vec::new();
    for pid in pids {
        let (word, reasons) = fate(&report, pid)?;
        ensure!(
            word == "resurrected-with-losses" && reasons.contains("its crash procedure ran for"),
            "the report says of {pid}: {word} {reasons}"
        );
        // It sleeps for an hour, as before: in the system call that it was in, issued again.
        let state = guest.agent.shell(&format!("grep ^State: /proc/{pid}/status"), COMMAND_DEADLINE)?;
        ensure!(state.contains("sleeping"), "{pid} does not sleep: {state}");
        seen.push(reasons);
    }
    Ok(seen.join("; "))
}

/// Has `script` run in the crash kernel's root file system while the worker waits for its mounts, then panics. `$worker` is the
/// worker's PID.
///
/// The way in is the check of the second disk, which PID 1 makes before it lets the worker go on.
fn meddle(guest: &mut Guest, config: &str, script: &str, alive: &[i32]) -> Result<Line> {
    guest.agent.shell("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt", COMMAND_DEADLINE)?;
    arm(guest, config)?;
    let script = format!(
        "#!/bin/sh\nexec > /root/meddled 2>&1\nworker=$(pgrep -f resurrect-worker | head -n 1)\necho worker $worker\n{script}\nexit 0\n"
    );
    guest.agent.write_file("/sbin/fsck.ext4", 0o755, script.as_bytes())?;
    guest.agent.sync()?;
    panic(guest, alive)
}

/// Both of the worker's ends: what must hold afterwards.
fn worker_ended(guest: &mut Guest, pids: &[i32], why: &str) -> Result<String> {
    let report = report_of(guest)?;
    tells_the_panic(&report)?;
    ensure!(report["state"] == "failed", "the report's state is {}", report["state"]);
    let failures = report["failures"].to_string();
    ensure!(failures.contains(why), "the report does not say \"{why}\": {failures}");
    let meddled = guest.agent.read_file("/root/meddled")?;
    let meddled = String::from_utf8_lossy(&meddled).into_owned();
    ensure!(meddled.contains("done"), "the worker was not meddled with: {meddled}");
    for pid in pids {
        let (word, reasons) = fate(&report, *pid)?;
        ensure!(
            word == "failed" && reasons.contains("aborted"),
            "the report says of {pid}: {word} {reasons}"
        );
        is_gone(guest, *pid)?;
    }
    guest.agent.shell("! pgrep -f '[r]esurrect-worker'", COMMAND_DEADLINE).context("the worker is left")?;
    Ok(failures)
}

const CONTINUE: &str = "[failure]\naction = \"continue\"\ndelay = 1\n";

fn worker_dies(setting: &Setting) -> Result<String> {
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    let small = counter(&mut guest, "small", "")?;
    // Large enough that its memory is still being poured when it is there.
    let large = counter(&mut guest, "large", "data = os.urandom(100 << 20)")?;
    let script = format!(
        "(while ! test -d /proc/{large}; do test -d /proc/$worker || exit; done; echo done; kill -9 $worker; sync) < /dev/null &"
    );
    meddle(&mut guest, &select_demo(CONTINUE), &script, &[small, large])?;
    let failures = worker_ended(&mut guest, &[small, large], "the worker died")?;
    Ok(format!("{failures}; nobody is left, `continue` was done"))
}

fn worker_hangs(setting: &Setting) -> Result<String> {
    const PATIENCE: u64 = 4;
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    let pid = counter(&mut guest, "small", "")?;
    let config = format!("[deadlines]\nresurrect = {PATIENCE}\n{CONTINUE}");
    meddle(&mut guest, &select_demo(&config), "kill -STOP $worker && echo done", &[pid])?;
    let began = Instant::now();
    let failures = worker_ended(&mut guest, &[pid], "no answer within")?;
    ensure!(began.elapsed() < END_DEADLINE, "it took {:?}", began.elapsed());
    Ok(format!("{failures}; nobody is left, `continue` was done"))
}

fn reboot(setting: &Setting) -> Result<String> {
    let mut guest = setting.lab.start(&setting.installed, &setting.name)?;
    // Nobody is selected: there is nothing to stay for.
    arm(&mut guest, "[failure]\naction = \"reboot\"\ndelay = 1\n")?;
    panic(&mut guest, &[])?;
    guest.machine.wait_exit(END_DEADLINE).context("the machine does not reboot")?;
    let mut guest = setting.lab.boot_again(guest, &setting.installed)?;
    let hello = guest.agent.ping(COMMAND_DEADLINE)?;
    ensure!(!hello.crash_kernel, "it is the crash kernel that has booted");
    // A unit of the distribution's that fails is not what this is about; one of ours is.
    let running = "state=$(systemctl is-system-running --wait); failed=$(systemctl --failed --plain --no-legend); echo $state $failed; \
                   case $state in running) ;; degraded) ! echo \"$failed\" | grep -E 'otherworld|lab-agent|local-fs|fsck|\\.mount' ;; *) exit 1 ;; esac";
    let running =
        guest.agent.shell(running, COMMAND_DEADLINE).context("the machine does not run as usual")?;
    crash::fetch_report(&mut guest)?;
    let report: Value = serde_json::from_str(&fs::read_to_string(guest.dir.join("report.json"))?)?;
    tells_the_panic(&report)?;
    ensure!(report["state"] == "failed", "the report's state is {}", report["state"]);
    otherworld(&mut guest, "report")?.must(0, &["Panic     sysrq", "Trouble   ", "Vmcore    "])?;
    let vmcore = report["vmcore"].as_str().context("the kernel's pages were not kept")?;
    otherworld(&mut guest, &format!("inspect ps --core {vmcore}"))?
        .must(0, &["systemd", "systemd-journal"])?;
    let size = guest.agent.shell(&format!("du -m {vmcore} | cut -f1"), COMMAND_DEADLINE)?;
    otherworld(&mut guest, "status")?.must(3, &["not armed"])?;
    guest.agent.shell(&format!("test -s {LATEST}"), COMMAND_DEADLINE)?;
    Ok(format!(
        "booted again ({}), `report` shows the panic, `status` says not armed, {} MiB of the kernel's pages",
        running.trim(),
        size.trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_held_against_what_it_must_be() {
        let ended = Ended { code: Some(3), words: "otherworld: no memory\n".into() };
        ended.must(3, &["no memory"]).unwrap();
        assert!(ended.must(1, &[]).is_err());
        assert!(ended.must(3, &["remedy"]).is_err());
    }

    #[test]
    fn names_are_unique_and_fates_are_found() {
        let mut names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CASES.len());
        let report = serde_json::json!({ "processes": [{ "pid": 7, "fate": "given-up", "reasons": [{ "text": "x" }] }] });
        assert_eq!(fate(&report, 7).unwrap().0, "given-up");
        assert!(fate(&report, 8).is_err());
    }
}
