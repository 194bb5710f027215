//! For fuzzing only (`cfg(fuzzing)`): the walkers, each by its number.

use snapshot::{AddressSpaceId, Bytes, Mount, PipeId};

use crate::Autopsy;
use crate::fs::Path;
use crate::syscall::Timers;

/// How many there are.
pub const WALKERS: u8 = 52;

impl Autopsy<'_> {
    /// Lets a walker begin at an address.
    pub fn walk(&self, number: u8, addr: u64) {
        let mounts: Vec<Mount> = ["ext4", "tmpfs", "xfs"].into_iter().map(mount).collect();
        let fs_type = |name: &str| Bytes::from(name);
        match number {
            0 => _ = self.aio_contexts(addr).is_ok(),
            1 => _ = self.autofs(&mounts),
            2 => _ = self.cgroups(),
            3 => _ = self.now(),
            4 => _ = self.credentials(addr).is_ok(),
            5 => _ = self.descriptors(addr).is_ok(),
            6 => _ = self.epoll(addr).is_ok(),
            7 => _ = self.eventfd(addr).is_ok(),
            8 => _ = self.extents(addr, addr.wrapping_add(64)).is_ok(),
            9 => _ = self.directory_blocks(addr).is_ok(),
            10 => _ = self.target_in_block(addr, addr, 50).is_ok(),
            11 => _ = self.file(addr).is_ok(),
            12 => _ = self.fs_context(addr).is_ok(),
            13 => _ = self.path(&Path { mnt: addr, dentry: addr.wrapping_add(64) }).is_ok(),
            14 => _ = self.kernfs_path(addr).is_ok(),
            15 => _ = self.mounts_of(addr).is_ok(),
            16 => _ = self.path_in_fs(addr).is_ok(),
            17 => _ = self.huge_pages(),
            18 => _ = self.huge_memfd_kind(addr).is_ok(),
            19 => _ = self.inet(addr, 0).is_ok(),
            20 => {
                if let Ok(facts) = self.inode_facts(addr) {
                    _ = self.inode(addr, &facts, &Bytes::from("/")).is_ok();
                }
            }
            21 => _ = self.inotify(addr).is_ok(),
            22 => _ = self.ipc(),
            23 => _ = self.locks(addr).is_ok(),
            24 => _ = self.memfd_kind(addr).is_ok(),
            25 => {
                _ = self.address_space(AddressSpaceId(addr), &|_| None, &mut Vec::new()).is_ok();
                let spaces = self.address_spaces.borrow();
                spaces.values().for_each(|mm| _ = self.crash_procedure(mm));
            }
            26 => _ = self.mount_namespace(addr).is_ok(),
            27 => _ = self.uts_namespace(addr).is_ok(),
            28 => _ = self.netlink(addr, 0).is_ok(),
            29 => _ = self.pipe(PipeId(addr), None).is_ok(),
            30 => _ = (self.pid_number(addr).is_ok(), self.pid_with_fate(addr, true).is_ok()),
            31 => _ = self.proc_file(addr, b"proc", b"/proc/1/fd").is_ok(),
            32 => _ = self.namespace_file(addr).is_ok(),
            33 => _ = self.tasks().is_ok(),
            34 => _ = self.processes().is_ok(),
            35 => _ = (self.pty(addr, 136, false).is_ok(), self.pty(addr, 128, true).is_ok()),
            36 => _ = self.saver(),
            37 => _ = self.seccomp(addr).is_ok(),
            38 => _ = self.signal_actions(addr).is_ok(),
            39 => _ = self.pending_signals(addr).is_ok(),
            40 => _ = (self.signalfd(addr).is_ok(), self.timerfd(addr).is_ok()),
            41 => _ = self.socket_kind(addr).is_ok(),
            42 => _ = self.classic_bpf(addr).is_ok(),
            43 => _ = (self.swap_areas(), self.swapped_page(addr)),
            44 => _ = self.tmpfs(&mounts.iter().collect::<Vec<_>>()),
            45 => _ = self.tty(addr).is_ok(),
            46 => {
                _ = self.unix(addr).is_ok();
                self.read_held();
            }
            47 => _ = self.virtual_console(addr).is_ok(),
            48 => _ = self.unwritten_files(&mounts, 0),
            49 => {
                for name in ["ext4", "tmpfs", "xfs"] {
                    _ = self.xattrs(addr, &fs_type(name)).is_ok();
                }
            }
            50 => {
                _ = (self.xfs_extents(addr).is_ok(), self.xfs_xattrs(addr).is_ok(), self.zram(addr).is_ok())
            }
            51 => _ = (self.kernel_log().is_ok(), self.panic_report(), Timers::read(self.kernel).is_ok()),
            _ => _ = self.take_snapshot().is_ok(),
        }
    }
}

fn mount(fs_type: &str) -> Mount {
    Mount {
        id: 1,
        parent: 0,
        mountpoint: "/".into(),
        root: "/".into(),
        fs_type: fs_type.into(),
        source: "none".into(),
        dev_major: 0,
        dev_minor: 0,
        flags: Default::default(),
        peer_group: 0,
        master: 0,
    }
}
