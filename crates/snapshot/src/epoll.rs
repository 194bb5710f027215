//! epoll instances.

use serde::{Deserialize, Serialize};

use crate::file::MAX_DESCRIPTOR;
use crate::{FileId, FileKind, OpenFile, Reason, Snapshot};

/// What an epoll instance watches (`struct eventpoll`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoll {
    /// In the order of their keys.
    pub items: Vec<EpollItem>,
}

/// One entry of the interest list (`struct epitem`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollItem {
    /// Descriptor under which it was added: part of the key, whatever that number means by now.
    pub fd: i32,
    /// The file that is watched.
    pub file: FileId,
    /// EPOLL* as given to epoll_ctl(2). A one-shot item that has fired has no events left.
    pub events: u32,
    /// `epoll_data_t`.
    pub data: u64,
    /// It was on the list of those that may have something to report.
    pub ready: bool,
}

/// Flags beside the events proper (EP_PRIVATE_BITS: EPOLLEXCLUSIVE, EPOLLWAKEUP, EPOLLONESHOT, EPOLLET).
const PRIVATE: u32 = 0xf000_0000;
const ONESHOT: u32 = 1 << 30;
const EDGE: u32 = 1 << 31;

impl EpollItem {
    /// EPOLLET.
    pub fn is_edge_triggered(&self) -> bool {
        self.events & EDGE != 0
    }

    /// EPOLLONESHOT.
    pub fn is_one_shot(&self) -> bool {
        self.events & ONESHOT != 0
    }

    /// A one-shot item that has fired and was not armed again.
    pub fn is_disarmed(&self) -> bool {
        self.is_one_shot() && self.events & !PRIVATE == 0
    }

    /// Why it cannot be watched again, if so.
    pub fn obstacle(&self, snapshot: &Snapshot) -> Option<String> {
        if !(0..MAX_DESCRIPTOR).contains(&self.fd) {
            return Some(format!("descriptor {} is too high", self.fd));
        }
        match snapshot.files.get(&self.file) {
            None => Some(format!("the file of descriptor {} could not be read", self.fd)),
            Some(OpenFile { kind: FileKind::Unsupported { what }, .. }) => {
                Some(format!("descriptor {}: {what}", self.fd))
            }
            Some(_) => None,
        }
    }
}

impl Epoll {
    /// What a process loses that has this instance open as descriptor `fd`.
    pub(crate) fn losses(&self, snapshot: &Snapshot, fd: i32) -> impl Iterator<Item = Reason> {
        self.items.iter().filter_map(move |item| {
            let why = item.obstacle(snapshot)?;
            Some(Reason::new(
                "epoll",
                format!("its epoll instance (descriptor {fd}) no longer watches: {why}"),
            ))
        })
    }
}
