//! Decompression of LZO1X, and of the kernel's extension with runs of zeroes (LZO-RLE), as Documentation/staging/lzo.rst of the kernel describes the
//! format. No crate does the latter.

/// The first byte of a stream with a version, which follows it.
const VERSIONED: u8 = 17;
/// The shortest stream with a version.
const MIN_VERSIONED: usize = 5;
/// The distance that ends a stream.
const END: usize = 16384;
/// The shortest run of zeroes.
const MIN_RUN: usize = 4;
/// After a long copy of literals no more follow.
const LONG: usize = 4;

struct Stream<'a> {
    rest: &'a [u8],
    out: &'a mut [u8],
    len: usize,
}

impl Stream<'_> {
    fn byte(&mut self) -> Option<usize> {
        let (byte, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(usize::from(*byte))
    }

    fn word(&mut self) -> Option<usize> {
        Some(self.byte()? | self.byte()? << 8)
    }

    /// A length that has `bits` of its own in an instruction.
    fn length(&mut self, instruction: usize, bits: u32) -> Option<usize> {
        let most = (1 << bits) - 1;
        let own = instruction & most;
        if own != 0 {
            return Some(own);
        }
        let mut length = most;
        loop {
            match self.byte()? {
                0 => length = length.checked_add(255)?,
                last => return length.checked_add(last),
            }
        }
    }

    fn literals(&mut self, count: usize) -> Option<()> {
        let (now, rest) = self.rest.split_at_checked(count)?;
        self.out.get_mut(self.len..self.len.checked_add(count)?)?.copy_from_slice(now);
        (self.rest, self.len) = (rest, self.len + count);
        Some(())
    }

    /// What came out `distance` bytes ago, once more; it may overlap.
    fn again(&mut self, distance: usize, count: usize) -> Option<()> {
        let from = self.len.checked_sub(distance)?;
        if self.len.checked_add(count)? > self.out.len() {
            return None;
        }
        for n in 0..count {
            let byte = *self.out.get(from + n)?;
            *self.out.get_mut(self.len + n)? = byte;
        }
        self.len += count;
        Some(())
    }

    fn zeroes(&mut self, count: usize) -> Option<()> {
        self.out.get_mut(self.len..self.len.checked_add(count)?)?.fill(0);
        self.len += count;
        Some(())
    }
}

/// Returns how many bytes came out; `None` if the stream is damaged, or there is no room.
pub(crate) fn decompress(stream: &[u8], out: &mut [u8]) -> Option<usize> {
    let has_version = stream.len() >= MIN_VERSIONED && stream.first() == Some(&VERSIONED);
    let has_runs = has_version && *stream.get(1)? > 0;
    let mut s = Stream { rest: stream.get(if has_version { 2 } else { 0 }..)?, out, len: 0 };
    // How many literals came last.
    let mut state = 0;
    if let Some(first) = s.rest.first().copied().filter(|first| *first > VERSIONED) {
        s.byte()?;
        let count = usize::from(first - VERSIONED);
        s.literals(count)?;
        state = count.min(LONG);
    }
    loop {
        let i = s.byte()?;
        let next = match i {
            0..16 if state == 0 => {
                let count = s.length(i, 4)? + 3;
                s.literals(count)?;
                state = LONG;
                continue;
            }
            0..16 => {
                let near = (s.byte()? << 2) + (i >> 2 & 3) + 1;
                let (distance, count) = if state == LONG { (near + 2048, 3) } else { (near, 2) };
                s.again(distance, count)?;
                i & 3
            }
            16..32 => {
                let ahead = s.rest.first_chunk::<2>().map(|bytes| u16::from_le_bytes(*bytes));
                if has_runs && i & 0xf8 == 0x18 && ahead.is_some_and(|word| word & 0xfffc == 0xfffc) {
                    let next = s.word()? & 3;
                    let count = (s.byte()? << 3 | i & 7) + MIN_RUN;
                    s.zeroes(count)?;
                    next
                } else {
                    let count = s.length(i, 3)? + 2;
                    let word = s.word()?;
                    let distance = END + ((i >> 3 & 1) << 14) + (word >> 2);
                    if distance == END {
                        return s.rest.is_empty().then_some(s.len);
                    }
                    s.again(distance, count)?;
                    word & 3
                }
            }
            32..64 => {
                let count = s.length(i, 5)? + 2;
                let word = s.word()?;
                s.again((word >> 2) + 1, count)?;
                word & 3
            }
            _ => {
                let count = if i < 128 { 3 + (i >> 5 & 1) } else { 5 + (i >> 5 & 3) };
                let distance = (s.byte()? << 3) + (i >> 2 & 7) + 1;
                s.again(distance, count)?;
                i & 3
            }
        };
        s.literals(next)?;
        state = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(stream: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0xee; 4096];
        let len = decompress(stream, &mut out)?;
        out.truncate(len);
        Some(out)
    }

    const STOP: [u8; 3] = [17, 0, 0];

    #[test]
    fn literals_and_copies() {
        // Four literals, then eight bytes from four back (128: 5 + 3, distance 4), then one literal.
        let stream = [&[21][..], b"abcd", &[0x80 | 3 << 5 | 3 << 2 | 1, 0], b"!", &STOP].concat();
        assert_eq!(out(&stream).unwrap(), b"abcdabcdabcd!");
        // A long run of literals at the beginning.
        let stream = [&[0, 5][..], &[7; 23], &STOP].concat();
        assert_eq!(out(&stream).unwrap(), [7; 23]);
        // A copy that overlaps itself, with a long length (2 + 31 + 255 + 2).
        let stream = [&[18][..], b"x", &[32, 0, 2, 0, 0], &STOP].concat();
        assert_eq!(out(&stream).unwrap(), [b'x'; 1 + 2 + 31 + 255 + 2]);
        // Two bytes of one back, after a literal.
        let stream = [&[18][..], b"x", &[0, 0], &STOP].concat();
        assert_eq!(out(&stream).unwrap(), b"xxx");
    }

    #[test]
    fn runs_of_zeroes_are_of_version_1() {
        let run = [0x18 | 5, 0xfc | 1, 0xff, 2];
        let stream = [&[17, 1, 19][..], b"ab", &run, b"c", &STOP].concat();
        let wanted = [&b"ab"[..], &[0; (2 << 3 | 5) + 4], b"c"].concat();
        assert_eq!(out(&stream).unwrap(), wanted);
        let old = [&[17, 0, 19][..], b"ab", &run, b"c", &STOP].concat();
        assert_eq!(out(&old), None, "there it is a copy from far before the beginning");
    }

    #[test]
    fn damage_is_noticed() {
        let stream = [&[21][..], b"abcd", &STOP].concat();
        assert_eq!(out(&stream).unwrap(), b"abcd");
        assert_eq!(out(&stream[..6]), None, "it does not end");
        assert_eq!(out(&[&stream[..], &[1]].concat()), None, "it goes on behind its end");
        assert_eq!(
            out(&[[21].as_slice(), b"abcd", &[0x80, 9], &STOP].concat()),
            None,
            "before the beginning"
        );
        assert_eq!(decompress(&stream, &mut [0; 3]), None, "no room");
        for len in 0..stream.len() {
            _ = out(&stream[..len]);
        }
    }
}
