//! `otherworld arm`

use std::path::PathBuf;

use anyhow::Result;
use arm::{Config, Options, Root, config};

use crate::cli::Exit;

#[derive(clap::Args)]
pub struct Args {
    /// Configuration file.
    #[arg(long, value_name = "FILE", default_value = config::PATH)]
    config: PathBuf,
    /// Use another (static) program as the crash kernel's init, to measure or debug the crash kernel itself.
    #[arg(long, value_name = "PROGRAM")]
    init: Option<PathBuf>,
    /// Only check whether the machine can be armed.
    #[arg(long)]
    check: bool,
    /// The checks, for programs.
    #[arg(long, requires = "check")]
    json: bool,
    /// Print the annotated default configuration and do nothing.
    #[arg(long)]
    print_config: bool,
}

pub fn run(args: &Args) -> Result<Exit> {
    if args.print_config {
        super::print(config::DEFAULT)?;
        return Ok(Exit::Done);
    }
    let root = Root::default();
    let config = Config::load(&root, &args.config)?;
    let init = args.init.clone().map_or_else(super::this_program, Ok)?;
    if args.check {
        let checks = arm::check(&root, &config, &init);
        if args.json {
            super::print_json(&checks)?;
        } else {
            super::print(&super::status::table(&checks))?;
        }
        let possible = checks.iter().all(|c| c.ok || !c.required);
        return Ok(if possible { Exit::Done } else { Exit::NotPossible });
    }
    let options = Options { init, config_path: args.config.clone() };
    let armed = super::with_spinner("building the crash initramfs and loading the crash kernel", || {
        arm::arm(&root, &config, &options)
    })?;
    let mut text = format!(
        "armed: {} with an initramfs of {} KiB\n",
        armed.kernel.display(),
        armed.initramfs_bytes.div_ceil(1024)
    );
    if config.policy.mode == snapshot::Mode::Selected && config.policy.select.is_empty() {
        text.push_str(&format!(
            "note: {} selects no process; after a panic none will go on\n",
            args.config.display()
        ));
    }
    if armed.replaced_foreign {
        text.push_str("note: this took the place of another program's crash kernel; `otherworld disarm` loads kdump-tools' again\n");
    }
    if armed.saver.is_none() {
        text.push_str("note: the register saver is not loaded; `otherworld status` says what that means\n");
    }
    super::print(&text)?;
    Ok(Exit::Done)
}
