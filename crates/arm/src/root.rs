//! The machine's file tree.

use std::io;
use std::path::{Path, PathBuf};

/// Where the machine's file tree begins: `/`, or a directory that plays it in tests.
///
/// Every path that this crate reads or writes goes through here, sysfs, procfs and sysctls included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root(PathBuf);

impl Default for Root {
    fn default() -> Self {
        Self::new("/")
    }
}

impl Root {
    /// A tree that begins at `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// Where the absolute path `path` of the machine really lies.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The machine's name for the real path `real`; `None` when it lies outside the tree.
    pub fn strip(&self, real: &Path) -> Option<PathBuf> {
        real.strip_prefix(&self.0).ok().map(|rest| Path::new("/").join(rest))
    }

    /// Reads a small text file and trims it, as suits sysfs, procfs and sysctls.
    pub fn read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        std::fs::read_to_string(self.join(path)).map(|text| text.trim().to_owned())
    }

    /// Whether there is something at `path`.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.join(path).exists()
    }
}
