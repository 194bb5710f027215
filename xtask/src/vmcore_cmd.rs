//! `cargo xtask vmcore`: a crashed guest's memory as a file.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use lab::{MachineConfig, Panic, Program, Series};

use crate::{Global, build, ui, workload};

/// The crash kernel's command line; its initramfs is the lab's own, which only starts the agent.
const CRASH_CMDLINE: &str = "console=ttyS0 maxcpus=1 reset_devices panic=1 quiet cgroup_disable=memory";

/// Internet sockets of several kinds that stand still, with something in their queues.
const SOCKETS: &str = r#"
import socket, time
server = socket.create_server(("127.0.0.1", 7777))
client = socket.create_connection(("127.0.0.1", 7777))
accepted, _ = server.accept()
client.sendall(b"unread")
waiting = socket.create_connection(("127.0.0.1", 7777))
six = socket.create_server(("::1", 7779), family=socket.AF_INET6)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 7778))
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.connect(("127.0.0.1", 7778))
sender.send(bytes(100))
packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88b5))
time.sleep(5000)
"#;

/// Makes `vmcore-K` (/proc/vmcore of a crashed guest in which the demo's programs ran) and `proc-K/` (its /proc just before).
#[derive(Debug, Args)]
pub struct Vmcore {
    /// The kernel: 6.1 or 6.12; both if none is named.
    #[arg(long)]
    kernel: Option<Series>,
    /// RAM in MiB, of which half is the crash kernel's.
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Where to put the files.
    #[arg(long, default_value = "target/cores")]
    to: PathBuf,
}

impl Vmcore {
    /// One of a kernel with so much RAM in MiB, into a directory.
    pub fn new(kernel: Series, memory: u32, to: PathBuf) -> Self {
        Self { kernel: Some(kernel), memory, to }
    }

    /// Runs it.
    pub fn run(self, global: &Global) -> Result<bool> {
        let lab = global.lab()?;
        for series in crate::series_or_all(self.kernel) {
            let config = MachineConfig {
                memory_mib: self.memory,
                crashkernel_mib: self.memory / 2,
                ..MachineConfig::new(series, global.accel())
            };
            let input = workload::with_input(&lab, &config)?;
            let release = lab.kernel(series)?.release;
            let mut guest = lab.start(&input, &format!("vmcore-{series}"))?;
            let agent = &mut guest.agent;
            agent.push(&lab::saver::build(&release, lab.cache())?, "/root/saver.ko", 0o644)?;
            agent.push(&lab.boot_initramfs(&input)?, "/root/initramfs", 0o644)?;
            agent.shell("insmod /root/saver.ko", Duration::from_secs(60))?;
            agent.load_crash_kernel(&format!("/boot/vmlinuz-{release}"), "/root/initramfs", CRASH_CMDLINE)?;
            let pids = workload::start(agent)?;
            agent.spawn(&Program {
                controlling_tty: true,
                ..Program::new(["bash", "-i"]).stdin("/dev/ttyS1").stdout("/dev/ttyS1")
            })?;
            agent.spawn(&Program::shell(&format!("exec python3 -c '{SOCKETS}'")))?;
            agent.wait(&pids, Duration::from_secs(5))?;
            ui::note("recording /proc");
            let record = agent.record()?;
            let to = build::workspace().join(&self.to);
            std::fs::create_dir_all(&to)?;
            let proc_dir = to.join(format!("proc-{series}"));
            let _ = std::fs::remove_dir_all(&proc_dir);
            record.write_to(&proc_dir)?;
            agent.panic(&Panic::default())?;
            ui::note("waiting for the crash kernel");
            agent.wait_hello(true, Duration::from_secs(120))?;
            ui::note("copying /proc/vmcore");
            let path = to.join(format!("vmcore-{series}"));
            let part = to.join(format!(".vmcore-{series}"));
            let mut file = File::create(&part)?;
            agent.read_pieces("/proc/vmcore", |piece| file.write_all(piece))?;
            drop(file);
            std::fs::rename(part, &path)?;
            ui::line(path.display().to_string());
        }
        ui::finish();
        Ok(true)
    }
}
