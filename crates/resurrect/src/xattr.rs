//! Extended attributes as they were.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::XattrFlags;
use rustix::io::Errno;
use snapshot::Xattr;

use crate::handle::path_of;

/// XATTR_LIST_MAX, XATTR_SIZE_MAX.
const MOST: usize = 64 << 10;

/// Gives what is open (as by O_PATH) these extended attributes and no other ones; whether something was different.
///
/// # Errors
/// The first that could not be set or removed; the others have been nevertheless.
pub(crate) fn set(fd: BorrowedFd<'_>, wanted: &[Xattr]) -> Result<bool, String> {
    let path = path_of(&fd);
    let mut buffer = vec![0; MOST];
    let len = match rustix::fs::listxattr(&path, &mut buffer) {
        Ok(len) => len,
        // The file system has none.
        Err(Errno::NOTSUP) if wanted.is_empty() => return Ok(false),
        Err(e) => return Err(format!("its extended attributes cannot be listed: {e}")),
    };
    let names = buffer.get(..len).unwrap_or_default().split(|byte| *byte == 0);
    let (mut changed, mut failed) = (false, None);
    // XFS shows its access control lists by another name as well.
    for name in names.filter(|name| !name.is_empty() && !name.starts_with(b"trusted.SGI_ACL_")) {
        if wanted.iter().all(|xattr| xattr.name.as_bytes() != name) {
            let removed = rustix::fs::removexattr(&path, OsStr::from_bytes(name));
            failed = failed.or(removed.err().map(|e| (name.to_vec(), e)));
            changed = true;
        }
    }
    let mut value = vec![0; MOST];
    for xattr in wanted {
        let name = OsStr::from_bytes(xattr.name.as_bytes());
        let now = rustix::fs::getxattr(&path, name, &mut value).ok().and_then(|len| value.get(..len));
        if now != Some(xattr.value.as_bytes()) {
            let set = rustix::fs::setxattr(&path, name, xattr.value.as_bytes(), XattrFlags::empty());
            failed = failed.or(set.err().map(|e| (xattr.name.as_bytes().to_vec(), e)));
            changed = true;
        }
    }
    match failed {
        Some((name, e)) => Err(format!("its extended attribute {}: {e}", String::from_utf8_lossy(&name))),
        None => Ok(changed),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn those_that_are_not_wanted_go_and_the_others_come() {
        // Some file systems have none.
        let dir = tempfile::tempdir_in(".").unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "").unwrap();
        let flags = XattrFlags::empty();
        if rustix::fs::setxattr(&path, "user.old", b"old", flags).is_err() {
            return;
        }
        rustix::fs::setxattr(&path, "user.both", b"before", flags).unwrap();
        let xattr = |name: &str, value: &str| Xattr { name: name.into(), value: value.into() };
        let wanted = [xattr("user.both", "after"), xattr("user.new", "")];
        let file = File::open(&path).unwrap();
        assert_eq!(set(file.as_fd(), &wanted), Ok(true));
        assert_eq!(set(file.as_fd(), &wanted), Ok(false), "they are as they have to be");
        let mut names = vec![0; 1000];
        let len = rustix::fs::listxattr(&path, &mut names).unwrap();
        let mut names: Vec<&[u8]> = names[..len].split(|byte| *byte == 0).filter(|n| !n.is_empty()).collect();
        names.sort_unstable();
        assert_eq!(names, [&b"user.both"[..], b"user.new"]);
        assert!(set(file.as_fd(), &[xattr("nonsense", "")]).is_err());
    }
}
