//! What XFS keeps in memory of an inode and the disk may not have: where its contents are (the tree of extents below `xfs_ifork`,
//! fs/xfs/libxfs/xfs_iext_tree.c), targets of symbolic links that have room beside the inode, and extended attributes that have it too or are in one
//! block (struct xfs_attr_sf_hdr, struct xfs_attr3_leafblock, fs/xfs/libxfs/xfs_da_format.h), which is in a cache of XFS's own (struct xfs_buf,
//! fs/xfs/xfs_buf.h). 6.1 and 6.12.

use std::collections::BTreeMap;

use ktypes::KernelType;
use snapshot::{Bytes, Extent, Xattr};
use vmcore::PAGE_SIZE;

use crate::Autopsy;
use crate::error::{Result, Visited, corrupt};
use crate::xattr::{ACL_ACCESS, ACL_DEFAULT, acl_of};

/// Of one file.
const MAX_EXTENTS: usize = 1 << 20;
/// Levels of a tree of extents.
const MAX_HEIGHT: i32 = 12;
/// Allocation groups.
const MAX_GROUPS: usize = 1 << 20;
/// Of one allocation group.
const MAX_BUFFERS: usize = 1 << 22;
const MAX_BUCKETS: u32 = 1 << 24;
/// Bytes of a basic block (BBSIZE).
const BASIC_BLOCK: u64 = 512;
/// The buffer has what the disk has, or what is newer.
const XBF_DONE: u32 = 1 << 5;
/// What has room beside an inode.
const MAX_INLINE: u64 = 2048;
// enum xfs_dinode_fmt.
const FORMAT_LOCAL: i8 = 1;
const FORMAT_EXTENTS: i8 = 2;
const FORMAT_BTREE: i8 = 3;
// xfs_iext_set(): the first word has the offset and the low bits of the block, the second the length, whether it is unwritten, and the other bits.
const OFFSET_BITS: u32 = 54;
const LENGTH_BITS: u32 = 21;
const LOW_BLOCK_BITS: u32 = 10;
const REST_SHIFT: u32 = 22;
/// isnullstartblock(): nothing has been allocated yet.
const NO_BLOCK: u64 = ((1 << 35) - 1) << 17;
/// XFS_ATTR3_LEAF_MAGIC.
const ATTR3_LEAF_MAGIC: u64 = 0x3bee;
// XFS_ATTR_*
const ATTR_LOCAL: u8 = 1;
const ATTR_ROOT: u8 = 1 << 1;
const ATTR_SECURE: u8 = 1 << 2;

#[derive(KernelType)]
#[kernel("xfs_ifork")]
struct Fork {
    if_bytes: u64,
    if_height: i32,
    if_format: i8,
    #[kernel("if_u1.if_data", or = "if_data")]
    data: u64,
}

#[derive(KernelType)]
#[kernel("xfs_inode")]
struct XfsInode {
    i_mount: u64,
    i_forkoff: u8,
    #[kernel(address)]
    i_df: u64,
    #[kernel(address)]
    i_af: u64,
}

#[derive(KernelType)]
#[kernel("xfs_mount")]
struct XfsMount {
    #[kernel("m_sb.sb_agblklog")]
    agblklog: u8,
    #[kernel("m_sb.sb_agblocks")]
    agblocks: u32,
    #[kernel("m_sb.sb_blocksize")]
    blocksize: u32,
    /// The device of real-time files.
    m_rtdev_targp: u64,
}

#[derive(KernelType)]
#[kernel("xfs_buf")]
struct Buffer {
    b_rhash_key: u64,
    b_length: i32,
    b_flags: u32,
    b_addr: u64,
}

#[derive(KernelType)]
#[kernel("bucket_table")]
struct Buckets {
    size: u32,
    nest: u32,
    #[kernel(address)]
    buckets: u64,
}

impl Autopsy<'_> {
    fn xfs_inode(&self, inode: u64) -> Result<XfsInode> {
        Ok(self.kernel.read(inode.wrapping_sub(self.kernel.offset_of("xfs_inode", "i_vnode")?))?)
    }

    /// Where an inode's contents are, in ascending order; `None` if that is not in memory, or not to be told in pages of one device.
    pub(crate) fn xfs_extents(&self, inode: u64) -> Result<Option<Vec<Extent>>> {
        let own = self.xfs_inode(inode)?;
        self.fork_extents(inode, own.i_df, &self.kernel.read(own.i_mount)?)
    }

    fn fork_extents(&self, inode: u64, fork: u64, mount: &XfsMount) -> Result<Option<Vec<Extent>>> {
        let fork: Fork = self.kernel.read(fork)?;
        let is_read = match fork.if_format {
            FORMAT_EXTENTS => true,
            FORMAT_BTREE => fork.if_height > 0,
            _ => false,
        };
        if !is_read || u64::from(mount.blocksize) != PAGE_SIZE || mount.m_rtdev_targp != 0 {
            return Ok(None);
        }
        let damaged = || corrupt("xfs_inode", inode, "has a damaged tree of extents");
        if !(0..=MAX_HEIGHT).contains(&fork.if_height) || mount.agblklog >= 32 {
            return Err(damaged());
        }
        let mut records = Vec::new();
        match fork.if_height {
            0 => {}
            // The only leaf has no more room than it needs.
            1 => self.xfs_leaf(fork.data, fork.if_bytes, &mut records)?,
            height => self.xfs_node(inode, fork.data, height, &mut records, &mut Visited::default())?,
        }
        let mut all = Vec::new();
        for (lo, hi) in records {
            let (mut extent, has_block) = extent_of(lo, hi);
            if has_block {
                let group = extent.block >> mount.agblklog;
                let within = extent.block & ((1 << mount.agblklog) - 1);
                extent.block = group.saturating_mul(mount.agblocks.into()).saturating_add(within);
                all.push(extent);
            }
        }
        let is_sorted = |pair: &[Extent]| pair[0].index + pair[0].count <= pair[1].index;
        if !all.windows(2).all(is_sorted) {
            return Err(damaged());
        }
        Ok(Some(all))
    }

    fn xfs_node(
        &self,
        inode: u64,
        addr: u64,
        height: i32,
        records: &mut Vec<(u64, u64)>,
        visited: &mut Visited,
    ) -> Result<()> {
        visited.visit("xfs_iext_node", addr)?;
        let kernel = self.kernel;
        let pointers = kernel.member("xfs_iext_node", "ptrs")?;
        for n in 0..pointers.size / 8 {
            let child = kernel.read_u64(addr.wrapping_add(pointers.offset + n * 8))?;
            if child == 0 {
                break;
            }
            if height > 2 {
                self.xfs_node(inode, child, height - 1, records, visited)?;
            } else {
                self.xfs_leaf(child, kernel.member("xfs_iext_leaf", "recs")?.size, records)?;
            }
            if records.len() > MAX_EXTENTS {
                return Err(corrupt("xfs_inode", inode, "has too many extents"));
            }
        }
        Ok(())
    }

    fn xfs_leaf(&self, addr: u64, bytes: u64, records: &mut Vec<(u64, u64)>) -> Result<()> {
        let len = bytes.min(self.kernel.member("xfs_iext_leaf", "recs")?.size);
        let bytes = self.kernel.read_bytes(addr, len as usize)?;
        let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
        let pairs = bytes
            .as_chunks::<16>()
            .0
            .iter()
            .filter_map(|record| Some((word(record.first_chunk()?), word(record.last_chunk()?))));
        records.extend(pairs.take_while(|(_, hi)| *hi != 0));
        Ok(())
    }

    /// What is beside the inode itself, if it is.
    fn xfs_inline(&self, fork: u64) -> Result<Option<Vec<u8>>> {
        let fork: Fork = self.kernel.read(fork)?;
        if fork.if_format != FORMAT_LOCAL || fork.if_bytes > MAX_INLINE || fork.data == 0 {
            return Ok(None);
        }
        Ok(Some(self.kernel.read_bytes(fork.data, fork.if_bytes as usize)?))
    }

    /// The target of a symbolic link that is short enough to be beside its inode.
    pub(crate) fn xfs_target(&self, inode: u64, len: u64) -> Result<Option<Vec<u8>>> {
        let target = self.xfs_inline(self.xfs_inode(inode)?.i_df)?;
        Ok(target.and_then(|target| Some(target.get(..usize::try_from(len).ok()?)?.to_vec())))
    }

    /// The extended attributes of an inode, if they are beside it.
    pub(crate) fn xfs_xattrs(&self, addr: u64) -> Result<Option<Vec<Xattr>>> {
        let inode = self.xfs_inode(addr)?;
        if inode.i_forkoff == 0 {
            return Ok(Some(Vec::new()));
        }
        let Some(bytes) = self.xfs_inline(inode.i_af)? else { return self.xattr_leaf(addr, &inode) };
        let header = self.kernel.size_of("xfs_attr_sf_hdr")?;
        let count = self.kernel.offset_of("xfs_attr_sf_hdr", "count")?;
        let to_name = self.kernel.offset_of("xfs_attr_sf_entry", "nameval")?;
        let all = short_form(&bytes, header as usize, count as usize, to_name as usize);
        Ok(Some(all.ok_or_else(|| corrupt("xfs_inode", addr, "has damaged extended attributes"))?))
    }
}

impl Autopsy<'_> {
    /// Extended attributes that have one block.
    fn xattr_leaf(&self, addr: u64, inode: &XfsInode) -> Result<Option<Vec<Xattr>>> {
        let mount: XfsMount = self.kernel.read(inode.i_mount)?;
        let Some(extents) = self.fork_extents(addr, inode.i_af, &mount)? else { return Ok(None) };
        let block = match extents.as_slice() {
            [] => return Ok(Some(Vec::new())),
            &[Extent { index: 0, count: 1, block, .. }] => block,
            _ => return Ok(None),
        };
        let Some(bytes) = self.xfs_buffer(inode.i_mount, &mount, block)? else { return Ok(None) };
        let damaged = || corrupt("xfs_inode", addr, "has a damaged block of extended attributes");
        let part = |at: u64, kind, member| self.disk_part_be(&bytes, at, kind, member).ok_or_else(damaged);
        if part(0, "xfs_da3_blkinfo", "hdr.magic")? != ATTR3_LEAF_MAGIC {
            return Ok(None);
        }
        let (first, size) = (
            self.kernel.offset_of("xfs_attr3_leafblock", "entries")?,
            self.kernel.size_of("xfs_attr_leaf_entry")?,
        );
        let to_name = self.kernel.offset_of("xfs_attr_leaf_name_local", "nameval")?;
        let mut all = Vec::new();
        for n in 0..part(0, "xfs_attr3_leaf_hdr", "count")? {
            let entry = |member| part(first + n * size, "xfs_attr_leaf_entry", member);
            let (at, flags) = (entry("nameidx")?, entry("flags")? as u8);
            // The value has blocks of its own.
            if flags & ATTR_LOCAL == 0 {
                return Ok(None);
            }
            let local = |member| part(at, "xfs_attr_leaf_name_local", member);
            let (name, value) = (local("namelen")?, local("valuelen")?);
            let start = (at + to_name) as usize;
            let slice = |from: usize, len: u64| bytes.get(from..from.checked_add(len as usize)?);
            let name = slice(start, name).ok_or_else(damaged)?;
            let value = slice(start + name.len(), value).ok_or_else(damaged)?;
            push_attribute(flags & !ATTR_LOCAL, name, value, &mut all).ok_or_else(damaged)?;
        }
        Ok(Some(all))
    }

    /// A member of an on-disk structure, at most eight bytes, the highest first.
    fn disk_part_be(&self, bytes: &[u8], at: u64, kind: &str, member: &str) -> Option<u64> {
        let size = self.kernel.member(kind, member).ok()?.size;
        let word = self.disk_part(bytes, at, kind, member)?.swap_bytes();
        Some(word >> (64 - 8 * u32::try_from(size).ok().filter(|size| (1..=8).contains(size))?))
    }

    /// A block of the file system that is in its cache of buffers.
    fn xfs_buffer(&self, addr: u64, mount: &XfsMount, block: u64) -> Result<Option<Vec<u8>>> {
        let kernel = self.kernel;
        let group = block.checked_div(mount.agblocks.into());
        let groups = match kernel.has_member("xfs_mount", "m_perags") {
            true => kernel.offset_of("xfs_mount", "m_perags")?,
            false => kernel.offset_of("xfs_mount", "m_perag_tree")?,
        };
        let mut perag = None;
        kernel.xarray_for_each(addr.wrapping_add(groups), MAX_GROUPS, |index, entry| {
            if Some(index) == group {
                perag = entry.pointer();
            }
            Ok(())
        })?;
        let Some(perag) = perag else { return Ok(None) };
        if !self.xfs_buffers.borrow().contains_key(&perag) {
            // If it fails, it would fail again for each inode.
            let buffers = self.buffers_of(perag).map_err(|error| error.to_string());
            self.xfs_buffers.borrow_mut().insert(perag, buffers);
        }
        let known = self.xfs_buffers.borrow();
        let buffers = match known.get(&perag) {
            Some(Ok(buffers)) => buffers,
            Some(Err(why)) => return Err(corrupt("xfs_perag", perag, why.clone())),
            None => return Ok(None),
        };
        let place = block.checked_mul(PAGE_SIZE / BASIC_BLOCK);
        let at = place.and_then(|place| buffers.get(&place));
        Ok(at.map(|at| kernel.read_bytes(*at, PAGE_SIZE as usize)).transpose()?)
    }

    /// The buffers of an allocation group that are whole blocks, by their place on the disk in basic blocks (struct rhashtable,
    /// include/linux/rhashtable-types.h).
    fn buffers_of(&self, perag: u64) -> Result<BTreeMap<u64, u64>> {
        let kernel = self.kernel;
        let hash = match kernel.has_member("xfs_perag", "pag_bcache") {
            true => kernel.offset_of("xfs_perag", "pag_bcache.bc_hash")?,
            false => kernel.offset_of("xfs_perag", "pag_buf_hash")?,
        };
        let table = perag.wrapping_add(hash + kernel.offset_of("rhashtable", "tbl")?);
        let table = kernel.read_u64(table)?;
        let buckets: Buckets = kernel.read(table)?;
        if buckets.size > MAX_BUCKETS || buckets.nest != 0 {
            return Err(corrupt("bucket_table", table, format!("has {} buckets", buckets.size)));
        }
        let to_node = kernel.offset_of("xfs_buf", "b_rhash_head")?;
        let mut all = BTreeMap::new();
        let mut visited = Visited::default();
        for n in 0..u64::from(buckets.size) {
            // The lowest bit is a lock in a bucket, and marks the end of a chain.
            let mut node = kernel.read_u64(buckets.buckets.wrapping_add(n * 8))? & !1;
            while node != 0 && node & 1 == 0 {
                if all.len() > MAX_BUFFERS {
                    return Err(corrupt("bucket_table", table, "has too many buffers"));
                }
                visited.visit("xfs_buf", node)?;
                let buffer: Buffer = kernel.read(node.wrapping_sub(to_node))?;
                let is_whole = u64::try_from(buffer.b_length) == Ok(PAGE_SIZE / BASIC_BLOCK);
                if is_whole && buffer.b_flags & XBF_DONE != 0 && buffer.b_addr != 0 {
                    all.insert(buffer.b_rhash_key, buffer.b_addr);
                }
                node = kernel.read_u64(node)?;
            }
        }
        Ok(all)
    }
}

/// An extent with its block as the file system counts them, and whether it has one.
fn extent_of(lo: u64, hi: u64) -> (Extent, bool) {
    let rest = hi >> REST_SHIFT << LOW_BLOCK_BITS;
    let block = lo >> OFFSET_BITS | rest;
    let extent = Extent {
        index: lo & ((1 << OFFSET_BITS) - 1),
        count: hi & ((1 << LENGTH_BITS) - 1),
        block,
        written: hi >> LENGTH_BITS & 1 == 0,
    };
    (extent, block & NO_BLOCK != NO_BLOCK)
}

/// Attributes in the short form: length of name, of value, flags, name, value.
fn short_form(bytes: &[u8], header: usize, count: usize, to_name: usize) -> Option<Vec<Xattr>> {
    let mut all = Vec::new();
    let mut rest = bytes.get(header..)?;
    for _ in 0..*bytes.get(count)? {
        let [name_len, value_len, flags, ..] = *rest else { return None };
        let (name, behind) = rest.get(to_name..)?.split_at_checked(name_len.into())?;
        let (value, behind) = behind.split_at_checked(value_len.into())?;
        push_attribute(flags, name, value, &mut all)?;
        rest = behind;
    }
    Some(all)
}

/// Appends what programs see of an attribute. `None` if it is a damaged access control list.
fn push_attribute(flags: u8, name: &[u8], value: &[u8], all: &mut Vec<Xattr>) -> Option<()> {
    let acl = match name {
        b"SGI_ACL_FILE" => Some(ACL_ACCESS),
        b"SGI_ACL_DEFAULT" => Some(ACL_DEFAULT),
        _ => None,
    };
    let prefix: &[u8] = match flags {
        0 => b"user.",
        ATTR_ROOT => b"trusted.",
        ATTR_SECURE => b"security.",
        // Incomplete ones, and such as are the file system's own.
        _ => return Some(()),
    };
    all.push(match acl.filter(|_| flags == ATTR_ROOT) {
        Some(acl) => Xattr { name: acl.into(), value: Bytes(acl_of_xfs(value)?) },
        None => Xattr { name: Bytes([prefix, name].concat()), value: Bytes(value.to_vec()) },
    });
    Some(())
}

/// The usual form of an access control list from XFS's (struct xfs_acl, big-endian). `None` if it is damaged.
fn acl_of_xfs(value: &[u8]) -> Option<Vec<u8>> {
    let (count, rest) = value.split_first_chunk::<4>()?;
    let (entries, behind) = rest.as_chunks::<12>();
    if !behind.is_empty() || entries.len() != u32::from_be_bytes(*count) as usize {
        return None;
    }
    let entry = |[t0, t1, t2, t3, i0, i1, i2, i3, p0, p1, ..]: &[u8; 12]| {
        let tag = u16::try_from(u32::from_be_bytes([*t0, *t1, *t2, *t3])).ok()?;
        Some((tag, u16::from_be_bytes([*p0, *p1]), u32::from_be_bytes([*i0, *i1, *i2, *i3])))
    };
    Some(acl_of(&entries.iter().map(entry).collect::<Option<Vec<_>>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_an_offset_a_length_and_a_block() {
        let record = |index: u64, count: u64, block: u64, unwritten: u64| {
            let lo = index | block << OFFSET_BITS;
            (lo, count | unwritten << LENGTH_BITS | block >> LOW_BLOCK_BITS << REST_SHIFT)
        };
        let (lo, hi) = record(7, 100, 0x12_3456_789a, 0);
        let extent = Extent { index: 7, count: 100, block: 0x12_3456_789a, written: true };
        assert_eq!(extent_of(lo, hi), (extent, true));
        let (lo, hi) = record(1 << 40, 1, 5, 1);
        assert_eq!(extent_of(lo, hi), (Extent { index: 1 << 40, count: 1, block: 5, written: false }, true));
        let (lo, hi) = record(0, 16, NO_BLOCK | 3, 0);
        assert!(!extent_of(lo, hi).1, "to be allocated when it is written");
    }

    /// A chain that goes round would add no new buffer, and so never be too long.
    #[test]
    fn a_chain_of_buffers_that_goes_round_ends() {
        use crate::testing::{declare, open};
        use synth::{PTR, Record, Synth, U64, array, named};

        let mut synth = Synth::new();
        synth.structure("rhashtable", Record::new().field("tbl", PTR));
        synth.structure("xfs_perag", Record::new().field("pag_buf_hash", named("rhashtable")));
        declare::<Buckets>(&mut synth, &[("buckets", array(U64, 2))]);
        declare::<Buffer>(&mut synth, &[("b_rhash_head", U64)]);
        let (perag, table) = (synth.alloc("xfs_perag"), synth.alloc("bucket_table"));
        let (one, two) = (synth.alloc("xfs_buf"), synth.alloc("xfs_buf"));
        synth.set("xfs_perag", perag, "pag_buf_hash.tbl", table);
        synth.set("bucket_table", table, "size", 1);
        let node = |synth: &Synth, buffer| synth.address_of("xfs_buf", buffer, "b_rhash_head");
        let (first, second) = (node(&synth, one), node(&synth, two));
        synth.set("bucket_table", table, "buckets[0]", first);
        synth.write_u64(first, second);
        let buffers = |synth: &Synth| {
            let kernel = open(synth);
            Autopsy::new(&kernel).buffers_of(perag).map(|buffers| buffers.len()).map_err(|e| e.to_string())
        };
        assert_eq!(buffers(&synth), Ok(0));
        synth.write_u64(second, first);
        assert!(buffers(&synth).unwrap_err().contains("comes up twice"));
    }

    #[test]
    fn short_attributes_are_read_one_after_the_other() {
        let mut bytes = vec![0, 0, 3, 0];
        bytes.extend([6, 3, 0]);
        bytes.extend(b"colourred");
        bytes.extend([5, 0, 2]);
        bytes.extend(b"empty");
        bytes.extend([3, 1, 128]);
        bytes.extend(b"halfx");
        let read = |bytes: &[u8]| short_form(bytes, 4, 2, 3);
        let xattr = |name: &str, value: &str| Xattr { name: name.into(), value: value.into() };
        assert!(
            read(&bytes).is_some_and(|all| all == [xattr("user.colour", "red"), xattr("trusted.empty", "")])
        );
        assert_eq!(read(&bytes[..bytes.len() - 3]), None, "cut short");
        assert_eq!(read(&[0, 0, 1, 0]), None);
        assert_eq!(read(&[0, 0, 0, 0]), Some(Vec::new()));
    }

    #[test]
    fn access_control_lists_get_their_other_form() {
        let mut bytes = vec![0, 0, 0, 1];
        bytes.extend([0, 0, 0, 2, 0, 0, 4, 210, 0, 5, 0, 0]);
        assert_eq!(acl_of_xfs(&bytes).unwrap(), [2, 0, 0, 0, 2, 0, 5, 0, 210, 4, 0, 0]);
        bytes[3] = 2;
        assert_eq!(acl_of_xfs(&bytes), None, "one is missing");
    }
}
