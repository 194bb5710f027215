//! What is in file systems in memory, open or not.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::Stage;
use crate::names::{acl, xattrs};
use crate::procfs::same;

/// Removes its tree, whatever happens.
struct Tree(PathBuf);

impl Drop for Tree {
    fn drop(&mut self) {
        _ = fs::remove_dir_all(&self.0);
    }
}

/// What a tree looks like: for each name its kind, mode, owner, links, time of change, contents or target, extended attributes.
fn describe(dir: &Path, into: &mut Vec<String>) -> Result<()> {
    let mut names: Vec<PathBuf> = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    names.sort();
    for path in names {
        let meta = fs::symlink_metadata(&path)?;
        let what = if meta.is_symlink() {
            fs::read_link(&path)?.display().to_string()
        } else if meta.is_file() {
            let bytes = fs::read(&path)?;
            format!("{} bytes, sum {}", bytes.len(), bytes.iter().map(|b| u64::from(*b)).sum::<u64>())
        } else {
            String::new()
        };
        let links = if meta.is_dir() { 0 } else { meta.nlink() };
        into.push(format!(
            "{} {:o} {}:{} {links} {}.{:09} {what} {:?}",
            path.display(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            xattrs(&path)?
        ));
        if meta.is_dir() {
            describe(&path, into)?;
        }
    }
    Ok(())
}

/// A tree that nobody has open: files, directories, links of both kinds, a FIFO.
pub fn tree(stage: &mut Stage) -> Result<()> {
    let damage = if stage.options().damage { "-damage" } else { "" };
    let top = Tree(format!("/dev/shm/otherworld-{}{damage}", std::process::id()).into());
    let at = |name: &str| top.0.join(name);
    fs::create_dir_all(at("a/b/c"))?;
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    fs::write(at("a/large"), &bytes)?;
    fs::write(at("a/b/empty"), "")?;
    fs::write(at("a/b/small"), "small")?;
    fs::hard_link(at("a/b/small"), at("second-name"))?;
    let sparse = fs::File::create(at("sparse"))?;
    sparse.set_len(10 << 20)?;
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"far", 9 << 20)?;
    drop(sparse);
    fs::set_permissions(at("a/large"), PermissionsExt::from_mode(0o640))?;
    fs::set_permissions(at("a/b"), PermissionsExt::from_mode(0o1731))?;
    symlink("a/b/small", at("link"))?;
    symlink(format!("/{}", "long/".repeat(60)), at("long-link"))?;
    let set = |name, xattr, value: &[u8]| rustix::fs::setxattr(at(name), xattr, value, XattrFlags::empty());
    for name in ["a/large", "a/b"] {
        set(name, "system.posix_acl_access", &acl(5))?;
    }
    set("a/b", "system.posix_acl_default", &acl(6))?;
    // Not before 6.6.
    for (name, value) in [("user.one", "1"), ("user.another", ""), ("user.third", "third")] {
        match set("a/b/small", name, value.as_bytes()) {
            Err(Errno::NOTSUP) => {}
            other => other?,
        }
    }
    mkfifo(&at("fifo"), Mode::from_bits_truncate(0o604))?;
    let mut was = Vec::new();
    describe(&top.0, &mut was)?;

    let crash = stage.crash()?;
    if crash.damage {
        fs::write(at("a/b/small"), "smell")?;
    }
    let mut is = Vec::new();
    describe(&top.0, &mut is)?;
    same("number of files", &was.len(), &is.len())?;
    for (was, is) in was.iter().zip(&is) {
        same("a file", was, is)?;
    }
    ensure!(fs::read(at("a/large"))? == bytes, "other contents");
    Ok(())
}
