//! Mutations of a captured machine's memory: whatever stands there, a full autopsy ends, in time, and in bounds.
//!
//! The clean autopsy's reads are recorded once; a run changes some of what was read, by its seed, and does everything again. Started by
//! `cargo xtask fuzz memory`, which reads the lines of JSON that come out: `{"clean": …}`, `{"bad": …}` for each run that is not as it
//! has to be, `{"sum": …}` now and then and at the end.

mod mutation;
mod overlay;

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use autopsy::Autopsy;
use ktypes::Kernel;
use serde_json::json;
use vmcore::Vmcore;

use crate::mutation::{Mutation, Victims};
use crate::overlay::{Account, Hang, Overlay, Reads, cpu_time};

/// Whether findings are of interest: of a run that is done alone.
static SAY: AtomicBool = AtomicBool::new(false);
/// The run that goes on, for who has to say so before it all ends.
static SEED: AtomicU64 = AtomicU64::new(0);
/// Bytes in use, and the most that were.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// More than that no run may ask for: it is ended with all others.
const MOST_MEMORY: usize = 2 << 30;
/// A run that takes so many times as long as the clean one has failed.
const MOST_TIME: f64 = 3.0;
/// A run that needs so many times the memory of the clean one has failed.
const MOST_PEAK: f64 = 4.0;

struct Counting;

// SAFETY: the system's allocator does it all; the rest counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        if live > MOST_MEMORY {
            // Nothing that allocates.
            let text = b"otherworld-fuzz: out of bounds of memory\n";
            // SAFETY: the bytes are there; then the process ends.
            unsafe {
                libc::write(2, text.as_ptr().cast(), text.len());
                libc::abort();
            }
        }
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What became of a run.
struct Outcome {
    ns: u64,
    peak: usize,
    reads: u64,
    mutated: u64,
    /// Processes and findings; none if there was an error.
    found: Option<(usize, usize)>,
    panic: Option<String>,
    hang: bool,
}

/// Everything that is ever done with a dead kernel.
fn everything(core: Vmcore) -> Option<(usize, usize)> {
    let kernel = Kernel::open(core).ok()?;
    {
        // What `inspect` asks for alone.
        let autopsy = Autopsy::new(&kernel);
        _ = autopsy.kernel_log();
        _ = autopsy.tasks();
    }
    let mut snapshot = autopsy::autopsy(&kernel).ok()?;
    let policy = snapshot::Policy { mode: snapshot::Mode::All, ..snapshot::Policy::default() };
    snapshot::decide(&mut snapshot, &policy);
    if SAY.load(Relaxed) {
        for finding in &snapshot.findings {
            println!("{}", json!({ "said": format!("{:?}: {}: {}", finding.pid, finding.object, finding.text) }));
        }
    }
    Some((snapshot.processes.len(), snapshot.findings.len()))
}

fn run(core: &Arc<Vmcore>, mutation: Mutation, deadline_ns: u64) -> Outcome {
    let begin = cpu_time();
    let deadline = if deadline_ns == 0 { 0 } else { begin + deadline_ns };
    let account = Arc::new(Account { deadline, ..Account::default() });
    let overlay = Overlay::new(core.clone(), account.clone(), &mutation.bytes);
    let core = overlay.into_core(mutation.info, mutation.prstatus);
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    PANIC.take();
    let begin = cpu_time();
    let result = catch_unwind(AssertUnwindSafe(|| everything(core)));
    let hang = result.as_ref().is_err_and(|payload: &Box<dyn Any + Send>| payload.is::<Hang>());
    Outcome {
        ns: cpu_time() - begin,
        peak: PEAK.load(Relaxed).saturating_sub(before),
        reads: account.reads.load(Relaxed),
        mutated: account.mutated.load(Relaxed),
        panic: result.is_err().then(|| PANIC.take()),
        found: result.ok().flatten(),
        hang,
    }
}

/// What the clean autopsy reads.
fn record(core: &Arc<Vmcore>) -> Result<Victims, String> {
    let record = || Arc::new(Account { record: Some(Mutex::default()), ..Account::default() });
    let taken = |account: &Account| -> Reads {
        account.record.as_ref().map_or_else(Reads::new, |record| {
            std::mem::take(&mut *record.lock().unwrap_or_else(PoisonError::into_inner))
        })
    };
    let account = record();
    let overlay = Overlay::new(core.clone(), account.clone(), &[]);
    let recorded = overlay.into_core(core.info().clone(), core.prstatus().to_vec());
    let kernel = Kernel::open(recorded).map_err(|error| error.to_string())?;
    let open = taken(&account);
    autopsy::autopsy(&kernel).map_err(|error| error.to_string())?;
    Ok(Victims::new(core, open, &taken(&account), kernel.memory().page_offset()))
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, first, runs, seconds, endless] = arguments.as_slice() else {
        eprintln!("usage: memory CORE FIRST-SEED RUNS SECONDS ENDLESS");
        std::process::exit(2);
    };
    let number = |text: &str| text.parse::<u64>().unwrap_or_else(|_| panic!("{text} is no number"));
    // 0 seconds: no end before all runs are done. At ENDLESS times the clean run's time a run is ended.
    let (first, runs, seconds, endless) = (number(first), number(runs), number(seconds), number(endless));
    let core = Arc::new(Vmcore::open(path.as_ref()).unwrap_or_else(|error| panic!("{error}")));
    let victims = record(&core).unwrap_or_else(|error| panic!("{error}"));
    let mut clean: Vec<Outcome> = (0..7).map(|_| run(&core, Mutation::none(&core), 0)).collect();
    clean.sort_by_key(|outcome| outcome.ns);
    let clean = clean.swap_remove(clean.len() / 2);
    let found = clean.found.expect("a clean autopsy");
    println!(
        "{}",
        json!({ "clean": {
            "ms": ms(clean.ns), "reads": clean.reads, "peak": clean.peak, "places": victims.autopsy.len(),
            "processes": found.0, "findings": found.1,
        }})
    );

    std::panic::set_hook(Box::new(|info| {
        let what =
            if info.payload().is::<Hang>() { String::new() } else { format!("{info}; ").replace('\n', " ") };
        PANIC.set(what + &whereabouts());
    }));
    // A loop that reads nothing is seen from outside only.
    static DONE: AtomicU64 = AtomicU64::new(0);
    static OVER: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(|| {
        let (mut last, mut since) = (0, Instant::now());
        while !OVER.load(Relaxed) {
            std::thread::sleep(Duration::from_secs(1));
            let now = DONE.load(Relaxed);
            if now != last {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() > Duration::from_secs(300) {
                println!(
                    "{}",
                    json!({ "bad": { "seed": SEED.load(Relaxed), "what": "hang", "why": "without reading" } })
                );
                std::process::exit(3);
            }
        }
    });

    SAY.store(runs == 1, Relaxed);
    let (mut mutated, mut panics, mut hangs, mut slow, mut large) = (0, 0, 0, 0, 0);
    let (mut peak, mut slowest, mut opened) = ((0, 0), (0, 0), 0);
    let begin = Instant::now();
    let mut said = begin;
    let mut done = 0;
    for seed in first..first.saturating_add(runs) {
        if seconds != 0 && begin.elapsed().as_secs() >= seconds {
            break;
        }
        SEED.store(seed, Relaxed);
        let once = || run(&core, Mutation::of(seed, &core, &victims), clean.ns * endless);
        let mut outcome = once();
        let ratio = |outcome: &Outcome| outcome.ns as f64 / clean.ns as f64;
        // Once more, beside a clean one: the machine may have been busy, and then CPU time says less than it seems.
        for _ in 0..4 {
            if ratio(&outcome) <= MOST_TIME {
                break;
            }
            let (beside, again) = (run(&core, Mutation::none(&core), 0), once());
            let fair = (again.ns as f64 * clean.ns as f64 / beside.ns as f64) as u64;
            if fair < outcome.ns {
                outcome = Outcome { ns: fair, ..again };
            }
        }
        let bad = |what: &str, why: String| {
            println!("{}", json!({ "bad": { "seed": seed, "what": what, "why": why } }));
        };
        if let Some(why) = &outcome.panic {
            let what = if outcome.hang { "hang" } else { "panic" };
            *(if outcome.hang { &mut hangs } else { &mut panics }) += 1;
            bad(what, format!("{} reads, {} MiB: {why}", outcome.reads, outcome.peak >> 20));
        } else if ratio(&outcome) > MOST_TIME {
            slow += 1;
            bad("slow", format!("{:.1} times, {} reads", ratio(&outcome), outcome.reads));
        }
        if outcome.peak as f64 > clean.peak as f64 * MOST_PEAK {
            large += 1;
            bad("large", format!("{} MiB", outcome.peak >> 20));
        }
        mutated += outcome.mutated;
        opened += u64::from(outcome.found.is_some());
        peak = peak.max((outcome.peak, seed));
        slowest = slowest.max((outcome.ns, seed));
        done += 1;
        DONE.store(done, Relaxed);
        let last = done == runs || seconds != 0 && begin.elapsed().as_secs() >= seconds;
        if last || said.elapsed() > Duration::from_secs(2) {
            said = Instant::now();
            println!(
                "{}",
                json!({ "sum": {
                    "runs": done, "mutated": mutated, "panics": panics, "hangs": hangs, "slow": slow, "large": large,
                    "peak": peak.0, "peak_seed": peak.1, "slowest": slowest.0 as f64 / clean.ns as f64,
                    "slowest_seed": slowest.1, "whole": opened, "next": seed + 1,
                    "last": [outcome.found.map(|f| f.0), outcome.found.map(|f| f.1)],
                }})
            );
        }
    }
    OVER.store(true, Relaxed);
}

/// Places in the reading half that are on the stack, the innermost first.
fn whereabouts() -> String {
    let stack = std::backtrace::Backtrace::force_capture().to_string();
    let places = stack.lines().filter_map(|line| line.trim().strip_prefix("at ")?.split_once("/crates/"));
    let ours = places.map(|(_, place)| place).filter(|place| !place.contains("fuzz/"));
    // Without the column.
    let lines = ours.map(|place| place.rsplit_once(':').map_or(place, |(line, _)| line));
    lines.take(12).collect::<Vec<_>>().join(" < ")
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}
