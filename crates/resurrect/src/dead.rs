//! Dead descriptors: what stands in for an open file that cannot be rebuilt. Reading gives the end of the file, everything else an error.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::pipe2;
use snapshot::{FileKind, InetProtocol, InetState, OpenFile};

use crate::inet;

/// What `file` is from now on. Sockets are connections whose other end has gone, everything else a pipe that nobody writes to.
pub(crate) fn restore(file: Option<&OpenFile>) -> Result<OwnedFd, Errno> {
    let is_socket = file.is_some_and(|file| file.path.as_bytes().starts_with(b"socket:"));
    if let Some(FileKind::Inet(socket)) = file.map(|file| &file.kind)
        && socket.protocol == InetProtocol::Tcp
        && matches!(socket.state, InetState::Connected { .. })
        && let Ok(reset) = inet::over(socket.v6)
    {
        return Ok(reset);
    }
    if is_socket {
        let (near, far) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
        drop(far);
        return Ok(near);
    }
    let (read, write) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    drop(write);
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{read, write};
    use snapshot::InodeId;

    fn file(path: &str) -> OpenFile {
        OpenFile {
            kind: FileKind::Unsupported { what: "x".into() },
            path: path.into(),
            deleted: false,
            mount_namespace: None,
            flags: libc::O_RDWR,
            pos: 0,
            inode: InodeId(1),
            owner_pid: 0,
            owner_is_thread: false,
            owner_signal: 0,
            count: 1,
        }
    }

    #[test]
    fn the_dead_are_at_their_end_and_take_nothing() {
        let fd = restore(Some(&file("anon_inode:bpf-prog"))).unwrap();
        assert_eq!(read(&fd, &mut [0; 4]), Ok(0));
        assert_eq!(write(&fd, b"x"), Err(Errno::EBADF));
        let socket = restore(Some(&file("socket:[1]"))).unwrap();
        assert_eq!(read(&socket, &mut [0; 4]), Ok(0));
        assert_eq!(
            nix::sys::socket::send(
                std::os::fd::AsRawFd::as_raw_fd(&socket),
                b"x",
                nix::sys::socket::MsgFlags::MSG_NOSIGNAL
            ),
            Err(Errno::EPIPE)
        );
        assert!(restore(None).is_ok());
    }
}
