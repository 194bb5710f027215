//! Huge pages of hugetlbfs: `hstate`, `hugetlbfs_sb_info`, `hugetlbfs_inode_info` (include/linux/hugetlb.h, mm/hugetlb.c,
//! fs/hugetlbfs/inode.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{FileKind, HugePages, Severity};
use vmcore::PAGE_SIZE;

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// HUGE_MAX_HSTATE: 2 MiB and 1 GiB on x86-64.
const MAX_SIZES: u32 = 8;
/// The largest page is of 1 GiB.
const MAX_ORDER: u32 = 18;
/// What the kernel calls the file behind memory that was mapped with MAP_HUGETLB (HUGETLB_ANON_FILE).
pub(crate) const ANONYMOUS: &[u8] = b"/anon_hugepage";

#[derive(KernelType)]
#[kernel("hstate")]
struct Hstate {
    order: u32,
    nr_huge_pages: u64,
    surplus_huge_pages: u64,
}

impl Autopsy<'_> {
    /// All pools that have a page.
    pub(crate) fn huge_pages(&self) -> Vec<HugePages> {
        self.read_pools().unwrap_or_else(|error| {
            self.find(
                Severity::Broken,
                "hugetlb",
                format!("the pools of huge pages cannot be read: {error}"),
            );
            Vec::new()
        })
    }

    fn read_pools(&self) -> Result<Vec<HugePages>> {
        // Without CONFIG_HUGETLB_PAGE there is none.
        let (Some(table), Some(count)) =
            (self.kernel.symbol_opt("hstates"), self.kernel.symbol_opt("hugetlb_max_hstate"))
        else {
            return Ok(Vec::new());
        };
        let size = self.kernel.size_of("hstate")?;
        let mut pools = Vec::new();
        for n in 0..self.kernel.read_u32(count)?.min(MAX_SIZES) {
            let pool: Hstate = self.kernel.read(table.wrapping_add(u64::from(n) * size))?;
            let total = pool.nr_huge_pages.saturating_sub(pool.surplus_huge_pages);
            if pool.order <= MAX_ORDER && pool.nr_huge_pages > 0 {
                pools.push(HugePages { page_size: PAGE_SIZE << pool.order, total });
            }
        }
        Ok(pools)
    }

    /// The size of the pages of a hugetlbfs. `sb`: address of its super block.
    pub(crate) fn huge_page_size(&self, sb: u64) -> Result<u64> {
        let follow = |from: u64, kind: &str, member: &str| -> Result<u64> {
            Ok(self.kernel.read_u64(from.wrapping_add(self.kernel.offset_of(kind, member)?))?)
        };
        let info = follow(sb, "super_block", "s_fs_info")?;
        let pool = follow(info, "hugetlbfs_sb_info", "hstate")?;
        let order = self.kernel.read::<Hstate>(pool)?.order;
        match order {
            1..=MAX_ORDER => Ok(PAGE_SIZE << order),
            _ => Err(corrupt("hstate", pool, format!("has pages of order {order}"))),
        }
    }

    /// What memfd_create(2) makes with MFD_HUGETLB. `inode`: its address.
    pub(crate) fn huge_memfd_kind(&self, inode: u64) -> Result<FileKind> {
        let info = inode.wrapping_sub(self.kernel.offset_of("hugetlbfs_inode_info", "vfs_inode")?);
        let seals = info.wrapping_add(self.kernel.offset_of("hugetlbfs_inode_info", "seals")?);
        Ok(FileKind::Memfd { seals: self.kernel.read_u32(seals)? })
    }
}
