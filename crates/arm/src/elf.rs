//! Shared libraries that a program needs, found as the dynamic loader finds them (ld.so(8)).

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};

use object::Endianness;
use object::elf::{DT_NEEDED, DT_RPATH, DT_RUNPATH, FileHeader64, PT_INTERP};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};

use crate::Root;

const DEFAULT_DIRS: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];

/// What one ELF file asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Needs {
    interpreter: Option<String>,
    libraries: Vec<String>,
    run_path: Vec<String>,
}

fn needs(data: &[u8]) -> Result<Needs, object::Error> {
    let header = FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let segments = header.program_headers(endian, data)?;
    let mut needs = Needs::default();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    for segment in segments {
        if segment.p_type(endian) == PT_INTERP
            && let Some(path) = segment.interpreter(endian, data)?
        {
            needs.interpreter = Some(text(path));
        }
    }
    let Some(dynamic) = segments.iter().find_map(|s| s.dynamic(endian, data).transpose()).transpose()? else {
        return Ok(needs);
    };
    let find = |tag: u32| dynamic.iter().find(|d| d.tag32(endian) == Some(tag)).map(|d| d.d_val(endian));
    let (Some(strings), Some(size)) = (find(object::elf::DT_STRTAB), find(object::elf::DT_STRSZ)) else {
        return Ok(needs);
    };
    // The table is named by address; a segment says where in the file that is.
    let table = segments
        .iter()
        .find_map(|s| s.data_range(endian, data, strings, size).transpose())
        .transpose()
        .map_err(|()| object_error())?
        .ok_or_else(object_error)?;
    let string = |offset: u64| {
        let rest = table.get(usize::try_from(offset).ok()?..)?;
        Some(text(rest.split(|&b| b == 0).next()?))
    };
    for entry in dynamic {
        match entry.tag32(endian) {
            Some(DT_NEEDED) => needs.libraries.extend(string(entry.d_val(endian))),
            Some(DT_RPATH | DT_RUNPATH) => {
                let path = string(entry.d_val(endian)).unwrap_or_default();
                needs.run_path.extend(path.split(':').map(str::to_owned));
            }
            _ => {}
        }
    }
    Ok(needs)
}

fn object_error() -> object::Error {
    // The library's errors cannot be made by others; this is what it says about a file that is none.
    FileHeader64::<Endianness>::parse(&[0u8; 0][..]).expect_err("an empty file is no ELF file")
}

/// All files that `program` needs to run: itself, its loader, and its libraries, each once, as the machine names them.
pub fn closure(root: &Root, program: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = BTreeSet::new();
    let mut queue = VecDeque::from([program.to_owned()]);
    while let Some(path) = queue.pop_front() {
        if !all.insert(path.clone()) {
            continue;
        }
        let data = std::fs::read(root.join(&path))?;
        let needs = needs(&data)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display())))?;
        queue.extend(needs.interpreter.map(PathBuf::from));
        let origin = path.parent().unwrap_or(Path::new("/")).to_string_lossy().into_owned();
        let run_path: Vec<String> = needs
            .run_path
            .iter()
            .map(|p| p.replace("$ORIGIN", &origin).replace("${ORIGIN}", &origin))
            .collect();
        for library in needs.libraries {
            let dirs = run_path.iter().map(String::as_str).chain(DEFAULT_DIRS);
            let found =
                dirs.map(|d| Path::new(d).join(&library)).find(|p| root.exists(p)).ok_or_else(|| {
                    let text =
                        format!("{} needs {library}, which is in no library directory", path.display());
                    io::Error::new(io::ErrorKind::NotFound, text)
                })?;
            queue.push_back(found);
        }
    }
    Ok(all.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test machine's own shell: a dynamic program on every distribution.
    #[test]
    fn a_dynamic_program_brings_its_loader_and_libraries() {
        let all = closure(&Root::default(), Path::new("/bin/sh")).unwrap();
        let has = |part: &str| all.iter().any(|p| p.to_string_lossy().contains(part));
        assert!(has("/bin/sh") && has("libc.so") && has("ld-linux"), "{all:?}");
    }

    #[test]
    fn a_missing_library_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        std::fs::create_dir_all(root.join("/bin")).unwrap();
        std::fs::copy("/bin/sh", root.join("/bin/sh")).unwrap();
        let error = closure(&root, Path::new("/bin/sh")).unwrap_err();
        assert!(error.to_string().contains("/bin/sh needs libc.so"), "{error}");
    }

    #[test]
    fn what_is_no_program_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        std::fs::write(root.join("/x"), "#!/bin/sh\n").unwrap();
        assert_eq!(closure(&root, Path::new("/x")).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
