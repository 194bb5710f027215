//! One QEMU.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::channel::Channel;
use crate::error::{Error, FileContext as _, Result};
use crate::image::Flavour;
use crate::kernel::Series;
use crate::protocol::PORT_NAME;
use crate::qmp::Qmp;
use crate::serial::Console;

const START_DEADLINE: Duration = Duration::from_secs(20);
const MONITOR_DEADLINE: Duration = Duration::from_secs(60);
const MIGRATION_DEADLINE: Duration = Duration::from_secs(120);
const GDB_SOCKET: &str = "gdb.sock";
const POLL: Duration = Duration::from_millis(5);

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// QEMU's translator: works everywhere.
    Tcg,
    /// The processor: where it works.
    Kvm,
}

/// A machine's hardware and its main kernel's command line.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Its kernel.
    pub series: Series,
    /// What runs it.
    pub accel: Accel,
    /// What is installed.
    #[serde(default)]
    pub flavour: Flavour,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// RAM reserved for the crash kernel in MiB; 0 reserves none.
    pub crashkernel_mib: u32,
    /// Number of CPUs.
    pub cpus: u32,
    /// QEMU's `-cpu`.
    pub cpu: String,
    /// A second, empty disk (`/dev/vdb`) of this size in MiB; 0 for none.
    pub scratch_mib: u32,
    /// Added to the kernel's command line.
    pub cmdline: String,
}

impl MachineConfig {
    /// The usual machine.
    pub fn new(series: Series, accel: Accel) -> Self {
        // Under emulation `rep movsb` is slow, and kernels use it for bulk copies when the CPU boasts of it.
        let cpu = match accel {
            Accel::Tcg => "max,-erms,-fsrm",
            Accel::Kvm => "host",
        };
        Self {
            series,
            accel,
            flavour: Flavour::default(),
            memory_mib: 2048,
            crashkernel_mib: 768,
            cpus: 2,
            cpu: cpu.into(),
            scratch_mib: 64,
            cmdline: String::new(),
        }
    }

    /// The whole kernel command line.
    pub fn kernel_cmdline(&self) -> String {
        let mut line = "console=ttyS0 root=/dev/vda rw panic=1 systemd.show_status=false".to_owned();
        if self.crashkernel_mib > 0 {
            line += &format!(" crashkernel={}M", self.crashkernel_mib);
        }
        if !self.cmdline.is_empty() {
            line += &format!(" {}", self.cmdline);
        }
        line
    }
}

/// A running QEMU. It is killed when this is dropped, and by the kernel when the thread that started it ends.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    qmp: Qmp,
    /// Console of both kernels (ttyS0).
    pub console: Console,
    /// When QEMU was started: zero of the console's times.
    pub start: Instant,
    /// Where its sockets and logs are.
    pub dir: PathBuf,
    /// RAM in MiB.
    pub memory_mib: u32,
}

/// What a new machine does first.
pub(crate) enum Begin<'a> {
    /// Boots.
    Boot,
    /// Goes on from a saved state.
    Resume(&'a Path),
}

impl Machine {
    /// Starts QEMU in `dir`, which must have the disks (`disk.qcow2`, `scratch.qcow2`), with a kernel and an initramfs.
    pub(crate) fn start(
        dir: &Path,
        config: &MachineConfig,
        kernel: &Path,
        initramfs: &Path,
        begin: &Begin<'_>,
    ) -> Result<Self> {
        let log_path = dir.join("qemu.log");
        let log = File::create(&log_path).at(&log_path)?;
        for socket in ["qmp.sock", "control.sock", "ttyS1.sock", GDB_SOCKET] {
            let _ = fs::remove_file(dir.join(socket));
        }
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.current_dir(dir).args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.args([
            "-accel",
            match config.accel {
                Accel::Tcg => "tcg,thread=multi",
                Accel::Kvm => "kvm",
            },
        ]);
        qemu.args([
            "-cpu",
            &config.cpu,
            "-smp",
            &config.cpus.to_string(),
            "-m",
            &config.memory_mib.to_string(),
        ]);
        qemu.arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &config.kernel_cmdline()]);
        qemu.args(["-drive", "file=disk.qcow2,format=qcow2,if=virtio,cache=unsafe"]);
        if config.scratch_mib > 0 {
            qemu.args(["-drive", "file=scratch.qcow2,format=qcow2,if=virtio,cache=unsafe"]);
        }
        qemu.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
        qemu.args([
            "-chardev",
            "socket,id=tty,path=ttyS1.sock,server=on,wait=off,logfile=ttyS1.log",
            "-serial",
            "chardev:tty",
        ]);
        qemu.args([
            "-chardev",
            "socket,id=control,path=control.sock,server=on,wait=off",
            "-device",
            "virtio-serial-pci",
        ]);
        qemu.args(["-device", &format!("virtserialport,chardev=control,name={PORT_NAME}")]);
        qemu.args([
            "-chardev",
            "socket,id=monitor,path=qmp.sock,server=on,wait=off",
            "-mon",
            "chardev=monitor,mode=control",
        ]);
        let stub = format!("socket,id=gdb,path={GDB_SOCKET},server=on,wait=off");
        qemu.args(["-chardev", &stub, "-gdb", "chardev:gdb"]);
        if let Begin::Resume(state) = begin {
            qemu.args(["-incoming", &format!("exec:cat {}", state.display())]);
        }
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let parent = std::process::id();
        // SAFETY: prctl and getppid are async-signal-safe and touch no memory.
        unsafe {
            qemu.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 || libc::getppid() as u32 != parent
                {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let start = Instant::now();
        let mut child = qemu.spawn().map_err(|error| Error::Qemu(format!("qemu-system-x86_64: {error}")))?;
        let stdout = child.stdout.take().ok_or_else(|| Error::Qemu("no console".into()))?;
        // From here on the child is killed if anything fails.
        let mut child = KillOnDrop(Some(child));
        let console = Console::follow(stdout, &dir.join("console.log"), start)?;
        let deadline = Instant::now() + START_DEADLINE;
        let socket = loop {
            match connect(dir, "qmp.sock") {
                Ok(socket) => break socket,
                Err(_) if child.has_ended() => {
                    let words = fs::read_to_string(&log_path).unwrap_or_default();
                    return Err(Error::Qemu(format!("it ended at once: {}", words.trim())));
                }
                Err(_) if Instant::now() < deadline => std::thread::sleep(POLL),
                Err(error) => return Err(Error::Qemu(format!("monitor: {error}"))),
            }
        };
        let qmp = Qmp::new(socket, MONITOR_DEADLINE)?;
        let child = child.0.take().ok_or_else(|| Error::Qemu("no process".into()))?;
        let mut machine = Self { child, qmp, console, start, dir: dir.into(), memory_mib: config.memory_mib };
        if let Begin::Resume(_) = begin {
            machine.wait_for_state(|status| status != "inmigrate", "loading the snapshot")?;
            machine.qmp.command("cont", json!({}))?;
        }
        Ok(machine)
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Milliseconds since QEMU was started, the time scale of [`Console`].
    pub fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// The monitor.
    pub fn monitor(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// A new connection to the control channel; QEMU serves one at a time.
    pub fn channel(&self) -> Result<Channel> {
        connect(&self.dir, "control.sock").map(Channel::new).at(self.dir.join("control.sock"))
    }

    /// A connection to the second serial line (ttyS1); QEMU serves one at a time.
    pub fn second_serial(&self) -> Result<UnixStream> {
        connect(&self.dir, "ttyS1.sock").at(self.dir.join("ttyS1.sock"))
    }

    /// A connection to gdb's stub; the guest stands still from then on.
    pub fn gdb(&self) -> Result<UnixStream> {
        connect(&self.dir, GDB_SOCKET).at(self.dir.join(GDB_SOCKET))
    }

    /// Whether QEMU has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a non-maskable interrupt to all CPUs.
    pub fn inject_nmi(&mut self) -> Result<()> {
        self.qmp.command("inject-nmi", json!({})).map(drop)
    }

    /// Waits until QEMU has ended by itself.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait().map_err(|error| Error::Qemu(error.to_string()))? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout { what: "the machine's end".into(), after: timeout });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Stops the guest, writes its state (all but the disk) to `state` and ends QEMU.
    pub(crate) fn save(mut self, state: &Path) -> Result<()> {
        self.qmp.command("stop", json!({}))?;
        self.qmp.command("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 }))?;
        // What the writer says (a full disk) tells more than QEMU does.
        let log = state.with_extension("log");
        let uri = format!("exec:cat > {} 2> {}", state.display(), log.display());
        self.qmp.command("migrate", json!({ "uri": uri }))?;
        let deadline = Instant::now() + MIGRATION_DEADLINE;
        loop {
            let info = self.qmp.command("query-migrate", json!({}))?;
            match info["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => {
                    return Err(Error::Qemu(format!(
                        "saving the state failed: {}: {}",
                        info["error-desc"].as_str().unwrap_or("?"),
                        std::fs::read_to_string(log).unwrap_or_default().trim()
                    )));
                }
                _ if Instant::now() > deadline => {
                    return Err(Error::Timeout {
                        what: "saving the state".into(),
                        after: MIGRATION_DEADLINE,
                    });
                }
                _ => std::thread::sleep(POLL),
            }
        }
        self.qmp.command("quit", json!({}))?;
        self.wait_exit(MONITOR_DEADLINE).map(drop)
    }

    fn wait_for_state(&mut self, good: impl Fn(&str) -> bool, what: &str) -> Result<()> {
        let deadline = Instant::now() + MIGRATION_DEADLINE;
        loop {
            let status = self.qmp.command("query-status", json!({}))?;
            if status["status"].as_str().is_some_and(&good) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout { what: what.into(), after: MIGRATION_DEADLINE });
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct KillOnDrop(Option<Child>);

impl KillOnDrop {
    fn has_ended(&mut self) -> bool {
        self.0.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Connects to a socket of a machine's directory. The path goes through a descriptor because socket addresses are short.
pub(crate) fn connect(dir: &Path, name: &str) -> std::io::Result<UnixStream> {
    let handle = File::open(dir)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", handle.as_raw_fd()))
}
