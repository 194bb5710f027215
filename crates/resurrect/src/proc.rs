//! Files of /proc, /sys and cgroups, and of namespaces: opened again by their names.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use snapshot::NamespaceFile;

use crate::sys;

/// The namespaces that come back are the initial ones, in which this program lives as well.
pub(crate) fn open_namespace(namespace: &NamespaceFile, flags: i32) -> Result<OwnedFd, Errno> {
    if !namespace.initial || namespace.name.contains('/') {
        return Err(Errno::EINVAL);
    }
    sys::open(Path::new(&format!("/proc/self/ns/{}", namespace.name)), flags, 0)
}
