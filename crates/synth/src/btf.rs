//! Writes BTF for declared types (Documentation/bpf/btf.rst).

use std::collections::HashMap;

use crate::types::{Named, Record, Type, Types};

/// The bytes of a BTF section.
pub(crate) fn encode(types: &Types) -> Vec<u8> {
    let mut writer = Writer {
        types,
        records: vec![Vec::new(); types.names.len()],
        ids: HashMap::new(),
        strings: vec![0],
        offsets: HashMap::new(),
    };
    for (i, (name, declared)) in types.names.iter().enumerate() {
        let record = match declared {
            Named::Record(record) => writer.record(name, record),
            Named::Typedef(ty) => {
                let id = writer.id(ty);
                writer.common(name, 8 << 24, id)
            }
            Named::Enum(e) => {
                let signed = e.values.iter().any(|(_, value)| *value < 0);
                let (kind, size) = if e.is_64 { (19, 8) } else { (6, 4) };
                let info = kind << 24 | u32::from(signed) << 31 | e.values.len() as u32;
                let mut bytes = writer.common(name, info, size);
                for (name, value) in &e.values {
                    bytes.extend(writer.string(name).to_le_bytes());
                    let value = value.to_le_bytes();
                    bytes.extend(if e.is_64 { &value[..] } else { &value[..4] });
                }
                bytes
            }
        };
        writer.records[i] = record;
    }
    let records = writer.records.concat();
    let mut bytes = Vec::new();
    bytes.extend(0xeb9fu16.to_le_bytes());
    bytes.extend([1, 0]);
    for word in [24, 0, records.len(), records.len(), writer.strings.len()] {
        bytes.extend((word as u32).to_le_bytes());
    }
    bytes.extend(records);
    bytes.extend(writer.strings);
    bytes
}

struct Writer<'a> {
    types: &'a Types,
    /// Record of type i + 1; those of named types come first, in the order of their names.
    records: Vec<Vec<u8>>,
    ids: HashMap<Type, u32>,
    strings: Vec<u8>,
    offsets: HashMap<String, u32>,
}

impl Writer<'_> {
    fn string(&mut self, string: &str) -> u32 {
        if string.is_empty() {
            return 0;
        }
        if let Some(offset) = self.offsets.get(string) {
            return *offset;
        }
        let offset = self.strings.len() as u32;
        self.strings.extend(string.as_bytes());
        self.strings.push(0);
        self.offsets.insert(string.to_owned(), offset);
        offset
    }

    fn common(&mut self, name: &str, info: u32, size_or_type: u32) -> Vec<u8> {
        let name = self.string(name);
        [name, info, size_or_type].iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn record(&mut self, name: &str, record: &Record) -> Vec<u8> {
        let (fields, size, _) = self.types.place(record);
        let has_bits = fields.iter().any(|field| field.bits.is_some());
        let kind = if record.is_union { 5 } else { 4 };
        let info = kind << 24 | u32::from(has_bits) << 31 | fields.len() as u32;
        let mut bytes = self.common(name, info, size as u32);
        for field in fields {
            let name = self.string(&field.name);
            let id = self.id(&field.ty);
            let bits = field.bits.map_or(0, u32::from);
            for word in [name, id, bits << 24 | field.bit_offset as u32] {
                bytes.extend(word.to_le_bytes());
            }
        }
        bytes
    }

    fn id(&mut self, ty: &Type) -> u32 {
        if let Type::Named(name) = ty {
            let index = self.types.names.keys().position(|known| known == name);
            return index.unwrap_or_else(|| panic!("synth: no type `{name}` is declared")) as u32 + 1;
        }
        if let Some(id) = self.ids.get(ty) {
            return *id;
        }
        let bytes = match ty {
            Type::Int(name, size, signed) => {
                let mut bytes = self.common(name, 1 << 24, *size as u32);
                let encoding = u32::from(*signed) | u32::from(*name == "_Bool") << 2;
                bytes.extend(((encoding << 24) | ((*size as u32) * 8)).to_le_bytes());
                bytes
            }
            Type::Pointer => self.common("", 2 << 24, 0),
            Type::Array(element, len) => {
                let element = self.id(element);
                let index = self.id(&crate::U32);
                let mut bytes = self.common("", 3 << 24, 0);
                for word in [element, index, *len] {
                    bytes.extend(word.to_le_bytes());
                }
                bytes
            }
            Type::Const(inner) => {
                let inner = self.id(inner);
                self.common("", 10 << 24, inner)
            }
            Type::Volatile(inner) => {
                let inner = self.id(inner);
                self.common("", 9 << 24, inner)
            }
            Type::Record(record) => self.record("", record),
            Type::Named(_) => unreachable!("handled above"),
        };
        self.records.push(bytes);
        let id = self.records.len() as u32;
        self.ids.insert(ty.clone(), id);
        id
    }
}
