//! What can go wrong with a part of the dead kernel's state.

/// Why an object could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name, a layout or a piece of memory could not be had.
    #[error(transparent)]
    Kernel(#[from] ktypes::Error),
    /// Physical memory or page tables could not be read.
    #[error(transparent)]
    Memory(#[from] vmcore::Error),
    /// It was read, and cannot be what the kernel had there.
    #[error("{what} at {addr:#x}: {why}")]
    Corrupt {
        /// Kind of object.
        what: &'static str,
        /// Its address in the dead kernel.
        addr: u64,
        /// What is wrong with it.
        why: String,
    },
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Objects on a chain or in a tree of pointers, each of which has its place there once. What is damaged can lead in a circle, and a
/// limit on how long a chain may be is far above what is worth going round.
#[derive(Default)]
pub(crate) struct Visited(std::collections::HashSet<u64>);

impl Visited {
    /// Takes note of an object; an error if it was there already.
    pub(crate) fn visit(&mut self, what: &'static str, addr: u64) -> Result<()> {
        self.0.insert(addr).then_some(()).ok_or_else(|| corrupt(what, addr, "comes up twice"))
    }
}

/// Finds out that a path upwards leads in a circle, without remembering all of it (Brent's method): paths are many, and short.
#[derive(Default)]
pub(crate) struct Circle<T> {
    mark: Option<T>,
    steps: u32,
    until: u32,
}

impl<T: Copy + PartialEq> Circle<T> {
    /// Whether the next place is one that was there.
    pub(crate) fn closes_at(&mut self, place: T) -> bool {
        if self.mark == Some(place) {
            return true;
        }
        if self.steps == self.until {
            (self.mark, self.steps, self.until) = (Some(place), 0, self.until.saturating_mul(2).max(1));
        }
        self.steps = self.steps.saturating_add(1);
        false
    }
}

/// An object that contradicts itself.
pub(crate) fn corrupt(what: &'static str, addr: u64, why: impl Into<String>) -> Error {
    Error::Corrupt { what, addr, why: why.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn circles_of_all_sizes_are_found_and_straight_ways_are_not() {
        let mut straight = Circle::default();
        assert!(!(0..100_000).any(|place| straight.closes_at(place)));
        for lead in [0, 1, 2, 7, 100] {
            for round in [1, 2, 3, 10, 1000] {
                let mut circle = Circle::default();
                let place = |step: usize| if step < lead { step } else { lead + (step - lead) % round };
                let found = (0..).find(|step| circle.closes_at(place(*step))).unwrap();
                assert!(found >= lead + round && found <= 4 * (lead + round) + 4, "{lead}, {round}: {found}");
            }
        }
    }
}
