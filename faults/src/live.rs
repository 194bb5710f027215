//! A running kernel, seen through gdb's stub: its symbols, its memory by virtual address, its code.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use ktypes::Btf;

use crate::gdb::Gdb;
use lab::{Channel, Error, Machine, Result};

const KALLSYMS: &str = "kallsyms";
const BTF: &str = "btf";
/// __START_KERNEL_map (arch/x86/include/asm/page_64_types.h).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// The longest function that is decoded, bytes.
const MAX_FUNCTION: u64 = 16 << 10;
const MAX_INSTRUCTION: usize = 15;

/// What a kernel says of itself: as good as constant while the machine does not boot again.
#[derive(Debug)]
pub struct Symbols {
    by_name: BTreeMap<String, u64>,
    by_address: BTreeMap<u64, String>,
    btf: Btf,
}

impl Symbols {
    /// Has a guest's symbols and types written to a directory.
    pub fn save(agent: &mut Channel, dir: &Path) -> Result<()> {
        for (from, name) in [("/proc/kallsyms", KALLSYMS), ("/sys/kernel/btf/vmlinux", BTF)] {
            let path = dir.join(name);
            fs::write(&path, agent.read_file(from)?).map_err(|source| Error::File { path, source })?;
        }
        Ok(())
    }

    /// Reads them from there.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(KALLSYMS);
        let text = fs::read_to_string(&path).map_err(|source| Error::File { path, source })?;
        let path = dir.join(BTF);
        let bytes = fs::read(&path).map_err(|source| Error::File { path: path.clone(), source })?;
        let btf =
            Btf::parse(bytes, None).map_err(|error| Error::Host(format!("{}: {error}", path.display())))?;
        Ok(Self::new(&text, btf))
    }

    fn new(kallsyms: &str, btf: Btf) -> Self {
        let (mut by_name, mut by_address) = (BTreeMap::new(), BTreeMap::new());
        for line in kallsyms.lines() {
            let mut words = line.split_whitespace();
            let (Some(address), Some(_), Some(name), None) =
                (words.next(), words.next(), words.next(), words.next())
            else {
                continue; // a module's
            };
            let Ok(address) = u64::from_str_radix(address, 16) else { continue };
            by_name.entry(name.to_owned()).or_insert(address);
            by_address.entry(address).or_insert_with(|| name.to_owned());
        }
        Self { by_name, by_address, btf }
    }

    /// Where something is.
    pub fn find(&self, name: &str) -> Option<u64> {
        self.by_name.get(name).copied()
    }

    /// The same, if it has to be there.
    pub fn address(&self, name: &str) -> Result<u64> {
        self.find(name).ok_or_else(|| Error::Guest(format!("its kernel has no {name}")))
    }

    /// Name and offset of what is at an address.
    pub fn name(&self, address: u64) -> String {
        match self.by_address.range(..=address).next_back() {
            Some((start, name)) => format!("{name}+{:#x}", address - start),
            None => format!("{address:#x}"),
        }
    }

    /// From a symbol's address to the next one's.
    pub fn extent(&self, address: u64) -> Option<(u64, u64)> {
        let (start, _) = self.by_address.range(..=address).next_back()?;
        let (end, _) = self.by_address.range(start + 1..).next()?;
        Some((*start, (*end).min(start + MAX_FUNCTION)))
    }

    /// The function that has the parts at an address (`vfs_read` for `vfs_read.cold`): all its parts.
    pub fn parts(&self, address: u64) -> Vec<(u64, u64)> {
        let Some((start, _)) = self.extent(address) else { return Vec::new() };
        let name = self.by_address.get(&start).map(String::as_str).unwrap_or_default();
        let whole = name.split(".cold").next().unwrap_or(name).to_owned();
        let parts = [whole.clone(), format!("{whole}.cold")];
        parts.iter().filter_map(|part| self.extent(self.find(part)?)).collect()
    }

    /// Offset and size of a structure's member.
    pub fn member(&self, structure: &str, path: &str) -> Result<(u64, u64)> {
        let member = self.btf.find_struct(structure).and_then(|id| self.btf.member(id, path));
        let size = member.as_ref().and_then(|member| self.btf.size(member.type_id));
        match (member, size) {
            (Some(member), Some(size)) => Ok((member.offset, size)),
            _ => Err(Error::Guest(format!("its kernel's {structure} has no {path}"))),
        }
    }

    /// Size of a structure.
    pub fn size(&self, structure: &str) -> Result<u64> {
        let size = self.btf.find_struct(structure).and_then(|id| self.btf.size(id));
        size.ok_or_else(|| Error::Guest(format!("its kernel has no {structure}")))
    }
}

/// A stopped machine.
#[derive(Debug)]
pub struct Live<'a> {
    /// The stub.
    pub gdb: Gdb,
    /// The kernel's symbols.
    pub symbols: &'a Symbols,
    phys_base: u64,
    page_offset: u64,
    levels: u32,
}

impl<'a> Live<'a> {
    /// Stops a machine.
    pub fn stop(machine: &Machine, symbols: &'a Symbols) -> Result<Self> {
        let gdb = Gdb::new(machine.gdb()?)?;
        let mut live = Self { gdb, symbols, phys_base: 0, page_offset: 0, levels: 4 };
        live.find_image()?;
        live.page_offset = live.variable("page_offset_base")?;
        if symbols.find("__pgtable_l5_enabled").is_some() && live.byte("__pgtable_l5_enabled")? & 1 != 0 {
            live.levels = 5;
        }
        Ok(live)
    }

    /// Where the kernel's image is in physical memory: `phys_base` itself has to be read from there. It is aligned to 2 MiB.
    fn find_image(&mut self) -> Result<()> {
        const ALIGN: u64 = 2 << 20;
        const MAX: u64 = 8 << 30;
        let banner = self.symbols.address("linux_banner")?;
        let base = self.symbols.address("phys_base")?;
        for candidate in (0..MAX).step_by(ALIGN as usize) {
            // By construction phys_base = physical - (virtual - KERNEL_MAP); it may be below zero.
            for phys_base in [candidate, candidate.wrapping_neg()] {
                self.phys_base = phys_base;
                let physical = |address: u64| (address - KERNEL_MAP).wrapping_add(phys_base);
                if physical(base) > MAX {
                    continue;
                }
                let says = self.gdb.read(physical(base), 8).map(|bytes| word(&bytes));
                if says.is_ok_and(|says| says == phys_base)
                    && self.gdb.read(physical(banner), 6).is_ok_and(|text| text == b"Linux ")
                {
                    return Ok(());
                }
            }
        }
        Err(Error::Guest("its kernel is not found in memory".into()))
    }

    /// The physical address of one of the kernel's own.
    pub fn physical(&mut self, address: u64) -> Result<u64> {
        const PRESENT: u64 = 1;
        const LARGE: u64 = 1 << 7;
        const FRAME: u64 = 0x000f_ffff_ffff_f000;
        if (KERNEL_MAP..KERNEL_MAP + (1 << 30)).contains(&address) {
            return Ok((address - KERNEL_MAP).wrapping_add(self.phys_base));
        }
        let top =
            self.symbols.find("init_top_pgt").map_or_else(|| self.symbols.address("swapper_pg_dir"), Ok)?;
        let mut table = (top - KERNEL_MAP).wrapping_add(self.phys_base);
        for level in (0..self.levels).rev() {
            let shift = 12 + 9 * level;
            let entry = word(&self.gdb.read(table + (address >> shift & 0x1ff) * 8, 8)?);
            if entry & PRESENT == 0 {
                break;
            }
            if level == 0 || level <= 2 && entry & LARGE != 0 {
                let size = 1u64 << shift;
                return Ok((entry & FRAME & !(size - 1)) + (address & (size - 1)));
            }
            table = entry & FRAME;
        }
        Err(Error::Guest(format!("its kernel has nothing at {address:#x}")))
    }

    /// Reads the kernel's memory, page by page.
    pub fn read(&mut self, address: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let at = address + bytes.len() as u64;
            let piece = (4096 - (at & 0xfff) as usize).min(length - bytes.len());
            let physical = self.physical(at)?;
            bytes.extend(self.gdb.read(physical, piece)?);
        }
        Ok(bytes)
    }

    /// Writes within one page.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<()> {
        for (byte, n) in bytes.iter().zip(0..) {
            let physical = self.physical(address + n)?;
            self.gdb.write(physical, &[*byte])?;
        }
        Ok(())
    }

    /// Eight bytes.
    pub fn word(&mut self, address: u64) -> Result<u64> {
        Ok(word(&self.read(address, 8)?))
    }

    /// A variable of eight bytes.
    pub fn variable(&mut self, name: &str) -> Result<u64> {
        self.word(self.symbols.address(name)?)
    }

    fn byte(&mut self, name: &str) -> Result<u8> {
        Ok(self.read(self.symbols.address(name)?, 1)?.first().copied().unwrap_or(0))
    }

    /// PAGE_OFFSET: where all of physical memory is mapped.
    pub fn page_offset(&self) -> u64 {
        self.page_offset
    }

    /// Whether an address is in that mapping.
    pub fn is_direct(&self, address: u64) -> bool {
        (self.page_offset..self.page_offset + (64 << 30)).contains(&address)
    }

    /// Address of a CPU's own instance of a variable.
    pub fn per_cpu(&mut self, name: &str, cpu: usize) -> Result<u64> {
        let offsets = self.symbols.address("__per_cpu_offset")?;
        let offset = self.word(offsets + cpu as u64 * 8)?;
        Ok(self.symbols.address(name)?.wrapping_add(offset))
    }

    /// The instructions between two addresses, one after the other.
    pub fn code(&mut self, start: u64, end: u64) -> Result<Vec<Instruction>> {
        let bytes = self.read(start, (end - start) as usize)?;
        let mut decoder = Decoder::with_ip(64, &bytes, start, DecoderOptions::NONE);
        let mut all = Vec::new();
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                break;
            }
            all.push(instruction);
        }
        Ok(all)
    }

    /// The instruction at an address.
    pub fn instruction(&mut self, at: u64) -> Result<Instruction> {
        let bytes = self.read(at, MAX_INSTRUCTION)?;
        Ok(Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE).decode())
    }

    /// Lets the guest go on, for good.
    pub fn leave(self) -> Result<()> {
        self.gdb.detach()
    }
}

/// Whether an instruction decides which one comes next, and by what.
pub(crate) fn is_conditional(instruction: &Instruction) -> bool {
    instruction.flow_control() == FlowControl::ConditionalBranch
}

fn word(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
