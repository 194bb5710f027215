//! QEMU's machine protocol: the half a dozen commands that the lab uses, over QEMU's Unix socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{Error, Result};

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Greets QEMU. Each answer must come within `timeout`.
    pub(crate) fn new(stream: UnixStream, timeout: Duration) -> Result<Self> {
        stream.set_read_timeout(Some(timeout)).map_err(lost)?;
        stream.set_write_timeout(Some(timeout)).map_err(lost)?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        qmp.receive(|message| message.get("QMP").cloned())?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// One command and its `return` value.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut text = json!({ "execute": name, "arguments": arguments }).to_string();
        text.push('\n');
        // In one write: QEMU acts as soon as the object is closed, and after `quit` nobody takes the end of the line.
        self.reader.get_mut().write_all(text.as_bytes()).map_err(lost)?;
        let answer = self.receive(|message| {
            let found = message.get("return").or_else(|| message.get("error"));
            found.is_some().then(|| message.clone())
        })?;
        match answer.get("error") {
            Some(error) => Err(Error::Qemu(format!("{name}: {}", error["desc"].as_str().unwrap_or("?")))),
            None => Ok(answer["return"].clone()),
        }
    }

    /// A command of the human monitor; its output.
    pub fn human(&mut self, line: &str) -> Result<String> {
        let output = self.command("human-monitor-command", json!({ "command-line": line }))?;
        Ok(output.as_str().unwrap_or_default().to_owned())
    }

    /// Events are skipped.
    fn receive(&mut self, mut pick: impl FnMut(&Value) -> Option<Value>) -> Result<Value> {
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).map_err(lost)? == 0 {
                return Err(Error::Qemu("the monitor has closed".into()));
            }
            let message: Value =
                serde_json::from_str(&line).map_err(|error| Error::Qemu(error.to_string()))?;
            if let Some(found) = pick(&message) {
                return Ok(found);
            }
        }
    }
}

fn lost(error: std::io::Error) -> Error {
    Error::Qemu(format!("monitor: {error}"))
}
