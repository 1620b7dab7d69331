//! The marker as it stands in a domain's metadata: `<vmkeep:job store="…" job="…" hold="suspended"/>`.

use vmkeep_libvirt::xml::{DomainXml, Element, XmlError};
use vmkeep_steps::hypervisor::{Hold, MARKER_NAMESPACE, Marker};

/// The prefix that libvirt puts before the element.
pub(super) const PREFIX: &str = "vmkeep";

/// The element without its namespace, which libvirt adds by itself.
pub(super) fn write(marker: &Marker) -> Result<String, XmlError> {
    let mut element = Element::new("job")?;
    element.set_attr("store", &marker.store)?;
    element.set_attr("job", &marker.job)?;
    match marker.hold {
        None => {}
        Some(Hold::Suspended) => element.set_attr("hold", "suspended")?,
        Some(Hold::Frozen) => element.set_attr("hold", "frozen")?,
        Some(Hold::Begun) => element.set_attr("hold", "begun")?,
    }
    Ok(element.to_string())
}

/// Puts the marker into a definition, in place of any other.
pub(super) fn put(xml: &mut DomainXml, marker: &Marker) -> Result<(), XmlError> {
    xml.remove_metadata(MARKER_NAMESPACE);
    let element = write(marker)?;
    let body = element.strip_prefix("<job").unwrap_or(&element);
    xml.set_metadata(&format!("<{PREFIX}:job xmlns:{PREFIX}='{MARKER_NAMESPACE}'{body}"))
}

/// The marker of a definition. One that is not understood still counts: whoever wrote it works here.
pub(super) fn read(xml: &DomainXml) -> Option<Marker> {
    let element = xml.metadata(MARKER_NAMESPACE)?;
    let text = |name: &str| element.attr(name).unwrap_or_default().to_owned();
    Some(Marker {
        store: text("store"),
        job: text("job"),
        hold: match element.attr("hold") {
            Some("suspended") => Some(Hold::Suspended),
            Some("frozen") => Some(Hold::Frozen),
            Some("begun") => Some(Hold::Begun),
            _ => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(metadata: &str) -> DomainXml {
        format!("<domain type='qemu'><name>x</name><metadata>{metadata}</metadata></domain>").parse().unwrap()
    }

    #[test]
    fn a_marker_comes_back_as_it_was_written() {
        for hold in [None, Some(Hold::Suspended), Some(Hold::Frozen), Some(Hold::Begun)] {
            let marker = Marker { store: "s\"<&'".to_owned(), job: "j".to_owned(), hold };
            let element = write(&marker).unwrap();
            let spaced = element
                .replacen("<job", "<vmkeep:job xmlns:vmkeep='urn:vmkeep:job:1'", 1)
                .replace("</job>", "</vmkeep:job>");
            assert_eq!(read(&domain(&spaced)), Some(marker));
        }
    }

    #[test]
    fn other_programs_metadata_is_no_marker() {
        assert_eq!(read(&domain("<x:job xmlns:x='urn:other' store='a' job='b'/>")), None);
    }
}
