//! Pseudo-terminals.

use serde::{Deserialize, Serialize};

use crate::TtyId;

/// What one end of a pseudo-terminal has beside being a terminal. Characters that the other end has written and that are on their way are in
/// [`Pty::arriving`]; what the line discipline holds already is the terminal's input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pty {
    /// N of `/dev/pts/N`.
    pub index: u32,
    /// The end that /dev/ptmx gave, as opposed to `/dev/pts/N`.
    pub master: bool,
    /// The other end.
    pub other: TtyId,
    /// The other end has been open, and is not any more.
    pub other_closed: bool,
    /// How often it is open.
    pub open_count: u32,
    /// TIOCPKT (of the master).
    pub packet: bool,
    /// TIOCSPTLCK (of the slave).
    pub locked: bool,
    /// Owner, group and permissions of `/dev/pts/N` (of the slave).
    pub owner: Option<(u32, u32, u32)>,
    /// Written by the other end, and not looked at by the line discipline.
    pub arriving: Vec<u8>,
}
