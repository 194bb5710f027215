//! Memory that processes share since fork(2), until one of them writes to it.
//!
//! Pages are shared copy-on-write by forking with them in place. So a process whose frames those that it makes have too maps and fills
//! such memory while it is still a skeleton, before it makes them ([`Plan::fill`]). Everybody then keeps what he has inherited where it
//! belongs ([`Plan::kept`]), and only what differs is poured.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use snapshot::{
    AddressSpace, PAGE_SIZE, PageRun, PhysMem, PhysRange, Pid, Process, Reason, Snapshot, VmaFlags, VmaKind,
};

use crate::memory::{self, Area};
use crate::plan::{self, Role};
use crate::pour::{Owner, ReverseMap};

/// Fewer shared pages than this in one area are not worth it.
const MIN_PAGES: u64 = 16;
/// Bytes per second; emulated machines pour some times as much.
const SLOWEST: u64 = 20_000_000;

/// An area of a process that it fills for those that it makes.
struct Filled {
    area: Area,
    pages: Vec<PageRun>,
    /// Its place in the table of what is done.
    index: usize,
}

/// Who fills what, and (in memory that all skeletons share) what of it is done.
pub(crate) struct Plan {
    fillers: BTreeMap<Pid, Vec<Filled>>,
    makers: BTreeMap<Pid, Pid>,
    done: Done,
}

/// Memory of a process that is where it belongs already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// The pages that are in it.
    pages: Vec<PageRun>,
}

/// What has become of filling an area, and a counter of bytes: in shared memory, which stays for the life of the program.
struct Done {
    slots: &'static [Slot],
    bytes: &'static AtomicU64,
}

/// Of one area. All zeroes as long as nothing has become of it.
struct Slot {
    state: AtomicU8,
    /// Why it is not filled, as text that ends at a zero.
    why: [AtomicU8; 127],
}

const FILLED: u8 = 1;
const REFUSED: u8 = 2;

impl Slot {
    fn is(&self, state: u8) -> bool {
        self.state.load(Ordering::Acquire) == state
    }

    fn refuse(&self, why: &str) {
        self.why.iter().zip(why.bytes()).for_each(|(slot, byte)| slot.store(byte, Ordering::Relaxed));
        self.state.store(REFUSED, Ordering::Release);
    }

    fn why(&self) -> String {
        let bytes = self.why.iter().map(|byte| byte.load(Ordering::Relaxed)).take_while(|byte| *byte != 0);
        String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
    }
}

impl Done {
    fn new(count: usize) -> Result<Self, Errno> {
        let len = size_of::<AtomicU64>() + count * size_of::<Slot>();
        // SAFETY: a fresh mapping of zeroes, long enough, aligned to a page and never unmapped; atomics of zero are valid.
        unsafe {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
            let start = libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0);
            if start == libc::MAP_FAILED {
                return Err(Errno::last());
            }
            let bytes = &*start.cast::<AtomicU64>();
            let slots = start.cast::<u8>().add(size_of::<AtomicU64>()).cast::<Slot>();
            Ok(Self { slots: std::slice::from_raw_parts(slots, count), bytes })
        }
    }

    fn is(&self, index: usize, state: u8) -> bool {
        self.slots.get(index).is_some_and(|slot| slot.is(state))
    }

    fn refuse(&self, index: usize, why: &str) {
        if let Some(slot) = self.slots.get(index) {
            slot.refuse(why);
        }
    }
}

fn space<'a>(snapshot: &'a Snapshot, process: &Process) -> Option<&'a AddressSpace> {
    snapshot.address_spaces.get(&process.address_space?)
}

/// Private memory that fork(2) hands on, and that can be filled before anything else is done to it.
fn is_shareable(area: &Area) -> bool {
    const NOT_INHERITED: VmaFlags = VmaFlags::GROWSDOWN.union(VmaFlags::DONTCOPY).union(VmaFlags::WIPEONFORK);
    matches!(area.kind, VmaKind::Anonymous)
        && area.is_writable_for_pouring()
        && !area.flags.intersects(NOT_INHERITED)
}

/// The same memory, as far as both reach.
fn is_alike(a: &Area, b: &Area) -> bool {
    (&a.kind, a.prot, a.shared, a.flags, &a.name) == (&b.kind, b.prot, b.shared, b.flags, &b.name)
        && a.start < b.end
        && b.start < a.end
}

/// The pages of a range, by ascending address.
fn pages_in(mm: &AddressSpace, start: u64, end: u64) -> Vec<PageRun> {
    let runs = mm.vmas.iter().filter(|vma| vma.start < end && start < vma.end).flat_map(|vma| &vma.pages);
    runs.filter_map(|run| clip(*run, start, end)).collect()
}

fn end_of(run: &PageRun) -> u64 {
    run.addr.saturating_add(u64::from(run.count) * PAGE_SIZE)
}

/// The part of a run that lies in a range.
pub(crate) fn clip(run: PageRun, start: u64, end: u64) -> Option<PageRun> {
    let (from, to) = (run.addr.max(start), end_of(&run).min(end));
    let count = u32::try_from(to.checked_sub(from)? / PAGE_SIZE).ok().filter(|count| *count > 0)?;
    Some(PageRun { addr: from, pfn: run.pfn + (from - run.addr) / PAGE_SIZE, count })
}

/// How many pages two lists have in common, and what has to be done to make the second of the first: pages to be poured, and ranges in
/// which nothing is to be.
fn compare(wanted: &[PageRun], there: &[PageRun]) -> (u64, Vec<PageRun>, Vec<(u64, u64)>) {
    let (mut same, mut pour, mut drop) = (0, Vec::new(), Vec::new());
    // Both are cut wherever one of them begins or ends.
    let edges = |runs: &[PageRun]| runs.iter().flat_map(|run| [run.addr, end_of(run)]).collect::<Vec<_>>();
    let mut cuts: Vec<u64> = [edges(wanted), edges(there)].concat();
    cuts.sort_unstable();
    cuts.dedup();
    let (mut w, mut t) = (0, 0);
    for pair in cuts.windows(2) {
        let (start, end) = (pair[0], pair[1]);
        let at = |runs: &[PageRun], i: &mut usize| {
            while runs.get(*i).is_some_and(|run| end_of(run) <= start) {
                *i += 1;
            }
            runs.get(*i).and_then(|run| clip(*run, start, end))
        };
        match (at(wanted, &mut w), at(there, &mut t)) {
            (Some(is), Some(was)) if is.pfn == was.pfn => same += u64::from(is.count),
            (Some(is), _) => pour.push(is),
            (None, Some(_)) => drop.push((start, end)),
            (None, None) => {}
        }
    }
    (same, pour, drop)
}

fn are_in_memory(ranges: &[PhysRange], pages: &[PageRun]) -> bool {
    pages.iter().all(|run| {
        let Some(start) = run.pfn.checked_mul(PAGE_SIZE) else { return false };
        let i = ranges.partition_point(|range| range.start <= start);
        let range = i.checked_sub(1).and_then(|i| ranges.get(i));
        range.is_some_and(|r| start - r.start + u64::from(run.count) * PAGE_SIZE <= r.len)
    })
}

impl Plan {
    /// Works out who fills what. `taken`: addresses that this program itself uses.
    pub(crate) fn new(
        snapshot: &Snapshot,
        plan: &plan::Plan,
        mem: &dyn PhysMem,
        taken: &[(u64, u64)],
    ) -> Result<Self, Errno> {
        let process = |id: &usize| match plan.nodes.get(*id)?.role {
            Role::Process(i) => snapshot.processes.get(i),
            Role::Zombie(_) | Role::Placeholder => None,
        };
        let (mut fillers, mut makers, mut count) = (BTreeMap::new(), BTreeMap::new(), 0);
        let mut refused = Vec::new();
        for (id, node) in plan.nodes.iter().enumerate() {
            let Some((maker, mm)) = process(&id).and_then(|p| Some((p, space(snapshot, p)?))) else {
                continue;
            };
            let made: Vec<&Process> =
                node.makes_first.iter().chain(&node.makes).filter_map(|(id, _)| process(id)).collect();
            makers.extend(made.iter().map(|p| (p.pid, maker.pid)));
            let theirs: Vec<(&AddressSpace, Vec<Area>)> =
                made.iter().filter_map(|p| space(snapshot, p)).map(|mm| (mm, memory::areas(mm))).collect();
            let mut filled = Vec::new();
            for area in if theirs.is_empty() { vec![] } else { memory::areas(mm) } {
                if !is_shareable(&area) {
                    continue;
                }
                let pages = pages_in(mm, area.start, area.end);
                let in_common = |(mm, areas): &(&AddressSpace, Vec<Area>)| {
                    let alike = areas.iter().filter(|other| is_alike(other, &area));
                    alike.map(|a| compare(&pages_in(mm, a.start, a.end), &pages).0).sum::<u64>()
                };
                if theirs.iter().map(in_common).max() < Some(MIN_PAGES) {
                    continue;
                }
                if taken.iter().any(|(start, end)| *start < area.end && area.start < *end) {
                    refused.push((count, "the resurrector itself is in its place"));
                } else if !are_in_memory(mem.ranges(), &pages) {
                    refused.push((count, "some of it is not in the dump"));
                }
                filled.push(Filled { area, pages, index: count });
                count += 1;
            }
            if !filled.is_empty() {
                fillers.insert(maker.pid, filled);
            }
        }
        let done = Done::new(count)?;
        refused.into_iter().for_each(|(index, why)| done.refuse(index, why));
        Ok(Self { fillers, makers, done })
    }

    /// How long filling it all may take, beyond what skeletons take anyway.
    pub(crate) fn patience(&self) -> Duration {
        let all = self.fillers.values().flatten().filter(|filled| !self.done.is(filled.index, REFUSED));
        let pages = all.flat_map(|filled| &filled.pages);
        let bytes: u64 = pages.map(|run| u64::from(run.count) * PAGE_SIZE).sum();
        Duration::from_millis(bytes / (SLOWEST / 1000))
    }

    /// Bytes that have been filled in.
    pub(crate) fn bytes(&self) -> u64 {
        self.done.bytes.load(Ordering::Acquire)
    }

    /// Memory of a process that is where it belongs, by ascending address: what it has filled, and what it has inherited.
    pub(crate) fn kept(&self, pid: Pid, areas: &[Area]) -> Vec<Kept> {
        let of =
            |pid: Pid| self.fillers.get(&pid).into_iter().flatten().filter(|f| self.done.is(f.index, FILLED));
        let mut kept = Vec::new();
        for area in areas {
            match of(pid).find(|filled| filled.area == *area) {
                Some(filled) => {
                    kept.push(Kept { start: area.start, end: area.end, pages: filled.pages.clone() });
                }
                None => kept.extend(self.inherited(pid, area)),
            }
        }
        kept
    }

    /// What of an area whoever made the process had filled for it.
    fn inherited(&self, pid: Pid, area: &Area) -> Vec<Kept> {
        let maker = self.makers.get(&pid).and_then(|maker| self.fillers.get(maker));
        let done = maker.into_iter().flatten().filter(|filled| self.done.is(filled.index, FILLED));
        let alike = done.filter(|filled| is_alike(&filled.area, area));
        let part = |filled: &Filled| {
            let (start, end) = (filled.area.start.max(area.start), filled.area.end.min(area.end));
            let pages = filled.pages.iter().filter_map(|run| clip(*run, start, end)).collect();
            Kept { start, end, pages }
        };
        alike.map(part).collect()
    }

    /// What a process no longer shares with whoever made it, and why: it takes more memory than before.
    pub(crate) fn lost(&self, pid: Pid, mm: &AddressSpace, areas: &[Area]) -> Vec<Reason> {
        let Some(maker) = self.makers.get(&pid) else { return vec![] };
        let theirs = self.fillers.get(maker).into_iter().flatten();
        let lost = theirs.filter(|filled| !self.done.is(filled.index, FILLED)).filter_map(|filled| {
            let alike = areas.iter().filter(|area| is_alike(area, &filled.area));
            let shared: u64 = alike.map(|a| compare(&pages_in(mm, a.start, a.end), &filled.pages).0).sum();
            let why = self.done.slots.get(filled.index).map(Slot::why).unwrap_or_default();
            let why = if why.is_empty() { "it was not filled in time" } else { &why };
            let kib = shared * PAGE_SIZE / 1024;
            let text = format!(
                "{kib} KiB at {:x} that it shared with PID {maker} since fork(2) are its own now: {why}",
                filled.area.start
            );
            (shared >= MIN_PAGES).then(|| Reason::new("memory-sharing", text))
        });
        lost.collect()
    }

    /// Fills in what the calling skeleton is to hand on. What cannot be filled is not shared, which costs memory and nothing else.
    pub(crate) fn fill(&self, process: &Process, mem: &dyn PhysMem) {
        let Some(all) = self.fillers.get(&process.pid) else { return };
        mem.after_fork();
        // All of them before anything else is mapped that could take their places.
        let mut mapped = Vec::new();
        for filled in all.iter().filter(|filled| !self.done.is(filled.index, REFUSED)) {
            let inherited = self.inherited(process.pid, &filled.area);
            match map(&filled.area, &inherited) {
                Ok(()) => mapped.push((filled, inherited)),
                Err(errno) => self.done.refuse(filled.index, &format!("it cannot be mapped there ({errno})")),
            }
        }
        for (filled, inherited) in mapped {
            let Some(slot) = self.done.slots.get(filled.index) else { continue };
            match pour(process.pid, filled, &inherited, mem, self.done.bytes) {
                Ok(()) => slot.state.store(FILLED, Ordering::Release),
                Err(why) => slot.refuse(&why),
            }
        }
    }
}

fn map(area: &Area, inherited: &[Kept]) -> Result<(), Errno> {
    gaps(area.start, area.end, inherited)
        .into_iter()
        .try_for_each(|(start, end)| memory::map_here(area, start, end))
}

fn pour(
    pid: Pid,
    filled: &Filled,
    inherited: &[Kept],
    mem: &dyn PhysMem,
    bytes: &AtomicU64,
) -> Result<(), String> {
    let mut reverse = ReverseMap::default();
    let owner = reverse.owner(Owner::Process(pid));
    for kept in inherited {
        for (start, end) in kept.to_drop(&filled.pages) {
            // SAFETY: the range is private memory that was mapped for this process, and that nothing here uses.
            let r = unsafe { libc::madvise(start as *mut _, (end - start) as usize, libc::MADV_DONTNEED) };
            Errno::result(r).map_err(|errno| format!("what is not its own cannot be dropped ({errno})"))?;
        }
    }
    let there: Vec<PageRun> = inherited.iter().flat_map(|kept| kept.pages.iter().copied()).collect();
    compare(&filled.pages, &there).1.into_iter().for_each(|run| reverse.add(owner, run));
    let poured = reverse.pour(mem, &mut |_| {});
    bytes.fetch_add(poured.bytes, Ordering::AcqRel);
    poured.failed.into_values().next().map_or(Ok(()), Err)
}

impl Kept {
    /// Pages that have to be poured although something is there, or because nothing is; `wanted`: all pages of the process.
    pub(crate) fn to_pour(&self, wanted: &[PageRun]) -> Vec<PageRun> {
        compare(&self.of(wanted), &self.pages).1
    }

    /// Ranges that have pages and are to have none.
    pub(crate) fn to_drop(&self, wanted: &[PageRun]) -> Vec<(u64, u64)> {
        compare(&self.of(wanted), &self.pages).2
    }

    /// The part of it that lies in a range.
    pub(crate) fn within(&self, start: u64, end: u64) -> Option<Self> {
        let (start, end) = (self.start.max(start), self.end.min(end));
        let pages = self.pages.iter().filter_map(|run| clip(*run, start, end)).collect();
        (start < end).then_some(Self { start, end, pages })
    }

    fn of(&self, runs: &[PageRun]) -> Vec<PageRun> {
        runs.iter().filter_map(|run| clip(*run, self.start, self.end)).collect()
    }
}

/// What of a range is not kept.
pub(crate) fn gaps(start: u64, end: u64, kept: &[Kept]) -> Vec<(u64, u64)> {
    let within: BTreeSet<(u64, u64)> =
        kept.iter().filter(|k| k.start < end && start < k.end).map(|k| (k.start, k.end)).collect();
    let mut at = start;
    let mut gaps = Vec::new();
    for (from, to) in within.into_iter().chain([(end, end)]) {
        if at < from {
            gaps.push((at, from));
        }
        at = at.max(to);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(page: u64, pfn: u64, count: u32) -> PageRun {
        PageRun { addr: page * PAGE_SIZE, pfn, count }
    }

    #[test]
    fn what_differs_is_found_page_by_page() {
        let wanted = [run(0, 10, 4), run(6, 20, 2), run(9, 30, 1)];
        let there = [run(1, 11, 2), run(3, 99, 1), run(5, 19, 3), run(9, 30, 1)];
        let (same, pour, drop) = compare(&wanted, &there);
        // 1 and 2, 6 and 7, 9; 0 is missing and 3 is another one; 5 is too much.
        assert_eq!(same, 5);
        assert_eq!(pour, [run(0, 10, 1), run(3, 13, 1)]);
        assert_eq!(drop, [(5 * PAGE_SIZE, 6 * PAGE_SIZE)]);
        assert_eq!(compare(&wanted, &wanted), (7, vec![], vec![]));
        assert_eq!(compare(&wanted, &[]), (0, wanted.to_vec(), vec![]));
        assert_eq!(compare(&[], &[]), (0, vec![], vec![]));
    }

    #[test]
    fn runs_are_clipped_to_ranges() {
        let p = PAGE_SIZE;
        assert_eq!(clip(run(4, 100, 4), 5 * p, 7 * p), Some(run(5, 101, 2)));
        assert_eq!(clip(run(4, 100, 4), 0, 100 * p), Some(run(4, 100, 4)));
        assert_eq!(clip(run(4, 100, 4), 8 * p, 9 * p), None);
        assert_eq!(clip(run(4, 100, 4), 0, 4 * p), None);
    }

    #[test]
    fn gaps_are_what_is_not_kept() {
        let kept = |start, end| Kept { start, end, pages: vec![] };
        assert_eq!(gaps(0, 10, &[]), [(0, 10)]);
        assert_eq!(gaps(0, 10, &[kept(7, 9), kept(2, 3)]), [(0, 2), (3, 7), (9, 10)]);
        assert_eq!(gaps(2, 9, &[kept(2, 3), kept(7, 20)]), [(3, 7)]);
        assert_eq!(gaps(0, 10, &[kept(0, 10)]), []);
        assert_eq!(gaps(0, 10, &[kept(20, 30)]), [(0, 10)]);
    }

    #[test]
    fn what_is_no_longer_shared_is_named_with_its_reason() {
        let vma = |pfn| snapshot::Vma {
            start: 0x7000_0000,
            end: 0x7000_0000 + 64 * PAGE_SIZE,
            prot: snapshot::Prot::READ | snapshot::Prot::WRITE,
            shared: false,
            flags: VmaFlags::ACCOUNT,
            kind: VmaKind::Anonymous,
            name: None,
            pages: vec![PageRun { addr: 0x7000_0000, pfn, count: 64 }],
            lost_pages: 0,
        };
        let space = |pfn| AddressSpace { vmas: vec![vma(pfn)], ..AddressSpace::default() };
        let (mm, other) = (space(100), space(500));
        let areas = memory::areas(&mm);
        let filled = Filled { area: areas[0].clone(), pages: mm.vmas[0].pages.clone(), index: 0 };
        let plan = Plan {
            fillers: BTreeMap::from([(7, vec![filled])]),
            makers: BTreeMap::from([(8, 7), (9, 7)]),
            done: Done::new(1).unwrap(),
        };
        let said = |pid, mm| plan.lost(pid, mm, &areas).into_iter().map(|r| r.text).collect::<Vec<_>>();
        assert!(said(8, &mm)[0].ends_with("it was not filled in time"), "{:?}", said(8, &mm));
        plan.done.refuse(0, "x".repeat(200).as_str());
        plan.done.refuse(0, "there is no memory\0");
        assert_eq!(
            said(8, &mm),
            [
                "256 KiB at 70000000 that it shared with PID 7 since fork(2) are its own now: there is no memory"
            ]
        );
        assert!(said(9, &other).is_empty(), "nothing of it was the other's");
        assert!(said(7, &mm).is_empty(), "it was made by nobody who fills");
        plan.done.slots[0].state.store(FILLED, Ordering::Release);
        assert!(said(8, &mm).is_empty());
    }

    #[test]
    fn frames_outside_the_dump_are_not_shared() {
        let ranges = [PhysRange { start: 16 * PAGE_SIZE, len: 4 * PAGE_SIZE }];
        assert!(are_in_memory(&ranges, &[run(0, 16, 4)]));
        for pfn in [15, 17, 20, u64::MAX] {
            assert!(!are_in_memory(&ranges, &[run(0, pfn, 4)]), "{pfn}");
        }
    }
}
