//! `cargo xtask libotherworld`: the libraries that C programs link with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use crate::{build, ui};

/// Name of the shared library for programs that are linked with it: its ABI's version.
const SONAME: &str = "libotherworld.so.0";

/// Builds libotherworld for C programs below target/libotherworld: the header, a static and a shared library, a pkg-config file. Copy its
/// contents below the prefix to install it.
#[derive(Debug, Args)]
pub struct Libotherworld {
    /// Where it will be installed, for the pkg-config file.
    #[arg(long, default_value = "/usr/local")]
    prefix: String,
    /// Then builds the C programs of its tests and examples with the address and undefined-behaviour sanitizers, and runs them.
    #[arg(long)]
    check: bool,
}

impl Libotherworld {
    /// Builds it and says where it is.
    pub fn run(self) -> Result<bool> {
        let library = Library::build(Path::new(&self.prefix))?;
        if self.check {
            library.check()?;
        }
        ui::finish();
        println!("{}", library.dir.display());
        Ok(true)
    }
}

/// The built library.
#[derive(Debug, Clone)]
pub struct Library {
    /// Below this lie `include/` and `lib/`.
    pub dir: PathBuf,
}

impl Library {
    /// Builds it, to be used where it is.
    pub fn in_place() -> Result<Self> {
        Self::build(&directory())
    }

    fn build(prefix: &Path) -> Result<Self> {
        let _lock = build::lock("libotherworld")?;
        ui::note("building libotherworld");
        let dir = directory();
        let lib = dir.join("lib");
        fs::create_dir_all(lib.join("pkgconfig"))?;
        fs::create_dir_all(dir.join("include"))?;
        let target = build::target_dir().join("libotherworld-build");
        let mut cargo = build::cargo();
        cargo.args([
            "rustc",
            "--release",
            "--quiet",
            "-p",
            "crashproc",
            "--lib",
            "--crate-type",
            "staticlib",
        ]);
        // Nothing unwinds through C.
        cargo.args(["--", "-C", "panic=abort"]);
        ensure!(cargo.env("CARGO_TARGET_DIR", &target).status()?.success(), "building libotherworld failed");
        let built = target.join("release");
        fs::copy(built.join("libotherworld.a"), lib.join("libotherworld.a"))?;
        link_shared(&lib)?;
        let link = lib.join("libotherworld.so");
        _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(SONAME, &link)?;
        let header = build::workspace().join("crates/crashproc/include/otherworld.h");
        fs::copy(header, dir.join("include/otherworld.h"))?;
        fs::write(lib.join("pkgconfig/otherworld.pc"), pkg_config(prefix))?;
        needs_only_libc(&lib.join(SONAME))?;
        Ok(Self { dir })
    }

    /// Runs the C programs of its tests and examples under sanitizers, linked with both libraries.
    pub fn check(&self) -> Result<()> {
        let scratch = self.dir.join("check");
        fs::create_dir_all(&scratch)?;
        let sources = build::workspace().join("crates/crashproc");
        let programs: [(&str, &[&str]); 2] =
            [("tests/abi.c", &[]), ("examples/c/notes.c", &["rehearse", "notes.txt"])];
        for (source, arguments) in programs {
            for shared in [false, true] {
                ui::note(&format!("{source} under sanitizers, {}", if shared { "shared" } else { "static" }));
                let program = scratch.join("program");
                let mut gcc = self.compiler();
                gcc.args(["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
                    .arg(sources.join(source));
                match shared {
                    true => gcc.arg("-L").arg(self.dir.join("lib")).arg("-lotherworld"),
                    false => gcc.args(self.static_link()),
                };
                ensure!(
                    gcc.arg("-o").arg(&program).status().context("gcc")?.success(),
                    "building {source} failed"
                );
                let mut run = Command::new(&program);
                run.args(arguments).current_dir(&scratch).env("LD_LIBRARY_PATH", self.dir.join("lib"));
                ensure!(run.status()?.success(), "{source} failed");
            }
        }
        let notes = fs::read_to_string(scratch.join("notes.txt"))?;
        ensure!(notes == "milk\nbread\n", "the example has written {notes:?}");
        Ok(())
    }

    /// gcc, told where the header is.
    pub fn compiler(&self) -> Command {
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-I"]).arg(self.dir.join("include"));
        gcc
    }

    /// What links a program with the static library.
    pub fn static_link(&self) -> [String; 2] {
        [self.dir.join("lib/libotherworld.a").display().to_string(), "-static-libgcc".into()]
    }
}

/// Makes the shared library of the static one: rustc's own would need libgcc_s beside libc.
fn link_shared(lib: &Path) -> Result<()> {
    let exports = lib.join("exports.map");
    fs::write(&exports, "{ global: otherworld_*; local: *; };\n")?;
    let mut gcc = Command::new("gcc");
    gcc.args([
        "-shared",
        "-s",
        "-static-libgcc",
        "-Wl,--gc-sections",
        "-Wl,-z,relro,-z,now",
        "-Wl,--whole-archive",
    ]);
    gcc.arg(lib.join("libotherworld.a")).arg("-Wl,--no-whole-archive");
    gcc.arg(format!("-Wl,-soname,{SONAME}")).arg(format!("-Wl,--version-script,{}", exports.display()));
    ensure!(
        gcc.arg("-o").arg(lib.join(SONAME)).status().context("gcc")?.success(),
        "linking libotherworld failed"
    );
    Ok(fs::remove_file(exports)?)
}

fn directory() -> PathBuf {
    build::target_dir().join("libotherworld")
}

fn pkg_config(prefix: &Path) -> String {
    format!(
        "prefix={}\nlibdir=${{prefix}}/lib\nincludedir=${{prefix}}/include\n\nName: otherworld\n\
         Description: Crash procedures: an application's say in its own resurrection\nVersion: {}\n\
         Libs: -L${{libdir}} -lotherworld\nLibs.private: -static-libgcc\nCflags: -I${{includedir}}\n",
        prefix.display(),
        env!("CARGO_PKG_VERSION")
    )
}

fn needs_only_libc(library: &Path) -> Result<()> {
    let output = Command::new("readelf").arg("-dW").arg(library).output().context("readelf (binutils)")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let needed = text.lines().filter(|line| line.contains("(NEEDED)"));
    let others: Vec<&str> =
        needed.filter(|line| !line.contains("[libc.so") && !line.contains("[ld-linux")).collect();
    if !others.is_empty() {
        bail!("libotherworld needs more than libc at run time: {}", others.join("; "));
    }
    Ok(())
}
