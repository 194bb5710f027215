//! Pages of a swap area in compressed memory, out of the dead kernel's.

use snapshot::{PAGE_SIZE, PhysMem, PhysMemError, Zram, ZramSlot};

use crate::lzo;

const PAGE: usize = PAGE_SIZE as usize;

/// Whether pages that were compressed like that can be read.
pub(crate) fn is_known(algorithm: &str) -> bool {
    matches!(algorithm, "lzo" | "lzo-rle" | "lz4" | "lz4hc" | "zstd")
}

/// The page of a slot.
pub(crate) fn page(zram: &Zram, slot: u32, memory: &dyn PhysMem) -> Result<[u8; PAGE], PhysMemError> {
    let mut page = [0; PAGE];
    let absent = |addr| PhysMemError::NotPresent { addr, len: PAGE_SIZE };
    match zram.slots.get(&slot).ok_or_else(|| absent(u64::from(slot) * PAGE_SIZE))? {
        ZramSlot::Same(word) => {
            page.as_chunks_mut::<8>().0.iter_mut().for_each(|chunk| *chunk = word.to_le_bytes());
        }
        ZramSlot::Stored { addr, next, size } => {
            let mut stored = vec![0; usize::from(*size)];
            let in_first = (PAGE_SIZE - addr % PAGE_SIZE).min(u64::from(*size)) as usize;
            // One that ends with its header goes on in the next page altogether.
            let in_first = if addr % PAGE_SIZE == 0 && *next != 0 { 0 } else { in_first };
            let (first, rest) = stored.split_at_mut(in_first);
            if !first.is_empty() {
                memory.read(*addr, first)?;
            }
            if !rest.is_empty() {
                memory.read(*next, rest)?;
            }
            let len = if stored.len() == PAGE {
                page.copy_from_slice(&stored);
                Some(PAGE)
            } else {
                decompress(&zram.algorithm, &stored, &mut page)
            };
            if len != Some(PAGE) {
                return Err(absent(*addr));
            }
        }
    }
    Ok(page)
}

/// How many bytes came out; `None` if it is damaged.
fn decompress(algorithm: &str, stored: &[u8], page: &mut [u8]) -> Option<usize> {
    match algorithm {
        "lzo" | "lzo-rle" => lzo::decompress(stored, page),
        "lz4" | "lz4hc" => lz4_flex::block::decompress_into(stored, page).ok(),
        "zstd" => zstd::bulk::decompress_to_buffer(stored, page).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::{PhysMap, PhysRange};

    struct Mem(Vec<u8>, [PhysRange; 1]);

    impl PhysMem for Mem {
        fn ranges(&self) -> &[PhysRange] {
            &self.1
        }
        fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
            let absent = PhysMemError::NotPresent { addr, len: len as u64 };
            self.0.get(addr as usize..addr as usize + len).map(PhysMap::borrowed).ok_or(absent)
        }
    }

    /// A page that can be compressed.
    fn text() -> [u8; PAGE] {
        std::array::from_fn(|n| (n / 100 + n % 7) as u8)
    }

    fn read(algorithm: &str, bytes: Vec<u8>, slot: ZramSlot) -> Result<[u8; PAGE], PhysMemError> {
        let len = bytes.len() as u64;
        let zram = Zram { algorithm: algorithm.into(), slots: [(3, slot)].into() };
        page(&zram, 3, &Mem(bytes, [PhysRange { start: 0, len }]))
    }

    #[test]
    fn pages_are_decompressed_also_where_they_go_on_elsewhere() {
        for (algorithm, stored) in
            [("lz4", lz4_flex::block::compress(&text())), ("zstd", zstd::bulk::compress(&text(), 3).unwrap())]
        {
            let size = stored.len() as u16;
            let mut memory = vec![0; 3 * PAGE];
            memory[8..8 + stored.len()].copy_from_slice(&stored);
            let whole = ZramSlot::Stored { addr: 8, next: 0, size };
            assert_eq!(read(algorithm, memory, whole).unwrap(), text(), "{algorithm}");
            for in_first in [0, 16] {
                let mut memory = vec![0; 3 * PAGE];
                memory[PAGE - in_first..PAGE].copy_from_slice(&stored[..in_first]);
                let rest = &stored[in_first..];
                memory[2 * PAGE..][..rest.len()].copy_from_slice(rest);
                let addr = (PAGE - in_first) as u64;
                let split = ZramSlot::Stored { addr, next: 2 * PAGE_SIZE, size };
                assert_eq!(read(algorithm, memory, split).unwrap(), text(), "{algorithm}, {in_first}");
            }
            let mut memory = vec![0; 2 * PAGE];
            memory[..8].fill(0xff);
            assert!(read(algorithm, memory, ZramSlot::Stored { addr: 0, next: 0, size }).is_err(), "damaged");
        }
    }

    #[test]
    fn pages_of_one_word_and_such_that_are_not_compressed_are_read() {
        let word = u64::from_le_bytes(*b"the same");
        let page = read("lz4", Vec::new(), ZramSlot::Same(word)).unwrap();
        assert!(page.as_chunks::<8>().0.iter().all(|chunk| chunk == b"the same"));
        let plain = ZramSlot::Stored { addr: 0, next: 0, size: PAGE as u16 };
        assert_eq!(read("lz4", text().to_vec(), plain).unwrap(), text());
    }
}
