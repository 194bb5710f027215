//! What is where in an address space, page by page, and what of it can be had.

use std::ops::Range;

use serde::Serialize;
use snapshot::{
    AddressSpace, Inode, InodeId, OpenFile, PAGE_SIZE, PageRun, PhysMem, Prot, Snapshot, SwapArea, Vma,
    VmaKind,
};

use crate::elf::Load;

/// Bytes of zeroes in one piece from which on they are not written as a hole of the file, but as memory without contents: programs that reserve
/// terabytes would else have core files that are longer than file systems can have.
pub const BIG_HOLE: u64 = 16 << 20;

/// Memory of a process that existed, and cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// What is mapped there, for people.
    pub mapping: String,
    /// For people, too.
    pub why: String,
}

/// A PT_LOAD.
#[derive(Debug)]
pub(crate) struct Segment {
    /// First address.
    pub(crate) start: u64,
    /// First address behind it.
    pub(crate) end: u64,
    pub(crate) prot: Prot,
    /// Whether it has contents in the file; what is then in none of `pages` is zero.
    pub(crate) has_contents: bool,
    pub(crate) pages: Vec<PageRun>,
}

impl Segment {
    /// As it stands in the file's headers.
    pub(crate) fn load(&self) -> Load {
        let size = self.end - self.start;
        let file_size = if self.has_contents { size } else { 0 };
        Load { prot: self.prot, virt: self.start, phys: 0, size, file_size }
    }
}

/// Where pages of a process come from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// Page frames (or slots) from this one on.
    Frames(u64),
    Zero,
    /// The mapped file has them.
    File,
    /// Nothing that belongs to the process.
    Nothing,
    Missing(String),
}

/// Consecutive pages from the same source.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    start: u64,
    end: u64,
    source: Source,
}

/// All of an address space.
#[derive(Debug)]
pub(crate) struct Memory {
    /// By ascending address.
    pub(crate) segments: Vec<Segment>,
    pub(crate) missing: Vec<Missing>,
    /// Pages with contents.
    pub(crate) pages: u64,
    /// Pages that files have.
    pub(crate) file_pages: u64,
}

impl Memory {
    pub(crate) fn new(snapshot: &Snapshot, space: &AddressSpace, mem: &dyn PhysMem) -> Self {
        let mut memory = Self { segments: Vec::new(), missing: Vec::new(), pages: 0, file_pages: 0 };
        let mut end = 0;
        for vma in &space.vmas {
            if vma.end <= vma.start || !(vma.start | vma.end).is_multiple_of(PAGE_SIZE) {
                continue;
            }
            if vma.start < end {
                let why = "the mapping overlaps another one".to_owned();
                let mapping = describe(snapshot, vma);
                memory.missing.push(Missing { start: vma.start, end: vma.end, mapping, why });
                continue;
            }
            end = vma.end;
            let mut checked = Parts::new(vma.start, vma.end);
            for part in parts(snapshot, vma) {
                readable(snapshot, mem, &part, &mut checked);
            }
            memory.add(vma, checked.parts, || describe(snapshot, vma));
        }
        memory
    }

    /// The segments of a mapping.
    fn add(&mut self, vma: &Vma, parts: Vec<Part>, describe: impl Fn() -> String) {
        let mut open: Option<Segment> = None;
        for Part { start, end, source } in parts {
            let count = (end - start) / PAGE_SIZE;
            let has_contents = match &source {
                Source::Frames(_) => {
                    self.pages += count;
                    true
                }
                Source::Zero => end - start < BIG_HOLE,
                Source::File => {
                    self.file_pages += count;
                    false
                }
                Source::Nothing => {
                    self.segments.extend(open.take());
                    continue;
                }
                Source::Missing(why) => {
                    self.segments.extend(open.take());
                    self.missing.push(Missing { start, end, mapping: describe(), why: why.clone() });
                    continue;
                }
            };
            if open.as_ref().is_some_and(|segment| segment.has_contents != has_contents) {
                self.segments.extend(open.take());
            }
            let new = Segment { start, end, prot: vma.prot, has_contents, pages: Vec::new() };
            let segment = open.get_or_insert(new);
            segment.end = end;
            if let Source::Frames(pfn) = source {
                segment.pages.extend(runs(start, pfn, count));
            }
        }
        self.segments.extend(open);
    }

    /// Copies what is at `addr`, as far as it has contents; how much that was.
    pub(crate) fn read(&self, mem: &dyn PhysMem, addr: u64, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = addr.saturating_add(done as u64);
            let within = at % PAGE_SIZE;
            let len = rest.len().min((PAGE_SIZE - within) as usize);
            let Some(segment) = self.segments.iter().find(|s| (s.start..s.end).contains(&at)) else { break };
            if !segment.has_contents {
                break;
            }
            let holds = |run: &&PageRun| at >= run.addr && (at - run.addr) / PAGE_SIZE < u64::from(run.count);
            match segment.pages.iter().find(holds) {
                Some(run) => {
                    let from = run.pfn * PAGE_SIZE + (at - run.addr);
                    if mem.read(from, &mut rest[..len]).is_err() {
                        break;
                    }
                }
                None => rest[..len].fill(0),
            }
            done += len;
        }
        done
    }
}

fn runs(addr: u64, pfn: u64, count: u64) -> impl Iterator<Item = PageRun> {
    const MAX: u64 = u32::MAX as u64;
    (0..count.div_ceil(MAX)).map(move |n| PageRun {
        addr: addr + n * MAX * PAGE_SIZE,
        pfn: pfn + n * MAX,
        count: (count - n * MAX).min(MAX) as u32,
    })
}

/// Parts of a mapping, without a gap between them.
struct Parts {
    /// Up to here they are known.
    at: u64,
    end: u64,
    parts: Vec<Part>,
}

impl Parts {
    fn new(start: u64, end: u64) -> Self {
        Self { at: start, end, parts: Vec::new() }
    }

    /// What comes next, up to an address.
    fn push(&mut self, end: u64, source: Source) {
        let end = end.min(self.end);
        if end <= self.at {
            return;
        }
        let goes_on = |last: &Part| match (&last.source, &source) {
            (Source::Frames(first), Source::Frames(pfn)) => {
                first + (last.end - last.start) / PAGE_SIZE == *pfn
            }
            (a, b) => a == b,
        };
        match self.parts.last_mut() {
            Some(last) if goes_on(last) => last.end = end,
            _ => self.parts.push(Part { start: self.at, end, source }),
        }
        self.at = end;
    }

    /// Frames that lie at an address, as far as that has not been passed yet.
    fn frames(&mut self, addr: u64, pfn: u64, count: u64) {
        let skip = self.at.saturating_sub(addr) / PAGE_SIZE;
        let end = addr.saturating_add(count.saturating_mul(PAGE_SIZE));
        self.push(end, Source::Frames(pfn.saturating_add(skip)));
    }
}

/// What shows where a mapping has no page of its own.
enum Below<'a> {
    Same(Source),
    /// The image of the vDSO, from this frame on.
    Frames {
        first: u64,
        count: u64,
    },
    /// Contents of a file, or of shared memory, from this page on.
    Object {
        first: u64,
        inode: &'a Inode,
        otherwise: Source,
        exceptions: Vec<(Range<u64>, Source)>,
    },
}

/// Where the pages of a mapping come from, as the snapshot has it.
fn parts(snapshot: &Snapshot, vma: &Vma) -> Vec<Part> {
    let below = below(snapshot, vma);
    let mut parts = Parts::new(vma.start, vma.end);
    for run in &vma.pages {
        if run.addr < vma.start || run.addr >= vma.end || !run.addr.is_multiple_of(PAGE_SIZE) {
            continue;
        }
        fill(&mut parts, run.addr, vma.start, &below);
        parts.frames(run.addr, run.pfn, run.count.into());
    }
    fill(&mut parts, vma.end, vma.start, &below);
    parts.parts
}

fn missing(why: impl Into<String>) -> Source {
    Source::Missing(why.into())
}

fn below<'a>(snapshot: &'a Snapshot, vma: &Vma) -> Below<'a> {
    let lost = |pages: u64| {
        format!(
            "{pages} pages of this mapping are lost (`inspect snapshot` says why); which ones is not known"
        )
    };
    if vma.lost_pages > 0 {
        return Below::Same(missing(lost(vma.lost_pages)));
    }
    let in_memory = |id: &InodeId, offset: u64| match snapshot.inodes.get(id) {
        Some(inode) if inode.lost_pages > 0 => object(inode, offset, missing(lost(inode.lost_pages))),
        Some(inode) => object(inode, offset, Source::Zero),
        None => Below::Same(missing("its pages could not be read")),
    };
    match &vma.kind {
        VmaKind::Anonymous | VmaKind::AnonymousHuge { .. } => Below::Same(Source::Zero),
        VmaKind::SharedAnonymous { inode, offset } => in_memory(inode, *offset),
        VmaKind::AioRing { inode } => match snapshot.inodes.get(inode) {
            Some(inode) => object(inode, 0, missing("its pages could not be read")),
            None => Below::Same(missing("its pages could not be read")),
        },
        VmaKind::SysvShm { id, offset } => match snapshot.shm_segment(*id) {
            Some(segment) => in_memory(&segment.inode, *offset),
            None => Below::Same(missing("the shared memory segment could not be read")),
        },
        VmaKind::File { file, offset } => {
            let open = snapshot.files.get(file);
            match open.and_then(|open| Some((open, snapshot.inodes.get(&open.inode)?))) {
                Some((open, inode)) if inode.lives_in_memory() => in_memory(&open.inode, *offset),
                Some((open, inode)) => file_object(open, inode, *offset),
                None => Below::Same(missing("the file could not be read")),
            }
        }
        VmaKind::Special { name } if name.as_bytes() == b"[vdso]" => match snapshot.kernel.vdso_frames() {
            Some((first, count)) => Below::Frames { first, count },
            None => Below::Same(missing("the kernel's vDSO could not be read")),
        },
        // The kernel's own data, which it maps beside the vDSO.
        VmaKind::Special { .. } => Below::Same(Source::Nothing),
        // Private memory of a kind that is not brought back: its pages are known.
        VmaKind::Unsupported { .. } if !vma.pages.is_empty() => Below::Same(Source::Zero),
        VmaKind::Unsupported { what } => Below::Same(missing(format!("{what}: not read by this version"))),
    }
}

fn object(inode: &Inode, offset: u64, otherwise: Source) -> Below<'_> {
    Below::Object { first: offset / PAGE_SIZE, inode, otherwise, exceptions: Vec::new() }
}

/// Of a file on a disk.
fn file_object<'a>(open: &OpenFile, inode: &'a Inode, offset: u64) -> Below<'a> {
    let mut exceptions: Vec<(Range<u64>, Source)> = Vec::new();
    for page in &inode.doubtful {
        let range = page.index..page.index.saturating_add(page.count.into());
        exceptions.push((range, missing(format!("a page of the file in doubt: {}", page.why))));
    }
    let otherwise = if open.deleted || inode.nlink == 0 {
        exceptions.extend(inode.holes().into_iter().map(|hole| (hole, Source::Zero)));
        missing("on the disk only, in a file that has been deleted")
    } else {
        Source::File
    };
    exceptions.sort_by_key(|(range, _)| range.start);
    Below::Object { first: offset / PAGE_SIZE, inode, otherwise, exceptions }
}

/// Goes on to an address with what is below. `start`: of the mapping.
fn fill(parts: &mut Parts, until: u64, start: u64, below: &Below<'_>) {
    let until = until.min(parts.end);
    match below {
        Below::Same(source) => parts.push(until, source.clone()),
        Below::Frames { first, count } => {
            let end = start.saturating_add(count.saturating_mul(PAGE_SIZE)).min(until);
            let skip = (parts.at - start) / PAGE_SIZE;
            parts.push(end, Source::Frames(first.saturating_add(skip)));
            parts.push(until, Source::Nothing);
        }
        Below::Object { first, inode, otherwise, exceptions } => {
            let index_of = |addr: u64| first.saturating_add((addr - start) / PAGE_SIZE);
            let addr_of =
                |index: u64| start.saturating_add(index.saturating_sub(*first).saturating_mul(PAGE_SIZE));
            let end = addr_of(inode.size.div_ceil(PAGE_SIZE));
            let gap = |parts: &mut Parts, to: u64| {
                let to = to.min(until);
                let now = index_of(parts.at);
                for (range, source) in exceptions.iter().filter(|(range, _)| range.end > now) {
                    let (from, behind) = (addr_of(range.start).min(end), addr_of(range.end).min(end));
                    if from >= to {
                        break;
                    }
                    parts.push(from, otherwise.clone());
                    parts.push(behind.min(to), source.clone());
                }
                parts.push(to.min(end), otherwise.clone());
                parts.push(to, Source::Nothing);
            };
            let at = index_of(parts.at);
            let next = inode.pages.partition_point(|run| run.index.saturating_add(run.count.into()) <= at);
            for run in inode.pages.get(next..).unwrap_or_default() {
                if run.index >= index_of(until) {
                    break;
                }
                gap(parts, addr_of(run.index));
                let skip = index_of(parts.at).saturating_sub(run.index);
                let behind = addr_of(run.index.saturating_add(run.count.into())).min(until);
                parts.push(behind, Source::Frames(run.pfn.saturating_add(skip)));
            }
            gap(parts, until);
        }
    }
}

/// Splits a part by what of it can be read.
fn readable(snapshot: &Snapshot, mem: &dyn PhysMem, part: &Part, out: &mut Parts) {
    let Source::Frames(first) = part.source else { return out.push(part.end, part.source.clone()) };
    let area = SwapArea::slot_of(first).map(|(index, _)| index);
    if let Some(index) = area
        && let Some(why) = out_of_reach(snapshot, index)
    {
        return out.push(part.end, missing(why));
    }
    let mut page = [0; PAGE_SIZE as usize];
    let (mut addr, mut pfn) = (part.start, first);
    while addr < part.end {
        let left = (part.end - addr) / PAGE_SIZE;
        let (there, count) = in_range(mem, pfn, left);
        if !there {
            out.push(addr + count * PAGE_SIZE, missing("its page frame is not in the dump"));
        } else if area.is_none() {
            out.push(addr + count * PAGE_SIZE, Source::Frames(pfn));
        } else {
            for n in 0..count {
                let source = match mem.read((pfn + n) * PAGE_SIZE, &mut page) {
                    Ok(()) => Source::Frames(pfn + n),
                    Err(error) => missing(format!("in a swap area: {error}")),
                };
                out.push(addr + (n + 1) * PAGE_SIZE, source);
            }
        }
        addr += count * PAGE_SIZE;
        pfn = pfn.saturating_add(count);
    }
}

/// Whether a page frame can be had, and of how many from there on, at most `left` and at least one, the same is true.
fn in_range(mem: &dyn PhysMem, pfn: u64, left: u64) -> (bool, u64) {
    let Some(at) = pfn.checked_mul(PAGE_SIZE) else { return (false, left) };
    let ranges = mem.ranges();
    let behind = ranges.partition_point(|range| range.start <= at);
    let inside = behind
        .checked_sub(1)
        .and_then(|n| ranges.get(n))
        .map_or(0, |range| range.start.saturating_add(range.len).saturating_sub(at) / PAGE_SIZE);
    if inside > 0 {
        return (true, inside.min(left));
    }
    let next = ranges.get(behind).map_or(left, |range| (range.start - at).div_ceil(PAGE_SIZE));
    (false, next.clamp(1, left))
}

/// Why a swap area cannot be read.
fn out_of_reach(snapshot: &Snapshot, index: u32) -> Option<String> {
    match snapshot.swap_areas.iter().find(|area| area.index == index) {
        None => Some(format!("in swap area {index}, of which nothing is known")),
        Some(area) => {
            let why = area.unsupported.as_ref()?;
            Some(format!("in the swap area {}: {why}", area.path))
        }
    }
}

/// What a mapping is called in /proc/PID/maps, or something like it.
fn describe(snapshot: &Snapshot, vma: &Vma) -> String {
    match &vma.kind {
        VmaKind::Anonymous => "anonymous memory".into(),
        VmaKind::AnonymousHuge { .. } => "huge pages".into(),
        VmaKind::File { file, .. } => {
            snapshot.files.get(file).map_or("an unknown file".into(), |open| open.path.to_string())
        }
        VmaKind::SharedAnonymous { .. } => "shared anonymous memory".into(),
        VmaKind::SysvShm { id, .. } => format!("shared memory segment {id}"),
        VmaKind::AioRing { .. } => "a ring of asynchronous I/O".into(),
        VmaKind::Special { name } => name.to_string(),
        VmaKind::Unsupported { what } => what.clone(),
    }
}
