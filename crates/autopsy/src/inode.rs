//! Inodes and their page cache (include/linux/fs.h, pagemap.h, xarray.h; 6.1 and 6.12).

use ktypes::{KernelType, MARK_DIRTY, MARK_WRITEBACK};
use snapshot::{Bytes, DoubtfulPage, Inode, InodeId, PageCacheRun, RECENT_SECONDS, Severity, Timestamp};

use vmcore::PAGE_SIZE;

use crate::Autopsy;
use crate::error::{Result, corrupt};
use crate::fs::device;
use crate::swap::Slot;

// i_mode (include/uapi/linux/stat.h).
pub(crate) const S_IFSOCK: u32 = 0o140_000;
pub(crate) const S_IFLNK: u32 = 0o120_000;
pub(crate) const S_IFREG: u32 = 0o100_000;
pub(crate) const S_IFBLK: u32 = 0o060_000;
pub(crate) const S_IFDIR: u32 = 0o040_000;
pub(crate) const S_IFCHR: u32 = 0o020_000;
pub(crate) const S_IFIFO: u32 = 0o010_000;

/// i_state: I_DIRTY_SYNC, I_DIRTY_DATASYNC, I_DIRTY_PAGES (bits 0 to 2) and I_DIRTY_TIME (bit 11).
const I_DIRTY: u64 = 0x807;
/// The same since the bits that are waited for come first, as an enum (6.12): bits 3 to 5 and 11.
const I_DIRTY_AFTER_WAIT_BITS: u64 = 0x838;
/// Pages that one swap entry stands for: those of the largest folio.
const MAX_ENTRY: u64 = 512;
/// Entries of one file's page cache: 16 TiB.
const MAX_PAGES: usize = 1 << 32;

#[derive(KernelType)]
#[kernel("inode")]
struct InodeStruct {
    i_mode: u16,
    i_uid: u32,
    i_gid: u32,
    i_sb: u64,
    i_mapping: u64,
    i_ino: u64,
    i_generation: u32,
    i_nlink: u32,
    i_rdev: u32,
    i_size: u64,
    // Structures until 6.10, parts since.
    #[kernel("i_atime.tv_sec", or = "__i_atime.tv_sec", or = "i_atime_sec")]
    atime: i64,
    #[kernel("i_mtime.tv_sec", or = "__i_mtime.tv_sec", or = "i_mtime_sec")]
    mtime: i64,
    #[kernel("i_ctime.tv_sec", or = "__i_ctime.tv_sec", or = "i_ctime_sec")]
    ctime: i64,
    #[kernel("i_atime.tv_nsec", or = "__i_atime.tv_nsec", optional)]
    atime_nsec: Option<u64>,
    #[kernel("i_mtime.tv_nsec", or = "__i_mtime.tv_nsec", optional)]
    mtime_nsec: Option<u64>,
    #[kernel("i_ctime.tv_nsec", or = "__i_ctime.tv_nsec", optional)]
    ctime_nsec: Option<u64>,
    #[kernel("i_atime_nsec", optional)]
    atime_nsec32: Option<u32>,
    #[kernel("i_mtime_nsec", optional)]
    mtime_nsec32: Option<u32>,
    #[kernel("i_ctime_nsec", optional)]
    ctime_nsec32: Option<u32>,
    #[kernel(address)]
    i_state: u64,
    i_pipe: u64,
}

/// Of a page in a page cache, the first if it is a compound one.
#[derive(KernelType)]
#[kernel("page")]
struct CachedPage {
    mapping: u64,
    index: u64,
}

/// What has to be known of an inode before it is known what it is good for.
pub(crate) struct InodeFacts {
    pub mode: u32,
    pub rdev: u32,
    pub pipe: u64,
    pub fs_type: Bytes,
    dev: u32,
    raw: InodeStruct,
}

impl Autopsy<'_> {
    pub(crate) fn inode_facts(&self, addr: u64) -> Result<InodeFacts> {
        let raw: InodeStruct = self.kernel.read(addr)?;
        let sb = self.super_block(raw.i_sb)?;
        Ok(InodeFacts {
            mode: raw.i_mode.into(),
            rdev: raw.i_rdev,
            pipe: raw.i_pipe,
            fs_type: self.fs_type(&sb)?,
            dev: sb.s_dev,
            raw,
        })
    }

    /// Puts an inode into the table, unless it is there.
    pub(crate) fn inode(&self, addr: u64, facts: &InodeFacts, path: &Bytes) -> Result<()> {
        let id = InodeId(addr);
        if self.inodes.borrow().contains_key(&id) {
            return Ok(());
        }
        let raw = &facts.raw;
        let (dev_major, dev_minor) = device(facts.dev);
        let has_wait_bits = self.kernel.enum_value("__I_NEW").is_ok();
        let dirty_bits = if has_wait_bits { I_DIRTY_AFTER_WAIT_BITS } else { I_DIRTY };
        let stamp = |sec, nsec: Option<u64>, nsec32: Option<u32>| Timestamp {
            sec,
            nsec: nsec.map_or(nsec32.unwrap_or(0), |n| n as u32),
        };
        let mut inode = Inode {
            ino: raw.i_ino,
            generation: raw.i_generation,
            dev_major,
            dev_minor,
            fs_type: facts.fs_type.clone(),
            mode: facts.mode,
            uid: raw.i_uid,
            gid: raw.i_gid,
            nlink: raw.i_nlink,
            size: raw.i_size,
            atime: stamp(raw.atime, raw.atime_nsec, raw.atime_nsec32),
            mtime: stamp(raw.mtime, raw.mtime_nsec, raw.mtime_nsec32),
            ctime: stamp(raw.ctime, raw.ctime_nsec, raw.ctime_nsec32),
            path: path.clone(),
            // The state's bits are in the low half, whether it is 32 or 64 bits wide.
            dirty: u64::from(self.kernel.read_u32(raw.i_state)?) & dirty_bits != 0,
            pages: Vec::new(),
            doubtful: Vec::new(),
            huge_page: match facts.fs_type.as_bytes() {
                b"hugetlbfs" => Some(self.huge_page_size(raw.i_sb)?),
                _ => None,
            },
            extents: None,
            xattrs: None,
            lost_pages: 0,
        };
        // Only then the disk may have other ones.
        let lately = self.now().realtime_ns / 1_000_000_000 - RECENT_SECONDS;
        if facts.fs_type.as_bytes() == b"tmpfs" || raw.ctime >= lately {
            match self.xattrs(addr, &facts.fs_type) {
                Ok(None) if facts.fs_type.as_bytes() == b"xfs" => {
                    let text = format!("{path}: its extended attributes may be older on the disk");
                    self.find(Severity::Loss, "file", text);
                }
                Ok(xattrs) => inode.xattrs = xattrs,
                Err(error) => self.find(Severity::Note, "file", format!("{path}: {error}")),
            }
        }
        // The ring of a context of asynchronous I/O is in the page cache of an inode without a type.
        let has_pages = facts.mode & 0o170_000 == S_IFREG || facts.fs_type.as_bytes() == b"aio";
        if has_pages && raw.i_mapping != 0 {
            self.page_cache(addr, raw.i_mapping, &mut inode)?;
            // Or none any more.
            if raw.ctime >= lately || raw.i_nlink == 0 {
                let extents = match inode.fs_type.as_bytes() {
                    b"ext4" => self.extents(addr, raw.i_sb),
                    b"xfs" => self.xfs_extents(addr),
                    _ => Ok(None),
                };
                match extents {
                    Ok(extents) => inode.extents = extents,
                    Err(error) => self.find(Severity::Note, "file", format!("{path}: {error}")),
                }
            }
        }
        inode.dirty |= inode.pages.iter().any(|run| run.dirty);
        self.inodes.borrow_mut().insert(id, inode);
        Ok(())
    }

    /// Fills in what the page cache of an `address_space` holds.
    fn page_cache(&self, addr: u64, mapping: u64, inode: &mut Inode) -> Result<()> {
        let host =
            self.kernel.read_u64(mapping.wrapping_add(self.kernel.offset_of("address_space", "host")?))?;
        let is_checked = !inode.lives_in_memory();
        let pages = mapping.wrapping_add(self.kernel.offset_of("address_space", "i_pages")?);
        let frames = self.frames()?;
        // In memory-backed files a value is a swapped-out page, elsewhere the shadow of an evicted one.
        let values_are_swapped = matches!(inode.fs_type.as_bytes(), b"tmpfs" | b"devtmpfs");
        let (mut damage, mut why_lost) = (None, None);
        let huge_page = inode.huge_page;
        let (runs, lost, doubtful) = (&mut inode.pages, &mut inode.lost_pages, &mut inode.doubtful);
        self.kernel.xarray_for_each(pages, MAX_PAGES, |first, entry| {
            let mut count = entry.last.saturating_sub(first).saturating_add(1);
            let mut first = first;
            // Until 6.6 a page of hugetlbfs counted as one.
            if let Some(small) = huge_page.map(|size| size / PAGE_SIZE).filter(|_| count == 1) {
                (first, count) = (first.saturating_mul(small), small);
            }
            let Some(page) = entry.pointer() else {
                if let (true, Some(value)) = (values_are_swapped, entry.value()) {
                    if count > MAX_ENTRY {
                        *lost = lost.saturating_add(count);
                        why_lost.get_or_insert("are in more swap slots than one entry has");
                        return Ok(());
                    }
                    for part in 0..count {
                        match self.swapped_page(value.wrapping_add(part)) {
                            Slot::Frame(pfn) => push_run(runs, first.saturating_add(part), pfn, 1, false),
                            Slot::Zero => {}
                            Slot::Lost(why) => {
                                *lost += 1;
                                why_lost.get_or_insert(why);
                            }
                        }
                    }
                }
                return Ok(());
            };
            let pfn = match self.kernel.page_to_pfn(page) {
                Ok(pfn) => pfn,
                Err(error) => {
                    damage.get_or_insert_with(|| error.to_string());
                    return Ok(());
                }
            };
            let frame = match frames.get(pfn) {
                Ok(frame) => frame,
                Err(error) => {
                    damage.get_or_insert_with(|| error.to_string());
                    return Ok(());
                }
            };
            if frame.uptodate || frame.dirty {
                // What was being written may not have arrived.
                let unwritten = 1 << MARK_DIRTY | 1 << MARK_WRITEBACK;
                let dirty = frame.dirty || entry.marks & unwritten != 0;
                if dirty && is_checked {
                    let why = match self.kernel.read::<CachedPage>(page) {
                        Ok(page) => contradiction(&page, (host, addr), mapping, first),
                        Err(error) => Some(error.to_string()),
                    };
                    if let Some(why) = why {
                        let count = u32::try_from(count).unwrap_or(u32::MAX);
                        doubtful.push(DoubtfulPage { index: first, pfn, count, why });
                        return Ok(());
                    }
                }
                push_run(runs, first, pfn, count, dirty);
            }
            Ok(())
        })?;
        if let Some(why) = why_lost {
            let text = format!("{}: {lost} pages {why}", inode.path);
            self.find(Severity::Note, "memory", text);
        }
        if let Some(why) = damage {
            // Whoever has it open or mapped would have holes in it.
            return Err(corrupt("address_space", mapping, format!("{}: {why}", inode.path)));
        }
        Ok(())
    }
}

/// What a dirty page and its place do not agree on. `host`: the inode of the page cache, and the inode that it was found through.
fn contradiction(page: &CachedPage, host: (u64, u64), mapping: u64, index: u64) -> Option<String> {
    if host.0 != host.1 {
        return Some("the page cache says that it is another inode's".to_owned());
    }
    if page.mapping != mapping {
        return Some("it says that it is in another page cache".to_owned());
    }
    (page.index != index)
        .then(|| format!("it says that it is page {}, and is in the place of {index}", page.index))
}

/// Appends pages, to the last run if they go on there.
fn push_run(runs: &mut Vec<PageCacheRun>, index: u64, pfn: u64, count: u64, dirty: bool) {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    match runs.last_mut() {
        Some(run)
            if run.dirty == dirty
                && run.index.checked_add(run.count.into()) == Some(index)
                && run.pfn.checked_add(run.count.into()) == Some(pfn)
                && run.count.checked_add(count).is_some() =>
        {
            run.count += count;
        }
        _ => runs.push(PageCacheRun { index, pfn, count, dirty }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dirty_page_has_to_agree_with_its_place() {
        let page = |mapping, index| CachedPage { mapping, index };
        assert_eq!(contradiction(&page(8, 3), (16, 16), 8, 3), None);
        assert!(contradiction(&page(8, 3), (24, 16), 8, 3).is_some_and(|why| why.contains("inode")));
        assert!(contradiction(&page(0, 3), (16, 16), 8, 3).is_some_and(|why| why.contains("page cache")));
        assert!(contradiction(&page(8, 4), (16, 16), 8, 3).is_some_and(|why| why.contains("page 4")));
    }

    #[test]
    fn pages_join_only_where_both_sides_go_on() {
        let mut runs = Vec::new();
        push_run(&mut runs, 0, 100, 1, false);
        push_run(&mut runs, 1, 101, 4, false);
        push_run(&mut runs, 5, 105, 1, true);
        push_run(&mut runs, 6, 107, 1, true);
        push_run(&mut runs, 8, 108, 1, true);
        let run = |index, pfn, count, dirty| PageCacheRun { index, pfn, count, dirty };
        assert_eq!(
            runs,
            [run(0, 100, 5, false), run(5, 105, 1, true), run(6, 107, 1, true), run(8, 108, 1, true)]
        );
    }
}
