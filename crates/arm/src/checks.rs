//! Can this machine do it? Each thing that is missing is named with its remedy.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::Config;
use crate::modules::ModuleTree;
use crate::{Root, STATE_DIR, cmdline, devices, elf};

/// Least memory in which a crash kernel with our initramfs starts, MiB.
const MIN_CRASH_MIB: u64 = 128;
/// What the initramfs may need on disk, MiB, the former one beside it.
const MIN_FREE_MIB: u64 = 64;

/// The answer to one question about the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// For programs: stable, kebab-case.
    pub name: &'static str,
    /// Whether it is as it should be.
    pub ok: bool,
    /// Whether arming is impossible without it.
    pub required: bool,
    /// What was found.
    pub detail: String,
    /// What to do; empty when `ok`.
    pub remedy: String,
}

impl Check {
    fn required(name: &'static str, found: Result<String, (String, String)>) -> Self {
        let ok = found.is_ok();
        let (detail, remedy) = match found {
            Ok(detail) => (detail, String::new()),
            Err((detail, remedy)) => (detail, remedy),
        };
        Self { name, ok, required: true, detail, remedy }
    }

    fn advised(name: &'static str, found: Result<String, (String, String)>) -> Self {
        Self { required: false, ..Self::required(name, found) }
    }
}

fn missing(detail: impl Into<String>, remedy: impl Into<String>) -> Result<String, (String, String)> {
    Err((detail.into(), remedy.into()))
}

/// Asks all questions. `init` is the program that is to become the crash kernel's init.
pub fn check(root: &Root, config: &Config, init: &Path) -> Vec<Check> {
    let release = release(root);
    vec![
        Check::required("crashkernel", crashkernel(root)),
        Check::required("kexec-allowed", kexec_allowed(root)),
        Check::required("kernel-features", kernel_features(root, &release)),
        Check::required("btf", btf(root)),
        Check::required("kernel-image", kernel_image(root, config, &release)),
        Check::required("modules", modules(root, &release)),
        Check::required("root-device", root_device(root)),
        Check::required("static-init", static_init(root, init)),
        Check::required("free-space", free_space(root)),
        Check::advised("kernel-text", kernel_text(root)),
        Check::advised("register-saver", register_saver(root, &release)),
        Check::advised("kdump-tools", kdump_tools(root)),
    ]
}

/// `uname -r`
pub fn release(root: &Root) -> String {
    root.read("/proc/sys/kernel/osrelease").unwrap_or_default()
}

fn crashkernel(root: &Root) -> Result<String, (String, String)> {
    if let Some(generation) = generation(root).filter(|&g| g > 0) {
        return missing(
            format!(
                "this is a crash kernel already (generation {generation}); it has no memory for another one"
            ),
            "reboot into the main kernel and arm there",
        );
    }
    let remedy = "add `crashkernel=512M` to GRUB_CMDLINE_LINUX_DEFAULT in /etc/default/grub, run `update-grub`, and reboot";
    let bytes: u64 = root.read("/sys/kernel/kexec_crash_size").ok().and_then(|v| v.parse().ok()).unwrap_or(0);
    let mib = bytes >> 20;
    let asked = root.read("/proc/cmdline").unwrap_or_default();
    match (mib, cmdline::value(&asked, "crashkernel")) {
        (0, None) => missing("no memory is reserved for a crash kernel", remedy),
        (0, Some(value)) => missing(
            format!("crashkernel={value} is on the command line, but the kernel could not reserve it"),
            "ask for less, or give the machine more memory; `dmesg | grep -i crashkernel` has the reason",
        ),
        (mib, _) if mib < MIN_CRASH_MIB => missing(
            format!(
                "only {mib} MiB are reserved; the crash kernel needs {MIN_CRASH_MIB} MiB and room for the processes"
            ),
            remedy,
        ),
        (mib, _) => Ok(format!("{mib} MiB reserved")),
    }
}

/// How many panics ago the machine was cold-booted; `None` when this is no kernel of ours.
pub fn generation(root: &Root) -> Option<u32> {
    cmdline::value(&root.read("/proc/cmdline").ok()?, "otherworld.generation")?.parse().ok()
}

fn kexec_allowed(root: &Root) -> Result<String, (String, String)> {
    if root.read("/proc/sys/kernel/kexec_load_disabled").is_ok_and(|v| v == "1") {
        return missing(
            "the sysctl kernel.kexec_load_disabled is 1, which lasts until the next boot",
            "remove it from /etc/sysctl.conf and /etc/sysctl.d, and reboot",
        );
    }
    match root.read("/sys/kernel/security/lockdown").unwrap_or_default() {
        mode if mode.contains("[confidentiality]") => missing(
            "the kernel is locked down for confidentiality: /proc/vmcore cannot be read",
            "boot without lockdown=confidentiality",
        ),
        mode if mode.contains("[integrity]") => {
            Ok("locked down for integrity: the kernel image must be signed".into())
        }
        _ => Ok("allowed".into()),
    }
}

/// The kernel's build configuration, where the machine has it.
pub fn kernel_config(root: &Root, release: &str) -> Option<String> {
    let plain = [format!("/boot/config-{release}"), format!("/lib/modules/{release}/config")];
    plain.iter().find_map(|path| root.read(path).ok()).or_else(|| {
        let mut text = String::new();
        let packed = std::fs::File::open(root.join("/proc/config.gz")).ok()?;
        flate2::read::GzDecoder::new(packed).take(16 << 20).read_to_string(&mut text).ok()?;
        Some(text)
    })
}

fn kernel_features(root: &Root, release: &str) -> Result<String, (String, String)> {
    const NEEDED: [(&str, &str); 7] = [
        ("CONFIG_KEXEC_FILE", "kexec_file_load"),
        ("CONFIG_CRASH_DUMP", "elfcorehdr_addr"),
        ("CONFIG_PROC_VMCORE", "vmcore_init"),
        ("CONFIG_KALLSYMS", ""),
        ("CONFIG_CHECKPOINT_RESTORE", "prctl_set_mm_map"),
        ("CONFIG_TIME_NS", "timens_install"),
        ("CONFIG_DEVTMPFS", ""),
    ];
    let remedy = "use the distribution's kernel (on Debian: linux-image-amd64 or linux-image-cloud-amd64)";
    let (source, lacking): (_, Vec<&str>) = if let Some(config) = kernel_config(root, release) {
        let has = |option: &str| config.lines().any(|l| l.strip_prefix(option) == Some("=y"));
        ("the kernel's configuration", NEEDED.iter().map(|n| n.0).filter(|option| !has(option)).collect())
    } else if let Ok(symbols) = root.read("/proc/kallsyms") {
        let names: std::collections::BTreeSet<&str> =
            symbols.lines().filter_map(|l| l.split_whitespace().nth(2)).collect();
        let has = |symbol: &str| {
            symbol.is_empty()
                || names.iter().any(|n| *n == symbol || n.strip_prefix("__x64_sys_") == Some(symbol))
        };
        ("the kernel's symbols", NEEDED.iter().filter(|n| !has(n.1)).map(|n| n.0).collect())
    } else {
        return missing("the kernel has no symbol table (CONFIG_KALLSYMS)", remedy);
    };
    if lacking.is_empty() {
        Ok(format!("all there, by {source}"))
    } else {
        missing(format!("the kernel was built without {}", lacking.join(", ")), remedy)
    }
}

fn btf(root: &Root) -> Result<String, (String, String)> {
    if root.exists("/sys/kernel/btf/vmlinux") {
        Ok("the kernel describes its structures".into())
    } else {
        missing(
            "the kernel does not describe its structures (CONFIG_DEBUG_INFO_BTF)",
            "use the distribution's kernel; Debian's has BTF since release 12",
        )
    }
}

/// Where the running kernel's image is.
pub fn find_kernel_image(root: &Root, config: &Config, release: &str) -> Option<PathBuf> {
    if config.crash_kernel.image != "auto" {
        return Some(PathBuf::from(&config.crash_kernel.image)).filter(|p| root.exists(p));
    }
    let booted = root.read("/proc/cmdline").unwrap_or_default();
    let booted = cmdline::value(&booted, "BOOT_IMAGE").unwrap_or_default();
    // GRUB's name may begin with a device and is relative to the file system that /boot may be.
    let booted = booted.rsplit(')').next().unwrap_or_default();
    [
        format!("/boot/vmlinuz-{release}"),
        format!("/lib/modules/{release}/vmlinuz"),
        format!("/boot{booted}"),
        booted.to_owned(),
    ]
    .into_iter()
    .map(PathBuf::from)
    .find(|p| p.to_string_lossy().contains(release) && root.join(p).is_file())
}

/// The release that a bzImage names (Documentation/arch/x86/boot.rst: kernel_version); `None` where it is no bzImage.
fn image_release(path: &Path) -> Option<String> {
    let file = std::fs::File::open(path).ok()?;
    let mut header = Vec::new();
    file.take(64 << 10).read_to_end(&mut header).ok()?;
    let magic = header.get(0x202..0x206)?;
    let pointer: [u8; 2] = header.get(0x20e..0x210)?.try_into().ok()?;
    let text = header.get(0x200 + usize::from(u16::from_le_bytes(pointer))..)?;
    let release = text.split(|b| matches!(b, 0 | b' ')).next()?;
    (magic == b"HdrS").then(|| String::from_utf8_lossy(release).into_owned())
}

fn kernel_image(root: &Root, config: &Config, release: &str) -> Result<String, (String, String)> {
    match find_kernel_image(root, config, release) {
        // The modules in the initramfs are the running kernel's.
        Some(path) if image_release(&root.join(&path)).is_some_and(|found| found != release) => missing(
            format!("{} is not the kernel that runs, {release}: its modules would not fit", path.display()),
            "name the running kernel's image under [crash_kernel] in /etc/otherworld.toml, or `image = \"auto\"`",
        ),
        Some(path) => Ok(path.display().to_string()),
        None if config.crash_kernel.image != "auto" => missing(
            format!("there is no {}", config.crash_kernel.image),
            "correct image under [crash_kernel] in /etc/otherworld.toml",
        ),
        None => missing(
            format!("the image of the running kernel {release} was not found"),
            format!(
                "install its package again, or name the file as image under [crash_kernel] (looked for /boot/vmlinuz-{release})"
            ),
        ),
    }
}

fn modules(root: &Root, release: &str) -> Result<String, (String, String)> {
    match ModuleTree::open(root, release) {
        Ok(tree) => Ok(tree.dir().display().to_string()),
        Err(e) => missing(
            format!("/lib/modules/{release}/modules.dep: {e}"),
            "if the kernel package was upgraded, reboot; else run `depmod`",
        ),
    }
}

fn root_device(root: &Root) -> Result<String, (String, String)> {
    match devices::mounted(root) {
        Ok(all) => {
            let names: Vec<String> = all.iter().map(|d| format!("{} ({})", d.name, d.fs_type)).collect();
            Ok(names.join(", "))
        }
        Err(e) => missing(
            e.to_string(),
            "this version brings back machines whose root file system is on a plain disk or partition",
        ),
    }
}

fn static_init(root: &Root, init: &Path) -> Result<String, (String, String)> {
    match elf::closure(root, init) {
        Ok(files) if files.len() == 1 => Ok(format!("{} needs no libraries", init.display())),
        Ok(_) => missing(
            format!("{} is not a static program", init.display()),
            "install the release build, which is static",
        ),
        Err(e) => missing(format!("{}: {e}", init.display()), "name an ELF program"),
    }
}

fn free_space(root: &Root) -> Result<String, (String, String)> {
    let state = root.join(STATE_DIR);
    let existing = state.ancestors().find(|p| p.exists()).unwrap_or(&state);
    match rustix::fs::statvfs(existing) {
        Ok(fs) => {
            let mib = fs.f_bavail.saturating_mul(fs.f_frsize) >> 20;
            if mib >= MIN_FREE_MIB {
                Ok(format!("{mib} MiB under {STATE_DIR}"))
            } else {
                missing(
                    format!("only {mib} MiB are free under {STATE_DIR}"),
                    format!(
                        "make {MIN_FREE_MIB} MiB free: the crash initramfs and the reports are kept there"
                    ),
                )
            }
        }
        Err(e) => missing(format!("{STATE_DIR}: {e}"), "make the directory accessible"),
    }
}

fn kernel_text(root: &Root) -> Result<String, (String, String)> {
    match std::fs::File::open(root.join("/proc/kcore")) {
        Ok(_) => Ok("the kernel's own code can be recorded".into()),
        Err(e) => missing(
            format!("/proc/kcore: {e}: that the kernel's own code has changed will not be noticed"),
            "use a kernel with CONFIG_PROC_KCORE, and run this as root, outside of containers",
        ),
    }
}

/// The register saver's module name.
pub const SAVER: &str = "otherworld_saver";

fn register_saver(root: &Root, release: &str) -> Result<String, (String, String)> {
    if root.exists(format!("/sys/module/{SAVER}")) {
        return Ok("loaded".into());
    }
    let known = ModuleTree::open(root, release).is_ok_and(|t| t.load_order([SAVER]).is_ok());
    if known {
        Ok("installed; `otherworld arm` loads it".into())
    } else {
        missing(
            format!(
                "the module {SAVER} is not installed: a thread that computes on a CPU during the panic loses its FPU registers"
            ),
            "install it as kmod/README.md of the sources says; until then live_fpu in /etc/otherworld.toml says what happens to \
             such threads",
        )
    }
}

/// Debian's kdump service loads its own crash kernel whenever it starts, and the kernel does not tell whose is loaded.
fn kdump_tools(root: &Root) -> Result<String, (String, String)> {
    let link = root.join("/etc/systemd/system/multi-user.target.wants/kdump-tools.service");
    let settings = root.read("/etc/default/kdump-tools").unwrap_or_default();
    let switched_off = settings.lines().any(|line| line.trim() == "USE_KDUMP=0");
    // The link leads to a place that may be missing.
    if link.is_symlink() && !switched_off {
        missing(
            "kdump-tools.service is enabled: when it starts, its crash kernel takes the place of otherworld's, and nobody can tell",
            "systemctl disable kdump-tools.service",
        )
    } else {
        Ok("no other program loads a crash kernel at boot".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A machine on which everything is as it should be.
    fn machine(dir: &Path) -> Root {
        let root = Root::new(dir);
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("/proc/sys/kernel/osrelease", "6.1.0-9-amd64\n");
        put("/proc/sys/kernel/kexec_load_disabled", "0\n");
        put("/proc/cmdline", "BOOT_IMAGE=/boot/vmlinuz-6.1.0-9-amd64 root=/dev/vda1 crashkernel=512M\n");
        put("/sys/kernel/kexec_crash_size", "536870912\n");
        put("/sys/kernel/security/lockdown", "[none] integrity confidentiality\n");
        put("/sys/kernel/btf/vmlinux", "");
        put("/proc/kcore", "");
        let config = "CONFIG_KEXEC_FILE=y\nCONFIG_CRASH_DUMP=y\nCONFIG_PROC_VMCORE=y\nCONFIG_KALLSYMS=y\n\
                      CONFIG_CHECKPOINT_RESTORE=y\nCONFIG_TIME_NS=y\nCONFIG_DEVTMPFS=y\n# CONFIG_X is not set\n";
        put("/boot/config-6.1.0-9-amd64", config);
        put("/boot/vmlinuz-6.1.0-9-amd64", "kernel");
        put("/lib/modules/6.1.0-9-amd64/modules.dep", "updates/dkms/otherworld_saver.ko:\n");
        put("/proc/self/mountinfo", "28 1 254:1 / / rw - ext4 /dev/vda1 rw\n");
        fs::create_dir_all(root.join("/sys/dev/block/254:1")).unwrap();
        // A static program, as far as its headers tell: an ELF header without segments.
        let mut elf = vec![0u8; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16] = 2;
        elf[18] = 62;
        elf[20] = 1;
        elf[52] = 64;
        elf[54] = 56;
        fs::create_dir_all(root.join("/usr/local/sbin")).unwrap();
        fs::write(root.join("/usr/local/sbin/otherworld"), elf).unwrap();
        root
    }

    fn run(root: &Root) -> Vec<Check> {
        check(root, &Config::default(), Path::new("/usr/local/sbin/otherworld"))
    }

    #[test]
    fn a_machine_where_nothing_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        for check in run(&machine(dir.path())) {
            // How full the disk under the test is says nothing about the code.
            assert!(check.ok || check.name == "free-space", "{check:?}");
            assert_eq!(check.remedy.is_empty(), check.ok);
        }
    }

    /// Takes one thing away and expects exactly that one check to complain.
    #[test]
    fn each_missing_thing_is_named_with_its_remedy() {
        type Damage = fn(&Root);
        let cases: [(&str, &str, &str, Damage); 15] = [
            ("crashkernel", "no memory is reserved", "update-grub", |r| {
                fs::write(r.join("/sys/kernel/kexec_crash_size"), "0\n").unwrap();
                fs::write(r.join("/proc/cmdline"), "root=/dev/vda1\n").unwrap();
            }),
            ("crashkernel", "crashkernel=512M is on the command line", "dmesg", |r| {
                fs::write(r.join("/sys/kernel/kexec_crash_size"), "0\n").unwrap();
            }),
            ("crashkernel", "only 64 MiB", "crashkernel=512M", |r| {
                fs::write(r.join("/sys/kernel/kexec_crash_size"), "67108864\n").unwrap();
            }),
            ("crashkernel", "generation 1", "reboot", |r| {
                fs::write(r.join("/proc/cmdline"), "root=/dev/vda1 otherworld.generation=1\n").unwrap();
            }),
            ("kexec-allowed", "kexec_load_disabled", "/etc/sysctl.d", |r| {
                fs::write(r.join("/proc/sys/kernel/kexec_load_disabled"), "1\n").unwrap();
            }),
            ("kexec-allowed", "confidentiality", "lockdown=", |r| {
                fs::write(r.join("/sys/kernel/security/lockdown"), "none integrity [confidentiality]\n")
                    .unwrap();
            }),
            ("kernel-features", "CONFIG_TIME_NS", "distribution's kernel", |r| {
                let path = r.join("/boot/config-6.1.0-9-amd64");
                let text = fs::read_to_string(&path)
                    .unwrap()
                    .replace("CONFIG_TIME_NS=y", "# CONFIG_TIME_NS is not set");
                fs::write(path, text).unwrap();
            }),
            ("btf", "CONFIG_DEBUG_INFO_BTF", "Debian", |r| {
                fs::remove_file(r.join("/sys/kernel/btf/vmlinux")).unwrap();
            }),
            ("kernel-image", "6.1.0-9-amd64 was not found", "[crash_kernel]", |r| {
                fs::remove_file(r.join("/boot/vmlinuz-6.1.0-9-amd64")).unwrap();
            }),
            ("kernel-image", "is not the kernel that runs", "[crash_kernel]", |r| {
                let mut image = vec![0u8; 0x400];
                image[0x202..0x206].copy_from_slice(b"HdrS");
                image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
                image[0x300..0x310].copy_from_slice(b"6.1.0-8-amd64 (d");
                fs::write(r.join("/boot/vmlinuz-6.1.0-9-amd64"), image).unwrap();
            }),
            ("modules", "modules.dep", "depmod", |r| {
                fs::rename(
                    r.join("/lib/modules/6.1.0-9-amd64/modules.dep"),
                    r.join("/lib/modules/6.1.0-9-amd64/gone"),
                )
                .unwrap();
                fs::create_dir_all(r.join("/sys/module/otherworld_saver")).unwrap();
            }),
            ("root-device", "nfs", "plain disk", |r| {
                fs::write(r.join("/proc/self/mountinfo"), "28 1 0:4 / / rw - nfs a:/b rw\n").unwrap();
            }),
            ("kernel-text", "will not be noticed", "CONFIG_PROC_KCORE", |r| {
                fs::remove_file(r.join("/proc/kcore")).unwrap();
            }),
            ("register-saver", "otherworld_saver is not installed", "kmod/README.md", |r| {
                fs::write(r.join("/lib/modules/6.1.0-9-amd64/modules.dep"), "kernel/a.ko:\n").unwrap();
            }),
            ("kdump-tools", "is enabled", "systemctl disable", |r| {
                let wants = r.join("/etc/systemd/system/multi-user.target.wants");
                fs::create_dir_all(&wants).unwrap();
                let unit = "/lib/systemd/system/kdump-tools.service";
                std::os::unix::fs::symlink(unit, wants.join("kdump-tools.service")).unwrap();
            }),
        ];
        for (name, detail, remedy, damage) in cases {
            let dir = tempfile::tempdir().unwrap();
            let root = machine(dir.path());
            damage(&root);
            let bad: Vec<Check> =
                run(&root).into_iter().filter(|c| !c.ok && c.name != "free-space").collect();
            let [bad] = &bad[..] else { panic!("{name}: {bad:?}") };
            assert_eq!(bad.name, name);
            assert!(bad.detail.contains(detail), "{bad:?}");
            assert!(bad.remedy.contains(remedy), "{bad:?}");
        }
    }

    #[test]
    fn symbols_stand_in_for_a_missing_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        fs::remove_file(root.join("/boot/config-6.1.0-9-amd64")).unwrap();
        let all = "0 T __x64_sys_kexec_file_load\n0 D elfcorehdr_addr\n0 t vmcore_init\n0 t prctl_set_mm_map\n0 t timens_install\n";
        fs::write(root.join("/proc/kallsyms"), all).unwrap();
        assert!(kernel_features(&root, "6.1.0-9-amd64").is_ok());
        fs::write(root.join("/proc/kallsyms"), all.replace("kexec_file_load", "x")).unwrap();
        assert!(kernel_features(&root, "6.1.0-9-amd64").unwrap_err().0.contains("CONFIG_KEXEC_FILE"));
    }

    #[test]
    fn a_dynamic_program_is_no_init() {
        let error = static_init(&Root::default(), Path::new("/bin/sh")).unwrap_err();
        assert!(error.0.contains("not a static program"));
    }
}
