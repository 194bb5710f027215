//! The campaign's table, as Markdown.

use std::collections::BTreeMap;

use faults::Kind;

use super::{Crash, Fate, Outcome};

/// By kind of fault: crashes that all programs survived, with the 95 % interval, and what became of the programs.
pub fn markdown<'a>(title: &str, crashes: impl Iterator<Item = &'a Crash>) -> String {
    let crashes: Vec<&Crash> = crashes.collect();
    let mut text = format!("{title}\n\n| fault | crashes | survived by all | 95 % interval | programs |");
    for fate in Fate::ALL {
        text += &format!(" {} |", fate.heading());
    }
    text += &format!("\n|---|---:|---:|---|---:|{}\n", "---:|".repeat(Fate::ALL.len()));
    for kind in Kind::ALL {
        let these: Vec<&Crash> = crashes.iter().copied().filter(|crash| crash.kind == kind).collect();
        if !these.is_empty() {
            text += &row(&kind.to_string(), &these);
        }
    }
    let mut commits: BTreeMap<&str, usize> = BTreeMap::new();
    crashes.iter().for_each(|crash| *commits.entry(&crash.commit).or_default() += 1);
    let commits: Vec<String> = commits.iter().map(|(name, count)| format!("{name} ({count})")).collect();
    text + &row("**all**", &crashes) + &format!("\nCrashes of each commit: {}.\n", commits.join(", "))
}

fn row(name: &str, crashes: &[&Crash]) -> String {
    let survived = crashes.iter().filter(|crash| crash.survived()).count();
    let mut fates: BTreeMap<Fate, usize> = BTreeMap::new();
    let programs = || crashes.iter().flat_map(|crash| &crash.programs);
    programs().for_each(|Outcome { fate, .. }| *fates.entry(*fate).or_default() += 1);
    let (low, high) = interval(survived, crashes.len());
    let share = 100.0 * survived as f64 / crashes.len().max(1) as f64;
    let mut text = format!(
        "| {name} | {} | {survived} ({share:.1} %) | {low:.1}–{high:.1} % | {} |",
        crashes.len(),
        programs().count()
    );
    for fate in Fate::ALL {
        text += &format!(" {} |", fates.get(&fate).copied().unwrap_or(0));
    }
    text + "\n"
}

/// Wilson's interval of a proportion at 95 %, in per cent.
fn interval(good: usize, all: usize) -> (f64, f64) {
    const Z: f64 = 1.959_964;
    if all == 0 {
        return (0.0, 100.0);
    }
    let (n, p) = (all as f64, good as f64 / all as f64);
    let middle = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 100.0 / (1.0 + Z * Z / n);
    (((middle - half) * scale).max(0.0), ((middle + half) * scale).min(100.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_wilsons() {
        let (low, high) = interval(98, 100);
        assert!((low - 93.0).abs() < 0.05 && (high - 99.4).abs() < 0.05, "{low} {high}");
        let (low, high) = interval(300, 300);
        assert!((low - 98.7).abs() < 0.05 && high > 99.999, "{low} {high}");
        assert_eq!(interval(0, 0), (0.0, 100.0));
    }
}
