//! `cargo xtask real-programs`: programs as Debian ships them, all in one guest at once, through panics at random moments.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use lab::image::DEMO_UID;
use lab::{Channel, Key, Lab, MachineConfig, Panic, Program, Series, Snapshot};

use crate::crash_runs::Tally;
use crate::guest::{self, AGENT_COMMAND, Installation, Processes};
use crate::in_guest::{Place, file, log, of_user, pids, same, shell, until};
use crate::survive::{Claim, claims_after};
use crate::{Global, ui};

/// Where the programs' files are in the guest.
const DIR: &str = "/home/demo/real";
const HERE: Place = Place(DIR);
/// Its appearance tells the endless ones that it is enough.
const STOP: &str = "/home/demo/real/stop";
/// When the panic comes after the guest has gone on, in microseconds.
const MOMENTS_US: std::ops::Range<u64> = 200_000..6_000_000;
const SET_UP_DEADLINE: Duration = Duration::from_secs(240);
use crate::in_guest::STEP_DEADLINE;

/// Files pushed into the guest.
const FILES: &[(&str, &str)] = &[
    ("redis_client.py", include_str!("../programs/redis_client.py")),
    ("threads.py", include_str!("../programs/threads.py")),
];

/// Unmodified programs from Debian in one guest: editors and shells in tmux, python3, redis, nginx, postgres and mariadb with their clients.
/// A row per program and panic; the last line counts them.
#[derive(Debug, Args)]
pub struct RealPrograms {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// How many panics on each.
    #[arg(long, default_value_t = 10)]
    crashes: u32,
    /// Draws the moments; a random one, which is printed, if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// Nobody is selected: every program must fail (to see that they can).
    #[arg(long)]
    damage: bool,
}

/// One program.
pub struct Real {
    /// Its name.
    pub name: &'static str,
    /// What is looked at afterwards.
    shows: &'static str,
    /// Starts it, with its clients; the processes by which the report names it.
    start: fn(&mut Channel) -> Result<Vec<i32>>,
    /// What it shows just before the panic, for comparison.
    pub look: fn(&mut Channel) -> Result<String>,
    /// That it goes on as if nothing had happened.
    pub check: fn(&mut Channel, &str) -> Result<()>,
}

/// All of them, in the order in which they are started.
pub const PROGRAMS: &[Real] = &[
    Real {
        name: "bash",
        shows: "interactive in tmux: a pipeline that runs, a stopped job",
        start: bash_start,
        look: |_| Ok(String::new()),
        check: bash_check,
    },
    Real {
        name: "vim",
        shows: "in a pane of tmux: unsaved text, on the screen as it was; the next keys work",
        start: vim_start,
        look: |agent| screen(agent, "vim"),
        check: vim_check,
    },
    Real {
        name: "top",
        shows: "in the other pane: goes on refreshing",
        start: |agent| pids(agent, "pgrep -x top"),
        look: |agent| screen(agent, "top"),
        check: top_check,
    },
    Real {
        name: "tmux",
        shows: "its windows and panes, and its socket",
        start: |agent| pids(agent, "pgrep -f '^tmux.*new-session'"),
        look: panes,
        check: |agent, before| same("its panes", before, &panes(agent)?),
    },
    Real {
        name: "python3",
        shows: "8 threads and 2 worker processes that compute",
        start: python_start,
        look: |_| Ok(String::new()),
        check: python_check,
    },
    Real {
        name: "redis",
        shows: "100,000 keys; a client at its unix socket amid a pipeline",
        start: redis_start,
        look: |agent| log(agent, &format!("{DIR}/redis.log")),
        check: redis_check,
    },
    Real {
        name: "nginx",
        shows: "serves over its listening socket, without an error in its log",
        start: nginx_start,
        look: |agent| Ok(fetch(agent)? + &log(agent, "/var/log/nginx/error.log")?),
        check: |agent, before| {
            same("page and log", before, &(fetch(agent)? + &log(agent, "/var/log/nginx/error.log")?))
        },
    },
    Real {
        name: "postgres",
        shows: "a client in an open transaction commits; pgbench goes on",
        start: postgres_start,
        look: |agent| log(agent, &format!("{DIR}/postgres.log")),
        check: postgres_check,
    },
    Real {
        name: "mariadb",
        shows: "a client's connection, transaction and MEMORY table",
        start: mariadb_start,
        look: |agent| log(agent, &format!("{DIR}/mariadb.log")),
        check: mariadb_check,
    },
];

impl RealPrograms {
    /// Runs it; whether all went on as if nothing had happened.
    pub fn run(self, global: &Global) -> Result<bool> {
        Ok(self.count(global)?.close())
    }

    fn count(&self, global: &Global) -> Result<Tally> {
        let lab = global.lab()?;
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let mut draw = fastrand::Rng::with_seed(seed);
        let mut sum = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            let config = guest::for_programs(series, global.accel());
            let (running, processes) = running(&lab, &config)?;
            let armed = guest::armed(&lab, &running, &self.installation())?;
            let mut of_program: BTreeMap<&str, Tally> = BTreeMap::new();
            for n in 1..=self.crashes {
                ui::line(format!("kernel {series}, panic {n} of {}, seed {seed}", self.crashes));
                let name = format!("real-{series}-{n}");
                let rows = once(&lab, &armed, &name, &processes, &mut draw)
                    .with_context(|| format!("real programs on kernel {series}"))?;
                for row in rows {
                    let tally = of_program.entry(row.name).or_default();
                    let good = row.trouble.is_none() != self.damage;
                    if good {
                        tally.passed += 1
                    } else {
                        tally.failed += 1
                    }
                    if good { ui::line(row.to_string()) } else { ui::failure(row.to_string()) }
                }
            }
            ui::line(format!("kernel {series}, {} panics:", self.crashes));
            for real in PROGRAMS {
                let tally = of_program.get(real.name).copied().unwrap_or_default();
                let all = tally.passed + tally.failed;
                ui::line(format!("  {:10} {:>3} of {all:<3} {}", real.name, tally.passed, real.shows));
                sum.add(tally);
            }
        }
        Ok(sum)
    }

    fn installation(&self) -> Installation {
        let selected =
            if self.damage { "[[select]]\nexe = \"/nobody\"\n".to_owned() } else { selection(&[]) };
        let config = format!("{selected}\n[after]\nstart = [\"{AGENT_COMMAND}\"]\n");
        Installation { config, saver: true, ..Installation::default() }
    }
}

/// A guest in which all of them run, and by which processes the report names them.
fn running(lab: &Lab, config: &MachineConfig) -> Result<(Snapshot, Processes)> {
    let booted = lab.booted(config)?;
    guest::running(lab, &booted, "real-programs", &inputs(), start_all)
}

/// The configuration that selects them all, and these programs as well.
pub fn selection(others: &[&str]) -> String {
    let users = ["demo", "postgres", "mysql", "redis"];
    let users = users.map(|user| format!("[[select]]\nuser = \"{user}\"\n"));
    let programs = ["/usr/sbin/nginx", "/usr/bin/mariadb"];
    let programs = programs.iter().chain(others).map(|exe| format!("[[select]]\nexe = \"{exe}\"\n"));
    users.into_iter().chain(programs).collect()
}

/// What starting them depends on.
pub fn inputs() -> Key {
    FILES.iter().fold(Key::new("real-programs").with(include_str!("real_programs.rs")), |key, (_, text)| {
        key.with(text)
    })
}

fn start_all(agent: &mut Channel) -> Result<Processes> {
    start(agent, |_| true)
}

/// Starts those that are wanted, and by which processes the report names them.
pub fn start(agent: &mut Channel, is_wanted: impl Fn(&str) -> bool) -> Result<Processes> {
    shell(agent, &format!("mkdir -p {DIR} && chmod 755 /home/demo"))?;
    for (name, text) in FILES {
        agent.write_file(format!("{DIR}/{name}"), 0o644, text.as_bytes())?;
    }
    shell(agent, &format!("chown -R demo: {DIR} && chmod 777 {DIR}"))?;
    // A service's own lingering user processes are not what this is about.
    let mut processes = BTreeMap::new();
    for real in PROGRAMS.iter().filter(|real| is_wanted(real.name)) {
        ui::note(&format!("starting {}", real.name));
        let pids = (real.start)(agent).with_context(|| format!("start {}", real.name))?;
        processes.insert(real.name.to_owned(), pids);
    }
    Ok(processes)
}

/// What became of one program in one panic.
struct Row {
    name: &'static str,
    trouble: Option<String>,
    claim: String,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let got = if self.trouble.is_none() { "ok" } else { "FAILED" };
        let claim = Some(&self.claim).filter(|claim| !claim.is_empty());
        let words: Vec<&str> = self.trouble.iter().chain(claim).map(String::as_str).collect();
        write!(f, "  {:10} {got:7} {}", self.name, words.join("; "))
    }
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
    let looks: Vec<String> = PROGRAMS
        .iter()
        .map(|real| (real.look)(&mut guest.agent).with_context(|| format!("look at {}", real.name)))
        .collect::<Result<_>>()?;
    let alive = processes.values().flatten().copied().collect();
    let cpu = draw.usize(..armed.config.cpus as usize);
    let panic = Panic { after_us: draw.u64(MOMENTS_US), cpu: Some(cpu), alive };
    let claims = claims_after(&mut guest, &panic).inspect_err(|_| _ = guest.keep_artifacts())?;
    let rows: Vec<Row> = PROGRAMS
        .iter()
        .zip(&looks)
        .map(|(real, look)| {
            ui::note(&format!("checking {}", real.name));
            let pids = processes.get(real.name).map_or(&[][..], Vec::as_slice);
            let told = pids.iter().map(|pid| claims.get(pid).cloned().unwrap_or_default());
            let told: Vec<Claim> = told.collect();
            let trouble = (real.check)(&mut guest.agent, look).err().map(|error| {
                let whole = !told.is_empty() && told.iter().all(Claim::whole);
                let lie = if whole { "FALSE REPORT: it is called whole; " } else { "" };
                format!("{lie}{error:#}")
            });
            let notable = told.iter().filter(|claim| trouble.is_some() && !claim.whole());
            let claim = notable.map(|claim| claim.to_string()).collect::<Vec<_>>().join("; ");
            Row { name: real.name, trouble, claim }
        })
        .collect();
    guest::keep_table(&guest, &rows, rows.iter().any(|row| row.trouble.is_some()))?;
    Ok(rows)
}

// ---- helpers

/// By the user demo.
fn demo(agent: &mut Channel, script: &str) -> Result<String> {
    HERE.demo(agent, script)
}

// ---- tmux and what runs in it

const TMUX: &str = "tmux -L real";

fn keys(agent: &mut Channel, target: &str, keys: &str) -> Result<()> {
    demo(agent, &format!("{TMUX} send-keys -t {target} {keys}")).map(drop)
}

fn pane(name: &str) -> &'static str {
    match name {
        "vim" => "real:0.0",
        "top" => "real:0.1",
        _ => "real:1.0",
    }
}

fn screen(agent: &mut Channel, name: &str) -> Result<String> {
    demo(agent, &format!("{TMUX} capture-pane -p -t {}", pane(name)))
}

fn panes(agent: &mut Channel) -> Result<String> {
    let format =
        "#{window_index}.#{pane_index} #{pane_pid} #{pane_width}x#{pane_height} #{pane_tty} #{pane_dead}";
    demo(agent, &format!("{TMUX} list-panes -s -F '{format}'"))
}

fn bash_start(agent: &mut Channel) -> Result<Vec<i32>> {
    // The first one to be started brings up tmux for all.
    demo(
        agent,
        &format!(
            "{TMUX} -f /dev/null new-session -d -s real -x 100 -y 40 'vim text' && \
             {TMUX} split-window -t real:0 'top -d 1' && {TMUX} new-window -t real 'bash -i'"
        ),
    )?;
    let pipeline =
        "(i=0; while :; do i=$((i+1)); echo $i; sleep 0.3; done) | tee numbers | cat > /dev/null &";
    keys(agent, pane("bash"), &format!("'cd {DIR}; {pipeline}' Enter"))?;
    keys(agent, pane("bash"), "'sleep 54321' Enter")?;
    until(agent, "sleep", |agent| shell(agent, "pgrep -f '^sleep 54321' || true"), |text| !text.is_empty())?;
    keys(agent, pane("bash"), "C-z")?;
    jobs(agent)?;
    pids(agent, "pgrep -f '^bash -i'")
}

/// That bash knows its two jobs.
fn jobs(agent: &mut Channel) -> Result<()> {
    demo(agent, "rm -f jobs")?;
    keys(agent, pane("bash"), "'jobs > jobs.new; mv jobs.new jobs' Enter")?;
    let path = format!("{DIR}/jobs");
    let knows = |text: &str| text.contains("Running") && text.contains("Stopped") && text.contains("54321");
    until(agent, "jobs", |agent| file(agent, &path), knows).map(drop)
}

fn bash_check(agent: &mut Channel, _: &str) -> Result<()> {
    jobs(agent)?;
    let numbers = format!("{DIR}/numbers");
    let count = |text: &str| text.lines().count();
    let before = count(&file(agent, &numbers)?);
    let text = until(agent, "the pipeline", |agent| file(agent, &numbers), |text| count(text) > before + 5)?;
    let whole = text.lines().zip(1..).all(|(line, n)| line == n.to_string());
    ensure!(whole, "the pipeline has lost or repeated numbers");
    // Once more to the foreground, and away.
    keys(agent, pane("bash"), "'fg %2' Enter")?;
    let state = "ps -o stat= -p $(pgrep -f '^sleep 54321') || true";
    until(agent, "fg", |agent| shell(agent, state), |text| text.contains("S+"))?;
    keys(agent, pane("bash"), "C-c")?;
    until(agent, "^C", |agent| shell(agent, state), |text| text.trim().is_empty()).map(drop)
}

fn vim_start(agent: &mut Channel) -> Result<Vec<i32>> {
    let lines: String = (1..=30).map(|n| format!("line {n} that nobody has saved\\n")).collect();
    demo(agent, &format!("printf '{lines}' > typed && {TMUX} load-buffer typed"))?;
    until(agent, "vim", |agent| screen(agent, "vim"), |text| text.contains('~'))?;
    keys(agent, pane("vim"), "i")?;
    demo(agent, &format!("{TMUX} paste-buffer -p -t {}", pane("vim")))?;
    until(agent, "vim", |agent| screen(agent, "vim"), |text| text.contains("line 30"))?;
    keys(agent, pane("vim"), "Escape")?;
    until(agent, "vim", |agent| screen(agent, "vim"), |text| !text.contains("-- INSERT --"))?;
    pids(agent, "pgrep -f '^vim text'")
}

fn vim_check(agent: &mut Channel, before: &str) -> Result<()> {
    same("its screen", before, &screen(agent, "vim")?)?;
    ensure!(file(agent, &format!("{DIR}/text"))?.is_empty(), "the text is in the file already");
    keys(agent, pane("vim"), "'Go' 'and one line more' Escape ':w' Enter")?;
    let path = format!("{DIR}/text");
    let text = until(agent, "its file", |agent| file(agent, &path), |text| text.contains("one line more"))?;
    let expected: String = (1..=30).map(|n| format!("line {n} that nobody has saved\n")).collect();
    same("its text", &format!("{expected}\nand one line more\n"), &text)
}

fn top_check(agent: &mut Channel, before: &str) -> Result<()> {
    ensure!(before.contains("Tasks:"), "top showed nothing before");
    let now = screen(agent, "top")?;
    until(agent, "top", |agent| screen(agent, "top"), |text| text != now && text.contains("Tasks:")).map(drop)
}

// ---- python3

fn python_start(agent: &mut Channel) -> Result<Vec<i32>> {
    let program = Program::new(["python3", "threads.py", STOP]).uid(DEMO_UID).cwd(DIR);
    let pid = agent.spawn(&program.stdout(format!("{DIR}/threads.out")))?;
    let out = format!("{DIR}/threads.out");
    until(agent, "threads.py", |agent| file(agent, &out), |text| text.contains("running"))?;
    Ok(vec![pid])
}

fn python_check(agent: &mut Channel, _: &str) -> Result<()> {
    demo(agent, &format!("touch {STOP}"))?;
    let out = format!("{DIR}/threads.out");
    let right = "running\nright results 8 True\n";
    until(agent, "threads.py", |agent| file(agent, &out), |text| text == right).map(drop)
}

// ---- redis

const REDIS_SOCKET: &str = "/run/redis/redis.sock";

fn redis_start(agent: &mut Channel) -> Result<Vec<i32>> {
    shell(agent, "mkdir -p /run/redis /var/log/redis && chown redis: /run/redis /var/log/redis")?;
    let argv = of_user(
        "redis",
        &[
            "redis-server",
            "--port",
            "6379",
            "--unixsocket",
            REDIS_SOCKET,
            "--unixsocketperm",
            "777",
            "--save",
            "",
            "--dir",
            "/var/lib/redis",
            "--enable-debug-command",
            "local",
        ],
    );
    let server = agent.spawn(&Program::new(argv).stdout(format!("{DIR}/redis.log")))?;
    let ping = format!("redis-cli -s {REDIS_SOCKET} ping 2>&1 || true");
    until(agent, "redis", |agent| shell(agent, &ping), |text| text.contains("PONG"))?;
    shell(agent, &format!("redis-cli -s {REDIS_SOCKET} debug populate 100000"))?;
    let client = Program::new(["python3", "redis_client.py", REDIS_SOCKET, STOP]).uid(DEMO_UID).cwd(DIR);
    let client = agent.spawn(&client.stdout(format!("{DIR}/redis.out")))?;
    Ok(vec![server, client])
}

fn redis_check(agent: &mut Channel, before: &str) -> Result<()> {
    let size = shell(agent, &format!("redis-cli -s {REDIS_SOCKET} dbsize"))?;
    ensure!(size.trim() == "100001", "it has {} keys", size.trim());
    ensure!(shell(agent, "redis-cli ping")?.trim() == "PONG", "no answer over TCP");
    demo(agent, &format!("touch {STOP}"))?;
    let out = format!("{DIR}/redis.out");
    until(agent, "its client", |agent| file(agent, &out), |text| text.starts_with("right answers"))?;
    same("trouble in its log", before, &log(agent, &format!("{DIR}/redis.log"))?)
}

// ---- nginx

fn nginx_start(agent: &mut Channel) -> Result<Vec<i32>> {
    let server = agent.spawn(&Program::new(["nginx", "-g", "daemon off;"]))?;
    until(agent, "nginx", |agent| Ok(fetch(agent).unwrap_or_default()), |text| text.contains("nginx"))?;
    let mut all = pids(agent, "pgrep -u www-data nginx")?;
    all.insert(0, server);
    Ok(all)
}

fn fetch(agent: &mut Channel) -> Result<String> {
    let get = "import urllib.request; print(urllib.request.urlopen(\"http://127.0.0.1/\", timeout=30).read().decode())";
    shell(agent, &format!("python3 -c '{get}'"))
}

// ---- postgres

fn postgres_start(agent: &mut Channel) -> Result<Vec<i32>> {
    shell(agent, "install -d -o postgres -g postgres /run/postgresql")?;
    let argv = of_user(
        "postgres",
        &[
            "/usr/lib/postgresql/15/bin/postgres",
            "-D",
            "/var/lib/postgresql/15/main",
            "-c",
            "config_file=/etc/postgresql/15/main/postgresql.conf",
        ],
    );
    let server = agent.spawn(&Program::new(argv).stdout(format!("{DIR}/postgres.log")))?;
    let ready = "pg_isready 2>&1 || true";
    until(agent, "postgres", |agent| shell(agent, ready), |text| text.contains("accepting"))?;
    let as_postgres = |what: &str| of_user("postgres", &["sh", "-c", what]);
    agent
        .run(&Program::new(as_postgres("cd / && createdb bench && pgbench -q -i bench")), SET_UP_DEADLINE)?;
    let client = HERE.fifo_client(agent, "psql", "postgres", "psql -X -q -A -t postgres")?;
    HERE.tell(
        agent,
        "psql",
        "CREATE TABLE numbers (n INT);\nBEGIN;\nINSERT INTO numbers SELECT generate_series(1, 1000);\nSELECT count(*) FROM numbers;",
        "1000",
    )?;
    let bench = Program::new(as_postgres("cd / && exec pgbench -n -c 2 --rate=5 -T 100000 bench"));
    let bench = agent.spawn(&bench.stdout(format!("{DIR}/pgbench.out")))?;
    let mut all = pids(agent, "pgrep -u postgres -x postgres")?;
    all.retain(|pid| *pid != server);
    all.splice(0..0, [server, client, bench]);
    Ok(all)
}

fn transactions(agent: &mut Channel) -> Result<String> {
    let count = "SELECT xact_commit FROM pg_stat_database WHERE datname = 'bench'";
    let argv = of_user("postgres", &["psql", "-X", "-A", "-t", "-d", "postgres", "-c", count]);
    Ok(agent.run(&Program::new(argv), STEP_DEADLINE)?)
}

fn postgres_check(agent: &mut Channel, before: &str) -> Result<()> {
    HERE.tell(
        agent,
        "psql",
        "INSERT INTO numbers VALUES (1001);\nCOMMIT;\nSELECT sum(n) FROM numbers;",
        &(1001 * 1002 / 2).to_string(),
    )?;
    let argv = of_user(
        "postgres",
        &["psql", "-X", "-A", "-t", "-d", "postgres", "-c", "SELECT count(*) FROM numbers"],
    );
    let others = agent.run(&Program::new(argv), STEP_DEADLINE)?;
    same("what others see", "1001", others.trim())?;
    let now = transactions(agent)?;
    until(agent, "pgbench", transactions, |text| text != now)?;
    let trouble = file(agent, &format!("{DIR}/pgbench.out"))?;
    ensure!(!trouble.contains("error"), "pgbench: {}", trouble.trim());
    same("trouble in its log", before, &log(agent, &format!("{DIR}/postgres.log"))?)
}

// ---- mariadb

fn mariadb_start(agent: &mut Channel) -> Result<Vec<i32>> {
    shell(agent, "install -d -o mysql -g mysql /run/mysqld")?;
    let argv = ["mariadbd", "--user=mysql", "--innodb_use_native_aio=0"];
    let server = agent.spawn(&Program::new(argv).stdout(format!("{DIR}/mariadb.log")))?;
    let ready = "mariadb-admin ping 2>&1 || true";
    until(agent, "mariadb", |agent| shell(agent, ready), |text| text.contains("alive"))?;
    let client = HERE.fifo_client(agent, "mariadb", "root", "mariadb -N -n")?;
    let rows = "SELECT seq, CONCAT('row ', seq) FROM seq_1_to_5000";
    HERE.tell(
        agent,
        "mariadb",
        &format!(
            "CREATE DATABASE real_programs; USE real_programs;\n\
             CREATE TABLE mem (n INT PRIMARY KEY, t VARCHAR(20)) ENGINE=MEMORY;\nINSERT INTO mem {rows};\n\
             CREATE TABLE disk (n INT PRIMARY KEY, t VARCHAR(20)) ENGINE=InnoDB;\nBEGIN;\nINSERT INTO disk {rows};\n\
             SET @before = (SELECT SUM(CRC32(t)) FROM mem);\nSELECT COUNT(*) FROM disk;"
        ),
        "5000",
    )?;
    Ok(vec![server, client])
}

fn mariadb_check(agent: &mut Channel, before: &str) -> Result<()> {
    HERE.tell(
        agent,
        "mariadb",
        "INSERT INTO disk VALUES (5001, 'after');\nCOMMIT;\nSELECT SUM(CRC32(t)) = @before, COUNT(*) FROM mem;\nSELECT 'done';",
        "done",
    )?;
    let out = file(agent, &format!("{DIR}/mariadb.out"))?;
    ensure!(out.lines().any(|line| line == "1\t5000"), "the MEMORY table differs: {}", out.trim());
    let others = shell(agent, "mariadb -N -e 'SELECT COUNT(*) FROM real_programs.disk'")?;
    same("what others see", "5001", others.trim())?;
    same("trouble in its log", before, &log(agent, &format!("{DIR}/mariadb.log"))?)
}
