//! Extended attributes, access control lists included: of ext4 from the inode table and the blocks beside it (struct ext4_xattr_entry,
//! fs/ext4/xattr.h; struct ext4_acl_header, fs/ext4/acl.h), which are in the block device's page cache before they are on the disk; of XFS in [`crate::xfs`]; of tmpfs from
//! memory (struct simple_xattr, include/linux/xattr.h: a list in 6.1, a tree in 6.12; struct posix_acl, include/linux/posix_acl.h).

use ktypes::KernelType;
use snapshot::{Bytes, Xattr};
use vmcore::PAGE_SIZE;

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// EXT4_XATTR_MAGIC.
const MAGIC: u64 = 0xea02_0000;
/// EXT4_GOOD_OLD_INODE_SIZE: what is behind that has its length in the inode.
const OLD_INODE: u64 = 128;
/// Of one inode.
const MAX_XATTRS: usize = 1 << 12;
/// XATTR_SIZE_MAX, XATTR_NAME_MAX.
const MAX_VALUE: u64 = 64 << 10;
const MAX_NAME: usize = 256;
/// POSIX_ACL_XATTR_VERSION, EXT4_ACL_VERSION.
const ACL_VERSION: u32 = 2;
const EXT4_ACL_VERSION: u32 = 1;
// Tags of entries of an access control list.
const ACL_USER: u16 = 0x02;
const ACL_GROUP: u16 = 0x08;
const ACL_UNDEFINED_ID: u32 = u32::MAX;
pub(crate) const ACL_ACCESS: &str = "system.posix_acl_access";
pub(crate) const ACL_DEFAULT: &str = "system.posix_acl_default";

#[derive(KernelType)]
#[kernel("inode")]
struct InodeOnDisk {
    i_ino: u64,
    i_sb: u64,
}

#[derive(KernelType)]
#[kernel("super_block")]
struct SuperBlock {
    s_blocksize: u64,
    s_bdev: u64,
    s_fs_info: u64,
}

#[derive(KernelType)]
#[kernel("ext4_sb_info")]
struct Ext4SuperBlock {
    s_desc_size: u64,
    s_inodes_per_block: u64,
    s_inodes_per_group: u64,
    s_desc_per_block: u64,
    s_groups_count: u32,
    s_inode_size: u32,
    s_group_desc: u64,
}

#[derive(KernelType)]
#[kernel("ext4_inode_info")]
struct Ext4Inode {
    i_file_acl: u64,
    i_extra_isize: u16,
}

#[derive(KernelType)]
#[kernel("simple_xattr")]
struct SimpleXattr {
    name: u64,
    size: u64,
    #[kernel(address)]
    value: u64,
}

#[derive(KernelType)]
#[kernel("inode")]
struct Acls {
    i_acl: u64,
    i_default_acl: u64,
}

#[derive(KernelType)]
#[kernel("posix_acl")]
struct PosixAcl {
    a_count: u32,
    #[kernel(address)]
    a_entries: u64,
}

#[derive(KernelType)]
#[kernel("posix_acl_entry")]
struct PosixAclEntry {
    e_tag: i16,
    e_perm: u16,
    #[kernel("e_uid.val")]
    id: u32,
}

impl Autopsy<'_> {
    /// The extended attributes of an inode, by name; `None` if not all of them are known, and they are as the file system has them.
    pub(crate) fn xattrs(&self, inode: u64, fs_type: &Bytes) -> Result<Option<Vec<Xattr>>> {
        let mut all = match fs_type.as_bytes() {
            b"ext4" => self.ext4_xattrs(inode)?,
            b"xfs" => self.xfs_xattrs(inode)?,
            b"tmpfs" => Some(self.simple_xattrs(inode)?),
            _ => None,
        };
        if let Some(all) = &mut all {
            all.sort_by(|a, b| a.name.cmp(&b.name));
        }
        Ok(all)
    }

    fn ext4_xattrs(&self, addr: u64) -> Result<Option<Vec<Xattr>>> {
        let kernel = self.kernel;
        let inode: InodeOnDisk = kernel.read(addr)?;
        let sb: SuperBlock = kernel.read(inode.i_sb)?;
        if sb.s_blocksize != PAGE_SIZE {
            return Ok(None);
        }
        let own: Ext4Inode = kernel.read(self.ext4_inode(addr)?)?;
        let info: Ext4SuperBlock = kernel.read(sb.s_fs_info)?;
        let Some(raw) = self.raw_inode(&inode, &sb, &info)? else { return Ok(None) };
        let mut all = Vec::new();
        let extra = u64::from(own.i_extra_isize);
        if OLD_INODE + extra + 4 <= raw.len() as u64 && extra > 0 {
            let area = raw.get((OLD_INODE + extra) as usize..).unwrap_or_default();
            if self.disk_part(area, 0, "ext4_xattr_ibody_header", "h_magic") == Some(MAGIC) {
                let first = kernel.size_of("ext4_xattr_ibody_header")?;
                if !self.xattr_entries(addr, area, first, first, &mut all)? {
                    return Ok(None);
                }
            }
        }
        if own.i_file_acl != 0 {
            let Some(block) = self.block(sb.s_bdev, own.i_file_acl)? else { return Ok(None) };
            if self.disk_part(&block, 0, "ext4_xattr_header", "h_magic") != Some(MAGIC) {
                return Err(corrupt("inode", addr, "has a damaged block of extended attributes"));
            }
            let first = kernel.size_of("ext4_xattr_header")?;
            if !self.xattr_entries(addr, &block, first, 0, &mut all)? {
                return Ok(None);
            }
        }
        Ok(Some(all))
    }

    /// An inode as it is in the inode table (ext4_get_inode_loc(), fs/ext4/inode.c), if that is in memory.
    fn raw_inode(
        &self,
        inode: &InodeOnDisk,
        sb: &SuperBlock,
        info: &Ext4SuperBlock,
    ) -> Result<Option<Vec<u8>>> {
        let kernel = self.kernel;
        let damaged =
            || corrupt("super_block", inode.i_sb, format!("has no place for inode {}", inode.i_ino));
        let index = inode.i_ino.checked_sub(1).ok_or_else(damaged)?;
        let group = index.checked_div(info.s_inodes_per_group).ok_or_else(damaged)?;
        let within = index % info.s_inodes_per_group;
        if group >= info.s_groups_count.into() || info.s_desc_size > PAGE_SIZE {
            return Err(damaged());
        }
        let nth = group.checked_div(info.s_desc_per_block).ok_or_else(damaged)?;
        let buffer = kernel.read_u64(info.s_group_desc.wrapping_add(nth * 8))?;
        let data = kernel.read_u64(buffer.wrapping_add(kernel.offset_of("buffer_head", "b_data")?))?;
        let at = data.wrapping_add(group % info.s_desc_per_block * info.s_desc_size);
        let descriptor = kernel.read_bytes(at, info.s_desc_size as usize)?;
        let field = |member| self.disk_part(&descriptor, 0, "ext4_group_desc", member);
        // Descriptors of 32 bytes have no high half.
        let table =
            field("bg_inode_table_lo").ok_or_else(damaged)? | field("bg_inode_table_hi").unwrap_or(0) << 32;
        let nth = within.checked_div(info.s_inodes_per_block).ok_or_else(damaged)?;
        let Some(block) = self.block(sb.s_bdev, table.saturating_add(nth))? else { return Ok(None) };
        let size = info.s_inode_size as usize;
        let start = (within % info.s_inodes_per_block) as usize * size;
        let raw = start.checked_add(size).and_then(|end| block.get(start..end)).ok_or_else(damaged)?;
        Ok(Some(raw.to_vec()))
    }

    /// The entries from `first` on, with values that are counted from `base`; false if one of them has its value elsewhere.
    fn xattr_entries(
        &self,
        inode: u64,
        area: &[u8],
        first: u64,
        base: u64,
        all: &mut Vec<Xattr>,
    ) -> Result<bool> {
        const ENTRY: &str = "ext4_xattr_entry";
        let damaged = || corrupt("inode", inode, "has damaged extended attributes");
        let to_name = self.kernel.offset_of(ENTRY, "e_name")?;
        let mut at = first;
        loop {
            let start = usize::try_from(at).map_err(|_| damaged())?;
            // IS_LAST_ENTRY: four bytes of zero, or the end.
            match area.get(start..start.saturating_add(4)) {
                None | Some([0, 0, 0, 0]) => return Ok(true),
                Some(_) => {}
            }
            if all.len() >= MAX_XATTRS {
                return Err(damaged());
            }
            let field = |member| self.disk_part(area, at, ENTRY, member).ok_or_else(damaged);
            let (name_len, index, size) =
                (field("e_name_len")?, field("e_name_index")?, field("e_value_size")?);
            if field("e_value_inum")? != 0 {
                return Ok(false);
            }
            let slice = |from: u64, len: u64| {
                let (from, len) = (usize::try_from(from).ok()?, usize::try_from(len).ok()?);
                area.get(from..from.checked_add(len)?)
            };
            let name = slice(at + to_name, name_len).ok_or_else(damaged)?;
            let value = match size {
                0 => &[],
                _ => slice(base + field("e_value_offs")?, size).ok_or_else(damaged)?,
            };
            match prefix(index) {
                // Of no concern to programs: contents in the inode, keys.
                None => {}
                Some(known @ (ACL_ACCESS | ACL_DEFAULT)) => {
                    let value = Bytes(acl_of_ext4(value).ok_or_else(damaged)?);
                    all.push(Xattr { name: known.into(), value });
                }
                Some(prefix) => {
                    let name = Bytes([prefix.as_bytes(), name].concat());
                    all.push(Xattr { name, value: Bytes(value.to_vec()) });
                }
            }
            at += (to_name + name_len).next_multiple_of(4);
        }
    }

    fn simple_xattrs(&self, inode: u64) -> Result<Vec<Xattr>> {
        let kernel = self.kernel;
        let info = inode.wrapping_sub(kernel.offset_of("shmem_inode_info", "vfs_inode")?);
        let xattrs = info.wrapping_add(kernel.offset_of("shmem_inode_info", "xattrs")?);
        let mut found = Vec::new();
        if kernel.has_member("simple_xattrs", "rb_root") {
            let to_node = kernel.offset_of("simple_xattr", "rb_node")?;
            for node in kernel.rb_tree(xattrs, MAX_XATTRS) {
                found.push(node?.wrapping_sub(to_node));
            }
        } else {
            let to_node = kernel.offset_of("simple_xattr", "list")?;
            for node in kernel.list_head(xattrs, MAX_XATTRS) {
                found.push(node?.wrapping_sub(to_node));
            }
        }
        let mut all = Vec::new();
        for addr in found {
            let xattr: SimpleXattr = kernel.read(addr)?;
            if xattr.size > MAX_VALUE {
                return Err(corrupt("simple_xattr", addr, format!("has {} bytes", xattr.size)));
            }
            let name = Bytes(kernel.read_cstr(xattr.name, MAX_NAME)?);
            all.push(Xattr { name, value: Bytes(kernel.read_bytes(xattr.value, xattr.size as usize)?) });
        }
        let acls: Acls = kernel.read(inode)?;
        for (name, acl) in [(ACL_ACCESS, acls.i_acl), (ACL_DEFAULT, acls.i_default_acl)] {
            // ACL_NOT_CACHED and its like are no addresses.
            if acl != 0 && acl < u64::MAX - 16 {
                all.push(Xattr { name: name.into(), value: Bytes(self.posix_acl(acl)?) });
            }
        }
        Ok(all)
    }

    fn posix_acl(&self, addr: u64) -> Result<Vec<u8>> {
        let acl: PosixAcl = self.kernel.read(addr)?;
        if acl.a_count as usize > MAX_XATTRS {
            return Err(corrupt("posix_acl", addr, format!("has {} entries", acl.a_count)));
        }
        let size = self.kernel.size_of("posix_acl_entry")?;
        let mut entries = Vec::new();
        for n in 0..u64::from(acl.a_count) {
            let entry: PosixAclEntry = self.kernel.read(acl.a_entries.wrapping_add(n * size))?;
            entries.push((entry.e_tag as u16, entry.e_perm, entry.id));
        }
        Ok(acl_of(&entries))
    }
}

/// What ext4's e_name_index stands for (EXT4_XATTR_INDEX_*).
fn prefix(index: u64) -> Option<&'static str> {
    match index {
        1 => Some("user."),
        2 => Some(ACL_ACCESS),
        3 => Some(ACL_DEFAULT),
        4 => Some("trusted."),
        6 => Some("security."),
        _ => None,
    }
}

/// An access control list as programs see it (struct posix_acl_xattr_header, include/uapi/linux/posix_acl_xattr.h), from tags, permissions and ids.
pub(crate) fn acl_of(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = ACL_VERSION.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        let id = if matches!(*tag, ACL_USER | ACL_GROUP) { *id } else { ACL_UNDEFINED_ID };
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// The same from ext4's form, in which only users and groups have an id. `None` if it is damaged.
fn acl_of_ext4(value: &[u8]) -> Option<Vec<u8>> {
    let (version, mut rest) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != EXT4_ACL_VERSION {
        return None;
    }
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (tag, behind) = rest.split_first_chunk::<2>()?;
        let (permissions, behind) = behind.split_first_chunk::<2>()?;
        let tag = u16::from_le_bytes(*tag);
        let has_id = matches!(tag, ACL_USER | ACL_GROUP);
        let (id, behind) = match has_id {
            true => behind.split_first_chunk::<4>().map(|(id, behind)| (u32::from_le_bytes(*id), behind))?,
            false => (ACL_UNDEFINED_ID, behind),
        };
        entries.push((tag, u16::from_le_bytes(*permissions), id));
        rest = behind;
    }
    Some(acl_of(&entries))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::open;
    use synth::{Record, Synth, U8, U16, U32, array};

    fn synth() -> Synth {
        let mut synth = Synth::new();
        let entry = Record::new().field("e_name_len", U8).field("e_name_index", U8);
        let entry = entry.field("e_value_offs", U16).field("e_value_inum", U32).field("e_value_size", U32);
        synth.structure("ext4_xattr_entry", entry.field("e_hash", U32).field("e_name", array(U8, 0)));
        synth
    }

    fn entry(index: u8, name: &str, offset: u16, size: u32) -> Vec<u8> {
        let mut bytes = vec![name.len() as u8, index];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn read(area: &[u8]) -> Result<(bool, Vec<Xattr>)> {
        let kernel = open(&synth());
        let mut all = Vec::new();
        let whole = Autopsy::new(&kernel).xattr_entries(1, area, 4, 4, &mut all)?;
        Ok((whole, all))
    }

    /// Two entries behind a header of four bytes, and their values at the end of 128.
    fn area() -> Vec<u8> {
        let mut area = vec![0; 4];
        area.extend(entry(1, "colour", 100, 3));
        area.extend(entry(6, "empty", 0, 0));
        area.resize(128, 0);
        area[104..107].copy_from_slice(b"red");
        area
    }

    #[test]
    fn entries_are_read_up_to_the_first_empty_one() {
        let xattr = |name: &str, value: &str| Xattr { name: name.into(), value: value.into() };
        let (whole, all) = read(&area()).unwrap();
        assert!(whole);
        assert_eq!(all, [xattr("user.colour", "red"), xattr("security.empty", "")]);
        assert_eq!(read(&[0; 4]).unwrap().1, [], "none");
    }

    #[test]
    fn damaged_entries_are_errors_and_values_elsewhere_are_not_known() {
        let mut bytes = area();
        bytes[6] = 127;
        assert!(read(&bytes).is_err(), "a value behind the end");
        let mut bytes = area();
        bytes[4] = 255;
        assert!(read(&bytes).is_err(), "a name behind the end");
        let mut bytes = area();
        bytes[8] = 1;
        assert!(!read(&bytes).unwrap().0);
    }

    #[test]
    fn access_control_lists_get_their_other_form() {
        let mut ext4 = 1u32.to_le_bytes().to_vec();
        ext4.extend([1, 0, 7, 0]);
        ext4.extend([2, 0, 5, 0, 0xe8, 3, 0, 0]);
        let wanted = [2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 5, 0, 0xe8, 3, 0, 0];
        assert_eq!(acl_of_ext4(&ext4).unwrap(), wanted);
        assert_eq!(acl_of_ext4(&ext4[..ext4.len() - 1]), None, "cut short");
        assert_eq!(acl_of_ext4(&[2, 0, 0, 0]), None, "another version");
    }
}
