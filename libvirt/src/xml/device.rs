//! The other devices of a definition that a backup or a clone has to know about, read.

use serde::{Deserialize, Serialize};

use super::tree::Element;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// `network`, `bridge`, `user`, …
    pub kind: String,
    /// Its MAC address.
    pub mac: Option<String>,
    /// `up` or `down`, if stated.
    pub link: Option<String>,
    /// Which network or bridge.
    pub source: Option<String>,
    /// The host's device (live definitions, or fixed by the user).
    pub host_device: Option<String>,
    /// Name of the device.
    pub alias: Option<String>,
}

/// What a character device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CharRole {
    /// `<serial>`
    Serial,
    /// `<parallel>`
    Parallel,
    /// `<console>`
    Console,
    /// `<channel>`
    Channel,
}

impl CharRole {
    /// The element's name.
    pub fn element(self) -> &'static str {
        match self {
            Self::Serial => "serial",
            Self::Parallel => "parallel",
            Self::Console => "console",
            Self::Channel => "channel",
        }
    }

    pub(super) const ALL: [Self; 4] = [Self::Serial, Self::Parallel, Self::Console, Self::Channel];
}

/// A serial port, console or channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CharDevice {
    /// What it is.
    pub role: CharRole,
    /// `file`, `unix`, `pty`, `pipe`, `dev`, …
    pub kind: String,
    /// The file, pipe, device or socket on the host.
    pub path: Option<String>,
    /// Where its output is logged as well.
    pub log: Option<String>,
    /// A channel's name in the guest, such as `org.qemu.guest_agent.0`.
    pub target_name: Option<String>,
    /// A channel's state in a live definition: `connected` or `disconnected`.
    pub target_state: Option<String>,
    /// Name of the device.
    pub alias: Option<String>,
}

/// A TPM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tpm {
    /// `tpm-tis`, `tpm-crb`, …
    pub model: Option<String>,
    /// `emulator`, `passthrough`, `external`.
    pub backend: Option<String>,
    /// `1.2` or `2.0`.
    pub version: Option<String>,
    /// Whether its state stays when the domain is transient.
    pub persistent_state: bool,
    /// Whether its state is encrypted with a secret.
    pub encrypted: bool,
}

/// A device of the host that is passed through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hostdev {
    /// `subsystem` or `capabilities`.
    pub mode: Option<String>,
    /// `pci`, `usb`, `mdev`, …
    pub kind: Option<String>,
    /// Name of the device.
    pub alias: Option<String>,
}

/// A folder of the host shown to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// `mount`, …
    pub kind: Option<String>,
    /// `virtiofs`, `path` (9p), …
    pub driver: Option<String>,
    /// The folder, or virtiofsd's socket.
    pub source: Option<String>,
    /// The guest's name of it.
    pub target: Option<String>,
}

/// A display.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Graphics {
    /// `vnc`, `spice`, …
    pub kind: String,
    /// Its port; -1 or none when libvirt chooses.
    pub port: Option<i32>,
    /// Whether libvirt chooses the port.
    pub autoport: bool,
    /// Its Unix socket.
    pub socket: Option<String>,
    /// Whether the definition holds a password.
    pub password: bool,
}

/// The boot firmware's variables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nvram {
    /// The file; `None` until the first start chooses one.
    pub path: Option<String>,
    /// What it is made from.
    pub template: Option<String>,
    /// Its format; none means raw.
    pub format: Option<String>,
    /// `file`, `block`, `network`.
    pub kind: Option<String>,
}

/// The boot firmware.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loader {
    /// Its file.
    pub path: Option<String>,
    /// `rom` or `pflash`.
    pub kind: Option<String>,
    /// Whether it is read-only.
    pub readonly: Option<String>,
    /// Whether secure boot is on.
    pub secure: Option<String>,
    /// Its format; none means raw.
    pub format: Option<String>,
}

/// How the domain boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Os {
    /// `hvm`, …
    pub kind: Option<String>,
    /// Its machine type.
    pub machine: Option<String>,
    /// Its architecture.
    pub arch: Option<String>,
    /// `bios` or `efi` when libvirt chooses the firmware.
    pub firmware: Option<String>,
    /// The firmware.
    pub loader: Option<Loader>,
    /// The firmware's variables.
    pub nvram: Option<Nvram>,
    /// The kernel booted directly, with initrd and device tree: files outside the disks.
    pub direct_boot: Vec<String>,
}

fn attr(e: Option<&Element>, name: &str) -> Option<String> {
    e.and_then(|e| e.attr(name)).map(str::to_owned)
}

fn alias(e: &Element) -> Option<String> {
    attr(e.child("alias"), "name")
}

impl Interface {
    pub(super) fn read(e: &Element) -> Self {
        let source = e.child("source");
        Self {
            kind: e.attr("type").unwrap_or_default().to_owned(),
            mac: attr(e.child("mac"), "address"),
            link: attr(e.child("link"), "state"),
            source: ["network", "bridge", "dev", "path", "name"].iter().find_map(|n| attr(source, n)),
            host_device: attr(e.child("target"), "dev"),
            alias: alias(e),
        }
    }
}

impl CharDevice {
    pub(super) fn read(role: CharRole, e: &Element) -> Self {
        let source = e.child("source");
        let target = e.child("target");
        Self {
            role,
            kind: e.attr("type").unwrap_or_default().to_owned(),
            path: attr(source, "path"),
            log: attr(e.child("log"), "file"),
            target_name: attr(target, "name"),
            target_state: attr(target, "state"),
            alias: alias(e),
        }
    }
}

impl Tpm {
    pub(super) fn read(e: &Element) -> Self {
        let backend = e.child("backend");
        Self {
            model: attr(Some(e), "model"),
            backend: attr(backend, "type"),
            version: attr(backend, "version"),
            persistent_state: backend.and_then(|b| b.attr("persistent_state")) == Some("yes"),
            encrypted: backend.is_some_and(|b| b.child("encryption").is_some()),
        }
    }
}

impl Hostdev {
    pub(super) fn read(e: &Element) -> Self {
        Self { mode: attr(Some(e), "mode"), kind: attr(Some(e), "type"), alias: alias(e) }
    }
}

impl Filesystem {
    pub(super) fn read(e: &Element) -> Self {
        let source = e.child("source");
        Self {
            kind: attr(Some(e), "type"),
            driver: attr(e.child("driver"), "type"),
            source: ["dir", "socket", "file", "name"].iter().find_map(|n| attr(source, n)),
            target: attr(e.child("target"), "dir"),
        }
    }
}

impl Graphics {
    pub(super) fn read(e: &Element) -> Self {
        let listens = || e.children_named("listen");
        Self {
            kind: e.attr("type").unwrap_or_default().to_owned(),
            port: e.attr("port").and_then(|p| p.parse().ok()),
            autoport: e.attr("autoport") == Some("yes"),
            socket: attr(Some(e), "socket").or_else(|| listens().find_map(|l| attr(Some(l), "socket"))),
            password: e.attr("passwd").is_some(),
        }
    }
}

impl Os {
    pub(super) fn read(e: &Element) -> Self {
        let kind = e.child("type");
        let text = |e: &Element| Some(e.text()).filter(|t| !t.is_empty());
        let files = ["kernel", "initrd", "dtb"];
        Self {
            kind: kind.and_then(text),
            machine: attr(kind, "machine"),
            arch: attr(kind, "arch"),
            firmware: attr(Some(e), "firmware"),
            loader: e.child("loader").map(|l| Loader {
                path: text(l),
                kind: attr(Some(l), "type"),
                readonly: attr(Some(l), "readonly"),
                secure: attr(Some(l), "secure"),
                format: attr(Some(l), "format"),
            }),
            nvram: e.child("nvram").map(|n| {
                let source = n.child("source");
                Nvram {
                    // The newer form has a source element, the older one the path as text.
                    path: ["file", "dev", "name"]
                        .iter()
                        .find_map(|a| attr(source, a))
                        .or_else(|| source.is_none().then(|| text(n)).flatten()),
                    template: attr(Some(n), "template"),
                    format: attr(Some(n), "format"),
                    kind: attr(Some(n), "type"),
                }
            }),
            direct_boot: files.iter().filter_map(|f| e.child(f).and_then(text)).collect(),
        }
    }
}
