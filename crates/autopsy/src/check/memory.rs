//! Address spaces: who uses them, and mappings against the maple tree that they are in, the file mapping trees, their `anon_vma`s
//! (include/linux/mm_types.h, rmap.h, fs.h; mm/mmap.c, mm/interval_tree.c, kernel/fork.c; 6.1 and 6.12).

#[cfg(test)]
mod tests;

use ktypes::KernelType;
use snapshot::{AddressSpaceId, FindingKind};

use super::slab::{ANON_VMA, MM, VMA};
use super::{Doubts, Machine, Subject};
use crate::Autopsy;
use crate::error::Result;
use crate::memory::WRITER_LOCKED;

const OBJECT: &str = "memory";
/// An interval tree of n nodes is at most 2 log2(n + 1) deep.
const MAX_DEPTH: usize = 96;
/// The colour of a node, below its parent's address (include/linux/rbtree.h).
const COLOUR: u64 = 3;

#[derive(KernelType)]
#[kernel("mm_struct")]
struct Users {
    #[kernel("mm_users.counter")]
    mm_users: i32,
    #[kernel("mm_count.counter")]
    mm_count: i32,
}

#[derive(KernelType)]
#[kernel("task_struct")]
struct Active {
    mm: u64,
    active_mm: u64,
}

#[derive(KernelType)]
#[kernel("vm_area_struct")]
struct Links {
    anon_vma: u64,
    vm_file: u64,
    #[kernel("shared.rb", address)]
    rb: u64,
}

#[derive(KernelType)]
#[kernel("rb_node")]
struct Node {
    #[kernel("__rb_parent_color")]
    parent: u64,
    #[kernel("rb_left")]
    left: u64,
    #[kernel("rb_right")]
    right: u64,
}

#[derive(KernelType)]
#[kernel("file")]
struct Mapped {
    f_mapping: u64,
}

#[derive(KernelType)]
#[kernel("address_space")]
struct Mapping {
    #[kernel("i_mmap.rb_root.rb_node")]
    root: u64,
    #[kernel("i_mmap_rwsem.count.counter")]
    lock: u64,
}

#[derive(KernelType)]
#[kernel("anon_vma")]
struct AnonVma {
    root: u64,
}

/// What a mapping says about the pages that belong in it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Belonging {
    /// The root of its `anon_vma`s, 0 if it has none.
    pub anon_root: u64,
    /// The page cache that it shows, 0 for none.
    pub mapping: u64,
}

impl Autopsy<'_> {
    /// An address space's users and what was noticed while its mappings were read.
    pub(super) fn check_address_space(
        &self,
        id: AddressSpaceId,
        subject: &Subject<'_>,
        machine: &Machine,
        doubts: &mut Doubts,
    ) {
        // Who executes another program has only the name of an address space.
        let Some(member) = subject.living.iter().find(|m| m.task.mm == id.0) else { return };
        if self.check_slab(MM, id.0, OBJECT, doubts) {
            let checked = self.check_users(id, member.addr, machine, doubts);
            self.outcome(checked, FindingKind::Count, OBJECT, id.0, doubts);
        }
        if let Some(found) = machine.page_tables.get(&id) {
            doubts.0.extend(found.0.iter().cloned());
        }
    }

    fn check_users(
        &self,
        id: AddressSpaceId,
        task: u64,
        machine: &Machine,
        doubts: &mut Doubts,
    ) -> Result<()> {
        let users: Users = self.kernel.read(id.0)?;
        // A thread counts before it has the pointer, and until after it has given it up (copy_mm(), exit_mm(), exec_mmap()).
        let known = machine.users.get(&id.0).map_or(0, |tasks| tasks.len() as i64);
        if i64::from(users.mm_users) < known || users.mm_count < 1 {
            let text = format!("{known} threads use it, the kernel counted {}", users.mm_users);
            doubts.doubt(FindingKind::Count, OBJECT, id.0, text);
        }
        let active: Active = self.kernel.read(task)?;
        // Written one after the other by the thread itself.
        if active.active_mm != active.mm && !machine.running.contains(&id.0) {
            let text = "its page tables are another address space's";
            doubts.doubt(FindingKind::Link, "process", task, text);
        }
        Ok(())
    }

    /// Looks at one mapping while it is read, and at what belongs in it. `range`: where the maple tree has it. `settled`: mmap_lock was
    /// not held for writing, or the mappings are whole nevertheless.
    pub(crate) fn check_mapping(
        &self,
        id: AddressSpaceId,
        vma: u64,
        range: (u64, u64),
        bounds: (u64, u64),
        settled: bool,
    ) -> Belonging {
        let mut doubts = Doubts::default();
        let mut belonging = Belonging::default();
        self.check_slab(VMA, vma, OBJECT, &mut doubts);
        if settled && range != bounds {
            let text = format!(
                "the mapping {:x}-{:x} is in the place of {:x}-{:x}",
                bounds.0, bounds.1, range.0, range.1
            );
            doubts.doubt(FindingKind::Link, OBJECT, vma, text);
        }
        let checked = self.check_belonging(vma, bounds, settled, &mut belonging, &mut doubts);
        self.outcome(checked, FindingKind::Link, OBJECT, vma, &mut doubts);
        self.note_memory_doubts(id, doubts);
        belonging
    }

    pub(crate) fn note_memory_doubts(&self, id: AddressSpaceId, doubts: Doubts) {
        if !doubts.0.is_empty() {
            let mut all = self.memory_doubts.borrow_mut();
            let known = all.entry(id).or_default();
            for doubt in doubts.0 {
                known.add(doubt.severity, doubt.kind, doubt.object, doubt.address, doubt.text);
            }
        }
    }

    /// See [`check_mapping`](Self::check_mapping).
    pub(crate) fn check_belonging(
        &self,
        vma: u64,
        (start, end): (u64, u64),
        settled: bool,
        belonging: &mut Belonging,
        doubts: &mut Doubts,
    ) -> Result<()> {
        let links: Links = self.kernel.read(vma)?;
        if links.anon_vma != 0 && self.check_slab(ANON_VMA, links.anon_vma, OBJECT, doubts) {
            belonging.anon_root = self.anon_root(links.anon_vma)?;
        }
        if links.vm_file == 0 {
            return Ok(());
        }
        let file: Mapped = self.kernel.read(links.vm_file)?;
        belonging.mapping = file.f_mapping;
        let mapping: Mapping = self.kernel.read(file.f_mapping)?;
        // Where somebody changes the tree, or is about to put the mapping there, it need not be found.
        if !settled || mapping.lock & WRITER_LOCKED != 0 {
            return Ok(());
        }
        if self.root_of(links.rb)? != Some(mapping.root) {
            let text = format!("the mapping {start:x}-{end:x} is not among those that its file knows of");
            doubts.doubt(FindingKind::Link, OBJECT, vma, text);
        }
        Ok(())
    }

    /// The root of the tree that a node is in: from child to parent, each of which knows the other.
    fn root_of(&self, mut node: u64) -> Result<Option<u64>> {
        for _ in 0..MAX_DEPTH {
            let at: Node = self.kernel.read(node)?;
            let parent = at.parent & !COLOUR;
            if parent == 0 {
                return Ok(Some(node));
            }
            let above: Node = self.kernel.read(parent)?;
            if above.left != node && above.right != node {
                return Ok(None);
            }
            node = parent;
        }
        Ok(None)
    }

    /// The root that an `anon_vma` and all that were made from it by fork(2) have in common.
    pub(super) fn anon_root(&self, anon_vma: u64) -> Result<u64> {
        Ok(self.kernel.read::<AnonVma>(anon_vma)?.root)
    }
}
