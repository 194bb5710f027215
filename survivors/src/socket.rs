//! Sockets.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

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
