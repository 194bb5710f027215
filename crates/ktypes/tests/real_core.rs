//! Against cores of real machines: `OTHERWORLD_CORE=path[:path…] cargo test -p ktypes --test real_core`.
//!
//! Without the variable these tests do nothing: cores are large, and made by the lab.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use ktypes::vmcore::{EntryKind, Vmcore};
use ktypes::{Kernel, KernelType};

#[derive(KernelType)]
#[kernel("task_struct")]
struct Task {
    pid: i32,
    tgid: i32,
    comm: [u8; 16],
    mm: u64,
    stack: u64,
    #[kernel("tasks", address)]
    tasks: u64,
    #[kernel("thread.fsbase")]
    fsbase: u64,
    #[kernel("no_such_member", optional)]
    nowhere: Option<u32>,
}

#[derive(KernelType)]
#[kernel("mm_struct")]
struct Mm {
    pgd: u64,
    map_count: i32,
    #[kernel("mm_mt", address)]
    mm_mt: u64,
    start_code: u64,
    end_code: u64,
}

#[derive(KernelType)]
#[kernel("vm_area_struct")]
struct Vma {
    vm_start: u64,
    vm_end: u64,
    vm_mm: u64,
    vm_file: u64,
}

fn each_core(test: impl Fn(&Kernel)) {
    let Some(cores) = std::env::var_os("OTHERWORLD_CORE") else {
        eprintln!("OTHERWORLD_CORE is not set: nothing tested");
        return;
    };
    for path in std::env::split_paths(&cores) {
        let start = Instant::now();
        let core = Vmcore::open(&path).unwrap();
        let opened = start.elapsed();
        let kernel = Kernel::open(core).unwrap();
        println!(
            "{}: Linux {}, core {opened:?}, kernel {:?}, {} symbols, {:?}",
            path.display(),
            kernel.release(),
            start.elapsed() - opened,
            kernel.symbol_count(),
            kernel.btf(),
        );
        test(&kernel);
    }
}

fn tasks(kernel: &Kernel) -> Vec<Task> {
    let init: Task = kernel.read(kernel.symbol("init_task").unwrap()).unwrap();
    kernel
        .list_head(init.tasks, 100_000)
        .map(|node| {
            let addr = kernel.container_of::<Task>(node.unwrap(), "tasks").unwrap();
            let object = kernel.slab_cache_of(addr).expect("a task lies in a slab");
            assert_eq!(object.cache_name, "task_struct");
            assert!(object.starts_at(addr), "{object:x?} {addr:x}");
            assert!(object.object_size >= kernel.size_of("task_struct").unwrap() - 4096);
            assert!(!kernel.slab_cache_of(addr + 8).unwrap().starts_at(addr + 8));
            kernel.read(addr).unwrap()
        })
        .collect()
}

#[test]
fn names_and_addresses_agree() {
    each_core(|kernel| {
        let info = kernel.info();
        println!("phys_base {:#x}", info.number("phys_base").unwrap());
        for name in ["init_uts_ns", "_stext", "init_top_pgt"] {
            assert_eq!(kernel.symbol(name).unwrap(), info.symbol(name).unwrap(), "{name}");
        }
        let panic = kernel.symbol("panic").unwrap();
        assert_eq!(kernel.symbol_at(panic), Some("panic"));
        assert_eq!(kernel.symbolize(panic + 5), Some(("panic", 5)));
        assert_eq!(kernel.symbol_at(panic + 5), None);
        assert!(kernel.symbols_at(panic).contains(&"panic"));
        assert!(kernel.symbol("no_such_symbol").is_err());
        // Every CPU's instruction pointer lies in a function of the kernel's, or in user mode.
        for status in kernel.vmcore().prstatus() {
            let ip = status.regs[ktypes::vmcore::PrStatus::RIP];
            let place = kernel.symbolize(ip);
            println!("CPU {}: pid {} in {place:x?}", status.cpu, status.pid);
            assert!(place.is_some() || ip >> 63 == 0, "{ip:#x}");
        }
        assert_eq!(kernel.offset_of("page", "flags").unwrap(), info.offset("page.flags").unwrap());
        assert_eq!(kernel.size_of("page").unwrap(), info.size("page").unwrap());
        assert_eq!(kernel.size_of("zone").unwrap(), info.size("zone").unwrap());
        assert_eq!(kernel.enum_value_in("pageflags", "PG_lru").unwrap(), info.number("PG_lru").unwrap());
        // The number of swap areas is the length of this array.
        let spaces = kernel.symbol("swapper_spaces").unwrap();
        let max = u64::from(kernel.pte_format().special.max_swapfiles);
        assert_eq!(kernel.symbolize(spaces + max * 8 - 1), Some(("swapper_spaces", max * 8 - 1)));
        assert_ne!(kernel.symbolize(spaces + max * 8).unwrap().0, "swapper_spaces");
        println!("levels {}, {:x?}", kernel.memory().levels(), kernel.pte_format());
        println!("cpus {:?} of {:?}", kernel.online_cpus().unwrap(), kernel.possible_cpus().unwrap());
    });
}

#[test]
fn tasks_and_their_memory() {
    each_core(|kernel| {
        let start = Instant::now();
        let tasks = tasks(kernel);
        println!("{} tasks in {:?}", tasks.len(), start.elapsed());
        assert!(tasks.len() > 20);
        for task in &tasks {
            let comm = task.comm.escape_ascii().to_string();
            assert_eq!((task.pid, task.nowhere), (task.tgid, None), "{comm}");
        }
        let init = &tasks[0];
        assert_eq!(init.pid, 1);
        assert!(init.fsbase != 0);

        let start = Instant::now();
        let (mut vmas, mut entries, mut bytes) = (0, 0, 0u64);
        let mut kinds = BTreeMap::new();
        let format = kernel.pte_format();
        for task in tasks.iter().filter(|task| task.mm != 0) {
            let mm: Mm = kernel.read(task.mm).unwrap();
            let tables = kernel.page_tables(mm.pgd).unwrap();
            let mut count = 0;
            kernel
                .maple_for_each(mm.mm_mt, 100_000, |first, last, entry| {
                    let vma: Vma = kernel.read(entry)?;
                    assert_eq!((first, last), (vma.vm_start, vma.vm_end - 1));
                    assert_eq!(vma.vm_mm, task.mm);
                    assert!(vma.vm_file == 0 || kernel.read_u8(vma.vm_file).is_ok());
                    count += 1;
                    tables.walk(vma.vm_start..vma.vm_end, &mut |entry| {
                        entries += 1;
                        bytes += entry.size.bytes();
                        let kind = entry.kind(&format);
                        let name = format!("{kind:?}").split(' ').next().unwrap().to_owned();
                        *kinds.entry(name).or_insert(0) += 1;
                        if let EntryKind::Present { phys } = kind {
                            let page = kernel.pfn_to_page(phys >> 12);
                            assert_eq!(kernel.page_to_pfn(page).unwrap(), phys >> 12);
                        }
                    })?;
                    Ok(())
                })
                .unwrap();
            assert_eq!(count, mm.map_count, "{}", task.comm.escape_ascii());
            vmas += count;
            // The code of every program is read-only memory that is there.
            let code = tables.lookup(mm.start_code).unwrap();
            assert!(mm.start_code < mm.end_code && code.is_none_or(|entry| !entry.is_writable()));
            // A kernel stack is vmalloc memory.
            kernel.read_u64(task.stack).unwrap();
        }
        println!("{vmas} VMAs, {entries} entries, {} MiB in {:?}: {kinds:?}", bytes >> 20, start.elapsed());
        assert!(!kinds.contains_key("Unknown"));
    });
}

#[test]
fn modules_have_names_and_types() {
    each_core(|kernel| {
        // The lab's machines have their disk through this module. Dumps of other machines may do
        // without it; the module list itself says so.
        let name = kernel.offset_of("module", "name").unwrap() - kernel.offset_of("module", "list").unwrap();
        let mut loaded = kernel.list_head(kernel.symbol("modules").unwrap(), 1000);
        if !loaded.any(|node| kernel.read_cstr(node.unwrap() + name, 56).unwrap() == b"virtio_blk") {
            return;
        }
        let start = Instant::now();
        let probe = kernel.symbol("virtblk_probe").unwrap();
        println!("modules in {:?}", start.elapsed());
        assert_eq!(kernel.symbol_at(probe), Some("virtblk_probe"));
        assert_eq!(kernel.symbolize(probe + 3), Some(("virtblk_probe", 3)));
        assert_eq!(kernel.module_of(probe), Some("virtio_blk"));
        let ops = kernel.symbol("virtio_mq_ops").unwrap();
        assert_eq!(
            (kernel.symbol_at(ops), kernel.module_of(ops)),
            (Some("virtio_mq_ops"), Some("virtio_blk"))
        );
        assert_eq!(kernel.module_of(kernel.symbol("panic").unwrap()), None);
        let start = Instant::now();
        let size = kernel.size_of("virtio_blk").unwrap();
        println!("types of modules in {:?}", start.elapsed());
        assert!(kernel.offset_of("virtio_blk", "tag_set.ops").unwrap() < size);
        // A type of the module's that is made of types of the kernel's.
        let tag_set = kernel.member("virtio_blk", "tag_set").unwrap();
        assert_eq!(tag_set.size, kernel.size_of("blk_mq_tag_set").unwrap());
        assert!(kernel.size_of("no_such_type").is_err());
    });
}

#[test]
fn a_truncated_copy_still_tells_what_it_has() {
    each_core(|kernel| {
        let path = std::env::var_os("OTHERWORLD_CORE").unwrap();
        let path = std::env::split_paths(&path)
            .find(|path| Vmcore::open(path).unwrap().info().osrelease().unwrap() == kernel.release())
            .unwrap();
        truncated(&path);
    });
}

fn truncated(path: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("core");
    let size = std::fs::metadata(path).unwrap().len();
    {
        let mut from = std::io::Read::take(std::fs::File::open(path).unwrap(), size / 3);
        std::io::copy(&mut from, &mut std::fs::File::create(&copy).unwrap()).unwrap();
    }
    let core = Vmcore::open(&copy).unwrap();
    let truncation = core.truncated().unwrap();
    println!("{truncation}");
    assert_eq!(truncation.actual_size, size / 3);
    assert!(core.info().osrelease().is_ok());
    assert!(Vmcore::open(path).unwrap().truncated().is_none());
}
