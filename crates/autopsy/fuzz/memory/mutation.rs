//! What is put in the place of what was there.

use fastrand::Rng;
use vmcore::{PrStatus, Vmcore, VmcoreInfo};

use crate::overlay::Reads;

/// What the clean autopsy has read, as the choice of victims needs it.
pub struct Victims {
    /// Reads of the autopsy.
    pub autopsy: Vec<(u64, u32)>,
    /// Reads of what names and layouts come from: kallsyms, BTF.
    pub open: Vec<(u64, u32)>,
    /// Values among them that are pointers.
    pointers: Vec<u64>,
    /// Where the direct map begins.
    page_offset: u64,
}

/// No more pointers than these are kept.
const POINTERS: usize = 1 << 16;

impl Victims {
    /// Takes what was read.
    pub fn new(core: &Vmcore, open: Reads, autopsy: &Reads, page_offset: u64) -> Victims {
        let autopsy: Vec<_> = autopsy.difference(&open).copied().filter(|read| read.1 > 0).collect();
        let mut pointers = Vec::new();
        let step = (autopsy.len() / POINTERS).max(1);
        for (addr, len) in autopsy.iter().step_by(step) {
            for at in (0..(*len).min(64)).step_by(8) {
                let value = word(core, addr + u64::from(at));
                if value >= 0xffff_8000_0000_0000 && value < u64::MAX - 4096 {
                    pointers.push(value);
                }
            }
        }
        pointers.sort_unstable();
        pointers.dedup();
        Victims { autopsy, open: open.into_iter().filter(|read| read.1 > 0).collect(), pointers, page_offset }
    }
}

fn word(core: &Vmcore, addr: u64) -> u64 {
    let mut bytes = [0; 8];
    _ = core.read_phys(addr, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// All that is changed in one run.
pub struct Mutation {
    pub bytes: Vec<(u64, u8)>,
    pub info: VmcoreInfo,
    pub prstatus: Vec<PrStatus>,
}

impl Mutation {
    /// Nothing.
    pub fn none(core: &Vmcore) -> Mutation {
        Mutation { bytes: Vec::new(), info: core.info().clone(), prstatus: core.prstatus().to_vec() }
    }

    /// What belongs to a seed.
    pub fn of(seed: u64, core: &Vmcore, victims: &Victims) -> Mutation {
        let mut rng = Rng::with_seed(seed);
        let mut mutation = Mutation::none(core);
        // 1 to 1000, small numbers as often as large ones.
        let count = ((1u64 << rng.u32(0..10)) as f64 * (1.0 + rng.f64())) as u64;
        // Most runs leave names and layouts alone: without them there is little left to go wrong.
        let everything = rng.u8(..16) == 0;
        for _ in 0..count.clamp(1, 1000) {
            let pool = if everything && rng.u8(..8) == 0 { &victims.open } else { &victims.autopsy };
            let Some((addr, len)) = rng.choice(pool) else { continue };
            mutation.one(&mut rng, core, victims, *addr, *len);
        }
        if everything && rng.bool() {
            let mut text = mutation.info.text().as_bytes().to_vec();
            for _ in 0..rng.usize(1..8) {
                if let Some(byte) = rng.choice(text.iter_mut()) {
                    *byte = if rng.bool() { b"0123456789abcdefx-=\n()"[rng.usize(..22)] } else { rng.u8(..) };
                }
            }
            mutation.info = VmcoreInfo::new(&text);
        }
        if rng.u8(..16) == 0 {
            for status in &mut mutation.prstatus {
                if let Some(reg) = rng.choice(status.regs.iter_mut()) {
                    *reg = wild(&mut rng, victims, *reg, *reg);
                }
            }
        }
        mutation
    }

    /// Changes something in what was read at `addr`.
    fn one(&mut self, rng: &mut Rng, core: &Vmcore, victims: &Victims, addr: u64, len: u32) {
        let words = u64::from(len / 8).max(1);
        let at = addr + 8 * rng.u64(..words);
        let own = victims.page_offset.wrapping_add(at);
        let value = word(core, at);
        let room = u64::from(len).min(addr + u64::from(len) - at).min(8) as usize;
        match rng.u8(..12) {
            // All of it is something else: freed and used again.
            0 => {
                let fill = *rng.choice(&[0, 0xff, 0x6b, 0x5a, 0xa5]).unwrap_or(&0);
                let random = rng.u8(..4) == 0;
                for i in 0..u64::from(len.min(256)) {
                    self.bytes.push((addr + i, if random { rng.u8(..) } else { fill }));
                }
            }
            // One byte of it.
            1 => self.bytes.push((addr + rng.u64(..u64::from(len)), rng.u8(..))),
            // Four bytes.
            2 | 3 if room >= 4 => {
                let half = if room == 8 { 4 * rng.u64(..2) } else { 0 };
                let now = (value >> (8 * half)) as u32;
                let value = match rng.u8(..10) {
                    0 => 0,
                    1 => u32::MAX,
                    2 => i32::MAX as u32,
                    3 => i32::MIN as u32,
                    4 => now.wrapping_add(1),
                    5 => now.wrapping_sub(1),
                    6 => 1 << rng.u32(..32),
                    7 => rng.u32(..1 << 16),
                    8 => now ^ 1 << rng.u32(..32),
                    _ => rng.u32(..),
                };
                self.put(at + half, &value.to_le_bytes());
            }
            // From elsewhere in the same page.
            4 => {
                let from = (at & !4095) + 8 * rng.u64(..512);
                self.put(at, &word(core, from).to_le_bytes()[..room]);
            }
            // To itself: cycles.
            5 => {
                let near =
                    [own, victims.page_offset.wrapping_add(addr), own - 8, own + 8, own & !4095, own | 2];
                let target = *rng.choice(&near).unwrap_or(&own);
                self.put(at, &target.to_le_bytes()[..room]);
            }
            _ => self.put(at, &wild(rng, victims, value, own).to_le_bytes()[..room]),
        }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes.extend((at..).zip(bytes.iter().copied()));
    }
}

/// A value in the place of `now`.
fn wild(rng: &mut Rng, victims: &Victims, now: u64, own: u64) -> u64 {
    const POISON: [u64; 7] = [
        0xdead_0000_0000_0100,
        0xdead_0000_0000_0122,
        0x6b6b_6b6b_6b6b_6b6b,
        0x5a5a_5a5a_5a5a_5a5a,
        0xa56b_6b6b_6b6b_6b6b,
        0xcccc_cccc_cccc_cccc,
        0xdead_beef_dead_beef,
    ];
    match rng.u8(..14) {
        0 => 0,
        1 => u64::MAX,
        2 => *rng.choice(&POISON).unwrap_or(&0),
        3 => now ^ 1 << rng.u32(..64),
        4 => now ^ 1 << rng.u32(..64) ^ 1 << rng.u32(..64) ^ 1 << rng.u32(..64),
        5 => now.wrapping_add(*rng.choice(&[1, 2, 8, 64, 4096]).unwrap_or(&1)),
        6 => now.wrapping_sub(*rng.choice(&[1, 2, 8, 64, 4096]).unwrap_or(&1)),
        7 => rng.u64(..16),
        8 => 1 << rng.u32(..64),
        9 => (1 << rng.u32(..64)) - 1,
        10 => rng.u64(..),
        11 => own,
        // Of another object, or near its beginning.
        12 => rng.choice(&victims.pointers).map_or(0, |pointer| pointer.wrapping_add(8 * rng.u64(..16))),
        _ => *rng.choice(&victims.pointers).unwrap_or(&0),
    }
}
