//! Contexts of asynchronous I/O: `kioctx`, `aio_ring` (fs/aio.c, include/uapi/linux/aio_abi.h; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::AioContext;
use vmcore::{PAGE_SHIFT, PAGE_SIZE};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// fs.aio-max-nr is 65,536 by default, for all processes.
const MAX_CONTEXTS: u32 = 1 << 16;
/// Bytes of a ring: some hundred thousand events.
const MAX_RING: u64 = 64 << 20;
/// `struct io_event`.
const EVENT_SIZE: u64 = 32;

#[derive(KernelType)]
#[kernel("kioctx_table")]
struct Table {
    nr: u32,
    #[kernel(address)]
    table: u64,
}

#[derive(KernelType)]
#[kernel("kioctx")]
struct Kioctx {
    #[kernel("dead.counter")]
    dead: i32,
    cpu: u64,
    max_reqs: u32,
    nr_events: u32,
    mmap_base: u64,
    mmap_size: u64,
    #[kernel("ring_pages", or = "ring_folios")]
    ring_pages: u64,
    #[kernel("reqs_available.counter")]
    reqs_available: i32,
    completed_events: u32,
    tail: u32,
}

impl Autopsy<'_> {
    /// The contexts of an address space, and how many requests are in flight. `table`: its `ioctx_table`, or 0.
    pub(crate) fn aio_contexts(&self, table: u64) -> Result<(Vec<AioContext>, u64)> {
        let (mut contexts, mut in_flight) = (Vec::new(), 0);
        if table == 0 {
            return Ok((contexts, 0));
        }
        let Table { nr, table } = self.kernel.read(table)?;
        let pointers = self.kernel.read_bytes(table, nr.min(MAX_CONTEXTS) as usize * 8)?;
        for pointer in pointers.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)) {
            if pointer == 0 {
                continue;
            }
            let context: Kioctx = self.kernel.read(pointer)?;
            if context.dead != 0 {
                continue;
            }
            in_flight += self.requests_in_flight(pointer, &context)?;
            contexts.push(AioContext {
                address: context.mmap_base,
                len: context.mmap_size,
                max_reqs: context.max_reqs,
                events: self.events(pointer, &context)?,
            });
        }
        Ok((contexts, in_flight))
    }

    /// Slots of the ring are taken by requests and given back when their events have been taken: in the next call after that, so that the
    /// context counts those that can be given back.
    fn requests_in_flight(&self, addr: u64, context: &Kioctx) -> Result<u64> {
        let offset = self.kernel.offset_of("kioctx_cpu", "reqs_available")?;
        let mut available = i64::from(context.reqs_available);
        for cpu in self.kernel.possible_cpus()? {
            let at = self.kernel.per_cpu(context.cpu, cpu)?.wrapping_add(offset);
            available += i64::from(self.kernel.read_u32(at)?);
        }
        let taken = i64::from(context.nr_events) - 1 - available - i64::from(context.completed_events);
        u64::try_from(taken).map_err(|_| corrupt("kioctx", addr, "has more free slots than slots"))
    }

    fn events(&self, addr: u64, context: &Kioctx) -> Result<Vec<[u64; 4]>> {
        let damaged = |why: &str| corrupt("kioctx", addr, why);
        if context.mmap_size > MAX_RING || context.mmap_size < PAGE_SIZE {
            return Err(damaged("has a ring of no size that there is"));
        }
        let count = (context.mmap_size >> PAGE_SHIFT) as usize;
        let pages = self.kernel.read_bytes(context.ring_pages, count * 8)?;
        let pages: Vec<u64> =
            pages.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        let mut bytes = Vec::with_capacity(count << PAGE_SHIFT);
        for page in pages {
            let mut contents = vec![0; PAGE_SIZE as usize];
            let phys = self.kernel.page_to_pfn(page)? << PAGE_SHIFT;
            self.kernel.vmcore().read_phys(phys, &mut contents).map_err(ktypes::Error::from)?;
            bytes.extend(contents);
        }
        let word = |offset: u64| {
            let at = bytes.get(offset as usize..).and_then(|tail| tail.first_chunk::<8>());
            at.map(|word| u64::from_le_bytes(*word))
                .ok_or_else(|| damaged("has events behind its ring's end"))
        };
        let half =
            |member: &str| -> Result<u32> { Ok(word(self.kernel.offset_of("aio_ring", member)?)? as u32) };
        let (head, header) = (half("head")?, half("header_length")?);
        // The program can write to it, the kernel believes its own tail.
        if context.nr_events == 0 || head >= context.nr_events || context.tail >= context.nr_events {
            return Err(damaged("has a ring whose head is not in it"));
        }
        let (mut at, mut events) = (head, Vec::new());
        while at != context.tail {
            let start = u64::from(header) + u64::from(at) * EVENT_SIZE;
            events.push([word(start)?, word(start + 8)?, word(start + 16)?, word(start + 24)?]);
            at = (at + 1) % context.nr_events;
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use synth::{PTR, Record, Synth, U32, array};

    use crate::testing::{declare, open};

    const EVENTS: u32 = 127;

    /// A process with one context whose ring is one page.
    struct Machine {
        synth: Synth,
        table: u64,
        context: u64,
        ring: u64,
    }

    impl Machine {
        /// So many slots of the ring are free, and so many events have been completed since free ones were counted.
        fn new(free: [u32; 3], completed: u32) -> Self {
            let mut synth = Synth::new();
            declare::<Table>(&mut synth, &[("table", array(PTR, 2))]);
            declare::<Kioctx>(&mut synth, &[]);
            synth
                .structure("kioctx_cpu", Record::new().field("reqs_available", U32))
                .structure("pages", Record::new().field("page", array(PTR, 1)))
                .structure(
                    "aio_ring",
                    Record::new().field("head", U32).field("tail", U32).field("header_length", U32).size(32),
                );
            let (table, context) = (synth.alloc("kioctx_table"), synth.alloc("kioctx"));
            let pages = synth.alloc("pages");
            let phys = synth.alloc_phys(PAGE_SIZE, PAGE_SIZE);
            let (ring, page) = (synth.direct(phys), synth.page_of(phys));
            synth.write_u64(pages, page);
            synth.set("aio_ring", ring, "header_length", 32u32);
            let per_cpu = synth.per_cpu_variable("counters", 8);
            for cpu in 0..2 {
                let at = synth.per_cpu(per_cpu, cpu);
                synth.write(at, &free[cpu as usize].to_le_bytes());
            }
            let slot = synth.address_of("kioctx_table", table, "table");
            synth.set("kioctx_table", table, "nr", 2u32).write_u64(slot + 8, context);
            for (member, value) in [
                ("max_reqs", 32),
                ("nr_events", EVENTS),
                ("completed_events", completed),
                ("tail", 2),
                ("reqs_available.counter", free[2]),
            ] {
                synth.set("kioctx", context, member, value);
            }
            for (member, value) in [
                ("cpu", per_cpu),
                ("mmap_base", 0x7f00_0000),
                ("mmap_size", PAGE_SIZE),
                ("ring_pages", pages),
            ] {
                synth.set("kioctx", context, member, value);
            }
            Machine { synth, table, context, ring }
        }

        fn look(&self) -> Result<(Vec<AioContext>, u64)> {
            Autopsy::new(&open(&self.synth)).aio_contexts(self.table)
        }
    }

    #[test]
    fn events_are_read_around_the_rings_end() {
        let mut machine = Machine::new([100, 20, 3], 3);
        machine.synth.set("aio_ring", machine.ring, "head", EVENTS - 1);
        for (n, data) in [(EVENTS - 1, 70), (0, 71), (1, 72)] {
            machine.synth.write_u64(machine.ring + 32 + u64::from(n) * EVENT_SIZE, data);
        }
        let (contexts, in_flight) = machine.look().unwrap();
        assert_eq!((contexts.len(), in_flight), (1, 0));
        assert_eq!(
            (contexts[0].address, contexts[0].len, contexts[0].max_reqs),
            (0x7f00_0000, PAGE_SIZE, 32)
        );
        assert_eq!(contexts[0].events.iter().map(|event| event[0]).collect::<Vec<_>>(), [70, 71, 72]);
    }

    #[test]
    fn what_neither_is_free_nor_completed_is_in_flight() {
        assert_eq!(Machine::new([100, 20, 2], 3).look().unwrap().1, 1);
        assert!(Machine::new([100, 20, 40], 3).look().is_err(), "more than there are");
    }

    #[test]
    fn a_ring_that_makes_no_sense_costs_its_process() {
        let mut machine = Machine::new([100, 20, 6], 0);
        machine.synth.set("aio_ring", machine.ring, "head", EVENTS);
        assert!(machine.look().is_err(), "the program can write there");
        let mut machine = Machine::new([100, 20, 6], 0);
        machine.synth.set("kioctx", machine.context, "mmap_size", u64::MAX);
        assert!(machine.look().is_err());
        machine.synth.set("kioctx", machine.context, "dead.counter", 1);
        assert_eq!(machine.look().unwrap(), (Vec::new(), 0), "it is being taken down");
    }
}
