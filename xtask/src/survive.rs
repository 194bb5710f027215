//! `cargo xtask survivors`: one small program per kind of kernel state, through a panic.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use lab::image::DEMO_UID;
use lab::{Guest, Lab, MachineConfig, Panic, Program, Series};
use survivors::{Expect, Needs, Survivor, TABLE};

use crate::crash::{self, Quiet};
use crate::crash_runs::Tally;
use crate::guest::{self, Installation};
use crate::{Global, ui};

const PROGRAM: &str = "/usr/local/lib/otherworld/survivors/survivors";
const READY_DEADLINE: Duration = Duration::from_secs(240);
const VERDICT_DEADLINE: Duration = Duration::from_secs(120);

/// Starts the survivors, panics the guest, and holds what became of each against what is promised.
#[derive(Debug, Args)]
pub struct Survivors {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// Only those whose name contains one of these words.
    names: Vec<String>,
    /// Survivors damage their own state before they check it: all must fail (to see that they can).
    #[arg(long)]
    damage: bool,
    /// Leave the register saver module out.
    #[arg(long)]
    no_saver: bool,
}

impl Survivors {
    /// All survivors on one kernel, as part of the tests.
    pub fn new(kernel: Series) -> Self {
        Self { kernel: Some(kernel), names: Vec::new(), damage: false, no_saver: false }
    }

    /// Runs it; whether all became what is promised.
    pub fn run(self, global: &Global) -> Result<bool> {
        let tally = self.count(global)?;
        ui::finish();
        println!("{} passed, {} failed", tally.passed, tally.failed);
        Ok(tally.failed == 0 && tally.passed > 0)
    }

    /// Runs it and counts.
    pub fn count(self, global: &Global) -> Result<Tally> {
        let chosen: Vec<&Survivor> = TABLE
            .iter()
            .filter(|survivor| self.names.is_empty() || self.names.iter().any(|name| survivor.name.contains(name.as_str())))
            .collect();
        if chosen.is_empty() {
            bail!("no survivor's name contains {}", self.names.join(" or "));
        }
        let lab = global.lab()?;
        let mut tally = Tally::default();
        for series in crate::series_or_all(self.kernel) {
            let config = MachineConfig::new(series, global.accel());
            self.on(&lab, &config, &chosen, &mut tally).with_context(|| format!("survivors on kernel {series}"))?;
        }
        Ok(tally)
    }

    fn on(&self, lab: &Lab, config: &MachineConfig, chosen: &[&Survivor], tally: &mut Tally) -> Result<()> {
        let installation = Installation { saver: !self.no_saver, ..Installation::for_programs(PROGRAM) };
        let armed = guest::armed(lab, &lab.booted(config)?, &installation)?;
        let name = format!("survivors-{}", config.series);
        let mut guest = lab.start(&armed, &name)?;
        ui::note(&format!("starting {} survivors on kernel {}", chosen.len(), config.series));
        let pids = self.start(&mut guest, chosen)?;
        // CPU 0 panics; the computing survivors are on CPU 1, caught in user mode.
        let panic = Panic { cpu: Some(0), alive: pids.values().copied().collect(), ..Panic::default() };
        let Some(line) = crash::crash(&mut guest, &panic, &mut Quiet)? else { bail!("some survivor had ended before the panic") };
        ui::note("waiting for them under the second kernel");
        let mut timeline = Vec::new();
        crash::wait_agent(&mut guest, &line, &mut timeline, &mut Quiet).inspect_err(|_| _ = guest.keep_artifacts())?;
        crash::fetch_report(&mut guest)?;
        let all: Vec<i32> = pids.values().copied().collect();
        guest.agent.wait(&all, VERDICT_DEADLINE)?;
        let report: serde_json::Value = fs::read_to_string(guest.dir.join("report.json"))
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        let mut failed = 0;
        for survivor in chosen {
            let line = guest.agent.read_file(out(survivor)).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).trim().to_owned();
            let fate = pids.get(survivor.name).and_then(|&pid| fate(&report, pid)).unwrap_or_default();
            match verdict(survivor, &line, &fate, self.damage) {
                None => tally.passed += 1,
                Some(why) => {
                    failed += 1;
                    ui::line(format!("kernel {}: {} ({}): {why}", config.series, survivor.name, survivor.shows));
                }
            }
        }
        tally.failed += failed;
        if failed > 0 {
            guest.keep_artifacts()?;
            ui::line(format!("         artifacts: {}", guest.dir.display()));
        }
        Ok(())
    }

    /// Starts them, those that can as the unprivileged user; their process ids.
    fn start(&self, guest: &mut Guest, chosen: &[&Survivor]) -> Result<BTreeMap<String, i32>> {
        let mut pids = BTreeMap::new();
        for root in [false, true] {
            let of_this_user: Vec<_> = chosen.iter().filter(|survivor| needs_root(survivor) == root).collect();
            for computing in [false, true] {
                let names: Vec<_> = of_this_user.iter().filter(|survivor| (survivor.name == "fpu-loop") == computing).collect();
                if names.is_empty() {
                    continue;
                }
                let mut argv = vec![PROGRAM, "start", "--dir", directory(root), "--timeout", "200"];
                if self.damage {
                    argv.push("--damage");
                }
                if computing {
                    argv.extend(["--cpu", "1"]);
                }
                argv.extend(names.iter().map(|survivor| survivor.name));
                let program = Program::new(argv).uid(if root { 0 } else { DEMO_UID });
                let output = guest.agent.run(&program, READY_DEADLINE)?;
                for line in output.lines() {
                    let mut words = line.split_whitespace();
                    if let (Some("ready"), Some(name), Some(Ok(pid))) = (words.next(), words.next(), words.next().map(str::parse)) {
                        pids.insert(name.to_owned(), pid);
                    }
                }
            }
        }
        Ok(pids)
    }
}

fn needs_root(survivor: &Survivor) -> bool {
    matches!(survivor.needs, Needs::Root | Needs::Tty)
}

fn directory(root: bool) -> &'static str {
    if root { "/root/survivors" } else { "/home/demo/survivors" }
}

fn out(survivor: &Survivor) -> String {
    format!("{}/{}", directory(needs_root(survivor)), survivor.name)
}

/// What the report says of a process: its fate and all reasons, as one text.
fn fate(report: &serde_json::Value, pid: i32) -> Option<String> {
    let process = report["processes"].as_array()?.iter().find(|process| process["pid"] == pid)?;
    Some(format!("{} {}", process["fate"].as_str()?, process["reasons"]))
}

/// Why it did not become what is promised.
fn verdict(survivor: &Survivor, line: &str, fate: &str, damage: bool) -> Option<String> {
    let name = survivor.name;
    match survivor.expect {
        Expect::Survives if damage && line.starts_with(&format!("fail {name}")) => None,
        Expect::Survives if !damage && line == format!("pass {name}") => None,
        Expect::Survives if line.is_empty() => Some(format!("no verdict; its fate: {fate}")),
        Expect::Survives => Some(line.to_owned()),
        Expect::GivenUp(_) if !line.is_empty() => Some(format!("was to be given up, but said: {line}")),
        Expect::GivenUp(reason) if fate.starts_with("given-up") && fate.contains(reason) => None,
        Expect::GivenUp(reason) => Some(format!("was to be given up because of \"{reason}\"; its fate: {fate}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_held_against_the_promise() {
        let survives = survivors::find("memory-small").unwrap();
        assert_eq!(verdict(survives, "pass memory-small", "resurrected []", false), None);
        assert!(verdict(survives, "", "given-up []", false).unwrap().contains("given-up"));
        assert!(verdict(survives, "fail memory-small: page 3", "", false).is_some());
        assert!(verdict(survives, "pass memory-small", "", true).is_some());
        let given_up = survivors::find("socket-tcp").unwrap();
        assert_eq!(verdict(given_up, "", "given-up [{\"text\":\"a socket\"}]", false), None);
        assert!(verdict(given_up, "", "resurrected []", false).is_some());
        assert!(verdict(given_up, "pass socket-tcp", "given-up socket", false).is_some());
    }
}
