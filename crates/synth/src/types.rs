//! Descriptions of C types, laid out as the compiler would.

use std::collections::BTreeMap;

/// A C type.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Type {
    /// An integer: its C name, its size in bytes, whether it is signed.
    Int(&'static str, u64, bool),
    /// A pointer (to void).
    Pointer,
    /// An array; 0 elements make a flexible one.
    Array(Box<Type>, u32),
    /// A struct, union, enum or typedef that is declared by name.
    Named(String),
    /// A struct or union without a name.
    Record(Record),
    /// `const`.
    Const(Box<Type>),
    /// `volatile`.
    Volatile(Box<Type>),
}

/// `unsigned char`.
pub const U8: Type = Type::Int("unsigned char", 1, false);
/// `unsigned short`.
pub const U16: Type = Type::Int("short unsigned int", 2, false);
/// `unsigned int`.
pub const U32: Type = Type::Int("unsigned int", 4, false);
/// `unsigned long`.
pub const U64: Type = Type::Int("long unsigned int", 8, false);
/// `signed char`.
pub const I8: Type = Type::Int("signed char", 1, true);
/// `short`.
pub const I16: Type = Type::Int("short int", 2, true);
/// `int`.
pub const I32: Type = Type::Int("int", 4, true);
/// `long`.
pub const I64: Type = Type::Int("long int", 8, true);
/// `_Bool`.
pub const BOOL: Type = Type::Int("_Bool", 1, false);
/// Any pointer.
pub const PTR: Type = Type::Pointer;

/// An array of `len` elements.
pub fn array(element: Type, len: u32) -> Type {
    Type::Array(Box::new(element), len)
}

/// A type that is declared by name.
pub fn named(name: &str) -> Type {
    Type::Named(name.to_owned())
}

/// `const` before a type.
pub fn constant(ty: Type) -> Type {
    Type::Const(Box::new(ty))
}

/// `volatile` before a type.
pub fn volatile(ty: Type) -> Type {
    Type::Volatile(Box::new(ty))
}

/// A struct or union: a list of fields, put together by chained calls.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Record {
    pub(crate) is_union: bool,
    pub(crate) fields: Vec<Field>,
    pub(crate) min_size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Field {
    /// Empty for anonymous members.
    pub name: String,
    pub ty: Type,
    pub bits: Option<u8>,
    pub at: Option<u64>,
}

impl Record {
    /// A struct without fields.
    pub fn new() -> Record {
        Record::default()
    }

    /// A union without fields.
    pub fn union() -> Record {
        Record { is_union: true, ..Record::default() }
    }

    fn push(mut self, name: &str, ty: Type, bits: Option<u8>, at: Option<u64>) -> Record {
        self.fields.push(Field { name: name.to_owned(), ty, bits, at });
        self
    }

    /// A field, aligned behind the one before.
    pub fn field(self, name: &str, ty: Type) -> Record {
        self.push(name, ty, None, None)
    }

    /// A field at a fixed offset: to leave room, as in the kernel's large structures.
    pub fn field_at(self, offset: u64, name: &str, ty: Type) -> Record {
        self.push(name, ty, None, Some(offset))
    }

    /// A bit-field, packed as the compiler does.
    pub fn bits(self, name: &str, ty: Type, bits: u8) -> Record {
        self.push(name, ty, Some(bits), None)
    }

    /// An anonymous struct or union.
    pub fn anonymous(self, record: Record) -> Record {
        self.push("", Type::Record(record), None, None)
    }

    /// Makes it at least so large.
    pub fn size(mut self, bytes: u64) -> Record {
        self.min_size = bytes;
        self
    }
}

/// An enum.
#[derive(Debug, Clone)]
pub(crate) struct Enum {
    pub values: Vec<(String, i64)>,
    pub is_64: bool,
}

/// What a name stands for.
#[derive(Debug, Clone)]
pub(crate) enum Named {
    Record(Record),
    Enum(Enum),
    Typedef(Type),
}

/// A field after layout.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub name: String,
    pub ty: Type,
    /// From the record's beginning.
    pub bit_offset: u64,
    pub bits: Option<u8>,
}

/// All declared types.
#[derive(Debug, Clone, Default)]
pub(crate) struct Types {
    pub names: BTreeMap<String, Named>,
}

impl Types {
    pub fn get(&self, name: &str) -> &Named {
        self.names.get(name).unwrap_or_else(|| panic!("synth: no type `{name}` is declared"))
    }

    /// Size and alignment in bytes.
    pub fn size_align(&self, ty: &Type) -> (u64, u64) {
        match ty {
            Type::Int(_, size, _) => (*size, *size),
            Type::Pointer => (8, 8),
            Type::Array(element, len) => {
                let (size, align) = self.size_align(element);
                (size * u64::from(*len), align)
            }
            Type::Const(inner) | Type::Volatile(inner) => self.size_align(inner),
            Type::Record(record) => {
                let (_, size, align) = self.place(record);
                (size, align)
            }
            Type::Named(name) => match self.get(name) {
                Named::Record(record) => {
                    let (_, size, align) = self.place(record);
                    (size, align)
                }
                Named::Enum(e) => {
                    if e.is_64 {
                        (8, 8)
                    } else {
                        (4, 4)
                    }
                }
                Named::Typedef(ty) => self.size_align(ty),
            },
        }
    }

    /// The fields with their places, the size and the alignment of a record.
    pub fn place(&self, record: &Record) -> (Vec<Placed>, u64, u64) {
        let mut placed = Vec::new();
        let (mut bit, mut end, mut align) = (0u64, 0u64, 1u64);
        for field in &record.fields {
            let (size, field_align) = self.size_align(&field.ty);
            align = align.max(field_align);
            if record.is_union {
                bit = 0;
            }
            if let Some(at) = field.at {
                assert!(record.is_union || at * 8 >= bit, "synth: `{}` overlaps", field.name);
                bit = at * 8;
            }
            let width = match field.bits {
                Some(bits) => {
                    // A bit-field does not cross a boundary of its type.
                    if bit / (size * 8) != (bit + u64::from(bits) - 1) / (size * 8) {
                        bit = bit.next_multiple_of(size * 8);
                    }
                    u64::from(bits)
                }
                None => {
                    bit = bit.next_multiple_of(field_align * 8);
                    size * 8
                }
            };
            placed.push(Placed {
                name: field.name.clone(),
                ty: field.ty.clone(),
                bit_offset: bit,
                bits: field.bits,
            });
            bit += width;
            end = end.max(bit);
        }
        let size = end.div_ceil(8).max(record.min_size).next_multiple_of(align);
        (placed, size, align)
    }

    /// Takes names and qualifiers off.
    fn resolve<'a>(&'a self, ty: &'a Type) -> &'a Type {
        match ty {
            Type::Const(inner) | Type::Volatile(inner) => self.resolve(inner),
            Type::Named(name) => match self.get(name) {
                Named::Typedef(inner) => self.resolve(inner),
                _ => ty,
            },
            _ => ty,
        }
    }

    fn record<'a>(&'a self, ty: &'a Type) -> Option<&'a Record> {
        match self.resolve(ty) {
            Type::Record(record) => Some(record),
            Type::Named(name) => match self.get(name) {
                Named::Record(record) => Some(record),
                _ => None,
            },
            _ => None,
        }
    }

    /// Bit offset, bit-field width and type of a member by its path.
    pub fn member(&self, type_name: &str, path: &str) -> (u64, Option<u8>, Type) {
        let mut at = (0, None, named(type_name));
        for part in path.split('.') {
            let (name, indices) = part.split_once('[').map_or((part, None), |(n, i)| (n, Some(i)));
            let found = self.record(&at.2).and_then(|record| self.direct(record, name));
            let Some((bit, bits, ty)) = found else {
                panic!("synth: `{type_name}` has no member `{path}`");
            };
            at = (at.0 + bit, bits, ty);
            for index in indices.into_iter().flat_map(|indices| indices.split('[')) {
                let index: u64 = index.trim_end_matches(']').parse().expect("synth: an index");
                let Type::Array(element, _) = self.resolve(&at.2).clone() else {
                    panic!("synth: `{path}` of `{type_name}` is not an array");
                };
                at = (at.0 + index * self.size_align(&element).0 * 8, None, *element);
            }
        }
        at
    }

    fn direct(&self, record: &Record, name: &str) -> Option<(u64, Option<u8>, Type)> {
        let (placed, ..) = self.place(record);
        if let Some(field) = placed.iter().find(|field| field.name == name) {
            return Some((field.bit_offset, field.bits, field.ty.clone()));
        }
        placed.iter().filter(|field| field.name.is_empty()).find_map(|field| {
            let (bit, bits, ty) = self.direct(self.record(&field.ty)?, name)?;
            Some((field.bit_offset + bit, bits, ty))
        })
    }
}
