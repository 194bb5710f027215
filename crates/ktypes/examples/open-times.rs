//! Measures what it takes to open cores: `open-times CORE…`, medians and minima of eleven runs.

use std::time::{Duration, Instant};

use ktypes::{Kernel, vmcore::Vmcore};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args_os().skip(1) {
        let mut times: Vec<(Duration, Duration)> = Vec::new();
        let mut release = String::new();
        for _ in 0..11 {
            let start = Instant::now();
            let core = Vmcore::open(path.as_ref())?;
            let kernel = Kernel::open(core)?;
            let opened = start.elapsed();
            let start = Instant::now();
            kernel.symbol_at(kernel.symbol("panic")?);
            kernel.symbol_opt("no such symbol");
            times.push((opened, start.elapsed()));
            release = kernel.release().to_owned();
        }
        let show = |mut times: Vec<Duration>| {
            times.sort();
            format!("median {:?}, least {:?}", times[times.len() / 2], times[0])
        };
        println!("Linux {release}: open {}", show(times.iter().map(|t| t.0).collect()));
        println!("  modules' symbols {}", show(times.iter().map(|t| t.1).collect()));
    }
    Ok(())
}
