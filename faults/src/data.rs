//! Wild writes into the kernel's data.

use std::fmt;

use fastrand::Rng;

use crate::Injected;

use crate::live::{Live, Symbols};
use lab::Guest;
use lab::{Error, Result};

/// Writes at a time.
const FAULTS: usize = 8;
const MAX_DRAWS: usize = 400;
const MAX_TASKS: usize = 1024;
const PAGE: u64 = 4096;
/// THREAD_SIZE.
const STACK: u64 = 16 << 10;
/// What is taken for an object that a pointer leads to, bytes.
const OBJECT: u64 = 256;
const POINTER_STEPS: usize = 4;

/// What is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Area {
    SlabObject,
    KernelStack,
    PerCpu,
    PageTable,
    StructPage,
    PageCache,
}

const AREAS: [Area; 6] =
    [Area::SlabObject, Area::KernelStack, Area::PerCpu, Area::PageTable, Area::StructPage, Area::PageCache];

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Area::SlabObject => "slab objects",
            Area::KernelStack => "kernel stacks",
            Area::PerCpu => "per-CPU areas",
            Area::PageTable => "page tables",
            Area::StructPage => "struct pages",
            Area::PageCache => "the page cache",
        })
    }
}

pub(super) fn inject(guest: &mut Guest, symbols: &Symbols, draw: &mut Rng) -> Result<Injected> {
    let frames = u64::from(guest.machine.memory_mib) << 8;
    let mut live = Live::stop(&guest.machine, symbols)?;
    let area = draw.choice(AREAS).unwrap_or(Area::SlabObject);
    let tasks = tasks(&mut live)?;
    let mut done = Vec::new();
    for _ in 0..MAX_DRAWS {
        if done.len() == FAULTS {
            break;
        }
        // A place that is not mapped after all is drawn again.
        let place = match area {
            Area::SlabObject => slab_object(&mut live, &tasks, draw),
            Area::KernelStack => kernel_stack(&mut live, &tasks, draw),
            Area::PerCpu => per_cpu(&mut live, draw),
            Area::PageTable => page_table(&mut live, &tasks, draw),
            Area::StructPage => struct_page(&mut live, frames, draw).map(|at| at + (draw.u64(..8) << 3)),
            Area::PageCache => page_cache(&mut live, frames, draw),
        };
        let Ok(place) = place else { continue };
        let Ok(before) = live.word(place & !7) else { continue };
        let after = if draw.bool() { before ^ 1 << draw.u32(..64) } else { draw.u64(..) };
        live.write(place & !7, &after.to_le_bytes())?;
        done.push(format!("{:#x}: {before:#x} → {after:#x}", place & !7));
    }
    live.leave()?;
    if done.is_empty() {
        return Ok(Injected::Not(format!("no place to write to in {area}")));
    }
    Ok(Injected::Done(format!("{} writes into {area}: {}", done.len(), done.join(", "))))
}

/// Addresses of all processes' `task_struct`s.
fn tasks(live: &mut Live<'_>) -> Result<Vec<u64>> {
    let (link, _) = live.symbols.member("task_struct", "tasks")?;
    let head = live.symbols.address("init_task")? + link;
    let mut all = Vec::new();
    let mut at = live.word(head)?;
    while at != head && all.len() < MAX_TASKS {
        all.push(at - link);
        at = live.word(at)?;
    }
    Ok(all)
}

fn member(live: &mut Live<'_>, structure: &str, path: &str, at: u64) -> Result<u64> {
    let (offset, _) = live.symbols.member(structure, path)?;
    live.word(at + offset)
}

fn nowhere(what: &str) -> Error {
    Error::Guest(format!("no {what}"))
}

fn any<T: Copy>(all: &[T], draw: &mut Rng) -> Result<T> {
    draw.choice(all).copied().ok_or_else(|| nowhere("choice"))
}

/// From a task on, along pointers.
fn slab_object(live: &mut Live<'_>, tasks: &[u64], draw: &mut Rng) -> Result<u64> {
    let mut object = any(tasks, draw)?;
    let mut size = live.symbols.size("task_struct")?.min(PAGE);
    for _ in 0..draw.usize(..=POINTER_STEPS) {
        let bytes = live.read(object, size as usize)?;
        let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let pointers: Vec<u64> = words.filter(|word| live.is_direct(*word) && word % 8 == 0).collect();
        object = any(&pointers, draw)?;
        size = OBJECT;
    }
    Ok(object + draw.u64(..size / 8) * 8)
}

/// In the part that is in use.
fn kernel_stack(live: &mut Live<'_>, tasks: &[u64], draw: &mut Rng) -> Result<u64> {
    let task = any(tasks, draw)?;
    let stack = member(live, "task_struct", "stack", task)?;
    let pointer = member(live, "task_struct", "thread.sp", task)?;
    let used = (stack + STACK).checked_sub(pointer).filter(|used| (8..STACK).contains(used));
    Ok(pointer + draw.u64(..used.ok_or_else(|| nowhere("stack"))? / 8) * 8)
}

fn per_cpu(live: &mut Live<'_>, draw: &mut Rng) -> Result<u64> {
    let (start, end) = (live.symbols.address("__per_cpu_start")?, live.symbols.address("__per_cpu_end")?);
    let cpu = draw.usize(..live.gdb.cpus());
    Ok(live.per_cpu("__per_cpu_start", cpu)? + draw.u64(..(end - start) / 8) * 8)
}

/// An entry of a process's page tables that is in use, on any level.
fn page_table(live: &mut Live<'_>, tasks: &[u64], draw: &mut Rng) -> Result<u64> {
    const PRESENT: u64 = 1;
    const LARGE: u64 = 1 << 7;
    const FRAME: u64 = 0x000f_ffff_ffff_f000;
    /// The first half of the topmost table is the program's.
    const USER: usize = 256;
    let task = any(tasks, draw)?;
    let mm = member(live, "task_struct", "mm", task)?;
    if mm == 0 {
        return Err(nowhere("mm"));
    }
    let mut table = member(live, "mm_struct", "pgd", mm)?;
    let mut entries = USER;
    for depth in 0.. {
        let bytes = live.read(table, entries * 8)?;
        let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let used: Vec<(u64, u64)> =
            words.zip(0..).filter(|(entry, _)| entry & PRESENT != 0).map(|(entry, n)| (n, entry)).collect();
        let (n, entry) = any(&used, draw)?;
        // The lower, the more there are.
        if depth == 3 || depth > 0 && draw.u32(..8) == 0 || entry & LARGE != 0 {
            return Ok(table + n * 8);
        }
        table = live.page_offset() + (entry & FRAME);
        entries = 512;
    }
    Err(nowhere("page table"))
}

/// The start of a frame's `struct page`.
fn struct_page(live: &mut Live<'_>, frames: u64, draw: &mut Rng) -> Result<u64> {
    let base = live.variable("vmemmap_base")?;
    Ok(base + draw.u64(4096..frames) * live.symbols.size("page")?)
}

/// In a page of some file.
fn page_cache(live: &mut Live<'_>, frames: u64, draw: &mut Rng) -> Result<u64> {
    /// `struct page`s that are read at a time.
    const MANY: u64 = 64;
    let (base, size) = (live.variable("vmemmap_base")?, live.symbols.size("page")?);
    let (offset, _) = live.symbols.member("page", "mapping")?;
    for _ in 0..MAX_DRAWS {
        let first = draw.u64(..frames / MANY) * MANY;
        // There are holes.
        let Ok(bytes) = live.read(base + first * size, (MANY * size) as usize) else { continue };
        let pages = bytes.chunks_exact(size as usize).zip(first..);
        let mapping =
            |page: &[u8]| page.get(offset as usize..)?.first_chunk().map(|word| u64::from_le_bytes(*word));
        let mapped: Vec<(u64, u64)> =
            pages.filter_map(|(page, frame)| Some((frame, mapping(page)?))).collect();
        for (frame, mapping) in mapped {
            // The lowest bits are set for anonymous memory; what a file's pages belong to has an inode that leads back to it.
            if !live.is_direct(mapping) || mapping % 8 != 0 {
                continue;
            }
            let Ok(inode) = member(live, "address_space", "host", mapping) else { continue };
            let leads_back = |live: &mut Live<'_>| member(live, "inode", "i_mapping", inode);
            if live.is_direct(inode) && leads_back(live).is_ok_and(|back| back == mapping) {
                return Ok(live.page_offset() + frame * PAGE + draw.u64(..PAGE / 8) * 8);
            }
        }
    }
    Err(nowhere("page of a file"))
}
