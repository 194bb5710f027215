//! `otherworld man`

use anyhow::Result;

use crate::cli::Exit;

/// Prints the manual: one page, the subcommands' after each other.
pub fn run(command: clap::Command) -> Result<Exit> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    for sub in command.get_subcommands().filter(|s| !s.is_hide_set()) {
        let name: &'static str = Box::leak(format!("otherworld {}", sub.get_name()).into_boxed_str());
        let man = clap_mangen::Man::new(sub.clone().name(name).bin_name(name).disable_help_flag(true));
        page.extend(b".SH COMMAND: ");
        page.extend(name.to_uppercase().bytes());
        page.push(b'\n');
        man.render_description_section(&mut page)?;
        man.render_options_section(&mut page)?;
    }
    super::print(&String::from_utf8_lossy(&page))?;
    Ok(Exit::Done)
}
