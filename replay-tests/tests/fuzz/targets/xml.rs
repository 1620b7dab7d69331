//! XML that libvirt, or somebody who hands us a folder, wrote.

use uuid::Uuid;
use vmkeep_libvirt::xml::{BackingEdit, Document, DomainXml, LinkState, XmlError};

use super::{ACCEPTED, NO_TEXT, kept, refused, text};

pub(crate) fn document_seeds() -> Vec<Vec<u8>> {
    kept("xml").into_iter().chain(kept("domain-xml")).collect()
}

/// What is accepted is written so that it is accepted again, as the same, and is written the same ever after.
pub(crate) fn document(input: &[u8]) -> u64 {
    let Some(text) = text(input) else { return NO_TEXT };
    let document = match Document::parse(text) {
        Ok(document) => document,
        Err(e) => return refused(&e),
    };
    let written = document.to_string();
    let again = Document::parse(&written).expect("what was written is read");
    assert_eq!(again.to_string(), written);
    let third = Document::parse(&again.to_string()).unwrap();
    assert_eq!(third, again);
    let mut elements = 0;
    let mut root = document.root().clone();
    root.walk_mut(&mut |element| {
        elements += 1;
        let _ = (element.text(), element.local_name().len(), element.attrs().count());
    });
    assert!(elements > 0);
    ACCEPTED
}

fn read(domain: &DomainXml) -> String {
    format!(
        "{:?}",
        (
            (domain.kind(), domain.id(), domain.name().ok(), domain.uuid().ok(), domain.title()),
            (
                domain.memory().ok(),
                domain.genid(),
                domain.disks(),
                domain.interfaces(),
                domain.char_devices()
            ),
            (domain.has_agent_channel(), domain.os(), domain.tpms(), domain.hostdevs(), domain.filesystems()),
            (domain.graphics(), domain.launch_security()),
        )
    )
}

/// Every question has an answer; an edit that is taken back leaves what it found; each edit's outcome is a definition again.
pub(crate) fn domain(input: &[u8]) -> u64 {
    let Some(text) = text(input) else { return NO_TEXT };
    let domain = match DomainXml::parse(text) {
        Ok(domain) => domain,
        Err(e) => return refused(&e),
    };
    let before = read(&domain);
    let again = DomainXml::parse(&domain.to_string()).expect("what was written is read");
    assert_eq!(read(&again), before, "and means the same");

    // Another name and back: all else is as it was, to the byte.
    if let Ok(name) = domain.name() {
        let renamed = |domain: &DomainXml, name: &str| {
            let mut domain = domain.clone();
            domain.set_name(name).map(|()| domain.to_string())
        };
        if let (Ok(same), Ok(other)) = (renamed(&domain, &name), renamed(&domain, "an\"other<&name")) {
            let other = DomainXml::parse(&other).expect("an edit leaves a definition");
            assert_eq!(other.name().unwrap(), "an\"other<&name");
            assert_eq!(renamed(&other, &name).unwrap(), same);
            let rest =
                |domain: &DomainXml| format!("{:?}", (domain.disks(), domain.interfaces(), domain.os()));
            assert_eq!(rest(&other), rest(&domain));
        }
    }
    type Edit<'a> = &'a dyn Fn(&mut DomainXml) -> Result<(), XmlError>;
    let edits: [Edit; 9] = [
        &|d| d.set_uuid(Uuid::from_u128(5)),
        &|d| d.set_title(Some("a <title>")),
        &|d| d.set_genid(Uuid::from_u128(6)).map(drop),
        &|d| d.regenerate_macs().map(drop),
        &|d| d.set_links(LinkState::Down),
        &|d| d.set_nvram(Some("/a & b")).map(drop),
        &|d| {
            d.drop_dynamic_seclabels();
            Ok(())
        },
        &|d| {
            d.strip_runtime();
            Ok(())
        },
        &|d| d.set_metadata("<vmkeep:job xmlns:vmkeep=\"urn:vmkeep:job:1\">7</vmkeep:job>"),
    ];
    for edit in edits {
        let mut edited = domain.clone();
        if edit(&mut edited).is_ok() {
            reread(&edited);
        }
    }
    for disk in domain.disks() {
        let target = &disk.target;
        let mut edited = domain.clone();
        if edited.set_disk_file(target, "/x/\"y\" & <z>", "qcow2").is_ok() {
            let found = reread(&edited).disk(target).and_then(|disk| disk.source.path);
            assert_eq!(found.as_deref(), Some("/x/\"y\" & <z>"));
        }
        let mut edited = domain.clone();
        if edited.set_disk_backing(target, &BackingEdit::End).is_ok() {
            reread(&edited);
        }
        let mut edited = domain.clone();
        if edited.remove_disk(target).is_ok() {
            assert_eq!(reread(&edited).disks().len() + 1, domain.disks().len());
        }
    }
    ACCEPTED
}

/// The definition as whoever is given it reads it.
fn reread(edited: &DomainXml) -> DomainXml {
    let again = DomainXml::parse(&edited.to_string()).expect("an edit leaves a definition");
    assert_eq!(read(&again), read(edited));
    again
}
