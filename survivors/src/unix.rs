//! Unix sockets: who is connected to whom, what is on its way between them, and who waits.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixCredentials,
    getsockopt, recv, recvmsg, send, sendmsg, setsockopt, socketpair, sockopt,
};
use nix::unistd::{Gid, Uid, setresgid, setresuid};

use crate::Stage;
use crate::child::Child;
use crate::prng;
use crate::procfs::same;

/// A connected pair, with bytes on their way.
pub fn pair(stage: &mut Stage) -> Result<()> {
    let (mut near, mut far) = UnixStream::pair()?;
    near.write_all(b"on its way")?;

    let crash = stage.crash()?;
    if crash.damage {
        far.read_exact(&mut [0; 1])?;
    }
    near.write_all(b" and more")?;
    drop(near);
    let mut words = String::new();
    far.read_to_string(&mut words)?;
    same("what arrived", &"on its way and more".to_owned(), &words)
}

/// Many bytes both ways, some of the first buffer already read.
pub fn queue(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 100_000;
    let (mut near, mut far) = UnixStream::pair()?;
    near.write_all(&prng::bytes(1, LEN))?;
    far.write_all(&prng::bytes(2, 5000))?;
    let mut head = [0; 777];
    far.read_exact(&mut head)?;

    let crash = stage.crash()?;
    if crash.damage {
        far.read_exact(&mut [0; 1])?;
    }
    near.write_all(b"tail")?;
    let mut back = vec![0; 5000];
    near.read_exact(&mut back)?;
    prng::verify(2, &back).context("the way back")?;
    drop(near);
    let mut rest = head.to_vec();
    far.read_to_end(&mut rest)?;
    same("bytes", &(LEN + 4), &rest.len())?;
    prng::verify(1, &rest[..LEN])?;
    same("what was written after the crash", &b"tail"[..], &rest[LEN..])
}

/// Datagrams of several sizes and senders: with a path, with an abstract name, without a name, and one that has closed.
pub fn datagrams(stage: &mut Stage) -> Result<()> {
    let (path, from) = (stage.path("receiver"), stage.path("sender"));
    let receiver = UnixDatagram::bind(&path)?;
    let named = UnixDatagram::bind(&from)?;
    let unnamed = UnixDatagram::unbound()?;
    unnamed.connect(&path)?;
    let name = format!("survivor-{}", std::process::id());
    let gone = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    named.send_to(&prng::bytes(1, 1000), &path)?;
    unnamed.send(&prng::bytes(2, 0))?;
    gone.send_to(&prng::bytes(3, 20_000), &path)?;
    unnamed.send(&prng::bytes(4, 3))?;
    drop(gone);

    let crash = stage.crash()?;
    let mut buffer = vec![0; 30_000];
    let mut next = |index: u64, size: usize| -> Result<SocketAddr> {
        let (count, address) = receiver.recv_from(&mut buffer)?;
        same(&format!("size of datagram {index}"), &size, &count)?;
        prng::verify(index, &buffer[..count]).with_context(|| format!("datagram {index}"))?;
        Ok(address)
    };
    if crash.damage {
        next(1, 1000)?;
    }
    same("first sender", &Some(from.as_path()), &next(1, 1000)?.as_pathname())?;
    ensure!(next(2, 0)?.is_unnamed(), "the second sender has a name");
    same("third sender", &Some(name.as_bytes()), &next(3, 20_000)?.as_abstract_name())?;
    ensure!(next(4, 3)?.is_unnamed(), "the fourth sender has a name");
    unnamed.send(&prng::bytes(5, 50))?;
    next(5, 50)?;
    named.send_to(&prng::bytes(6, 60), &path)?;
    same("sender after the crash", &Some(from.as_path()), &next(6, 60)?.as_pathname())
}

/// Records keep their borders.
pub fn seqpacket(stage: &mut Stage) -> Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    let sizes = [10, 20_000, 1, 70_000];
    for (index, size) in sizes.into_iter().enumerate() {
        send(near.as_raw_fd(), &prng::bytes(index as u64, size), MsgFlags::empty())?;
    }

    let crash = stage.crash()?;
    let mut buffer = vec![0; 100_000];
    if crash.damage {
        recv(far.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    }
    for (index, size) in sizes.into_iter().enumerate() {
        let count = recv(far.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        same(&format!("size of record {index}"), &size, &count)?;
        prng::verify(index as u64, &buffer[..count]).with_context(|| format!("record {index}"))?;
    }
    send(far.as_raw_fd(), b"back", MsgFlags::empty())?;
    same("record after the crash", &4, &recv(near.as_raw_fd(), &mut buffer, MsgFlags::empty())?)?;
    drop(near);
    same("end", &0, &recv(far.as_raw_fd(), &mut buffer, MsgFlags::empty())?)
}

fn greet(listener: &UnixListener, mut caller: UnixStream, word: &[u8; 5]) -> Result<()> {
    let (mut callee, _) = listener.accept()?;
    caller.write_all(word)?;
    let mut heard = [0; 5];
    callee.read_exact(&mut heard)?;
    same("what arrived", b"hello", &heard)
}

/// Listens under an abstract name.
pub fn abstract_name(stage: &mut Stage) -> Result<()> {
    let name = format!("survivor-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name)?;
    let listener = UnixListener::bind_addr(&address)?;
    let before = UnixStream::connect_addr(&address)?;
    let (accepted, _) = listener.accept()?;

    let crash = stage.crash()?;
    let is_named = |address: SocketAddr| same("name", &Some(name.as_bytes()), &address.as_abstract_name());
    is_named(listener.local_addr()?)?;
    is_named(accepted.local_addr()?)?;
    is_named(before.peer_addr()?)?;
    let caller = UnixStream::connect_addr(&address)?;
    greet(&listener, caller, if crash.damage { b"noise" } else { b"hello" })
}

/// Listens under a path with a mode of its own, and under one that is gone.
pub fn path(stage: &mut Stage) -> Result<()> {
    let path = stage.path("socket");
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
    let mut before = UnixStream::connect(&path)?;
    let (mut accepted, _) = listener.accept()?;
    let hidden_path = stage.path("hidden");
    let hidden = UnixListener::bind(&hidden_path)?;
    fs::remove_file(&hidden_path)?;

    let crash = stage.crash()?;
    let is_named = |address: SocketAddr| same("name", &Some(path.as_path()), &address.as_pathname());
    is_named(listener.local_addr()?)?;
    is_named(accepted.local_addr()?)?;
    is_named(before.peer_addr()?)?;
    ensure!(before.local_addr()?.is_unnamed(), "the client has a name");
    same("hidden name", &Some(hidden_path.as_path()), &hidden.local_addr()?.as_pathname())?;
    ensure!(!hidden_path.exists(), "the removed name is there again");
    same("mode", &0o640, &(fs::metadata(&path)?.permissions().mode() & 0o7777))?;
    before.write_all(b"x")?;
    accepted.read_exact(&mut [0; 1])?;
    let caller = UnixStream::connect(&path)?;
    greet(&listener, caller, if crash.damage { b"noise" } else { b"hello" })
}

/// Connections that nobody has accepted yet, with bytes in them; the first caller has already gone.
pub fn backlog(stage: &mut Stage) -> Result<()> {
    let path = stage.path("socket");
    let listener = UnixListener::bind(&path)?;
    let mut first = UnixStream::connect(&path)?;
    first.write_all(&prng::bytes(1, 4000))?;
    drop(first);
    let mut second = UnixStream::connect(&path)?;
    second.write_all(&prng::bytes(2, 50_000))?;
    let third = UnixStream::connect(&path)?;

    let crash = stage.crash()?;
    let (mut callee, _) = listener.accept()?;
    if crash.damage {
        callee.read_exact(&mut [0; 1])?;
    }
    let mut bytes = Vec::new();
    callee.read_to_end(&mut bytes)?;
    same("bytes of the first", &4000, &bytes.len())?;
    prng::verify(1, &bytes)?;
    let (mut callee, _) = listener.accept()?;
    let mut bytes = vec![0; 50_000];
    callee.read_exact(&mut bytes)?;
    prng::verify(2, &bytes)?;
    callee.write_all(b"back")?;
    let mut word = [0; 4];
    second.read_exact(&mut word)?;
    same("what came back", b"back", &word)?;
    greet(&listener, third, b"hello")?;
    greet(&listener, UnixStream::connect(&path)?, b"hello")
}

/// Open files on their way: a pipe's end, a file that is open here too, and a socket that holds a further one.
pub fn files(stage: &mut Stage) -> Result<()> {
    let (near, far) = UnixStream::pair()?;
    let (reader, writer) = nix::unistd::pipe()?;
    let path = stage.path("file");
    fs::write(&path, b"0123456789")?;
    let mut shared = File::open(&path)?;
    shared.seek(std::io::SeekFrom::Start(3))?;
    let (inner, inner_far) = UnixStream::pair()?;
    send_files(&inner, b"inner", &[writer.as_raw_fd()])?;
    send_files(&near, b"outer", &[reader.as_raw_fd(), shared.as_raw_fd(), inner_far.as_raw_fd()])?;
    drop((reader, writer, inner_far, inner));

    let crash = stage.crash()?;
    let mut got = receive_files(&far, b"outer", 3)?;
    let inner: UnixStream = got.pop().context("a file is missing")?.into();
    let mut file: File = got.pop().context("a file is missing")?.into();
    let mut reader: File = got.pop().context("a file is missing")?.into();
    let writer = receive_files(&inner, b"inner", 1)?.pop().context("a file is missing")?;
    let mut writer: File = writer.into();
    same("end of the inner one", &0, &(&inner).read(&mut [0; 1])?)?;
    file.read_exact(&mut [0; 2])?;
    if crash.damage {
        file.read_exact(&mut [0; 1])?;
    }
    let mut word = [0; 2];
    shared.read_exact(&mut word)?;
    same("the file's bytes, at a shared position", b"56", &word)?;
    writer.write_all(b"water")?;
    drop(writer);
    let mut words = String::new();
    reader.read_to_string(&mut words)?;
    same("what the pipe carries", &"water".to_owned(), &words)
}

fn send_files(socket: &UnixStream, text: &[u8], files: &[i32]) -> Result<()> {
    let control = [ControlMessage::ScmRights(files)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(text)], &control, MsgFlags::empty(), None)?;
    Ok(())
}

fn receive_files(socket: &UnixStream, text: &[u8], count: usize) -> Result<Vec<OwnedFd>> {
    let mut buffer = [0; 100];
    let mut space = nix::cmsg_space!([i32; 8]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made them for this message.
            files.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let size = message.bytes;
    same("the message", text, &buffer[..size])?;
    same("files in it", &count, &files.len())?;
    Ok(files)
}

/// A user's process at the other end: who it is, as the connection and a message on its way tell.
pub fn credentials(stage: &mut Stage) -> Result<()> {
    // The user may not be able to reach our directory.
    let name = format!("survivor-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name)?;
    let listener = UnixListener::bind_addr(&address)?;
    // Inherited by those that are accepted.
    setsockopt(&listener, sockopt::PassCred, &true)?;
    let own = UnixCredentials::new();
    let (mut near, mut far) = UnixStream::pair()?;
    let mut child = Child::fork(stage, "client", |_, ready| {
        setresgid(Gid::from_raw(3001), Gid::from_raw(3001), Gid::from_raw(3001))?;
        setresuid(Uid::from_raw(2001), Uid::from_raw(2001), Uid::from_raw(2001))?;
        let mut socket = UnixStream::connect_addr(&address)?;
        socket.write_all(b"before")?;
        ready.announce()?;
        far.read_exact(&mut [0; 1])?;
        socket.write_all(b"after.")?;
        let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
        same("who listens", &(own.pid(), own.uid(), own.gid()), &(peer.pid(), peer.uid(), peer.gid()))
    })?;
    let (accepted, _) = listener.accept()?;

    let crash = stage.crash()?;
    let expected = (child.pid().as_raw(), 2001, 3001);
    let peer = getsockopt(&accepted, sockopt::PeerCredentials)?;
    same("who has connected", &expected, &(peer.pid(), peer.uid(), peer.gid()))?;
    if crash.damage {
        (&accepted).read_exact(&mut [0; 1])?;
    }
    same("who sent before", &expected, &credentials_of(&accepted, b"before")?)?;
    near.write_all(b"x")?;
    same("who sent after", &expected, &credentials_of(&accepted, b"after.")?)?;
    child.join()
}

fn credentials_of(socket: &UnixStream, text: &[u8]) -> Result<(i32, u32, u32)> {
    let mut buffer = [0; 6];
    let mut space = nix::cmsg_space!(UnixCredentials);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let mut found = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmCredentials(who) = control {
            found = Some((who.pid(), who.uid(), who.gid()));
        }
    }
    let size = message.bytes;
    same("the message", text, &buffer[..size])?;
    found.context("a message without credentials")
}

/// A child blocked in read(2).
pub fn reader(stage: &mut Stage) -> Result<()> {
    let (mut near, mut far) = UnixStream::pair()?;
    let mut child = Child::fork(stage, "reader", |_, ready| {
        ready.announce()?;
        let mut bytes = [0; 5000];
        far.read_exact(&mut bytes)?;
        prng::verify(2, &bytes)
    })?;

    let crash = stage.crash()?;
    near.write_all(&prng::bytes(if crash.damage { 3 } else { 2 }, 5000))?;
    child.join()
}

/// A child blocked in write(2), in the middle of 1 MiB.
pub fn writer(stage: &mut Stage) -> Result<()> {
    const LEN: usize = 1 << 20;
    let (mut near, mut far) = UnixStream::pair()?;
    let mut child = Child::fork(stage, "writer", |_, ready| {
        let bytes = prng::bytes(4, LEN);
        ready.announce()?;
        near.write_all(&bytes)?;
        Ok(())
    })?;
    drop(near);

    let crash = stage.crash()?;
    if crash.damage {
        far.read_exact(&mut [0; 8])?;
    }
    let mut bytes = Vec::new();
    far.read_to_end(&mut bytes)?;
    child.join()?;
    same("bytes", &LEN, &bytes.len())?;
    prng::verify(4, &bytes)
}

/// A child blocked in sendto(2): the receiver's queue is full. Each datagram arrives once.
pub fn sender(stage: &mut Stage) -> Result<()> {
    const COUNT: u32 = 700;
    let path = stage.path("receiver");
    let receiver = UnixDatagram::bind(&path)?;
    let mut child = Child::fork(stage, "sender", |_, ready| {
        let sender = UnixDatagram::unbound()?;
        ready.announce()?;
        for number in 0..COUNT {
            sender.send_to(&number.to_ne_bytes(), &path)?;
        }
        Ok(())
    })?;

    let crash = stage.crash()?;
    let mut bytes = [0; 4];
    if crash.damage {
        receiver.recv(&mut bytes)?;
    }
    receiver.set_read_timeout(Some(Duration::from_secs(60)))?;
    for number in 0..COUNT {
        receiver.recv(&mut bytes)?;
        same("number", &number, &u32::from_ne_bytes(bytes))?;
    }
    child.join()
}

/// Closed and half closed connections.
pub fn shutdown(stage: &mut Stage) -> Result<()> {
    let (mut half, mut other) = UnixStream::pair()?;
    half.write_all(b"last words")?;
    half.shutdown(std::net::Shutdown::Write)?;
    let (mut gone, mut lonely) = UnixStream::pair()?;
    gone.write_all(b"farewell")?;
    drop(gone);
    let (mut unread, mut reset) = UnixStream::pair()?;
    reset.write_all(b"nobody reads this")?;
    unread.write_all(b"x")?;
    drop(unread);

    let crash = stage.crash()?;
    if crash.damage {
        other.read_exact(&mut [0; 1])?;
    }
    let mut words = String::new();
    other.read_to_string(&mut words)?;
    same("content", &"last words".to_owned(), &words)?;
    let broken = Err(Some(Errno::EPIPE as i32));
    let errno = |error: std::io::Error| error.raw_os_error();
    same("write after shutdown", &broken, &half.write(b"x").map_err(errno))?;
    other.write_all(b"still open")?;
    half.read_exact(&mut [0; 10])?;
    let mut words = String::new();
    lonely.read_to_string(&mut words)?;
    same("what the closed one had sent", &"farewell".to_owned(), &words)?;
    same("write to a closed one", &broken, &lonely.write(b"x").map_err(errno))?;
    reset.read_exact(&mut [0; 1])?;
    let error = reset.read(&mut [0; 1]).map_err(errno);
    same("read of a reset one", &Err(Some(Errno::ECONNRESET as i32)), &error)
}

/// A server and its client: requests and answers on their way, and another client afterwards.
pub fn server(stage: &mut Stage) -> Result<()> {
    let path = stage.path("socket");
    let listener = UnixListener::bind(&path)?;
    let mut child = Child::fork(stage, "server", |_, ready| {
        ready.announce()?;
        for _ in 0..2 {
            let (mut socket, _) = listener.accept()?;
            let mut request = [0; 4];
            while socket.read_exact(&mut request).is_ok() {
                let answer = u32::from_ne_bytes(request).wrapping_mul(3);
                socket.write_all(&answer.to_ne_bytes())?;
            }
        }
        Ok(())
    })?;
    drop(listener);
    let mut client = UnixStream::connect(&path)?;
    let ask = |client: &mut UnixStream, range: std::ops::Range<u32>| {
        range.into_iter().try_for_each(|number| client.write_all(&number.to_ne_bytes()))
    };
    let mut answered = 0;
    let mut hear = |client: &mut UnixStream, count: u32| -> Result<()> {
        for _ in 0..count {
            let mut answer = [0; 4];
            client.read_exact(&mut answer)?;
            same("answer", &(answered * 3), &u32::from_ne_bytes(answer))?;
            answered += 1;
        }
        Ok(())
    };
    ask(&mut client, 0..10)?;
    hear(&mut client, 4)?;

    let crash = stage.crash()?;
    if crash.damage {
        client.read_exact(&mut [0; 4])?;
    }
    hear(&mut client, 6)?;
    ask(&mut client, 10..20)?;
    hear(&mut client, 10)?;
    drop(client);
    let mut second = UnixStream::connect(&path)?;
    ask(&mut second, 20..25)?;
    hear(&mut second, 5)?;
    drop(second);
    child.join()
}

/// A child blocked in connect(2), as the queue of the listening socket is full, and one blocked in accept(2).
pub fn connect(stage: &mut Stage) -> Result<()> {
    let (full, idle) = (stage.path("full"), stage.path("idle"));
    let listener = UnixListener::bind(&full)?;
    // SAFETY: numbers only. One connection may wait.
    Errno::result(unsafe { libc::listen(listener.as_raw_fd(), 0) })?;
    let first = UnixStream::connect(&full)?;
    let mut caller = Child::fork(stage, "caller", |_, ready| {
        ready.announce()?;
        let mut socket = UnixStream::connect(&full)?;
        socket.write_all(b"hello")?;
        Ok(())
    })?;
    let other = UnixListener::bind(&idle)?;
    let mut callee = Child::fork(stage, "callee", |_, ready| {
        ready.announce()?;
        let (mut socket, _) = other.accept()?;
        let mut word = [0; 5];
        socket.read_exact(&mut word)?;
        same("what arrived", b"hello", &word)
    })?;
    drop(other);

    let crash = stage.crash()?;
    UnixStream::connect(&idle)?.write_all(if crash.damage { b"noise" } else { b"hello" })?;
    callee.join()?;
    greet(&listener, first, b"hello")?;
    let (mut socket, _) = listener.accept()?;
    let mut word = [0; 5];
    socket.read_exact(&mut word)?;
    same("what arrived", b"hello", &word)?;
    caller.join()
}

/// The other ends belong to a child that ends, or is given up for what it has: as if it had closed them.
pub fn lost_peer(stage: &mut Stage) -> Result<()> {
    let (path, log) = (stage.path("socket"), stage.path("log"));
    let mut child = Child::fork(stage, "server", |stage, ready| {
        let listener = UnixListener::bind(&path)?;
        let _log = UnixDatagram::bind(&log)?;
        let (near, _far) = UnixStream::pair()?;
        send(near.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
        ready.announce()?;
        let (mut socket, _) = listener.accept()?;
        socket.write_all(b"last words")?;
        stage.wait();
        crate::child::end(0)
    })?;
    let mut socket = UnixStream::connect(&path)?;
    socket.read_exact(&mut [0; 5])?;
    let logger = UnixDatagram::unbound()?;
    logger.connect(&log)?;

    let crash = stage.crash()?;
    child.forget();
    if crash.damage {
        socket.read_exact(&mut [0; 1])?;
    }
    let mut words = String::new();
    socket.read_to_string(&mut words)?;
    same("what it had sent", &"words".to_owned(), &words)?;
    let errno = |error: std::io::Error| error.raw_os_error();
    let broken = Err(Some(Errno::EPIPE as i32));
    same("write to it", &broken, &socket.write(b"x").map_err(errno))?;
    let refused = Err(Some(Errno::ECONNREFUSED as i32));
    same("datagram to it", &refused, &logger.send(b"x").map_err(errno))?;
    same("name of the other end", &Some(path.as_path()), &socket.peer_addr()?.as_pathname())
}

/// Socket options and file flags.
pub fn options(stage: &mut Stage) -> Result<()> {
    let (socket, other) = UnixStream::pair()?;
    setsockopt(&socket, sockopt::SndBuf, &50_000)?;
    setsockopt(&socket, sockopt::RcvBuf, &60_000)?;
    setsockopt(&socket, sockopt::PassCred, &true)?;
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    set(&socket, libc::SO_PRIORITY, 3)?;
    setsockopt(&socket, sockopt::ReceiveTimestamp, &true)?;
    set(&socket, libc::SO_PEEK_OFF, 7)?;
    set(&socket, libc::SO_RCVLOWAT, 11)?;
    socket.set_read_timeout(Some(Duration::from_millis(1500)))?;
    socket.set_write_timeout(Some(Duration::from_secs(9)))?;
    socket.set_nonblocking(true)?;
    let look = |socket: &UnixStream| -> Result<_> {
        let sizes = (getsockopt(socket, sockopt::SndBuf)?, getsockopt(socket, sockopt::RcvBuf)?);
        let flags = (
            getsockopt(socket, sockopt::PassCred)?,
            getsockopt(socket, sockopt::KeepAlive)?,
            getsockopt(socket, sockopt::ReceiveTimestamp)?,
        );
        let numbers = [libc::SO_PRIORITY, libc::SO_PEEK_OFF, libc::SO_RCVLOWAT];
        let numbers = numbers.map(|option| get(socket, option));
        let numbers = numbers.into_iter().collect::<Result<Vec<_>>>()?;
        let times = (socket.read_timeout()?, socket.write_timeout()?);
        let status = nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_GETFL)?;
        Ok((sizes, flags, numbers, times, status))
    };
    let before = (look(&socket)?, look(&other)?);

    let crash = stage.crash()?;
    if crash.damage {
        set(&socket, libc::SO_PEEK_OFF, 8)?;
    }
    same("options", &before, &(look(&socket)?, look(&other)?))
}

/// An option that is a number.
fn set(socket: &UnixStream, option: i32, value: i32) -> Result<()> {
    // SAFETY: the kernel reads an int.
    let r = unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, value, 4)
    };
    Errno::result(r)?;
    Ok(())
}

fn get(socket: &UnixStream, option: i32) -> Result<i32> {
    let (mut value, mut len) = (0i32, 4u32);
    // SAFETY: the kernel writes an int.
    let r = unsafe {
        let value = (&raw mut value).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, value, &raw mut len)
    };
    Errno::result(r)?;
    Ok(value)
}

/// An out-of-band byte that nobody has read.
pub fn out_of_band(stage: &mut Stage) -> Result<()> {
    let (near, far) = UnixStream::pair()?;
    send(near.as_raw_fd(), b"ab!", MsgFlags::MSG_OOB)?;

    let crash = stage.crash()?;
    let mut byte = [0; 1];
    if crash.damage {
        recv(far.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB)?;
    }
    recv(far.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB)?;
    same("the byte", b"!", &byte)
}
