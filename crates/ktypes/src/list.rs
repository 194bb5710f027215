//! Linked lists (include/linux/list.h).

use std::collections::HashSet;

use crate::{Corruption, Error, Kernel, Result};

impl Kernel {
    /// The nodes of a `struct list_head` list, the head not among them, as addresses of the
    /// embedded `list_head`s.
    ///
    /// Ends with [`Error::CorruptList`] if the list does not come back to its head: at a node that
    /// comes up twice, at a pointer that is no kernel address, or after `max` nodes. An error is
    /// the last thing that the iterator returns. What comes before it is good.
    pub fn list_head(&self, head_addr: u64, max: usize) -> ListIter<'_> {
        ListIter { walk: Walk::new(self, head_addr, max), at: Some(head_addr) }
    }

    /// The nodes of a `struct hlist_head` list (or `hlist_nulls_head`), as addresses of the
    /// embedded `hlist_node`s. Errors as in [`list_head`](Self::list_head).
    pub fn hlist(&self, head_addr: u64, max: usize) -> HlistIter<'_> {
        let link = head_addr.wrapping_add(self.members.hlist_first);
        HlistIter { walk: Walk::new(self, head_addr, max), link: Some(link) }
    }
}

/// What both kinds of list need to end in any case.
struct Walk<'k> {
    kernel: &'k Kernel,
    head: u64,
    max: usize,
    seen: HashSet<u64>,
}

impl<'k> Walk<'k> {
    fn new(kernel: &'k Kernel, head: u64, max: usize) -> Self {
        Walk { kernel, head, max, seen: HashSet::new() }
    }

    /// The pointer at `link`.
    fn follow(&self, link: u64, node: u64) -> Result<u64> {
        self.kernel.read_u64(link).map_err(|error| match error {
            // The head is the caller's; whoever calls with a wild head is told so.
            error if node == self.head => error,
            Error::Unreadable { source, .. } => {
                self.corrupt(Corruption::WildPointer { node, why: source.to_string() })
            }
            error => error,
        })
    }

    /// Takes note of a node.
    fn visit(&mut self, node: u64) -> Result<u64> {
        if !node.is_multiple_of(8) || node >> 63 == 0 {
            let why = "no address of the kernel's".to_owned();
            return Err(self.corrupt(Corruption::WildPointer { node, why }));
        }
        if self.seen.len() >= self.max {
            return Err(self.corrupt(Corruption::TooLong { max: self.max }));
        }
        if !self.seen.insert(node) {
            return Err(self.corrupt(Corruption::Cycle { node }));
        }
        Ok(node)
    }

    fn corrupt(&self, why: Corruption) -> Error {
        Error::CorruptList { head: self.head, why }
    }
}

/// Iterates over a list; see [`Kernel::list_head`].
pub struct ListIter<'k> {
    walk: Walk<'k>,
    /// The last node; `None` at the end.
    at: Option<u64>,
}

impl Iterator for ListIter<'_> {
    type Item = Result<u64>;

    fn next(&mut self) -> Option<Result<u64>> {
        let at = self.at.take()?;
        let link = at.wrapping_add(self.walk.kernel.members.list_next);
        let next = match self.walk.follow(link, at) {
            Ok(next) if next == self.walk.head => return None,
            Ok(next) => next,
            Err(error) => return Some(Err(error)),
        };
        let visited = self.walk.visit(next);
        if visited.is_ok() {
            self.at = Some(next);
        }
        Some(visited)
    }
}

/// Iterates over a list; see [`Kernel::hlist`].
pub struct HlistIter<'k> {
    walk: Walk<'k>,
    /// Where the pointer to the next node is; `None` at the end.
    link: Option<u64>,
}

impl Iterator for HlistIter<'_> {
    type Item = Result<u64>;

    fn next(&mut self) -> Option<Result<u64>> {
        let link = self.link.take()?;
        let offset = self.walk.kernel.members.hlist_next;
        let node = match self.walk.seen.is_empty() {
            true => self.walk.head,
            false => link.wrapping_sub(offset),
        };
        let next = match self.walk.follow(link, node) {
            // The end of an hlist_nulls is an odd number (include/linux/list_nulls.h).
            Ok(next) if next == 0 || next & 1 != 0 => return None,
            Ok(next) => next,
            Err(error) => return Some(Err(error)),
        };
        let visited = self.walk.visit(next);
        if visited.is_ok() {
            self.link = Some(next.wrapping_add(offset));
        }
        Some(visited)
    }
}
