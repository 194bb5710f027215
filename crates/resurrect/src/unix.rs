//! Unix sockets: made anew and connected in the names of those who had made and connected them, filled with what nobody had read.
//!
//! Credentials that the kernel takes from the caller (SO_PEERCRED, SCM_CREDENTIALS) come out right because the calls are made by
//! short-lived children of ours with the PID, user and groups in question; they share our descriptors. A name that a socket only
//! shows, because it was inherited from a listening socket or its file is gone, is bound in an empty file system that nobody else sees.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use snapshot::{
    Bytes, FileId, FileKind, NamespaceId, PhysMem, Pid, Process, Reason, Snapshot, UnixCredentials, UnixId,
    UnixKind, UnixMessage, UnixPlace, UnixSocket,
};

use crate::company::Company;
use crate::{first, mount, socket, sys};

/// Large enough for everything that the old queue held, while it is being filled (bytes, as SO_SNDBUFFORCE takes them).
const FILLING_BUFFER: u32 = 1 << 29;
const MAX_DGRAM_QLEN: &str = "/proc/sys/net/unix/max_dgram_qlen";

/// A placeholder's number in our table, taken before the socket itself can be made.
pub(crate) fn placeholder(base: RawFd) -> Result<OwnedFd, Errno> {
    sys::lift(sys::open(Path::new("/dev/null"), libc::O_RDWR, 0)?, base)
}

/// What became of the sockets.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Those that could not be made.
    pub failed: BTreeMap<FileId, String>,
    /// What is different for who has this file.
    pub losses: BTreeMap<FileId, Vec<Reason>>,
}

/// Makes all sockets whose files are in `files`, each at the number that is kept for it there. `held` are all open files.
pub(crate) fn make_all(
    snapshot: &Snapshot,
    mem: &dyn PhysMem,
    base: RawFd,
    files: &BTreeMap<FileId, RawFd>,
    root_of: RootOf<'_>,
) -> Outcome {
    let own = |(id, socket): (&UnixId, &UnixSocket)| {
        let file = socket.file?;
        let kind = FileKind::Unix { socket: *id };
        let fd = files.get(&file).filter(|_| snapshot.files.get(&file).is_some_and(|f| f.kind == kind))?;
        Some((*id, Own { file, fd: *fd }))
    };
    let own: BTreeMap<UnixId, Own> = snapshot.unix_sockets.iter().filter_map(own).collect();
    let mut maker = Maker {
        snapshot,
        mem,
        base,
        own,
        files,
        root_of,
        hall: None,
        halls: 0,
        reach: BTreeMap::new(),
        to_close: Vec::new(),
        outcome: Outcome::default(),
    };
    if !maker.own.is_empty() {
        maker.all();
    }
    maker.outcome
}

/// The root directory of a mount namespace.
pub(crate) type RootOf<'a> = &'a dyn Fn(NamespaceId) -> Result<PathBuf, String>;

/// A socket that is wanted.
#[derive(Clone, Copy)]
struct Own {
    file: FileId,
    fd: RawFd,
}

/// From where a name leads to a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Where {
    /// From where we are (abstract names too).
    Here,
    /// From this working directory.
    Directory(PathBuf),
    /// From this root directory.
    Root(PathBuf),
    /// From a directory of its own in the empty file system.
    Hall(u32),
}

struct Maker<'a> {
    snapshot: &'a Snapshot,
    mem: &'a dyn PhysMem,
    base: RawFd,
    own: BTreeMap<UnixId, Own>,
    files: &'a BTreeMap<FileId, RawFd>,
    root_of: RootOf<'a>,
    /// The empty file system, once somebody needs it, and how many directories it has.
    hall: Option<OwnedFd>,
    halls: u32,
    /// From where the names lead that sockets own.
    reach: BTreeMap<UnixId, Where>,
    /// The ends of those who do not come back: they close last.
    to_close: Vec<(UnixId, OwnedFd)>,
    outcome: Outcome,
}

type Done = Result<(), String>;

fn say(what: &'static str) -> impl Fn(Errno) -> String {
    move |e| format!("{what}: {e}")
}

impl Maker<'_> {
    /// Each step for all sockets: the later ones need the earlier ones done everywhere.
    fn all(&mut self) {
        let ids: Vec<UnixId> = self.own.keys().copied().collect();
        let max_queue = max_queue();
        let mut connected = BTreeSet::new();
        for &id in &ids {
            self.step(id, |maker| maker.make(id, &mut connected));
        }
        for &id in &ids {
            self.step(id, |maker| maker.bind_own(id));
        }
        if let Some(before) = max_queue {
            set_max_queue(before);
        }
        for &id in &ids {
            self.step(id, |maker| maker.listen(id));
        }
        for &id in &ids {
            self.step(id, |maker| maker.was_connected(id));
        }
        for &id in &ids {
            self.step(id, |maker| maker.fill(id));
        }
        for &id in &ids {
            self.step(id, |maker| maker.connect_datagram(id));
        }
        // Those who do not come back leave; what they have sent stays.
        self.to_close.clear();
        for &id in &ids {
            self.step(id, |maker| maker.set_state(id));
        }
        // One that holds a failed one fails, and so on; each round finds one at least.
        for _ in 0..ids.len() {
            let before = self.outcome.failed.len();
            for &id in &ids {
                self.step(id, |maker| maker.holds_good_ones(id));
            }
            if self.outcome.failed.len() == before {
                break;
            }
        }
    }

    fn holds_good_ones(&self, id: UnixId) -> Done {
        let own = self.own.get(&id).ok_or("it was not made")?;
        let held = self.snapshot.held_by(own.file);
        match held.iter().find_map(|file| self.outcome.failed.get(file)) {
            Some(why) => Err(format!("a socket that is on its way through it: {why}")),
            None => Ok(()),
        }
    }

    /// Nobody must take a placeholder for a socket.
    fn verify(&self, id: UnixId) -> Done {
        let fd = self.fd(id).ok_or("it was not made")?;
        socket::get_option(fd, libc::SOL_SOCKET, libc::SO_TYPE).map(drop).map_err(say("it was not made"))
    }

    fn step(&mut self, id: UnixId, step: impl FnOnce(&mut Self) -> Done) {
        let Some(own) = self.own.get(&id).copied() else { return };
        if self.outcome.failed.contains_key(&own.file) {
            return;
        }
        if let Err(why) = step(self) {
            self.fail(id, &why);
        }
    }

    fn fail(&mut self, id: UnixId, why: &str) {
        if let Some(own) = self.own.get(&id) {
            self.outcome.failed.insert(own.file, why.to_owned());
        }
    }

    fn lose(&mut self, id: UnixId, code: &str, text: String) {
        if let Some(own) = self.own.get(&id) {
            self.outcome.losses.entry(own.file).or_default().push(Reason::new(code, text));
        }
    }

    fn socket(&self, id: UnixId) -> Result<&UnixSocket, String> {
        self.snapshot.unix_sockets.get(&id).ok_or_else(|| "it is not in the snapshot".into())
    }

    /// The number that stands for a socket here: its own, or one that closes when all is done.
    fn end_of(&mut self, id: UnixId) -> Result<RawFd, String> {
        if let Some(own) = self.own.get(&id) {
            return Ok(own.fd);
        }
        let fd = placeholder(self.base).map_err(say("placeholder"))?;
        let number = fd.as_raw_fd();
        self.to_close.push((id, fd));
        Ok(number)
    }

    fn fd(&self, id: UnixId) -> Option<RawFd> {
        let closing = || self.to_close.iter().find(|(other, _)| *other == id).map(|(_, fd)| fd.as_raw_fd());
        self.own.get(&id).map(|own| own.fd).or_else(closing)
    }

    /// Makes the socket, and if it is one of a connected pair both of them.
    fn make(&mut self, id: UnixId, connected: &mut BTreeSet<UnixId>) -> Done {
        if connected.contains(&id) {
            return Ok(());
        }
        let socket = self.socket(id)?.clone();
        if socket.kind == UnixKind::Datagram {
            set_max_queue(socket.max_queue);
        }
        if let Some(peer_id) = socket.peer.filter(|_| socket.listening.is_none()) {
            let peer = self.socket(peer_id)?.clone();
            let mutual = peer.closed || peer.peer == Some(id);
            let waits = peer.file.is_none() && !peer.closed;
            // Datagram sockets have credentials of a peer only from socketpair(2).
            let is_pair = socket.kind != UnixKind::Datagram || socket.peer_credentials.is_some();
            if waits && self.is_waiting(peer_id) {
                // Whoever listens makes the connection, if it comes back.
            } else if mutual && is_pair {
                connected.extend([id, peer_id]);
                let done = self.connect_pair((id, &socket), (peer_id, &peer));
                return done.inspect_err(|why| self.fail(peer_id, why));
            } else if is_pair {
                return Err("the socket that it is connected to is connected to another one".into());
            }
        }
        let waiting_client = socket.peer.is_some() && socket.kind != UnixKind::Datagram;
        let fd = self.own.get(&id).map_or(-1, |own| own.fd);
        place_socket(socket.kind, fd)?;
        if waiting_client && !self.listener_comes_back(socket.peer) {
            // Nobody will ever accept it: as if the listening socket had been closed.
            let (near, _far) = self.pair_for(&[], socket.kind, &UnixCredentials::default())?;
            return sys::dup3(near.as_raw_fd(), fd, true).map_err(say("dup3"));
        }
        Ok(())
    }

    fn is_waiting(&self, id: UnixId) -> bool {
        self.snapshot.unix_sockets.values().any(|socket| socket.waiting.contains(&id))
    }

    fn listener_comes_back(&self, waiting: Option<UnixId>) -> bool {
        let Some(waiting) = waiting else { return false };
        self.own.keys().any(|id| self.socket(*id).is_ok_and(|socket| socket.waiting.contains(&waiting)))
    }

    /// Two sockets that are connected to each other.
    fn connect_pair(&mut self, a: (UnixId, &UnixSocket), b: (UnixId, &UnixSocket)) -> Done {
        let accepted = |s: &UnixSocket| s.address.is_some() && !s.owns_address;
        let fds = (self.end_of(a.0)?, self.end_of(b.0)?);
        // Of a closed one it cannot be told whether its name was its own.
        match (accepted(a.1), accepted(b.1)) {
            (true, true) => match (a.1.closed, b.1.closed) {
                (_, true) => self.connect_through(b, fds.1, a, fds.0),
                _ => self.connect_through(a, fds.0, b, fds.1),
            },
            (true, false) => self.connect_through(b, fds.1, a, fds.0),
            (false, true) => self.connect_through(a, fds.0, b, fds.1),
            (false, false) => {
                let who = a.1.peer_credentials.clone().or_else(|| b.1.peer_credentials.clone());
                let (near, far) = self.pair_for(&[a.0, b.0], a.1.kind, &who.unwrap_or_default())?;
                sys::dup3(near.as_raw_fd(), fds.0, true).map_err(say("dup3"))?;
                sys::dup3(far.as_raw_fd(), fds.1, true).map_err(say("dup3"))?;
                self.name_stranger(a.0, a.1, fds.0)?;
                self.name_stranger(b.0, b.1, fds.1)
            }
        }
    }

    /// A connection as connect(2) and accept(2) make it: `server` shows the name of the socket that listened.
    fn connect_through(
        &mut self,
        client: (UnixId, &UnixSocket),
        client_fd: RawFd,
        server: (UnixId, &UnixSocket),
        server_fd: RawFd,
    ) -> Done {
        let address = server.1.address.clone().ok_or("it has no name")?;
        let from = self.show_only(&address)?;
        let listener = new_socket(server.1.kind, self.base)?;
        place_socket(client.1.kind, client_fd)?;
        self.name_stranger(client.0, client.1, client_fd)?;
        let wanted = |socket: &UnixSocket| socket.peer_credentials.clone().unwrap_or_default();
        self.act(&[client.0], &wanted(client.1), &from, || {
            bind(listener.as_raw_fd(), &address, &from)?;
            // SAFETY: numbers only.
            Errno::result(unsafe { libc::listen(listener.as_raw_fd(), 1) }).map(drop)
        })
        .map_err(say("listen"))?;
        self.act(&[server.0], &wanted(server.1), &from, || {
            call_with_address(libc::SYS_connect, client_fd, &address)
        })
        .map_err(say("connect"))?;
        // SAFETY: no address is asked for.
        let fd = unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC,
            )
        };
        let fd = Errno::result(fd).map_err(say("accept"))?;
        // SAFETY: the kernel has just made it for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        sys::dup3(fd.as_raw_fd(), server_fd, true).map_err(say("dup3"))
    }

    /// socketpair(2), by `who`.
    fn pair_for(
        &mut self,
        ids: &[UnixId],
        kind: UnixKind,
        who: &UnixCredentials,
    ) -> Result<(OwnedFd, OwnedFd), String> {
        let near = placeholder(self.base).map_err(say("placeholder"))?;
        let far = placeholder(self.base).map_err(say("placeholder"))?;
        let numbers = (near.as_raw_fd(), far.as_raw_fd());
        self.act(ids, who, &Where::Here, || {
            let mut made = [0; 2];
            let kind = type_of(kind) | libc::SOCK_CLOEXEC;
            // SAFETY: the kernel writes two descriptors.
            Errno::result(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, made.as_mut_ptr()) })?;
            for (from, to) in made.into_iter().zip([numbers.0, numbers.1]) {
                sys::dup3(from, to, true)?;
                sys::close_range(from, from as u32)?;
            }
            Ok(())
        })
        .map_err(say("socketpair"))?;
        Ok((near, far))
    }

    /// From where a name can be bound that is to be seen only, and to lead nowhere.
    fn show_only(&mut self, address: &Bytes) -> Result<Where, String> {
        if is_abstract(address) {
            return Ok(Where::Here);
        }
        if self.hall.is_none() {
            let hall = mount::new(c"tmpfs").and_then(|fd| sys::lift(fd, self.base));
            self.hall = Some(hall.map_err(say("make an empty file system"))?);
        }
        self.halls += 1;
        Ok(Where::Hall(self.halls))
    }

    /// From where the name that a socket owns leads to it.
    fn reach(&mut self, id: UnixId, socket: &UnixSocket) -> Result<Where, String> {
        if let Some(known) = self.reach.get(&id) {
            return Ok(known.clone());
        }
        let address = socket.address.as_ref().ok_or("it has no name")?;
        let reach = match &socket.place {
            _ if is_abstract(address) => Where::Here,
            Some(place) if !place.deleted => match place.mount_namespace {
                None => from_where(place.path.as_path(), path_of(address)?)?,
                // There, an absolute name leads where it led.
                Some(id) if path_of(address)?.is_absolute() => Where::Root((self.root_of)(id)?),
                Some(_) => return Err("a relative name in another mount namespace".into()),
            },
            _ => self.show_only(address)?,
        };
        self.reach.insert(id, reach.clone());
        Ok(reach)
    }

    /// Gives the end of somebody who does not come back the name that others see it under.
    fn name_stranger(&mut self, id: UnixId, socket: &UnixSocket, fd: RawFd) -> Done {
        let Some(address) = socket.address.as_ref().filter(|_| !self.own.contains_key(&id)) else {
            return Ok(());
        };
        let from = self.show_only(address)?;
        self.as_helper(None, &from, || bind(fd, address, &from)).map_err(say("bind"))
    }

    /// Binds it to the name that is its own.
    fn bind_own(&mut self, id: UnixId) -> Done {
        let socket = self.socket(id)?.clone();
        let (Some(address), true) = (&socket.address, socket.owns_address) else { return Ok(()) };
        let fd = self.fd(id).ok_or("it was not made")?;
        let place = socket.place.as_ref().filter(|place| !place.deleted);
        if let Some(place) = place.filter(|place| place.mount_namespace.is_some()) {
            let from = self.reach(id, &socket)?;
            let work = || {
                make_way(place).map_err(|_| Errno::ENOTDIR)?;
                call_with_address(libc::SYS_bind, fd, address)?;
                set_owner(place).map_err(|_| Errno::EPERM)
            };
            return self.as_helper(None, &from, work).map_err(say("bind in its mount namespace"));
        }
        if let Some(place) = place {
            make_way(place)?;
        }
        // Names lead through directories, which are all there now.
        let from = self.reach(id, &socket)?;
        self.as_helper(None, &from, || bind(fd, address, &from)).map_err(say("bind"))?;
        place.map_or(Ok(()), set_owner)
    }

    /// Lets it listen, and connects those who had been waiting, with what they had sent.
    fn listen(&mut self, id: UnixId) -> Done {
        let socket = self.socket(id)?.clone();
        let Some(backlog) = socket.listening else { return Ok(()) };
        let fd = self.fd(id).ok_or("it was not made")?;
        let address = socket.address.clone().ok_or("it listens without a name")?;
        let who = socket.peer_credentials.clone().unwrap_or_default();
        // PID 1 says so itself when it is there.
        let first = self.snapshot.process(first::PID).filter(|p| p.pid == who.pid);
        match first.is_some_and(|p| p.decision.is_continue()) {
            true => self.as_helper(None, &Where::Here, || socket::listen(fd, backlog)),
            false => self.act(&[id], &who, &Where::Here, || socket::listen(fd, backlog)),
        }
        .map_err(say("listen"))?;
        let from = self.reach(id, &socket)?;
        for &waiting_id in &socket.waiting {
            let waiting = self.socket(waiting_id)?.clone();
            let client = waiting.peer.filter(|client| self.own.contains_key(client));
            let client_fd = match client {
                Some(client) => self.end_of(client)?,
                None => self.end_of(waiting_id)?,
            };
            if client.is_none() {
                place_socket(socket.kind, client_fd)?;
            }
            // A connect that would wait is an error here: the queue had room for it.
            sys::fcntl(client_fd, libc::F_SETFL, libc::O_NONBLOCK.into()).map_err(say("F_SETFL"))?;
            let who = waiting.peer_credentials.clone().unwrap_or_default();
            self.act(&[id], &who, &from, || call_with_address(libc::SYS_connect, client_fd, &address))
                .map_err(say("connect"))?;
            self.send(id, &waiting.queue, client_fd, None)?;
        }
        Ok(())
    }

    /// Whoever waits to be accepted shares the fate of the socket that is to accept it.
    fn was_connected(&mut self, id: UnixId) -> Done {
        let Some(peer) = self.socket(id)?.peer else { return Ok(()) };
        let listener =
            |other: &&UnixId| self.socket(**other).is_ok_and(|other| other.waiting.contains(&peer));
        match self.own.keys().find(listener).and_then(|listener| self.own.get(listener)) {
            Some(listener) if self.outcome.failed.contains_key(&listener.file) => {
                Err("the listening socket that it waits for could not be made".into())
            }
            _ => Ok(()),
        }
    }

    /// The other end was closed while there was something in it that nobody had read.
    fn was_reset(&self, socket: &UnixSocket) -> bool {
        let closed = socket.peer.is_some_and(|peer| self.socket(peer).is_ok_and(|peer| peer.closed));
        closed && socket.error == libc::ECONNRESET && socket.kind != UnixKind::Datagram
    }

    /// Sends what it had received and nobody had read.
    fn fill(&mut self, id: UnixId) -> Done {
        let socket = self.socket(id)?.clone();
        if self.was_reset(&socket) {
            let fd = self.fd(id).ok_or("it was not made")?;
            send_one(fd, b"?", &[], None, None).map_err(say("send"))?;
        }
        if socket.queue.is_empty() {
            return Ok(());
        }
        if socket.kind != UnixKind::Datagram {
            let from =
                socket.peer.and_then(|peer| self.fd(peer)).ok_or("whoever sent what it holds is gone")?;
            return self.send(id, &socket.queue, from, None);
        }
        let peer = socket.peer.filter(|_| socket.peer_credentials.is_some());
        let pair = peer.and_then(|peer| self.fd(peer));
        let of_one =
            |a: &UnixMessage, b: &UnixMessage| (a.sender, &a.sender_address) == (b.sender, &b.sender_address);
        for messages in socket.queue.chunk_by(of_one) {
            match pair {
                Some(sender) => self.send(id, messages, sender, None)?,
                None => self.send_datagrams(id, &socket, messages)?,
            }
        }
        Ok(())
    }

    /// Messages of one sender to a socket that has a name, from one that has the sender's.
    fn send_datagrams(&mut self, id: UnixId, socket: &UnixSocket, messages: &[UnixMessage]) -> Done {
        let Some(message) = messages.first() else { return Ok(()) };
        let address = socket.address.clone().ok_or("it has no name that a message could be sent to")?;
        let from = self.reach(id, socket)?;
        let temporary;
        let sender = message.sender.filter(|sender| self.own.contains_key(sender));
        let fd = match sender.and_then(|sender| self.fd(sender)) {
            Some(fd) => fd,
            None => {
                temporary = new_socket(UnixKind::Datagram, self.base)?;
                if let Some(name) = &message.sender_address {
                    let from = self.show_only(name)?;
                    let fd = temporary.as_raw_fd();
                    let bind = || bind(fd, name, &from);
                    self.as_helper(None, &from, bind).map_err(say("bind the sender of a message"))?;
                }
                temporary.as_raw_fd()
            }
        };
        self.send(id, messages, fd, Some((&address, &from)))
    }

    /// Sends what the socket `id` is to hold, from `fd`.
    fn send(&mut self, id: UnixId, queue: &[UnixMessage], fd: RawFd, to: Option<(&Bytes, &Where)>) -> Done {
        if queue.is_empty() {
            return Ok(());
        }
        let before = socket::get_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF).map_err(say("SO_SNDBUF"))?;
        socket::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, FILLING_BUFFER as i32)
            .map_err(say("SO_SNDBUFFORCE"))?;
        for now in queue.chunk_by(|a, b| a.credentials == b.credentials) {
            let Some(first) = now.first() else { continue };
            let mut contents = Vec::new();
            for message in now {
                contents.push((self.bytes(message)?, self.descriptors(message)?));
            }
            let here = Where::Here;
            let (address, from) = to.map_or((None, &here), |(address, from)| (Some(address), from));
            let work = |who: Option<&UnixCredentials>| {
                contents.iter().try_for_each(|(bytes, files)| send_one(fd, bytes, files, who, address))
            };
            match &first.credentials {
                None if *from == Where::Here => work(None).map_err(say("send"))?,
                None => self.as_helper(None, from, || work(None)).map_err(say("send"))?,
                Some(who) => {
                    let sent = self.as_helper(Some(who.pid), from, || work(Some(who)));
                    match sent {
                        Ok(()) => {}
                        // Somebody has this PID: then it may be named.
                        Err(Errno::EEXIST) => {
                            self.as_helper(None, from, || work(Some(who))).map_err(say("send"))?
                        }
                        Err(e) => return Err(say("send")(e)),
                    }
                    if who.pid <= 0 {
                        let text = "a message in its queue had a sender without a number".to_owned();
                        self.lose(id, "sender", text);
                    }
                }
            }
        }
        socket::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, before / 2)
            .map_err(say("SO_SNDBUFFORCE"))
    }

    fn bytes(&self, message: &UnixMessage) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        for data in &message.data {
            bytes.extend_from_slice(&self.mem.map(data.addr, data.len as usize).map_err(|e| e.to_string())?);
        }
        Ok(bytes)
    }

    fn descriptors(&self, message: &UnixMessage) -> Result<Vec<RawFd>, String> {
        let lost = || "an open file that is on its way through it could not be opened".to_owned();
        message.files.iter().map(|file| self.files.get(file).copied().ok_or_else(lost)).collect()
    }

    /// Connects a datagram socket to where it was connected.
    fn connect_datagram(&mut self, id: UnixId) -> Done {
        let socket = self.socket(id)?.clone();
        let Some(peer_id) = socket.peer.filter(|_| socket.kind == UnixKind::Datagram) else { return Ok(()) };
        if socket.peer_credentials.is_some() {
            return Ok(());
        }
        let fd = self.fd(id).ok_or("it was not made")?;
        let peer = self.socket(peer_id)?.clone();
        let address = peer.address.clone().ok_or("the socket that it is connected to has no name")?;
        if self.own.contains_key(&peer_id) {
            let from = self.reach(peer_id, &peer)?;
            let connect = || call_with_address(libc::SYS_connect, fd, &address);
            return self.as_helper(None, &from, connect).map_err(say("connect"));
        }
        // Somebody may be there under the same name; else it is as if the other one had been closed.
        let is_there = |place: &&UnixPlace| !place.deleted && place.mount_namespace.is_none() && !peer.closed;
        if let Some(place) = peer.place.as_ref().filter(is_there) {
            let from = from_where(place.path.as_path(), path_of(&address)?);
            let connect = || call_with_address(libc::SYS_connect, fd, &address);
            if from.is_ok_and(|from| self.as_helper(None, &from, connect).is_ok()) {
                return Ok(());
            }
        }
        let stand_in = new_socket(UnixKind::Datagram, self.base)?;
        let from = self.show_only(&address)?;
        self.as_helper(None, &from, || {
            bind(stand_in.as_raw_fd(), &address, &from)?;
            call_with_address(libc::SYS_connect, fd, &address)
        })
        .map_err(say("connect"))
    }

    /// What is set when all else is done: shutdown, options.
    fn set_state(&mut self, id: UnixId) -> Done {
        let socket = self.socket(id)?.clone();
        self.verify(id)?;
        let fd = self.fd(id).ok_or("it was not made")?;
        let how = match socket.shutdown {
            1 => Some(libc::SHUT_RD),
            2 => Some(libc::SHUT_WR),
            3 => Some(libc::SHUT_RDWR),
            _ => None,
        };
        if let Some(how) = how {
            // SAFETY: numbers only.
            match Errno::result(unsafe { libc::shutdown(fd, how) }) {
                Ok(_) | Err(Errno::ENOTCONN) => {}
                Err(e) => return Err(say("shutdown")(e)),
            }
        }
        if socket.error != 0 && !self.was_reset(&socket) {
            let text = format!("the error {} that a socket was to return is not returned", socket.error);
            self.lose(id, "socket-error", text);
        }
        socket::set_options(fd, &socket.options)
    }

    /// Does something that the kernel notes its doer for. Who it was is noted right, or a loss is named for the sockets `ids`.
    fn act(
        &mut self,
        ids: &[UnixId],
        who: &UnixCredentials,
        from: &Where,
        work: impl Fn() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let attempt = |maker: &Self, pid| {
            maker.as_helper(pid, from, || {
                become_user(who)?;
                work()
            })
        };
        if who.pid > 0 {
            match attempt(self, Some(who.pid)) {
                Err(Errno::EEXIST) => {}
                result => return result,
            }
            let text = format!(
                "PID {} is in use by this kernel's own: SO_PEERCRED of a socket shows another one, the user is right",
                who.pid
            );
            for &id in ids {
                self.lose(id, "peer-credentials", text.clone());
            }
        }
        attempt(self, None)
    }

    /// Runs `work` in a child that shares our descriptors, with a PID of choice (EEXIST: it is taken) and from a directory of
    /// choice.
    fn as_helper(
        &self,
        pid: Option<Pid>,
        from: &Where,
        work: impl Fn() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let hall = self.hall.as_ref().map(AsRawFd::as_raw_fd);
        let child = sys::fork(libc::CLONE_FILES as u64, pid.unwrap_or(0), 0)?;
        if child == 0 {
            nix::sys::stat::umask(nix::sys::stat::Mode::empty());
            let result = enter(from, hall).and_then(|()| work());
            sys::exit(result.err().map_or(0, |e| e as i32));
        }
        let mut status = 0;
        // SAFETY: waits for the child that has just been made.
        Errno::result(unsafe { libc::waitpid(child, &mut status, libc::__WALL) })?;
        match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
            (true, 0) => Ok(()),
            // As if the PID had been taken would not be right.
            (true, e) if e != Errno::EEXIST as i32 => Err(Errno::from_raw(e)),
            _ => Err(Errno::EIO),
        }
    }
}

fn enter(from: &Where, hall: Option<RawFd>) -> Result<(), Errno> {
    match from {
        Where::Here => Ok(()),
        Where::Directory(path) => nix::unistd::chdir(path),
        Where::Root(path) => nix::unistd::chroot(path).and_then(|()| nix::unistd::chdir("/")),
        Where::Hall(number) => {
            // SAFETY: a descriptor number.
            Errno::result(unsafe { libc::fchdir(hall.ok_or(Errno::EBADF)?) })?;
            let directory = number.to_string();
            match nix::unistd::mkdir(directory.as_str(), nix::sys::stat::Mode::S_IRWXU) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(e),
            }
            nix::unistd::chroot(directory.as_str())?;
            nix::unistd::chdir("/")
        }
    }
}

/// Takes on a user and its groups, and keeps all privileges.
fn become_user(who: &UnixCredentials) -> Result<(), Errno> {
    // SECBIT_NO_SETUID_FIXUP.
    sys::prctl(libc::PR_SET_SECUREBITS, 1 << 2)?;
    let (uid, gid) = (u64::from(who.uid), u64::from(who.gid));
    // SAFETY: the kernel reads as many groups as are there; the rest is numbers.
    unsafe {
        let groups = [who.groups.len() as u64, who.groups.as_ptr() as u64, 0, 0, 0, 0];
        sys::raw(libc::SYS_setgroups, groups)?;
        sys::raw(libc::SYS_setresgid, [gid, gid, gid, 0, 0, 0])?;
        sys::raw(libc::SYS_setresuid, [uid, uid, uid, 0, 0, 0])?;
    }
    Ok(())
}

fn type_of(kind: UnixKind) -> i32 {
    match kind {
        UnixKind::Stream => libc::SOCK_STREAM,
        UnixKind::Datagram => libc::SOCK_DGRAM,
        UnixKind::Seqpacket => libc::SOCK_SEQPACKET,
    }
}

fn new_socket(kind: UnixKind, base: RawFd) -> Result<OwnedFd, String> {
    // SAFETY: numbers only; what comes back is ours.
    let fd = unsafe {
        let fd = libc::socket(libc::AF_UNIX, type_of(kind) | libc::SOCK_CLOEXEC, 0);
        OwnedFd::from_raw_fd(Errno::result(fd).map_err(say("socket"))?)
    };
    sys::lift(fd, base).map_err(say("dup"))
}

/// Puts a new socket in the place of a placeholder.
fn place_socket(kind: UnixKind, fd: RawFd) -> Done {
    let socket = new_socket(kind, 0)?;
    sys::dup3(socket.as_raw_fd(), fd, true).map_err(say("dup3"))
}

/// `struct sockaddr_un`.
fn sockaddr(address: &Bytes) -> Vec<u8> {
    let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(address.as_bytes());
    // A path may end with the structure, without a NUL.
    bytes.truncate(size_of::<libc::sockaddr_un>());
    bytes
}

/// bind(2) or connect(2).
fn call_with_address(nr: libc::c_long, fd: RawFd, address: &Bytes) -> Result<(), Errno> {
    let bytes = sockaddr(address);
    // SAFETY: the kernel reads as many bytes as are there.
    unsafe { sys::raw(nr, [fd as u64, bytes.as_ptr() as u64, bytes.len() as u64, 0, 0, 0]) }.map(drop)
}

/// The path in an address.
fn path_of(address: &Bytes) -> Result<&Path, String> {
    let bytes = address.as_bytes();
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    match bytes.get(..end) {
        Some(path @ [_, ..]) => Ok(Path::new(std::ffi::OsStr::from_bytes(path))),
        _ => Err("its name is no path".into()),
    }
}

fn is_abstract(address: &Bytes) -> bool {
    address.as_bytes().first() == Some(&0)
}

/// bind(2); in the empty file system with all that the name goes through.
fn bind(fd: RawFd, address: &Bytes, from: &Where) -> Result<(), Errno> {
    if let Where::Hall(_) = from
        && let Some(parent) = path_of(address).ok().and_then(Path::parent)
    {
        std::fs::create_dir_all(parent).map_err(|_| Errno::ENOTDIR)?;
    }
    call_with_address(libc::SYS_bind, fd, address)
}

/// From where `name` leads to the file at `place`.
fn from_where(place: &Path, name: &Path) -> Result<Where, String> {
    if place == name {
        return Ok(Where::Here);
    }
    let relative = name.strip_prefix("/").or_else(|_| name.strip_prefix("./")).unwrap_or(name);
    let above = place.as_os_str().as_bytes().strip_suffix(relative.as_os_str().as_bytes());
    let above = above.and_then(|above| above.strip_suffix(b"/"));
    let above = above.map(|above| match above {
        b"" => PathBuf::from("/"),
        above => PathBuf::from(std::ffi::OsStr::from_bytes(above)),
    });
    if name.is_relative() {
        return above.map(Where::Directory).ok_or_else(|| unreachable_name(name, place));
    }
    // Through symbolic links, as /var/run is one.
    let parent = name.parent().and_then(|parent| std::fs::canonicalize(parent).ok());
    match (parent, name.file_name()) {
        (Some(parent), Some(file)) if parent.join(file) == place => Ok(Where::Here),
        _ => above.map(Where::Root).ok_or_else(|| unreachable_name(name, place)),
    }
}

fn unreachable_name(name: &Path, place: &Path) -> String {
    format!("how its name {} led to {} cannot be told", name.display(), place.display())
}

/// Gives a new socket's file the owner and mode of the old one.
fn set_owner(place: &UnixPlace) -> Done {
    let path = place.path.as_path();
    let (uid, gid) = (Some(place.uid), Some(place.gid));
    std::os::unix::fs::lchown(path, uid, gid).map_err(|e| format!("chown: {e}"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(place.mode & 0o7777))
        .map_err(|e| format!("chmod: {e}"))
}

/// Removes the old socket's file, and makes the directories above it, whose file system may be a new one.
fn make_way(place: &UnixPlace) -> Done {
    let path = place.path.as_path();
    let parent = path.parent().ok_or("its name is no file's")?;
    for directory in &place.directories {
        let (path, (uid, gid)) = (directory.path.as_path(), (Some(directory.uid), Some(directory.gid)));
        let say = |e: std::io::Error| format!("make {}: {e}", path.display());
        match std::fs::create_dir(path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(say(e)),
        }
        std::os::unix::fs::lchown(path, uid, gid).map_err(say)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(directory.mode & 0o7777))
            .map_err(say)?;
    }
    if std::fs::canonicalize(parent).ok().as_deref() != Some(parent) {
        return Err(format!("{} leads elsewhere now, or nowhere", parent.display()));
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            std::fs::remove_file(path).map_err(|e| format!("remove {}: {e}", path.display()))
        }
        Ok(_) => Err(format!("{} is another file now", path.display())),
        Err(_) => Ok(()),
    }
}

fn send_one(
    fd: RawFd,
    bytes: &[u8],
    files: &[RawFd],
    who: Option<&UnixCredentials>,
    to: Option<&Bytes>,
) -> Result<(), Errno> {
    let mut control = Vec::new();
    if let Some(who) = who.filter(|who| who.pid > 0) {
        let numbers = [who.pid as u32, who.uid, who.gid].map(u32::to_ne_bytes);
        add_control(&mut control, libc::SCM_CREDENTIALS, numbers.as_flattened());
    }
    if !files.is_empty() {
        let numbers: Vec<u8> = files.iter().flat_map(|fd| fd.to_ne_bytes()).collect();
        add_control(&mut control, libc::SCM_RIGHTS, &numbers);
    }
    let name = to.map(sockaddr).unwrap_or_default();
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = name.as_ptr().cast_mut().cast();
    message.msg_namelen = name.len() as u32;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_ptr().cast_mut().cast();
    message.msg_controllen = control.len();
    // SAFETY: the kernel only reads: the name, the bytes and the control messages, as many as are there.
    let sent = unsafe { libc::sendmsg(fd, &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    if Errno::result(sent)? as usize == bytes.len() { Ok(()) } else { Err(Errno::EMSGSIZE) }
}

/// Adds a `struct cmsghdr` (length, level, type) with its data, both aligned to words.
fn add_control(control: &mut Vec<u8>, kind: i32, data: &[u8]) {
    control.extend((size_of::<libc::cmsghdr>() + data.len()).to_ne_bytes());
    control.extend(libc::SOL_SOCKET.to_ne_bytes());
    control.extend(kind.to_ne_bytes());
    control.extend(data);
    control.resize(control.len().next_multiple_of(size_of::<usize>()), 0);
}

/// How many messages may wait in a datagram socket that is made now.
fn max_queue() -> Option<u32> {
    std::fs::read_to_string(MAX_DGRAM_QLEN).ok()?.trim().parse().ok()
}

/// Where it cannot be set the socket has another limit: senders wait earlier or later, and nothing is lost.
fn set_max_queue(count: u32) {
    if max_queue() != Some(count) {
        let _ = sys::write_proc(MAX_DGRAM_QLEN, &count.to_string());
    }
}

/// Sockets of `process` that were connected to somebody who does not come back. What the program will see is what it would have seen
/// if they had died.
pub(crate) fn lost_peers(company: &Company<'_>, process: &Process) -> Vec<Reason> {
    let snapshot = company.snapshot;
    let mut losses = Vec::new();
    let mut told = BTreeSet::new();
    let find = |id: &UnixId| snapshot.unix_sockets.get(id);
    for descriptor in &process.descriptors {
        let Some(FileKind::Unix { socket: id }) = snapshot.files.get(&descriptor.file).map(|f| &f.kind)
        else {
            continue;
        };
        let Some(socket) = find(id).filter(|_| told.insert(*id)) else { continue };
        let waiting = socket.waiting.iter().filter_map(find);
        for peer_id in waiting.filter_map(|waiting| waiting.peer).chain(socket.peer) {
            let Some(peer) = find(&peer_id).filter(|peer| !peer.closed) else { continue };
            // A connection that nobody has accepted yet has the listening socket at its end.
            let listener = || company.listener(peer_id).as_ref().and_then(find);
            let end = peer.file.or_else(|| listener()?.file);
            let holders = end.map(|file| company.of_file(file));
            if holders.as_ref().is_some_and(|holders| !holders.back.is_empty()) {
                continue;
            }
            let who = match holders {
                Some(holders) if !holders.gone.is_empty() => format!("PID {}", holders.names_of_gone()),
                _ => "nobody that is known".into(),
            };
            let name = peer.name().map_or(String::new(), |name| format!(" at {name}"));
            let text = format!(
                "the other end{name} of its socket, descriptor {}, belonged to {who}, and does not come back",
                descriptor.fd
            );
            losses.push(Reason::new("socket-peer", text));
        }
    }
    losses
}

#[cfg(test)]
mod tests;
