//! Loaded modules: `struct module` (include/linux/module.h; kernel/module/; 6.1 and 6.12).

use ktypes::KernelType;
use serde::Serialize;
use snapshot::Severity;

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// More modules than any machine has loaded.
const MAX_MODULES: usize = 4096;
/// MODULE_REF_BASE (kernel/module/main.c): how often the kernel itself counts a module that is there.
const REF_BASE: i32 = 1;
/// `enum module_state`.
const STATES: [&str; 4] = ["live", "loading", "unloading", "unformed"];
/// Taints that a module can bring, and their letters (`taint_flags`, kernel/panic.c).
const TAINTS: [(u32, char); 8] =
    [(0, 'P'), (10, 'C'), (12, 'O'), (13, 'E'), (15, 'K'), (16, 'X'), (17, 'T'), (18, 'N')];

#[derive(KernelType)]
#[kernel("module")]
pub(crate) struct RawModule {
    state: u32,
    name: [u8; 56],
    #[kernel("refcnt.counter")]
    refcnt: i32,
    taints: u64,
    #[kernel("list", address)]
    #[allow(dead_code, reason = "for container_of")]
    list: u64,
    /// Head of the uses by other modules (`struct module_use`).
    #[kernel(address)]
    source_list: u64,
    /// Two pieces of memory up to 6.3, one for each purpose since 6.4.
    #[kernel("core_layout", optional, nested)]
    core_layout: Option<ModuleLayout>,
    #[kernel("init_layout", optional, nested)]
    init_layout: Option<ModuleLayout>,
    #[kernel("mem", optional, address)]
    mem: Option<u64>,
    /// Tables for unwinding its functions (CONFIG_UNWINDER_ORC).
    #[kernel("arch.num_orcs", optional)]
    num_orcs: Option<u32>,
    #[kernel("arch.orc_unwind_ip", optional)]
    orc_unwind_ip: Option<u64>,
    #[kernel("arch.orc_unwind", optional)]
    orc_unwind: Option<u64>,
}

#[derive(KernelType)]
#[kernel("module_layout")]
struct ModuleLayout {
    base: u64,
    size: u32,
}

#[derive(KernelType)]
#[kernel("module_memory")]
struct ModuleMemory {
    base: u64,
    size: u32,
}

#[derive(KernelType)]
#[kernel("module_use")]
struct ModuleUse {
    /// The module that uses.
    source: u64,
    #[kernel("source_list", address)]
    #[allow(dead_code, reason = "for container_of")]
    source_list: u64,
}

/// A module as lsmod(8) and /proc/modules show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Module {
    #[allow(missing_docs)]
    pub name: String,
    /// Bytes of all its memory.
    pub size: u64,
    /// How often it was in use.
    pub references: u32,
    /// Modules that use it.
    pub used_by: Vec<String>,
    /// `live`, `loading`, `unloading`; `unformed` for one whose loading had just begun.
    pub state: String,
    /// Where its code begins.
    pub base: u64,
    /// Letters of its taints as in /proc/modules: `O` out of tree, `E` not signed, `P` proprietary …; empty for none.
    pub taint: String,
}

/// A module's code and its tables for unwinding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ModuleCode {
    pub start: u64,
    pub end: u64,
    /// Addresses, entries, and how many; zero for none.
    pub orc_ips: u64,
    pub orc_entries: u64,
    pub orc_count: u64,
}

impl Autopsy<'_> {
    /// The modules that were loaded, the latest first. One that is damaged is left out, and a finding says so.
    ///
    /// # Errors
    /// When there is no list of modules in this kernel, or `struct module` is not as expected.
    pub fn modules(&self) -> Result<Vec<Module>> {
        self.each_module(|addr, raw| {
            let mut size = 0;
            for (_, piece) in self.module_pieces(raw)? {
                size += piece;
            }
            Ok(Module {
                name: name_of(raw),
                size,
                references: (raw.refcnt.saturating_sub(REF_BASE)).max(0) as u32,
                used_by: self.users(addr, raw)?,
                state: STATES
                    .get(raw.state as usize)
                    .map(|state| (*state).to_owned())
                    .ok_or_else(|| corrupt("module", addr, format!("is in state {}", raw.state)))?,
                base: self.module_pieces(raw)?.first().map_or(0, |(base, _)| *base),
                taint: TAINTS.iter().filter(|(bit, _)| raw.taints >> bit & 1 != 0).map(|(_, c)| c).collect(),
            })
        })
    }

    /// Where the modules have their code. Damage costs modules; nothing else.
    pub(crate) fn module_code(&self) -> Vec<ModuleCode> {
        let code = self.each_module(|_, raw| {
            let (start, size) = self.module_pieces(raw)?.first().copied().unwrap_or_default();
            Ok(ModuleCode {
                start,
                end: start.saturating_add(size),
                orc_ips: raw.orc_unwind_ip.unwrap_or(0),
                orc_entries: raw.orc_unwind.unwrap_or(0),
                orc_count: raw.num_orcs.unwrap_or(0).into(),
            })
        });
        code.unwrap_or_else(|error| {
            self.find(Severity::Note, "module", format!("the modules cannot be listed: {error}"));
            Vec::new()
        })
    }

    pub(crate) fn each_module<T>(&self, read: impl Fn(u64, &RawModule) -> Result<T>) -> Result<Vec<T>> {
        self.kernel.check::<RawModule>()?;
        let head = self.kernel.symbol("modules")?;
        let mut all = Vec::new();
        for node in self.kernel.list_head(head, MAX_MODULES) {
            let addr = match node {
                Ok(node) => self.kernel.container_of::<RawModule>(node, "list")?,
                Err(error) => {
                    let text =
                        format!("the list of modules is damaged behind {} of them: {error}", all.len());
                    self.find(Severity::Doubt, "module", text);
                    break;
                }
            };
            let one = self.kernel.read::<RawModule>(addr).map_err(Into::into);
            match one.and_then(|raw| read(addr, &raw)) {
                Ok(one) => all.push(one),
                Err(error) => self.find(Severity::Doubt, "module", format!("a module is lost: {error}")),
            }
        }
        Ok(all)
    }

    /// Base and size of each piece of a module's memory, that of its code first.
    fn module_pieces(&self, raw: &RawModule) -> Result<Vec<(u64, u64)>> {
        if let Some(core) = &raw.core_layout {
            let pieces = [Some(core), raw.init_layout.as_ref()];
            return Ok(pieces.into_iter().flatten().map(|piece| (piece.base, piece.size.into())).collect());
        }
        let Some(mem) = raw.mem else { return Ok(Vec::new()) };
        let count = self.enumerator("MOD_MEM_NUM_TYPES", 7).min(16);
        let stride = self.kernel.size_of("module_memory")?;
        let piece = |n: u64| {
            let piece: ModuleMemory = self.kernel.read(mem.wrapping_add(n * stride))?;
            Ok((piece.base, u64::from(piece.size)))
        };
        (0..count).map(piece).collect()
    }

    /// The names of the modules that use one.
    fn users(&self, addr: u64, raw: &RawModule) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for node in self.list(raw.source_list, MAX_MODULES)? {
            let user: ModuleUse =
                self.kernel.read(self.kernel.container_of::<ModuleUse>(node, "source_list")?)?;
            if user.source == addr {
                return Err(corrupt("module", addr, "uses itself"));
            }
            names.push(name_of(&self.kernel.read(user.source)?));
        }
        Ok(names)
    }
}

fn name_of(raw: &RawModule) -> String {
    let name = raw.name.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::{Record, Synth, U32, U64, array, named};

    /// Two modules as 6.12 has them, the second of which uses the first; the addresses of their `struct module`.
    fn machine() -> (Synth, [u64; 2]) {
        let mut synth = Synth::new();
        synth.structure("module_memory", Record::new().field("base", U64).field("size", U32));
        declare::<ModuleUse>(&mut synth, &[("source_list", named("list_head"))]);
        let own = [
            ("list", named("list_head")),
            ("source_list", named("list_head")),
            ("mem", array(named("module_memory"), 7)),
        ];
        declare::<RawModule>(&mut synth, &own);
        for member in ["core_layout", "init_layout"] {
            synth.without_member("module", member);
        }
        let head = synth.variable("modules", "list_head");
        synth.set("list_head", head, "next", head).set("list_head", head, "prev", head);
        let modules = [("base", 3), ("user", 1)].map(|(name, references)| {
            let module = synth.alloc("module");
            synth.list_init("module", module, "source_list");
            let link = synth.address_of("module", module, "list");
            synth.list_add_tail(link, head);
            let mem = synth.address_of("module", module, "mem");
            let piece = synth.size_of("module_memory");
            synth
                .set("module", module, "name", name)
                .set("module", module, "refcnt.counter", references)
                .set("module_memory", mem, "base", module << 8)
                .set("module_memory", mem, "size", 0x3000u32)
                .set("module_memory", mem + 3 * piece, "size", 0x1000u32);
            module
        });
        synth.set("module", modules[0], "taints", 1u64 << 12 | 1 << 13);
        let usage = synth.alloc("module_use");
        synth.set("module_use", usage, "source", modules[1]);
        let node = synth.address_of("module_use", usage, "source_list");
        let head = synth.address_of("module", modules[0], "source_list");
        synth.list_add_tail(node, head);
        (synth, modules)
    }

    fn read(synth: &Synth) -> (Vec<Module>, Vec<String>) {
        let kernel = open(synth);
        let autopsy = Autopsy::new(&kernel);
        let modules = autopsy.modules().unwrap();
        (modules, autopsy.findings().into_iter().map(|finding| finding.text).collect())
    }

    #[test]
    fn modules_have_their_size_users_and_taint() {
        let (synth, [base, _]) = machine();
        let (modules, findings) = read(&synth);
        assert_eq!(findings, [] as [&str; 0]);
        let expected = Module {
            name: "base".into(),
            size: 0x4000,
            references: 2,
            used_by: vec!["user".into()],
            state: "live".into(),
            base: base << 8,
            taint: "OE".into(),
        };
        assert_eq!(modules[0], expected);
        assert_eq!((modules.len(), modules[1].references, modules[1].used_by.len()), (2, 0, 0));
    }

    #[test]
    fn a_damaged_module_costs_itself_and_a_damaged_list_what_is_behind() {
        let (mut synth, [base, user]) = machine();
        synth.set("module", base, "state", 77u32);
        let (modules, findings) = read(&synth);
        assert_eq!(modules.len(), 1);
        assert!(findings[0].contains("is in state 77"), "{findings:?}");
        let next = synth.address_of("module", user, "list");
        synth.write_u64(next, 0x4141_4141_4141_4141);
        let (modules, findings) = read(&synth);
        assert_eq!(modules[0].name, "user");
        assert!(findings.iter().any(|text| text.contains("the list of modules is damaged")), "{findings:?}");
    }

    #[test]
    fn users_that_go_round_end() {
        let (mut synth, [base, user]) = machine();
        let usage = synth.alloc("module_use");
        synth.set("module_use", usage, "source", base);
        let node = synth.address_of("module_use", usage, "source_list");
        let head = synth.address_of("module", user, "source_list");
        synth.list_add_tail(node, head);
        synth.write_u64(node, node);
        let (modules, findings) = read(&synth);
        assert_eq!(modules.len(), 1);
        assert!(findings[0].contains("a module is lost"), "{findings:?}");
    }
}
