//! Terminals.

use serde::{Deserialize, Serialize};

use crate::{Bytes, Pid, Pty, VirtualConsole};

/// Address of a `struct tty_struct` in the dead kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TtyId(pub u64);

/// A terminal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tty {
    /// Device name without `/dev/`: `ttyS0`, `tty1`, `pts/3`.
    pub name: Bytes,
    #[allow(missing_docs)]
    pub major: u32,
    #[allow(missing_docs)]
    pub minor: u32,
    /// Why it cannot be brought back; for people.
    pub unsupported: Option<String>,
    #[allow(missing_docs)]
    pub termios: Termios,
    #[allow(missing_docs)]
    pub window: WindowSize,
    /// Session that it controls, 0: none.
    pub session: Pid,
    /// Foreground process group, 0: none.
    pub foreground: Pid,
    /// Typed and not yet read (the line discipline's buffer).
    pub input: Vec<u8>,
    /// Written, accepted by the driver and not sent yet, as it goes over the line.
    #[serde(default)]
    pub output: Bytes,
    /// Its screen and modes, if it is a virtual console.
    #[serde(default)]
    pub console: Option<VirtualConsole>,
    /// One end of a pseudo-terminal.
    #[serde(default)]
    pub pty: Option<Pty>,
}

/// `struct ktermios` / `struct termios2`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Termios {
    pub iflag: u32,
    pub oflag: u32,
    pub cflag: u32,
    pub lflag: u32,
    pub line: u8,
    /// 19 control characters.
    pub cc: Vec<u8>,
    pub ispeed: u32,
    pub ospeed: u32,
}

/// `struct winsize`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct WindowSize {
    pub rows: u16,
    pub cols: u16,
    pub xpixel: u16,
    pub ypixel: u16,
}
