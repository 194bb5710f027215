//! What is known at a glance (threads and their stacks, processes, sockets, mounts, modules, slab caches) beside a recording of /proc.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use snapshot::{PAGE_SIZE, Pid, ThreadState};

use super::{Switches, mount_line, recorded_mount, text};
use crate::error::Result;
use crate::process::Member;
use crate::{Autopsy, SocketSummary};

/// Objects of a slab cache that may come and go between the recording and the panic, beside a quarter of all.
const MOVING_OBJECTS: u64 = 2048;

/// The outcome of [`compare_machine`].
#[derive(Clone, Debug, Default)]
pub struct MachineComparison {
    /// How many things of each kind were compared.
    pub compared: BTreeMap<&'static str, usize>,
    /// What differs, for people.
    pub differences: Vec<String>,
}

impl MachineComparison {
    fn same<T: PartialEq + std::fmt::Debug>(
        &mut self,
        kind: &'static str,
        what: &str,
        expected: T,
        found: T,
    ) {
        *self.compared.entry(kind).or_default() += 1;
        if expected != found {
            self.differences.push(format!("{kind} {what}: expected {expected:?}, found {found:?}"));
        }
    }
}

/// Compares what is read at a glance with a recording of /proc from just before the panic.
///
/// Of threads that have run since the recording nothing is compared, and of numbers that move by themselves (objects of slab caches) only
/// whether they are near.
///
/// # Errors
/// When the task list, the modules or the slab caches cannot be read at all.
pub fn compare_machine(autopsy: &Autopsy<'_>, recording: &Path) -> Result<MachineComparison> {
    let mut result = MachineComparison::default();
    let still = still_threads(autopsy, recording)?;
    threads(autopsy, recording, &still, &mut result)?;
    processes(autopsy, recording, &still, &mut result)?;
    sockets(autopsy, recording, &mut result)?;
    mounts(autopsy, recording, &mut result)?;
    modules(autopsy, recording, &mut result)?;
    slabs(autopsy, recording, &mut result)?;
    Ok(result)
}

/// Threads that have not been switched since the recording, and were on no CPU.
fn still_threads(autopsy: &Autopsy<'_>, recording: &Path) -> Result<BTreeSet<Pid>> {
    let mut still = BTreeSet::new();
    for Member { addr, task } in autopsy.all_threads()? {
        let status = thread_dir(recording, task.tgid, task.pid).join("status");
        let Some(status) = text(status) else { continue };
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|value| value.trim().parse::<u64>().ok())
        };
        let counts: Switches = autopsy.kernel.read(addr)?;
        let same = number("voluntary_ctxt_switches") == Some(counts.nvcsw)
            && number("nonvoluntary_ctxt_switches") == Some(counts.nivcsw);
        if same && autopsy.cpu_of(addr, &task).is_none() && task.thread_state() != ThreadState::Running {
            still.insert(task.pid);
        }
    }
    Ok(still)
}

fn thread_dir(recording: &Path, pid: Pid, tid: Pid) -> std::path::PathBuf {
    recording.join(pid.to_string()).join("task").join(tid.to_string())
}

fn threads(
    autopsy: &Autopsy<'_>,
    recording: &Path,
    still: &BTreeSet<Pid>,
    result: &mut MachineComparison,
) -> Result<()> {
    // Of several names of one function either may be the one that is shown.
    let usual = |name: &str| {
        let at = autopsy.kernel.symbol(name).ok();
        at.and_then(|at| autopsy.kernel.symbolize(at)).map_or(name, |(usual, _)| usual).to_owned()
    };
    for thread in autopsy.thread_summaries()?.iter().filter(|thread| still.contains(&thread.tid)) {
        let dir = thread_dir(recording, thread.pid, thread.tid);
        let what = format!("of thread {} ({})", thread.tid, thread.comm);
        if let Some(recorded) = text(dir.join("syscall"))
            && let Some(first) = recorded.split_whitespace().next()
            && first != "running"
            // Of the kernel's own it shows what happens to be on their stacks.
            && !thread.kernel_thread
        {
            let expected = first.parse::<i64>().ok().filter(|nr| *nr >= 0);
            result.same("system call", &what, expected, thread.syscall);
        }
        if let Some(recorded) = text(dir.join("wchan")) {
            let expected = Some(recorded.trim()).filter(|name| *name != "0").map(usual);
            result.same("wait channel", &what, expected, thread.wchan.clone());
        }
        let Some(recorded) = text(dir.join("stack")) else { continue };
        let place = |line: &str| {
            let place = line.strip_prefix("[<0>] ")?;
            let (place, module) = place.split_once(' ').unwrap_or((place, ""));
            let (place, _size) = place.rsplit_once('/')?;
            let (name, offset) = place.split_once('+')?;
            let name = if module.is_empty() { usual(name) } else { name.to_owned() };
            Some(format!("{name}+{offset} {module}").trim_end().to_owned())
        };
        let expected: Vec<String> = recorded.lines().filter_map(place).collect();
        let stacks = autopsy.stacks(thread.tid)?;
        let stack = stacks.iter().find(|stack| stack.tid == thread.tid);
        let frames = stack.map(|stack| stack.frames.as_slice()).unwrap_or_default();
        // /proc leaves the scheduler's own out, and nothing else.
        let scheduler = ["__sched_text_start", "__sched_text_end"].map(|name| autopsy.kernel.symbol(name));
        let [Ok(start), Ok(end)] = scheduler else { continue };
        let found: Vec<String> = frames
            .iter()
            .filter(|frame| !(start..end).contains(&frame.address))
            .map(|frame| frame.symbol.clone())
            .collect();
        result.same("kernel stack", &what, expected, found);
    }
    Ok(())
}

fn processes(
    autopsy: &Autopsy<'_>,
    recording: &Path,
    still: &BTreeSet<Pid>,
    result: &mut MachineComparison,
) -> Result<()> {
    let mut threads: BTreeMap<Pid, Vec<Pid>> = BTreeMap::new();
    for Member { task, .. } in autopsy.all_threads()? {
        threads.entry(task.tgid).or_default().push(task.pid);
    }
    for process in autopsy.process_summaries()? {
        let dir = recording.join(process.pid.to_string());
        let threads = threads.get(&process.pid).map(Vec::as_slice).unwrap_or_default();
        let Some(smaps) = text(dir.join("smaps")) else { continue };
        if !threads.iter().all(|tid| still.contains(tid)) {
            continue;
        }
        let what = format!("of process {} ({})", process.pid, process.comm);
        result.same(
            "threads",
            &what,
            dir.join("task").read_dir().map_or(0, Iterator::count),
            process.threads,
        );
        let program = std::fs::read_link(dir.join("exe")).ok().map(|path| path.display().to_string());
        let deleted = |path: &String| path.ends_with(" (deleted)");
        if !program.as_ref().is_some_and(deleted) {
            result.same("program", &what, program, process.exe.as_ref().map(ToString::to_string));
        }
        // Not statm: until 6.1 it leaves out what the threads have not added to its count yet.
        let kib = |line: &str| line.strip_prefix("Rss:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
        let expected = smaps.lines().filter_map(kib).sum::<u64>() * 1024 / PAGE_SIZE;
        result.same("pages", &what, expected, process.resident_pages.unwrap_or(0));
    }
    Ok(())
}

/// What /proc/net says of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Recorded {
    family: &'static str,
    state: String,
    local: String,
    peer: Option<String>,
    queues: Option<(u64, u64)>,
}

fn sockets(autopsy: &Autopsy<'_>, recording: &Path, result: &mut MachineComparison) -> Result<()> {
    let mut recorded: BTreeMap<u64, Recorded> = BTreeMap::new();
    let net = recording.join("_/net");
    for (name, family) in
        [("tcp", "inet"), ("tcp6", "inet6"), ("udp", "inet"), ("udp6", "inet6"), ("raw", "inet")]
    {
        let table = text(net.join(name)).unwrap_or_default();
        recorded.extend(table.lines().skip(1).filter_map(|line| internet(line, family)));
    }
    let table = text(net.join("unix")).unwrap_or_default();
    recorded.extend(table.lines().skip(1).filter_map(unix));
    let table = text(net.join("netlink")).unwrap_or_default();
    recorded.extend(table.lines().skip(1).filter_map(netlink));
    for socket in autopsy.socket_summaries()?.iter().filter(|socket| socket.net_namespace.is_none()) {
        let Some(expected) = recorded.get(&socket.inode) else { continue };
        result.same(
            expected.family,
            &format!("socket:[{}]", socket.inode),
            expected.clone(),
            as_recorded(socket, expected),
        );
    }
    Ok(())
}

/// A socket in the words of [`Recorded`]; what the recording does not say is as it is there.
fn as_recorded(socket: &SocketSummary, expected: &Recorded) -> Recorded {
    let family = ["inet", "inet6", "unix", "netlink"].into_iter().find(|family| *family == socket.family);
    Recorded {
        family: family.unwrap_or("another family"),
        state: socket.state.clone(),
        local: socket.local.clone(),
        peer: expected.peer.as_ref().map(|_| socket.peer.clone()),
        queues: expected.queues.map(|_| match socket.state.as_str() {
            // The backlog is not in /proc/net/tcp.
            "LISTEN" => (socket.receive_queue, 0),
            _ => (socket.receive_queue, socket.send_queue),
        }),
    }
}

/// A line of /proc/net/tcp and its like: number, addresses, state, queues, …, inode.
fn internet(line: &str, family: &'static str) -> Option<(u64, Recorded)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let state = usize::from_str_radix(fields.get(3)?, 16).ok()?;
    let (sent, received) = fields.get(4)?.split_once(':')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let peer = address(fields.get(2)?)?;
    let recorded = Recorded {
        family,
        state: crate::socket::STATES.get(state).map(|state| (*state).to_owned())?,
        local: address(fields.get(1)?)?.to_string(),
        peer: Some(if peer.port() == 0 { String::new() } else { peer.to_string() }),
        queues: Some((number(received)?, number(sent)?)),
    };
    Some((fields.get(9)?.parse().ok()?, recorded))
}

/// `0100007F:1E61`: words of the address in the machine's order.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words: Vec<[u8; 4]> = (0..ip.len() / 8)
        .map(|n| Some(u32::from_str_radix(ip.get(n * 8..n * 8 + 8)?, 16).ok()?.to_le_bytes()))
        .collect::<Option<_>>()?;
    match words.as_slice() {
        [v4] => Some((Ipv4Addr::from(*v4), port).into()),
        [a, b, c, d] => {
            let bytes: [u8; 16] = [*a, *b, *c, *d].concat().try_into().ok()?;
            Some((Ipv6Addr::from(bytes), port).into())
        }
        _ => None,
    }
}

/// A line of /proc/net/unix: number, references, protocol, flags, type, state, inode, name.
fn unix(line: &str) -> Option<(u64, Recorded)> {
    const LISTENS: u32 = 0x1_0000;
    let fields: Vec<&str> = line.split_whitespace().collect();
    let flags = u32::from_str_radix(fields.get(3)?, 16).ok()?;
    let state = match (flags & LISTENS != 0, *fields.get(5)?) {
        (true, _) => "LISTEN",
        (false, "03") => "ESTAB",
        (false, _) => "UNCONN",
    };
    let recorded = Recorded {
        family: "unix",
        state: state.into(),
        local: fields.get(7).map(|name| (*name).to_owned()).unwrap_or_default(),
        peer: None,
        queues: None,
    };
    Some((fields.get(6)?.parse().ok()?, recorded))
}

/// A line of /proc/net/netlink: address, protocol, port, groups, bytes received, sent, …, inode.
fn netlink(line: &str) -> Option<(u64, Recorded)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let recorded = Recorded {
        family: "netlink",
        state: "UNCONN".into(),
        local: (*fields.get(2)?).to_owned(),
        peer: None,
        queues: Some((fields.get(4)?.parse().ok()?, fields.get(5)?.parse().ok()?)),
    };
    Some((fields.get(9)?.parse().ok()?, recorded))
}

fn mounts(autopsy: &Autopsy<'_>, recording: &Path, result: &mut MachineComparison) -> Result<()> {
    for namespace in autopsy.all_mounts()? {
        let table = |pid: &Pid| text(recording.join(pid.to_string()).join("mountinfo"));
        let Some(expected) = namespace.pids.iter().find_map(table) else { continue };
        let expected: BTreeMap<u64, String> = expected.lines().filter_map(recorded_mount).collect();
        // The one below all others cannot be reached, and is not shown.
        let shown = namespace.mounts.iter().filter(|mount| mount.fs_type.as_bytes() != b"rootfs");
        let found: BTreeMap<u64, String> = shown.map(|mount| (mount.id as u64, mount_line(mount))).collect();
        for id in expected.keys().chain(found.keys()).collect::<BTreeSet<_>>() {
            let what = format!("{id} of mnt:[{}]", namespace.number);
            result.same("mount", &what, expected.get(id), found.get(id));
        }
    }
    Ok(())
}

fn modules(autopsy: &Autopsy<'_>, recording: &Path, result: &mut MachineComparison) -> Result<()> {
    let recorded = text(recording.join("_/modules")).unwrap_or_default();
    let found = autopsy.modules()?;
    result.same("modules", "loaded", recorded.lines().count(), found.len());
    for line in recorded.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [name, size, references, users, state, base, taint @ ..] = fields.as_slice() else { continue };
        let Some(module) = found.iter().find(|module| module.name == *name) else {
            result.differences.push(format!("module {name} is missing"));
            continue;
        };
        let users: Vec<&str> =
            users.split(',').filter(|user| !["", "-", "[permanent]"].contains(user)).collect();
        let taint = taint.first().map_or("", |taint| taint.trim_matches(['(', ')']));
        let sorted = |text: &str| text.chars().collect::<BTreeSet<char>>();
        let numbers = (module.size.to_string(), module.references.to_string(), format!("{:#x}", module.base));
        result.same(
            "module",
            name,
            ((*size).to_owned(), (*references).to_owned(), (*base).to_owned()),
            numbers,
        );
        result.same("module", name, users, module.used_by.iter().map(String::as_str).collect());
        result.same(
            "module",
            name,
            (state.to_lowercase(), sorted(taint)),
            (module.state.clone(), sorted(&module.taint)),
        );
    }
    Ok(())
}

fn slabs(autopsy: &Autopsy<'_>, recording: &Path, result: &mut MachineComparison) -> Result<()> {
    let Some(recorded) = text(recording.join("_/slabinfo")) else { return Ok(()) };
    let found = autopsy.slab_caches()?;
    // Two lines of header.
    let lines: Vec<&str> = recorded.lines().skip(2).collect();
    result.same("slab caches", "there", lines.len(), found.len());
    for line in lines {
        let mut fields = line.split_whitespace();
        let Some(name) = fields.next() else { continue };
        let numbers: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
        let [active, objects, size, per_slab, pages] = numbers[..] else { continue };
        let caches: Vec<_> = found.iter().filter(|cache| cache.name == name).collect();
        let [cache] = caches.as_slice() else {
            result.differences.push(format!("slab cache {name}: there are {} of it", caches.len()));
            continue;
        };
        let shape =
            (u64::from(cache.size), u64::from(cache.objects_per_slab), u64::from(cache.pages_per_slab));
        result.same("slab cache", name, (size, per_slab, pages), shape);
        let near = |a: u64, b: u64| a.abs_diff(b) <= MOVING_OBJECTS.max(a / 4);
        let found = (cache.active, cache.objects);
        let all_near = near(active, found.0) && near(objects, found.1);
        result.same(
            "slab objects",
            name,
            (active, objects),
            if all_near { (active, objects) } else { found },
        );
        // A cache in which nothing moves is counted to the object.
        let exact = found == (active, objects);
        *result.compared.entry("slab objects to the last").or_default() += usize::from(exact);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_net_are_understood() {
        let line = "   0: 0100007F:1E61 0100007F:A3C4 01 00000000:00000006 00:00000000 00000000  1000        0 4711 1 x";
        let (inode, socket) = internet(line, "inet").unwrap();
        assert_eq!((inode, socket.local.as_str()), (4711, "127.0.0.1:7777"));
        assert_eq!((socket.state.as_str(), socket.queues), ("ESTAB", Some((6, 0))));
        let line = "0: 00000000000000000000000001000000:1E63 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 12";
        let (_, socket) = internet(line, "inet6").unwrap();
        assert_eq!((socket.local.as_str(), socket.state.as_str()), ("[::1]:7779", "LISTEN"));
        assert_eq!(socket.peer.as_deref(), Some(""));
        let (inode, socket) =
            unix("x: 00000002 00000000 00010000 0001 01   311 /run/systemd/private").unwrap();
        assert_eq!(
            (inode, socket.state.as_str(), socket.local.as_str()),
            (311, "LISTEN", "/run/systemd/private")
        );
    }

    #[test]
    fn a_difference_is_one() {
        let mut result = MachineComparison::default();
        result.same("x", "y", 1, 1);
        result.same("x", "y", 1, 2);
        assert_eq!(result.compared["x"], 2);
        assert_eq!(result.differences, ["x y: expected 1, found 2"]);
    }
}
