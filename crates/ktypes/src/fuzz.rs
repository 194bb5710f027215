//! For fuzzing only (`cfg(fuzzing)`): a fake kernel has every structure that anybody asks for.
//!
//! Declaring all structures that `autopsy` reads to a fake kernel would be a second description of the kernel. So that each walker can be
//! led into memory that a fuzzer fills, a structure that the fake kernel's BTF does not have gets members at places that only depend on
//! their names, and a symbol that it does not have is a variable in the fuzzer's arena.

use std::sync::Arc;

use crate::btf::{Member, hash};
use crate::layout::{Layout, Slot};
use crate::{FieldKind, FieldSpec};

/// Physical address and size of the memory that the fuzzer fills.
pub const ARENA: std::ops::Range<u64> = (4 << 20)..(4 << 20) + (64 << 10);

/// Where a variable is, from the beginning of the arena.
pub(crate) fn variable(name: &str) -> u64 {
    hash(name.as_bytes()) % ((ARENA.end - ARENA.start) / 64) * 64
}

fn offset(path: &str) -> u64 {
    hash(path.as_bytes()) % 32 * 8
}

pub(crate) fn member(path: &str) -> Member {
    Member { offset: offset(path), size: 8, bits: None, type_id: 0 }
}

pub(crate) fn enumerator(name: &str) -> i64 {
    (hash(name.as_bytes()) % 16) as i64
}

pub(crate) fn layout(fields: &[FieldSpec]) -> Layout {
    let mut layout = Layout { fields: Vec::new(), start: 0, end: 8 };
    for field in fields {
        let offset = offset(field.paths.first().copied().unwrap_or_default());
        let (size, nested) = match &field.kind {
            FieldKind::Value { size } => (*size as u64, None),
            FieldKind::Address => (8, None),
            FieldKind::Nested { fields } => {
                let nested = self::layout(fields);
                (nested.end, Some(Arc::new(nested)))
            }
        };
        layout.end = layout.end.max(offset + size);
        layout.fields.push(Some(Slot { offset, size, bits: None, nested }));
    }
    layout
}
