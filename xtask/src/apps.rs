//! `cargo xtask apps`: applications with crash procedures, and beside them the same ones without, through panics at random moments.
//!
//! All of them run side by side in one guest. The baseline is the same panic of the same guest without Otherworld: it reboots.

mod examples;
mod joe;
mod mariadb;
mod source;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use lab::{Channel, Key, Lab, MachineConfig, Panic, Series, Snapshot};

use crate::crash_runs::Tally;
use crate::guest::{self, AGENT_COMMAND, Installation, Processes};
use crate::in_guest::{Place, shell};
use crate::libotherworld::Library;
use crate::survive::{self, Claim};
use crate::{Global, build, crash, ui};

/// Where the applications' files are in the guest.
const DIR: &str = "/home/demo/apps";
const HERE: Place = Place(DIR);
/// What building them needs: a command or a file, and the Debian package that has it.
const TOOLS: &[(&str, &str)] = &[
    ("gcc", "gcc"),
    ("g++", "g++"),
    ("readelf", "binutils"),
    ("patch", "patch"),
    ("make", "make"),
    ("/usr/include/curses.h", "libncurses-dev"),
];
/// When the panic comes after the guest has gone on, in microseconds.
const MOMENTS_US: std::ops::Range<u64> = 200_000..4_000_000;
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

/// Applications with crash procedures through panics: JOE, MariaDB, and the examples of libotherworld; beside them unmodified ones. A row per
/// program and mode, a last line that counts.
#[derive(Debug, Args)]
pub struct Apps {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many panics on each.
    #[arg(long, default_value_t = 20)]
    crashes: u32,
    /// Draws the moments; a random one, which is printed, if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// How many rows each MariaDB has in its MEMORY tables.
    #[arg(long, default_value_t = 500_000)]
    rows: u64,
    /// Leaves out the same panic without Otherworld.
    #[arg(long)]
    no_baseline: bool,
    /// Nobody is selected: every program must fail (to see that they can).
    #[arg(long)]
    damage: bool,
}

/// A file to be put into the guest: path, mode, contents.
type File = (String, u32, Vec<u8>);

/// An application in one mode.
struct App {
    program: &'static str,
    mode: &'static str,
    name: &'static str,
    /// Lines added to the program.
    added: fn() -> usize,
    /// Lines of it that are changed.
    modified: usize,
    /// Starts it, with its clients; the processes by which the report names it.
    start: fn(&mut Channel) -> Result<Vec<i32>>,
    /// What it shows just before the panic.
    look: fn(&mut Channel) -> Result<String>,
    /// Whether it serves again.
    answers: fn(&mut Channel) -> Result<bool>,
    /// That nothing is lost, and that it does what it is to do.
    check: fn(&mut Channel, &str) -> Result<()>,
    /// After an ordinary reboot: what is lost.
    lost: fn(&mut Channel, &str) -> Result<String>,
}

fn all() -> impl Iterator<Item = &'static App> {
    joe::APPS.iter().chain(mariadb::APPS).chain(examples::APPS)
}

/// What all panics have made of an application.
#[derive(Default)]
struct Sum {
    survived: u32,
    lost: u32,
    interruptions: Vec<Duration>,
}

impl Apps {
    /// As part of the tests.
    pub fn new(kernel: Series) -> Self {
        Self { kernel: Some(kernel), crashes: 2, seed: None, rows: 50_000, no_baseline: true, damage: false }
    }

    /// Runs it; whether nothing was lost.
    pub fn run(self, global: &Global) -> Result<bool> {
        Ok(self.count(global)?.close())
    }

    /// Runs it and counts.
    pub fn count(&self, global: &Global) -> Result<Tally> {
        let lab = global.lab()?;
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let mut draw = fastrand::Rng::with_seed(seed);
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            let config = guest::for_programs(series, global.accel());
            let (running, processes) = running(&lab, &config, self.rows)?;
            let without = match self.no_baseline {
                true => None,
                false => Some(
                    baseline(&lab, &running, &format!("apps-{series}-reboot"))
                        .with_context(|| format!("the panic without Otherworld on kernel {series}"))?,
                ),
            };
            let armed = guest::armed(&lab, &running, &self.installation())?;
            let mut sums: BTreeMap<&str, Sum> = BTreeMap::new();
            for n in 1..=self.crashes {
                ui::line(format!("kernel {series}, panic {n} of {}, seed {seed}", self.crashes));
                let name = format!("apps-{series}-{n}");
                let rows = self.once(&lab, &armed, &name, &processes, &mut draw);
                for row in rows.with_context(|| format!("applications on kernel {series}"))? {
                    let sum = sums.entry(row.app.name).or_default();
                    let good = row.trouble.is_none() != self.damage;
                    tally.add(Tally { passed: good.into(), failed: (!good).into() });
                    sum.survived += u32::from(row.lives);
                    sum.lost += u32::from(row.trouble.is_some());
                    sum.interruptions.extend(row.interruption);
                    if good { ui::line(row.to_string()) } else { ui::failure(row.to_string()) }
                }
            }
            ui::line(format!("kernel {series}, {} panics:", self.crashes));
            table(self.crashes, &mut sums, without.as_ref());
        }
        Ok(tally)
    }

    fn installation(&self) -> Installation {
        let selected =
            if self.damage { &["exe = \"/nobody\""][..] } else { &["user = \"demo\"", "user = \"mysql\""] };
        let selected: String = selected.iter().map(|who| format!("[[select]]\n{who}\n\n")).collect();
        let config = format!("{selected}[after]\nstart = [\"{AGENT_COMMAND}\"]\n");
        Installation { config, saver: true, ..Installation::default() }
    }

    fn once(
        &self,
        lab: &Lab,
        armed: &Snapshot,
        name: &str,
        processes: &Processes,
        draw: &mut fastrand::Rng,
    ) -> Result<Vec<Row>> {
        let mut guest = lab.start(armed, name)?;
        guest::seed(&mut guest, draw.u64(..))?;
        let looks: Vec<String> = all()
            .map(|app| (app.look)(&mut guest.agent).with_context(|| format!("look at {}", app.name)))
            .collect::<Result<_>>()?;
        let alive = processes.values().flatten().copied().collect();
        let cpu = draw.usize(..armed.config.cpus as usize);
        let panic = Panic { after_us: draw.u64(MOMENTS_US), cpu: Some(cpu), alive };
        let (panicked, claims) =
            survive::panic_and_claims(&mut guest, &panic).inspect_err(|_| _ = guest.keep_artifacts())?;
        let interruptions =
            if self.damage { BTreeMap::new() } else { await_answers(&mut guest.agent, panicked) };
        let rows: Vec<Row> = all()
            .zip(&looks)
            .map(|(app, look)| {
                ui::note(&format!("checking {}", app.name));
                let pids = processes.get(app.name).map_or(&[][..], Vec::as_slice);
                let told: Vec<Claim> =
                    pids.iter().map(|pid| claims.get(pid).cloned().unwrap_or_default()).collect();
                let lives = !told.is_empty() && told.iter().all(|claim| claim.lives() || claim.obeyed());
                let trouble = (app.check)(&mut guest.agent, look).err().map(|error| {
                    let told = told.iter().map(Claim::to_string).collect::<Vec<_>>().join("; ");
                    format!("{error:#}; the report says: {told}")
                });
                Row { app, lives, trouble, interruption: interruptions.get(app.name).copied() }
            })
            .collect();
        guest::keep_table(&guest, &rows, rows.iter().any(|row| row.trouble.is_some()))?;
        Ok(rows)
    }
}

/// Asks all in turns until each has answered; how long after the panic that was.
fn await_answers(agent: &mut Channel, panicked: Instant) -> BTreeMap<&'static str, Duration> {
    let mut answered = BTreeMap::new();
    let mut left: Vec<&App> = all().collect();
    while !left.is_empty() && panicked.elapsed() < ANSWER_DEADLINE {
        left.retain(|app| {
            let answers = (app.answers)(agent).unwrap_or(false);
            if answers {
                answered.insert(app.name, panicked.elapsed());
            }
            !answers
        });
    }
    answered
}

/// Builds them all, and what they need (or finds that they are up to date).
pub fn prepare() -> Result<()> {
    files(0).map(drop)
}

fn files(rows: u64) -> Result<Vec<File>> {
    lab::host::ensure_tools(TOOLS)?;
    let _building = build::lock("apps")?;
    let library = Library::in_place()?;
    let mut files = joe::files(&library)?;
    files.extend(mariadb::files(&library, rows)?);
    files.extend(examples::files(&library)?);
    Ok(files)
}

/// A guest in which all of them run, and by which processes the report names them.
fn running(lab: &Lab, config: &MachineConfig, rows: u64) -> Result<(Snapshot, Processes)> {
    let files = files(rows)?;
    let booted = lab.booted(config)?;
    // Whatever these files do is done again when they change.
    let mut inputs = Key::new("apps").with(include_str!("apps.rs"));
    for text in
        [include_str!("apps/joe.rs"), include_str!("apps/mariadb.rs"), include_str!("apps/examples.rs")]
    {
        inputs = inputs.with(text);
    }
    for (path, mode, data) in &files {
        inputs = inputs.with(path).with(&mode.to_string()).with_bytes(data);
    }
    guest::running(lab, &booted, "apps", &inputs, |agent| {
        shell(agent, &format!("mkdir -p {DIR} && chmod 755 /home/demo && chown demo: {DIR}"))?;
        for (path, mode, data) in &files {
            agent.write_file(path, *mode, data)?;
        }
        start_all(agent)
    })
}

fn start_all(agent: &mut Channel) -> Result<Processes> {
    let start = |app: &'static App| {
        ui::note(&format!("starting {}", app.name));
        let pids = (app.start)(agent).with_context(|| format!("start {}", app.name))?;
        Ok((app.name.to_owned(), pids))
    };
    all().map(start).collect()
}

/// What the same panic does without Otherworld.
struct Without {
    /// How long until the machine has booted: services come after that.
    booted: Duration,
    /// What each application has lost.
    lost: BTreeMap<&'static str, String>,
}

fn baseline(lab: &Lab, running: &Snapshot, name: &str) -> Result<Without> {
    ui::note("the same panic without Otherworld");
    let mut guest = lab.start(running, name)?;
    let looks: Vec<String> = all().map(|app| (app.look)(&mut guest.agent)).collect::<Result<_>>()?;
    guest.agent.shell("sysctl -w kernel.panic=1", BOOT_DEADLINE)?;
    let panic = Panic { after_us: 1_000_000, cpu: Some(0), alive: Vec::new() };
    ensure!(crash::crash(&mut guest, &panic, &mut crash::Quiet)?.is_some(), "it did not panic");
    let panicked = Instant::now();
    guest.machine.wait_exit(BOOT_DEADLINE).context("the machine does not reboot")?;
    let mut guest = lab.boot_again(guest, running)?;
    guest.agent.shell("systemctl is-system-running --wait || true", BOOT_DEADLINE)?;
    let booted = panicked.elapsed();
    let lost = all()
        .zip(&looks)
        .map(|(app, look)| Ok((app.name, (app.lost)(&mut guest.agent, look)?)))
        .collect::<Result<_>>()?;
    Ok(Without { booted, lost })
}

/// What became of one application in one panic.
struct Row {
    app: &'static App,
    lives: bool,
    trouble: Option<String>,
    interruption: Option<Duration>,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let got = if self.trouble.is_none() { "ok" } else { "FAILED" };
        let after =
            self.interruption.map_or_else(|| "-".to_owned(), |after| format!("{:.1} s", after.as_secs_f64()));
        let trouble = self.trouble.as_deref().unwrap_or_default();
        write!(f, "  {:16} {got:7} {after:>7}  {trouble}", self.app.name)
    }
}

fn table(crashes: u32, sums: &mut BTreeMap<&str, Sum>, without: Option<&Without>) {
    ui::line(format!(
        "  {:16} {:14} {:>7} {:>8} {:>9} {:>13} {:>15}  {}",
        "program",
        "mode",
        "crashes",
        "survived",
        "data lost",
        "interruption",
        "added/modified",
        without.map_or_else(String::new, |without| format!(
            "without Otherworld: booted after {:.1} s, lost",
            without.booted.as_secs_f64()
        ))
    ));
    for app in all() {
        let sum = sums.entry(app.name).or_default();
        sum.interruptions.sort();
        let median = sum.interruptions.get(sum.interruptions.len() / 2);
        let median = median.map_or_else(|| "-".to_owned(), |median| format!("{:.1} s", median.as_secs_f64()));
        ui::line(format!(
            "  {:16} {:14} {crashes:>7} {:>8} {:>9} {median:>13} {:>15}  {}",
            app.program,
            app.mode,
            sum.survived,
            sum.lost,
            format!("{}/{}", (app.added)(), app.modified),
            without.and_then(|without| without.lost.get(app.name)).map_or("", String::as_str)
        ));
    }
}
