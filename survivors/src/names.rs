//! What was written to a disk file system and not to the disk: contents, names, attributes.
//!
//! All cases are in one process: what they begin with is on the disk before any of them changes something, and nothing is synced after that.

mod random;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::mman::MapFlags;
use rustix::fs::{CWD, FallocateFlags, RenameFlags};

use crate::Stage;
use crate::map::Map;
use crate::prng;
use crate::procfs::same;

pub use random::{operate, random};

const PAGE: usize = 4096;
/// Names in the cases with many of them.
const MANY: usize = 400;
/// The same in the large cases, and bytes of the file in them.
const VERY_MANY: usize = 10_000;
const GIGABYTE: u64 = 1 << 30;
/// Bytes that are read or written at a time.
const BLOCK: usize = 1 << 20;

/// What is to be seen beside the tree in the kernel that comes after.
type After = Box<dyn FnOnce(&Dir) -> Result<()>>;

struct Case {
    name: &'static str,
    /// What the disk has.
    base: fn(&Dir) -> Result<()>,
    /// What it does not have.
    change: fn(&Dir) -> Result<Option<After>>,
}

/// The directory of one case.
struct Dir(PathBuf);

impl Dir {
    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file of `len` bytes of noise; the seed is that of its name, so that no two have the same contents.
    fn file(&self, name: &str, len: usize) -> Result<()> {
        Ok(fs::write(self.at(name), noise(name, len))?)
    }

    fn append(&self, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(OpenOptions::new().append(true).open(self.at(name))?.write_all(bytes)?)
    }

    fn write_at(&self, name: &str, at: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.open(name)?.write_all_at(bytes, at)?)
    }

    fn open(&self, name: &str) -> Result<File> {
        Ok(OpenOptions::new().read(true).write(true).open(self.at(name))?)
    }

    fn set_len(&self, name: &str, len: u64) -> Result<()> {
        Ok(self.open(name)?.set_len(len)?)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        Ok(fs::rename(self.at(from), self.at(to))?)
    }

    fn exchange(&self, one: &str, other: &str) -> Result<()> {
        Ok(rustix::fs::renameat_with(CWD, self.at(one), CWD, self.at(other), RenameFlags::EXCHANGE)?)
    }

    fn link(&self, from: &str, to: &str) -> Result<()> {
        Ok(fs::hard_link(self.at(from), self.at(to))?)
    }

    fn symlink(&self, target: &str, name: &str) -> Result<()> {
        Ok(symlink(target, self.at(name))?)
    }

    fn remove(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.at(name))?)
    }

    fn mkdir(&self, name: &str) -> Result<()> {
        Ok(fs::create_dir_all(self.at(name))?)
    }

    fn chmod(&self, name: &str, mode: u32) -> Result<()> {
        Ok(fs::set_permissions(self.at(name), PermissionsExt::from_mode(mode))?)
    }

    fn fallocate(&self, name: &str, flags: FallocateFlags, at: u64, len: u64) -> Result<()> {
        Ok(rustix::fs::fallocate(self.open(name)?, flags, at, len)?)
    }

    fn set_xattr(&self, name: &str, xattr: &str, value: &[u8]) -> Result<()> {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::lsetxattr(self.at(name), xattr, value, flags)
            .with_context(|| format!("{xattr} of {name}"))
    }

    fn remove_xattr(&self, name: &str, xattr: &str) -> Result<()> {
        Ok(rustix::fs::lremovexattr(self.at(name), xattr)?)
    }

    fn node(&self, name: &str, mode: u32, device: u64) -> Result<()> {
        let (kind, mode) =
            (rustix::fs::FileType::from_raw_mode(mode), rustix::fs::Mode::from_raw_mode(mode & 0o7777));
        Ok(rustix::fs::mknodat(CWD, self.at(name), kind, mode, device)?)
    }

    fn tree(&self, name: &str) -> Result<()> {
        for below in ["a", "a/b", "a/b/c", "d"] {
            self.mkdir(&format!("{name}/{below}"))?;
            self.file(&format!("{name}/{below}/file"), 5000)?;
        }
        self.symlink("a/file", &format!("{name}/link"))
    }
}

fn noise(name: &str, len: usize) -> Vec<u8> {
    prng::bytes(name.bytes().fold(7, |seed, byte| seed * 31 % 1_000_003 + u64::from(byte)), len)
}

fn nothing(_: &Dir) -> Result<()> {
    Ok(())
}

/// Two files of three pages, and a bit.
fn two(dir: &Dir) -> Result<()> {
    dir.file("one", 3 * PAGE + 100)?;
    dir.file("two", 3 * PAGE + 50)
}

fn trees(dir: &Dir) -> Result<()> {
    dir.tree("tree")?;
    dir.tree("other")
}

fn many(dir: &Dir) -> Result<()> {
    (0..MANY).try_for_each(|n| dir.file(&format!("old{n}"), n * 17 % 6000))
}

/// Checks that it is the same file as before, as far as whoever has it open can see.
fn still(mut file: File, contents: Vec<u8>) -> Result<Option<After>> {
    let position = file.stream_position()?;
    let links = file.metadata()?.nlink();
    Ok(Some(Box::new(move |_| {
        same("position", &position, &file.stream_position()?)?;
        same("links", &links, &file.metadata()?.nlink())?;
        let mut now = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut now)?;
        ensure!(now == contents, "what is open has other contents");
        file.seek(SeekFrom::End(0))?;
        file.write_all(b"more")?;
        same("length", &(contents.len() as u64 + 4), &file.metadata()?.len())
    })))
}

macro_rules! cases {
    ($($name:literal $base:ident |$dir:ident| $change:block)*) => {
        const CASES: &[Case] = &[$(Case { name: $name, base: $base, change: |$dir| { $change; Ok(None) } }),*];
    };
}

cases! {
    "new" nothing |dir| { dir.file("new", 10_000)?; }
    "new-empty" nothing |dir| { dir.file("new", 0)?; }
    "new-of-one-page" nothing |dir| { dir.file("new", PAGE)?; }
    "new-large" nothing |dir| { dir.file("new", 16 << 20)?; }
    "new-with-mode" nothing |dir| { dir.file("new", 100)?; dir.chmod("new", 0o4751)?; }
    "new-in-new-directories" nothing |dir| { dir.mkdir("a/b/c/d")?; dir.file("a/b/c/d/new", 100)?; }
    "new-for-others" nothing |dir| { dir.file("new", 100)?; std::os::unix::fs::chown(dir.at("new"), Some(12), Some(34))?; }
    "append" two |dir| { dir.append("one", b"a little more")?; }
    "append-pages" two |dir| { dir.append("one", &noise("more", 5 * PAGE))?; }
    "append-often" two |dir| { (0..300).try_for_each(|n| dir.append("one", format!("line {n}\n").as_bytes()))?; }
    "truncate-to-nothing" two |dir| { dir.set_len("one", 0)?; }
    "truncate-shorter" two |dir| { dir.set_len("one", 5000)?; }
    "truncate-longer" two |dir| { dir.set_len("one", 100_000)?; }
    "truncate-and-back" two |dir| { dir.set_len("one", 10)?; dir.set_len("one", 3 * PAGE as u64 + 100)?; }
    "truncate-and-write-behind" two |dir| { dir.set_len("one", 0)?; dir.write_at("one", 2 * PAGE as u64, b"behind a hole")?; }
    "rewrite" two |dir| { dir.file("one", 0)?; fs::write(dir.at("one"), noise("rewritten", 2 * PAGE))?; }
    "overwrite" two |dir| { dir.write_at("one", 4000, &noise("over", 200))?; }
    "overwrite-all" two |dir| { dir.write_at("one", 0, &noise("over", 3 * PAGE + 100))?; }
    "rename" two |dir| { dir.rename("one", "renamed")?; }
    "rename-and-write" two |dir| { dir.rename("one", "renamed")?; dir.append("renamed", b"more")?; }
    "rename-over" two |dir| { dir.rename("one", "two")?; }
    "rename-new-over" two |dir| { dir.file("tmp", 7000)?; dir.rename("tmp", "one")?; }
    "rename-new-over-twice" two |dir| { for n in 0..2 { dir.file("tmp", 7000 + n)?; dir.rename("tmp", "one")?; } }
    "rename-chain" two |dir| { dir.rename("two", "three")?; dir.rename("one", "two")?; dir.file("one", 10)?; }
    "rename-to-and-fro" two |dir| { dir.rename("one", "three")?; dir.rename("three", "one")?; }
    "rename-in-a-ring" two |dir| { dir.rename("one", "t")?; dir.rename("two", "one")?; dir.rename("t", "two")?; }
    "rename-into-another-directory" trees |dir| { dir.rename("tree/a/file", "other/d/moved")?; }
    "rename-into-a-new-directory" two |dir| { dir.mkdir("new")?; dir.rename("one", "new/one")?; }
    "exchange" two |dir| { dir.exchange("one", "two")?; }
    "exchange-file-and-directory" trees |dir| { dir.exchange("tree/a", "tree/d/file")?; }
    "directory-renamed" trees |dir| { dir.rename("tree", "renamed")?; }
    "directory-renamed-and-changed" trees |dir| { dir.rename("tree", "renamed")?; dir.append("renamed/a/b/file", b"x")?; dir.remove("renamed/a/file")?; dir.file("renamed/a/b/new", 10)?; }
    "directory-over-an-empty-one" trees |dir| { dir.mkdir("empty")?; dir.rename("tree/a", "empty")?; }
    "directory-into-another" trees |dir| { dir.rename("tree/a", "other/d/a")?; }
    "directory-out-and-its-parent-gone" trees |dir| { dir.rename("tree/a/b", "b")?; fs::remove_dir_all(dir.at("tree"))?; }
    "directory-in-place-of-its-parent" trees |dir| { dir.rename("tree", "t")?; dir.rename("t/a", "tree")?; }
    "directory-and-parent-change-places" trees |dir| { dir.rename("tree/a", "a")?; dir.rename("tree", "a/tree")?; }
    "directories-exchanged" trees |dir| { dir.exchange("tree/a", "other/d")?; }
    "directory-new" nothing |dir| { dir.mkdir("new")?; dir.chmod("new", 0o1770)?; }
    "directory-tree-new" nothing |dir| { dir.tree("new")?; }
    "directory-removed" two |dir| { dir.mkdir("gone")?; fs::remove_dir(dir.at("gone"))?; }
    "directory-tree-removed" trees |dir| { fs::remove_dir_all(dir.at("tree"))?; }
    "directory-tree-removed-and-made-anew" trees |dir| { fs::remove_dir_all(dir.at("tree"))?; dir.mkdir("tree/a")?; dir.file("tree/a/file", 77)?; }
    "directory-becomes-file" trees |dir| { fs::remove_dir_all(dir.at("tree"))?; dir.file("tree", 100)?; }
    "file-becomes-directory" two |dir| { dir.remove("one")?; dir.tree("one")?; }
    "file-becomes-link" two |dir| { dir.remove("one")?; dir.symlink("two", "one")?; }
    "link" two |dir| { dir.link("one", "linked")?; }
    "link-new" nothing |dir| { dir.file("new", 5000)?; dir.link("new", "linked")?; dir.mkdir("d")?; dir.link("new", "d/linked")?; }
    "link-and-remove" two |dir| { dir.link("one", "linked")?; dir.remove("one")?; dir.append("linked", b"x")?; }
    "remove" two |dir| { dir.remove("one")?; }
    "remove-and-make-anew" two |dir| { dir.remove("one")?; dir.file("one", 9000)?; }
    "remove-one-of-two-links" two |dir| { dir.link("one", "linked")?; dir.remove("linked")?; }
    "symlink" two |dir| { dir.symlink("one", "link")?; dir.symlink("nowhere", "dangling")?; }
    "symlink-long" nothing |dir| { dir.symlink(&"long/".repeat(50), "link")?; }
    "symlink-replaced" two |dir| { dir.symlink("one", "link")?; dir.symlink("two", "tmp")?; dir.rename("tmp", "link")?; }
    "fifo" nothing |dir| { dir.node("fifo", 0o010_640, 0)?; }
    "socket" nothing |dir| { dir.node("socket", 0o140_755, 0)?; }
    "device" nothing |dir| { dir.node("null", 0o020_666, rustix::fs::makedev(1, 3))?; dir.node("block", 0o060_600, rustix::fs::makedev(7, 99))?; }
    "long-names" nothing |dir| { for n in 0..9 { dir.file(&format!("{n}{}", "n".repeat(254)), 20)?; } }
    "odd-names" nothing |dir| { for name in [&b"new\nline"[..], b" ", b"\xff\xfe", b"-rf", b"*?'\""] { fs::write(dir.0.join(OsStr::from_bytes(name)), name)?; } }
    "sparse" nothing |dir| { dir.file("new", 0)?; for n in 1..4u64 { dir.write_at("new", n << 24, b"island")?; } }
    "sparse-holes-filled" sparse |dir| { dir.write_at("sparse", 1 << 20, &noise("fill", 2 * PAGE))?; }
    "hole-punched" two |dir| { dir.fallocate("one", FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, PAGE as u64, PAGE as u64)?; }
    "fallocate" two |dir| { dir.fallocate("one", FallocateFlags::empty(), 0, 20 * PAGE as u64)?; }
    "fallocate-beyond-the-end" two |dir| { dir.fallocate("one", FallocateFlags::KEEP_SIZE, 0, 20 * PAGE as u64)?; dir.append("one", b"x")?; }
    "range-zeroed" two |dir| { dir.fallocate("one", FallocateFlags::ZERO_RANGE, 100, 2 * PAGE as u64)?; }
    "mode" two |dir| { dir.chmod("one", 0o2710)?; }
    "owner" two |dir| { std::os::unix::fs::chown(dir.at("one"), Some(56), Some(78))?; }
    "times" two |dir| { set_times(&dir.at("one"), 1_234_567_890, 1_000_000_001)?; set_times(&dir.at("two"), 5, 6)?; }
    "times-of-a-directory" trees |dir| { set_times(&dir.at("tree/a"), 1_234_567_890, 1_000_000_001)?; }
    "mode-of-a-directory" trees |dir| { dir.chmod("tree/a", 0o700)?; dir.chmod("tree", 0o2755)?; }
    "xattr-of-a-new-file" nothing |dir| { dir.file("new", 100)?; dir.set_xattr("new", "user.colour", b"red")?; dir.set_xattr("new", "trusted.empty", b"")?; }
    "xattr-new" two |dir| { dir.set_xattr("one", "user.colour", b"red")?; }
    "xattr-large" two |dir| { dir.set_xattr("one", "user.large", &noise("large", 3000))?; dir.set_xattr("two", "user.large", &noise("large", 3000))?; }
    "xattr-changed" with_xattrs |dir| { dir.set_xattr("one", "user.one", b"another value, and a longer one than before")?; dir.set_xattr("one", "user.large", b"small now")?; }
    "xattr-removed" with_xattrs |dir| { dir.remove_xattr("one", "user.two")?; dir.remove_xattr("one", "user.large")?; }
    "xattr-of-all-kinds" two |dir| { dir.mkdir("d")?; dir.symlink("one", "link")?; for name in ["one", "d", "link"] { dir.set_xattr(name, "trusted.kind", name.as_bytes())?; } }
    "xattr-capability" two |dir| { dir.set_xattr("one", "security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])?; }
    "xattr-access-control-lists" two |dir| { dir.mkdir("d")?; dir.set_xattr("one", ACL_ACCESS, &acl(6))?; dir.set_xattr("d", ACL_ACCESS, &acl(5))?; dir.set_xattr("d", ACL_DEFAULT, &acl(7))?; dir.file("d/heir", 10)?; }
    "many-new" nothing |dir| { many(dir)?; }
    "many-removed" many |dir| { (0..MANY).step_by(2).try_for_each(|n| dir.remove(&format!("old{n}")))?; }
    "many-renamed" many |dir| { (0..MANY).try_for_each(|n| dir.rename(&format!("old{n}"), &format!("new{}", n * 7 % MANY)))?; }
    "many-rewritten" many |dir| { (0..MANY).try_for_each(|n| Ok::<_, anyhow::Error>(fs::write(dir.at(&format!("old{n}")), noise("again", n * 13 % 7000))?))?; }
    "concurrent-writers" two |dir| { concurrent(dir)?; }
}

/// Those that take a machine with more memory. The page cache has all of it.
const LARGE: &[Case] = &[
    Case {
        name: "very-many-new",
        base: nothing,
        change: |dir| {
            for n in 0..VERY_MANY {
                dir.file(&format!("small{n}"), n * 7 % 300)?;
            }
            Ok(None)
        },
    },
    Case {
        name: "one-gigabyte",
        base: nothing,
        change: |dir| {
            let mut block = noise("large", BLOCK);
            let mut file = File::create(dir.at("large"))?;
            for n in 0..GIGABYTE / BLOCK as u64 {
                block[..8].copy_from_slice(&n.to_le_bytes());
                file.write_all(&block)?;
            }
            Ok(None)
        },
    },
];

/// Those in which something stays open.
const OPEN: &[Case] = &[
    Case {
        name: "removed-and-open",
        base: two,
        change: |dir| {
            let file = dir.open("one")?;
            dir.remove("one")?;
            still(file, noise("one", 3 * PAGE + 100))
        },
    },
    Case {
        name: "removed-after-a-change-and-open",
        base: two,
        change: |dir| {
            let mut file = dir.open("one")?;
            file.write_all(b"changed")?;
            dir.remove("one")?;
            let mut contents = noise("one", 3 * PAGE + 100);
            contents[..7].copy_from_slice(b"changed");
            still(file, contents)
        },
    },
    Case {
        name: "replaced-and-open",
        base: two,
        change: |dir| {
            let file = dir.open("two")?;
            dir.rename("one", "two")?;
            still(file, noise("two", 3 * PAGE + 50))
        },
    },
    Case {
        name: "new-removed-and-open",
        base: nothing,
        change: |dir| {
            dir.file("new", 20_000)?;
            let file = dir.open("new")?;
            dir.remove("new")?;
            still(file, noise("new", 20_000))
        },
    },
    Case {
        name: "never-named",
        base: nothing,
        change: |dir| {
            let mut options = OpenOptions::new();
            let mut file =
                options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(&dir.0)?;
            file.write_all(&noise("nameless", 9000))?;
            still(file, noise("nameless", 9000))
        },
    },
    Case {
        name: "renamed-and-open",
        base: two,
        change: |dir| {
            let mut file = dir.open("one")?;
            file.seek(SeekFrom::Start(1234))?;
            dir.rename("one", "three")?;
            let (ino, position) = (file.metadata()?.ino(), file.stream_position()?);
            Ok(Some(Box::new(move |dir| {
                same("position", &position, &file.stream_position()?)?;
                same("the file of the name", &ino, &fs::metadata(dir.at("three"))?.ino())?;
                same("the file that is open", &ino, &file.metadata()?.ino())
            })))
        },
    },
    Case {
        name: "mapped-and-stored-to",
        base: two,
        change: |dir| {
            let file = dir.open("one")?;
            let mut map = Map::file(&file, 4 * PAGE, MapFlags::MAP_SHARED)?;
            map.bytes_mut()[PAGE..][..26].copy_from_slice(b"stored through the mapping");
            Ok(Some(Box::new(move |_| {
                drop((map, file));
                Ok(())
            })))
        },
    },
    Case {
        name: "directly-written",
        base: two,
        change: |dir| {
            let mut options = OpenOptions::new();
            let file = options.write(true).custom_flags(libc::O_DIRECT).open(dir.at("one"))?;
            let mut map = Map::anonymous(PAGE, MapFlags::MAP_PRIVATE)?;
            map.bytes_mut().copy_from_slice(&noise("direct", PAGE));
            file.write_all_at(map.bytes(), 0)?;
            Ok(None)
        },
    },
];

fn with_xattrs(dir: &Dir) -> Result<()> {
    two(dir)?;
    dir.set_xattr("one", "user.one", b"1")?;
    dir.set_xattr("one", "user.two", b"2")?;
    dir.set_xattr("one", "user.large", &noise("large", 2000))
}

const ACL_ACCESS: &str = "system.posix_acl_access";
const ACL_DEFAULT: &str = "system.posix_acl_default";

/// An access control list that has an entry for user 1234 (acl(5)).
pub(crate) fn acl(permissions: u8) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0];
    let nobody = u32::MAX;
    // The owner, a user, the group, the mask, all others.
    for (tag, permissions, id) in [
        (0x01, 7, nobody),
        (0x02, permissions, 1234),
        (0x04, 4, nobody),
        (0x10, 7, nobody),
        (0x20, 4, nobody),
    ] {
        bytes.extend([tag, 0, permissions, 0]);
        bytes.extend(u32::to_le_bytes(id));
    }
    bytes
}

/// The extended attributes of a name, with their values, in a form for people; none if its file system has none.
pub(crate) fn xattrs(path: &Path) -> Result<BTreeMap<String, String>> {
    let mut buffer = vec![0; 64 << 10];
    let len = match rustix::fs::llistxattr(path, &mut buffer) {
        Err(rustix::io::Errno::NOTSUP) => 0,
        len => len?,
    };
    let names = buffer[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut value = vec![0; 64 << 10];
    names
        .map(|name| {
            let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value)?;
            let shown = if len > 100 {
                format!("sum {:x}", add(EMPTY_SUM, &value[..len]))
            } else {
                value[..len].escape_ascii().to_string()
            };
            Ok((name.escape_ascii().to_string(), shown))
        })
        .collect()
}

fn sparse(dir: &Dir) -> Result<()> {
    dir.file("sparse", 100)?;
    dir.set_len("sparse", 8 << 20)
}

fn concurrent(dir: &Dir) -> Result<()> {
    std::thread::scope(|scope| {
        let write = |n: u64| {
            move || -> Result<()> {
                let file = dir.open("one")?;
                (0..50u64).try_for_each(|k| Ok(file.write_all_at(&n.to_le_bytes(), (k * 4 + n) * 1000)?))
            }
        };
        let threads: Vec<_> = (0..4).map(|n| scope.spawn(write(n))).collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| anyhow::bail!("a writer panicked")))
    })
}

fn set_times(path: &Path, atime: i64, mtime: i64) -> Result<()> {
    let stamp = |tv_sec| rustix::fs::Timespec { tv_sec, tv_nsec: 123_456_789 };
    let times = rustix::fs::Timestamps { last_access: stamp(atime), last_modification: stamp(mtime) };
    Ok(rustix::fs::utimensat(CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?)
}

/// What can be seen of one name.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    /// Of what is no directory.
    links_and_size: Option<(u64, u64)>,
    mtime: (i64, i64),
    device: u64,
    target: Option<PathBuf>,
    contents: Option<u64>,
    xattrs: BTreeMap<String, String>,
    /// KiB that it takes, roughly: a hole is none.
    is_sparse: bool,
}

fn look(path: &Path, forget: bool) -> Result<Seen> {
    let meta = fs::symlink_metadata(path)?;
    let kind = meta.file_type();
    let contents = if kind.is_file() { Some(read(path, forget)?) } else { None };
    Ok(Seen {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        links_and_size: (!kind.is_dir()).then(|| (meta.nlink(), meta.len())),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        device: meta.rdev(),
        target: if kind.is_symlink() { Some(fs::read_link(path)?) } else { None },
        contents,
        xattrs: xattrs(path)?,
        is_sparse: kind.is_file() && meta.len() > 4 << 20 && meta.blocks() * 512 < meta.len() / 2,
    })
}

/// What stands for the contents of a file. `forget`: the page cache is to write what of it is dirty, and to drop what is clean by then; without committing
/// what the disk has to know to find it.
fn read(path: &Path, forget: bool) -> Result<u64> {
    let mut file = File::open(path)?;
    let mut block = Vec::new();
    let mut contents = EMPTY_SUM;
    loop {
        block.clear();
        if (&mut file).take(BLOCK as u64).read_to_end(&mut block)? == 0 {
            break;
        }
        contents = add(contents, &block);
    }
    if forget {
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        // The first time it is written.
        (0..2).try_for_each(|_| {
            nix::fcntl::posix_fadvise(&File::open(path)?, 0, 0, advice).map_err(anyhow::Error::from)
        })?;
    }
    Ok(contents)
}

/// FNV-1a, over words, of nothing.
const EMPTY_SUM: u64 = 0xcbf2_9ce4_8422_2325;

/// The sum of what is `sum` with some bytes behind it. All but the last ones are whole words.
fn add(sum: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(sum, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x100_0000_01b3)
    })
}

/// All that is below a directory.
fn walk(top: &Path, forget: bool) -> Result<BTreeMap<PathBuf, Seen>> {
    let mut all = BTreeMap::from([(PathBuf::new(), look(top, forget)?)]);
    let mut todo = vec![top.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            let seen = look(&path, forget).with_context(|| path.display().to_string())?;
            if seen.mode & libc::S_IFMT == libc::S_IFDIR {
                todo.push(path.clone());
            }
            all.insert(path.strip_prefix(top)?.to_owned(), seen);
        }
    }
    Ok(all)
}

fn compare(before: &BTreeMap<PathBuf, Seen>, after: &BTreeMap<PathBuf, Seen>) -> Result<()> {
    for (path, seen) in before {
        let now = after.get(path).with_context(|| format!("{} is not there", path.display()))?;
        same(&path.display().to_string(), seen, now)?;
    }
    let new = after.keys().find(|path| !before.contains_key(*path));
    ensure!(new.is_none(), "{} was not there", new.unwrap_or(&PathBuf::new()).display());
    Ok(())
}

/// How the files of a tree differ from those of another one, in numbers; times and owners are left out.
///
/// # Errors
/// If `before` cannot be read. A tree `after` that is not there is an empty one.
pub fn differences(before: &Path, after: &Path) -> Result<String> {
    let before = walk(before, false)?;
    let after = if after.is_dir() { walk(after, false)? } else { BTreeMap::new() };
    let same = |one: &Seen, other: &Seen| {
        (one.mode, one.links_and_size, &one.target, one.contents)
            == (other.mode, other.links_and_size, &other.target, other.contents)
    };
    let lost = before.keys().filter(|path| !after.contains_key(*path)).count();
    let is_stale = |(path, seen): &(&PathBuf, &Seen)| after.get(*path).is_some_and(|now| !same(seen, now));
    // The directory itself is made by others.
    let stale = before.iter().filter(|(path, _)| !path.as_os_str().is_empty()).filter(is_stale).count();
    let left = after.keys().filter(|path| !before.contains_key(*path)).count();
    Ok(format!("{} names: {lost} lost, {stale} stale, {left} left behind", before.len()))
}

/// All cases, with their files in the page cache and with these dropped from it; the verdict on each is a line of the file `cases`.
pub fn cases(stage: &mut Stage) -> Result<()> {
    let all = || CASES.iter().chain(OPEN);
    play(stage, all().map(|case| (case, false)).chain(all().map(|case| (case, true))))
}

/// The same for those that are large, in the page cache only.
pub fn large(stage: &mut Stage) -> Result<()> {
    play(stage, LARGE.iter().map(|case| (case, false)))
}

fn play<'a>(stage: &mut Stage, cases: impl Iterator<Item = (&'a Case, bool)>) -> Result<()> {
    let top = stage.path("tree");
    let place =
        |case: &Case, forget| Dir(top.join(if forget { "dropped" } else { "cached" }).join(case.name));
    let cases: Vec<(&Case, bool, Dir)> =
        cases.map(|(case, forget)| (case, forget, place(case, forget))).collect();
    for (case, _, dir) in &cases {
        fs::create_dir_all(&dir.0)?;
        (case.base)(dir).with_context(|| format!("{}: before", case.name))?;
    }
    nix::unistd::syncfs(File::open(&top)?)?;
    let mut expected = Vec::new();
    for (case, forget, dir) in &cases {
        let after = (case.change)(dir).with_context(|| case.name)?;
        expected.push((after, walk(&dir.0, *forget)?));
    }

    let crash = stage.crash()?;
    let (mut lines, mut failed) = (String::new(), Vec::new());
    for ((case, forget, dir), (after, before)) in cases.iter().zip(expected) {
        if crash.damage {
            fs::write(dir.at("damage"), "")?;
        }
        let mut verdict = walk(&dir.0, false).and_then(|now| compare(&before, &now));
        if let (Ok(()), Some(after)) = (&verdict, after) {
            verdict = after(dir);
        }
        let name = format!("{}{}", case.name, if *forget { ", dropped" } else { "" });
        match verdict {
            Ok(()) => writeln!(lines, "pass {name}")?,
            Err(error) => {
                writeln!(lines, "fail {name}: {error:#}")?;
                failed.push(name);
            }
        }
    }
    fs::write(stage.path("cases"), lines)?;
    ensure!(failed.is_empty(), "{} of {} cases failed: {}", failed.len(), cases.len(), failed.join("; "));
    Ok(())
}
