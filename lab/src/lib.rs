//! Machines to crash.
//!
//! In go distribution packages (a kernel, a root file system), what is to be pushed into the guest, and what to do there.
//! Out come running guests with a control channel, their serial consoles line by line with the host's time, snapshots from
//! which the next guest starts in a second or two, and files under `target/lab/`.
//!
//! It never dirties a base image, never leaves a QEMU behind (they die with the thread that started them), never waits
//! without a deadline, and is no part of what runs on a user's machine.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

pub mod channel;
pub mod error;
pub mod host;
pub mod image;
mod initramfs;
mod keep;
pub mod kernel;
pub mod machine;
pub mod protocol;
pub mod qmp;
pub mod record;
pub mod saver;
pub mod serial;
pub mod snapshot;

pub use channel::Channel;
pub use error::{Error, Result};
pub use kernel::{Kernel, Series};
pub use machine::{Accel, Machine, MachineConfig};
pub use protocol::{Panic, Program};
pub use serial::{Console, Line};
pub use snapshot::{Guest, Snapshot};

use error::FileContext as _;

/// The lab's cache and how it reports what takes long.
#[derive(Clone)]
pub struct Lab {
    cache: PathBuf,
    agent: PathBuf,
    refresh_before: Option<SystemTime>,
    say: Arc<dyn Fn(&str) + Send + Sync>,
}

impl fmt::Debug for Lab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lab").field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl Lab {
    /// Opens the lab whose files are below `cache` (`target/lab`), with the static agent binary. Installs what the host lacks.
    ///
    /// # Errors
    /// [`Error::Host`] with what to install, if that is not allowed.
    pub fn open(cache: &Path, agent: &Path) -> Result<Self> {
        host::ensure_own_tools()?;
        for dir in ["kernels", "images", "snapshots", "runs", "locks"] {
            let dir = cache.join(dir);
            fs::create_dir_all(&dir).at(&dir)?;
        }
        Ok(Self { agent: agent.into(), ..Self::at(&cache.canonicalize().at(cache)?) })
    }

    /// The lab below an existing directory, without an agent.
    fn at(cache: &Path) -> Self {
        let say = Arc::new(|text: &str| eprintln!("lab: {text}"));
        Self { cache: cache.into(), agent: PathBuf::new(), refresh_before: None, say }
    }

    /// Sends the lab's progress lines elsewhere than standard error.
    pub fn on_progress(mut self, say: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.say = Arc::new(say);
        self
    }

    /// Looks for newer kernels and packages instead of being content with what is cached.
    pub fn refresh(mut self) -> Self {
        self.refresh_before = Some(SystemTime::now());
        self
    }

    /// The directory below which everything is cached.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    fn agent_binary(&self) -> &Path {
        &self.agent
    }

    /// Reports progress.
    pub fn note(&self, text: &str) {
        (self.say)(text);
    }

    fn lock(&self, what: &str) -> Result<host::Lock> {
        host::Lock::take(&self.cache.join("locks").join(what))
    }

    /// Whether a refresh was asked for and `file` is older than that.
    fn wants_refresh(&self, file: &Path) -> bool {
        let modified = || fs::metadata(file).and_then(|file| file.modified()).ok();
        self.refresh_before.is_some_and(|asked| modified().is_none_or(|modified| modified < asked))
    }

    fn update_apt_once(&self) -> Result<()> {
        static ONCE: Once = Once::new();
        let mut result = Ok(());
        ONCE.call_once(|| {
            self.note("refreshing the package lists");
            result = host::apt_update();
        });
        result
    }
}

/// The name of a cached thing: a hash of all that it is made of.
#[derive(Debug, Clone)]
pub struct Key(Sha256);

impl Key {
    /// Starts with a domain, so that different things never share a key.
    pub fn new(domain: &str) -> Self {
        Self(Sha256::new()).with(domain)
    }

    /// Adds a text.
    pub fn with(self, text: &str) -> Self {
        self.with_bytes(text.as_bytes())
    }

    /// Adds bytes.
    pub fn with_bytes(mut self, bytes: &[u8]) -> Self {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// The key as 16 hexadecimal digits.
    pub fn text(&self) -> String {
        self.0.clone().finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_inputs_and_their_borders_apart() {
        assert_eq!(Key::new("a").with("b").text(), Key::new("a").with("b").text());
        assert_ne!(Key::new("a").with("bc").text(), Key::new("ab").with("c").text());
        assert_ne!(Key::new("a").text(), Key::new("a").with("").text());
    }
}
