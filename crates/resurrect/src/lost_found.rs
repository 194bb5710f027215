//! Dirty pages of which the dead kernel's structures do not agree whose they are. They are not written over good data, but kept beside it, with
//! what is known of them.

use std::fs::{self, DirBuilder, File};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use serde::Serialize;
use snapshot::{DoubtfulPage, Inode, InodeId, PAGE_SIZE, PhysMem, Snapshot};

/// Where they go.
pub(crate) const DIRECTORY: &str = "/var/lib/otherworld/lost+found";
/// Pages that are kept, of all files.
const MOST: u64 = 1 << 16;

/// What is kept beside a page.
#[derive(Serialize)]
struct Known<'a> {
    path: String,
    fs_type: String,
    device: (u32, u32),
    inode: u64,
    generation: u32,
    /// Bytes.
    offset: u64,
    size: u64,
    why: &'a str,
}

/// Keeps all of them below `directory`; for each inode that has such ones what became of them.
pub(crate) fn keep(snapshot: &Snapshot, mem: &dyn PhysMem, directory: &Path) -> Vec<(InodeId, String)> {
    let mut room = MOST;
    let doubtful = snapshot.inodes.iter().filter(|(_, inode)| !inode.doubtful.is_empty());
    let mut told = Vec::new();
    for (id, inode) in doubtful {
        let (mut kept, mut failed) = (0, None);
        for page in &inode.doubtful {
            match room.checked_sub(page.count.into()) {
                Some(rest) => room = rest,
                None => {
                    failed.get_or_insert_with(|| "there are too many".to_owned());
                    continue;
                }
            }
            match keep_one(inode, page, mem, directory) {
                Ok(()) => kept += u64::from(page.count),
                Err(error) => _ = failed.get_or_insert(error.to_string()),
            }
        }
        let why = inode.doubtful.first().map_or("", |page| &page.why);
        let lost = failed.map_or_else(String::new, |why| format!(", and others are lost: {why}"));
        let text = format!(
            "dirty pages that may not be its own ({why}) were not written: {kept} are in {}{lost}",
            directory.display()
        );
        told.push((*id, text));
    }
    told
}

fn keep_one(inode: &Inode, page: &DoubtfulPage, mem: &dyn PhysMem, directory: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let name = format!("{}:{}-{}-{}", inode.dev_major, inode.dev_minor, inode.ino, page.index);
    let create = |name: &str| -> std::io::Result<File> {
        // One that is there is of an earlier time.
        let path = directory.join(name);
        _ = fs::remove_file(&path);
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    };
    let mut file = create(&name)?;
    let mut bytes = vec![0; PAGE_SIZE as usize];
    for n in 0..u64::from(page.count) {
        let at = page.pfn.saturating_add(n).saturating_mul(PAGE_SIZE);
        mem.read(at, &mut bytes).map_err(std::io::Error::other)?;
        file.write_all(&bytes)?;
    }
    let known = Known {
        path: inode.path.to_string(),
        fs_type: inode.fs_type.to_string(),
        device: (inode.dev_major, inode.dev_minor),
        inode: inode.ino,
        generation: inode.generation,
        offset: page.index.saturating_mul(PAGE_SIZE),
        size: inode.size,
        why: &page.why,
    };
    serde_json::to_writer_pretty(create(&format!("{name}.json"))?, &known)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::{PhysMap, PhysMemError, PhysRange};

    struct Mem([PhysRange; 1]);

    impl PhysMem for Mem {
        fn ranges(&self) -> &[PhysRange] {
            &self.0
        }
        fn map(&self, addr: u64, len: usize) -> Result<PhysMap<'_>, PhysMemError> {
            static PAGE: [u8; 2 * PAGE_SIZE as usize] = [b'p'; 2 * PAGE_SIZE as usize];
            let absent = PhysMemError::NotPresent { addr, len: len as u64 };
            let inside = addr.checked_add(len as u64).is_some_and(|end| end <= self.0[0].len);
            PAGE.get(..len).filter(|_| inside).map(PhysMap::borrowed).ok_or(absent)
        }
    }

    #[test]
    fn pages_are_kept_with_what_is_known_of_them() {
        let page = |index, pfn| DoubtfulPage { index, pfn, count: 1, why: "it says page 9".into() };
        let json = serde_json::json!({
            "ino": 7, "dev_major": 8, "dev_minor": 1, "fs_type": "ext4", "mode": 0o100640, "uid": 1, "gid": 2, "nlink": 1,
            "size": 10_000, "atime": {"sec": 5, "nsec": 0}, "mtime": {"sec": 5, "nsec": 7},
            "ctime": {"sec": 0, "nsec": 0}, "path": "/f", "dirty": true, "pages": [], "lost_pages": 0,
        });
        let inode: Inode = serde_json::from_value(json).unwrap();
        let inode = Inode { doubtful: vec![page(2, 0), page(1, 77)], ..inode };
        let mut snapshot = Snapshot::default();
        snapshot.inodes.insert(InodeId(3), inode);
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("lost+found");
        let mem = Mem([PhysRange { start: 0, len: 2 * PAGE_SIZE }]);
        let told = keep(&snapshot, &mem, &at);
        assert_eq!(told.len(), 1);
        assert!(told[0].1.contains("(it says page 9)") && told[0].1.contains(": 1 are in"), "{}", told[0].1);
        assert!(told[0].1.contains("others are lost"), "{}", told[0].1);
        assert_eq!(fs::read(at.join("8:1-7-2")).unwrap(), [b'p'; PAGE_SIZE as usize]);
        let known = fs::read_to_string(at.join("8:1-7-2.json")).unwrap();
        assert!(known.contains("\"offset\": 8192") && known.contains("\"path\": \"/f\""), "{known}");
    }
}
