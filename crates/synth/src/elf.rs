//! Writes ELF cores.

use object::LittleEndian;
use object::elf::{self, FileHeader64, Ident, NT_PRSTATUS, PT_LOAD, PT_NOTE, ProgramHeader64};
use object::endian::{U16, U32, U64};
use object::pod::bytes_of;
use vmcore::PrStatus;

const ENDIAN: LittleEndian = LittleEndian;
const PAGE: usize = 4096;

/// A core of RAM from physical address 0 on; `image` is (physical address, virtual address, size)
/// of the kernel's image, which gets a PT_LOAD of its own as in `/proc/vmcore`.
pub(crate) fn encode(ram: &[u8], info: &str, prstatus: &[PrStatus], image: (u64, u64, u64)) -> Vec<u8> {
    let mut notes = Vec::new();
    for status in prstatus {
        let mut desc = vec![0; 336];
        desc[32..36].copy_from_slice(&status.pid.to_le_bytes());
        for (i, reg) in status.regs.iter().enumerate() {
            desc[112 + i * 8..][..8].copy_from_slice(&reg.to_le_bytes());
        }
        note(&mut notes, b"CORE\0", NT_PRSTATUS, &desc);
    }
    note(&mut notes, b"VMCOREINFO\0", 0, info.as_bytes());

    let notes_at = PAGE;
    let image_at = (notes_at + notes.len()).next_multiple_of(PAGE);
    let ram_at = image_at + image.2 as usize;
    let header = |kind: u32, offset: usize, va: u64, phys: u64, len: usize| ProgramHeader64 {
        p_type: U32::new(ENDIAN, kind),
        p_flags: U32::new(ENDIAN, elf::PF_R | elf::PF_W | elf::PF_X),
        p_offset: U64::new(ENDIAN, offset as u64),
        p_vaddr: U64::new(ENDIAN, va),
        p_paddr: U64::new(ENDIAN, phys),
        p_filesz: U64::new(ENDIAN, len as u64),
        p_memsz: U64::new(ENDIAN, len as u64),
        p_align: U64::new(ENDIAN, 0),
    };
    let headers = [
        header(PT_NOTE, notes_at, 0, 0, notes.len()),
        header(PT_LOAD, image_at, image.1, image.0, image.2 as usize),
        header(PT_LOAD, ram_at, 0, 0, ram.len()),
    ];
    let file = FileHeader64 {
        e_ident: Ident {
            magic: elf::ELFMAG,
            class: elf::ELFCLASS64,
            data: elf::ELFDATA2LSB,
            version: elf::EV_CURRENT,
            os_abi: 0,
            abi_version: 0,
            padding: [0; 7],
        },
        e_type: U16::new(ENDIAN, elf::ET_CORE),
        e_machine: U16::new(ENDIAN, elf::EM_X86_64),
        e_version: U32::new(ENDIAN, 1),
        e_entry: U64::new(ENDIAN, 0),
        e_phoff: U64::new(ENDIAN, 64),
        e_shoff: U64::new(ENDIAN, 0),
        e_flags: U32::new(ENDIAN, 0),
        e_ehsize: U16::new(ENDIAN, 64),
        e_phentsize: U16::new(ENDIAN, 56),
        e_phnum: U16::new(ENDIAN, headers.len() as u16),
        e_shentsize: U16::new(ENDIAN, 0),
        e_shnum: U16::new(ENDIAN, 0),
        e_shstrndx: U16::new(ENDIAN, 0),
    };
    let mut bytes = bytes_of(&file).to_vec();
    for header in &headers {
        bytes.extend(bytes_of(header));
    }
    bytes.resize(notes_at, 0);
    bytes.extend(notes);
    bytes.resize(image_at, 0);
    bytes.extend(&ram[image.0 as usize..][..image.2 as usize]);
    bytes.extend(ram);
    bytes
}

fn note(notes: &mut Vec<u8>, name: &[u8], kind: u32, desc: &[u8]) {
    for word in [name.len() as u32, desc.len() as u32, kind] {
        notes.extend(word.to_le_bytes());
    }
    for bytes in [name, desc] {
        notes.extend(bytes);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}
