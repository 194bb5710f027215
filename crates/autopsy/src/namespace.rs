//! Namespaces other than the initial ones: `mnt_namespace` (fs/mount.h), `uts_namespace` (include/linux/utsname.h; 6.1 and 6.12).

use ktypes::KernelType;
use snapshot::{Bytes, MountNamespace, NamespaceId, UtsNamespace};

use crate::Autopsy;
use crate::error::Result;

#[derive(KernelType)]
#[kernel("uts_namespace")]
struct UtsNamespaceStruct {
    #[kernel("name.nodename")]
    nodename: [u8; 65],
    #[kernel("name.domainname")]
    domainname: [u8; 65],
}

impl Autopsy<'_> {
    /// Reads a mount namespace into the table, unless it is there.
    pub(crate) fn mount_namespace(&self, addr: u64) -> Result<NamespaceId> {
        let id = NamespaceId(addr);
        if !self.mount_namespaces.borrow().contains_key(&id) {
            let namespace = MountNamespace::of_reachable(self.mounts_of(addr)?);
            self.mount_namespaces.borrow_mut().insert(id, namespace);
        }
        Ok(id)
    }

    /// Reads a UTS namespace into the table, unless it is there.
    pub(crate) fn uts_namespace(&self, addr: u64) -> Result<NamespaceId> {
        let id = NamespaceId(addr);
        if !self.uts_namespaces.borrow().contains_key(&id) {
            let names: UtsNamespaceStruct = self.kernel.read(addr)?;
            let text = |field: &[u8]| Bytes(field.iter().copied().take_while(|b| *b != 0).collect());
            let names = UtsNamespace { nodename: text(&names.nodename), domainname: text(&names.domainname) };
            self.uts_namespaces.borrow_mut().insert(id, names);
        }
        Ok(id)
    }
}
