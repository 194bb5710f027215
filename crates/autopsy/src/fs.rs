//! Names in the file system: `fs_struct`, `dentry`, `mount` (include/linux/fs_struct.h, dcache.h, fs/mount.h, fs/d_path.c;
//! 6.1 and 6.12).

use std::collections::BTreeMap;

use ktypes::{Kernel, KernelType};
use serde::Serialize;
use snapshot::{Bytes, FsContext, Mount, MountFlags, MountNamespace, NamespaceId, Pid, Severity};

use crate::Autopsy;
use crate::error::{Circle, Result, Visited, corrupt};

/// PATH_MAX is 4096, but a path can be deeper than a system call can name it.
const MAX_PATH: usize = 64 << 10;
const MAX_NAME: u32 = 255;
/// Dentries in a directory.
const MAX_CHILDREN: usize = 1 << 22;
/// A path has at most this many components and mounts.
const MAX_COMPONENTS: usize = MAX_PATH / 2;
/// Super blocks of one machine.
const MAX_SUPER_BLOCKS: usize = 1 << 20;
/// Default of fs.mount-max is 100,000.
const MAX_MOUNTS: usize = 1 << 20;
/// Cgroup hierarchies and sysfs are never that deep.
const MAX_KERNFS_DEPTH: usize = 512;

/// vfsmount.mnt_flags of mounts that nobody sees (include/linux/mount.h).
pub(crate) const MNT_INTERNAL: u32 = 0x4000;
const MNT_CURSOR: u32 = 0x1000_0000;
const MNT_SHARED: u32 = 0x1000;

#[derive(KernelType)]
#[kernel("path")]
pub(crate) struct Path {
    pub mnt: u64,
    pub dentry: u64,
}

#[derive(KernelType)]
#[kernel("fs_struct")]
struct FsStruct {
    umask: u32,
    #[kernel(nested)]
    root: Path,
    #[kernel(nested)]
    pwd: Path,
}

#[derive(KernelType)]
#[kernel("dentry")]
pub(crate) struct Dentry {
    /// NULL: not in the hash, that is, unlinked.
    #[kernel("d_hash.pprev")]
    pub hashed: u64,
    pub d_parent: u64,
    #[kernel("d_name.len")]
    pub name_len: u32,
    #[kernel("d_name.name")]
    pub name: u64,
    pub d_inode: u64,
    d_op: u64,
}

/// The dentries in a directory's (d_subdirs until 6.7, d_children).
pub(crate) fn children(kernel: &Kernel, directory: u64) -> Result<Vec<u64>> {
    let is_list = kernel.has_member("dentry", "d_subdirs");
    let (head, to_child) = if is_list { ("d_subdirs", "d_child") } else { ("d_children", "d_sib") };
    let head = directory.wrapping_add(kernel.offset_of("dentry", head)?);
    let to_child = kernel.offset_of("dentry", to_child)?;
    let child = |node: ktypes::Result<u64>| Ok(node?.wrapping_sub(to_child));
    match is_list {
        true => kernel.list_head(head, MAX_CHILDREN).map(child).collect(),
        false => kernel.hlist(head, MAX_CHILDREN).map(child).collect(),
    }
}

#[derive(KernelType)]
#[kernel("mount")]
struct MountStruct {
    mnt_parent: u64,
    mnt_mountpoint: u64,
    #[kernel("mnt.mnt_root")]
    root: u64,
    #[kernel("mnt.mnt_sb")]
    sb: u64,
    #[kernel("mnt.mnt_flags")]
    flags: u32,
    #[kernel(address)]
    mnt_mounts: u64,
    mnt_devname: u64,
    mnt_ns: u64,
    mnt_id: i32,
    mnt_group_id: i32,
    mnt_master: u64,
}

#[derive(KernelType)]
#[kernel("super_block")]
pub(crate) struct SuperBlock {
    pub s_dev: u32,
    s_flags: u64,
    s_type: u64,
    s_subtype: u64,
}

#[derive(KernelType)]
#[kernel("kernfs_node")]
struct KernfsNode {
    parent: u64,
    name: u64,
}

/// A name as /proc shows it.
#[derive(Clone, Debug, Default)]
pub(crate) struct FullPath {
    /// Absolute in the mount namespace that the mount belongs to; a made-up name for objects without one.
    pub path: Bytes,
    /// The name was gone.
    pub deleted: bool,
    /// The mount namespace of the path, if that is not the initial one.
    pub namespace: Option<NamespaceId>,
    /// The kernel shows a name of its own making (`pipe:[4711]`).
    pub synthetic: bool,
    /// On a mount that the kernel keeps for itself.
    pub internal: bool,
}

/// A mount namespace.
#[derive(Clone, Debug, Serialize)]
pub struct NamespaceMounts {
    /// As in `mnt:[N]` of /proc/PID/ns.
    pub number: u32,
    /// The one that the machine booted with.
    pub initial: bool,
    /// The user processes in it, ascending.
    pub pids: Vec<Pid>,
    /// Parents before children. Mount points are absolute in this namespace.
    pub mounts: Vec<Mount>,
}

/// Major and minor number of a kernel-internal device number (include/linux/kdev_t.h).
pub(crate) fn device(dev: u32) -> (u32, u32) {
    (dev >> 20, dev & 0xf_ffff)
}

impl Autopsy<'_> {
    /// Working directory, root and umask.
    pub(crate) fn fs_context(&self, addr: u64) -> Result<FsContext> {
        let fs: FsStruct = self.kernel.read(addr)?;
        let cwd = self.path(&fs.pwd)?;
        let root = self.path(&fs.root)?;
        Ok(FsContext {
            id: addr,
            cwd: cwd.path,
            cwd_deleted: cwd.deleted,
            root: root.path,
            umask: fs.umask & 0o777,
        })
    }

    pub(crate) fn dentry(&self, addr: u64) -> Result<Dentry> {
        Ok(self.kernel.read(addr)?)
    }

    pub(crate) fn super_block(&self, addr: u64) -> Result<SuperBlock> {
        Ok(self.kernel.read(addr)?)
    }

    /// The addresses of all super blocks (`super_blocks`, fs/super.c).
    pub(crate) fn super_blocks(&self) -> Result<Vec<u64>> {
        let to_list = self.kernel.offset_of("super_block", "s_list")?;
        let nodes = self.list(self.kernel.symbol("super_blocks")?, MAX_SUPER_BLOCKS)?;
        Ok(nodes.into_iter().map(|node| node.wrapping_sub(to_list)).collect())
    }

    /// Name of a file system type, with its subtype (`fuse.sshfs`).
    pub(crate) fn fs_type(&self, sb: &SuperBlock) -> Result<Bytes> {
        #[derive(KernelType)]
        #[kernel("file_system_type")]
        struct FileSystemType {
            name: u64,
        }
        let kind: FileSystemType = self.kernel.read(sb.s_type)?;
        let mut name = self.kernel.read_cstr(kind.name, 64)?;
        if sb.s_subtype != 0 {
            name.push(b'.');
            name.extend(self.kernel.read_cstr(sb.s_subtype, 64)?);
        }
        Ok(Bytes(name))
    }

    pub(crate) fn name(&self, dentry: &Dentry, addr: u64) -> Result<Vec<u8>> {
        if dentry.name_len > MAX_NAME {
            return Err(corrupt("dentry", addr, format!("has a name of {} bytes", dentry.name_len)));
        }
        Ok(self.kernel.read_bytes(dentry.name, dentry.name_len as usize)?)
    }

    fn mount_of(&self, vfsmount: u64) -> Result<(u64, MountStruct)> {
        let addr = vfsmount.wrapping_sub(self.kernel.offset_of("mount", "mnt")?);
        Ok((addr, self.kernel.read(addr)?))
    }

    /// The number of a mount, as in /proc/PID/mountinfo.
    pub(crate) fn mount_id(&self, vfsmount: u64) -> Result<i32> {
        Ok(self.mount_of(vfsmount)?.1.mnt_id)
    }

    /// The path as `d_path()` makes it for a reader whose root is that of the mount namespace.
    pub(crate) fn path(&self, path: &Path) -> Result<FullPath> {
        let key = (path.mnt, path.dentry);
        if let Some(known) = self.paths.borrow().get(&key) {
            return Ok(known.clone());
        }
        let full = self.build_path(path)?;
        self.paths.borrow_mut().insert(key, full.clone());
        Ok(full)
    }

    fn build_path(&self, path: &Path) -> Result<FullPath> {
        let dentry = self.dentry(path.dentry)?;
        let is_root = dentry.d_parent == path.dentry;
        let (mut mount_addr, mut mount) = self.mount_of(path.mnt)?;
        let internal = mount.flags & MNT_INTERNAL != 0;
        if dentry.d_op != 0 && (!is_root || path.dentry != mount.root) {
            let at = dentry.d_op.wrapping_add(self.kernel.offset_of("dentry_operations", "d_dname")?);
            let d_dname = self.kernel.read_u64(at)?;
            if d_dname != 0 {
                let path = self.synthetic_name(&dentry, path.dentry, d_dname)?;
                // simple_dname() always says so; for these objects it means nothing.
                return Ok(FullPath { path, deleted: true, namespace: None, synthetic: true, internal });
            }
        }
        let deleted = dentry.hashed == 0 && !is_root;
        let init_ns = self.initial_mount_namespace()?;
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut len = 0;
        let (mut at, mut here) = (path.dentry, dentry);
        let mut circle = Circle::default();
        for _ in 0..MAX_COMPONENTS {
            if circle.closes_at((at, mount_addr)) {
                break;
            }
            if at == mount.root {
                if mount.mnt_parent == mount_addr {
                    return Ok(FullPath {
                        path: join(&names),
                        deleted,
                        namespace: (mount.mnt_ns != init_ns).then_some(NamespaceId(mount.mnt_ns)),
                        synthetic: false,
                        internal,
                    });
                }
                at = mount.mnt_mountpoint;
                mount_addr = mount.mnt_parent;
                mount = self.kernel.read(mount_addr)?;
            } else if here.d_parent == at {
                // The top of a file system, but not of what is mounted: cannot be reached by any name.
                return Err(corrupt("dentry", path.dentry, "is not below the root of its mount"));
            } else {
                let name = self.name(&here, at)?;
                len += name.len() + 1;
                if len > MAX_PATH {
                    break;
                }
                names.push(name);
                at = here.d_parent;
            }
            here = self.dentry(at)?;
        }
        Err(corrupt("dentry", path.dentry, "has an endless path"))
    }

    /// Names of objects that have none: what their file systems' `d_dname` methods print.
    fn synthetic_name(&self, dentry: &Dentry, addr: u64, d_dname: u64) -> Result<Bytes> {
        let ino =
            || self.kernel.read_u64(dentry.d_inode.wrapping_add(self.kernel.offset_of("inode", "i_ino")?));
        let name = self.name(dentry, addr)?;
        let text = match self.kernel.symbol_at(d_dname) {
            Some("pipefs_dname") => format!("pipe:[{}]", ino()?).into_bytes(),
            Some("sockfs_dname") => format!("socket:[{}]", ino()?).into_bytes(),
            // Since 6.9 they have a file system of their own.
            Some("pidfs_dname") => b"anon_inode:[pidfd]".to_vec(),
            Some("anon_inodefs_dname") => [b"anon_inode:", name.as_slice()].concat(),
            Some("ns_dname") => format!("namespace:[{}]", ino()?).into_bytes(),
            // shmem, hugetlbfs, and whoever else uses simple_dname().
            _ => [b"/", name.as_slice()].concat(),
        };
        Ok(Bytes(text))
    }

    pub(crate) fn initial_mount_namespace(&self) -> Result<u64> {
        let nsproxy = self.kernel.symbol("init_nsproxy")?;
        Ok(self.kernel.read_u64(nsproxy.wrapping_add(self.kernel.offset_of("nsproxy", "mnt_ns")?))?)
    }

    /// The path of a kernfs node (cgroups, sysfs) from the top of its hierarchy.
    pub(crate) fn kernfs_path(&self, addr: u64) -> Result<Bytes> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut at = addr;
        for _ in 0..MAX_KERNFS_DEPTH {
            let node: KernfsNode = self.kernel.read(at)?;
            if node.parent == 0 {
                return Ok(join(&names));
            }
            names.push(self.kernel.read_cstr(node.name, MAX_NAME as usize + 1)?);
            at = node.parent;
        }
        Err(corrupt("kernfs_node", addr, "is too deep"))
    }

    /// The mounts of the initial mount namespace, parents before children.
    ///
    /// Walked through the tree of mounts, which is the same in all kernels; the namespace's own index of them (a list
    /// until 6.7, a red-black tree since) serves as a check of the number.
    ///
    /// # Errors
    /// When the namespace or its root mount cannot be read.
    pub fn mounts(&self) -> Result<Vec<Mount>> {
        self.mounts_of(self.initial_mount_namespace()?)
    }

    /// The mounts of every mount namespace in which there is a thread, the initial one first, then by number; of those that are not the
    /// initial one what can be reached. One that is damaged is left out, and a finding says why.
    ///
    /// # Errors
    /// When neither the task list nor the PID table can be read, or the initial namespace cannot be found.
    pub fn all_mounts(&self) -> Result<Vec<NamespaceMounts>> {
        let initial = self.initial_mount_namespace()?;
        let mut namespaces: BTreeMap<u64, Vec<Pid>> = BTreeMap::from([(initial, Vec::new())]);
        let to_mnt_ns = self.kernel.offset_of("nsproxy", "mnt_ns")?;
        for member in self.all_threads()? {
            let task = &member.task;
            if task.nsproxy == 0 {
                continue;
            }
            match self.kernel.read_u64(task.nsproxy.wrapping_add(to_mnt_ns)) {
                Ok(namespace) => {
                    let pids = namespaces.entry(namespace).or_default();
                    if pids.last() != Some(&task.tgid) && !task.is_kernel_thread() {
                        pids.push(task.tgid);
                    }
                }
                Err(error) => {
                    let before = self.set_subject(Some(task.tgid));
                    let text = format!("the mount namespace of thread {} is not known: {error}", task.pid);
                    self.find(Severity::Broken, "fs", text);
                    self.set_subject(before);
                }
            }
        }
        let to_number = self.kernel.offset_of("mnt_namespace", "ns.inum")?;
        let mut all = Vec::new();
        for (addr, pids) in namespaces {
            let read = || {
                let (number, mounts) =
                    (self.kernel.read_u32(addr.wrapping_add(to_number))?, self.mounts_of(addr)?);
                // What another root was put over nobody in such a namespace can see.
                let is_initial = addr == initial;
                Ok((number, if is_initial { mounts } else { MountNamespace::of_reachable(mounts).mounts }))
            };
            let read: Result<(u32, Vec<Mount>)> = read();
            match read {
                Ok((number, mounts)) => {
                    all.push(NamespaceMounts { number, initial: addr == initial, pids, mounts });
                }
                Err(error) => {
                    let text = format!("the mounts of {pids:?} cannot be read: {error}");
                    self.find(Severity::Broken, "fs", text);
                }
            }
        }
        all.sort_by_key(|namespace| (!namespace.initial, namespace.number));
        Ok(all)
    }

    /// The mounts of one mount namespace.
    pub(crate) fn mounts_of(&self, ns_addr: u64) -> Result<Vec<Mount>> {
        #[derive(KernelType)]
        #[kernel("mnt_namespace")]
        struct Root {
            root: u64,
            // The tree is called `mounts` since 6.8; before, that was the number.
            #[kernel("nr_mounts", or = "mounts")]
            count: u32,
        }
        let ns: Root = self.kernel.read(ns_addr)?;
        let to_child = self.kernel.offset_of("mount", "mnt_child")?;
        let root: MountStruct = self.kernel.read(ns.root)?;
        let mut mounts = Vec::new();
        let mut damaged = 0;
        let mut pending = vec![(ns.root, root)];
        let mut visited = Visited::default();
        while let Some((addr, mount)) = pending.pop() {
            visited.visit("mount", addr)?;
            if mounts.len() >= MAX_MOUNTS {
                return Err(corrupt("mnt_namespace", ns_addr, "has too many mounts"));
            }
            match self.mount(addr, &mount) {
                Ok(described) if mount.flags & MNT_CURSOR == 0 => mounts.push(described),
                Ok(_) => {}
                Err(error) => {
                    damaged += 1;
                    self.find(snapshot::Severity::Doubt, "fs", format!("a mount is lost: {error}"));
                }
            }
            let below = pending.len();
            for node in self.kernel.list_head(mount.mnt_mounts, MAX_MOUNTS) {
                let child = node?.wrapping_sub(to_child);
                pending.push((child, self.kernel.read(child)?));
            }
            // Oldest first, since the stack turns them round.
            pending[below..].reverse();
        }
        if mounts.len() + damaged != ns.count as usize {
            let text = format!("{} mounts were found, the kernel counted {}", mounts.len(), ns.count);
            self.find(snapshot::Severity::Doubt, "fs", text);
        }
        Ok(mounts)
    }

    fn mount(&self, addr: u64, mount: &MountStruct) -> Result<Mount> {
        let mnt = addr.wrapping_add(self.kernel.offset_of("mount", "mnt")?);
        let mountpoint = self.path(&Path { mnt, dentry: mount.root })?;
        let sb = self.super_block(mount.sb)?;
        let (dev_major, dev_minor) = device(sb.s_dev);
        let parent: MountStruct = self.kernel.read(mount.mnt_parent)?;
        Ok(Mount {
            id: mount.mnt_id,
            parent: parent.mnt_id,
            mountpoint: mountpoint.path,
            root: self.path_in_fs(mount.root)?,
            fs_type: self.fs_type(&sb)?,
            source: match mount.mnt_devname {
                0 => Bytes::from("none"),
                name => Bytes(self.kernel.read_cstr(name, 4096)?),
            },
            dev_major,
            dev_minor,
            flags: mount_flags(mount.flags, sb.s_flags),
            // A mount that is private has no group, or one of its own from earlier days.
            peer_group: if mount.flags & MNT_SHARED != 0 { mount.mnt_group_id } else { 0 },
            master: match mount.mnt_master {
                0 => 0,
                master => self.kernel.read::<MountStruct>(master)?.mnt_group_id,
            },
        })
    }

    /// A dentry's path from the root of its file system.
    pub(crate) fn path_in_fs(&self, addr: u64) -> Result<Bytes> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut at = addr;
        let mut circle = Circle::default();
        for _ in 0..MAX_COMPONENTS {
            if circle.closes_at(at) {
                break;
            }
            let dentry = self.dentry(at)?;
            if dentry.d_parent == at {
                return Ok(join(&names));
            }
            names.push(self.name(&dentry, at)?);
            at = dentry.d_parent;
        }
        Err(corrupt("dentry", addr, "has an endless path"))
    }
}

/// A path from its components, the last one first.
fn join(names: &[Vec<u8>]) -> Bytes {
    let path: Vec<u8> = names.iter().rev().flat_map(|name| [b"/", name.as_slice()].concat()).collect();
    if path.is_empty() { Bytes::from("/") } else { Bytes(path) }
}

/// MNT_* (include/linux/mount.h) and SB_* (include/linux/fs.h) as our own.
fn mount_flags(mnt: u32, sb: u64) -> MountFlags {
    const SB_RDONLY: u64 = 1;
    const SB_SYNCHRONOUS: u64 = 1 << 4;
    let table = [
        (mnt & 0x40 != 0, MountFlags::READ_ONLY),
        (mnt & 0x01 != 0, MountFlags::NOSUID),
        (mnt & 0x02 != 0, MountFlags::NODEV),
        (mnt & 0x04 != 0, MountFlags::NOEXEC),
        (mnt & 0x08 != 0, MountFlags::NOATIME),
        (mnt & 0x10 != 0, MountFlags::NODIRATIME),
        (mnt & 0x20 != 0, MountFlags::RELATIME),
        (sb & SB_RDONLY != 0, MountFlags::SB_READ_ONLY),
        (sb & SB_SYNCHRONOUS != 0, MountFlags::SYNCHRONOUS),
    ];
    table.into_iter().filter(|(on, _)| *on).map(|(_, flag)| flag).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::{PTR, Record, Synth, U32, named};

    /// Mounts that cannot be described do not count: nothing else would end it.
    #[test]
    fn a_mount_that_is_mounted_on_itself_ends_the_table() {
        let mut synth = Synth::new();
        let lists = [("mnt_mounts", named("list_head")), ("mnt_child", named("list_head"))];
        declare::<MountStruct>(&mut synth, &lists);
        synth.structure("mnt_namespace", Record::new().field("root", PTR).field("nr_mounts", U32));
        let (ns, mount) = (synth.alloc("mnt_namespace"), synth.alloc("mount"));
        synth.set("mnt_namespace", ns, "root", mount);
        let children = synth.list_init("mount", mount, "mnt_mounts");
        let child = synth.address_of("mount", mount, "mnt_child");
        synth.list_add_tail(child, children);
        let kernel = open(&synth);
        let error = Autopsy::new(&kernel).mounts_of(ns).unwrap_err().to_string();
        assert!(error.contains("comes up twice"), "{error}");
    }
}
