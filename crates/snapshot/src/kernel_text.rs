//! The kernel's own instructions, as checksums from when the machine was armed.

use serde::{Deserialize, Serialize};

use crate::PAGE_SIZE;

/// Bytes of a page that have a checksum of their own.
pub const TEXT_LINE: usize = 32;
/// Checksums of a page: one of all of it, and one of each line.
const SUMS_PER_PAGE: usize = 1 + PAGE_SIZE as usize / TEXT_LINE;

/// Code that lies in one piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextPiece {
    /// The module whose code it is; none for the kernel's own.
    pub module: Option<String>,
    /// Kernel virtual address of its first page.
    pub start: u64,
    /// How many pages it has.
    pub pages: usize,
}

/// What the kernel's instructions were. The checksums (CRC-32) find every change of up to four bytes in a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelText {
    pieces: Vec<TextPiece>,
    sums: Vec<u32>,
}

impl KernelText {
    /// Puts together what [`pieces`](Self::pieces) and [`sums`](Self::sums) have given; `None` if they do not belong to each other.
    pub fn new(pieces: Vec<TextPiece>, sums: Vec<u32>) -> Option<Self> {
        let pages = pieces.iter().try_fold(0usize, |sum, piece| sum.checked_add(piece.pages))?;
        (pages.checked_mul(SUMS_PER_PAGE)? == sums.len()).then_some(Self { pieces, sums })
    }

    /// Adds code that begins at `start`: whole pages, what is beyond the last whole one is left out.
    pub fn add(&mut self, module: Option<String>, start: u64, code: &[u8]) {
        let (pages, _) = code.as_chunks::<{ PAGE_SIZE as usize }>();
        for page in pages {
            self.sums.push(Self::sum(page));
            self.sums.extend(page.chunks_exact(TEXT_LINE).map(Self::sum));
        }
        self.pieces.push(TextPiece { module, start, pages: pages.len() });
    }

    /// The checksum of a page, or of a line of it.
    pub fn sum(bytes: &[u8]) -> u32 {
        crc32fast::hash(bytes)
    }

    /// Nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// Where there was code.
    pub fn pieces(&self) -> &[TextPiece] {
        &self.pieces
    }

    /// All checksums, in the order of the pieces and their pages.
    pub fn sums(&self) -> &[u32] {
        &self.sums
    }

    /// Each piece with its pages: the address of one, its checksum, those of its lines.
    pub fn pages(&self) -> impl Iterator<Item = (&TextPiece, impl Iterator<Item = (u64, u32, &[u32])>)> {
        let mut rest = self.sums.as_slice();
        self.pieces.iter().map(move |piece| {
            // `new` and `add` see to it that there are as many.
            let (own, others) = rest.split_at_checked(piece.pages * SUMS_PER_PAGE).unwrap_or_default();
            rest = others;
            let addresses = (0..).map(|n: u64| piece.start.wrapping_add(n * PAGE_SIZE));
            let sums = own.chunks_exact(SUMS_PER_PAGE).filter_map(|sums| sums.split_first());
            (piece, addresses.zip(sums).map(|(at, (whole, lines))| (at, *whole, lines)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_the_sums_that_they_were_recorded_with() {
        let code = |byte| vec![byte; 2 * PAGE_SIZE as usize + 7];
        let mut text = KernelText::default();
        assert!(text.is_empty());
        text.add(None, 0x10000, &code(1));
        text.add(Some("ext4".into()), 0x50000, &code(2));
        let text = KernelText::new(text.pieces().to_vec(), text.sums().to_vec()).unwrap();
        let mut seen = Vec::new();
        for (piece, pages) in text.pages() {
            for (at, whole, lines) in pages {
                let byte = if piece.module.is_some() { 2 } else { 1 };
                assert_eq!(whole, KernelText::sum(&[byte; PAGE_SIZE as usize]));
                assert_eq!(lines, [KernelText::sum(&[byte; TEXT_LINE]); PAGE_SIZE as usize / TEXT_LINE]);
                seen.push(at);
            }
        }
        assert_eq!(seen, [0x10000, 0x11000, 0x50000, 0x51000]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let piece = |pages| TextPiece { module: None, start: 0, pages };
        assert!(KernelText::new(vec![piece(1)], vec![0; SUMS_PER_PAGE]).is_some());
        assert!(KernelText::new(vec![piece(2)], vec![0; SUMS_PER_PAGE]).is_none());
        assert!(KernelText::new(vec![piece(usize::MAX), piece(2)], vec![]).is_none());
        assert!(KernelText::new(vec![piece(usize::MAX / 2)], vec![]).is_none());
    }
}
