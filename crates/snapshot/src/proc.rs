//! Files that the kernel makes up as they are read: /proc, /sys, cgroups; and the files that stand for namespaces.

use serde::{Deserialize, Serialize};

use crate::{Descriptor, FileKind, OpenFile, Pid, Reason, Snapshot};

/// A file or directory of a file system that is a view into the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcFile {
    /// What it is about, for `/proc/PID/…`: the process, or for `/proc/PID/task/TID/…` the thread.
    pub task: Option<Pid>,
    /// The task had ended.
    pub gone: bool,
}

/// A file that stands for a namespace (`/proc/PID/ns/…`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceFile {
    /// Its name in /proc/PID/ns: `net`.
    pub name: String,
    /// Of the initial namespaces.
    pub initial: bool,
}

const O_ACCMODE: i32 = 3;
const O_WRONLY: i32 = 1;

pub(crate) fn judge(
    snapshot: &Snapshot,
    d: &Descriptor,
    file: &OpenFile,
    reasons: &mut Vec<Reason>,
    losses: &mut Vec<Reason>,
) {
    let at = |why: &str| format!("descriptor {} ({}): {why}", d.fd, file.path);
    let mut give_up = |why: &str| reasons.push(Reason::new("descriptor", at(why)));
    match &file.kind {
        FileKind::Namespace(namespace) if !namespace.initial => {
            give_up("a namespace other than the initial one: not brought back by this version");
        }
        // The processes live in another one than before, in which their clocks go on.
        FileKind::Namespace(namespace) if namespace.name.starts_with("time") => {
            give_up("the time namespace: not brought back by this version");
        }
        FileKind::Proc(proc) => {
            let target = proc.task.map(|task| snapshot.process(task));
            if proc.gone {
                // Reading it fails as before.
            } else if let Some(why) = crate::namespace::obstacle_of_place(snapshot, file) {
                give_up(&why);
            } else if file.deleted {
                give_up("it is gone from its file system: not brought back by this version");
            } else if let Some(None) = target {
                let text = at(
                    "it is about a thread that is not the first of its process, or about the kernel: it reads as if that had ended",
                );
                losses.push(Reason::new("proc-file", text));
            } else if let Some(Some(other)) = target
                && !matches!(other.fs.root.as_bytes(), b"" | b"/")
            {
                // What mounts, for one, shows depends on the root at the time of opening.
                give_up(
                    "it is about a process with a root directory of its own: not brought back by this version",
                );
            } else if file.pos != 0 && file.flags & O_ACCMODE != O_WRONLY {
                let text = at(&format!(
                    "it had been read up to position {}: what follows is of new contents",
                    file.pos
                ));
                losses.push(Reason::new("proc-file", text));
            }
        }
        _ => {}
    }
}
