//! A dead kernel that can be asked by name.

use std::any::TypeId as RustTypeId;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use vmcore::{KernelMemory, PageTables, PhysicalMemory, SpecialEntries, Vmcore, VmcoreInfo};

use crate::btf::{Btf, Member, TypeId};
use crate::kallsyms::{Kallsyms, Tables};
use crate::layout::{Binder, Layout};
use crate::modules::{self, Modules};
use crate::{Decoder, Error, KernelType, Result, maple, page, xarray};

/// The most bytes that one read returns: 16 MiB. Larger lengths come from damaged structures.
pub const MAX_READ: usize = 16 << 20;

/// BTF of vmlinux has 4 to 6 MiB.
const MAX_BTF: u64 = 64 << 20;
/// `kallsyms_names` of 155,000 symbols has 2 MiB.
const MAX_KALLSYMS: u64 = 32 << 20;
/// The most CPUs that a kernel can be built for (CONFIG_NR_CPUS_RANGE_END with MAXSMP).
const MAX_CPUS: u32 = 8192;

/// A dead kernel: its memory, its symbols and its types.
///
/// Opening it takes a few milliseconds: the symbol table and BTF are indexed once. All methods take
/// `&self`; it can be shared between threads.
pub struct Kernel {
    memory: KernelMemory,
    release: String,
    symbols: Kallsyms,
    pub(crate) btf: Arc<Btf>,
    modules: OnceLock<Modules>,
    module_btfs: OnceLock<Vec<Btf>>,
    layouts: RwLock<HashMap<RustTypeId, Arc<Layout>>>,
    /// Enumerators that were asked for, those that do not exist as well: finding one means looking through all enums.
    enumerators: RwLock<HashMap<String, Option<i64>>>,
    per_cpu_offsets: OnceLock<Vec<u64>>,
    pub(crate) vmemmap: u64,
    pub(crate) struct_page_size: u64,
    pub(crate) members: Members,
    pub(crate) maple: OnceLock<maple::Shapes>,
    pub(crate) xarray: OnceLock<xarray::Shape>,
    pub(crate) slab: OnceLock<Option<page::SlabShape>>,
    pub(crate) table_type: OnceLock<Option<page::PageType>>,
}

/// Members of the kernel's general structures that the walks in this crate need, looked up once.
#[derive(Debug)]
pub(crate) struct Members {
    pub list_next: u64,
    pub hlist_first: u64,
    pub hlist_next: u64,
    pub rb_node: u64,
    pub rb_left: u64,
    pub rb_right: u64,
}

impl Kernel {
    /// Reads kallsyms and BTF out of the dead kernel's memory.
    ///
    /// # Errors
    /// [`Error::NoKallsyms`], [`Error::NoBtf`], [`Error::BadBtf`], or what is wrong with the core.
    pub fn open(core: Vmcore) -> Result<Kernel> {
        let release = core.info().osrelease()?.to_owned();
        let mut memory = KernelMemory::new(core)?;
        let symbols =
            read_kallsyms(&memory).map_err(|why| Error::NoKallsyms { release: release.clone(), why })?;
        let image = (symbols.lookup("_text"), symbols.lookup("_end"));
        if let (Some(text), Some(end)) = image
            && text < end
        {
            // The per-CPU area of the image and what is freed after boot lie within as well.
            memory.set_image(text..end);
        }
        let five = memory.levels() == 5;
        // Variables under CONFIG_DYNAMIC_MEMORY_LAYOUT (set wherever there is KASLR or 5-level
        // paging), fixed otherwise (Documentation/arch/x86/x86_64/mm.rst).
        let variable = |name: &str, fixed_4: u64, fixed_5: u64| {
            let Some(addr) = symbols.lookup(name) else {
                return Ok(if five { fixed_5 } else { fixed_4 });
            };
            read_u64(&memory, addr)
        };
        let page_offset = variable("page_offset_base", 0xffff_8880_0000_0000, 0xff11_0000_0000_0000)?;
        let vmemmap = variable("vmemmap_base", 0xffff_ea00_0000_0000, 0xffd4_0000_0000_0000)?;
        let vmalloc = variable("vmalloc_base", 0xffff_c900_0000_0000, 0xffa0_0000_0000_0000)?;
        memory.set_direct_map(page_offset..vmalloc);

        let btf = Arc::new(read_btf(&memory, &symbols, &release)?);
        let offset = |type_name: &str, path: &str| {
            offset_in(&btf, &release, type_name, path).map(|member| member.offset)
        };
        let members = Members {
            list_next: offset("list_head", "next")?,
            hlist_first: offset("hlist_head", "first")?,
            hlist_next: offset("hlist_node", "next")?,
            rb_node: offset("rb_root", "rb_node")?,
            rb_left: offset("rb_node", "rb_left")?,
            rb_right: offset("rb_node", "rb_right")?,
        };
        let struct_page_size = btf
            .find_struct("page")
            .and_then(|id| btf.size(id))
            .filter(|size| (8..=4096).contains(size))
            .ok_or_else(|| Error::MissingType { release: release.clone(), name: "page".into() })?;
        Ok(Kernel {
            memory,
            release,
            symbols,
            btf,
            modules: OnceLock::new(),
            module_btfs: OnceLock::new(),
            layouts: RwLock::default(),
            enumerators: RwLock::default(),
            per_cpu_offsets: OnceLock::new(),
            vmemmap,
            struct_page_size,
            members,
            maple: OnceLock::new(),
            xarray: OnceLock::new(),
            slab: OnceLock::new(),
            table_type: OnceLock::new(),
        })
    }

    /// The dead kernel's release, as in `uname -r`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Major and minor number of the release; (0, 0) if it has none.
    pub fn version(&self) -> (u32, u32) {
        let mut numbers = self.release.split(|c: char| !c.is_ascii_digit());
        let mut next = || numbers.next().and_then(|n| n.parse().ok()).unwrap_or(0);
        (next(), next())
    }

    /// The core behind it.
    pub fn vmcore(&self) -> &Vmcore {
        self.memory.core()
    }

    /// The core's vmcoreinfo.
    pub fn info(&self) -> &VmcoreInfo {
        self.memory.core().info()
    }

    /// The dead kernel's address space.
    pub fn memory(&self) -> &KernelMemory {
        &self.memory
    }

    /// The dead machine's physical memory.
    pub fn phys(&self) -> &dyn PhysicalMemory {
        self.memory.core().memory()
    }

    // ---- symbols

    /// The address of a symbol of the kernel itself or, failing that, of a module. Of several
    /// static symbols of one name, the one that stands first in the table.
    pub fn symbol(&self, name: &str) -> Result<u64> {
        #[cfg(fuzzing)]
        if self.symbol_opt(name).is_none() {
            return Ok(self.memory.direct_map_of(crate::fuzz::ARENA.start + crate::fuzz::variable(name)));
        }
        self.symbol_opt(name)
            .ok_or_else(|| Error::MissingSymbol { release: self.release.clone(), name: name.to_owned() })
    }

    /// The address of a symbol, if there is one.
    pub fn symbol_opt(&self, name: &str) -> Option<u64> {
        self.symbols.lookup(name).or_else(|| self.modules().lookup(name))
    }

    /// The name of the symbol at exactly this address. Of several the same one each time: global
    /// before static, without leading underscores before with them, the table's order.
    pub fn symbol_at(&self, addr: u64) -> Option<&str> {
        self.symbols.best_at(addr).or_else(|| self.modules().best_at(addr))
    }

    /// All names at exactly this address.
    pub fn symbols_at(&self, addr: u64) -> Vec<&str> {
        let own = self.symbols.names_at(addr).map(|(name, _)| name);
        own.chain(self.modules().names_at(addr)).collect()
    }

    /// The symbol that an address lies in, and how far: for stack traces.
    pub fn symbolize(&self, addr: u64) -> Option<(&str, u64)> {
        if let Some(found) = self.modules().symbolize(addr) {
            return Some(found);
        }
        // The kernel's symbols end where its image ends; far above it, the nearest says nothing.
        let end = self.symbols.lookup("_end")?;
        let start = self.symbols.lookup("_text")?;
        if !(start..end).contains(&addr) {
            return None;
        }
        let base = self.symbols.below(addr).filter(|base| *base >= start)?;
        Some((self.symbols.best_at(base)?, addr - base))
    }

    /// How many symbols the kernel itself has.
    pub fn symbol_count(&self) -> usize {
        self.symbols.len()
    }

    /// A symbol of the kernel itself, without a look at the modules.
    pub(crate) fn own_symbol(&self, name: &str) -> Option<u64> {
        self.symbols.lookup(name)
    }

    /// The name of the module whose code or data an address is part of.
    pub fn module_of(&self, addr: u64) -> Option<&str> {
        self.modules().module_of(addr)
    }

    /// The names of the modules that were loaded, the latest first.
    pub fn module_names(&self) -> impl Iterator<Item = &str> {
        self.modules().loaded()
    }

    fn modules(&self) -> &Modules {
        self.modules.get_or_init(|| Modules::read(self))
    }

    // ---- memory

    /// Fills `buf` from a kernel virtual address on.
    pub fn read_into(&self, addr: u64, buf: &mut [u8]) -> Result<()> {
        self.read_as(addr, buf, None)
    }

    fn read_as(&self, addr: u64, buf: &mut [u8], what: Option<&'static str>) -> Result<()> {
        self.memory.read_virt(addr, buf).map_err(|source| Error::Unreadable {
            addr,
            len: buf.len(),
            what,
            source,
        })
    }

    /// `len` bytes, at most [`MAX_READ`].
    pub fn read_bytes(&self, addr: u64, len: usize) -> Result<Vec<u8>> {
        if len > MAX_READ {
            return Err(Error::TooLong { addr, len, max: MAX_READ });
        }
        let mut bytes = vec![0; len];
        self.read_into(addr, &mut bytes)?;
        Ok(bytes)
    }

    /// The bytes up to a NUL, without it; at most `max` of them if there is none.
    pub fn read_cstr(&self, addr: u64, max: usize) -> Result<Vec<u8>> {
        if max > MAX_READ {
            return Err(Error::TooLong { addr, len: max, max: MAX_READ });
        }
        let mut bytes = Vec::new();
        while bytes.len() < max {
            // Never across a page that the string does not reach.
            let at = addr.wrapping_add(bytes.len() as u64);
            let in_page = (vmcore::PAGE_SIZE - at % vmcore::PAGE_SIZE) as usize;
            let mut chunk = [0; 256];
            let chunk = &mut chunk[..in_page.min(max - bytes.len()).min(256)];
            self.read_into(at, chunk)?;
            match chunk.iter().position(|byte| *byte == 0) {
                Some(end) => {
                    bytes.extend_from_slice(&chunk[..end]);
                    break;
                }
                None => bytes.extend_from_slice(chunk),
            }
        }
        Ok(bytes)
    }

    fn read_array<const N: usize>(&self, addr: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_into(addr, &mut bytes)?;
        Ok(bytes)
    }

    /// One byte.
    pub fn read_u8(&self, addr: u64) -> Result<u8> {
        self.read_array(addr).map(u8::from_le_bytes)
    }

    /// Two bytes.
    pub fn read_u16(&self, addr: u64) -> Result<u16> {
        self.read_array(addr).map(u16::from_le_bytes)
    }

    /// Four bytes.
    pub fn read_u32(&self, addr: u64) -> Result<u32> {
        self.read_array(addr).map(u32::from_le_bytes)
    }

    /// Eight bytes; also pointers.
    pub fn read_u64(&self, addr: u64) -> Result<u64> {
        self.read_array(addr).map(u64::from_le_bytes)
    }

    /// Four bytes, signed.
    pub fn read_i32(&self, addr: u64) -> Result<i32> {
        self.read_array(addr).map(i32::from_le_bytes)
    }

    /// Eight bytes, signed.
    pub fn read_i64(&self, addr: u64) -> Result<i64> {
        self.read_array(addr).map(i64::from_le_bytes)
    }

    /// The physical address behind a kernel virtual address.
    pub fn virt_to_phys(&self, va: u64) -> Result<u64> {
        Ok(self.memory.translate(va)?)
    }

    /// The page tables whose top table is at a kernel virtual address (`mm_struct.pgd`).
    ///
    /// The kernel half of a user's tables with page-table isolation is left as it is: `pgd` is the
    /// one with both halves.
    pub fn page_tables(&self, pgd_va: u64) -> Result<PageTables<'_>> {
        Ok(self.memory.tables_at(self.memory.translate(pgd_va)?))
    }

    /// How the entries of this kernel's page tables are to be read.
    ///
    /// Which swap types are special depends on the configuration, which is told by functions that
    /// exist only with it (6.1 to 6.12, mm/ and include/linux/swap.h):
    /// CONFIG_MEMORY_FAILURE by vmcoreinfo's `PG_hwpoison`, CONFIG_MIGRATION by `migrate_pages`,
    /// CONFIG_DEVICE_PRIVATE by `make_device_exclusive_range` (renamed `make_device_exclusive` in
    /// 6.15), CONFIG_PTE_MARKER (unconditional since 6.3, with CONFIG_USERFAULTFD before) by the
    /// version or `mwriteprotect_range`. The type for failed swap-ins was there up to 6.1.
    pub fn pte_format(&self) -> vmcore::PteFormat {
        let has = |symbol: &str| self.symbols.lookup(symbol).is_some();
        let version = self.version();
        let special = SpecialEntries::new(
            self.info().number("PG_hwpoison").is_ok(),
            has("migrate_pages"),
            has("make_device_exclusive_range") || has("make_device_exclusive"),
            version >= (6, 3) || has("mwriteprotect_range"),
            version < (6, 2),
        );
        let mut format = vmcore::PteFormat::new(self.memory.levels(), special);
        format.address_mask &= !self.memory.encryption_mask();
        format
    }

    // ---- CPUs

    /// `nr_cpu_ids`: CPU numbers are below it.
    pub fn nr_cpus(&self) -> Result<u32> {
        let count = self.read_u32(self.symbol("nr_cpu_ids")?)?;
        match count {
            1..=MAX_CPUS => Ok(count),
            _ => Err(Error::Implausible { what: "nr_cpu_ids".into(), value: count.into() }),
        }
    }

    /// The numbers of the CPUs that were online.
    pub fn online_cpus(&self) -> Result<Vec<u32>> {
        self.cpu_mask("__cpu_online_mask")
    }

    /// The numbers of the CPUs that could ever be online: they have per-CPU variables.
    pub fn possible_cpus(&self) -> Result<Vec<u32>> {
        self.cpu_mask("__cpu_possible_mask")
    }

    fn cpu_mask(&self, symbol: &str) -> Result<Vec<u32>> {
        let count = self.nr_cpus()?;
        let bytes = self.read_bytes(self.symbol(symbol)?, count.div_ceil(64) as usize * 8)?;
        Ok((0..count).filter(|cpu| bytes[*cpu as usize / 8] >> (cpu % 8) & 1 != 0).collect())
    }

    /// The address of a CPU's copy of a per-CPU variable, whose address (from
    /// [`symbol`](Self::symbol)) is an offset into the per-CPU area.
    pub fn per_cpu(&self, symbol: u64, cpu: u32) -> Result<u64> {
        let offsets = match self.per_cpu_offsets.get() {
            Some(offsets) => offsets,
            None => {
                let table = self.symbol("__per_cpu_offset")?;
                let bytes = self.read_bytes(table, self.nr_cpus()? as usize * 8)?;
                let offsets = bytes
                    .chunks_exact(8)
                    .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
                    .collect();
                self.per_cpu_offsets.get_or_init(|| offsets)
            }
        };
        let offset = offsets
            .get(cpu as usize)
            .ok_or_else(|| Error::Implausible { what: "a CPU number".into(), value: cpu.into() })?;
        Ok(symbol.wrapping_add(*offset))
    }

    // ---- types

    fn missing_type(&self, name: &str) -> Error {
        Error::MissingType { release: self.release.clone(), name: name.to_owned() }
    }

    /// The BTF section that knows a structure (the kernel's own first, then the modules'), and
    /// its number there.
    fn find_struct(&self, name: &str) -> Option<(&Btf, TypeId)> {
        if let Some(id) = self.btf.find_struct(name) {
            return Some((&self.btf, id));
        }
        let modules = self.module_btfs.get_or_init(|| modules::btfs(self, &self.btf));
        modules.iter().find_map(|btf| Some((btf, btf.find_struct(name)?)))
    }

    /// The kernel's own BTF.
    pub fn btf(&self) -> &Btf {
        &self.btf
    }

    /// The size of a structure, union, enum or typedef in bytes.
    pub fn size_of(&self, type_name: &str) -> Result<u64> {
        let own = self.btf.find_type(type_name).and_then(|id| self.btf.size(id));
        own.or_else(|| {
            let (btf, id) = self.find_struct(type_name)?;
            btf.size(id)
        })
        .or(cfg!(fuzzing).then_some(256))
        .ok_or_else(|| self.missing_type(type_name))
    }

    /// Where a member is, how large, and of what type.
    pub fn member(&self, type_name: &str, path: &str) -> Result<Member> {
        #[cfg(fuzzing)]
        if !self.has_member(type_name, path) {
            return Ok(crate::fuzz::member(path));
        }
        let (btf, id) = self.find_struct(type_name).ok_or_else(|| self.missing_type(type_name))?;
        btf.member(id, path).ok_or_else(|| Error::MissingMember {
            release: self.release.clone(),
            type_name: type_name.to_owned(),
            paths: vec![path.to_owned()],
        })
    }

    /// The offset of a member in bytes: `offset_of("task_struct", "thread.fpu")`.
    pub fn offset_of(&self, type_name: &str, path: &str) -> Result<u64> {
        self.member(type_name, path).map(|member| member.offset)
    }

    /// Whether a structure has such a member. `false` also if there is no such structure.
    pub fn has_member(&self, type_name: &str, path: &str) -> bool {
        self.find_struct(type_name).is_some_and(|(btf, id)| btf.member(id, path).is_some())
    }

    /// Whether there is such a type.
    pub fn has_type(&self, type_name: &str) -> bool {
        self.btf.find_type(type_name).is_some() || self.find_struct(type_name).is_some()
    }

    /// The value of an enumerator, whatever enum it is in. Looks through all enums of the kernel:
    /// keep the result, or name the enum.
    pub fn enum_value(&self, enumerator: &str) -> Result<i64> {
        let known = self.enumerators.read().unwrap_or_else(PoisonError::into_inner).get(enumerator).copied();
        let value = known.unwrap_or_else(|| {
            let value = self.btf.enumerator(enumerator);
            let mut enumerators = self.enumerators.write().unwrap_or_else(PoisonError::into_inner);
            enumerators.insert(enumerator.to_owned(), value);
            value
        });
        value.ok_or_else(|| Error::MissingEnumerator {
            release: self.release.clone(),
            name: enumerator.to_owned(),
        })
    }

    /// The value of an enumerator of one enum: `enum_value_in("pageflags", "PG_dirty")`.
    pub fn enum_value_in(&self, enum_name: &str, enumerator: &str) -> Result<i64> {
        let value = self.btf.enumerator_in(enum_name, enumerator);
        #[cfg(fuzzing)]
        let value = value.or_else(|| Some(crate::fuzz::enumerator(enumerator)));
        value.ok_or_else(|| Error::MissingEnumerator {
            release: self.release.clone(),
            name: format!("{enum_name}::{enumerator}"),
        })
    }

    fn layout<T: KernelType>(&self) -> Result<Arc<Layout>> {
        let key = RustTypeId::of::<T>();
        let layouts = self.layouts.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(layout) = layouts.get(&key) {
            return Ok(layout.clone());
        }
        drop(layouts);
        #[cfg(fuzzing)]
        if self.find_struct(T::NAME).is_none() {
            let mut layouts = self.layouts.write().unwrap_or_else(PoisonError::into_inner);
            return Ok(layouts
                .entry(key)
                .or_insert_with(|| Arc::new(crate::fuzz::layout(T::FIELDS)))
                .clone());
        }
        let (btf, id) = self.find_struct(T::NAME).ok_or_else(|| self.missing_type(T::NAME))?;
        let binder = Binder { btf, release: &self.release, type_name: T::NAME };
        let layout = Arc::new(binder.bind(id, T::FIELDS, "")?);
        let mut layouts = self.layouts.write().unwrap_or_else(PoisonError::into_inner);
        Ok(layouts.entry(key).or_insert(layout).clone())
    }

    /// Binds a declaration now, so that a kernel that it does not fit is found out early. The
    /// binding is kept.
    pub fn check<T: KernelType>(&self) -> Result<()> {
        self.layout::<T>().map(drop)
    }

    /// Reads a structure: one copy of the part that holds the declared fields.
    pub fn read<T: KernelType>(&self, addr: u64) -> Result<T> {
        let layout = self.layout::<T>()?;
        let at = addr.wrapping_add(layout.start);
        let len = (layout.end - layout.start) as usize;
        let decode = |bytes: &[u8]| T::decode(&Decoder { layout: &layout, bytes, start: layout.start, addr });
        let mut small = [0; 512];
        if let Some(bytes) = small.get_mut(..len) {
            self.read_as(at, bytes, Some(T::NAME))?;
            return Ok(decode(bytes));
        }
        if len > MAX_READ {
            return Err(Error::TooLong { addr: at, len, max: MAX_READ });
        }
        let mut bytes = vec![0; len];
        self.read_as(at, &mut bytes, Some(T::NAME))?;
        Ok(decode(&bytes))
    }

    pub(crate) fn field_offset<T: KernelType>(&self, field: &str) -> Result<u64> {
        let layout = self.layout::<T>()?;
        T::FIELDS
            .iter()
            .position(|spec| spec.name == field)
            .and_then(|index| layout.offset(index))
            .ok_or_else(|| Error::MissingMember {
                release: self.release.clone(),
                type_name: T::NAME.to_owned(),
                paths: vec![field.to_owned()],
            })
    }

    /// The address of the structure whose field (by its Rust name) is at `member_addr`:
    /// `kernel.container_of::<TaskStruct>(node, "tasks")`.
    pub fn container_of<T: KernelType>(&self, member_addr: u64, field: &str) -> Result<u64> {
        Ok(member_addr.wrapping_sub(self.field_offset::<T>(field)?))
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("release", &self.release)
            .field("memory", &self.memory)
            .field("symbols", &self.symbols)
            .field("btf", &self.btf)
            .finish_non_exhaustive()
    }
}

fn offset_in(btf: &Btf, release: &str, type_name: &str, path: &str) -> Result<Member> {
    let id = btf
        .find_struct(type_name)
        .ok_or_else(|| Error::MissingType { release: release.to_owned(), name: type_name.to_owned() })?;
    btf.member(id, path).ok_or_else(|| Error::MissingMember {
        release: release.to_owned(),
        type_name: type_name.to_owned(),
        paths: vec![path.to_owned()],
    })
}

fn read_u64(memory: &KernelMemory, addr: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    memory.read_virt(addr, &mut bytes).map_err(|source| Error::Unreadable {
        addr,
        len: 8,
        what: None,
        source,
    })?;
    Ok(u64::from_le_bytes(bytes))
}

fn read_kallsyms(memory: &KernelMemory) -> Result<Kallsyms, String> {
    let info = memory.core().info();
    let symbol = |name: &str| {
        info.symbol(name).map_err(|error| format!("{error} (vmcoreinfo has it since Linux 6.0)"))
    };
    let read = |addr: u64, len: usize| {
        let mut bytes = vec![0; len];
        memory.read_virt(addr, &mut bytes).map_err(|error| error.to_string())?;
        Ok::<_, String>(bytes)
    };
    let names = symbol("kallsyms_names")?;
    let token_table = symbol("kallsyms_token_table")?;
    let token_index = symbol("kallsyms_token_index")?;
    let offsets = symbol("kallsyms_offsets")?;
    let (base_at, count_at) = (symbol("kallsyms_relative_base")?, symbol("kallsyms_num_syms")?);
    let base = read(base_at, 8)?;
    let base = u64::from_le_bytes(base.try_into().expect("8 bytes"));
    let count = read(count_at, 4)?;
    let count = u32::from_le_bytes(count.try_into().expect("4 bytes"));
    // The tables' order differs over the versions, and their lengths are written nowhere: a table
    // reaches at most to the next one.
    let tables = [names, token_table, token_index, offsets, base_at, count_at];
    let len = |table: u64, min: u64| {
        let next = tables.iter().filter(|other| **other > table).min();
        next.map_or(min, |next| (next - table).min(MAX_KALLSYMS)) as usize
    };
    // Before room is made for so many.
    if u64::from(count) * 4 > len(offsets, MAX_KALLSYMS) as u64 {
        return Err(format!("{count} symbols, which are more than there is room for"));
    }
    let words = |bytes: Vec<u8>| -> Vec<u16> {
        bytes.chunks_exact(2).map(|word| u16::from_le_bytes([word[0], word[1]])).collect()
    };
    let addresses = read(offsets, count as usize * 4)?
        .chunks_exact(4)
        .map(|word| i32::from_le_bytes(word.try_into().expect("4 bytes")))
        .map(|offset| match offset {
            // CONFIG_KALLSYMS_ABSOLUTE_PERCPU, which x86-64 with SMP has up to 6.14: offsets into
            // the per-CPU area.
            0.. => offset as u64,
            _ => base.wrapping_sub(1).wrapping_sub(offset as i64 as u64),
        })
        .collect();
    Kallsyms::new(Tables {
        names: read(names, len(names, u64::from(count) * 32))?,
        // 256 tokens, of which each has at most a name's length; in truth all have 1 KiB together.
        token_table: read(token_table, len(token_table, 16 << 10).min(64 << 10))?,
        token_index: words(read(token_index, 512)?),
        addresses,
    })
}

fn read_btf(memory: &KernelMemory, symbols: &Kallsyms, release: &str) -> Result<Btf> {
    let no_btf = |why: String| Error::NoBtf { release: release.to_owned(), why };
    let (Some(start), Some(end)) = (symbols.lookup("__start_BTF"), symbols.lookup("__stop_BTF")) else {
        return Err(no_btf("there are no symbols __start_BTF and __stop_BTF".into()));
    };
    let len = end
        .checked_sub(start)
        .filter(|len| *len > 0 && *len <= MAX_BTF)
        .ok_or_else(|| no_btf(format!("it lies from {start:#x} to {end:#x}")))?;
    if let Some(data) = memory.map_virt(start, len as usize).ok().and_then(|map| map.to_static()) {
        return Btf::parse_mapped(data);
    }
    let mut data = vec![0; len as usize];
    memory.read_virt(start, &mut data).map_err(|error| no_btf(error.to_string()))?;
    Btf::parse(data, None)
}
