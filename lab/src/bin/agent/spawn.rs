//! Starting programs: with their output caught, or detached.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use lab::protocol::Program;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{ForkResult, Pid, User, fork, setsid};

nix::ioctl_write_int_bad!(tiocsctty, nix::libc::TIOCSCTTY);

/// The command of a program: environment, directory, user and those of its streams that are files.
pub fn command(program: &Program) -> io::Result<Command> {
    let (name, args) = program.argv.split_first().ok_or_else(|| io::Error::other("empty argv"))?;
    let mut command = Command::new(name);
    command.args(args).env_clear();
    command
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LANG", "C.UTF-8");
    let uid = program.uid.unwrap_or(0);
    let (user, home) = match User::from_uid(uid.into())? {
        Some(user) => (user.name, user.dir),
        None => (uid.to_string(), "/".into()),
    };
    command.env("USER", &user).env("LOGNAME", &user).env("HOME", home).envs(&program.env);
    command.current_dir(program.cwd.as_deref().unwrap_or(Path::new("/")));
    if uid != 0 {
        command.uid(uid).gid(uid);
    }
    command.stdin(match &program.stdin {
        Some(path) => Stdio::from(open_input(path, program.controlling_tty)?),
        None => Stdio::null(),
    });
    let output = |path: &Path| -> io::Result<Stdio> {
        let mut options = OpenOptions::new();
        options.create(true).write(true).truncate(!program.append).append(program.append);
        let file = options.open(path).map_err(|error| named(path, error))?;
        if uid != 0 && file.metadata()?.is_file() {
            std::os::unix::fs::fchown(&file, Some(uid), Some(uid))?;
        }
        Ok(file.into())
    };
    if let Some(path) = &program.stdout {
        command.stdout(output(path)?);
    }
    if let Some(path) = &program.stderr {
        command.stderr(output(path)?);
    }
    Ok(command)
}

fn open_input(path: &Path, tty: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(tty).open(path).map_err(|error| named(path, error))
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Starts a detached program through [`helper`]; its process id.
pub fn detached(program: &Program) -> io::Result<i32> {
    let mut helper = Command::new("/proc/self/exe")
        .arg("spawn")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = helper.stdin.take() {
        stdin.write_all(&serde_json::to_vec(program)?)?;
    }
    // The program itself inherits neither pipe, so this ends when the helper does.
    let output = helper.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().map_err(|_| {
        io::Error::other(format!(
            "{}: {}",
            program.argv.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    })
}

/// `lab-agent spawn`: reads a [`Program`] from standard input, starts it in a session of its own as an orphan (so that it is
/// PID 1's child), prints its process id when exec has succeeded.
pub fn helper() -> io::Result<()> {
    let mut json = Vec::new();
    io::stdin().read_to_end(&mut json)?;
    let mut program: Program = serde_json::from_slice(&json)?;
    let null = "/dev/null".into();
    let stdout = program.stdout.get_or_insert(null).clone();
    program.stderr.get_or_insert(stdout);
    let mut command = command(&program)?;
    // Open standard error once when it is the same file, so that both share one offset.
    if program.stderr == program.stdout && !program.append {
        program.append = false;
        let file = OpenOptions::new()
            .write(true)
            .open(program.stdout.as_deref().unwrap_or(Path::new("/dev/null")))?;
        command.stdout(file.try_clone()?).stderr(file);
    }
    let (mut report, reporter) = io::pipe()?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(reporter);
            drop(command);
            let mut error = String::new();
            report.read_to_string(&mut error)?;
            if !error.is_empty() {
                return Err(io::Error::other(error));
            }
            println!("{child}");
            Ok(())
        }
        ForkResult::Child => {
            // The write end is close-on-exec: success shows as end of file.
            let mut reporter = reporter;
            let error = become_program(&program, &mut command);
            let _ = write!(reporter, "{error}");
            std::process::exit(127)
        }
    }
}

fn become_program(program: &Program, command: &mut Command) -> io::Error {
    let set_up = || -> io::Result<()> {
        setsid()?;
        if program.controlling_tty
            && let Some(path) = &program.stdin
        {
            let tty = open_input(path, true)?;
            // SAFETY: TIOCSCTTY takes an integer and touches no memory of ours.
            unsafe { tiocsctty(tty.as_raw_fd(), 1) }?;
        }
        if !program.cpus.is_empty() {
            let mut set = CpuSet::new();
            for &cpu in &program.cpus {
                set.set(cpu)?;
            }
            sched_setaffinity(Pid::from_raw(0), &set)?;
        }
        Ok(())
    };
    match set_up() {
        Ok(()) => command.exec(),
        Err(error) => error,
    }
}
