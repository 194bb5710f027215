//! Credentials: the order in which privileges are given up so that each step still has those that it needs.

use snapshot::{Capabilities, Credentials};

use crate::inject::{Call, call};
use crate::sys;

const SECBIT_NO_SETUID_FIXUP: u32 = 1 << 2;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// The caller's own credentials, which all its children start with.
pub(crate) fn own() -> std::io::Result<Credentials> {
    let status = sys::read_proc("/proc/self/status")?;
    let mut own = parse_status(&status).ok_or(std::io::ErrorKind::InvalidData)?;
    // SAFETY: no pointers.
    let bits = unsafe { sys::raw(libc::SYS_prctl, [libc::PR_GET_SECUREBITS as u64, 0, 0, 0, 0, 0]) };
    own.securebits = bits? as u32;
    Ok(own)
}

/// A field of /proc/PID/status.
pub(crate) fn status_field<'a>(status: &'a [u8], name: &str) -> Option<&'a str> {
    let line =
        status.split(|&b| b == b'\n').find_map(|l| l.strip_prefix(name.as_bytes())?.strip_prefix(b":"))?;
    Some(std::str::from_utf8(line).ok()?.trim())
}

/// What /proc/PID/status says; the securebits are not in it.
pub(crate) fn parse_status(status: &[u8]) -> Option<Credentials> {
    let list = |name| -> Option<Vec<u32>> {
        status_field(status, name)?.split_whitespace().map(|n| n.parse().ok()).collect()
    };
    let set = |name| u64::from_str_radix(status_field(status, name)?, 16).ok();
    let [uid, euid, suid, fsuid] = list("Uid")?.try_into().ok()?;
    let [gid, egid, sgid, fsgid] = list("Gid")?.try_into().ok()?;
    Some(Credentials {
        uid,
        euid,
        suid,
        fsuid,
        gid,
        egid,
        sgid,
        fsgid,
        groups: list("Groups")?,
        capabilities: Capabilities {
            inheritable: set("CapInh")?,
            permitted: set("CapPrm")?,
            effective: set("CapEff")?,
            bounding: set("CapBnd")?,
            ambient: set("CapAmb")?,
        },
        securebits: 0,
    })
}

/// The calls that turn a thread with the credentials `own` into one with `wanted`; none if they are the same.
pub(crate) fn change(own: &Credentials, wanted: &Credentials) -> Vec<Call> {
    let mut calls = Vec::new();
    if own == wanted {
        return calls;
    }
    let w = wanted;
    let prctl = |what: &str, option: i32, a: u64, b: u64| {
        call!(format!("prctl {what}"), libc::SYS_prctl, option, a, b, 0u64, 0u64)
    };
    let securebits = |bits: u32| prctl("PR_SET_SECUREBITS", libc::PR_SET_SECUREBITS, bits.into(), 0);
    if own.groups != w.groups {
        let list: Vec<u8> = w.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
        calls.push(call!("setgroups", libc::SYS_setgroups, w.groups.len() as u64, list));
    }
    let ids = |c: &Credentials| [c.uid, c.euid, c.suid, c.fsuid, c.gid, c.egid, c.sgid, c.fsgid];
    let mut bits = own.securebits;
    if ids(own) != ids(w) {
        // Changing user must not take capabilities away before the end.
        bits |= SECBIT_NO_SETUID_FIXUP;
        calls.push(securebits(bits));
        calls.push(call!("setresgid", libc::SYS_setresgid, w.gid, w.egid, w.sgid));
        calls.push(call!("setresuid", libc::SYS_setresuid, w.uid, w.euid, w.suid));
        // They follow the effective ids; these calls report no errors.
        if w.fsgid != w.egid {
            calls.push(call!("setfsgid", libc::SYS_setfsgid, w.fsgid));
        }
        if w.fsuid != w.euid {
            calls.push(call!("setfsuid", libc::SYS_setfsuid, w.fsuid));
        }
    }
    let (oc, wc) = (&own.capabilities, &w.capabilities);
    if wc.ambient != 0 {
        // Only what is permitted and inheritable can become ambient.
        calls.push(capset(oc.permitted, oc.permitted, wc.inheritable));
        for cap in bits_of(wc.ambient) {
            const RAISE: u64 = libc::PR_CAP_AMBIENT_RAISE as u64;
            calls.push(prctl("PR_CAP_AMBIENT_RAISE", libc::PR_CAP_AMBIENT, RAISE, cap));
        }
    }
    for cap in bits_of(oc.bounding & !wc.bounding) {
        calls.push(prctl("PR_CAPBSET_DROP", libc::PR_CAPBSET_DROP, cap, 0));
    }
    if bits != w.securebits {
        calls.push(securebits(w.securebits));
    }
    calls.push(capset(wc.effective, wc.permitted, wc.inheritable));
    calls
}

fn bits_of(set: u64) -> impl Iterator<Item = u64> {
    (0..64).filter(move |bit| set & (1 << bit) != 0)
}

fn capset(effective: u64, permitted: u64, inheritable: u64) -> Call {
    let header: Vec<u8> = [CAPABILITY_VERSION_3, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    let sets = [effective, permitted, inheritable];
    let low = sets.map(|s| s as u32);
    let high = sets.map(|s| (s >> 32) as u32);
    let data: Vec<u8> = low.iter().chain(&high).flat_map(|w| w.to_ne_bytes()).collect();
    call!("capset", libc::SYS_capset, header, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Credentials {
        let all = (1 << 41) - 1;
        let capabilities =
            Capabilities { inheritable: 0, permitted: all, effective: all, bounding: all, ambient: 0 };
        Credentials { capabilities, ..Credentials::default() }
    }

    fn names(calls: &[Call]) -> Vec<&str> {
        calls.iter().map(|c| c.what.as_str()).collect()
    }

    #[test]
    fn the_same_credentials_need_no_call() {
        assert!(change(&root(), &root()).is_empty());
    }

    #[test]
    fn capabilities_are_given_up_last() {
        let user = Credentials {
            uid: 1000,
            euid: 1000,
            suid: 1000,
            fsuid: 1000,
            gid: 100,
            egid: 100,
            sgid: 100,
            fsgid: 100,
            groups: vec![100, 27],
            capabilities: Capabilities { bounding: root().capabilities.bounding & !1, ..Default::default() },
            securebits: 0,
        };
        let calls = change(&root(), &user);
        assert_eq!(
            names(&calls),
            [
                "setgroups",
                "prctl PR_SET_SECUREBITS",
                "setresgid",
                "setresuid",
                "prctl PR_CAPBSET_DROP",
                "prctl PR_SET_SECUREBITS",
                "capset"
            ]
        );
    }

    #[test]
    fn ambient_capabilities_become_inheritable_first() {
        let mut wanted = root();
        wanted.capabilities.inheritable = 1 << 10;
        wanted.capabilities.ambient = 1 << 10;
        assert_eq!(names(&change(&root(), &wanted)), ["capset", "prctl PR_CAP_AMBIENT_RAISE", "capset"]);
    }

    #[test]
    fn own_credentials_can_be_read() {
        let own = own().unwrap();
        assert_eq!(own.uid, nix::unistd::getuid().as_raw());
    }
}
