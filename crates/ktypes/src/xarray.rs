//! XArrays, such as the page cache of a file (include/linux/xarray.h, lib/xarray.c; 6.1 to 6.12).

use std::collections::HashSet;

use crate::{Corruption, Error, Kernel, Member, Result};

/// 64 bits of index at 6 (or, CONFIG_BASE_SMALL, 4) bits a level.
const MAX_DEPTH: usize = 16;
/// XA_MAX_MARKS.
const MAX_MARKS: usize = 3;

/// An entry of an xarray.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XaEntry {
    /// As it stands in the array.
    pub raw: u64,
    /// The last index that it covers: more than the first for multi-order entries (large folios).
    pub last: u64,
    /// Bit n: mark n is set. For the page cache mark 0 is dirty, 1 write-back, 2 to-write.
    pub marks: u8,
}

impl XaEntry {
    /// The pointer, unless it is a value or one of the array's own.
    pub fn pointer(&self) -> Option<u64> {
        (self.raw & 1 == 0 && !is_internal(self.raw)).then_some(self.raw)
    }

    /// The value: swap entries and shadows of evicted pages, in page caches.
    pub fn value(&self) -> Option<u64> {
        (self.raw & 1 != 0).then_some(self.raw >> 1)
    }
}

/// The page cache's mark for dirty pages (PAGECACHE_TAG_DIRTY, XA_MARK_0).
pub const MARK_DIRTY: u32 = 0;
/// Its mark for pages that are being written (PAGECACHE_TAG_WRITEBACK, XA_MARK_1).
pub const MARK_WRITEBACK: u32 = 1;

impl Kernel {
    /// Calls `f(first index, entry)` for each entry of a `struct xarray` that is not NULL, in
    /// ascending order. Values are passed on (see [`XaEntry::value`]); zero and retry entries are
    /// not.
    ///
    /// # Errors
    /// [`Error::CorruptTree`] if there are more than `max` entries or the tree leads where no node
    /// can be. Also whatever `f` fails with.
    pub fn xarray_for_each(
        &self,
        xa_addr: u64,
        max: usize,
        mut f: impl FnMut(u64, XaEntry) -> Result<()>,
    ) -> Result<()> {
        let array = self.xarray(xa_addr, max)?;
        let mut walk = array;
        let head = walk.head;
        match head {
            0 => Ok(()),
            _ if is_node(head) => walk.node(head, 0, None, 0, &mut f),
            _ if is_internal(head) => Ok(()),
            // A single entry at index 0; its marks are in the array's flags.
            _ => {
                let mut marks = 0;
                for mark in 0..MAX_MARKS as u32 {
                    marks |= u8::from(walk.head_marked(mark)) << mark;
                }
                f(0, XaEntry { raw: head, last: 0, marks })
            }
        }
    }

    /// Whether any entry has a mark (0 to 2): `xa_marked()`. Looks at one node only.
    pub fn xarray_marked(&self, xa_addr: u64, mark: u32) -> Result<bool> {
        let walk = self.xarray(xa_addr, 0)?;
        if mark as usize >= MAX_MARKS {
            return Ok(false);
        }
        if !is_node(walk.head) {
            return Ok(walk.head != 0 && walk.head_marked(mark));
        }
        // Marks are passed up: a node's slot is marked if anything below it is.
        let node = walk.read_node(walk.head)?;
        Ok((0..walk.shape.slots).any(|slot| walk.marked(&node, mark as usize, slot)))
    }

    /// Whether any page of a page cache (`address_space.i_pages`) is dirty.
    pub fn xarray_dirty(&self, xa_addr: u64) -> Result<bool> {
        self.xarray_marked(xa_addr, MARK_DIRTY)
    }

    /// Whether any page of a page cache was being written.
    pub fn xarray_under_writeback(&self, xa_addr: u64) -> Result<bool> {
        self.xarray_marked(xa_addr, MARK_WRITEBACK)
    }

    fn xarray(&self, xa_addr: u64, max: usize) -> Result<Walk<'_>> {
        let shape = self.xarray_shape()?;
        Ok(Walk {
            kernel: self,
            shape,
            root: xa_addr,
            head: self.read_u64(xa_addr.wrapping_add(shape.xa_head))?,
            flags: self.read_u32(xa_addr.wrapping_add(shape.xa_flags))?,
            max,
            entries: 0,
            seen: HashSet::new(),
        })
    }

    fn xarray_shape(&self) -> Result<&Shape> {
        if let Some(shape) = self.xarray.get() {
            return Ok(shape);
        }
        let slots = self.member("xa_node", "slots")?;
        // `marks` shares its place with `tags`, the older name.
        let marks = self.member("xa_node", "marks").or_else(|_| self.member("xa_node", "tags"))?;
        // The marks in the flags begin above the allocation flags. Their number is an enumerator
        // since 6.10; before, __GFP_BITS_SHIFT was 27, and 28 with CONFIG_LOCKDEP.
        let gfp_bits = match self.enum_value("___GFP_LAST_BIT") {
            Ok(bits) => bits as u32,
            Err(_) if self.symbol_opt("lockdep_init_map_type").is_some() => 28,
            Err(_) => 27,
        };
        let shape = Shape {
            xa_head: self.offset_of("xarray", "xa_head")?,
            xa_flags: self.offset_of("xarray", "xa_flags")?,
            gfp_bits,
            node_size: self.size_of("xa_node")?.min(MAX_NODE as u64) as usize,
            shift: self.offset_of("xa_node", "shift")? as usize,
            slot: slots.offset as usize,
            slots: (slots.size / 8).min(64) as usize,
            marks,
        };
        Ok(self.xarray.get_or_init(|| shape))
    }
}

/// A node has 576 bytes.
const MAX_NODE: usize = 1024;

/// Where things are in an array and in a node.
#[derive(Debug)]
pub(crate) struct Shape {
    xa_head: u64,
    xa_flags: u64,
    gfp_bits: u32,
    node_size: usize,
    shift: usize,
    slot: usize,
    slots: usize,
    marks: Member,
}

struct Walk<'k> {
    kernel: &'k Kernel,
    shape: &'k Shape,
    root: u64,
    head: u64,
    flags: u32,
    max: usize,
    entries: usize,
    /// Nodes that were there already: none has its place twice.
    seen: HashSet<u64>,
}

impl Walk<'_> {
    fn corrupt(&self, why: Corruption) -> Error {
        Error::CorruptTree { kind: "xarray", root: self.root, why }
    }

    fn head_marked(&self, mark: u32) -> bool {
        self.flags.checked_shr(self.shape.gfp_bits + mark).is_some_and(|flags| flags & 1 != 0)
    }

    fn read_node(&self, tagged: u64) -> Result<[u8; MAX_NODE]> {
        let node = tagged - 2;
        let mut bytes = [0; MAX_NODE];
        self.kernel
            .read_into(node, &mut bytes[..self.shape.node_size])
            .map_err(|error| self.corrupt(Corruption::WildPointer { node, why: error.to_string() }))?;
        Ok(bytes)
    }

    fn word(&self, node: &[u8], at: usize) -> u64 {
        node.get(at..).and_then(|tail| tail.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn marked(&self, node: &[u8], mark: usize, slot: usize) -> bool {
        let per_mark = self.shape.marks.size as usize / MAX_MARKS;
        let at = self.shape.marks.offset as usize + mark * per_mark + slot / 8;
        node.get(at).is_some_and(|byte| byte >> (slot % 8) & 1 != 0)
    }

    /// Visits a node whose first index is `base`; `above` is the shift of its parent.
    fn node(
        &mut self,
        tagged: u64,
        base: u64,
        above: Option<u32>,
        depth: usize,
        f: &mut dyn FnMut(u64, XaEntry) -> Result<()>,
    ) -> Result<()> {
        let bad = |why: &str| Corruption::BadNode { node: tagged - 2, why: why.to_owned() };
        if depth >= MAX_DEPTH {
            return Err(self.corrupt(Corruption::TooDeep { max: MAX_DEPTH }));
        }
        let node = self.read_node(tagged)?;
        let shift = u32::from(node.get(self.shape.shift).copied().unwrap_or(u8::MAX));
        // Each level has as many bits of the index as number its slots.
        let bits = self.shape.slots.trailing_zeros();
        let fits = match above {
            Some(above) => shift + bits == above,
            None => bits > 0 && shift.is_multiple_of(bits),
        };
        if shift >= 64 || !fits {
            return Err(self.corrupt(bad("has a shift that does not fit its place")));
        }
        if !self.seen.insert(tagged) {
            return Err(self.corrupt(Corruption::Cycle { node: tagged - 2 }));
        }
        // Every node has an entry below it somewhere, save for one that was just emptied.
        if self.seen.len() > self.max.saturating_mul(2).saturating_add(64) {
            return Err(self.corrupt(bad("is one of too many nodes without entries")));
        }
        let mut slot = 0;
        while slot < self.shape.slots {
            let entry = self.word(&node, self.shape.slot + slot * 8);
            let first = base.wrapping_add((slot as u64) << shift);
            // Slots that belong to the same entry follow it as siblings: internal entries that hold
            // the number of its slot.
            let mut next = slot + 1;
            let sibling = (slot as u64) << 2 | 2;
            while next < self.shape.slots && self.word(&node, self.shape.slot + next * 8) == sibling {
                next += 1;
            }
            if is_node(entry) {
                self.node(entry, first, Some(shift), depth + 1, f)?;
            } else if entry != 0 && !is_internal(entry) {
                if self.entries >= self.max {
                    return Err(self.corrupt(Corruption::TooLong { max: self.max }));
                }
                self.entries += 1;
                let covered = ((next - slot) as u64) << shift;
                let mut marks = 0;
                for mark in 0..MAX_MARKS {
                    marks |= u8::from(self.marked(&node, mark, slot)) << mark;
                }
                let last = first.wrapping_add(covered.wrapping_sub(1));
                f(first, XaEntry { raw: entry, last, marks })?;
            }
            slot = next;
        }
        Ok(())
    }
}

fn is_internal(entry: u64) -> bool {
    entry & 3 == 2
}

fn is_node(entry: u64) -> bool {
    is_internal(entry) && entry > 4096
}
