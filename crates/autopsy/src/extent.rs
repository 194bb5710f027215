//! Where on the disk the contents of a file are: the extent trees of ext4 (struct ext4_extent_header, fs/ext4/ext4_extents.h; i_data,
//! fs/ext4/ext4.h), which are in memory before they are on the disk. Nodes below the root are in the page cache of the block device (bd_inode,
//! 6.1; bd_mapping, 6.12; include/linux/blk_types.h).

use std::collections::BTreeMap;

use ktypes::KernelType;
use snapshot::{Bytes, Extent};
use vmcore::PAGE_SIZE;

use crate::Autopsy;
use crate::error::{Result, Visited, corrupt};

/// EXT4_EXT_MAGIC.
const MAGIC: u64 = 0xf30a;
/// EXT_INIT_MAX_LEN: extents that are longer by that are not written yet.
const WRITTEN_MAX: u64 = 1 << 15;
/// EXT4_MAX_EXTENT_DEPTH.
const MAX_DEPTH: u64 = 5;
/// Of one file.
const MAX_EXTENTS: usize = 1 << 20;
/// Pages in the page cache of a block device.
const MAX_BLOCKS: usize = 1 << 24;
/// Pages of the largest folio of a page cache (MAX_PAGECACHE_ORDER is at most that of a huge page).
const MAX_FOLIO: u64 = 512;

#[derive(KernelType)]
#[kernel("super_block")]
struct SuperBlockDevice {
    s_blocksize: u64,
    s_bdev: u64,
}

/// Page frames of a block device's page cache, by index.
pub(crate) type BlockPages = BTreeMap<u64, u64>;

impl Autopsy<'_> {
    /// Where an ext4 inode's contents are, in ascending order; `None` if it does not use extents, or has other blocks than pages.
    pub(crate) fn extents(&self, inode: u64, sb: u64) -> Result<Option<Vec<Extent>>> {
        let kernel = self.kernel;
        let sb: SuperBlockDevice = kernel.read(sb)?;
        if !self.has_ext4_flag(inode, "EXT4_INODE_EXTENTS")? || sb.s_blocksize != PAGE_SIZE {
            return Ok(None);
        }
        let data = kernel.member("ext4_inode_info", "i_data")?;
        let root =
            kernel.read_bytes(self.ext4_inode(inode)?.wrapping_add(data.offset), data.size as usize)?;
        let mut all = Vec::new();
        self.extent_node(inode, &root, None, sb.s_bdev, &mut all, &mut Visited::default())?;
        let sorted = all.windows(2).all(|pair| pair[0].index + pair[0].count <= pair[1].index);
        if !sorted {
            return Err(corrupt("inode", inode, "has extents that overlap"));
        }
        Ok(Some(all))
    }

    /// The `ext4_inode_info` around an inode.
    pub(crate) fn ext4_inode(&self, inode: u64) -> Result<u64> {
        Ok(inode.wrapping_sub(self.kernel.offset_of("ext4_inode_info", "vfs_inode")?))
    }

    /// Whether an ext4 inode has one of the flags EXT4_INODE_* (fs/ext4/ext4.h).
    fn has_ext4_flag(&self, inode: u64, flag: &str) -> Result<bool> {
        let at = self.ext4_inode(inode)?.wrapping_add(self.kernel.offset_of("ext4_inode_info", "i_flags")?);
        Ok(self.kernel.read_u64(at)? >> self.kernel.enum_value(flag)? & 1 != 0)
    }

    /// The extents below one node, which has to be so many levels above the leaves (any number, if it is the root).
    fn extent_node(
        &self,
        inode: u64,
        node: &[u8],
        depth: Option<u64>,
        bdev: u64,
        all: &mut Vec<Extent>,
        visited: &mut Visited,
    ) -> Result<()> {
        let damaged = || corrupt("inode", inode, "has a damaged extent tree");
        let header = |member| self.disk_part(node, 0, "ext4_extent_header", member).ok_or_else(damaged);
        let (magic, entries, own) = (header("eh_magic")?, header("eh_entries")?, header("eh_depth")?);
        if magic != MAGIC || own > MAX_DEPTH || depth.is_some_and(|depth| depth != own) {
            return Err(damaged());
        }
        let kind = if own == 0 { "ext4_extent" } else { "ext4_extent_idx" };
        let (first, size) = (self.kernel.size_of("ext4_extent_header")?, self.kernel.size_of(kind)?);
        for n in 0..entries {
            let field = |member| self.disk_part(node, first + n * size, kind, member).ok_or_else(damaged);
            if own == 0 {
                if all.len() >= MAX_EXTENTS {
                    return Err(damaged());
                }
                let len = field("ee_len")?;
                let written = len <= WRITTEN_MAX;
                all.push(Extent {
                    index: field("ee_block")?,
                    count: if written { len } else { len - WRITTEN_MAX },
                    block: field("ee_start_hi")? << 32 | field("ee_start_lo")?,
                    written,
                });
            } else {
                let block = field("ei_leaf_hi")? << 32 | field("ei_leaf_lo")?;
                visited.visit("ext4_extent_idx", block)?;
                let page = self.block(bdev, block)?;
                let page =
                    page.ok_or_else(|| corrupt("inode", inode, "has extents that are on the disk only"))?;
                self.extent_node(inode, &page, Some(own - 1), bdev, all, visited)?;
            }
        }
        Ok(())
    }

    /// A member of an on-disk structure, at most four bytes.
    pub(crate) fn disk_part(&self, node: &[u8], at: u64, kind: &str, member: &str) -> Option<u64> {
        let member = self.kernel.member(kind, member).ok()?;
        let start = usize::try_from(at.checked_add(member.offset)?).ok()?;
        let bytes = node.get(start..start.checked_add(member.size as usize)?)?;
        let mut word = [0; 8];
        word.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(word))
    }

    /// A block of a block device, if its page cache has it.
    pub(crate) fn block(&self, bdev: u64, block: u64) -> Result<Option<Vec<u8>>> {
        if !self.block_pages.borrow().contains_key(&bdev) {
            // If it fails, it would fail again for each inode.
            let pages = self.pages_of_device(bdev).map_err(|error| error.to_string());
            self.block_pages.borrow_mut().insert(bdev, pages);
        }
        let known = self.block_pages.borrow();
        let pages = match known.get(&bdev) {
            Some(Ok(pages)) => pages,
            Some(Err(why)) => return Err(corrupt("block_device", bdev, why.clone())),
            None => return Ok(None),
        };
        let Some(pfn) = pages.get(&block) else { return Ok(None) };
        let mut page = vec![0; PAGE_SIZE as usize];
        let at = pfn.saturating_mul(PAGE_SIZE);
        self.kernel.vmcore().read_phys(at, &mut page).map_err(ktypes::Error::from)?;
        Ok(Some(page))
    }

    fn pages_of_device(&self, bdev: u64) -> Result<BlockPages> {
        let kernel = self.kernel;
        let pointer = |addr: u64, kind, member| -> Result<u64> {
            Ok(kernel.read_u64(addr.wrapping_add(kernel.offset_of(kind, member)?))?)
        };
        let mapping = match kernel.has_member("block_device", "bd_mapping") {
            true => pointer(bdev, "block_device", "bd_mapping")?,
            false => pointer(pointer(bdev, "block_device", "bd_inode")?, "inode", "i_mapping")?,
        };
        let pages = mapping.wrapping_add(kernel.offset_of("address_space", "i_pages")?);
        let mut all = BlockPages::new();
        let frames = self.frames()?;
        let is_uptodate = |page: u64| -> Result<bool> {
            let buffer = pointer(page, "page", "private")?;
            let state = pointer(buffer, "buffer_head", "b_state")?;
            Ok(state >> kernel.enum_value("BH_Uptodate")? & 1 != 0)
        };
        kernel.xarray_for_each(pages, MAX_BLOCKS, |first, entry| {
            let Some(page) = entry.pointer() else { return Ok(()) };
            let Ok(pfn) = kernel.page_to_pfn(page) else { return Ok(()) };
            let count = entry.last.saturating_sub(first).saturating_add(1).min(MAX_FOLIO);
            // A buffer that was made, and not read, says so of itself only.
            let is_valid = frames.get(pfn).is_ok_and(|frame| frame.uptodate || frame.dirty);
            if is_valid || is_uptodate(page).unwrap_or(false) {
                all.extend((0..count).map(|n| (first.wrapping_add(n), pfn + n)));
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// The names in a directory, with the numbers of their inodes, from its blocks (struct ext4_dir_entry_2, fs/ext4/ext4.h): what was changed
    /// is in the page cache of the block device until it has been written. `None` if not all blocks are there, or they are not to be understood.
    pub(crate) fn directory_blocks(&self, inode: u64) -> Result<Option<Vec<(Bytes, u64)>>> {
        let kernel = self.kernel;
        let sb = kernel.read_u64(inode.wrapping_add(kernel.offset_of("inode", "i_sb")?))?;
        if self.has_ext4_flag(inode, "EXT4_INODE_ENCRYPT")? {
            return Ok(None);
        }
        let Some(extents) = self.extents(inode, sb)? else { return Ok(None) };
        let size = kernel.read_u64(inode.wrapping_add(kernel.offset_of("inode", "i_size")?))?;
        let bdev = kernel.read::<SuperBlockDevice>(sb)?.s_bdev;
        let mut names = Vec::new();
        let mut found = 0;
        for (index, block) in extents.iter().flat_map(|e| (0..e.count).map(|n| (e.index + n, e.block + n))) {
            if index >= size.div_ceil(PAGE_SIZE) {
                break;
            }
            let Some(page) = self.block(bdev, block)? else { return Ok(None) };
            self.entries(inode, &page, &mut names)?;
            found += 1;
        }
        Ok((found == size.div_ceil(PAGE_SIZE)).then_some(names))
    }

    /// The entries in one block of a directory. The inner nodes of an index look like empty ones.
    fn entries(&self, inode: u64, block: &[u8], names: &mut Vec<(Bytes, u64)>) -> Result<()> {
        const ENTRY: &str = "ext4_dir_entry_2";
        let damaged = || corrupt("inode", inode, "has a damaged directory block");
        let to_name = self.kernel.offset_of(ENTRY, "name")?;
        let mut at = 0;
        while at < block.len() as u64 {
            let field = |member| self.disk_part(block, at, ENTRY, member).ok_or_else(damaged);
            let (number, len, name_len) = (field("inode")?, field("rec_len")?, field("name_len")?);
            if len < to_name
                || !len.is_multiple_of(4)
                || at + len > block.len() as u64
                || name_len > len - to_name
            {
                return Err(damaged());
            }
            let start = (at + to_name) as usize;
            let name = block.get(start..start + name_len as usize).ok_or_else(damaged)?;
            if number != 0 && name != b"." && name != b".." {
                if names.len() >= MAX_EXTENTS {
                    return Err(damaged());
                }
                names.push((Bytes(name.to_vec()), number));
            }
            at += len;
        }
        Ok(())
    }

    /// The target of a symbolic link that has a block of its own.
    pub(crate) fn target_in_block(&self, inode: u64, sb: u64, len: u64) -> Result<Option<Vec<u8>>> {
        let Some(extents) = self.extents(inode, sb)? else { return Ok(None) };
        let Some(first) = extents.first().filter(|extent| extent.index == 0) else { return Ok(None) };
        let sb: SuperBlockDevice = self.kernel.read(sb)?;
        let page = self.block(sb.s_bdev, first.block)?;
        Ok(page.and_then(|mut page| (len < PAGE_SIZE).then(|| page.drain(..len as usize).collect())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::{Record, Synth, U8, U16, U32, U64, array};

    /// `(block, len, start)` of each extent of a leaf, or `(block, 0, leaf)` of an index.
    fn node(depth: u16, entries: &[(u32, u16, u64)]) -> Vec<u8> {
        let header = [MAGIC as u16, entries.len() as u16, 4, depth, 0, 0];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        for (block, len, start) in entries {
            bytes.extend(block.to_le_bytes());
            if depth == 0 {
                bytes.extend(len.to_le_bytes());
                bytes.extend(((start >> 32) as u16).to_le_bytes());
                bytes.extend((*start as u32).to_le_bytes());
            } else {
                bytes.extend((*start as u32).to_le_bytes());
                bytes.extend(((start >> 32) as u16).to_le_bytes());
                bytes.extend([0; 2]);
            }
        }
        bytes
    }

    fn with_root(root: &[u8], blocksize: u64) -> (Synth, u64, u64) {
        let mut synth = Synth::new();
        declare::<SuperBlockDevice>(&mut synth, &[]);
        let header = Record::new().field("eh_magic", U16).field("eh_entries", U16).field("eh_max", U16);
        synth.structure("ext4_extent_header", header.field("eh_depth", U16).field("eh_generation", U32));
        let leaf = Record::new().field("ee_block", U32).field("ee_len", U16).field("ee_start_hi", U16);
        synth.structure("ext4_extent", leaf.field("ee_start_lo", U32));
        let index = Record::new().field("ei_block", U32).field("ei_leaf_lo", U32).field("ei_leaf_hi", U16);
        synth.structure("ext4_extent_idx", index.field("ei_unused", U16));
        let outer = Record::new().field("i_data", array(U32, 15)).field("i_flags", U64);
        synth.structure("ext4_inode_info", outer.field("vfs_inode", U64));
        synth.enumeration("ext4_flags", &[("EXT4_INODE_EXTENTS", 19)]);
        let (sb, outer) = (synth.alloc("super_block"), synth.alloc("ext4_inode_info"));
        synth.set("super_block", sb, "s_blocksize", blocksize);
        synth.set("ext4_inode_info", outer, "i_flags", 1u64 << 19);
        let data = synth.address_of("ext4_inode_info", outer, "i_data");
        synth.write(data, root);
        let inode = synth.address_of("ext4_inode_info", outer, "vfs_inode");
        (synth, inode, sb)
    }

    fn extents(root: &[u8], blocksize: u64) -> Result<Option<Vec<Extent>>> {
        let (synth, inode, sb) = with_root(root, blocksize);
        let kernel = open(&synth);
        Autopsy::new(&kernel).extents(inode, sb)
    }

    #[test]
    fn extents_are_read_with_those_that_are_not_written() {
        let root = node(0, &[(0, 3, 100), (8, (1 << 15) + 5, 5 << 32 | 7)]);
        let found = extents(&root, PAGE_SIZE).unwrap().unwrap();
        let extent = |index, count, block, written| Extent { index, count, block, written };
        assert_eq!(found, [extent(0, 3, 100, true), extent(8, 5, 5 << 32 | 7, false)]);
        assert_eq!(extents(&root, 1024).unwrap(), None, "small blocks");
    }

    #[test]
    fn damaged_trees_are_errors() {
        let good = node(0, &[(0, 3, 100)]);
        let damaged = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            extents(&bytes, PAGE_SIZE)
        };
        assert!(damaged(0, 1).is_err(), "magic");
        assert!(damaged(2, 200).is_err(), "more entries than there is room");
        assert!(damaged(6, 9).is_err(), "too deep");
        assert!(extents(&node(0, &[(5, 3, 100), (7, 2, 200)]), PAGE_SIZE).is_err(), "they overlap");
        assert!(extents(&node(1, &[(0, 0, 100)]), PAGE_SIZE).is_err(), "a node that is nowhere");
    }

    #[test]
    fn a_node_has_one_place_in_a_tree() {
        let (mut synth, inode, sb) = with_root(&node(1, &[(0, 0, 5), (9, 0, 5)]), PAGE_SIZE);
        let page = synth.alloc_phys(PAGE_SIZE, PAGE_SIZE);
        synth.write_phys(page, &node(0, &[]));
        let kernel = open(&synth);
        let autopsy = Autopsy::new(&kernel);
        // Of a tree of five levels, with all places of a node leading to the same one, each of 340^5 would be gone to.
        autopsy.block_pages.borrow_mut().insert(0, Ok([(5, page / PAGE_SIZE)].into()));
        let error = autopsy.extents(inode, sb).unwrap_err().to_string();
        assert!(error.contains("comes up twice"), "{error}");
    }

    #[test]
    fn a_damaged_page_cache_of_a_device_is_read_once() {
        let (synth, inode, sb) = with_root(&node(1, &[(0, 0, 5)]), PAGE_SIZE);
        let kernel = open(&synth);
        let autopsy = Autopsy::new(&kernel);
        let first = autopsy.extents(inode, sb).unwrap_err().to_string();
        assert!(autopsy.block_pages.borrow().get(&0).is_some_and(|pages| pages.is_err()), "{first}");
        assert!(autopsy.extents(inode, sb).unwrap_err().to_string().contains("block_device"));
    }
    #[test]
    fn entries_of_a_directory_are_read_up_to_the_end_of_the_block() {
        let (mut synth, inode, _) = with_root(&[], PAGE_SIZE);
        let entry = Record::new().field("inode", U32).field("rec_len", U16).field("name_len", U8);
        synth.structure("ext4_dir_entry_2", entry.field("file_type", U8).field("name", array(U8, 255)));
        let block = |entries: &[(u32, u16, &str)]| {
            let mut bytes = Vec::new();
            for (ino, len, name) in entries {
                let end = bytes.len() + usize::from(*len);
                bytes.extend(ino.to_le_bytes());
                bytes.extend(len.to_le_bytes());
                bytes.extend([name.len() as u8, 1]);
                bytes.extend(name.as_bytes());
                bytes.resize(end, 0);
            }
            bytes
        };
        let kernel = open(&synth);
        let autopsy = Autopsy::new(&kernel);
        let read = |bytes: &[u8]| {
            let mut names = Vec::new();
            autopsy.entries(inode, bytes, &mut names).map(|()| names)
        };
        let good =
            block(&[(2, 12, "."), (2, 12, ".."), (11, 20, "one"), (0, 16, "removed"), (12, 4036, "two")]);
        assert_eq!(good.len(), 4096);
        assert_eq!(read(&good).unwrap(), [("one".into(), 11), ("two".into(), 12)]);
        assert!(read(&block(&[(11, 13, "odd")])).is_err(), "lengths are multiples of four");
        assert!(read(&block(&[(11, 4, "")])).is_err(), "shorter than an entry");
        assert!(read(&good[..4092]).is_err(), "the last one ends behind the block");
    }
}
