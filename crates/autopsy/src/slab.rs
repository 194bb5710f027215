//! Slab caches: `kmem_cache`, `kmem_cache_node`, `kmem_cache_cpu`, `slab` (mm/slab.h, include/linux/slub_def.h, mm/slub.c; SLUB of 6.1 and
//! 6.12).

use std::collections::HashSet;

use ktypes::{Kernel, KernelType};
use serde::Serialize;
use snapshot::Severity;

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// Caches of one machine: some hundreds.
const MAX_CACHES: usize = 1 << 14;
/// MAX_NUMNODES (CONFIG_NODES_SHIFT is 10 at most).
const MAX_NODES: u32 = 1 << 10;
/// Slabs on one list; 4 TiB of them.
const MAX_SLABS: usize = 1 << 30;
/// Longest name that is kept.
const MAX_NAME: usize = 128;
/// The most objects of a slab (MAX_OBJS_PER_PAGE, mm/slub.c).
const MAX_OBJECTS: u32 = 32767;
/// `kmem_cache_order_objects.x`: the order above, the objects below (OO_SHIFT, OO_MASK).
const OO_SHIFT: u32 = 16;
const OO_MASK: u32 = (1 << OO_SHIFT) - 1;
/// The largest order of a slab (MAX_ORDER is 10 or 11).
const MAX_ORDER: u32 = 11;

#[derive(KernelType)]
#[kernel("kmem_cache")]
struct KmemCache {
    /// A per-CPU pointer.
    cpu_slab: u64,
    size: u32,
    object_size: u32,
    /// Where in a free object the pointer to the next one is.
    offset: u32,
    #[kernel("oo.x")]
    oo: u32,
    refcount: i32,
    name: u64,
    /// CONFIG_SLAB_FREELIST_HARDENED.
    #[kernel(optional)]
    random: Option<u64>,
    #[kernel("list", address)]
    #[allow(dead_code, reason = "for container_of")]
    list: u64,
    /// `struct kmem_cache_node *node[]`, as many as there are nodes.
    #[kernel(address)]
    node: u64,
}

#[derive(KernelType)]
#[kernel("kmem_cache_node")]
struct KmemCacheNode {
    nr_partial: u64,
    #[kernel(address)]
    partial: u64,
    /// Both with CONFIG_SLUB_DEBUG.
    #[kernel("nr_slabs.counter")]
    nr_slabs: i64,
    #[kernel("total_objects.counter")]
    total_objects: i64,
}

#[derive(KernelType)]
#[kernel("kmem_cache_cpu")]
struct KmemCacheCpu {
    freelist: u64,
    slab: u64,
    /// CONFIG_SLUB_CPU_PARTIAL.
    #[kernel(optional)]
    partial: Option<u64>,
}

/// `struct slab`: the same place as `struct page`.
#[derive(KernelType)]
#[kernel("slab")]
struct Slab {
    slab_cache: u64,
    inuse: u16,
    objects: u16,
    #[kernel("slab_list", address)]
    #[allow(dead_code, reason = "for container_of")]
    slab_list: u64,
    /// Of the slabs that a CPU has set aside.
    #[kernel(optional)]
    next: Option<u64>,
}

/// A cache as /proc/slabinfo shows it, and what CPUs had in reserve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlabCache {
    /// Of several caches that were merged, the first one's.
    pub name: String,
    /// Bytes of an object, as it was asked for.
    pub object_size: u32,
    /// Bytes from one object to the next.
    pub size: u32,
    /// Objects that are not free in the nodes' lists: as /proc/slabinfo counts, those that CPUs have in reserve are among them.
    pub active: u64,
    /// Free objects that CPUs had in reserve: `active` minus these were in use. `None`: they could not be counted.
    pub reserved: Option<u64>,
    /// All objects.
    pub objects: u64,
    #[allow(missing_docs)]
    pub slabs: u64,
    /// Objects of a slab.
    pub objects_per_slab: u32,
    /// Pages of a slab.
    pub pages_per_slab: u32,
    /// Bytes of all slabs.
    pub bytes: u64,
    /// How many caches were merged into this one.
    pub aliases: u32,
}

impl Autopsy<'_> {
    /// The slab caches, in the order of /proc/slabinfo. One that is damaged is left out, and a finding says so.
    ///
    /// # Errors
    /// When there is no list of caches in this kernel, or it is not SLUB with its counters (CONFIG_SLUB_DEBUG).
    pub fn slab_caches(&self) -> Result<Vec<SlabCache>> {
        self.kernel.check::<KmemCache>()?;
        self.kernel.check::<KmemCacheNode>()?;
        let head = self.kernel.symbol("slab_caches")?;
        // A variable where there can be several.
        let nodes = match self.kernel.symbol_opt("nr_node_ids") {
            Some(addr) => self.kernel.read_u32(addr)?,
            None => 1,
        };
        if nodes == 0 || nodes > MAX_NODES {
            return Err(corrupt("nr_node_ids", 0, format!("{nodes} nodes")));
        }
        let mut caches = Vec::new();
        for node in self.kernel.list_head(head, MAX_CACHES) {
            let addr = match node {
                Ok(node) => self.kernel.container_of::<KmemCache>(node, "list")?,
                Err(error) => {
                    let text = format!(
                        "the list of slab caches is damaged behind {} of them: {error}",
                        caches.len()
                    );
                    self.find(Severity::Doubt, "slab", text);
                    break;
                }
            };
            match self.slab_cache(addr, nodes) {
                Ok(cache) => caches.push(cache),
                Err(error) => self.find(Severity::Doubt, "slab", format!("a slab cache is lost: {error}")),
            }
        }
        Ok(caches)
    }

    fn slab_cache(&self, addr: u64, nodes: u32) -> Result<SlabCache> {
        let kernel = self.kernel;
        let cache: KmemCache = kernel.read(addr)?;
        let (order, objects_per_slab) = (cache.oo >> OO_SHIFT, cache.oo & OO_MASK);
        if order > MAX_ORDER || objects_per_slab == 0 || cache.size == 0 || cache.object_size > cache.size {
            let why = format!("objects of {} of {} bytes, {:#x}", cache.object_size, cache.size, cache.oo);
            return Err(corrupt("kmem_cache", addr, why));
        }
        let name = String::from_utf8_lossy(&kernel.read_cstr(cache.name, MAX_NAME)?).into_owned();
        let (mut slabs, mut objects, mut free) = (0u64, 0u64, 0u64);
        for n in 0..nodes {
            let at = kernel.read_u64(cache.node.wrapping_add(u64::from(n) * 8))?;
            if at == 0 {
                continue;
            }
            let node: KmemCacheNode = kernel.read(at)?;
            let count = |count: i64| {
                u64::try_from(count)
                    .map_err(|_| corrupt("kmem_cache_node", at, format!("counts {count} of `{name}`")))
            };
            slabs = slabs.saturating_add(count(node.nr_slabs)?);
            objects = objects.saturating_add(count(node.total_objects)?);
            free = free.saturating_add(self.free_in_list(addr, &name, &node)?);
        }
        let pages_per_slab = 1 << order;
        let reserved = match self.reserve(addr, &cache) {
            Ok(reserved) => Some(reserved),
            Err(error) => {
                let text = format!("what CPUs have in reserve of `{name}` cannot be counted: {error}");
                self.find(Severity::Note, "slab", text);
                None
            }
        };
        Ok(SlabCache {
            name,
            object_size: cache.object_size,
            size: cache.size,
            active: objects.saturating_sub(free),
            reserved,
            objects,
            slabs,
            objects_per_slab,
            pages_per_slab,
            bytes: slabs.saturating_mul(u64::from(pages_per_slab) * vmcore::PAGE_SIZE),
            aliases: u32::try_from(cache.refcount.saturating_sub(1)).unwrap_or(0),
        })
    }

    /// Free objects in the slabs of a node's list of those that are neither full nor any CPU's.
    fn free_in_list(&self, cache: u64, name: &str, node: &KmemCacheNode) -> Result<u64> {
        // One more than there should be: a list that is longer than its number is damaged.
        let most = usize::try_from(node.nr_partial).unwrap_or(usize::MAX).min(MAX_SLABS) + 1;
        let (mut free, mut count) = (0u64, 0u64);
        for entry in self.kernel.list_head(node.partial, most) {
            let at = match entry {
                Ok(entry) => self.kernel.container_of::<Slab>(entry, "slab_list")?,
                Err(error) => {
                    let text = format!("the list of partial slabs of `{name}` is damaged: {error}");
                    self.find(Severity::Doubt, "slab", text);
                    return Ok(free);
                }
            };
            free += u64::from(free_in(at, &read_slab(self.kernel, at, cache)?)?);
            count += 1;
        }
        // The number is changed after the list; a CPU can have been between the two.
        if count.abs_diff(node.nr_partial) > 1 {
            let text = format!(
                "{count} partial slabs of `{name}` were found, the kernel counted {}",
                node.nr_partial
            );
            self.find(Severity::Doubt, "slab", text);
        }
        Ok(free)
    }

    /// Free objects that CPUs had in reserve: those on a CPU's own free list, and in the slabs that it has set aside.
    fn reserve(&self, addr: u64, cache: &KmemCache) -> Result<u64> {
        let kernel = self.kernel;
        let mut free = 0u64;
        for cpu in kernel.possible_cpus()? {
            let own: KmemCacheCpu = kernel.read(kernel.per_cpu(cache.cpu_slab, cpu)?)?;
            if own.slab != 0 {
                let slab = read_slab(kernel, own.slab, addr)?;
                free += self.free_list(cache, own.freelist, slab.objects)?;
                // What others have given back meanwhile.
                free += u64::from(free_in(own.slab, &slab)?);
            }
            let mut seen = HashSet::new();
            let mut at = own.partial.unwrap_or(0);
            while at != 0 {
                if !seen.insert(at) || seen.len() > MAX_SLABS {
                    return Err(corrupt("slab", at, "is on a CPU's list twice"));
                }
                let slab = read_slab(kernel, at, addr)?;
                free += u64::from(free_in(at, &slab)?);
                at = slab.next.unwrap_or(0);
            }
        }
        Ok(free)
    }

    /// How many objects a free list has (get_freepointer(), freelist_ptr_decode(), mm/slub.c).
    fn free_list(&self, cache: &KmemCache, first: u64, most: u16) -> Result<u64> {
        let (mut count, mut object) = (0, first);
        while object != 0 {
            if count >= u64::from(most) {
                return Err(corrupt("free list", first, "is longer than the slab has objects"));
            }
            count += 1;
            let at = object.wrapping_add(cache.offset.into());
            let stored = self.kernel.read_u64(at)?;
            object = match cache.random {
                Some(random) => stored ^ random ^ at.swap_bytes(),
                None => stored,
            };
        }
        Ok(count)
    }
}

/// A slab, if it is one of `cache`.
fn read_slab(kernel: &Kernel, at: u64, cache: u64) -> Result<Slab> {
    kernel.page_to_pfn(at)?;
    let slab: Slab = kernel.read(at)?;
    if slab.slab_cache != cache {
        return Err(corrupt(
            "slab",
            at,
            format!("is of the cache at {:#x}, not of {cache:#x}", slab.slab_cache),
        ));
    }
    Ok(slab)
}

/// Free objects of a slab.
fn free_in(at: u64, slab: &Slab) -> Result<u32> {
    let (objects, used) = (u32::from(slab.objects), u32::from(slab.inuse));
    objects
        .checked_sub(used)
        .filter(|_| objects <= MAX_OBJECTS)
        .ok_or_else(|| corrupt("slab", at, format!("{used} of {objects} objects are in use")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::{Synth, U64, array, named};

    const RANDOM: u64 = 0x1234_5678_9abc_def0;

    /// A cache of objects of 64 bytes: one slab of 8 on the node's list with three in use, one that is a CPU's own with two free ones on the
    /// CPU's list and one given back by others, one that this CPU has set aside with four in use.
    struct Machine {
        synth: Synth,
        node: u64,
        /// The slab on the node's list.
        partial: u64,
        /// The second object on the CPU's free list, and what leads to the next.
        last_free: u64,
    }

    fn machine() -> Machine {
        let mut synth = Synth::new();
        declare::<KmemCache>(&mut synth, &[("list", named("list_head")), ("node", array(U64, 2))]);
        declare::<KmemCacheNode>(&mut synth, &[("partial", named("list_head"))]);
        declare::<KmemCacheCpu>(&mut synth, &[]);
        declare::<Slab>(&mut synth, &[("slab_list", named("list_head"))]);
        let head = synth.variable("slab_caches", "list_head");
        synth.write_u64(head, head).write_u64(head + 8, head);
        let (cache, node) = (synth.alloc("kmem_cache"), synth.alloc("kmem_cache_node"));
        let name = synth.string("things");
        let size = synth.size_of("kmem_cache_cpu");
        let per_cpu = synth.per_cpu_variable("things_cpu", size);
        let partial_head = synth.list_init("kmem_cache_node", node, "partial");
        let link = synth.address_of("kmem_cache", cache, "list");
        synth.list_add_tail(link, head);
        let nodes = synth.address_of("kmem_cache", cache, "node");
        synth.write_u64(nodes, node);
        synth
            .set("kmem_cache", cache, "cpu_slab", per_cpu)
            .set("kmem_cache", cache, "size", 64u32)
            .set("kmem_cache", cache, "object_size", 56u32)
            .set("kmem_cache", cache, "offset", 24u32)
            .set("kmem_cache", cache, "oo.x", 1u32 << OO_SHIFT | 8)
            .set("kmem_cache", cache, "refcount", 3)
            .set("kmem_cache", cache, "name", name)
            .set("kmem_cache", cache, "random", RANDOM)
            .set("kmem_cache_node", node, "nr_partial", 1u64)
            .set("kmem_cache_node", node, "nr_slabs.counter", 5i64)
            .set("kmem_cache_node", node, "total_objects.counter", 40i64);
        let mut slab = |used: u16| {
            let phys = synth.alloc_phys(4096, 4096);
            let page = synth.page_of(phys);
            synth
                .set("slab", page, "slab_cache", cache)
                .set("slab", page, "inuse", used)
                .set("slab", page, "objects", 8u16);
            (page, synth.direct(phys))
        };
        let ((partial, _), (own, objects), (aside, _)) = (slab(3), slab(7), slab(4));
        let link = synth.address_of("slab", partial, "slab_list");
        synth.list_add_tail(link, partial_head);
        let cpu = synth.per_cpu(per_cpu, 0);
        synth.set("kmem_cache_cpu", cpu, "freelist", objects).set("kmem_cache_cpu", cpu, "slab", own).set(
            "kmem_cache_cpu",
            cpu,
            "partial",
            aside,
        );
        let hidden = |at: u64, next: u64| next ^ RANDOM ^ at.swap_bytes();
        let (first, second) = (objects + 24, objects + 64 + 24);
        synth.write_u64(first, hidden(first, objects + 64)).write_u64(second, hidden(second, 0));
        Machine { synth, node, partial, last_free: second }
    }

    fn read(machine: &Machine) -> (Vec<SlabCache>, Vec<String>) {
        let kernel = open(&machine.synth);
        let autopsy = Autopsy::new(&kernel);
        let caches = autopsy.slab_caches().unwrap();
        (caches, autopsy.findings().into_iter().map(|finding| finding.text).collect())
    }

    #[test]
    fn objects_are_counted_as_slabinfo_does_and_the_reserve_beside() {
        let (caches, findings) = read(&machine());
        assert_eq!(findings, [] as [&str; 0]);
        let expected = SlabCache {
            name: "things".into(),
            object_size: 56,
            size: 64,
            active: 35,
            reserved: Some(2 + 1 + 4),
            objects: 40,
            slabs: 5,
            objects_per_slab: 8,
            pages_per_slab: 2,
            bytes: 5 * 8192,
            aliases: 2,
        };
        assert_eq!(caches, [expected]);
    }

    #[test]
    fn a_free_list_that_goes_round_costs_only_the_reserve() {
        let mut machine = machine();
        let at = machine.last_free;
        machine.synth.write_u64(at, (at - 24) ^ RANDOM ^ at.swap_bytes());
        let (caches, findings) = read(&machine);
        assert_eq!((caches[0].active, caches[0].reserved), (35, None));
        assert!(findings[0].contains("longer than the slab has objects"), "{findings:?}");
    }

    #[test]
    fn a_list_of_slabs_that_is_too_long_is_damage() {
        let mut machine = machine();
        machine.synth.set("kmem_cache_node", machine.node, "nr_partial", 7u64);
        let (_, findings) = read(&machine);
        assert!(findings[0].contains("1 partial slabs of `things` were found"), "{findings:?}");
        // To itself, for ever.
        let link = machine.synth.address_of("slab", machine.partial, "slab_list");
        machine.synth.write_u64(link, link);
        let (caches, findings) = read(&machine);
        assert_eq!(caches[0].objects, 40);
        assert!(findings[0].contains("damaged"), "{findings:?}");
    }

    #[test]
    fn a_slab_of_another_cache_costs_the_cache() {
        let mut machine = machine();
        machine.synth.set("slab", machine.partial, "slab_cache", 0x1000u64);
        let (caches, findings) = read(&machine);
        assert_eq!(caches, []);
        assert!(findings[0].contains("a slab cache is lost"), "{findings:?}");
    }
}
