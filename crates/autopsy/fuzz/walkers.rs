//! Hostile structures for each walker of `autopsy`, in a fake kernel that has all structures, at places that depend on their members'
//! names only (`ktypes::fuzz`): the input says which walker begins, and what the memory holds.

#![no_main]

#[path = "memory/overlay.rs"]
#[allow(dead_code, reason = "the mutations of captured memory use the rest")]
mod overlay;

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock};

use autopsy::Autopsy;
use ktypes::Kernel;
use ktypes::fuzz::ARENA;
use libfuzzer_sys::fuzz_target;
use overlay::{Account, Overlay};
use synth::Synth;
use vmcore::Vmcore;

/// What files, sockets and names are told by.
const OPERATIONS: [&str; 32] = [
    "pidfd_fops",
    "pidfs_file_operations",
    "eventpoll_fops",
    "eventfd_fops",
    "timerfd_fops",
    "signalfd_fops",
    "inotify_fops",
    "pipefifo_fops",
    "tty_fops",
    "ptmx_fops",
    "console_fops",
    "hung_up_tty_fops",
    "kmsg_fops",
    "pipefs_dname",
    "sockfs_dname",
    "anon_inodefs_dname",
    "ns_dname",
    "unix_stream_ops",
    "unix_dgram_ops",
    "unix_seqpacket_ops",
    "inet_stream_ops",
    "inet_dgram_ops",
    "inet6_stream_ops",
    "netlink_ops",
    "n_tty_ops",
    "ptm_unix98_ops",
    "pty_unix98_ops",
    "con_ops",
    "shmem_vm_ops",
    "special_mapping_vmops",
    "hrtimer_wakeup",
    "it_real_fn",
];

struct World {
    core: Arc<Vmcore>,
    arena: u64,
    operations: Vec<u64>,
    page: u64,
    tasks: Vec<u64>,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let mut synth = Synth::new();
    let mut operations = Vec::new();
    for (at, name) in (0..).zip(OPERATIONS) {
        let addr = synth.variable(&format!("room_{at}"), "list_head");
        synth.symbol(name, addr);
        operations.push(addr);
    }
    let (file_system, ext4) = (synth.string("tmpfs"), synth.string("ext4"));
    operations.extend([file_system, ext4]);
    let cache = synth.slab_cache("task_struct", 2048);
    let tasks = (0..4).map(|_| synth.slab_alloc(cache)).collect();
    World {
        arena: synth.direct(ARENA.start),
        page: synth.page_of(ARENA.start),
        core: Arc::new(synth.build()),
        operations,
        tasks,
    }
});

fuzz_target!(|bytes: &[u8]| {
    let world = &*WORLD;
    let Some((head, bytes)) = bytes.split_first_chunk::<2>() else { return };
    let mut changed = Vec::new();
    // Each four bytes are a word: where, and what.
    for piece in bytes.chunks_exact(4) {
        let what = u64::from(piece[3]);
        let at = u64::from(u16::from_le_bytes([piece[0], piece[1]])) % ((ARENA.end - ARENA.start) / 8) * 8;
        let value = match piece[2] % 12 {
            0 => what,
            1 => world.arena + what * 64,
            2 => world.arena + what * 256,
            3 => world.operations[what as usize % world.operations.len()],
            4 => u64::from_le_bytes([piece[3]; 8]),
            5 => world.page + what % 16 * 64,
            6 => 1 << (what % 64),
            7 => what.wrapping_neg(),
            8 => world.arena + what * 64 | 2,
            9 => world.tasks[what as usize % world.tasks.len()],
            10 => what << 32 | what,
            // In place: a list that is empty, or goes round.
            _ => world.arena + at - what % 4 * 8,
        };
        changed.extend((ARENA.start + at..).zip(value.to_le_bytes()));
    }
    let account = Arc::new(Account::default());
    let overlay = Overlay::new(world.core.clone(), account.clone(), &changed);
    let core = overlay.into_core(world.core.info().clone(), world.core.prstatus().to_vec());
    let Ok(kernel) = Kernel::open(core) else { return };
    let autopsy = Autopsy::new(&kernel);
    autopsy.walk(head[0] % (autopsy::WALKERS + 1), world.arena + u64::from(head[1]) * 64);
    let reads = account.reads.load(Relaxed);
    assert!(reads < 2_000_000, "{reads} reads");
});
