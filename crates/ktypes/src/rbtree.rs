//! Red-black trees (include/linux/rbtree_types.h).

use std::collections::HashSet;

use crate::{Corruption, Error, Kernel, Result};

/// A red-black tree of n nodes is at most 2 log2(n + 1) deep, and no machine has 2^48 nodes.
const MAX_DEPTH: usize = 96;

impl Kernel {
    /// The nodes of a `struct rb_root` (or `rb_root_cached`, which begins with one) in order, as
    /// addresses of the embedded `rb_node`s; at most `max`.
    ///
    /// Ends with [`Error::CorruptTree`] at a pointer that leads nowhere or to a node that was there
    /// before, below 96 levels, or after `max` nodes.
    pub fn rb_tree(&self, root_addr: u64, max: usize) -> RbIter<'_> {
        RbIter {
            kernel: self,
            root: root_addr,
            max,
            count: 0,
            seen: HashSet::new(),
            stack: Vec::new(),
            state: State::New,
        }
    }
}

/// Iterates over a red-black tree; see [`Kernel::rb_tree`].
pub struct RbIter<'k> {
    kernel: &'k Kernel,
    root: u64,
    max: usize,
    count: usize,
    /// Where the walk was: whatever points back is found out at once, and not after `max` nodes.
    seen: HashSet<u64>,
    /// Nodes whose left side has been done: their right children are on the way.
    stack: Vec<(u64, u64)>,
    state: State,
}

enum State {
    New,
    Running,
    Done,
}

impl RbIter<'_> {
    fn corrupt(&self, why: Corruption) -> Error {
        Error::CorruptTree { kind: "rb-tree", root: self.root, why }
    }

    /// Goes down to the left from `node`, putting nodes with their right children on the stack.
    fn descend(&mut self, mut node: u64) -> Result<()> {
        let members = &self.kernel.members;
        while node != 0 {
            if self.stack.len() >= MAX_DEPTH {
                return Err(self.corrupt(Corruption::TooDeep { max: MAX_DEPTH }));
            }
            if !self.seen.insert(node) {
                return Err(self.corrupt(Corruption::Cycle { node }));
            }
            let child = |offset| {
                self.kernel
                    .read_u64(node.wrapping_add(offset))
                    .map_err(|error| self.corrupt(Corruption::WildPointer { node, why: error.to_string() }))
            };
            let (left, right) = (child(members.rb_left)?, child(members.rb_right)?);
            self.stack.push((node, right));
            node = left;
        }
        Ok(())
    }

    fn advance(&mut self) -> Result<Option<u64>> {
        if let State::New = self.state {
            self.state = State::Running;
            let first = self.kernel.read_u64(self.root.wrapping_add(self.kernel.members.rb_node))?;
            self.descend(first)?;
        }
        let Some((node, right)) = self.stack.pop() else { return Ok(None) };
        if self.count >= self.max {
            return Err(self.corrupt(Corruption::TooLong { max: self.max }));
        }
        self.count += 1;
        self.descend(right)?;
        Ok(Some(node))
    }
}

impl Iterator for RbIter<'_> {
    type Item = Result<u64>;

    fn next(&mut self) -> Option<Result<u64>> {
        if let State::Done = self.state {
            return None;
        }
        let next = self.advance().transpose();
        if !matches!(next, Some(Ok(_))) {
            self.state = State::Done;
        }
        next
    }
}
