//! The demo's five programs: unmodified Debian packages with something to do for some ten seconds under emulation, whose
//! output does not depend on time.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::image::DEMO_UID;
use lab::{Channel, Key, Lab, MachineConfig, Program, Snapshot};
use serde::{Deserialize, Serialize};

/// Where they live in the guest.
const DIR: &str = "/home/demo/programs";
const INPUT_BYTES: u32 = 42_000_000;
const SET_UP_DEADLINE: Duration = Duration::from_secs(180);
/// A program that ends sooner is done before most panics, or is not doing what it should.
const SHORTEST_RUN: Duration = Duration::from_secs(4);
const RUN_DEADLINE: Duration = Duration::from_secs(400);

/// Files pushed into the guest.
const FILES: &[(&str, &str)] = &[
    ("chain.py", include_str!("../workloads/chain.py")),
    ("fill.sql", include_str!("../workloads/fill.sql")),
    ("input.py", include_str!("../workloads/input.py")),
    ("pipeline.sh", include_str!("../workloads/pipeline.sh")),
    ("ticks.sh", include_str!("../workloads/ticks.sh")),
];

/// One of the five.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Short name.
    pub name: &'static str,
    /// What it does, for people.
    pub what: &'static str,
    argv: &'static [&'static str],
    stdin: Option<&'static str>,
    stdout: Option<&'static str>,
    /// The file whose bytes decide, relative to the programs' directory.
    pub output: &'static str,
}

/// The five.
pub const WORKLOADS: [Workload; 5] = [
    Workload {
        name: "python3",
        what: "a SHA-256 chain, each 1000th link appended to a file",
        argv: &["python3", "chain.py", "240000", "chain.out"],
        stdin: None,
        stdout: None,
        output: "chain.out",
    },
    Workload {
        name: "xz",
        what: "compresses 42 MB with two threads",
        argv: &["xz", "-T2", "-6", "--keep", "input"],
        stdin: None,
        stdout: None,
        output: "input.xz",
    },
    Workload {
        name: "sqlite3",
        what: "fills a database in memory, prints its checksum",
        // Without the first command it sorts in a deleted file; it also drops the parameters that are set so far.
        argv: &[
            "sqlite3",
            "-cmd",
            "PRAGMA temp_store = MEMORY;",
            "-cmd",
            ".parameter set :rows 70000",
            ":memory:",
        ],
        stdin: Some("fill.sql"),
        stdout: Some("sqlite.out"),
        output: "sqlite.out",
    },
    Workload {
        name: "pipeline",
        what: "producer | sort | sha256sum",
        argv: &["sh", "pipeline.sh", "400000", "pipeline.out"],
        stdin: None,
        stdout: None,
        output: "pipeline.out",
    },
    Workload {
        name: "ticks",
        what: "a shell loop that sleeps and counts by the clock",
        argv: &["sh", "ticks.sh", "90", "ticks.out"],
        stdin: None,
        stdout: None,
        output: "ticks.out",
    },
];

/// Starts all five; their process ids in the order of [`WORKLOADS`].
pub fn start(agent: &mut Channel) -> Result<Vec<i32>> {
    WORKLOADS
        .iter()
        .enumerate()
        .map(|(n, workload)| {
            let mut program = Program::new(workload.argv.iter().copied()).uid(DEMO_UID).cwd(DIR);
            program.env.insert("LC_ALL".into(), "C".into());
            if let Some(file) = workload.stdin {
                program = program.stdin(format!("{DIR}/{file}"));
            }
            if let Some(file) = workload.stdout {
                program = program.stdout(format!("{DIR}/{file}"));
            }
            program = program.stderr(format!("{DIR}/stderr.{n}"));
            Ok(agent.spawn(&program)?)
        })
        .collect()
}

/// An output as the guest has it now; none if there is no such file.
pub fn output(agent: &mut Channel, workload: &Workload) -> Option<Vec<u8>> {
    agent.read_file(format!("{DIR}/{}", workload.output)).ok()
}

/// What a program wrote to standard error.
pub fn complaints(agent: &mut Channel, n: usize) -> String {
    agent
        .read_file(format!("{DIR}/stderr.{n}"))
        .map_or_else(|_| String::new(), |text| String::from_utf8_lossy(&text).into_owned())
}

/// How long the uninterrupted run took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reference {
    /// Milliseconds from the last program's start to each one's end.
    pub ended_ms: Vec<u64>,
}

impl Reference {
    /// For how long all five were running, in milliseconds.
    pub fn all_alive_ms(&self) -> u64 {
        self.ended_ms.iter().copied().min().unwrap_or(0)
    }
}

/// How the uninterrupted run went in a [`prepared`] layer.
pub fn reference(prepared: &Snapshot) -> Result<Reference> {
    let path = prepared.dir.join("reference/reference.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// A booted guest with the programs and their input in place.
pub fn with_input(lab: &Lab, config: &MachineConfig) -> Result<Snapshot> {
    let booted = lab.booted(config)?;
    let mut inputs = Key::new("input").with(&INPUT_BYTES.to_string());
    for (name, text) in FILES {
        inputs = inputs.with(name).with(text);
    }
    let snapshot = lab.derive(&booted, "input", &inputs, |agent, _| {
        lab.note("making the programs' input (once)");
        for (name, text) in FILES {
            agent.write_file(format!("{DIR}/{name}"), 0o644, text.as_bytes())?;
        }
        let script = format!("cd {DIR} && python3 input.py {INPUT_BYTES} input && chown -R demo: {DIR}");
        agent.shell(&script, SET_UP_DEADLINE).map(drop)
    })?;
    Ok(snapshot)
}

/// The same guest after the programs' uninterrupted run in it; its outputs are in the snapshot's directory, no longer in the guest.
pub fn prepared(lab: &Lab, config: &MachineConfig) -> Result<Snapshot> {
    let input = with_input(lab, config)?;
    let snapshot = lab.derive(
        &input,
        "programs",
        &Key::new("programs").with(&format!("{WORKLOADS:?}")),
        |agent, machine| {
            lab.note("the programs' uninterrupted run (once, for reference)");
            let failed = |error: anyhow::Error| lab::Error::Guest(format!("{error:#}"));
            run_reference(agent, &machine.dir.join("reference")).map_err(failed)?;
            agent.shell(&format!("cd {DIR} && rm -f *.out input.xz stderr.*"), SET_UP_DEADLINE).map(drop)
        },
    )?;
    Ok(snapshot)
}

fn run_reference(agent: &mut Channel, dir: &std::path::Path) -> Result<()> {
    let pids = start(agent)?;
    let started = Instant::now();
    let mut ended_ms = vec![0; pids.len()];
    let mut left = pids.clone();
    while !left.is_empty() {
        ensure!(
            started.elapsed() < RUN_DEADLINE,
            "the uninterrupted run did not end within {} s",
            RUN_DEADLINE.as_secs()
        );
        left = agent.wait(&left, Duration::from_millis(200))?;
        for (pid, ended) in pids.iter().zip(&mut ended_ms) {
            if *ended == 0 && !left.contains(pid) {
                *ended = started.elapsed().as_millis() as u64;
            }
        }
    }
    std::fs::create_dir_all(dir)?;
    for (n, workload) in WORKLOADS.iter().enumerate() {
        let complaints = complaints(agent, n);
        ensure!(complaints.is_empty(), "{} complained in the uninterrupted run: {complaints}", workload.name);
        let output = output(agent, workload).with_context(|| format!("{} wrote nothing", workload.name))?;
        ensure!(!output.is_empty(), "{} wrote nothing", workload.name);
        std::fs::write(dir.join(workload.output), output)?;
        ensure!(
            Duration::from_millis(ended_ms[n]) >= SHORTEST_RUN,
            "{} ended after {} ms in the uninterrupted run: too soon for a panic at a random moment",
            workload.name,
            ended_ms[n]
        );
    }
    std::fs::write(dir.join("reference.json"), serde_json::to_string(&Reference { ended_ms })?)?;
    Ok(())
}
