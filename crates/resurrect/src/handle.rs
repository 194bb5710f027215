//! Inodes of a disk file system by what lasts of them: number and generation. No name is needed, and an inode that only has the same number is
//! not taken for it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::sys;

/// MAX_HANDLE_SZ (include/linux/exportfs.h).
const MAX_HANDLE: usize = 128;

/// `struct file_handle` (include/linux/fs.h), as name_to_handle_at(2) fills it in.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FileHandle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX_HANDLE],
}

impl FileHandle {
    fn of(fd: &OwnedFd) -> Result<Self, Errno> {
        let mut handle = Self { bytes: MAX_HANDLE as u32, kind: 0, data: [0; MAX_HANDLE] };
        let mut mount_id = 0i32;
        let (empty, flags) = (c"".as_ptr() as u64, libc::AT_EMPTY_PATH as u64);
        // SAFETY: the kernel writes a handle of at most `bytes` bytes, and an int.
        unsafe {
            let at = (&raw mut handle as u64, &raw mut mount_id as u64);
            sys::raw(libc::SYS_name_to_handle_at, [fd.as_raw_fd() as u64, empty, at.0, at.1, flags, 0])
        }?;
        Ok(handle)
    }
}

/// How a file system writes down an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// FILEID_INO32_GEN: two words of 32 bits (ext4, f2fs, small xfs).
    Ino32,
    /// XFS_FILEID_TYPE_64FLAG: a number of 64 bits, then the generation (fs/xfs/xfs_export.h).
    Ino64,
}

impl Form {
    fn of(kind: i32) -> Option<Self> {
        match kind {
            0x1 => Some(Self::Ino32),
            0x81 => Some(Self::Ino64),
            // Among them Btrfs: each subvolume counts its inodes anew.
            _ => None,
        }
    }

    /// Where the generation is.
    fn generation_at(self) -> usize {
        match self {
            Self::Ino32 => 4,
            Self::Ino64 => 8,
        }
    }
}

/// One mounted file system.
#[derive(Debug)]
pub(crate) struct Handles {
    /// Its root directory.
    root: OwnedFd,
    form: Form,
    handle: FileHandle,
}

impl Handles {
    /// Those of the file system that is mounted there; `None` if its inodes do not last, or are written down in an unknown way.
    pub(crate) fn of(mountpoint: &Path) -> Option<Self> {
        let root = sys::open(mountpoint, libc::O_RDONLY | libc::O_DIRECTORY, 0).ok()?;
        let handle = FileHandle::of(&root).ok()?;
        Some(Self { root, form: Form::of(handle.kind)?, handle })
    }

    /// Number and generation of an inode of this file system.
    pub(crate) fn numbers(&self, inode: &OwnedFd) -> Result<(u64, u32), Errno> {
        let handle = FileHandle::of(inode)?;
        let at = self.form.generation_at();
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|n| handle.data[at + n]));
        let high = if self.form == Form::Ino32 { 0 } else { word(4) };
        Ok((u64::from(high) << 32 | u64::from(word(0)), word(at)))
    }

    /// The root directory of the file system.
    pub(crate) fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// An inode of any type, as by O_PATH. `None` if the file system does not have it, or not under any name.
    pub(crate) fn open(&self, ino: u64, generation: u32) -> Result<Option<OwnedFd>, Errno> {
        let mut handle = self.handle;
        let at = self.form.generation_at();
        match (self.form, u32::try_from(ino)) {
            (Form::Ino32, Ok(ino)) => handle.data[..4].copy_from_slice(&ino.to_ne_bytes()),
            (Form::Ino32, Err(_)) => return Ok(None),
            (Form::Ino64, _) => handle.data[..8].copy_from_slice(&ino.to_ne_bytes()),
        }
        handle.data[at..at + 4].copy_from_slice(&generation.to_ne_bytes());
        let flags = (libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) as u64;
        // SAFETY: the kernel reads the handle; the descriptor that comes back is nobody else's.
        let opened = unsafe {
            let args = [self.root.as_raw_fd() as u64, &raw const handle as u64, flags, 0, 0, 0];
            sys::raw(libc::SYS_open_by_handle_at, args).map(|fd| OwnedFd::from_raw_fd(fd as i32))
        };
        match opened {
            Ok(fd) => Ok(Some(fd)),
            // ext4 says so of a number that it does not have.
            Err(Errno::ESTALE | Errno::ENOENT | Errno::EINVAL) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// A path that leads to what is open.
pub(crate) fn path_of(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
