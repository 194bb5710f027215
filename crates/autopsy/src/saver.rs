//! What the register saver left behind (kmod/otherworld_saver.h, version 1).
//!
//! It is memory of a dead kernel like all other: magic numbers, sizes and addresses are checked before a byte is believed.

use crate::Autopsy;

const MAGIC: u64 = u64::from_le_bytes(*b"OTHWSAV1");
const SLOT_MAGIC: u64 = u64::from_le_bytes(*b"OTHWSLT1");
const VERSION: u32 = 1;
/// The line of vmcoreinfo that says where the header is.
const KEY: &str = "OWFPU";
const COMPLETE: u32 = 2;
/// Where the header's table of components begins, and how many there are.
const COMPONENTS_AT: usize = 40;
const COMPONENTS: usize = 32;
const HEADER: usize = COMPONENTS_AT + COMPONENTS * 16;
/// Bytes of a slot before the XSAVE area.
const SLOT_HEAD: u32 = 128;
const MAX_CPUS: u32 = 8192;
/// AMX has 11 KiB; this leaves room.
const MAX_XSAVE: u32 = 1 << 16;

/// slot.flags: no user registers here.
pub(crate) const KTHREAD: u32 = 0x2;

/// The saver's slots that are complete.
#[derive(Debug)]
pub(crate) struct Saver {
    /// Offset, size and flags of each XSAVE component, as CPUID told them on the dead machine.
    pub components: Vec<Component>,
    pub slots: Vec<Slot>,
}

/// CPUID leaf 0xD, sub-leaf n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Component {
    /// In the standard format.
    pub offset: u32,
    pub size: u32,
}

/// One CPU at its death.
#[derive(Debug)]
pub(crate) struct Slot {
    pub cpu: u32,
    pub flags: u32,
    pub pid: i32,
    pub task: u64,
    pub ip: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub tsc: u64,
    /// Standard format.
    pub xsave: Vec<u8>,
}

impl Saver {
    /// The slot of a CPU, if that CPU filled it.
    pub(crate) fn slot(&self, cpu: u32) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.cpu == cpu)
    }

    /// The time-stamp counter at a CPU's death.
    pub(crate) fn tsc(&self, cpu: u32) -> Option<u64> {
        self.slot(cpu).map(|slot| slot.tsc)
    }
}

impl Autopsy<'_> {
    /// What the saver left; `None` if it was not there. If what it left is damaged, a finding says so.
    pub(crate) fn saver(&self) -> Option<&Saver> {
        let saver = self.saver.get_or_init(|| {
            let text = self.kernel.info().get(KEY)?;
            let read =
                |phys, buf: &mut [u8]| self.kernel.vmcore().read_phys(phys, buf).map_err(|e| e.to_string());
            let found = u64::from_str_radix(text.trim(), 16)
                .map_err(|_| format!("{KEY}={text} is no address"))
                .and_then(|phys| parse(phys, &read));
            match found {
                Ok((saver, damaged)) => {
                    for why in damaged {
                        self.find(snapshot::Severity::Doubt, "saver", why);
                    }
                    Some(saver)
                }
                Err(why) => {
                    let text = format!("what the register saver left cannot be used: {why}");
                    self.find(snapshot::Severity::Doubt, "saver", text);
                    None
                }
            }
        });
        saver.as_ref()
    }
}

/// Reads physical memory.
type Read<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<(), String>;

/// Reads the header at a physical address and the slots; also says which slots are damaged.
fn parse(phys: u64, read: Read<'_>) -> Result<(Saver, Vec<String>), String> {
    let mut header = [0; HEADER];
    read(phys, &mut header)?;
    let fixed = |what: &str, found: u64, expected: u64| match found == expected {
        true => Ok(()),
        false => Err(format!("{what} is {found:#x}, not {expected:#x}")),
    };
    fixed("its magic number", u64_at(&header, 0), MAGIC)?;
    fixed("its version", u32_at(&header, 8).into(), VERSION.into())?;
    let (header_size, cpus) = (u32_at(&header, 12), u32_at(&header, 16));
    let (slot_size, xsave_size) = (u32_at(&header, 20), u32_at(&header, 28));
    fixed("the offset of the XSAVE area", u32_at(&header, 24).into(), SLOT_HEAD.into())?;
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(format!("it is for {cpus} CPUs"));
    }
    fixed("the header's size", header_size.into(), (HEADER + cpus as usize * 8) as u64)?;
    if !(512..=MAX_XSAVE).contains(&xsave_size) || slot_size < SLOT_HEAD + xsave_size {
        return Err(format!("slots of {slot_size} bytes with {xsave_size} of registers"));
    }
    let component = |i: usize| {
        let at = COMPONENTS_AT + i * 16;
        let component = Component { offset: u32_at(&header, at), size: u32_at(&header, at + 4) };
        let end = component.offset.checked_add(component.size);
        // One that reaches beyond the area is not there.
        if end.is_some_and(|end| end <= xsave_size) { component } else { Component::default() }
    };
    let components = (0..COMPONENTS).map(component).collect();
    let mut table = vec![0; cpus as usize * 8];
    read(phys + HEADER as u64, &mut table)?;

    let mut saver = Saver { components, slots: Vec::new() };
    let mut damaged = Vec::new();
    for cpu in 0..cpus {
        let at = u64_at(&table, cpu as usize * 8);
        if at == 0 {
            continue;
        }
        match parse_slot(at, cpu, xsave_size as usize, read) {
            Ok(slot) => saver.slots.extend(slot),
            Err(why) => damaged.push(format!("the register saver's slot of CPU {cpu} cannot be used: {why}")),
        }
    }
    Ok((saver, damaged))
}

/// `Ok(None)` for a slot that was never filled.
fn parse_slot(phys: u64, cpu: u32, xsave_size: usize, read: Read<'_>) -> Result<Option<Slot>, String> {
    let mut bytes = vec![0; SLOT_HEAD as usize + xsave_size];
    read(phys, &mut bytes)?;
    if u64_at(&bytes, 0) != SLOT_MAGIC || u32_at(&bytes, 12) != cpu {
        return Err("it is not one".into());
    }
    match u32_at(&bytes, 8) {
        0 => return Ok(None),
        COMPLETE => {}
        1 => return Err("it was not finished".into()),
        other => return Err(format!("its state is {other}")),
    }
    Ok(Some(Slot {
        cpu,
        flags: u32_at(&bytes, 16),
        pid: u32_at(&bytes, 20) as i32,
        task: u64_at(&bytes, 32),
        ip: u64_at(&bytes, 40),
        fs_base: u64_at(&bytes, 56),
        gs_base: u64_at(&bytes, 64),
        tsc: u64_at(&bytes, 80),
        xsave: bytes.split_off(SLOT_HEAD as usize),
    }))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x1000;

    /// A header for two CPUs; the second one's slot is filled.
    fn memory() -> Vec<u8> {
        let mut m = vec![0; 0x4000];
        let mut put = |at: usize, bytes: &[u8]| m[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"OTHWSAV1");
        put(8, &1u32.to_le_bytes());
        put(12, &(HEADER as u32 + 16).to_le_bytes());
        put(16, &2u32.to_le_bytes());
        put(20, &0x1000u32.to_le_bytes());
        put(24, &128u32.to_le_bytes());
        put(28, &832u32.to_le_bytes());
        put(COMPONENTS_AT + 2 * 16, &576u32.to_le_bytes());
        put(COMPONENTS_AT + 2 * 16 + 4, &256u32.to_le_bytes());
        put(HEADER, &(BASE + 0x1000).to_le_bytes());
        put(HEADER + 8, &(BASE + 0x2000).to_le_bytes());
        for (cpu, state) in [(0u32, 0u32), (1, 2)] {
            let at = 0x1000 * (cpu as usize + 1);
            put(at, b"OTHWSLT1");
            put(at + 8, &state.to_le_bytes());
            put(at + 12, &cpu.to_le_bytes());
            put(at + 20, &4711u32.to_le_bytes());
            put(at + 80, &99u64.to_le_bytes());
            put(at + 128 + 24, &0x1f80u32.to_le_bytes());
        }
        m
    }

    fn parsed(memory: &[u8]) -> Result<(Saver, Vec<String>), String> {
        parse(BASE, &|phys, buf: &mut [u8]| {
            let at = phys.checked_sub(BASE).ok_or("below")? as usize;
            buf.copy_from_slice(memory.get(at..at + buf.len()).ok_or("outside")?);
            Ok(())
        })
    }

    #[test]
    fn complete_slots_are_read() {
        let (saver, damaged) = parsed(&memory()).unwrap();
        assert!(damaged.is_empty());
        assert!(saver.slot(0).is_none());
        let slot = saver.slot(1).unwrap();
        assert_eq!((slot.pid, slot.tsc, slot.xsave.len()), (4711, 99, 832));
        assert_eq!(saver.components[2], Component { offset: 576, size: 256 });
    }

    #[test]
    fn damage_is_refused() {
        let change = |at: usize, byte: u8| {
            let mut m = memory();
            m[at] = byte;
            parsed(&m)
        };
        assert!(change(0, b'X').unwrap_err().contains("magic"));
        assert!(change(8, 2).unwrap_err().contains("version"));
        assert!(change(16, 3).is_err(), "more CPUs than the header has room for");
        assert!(change(31, 0xff).is_err(), "registers larger than a slot");
        let (saver, damaged) = change(0x2008, 1).unwrap();
        assert!(saver.slots.is_empty() && damaged[0].contains("not finished"));
        let (saver, _) = change(COMPONENTS_AT + 2 * 16 + 6, 1).unwrap();
        assert_eq!(saver.components[2], Component::default(), "a component beyond the area");
        // A slot outside of memory.
        let (saver, damaged) = change(HEADER + 11, 0xff).unwrap();
        assert!(saver.slots.is_empty() && damaged.len() == 1);
    }
}
