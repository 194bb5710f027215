//! `otherworld disarm`

use anyhow::Result;
use arm::Root;

use crate::cli::Exit;

pub fn run() -> Result<Exit> {
    let done = arm::disarm(&Root::default())?;
    let mut text =
        String::from(if done.unloaded { "disarmed\n" } else { "the machine was not armed: nothing to do\n" });
    match done.foreign_loaded {
        Some(true) => text.push_str("the crash kernel of kdump-tools is loaded again\n"),
        Some(false) => text.push_str(
            "note: the crash kernel that was loaded before arming is not loaded: load it again with its own tool\n",
        ),
        None => {}
    }
    for name in done.left_alone {
        text.push_str(&format!("note: {name} was left as it is: somebody has changed it since\n"));
    }
    super::print(&text)?;
    Ok(Exit::Done)
}
