//! Builds the kernel's trees.

use crate::Synth;

/// An entry for [`Synth::xarray`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XaItem {
    /// The first index; a multiple of 1 << `order`.
    pub index: u64,
    /// The entry covers 1 << `order` indices.
    pub order: u32,
    /// The entry as it stands in the array: a pointer, or a value shifted left by one plus one.
    pub entry: u64,
    /// Bit n sets mark n.
    pub marks: u8,
}

const XA_SHIFT: u32 = 6;
const XA_SLOTS: u64 = 1 << XA_SHIFT;
/// Slots of a maple leaf that are used at most: the last one is for metadata.
const LEAF: usize = 15;
const INNER: usize = 10;

impl Synth {
    /// Fills a `maple_tree` with entries `(first, last, entry)`, ascending and not overlapping, as
    /// the tree of a process's VMAs: leaves of type leaf_64, above them arange_64.
    pub fn maple_tree(&mut self, addr: u64, entries: &[(u64, u64, u64)]) -> &mut Synth {
        if entries.is_empty() {
            return self.set("maple_tree", addr, "ma_root", 0u64);
        }
        // NULL entries fill the gaps.
        let mut ranges = Vec::new();
        let mut next = 0;
        for (first, last, entry) in entries {
            if *first > next {
                ranges.push((first - 1, 0));
            }
            ranges.push((*last, *entry));
            next = last.wrapping_add(1);
        }
        if next != 0 {
            ranges.push((u64::MAX, 0));
        }
        let mut level: Vec<(u64, u64)> =
            ranges.chunks(LEAF).map(|chunk| (chunk[chunk.len() - 1].0, self.maple_node(1, chunk))).collect();
        while level.len() > 1 {
            level = level
                .chunks(INNER)
                .map(|chunk| (chunk[chunk.len() - 1].0, self.maple_node(3, chunk)))
                .collect();
        }
        self.set("maple_tree", addr, "ma_root", level[0].1 | 2)
    }

    /// A maple node of some type (0 dense, 1 leaf_64, 2 range_64, 3 arange_64) with slots of
    /// `(last index, entry)`, where u64::MAX stands for the end of what the node covers; returns the tagged pointer that goes into a slot above it.
    pub fn maple_node(&mut self, kind: u64, slots: &[(u64, u64)]) -> u64 {
        let node = self.alloc_bytes(self.size_of("maple_node"), 256);
        let (name, pivots) = match kind {
            0 => ("maple_node", 0),
            3 => ("maple_arange_64", 9),
            _ => ("maple_range_64", 15),
        };
        for (i, (last, entry)) in slots.iter().enumerate() {
            self.set(name, node, &format!("slot[{i}]"), *entry);
            // A pivot of 0 behind the first slot says that the slot reaches to the node's end.
            if i < pivots && (i == 0 || *last != u64::MAX) {
                self.set(name, node, &format!("pivot[{i}]"), *last);
            }
        }
        if slots.len() < 16 && (kind == 1 || kind == 2) {
            // Metadata shares the last slot.
            self.set(name, node, "meta.end", slots.len() - 1);
        }
        node | kind << 3 | 4
    }

    /// Fills an `xarray`, as the page cache of a file: `items` ascending by index.
    pub fn xarray(&mut self, addr: u64, items: &[XaItem]) -> &mut Synth {
        let head = match items {
            [] => 0,
            [only] if only.index == 0 && only.order == 0 => {
                // Marks of an entry in the head are in the flags, above the allocation flags.
                self.set("xarray", addr, "xa_flags", u32::from(only.marks) << 27);
                only.entry
            }
            _ => {
                let end = items.iter().map(|item| item.index + (1 << item.order) - 1).max();
                let bits = 64 - end.unwrap_or(0).leading_zeros();
                let shift = (bits.max(1) - 1) / XA_SHIFT * XA_SHIFT;
                self.xa_node(items, 0, shift) | 2
            }
        };
        self.set("xarray", addr, "xa_head", head)
    }

    /// A node for the items in the 64 << shift indices from `base` on.
    fn xa_node(&mut self, items: &[XaItem], base: u64, shift: u32) -> u64 {
        let node = self.alloc_bytes(self.size_of("xa_node"), 64);
        self.set("xa_node", node, "shift", shift);
        let mut marks = [0u64; 3];
        for slot in 0..XA_SLOTS {
            let first = base + (slot << shift);
            let within = |item: &&XaItem| item.index >= first && item.index - first < 1 << shift;
            let inside: Vec<XaItem> = items.iter().filter(within).copied().collect();
            let Some(item) = inside.first() else { continue };
            let entry = if item.order >= shift {
                // One entry of this node, and its siblings.
                for sibling in 1..1 << (item.order - shift) {
                    let tag = slot << 2 | 2;
                    self.set("xa_node", node, &format!("slots[{}]", slot + sibling), tag);
                }
                item.entry
            } else {
                self.xa_node(&inside, first, shift - XA_SHIFT) | 2
            };
            self.set("xa_node", node, &format!("slots[{slot}]"), entry);
            for (mark, word) in marks.iter_mut().enumerate() {
                if inside.iter().any(|item| item.marks >> mark & 1 != 0) {
                    *word |= 1 << slot;
                }
            }
        }
        for (mark, word) in marks.iter().enumerate() {
            self.set("xa_node", node, &format!("marks[{mark}][0]"), *word);
        }
        node
    }

    /// Makes a balanced binary tree of the `rb_node`s at these addresses, in this order, below the
    /// `rb_root` at `root`.
    pub fn rb_tree(&mut self, root: u64, nodes: &[u64]) -> &mut Synth {
        let top = self.rb_subtree(nodes);
        self.set("rb_root", root, "rb_node", top)
    }

    fn rb_subtree(&mut self, nodes: &[u64]) -> u64 {
        let Some(node) = nodes.get(nodes.len() / 2).copied() else { return 0 };
        let left = self.rb_subtree(&nodes[..nodes.len() / 2]);
        let right = self.rb_subtree(&nodes[nodes.len() / 2 + 1..]);
        self.set("rb_node", node, "rb_left", left).set("rb_node", node, "rb_right", right);
        node
    }
}
