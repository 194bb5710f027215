//! Shell patterns, as `modules.alias` uses them: `*`, `?`, `[…]`.

/// Whether `text` fits `pattern` as a whole.
pub(crate) fn fnmatch(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where to go on when the last `*` has to take one more byte.
    let mut retry = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            retry = Some((p + 1, t));
            p += 1;
        } else if let Some(width) = one(&pattern[p..], text[t]) {
            p += width;
            t += 1;
        } else if let Some((after_star, taken)) = retry {
            retry = Some((after_star, taken + 1));
            (p, t) = (after_star, taken + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&b| b == b'*')
}

/// Length of the pattern's first element if it fits the byte.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match *pattern.first()? {
        b'?' => Some(1),
        b'[' => {
            let close = pattern.iter().skip(2).position(|&b| b == b']')? + 2;
            let (negated, set) = match &pattern[1..close] {
                [b'!' | b'^', rest @ ..] => (true, rest),
                set => (false, set),
            };
            let mut fits = false;
            let mut rest = set;
            while let Some((&low, tail)) = rest.split_first() {
                if let [b'-', high, tail @ ..] = tail {
                    fits |= (low..=*high).contains(&byte);
                    rest = tail;
                } else {
                    fits |= low == byte;
                    rest = tail;
                }
            }
            (fits != negated).then_some(close + 1)
        }
        other => (other == byte).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::fnmatch;

    #[test]
    fn patterns_of_module_aliases() {
        assert!(fnmatch("virtio:d00000002v*", "virtio:d00000002v00001AF4"));
        assert!(!fnmatch("virtio:d00000002v*", "virtio:d00000003v00001AF4"));
        assert!(fnmatch(
            "pci:v00001AF4d*sv*sd*bc*sc*i*",
            "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00"
        ));
        assert!(fnmatch("acpi*:PNP0[A-F]0?:*", "acpi:PNP0C0F:"));
        assert!(!fnmatch("acpi*:PNP0[!A-F]0?:*", "acpi:PNP0C0F:"));
        assert!(fnmatch("*", ""));
        assert!(!fnmatch("a[", "a["));
        assert!(!fnmatch("?", ""));
    }
}
