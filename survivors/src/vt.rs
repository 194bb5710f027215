//! Virtual consoles.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};
use nix::libc;
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

use crate::Stage;
use crate::procfs::same;

/// One that nobody else uses.
const TTY: &str = "/dev/tty9";
const SCREEN: &str = "/dev/vcsa9";

/// Rows, columns, cursor and cells.
fn screen() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(SCREEN).context(SCREEN)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Screen, cursor, colours, modes and settings.
pub fn console(stage: &mut Stage) -> Result<()> {
    let mut tty = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(TTY)?;
    // Half of it cleared, a scrolling region, insert mode, bold yellow on blue, and the cursor somewhere.
    tty.write_all(
        b"\x1bc\x1b[2J\x1b[5;10r\x1b[31mred\r\nsecond line\x1b[4h\x1b[?7l\x1b[0;1;33;44mYELLOW\x1b[7;30H",
    )?;
    let mut termios = tcgetattr(&tty)?;
    termios.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&tty, SetArg::TCSANOW, &termios)?;
    let before = screen()?;

    let crash = stage.crash()?;
    if crash.damage {
        tty.write_all(b"noise")?;
    }
    let first = |bytes: &[u8]| bytes.iter().zip(&before).position(|(is, was)| is != was);
    let now = screen()?;
    same("length of the screen", &before.len(), &now.len())?;
    same("first byte that differs", &None, &first(&now))?;
    same("echo", &false, &tcgetattr(&tty)?.local_flags.contains(LocalFlags::ECHO))?;
    // In the colours that were chosen, and inserted.
    tty.write_all(b"\x1b[1;1Hx")?;
    let after = screen()?;
    let row = 2 * usize::from(before[1]);
    same("what was pushed aside", &before[4..4 + row - 2], &after[6..4 + row])?;
    let attribute = |at: &[u8]| at.windows(2).find(|cell| cell[0] == b'Y').map(|cell| cell[1]);
    same("its colours", &attribute(&before[4..]), &Some(after[5]))?;
    // At the end of the region the region scrolls, and nothing else.
    tty.write_all(b"\x1b[10;1H\n\n")?;
    same("the first row", &after[4..4 + row], &screen()?[4..4 + row])
}
