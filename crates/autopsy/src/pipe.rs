//! Pipes and FIFOs: `pipe_inode_info` (include/linux/pipe_fs_i.h, fs/pipe.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Bytes, Pipe, PipeBuffer, PipeId};
use vmcore::{PAGE_SHIFT, PAGE_SIZE};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// Slots of the largest pipe (fs.pipe-max-size can be raised to 2 GiB).
const MAX_SLOTS: u32 = 1 << 19;
/// pipe_buffer.flags: read packet by packet.
const PIPE_BUF_FLAG_PACKET: u32 = 0x08;

#[derive(KernelType)]
#[kernel("pipe_inode_info")]
struct PipeInode {
    head: u32,
    tail: u32,
    max_usage: u32,
    ring_size: u32,
    readers: u32,
    writers: u32,
    bufs: u64,
}

#[derive(KernelType)]
#[kernel("pipe_buffer")]
struct Buffer {
    page: u64,
    offset: u32,
    len: u32,
    flags: u32,
}

impl Autopsy<'_> {
    /// Reads a pipe into the table, unless it is there. `path`: the FIFO's name.
    pub(crate) fn pipe(&self, id: PipeId, path: Option<Bytes>) -> Result<()> {
        if self.pipes.borrow().contains_key(&id) {
            return Ok(());
        }
        let pipe: PipeInode = self.kernel.read(id.0)?;
        // Head and tail run freely; their difference is what is in the ring.
        let used = pipe.head.wrapping_sub(pipe.tail);
        if !pipe.ring_size.is_power_of_two() || pipe.ring_size > MAX_SLOTS || used > pipe.ring_size {
            let why = format!("{used} of {} slots are in use", pipe.ring_size);
            return Err(corrupt("pipe_inode_info", id.0, why));
        }
        let stride = self.kernel.size_of("pipe_buffer")?;
        let mut buffers = Vec::new();
        for i in 0..used {
            let slot = pipe.tail.wrapping_add(i) & (pipe.ring_size - 1);
            let addr = pipe.bufs.wrapping_add(u64::from(slot) * stride);
            let buffer: Buffer = self.kernel.read(addr)?;
            // splice can put larger pieces of compound pages into a pipe.
            if u64::from(buffer.offset) + u64::from(buffer.len) > 512 * PAGE_SIZE {
                return Err(corrupt("pipe_buffer", addr, format!("{}+{} bytes", buffer.offset, buffer.len)));
            }
            if buffer.len == 0 {
                continue;
            }
            let frame = self.kernel.page_to_pfn(buffer.page)? << PAGE_SHIFT;
            buffers.push(PipeBuffer {
                addr: frame + u64::from(buffer.offset),
                len: buffer.len,
                packet: buffer.flags & PIPE_BUF_FLAG_PACKET != 0,
            });
        }
        let pipe = Pipe {
            path,
            capacity: u64::from(pipe.max_usage.min(pipe.ring_size)) * PAGE_SIZE,
            buffers,
            readers: pipe.readers,
            writers: pipe.writers,
        };
        self.pipes.borrow_mut().insert(id, pipe);
        Ok(())
    }
}
