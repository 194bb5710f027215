//! `otherworld inspect check`

use snapshot::{Action, Finding, FindingKind, Mode, Policy, Severity, Snapshot};

/// All that was noticed in a dead kernel, the gravest first, with what the strict policy would do about it if all processes were to
/// come back.
pub fn findings(mut snapshot: Snapshot) -> Vec<Finding> {
    snapshot::decide(&mut snapshot, &Policy { mode: Mode::All, ..Policy::default() });
    let mut findings = snapshot.findings;
    findings.sort_by_key(|finding| (std::cmp::Reverse(finding.severity), finding.pid));
    findings
}

/// One line for each, and a last one that counts.
pub fn table(findings: &[Finding]) -> String {
    let mut out = String::new();
    if !findings.is_empty() {
        out.push_str(&format!(
            "{:<8} {:<11} {:<12} {:>7} {:<15} {}\n",
            "SEVERITY", "KIND", "OBJECT", "PID", "DONE", "WHAT"
        ));
    }
    for finding in findings {
        let pid = finding.pid.map_or("-".to_owned(), |pid| pid.to_string());
        out.push_str(&format!(
            "{:<8} {:<11} {:<12} {pid:>7} {:<15} {}\n",
            severity(finding.severity),
            kind(finding.kind),
            finding.object,
            action(finding.action),
            finding.text
        ));
    }
    let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
    out.push_str(&format!(
        "{} doubts, {} broken, {} losses, {} notes\n",
        count(Severity::Doubt),
        count(Severity::Broken),
        count(Severity::Loss),
        count(Severity::Note)
    ));
    out
}

fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Note => "note",
        Severity::Loss => "loss",
        Severity::Doubt => "doubt",
        Severity::Broken => "broken",
    }
}

fn kind(kind: FindingKind) -> &'static str {
    match kind {
        FindingKind::Reading => "reading",
        FindingKind::Slab => "slab",
        FindingKind::Link => "link",
        FindingKind::Count => "count",
        FindingKind::Page => "page",
        FindingKind::Credentials => "credentials",
        FindingKind::Canary => "canary",
        FindingKind::Text => "text",
        FindingKind::KernelText => "kernel-text",
        FindingKind::Registers => "registers",
    }
}

/// In a word, also for the report.
pub fn action(action: Action) -> &'static str {
    match action {
        Action::None => "-",
        Action::Reported => "reported",
        Action::CrashProcedure => "crash procedure",
        Action::GivenUp => "given up",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gravest_comes_first() {
        let mut snapshot = Snapshot::default();
        for (severity, pid, text) in [
            (Severity::Note, None, "small"),
            (Severity::Doubt, Some(9), "nine"),
            (Severity::Doubt, Some(7), "seven"),
        ] {
            let finding = Finding::new(severity, pid, "file", text);
            snapshot.findings.push(Finding { kind: FindingKind::Link, ..finding });
        }
        let found = findings(snapshot);
        assert_eq!(found.iter().map(|f| f.text.as_str()).collect::<Vec<_>>(), ["seven", "nine", "small"]);
        let table = table(&found);
        assert!(table.starts_with("SEVERITY"), "{table}");
        assert!(table.contains("doubt    link        file               7 -"), "{table}");
        assert!(table.ends_with("2 doubts, 0 broken, 0 losses, 1 notes\n"), "{table}");
        assert_eq!(super::table(&[]), "0 doubts, 0 broken, 0 losses, 0 notes\n");
    }
}
