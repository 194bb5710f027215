//! Terminals: `tty_struct`, the N_TTY line discipline (include/linux/tty.h, drivers/tty/n_tty.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Bytes, Severity, Termios, Tty, TtyId, WindowSize};

use crate::Autopsy;
use crate::error::{Result, corrupt};

// tty_driver.type (include/linux/tty_driver.h; an enum only since 6.14).
const TTY_DRIVER_TYPE_CONSOLE: i16 = 2;
const TTY_DRIVER_TYPE_SERIAL: i16 = 3;
const TTY_DRIVER_TYPE_PTY: i16 = 4;
const PTY_TYPE_MASTER: i16 = 1;
/// N_TTY, the ordinary line discipline.
const N_TTY: i32 = 0;
/// N_TTY_BUF_SIZE.
const BUFFER: usize = 4096;
/// ICANON in c_lflag.
const ICANON: u32 = 0o2;
/// __DISABLED_CHAR, what stands in the buffer for an end-of-file character.
const DISABLED_CHAR: u8 = 0;

#[derive(KernelType)]
#[kernel("tty_struct")]
struct TtyStruct {
    driver: u64,
    index: i32,
    ldisc: u64,
    #[kernel("termios.c_iflag")]
    iflag: u32,
    #[kernel("termios.c_oflag")]
    oflag: u32,
    #[kernel("termios.c_cflag")]
    cflag: u32,
    #[kernel("termios.c_lflag")]
    lflag: u32,
    #[kernel("termios.c_line")]
    line: u8,
    #[kernel("termios.c_cc")]
    cc: [u8; 19],
    #[kernel("termios.c_ispeed")]
    ispeed: u32,
    #[kernel("termios.c_ospeed")]
    ospeed: u32,
    name: [u8; 64],
    #[kernel("winsize.ws_row")]
    rows: u16,
    #[kernel("winsize.ws_col")]
    cols: u16,
    #[kernel("winsize.ws_xpixel")]
    xpixel: u16,
    #[kernel("winsize.ws_ypixel")]
    ypixel: u16,
    #[kernel("ctrl.pgrp")]
    pgrp: u64,
    #[kernel("ctrl.session")]
    session: u64,
    disc_data: u64,
}

#[derive(KernelType)]
#[kernel("tty_driver")]
struct Driver {
    major: i32,
    minor_start: i32,
    #[kernel("type")]
    kind: i16,
    subtype: i16,
}

#[derive(KernelType)]
#[kernel("n_tty_data")]
struct NTty {
    read_head: u64,
    commit_head: u64,
    read_tail: u64,
    read_buf: [u8; BUFFER],
    read_flags: [u64; BUFFER / 64],
}

impl Autopsy<'_> {
    /// Reads a terminal into the table, unless it is there.
    pub(crate) fn tty(&self, addr: u64) -> Result<()> {
        let id = TtyId(addr);
        if self.ttys.borrow().contains_key(&id) {
            return Ok(());
        }
        let tty: TtyStruct = self.kernel.read(addr)?;
        let driver: Driver = self.kernel.read(tty.driver)?;
        let name = tty.name.split(|b| *b == 0).next().unwrap_or_default();
        let mut unsupported = match (driver.kind, driver.subtype) {
            (TTY_DRIVER_TYPE_SERIAL, _) => None,
            (TTY_DRIVER_TYPE_PTY, PTY_TYPE_MASTER) => Some("master of a pseudo-terminal"),
            (TTY_DRIVER_TYPE_PTY, _) => Some("pseudo-terminal"),
            (TTY_DRIVER_TYPE_CONSOLE, _) => Some("virtual console"),
            _ => Some("terminal of an unknown kind"),
        }
        .map(|what| format!("{what}: not brought back by this version"));
        let input = match self.line_discipline(tty.ldisc) {
            Ok(N_TTY) if tty.disc_data != 0 => self.input(&tty)?,
            Ok(N_TTY) => Vec::new(),
            Ok(other) => {
                unsupported
                    .get_or_insert(format!("line discipline {other}: not brought back by this version"));
                Vec::new()
            }
            Err(error) => {
                self.find(Severity::Doubt, "tty", format!("its line discipline cannot be read: {error}"));
                Vec::new()
            }
        };
        let minor = driver.minor_start.saturating_add(tty.index);
        if driver.major < 0 || minor < 0 {
            return Err(corrupt("tty_struct", addr, format!("device {}:{minor}", driver.major)));
        }
        let tty = Tty {
            name: Bytes(name.to_vec()),
            major: driver.major as u32,
            minor: minor as u32,
            unsupported,
            termios: Termios {
                iflag: tty.iflag,
                oflag: tty.oflag,
                cflag: tty.cflag,
                lflag: tty.lflag,
                line: tty.line,
                cc: tty.cc.to_vec(),
                ispeed: tty.ispeed,
                ospeed: tty.ospeed,
            },
            window: WindowSize { rows: tty.rows, cols: tty.cols, xpixel: tty.xpixel, ypixel: tty.ypixel },
            session: self.pid_number(tty.session)?,
            foreground: self.pid_number(tty.pgrp)?,
            input,
        };
        self.ttys.borrow_mut().insert(id, tty);
        Ok(())
    }

    /// The number of the line discipline (N_TTY, N_PPP …).
    fn line_discipline(&self, ldisc: u64) -> Result<i32> {
        let ops = self.kernel.read_u64(ldisc.wrapping_add(self.kernel.offset_of("tty_ldisc", "ops")?))?;
        Ok(self.kernel.read_i32(ops.wrapping_add(self.kernel.offset_of("tty_ldisc_ops", "num")?))?)
    }

    /// What was typed and not yet read.
    fn input(&self, tty: &TtyStruct) -> Result<Vec<u8>> {
        let data: NTty = self.kernel.read(tty.disc_data)?;
        unread(&data, tty.lflag & ICANON != 0, tty.cc[4])
            .ok_or_else(|| corrupt("n_tty_data", tty.disc_data, "its buffer's ends do not fit together"))
    }
}

/// The unread bytes of a line discipline, as they were typed.
///
/// Head and tail run freely over the ring. In canonical mode the unfinished line beyond the last newline counts, too: whoever
/// types it again gets the same state. What stands there for an end-of-file character is turned back into `eof`.
fn unread(data: &NTty, canonical: bool, eof: u8) -> Option<Vec<u8>> {
    let head = if canonical { data.read_head } else { data.commit_head };
    let len = head.wrapping_sub(data.read_tail);
    if len > BUFFER as u64 {
        return None;
    }
    let byte = |i: u64| {
        let at = data.read_tail.wrapping_add(i) as usize % BUFFER;
        let flagged = data.read_flags[at / 64] >> (at % 64) & 1 != 0;
        match data.read_buf[at] {
            DISABLED_CHAR if canonical && flagged => eof,
            byte => byte,
        }
    };
    Some((0..len).map(byte).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(text: &[u8], tail: u64) -> NTty {
        let mut data = NTty {
            read_head: tail.wrapping_add(text.len() as u64),
            commit_head: tail.wrapping_add(text.len() as u64),
            read_tail: tail,
            read_buf: [b'#'; BUFFER],
            read_flags: [0; BUFFER / 64],
        };
        for (i, byte) in text.iter().enumerate() {
            data.read_buf[tail.wrapping_add(i as u64) as usize % BUFFER] = *byte;
        }
        data
    }

    #[test]
    fn the_buffer_wraps_around() {
        for tail in [0, 1, 4090, 4096, 3 * 4096 + 4093, u64::MAX - 2] {
            let data = typed(b"hello, world", tail);
            assert_eq!(unread(&data, false, 4).unwrap(), b"hello, world", "tail {tail}");
            assert_eq!(unread(&data, true, 4).unwrap(), b"hello, world", "tail {tail}");
        }
    }

    #[test]
    fn end_of_file_is_typed_again() {
        let mut data = typed(b"a\n\0", 4094);
        // Bits of the newline (4095) and of the end of file (wrapped to 0).
        data.read_flags[63] |= 1 << 63;
        data.read_flags[0] |= 1;
        assert_eq!(unread(&data, true, 4).unwrap(), b"a\n\x04");
        // A NUL that was typed is one.
        data.read_flags[0] = 0;
        assert_eq!(unread(&data, true, 4).unwrap(), b"a\n\0");
        assert_eq!(unread(&data, false, 4).unwrap(), b"a\n\0");
    }

    #[test]
    fn only_committed_bytes_count_in_raw_mode() {
        let mut data = typed(b"abcdef", 10);
        data.commit_head = 13;
        assert_eq!(unread(&data, false, 4).unwrap(), b"abc");
    }

    #[test]
    fn ends_that_do_not_fit_are_refused() {
        let mut data = typed(b"abc", 10);
        data.read_tail = 14;
        assert!(unread(&data, false, 4).is_none());
    }
}
