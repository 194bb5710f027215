use synth::{PTR, Record, Synth, U16, U32, U64, array, named};

use super::*;
use crate::testing::open;

/// A descriptor table with files at 0 and 2.
fn table() -> (Synth, u64, u64) {
    let mut synth = Synth::new();
    let record = Record::new;
    synth
        .structure("fdtable", record().field("max_fds", U32).field("fd", PTR).field("open_fds", PTR))
        .structure("files_struct", record().field("fdt", PTR).field("file_lock", U32));
    let (files, fdt) = (synth.alloc("files_struct"), synth.alloc("fdtable"));
    let (fds, open) = (synth.alloc_bytes(64 * 8, 64), synth.alloc_bytes(8, 8));
    synth
        .set("files_struct", files, "fdt", fdt)
        .set("fdtable", fdt, "max_fds", 64)
        .set("fdtable", fdt, "fd", fds)
        .set("fdtable", fdt, "open_fds", open)
        .write_u64(open, 0b1101)
        .write_u64(fds, 0xffff_8880_0000_1000)
        .write_u64(fds + 16, 0xffff_8880_0000_2000);
    (synth, files, open)
}

fn said(synth: &Synth, files: u64) -> Vec<String> {
    let kernel = open(synth);
    let autopsy = Autopsy::new(&kernel);
    let mut doubts = Doubts::default();
    autopsy.check_table(files, &mut doubts).unwrap();
    doubts.0.into_iter().map(|doubt| doubt.text).collect()
}

#[test]
fn every_file_in_the_table_has_its_bit() {
    let (mut synth, files, open) = table();
    assert_eq!(said(&synth, files), Vec::<String>::new(), "3 is reserved for an open() in flight");
    synth.write_u64(open, 0b1001);
    assert_eq!(said(&synth, files), ["descriptor 2 has a file, and is closed by the bitmap"]);
    synth.set("files_struct", files, "file_lock", 1);
    assert_eq!(said(&synth, files), Vec::<String>::new(), "dup2() is about to set it");
}

/// A regular file that is open, with all that it refers to.
struct Fake {
    synth: Synth,
    file: u64,
    dentry: u64,
    inode: u64,
    other: u64,
}

impl Fake {
    fn new() -> Self {
        let mut synth = Synth::new();
        let record = Record::new;
        synth
            .structure("path", record().field("mnt", PTR).field("dentry", PTR))
            .structure("atomic64", record().field("counter", synth::I64))
            .structure(
                "file",
                record()
                    .field("f_path", named("path"))
                    .field("f_inode", PTR)
                    .field("f_mapping", PTR)
                    .field("f_mode", U32)
                    .field("f_cred", PTR)
                    .field("f_count", named("atomic64"))
                    .field("private_data", PTR),
            )
            .structure("alias", record().field("d_alias", named("hlist_node")))
            .structure(
                "dentry",
                record().field("d_inode", PTR).field("d_sb", PTR).field("d_u", named("alias")),
            )
            .structure("vfsmount", record().field("mnt_sb", PTR))
            .structure("address_space", record().field("host", PTR))
            .structure(
                "inode",
                record()
                    .field("i_mode", U16)
                    .field("i_sb", PTR)
                    .field("i_mapping", PTR)
                    .field("i_lock", U32)
                    .field("i_dentry", named("hlist_head"))
                    .field("i_data", named("address_space")),
            )
            .structure(
                "super_block",
                record()
                    .field("s_dev", U32)
                    .field("s_flags", U64)
                    .field("s_type", PTR)
                    .field("s_subtype", PTR)
                    .field("s_root", PTR),
            )
            .structure("file_system_type", record().field("name", PTR))
            .structure("rest", record().field("words", array(U64, 4)));
        let name = synth.string("ext4");
        let (sb, fs_type, mount) =
            (synth.alloc("super_block"), synth.alloc("file_system_type"), synth.alloc("vfsmount"));
        let (file, dentry, root) = (synth.alloc("file"), synth.alloc("dentry"), synth.alloc("dentry"));
        let cache = synth.slab_cache("ext4_inode_cache", synth.size_of("inode") + 32);
        let inodes = [0; 3].map(|_| synth.slab_alloc(cache) + 32);
        synth
            .set("file_system_type", fs_type, "name", name)
            .set("super_block", sb, "s_type", fs_type)
            .set("super_block", sb, "s_root", root)
            .set("dentry", root, "d_inode", inodes[0])
            .set("vfsmount", mount, "mnt_sb", sb)
            .set("file", file, "f_path.mnt", mount)
            .set("file", file, "f_path.dentry", dentry)
            .set("file", file, "f_inode", inodes[1])
            .set("file", file, "f_count.counter", 2)
            .set("dentry", dentry, "d_inode", inodes[1])
            .set("dentry", dentry, "d_sb", sb);
        for inode in inodes {
            let data = synth.address_of("inode", inode, "i_data");
            synth
                .set("inode", inode, "i_mode", S_IFREG)
                .set("inode", inode, "i_sb", sb)
                .set("inode", inode, "i_mapping", data)
                .set("address_space", data, "host", inode);
        }
        let data = synth.address_of("inode", inodes[1], "i_data");
        synth.set("file", file, "f_mapping", data);
        let head = synth.address_of("inode", inodes[1], "i_dentry");
        let alias = synth.address_of("dentry", dentry, "d_u.d_alias");
        synth.hlist_add_head(alias, head);
        synth.set("dentry", dentry, "d_u.d_alias.pprev", head);
        Self { synth, file, dentry, inode: inodes[1], other: inodes[2] }
    }

    fn said(&self) -> Vec<String> {
        let kernel = open(&self.synth);
        let autopsy = Autopsy::new(&kernel);
        let mut machine = autopsy.machine(&[], &[]);
        machine.file_users.insert(self.file, 2);
        let mut doubts = Doubts::default();
        let checked = autopsy.check_links_of(self.file, "/x", &machine, &mut doubts);
        autopsy.outcome(checked, FindingKind::Link, OBJECT, self.file, &mut doubts);
        doubts.0.into_iter().map(|doubt| doubt.text).collect()
    }

    #[track_caller]
    fn assert_said(mut self, ty: &str, at: u64, member: &str, value: u64, what: &str) {
        self.synth.set(ty, at, member, value);
        let said = self.said();
        assert!(said.iter().any(|text| text.contains(what)), "{member}: {said:?}");
    }
}

#[test]
fn file_name_inode_and_file_system_belong_together() {
    let fake = Fake::new();
    assert_eq!(fake.said(), Vec::<String>::new());
    let Fake { file, dentry, inode, other, .. } = fake;
    let data = |f: &Fake, inode| f.synth.address_of("inode", inode, "i_data");
    let foreign = data(&fake, other);
    fake.assert_said("file", file, "f_inode", other, "its name and its inode");
    Fake::new().assert_said("dentry", dentry, "d_inode", other, "its name and its inode");
    Fake::new().assert_said("file", file, "f_count.counter", 1, "2 descriptors and mappings use it");
    Fake::new().assert_said("file", file, "f_mapping", foreign, "its page cache is not its inode's");
    let own = data(&Fake::new(), inode);
    Fake::new().assert_said("address_space", own, "host", other, "another inode's");
    Fake::new().assert_said("inode", inode, "i_sb", own, "another file system");
    Fake::new().assert_said("dentry", dentry, "d_u.d_alias.pprev", own, "does not know its name");
    Fake::new().assert_said("file", file, "f_inode", inode - 8, "");
    let mount = Fake::new().synth.get_u64("file", file, "f_path.mnt");
    Fake::new().assert_said("vfsmount", mount, "mnt_sb", own, "than its mount");
    Fake::new().assert_said("file", file, "f_path.dentry", 8, "cannot read");
}

#[test]
fn inodes_of_a_file_system_lie_where_its_root_does() {
    let fake = Fake::new();
    let kernel = open(&fake.synth);
    let autopsy = Autopsy::new(&kernel);
    let sb = fake.synth.get_u64("inode", fake.inode, "i_sb");
    assert_eq!(autopsy.inode_contradiction(fake.other, sb).unwrap(), None);
    assert!(autopsy.inode_contradiction(fake.other + 8, sb).unwrap().is_some());
    assert!(autopsy.inode_contradiction(fake.dentry, sb).unwrap().is_some_and(|why| why.contains("no slab")));
}
