//! The kernel log: the lockless ring buffer of kernel/printk/printk_ringbuffer.{h,c} (5.10 and later; 6.1 and 6.12 read here).
//!
//! Three rings: descriptors (id and state, and where the text is), one `printk_info` per descriptor, and the text. A writer that was
//! interrupted leaves a reserved descriptor; it is passed over.

use ktypes::{Kernel, KernelType};
use snapshot::LogRecord;

use crate::Result;
use crate::error::corrupt;

#[derive(KernelType)]
#[kernel("printk_ringbuffer")]
struct RingBuffer {
    #[kernel("desc_ring.count_bits")]
    count_bits: u32,
    #[kernel("desc_ring.descs")]
    descs: u64,
    #[kernel("desc_ring.infos")]
    infos: u64,
    #[kernel("desc_ring.head_id")]
    head_id: u64,
    #[kernel("desc_ring.tail_id")]
    tail_id: u64,
    #[kernel("text_data_ring.size_bits")]
    size_bits: u32,
    #[kernel("text_data_ring.data")]
    data: u64,
}

#[derive(KernelType)]
#[kernel("prb_desc")]
struct Descriptor {
    state_var: u64,
    #[kernel("text_blk_lpos.begin")]
    begin: u64,
    #[kernel("text_blk_lpos.next")]
    next: u64,
}

#[derive(KernelType)]
#[kernel("printk_info")]
struct Info {
    seq: u64,
    ts_nsec: u64,
    text_len: u16,
    level: u8,
}

/// The state is in the two top bits of `state_var`, the id in the others (DESC_FLAGS_SHIFT).
const STATE_SHIFT: u32 = 62;
const ID_MASK: u64 = (1 << STATE_SHIFT) - 1;
/// `enum desc_state`: written, may still be extended; written for good.
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;

/// log_buf_len= allows up to 2 GiB of text (LOG_BUF_LEN_MAX), at 32 bytes a descriptor; nobody sets more than 16 MiB.
const MAX_COUNT_BITS: u32 = 20;
const MAX_SIZE_BITS: u32 = 31;

/// Each data block begins with the descriptor's id (`struct prb_data_block`).
const BLOCK_HEADER: u64 = 8;

pub(super) fn read(kernel: &Kernel) -> Result<Vec<LogRecord>> {
    let at = kernel.read_u64(kernel.symbol("prb")?)?;
    let ring: RingBuffer = kernel.read(at)?;
    if ring.count_bits > MAX_COUNT_BITS || ring.size_bits > MAX_SIZE_BITS {
        return Err(corrupt(
            "printk_ringbuffer",
            at,
            format!("2^{} records in 2^{} bytes", ring.count_bits, ring.size_bits),
        ));
    }
    let count = 1u64 << ring.count_bits;
    let (descriptor_size, info_size) = (kernel.size_of("prb_desc")?, kernel.size_of("printk_info")?);
    let mut records = Vec::new();
    let (mut id, head) = (ring.tail_id & ID_MASK, ring.head_id & ID_MASK);
    for _ in 0..count {
        let index = id % count;
        let descriptor: Descriptor = kernel.read(ring.descs.wrapping_add(index * descriptor_size))?;
        let state = descriptor.state_var >> STATE_SHIFT;
        if descriptor.state_var & ID_MASK == id && (state == COMMITTED || state == FINALIZED) {
            let info: Info = kernel.read(ring.infos.wrapping_add(index * info_size))?;
            if let Some((offset, room)) = text_extent(&descriptor, ring.size_bits) {
                let len = u64::from(info.text_len).min(room);
                if let Ok(text) = kernel.read_bytes(ring.data.wrapping_add(offset), len as usize) {
                    records.push(LogRecord {
                        seq: info.seq,
                        ts_ns: info.ts_nsec,
                        level: info.level,
                        text: text.into(),
                    });
                }
            }
        }
        if id == head {
            break;
        }
        id = (id + 1) & ID_MASK;
    }
    Ok(records)
}

/// Where a descriptor's text is in the data ring: offset and room, bytes. `None` when the text was lost or the positions make no sense.
fn text_extent(descriptor: &Descriptor, size_bits: u32) -> Option<(u64, u64)> {
    /// Both positions of a record that never had text (NO_LPOS, EMPTY_LINE_LPOS).
    const EMPTY_LINE: u64 = 3;
    let (begin, next) = (descriptor.begin, descriptor.next);
    if (begin, next) == (EMPTY_LINE, EMPTY_LINE) {
        return Some((0, 0));
    }
    let aligned = (begin | next).is_multiple_of(BLOCK_HEADER);
    let (index, wrap) = (|lpos: u64| lpos & ((1 << size_bits) - 1), |lpos: u64| lpos >> size_bits);
    let (start, end) = if wrap(begin) == wrap(next) {
        (index(begin), index(next))
    } else if wrap(begin.wrapping_add(1 << size_bits)) == wrap(next) {
        // A block is never torn: if it does not fit before the end, it lies at the beginning.
        (0, index(next))
    } else {
        return None;
    };
    let room = end.checked_sub(start)?.checked_sub(BLOCK_HEADER)?;
    aligned.then_some((start + BLOCK_HEADER, room))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(begin: u64, next: u64) -> Option<(u64, u64)> {
        text_extent(&Descriptor { state_var: 0, begin, next }, 12)
    }

    #[test]
    fn text_extents() {
        assert_eq!(extent(0x1010, 0x1030), Some((0x18, 0x18)));
        // Wrapped: begins behind the last block, lies at the start of the ring.
        assert_eq!(extent(0x1ff0, 0x2020), Some((8, 0x18)));
        // The logical positions themselves overflow.
        assert_eq!(extent(0xffff_ffff_ffff_fff0, 0x20), Some((8, 0x18)));
        assert_eq!(extent(3, 3), Some((0, 0)));
        assert_eq!(extent(1, 1), None);
        assert_eq!(extent(0x1030, 0x1010), None);
        assert_eq!(extent(0x1010, 0x4010), None);
        assert_eq!(extent(0x1010, 0x1014), None);
        assert_eq!(extent(0x1010, 0x1010), None);
    }
}
