//! Files of /proc, /sys and cgroups, and of namespaces: opened again by their names. Those about somebody who is not there are opened as
//! files about a process that ends at once.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use snapshot::{NamespaceFile, Pid};

use crate::sys;

/// A process that is there only to have files in /proc, and ends when this is dropped.
pub(crate) struct Nobody(Pid);

impl Drop for Nobody {
    fn drop(&mut self) {
        // SAFETY: a signal to our own child, which is then waited for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

impl Nobody {
    /// `like`: whose number it is to have, if that is free.
    fn new(like: Option<Pid>) -> Result<Self, Errno> {
        let pid = match like.map(|like| sys::fork(0, like, 0)) {
            Some(Ok(pid)) => pid,
            _ => sys::fork(0, 0, 0)?,
        };
        if pid == 0 {
            let _ = sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64);
            loop {
                // SAFETY: pause has no arguments.
                unsafe { libc::pause() };
            }
        }
        Ok(Self(pid))
    }

    /// The file that it has in the place of somebody else's.
    fn path(&self, path: &Path) -> Option<PathBuf> {
        let own = self.0.to_string();
        let below = path.strip_prefix("/proc").ok()?;
        let mut parts = below.components();
        parts.next()?;
        let rest = parts.as_path();
        let mut of_thread = rest.components();
        let is_task = of_thread.next().is_some_and(|part| part.as_os_str() == "task");
        let rest = match is_task && of_thread.next().is_some() {
            true => Path::new("task").join(&own).join(of_thread.as_path()),
            false => rest.to_owned(),
        };
        Some(Path::new("/proc").join(own).join(rest))
    }
}

/// Opens what is like a file about somebody who has ended, once the other value is dropped.
pub(crate) fn open_of_nobody(path: &Path, flags: i32) -> Result<(OwnedFd, Nobody), Errno> {
    let like = path.strip_prefix("/proc").ok().and_then(|below| below.iter().next()?.to_str()?.parse().ok());
    let nobody = Nobody::new(like)?;
    let path = nobody.path(path).ok_or(Errno::ENOENT)?;
    sys::open(&path, flags, 0).map(|fd| (fd, nobody))
}

/// The namespaces that come back are the initial ones, in which this program lives as well.
pub(crate) fn open_namespace(namespace: &NamespaceFile, flags: i32) -> Result<OwnedFd, Errno> {
    if !namespace.initial || namespace.name.contains('/') {
        return Err(Errno::EINVAL);
    }
    sys::open(Path::new(&format!("/proc/self/ns/{}", namespace.name)), flags, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_nobody_read_as_those_of_the_dead() {
        let nobody = Nobody::new(None).unwrap();
        let own = nobody.0;
        let path = |path: &str| nobody.path(Path::new(path)).map(|path| path.display().to_string());
        assert_eq!(path("/proc/38/statm"), Some(format!("/proc/{own}/statm")));
        assert_eq!(path("/proc/38"), Some(format!("/proc/{own}/")));
        assert_eq!(path("/proc/38/task/39/stat"), Some(format!("/proc/{own}/task/{own}/stat")));
        assert_eq!(path("/proc/38/task"), Some(format!("/proc/{own}/task")));
        assert_eq!(path("/sys/x"), None);
        drop(nobody);
        let (fd, nobody) = open_of_nobody(Path::new("/proc/38/statm"), libc::O_RDONLY).unwrap();
        drop(nobody);
        assert_eq!(nix::unistd::read(&fd, &mut [0; 9]), Err(Errno::ESRCH));
    }
}
