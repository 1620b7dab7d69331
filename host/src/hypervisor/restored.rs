//! What only restored domains need: memory images under another definition, and cables that are really out.

use std::path::Path;

use serde_json::{Value, json};
use vmkeep_libvirt::flags::{SaveFlags, XmlFlags};
use vmkeep_libvirt::saveimage::{self, SaveImageError};
use vmkeep_libvirt::xml::DomainXml;
use vmkeep_steps::hypervisor::{DomainId, HvError, HvResult, Trouble};

use super::definition::{broken, path_text};
use super::{Libvirt, trouble};

/// See [`vmkeep_steps::hypervisor::Hypervisor::memory_image_head`].
pub(super) async fn head(image: &Path, xml: &str) -> HvResult<Vec<u8>> {
    let (path, text) = (image.to_owned(), xml.to_owned());
    let made = tokio::task::spawn_blocking(move || saveimage::head_with_xml(&path, &text)).await;
    match made {
        Ok(Ok(head)) => Ok(head),
        Ok(Err(e)) => {
            let kind = match &e {
                SaveImageError::Io { .. } => Trouble::Io,
                _ => Trouble::Unsupported,
            };
            Err(HvError::new(kind, e.to_string()))
        }
        Err(e) => Err(HvError::new(Trouble::Refused, e.to_string())),
    }
}

/// See [`vmkeep_steps::hypervisor::Hypervisor::definition_changes`].
pub fn changes(old: &str, new: &str) -> HvResult<Vec<String>> {
    let old = DomainXml::parse(old).map_err(|e| broken(&e))?;
    let new = DomainXml::parse(new).map_err(|e| broken(&e))?;
    let mut found = Vec::new();
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "chosen by libvirt".to_owned());
    for (i, (was, is)) in old.interfaces().iter().zip(new.interfaces()).enumerate() {
        if was.mac != is.mac {
            found.push(format!(
                "network card {}: address {} instead of {}",
                i + 1,
                text(&is.mac),
                text(&was.mac)
            ));
        }
        if was.link != is.link {
            let state = is.link.as_deref().unwrap_or("up");
            found.push(format!("network card {}: its link is {state}", i + 1));
        }
    }
    for (was, is) in old.char_devices().iter().zip(new.char_devices()) {
        let what = is.target_name.clone().unwrap_or_else(|| is.role.element().to_owned());
        if was.path != is.path && was.path.is_some() {
            found.push(format!("{what}: {} instead of {}", text(&is.path), text(&was.path)));
        }
        if was.log != is.log {
            found.push(format!("log of {what}: {} instead of {}", text(&is.log), text(&was.log)));
        }
    }
    for (was, is) in old.graphics().iter().zip(new.graphics()) {
        if let Some(port) = was.port.filter(|port| *port > 0 && !was.autoport && is.port != Some(*port)) {
            found.push(format!("{} display: a port that libvirt chooses instead of {port}", was.kind));
        }
        if let Some(socket) = was.socket.as_ref().filter(|_| is.socket != was.socket) {
            found.push(format!("{} display: a port that libvirt chooses instead of {socket}", was.kind));
        }
    }
    if old.genid() != new.genid() && old.genid().is_some() {
        found.push("another generation id, by which the guest can learn that it is a copy".to_owned());
    }
    Ok(found)
}

impl Libvirt {
    /// Loads a memory image. Takes as long as reading the memory takes, so there is no limit: whoever waits has one.
    pub(super) async fn load_memory(&self, image: &Path, xml: &str, paused: bool) -> HvResult<()> {
        let path = path_text(image)?.to_owned();
        let xml = xml.to_owned();
        let load = self.client.call("start from memory", move |c| {
            let flags = if paused { SaveFlags::PAUSED } else { SaveFlags::RUNNING };
            c.restore(&path, Some(&xml), flags)
        });
        load.await.map_err(|e| trouble::doubtful(&e))
    }

    /// Pulls every cable in QEMU. libvirt's own call would do nothing: it believes that they are out already.
    pub(super) async fn pull_cables(&self, domain: &DomainId) -> HvResult<u32> {
        let live = self.look_at(domain, "network cards", |d| d.xml(XmlFlags::NONE)).await?;
        let live = DomainXml::parse(&live).map_err(|e| broken(&e))?;
        let mut pulled = 0;
        for interface in live.interfaces() {
            let Some(name) = interface.alias else { continue };
            let command = json!({ "execute": "set_link", "arguments": { "name": name, "up": false } });
            let answer =
                self.urgent(domain, "pull a cable", move |d| d.qmp_raw(&command.to_string())).await?;
            let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
            if let Some(error) = answer.get("error") {
                let why = error.get("desc").and_then(Value::as_str).unwrap_or("QEMU refused");
                return Err(HvError::new(Trouble::Refused, format!("{name}: {why}")));
            }
            pulled += 1;
        }
        Ok(pulled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_told_and_nothing_else() {
        let old = "<domain type='qemu'><name>a</name><genid>11111111-1111-4111-8111-111111111111</genid><devices>
            <interface type='user'><mac address='52:54:00:00:00:01'/></interface>
            <serial type='file'><source path='/log/a'/></serial>
            <channel type='unix'><source mode='bind' path='/run/a'/><target type='virtio' name='org.x.0'/></channel>
            <graphics type='vnc' port='5901' autoport='no'/></devices></domain>";
        assert_eq!(changes(old, old).unwrap(), Vec::<String>::new());
        let new = old
            .replace("00:00:01'/>", "00:00:02'/><link state='down'/>")
            .replace("/log/a", "/log/a.b")
            .replace(" path='/run/a'", "")
            .replace("port='5901' autoport='no'", "autoport='yes'")
            .replace("11111111-", "22222222-");
        let found = changes(old, &new).unwrap();
        assert_eq!(
            found,
            [
                "network card 1: address 52:54:00:00:00:02 instead of 52:54:00:00:00:01",
                "network card 1: its link is down",
                "serial: /log/a.b instead of /log/a",
                "org.x.0: chosen by libvirt instead of /run/a",
                "vnc display: a port that libvirt chooses instead of 5901",
                "another generation id, by which the guest can learn that it is a copy",
            ]
        );
    }
}
