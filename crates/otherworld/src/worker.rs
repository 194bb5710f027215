//! The process that reads the dead kernel and rebuilds its processes, on behalf of PID 1.
//!
//! It is a process of its own so that nothing that happens to it happens to PID 1: when it dies, the half-built processes die with
//! it (they are traced with PTRACE_O_EXITKILL), and PID 1 goes on with the failure that the configuration asks for.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use arm::Manifest;
use autopsy::Autopsy;
use ktypes::Kernel;
use resurrect::FileStale;
use resurrect::block::Rescued;
use snapshot::{Action, Finding, Reason, Severity, Snapshot};
use vmcore::Vmcore;

use crate::dead_memory::DeadMemory;
use crate::protocol::{Channel, FromWorker, Survey, ToWorker};
use crate::report::{Fate, FateKind, Mark, Pour, fates, uptime_ms};

/// The hidden command that makes this program the worker.
pub const COMMAND: &str = "resurrect-worker";
/// The hidden command that mounts one file system.
pub const MOUNT_COMMAND: &str = "mount-one";

/// Nice value while the dead kernel is read.
const READING_NICE: i32 = 15;

/// Does the whole work; every outcome is told to PID 1.
pub fn run(channel_fd: i32) -> Result<()> {
    // SAFETY: PID 1 made this descriptor for us and named it on the command line; nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(channel_fd) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).context("the channel to PID 1")?;
    let channel = Channel::new(UnixStream::from(socket))?;
    let mut worker = Worker { channel, findings: Vec::new(), processes: Vec::new() };
    let outcome = worker.work();
    if let Err(error) = outcome {
        let (processes, findings) =
            (std::mem::take(&mut worker.processes), std::mem::take(&mut worker.findings));
        worker.channel.send(&FromWorker::Failed { why: format!("{error:#}"), processes, findings })?;
    }
    Ok(())
}

struct Worker {
    channel: Channel,
    /// For the report, should the rest fail.
    findings: Vec<snapshot::Finding>,
    processes: Vec<Fate>,
}

impl Worker {
    fn mark(&mut self, name: &str) -> Result<()> {
        let mark = Mark { name: name.to_owned(), ms: uptime_ms() };
        Ok(self.channel.send(&FromWorker::Mark(mark))?)
    }

    fn work(&mut self) -> Result<()> {
        // The manifest lies in the initramfs, which will be out of reach.
        let manifest = Manifest::load().context("reading the manifest")?;
        // There is one CPU. PID 1 goes first with what then waits for devices and disks; reading fills the gaps.
        rustix::process::setpriority_process(None, READING_NICE).context("cannot become nice")?;
        let core = Vmcore::open(Path::new("/proc/vmcore"))?;
        self.mark("vmcore-open")?;
        let kernel = Kernel::open(core)?;
        let autopsy = Autopsy::new(&kernel);
        // How it died comes first: the rest may fail.
        let last_words = FromWorker::Panic {
            kernel: Box::new(autopsy.kernel_facts()),
            panic: Box::new(autopsy.panic_report()),
        };
        self.channel.send(&last_words)?;
        match manifest.kernel_text() {
            Ok(armed) => autopsy.check_kernel_text(&armed),
            Err(error) => {
                self.channel.send(&FromWorker::Note(format!("the kernel's code is not compared: {error}")))?
            }
        }
        let mut snapshot = autopsy.snapshot()?;
        snapshot::decide(&mut snapshot, &manifest.config.policy);
        self.mark("snapshot-complete")?;
        self.findings = snapshot.findings.clone();
        self.processes = fates(&snapshot, |_| {
            (FateKind::Failed, vec![Reason::new("aborted", "the resurrection ended before it was rebuilt")])
        });
        // Before there are processes that would inherit it.
        rustix::process::setpriority_process(None, 0).context("cannot become less nice")?;
        let highest_pid =
            snapshot.processes.iter().flat_map(|p| p.threads.iter().map(|t| t.tid).chain([p.pid])).max();
        let mut back = snapshot.processes.iter().filter(|p| p.decision.is_continue());
        let survey = Survey {
            mounts: snapshot.mounts.clone(),
            modules: snapshot.kernel.modules.clone(),
            highest_pid: highest_pid.unwrap_or(300),
            with_first: back.clone().any(|p| p.pid == 1),
            has_namespaces: back.any(|p| p.mount_namespace.is_some()),
        };
        let surveyed = FromWorker::Surveyed {
            survey,
            processes: self.processes.clone(),
            findings: self.findings.clone(),
        };
        self.channel.send(&surveyed)?;
        let (time_left, rescued) = self.enter_root(&mut snapshot)?;
        self.resurrect(&kernel, &mut snapshot, rescued, &manifest, time_left)
    }

    /// Follows PID 1 into the root file system, after reading what PID 1's report could overwrite there; returns how long the rest may take.
    fn enter_root(&mut self, snapshot: &mut Snapshot) -> Result<(Duration, Rescued)> {
        let ToWorker::RootMounted(path) = self.next()? else { bail!("PID 1 spoke out of turn") };
        // Held open, it can be entered when it is no longer reachable by name from the old root.
        let root = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        let mut rescued = Rescued::default();
        rescued.add(snapshot, Path::new(&path));
        self.channel.send(&FromWorker::Holding)?;
        let ToWorker::Go { time_left } = self.next()? else { bail!("PID 1 spoke out of turn") };
        rustix::process::fchdir(&root).context("cannot enter the root file system")?;
        rustix::process::chroot(".").context("cannot change the root")?;
        rustix::process::chdir("/").context("cannot enter /")?;
        Ok((time_left, rescued))
    }

    /// Waits for PID 1, which has its own deadlines and does not outlive a failure of its own: this one is for neatness.
    fn next(&mut self) -> Result<ToWorker> {
        let long = Instant::now() + Duration::from_secs(3600);
        self.channel.receive(long, || ()).context("waiting for PID 1")
    }

    fn resurrect(
        &mut self,
        kernel: &Kernel,
        snapshot: &mut Snapshot,
        rescued: Rescued,
        manifest: &Manifest,
        time_left: Duration,
    ) -> Result<()> {
        let config = &manifest.config;
        let options = resurrect::Options {
            deadline: time_left,
            process_deadline: Duration::from_secs(config.deadlines.process),
            whole_machine: config.policy.mode == snapshot::Mode::All,
            fallback: crate::init::steward::fallback(&config.after.start),
            generation: arm::generation(&arm::Root::default()).unwrap_or(0),
            failed_procedure: config.failed_procedure,
            integrity: config.policy.integrity,
            block_devices: block_devices(snapshot, manifest),
            leave_out: config.tmpfs.leave_out.clone(),
            own_places: vec![arm::STATE_DIR.into(), config.report.dir.clone()],
        };
        let memory = DeadMemory::new(kernel.vmcore());
        let mut report =
            resurrect::resurrect(snapshot, &memory, rescued, &options, &mut Told(&mut self.channel))?;
        let pour = Pour { bytes: report.poured_bytes, us: report.pour_time.as_micros() as u64 };
        let processes = std::mem::take(&mut report.outcomes).into_iter().map(fate).collect();
        let mut findings = snapshot.findings.clone();
        findings.append(&mut report.findings);
        let mut tell = |object: &str, lost: Vec<FileStale>, text: fn(&FileStale) -> String| {
            let finding = |lost| Finding {
                action: Action::Reported,
                ..Finding::new(Severity::Loss, None, object, text(&lost))
            };
            findings.extend(lost.into_iter().map(finding));
        };
        tell("writeback", std::mem::take(&mut report.files_stale), |file| {
            format!("{} may be older on the disk than programs left it: {}", file.path, file.why)
        });
        let plain = |lost: &FileStale| format!("{}: {}", lost.path, lost.why);
        tell("tmpfs", std::mem::take(&mut report.places_lost), plain);
        tell("hugetlb", std::mem::take(&mut report.pools_short), plain);
        tell("swap", std::mem::take(&mut report.swap_off), |area| {
            format!("the swap area {} is not in use: {}", area.path, area.why)
        });
        self.channel.send(&FromWorker::Done {
            processes,
            findings,
            pour: Some(pour),
            resurrection: serde_json::to_value(&report)?,
        })?;
        Ok(())
    }
}

/// Where the devices are now that swap areas are on.
fn block_devices(snapshot: &Snapshot, manifest: &Manifest) -> resurrect::swap::BlockDevices {
    let known = || manifest.swap.iter().chain(&manifest.devices);
    let found = snapshot.swap_areas.iter().filter_map(|area| {
        let number = (area.dev_major, area.dev_minor);
        let device = known().find(|device| (device.major, device.minor) == number)?;
        Some((number, crate::init::device::find(device)?))
    });
    found.collect()
}

fn fate(outcome: resurrect::Outcome) -> Fate {
    let (fate, reasons) = match outcome.fate {
        // That its procedure had it continue takes nothing from it.
        resurrect::Fate::Resumed { losses }
            if losses.iter().all(|loss| loss.code == resurrect::CRASH_PROCEDURE) =>
        {
            (FateKind::Resurrected, losses)
        }
        resurrect::Fate::Resumed { losses } => (FateKind::ResurrectedWithLosses, losses),
        resurrect::Fate::Restarted { losses } => (FateKind::Restarted, losses),
        resurrect::Fate::Ended { losses } => (FateKind::Ended, losses),
        resurrect::Fate::GaveUp { reasons } => (FateKind::GivenUp, reasons),
        resurrect::Fate::NotSelected { why } => {
            (FateKind::NotSelected, vec![Reason::new("not-selected", why)])
        }
        resurrect::Fate::Failed { step, reason } => {
            (FateKind::Failed, vec![Reason::new("failed", format!("{step}: {reason}"))])
        }
    };
    Fate { pid: outcome.pid, ppid: outcome.ppid, comm: outcome.comm, fate, reasons }
}

/// Tells PID 1 how it goes. Should PID 1 be gone, nothing matters any more: errors are left alone.
struct Told<'a>(&'a mut Channel);

impl resurrect::Progress for Told<'_> {
    fn step(&mut self, step: resurrect::Step<'_>) {
        use resurrect::Step;
        let mark = |name: &str| FromWorker::Mark(Mark { name: name.to_owned(), ms: uptime_ms() });
        let message = match step {
            Step::FilesReopened => mark("files-reopened"),
            Step::Skeletons { .. } => mark("skeletons"),
            Step::Poured { .. } => mark("poured"),
            Step::Released => mark("released"),
            Step::Back { pid, comm } => FromWorker::Back { pid, comm: comm.clone() },
            Step::Lost { pid, comm, why } => FromWorker::Note(format!("lost: {pid} {comm}: {why}")),
            Step::Rebuilt { .. } => return,
        };
        _ = self.0.send(&message);
    }
}
