//! `otherworld disarm`

use anyhow::Result;
use arm::Root;

use crate::cli::Exit;

pub fn run() -> Result<Exit> {
    let done = arm::disarm(&Root::default())?;
    let mut text =
        String::from(if done.unloaded { "disarmed\n" } else { "the machine was not armed: nothing to do\n" });
    for name in done.left_alone {
        text.push_str(&format!("note: {name} was left as it is: somebody has changed it since\n"));
    }
    super::print(&text)?;
    Ok(Exit::Done)
}
