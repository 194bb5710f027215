//! Maple trees (include/linux/maple_tree.h, lib/maple_tree.c; the same from 6.1 to 6.12).

use std::collections::HashSet;

use crate::{Corruption, Error, Kernel, Result};

/// MAPLE_HEIGHT_MAX.
const MAX_DEPTH: usize = 31;
/// Node pointers carry the type of the node in the low bits: nodes are aligned to 256 bytes.
const NODE_MASK: u64 = 255;
const TYPE_SHIFT: u32 = 3;
const TYPE_MASK: u64 = 15;
/// Entries below with the low bits `10` are the tree's own (MAPLE_RESERVED_RANGE).
const RESERVED: u64 = 4096;

impl Kernel {
    /// Calls `f(first, last, entry)` for each entry of a `struct maple_tree` that is not NULL, in
    /// ascending order; `first..=last` are the indices that it covers. For the VMAs of a process
    /// the indices are addresses and the entries `vm_area_struct`s.
    ///
    /// # Errors
    /// [`Error::CorruptTree`] if the tree has more than `max` entries, is deeper than 31 levels,
    /// has indices that do not ascend, or leads where no node can be. Also whatever `f` fails with.
    pub fn maple_for_each(
        &self,
        mt_addr: u64,
        max: usize,
        mut f: impl FnMut(u64, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let root = self.read_u64(mt_addr.wrapping_add(self.offset_of("maple_tree", "ma_root")?))?;
        if !is_node(root) {
            // A single entry at index 0 stands in the root itself.
            return if root == 0 || is_reserved(root) { Ok(()) } else { f(0, 0, root) };
        }
        let mut walk = Walk {
            kernel: self,
            shapes: self.maple_shapes()?,
            root: mt_addr,
            max,
            entries: 0,
            seen: HashSet::new(),
            f: &mut f,
        };
        // The root's own tag is one bit more; the type is where it always is.
        walk.node(root, 0, u64::MAX, 0)
    }

    fn maple_shapes(&self) -> Result<&Shapes> {
        if let Some(shapes) = self.maple.get() {
            return Ok(shapes);
        }
        let shape = |name: &str| -> Result<Shape> {
            let pivots = self.member(name, "pivot")?;
            let slots = self.member(name, "slot")?;
            Ok(Shape {
                pivot: pivots.offset as usize,
                slot: slots.offset as usize,
                slots: (slots.size / 8) as usize,
            })
        };
        let kind = |name| self.enum_value_in("maple_type", name).map(|value| value as u64);
        let dense = self.member("maple_node", "slot")?;
        let shapes = Shapes {
            node_size: self.size_of("maple_node")?.min(MAX_NODE as u64) as usize,
            dense: Shape { pivot: 0, slot: dense.offset as usize, slots: (dense.size / 8) as usize },
            range: shape("maple_range_64")?,
            arange: shape("maple_arange_64")?,
            types: [
                kind("maple_dense")?,
                kind("maple_leaf_64")?,
                kind("maple_range_64")?,
                kind("maple_arange_64")?,
            ],
        };
        Ok(self.maple.get_or_init(|| shapes))
    }
}

/// A node has 256 bytes; twice that would do, should it ever grow.
const MAX_NODE: usize = 1024;

/// The kinds of nodes.
#[derive(Debug)]
pub(crate) struct Shapes {
    node_size: usize,
    dense: Shape,
    range: Shape,
    arange: Shape,
    /// The numbers of dense, leaf_64, range_64, arange_64.
    types: [u64; 4],
}

/// Where the arrays of a node are, in bytes from its start, and how many slots it has; there is
/// one pivot less.
#[derive(Debug, Clone, Copy)]
struct Shape {
    pivot: usize,
    slot: usize,
    slots: usize,
}

struct Walk<'a> {
    kernel: &'a Kernel,
    shapes: &'a Shapes,
    root: u64,
    max: usize,
    entries: usize,
    /// Nodes that were there already: none has its place twice.
    seen: HashSet<u64>,
    f: &'a mut dyn FnMut(u64, u64, u64) -> Result<()>,
}

impl Walk<'_> {
    fn corrupt(&self, why: Corruption) -> Error {
        Error::CorruptTree { kind: "maple tree", root: self.root, why }
    }

    /// Visits a node that covers the indices `min..=max`.
    fn node(&mut self, tagged: u64, min: u64, max: u64, depth: usize) -> Result<()> {
        let node = tagged & !NODE_MASK;
        let bad = |why: &str| Corruption::BadNode { node, why: why.to_owned() };
        if depth >= MAX_DEPTH {
            return Err(self.corrupt(Corruption::TooDeep { max: MAX_DEPTH }));
        }
        if !self.seen.insert(node) {
            return Err(self.corrupt(Corruption::Cycle { node }));
        }
        // Every node has an entry below it somewhere, save for a root that was just emptied.
        if self.seen.len() > self.max.saturating_mul(2).saturating_add(64) {
            return Err(self.corrupt(bad("is one of too many nodes without entries")));
        }
        let kind = tagged >> TYPE_SHIFT & TYPE_MASK;
        let Some(kind) = self.shapes.types.iter().position(|known| *known == kind) else {
            return Err(self.corrupt(bad("is of no known type")));
        };
        let (shape, leaf) = match kind {
            0 => (self.shapes.dense, true),
            1 => (self.shapes.range, true),
            2 => (self.shapes.range, false),
            _ => (self.shapes.arange, false),
        };
        let mut bytes = [0; MAX_NODE];
        let bytes = &mut bytes[..self.shapes.node_size];
        self.kernel
            .read_into(node, bytes)
            .map_err(|error| self.corrupt(Corruption::WildPointer { node, why: error.to_string() }))?;
        let word = |at: usize| -> Option<u64> { Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?)) };
        let mut first = min;
        for i in 0..shape.slots {
            let last = if kind == 0 {
                first
            } else if i + 1 == shape.slots {
                max
            } else {
                match word(shape.pivot + i * 8) {
                    // Pivots behind the last used one are 0; the last slot reaches to the end of
                    // what the node covers. (Behind that, a slot may hold metadata.)
                    Some(0) if i > 0 => max,
                    Some(pivot) => pivot,
                    None => return Err(self.corrupt(bad("is cut off"))),
                }
            };
            if last < first || last > max {
                return Err(self.corrupt(bad("has pivots that do not ascend")));
            }
            let Some(entry) = word(shape.slot + i * 8) else {
                return Err(self.corrupt(bad("is cut off")));
            };
            if leaf {
                if entry != 0 && !is_reserved(entry) {
                    if self.entries >= self.max {
                        return Err(self.corrupt(Corruption::TooLong { max: self.max }));
                    }
                    self.entries += 1;
                    (self.f)(first, last, entry)?;
                }
            } else if entry != 0 {
                self.node(entry, first, last, depth + 1)?;
            }
            if last == max {
                break;
            }
            first = last + 1;
        }
        Ok(())
    }
}

/// Whether the root is a node (`xa_is_node`) and not an entry.
fn is_node(root: u64) -> bool {
    root & 3 == 2 && root > RESERVED
}

fn is_reserved(entry: u64) -> bool {
    entry & 3 == 2 && entry < RESERVED
}
