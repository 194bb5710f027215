//! Makes the machine ready for a panic.
//!
//! *In*: the running machine (sysfs, procfs, `/lib/modules`, `/boot`) and `/etc/otherworld.toml`.
//! *Out*: a crash kernel with its initramfs, loaded by kexec_file_load(2); sysctls that turn trouble into a panic; and
//! `/var/lib/otherworld/armed.json`, which remembers what to put back. [`check`] says what the machine lacks, [`status`] whether
//! all this is still up to date.
//! *Never*: changes the boot loader or any file outside `/var/lib/otherworld`; runs anything once it has returned.

#![warn(missing_docs)]

mod checks;
pub mod cmdline;
pub mod config;
mod cpio;
pub mod devices;
pub mod elf;
mod fnmatch;
mod initramfs;
mod kernel_text;
mod kexec;
mod manifest;
pub mod modules;
mod root;
mod state;
pub mod sysctl;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

pub use checks::{Check, check, find_kernel_image, generation, release};
pub use config::{Config, ConfigError};
pub use initramfs::{BuildError, replace_file};
pub use manifest::Manifest;
pub use root::Root;
pub use state::{Armed, STATE_DIR, STATE_FILE, fingerprint};

use kexec::Slot;
use modules::ModuleTree;
use snapshot::KernelText;

/// What [`arm`] is asked to do beyond the configuration.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program that becomes the crash kernel's init, as it lies on the machine: static.
    pub init: PathBuf,
    /// The configuration's file, for [`status`] to see when it changes.
    pub config_path: PathBuf,
}

/// Why the machine could not be armed or disarmed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something that is needed is missing; the checks that failed.
    #[error("this machine cannot be armed:{}", list(.0))]
    NotPossible(Vec<Check>),
    /// A driver's module is not there.
    #[error("the crash kernel would not find its disk: {0}")]
    Module(#[from] modules::UnknownModule),
    /// The initramfs could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The derived command line is longer than the kernel takes.
    #[error(
        "the crash kernel's command line has {len} bytes, the kernel takes {max}; shorten extra_cmdline under [crash_kernel], or \
         the running kernel's command line",
        max = cmdline::MAX_LEN
    )]
    CommandLine {
        /// Bytes.
        len: usize,
    },
    /// The kernel refused.
    #[error("the kernel refused the crash kernel {}: {error}; {remedy}{aftermath}", kernel.display())]
    Refused {
        /// The image.
        kernel: PathBuf,
        #[allow(missing_docs)]
        error: io::Error,
        #[allow(missing_docs)]
        remedy: &'static str,
        /// What became of the crash kernel that was loaded before.
        aftermath: &'static str,
    },
    /// The crash kernel could not be unloaded.
    #[error("the kernel refused to unload the crash kernel: {error}; {remedy}")]
    Unload {
        #[allow(missing_docs)]
        error: io::Error,
        #[allow(missing_docs)]
        remedy: &'static str,
    },
    /// A sysctl.
    #[error("the crash kernel is loaded, but {0}; run as root, outside of containers")]
    Sysctl(sysctl::SysctlError),
    /// Whether the machine is armed cannot be told.
    #[error("cannot read {STATE_FILE}{}", if .0.kind() == io::ErrorKind::PermissionDenied { ": run as root" } else { "" })]
    State(#[source] io::Error),
    /// A file of ours.
    #[error("cannot {action} {}", path.display())]
    File {
        #[allow(missing_docs)]
        action: &'static str,
        #[allow(missing_docs)]
        path: PathBuf,
        #[allow(missing_docs)]
        source: io::Error,
    },
}

fn list(checks: &[Check]) -> String {
    checks.iter().map(|c| format!("\n  {}: {}\n    remedy: {}", c.name, c.detail, c.remedy)).collect()
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { action, path, source }
}

/// The initramfs that is loaded, as a file.
fn initramfs_path(root: &Root) -> PathBuf {
    root.join(STATE_DIR).join("crash-initramfs.img")
}

/// Makes the machine ready. Arming an armed machine arms it anew.
///
/// When it fails, the machine is as before: sysctls untouched, the former crash kernel loaded.
pub fn arm(root: &Root, config: &Config, options: &Options) -> Result<Armed, Error> {
    let failed: Vec<Check> =
        check(root, config, &options.init).into_iter().filter(|c| c.required && !c.ok).collect();
    if !failed.is_empty() {
        return Err(Error::NotPossible(failed));
    }
    tracing::info!("nothing is missing");
    let mut config = config.clone();
    for exe in config.resolve_programs(root) {
        tracing::warn!("there is no {exe}: the [[select]] entry that names it selects nothing");
    }
    let config = &config;
    let former = Armed::load(root).map_err(Error::State)?;
    let release = release(root);
    let kernel = find_kernel_image(root, config, &release).unwrap_or_default();
    let saver = load_saver(root, &release);
    let generation = generation(root).unwrap_or(0) + 1;
    let cmdline = derive_cmdline(root, config, &release, saver, generation);
    if cmdline.len() > cmdline::MAX_LEN {
        return Err(Error::CommandLine { len: cmdline.len() });
    }

    let image = build_initramfs(root, config, options, &release)?;
    tracing::info!("the initramfs has {} bytes", image.len());
    let path = initramfs_path(root);
    let fresh = path.with_extension("fresh");
    replace_file(&fresh, &image, 0o600).map_err(file_error("write", &fresh))?;
    tracing::info!("the initramfs is written");
    let replaced_foreign = former.as_ref().map_or(Slot::Crash.is_loaded(root), |f| f.replaced_foreign);
    if let Err(error) = load(root, &kernel, &fresh, &cmdline, former.as_ref()) {
        _ = std::fs::remove_file(&fresh);
        return Err(error);
    }
    std::fs::rename(&fresh, &path).map_err(file_error("write", &path))?;
    tracing::info!("the crash kernel is loaded: {cmdline}");

    let wanted = config.panic_on.sysctls();
    let changed = sysctl::set(root, &wanted).map_err(Error::Sysctl)?;
    // What an earlier arming has changed is still to be put back to what it was before that.
    let mut before = former.map(|f| f.sysctls_before).unwrap_or_default();
    for (name, value) in &changed {
        before.entry(name.clone()).or_insert_with(|| value.clone());
    }
    let armed = Armed {
        format: Armed::FORMAT,
        boot_id: state::boot_id(root),
        armed_at: state::now(),
        kernel_release: release,
        kernel,
        cmdline,
        initramfs_bytes: image.len() as u64,
        generation,
        saver,
        init: options.init.clone(),
        init_fingerprint: fingerprint(&root.join(&options.init)),
        config_path: options.config_path.clone(),
        config_fingerprint: fingerprint(&root.join(&options.config_path)),
        mounts_fingerprint: state::mounts_fingerprint(root),
        replaced_foreign,
        sysctls_before: before,
        sysctls_set: wanted,
    };
    if let Err(error) = armed.save(root) {
        // Nobody would remember to put them back.
        sysctl::restore(root, &changed, &armed.sysctls_set);
        return Err(file_error("write", Path::new(STATE_FILE))(error));
    }
    Ok(armed)
}

/// Loads the crash kernel; puts the former one back if the kernel refuses.
fn load(
    root: &Root,
    kernel: &Path,
    initramfs: &Path,
    cmdline: &str,
    former: Option<&Armed>,
) -> Result<(), Error> {
    let open = |path: &Path| File::open(path).map_err(file_error("open", path));
    let (kernel_file, initramfs_file) = (open(&root.join(kernel))?, open(initramfs)?);
    let refused = |error: io::Error, aftermath| Error::Refused {
        kernel: kernel.to_owned(),
        remedy: kexec::remedy(&error),
        error,
        aftermath,
    };
    let was_loaded = Slot::Crash.is_loaded(root);
    // The kernel drops the former crash kernel before it looks at the new one. A rehearsal in the other slot, if that is free, finds
    // out whether it will take these files while the former one is still safe.
    if was_loaded && !Slot::Reboot.is_loaded(root) {
        kexec::load(Slot::Reboot, &kernel_file, &initramfs_file, cmdline)
            .map_err(|e| refused(e, "; the crash kernel that was loaded before is still there"))?;
        kexec::unload(Slot::Reboot)
            .map_err(|error| Error::Unload { remedy: kexec::remedy(&error), error })?;
    }
    let Err(error) = kexec::load(Slot::Crash, &kernel_file, &initramfs_file, cmdline) else { return Ok(()) };
    if !was_loaded {
        return Err(refused(error, "; no crash kernel is loaded"));
    }
    let put_back = match former {
        Some(former) => File::open(root.join(&former.kernel))
            .and_then(|k| Ok((k, File::open(initramfs_path(root))?)))
            .and_then(|(k, i)| kexec::load(Slot::Crash, &k, &i, &former.cmdline))
            .is_ok(),
        None => load_foreign(),
    };
    Err(refused(
        error,
        if put_back {
            "; the crash kernel that was loaded before has been loaded again"
        } else {
            "; the crash kernel that was loaded before is gone: load it again with its own tool"
        },
    ))
}

/// Loads somebody else's crash kernel again: Debian's kdump-tools is the one to expect.
fn load_foreign() -> bool {
    Command::new("kdump-config").arg("load").output().is_ok_and(|out| out.status.success())
}

/// Loads the register saver where it is installed, and asks it where it saves.
fn load_saver(root: &Root, release: &str) -> Option<u64> {
    let parameter = format!("/sys/module/{}/parameters/phys", checks::SAVER);
    if !root.exists(&parameter) {
        ModuleTree::open(root, release).ok()?.load_order([checks::SAVER]).ok()?;
        match Command::new("modprobe").arg(checks::SAVER).output() {
            Ok(out) if out.status.success() => {}
            Ok(out) => {
                let text = String::from_utf8_lossy(&out.stderr).trim().to_owned();
                tracing::warn!("the register saver is installed but was not loaded: {text}");
            }
            Err(e) => tracing::warn!("the register saver is installed but modprobe could not be run: {e}"),
        }
    }
    root.read(&parameter).ok()?.parse().ok().filter(|&phys| phys != 0)
}

fn derive_cmdline(
    root: &Root,
    config: &Config,
    release: &str,
    saver: Option<u64>,
    generation: u32,
) -> String {
    let hz = checks::kernel_config(root, release)
        .and_then(|text| text.lines().find_map(|l| l.strip_prefix("CONFIG_HZ=")?.parse().ok()));
    let from_cpuinfo = || cmdline::lpj_from_bogomips(&root.read("/proc/cpuinfo").ok()?, hz?);
    let clock = root.read("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let log = state::kernel_log().unwrap_or_default();
    let facts = cmdline::Facts {
        lpj: cmdline::lpj_from_log(&log).or_else(from_cpuinfo),
        timer_found: cmdline::timer_found(&log),
        tsc_reliable: clock.is_ok_and(|c| c == "tsc"),
        tsc_khz: cmdline::tsc_khz_from_log(&log),
        saver,
        generation,
        extra: config.crash_kernel.extra_cmdline.clone(),
    };
    cmdline::derive(&root.read("/proc/cmdline").unwrap_or_default(), &facts)
}

/// Everything that a file system type needs loaded.
fn file_system_modules(fs_type: &str) -> Vec<String> {
    let mut all = vec![format!("fs-{fs_type}")];
    if matches!(fs_type, "ext2" | "ext3" | "ext4" | "xfs" | "f2fs") {
        // Asked for by the crypto layer when the file system is mounted; no module's dependency says so.
        all.push("crypto-crc32c".into());
    }
    all
}

fn build_initramfs(root: &Root, config: &Config, options: &Options, release: &str) -> Result<Vec<u8>, Error> {
    let read = |path: &Path| std::fs::read(root.join(path)).map_err(file_error("read", path));
    let tree = ModuleTree::open(root, release).map_err(file_error("read", Path::new("/lib/modules")))?;
    let devices = devices::mounted(root).map_err(|e| {
        Error::NotPossible(vec![Check {
            name: "root-device",
            ok: false,
            required: true,
            detail: e.to_string(),
            remedy: String::new(),
        }])
    })?;
    let mut wanted: Vec<String> = Vec::new();
    let mut optional: Vec<String> = Vec::new();
    let swap = devices::swap(root);
    for device in devices.iter().chain(&swap) {
        let drivers = devices::drivers(root, device.major, device.minor)
            .map_err(file_error("read", Path::new("/sys/dev/block")))?;
        wanted.extend(drivers.modules);
        optional.extend(drivers.aliases);
        optional.extend(file_system_modules(&device.fs_type));
    }
    wanted.extend(config.crash_kernel.extra_modules.iter().cloned());
    // Unbound devices and built-in file systems have aliases that no module answers to.
    wanted.extend(optional.into_iter().filter(|name| tree.load_order([name.as_str()]).is_ok()));
    let modules = tree.load_order(wanted.iter().map(String::as_str))?;

    let mut fsck = Vec::new();
    let mut files = BTreeSet::new();
    if config.crash_kernel.include_fsck && config.fsck.mode != config::FsckMode::Skip {
        // Only the root file system is checked before there is a root with everything in it.
        if let Some(fs_type) = devices.first().map(|d| d.fs_type.clone()) {
            let program = PathBuf::from(format!("/sbin/fsck.{fs_type}"));
            match elf::closure(root, &program) {
                Ok(closure) => {
                    files.extend(closure);
                    fsck.push(fs_type);
                }
                Err(e) => tracing::warn!("the root file system will be mounted without a check: {e}"),
            }
        }
    }
    tracing::info!("modules: {modules:?}; checkers and libraries: {files:?}");
    let kernel_text = kernel_text::record(root).unwrap_or_else(|error| {
        tracing::warn!("a change of the kernel's own code will not be noticed: {error}");
        KernelText::default()
    });
    let contents = initramfs::Contents {
        init: read(&options.init)?,
        modules: &modules,
        files: &files.into_iter().collect::<Vec<_>>(),
        kernel_text: &kernel_text,
        compress: config.crash_kernel.compress,
        manifest: Manifest {
            format: Manifest::FORMAT,
            kernel: release.to_owned(),
            modules: Vec::new(),
            devices,
            swap,
            fsck,
            kernel_text: Vec::new(),
            pid_max: root.read("/proc/sys/kernel/pid_max").ok().and_then(|v| v.parse().ok()).unwrap_or(32768),
            config: config.clone(),
        },
    };
    Ok(initramfs::build(root, contents)?)
}

/// What [`disarm`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Disarmed {
    /// A crash kernel was loaded and is no longer.
    pub unloaded: bool,
    /// Whether the crash kernel of another program that `arm` had replaced is loaded again; `None` when there was none.
    pub foreign_loaded: Option<bool>,
    /// Sysctls that were left alone, because somebody has changed them since, or because they could not be written.
    pub left_alone: Vec<String>,
}

/// Unloads the crash kernel and puts the sysctls back. Nothing to do is not an error.
pub fn disarm(root: &Root) -> Result<Disarmed, Error> {
    let mut done = Disarmed::default();
    let Some(armed) = Armed::load(root).map_err(Error::State)? else { return Ok(done) };
    if Slot::Crash.is_loaded(root) {
        kexec::unload(Slot::Crash).map_err(|error| Error::Unload { remedy: kexec::remedy(&error), error })?;
        done.unloaded = true;
        done.foreign_loaded = armed.replaced_foreign.then(load_foreign);
    }
    done.left_alone = sysctl::restore(root, &armed.sysctls_before, &armed.sysctls_set);
    Armed::forget(root).map_err(file_error("remove", Path::new(STATE_FILE)))?;
    Ok(done)
}

/// Whether the machine is ready.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// We have loaded a crash kernel, and one is loaded. The kernel does not tell whether it still is ours.
    pub armed: bool,
    /// Some crash kernel is loaded.
    pub crash_kernel_loaded: bool,
    /// How many panics ago the machine was cold-booted.
    pub generation: u32,
    /// What was armed, when, with what.
    pub details: Option<Armed>,
    /// What has changed since: arming again brings the crash kernel up to date.
    pub stale: Vec<String>,
    #[allow(missing_docs)]
    pub checks: Vec<Check>,
}

/// Looks whether the machine is armed, and whether that is up to date.
pub fn status(root: &Root, config: &Config, init: &Path) -> Result<Status, Error> {
    let details = Armed::load(root).map_err(Error::State)?;
    let crash_kernel_loaded = Slot::Crash.is_loaded(root);
    Ok(Status {
        armed: crash_kernel_loaded && details.is_some(),
        crash_kernel_loaded,
        generation: generation(root).unwrap_or(0),
        stale: details.as_ref().map(|d| d.stale(root)).unwrap_or_default(),
        checks: check(root, config, details.as_ref().map_or(init, |d| &d.init)),
        details,
    })
}
