//! Definitions as the steps see them, and as they are rewritten for another domain.

use std::path::PathBuf;

use uuid::Uuid;
use vmkeep_libvirt::xml::{
    self, BackingEdit, CharRole, DomainXml, Element, LinkState, MirrorReady, Node, SourceKind, XmlError,
};
use vmkeep_steps::hypervisor::{
    Backing, Definition, Devices, DiskDef, DiskDevice, DiskSource, HvError, HvResult, Layer,
    MARKER_NAMESPACE, Mirror, NewIdentity, NvramDef, Target, TpmDef, TpmKind, Trouble,
};
use vmkeep_steps::image::device;
use vmkeep_steps::image::name::encode;

use super::reach;

/// The longest path of a Unix socket.
const LONGEST_SOCKET: usize = 107;

pub(super) fn broken(error: &XmlError) -> HvError {
    HvError::new(Trouble::Refused, format!("the definition cannot be used: {error}"))
}

/// Reads a definition's text.
///
/// # Errors
/// When it is not one.
pub fn read(text: &str) -> HvResult<Definition> {
    let xml = DomainXml::parse(text).map_err(|e| broken(&e))?;
    of(&xml, text)
}

/// What the steps want to know of a definition that was read.
pub(super) fn of(xml: &DomainXml, text: &str) -> HvResult<Definition> {
    Ok(Definition {
        xml: text.to_owned(),
        bare: bare(xml).map_err(|e| broken(&e))?,
        disks: xml.disks().iter().map(disk).collect(),
        devices: devices(xml).map_err(|e| broken(&e))?,
    })
}

/// See [`Definition::bare`]. White space between elements does not count: libvirt indents anew.
fn bare(xml: &DomainXml) -> Result<String, XmlError> {
    let mut xml = xml.clone();
    xml.remove_metadata(MARKER_NAMESPACE);
    // libvirt leaves an empty element behind where the marker was: that says as little as none.
    if xml.root().child("metadata").is_some_and(|metadata| metadata.elements().next().is_none()) {
        xml.root_mut().remove_named("metadata");
    }
    if let Some(devices) = xml.root_mut().child_mut("devices") {
        for disk in devices.elements_mut() {
            match disk.attr("type") {
                Some("file") if disk.name() == "disk" => {}
                // On its overlay it is one on a file.
                Some("block") if disk.name() == "disk" => disk.set_attr("type", "file")?,
                _ => continue,
            }
            for name in ["source", "backingStore", "mirror"] {
                disk.remove_named(name);
            }
            if let Some(driver) = disk.child_mut("driver") {
                driver.remove_attr("type");
            }
        }
    }
    let mut root = xml.root().clone();
    root.walk_mut(&mut |element: &mut Element| drop_blanks(element));
    Ok(blake3::hash(root.to_string().as_bytes()).to_hex().to_string())
}

fn drop_blanks(element: &mut Element) {
    if element.elements().next().is_some() {
        element.children.retain(|node| !matches!(node, Node::Text(text) if text.trim().is_empty()));
    }
}

fn disk(disk: &xml::Disk) -> DiskDef {
    DiskDef {
        target: Target(disk.target.clone()),
        device: match disk.device {
            xml::DiskDevice::Disk => DiskDevice::Disk,
            xml::DiskDevice::Cdrom => DiskDevice::Cdrom,
            xml::DiskDevice::Floppy => DiskDevice::Floppy,
            // Whatever is not known to be an ordinary disk does not take part.
            xml::DiskDevice::Lun | xml::DiskDevice::Other(_) => DiskDevice::Lun,
        },
        source: source(&disk.source),
        format: disk.format.clone(),
        backing: backing(&disk.backing),
        read_only: disk.readonly,
        shareable: disk.shareable,
        transient: disk.transient,
        // An overlay could be put on an image that stands on an encrypted one, but not without naming the secret again.
        encrypted: disk.layers().iter().any(|(source, _)| source.encrypted),
        mirror: disk.mirror.as_ref().map(|mirror| match mirror.ready {
            MirrorReady::Yes => Mirror::Ready,
            MirrorReady::Pivot => Mirror::Pivoting,
            MirrorReady::Abort => Mirror::Aborting,
            MirrorReady::No | MirrorReady::Other(_) => Mirror::Running,
        }),
    }
}

fn source(source: &xml::DiskSource) -> DiskSource {
    let path = source.path.clone();
    match (&source.kind, path) {
        (SourceKind::File | SourceKind::Block, Some(path)) if source.sliced => {
            DiskSource::Other(format!("a part of {path}"))
        }
        (SourceKind::File | SourceKind::Block, Some(path)) if source.data_file.is_some() => {
            DiskSource::Other(format!("{path}, whose data lie in another file"))
        }
        (SourceKind::File, Some(path)) => DiskSource::File(path.into()),
        (SourceKind::Block, Some(path)) => DiskSource::Block(path.into()),
        (SourceKind::Network(protocol), name) => {
            DiskSource::Network(format!("{protocol}:{}", name.unwrap_or_default()))
        }
        (SourceKind::Volume, Some(volume)) => DiskSource::Other(format!("the pool volume {volume}")),
        (SourceKind::Dir, Some(dir)) => DiskSource::Other(format!("the folder {dir}")),
        (SourceKind::Other(kind), path) => {
            DiskSource::Other(format!("{kind} {}", path.unwrap_or_default()).trim_end().to_owned())
        }
        (_, None) => DiskSource::Empty,
    }
}

fn backing(backing: &xml::Backing) -> Backing {
    let mut layers = Vec::new();
    let mut below = backing;
    loop {
        match below {
            xml::Backing::Unstated if layers.is_empty() => return Backing::Probed,
            xml::Backing::Unstated | xml::Backing::End => return Backing::Explicit(layers),
            xml::Backing::Layer(layer) => {
                let path = match &layer.source.kind {
                    SourceKind::Network(protocol) => {
                        format!("{protocol}:{}", layer.source.path.clone().unwrap_or_default())
                    }
                    _ => layer.source.path.clone().unwrap_or_default(),
                };
                let format = layer.format.clone().unwrap_or_else(|| "raw".to_owned());
                layers.push(Layer { path: path.into(), format });
                below = &layer.below;
            }
        }
    }
}

fn devices(xml: &DomainXml) -> Result<Devices, XmlError> {
    let os = xml.os();
    let variables = os.as_ref().and_then(|os| match (&os.nvram, os.firmware.as_deref()) {
        (Some(nvram), _) => Some(nvram_of(nvram)),
        // libvirt makes the file at the first start without naming it before.
        (None, Some("efi")) => Some(NvramDef { format: "raw".to_owned(), ..NvramDef::default() }),
        (None, _) => None,
    });
    let mut unsaveable = Vec::new();
    for device in xml.hostdevs() {
        unsaveable.push(format!("a host device ({})", device.kind.as_deref().unwrap_or("unknown")));
    }
    for interface in xml.interfaces() {
        if matches!(interface.kind.as_str(), "hostdev" | "vdpa") {
            unsaveable.push(format!("a network card passed through ({})", interface.kind));
        }
    }
    for filesystem in xml.filesystems() {
        if filesystem.driver.as_deref() == Some("virtiofs") {
            let target = filesystem.target.unwrap_or_default();
            unsaveable.push(format!("a folder shared by virtiofs ({target})"));
        }
    }
    if let Some(kind) = xml.launch_security() {
        unsaveable.push(format!("memory that the host cannot read ({kind})"));
    }
    Ok(Devices {
        memory: xml.memory()?,
        machine: os.as_ref().and_then(|os| os.machine.clone()),
        arch: os.as_ref().and_then(|os| os.arch.clone()),
        nvram: variables,
        tpm: xml.tpms().first().map(tpm_of),
        agent: xml.has_agent_channel(),
        network_cards: xml.interfaces().len(),
        unsaveable,
        reaches: reach::of(xml),
    })
}

fn nvram_of(nvram: &xml::Nvram) -> NvramDef {
    let kind = nvram.kind.as_deref().unwrap_or("file");
    NvramDef {
        file: nvram.path.as_ref().filter(|_| kind == "file").map(PathBuf::from),
        format: nvram.format.clone().unwrap_or_else(|| "raw".to_owned()),
        template: nvram.template.as_ref().map(PathBuf::from),
        elsewhere: (kind != "file").then(|| format!("{kind} {}", nvram.path.clone().unwrap_or_default())),
    }
}

fn tpm_of(tpm: &xml::Tpm) -> TpmDef {
    TpmDef {
        kind: match tpm.backend.as_deref() {
            Some("emulator") => TpmKind::Emulator,
            other => TpmKind::Other(other.unwrap_or("unknown").to_owned()),
        },
        version: tpm.version.clone(),
        encrypted: tpm.encrypted,
    }
}

/// See [`vmkeep_steps::hypervisor::Hypervisor::rewrite_definition`].
///
/// What would make the copy and its original fight goes as well: files and sockets of serial ports and channels get
/// names of their own, fixed ports of displays are left to libvirt, and the machine's generation id changes, which is
/// how an operating system learns that it is a copy.
pub fn rewrite(text: &str, identity: &NewIdentity) -> HvResult<String> {
    let mut xml = DomainXml::parse(text).map_err(|e| broken(&e))?;
    rewrite_tree(&mut xml, identity).map_err(|e| broken(&e))?;
    Ok(xml.to_string())
}

fn rewrite_tree(xml: &mut DomainXml, identity: &NewIdentity) -> Result<(), XmlError> {
    xml.strip_runtime();
    xml.drop_dynamic_seclabels();
    xml.remove_metadata(MARKER_NAMESPACE);
    xml.set_name(&identity.name)?;
    xml.set_uuid(identity.id.0)?;
    if identity.same {
        // Its variables change with its disks, or stay.
        if identity.nvram.is_some() {
            own_variables(xml, identity.nvram.as_deref())?;
        }
        return identity.disks.iter().try_for_each(|(target, layer)| point(xml, target, layer));
    }
    xml.set_genid(derived("genid", &identity.id.0))?;
    let there: Vec<String> = xml.disks().into_iter().map(|disk| disk.target).collect();
    // The definition in a memory image may lack a disk that the persistent one has.
    for target in identity.without.iter().filter(|target| there.contains(&target.0)) {
        xml.remove_disk(&target.0)?;
    }
    for (target, layer) in &identity.disks {
        point(xml, target, layer)?;
    }
    if let Some(seed) = identity.mac_seed {
        xml.set_macs(|number, _| mac(seed, number))?;
    }
    if identity.links_down {
        xml.set_links(LinkState::Down)?;
    }
    own_variables(xml, identity.nvram.as_deref())?;
    separate_char_devices(xml, &identity.name)?;
    separate_displays(xml)
}

/// The copy never shares a file of variables with its original, which QEMU would not even notice.
fn own_variables(xml: &mut DomainXml, file: Option<&std::path::Path>) -> Result<(), XmlError> {
    let Some(file) = file else {
        xml.set_nvram(None)?;
        return Ok(());
    };
    let file = file.to_str().ok_or_else(|| XmlError::Missing("a path in UTF-8".to_owned()))?;
    if !xml.set_nvram(Some(file))? {
        // libvirt chose the firmware, and the file with it.
        let os = xml.root_mut().child_mut("os").ok_or_else(|| XmlError::Missing("<os>".to_owned()))?;
        let mut nvram = Element::new("nvram")?;
        nvram.set_text(file)?;
        os.children.push(Node::Element(nvram));
    }
    Ok(())
}

/// Lets a disk use another file, with the chain below read from that file itself.
pub(super) fn point(xml: &mut DomainXml, target: &Target, layer: &Layer) -> Result<(), XmlError> {
    let path = layer.path.to_str().ok_or_else(|| XmlError::Missing("a path in UTF-8".to_owned()))?;
    if device::at(&layer.path) {
        xml.set_disk_device(&target.0, path, &layer.format)?;
    } else {
        xml.set_disk_file(&target.0, path, &layer.format)?;
    }
    xml.set_disk_backing(&target.0, &BackingEdit::Drop)
}

/// Puts a disk's element exactly as it is in another definition.
pub(super) fn like_in(xml: &mut DomainXml, other: &DomainXml, target: &Target) -> Result<(), XmlError> {
    let is =
        |e: &&Element| e.name() == "disk" && e.child("target").and_then(|t| t.attr("dev")) == Some(&target.0);
    let missing = || XmlError::Missing(format!("disk '{target}'"));
    let wanted = other.root().child("devices").and_then(|devices| devices.elements().find(is).cloned());
    let wanted = wanted.ok_or_else(missing)?;
    let devices = xml.root_mut().child_mut("devices").ok_or_else(missing)?;
    let place = devices.elements_mut().find(|e| is(&&**e)).ok_or_else(missing)?;
    *place = wanted;
    Ok(())
}

/// An id made of another, always the same.
fn derived(what: &str, from: &Uuid) -> Uuid {
    let mut hasher = blake3::Hasher::new();
    hasher.update(what.as_bytes());
    hasher.update(from.as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// An address out of QEMU's range.
fn mac(seed: u64, number: usize) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(&(number as u64).to_le_bytes());
    let digest = hasher.finalize();
    let b = digest.as_bytes();
    format!("52:54:00:{:02x}:{:02x}:{:02x}", b[0], b[1], b[2])
}

fn separate_char_devices(xml: &mut DomainXml, name: &str) -> Result<(), XmlError> {
    let devices = xml.char_devices();
    let own = |path: &str| format!("{path}.{}", encode(name));
    xml.rewrite_char_paths(|role, path| {
        let device = devices.iter().find(|d| d.role == role && d.path.as_deref() == Some(path));
        match device.map(|d| d.kind.as_str()) {
            // Sockets below libvirt's own folders are named after the domain: libvirt makes up a new one.
            Some("unix") if path.contains("/libvirt/qemu/") && role == CharRole::Channel => None,
            Some("unix") if own(path).len() > LONGEST_SOCKET => None,
            // A device or pipe of the host is what it is.
            Some("dev" | "pipe" | "pty") => Some(path.to_owned()),
            _ => Some(own(path)),
        }
    })?;
    Ok(())
}

fn separate_displays(xml: &mut DomainXml) -> Result<(), XmlError> {
    let Some(devices) = xml.root_mut().child_mut("devices") else { return Ok(()) };
    for graphics in devices.elements_mut().filter(|e| e.name() == "graphics") {
        if !matches!(graphics.attr("type"), Some("vnc" | "spice" | "rdp")) {
            continue;
        }
        let listens_on_socket = graphics.remove_attr("socket");
        graphics.remove_elements(|e| e.name() == "listen" && e.attr("type") == Some("socket"));
        for port in ["port", "tlsPort", "websocket"] {
            graphics.remove_attr(port);
        }
        if !listens_on_socket {
            graphics.set_attr("autoport", "yes")?;
        }
    }
    Ok(())
}

/// A path as libvirt takes it.
pub(super) fn path_text(path: &std::path::Path) -> HvResult<&str> {
    path.to_str().ok_or_else(|| {
        HvError::new(
            Trouble::Refused,
            format!("{path:?} is not valid UTF-8, which libvirt needs paths to be"),
        )
    })
}

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
