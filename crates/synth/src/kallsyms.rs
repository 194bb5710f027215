//! Writes kallsyms tables (the format of scripts/kallsyms.c).

/// The tables, each to be stored somewhere in the image.
pub(crate) struct Tables {
    pub names: Vec<u8>,
    pub token_table: Vec<u8>,
    pub token_index: Vec<u8>,
    pub offsets: Vec<u8>,
    pub count: u32,
}

/// Tokens of more than one character, in place of bytes that do not occur in UTF-8.
const FIRST_TOKEN: u8 = 0xf8;
const TOKENS: [&str; 6] = ["init", "task", "_struct", "kernel_", "__", "sys_"];

/// `symbols` are (name, type, address); addresses at or above `base` are written relative to it,
/// others (per-CPU offsets) absolute.
pub(crate) fn encode(symbols: &[(String, char, u64)], base: u64) -> Tables {
    let mut symbols = symbols.to_vec();
    symbols.sort_by_key(|(_, _, addr)| *addr);
    let mut token_table = Vec::new();
    let mut token_index = Vec::new();
    for byte in 0..=255u8 {
        token_index.extend((token_table.len() as u16).to_le_bytes());
        match TOKENS.get(usize::from(byte.wrapping_sub(FIRST_TOKEN))) {
            Some(token) if byte >= FIRST_TOKEN => token_table.extend(token.as_bytes()),
            _ if byte != 0 => token_table.push(byte),
            _ => {}
        }
        token_table.push(0);
    }
    let mut names = Vec::new();
    let mut offsets = Vec::new();
    for (name, kind, addr) in &symbols {
        let name = compress(&format!("{kind}{name}"));
        match name.len() {
            len @ ..=0x7f => names.push(len as u8),
            len => names.extend([0x80 | (len & 0x7f) as u8, (len >> 7) as u8]),
        }
        names.extend(name);
        let offset = match *addr >= base {
            true => (base as i64 - 1 - *addr as i64) as i32,
            false => i32::try_from(*addr).expect("synth: an absolute symbol is a small number"),
        };
        offsets.extend(offset.to_le_bytes());
    }
    Tables { names, token_table, token_index, offsets, count: symbols.len() as u32 }
}

fn compress(name: &str) -> Vec<u8> {
    let mut rest = name.as_bytes();
    let mut bytes = Vec::new();
    while let Some((first, tail)) = rest.split_first() {
        match TOKENS.iter().position(|token| rest.starts_with(token.as_bytes())) {
            Some(token) => {
                bytes.push(FIRST_TOKEN + token as u8);
                rest = &rest[TOKENS[token].len()..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}
