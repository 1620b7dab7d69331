//! What in a definition reaches into the host beyond the images of its disks.
//!
//! For definitions that a stranger may have written. The list is of what is *known to be harmless*; everything else is
//! said. An element that a later libvirt invents is therefore suspicious until somebody has looked at it here.
//!
//! Writable disks on files are not judged: those of the backup get new images, and what becomes of the others is decided,
//! and told, where a restore is planned.

use vmkeep_libvirt::xml::{DomainXml, Element};

/// Elements of a domain that only describe the machine itself.
const PLAIN: &[&str] = &[
    "name",
    "uuid",
    "genid",
    "title",
    "description",
    "metadata",
    "memory",
    "currentMemory",
    "maxMemory",
    "vcpu",
    "vcpus",
    "iothreads",
    "cpu",
    "clock",
    "features",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "pm",
    "memtune",
    "cputune",
    "blkiotune",
    "seclabel",
    "perf",
    "os",
    "devices",
    "resource",
];
/// Elements of `os` that do.
const PLAIN_OS: &[&str] = &["type", "boot", "bootmenu", "smbios", "bios"];
/// Devices that are QEMU's own inventions.
const PLAIN_DEVICES: &[&str] = &[
    "emulator",
    "disk",
    "controller",
    "input",
    "video",
    "sound",
    "audio",
    "memballoon",
    "watchdog",
    "panic",
    "hub",
    "graphics",
    "interface",
    "serial",
    "console",
    "parallel",
    "channel",
    "rng",
    "vsock",
    "iommu",
];
/// Where QEMU is installed.
const EMULATORS: &[&str] =
    &["/usr/bin/qemu-system-", "/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm", "/usr/bin/kvm"];

/// A line for people for each.
pub(super) fn of(xml: &DomainXml) -> Vec<String> {
    let mut found = Vec::new();
    let root = xml.root();
    for element in root.elements().filter(|e| !PLAIN.contains(&e.name())) {
        found.push(format!("<{}>", element.name()));
    }
    for element in root.child("os").into_iter().flat_map(Element::elements) {
        if !PLAIN_OS.contains(&element.name()) {
            found.push(format!("<os><{}> {}", element.name(), element.text().trim()));
        }
    }
    for device in root.child("devices").into_iter().flat_map(Element::elements) {
        found.extend(device_reaches(device));
    }
    found
}

fn device_reaches(device: &Element) -> Option<String> {
    let name = device.name();
    if !PLAIN_DEVICES.contains(&name) {
        return Some(format!("<{name}>"));
    }
    let kind = device.attr("type").unwrap_or_default();
    let source = |attribute: &str| {
        device.child("source").and_then(|s| s.attr(attribute)).unwrap_or_default().to_owned()
    };
    let plain = match name {
        "emulator" => {
            let path = device.text();
            let path = path.trim();
            let own = EMULATORS.iter().any(|known| path.starts_with(known)) && !path.contains("..");
            return (!own).then(|| format!("it is run by {path}"));
        }
        "disk" => {
            // A medium that is only read still shows a file of the host to the guest.
            let shown =
                device.attr("device").is_some_and(|d| d != "disk") || device.child("readonly").is_some();
            device.child("source").is_none() || (kind == "file" && !shown)
        }
        "interface" => {
            matches!(kind, "user" | "network" | "bridge")
                && device.child("script").is_none()
                && device.child("downscript").is_none()
        }
        "graphics" => {
            matches!(kind, "vnc" | "spice")
                && device.attr("socket").is_none()
                && device.elements().all(|e| e.name() != "listen" || e.attr("type") != Some("socket"))
        }
        "serial" | "console" | "parallel" | "channel" => own_char(device, kind, &source("path")),
        "rng" => device.child("backend").is_none_or(|b| b.attr("model") != Some("egd")),
        "audio" => matches!(kind, "none" | "spice" | ""),
        _ => true,
    };
    if plain {
        return None;
    }
    let at = ["file", "dev", "path", "name", "host"].map(source).into_iter().find(|text| !text.is_empty());
    Some(format!("<{name} type='{kind}'> {}", at.unwrap_or_default()).trim_end().to_owned())
}

fn own_char(device: &Element, kind: &str, path: &str) -> bool {
    let own = match kind {
        "pty" | "null" | "vc" | "spicevmc" | "" => true,
        // Without a path libvirt makes one up; below its own folder it made it up before.
        "unix" => path.is_empty() || (path.contains("/libvirt/qemu/") && !path.contains("..")),
        _ => false,
    };
    own && device.child("log").is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaches(devices: &str, rest: &str) -> Vec<String> {
        let text = format!(
            "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>a</name>
             <os><type>hvm</type></os><devices>{devices}</devices>{rest}</domain>"
        );
        of(&DomainXml::parse(&text).unwrap())
    }

    #[test]
    fn an_ordinary_machine_reaches_nowhere() {
        let devices = "<emulator>/usr/bin/qemu-system-x86_64</emulator>
            <disk type='file' device='disk'><source file='/i/a'/></disk><disk type='file' device='cdrom'/>
            <interface type='network'><source network='default'/></interface>
            <serial type='pty'/><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
            <graphics type='vnc' autoport='yes'/><memballoon model='virtio'/>";
        assert_eq!(reaches(devices, "<vcpu>1</vcpu>"), Vec::<String>::new());
    }

    #[test]
    fn whatever_runs_reads_or_writes_on_the_host_is_named() {
        for devices in [
            "<emulator>/tmp/evil</emulator>",
            "<emulator>/usr/bin/qemu-system-../../tmp/evil</emulator>",
            "<disk type='block' device='disk'><source dev='/dev/sda'/></disk>",
            "<disk type='file' device='cdrom'><source file='/etc/shadow'/></disk>",
            "<disk type='file' device='disk'><source file='/etc/shadow'/><readonly/></disk>",
            "<interface type='ethernet'><script path='/tmp/evil'/></interface>",
            "<interface type='network'><source network='a'/><script path='/tmp/evil'/></interface>",
            "<serial type='file'><source path='/etc/cron.d/x'/></serial>",
            "<console type='pty'><log file='/etc/cron.d/x'/></console>",
            "<channel type='unix'><source mode='bind' path='/run/docker.sock'/></channel>",
            "<filesystem type='mount'><source dir='/'/></filesystem>",
            "<hostdev mode='subsystem' type='pci'/>",
            "<graphics type='vnc' socket='/run/x'/>",
            "<tpm model='tpm-tis'/>",
            "<something-new/>",
        ] {
            assert_eq!(reaches(devices, "").len(), 1, "{devices}");
        }
        assert_eq!(reaches("", "<qemu:commandline><qemu:arg value='-x'/></qemu:commandline>").len(), 1);
        assert_eq!(of(&DomainXml::parse("<domain><os><kernel>/k</kernel></os></domain>").unwrap()).len(), 1);
    }
}
