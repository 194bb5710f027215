//! Terminals: `tty_struct`, the N_TTY line discipline (include/linux/tty.h, drivers/tty/n_tty.c; 6.1 and 6.12), what serial ports
//! have not sent (drivers/tty/serial/serial_core.c).

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
/// UART_XMIT_SIZE.
const UART_BUFFER: u32 = 4096;
/// ICANON in c_lflag.
const ICANON: u32 = 0o2;
/// __DISABLED_CHAR, what stands in the buffer for an end-of-file character.
const DISABLED_CHAR: u8 = 0;

#[derive(KernelType)]
#[kernel("tty_struct")]
struct TtyStruct {
    driver: u64,
    ops: u64,
    driver_data: u64,
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

#[derive(KernelType)]
#[kernel("uart_state")]
struct UartState {
    // A circ_buf until 6.9, then a kfifo; 6.1 has the kfifo, too, but for other drivers.
    #[kernel("xmit.buf", optional)]
    circ_buf: Option<u64>,
    #[kernel("xmit.head", optional)]
    circ_head: Option<i32>,
    #[kernel("xmit.tail", optional)]
    circ_tail: Option<i32>,
    #[kernel("port.xmit_buf", optional)]
    fifo_buf: Option<u64>,
    #[kernel("port.xmit_fifo.kfifo.in", optional)]
    fifo_in: Option<u32>,
    #[kernel("port.xmit_fifo.kfifo.out", optional)]
    fifo_out: Option<u32>,
    #[kernel("port.xmit_fifo.kfifo.mask", optional)]
    fifo_mask: Option<u32>,
}

/// The bytes between two ends of a ring that wraps around.
#[derive(Debug, PartialEq, Eq)]
struct Ring {
    buf: u64,
    size: u32,
    tail: u32,
    len: u32,
}

impl UartState {
    /// What is to be sent. `Ok(None)`: the port has no buffer, it is not open.
    fn ring(&self) -> Result<Option<Ring>, &'static str> {
        if let (Some(buf), Some(head), Some(tail)) = (self.circ_buf, self.circ_head, self.circ_tail) {
            let end = |end: i32| u32::try_from(end).ok().filter(|end| *end < UART_BUFFER);
            return match (buf, end(head), end(tail)) {
                (0, ..) => Ok(None),
                (_, Some(head), Some(tail)) => {
                    let len = head.wrapping_sub(tail) % UART_BUFFER;
                    Ok(Some(Ring { buf, size: UART_BUFFER, tail, len }))
                }
                _ => Err("its buffer's ends are outside of it"),
            };
        }
        let fifo = (self.fifo_buf, self.fifo_in, self.fifo_out, self.fifo_mask);
        let (Some(buf), Some(head), Some(tail), Some(mask)) = fifo else {
            return Err("its buffer is of an unknown kind");
        };
        if buf == 0 {
            return Ok(None);
        }
        let len = head.wrapping_sub(tail);
        match mask.checked_add(1) {
            Some(size) if size.is_power_of_two() && size <= UART_BUFFER && len <= size => {
                Ok(Some(Ring { buf, size, tail: tail & mask, len }))
            }
            _ => Err("its buffer's ends do not fit together"),
        }
    }
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
        let pty = match driver.kind {
            TTY_DRIVER_TYPE_PTY => self.pty(addr, driver.major, driver.subtype == PTY_TYPE_MASTER)?,
            _ => None,
        };
        let mut unsupported = match (driver.kind, driver.subtype) {
            (TTY_DRIVER_TYPE_SERIAL, _) => None,
            (TTY_DRIVER_TYPE_PTY, _) if pty.is_some() => None,
            (TTY_DRIVER_TYPE_PTY, _) => Some("pseudo-terminal of the BSD kind"),
            (TTY_DRIVER_TYPE_CONSOLE, _) if tty.driver_data != 0 => None,
            _ => Some("terminal of an unknown kind"),
        }
        .map(|what| format!("{what}: not brought back by this version"));
        let console = match driver.kind {
            TTY_DRIVER_TYPE_CONSOLE if tty.driver_data != 0 => Some(self.virtual_console(tty.driver_data)?),
            _ => None,
        };
        if console.as_ref().is_some_and(|console| console.graphics) {
            unsupported =
                Some("a program draws on the virtual console: not brought back by this version".into());
        }
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
        let output = match driver.kind {
            TTY_DRIVER_TYPE_SERIAL => self.output(&tty).unwrap_or_else(|why| {
                let text = format!("what {} had not sent yet is not known: {why}", Bytes(name.to_vec()));
                self.find(Severity::Loss, "tty", text);
                Vec::new()
            }),
            _ => Vec::new(),
        };
        let minor = driver.minor_start.saturating_add(tty.index);
        if driver.major < 0 || minor < 0 {
            return Err(corrupt("tty_struct", addr, format!("device {}:{minor}", driver.major)));
        }
        let name = match &pty {
            Some(pty) if !pty.master => format!("pts/{}", pty.index).as_str().into(),
            _ => Bytes(name.to_vec()),
        };
        let other = pty.as_ref().map(|pty| pty.other);
        let tty = Tty {
            name,
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
            output: Bytes(output),
            console,
            pty,
        };
        self.ttys.borrow_mut().insert(id, tty);
        // This one is in the table by now: the two do not read each other for ever.
        if let Some(other) = other {
            self.tty(other.0)?;
        }
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

    /// What a serial driver has accepted and not sent yet: write(2) returns when uart_write() has copied the bytes to a ring.
    fn output(&self, tty: &TtyStruct) -> Result<Vec<u8>, String> {
        if self.kernel.symbol_at(tty.ops) != Some("uart_ops") {
            return Err("its driver keeps it in a way of its own".into());
        }
        match tty.driver_data {
            // Closed, or its first open(2) has not come so far.
            0 => Ok(Vec::new()),
            state => self.unsent(state).map_err(|e| e.to_string()),
        }
    }

    /// What is in the ring of a `uart_state`.
    fn unsent(&self, state: u64) -> Result<Vec<u8>> {
        let uart: UartState = self.kernel.read(state)?;
        let Some(ring) = uart.ring().map_err(|why| corrupt("uart_state", state, why))? else {
            return Ok(Vec::new());
        };
        let first = ring.len.min(ring.size - ring.tail);
        let mut bytes =
            self.kernel.read_bytes(ring.buf.wrapping_add(u64::from(ring.tail)), first as usize)?;
        bytes.extend(self.kernel.read_bytes(ring.buf, (ring.len - first) as usize)?);
        Ok(bytes)
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
    use crate::testing::open;
    use synth::{Record, Synth, Type, U32, U64, named};

    /// A port as 6.1 has it, with an unused kfifo beside the ring in use.
    fn circ(buf: u64, head: i32, tail: i32) -> UartState {
        UartState {
            circ_buf: Some(buf),
            circ_head: Some(head),
            circ_tail: Some(tail),
            ..fifo(0, 0, 0, UART_BUFFER - 1)
        }
    }

    fn fifo(buf: u64, head: u32, tail: u32, mask: u32) -> UartState {
        UartState {
            circ_buf: None,
            circ_head: None,
            circ_tail: None,
            fifo_buf: Some(buf),
            fifo_in: Some(head),
            fifo_out: Some(tail),
            fifo_mask: Some(mask),
        }
    }

    #[test]
    fn rings_of_serial_ports() {
        let ring = |tail, len| Ok(Some(Ring { buf: 1 << 12, size: UART_BUFFER, tail, len }));
        assert_eq!(circ(1 << 12, 7, 7).ring(), ring(7, 0));
        assert_eq!(circ(1 << 12, 12, 7).ring(), ring(7, 5));
        assert_eq!(circ(1 << 12, 2, 4094).ring(), ring(4094, 4));
        assert_eq!(circ(0, 0, 0).ring(), Ok(None), "a closed port");
        for (head, tail) in [(4096, 0), (0, 4096), (-1, 0), (0, -1)] {
            assert!(circ(1 << 12, head, tail).ring().is_err(), "{head} {tail}");
        }
        let mask = UART_BUFFER - 1;
        assert_eq!(fifo(1 << 12, 4096, 0, mask).ring(), ring(0, 4096), "a full one");
        assert_eq!(fifo(1 << 12, 3, u32::MAX - 1, mask).ring(), ring(4094, 5));
        assert_eq!(fifo(0, 0, 0, 0).ring(), Ok(None), "a closed port");
        assert!(fifo(1 << 12, 4097, 0, mask).ring().is_err());
        assert!(fifo(1 << 12, 0, 1, mask).ring().is_err());
        for mask in [4094, 8191, u32::MAX] {
            assert!(fifo(1 << 12, 1, 0, mask).ring().is_err(), "mask {mask:#x}");
        }
        assert!(UartState { fifo_mask: None, ..fifo(1 << 12, 1, 0, mask) }.ring().is_err());
    }

    /// "hello, world" in a ring, wrapped around after "hello".
    fn port(modern: bool) -> (Synth, u64) {
        let mut synth = Synth::new();
        let record = Record::new().field("pm_state", U32);
        let (record, members) = if modern {
            let kfifo = ["in", "out", "mask", "esize"].iter().fold(Record::new(), |r, m| r.field(m, U32));
            synth.structure("__kfifo", kfifo.field("data", U64));
            let fifo = Record::new().anonymous(Record::union().field("kfifo", named("__kfifo")));
            let port = Record::new().field("xmit_buf", U64).field("xmit_fifo", Type::Record(fifo));
            synth.structure("tty_port", port);
            let kfifo = "port.xmit_fifo.kfifo";
            let members = [format!("{kfifo}.in"), format!("{kfifo}.out"), "port.xmit_buf".into()];
            (record.field("port", named("tty_port")), members)
        } else {
            synth
                .structure("circ_buf", Record::new().field("buf", U64).field("head", U32).field("tail", U32));
            (
                record.field("xmit", named("circ_buf")),
                ["xmit.head", "xmit.tail", "xmit.buf"].map(String::from),
            )
        };
        synth.structure("uart_state", record);
        let buf = synth.alloc_bytes(4096, 4096);
        synth.write(buf + 4091, b"hello").write(buf, b", world");
        let state = synth.alloc("uart_state");
        let head = if modern { 2 * 4096 + 7 } else { 7 };
        synth.set("uart_state", state, &members[0], head);
        synth.set("uart_state", state, &members[1], if modern { 4096 + 4091 } else { 4091 });
        synth.set("uart_state", state, &members[2], buf);
        if modern {
            synth.set("uart_state", state, "port.xmit_fifo.kfifo.mask", 4095);
        }
        (synth, state)
    }

    #[test]
    fn unsent_output_is_read_from_either_ring() {
        for modern in [false, true] {
            let (synth, state) = port(modern);
            let kernel = open(&synth);
            let autopsy = Autopsy::new(&kernel);
            assert_eq!(autopsy.unsent(state).unwrap(), b"hello, world", "modern: {modern}");
        }
    }

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
