//! What the kernel says about this process.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, bail};

/// Some fields of `/proc/thread-self/status`.
pub fn status(fields: &[&str]) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string("/proc/thread-self/status")?;
    let all: BTreeMap<_, _> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.trim()))
        .collect();
    fields
        .iter()
        .map(|&field| {
            let value = all.get(field).with_context(|| format!("/proc/thread-self/status has no {field}"))?;
            Ok((field.to_owned(), (*value).to_owned()))
        })
        .collect()
}

/// Field `number` (counted from 1, as in proc(5)) of a process's `stat`.
pub fn stat_field(pid: i32, number: usize) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the name, in parentheses, and may hold anything.
    let rest = text.rsplit_once(')').context("strange stat")?.1;
    let field = number.checked_sub(3).and_then(|skip| rest.split_whitespace().nth(skip));
    Ok(field.context("strange stat")?.to_owned())
}

/// A mapping as `/proc/self/smaps` shows it: permissions and the words of `VmFlags`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: usize,
    /// Address after the last.
    pub end: usize,
    /// `rw-p`
    pub permissions: String,
    /// `rd wr mr …`
    pub flags: String,
}

/// The mapping at an address.
pub fn mapping(address: usize) -> Result<Mapping> {
    let text = fs::read_to_string("/proc/self/smaps")?;
    let mut found: Option<Mapping> = None;
    for line in text.lines() {
        if let Some((start, end, permissions)) = head(line) {
            if (start..end).contains(&address) {
                found =
                    Some(Mapping { start, end, permissions: permissions.to_owned(), flags: String::new() });
            }
        } else if let (Some(mapping), Some(flags)) = (&mut found, line.strip_prefix("VmFlags:")) {
            mapping.flags = flags.trim().to_owned();
            return Ok(mapping.clone());
        }
    }
    bail!("nothing is mapped at {address:#x}")
}

/// A line (in KiB) of a process's smaps about the mapping at an address.
pub fn smaps_value(pid: i32, address: usize, key: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut here = false;
    for line in text.lines() {
        if let Some((start, end, _)) = head(line) {
            here = (start..end).contains(&address);
        } else if let Some((name, value)) = line.split_once(':').filter(|_| here)
            && name == key
        {
            return Ok(value.trim().trim_end_matches(" kB").parse()?);
        }
    }
    bail!("PID {pid} has no {key} at {address:#x}")
}

fn head(line: &str) -> Option<(usize, usize, &str)> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?, words.next()?))
}

/// Fails with both sides if they differ.
pub fn same<T: PartialEq + std::fmt::Debug + ?Sized>(what: &str, before: &T, after: &T) -> Result<()> {
    if before != after {
        bail!("{what}: {before:?} before, {after:?} after");
    }
    Ok(())
}
