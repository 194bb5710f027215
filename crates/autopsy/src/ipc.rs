//! System V shared memory, semaphores and message queues of the initial namespace: `ipc_namespace.ids` (ipc/util.c, shm.c, sem.c,
//! msg.c, msgutil.c; 6.1 and 6.12).

use std::collections::BTreeMap;

use ktypes::KernelType;
use snapshot::{Bytes, Ipc, IpcPerm, Message, MsgQueue, Pid, SemArray, SemUndo, Severity, ShmSegment};
use vmcore::PAGE_SIZE;

use crate::Autopsy;
use crate::error::{Result, Visited, corrupt};
use crate::syscall::KnownTask;

/// Objects of one kind (`ipcmni_extend`).
const MAX_OBJECTS: usize = 1 << 24;
/// Semaphores in one set (the default of kernel.sem is 32000) and processes that have something to undo in it.
const MAX_SEMAPHORES: u32 = 1 << 16;
const MAX_UNDO: usize = 1 << 20;
/// Messages in one queue, and bytes in one message.
const MAX_MESSAGES: usize = 1 << 20;
const MAX_MESSAGE: u64 = 1 << 24;

// ipc_namespace.ids (ipc/util.h).
const SEM_IDS: u64 = 0;
const MSG_IDS: u64 = 1;
const SHM_IDS: u64 = 2;
// Above the permissions in a segment's mode (include/linux/shm.h, uapi/linux/shm.h).
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;

#[derive(KernelType)]
#[kernel("kern_ipc_perm")]
struct Perm {
    deleted: u8,
    id: i32,
    key: i32,
    uid: u32,
    gid: u32,
    cuid: u32,
    cgid: u32,
    mode: u16,
}

#[derive(KernelType)]
#[kernel("shmid_kernel")]
struct Segment {
    shm_file: u64,
    shm_segsz: u64,
}

#[derive(KernelType)]
#[kernel("sem_array")]
struct Semaphores {
    sem_nsems: u32,
    #[kernel(address)]
    list_id: u64,
    #[kernel(address)]
    sems: u64,
}

#[derive(KernelType)]
#[kernel("sem_undo")]
struct Undo {
    ulp: u64,
    /// A pointer until 6.6, the numbers themselves since.
    #[kernel(address)]
    semadj: u64,
}

#[derive(KernelType)]
#[kernel("msg_queue")]
struct Queue {
    q_qbytes: u64,
    #[kernel(address)]
    q_messages: u64,
}

#[derive(KernelType)]
#[kernel("msg_msg")]
struct Msg {
    m_type: i64,
    m_ts: u64,
    next: u64,
}

impl Autopsy<'_> {
    /// All objects. What cannot be read becomes a finding about the machine. For after the processes.
    pub(crate) fn ipc(&self) -> Ipc {
        let undoers = self.undoers().unwrap_or_default();
        Ipc {
            shm: self.objects(SHM_IDS, "shared memory", |at, perm, mode| self.segment(at, perm, mode)),
            sem: self.objects(SEM_IDS, "semaphores", |at, perm, _| self.semaphores(at, perm, &undoers)),
            msg: self.objects(MSG_IDS, "message queue", |at, perm, _| self.queue(at, perm)),
        }
    }

    fn objects<T>(&self, ids: u64, what: &str, read: impl Fn(u64, IpcPerm, u32) -> Result<T>) -> Vec<T> {
        let perms = self.perms(ids).unwrap_or_else(|error| {
            self.find(Severity::Loss, "ipc", format!("System V {what}: {error}"));
            Vec::new()
        });
        let mut objects = Vec::new();
        for at in perms {
            let object = self.kernel.read::<Perm>(at).map_err(Into::into).and_then(|perm| {
                let mode = u32::from(perm.mode);
                let Perm { id, key, uid, gid, cuid, cgid, .. } = perm;
                let ipc = IpcPerm { id, key, uid, gid, cuid, cgid, mode: mode & 0o777 };
                (perm.deleted == 0).then(|| read(at, ipc, mode)).transpose()
            });
            match object {
                Ok(object) => objects.extend(object),
                Err(error) => self.find(Severity::Loss, "ipc", format!("System V {what}: {error}")),
            }
        }
        objects
    }

    /// The `kern_ipc_perm` of all objects of a kind, by index in their table.
    fn perms(&self, ids: u64) -> Result<Vec<u64>> {
        let k = self.kernel;
        let at = k
            .symbol("init_ipc_ns")?
            .wrapping_add(k.offset_of("ipc_namespace", "ids")?)
            .wrapping_add(ids.wrapping_mul(k.size_of("ipc_ids")?));
        let mut perms = Vec::new();
        k.xarray_for_each(
            at.wrapping_add(k.offset_of("ipc_ids", "ipcs_idr.idr_rt")?),
            MAX_OBJECTS,
            |_, entry| {
                perms.extend(entry.pointer());
                Ok(())
            },
        )?;
        Ok(perms)
    }

    fn segment(&self, at: u64, perm: IpcPerm, mode: u32) -> Result<ShmSegment> {
        let at = at.wrapping_sub(self.kernel.offset_of("shmid_kernel", "shm_perm")?);
        let segment: Segment = self.kernel.read(at)?;
        self.file(segment.shm_file)?;
        let files = self.files.borrow();
        let file = files.get(&snapshot::FileId(segment.shm_file));
        let file = file.ok_or_else(|| corrupt("shmid_kernel", at, "has no file"))?;
        Ok(ShmSegment {
            perm,
            inode: file.inode,
            size: segment.shm_segsz,
            huge_page: self.inodes.borrow().get(&file.inode).and_then(|inode| inode.huge_page),
            removed: mode & SHM_DEST != 0,
            locked: mode & SHM_LOCKED != 0,
        })
    }

    /// Which process has which `sem_undo_list`.
    fn undoers(&self) -> Result<BTreeMap<u64, Pid>> {
        let list = self.kernel.offset_of("task_struct", "sysvsem.undo_list")?;
        let tasks = self.known_tasks.get().map_or(&[][..], Vec::as_slice);
        let of =
            |task: &KnownTask| Some((self.kernel.read_u64(task.addr.wrapping_add(list)).ok()?, task.tgid));
        Ok(tasks.iter().filter_map(of).filter(|(list, _)| *list != 0).collect())
    }

    fn semaphores(&self, at: u64, perm: IpcPerm, undoers: &BTreeMap<u64, Pid>) -> Result<SemArray> {
        let k = self.kernel;
        let at = at.wrapping_sub(k.offset_of("sem_array", "sem_perm")?);
        let array: Semaphores = k.read(at)?;
        if array.sem_nsems > MAX_SEMAPHORES {
            return Err(corrupt("sem_array", at, format!("has {} semaphores", array.sem_nsems)));
        }
        let (stride, value) = (k.size_of("sem")?, k.offset_of("sem", "semval")?);
        let values = (0..u64::from(array.sem_nsems)).map(|i| {
            let value = k.read_i32(array.sems.wrapping_add(i * stride + value))?;
            u16::try_from(value).map_err(|_| corrupt("sem_array", at, format!("value {value}")))
        });
        let values = values.collect::<Result<_>>()?;
        let to_list = k.offset_of("sem_undo", "list_id")?;
        let is_pointer = k.member("sem_undo", "semadj")?.size != 0;
        let mut undo = Vec::new();
        for node in self.list(array.list_id, MAX_UNDO)? {
            let one: Undo = k.read(node.wrapping_sub(to_list))?;
            let numbers = if is_pointer { k.read_u64(one.semadj)? } else { one.semadj };
            let bytes = k.read_bytes(numbers, array.sem_nsems as usize * 2)?;
            let adjustments: Vec<i16> =
                bytes.as_chunks::<2>().0.iter().map(|b| i16::from_le_bytes(*b)).collect();
            if adjustments.iter().all(|a| *a == 0) {
                continue;
            }
            match undoers.get(&one.ulp) {
                Some(&pid) => undo.push(SemUndo { pid, adjustments }),
                None => {
                    let text =
                        format!("semaphores {}: what is to be undone at an exit belongs to nobody", perm.id);
                    self.find(Severity::Loss, "ipc", text);
                }
            }
        }
        Ok(SemArray { perm, values, undo })
    }

    fn queue(&self, at: u64, perm: IpcPerm) -> Result<MsgQueue> {
        let k = self.kernel;
        let at = at.wrapping_sub(k.offset_of("msg_queue", "q_perm")?);
        let queue: Queue = k.read(at)?;
        let to_list = k.offset_of("msg_msg", "m_list")?;
        let mut messages = Vec::new();
        for node in self.list(queue.q_messages, MAX_MESSAGES)? {
            messages.push(self.message(node.wrapping_sub(to_list))?);
        }
        Ok(MsgQueue { perm, max_bytes: queue.q_qbytes, messages })
    }

    /// A message lies behind its header, and goes on behind the headers of further pages.
    fn message(&self, at: u64) -> Result<Message> {
        let k = self.kernel;
        let head: Msg = k.read(at)?;
        if head.m_ts > MAX_MESSAGE {
            return Err(corrupt("msg_msg", at, format!("has {} bytes", head.m_ts)));
        }
        let (header, segment_header) = (k.size_of("msg_msg")?, k.size_of("msg_msgseg")?);
        let next = k.offset_of("msg_msgseg", "next")?;
        let mut part = head.m_ts.min(PAGE_SIZE.saturating_sub(header));
        let mut text = k.read_bytes(at.wrapping_add(header), part as usize)?;
        let mut left = head.m_ts - part;
        let mut segment = head.next;
        let mut visited = Visited::default();
        // Each round takes something of what is left.
        while left > 0 {
            if segment == 0 {
                return Err(corrupt("msg_msg", at, format!("{left} bytes are missing")));
            }
            visited.visit("msg_msgseg", segment)?;
            part = left.min(PAGE_SIZE.saturating_sub(segment_header).max(1));
            text.extend(k.read_bytes(segment.wrapping_add(segment_header), part as usize)?);
            left -= part;
            segment = k.read_u64(segment.wrapping_add(next))?;
        }
        Ok(Message { kind: head.m_type, text: Bytes(text) })
    }

    /// The segment that a file stands for which shmat(2) made (`shm_file_data`).
    pub(crate) fn shm_id(&self, private_data: u64) -> Result<i32> {
        Ok(self.kernel.read_i32(private_data.wrapping_add(self.kernel.offset_of("shm_file_data", "id")?))?)
    }
}
