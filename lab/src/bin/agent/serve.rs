//! Answering the host.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lab::protocol::{Frame, PORT_NAME, Panic, Program, Request, Response, read_frame, write_frame};
use lab::record::Record;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::unistd::Pid;

use crate::{copy, spawn};

/// linux/kexec.h
const KEXEC_FILE_ON_CRASH: libc::c_ulong = 2;
const PORT_DEADLINE: Duration = Duration::from_secs(60);
/// How long output is collected from a program's descendants after it has ended.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);
/// While no host is connected the port reads as at its end and cannot be waited for.
const HOST_POLL: Duration = Duration::from_millis(20);

nix::ioctl_write_ptr_bad!(rnd_add_entropy, nix::request_code_write!(b'R', 0x03, 8), Entropy);
nix::ioctl_none!(rnd_reseed, b'R', 0x07);

/// `struct rand_pool_info` with room for one seed.
#[repr(C)]
pub struct Entropy {
    bits: i32,
    size: i32,
    data: [u8; 64],
}

type Port = Arc<Mutex<File>>;

/// Serves for ever.
pub fn run() -> io::Result<()> {
    let path = find_port()?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut reader = PortReader(file.try_clone()?);
    let port: Port = Arc::new(Mutex::new(file));
    reply(&port, 0, &hello()?, &[])?;
    loop {
        let frame = read_frame::<Request>(&mut reader)?;
        let port = port.clone();
        // Each request in its own thread: a program that runs for minutes must not keep a ping waiting.
        std::thread::spawn(move || {
            let id = frame.id;
            let (response, payload) = handle(&port, frame)
                .unwrap_or_else(|error| (Response::Failed(error.to_string()), Vec::new()));
            if let Err(error) = reply(&port, id, &response, &payload) {
                eprintln!("lab-agent: {error}");
            }
        });
    }
}

fn reply(port: &Port, id: u32, response: &Response, payload: &[u8]) -> io::Result<()> {
    write_frame(&mut *port.lock().unwrap_or_else(PoisonError::into_inner), id, response, payload)
}

/// The device node of our port. Loads the driver where nothing else has done so (the crash kernel has no udev).
fn find_port() -> io::Result<PathBuf> {
    let start = Instant::now();
    let mut asked = false;
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT_NAME {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
        }
        if start.elapsed() > PORT_DEADLINE {
            return Err(io::Error::other(format!("no virtio-serial port named {PORT_NAME}")));
        }
        if !asked {
            asked = true;
            let _ = Command::new("/sbin/modprobe").arg("virtio_console").status();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

struct PortReader(File);

impl Read for PortReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buf)? {
                0 => std::thread::sleep(HOST_POLL),
                n => return Ok(n),
            }
        }
    }
}

fn hello() -> io::Result<Response> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    let seconds: f64 = uptime.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0.0);
    Ok(Response::Hello {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().into(),
        crash_kernel: Path::new("/proc/vmcore").exists(),
        uptime_ms: (seconds * 1000.0) as u64,
    })
}

fn handle(port: &Port, frame: Frame<Request>) -> io::Result<(Response, Vec<u8>)> {
    let done = |()| (Response::Done, Vec::new());
    match frame.message {
        Request::Ping => Ok((hello()?, Vec::new())),
        Request::Exec { program, timeout_ms } => exec(&program, Duration::from_millis(timeout_ms)),
        Request::Spawn(program) => Ok((Response::Started { pid: spawn::detached(&program)? }, Vec::new())),
        Request::Wait { pids, timeout_ms } => {
            let alive = wait_all(&pids, Duration::from_millis(timeout_ms))?;
            Ok((Response::Waited { alive }, Vec::new()))
        }
        Request::Kill { pid, signal } => {
            kill(Pid::from_raw(pid), Signal::try_from(signal)?)?;
            Ok(done(()))
        }
        Request::Read { path, offset, len } => {
            let mut file = File::open(&path)?;
            file.seek(SeekFrom::Start(offset))?;
            let mut data = Vec::new();
            (&file).take(len as u64).read_to_end(&mut data)?;
            Ok((Response::Data { file_len: file.metadata()?.len() }, data))
        }
        Request::Write { path, offset, mode } => write(&path, offset, mode, &frame.payload).map(done),
        Request::Record => Ok((Response::Data { file_len: 0 }, Record::take().encode())),
        Request::SetClock { unix_ns } => {
            let time = TimeSpec::new(unix_ns.div_euclid(1_000_000_000), unix_ns.rem_euclid(1_000_000_000));
            nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, time)?;
            Ok(done(()))
        }
        Request::Seed => seed(&frame.payload).map(done),
        Request::LoadCrashKernel { kernel, initramfs, cmdline } => {
            load_crash_kernel(&kernel, &initramfs, &cmdline).map(done)
        }
        Request::CopyRate { bytes } => {
            let (bytes, time) = copy::measure(bytes)?;
            Ok((Response::Copied { bytes, ns: time.as_nanos() as u64 }, Vec::new()))
        }
        Request::Sync => {
            nix::unistd::sync();
            Ok(done(()))
        }
        Request::Panic(panic) => crash(port, frame.id, &panic),
    }
}

fn write(path: &Path, offset: u64, mode: u32, data: &[u8]) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    if offset == 0 {
        // A running program's file cannot be written, but it can be replaced.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let file = OpenOptions::new().create(true).write(true).truncate(offset == 0).mode(mode).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all_at(data, offset)
}

fn exec(program: &Program, timeout: Duration) -> io::Result<(Response, Vec<u8>)> {
    let mut command = spawn::command(program)?;
    if program.stdout.is_none() {
        command.stdout(Stdio::piped());
    }
    if program.stderr.is_none() {
        command.stderr(Stdio::piped());
    }
    let mut child = command.process_group(0).spawn()?;
    drop(command);
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let pid = child.id() as i32;
    let timed_out = !wait_all(&[pid], timeout)?.is_empty();
    if timed_out {
        let _ = kill(Pid::from_raw(-pid), Signal::SIGKILL);
    }
    let status = child.wait()?;
    let end = Instant::now() + OUTPUT_GRACE;
    let mut payload = stdout.finish(end);
    let stdout_len = payload.len();
    payload.extend(stderr.finish(end));
    Ok((Response::Exited { code: status.code(), signal: status.signal(), stdout_len, timed_out }, payload))
}

/// Output that a thread is reading.
struct Output {
    data: Arc<Mutex<Vec<u8>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Output {
    fn finish(self, deadline: Instant) -> Vec<u8> {
        if let Some(thread) = self.thread {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        std::mem::take(&mut *self.data.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn collect(from: Option<impl Read + Send + 'static>) -> Output {
    const LIMIT: usize = 24 << 20;
    let data = Arc::new(Mutex::new(Vec::new()));
    let sink = data.clone();
    let thread = from.map(|mut from| {
        std::thread::spawn(move || {
            let mut buf = [0; 16384];
            while let Ok(n @ 1..) = from.read(&mut buf) {
                let mut sink = sink.lock().unwrap_or_else(PoisonError::into_inner);
                if sink.len() < LIMIT {
                    sink.extend_from_slice(&buf[..n]);
                }
            }
        })
    });
    Output { data, thread }
}

/// Waits for the end of all; those that are still there after `timeout`.
fn wait_all(pids: &[i32], timeout: Duration) -> io::Result<Vec<i32>> {
    let deadline = Instant::now() + timeout;
    let mut alive = Vec::new();
    for &pid in pids {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or −1.
        let fd = match Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }) {
            Ok(fd) => fd,
            Err(Errno::ESRCH) => continue,
            Err(error) => return Err(error.into()),
        };
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let ended = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], wait) {
                Ok(0) if deadline <= Instant::now() => break false,
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => break true,
                Err(error) => return Err(error.into()),
            }
        };
        if !ended {
            alive.push(pid);
        }
    }
    Ok(alive)
}

/// Feeds the generator, so that two guests from one snapshot do not draw the same numbers unless the host wants it.
fn seed(bytes: &[u8]) -> io::Result<()> {
    let mut entropy = Entropy { bits: 0, size: 0, data: [0; 64] };
    let len = bytes.len().min(entropy.data.len());
    entropy.data[..len].copy_from_slice(&bytes[..len]);
    (entropy.bits, entropy.size) = (len as i32 * 8, len as i32);
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    // SAFETY: the structure is what the call reads: bit count, byte count, that many bytes.
    unsafe { rnd_add_entropy(random.as_raw_fd(), &entropy) }?;
    // SAFETY: no argument.
    unsafe { rnd_reseed(random.as_raw_fd()) }?;
    Ok(())
}

fn load_crash_kernel(kernel: &Path, initramfs: &Path, cmdline: &str) -> io::Result<()> {
    let (kernel, initramfs) = (File::open(kernel)?, File::open(initramfs)?);
    let cmdline = CString::new(cmdline)?;
    // SAFETY: two open descriptors, a string and its length with the final NUL.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            cmdline.as_bytes_with_nul().len(),
            cmdline.as_ptr(),
            KEXEC_FILE_ON_CRASH,
        )
    };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

fn crash(port: &Port, id: u32, panic: &Panic) -> io::Result<(Response, Vec<u8>)> {
    if let Some(cpu) = panic.cpu {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
    }
    let mut trigger = OpenOptions::new().write(true).open("/proc/sysrq-trigger")?;
    let moment = Instant::now() + Duration::from_micros(panic.after_us);
    reply(port, id, &Response::Crashing, &[])?;
    std::thread::sleep(moment.saturating_duration_since(Instant::now()));
    let gone: Vec<i32> = panic.alive.iter().copied().filter(|&pid| !is_alive(pid)).collect();
    if !gone.is_empty() {
        return Ok((Response::NotCrashed { gone }, Vec::new()));
    }
    trigger.write_all(b"c")?;
    Err(io::Error::other("the kernel did not crash"))
}

/// Whether a process exists and is no zombie.
fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(") ").map(|(_, rest)| !rest.starts_with(['Z', 'X'])))
        .unwrap_or(false)
}
