//! Headers of the file: ELF64 of x86-64, type ET_CORE.
//!
//! File header, program headers (PT_NOTE first), notes, then the contents of the PT_LOADs at multiples of the page size. With more than 65534
//! program headers their number stands in `sh_info` of a lone section header at the end (elf(5), PN_XNUM), as the kernel does it.

use object::elf::{
    ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_X86_64, ET_CORE, EV_CURRENT, FileHeader64, PF_R, PF_W, PF_X, PN_XNUM,
    PT_LOAD, PT_NOTE, ProgramHeader64, SHT_NULL, SectionHeader64,
};
use object::pod::bytes_of;
use object::{LittleEndian as LE, U16, U32, U64};
use snapshot::{PAGE_SIZE, Prot};

use crate::memory::Segment;

const FILE_HEADER: u64 = size_of::<FileHeader64<LE>>() as u64;
const PROGRAM_HEADER: u64 = size_of::<ProgramHeader64<LE>>() as u64;
const SECTION_HEADER: u64 = size_of::<SectionHeader64<LE>>() as u64;

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
    pub(crate) fn new(segments: &[Segment], notes_len: u64) -> Self {
        let count = segments.len() as u64 + 1;
        let notes = FILE_HEADER + count * PROGRAM_HEADER;
        let mut at = (notes + notes_len).next_multiple_of(PAGE_SIZE);
        let mut offsets = Vec::with_capacity(segments.len());
        for segment in segments {
            offsets.push(at);
            at = at.saturating_add(segment.file_size());
        }
        let extended = (count >= u64::from(PN_XNUM)).then_some(at);
        let len = if extended.is_some() { at.saturating_add(SECTION_HEADER) } else { at };
        Self { notes, notes_len, offsets, extended, len }
    }

    /// The lone section header, if there has to be one, and its offset.
    pub(crate) fn section(&self) -> Option<(u64, Vec<u8>)> {
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
pub(crate) fn headers(segments: &[Segment], layout: &Layout) -> Vec<u8> {
    let ident = object::elf::Ident {
        magic: ELFMAG,
        class: ELFCLASS64,
        data: ELFDATA2LSB,
        version: EV_CURRENT,
        os_abi: 0,
        abi_version: 0,
        padding: [0; 7],
    };
    let count = u16::try_from(segments.len() + 1).ok().filter(|_| layout.extended.is_none());
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
    let mut add = |kind, flags, offset, addr, file_size, size, align| {
        let header = ProgramHeader64::<LE> {
            p_type: U32::new(LE, kind),
            p_flags: U32::new(LE, flags),
            p_offset: U64::new(LE, offset),
            p_vaddr: U64::new(LE, addr),
            p_paddr: U64::new(LE, 0),
            p_filesz: U64::new(LE, file_size),
            p_memsz: U64::new(LE, size),
            p_align: U64::new(LE, align),
        };
        bytes.extend_from_slice(bytes_of(&header));
    };
    add(PT_NOTE, 0, layout.notes, 0, layout.notes_len, 0, 4);
    for (segment, offset) in segments.iter().zip(&layout.offsets) {
        let size = segment.end - segment.start;
        add(PT_LOAD, flags(segment.prot), *offset, segment.start, segment.file_size(), size, PAGE_SIZE);
    }
    bytes
}

fn flags(prot: Prot) -> u32 {
    let flag = |bit, flag| if prot.contains(bit) { flag } else { 0 };
    flag(Prot::READ, PF_R) | flag(Prot::WRITE, PF_W) | flag(Prot::EXEC, PF_X)
}
