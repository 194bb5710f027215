//! Reproducible noise: contents that can be computed again instead of being remembered.

/// SplitMix64. Small, fast, and every seed gives another sequence.
#[derive(Clone)]
pub struct Prng(u64);

impl Prng {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// `len` bytes of noise.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fill(seed, &mut bytes);
    bytes
}

/// Fills with noise.
pub fn fill(seed: u64, bytes: &mut [u8]) {
    let mut prng = Prng::new(seed);
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&prng.next().to_le_bytes()[..chunk.len()]);
    }
}

/// Compares with the noise of `seed`; an error says how many pages differ and where the first one does.
pub fn verify(seed: u64, bytes: &[u8]) -> anyhow::Result<()> {
    const PAGE: usize = 4096;
    let mut prng = Prng::new(seed);
    let mut wrong_pages = 0;
    let mut first = None;
    for (page, content) in bytes.chunks(PAGE).enumerate() {
        let mut wrong = false;
        for (word, chunk) in content.chunks(8).enumerate() {
            let expected = prng.next().to_le_bytes();
            if *chunk != expected[..chunk.len()] {
                first.get_or_insert((page * PAGE + word * 8, chunk.to_vec(), expected));
                wrong = true;
            }
        }
        wrong_pages += usize::from(wrong);
    }
    match first {
        None => Ok(()),
        Some((at, found, expected)) => anyhow::bail!(
            "{wrong_pages} of {} pages differ, first at offset {at:#x}: {found:02x?} instead of {expected:02x?}",
            bytes.len().div_ceil(PAGE)
        ),
    }
}
