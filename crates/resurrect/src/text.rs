//! Program text: what the dead kernel had of it in memory, against the file that it was mapped from.
//!
//! A process that comes back gets its text from the file. One that went wrong in memory has been executed by the dead kernel's processes until
//! then: what they have done since is in doubt. Only pages that were clean are compared, of files that are the same and that nobody has
//! changed lately; a process's own copies of pages are its memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use snapshot::{
    FileKind, Inode, InodeId, PAGE_SIZE, PhysMem, Process, Prot, RECENT_SECONDS, Snapshot, VmaKind,
};

use crate::deadline::Deadline;
use crate::file::Files;
use crate::page_cache::{is_older, verify};

/// Pages that are compared in one go.
const CHUNK: u64 = 32;

/// Pages of files whose contents in memory were not the file's.
#[derive(Debug, Default)]
pub(crate) struct Differences {
    of: BTreeMap<InodeId, BTreeSet<u64>>,
    /// The time was up before all was compared.
    pub(crate) is_incomplete: bool,
}

/// A part of a file that a process executes: its inode, and which of its pages.
struct Mapped {
    inode: InodeId,
    pages: Range<u64>,
    /// Pages that the process has copies of.
    own: Vec<Range<u64>>,
}

/// The text of a process.
fn text_of(snapshot: &Snapshot, process: &Process) -> Vec<Mapped> {
    let mm = process.address_space.and_then(|id| snapshot.address_spaces.get(&id));
    let vmas = mm.into_iter().flat_map(|mm| &mm.vmas).filter(|vma| vma.prot.contains(Prot::EXEC));
    let mapped = vmas.filter_map(|vma| {
        let VmaKind::File { file, offset } = vma.kind else { return None };
        let file =
            snapshot.files.get(&file).filter(|file| file.kind == FileKind::Regular && !file.deleted)?;
        let first = offset / PAGE_SIZE;
        let page_at = |addr: u64| first + addr.saturating_sub(vma.start) / PAGE_SIZE;
        let own = vma.pages.iter().map(|run| page_at(run.addr)..page_at(run.addr) + u64::from(run.count));
        let pages = first..first.saturating_add(vma.end.saturating_sub(vma.start) / PAGE_SIZE);
        Some(Mapped { inode: file.inode, pages, own: own.collect() })
    });
    mapped.collect()
}

impl Differences {
    /// Compares the text of `processes` with their files, each part once, until `deadline`.
    pub(crate) fn find(
        snapshot: &Snapshot,
        processes: &[&Process],
        files: &Files,
        mem: &dyn PhysMem,
        deadline: Deadline,
    ) -> Self {
        let mut wanted: BTreeMap<InodeId, Vec<Range<u64>>> = BTreeMap::new();
        for mapped in processes.iter().flat_map(|process| text_of(snapshot, process)) {
            let ranges = wanted.entry(mapped.inode).or_default();
            if !ranges.contains(&mapped.pages) {
                ranges.push(mapped.pages);
            }
        }
        // Any of the open files with this inode does.
        let open: BTreeMap<InodeId, i32> =
            files.opened().filter_map(|(id, fd)| Some((snapshot.files.get(&id)?.inode, fd))).collect();
        let now = snapshot.clocks.realtime_ns / 1_000_000_000;
        let mut found = Self::default();
        for (id, ranges) in wanted {
            let Some((inode, fd)) = snapshot.inodes.get(&id).zip(open.get(&id)) else { continue };
            // The disk may lag behind memory with what was changed lately; on other machines' disks others write.
            let is_settled = !inode.dirty && inode.ctime.sec < now.saturating_sub(RECENT_SECONDS);
            if !is_settled
                || !matches!(inode.fs_type.as_bytes(), b"ext4" | b"ext3" | b"ext2" | b"xfs" | b"btrfs")
            {
                continue;
            }
            // The open one may have no right to read.
            let Ok(file) = File::open(format!("/proc/self/fd/{fd}")) else { continue };
            let path = inode.path.as_path();
            if !is_same(path, inode, &file) {
                continue;
            }
            let differing = differences(inode, &file, &ranges, mem, deadline);
            if !differing.is_empty() {
                found.of.insert(id, differing);
            }
        }
        found.is_incomplete = deadline.is_over();
        found
    }

    /// What a process has executed that its files do not have; `None` if nothing.
    pub(crate) fn of(&self, snapshot: &Snapshot, process: &Process) -> Option<String> {
        if self.of.is_empty() {
            return None;
        }
        text_of(snapshot, process).into_iter().find_map(|mapped| {
            let differing = self.of.get(&mapped.inode)?;
            let is_own = |page: &u64| mapped.own.iter().any(|own| own.contains(page));
            let page = differing.range(mapped.pages.clone()).find(|page| !is_own(page))?;
            let path =
                snapshot.inodes.get(&mapped.inode).map(|inode| inode.path.to_string()).unwrap_or_default();
            Some(format!("page {page} of its program text was not what {path} has"))
        })
    }
}

/// Whether an open file is the one that the dead kernel knew, as it knew it.
fn is_same(path: &Path, inode: &Inode, file: &File) -> bool {
    let Ok(meta) = file.metadata() else { return false };
    verify(path, inode, &meta).is_ok() && meta.len() == inode.size && !is_older(&meta, inode)
}

/// Pages within `ranges` that memory has otherwise than the file.
fn differences(
    inode: &Inode,
    file: &File,
    ranges: &[Range<u64>],
    mem: &dyn PhysMem,
    deadline: Deadline,
) -> BTreeSet<u64> {
    let mut differing = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let doubtful = |page: u64| {
        inode.doubtful.iter().any(|d| (d.index..d.index.saturating_add(d.count.into())).contains(&page))
    };
    let (mut dead, mut disk) = (vec![0; (CHUNK * PAGE_SIZE) as usize], vec![0; (CHUNK * PAGE_SIZE) as usize]);
    for run in inode.pages.iter().filter(|run| !run.dirty) {
        let end = run.index.saturating_add(run.count.into());
        for range in ranges {
            let mut page = run.index.max(range.start);
            while page < end.min(range.end) && !deadline.is_over() {
                let count = CHUNK.min(end.min(range.end) - page);
                let bytes = (count * PAGE_SIZE) as usize;
                let frame = run.pfn.saturating_add(page - run.index);
                // Mappings overlap; what cannot be read says nothing.
                if seen.insert((page, count))
                    && mem.read(frame.saturating_mul(PAGE_SIZE), &mut dead[..bytes]).is_ok()
                    && let Some(there) = read_at(file, &mut disk[..bytes], page * PAGE_SIZE)
                {
                    // The rest of the last page is the program's to write to.
                    let both = dead[..there]
                        .chunks(PAGE_SIZE as usize)
                        .zip(disk[..there].chunks(PAGE_SIZE as usize));
                    let other =
                        (page..).zip(both).filter(|(page, (dead, disk))| dead != disk && !doubtful(*page));
                    differing.extend(other.map(|(page, _)| page));
                }
                page += count;
            }
        }
    }
    differing
}

/// Fills `buf` up to the file's end; how much that is.
fn read_at(file: &File, buf: &mut [u8], at: u64) -> Option<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(buf.get_mut(done..)?, at.checked_add(done as u64)?) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    Some(done)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::time::Duration;

    use snapshot::{DoubtfulPage, PageCacheRun};

    use super::*;
    use crate::testing::Mem;

    const PAGE: usize = PAGE_SIZE as usize;

    /// A file of three pages and a half, the dead memory with its pages from frame 4 on, and its inode.
    fn program() -> (File, Vec<u8>, Inode) {
        let contents: Vec<u8> = (0..PAGE * 3 + PAGE / 2).map(|i| (i / 7) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&contents).unwrap();
        let mut mem = vec![0; PAGE * 4];
        mem.extend(&contents);
        mem.resize(PAGE * 8, 0xcc);
        let run = PageCacheRun { index: 0, pfn: 4, count: 4, dirty: false };
        let inode = Inode { size: contents.len() as u64, pages: vec![run], ..crate::testing::inode() };
        (file, mem, inode)
    }

    fn compare(inode: &Inode, file: &File, mem: Vec<u8>, ranges: &[Range<u64>]) -> Vec<u64> {
        let deadline = Deadline::after(Duration::from_secs(60));
        differences(inode, file, ranges, &Mem(mem), deadline).into_iter().collect()
    }

    #[test]
    fn text_is_what_the_file_has() {
        let (file, mem, inode) = program();
        let all = [0..4, 1..2];
        assert!(compare(&inode, &file, mem.clone(), &all).is_empty(), "behind its end anything may be");
        let mut flipped = mem.clone();
        flipped[PAGE * 6 + 100] ^= 4;
        assert_eq!(compare(&inode, &file, flipped.clone(), &all), [2]);
        assert!(compare(&inode, &file, flipped.clone(), &[0..1, 1..2]).is_empty(), "nobody executes it");
        let run = PageCacheRun { dirty: true, ..inode.pages[0] };
        let dirty = Inode { pages: vec![run], ..inode.clone() };
        assert!(compare(&dirty, &file, flipped.clone(), &all).is_empty(), "it is newer than the file");
        let page = DoubtfulPage { index: 2, pfn: 6, count: 1, why: String::new() };
        let told = Inode { doubtful: vec![page], ..inode.clone() };
        assert!(compare(&told, &file, flipped.clone(), &all).is_empty());
        let over = Deadline::after(Duration::ZERO);
        assert!(differences(&inode, &file, &all, &Mem(flipped), over).is_empty());
        assert!(
            compare(&inode, &file, mem[..PAGE * 5].to_vec(), &all).is_empty(),
            "memory that is not there"
        );
    }

    #[test]
    fn only_the_same_file_is_compared() {
        use std::os::unix::fs::MetadataExt as _;
        let (file, _, inode) = program();
        let meta = file.metadata().unwrap();
        let mtime = snapshot::Timestamp { sec: meta.mtime(), nsec: meta.mtime_nsec() as u32 };
        let own = Inode { ino: meta.ino(), mtime, fs_type: "ext4".into(), mode: meta.mode(), ..inode };
        let path = Path::new("/x");
        assert!(is_same(path, &own, &file));
        assert!(!is_same(path, &Inode { ino: meta.ino() + 1, ..own.clone() }, &file));
        assert!(!is_same(path, &Inode { size: 5, ..own.clone() }, &file));
        let older = snapshot::Timestamp { sec: mtime.sec - 1, ..mtime };
        assert!(!is_same(path, &Inode { mtime: older, ..own }, &file));
    }
}
