//! What is kept of layers and runs, so that neither they nor the disk grow without end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::Lab;
use crate::error::{FileContext as _, Result};
use crate::snapshot::{Meta, meta};

/// How many layers of the same label are kept beside those that others stand on.
const KEEP_LAYERS: usize = 6;
/// How many run directories are kept, besides those marked to be kept.
const KEEP_RUNS: usize = 24;
/// What stays free on the disk as far as layers that nobody holds can give way: a layer, and what the runs beside it write.
const KEEP_FREE: u64 = 8 << 30;
/// The disks of a run.
const DISKS: [&str; 2] = ["disk.qcow2", "scratch.qcow2"];

/// A layer that is not removed for as long as the value lives.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    _meta: Arc<File>,
}

impl Held {
    /// Holds the finished layer in `dir`, and notes that it has been used.
    pub(crate) fn take(dir: &Path) -> Result<Self> {
        let path = dir.join("meta.json");
        let meta = File::open(&path).at(&path)?;
        meta.lock_shared().at(&path)?;
        // Whoever was removing it held the lock until then.
        fs::metadata(&path).at(&path)?;
        meta.set_modified(SystemTime::now()).at(&path)?;
        Ok(Self { _meta: Arc::new(meta) })
    }
}

/// A finished layer on the disk.
struct Layer {
    used: SystemTime,
    dir: PathBuf,
    meta: Meta,
}

impl Layer {
    fn remove(&self) {
        let Ok(meta) = File::open(self.dir.join("meta.json")) else { return };
        // The lock is held until nothing is left.
        if meta.try_lock().is_ok() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

impl Lab {
    /// Removes the layers of a label that have not been used for longest, then as many others as the disk wants back; none that is held or that another
    /// stands on.
    pub(crate) fn prune_snapshots(&self, label: &str) {
        let (mut same, _): (Vec<_>, Vec<_>) =
            self.upper_layers().into_iter().partition(|layer| layer.meta.label == label);
        let surplus = same.len().saturating_sub(KEEP_LAYERS);
        same.drain(..surplus).for_each(|layer| layer.remove());
        for layer in self.upper_layers() {
            if self.has_room() {
                break;
            }
            layer.remove();
        }
    }

    /// The layers that no other stands on, in the order of their last use. Removes those that nobody finished.
    fn upper_layers(&self) -> Vec<Layer> {
        let mut layers = Vec::new();
        for entry in fs::read_dir(self.snapshots()).into_iter().flatten().flatten() {
            let dir = entry.path();
            match meta(&dir) {
                Some(meta) => {
                    let used = fs::metadata(dir.join("meta.json")).and_then(|file| file.modified());
                    layers.push(Layer { used: used.unwrap_or(SystemTime::UNIX_EPOCH), dir, meta });
                }
                None => self.remove_unfinished(&dir),
            }
        }
        let parents: Vec<String> = layers.iter().filter_map(|layer| layer.meta.parent.clone()).collect();
        layers.retain(|layer| !parents.iter().any(|parent| layer.dir.ends_with(parent)));
        layers.sort_by_key(|layer| layer.used);
        layers
    }

    /// Whether the disk has room left; unknown is yes.
    fn has_room(&self) -> bool {
        nix::sys::statvfs::statvfs(self.cache())
            .is_ok_and(|disk| disk.blocks_available() * disk.fragment_size() >= KEEP_FREE)
    }

    /// Removes a layer that nobody finished, unless somebody is making it.
    fn remove_unfinished(&self, part: &Path) {
        let Some(name) = part.file_stem().filter(|_| part.extension().is_some_and(|ext| ext == "part"))
        else {
            return;
        };
        let lock = self.cache().join("locks").join(name);
        if File::open(lock).is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(part);
        }
    }

    /// Removes the disks of runs that have ended, and the oldest runs; none of those marked to be kept.
    pub(crate) fn prune_runs(&self, runs: &Path) {
        let mut dirs: Vec<_> = fs::read_dir(runs)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.path().is_dir() && !entry.path().join("keep").exists())
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry)))
            .collect();
        dirs.sort_by_key(|(used, _)| *used);
        let surplus = dirs.len().saturating_sub(KEEP_RUNS);
        for (at, (_, entry)) in dirs.iter().enumerate() {
            let lock = runs.join(format!(".{}.lock", entry.file_name().to_string_lossy()));
            let ended = File::open(&lock).is_ok_and(|file| file.try_lock().is_ok());
            if ended && at < surplus {
                let _ = fs::remove_dir_all(entry.path());
                let _ = fs::remove_file(lock);
            } else if ended {
                DISKS.iter().for_each(|disk| drop(fs::remove_file(entry.path().join(disk))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(lab: &Lab, name: &str, parent: Option<&str>) -> PathBuf {
        let dir = lab.snapshots().join(name);
        fs::create_dir_all(&dir).unwrap();
        let config = crate::MachineConfig::new(crate::Series::V6_1, crate::Accel::Tcg);
        let meta = Meta { label: "label".into(), parent: parent.map(Into::into), config };
        fs::write(dir.join("meta.json"), serde_json::to_string(&meta).unwrap()).unwrap();
        dir
    }

    #[test]
    fn a_layer_stays_while_it_is_held_or_stood_on() {
        let cache = tempfile::tempdir().unwrap();
        let lab = Lab::at(cache.path());
        let held = layer(&lab, "held", None);
        let base = layer(&lab, "base", None);
        layer(&lab, "upper", Some("base"));
        let _held = Held::take(&held).unwrap();
        (0..KEEP_LAYERS).for_each(|n| drop(Held::take(&layer(&lab, &format!("other-{n}"), None))));
        lab.prune_snapshots("label");
        assert!(held.exists() && base.exists());
        assert!(!lab.snapshots().join("upper").exists(), "not used, and one too many");
        lab.prune_snapshots("label");
        assert!(held.exists() && !base.exists(), "nothing stands on it any more");
    }

    #[test]
    fn a_run_that_has_ended_loses_its_disks() {
        let cache = tempfile::tempdir().unwrap();
        let lab = Lab::at(cache.path());
        for run in ["ended", "running", "kept"] {
            fs::create_dir_all(cache.path().join(run)).unwrap();
            fs::write(cache.path().join(run).join("disk.qcow2"), "").unwrap();
            fs::write(cache.path().join(format!(".{run}.lock")), "").unwrap();
        }
        fs::write(cache.path().join("kept/keep"), "").unwrap();
        let lock = File::open(cache.path().join(".running.lock")).unwrap();
        lock.lock().unwrap();
        lab.prune_runs(cache.path());
        let has_disk = |run: &str| cache.path().join(run).join("disk.qcow2").exists();
        assert_eq!(["ended", "running", "kept"].map(has_disk), [false, true, true]);
    }
}
