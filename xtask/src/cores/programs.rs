//! The programs whose core files are looked at, and a guest in which they run.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use lab::{Channel, Key, Lab, Program, Series, Snapshot};

use super::DIR;
use crate::guest::{self, Processes};
use crate::in_guest::{file, shell, until};
use crate::{Global, build};

const C_PROGRAM: &str = include_str!("../../programs/threads.c");

/// Threads that wait in known places, and a main thread that waits for them.
const PYTHON: &str = "import threading, time
lock = threading.Lock()
def recurse(depth):
    recurse(depth - 1) if depth else lock.acquire()
lock.acquire()
threading.Thread(target=recurse, args=(20,)).start()
threading.Thread(target=time.sleep, args=(50000,)).start()
data = [list(range(n)) for n in range(500)]
print('ready', flush=True)
threading.Thread(target=recurse, args=(3,)).run()
";

/// Their names and files in the guest.
pub const ALL: &[(&str, &str)] = &[
    ("threads", "/root/cores/threads"),
    ("python3", "/usr/bin/python3"),
    ("mariadbd", "/usr/sbin/mariadbd"),
];

/// A guest in which the three run.
pub fn running(lab: &Lab, global: &Global, series: Series) -> Result<(Snapshot, Processes)> {
    let booted = lab.booted(&guest::for_programs(series, global.accel()))?;
    let inputs = Key::new("cores").with(C_PROGRAM).with(PYTHON).with(include_str!("programs.rs"));
    guest::running(lab, &booted, "cores", &inputs, |agent| {
        agent.push(&c_program()?, format!("{DIR}/threads"), 0o755)?;
        let out = |name: &str| format!("{DIR}/{name}.out");
        let ready = |agent: &mut Channel, name: &str| {
            until(
                agent,
                name,
                |agent| file(agent, &out(name)),
                |text| text.lines().any(|line| line == "ready"),
            )
        };
        // The kernel writes to the memory of whoever has registered for restartable sequences when it is on another CPU than before.
        let mut program = Program::new([format!("{DIR}/threads")]).cwd(DIR).stdout(out("c"));
        program.env.insert("GLIBC_TUNABLES".into(), "glibc.pthread.rseq=0".into());
        let threads = agent.spawn(&program)?;
        ready(agent, "c")?;
        let python = agent.spawn(&Program::new(["python3", "-c", PYTHON]).stdout(out("python")))?;
        ready(agent, "python")?;
        shell(agent, "install -d -o mysql -g mysql /run/mysqld")?;
        let argv = ["mariadbd", "--user=mysql", "--innodb_use_native_aio=0"];
        let mariadbd = agent.spawn(&Program::new(argv).stdout(out("mariadbd")))?;
        let ping = "mariadb-admin ping 2>&1 || true";
        until(agent, "mariadbd", |agent| shell(agent, ping), |text| text.contains("alive"))?;
        shell(
            agent,
            "mariadb -e 'CREATE DATABASE cores; USE cores; CREATE TABLE t (n INT PRIMARY KEY, t VARCHAR(20)) ENGINE=MEMORY; INSERT INTO t SELECT seq, CONCAT(\"row \", seq) FROM seq_1_to_20000'",
        )?;
        let processes = [("threads", threads), ("python3", python), ("mariadbd", mariadbd)];
        Ok(processes.into_iter().map(|(name, pid)| (name.to_owned(), vec![pid])).collect())
    })
}

/// Compiles the C program: statically, for it is to run in another system; its path.
fn c_program() -> Result<PathBuf> {
    let dir = build::target_dir().join("static");
    std::fs::create_dir_all(&dir)?;
    let (source, program) = (build::workspace().join("xtask/programs/threads.c"), dir.join("threads"));
    let flags = [
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-static",
        "-pthread",
        "-mavx",
        "-fno-optimize-sibling-calls",
    ];
    let mut gcc = Command::new("gcc");
    gcc.args(flags).arg("-o").arg(&program).arg(&source);
    ensure!(gcc.status().context("cannot run gcc")?.success(), "threads.c cannot be compiled");
    Ok(program)
}
