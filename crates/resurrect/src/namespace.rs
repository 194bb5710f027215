//! Mount and UTS namespaces: each is made by a child of this program that ends at once, and entered by the processes that lived in it.
//!
//! A mount namespace is built from copies of the initial one's mounts, so that what is passed on between them is passed on again, and from
//! new file systems where the old one was in memory and mounted there only.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use snapshot::{
    Mount, MountNamespace, NamespaceId, OpenFile, PhysMem, Process, Reason, Snapshot, UtsNamespace,
};

use crate::sys;
use crate::{mount, tmpfs};

/// Where the new tree is put together; a directory that every system has. Nothing of it is needed any more by then.
const STAGE: &str = "/proc";
/// Where a new file system is filled, for a moment.
const PLACE: &str = "/sys";
/// Marks a line of the child's that names a loss.
const LOSS: char = '-';

/// A namespace of this kernel.
struct Made {
    /// For setns(2).
    namespace: OwnedFd,
    /// The root directory of a mount namespace.
    root: Option<OwnedFd>,
    losses: Vec<String>,
}

/// All namespaces that are needed and not the initial ones.
#[derive(Default)]
pub(crate) struct Namespaces {
    made: BTreeMap<NamespaceId, Result<Made, String>>,
}

impl Namespaces {
    /// Makes the namespaces in which `processes` lived. Descriptors are `base` or higher.
    pub(crate) fn make(snapshot: &Snapshot, processes: &[&Process], mem: &dyn PhysMem, base: RawFd) -> Self {
        let needed = |of: fn(&Process) -> Option<NamespaceId>| -> BTreeSet<NamespaceId> {
            processes.iter().filter_map(|p| of(p)).collect()
        };
        let mut made = BTreeMap::new();
        for id in needed(|p| p.mount_namespace) {
            let new = match snapshot.mount_namespaces.get(&id) {
                Some(namespace) => in_child("mnt", base, || build(snapshot, namespace, mem)),
                None => Err("it is not in the snapshot".into()),
            };
            made.insert(id, new);
        }
        for id in needed(|p| p.uts_namespace) {
            let new = match snapshot.uts_namespaces.get(&id) {
                Some(names) => in_child("uts", base, || set_names(names)),
                None => Err("it is not in the snapshot".into()),
            };
            made.insert(id, new);
        }
        Self { made }
    }

    fn of<'a>(&'a self, process: &Process) -> impl Iterator<Item = &'a Result<Made, String>> {
        let ids = [process.uts_namespace, process.mount_namespace];
        ids.into_iter().flatten().filter_map(|id| self.made.get(&id))
    }

    /// Why a process's namespaces could not be made.
    pub(crate) fn failure(&self, process: &Process) -> Option<String> {
        self.of(process).find_map(|made| made.as_ref().err().cloned())
    }

    /// What is different in them.
    pub(crate) fn losses(&self, process: &Process) -> Vec<Reason> {
        let made = self.of(process).filter_map(|made| made.as_ref().ok());
        made.flat_map(|made| &made.losses).map(|text| Reason::new("mount", text.clone())).collect()
    }

    /// The calling process lives in that process's namespaces from here on; its root and working directory are the root there.
    pub(crate) fn enter(&self, process: &Process) -> Result<(), Errno> {
        for made in self.of(process) {
            let fd = made.as_ref().map_err(|_| Errno::ENOENT)?.namespace.as_raw_fd();
            // SAFETY: numbers only.
            Errno::result(unsafe { libc::setns(fd, 0) })?;
        }
        Ok(())
    }

    /// The name by which this program, which stays in the initial namespaces, reaches the place of an open file.
    pub(crate) fn place(&self, file: &OpenFile) -> Result<PathBuf, String> {
        let Some(id) = file.mount_namespace else { return Ok(file.path.as_path().to_owned()) };
        let relative = file.path.as_path().strip_prefix("/").unwrap_or(file.path.as_path());
        Ok(self.root(id)?.join(relative))
    }

    /// The name by which this program and its children reach the root directory of a mount namespace.
    pub(crate) fn root(&self, id: NamespaceId) -> Result<PathBuf, String> {
        match self.made.get(&id) {
            Some(Ok(Made { root: Some(root), .. })) => {
                Ok(PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd())))
            }
            Some(Err(why)) => Err(why.clone()),
            Some(Ok(_)) | None => Err("its mount namespace was not made".into()),
        }
    }
}

/// Lets a child make a namespace and keeps it. What `make` returns are losses.
fn in_child(
    kind: &str,
    base: RawFd,
    make: impl FnOnce() -> Result<Vec<String>, String>,
) -> Result<Made, String> {
    let say = |what: &'static str| move |e: Errno| format!("make its namespace: {what}: {e}");
    let (told, tell) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(say("pipe"))?;
    let (hold, held) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(say("pipe"))?;
    let child = sys::fork(0, 0, 0).map_err(say("fork"))?;
    if child == 0 {
        drop(held);
        let text = match make() {
            Ok(losses) => losses.iter().map(|loss| format!("{LOSS}{}\n", loss.replace('\n', " "))).collect(),
            Err(why) => why.replace('\n', " "),
        };
        let done = std::io::Write::write_all(&mut std::fs::File::from(tell), text.as_bytes());
        // Until it has been looked at.
        _ = nix::unistd::read(&hold, &mut [0]);
        sys::exit(i32::from(done.is_err()));
    }
    drop((tell, hold));
    let child = Ended(child, Some(held));
    let text =
        std::io::read_to_string(std::fs::File::from(told)).map_err(|e| format!("make its namespace: {e}"))?;
    let lines = text.lines().map(|line| line.strip_prefix(LOSS).ok_or(line));
    let losses = lines.collect::<Result<Vec<_>, _>>().map_err(|why| format!("make its namespace: {why}"))?;
    let open = |name: &str, flags| {
        let path = format!("/proc/{}/{name}", child.0);
        sys::open(Path::new(&path), flags, 0).and_then(|fd| sys::lift(fd, base))
    };
    let namespace = open(&format!("ns/{kind}"), libc::O_RDONLY).map_err(say("open it"))?;
    let root = match kind {
        "mnt" => Some(open("root", libc::O_PATH | libc::O_DIRECTORY).map_err(say("open its root"))?),
        _ => None,
    };
    Ok(Made { namespace, root, losses: losses.into_iter().map(str::to_owned).collect() })
}

/// A child that ends when this goes.
struct Ended(snapshot::Pid, Option<OwnedFd>);

impl Drop for Ended {
    fn drop(&mut self) {
        drop(self.1.take());
        let mut status = 0;
        // SAFETY: waits for our own child.
        unsafe { libc::waitpid(self.0, &mut status, libc::__WALL) };
    }
}

fn set_names(names: &UtsNamespace) -> Result<Vec<String>, String> {
    let say = |what: &'static str| move |e: Errno| format!("{what}: {e}");
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS).map_err(say("unshare"))?;
    let set = |nr, name: &[u8]| {
        // SAFETY: the kernel reads as many bytes as it is told.
        unsafe { sys::raw(nr, [name.as_ptr() as u64, name.len() as u64, 0, 0, 0, 0]) }.map(drop)
    };
    set(libc::SYS_sethostname, names.nodename.as_bytes()).map_err(say("sethostname"))?;
    set(libc::SYS_setdomainname, names.domainname.as_bytes()).map_err(say("setdomainname"))?;
    Ok(Vec::new())
}

/// A mount to be made: its copy, or why there is none.
struct Piece<'a> {
    wanted: &'a Mount,
    made: Result<OwnedFd, String>,
}

/// Makes the calling process's mounts those of `namespace`, in a namespace of its own.
fn build(snapshot: &Snapshot, namespace: &MountNamespace, mem: &dyn PhysMem) -> Result<Vec<String>, String> {
    mem.after_fork();
    let say = |what: &'static str| move |e: Errno| format!("{what}: {e}");
    let now = mount::table().map_err(|e| format!("read the mounts: {e}"))?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(say("unshare"))?;
    // What happens here stays here; copies follow what they are copies of.
    mount::propagate_all(libc::MS_SLAVE).map_err(say("make the mounts slaves"))?;
    // The first is what the kernel began with, below the root.
    let wanted: Vec<&Mount> = namespace.mounts.iter().filter(|m| m.fs_type.as_bytes() != b"rootfs").collect();
    let same = |a: &Mount, b: &Mount| (a.dev_major, a.dev_minor) == (b.dev_major, b.dev_minor);
    let is_elsewhere =
        |m: &&&Mount| snapshot.mounts.iter().any(|source| same(source, m) && source.is_above(m));
    let mut fresh: BTreeMap<(u32, u32), Vec<&Mount>> = BTreeMap::new();
    for m in wanted.iter().filter(|m| !is_elsewhere(m)) {
        fresh.entry((m.dev_major, m.dev_minor)).or_default().push(m);
    }
    let mut made = BTreeMap::new();
    for mounts in fresh.values() {
        match begin_anew(snapshot, mounts, mem) {
            Ok(copies) => made.extend(copies),
            Err(why) => made.extend(mounts.iter().map(|m| (m.id, Err(why.clone())))),
        }
    }
    made.extend(take_copies(snapshot, &wanted, now));
    let missing = || Err("what it shows is not mounted this time".into());
    let pieces = wanted
        .into_iter()
        .map(|wanted| Piece { wanted, made: made.remove(&wanted.id).unwrap_or_else(missing) })
        .collect();
    assemble(pieces)
}

/// Copies of the mounts of the initial namespace, by the number of the wanted mount. They are taken from the last to the first, and each
/// mount goes when its copies are taken: what it hides is then in sight.
fn take_copies(
    snapshot: &Snapshot,
    wanted: &[&Mount],
    mut now: Vec<(snapshot::Bytes, snapshot::Bytes)>,
) -> BTreeMap<i32, Result<OwnedFd, String>> {
    let same = |a: &Mount, b: &Mount| (a.dev_major, a.dev_minor) == (b.dev_major, b.dev_minor);
    let mut copies = BTreeMap::new();
    for source in snapshot.mounts.iter().rev() {
        let at = source.mountpoint.as_path();
        let is_it = |(at, fs_type): &(snapshot::Bytes, snapshot::Bytes)| {
            *at == source.mountpoint && *fs_type == source.fs_type
        };
        // On top there, or not mounted this time.
        let here = now.iter().rposition(|(point, _)| *point == source.mountpoint);
        let Some(index) = here.filter(|index| is_it(&now[*index])) else { continue };
        now.remove(index);
        for m in wanted.iter().filter(|m| same(m, source) && source.is_above(m)) {
            let below = m.root.as_path().strip_prefix(source.root.as_path()).unwrap_or(Path::new(""));
            // A slash at the end would ask an automounter.
            let path = if below.as_os_str().is_empty() { at.to_owned() } else { at.join(below) };
            let copy = mount::copy(None, &path);
            let copy = copy.map_err(|e| format!("{} of {at:?}: {e}", m.root));
            // Several mounts may show it: the first that does, if one does.
            if copies.get(&m.id).is_none_or(Result::is_err) {
                copies.insert(m.id, copy);
            }
        }
        if at != Path::new("/") {
            _ = mount::detach(at);
        }
    }
    copies
}

/// Mounts of a file system that was mounted in this namespace only, with what was in it, by the number of the wanted mount.
fn begin_anew(
    snapshot: &Snapshot,
    wanted: &[&Mount],
    mem: &dyn PhysMem,
) -> Result<BTreeMap<i32, Result<OwnedFd, String>>, String> {
    let first = wanted.first().ok_or("nothing is wanted of it")?;
    let say = |e: Errno| format!("a new {}: {e}", first.fs_type);
    let fs_type = CString::new(first.fs_type.as_bytes()).map_err(|e| e.to_string())?;
    let made = mount::new(&fs_type).map_err(say)?;
    // What is mounted nowhere cannot be copied.
    let place = Path::new(PLACE);
    mount::attach(&made, place).map_err(say)?;
    let number = (first.dev_major, first.dev_minor);
    let old = snapshot.tmpfs.iter().find(|t| (t.dev_major, t.dev_minor) == number);
    let lost = old.map_or(Vec::new(), |old| tmpfs::fill(snapshot, old, place, &|_| false, mem));
    let copy = |m: &&Mount| {
        let below = m.root.as_path().strip_prefix("/").unwrap_or(Path::new(""));
        let path = if below.as_os_str().is_empty() { place.to_owned() } else { place.join(below) };
        (m.id, mount::copy(None, &path).map_err(say))
    };
    let copies = wanted.iter().map(copy).collect();
    mount::detach(place).map_err(say)?;
    match lost.first() {
        None => Ok(copies),
        Some(first) => Err(format!("{} files are lost, the first {}: {}", lost.len(), first.path, first.why)),
    }
}

/// Puts the pieces together and makes them the root.
fn assemble(pieces: Vec<Piece<'_>>) -> Result<Vec<String>, String> {
    let say = |what: &'static str| move |e: Errno| format!("{what}: {e}");
    let mut losses = Vec::new();
    let mut attached = Vec::new();
    for piece in pieces {
        let at = piece.wanted.mountpoint.as_path();
        let is_root = at == Path::new("/");
        let to = Path::new(STAGE).join(at.strip_prefix("/").unwrap_or(at));
        let done = piece.made.and_then(|fd| match mount::attach(&fd, &to) {
            Ok(()) => Ok(fd),
            Err(e) => Err(e.to_string()),
        });
        match done {
            Ok(fd) => attached.push((piece.wanted, fd)),
            Err(why) if is_root => return Err(format!("its root: {why}")),
            Err(why) => losses.push(format!("in its mount namespace {} is not mounted: {why}", at.display())),
        }
    }
    if attached.is_empty() {
        return Err("it has no root".into());
    }
    nix::unistd::chdir(STAGE).map_err(say("enter it"))?;
    nix::unistd::pivot_root(".", ".").map_err(say("pivot_root"))?;
    mount::detach(Path::new(".")).map_err(say("detach the old root"))?;
    nix::unistd::chdir("/").map_err(say("enter its root"))?;
    // Not before: what is shared cannot become the root.
    for (wanted, fd) in &attached {
        if let Err(e) = mount::set_attributes(fd, wanted) {
            losses.push(format!("in its mount namespace {} has not got its flags: {e}", wanted.mountpoint));
        }
    }
    Ok(losses)
}
