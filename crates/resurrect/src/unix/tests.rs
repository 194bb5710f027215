use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicI32, Ordering};

use super::*;
use crate::testing::Mem;
use snapshot::{OpenFile, UnixData, UnixDirectory};

/// A machine with sockets. A socket with number n is that of file n.
struct Machine {
    snapshot: Snapshot,
    memory: Vec<u8>,
}

const BASE: RawFd = 700;

impl Machine {
    fn new() -> Self {
        Machine { snapshot: Snapshot::default(), memory: Vec::new() }
    }

    fn socket(&mut self, number: u64, kind: UnixKind) -> &mut UnixSocket {
        let mut options =
            snapshot::SocketOptions { peek_offset: -1, receive_low_water: 1, ..Default::default() };
        (options.send_buffer, options.receive_buffer) = (Some(212_992), Some(212_992));
        let socket = UnixSocket {
            kind,
            file: Some(FileId(number)),
            closed: false,
            address: None,
            owns_address: false,
            place: None,
            peer: None,
            listening: None,
            waiting: Vec::new(),
            queue: Vec::new(),
            shutdown: 0,
            error: 0,
            peer_credentials: Some(UnixCredentials { pid: free_pid(), uid: 1234, gid: 77, groups: vec![5] }),
            max_queue: 512,
            options,
            unsupported: None,
        };
        let file = OpenFile {
            kind: FileKind::Unix { socket: UnixId(number) },
            path: "socket:[1]".into(),
            deleted: false,
            mount_namespace: None,
            flags: libc::O_RDWR,
            pos: 0,
            inode: snapshot::InodeId(number),
            owner_pid: 0,
            owner_is_thread: false,
            owner_signal: 0,
            count: 1,
        };
        self.snapshot.files.insert(FileId(number), file);
        self.snapshot.unix_sockets.insert(UnixId(number), socket);
        self.get(number)
    }

    fn get(&mut self, number: u64) -> &mut UnixSocket {
        self.snapshot.unix_sockets.get_mut(&UnixId(number)).unwrap()
    }

    fn pair(&mut self, a: u64, b: u64, kind: UnixKind) {
        self.socket(a, kind).peer = Some(UnixId(b));
        self.socket(b, kind).peer = Some(UnixId(a));
    }

    fn queue(&mut self, number: u64, text: &str) -> &mut UnixMessage {
        let data = UnixData { addr: self.memory.len() as u64, len: text.len() as u32 };
        self.memory.extend(text.as_bytes());
        let queue = &mut self.get(number).queue;
        queue.push(UnixMessage { data: vec![data], ..UnixMessage::default() });
        queue.last_mut().unwrap()
    }

    fn close(&mut self, number: u64) {
        let socket = self.get(number);
        (socket.closed, socket.file, socket.owns_address) = (true, None, false);
    }

    /// Makes all sockets, or those that are wanted.
    fn make(&self, wanted: &[u64]) -> (BTreeMap<u64, OwnedFd>, Outcome) {
        let fds: BTreeMap<u64, OwnedFd> =
            wanted.iter().map(|number| (*number, placeholder(BASE).unwrap())).collect();
        let numbers = fds.iter().map(|(number, fd)| (FileId(*number), fd.as_raw_fd())).collect();
        let outcome = make_all(&self.snapshot, &Mem(self.memory.clone()), BASE, &numbers, &|_| {
            Err("there are none".into())
        });
        (fds, outcome)
    }

    fn make_well(&self, wanted: &[u64]) -> BTreeMap<u64, OwnedFd> {
        let (fds, outcome) = self.make(wanted);
        assert_eq!(outcome.failed, BTreeMap::new());
        assert_eq!(outcome.losses, BTreeMap::new());
        fds
    }
}

fn directory(path: &Path) -> UnixDirectory {
    UnixDirectory { path: Bytes(path.as_os_str().as_bytes().to_vec()), mode: 0o2750, uid: 21, gid: 22 }
}

fn path(text: &str) -> Bytes {
    Bytes([text.as_bytes(), &[0]].concat())
}

/// One that nobody has for the time being, another each time: tests run side by side.
fn free_pid() -> Pid {
    static TAKEN: AtomicI32 = AtomicI32::new(0);
    let max: Pid = std::fs::read_to_string("/proc/sys/kernel/pid_max").unwrap().trim().parse().unwrap();
    let start = std::process::id() as Pid * 50 % (max / 2) + TAKEN.fetch_add(1, Ordering::Relaxed);
    (300..max - start).rev().find(|pid| sys::occupant(*pid).is_none()).unwrap()
}

fn can_choose_pids() -> bool {
    let works = nix::unistd::geteuid().is_root();
    if !works {
        eprintln!("not tried: PIDs can be chosen by root only");
    }
    works
}

fn receive(fd: &OwnedFd) -> Result<String, Errno> {
    let mut buffer = [0; 100];
    // SAFETY: the kernel writes at most as many bytes as there is room for.
    let n = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), 100, libc::MSG_DONTWAIT) };
    Errno::result(n).map(|n| String::from_utf8_lossy(&buffer[..n as usize]).into_owned())
}

fn peer_of(fd: &OwnedFd) -> (Pid, u32, u32) {
    let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as u32;
    // SAFETY: the kernel writes a ucred.
    let r = unsafe {
        let value = (&raw mut who).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, value, &raw mut len)
    };
    Errno::result(r).unwrap();
    (who.pid, who.uid, who.gid)
}

fn name_of(fd: &OwnedFd, peer: bool) -> Vec<u8> {
    let mut name = [0u8; 128];
    let mut len = 128;
    let nr = if peer { libc::SYS_getpeername } else { libc::SYS_getsockname };
    // SAFETY: the kernel writes at most 128 bytes, and the length.
    unsafe { sys::raw(nr, [fd.as_raw_fd() as u64, name.as_mut_ptr() as u64, &raw mut len as u64, 0, 0, 0]) }
        .unwrap();
    name[2..len as usize].to_vec()
}

#[test]
fn a_pair_keeps_what_is_on_its_way_and_who_made_it() {
    if !can_choose_pids() {
        return;
    }
    let mut machine = Machine::new();
    machine.pair(1, 2, UnixKind::Stream);
    machine.queue(1, "to one");
    machine.queue(2, "to two");
    machine.queue(2, ", and more");
    let who = machine.get(1).peer_credentials.clone().unwrap();
    let fds = machine.make_well(&[1, 2]);
    assert_eq!(peer_of(&fds[&1]), (who.pid, 1234, 77));
    assert_eq!(receive(&fds[&1]).unwrap(), "to one");
    assert_eq!(receive(&fds[&2]).unwrap(), "to two, and more");
    assert_eq!(receive(&fds[&2]), Err(Errno::EAGAIN));
    assert!(name_of(&fds[&1], false).is_empty());
}

#[test]
fn who_does_not_come_back_has_closed() {
    if !can_choose_pids() {
        return;
    }
    // A service's standard output: the other end was accepted by somebody who listened under a path.
    let mut machine = Machine::new();
    machine.pair(1, 2, UnixKind::Stream);
    machine.get(2).address = Some(path("/run/survivors/journal"));
    machine.queue(1, "still there");
    machine.queue(2, "never read");
    let fds = machine.make_well(&[1]);
    assert_eq!(name_of(&fds[&1], true), b"/run/survivors/journal\0");
    assert_eq!(receive(&fds[&1]).unwrap(), "still there");
    assert_eq!(receive(&fds[&1]).unwrap(), "");
    assert_eq!(send_one(fds[&1].as_raw_fd(), b"x", &[], None, None), Err(Errno::EPIPE));
    // The other way round: the client has gone.
    let fds = machine.make_well(&[2]);
    assert_eq!(receive(&fds[&2]).unwrap(), "never read");
    assert_eq!(receive(&fds[&2]).unwrap(), "");
}

#[test]
fn sockets_are_bound_where_their_names_lead() {
    if !can_choose_pids() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let place = |file: &str, deleted| UnixPlace {
        path: Bytes(dir.join(file).as_os_str().as_bytes().to_vec()),
        deleted,
        mount_namespace: None,
        mode: 0o640,
        uid: 12,
        gid: 13,
        directories: vec![directory(&dir), directory(&dir.join("in"))],
    };
    let mut machine = Machine::new();
    // Bound to a relative name, below another root, and through a link to a directory that has to be made again.
    std::os::unix::fs::symlink(dir.join("in"), dir.join("link")).unwrap();
    let through = dir.join("link/file").to_str().unwrap().to_owned();
    let names = [
        (1, "relative", "relative"),
        (2, "/in/root", "in/root"),
        (3, "/gone", "gone"),
        (4, through.as_str(), "in/file"),
    ];
    for (number, name, file) in names {
        let socket = machine.socket(number, UnixKind::Datagram);
        (socket.address, socket.owns_address) = (Some(path(name)), true);
        socket.place = Some(place(file, number == 3));
        socket.peer_credentials = None;
        machine.queue(number, "hello").sender_address = Some(path("/somebody"));
    }
    // What the dead kernel left.
    drop(std::os::unix::net::UnixListener::bind(dir.join("relative")).unwrap());
    let fds = machine.make_well(&[4, 1, 2, 3]);
    for (number, name, _) in names {
        assert_eq!(name_of(&fds[&number], false), path(name).as_bytes());
        assert_eq!(receive(&fds[&number]).unwrap(), "hello");
    }
    let meta = std::fs::symlink_metadata(dir.join("in")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o2750, 21, 22), "it was not there");
    assert_ne!(std::fs::symlink_metadata(&dir).unwrap().uid(), 21, "it was there");
    let meta = std::fs::symlink_metadata(dir.join("in/root")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, 12, 13));
    assert!(!dir.join("gone").exists());
    // Another file has the name.
    drop(fds);
    std::fs::remove_file(dir.join("relative")).unwrap();
    std::fs::write(dir.join("relative"), "precious").unwrap();
    let (_, outcome) = machine.make(&[1]);
    assert!(outcome.failed[&FileId(1)].contains("is another file now"));
    assert_eq!(std::fs::read(dir.join("relative")).unwrap(), b"precious");
}

#[test]
fn waiting_connections_are_accepted_in_order() {
    if !can_choose_pids() {
        return;
    }
    let mut machine = Machine::new();
    let name = Bytes(b"\0survivors-waiting".to_vec());
    let listener = machine.socket(1, UnixKind::Stream);
    (listener.address, listener.owns_address, listener.listening) = (Some(name.clone()), true, Some(5));
    listener.waiting = vec![UnixId(12), UnixId(13)];
    for (client, waiting) in [(2, 12), (3, 13)] {
        machine.pair(client, waiting, UnixKind::Stream);
        machine.get(waiting).file = None;
        machine.get(waiting).address = Some(name.clone());
    }
    let who = machine.get(12).peer_credentials.clone().unwrap();
    machine.queue(12, "first").credentials = Some(UnixCredentials { groups: vec![], ..who.clone() });
    machine.queue(13, "second");
    // The second client does not come back.
    let fds = machine.make_well(&[1, 2]);
    let accept = || {
        // SAFETY: no address is asked for; what comes back is ours.
        unsafe {
            let fd = libc::accept(fds[&1].as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut());
            OwnedFd::from_raw_fd(Errno::result(fd).unwrap())
        }
    };
    let first = accept();
    assert_eq!(peer_of(&first), (who.pid, 1234, 77));
    assert_eq!(receive(&first).unwrap(), "first");
    assert_eq!(receive(&first), Err(Errno::EAGAIN));
    let second = accept();
    assert_eq!(receive(&second).unwrap(), "second");
    assert_eq!(receive(&second).unwrap(), "");
    // A client whose listener does not come back.
    let fds = machine.make_well(&[2]);
    assert_eq!(receive(&fds[&2]).unwrap(), "");
}

#[test]
fn files_are_on_their_way_again() {
    if !can_choose_pids() {
        return;
    }
    let mut machine = Machine::new();
    machine.pair(1, 2, UnixKind::Seqpacket);
    machine.pair(3, 4, UnixKind::Stream);
    machine.queue(1, "").files = vec![];
    machine.queue(1, "take it").files = vec![FileId(3), FileId(1)];
    machine.queue(3, "from afar");
    machine.close(4);
    machine.get(3).shutdown = 3;
    assert_eq!(machine.snapshot.held_by(FileId(1)), [FileId(3), FileId(1)]);
    let fds = machine.make_well(&[1, 2, 3]);
    assert_eq!(receive(&fds[&1]).unwrap(), "");
    let (mut control, mut buffer) = ([0u64; 16], [0u8; 16]);
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: 16 };
    // SAFETY: the kernel writes into the buffers, at most as much as there is room for; the descriptors are ours.
    let file = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), 128);
        assert_eq!(libc::recvmsg(fds[&1].as_raw_fd(), &mut message, 0), 7);
        OwnedFd::from_raw_fd(control[2] as i32)
    };
    assert_eq!(receive(&file).unwrap(), "from afar");
    assert_eq!(receive(&file).unwrap(), "");
    let (_, outcome) = machine.make(&[1, 2]);
    assert!(outcome.failed[&FileId(1)].contains("an open file"));
}

#[test]
fn a_socket_on_its_way_that_cannot_be_made_costs_its_receiver() {
    if !can_choose_pids() {
        return;
    }
    let mut machine = Machine::new();
    machine.pair(1, 2, UnixKind::Stream);
    machine.queue(1, "take it").files = vec![FileId(3)];
    machine.pair(5, 6, UnixKind::Stream);
    machine.queue(5, "take that").files = vec![FileId(1)];
    let bad = machine.socket(3, UnixKind::Datagram);
    (bad.address, bad.owns_address) = (Some(path("/nowhere/../name")), true);
    bad.place = Some(UnixPlace {
        path: "/dev/null".into(),
        deleted: false,
        mount_namespace: None,
        mode: 0,
        uid: 0,
        gid: 0,
        directories: Vec::new(),
    });
    let (_, outcome) = machine.make(&[1, 2, 3, 5, 6]);
    let failed: Vec<u64> = outcome.failed.keys().map(|file| file.0).collect();
    assert_eq!(failed, [1, 3, 5]);
}

#[test]
fn a_datagram_socket_whose_server_is_gone_learns_it_when_it_sends() {
    if !can_choose_pids() {
        return;
    }
    let mut machine = Machine::new();
    let client = machine.socket(1, UnixKind::Datagram);
    (client.peer, client.peer_credentials) = (Some(UnixId(2)), None);
    let server = machine.socket(2, UnixKind::Datagram);
    (server.address, server.peer_credentials) = (Some(path("/run/survivors/log")), None);
    machine.queue(2, "for nobody");
    let fds = machine.make_well(&[1]);
    assert_eq!(name_of(&fds[&1], true), path("/run/survivors/log").as_bytes());
    assert_eq!(send_one(fds[&1].as_raw_fd(), b"x", &[], None, None), Err(Errno::ECONNREFUSED));
}

#[test]
fn a_pid_that_is_taken_is_a_loss_and_the_user_is_right() {
    if !can_choose_pids() {
        return;
    }
    let mut machine = Machine::new();
    machine.pair(1, 2, UnixKind::Stream);
    machine.get(1).peer_credentials.as_mut().unwrap().pid = 1;
    let (fds, outcome) = machine.make(&[1, 2]);
    assert!(outcome.failed.is_empty());
    for file in [1, 2] {
        assert_eq!(outcome.losses[&FileId(file)][0].code, "peer-credentials");
    }
    let (pid, uid, gid) = peer_of(&fds[&1]);
    assert!(pid != 1 && (uid, gid) == (1234, 77));
}

#[test]
fn a_name_is_tried_from_where_it_leads_to_the_file() {
    let from = |place: &str, name: &str| from_where(Path::new(place), Path::new(name)).ok();
    assert_eq!(from("/nowhere/a", "/nowhere/a"), Some(Where::Here));
    assert_eq!(from("/nowhere/a/b", "a/b"), Some(Where::Directory("/nowhere".into())));
    assert_eq!(from("/a", "./a"), Some(Where::Directory("/".into())));
    assert_eq!(from("/nowhere/a/b", "/a/b"), Some(Where::Root("/nowhere".into())));
    assert_eq!(from("/nowhere/ab", "b"), None);
    assert_eq!(from("/nowhere/a", "../x/a"), None);
}
