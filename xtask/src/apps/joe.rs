//! The editor JOE: with a crash procedure that saves, with one that goes on, and as Debian ships it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use lab::{Channel, Program};

use super::source::{Source, run};
use super::{App, DIR, File, HERE};
use crate::in_guest::{file, same, shell, until};
use crate::libotherworld::Library;
use crate::{build, ui};

const SOURCE: Source = Source { package: "joe", version: "4.6-1.1", tar: "joe_4.6.orig.tar.gz" };
const PATCH: &str = include_str!("../../../apps/joe/crash-procedure.patch");
const PATCHED: &str = "/usr/local/lib/joe-crash/joe";
const TMUX: &str = "tmux -L apps";
/// Bytes of the large document; more than 32 MB.
const BIG: usize = 34 << 20;
/// What is typed into each document at its beginning, before the typist comes.
const EDIT: &str = "unsaved ";
const DOCUMENTS: [&str; 3] = ["a.txt", "b.txt", "big.txt"];

pub const APPS: &[App] = &[
    App {
        program: "JOE",
        mode: "save and end",
        name: "joe-save",
        added,
        modified: 0,
        start: |agent| start(agent, "joe-save", &format!("JOE_CRASH_SAVE=1 {PATCHED}")),
        look: |agent| typed(agent, "joe-save").map(|n| n.to_string()),
        answers: |agent| Ok(file(agent, &format!("{DIR}/joe-save/a.txt"))?.contains("word")),
        check: check_saved,
        lost: |agent, _| lost(agent, "joe-save"),
    },
    App {
        program: "JOE",
        mode: "go on",
        name: "joe-go-on",
        added,
        modified: 0,
        start: |agent| start(agent, "joe-go-on", PATCHED),
        look: |agent| screen(agent, "joe-go-on"),
        answers: |agent| grows(agent, "joe-go-on"),
        check: |agent, before| check_gone_on(agent, "joe-go-on", before),
        lost: |agent, _| lost(agent, "joe-go-on"),
    },
    App {
        program: "JOE",
        mode: "unmodified",
        name: "joe",
        added: || 0,
        modified: 0,
        start: |agent| start(agent, "joe", "joe"),
        look: |agent| screen(agent, "joe"),
        answers: |agent| grows(agent, "joe"),
        check: |agent, before| check_gone_on(agent, "joe", before),
        lost: |agent, _| lost(agent, "joe"),
    },
];

fn added() -> usize {
    PATCH.lines().filter(|line| line.starts_with('+') && !line.starts_with("+++")).count()
}

/// Builds JOE with the patch.
pub fn files(library: &Library) -> Result<Vec<File>> {
    let removed = PATCH.lines().filter(|line| line.starts_with('-') && !line.starts_with("---")).count();
    ensure!(removed == 0 && added() <= 25, "the patch removes {removed} lines and adds {}", added());
    let binary = built(library)?;
    let data = fs::read(&binary).with_context(|| binary.display().to_string())?;
    let typist = include_bytes!("../../programs/typist.py").to_vec();
    Ok(vec![(PATCHED.into(), 0o755, data), (format!("{DIR}/typist.py"), 0o644, typist)])
}

fn built(library: &Library) -> Result<PathBuf> {
    let dir = build::target_dir().join("apps/joe");
    let binary = dir.join("joe/joe");
    let made_of = dir.join("made-of");
    let archive = fs::read(library.dir.join("lib/libotherworld.a"))?;
    let key = lab::Key::new("joe").with(PATCH).with(SOURCE.version).with_bytes(&archive).text();
    if binary.exists() && fs::read_to_string(&made_of).is_ok_and(|old| old == key) {
        return Ok(binary);
    }
    SOURCE.unpack(&dir, &[])?;
    ui::note("building JOE with a crash procedure");
    fs::write(dir.join("crash-procedure.patch"), PATCH)?;
    run(Command::new("patch").current_dir(&dir).args(["-p1", "--fuzz=0", "-i", "crash-procedure.patch"]))?;
    let include = format!("-I{}", library.dir.join("include").display());
    run(Command::new("./configure")
        .current_dir(&dir)
        .args(["--prefix=/usr", "--sysconfdir=/etc", "--disable-dependency-tracking"])
        .env("CPPFLAGS", include)
        .env("LIBS", library.static_link().join(" ")))?;
    run(Command::new("make").current_dir(&dir).args(["-s", "-j2"]))?;
    fs::write(made_of, key)?;
    Ok(binary)
}

// ---- in the guest

fn original(document: &str) -> String {
    match document {
        "big.txt" => "one line of many, all of the same length of 64 bytes and no more\n".repeat(BIG / 65),
        _ => format!("{document} as it is on the disk\nand its second line\n"),
    }
}

fn keys(agent: &mut Channel, name: &str, keys: &str) -> Result<()> {
    HERE.demo(agent, &format!("{TMUX} send-keys -t ={name}: {keys}")).map(drop)
}

fn screen(agent: &mut Channel, name: &str) -> Result<String> {
    HERE.demo(agent, &format!("{TMUX} capture-pane -p -t ={name}:"))
}

fn start(agent: &mut Channel, name: &str, joe: &str) -> Result<Vec<i32>> {
    let dir = format!("{DIR}/{name}");
    for document in DOCUMENTS {
        agent.write_file(format!("{dir}/{document}.original"), 0o644, original(document).as_bytes())?;
        shell(agent, &format!("cd {dir} && cp {document}.original {document}"))?;
    }
    shell(agent, &format!("chown -R demo: {dir} && sync"))?;
    let documents = DOCUMENTS.join(" ");
    HERE.demo(
        agent,
        &format!(
            "{TMUX} -f /dev/null new-session -d -s {name} -x 100 -y 40 -c {dir} '{joe} --nonotice {documents}' && \
             {TMUX} set-option -g status off"
        ),
    )?;
    until(agent, name, |agent| screen(agent, name), |text| text.contains("one line of many"))?;
    for document in DOCUMENTS {
        keys(agent, name, &format!("'{EDIT}'"))?;
        let is_there = |text: &str| {
            text.lines().any(|line| line.starts_with(EDIT) && line.contains(first_words(document)))
        };
        until(agent, document, |agent| screen(agent, name), is_there)?;
        keys(agent, name, "C-k n")?;
    }
    let editor = HERE.demo(agent, &format!("{TMUX} list-panes -t ={name}: -F '#{{pane_pid}}'"))?;
    let editor = editor.trim().parse().context("no editor")?;
    let typist = Program::new(["python3", "typist.py", name]).uid(lab::image::DEMO_UID).cwd(DIR);
    let typist = agent.spawn(&typist.stdout(format!("{DIR}/{name}.typist")))?;
    until(agent, name, |agent| Ok(typed(agent, name)?.to_string()), |count| count != "0")?;
    Ok(vec![editor, typist])
}

fn first_words(document: &str) -> &'static str {
    if document == "big.txt" { "one line of many" } else { "as it is on the disk" }
}

/// How many words of the typist's are on the screen: it is a long line, and its end is shown.
fn typed(agent: &mut Channel, name: &str) -> Result<u64> {
    Ok(last_word(&screen(agent, name)?))
}

fn last_word(text: &str) -> u64 {
    let words = text.split_whitespace().filter_map(|word| word.strip_prefix("word")?.parse().ok());
    words.max().unwrap_or(0)
}

fn grows(agent: &mut Channel, name: &str) -> Result<bool> {
    let before = typed(agent, name)?;
    Ok(before > 0 && typed(agent, name)? > before)
}

/// The rows that typing does not change: not the typed line, and not the line of its window that says the column.
fn still(screen: &str) -> String {
    let is_still = |line: &&str| !line.contains("word") && !line.contains("Row 1 ");
    screen.lines().filter(is_still).map(|line| format!("{line}\n")).collect()
}

/// The text that was typed: all words up to this one.
fn words(count: u64) -> String {
    (1..=count).map(|n| format!("word{n} ")).collect()
}

/// That the documents hold what was typed, and everything else that they held: how many words.
fn documents(agent: &mut Channel, name: &str) -> Result<u64> {
    let typed = DOCUMENTS[0];
    let text = file(agent, &format!("{DIR}/{name}/{typed}"))?;
    let count = last_word(&text);
    // The typist may have been amid a word.
    let head = format!("{EDIT}{}", words(count));
    let is_whole = text.starts_with(&head) && text.ends_with(&original(typed));
    ensure!(is_whole, "{typed} is\n{text}\nand not\n{head}{}", original(typed));
    for document in &DOCUMENTS[1..] {
        // In the guest: one of them is large.
        let compare = format!("(printf '{EDIT}'; cat {document}.original) | cmp - {document}");
        let what = format!("{document} is not what was edited");
        shell(agent, &format!("cd {DIR}/{name} && {compare}")).context(what)?;
    }
    Ok(count)
}

fn check_saved(agent: &mut Channel, before: &str) -> Result<()> {
    let before: u64 = before.parse()?;
    until(
        agent,
        "the saved file",
        |agent| file(agent, &format!("{DIR}/joe-save/a.txt")),
        |text| text.contains("word"),
    )?;
    let sessions = format!("{TMUX} list-sessions -F '#S' || true");
    let is_gone = |text: &str| text.lines().all(|name| name != "joe-save");
    until(agent, "the editor's end", |agent| HERE.demo(agent, &sessions), is_gone)?;
    let saved = documents(agent, "joe-save")?;
    ensure!(saved >= before, "{before} words were on the screen and {saved} are in the file");
    let locks = shell(agent, &format!("ls -A {DIR}/joe-save"))?;
    ensure!(!locks.contains(".#"), "stale locks: {locks}");
    Ok(())
}

fn check_gone_on(agent: &mut Channel, name: &str, before: &str) -> Result<()> {
    let now = screen(agent, name)?;
    same("its screen but for what is typed", &still(before), &still(&now))?;
    let count = last_word(before);
    ensure!(count > 0, "nobody had typed");
    // It goes on under the typist's hands.
    until(
        agent,
        name,
        |agent| Ok(typed(agent, name)?.to_string()),
        |now| now.parse::<u64>().is_ok_and(|now| now > count + 3),
    )?;
    HERE.demo(agent, &format!("touch {name}.stop"))?;
    let ledger = format!("{DIR}/{name}.typist");
    let text = until(agent, "the typist", |agent| file(agent, &ledger), |text| text.contains("typed "))?;
    let count: u64 = text.trim().rsplit(' ').next().unwrap_or_default().parse().context("the ledger")?;
    until(
        agent,
        "the last word",
        |agent| Ok(typed(agent, name)?.to_string()),
        |now| now == count.to_string(),
    )?;
    // Its documents are the ones that were edited: it writes them when it is told to.
    for _ in DOCUMENTS {
        keys(agent, name, "C-k d")?;
        until(agent, name, |agent| screen(agent, name), |text| text.contains("Name of file to save"))?;
        keys(agent, name, "Enter")?;
        until(agent, name, |agent| screen(agent, name), |text| text.contains("saved"))?;
        keys(agent, name, "C-k n")?;
    }
    until(agent, name, |agent| screen(agent, name), |text| !text.contains("(Modified)"))?;
    let saved = documents(agent, name)?;
    ensure!(saved == count, "{count} words were typed and {saved} are in the file");
    Ok(())
}

fn lost(agent: &mut Channel, name: &str) -> Result<String> {
    let mut lost = 0;
    for document in DOCUMENTS {
        let is_lost =
            format!("cd {DIR}/{name} && cmp -s {document} {document}.original && echo lost || true");
        lost += usize::from(!shell(agent, &is_lost)?.is_empty());
    }
    let locks = shell(agent, &format!("ls -A {DIR}/{name} | grep -c '^\\.#' || true"))?;
    Ok(format!("all edits of {lost} documents; {} stale locks", locks.trim()))
}
