//! `inspect files`

use snapshot::{FileKind, Process, Snapshot};

fn kind_word(kind: &FileKind) -> String {
    match kind {
        FileKind::Regular => "file".into(),
        FileKind::Directory => "dir".into(),
        FileKind::CharDevice { major, minor } => format!("char {major}:{minor}"),
        FileKind::Pipe { end, .. } => format!("pipe {end:?}").to_lowercase(),
        FileKind::Tty { .. } => "tty".into(),
        FileKind::Memfd { .. } => "memfd".into(),
        FileKind::HungUpTty => "tty that was hung up".into(),
        FileKind::Epoll(epoll) => format!("epoll of {}", epoll.items.len()),
        FileKind::EventFd(_) => "eventfd".into(),
        FileKind::TimerFd(_) => "timerfd".into(),
        FileKind::SignalFd(_) => "signalfd".into(),
        FileKind::Unix { .. } => "unix".into(),
        FileKind::Inet(_) => "inet".into(),
        FileKind::Netlink(_) => "netlink".into(),
        FileKind::Path => "path".into(),
        FileKind::PidFd(pidfd) => format!("pidfd {}", pidfd.pid),
        FileKind::Inotify(inotify) => format!("inotify {}", inotify.watches.len()),
        FileKind::Proc(_) => "proc".into(),
        FileKind::Namespace(namespace) => format!("ns {}", namespace.name),
        FileKind::Unsupported { what } => what.clone(),
        #[allow(unreachable_patterns)]
        _ => "?".into(),
    }
}

pub fn text(snapshot: &Snapshot, process: &Process) -> String {
    let mut out = format!("{:>5} {:>10} {:>12}  {:<14} {}\n", "FD", "FLAGS", "POSITION", "KIND", "NAME");
    for d in &process.descriptors {
        let Some(file) = snapshot.files.get(&d.file) else {
            out.push_str(&format!("{:>5} (could not be read)\n", d.fd));
            continue;
        };
        let cloexec = if d.cloexec { libc::O_CLOEXEC } else { 0 };
        let name = match &file.kind {
            FileKind::Unix { socket } => snapshot.unix_description(*socket),
            FileKind::Inet(socket) => socket.description(),
            FileKind::Netlink(socket) => socket.description(),
            _ => file.path.to_string(),
        };
        out.push_str(&format!(
            "{:>5} {:>#10o} {:>12}  {:<14} {}{}\n",
            d.fd,
            file.flags | cloexec,
            file.pos,
            kind_word(&file.kind),
            name,
            if file.deleted { " (deleted)" } else { "" }
        ));
    }
    out
}

/// Descriptors together with what they lead to.
pub fn json(snapshot: &Snapshot, process: &Process) -> Vec<serde_json::Value> {
    let entry = |d: &snapshot::Descriptor| {
        let file = snapshot.files.get(&d.file);
        let inode = file.and_then(|f| snapshot.inodes.get(&f.inode));
        // The list of page frames is for programs that pour, not for this table.
        let size = inode.map(|i| i.size);
        serde_json::json!({ "fd": d.fd, "cloexec": d.cloexec, "id": d.file, "file": file, "size": size })
    };
    process.descriptors.iter().map(entry).collect()
}
