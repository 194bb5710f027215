//! The programs that are frozen and brought back. Each sets something up, says that it is ready, waits for `go`, and then checks that
//! everything is as it was: exit status 0 only then.
//!
//! They run with the directory of their test as working directory. `ready` is a byte into descriptor 3, `go` comes as a byte
//! through a FIFO of that name.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};

pub fn run(name: &str) -> ! {
    let program = PROGRAMS.iter().find(|(n, _)| *n == name).expect("a program of that name").1;
    program();
    std::process::exit(0)
}

const PROGRAMS: &[(&str, fn())] = &[
    ("memory", memory),
    ("threads", threads),
    ("sleep", sleep),
    ("poll", poll),
    ("pipes", pipes),
    ("files", files),
    ("locks", locks),
    ("signals", signals),
    ("credentials", credentials),
    ("vectors", vectors),
    ("rseq", rseq),
    ("zombie", zombie),
    ("shared", shared),
    ("dead-leader", dead_leader),
    ("terminal", terminal),
    ("idle", idle),
    ("family", family),
    ("log", log),
    ("groups", groups),
    ("vfork", || vfork(false)),
    ("vfork-late", || vfork(true)),
];

/// Tells the test that everything is set up.
fn ready() {
    let mut pipe = unsafe { File::from_raw_fd(3) };
    pipe.write_all(b"r").unwrap();
}

fn go_fifo() -> File {
    File::options().read(true).write(true).open("go").unwrap()
}

/// Blocks until the test says so.
fn await_go(mut fifo: &File) {
    fifo.read_exact(&mut [0]).unwrap();
}

fn idle() {
    let go = go_fifo();
    ready();
    await_go(&go);
}

/// A parent with 20 MiB and three children that have them too, and a child of one of these.
fn family() {
    const WORDS: usize = 20 << 17;
    let mut seed = 42;
    let mut data: Vec<u64> = (0..WORDS).map(|_| random(&mut seed)).collect();
    let go = go_fifo();
    let mut number = 0;
    let mut is_first = true;
    for n in 1..4 {
        if unsafe { libc::fork() } == 0 {
            (number, is_first) = (n, false);
            data[n * 512] = n as u64;
            if n == 2 && unsafe { libc::fork() } == 0 {
                number = 4;
                data[4 * 512] = 4;
            }
            break;
        }
    }
    if is_first {
        // Everybody is there when it is told.
        while std::fs::read_dir(".")
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().extension().is_some())
            .count()
            < 4
        {
            std::thread::yield_now();
        }
        ready();
    } else {
        std::fs::write(format!("{number}.up"), "").unwrap();
    }
    await_go(&go);
    let mut seed = 42;
    for (i, &word) in data.iter().enumerate() {
        let expected = random(&mut seed);
        let own = [1, 2, 3, 4].into_iter().find(|n| i == n * 512);
        assert!(word == expected || own.is_some_and(|n| word == n as u64), "{number}: word {i}");
    }
    for _ in 1..4 {
        if is_first {
            let mut status = 0;
            assert!(unsafe { libc::wait(&mut status) } > 0);
            assert_eq!(status, 0);
        }
    }
}

/// xorshift64
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn memory() {
    const WORDS: usize = 50 << 17;
    let mut seed = 88172645463325252;
    let data: Vec<u64> = (0..WORDS).map(|_| random(&mut seed)).collect();
    // 1 TiB of reservation, a mapping that was writable once, a page that is not accessible but has contents.
    let map = |len, prot, flags| unsafe {
        let p = libc::mmap(
            std::ptr::null_mut(),
            len,
            prot,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
            -1,
            0,
        );
        assert_ne!(p, libc::MAP_FAILED);
        p.cast::<u8>()
    };
    map(1 << 40, libc::PROT_NONE, libc::MAP_NORESERVE);
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let once = map(3 * 4096, rw, 0);
    unsafe {
        once.write_bytes(7, 3 * 4096);
        assert_eq!(libc::mprotect(once.cast(), 4096, libc::PROT_READ), 0);
        assert_eq!(libc::mprotect(once.add(4096).cast(), 4096, libc::PROT_NONE), 0);
        assert_eq!(libc::madvise(once.add(8192).cast(), 4096, libc::MADV_DONTFORK), 0);
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    let go = go_fifo();
    ready();
    await_go(&go);
    let mut seed = 88172645463325252;
    assert!(data.iter().all(|&w| w == random(&mut seed)), "memory has changed");
    unsafe {
        assert_eq!(libc::mprotect(once.add(4096).cast(), 4096, libc::PROT_READ), 0);
        assert!(std::slice::from_raw_parts(once, 3 * 4096).iter().all(|&b| b == 7));
    }
    let cmdline = std::fs::read("/proc/self/cmdline").unwrap();
    let first = cmdline.split(|&b| b == 0).next().unwrap();
    assert_eq!(first, arguments[0].as_encoded_bytes());
    assert!(std::fs::read("/proc/self/environ").unwrap().starts_with(b"MARK=otherworld"));
    // The heap can still grow.
    let more: Vec<u8> = vec![1; 200 << 20];
    assert!(more.iter().step_by(4096).all(|&b| b == 1));
}

fn threads() {
    thread_local!(static MINE: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
    let state = Arc::new((Mutex::new(0u32), Condvar::new()));
    let started = Arc::new(Barrier::new(5));
    let workers: Vec<_> = (0..4u64)
        .map(|i| {
            let (state, started) = (state.clone(), started.clone());
            let worker = move || {
                MINE.set(1000 + i);
                let tid = nix::unistd::gettid();
                started.wait();
                let mut turn = state.0.lock().unwrap();
                while *turn != i as u32 + 1 {
                    turn = state.1.wait(turn).unwrap();
                }
                *turn += 1;
                state.1.notify_all();
                assert_eq!(MINE.get(), 1000 + i);
                assert_eq!(nix::unistd::gettid(), tid);
                std::thread::current().name().unwrap().to_owned()
            };
            std::thread::Builder::new().name(format!("worker-{i}")).spawn(worker).unwrap()
        })
        .collect();
    let go = go_fifo();
    started.wait();
    ready();
    await_go(&go);
    *state.0.lock().unwrap() = 1;
    state.1.notify_all();
    for (i, w) in workers.into_iter().enumerate() {
        assert_eq!(w.join().unwrap(), format!("worker-{i}"));
    }
    // A new one, too.
    assert_eq!(std::thread::spawn(|| 5).join().unwrap(), 5);
}

fn monotonic() -> i64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

/// How long the timed calls wait, nanoseconds.
pub const WAIT: i64 = 2_000_000_000;
const LATE: i64 = 1_000_000_000;

fn announce_end() -> i64 {
    let end = monotonic() + WAIT;
    std::fs::write("end", end.to_string()).unwrap();
    ready();
    end
}

fn sleep() {
    let end = announce_end();
    let request = libc::timespec { tv_sec: WAIT / 1_000_000_000, tv_nsec: 0 };
    let r = unsafe { libc::nanosleep(&request, std::ptr::null_mut()) };
    let woken = monotonic();
    assert_eq!(r, 0, "the sleep was interrupted");
    assert!((end..end + LATE).contains(&woken), "woken {} ms off", (woken - end) / 1_000_000);
}

fn poll() {
    let (r, _w) = nix::unistd::pipe().unwrap();
    let mut fds = [libc::pollfd { fd: r.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
    let end = announce_end();
    let n = unsafe { libc::poll(fds.as_mut_ptr(), 1, (WAIT / 1_000_000) as i32) };
    let woken = monotonic();
    assert_eq!(n, 0);
    assert!((end..end + LATE).contains(&woken), "woken {} ms off", (woken - end) / 1_000_000);
}

/// Forks; the child runs `f` and exits.
fn fork(f: impl FnOnce()) -> i32 {
    match unsafe { libc::fork() } {
        0 => {
            f();
            std::process::exit(0)
        }
        pid => {
            assert!(pid > 0);
            pid
        }
    }
}

fn wait_for(pid: i32) -> i32 {
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid, "{}", std::io::Error::last_os_error());
    status
}

/// Two processes, a pipe with unread data between them, and a file whose position they share.
fn pipes() {
    let (r, w) = nix::unistd::pipe().unwrap();
    let (mut r, mut w) = (Some(File::from(r)), Some(File::from(w)));
    let mut numbers =
        File::options().create(true).truncate(true).read(true).write(true).open("numbers").unwrap();
    let go = go_fifo();
    let parent = std::process::id();
    let child = fork(|| {
        drop(w.take());
        assert_eq!(unsafe { libc::getppid() } as u32, parent);
        await_go(&go);
        let mut all = String::new();
        r.take().unwrap().read_to_string(&mut all).unwrap();
        assert_eq!(all, "before and after");
        assert_eq!(unsafe { libc::getppid() } as u32, parent);
        numbers.write_all(b"child").unwrap();
    });
    drop(r.take());
    let mut w = w.take().unwrap();
    w.write_all(b"before and ").unwrap();
    numbers.write_all(b"parent ").unwrap();
    ready();
    await_go(&go);
    w.write_all(b"after").unwrap();
    drop(w);
    assert_eq!(wait_for(child), 0);
    numbers.write_all(b" parent").unwrap();
    assert_eq!(std::fs::read_to_string("numbers").unwrap(), "parent child parent");
}

fn files() {
    use std::io::Seek;
    use std::os::unix::fs::OpenOptionsExt;
    let mut append = File::options().create(true).append(true).open("log").unwrap();
    append.write_all(b"one\n").unwrap();
    let mut random =
        File::options().create(true).truncate(true).read(true).write(true).open("random").unwrap();
    random.write_all(&[b'x'; 10000]).unwrap();
    random.seek(std::io::SeekFrom::Start(1234)).unwrap();
    let null = File::open("/dev/null").unwrap();
    let dir = File::open(".").unwrap();
    let path = File::options().read(true).custom_flags(libc::O_PATH).open("log").unwrap();
    assert_eq!(unsafe { libc::dup2(append.as_raw_fd(), 777) }, 777);
    let fifo_nonblock =
        File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("go").unwrap();
    unsafe { libc::umask(0o27) };
    let go = go_fifo();
    ready();
    await_go(&go);
    append.write_all(b"two\n").unwrap();
    let mut again = unsafe { File::from_raw_fd(777) };
    again.write_all(b"three\n").unwrap();
    assert_eq!(std::fs::read_to_string("log").unwrap(), "one\ntwo\nthree\n");
    assert_eq!(random.stream_position().unwrap(), 1234);
    random.write_all(b"y").unwrap();
    let contents = std::fs::read("random").unwrap();
    assert_eq!((contents.len(), contents[1233], contents[1234], contents[1235]), (10000, b'x', b'y', b'x'));
    let flags = |f: &File, cmd| unsafe { libc::fcntl(f.as_raw_fd(), cmd) };
    assert_eq!(flags(&again, libc::F_GETFD), 0);
    assert_eq!(flags(&append, libc::F_GETFD), libc::FD_CLOEXEC);
    assert_ne!(flags(&path, libc::F_GETFL) & libc::O_PATH, 0);
    assert_ne!(flags(&fifo_nonblock, libc::F_GETFL) & libc::O_NONBLOCK, 0);
    assert!(null.metadata().is_ok() && dir.metadata().unwrap().is_dir());
    assert_eq!(unsafe { libc::umask(0) }, 0o27);
}

/// Locks, pidfds and files about itself.
fn locks() {
    const OFD_SETLK: i32 = 37;
    let open = || File::options().create(true).truncate(false).read(true).write(true).open("file").unwrap();
    let set = |file: &File, command: i32, kind: i32, start: i64, len: i64| unsafe {
        let (l_type, l_whence) = (kind as i16, libc::SEEK_SET as i16);
        let lock = libc::flock { l_type, l_whence, l_start: start, l_len: len, l_pid: 0 };
        libc::fcntl(file.as_raw_fd(), command, &lock)
    };
    let pidfd_open = |pid: i32| unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32;
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    let has_exited = |pidfd: &File| unsafe {
        let mut fd = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        libc::poll(&mut fd, 1, 0) == 1
    };
    let file = open();
    assert_eq!(set(&file, libc::F_SETLK, libc::F_WRLCK, 10, 20), 0);
    assert_eq!(set(&file, OFD_SETLK, libc::F_WRLCK, 100, 0), 0);
    assert_eq!(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }, 0);
    let me = pidfd_open(std::process::id() as i32);
    let init = pidfd_open(1);
    // Its number is the last one, and there is a gap below it.
    let gap = File::open("/dev/null").unwrap();
    let mut status = File::open("/proc/self/status").unwrap();
    assert_eq!(unsafe { libc::dup3(me.as_raw_fd(), 300, libc::O_CLOEXEC) }, 300);
    drop(gap);
    let go = go_fifo();
    ready();
    await_go(&go);
    assert!(!has_exited(&me), "it has exited itself");
    assert!(has_exited(&init), "who does not come back seems to live");
    let send = |pidfd: i32| unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, 0, 0, 0) };
    assert_eq!((send(me.as_raw_fd()), send(300), send(init.as_raw_fd())), (0, 0, -1));
    let mut text = String::new();
    status.read_to_string(&mut text).unwrap();
    assert!(text.contains(&format!("\nPid:\t{}\n", std::process::id())));
    // What somebody else can lock.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let other = open();
        let taken = [(9, 1), (10, 1), (29, 1), (30, 1)]
            .map(|(at, len)| set(&other, libc::F_SETLK, libc::F_WRLCK, at, len));
        let open_end = set(&other, OFD_SETLK, libc::F_WRLCK, 1 << 40, 1);
        let whole = unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) };
        let right = (taken, open_end, whole) == ([0, -1, -1, 0], -1, -1);
        unsafe { libc::_exit(i32::from(!right)) };
    }
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the locks are not as they were");
}

static COUNT: AtomicI32 = AtomicI32::new(0);
static VALUES: AtomicU64 = AtomicU64::new(0);

extern "C" fn counted(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    let value = unsafe { (*info).si_value().sival_ptr as u64 };
    VALUES.store(VALUES.load(Ordering::SeqCst) * 10 + value, Ordering::SeqCst);
}

fn handle(signo: i32, flags: i32) {
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = counted as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | flags;
    assert_eq!(unsafe { libc::sigaction(signo, &action, std::ptr::null_mut()) }, 0);
}

fn mask(how: i32, signo: i32) {
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signo);
        assert_eq!(libc::sigprocmask(how, &set, std::ptr::null_mut()), 0);
    }
}

fn signals() {
    let rt = libc::SIGRTMIN() + 3;
    handle(rt, libc::SA_ONSTACK);
    handle(libc::SIGUSR1, 0);
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    mask(libc::SIG_BLOCK, rt);
    mask(libc::SIG_BLOCK, libc::SIGUSR1);
    for value in [4usize, 2, 7] {
        let value = libc::sigval { sival_ptr: value as *mut _ };
        assert_eq!(unsafe { libc::sigqueue(libc::getpid(), rt, value) }, 0);
    }
    // To this thread alone.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGUSR1) };
    let go = go_fifo();
    ready();
    await_go(&go);
    assert_eq!(COUNT.load(Ordering::SeqCst), 0);
    mask(libc::SIG_UNBLOCK, rt);
    assert_eq!((COUNT.load(Ordering::SeqCst), VALUES.load(Ordering::SeqCst)), (3, 427));
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&mut set);
        assert_eq!(libc::sigismember(&set, libc::SIGUSR1), 1);
    }
    mask(libc::SIG_UNBLOCK, libc::SIGUSR1);
    assert_eq!(COUNT.load(Ordering::SeqCst), 4);
    unsafe { libc::raise(libc::SIGHUP) };
}

fn credentials() {
    let go = go_fifo();
    unsafe {
        let groups = [100u32, 5, 4711];
        assert_eq!(libc::setgroups(3, groups.as_ptr()), 0);
        // Keep one capability, make it ambient.
        assert_eq!(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0), 0);
        assert_eq!(libc::setresgid(1001, 1002, 1003), 0);
        assert_eq!(libc::setresuid(1000, 1000, 1000), 0);
        let bit = 1u32 << 10; // CAP_NET_BIND_SERVICE
        let header = [0x2008_0522u32, 0];
        let sets = [bit, bit, bit, 0, 0, 0];
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()), 0);
        assert_eq!(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, 10, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGWINCH), 0);
    }
    let before = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let parts = |s: &str| -> Vec<String> {
        let names = ["Uid", "Gid", "Groups", "Cap", "NoNewPrivs"];
        s.lines().filter(|l| names.iter().any(|n| l.starts_with(n))).map(str::to_owned).collect()
    };
    ready();
    await_go(&go);
    let after = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    assert_eq!(parts(&before), parts(&after));
    let mut signal = 0;
    unsafe {
        libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal);
        assert_eq!(signal, libc::SIGWINCH);
        assert_eq!(libc::prctl(libc::PR_GET_DUMPABLE), 0);
    }
}

/// Vector registers, MXCSR and the x87 control word, held across a system call that the freeze interrupts.
fn vectors() {
    let go = go_fifo();
    let pattern: Vec<u8> = (0..16 * 32).map(|i| (i * 7 % 251) as u8).collect();
    let mut after = vec![0u8; 16 * 32];
    let mxcsr = 0x7f80u32 & !0x1000; // another rounding mode
    let cw = 0x0f7fu16;
    let (mut mxcsr_after, mut cw_after) = (0u32, 0u16);
    let mut byte = 0u8;
    let mut result = 0i64;
    ready();
    let control = [
        (&raw const mxcsr) as u64,
        (&raw const cw) as u64,
        &raw mut mxcsr_after as u64,
        &raw mut cw_after as u64,
    ];
    unsafe {
        std::arch::asm!(
            "mov {t}, [{c}]", "ldmxcsr [{t}]",
            "mov {t}, [{c} + 8]", "fldcw [{t}]",
            "vmovdqu ymm0, [{p}]", "vmovdqu ymm1, [{p} + 32]", "vmovdqu ymm2, [{p} + 64]", "vmovdqu ymm3, [{p} + 96]",
            "vmovdqu ymm8, [{p} + 256]", "vmovdqu ymm9, [{p} + 288]", "vmovdqu ymm14, [{p} + 448]", "vmovdqu ymm15, [{p} + 480]",
            "syscall",
            "vmovdqu [{a}], ymm0", "vmovdqu [{a} + 32], ymm1", "vmovdqu [{a} + 64], ymm2", "vmovdqu [{a} + 96], ymm3",
            "vmovdqu [{a} + 256], ymm8", "vmovdqu [{a} + 288], ymm9", "vmovdqu [{a} + 448], ymm14", "vmovdqu [{a} + 480], ymm15",
            "mov {t}, [{c} + 16]", "stmxcsr [{t}]",
            "mov {t}, [{c} + 24]", "fnstcw [{t}]",
            "fninit",
            p = in(reg) pattern.as_ptr(), a = in(reg) after.as_mut_ptr(), c = in(reg) control.as_ptr(), t = out(reg) _,
            inout("rax") libc::SYS_read => result,
            in("rdi") go.as_raw_fd(), in("rsi") &raw mut byte, in("rdx") 1, out("rcx") _, out("r11") _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm8") _, out("ymm9") _, out("ymm14") _, out("ymm15") _,
        );
    }
    assert_eq!(result, 1);
    for i in [0, 1, 2, 3, 8, 9, 14, 15] {
        assert_eq!(after[i * 32..][..32], pattern[i * 32..][..32], "ymm{i}");
    }
    assert_eq!((mxcsr_after & 0xffc0, cw_after & 0xf3f), (mxcsr & 0xffc0, cw & 0xf3f));
}

/// A thread that spins inside a restartable sequence gets out of it only when the kernel aborts it. After the freeze it must be
/// aborted, as it would have been by being taken off its CPU.
fn rseq() {
    static STOP: AtomicI32 = AtomicI32::new(0);
    static STARTED: AtomicI32 = AtomicI32::new(0);
    unsafe extern "C" {
        static __rseq_offset: isize;
    }
    let go = go_fifo();
    handle(libc::SIGUSR1, 0);
    let spinner = std::thread::spawn(|| {
        let mut aborts = 0u64;
        let area: u64;
        unsafe { std::arch::asm!("mov {}, fs:0", out(reg) area) };
        let area = (area as i64 + unsafe { __rseq_offset } as i64) as u64;
        while STOP.load(Ordering::SeqCst) == 0 {
            STARTED.store(1, Ordering::SeqCst);
            unsafe {
                std::arch::asm!(
                    ".pushsection __rseq_test, \"aw\"",
                    ".balign 32",
                    "77: .long 0, 0",
                    ".quad 72f, 73f - 72f, 74f",
                    ".popsection",
                    "lea {t}, [rip + 77b]",
                    "mov [{area} + 8], {t}",
                    "72: pause",
                    "jmp 72b",
                    "73: ud2",
                    ".long 0x53053053",
                    "74: nop",
                    area = in(reg) area, t = out(reg) _,
                );
            }
            aborts += 1;
        }
        aborts
    });
    while STARTED.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    ready();
    await_go(&go);
    STOP.store(1, Ordering::SeqCst);
    // A signal aborts the sequence; it may come just before the thread enters it again.
    while !spinner.is_finished() {
        use std::os::unix::thread::JoinHandleExt;
        unsafe { libc::pthread_kill(spinner.as_pthread_t(), libc::SIGUSR1) };
        std::thread::yield_now();
    }
    assert!(spinner.join().unwrap() > 0);
}

fn zombie() {
    handle(libc::SIGCHLD, 0);
    let exited = fork(|| std::process::exit(42));
    let killed = fork(|| unsafe {
        libc::raise(libc::SIGTERM);
    });
    // Wait for both without reaping.
    for pid in [exited, killed] {
        let wait = || {
            nix::sys::wait::waitid(
                nix::sys::wait::Id::Pid(nix::unistd::Pid::from_raw(pid)),
                nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT,
            )
        };
        // The handler of their SIGCHLD interrupts it.
        let r = std::iter::repeat_with(wait).find(|r| *r != Err(nix::errno::Errno::EINTR));
        r.unwrap().unwrap();
    }
    let count = COUNT.load(Ordering::SeqCst);
    let go = go_fifo();
    ready();
    await_go(&go);
    assert_eq!(COUNT.load(Ordering::SeqCst), count, "another SIGCHLD came");
    assert_eq!(wait_for(exited), 42 << 8);
    assert_eq!(wait_for(killed) & 0x7f, libc::SIGTERM);
}

/// Shared anonymous memory between two processes.
fn shared() {
    let go = go_fifo();
    let len = 64 << 10;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let memory = unsafe {
        let p = libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0);
        assert_ne!(p, libc::MAP_FAILED);
        std::slice::from_raw_parts(p.cast::<AtomicU64>(), len / 8)
    };
    memory[100].store(1, Ordering::SeqCst);
    let child = fork(|| {
        await_go(&go);
        assert_eq!(memory[100].load(Ordering::SeqCst), 1);
        memory[8000].store(2, Ordering::SeqCst);
    });
    ready();
    await_go(&go);
    assert_eq!(wait_for(child), 0);
    assert_eq!(memory[8000].load(Ordering::SeqCst), 2);
}

fn dead_leader() {
    let go = go_fifo();
    let leader = nix::unistd::getpid();
    std::thread::spawn(move || {
        // Until the leader is a zombie.
        while !std::fs::read_to_string(format!("/proc/{leader}/stat")).unwrap().contains(") Z ") {
            std::thread::yield_now();
        }
        ready();
        await_go(&go);
        assert_eq!(nix::unistd::getpid(), leader);
        std::process::exit(7);
    });
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!()
}

/// Runs on a terminal of its own as session leader; its child is the foreground group.
fn terminal() {
    let go = go_fifo();
    let mut tty = File::options().read(true).write(true).open("/dev/tty").unwrap();
    let child = fork(|| {
        unsafe {
            libc::setpgid(0, 0);
            libc::signal(libc::SIGTTOU, libc::SIG_IGN);
            assert_eq!(libc::tcsetpgrp(0, libc::getpid()), 0);
        }
        ready();
        await_go(&go);
        unsafe { assert_eq!(libc::tcgetpgrp(0), libc::getpid()) };
        let mut line = [0; 100];
        let n = File::from(unsafe { std::os::fd::OwnedFd::from_raw_fd(0) }).read(&mut line).unwrap();
        assert_eq!(&line[..n], b"typed\n");
        unsafe { assert_eq!(libc::tcsetpgrp(1, libc::getppid()), 0) };
    });
    drop(unsafe { File::from_raw_fd(3) });
    assert_eq!(wait_for(child), 0);
    let mut t: libc::termios = unsafe { std::mem::zeroed() };
    let mut w: libc::winsize = unsafe { std::mem::zeroed() };
    unsafe {
        libc::tcgetattr(tty.as_raw_fd(), &mut t);
        libc::ioctl(tty.as_raw_fd(), libc::TIOCGWINSZ, &mut w);
        assert_eq!(libc::tcgetpgrp(1), libc::getpgrp());
    }
    assert_eq!(t.c_lflag & libc::ECHO, 0);
    assert_eq!((w.ws_row, w.ws_col), (33, 77));
    tty.write_all(b"done").unwrap();
}

/// Appends numbered lines as fast as it can, until told to stop.
fn log() {
    let mut log = File::options().create(true).append(true).open("lines").unwrap();
    let stop = File::options().read(true).write(true).custom(libc::O_NONBLOCK).open("go").unwrap();
    ready();
    let mut n = 0u64;
    while (&stop).read(&mut [0]).is_err() {
        writeln!(log, "{n}").unwrap();
        n += 1;
    }
    writeln!(log, "end {n}").unwrap();
}

trait Custom {
    fn custom(&mut self, flags: i32) -> &mut Self;
}

impl Custom for std::fs::OpenOptions {
    fn custom(&mut self, flags: i32) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, flags)
    }
}

/// A pipeline in a group of its own whose leader has exited, below a shell that is not frozen.
fn groups() {
    let go = go_fifo();
    let session = nix::unistd::getsid(None).unwrap();
    let first = fork(|| unsafe {
        libc::setpgid(0, 0);
    });
    let _second = fork(|| {
        // The leader is a zombie until it is waited for.
        while unsafe { libc::setpgid(0, first) } != 0 {
            std::thread::yield_now();
        }
        std::fs::write("second", std::process::id().to_string()).unwrap();
        ready();
        await_go(&go);
        assert_eq!(unsafe { libc::getpgrp() }, first);
        assert_eq!(nix::unistd::getsid(None).unwrap(), session);
    });
    drop(unsafe { File::from_raw_fd(3) });
    loop {
        unsafe { libc::pause() };
    }
}

/// So far the child lets the stack grow.
const BELOW: u64 = 256 << 10;

/// What parent and child of `vfork` share.
struct Shared {
    go: File,
    first: AtomicU64,
    second: AtomicU64,
    mapped: AtomicU64,
    heap: AtomicU64,
    /// Lowest address of the first thread's stack.
    stack: u64,
    pages: *mut u8,
}

/// Parent and child on one memory, as after vfork(2); only that the parent waits in pause(2), where it can be stopped.
fn vfork(late: bool) {
    const PAGE: usize = 4096;
    let (rw, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let map = |len| unsafe { libc::mmap(std::ptr::null_mut(), len, rw, flags, -1, 0).cast::<u8>() };
    let (stack, pages) = (map(256 << 10), map(4 * PAGE));
    unsafe { pages.write_bytes(1, 4 * PAGE) };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
    let bottom = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
    let zero = || AtomicU64::new(0);
    let shared = Shared {
        go: go_fifo(),
        first: zero(),
        second: zero(),
        mapped: zero(),
        heap: zero(),
        stack: bottom,
        pages,
    };
    let (top, argument) = (unsafe { stack.add(256 << 10) }, &raw const shared);
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    let child = unsafe { libc::clone(vfork_child, top.cast(), flags, argument.cast_mut().cast()) };
    assert!(child > 0);
    ready();
    let returned = unsafe { libc::syscall(libc::SYS_pause) };
    assert_eq!(returned, i64::from(child));
    let value = |word: &AtomicU64| word.load(Ordering::SeqCst);
    if late {
        assert_eq!(value(&shared.first), 0, "it has not gone on before the child");
    } else {
        assert_eq!((value(&shared.first), value(&shared.second)), (1, 2), "what the child wrote");
        for word in [&shared.mapped, &shared.heap] {
            assert_eq!(unsafe { *(value(word) as *const u64) }, 4711, "memory that the child mapped");
        }
        assert_eq!(unsafe { libc::sbrk(0) } as u64, value(&shared.heap) + 64 * PAGE as u64);
        assert_eq!(unsafe { *((bottom - BELOW) as *const u64) }, 4711, "the stack has grown");
        assert_eq!(unsafe { libc::mprotect(pages.cast(), PAGE, libc::PROT_READ) }, 0);
        assert_eq!(unsafe { libc::mprotect(pages.add(PAGE).cast(), PAGE, rw) }, -1, "it is not unmapped");
        let dropped = unsafe { std::slice::from_raw_parts(pages.add(2 * PAGE), PAGE) };
        assert!(dropped.iter().all(|&b| b == 0), "a page that the child gave up");
        assert_eq!((unsafe { *pages }, unsafe { *pages.add(3 * PAGE) }), (2, 1));
    }
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 7 << 8);
}

extern "C" fn vfork_child(argument: *mut libc::c_void) -> i32 {
    const PAGE: usize = 4096;
    let shared = unsafe { &*argument.cast::<Shared>() };
    await_go(&shared.go);
    shared.first.store(1, Ordering::SeqCst);
    unsafe {
        let (rw, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let mapped = libc::mmap(std::ptr::null_mut(), 3 * PAGE, rw, flags, -1, 0).cast::<u64>();
        let heap = libc::sbrk(64 * PAGE as isize).cast::<u64>();
        (*mapped, *heap) = (4711, 4711);
        shared.mapped.store(mapped as u64, Ordering::SeqCst);
        shared.heap.store(heap as u64, Ordering::SeqCst);
        *((shared.stack - BELOW) as *mut u64) = 4711;
        *shared.pages = 2;
        libc::mprotect(shared.pages.cast(), PAGE, libc::PROT_NONE);
        libc::munmap(shared.pages.add(PAGE).cast(), PAGE);
        libc::madvise(shared.pages.add(2 * PAGE).cast(), PAGE, libc::MADV_DONTNEED);
        // The parent would be in time to notice.
        libc::usleep(100_000);
        let none = [std::ptr::null()];
        libc::execve(c"/nonexistent".as_ptr(), none.as_ptr(), none.as_ptr());
        shared.second.store(2, Ordering::SeqCst);
        let arguments = [c"sh".as_ptr(), c"-c".as_ptr(), c"exit 7".as_ptr(), std::ptr::null()];
        libc::execve(c"/bin/sh".as_ptr(), arguments.as_ptr(), none.as_ptr());
        libc::_exit(1)
    }
}
