//! Headers of images, and manifests.

use std::path::Path;

use vmkeep_libvirt::saveimage;
use vmkeep_steps::image::qcow2::{Format, Header};
use vmkeep_steps::manifest::file;

use super::{ACCEPTED, kept, refused};

/// A save image as libvirt writes it.
fn saved(xml: &str, cookie: Option<&str>, format: u32, stream: &[u8]) -> Vec<u8> {
    let mut area = [xml.as_bytes(), &[0]].concat();
    let cookie_at = if cookie.is_some() { area.len() } else { 0 };
    if let Some(cookie) = cookie {
        area.extend_from_slice(cookie.as_bytes());
        area.push(0);
    }
    area.resize(area.len().next_multiple_of(512), 0);
    let numbers = [2, u32::try_from(area.len()).unwrap(), 1, format, u32::try_from(cookie_at).unwrap()];
    let mut image = b"LibvirtQemudSave".to_vec();
    numbers.iter().for_each(|number| image.extend_from_slice(&number.to_ne_bytes()));
    image.resize(92, 0);
    [image, area, stream.to_vec()].concat()
}

pub(crate) fn save_image_seeds() -> Vec<Vec<u8>> {
    let mut seeds = kept("save-image");
    seeds.push(saved("<domain/>", None, 0, b"QEVM stream"));
    seeds.push(saved("<domain><name>web1</name></domain>", Some("<cookie/>"), 0, &[7; 300]));
    seeds.push(saved("<domain/>", Some("<cookie/>"), 6, b"mapped"));
    seeds
}

/// What is read can be copied with another definition, shorter or longer, and nothing else is different in the copy.
pub(crate) fn save_image(input: &[u8]) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    std::fs::write(&from, input).unwrap();
    let image = match saveimage::read(&from) {
        Ok(image) => image,
        Err(e) => return refused(&e.to_string().replace(&*from.to_string_lossy(), "")),
    };
    assert_eq!(image.stream_offset() + image.stream_len, input.len() as u64);
    let stream = |path: &Path, offset: u64| {
        let bytes = std::fs::read(path).unwrap();
        bytes[usize::try_from(offset).unwrap()..].to_vec()
    };
    for xml in ["<d/>", &"<a/>".repeat(3000)] {
        match saveimage::copy_with_xml(&from, &to, xml) {
            Ok(said) => {
                let copy = saveimage::read(&to).expect("a copy is read");
                assert_eq!(copy, said);
                assert_eq!(copy.xml, xml);
                assert_eq!(
                    (&copy.cookie, copy.was_running, copy.format, copy.stream_len),
                    (&image.cookie, image.was_running, image.format, image.stream_len)
                );
                let copied = stream(&to, copy.stream_offset());
                assert!(copied == stream(&from, image.stream_offset()), "the stream is the same");
                std::fs::remove_file(&to).unwrap();
            }
            Err(_) => assert!(!to.exists(), "a copy that failed is not there"),
        }
        if let Ok(head) = saveimage::head_with_xml(&from, xml) {
            assert_eq!(head.len() as u64, image.stream_offset());
        }
    }
    assert!(std::fs::read(&from).unwrap() == input, "the source is never written");
    ACCEPTED
}

/// What is read can be rewritten to name another backing file, or none; then it names that, and means the same otherwise.
pub(crate) fn qcow2(input: &[u8]) -> u64 {
    let header = match Header::parse(input) {
        Ok(header) => header,
        Err(e) => return refused(&e),
    };
    let long = format!("/{}", "x".repeat(900));
    for backing in [None, Some(("base.raw", Format::Raw)), Some((long.as_str(), Format::Qcow2))] {
        for bitmaps in [true, false] {
            let rewritten = match bitmaps {
                true => header.with_backing(backing),
                false => header.without_bitmaps(backing),
            };
            let Ok(new) = rewritten else { continue };
            assert!(new.len() as u64 <= header.cluster);
            let mut image = input.to_vec();
            image.resize(image.len().max(new.len()), 0);
            image[..new.len()].copy_from_slice(&new);
            let again = Header::parse(&image).expect("what was rewritten is read");
            assert!(again.names(backing), "{again:?}");
            assert_eq!(
                (again.version, again.cluster, again.virtual_size, again.snapshots, again.encryption),
                (header.version, header.cluster, header.virtual_size, header.snapshots, header.encryption)
            );
            assert_eq!((again.dirty, again.corrupt, again.data_file), (header.dirty, header.corrupt, false));
            assert_eq!(again.bitmaps, if bitmaps { header.bitmaps } else { 0 });
        }
    }
    ACCEPTED
}

/// What is accepted is written so that it is accepted again, and says the same, unknown fields included.
pub(crate) fn manifest(input: &[u8]) -> u64 {
    let manifest = match file::parse(input) {
        Ok(manifest) => manifest,
        Err(e) => return refused(&e),
    };
    let written = file::to_bytes(&manifest).expect("what was accepted can be written");
    let again = file::parse(&written).expect("and is accepted again");
    assert_eq!(again, manifest);
    assert_eq!(file::to_bytes(&again).unwrap(), written);
    ACCEPTED
}
