//! Loaded modules: their symbols and types (kernel/module/kallsyms.c, kernel/bpf/btf.c; 6.1 to 6.12).
//!
//! Read when first asked for. What is damaged here costs the names of modules, nothing else: no
//! error comes out.

use std::sync::{Arc, OnceLock};

use crate::btf::{NameTable, hash};
use crate::{Btf, Kernel, KernelType};

/// More modules than any machine has loaded.
const MAX_MODULES: usize = 4096;
/// Symbols of one module: the largest (GPU drivers) have some 30,000.
const MAX_SYMBOLS: u32 = 1 << 20;
/// The longest name that is kept.
const MAX_NAME: usize = 512;
/// `Elf64_Sym`.
const ELF_SYM_SIZE: usize = 24;

/// Symbols of all modules.
#[derive(Default)]
pub(crate) struct Modules {
    modules: Vec<Module>,
    names: String,
    /// By address.
    symbols: Vec<Symbol>,
    /// Indices of `symbols`, plus one, by name.
    by_name: OnceLock<NameTable>,
}

struct Module {
    name: String,
    /// Start and end of each piece of its memory.
    memory: Vec<(u64, u64)>,
}

struct Symbol {
    addr: u64,
    name: std::ops::Range<u32>,
    kind: u8,
}

#[derive(KernelType)]
#[kernel("module")]
struct RawModule {
    state: u32,
    name: [u8; 56],
    #[kernel("core_kallsyms.symtab")]
    symtab: u64,
    #[kernel("core_kallsyms.num_symtab")]
    num_symtab: u32,
    #[kernel("core_kallsyms.strtab")]
    strtab: u64,
    #[kernel("core_kallsyms.typetab")]
    typetab: u64,
    /// One piece of memory up to 6.3, several since 6.4.
    #[kernel("core_layout", optional, nested)]
    core_layout: Option<ModuleLayout>,
    #[kernel("mem[0]", optional, address)]
    mem: Option<u64>,
    #[kernel("list", address)]
    #[allow(dead_code, reason = "for container_of")]
    list: u64,
}

#[derive(KernelType)]
#[kernel("module_layout")]
struct ModuleLayout {
    base: u64,
    size: u32,
}

#[derive(KernelType)]
#[kernel("module_memory")]
struct ModuleMemory {
    base: u64,
    size: u32,
}

/// MODULE_STATE_LIVE.
const LIVE: u32 = 0;
/// MOD_TEXT to MOD_RO_AFTER_INIT of `enum mod_mem_type`: what stays after initialisation.
const CORE_MEMORY: u64 = 4;

impl Modules {
    pub fn read(kernel: &Kernel) -> Modules {
        let mut all = Modules::default();
        // Without these, nothing below may ask for a name: it would end up here again.
        let Some(head) = kernel.own_symbol("modules") else { return all };
        if kernel.btf().find_struct("module").is_none() {
            return all;
        }
        for node in kernel.list_head(head, MAX_MODULES) {
            let Ok(addr) = node.and_then(|node| kernel.container_of::<RawModule>(node, "list")) else {
                break;
            };
            let Ok(raw) = kernel.read::<RawModule>(addr) else { continue };
            if raw.state == LIVE {
                all.add(kernel, &raw);
            }
        }
        all.symbols.sort_by_key(|symbol| symbol.addr);
        all
    }

    fn add(&mut self, kernel: &Kernel, raw: &RawModule) {
        let mut memory = Vec::new();
        if let Some(layout) = &raw.core_layout {
            memory.push((layout.base, layout.base.saturating_add(layout.size.into())));
        }
        if let (Some(mem), Some(id)) = (raw.mem, kernel.btf().find_struct("module_memory")) {
            let size = kernel.btf().size(id).unwrap_or(0);
            for i in 0..CORE_MEMORY {
                if let Ok(piece) = kernel.read::<ModuleMemory>(mem.wrapping_add(i * size)) {
                    memory.push((piece.base, piece.base.saturating_add(piece.size.into())));
                }
            }
        }
        let name = raw.name.split(|byte| *byte == 0).next().unwrap_or_default();
        self.modules.push(Module { name: String::from_utf8_lossy(name).into_owned(), memory });

        let count = raw.num_symtab.min(MAX_SYMBOLS) as usize;
        let Ok(symtab) = kernel.read_bytes(raw.symtab, count * ELF_SYM_SIZE) else { return };
        let symbols: Vec<ElfSym> = symtab.chunks_exact(ELF_SYM_SIZE).filter_map(ElfSym::parse).collect();
        // The length of the string table is written nowhere.
        let end = symbols.iter().map(|symbol| symbol.name as usize).max().unwrap_or(0);
        let strtab = read_up_to(kernel, raw.strtab, end.min(16 << 20) + MAX_NAME);
        let kinds = read_up_to(kernel, raw.typetab, count);
        for (index, symbol) in symbols.iter().enumerate() {
            let tail = strtab.get(symbol.name as usize..).unwrap_or_default();
            let text = tail.split(|byte| *byte == 0).next().unwrap_or_default();
            // Undefined symbols belong to others; names in the middle of nowhere to nobody.
            if symbol.section == 0 || text.is_empty() || text.len() >= MAX_NAME {
                continue;
            }
            let start = self.names.len() as u32;
            match std::str::from_utf8(text) {
                Ok(text) => self.names.push_str(text),
                Err(_) => self.names.push_str(&String::from_utf8_lossy(text)),
            }
            self.symbols.push(Symbol {
                addr: symbol.value,
                name: start..self.names.len() as u32,
                kind: kinds.get(index).copied().unwrap_or(b'?'),
            });
        }
    }

    /// Their names.
    pub fn loaded(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().map(|module| module.name.as_str())
    }

    fn name(&self, symbol: &Symbol) -> &str {
        &self.names[symbol.name.start as usize..symbol.name.end as usize]
    }

    fn at(&self, addr: u64) -> &[Symbol] {
        let start = self.symbols.partition_point(|symbol| symbol.addr < addr);
        let end = self.symbols.partition_point(|symbol| symbol.addr <= addr);
        &self.symbols[start..end]
    }

    /// Of several symbols of that name, the one with the lowest address.
    pub fn lookup(&self, name: &str) -> Option<u64> {
        let by_name = self.by_name.get_or_init(|| {
            let mut by_name = NameTable::with_capacity(self.symbols.len());
            for (index, symbol) in self.symbols.iter().enumerate() {
                by_name.insert(hash(self.name(symbol).as_bytes()), index as u32 + 1);
            }
            by_name
        });
        let symbol = |index: u32| &self.symbols[index as usize - 1];
        let index = by_name.find(hash(name.as_bytes()), |index| self.name(symbol(index)) == name)?;
        Some(symbol(index).addr)
    }

    /// The same order of preference as in the kernel's own table.
    pub fn best_at(&self, addr: u64) -> Option<&str> {
        self.at(addr)
            .iter()
            .min_by_key(|symbol| (!symbol.kind.is_ascii_uppercase(), self.name(symbol).starts_with("__")))
            .map(|symbol| self.name(symbol))
    }

    pub fn names_at(&self, addr: u64) -> impl Iterator<Item = &str> {
        self.at(addr).iter().map(|symbol| self.name(symbol))
    }

    /// The module whose memory holds an address, and the piece of it.
    fn find(&self, addr: u64) -> Option<(&Module, (u64, u64))> {
        self.modules.iter().find_map(|module| {
            let piece = module.memory.iter().find(|(start, end)| (*start..*end).contains(&addr))?;
            Some((module, *piece))
        })
    }

    pub fn symbolize(&self, addr: u64) -> Option<(&str, u64)> {
        let (_, (start, _)) = self.find(addr)?;
        let after = self.symbols.partition_point(|symbol| symbol.addr <= addr);
        let base = self.symbols[after.checked_sub(1)?].addr;
        if base < start {
            return None;
        }
        Some((self.best_at(base)?, addr - base))
    }

    pub fn module_of(&self, addr: u64) -> Option<&str> {
        self.find(addr).map(|(module, _)| module.name.as_str())
    }
}

struct ElfSym {
    name: u32,
    section: u16,
    value: u64,
}

impl ElfSym {
    fn parse(bytes: &[u8]) -> Option<ElfSym> {
        Some(ElfSym {
            name: u32::from_le_bytes(*bytes.first_chunk()?),
            section: u16::from_le_bytes(*bytes.get(6..)?.first_chunk()?),
            value: u64::from_le_bytes(*bytes.get(8..)?.first_chunk()?),
        })
    }
}

/// Up to `len` bytes: as many as there are before the first page that cannot be read.
fn read_up_to(kernel: &Kernel, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let Some(at) = addr.checked_add(bytes.len() as u64) else { break };
        let in_page = (vmcore::PAGE_SIZE - at % vmcore::PAGE_SIZE) as usize;
        match kernel.read_bytes(at, in_page.min(len - bytes.len())) {
            Ok(page) => bytes.extend(page),
            Err(_) => break,
        }
    }
    bytes
}

#[derive(KernelType)]
#[kernel("btf_module")]
struct BtfModule {
    btf: u64,
    #[kernel("list", address)]
    #[allow(dead_code, reason = "for container_of")]
    list: u64,
}

#[derive(KernelType)]
#[kernel("btf")]
struct KernelBtf {
    data: u64,
    data_size: u32,
}

/// BTF of each module that has one.
pub(crate) fn btfs(kernel: &Kernel, base: &Arc<Btf>) -> Vec<Btf> {
    let Some(head) = kernel.own_symbol("btf_modules") else { return Vec::new() };
    if ["btf_module", "btf"].iter().any(|name| base.find_struct(name).is_none()) {
        return Vec::new();
    }
    kernel
        .list_head(head, MAX_MODULES)
        .map_while(Result::ok)
        .filter_map(|node| {
            let module = kernel.container_of::<BtfModule>(node, "list").ok()?;
            let btf = kernel.read::<BtfModule>(module).ok()?.btf;
            let btf: KernelBtf = kernel.read(btf).ok()?;
            let data = kernel.read_bytes(btf.data, btf.data_size as usize).ok()?;
            Btf::parse(data, Some(base.clone())).ok()
        })
        .collect()
}
