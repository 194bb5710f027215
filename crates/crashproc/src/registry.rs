//! Registering: the record is made and kept up to date.

use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicPtr, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::context::Procedure;
use crate::entry;
use crate::record::{
    COPY, Copy, FLAG_THREADS_RUN, LOCK_MUTEX, LOCK_RWLOCK, LOCK_WORD, Lock, MAGIC, MAX_LOCKS, MAX_REGIONS,
    MAX_STACK, MAX_TIME_LIMIT_MS, Region, SIZE, VERSION, checksum, sum_of_copy,
};

/// How the procedure is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bytes of its stack; at most 64 MiB.
    pub stack_size: usize,
    /// After this it is given up, and the process with it unless the configuration says otherwise; at most ten minutes.
    pub time_limit: Duration,
    /// The other threads go on before it is called, instead of after it has returned.
    pub threads_run: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { stack_size: 256 << 10, time_limit: Duration::from_secs(20), threads_run: false }
    }
}

/// Why something could not be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// No memory for the record.
    NoMemory,
    /// An option is out of range.
    Invalid,
    /// There are as many locks or regions as there can be.
    Full,
    /// It was not registered.
    Unknown,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoMemory => "there is no memory for the record of the crash procedure",
            Self::Invalid => "an option of the crash procedure is out of range",
            Self::Full => "there is no room for another lock or region",
            Self::Unknown => "it was not registered",
        })
    }
}

impl std::error::Error for Error {}

/// The mapping; NULL before the first registration.
static RECORD: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static CHANGING: Mutex<Copy> = Mutex::new(Copy::EMPTY);

impl Copy {
    const EMPTY: Self = Self {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        checksum: 0,
        generation: 0,
        entry: 0,
        procedure: 0,
        data: 0,
        stack_size: 0,
        time_limit_ms: 0,
        lock_count: 0,
        region_count: 0,
        locks: [Lock { address: 0, kind: 0, tag: 0 }; MAX_LOCKS],
        regions: [Region { address: 0, len: 0, checksum: 0 }; MAX_REGIONS],
    };

    fn bytes(&self) -> &[u8] {
        // SAFETY: plain numbers without padding: every byte has a value.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

/// Registers the procedure of this process, in the place of a former one.
///
/// # Errors
/// [`Error::Invalid`], [`Error::NoMemory`].
pub fn register(procedure: Procedure, data: *mut c_void, options: &Options) -> Result<(), Error> {
    let limit = u64::try_from(options.time_limit.as_millis()).map_err(|_| Error::Invalid)?;
    if options.stack_size as u64 > MAX_STACK
        || options.stack_size < 16 << 10
        || limit > MAX_TIME_LIMIT_MS
        || limit == 0
    {
        return Err(Error::Invalid);
    }
    change(|copy| {
        copy.entry = entry::address();
        copy.procedure = procedure as *const () as u64;
        copy.data = data as u64;
        copy.stack_size = options.stack_size as u64;
        copy.time_limit_ms = limit;
        copy.flags = if options.threads_run { FLAG_THREADS_RUN } else { 0 };
        Ok(())
    })
}

/// Takes the registration back; locks and regions stay known.
pub fn unregister() {
    // What there is no record of cannot fail to be written.
    _ = change(|copy| {
        copy.procedure = 0;
        Ok(())
    });
}

/// Has the contents of `len` bytes at `start` checked before the procedure runs: they must not be changed from now on, or
/// `protect` be called again after each change (which reads all of them).
///
/// # Errors
/// [`Error::Full`], [`Error::NoMemory`].
///
/// # Safety
/// The bytes are readable, and nobody changes them while this is called.
pub unsafe fn protect(start: *const u8, len: usize) -> Result<(), Error> {
    // SAFETY: the caller's promise.
    let sum = checksum(unsafe { std::slice::from_raw_parts(start, len) });
    let region = Region { address: start as u64, len: len as u64, checksum: sum };
    change(|copy| {
        let count = copy.region_count as usize;
        let known = copy.regions.iter_mut().take(count).find(|known| known.address == region.address);
        if let Some(known) = known {
            *known = region;
            return Ok(());
        }
        *copy.regions.get_mut(count).ok_or(Error::Full)? = region;
        copy.region_count += 1;
        Ok(())
    })
}

/// No longer checks what begins at `start`.
///
/// # Errors
/// [`Error::Unknown`].
pub fn unprotect(start: *const u8) -> Result<(), Error> {
    change(|copy| {
        let count = copy.region_count as usize;
        let at = copy.regions.iter().take(count).position(|known| known.address == start as u64);
        let at = at.ok_or(Error::Unknown)?;
        copy.regions.copy_within(at + 1..count, at);
        copy.region_count -= 1;
        Ok(())
    })
}

/// Makes a lock known: the context and the report name those that were held. `kind`: one of the record's `LOCK_*`; `tag` is the application's.
///
/// # Errors
/// [`Error::Full`], [`Error::NoMemory`]; [`Error::Invalid`]: there is no such kind.
pub fn watch_lock(lock: *const c_void, kind: u32, tag: u32) -> Result<(), Error> {
    if !matches!(kind, LOCK_MUTEX | LOCK_RWLOCK | LOCK_WORD) {
        return Err(Error::Invalid);
    }
    change(|copy| {
        let count = copy.lock_count as usize;
        let known = copy.locks.iter_mut().take(count).find(|known| known.address == lock as u64);
        if let Some(known) = known {
            *known = Lock { address: lock as u64, kind, tag };
            return Ok(());
        }
        *copy.locks.get_mut(count).ok_or(Error::Full)? = Lock { address: lock as u64, kind, tag };
        copy.lock_count += 1;
        Ok(())
    })
}

/// No longer watches a lock, as before it is freed.
///
/// # Errors
/// [`Error::Unknown`].
pub fn unwatch_lock(lock: *const c_void) -> Result<(), Error> {
    change(|copy| {
        let count = copy.lock_count as usize;
        let at = copy.locks.iter().take(count).position(|known| known.address == lock as u64);
        let at = at.ok_or(Error::Unknown)?;
        copy.locks.copy_within(at + 1..count, at);
        copy.lock_count -= 1;
        Ok(())
    })
}

/// The regions of the record, as it lies in memory. Takes no lock, allocates nothing and copies no record to the stack, which may be small: for the
/// crash procedure's thread, while nobody changes the record.
pub(crate) fn regions_in_place() -> impl Iterator<Item = Region> {
    let base = RECORD.load(Ordering::Acquire);
    let copies = [0, COPY].into_iter().filter_map(move |at| {
        // SAFETY: the mapping has two copies, each on a page of its own, and stays; any bytes make a `Copy`, and nobody changes them now.
        let copy = (!base.is_null()).then(|| unsafe { &*base.add(at).cast::<Copy>() })?;
        let is_whole = sum_of_copy(copy.bytes()) == copy.checksum;
        (copy.magic == MAGIC && copy.version == VERSION && is_whole).then_some(copy)
    });
    let copy = copies.max_by_key(|copy| copy.generation);
    copy.into_iter().flat_map(|copy| copy.regions.iter().take(copy.region_count as usize)).copied()
}

/// What is registered: procedure, data, bytes of stack.
pub(crate) fn registered() -> Option<(u64, u64, usize)> {
    let copy = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    (copy.procedure != 0).then_some((copy.procedure, copy.data, copy.stack_size as usize))
}

/// Changes the record: the copy that is out of date becomes the one that counts, with its last store.
fn change(f: impl FnOnce(&mut Copy) -> Result<(), Error>) -> Result<(), Error> {
    let mut current: MutexGuard<'_, Copy> = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    let base = mapping()?;
    let mut next = *current;
    f(&mut next)?;
    next.generation += 1;
    next.checksum = sum_of_copy(next.bytes());
    let at = if next.generation.is_multiple_of(2) { 0 } else { COPY };
    // SAFETY: the mapping has two copies and is ours; who reads it does so when nobody runs.
    unsafe {
        let to = base.add(at);
        // It is none until it is whole.
        to.write_bytes(0, MAGIC.len());
        fence(Ordering::SeqCst);
        let bytes = next.bytes();
        std::ptr::copy_nonoverlapping(
            bytes.as_ptr().add(MAGIC.len()),
            to.add(MAGIC.len()),
            bytes.len() - MAGIC.len(),
        );
        fence(Ordering::SeqCst);
        std::ptr::copy_nonoverlapping(MAGIC.as_ptr(), to, MAGIC.len());
    }
    *current = next;
    Ok(())
}

/// The mapping; made by whoever comes first, under the lock.
fn mapping() -> Result<*mut u8, Error> {
    let known = RECORD.load(Ordering::Acquire);
    if !known.is_null() {
        return Ok(known);
    }
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice; advice changes no contents.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), SIZE, prot, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return Err(Error::NoMemory);
        }
        for advice in [libc::MADV_DONTDUMP, libc::MADV_RANDOM, libc::MADV_NOHUGEPAGE] {
            // By these it is found; without NOHUGEPAGE (a kernel without huge pages) by the other two.
            libc::madvise(start, SIZE, advice);
        }
        // Not to be swapped out, where it would not be found; whoever may lock nothing goes without.
        libc::mlock(start, SIZE);
        RECORD.store(start.cast(), Ordering::Release);
        Ok(start.cast())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::parse;
    use crate::{Context, Outcome};

    extern "C" fn procedure(_: &Context, _: *mut c_void) -> Outcome {
        Outcome::Continue
    }

    fn record() -> Result<crate::record::Record, crate::record::RecordError> {
        // SAFETY: the mapping stays; nobody else changes it in this test.
        parse(unsafe { std::slice::from_raw_parts(RECORD.load(Ordering::Acquire), SIZE) })
    }

    // One test: there is one record.
    #[test]
    fn what_is_registered_can_be_read() {
        let options = Options { stack_size: 1 << 20, ..Options::default() };
        assert_eq!(
            register(procedure, std::ptr::null_mut(), &Options { stack_size: 1, ..options }),
            Err(Error::Invalid)
        );
        register(procedure, 0x77 as *mut c_void, &options).unwrap();
        let found = record().unwrap();
        assert_eq!((found.procedure, found.data), (procedure as *const () as u64, 0x77));
        assert_eq!((found.stack_size, found.time_limit_ms, found.threads_run), (1 << 20, 20_000, false));
        let data = [7u8; 100];
        // SAFETY: an array of our own.
        unsafe {
            protect(data.as_ptr(), 50).unwrap();
            protect(data.as_ptr(), 100).unwrap();
        }
        let region = Region { address: data.as_ptr() as u64, len: 100, checksum: checksum(&data) };
        assert_eq!(record().unwrap().regions, [region]);
        watch_lock(0x1000 as *const c_void, crate::record::LOCK_WORD, 5).unwrap();
        assert_eq!(regions_in_place().collect::<Vec<_>>(), [region]);
        unprotect(data.as_ptr()).unwrap();
        assert_eq!(regions_in_place().count(), 0);
        assert_eq!(unprotect(data.as_ptr()), Err(Error::Unknown));
        assert_eq!((record().unwrap().regions.len(), record().unwrap().locks.len()), (0, 1));
        assert_eq!(watch_lock(0x1000 as *const c_void, 77, 5), Err(Error::Invalid));
        unwatch_lock(0x1000 as *const c_void).unwrap();
        assert_eq!(unwatch_lock(0x1000 as *const c_void), Err(Error::Unknown));
        assert_eq!(crate::rehearse(), Some(Outcome::Continue));
        unregister();
        assert_eq!(crate::rehearse(), None);
        assert_eq!(record(), Err(crate::record::RecordError::Empty));
    }
}
