//! execve(2) in flight: the program that was being loaded.
//!
//! Up to begin_new_exec() (fs/exec.c) the old program is whole. From there on it is taken apart, and the new one is not
//! complete before the call is done. But what was asked for is still there: `struct linux_binprm`, and on the new program's stack
//! the strings (arguments, environment, path, in this order), so that it can be asked for once more.

use ktypes::{Kernel, KernelType};
use snapshot::{Bytes, Exec, FileId};

use super::iov_iter::Stack;

/// PATH_MAX.
const MAX_PATH: usize = 4096;
/// Arguments and environment: three quarters of the usual stack limit at most (bprm_stack_limits(), fs/exec.c).
const MAX_STRINGS: usize = 6 << 20;
const MAX_COUNT: i32 = 1 << 20;

/// `struct linux_binprm` (include/linux/binfmts.h, 6.1 and 6.12).
#[derive(KernelType)]
#[kernel("linux_binprm")]
pub(super) struct Binprm {
    vma: u64,
    mm: u64,
    p: u64,
    pub(super) point_of_no_return: bool,
    file: u64,
    argc: i32,
    envc: i32,
    filename: u64,
    interp: u64,
    fdpath: u64,
    exec: u64,
    interp_flags: u32,
}

/// The new program's stack.
#[derive(KernelType)]
#[kernel("vm_area_struct")]
struct Vma {
    vm_end: u64,
}

#[derive(KernelType)]
#[kernel("mm_struct")]
struct Mm {
    pgd: u64,
    arg_start: u64,
    exe_file: u64,
}

/// The one on a thread's stack. `None` if there is none that makes sense, or more than one.
pub(super) fn binprm(kernel: &Kernel, stack: Stack<'_>) -> Option<Binprm> {
    let mut addresses: Vec<u64> =
        stack.words.iter().copied().filter(|word| word >> 63 != 0 && word.is_multiple_of(8)).collect();
    addresses.sort_unstable();
    addresses.dedup();
    let mut found = addresses.into_iter().filter_map(|addr| binprm_at(kernel, addr));
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

fn binprm_at(kernel: &Kernel, addr: u64) -> Option<Binprm> {
    // What has been freed does not keep its file (free_bprm()).
    kernel.slab_cache_of(addr).filter(|slab| slab.starts_at(addr))?;
    let bprm: Binprm = kernel.read(addr).ok()?;
    let counts = [bprm.argc, bprm.envc].iter().all(|count| (0..=MAX_COUNT).contains(count));
    let file = kernel.slab_cache_of(bprm.file)?;
    let sane = counts && file.cache_name == "filp" && file.starts_at(bprm.file);
    (sane && path(kernel, bprm.filename).is_some() && path(kernel, bprm.interp).is_some()).then_some(bprm)
}

fn path(kernel: &Kernel, addr: u64) -> Option<Vec<u8>> {
    let path = kernel.read_cstr(addr, MAX_PATH).ok()?;
    (!path.is_empty()).then_some(path)
}

/// What the call had been given, from the stack that the new program would have begun with. `mm`: the thread's address space.
pub(super) fn program(kernel: &Kernel, bprm: &Binprm, mm: u64) -> Result<Exec, &'static str> {
    if bprm.fdpath != 0 || bprm.interp_flags != 0 {
        return Err("the program was given as a descriptor, or is run by another");
    }
    // Not the thread's yet, or handed over.
    let mm = if bprm.mm != 0 { bprm.mm } else { mm };
    let unreadable = "its arguments cannot be read";
    let space: Mm = kernel.read(mm).map_err(|_| unreadable)?;
    if space.exe_file != bprm.file && space.exe_file != 0 {
        return Err("what is on the kernel's stack is of another call");
    }
    // From setup_arg_pages() on, `p` goes further down.
    let start = if space.arg_start != 0 { space.arg_start } else { bprm.p };
    let filename = path(kernel, bprm.filename).ok_or(unreadable)?;
    let stack: Vma = kernel.read(bprm.vma).map_err(|_| unreadable)?;
    let still = still_to_move(stack.vm_end, bprm.exec, filename.len(), start).ok_or(unreadable)?;
    let tables = kernel.page_tables(space.pgd).map_err(|_| unreadable)?;
    let read = |addr: u64, buf: &mut [u8]| {
        let phys = tables.translate(addr).or_else(|_| tables.translate(addr.wrapping_add(still))).ok()?;
        kernel.vmcore().read_phys(phys, buf).ok()
    };
    let count = (bprm.argc + bprm.envc) as usize + 1;
    let mut strings = strings(start, count, read).ok_or(unreadable)?;
    let interp = path(kernel, bprm.interp).ok_or(unreadable)?;
    if strings.pop().as_deref() != Some(filename.as_slice()) {
        return Err("its arguments are not where they should be");
    }
    let environment = strings.split_off(bprm.argc as usize);
    let arguments = if filename == interp {
        strings
    } else {
        // load_script() has put the interpreter, its option and the script's path in place of the first argument, which no
        // script ever sees.
        let script = strings.iter().skip(1).position(|s| *s == filename).ok_or("its script is not named")?;
        strings.split_off(script + 1)
    };
    let bytes = |strings: Vec<Vec<u8>>| strings.into_iter().map(Bytes).collect();
    Ok(Exec {
        filename: Bytes(filename),
        file: FileId(bprm.file),
        argv: bytes(arguments),
        envp: bytes(environment),
    })
}

/// How far down the stack's pages, or some of them, have still to be moved: shift_arg_pages() (6.1), relocate_vma_down() (6.12), whose callers
/// have changed all addresses before. The path lies at the stack's very end, below one word (__bprm_mm_init()); its address, `exec`, says
/// where that end is to be, and `end` is where it is. `None` if the places overlap: which page is which could not be told.
fn still_to_move(end: u64, exec: u64, path_len: usize, start: u64) -> Option<u64> {
    let new_end = exec.checked_add(path_len as u64 + 1 + size_of::<u64>() as u64)?;
    let distance = end.checked_sub(new_end)?;
    let is_whole = distance.is_multiple_of(vmcore::PAGE_SIZE);
    let overlap =
        distance != 0 && distance < new_end.saturating_sub(start).next_multiple_of(vmcore::PAGE_SIZE);
    (is_whole && !overlap).then_some(distance)
}

/// `count` strings one behind the other from `start` on; `read` does not cross pages.
fn strings(start: u64, count: usize, read: impl Fn(u64, &mut [u8]) -> Option<()>) -> Option<Vec<Vec<u8>>> {
    let mut strings = Vec::new();
    let mut current = Vec::new();
    let mut addr = start;
    let mut page = [0; vmcore::PAGE_SIZE as usize];
    while addr.wrapping_sub(start) < MAX_STRINGS as u64 {
        let len = vmcore::PAGE_SIZE - addr % vmcore::PAGE_SIZE;
        let part = page.get_mut(..len as usize)?;
        read(addr, part)?;
        for byte in part {
            match *byte {
                0 => strings.push(std::mem::take(&mut current)),
                byte => current.push(byte),
            }
            if strings.len() == count {
                return Some(strings);
            }
        }
        addr = addr.checked_add(len)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_read_across_pages_and_to_the_last() {
        let memory = |start: u64, text: &'static [u8]| {
            move |addr: u64, buf: &mut [u8]| {
                let from = usize::try_from(addr.checked_sub(start)?).ok()?;
                for (i, byte) in buf.iter_mut().enumerate() {
                    *byte = text.get(from + i).copied().unwrap_or(0xff);
                }
                Some(())
            }
        };
        let text = b"sh\0-c\0\0HOME=/\0/bin/sh\0";
        let expected: Vec<Vec<u8>> = [&b"sh"[..], b"-c", b"", b"HOME=/", b"/bin/sh"].map(Vec::from).to_vec();
        for start in [0x7000, 0x7ffd, 0x7fff] {
            assert_eq!(strings(start, 5, memory(start, text)).as_ref(), Some(&expected), "{start:#x}");
        }
        assert_eq!(strings(0x7000, 6, memory(0x7000, text)), None, "it ends");
        assert_eq!(strings(0x7000, 1, |_, _| None), None);
    }

    #[test]
    fn a_stack_that_is_being_moved_is_found_where_it_was() {
        let (end, path) = (0x7fff_f000_u64, b"/bin/sh");
        let exec = |end: u64| end - 8 - 8;
        assert_eq!(still_to_move(end, exec(end), path.len(), end - 0x1800), Some(0), "in its place");
        let new = end - 0x10_0000;
        assert_eq!(still_to_move(end, exec(new), path.len(), new - 0x1800), Some(0x10_0000));
        let near = end - 0x1000;
        assert_eq!(still_to_move(end, exec(near), path.len(), near - 0x1800), None, "they overlap");
        assert_eq!(still_to_move(end, exec(new) + 1, path.len(), new - 0x1800), None, "no whole pages");
        assert_eq!(still_to_move(new, exec(end), path.len(), end - 0x1800), None, "upwards");
    }
}
