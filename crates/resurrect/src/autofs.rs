//! Mount points of automounters that come back: they talk to the kernel through the pipe that they had.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::path::Path;

use nix::errno::Errno;
use snapshot::{Autofs, FileKind, Mount, PhysMem, PipeId, Process, Snapshot};

use crate::pipe::Opened;
use crate::{FileStale, mount, sys};

/// Pipes of automounters, made before all others.
pub(crate) type Pipes = BTreeMap<PipeId, Result<Opened, String>>;

/// Mounts again what `processes` serve. Returns the pipes, and what could not be mounted.
pub(crate) fn mount_all(
    snapshot: &Snapshot,
    processes: &[&Process],
    mem: &dyn PhysMem,
    base: i32,
) -> (Pipes, Vec<FileStale>) {
    let files: BTreeSet<_> = processes.iter().flat_map(|p| &p.descriptors).map(|d| d.file).collect();
    let served: BTreeSet<PipeId> = files
        .iter()
        .filter_map(|id| match snapshot.files.get(id)?.kind {
            FileKind::Pipe { pipe, .. } => Some(pipe),
            _ => None,
        })
        .collect();
    let mut pipes = Pipes::new();
    let mut failed = Vec::new();
    for m in snapshot.mounts.iter().filter(|m| m.fs_type.as_bytes() == b"autofs") {
        let number = (m.dev_major, m.dev_minor);
        let known = snapshot.autofs.iter().find(|a| (a.dev_major, a.dev_minor) == number);
        let Some((autofs, pipe)) = known.and_then(|a| Some((a, a.pipe.filter(|p| served.contains(p))?)))
        else {
            continue;
        };
        let opened = pipes.entry(pipe).or_insert_with(|| {
            let contents = snapshot.pipes.get(&pipe).ok_or("its pipe is not in the snapshot")?;
            Opened::new(contents, None, mem, base)
        });
        let done = opened.as_ref().map_err(Clone::clone).and_then(|pipe| mount_one(m, autofs, pipe));
        if let Err(why) = done {
            failed.push(FileStale {
                path: m.mountpoint.clone(),
                why: format!("not mounted for its automounter: {why}"),
            });
        }
    }
    (pipes, failed)
}

fn mount_one(m: &Mount, autofs: &Autofs, pipe: &Opened) -> Result<(), String> {
    let at = m.mountpoint.as_path();
    let say = |what: &'static str| move |e: Errno| format!("{what}: {e}");
    // What is mounted there already came later.
    let mut above = Vec::new();
    while is_mount_point(at)? {
        above.push(mount::copy(None, at).map_err(say("take what is mounted there"))?);
        mount::detach(at).map_err(say("unmount what is there"))?;
    }
    let done = mount_here(m, autofs, pipe, at);
    for copy in above.iter().rev() {
        mount::attach(copy, at).map_err(say("mount again what was there"))?;
    }
    done
}

fn mount_here(m: &Mount, autofs: &Autofs, pipe: &Opened, at: &Path) -> Result<(), String> {
    let options = format!(
        "fd={},pgrp={},minproto={},maxproto={},{}",
        pipe.writing_end(),
        autofs.pgrp,
        autofs.min_proto,
        autofs.max_proto,
        autofs.kind
    );
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|e| e.to_string());
    let (source, options) = (text(m.source.as_bytes())?, text(options.as_bytes())?);
    let at = sys::c_path(at).map_err(|e| e.to_string())?;
    // SAFETY: NUL-terminated strings.
    let r =
        unsafe { libc::mount(source.as_ptr(), at.as_ptr(), c"autofs".as_ptr(), 0, options.as_ptr().cast()) };
    Errno::result(r).map(drop).map_err(|e| format!("mount: {e}"))
}

fn is_mount_point(at: &Path) -> Result<bool, String> {
    let table = mount::table().map_err(|e| format!("read the mounts: {e}"))?;
    Ok(table.iter().any(|(point, _)| point.as_path() == at))
}
