//! Virtual consoles: screen, cursor and modes, after what every terminal has.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use snapshot::{Reason, Tty, VirtualConsole};

use crate::deadline::Deadline;
use crate::{sys, tty};

const KDSKBMODE: u64 = 0x4B45;
const VT_ACTIVATE: u64 = 0x5606;

/// Gives an open console its screen and modes. What cannot be given is a loss: programs draw anew when they are asked to.
pub(crate) fn fill(fd: &OwnedFd, tty: &Tty, console: &VirtualConsole) -> Vec<Reason> {
    let mut losses = Vec::new();
    let mut lose = |what: &str, why: String| {
        losses.push(Reason::new("console", format!("{}: {what}: {why}", tty.name)));
    };
    if let Err(e) = write_raw(fd, tty, sequences(console).as_bytes()) {
        lose("its modes are not set again", e);
    }
    match draw(console) {
        Ok(()) => {}
        Err(why) => lose("its screen is not as it was", why),
    }
    if let Some(mode) = console.keyboard
        && let Err(e) = sys::ioctl_number(fd.as_raw_fd(), KDSKBMODE, mode.into())
    {
        lose("its keyboard mode is not set again", e.to_string());
    }
    if console.foreground
        && let Err(e) = sys::ioctl_number(fd.as_raw_fd(), VT_ACTIVATE, console.number.into())
    {
        lose("it is not the one that is shown", e.to_string());
    }
    losses
}

/// Modes, scrolling region and attributes; the cursor moves.
fn sequences(console: &VirtualConsole) -> String {
    let modes: String = console.modes.iter().map(|mode| mode.sequence.as_str()).collect();
    let (top, bottom) = console.region;
    let attributes: Vec<String> = console.attributes.iter().map(u8::to_string).collect();
    format!("{modes}\x1b[{};{bottom}r\x1b[{}m", top.saturating_add(1), attributes.join(";"))
}

/// Writes as it is: the terminal's settings would change it.
fn write_raw(fd: &OwnedFd, tty: &Tty, bytes: &[u8]) -> Result<(), String> {
    let settings = tty.termios.clone();
    let raw = snapshot::Termios { oflag: settings.oflag & !libc::OPOST, ..settings };
    tty::set_termios(fd, &raw)?;
    let sent = tty::send(fd, bytes, Deadline::after(tty::PATIENCE));
    tty::set_termios(fd, &tty.termios)?;
    sent.map_err(|(_, e)| e.to_string())
}

/// Cells and cursor, through /dev/vcsa.
fn draw(console: &VirtualConsole) -> Result<(), String> {
    if console.screen.is_empty() {
        return Err("it was in the memory of the display".into());
    }
    let path = PathBuf::from(format!("/dev/vcsa{}", console.number));
    let io = |e: Errno| format!("{}: {e}", path.display());
    let screen = sys::open(&path, libc::O_RDWR, 0).map_err(io)?;
    let mut head = [0; 4];
    nix::sys::uio::pread(&screen, &mut head, 0).map_err(io)?;
    let [rows, cols, ..] = head;
    if (u32::from(rows), u32::from(cols)) != (console.rows, console.cols) {
        return Err(format!(
            "it has {cols} columns and {rows} rows now, and had {} and {}",
            console.cols, console.rows
        ));
    }
    let mut bytes = vec![rows, cols, console.x as u8, console.y as u8];
    bytes.extend_from_slice(console.screen.as_bytes());
    let written = nix::sys::uio::pwrite(&screen, &bytes, 0).map_err(io)?;
    if written == bytes.len() {
        Ok(())
    } else {
        Err(format!("{written} of {} bytes were taken", bytes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::VtMode;

    #[test]
    fn modes_come_before_the_region_and_the_attributes() {
        let mode = |sequence: &str| VtMode { name: String::new(), on: true, sequence: sequence.into() };
        let console = VirtualConsole {
            modes: vec![mode("\x1b[?7h"), mode("\x1b=")],
            region: (2, 20),
            attributes: vec![0, 1, 31],
            ..VirtualConsole::default()
        };
        assert_eq!(sequences(&console), "\x1b[?7h\x1b=\x1b[3;20r\x1b[0;1;31m");
    }
}
