//! Hostile records: what a process may have put where the crash kernel looks for its crash procedure. They are refused, or what they say is bounded.

#![no_main]

use libfuzzer_sys::fuzz_target;
use otherworld::record::{self, COPY, MAGIC, MAX_LOCKS, MAX_REGIONS, MAX_STACK, MAX_TIME_LIMIT_MS};

fuzz_target!(|bytes: &[u8]| {
    look(bytes);
    // The same with what a forger would get right first: the magic number and the checksum.
    let mut bytes = bytes.to_vec();
    bytes.resize(record::SIZE, 0);
    for copy in bytes.chunks_mut(COPY) {
        copy[..MAGIC.len()].copy_from_slice(&MAGIC);
        record::sign(copy);
    }
    look(&bytes);
});

fn look(bytes: &[u8]) {
    let Ok(record) = record::parse(bytes) else { return };
    assert!(record.locks.len() <= MAX_LOCKS && record.regions.len() <= MAX_REGIONS);
    assert!(record.stack_size <= MAX_STACK && record.time_limit_ms <= MAX_TIME_LIMIT_MS);
    for lock in &record.locks {
        let words = [lock.tag, 0, lock.kind, 7, 8, 9, 10];
        for count in 0..=words.len() {
            _ = otherworld::lock_state(lock.kind, &words[..count]);
        }
    }
}
