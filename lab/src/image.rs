//! The guest's disk: a Debian root file system made of packages, and nothing of ours in it.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::error::{Error, FileContext as _, Result};
use crate::kernel::{Kernel, Series};
use crate::{Key, Lab, host};

/// Changed when this file makes another image from the same packages.
const LAYOUT: &str = "2";
const SUITE: &str = "bookworm";
const DISK_SIZE: &str = "4G";
/// Name of the unprivileged user in the guest; its user and group ids are [`DEMO_UID`].
pub const DEMO_USER: &str = "demo";
/// User id of [`DEMO_USER`].
pub const DEMO_UID: u32 = 1000;

/// The version of MariaDB that is installed: the one whose source the archive has (that of the security archive's next one is missing), for plugins are
/// built for exactly one.
pub const MARIADB_VERSION: &str = "1:10.11.18-0+deb12u1";

const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "udev",
    "dbus",
    "libpam-systemd",
    "kmod",
    "python3",
    "xz-utils",
    "sqlite3",
    "procps",
    "e2fsprogs",
    "strace",
    "util-linux",
    "iproute2",
];

/// Units that only make noise or wait for a network.
const MASKED: &[&str] = &[
    "systemd-timesyncd.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "fstrim.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "dpkg-db-backup.timer",
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "systemd-networkd-wait-online.service",
];

/// What is installed beside the small system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flavour {
    /// Nothing.
    #[default]
    Small,
    /// Real programs, as Debian ships them.
    Programs,
}

impl Flavour {
    fn packages(self) -> Vec<&'static str> {
        let more: &[&str] = match self {
            Flavour::Small => &["xfsprogs"],
            Flavour::Programs => &[
                "tmux",
                "vim",
                "joe",
                "redis-server",
                "redis-tools",
                "nginx",
                "postgresql",
                "mariadb-server",
                "python3-pymysql",
                "gdb-minimal",
            ],
        };
        PACKAGES.iter().chain(more).copied().collect()
    }

    /// Units of services that are started by who wants them.
    fn masked(self) -> Vec<&'static str> {
        let more: &[&str] = match self {
            Flavour::Small => &[],
            Flavour::Programs => {
                &["redis-server.service", "nginx.service", "postgresql.service", "mariadb.service"]
            }
        };
        MASKED.iter().chain(more).copied().collect()
    }
}

/// A base image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The raw disk, read-only.
    pub disk: PathBuf,
    /// Names what is in it: differs if any package differs.
    pub id: String,
}

impl Lab {
    /// The guest image with the given kernels; builds it if its inputs have changed.
    pub fn image(&self, flavour: Flavour) -> Result<Image> {
        let kernels =
            Series::ALL.into_iter().map(|series| self.kernel(series)).collect::<Result<Vec<_>>>()?;
        let _lock = self.lock("images")?;
        let mut key = Key::new("image")
            .with(LAYOUT)
            .with(SUITE)
            .with(DISK_SIZE)
            .with(MARIADB_VERSION)
            .with(&flavour.packages().join(" "))
            .with(&flavour.masked().join(" "));
        for kernel in &kernels {
            key = key.with(&kernel.release);
        }
        let dir = self.cache().join("images").join(key.text());
        let image = dir.join("base.img");
        let manifest = dir.join("packages");
        if !image.exists() || self.wants_refresh(&image) {
            let part = dir.with_extension("part");
            let _ = fs::remove_dir_all(&part);
            fs::create_dir_all(&part).at(&part)?;
            self.build(&part, &kernels, flavour)?;
            let _ = fs::remove_dir_all(&dir);
            fs::rename(&part, &dir).at(&dir)?;
        }
        let packages = fs::read_to_string(&manifest).at(&manifest)?;
        Ok(Image { disk: image, id: key.with(&packages).text() })
    }

    fn build(&self, dir: &Path, kernels: &[Kernel], flavour: Flavour) -> Result<()> {
        if !host::is_root() {
            return Err(Error::Host(
                "building the guest image needs root (files of many owners): run this once with sudo".into(),
            ));
        }
        self.update_apt_once()?;
        let sources = dir.join("sources.list");
        fs::write(&sources, debian_sources("deb")?).at(&sources)?;
        let tree = dir.join("tree");
        self.note("building the guest's root file system (mmdebstrap)");
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap
            .args(["--mode=root", "--variant=minbase", "--quiet"])
            .arg(format!("--include={}", flavour.packages().join(",")))
            .args(["--aptopt=Acquire::Check-Valid-Until \"false\"", "--dpkgopt=force-unsafe-io"]);
        let preferences = dir.join("preferences");
        let pinned = format!("Package: src:mariadb\nPin: version {MARIADB_VERSION}\nPin-Priority: 1001\n");
        fs::write(&preferences, pinned).at(&preferences)?;
        mmdebstrap.arg(format!("--setup-hook=cp {} \"$1/etc/apt/preferences.d/lab\"", preferences.display()));
        for path in ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*"] {
            mmdebstrap.arg(format!("--dpkgopt=path-exclude={path}"));
        }
        host::run(mmdebstrap.arg(SUITE).arg(&tree).arg(&sources))?;
        for kernel in kernels {
            self.note(&format!("adding kernel {}", kernel.release));
            // usr/. keeps the merged /lib symlink of the tree as it is.
            host::run(
                Command::new("cp")
                    .arg("-a")
                    .arg(kernel.modules())
                    .arg(ensure(&tree.join("usr/lib/modules"))?),
            )?;
            host::run(Command::new("cp").arg("-a").arg(kernel.tree.join("boot/.")).arg(tree.join("boot")))?;
            host::run(Command::new("depmod").arg("-b").arg(&tree).arg(&kernel.release))?;
        }
        configure(&tree, flavour)?;
        let list = host::run(
            Command::new("dpkg-query")
                .arg(format!("--admindir={}", tree.join("var/lib/dpkg").display()))
                .args(["-W"]),
        )?;
        let manifest = dir.join("packages");
        fs::write(&manifest, list).at(&manifest)?;
        self.note("making the disk image");
        let disk = dir.join("base.img");
        host::run(
            Command::new("mke2fs")
                .args([
                    "-q",
                    "-t",
                    "ext4",
                    "-L",
                    "root",
                    "-E",
                    "lazy_itable_init=1,lazy_journal_init=1",
                    "-d",
                ])
                .args([&tree, &disk])
                .arg(DISK_SIZE),
        )?;
        let mut permissions = fs::metadata(&disk).at(&disk)?.permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&disk, permissions).at(&disk)?;
        fs::remove_dir_all(&tree).at(&tree)
    }
}

/// This machine's own apt sources for the suite, as sources.list lines of this kind: `deb` or `deb-src`.
pub fn debian_sources(kind: &str) -> Result<String> {
    let targets = host::run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN) $(CODENAME) [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    ]))?;
    let lines: Vec<String> = targets
        .lines()
        .filter_map(|line| {
            let (origin, rest) = line.split_once(' ')?;
            let (codename, source) = rest.split_once(' ')?;
            (origin == "Debian" && codename.starts_with(SUITE)).then(|| format!("{kind} {source}"))
        })
        .collect();
    if lines.is_empty() {
        return Err(Error::Host(format!("this machine's apt has no sources for Debian {SUITE}")));
    }
    Ok(lines.join("\n") + "\n")
}

fn ensure(dir: &Path) -> Result<&Path> {
    fs::create_dir_all(dir).at(dir)?;
    Ok(dir)
}

/// What a system administrator would set on such a machine.
fn configure(tree: &Path, flavour: Flavour) -> Result<()> {
    let write = |path: &str, text: &str| {
        let path = tree.join(path);
        fs::write(&path, text).at(&path)
    };
    let append = |path: &str, text: &str| {
        let path = tree.join(path);
        fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .at(&path)
    };
    write("etc/fstab", "/dev/vda / ext4 rw,relatime,errors=remount-ro 0 1\n")?;
    write("etc/hostname", "lab\n")?;
    write("etc/hosts", "127.0.0.1 localhost lab\n")?;
    write("etc/machine-id", "0123456789abcdef0123456789abcdef\n")?;
    append("etc/passwd", &format!("{DEMO_USER}:x:{DEMO_UID}:{DEMO_UID}::/home/{DEMO_USER}:/bin/bash\n"))?;
    append("etc/group", &format!("{DEMO_USER}:x:{DEMO_UID}:\n"))?;
    append("etc/shadow", &format!("{DEMO_USER}:!:19000:0:99999:7:::\n"))?;
    let home = tree.join("home").join(DEMO_USER);
    fs::create_dir_all(&home).at(&home)?;
    std::os::unix::fs::chown(&home, Some(DEMO_UID), Some(DEMO_UID)).at(&home)?;
    for unit in flavour.masked() {
        let path = tree.join("etc/systemd/system").join(unit);
        let _ = fs::remove_file(&path);
        symlink("/dev/null", &path).at(&path)?;
    }
    Ok(())
}
