//! Pseudo-terminals: the two `tty_struct` of a pair (drivers/tty/pty.c), and what is on its way between them (`tty_bufhead`,
//! include/linux/tty_buffer.h; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Pty, TtyId};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// Bytes on their way (TTYB_DEFAULT_MEM_LIMIT is 64 KiB; a buffer may go beyond it once).
const MAX_ARRIVING: usize = 256 << 10;
/// Buffers of one terminal.
const MAX_BUFFERS: usize = 4096;
/// Bits of `tty_struct.flags` (include/linux/tty.h).
const TTY_OTHER_CLOSED: u64 = 1 << 2;
const TTY_PTY_LOCK: u64 = 1 << 16;
/// UNIX98_PTY_SLAVE_MAJOR and the master's (include/uapi/linux/major.h), eight each.
const UNIX98_MAJORS: std::ops::Range<i32> = 128..144;

#[derive(KernelType)]
#[kernel("tty_struct")]
struct PtyStruct {
    link: u64,
    flags: u64,
    count: i32,
    index: i32,
    port: u64,
    driver_data: u64,
    #[kernel("ctrl.packet")]
    packet: u8,
}

#[derive(KernelType)]
#[kernel("tty_buffer")]
struct Buffer {
    next: u64,
    size: u32,
    commit: u32,
    read: u32,
    #[kernel(address)]
    data: u64,
}

#[derive(KernelType)]
#[kernel("inode")]
struct Node {
    i_mode: u16,
    i_uid: u32,
    i_gid: u32,
}

impl Autopsy<'_> {
    /// `addr`: of the `tty_struct`; `major`: of its driver. `None`: one of the older kind.
    pub(crate) fn pty(&self, addr: u64, major: i32, master: bool) -> Result<Option<Pty>> {
        let tty: PtyStruct = self.kernel.read(addr)?;
        let Ok(index) = u32::try_from(tty.index) else {
            return Err(corrupt("tty_struct", addr, format!("index {}", tty.index)));
        };
        if !UNIX98_MAJORS.contains(&major) || tty.link == 0 {
            return Ok(None);
        }
        // The master keeps the file system instance there, the slave its entry.
        let owner = (!master && tty.driver_data != 0).then(|| self.owner_of(tty.driver_data)).transpose()?;
        Ok(Some(Pty {
            index,
            master,
            other: TtyId(tty.link),
            other_closed: tty.flags & TTY_OTHER_CLOSED != 0,
            // The master counts as one who has the slave open.
            open_count: u32::try_from(tty.count).unwrap_or(0).saturating_sub(u32::from(!master)),
            packet: master && tty.packet != 0,
            locked: !master && tty.flags & TTY_PTY_LOCK != 0,
            owner,
            arriving: self.arriving(tty.port)?,
        }))
    }

    fn owner_of(&self, dentry: u64) -> Result<(u32, u32, u32)> {
        let inode = self.kernel.read_u64(dentry.wrapping_add(self.kernel.offset_of("dentry", "d_inode")?))?;
        let node: Node = self.kernel.read(inode)?;
        Ok((node.i_uid, node.i_gid, u32::from(node.i_mode) & 0o7777))
    }

    /// What has been handed to a `tty_port` and not to the line discipline.
    fn arriving(&self, port: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if port == 0 {
            return Ok(bytes);
        }
        let head = port.wrapping_add(self.kernel.offset_of("tty_port", "buf.head")?);
        let mut next = self.kernel.read_u64(head)?;
        for _ in 0..MAX_BUFFERS {
            if next == 0 {
                return Ok(bytes);
            }
            let buffer: Buffer = self.kernel.read(next)?;
            let len = buffer.commit.saturating_sub(buffer.read) as usize;
            // Where no character is marked, the marks' room is for characters, too.
            if buffer.commit > buffer.size.saturating_mul(2) || bytes.len() + len > MAX_ARRIVING {
                return Err(corrupt(
                    "tty_buffer",
                    next,
                    format!("{} of {} bytes", buffer.commit, buffer.size),
                ));
            }
            bytes.extend(self.kernel.read_bytes(buffer.data.wrapping_add(buffer.read.into()), len)?);
            next = buffer.next;
        }
        Err(corrupt("tty_bufhead", head, "has no end"))
    }
}
