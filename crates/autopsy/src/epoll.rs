//! epoll instances: `eventpoll`, `epitem` (fs/eventpoll.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Epoll, EpollItem, FileId, Severity};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// Files that one instance watches.
const MAX_ITEMS: usize = 1 << 22;
/// The kernel allows instances to watch each other five deep.
const MAX_DEPTH: u32 = 8;
/// `EP_UNACTIVE_PTR`: not on the list of those that became ready while events were being handed out.
const UNACTIVE: u64 = u64::MAX;

#[derive(KernelType)]
#[kernel("epitem")]
struct Item {
    #[kernel("ffd.file")]
    file: u64,
    #[kernel("ffd.fd")]
    fd: i32,
    #[kernel("event.events")]
    events: u32,
    #[kernel("event.data")]
    data: u64,
    #[kernel("rdllink", address)]
    link: u64,
    #[kernel("rdllink.next")]
    link_next: u64,
    #[kernel("next", or = "ovflist_next")]
    overflow_next: u64,
    dying: u8,
}

impl Autopsy<'_> {
    /// Reads what an instance watches, and the files behind it into the table. `addr`: of the `eventpoll`.
    pub(crate) fn epoll(&self, addr: u64) -> Result<Epoll> {
        let depth = self.epoll_depth.get();
        if depth >= MAX_DEPTH {
            return Err(corrupt("eventpoll", addr, "is watched by itself, or too deep"));
        }
        self.epoll_depth.set(depth + 1);
        let items = self.epoll_items(addr);
        self.epoll_depth.set(depth);
        Ok(Epoll { items: items? })
    }

    fn epoll_items(&self, addr: u64) -> Result<Vec<EpollItem>> {
        let root = addr.wrapping_add(self.kernel.offset_of("eventpoll", "rbr.rb_root")?);
        let to_node = self.kernel.offset_of("epitem", "rbn")?;
        let mut items = Vec::new();
        for node in self.kernel.rb_tree(root, MAX_ITEMS) {
            let item: Item = self.kernel.read(node?.wrapping_sub(to_node))?;
            // Its file is being closed just now.
            if item.dying != 0 {
                continue;
            }
            if let Err(error) = self.file(item.file) {
                let text =
                    format!("descriptor {}, which an epoll instance watches, is lost: {error}", item.fd);
                self.find(Severity::Note, "epoll", text);
            }
            items.push(EpollItem {
                fd: item.fd,
                file: FileId(item.file),
                events: item.events,
                data: item.data,
                ready: item.link_next != item.link || item.overflow_next != UNACTIVE,
            });
        }
        Ok(items)
    }
}
