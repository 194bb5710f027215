//! `otherworld inspect` on cores that are cut, damaged, of another kind, or of kernels that do not describe themselves: a clear word,
//! the documented exit code, in bounded time.
//!
//! On fakes always; on a real core too, where the lab has left one (`OTHERWORLD_CORE=path`, or `target/cores/vmcore-*`).

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use ktypes::Kernel;
use synth::{I32, Record, Synth};
use vmcore::Vmcore;

/// Generous: whoever follows a cycle never ends.
const BOUND: Duration = Duration::from_secs(120);

/// How `otherworld inspect` ended.
struct Ended {
    code: i32,
    out: String,
    err: String,
}

/// Runs it on a core; killed, which fails the test, when it does not end.
fn inspect(core: &Path, what: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_otherworld"));
    command.args(["inspect", "--core"]).arg(core).args(what);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = |mut from: Box<dyn std::io::Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).unwrap();
            bytes
        })
    };
    let (stdout, stderr) = (read(Box::new(stdout)), read(Box::new(stderr)));
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if began.elapsed() > BOUND {
            child.kill().unwrap();
            panic!("{what:?} of {} did not end", core.display());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let output = Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(status.signal(), None, "{what:?} of {}: {err}", core.display());
    assert!(!err.contains("panicked"), "{what:?} of {}: {err}", core.display());
    Ended { code: status.code().unwrap(), out, err }
}

/// A machine that can be opened; it has no processes.
fn fake() -> Synth {
    let mut synth = Synth::new();
    synth.structure("task_struct", Record::new().field("pid", I32));
    synth
}

fn written(synth: &Synth) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmcore");
    synth.write_elf(&path);
    (dir, path)
}

const WORDS: [&str; 9] =
    ["ps", "threads", "sockets", "mounts", "modules", "slab-summary", "dmesg", "panic", "snapshot"];

#[test]
fn what_is_no_core_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    for (contents, word) in [
        (&b""[..], "not an ELF64 x86-64 core"),
        (
            b"just some text, and not short at all; it goes on for longer than an ELF header has bytes",
            "not an ELF",
        ),
        (b"KDUMP   \x06\0\0\0", "makedumpfile -E"),
        (b"makedumpfile\0\0\0\0", "makedumpfile -R"),
        (b"\x1f\x8b\x08\0\0\0", "decompress"),
    ] {
        fs::write(&path, contents).unwrap();
        for what in WORDS {
            let ended = inspect(&path, &[what]);
            assert_eq!((ended.code, ended.out.as_str()), (1, ""), "{}", ended.err);
            assert!(ended.err.contains(word) && ended.err.contains(path.to_str().unwrap()), "{}", ended.err);
        }
    }
    let ended = inspect(Path::new(env!("CARGO_BIN_EXE_otherworld")), &["ps"]);
    assert!(ended.code == 1 && ended.err.contains("not a core"), "{}", ended.err);
    for path in [dir.path(), &dir.path().join("missing")] {
        let ended = inspect(path, &["ps"]);
        assert!(ended.code == 1 && ended.err.contains(path.to_str().unwrap()), "{}", ended.err);
    }
}

#[test]
fn a_fake_cut_anywhere_ends_with_a_word() {
    let (_dir, path) = written(&fake());
    let size = fs::metadata(&path).unwrap().len();
    // From behind everything that is used to within the headers.
    for cut in
        [size - 1, size / 2, 3 << 20, 2 << 20, 1 << 20, 300_000, 8192, 5000, 4096, 400, 232, 100, 64, 17, 0]
    {
        OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
        for what in WORDS {
            let ended = inspect(&path, &[what]);
            assert!(ended.code <= 1, "{what} of {cut} bytes: {} {}", ended.code, ended.err);
            assert!(ended.err.contains("otherworld: "), "{what} of {cut} bytes says nothing");
            if cut > 8192 {
                assert!(ended.err.contains("the core ends at"), "{what} of {cut} bytes: {}", ended.err);
            } else {
                assert_eq!(ended.code, 1, "{what} of {cut} bytes: {}", ended.err);
            }
        }
    }
}

#[test]
fn a_kernel_without_btf_is_named() {
    let (_dir, path) = written(fake().without_btf());
    let ended = inspect(&path, &["ps"]);
    assert_eq!(ended.code, 1, "{}", ended.err);
    assert!(ended.err.contains("Linux 6.1.0-synth: no BTF"), "{}", ended.err);
    assert!(ended.err.contains("CONFIG_DEBUG_INFO_BTF"), "{}", ended.err);
}

#[test]
fn a_member_that_this_kernel_does_not_have_is_named() {
    let (_dir, path) = written(&fake());
    for what in ["ps", "threads", "sockets", "snapshot"] {
        let ended = inspect(&path, &[what]);
        assert_eq!((ended.code, ended.out.as_str()), (1, ""), "{}", ended.err);
        assert!(ended.err.contains("Linux 6.1.0-synth: `task_struct` has no member `"), "{}", ended.err);
    }
}

// ---- real cores

/// Copies, to be damaged, of the cores that there are.
fn copies() -> Vec<(tempfile::TempDir, PathBuf)> {
    let named = std::env::var_os("OTHERWORLD_CORE").map(|paths| std::env::split_paths(&paths).collect());
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/cores");
    // One is enough here: what depends on the kernel is tested in `autopsy`.
    let found = || Some(target.join("vmcore-6.1")).into_iter().filter(|p| p.exists()).collect();
    let cores: Vec<PathBuf> = named.unwrap_or_else(found);
    if cores.is_empty() {
        eprintln!("there is no core of a real machine: nothing tested");
    }
    let copy = |core: PathBuf| {
        let dir = tempfile::tempdir_in(core.parent().unwrap()).unwrap();
        let path = dir.path().join("vmcore");
        fs::copy(&core, &path).unwrap();
        (dir, path)
    };
    cores.into_iter().map(copy).collect()
}

/// Where in the file the byte of a physical address is. The kernel's image has a second place, which nothing here needs.
fn file_offset(core: &Path, phys: u64) -> u64 {
    let file = fs::File::open(core).unwrap();
    let mut head = vec![0; 4096];
    file.read_exact_at(&mut head, 0).unwrap();
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
    let count = u16::from_le_bytes([head[56], head[57]]) as usize;
    let headers = (0..count).map(|n| word(32) as usize + n * 56);
    let loads: Vec<usize> = headers.filter(|at| head[*at] == 1 && head[at + 1] == 0).collect();
    let holds = |at: &&usize| phys.wrapping_sub(word(**at + 24)) < word(**at + 32);
    let at = loads.iter().find(holds).expect("the address is in the core");
    word(at + 8) + phys - word(at + 24)
}

fn pids(ended: &Ended) -> Vec<String> {
    let rows = ended.out.lines().skip(1);
    rows.filter_map(|row| row.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn ps_of_a_real_machine_with_a_damaged_task_list_lists_everybody_and_says_so() {
    for (_dir, path) in copies() {
        let whole = inspect(&path, &["ps"]);
        assert_eq!(whole.code, 0, "{}", whole.err);
        assert!(pids(&whole).len() > 10, "{}", whole.out);
        assert!(!whole.err.contains("damaged"), "{}", whole.err);
        let kernel = Kernel::open(Vmcore::open(&path).unwrap()).unwrap();
        let tasks = autopsy::Autopsy::new(&kernel).tasks().unwrap();
        let node = |n: usize| tasks[n].task + kernel.offset_of("task_struct", "tasks").unwrap();
        let (first, last) = (5, tasks.len() - 5);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let places =
            [node(last), node(first) + 8].map(|va| file_offset(&path, kernel.virt_to_phys(va).unwrap()));
        for (what, values) in [
            ("a cycle", [node(first), node(last)]),
            ("a wild pointer", [0x4141_4141_4141_4141, 0x4141_4141_4141_4141]),
        ] {
            for (place, value) in places.iter().zip(values) {
                file.write_all_at(&value.to_le_bytes(), *place).unwrap();
            }
            let ended = inspect(&path, &["ps"]);
            assert_eq!(ended.code, 0, "{what}: {}", ended.err);
            assert_eq!(pids(&ended), pids(&whole), "{what}");
            assert!(ended.err.contains("the task list is damaged"), "{what}: {}", ended.err);
            assert!(ended.err.contains("PID table"), "{what}: {}", ended.err);
        }
    }
}

#[test]
fn a_real_core_without_btf_is_named() {
    for (_dir, path) in copies() {
        let kernel = Kernel::open(Vmcore::open(&path).unwrap()).unwrap();
        let start = kernel.symbol("__start_BTF").unwrap();
        let place = file_offset(&path, kernel.virt_to_phys(start).unwrap());
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0; 24], place).unwrap();
        // The kernel's image is in the file twice, at the same place within a page.
        let size = file.metadata().unwrap().len();
        let core = fs::File::open(&path).unwrap();
        for at in (place % 4096..size - 24).step_by(4096) {
            let mut magic = [0; 8];
            core.read_exact_at(&mut magic, at).unwrap();
            if magic == [0x9f, 0xeb, 0x01, 0x00, 0x18, 0, 0, 0] {
                file.write_all_at(&[0; 24], at).unwrap();
            }
        }
        let ended = inspect(&path, &["ps"]);
        assert_eq!((ended.code, ended.out.as_str()), (1, ""), "{}", ended.err);
        assert!(ended.err.contains("BTF"), "{}", ended.err);
    }
}

#[test]
fn a_real_core_cut_anywhere_ends_with_a_word() {
    for (_dir, path) in copies() {
        let size = fs::metadata(&path).unwrap().len();
        for percent in [95, 60, 30, 10, 3, 0] {
            let cut = (size * percent / 100).max(6000);
            OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
            for what in ["ps", "dmesg", "panic"] {
                let ended = inspect(&path, &[what]);
                assert!(ended.code <= 1, "{what} of {percent} %: {} {}", ended.code, ended.err);
                if percent == 0 {
                    assert!(ended.code == 1 && ended.err.contains("before its notes do"), "{}", ended.err);
                    continue;
                }
                assert!(ended.err.contains("the core ends at"), "{what} of {percent} %: {}", ended.err);
                // An answer, or the reason why there is none.
                let answered = ended.code == 0 && !ended.out.is_empty();
                assert!(answered || ended.err.lines().count() > 1, "{what} of {percent} %: {}", ended.err);
            }
        }
    }
}
