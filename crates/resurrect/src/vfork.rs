//! vfork(2) in flight: a child that uses its parent's memory, and the parent's thread that waits until it no longer does.
//!
//! The child was rebuilt with a copy of the memory. So that nobody notices, the parent (all of its threads: they would read and write what
//! the child does) stays where it is until the child has executed a program or exited, and before that what the child
//! has changed is copied to the parent: the contents of pages, and the memory map where the child mapped, unmapped or protected
//! anonymous memory. The child runs under ptrace for this time; the last moment to copy is when it asks for the program to be
//! executed, which may fail, or when it is about to exit.
//!
//! When several processes use the same memory (each thread of the parent may wait for a child, and a child for one of its own) they go
//! on one after the other, and all that have not gone on get what one has changed.
//!
//! A child that takes too long is let go with its copy, the parent goes on too, and the report says so.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::errno::Errno;
use snapshot::{Bytes, PAGE_SIZE, Pid, Prot, Reason};

use crate::deadline::{Alarm, Deadline};
use crate::inject::{self, InjectError};
use crate::memory::{self, MapsLine};
use crate::process::Build;
use crate::sys;

/// From the end of the time for everything, for what comes after waiting: copying, the report.
const RESERVE: Duration = Duration::from_secs(3);
/// Of that, for the report.
const RESERVE_AFTER_COPYING: Duration = Duration::from_secs(1);
/// How long a child may take to stop when its time is over.
const LAST_CHANCE: Duration = Duration::from_secs(1);

/// A process that is running or has not been let go, and how letting it go went.
type Released<'a> = (Build<'a>, Result<(), InjectError>);

/// All processes that share memory by vfork(2), by whose memory it is.
pub(crate) struct Families<'a> {
    families: Vec<Family<'a>>,
    done: Vec<Released<'a>>,
    patience: Duration,
    whole: Deadline,
    has_soft_dirty: bool,
}

/// Those who share one memory.
struct Family<'a> {
    /// Who has not gone on: parents before their children.
    waiting: Vec<Build<'a>>,
    running: Option<Child<'a>>,
}

/// The one that goes on.
struct Child<'a> {
    build: Build<'a>,
    deadline: Deadline,
    time_is_up: bool,
    soft_dirty: bool,
}

/// What has become of a child after one of its stops.
enum Progress {
    /// It goes on using the memory.
    Runs,
    /// It has let go of the memory; all that it had changed was copied.
    Done,
    /// Its time is over. It has stopped for this signal, if it is not 0.
    Late(i32),
    /// It was killed.
    Died,
}

impl<'a> Families<'a> {
    /// Those among `builds` that wait in vfork or are waited for. Each child will have `patience`, and everything must be over at `whole`.
    pub(crate) fn take_from(builds: &mut Vec<Build<'a>>, patience: Duration, whole: Deadline) -> Self {
        let parent = |b: &Build<'_>| builds.iter().position(|other| b.is_vfork_child_of(other));
        let parents: Vec<Option<usize>> = builds.iter().map(parent).collect();
        let family_of: Vec<Option<(usize, usize)>> = (0..builds.len()).map(|i| root(&parents, i)).collect();
        let with_children: BTreeSet<usize> =
            family_of.iter().flatten().filter(|(_, depth)| *depth > 0).map(|(root, _)| *root).collect();
        let mut families: Vec<(usize, Vec<(usize, Build<'a>)>)> =
            with_children.iter().map(|&root| (root, Vec::new())).collect();
        let mut others = Vec::new();
        for (build, place) in builds.drain(..).zip(family_of) {
            let family = place.and_then(|(root, depth)| {
                let (_, members) = families.iter_mut().find(|(r, _)| *r == root)?;
                Some((depth, members))
            });
            match family {
                Some((depth, members)) => members.push((depth, build)),
                None => others.push(build),
            }
        }
        *builds = others;
        let family = |(_, mut members): (usize, Vec<(usize, Build<'a>)>)| {
            members.sort_by_key(|(depth, _)| *depth);
            Family { waiting: members.into_iter().map(|(_, build)| build).collect(), running: None }
        };
        let families: Vec<Family<'a>> = families.into_iter().map(family).collect();
        let has_soft_dirty = !families.is_empty() && has_soft_dirty();
        Self { families, done: Vec::new(), patience, whole, has_soft_dirty }
    }

    /// Lets the first children go on.
    pub(crate) fn begin(&mut self) {
        for i in 0..self.families.len() {
            self.next(i);
        }
    }

    /// Waits until all have gone on; who that was.
    pub(crate) fn await_all(mut self, alarm: &Alarm) -> Vec<Released<'a>> {
        while let Some(nearest) =
            self.families.iter().filter_map(|f| Some(f.running.as_ref()?.deadline)).min()
        {
            alarm.set(nearest);
            match inject::wait_any(nearest) {
                Ok((tid, status)) => {
                    let is_it =
                        |f: &Family<'_>| f.running.as_ref().is_some_and(|c| c.build.process.pid == tid);
                    // Somebody who waits and has died shows when it is released.
                    let Some(i) = self.families.iter().position(is_it) else { continue };
                    self.stopped(i, status);
                }
                Err(Errno::EINTR) => self.time_is_up(),
                // None of ours is there any more.
                Err(_) => {
                    for i in 0..self.families.len() {
                        self.finish(i, Progress::Died);
                    }
                }
            }
        }
        self.done
    }

    /// The next child goes on; or the parent, when there is none.
    fn next(&mut self, i: usize) {
        let family = &mut self.families[i];
        while let Some(build) = family.waiting.pop() {
            if family.waiting.is_empty() {
                let released = build.release();
                self.done.push((build, released));
                return;
            }
            let pid = build.process.pid;
            let soft_dirty =
                self.has_soft_dirty && sys::write_proc(&format!("/proc/{pid}/clear_refs"), "4").is_ok();
            match build.release_observed() {
                Ok(()) => {
                    let deadline = self.whole.before(RESERVE).or_after(self.patience);
                    family.running = Some(Child { build, deadline, time_is_up: false, soft_dirty });
                    return;
                }
                Err(e) => self.done.push((build, Err(e))),
            }
        }
    }

    /// The running child of a family has changed its state.
    fn stopped(&mut self, i: usize, status: i32) {
        let family = &mut self.families[i];
        let Some(child) = &family.running else { return };
        let tracee = match child.build.main() {
            Ok(tracee) if libc::WIFSTOPPED(status) => tracee,
            _ => return self.finish(i, Progress::Died),
        };
        const CALL: i32 = libc::SIGTRAP | 0x80;
        let progress = match (status >> 16, libc::WSTOPSIG(status)) {
            (libc::PTRACE_EVENT_EXEC, _) => Progress::Done,
            (libc::PTRACE_EVENT_EXIT, _) => {
                copy(child, &mut family.waiting, self.whole);
                Progress::Done
            }
            (0, signal) if child.time_is_up && signal != CALL => Progress::Late(signal),
            _ if child.time_is_up => Progress::Late(0),
            (libc::PTRACE_EVENT_STOP, signal) if signal != libc::SIGTRAP => {
                _ = tracee.stay_stopped();
                Progress::Runs
            }
            (0, signal) if signal != CALL => child.go_on(signal),
            (event, _) => {
                let is_exec = |nr| [libc::SYS_execve, libc::SYS_execveat].contains(&nr);
                if event == 0 && tracee.entered_call().is_ok_and(|nr| nr.is_some_and(is_exec)) {
                    copy(child, &mut family.waiting, self.whole);
                }
                child.go_on(0)
            }
        };
        self.finish(i, progress);
    }

    fn time_is_up(&mut self) {
        for i in 0..self.families.len() {
            let Some(child) = &mut self.families[i].running else { continue };
            if !child.deadline.is_over() {
                continue;
            }
            if !child.time_is_up && child.build.main().is_ok_and(|tracee| tracee.interrupt().is_ok()) {
                child.time_is_up = true;
                child.deadline = Deadline::after(LAST_CHANCE);
            } else {
                // It cannot be detached from where it is; that happens when this program ends.
                self.finish(i, Progress::Late(0));
            }
        }
    }

    /// A child that no longer runs under observation makes place for the next.
    fn finish(&mut self, i: usize, progress: Progress) {
        if let Progress::Runs = progress {
            return;
        }
        let family = &mut self.families[i];
        let Some(child) = family.running.take() else { return };
        let who = child.name();
        let (signal, loss) = match progress {
            Progress::Runs | Progress::Done => (0, None),
            Progress::Late(signal) => {
                copy(&child, &mut family.waiting, self.whole);
                (signal, Some(format!("it went on before {who} had executed a program or exited")))
            }
            Progress::Died => (0, Some(format!("{who} was killed: what it had written last may be missing"))),
        };
        if let Some(text) = loss {
            for parent in family.waiting.iter_mut().filter(|b| child.build.is_vfork_child_of(b)) {
                parent.losses.push(Reason::new("vfork", text.clone()));
            }
        }
        if let Ok(tracee) = child.build.main() {
            // If it has just been killed: it was back.
            _ = tracee.detach_with(signal);
        }
        self.done.push((child.build, Ok(())));
        self.next(i);
    }
}

impl Child<'_> {
    fn name(&self) -> String {
        let process = self.build.process;
        format!("PID {} ({}), made by vfork,", process.pid, process.comm)
    }

    fn go_on(&self, signal: i32) -> Progress {
        // An error means that it is being killed: its end will be reported.
        _ = self.build.main().and_then(|tracee| tracee.go_on(signal));
        Progress::Runs
    }
}

/// Who is the first of the family of `i`, and how many generations lie between; `None` for a ring.
fn root(parents: &[Option<usize>], i: usize) -> Option<(usize, usize)> {
    let mut at = i;
    for depth in 0..=parents.len() {
        match parents.get(at).copied().flatten() {
            Some(parent) => at = parent,
            None => return Some((at, depth)),
        }
    }
    None
}

// ---- what the child has changed

/// Copies what the child has changed to all that have not gone on.
fn copy(child: &Child<'_>, waiting: &mut [Build<'_>], whole: Deadline) {
    let deadline = whole.before(RESERVE_AFTER_COPYING);
    let from = Memory::of(child.build.process.pid);
    for build in waiting {
        let copied = match &from {
            Ok(from) => copy_to(from, build, child.soft_dirty, deadline),
            Err(why) => Err(why.clone()),
        };
        if let Err(why) = copied {
            let text = format!("not all that {} has changed in the memory is there: {why}", child.name());
            let reason = Reason::new("vfork", text);
            if !build.losses.contains(&reason) {
                build.losses.push(reason);
            }
        }
    }
}

fn copy_to(from: &Memory, build: &Build<'_>, soft_dirty: bool, deadline: Deadline) -> Result<(), String> {
    let pid = build.process.pid;
    let mut to = Memory::of(pid)?;
    let heap_end = |maps: &[MapsLine]| maps.iter().rfind(|l| is_heap(l)).map(|l| l.end);
    if heap_end(&from.maps) != heap_end(&to.maps) {
        let brk = heap_end(&from.maps).unwrap_or(build.mm.layout.start_brk);
        apply(build, &[Change { start: brk, end: brk, what: What::Brk }], deadline)?;
        to = Memory::of(pid)?;
    }
    let (unknown, changes): (Vec<_>, Vec<_>) =
        changes(&from.maps, &to.maps).into_iter().partition(|c| c.what == What::Other);
    apply(build, &changes, deadline)?;
    for line in from.maps.iter().filter(|l| !l.shared) {
        copy_pages(from, &to, line.start..line.end, soft_dirty, deadline)?;
    }
    match unknown.first() {
        Some(c) => Err(format!("the mapping {:x}-{:x} cannot be changed alike", c.start, c.end)),
        None => Ok(()),
    }
}

/// The memory of a process, to be looked at and written to.
struct Memory {
    maps: Vec<MapsLine>,
    mem: File,
    pagemap: File,
}

impl Memory {
    fn of(pid: Pid) -> Result<Self, String> {
        let open = |name: &str, write| {
            let path = format!("/proc/{pid}/{name}");
            OpenOptions::new().read(true).write(write).open(&path).map_err(|e| format!("{path}: {e}"))
        };
        let maps = sys::read_proc(&format!("/proc/{pid}/maps")).map_err(|e| format!("its maps: {e}"))?;
        let maps = memory::parse_maps(&maps).ok_or("its maps cannot be read")?;
        // The kernel's own do not change.
        let maps = maps.into_iter().filter(|l| !l.path.as_bytes().starts_with(b"[v")).collect();
        Ok(Self { maps, mem: open("mem", true)?, pagemap: open("pagemap", false)? })
    }

    /// The entries for `count` pages from `addr` on, zero behind the end of the address space.
    fn entries(&self, addr: u64, count: u64) -> Result<Vec<u64>, String> {
        let mut bytes = vec![0; count as usize * 8];
        let mut done = 0;
        while done < bytes.len() {
            match self.pagemap.read_at(&mut bytes[done..], addr / PAGE_SIZE * 8 + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) => return Err(format!("its pages at {addr:x}: {e}")),
            }
        }
        Ok(bytes.as_chunks().0.iter().map(|&entry| u64::from_ne_bytes(entry)).collect())
    }
}

/// Entries of /proc/PID/pagemap: present, or swapped out.
const THERE: u64 = 1 << 63 | 1 << 62;
const SOFT_DIRTY: u64 = 1 << 55;
/// Pages whose entries are read at a time, and that are compared at a time.
const ENTRIES: u64 = 1 << 16;
const PAGES: usize = 256;

/// Makes the pages of `range` equal. With `soft_dirty` the kernel knows which have been written.
fn copy_pages(
    from: &Memory,
    to: &Memory,
    range: Range<u64>,
    soft_dirty: bool,
    deadline: Deadline,
) -> Result<(), String> {
    let mut addr = range.start;
    while addr < range.end {
        if deadline.is_over() {
            return Err("there was no time left".into());
        }
        let count = ((range.end - addr) / PAGE_SIZE).min(ENTRIES);
        let (source, target) = (from.entries(addr, count)?, to.entries(addr, count)?);
        let pages: Vec<bool> =
            source.iter().zip(&target).map(|(s, t)| may_differ(*s, *t, soft_dirty)).collect();
        let mut start = addr;
        for run in pages.chunk_by(|a, b| a == b) {
            for part in run.chunks(PAGES) {
                if part[0] {
                    copy_different(from, to, start, part.len())?;
                }
                start += part.len() as u64 * PAGE_SIZE;
            }
        }
        addr += count * PAGE_SIZE;
    }
    Ok(())
}

/// Whether the pages with these entries may have different contents.
fn may_differ(from: u64, to: u64, soft_dirty: bool) -> bool {
    let (here, there) = (from & THERE != 0, to & THERE != 0);
    (here || there) && (!soft_dirty || !here || from & SOFT_DIRTY != 0)
}

/// Copies those of `count` pages that are different.
fn copy_different(from: &Memory, to: &Memory, addr: u64, count: usize) -> Result<(), String> {
    let mut bytes = [vec![0; count * PAGE_SIZE as usize], vec![0; count * PAGE_SIZE as usize]];
    let [source, target] = &mut bytes;
    for (memory, bytes) in [(from, &mut *source), (to, &mut *target)] {
        memory.mem.read_exact_at(bytes, addr).map_err(|e| format!("the memory at {addr:x}: {e}"))?;
    }
    let page = PAGE_SIZE as usize;
    for (i, (new, old)) in source.chunks(page).zip(target.chunks(page)).enumerate() {
        if new != old {
            let addr = addr + (i * page) as u64;
            to.mem.write_all_at(new, addr).map_err(|e| format!("the page at {addr:x}: {e}"))?;
        }
    }
    Ok(())
}

/// Whether this kernel notes which pages are written (CONFIG_MEM_SOFT_DIRTY): a fresh page counts as written.
fn has_soft_dirty() -> bool {
    let page = vec![1u8; 2 * PAGE_SIZE as usize];
    let addr = std::hint::black_box(page.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
    let mut entry = [0; 8];
    let read =
        File::open("/proc/self/pagemap").and_then(|f| f.read_exact_at(&mut entry, addr / PAGE_SIZE * 8));
    read.is_ok() && u64::from_ne_bytes(entry) & SOFT_DIRTY != 0
}

/// A difference between two memory maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    start: u64,
    end: u64,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Anonymous memory, in the place of whatever is there.
    Map(Prot),
    Unmap,
    Protect(Prot),
    /// The heap ends there.
    Brk,
    /// Not to be had from here.
    Other,
}

fn is_heap(line: &MapsLine) -> bool {
    line.path.as_bytes() == b"[heap]"
}

/// What a line shows at `addr`, protection aside: shared, inode, path and offset of a file.
fn object(line: &MapsLine, addr: u64) -> (bool, u64, Bytes, u64) {
    // Labels of anonymous memory depend on its neighbours.
    let anonymous = line.path.is_empty() || line.path.as_bytes().starts_with(b"[");
    let (path, offset) = match anonymous {
        true => (Bytes::default(), 0),
        false => (line.path.clone(), line.offset + (addr - line.start)),
    };
    (line.shared, line.ino, path, offset)
}

/// What makes the map `to` like `from`.
fn changes(from: &[MapsLine], to: &[MapsLine]) -> Vec<Change> {
    let borders: BTreeSet<u64> = from.iter().chain(to).flat_map(|l| [l.start, l.end]).collect();
    let borders: Vec<u64> = borders.into_iter().collect();
    let at = |maps: &[MapsLine], addr| maps.partition_point(|l| l.end <= addr);
    let mut changes: Vec<Change> = Vec::new();
    for (&start, &end) in borders.iter().zip(borders.iter().skip(1)) {
        let find = |maps: &[MapsLine]| maps.get(at(maps, start)).filter(|l| l.start <= start).cloned();
        let what = match (find(from), find(to)) {
            (None, None) => continue,
            (None, Some(_)) => What::Unmap,
            (Some(new), Some(old)) if object(&new, start) == object(&old, start) => {
                match new.prot == old.prot {
                    true => continue,
                    false => What::Protect(new.prot),
                }
            }
            // It grows by itself when it is written to.
            (Some(new), None) if new.path.as_bytes() == b"[stack]" => continue,
            (Some(new), _) if !new.shared && new.ino == 0 => What::Map(new.prot),
            (Some(_), _) => What::Other,
        };
        match changes.last_mut() {
            Some(last) if last.end == start && last.what == what => last.end = end,
            _ => changes.push(Change { start, end, what }),
        }
    }
    changes
}

/// Makes these changes in a process that has not gone on.
fn apply(build: &Build<'_>, changes: &[Change], deadline: Deadline) -> Result<(), String> {
    let call = |c: &Change| {
        let (start, len) = (c.start, c.end - c.start);
        let prot = |prot: Prot| prot.bits() as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
        match c.what {
            What::Map(p) => ("mmap", libc::SYS_mmap, [start, len, prot(p), flags, u64::MAX, 0]),
            What::Unmap => ("munmap", libc::SYS_munmap, [start, len, 0, 0, 0, 0]),
            What::Protect(p) => ("mprotect", libc::SYS_mprotect, [start, len, prot(p), 0, 0, 0]),
            What::Brk | What::Other => ("brk", libc::SYS_brk, [start, 0, 0, 0, 0, 0]),
        }
    };
    if changes.is_empty() {
        return Ok(());
    }
    let calls: Vec<_> = changes.iter().map(call).collect();
    let results = build.call_aside(&calls, deadline).map_err(|e| e.to_string())?;
    for (result, ((what, ..), c)) in results.iter().zip(calls.iter().zip(changes)) {
        if (-4095..0).contains(result) || c.what == What::Brk && *result != c.start as i64 {
            let errno = Errno::from_raw((-result).try_into().unwrap_or(0));
            return Err(format!("{what} {:x}-{:x}: {errno}", c.start, c.end));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(start: u64, end: u64, prot: Prot, path: &str) -> MapsLine {
        let ino = if path.starts_with('/') { 7 } else { 0 };
        MapsLine { start, end, prot, shared: false, offset: 0, ino, path: path.into() }
    }

    const RW: Prot = Prot::READ.union(Prot::WRITE);

    #[test]
    fn equal_maps_have_no_changes_however_they_are_cut() {
        let a = [line(0, 8, RW, ""), line(8, 12, RW, "[heap]"), line(20, 24, Prot::READ, "/lib")];
        let mut b = vec![line(0, 4, RW, ""), line(4, 12, RW, "[heap]"), line(20, 22, Prot::READ, "/lib")];
        b.push(MapsLine { offset: 2, ..line(22, 24, Prot::READ, "/lib") });
        assert_eq!(changes(&a, &b), []);
        b[3].offset = 3;
        assert_eq!(changes(&a, &b), [Change { start: 22, end: 24, what: What::Other }]);
    }

    #[test]
    fn anonymous_memory_is_mapped_unmapped_and_protected() {
        let to = [line(0, 8, RW, ""), line(20, 24, Prot::READ, "/lib"), line(90, 100, RW, "[stack]")];
        let from = [
            line(2, 4, RW, ""),
            line(4, 8, Prot::READ, ""),
            line(10, 12, RW, ""),
            line(20, 22, Prot::READ, "/lib"),
            line(22, 24, RW, ""),
            line(80, 100, RW, "[stack]"),
        ];
        let expected = [
            (0, 2, What::Unmap),
            (4, 8, What::Protect(Prot::READ)),
            (10, 12, What::Map(RW)),
            (22, 24, What::Map(RW)),
        ];
        let found: Vec<_> = changes(&from, &to).iter().map(|c| (c.start, c.end, c.what)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn pages_that_may_differ_are_told_by_what_the_kernel_notes() {
        const PRESENT: u64 = 1 << 63;
        // Written, dropped, only read, not there at all.
        let pairs = [(PRESENT | SOFT_DIRTY, PRESENT), (0, PRESENT), (PRESENT, PRESENT), (SOFT_DIRTY, 0)];
        assert_eq!(pairs.map(|(from, to)| may_differ(from, to, true)), [true, true, false, false]);
        assert_eq!(pairs.map(|(from, to)| may_differ(from, to, false)), [true, true, true, false]);
    }

    #[test]
    fn the_first_of_a_family_is_found() {
        // 3 ← 1 ← 0, 3 ← 2; 4 and 5 are a ring.
        let parents = [Some(1), Some(3), Some(3), None, Some(5), Some(4)];
        let roots: Vec<_> = (0..6).map(|i| root(&parents, i)).collect();
        assert_eq!(roots, [Some((3, 2)), Some((3, 1)), Some((3, 1)), Some((3, 0)), None, None]);
    }
}
