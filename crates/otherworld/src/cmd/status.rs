//! `otherworld status`

use anyhow::Result;
use arm::{Check, Config, Root, Status, config};

use crate::cli::Exit;

#[derive(clap::Args)]
pub struct Args {
    /// For programs.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<Exit> {
    let root = Root::default();
    let armed = arm::Armed::load(&root).map_err(arm::Error::State)?;
    let path = armed.map_or_else(|| config::PATH.into(), |a| a.config_path);
    let config = Config::load(&root, &path)?;
    let status = arm::status(&root, &config, &super::this_program()?)?;
    if args.json {
        super::print_json(&status)?;
    } else {
        super::print(&text(&status))?;
    }
    let good = status.armed && status.stale.is_empty();
    Ok(if good { Exit::Done } else { Exit::NotPossible })
}

fn text(status: &Status) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    match (&status.details, status.armed) {
        (Some(a), true) => {
            line(format!("armed since {} with {}", crate::report::utc(a.armed_at), a.kernel.display()));
        }
        _ if status.crash_kernel_loaded => {
            line("not armed: another program has loaded its crash kernel".into())
        }
        _ => line("not armed".into()),
    }
    if status.generation > 0 {
        line(format!(
            "this is a crash kernel, generation {}: programs have survived a panic",
            status.generation
        ));
    }
    for why in &status.stale {
        line(format!("out of date: {why}; run `otherworld arm`"));
    }
    out + &table(&status.checks)
}

/// The checks, one a line, with what to do below those that failed.
pub fn table(checks: &[Check]) -> String {
    let mut out = String::new();
    for check in checks {
        let word = match (check.ok, check.required) {
            (true, _) => "ok",
            (false, true) => "MISSING",
            (false, false) => "advised",
        };
        out.push_str(&format!("{word:<8} {:<16} {}\n", check.name, check.detail));
        if !check.ok {
            out.push_str(&format!("{:25} remedy: {}\n", "", check.remedy));
        }
    }
    out
}
