//! Virtual consoles.

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// What a virtual console has beyond what every terminal has (`struct vc_data`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualConsole {
    /// From 1 on: `tty1` is number 1.
    pub number: u32,
    /// It was the one that is shown.
    pub foreground: bool,
    #[allow(missing_docs)]
    pub rows: u32,
    #[allow(missing_docs)]
    pub cols: u32,
    /// The cells, row by row, two bytes each: character and attribute, as /dev/vcsa gives them. Empty: not known.
    pub screen: Bytes,
    /// The cursor, from 0 on.
    pub x: u32,
    #[allow(missing_docs)]
    pub y: u32,
    /// Scrolling region: first row, and the row behind the last one, from 0 on.
    pub region: (u32, u32),
    /// Attributes for what is written next, as the parameters of `ESC [ … m`.
    pub attributes: Vec<u8>,
    /// The console's modes, as they are set by escape sequences.
    pub modes: Vec<VtMode>,
    /// KDSKBMODE: what the keyboard sends.
    pub keyboard: Option<u32>,
    /// The program draws on the screen itself (KD_GRAPHICS).
    pub graphics: bool,
}

/// A mode of a virtual console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VtMode {
    /// For people.
    pub name: String,
    #[allow(missing_docs)]
    pub on: bool,
    /// What is written to switch it to this state.
    pub sequence: String,
}
