//! execve(2) in flight: the old program was gone and the new one not complete, so the call is issued once more.
//!
//! It needs an address space to be issued from. That is made up here: one mapping with a system call instruction, the strings and the
//! arrays of pointers to them, besides the vDSO that every process is rebuilt through. The call replaces it all.

use snapshot::{
    AddressSpace, Exec, MmLayout, PAGE_SIZE, Prot, Registers, Resume, Snapshot, Vma, VmaFlags, VmaKind,
};

use crate::memory::Specials;

/// Where the mapping lies: above what may not be mapped, below everything that the kernel places.
const START: u64 = 0x1000_0000;
/// syscall; hlt. Should the call fail against expectation, the process dies of SIGSEGV: the kernel, too, kills it then.
const CODE: [u8; 3] = [0x0f, 0x05, 0xf4];
/// Length of the `syscall` instruction.
const INSTRUCTION: u64 = 2;

/// Gives processes that were executing a program an address space to do it from.
pub(crate) fn insert_stand_ins(snapshot: &mut Snapshot, specials: &Specials) {
    for process in &snapshot.processes {
        let executing = process.threads.iter().find_map(|t| match &t.resume {
            Resume::Exec(exec) => Some(exec),
            _ => None,
        });
        let space = process.address_space.and_then(|id| snapshot.address_spaces.get_mut(&id));
        if let (Some(exec), Some(space)) = (executing, space) {
            let known = std::mem::take(space);
            *space = AddressSpace { exe: known.exe, dumpable: known.dumpable, ..stand_in(exec, specials) };
        }
    }
}

fn stand_in(exec: &Exec, specials: &Specials) -> AddressSpace {
    let end = START + (image(exec).bytes.len() as u64).next_multiple_of(PAGE_SIZE);
    let vma = |start, end, prot, kind| Vma {
        start,
        end,
        prot,
        shared: false,
        flags: VmaFlags::ACCOUNT | VmaFlags::MAYREAD | VmaFlags::MAYWRITE | VmaFlags::MAYEXEC,
        kind,
        name: None,
        pages: Vec::new(),
        lost_pages: 0,
    };
    let mut vmas = vec![vma(START, end, Prot::all(), VmaKind::Anonymous)];
    vmas.extend(specials.iter().map(|(name, start, end)| {
        let prot = if name.as_bytes() == b"[vdso]" { Prot::READ | Prot::EXEC } else { Prot::READ };
        let special = vma(start, end, prot, VmaKind::Special { name: name.clone() });
        Vma { flags: VmaFlags::empty(), ..special }
    }));
    vmas.sort_by_key(|vma| vma.start);
    AddressSpace {
        vmas,
        aio: Vec::new(),
        layout: MmLayout {
            start_code: START,
            end_code: end,
            start_data: START,
            end_data: end,
            start_brk: end,
            brk: end,
            start_stack: START,
            arg_start: START,
            arg_end: START,
            env_start: START,
            env_end: START,
            auxv: vec![0, 0],
        },
        ..AddressSpace::default()
    }
}

/// What lies at [`START`], and where in it the call's arguments are.
struct Image {
    bytes: Vec<u8>,
    filename: u64,
    argv: u64,
    envp: u64,
}

fn image(exec: &Exec) -> Image {
    let mut bytes = CODE.to_vec();
    let mut put = |string: &[u8]| {
        let addr = START + bytes.len() as u64;
        bytes.extend_from_slice(string);
        bytes.push(0);
        addr
    };
    let filename = put(exec.filename.as_bytes());
    let argv: Vec<u64> = exec.argv.iter().map(|s| put(s.as_bytes())).collect();
    let envp: Vec<u64> = exec.envp.iter().map(|s| put(s.as_bytes())).collect();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let mut put = |pointers: &[u64]| {
        let addr = START + bytes.len() as u64;
        bytes.extend(pointers.iter().chain(&[0]).flat_map(|word| word.to_ne_bytes()));
        addr
    };
    let (argv, envp) = (put(&argv), put(&envp));
    Image { bytes, filename, argv, envp }
}

/// Registers behind the call, for the kernel to go back to the instruction and issue it; and what has to be stored where.
pub(crate) fn continuation(exec: &Exec, regs: &Registers) -> (Registers, (u64, Vec<u8>)) {
    let image = image(exec);
    let regs = Registers {
        rip: START + INSTRUCTION,
        rsp: START,
        rdi: image.filename,
        rsi: image.argv,
        rdx: image.envp,
        orig_rax: libc::SYS_execve as u64,
        cs: regs.cs,
        ss: regs.ss,
        eflags: regs.eflags,
        ..Registers::default()
    };
    (regs, (START, image.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_pointers_lie_where_the_registers_say() {
        let exec = Exec {
            filename: "/bin/echo".into(),
            argv: vec!["echo".into(), "".into(), "x".into()],
            envp: vec!["A=1".into()],
            ..Exec::default()
        };
        let (regs, (start, bytes)) = continuation(&exec, &Registers { cs: 0x33, ..Registers::default() });
        let at = |addr: u64| &bytes[(addr - start) as usize..];
        let word = |addr| u64::from_ne_bytes(*at(addr).first_chunk().unwrap());
        let string = |addr| at(addr).split(|b| *b == 0).next().unwrap();
        assert_eq!(at(regs.rip - INSTRUCTION)[..2], CODE[..2]);
        assert_eq!(string(regs.rdi), b"/bin/echo");
        let argv: Vec<_> = (0..4).map(|i| word(regs.rsi + 8 * i)).collect();
        assert_eq!([string(argv[0]), string(argv[1]), string(argv[2])], [&b"echo"[..], b"", b"x"]);
        assert_eq!((argv[3], string(word(regs.rdx)), word(regs.rdx + 8)), (0, &b"A=1"[..], 0));
        assert_eq!(regs.cs, 0x33);
        let space = stand_in(&exec, &Specials::default());
        assert!(space.vmas[0].start <= start && space.vmas[0].end >= start + bytes.len() as u64);
        assert_eq!(regs.rsi % 8, 0);
    }
}
