//! `inspect modules`

use autopsy::Module;

pub fn text(modules: &[Module]) -> String {
    let rows = modules.iter().map(|m| {
        let mut users = m.used_by.join(",");
        if m.state != "live" {
            users.push_str(&format!(" ({})", m.state));
        }
        let base = format!("{:#018x}", m.base);
        [m.name.clone(), m.size.to_string(), base, m.taint.clone(), m.references.to_string(), users]
    });
    super::table(&["MODULE", "SIZE", "BASE", "TAINT", "USED", "BY"], &[1, 4], rows)
}
