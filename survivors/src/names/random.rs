//! Random operations on files, and a model of what they have to lead to. The crash meets it amid one of them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use rustix::fs::{CWD, FallocateFlags, RenameFlags};

use crate::Stage;
use crate::prng::Prng;
use crate::procfs::same;

/// Directories and files, at most.
const MOST: usize = 250;
/// Bytes of a file, at most.
const LARGEST: u64 = 200_000;
/// Files without a name that are kept open, at most.
const HELD: usize = 6;
/// Operations between two looks at the kernel.
const BURST: usize = 25;

/// Number of an inode of the model.
type Ino = usize;

/// What a name leads to.
#[derive(Clone, Debug)]
enum Kind {
    Directory(BTreeMap<String, Ino>),
    File(Vec<u8>),
    Link(String),
}

#[derive(Clone, Debug)]
struct Inode {
    kind: Kind,
    mode: u32,
}

/// The tree as it has to be, and the hand that changes it.
struct Model {
    top: PathBuf,
    inodes: BTreeMap<Ino, Inode>,
    next: Ino,
    held: Vec<(Ino, File)>,
    prng: Prng,
    /// What was done last, for people.
    log: Vec<String>,
}

const TOP: Ino = 0;

impl Model {
    fn new(top: PathBuf, seed: u64) -> Self {
        let root = Inode { kind: Kind::Directory(BTreeMap::new()), mode: 0o755 };
        let inodes = BTreeMap::from([(TOP, root)]);
        Self { top, inodes, next: 1, held: Vec::new(), prng: Prng::new(seed), log: Vec::new() }
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.prng.next() % limit.max(1) as u64) as usize
    }

    fn names_in(&self, directory: Ino) -> &BTreeMap<String, Ino> {
        static NONE: BTreeMap<String, Ino> = BTreeMap::new();
        match self.inodes.get(&directory).map(|inode| &inode.kind) {
            Some(Kind::Directory(names)) => names,
            _ => &NONE,
        }
    }

    fn names_mut(&mut self, directory: Ino) -> Option<&mut BTreeMap<String, Ino>> {
        match self.inodes.get_mut(&directory).map(|inode| &mut inode.kind) {
            Some(Kind::Directory(names)) => Some(names),
            _ => None,
        }
    }

    /// All names: directory, name, path below the top, inode.
    fn all(&self) -> Vec<(Ino, String, PathBuf, Ino)> {
        let mut all = Vec::new();
        let mut todo = vec![(TOP, PathBuf::new())];
        while let Some((directory, path)) = todo.pop() {
            for (name, ino) in self.names_in(directory) {
                let path = path.join(name);
                if let Some(Inode { kind: Kind::Directory(_), .. }) = self.inodes.get(ino) {
                    todo.push((*ino, path.clone()));
                }
                all.push((directory, name.clone(), path, *ino));
            }
        }
        all
    }

    fn pick(&mut self, wanted: fn(&Kind) -> bool) -> Option<(Ino, String, PathBuf, Ino)> {
        let mut all = self.all();
        all.retain(|(.., ino)| self.inodes.get(ino).is_some_and(|inode| wanted(&inode.kind)));
        if all.is_empty() {
            return None;
        }
        let n = self.below(all.len());
        Some(all.swap_remove(n))
    }

    /// A directory, and its path.
    fn directory(&mut self) -> (Ino, PathBuf) {
        let some = self
            .pick(|kind| matches!(kind, Kind::Directory(_)))
            .filter(|_| !self.prng.next().is_multiple_of(4));
        some.map_or((TOP, PathBuf::new()), |(.., path, ino)| (ino, path))
    }

    /// A place where there may be something, or not.
    fn place(&mut self) -> (Ino, String, PathBuf) {
        let (directory, path) = self.directory();
        let name = format!("{}{}", ["a", "b", "file", "name"][self.below(4)], self.below(12));
        let path = path.join(&name);
        (directory, name, path)
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.top.join(path)
    }

    fn put(&mut self, directory: Ino, name: String, kind: Kind, mode: u32) {
        let ino = self.next;
        self.next += 1;
        self.inodes.insert(ino, Inode { kind, mode });
        if let Some(names) = self.names_mut(directory) {
            names.insert(name, ino);
        }
    }

    fn content(&mut self, ino: Ino) -> Option<&mut Vec<u8>> {
        match self.inodes.get_mut(&ino).map(|inode| &mut inode.kind) {
            Some(Kind::File(content)) => Some(content),
            _ => None,
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = [1, 10, 300, 4096, 5000, 40_000][self.below(6)];
        crate::prng::bytes(self.prng.next(), 1 + self.below(len))
    }

    /// Does one thing to the tree and to the model. What the file system refuses, the model must have refused.
    fn act(&mut self) -> Result<()> {
        match self.below(20) {
            0 | 1 => self.create(),
            2..=5 => self.write(),
            6 => self.truncate(),
            7 => self.make_hole(),
            8..=10 => self.rename(),
            11 => self.exchange(),
            12 => self.link(),
            13 => self.unlink(),
            14 => self.mkdir(),
            15 => self.rmdir(),
            16 => self.symlink(),
            17 => self.chmod(),
            18 => self.hold(),
            _ => self.sync(),
        }
    }

    fn note(&mut self, text: String) {
        self.log.push(text);
    }

    fn create(&mut self) -> Result<()> {
        let (directory, name, path) = self.place();
        if self.names_in(directory).contains_key(&name) {
            return Ok(());
        }
        let mode = [0o600, 0o644, 0o751][self.below(3)];
        self.note(format!("create {}", path.display()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.at(&path));
        let file = file.with_context(|| format!("{:?}", self.log.last()))?;
        let bytes = self.bytes();
        file.write_all_at(&bytes, 0)?;
        file.set_permissions(PermissionsExt::from_mode(mode))?;
        self.put(directory, name, Kind::File(bytes), mode);
        Ok(())
    }

    /// Whether it went as it had to.
    fn expect(&mut self, result: Result<(), &io::Error>, possible: bool) -> Result<bool> {
        match (result, possible) {
            (Ok(()), true) => Ok(true),
            (Err(_), false) => Ok(false),
            (Ok(()), false) => bail!("{:?} should have failed", self.log.last()),
            (Err(error), true) => bail!("{:?}: {error}", self.log.last()),
        }
    }

    fn write(&mut self) -> Result<()> {
        let Some((.., path, ino)) = self.pick(|kind| matches!(kind, Kind::File(_))) else { return Ok(()) };
        let bytes = self.bytes();
        let len = self.content(ino).map_or(0, |content| content.len());
        let at = match self.below(3) {
            0 => len,
            1 => self.below(len + 1),
            _ => self.below(LARGEST as usize),
        };
        self.note(format!("write {} at {at}, {} bytes", path.display(), bytes.len()));
        OpenOptions::new().write(true).open(self.at(&path))?.write_all_at(&bytes, at as u64)?;
        if let Some(content) = self.content(ino) {
            content.resize(content.len().max(at + bytes.len()), 0);
            content[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn truncate(&mut self) -> Result<()> {
        let Some((.., path, ino)) = self.pick(|kind| matches!(kind, Kind::File(_))) else { return Ok(()) };
        let len = if self.below(3) == 0 { 0 } else { self.below(LARGEST as usize) };
        self.note(format!("truncate {} to {len}", path.display()));
        OpenOptions::new().write(true).open(self.at(&path))?.set_len(len as u64)?;
        if let Some(content) = self.content(ino) {
            content.resize(len, 0);
        }
        Ok(())
    }

    fn make_hole(&mut self) -> Result<()> {
        let Some((.., path, ino)) = self.pick(|kind| matches!(kind, Kind::File(_))) else { return Ok(()) };
        let (at, len) = (self.below(LARGEST as usize), 1 + self.below(50_000));
        self.note(format!("punch {} at {at}, {len} bytes", path.display()));
        let file = OpenOptions::new().write(true).open(self.at(&path))?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, at as u64, len as u64)?;
        if let Some(content) = self.content(ino) {
            let end = (at + len).min(content.len());
            if let Some(hole) = content.get_mut(at..end) {
                hole.fill(0);
            }
        }
        Ok(())
    }

    fn is_directory(&self, ino: Ino) -> bool {
        matches!(self.inodes.get(&ino), Some(Inode { kind: Kind::Directory(_), .. }))
    }

    fn rename(&mut self) -> Result<()> {
        let Some((from, old, old_path, ino)) = self.pick(|_| true) else { return Ok(()) };
        let (to, new, new_path) = self.place();
        let target = self.names_in(to).get(&new).copied();
        let into_itself = new_path.starts_with(&old_path) && new_path != old_path;
        let possible = match target {
            _ if into_itself && self.is_directory(ino) => false,
            None => true,
            // Two names of one file: nothing happens.
            Some(target) if target == ino => true,
            Some(target) if self.is_directory(ino) => {
                self.is_directory(target) && self.names_in(target).is_empty()
            }
            Some(target) => !self.is_directory(target),
        };
        self.note(format!("rename {} to {}", old_path.display(), new_path.display()));
        let done = fs::rename(self.at(&old_path), self.at(&new_path));
        if self.expect(done.as_ref().map(drop), possible)? && target != Some(ino) {
            self.take(from, &old);
            if let Some(names) = self.names_mut(to) {
                names.insert(new, ino);
            }
        }
        Ok(())
    }

    fn take(&mut self, directory: Ino, name: &str) {
        if let Some(names) = self.names_mut(directory) {
            names.remove(name);
        }
    }

    fn exchange(&mut self) -> Result<()> {
        let (Some(one), Some(other)) = (self.pick(|_| true), self.pick(|_| true)) else { return Ok(()) };
        if one.2.starts_with(&other.2) || other.2.starts_with(&one.2) {
            return Ok(());
        }
        self.note(format!("exchange {} and {}", one.2.display(), other.2.display()));
        rustix::fs::renameat_with(CWD, self.at(&one.2), CWD, self.at(&other.2), RenameFlags::EXCHANGE)?;
        for (directory, name, ino) in [(one.0, one.1, other.3), (other.0, other.1, one.3)] {
            if let Some(names) = self.names_mut(directory) {
                names.insert(name, ino);
            }
        }
        Ok(())
    }

    fn link(&mut self) -> Result<()> {
        let Some((.., path, ino)) = self.pick(|kind| !matches!(kind, Kind::Directory(_))) else {
            return Ok(());
        };
        let (directory, name, new_path) = self.place();
        let is_free = !self.names_in(directory).contains_key(&name);
        self.note(format!("link {} to {}", path.display(), new_path.display()));
        let done = fs::hard_link(self.at(&path), self.at(&new_path));
        if self.expect(done.as_ref().map(drop), is_free)?
            && let Some(names) = self.names_mut(directory)
        {
            names.insert(name, ino);
        }
        Ok(())
    }

    fn unlink(&mut self) -> Result<()> {
        let few = self.inodes.len() < MOST / 2 && self.below(2) == 0;
        let Some((directory, name, path, _)) = self.pick(|kind| !matches!(kind, Kind::Directory(_))) else {
            return Ok(());
        };
        if few {
            return Ok(());
        }
        self.note(format!("unlink {}", path.display()));
        fs::remove_file(self.at(&path))?;
        self.take(directory, &name);
        Ok(())
    }

    fn mkdir(&mut self) -> Result<()> {
        let (directory, name, path) = self.place();
        if path.components().count() > 6 {
            return Ok(());
        }
        let is_free = !self.names_in(directory).contains_key(&name);
        self.note(format!("mkdir {}", path.display()));
        let done = fs::create_dir(self.at(&path));
        if self.expect(done.as_ref().map(drop), is_free)? {
            fs::set_permissions(self.at(&path), PermissionsExt::from_mode(0o750))?;
            self.put(directory, name, Kind::Directory(BTreeMap::new()), 0o750);
        }
        Ok(())
    }

    fn rmdir(&mut self) -> Result<()> {
        let some = self.pick(|kind| matches!(kind, Kind::Directory(_)));
        let Some((directory, name, path, ino)) = some else { return Ok(()) };
        let all = self.below(6) == 0;
        self.note(format!("{} {}", if all { "remove all in" } else { "rmdir" }, path.display()));
        let is_empty = self.names_in(ino).is_empty();
        let done = if all { fs::remove_dir_all(self.at(&path)) } else { fs::remove_dir(self.at(&path)) };
        if self.expect(done.as_ref().map(drop), all || is_empty)? {
            self.take(directory, &name);
        }
        Ok(())
    }

    fn symlink(&mut self) -> Result<()> {
        let (directory, name, path) = self.place();
        let is_free = !self.names_in(directory).contains_key(&name);
        let target = "t".repeat(1 + self.below(150));
        self.note(format!("symlink {}", path.display()));
        let done = symlink(&target, self.at(&path));
        if self.expect(done.as_ref().map(drop), is_free)? {
            self.put(directory, name, Kind::Link(target), 0o777);
        }
        Ok(())
    }

    fn chmod(&mut self) -> Result<()> {
        let Some((.., path, ino)) = self.pick(|kind| !matches!(kind, Kind::Link(_))) else { return Ok(()) };
        let mode = 0o700 | self.below(0o100) as u32;
        self.note(format!("chmod {} {mode:o}", path.display()));
        fs::set_permissions(self.at(&path), PermissionsExt::from_mode(mode))?;
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.mode = mode;
        }
        Ok(())
    }

    /// Opens a file and removes one of its names; or lets go of such a one.
    fn hold(&mut self) -> Result<()> {
        if self.held.len() >= HELD {
            let n = self.below(self.held.len());
            self.held.swap_remove(n);
            return Ok(());
        }
        let some = self.pick(|kind| matches!(kind, Kind::File(_)));
        let Some((directory, name, path, ino)) = some else { return Ok(()) };
        // A file that loses one of several names has another one that is not known to whoever has it open.
        if self.all().iter().filter(|(.., other)| *other == ino).count() > 1 {
            return Ok(());
        }
        self.note(format!("unlink {} while it is open", path.display()));
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOATIME).open(self.at(&path))?;
        fs::remove_file(self.at(&path))?;
        self.take(directory, &name);
        self.held.push((ino, file));
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        let Some((.., path, _)) = self.pick(|kind| matches!(kind, Kind::File(_))) else { return Ok(()) };
        let file = File::open(self.at(&path))?;
        let how = self.below(12);
        self.note(format!("sync {how} {}", path.display()));
        match how {
            0 => file.sync_all()?,
            1 => file.sync_data()?,
            2..=4 => {
                let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                nix::fcntl::posix_fadvise(&file, 0, 0, advice)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Forgets inodes that nothing leads to.
    fn sweep(&mut self) {
        let mut alive: std::collections::BTreeSet<Ino> =
            self.all().into_iter().map(|(.., ino)| ino).collect();
        alive.extend(self.held.iter().map(|(ino, _)| *ino));
        self.inodes.retain(|ino, _| *ino == TOP || alive.contains(ino));
        let behind = self.log.len().saturating_sub(2000);
        self.log.drain(..behind);
    }

    /// Compares all there is.
    fn check(&self) -> Result<()> {
        let all = self.all();
        let mut counts: BTreeMap<Ino, u64> = BTreeMap::new();
        all.iter().for_each(|(.., ino)| *counts.entry(*ino).or_default() += 1);
        for (.., path, ino) in &all {
            let shown = path.display();
            let inode = self.inodes.get(ino).context("a hole in the model")?;
            let meta =
                fs::symlink_metadata(self.at(path)).with_context(|| format!("{shown} is not there"))?;
            match &inode.kind {
                Kind::Directory(names) => {
                    ensure!(meta.is_dir(), "{shown} is no directory");
                    let mut found: Vec<String> = fs::read_dir(self.at(path))?
                        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                        .collect::<io::Result<_>>()?;
                    found.sort();
                    same(&format!("names in {shown}"), &names.keys().cloned().collect::<Vec<_>>(), &found)?;
                }
                Kind::File(content) => {
                    ensure!(meta.is_file(), "{shown} is no file");
                    differ(&shown.to_string(), content, &fs::read(self.at(path))?)?;
                }
                Kind::Link(target) => {
                    let found =
                        fs::read_link(self.at(path)).with_context(|| format!("{shown} is no link"))?;
                    same(&shown.to_string(), &PathBuf::from(target), &found)?;
                }
            }
            if !matches!(inode.kind, Kind::Link(_)) {
                same(&format!("mode of {shown}"), &inode.mode, &(meta.mode() & 0o7777))?;
            }
            if !matches!(inode.kind, Kind::Directory(_)) {
                same(&format!("links of {shown}"), &counts[ino], &meta.nlink())?;
            }
        }
        let mut names: Vec<String> = fs::read_dir(&self.top)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<_>>()?;
        names.sort();
        same("names at the top", &self.names_in(TOP).keys().cloned().collect::<Vec<_>>(), &names)?;
        for (ino, file) in &self.held {
            let Some(Inode { kind: Kind::File(content), .. }) = self.inodes.get(ino) else { continue };
            let mut found = vec![0; file.metadata()?.len() as usize];
            file.read_exact_at(&mut found, 0)?;
            differ(&format!("file {ino} without a name"), content, &found)?;
        }
        Ok(())
    }
}

fn differ(what: &str, expected: &[u8], found: &[u8]) -> Result<()> {
    same(&format!("length of {what}"), &expected.len(), &found.len())?;
    let first = expected.iter().zip(found).position(|(a, b)| a != b);
    ensure!(first.is_none(), "{what} is different from byte {} of {} on", first.unwrap_or(0), expected.len());
    Ok(())
}

/// Does so many operations in a directory that is made for it.
pub fn operate(dir: &Path, seed: u64, count: u32) -> Result<()> {
    fs::create_dir(dir)?;
    let mut model = Model::new(dir.to_owned(), seed);
    for _ in 0..count {
        model.act()?;
    }
    model.check()
}

/// The survivor.
pub fn random(stage: &mut Stage) -> Result<()> {
    let seed = {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        u64::from_ne_bytes(bytes)
    };
    let top = stage.path("tree");
    fs::create_dir_all(&top)?;
    let mut model = Model::new(top, seed);
    for _ in 0..400 {
        model.act()?;
    }
    model.check().context("before the crash")?;
    stage.ready()?;
    while !stage.in_another_kernel() {
        for _ in 0..BURST {
            model.act()?;
        }
        model.sweep();
    }
    let crash = stage.wait();
    if crash.damage {
        fs::write(model.top.join("damage"), "")?;
    }
    let checked = model.check();
    if checked.is_err() {
        let log = File::create(stage.path("log"))?;
        log.write_all_at(model.log.join("\n").as_bytes(), 0)?;
        log.sync_all()?;
    }
    checked.with_context(|| format!("seed {seed}"))
}
