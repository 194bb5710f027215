//! Where on the disk the contents of a file are.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use snapshot::{Extent, PAGE_SIZE};

/// FS_IOC_FIEMAP: _IOWR('f', 11, struct fiemap), include/uapi/linux/fs.h.
const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b;
/// FIEMAP_EXTENT_LAST.
const LAST: u32 = 1;
/// FIEMAP_EXTENT_UNKNOWN, _DELALLOC, _ENCODED, _NOT_ALIGNED, _DATA_INLINE, _UNWRITTEN: their contents are not in the blocks as they are.
const NOT_PLAIN: u32 = 0x2 | 0x4 | 0x8 | 0x100 | 0x200 | 0x800;
/// Extents that are asked for at a time.
const AT_A_TIME: usize = 128;
/// Extents of one file.
const MAX_EXTENTS: usize = 1 << 20;

/// `struct fiemap_extent` (include/uapi/linux/fiemap.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap`, with room for some extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; AT_A_TIME],
}

/// The extents of a file that hold its contents as they are, as the file system has them.
pub(crate) fn of(file: &File) -> io::Result<Vec<Extent>> {
    let mut all = Vec::new();
    let mut start = 0;
    loop {
        let mut map = Fiemap {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: AT_A_TIME as u32,
            reserved: 0,
            extents: [FiemapExtent::default(); AT_A_TIME],
        };
        // SAFETY: the kernel writes as many extents as the structure says it has room for.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) })?;
        let found = map.extents.get(..map.mapped_extents as usize).unwrap_or_default();
        let plain = found.iter().filter(|extent| extent.flags & NOT_PLAIN == 0);
        all.extend(plain.map(|extent| Extent {
            index: extent.logical / PAGE_SIZE,
            count: extent.length / PAGE_SIZE,
            block: extent.physical / PAGE_SIZE,
            written: true,
        }));
        match found.last() {
            Some(last) if last.flags & LAST == 0 && all.len() < MAX_EXTENTS => {
                start = last.logical + last.length
            }
            _ => return Ok(all),
        }
    }
}

/// Whether some extents have a part of a file where it says it is.
pub(crate) fn covers(extents: &[Extent], part: &Extent) -> bool {
    let mut at = part.index;
    let end = part.index.saturating_add(part.count);
    for extent in extents {
        let behind = at.checked_sub(extent.index).filter(|behind| *behind < extent.count);
        if let Some(behind) = behind {
            if extent.block + behind != part.block + (at - part.index) {
                return false;
            }
            at = extent.index + extent.count;
        }
        if at >= end {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(index: u64, count: u64, block: u64) -> Extent {
        Extent { index, count, block, written: true }
    }

    #[test]
    fn a_part_is_covered_by_extents_that_go_on_in_the_same_blocks_only() {
        let disk = [extent(0, 4, 100), extent(4, 4, 104), extent(10, 2, 200)];
        for (part, expected) in [
            (extent(1, 2, 101), true),
            (extent(2, 5, 102), true),
            (extent(2, 5, 103), false),
            (extent(6, 4, 106), false),
            (extent(10, 2, 200), true),
            (extent(10, 3, 200), false),
            (extent(20, 1, 0), false),
        ] {
            assert_eq!(covers(&disk, &part), expected, "{part:?}");
        }
    }

    #[test]
    fn a_file_has_as_many_blocks_as_were_written() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], 40_960).unwrap();
        file.sync_all().unwrap();
        match of(&file) {
            Ok(extents) => {
                assert_eq!(extents.iter().map(|e| (e.index, e.count)).collect::<Vec<_>>(), [(10, 1)])
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "{error}"),
        }
    }
}
