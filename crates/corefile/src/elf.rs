//! Headers of the file: ELF64 of x86-64, type ET_CORE.
//!
//! File header, program headers (PT_NOTE first), notes, then the contents of the PT_LOADs at multiples of the page size. With more than 65534
//! program headers their number stands in `sh_info` of a lone section header at the end (elf(5), PN_XNUM), as the kernel does it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use object::elf::{
    ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_X86_64, ET_CORE, EV_CURRENT, FileHeader64, PF_R, PF_W, PF_X, PN_XNUM,
    PT_LOAD, PT_NOTE, ProgramHeader64, SHT_NULL, SectionHeader64,
};
use object::pod::bytes_of;
use object::{LittleEndian as LE, U16, U32, U64};
use snapshot::{PAGE_SIZE, Prot};

const FILE_HEADER: u64 = size_of::<FileHeader64<LE>>() as u64;
const PROGRAM_HEADER: u64 = size_of::<ProgramHeader64<LE>>() as u64;
const SECTION_HEADER: u64 = size_of::<SectionHeader64<LE>>() as u64;

/// A PT_LOAD.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) prot: Prot,
    pub(crate) virt: u64,
    /// 0 where nobody asks for it.
    pub(crate) phys: u64,
    /// Bytes in memory.
    pub(crate) size: u64,
    /// Bytes of contents in the file.
    pub(crate) file_size: u64,
}

/// Where everything is in the file.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Offset of the notes.
    pub(crate) notes: u64,
    notes_len: u64,
    /// Offset of each segment's contents.
    pub(crate) offsets: Vec<u64>,
    /// Offset of the section header that has the number of program headers.
    extended: Option<u64>,
    /// The file's length.
    pub(crate) len: u64,
}

impl Layout {
    pub(crate) fn new(loads: &[Load], notes_len: u64) -> Self {
        let count = loads.len() as u64 + 1;
        let notes = FILE_HEADER + count * PROGRAM_HEADER;
        let mut at = (notes + notes_len).next_multiple_of(PAGE_SIZE);
        let mut offsets = Vec::with_capacity(loads.len());
        for load in loads {
            offsets.push(at);
            at = at.saturating_add(load.file_size);
        }
        let extended = (count >= u64::from(PN_XNUM)).then_some(at);
        let len = if extended.is_some() { at.saturating_add(SECTION_HEADER) } else { at };
        Self { notes, notes_len, offsets, extended, len }
    }

    /// Writes all but the contents of segments into an empty file, which gets its length.
    pub(crate) fn write(&self, loads: &[Load], notes: &[u8], out: &File) -> io::Result<()> {
        out.set_len(self.len)?;
        out.write_all_at(&headers(loads, self), 0)?;
        out.write_all_at(notes, self.notes)?;
        if let Some((at, section)) = self.section() {
            out.write_all_at(&section, at)?;
        }
        Ok(())
    }

    /// The lone section header, if there has to be one, and its offset.
    fn section(&self) -> Option<(u64, Vec<u8>)> {
        let header = SectionHeader64::<LE> {
            sh_name: U32::new(LE, 0),
            sh_type: U32::new(LE, SHT_NULL),
            sh_flags: U64::new(LE, 0),
            sh_addr: U64::new(LE, 0),
            sh_offset: U64::new(LE, 0),
            sh_size: U64::new(LE, 1),
            sh_link: U32::new(LE, 0),
            sh_info: U32::new(LE, self.offsets.len() as u32 + 1),
            sh_addralign: U64::new(LE, 0),
            sh_entsize: U64::new(LE, 0),
        };
        Some((self.extended?, bytes_of(&header).to_vec()))
    }
}

/// File header and program headers.
fn headers(loads: &[Load], layout: &Layout) -> Vec<u8> {
    let ident = object::elf::Ident {
        magic: ELFMAG,
        class: ELFCLASS64,
        data: ELFDATA2LSB,
        version: EV_CURRENT,
        os_abi: 0,
        abi_version: 0,
        padding: [0; 7],
    };
    let count = u16::try_from(loads.len() + 1).ok().filter(|_| layout.extended.is_none());
    let sections = u16::from(layout.extended.is_some());
    let header = FileHeader64::<LE> {
        e_ident: ident,
        e_type: U16::new(LE, ET_CORE),
        e_machine: U16::new(LE, EM_X86_64),
        e_version: U32::new(LE, EV_CURRENT.into()),
        e_entry: U64::new(LE, 0),
        e_phoff: U64::new(LE, FILE_HEADER),
        e_shoff: U64::new(LE, layout.extended.unwrap_or(0)),
        e_flags: U32::new(LE, 0),
        e_ehsize: U16::new(LE, FILE_HEADER as u16),
        e_phentsize: U16::new(LE, PROGRAM_HEADER as u16),
        e_phnum: U16::new(LE, count.unwrap_or(PN_XNUM)),
        e_shentsize: U16::new(LE, if sections > 0 { SECTION_HEADER as u16 } else { 0 }),
        e_shnum: U16::new(LE, sections),
        e_shstrndx: U16::new(LE, 0),
    };
    let mut bytes = bytes_of(&header).to_vec();
    let mut add = |kind, flags, offset, (virt, phys), file_size, size, align| {
        let header = ProgramHeader64::<LE> {
            p_type: U32::new(LE, kind),
            p_flags: U32::new(LE, flags),
            p_offset: U64::new(LE, offset),
            p_vaddr: U64::new(LE, virt),
            p_paddr: U64::new(LE, phys),
            p_filesz: U64::new(LE, file_size),
            p_memsz: U64::new(LE, size),
            p_align: U64::new(LE, align),
        };
        bytes.extend_from_slice(bytes_of(&header));
    };
    add(PT_NOTE, 0, layout.notes, (0, 0), layout.notes_len, 0, 4);
    for (load, offset) in loads.iter().zip(&layout.offsets) {
        let at = (load.virt, load.phys);
        add(PT_LOAD, flags(load.prot), *offset, at, load.file_size, load.size, PAGE_SIZE);
    }
    bytes
}

fn flags(prot: Prot) -> u32 {
    let flag = |bit, flag| if prot.contains(bit) { flag } else { 0 };
    flag(Prot::READ, PF_R) | flag(Prot::WRITE, PF_W) | flag(Prot::EXEC, PF_X)
}
