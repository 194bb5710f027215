//! Records live processes of this machine as a `Snapshot`, with ptrace and /proc: what a dead kernel's memory would say of them.
//!
//! Much simpler than the real thing, because the processes are test programs of ours and stand still.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};

use serde::{Deserialize, Serialize};
use snapshot::*;

/// Everything about the "dead machine".
#[derive(Serialize, Deserialize)]
pub struct Frozen {
    pub snapshot: Snapshot,
    #[serde(skip)]
    pub memory: Memory,
}

/// Page frames in the order in which they were recorded, at a place where a block boundary lies between them.
#[derive(Default)]
pub struct Memory {
    pub bytes: Vec<u8>,
    ranges: Vec<PhysRange>,
}

const BASE: u64 = (128 << 20) - (1 << 20);

impl Memory {
    pub fn of(bytes: Vec<u8>) -> Self {
        let ranges = vec![PhysRange { start: BASE, len: bytes.len() as u64 }];
        Self { bytes, ranges }
    }

    /// Stores whole pages, returns the first frame's number.
    fn store(&mut self, page: &[u8]) -> u64 {
        let pfn = (BASE + self.bytes.len() as u64) / PAGE_SIZE;
        self.bytes.extend_from_slice(page);
        self.bytes.resize(self.bytes.len().next_multiple_of(4096), 0);
        pfn
    }

    /// Stores any bytes, returns their physical address.
    pub fn store_bytes(&mut self, bytes: &[u8]) -> u64 {
        self.store(bytes) * PAGE_SIZE
    }
}

impl PhysMem for Memory {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }
    fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
        let absent = || PhysMemError::NotPresent { addr, len: len as u64 };
        let start = addr.checked_sub(BASE).ok_or_else(absent)? as usize;
        self.bytes.get(start..start + len).map(PhysMap::borrowed).ok_or_else(absent)
    }
}

fn check(r: i64, what: &str) -> i64 {
    assert!(r >= 0, "{what}: {}", std::io::Error::last_os_error());
    r
}

fn ptrace(request: u32, tid: Pid, addr: u64, data: u64) -> i64 {
    let r = unsafe { libc::ptrace(request, tid, addr as *mut libc::c_void, data as *mut libc::c_void) };
    check(r, &format!("ptrace {request:#x} of {tid}"))
}

fn wait_stop(tid: Pid) {
    let mut status = 0;
    check(unsafe { libc::waitpid(tid, &mut status, libc::__WALL) }.into(), "waitpid");
    assert!(libc::WIFSTOPPED(status), "{tid} ended: {status:#x}");
}

fn regs(tid: Pid) -> Registers {
    let mut regs = Registers::default();
    ptrace(libc::PTRACE_GETREGS, tid, 0, &raw mut regs as u64);
    regs
}

pub fn read_memory(pid: Pid, addr: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    fs::File::open(format!("/proc/{pid}/mem")).unwrap().read_exact_at(&mut buf, addr).unwrap();
    buf
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(8).map(|c| u64::from_ne_bytes(c.try_into().unwrap())).collect()
}

/// Makes a system call in a stopped thread by stepping over the vDSO's `syscall`; 256 bytes below its stack's red zone are given back as
/// the call left them.
fn remote_call(tid: Pid, vdso: u64, nr: i64, args: impl Fn(u64) -> [u64; 4]) -> (i64, Vec<u8>) {
    let saved = regs(tid);
    let buffer = (saved.rsp - 512) & !63;
    let image = read_memory(tid, vdso, 4096);
    let at = image.windows(2).position(|w| w == [0x0f, 0x05]).unwrap() as u64;
    let [rdi, rsi, rdx, r10] = args(buffer);
    let mut regs_now = Registers { rip: vdso + at, rax: nr as u64, orig_rax: u64::MAX, ..saved };
    (regs_now.rdi, regs_now.rsi, regs_now.rdx, regs_now.r10) = (rdi, rsi, rdx, r10);
    ptrace(libc::PTRACE_SETREGS, tid, 0, &raw const regs_now as u64);
    ptrace(libc::PTRACE_SINGLESTEP, tid, 0, 0);
    wait_stop(tid);
    let result = regs(tid).rax as i64;
    ptrace(libc::PTRACE_SETREGS, tid, 0, &raw const saved as u64);
    (result, read_memory(tid, buffer, 256))
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|l| l.split(':').next() == Some(name));
    line.unwrap_or_else(|| panic!("{name} in {status}")).split_once(':').unwrap().1.trim()
}

fn hex(status: &str, name: &str) -> u64 {
    u64::from_str_radix(field(status, name), 16).unwrap()
}

fn list<T: std::str::FromStr>(text: &str) -> Vec<T> {
    text.split_whitespace().filter_map(|v| v.parse().ok()).collect()
}

fn stat_fields(path: &str) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let rest = &text[text.rfind(')').unwrap() + 2..];
    // Index = field number in proc(5).
    ["", "", ""].into_iter().chain(rest.split_whitespace()).map(str::to_owned).collect()
}

/// Records processes; `zombies` among them have no memory.
pub fn freeze(pids: &[Pid]) -> Frozen {
    let mut f = Freezer {
        snapshot: Snapshot { format: FORMAT, ..Snapshot::default() },
        memory: Memory::default(),
        frames: BTreeMap::new(),
        descriptors: Vec::new(),
        next: 0x1000,
    };
    for clock in [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME] {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        check(unsafe { libc::clock_gettime(clock, &mut t) }.into(), "clock_gettime");
        let ns = t.tv_sec * 1_000_000_000 + t.tv_nsec;
        match clock {
            libc::CLOCK_REALTIME => f.snapshot.clocks.realtime_ns = ns,
            libc::CLOCK_MONOTONIC => f.snapshot.clocks.monotonic_ns = ns,
            _ => f.snapshot.clocks.boottime_ns = ns,
        }
    }
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let vdso = maps.lines().find(|l| l.ends_with("[vdso]")).unwrap().split(' ').next().unwrap();
    let (start, end) = vdso.split_once('-').unwrap();
    let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
    let image = unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) };
    f.snapshot.kernel.vdso = Some(vdso_fingerprint(image));
    for &pid in pids {
        f.process(pid);
    }
    f.snapshot.processes.sort_by_key(|p| p.pid);
    let memory = Memory::of(std::mem::take(&mut f.memory.bytes));
    Frozen { snapshot: f.snapshot, memory }
}

struct Freezer {
    snapshot: Snapshot,
    memory: Memory,
    /// Real frame → ours: frames that are shared stay shared.
    frames: BTreeMap<u64, u64>,
    /// (pid, fd) of every descriptor that has been given a FileId.
    descriptors: Vec<(Pid, i32, FileId)>,
    next: u64,
}

impl Freezer {
    fn id(&mut self) -> u64 {
        self.next += 0x40;
        self.next
    }

    fn process(&mut self, pid: Pid) {
        let stat = stat_fields(&format!("/proc/{pid}/stat"));
        let number = |i: usize| stat[i].parse::<i64>().unwrap();
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        let mut process = Process {
            ppid: number(4) as Pid,
            pgid: number(5) as Pid,
            sid: number(6) as Pid,
            files_id: self.id(),
            exit_signal: number(38) as i32,
            cgroup: "/".into(),
            decision: Decision::Continue { losses: vec![] },
            ..Process::new(pid, comm.trim_end().into())
        };
        // A dead leader is a zombie as well, but not alone.
        if stat[3] == "Z" && fs::read_dir(format!("/proc/{pid}/task")).unwrap().count() == 1 {
            process.state = ProcessState::Zombie { status: number(52) as i32 };
            self.snapshot.processes.push(process);
            return;
        }
        if stat[3] == "T" {
            process.state = ProcessState::Stopped { signal: libc::SIGSTOP };
        }
        let mut tids: Vec<Pid> = fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            .map(|d| d.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        tids.sort_by_key(|&t| (t != pid, t));
        let is_dead = |tid: Pid| stat_fields(&format!("/proc/{pid}/task/{tid}/stat"))[3] == "Z";
        let living: Vec<Pid> = tids.iter().copied().filter(|&t| !is_dead(t)).collect();
        for &tid in &living {
            ptrace(libc::PTRACE_SEIZE, tid, 0, 0);
            ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0);
            wait_stop(tid);
        }
        let main = living[0];
        let smaps = fs::read(format!("/proc/{pid}/task/{main}/smaps")).unwrap();
        let vdso = vdso_of(&smaps);
        self.signals(&mut process, main, vdso);
        for &tid in &tids {
            let thread = thread(pid, tid, living.contains(&tid), vdso);
            process.threads.push(thread);
        }
        // A leader that has exited has no address space to tell about.
        let stat = stat_fields(&format!("/proc/{pid}/task/{main}/stat"));
        let mm = self.address_space(pid, main, &smaps, &stat, vdso);
        let id = AddressSpaceId(self.id());
        self.snapshot.address_spaces.insert(id, mm);
        process.address_space = Some(id);
        self.descriptors(&mut process, main);
        let status = fs::read_to_string(format!("/proc/{pid}/task/{main}/status")).unwrap();
        let link = |name: &str| {
            let path = fs::read_link(format!("/proc/{pid}/task/{main}/{name}")).unwrap();
            Bytes::from(path.as_os_str().as_bytes())
        };
        process.fs = FsContext {
            id: self.id(),
            cwd: link("cwd"),
            cwd_deleted: false,
            root: link("root"),
            umask: u32::from_str_radix(field(&status, "Umask"), 8).unwrap(),
        };
        process.oom_score_adj =
            fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse().unwrap();
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        for line in limits.lines().skip(1) {
            let mut values = line[25..].split_whitespace().map(|v| v.parse().unwrap_or(u64::MAX));
            process.rlimits.push(Rlimit { cur: values.next().unwrap(), max: values.next().unwrap() });
        }
        let tty = number(7) as u64;
        if tty != 0 {
            process.ctty = self
                .snapshot
                .ttys
                .iter()
                .find(|(_, t)| libc::makedev(t.major, t.minor) == tty)
                .map(|(id, _)| *id);
        }
        let subreaper =
            remote_call(main, vdso, libc::SYS_prctl, |buf| [libc::PR_GET_CHILD_SUBREAPER as u64, buf, 0, 0]);
        process.child_subreaper = words(&subreaper.1)[0] as u32 != 0;
        self.snapshot.processes.push(process);
    }

    fn signals(&mut self, process: &mut Process, tid: Pid, vdso: u64) {
        process.signals.id = self.id();
        for signo in 1..=64u64 {
            let (_, old) = remote_call(tid, vdso, libc::SYS_rt_sigaction, |buf| [signo, 0, buf, 8]);
            let w = words(&old);
            let mut action = SigAction { handler: w[0], flags: w[1], restorer: w[2], mask: w[3] };
            if signo == 9 || signo == 19 {
                action = SigAction::default();
            }
            process.signals.actions.push(action);
        }
        process.signals.pending = pending(tid, true);
    }

    fn address_space(
        &mut self,
        pid: Pid,
        tid: Pid,
        smaps: &[u8],
        stat: &[String],
        vdso: u64,
    ) -> AddressSpace {
        let n = |i: usize| stat[i].parse::<u64>().unwrap();
        let auxv = words(&fs::read(format!("/proc/{pid}/task/{tid}/auxv")).unwrap());
        let (brk, _) = remote_call(tid, vdso, libc::SYS_brk, |_| [0; 4]);
        let mut mm = AddressSpace {
            layout: MmLayout {
                start_code: n(26),
                end_code: n(27),
                start_stack: n(28),
                start_data: n(45),
                end_data: n(46),
                start_brk: n(47),
                arg_start: n(48),
                arg_end: n(49),
                env_start: n(50),
                env_end: n(51),
                brk: brk as u64,
                auxv,
            },
            dumpable: remote_call(tid, vdso, libc::SYS_prctl, |_| [libc::PR_GET_DUMPABLE as u64, 0, 0, 0]).0
                as u32,
            ..AddressSpace::default()
        };
        let exe = fs::read_link(format!("/proc/{pid}/task/{tid}/exe")).unwrap();
        mm.exe = Some(self.mapped_file(exe.as_os_str().as_bytes(), false));
        let text = String::from_utf8(smaps.to_vec()).unwrap();
        let is_header = |l: &&str| l.split('-').next().is_some_and(|a| u64::from_str_radix(a, 16).is_ok());
        let lines: Vec<&str> = text.lines().collect();
        let starts: Vec<usize> = (0..lines.len()).filter(|&i| is_header(&lines[i])).collect();
        let pagemap = fs::File::open(format!("/proc/{pid}/task/{tid}/pagemap")).unwrap();
        for (i, &at) in starts.iter().enumerate() {
            let end = starts.get(i + 1).copied().unwrap_or(lines.len());
            let flags = lines[at..end].iter().find_map(|l| l.strip_prefix("VmFlags:")).unwrap();
            if let Some(vma) = self.vma(tid, lines[at], flags, &pagemap) {
                mm.vmas.push(vma);
            }
        }
        mm
    }

    fn vma(&mut self, tid: Pid, header: &str, flags: &str, pagemap: &fs::File) -> Option<Vma> {
        let mut columns = header.splitn(6, ' ');
        let (start, end) = columns.next().unwrap().split_once('-').unwrap();
        let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
        let perms = columns.next().unwrap();
        let offset = u64::from_str_radix(columns.next().unwrap(), 16).unwrap();
        let _dev = columns.next();
        let ino: u64 = columns.next().unwrap().parse().unwrap();
        let path = columns.next().unwrap_or("").trim_start();
        if path == "[vsyscall]" {
            return None;
        }
        let mut prot = Prot::empty();
        prot.set(Prot::READ, perms.contains('r'));
        prot.set(Prot::WRITE, perms.contains('w'));
        prot.set(Prot::EXEC, perms.contains('x'));
        let shared = perms.contains('s');
        const NAMES: [(&str, VmaFlags); 15] = [
            ("gd", VmaFlags::GROWSDOWN),
            ("lo", VmaFlags::LOCKED),
            ("ac", VmaFlags::ACCOUNT),
            ("nr", VmaFlags::NORESERVE),
            ("hg", VmaFlags::HUGEPAGE),
            ("nh", VmaFlags::NOHUGEPAGE),
            ("dc", VmaFlags::DONTCOPY),
            ("dd", VmaFlags::DONTDUMP),
            ("wf", VmaFlags::WIPEONFORK),
            ("mg", VmaFlags::MERGEABLE),
            ("sr", VmaFlags::SEQ_READ),
            ("rr", VmaFlags::RAND_READ),
            ("mr", VmaFlags::MAYREAD),
            ("mw", VmaFlags::MAYWRITE),
            ("me", VmaFlags::MAYEXEC),
        ];
        let mut vm_flags = VmaFlags::empty();
        for name in flags.split_whitespace() {
            vm_flags |= NAMES.iter().find(|(n, _)| *n == name).map_or(VmaFlags::empty(), |(_, f)| *f);
        }
        let kind = if path.starts_with("[v") {
            VmaKind::Special { name: path.into() }
        } else if path == "/dev/zero (deleted)" {
            let inode = InodeId(ino);
            if !self.snapshot.inodes.contains_key(&inode) {
                let contents = read_memory(tid, start, (end - start) as usize);
                let pfn = self.memory.store(&contents);
                let count = (contents.len() / 4096) as u32;
                let pages = vec![PageCacheRun { index: offset / 4096, pfn, count, dirty: true }];
                let mut object = inode_of(&fs::metadata("/proc/self/exe").unwrap(), b"");
                (object.fs_type, object.pages, object.size) =
                    ("tmpfs".into(), pages, offset + contents.len() as u64);
                self.snapshot.inodes.insert(inode, object);
            }
            VmaKind::SharedAnonymous { inode, offset }
        } else if ino != 0 {
            VmaKind::File { file: self.mapped_file(path.as_bytes(), shared && perms.contains('w')), offset }
        } else {
            VmaKind::Anonymous
        };
        let mut pages: Vec<PageRun> = Vec::new();
        let is_reservation = prot.is_empty() && end - start > 1 << 32;
        if !shared && !is_reservation && !matches!(kind, VmaKind::Special { .. }) {
            let mut entries = vec![0u8; ((end - start) / 4096 * 8) as usize];
            let got = pagemap.read_at(&mut entries, start / 4096 * 8).unwrap();
            for (i, entry) in words(&entries[..got / 8 * 8]).into_iter().enumerate() {
                const PRESENT: u64 = 1 << 63;
                const FILE_PAGE: u64 = 1 << 61;
                if entry & PRESENT == 0 || entry & FILE_PAGE != 0 {
                    continue;
                }
                let addr = start + i as u64 * PAGE_SIZE;
                let frame = entry & ((1 << 55) - 1);
                let pfn = match self.frames.get(&frame) {
                    Some(&pfn) => pfn,
                    None => {
                        let pfn = self.memory.store(&read_memory(tid, addr, 4096));
                        self.frames.insert(frame, pfn);
                        pfn
                    }
                };
                match pages.last_mut() {
                    Some(last)
                        if last.addr + u64::from(last.count) * PAGE_SIZE == addr
                            && last.pfn + u64::from(last.count) == pfn =>
                    {
                        last.count += 1;
                    }
                    _ => pages.push(PageRun { addr, pfn, count: 1 }),
                }
            }
        }
        Some(Vma { start, end, prot, shared, flags: vm_flags, kind, name: None, pages, lost_pages: 0 })
    }

    fn mapped_file(&mut self, path: &[u8], writable: bool) -> FileId {
        let flags = if writable { libc::O_RDWR } else { libc::O_RDONLY };
        let known = self.snapshot.files.iter().find(|(id, f)| {
            f.path.as_bytes() == path
                && f.flags & libc::O_ACCMODE == flags
                && !self.descriptors.iter().any(|d| d.2 == **id)
        });
        if let Some((id, _)) = known {
            return *id;
        }
        let meta = fs::metadata(Bytes::from(path).as_path()).unwrap();
        self.add_file(FileKind::Regular, path, flags, 0, &meta)
    }

    fn add_file(&mut self, kind: FileKind, path: &[u8], flags: i32, pos: i64, meta: &fs::Metadata) -> FileId {
        let inode = InodeId(meta.ino() << 8 | 1);
        self.snapshot.inodes.entry(inode).or_insert_with(|| inode_of(meta, path));
        let id = FileId(self.id());
        let file = OpenFile {
            kind,
            path: path.into(),
            deleted: false,
            mount_namespace: None,
            flags,
            pos,
            inode,
            owner_pid: 0,
            owner_is_thread: false,
            owner_signal: 0,
            count: 1,
        };
        self.snapshot.files.insert(id, file);
        id
    }

    fn descriptors(&mut self, process: &mut Process, tid: Pid) {
        let pid = process.pid;
        let dir = format!("/proc/{pid}/task/{tid}");
        let mut numbers: Vec<i32> = fs::read_dir(format!("{dir}/fd"))
            .unwrap()
            .map(|d| d.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        numbers.sort_unstable();
        for fd in numbers {
            let info = fs::read_to_string(format!("{dir}/fdinfo/{fd}")).unwrap();
            let flags = i32::from_str_radix(field(&info, "flags"), 8).unwrap();
            let cloexec = flags & libc::O_CLOEXEC != 0;
            let same = |&(p, n, _): &(Pid, i32, FileId)| {
                const KCMP_FILE: i32 = 0;
                unsafe { libc::syscall(libc::SYS_kcmp, pid, p, KCMP_FILE, fd, n) == 0 }
            };
            let known = self.descriptors.iter().find(|d| same(d)).map(|d| d.2);
            let file = known.unwrap_or_else(|| self.open_file(&dir, fd, flags & !libc::O_CLOEXEC, &info));
            self.locks(process, file, &info);
            self.descriptors.push((pid, fd, file));
            process.descriptors.push(Descriptor { fd, file, cloexec });
        }
    }

    /// The locks that a descriptor's fdinfo lists: those of its process and of its open file.
    fn locks(&mut self, process: &Process, file: FileId, info: &str) {
        for line in info.lines().filter(|line| line.starts_with("lock:")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (kind, owner) = match words[2] {
                "FLOCK" => (LockKind::Flock, LockOwner::File(file)),
                "OFDLCK" => (LockKind::Ofd, LockOwner::File(file)),
                "POSIX" => (LockKind::Posix, LockOwner::Table(process.files_id)),
                other => panic!("a lock of type {other}"),
            };
            let lock = Lock {
                kind,
                inode: self.snapshot.files[&file].inode,
                owner,
                exclusive: words[4] == "WRITE",
                start: words[7].parse().unwrap(),
                end: words[8].parse().unwrap_or(i64::MAX),
                pid: process.pid,
                descriptor: -1,
                breaking: false,
            };
            if !self.snapshot.locks.contains(&lock) {
                self.snapshot.locks.push(lock);
            }
        }
    }

    fn open_file(&mut self, dir: &str, fd: i32, flags: i32, info: &str) -> FileId {
        let at = format!("{dir}/fd/{fd}");
        let link = fs::read_link(&at).unwrap();
        let path = link.as_os_str().as_bytes();
        let meta = fs::metadata(&at).unwrap();
        let pos = field(info, "pos").parse().unwrap();
        let kind = if meta.file_type().is_fifo() {
            let end = match flags & libc::O_ACCMODE {
                libc::O_RDONLY => PipeEnd::Read,
                libc::O_WRONLY => PipeEnd::Write,
                _ => PipeEnd::Both,
            };
            let pipe = PipeId(meta.ino());
            if !self.snapshot.pipes.contains_key(&pipe) {
                let object = self.pipe(&at, path);
                self.snapshot.pipes.insert(pipe, object);
            }
            FileKind::Pipe { pipe, end }
        } else if path == b"anon_inode:[pidfd]" {
            let pid: Pid = field(info, "Pid").parse().unwrap();
            FileKind::PidFd(PidFd { pid, thread: false, gone: pid < 0 })
        } else if let Some(below) = path.strip_prefix(b"/proc/") {
            let name = String::from_utf8_lossy(below.split(|&b| b == b'/').next().unwrap()).into_owned();
            FileKind::Proc(ProcFile { task: name.parse().ok(), gone: false })
        } else if flags & libc::O_PATH != 0 {
            FileKind::Path
        } else if meta.is_dir() {
            FileKind::Directory
        } else if meta.file_type().is_char_device() {
            let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
            if major == 136 {
                FileKind::Tty { tty: self.tty(&at, path, major, minor) }
            } else {
                FileKind::CharDevice { major, minor }
            }
        } else if meta.is_file() {
            FileKind::Regular
        } else {
            FileKind::Unsupported { what: String::from_utf8_lossy(path).into_owned() }
        };
        self.add_file(kind, path, flags, pos, &meta)
    }

    /// Takes the contents out: the process will not miss them.
    fn pipe(&mut self, at: &str, path: &[u8]) -> Pipe {
        let mut options = fs::OpenOptions::new();
        let mut reader = options.read(true).custom_flags(libc::O_NONBLOCK).open(at).unwrap();
        let capacity =
            check(unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_GETPIPE_SZ) }.into(), "F_GETPIPE_SZ");
        let mut buffers = Vec::new();
        let mut page = [0; 4096];
        while let Ok(n @ 1..) = reader.read(&mut page) {
            let addr = self.memory.store_bytes(&page[..n]);
            buffers.push(PipeBuffer { addr, len: n as u32, packet: false });
        }
        let name = path.starts_with(b"/").then(|| path.into());
        Pipe { path: name, capacity: capacity as u64, buffers, readers: 1, writers: 1 }
    }

    fn tty(&mut self, at: &str, path: &[u8], major: u32, minor: u32) -> TtyId {
        let id = TtyId(libc::makedev(major, minor));
        if self.snapshot.ttys.contains_key(&id) {
            return id;
        }
        let c_path = std::ffi::CString::new(at).unwrap();
        let fd = unsafe {
            OwnedFd::from_raw_fd(libc::open(
                c_path.as_ptr(),
                libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK,
            ))
        };
        let mut t: libc::termios2 = unsafe { std::mem::zeroed() };
        let mut w: libc::winsize = unsafe { std::mem::zeroed() };
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCGETS2, &mut t) }.into(), "TCGETS2");
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &mut w) }.into(), "TIOCGWINSZ");
        let tty = Tty {
            console: None,
            pty: None,
            name: path.strip_prefix(b"/dev/").unwrap().into(),
            major,
            minor,
            unsupported: None,
            termios: Termios {
                iflag: t.c_iflag,
                oflag: t.c_oflag,
                cflag: t.c_cflag,
                lflag: t.c_lflag,
                line: t.c_line,
                cc: t.c_cc.to_vec(),
                ispeed: t.c_ispeed,
                ospeed: t.c_ospeed,
            },
            window: WindowSize { rows: w.ws_row, cols: w.ws_col, xpixel: w.ws_xpixel, ypixel: w.ws_ypixel },
            session: 0,
            foreground: 0,
            input: vec![],
            output: Bytes::default(),
        };
        self.snapshot.ttys.insert(id, tty);
        id
    }
}

fn inode_of(meta: &fs::Metadata, path: &[u8]) -> Inode {
    let time = |sec, nsec: i64| Timestamp { sec, nsec: nsec as u32 };
    Inode {
        ino: meta.ino(),
        generation: 0,
        extents: None,
        doubtful: Vec::new(),
        xattrs: None,
        dev_major: libc::major(meta.dev()),
        dev_minor: libc::minor(meta.dev()),
        fs_type: "ext4".into(),
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
        nlink: meta.nlink() as u32,
        size: meta.size(),
        atime: time(meta.atime(), meta.atime_nsec()),
        mtime: time(meta.mtime(), meta.mtime_nsec()),
        ctime: time(meta.ctime(), meta.ctime_nsec()),
        path: path.into(),
        dirty: false,
        pages: vec![],
        huge_page: None,
        lost_pages: 0,
    }
}

fn vdso_of(smaps: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(smaps).into_owned();
    let line = text.lines().find(|l| l.ends_with("[vdso]")).unwrap();
    u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap()
}

fn pending(tid: Pid, shared: bool) -> Vec<PendingSignal> {
    let mut list = Vec::new();
    loop {
        let mut args = libc::ptrace_peeksiginfo_args {
            off: list.len() as u64,
            flags: if shared { libc::PTRACE_PEEKSIGINFO_SHARED } else { 0 },
            nr: 1,
        };
        let mut info = [0u8; 128];
        if ptrace(libc::PTRACE_PEEKSIGINFO, tid, &raw mut args as u64, info.as_mut_ptr() as u64) == 0 {
            return list;
        }
        let signo = i32::from_ne_bytes(info[..4].try_into().unwrap());
        list.push(PendingSignal { signo, info: info[..48].to_vec() });
    }
}

fn thread(pid: Pid, tid: Pid, alive: bool, vdso: u64) -> Thread {
    let dir = format!("/proc/{pid}/task/{tid}");
    let status = fs::read_to_string(format!("{dir}/status")).unwrap();
    let uid: Vec<u32> = list(field(&status, "Uid"));
    let gid: Vec<u32> = list(field(&status, "Gid"));
    let comm = fs::read_to_string(format!("{dir}/comm")).unwrap();
    let mut thread = Thread {
        tid,
        comm: comm.strip_suffix('\n').unwrap().into(),
        state: if alive { ThreadState::Sleeping } else { ThreadState::Dead },
        on_cpu: None,
        panicked: false,
        regs: Registers::default(),
        syscall: None,
        wchan: None,
        resume: Resume::UserMode,
        fpu: Fpu::Lost,
        credentials: Credentials {
            uid: uid[0],
            euid: uid[1],
            suid: uid[2],
            fsuid: uid[3],
            gid: gid[0],
            egid: gid[1],
            sgid: gid[2],
            fsgid: gid[3],
            groups: list(field(&status, "Groups")),
            capabilities: Capabilities {
                inheritable: hex(&status, "CapInh"),
                permitted: hex(&status, "CapPrm"),
                effective: hex(&status, "CapEff"),
                bounding: hex(&status, "CapBnd"),
                ambient: hex(&status, "CapAmb"),
            },
            securebits: 0,
        },
        blocked: 0,
        pending: vec![],
        altstack: AltStack::default(),
        robust_list: 0,
        clear_child_tid: 0,
        rseq: None,
        scheduling: Scheduling::default(),
        no_new_privs: field(&status, "NoNewPrivs") == "1",
        pdeath_signal: 0,
        timer_slack_ns: 50_000,
        personality: 0,
        seccomp: Seccomp::Off,
    };
    if !alive {
        return thread;
    }
    let mut mask = 0u64;
    ptrace(libc::PTRACE_GETSIGMASK, tid, 8, &raw mut mask as u64);
    thread.blocked = mask;
    thread.pending = pending(tid, false);
    thread.regs = regs(tid);
    let r = &thread.regs;
    if (r.orig_rax as i64) >= 0 {
        let call = SyscallInFlight { nr: r.orig_rax as i64, args: [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] };
        thread.syscall = Some(call);
        thread.resume = match r.rax as i64 {
            -516 => Resume::RestartTimed { call, remaining_ns: -1 },
            -514..=-512 => Resume::Restart,
            _ => Resume::Finished,
        };
    }
    let mut xstate = vec![0u8; 16384];
    let mut iov = libc::iovec { iov_base: xstate.as_mut_ptr().cast(), iov_len: xstate.len() };
    ptrace(libc::PTRACE_GETREGSET, tid, 0x202, &raw mut iov as u64);
    xstate.truncate(iov.iov_len);
    thread.fpu = Fpu::Saved { xstate, source: FpuSource::Memory };
    let mut head = 0u64;
    let mut len = 0u64;
    check(
        unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) },
        "get_robust_list",
    );
    thread.robust_list = head;
    const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
    let mut rseq = [0u8; 24];
    ptrace(GET_RSEQ_CONFIGURATION, tid, 24, rseq.as_mut_ptr() as u64);
    let addr = u64::from_ne_bytes(rseq[..8].try_into().unwrap());
    if addr != 0 {
        let word = |i: usize| u32::from_ne_bytes(rseq[i..i + 4].try_into().unwrap());
        thread.rseq = Some(Rseq { addr, len: word(8), signature: word(12) });
    }
    // Calls made in the thread look to the kernel as if it had left its restartable sequence.
    let section = thread.rseq.map(|r| (r.addr + 8, read_memory(tid, r.addr + 8, 8)));
    let (_, stack) = remote_call(tid, vdso, libc::SYS_sigaltstack, |buf| [0, buf, 0, 0]);
    let w = words(&stack);
    const SS_DISABLE: u32 = 2;
    if w[1] as u32 & SS_DISABLE == 0 {
        thread.altstack = AltStack { sp: w[0], flags: w[1] as u32, size: w[2] };
    }
    const PR_GET_TID_ADDRESS: u64 = 40;
    let (_, address) = remote_call(tid, vdso, libc::SYS_prctl, |buf| [PR_GET_TID_ADDRESS, buf, 0, 0]);
    thread.clear_child_tid = words(&address)[0];
    let (_, signal) =
        remote_call(tid, vdso, libc::SYS_prctl, |buf| [libc::PR_GET_PDEATHSIG as u64, buf, 0, 0]);
    thread.pdeath_signal = words(&signal)[0] as i32;
    if let Some((addr, bytes)) = section {
        let memory = fs::OpenOptions::new().write(true).open(format!("/proc/{tid}/mem")).unwrap();
        memory.write_all_at(&bytes, addr).unwrap();
    }
    thread.scheduling.nice = stat_fields(&format!("{dir}/stat"))[19].parse().unwrap();
    thread
}
