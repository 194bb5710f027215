//! Credentials: `struct cred`, `struct group_info` (include/linux/cred.h; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Capabilities, Credentials};

use crate::Autopsy;
use crate::error::{Result, corrupt};

/// NGROUPS_MAX.
const MAX_GROUPS: i32 = 65536;

#[derive(KernelType)]
#[kernel("cred")]
struct Cred {
    uid: u32,
    gid: u32,
    suid: u32,
    sgid: u32,
    euid: u32,
    egid: u32,
    fsuid: u32,
    fsgid: u32,
    securebits: u32,
    // Two halves of 32 bits before 6.3, one u64 since; the same eight bytes.
    cap_inheritable: u64,
    cap_permitted: u64,
    cap_effective: u64,
    cap_bset: u64,
    cap_ambient: u64,
    user_ns: u64,
    group_info: u64,
}

#[derive(KernelType)]
#[kernel("group_info")]
struct GroupInfo {
    ngroups: i32,
    #[kernel(address)]
    gid: u64,
}

impl Autopsy<'_> {
    /// The credentials at `addr`, and the user namespace in which they count.
    ///
    /// Ids are those of the initial user namespace: the kernel stores no others.
    pub(crate) fn credentials(&self, addr: u64) -> Result<(Credentials, u64)> {
        let cred: Cred = self.kernel.read(addr)?;
        let info: GroupInfo = self.kernel.read(cred.group_info)?;
        if !(0..=MAX_GROUPS).contains(&info.ngroups) {
            return Err(corrupt("group_info", cred.group_info, format!("{} groups", info.ngroups)));
        }
        let groups = self.kernel.read_bytes(info.gid, info.ngroups as usize * 4)?;
        let groups = groups.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let credentials = Credentials {
            uid: cred.uid,
            euid: cred.euid,
            suid: cred.suid,
            fsuid: cred.fsuid,
            gid: cred.gid,
            egid: cred.egid,
            sgid: cred.sgid,
            fsgid: cred.fsgid,
            groups,
            capabilities: Capabilities {
                inheritable: cred.cap_inheritable,
                permitted: cred.cap_permitted,
                effective: cred.cap_effective,
                bounding: cred.cap_bset,
                ambient: cred.cap_ambient,
            },
            securebits: cred.securebits,
        };
        Ok((credentials, cred.user_ns))
    }
}
