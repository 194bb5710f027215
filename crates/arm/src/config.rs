//! `/etc/otherworld.toml`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use snapshot::{FailedProcedure, LiveFpu, Mode, Policy, Selector};
use toml::Spanned;

use crate::Root;
use crate::sysctl::Sysctls;

/// The annotated default configuration, as a file that can be edited.
pub const DEFAULT: &str = include_str!("default.toml");

/// Where the configuration lies.
pub const PATH: &str = "/etc/otherworld.toml";

/// A configuration, checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Which processes go on; user names are resolved.
    pub policy: Policy,
    /// What becomes of a process whose crash procedure fails.
    #[serde(default)]
    pub failed_procedure: FailedProcedure,
    #[allow(missing_docs)]
    pub deadlines: Deadlines,
    #[allow(missing_docs)]
    pub failure: Failure,
    #[allow(missing_docs)]
    pub fsck: Fsck,
    #[allow(missing_docs)]
    #[serde(default)]
    pub tmpfs: Tmpfs,
    #[allow(missing_docs)]
    pub after: After,
    #[allow(missing_docs)]
    pub crash_kernel: CrashKernel,
    #[allow(missing_docs)]
    pub panic_on: PanicOn,
    #[allow(missing_docs)]
    pub report: Report,
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    mode: Mode,
    select: Vec<Spanned<Selector>>,
    never: Vec<Spanned<Selector>>,
    never_defaults: bool,
    live_fpu: LiveFpu,
    failed_procedure: FailedProcedure,
    integrity: Integrity,
    deadlines: Deadlines,
    failure: Failure,
    fsck: Fsck,
    tmpfs: Tmpfs,
    after: After,
    crash_kernel: CrashKernel,
    panic_on: PanicOn,
    report: Report,
}

impl Default for File {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            select: Vec::new(),
            never: Vec::new(),
            never_defaults: true,
            live_fpu: LiveFpu::default(),
            failed_procedure: FailedProcedure::default(),
            integrity: Integrity::default(),
            deadlines: Deadlines::default(),
            failure: Failure::default(),
            fsck: Fsck::default(),
            tmpfs: Tmpfs::default(),
            after: After::default(),
            crash_kernel: CrashKernel::default(),
            panic_on: PanicOn::default(),
            report: Report::default(),
        }
    }
}

/// What doubt about a process's state leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Integrity {
    policy: snapshot::Integrity,
}

/// How long each step of a resurrection may take, seconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// Until the root file system's device is there.
    pub root_device: u64,
    /// The check of one file system.
    pub fsck: u64,
    /// The mounting of one file system.
    pub mount: u64,
    /// Reading the dead kernel.
    pub autopsy: u64,
    /// Rebuilding all processes.
    pub resurrect: u64,
    /// Rebuilding one process.
    pub process: u64,
    /// Everything, from the crash kernel's start on.
    pub whole: u64,
    /// Keeping the kernel's pages when nothing has come back; comes on top of the whole.
    pub vmcore: u64,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            root_device: 30,
            fsck: 120,
            mount: 30,
            autopsy: 30,
            resurrect: 120,
            process: 20,
            whole: 300,
            vmcore: 120,
        }
    }
}

/// What the crash kernel's init does when the resurrection as a whole fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureAction {
    /// Reboot, as kdump would.
    #[default]
    Reboot,
    /// Power off.
    Halt,
    /// A shell on the console.
    Shell,
    /// Start the commands under `[after]` all the same.
    Continue,
}

/// What is kept of the dead kernel's memory when nothing has come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeepVmcore {
    /// Nothing.
    No,
    /// The kernel's own pages, beside the report, if there is room.
    #[default]
    Kernel,
}

/// `[failure]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Failure {
    #[allow(missing_docs)]
    pub action: FailureAction,
    /// Seconds before it.
    pub delay: u64,
    #[allow(missing_docs)]
    pub vmcore: KeepVmcore,
}

impl Default for Failure {
    fn default() -> Self {
        Self { action: FailureAction::Reboot, delay: 5, vmcore: KeepVmcore::Kernel }
    }
}

/// Whether file systems are checked before they are mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FsckMode {
    /// `fsck -p`: repairs what is safe to repair.
    #[default]
    Preen,
    /// No check.
    Skip,
}

/// `[fsck]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fsck {
    #[allow(missing_docs)]
    pub mode: FsckMode,
}

/// `[tmpfs]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tmpfs {
    /// Absolute paths that are not filled again unless PID 1 comes back: programs that begin anew make them themselves.
    pub leave_out: Vec<PathBuf>,
}

impl Default for Tmpfs {
    fn default() -> Self {
        Self { leave_out: ["/run/systemd", "/run/udev", "/run/initctl"].map(PathBuf::from).to_vec() }
    }
}

/// `[after]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct After {
    /// Command lines, run by the shell.
    pub start: Vec<String>,
}

/// `[crash_kernel]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CrashKernel {
    /// Path of the image, or `auto`.
    pub image: String,
    /// Appended to the derived command line.
    pub extra_cmdline: String,
    /// Modules beside those that the mounted file systems need.
    pub extra_modules: Vec<String>,
    /// Whether the initramfs brings fsck.
    pub include_fsck: bool,
    /// Whether the initramfs is compressed.
    pub compress: bool,
}

impl Default for CrashKernel {
    fn default() -> Self {
        Self {
            image: "auto".into(),
            extra_cmdline: String::new(),
            extra_modules: Vec::new(),
            include_fsck: true,
            compress: true,
        }
    }
}

/// `[panic_on]`: what is to end in a panic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct PanicOn {
    pub oops: bool,
    pub soft_lockup: bool,
    pub hard_lockup: bool,
    pub hung_task: bool,
    pub nmi: bool,
    /// Seconds until the machine reboots when the crash kernel cannot be started.
    pub reboot_after: u32,
}

impl Default for PanicOn {
    fn default() -> Self {
        Self {
            oops: true,
            soft_lockup: true,
            hard_lockup: true,
            hung_task: false,
            nmi: true,
            reboot_after: 10,
        }
    }
}

impl PanicOn {
    /// The sysctls to set. What is `false` here is left as it is.
    pub fn sysctls(&self) -> Sysctls {
        let switches = [
            (self.oops, "kernel.panic_on_oops"),
            (self.soft_lockup, "kernel.softlockup_panic"),
            (self.hard_lockup, "kernel.hardlockup_panic"),
            (self.hung_task, "kernel.hung_task_panic"),
            (self.nmi, "kernel.unknown_nmi_panic"),
            (self.nmi, "kernel.panic_on_unrecovered_nmi"),
        ];
        let on = switches.iter().filter(|(wanted, _)| *wanted);
        let mut all: Sysctls = on.map(|(_, name)| ((*name).to_owned(), "1".to_owned())).collect();
        all.insert("kernel.panic".into(), self.reboot_after.to_string());
        all
    }
}

/// `[report]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Report {
    /// Directory of the reports.
    pub dir: PathBuf,
    /// How many are kept.
    pub keep: usize,
}

impl Default for Report {
    fn default() -> Self {
        Self { dir: "/var/lib/otherworld/reports".into(), keep: 20 }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file is there and cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        #[allow(missing_docs)]
        path: PathBuf,
        #[allow(missing_docs)]
        source: io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong kind. The text points at the place.
    #[error("{}, line {line}: {message}\n  `otherworld arm --print-config` prints all keys with their meaning", path.display())]
    Syntax {
        #[allow(missing_docs)]
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        #[allow(missing_docs)]
        message: String,
    },
    /// Understood, but cannot be meant.
    #[error("{}, line {line}: {message}; {remedy}", path.display())]
    Meaning {
        #[allow(missing_docs)]
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        #[allow(missing_docs)]
        message: String,
        #[allow(missing_docs)]
        remedy: &'static str,
    },
}

/// Never brought back unless `never_defaults = false`.
fn built_in_never(mode: Mode) -> Vec<Selector> {
    let exe = |path: &str| Selector { exe: Some(path.to_owned()), ..Selector::default() };
    let ours = ["/usr/local/sbin/otherworld", "/usr/sbin/otherworld", "/usr/bin/otherworld"].map(exe);
    if mode == Mode::All {
        return ours.into();
    }
    let unit = |name: &str| Selector { unit: Some(name.to_owned()), ..Selector::default() };
    let mut all = vec![Selector { pid: Some(1), ..Selector::default() }];
    // PID 1 and the per-user instances are the same program.
    all.extend(["/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/usr/sbin/init"].map(exe));
    all.extend(
        [
            "systemd-journald.service",
            "systemd-udevd.service",
            "systemd-logind.service",
            "systemd-networkd.service",
            "systemd-resolved.service",
            "systemd-timesyncd.service",
            "systemd-userdbd.service",
            "systemd-oomd.service",
            "systemd-machined.service",
            "dbus.service",
            "dbus-broker.service",
        ]
        .map(unit),
    );
    all.extend(
        [
            "/usr/bin/udevadm",
            "/usr/bin/dbus-daemon",
            "/usr/sbin/agetty",
            "/sbin/agetty",
            "/usr/bin/login",
            "/bin/login",
        ]
        .map(exe),
    );
    all.extend(ours);
    all
}

impl Default for Config {
    fn default() -> Self {
        Self::from_file(
            File::default(),
            Policy { never: built_in_never(Mode::default()), ..Policy::default() },
        )
    }
}

impl Config {
    fn from_file(file: File, policy: Policy) -> Self {
        Self {
            policy,
            failed_procedure: file.failed_procedure,
            deadlines: file.deadlines,
            failure: file.failure,
            fsck: file.fsck,
            tmpfs: file.tmpfs,
            after: file.after,
            crash_kernel: file.crash_kernel,
            panic_on: file.panic_on,
            report: file.report,
        }
    }

    /// Reads the file at `path`; the defaults when there is none. User names are looked up in `/etc/passwd`.
    pub fn load(root: &Root, path: &Path) -> Result<Self, ConfigError> {
        let text = match std::fs::read_to_string(root.join(path)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && path == Path::new(PATH) => String::new(),
            other => other.map_err(|source| ConfigError::Io { path: path.to_owned(), source })?,
        };
        let users = users(&std::fs::read_to_string(root.join("/etc/passwd")).unwrap_or_default());
        Self::parse(&text, path, &users)
    }

    /// Replaces symbolic links to programs by what they lead to, as the kernel knows programs. Returns the selected ones that do
    /// not exist.
    pub(crate) fn resolve_programs(&mut self, root: &Root) -> Vec<String> {
        let resolve = |exe: &mut String| {
            let real = std::fs::canonicalize(root.join(&*exe)).ok().and_then(|real| root.strip(&real));
            match real.as_ref().and_then(|real| real.to_str()) {
                Some(real) => {
                    *exe = real.to_owned();
                    true
                }
                None => false,
            }
        };
        // Not every machine has what is never brought back.
        self.policy.never.iter_mut().filter_map(|s| s.exe.as_mut()).for_each(|exe| _ = resolve(exe));
        let selected = self.policy.select.iter_mut().filter_map(|s| s.exe.as_mut());
        selected.filter_map(|exe| (!resolve(exe)).then(|| exe.clone())).collect()
    }

    /// Parses and checks a configuration. `path` is for the errors, `users` maps the machine's user names to their ids.
    pub fn parse(text: &str, path: &Path, users: &BTreeMap<String, u32>) -> Result<Self, ConfigError> {
        let line_at = |offset: usize| text.get(..offset).unwrap_or(text).matches('\n').count() + 1;
        let mut file: File = toml::from_str(text).map_err(|e| ConfigError::Syntax {
            path: path.to_owned(),
            line: e.span().map_or(1, |s| line_at(s.start)),
            message: e.message().to_owned(),
        })?;
        let meaning = |line, message: String, remedy| ConfigError::Meaning {
            path: path.to_owned(),
            line,
            message,
            remedy,
        };
        let key_line = |key: &str| {
            let position = text.lines().position(|l| l.trim_start().starts_with(key));
            position.map_or(1, |n| n + 1)
        };

        let mut wanted_users = BTreeMap::new();
        let mut take = |entries: Vec<Spanned<Selector>>, list| {
            let mut out = Vec::new();
            for entry in entries {
                let line = line_at(entry.span().start);
                let selector = entry.into_inner();
                if selector == Selector::default() {
                    let message = format!("this [[{list}]] entry is empty");
                    return Err(meaning(line, message, "give it at least one of unit, exe, user, pid"));
                }
                if let Some(exe) = &selector.exe
                    && !exe.starts_with('/')
                {
                    let message = format!("exe = \"{exe}\" is not an absolute path");
                    return Err(meaning(line, message, "write the whole path, as /proc/PID/exe shows it"));
                }
                if let Some(unit) = &selector.unit
                    && !unit.contains('.')
                {
                    let message = format!("unit = \"{unit}\" is not the whole name of a unit");
                    return Err(meaning(line, message, "write it with its suffix, such as .service"));
                }
                if let Some(name) = &selector.user {
                    let id = users.get(name).copied().or_else(|| name.parse().ok()).ok_or_else(|| {
                        let message = format!("there is no user {name} in /etc/passwd");
                        meaning(line, message, "correct the name, or write the user's number")
                    })?;
                    wanted_users.insert(name.clone(), id);
                }
                if selector.pid.is_some_and(|pid| pid <= 0) {
                    return Err(meaning(line, "a PID is a positive number".into(), "correct it"));
                }
                out.push(selector);
            }
            Ok(out)
        };
        let select = take(std::mem::take(&mut file.select), "select")?;
        let mut never = take(std::mem::take(&mut file.never), "never")?;
        if file.never_defaults {
            never.extend(built_in_never(file.mode));
        }

        let d = &file.deadlines;
        let deadlines = [
            ("root_device", d.root_device),
            ("fsck", d.fsck),
            ("mount", d.mount),
            ("autopsy", d.autopsy),
            ("resurrect", d.resurrect),
            ("process", d.process),
            ("whole", d.whole),
            ("vmcore", d.vmcore),
        ];
        if let Some((key, _)) = deadlines.iter().find(|(_, seconds)| !(1..=86_400).contains(seconds)) {
            let message = format!("the deadline {key} must lie between 1 and 86400 seconds");
            return Err(meaning(key_line(key), message, "every step needs an end"));
        }
        if file.failure.delay > 3600 {
            let message = "the delay before the action must not be longer than 3600 seconds".to_owned();
            return Err(meaning(key_line("delay"), message, "shorten it"));
        }
        if file.tmpfs.leave_out.iter().any(|path| !path.is_absolute()) {
            let message = "[tmpfs] leave_out has a path that is not absolute".to_owned();
            return Err(meaning(key_line("leave_out"), message, "write the whole path"));
        }
        if !file.report.dir.is_absolute() {
            let message = "[report] dir is not an absolute path".to_owned();
            return Err(meaning(key_line("dir"), message, "write the whole path"));
        }
        let policy = Policy {
            mode: file.mode,
            select,
            never,
            live_fpu: file.live_fpu,
            integrity: file.integrity.policy,
            users: wanted_users,
        };
        Ok(Self::from_file(file, policy))
    }
}

/// User names and ids from the text of `/etc/passwd`.
fn users(passwd: &str) -> BTreeMap<String, u32> {
    let entry = |line: &str| {
        let mut fields = line.split(':');
        Some((fields.next()?.to_owned(), fields.nth(1)?.parse().ok()?))
    };
    passwd.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(
            text,
            Path::new("/etc/otherworld.toml"),
            &users("root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/:\n"),
        )
    }

    fn error(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_annotated_file_says_what_the_defaults_are() {
        assert_eq!(parse(DEFAULT).unwrap(), Config::default());
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn every_key_can_be_set() {
        let config = parse(
            r#"
            mode = "programs"
            live_fpu = "resume-anyway"
            never_defaults = false
            [[select]]
            exe = "/usr/bin/xz"
            user = "alice"
            [[never]]
            unit = "cron.service"
            [failure]
            action = "continue"
            [tmpfs]
            leave_out = ["/run/mine"]
            [after]
            start = ["/usr/local/sbin/agent"]
            [deadlines]
            whole = 60
            [integrity]
            policy = "permissive"
            "#,
        )
        .unwrap();
        assert_eq!(config.policy.mode, Mode::Programs);
        assert_eq!(config.policy.live_fpu, LiveFpu::ResumeAnyway);
        assert_eq!(config.policy.integrity, snapshot::Integrity::Permissive);
        assert_eq!(config.policy.never.len(), 1);
        assert_eq!(config.policy.users["alice"], 1000);
        assert_eq!(config.failure.action, FailureAction::Continue);
        assert_eq!(config.tmpfs.leave_out, [Path::new("/run/mine")]);
        assert!(error("[tmpfs]\nleave_out = [\"run\"]\n").contains("line 2: [tmpfs] leave_out"));
        assert_eq!((config.deadlines.whole, config.deadlines.fsck), (60, 120));
    }

    #[test]
    fn the_whole_machine_is_all_but_ourselves() {
        let never = |text| parse(text).unwrap().policy.never;
        let is_pid_1 = |s: &Selector| s.pid == Some(1);
        assert!(never("mode = \"programs\"").iter().any(is_pid_1));
        let whole = never("mode = \"all\"");
        assert!(whole.iter().all(|s| s.exe.as_ref().is_some_and(|exe| exe.ends_with("/otherworld"))));
        assert!(never("mode = \"all\"\nnever_defaults = false").is_empty());
    }

    #[test]
    fn errors_name_the_line() {
        let e = error("mode = \"all\"\n\n[failure]\nacton = \"reboot\"\n");
        assert!(e.starts_with("/etc/otherworld.toml, line 4: unknown field `acton`"), "{e}");
        let e = error("mode = \"all\"\n[failure]\naction = \"explode\"\n");
        assert!(e.contains("line 3:") && e.contains("explode"), "{e}");
        assert!(error("mode = \n").contains("line 1:"));
    }

    #[test]
    fn errors_name_the_remedy() {
        let e = error("[[select]]\nuser = \"bob\"\n");
        assert_eq!(
            e,
            "/etc/otherworld.toml, line 1: there is no user bob in /etc/passwd; correct the name, or write the user's number"
        );
        assert!(error("[[select]]\n").contains("at least one of unit, exe, user, pid"));
        assert!(
            error("\n[[never]]\nexe = \"xz\"\n").contains("line 2: exe = \"xz\" is not an absolute path")
        );
        assert!(
            error("\n[[select]]\nunit = \"cron\"\n")
                .contains("line 2: unit = \"cron\" is not the whole name")
        );
        assert!(error("[deadlines]\nfsck = 0\n").contains("line 2: the deadline fsck"));
        assert!(error("[failure]\ndelay = 3601\n").contains("line 2: the delay"));
    }

    #[test]
    fn programs_are_named_as_the_kernel_names_them() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().canonicalize().unwrap());
        std::fs::create_dir_all(root.join("/usr/bin")).unwrap();
        std::fs::write(root.join("/usr/bin/python3.11"), "").unwrap();
        std::os::unix::fs::symlink("python3.11", root.join("/usr/bin/python3")).unwrap();
        let text = "[[select]]\nexe = \"/usr/bin/python3\"\n[[select]]\nexe = \"/usr/bin/none\"\n\
                    [[never]]\nexe = \"/usr/bin/python3\"\n";
        let mut config = parse(text).unwrap();
        assert_eq!(config.resolve_programs(&root), ["/usr/bin/none"]);
        assert_eq!(config.policy.select[0].exe.as_deref(), Some("/usr/bin/python3.11"));
        assert_eq!(config.policy.select[1].exe.as_deref(), Some("/usr/bin/none"));
        assert_eq!(config.policy.never[0].exe.as_deref(), Some("/usr/bin/python3.11"));
    }

    #[test]
    fn numbers_are_users_too() {
        assert_eq!(parse("[[select]]\nuser = \"4242\"\n").unwrap().policy.users["4242"], 4242);
    }

    #[test]
    fn sysctls_follow_the_switches() {
        let mut panic_on = PanicOn::default();
        assert_eq!(panic_on.sysctls()["kernel.panic_on_oops"], "1");
        assert!(!panic_on.sysctls().contains_key("kernel.hung_task_panic"));
        panic_on.oops = false;
        assert!(!panic_on.sysctls().contains_key("kernel.panic_on_oops"), "left as it is");
    }

    #[test]
    fn a_missing_file_is_the_default_only_at_the_usual_place() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        assert_eq!(Config::load(&root, Path::new(PATH)).unwrap(), Config::default());
        let error = Config::load(&root, Path::new("/etc/other.toml")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /etc/other.toml");
    }
}
