//! Builds small fake dead kernels, so that everything that reads one can be tested on hand-made
//! and broken memory.
//!
//! **In:** declarations of C types, objects with their fields, lists, trees, page tables.
//! **Out:** a [`vmcore::Vmcore`] in memory, or an ELF core on disk, with kallsyms, BTF and
//! vmcoreinfo, that `ktypes::Kernel::open` opens like a real one.
//! **Never:** meant for anything but tests: a mistake in the description panics with a message.
//!
//! ```
//! use synth::{I32, PTR, Record, Synth, U8, U64, array, named};
//!
//! let mut synth = Synth::new();
//! synth.structure(
//!     "task_struct",
//!     Record::new()
//!         .field("pid", I32)
//!         .field("comm", array(U8, 16))
//!         .field_at(2048, "tasks", named("list_head"))
//!         .field("mm", PTR),
//! );
//! let init = synth.variable("init_task", "task_struct");
//! let head = synth.list_init("task_struct", init, "tasks");
//! let cache = synth.slab_cache("task_struct", synth.size_of("task_struct"));
//! for pid in 1..=3 {
//!     let task = synth.slab_alloc(cache);
//!     synth.set("task_struct", task, "pid", pid);
//!     synth.set("task_struct", task, "comm", "sleep");
//!     synth.list_add_tail(synth.address_of("task_struct", task, "tasks"), head);
//! }
//!
//! let kernel = ktypes::Kernel::open(synth.build()).unwrap();
//! let tasks: Vec<u64> = kernel.list_head(head, 10).collect::<Result<_, _>>().unwrap();
//! assert_eq!(tasks.len(), 3);
//!
//! // Break it: the second task's list entry points back to the first.
//! let second = tasks[1];
//! synth.write_u64(second, tasks[0]);
//! let kernel = ktypes::Kernel::open(synth.build()).unwrap();
//! let error = kernel.list_head(head, 10).find_map(Result::err).unwrap();
//! assert!(matches!(error, ktypes::Error::CorruptList { .. }));
//! # assert_eq!(synth.get_u64("task_struct", tasks[2] - 2048, "pid") as u32, 3);
//! ```

mod btf;
mod elf;
mod kallsyms;
mod prelude;
mod trees;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use vmcore::{FlatMemory, KERNEL_TEXT_START, PageSize, PrStatus, Vmcore, VmcoreInfo};

pub use trees::XaItem;
pub use types::{
    BOOL, I8, I16, I32, I64, PTR, Record, Type, U8, U16, U32, U64, array, constant, named, volatile,
};

use types::{Enum, Named, Types};

const PAGE: u64 = 4096;
/// The image's variables, tables and page tables lie here.
const IMAGE_PHYS: u64 = 1 << 20;
const IMAGE_SIZE: u64 = 2 << 20;
/// `_text`; the image is at another place in physical memory, as with KASLR.
const IMAGE_VA: u64 = KERNEL_TEXT_START + 0x3500_0000;
/// Objects, pages and page tables come from here on.
const HEAP_PHYS: u64 = IMAGE_PHYS + IMAGE_SIZE;
const PRESENT_RW: u64 = 0x3;
const PRESENT_RW_USER: u64 = 0x67;
/// `page_type` of a page table (PG_table cleared; include/linux/page-flags.h, until 6.9).
const PAGE_TABLE: u32 = !0x200;

/// A value that a field can be set to.
pub trait Value {
    /// Its bytes in the dead machine's order; shorter strings are padded with NULs.
    fn bytes(&self, size: usize) -> Vec<u8>;
}

macro_rules! integers {
    ($($ty:ty)*) => {$(
        impl Value for $ty {
            /// Any integer goes into a field that can hold it.
            fn bytes(&self, size: usize) -> Vec<u8> {
                let wide = *self as i128;
                let bits = size as u32 * 8;
                assert!(
                    bits >= 64 || (wide < 1 << bits && wide >= -(1 << (bits - 1))),
                    "synth: {wide} does not fit into {size} bytes"
                );
                wide.to_le_bytes()[..size].to_vec()
            }
        }
    )*};
}
integers!(u8 u16 u32 u64 usize i8 i16 i32 i64);

impl Value for bool {
    fn bytes(&self, size: usize) -> Vec<u8> {
        u8::from(*self).bytes(size)
    }
}

impl Value for &str {
    fn bytes(&self, size: usize) -> Vec<u8> {
        self.as_bytes().bytes(size)
    }
}

impl Value for &[u8] {
    fn bytes(&self, size: usize) -> Vec<u8> {
        assert!(self.len() <= size, "synth: {} bytes into a field of {size}", self.len());
        let mut bytes = self.to_vec();
        bytes.resize(size, 0);
        bytes
    }
}

/// A fake dead kernel in the making.
#[derive(Clone)]
pub struct Synth {
    /// The RAM that is in use; the rest is zero.
    ram: Vec<u8>,
    ram_size: u64,
    types: Types,
    symbols: Vec<(String, char, u64)>,
    without: BTreeSet<String>,
    info: Vec<String>,
    release: String,
    levels: u8,
    cpus: u32,
    has_btf: bool,
    prstatus: Vec<PrStatus>,
    image_next: u64,
    heap_next: u64,
    per_cpu_next: u64,
    per_cpu_areas: Vec<u64>,
    vmalloc_next: u64,
    top: u64,
    slabs: BTreeMap<u64, Slab>,
}

/// A slab cache's only slab.
#[derive(Clone)]
struct Slab {
    /// Direct-map address of the first object.
    start: u64,
    size: u64,
    used: u64,
    objects: u64,
}

/// Bytes of a slab, an order-3 page as SLUB's are.
const SLAB_SIZE: u64 = 8 * PAGE;
const PER_CPU_SIZE: u64 = 64 << 10;

impl Default for Synth {
    fn default() -> Synth {
        Synth::new()
    }
}

impl Synth {
    /// A kernel "6.1.0-synth" with 4-level page tables, two CPUs and 32 MiB of RAM, that knows the
    /// general types (lists, trees, pages, slabs) and has no objects.
    pub fn new() -> Synth {
        Synth::with(4, 32 << 20)
    }

    /// The same with 5-level page tables.
    pub fn five_level() -> Synth {
        Synth::with(5, 32 << 20)
    }

    fn with(levels: u8, ram_size: u64) -> Synth {
        let mut synth = Synth {
            ram: vec![0; HEAP_PHYS as usize],
            ram_size,
            types: Types::default(),
            symbols: Vec::new(),
            without: BTreeSet::new(),
            info: Vec::new(),
            release: "6.1.0-synth".into(),
            levels,
            cpus: 2,
            has_btf: true,
            prstatus: Vec::new(),
            image_next: IMAGE_VA + PAGE,
            heap_next: HEAP_PHYS,
            per_cpu_next: 0x1000,
            per_cpu_areas: Vec::new(),
            vmalloc_next: 0,
            top: 0,
            slabs: BTreeMap::new(),
        };
        synth.vmalloc_next = synth.vmalloc_base();
        prelude::declare(&mut synth);
        synth.symbol_of_kind("_text", 'T', IMAGE_VA);
        synth.symbol_of_kind("_stext", 'T', IMAGE_VA);
        synth.symbol_of_kind("migrate_pages", 'T', IMAGE_VA + 0x100);
        synth.symbol_of_kind("mwriteprotect_range", 'T', IMAGE_VA + 0x200);
        synth.symbol_of_kind("panic", 'T', IMAGE_VA + 0x300);
        synth.symbol_of_kind("_end", 'B', IMAGE_VA + IMAGE_SIZE);
        synth.top = synth.image_alloc(PAGE, PAGE);
        let top = synth.top;
        synth.symbol("init_top_pgt", top);
        for (name, value) in [
            ("page_offset_base", synth.page_offset()),
            ("vmemmap_base", synth.vmemmap()),
            ("vmalloc_base", synth.vmalloc_base()),
            ("nr_cpu_ids", 2),
            ("__cpu_possible_mask", 0b11),
            ("__cpu_online_mask", 0b11),
        ] {
            let addr = synth.image_alloc(8, 8);
            synth.symbol(name, addr);
            synth.write_u64(addr, value);
        }
        let offsets = synth.image_alloc(8 * 64, 8);
        synth.symbol("__per_cpu_offset", offsets);
        for cpu in 0..synth.cpus {
            let area = synth.alloc_bytes(PER_CPU_SIZE, PAGE);
            synth.per_cpu_areas.push(area);
            synth.write_u64(offsets + u64::from(cpu) * 8, area);
        }
        // struct pages of all RAM, mapped as the kernel does.
        let pages = ram_size / PAGE * 64;
        let array = synth.alloc_phys(pages, PAGE);
        for offset in (0..pages).step_by(PAGE as usize) {
            let va = synth.vmemmap() + offset;
            synth.map(top, va, PageSize::Size4K, (array + offset) | PRESENT_RW);
        }
        synth
    }

    // ---- the kernel as a whole

    /// Sets the release.
    pub fn release(&mut self, release: &str) -> &mut Synth {
        self.release = release.to_owned();
        self
    }

    /// Leaves BTF out.
    pub fn without_btf(&mut self) -> &mut Synth {
        self.has_btf = false;
        self
    }

    /// Leaves a symbol out.
    pub fn without_symbol(&mut self, name: &str) -> &mut Synth {
        self.without.insert(name.to_owned());
        self
    }

    /// Leaves a line of vmcoreinfo out, by what stands before its `=`.
    pub fn without_info(&mut self, key: &str) -> &mut Synth {
        self.without.insert(format!("{key}="));
        self
    }

    /// Adds a line to vmcoreinfo.
    pub fn info_line(&mut self, line: &str) -> &mut Synth {
        self.info.push(line.to_owned());
        self
    }

    /// Adds a CPU's NT_PRSTATUS note.
    pub fn prstatus(&mut self, pid: i32, regs: [u64; 27]) -> &mut Synth {
        let cpu = self.prstatus.len() as u32;
        self.prstatus.push(PrStatus { cpu, pid, regs });
        self
    }

    /// Where the direct map begins.
    pub fn page_offset(&self) -> u64 {
        if self.levels == 5 { 0xff11_4560_0000_0000 } else { 0xffff_8d0f_c000_0000 }
    }

    fn vmemmap(&self) -> u64 {
        if self.levels == 5 { 0xffd4_0000_0000_0000 } else { 0xffff_ea00_0000_0000 }
    }

    fn vmalloc_base(&self) -> u64 {
        if self.levels == 5 { 0xffa0_0000_0000_0000 } else { 0xffff_c900_0000_0000 }
    }

    // ---- types

    /// Declares a struct or union, or replaces its declaration.
    pub fn structure(&mut self, name: &str, record: Record) -> &mut Synth {
        self.types.names.insert(name.to_owned(), Named::Record(record));
        self
    }

    /// Declares an enum of 32 bits.
    pub fn enumeration(&mut self, name: &str, values: &[(&str, i64)]) -> &mut Synth {
        self.declare_enum(name, values, false)
    }

    /// Declares an enum of 64 bits.
    pub fn enumeration64(&mut self, name: &str, values: &[(&str, i64)]) -> &mut Synth {
        self.declare_enum(name, values, true)
    }

    fn declare_enum(&mut self, name: &str, values: &[(&str, i64)], is_64: bool) -> &mut Synth {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        self.types.names.insert(name.to_owned(), Named::Enum(Enum { values, is_64 }));
        self
    }

    /// Declares a typedef.
    pub fn typedef(&mut self, name: &str, ty: Type) -> &mut Synth {
        self.types.names.insert(name.to_owned(), Named::Typedef(ty));
        self
    }

    /// Takes a declaration back. Nothing else may use it.
    pub fn without_type(&mut self, name: &str) -> &mut Synth {
        self.types.names.remove(name);
        self
    }

    /// Takes a struct's (direct) member out. The others stay where they are, and objects made
    /// before stay right.
    pub fn without_member(&mut self, type_name: &str, member: &str) -> &mut Synth {
        let Named::Record(record) = self.types.get(type_name).clone() else {
            panic!("synth: `{type_name}` is no struct");
        };
        let (placed, size, _) = self.types.place(&record);
        let mut left = record.clone();
        for (field, placed) in left.fields.iter_mut().zip(placed) {
            if field.bits.is_none() {
                field.at = Some(placed.bit_offset / 8);
            }
        }
        left.fields.retain(|field| field.name != member);
        assert!(left.fields.len() < record.fields.len(), "synth: `{type_name}` has no `{member}`");
        self.structure(type_name, left.size(size))
    }

    /// The size of a declared type.
    pub fn size_of(&self, type_name: &str) -> u64 {
        self.types.size_align(&named(type_name)).0
    }

    /// The offset of a member in bytes.
    pub fn offset_of(&self, type_name: &str, path: &str) -> u64 {
        self.types.member(type_name, path).0 / 8
    }

    /// The address of an object's member.
    pub fn address_of(&self, type_name: &str, addr: u64, path: &str) -> u64 {
        addr + self.offset_of(type_name, path)
    }

    // ---- symbols

    /// Adds a (global data) symbol.
    pub fn symbol(&mut self, name: &str, addr: u64) -> &mut Synth {
        self.symbol_of_kind(name, 'D', addr)
    }

    /// Adds a symbol of a kind as nm(1) writes it: `T` and `t` are global and static functions.
    pub fn symbol_of_kind(&mut self, name: &str, kind: char, addr: u64) -> &mut Synth {
        self.symbols.push((name.to_owned(), kind, addr));
        self
    }

    /// A static variable of the kernel's, zeroed, with its symbol. Returns its address.
    pub fn variable(&mut self, name: &str, type_name: &str) -> u64 {
        let (size, align) = self.types.size_align(&named(type_name));
        let addr = self.image_alloc(size, align);
        self.symbol(name, addr);
        addr
    }

    /// A per-CPU variable of so many bytes with its symbol. Returns what the symbol's value is; CPU
    /// n's copy is at [`per_cpu`](Self::per_cpu).
    pub fn per_cpu_variable(&mut self, name: &str, size: u64) -> u64 {
        let offset = self.per_cpu_next;
        self.per_cpu_next += size.next_multiple_of(8);
        assert!(self.per_cpu_next <= PER_CPU_SIZE, "synth: the per-CPU area is full");
        self.symbol(name, offset);
        offset
    }

    /// The address of a CPU's copy of a per-CPU variable.
    pub fn per_cpu(&self, offset: u64, cpu: u32) -> u64 {
        self.per_cpu_areas[cpu as usize] + offset
    }

    // ---- memory

    fn image_alloc(&mut self, size: u64, align: u64) -> u64 {
        let addr = self.image_next.next_multiple_of(align.max(8));
        self.image_next = addr + size;
        assert!(self.image_next <= IMAGE_VA + IMAGE_SIZE, "synth: the image is full");
        addr
    }

    /// Physical memory, zeroed, that nothing else uses. Returns its physical address.
    pub fn alloc_phys(&mut self, size: u64, align: u64) -> u64 {
        let addr = self.heap_next.next_multiple_of(align.max(8));
        self.heap_next = addr + size;
        assert!(self.heap_next <= self.ram_size, "synth: the RAM is full");
        self.ram.resize(self.heap_next as usize, 0);
        addr
    }

    /// Memory of so many bytes, zeroed. Returns its address in the direct map.
    pub fn alloc_bytes(&mut self, size: u64, align: u64) -> u64 {
        let phys = self.alloc_phys(size, align);
        self.direct(phys)
    }

    /// An object, zeroed, that lies in no slab. Returns its address in the direct map.
    pub fn alloc(&mut self, type_name: &str) -> u64 {
        let (size, align) = self.types.size_align(&named(type_name));
        self.alloc_bytes(size, align.max(64))
    }

    /// The direct map's address of a physical address.
    pub fn direct(&self, phys: u64) -> u64 {
        self.page_offset() + phys
    }

    /// Memory in the vmalloc area; neighbouring pages are not neighbours in physical memory.
    pub fn vmalloc(&mut self, size: u64) -> u64 {
        let start = self.vmalloc_next;
        let pages = size.div_ceil(PAGE);
        let block = self.alloc_phys(pages * PAGE, PAGE);
        for page in 0..pages {
            let phys = block + (pages - 1 - page) * PAGE;
            self.map(self.top, start + page * PAGE, PageSize::Size4K, phys | PRESENT_RW);
        }
        // A page that is not mapped follows, as with the kernel's.
        self.vmalloc_next = start + (pages + 1) * PAGE;
        start
    }

    /// The physical address behind a kernel address.
    ///
    /// # Panics
    /// If it is not mapped.
    pub fn phys(&self, va: u64) -> u64 {
        if va.wrapping_sub(self.page_offset()) < self.ram_size {
            return va - self.page_offset();
        }
        if va.wrapping_sub(IMAGE_VA) < IMAGE_SIZE {
            return va - IMAGE_VA + IMAGE_PHYS;
        }
        let mut table = self.top - IMAGE_VA + IMAGE_PHYS;
        for level in (1..=self.levels).rev() {
            let entry = self.phys_u64(table + (va >> (12 + 9 * (u32::from(level) - 1)) & 511) * 8);
            assert!(entry & 1 != 0, "synth: {va:#x} is not mapped");
            table = entry & 0x000f_ffff_ffff_f000;
        }
        table + va % PAGE
    }

    fn phys_u64(&self, phys: u64) -> u64 {
        let bytes = &self.ram[phys as usize..][..8];
        u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
    }

    /// Writes bytes at a physical address.
    pub fn write_phys(&mut self, phys: u64, bytes: &[u8]) -> &mut Synth {
        self.ram[phys as usize..][..bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Writes bytes at a kernel address.
    pub fn write(&mut self, va: u64, bytes: &[u8]) -> &mut Synth {
        let mut done = 0;
        for (at, len) in Pages::new(va, bytes.len()) {
            let phys = self.phys(at);
            self.write_phys(phys, &bytes[done..done + len]);
            done += len;
        }
        self
    }

    /// Writes a word, such as a pointer, at a kernel address.
    pub fn write_u64(&mut self, va: u64, value: u64) -> &mut Synth {
        self.write(va, &value.to_le_bytes())
    }

    /// Reads bytes back.
    pub fn read(&self, va: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        for (at, len) in Pages::new(va, len) {
            bytes.extend(&self.ram[self.phys(at) as usize..][..len]);
        }
        bytes
    }

    /// Reads a word back.
    pub fn read_u64(&self, va: u64) -> u64 {
        u64::from_le_bytes(self.read(va, 8).try_into().expect("8 bytes"))
    }

    /// A NUL-terminated string somewhere in memory. Returns its address.
    pub fn string(&mut self, text: &str) -> u64 {
        let addr = self.alloc_bytes(text.len() as u64 + 1, 8);
        self.write(addr, text.as_bytes());
        addr
    }

    // ---- objects

    /// Sets an object's member: `synth.set("task_struct", task, "thread.fsbase", 7u64)`. Integers
    /// are stored in the member's size, strings are padded with NULs; bit-fields are possible.
    pub fn set(&mut self, type_name: &str, addr: u64, path: &str, value: impl Value) -> &mut Synth {
        let (bit, bits, ty) = self.types.member(type_name, path);
        let at = addr + bit / 8;
        let Some(bits) = bits else {
            let size = self.types.size_align(&ty).0 as usize;
            return self.write(at, &value.bytes(size));
        };
        let value = u64::from_le_bytes(value.bytes(8).try_into().expect("8 bytes"));
        assert!(bits == 64 || value < 1 << bits, "synth: {value} does not fit into {bits} bits");
        let len = (bit % 8 + u64::from(bits)).div_ceil(8) as usize;
        let mut word = [0; 16];
        word[..len].copy_from_slice(&self.read(at, len));
        let mask = (u128::MAX >> (128 - u32::from(bits))) << (bit % 8);
        let word = u128::from_le_bytes(word) & !mask | u128::from(value) << (bit % 8);
        self.write(at, &word.to_le_bytes()[..len])
    }

    /// Reads a member of up to 8 bytes (no bit-field) back.
    pub fn get_u64(&self, type_name: &str, addr: u64, path: &str) -> u64 {
        let (bit, _, ty) = self.types.member(type_name, path);
        let size = self.types.size_align(&ty).0 as usize;
        let mut word = [0; 8];
        word[..size].copy_from_slice(&self.read(addr + bit / 8, size));
        u64::from_le_bytes(word)
    }

    // ---- lists

    /// Makes a member an empty list (or a node in none). Returns its address.
    pub fn list_init(&mut self, type_name: &str, addr: u64, path: &str) -> u64 {
        let head = self.address_of(type_name, addr, path);
        self.set("list_head", head, "next", head).set("list_head", head, "prev", head);
        head
    }

    /// Adds the `list_head` at `node` at the end of a list.
    pub fn list_add_tail(&mut self, node: u64, head: u64) -> &mut Synth {
        let last = self.get_u64("list_head", head, "prev");
        self.set("list_head", node, "next", head)
            .set("list_head", node, "prev", last)
            .set("list_head", last, "next", node)
            .set("list_head", head, "prev", node)
    }

    /// Adds the `hlist_node` at `node` at the beginning of a list.
    pub fn hlist_add_head(&mut self, node: u64, head: u64) -> &mut Synth {
        let first = self.get_u64("hlist_head", head, "first");
        self.set("hlist_node", node, "next", first).set("hlist_head", head, "first", node)
    }

    // ---- slabs

    /// A slab cache for objects of so many bytes. Returns the address of its `kmem_cache`.
    pub fn slab_cache(&mut self, name: &str, object_size: u64) -> u64 {
        let cache = self.alloc("kmem_cache");
        let size = object_size.next_multiple_of(64);
        let name = self.string(name);
        self.set("kmem_cache", cache, "name", name).set("kmem_cache", cache, "size", size).set(
            "kmem_cache",
            cache,
            "object_size",
            object_size,
        );
        let start = self.alloc_bytes(SLAB_SIZE, SLAB_SIZE);
        let objects = SLAB_SIZE / size;
        assert!(objects > 0, "synth: objects of {object_size} bytes do not fit into a slab");
        let head = self.page_of(self.phys(start));
        self.set("page", head, "flags", 1u64 << 9 | 1 << 16)
            .set("slab", head, "slab_cache", cache)
            .set("slab", head, "objects", objects);
        for tail in 1..SLAB_SIZE / PAGE {
            self.set("page", head + tail * 64, "compound_head", head | 1);
        }
        self.slabs.insert(cache, Slab { start, size, used: 0, objects });
        cache
    }

    /// An object, zeroed, from a slab cache. Returns its address.
    pub fn slab_alloc(&mut self, cache: u64) -> u64 {
        let slab = self.slabs.get_mut(&cache).expect("synth: no such slab cache");
        assert!(slab.used < slab.objects, "synth: the slab is full");
        slab.used += 1;
        slab.start + (slab.used - 1) * slab.size
    }

    /// The address of the `struct page` of a physical address.
    pub fn page_of(&self, phys: u64) -> u64 {
        self.vmemmap() + phys / PAGE * 64
    }

    // ---- page tables

    /// An empty top table, as `mm_struct.pgd` points to. Returns its address.
    pub fn new_pgd(&mut self) -> u64 {
        self.alloc_bytes(PAGE, PAGE)
    }

    /// Where the entry for an address is in the table of a level (1 is the lowest), of tables that [`map`](Self::map) has made.
    pub fn entry_of(&self, pgd: u64, va: u64, level: u8) -> u64 {
        let below = |table, above| self.phys_u64(Self::slot(table, va, above)) & 0x000f_ffff_ffff_f000;
        let table = (level + 1..=self.levels).rev().fold(self.phys(pgd), below);
        self.direct(Self::slot(table, va, level))
    }

    /// Puts a leaf entry into page tables, making the tables above it, which are marked as such. `pgd` is the top table's
    /// address.
    pub fn map(&mut self, pgd: u64, va: u64, size: PageSize, pte: u64) -> &mut Synth {
        let leaf = match size {
            PageSize::Size4K => 1,
            PageSize::Size2M => 2,
            PageSize::Size1G => 3,
        };
        let mut table = self.phys(pgd);
        for level in (leaf + 1..=self.levels).rev() {
            let slot = Self::slot(table, va, level);
            let entry = self.phys_u64(slot);
            table = match entry {
                0 => {
                    let new = self.alloc_phys(PAGE, PAGE);
                    self.write_phys(slot, &(new | PRESENT_RW_USER).to_le_bytes());
                    // The kernel's own are made before there is a `struct page`.
                    if va >> 63 == 0 {
                        let page = self.page_of(new);
                        self.set("page", page, "page_type", PAGE_TABLE);
                    }
                    new
                }
                _ => entry & 0x000f_ffff_ffff_f000,
            };
        }
        let slot = Self::slot(table, va, leaf);
        self.write_phys(slot, &pte.to_le_bytes())
    }

    /// Maps a new page of 4 KiB, writable for the user, with `bytes` at its beginning. Returns its
    /// physical address.
    pub fn map_user_page(&mut self, pgd: u64, va: u64, bytes: &[u8]) -> u64 {
        let phys = self.alloc_phys(PAGE, PAGE);
        self.write_phys(phys, bytes);
        self.map(pgd, va, PageSize::Size4K, phys | PRESENT_RW_USER);
        phys
    }

    /// Where the entry for `va` in a table of some level is.
    fn slot(table: u64, va: u64, level: u8) -> u64 {
        table + (va >> (12 + 9 * (u32::from(level) - 1)) & 511) * 8
    }

    // ---- output

    /// The vmcoreinfo text as it will be.
    fn info_text(&self, tables: &BTreeMap<&str, u64>) -> String {
        let mut lines = vec![
            format!("OSRELEASE={}", self.release),
            "PAGESIZE=4096".into(),
            format!("SYMBOL(init_top_pgt)={:x}", self.top),
            format!("SYMBOL(swapper_pg_dir)={:x}", self.top),
            format!("NUMBER(phys_base)={}", (IMAGE_PHYS + KERNEL_TEXT_START).wrapping_sub(IMAGE_VA) as i64),
            format!("NUMBER(pgtable_l5_enabled)={}", u8::from(self.levels == 5)),
            "NUMBER(KERNEL_IMAGE_SIZE)=1073741824".into(),
            "NUMBER(sme_mask)=0".into(),
            format!("KERNELOFFSET={:x}", IMAGE_VA - KERNEL_TEXT_START - 0x100_0000),
        ];
        lines.extend(tables.iter().map(|(name, addr)| format!("SYMBOL({name})={addr:x}")));
        lines.extend(self.info.iter().cloned());
        lines.retain(|line| {
            !self.without.iter().any(|key| key.ends_with('=') && line.starts_with(key.as_str()))
        });
        lines.join("\n") + "\n"
    }

    /// Puts symbols and types into the image. What can still be changed stays as it is.
    fn finish(&self) -> (Vec<u8>, String) {
        let mut done = self.clone();
        if done.has_btf {
            let bytes = btf::encode(&done.types);
            let start = done.image_alloc(bytes.len() as u64, 8);
            done.write(start, &bytes);
            done.symbol("__start_BTF", start);
            done.symbol("__stop_BTF", start + bytes.len() as u64);
        }
        let symbols: Vec<_> =
            done.symbols.iter().filter(|(name, ..)| !done.without.contains(name)).cloned().collect();
        let encoded = kallsyms::encode(&symbols, KERNEL_TEXT_START);
        let mut tables = BTreeMap::new();
        // In the order of 6.1.
        for (name, bytes) in [
            ("kallsyms_offsets", encoded.offsets),
            ("kallsyms_relative_base", KERNEL_TEXT_START.to_le_bytes().to_vec()),
            ("kallsyms_num_syms", encoded.count.to_le_bytes().to_vec()),
            ("kallsyms_names", encoded.names),
            ("kallsyms_token_table", encoded.token_table),
            ("kallsyms_token_index", encoded.token_index),
        ] {
            let addr = done.image_alloc(bytes.len() as u64, 8);
            done.write(addr, &bytes);
            tables.insert(name, addr);
        }
        let info = done.info_text(&tables);
        // Untouched memory costs nothing.
        let mut ram = vec![0; done.ram_size as usize];
        ram[..done.ram.len()].copy_from_slice(&done.ram);
        (ram, info)
    }

    /// The dead kernel in memory. Can be called again after changes.
    pub fn build(&self) -> Vmcore {
        self.build_damaged(|_| {})
    }

    /// The dead kernel in memory, after `damage` has been done to its physical memory (the slice's
    /// index is the physical address), the tables for names and types included.
    pub fn build_damaged(&self, damage: impl FnOnce(&mut [u8])) -> Vmcore {
        let (mut ram, info) = self.finish();
        damage(&mut ram);
        self.core(ram, &info)
    }

    /// The dead kernel in memory, with a core that ends at a physical address: what follows is not in it.
    pub fn build_cut(&self, end: u64) -> Vmcore {
        let (mut ram, info) = self.finish();
        ram.truncate(end as usize);
        self.core(ram, &info)
    }

    fn core(&self, ram: Vec<u8>, info: &str) -> Vmcore {
        Vmcore::from_memory(
            Box::new(FlatMemory::new(vec![(0, ram)])),
            VmcoreInfo::new(info.as_bytes()),
            self.prstatus.clone(),
        )
    }

    /// Where the kernel's image is in physical memory: page tables and variables at its
    /// beginning, then BTF, then the tables of kallsyms.
    pub fn image(&self) -> std::ops::Range<u64> {
        IMAGE_PHYS..IMAGE_PHYS + IMAGE_SIZE
    }

    /// The dead kernel as an ELF core like those of `/proc/vmcore`, with a second PT_LOAD for the
    /// kernel's image.
    pub fn write_elf(&self, path: &Path) {
        let (ram, info) = self.finish();
        let bytes = elf::encode(&ram, &info, &self.prstatus, (IMAGE_PHYS, IMAGE_VA, IMAGE_SIZE));
        std::fs::write(path, bytes).expect("synth: cannot write the core");
    }
}

/// Splits a range of addresses at page boundaries: (address, length).
struct Pages {
    at: u64,
    left: usize,
}

impl Pages {
    fn new(at: u64, len: usize) -> Pages {
        Pages { at, left: len }
    }
}

impl Iterator for Pages {
    type Item = (u64, usize);
    fn next(&mut self) -> Option<(u64, usize)> {
        let len = self.left.min((PAGE - self.at % PAGE) as usize);
        let item = (self.at, len);
        self.at += len as u64;
        self.left -= len;
        (len > 0).then_some(item)
    }
}
