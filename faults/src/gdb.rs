//! The remote protocol of gdb, as far as faults need it: QEMU's own stub, through which a running guest is stopped, looked at and changed
//! without its knowing.
//!
//! All memory is physical (QEMU's `PhyMemMode`): a CPU that runs a program has no kernel in its page tables.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use lab::{Error, Result};

/// QEMU's packets have 4096 bytes, two for each byte of memory.
const PIECE: usize = 1024;
const ANSWER: Duration = Duration::from_secs(20);
/// What the stub says when a CPU stops.
const STOP: char = 'T';

/// Registers by their numbers in the protocol (x86-64).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Register {
    Rax = 0,
    Rdi = 5,
    Rsp = 7,
    Rip = 16,
    Eflags = 17,
}

/// Some registers of a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Registers {
    pub general: [u64; 16],
    pub rip: u64,
    pub eflags: u32,
    pub cs: u32,
}

/// A connection to the stub of a machine. While there is one, the guest runs only between [`Gdb::go_on`] and a stop.
#[derive(Debug)]
pub struct Gdb {
    stream: UnixStream,
    received: Vec<u8>,
    /// Its names for the CPUs.
    cpus: Vec<String>,
}

impl Gdb {
    /// Greets the stub; the guest stands still from then on.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let mut gdb = Self { stream, received: Vec::new(), cpus: Vec::new() };
        gdb.command("qSupported:")?;
        // Only who has asked which registers there are may write a single one.
        gdb.command("qXfer:features:read:target.xml:0,ff0")?;
        gdb.expect("Qqemu.PhyMemMode:1", "OK")?;
        let mut list = gdb.command("qfThreadInfo")?;
        while let Some(names) = list.strip_prefix('m') {
            gdb.cpus.extend(names.split(',').map(str::to_owned));
            list = gdb.command("qsThreadInfo")?;
        }
        if gdb.cpus.is_empty() {
            return Err(Error::Qemu(format!("gdb: no CPUs in {list:?}")));
        }
        Ok(gdb)
    }

    /// How many CPUs there are.
    pub fn cpus(&self) -> usize {
        self.cpus.len()
    }

    /// A CPU's registers.
    pub fn registers(&mut self, cpu: usize) -> Result<Registers> {
        self.select(cpu)?;
        let answer = self.command("g")?;
        let bytes = decode(&answer).ok_or_else(|| unexpected("g", &answer))?;
        let word = |n: usize| Some(u64::from_le_bytes(bytes.get(n * 8..n * 8 + 8)?.try_into().ok()?));
        let half = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let registers = || {
            let mut general = [0; 16];
            for (n, register) in general.iter_mut().enumerate() {
                *register = word(n)?;
            }
            Some(Registers { general, rip: word(16)?, eflags: half(136)?, cs: half(140)? })
        };
        registers().ok_or_else(|| unexpected("g", &answer))
    }

    /// Sets a CPU's register.
    pub fn set(&mut self, cpu: usize, register: Register, value: u64) -> Result<()> {
        self.select(cpu)?;
        let width = if register == Register::Eflags { 4 } else { 8 };
        let number = register as u32;
        self.expect(&format!("P{number:x}={}", encode(&value.to_le_bytes()[..width])), "OK")
    }

    /// Reads physical memory.
    pub fn read(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let piece = (length - bytes.len()).min(PIECE);
            let command = format!("m{:x},{piece:x}", at + bytes.len() as u64);
            let answer = self.command(&command)?;
            let read = decode(&answer).filter(|read| read.len() == piece);
            bytes.extend(read.ok_or_else(|| unexpected(&command, &answer))?);
        }
        Ok(bytes)
    }

    /// Writes physical memory, code included.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        for (piece, n) in bytes.chunks(PIECE).zip(0..) {
            let at = at + n * PIECE as u64;
            self.expect(&format!("M{at:x},{:x}:{}", piece.len(), encode(piece)), "OK")?;
        }
        Ok(())
    }

    /// Stops any CPU that comes to this (virtual) address.
    pub fn break_at(&mut self, address: u64) -> Result<()> {
        self.expect(&format!("Z0,{address:x},1"), "OK")
    }

    /// No longer does so.
    pub fn forget(&mut self, address: u64) -> Result<()> {
        self.expect(&format!("z0,{address:x},1"), "OK")
    }

    /// Lets all CPUs run.
    pub fn go_on(&mut self) -> Result<()> {
        self.send("vCont;c")
    }

    /// One instruction of one CPU.
    pub fn step(&mut self, cpu: usize) -> Result<()> {
        self.send(&format!("vCont;s:{}", self.cpus[cpu]))?;
        self.stopped(ANSWER)?.map(drop).ok_or_else(|| Error::Qemu("gdb: a step without an end".into()))
    }

    /// Waits for a stop: which CPU; none if the time is over.
    pub fn stopped(&mut self, timeout: Duration) -> Result<Option<usize>> {
        let Some(packet) = self.receive(timeout)? else { return Ok(None) };
        let name = packet.split(';').find_map(|part| part.split_once("thread:")).map(|(_, name)| name);
        let known = name.and_then(|name| self.cpus.iter().position(|cpu| cpu == name));
        match known {
            Some(cpu) if packet.starts_with(STOP) => Ok(Some(cpu)),
            _ => Err(unexpected("a stop", &packet)),
        }
    }

    /// Stops all CPUs where they are.
    pub fn stop(&mut self) -> Result<()> {
        self.stream.write_all(&[3]).map_err(lost)?;
        self.stopped(ANSWER)?.map(drop).ok_or_else(|| Error::Qemu("gdb: it does not stop".into()))
    }

    /// Leaves the guest to itself, running.
    pub fn detach(mut self) -> Result<()> {
        self.expect("D", "OK")
    }

    fn select(&mut self, cpu: usize) -> Result<()> {
        let name = self.cpus.get(cpu).ok_or_else(|| Error::Qemu(format!("gdb: no CPU {cpu}")))?;
        self.expect(&format!("Hg{name}"), "OK")
    }

    fn expect(&mut self, command: &str, wanted: &str) -> Result<()> {
        let answer = self.command(command)?;
        if answer == wanted { Ok(()) } else { Err(unexpected(command, &answer)) }
    }

    fn command(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        loop {
            let answer = self.receive(ANSWER)?;
            let answer = answer.ok_or_else(|| Error::Qemu(format!("gdb: no answer to {command}")))?;
            // That the guest stood still when we came is told unasked; no answer looks like that.
            if !answer.starts_with(STOP) {
                return Ok(answer);
            }
        }
    }

    fn send(&mut self, command: &str) -> Result<()> {
        let packet = format!("${command}#{:02x}", checksum(command.as_bytes()));
        self.stream.write_all(packet.as_bytes()).map_err(lost)
    }

    /// The next packet; none if the time is over.
    fn receive(&mut self, timeout: Duration) -> Result<Option<String>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(packet) = self.take_packet() {
                // Not that it could get lost on a socket; but the stub sends it again otherwise.
                self.stream.write_all(b"+").map_err(lost)?;
                return Ok(Some(packet));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left)).map_err(lost)?;
            let mut buffer = [0; 8192];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(Error::Qemu("gdb: the machine has ended".into())),
                Ok(n) => self.received.extend(&buffer[..n]),
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => {}
                Err(error) => return Err(lost(error)),
            }
        }
    }

    /// A whole packet from what has been received; what is between packets (acknowledgements) is dropped.
    fn take_packet(&mut self) -> Option<String> {
        let start = self.received.iter().position(|byte| *byte == b'$')?;
        let end = start + self.received[start..].iter().position(|byte| *byte == b'#')?;
        if self.received.len() < end + 3 {
            return None;
        }
        let packet = String::from_utf8_lossy(&self.received[start + 1..end]).into_owned();
        self.received.drain(..end + 3);
        Some(packet)
    }
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn encode(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

fn lost(error: std::io::Error) -> Error {
    Error::Qemu(format!("gdb: {error}"))
}

fn unexpected(command: &str, answer: &str) -> Error {
    let short: String = answer.chars().take(80).collect();
    Error::Qemu(format!("gdb: {command:.40}: {short:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Gdb, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Gdb { stream: ours, received: Vec::new(), cpus: vec!["01".into(), "02".into()] }, theirs)
    }

    fn packet(text: &str) -> String {
        format!("${text}#{:02x}", checksum(text.as_bytes()))
    }

    #[test]
    fn packets_are_told_apart() {
        let (mut gdb, mut stub) = pair();
        stub.write_all(format!("+{}{}", packet("T05thread:02;"), packet("OK")).as_bytes()).unwrap();
        assert_eq!(gdb.stopped(ANSWER).unwrap(), Some(1));
        assert_eq!(gdb.receive(ANSWER).unwrap().as_deref(), Some("OK"));
        assert_eq!(gdb.receive(Duration::from_millis(5)).unwrap(), None);
        drop(stub);
        assert!(gdb.receive(ANSWER).is_err());
    }

    #[test]
    fn memory_moves_in_pieces() {
        let (mut gdb, mut stub) = pair();
        let (first, rest) = (vec![7; PIECE], vec![9; 3]);
        stub.write_all((packet(&encode(&first)) + &packet(&encode(&rest))).as_bytes()).unwrap();
        assert_eq!(gdb.read(0x1000, PIECE + 3).unwrap(), [first, rest].concat());
        let mut asked = [0; 64];
        let n = stub.read(&mut asked).unwrap();
        assert!(String::from_utf8_lossy(&asked[..n]).starts_with("$m1000,400#"));
        stub.write_all(packet("E14").as_bytes()).unwrap();
        assert!(gdb.write(0, &[1]).is_err());
    }

    #[test]
    fn registers_are_read_by_place() {
        let (mut gdb, mut stub) = pair();
        let mut bytes: Vec<u8> = (0u64..17).flat_map(|n| (n + 100).to_le_bytes()).collect();
        bytes.extend([0x46, 2, 0, 0, 0x10, 0, 0, 0]);
        stub.write_all((packet("OK") + &packet(&encode(&bytes))).as_bytes()).unwrap();
        let registers = gdb.registers(0).unwrap();
        assert_eq!((registers.general[7], registers.rip), (107, 116));
        assert_eq!((registers.eflags, registers.cs), (0x246, 0x10));
    }
}
