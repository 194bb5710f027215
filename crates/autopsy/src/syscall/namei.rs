//! Calls in flight that make, remove or change a name (do_mkdirat(), do_unlinkat(), do_renameat2() and their kin; open(2) with O_EXCL;
//! fs/namei.c, 6.1 and 6.12): whether the kernel's dentries say that it was done. They are what is put back on the disk.
//!
//! Which function the call was in is told by the return address into its `do_` function: the instruction before it is the call. Until then
//! nothing has happened, within `vfs_` the dentry says what has, and after it the dentry still does, as long as nobody else can have changed it.

use ktypes::{Kernel, KernelType};
use snapshot::SyscallInFlight;

use super::is_part;
use crate::fs::{Dentry, children};

/// PATH_MAX.
pub(super) const MAX_PATH: usize = 4096;
/// Directories within directories.
const MAX_DEPTH: usize = 2048;
/// A call on a CPU has not changed something longer ago than that (nanoseconds), even if its machine is a virtual one that has to wait for its turn.
const RECENT: i64 = 200_000_000;
/// A call with a 32-bit relative target, the only one that the compiler makes of a call by name.
const CALL: u8 = 0xe8;
const CALL_LEN: u64 = 5;
/// What calls the functions below (arch/x86/include/asm/syscall_wrapper.h).
const WRAPPER: &str = "__x64_sys_";
/// Bytes of a function before its first call.
const MAX_PROLOGUE: u64 = 512;
const AT_REMOVEDIR: u64 = 0x200;
pub(super) const AT_FDCWD: i32 = -100;
// Flags of `struct file` (include/linux/fs.h).
const FMODE_CREATED: u32 = 0x10_0000;
const O_LARGEFILE: u32 = 0o100_000;
/// Of the descriptor (O_CLOEXEC, build_open_flags()), or taken away when the file is open: O_CREAT, O_EXCL, O_NOCTTY, O_TRUNC
/// (do_dentry_open(); fs/open.c).
const NOT_KEPT: u32 = 0o2_001_700;

/// What becomes of the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Makes,
    /// The same, with the file that gets another name let go of afterwards, done or not.
    Links,
    Removes,
    Renames,
}

/// How far a call has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not yet at the file system.
    Before,
    /// In the part that changes something.
    Within,
    /// Behind it, having been there.
    After,
    /// In the first or the last few instructions, done or failed.
    Between,
}

/// A name that a call has been given: descriptor of the directory (AT_FDCWD if the call takes none), and address of the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) directory: i32,
    pub(super) path: u64,
}

struct Operation {
    function: &'static str,
    vfs: &'static [&'static str],
    effect: Effect,
    name: Given,
    /// Of a rename.
    new: Option<Given>,
    /// Of a link: what gets another name.
    linked: Option<Given>,
}

/// What the call does; `None` if it is none of these.
fn operation(name: &str, call: &SyscallInFlight) -> Option<Operation> {
    use Effect::{Links, Makes, Removes, Renames};
    let path = |n: usize| Given { directory: AT_FDCWD, path: call.args[n] };
    let at = |n: usize| Given { directory: call.args[n] as i32, path: call.args[n + 1] };
    let plain =
        |function, vfs, effect, name| Operation { function, vfs, effect, name, new: None, linked: None };
    let mknod: &[&str] = &["vfs_mknod", "vfs_create"];
    let rename =
        |name, new| Operation { new: Some(new), ..plain("do_renameat2", &["vfs_rename"], Renames, name) };
    let link = |from, to| Operation { linked: Some(from), ..plain("do_linkat", &["vfs_link"], Links, to) };
    Some(match name {
        "unlinkat" if call.args[2] & AT_REMOVEDIR != 0 => plain("do_rmdir", &["vfs_rmdir"], Removes, at(0)),
        "rmdir" => plain("do_rmdir", &["vfs_rmdir"], Removes, path(0)),
        "unlink" => plain("do_unlinkat", &["vfs_unlink"], Removes, path(0)),
        "unlinkat" => plain("do_unlinkat", &["vfs_unlink"], Removes, at(0)),
        "mkdir" => plain("do_mkdirat", &["vfs_mkdir"], Makes, path(0)),
        "mkdirat" => plain("do_mkdirat", &["vfs_mkdir"], Makes, at(0)),
        "mknod" => plain("do_mknodat", mknod, Makes, path(0)),
        "mknodat" => plain("do_mknodat", mknod, Makes, at(0)),
        "symlink" => plain("do_symlinkat", &["vfs_symlink"], Makes, path(1)),
        "symlinkat" => plain("do_symlinkat", &["vfs_symlink"], Makes, at(1)),
        "link" => link(path(0), path(1)),
        "linkat" => link(at(0), at(2)),
        "rename" => rename(path(0), path(1)),
        "renameat" | "renameat2" => rename(at(0), at(2)),
        _ => return None,
    })
}

/// By the function that the call's own function was in.
fn phase_of(callee: &str, vfs: &[&str], effect: Effect) -> Phase {
    const BEFORE: [&str; 14] = [
        "__filename_parentat",
        "filename_parentat",
        "filename_create",
        "filename_lookup",
        "mnt_want_write",
        "down_write",
        "mutex_lock",
        "lock_two_directories",
        "lock_rename",
        "lookup_one_qstr_excl",
        "__lookup_hash",
        "ihold",
        "may_linkat",
        "current_umask",
    ];
    const AFTER: [&str; 3] = ["up_write", "mutex_unlock", "mnt_drop_write"];
    // They let go of the directory, of what was removed, and, of a link, of what was linked.
    const PUT: [&str; 5] = ["dput", "mntput", "path_put", "iput", "done_path_create"];
    match callee {
        _ if vfs.contains(&callee) => Phase::Within,
        "security_path_post_mknod" | "ima_post_path_mknod" => Phase::After,
        _ if BEFORE.contains(&callee) || callee.starts_with("security_path_") => Phase::Before,
        _ if AFTER.contains(&callee) || PUT.contains(&callee) && effect != Effect::Links => Phase::After,
        _ => Phase::Between,
    }
}

/// Whether the call was done. `done`: what the dentries say. `recent`: the directory was changed so lately that it may have been this call.
fn verdict(phase: Phase, effect: Effect, done: Option<bool>, recent: bool) -> Option<bool> {
    let removes = effect == Effect::Removes;
    match (phase, done?) {
        (Phase::Before, _) | (_, false) => Some(false),
        (Phase::Within, true) => Some(true),
        // Nothing of that name; or what is on the stack is of an earlier rename (with CONFIG_INIT_STACK_ALL_ZERO it never is).
        (Phase::After | Phase::Between, true) if removes || effect == Effect::Renames => Some(recent),
        // Until the directory is unlocked nobody else can have made it.
        (Phase::After, true) => Some(true),
        // It may have been there already.
        (Phase::Between, true) => None,
    }
}

#[derive(KernelType)]
#[kernel("inode")]
struct Changed {
    i_nlink: u32,
    #[kernel("i_ctime.tv_sec", or = "__i_ctime.tv_sec", or = "i_ctime_sec")]
    sec: i64,
    #[kernel("i_ctime.tv_nsec", or = "__i_ctime.tv_nsec", optional)]
    nsec_of_timespec: Option<u64>,
    #[kernel("i_ctime_nsec", optional)]
    nsec: Option<u32>,
}

/// struct renamedata (include/linux/fs.h).
#[derive(KernelType)]
#[kernel("renamedata")]
struct RenameData {
    old_dir: u64,
    old_dentry: u64,
    new_dir: u64,
    new_dentry: u64,
}

#[derive(KernelType)]
#[kernel("file")]
struct NewFile {
    f_mode: u32,
    f_flags: u32,
    #[kernel("f_count.counter")]
    f_count: u64,
}

/// One thread's kernel stack, and what else is needed.
pub(super) struct Walker<'a> {
    pub(super) kernel: &'a Kernel,
    /// Address of the `task_struct`.
    pub(super) task: u64,
    /// The words of the live stack, from the deepest frame up.
    pub(super) stack: &'a [u64],
    /// The general registers, if it was on a CPU.
    pub(super) registers: &'a [u64],
    /// CLOCK_REALTIME at the end.
    pub(super) now_ns: i64,
    /// Bytes of the program's memory up to a NUL, at most [`MAX_PATH`].
    pub(super) path: &'a dyn Fn(u64) -> Option<Vec<u8>>,
    /// The dentry of a directory's descriptor, or of the working directory.
    pub(super) directory: &'a dyn Fn(i32) -> Option<u64>,
    /// Open files of the process.
    pub(super) is_open: &'a dyn Fn(u64) -> bool,
}

impl Walker<'_> {
    /// Whether a call that changes names was done; `None` if that cannot be told.
    pub(super) fn is_done(&self, name: &str, call: &SyscallInFlight) -> Option<bool> {
        let Operation { function, vfs, effect, name, new, linked } = operation(name, call)?;
        let phase = self.phase(function, |callee| phase_of(callee, vfs, effect));
        if phase == Phase::Before {
            return Some(false);
        }
        let (done, directory) = match new {
            Some(new) => self.renamed(name, new)?,
            None => {
                let (inode, directory) = self.exists(name)?;
                // Names of another inode were there before.
                if let (Phase::Between, Some(inode), Some(linked)) = (phase, inode, linked)
                    && self.exists(linked).is_some_and(|(linked, _)| linked == Some(inode))
                {
                    return self.is_recent(inode).then_some(true);
                }
                // It would not have been locked for a name that there was.
                if phase == Phase::Between
                    && inode.is_some()
                    && effect != Effect::Removes
                    && self.holds(directory)
                {
                    return Some(true);
                }
                (inode.is_some() != (effect == Effect::Removes), directory)
            }
        };
        verdict(phase, effect, Some(done), self.is_recent(directory))
    }

    /// Whether an open(2) with O_CREAT and O_EXCL, and these flags, has made its file.
    pub(super) fn has_made(&self, name: Given, flags: u32) -> Option<bool> {
        // What comes after it is for those that were opened.
        let phase_of = |callee: &str| match callee {
            "do_filp_open" | "__fsnotify_parent" | "fsnotify" => Phase::Within,
            "getname" | "getname_flags" | "get_unused_fd_flags" | "build_open_flags" => Phase::Before,
            _ => Phase::Between,
        };
        match self.phase("do_sys_openat2", phase_of) {
            Phase::Before => Some(false),
            Phase::Within => {
                let made = self.pointers().any(|addr| self.is_new_file(addr, flags).unwrap_or(false));
                Some(made && self.exists(name)?.0.is_some())
            }
            Phase::After | Phase::Between => self.exists(name)?.0.is_none().then_some(false),
        }
    }

    /// A file that has been made by the call that opens it, and is nobody's yet.
    fn is_new_file(&self, addr: u64, flags: u32) -> Option<bool> {
        let file: NewFile = self.kernel.read(addr).ok()?;
        let same = (file.f_flags ^ flags) & !(NOT_KEPT | O_LARGEFILE) == 0;
        Some(file.f_count == 1 && file.f_mode & FMODE_CREATED != 0 && same && !(self.is_open)(addr))
    }

    /// By what `function` has called.
    fn phase(&self, function: &str, phase_of: impl Fn(&str) -> Phase) -> Phase {
        let symbol = |addr| self.kernel.symbolize(addr);
        let callees = self.stack.iter().filter(|addr| {
            symbol(**addr).is_some_and(|(name, offset)| offset != 0 && is_part(name, function))
        });
        let mut phases = callees.filter_map(|addr| Some(phase_of(self.callee(*addr)?)));
        // Further down there may be remains of earlier calls.
        if let Some(outermost) = phases.next_back() {
            return outermost;
        }
        let all = || self.stack.iter().chain(self.registers);
        // The name is copied from the program first.
        let copies = all().any(|addr| symbol(*addr).is_some_and(|(name, _)| is_part(name, "getname_flags")));
        let mut inside = all().filter(|addr| {
            symbol(**addr).is_some_and(|(name, _)| is_part(name, function) || name.starts_with(WRAPPER))
        });
        // Where the result has not been stored, nothing has been done outside of these.
        let before = copies || inside.all(|addr| self.is_before_first_call(*addr));
        if before { Phase::Before } else { Phase::Between }
    }

    /// Whether a function has called nothing before it came to this address.
    fn is_before_first_call(&self, addr: u64) -> bool {
        let Some((_, offset)) = self.kernel.symbolize(addr) else { return false };
        let start = addr.wrapping_sub(offset);
        let ends = (CALL_LEN..=offset.min(MAX_PROLOGUE)).map(|end| start.wrapping_add(end));
        let calls = |end| self.callee(end).is_some_and(|callee| callee != "__fentry__");
        offset <= MAX_PROLOGUE && !ends.into_iter().any(calls)
    }

    /// The function that was called by the instruction before a return address.
    fn callee(&self, return_address: u64) -> Option<&str> {
        let bytes = self.kernel.read_bytes(return_address.wrapping_sub(CALL_LEN), CALL_LEN as usize).ok()?;
        let (&opcode, relative) = bytes.split_first()?;
        let relative = i32::from_le_bytes(relative.try_into().ok()?);
        let target = return_address.wrapping_add_signed(relative.into());
        let (name, offset) = self.kernel.symbolize(target)?;
        (opcode == CALL && offset == 0).then_some(name)
    }

    /// What may be a pointer.
    fn pointers(&self) -> impl Iterator<Item = u64> {
        let mut all: Vec<u64> = self.stack.iter().chain(self.registers).copied().collect();
        all.retain(|word| word >> 63 != 0 && word.is_multiple_of(8));
        all.sort_unstable();
        all.dedup();
        all.into_iter()
    }

    fn dentry(&self, addr: u64) -> Option<Dentry> {
        self.kernel.read(addr).ok()
    }

    /// Whether a dentry has this name.
    fn is_called(&self, dentry: &Dentry, name: &[u8]) -> bool {
        dentry.name_len as usize == name.len()
            && self.kernel.read_bytes(dentry.name, name.len()).is_ok_and(|own| own == name)
    }

    /// The dentry of the directory that a name is in, by the dentries that the call has in its hands, or had; and the name.
    fn directory_of(&self, given: Given) -> Option<(u64, Vec<u8>)> {
        let path = (self.path)(given.path)?;
        let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
        let last = *parts.last()?;
        let named = |addr| self.dentry(addr).filter(|dentry| self.is_called(dentry, last));
        let base = if path.first() == Some(&b'/') { None } else { (self.directory)(given.directory) };
        let found: Vec<(usize, u64)> = self
            .pointers()
            .filter_map(named)
            .map(|dentry| (self.fits(&dentry, &parts, base), dentry.d_parent))
            .collect();
        // An earlier call may have left another directory's.
        let (best, directory) = *found.iter().max()?;
        let is_only = found.iter().all(|(fits, other)| *fits < best || *other == directory);
        is_only.then(|| (directory, last.to_vec()))
    }

    /// How well a dentry fits a path: so many of its last names, and one more for the directory in which it begins.
    fn fits(&self, dentry: &Dentry, parts: &[&[u8]], base: Option<u64>) -> usize {
        let mut above = dentry.d_parent;
        let mut count = 1;
        for part in parts.iter().rev().skip(1).take(MAX_DEPTH) {
            match self.dentry(above) {
                Some(parent) if parent.d_parent != above && self.is_called(&parent, part) => {
                    above = parent.d_parent
                }
                _ => return count,
            }
            count += 1;
        }
        count + usize::from(base == Some(above))
    }

    /// The inode of that name, if there is one, and that of its directory.
    fn exists(&self, given: Given) -> Option<(Option<u64>, u64)> {
        let (directory, name) = self.directory_of(given)?;
        let inode = |addr: u64| {
            let dentry = self.dentry(addr)?;
            let is_it = dentry.hashed != 0 && dentry.d_inode != 0 && self.is_called(&dentry, &name);
            let links = |inode: Changed| inode.i_nlink > 0;
            (is_it && self.kernel.read(dentry.d_inode).is_ok_and(links)).then_some(dentry.d_inode)
        };
        let inode = children(self.kernel, directory).ok()?.into_iter().find_map(inode);
        Some((inode, self.dentry(directory)?.d_inode))
    }

    /// Whether a rename was done, and the inode of the directory of the new name.
    fn renamed(&self, old: Given, new: Given) -> Option<(bool, u64)> {
        let last = |given: Given| {
            let path = (self.path)(given.path)?;
            path.split(|byte| *byte == b'/').rfind(|part| !part.is_empty()).map(<[u8]>::to_vec)
        };
        let (old_name, new_name) = (last(old)?, last(new)?);
        let mut answer = None;
        for words in (0..self.stack.len()).filter_map(|n| self.stack.get(n..)) {
            let Some(found) = self.rename_data(words, &old_name, &new_name) else { continue };
            if answer.is_some_and(|known| known != found) {
                return None;
            }
            answer = Some(found);
        }
        match answer {
            Some(answer) => Some(answer),
            // It has not been filled in, or is an earlier call's.
            None => {
                self.exists(old).filter(|(inode, _)| inode.is_some()).map(|(_, directory)| (false, directory))
            }
        }
    }

    fn rename_data(&self, words: &[u64], old_name: &[u8], new_name: &[u8]) -> Option<(bool, u64)> {
        let member = |name| {
            let at = self.kernel.offset_of("renamedata", name).ok()? as usize;
            words.get(at / 8).copied().filter(|word| word >> 63 != 0 && word.is_multiple_of(8))
        };
        let data = RenameData {
            old_dir: member("old_dir")?,
            old_dentry: member("old_dentry")?,
            new_dir: member("new_dir")?,
            new_dentry: member("new_dentry")?,
        };
        let old = self.dentry(data.old_dentry)?;
        let new = self.dentry(data.new_dentry)?;
        let parent = self.dentry(old.d_parent)?.d_inode;
        if !self.is_called(&new, new_name) && !self.is_called(&new, old_name) {
            return None;
        }
        let is_old = parent == data.old_dir && self.is_called(&old, old_name);
        let is_new = parent == data.new_dir && self.is_called(&old, new_name);
        (is_old || is_new).then_some((!is_old, data.new_dir))
    }

    /// Whether the thread has locked a directory for writing (`owner` of its `i_rwsem`; the lowest bits are flags).
    fn holds(&self, inode: u64) -> bool {
        let owner = self.kernel.offset_of("inode", "i_rwsem.owner.counter");
        let owner = owner.and_then(|offset| self.kernel.read_u64(inode.wrapping_add(offset)));
        owner.is_ok_and(|owner| owner & !7 == self.task)
    }

    fn is_recent(&self, inode: u64) -> bool {
        let Ok(inode) = self.kernel.read::<Changed>(inode) else { return false };
        let nsec =
            inode.nsec.map(i64::from).or(inode.nsec_of_timespec.and_then(|nsec| i64::try_from(nsec).ok()));
        let changed = inode.sec.saturating_mul(1_000_000_000).saturating_add(nsec.unwrap_or(0));
        self.now_ns.saturating_sub(changed) < RECENT
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::testing::{declare, open};
    use synth::{Record, Synth, U64, array, named};

    #[test]
    fn the_phase_is_that_of_the_function_that_was_called() {
        let phase = |callee| phase_of(callee, &["vfs_unlink"], Effect::Removes);
        assert_eq!(phase("vfs_unlink"), Phase::Within);
        for before in ["__filename_parentat", "down_write", "security_path_unlink", "lookup_one_qstr_excl"] {
            assert_eq!(phase(before), Phase::Before, "{before}");
        }
        for after in ["dput", "up_write", "mnt_drop_write", "security_path_post_mknod"] {
            assert_eq!(phase(after), Phase::After, "{after}");
        }
        assert_eq!(phase("putname"), Phase::Between);
        assert_eq!(phase_of("dput", &["vfs_link"], Effect::Links), Phase::Between, "of the old name, or so");
    }

    #[test]
    fn what_may_have_been_so_before_needs_more_than_the_dentry() {
        use Effect::{Makes, Removes, Renames};
        for effect in [Makes, Effect::Links, Removes, Renames] {
            for phase in [Phase::Before, Phase::Within, Phase::After, Phase::Between] {
                assert_eq!(verdict(phase, effect, Some(false), true), Some(false));
                assert_eq!(verdict(phase, effect, None, true), None);
            }
            assert_eq!(verdict(Phase::Before, effect, Some(true), true), Some(false), "by somebody else");
            assert_eq!(verdict(Phase::Within, effect, Some(true), false), Some(true));
        }
        assert_eq!(verdict(Phase::After, Makes, Some(true), false), Some(true));
        assert_eq!(verdict(Phase::Between, Makes, Some(true), true), None, "EEXIST?");
        for (effect, phase) in
            [Removes, Renames].iter().flat_map(|e| [(*e, Phase::After), (*e, Phase::Between)])
        {
            assert_eq!(verdict(phase, effect, Some(true), true), Some(true));
            assert_eq!(verdict(phase, effect, Some(true), false), Some(false), "ENOENT");
        }
    }

    const TASK: u64 = 0xffff_8880_0abc_0000;
    const NOW: i64 = 5_000_000_000;

    /// A kernel with the directory `/d` in it, and the names in that.
    struct Tree {
        synth: Synth,
        root: u64,
        directory: u64,
    }

    impl Tree {
        fn new() -> Self {
            let mut synth = Synth::new();
            declare::<Changed>(&mut synth, &[]);
            synth.structure("dentry_links", Record::union().field("d_alias", array(U64, 2)));
            let lists = [("d_child", named("list_head")), ("d_subdirs", named("list_head"))];
            let types = [("d_u", named("dentry_links")), lists[0].clone(), lists[1].clone()];
            declare::<Dentry>(&mut synth, &types);
            declare::<RenameData>(&mut synth, &[]);
            let root = synth.alloc("dentry");
            let mut tree = Self { synth, root, directory: 0 };
            tree.synth.set("dentry", root, "d_parent", root);
            tree.synth.list_init("dentry", root, "d_subdirs");
            tree.directory = tree.add(root, "d", 2);
            tree
        }

        /// A dentry of this name, and of an inode that has so many; negative if it is 0.
        fn add(&mut self, parent: u64, name: &str, links: u32) -> u64 {
            let synth = &mut self.synth;
            let (dentry, text) = (synth.alloc("dentry"), synth.string(name));
            if links > 0 {
                let inode = synth.alloc("inode");
                synth.set("inode", inode, "i_nlink", links).set("inode", inode, "i_ctime.tv_sec", 5u64);
                synth.set("dentry", dentry, "d_inode", inode);
            }
            synth
                .set("dentry", dentry, "d_parent", parent)
                .set("dentry", dentry, "d_name.name", text)
                .set("dentry", dentry, "d_name.len", name.len() as u32)
                .set("dentry", dentry, "d_hash.pprev", parent);
            synth.list_init("dentry", dentry, "d_subdirs");
            let (node, head) = (
                synth.address_of("dentry", dentry, "d_child"),
                synth.address_of("dentry", parent, "d_subdirs"),
            );
            synth.list_add_tail(node, head);
            dentry
        }

        fn inode(&mut self, dentry: u64) -> u64 {
            let at = self.synth.address_of("dentry", dentry, "d_inode");
            self.synth.read_u64(at)
        }

        fn ask<T>(&self, stack: &[u64], paths: &[&str], ask: impl FnOnce(&Walker<'_>) -> T) -> T {
            let kernel = open(&self.synth);
            let path = |addr: u64| paths.get(addr as usize).map(|path| path.as_bytes().to_vec());
            let walker = Walker {
                kernel: &kernel,
                task: TASK,
                stack,
                registers: &[],
                now_ns: NOW,
                path: &path,
                directory: &|fd| (fd == 3).then_some(self.directory),
                is_open: &|_| false,
            };
            ask(&walker)
        }

        fn exists(&self, stack: &[u64], directory: i32, path: &str) -> Option<bool> {
            let given = Given { directory, path: 0 };
            self.ask(stack, &[path], |walker| walker.exists(given).map(|(inode, _)| inode.is_some()))
        }
    }

    #[test]
    fn the_call_before_a_return_address_tells_how_far_a_function_was() {
        let mut tree = Tree::new();
        tree.synth.structure("functions", Record::new().field("text", array(U64, 64)));
        let text = tree.synth.variable("text", "functions");
        let functions = ["do_unlinkat", "__filename_parentat", "vfs_unlink", "putname", "__x64_sys_unlink"];
        let at: BTreeMap<&str, u64> =
            functions.iter().zip(0..).map(|(name, n)| (*name, text + 64 + n * 64)).collect();
        for (name, addr) in &at {
            tree.synth.symbol(name, *addr);
        }
        let call = |tree: &mut Tree, from: u64, to: &str| {
            let relative = (at[to].wrapping_sub(from + CALL_LEN)) as i32;
            let bytes = [&[CALL][..], &relative.to_le_bytes()].concat();
            tree.synth.write(from, &bytes);
            from + CALL_LEN
        };
        let [start, sys] = ["do_unlinkat", "__x64_sys_unlink"].map(|name| at[name]);
        let look_up = call(&mut tree, start + 8, "__filename_parentat");
        let unlink = call(&mut tree, start + 20, "vfs_unlink");
        let put = call(&mut tree, start + 40, "putname");
        let outer = call(&mut tree, sys + 4, "do_unlinkat");
        let phase = |words: &[u64]| {
            tree.ask(words, &[], |walker| {
                walker.phase("do_unlinkat", |callee| phase_of(callee, &["vfs_unlink"], Effect::Removes))
            })
        };
        assert_eq!(phase(&[1, look_up, outer]), Phase::Before);
        assert_eq!(phase(&[unlink, 7, outer]), Phase::Within);
        assert_eq!(phase(&[put, outer]), Phase::Between);
        assert_eq!(phase(&[look_up, unlink, outer]), Phase::Within, "of an earlier call");
        // An interrupt's registers have the place itself on the stack.
        assert_eq!(phase(&[start + 4]), Phase::Before, "it has called nothing yet");
        assert_eq!(phase(&[start + 30]), Phase::Between);
        assert_eq!(phase(&[sys + 2]), Phase::Before);
        assert_eq!(phase(&[sys + 20]), Phase::Between, "it may have come back");
        assert_eq!(phase(&[1, 2]), Phase::Before, "not there yet");
    }

    #[test]
    fn a_name_is_there_if_it_has_an_inode_that_has_names() {
        let mut tree = Tree::new();
        let directory = tree.directory;
        let (there, gone) = (tree.add(directory, "there", 1), tree.add(directory, "gone", 0));
        assert_eq!(tree.exists(&[7, there], AT_FDCWD, "/d/there"), Some(true));
        assert_eq!(tree.exists(&[7, gone], AT_FDCWD, "/d/gone/"), Some(false));
        assert_eq!(tree.exists(&[gone], AT_FDCWD, "/d/there"), None, "it is not in its hands");
        let inode = tree.inode(there);
        tree.synth.set("inode", inode, "i_nlink", 0u32);
        assert_eq!(tree.exists(&[there], AT_FDCWD, "/d/there"), Some(false), "just removed");
    }

    #[test]
    fn of_two_directories_it_is_the_one_of_the_path() {
        let mut tree = Tree::new();
        let (root, directory) = (tree.root, tree.directory);
        let other = tree.add(root, "other", 2);
        let (stale, own) = (tree.add(other, "f", 1), tree.add(directory, "f", 0));
        assert_eq!(tree.exists(&[stale, own], AT_FDCWD, "/mnt/d/f"), Some(false));
        assert_eq!(tree.exists(&[stale, own], AT_FDCWD, "/mnt/other/f"), Some(true));
        assert_eq!(tree.exists(&[stale, own], 3, "f"), Some(false), "by the descriptor");
        assert_eq!(tree.exists(&[stale, own], 4, "f"), None, "either");
    }

    #[test]
    fn a_rename_was_done_when_the_old_dentry_has_the_new_name() {
        let mut tree = Tree::new();
        let (root, directory) = (tree.root, tree.directory);
        let (old, new) = (tree.add(directory, "old", 1), tree.add(root, "new", 0));
        let root_inode = {
            let inode = tree.synth.alloc("inode");
            tree.synth.set("dentry", root, "d_inode", inode);
            inode
        };
        let directory_inode = tree.inode(directory);
        let data = tree.synth.alloc("renamedata");
        for (member, value) in
            [("old_dir", directory_inode), ("old_dentry", old), ("new_dir", root_inode), ("new_dentry", new)]
        {
            tree.synth.set("renamedata", data, member, value);
        }
        let ends = ["old_dir", "old_dentry", "new_dir", "new_dentry"];
        let size = ends.map(|member| tree.synth.offset_of("renamedata", member) / 8 + 1).into_iter().max();
        let size = size.unwrap();
        let words: Vec<u64> = (0..size).map(|n| tree.synth.read_u64(data + n * 8)).collect();
        let stack = [&[1, 2][..], &words, &[3]].concat();
        let given = |path| Given { directory: AT_FDCWD, path };
        let ask =
            |tree: &Tree| tree.ask(&stack, &["/d/old", "/new"], |walker| walker.renamed(given(0), given(1)));
        assert_eq!(ask(&tree), Some((false, root_inode)));
        let name = tree.synth.string("new");
        tree.synth
            .set("dentry", old, "d_name.name", name)
            .set("dentry", old, "d_name.len", 3u32)
            .set("dentry", old, "d_parent", root);
        assert_eq!(ask(&tree), Some((true, root_inode)));
        tree.synth.set("dentry", old, "d_parent", directory);
        assert_eq!(ask(&tree), None, "neither: of an earlier call");
    }

    #[test]
    fn only_a_file_that_nobody_has_yet_is_a_new_one() {
        let mut tree = Tree::new();
        declare::<NewFile>(&mut tree.synth, &[]);
        let file = tree.synth.alloc("file");
        let created = |tree: &Tree| tree.ask(&[], &[], |walker| walker.is_new_file(file, 0o302));
        tree.synth.set("file", file, "f_count.counter", 1u64).set("file", file, "f_flags", 0o100_302u32);
        assert_eq!(created(&tree), Some(false));
        tree.synth.set("file", file, "f_mode", FMODE_CREATED);
        assert_eq!(created(&tree), Some(true));
        tree.synth.set("file", file, "f_flags", 0o100_002u32);
        assert_eq!(created(&tree), Some(true), "when it is open it forgets how");
        let with_cloexec = tree.ask(&[], &[], |walker| walker.is_new_file(file, 0o2_000_302));
        assert_eq!(with_cloexec, Some(true), "that is the descriptor's");
        tree.synth.set("file", file, "f_flags", 0o102_302u32);
        assert_eq!(created(&tree), Some(false), "another call's");
    }
}
