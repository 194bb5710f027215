//! Hostile BTF: members, sizes and enumerators of damaged types.

#![no_main]

use std::sync::Arc;

use ktypes::Btf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    look(bytes, None);
    // With a header that fits: what follows it is types, then strings.
    let Some((split, rest)) = bytes.split_first() else { return };
    let types = usize::from(*split) * 4 % (rest.len() + 1);
    let whole = section(&rest[..types], &rest[types..]);
    if let Some(base) = look(&whole, None) {
        // A module's.
        look(&whole, Some(Arc::new(base)));
    }
});

fn section(types: &[u8], strings: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, types.len(), types.len(), strings.len()] {
        bytes.extend((word as u32).to_le_bytes());
    }
    bytes.extend(types);
    bytes.extend(strings);
    bytes
}

fn look(bytes: &[u8], base: Option<Arc<Btf>>) -> Option<Btf> {
    let btf = Btf::parse(bytes.to_vec(), base).ok()?;
    let names: Vec<String> = (0..64).filter_map(|id| btf.type_name(id).map(str::to_owned)).collect();
    for id in (0..64).chain([u32::MAX]) {
        _ = (btf.size(id), btf.array(id), btf.is_struct(id), btf.pointee(id), btf.strip(id));
        for path in ["a", "a.b", "a[0]", "a[1][2].b", "a[18446744073709551615]", "", ".", "a]["] {
            if let Some(member) = btf.member(id, path) {
                assert!(member.bits.is_none_or(|(first, bits)| bits <= 64 && first < 8 && member.size <= 8));
            }
        }
        for name in &names {
            _ = btf.member(id, name);
        }
    }
    for name in names.iter().map(String::as_str).chain(["a"]) {
        _ = (btf.find_struct(name), btf.find_type(name), btf.enumerator(name), btf.enumerator_in(name, "a"));
    }
    Some(btf)
}
