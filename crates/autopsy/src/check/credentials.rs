//! Credentials (include/linux/cred.h, kernel/cred.c, security/commoncap.c, fs/exec.c; 6.1 and 6.12): a damaged `cred` must not turn a
//! user into root.
//!
//! Nobody else changes a thread's credentials, and those in force are never written to (commit_creds() puts others in their place), so
//! that only their owner can be caught in a change, between the two pointers of a task on a CPU.
//!
//! What vouches for a `cred`: the slab cache, the second pointer, the user and the counters that belong to its user id, the other threads,
//! and what execve(2) wrote down about the ids of that time in the auxiliary vector. Who had no privileges then has found no way to them
//! since: setresuid(2) only shuffles the ids that are there.

use ktypes::KernelType;
use snapshot::{Capabilities, Credentials, FindingKind, Process};

use super::slab::{CRED, USER};
use super::{Doubts, Subject};
use crate::Autopsy;
use crate::error::Result;
use crate::process::{Group, Member};

const KIND: FindingKind = FindingKind::Credentials;
const OBJECT: &str = "credentials";
/// CAP_LAST_CAP of 6.1 and 6.12, where the kernel does not say.
const LAST_CAP: u32 = 40;
/// SECURE_ALL_BITS (include/uapi/linux/securebits.h), with those of 6.14.
const SECUREBITS: u32 = 0xfff;
// include/uapi/linux/auxvec.h
const AT_UID: u64 = 11;
const AT_EUID: u64 = 12;
const AT_GID: u64 = 13;
const AT_EGID: u64 = 14;
const AT_SECURE: u64 = 23;
/// access(2), faccessat(2), faccessat2(2): they look at files with other credentials for as long as they last.
const LOOKS_AS_ANOTHER: [i64; 3] = [21, 269, 439];

#[derive(KernelType)]
#[kernel("cred")]
struct Cred {
    /// 32 bits wide until 6.6, 64 since.
    #[kernel(address)]
    usage: u64,
    uid: u32,
    user: u64,
    user_ns: u64,
    ucounts: u64,
}

#[derive(KernelType)]
#[kernel("user_struct")]
struct User {
    uid: u32,
}

#[derive(KernelType)]
#[kernel("ucounts")]
struct Ucounts {
    ns: u64,
    uid: u32,
}

#[derive(KernelType)]
#[kernel("task_struct")]
struct Pointers {
    real_cred: u64,
    cred: u64,
}

/// Ids that execve(2) wrote down.
#[derive(Clone, Copy, Debug)]
struct AtExec {
    uids: [u32; 2],
    gids: [u32; 2],
    /// It gave ids or capabilities that its caller did not have.
    secure: bool,
}

impl AtExec {
    fn of(auxv: &[u64]) -> Option<Self> {
        let pairs = auxv.as_chunks::<2>().0;
        let value = |key| pairs.iter().find(|pair| pair[0] == key).map(|pair| pair[1]);
        let id = |key| value(key).and_then(|id| u32::try_from(id).ok());
        Some(Self {
            uids: [id(AT_UID)?, id(AT_EUID)?],
            gids: [id(AT_GID)?, id(AT_EGID)?],
            secure: value(AT_SECURE)? != 0,
        })
    }
}

impl Autopsy<'_> {
    pub(super) fn check_credentials(
        &self,
        subject: &Subject<'_>,
        process: &Process,
        groups: &[Group],
        doubts: &mut Doubts,
    ) {
        for member in subject.group.members.iter().filter(|m| !m.task.is_new()) {
            let checked = self.check_cred(member, process, doubts);
            self.outcome(checked, KIND, OBJECT, member.task.real_cred, doubts);
        }
        let Some(own) = process.threads.first() else { return };
        // Ids of other user namespaces mean something else; such a process is given up anyway.
        if !process.namespaces.user {
            return;
        }
        let full = full(self.last_cap());
        // A parent that has ended has left the session's leader, or a session that has ended the parent.
        let elders = groups.iter().filter(|group| [process.ppid, process.sid].contains(&group.leader.pid));
        let elders = elders.filter(|group| group.leader.pid != process.pid);
        let elders = elders.filter_map(|group| Some(self.credentials(group.leader.real_cred).ok()?.0));
        let elders: Vec<Credentials> = elders.collect();
        let spaces = self.address_spaces.borrow();
        let space = process.address_space.and_then(|id| spaces.get(&id));
        let at_exec = space.and_then(|space| AtExec::of(&space.layout.auxv));
        for thread in &process.threads {
            let cred = &thread.credentials;
            let said = [
                impossible(cred, full),
                at_exec.and_then(|at_exec| gained(cred, at_exec)),
                at_exec.and_then(|at_exec| half_root(cred, at_exec)),
                unlike_elders(cred, &elders, full),
                (thread.tid != own.tid).then(|| unlike_leader(cred, &own.credentials)).flatten(),
            ];
            for why in said.into_iter().flatten() {
                let at = subject.group.members.iter().find(|m| m.task.pid == thread.tid);
                let at = at.map_or(0, |member| member.task.real_cred);
                doubts.doubt(KIND, OBJECT, at, format!("thread {}: {why}", thread.tid));
            }
        }
    }

    /// What a `cred` and those that it refers to say of each other.
    fn check_cred(&self, member: &Member, process: &Process, doubts: &mut Doubts) -> Result<()> {
        let pointers: Pointers = self.kernel.read(member.addr)?;
        let tid = member.task.pid;
        let mut say = |at, why: &str| doubts.doubt(KIND, OBJECT, at, format!("thread {tid}: {why}"));
        if let Some(why) = self.slab_contradiction(CRED, pointers.real_cred) {
            say(pointers.real_cred, &format!("its credentials are none: {why}"));
            return Ok(());
        }
        let cred: Cred = self.kernel.read(pointers.real_cred)?;
        if self.kernel.read_u32(cred.usage)? == 0 {
            say(pointers.real_cred, "its credentials are used by nobody, as they say");
        }
        match self.slab_contradiction(USER, cred.user) {
            Some(why) => say(cred.user, &format!("the user of its credentials is none: {why}")),
            None => {
                let user: User = self.kernel.read(cred.user)?;
                if user.uid != cred.uid {
                    let why =
                        format!("its user id is {}, that of the user it counts for {}", cred.uid, user.uid);
                    say(pointers.real_cred, &why);
                }
            }
        }
        let ucounts: Ucounts = self.kernel.read(cred.ucounts)?;
        if cred.user_ns == self.kernel.symbol("init_user_ns")?
            && (ucounts.ns, ucounts.uid) != (cred.user_ns, cred.uid)
        {
            let why = format!("its user id is {}, that of its counters {}", cred.uid, ucounts.uid);
            say(pointers.real_cred, &why);
        }
        // Both pointers are written one after the other by the thread itself (commit_creds()).
        if pointers.cred == pointers.real_cred || self.cpus().current.contains_key(&member.addr) {
            return Ok(());
        }
        if let Some(why) = self.slab_contradiction(CRED, pointers.cred) {
            say(pointers.cred, &format!("the credentials that it acts with are none: {why}"));
            return Ok(());
        }
        let thread = process.threads.iter().find(|thread| thread.tid == tid);
        let call = thread.and_then(|thread| thread.syscall).map(|call| call.nr);
        let acting: Cred = self.kernel.read(pointers.cred)?;
        let is_looking = call.is_some_and(|nr| LOOKS_AS_ANOTHER.contains(&nr)) && acting.uid == cred.uid;
        // A file system on top of others goes to them with the credentials of who has mounted it.
        let is_stacked = || {
            let mounts = self.mounts().unwrap_or_default();
            mounts.iter().any(|mount| matches!(mount.fs_type.as_bytes(), b"overlay" | b"ecryptfs"))
        };
        if is_looking || member.task.has_exited() {
            return Ok(());
        }
        // What the kernel does in a call on its own account (firmware, host names, keys) it does as root.
        let may_be = call.is_some() && (acting.uid == 0 || is_stacked());
        let text = format!("thread {tid}: it acts with other credentials than its own");
        match may_be {
            true => doubts.note(KIND, OBJECT, pointers.real_cred, text),
            false => doubts.doubt(KIND, OBJECT, pointers.real_cred, text),
        }
        Ok(())
    }

    fn last_cap(&self) -> u32 {
        let known = self.kernel.symbol_opt("cap_last_cap").and_then(|at| self.kernel.read_u32(at).ok());
        known.filter(|last| (LAST_CAP..64).contains(last)).unwrap_or(LAST_CAP)
    }
}

/// All capabilities that there are.
fn full(last: u32) -> u64 {
    u64::MAX >> (63 - last.min(63))
}

/// What no sequence of system calls brings about.
fn impossible(cred: &Credentials, full: u64) -> Option<String> {
    let Capabilities { inheritable, permitted, effective, bounding, ambient } = cred.capabilities;
    if (inheritable | permitted | effective | bounding | ambient) & !full != 0 {
        return Some("it has capabilities that do not exist".into());
    }
    if effective & !permitted != 0 || ambient & !(permitted & inheritable) != 0 {
        return Some("it has capabilities in force that it may not have".into());
    }
    if cred.securebits & !SECUREBITS != 0 {
        return Some("it has security flags that do not exist".into());
    }
    // setgroups(2) sorts them (groups_sort(), kernel/groups.c), and the kernel looks them up as sorted.
    if !cred.groups.is_sorted() {
        return Some("its groups are in no order".into());
    }
    None
}

/// Privileges that a process has although it had none when it executed its program, and that gave it none. Capabilities that are passed
/// on (inheritable, ambient) could have been used to get others.
fn gained(cred: &Credentials, at_exec: AtExec) -> Option<String> {
    let capabilities = &cred.capabilities;
    let had_none = !at_exec.secure && !at_exec.uids.contains(&0);
    if !had_none || capabilities.inheritable | capabilities.ambient != 0 {
        return None;
    }
    let uids = [cred.uid, cred.euid, cred.suid, cred.fsuid];
    if let Some(id) = uids.into_iter().find(|id| !at_exec.uids.contains(id)) {
        return Some(format!(
            "it has the user id {id}, and was executed as {} without privileges",
            at_exec.uids[0]
        ));
    }
    let gids = [cred.gid, cred.egid, cred.sgid, cred.fsgid];
    if let Some(id) = gids.into_iter().find(|id| !at_exec.gids.contains(id)) {
        return Some(format!(
            "it has the group id {id}, and was executed as {} without privileges",
            at_exec.gids[0]
        ));
    }
    (capabilities.permitted != 0).then(|| "it has capabilities, and was executed without any".into())
}

/// One id of four that is root's, in a process that started with the same ones throughout and may not change them. Who was root and becomes a
/// user leaves at least two of them behind (setuid(2), setreuid(2), seteuid(2)), or has kept the capability to go back.
fn half_root(cred: &Credentials, at_exec: AtExec) -> Option<String> {
    const CAP_SETGID: u64 = 1 << 6;
    const CAP_SETUID: u64 = 1 << 7;
    let is_uniform =
        !at_exec.secure && at_exec.uids[0] == at_exec.uids[1] && at_exec.gids[0] == at_exec.gids[1];
    let lone = |ids: [u32; 4]| {
        let mut others = ids.into_iter().filter(|id| *id != 0);
        let first = others.next()?;
        let rest: Vec<u32> = others.collect();
        (rest == [first, first]).then_some(first)
    };
    let permitted = cred.capabilities.permitted;
    if !is_uniform {
        return None;
    }
    if let Some(id) =
        lone([cred.uid, cred.euid, cred.suid, cred.fsuid]).filter(|_| permitted & CAP_SETUID == 0)
    {
        return Some(format!("one of its user ids is root's, the others are {id}"));
    }
    let id = lone([cred.gid, cred.egid, cred.sgid, cred.fsgid]).filter(|_| permitted & CAP_SETGID == 0)?;
    Some(format!("one of its group ids is root's, the others are {id}"))
}

/// All capabilities without being root: nothing but root's child that keeps them has that. `elders`: its parent, its session's leader.
fn unlike_elders(cred: &Credentials, elders: &[Credentials], full: u64) -> Option<String> {
    let is_user = ![cred.uid, cred.euid, cred.suid].contains(&0);
    let all = cred.capabilities.permitted == full && cred.capabilities.ambient == 0;
    let inherited = elders.iter().any(|elder| elder.capabilities.permitted == full);
    (is_user && all && !inherited)
        .then(|| "it has all capabilities, unlike its parent, and is not root".into())
}

/// A thread that is root in a process of a user who cannot become root.
fn unlike_leader(cred: &Credentials, leader: &Credentials) -> Option<String> {
    let ids = |c: &Credentials| [c.uid, c.euid, c.suid];
    let can_be_root = ids(leader).contains(&0) || leader.capabilities.permitted != 0;
    // Threads that keep what the others have given up are root altogether.
    let half = ids(cred).contains(&0) && cred.capabilities.permitted == 0;
    (half && !can_be_root).then(|| "it is root without root's capabilities, unlike the other threads".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: u64 = 0x1ff_ffff_ffff;

    fn user(uid: u32) -> Credentials {
        let capabilities = Capabilities { bounding: FULL, ..Capabilities::default() };
        Credentials {
            uid,
            euid: uid,
            suid: uid,
            fsuid: uid,
            gid: uid,
            egid: uid,
            sgid: uid,
            fsgid: uid,
            groups: vec![uid, 2000],
            capabilities,
            securebits: 0,
        }
    }

    fn root() -> Credentials {
        let capabilities =
            Capabilities { permitted: FULL, effective: FULL, bounding: FULL, ..Capabilities::default() };
        Credentials { capabilities, groups: Vec::new(), ..user(0) }
    }

    fn executed(uid: u32, euid: u32, secure: u64) -> AtExec {
        let auxv = [
            AT_UID,
            uid.into(),
            AT_EUID,
            euid.into(),
            AT_GID,
            uid.into(),
            AT_EGID,
            euid.into(),
            23,
            secure,
            0,
            0,
        ];
        AtExec::of(&auxv).unwrap()
    }

    #[test]
    fn sets_of_capabilities_have_to_fit_each_other() {
        assert_eq!(full(40), FULL);
        assert_eq!(full(63), u64::MAX);
        for cred in [user(1000), root()] {
            assert_eq!(impossible(&cred, FULL), None);
        }
        let with = |change: fn(&mut Credentials)| {
            let mut cred = user(1000);
            change(&mut cred);
            impossible(&cred, FULL)
        };
        assert!(with(|c| c.capabilities.bounding |= 1 << 41).is_some());
        assert!(with(|c| c.capabilities.effective = 1).is_some());
        assert!(with(|c| (c.capabilities.ambient, c.capabilities.permitted) = (1, 1)).is_some());
        assert!(with(|c| c.securebits = 1 << 20).is_some());
        assert!(with(|c| c.groups = vec![5, 4]).is_some());
        assert_eq!(with(|c| c.capabilities.bounding = 0), None, "it may be dropped");
    }

    #[test]
    fn who_was_executed_without_privileges_has_none() {
        let plain = executed(1000, 1000, 0);
        assert_eq!(gained(&user(1000), plain), None);
        for change in [
            (|c: &mut Credentials| c.uid = 0) as fn(&mut Credentials),
            |c| c.euid = 0,
            |c| c.suid = 0,
            |c| c.fsuid = 0,
            |c| c.egid = 0,
            |c| c.uid = 1001,
            |c| c.capabilities.permitted = 1,
        ] {
            let mut cred = user(1000);
            change(&mut cred);
            assert!(gained(&cred, plain).is_some(), "{cred:?}");
            assert_eq!(gained(&cred, executed(1000, 0, 1)), None, "a setuid program");
            assert_eq!(gained(&cred, executed(0, 0, 0)), None, "root may become anybody");
            cred.capabilities.inheritable = 1 << 7;
            assert_eq!(gained(&cred, plain), None, "CAP_SETUID that it was given");
        }
        assert_eq!(gained(&root(), executed(0, 0, 0)), None);
        assert!(AtExec::of(&[AT_UID, 1000, 0, 0]).is_none(), "not told");
    }

    #[test]
    fn who_has_become_a_user_has_not_one_id_left_of_root() {
        let from_root = executed(0, 0, 0);
        assert_eq!(half_root(&user(106), from_root), None);
        assert_eq!(half_root(&root(), from_root), None);
        for change in [
            (|c: &mut Credentials| c.euid = 0) as fn(&mut Credentials),
            |c| c.suid = 0,
            |c| c.fsuid = 0,
            |c| c.egid = 0,
            |c| c.sgid = 0,
        ] {
            let mut cred = user(106);
            change(&mut cred);
            assert!(half_root(&cred, from_root).is_some(), "{cred:?}");
            assert_eq!(half_root(&cred, executed(106, 0, 1)), None, "a setuid program");
            cred.capabilities.permitted = 0b1100_0000;
            assert_eq!(half_root(&cred, from_root), None, "it may");
        }
        // seteuid(2) of a daemon of root's.
        let mut cred = user(106);
        (cred.uid, cred.suid) = (0, 0);
        assert_eq!(half_root(&cred, from_root), None);
    }

    #[test]
    fn all_capabilities_come_from_root() {
        let mut cred = user(1000);
        cred.capabilities.permitted = FULL;
        assert!(unlike_elders(&cred, &[user(1000)], FULL).is_some());
        assert!(unlike_elders(&cred, &[], FULL).is_some());
        assert_eq!(unlike_elders(&cred, &[user(1000), root()], FULL), None, "PR_SET_KEEPCAPS");
        assert_eq!(unlike_elders(&root(), &[user(1000)], FULL), None);
        cred.capabilities.permitted = 1 << 13;
        assert_eq!(unlike_elders(&cred, &[user(1000)], FULL), None, "capabilities of a file");
    }

    #[test]
    fn threads_of_a_user_are_not_root() {
        let half = Credentials { euid: 0, ..user(1000) };
        assert!(unlike_leader(&half, &user(1000)).is_some());
        assert_eq!(unlike_leader(&half, &root()), None);
        assert_eq!(unlike_leader(&root(), &user(1000)), None, "it never gave it up");
        assert_eq!(unlike_leader(&user(1001), &user(1000)), None);
    }
}
