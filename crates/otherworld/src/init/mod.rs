//! The crash kernel's PID 1.
//!
//! It rebuilds the machine's surroundings (drivers, devices, file systems), has its [worker](crate::worker) read the dead kernel
//! and rebuild the processes, writes the report, and stays as a small init. Everything that may crash or hang is done by a
//! child, within a deadline; PID 1 itself only waits, mounts and writes.

mod console;
pub mod device;
mod memory;
mod modules;
pub mod mounts;
mod run;
mod shutdown;
mod stay;
pub mod steward;
mod supervise;
mod switch;
mod sys;
mod watchdog;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use arm::Manifest;
use arm::config::{FailureAction, FsckMode, KeepVmcore};
use arm::devices::BlockDevice;
use rustix::mount::MountFlags;
use rustix::system::RebootCommand;
use snapshot::Pid;

use crate::protocol::{FromWorker, Survey, ToWorker};
use crate::report::{Fate, Mark, MountFate, Report, State, uptime_ms};
use console::{mark, say};
use memory::MemoryWatch;
use supervise::Worker;
use watchdog::Watchdog;

/// Where the root file system is mounted before it becomes the root.
pub const NEW_ROOT: &str = "/newroot";

/// How much longer than its own deadline the worker has, to give up who is late and to let the others go.
const GIVING_UP: Duration = Duration::from_secs(10);

/// Seconds that PID 1 may take beyond the deadline of the whole and the delay before the configured action.
const WATCHDOG_GRACE: u64 = 60;

/// Runs the crash kernel's user space. Never returns: the end of PID 1 would be the next panic.
pub fn main() -> ! {
    if let Some(action) = steward::begin_anew() {
        shutdown::end(action);
    }
    let life = catch_unwind(|| {
        let mut life = Life::begin();
        // What is known must outlive a bug: whether there are processes that live.
        catch_unwind(AssertUnwindSafe(|| life.live())).unwrap_or_else(|_| life.go_on_after_a_bug())
    });
    shutdown::end(life.unwrap_or(FailureAction::Reboot))
}

/// What is known so far.
struct Life {
    report: Report,
    memory: MemoryWatch,
    began: Instant,
    /// The machine's root file system is at `/`.
    switched: bool,
    /// Processes of the dead kernel run: whatever fails from here on must not cost them their lives.
    released: bool,
    /// Those that run, as far as the worker has told.
    back: Vec<Pid>,
    /// Reboots should this process get stuck; called off once there is something to lose.
    watchdog: Option<Watchdog>,
    /// The configured commands to start at the end.
    after: Vec<String>,
    /// This is not PID 1, but goes on for it.
    is_steward: bool,
    /// PID 1 is what it was before the panic.
    first_is_back: bool,
}

impl Life {
    fn begin() -> Self {
        // Without these nothing else can be said or done; where one is missing, the steps below fail and say so.
        let surroundings = sys::mount_api_file_systems();
        console::open();
        let mut life = Self {
            report: Report { format: Report::FORMAT, started: crate::report::utc_now(), ..Report::default() },
            memory: MemoryWatch::new(),
            began: Instant::now(),
            switched: false,
            released: false,
            back: Vec::new(),
            watchdog: None,
            after: Vec::new(),
            is_steward: false,
            first_is_back: false,
        };
        life.mark("init");
        if let Err(error) = surroundings {
            life.trouble(format!("{error:#}"));
        }
        life.report.crash_kernel.release = rustix::system::uname().release().to_string_lossy().into_owned();
        life.report.generation = arm::generation(&arm::Root::default()).unwrap_or(0);
        life
    }

    fn mark(&mut self, name: &str) {
        let mark = mark(name);
        self.report.timeline.push(mark);
    }

    /// For the report's timeline only.
    fn note_time(&mut self, name: &str) {
        self.report.timeline.push(Mark { name: name.to_owned(), ms: uptime_ms() });
    }

    fn trouble(&mut self, text: String) {
        say(&text);
        self.report.failures.push(text);
    }

    /// From the first step to the end of this kernel; returns how that is to be.
    fn live(&mut self) -> FailureAction {
        if !Path::new("/proc/vmcore").exists() {
            self.trouble("there is no /proc/vmcore: this kernel was not started by a panic".into());
        }
        let manifest = match Manifest::load() {
            Ok(manifest) => manifest,
            Err(error) => {
                self.trouble(format!("cannot read {}: {error}", Manifest::PATH));
                self.mark("failed");
                return self.give_up(FailureAction::Reboot, Duration::from_secs(10));
            }
        };
        let config = manifest.config.clone();
        self.after = config.after.start.clone();
        let outcome = self.resurrect(&manifest);
        if let Err(error) = &outcome {
            if self.released {
                crate::report::went_on(&mut self.report.processes, &self.back);
            } else {
                run::kill_everybody();
            }
            self.trouble(format!("resurrection failed: {error:#}"));
            self.report.state = if self.released { State::Partial } else { State::Failed };
            self.mark("failed");
        }
        self.finish_report(&manifest);
        if outcome.is_err() && !self.released && self.keep_vmcore(&manifest) {
            self.save_report(&manifest);
        }
        if outcome.is_err() && !self.released && config.failure.action != FailureAction::Continue {
            return self.give_up(config.failure.action, Duration::from_secs(config.failure.delay));
        }
        if !self.switched {
            return self.give_up(FailureAction::Reboot, Duration::from_secs(config.failure.delay));
        }
        self.stay()
    }

    /// From here on nobody but an administrator ends the machine.
    fn stay(&mut self) -> FailureAction {
        self.watchdog = None;
        let after = std::mem::take(&mut self.after);
        if !self.is_steward {
            return stay::stay(&after);
        }
        // Otherwise PID 1 starts them.
        if self.first_is_back {
            stay::start_all(&after);
        }
        steward::end()
    }

    /// A bug of this process costs those that live nothing but their report.
    fn go_on_after_a_bug(&mut self) -> FailureAction {
        say("init has a bug");
        if self.released { self.stay() } else { FailureAction::Reboot }
    }

    /// Gives people the time to read, then ends.
    fn give_up(&mut self, action: FailureAction, delay: Duration) -> FailureAction {
        if action == FailureAction::Shell && self.switched {
            // People take their time.
            self.watchdog = None;
            run::shell();
            return FailureAction::Reboot;
        }
        // A shell is nothing without a root file system.
        let action = if action == FailureAction::Shell { FailureAction::Reboot } else { action };
        say(&format!("{action:?} in {} s", delay.as_secs()).to_lowercase());
        std::thread::sleep(delay);
        action
    }

    fn resurrect(&mut self, manifest: &Manifest) -> Result<()> {
        let deadlines = &manifest.config.deadlines;
        let whole = self.began + Duration::from_secs(deadlines.whole);
        let within = |seconds: u64| (Instant::now() + Duration::from_secs(seconds)).min(whole);

        sys::keep_old_pids_free(manifest.pid_max);
        // Its thread takes a PID too.
        let longest = deadlines.whole + deadlines.vmcore + manifest.config.failure.delay + WATCHDOG_GRACE;
        self.watchdog = Watchdog::start(Duration::from_secs(longest), RebootCommand::Restart);
        let Some(root) = manifest.devices.first() else { bail!("the manifest names no root device") };
        // The dead kernel is read while drivers probe and the file system is checked.
        let mut worker = Worker::start().context("cannot start the worker")?;
        modules::load(&manifest.modules, |text| say(&text));
        self.note_time("modules-loaded");
        let node = self.checked_root_device(root, manifest, whole);
        // Also when there is no disk: how the kernel died is worth knowing.
        let survey = self.survey(&mut worker, within(deadlines.autopsy));
        let node = node?;
        let old_mounts = survey.as_ref().map(|s| s.mounts.clone()).unwrap_or_default();
        let root_mount = old_mounts.iter().rfind(|m| m.mountpoint.as_bytes() == b"/");
        let flags = root_mount.map_or(MountFlags::empty(), |m| mounts::flags(m.flags));
        let note = mounts::mount_device(
            &node,
            Path::new(NEW_ROOT),
            &root.fs_type,
            flags,
            &root.options,
            within(deadlines.mount),
        )
        .with_context(|| format!("cannot mount {} as the root file system", node.display()))?;
        self.mark("root-mounted");
        if note.is_some() {
            let (mountpoint, fs_type) = ("/".into(), root.fs_type.as_str().into());
            self.report.mounts.push(MountFate { mountpoint, fs_type, mounted: true, note });
        }

        let holding = survey.is_ok() && self.hand_over_root(&mut worker, within(deadlines.mount));
        switch::root(Path::new(NEW_ROOT))?;
        self.switched = true;
        if let Ok(survey) = &survey
            && survey.with_first
            && let Err(error) = modules::load_all(&survey.modules, within(deadlines.mount))
        {
            self.trouble(format!("not all modules that were loaded are: {error:#}"));
        }
        let has_namespaces = survey.as_ref().is_ok_and(|s| s.has_namespaces);
        let with_first = survey.as_ref().is_ok_and(|s| s.with_first);
        let mut plan = mounts::plan(&old_mounts, &manifest.devices);
        if with_first {
            // Automounters come back, and with them their mount points.
            plan.retain(|step| step.fs_type.as_bytes() != b"autofs");
        }
        let can_wait = |step: &mounts::Step| !has_namespaces && !with_first && step.can_wait();
        let (late, now): (Vec<_>, Vec<_>) = plan.into_iter().partition(can_wait);
        // What they take must leave the processes their time.
        let mounted = whole.checked_sub(Duration::from_secs(deadlines.resurrect)).unwrap_or(whole);
        self.mount(now, manifest, mounted.max(within(deadlines.mount)));
        if root_mount.is_some_and(|m| m.peer_group != 0)
            && let Err(error) = mounts::share_all()
        {
            self.trouble(format!("mounts are not passed on to mount namespaces: {error}"));
        }
        sys::set_hostname(
            self.report.dead_kernel.as_ref().map(|k| k.nodename.as_bytes()).unwrap_or_default(),
        );
        if let Err(error) = sys::loopback_up() {
            self.trouble(format!("the loopback interface stays down: {error}"));
        }
        self.note_time("surroundings");

        let outcome = survey.and_then(|Survey { highest_pid, .. }| {
            if !holding {
                bail!("the worker ended before the root file system was mounted");
            }
            sys::continue_pids_after(highest_pid);
            if with_first {
                self.step_aside(&mut worker, longest)?;
            }
            let deadline = within(deadlines.resurrect);
            worker.send(&ToWorker::Go { time_left: deadline.saturating_duration_since(Instant::now()) })?;
            // Whatever comes next: how the machine died is on the disk from here on. The worker does not wait for the disk.
            self.save_report(manifest);
            let end = self.watch(&mut worker, deadline + GIVING_UP);
            if self.released {
                self.watchdog = None;
            }
            end
        });
        self.mount(late, manifest, whole);
        outcome
    }

    /// A child goes on from here, while PID 1 waits to be made into what it was. `longest`: seconds for the watchdog.
    fn step_aside(&mut self, worker: &mut Worker, longest: u64) -> Result<()> {
        // Its thread would not be in the child, and PID 1 must have none.
        self.watchdog = None;
        steward::step_aside(&self.after).context("cannot start a steward for PID 1")?;
        self.is_steward = true;
        worker.is_no_child();
        let left = Duration::from_secs(longest).saturating_sub(self.began.elapsed());
        self.watchdog = Watchdog::start(left, RebootCommand::Restart);
        Ok(())
    }

    /// Waits for the root device and checks its file system.
    fn checked_root_device(
        &mut self,
        root: &BlockDevice,
        manifest: &Manifest,
        whole: Instant,
    ) -> Result<PathBuf> {
        let config = &manifest.config;
        let within = |seconds: u64| (Instant::now() + Duration::from_secs(seconds)).min(whole);
        let node = device::wait_for(root, within(config.deadlines.root_device))?;
        self.note_time("root-device");
        if config.fsck.mode == FsckMode::Preen && manifest.fsck.contains(&root.fs_type) {
            mounts::fsck(&node, &root.fs_type, within(config.deadlines.fsck))?;
            self.note_time("root-checked");
        }
        Ok(node)
    }

    /// Waits until the worker has read the dead kernel; the last words first.
    fn survey(&mut self, worker: &mut Worker, deadline: Instant) -> Result<Survey> {
        loop {
            match worker.receive(deadline, &mut self.memory).context("reading the dead kernel")? {
                FromWorker::Panic { kernel, panic } => {
                    say(&format!("Linux {} died: {}", kernel.release, panic.message));
                    self.report.dead_kernel = Some(*kernel);
                    self.report.panic = Some(*panic);
                }
                FromWorker::Surveyed { survey, processes, findings } => {
                    self.report.processes = processes;
                    self.report.findings = findings;
                    return Ok(survey);
                }
                other => self.side_matter(other)?,
            }
        }
    }

    /// The worker takes hold of the new root, so that it can follow when this process has moved it.
    fn hand_over_root(&mut self, worker: &mut Worker, deadline: Instant) -> bool {
        if worker.send(&ToWorker::RootMounted(NEW_ROOT.into())).is_err() {
            return false;
        }
        loop {
            match worker.receive(deadline, &mut self.memory) {
                Ok(FromWorker::Holding) => return true,
                Ok(other) => {
                    if let Err(error) = self.side_matter(other) {
                        self.trouble(format!("{error:#}"));
                        return false;
                    }
                }
                Err(error) => {
                    self.trouble(format!("{error:#}"));
                    return false;
                }
            }
        }
    }

    fn mount(&mut self, steps: Vec<mounts::Step>, manifest: &Manifest, until: Instant) {
        for step in steps {
            let done = mounts::carry_out(&step, manifest, until);
            let (mounted, note) = match done {
                Ok(note) => (true, note),
                Err(error) => (false, Some(format!("{error:#}"))),
            };
            if let (false, Some(note)) = (mounted, &note) {
                say(&format!("{}: not mounted: {note}", step.mountpoint));
            }
            let (mountpoint, fs_type) = (step.mountpoint, step.fs_type);
            self.report.mounts.push(MountFate { mountpoint, fs_type, mounted, note });
        }
    }

    /// From `Go` until the worker has done what it can.
    fn watch(&mut self, worker: &mut Worker, deadline: Instant) -> Result<()> {
        loop {
            match worker.receive(deadline, &mut self.memory).context("rebuilding the processes")? {
                FromWorker::Done { processes, findings, pour, resurrection } => {
                    use crate::report::FateKind::{Failed, GivenUp, NotSelected};
                    let lost = processes.iter().any(|p| matches!(p.fate, Failed | GivenUp));
                    let is_back = |p: &Fate| !matches!(p.fate, Failed | GivenUp | NotSelected);
                    let back = processes.iter().any(is_back);
                    self.first_is_back = processes.iter().any(|p| p.pid == 1 && is_back(p));
                    self.report.state = if lost { State::Partial } else { State::Complete };
                    self.report.processes = processes;
                    self.report.findings = findings;
                    self.report.pour = pour;
                    self.report.resurrection = resurrection;
                    if let Err(error) = worker.end(Duration::from_secs(5)) {
                        self.trouble(format!("{error:#}"));
                    }
                    // The mark alone says only that the worker has come to this point.
                    self.released = back;
                    if !back {
                        bail!("no process has come back");
                    }
                    return Ok(());
                }
                other => self.side_matter(other)?,
            }
        }
    }

    /// What the worker may say at any time.
    fn side_matter(&mut self, message: FromWorker) -> Result<()> {
        match message {
            FromWorker::Mark(mark) => {
                console::print_mark(&mark);
                self.released |= mark.name == "released";
                self.report.timeline.push(mark);
            }
            FromWorker::Back { pid, comm } => {
                say(&format!("back: {pid} {comm}"));
                self.back.push(pid);
                self.released = true;
            }
            FromWorker::Note(text) => say(&text),
            FromWorker::Failed { why, processes, findings } => {
                self.report.processes = processes;
                self.report.findings = findings;
                bail!("{why}");
            }
            other => bail!("the worker said out of turn: {other:?}"),
        }
        Ok(())
    }

    /// Writes what is known to the disk; `false` when there is none, or it cannot be written.
    fn save_report(&mut self, manifest: &Manifest) -> bool {
        self.memory.look();
        self.report.crash_kernel.mem_total_kib = self.memory.total_kib;
        self.report.crash_kernel.mem_available_min_kib = self.memory.least_available_kib;
        if !self.switched {
            return false;
        }
        let settings = &manifest.config.report;
        match self.report.save(&settings.dir, settings.keep) {
            Ok(_) => true,
            Err(error) => {
                self.trouble(format!("cannot write the report into {}: {error}", settings.dir.display()));
                false
            }
        }
    }

    /// Keeps the dead kernel's own pages, as far as that is configured and there is room; whether there is something to report.
    fn keep_vmcore(&mut self, manifest: &Manifest) -> bool {
        let config = &manifest.config;
        if config.failure.vmcore == KeepVmcore::No || !self.switched {
            return false;
        }
        let path = self.report.vmcore_path(&config.report.dir);
        say(&format!("keeping the kernel's pages in {}", path.display()));
        let kept = crate::report::prune_vmcores(&config.report.dir, &path)
            .context("removing the one before")
            .and_then(|()| run::vmcore(&path, Instant::now() + Duration::from_secs(config.deadlines.vmcore)));
        match kept {
            Ok(()) => self.report.vmcore = Some(path),
            Err(error) => self.trouble(format!("the kernel's pages are not kept: {error:#}")),
        }
        true
    }

    /// The report in its final form, on the disk and on the console.
    fn finish_report(&mut self, manifest: &Manifest) {
        // The file is to contain the time, and the mark to mean that the file is there.
        let written = Mark { name: "report-written".into(), ms: uptime_ms() };
        self.report.timeline.push(written.clone());
        if self.save_report(manifest) {
            console::print_mark(&written);
        }
        for line in self.report.to_text().lines() {
            say(line);
        }
        if !self.switched {
            // There is no disk to keep it on.
            for record in self.report.panic.iter().flat_map(|p| p.log.iter().rev().take(60).rev()) {
                say(&format!(
                    "[{:5}.{:06}] {}",
                    record.ts_ns / 1_000_000_000,
                    record.ts_ns / 1000 % 1_000_000,
                    record.text
                ));
            }
        }
    }
}
