use synth::{PTR, Record, Synth, U64, named};

use super::*;
use crate::testing::open;

struct Fake {
    synth: Synth,
    file: u64,
    whole: u64,
    sock: u64,
    cache: u64,
}

impl Fake {
    fn new() -> Self {
        let mut synth = Synth::new();
        let record = Record::new;
        synth
            .structure("socket", record().field("file", PTR).field("sk", PTR))
            .structure("inode", record().field("i_ino", U64))
            .structure(
                "socket_alloc",
                record().field("socket", named("socket")).field("vfs_inode", named("inode")),
            )
            .structure("refcount", record().field("refs", named("atomic_t")))
            .structure(
                "sock_common",
                record().field("skc_node", named("hlist_node")).field("skc_refcnt", named("refcount")),
            )
            .structure(
                "sock",
                record()
                    .field("__sk_common", named("sock_common"))
                    .field("sk_socket", PTR)
                    .field("sk_prot_creator", PTR),
            )
            .structure("proto", record().field("slab", PTR));
        let cache = synth.slab_cache("UNIX", synth.size_of("sock"));
        let (sock, proto, whole) =
            (synth.slab_alloc(cache), synth.alloc("proto"), synth.alloc("socket_alloc"));
        let file = synth.alloc_bytes(64, 64);
        synth
            .set("socket", whole, "file", file)
            .set("socket", whole, "sk", sock)
            .set("sock", sock, "sk_socket", whole)
            .set("sock", sock, "sk_prot_creator", proto)
            .set("sock", sock, "__sk_common.skc_refcnt.refs.counter", 2)
            .set("proto", proto, "slab", cache);
        let bucket = synth.alloc("hlist_head");
        let node = synth.address_of("sock", sock, "__sk_common.skc_node");
        synth.hlist_add_head(node, bucket);
        synth.set("sock", sock, "__sk_common.skc_node.pprev", bucket);
        Self { synth, file, whole, sock, cache }
    }

    fn said(&self) -> Vec<String> {
        let kernel = open(&self.synth);
        let autopsy = Autopsy::new(&kernel);
        let inode = self.synth.address_of("socket_alloc", self.whole, "vfs_inode");
        let mut doubts = Doubts::default();
        let checked = autopsy.check_socket(self.file, inode, self.whole, "socket:[1]", &mut doubts);
        autopsy.outcome(checked, LINK, OBJECT, self.whole, &mut doubts);
        assert!(autopsy.findings().is_empty());
        doubts.0.into_iter().map(|doubt| doubt.text).collect()
    }

    #[track_caller]
    fn assert_said(&self, what: &str) {
        let said = self.said();
        assert!(said.iter().any(|text| text.contains(what)), "{said:?}");
    }
}

#[test]
fn a_socket_knows_its_file_and_its_protocol_part() {
    let fake = Fake::new();
    assert_eq!(fake.said(), Vec::<String>::new());
    let with = |ty: &str, at: u64, member: &str, value: u64| {
        let mut synth = fake.synth.clone();
        synth.set(ty, at, member, value);
        Fake { synth, ..fake }
    };
    with("socket", fake.whole, "file", fake.file + 8).assert_said("another open file");
    with("sock", fake.sock, "sk_socket", fake.whole + 64).assert_said("another socket");
    with("sock", fake.sock, "__sk_common.skc_refcnt.refs.counter", 0).assert_said("is free");
    with("sock", fake.sock, "__sk_common.skc_node.pprev", fake.cache).assert_said("table of sockets");
    with("sock", fake.sock, "sk_prot_creator", 8).assert_said("cannot read");
    with("socket", fake.whole, "sk", fake.sock + 8).assert_said("protocol's part");
    let elsewhere = Fake { whole: fake.whole, ..Fake::new() };
    let kernel = open(&elsewhere.synth);
    let mut doubts = Doubts::default();
    Autopsy::new(&kernel)
        .check_socket(elsewhere.file, elsewhere.whole + 0x100, elsewhere.whole, "socket:[1]", &mut doubts)
        .unwrap();
    assert!(doubts.0[0].text.contains("not one object"));
}
