//! Whether a pointer leads to the beginning of an object of the slab cache that such objects come from.
//!
//! Caches are told by the kernel's own variables, not by their names: small ones of equal size may be one, under the name of either. Which
//! cache a slab belongs to never changes while one of its objects is in use.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;

use ktypes::KernelType;
use snapshot::FindingKind;

use super::Doubts;
use crate::Autopsy;
use crate::error::Result;

/// KFENCE_POOL_SIZE with CONFIG_KFENCE_NUM_OBJECTS=255, the default (include/linux/kfence.h).
const KFENCE_POOL: u64 = 2 << 20;

/// A kind of object: where the variable with its cache is, and which objects of the kernel's image are of it, too.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// The kernel's structure.
    pub name: &'static str,
    /// The variable.
    pub cache: &'static str,
    /// Objects that are no slab objects.
    pub fixed: &'static [&'static str],
}

const fn kind(name: &'static str, cache: &'static str, fixed: &'static [&'static str]) -> Kind {
    Kind { name, cache, fixed }
}

// kernel/fork.c, kernel/cred.c, kernel/nsproxy.c, kernel/user.c, fs/file_table.c, fs/dcache.c, mm/rmap.c; 6.1 and 6.12.
pub(super) const SIGNAL: Kind = kind("signal_struct", "signal_cachep", &["init_signals"]);
pub(super) const SIGHAND: Kind = kind("sighand_struct", "sighand_cachep", &["init_sighand"]);
pub(super) const FILES: Kind = kind("files_struct", "files_cachep", &["init_files"]);
pub(super) const FS: Kind = kind("fs_struct", "fs_cachep", &["init_fs"]);
pub(super) const NSPROXY: Kind = kind("nsproxy", "nsproxy_cachep", &["init_nsproxy"]);
pub(super) const MM: Kind = kind("mm_struct", "mm_cachep", &["init_mm"]);
pub(super) const VMA: Kind = kind("vm_area_struct", "vm_area_cachep", &[]);
pub(super) const CRED: Kind = kind("cred", "cred_jar", &["init_cred"]);
pub(super) const USER: Kind = kind("user_struct", "uid_cachep", &["root_user"]);
pub(super) const FILE: Kind = kind("file", "filp_cachep", &[]);
pub(super) const DENTRY: Kind = kind("dentry", "dentry_cache", &[]);
pub(super) const ANON_VMA: Kind = kind("anon_vma", "anon_vma_cachep", &[]);

#[derive(KernelType)]
#[kernel("kmem_cache")]
struct Cache {
    object_size: u32,
}

/// Values of the variables, read once.
#[derive(Debug, Default)]
pub(crate) struct Caches {
    known: RefCell<HashMap<&'static str, Option<u64>>>,
}

impl Autopsy<'_> {
    /// Adds a doubt unless `addr` can be an object of this kind.
    pub(super) fn check_slab(
        &self,
        kind: Kind,
        addr: u64,
        object: &'static str,
        doubts: &mut Doubts,
    ) -> bool {
        match self.slab_contradiction(kind, addr) {
            None => true,
            Some(why) => {
                doubts.doubt(
                    FindingKind::Slab,
                    object,
                    addr,
                    format!("no {} is at {addr:#x}: {why}", kind.name),
                );
                false
            }
        }
    }

    /// Why there can be no object of this kind at an address; `None` if there can, or it cannot be told.
    pub(super) fn slab_contradiction(&self, kind: Kind, addr: u64) -> Option<String> {
        let expected = self.cache(kind)?;
        match self.kernel.slab_cache_of(addr) {
            Some(slab) if slab.cache == expected && slab.starts_at(addr) => None,
            _ if self.is_exempt(kind, addr) => None,
            Some(slab) if slab.cache == expected => Some("it lies amid one".into()),
            Some(slab) => Some(format!("it lies in a slab of `{}` objects", slab.cache_name)),
            None => Some("it lies in no slab".into()),
        }
    }

    fn is_exempt(&self, kind: Kind, addr: u64) -> bool {
        kind.fixed.iter().any(|name| self.kernel.symbol_opt(name) == Some(addr)) || self.is_kfence(addr)
    }

    /// Whether an address lies in KFENCE's pool, where objects of all caches are, apart from each other.
    pub(super) fn is_kfence(&self, addr: u64) -> bool {
        let pool = self.kernel.symbol_opt("__kfence_pool").and_then(|at| self.kernel.read_u64(at).ok());
        pool.is_some_and(|pool| pool != 0 && addr.checked_sub(pool).is_some_and(|skip| skip < KFENCE_POOL))
    }

    /// The `kmem_cache` of a kind; `None` if the variable is unknown or itself damaged, which must not be held against the objects.
    fn cache(&self, kind: Kind) -> Option<u64> {
        let known = self.caches.known.borrow().get(kind.cache).copied();
        known.unwrap_or_else(|| {
            let cache = self.read_cache(kind).ok().flatten();
            self.caches.known.borrow_mut().insert(kind.cache, cache);
            cache
        })
    }

    fn read_cache(&self, kind: Kind) -> Result<Option<u64>> {
        let addr = self.kernel.read_u64(self.kernel.symbol(kind.cache)?)?;
        let cache: Cache = self.kernel.read(addr)?;
        // A cache of another size is another one's.
        let fits = u64::from(cache.object_size) >= self.kernel.size_of(kind.name)?;
        Ok(fits.then_some(addr))
    }
}
