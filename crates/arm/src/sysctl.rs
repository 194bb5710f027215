//! The sysctls that turn trouble into a panic: set, remembered, put back.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use crate::Root;

/// Sysctl names (`kernel.panic_on_oops`) and values.
pub type Sysctls = BTreeMap<String, String>;

/// A sysctl that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the sysctl {name}: {error}")]
pub struct SysctlError {
    /// Its name.
    pub name: String,
    /// `read` or `set`.
    pub action: &'static str,
    #[allow(missing_docs)]
    pub error: io::Error,
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name.replace('.', "/"))
}

/// Sets `wanted` and returns what those that were changed had before.
///
/// Sysctls that this kernel does not have are left out: which exist depends on its configuration. When one cannot be set,
/// those already changed are put back.
pub fn set(root: &Root, wanted: &Sysctls) -> Result<Sysctls, SysctlError> {
    let mut before = Sysctls::new();
    for (name, value) in wanted {
        if let Err(error) = set_one(root, name, value, &mut before) {
            restore(root, &before, &Sysctls::new());
            return Err(error);
        }
    }
    Ok(before)
}

fn set_one(root: &Root, name: &str, value: &str, before: &mut Sysctls) -> Result<(), SysctlError> {
    let failed = |action| move |error| SysctlError { name: name.to_owned(), action, error };
    let old = match root.read(path(name)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed("read"))?,
    };
    if old != value {
        std::fs::write(root.join(path(name)), value).map_err(failed("set"))?;
        before.insert(name.to_owned(), old);
    }
    Ok(())
}

/// Puts back the values of `before`, except where somebody has changed them since: a value that is not the one in `ours` stays.
/// An empty `ours` puts everything back. Returns the names that were left alone or could not be written.
pub fn restore(root: &Root, before: &Sysctls, ours: &Sysctls) -> Vec<String> {
    let mut left = Vec::new();
    for (name, old) in before {
        let changed_since =
            ours.get(name).is_some_and(|our| root.read(path(name)).ok().as_ref() != Some(our));
        if changed_since || std::fs::write(root.join(path(name)), old).is_err() {
            left.push(name.clone());
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn machine(dir: &std::path::Path) -> Root {
        let root = Root::new(dir);
        fs::create_dir_all(root.join("/proc/sys/kernel")).unwrap();
        for (name, value) in [("panic", "0\n"), ("panic_on_oops", "0\n"), ("softlockup_panic", "1\n")] {
            fs::write(root.join("/proc/sys/kernel").join(name), value).unwrap();
        }
        root
    }

    fn wanted() -> Sysctls {
        let all = [
            ("kernel.panic", "10"),
            ("kernel.panic_on_oops", "1"),
            ("kernel.softlockup_panic", "1"),
            ("kernel.no_such", "1"),
        ];
        all.map(|(n, v)| (n.to_owned(), v.to_owned())).into()
    }

    #[test]
    fn set_remembers_and_restore_puts_back() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        let before = set(&root, &wanted()).unwrap();
        assert_eq!(root.read("/proc/sys/kernel/panic").unwrap(), "10");
        let expected: Sysctls =
            [("kernel.panic", "0"), ("kernel.panic_on_oops", "0")].map(|(n, v)| (n.into(), v.into())).into();
        assert_eq!(before, expected, "unchanged and missing ones are not remembered");
        assert!(restore(&root, &before, &wanted()).is_empty());
        assert_eq!(root.read("/proc/sys/kernel/panic").unwrap(), "0");
        assert_eq!(root.read("/proc/sys/kernel/softlockup_panic").unwrap(), "1");
    }

    #[test]
    fn what_somebody_else_has_set_since_stays() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        let before = set(&root, &wanted()).unwrap();
        fs::write(root.join("/proc/sys/kernel/panic"), "60").unwrap();
        assert_eq!(restore(&root, &before, &wanted()), ["kernel.panic"]);
        assert_eq!(root.read("/proc/sys/kernel/panic").unwrap(), "60");
        assert_eq!(root.read("/proc/sys/kernel/panic_on_oops").unwrap(), "0");
    }

    #[test]
    fn a_failure_leaves_nothing_changed() {
        let dir = tempfile::tempdir().unwrap();
        let root = machine(dir.path());
        // Directories can be neither read nor written as files.
        fs::create_dir(root.join("/proc/sys/kernel/zzz")).unwrap();
        let mut wanted = wanted();
        wanted.insert("kernel.zzz".into(), "1".into());
        let error = set(&root, &wanted).unwrap_err();
        assert!(error.to_string().starts_with("cannot read the sysctl kernel.zzz: "), "{error}");
        assert_eq!(root.read("/proc/sys/kernel/panic").unwrap(), "0");
        assert_eq!(root.read("/proc/sys/kernel/panic_on_oops").unwrap(), "0");
    }
}
