//! The marker as it stands in a domain's metadata: `<vmkeep:job store="…" job="…" hold="suspended"/>`.

use vmkeep_libvirt::flags::ImpactFlags;
use vmkeep_libvirt::xml::{DomainXml, Element, XmlError};
use vmkeep_libvirt::{Domain, Error};
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
        Some(Hold::Reloaded) => element.set_attr("hold", "reloaded")?,
        Some(Hold::Resumed) => element.set_attr("hold", "resumed")?,
    }
    Ok(element.to_string())
}

/// Sets the marker in each definition that there is: the persistent one, and the live one.
///
/// In this order, here and when it is removed: a domain that somebody starts meanwhile takes the persistent definition as
/// it is at that moment, and is seen to run afterwards. The other way round it would be left with what was there before.
pub(super) fn set_everywhere(domain: &Domain, element: &str) -> Result<(), Error> {
    if domain.is_persistent()? {
        set(domain, Some(element), ImpactFlags::CONFIG)?;
    }
    set_live(domain, Some(element))
}

/// Removes it from both, see [`set_everywhere`].
pub(super) fn clear_everywhere(domain: &Domain) -> Result<(), Error> {
    let there = |impact| Ok(domain.metadata(MARKER_NAMESPACE, impact)?.is_some());
    if domain.is_persistent()? && there(ImpactFlags::CONFIG)? {
        set(domain, None, ImpactFlags::CONFIG)?;
    }
    set_live(domain, None)
}

fn set_live(domain: &Domain, element: Option<&str>) -> Result<(), Error> {
    let done = match domain.is_active()? {
        true if element.is_some() => set(domain, element, ImpactFlags::LIVE),
        true => domain.metadata(MARKER_NAMESPACE, ImpactFlags::LIVE).and_then(|found| match found {
            Some(_) => set(domain, None, ImpactFlags::LIVE),
            None => Ok(()),
        }),
        false => return Ok(()),
    };
    match done {
        // It has ended meanwhile, and its definition with it.
        Err(_) if !domain.is_active()? => Ok(()),
        done => done,
    }
}

fn set(domain: &Domain, element: Option<&str>, impact: ImpactFlags) -> Result<(), Error> {
    domain.set_metadata(MARKER_NAMESPACE, PREFIX, element, impact)
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
            Some("reloaded") => Some(Hold::Reloaded),
            Some("resumed") => Some(Hold::Resumed),
            _ => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use vmkeep_libvirt::Connection;
    use vmkeep_libvirt::flags::{CreateFlags, DestroyFlags};

    use super::*;

    /// So many that the start falls between any two calls of the other.
    const ROUNDS: usize = 2000;

    fn domain(metadata: &str) -> DomainXml {
        format!("<domain type='qemu'><name>x</name><metadata>{metadata}</metadata></domain>").parse().unwrap()
    }

    #[test]
    fn a_marker_comes_back_as_it_was_written() {
        let holds = [Hold::Suspended, Hold::Frozen, Hold::Begun, Hold::Reloaded, Hold::Resumed];
        for hold in holds.map(Some).into_iter().chain([None]) {
            let marker = Marker { store: "s\"<&'".to_owned(), job: "j".to_owned(), hold };
            let element = write(&marker).unwrap();
            let spaced = element
                .replacen("<job", "<vmkeep:job xmlns:vmkeep='urn:vmkeep:job:1'", 1)
                .replace("</job>", "</vmkeep:job>");
            assert_eq!(read(&domain(&spaced)), Some(marker));
        }
    }

    /// A marker that outlives its job keeps every other vmkeep away from the domain.
    #[test]
    fn no_marker_is_left_in_a_domain_that_is_started_while_it_is_removed() {
        let open = || Connection::open("test:///default").unwrap();
        let (ours, operators) = (open(), open());
        let named = |connection: &Connection| connection.domain_by_name("test").unwrap();
        let (domain, started) = (named(&ours), named(&operators));
        let both = Barrier::new(2);
        let mut left = Vec::new();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                for _ in 0..ROUNDS {
                    both.wait();
                    started.start(CreateFlags::NONE).unwrap();
                    both.wait();
                }
            });
            for round in 0..ROUNDS {
                if domain.is_active().unwrap() {
                    domain.destroy(DestroyFlags::NONE).unwrap();
                }
                set_everywhere(&domain, "<job/>").unwrap();
                both.wait();
                clear_everywhere(&domain).unwrap();
                both.wait();
                let there = |impact| domain.metadata(MARKER_NAMESPACE, impact).unwrap().is_some();
                let found = [there(ImpactFlags::CONFIG), there(ImpactFlags::LIVE)];
                left.extend((found != [false; 2]).then_some((round, found)));
            }
        });
        assert!(left.is_empty(), "left in the persistent and the live definition: {left:?}");
    }

    #[test]
    fn other_programs_metadata_is_no_marker() {
        assert_eq!(read(&domain("<x:job xmlns:x='urn:other' store='a' job='b'/>")), None);
    }
}
