//! FPU, SSE, AVX … state (arch/x86/include/asm/fpu/types.h, arch/x86/kernel/fpu/xstate.c; 6.1 and 6.12).
//!
//! The kernel keeps a task's state in `fpstate.regs`: in the standard format of XSAVE, or, where the CPU has XSAVES, in the
//! compacted one. ptrace takes the standard format only. Offsets and sizes of the components are those that the dead
//! kernel found out by CPUID: `xstate_offsets`, `xstate_sizes`, `xstate_flags`.

use ktypes::KernelType;
use snapshot::{Fpu, FpuSource, Severity};

use crate::Autopsy;
use crate::error::{Result, corrupt};
use crate::process::Task;
use crate::raw::word;
use crate::saver;

/// thread_info.flags: the registers are not in the CPU but in memory (TIF_NEED_FPU_LOAD).
const TIF_NEED_FPU_LOAD: u64 = 1 << 14;

// The XSAVE area (Intel SDM, volume 1, 13.4).
const LEGACY: usize = 512;
const HEADER: usize = 64;
const EXTENDED: usize = LEGACY + HEADER;
const MXCSR: std::ops::Range<usize> = 24..32;
const X87: [std::ops::Range<usize>; 2] = [0..24, 32..160];
const XMM: std::ops::Range<usize> = 160..416;
const SOFTWARE: std::ops::Range<usize> = 464..512;
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
const COMPACTED: u64 = 1 << 63;
const FP: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const YMM: u64 = 1 << 2;
const PKRU: usize = 9;
/// Initial values: round to nearest, all exceptions masked.
const INITIAL_FCW: u16 = 0x37f;
const INITIAL_MXCSR: u32 = 0x1f80;

// xstate_flags: CPUID leaf 0xD, ECX.
const SUPERVISOR: u32 = 1;
const ALIGNED: u32 = 2;

/// AMX has 11 KiB; this leaves room.
const MAX_AREA: usize = 1 << 16;
const MAX_COMPONENTS: usize = 63;

#[derive(KernelType)]
#[kernel("fpstate")]
struct FpState {
    size: u32,
    user_xfeatures: u64,
    #[kernel(address)]
    regs: u64,
}

#[derive(KernelType)]
#[kernel("fpu_state_config")]
struct FpuConfig {
    max_size: u32,
    max_features: u64,
}

#[derive(KernelType)]
#[kernel("thread_struct")]
struct Pkru {
    #[kernel(optional)]
    pkru: Option<u32>,
}

/// Where the components of an XSAVE area are.
#[derive(Clone, Debug)]
pub(crate) struct XstateLayout {
    components: Vec<Component>,
    /// Bytes of the standard format with everything that user mode may have (the size of NT_X86_XSTATE).
    size: usize,
    /// What user mode may have.
    features: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Component {
    /// In the standard format.
    offset: usize,
    size: usize,
    flags: u32,
}

impl Autopsy<'_> {
    /// The FPU state of a thread, from where it can be believed.
    ///
    /// A task that is on no CPU has it in memory. So has one on a CPU whose registers the kernel had already put aside
    /// (TIF_NEED_FPU_LOAD, set before that is done), or that has not got them yet (the CPU's are another's). Otherwise it existed in that
    /// CPU only: the register saver has it, or nobody.
    pub(crate) fn fpu(&self, addr: u64, task: &Task, on_cpu: Option<u32>, in_syscall: bool) -> Result<Fpu> {
        let in_memory = || self.fpu_in_memory(addr, task);
        let saved_before = || Ok(Fpu::Saved { xstate: in_memory()?, source: FpuSource::Memory });
        let Some(cpu) = on_cpu else { return saved_before() };
        let owner = self.kernel.per_cpu(self.kernel.symbol("fpu_fpregs_owner_ctx")?, cpu)?;
        let in_cpu = self.kernel.read_u64(owner)? == task.fpu;
        if !in_cpu || task.tif & TIF_NEED_FPU_LOAD != 0 && !self.is_putting_aside(cpu) {
            return saved_before();
        }
        match self.fpu_from_saver(addr, task, cpu)? {
            Some(xstate) => Ok(Fpu::Saved { xstate, source: FpuSource::Saver }),
            None if in_syscall => Ok(Fpu::LostInSyscall { xstate: in_memory()? }),
            None => Ok(Fpu::Lost),
        }
    }

    /// Whether a CPU was just putting a program's registers into memory, for the kernel to use them (kernel_fpu_begin_mask(),
    /// arch/x86/kernel/fpu/core.c): they are no longer called loaded, and not in memory yet.
    fn is_putting_aside(&self, cpu: u32) -> bool {
        let slot = self.saver().and_then(|saver| saver.slot(cpu));
        let inside = slot.and_then(|slot| self.kernel.symbolize(slot.ip)).map_or("", |(name, _)| name);
        matches!(inside, "kernel_fpu_begin_mask" | "save_fpregs_to_fpstate")
    }

    /// What the saver has of a task's registers, if it can be believed. They are the task's own as long as the CPU has them loaded for it.
    fn fpu_from_saver(&self, addr: u64, task: &Task, cpu: u32) -> Result<Option<Vec<u8>>> {
        let Some((saver, slot)) = self.saver().and_then(|saver| Some((saver, saver.slot(cpu)?))) else {
            return Ok(None);
        };
        let distrust = |why: &str| {
            let text = format!(
                "thread {}: the registers that were saved on CPU {cpu} are not its own: {why}",
                task.pid
            );
            self.find(Severity::Note, "fpu", text);
            Ok(None)
        };
        if slot.task != addr || slot.pid != task.pid {
            return distrust("another task was there");
        }
        if slot.flags & saver::KTHREAD != 0 {
            return distrust("the kernel used them for itself");
        }
        let layout = self.xstate_layout()?;
        let from_saver = XstateLayout {
            components: saver
                .components
                .iter()
                .map(|c| Component { offset: c.offset as usize, size: c.size as usize, flags: 0 })
                .collect(),
            ..layout.clone()
        };
        to_standard(&slot.xsave, &from_saver, layout, None)
            .map(Some)
            .map_err(|why| corrupt("register saver's slot", u64::from(cpu), why))
    }

    /// `thread.fpu.fpstate`, in the standard format.
    fn fpu_in_memory(&self, addr: u64, task: &Task) -> Result<Vec<u8>> {
        let layout = self.xstate_layout()?;
        let state: FpState = self.kernel.read(task.fpstate)?;
        let len = state.size as usize;
        if !(LEGACY..=MAX_AREA).contains(&len) {
            return Err(corrupt("fpstate", task.fpstate, format!("has {len} bytes")));
        }
        let area = self.kernel.read_bytes(state.regs, len)?;
        let own = XstateLayout { features: layout.features & state.user_xfeatures, ..layout.clone() };
        // The protection key register is switched apart from the rest, and kept beside it.
        let thread = addr.wrapping_add(self.kernel.offset_of("task_struct", "thread")?);
        let pkru = self.kernel.read::<Pkru>(thread)?.pkru;
        to_standard(&area, &own, layout, pkru).map_err(|why| corrupt("fpstate", task.fpstate, why))
    }

    fn xstate_layout(&self) -> Result<&XstateLayout> {
        let layout = self.xstate.get_or_init(|| match self.read_xstate_layout() {
            Ok(layout) => Some(layout),
            Err(error) => {
                self.find(
                    Severity::Doubt,
                    "fpu",
                    format!("the layout of the FPU state is not known: {error}"),
                );
                None
            }
        });
        layout.as_ref().ok_or_else(|| corrupt("FPU state", 0, "its layout is not known"))
    }

    fn read_xstate_layout(&self) -> Result<XstateLayout> {
        let count =
            self.kernel.enum_value_in("xfeature", "XFEATURE_MAX")?.clamp(2, MAX_COMPONENTS as i64) as usize;
        let table = |name: &str| -> Result<Vec<u32>> {
            let bytes = self.kernel.read_bytes(self.kernel.symbol(name)?, count * 4)?;
            Ok(bytes.as_chunks::<4>().0.iter().map(|w| u32::from_le_bytes(*w)).collect())
        };
        let (offsets, sizes, flags) =
            (table("xstate_offsets")?, table("xstate_sizes")?, table("xstate_flags")?);
        let config: FpuConfig = self.kernel.read(self.kernel.symbol("fpu_user_cfg")?)?;
        let component = |i: usize| match (offsets[i], sizes[i]) {
            // Unknown components are all ones.
            (_, 0 | u32::MAX) => Component::default(),
            (offset, size) => Component {
                offset: if offset == u32::MAX { 0 } else { offset as usize },
                size: size as usize,
                flags: flags[i],
            },
        };
        let size = config.max_size as usize;
        if !(LEGACY..=MAX_AREA).contains(&size) {
            return Err(corrupt("fpu_user_cfg", 0, format!("areas of {size} bytes")));
        }
        Ok(XstateLayout {
            components: (0..count).map(component).collect(),
            size: size.max(EXTENDED),
            features: config.max_features,
        })
    }
}

/// Turns an XSAVE area, compacted or not, into the standard format.
///
/// `from` says where its components are and which of them are user mode's, `to` where they go. Components that are in
/// their initial state are not stored (their bit in XSTATE_BV is clear): x87 and SSE are written out all the same, so that
/// the control words count. `pkru` replaces the area's own.
fn to_standard(
    area: &[u8],
    from: &XstateLayout,
    to: &XstateLayout,
    pkru: Option<u32>,
) -> Result<Vec<u8>, String> {
    if area.len() < LEGACY {
        return Err(format!("an area of {} bytes", area.len()));
    }
    let has_header = area.len() >= EXTENDED;
    // Without XSAVE in the machine it is what FXSAVE stores, and all of that is valid.
    let (present, xcomp) = match has_header {
        true => (word(area, XSTATE_BV), word(area, XCOMP_BV)),
        false => (FP | SSE, 0),
    };
    let compacted = xcomp & COMPACTED != 0;
    if compacted && present & !xcomp & !COMPACTED != 0 {
        return Err(format!("XSTATE_BV {present:#x} has more than XCOMP_BV {xcomp:#x}"));
    }
    let mut out = vec![0; to.size];
    out[..2].copy_from_slice(&INITIAL_FCW.to_le_bytes());
    out[MXCSR.start..MXCSR.start + 4].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
    if present & FP != 0 {
        for range in X87 {
            out[range.clone()].copy_from_slice(&area[range]);
        }
    }
    if present & SSE != 0 {
        out[XMM].copy_from_slice(&area[XMM]);
    }
    // The standard format always holds MXCSR; the compacted one only with SSE or AVX.
    if !compacted || present & (SSE | YMM) != 0 {
        out[MXCSR].copy_from_slice(&area[MXCSR]);
    }
    let mut stored = FP | SSE;
    let mut next = EXTENDED;
    for i in 2..from.components.len() {
        let (bit, source) = (1_u64 << i, from.components[i]);
        let at = match compacted {
            true if xcomp & bit == 0 => continue,
            true => {
                let at = if source.flags & ALIGNED != 0 { next.next_multiple_of(64) } else { next };
                next = at + source.size;
                at
            }
            false => source.offset,
        };
        let target = to.components.get(i).copied().unwrap_or_default();
        let replaced = i == PKRU && pkru.is_some();
        let wanted = present & from.features & bit != 0 && source.flags & SUPERVISOR == 0 && !replaced;
        if !wanted || source.size == 0 {
            continue;
        }
        let bytes = area
            .get(at..at + source.size)
            .ok_or_else(|| format!("component {i} lies outside of the area"))?;
        match out.get_mut(target.offset..target.offset + target.size) {
            Some(place) if target.offset >= EXTENDED && place.len() == bytes.len() => {
                place.copy_from_slice(bytes)
            }
            _ => return Err(format!("component {i} has no place in the standard format")),
        }
        stored |= bit;
    }
    if let (Some(pkru), Some(target)) = (pkru, to.components.get(PKRU).filter(|c| c.size >= 4))
        && to.features & (1 << PKRU) != 0
        && let Some(place) = out.get_mut(target.offset..target.offset + 4)
    {
        place.copy_from_slice(&pkru.to_le_bytes());
        stored |= 1 << PKRU;
    }
    out[SOFTWARE.start..SOFTWARE.start + 8].copy_from_slice(&to.features.to_le_bytes());
    out[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&stored.to_le_bytes());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// AVX, AVX-512, PKRU and AMX, with two supervisor components between them: offsets of a Sapphire Rapids.
    const TABLE: [(usize, usize, usize, u32); 9] = [
        (2, 576, 256, 0),
        (5, 1088, 64, 0),
        (6, 1152, 512, 0),
        (7, 1664, 1024, 0),
        (8, 0, 128, SUPERVISOR),
        (9, 2688, 8, 0),
        (10, 0, 8, SUPERVISOR),
        (17, 2752, 64, ALIGNED),
        (18, 2816, 8192, ALIGNED),
    ];

    fn layout() -> XstateLayout {
        let mut components = vec![Component::default(); 19];
        for (i, offset, size, flags) in TABLE {
            components[i] = Component { offset, size, flags };
        }
        let user = TABLE.iter().filter(|(.., flags)| flags & SUPERVISOR == 0).map(|(i, ..)| 1_u64 << i);
        XstateLayout { components, size: 11008, features: FP | SSE | user.sum::<u64>() }
    }

    /// A byte of component `i` that is like no other.
    fn content(i: usize, at: usize) -> u8 {
        (i * 31 + at * 7 + 1) as u8
    }

    /// What XSAVES stores: `enabled` components have a place, `present` ones a value.
    fn compacted(enabled: u64, present: u64) -> Vec<u8> {
        let mut area = vec![0xee; EXTENDED];
        for (at, byte) in area.iter_mut().enumerate().take(416) {
            *byte = content(usize::from(at >= 160), at);
        }
        area[MXCSR].copy_from_slice(&[0xa0, 0x1f, 0, 0, 0xff, 0xff, 0, 0]);
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
        area[XCOMP_BV..XCOMP_BV + 8].copy_from_slice(&(enabled | COMPACTED).to_le_bytes());
        for (i, _, size, flags) in TABLE {
            if enabled & 1 << i == 0 {
                continue;
            }
            if flags & ALIGNED != 0 {
                area.resize(area.len().next_multiple_of(64), 0xee);
            }
            area.extend((0..size).map(|at| if present & 1 << i != 0 { content(i, at) } else { 0xee }));
        }
        area
    }

    fn check(out: &[u8], present: u64) -> Result<(), TestCaseError> {
        let stored = word(out, XSTATE_BV);
        prop_assert_eq!(word(out, XCOMP_BV), 0);
        prop_assert_eq!(stored & (FP | SSE), FP | SSE);
        let fcw = u16::from_le_bytes([out[0], out[1]]);
        let expected =
            if present & FP != 0 { u16::from_le_bytes([content(0, 0), content(0, 1)]) } else { INITIAL_FCW };
        prop_assert_eq!(fcw, expected);
        let xmm_is_stored = out[XMM].iter().zip(XMM).all(|(byte, at)| *byte == content(1, at));
        prop_assert_eq!(xmm_is_stored, present & SSE != 0);
        prop_assert!(present & SSE != 0 || out[XMM].iter().all(|b| *b == 0));
        for (i, offset, size, flags) in TABLE {
            let bytes = &out[offset..offset + size];
            if flags & SUPERVISOR != 0 {
                prop_assert_eq!(stored & 1 << i, 0, "supervisor component {}", i);
            } else if present & 1 << i != 0 {
                prop_assert!(bytes.iter().enumerate().all(|(at, b)| *b == content(i, at)), "component {}", i);
                prop_assert!(stored & 1 << i != 0);
            } else {
                prop_assert!(bytes.iter().all(|b| *b == 0), "component {} in its initial state", i);
                prop_assert_eq!(stored & 1 << i, 0);
            }
        }
        Ok(())
    }

    fn subset(all: u64) -> impl Strategy<Value = u64> {
        any::<u64>().prop_map(move |bits| bits & all)
    }

    const ALL: u64 = 0x6_07e7;

    proptest! {
        #[test]
        fn compacted_areas_are_spread(enabled in subset(ALL), present in subset(ALL)) {
            let enabled = enabled | FP | SSE;
            let present = present & enabled;
            let out = to_standard(&compacted(enabled, present), &layout(), &layout(), None).unwrap();
            prop_assert_eq!(out.len(), layout().size);
            check(&out, present)?;
        }

        #[test]
        fn the_standard_format_stays_as_it_is(present in subset(ALL & !0x500)) {
            let first = to_standard(&compacted(ALL, present), &layout(), &layout(), None).unwrap();
            let second = to_standard(&first, &layout(), &layout(), None).unwrap();
            prop_assert_eq!(first, second);
        }

        #[test]
        fn no_area_is_trusted(bytes in prop::collection::vec(any::<u8>(), 0..4096), pkru in any::<Option<u32>>()) {
            let _ = to_standard(&bytes, &layout(), &layout(), pkru);
        }
    }

    #[test]
    fn initial_control_words_are_written_out() {
        let out = to_standard(&compacted(ALL, 0), &layout(), &layout(), None).unwrap();
        assert_eq!(&out[..2], &[0x7f, 0x03]);
        assert_eq!(&out[24..28], &0x1f80_u32.to_le_bytes());
        // MXCSR counts in a compacted area as soon as AVX is there.
        let out = to_standard(&compacted(ALL, YMM), &layout(), &layout(), None).unwrap();
        assert_eq!(&out[24..28], &0x1fa0_u32.to_le_bytes());
        // In a standard one always.
        let mut area = vec![0; 11008];
        area[24..28].copy_from_slice(&0x1fa0_u32.to_le_bytes());
        let out = to_standard(&area, &layout(), &layout(), None).unwrap();
        assert_eq!(&out[24..28], &0x1fa0_u32.to_le_bytes());
    }

    #[test]
    fn the_protection_key_register_comes_from_beside() {
        let out = to_standard(&compacted(ALL, 1 << PKRU), &layout(), &layout(), Some(0x5555_5554)).unwrap();
        assert_eq!(&out[2688..2692], &0x5555_5554_u32.to_le_bytes());
        assert_ne!(word(&out, XSTATE_BV) & (1 << PKRU), 0);
    }

    #[test]
    fn an_area_that_ends_too_early_is_refused() {
        let mut area = compacted(ALL, ALL);
        area.truncate(area.len() - 1);
        assert!(to_standard(&area, &layout(), &layout(), None).unwrap_err().contains("component 18"));
        // A machine without XSAVE has the legacy area and no more.
        let plain = compacted(0, 0)[..LEGACY].to_vec();
        let out = to_standard(&plain, &layout(), &layout(), None).unwrap();
        assert_eq!(out[160..416], plain[160..416]);
    }
}
