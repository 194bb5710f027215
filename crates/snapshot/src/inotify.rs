//! inotify instances.

use serde::{Deserialize, Serialize};

use crate::{Bytes, Descriptor, Reason};

/// An inotify instance: what it watches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inotify {
    /// By ascending watch descriptor.
    pub watches: Vec<Watch>,
    /// The watch descriptor that the next new watch gets, if it is free; 0 before the first.
    pub next: u32,
    /// Events that had not been read.
    pub unread: u32,
}

/// One watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// The watch descriptor.
    pub wd: i32,
    /// A name of what is watched, in the initial mount namespace; with a `generation`, where its file system is mounted.
    pub path: Bytes,
    /// The kernel knew no name any more: the file is found by its inode number and this generation number (open_by_handle_at(2)).
    #[serde(default)]
    pub generation: Option<u32>,
    /// IN_*: events, IN_EXCL_UNLINK, IN_ONESHOT.
    pub mask: u32,
    /// Inode number.
    pub ino: u64,
    /// File type (`st_mode & S_IFMT`).
    pub file_type: u32,
    /// The file system makes inode numbers anew with each mount.
    pub volatile: bool,
    /// Why it cannot be watched again.
    pub unsupported: Option<String>,
}

/// Watch descriptors are given out by counting, some microseconds each; more than this are not counted through.
pub const MAX_WATCH_DESCRIPTOR: i32 = 1 << 18;

pub(crate) fn judge(d: &Descriptor, inotify: &Inotify, reasons: &mut Vec<Reason>, losses: &mut Vec<Reason>) {
    let mut give_up = |why: String| {
        reasons.push(Reason::new("inotify", format!("descriptor {}: {why}", d.fd)));
    };
    for watch in &inotify.watches {
        if let Some(why) = &watch.unsupported {
            give_up(format!("watch {}: {why}", watch.wd));
        }
    }
    if let Some(watch) = inotify.watches.last().filter(|watch| watch.wd > MAX_WATCH_DESCRIPTOR) {
        give_up(format!("the watch descriptor {} is too high to be counted up to", watch.wd));
    }
    if inotify.unread > 0 {
        let text = format!(
            "descriptor {}: {} unread inotify events are gone; it is told that events were lost (IN_Q_OVERFLOW)",
            d.fd, inotify.unread
        );
        losses.push(Reason::new("inotify", text));
    }
}
