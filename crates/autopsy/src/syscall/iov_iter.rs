//! How far a transfer had come: the `iov_iter` on the task's kernel stack.
//!
//! A call that moves data between the program and a file makes a `struct iov_iter` over the program's buffers and, if the
//! file has `read_iter`/`write_iter`, a `struct kiocb`, both as local variables (fs/read_write.c: `new_sync_read`,
//! `new_sync_write`, `do_iter_readv_writev`, in 6.12 `vfs_readv`, `vfs_writev`; net/socket.c: `__sys_recvfrom`,
//! `__sys_sendto`, `___sys_recvmsg`, `___sys_sendmsg`). They are found by what must be in them, not by where they are:
//!
//! - the iterator is over exactly the buffers that the program gave, and what has been moved and what is left add up to
//!   their length (lib/iov_iter.c, `iov_iter_advance`);
//! - the kiocb is a synchronous one (`ki_complete` is NULL) of the file that the descriptor leads to.
//!
//! Layouts differ: 6.1 has `iov` and `count` beside each other, 6.12 lays `ubuf` and `count` over an `iovec`. BTF tells.

use ktypes::{Kernel, Result};

/// The most that one call moves (MAX_RW_COUNT: INT_MAX without the last page's offset).
pub(super) const MAX_RW_COUNT: u64 = 0x7fff_f000;
/// UIO_MAXIOV.
pub(super) const MAX_SEGMENTS: u64 = 1024;
/// The kiocb and the iterator are in the same function's frame or in neighbouring ones; between them there may be eight
/// `iovec`s (UIO_FASTIOV) and saved registers.
const MAX_DISTANCE: u64 = 1024;
/// Nothing is mapped below (vm.mmap_min_addr).
const MIN_ADDRESS: u64 = 4096;
/// Larger positions than 64 TiB are taken for addresses (of the heap, of libraries) that happen to follow the file's.
const MAX_POS: i64 = 1 << 46;

/// Where the members are (bytes) and what the kinds of iterators are called.
#[derive(Clone, Debug)]
pub struct Layout {
    /// sizeof(struct iov_iter).
    pub size: u64,
    #[allow(missing_docs)]
    pub iter_type: u64,
    #[allow(missing_docs)]
    pub data_source: u64,
    #[allow(missing_docs)]
    pub iov_offset: u64,
    #[allow(missing_docs)]
    pub count: u64,
    /// `ubuf`, and over it `iov` (`__iov` since 6.4).
    pub pointer: u64,
    #[allow(missing_docs)]
    pub nr_segs: u64,
    /// ITER_UBUF.
    pub ubuf: u8,
    /// ITER_IOVEC.
    pub iovec: u8,
    /// sizeof(struct kiocb).
    pub kiocb_size: u64,
    #[allow(missing_docs)]
    pub ki_filp: u64,
    #[allow(missing_docs)]
    pub ki_pos: u64,
    #[allow(missing_docs)]
    pub ki_complete: u64,
    /// Where the iterator is in a `struct msghdr`.
    pub msg_iter: u64,
}

impl Layout {
    /// From the dead kernel's BTF.
    ///
    /// # Errors
    /// When a structure or member is missing.
    pub fn read(kernel: &Kernel) -> Result<Layout> {
        let iter = |member| kernel.offset_of("iov_iter", member);
        let kiocb = |member| kernel.offset_of("kiocb", member);
        let kind = |name| kernel.enum_value_in("iter_type", name).map(|value| value as u8);
        Ok(Layout {
            size: kernel.size_of("iov_iter")?,
            iter_type: iter("iter_type")?,
            data_source: iter("data_source")?,
            iov_offset: iter("iov_offset")?,
            count: iter("count")?,
            pointer: iter("ubuf")?,
            nr_segs: iter("nr_segs")?,
            ubuf: kind("ITER_UBUF")?,
            iovec: kind("ITER_IOVEC")?,
            kiocb_size: kernel.size_of("kiocb")?,
            ki_filp: kiocb("ki_filp")?,
            ki_pos: kiocb("ki_pos")?,
            ki_complete: kiocb("ki_complete")?,
            msg_iter: kernel.offset_of("msghdr", "msg_iter")?,
        })
    }
}

/// The live part of a kernel stack.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    /// Address of the first word: the stack pointer.
    pub base: u64,
    /// From there to the user's registers.
    pub words: &'a [u64],
}

impl Stack<'_> {
    /// The word at an address.
    pub fn word(&self, addr: u64) -> Option<u64> {
        let offset = addr.checked_sub(self.base).filter(|offset| offset % 8 == 0)?;
        self.words.get(usize::try_from(offset / 8).ok()?).copied()
    }

    fn byte(&self, addr: u64) -> Option<u8> {
        Some(self.word(addr & !7)?.to_le_bytes()[(addr & 7) as usize])
    }

    /// The words' addresses, ascending: from the deepest frame up.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        let base = self.base;
        (0..self.words.len() as u64).map(move |i| base.wrapping_add(i * 8))
    }
}

/// The buffers of a call, as the program gave them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Buffers {
    /// Address and length of each.
    Known(Vec<(u64, u64)>),
    /// So many, which could not be read from the program's memory.
    Unknown(u64),
}

impl Buffers {
    fn segments(&self) -> u64 {
        match self {
            Buffers::Known(segments) => segments.len() as u64,
            Buffers::Unknown(count) => *count,
        }
    }

    /// Their length together; `None` if not known.
    pub fn total(&self) -> Option<u64> {
        match self {
            Buffers::Known(segments) => {
                let total = segments.iter().fold(0, |sum: u64, (_, len)| sum.saturating_add(*len));
                Some(total.min(MAX_RW_COUNT))
            }
            Buffers::Unknown(_) => None,
        }
    }
}

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The program's buffers.
    pub buffers: &'a Buffers,
    /// They are read from (`data_source`).
    pub write: bool,
    /// The address of the `struct file` that a kiocb near the iterator must name; `None` where the call uses no kiocb.
    pub file: Option<u64>,
    /// The file is a socket: its layer goes on with a copy of the iterator further down, and updates the first one at the
    /// end, so that the deepest (lowest) one counts.
    pub socket: bool,
}

/// A transfer under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that have gone through the iterator.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// `kiocb.ki_pos`, where a kiocb was asked for.
    pub ki_pos: Option<i64>,
}

/// What the stack says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// No such iterator: the call has not got there yet, or has left it.
    Nothing,
    /// All that fits agrees.
    Found(Progress),
    /// Several fit, and say different things.
    Contradiction,
}

/// An iterator that fits.
#[derive(Clone, Copy)]
struct Candidate {
    at: u64,
    progress: Progress,
    /// The kiocb lies directly beside it: local variables of one function.
    beside_kiocb: bool,
}

/// Looks for a transfer. Iterators that fit must agree, except for sockets. `read` reads so many words of kernel memory.
///
/// A stack has holes in which iterators of earlier calls survive, often over the same buffer. Of candidates that do not
/// agree, those directly beside their kiocb count more; then those that something further down the stack points to, as the
/// function that works with it does.
pub fn find(
    layout: &Layout,
    stack: Stack<'_>,
    wanted: Wanted<'_>,
    read: &dyn Fn(u64, usize) -> Option<Vec<u64>>,
) -> Search {
    let Wanted { file, socket, .. } = wanted;
    let kiocbs: Vec<(u64, i64)> = match file {
        Some(file) => {
            stack.addresses().filter_map(|at| Some((at, kiocb_at(layout, stack, at, file)?))).collect()
        }
        None => Vec::new(),
    };
    let mut candidates: Vec<Candidate> = Vec::new();
    for at in stack.addresses() {
        let Some((done, total)) = progress_at(layout, stack, at, wanted, read) else { continue };
        let beside = |kiocb: u64| kiocb == at + layout.size || kiocb + layout.kiocb_size == at;
        let nearest = kiocbs.iter().min_by_key(|(kiocb, _)| (!beside(*kiocb), kiocb.abs_diff(at)));
        let (ki_pos, beside_kiocb) = match (file, nearest) {
            (None, _) => (None, false),
            (Some(_), Some((kiocb, pos))) if kiocb.abs_diff(at) <= MAX_DISTANCE || socket => {
                (Some(*pos), beside(*kiocb))
            }
            (Some(_), _) => continue,
        };
        candidates.push(Candidate { at, progress: Progress { done, total, ki_pos }, beside_kiocb });
    }
    if !socket && !agree(&candidates) {
        prefer(&mut candidates, |candidate| candidate.beside_kiocb);
    }
    if !socket && !agree(&candidates) {
        prefer(&mut candidates, |candidate| {
            stack
                .addresses()
                .take_while(|at| *at < candidate.at)
                .any(|at| stack.word(at) == Some(candidate.at))
        });
    }
    // A socket's functions hand on the message that the iterator is in.
    if socket && !deepest_leads(&candidates) {
        prefer(&mut candidates, |candidate| {
            let message = candidate.at.wrapping_sub(layout.msg_iter);
            let mut deeper = stack.addresses().take_while(|at| *at < message);
            deeper.any(|at| stack.word(at) == Some(message))
        });
    }
    // The lowest address is the deepest frame, and comes first.
    let Some(Candidate { progress: deepest, .. }) = candidates.first().copied() else {
        return Search::Nothing;
    };
    let consistent = if socket { deepest_leads(&candidates) } else { agree(&candidates) };
    if consistent { Search::Found(deepest) } else { Search::Contradiction }
}

/// Nobody is ahead of the deepest, which comes first.
fn deepest_leads(candidates: &[Candidate]) -> bool {
    let Some(Candidate { progress: deepest, .. }) = candidates.first() else { return true };
    candidates
        .iter()
        .all(|other| other.progress.total == deepest.total && other.progress.done <= deepest.done)
}

fn agree(candidates: &[Candidate]) -> bool {
    candidates.windows(2).all(|pair| pair[0].progress == pair[1].progress)
}

/// Keeps those that have something, if any has it.
fn prefer(candidates: &mut Vec<Candidate>, has: impl Fn(&Candidate) -> bool) {
    if candidates.iter().any(&has) {
        candidates.retain(has);
    }
}

/// `ki_pos` of the kiocb at an address, if one of this file can be there.
fn kiocb_at(layout: &Layout, stack: Stack<'_>, at: u64, file: u64) -> Option<i64> {
    stack.word(at.checked_add(layout.kiocb_size)?.checked_sub(8)?)?;
    let sync = stack.word(at + layout.ki_complete)? == 0;
    let same = stack.word(at + layout.ki_filp)? == file;
    let pos = stack.word(at + layout.ki_pos)? as i64;
    (sync && same && (0..MAX_POS).contains(&pos)).then_some(pos)
}

/// Bytes done and bytes in all of the iterator at an address, if one over these buffers can be there.
fn progress_at(
    layout: &Layout,
    stack: Stack<'_>,
    at: u64,
    wanted: Wanted<'_>,
    read: &dyn Fn(u64, usize) -> Option<Vec<u64>>,
) -> Option<(u64, u64)> {
    stack.word(at.checked_add(layout.size)?.checked_sub(8)?)?;
    let Wanted { buffers, write, .. } = wanted;
    let kind = stack.byte(at + layout.iter_type)?;
    if stack.byte(at + layout.data_source)? != u8::from(write) {
        return None;
    }
    let offset = stack.word(at + layout.iov_offset)?;
    let left = stack.word(at + layout.count)?;
    let pointer = stack.word(at + layout.pointer)?;
    let segments_left = stack.word(at + layout.nr_segs)?;
    if offset > MAX_RW_COUNT || left > MAX_RW_COUNT || kind == layout.ubuf && is_kernel(pointer) {
        return None;
    }
    if kind == layout.ubuf {
        if pointer < MIN_ADDRESS || segments_left > 1 {
            return None;
        }
        let total = offset + left;
        let fits = match buffers {
            Buffers::Known(segments) => {
                matches!(segments[..], [(addr, len)] if addr == pointer && len.min(MAX_RW_COUNT) == total)
            }
            Buffers::Unknown(count) => *count == 1 && total > 0,
        };
        return fits.then_some((offset, total));
    }
    if kind != layout.iovec || !is_kernel(pointer) {
        return None;
    }
    // The kernel's own copy of the vector: the iterator points to its first segment that is not finished.
    let count = buffers.segments();
    let behind = count.checked_sub(segments_left).filter(|_| (1..=MAX_SEGMENTS).contains(&count))?;
    let vector = read(pointer.checked_sub(behind * 16)?, count as usize * 2)?;
    let (segments, _) = vector.as_chunks::<2>();
    if let Buffers::Known(known) = buffers
        && !known.iter().zip(segments).all(|((addr, len), [base, size])| (addr, len) == (base, size))
    {
        return None;
    }
    let sum = |part: &[[u64; 2]]| part.iter().try_fold(0u64, |sum, [_, len]| sum.checked_add(*len));
    let total = sum(segments)?.min(MAX_RW_COUNT);
    let done = sum(segments.get(..behind as usize)?)?.checked_add(offset)?;
    let fits =
        segments.iter().all(|[base, _]| !is_kernel(*base)) && done.checked_add(left)? == total && total > 0;
    fits.then_some((done, total))
}

fn is_kernel(addr: u64) -> bool {
    addr >> 63 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xffff_c900_0001_2000;
    const FILE: u64 = 0xffff_8880_1234_5600;
    const BUF: u64 = 0x7f00_1000;

    /// Linux 6.1: type, flags | iov_offset | count | pointer | nr_segs.
    fn layout_6_1() -> Layout {
        Layout {
            size: 40,
            iter_type: 0,
            data_source: 2,
            iov_offset: 8,
            count: 16,
            pointer: 24,
            nr_segs: 32,
            ubuf: 6,
            iovec: 0,
            kiocb_size: 48,
            ki_filp: 0,
            ki_pos: 8,
            ki_complete: 16,
            msg_iter: 16,
        }
    }

    /// Linux 6.12: pointer and count are an `iovec`.
    fn layout_6_12() -> Layout {
        Layout { count: 24, pointer: 16, ubuf: 0, iovec: 1, ..layout_6_1() }
    }

    struct Synthetic {
        layout: Layout,
        words: Vec<u64>,
    }

    impl Synthetic {
        fn new(layout: Layout) -> Self {
            // What lies about: return addresses, small numbers, the file and the buffer themselves.
            let mut words = vec![0; 512];
            for (i, word) in words.iter_mut().enumerate() {
                *word = [0xffff_ffff_8123_4567, 3, FILE, BUF, 9][i % 5];
            }
            Synthetic { layout, words }
        }

        fn kiocb(mut self, at: usize, file: u64, pos: i64) -> Self {
            self.words[at..at + 6].copy_from_slice(&[file, pos as u64, 0, 0, 0, 0]);
            self
        }

        fn iter(mut self, at: usize, kind: u8, offset: u64, left: u64, pointer: u64, segments: u64) -> Self {
            let layout = &self.layout;
            self.words[at] = u64::from(kind) | 0x0101_0000;
            for (member, value) in [
                (layout.iov_offset, offset),
                (layout.count, left),
                (layout.pointer, pointer),
                (layout.nr_segs, segments),
            ] {
                self.words[at + member as usize / 8] = value;
            }
            self
        }

        fn ubuf(self, at: usize, offset: u64, left: u64) -> Self {
            let kind = self.layout.ubuf;
            self.iter(at, kind, offset, left, BUF, 1)
        }

        fn find(&self, file: Option<u64>, buffers: &Buffers, socket: bool) -> Search {
            let stack = Stack { base: BASE, words: &self.words };
            let read = |addr: u64, n: usize| (0..n as u64).map(|i| stack.word(addr + i * 8)).collect();
            find(&self.layout, stack, Wanted { buffers, write: true, file, socket }, &read)
        }
    }

    fn layouts() -> [Layout; 2] {
        [layout_6_1(), layout_6_12()]
    }

    fn flat(len: u64) -> Buffers {
        Buffers::Known(vec![(BUF, len)])
    }

    #[test]
    fn a_flat_buffer_is_found_in_both_layouts() {
        for layout in layouts() {
            let stack = Synthetic::new(layout).kiocb(100, FILE, 7).ubuf(106, 4096, 904);
            let expected = Progress { done: 4096, total: 5000, ki_pos: Some(7) };
            assert_eq!(stack.find(Some(FILE), &flat(5000), false), Search::Found(expected));
        }
    }

    #[test]
    fn nothing_is_found_where_something_does_not_fit() {
        for layout in layouts() {
            let stack = Synthetic::new(layout.clone()).kiocb(100, FILE, 7).ubuf(106, 4096, 904);
            assert_eq!(stack.find(Some(FILE), &flat(5001), false), Search::Nothing, "another length");
            assert_eq!(stack.find(Some(FILE + 256), &flat(5000), false), Search::Nothing, "another file");
            let elsewhere = Buffers::Known(vec![(BUF + 8, 5000)]);
            assert_eq!(stack.find(Some(FILE), &elsewhere, false), Search::Nothing, "another buffer");
            let far = Synthetic::new(layout.clone()).kiocb(100, FILE, 7).ubuf(400, 4096, 904);
            assert_eq!(far.find(Some(FILE), &flat(5000), false), Search::Nothing, "no kiocb nearby");
            let mut asynchronous = Synthetic::new(layout.clone()).kiocb(100, FILE, 7).ubuf(106, 4096, 904);
            asynchronous.words[102] = 0xffff_ffff_8100_0000;
            assert_eq!(asynchronous.find(Some(FILE), &flat(5000), false), Search::Nothing, "not synchronous");
            let mut reading = Synthetic::new(layout.clone()).kiocb(100, FILE, 7).ubuf(106, 4096, 904);
            reading.words[106] &= 0xff;
            assert_eq!(reading.find(Some(FILE), &flat(5000), false), Search::Nothing, "the other direction");
            let end = Synthetic::new(layout).kiocb(500, FILE, 7);
            assert_eq!(end.find(Some(FILE), &flat(5000), false), Search::Nothing);
        }
    }

    #[test]
    fn a_length_is_cut_as_the_kernel_cuts_it() {
        for layout in layouts() {
            let stack = Synthetic::new(layout).kiocb(100, FILE, 0).ubuf(106, 10, MAX_RW_COUNT - 10);
            let expected = Progress { done: 10, total: MAX_RW_COUNT, ki_pos: Some(0) };
            assert_eq!(stack.find(Some(FILE), &flat(1 << 40), false), Search::Found(expected));
        }
    }

    #[test]
    fn stale_copies_that_agree_do_no_harm_and_those_that_do_not_are_a_contradiction() {
        for layout in layouts() {
            let stack = Synthetic::new(layout.clone()).kiocb(100, FILE, 7).ubuf(106, 64, 36);
            let twice = stack.kiocb(200, FILE, 7).ubuf(206, 64, 36);
            let expected = Progress { done: 64, total: 100, ki_pos: Some(7) };
            assert_eq!(twice.find(Some(FILE), &flat(100), false), Search::Found(expected));
            let other = twice.ubuf(206, 0, 100);
            let mut used = Synthetic { layout: layout.clone(), words: other.words.clone() };
            used.words[20] = BASE + 106 * 8;
            let pointed_to = Search::Found(Progress { done: 64, total: 100, ki_pos: Some(7) });
            assert_eq!(used.find(Some(FILE), &flat(100), false), pointed_to);
            used.words[21] = BASE + 206 * 8;
            assert_eq!(used.find(Some(FILE), &flat(100), false), Search::Contradiction);
            assert_eq!(other.find(Some(FILE), &flat(100), false), Search::Contradiction);
            // A socket's inner iterator is ahead of the outer one …
            let inner = Search::Found(Progress { done: 64, total: 100, ki_pos: Some(7) });
            assert_eq!(other.find(Some(FILE), &flat(100), true), inner);
            // … and never behind it.
            let behind = other.ubuf(206, 80, 20);
            assert_eq!(behind.find(Some(FILE), &flat(100), true), Search::Contradiction);
            // Unless somebody works with the message that it is in.
            let mut live = behind;
            live.words[20] = BASE + 106 * 8 - layout.msg_iter;
            assert_eq!(live.find(Some(FILE), &flat(100), true), inner);
        }
    }

    /// As met in a writer to a full pipe: the iterators of two earlier calls, finished, with their kiocbs overwritten.
    #[test]
    fn what_is_beside_its_kiocb_counts_more_than_remains_of_earlier_calls() {
        for layout in layouts() {
            let stack = Synthetic::new(layout).ubuf(100, 0, 4096).kiocb(105, FILE, 0);
            let stack = stack.ubuf(180, 4096, 0).ubuf(216, 4096, 0);
            let expected = Progress { done: 0, total: 4096, ki_pos: Some(0) };
            assert_eq!(stack.find(Some(FILE), &flat(4096), false), Search::Found(expected));
        }
    }

    #[test]
    fn an_address_after_the_file_is_no_position() {
        for layout in layouts() {
            let stack =
                Synthetic::new(layout).kiocb(90, FILE, BASE as i64).kiocb(114, FILE, 0x7f6e_a1f9_c000);
            let stack = stack.ubuf(102, 0, 4096);
            assert_eq!(stack.find(Some(FILE), &flat(4096), false), Search::Nothing);
        }
    }

    #[test]
    fn vectors_are_followed_into_the_kernels_copy() {
        for layout in layouts() {
            let kind = layout.iovec;
            // Three segments of 10, 20 and 30 bytes; 5 bytes of the second are done.
            let mut stack = Synthetic::new(layout).kiocb(100, FILE, 0);
            stack.words[120..126].copy_from_slice(&[BUF, 10, BUF + 100, 20, BUF + 200, 30]);
            let stack = stack.iter(106, kind, 5, 45, BASE + 122 * 8, 2);
            let expected = Search::Found(Progress { done: 15, total: 60, ki_pos: Some(0) });
            let known = Buffers::Known(vec![(BUF, 10), (BUF + 100, 20), (BUF + 200, 30)]);
            assert_eq!(stack.find(Some(FILE), &known, false), expected);
            assert_eq!(stack.find(Some(FILE), &Buffers::Unknown(3), false), expected);
            assert_eq!(
                stack.find(Some(FILE), &Buffers::Unknown(1), false),
                Search::Nothing,
                "more left than given"
            );
            assert_eq!(
                stack.find(None, &known, false),
                Search::Found(Progress { done: 15, total: 60, ki_pos: None })
            );
            let others = Buffers::Known(vec![(BUF, 10), (BUF + 100, 20), (BUF + 201, 30)]);
            assert_eq!(stack.find(Some(FILE), &others, false), Search::Nothing);
        }
    }

    #[test]
    fn a_finished_vector_points_behind_its_end() {
        for layout in layouts() {
            let kind = layout.iovec;
            let mut stack = Synthetic::new(layout).kiocb(100, FILE, 60);
            stack.words[120..124].copy_from_slice(&[BUF, 10, BUF + 100, 20]);
            let stack = stack.iter(106, kind, 0, 0, BASE + 124 * 8, 0);
            let expected = Progress { done: 30, total: 30, ki_pos: Some(60) };
            assert_eq!(stack.find(Some(FILE), &Buffers::Unknown(2), false), Search::Found(expected));
        }
    }

    #[test]
    fn hostile_numbers_are_survived() {
        for layout in layouts() {
            for kind in [layout.ubuf, layout.iovec] {
                for number in [u64::MAX, 1 << 63, 0] {
                    let stack = Synthetic::new(layout.clone()).kiocb(100, FILE, 0);
                    let stack = stack.iter(106, kind, number, number, number, number);
                    let buffers = Buffers::Known(vec![(u64::MAX, u64::MAX), (0, u64::MAX)]);
                    assert_eq!(stack.find(Some(FILE), &buffers, false), Search::Nothing);
                    assert_eq!(stack.find(Some(FILE), &Buffers::Unknown(u64::MAX), false), Search::Nothing);
                }
            }
        }
    }
}
