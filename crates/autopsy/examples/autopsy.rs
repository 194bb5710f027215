//! Prints what a core tells, as JSON: `cargo run --example autopsy -- CORE`, or how long it takes:
//! `cargo run --release --example autopsy -- CORE --times N`.

use std::time::Instant;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let core = args.first().map_or("/proc/vmcore", String::as_str);
    let times = args.iter().position(|a| a == "--times").and_then(|at| args.get(at + 1)?.parse::<u32>().ok());
    let start = Instant::now();
    let kernel = ktypes::Kernel::open(vmcore::Vmcore::open(core.as_ref())?)?;
    eprintln!("kernel opened in {:?}", start.elapsed());
    for _ in 0..times.unwrap_or(1) {
        let start = Instant::now();
        let snapshot = autopsy::autopsy(&kernel)?;
        eprintln!(
            "{} processes, {} mappings, {} findings in {:?}",
            snapshot.processes.len(),
            snapshot.address_spaces.values().map(|mm| mm.vmas.len()).sum::<usize>(),
            snapshot.findings.len(),
            start.elapsed(),
        );
        if times.is_none() {
            serde_json::to_writer(std::io::stdout().lock(), &snapshot)?;
        }
    }
    Ok(())
}
