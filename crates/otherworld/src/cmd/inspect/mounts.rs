//! `inspect mounts`

use autopsy::NamespaceMounts;
use snapshot::{Mount, MountFlags};

/// The options of /proc/self/mountinfo that all file systems have.
fn options(mount: &Mount) -> String {
    let names = [
        (MountFlags::NOSUID, "nosuid"),
        (MountFlags::NODEV, "nodev"),
        (MountFlags::NOEXEC, "noexec"),
        (MountFlags::NOATIME, "noatime"),
        (MountFlags::NODIRATIME, "nodiratime"),
        (MountFlags::RELATIME, "relatime"),
        (MountFlags::SYNCHRONOUS, "sync"),
    ];
    let read_only = mount.flags.intersects(MountFlags::READ_ONLY | MountFlags::SB_READ_ONLY);
    let mut options = vec![if read_only { "ro" } else { "rw" }.to_owned()];
    options.extend(
        names.iter().filter(|(flag, _)| mount.flags.contains(*flag)).map(|(_, name)| (*name).to_owned()),
    );
    if mount.peer_group != 0 {
        options.push(format!("shared:{}", mount.peer_group));
    }
    if mount.master != 0 {
        options.push(format!("master:{}", mount.master));
    }
    options.join(",")
}

/// How many PIDs of a namespace are named.
const NAMED: usize = 16;

pub fn text(namespaces: &[NamespaceMounts]) -> String {
    let mut out = String::new();
    for (n, namespace) in namespaces.iter().enumerate() {
        let pids: Vec<String> = namespace.pids.iter().take(NAMED).map(ToString::to_string).collect();
        let more = match namespace.pids.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        out.push_str(&format!(
            "{}mnt:[{}]{}: {}{more}\n",
            if n > 0 { "\n" } else { "" },
            namespace.number,
            if namespace.initial { ", the initial one" } else { "" },
            if pids.is_empty() { "nobody".to_owned() } else { format!("PIDs {}", pids.join(" ")) },
        ));
        let rows = namespace.mounts.iter().map(|mount| {
            let root = mount.root.to_string();
            let source = mount.source.to_string();
            [
                mount.mountpoint.to_string(),
                // As findmnt(8) shows what is mounted of a file system when that is not all of it.
                if root == "/" { source } else { format!("{source}[{root}]") },
                mount.fs_type.to_string(),
                format!("{}:{}", mount.dev_major, mount.dev_minor),
                options(mount),
            ]
        });
        out.push_str(&super::table(&["TARGET", "SOURCE", "FSTYPE", "DEVICE", "OPTIONS"], &[], rows));
    }
    out
}
