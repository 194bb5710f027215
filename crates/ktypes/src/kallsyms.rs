//! The kernel's symbol table (scripts/kallsyms.c, kernel/kallsyms.c; 6.0 to 6.12).
//!
//! **In:** the tables that vmcoreinfo names. **Out:** addresses by name and names by address.
//!
//! The names are compressed: each is a string of tokens, each token one byte that stands for some
//! characters, the first of which (of the first token) is the symbol's type. 155,000 names must
//! be ready within a few milliseconds, so they are not expanded at all: a polynomial hash of
//! a name is put together from the hashes of its tokens, and only what is asked for is expanded,
//! 32 symbols at a time.

use std::sync::OnceLock;

/// More symbols than this are not a symbol table (Debian has 155,000).
const MAX_SYMBOLS: usize = 4 << 20;
/// KSYM_NAME_LEN is 512; the type's character comes on top.
const MAX_NAME: usize = 1024;
/// How many symbols are expanded at a time.
const BLOCK: usize = 32;
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// The raw tables.
pub(crate) struct Tables {
    /// `kallsyms_names`; may be longer than the names are.
    pub names: Vec<u8>,
    /// `kallsyms_token_table`; may be longer.
    pub token_table: Vec<u8>,
    /// `kallsyms_token_index`: 256 offsets into the token table.
    pub token_index: Vec<u16>,
    /// Address of each symbol, in the order of the names.
    pub addresses: Vec<u64>,
}

/// A symbol table.
pub(crate) struct Kallsyms {
    names: Vec<u8>,
    tokens: [Token; 256],
    token_text: Vec<u8>,
    /// In the order of the table.
    addresses: Vec<u64>,
    /// The table's indices by address, if the table is not sorted by address itself.
    by_address: Option<Vec<u32>>,
    /// Where in `names` each block of symbols begins.
    blocks: Vec<(u32, OnceLock<Block>)>,
    hashes: Vec<u64>,
    /// Index into the table plus one; 0 marks a free slot.
    slots: Vec<u32>,
}

/// Where the characters of a token are in the token table.
#[derive(Clone, Copy, Default)]
struct Token {
    start: u32,
    len: u32,
}

/// Names of a block of symbols, one behind the other, each with its type in front.
struct Block {
    text: String,
    ends: Vec<u32>,
}

impl Kallsyms {
    pub fn new(tables: Tables) -> Result<Kallsyms, String> {
        let count = tables.addresses.len();
        if count == 0 || count > MAX_SYMBOLS {
            return Err(format!("{count} symbols"));
        }
        let token_index: [u16; 256] =
            tables.token_index.try_into().map_err(|index: Vec<u16>| format!("{} tokens", index.len()))?;
        let mut tokens = [Token::default(); 256];
        // What a token does to the hash of the characters before it, and what one that begins
        // a name (its first character is the symbol's type) contributes.
        let mut steps = [(0u64, 0u64); 256];
        let mut heads = [0u64; 256];
        for (i, start) in token_index.into_iter().enumerate() {
            let tail = tables.token_table.get(usize::from(start)..).unwrap_or_default();
            let len = tail.iter().position(|byte| *byte == 0).ok_or("a token is cut off")?;
            tokens[i] = Token { start: u32::from(start), len: len as u32 };
            let power = (0..len).fold(1u64, |power, _| power.wrapping_mul(FACTOR));
            steps[i] = (power, tail[..len].iter().fold(0, |hash, byte| step(hash, *byte)));
            heads[i] = tail[..len].iter().skip(1).fold(0, |hash, byte| step(hash, *byte));
        }

        // At least one slot stays free: lookups end there.
        let mask = (count * 3 / 2 + 1).next_power_of_two() - 1;
        let mut hashes = vec![0u64; mask + 1];
        let mut slots = vec![0u32; mask + 1];
        let mut blocks = Vec::with_capacity(count.div_ceil(BLOCK));
        let names = &tables.names;
        let mut at = 0;
        for index in 0..count {
            if index % BLOCK == 0 {
                blocks.push((at as u32, OnceLock::new()));
            }
            let (start, len) = compressed(names, at).ok_or("the names are cut off")?;
            let (head, tail) = names[start..start + len].split_first().ok_or("an empty name")?;
            let hash = tail.iter().fold(heads[usize::from(*head)], |hash, byte| {
                let (power, add) = steps[usize::from(*byte)];
                hash.wrapping_mul(power).wrapping_add(add)
            });
            at = start + len;
            // The first of several symbols of one name is the one that is found.
            let mut slot = place(hash) & mask;
            while slots[slot] != 0 && hashes[slot] != hash {
                slot = (slot + 1) & mask;
            }
            if slots[slot] == 0 {
                slots[slot] = index as u32 + 1;
                hashes[slot] = hash;
            }
        }
        let by_address = (!tables.addresses.is_sorted()).then(|| {
            let mut order: Vec<u32> = (0..count as u32).collect();
            order.sort_by_key(|index| tables.addresses[*index as usize]);
            order
        });
        let mut names = tables.names;
        names.truncate(at);
        Ok(Kallsyms {
            names,
            tokens,
            token_text: tables.token_table,
            addresses: tables.addresses,
            by_address,
            blocks,
            hashes,
            slots,
        })
    }

    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    pub fn lookup(&self, name: &str) -> Option<u64> {
        let hash = name.bytes().fold(0, step);
        let mask = self.slots.len() - 1;
        let mut slot = place(hash) & mask;
        while self.slots[slot] != 0 {
            if self.hashes[slot] == hash {
                let index = self.slots[slot] as usize - 1;
                return (self.name(index).0 == name).then(|| self.addresses[index]);
            }
            slot = (slot + 1) & mask;
        }
        None
    }

    /// A symbol's name, and its type as in nm(1).
    pub fn name(&self, index: usize) -> (&str, u8) {
        let (start, block) = &self.blocks[index / BLOCK];
        let block = block.get_or_init(|| self.expand(*start as usize));
        let i = index % BLOCK;
        let begin = if i == 0 { 0 } else { block.ends[i - 1] } as usize;
        let text = &block.text[begin..block.ends[i] as usize];
        match text.chars().next() {
            Some(first) => (&text[first.len_utf8()..], first as u32 as u8),
            None => ("", b'?'),
        }
    }

    fn expand(&self, mut at: usize) -> Block {
        let mut block = Block { text: String::with_capacity(BLOCK * 24), ends: Vec::new() };
        for _ in 0..BLOCK {
            let mut name: Vec<u8> = Vec::with_capacity(64);
            if let Some((start, len)) = compressed(&self.names, at) {
                for byte in &self.names[start..start + len] {
                    let token = &self.tokens[usize::from(*byte)];
                    let text = &self.token_text[token.start as usize..][..token.len as usize];
                    if name.len() < MAX_NAME {
                        name.extend_from_slice(text);
                    }
                }
                at = start + len;
            }
            block.text.push_str(&String::from_utf8_lossy(&name));
            block.ends.push(block.text.len() as u32);
        }
        block
    }

    fn index_at(&self, position: usize) -> usize {
        match &self.by_address {
            Some(order) => order[position] as usize,
            None => position,
        }
    }

    /// Positions (in order of addresses) of the symbols at or below an address.
    fn up_to(&self, addr: u64) -> usize {
        match &self.by_address {
            Some(order) => order.partition_point(|i| self.addresses[*i as usize] <= addr),
            None => self.addresses.partition_point(|a| *a <= addr),
        }
    }

    /// All names at exactly this address.
    pub fn names_at(&self, addr: u64) -> impl Iterator<Item = (&str, u8)> {
        let end = self.up_to(addr);
        let start = addr.checked_sub(1).map_or(0, |below| self.up_to(below));
        (start..end).map(|position| self.name(self.index_at(position)))
    }

    /// The best name at exactly this address: global before local, without leading underscores
    /// before with, then the first in the table.
    pub fn best_at(&self, addr: u64) -> Option<&str> {
        self.names_at(addr)
            .min_by_key(|(name, kind)| (!kind.is_ascii_uppercase(), name.starts_with("__")))
            .map(|(name, _)| name)
    }

    /// The highest address of a symbol at or below `addr`.
    pub fn below(&self, addr: u64) -> Option<u64> {
        let position = self.up_to(addr).checked_sub(1)?;
        Some(self.addresses[self.index_at(position)])
    }
}

impl std::fmt::Debug for Kallsyms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kallsyms({} symbols)", self.len())
    }
}

/// Where the compressed name at `at` begins and how long it is. The length has one byte, or two
/// if bit 7 of the first is set (since 6.1).
fn compressed(names: &[u8], at: usize) -> Option<(usize, usize)> {
    let low = usize::from(*names.get(at)?);
    let (start, len) = match low & 0x80 {
        0 => (at + 1, low),
        _ => (at + 2, low & 0x7f | usize::from(*names.get(at + 1)?) << 7),
    };
    (start + len <= names.len()).then_some((start, len))
}

fn step(hash: u64, byte: u8) -> u64 {
    hash.wrapping_mul(FACTOR).wrapping_add(u64::from(byte) + 1)
}

/// The upper half of the hash is the better mixed one.
fn place(hash: u64) -> usize {
    (hash ^ hash >> 32).wrapping_mul(FACTOR) as usize >> 20
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of these names, each byte a token of its own.
    fn table(symbols: &[(&str, u64)]) -> Kallsyms {
        let token_table = (0..=255).flat_map(|byte: u8| [byte, 0]).collect();
        let token_index = (0..256).map(|i| i * 2).collect();
        let name = |(name, _): &(&str, u64)| [&[name.len() as u8 + 1, b'T'], name.as_bytes()].concat();
        let names = symbols.iter().flat_map(name).collect();
        let addresses = symbols.iter().map(|(_, addr)| *addr).collect();
        Kallsyms::new(Tables { names, token_table, token_index, addresses }).unwrap()
    }

    #[test]
    fn lookups_in_a_table_of_one_symbol_end() {
        let symbols = table(&[("panic", 0x1000)]);
        assert_eq!(symbols.lookup("panic"), Some(0x1000));
        // Wherever the search begins.
        for i in 0..64 {
            assert_eq!(symbols.lookup(&format!("function_{i}")), None);
        }
        assert_eq!(
            (symbols.lookup(""), symbols.lookup("pani"), symbols.lookup("Tpanic")),
            (None, None, None)
        );
        assert_eq!(symbols.best_at(0x1000), Some("panic"));
        assert_eq!((symbols.below(0x1fff), symbols.below(0xfff)), (Some(0x1000), None));
    }

    #[test]
    fn lookups_in_small_tables_end() {
        let names: Vec<String> = (0..20).map(|i| format!("symbol_{i}")).collect();
        for count in 1..=names.len() {
            let entries: Vec<(&str, u64)> =
                names[..count].iter().zip(0..).map(|(name, i)| (name.as_str(), i * 16)).collect();
            let symbols = table(&entries);
            for (name, addr) in &entries {
                assert_eq!(symbols.lookup(name), Some(*addr), "{name} of {count}");
            }
            for i in 0..64 {
                assert_eq!(symbols.lookup(&format!("function_{i}")), None, "of {count}");
            }
        }
    }
}
