//! Definitions of the fake hypervisor: what counts is JSON in their description; the rest is for those who read XML.

use serde::{Deserialize, Serialize};

use super::outside::Sealed;
use crate::hypervisor::{
    Backing, Definition, Devices, DiskChange, DiskDef, DiskDevice, DiskSource, DomainId, HvError, HvResult,
    Layer, Marker, Mirror, NewIdentity, NvramDef, Target, TpmDef, TpmKind, Trouble,
};

/// A definition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Def {
    pub name: String,
    pub id: DomainId,
    pub disks: Vec<DefDisk>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marker: Option<Marker>,
    pub agent: bool,
    pub cards: usize,
    pub links_down: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<Sealed>,
}

/// A disk of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefDisk {
    /// Which.
    pub target: Target,
    /// What it names.
    pub layer: Layer,
    /// What it says to be below; nothing: the image tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Vec<Layer>>,
    /// What is below was found out by libvirt itself: it does not tell of it in a persistent definition.
    #[serde(default)]
    pub found: bool,
    /// libvirt's idea of a block job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
}

impl Def {
    pub(super) fn read(text: &str) -> HvResult<Self> {
        let inside = text.split_once("<description>").and_then(|(_, rest)| rest.split_once("</description>"));
        let inside = inside.map(|(inside, _)| inside);
        serde_json::from_str(inside.unwrap_or_default())
            .map_err(|e| HvError::new(Trouble::Refused, format!("no definition: {e}")))
    }

    pub(super) fn text(&self) -> String {
        let disk = |disk: &DefDisk| {
            format!(
                "<disk type='file' device='disk'><driver name='qemu' type='{}'/><source file='{}'/>\
                 <target dev='{}' bus='virtio'/></disk>",
                disk.layer.format,
                disk.layer.path.display(),
                disk.target
            )
        };
        format!(
            "<domain type='qemu'><name>{}</name><uuid>{}</uuid><memory unit='KiB'>1024</memory>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{}</devices>\
             <description>{}</description></domain>",
            self.name,
            self.id,
            self.disks.iter().map(disk).collect::<String>(),
            serde_json::to_string(self).unwrap_or_default()
        )
    }

    pub(super) fn disk(&mut self, target: &Target) -> Option<&mut DefDisk> {
        self.disks.iter_mut().find(|disk| disk.target == *target)
    }

    pub(super) fn point(&mut self, target: &Target, layer: &Layer) {
        if let Some(disk) = self.disk(target) {
            *disk = DefDisk {
                target: target.clone(),
                layer: layer.clone(),
                backing: None,
                found: false,
                mirror: None,
            };
        }
    }

    pub(super) fn change(&mut self, change: &DiskChange) -> HvResult<()> {
        match change {
            DiskChange::Point(disks) => disks.iter().for_each(|(target, layer)| self.point(target, layer)),
            DiskChange::LikeIn { xml, targets } => {
                for from in Self::read(xml)?.disks.iter().filter(|disk| targets.contains(&disk.target)) {
                    if let Some(disk) = self.disk(&from.target) {
                        *disk = from.clone();
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn rewritten(mut self, identity: &NewIdentity) -> Self {
        (self.name, self.id, self.marker) = (identity.name.clone(), identity.id, None);
        self.disks.retain(|disk| !identity.without.contains(&disk.target));
        for (target, layer) in &identity.disks {
            self.point(target, layer);
        }
        if let Some(sealed) = self.sealed.as_mut().filter(|_| !identity.same || identity.nvram.is_some()) {
            sealed.variables.clone_from(&identity.nvram);
        }
        if !identity.same {
            self.links_down = identity.links_down;
        }
        self
    }

    /// As the steps are told of it.
    pub(super) fn told(&self) -> Definition {
        let disk = |disk: &DefDisk| DiskDef {
            target: disk.target.clone(),
            device: DiskDevice::Disk,
            source: DiskSource::File(disk.layer.path.clone()),
            format: Some(disk.layer.format.clone()),
            backing: disk.backing.clone().map_or(Backing::Probed, Backing::Explicit),
            read_only: false,
            shareable: false,
            transient: false,
            encrypted: false,
            mirror: disk.mirror,
        };
        let targets: Vec<_> = self.disks.iter().map(|disk| &disk.target).collect();
        Definition {
            xml: self.text(),
            bare: format!(
                "{:?}",
                (&self.name, &self.id, targets, self.agent, self.cards, self.links_down, &self.sealed)
            ),
            disks: self.disks.iter().map(disk).collect(),
            devices: Devices {
                memory: 1 << 20,
                agent: self.agent,
                network_cards: self.cards,
                nvram: self.sealed.as_ref().map(|sealed| NvramDef {
                    file: sealed.variables.clone(),
                    format: "raw".to_owned(),
                    ..NvramDef::default()
                }),
                tpm: self.sealed.as_ref().map(|_| TpmDef {
                    kind: TpmKind::Emulator,
                    version: Some("2.0".to_owned()),
                    encrypted: false,
                }),
                ..Devices::default()
            },
        }
    }
}
