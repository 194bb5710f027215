//! File locks and leases: `file_lock_context` (include/linux/filelock.h, fs.h, fs/locks.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{FileId, InodeId, Lock, LockKind, LockOwner};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// Locks that one inode may have before something is wrong.
const MAX_LOCKS: usize = 1 << 16;

// fl_flags (include/linux/filelock.h).
const FL_DELEG: u32 = 4;
const FL_DOWNGRADE_PENDING: u32 = 256;
const FL_UNLOCK_PENDING: u32 = 512;
const FL_OFDLCK: u32 = 1024;
const FL_LAYOUT: u32 = 2048;
/// F_WRLCK, which flock(2) uses too.
const F_WRLCK: u8 = 1;
const F_UNLCK: u8 = 2;

#[derive(KernelType)]
#[kernel("file_lock_context")]
struct LockContext {
    #[kernel(address)]
    flc_flock: u64,
    #[kernel(address)]
    flc_posix: u64,
    #[kernel(address)]
    flc_lease: u64,
}

#[derive(KernelType)]
#[kernel("file_lock")]
struct FileLock {
    #[kernel("fl_file", or = "c.flc_file")]
    file: u64,
    #[kernel("fl_owner", or = "c.flc_owner")]
    owner: u64,
    #[kernel("fl_flags", or = "c.flc_flags")]
    flags: u32,
    #[kernel("fl_type", or = "c.flc_type")]
    kind: u8,
    #[kernel("fl_pid", or = "c.flc_pid")]
    pid: i32,
    fl_start: i64,
    fl_end: i64,
    /// Leases have a structure of their own since 6.9.
    #[kernel("fl_fasync", optional)]
    fasync: Option<u64>,
}

#[derive(KernelType)]
#[kernel("file_lease")]
struct FileLease {
    #[kernel("c.flc_file")]
    file: u64,
    #[kernel("c.flc_flags")]
    flags: u32,
    #[kernel("c.flc_type")]
    kind: u8,
    #[kernel("c.flc_pid")]
    pid: i32,
    fl_fasync: u64,
}

impl Autopsy<'_> {
    /// Reads the locks on an inode into the table, unless they are there. Only locks that are held are in its lists.
    pub(crate) fn locks(&self, inode: u64) -> Result<()> {
        let id = InodeId(inode);
        if self.locks.borrow().contains_key(&id) {
            return Ok(());
        }
        let at = inode.wrapping_add(self.kernel.offset_of("inode", "i_flctx")?);
        let context = self.kernel.read_u64(at)?;
        let mut locks = Vec::new();
        if context != 0 {
            let context: LockContext = self.kernel.read(context)?;
            for node in self.list(context.flc_flock, MAX_LOCKS)? {
                let lock = self.file_lock(node)?;
                locks.push(self.describe(id, LockKind::Flock, LockOwner::File(FileId(lock.file)), &lock)?);
            }
            for node in self.list(context.flc_posix, MAX_LOCKS)? {
                let lock = self.file_lock(node)?;
                let (kind, owner) = match lock.flags & FL_OFDLCK {
                    0 => (LockKind::Posix, LockOwner::Table(lock.owner)),
                    _ => (LockKind::Ofd, LockOwner::File(FileId(lock.file))),
                };
                locks.push(self.describe(id, kind, owner, &lock)?);
            }
            for node in self.list(context.flc_lease, MAX_LOCKS)? {
                let lease = self.lease(node)?;
                // What a server in the kernel has promised to its clients is nobody's here.
                if lease.flags & (FL_DELEG | FL_LAYOUT) != 0 {
                    continue;
                }
                let owner = LockOwner::File(FileId(lease.file));
                let mut lock = self.describe(id, LockKind::Lease, owner, &lease)?;
                lock.breaking = lease.flags & (FL_DOWNGRADE_PENDING | FL_UNLOCK_PENDING) != 0;
                if let Some(fasync @ 1..) = lease.fasync {
                    let at = fasync.wrapping_add(self.kernel.offset_of("fasync_struct", "fa_fd")?);
                    lock.descriptor = self.kernel.read_i32(at)?;
                }
                locks.push(lock);
            }
        }
        self.locks.borrow_mut().insert(id, locks);
        Ok(())
    }

    fn file_lock(&self, node: u64) -> Result<FileLock> {
        let link = self.kernel.offset_of("file_lock", "fl_list");
        let link = link.or_else(|_| self.kernel.offset_of("file_lock", "c.flc_list"))?;
        Ok(self.kernel.read(node.wrapping_sub(link))?)
    }

    fn lease(&self, node: u64) -> Result<FileLock> {
        if !self.kernel.has_type("file_lease") {
            return self.file_lock(node);
        }
        let link = self.kernel.offset_of("file_lease", "c.flc_list")?;
        let lease: FileLease = self.kernel.read(node.wrapping_sub(link))?;
        Ok(FileLock {
            file: lease.file,
            owner: lease.file,
            flags: lease.flags,
            kind: lease.kind,
            pid: lease.pid,
            fl_start: 0,
            fl_end: i64::MAX,
            fasync: Some(lease.fl_fasync),
        })
    }

    fn describe(&self, inode: InodeId, kind: LockKind, owner: LockOwner, lock: &FileLock) -> Result<Lock> {
        let pid = lock.pid;
        if lock.kind > F_UNLCK || lock.fl_start < 0 || lock.fl_end < lock.fl_start {
            let why = format!("type {}, bytes {} to {}", lock.kind, lock.fl_start, lock.fl_end);
            return Err(corrupt("file_lock", inode.0, why));
        }
        Ok(Lock {
            kind,
            inode,
            owner,
            exclusive: lock.kind == F_WRLCK,
            start: lock.fl_start,
            end: lock.fl_end,
            pid,
            descriptor: -1,
            breaking: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use ktypes::Kernel;
    use synth::{Record, Synth, U64, named};

    #[derive(KernelType)]
    #[kernel("fasync_struct")]
    struct Fasync {
        #[kernel("fa_fd")]
        _fd: i32,
    }

    /// An inode with a context without locks.
    struct Machine {
        synth: Synth,
        inode: u64,
        context: u64,
    }

    impl Machine {
        fn new() -> Self {
            let mut synth = Synth::new();
            synth.structure("inode", Record::new().field("i_flctx", U64));
            let heads = ["flc_flock", "flc_posix", "flc_lease"].map(|name| (name, named("list_head")));
            declare::<LockContext>(&mut synth, &heads);
            declare::<FileLock>(&mut synth, &[("fl_list", named("list_head"))]);
            declare::<Fasync>(&mut synth, &[]);
            let (inode, context) = (synth.alloc("inode"), synth.alloc("file_lock_context"));
            synth.set("inode", inode, "i_flctx", context);
            for (list, _) in &heads {
                synth.list_init("file_lock_context", context, list);
            }
            Self { synth, inode, context }
        }

        fn add(&mut self, list: &str, fields: &[(&str, u64)]) -> u64 {
            let lock = self.synth.alloc("file_lock");
            for (name, value) in fields {
                match *name {
                    "fl_type" => self.synth.set("file_lock", lock, name, *value as u8),
                    "fl_flags" | "fl_pid" => self.synth.set("file_lock", lock, name, *value as u32),
                    _ => self.synth.set("file_lock", lock, name, *value),
                };
            }
            let head = self.synth.address_of("file_lock_context", self.context, list);
            let node = self.synth.address_of("file_lock", lock, "fl_list");
            self.synth.list_add_tail(node, head);
            lock
        }

        fn locks(&self) -> Result<Vec<Lock>> {
            let kernel: Kernel = open(&self.synth);
            let autopsy = Autopsy::new(&kernel);
            autopsy.locks(self.inode)?;
            Ok(autopsy.locks.take().remove(&InodeId(self.inode)).unwrap_or_default())
        }
    }

    #[test]
    fn each_kind_has_its_owner_and_range() {
        let mut machine = Machine::new();
        let end = i64::MAX as u64;
        machine.add("flc_flock", &[("fl_file", 0x10), ("fl_owner", 0x10), ("fl_type", 1), ("fl_end", end)]);
        machine.add(
            "flc_posix",
            &[("fl_file", 0x10), ("fl_owner", 0x99), ("fl_start", 5), ("fl_end", 9), ("fl_pid", 42)],
        );
        machine.add(
            "flc_posix",
            &[("fl_file", 0x20), ("fl_owner", 0x20), ("fl_flags", 1 | 1024), ("fl_end", end)],
        );
        let fasync = machine.synth.alloc("fasync_struct");
        machine.synth.set("fasync_struct", fasync, "fa_fd", 7);
        machine.add(
            "flc_lease",
            &[("fl_file", 0x10), ("fl_flags", 32 | 512), ("fl_fasync", fasync), ("fl_end", end)],
        );
        machine.add("flc_lease", &[("fl_file", 0x10), ("fl_flags", 4), ("fl_end", end)]);
        let locks = machine.locks().unwrap();
        let facts: Vec<_> = locks.iter().map(|l| (l.kind, l.owner, l.exclusive, l.length())).collect();
        let file = |addr| LockOwner::File(FileId(addr));
        assert_eq!(
            facts,
            [
                (LockKind::Flock, file(0x10), true, 0),
                (LockKind::Posix, LockOwner::Table(0x99), false, 5),
                (LockKind::Ofd, file(0x20), false, 0),
                (LockKind::Lease, file(0x10), false, 0),
            ]
        );
        assert_eq!((locks[1].pid, locks[3].descriptor, locks[3].breaking), (42, 7, true));
    }

    #[test]
    fn damage_is_an_error() {
        let mut machine = Machine::new();
        assert_eq!(machine.locks().unwrap(), []);
        let lock = machine.add("flc_posix", &[("fl_start", 9), ("fl_end", 5)]);
        assert!(machine.locks().is_err());
        machine.synth.set("file_lock", lock, "fl_end", 9u64);
        assert_eq!(machine.locks().unwrap().len(), 1);
        // A list that leads into itself without coming back to its head.
        let node = machine.synth.address_of("file_lock", lock, "fl_list");
        machine.synth.write_u64(node, node);
        assert!(machine.locks().is_err());
    }
}
