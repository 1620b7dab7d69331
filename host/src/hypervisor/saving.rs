//! Saving a guest to a file, and what its state needs to be loaded again.

use std::path::Path;

use serde_json::Value;
use vmkeep_libvirt::flags::{ImpactFlags, SaveFlags};
use vmkeep_libvirt::xml::{DomainXml, XmlError};
use vmkeep_steps::hypervisor::{
    Bitmap, DomainId, HvError, HvResult, Layer, MARKER_NAMESPACE, Marker, Target, Trouble,
};

use super::definition::{broken, path_text, point};
use super::{Libvirt, graph, marker};

impl Libvirt {
    /// Takes as long as writing the memory takes, and has a call that ends it.
    pub(super) async fn save_guest(&self, domain: &DomainId, file: &Path) -> HvResult<()> {
        if file.symlink_metadata().is_ok() {
            return Err(HvError::new(Trouble::Exists, format!("{} exists already", file.display())));
        }
        let path = path_text(file)?.to_owned();
        self.change_patiently(domain, "save the guest", move |d| d.save(&path, None, SaveFlags::NONE)).await
    }

    pub(super) async fn note_durably(&self, domain: &DomainId, note: &Marker) -> HvResult<()> {
        let xml = marker::write(note).map_err(|e| broken(&e))?;
        self.urgent(domain, "note in the definition", move |d| {
            d.set_metadata(MARKER_NAMESPACE, marker::PREFIX, Some(&xml), ImpactFlags::CONFIG)
        })
        .await?;
        self.sync_folders().await
    }

    /// What QEMU records of an image; what has become inconsistent or does not outlive QEMU is of no use to anybody.
    pub(super) async fn bitmaps_of(&self, domain: &DomainId, image: &Path) -> HvResult<Vec<Bitmap>> {
        let all = self.ask_monitor(domain, "query-named-block-nodes").await?;
        Ok(recorded(&all, &graph::nodes_of(&all, image)))
    }
}

fn recorded(all: &Value, nodes: &[String]) -> Vec<Bitmap> {
    let node = |node: &&Value| node["node-name"].as_str().is_some_and(|name| nodes.iter().any(|n| n == name));
    let of = |node: &Value| node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    let mut found: Vec<Bitmap> = Vec::new();
    for bitmap in all.as_array().into_iter().flatten().filter(node).flat_map(of) {
        let good =
            bitmap["persistent"] == true && bitmap["recording"] == true && bitmap["inconsistent"] != true;
        let (Some(name), Some(granularity)) = (bitmap["name"].as_str(), bitmap["granularity"].as_u64())
        else {
            continue;
        };
        if good && found.iter().all(|known| known.name != name) {
            found.push(Bitmap { name: name.to_owned(), granularity });
        }
    }
    found
}

/// See [`vmkeep_steps::hypervisor::Hypervisor::reloaded_definition`].
pub(super) fn reloaded(text: &str, disks: &[(Target, Layer)], note: &Marker) -> HvResult<String> {
    let edit = || -> Result<String, XmlError> {
        let mut xml = DomainXml::parse(text)?;
        for (target, layer) in disks {
            point(&mut xml, target, layer)?;
        }
        marker::put(&mut xml, note)?;
        Ok(xml.to_string())
    };
    edit().map_err(|e| broken(&e))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vmkeep_steps::hypervisor::Hold;

    use super::*;

    #[test]
    fn a_state_is_loaded_onto_the_overlays_with_their_chains_and_the_mark() {
        let saved = "<domain type='qemu' id='3'><name>web</name><devices>
            <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/i/a.raw' index='1'/>
            <backingStore/><target dev='vda'/></disk>
            <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/i/b'/>
            <backingStore/><target dev='vdb'/></disk></devices></domain>";
        let disks = [(Target::from("vda"), Layer { path: "/i/o 1".into(), format: "qcow2".to_owned() })];
        let note = Marker { store: "s".to_owned(), job: "j".to_owned(), hold: Some(Hold::Reloaded) };
        let text = reloaded(saved, &disks, &note).unwrap();
        let xml = DomainXml::parse(&text).unwrap();
        assert_eq!(marker::read(&xml), Some(note));
        let [first, second] = &xml.disks()[..] else { panic!("{text}") };
        assert_eq!((first.format.as_deref(), first.target.as_str()), (Some("qcow2"), "vda"));
        assert!(text.contains("/i/o 1") && !text.contains("/i/a.raw"));
        // Only the disk that moves loses the end of its chain.
        assert_eq!(text.matches("<backingStore/>").count(), 1);
        assert_eq!(second.target, "vdb");
    }

    #[test]
    fn only_bitmaps_that_outlive_qemu_and_go_on_are_carried_over() {
        let bitmap = |name: &str, persistent: bool, inconsistent: bool| {
            json!({ "name": name, "granularity": 65536, "persistent": persistent, "recording": true,
                    "inconsistent": inconsistent, "busy": false })
        };
        let all = json!([
            { "node-name": "libvirt-1-format",
              "dirty-bitmaps": [bitmap("a", true, false), bitmap("b", false, false), bitmap("c", true, true)] },
            { "node-name": "other", "dirty-bitmaps": [bitmap("d", true, false)] },
        ]);
        let found = recorded(&all, &["libvirt-1-format".to_owned(), "libvirt-1-storage".to_owned()]);
        assert_eq!(found, [Bitmap { name: "a".to_owned(), granularity: 65536 }]);
    }
}
