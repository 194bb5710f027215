//! Handling programs in a guest: shells, files, answers that come some time.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lab::image::DEMO_UID;
use lab::{Channel, Program};

/// For one step in a guest, whatever it is.
pub const STEP_DEADLINE: Duration = Duration::from_secs(60);

/// Runs a script as root.
pub fn shell(agent: &mut Channel, script: &str) -> Result<String> {
    agent.shell(script, STEP_DEADLINE).with_context(|| format!("`{script}`"))
}

/// That something is what it was.
pub fn same(what: &str, before: &str, after: &str) -> Result<()> {
    ensure!(before == after, "{what} was\n{before}\nand is\n{after}");
    Ok(())
}

/// Repeats a question until the answer is right; an error after a minute, with the last answer.
pub fn until(
    agent: &mut Channel,
    what: &str,
    ask: impl Fn(&mut Channel) -> Result<String>,
    is_right: impl Fn(&str) -> bool,
) -> Result<String> {
    let start = Instant::now();
    loop {
        let answer = ask(agent)?;
        if is_right(&answer) {
            return Ok(answer);
        }
        ensure!(start.elapsed() < STEP_DEADLINE, "{what}: {}", answer.trim());
        // Nothing tells when a screen or a file changes.
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// A file's contents; empty if it is not there.
pub fn file(agent: &mut Channel, path: &str) -> Result<String> {
    Ok(String::from_utf8_lossy(&agent.read_file(path).unwrap_or_default()).into_owned())
}

/// A log's lines that tell of trouble.
pub fn log(agent: &mut Channel, path: &str) -> Result<String> {
    let trouble = ["error", "fatal", "panic", "warn", "crit", "abort", "interrupted"];
    let is_trouble = |line: &&str| trouble.iter().any(|word| line.to_lowercase().contains(word));
    let text = file(agent, path)?;
    Ok(text.lines().filter(is_trouble).map(|line| format!("{line}\n")).collect())
}

/// The process ids that a script prints.
pub fn pids(agent: &mut Channel, script: &str) -> Result<Vec<i32>> {
    let text = shell(agent, script)?;
    Ok(text.split_whitespace().filter_map(|word| word.parse().ok()).collect())
}

/// argv of a program that another user runs.
pub fn of_user(user: &str, argv: &[&str]) -> Vec<String> {
    let setpriv = ["setpriv", &format!("--reuid={user}"), &format!("--regid={user}"), "--init-groups", "--"]
        .map(String::from);
    setpriv.into_iter().chain(argv.iter().map(|word| word.to_string())).collect()
}

/// A directory of the guest's in which a test works.
#[derive(Debug, Clone, Copy)]
pub struct Place(pub &'static str);

impl Place {
    /// Runs a script there, as the user demo.
    pub fn demo(&self, agent: &mut Channel, script: &str) -> Result<String> {
        let program = Program::shell(script).uid(DEMO_UID).cwd(self.0);
        agent.run(&program, STEP_DEADLINE).with_context(|| format!("`{script}`"))
    }

    /// A client that reads its commands from a FIFO `NAME.in` and keeps it open, and writes to `NAME.out`.
    pub fn fifo_client(&self, agent: &mut Channel, name: &str, user: &str, client: &str) -> Result<i32> {
        let Self(dir) = self;
        let script = format!(
            "cd {dir} && rm -f {name}.in && mkfifo -m 666 {name}.in && exec 9<>{name}.in && exec {client} <{name}.in"
        );
        let argv = of_user(user, &["sh", "-c", &script]);
        let program = Program::new(argv).stdout(format!("{dir}/{name}.out"));
        let pid = agent.spawn(&program)?;
        shell(agent, &format!("until [ -p {dir}/{name}.in ]; do sleep 0.1; done"))?;
        Ok(pid)
    }

    /// Gives a client commands, and waits until its last line of output is this.
    pub fn tell(&self, agent: &mut Channel, name: &str, commands: &str, answer: &str) -> Result<()> {
        let Self(dir) = self;
        let fifo = format!("{dir}/{name}.in");
        shell(agent, &format!("cat > {fifo} <<'EOF'\n{commands}\nEOF"))?;
        let out = format!("{dir}/{name}.out");
        until(agent, name, |agent| file(agent, &out), |text| text.lines().last() == Some(answer)).map(drop)
    }
}
