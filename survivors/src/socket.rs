//! Sockets.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use anyhow::Result;

use crate::Stage;
use crate::procfs::same;

/// Still listening, and somebody can connect.
pub fn tcp(stage: &mut Stage) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;

    let crash = stage.crash()?;
    same("address", &address, &listener.local_addr()?)?;
    let mut caller = TcpStream::connect(address)?;
    let (mut callee, _) = listener.accept()?;
    caller.write_all(if crash.damage { b"noise" } else { b"hello" })?;
    let mut word = [0; 5];
    callee.read_exact(&mut word)?;
    same("what arrived", b"hello", &word)
}

/// A connected pair, with bytes on their way.
pub fn unix_pair(stage: &mut Stage) -> Result<()> {
    let (mut near, mut far) = UnixStream::pair()?;
    near.write_all(b"on its way")?;

    let crash = stage.crash()?;
    if crash.damage {
        far.read_exact(&mut [0; 1])?;
    }
    near.write_all(b" and more")?;
    drop(near);
    let mut words = String::new();
    far.read_to_string(&mut words)?;
    same("what arrived", &"on its way and more".to_owned(), &words)
}
