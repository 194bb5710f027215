//! Character devices that the machine has again, with something of their own that it has not.

use serde::{Deserialize, Serialize};

/// A device that is opened again by its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    #[allow(missing_docs)]
    pub major: u32,
    #[allow(missing_docs)]
    pub minor: u32,
    #[allow(missing_docs)]
    pub what: DeviceKind,
}

/// What is known of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// /dev/kmsg, the kernel's log.
    KernelLog,
    /// /dev/autofs, through which automounters talk to the kernel.
    Autofs,
    /// Input events.
    Input,
    /// /dev/rfkill, the state of radios.
    Radio,
}

impl Device {
    /// What is different for whoever has it open.
    pub(crate) fn loss(&self) -> &'static str {
        match self.what {
            DeviceKind::KernelLog => "the kernel's log begins anew",
            DeviceKind::Autofs => "the device numbers of automounters' file systems are other ones",
            DeviceKind::Input => "input events that nobody had read are lost, and what had been set for it",
            DeviceKind::Radio => "its events begin anew",
        }
    }
}
