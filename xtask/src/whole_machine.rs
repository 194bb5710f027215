//! `cargo xtask whole-machine`: every process of a Debian with systemd, PID 1 included, through panics at random moments.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use lab::{Channel, Key, Lab, MachineConfig, Panic, Series, Snapshot};

use crate::crash_runs::Tally;
use crate::guest::{self, AGENT_COMMAND, Installation};
use crate::survive::claims_after;
use crate::{Global, ui};

/// When the panic comes after the guest has gone on, in microseconds.
const MOMENTS_US: std::ops::Range<u64> = 200_000..4_000_000;
const SET_UP_DEADLINE: Duration = Duration::from_secs(240);
const STEP_DEADLINE: Duration = Duration::from_secs(90);
/// The lab's own agent is started anew under the crash kernel, and with it what it runs.
const AGENT: &str = "/usr/local/lib/lab/agent";

/// Takes a whole Debian with systemd through panics: PID 1, journald, udevd, dbus, logind, a getty with a logged-in shell. A row per question
/// and panic; the last line is "N passed, N failed".
#[derive(Debug, Args)]
pub struct WholeMachine {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many panics on each.
    #[arg(long, default_value_t = 1)]
    crashes: u32,
    /// Draws the moments; a random one, which is printed, if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// PID 1 and logind are left out: what asks for them must fail (to see that it can).
    #[arg(long)]
    damage: bool,
}

/// A question about the machine.
struct Question {
    name: &'static str,
    /// What it says before the panic, for comparison.
    look: fn(&mut Channel) -> Result<String>,
    /// That it is as before.
    check: fn(&mut Channel, &str) -> Result<()>,
    /// Has to fail with `--damage`.
    needs_system: bool,
}

const QUESTIONS: &[Question] = &[
    Question {
        name: "processes",
        look: processes,
        check: |a, was| same(was, &processes(a)?),
        needs_system: true,
    },
    Question {
        name: "is-system-running",
        look: running,
        check: |a, was| same(was, &running(a)?),
        needs_system: true,
    },
    Question {
        name: "failed units",
        look: failed_units,
        check: |a, was| same(was, &failed_units(a)?),
        needs_system: true,
    },
    Question {
        name: "active units",
        look: active_units,
        check: |a, was| same(was, &active_units(a)?),
        needs_system: true,
    },
    Question { name: "systemd runs a job", look: nothing, check: |a, _| job(a), needs_system: true },
    Question { name: "journald logs", look: nothing, check: |a, _| journal(a), needs_system: false },
    Question { name: "udevd answers", look: nothing, check: |a, _| udev(a), needs_system: false },
    Question { name: "dbus answers", look: names, check: |a, was| same(was, &names(a)?), needs_system: true },
    Question {
        name: "logind's sessions",
        look: sessions,
        check: |a, was| same(was, &sessions(a)?),
        needs_system: true,
    },
    Question { name: "mounts", look: mounts, check: |a, was| same(was, &mounts(a)?), needs_system: false },
    Question {
        name: "swap areas",
        look: swap_areas,
        check: |a, was| same(was, &swap_areas(a)?),
        needs_system: false,
    },
    Question {
        name: "files of /run",
        look: files_of_run,
        check: |a, was| same(was, &files_of_run(a)?),
        needs_system: true,
    },
    Question { name: "a logged-in shell", look: shell_on_console, check: shell_goes_on, needs_system: false },
];

impl WholeMachine {
    /// A single panic on one kernel, as part of the tests.
    pub fn new(kernel: Series) -> Self {
        Self { kernel: Some(kernel), crashes: 1, seed: None, damage: false }
    }

    /// Runs it; whether everything was as before.
    pub fn run(self, global: &Global) -> Result<bool> {
        Ok(self.count(global)?.close())
    }

    /// Runs it and counts.
    pub fn count(&self, global: &Global) -> Result<Tally> {
        let lab = global.lab()?;
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let mut draw = fastrand::Rng::with_seed(seed);
        let mut sum = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            let config = MachineConfig::new(series, global.accel());
            let ready = with_console(&lab, &config)?;
            let armed = guest::armed(&lab, &ready, &self.installation())?;
            for n in 1..=self.crashes {
                ui::line(format!("kernel {series}, panic {n} of {}, seed {seed}", self.crashes));
                let tally = self
                    .once(&lab, &armed, &format!("whole-{series}-{n}"), &mut draw)
                    .with_context(|| format!("the whole machine on kernel {series}"))?;
                sum.add(tally);
            }
        }
        Ok(sum)
    }

    fn installation(&self) -> Installation {
        let left_out = match self.damage {
            true => "[[never]]\npid = 1\n\n[[never]]\nunit = \"systemd-logind.service\"\n\n",
            false => "",
        };
        let config = format!(
            "mode = \"all\"\n\n[[never]]\nexe = \"{AGENT}\"\n\n{left_out}[after]\nstart = [\"{AGENT_COMMAND}\"]\n"
        );
        Installation { config, saver: true, memory: true, ..Installation::default() }
    }

    fn once(&self, lab: &Lab, armed: &Snapshot, name: &str, draw: &mut fastrand::Rng) -> Result<Tally> {
        let mut guest = lab.start(armed, name)?;
        guest::seed(&mut guest, draw.u64(..))?;
        let looks: Vec<String> = QUESTIONS
            .iter()
            .map(|question| {
                (question.look)(&mut guest.agent).with_context(|| format!("look at {}", question.name))
            })
            .collect::<Result<_>>()?;
        let cpu = draw.usize(..armed.config.cpus as usize);
        let panic = Panic { after_us: draw.u64(MOMENTS_US), cpu: Some(cpu), alive: Vec::new() };
        let claims = claims_after(&mut guest, &panic).inspect_err(|_| _ = guest.keep_artifacts())?;
        let mut tally = Tally::default();
        let mut table = String::new();
        for (question, look) in QUESTIONS.iter().zip(&looks) {
            ui::note(&format!("asking: {}", question.name));
            let trouble = (question.check)(&mut guest.agent, look).err();
            let good = trouble.is_some() == (self.damage && question.needs_system);
            let got = if good { "ok" } else { "FAILED" };
            let row = format!(
                "  {:20} {got:7} {}",
                question.name,
                trouble.map_or(String::new(), |e| format!("{e:#}"))
            );
            table.push_str(&format!("{row}\n"));
            if good {
                tally.passed += 1;
                ui::line(row);
            } else {
                tally.failed += 1;
                ui::failure(row);
            }
        }
        let lost: Vec<String> = claims
            .iter()
            .filter(|(_, claim)| !claim.lives())
            .map(|(pid, claim)| format!("{pid}: {claim}"))
            .collect();
        table.push_str(&format!("{}\n", lost.join("\n")));
        fs::write(guest.dir.join("table.txt"), table)?;
        if tally.failed > 0 {
            guest.keep_artifacts()?;
            ui::line(format!("artifacts: {}", guest.dir.display()));
        }
        Ok(tally)
    }
}

/// A guest with somebody logged in at the first virtual console.
fn with_console(lab: &Lab, config: &MachineConfig) -> Result<Snapshot> {
    let booted = lab.booted(config)?;
    let inputs = Key::new("whole-machine").with(SET_UP);
    let snapshot = lab.derive(&booted, "console", &inputs, |agent, _| {
        lab.note("logging in at the console (once)");
        agent.shell(SET_UP, SET_UP_DEADLINE).map(drop)
    });
    snapshot.context("logging in at the console")
}

/// The prompt says that the shell has begun.
const SET_UP: &str = r#"
set -e
systemctl unmask getty@tty1.service
mkdir -p /etc/systemd/system/getty@tty1.service.d
printf '[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear %%I linux\n' > /etc/systemd/system/getty@tty1.service.d/login.conf
systemctl daemon-reload
systemctl start getty@tty1.service
for i in $(seq 600); do
    pgrep -t tty1 bash && break
    sleep 0.2
done
pgrep -t tty1 bash
systemctl is-system-running --wait || true
for i in $(seq 600); do
    [ -z "$(systemctl list-jobs --no-legend)" ] && break
    sleep 0.2
done
"#;

fn ask(agent: &mut Channel, script: &str) -> Result<String> {
    agent.shell(script, STEP_DEADLINE).with_context(|| format!("`{script}`"))
}

fn same(before: &str, after: &str) -> Result<()> {
    let (was, is): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    let gone = was.iter().filter(|line| !is.contains(line)).map(|line| format!("-{line}"));
    let new = is.iter().filter(|line| !was.contains(line)).map(|line| format!("+{line}"));
    let differences: Vec<String> = gone.chain(new).collect();
    ensure!(differences.is_empty(), "{}", differences.join(" "));
    Ok(())
}

fn nothing(_: &mut Channel) -> Result<String> {
    Ok(String::new())
}

/// PIDs and names of everybody but the agent's own and the kernel's.
fn processes(agent: &mut Channel) -> Result<String> {
    ask(
        agent,
        "ps -e -o pid=,ppid=,sid=,tty=,comm=,cgroup= | grep -v -e lab-agent -e udev-worker | awk '$NF ~ /0::\\/./' | sort -n",
    )
}

fn running(agent: &mut Channel) -> Result<String> {
    ask(agent, "systemctl is-system-running || true")
}

fn failed_units(agent: &mut Channel) -> Result<String> {
    ask(agent, "systemctl list-units --failed --plain --no-legend")
}

fn active_units(agent: &mut Channel) -> Result<String> {
    ask(agent, "systemctl list-units --state=active --plain --no-legend | awk '{print $1, $3, $4}' | sort")
}

fn job(agent: &mut Channel) -> Result<()> {
    let said = ask(agent, "systemd-run --quiet --pipe --wait --collect /bin/echo done")?;
    same("done", said.trim())
}

fn journal(agent: &mut Channel) -> Result<()> {
    let said = ask(
        agent,
        "logger -t otherworld-lab 'still here'; journalctl --sync; journalctl -t otherworld-lab -n 1 -o cat --no-pager",
    )?;
    same("still here", said.trim())
}

fn udev(agent: &mut Channel) -> Result<()> {
    let asked = ask(
        agent,
        "udevadm control --ping --timeout=60 && udevadm trigger --action=change --settle /sys/class/mem/null",
    );
    // What it does instead.
    asked.map(drop).map_err(|error| {
        let state = "journalctl -u systemd-udevd -n 20 -o cat --no-pager; \
                     for pid in $(pgrep udev); do echo $pid $(cat /proc/$pid/comm /proc/$pid/wchan /proc/$pid/syscall); ls -l /proc/$pid/fd; done";
        error.context(ask(agent, state).unwrap_or_default())
    })
}

fn names(agent: &mut Channel) -> Result<String> {
    ask(agent, "busctl list --no-legend | awk '$1 !~ /^:/ && $2 != \"-\" {print $1, $2}' | sort")
}

fn sessions(agent: &mut Channel) -> Result<String> {
    ask(
        agent,
        "loginctl list-sessions --no-legend | awk '{print $1, $2, $3}'; loginctl show-session -p Leader -p TTY -p Active $(loginctl list-sessions --no-legend | awk '{print $1; exit}')",
    )
}

/// Where which file systems are, and how.
fn mounts(agent: &mut Channel) -> Result<String> {
    ask(
        agent,
        "findmnt --noheadings --raw --list -o TARGET,FSTYPE,VFS-OPTIONS,PROPAGATION | sort; \
                for pid in $(pgrep -x systemd-udevd) $(pgrep -x systemd-logind); do nsenter -t $pid -m findmnt --noheadings --raw --list -o TARGET,FSTYPE,VFS-OPTIONS,PROPAGATION | sort; done",
    )
}

/// With their sizes and priorities; how much of them is used changes by itself.
fn swap_areas(agent: &mut Channel) -> Result<String> {
    let areas = ask(agent, "swapon --show=NAME,TYPE,SIZE,PRIO --noheadings --raw | sort")?;
    ensure!(areas.lines().count() == 2, "two areas are to be in use: {areas}");
    Ok(areas)
}

/// What is there besides sockets and the journal of the moment.
fn files_of_run(agent: &mut Channel) -> Result<String> {
    ask(
        agent,
        "find /run -xdev -printf '%p %y %m %u %g %l\\n' | grep -v -e /run/log -e /run/systemd/transient -e 'run-u[0-9]' -e /run/systemd/units -e /run/systemd/journal/ -e /run/udev/queue | sort",
    )
}

/// PID of the shell, and the screen.
fn shell_on_console(agent: &mut Channel) -> Result<String> {
    ask(
        agent,
        "pgrep -t tty1 bash; fold -w $(stty size < /dev/tty1 | cut -d' ' -f2) < /dev/vcs1 | grep -v '^ *$'",
    )
}

fn shell_goes_on(agent: &mut Channel, was: &str) -> Result<()> {
    same(was, &shell_on_console(agent)?)?;
    let pid = was.lines().next().unwrap_or_default().to_owned();
    ask(agent, "rm -f /root/answer")?;
    ask(
        agent,
        "python3 -c \"
import fcntl, termios
with open('/dev/tty1', 'rb', buffering=0) as tty:
    for byte in b'echo \\$\\$ \\$((6*7)) > /root/answer\\n':
        fcntl.ioctl(tty, termios.TIOCSTI, bytes([byte]))
\"",
    )?;
    let said = ask(
        agent,
        "for i in $(seq 300); do [ -s /root/answer ] && break; sleep 0.1; done; cat /root/answer",
    )?;
    same(&format!("{pid} 42"), said.trim())
}
