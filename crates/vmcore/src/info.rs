//! The vmcoreinfo text (kernel/vmcore_info.c, before 6.9 kernel/crash_core.c): lines of `KEY=value`.

use crate::{Error, Result};

/// The text of the VMCOREINFO note, and typed access to its lines.
///
/// The dead kernel's text may be damaged like everything else: getters fail, never panic. When a
/// key stands there twice the last one counts, since lines are only ever appended.
#[derive(Debug, Clone, Default)]
pub struct VmcoreInfo {
    text: String,
}

impl VmcoreInfo {
    /// Takes the note's bytes. What is not UTF-8 is replaced; NUL padding is dropped.
    pub fn new(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes).replace('\0', "");
        VmcoreInfo { text }
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The value after `key=`, such as `get("OSRELEASE")` or `get("SYMBOL(init_uts_ns)")`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.text.lines().rev().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// The kernel's release, as in `uname -r`.
    pub fn osrelease(&self) -> Result<&str> {
        self.get("OSRELEASE").ok_or_else(|| Error::MissingInfo("OSRELEASE".into()))
    }

    /// `NUMBER(name)`: signed decimal (a few, such as VMALLOC_START, are written in hexadecimal
    /// with `0x`, and read as the same 64 bits).
    pub fn number(&self, name: &str) -> Result<i64> {
        self.parse(format!("NUMBER({name})"), |value| match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok().map(|v| v as i64),
            None => value.parse().ok(),
        })
    }

    /// `SYMBOL(name)`: a kernel virtual address, KASLR included.
    pub fn symbol(&self, name: &str) -> Result<u64> {
        self.parse(format!("SYMBOL({name})"), hexadecimal)
    }

    /// `OFFSET(struct.member)` in bytes.
    pub fn offset(&self, member: &str) -> Result<u64> {
        self.parse(format!("OFFSET({member})"), decimal)
    }

    /// `SIZE(struct)` in bytes.
    pub fn size(&self, name: &str) -> Result<u64> {
        self.parse(format!("SIZE({name})"), decimal)
    }

    /// `LENGTH(array)` in elements.
    pub fn length(&self, name: &str) -> Result<u64> {
        self.parse(format!("LENGTH({name})"), decimal)
    }

    /// How far KASLR moved the kernel's virtual addresses.
    pub fn kerneloffset(&self) -> Result<u64> {
        self.parse("KERNELOFFSET".into(), hexadecimal)
    }

    fn parse<T>(&self, key: String, parse: impl Fn(&str) -> Option<T>) -> Result<T> {
        let Some(value) = self.get(&key) else { return Err(Error::MissingInfo(key)) };
        match parse(value.trim()) {
            Some(parsed) => Ok(parsed),
            None => Err(Error::BadInfo { value: value.to_owned(), key }),
        }
    }
}

fn hexadecimal(value: &str) -> Option<u64> {
    u64::from_str_radix(value.trim_start_matches("0x"), 16).ok()
}

fn decimal(value: &str) -> Option<u64> {
    value.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_values() {
        let info = VmcoreInfo::new(
            b"OSRELEASE=6.1.0-x\nNUMBER(phys_base)=-905969664\nSYMBOL(_stext)=ffffffffb6000000\n\
              NUMBER(VMALLOC_START)=0xffffa4a540000000\nOFFSET(page.flags)=0\nSIZE(page)=64\n\
              LENGTH(mem_section)=2048\nKERNELOFFSET=35000000\nNUMBER(bad)=12x\nOWFPU=1f000\n\0\0",
        );
        assert_eq!(info.osrelease().unwrap(), "6.1.0-x");
        assert_eq!(info.number("phys_base").unwrap(), -905969664);
        assert_eq!(info.number("VMALLOC_START").unwrap() as u64, 0xffffa4a540000000);
        assert_eq!(info.symbol("_stext").unwrap(), 0xffffffffb6000000);
        assert_eq!(info.offset("page.flags").unwrap(), 0);
        assert_eq!(info.size("page").unwrap(), 64);
        assert_eq!(info.length("mem_section").unwrap(), 2048);
        assert_eq!(info.kerneloffset().unwrap(), 0x35000000);
        assert_eq!(info.get("OWFPU"), Some("1f000"));
        assert!(matches!(info.number("bad"), Err(Error::BadInfo { .. })));
        assert!(matches!(info.number("none"), Err(Error::MissingInfo(key)) if key == "NUMBER(none)"));
    }

    #[test]
    fn a_key_is_never_matched_by_its_beginning() {
        let info = VmcoreInfo::new(b"KERNELOFFSETS=1\nX=KERNELOFFSET=2\n");
        assert_eq!(info.get("KERNELOFFSET"), None);
    }
}
