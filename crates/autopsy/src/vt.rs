//! Virtual consoles: `vc_data`, `kbd_struct` (include/linux/console_struct.h, kbd_kern.h; drivers/tty/vt/vt.c, keyboard.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Bytes, VirtualConsole, VtMode};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// The largest screen that the kernel makes (VC_MAXCOL, VC_MAXROW).
const MAX_CELLS: u32 = 32_767;
/// KD_GRAPHICS.
const GRAPHICS: u8 = 1;
/// MAX_NR_CONSOLES.
const MAX_CONSOLES: u16 = 63;

// enum vc_intensity
const HALF_BRIGHT: u32 = 0;
const BOLD: u32 = 2;
/// The colours of `ESC [ 30 m` to `ESC [ 37 m`, as the attribute byte has them.
const COLORS: [u8; 8] = [0, 4, 2, 6, 1, 5, 3, 7];
/// K_RAW, K_XLATE, K_MEDIUMRAW, K_UNICODE, K_OFF (include/uapi/linux/kd.h), by VC_XLATE … VC_OFF.
const KEYBOARD_MODES: [u32; 5] = [1, 2, 0, 3, 4];

#[derive(KernelType)]
#[kernel("vc_data")]
struct VcData {
    vc_num: u16,
    vc_cols: u32,
    vc_rows: u32,
    vc_size_row: u32,
    vc_origin: u64,
    vc_screenbuf: u64,
    vc_screenbuf_size: u32,
    vc_mode: u8,
    vc_top: u32,
    vc_bottom: u32,
    vc_def_color: u8,
    #[kernel("state.x")]
    x: u32,
    #[kernel("state.y")]
    y: u32,
    #[kernel("state.color")]
    color: u8,
    #[kernel("state.intensity")]
    intensity: u32,
    #[kernel("state.italic")]
    italic: bool,
    #[kernel("state.underline")]
    underline: bool,
    #[kernel("state.blink")]
    blink: bool,
    #[kernel("state.reverse")]
    reverse: bool,
    vc_decscnm: bool,
    vc_decom: bool,
    vc_decawm: bool,
    vc_deccm: bool,
    vc_decim: bool,
    vc_utf: bool,
}

#[derive(KernelType)]
#[kernel("kbd_struct")]
struct Keyboard {
    kbdmode: u8,
    modeflags: u8,
}

impl Autopsy<'_> {
    /// `addr`: of the `vc_data`.
    pub(crate) fn virtual_console(&self, addr: u64) -> Result<VirtualConsole> {
        let vc: VcData = self.kernel.read(addr)?;
        let cells = vc.vc_cols.checked_mul(vc.vc_rows).filter(|cells| *cells <= MAX_CELLS);
        let cells =
            cells.filter(|_| vc.vc_num < MAX_CONSOLES && vc.vc_size_row == vc.vc_cols.saturating_mul(2));
        let Some(cells) = cells else {
            return Err(corrupt("vc_data", addr, format!("{} columns, {} rows", vc.vc_cols, vc.vc_rows)));
        };
        // On the screen of a real VGA, which is no memory, it is not to be had.
        let len = u64::from(cells) * 2;
        let end = vc.vc_screenbuf.wrapping_add(vc.vc_screenbuf_size.into());
        let is_in_memory = vc.vc_origin >= vc.vc_screenbuf && vc.vc_origin.wrapping_add(len) <= end;
        let screen = match is_in_memory {
            true => Bytes(self.kernel.read_bytes(vc.vc_origin, len as usize)?),
            false => Bytes::default(),
        };
        let keyboard = self.console_keyboard(vc.vc_num);
        let foreground = self.kernel.symbol("fg_console").and_then(|at| self.kernel.read_i32(at));
        Ok(VirtualConsole {
            number: u32::from(vc.vc_num) + 1,
            foreground: foreground.is_ok_and(|number| number == i32::from(vc.vc_num)),
            rows: vc.vc_rows,
            cols: vc.vc_cols,
            screen,
            x: vc.x.min(vc.vc_cols.saturating_sub(1)),
            y: vc.y.min(vc.vc_rows.saturating_sub(1)),
            region: (vc.vc_top, vc.vc_bottom),
            attributes: attributes(&vc),
            modes: modes(&vc, keyboard.as_ref().map_or(0, |keyboard| keyboard.modeflags)),
            keyboard: keyboard.and_then(|k| KEYBOARD_MODES.get(usize::from(k.kbdmode)).copied()),
            graphics: vc.vc_mode == GRAPHICS,
        })
    }

    fn console_keyboard(&self, number: u16) -> Option<Keyboard> {
        let table = self.kernel.symbol("kbd_table").ok()?;
        let size = self.kernel.size_of("kbd_struct").ok()?;
        self.kernel.read(table.wrapping_add(u64::from(number) * size)).ok()
    }
}

/// What makes the attributes of now out of the default ones.
fn attributes(vc: &VcData) -> Vec<u8> {
    let color = |index: u8| COLORS.iter().position(|color| *color == index & 7).unwrap_or(0) as u8;
    let mut list = vec![0];
    let flags = [
        (vc.intensity == BOLD, 1),
        (vc.intensity == HALF_BRIGHT, 2),
        (vc.italic, 3),
        (vc.underline, 4),
        (vc.blink, 5),
        (vc.reverse, 7),
    ];
    list.extend(flags.iter().filter(|(on, _)| *on).map(|(_, code)| *code));
    let (fg, bg) = (vc.color & 0xf, vc.color >> 4);
    if fg != vc.vc_def_color & 0xf {
        list.push(color(fg) + if fg > 7 { 90 } else { 30 });
    }
    if bg != vc.vc_def_color >> 4 {
        list.push(color(bg) + if bg > 7 { 100 } else { 40 });
    }
    list
}

fn modes(vc: &VcData, keyboard: u8) -> Vec<VtMode> {
    let private = |name: &str, number: u32, on: bool| VtMode {
        name: name.into(),
        on,
        sequence: format!("\x1b[?{number}{}", if on { 'h' } else { 'l' }),
    };
    let other = |name: &str, on: bool, set: &str, reset: &str| VtMode {
        name: name.into(),
        on,
        sequence: (if on { set } else { reset }).into(),
    };
    vec![
        other("UTF-8", vc.vc_utf, "\x1b%G", "\x1b%@"),
        private("application cursor keys", 1, keyboard & 2 != 0),
        private("reverse screen", 5, vc.vc_decscnm),
        private("origin mode", 6, vc.vc_decom),
        private("autowrap", 7, vc.vc_decawm),
        private("key repeat", 8, keyboard & 4 != 0),
        private("visible cursor", 25, vc.vc_deccm),
        other("insert mode", vc.vc_decim, "\x1b[4h", "\x1b[4l"),
        other("application keypad", keyboard & 1 != 0, "\x1b=", "\x1b>"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::Synth;

    #[test]
    fn attributes_are_what_differs_from_the_default_ones() {
        let mut synth = Synth::new();
        declare::<VcData>(&mut synth, &[]);
        declare::<Keyboard>(&mut synth, &[]);
        let vc = synth.alloc("vc_data");
        let screen = synth.alloc("vc_data");
        for (member, value) in [
            ("vc_cols", 4),
            ("vc_rows", 2),
            ("vc_size_row", 8),
            ("vc_def_color", 0x07),
            ("state.color", 0x1c),
            ("state.intensity", 2),
            ("state.underline", 1),
            ("vc_bottom", 2),
            ("vc_screenbuf_size", 16),
        ] {
            synth.set("vc_data", vc, member, value);
        }
        synth.set("vc_data", vc, "vc_screenbuf", screen);
        synth.set("vc_data", vc, "vc_origin", screen);
        synth.write_u64(screen, 0x0741_0742_0743_0744);
        let console = |synth: &Synth| {
            let kernel = open(synth);
            Autopsy::new(&kernel).virtual_console(vc)
        };
        let read = console(&synth).unwrap();
        // Light red on blue.
        assert_eq!(read.attributes, [0, 1, 4, 91, 44]);
        assert_eq!(
            (read.number, read.screen.as_bytes().len(), &read.screen.as_bytes()[..2]),
            (1, 16, &b"D\x07"[..])
        );
        synth.set("vc_data", vc, "vc_origin", 0xb8000);
        assert!(console(&synth).unwrap().screen.is_empty());
        synth.set("vc_data", vc, "vc_rows", u32::MAX);
        assert!(console(&synth).is_err());
    }
}
