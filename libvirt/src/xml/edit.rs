//! Edits of a definition.
//!
//! Invariant: an edit touches the elements it is about and no others, and refuses (changing nothing)
//! when what it is about is not there.

use uuid::Uuid;

use super::device::CharRole;
use super::domain::{DomainXml, namespace_of};
use super::tree::{Document, Element, Node, XmlError};

/// What a definition shall say about what lies below a disk's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackingEdit {
    /// Nothing: libvirt reads the chain from the image.
    Drop,
    /// The chain ends at the image. The image's own backing file is then *ignored*: data below is
    /// gone for the guest.
    End,
    /// Exactly these files, from the top down: path and format; the chain ends after the last.
    Chain(Vec<(String, String)>),
}

/// The link state of a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// The cable is in.
    Up,
    /// The cable is out.
    Down,
}

impl DomainXml {
    fn devices_mut(&mut self) -> Result<&mut Element, XmlError> {
        self.root_mut().child_mut("devices").ok_or_else(|| XmlError::Missing("<devices>".to_owned()))
    }

    /// The one disk with that target. Of two it would not be known which one is meant, and the other would go on naming what
    /// it named; libvirt never writes such a definition, but a stranger's backup may hold one.
    fn disk_mut(&mut self, target: &str) -> Result<&mut Element, XmlError> {
        let mut found = self
            .devices_mut()?
            .elements_mut()
            .filter(|e| e.name() == "disk" && e.child("target").and_then(|t| t.attr("dev")) == Some(target));
        match (found.next(), found.next()) {
            (Some(disk), None) => Ok(disk),
            (Some(_), Some(_)) => Err(XmlError::Twice(format!("disk '{target}'"))),
            (None, _) => Err(XmlError::Missing(format!("disk '{target}'"))),
        }
    }

    fn set_child_text(&mut self, name: &str, text: &str) -> Result<(), XmlError> {
        let mut fresh = Element::new(name)?;
        fresh.set_text(text)?;
        match self.root_mut().child_mut(name) {
            Some(e) => e.set_text(text),
            None => {
                let after = if name == "uuid" || name == "title" { "name" } else { "" };
                self.root_mut().insert_after(after, fresh);
                Ok(())
            }
        }
    }

    // ---- identity -------------------------------------------------------------------------------

    /// Names it anew.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn set_name(&mut self, name: &str) -> Result<(), XmlError> {
        self.set_child_text("name", name)
    }

    /// Gives it another UUID, also where its system information repeats the old one (libvirt refuses a
    /// definition in which the two differ).
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn set_uuid(&mut self, uuid: Uuid) -> Result<(), XmlError> {
        let old = self.uuid().ok();
        let text = uuid.to_string();
        self.set_child_text("uuid", &text)?;
        if let Some(system) = self.root_mut().at_mut(&["sysinfo", "system"]) {
            for entry in system.elements_mut().filter(|e| e.attr("name") == Some("uuid")) {
                if Uuid::parse_str(entry.text().trim()).ok() == old {
                    entry.set_text(&text)?;
                }
            }
        }
        Ok(())
    }

    /// Sets or removes its title.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn set_title(&mut self, title: Option<&str>) -> Result<(), XmlError> {
        match title {
            Some(title) => self.set_child_text("title", title),
            None => {
                self.root_mut().remove_named("title");
                Ok(())
            }
        }
    }

    /// If it has a machine generation id, gives it another one: that is how its operating system learns
    /// that it is a copy. Tells whether it had one.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn set_genid(&mut self, id: Uuid) -> Result<bool, XmlError> {
        match self.root_mut().child_mut("genid") {
            Some(e) => e.set_text(&id.to_string()).map(|()| true),
            None => Ok(false),
        }
    }

    // ---- disks ----------------------------------------------------------------------------------

    /// Lets a disk use the file at `path`. What the old source said of itself (its place in the chain,
    /// labels, slices) goes with it; encryption stays. What lies below is a separate decision:
    /// [`Self::set_disk_backing`].
    ///
    /// # Errors
    /// [`XmlError::Missing`] if there is no such disk, [`XmlError::Twice`] if there are two; [`XmlError::Character`].
    pub fn set_disk_file(&mut self, target: &str, path: &str, format: &str) -> Result<(), XmlError> {
        self.set_disk_source(target, ("file", "file"), path, format)
    }

    /// Lets a disk use the block device at `path`; otherwise as [`Self::set_disk_file`]. (QEMU refuses to open a device as
    /// a file, and a file as a device.)
    ///
    /// # Errors
    /// [`XmlError::Missing`] if there is no such disk, [`XmlError::Twice`] if there are two; [`XmlError::Character`].
    pub fn set_disk_device(&mut self, target: &str, path: &str, format: &str) -> Result<(), XmlError> {
        self.set_disk_source(target, ("block", "dev"), path, format)
    }

    fn set_disk_source(
        &mut self,
        target: &str,
        (kind, attribute): (&str, &str),
        path: &str,
        format: &str,
    ) -> Result<(), XmlError> {
        let disk = self.disk_mut(target)?;
        let same_kind = disk.attr("type") == Some(kind);
        let mut source = Element::new("source")?;
        if let Some(old) = disk.child("source") {
            if same_kind && let Some(policy) = old.attr("startupPolicy") {
                source.set_attr("startupPolicy", policy)?;
            }
            if let Some(encryption) = old.child("encryption") {
                source.push(encryption.clone());
            }
        }
        source.set_attr(attribute, path)?;
        disk.set_attr("type", kind)?;
        match disk.child_mut("source") {
            Some(old) => *old = source,
            None => disk.insert_after("driver", source),
        }
        let driver = if disk.child("driver").is_some() {
            disk.child_mut("driver")
        } else {
            let mut driver = Element::new("driver")?;
            driver.set_attr("name", "qemu")?;
            disk.push(driver);
            disk.child_mut("driver")
        };
        driver.ok_or_else(|| XmlError::Missing("<driver>".to_owned()))?.set_attr("type", format)
    }

    /// Says what lies below a disk's image, or leaves it to libvirt.
    ///
    /// # Errors
    /// [`XmlError::Missing`] if there is no such disk, [`XmlError::Twice`] if there are two; [`XmlError::Character`].
    pub fn set_disk_backing(&mut self, target: &str, backing: &BackingEdit) -> Result<(), XmlError> {
        let disk = self.disk_mut(target)?;
        let new = match backing {
            BackingEdit::Drop => None,
            BackingEdit::End => Some(Element::new("backingStore")?),
            BackingEdit::Chain(layers) => {
                let mut below = Element::new("backingStore")?;
                for (path, format) in layers.iter().rev() {
                    let mut layer = Element::new("backingStore")?;
                    layer.set_attr("type", "file")?;
                    let mut format_element = Element::new("format")?;
                    format_element.set_attr("type", format)?;
                    let mut source = Element::new("source")?;
                    source.set_attr("file", path)?;
                    layer.push(format_element);
                    layer.push(source);
                    layer.push(below);
                    below = layer;
                }
                Some(below)
            }
        };
        match (disk.child_mut("backingStore"), new) {
            (Some(old), Some(new)) => *old = new,
            (None, Some(new)) => disk.insert_after("source", new),
            (_, None) => {
                disk.remove_named("backingStore");
            }
        }
        Ok(())
    }

    /// Removes a disk.
    ///
    /// # Errors
    /// [`XmlError::Missing`] if there is no such disk, [`XmlError::Twice`] if there are two.
    pub fn remove_disk(&mut self, target: &str) -> Result<(), XmlError> {
        self.disk_mut(target)?;
        self.devices_mut()?.remove_elements(|e| {
            e.name() == "disk" && e.child("target").and_then(|t| t.attr("dev")) == Some(target)
        });
        Ok(())
    }

    // ---- network --------------------------------------------------------------------------------

    /// Gives each interface the MAC address that `choose` makes of its number and its old one.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn set_macs(
        &mut self,
        mut choose: impl FnMut(usize, Option<&str>) -> String,
    ) -> Result<(), XmlError> {
        for (i, interface) in self.interfaces_mut().enumerate() {
            let old = interface.child("mac").and_then(|m| m.attr("address"));
            let new = choose(i, old);
            interface.child_or_new("mac")?.set_attr("address", &new)?;
        }
        Ok(())
    }

    /// Gives each interface a random MAC address out of QEMU's range, and returns them.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn regenerate_macs(&mut self) -> Result<Vec<String>, XmlError> {
        let mut made = Vec::new();
        self.set_macs(|_, _| {
            let random = Uuid::new_v4();
            let b = random.as_bytes();
            let mac = format!("52:54:00:{:02x}:{:02x}:{:02x}", b[0], b[1], b[2]);
            made.push(mac.clone());
            mac
        })?;
        Ok(made)
    }

    /// Pulls or puts in the cable of every interface.
    ///
    /// # Errors
    /// None in practice.
    pub fn set_links(&mut self, state: LinkState) -> Result<(), XmlError> {
        let text = match state {
            LinkState::Up => "up",
            LinkState::Down => "down",
        };
        self.interfaces_mut().try_for_each(|i| i.child_or_new("link")?.set_attr("state", text))
    }

    fn interfaces_mut(&mut self) -> impl Iterator<Item = &mut Element> {
        self.root_mut()
            .child_mut("devices")
            .into_iter()
            .flat_map(Element::elements_mut)
            .filter(|e| e.name() == "interface")
    }

    // ---- files and sockets beside the disks -----------------------------------------------------

    /// Shows `choose` every path of a serial port, console or channel (and its log file); what it
    /// returns replaces the path, `None` removes it, so that libvirt chooses one. Returns how many
    /// changed.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn rewrite_char_paths(
        &mut self,
        mut choose: impl FnMut(CharRole, &str) -> Option<String>,
    ) -> Result<usize, XmlError> {
        let Some(devices) = self.root_mut().child_mut("devices") else { return Ok(0) };
        let mut changed = 0;
        for device in devices.elements_mut() {
            let Some(role) = CharRole::ALL.into_iter().find(|r| r.element() == device.name()) else {
                continue;
            };
            for (child, key) in [("source", "path"), ("log", "file")] {
                let Some(e) = device.child_mut(child) else { continue };
                let Some(old) = e.attr(key).map(str::to_owned) else { continue };
                match choose(role, &old) {
                    Some(new) if new == old => continue,
                    Some(new) => e.set_attr(key, &new)?,
                    // Without its path a log means nothing; a source may still choose one.
                    None if child == "log" => {
                        device.remove_named("log");
                    }
                    None => {
                        e.remove_attr(key);
                        if e.attrs().next().is_none() && e.elements().next().is_none() {
                            device.remove_named("source");
                        }
                    }
                }
                changed += 1;
            }
        }
        Ok(changed)
    }

    /// Names the file of the boot firmware's variables, or (with `None`) lets libvirt choose and make
    /// it from the template at the next start. Tells whether the definition has such a file at all.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn set_nvram(&mut self, path: Option<&str>) -> Result<bool, XmlError> {
        let Some(nvram) = self.root_mut().at_mut(&["os", "nvram"]) else { return Ok(false) };
        match (path, nvram.child_mut("source")) {
            (Some(path), Some(source)) => {
                source.set_attr("file", path)?;
                source.remove_attr("dev");
                nvram.set_attr("type", "file")?;
            }
            (Some(path), None) => nvram.set_text(path)?,
            (None, _) => {
                nvram.set_text("")?;
                nvram.remove_attr("type");
            }
        }
        if path.is_none() && nvram.attrs().next().is_none() {
            // An empty element says nothing; libvirt refuses it.
            if let Some(os) = self.root_mut().child_mut("os") {
                os.remove_named("nvram");
            }
        }
        Ok(true)
    }

    // ---- what only a running domain has ----------------------------------------------------------

    /// Removes the security labels that libvirt chooses anew at each start.
    pub fn drop_dynamic_seclabels(&mut self) {
        self.root_mut().remove_elements(|e| {
            e.name() == "seclabel"
                && e.attr("type").is_none_or(|t| t == "dynamic")
                && e.attr("model").is_some()
        });
    }

    /// Turns a live definition into one that can be defined: removes its number, the numbers of images,
    /// mirrors, aliases that libvirt chose, terminals and host devices that libvirt chose.
    pub fn strip_runtime(&mut self) {
        self.root_mut().remove_attr("id");
        let Some(devices) = self.root_mut().child_mut("devices") else { return };
        for device in devices.elements_mut() {
            device.remove_elements(|e| {
                e.name() == "alias" && e.attr("name").is_none_or(|n| !n.starts_with("ua-"))
            });
            device.remove_attr("tty");
            match device.name() {
                "disk" => {
                    device.remove_named("mirror");
                    device.walk_mut(&mut |e| {
                        if e.name() == "source" {
                            e.remove_attr("index");
                        }
                    });
                }
                "interface" => {
                    // The names libvirt makes up itself; others were chosen by the user.
                    device.remove_elements(|e| {
                        e.name() == "target"
                            && e.attr("dev").is_some_and(|d| {
                                ["vnet", "vif", "macvtap", "macvlan"].iter().any(|p| d.starts_with(p))
                            })
                    });
                }
                "channel" | "serial" | "console" | "parallel" => {
                    if device.attr("type") == Some("pty") {
                        device.remove_named("source");
                    }
                    if let Some(target) = device.child_mut("target") {
                        target.remove_attr("state");
                    }
                }
                _ => {}
            }
        }
    }

    // ---- metadata -------------------------------------------------------------------------------

    /// Puts an element, given as XML, into the metadata; it replaces the one of the same namespace.
    ///
    /// # Errors
    /// Those of [`Document::parse`]; [`XmlError::Missing`] when the element has no namespace.
    pub fn set_metadata(&mut self, xml: &str) -> Result<(), XmlError> {
        let element = Document::parse(xml)?.into_root();
        let namespace = namespace_of(&[&element])
            .ok_or_else(|| XmlError::Missing("namespace on the metadata element".to_owned()))?
            .to_owned();
        self.remove_metadata(&namespace);
        if self.root().child("metadata").is_none() {
            let anchor = ["description", "title", "genid", "uuid", "name"];
            let after = anchor.into_iter().find(|n| self.root().child(n).is_some()).unwrap_or("");
            let fresh = Element::new("metadata")?;
            self.root_mut().insert_after(after, fresh);
        }
        self.root_mut().child_or_new("metadata")?.push(element);
        Ok(())
    }

    /// Removes the element of a namespace from the metadata. Tells whether it was there.
    pub fn remove_metadata(&mut self, namespace: &str) -> bool {
        let scope = self.root().clone_shallow();
        let Some(metadata) = self.root_mut().child_mut("metadata") else { return false };
        let inner = metadata.clone_shallow();
        let removed = metadata.remove_elements(|e| namespace_of(&[&scope, &inner, e]) == Some(namespace)) > 0;
        let empty = metadata.children.iter().all(|n| matches!(n, Node::Text(t) if t.trim().is_empty()));
        if removed && empty {
            self.root_mut().remove_named("metadata");
        }
        removed
    }
}
