//! Pools of huge pages (hugetlb).

use snapshot::{HugePages, Snapshot};

use crate::{FileStale, sys};

/// Of the memory that is free, the part that huge pages may take.
const SHARE: u64 = 2;

/// Fills the pools as the dead kernel had them or, where there is not the memory for it, with the pages that are needed. Returns those that
/// are smaller than they were.
pub(crate) fn fill_pools(snapshot: &Snapshot) -> Vec<FileStale> {
    snapshot.huge_pages.iter().filter_map(fill).collect()
}

fn fill(pool: &HugePages) -> Option<FileStale> {
    let path = format!("/sys/kernel/mm/hugepages/{}/nr_hugepages", pool.name());
    let have = || -> u64 {
        let text = sys::read_proc(&path).unwrap_or_default();
        String::from_utf8_lossy(&text).trim().parse().unwrap_or(0)
    };
    let room = sys::available_memory() / SHARE / pool.page_size;
    // Beyond that it would take what the processes themselves need.
    let wanted = if pool.total <= room { pool.total } else { pool.needed.min(room) };
    let written = if wanted > have() { sys::write_proc(&path, &wanted.to_string()) } else { Ok(()) };
    let have = have();
    let why = match written {
        _ if have >= pool.total => return None,
        Err(e) => format!("it cannot be filled: {e}"),
        Ok(()) => "there is not the memory for more".into(),
    };
    let why = format!(
        "the pool has {have} pages instead of {}, of which {} were needed: {why}",
        pool.total, pool.needed
    );
    Some(FileStale { path: path.as_str().into(), why })
}

/// What tells mmap(2), memfd_create(2) and shmget(2) the size of the pages (MAP_HUGE_SHIFT and its kin).
pub(crate) fn size_flags(page_size: u64) -> u32 {
    page_size.trailing_zeros() << libc::MAP_HUGE_SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_by_their_logarithm() {
        assert_eq!(size_flags(2 << 20), libc::MAP_HUGE_2MB as u32);
        assert_eq!(size_flags(1 << 30), libc::MAP_HUGE_1GB as u32);
    }
}
