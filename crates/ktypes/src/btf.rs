//! BTF, the kernel's own description of its types (Documentation/bpf/btf.rst).
//!
//! **In:** the bytes between `__start_BTF` and `__stop_BTF`, or a module's. **Out:** members'
//! offsets and sizes, type sizes, enumerators. Nothing in the bytes is trusted: types are looked
//! at through bounds checks, and following them is limited in depth and number.

use std::sync::{Arc, OnceLock};

use vmcore::PhysMap;

use crate::{Error, Result};

const MAGIC: u16 = 0xeb9f;
const HEADER_LEN: usize = 24;
/// How deep typedefs, modifiers and arrays may be nested.
const MAX_DEPTH: usize = 32;
/// How many anonymous members a search may go through.
const MAX_ANONYMOUS: usize = 4096;

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;
const KIND_FWD: u32 = 7;

/// How many types of one name are told apart: more are a sign of damage, and would take long.
const MAX_PROBES: usize = 1024;

/// A type's number within a [`Btf`]; 0 is `void`.
pub type TypeId = u32;

/// A parsed BTF section with an index of its names.
pub struct Btf {
    data: Bytes,
    /// Start of each type's record in `data`; index 0 is type `first_id`.
    types: Vec<u32>,
    strings: std::ops::Range<usize>,
    names: NameTable,
    /// Starts of the enums' records.
    enums: Vec<u32>,
    /// The enumerators of all enums; made when first asked for.
    enumerators: OnceLock<Enumerators>,
    first_id: TypeId,
    first_string: u32,
    base: Option<Arc<Btf>>,
}

/// All enumerators by name.
#[derive(Default)]
struct Enumerators {
    /// Start of the enum's record, and of the enumerator's name in the strings.
    all: Vec<(u32, u32)>,
    /// Positions in `all`, plus one.
    names: NameTable,
}

/// The section's bytes. The kernel's own are some 5 MiB in one piece: they are not copied.
enum Bytes {
    Owned(Vec<u8>),
    Mapped(PhysMap<'static>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Owned(bytes) => bytes,
            Bytes::Mapped(bytes) => bytes,
        }
    }
}

/// Where a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the start of the structure; for a bit-field, of the byte that holds its first bit.
    pub offset: u64,
    /// Its size in bytes; for a bit-field, of the bytes that it touches; 0 for flexible arrays.
    pub size: u64,
    /// First bit within the byte, and number of bits, for bit-fields.
    pub bits: Option<(u8, u8)>,
    /// Its type, with typedefs and modifiers taken off.
    pub type_id: TypeId,
}

/// One record, decoded.
#[derive(Debug, Clone, Copy)]
struct Record {
    name: u32,
    info: u32,
    /// Size in bytes or type, by kind.
    size_or_type: u32,
    /// Where what follows the 12 common bytes begins.
    tail: usize,
}

impl Record {
    fn kind(&self) -> u32 {
        self.info >> 24 & 0x1f
    }
    fn vlen(&self) -> usize {
        (self.info & 0xffff) as usize
    }
    /// The info's flag: members have bit-field sizes, or enumerators are signed.
    fn flag(&self) -> bool {
        self.info >> 31 != 0
    }
    fn is_struct(&self) -> bool {
        matches!(self.kind(), KIND_STRUCT | KIND_UNION)
    }
}

impl Btf {
    /// Parses a section, and indexes it. A module's BTF continues the types and strings of `base`.
    pub fn parse(data: Vec<u8>, base: Option<Arc<Btf>>) -> Result<Btf> {
        Btf::parse_bytes(Bytes::Owned(data), base)
    }

    /// The same of bytes that stay where they are, in the core.
    pub(crate) fn parse_mapped(data: PhysMap<'static>) -> Result<Btf> {
        Btf::parse_bytes(Bytes::Mapped(data), None)
    }

    fn parse_bytes(data: Bytes, base: Option<Arc<Btf>>) -> Result<Btf> {
        let bad = |why: &str| Error::BadBtf(why.into());
        let u32_at = |at: usize| -> Option<usize> {
            Some(u32::from_le_bytes(*data.get(at..)?.first_chunk()?) as usize)
        };
        let magic = data.first_chunk::<2>().map(|m| u16::from_le_bytes(*m));
        if magic != Some(MAGIC) {
            return Err(bad("no BTF magic"));
        }
        if data.get(2) != Some(&1) {
            return Err(bad("unknown BTF version"));
        }
        let field = |at| u32_at(at).ok_or_else(|| bad("header cut off"));
        let header = field(4)?;
        if header < HEADER_LEN {
            return Err(bad("header too short"));
        }
        let section = |offset: usize, len: usize| {
            let start = header.checked_add(offset)?;
            let end = start.checked_add(len)?;
            (end <= data.len()).then_some(start..end)
        };
        let types = section(field(8)?, field(12)?).ok_or_else(|| bad("types outside"))?;
        let strings = section(field(16)?, field(20)?).ok_or_else(|| bad("strings outside"))?;
        if data.len() > u32::MAX as usize {
            return Err(bad("too large"));
        }

        let (first_id, first_string) = match &base {
            Some(base) => (base.end_id(), base.strings.len() as u32 + base.first_string),
            None => (1, 0),
        };
        let mut btf = Btf {
            // A record and its name take some 30 bytes on average.
            types: Vec::with_capacity(types.len() / 24),
            names: NameTable::default(),
            enums: Vec::new(),
            enumerators: OnceLock::new(),
            strings,
            first_id,
            first_string,
            base,
            data,
        };
        let mut at = types.start;
        let mut named = Vec::new();
        while at < types.end {
            let record = btf.record(at).ok_or_else(|| bad("type cut off"))?;
            let vlen = record.vlen();
            let tail = match record.kind() {
                KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                KIND_ARRAY => 12,
                KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * vlen,
                KIND_ENUM | KIND_FUNC_PROTO => 8 * vlen,
                KIND_PTR | KIND_FWD | KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT
                | KIND_FUNC | KIND_FLOAT | KIND_TYPE_TAG => 0,
                kind => return Err(Error::BadBtf(format!("type of unknown kind {kind}"))),
            };
            let id = first_id + btf.types.len() as u32;
            btf.types.push(at as u32);
            if matches!(record.kind(), KIND_ENUM | KIND_ENUM64) {
                btf.enums.push(at as u32);
            }
            let lookup = matches!(
                record.kind(),
                KIND_STRUCT | KIND_UNION | KIND_ENUM | KIND_ENUM64 | KIND_TYPEDEF | KIND_INT
            );
            if lookup && record.name != 0 {
                named.push(id);
            }
            at = record.tail + tail;
            if at > types.end {
                return Err(bad("type cut off"));
            }
        }
        let mut names = NameTable::with_capacity(named.len());
        for id in named {
            let name = btf.name(id);
            names.insert(hash(name), id);
        }
        btf.names = names;
        Ok(btf)
    }

    /// The first number that is no type of this section nor of its base.
    fn end_id(&self) -> TypeId {
        self.first_id + self.types.len() as u32
    }

    /// How many types there are, those of the base not counted.
    pub fn len(&self) -> usize {
        self.types.len()
    }

    /// Whether there is no type at all.
    pub fn is_empty(&self) -> bool {
        self.types.is_empty()
    }

    fn record(&self, at: usize) -> Option<Record> {
        let bytes: &[u8; 12] = self.data.get(at..)?.first_chunk()?;
        let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        Some(Record { name: word(0), info: word(4), size_or_type: word(8), tail: at + 12 })
    }

    /// The section that holds a type, and the type's record.
    fn get(&self, id: TypeId) -> Option<(&Btf, Record)> {
        if id < self.first_id {
            return self.base.as_ref()?.get(id);
        }
        let at = *self.types.get((id - self.first_id) as usize)?;
        Some((self, self.record(at as usize)?))
    }

    fn string(&self, offset: u32) -> &[u8] {
        if offset < self.first_string {
            return self.base.as_ref().map_or(b"", |base| base.string(offset));
        }
        let strings = &self.data[self.strings.clone()];
        let tail = strings.get((offset - self.first_string) as usize..).unwrap_or_default();
        match tail.iter().position(|byte| *byte == 0) {
            Some(end) => &tail[..end],
            None => b"",
        }
    }

    fn name(&self, id: TypeId) -> &[u8] {
        self.get(id).map_or(b"", |(home, record)| home.string(record.name))
    }

    fn word(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(*self.data.get(at..)?.first_chunk()?))
    }

    fn find_kind(&self, name: &str, matches: impl Fn(&Record) -> bool) -> Option<TypeId> {
        let own = self.names.find(hash(name.as_bytes()), |id| {
            self.get(id)
                .is_some_and(|(home, record)| matches(&record) && home.string(record.name) == name.as_bytes())
        });
        own.or_else(|| self.base.as_ref()?.find_kind(name, matches))
    }

    /// The struct or union of that name, or else what a typedef of that name stands for.
    pub fn find_struct(&self, name: &str) -> Option<TypeId> {
        self.find_kind(name, Record::is_struct)
            .or_else(|| self.find_kind(name, |record| record.kind() == KIND_TYPEDEF))
            .map(|id| self.strip(id))
    }

    /// Any type of that name that has a size.
    pub fn find_type(&self, name: &str) -> Option<TypeId> {
        self.find_struct(name).or_else(|| self.find_kind(name, |_| true))
    }

    /// Takes typedefs, const, volatile, restrict and tags off.
    pub fn strip(&self, mut id: TypeId) -> TypeId {
        for _ in 0..MAX_DEPTH {
            match self.get(id) {
                Some((_, record))
                    if matches!(
                        record.kind(),
                        KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG
                    ) =>
                {
                    id = record.size_or_type;
                }
                _ => return id,
            }
        }
        0
    }

    /// The size of a type in bytes; `None` for functions, `void` and damaged types.
    pub fn size(&self, id: TypeId) -> Option<u64> {
        let mut id = id;
        let mut factor = 1u64;
        for _ in 0..MAX_DEPTH {
            let (home, record) = self.get(self.strip(id))?;
            let size = match record.kind() {
                KIND_INT | KIND_STRUCT | KIND_UNION | KIND_ENUM | KIND_ENUM64 | KIND_FLOAT => {
                    u64::from(record.size_or_type)
                }
                KIND_PTR => 8,
                KIND_ARRAY => {
                    id = home.word(record.tail)?;
                    factor = factor.checked_mul(u64::from(home.word(record.tail + 8)?))?;
                    continue;
                }
                _ => return None,
            };
            return size.checked_mul(factor);
        }
        None
    }

    /// Number of elements and the elements' type, if it is an array.
    pub fn array(&self, id: TypeId) -> Option<(u64, TypeId)> {
        let (home, record) = self.get(self.strip(id))?;
        (record.kind() == KIND_ARRAY)
            .then(|| Some((u64::from(home.word(record.tail + 8)?), home.word(record.tail)?)))?
    }

    /// Whether it is a struct or union.
    pub fn is_struct(&self, id: TypeId) -> bool {
        self.get(self.strip(id)).is_some_and(|(_, record)| record.is_struct())
    }

    /// What a pointer points to, if it is one.
    pub fn pointee(&self, id: TypeId) -> Option<TypeId> {
        let (_, record) = self.get(self.strip(id))?;
        (record.kind() == KIND_PTR).then_some(record.size_or_type)
    }

    /// The type's own name, if it has one.
    pub fn type_name(&self, id: TypeId) -> Option<&str> {
        std::str::from_utf8(self.name(id)).ok().filter(|name| !name.is_empty())
    }

    /// Finds a member by a path such as `thread.fpu`, `numbers[0].nr`: through anonymous structs
    /// and unions, embedded structs, and elements of arrays.
    pub fn member(&self, type_id: TypeId, path: &str) -> Option<Member> {
        let mut at = Member { offset: 0, size: self.size(type_id)?, bits: None, type_id };
        for part in path.split('.') {
            let (name, indices) = match part.split_once('[') {
                Some((name, indices)) => (name, Some(indices)),
                None => (part, None),
            };
            if at.bits.is_some() || name.is_empty() {
                return None;
            }
            let mut budget = MAX_ANONYMOUS;
            let found = self.direct_member(at.type_id, name, &mut budget, 0)?;
            at = Member { offset: at.offset.checked_add(found.offset)?, ..found };
            // What follows the first `[` is `1]` or `1][2]`.
            for index in indices.into_iter().flat_map(|indices| indices.split('[')) {
                let index: u64 = index.strip_suffix(']')?.parse().ok()?;
                let (len, element) = self.array(at.type_id)?;
                let size = self.size(element)?;
                // A flexible array has no length of its own.
                if len != 0 && index >= len {
                    return None;
                }
                at.offset = at.offset.checked_add(index.checked_mul(size)?)?;
                at.size = size;
                at.type_id = self.strip(element);
            }
        }
        Some(at)
    }

    fn direct_member(&self, id: TypeId, wanted: &str, budget: &mut usize, depth: usize) -> Option<Member> {
        let (home, record) = self.get(self.strip(id))?;
        if !record.is_struct() || depth > MAX_DEPTH {
            return None;
        }
        let members = (0..record.vlen()).map(|i| record.tail + 12 * i);
        for at in members.clone() {
            if home.string(home.word(at)?) == wanted.as_bytes() {
                let (bit, bits) = home.member_bits(&record, at)?;
                return self.describe(home.word(at + 4)?, bit, bits);
            }
        }
        for at in members {
            if !home.string(home.word(at)?).is_empty() {
                continue;
            }
            *budget = budget.checked_sub(1)?;
            let (bit, _) = home.member_bits(&record, at)?;
            if let Some(found) = self.direct_member(home.word(at + 4)?, wanted, budget, depth + 1) {
                return Some(Member { offset: found.offset.checked_add(bit / 8)?, ..found });
            }
        }
        None
    }

    /// Bit offset of a member, and its size in bits if it is a bit-field.
    fn member_bits(&self, record: &Record, at: usize) -> Option<(u64, u8)> {
        let word = self.word(at + 8)?;
        Some(match record.flag() {
            true => (u64::from(word & 0xff_ffff), (word >> 24) as u8),
            false => (u64::from(word), 0),
        })
    }

    fn describe(&self, type_id: TypeId, bit: u64, bits: u8) -> Option<Member> {
        let type_id = self.strip(type_id);
        let first_bit = (bit % 8) as u8;
        if bits != 0 || first_bit != 0 {
            let bits =
                if bits != 0 { bits } else { u8::try_from(self.size(type_id)?.checked_mul(8)?).ok()? };
            let size = (u64::from(first_bit) + u64::from(bits)).div_ceil(8);
            return ((1..=64).contains(&bits) && size <= 8).then_some(Member {
                offset: bit / 8,
                size,
                bits: Some((first_bit, bits)),
                type_id,
            });
        }
        Some(Member { offset: bit / 8, size: self.size(type_id)?, bits: None, type_id })
    }

    /// The value of an enumerator of the enum of that name. Quick.
    pub fn enumerator_in(&self, enum_name: &str, name: &str) -> Option<i64> {
        let mut value = None;
        let own = self.names.find(hash(enum_name.as_bytes()), |id| {
            let Some((home, record)) = self.get(id) else { return false };
            if home.string(record.name) == enum_name.as_bytes() {
                value = home.enumerator_of(&record, name);
            }
            value.is_some()
        });
        own.and(value).or_else(|| self.base.as_ref()?.enumerator_in(enum_name, name))
    }

    /// The value of an enumerator of any enum; of several of that name, of the first. Quick from the second time on.
    pub fn enumerator(&self, name: &str) -> Option<i64> {
        let enumerators = self.enumerators.get_or_init(|| self.all_enumerators());
        let of = |index: u32| enumerators.all.get(index as usize - 1);
        let own = enumerators
            .names
            .find(hash(name.as_bytes()), |index| {
                of(index).is_some_and(|(_, text)| self.string(*text) == name.as_bytes())
            })
            .and_then(of)
            .and_then(|(at, _)| self.enumerator_of(&self.record(*at as usize)?, name));
        own.or_else(|| self.base.as_ref()?.enumerator(name))
    }

    fn all_enumerators(&self) -> Enumerators {
        let mut all = Vec::new();
        for at in &self.enums {
            let Some(record) = self.record(*at as usize) else { continue };
            let width = if record.kind() == KIND_ENUM64 { 12 } else { 8 };
            let texts = (0..record.vlen()).map_while(|i| self.word(record.tail + width * i));
            all.extend(texts.map(|text| (*at, text)));
        }
        let mut names = NameTable::with_capacity(all.len());
        for (index, (_, text)) in all.iter().enumerate() {
            names.insert(hash(self.string(*text)), index as u32 + 1);
        }
        Enumerators { all, names }
    }

    fn enumerator_of(&self, record: &Record, name: &str) -> Option<i64> {
        let (width, is_64) = match record.kind() {
            KIND_ENUM => (8, false),
            KIND_ENUM64 => (12, true),
            _ => return None,
        };
        let at = (0..record.vlen())
            .map(|i| record.tail + width * i)
            .find(|at| self.word(*at).is_some_and(|offset| self.string(offset) == name.as_bytes()))?;
        let low = self.word(at + 4)?;
        Some(match (is_64, record.flag()) {
            (true, _) => (u64::from(self.word(at + 8)?) << 32 | u64::from(low)) as i64,
            (false, true) => i64::from(low as i32),
            // Compilers' tools before 2022 did not set the flag for signed enums; the enums that
            // are read here are small and positive.
            (false, false) => i64::from(low),
        })
    }
}

impl std::fmt::Debug for Btf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Btf({} types from {})", self.types.len(), self.first_id)
    }
}

/// FNV-1a with a final mix: names are short, and the table checks the name itself.
pub(crate) fn hash(name: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in name {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    hash ^ hash >> 29
}

/// Open-addressing table from a name's hash to numbers (of types, for one); 0 marks a free slot.
#[derive(Default)]
pub(crate) struct NameTable {
    slots: Vec<u32>,
}

impl NameTable {
    pub fn with_capacity(names: usize) -> NameTable {
        NameTable { slots: vec![0; (names * 2).next_power_of_two().max(16)] }
    }

    pub fn insert(&mut self, hash: u64, id: u32) {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        for _ in 0..MAX_PROBES {
            if self.slots[at] == 0 {
                self.slots[at] = id;
                return;
            }
            at = (at + 1) & mask;
        }
    }

    pub fn find(&self, hash: u64, mut matches: impl FnMut(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len().checked_sub(1)?;
        let mut at = hash as usize & mask;
        while self.slots[at] != 0 {
            if matches(self.slots[at]) {
                return Some(self.slots[at]);
            }
            at = (at + 1) & mask;
        }
        None
    }
}
