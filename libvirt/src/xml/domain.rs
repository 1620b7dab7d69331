//! A domain's definition.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use super::device::{CharDevice, CharRole, Filesystem, Graphics, Hostdev, Interface, Os, Tpm};
use super::disk::Disk;
use super::tree::{Document, Element, XmlError};
use super::units::bytes_of;

/// A definition, read and edited. What is not understood is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainXml {
    pub(super) doc: Document,
}

impl fmt::Display for DomainXml {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.doc.fmt(f)
    }
}

impl FromStr for DomainXml {
    type Err = XmlError;

    fn from_str(s: &str) -> Result<Self, XmlError> {
        Self::parse(s)
    }
}

impl DomainXml {
    /// Reads a definition.
    ///
    /// # Errors
    /// Those of [`Document::parse`]; [`XmlError::Root`] if it is not a `<domain>`.
    pub fn parse(text: &str) -> Result<Self, XmlError> {
        Self::from_document(Document::parse(text)?)
    }

    /// From an element, such as the `<domain>` inside a checkpoint's or snapshot's description.
    ///
    /// # Errors
    /// [`XmlError::Root`] if it is not a `<domain>`.
    pub fn from_element(element: Element) -> Result<Self, XmlError> {
        Self::from_document(Document::new(element))
    }

    fn from_document(doc: Document) -> Result<Self, XmlError> {
        if doc.root().name() != "domain" {
            return Err(XmlError::Root { expected: "domain", found: doc.root().name().to_owned() });
        }
        Ok(Self { doc })
    }

    /// The `<domain>` element itself.
    pub fn root(&self) -> &Element {
        self.doc.root()
    }

    /// The `<domain>` element itself, for edits that have no method of their own.
    pub fn root_mut(&mut self) -> &mut Element {
        self.doc.root_mut()
    }

    /// `qemu`, `kvm`, …
    pub fn kind(&self) -> Option<&str> {
        self.root().attr("type")
    }

    /// The number of a running domain (live definitions only).
    pub fn id(&self) -> Option<u32> {
        self.root().attr("id").and_then(|i| i.parse().ok())
    }

    /// Its name.
    ///
    /// # Errors
    /// [`XmlError::Missing`].
    pub fn name(&self) -> Result<String, XmlError> {
        self.root().child_text("name").ok_or_else(|| XmlError::Missing("<name>".to_owned()))
    }

    /// Its UUID.
    ///
    /// # Errors
    /// [`XmlError::Missing`], [`XmlError::Value`].
    pub fn uuid(&self) -> Result<Uuid, XmlError> {
        let text = self.root().child_text("uuid").ok_or_else(|| XmlError::Missing("<uuid>".to_owned()))?;
        Uuid::parse_str(text.trim()).map_err(|_| XmlError::Value { what: "<uuid>", value: text })
    }

    /// Its title.
    pub fn title(&self) -> Option<String> {
        self.root().child_text("title")
    }

    /// The most memory it may have, bytes.
    ///
    /// # Errors
    /// [`XmlError::Missing`], [`XmlError::Value`].
    pub fn memory(&self) -> Result<u64, XmlError> {
        let e = self.root().child("memory").ok_or_else(|| XmlError::Missing("<memory>".to_owned()))?;
        bytes_of(e, "<memory>")
    }

    /// The machine id its operating system is told when it is a copy of another, if it has one.
    pub fn genid(&self) -> Option<String> {
        self.root().child_text("genid")
    }

    fn devices(&self, name: &'static str) -> impl Iterator<Item = &Element> {
        self.root().child("devices").into_iter().flat_map(move |d| d.children_named(name))
    }

    /// Its disks in the order of the definition.
    pub fn disks(&self) -> Vec<Disk> {
        self.devices("disk").filter_map(Disk::read).collect()
    }

    /// The disk with that target.
    pub fn disk(&self, target: &str) -> Option<Disk> {
        self.disks().into_iter().find(|d| d.target == target)
    }

    /// Its network interfaces.
    pub fn interfaces(&self) -> Vec<Interface> {
        self.devices("interface").map(Interface::read).collect()
    }

    /// Its serial ports, consoles and channels.
    pub fn char_devices(&self) -> Vec<CharDevice> {
        let of = |role: CharRole| self.devices(role.element()).map(move |e| CharDevice::read(role, e));
        CharRole::ALL.into_iter().flat_map(of).collect()
    }

    /// Whether it has a channel for the guest agent.
    pub fn has_agent_channel(&self) -> bool {
        self.char_devices().iter().any(|c| c.target_name.as_deref() == Some("org.qemu.guest_agent.0"))
    }

    /// How it boots.
    pub fn os(&self) -> Option<Os> {
        self.root().child("os").map(Os::read)
    }

    /// Its TPMs.
    pub fn tpms(&self) -> Vec<Tpm> {
        self.devices("tpm").map(Tpm::read).collect()
    }

    /// The host's devices passed through to it.
    pub fn hostdevs(&self) -> Vec<Hostdev> {
        self.devices("hostdev").map(Hostdev::read).collect()
    }

    /// The host's folders shown to it.
    pub fn filesystems(&self) -> Vec<Filesystem> {
        self.devices("filesystem").map(Filesystem::read).collect()
    }

    /// Its displays.
    pub fn graphics(&self) -> Vec<Graphics> {
        self.devices("graphics").map(Graphics::read).collect()
    }

    /// The kind of memory protection (`sev`, …), if it has one.
    pub fn launch_security(&self) -> Option<&str> {
        self.root().child("launchSecurity").map(|l| l.attr("type").unwrap_or_default())
    }

    /// The element of a namespace in the metadata.
    pub fn metadata(&self, namespace: &str) -> Option<&Element> {
        let metadata = self.root().child("metadata")?;
        metadata.elements().find(|e| namespace_of(&[self.root(), metadata, e]) == Some(namespace))
    }
}

/// The namespace of the last of nested elements, from the outermost to itself.
pub(super) fn namespace_of<'a>(path: &[&'a Element]) -> Option<&'a str> {
    let element = path.last()?;
    let key = element.prefix().map_or_else(|| "xmlns".to_owned(), |p| format!("xmlns:{p}"));
    path.iter().rev().find_map(|e| e.attr(&key)).filter(|ns| !ns.is_empty())
}
