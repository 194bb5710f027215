//! Prints what a core tells, as JSON: `cargo run --example autopsy -- CORE [--quiet]`.

use std::time::Instant;

fn main() -> anyhow::Result<()> {
    let core = std::env::args().nth(1).unwrap_or_else(|| "/proc/vmcore".into());
    let start = Instant::now();
    let kernel = ktypes::Kernel::open(vmcore::Vmcore::open(core.as_ref())?)?;
    let opened = Instant::now();
    let snapshot = autopsy::autopsy(&kernel)?;
    let done = Instant::now();
    eprintln!(
        "{} processes, {} mappings; kernel opened in {:?}, autopsy in {:?}",
        snapshot.processes.len(),
        snapshot.address_spaces.values().map(|mm| mm.vmas.len()).sum::<usize>(),
        opened - start,
        done - opened,
    );
    for finding in &snapshot.findings {
        eprintln!("{:?} {:?} {}: {}", finding.severity, finding.pid, finding.object, finding.text);
    }
    if std::env::args().nth(2).as_deref() != Some("--quiet") {
        serde_json::to_writer(std::io::stdout().lock(), &snapshot)?;
    }
    Ok(())
}
