//! Sockets: file, `socket`, `sock`, and the tables that a `sock` is in (include/linux/net.h, include/net/sock.h, net/socket.c; 6.1 and
//! 6.12).

#[cfg(test)]
mod tests;

use ktypes::KernelType;
use snapshot::FindingKind;

use super::Doubts;
use crate::Autopsy;
use crate::error::Result;

const OBJECT: &str = "socket";
const LINK: FindingKind = FindingKind::Link;

#[derive(KernelType)]
#[kernel("socket")]
struct Socket {
    file: u64,
    sk: u64,
}

#[derive(KernelType)]
#[kernel("socket_alloc")]
struct SocketAlloc {
    #[kernel("socket", address)]
    socket: u64,
    #[kernel("vfs_inode", address)]
    vfs_inode: u64,
}

#[derive(KernelType)]
#[kernel("sock")]
struct Sock {
    sk_socket: u64,
    sk_prot_creator: u64,
    #[kernel("__sk_common.skc_refcnt.refs.counter")]
    references: i32,
    #[kernel("__sk_common.skc_node", address)]
    node: u64,
    #[kernel("__sk_common.skc_node.pprev")]
    pprev: u64,
}

#[derive(KernelType)]
#[kernel("proto")]
struct Proto {
    slab: u64,
}

impl Autopsy<'_> {
    /// The chain file, inode, `socket`, `sock`: each knows the next and the one before. It is made before the descriptor is there
    /// (sock_alloc_file(), sock_graft()), and unmade after it is gone (__sock_release()).
    pub(super) fn check_socket(
        &self,
        file: u64,
        inode: u64,
        socket: u64,
        path: &str,
        doubts: &mut Doubts,
    ) -> Result<()> {
        let mut say = |kind, at, why: &str| doubts.doubt(kind, OBJECT, at, format!("{path}: {why}"));
        let whole: SocketAlloc = self.kernel.read(socket)?;
        if whole.vfs_inode.wrapping_sub(whole.socket) != inode.wrapping_sub(socket) {
            say(LINK, file, "its socket and its inode are not one object");
            return Ok(());
        }
        let own: Socket = self.kernel.read(socket)?;
        if own.file != file {
            say(LINK, socket, "its socket belongs to another open file");
        }
        if own.sk == 0 {
            return Ok(());
        }
        let sock: Sock = self.kernel.read(own.sk)?;
        if sock.sk_socket != socket {
            say(LINK, own.sk, "its protocol's part belongs to another socket");
        }
        if sock.references <= 0 {
            say(FindingKind::Count, own.sk, "its protocol's part is free");
        }
        let proto: Proto = self.kernel.read(sock.sk_prot_creator)?;
        if proto.slab != 0 && !self.is_kfence(own.sk) {
            let slab = self.kernel.slab_cache_of(own.sk);
            if !slab.is_some_and(|slab| slab.cache == proto.slab && slab.starts_at(own.sk)) {
                say(FindingKind::Slab, own.sk, "its protocol's part lies in no slab of its protocol");
            }
        }
        if sock.pprev != 0 && !self.is_hashed(sock.node, sock.pprev)? {
            let text = format!("{path}: it is not where the table of sockets has it");
            doubts.note(LINK, OBJECT, own.sk, text);
        }
        Ok(())
    }

    /// Whether what a node calls its predecessor leads to it, directly or through one that is just being put between them.
    fn is_hashed(&self, node: u64, pprev: u64) -> Result<bool> {
        let next = self.kernel.read_u64(pprev)?;
        Ok(next == node || next & 1 == 0 && next >> 63 != 0 && self.kernel.read_u64(next)? == node)
    }
}
