//! Files of /proc, /sys and cgroups, and of namespaces (fs/proc/internal.h, include/linux/ns_common.h, proc_ns.h, fs/nsfs.c; 6.1 and
//! 6.12).

use ktypes::KernelType;
use snapshot::{FileKind, NamespaceFile, Pid, ProcFile};

use crate::Autopsy;
use crate::error::Result;

/// File systems whose files can be opened again for the same view: they hold nothing of their own.
const VIEWS: [&[u8]; 6] = [b"proc", b"sysfs", b"cgroup", b"cgroup2", b"debugfs", b"securityfs"];

#[derive(KernelType)]
#[kernel("ns_common")]
struct NsCommon {
    ops: u64,
}

#[derive(KernelType)]
#[kernel("proc_ns_operations")]
struct NsOperations {
    name: u64,
}

#[derive(KernelType)]
#[kernel("nsproxy")]
struct InitialNamespaces {
    uts_ns: u64,
    ipc_ns: u64,
    mnt_ns: u64,
    pid_ns_for_children: u64,
    net_ns: u64,
    time_ns: u64,
    cgroup_ns: u64,
}

/// Whether the files of this type of file system are views.
pub(crate) fn is_view(fs_type: &[u8]) -> bool {
    VIEWS.contains(&fs_type)
}

/// The process below whose directory in /proc a path lies.
fn process_in(path: &[u8]) -> Option<Pid> {
    let name = path.strip_prefix(b"/proc/")?.split(|&byte| byte == b'/').next()?;
    std::str::from_utf8(name).ok()?.parse().ok()
}

impl Autopsy<'_> {
    /// A file of a file system that [`is_view`].
    pub(crate) fn proc_file(&self, inode: u64, fs_type: &[u8], path: &[u8]) -> Result<ProcFile> {
        let mut file = ProcFile { task: None, gone: false };
        if fs_type == b"proc" {
            let proc = inode.wrapping_sub(self.kernel.offset_of("proc_inode", "vfs_inode")?);
            let pid = self.kernel.read_u64(proc.wrapping_add(self.kernel.offset_of("proc_inode", "pid")?))?;
            if pid != 0 {
                let (number, gone) = self.pid_with_fate(pid, true)?;
                file = ProcFile { task: Some(number), gone };
            } else {
                // /proc/net leads to /proc/PID/net, whose files are of no process.
                file.task = process_in(path);
            }
        }
        Ok(file)
    }

    /// A file of nsfs.
    pub(crate) fn namespace_file(&self, inode: u64) -> Result<FileKind> {
        let addr = self.inode_private(inode)?;
        let ns: NsCommon = self.kernel.read(addr)?;
        let operations: NsOperations = self.kernel.read(ns.ops)?;
        let name = String::from_utf8_lossy(&self.kernel.read_cstr(operations.name, 32)?).into_owned();
        let init: InitialNamespaces = self.kernel.read(self.kernel.symbol("init_nsproxy")?)?;
        let (kind, initial) = match name.as_str() {
            "uts" => ("uts_namespace", init.uts_ns),
            "ipc" => ("ipc_namespace", init.ipc_ns),
            "mnt" => ("mnt_namespace", init.mnt_ns),
            "pid" | "pid_for_children" => ("pid_namespace", init.pid_ns_for_children),
            "net" => ("net", init.net_ns),
            "time" | "time_for_children" => ("time_namespace", init.time_ns),
            "cgroup" => ("cgroup_namespace", init.cgroup_ns),
            "user" => ("user_namespace", self.kernel.symbol("init_user_ns")?),
            _ => return Ok(FileKind::Unsupported { what: format!("a namespace ({name})") }),
        };
        let initial = addr == initial.wrapping_add(self.kernel.offset_of(kind, "ns")?);
        Ok(FileKind::Namespace(NamespaceFile { name, initial }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_below_a_process_are_told_from_others() {
        assert_eq!(process_in(b"/proc/4711/net/dev"), Some(4711));
        assert_eq!(process_in(b"/proc/4711"), Some(4711));
        assert_eq!(process_in(b"/proc/meminfo"), None);
        assert_eq!(process_in(b"/sys/4711"), None);
    }
}
