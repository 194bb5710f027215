//! Process descriptors (kernel/fork.c, kernel/pid.c in 6.1; fs/pidfs.c in 6.12).

use ktypes::KernelType;
use snapshot::{FileKind, Pid, PidFd};

use crate::Autopsy;
use crate::error::Result;
use crate::file::File;

/// PIDFD_THREAD (include/uapi/linux/pidfd.h), kept in f_flags.
const PIDFD_THREAD: u32 = 0o200;

#[derive(KernelType)]
#[kernel("pid")]
struct PidUsers {
    #[kernel("tasks[0].first")]
    thread: u64,
    #[kernel("tasks[1].first")]
    process: u64,
}

impl Autopsy<'_> {
    /// `in_inode`: the kernel keeps the `struct pid` in the inode (pidfs, since 6.9) rather than in the file.
    pub(crate) fn pidfd(&self, file: &File, in_inode: bool) -> Result<FileKind> {
        let pid = match in_inode {
            true => self.inode_private(file.f_inode)?,
            false => file.private_data,
        };
        let thread = file.f_flags & PIDFD_THREAD != 0;
        let (number, gone) = self.pid_with_fate(pid, thread)?;
        Ok(FileKind::PidFd(PidFd { pid: number, thread, gone }))
    }

    pub(crate) fn inode_private(&self, inode: u64) -> Result<u64> {
        Ok(self.kernel.read_u64(inode.wrapping_add(self.kernel.offset_of("inode", "i_private")?))?)
    }

    /// The number of a `struct pid`, and whether nobody has it any more; `thread`: as a thread, otherwise as a process.
    pub(crate) fn pid_with_fate(&self, addr: u64, thread: bool) -> Result<(Pid, bool)> {
        let users: PidUsers = self.kernel.read(addr)?;
        let user = if thread { users.thread } else { users.process };
        Ok((self.pid_number(addr)?, user == 0))
    }
}
