//! Binding Rust structs to kernel structures.

use std::sync::Arc;

use crate::btf::{Btf, TypeId};
use crate::{Error, Kernel, Result};

/// A Rust struct that holds some fields of a kernel structure. Derive it:
///
/// ```
/// use ktypes::KernelType;
///
/// #[derive(Debug, KernelType)]
/// #[kernel("task_struct")]
/// struct TaskStruct {
///     /// The member of the same name; its size must be right, its offset comes from BTF.
///     pid: i32,
///     /// Pointers are their address.
///     mm: u64,
///     /// A member of an embedded structure. Anonymous ones are looked through.
///     #[kernel("thread.fsbase")]
///     fsbase: u64,
///     /// Only some kernels have it.
///     #[kernel("rseq_len", optional)]
///     rseq_len: Option<u32>,
///     /// Named differently over the versions: the first that exists counts.
///     #[kernel("__state", or = "state")]
///     state: u32,
///     comm: [u8; 16],
///     /// Where the member is, not what is in it: the list goes on from there.
///     #[kernel("tasks", address)]
///     tasks: u64,
///     /// An embedded structure with a declaration of its own.
///     #[kernel("pending", nested)]
///     pending: SigPending,
/// }
///
/// #[derive(Debug, KernelType)]
/// #[kernel("sigpending")]
/// struct SigPending {
///     #[kernel("list", address)]
///     list: u64,
///     #[kernel("signal.sig")]
///     signal: u64,
/// }
/// ```
///
/// Read it with [`Kernel::read`]. The declaration is bound to the kernel's BTF once, at the first
/// read or at [`Kernel::check`]; a member that does not exist, or has another size, is an error
/// that names kernel, structure and member.
///
/// Field types: integers, `bool` (one byte, or a bit-field of one bit), arrays of those, nested
/// `KernelType`s. Enums and structures of 1, 2, 4 or 8 bytes (such as `atomic_t`, `kuid_t`,
/// `sigset_t`) read as an integer of that size, any structure as `[u8; size]`. Bit-fields read as
/// any unsigned integer that has enough bits.
pub trait KernelType: Sized + 'static {
    /// The kernel's name of the structure.
    const NAME: &'static str;
    /// The fields, in the order of their declaration.
    const FIELDS: &'static [FieldSpec];

    /// Takes the fields out of a block of bytes.
    fn decode(decoder: &Decoder<'_>) -> Self;

    /// The byte offset of a field, by its Rust name. For fixed offsets in computations such as
    /// [`Kernel::container_of`].
    ///
    /// # Errors
    /// When the structure cannot be bound; when an optional field does not exist in this kernel.
    fn offset_of(kernel: &Kernel, field: &str) -> Result<u64> {
        kernel.field_offset::<Self>(field)
    }
}

/// A field of a [`KernelType`] as it is declared; made by the derive macro.
#[derive(Debug)]
pub struct FieldSpec {
    /// Its Rust name.
    pub name: &'static str,
    /// Where it may be in the kernel's structure; the first that exists counts.
    pub paths: &'static [&'static str],
    /// Whether it may be missing.
    pub optional: bool,
    /// What is wanted of it.
    pub kind: FieldKind,
}

/// What a field holds.
#[derive(Debug)]
pub enum FieldKind {
    /// The member's value, of so many bytes.
    Value {
        /// Bytes of the Rust type.
        size: usize,
    },
    /// The member's address.
    Address,
    /// The member is a structure with a declaration of its own.
    Nested {
        /// That declaration's fields.
        fields: &'static [FieldSpec],
    },
}

/// A type that a member's bytes can be read as.
pub trait KernelValue: Sized {
    /// Its size in the dead kernel.
    const SIZE: usize;
    /// From exactly [`SIZE`](Self::SIZE) bytes.
    fn from_bytes(bytes: &[u8]) -> Self;
    /// From a bit-field's value.
    fn from_bits(bits: u64) -> Self;
}

macro_rules! integers {
    ($($ty:ty)*) => {$(
        impl KernelValue for $ty {
            const SIZE: usize = size_of::<$ty>();
            fn from_bytes(bytes: &[u8]) -> Self {
                bytes.first_chunk().map_or(0, |bytes| <$ty>::from_le_bytes(*bytes))
            }
            fn from_bits(bits: u64) -> Self {
                bits as $ty
            }
        }
    )*};
}
integers!(u8 u16 u32 u64 u128 i8 i16 i32 i64);

impl KernelValue for bool {
    const SIZE: usize = 1;
    fn from_bytes(bytes: &[u8]) -> Self {
        bytes.first().is_some_and(|byte| *byte != 0)
    }
    fn from_bits(bits: u64) -> Self {
        bits != 0
    }
}

impl<T: KernelValue, const N: usize> KernelValue for [T; N] {
    const SIZE: usize = T::SIZE * N;
    fn from_bytes(bytes: &[u8]) -> Self {
        std::array::from_fn(|i| T::from_bytes(bytes.get(i * T::SIZE..).unwrap_or_default()))
    }
    fn from_bits(bits: u64) -> Self {
        Self::from_bytes(&bits.to_le_bytes())
    }
}

/// A declaration bound to a kernel.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) fields: Vec<Option<Slot>>,
    /// The part of the structure that holds all fields that are read.
    pub start: u64,
    pub end: u64,
}

/// Where a field is.
#[derive(Debug)]
pub(crate) struct Slot {
    pub offset: u64,
    pub size: u64,
    pub bits: Option<(u8, u8)>,
    pub nested: Option<Arc<Layout>>,
}

/// What binding needs to know for its errors.
pub(crate) struct Binder<'a> {
    pub btf: &'a Btf,
    pub release: &'a str,
    pub type_name: &'a str,
}

impl Binder<'_> {
    pub fn bind(&self, type_id: TypeId, fields: &[FieldSpec], prefix: &str) -> Result<Layout> {
        let mut layout = Layout { fields: Vec::new(), start: u64::MAX, end: 0 };
        for field in fields {
            let found = field.paths.iter().find_map(|path| Some((*path, self.btf.member(type_id, path)?)));
            let Some((path, member)) = found else {
                if field.optional {
                    layout.fields.push(None);
                    continue;
                }
                return Err(Error::MissingMember {
                    release: self.release.to_owned(),
                    type_name: self.type_name.to_owned(),
                    paths: field.paths.iter().map(|path| format!("{prefix}{path}")).collect(),
                });
            };
            let mut slot = Slot { offset: member.offset, size: member.size, bits: member.bits, nested: None };
            let name = || format!("{prefix}{path}");
            let span = match &field.kind {
                FieldKind::Address => None,
                FieldKind::Value { size } => {
                    let (fits, found, unit, expected) = match member.bits {
                        Some((_, bits)) => {
                            (u64::from(bits) <= *size as u64 * 8, bits.into(), "bits", size * 8)
                        }
                        None => (member.size == *size as u64, member.size, "bytes", *size),
                    };
                    if !fits {
                        return Err(Error::WrongSize {
                            release: self.release.to_owned(),
                            type_name: self.type_name.to_owned(),
                            member: name(),
                            expected: expected as u64,
                            found,
                            unit,
                        });
                    }
                    Some((member.offset, member.offset.saturating_add(member.size)))
                }
                FieldKind::Nested { fields } => {
                    if !self.btf.is_struct(member.type_id) {
                        return Err(Error::NotAStruct {
                            release: self.release.to_owned(),
                            type_name: self.type_name.to_owned(),
                            member: name(),
                        });
                    }
                    let prefix = format!("{prefix}{path}.");
                    let nested = Arc::new(self.bind(member.type_id, fields, &prefix)?);
                    let span = (nested.start < nested.end).then(|| {
                        let at = member.offset;
                        (at.saturating_add(nested.start), at.saturating_add(nested.end))
                    });
                    slot.nested = Some(nested);
                    span
                }
            };
            if let Some((start, end)) = span {
                layout.start = layout.start.min(start);
                layout.end = layout.end.max(end);
            }
            layout.fields.push(Some(slot));
        }
        if layout.end == 0 {
            layout.start = 0;
        }
        Ok(layout)
    }
}

impl Layout {
    /// The offset of a field by its position.
    pub fn offset(&self, index: usize) -> Option<u64> {
        Some(self.fields.get(index)?.as_ref()?.offset)
    }
}

/// Hands a [`KernelType`] its fields; made by [`Kernel::read`], used by the derive macro.
pub struct Decoder<'a> {
    pub(crate) layout: &'a Layout,
    /// The structure's bytes from `start` on.
    pub(crate) bytes: &'a [u8],
    pub(crate) start: u64,
    /// Where the structure is.
    pub(crate) addr: u64,
}

impl Decoder<'_> {
    fn slot(&self, index: usize) -> Option<&Slot> {
        self.layout.fields.get(index)?.as_ref()
    }

    /// The value of a field.
    pub fn value<T: KernelValue>(&self, index: usize) -> T {
        // Binding has made sure that the field exists, that it has the right size, and that the
        // bytes hold it.
        self.optional_value(index).unwrap_or_else(|| T::from_bits(0))
    }

    /// The value of a field that not every kernel has.
    pub fn optional_value<T: KernelValue>(&self, index: usize) -> Option<T> {
        let slot = self.slot(index)?;
        let from = usize::try_from(slot.offset.checked_sub(self.start)?).ok()?;
        let bytes = self.bytes.get(from..from.checked_add(slot.size as usize)?)?;
        Some(match slot.bits {
            None => T::from_bytes(bytes),
            Some((first, bits)) => {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                let mask = u64::MAX >> (64 - u32::from(bits));
                T::from_bits(u64::from_le_bytes(word) >> first & mask)
            }
        })
    }

    /// The address of a field.
    pub fn address(&self, index: usize) -> u64 {
        self.optional_address(index).unwrap_or(0)
    }

    /// The address of a field that not every kernel has.
    pub fn optional_address(&self, index: usize) -> Option<u64> {
        Some(self.addr.wrapping_add(self.slot(index)?.offset))
    }

    /// An embedded structure.
    pub fn nested<T: KernelType>(&self, index: usize) -> T {
        match self.optional_nested(index) {
            Some(value) => value,
            // Not reached: binding has resolved every field that is not optional.
            None => T::decode(&Decoder {
                layout: &Layout { fields: Vec::new(), start: 0, end: 0 },
                bytes: &[],
                start: 0,
                addr: 0,
            }),
        }
    }

    /// An embedded structure that not every kernel has.
    pub fn optional_nested<T: KernelType>(&self, index: usize) -> Option<T> {
        let slot = self.slot(index)?;
        let layout = slot.nested.as_deref()?;
        // `start` of the inner view is where the bytes begin, relative to the inner structure. It
        // may lie before it, hence the arithmetic on the outside.
        let begin = slot.offset.checked_add(layout.start)?.checked_sub(self.start)?;
        let bytes = self.bytes.get(usize::try_from(begin).ok()?..).unwrap_or_default();
        Some(T::decode(&Decoder {
            layout,
            bytes,
            start: layout.start,
            addr: self.addr.wrapping_add(slot.offset),
        }))
    }
}
