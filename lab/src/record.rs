//! A recording of `/proc`: what the running kernel says of all its processes, to be held against what autopsy reads later
//! and against what the resurrected processes show.
//!
//! Paths are relative to `/proc` (`274/status`, `274/task/275/stat`, `274/fd/3`); machine-wide files are `_/NAME`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Files of each process.
const PROCESS_FILES: &[&str] = &[
    "stat",
    "status",
    "maps",
    "smaps",
    "limits",
    "cmdline",
    "environ",
    "auxv",
    "cgroup",
    "oom_score_adj",
    "comm",
    "statm",
    "coredump_filter",
    "personality",
    "timens_offsets",
    "timers",
    "syscall",
    "wchan",
    "mountinfo",
    "loginuid",
    "timerslack_ns",
];
/// Links of each process.
const PROCESS_LINKS: &[&str] = &["exe", "cwd", "root"];
/// Files of each thread.
const THREAD_FILES: &[&str] =
    &["stat", "status", "comm", "syscall", "wchan", "personality", "children", "stack"];
/// Machine-wide files.
const MACHINE_FILES: &[&str] = &[
    "uptime",
    "version",
    "cmdline",
    "meminfo",
    "iomem",
    "modules",
    "mounts",
    "locks",
    "kallsyms",
    "stat",
    "swaps",
    "net/tcp",
    "net/tcp6",
    "net/udp",
    "net/udp6",
    "net/raw",
    "net/unix",
    "net/netlink",
    "net/packet",
];

/// One recorded thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A file's contents.
    File(Vec<u8>),
    /// A symbolic link's target.
    Link(Vec<u8>),
    /// It was there, and reading it failed with this errno.
    Error(i32),
}

/// A recording; see the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// What was recorded, by its path below `/proc`.
    pub entries: BTreeMap<PathBuf, Entry>,
}

impl Record {
    /// Records all processes of the machine that this runs on. A process that ends meanwhile is recorded as far as it was there.
    pub fn take() -> Self {
        let mut record = Self::default();
        let proc = Path::new("/proc");
        for name in MACHINE_FILES {
            record.file(&proc.join(name), Path::new("_").join(name));
        }
        let mut pids: Vec<PathBuf> = numbers(proc);
        pids.sort();
        for pid in pids {
            let dir = proc.join(&pid);
            for name in PROCESS_FILES {
                record.file(&dir.join(name), pid.join(name));
            }
            for name in PROCESS_LINKS {
                record.link(&dir.join(name), pid.join(name));
            }
            for kind in ["fd", "ns"] {
                for name in names(&dir.join(kind)) {
                    record.link(&dir.join(kind).join(&name), pid.join(kind).join(&name));
                }
            }
            for name in names(&dir.join("fdinfo")) {
                record.file(&dir.join("fdinfo").join(&name), pid.join("fdinfo").join(&name));
            }
            for tid in numbers(&dir.join("task")) {
                for name in THREAD_FILES {
                    record.file(
                        &dir.join("task").join(&tid).join(name),
                        pid.join("task").join(&tid).join(name),
                    );
                }
            }
        }
        // Last: what is read above makes thousands of objects.
        record.file(&proc.join("slabinfo"), Path::new("_").join("slabinfo"));
        record
    }

    /// The process ids in it.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids: Vec<i32> =
            self.entries.keys().filter_map(|path| path.iter().next()?.to_str()?.parse().ok()).collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// A file as text (`"274/status"`); none if it was not recorded.
    pub fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        match self.entries.get(path.as_ref())? {
            Entry::File(data) => Some(String::from_utf8_lossy(data).into_owned()),
            _ => None,
        }
    }

    /// A link's target as text.
    pub fn target(&self, path: impl AsRef<Path>) -> Option<String> {
        match self.entries.get(path.as_ref())? {
            Entry::Link(data) => Some(String::from_utf8_lossy(data).into_owned()),
            _ => None,
        }
    }

    /// The names directly below a directory of the recording, for example the descriptors below `274/fd`.
    pub fn list(&self, dir: impl AsRef<Path>) -> Vec<String> {
        let dir = dir.as_ref();
        let mut names: Vec<String> = self
            .entries
            .keys()
            .filter_map(|path| {
                Some(path.strip_prefix(dir).ok()?.iter().next()?.to_string_lossy().into_owned())
            })
            .collect();
        names.dedup();
        names
    }

    /// Writes it as plain files below `dir`; links become symbolic links, errors become `NAME.err`.
    pub fn write_to(&self, dir: &Path) -> io::Result<()> {
        for (path, entry) in &self.entries {
            let to = dir.join(path);
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent)?;
            }
            match entry {
                Entry::File(data) => std::fs::write(to, data)?,
                Entry::Link(data) => std::os::unix::fs::symlink(OsStr::from_bytes(data), to)?,
                Entry::Error(errno) => std::fs::write(to.with_extension("err"), format!("errno {errno}\n"))?,
            }
        }
        Ok(())
    }

    /// To bytes, for the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (path, entry) in &self.entries {
            let errno;
            let (kind, data): (u8, &[u8]) = match entry {
                Entry::File(data) => (0, data),
                Entry::Link(data) => (1, data),
                Entry::Error(n) => {
                    errno = n.to_le_bytes();
                    (2, &errno)
                }
            };
            out.push(kind);
            for part in [path.as_os_str().as_bytes(), data] {
                out.extend_from_slice(&(part.len() as u32).to_le_bytes());
                out.extend_from_slice(part);
            }
        }
        out
    }

    /// From bytes; none if they are cut or malformed.
    pub fn decode(mut wire: &[u8]) -> Option<Self> {
        let mut record = Self::default();
        while let Some((&kind, rest)) = wire.split_first() {
            let (path, rest) = part(rest)?;
            let (data, rest) = part(rest)?;
            let entry = match kind {
                0 => Entry::File(data.to_vec()),
                1 => Entry::Link(data.to_vec()),
                2 => Entry::Error(i32::from_le_bytes(data.try_into().ok()?)),
                _ => return None,
            };
            record.entries.insert(OsStr::from_bytes(path).into(), entry);
            wire = rest;
        }
        Some(record)
    }

    fn file(&mut self, from: &Path, name: PathBuf) {
        let entry = match std::fs::read(from) {
            Ok(data) => Entry::File(data),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => Entry::Error(error.raw_os_error().unwrap_or(0)),
        };
        self.entries.insert(name, entry);
    }

    fn link(&mut self, from: &Path, name: PathBuf) {
        // Kernel threads have no exe; that is ENOENT and no news.
        if let Ok(target) = std::fs::read_link(from) {
            self.entries.insert(name, Entry::Link(target.into_os_string().into_vec()));
        }
    }
}

fn names(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().into()).collect()
}

fn numbers(dir: &Path) -> Vec<PathBuf> {
    names(dir)
        .into_iter()
        .filter(|name| name.to_str().is_some_and(|name| name.parse::<u32>().is_ok()))
        .collect()
}

fn part(wire: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = wire.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*len) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_of_this_machine_has_this_process_and_survives_the_wire() {
        let record = Record::take();
        let me = std::process::id();
        assert!(record.pids().contains(&(me as i32)));
        assert!(record.text(format!("{me}/status")).unwrap().contains("Name:"));
        assert!(record.target(format!("{me}/exe")).is_some());
        assert!(!record.list(format!("{me}/task")).is_empty());
        assert_eq!(Record::decode(&record.encode()), Some(record));
    }

    #[test]
    fn cut_bytes_are_refused() {
        let mut record = Record::default();
        record.entries.insert("1/stat".into(), Entry::File(b"1 (init) S".to_vec()));
        let wire = record.encode();
        for cut in 1..wire.len() {
            assert_eq!(Record::decode(&wire[..cut]), None, "cut at {cut}");
        }
    }
}
