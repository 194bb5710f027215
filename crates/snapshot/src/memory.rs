//! Address spaces: mappings and the page frames behind them.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use crate::{AioContext, Bytes, FileId, InodeId};

/// Address of a `struct mm_struct` in the dead kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AddressSpaceId(pub u64);

/// One address space (`struct mm_struct`).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct AddressSpace {
    /// Mappings by ascending address, as /proc/PID/maps shows them (without `[vsyscall]`).
    pub vmas: Vec<Vma>,
    /// Contexts of asynchronous I/O (io_setup(2)) whose rings are among the mappings.
    #[serde(default)]
    pub aio: Vec<AioContext>,
    /// The fields that prctl(PR_SET_MM_MAP) sets.
    pub layout: MmLayout,
    /// The program (`/proc/PID/exe`).
    pub exe: Option<FileId>,
    /// PR_SET_DUMPABLE value: 0 no, 1 user, 2 root only.
    pub dumpable: u32,
    /// PR_SET_THP_DISABLE.
    pub thp_disabled: bool,
    /// mlockall(MCL_FUTURE) / MCL_ONFAULT were in force for new mappings.
    pub lock_future: bool,
    #[allow(missing_docs)]
    pub lock_on_fault: bool,
    /// `mmap_lock` was held for writing when the kernel died, and the mappings may be half changed: the list of mappings contradicts itself,
    /// or whoever held it may have been working on page tables.
    pub write_locked: bool,
}

impl AddressSpace {
    /// The mapping that an address is in.
    pub fn vma_at(&self, addr: u64) -> Option<&Vma> {
        self.vmas.iter().find(|vma| (vma.start..vma.end).contains(&addr))
    }
}

/// `struct prctl_mm_map`: where the kernel believes the program's parts are. Addresses in the process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MmLayout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// The auxiliary vector, (type, value) pairs including the closing AT_NULL.
    pub auxv: Vec<u64>,
}

/// One mapping (`struct vm_area_struct`).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// PROT_*.
    pub prot: Prot,
    /// MAP_SHARED (VM_SHARED or VM_MAYSHARE) as opposed to MAP_PRIVATE.
    pub shared: bool,
    /// Everything else that madvise, mlock and mmap flags leave behind.
    pub flags: VmaFlags,
    /// What is mapped.
    pub kind: VmaKind,
    /// PR_SET_VMA_ANON_NAME.
    pub name: Option<Bytes>,
    /// Frames that are this mapping's own (anonymous or copied-on-write pages), by ascending address, those in swap areas among them.
    /// What is not listed is a hole: zeroes, or the file's page.
    pub pages: Vec<PageRun>,
    /// Pages (4 KiB) that existed but cannot be had, with the reason in the findings: poisoned, device-private, outside the dump.
    pub lost_pages: u64,
}

bitflags! {
    /// PROT_READ, PROT_WRITE, PROT_EXEC with their values in mmap(2).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Prot: u32 {
        #[allow(missing_docs)] const READ = 1;
        #[allow(missing_docs)] const WRITE = 2;
        #[allow(missing_docs)] const EXEC = 4;
    }

    /// Properties of a mapping besides its protection; named as the kernel's VM_* flags, with our own values.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct VmaFlags: u32 {
        /// MAP_GROWSDOWN.
        const GROWSDOWN = 1;
        /// mlock.
        const LOCKED = 1 << 1;
        /// mlock2(MLOCK_ONFAULT).
        const LOCKONFAULT = 1 << 2;
        /// Charged to the commit limit: the mapping is, or once was, private and writable.
        const ACCOUNT = 1 << 3;
        /// MAP_NORESERVE.
        const NORESERVE = 1 << 4;
        /// MADV_HUGEPAGE.
        const HUGEPAGE = 1 << 5;
        /// MADV_NOHUGEPAGE.
        const NOHUGEPAGE = 1 << 6;
        /// MADV_DONTFORK.
        const DONTCOPY = 1 << 7;
        /// MADV_DONTDUMP.
        const DONTDUMP = 1 << 8;
        /// MADV_WIPEONFORK.
        const WIPEONFORK = 1 << 9;
        /// MADV_MERGEABLE.
        const MERGEABLE = 1 << 10;
        /// MADV_SEQUENTIAL.
        const SEQ_READ = 1 << 11;
        /// MADV_RANDOM.
        const RAND_READ = 1 << 12;
        /// mprotect may add PROT_READ, PROT_WRITE, PROT_EXEC.
        const MAYREAD = 1 << 13;
        #[allow(missing_docs)] const MAYWRITE = 1 << 14;
        #[allow(missing_docs)] const MAYEXEC = 1 << 15;
        /// MAP_SYNC (DAX).
        const SYNC = 1 << 16;
        /// Pages of hugetlbfs, whatever is mapped.
        const HUGETLB = 1 << 17;
    }
}

/// What a mapping shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum VmaKind {
    /// Anonymous private memory.
    Anonymous,
    /// The same in pages of hugetlbfs (MAP_HUGETLB).
    AnonymousHuge {
        /// Bytes of a page.
        page_size: u64,
    },
    /// A file, private or shared.
    File {
        #[allow(missing_docs)]
        file: FileId,
        /// Offset of `start` in the file, bytes.
        offset: u64,
    },
    /// Shared anonymous memory (`mmap(MAP_SHARED | MAP_ANONYMOUS)`): an unnamed tmpfs inode. Its pages are listed in the inode.
    SharedAnonymous {
        #[allow(missing_docs)]
        inode: InodeId,
        /// Offset of `start` in the object, bytes.
        offset: u64,
    },
    /// A System V shared memory segment. Its pages are listed in the inode.
    SysvShm {
        /// Identifier of the segment.
        id: i32,
        /// Offset of `start` in the segment, bytes.
        offset: u64,
    },
    /// The ring of an asynchronous I/O context ([`AddressSpace::aio`]).
    AioRing {
        /// The unnamed file that it is.
        inode: InodeId,
    },
    /// A page set that the kernel provides: `[vdso]`, `[vvar]`, `[uprobes]`.
    Special {
        #[allow(missing_docs)]
        name: Bytes,
    },
    /// Something that is not brought back, named for people (`hugetlb`, `device memory of /dev/…`).
    Unsupported {
        #[allow(missing_docs)]
        what: String,
    },
}

/// Consecutive pages of a process in consecutive page frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// First address in the process.
    pub addr: u64,
    /// First page frame number, or [what stands for a swap slot](crate::SwapArea::frame).
    pub pfn: u64,
    /// How many 4 KiB pages.
    pub count: u32,
}
