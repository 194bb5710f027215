//! Names on disk file systems that were changed lately: the dentries of directories (d_subdirs or d_children, d_alias of
//! include/linux/dcache.h; __d_move(), d_delete(), fs/dcache.c; 6.1 and 6.12).
//!
//! Who makes, links or renames a file changes its ctime and that of the directory. Its dentry then is in memory and says what is; a
//! negative one says that there is nothing. Of a name that something was renamed *from* no dentry remains: that one is recognised by the
//! inode, all of whose names are known and are other ones.

use std::collections::{BTreeMap, BTreeSet};

use ktypes::KernelType;
use snapshot::{Bytes, DirectoryNames, DiskNames, InodeId, Link, Mount, Name, NamedInode, TmpfsKind};

use crate::Autopsy;
use crate::error::{Result, corrupt};
use crate::fs::{Dentry, children, device};
use crate::inode::{S_IFDIR, S_IFLNK, S_IFREG};
use crate::writeback::join;

/// Names of one inode: more than any file system lets it have.
const MAX_LINKS: usize = 1 << 17;
/// Names in one directory, and inodes of one file system, that were changed lately.
const MAX_NAMES: usize = 1 << 20;

#[derive(KernelType)]
#[kernel("inode")]
struct Aliases {
    i_ino: u64,
    #[kernel(address)]
    i_dentry: u64,
}

/// A directory that was changed lately.
struct Directory {
    inode: InodeId,
    dentry: u64,
    path: Bytes,
}

/// What is found on one file system.
pub(crate) struct Gathered<'a, 'k> {
    autopsy: &'a Autopsy<'k>,
    mount: &'a Mount,
    names: DiskNames,
    directories: Vec<Directory>,
}

impl<'a, 'k> Gathered<'a, 'k> {
    pub(crate) fn new(autopsy: &'a Autopsy<'k>, mount: &'a Mount) -> Self {
        let names = DiskNames {
            mountpoint: mount.mountpoint.clone(),
            dev_major: mount.dev_major,
            dev_minor: mount.dev_minor,
            ..DiskNames::default()
        };
        Self { autopsy, mount, names, directories: Vec::new() }
    }

    /// Takes in an inode that was changed lately; it goes into the table of inodes.
    pub(crate) fn add(&mut self, addr: u64) -> Result<()> {
        if self.names.inodes.len() >= MAX_NAMES {
            return Err(corrupt("inode", addr, "is one of too many that were changed"));
        }
        let (links, first) = self.links(addr)?;
        let facts = self.autopsy.inode_facts(addr)?;
        let path = match &first {
            Some(dentry) => join(&self.mount.mountpoint, &self.autopsy.path_in_fs(*dentry)?),
            None => Bytes::default(),
        };
        // The file system's own (a journal) has no name, and those without one are of use for their number only.
        self.autopsy.inode(addr, &facts, &path)?;
        let kind = match facts.mode & 0o170_000 {
            S_IFREG => TmpfsKind::Regular,
            S_IFDIR => TmpfsKind::Directory,
            S_IFLNK if first.is_none() => TmpfsKind::Symlink { target: Bytes::default() },
            S_IFLNK => TmpfsKind::Symlink { target: self.autopsy.symlink_target(addr)? },
            _ => {
                let (major, minor) = device(facts.rdev);
                TmpfsKind::Special { major, minor }
            }
        };
        if let (TmpfsKind::Directory, Some(dentry)) = (&kind, first) {
            self.directories.push(Directory { inode: InodeId(addr), dentry, path });
        }
        self.names.inodes.insert(InodeId(addr), NamedInode { kind, names: links });
        Ok(())
    }

    /// The names of an inode, and the dentry of the first; the root directory has a dentry and no name.
    fn links(&self, addr: u64) -> Result<(Vec<Link>, Option<u64>)> {
        let kernel = self.autopsy.kernel;
        let aliases: Aliases = kernel.read(addr)?;
        let to_alias = kernel.offset_of("dentry", "d_u.d_alias")?;
        let (mut links, mut first) = (Vec::new(), None);
        for node in kernel.hlist(aliases.i_dentry, MAX_LINKS) {
            let at = node?.wrapping_sub(to_alias);
            let dentry = self.autopsy.dentry(at)?;
            if dentry.d_inode != addr {
                return Err(corrupt("dentry", at, "is of another inode than its alias list"));
            }
            let is_root = dentry.d_parent == at;
            if dentry.hashed == 0 && !is_root {
                continue;
            }
            first = first.or(Some(at));
            if !is_root {
                let parent = self.autopsy.dentry(dentry.d_parent)?;
                let parent: Aliases = kernel.read(parent.d_inode)?;
                links.push(Link { directory: parent.i_ino, name: Bytes(self.autopsy.name(&dentry, at)?) });
            }
        }
        Ok((links, first))
    }

    /// All of it, when there are no more inodes.
    pub(crate) fn finish(mut self) -> DiskNames {
        // Parents before children.
        self.directories.sort_by(|a, b| a.path.cmp(&b.path));
        let number =
            |id: &InodeId| self.autopsy.inodes.borrow().get(id).filter(|i| i.nlink > 0).map(|i| i.ino);
        let by_ino = self.names.inodes.keys().filter_map(|id| Some((number(id)?, *id))).collect();
        for directory in std::mem::take(&mut self.directories) {
            match self.directory(&directory, &by_ino) {
                Ok(names) => self.names.directories.push(names),
                Err(error) => {
                    let text =
                        format!("the names in {} may be other ones on the disk: {error}", directory.path);
                    self.autopsy.find(snapshot::Severity::Loss, "names", text);
                }
            }
        }
        self.names
    }

    /// `by_ino`: inodes that were changed and have names, by number.
    fn directory(
        &mut self,
        directory: &Directory,
        by_ino: &BTreeMap<u64, InodeId>,
    ) -> Result<DirectoryNames> {
        let mut names = self.names_in(directory.dentry)?;
        // Dentries can be forgotten, and of a name from which something was renamed none is left.
        let listing = match self.mount.fs_type.as_bytes() {
            b"ext4" => self.autopsy.directory_blocks(directory.inode.0).unwrap_or_else(|error| {
                self.autopsy.find(snapshot::Severity::Note, "names", format!("{}: {error}", directory.path));
                None
            }),
            _ => None,
        };
        let known: BTreeSet<Bytes> = names.iter().map(|name| name.name.clone()).collect();
        for (name, ino) in listing.iter().flatten().filter(|(name, _)| !known.contains(name)) {
            let Some(id) = by_ino.get(ino) else { continue };
            names.push(Name { name: name.clone(), inode: Some(*id) });
            if let Some(named) = self.names.inodes.get_mut(id) {
                let here: Aliases = self.autopsy.kernel.read(directory.inode.0)?;
                named.names.push(Link { directory: here.i_ino, name: name.clone() });
            }
        }
        let listing = listing.map(|names| names.into_iter().map(|(name, _)| name).collect());
        Ok(DirectoryNames { inode: directory.inode, names, listing })
    }

    fn names_in(&self, directory: u64) -> Result<Vec<Name>> {
        let mut names = Vec::new();
        for at in children(self.autopsy.kernel, directory)? {
            let dentry = self.autopsy.dentry(at)?;
            if dentry.d_parent != directory {
                return Err(corrupt("dentry", at, "is in another directory than its list"));
            }
            if let Some(inode) = self.whose(&dentry)
                && dentry.hashed != 0
            {
                if names.len() >= MAX_NAMES {
                    return Err(corrupt("dentry", directory, "has too many names"));
                }
                names.push(Name { name: Bytes(self.autopsy.name(&dentry, at)?), inode });
            }
        }
        Ok(names)
    }

    /// Whose name a dentry is; `None` if nothing has happened to it lately.
    fn whose(&self, dentry: &Dentry) -> Option<Option<InodeId>> {
        if dentry.d_inode == 0 {
            return Some(None);
        }
        let id = InodeId(dentry.d_inode);
        self.names.inodes.get(&id)?;
        // unlink(2) that was not quite over: the file system has removed the name.
        let is_removed = self.autopsy.inodes.borrow().get(&id).is_some_and(|inode| inode.nlink == 0);
        Some((!is_removed).then_some(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::{Record, Synth, U64, array, named};

    /// An inode that has the names `linked`, and one dentry that is not hashed any more.
    fn inode_with_names(linked: &[&str]) -> (Synth, u64) {
        let mut synth = Synth::new();
        declare::<Aliases>(&mut synth, &[]);
        synth.structure("dentry_links", Record::union().field("d_alias", array(U64, 2)));
        declare::<Dentry>(&mut synth, &[("d_u", named("dentry_links"))]);
        let (inode, directory) = (synth.alloc("inode"), synth.alloc("inode"));
        synth.set("inode", directory, "i_ino", 77u64);
        let parent = synth.alloc("dentry");
        synth.set("dentry", parent, "d_inode", directory).set("dentry", parent, "d_parent", parent);
        for (n, name) in linked.iter().chain(&["removed"]).enumerate() {
            let (dentry, text) = (synth.alloc("dentry"), synth.string(name));
            synth
                .set("dentry", dentry, "d_inode", inode)
                .set("dentry", dentry, "d_parent", parent)
                .set("dentry", dentry, "d_name.name", text)
                .set("dentry", dentry, "d_name.len", name.len() as u32);
            if n < linked.len() {
                synth.set("dentry", dentry, "d_hash.pprev", parent);
            }
            let node = synth.address_of("dentry", dentry, "d_u.d_alias");
            let head = synth.address_of("inode", inode, "i_dentry");
            synth.hlist_add_head(node, head);
        }
        (synth, inode)
    }

    fn mount() -> Mount {
        serde_json::from_value(serde_json::json!({
            "id": 1, "parent": 0, "mountpoint": "/", "root": "/", "fs_type": "ext4", "source": "/dev/vda1",
            "dev_major": 8, "dev_minor": 1, "flags": "", "peer_group": 0, "master": 0,
        }))
        .unwrap()
    }

    #[test]
    fn all_names_of_an_inode_are_found_but_those_that_are_gone() {
        let (synth, inode) = inode_with_names(&["one", "two"]);
        let kernel = open(&synth);
        let (autopsy, mount) = (Autopsy::new(&kernel), mount());
        let (mut links, first) = Gathered::new(&autopsy, &mount).links(inode).unwrap();
        links.sort_by(|a, b| a.name.cmp(&b.name));
        let link = |name: &str| Link { directory: 77, name: name.into() };
        assert_eq!(links, [link("one"), link("two")]);
        assert!(first.is_some());
    }

    #[test]
    fn a_dentry_of_another_inode_is_damage() {
        let (mut synth, inode) = inode_with_names(&["one"]);
        let head = synth.address_of("inode", inode, "i_dentry");
        let to_alias = synth.offset_of("dentry", "d_u.d_alias");
        let dentry = synth.read_u64(head) - to_alias;
        synth.set("dentry", dentry, "d_inode", inode + 8);
        let kernel = open(&synth);
        let (autopsy, mount) = (Autopsy::new(&kernel), mount());
        assert!(Gathered::new(&autopsy, &mount).links(inode).is_err());
    }
}
