//! The ELF side of a core: headers and notes, with every bound checked.

use object::LittleEndian;
use object::elf::{self, FileHeader64, PT_LOAD, PT_NOTE, ProgramHeader64};
use object::pod;
use object::read::elf::NoteIterator;

use crate::PhysRange;
use crate::core::PrStatus;

/// One PT_LOAD: where a range of physical memory lies in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First physical address.
    pub phys: u64,
    /// Number of bytes.
    pub len: u64,
    /// Where the first byte is in the file.
    pub file_offset: u64,
}

/// What the program headers say.
#[derive(Debug, Default)]
pub(crate) struct Headers {
    /// PT_LOADs as they stand: unsorted, possibly overlapping (the kernel's text has a PT_LOAD of
    /// its own besides the RAM that holds it).
    pub loads: Vec<Segment>,
    /// File offset and size of each PT_NOTE.
    pub notes: Vec<(u64, u64)>,
}

/// Where the program headers are: how much of the file's beginning [`headers`] needs.
pub(crate) fn headers_end(head: &[u8]) -> Result<u64, String> {
    let header = file_header(head)?;
    let endian = LittleEndian;
    let count = match header.e_phnum.get(endian) {
        // More than that many: the number is in section 0. No machine has so many ranges of RAM.
        elf::PN_XNUM => return Err("more than 65534 program headers".into()),
        count => u64::from(count),
    };
    let size = u64::from(header.e_phentsize.get(endian));
    if size != size_of::<ProgramHeader64<LittleEndian>>() as u64 {
        return Err(format!("program headers of {size} bytes"));
    }
    header
        .e_phoff
        .get(endian)
        .checked_add(count * size)
        .filter(|end| *end <= 64 << 20)
        .ok_or_else(|| "program headers far outside".into())
}

/// Parses the headers out of the file's beginning.
pub(crate) fn headers(head: &[u8]) -> Result<Headers, String> {
    let header = file_header(head)?;
    let endian = LittleEndian;
    headers_end(head)?;
    let table = usize::try_from(header.e_phoff.get(endian))
        .ok()
        .and_then(|offset| head.get(offset..))
        .ok_or("program headers outside of the file")?;
    let count = usize::from(header.e_phnum.get(endian));
    let (table, _) = pod::slice_from_bytes::<ProgramHeader64<LittleEndian>>(table, count)
        .map_err(|()| "program headers outside of the file")?;
    let mut headers = Headers::default();
    for entry in table {
        let (offset, len) = (entry.p_offset.get(endian), entry.p_filesz.get(endian));
        match entry.p_type.get(endian) {
            PT_NOTE => headers.notes.push((offset, len)),
            PT_LOAD if len > 0 => {
                let phys = entry.p_paddr.get(endian);
                if phys.checked_add(len).is_none() || offset.checked_add(len).is_none() {
                    return Err(format!("a PT_LOAD of {len:#x} bytes at {phys:#x}"));
                }
                headers.loads.push(Segment { phys, len, file_offset: offset });
            }
            _ => {}
        }
    }
    Ok(headers)
}

fn file_header(head: &[u8]) -> Result<&FileHeader64<LittleEndian>, String> {
    let (header, _) =
        pod::from_bytes::<FileHeader64<LittleEndian>>(head).map_err(|()| "shorter than an ELF header")?;
    let ident = &header.e_ident;
    if ident.magic != elf::ELFMAG {
        return Err("no ELF magic".into());
    }
    if ident.class != elf::ELFCLASS64 || ident.data != elf::ELFDATA2LSB {
        return Err("not 64-bit little-endian".into());
    }
    let endian = LittleEndian;
    if header.e_type.get(endian) != elf::ET_CORE {
        return Err("an ELF file, but not a core".into());
    }
    if header.e_machine.get(endian) != elf::EM_X86_64 {
        return Err(format!("of machine type {}", header.e_machine.get(endian)));
    }
    Ok(header)
}

/// What the notes hold.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    pub prstatus: Vec<PrStatus>,
    pub vmcoreinfo: Option<Vec<u8>>,
}

impl Notes {
    /// Adds what one PT_NOTE holds. Stops quietly at the first note that does not fit: the dead
    /// kernel wrote them, and what came before is still good.
    pub fn add(&mut self, bytes: &[u8]) {
        let Ok(notes) = NoteIterator::<FileHeader64<LittleEndian>>::new(LittleEndian, 4, bytes) else {
            return;
        };
        for note in notes {
            let Ok(note) = note else { return };
            let name = note.name();
            if name == b"CORE" && note.n_type(LittleEndian) == elf::NT_PRSTATUS {
                let cpu = self.prstatus.len() as u32;
                self.prstatus.extend(PrStatus::parse(cpu, note.desc()));
            } else if name == b"VMCOREINFO" {
                self.vmcoreinfo = Some(note.desc().to_vec());
            }
        }
    }
}

/// Makes segments disjoint and sorted by physical address. Where two overlap, the longer one
/// serves the bytes (they are the same).
pub(crate) fn disjoint(mut loads: Vec<Segment>) -> Vec<Segment> {
    loads.sort_by(|a, b| b.len.cmp(&a.len).then(a.phys.cmp(&b.phys)));
    let mut kept: Vec<Segment> = Vec::with_capacity(loads.len());
    for load in loads {
        // Cut what is already there out of `load`; the pieces left over are kept.
        let mut at = load.phys;
        let end = load.phys + load.len;
        let first = kept.partition_point(|other| other.phys + other.len <= at);
        let mut pieces = Vec::new();
        for other in kept[first..].iter().take_while(|other| other.phys < end) {
            if other.phys > at {
                pieces.push((at, other.phys));
            }
            at = other.phys + other.len;
        }
        if at < end {
            pieces.push((at, end));
        }
        for (start, end) in pieces {
            let piece = Segment {
                phys: start,
                len: end - start,
                file_offset: load.file_offset + (start - load.phys),
            };
            kept.insert(kept.partition_point(|other| other.phys < start), piece);
        }
    }
    // Neighbours in memory that are neighbours in the file are one.
    let mut merged: Vec<Segment> = Vec::with_capacity(kept.len());
    for segment in kept {
        match merged.last_mut() {
            Some(last)
                if last.phys + last.len == segment.phys
                    && last.file_offset + last.len == segment.file_offset =>
            {
                last.len += segment.len;
            }
            _ => merged.push(segment),
        }
    }
    merged
}

/// The readable ranges: one per segment, so that each can be mapped as a whole.
pub(crate) fn ranges(segments: &[Segment]) -> Vec<PhysRange> {
    segments.iter().map(|s| PhysRange { start: s.phys, len: s.len }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment(phys: u64, len: u64, file_offset: u64) -> Segment {
        Segment { phys, len, file_offset }
    }

    #[test]
    fn overlaps_are_cut_and_neighbours_merged() {
        let text = segment(0x1000, 0x2000, 0x9_0000);
        let ram = segment(0, 0x8000, 0x1000);
        let more = segment(0x8000, 0x1000, 0x9000);
        assert_eq!(disjoint(vec![text, ram, more]), vec![segment(0, 0x9000, 0x1000)]);
        let sticking_out = segment(0x7000, 0x4000, 0x5_0000);
        assert_eq!(
            disjoint(vec![sticking_out, ram]),
            vec![segment(0, 0x8000, 0x1000), segment(0x8000, 0x3000, 0x5_1000)]
        );
        let around = vec![segment(0, 10, 0), segment(20, 10, 100), segment(5, 20, 1000)];
        assert_eq!(disjoint(around), vec![segment(0, 5, 0), segment(5, 20, 1000), segment(25, 5, 105)]);
    }

    proptest! {
        #[test]
        fn disjoint_covers_exactly_the_union(
            loads in proptest::collection::vec((0u64..200, 1u64..60, 0u64..1000), 0..12)
        ) {
            let loads: Vec<_> = loads.into_iter().map(|(p, l, o)| segment(p, l, o)).collect();
            let result = disjoint(loads.clone());
            for pair in result.windows(2) {
                prop_assert!(pair[0].phys + pair[0].len <= pair[1].phys);
            }
            for addr in 0..300 {
                let holds = |s: &Segment| addr >= s.phys && addr < s.phys + s.len;
                prop_assert_eq!(loads.iter().any(holds), result.iter().any(holds));
                // The byte served is one that a header promised for this address.
                if let Some(s) = result.iter().find(|s| holds(s)) {
                    let at = s.file_offset + (addr - s.phys);
                    let promised = |l: &Segment| holds(l) && l.file_offset + (addr - l.phys) == at;
                    prop_assert!(loads.iter().any(promised));
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = headers(&bytes);
            let _ = headers_end(&bytes);
            Notes::default().add(&bytes);
        }

        #[test]
        fn arbitrary_bytes_behind_a_good_ident_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..400)
        ) {
            let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0".to_vec();
            file.extend(bytes);
            let _ = headers(&file);
        }
    }
}
