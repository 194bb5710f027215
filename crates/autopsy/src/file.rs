//! Open files: `files_struct`, `struct file` (include/linux/fdtable.h, fs.h; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Descriptor, Device, DeviceKind, FileId, FileKind, InodeId, OpenFile, PipeEnd, PipeId, TtyId};

use crate::Autopsy;
use crate::error::{Result, corrupt};
use crate::fs::{FullPath, Path, device};
use crate::inode::{InodeFacts, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK};
use crate::{hugetlb, proc};

/// fs.nr_open is a million by default.
const MAX_FDS: u32 = 2 << 20;

// struct file's f_mode (include/linux/fs.h).
const FMODE_READ: u32 = 0x1;
const FMODE_WRITE: u32 = 0x2;
const FMODE_PATH: u32 = 0x4000;
/// Major number of /dev/null and its like; their minors.
const MEM_MAJOR: u32 = 1;
const STATELESS_MINORS: [u32; 5] = [3, 5, 7, 8, 9];

#[derive(KernelType)]
#[kernel("files_struct")]
struct FilesStruct {
    fdt: u64,
}

#[derive(KernelType)]
#[kernel("fdtable")]
struct FdTable {
    max_fds: u32,
    fd: u64,
    close_on_exec: u64,
    open_fds: u64,
}

#[derive(KernelType)]
#[kernel("file")]
pub(crate) struct File {
    #[kernel(nested)]
    pub f_path: Path,
    pub f_inode: u64,
    pub f_op: u64,
    #[kernel("f_count.counter")]
    f_count: i64,
    pub f_flags: u32,
    pub f_mode: u32,
    pub f_pos: i64,
    /// Embedded until 6.11, a pointer since.
    #[kernel("f_owner", address)]
    f_owner: u64,
    pub private_data: u64,
}

#[derive(KernelType)]
#[kernel("fown_struct")]
struct Owner {
    pid: u64,
    pid_type: u32,
    signum: i32,
}

impl Autopsy<'_> {
    /// The descriptors of a `files_struct`; their files go into the table.
    pub(crate) fn descriptors(&self, files: u64) -> Result<Vec<Descriptor>> {
        let descriptors = self.descriptor_table(files)?;
        for Descriptor { fd, file, .. } in &descriptors {
            if let Err(error) = self.file(file.0) {
                let text = format!("descriptor {fd} is lost: {error}");
                self.find(snapshot::Severity::Broken, "file", text);
            }
        }
        self.read_held();
        Ok(descriptors)
    }

    /// The descriptors of a `files_struct`, without a look at their files.
    pub(crate) fn descriptor_table(&self, files: u64) -> Result<Vec<Descriptor>> {
        let table: FilesStruct = self.kernel.read(files)?;
        let table_addr = table.fdt;
        let table: FdTable = self.kernel.read(table_addr)?;
        if table.max_fds > MAX_FDS {
            return Err(corrupt("fdtable", table_addr, format!("is for {} descriptors", table.max_fds)));
        }
        let words = table.max_fds.div_ceil(64) as usize;
        let open = self.kernel.read_bytes(table.open_fds, words * 8)?;
        let close_on_exec = self.kernel.read_bytes(table.close_on_exec, words * 8)?;
        let bit = |mask: &[u8], fd: u32| mask.get(fd as usize / 8).is_some_and(|b| b >> (fd % 8) & 1 != 0);
        let last = (0..table.max_fds).rev().find(|fd| bit(&open, *fd));
        let pointers = self.kernel.read_bytes(table.fd, last.map_or(0, |last| last as usize + 1) * 8)?;
        let mut descriptors = Vec::new();
        for (fd, pointer) in pointers.as_chunks::<8>().0.iter().enumerate() {
            let file = u64::from_le_bytes(*pointer);
            // A number that is reserved but has no file yet belongs to an open() in flight.
            if file != 0 && bit(&open, fd as u32) {
                descriptors.push(Descriptor {
                    fd: fd as i32,
                    file: FileId(file),
                    cloexec: bit(&close_on_exec, fd as u32),
                });
            }
        }
        Ok(descriptors)
    }

    /// Reads an open file into the table, unless it is there.
    pub(crate) fn file(&self, addr: u64) -> Result<()> {
        let id = FileId(addr);
        if self.files.borrow().contains_key(&id) {
            return Ok(());
        }
        let file: File = self.kernel.read(addr)?;
        if file.f_count <= 0 {
            return Err(corrupt("file", addr, format!("is used {} times", file.f_count)));
        }
        let inode = self.inode_facts(file.f_inode)?;
        let path = self.path(&file.f_path)?;
        let kind = self.file_kind(addr, &file, &inode, &path)?;
        let (owner_pid, owner_is_thread, owner_signal) = self.owner(&file)?;
        let open = OpenFile {
            deleted: path.deleted && !path.synthetic || matches!(kind, FileKind::Memfd { .. }),
            kind,
            mount_namespace: path.namespace,
            flags: file.f_flags as i32,
            pos: file.f_pos,
            inode: InodeId(file.f_inode),
            owner_pid,
            owner_is_thread,
            owner_signal,
            count: file.f_count,
            path: path.path,
        };
        self.inode(file.f_inode, &inode, &open.path)?;
        self.locks(file.f_inode)?;
        self.mount_ids.borrow_mut().insert(id, self.mount_id(file.f_path.mnt)?);
        self.files.borrow_mut().insert(id, open);
        Ok(())
    }

    /// F_SETOWN, whether it means a thread, and F_SETSIG.
    fn owner(&self, file: &File) -> Result<(i32, bool, i32)> {
        let embedded = self.kernel.has_member("file", "f_owner.pid");
        let at = if embedded { file.f_owner } else { self.kernel.read_u64(file.f_owner)? };
        if at == 0 {
            return Ok((0, false, 0));
        }
        let owner: Owner = self.kernel.read(at)?;
        if owner.pid == 0 {
            return Ok((0, false, owner.signum));
        }
        let pid = self.pid_number(owner.pid)?;
        let is_group = u64::from(owner.pid_type) == self.enumerator("PIDTYPE_PGID", 2);
        let is_thread = u64::from(owner.pid_type) == self.enumerator("PIDTYPE_PID", 0);
        Ok((if is_group { -pid } else { pid }, is_thread, owner.signum))
    }

    fn file_kind(&self, addr: u64, file: &File, inode: &InodeFacts, path: &FullPath) -> Result<FileKind> {
        let unsupported = |what: String| Ok(FileKind::Unsupported { what });
        let file_type = inode.mode & 0o170_000;
        if proc::is_view(inode.fs_type.as_bytes()) {
            let view = self.proc_file(file.f_inode, inode.fs_type.as_bytes(), path.path.as_bytes())?;
            // A place in the tree is one like any other, unless it is there as long as a process only.
            if file.f_mode & FMODE_PATH == 0 && matches!(file_type, S_IFREG | S_IFDIR) || view.task.is_some()
            {
                return Ok(FileKind::Proc(view));
            }
        }
        if file.f_mode & FMODE_PATH != 0 {
            return Ok(FileKind::Path);
        }
        let operations = self.kernel.symbol_at(file.f_op).unwrap_or_default();
        match operations {
            "pidfd_fops" => return self.pidfd(file, false),
            "pidfs_file_operations" => return self.pidfd(file, true),
            "eventpoll_fops" => return Ok(FileKind::Epoll(self.epoll(file.private_data)?)),
            "eventfd_fops" => return Ok(FileKind::EventFd(self.eventfd(file.private_data)?)),
            "timerfd_fops" => return Ok(FileKind::TimerFd(self.timerfd(file.private_data)?)),
            "signalfd_fops" => return Ok(FileKind::SignalFd(self.signalfd(file.private_data)?)),
            "inotify_fops" => return Ok(FileKind::Inotify(self.inotify(file.private_data)?)),
            _ => {}
        }
        match file_type {
            S_IFREG => self.regular_kind(file, inode, path, operations),
            S_IFDIR => Ok(FileKind::Directory),
            S_IFIFO if operations == "pipefifo_fops" => {
                let end = match file.f_mode & (FMODE_READ | FMODE_WRITE) {
                    FMODE_READ => PipeEnd::Read,
                    FMODE_WRITE => PipeEnd::Write,
                    _ => PipeEnd::Both,
                };
                let pipe = PipeId(inode.pipe);
                self.pipe(pipe, (!path.synthetic).then(|| path.path.clone()))?;
                Ok(FileKind::Pipe { pipe, end })
            }
            S_IFIFO => unsupported("a FIFO that is being opened".into()),
            S_IFCHR => self.character_device_kind(file, inode, path, operations),
            S_IFBLK => unsupported(format!("block device {}", path.path)),
            S_IFSOCK => self.socket_kind(file.private_data),
            S_IFLNK => unsupported("a symbolic link".into()),
            0 => unsupported(anonymous_description(operations, path)),
            other => Err(corrupt("file", addr, format!("has an inode of type {other:o}"))),
        }
    }

    fn regular_kind(
        &self,
        file: &File,
        inode: &InodeFacts,
        path: &FullPath,
        operations: &str,
    ) -> Result<FileKind> {
        let unsupported = |what: String| Ok(FileKind::Unsupported { what });
        match inode.fs_type.as_bytes() {
            b"tmpfs" | b"hugetlbfs" | b"devtmpfs" if path.internal => match path.path.as_bytes() {
                SHARED_ANONYMOUS | hugetlb::ANONYMOUS => unsupported("anonymous memory".into()),
                name if name.starts_with(b"/memfd:") && inode.fs_type.as_bytes() == b"tmpfs" => {
                    self.memfd_kind(file.f_inode)
                }
                name if name.starts_with(b"/memfd:") && inode.fs_type.as_bytes() == b"hugetlbfs" => {
                    self.huge_memfd_kind(file.f_inode)
                }
                name if name.starts_with(SYSV) => unsupported("System V shared memory".into()),
                _ => unsupported(format!("kernel-internal memory file {}", path.path)),
            },
            b"anon_inodefs" => unsupported(anonymous_description(operations, path)),
            b"nsfs" => self.namespace_file(file.f_inode),
            b"secretmem" => unsupported("secret memory (memfd_secret)".into()),
            b"mqueue" => unsupported(format!("POSIX message queue {}", path.path)),
            // They stand for objects of the old kernel.
            b"tracefs" | b"configfs" | b"bpf" | b"pstore" | b"efivarfs" | b"binfmt_misc" | b"fusectl"
            | b"selinuxfs" | b"resctrl" | b"autofs" => {
                unsupported(format!("file {} of the pseudo file system {}", path.path, inode.fs_type))
            }
            _ => Ok(FileKind::Regular),
        }
    }

    fn character_device_kind(
        &self,
        file: &File,
        inode: &InodeFacts,
        path: &FullPath,
        operations: &str,
    ) -> Result<FileKind> {
        let (major, minor) = device(inode.rdev);
        match operations {
            "tty_fops" | "console_fops" => {
                let tty = self.kernel.read_u64(
                    file.private_data.wrapping_add(self.kernel.offset_of("tty_file_private", "tty")?),
                )?;
                self.tty(tty)?;
                Ok(FileKind::Tty { tty: TtyId(tty) })
            }
            "hung_up_tty_fops" => Ok(FileKind::HungUpTty),
            "ptmx_fops" => {
                let at = file.private_data.wrapping_add(self.kernel.offset_of("tty_file_private", "tty")?);
                let tty = self.kernel.read_u64(at)?;
                self.tty(tty)?;
                Ok(FileKind::Tty { tty: TtyId(tty) })
            }
            _ if major == MEM_MAJOR && STATELESS_MINORS.contains(&minor) => {
                Ok(FileKind::CharDevice { major, minor })
            }
            _ => match device_kind(operations) {
                Some(what) => Ok(FileKind::Device(Device { major, minor, what })),
                None => Ok(FileKind::Unsupported { what: format!("device {} ({major}:{minor})", path.path) }),
            },
        }
    }

    /// Whether it is what `mmap(MAP_SHARED | MAP_ANONYMOUS)` makes.
    pub(crate) fn is_shared_anonymous(&self, file: &OpenFile) -> bool {
        matches!(&file.kind, FileKind::Unsupported { .. }) && file.path.as_bytes() == SHARED_ANONYMOUS
    }

    /// Whether it is what mmap makes with MAP_HUGETLB, without a file.
    pub(crate) fn is_huge_anonymous(&self, file: &OpenFile) -> bool {
        matches!(&file.kind, FileKind::Unsupported { .. }) && file.path.as_bytes() == hugetlb::ANONYMOUS
    }

    /// Whether it is what shmat(2) maps.
    pub(crate) fn is_sysv_shm(&self, file: &OpenFile) -> bool {
        matches!(&file.kind, FileKind::Unsupported { .. }) && file.path.as_bytes().starts_with(SYSV)
    }
}

/// How the names of the files behind System V shared memory begin (`newseg`, ipc/shm.c).
const SYSV: &[u8] = b"/SYSV";

/// What the kernel calls the file behind shared anonymous memory (`shmem_zero_setup`, mm/shmem.c).
const SHARED_ANONYMOUS: &[u8] = b"/dev/zero";

/// Devices that can be opened again, by their operations (kernel/printk/printk.c, fs/autofs/dev-ioctl.c, drivers/input/evdev.c,
/// net/rfkill/core.c).
fn device_kind(operations: &str) -> Option<DeviceKind> {
    match operations {
        "kmsg_fops" => Some(DeviceKind::KernelLog),
        "_dev_ioctl_fops" => Some(DeviceKind::Autofs),
        "evdev_fops" => Some(DeviceKind::Input),
        "rfkill_fops" => Some(DeviceKind::Radio),
        _ => None,
    }
}

/// What an anonymous inode is, by its operations.
fn anonymous_description(operations: &str, path: &FullPath) -> String {
    let known = match operations {
        "fanotify_fops" => "a fanotify group",
        "io_uring_fops" => "an io_uring instance",
        "userfaultfd_fops" => "a userfaultfd",
        "perf_fops" => "a performance event",
        "bpf_prog_fops" => "a BPF program",
        "bpf_map_fops" => "a BPF map",
        "bpf_link_fops" => "a BPF link",
        _ => return format!("anonymous inode {}", path.path),
    };
    known.to_owned()
}
