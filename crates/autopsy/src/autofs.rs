//! Mount points of automounters: `autofs_sb_info` (fs/autofs/autofs_i.h, a module; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Autofs, Mount, PipeId, Severity};

use crate::Autopsy;
use crate::error::{Result, corrupt};
use crate::fs::device;

/// AUTOFS_SBI_CATATONIC.
const CATATONIC: u32 = 1;

#[derive(KernelType)]
#[kernel("super_block")]
struct SuperBlockInfo {
    s_dev: u32,
    s_fs_info: u64,
}

#[derive(KernelType)]
#[kernel("autofs_sb_info")]
struct AutofsSbInfo {
    pipe: u64,
    oz_pgrp: u64,
    min_proto: i32,
    max_proto: i32,
    flags: u32,
    /// Clock ticks.
    exp_timeout: u64,
    #[kernel("type")]
    kind: u32,
}

impl Autopsy<'_> {
    /// All autofs file systems that are mounted among `mounts`; the pipes of their automounters go into the table.
    pub(crate) fn autofs(&self, mounts: &[Mount]) -> Vec<Autofs> {
        if !mounts.iter().any(|m| m.fs_type.as_bytes() == b"autofs") {
            return Vec::new();
        }
        self.all_autofs(mounts).unwrap_or_else(|error| {
            self.find(
                Severity::Loss,
                "autofs",
                format!("automounters' mount points cannot be read: {error}"),
            );
            Vec::new()
        })
    }

    fn all_autofs(&self, mounts: &[Mount]) -> Result<Vec<Autofs>> {
        let mut all = Vec::new();
        for addr in self.super_blocks()? {
            let sb: SuperBlockInfo = self.kernel.read(addr)?;
            let (dev_major, dev_minor) = device(sb.s_dev);
            let is_of = |m: &Mount| {
                m.fs_type.as_bytes() == b"autofs" && (m.dev_major, m.dev_minor) == (dev_major, dev_minor)
            };
            if !mounts.iter().any(is_of) {
                continue;
            }
            let info: AutofsSbInfo = self.kernel.read(sb.s_fs_info)?;
            let kind = match info.kind {
                1 => "indirect",
                2 => "direct",
                4 => "offset",
                other => {
                    return Err(corrupt("autofs_sb_info", sb.s_fs_info, format!("is of type {other}")));
                }
            };
            let pipe = match (info.flags & CATATONIC, info.pipe) {
                (0, file) if file != 0 => Some(self.pipe_of_file(file)?),
                _ => None,
            };
            all.push(Autofs {
                dev_major,
                dev_minor,
                pipe,
                pgrp: if info.oz_pgrp == 0 { 0 } else { self.pid_number(info.oz_pgrp)? },
                kind: kind.to_owned(),
                min_proto: info.min_proto,
                max_proto: info.max_proto,
                timeout: info.exp_timeout.saturating_mul(self.tick_us()?) / 1_000_000,
            });
        }
        Ok(all)
    }

    fn pipe_of_file(&self, file: u64) -> Result<PipeId> {
        let inode = self.kernel.read_u64(file.wrapping_add(self.kernel.offset_of("file", "f_inode")?))?;
        let pipe = PipeId(self.inode_facts(inode)?.pipe);
        self.pipe(pipe, None)?;
        Ok(pipe)
    }
}
