//! MariaDB: with the plugin that writes its MEMORY tables and has the server begin anew, and as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use lab::image::{DEMO_UID, MARIADB_VERSION};
use lab::{Channel, Program};
use serde::Deserialize;

use super::source::{Source, run};
use super::{App, DIR, File};
use crate::in_guest::{file, of_user, same, shell, until};
use crate::libotherworld::Library;
use crate::{build, ui};

const SOURCE: Source =
    Source { package: "mariadb", version: MARIADB_VERSION, tar: "mariadb_10.11.18.orig.tar.gz" };
/// What the server calls itself.
const SERVER_VERSION: &str = "10.11.18-MariaDB-0+deb12u1";
const OTHER_VERSION: &str = "10.11.17-MariaDB-0+deb12u1";
const PLUGIN: &str = include_str!("../../../apps/mariadb/otherworld_memory.cc");
const INIT: &str = include_str!("../../../apps/mariadb/init.sql");
const PLUGINS: &str = "/usr/local/lib/mariadb-otherworld";
const INIT_FILE: &str = "/etc/mysql/otherworld_memory.sql";
/// Rows that are there before the clients come, in each of the ten tables: this file says how many.
const ROWS_FILE: &str = "/home/demo/apps/rows";
const TABLES: u64 = 10;

pub const APPS: &[App] = &[
    App {
        program: "MariaDB",
        mode: "restart",
        name: "mariadb-restart",
        added: || 0,
        modified: 0,
        start: |agent| {
            refuses_what_it_must(agent)?;
            start(agent, "mariadb-restart")
        },
        look: |agent| file(agent, &base("mariadb-restart")),
        answers: |agent| answers(agent, "mariadb-restart"),
        check: |agent, before| {
            let log = file(agent, &log("mariadb-restart"))?;
            ensure!(log.contains("rows again"), "the plugin has read nothing back:\n{log}");
            check(agent, "mariadb-restart", before).map(drop)
        },
        lost: |agent, _| lost(agent, "mariadb-restart"),
    },
    App {
        program: "MariaDB",
        mode: "unmodified",
        name: "mariadb",
        added: || 0,
        modified: 0,
        start: |agent| start(agent, "mariadb"),
        look: |agent| file(agent, &base("mariadb")),
        answers: |agent| answers(agent, "mariadb"),
        check: |agent, before| {
            let errors = check(agent, "mariadb", before)?;
            ensure!(errors == 0, "its clients have seen {errors} errors");
            Ok(())
        },
        lost: |agent, _| lost(agent, "mariadb"),
    },
];

/// Builds the plugin, and one for another version.
pub fn files(library: &Library, rows: u64) -> Result<Vec<File>> {
    let dir = headers()?;
    let mut files: Vec<File> = vec![
        (ROWS_FILE.into(), 0o644, (rows / TABLES).to_string().into()),
        (INIT_FILE.into(), 0o644, INIT.into()),
        (format!("{DIR}/ledger.py"), 0o644, include_bytes!("../../programs/ledger.py").to_vec()),
    ];
    for (version, directory) in
        [(SERVER_VERSION, PLUGINS.to_owned()), (OTHER_VERSION, format!("{PLUGINS}-other"))]
    {
        let plugin = built(library, &dir, version)?;
        let data = fs::read(&plugin).with_context(|| plugin.display().to_string())?;
        files.push((format!("{directory}/otherworld_memory.so"), 0o755, data));
    }
    Ok(files)
}

/// The server's headers: its own from the source, those that its build makes from the development package.
fn headers() -> Result<PathBuf> {
    let dir = build::target_dir().join("apps/mariadb");
    let done = dir.join("done");
    if done.exists() {
        return Ok(dir);
    }
    let source = dir.join("source");
    let only = ["*/include/*", "*/sql/*.h", "*/storage/heap/*.h", "*/wsrep-lib/wsrep-API/*"];
    SOURCE.unpack(&source, &only)?;
    ui::note("fetching MariaDB's development package");
    lab::host::apt_update()?;
    let package = format!("libmariadbd-dev={MARIADB_VERSION}");
    run(Command::new("apt-get").current_dir(&dir).args([
        "-q",
        "-o",
        "APT::Sandbox::User=root",
        "download",
        &package,
    ]))?;
    for entry in fs::read_dir(&dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(&path).arg(dir.join("dev")))?;
        }
    }
    // Its build makes this from a description of trace points; without them they are empty.
    let trace = ["INSERT", "DELETE", "UPDATE"].map(|what| {
        format!("#define MYSQL_{what}_ROW_START(database, table)\n#define MYSQL_{what}_ROW_DONE(error)\n")
    });
    fs::create_dir_all(dir.join("made"))?;
    fs::write(dir.join("made/probes_mysql_nodtrace.h"), trace.concat())?;
    fs::write(done, "")?;
    Ok(dir)
}

fn built(library: &Library, dir: &Path, version: &str) -> Result<PathBuf> {
    let plugin = dir.join(format!("otherworld_memory-{version}.so"));
    let made_of = plugin.with_extension("made-of");
    let archive = fs::read(library.dir.join("lib/libotherworld.a"))?;
    let key = lab::Key::new("plugin").with(PLUGIN).with(version).with_bytes(&archive).text();
    if plugin.exists() && fs::read_to_string(&made_of).is_ok_and(|old| old == key) {
        return Ok(plugin);
    }
    ui::note(&format!("building the plugin for MariaDB {version}"));
    let mut gcc = Command::new("g++");
    gcc.args(["-O2", "-Wall", "-Werror", "-fPIC", "-shared", "-s", "-std=c++17", "-fno-strict-aliasing"]);
    gcc.args(["-DMYSQL_DYNAMIC_PLUGIN", "-DHAVE_CONFIG_H", "-DDBUG_OFF", "-DNDEBUG"]);
    gcc.arg(format!("-DOTHERWORLD_SERVER_VERSION=\"{version}\""));
    let theirs = ["include", "sql", "storage/heap", "wsrep-lib/include", "wsrep-lib/wsrep-API/v26"];
    let theirs = theirs.map(|part| dir.join("source").join(part));
    for include in [dir.join("dev/usr/include/mariadb/server"), dir.join("made")].iter().chain(&theirs) {
        gcc.arg("-isystem").arg(include);
    }
    gcc.arg("-I").arg(library.dir.join("include"));
    gcc.arg(build::workspace().join("apps/mariadb/otherworld_memory.cc")).args(library.static_link());
    run(gcc.arg("-o").arg(&plugin))?;
    fs::write(made_of, key)?;
    Ok(plugin)
}

// ---- in the guest

fn data(name: &str) -> String {
    format!("/var/lib/{name}")
}

fn socket(name: &str) -> String {
    format!("/run/mysqld/{name}.sock")
}

fn log(name: &str) -> String {
    format!("{DIR}/{name}.log")
}

fn base(name: &str) -> String {
    format!("{DIR}/{name}.base")
}

/// The server, with the plugin of this directory.
fn server(name: &str, plugins: Option<&str>) -> Vec<String> {
    let mut argv = vec![
        "mariadbd".to_owned(),
        "--no-defaults".into(),
        format!("--datadir={}", data(name)),
        format!("--socket={}", socket(name)),
        format!("--pid-file={}/pid", data(name)),
        "--skip-networking".into(),
        "--innodb-use-native-aio=0".into(),
        "--innodb-buffer-pool-size=32M".into(),
        "--max-heap-table-size=512M".into(),
    ];
    if let Some(plugins) = plugins {
        argv.extend([
            format!("--plugin-dir={plugins}"),
            "--plugin-load-add=otherworld_memory".into(),
            "--plugin-maturity=experimental".into(),
            format!("--init-file={INIT_FILE}"),
        ]);
    }
    argv
}

fn plugins(name: &str) -> Option<&'static str> {
    (name != "mariadb").then_some(PLUGINS)
}

/// Starts a server and waits until it serves.
fn serve(agent: &mut Channel, name: &str, plugins: Option<&str>) -> Result<i32> {
    shell(agent, &format!("install -d -o mysql -g mysql /run/mysqld && rm -f {}", log(name)))?;
    let argv = server(name, plugins);
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let pid = agent.spawn(&Program::new(of_user("mysql", &argv)).stdout(log(name)))?;
    let ready = format!("mariadb-admin --socket={} ping 2>&1 || true", socket(name));
    let alive = until(agent, name, |agent| shell(agent, &ready), |text| text.contains("alive"));
    alive.with_context(|| file(agent, &log(name)).unwrap_or_default())?;
    Ok(pid)
}

fn stop(agent: &mut Channel, name: &str, pid: i32) -> Result<()> {
    shell(agent, &format!("kill {pid}; while [ -d /proc/{pid} ]; do sleep 0.1; done; rm -f {}", socket(name)))
        .map(drop)
}

fn sql(agent: &mut Channel, name: &str, statements: &str) -> Result<String> {
    let client = format!("mariadb --socket={} --default-character-set=utf8mb4 -N", socket(name));
    shell(agent, &format!("{client} <<'EOF'\n{statements}\nEOF"))
}

/// A new data directory: what the package's installation has made.
fn new_data(agent: &mut Channel, name: &str) -> Result<()> {
    let data = data(name);
    shell(agent, &format!("rm -rf {data} && cp -a /var/lib/mysql {data} && chown -R mysql: {data}")).map(drop)
}

/// Another version's plugin is refused; a dump that is not whole, or damaged, is never loaded; a whole one is.
fn refuses_what_it_must(agent: &mut Channel) -> Result<()> {
    const NAME: &str = "mariadb-trial";
    const COUNT: &str = "SELECT COUNT(*) FROM trial.t;";
    new_data(agent, NAME)?;
    let data = data(NAME);
    // The init file means nothing to a server without the plugin, and would end it.
    let mut argv = server(NAME, Some(&format!("{PLUGINS}-other")));
    argv.retain(|word| !word.starts_with("--init-file"));
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let pid = agent.spawn(&Program::new(of_user("mysql", &argv)).stdout(log(NAME)))?;
    let refused = format!("built for MariaDB {OTHER_VERSION}, and this is {SERVER_VERSION}");
    until(
        agent,
        "another version's plugin",
        |agent| file(agent, &log(NAME)),
        |text| text.contains(&refused),
    )?;
    let ready = format!("mariadb-admin --socket={} ping 2>&1 || true", socket(NAME));
    until(agent, NAME, |agent| shell(agent, &ready), |text| text.contains("alive"))?;
    stop(agent, NAME, pid)?;

    let pid = serve(agent, NAME, Some(PLUGINS))?;
    sql(
        agent,
        NAME,
        "CREATE DATABASE trial; USE trial; CREATE TABLE t (a INT, b CHAR(100)) ENGINE=MEMORY;\
         INSERT INTO t SELECT seq, 'text' FROM seq_1_to_20000; SET GLOBAL otherworld_memory_rehearse = ON;",
    )?;
    let rehearsal = format!("{data}/otherworld-memory.rehearsal");
    shell(agent, &format!("until [ -s {rehearsal} ]; do sleep 0.1; done; cp {rehearsal} {DIR}/rehearsal"))?;
    stop(agent, NAME, pid)?;
    let dump = format!("{data}/otherworld-memory.dump");
    let cases = [
        (format!("head -c 1000000 {DIR}/rehearsal > {dump}"), "otherworld-memory.dump: ", "0"),
        (
            format!("head -c 1000000 {DIR}/rehearsal > {data}/otherworld-memory.part"),
            "was not written to its end",
            "0",
        ),
        (
            format!(
                "cp {DIR}/rehearsal {dump} && printf X | dd of={dump} bs=1 seek=700000 conv=notrunc status=none"
            ),
            "a checksum is wrong",
            "0",
        ),
        (format!("cp {DIR}/rehearsal {dump}"), "trial.t has its 20000 rows again", "20000"),
    ];
    for (make, says, rows) in cases {
        shell(agent, &format!("{make} && chown mysql: {data}/otherworld-memory.*"))?;
        let pid = serve(agent, NAME, Some(PLUGINS))?;
        let said = file(agent, &log(NAME))?;
        ensure!(said.contains(says), "after `{make}` the server does not say \"{says}\":\n{said}");
        same(&format!("rows after `{make}`"), rows, sql(agent, NAME, COUNT)?.trim())?;
        let left = shell(agent, &format!("ls {data} | grep -c 'otherworld-memory.dump' || true"))?;
        ensure!(left.trim() == "0", "after `{make}` there is still a dump");
        stop(agent, NAME, pid)?;
    }
    shell(agent, &format!("rm -rf {data} {DIR}/rehearsal")).map(drop)
}

fn start(agent: &mut Channel, name: &str) -> Result<Vec<i32>> {
    new_data(agent, name)?;
    let pid = serve(agent, name, plugins(name))?;
    sql(
        agent,
        name,
        "CREATE DATABASE apps; CREATE USER app@localhost IDENTIFIED BY 'app'; GRANT ALL ON apps.* TO app@localhost;",
    )?;
    let each = rows_each(agent)?;
    for table in 0..TABLES {
        // Keys of both kinds, NULLs, all of Unicode.
        sql(
            agent,
            name,
            &format!(
                "USE apps; CREATE TABLE t{table} (id INT AUTO_INCREMENT PRIMARY KEY, worker INT NOT NULL, n INT NOT NULL, \
                 txt VARCHAR(40) CHARACTER SET utf8mb4, maybe INT NULL, KEY by_n USING BTREE (n), KEY by_text USING HASH (txt)) ENGINE=MEMORY;\
                 INSERT INTO t{table} (worker, n, txt, maybe) SELECT 0, seq, CONCAT('Zeile ', seq, ' ä€😀'), \
                 IF(seq % 7 = 0, NULL, seq % 1000) FROM seq_1_to_{each};"
            ),
        )?;
    }
    sql(
        agent,
        name,
        "USE apps; CREATE TABLE dropped (a INT) ENGINE=MEMORY; INSERT INTO dropped VALUES (1); DROP TABLE dropped;\
         CREATE TABLE flushed (a INT, b VARCHAR(200)) ENGINE=MEMORY; INSERT INTO flushed SELECT seq, REPEAT('x', seq % 200) FROM seq_1_to_1000;\
         DELETE FROM flushed WHERE a % 10 = 3; FLUSH TABLES flushed;",
    )?;
    let rows = rows(agent, name)?;
    agent.write_file(base(name), 0o644, rows.as_bytes())?;
    let ledger = Program::new(["python3", "ledger.py", &socket(name), &format!("{name}.stop")]);
    let ledger = agent.spawn(&ledger.uid(DEMO_UID).cwd(DIR).stdout(format!("{DIR}/{name}.ledger")))?;
    let out = format!("{DIR}/{name}.ledger");
    until(agent, "the clients", |agent| file(agent, &out), |text| text.contains("running"))?;
    Ok(vec![pid, ledger])
}

/// What the clients do not change: the tables' first rows, and a table that nobody uses.
fn rows(agent: &mut Channel, name: &str) -> Result<String> {
    let mut text = String::new();
    for table in 0..TABLES {
        text += &sql(
            agent,
            name,
            &format!(
                "SELECT COUNT(*), COUNT(maybe), SUM(CRC32(CONCAT_WS('|', id, n, txt, maybe))) FROM apps.t{table} WHERE worker = 0;"
            ),
        )?;
    }
    Ok(text + &sql(agent, name, "CHECKSUM TABLE apps.flushed; SHOW TABLES FROM apps;")?)
}

fn rows_each(agent: &mut Channel) -> Result<u64> {
    file(agent, ROWS_FILE)?.trim().parse().context("how many rows")
}

/// A server that is reading its tables back takes connections and lets them wait: that is no answer.
fn answers(agent: &mut Channel, name: &str) -> Result<bool> {
    let each = rows_each(agent)?;
    let ask = format!(
        "timeout 3 mariadb --socket={} -N -e 'SELECT n FROM apps.t0 WHERE n = {each}' || true",
        socket(name)
    );
    Ok(shell(agent, &ask)?.trim() == each.to_string())
}

/// What the clients say at their end.
#[derive(Debug, Deserialize)]
struct Ledger {
    acknowledged: Vec<u64>,
    errors: u64,
    wrong: Vec<serde_json::Value>,
}

/// That every acknowledged row is there, once, and everything else as it was; how many errors the clients have seen.
fn check(agent: &mut Channel, name: &str, before: &str) -> Result<u64> {
    // They write for a while under the new kernel.
    let written = "SELECT COUNT(*) FROM apps.t0 WHERE worker > 0;";
    let count: u64 = sql(agent, name, written)?.trim().parse()?;
    until(
        agent,
        "the clients",
        |agent| sql(agent, name, written),
        |now| now.trim().parse().is_ok_and(|now: u64| now > count + 3),
    )?;
    shell(agent, &format!("touch {DIR}/{name}.stop"))?;
    let out = format!("{DIR}/{name}.ledger");
    let text = until(agent, "the clients' end", |agent| file(agent, &out), |text| text.contains('}'))?;
    let ledger: Ledger = serde_json::from_str(text.lines().last().unwrap_or_default())?;
    ensure!(ledger.wrong.is_empty(), "the clients have read what they had not written: {:?}", ledger.wrong);
    let all: Vec<String> =
        (0..TABLES).map(|table| format!("SELECT worker, n FROM apps.t{table} WHERE worker > 0")).collect();
    let found = sql(
        agent,
        name,
        &format!(
            "SELECT worker, COUNT(*), COUNT(DISTINCT n), MAX(n) FROM ({}) AS everything GROUP BY worker ORDER BY worker;",
            all.join(" UNION ALL ")
        ),
    )?;
    let expected: String =
        ledger.acknowledged.iter().zip(1..).map(|(n, worker)| format!("{worker}\t{n}\t{n}\t{n}\n")).collect();
    same("what was acknowledged (worker, rows, different ones, last)", &expected, &found)?;
    ensure!(ledger.acknowledged.iter().all(|n| *n > 0), "some client has written nothing");
    same("rows", before, &rows(agent, name)?)?;
    Ok(ledger.errors)
}

fn lost(agent: &mut Channel, name: &str) -> Result<String> {
    let began = Instant::now();
    serve(agent, name, plugins(name))?;
    let took = began.elapsed();
    let mut left = 0;
    for table in 0..TABLES {
        left += sql(agent, name, &format!("SELECT COUNT(*) FROM apps.t{table};"))?.trim().parse::<u64>()?;
    }
    let all = TABLES * rows_each(agent)?;
    Ok(format!("{} of {all} rows; serves {:.1} s later", all - left.min(all), took.as_secs_f64()))
}
