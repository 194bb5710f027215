//! `cargo xtask durability`: what had been written is there after a panic, although nothing of those who wrote it is resurrected; and what of it is
//! there after the same panic without Otherworld.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use lab::image::DEMO_UID;
use lab::{Channel, Guest, Key, Lab, MachineConfig, Panic, Program, Series, Snapshot};

use crate::crash_runs::Tally;
use crate::guest::{self, AGENT_COMMAND, Installation, Processes};
use crate::in_guest::{Place, STEP_DEADLINE, file, of_user, shell, until};
use crate::survive::{CHECK_EXT4, claims_after};
use crate::{Global, build, crash, ui};

const DIR: &str = "/home/demo/durability";
const HERE: Place = Place(DIR);
/// Where the writers put the last number that was acknowledged: in memory, so that nothing of it is lost.
const ACKED: &str = "/dev/shm";
/// A program that is resurrected, so that there is somebody to do it for.
const SENTINEL: &str = "/usr/local/lib/otherworld/sentinel";
const SURVIVORS: &str = "/usr/local/lib/otherworld/survivors/survivors";
const WRITER: &str = include_str!("../programs/writer.py");
/// Operations on files.
const OPERATIONS: u32 = 1500;
const OPERATIONS_DEADLINE: Duration = Duration::from_secs(120);
const BOOT_DEADLINE: Duration = Duration::from_secs(240);
/// When the panic comes after the guest has gone on, in microseconds.
const MOMENTS_US: std::ops::Range<u64> = 1_000_000..8_000_000;
const POSTGRES: &str = "/usr/lib/postgresql/15/bin/postgres";

/// Databases that sync nothing (sqlite with either journal, postgres, redis with an append-only file), and random operations on files: whether all
/// that was acknowledged is on the disk after a panic. Their processes are not resurrected. A row for each and panic; the last line counts them.
#[derive(Debug, Args)]
pub struct Durability {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many panics on each.
    #[arg(long, default_value_t = 5)]
    crashes: u32,
    /// Draws the moments; a random one, which is printed, if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// Leaves out the same panic without Otherworld.
    #[arg(long)]
    no_baseline: bool,
}

/// A database.
struct Database {
    name: &'static str,
    /// What its client is given: a file, or a socket.
    place: &'static str,
    /// Starts its server on the files that are there.
    serve: fn(&mut Channel) -> Result<()>,
    user: &'static str,
}

const DATABASES: &[Database] = &[
    Database { name: "sqlite-wal", place: "wal.db", serve: |_| Ok(()), user: "demo" },
    Database { name: "sqlite-rollback", place: "rollback.db", serve: |_| Ok(()), user: "demo" },
    Database { name: "redis", place: "/run/redis/redis.sock", serve: redis, user: "redis" },
    Database { name: "postgres", place: "postgres", serve: postgres, user: "postgres" },
];

fn redis(agent: &mut Channel) -> Result<()> {
    shell(agent, "mkdir -p /run/redis && chown redis: /run/redis && rm -f /run/redis/redis.sock")?;
    let server = "exec redis-server --port 0 --unixsocket /run/redis/redis.sock --unixsocketperm 777 --save '' --dir /var/lib/redis \
        --appendonly yes --appendfsync no";
    agent.spawn(&Program::new(of_user("redis", &["sh", "-c", server])).stdout(format!("{DIR}/redis.log")))?;
    let ping = "redis-cli -s /run/redis/redis.sock ping 2>&1 || true";
    until(agent, "redis", |agent| shell(agent, ping), |text| text.contains("PONG")).map(drop)
}

fn postgres(agent: &mut Channel) -> Result<()> {
    shell(agent, "install -d -o postgres -g postgres /run/postgresql && rm -f /run/postgresql/.s*")?;
    let data = "/var/lib/postgresql/15/main";
    // Its server of before is no more, whoever has its process id now.
    shell(agent, &format!("rm -f {data}/postmaster.pid"))?;
    let config = "config_file=/etc/postgresql/15/main/postgresql.conf";
    let argv = of_user("postgres", &[POSTGRES, "-D", data, "-c", config, "-c", "fsync=off"]);
    agent.spawn(&Program::new(argv).stdout(format!("{DIR}/postgres.log")))?;
    let ready = "pg_isready 2>&1 || true";
    until(agent, "postgres", |agent| shell(agent, ready), |text| text.contains("accepting")).map(drop)
}

impl Database {
    fn client(&self, acked: Option<&str>) -> Program {
        let mut argv = vec!["python3", "writer.py", self.name, self.place];
        argv.extend(acked);
        Program::new(of_user(self.user, &argv)).cwd(DIR)
    }

    fn acked_path(&self) -> String {
        format!("{ACKED}/{}.acked", self.name)
    }

    /// The last number that was acknowledged.
    fn acked(&self, agent: &mut Channel) -> Result<u64> {
        let text = file(agent, &self.acked_path())?;
        text.trim().parse().with_context(|| format!("{}: what was acknowledged is not known", self.name))
    }

    /// How many of the numbers up to `acked` are not there.
    fn lost(&self, agent: &mut Channel, acked: u64) -> Result<u64> {
        (self.serve)(agent)?;
        let text = agent.run(&self.client(None), STEP_DEADLINE)?;
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [count, last] = numbers[..] else { anyhow::bail!("its client says {text:?}") };
        ensure!(count == last, "of {last} numbers it has {count}");
        ensure!(last <= acked + 1, "it has {last} numbers, and has been given {acked} or one more");
        Ok(acked.saturating_sub(last))
    }
}

/// What became of what one of them had written.
struct Row {
    name: &'static str,
    outcome: Result<String>,
    good: bool,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let got = if self.good { "ok" } else { "LOST" };
        match &self.outcome {
            Ok(text) => write!(f, "  {:16} {got:5} {text}", self.name),
            Err(error) => write!(f, "  {:16} {got:5} {error:#}", self.name),
        }
    }
}

impl Durability {
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
            let (running, processes) = running(&lab, &config)?;
            if !self.no_baseline {
                ui::line(format!("kernel {series}, the same panic without Otherworld"));
                let rows = baseline(&lab, &running, &format!("durability-baseline-{series}"), &mut draw)
                    .with_context(|| format!("the panic without Otherworld on kernel {series}"))?;
                rows.iter().for_each(|row| ui::line(row.to_string()));
            }
            let armed = guest::armed(&lab, &running, &installation())?;
            for n in 1..=self.crashes {
                ui::line(format!("kernel {series}, panic {n} of {}, seed {seed}", self.crashes));
                let rows = once(&lab, &armed, &format!("durability-{series}-{n}"), &processes, &mut draw)
                    .with_context(|| format!("durability on kernel {series}"))?;
                for row in &rows {
                    match row.good {
                        true => ui::line(row.to_string()),
                        false => ui::failure(row.to_string()),
                    }
                }
                tally.passed += rows.iter().filter(|row| row.good).count();
                tally.failed += rows.iter().filter(|row| !row.good).count();
            }
        }
        Ok(tally)
    }
}

fn installation() -> Installation {
    let config = format!("[[select]]\nexe = \"{SENTINEL}\"\n\n[after]\nstart = [\"{AGENT_COMMAND}\"]\n");
    Installation { config, ..Installation::default() }
}

/// A guest in which all of them run.
fn running(lab: &Lab, config: &MachineConfig) -> Result<(Snapshot, Processes)> {
    let booted = lab.booted(config)?;
    let survivors = std::fs::read(build::static_binaries()?.dir.join("survivors/survivors"))?;
    let inputs =
        Key::new("durability").with(include_str!("durability.rs")).with(WRITER).with_bytes(&survivors);
    guest::running(lab, &booted, "durability", &inputs, |agent| {
        shell(agent, &format!("mkdir -p {DIR} && chmod 755 /home/demo"))?;
        agent.write_file(format!("{DIR}/writer.py"), 0o644, WRITER.as_bytes())?;
        agent.write_file(SURVIVORS, 0o755, &survivors)?;
        shell(
            agent,
            &format!("chown -R demo: {DIR} && chmod 777 {DIR} && install -m 755 /bin/sleep {SENTINEL}"),
        )?;
        let mut processes = BTreeMap::new();
        processes.insert("sentinel".to_owned(), vec![agent.spawn(&Program::new([SENTINEL, "100000"]))?]);
        for database in DATABASES {
            ui::note(&format!("starting {}", database.name));
            (database.serve)(agent)?;
            let client =
                database.client(Some(&database.acked_path())).stdout(format!("{DIR}/{}.out", database.name));
            processes.insert(database.name.to_owned(), vec![agent.spawn(&client)?]);
            let path = database.acked_path();
            until(agent, database.name, |agent| file(agent, &path), |text| !text.is_empty())?;
        }
        Ok(processes)
    })
}

/// Random operations on files, all done.
fn operate(agent: &mut Channel, seed: u64) -> Result<()> {
    let words = [
        SURVIVORS,
        "operate",
        "--dir",
        "files",
        "--seed",
        &seed.to_string(),
        "--count",
        &OPERATIONS.to_string(),
    ];
    agent.run(&Program::new(words).uid(DEMO_UID).cwd(DIR), OPERATIONS_DEADLINE)?;
    Ok(())
}

/// What of the files is not as it was.
fn files(agent: &mut Channel, seed: u64) -> Row {
    let script = format!(
        "{SURVIVORS} operate --dir /dev/shm/again --seed {seed} --count {OPERATIONS} >/dev/null &&
        {SURVIVORS} compare --before /dev/shm/again --after {DIR}/files"
    );
    let outcome = HERE.demo(agent, &script).map(|text| text.trim().to_owned());
    let good = outcome.as_ref().is_ok_and(|text| text.ends_with(" 0 lost, 0 stale, 0 left behind"));
    Row { name: "files", outcome, good }
}

fn judge(agent: &mut Channel, acked: &[u64], seed: u64) -> Vec<Row> {
    let mut rows = vec![files(agent, seed)];
    for (database, acked) in DATABASES.iter().zip(acked) {
        let lost = database.lost(agent, *acked);
        let good = lost.as_ref().is_ok_and(|lost| *lost == 0);
        let outcome = lost.map(|lost| format!("{acked} acknowledged, {lost} lost"));
        rows.push(Row { name: database.name, outcome, good });
    }
    rows
}

fn acknowledged(agent: &mut Channel) -> Result<Vec<u64>> {
    DATABASES.iter().map(|database| database.acked(agent)).collect()
}

fn once(
    lab: &Lab,
    armed: &Snapshot,
    name: &str,
    processes: &Processes,
    draw: &mut fastrand::Rng,
) -> Result<Vec<Row>> {
    let mut guest = lab.start(armed, name)?;
    guest::seed(&mut guest, draw.u64(..))?;
    let seed = draw.u64(..1 << 32);
    operate(&mut guest.agent, seed)?;
    let alive = processes.values().flatten().copied().collect();
    let cpu = draw.usize(..armed.config.cpus as usize);
    let panic = Panic { after_us: draw.u64(MOMENTS_US), cpu: Some(cpu), alive };
    claims_after(&mut guest, &panic).inspect_err(|_| _ = guest.keep_artifacts())?;
    ui::note("looking at what is there");
    let acked = acknowledged(&mut guest.agent)?;
    let rows = judge(&mut guest.agent, &acked, seed);
    guest.agent.shell(CHECK_EXT4, BOOT_DEADLINE).context("e2fsck finds faults")?;
    guest::keep_table(&guest, &rows, rows.iter().any(|row| !row.good))?;
    Ok(rows)
}

fn baseline(lab: &Lab, running: &Snapshot, name: &str, draw: &mut fastrand::Rng) -> Result<Vec<Row>> {
    let mut guest = lab.start(running, name)?;
    let seed = draw.u64(..1 << 32);
    operate(&mut guest.agent, seed)?;
    // Those of after that are not counted: what is lost is at least so much.
    let acked = acknowledged(&mut guest.agent)?;
    guest.agent.shell("sysctl -w kernel.panic=1", BOOT_DEADLINE)?;
    let panic = Panic { after_us: 0, cpu: Some(0), alive: Vec::new() };
    ensure!(crash::crash(&mut guest, &panic, &mut crash::Quiet)?.is_some(), "it did not panic");
    guest.machine.wait_exit(BOOT_DEADLINE).context("the machine does not reboot")?;
    let mut guest: Guest = lab.boot_again(guest, running)?;
    guest.agent.shell("systemctl is-system-running --wait || true", BOOT_DEADLINE)?;
    let mut rows = judge(&mut guest.agent, &acked, seed);
    // More than was known of is no fault.
    for row in &mut rows {
        if let Err(error) = &row.outcome
            && error.to_string().contains("or one more")
        {
            row.outcome = Ok("nothing lost of what was acknowledged before".into());
        }
    }
    Ok(rows)
}
