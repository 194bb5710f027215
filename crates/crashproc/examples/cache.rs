//! A cache in memory that several threads change all the time, and that checks itself when the kernel has died: parts that were being changed, and
//! constant data that is not what it was, are dropped instead of being served.
//!
//! Prints a line when it is ready and one after its crash procedure has run; ends when the file that is its argument appears.

use std::ffi::c_void;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use otherworld::record::LOCK_WORD;
use otherworld::{Context, Options, Outcome};

const PARTS: usize = 4;
const KEYS: usize = 1000;

/// A part of the cache: values that belong together, and who is changing them.
struct Part {
    /// 0, or the TID of the thread that changes it.
    changing: AtomicU32,
    values: [AtomicU64; KEYS],
    dropped: AtomicBool,
}

static CACHE: [Part; PARTS] = [const {
    Part {
        changing: AtomicU32::new(0),
        values: [const { AtomicU64::new(0) }; KEYS],
        dropped: AtomicBool::new(false),
    }
}; PARTS];
/// What the procedure found, for the main thread to tell.
static CALLED: AtomicU32 = AtomicU32::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

/// No allocation and no lock in here: a thread that stands still may have them.
extern "C" fn check(context: &Context, _: *mut c_void) -> Outcome {
    for lock in context.locks().iter().filter(|lock| lock.owner != 0 || lock.known == 0) {
        if let Some(part) = CACHE.get(lock.tag as usize) {
            part.dropped.store(true, Ordering::Relaxed);
        }
    }
    CALLED.fetch_add(1 + context.damaged_regions().len() as u32 * 1000, Ordering::Relaxed);
    Outcome::Continue
}

/// Gives all values of a part the next number, one after the other.
fn change(part: &Part) {
    // SAFETY: no arguments.
    let tid = unsafe { libc::syscall(libc::SYS_gettid) } as u32;
    part.changing.store(tid, Ordering::Release);
    let next = part.values[0].load(Ordering::Relaxed) + 1;
    for value in &part.values {
        value.store(next, Ordering::Relaxed);
    }
    part.changing.store(0, Ordering::Release);
}

/// Whether all values of a part are the same.
fn is_whole(part: &Part) -> bool {
    let first = part.values[0].load(Ordering::Relaxed);
    part.values.iter().all(|value| value.load(Ordering::Relaxed) == first)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let stop = std::env::args_os().nth(1).ok_or("usage: cache STOP-FILE")?;
    // Something that must not change: read once, then only looked up.
    let constant: Vec<u64> = (0..100_000).map(|n| n * n).collect();
    otherworld::register(check, std::ptr::null_mut(), &Options::default())?;
    // SAFETY: nobody changes the vector.
    unsafe { otherworld::protect(constant.as_ptr().cast(), constant.len() * 8)? };
    for (n, part) in CACHE.iter().enumerate() {
        otherworld::watch_lock((&raw const part.changing).cast(), LOCK_WORD, n as u32)?;
    }
    let rounds = Mutex::new(0u64);
    std::thread::scope(|scope| {
        for part in &CACHE {
            let rounds = &rounds;
            scope.spawn(move || {
                while !STOP.load(Ordering::Relaxed) {
                    change(part);
                    if let Ok(mut rounds) = rounds.lock() {
                        *rounds += 1;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
        println!("ready");
        while !Path::new(&stop).exists() {
            std::thread::sleep(Duration::from_millis(100));
        }
        STOP.store(true, Ordering::Relaxed);
    });
    let whole = CACHE.iter().filter(|part| is_whole(part)).count();
    let squares = constant.iter().zip(0u64..).all(|(value, n)| *value == n * n);
    println!("called {}, whole {whole}, constant {squares}", CALLED.load(Ordering::Relaxed));
    Ok(())
}
