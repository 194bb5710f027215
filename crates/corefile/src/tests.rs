use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;

use object::LittleEndian as LE;
use object::elf::{
    FileHeader64, NT_AUXV, NT_FILE, NT_PRFPREG, NT_PRPSINFO, NT_PRSTATUS, NT_SIGINFO, NT_X86_XSTATE, PF_R,
    PF_W, PT_LOAD, ProgramHeader64,
};
use object::read::elf::{FileHeader, ProgramHeader};
use snapshot::{
    AddressSpace, AddressSpaceId, AltStack, Credentials, FileId, FileKind, FpuSource, Inode, InodeId,
    MmLayout, OpenFile, PageRun, PhysMap, PhysRange, ProcessState, Prot, Registers, Scheduling, Seccomp,
    SwapArea, Thread, ThreadState, Vma, VmaFlags, VmaKind,
};

use super::*;

const PAGE: usize = PAGE_SIZE as usize;
const FRAMES: u64 = 64;

/// Frames 16 to 63; each is full of its number, but for 20, which is zero.
struct Mem([PhysRange; 1]);

impl PhysMem for Mem {
    fn ranges(&self) -> &[PhysRange] {
        &self.0
    }
    fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
        let range = self.0[0];
        if addr < range.start || addr + len as u64 > range.start + range.len {
            return Err(PhysMemError::NotPresent { addr, len: len as u64 });
        }
        // Whole pages, and parts of one.
        let frame = |at: u64| if at / PAGE_SIZE == 20 { 0 } else { (at / PAGE_SIZE) as u8 };
        let mut bytes = vec![frame(addr); len];
        let from = (addr.next_multiple_of(PAGE_SIZE) - addr) as usize;
        let pages = bytes.get_mut(from..).unwrap_or_default().chunks_mut(PAGE);
        pages.enumerate().for_each(|(n, page)| page.fill(frame(addr + (from + n * PAGE) as u64)));
        Ok(PhysMap::owned(bytes, 0..len).unwrap())
    }
}

fn mem() -> Mem {
    Mem([PhysRange { start: 16 * PAGE_SIZE, len: (FRAMES - 16) * PAGE_SIZE }])
}

fn vma(start: u64, pages: u64, kind: VmaKind, own: &[(u64, u64, u32)]) -> Vma {
    Vma {
        start,
        end: start + pages * PAGE_SIZE,
        prot: Prot::READ | Prot::WRITE,
        shared: false,
        flags: VmaFlags::empty(),
        kind,
        name: None,
        pages: own
            .iter()
            .map(|&(n, pfn, count)| PageRun { addr: start + n * PAGE_SIZE, pfn, count })
            .collect(),
        lost_pages: 0,
    }
}

fn thread(tid: Pid) -> Thread {
    let regs = Registers {
        rip: 0x40_0000 + tid as u64,
        rax: -38_i64 as u64,
        orig_rax: 7,
        cs: 0x33,
        ..Registers::default()
    };
    let xstate: Vec<u8> = (0..832).map(|n| (n / 64) as u8 + tid as u8).collect();
    Thread {
        tid,
        comm: "program".into(),
        state: ThreadState::Sleeping,
        on_cpu: None,
        panicked: false,
        regs,
        syscall: None,
        wchan: None,
        resume: Resume::UserMode,
        fpu: Fpu::Saved { xstate, source: FpuSource::Memory },
        credentials: Credentials { uid: 1000, ..Credentials::default() },
        blocked: 0x10,
        pending: Vec::new(),
        altstack: AltStack::default(),
        robust_list: 0,
        clear_child_tid: 0,
        rseq: None,
        scheduling: Scheduling { nice: -5, ..Scheduling::default() },
        no_new_privs: false,
        pdeath_signal: 0,
        timer_slack_ns: 50_000,
        personality: 0,
        seccomp: Seccomp::Off,
    }
}

fn process(threads: &[Pid]) -> Process {
    Process {
        ppid: 1,
        pgid: 3,
        sid: 2,
        threads: threads.iter().map(|tid| thread(*tid)).collect(),
        address_space: Some(AddressSpaceId(1)),
        ..Process::new(threads[0], "program".into())
    }
}

fn snapshot(vmas: Vec<Vma>) -> Snapshot {
    let layout = MmLayout { auxv: vec![6, 4096, 0, 0], ..MmLayout::default() };
    let space = AddressSpace { vmas, layout, ..AddressSpace::default() };
    Snapshot { address_spaces: [(AddressSpaceId(1), space)].into(), ..Snapshot::default() }
}

/// `pages`: index in the file, frame, count.
fn with_file(
    snapshot: &mut Snapshot,
    fs: &str,
    deleted: bool,
    size: u64,
    pages: &[(u64, u64, u32)],
) -> VmaKind {
    let runs: Vec<_> = pages
        .iter()
        .map(|(index, pfn, count)| serde_json::json!({"index": index, "pfn": pfn, "count": count, "dirty": false}))
        .collect();
    let time = serde_json::json!({"sec": 0, "nsec": 0});
    let inode: Inode = serde_json::from_value(serde_json::json!({
        "ino": 0, "dev_major": 8, "dev_minor": 1, "fs_type": fs, "mode": 0, "uid": 1, "gid": 2, "nlink": 1,
        "size": size, "atime": time, "mtime": time, "ctime": time, "path": "", "dirty": true, "lost_pages": 0,
        "pages": runs,
    }))
    .unwrap();
    let open = OpenFile {
        kind: FileKind::Regular,
        path: "/usr/lib/a".into(),
        deleted,
        mount_namespace: None,
        flags: 0,
        pos: 0,
        inode: InodeId(5),
        owner_pid: 0,
        owner_is_thread: false,
        owner_signal: 0,
        count: 1,
    };
    snapshot.inodes.insert(InodeId(5), inode);
    snapshot.files.insert(FileId(4), open);
    VmaKind::File { file: FileId(4), offset: 2 * PAGE_SIZE }
}

/// A core file, read back.
struct Read {
    bytes: Vec<u8>,
    summary: Summary,
    blocks: u64,
}

impl Read {
    fn of(snapshot: &Snapshot, process: &Process) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let core = Core::new(snapshot, process, &mem()).unwrap();
        core.write(&mem(), file.as_file()).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes.len() as u64, core.summary().bytes);
        Self { bytes, summary: core.summary().clone(), blocks: file.as_file().metadata().unwrap().blocks() }
    }

    fn segments(&self) -> &[ProgramHeader64<LE>] {
        let header = FileHeader64::<LE>::parse(&*self.bytes).unwrap();
        assert!(header.is_little_endian() && header.e_type.get(LE) == object::elf::ET_CORE);
        header.program_headers(LE, &*self.bytes).unwrap()
    }

    /// Start, size, size in the file of each PT_LOAD, sizes in pages.
    fn loads(&self) -> Vec<(u64, u64, u64)> {
        let loads = self.segments().iter().filter(|s| s.p_type(LE) == PT_LOAD);
        loads.map(|s| (s.p_vaddr(LE), s.p_memsz(LE) / PAGE_SIZE, s.p_filesz(LE) / PAGE_SIZE)).collect()
    }

    /// The first byte of each page from an address on that has contents.
    fn pages(&self, start: u64) -> Vec<u8> {
        let segment =
            self.segments().iter().find(|s| s.p_type(LE) == PT_LOAD && s.p_vaddr(LE) == start).unwrap();
        let data = segment.data(LE, &*self.bytes).unwrap();
        assert!(data.chunks(PAGE).all(|page| page.iter().all(|byte| *byte == page[0])));
        data.chunks(PAGE).map(|page| page[0]).collect()
    }

    fn notes(&self) -> Vec<(u32, Vec<u8>)> {
        let note = self.segments().iter().find_map(|s| s.notes(LE, &*self.bytes).unwrap()).unwrap();
        let mut notes = note;
        let mut all = Vec::new();
        while let Some(note) = notes.next().unwrap() {
            let name: &[u8] = if note.n_type(LE) == NT_X86_XSTATE { b"LINUX" } else { b"CORE" };
            assert_eq!(note.name(), name);
            all.push((note.n_type(LE), note.desc().to_vec()));
        }
        all
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
}

fn int(bytes: &[u8], at: usize) -> i32 {
    i32::from_le_bytes(*bytes[at..].first_chunk().unwrap())
}

#[test]
fn anonymous_memory_is_there_with_its_holes() {
    let own = [(1, 17, 2), (5, 40, 1), (6, 20, 1)];
    let read = Read::of(&snapshot(vec![vma(0x1_0000, 8, VmaKind::Anonymous, &own)]), &process(&[7]));
    assert_eq!(read.loads(), [(0x1_0000, 8, 8)]);
    assert_eq!(read.pages(0x1_0000), [0, 17, 18, 0, 0, 40, 0, 0]);
    assert_eq!((read.summary.pages, read.summary.file_pages, read.summary.is_complete()), (4, 0, true));
    let flags = read.segments().last().unwrap().p_flags(LE);
    assert_eq!(flags, PF_R | PF_W);
    assert!(read.blocks * 512 <= 5 * PAGE_SIZE, "pages of zeroes take no room: {}", read.blocks);
}

#[test]
fn big_holes_have_no_contents() {
    let pages = BIG_HOLE / PAGE_SIZE;
    let own = [(0, 17, 1), (pages + 1, 18, 1)];
    let read = Read::of(&snapshot(vec![vma(0x1_0000, pages + 3, VmaKind::Anonymous, &own)]), &process(&[7]));
    let second = 0x1_0000 + PAGE_SIZE + BIG_HOLE;
    assert_eq!(read.loads(), [(0x1_0000, 1, 1), (0x1_1000, pages, 0), (second, 2, 2)]);
    assert_eq!(read.pages(second), [18, 0]);
}

#[test]
fn what_files_have_is_left_to_them_and_ends_with_them() {
    // Pages 2 to 9 of a file of 8; page 3 was written to, 4 and 6 are in the page cache.
    let mut snapshot = snapshot(vec![]);
    let kind = with_file(
        &mut snapshot,
        "ext4",
        false,
        7 * PAGE_SIZE + 1,
        &[(0, 30, 1), (4, 34, 1), (6, 36, 1), (9, 39, 1)],
    );
    let id = AddressSpaceId(1);
    snapshot.address_spaces.get_mut(&id).unwrap().vmas = vec![vma(0x1_0000, 8, kind.clone(), &[(1, 50, 1)])];
    let read = Read::of(&snapshot, &process(&[7]));
    let expected = [(0x1_0000, 1, 0), (0x1_1000, 2, 2), (0x1_3000, 1, 0), (0x1_4000, 1, 1), (0x1_5000, 1, 0)];
    // Page 9 lies behind the end, although the page cache has it.
    assert_eq!(read.loads()[..5], expected);
    assert_eq!((read.pages(0x1_1000), read.pages(0x1_4000)), (vec![50, 34], vec![36]));
    assert_eq!((read.summary.pages, read.summary.file_pages, read.summary.is_complete()), (4, 3, true));
    let notes: HashMap<_, _> = read.notes().into_iter().collect();
    let files = &notes[&NT_FILE];
    assert_eq!([0, 8, 16, 24, 32].map(|at| word(files, at)), [1, 4096, 0x1_0000, 0x1_8000, 2]);
    assert_eq!(&files[40..], b"/usr/lib/a\0");

    // Of a file in memory, there is no more than that.
    with_file(&mut snapshot, "tmpfs", true, 7 * PAGE_SIZE + 1, &[(4, 34, 1)]);
    let read = Read::of(&snapshot, &process(&[7]));
    assert_eq!(read.loads(), [(0x1_0000, 6, 6)]);
    assert_eq!(read.pages(0x1_0000), [0, 50, 34, 0, 0, 0]);

    // What was on the disk only goes with a file that is deleted.
    with_file(&mut snapshot, "ext4", true, 7 * PAGE_SIZE + 1, &[(4, 34, 1)]);
    let read = Read::of(&snapshot, &process(&[7]));
    assert_eq!(read.loads(), [(0x1_1000, 2, 2)]);
    assert_eq!(read.summary.missing_pages(), 4);
    assert!(
        read.summary.missing.iter().all(|part| part.why.contains("deleted")),
        "{:?}",
        read.summary.missing
    );
}

#[test]
fn what_is_missing_is_no_memory() {
    // Frames outside the dump, a slot of an area that cannot be read, and one of an unknown area.
    let own = [(0, 62, 4), (4, SwapArea::frame(1, 9), 1), (6, SwapArea::frame(2, 9), 1)];
    let mut snapshot = snapshot(vec![vma(0x1_0000, 8, VmaKind::Anonymous, &own)]);
    snapshot.swap_areas = vec![SwapArea {
        index: 1,
        path: "/dev/sdb".into(),
        is_device: true,
        dev_major: 8,
        dev_minor: 16,
        slots: 100,
        extents: Vec::new(),
        flags: 0,
        zram: None,
        unsupported: Some("not here".into()),
    }];
    let read = Read::of(&snapshot, &process(&[7]));
    assert_eq!(read.loads(), [(0x1_0000, 2, 2), (0x1_5000, 1, 1), (0x1_7000, 1, 1)]);
    let missing: Vec<_> =
        read.summary.missing.iter().map(|part| (part.start, part.end, part.why.as_str())).collect();
    assert_eq!(missing[0], (0x1_2000, 0x1_4000, "its page frame is not in the dump"));
    assert_eq!(missing[1], (0x1_4000, 0x1_5000, "in the swap area /dev/sdb: not here"));
    assert!(missing[2].2.contains("swap area 2"));
    assert!(!read.summary.is_complete());

    // Which pages are lost is not known: then holes are not zeroes.
    snapshot.address_spaces.get_mut(&AddressSpaceId(1)).unwrap().vmas =
        vec![Vma { lost_pages: 1, ..vma(0x1_0000, 4, VmaKind::Anonymous, &[(1, 17, 1)]) }];
    let read = Read::of(&snapshot, &process(&[7]));
    assert_eq!(read.loads(), [(0x1_1000, 1, 1)]);
    assert_eq!(read.summary.missing_pages(), 3);
}

#[test]
fn notes_have_what_the_threads_had() {
    let mut process = process(&[7, 8, 9]);
    process.threads[1].fpu = Fpu::Lost;
    process.threads[2].state = ThreadState::Dead;
    let mut info = vec![11, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0];
    info.resize(48, 0xee);
    process.threads[1].pending = vec![snapshot::PendingSignal { signo: 11, info }];
    let read = Read::of(&snapshot(vec![vma(0x1_0000, 1, VmaKind::Anonymous, &[])]), &process);
    assert_eq!(read.summary.threads, 2);
    assert!(read.summary.doubts.iter().any(|doubt| doubt.contains("thread 8")), "{:?}", read.summary.doubts);
    let notes = read.notes();
    let kinds: Vec<u32> = notes.iter().map(|(kind, _)| *kind).collect();
    let first = [NT_PRSTATUS, NT_PRPSINFO, NT_AUXV, NT_FILE, NT_PRFPREG, NT_X86_XSTATE];
    assert_eq!(kinds, [first.as_slice(), &[NT_PRSTATUS, NT_SIGINFO]].concat());
    let (status, second) = (&notes[0].1, &notes[6].1);
    assert_eq!((status.len(), notes[1].1.len(), notes[4].1.len(), notes[5].1.len()), (336, 136, 512, 832));
    // pr_pid and so on, pr_sighold, pr_reg, pr_fpvalid.
    assert_eq!([32, 36, 40, 44].map(|at| int(status, at)), [7, 1, 3, 2]);
    assert_eq!(word(status, 24), 0x10);
    let regs = |bytes: &[u8], n: usize| word(bytes, 112 + 8 * n);
    assert_eq!((regs(status, 16), regs(status, 10) as i64, regs(status, 15)), (0x40_0007, -38, 7));
    assert_eq!((int(status, 328), int(second, 328)), (1, 0));
    // si_signo, si_code, si_errno, pr_cursig, pr_sigpend.
    assert_eq!([0, 4, 8, 12].map(|at| int(second, at)), [11, 1, 5, 11]);
    assert_eq!((word(second, 16), int(second, 32)), (1 << 10, 8));
    assert_eq!(int(status, 12), 0, "nothing has happened to the first thread");
    let info = &notes[1].1;
    assert_eq!(&info[..4], &[1, b'S', 0, -5_i8 as u8]);
    assert_eq!([16, 24].map(|at| int(info, at)), [1000, 7]);
    assert_eq!(&info[40..48], b"program\0");
}

#[test]
fn more_segments_than_the_header_can_count_are_counted_elsewhere() {
    // Every second page of a file is in memory.
    let mut snapshot = snapshot(vec![]);
    let count = 70_000_u64;
    let pages: Vec<_> = (0..count).filter(|n| n % 2 == 0).map(|n| (n, 17, 1)).collect();
    let VmaKind::File { file, .. } = with_file(&mut snapshot, "ext4", false, count * PAGE_SIZE, &pages)
    else {
        return;
    };
    let kind = VmaKind::File { file, offset: 0 };
    snapshot.address_spaces.get_mut(&AddressSpaceId(1)).unwrap().vmas = vec![vma(0x1_0000, count, kind, &[])];
    let read = Read::of(&snapshot, &process(&[7]));
    assert_eq!(read.loads().len() as u64, count);
    assert_eq!(read.loads()[69_999], (0x1_0000 + 69_999 * PAGE_SIZE, 1, 0));
}

#[test]
fn arguments_come_from_its_memory() {
    let mut snapshot = snapshot(vec![vma(0x1_0000, 2, VmaKind::Anonymous, &[(0, 65, 1), (1, 48, 1)])]);
    let layout = &mut snapshot.address_spaces.get_mut(&AddressSpaceId(1)).unwrap().layout;
    (layout.arg_start, layout.arg_end) = (0x1_0ffe, 0x1_1002);
    // Frame 65 is outside.
    let read = Read::of(&snapshot, &process(&[7]));
    assert!(read.notes()[1].1[56..].iter().all(|byte| *byte == 0));
    snapshot.address_spaces.get_mut(&AddressSpaceId(1)).unwrap().vmas[0].pages[0].pfn = 49;
    let read = Read::of(&snapshot, &process(&[7]));
    assert_eq!(&read.notes()[1].1[56..61], b"1100\0");
}

#[test]
fn who_has_no_memory_has_no_core() {
    let gone = Process { address_space: None, state: ProcessState::Zombie { status: 0 }, ..process(&[7]) };
    let error = Core::new(&snapshot(vec![]), &gone, &mem()).err().unwrap();
    assert!(error.to_string().contains("zombie"), "{error}");
    assert!(Core::new(&snapshot(vec![]), &process(&[7]), &mem()).is_err(), "no mappings");
}
