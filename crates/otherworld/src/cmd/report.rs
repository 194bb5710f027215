//! `otherworld report`

use std::path::PathBuf;

use anyhow::{Context, Result};
use arm::{Config, Root, config};

use crate::cli::Exit;
use crate::report::Report;

#[derive(clap::Args)]
pub struct Args {
    /// A report's file; the latest one when it is left out.
    file: Option<PathBuf>,
    /// List the reports there are.
    #[arg(long, conflicts_with = "file")]
    list: bool,
    /// Print every process that was asked for with all its reasons, and everything that was noticed, instead of one page.
    #[arg(long)]
    all: bool,
    /// Print the kernel log of the dead kernel too.
    #[arg(long)]
    log: bool,
    /// For programs: the report, or the list, as JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<Exit> {
    let config = Config::load(&Root::default(), config::PATH.as_ref())?;
    if args.list {
        let mut names: Vec<String> = std::fs::read_dir(&config.report.dir)
            .with_context(|| format!("no reports: {}", config.report.dir.display()))?
            .filter_map(|e| Some(e.ok()?.path().display().to_string()))
            .filter(|name| name.ends_with(".json") && !name.ends_with("latest.json"))
            .collect();
        names.sort();
        if args.json {
            super::print_json(&names)?;
            return Ok(Exit::Done);
        }
        super::print(&names.iter().map(|n| format!("{n}\n")).collect::<String>())?;
        return Ok(Exit::Done);
    }
    let path = args.file.clone().unwrap_or_else(|| config.report.dir.join("latest.json"));
    let bytes = std::fs::read(&path).with_context(|| {
        format!("there is no report at {}; has this machine survived a panic?", path.display())
    })?;
    if args.json {
        super::print(&String::from_utf8_lossy(&bytes))?;
        return Ok(Exit::Done);
    }
    let report: Report =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not a report", path.display()))?;
    let mut text = match args.all {
        false => report.to_page(),
        true => {
            let findings = report.findings.iter().map(|finding| {
                let process = finding.pid.map(|pid| format!("process {pid}: ")).unwrap_or_default();
                format!("{:?}: {process}{}: {}\n", finding.severity, finding.object, finding.text)
            });
            let header = format!("{}, generation {}\n", report.started, report.generation);
            header + &report.to_text() + &findings.collect::<String>()
        }
    };
    if args.log {
        for record in report.panic.iter().flat_map(|p| &p.log) {
            text.push_str(&super::inspect::log_line(record));
        }
    }
    super::print(&text)?;
    Ok(Exit::Done)
}
