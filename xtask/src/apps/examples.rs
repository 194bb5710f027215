//! The examples of libotherworld: notes (C) in both modes, and a cache (Rust) that checks itself.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use lab::image::DEMO_UID;
use lab::{Channel, Program};

use super::source::run;
use super::{App, DIR, File, HERE};
use crate::build;
use crate::in_guest::{file, shell, until};
use crate::libotherworld::Library;

const NOTES: &str = "/usr/local/bin/notes";
const CACHE: &str = "/usr/local/bin/cache";
/// Notes that are taken before the panic.
const COUNT: u32 = 2000;

pub const APPS: &[App] = &[
    App {
        program: "notes (C)",
        mode: "go on",
        name: "notes-continue",
        added: || 0,
        modified: 0,
        start: |agent| notes_start(agent, "continue"),
        look: |_| Ok(String::new()),
        answers: |agent| notes_answer(agent, "continue"),
        check: |agent, _| {
            let written = file(agent, &format!("{DIR}/notes-continue.saved"))?;
            ensure!(
                written == notes(),
                "its crash procedure has written {} bytes of {}",
                written.len(),
                notes().len()
            );
            notes_check(agent, "continue")
        },
        lost: |agent, _| notes_lost(agent, "continue"),
    },
    App {
        program: "notes (C)",
        mode: "restart",
        name: "notes-restart",
        added: || 0,
        modified: 0,
        start: |agent| notes_start(agent, "restart"),
        look: |_| Ok(String::new()),
        answers: |agent| notes_answer(agent, "restart"),
        check: |agent, _| {
            let out = file(agent, &format!("{DIR}/notes-restart.out"))?;
            let begun = out.lines().filter(|line| *line == "ready").count();
            ensure!(begun == 2, "it has begun {begun} times");
            notes_check(agent, "restart")
        },
        lost: |agent, _| notes_lost(agent, "restart"),
    },
    App {
        program: "cache (Rust)",
        mode: "go on",
        name: "cache",
        added: || 0,
        modified: 0,
        start: cache_start,
        look: |_| Ok(String::new()),
        answers: |agent| Ok(!shell(agent, "pgrep -x cache || true")?.is_empty()),
        check: |agent, _| {
            HERE.demo(agent, "touch cache.stop")?;
            let out = format!("{DIR}/cache.out");
            let right = "ready\ncalled 1, whole 4, constant true\n";
            until(agent, "the cache", |agent| file(agent, &out), |text| text == right).map(drop)
        },
        lost: |_, _| Ok("all".into()),
    },
];

/// Builds them.
pub fn files(library: &Library) -> Result<Vec<File>> {
    let dir = build::target_dir().join("apps/examples");
    fs::create_dir_all(&dir)?;
    let notes = dir.join("notes");
    let source = build::workspace().join("crates/crashproc/examples/c/notes.c");
    run(library.compiler().arg(source).args(library.static_link()).arg("-o").arg(&notes))?;
    let cache = build::example("crashproc", "cache")?;
    let read = |path: &std::path::Path| fs::read(path).with_context(|| path.display().to_string());
    Ok(vec![(NOTES.into(), 0o755, read(&notes)?), (CACHE.into(), 0o755, read(&cache)?)])
}

fn notes() -> String {
    (1..=COUNT).map(|n| format!("note {n}\n")).collect()
}

fn notes_start(agent: &mut Channel, mode: &str) -> Result<Vec<i32>> {
    let name = format!("notes-{mode}");
    let pid = HERE.fifo_client(agent, &name, "demo", &format!("{NOTES} {mode} {DIR}/{name}.saved"))?;
    let commands: String = (1..=COUNT).map(|n| format!("add note {n}\n")).collect();
    HERE.tell(agent, &name, &format!("{commands}count"), &COUNT.to_string())?;
    Ok(vec![pid])
}

fn notes_answer(agent: &mut Channel, mode: &str) -> Result<bool> {
    let name = format!("notes-{mode}");
    HERE.tell(agent, &name, "are you there", "what?")?;
    Ok(true)
}

fn notes_check(agent: &mut Channel, mode: &str) -> Result<()> {
    let name = format!("notes-{mode}");
    HERE.tell(agent, &name, "add one more\ncount", &(COUNT + 1).to_string())?;
    HERE.tell(agent, &name, "list\ncount", &(COUNT + 1).to_string())?;
    let out = file(agent, &format!("{DIR}/{name}.out"))?;
    ensure!(
        out.ends_with(&format!("{}one more\n{}\n", notes(), COUNT + 1)),
        "its notes are not the ones that it was told"
    );
    Ok(())
}

fn notes_lost(agent: &mut Channel, mode: &str) -> Result<String> {
    let saved = file(agent, &format!("{DIR}/notes-{mode}.saved"))?;
    Ok(format!("{} of {COUNT} notes", COUNT as usize - saved.lines().count()))
}

fn cache_start(agent: &mut Channel) -> Result<Vec<i32>> {
    let program = Program::new([CACHE, "cache.stop"]).uid(DEMO_UID).cwd(DIR);
    let pid = agent.spawn(&program.stdout(format!("{DIR}/cache.out")))?;
    let out = format!("{DIR}/cache.out");
    until(agent, "the cache", |agent| file(agent, &out), |text| text == "ready\n")?;
    Ok(vec![pid])
}
