//! The lab's initramfs: from the kernel's first user process to the distribution's init.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::unistd::{chdir, chroot};

/// Where the agent lives on the guest's disk.
const AGENT: &str = "/usr/local/lib/lab/agent";
const DISK: &str = "/dev/vda";
const DISK_DEADLINE: Duration = Duration::from_secs(60);

const UNIT: &str = "[Unit]
Description=Otherworld lab agent
DefaultDependencies=no
After=systemd-udevd.service systemd-tmpfiles-setup.service multi-user.target
[Service]
ExecStart=/usr/local/lib/lab/agent serve
Restart=always
KillMode=process
OOMScoreAdjust=-1000
TasksMax=infinity
[Install]
WantedBy=multi-user.target
";

/// Does it all; comes back only with the reason why it could not. As a crash kernel's `/init` it hands over to the agent instead
/// of systemd: that is how the lab looks at `/proc/vmcore` without Otherworld.
pub fn run() -> io::Error {
    let crash_kernel = || Path::new("/proc/vmcore").exists();
    match prepare() {
        Ok(()) if crash_kernel() => Command::new(AGENT).arg("serve").exec(),
        Ok(()) => Command::new("/sbin/init").exec(),
        Err(error) => error,
    }
}

/// Ends the machine.
pub fn power_off() -> ! {
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
    std::process::exit(1)
}

fn prepare() -> io::Result<()> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(at)?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)?;
    }
    if fs::read_to_string("/proc/cmdline")?.split_whitespace().any(|word| word == "lab.probe") {
        println!("lab: probe ok");
        power_off();
    }
    load_modules(Path::new("/modules"))?;
    let start = Instant::now();
    while !Path::new(DISK).exists() {
        if start.elapsed() > DISK_DEADLINE {
            return Err(io::Error::other(format!("{DISK} did not appear in {} s", DISK_DEADLINE.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    fs::create_dir_all("/root")?;
    mount(Some(DISK), "/root", Some("ext4"), MsFlags::MS_RELATIME, None::<&str>)?;
    install(Path::new("/root"))?;
    for at in ["dev", "proc", "sys"] {
        let (from, to) = (format!("/{at}"), format!("/root/{at}"));
        mount(Some(from.as_str()), to.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    }
    chdir("/root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

/// Loads `*.ko` in the order of their names.
fn load_modules(dir: &Path) -> io::Result<()> {
    let mut files: Vec<_> = fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for path in files {
        match finit_module(fs::File::open(&path)?, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(error) => println!("lab: {}: {error}", path.display()),
        }
    }
    Ok(())
}

/// Puts this binary and its unit on the guest's disk.
fn install(root: &Path) -> io::Result<()> {
    let at = |path: &str| root.join(path.trim_start_matches('/'));
    let agent = at(AGENT);
    fs::create_dir_all(agent.parent().unwrap_or(root))?;
    fs::copy("/init", &agent)?;
    fs::write(at("/etc/systemd/system/lab-agent.service"), UNIT)?;
    let wants = at("/etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    let link = wants.join("lab-agent.service");
    // The link's target is an absolute path of the guest, not of here.
    if link.symlink_metadata().is_err() {
        std::os::unix::fs::symlink("/etc/systemd/system/lab-agent.service", link)?;
    }
    Ok(())
}
