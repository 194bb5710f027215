//! The record: what the crash kernel has to know of a crash procedure, in the process's own memory.
//!
//! It is a private anonymous mapping of [`SIZE`] bytes which is excluded from core dumps and advised to be read at random and without huge pages.
//! Nobody else has one of this size and these properties by chance; whoever looks for it needs to look at the mappings of the process only, and at the
//! first bytes of those few that fit. It cannot be forged across processes: only the process itself (and who may trace it) can write to its
//! memory, and what it names is called in this process, with its credentials.
//!
//! The mapping holds two copies. A change is written into the one that is out of date, so that one of them is whole at any moment.

use std::fmt;

/// Bytes of the mapping.
pub const SIZE: usize = 2 * COPY;
/// Bytes of one copy.
pub const COPY: usize = 4096;
/// How a copy begins.
pub const MAGIC: [u8; 16] = *b"otherworld-crash";
/// Version of the layout.
pub const VERSION: u32 = 1;
/// Locks that can be watched.
pub const MAX_LOCKS: usize = 96;
/// Regions that can be protected.
pub const MAX_REGIONS: usize = 64;
/// Stacks are not larger.
pub const MAX_STACK: u64 = 64 << 20;
/// Time limits are not longer.
pub const MAX_TIME_LIMIT_MS: u64 = 600_000;

/// All threads go on before the procedure is called, but for the one that it interrupts.
pub const FLAG_THREADS_RUN: u32 = 1;

/// A lock that the application wants to know about.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lock {
    /// Where it is.
    pub address: u64,
    /// What it is: [`LOCK_MUTEX`], [`LOCK_RWLOCK`], [`LOCK_WORD`].
    pub kind: u32,
    /// Free for the application.
    pub tag: u32,
}

/// A `pthread_mutex_t`.
pub const LOCK_MUTEX: u32 = 1;
/// A `pthread_rwlock_t`.
pub const LOCK_RWLOCK: u32 = 2;
/// A 32-bit word that is zero when the lock is free, and the owner's TID otherwise.
pub const LOCK_WORD: u32 = 3;

/// Memory whose contents are checked before the procedure runs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    #[allow(missing_docs)]
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// [`checksum`] of the contents.
    pub checksum: u64,
}

/// One copy, as it lies in memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy {
    pub(crate) magic: [u8; 16],
    pub(crate) version: u32,
    pub(crate) flags: u32,
    /// [`checksum`] of the copy, with this field zero.
    pub(crate) checksum: u64,
    /// The copy with the higher one counts.
    pub(crate) generation: u64,
    pub(crate) entry: u64,
    pub(crate) procedure: u64,
    pub(crate) data: u64,
    pub(crate) stack_size: u64,
    pub(crate) time_limit_ms: u64,
    pub(crate) lock_count: u32,
    pub(crate) region_count: u32,
    pub(crate) locks: [Lock; MAX_LOCKS],
    pub(crate) regions: [Region; MAX_REGIONS],
}

const _: () = assert!(size_of::<Copy>() <= COPY);

impl fmt::Debug for Copy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copy").field("generation", &self.generation).finish_non_exhaustive()
    }
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where the library is entered: `entry(context, procedure, data)`, on a stack that is aligned to 16 bytes, with nothing to return to. It ends with
    /// a breakpoint, the [`Outcome`](crate::Outcome) in `rax` and the number of damaged regions in `rdx`.
    pub entry: u64,
    /// The application's function.
    pub procedure: u64,
    /// What it is called with.
    pub data: u64,
    /// Bytes of stack that it wants.
    pub stack_size: u64,
    /// How long it may take, milliseconds.
    pub time_limit_ms: u64,
    /// The other threads run meanwhile.
    pub threads_run: bool,
    #[allow(missing_docs)]
    pub locks: Vec<Lock>,
    #[allow(missing_docs)]
    pub regions: Vec<Region>,
}

/// Why what looks like a record is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordError {
    /// Neither copy begins as one.
    NotARecord,
    /// Of a version that is not known here.
    Version(u32),
    /// The checksum is wrong, or a field has a value that it cannot have.
    Damaged(&'static str),
    /// Nothing is registered.
    Empty,
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotARecord => f.write_str("no record of a crash procedure"),
            Self::Version(version) => write!(f, "a record of version {version}, understood is {VERSION}"),
            Self::Damaged(what) => write!(f, "the record is damaged: {what}"),
            Self::Empty => f.write_str("no crash procedure is registered"),
        }
    }
}

impl std::error::Error for RecordError {}

/// Reads a record from the contents of its mapping, whose bytes are whatever a process has put there.
///
/// # Errors
/// [`RecordError`] says why there is none.
pub fn parse(bytes: &[u8]) -> Result<Record, RecordError> {
    let copies = [bytes.get(..COPY), bytes.get(COPY..SIZE)];
    let mut best: Result<(u64, Record), RecordError> = Err(RecordError::NotARecord);
    for copy in copies.into_iter().flatten() {
        match (parse_copy(copy), &best) {
            (Ok(new), Ok(old)) if new.0 <= old.0 => {}
            (Ok(new), _) => best = Ok(new),
            // What is said of a copy counts when the other is none.
            (Err(error), Err(RecordError::NotARecord)) => best = Err(error),
            (Err(_), _) => {}
        }
    }
    let (_, record) = best?;
    if record.procedure == 0 { Err(RecordError::Empty) } else { Ok(record) }
}

fn parse_copy(bytes: &[u8]) -> Result<(u64, Record), RecordError> {
    if !bytes.starts_with(&MAGIC) {
        return Err(RecordError::NotARecord);
    }
    let version = word32(bytes, std::mem::offset_of!(Copy, version));
    if version != VERSION {
        return Err(RecordError::Version(version));
    }
    let at = std::mem::offset_of!(Copy, checksum);
    if sum_of_copy(bytes) != word(bytes, at) {
        return Err(RecordError::Damaged("its checksum is wrong"));
    }
    let number = |offset| word(bytes, offset);
    let (locks, regions) = (
        word32(bytes, std::mem::offset_of!(Copy, lock_count)) as usize,
        word32(bytes, std::mem::offset_of!(Copy, region_count)) as usize,
    );
    if locks > MAX_LOCKS || regions > MAX_REGIONS {
        return Err(RecordError::Damaged("it has more locks or regions than there is room for"));
    }
    let lock = |n: usize| {
        let at = std::mem::offset_of!(Copy, locks) + n * size_of::<Lock>();
        Lock { address: word(bytes, at), kind: word32(bytes, at + 8), tag: word32(bytes, at + 12) }
    };
    let region = |n: usize| {
        let at = std::mem::offset_of!(Copy, regions) + n * size_of::<Region>();
        Region { address: word(bytes, at), len: word(bytes, at + 8), checksum: word(bytes, at + 16) }
    };
    let record = Record {
        entry: number(std::mem::offset_of!(Copy, entry)),
        procedure: number(std::mem::offset_of!(Copy, procedure)),
        data: number(std::mem::offset_of!(Copy, data)),
        stack_size: number(std::mem::offset_of!(Copy, stack_size)),
        time_limit_ms: number(std::mem::offset_of!(Copy, time_limit_ms)),
        threads_run: word32(bytes, std::mem::offset_of!(Copy, flags)) & FLAG_THREADS_RUN != 0,
        locks: (0..locks).map(lock).collect(),
        regions: (0..regions).map(region).collect(),
    };
    if record.stack_size > MAX_STACK || record.time_limit_ms > MAX_TIME_LIMIT_MS {
        return Err(RecordError::Damaged("it asks for more stack or time than anybody gets"));
    }
    Ok((number(std::mem::offset_of!(Copy, generation)), record))
}

/// Gives a copy the version and the checksum that it has to have: for those who test what reads records.
#[doc(hidden)]
pub fn sign(copy: &mut [u8]) {
    let mut put = |at: usize, value: &[u8]| {
        if let Some(field) = copy.get_mut(at..at + value.len()) {
            field.copy_from_slice(value);
        }
        sum_of_copy(copy)
    };
    let sum = put(std::mem::offset_of!(Copy, version), &VERSION.to_le_bytes());
    put(std::mem::offset_of!(Copy, checksum), &sum.to_le_bytes());
}

/// The checksum that a copy is to have: of its bytes, with those of the checksum itself as zeroes.
pub(crate) fn sum_of_copy(bytes: &[u8]) -> u64 {
    const AT: usize = std::mem::offset_of!(Copy, checksum);
    let mut sum = Checksum::default();
    sum.add(bytes.get(..AT).unwrap_or_default());
    sum.add(&[0; 8]);
    sum.add(bytes.get(AT + 8..size_of::<Copy>()).unwrap_or_default());
    sum.0
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|tail| tail.first_chunk()).map_or(0, |word| u64::from_le_bytes(*word))
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|tail| tail.first_chunk()).map_or(0, |word| u32::from_le_bytes(*word))
}

/// FNV-1a over eight bytes at a time: against accidents, not against malice.
pub fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = Checksum::default();
    sum.add(bytes);
    sum.0
}

/// [`checksum`] of what comes in parts.
struct Checksum(u64);

impl Default for Checksum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Checksum {
    const PRIME: u64 = 0x100_0000_01b3;

    /// All parts but the last have to be of a multiple of eight bytes.
    fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            let mixed = (self.0 ^ u64::from_le_bytes(*word)).wrapping_mul(Self::PRIME);
            self.0 = mixed ^ mixed >> 29;
        }
        for byte in rest {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(Self::PRIME);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn copy(generation: u64, procedure: u64) -> Vec<u8> {
        let mut bytes = vec![0; COPY];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(std::mem::offset_of!(Copy, generation), &generation.to_le_bytes());
        put(std::mem::offset_of!(Copy, procedure), &procedure.to_le_bytes());
        put(std::mem::offset_of!(Copy, lock_count), &1u32.to_le_bytes());
        put(std::mem::offset_of!(Copy, locks), &0x1000u64.to_le_bytes());
        sign(&mut bytes);
        bytes
    }

    #[test]
    fn the_newer_whole_copy_counts() {
        let mut both = [copy(3, 0x300), copy(4, 0x400)].concat();
        assert_eq!(parse(&both).unwrap().procedure, 0x400);
        assert_eq!(parse(&both).unwrap().locks, [Lock { address: 0x1000, kind: 0, tag: 0 }]);
        both[COPY + 200] ^= 1;
        assert_eq!(parse(&both).unwrap().procedure, 0x300, "the other was being written");
        both[200] ^= 1;
        assert!(matches!(parse(&both), Err(RecordError::Damaged(_))));
        assert_eq!(parse(&[0; SIZE]), Err(RecordError::NotARecord));
        assert_eq!(parse(&copy(1, 0)), Err(RecordError::Empty));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_refused_or_bounded(mut bytes in prop::collection::vec(any::<u8>(), 0..SIZE + 16), whole in any::<bool>()) {
            if whole && bytes.len() > 64 {
                bytes[..16].copy_from_slice(&MAGIC);
                bytes.resize(SIZE, 0);
                sign(&mut bytes[..COPY]);
            }
            if let Ok(record) = parse(&bytes) {
                prop_assert!(record.locks.len() <= MAX_LOCKS && record.regions.len() <= MAX_REGIONS);
                prop_assert!(record.stack_size <= MAX_STACK && record.time_limit_ms <= MAX_TIME_LIMIT_MS);
            }
        }
    }
}
