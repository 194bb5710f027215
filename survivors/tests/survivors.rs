//! Each survivor, without a crash: a changed boot id is all that it sees of one.
//!
//! Undamaged it must pass, damaged it must fail with a reason. That a survivor holds its state across a real crash is for
//! the tests in virtual machines; that its check looks at anything at all is shown here.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use survivors::{Needs, Paths, Survivor, TABLE};

const DEADLINE: Duration = Duration::from_secs(120);

struct Running {
    survivor: &'static Survivor,
    paths: Paths,
    boot_id: PathBuf,
    process: Child,
    /// What plays the serial line, for as long as the survivor lives.
    _terminal: Option<File>,
}

fn can_run(survivor: &Survivor) -> bool {
    match survivor.needs {
        Needs::Nothing | Needs::Tty | Needs::Alone => true,
        Needs::Root => nix::unistd::Uid::effective().is_root(),
        Needs::Console => std::path::Path::new("/dev/vcsa9").exists(),
        Needs::HugePages => std::fs::read_to_string("/proc/sys/vm/nr_hugepages")
            .is_ok_and(|text| text.trim().parse().is_ok_and(|pages: u64| pages >= 10)),
        Needs::CrashKernel => false,
        Needs::Swap => std::fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1),
        Needs::Avx2 => is_x86_feature_detected!("avx2"),
    }
}

fn start(survivor: &'static Survivor, dir: &Path, damage: bool) -> Running {
    let paths = Paths::new(&dir.join(survivor.name));
    let boot_id = dir.join(format!("{}.boot-id", survivor.name));
    fs::write(&boot_id, "first kernel").expect("write boot id");
    let mut command = Command::new(env!("CARGO_BIN_EXE_survivors"));
    command.args(["run", survivor.name, "--period", "700"]);
    command.arg("--out").arg(&paths.out).arg("--boot-id").arg(&boot_id);
    if damage {
        command.arg("--damage");
    }
    let mut terminal = None;
    if survivor.needs == Needs::Tty {
        let (master, slave) = pseudo_terminal();
        command.arg("--tty").arg(slave);
        terminal = Some(master);
    }
    let process = command.spawn().expect("start the survivor");
    Running { survivor, paths, boot_id, process, _terminal: terminal }
}

/// Behaves like a serial line as far as a survivor can see.
fn pseudo_terminal() -> (File, PathBuf) {
    let master = File::options()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NOCTTY)
        .open("/dev/ptmx")
        .expect("open /dev/ptmx");
    rustix::pty::unlockpt(&master).expect("unlockpt");
    let name = rustix::pty::ptsname(&master, Vec::new()).expect("ptsname");
    (master, PathBuf::from(name.into_string().expect("a name in ASCII")))
}

impl Running {
    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while !self.paths.ready.exists() {
            if let Some(status) = self.process.try_wait().expect("wait") {
                panic!("{}: ended before it was ready: {status}: {}", self.survivor.name, self.verdict());
            }
            assert!(Instant::now() < deadline, "{}: not ready in time", self.survivor.name);
            std::thread::sleep(Duration::from_millis(10));
        }
        let word = fs::read_to_string(&self.paths.ready).expect("read the ready file");
        assert_eq!(word, format!("ready {} {}\n", self.survivor.name, self.process.id()));
        assert_eq!(self.verdict(), "", "{}: a verdict before the crash", self.survivor.name);
    }

    /// "Boots" another kernel.
    fn crash(&self) {
        fs::write(&self.boot_id, "second kernel").expect("write boot id");
    }

    /// Its exit code and its line.
    fn finish(&mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.process.try_wait().expect("wait") {
                return (status.code(), self.verdict());
            }
            if Instant::now() > deadline {
                return (None, "no verdict in time".to_owned());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn verdict(&self) -> String {
        fs::read_to_string(&self.paths.out).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended by itself, unless something went wrong.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn every_survivor_passes_and_can_fail() {
    let mut wrong = Vec::new();
    for damage in [false, true] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        open_to_all(dir.path());
        let mut all: Vec<Running> = Vec::new();
        // A few at a time: they measure times, which need some CPU.
        for survivors in TABLE.iter().filter(|survivor| can_run(survivor)).collect::<Vec<_>>().chunks(8) {
            all.extend(survivors.iter().map(|survivor| start(survivor, dir.path(), damage)));
            all.iter_mut().for_each(Running::wait_until_ready);
            all.iter().for_each(Running::crash);
            for mut survivor in all.drain(..) {
                let name = survivor.survivor.name;
                let (code, line) = survivor.finish();
                let fits = match damage {
                    false => code == Some(0) && line == format!("pass {name}\n"),
                    true => {
                        let reason = line.strip_prefix(&format!("fail {name}: "));
                        code == Some(1) && reason.is_some_and(|reason| reason.lines().count() == 1)
                    }
                };
                if !fits {
                    wrong.push(format!("{name} (damage: {damage}): exit code {code:?}, {line:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} survivors:\n{}", wrong.len(), wrong.join("\n"));
}

/// Survivors give up their rights, and still want to say what they found.
fn open_to_all(dir: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("chmod");
}

#[test]
fn a_set_up_that_fails_is_told_at_once() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let out = dir.path().join("tty");
    let status = Command::new(env!("CARGO_BIN_EXE_survivors"))
        .args(["run", "tty-serial", "--tty", "/nonexistent", "--out"])
        .arg(&out)
        .status()
        .expect("start");
    assert_eq!(status.code(), Some(2));
    let line = fs::read_to_string(&out).expect("a verdict");
    assert!(line.starts_with("fail tty-serial: set-up: cannot open /nonexistent"), "{line}");
    assert!(!Paths::new(&out).ready.exists());
}

#[test]
fn names_are_unique_and_begin_with_their_kind() {
    let mut names: Vec<_> = TABLE.iter().map(|survivor| survivor.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), TABLE.len());
    for survivor in TABLE {
        assert!(survivor.name.starts_with(&format!("{}-", survivor.kind)), "{}", survivor.name);
    }
}

#[test]
fn start_returns_when_all_are_ready() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let boot_id = dir.path().join("boot-id");
    fs::write(&boot_id, "first kernel").expect("write boot id");
    let output = Command::new(env!("CARGO_BIN_EXE_survivors"))
        .args(["start", "pipe-content", "file-offset", "--dir"])
        .arg(dir.path())
        .arg("--boot-id")
        .arg(&boot_id)
        .output()
        .expect("start");
    assert!(output.status.success(), "{output:?}");
    let names = ["pipe-content", "file-offset"];
    for name in names {
        assert!(Paths::new(&dir.path().join(name)).ready.exists());
    }
    fs::write(&boot_id, "second kernel").expect("write boot id");
    let deadline = Instant::now() + DEADLINE;
    for name in names {
        let expected = format!("pass {name}\n");
        while fs::read_to_string(dir.path().join(name)).unwrap_or_default() != expected {
            assert!(Instant::now() < deadline, "{name}: no verdict");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
