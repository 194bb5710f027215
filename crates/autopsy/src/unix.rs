//! Unix sockets: `unix_sock`, its queue of `sk_buff`s, files and credentials on their way (include/net/af_unix.h, sock.h, scm.h,
//! include/linux/skbuff.h, net/unix/af_unix.c; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{
    Bytes, FileId, Severity, UnixCredentials, UnixData, UnixDirectory, UnixId, UnixKind, UnixMessage,
    UnixPlace, UnixSocket,
};
use vmcore::{PAGE_SHIFT, PAGE_SIZE};

use crate::Autopsy;
use crate::error::{Result, Visited, corrupt};
use crate::fs::Path;

/// Messages that one socket may have received before something is wrong (net.core.wmem_max in the smallest messages is less).
const MAX_MESSAGES: usize = 1 << 16;
/// Bytes of one message; the largest send buffers are smaller.
const MAX_MESSAGE: u32 = 1 << 28;
/// Sockets of a machine.
const MAX_SOCKETS: usize = 1 << 20;
/// Directories above a file; a path has 4,096 bytes at most.
const MAX_DIRECTORIES: usize = 2048;
/// SCM_MAX_FD.
const MAX_FILES: i16 = 253;
/// sizeof(struct sockaddr_un), and one for the NUL of a longest path.
const MAX_ADDRESS: i32 = 111;
/// Names in the file system hash below this, abstract ones from it on (UNIX_HASH_MOD + 1, `unix_abstract_hash()`).
const ABSTRACT_HASH: u32 = 256;

const SOCK_STREAM: i16 = 1;
const SOCK_DGRAM: i16 = 2;
const SOCK_SEQPACKET: i16 = 5;
const TCP_LISTEN: u8 = 10;

#[derive(KernelType)]
#[kernel("socket")]
struct Socket {
    flags: u64,
    file: u64,
}

#[derive(KernelType)]
#[kernel("sock")]
struct Sock {
    #[kernel("__sk_common.skc_state")]
    state: u8,
    #[kernel("__sk_common.skc_hash")]
    hash: u32,
    #[kernel("__sk_common.skc_bind_node.pprev")]
    bind_node: u64,
    #[kernel("__sk_common.skc_prot")]
    prot: u64,
    #[kernel("__sk_common.skc_flags")]
    flags: u64,
    #[kernel("sk_receive_queue", address)]
    receive_queue: u64,
    sk_type: u16,
    sk_err: i32,
    sk_max_ack_backlog: u32,
    sk_peer_pid: u64,
    sk_peer_cred: u64,
    sk_shutdown: u8,
    sk_socket: u64,
}

#[derive(KernelType)]
#[kernel("unix_sock")]
struct UnixSock {
    addr: u64,
    #[kernel(nested)]
    path: Path,
    peer: u64,
    /// With CONFIG_AF_UNIX_OOB.
    #[kernel(optional)]
    oob_skb: Option<u64>,
}

#[derive(KernelType)]
#[kernel("unix_address")]
struct UnixAddress {
    len: i32,
    #[kernel(address)]
    name: u64,
}

#[derive(KernelType)]
#[kernel("inode")]
struct Inode {
    i_mode: u16,
    i_uid: u32,
    i_gid: u32,
}

#[derive(KernelType)]
#[kernel("sk_buff")]
struct SkBuff {
    next: u64,
    sk: u64,
    #[kernel(address)]
    cb: u64,
    len: u32,
    data_len: u32,
    end: u32,
    head: u64,
    data: u64,
}

#[derive(KernelType)]
#[kernel("sk_buff_head")]
struct SkBuffHead {
    next: u64,
}

/// What `sk_buff.cb` holds (UNIXCB).
#[derive(KernelType)]
#[kernel("unix_skb_parms")]
struct Parameters {
    pid: u64,
    uid: u32,
    gid: u32,
    fp: u64,
    consumed: u32,
}

#[derive(KernelType)]
#[kernel("scm_fp_list")]
struct FileList {
    count: i16,
    #[kernel(address)]
    fp: u64,
}

#[derive(KernelType)]
#[kernel("skb_shared_info")]
struct SharedInfo {
    nr_frags: u8,
    frag_list: u64,
    #[kernel(address)]
    frags: u64,
}

/// `skb_frag_t` until 6.8.
#[derive(KernelType)]
#[kernel("bio_vec")]
struct BioVec {
    bv_page: u64,
    bv_len: u32,
    bv_offset: u32,
}

/// `skb_frag_t` since.
#[derive(KernelType)]
#[kernel("skb_frag")]
struct Frag {
    #[kernel("netmem", or = "bv_page")]
    netmem: u64,
    #[kernel("len", or = "bv_len")]
    len: u32,
    #[kernel("offset", or = "bv_offset")]
    offset: u32,
}

impl Autopsy<'_> {
    /// Reads a unix socket into the table, and with it those that it is connected to, unless they are there.
    ///
    /// Open files on their way through it are left to be read by [`Autopsy::read_held`]: they may be sockets again.
    pub(crate) fn unix(&self, sock: u64) -> Result<UnixId> {
        let mut todo = vec![sock];
        while let Some(addr) = todo.pop() {
            let id = UnixId(addr);
            if self.unix_sockets.borrow().contains_key(&id) {
                continue;
            }
            if self.unix_sockets.borrow().len() >= MAX_SOCKETS {
                return Err(corrupt("unix_sock", addr, "is one too many"));
            }
            match self.read_unix(addr) {
                Ok(socket) => {
                    todo.extend(socket.peer.iter().chain(&socket.waiting).map(|id| id.0));
                    self.unix_sockets.borrow_mut().insert(id, socket);
                }
                Err(error) if addr == sock => return Err(error),
                // Without it the first one is not brought back, which is said there.
                Err(error) => self.find(Severity::Note, "unix", format!("a socket cannot be read: {error}")),
            }
        }
        Ok(UnixId(sock))
    }

    /// Reads the open files that are on their way through sockets read so far.
    pub(crate) fn read_held(&self) {
        loop {
            let Some(addr) = self.held.borrow_mut().pop() else { return };
            if let Err(error) = self.file(addr) {
                // Whoever is to receive it is not brought back: said by the decision.
                let text = format!("an open file on its way through a socket cannot be read: {error}");
                self.find(Severity::Note, "unix", text);
            }
        }
    }

    fn read_unix(&self, addr: u64) -> Result<UnixSocket> {
        let sock: Sock = self.kernel.read(addr)?;
        let unix: UnixSock = self.kernel.read(addr)?;
        let kind = match sock.sk_type as i16 {
            SOCK_STREAM => UnixKind::Stream,
            SOCK_DGRAM => UnixKind::Datagram,
            SOCK_SEQPACKET => UnixKind::Seqpacket,
            other => return Err(corrupt("unix_sock", addr, format!("is of type {other}"))),
        };
        let socket: Option<Socket> =
            (sock.sk_socket != 0).then(|| self.kernel.read(sock.sk_socket)).transpose()?;
        let closed = self.socket_flag(sock.flags, "SOCK_DEAD", 0);
        let listens = sock.state == TCP_LISTEN && !closed;
        let (options, obstacle) =
            self.socket_options(addr, socket.as_ref().map_or(0, |socket| socket.flags))?;
        let mut unsupported = self.unix_obstacle(&sock, &unix).or(obstacle);
        let (mut queue, mut waiting) = (Vec::new(), Vec::new());
        // What a closed socket had received is gone, or about to go.
        for skb in if closed { Vec::new() } else { self.skb_queue(sock.receive_queue)? } {
            if listens {
                waiting.push(UnixId(self.kernel.read::<SkBuff>(skb)?.sk));
            } else if let Some(message) = self.unix_message(skb, &mut unsupported)? {
                queue.push(message);
            }
        }
        let address = self.unix_address(unix.addr)?;
        let owns_address = !closed
            && match address.as_ref().and_then(|name| name.as_bytes().first()) {
                None => false,
                Some(0) => sock.hash >= ABSTRACT_HASH,
                Some(_) => sock.bind_node != 0,
            };
        let peer_credentials = match sock.sk_peer_cred {
            0 => None,
            cred => {
                let (cred, _) = self.credentials(cred)?;
                let pid = self.pid_number(sock.sk_peer_pid)?;
                Some(UnixCredentials { pid, uid: cred.euid, gid: cred.egid, groups: cred.groups })
            }
        };
        Ok(UnixSocket {
            kind,
            file: socket.as_ref().map(|socket| FileId(socket.file)).filter(|file| file.0 != 0),
            closed,
            owns_address,
            place: if owns_address { self.unix_place(&unix.path)? } else { None },
            address,
            peer: (unix.peer != 0).then_some(UnixId(unix.peer)),
            listening: listens.then_some(sock.sk_max_ack_backlog),
            waiting,
            queue,
            shutdown: sock.sk_shutdown & 3,
            error: sock.sk_err,
            peer_credentials,
            max_queue: sock.sk_max_ack_backlog,
            options,
            unsupported,
        })
    }

    /// What is not brought back of a socket's state.
    fn unix_obstacle(&self, sock: &Sock, unix: &UnixSock) -> Option<String> {
        if unix.oob_skb.is_some_and(|skb| skb != 0) {
            return Some("it holds an out-of-band byte: not brought back by this version".into());
        }
        if !matches!(self.kernel.symbol_at(sock.prot), Some("unix_stream_proto" | "unix_dgram_proto") | None)
        {
            return Some("a BPF program redirects it (sockmap): not brought back by this version".into());
        }
        None
    }

    /// A socket's name, and the socket that it is connected to. `addr`: of its `sock`.
    pub(crate) fn unix_names(&self, addr: u64) -> Result<(Option<Bytes>, Option<u64>)> {
        let unix: UnixSock = self.kernel.read(addr)?;
        Ok((self.unix_address(unix.addr)?, (unix.peer != 0).then_some(unix.peer)))
    }

    /// The inode number of a socket that somebody has open, 0 for others. `addr`: of its `sock`.
    pub(crate) fn unix_inode(&self, addr: u64) -> Result<u64> {
        let socket = self.kernel.read::<Sock>(addr)?.sk_socket;
        if socket == 0 {
            return Ok(0);
        }
        let alloc = socket.wrapping_sub(self.kernel.offset_of("socket_alloc", "socket")?);
        let inode = alloc.wrapping_add(self.kernel.offset_of("socket_alloc", "vfs_inode")?);
        Ok(self.kernel.read_u64(inode.wrapping_add(self.kernel.offset_of("inode", "i_ino")?))?)
    }

    /// Bytes that a socket has received and nobody has read. `addr`: of its `sock`.
    pub(crate) fn unix_unread(&self, addr: u64) -> Result<u64> {
        let sock: Sock = self.kernel.read(addr)?;
        let mut unread = 0;
        for skb in self.skb_queue(sock.receive_queue)? {
            let buffer: SkBuff = self.kernel.read(skb)?;
            let consumed = self.kernel.read::<Parameters>(buffer.cb)?.consumed;
            if consumed > buffer.len {
                return Err(corrupt("sk_buff", skb, format!("{consumed} of {} bytes were read", buffer.len)));
            }
            unread += u64::from(buffer.len - consumed);
        }
        Ok(unread)
    }

    /// The name behind the address family.
    fn unix_address(&self, addr: u64) -> Result<Option<Bytes>> {
        if addr == 0 {
            return Ok(None);
        }
        let address: UnixAddress = self.kernel.read(addr)?;
        let family = size_of::<u16>() as i32;
        if !(family + 1..=MAX_ADDRESS).contains(&address.len) {
            return Err(corrupt("unix_address", addr, format!("{} bytes", address.len)));
        }
        let at = address.name.wrapping_add(family as u64);
        Ok(Some(Bytes(self.kernel.read_bytes(at, (address.len - family) as usize)?)))
    }

    fn unix_place(&self, path: &Path) -> Result<Option<UnixPlace>> {
        if path.dentry == 0 {
            return Ok(None);
        }
        let full = self.path(path)?;
        let inode = self.inode_of(path.dentry)?;
        let mut directories = Vec::new();
        let mut below = path.dentry;
        loop {
            let above = below.wrapping_add(self.kernel.offset_of("dentry", "d_parent")?);
            let above = self.kernel.read_u64(above)?;
            if above == below {
                break;
            }
            if directories.len() >= MAX_DIRECTORIES {
                return Err(corrupt("dentry", path.dentry, "has an endless path"));
            }
            let inode = self.inode_of(above)?;
            directories.push(UnixDirectory {
                path: self.path(&Path { mnt: path.mnt, dentry: above })?.path,
                mode: u32::from(inode.i_mode) & 0o7777,
                uid: inode.i_uid,
                gid: inode.i_gid,
            });
            below = above;
        }
        directories.reverse();
        Ok(Some(UnixPlace {
            path: full.path,
            deleted: full.deleted,
            mount_namespace: full.namespace,
            mode: u32::from(inode.i_mode) & 0o7777,
            uid: inode.i_uid,
            gid: inode.i_gid,
            directories,
        }))
    }

    fn inode_of(&self, dentry: u64) -> Result<Inode> {
        let inode = dentry.wrapping_add(self.kernel.offset_of("dentry", "d_inode")?);
        Ok(self.kernel.read(self.kernel.read_u64(inode)?)?)
    }

    /// The buffers of a `sk_buff_head`, oldest first.
    fn skb_queue(&self, head: u64) -> Result<Vec<u64>> {
        let mut buffers = Vec::new();
        let mut at = self.kernel.read::<SkBuffHead>(head)?.next;
        let mut visited = Visited::default();
        while at != head {
            visited.visit("sk_buff", at)?;
            if buffers.len() >= MAX_MESSAGES {
                return Err(corrupt("sk_buff_head", head, "does not end"));
            }
            buffers.push(at);
            at = self.kernel.read::<SkBuff>(at)?.next;
        }
        Ok(buffers)
    }

    /// What is left of a buffer; `None` if all of it has been read (a buffer that is about to leave the queue).
    fn unix_message(&self, addr: u64, unsupported: &mut Option<String>) -> Result<Option<UnixMessage>> {
        let skb: SkBuff = self.kernel.read(addr)?;
        let parameters: Parameters = self.kernel.read(skb.cb)?;
        if skb.data_len > skb.len || skb.len > MAX_MESSAGE || parameters.consumed > skb.len {
            let why = format!("{} bytes, {} in pages, {} read", skb.len, skb.data_len, parameters.consumed);
            return Err(corrupt("sk_buff", addr, why));
        }
        if skb.len != 0 && parameters.consumed == skb.len {
            return Ok(None);
        }
        let mut data = Vec::new();
        self.linear_data(skb.data, skb.len - skb.data_len, &mut data)?;
        if skb.data_len != 0 && !self.fragments(addr, &skb, &mut data)? && unsupported.is_none() {
            *unsupported = Some("it holds a chain of buffers: not brought back by this version".into());
        }
        skip(&mut data, parameters.consumed);
        let mut files = Vec::new();
        if parameters.fp != 0 {
            let list: FileList = self.kernel.read(parameters.fp)?;
            if !(0..=MAX_FILES).contains(&list.count) {
                return Err(corrupt("scm_fp_list", parameters.fp, format!("{} files", list.count)));
            }
            let bytes = self.kernel.read_bytes(list.fp, list.count as usize * 8)?;
            files.extend(bytes.as_chunks::<8>().0.iter().map(|b| FileId(u64::from_le_bytes(*b))));
            self.held.borrow_mut().extend(files.iter().map(|file| file.0));
        }
        let credentials = match parameters.pid {
            0 => None,
            pid => Some(UnixCredentials {
                pid: self.pid_number(pid)?,
                uid: parameters.uid,
                gid: parameters.gid,
                groups: Vec::new(),
            }),
        };
        let sender_address = match skb.sk {
            0 => None,
            sk => self.unix_address(self.kernel.read::<UnixSock>(sk)?.addr)?,
        };
        let sender = (skb.sk != 0).then_some(UnixId(skb.sk));
        Ok(Some(UnixMessage { data, sender, sender_address, credentials, files }))
    }

    /// Bytes in the kernel's direct map.
    fn linear_data(&self, addr: u64, len: u32, data: &mut Vec<UnixData>) -> Result<()> {
        let (mut at, mut left) = (addr, u64::from(len));
        while left > 0 {
            let part = (PAGE_SIZE - at % PAGE_SIZE).min(left);
            push(data, UnixData { addr: self.kernel.virt_to_phys(at)?, len: part as u32 });
            at = at.wrapping_add(part);
            left -= part;
        }
        Ok(())
    }

    /// Bytes in pages; `false` if there are more elsewhere.
    fn fragments(&self, addr: u64, skb: &SkBuff, data: &mut Vec<UnixData>) -> Result<bool> {
        let shared_at = skb.head.wrapping_add(u64::from(skb.end));
        let shared: SharedInfo = self.kernel.read(shared_at)?;
        let new = self.kernel.has_type("skb_frag");
        let stride = self.kernel.size_of(if new { "skb_frag" } else { "bio_vec" })?;
        let mut left = skb.data_len;
        for i in 0..u64::from(shared.nr_frags) {
            let at = shared.frags.wrapping_add(i * stride);
            let (page, offset, len) = if new {
                let frag: Frag = self.kernel.read(at)?;
                (frag.netmem, frag.offset, frag.len)
            } else {
                let frag: BioVec = self.kernel.read(at)?;
                (frag.bv_page, frag.bv_offset, frag.bv_len)
            };
            if u64::from(offset) + u64::from(len) > 512 * PAGE_SIZE || page & 1 != 0 {
                return Err(corrupt(
                    "skb_shared_info",
                    shared_at,
                    format!("a piece of {offset}+{len} bytes"),
                ));
            }
            let len = len.min(left);
            let frame = self.kernel.page_to_pfn(page)? << PAGE_SHIFT;
            push(data, UnixData { addr: frame + u64::from(offset), len });
            left -= len;
        }
        if left != 0 && shared.frag_list == 0 {
            return Err(corrupt("sk_buff", addr, format!("{left} bytes are nowhere")));
        }
        Ok(left == 0)
    }
}

/// Adds a stretch, as a part of the last one where it follows that in memory.
fn push(data: &mut Vec<UnixData>, next: UnixData) {
    match data.last_mut() {
        Some(last) if last.addr + u64::from(last.len) == next.addr => last.len += next.len,
        _ if next.len == 0 => {}
        _ => data.push(next),
    }
}

/// Removes the first bytes.
fn skip(data: &mut Vec<UnixData>, mut count: u32) {
    while count > 0
        && let Some(first) = data.first_mut()
    {
        let part = first.len.min(count);
        first.addr += u64::from(part);
        first.len -= part;
        count -= part;
        if first.len == 0 {
            data.remove(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{declare, open};
    use synth::{Synth, U8, U64, array, named};

    /// A queue of buffers with linear data, page data, or both.
    struct Queue {
        synth: Synth,
        head: u64,
        last: u64,
    }

    impl Queue {
        fn new() -> Self {
            let mut synth = Synth::new();
            declare::<BioVec>(&mut synth, &[]);
            declare::<SharedInfo>(&mut synth, &[("frags", array(named("bio_vec"), 17))]);
            declare::<Parameters>(&mut synth, &[]);
            declare::<FileList>(&mut synth, &[("fp", array(U64, 253))]);
            declare::<SkBuff>(&mut synth, &[("cb", array(U8, 48))]);
            declare::<SkBuffHead>(&mut synth, &[]);
            let head = synth.alloc("sk_buff_head");
            synth.set("sk_buff_head", head, "next", head);
            Queue { synth, head, last: 0 }
        }

        /// Adds a buffer with so many bytes each way; returns it.
        fn add(&mut self, linear: u32, in_page: u32) -> u64 {
            let s = &mut self.synth;
            let skb = s.alloc("sk_buff");
            let area = s.alloc_bytes(4096, 4096);
            s.set("sk_buff", skb, "len", linear + in_page).set("sk_buff", skb, "data_len", in_page);
            s.set("sk_buff", skb, "head", area)
                .set("sk_buff", skb, "data", area)
                .set("sk_buff", skb, "end", 2048);
            if in_page != 0 {
                let info = area + 2048;
                let frag = s.alloc_phys(4096, 4096);
                let page = s.page_of(frag);
                s.set("skb_shared_info", info, "nr_frags", 1);
                let first = s.address_of("skb_shared_info", info, "frags");
                s.set("bio_vec", first, "bv_page", page);
                s.set("bio_vec", first, "bv_len", in_page).set("bio_vec", first, "bv_offset", 16);
            }
            match self.last {
                0 => s.set("sk_buff_head", self.head, "next", skb),
                last => s.set("sk_buff", last, "next", skb),
            };
            s.set("sk_buff", skb, "next", self.head);
            self.last = skb;
            skb
        }

        fn set(&mut self, skb: u64, member: &str, value: u64) {
            let cb = self.synth.address_of("sk_buff", skb, "cb");
            self.synth.set("unix_skb_parms", cb, member, value);
        }

        fn read(&self) -> Result<(Vec<UnixMessage>, Vec<u64>)> {
            let kernel = open(&self.synth);
            let autopsy = Autopsy::new(&kernel);
            let mut messages = Vec::new();
            for skb in autopsy.skb_queue(self.head)? {
                messages.extend(autopsy.unix_message(skb, &mut None)?);
            }
            Ok((messages, autopsy.held.take()))
        }
    }

    #[test]
    fn queues_are_read_with_what_is_left_of_each_buffer() {
        let mut queue = Queue::new();
        assert!(queue.read().unwrap().0.is_empty());
        let first = queue.add(100, 50);
        queue.set(first, "consumed", 110);
        let all_read = queue.add(10, 0);
        queue.set(all_read, "consumed", 10);
        queue.add(0, 0);
        let last = queue.add(7, 0);
        let files = queue.synth.alloc("scm_fp_list");
        queue.synth.set("scm_fp_list", files, "count", 2);
        let at = queue.synth.address_of("scm_fp_list", files, "fp");
        queue.synth.write_u64(at, 0x1111).write_u64(at + 8, 0x2222);
        queue.set(last, "fp", files);
        let (messages, held) = queue.read().unwrap();
        let sizes: Vec<u64> = messages.iter().map(UnixMessage::size).collect();
        assert_eq!(sizes, [40, 0, 7]);
        assert_eq!(messages[0].data.len(), 1, "the first part has been read");
        assert_eq!(messages[0].data[0].addr % 4096, 16 + 10);
        assert_eq!(messages[2].files, [FileId(0x1111), FileId(0x2222)]);
        assert_eq!(held, [0x1111, 0x2222]);
    }

    #[test]
    fn broken_queues_are_errors() {
        let endless = {
            let mut queue = Queue::new();
            let only = queue.add(1, 0);
            queue.synth.set("sk_buff", only, "next", only);
            queue
        };
        assert!(endless.read().is_err());
        let with = |change: fn(&mut Queue, u64)| {
            let mut queue = Queue::new();
            let skb = queue.add(100, 50);
            change(&mut queue, skb);
            queue.read()
        };
        assert!(with(|_, _| {}).is_ok());
        assert!(with(|queue, skb| queue.set(skb, "consumed", 151)).is_err());
        assert!(
            with(|queue, skb| {
                queue.synth.set("sk_buff", skb, "data_len", 151);
            })
            .is_err()
        );
        assert!(
            with(|queue, skb| {
                queue.synth.set("sk_buff", skb, "len", u32::MAX);
            })
            .is_err()
        );
        assert!(
            with(|queue, skb| {
                queue.synth.set("sk_buff", skb, "data", 8);
            })
            .is_err()
        );
        assert!(
            with(|queue, skb| {
                queue.synth.set("sk_buff", skb, "end", u32::MAX);
            })
            .is_err()
        );
        assert!(with(|queue, skb| queue.set(skb, "fp", 8)).is_err());
    }

    fn stretch(addr: u64, len: u32) -> UnixData {
        UnixData { addr, len }
    }

    #[test]
    fn stretches_that_touch_are_one() {
        let mut data = Vec::new();
        for next in [stretch(0x1f00, 0x100), stretch(0x2000, 0x800), stretch(0, 0), stretch(0x9000, 5)] {
            push(&mut data, next);
        }
        assert_eq!(data, [stretch(0x1f00, 0x900), stretch(0x9000, 5)]);
    }

    #[test]
    fn what_was_read_is_skipped() {
        let of = |count| {
            let mut data = vec![stretch(100, 10), stretch(500, 20)];
            skip(&mut data, count);
            data
        };
        assert_eq!(of(0), [stretch(100, 10), stretch(500, 20)]);
        assert_eq!(of(3), [stretch(103, 7), stretch(500, 20)]);
        assert_eq!(of(10), [stretch(500, 20)]);
        assert_eq!(of(15), [stretch(505, 15)]);
        assert!(of(31).is_empty());
    }
}
