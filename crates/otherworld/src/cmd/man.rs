//! `otherworld man`

use anyhow::Result;

use crate::cli::Exit;

/// Prints the manual: one page, the subcommands' after each other.
pub fn run(command: clap::Command) -> Result<Exit> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    subcommands(&command, "otherworld", &mut page)?;
    super::print(&String::from_utf8_lossy(&page))?;
    Ok(Exit::Done)
}

/// The sections of the subcommands of `command`, and of theirs.
fn subcommands(command: &clap::Command, parent: &str, page: &mut Vec<u8>) -> Result<()> {
    for sub in command.get_subcommands().filter(|s| !s.is_hide_set() && s.get_name() != "help") {
        let name: &'static str = Box::leak(format!("{parent} {}", sub.get_name()).into_boxed_str());
        let man = clap_mangen::Man::new(sub.clone().name(name).bin_name(name).disable_help_flag(true));
        page.extend(b".SH COMMAND: ");
        page.extend(name.to_uppercase().bytes());
        page.push(b'\n');
        man.render_description_section(page)?;
        man.render_options_section(page)?;
        subcommands(sub, name, page)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn subcommands_of_subcommands_are_there() {
        let mut page = Vec::new();
        super::subcommands(&crate::cli::Cli::command(), "otherworld", &mut page).unwrap();
        let text = String::from_utf8(page).unwrap();
        assert!(text.contains(".SH COMMAND: OTHERWORLD INSPECT MAPS\n"), "{text}");
        assert!(!text.contains("RESURRECT-WORKER"));
    }
}
