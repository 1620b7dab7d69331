//! What libvirt and QEMU say of a domain, each asked separately, because their answers can differ.

use super::{
    error::{Error, IoContext as _, Result},
    hypervisor::Hypervisor,
    process::{Role, processes_of},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// State of a domain, as `virsh domstate --reason` spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainState {
    /// `running`, `paused`, `shut off`, …
    pub state: String,
    /// `booted`, `user`, `I/O error`, …
    pub reason: String,
}

/// A disk as QEMU itself describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuDisk {
    /// The file that the guest's writes go to.
    pub file: PathBuf,
    /// Its backing files, nearest first.
    pub backing: Vec<PathBuf>,
    /// Whether QEMU opened it read-only.
    pub read_only: bool,
}

pub(crate) fn parse_xml(xml: &str) -> Result<roxmltree::Document<'_>> {
    roxmltree::Document::parse(xml)
        .map_err(|e| Error::Unclear { what: "an XML".into(), answer: e.to_string() })
}

/// Domains are named by name or UUID throughout.
impl Hypervisor {
    /// Names of all domains, running or not.
    pub fn domains(&self) -> Result<Vec<String>> {
        Ok(self
            .virsh(["list", "--all", "--name"])?
            .lines()
            .filter(|l| !l.is_empty())
            .map(str::to_owned)
            .collect())
    }

    /// State and reason of a domain.
    pub fn domain_state(&self, domain: &str) -> Result<DomainState> {
        let text = self.virsh(["domstate", "--reason", "--domain", domain])?;
        let (state, reason) = text.trim().split_once(" (").unwrap_or((text.trim(), ""));
        Ok(DomainState { state: state.to_owned(), reason: reason.trim_end_matches(')').to_owned() })
    }

    /// Sends a command to QEMU's monitor and returns what it returns.
    pub fn qmp(&self, domain: &str, command: &Value) -> Result<Value> {
        let text = self.virsh(["qemu-monitor-command", "--domain", domain, &command.to_string()])?;
        let unclear = || Error::Unclear { what: format!("QEMU's answer to {command}"), answer: text.clone() };
        let mut answer: Value = serde_json::from_str(&text).map_err(|_| unclear())?;
        answer.get_mut("return").map(Value::take).ok_or_else(unclear)
    }

    /// The disks that QEMU has, by target (`vda`), with the files that it uses for them. libvirt is asked only
    /// which device is which target.
    pub fn disk_files_in_qemu(&self, domain: &str) -> Result<BTreeMap<String, QemuDisk>> {
        let xml = self.virsh(["dumpxml", "--domain", domain])?;
        let blocks = self.qmp(domain, &serde_json::json!({"execute": "query-block"}))?;
        qemu_disks(&xml, &blocks)
    }

    /// The same while libvirtd is dead: its monitor takes one client, and libvirtd has left that place. `xml` is libvirt's
    /// status file of the domain.
    pub fn disk_files_without_libvirtd(&self, name: &str, xml: &str) -> Result<BTreeMap<String, QemuDisk>> {
        let of_domain = |path: &PathBuf| {
            let folder = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
            folder.ends_with(&format!("-{name}"))
        };
        let mut found = find_files(&self.dir().join("config/libvirt/qemu/lib"), "monitor.sock");
        found.retain(of_domain);
        let path = found.pop().ok_or_else(|| Error::Unclear {
            what: format!("the monitor of {name}"),
            answer: "there is none".to_owned(),
        })?;
        let mut stream = UnixStream::connect(&path).doing("connect to", &path)?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).doing("listen to", &path)?;
        let mut lines = BufReader::new(stream.try_clone().doing("listen to", &path)?);
        for command in ["qmp_capabilities", "query-block"] {
            writeln!(stream, "{}", serde_json::json!({"execute": command, "id": command}))
                .doing("write to", &path)?;
        }
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line).doing("read from", &path)? == 0 {
                return Err(Error::Unclear { what: format!("the monitor of {name}"), answer: line });
            }
            let answer: Value = serde_json::from_str(&line).unwrap_or_default();
            if answer["id"] == "query-block" {
                return qemu_disks(xml, &answer["return"]);
            }
        }
    }

    /// Every regular file below `/`, outside `/dev`, `/proc` and `/sys`, that the QEMU process of a domain has
    /// open, by `/proc`: also what no disk uses any more. The domain is named by its name.
    pub fn files_held_by_qemu(&self, name: &str) -> Result<BTreeSet<PathBuf>> {
        let apart = ["/dev", "/proc", "/sys", "/memfd:"];
        let files = self.qemu(name)?.open_files().into_iter();
        Ok(files.filter(|file| !apart.iter().any(|p| file.to_string_lossy().starts_with(p))).collect())
    }

    /// Source file of each disk by target, in the definition of the running domain.
    pub fn disk_files_in_live_xml(&self, domain: &str) -> Result<BTreeMap<String, PathBuf>> {
        disk_files(&self.virsh(["dumpxml", "--domain", domain])?)
    }

    /// Source file of each disk by target, in the persistent definition.
    pub fn disk_files_in_inactive_xml(&self, domain: &str) -> Result<BTreeMap<String, PathBuf>> {
        disk_files(&self.virsh(["dumpxml", "--inactive", "--domain", domain])?)
    }
}

/// What `query-block` says of the disks, by the targets that a definition names.
fn qemu_disks(xml: &str, blocks: &Value) -> Result<BTreeMap<String, QemuDisk>> {
    let document = parse_xml(xml)?;
    let targets: BTreeMap<&str, &str> = document
        .descendants()
        .filter(|node| node.has_tag_name("disk"))
        .filter_map(|disk| {
            let child = |name: &str| disk.children().find(|c| c.has_tag_name(name));
            Some((child("alias")?.attribute("name")?, child("target")?.attribute("dev")?))
        })
        .collect();
    let mut disks = BTreeMap::new();
    for block in blocks.as_array().into_iter().flatten() {
        let (Some(device), Some(inserted)) = (block["qdev"].as_str(), block.get("inserted")) else {
            continue;
        };
        let alias = device.trim_start_matches("/machine/peripheral/").split('/').next().unwrap_or_default();
        let Some(target) = targets.get(alias) else { continue };
        let mut backing = Vec::new();
        let mut image = &inserted["image"]["backing-image"];
        while let Some(file) = image["filename"].as_str() {
            backing.push(file.into());
            image = &image["backing-image"];
        }
        let file = inserted["file"].as_str().unwrap_or_default().into();
        let read_only = inserted["ro"].as_bool().unwrap_or_default();
        disks.insert((*target).to_owned(), QemuDisk { file, backing, read_only });
    }
    Ok(disks)
}

/// Every file of that name below a folder.
fn find_files(folder: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(find_files(&path, name));
        } else if path.file_name().is_some_and(|own| own == name) {
            found.push(path);
        }
    }
    found
}

/// Source file or block device of each disk by target, in a definition or in libvirt's status file of a running domain.
pub fn disk_files(xml: &str) -> Result<BTreeMap<String, PathBuf>> {
    let document = parse_xml(xml)?;
    // Only of <devices>: <domain> elements inside metadata or backing chains name disks too.
    let root = document.root_element();
    let domain = match root.tag_name().name() {
        "domstatus" => root.children().find(|node| node.has_tag_name("domain")).unwrap_or(root),
        _ => root,
    };
    let devices = domain.children().find(|node| node.has_tag_name("devices"));
    Ok(devices
        .into_iter()
        .flat_map(|devices| devices.children())
        .filter(|node| node.has_tag_name("disk"))
        .filter_map(|disk| {
            let child = |name: &str| disk.children().find(|c| c.has_tag_name(name));
            let source = child("source")?;
            let file = source.attribute("file").or_else(|| source.attribute("dev"))?;
            Some((child("target")?.attribute("dev")?.to_owned(), file.into()))
        })
        .collect())
}

/// What is left of a test bed that was in `dir`: its folder, and processes that name it. Empty after a stop.
pub fn leftovers(dir: &Path) -> Vec<String> {
    let folder = dir.exists().then(|| format!("folder {}", dir.display()));
    let processes = processes_of(dir).into_iter().filter(|p| p.role != Role::Other);
    folder.into_iter().chain(processes.map(|p| format!("process {} {:?}", p.id.pid, p.args))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_from_the_devices_only_and_not_from_their_backing_chains() {
        let xml = "<domain><metadata><disk><target dev='vdz'/><source file='/no'/></disk></metadata><devices>\
            <disk><source file='/a &amp; b'/><backingStore><source file='/base'/></backingStore>\
            <target dev='vda'/></disk><disk device='cdrom'><target dev='sda'/></disk></devices></domain>";
        let disks = disk_files(xml).unwrap();
        assert_eq!(disks, BTreeMap::from([("vda".to_owned(), PathBuf::from("/a & b"))]));
    }
}
