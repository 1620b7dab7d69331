//! What is done to a restored file before it gets its name.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::codes::assert_told;
use crate::image::root::Roots;

fn place(folder: &Path, own: bool) -> Place {
    let name = Component::literal("vda.raw".to_owned());
    Place {
        places: Places { roots: Arc::new(Roots::open([folder]).unwrap()) },
        folder: folder.to_owned(),
        own,
        name: Some(name.clone()),
        source: name,
        rights: Wish::default(),
    }
}

#[test]
fn a_file_under_way_tells_its_job_and_no_other_does() {
    let job = JobId::new();
    let path = Path::new("/i").join(aside(job, "vda.raw").as_str());
    assert_eq!(aside_job(&path), Some(job.short().as_str()));
    for other in [
        "/i/.vmkeep-doctor-4711",
        "/i/.vmkeep-0123456789ab",
        "/i/.vmkeep-0123456789ab-0123456789abcde",
        "/i/.vmkeep-0123456789AB-0123456789abcdef",
        "/i/.vmkeep-0123456789ab-0123456789abcdef.raw",
        "/i/vmkeep-0123456789ab-0123456789abcdef",
    ] {
        assert_eq!(aside_job(Path::new(other)), None, "{other}");
    }
}

#[test]
fn rights_are_given_to_the_file_that_was_written_and_to_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let mode = Wish { mode: Some(crate::image::rights::FileMode(0o666)), ..Wish::default() };
    let place = Place { rights: mode, ..place(dir.path(), false) };
    let folder = place.open().unwrap();
    let (aside, secret) = (Component::literal("aside".to_owned()), dir.path().join("secret"));
    let path = dir.path().join("aside");
    std::fs::write(&path, b"new").unwrap();
    let written = Identity::at(&path).unwrap();
    place.give_rights(&folder, &aside, &written).unwrap();
    std::fs::write(&secret, b"old").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::hard_link(&secret, &path).unwrap();
    for expected in [&written, &Identity::at(&secret).unwrap()] {
        let fault = place.give_rights(&folder, &aside, expected).unwrap_err();
        assert_eq!(fault.code, Code::EFFECT_DIVERGED);
        assert_eq!(std::fs::metadata(&secret).unwrap().mode() & 0o777, 0o600);
    }
}

/// The file under way is taken away by somebody right before it gets its name.
fn vanished(own: bool) -> (Fault, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let place = place(dir.path(), own);
    let folder = place.open().unwrap();
    let old = dir.path().join("old.raw");
    std::fs::write(&old, b"old").unwrap();
    let aside = place.aside(JobId::new());
    std::fs::write(folder.path_of(&aside), b"new").unwrap();
    let written = Identity::at(&folder.path_of(&aside)).unwrap();
    std::fs::remove_file(folder.path_of(&aside)).unwrap();
    let fault = place.put(&folder, &aside, &written).unwrap_err();
    assert_eq!(std::fs::read(&old).unwrap(), b"old", "the old image is as it was");
    assert_eq!(fault.class, Class::Transient, "the next attempt copies it anew");
    (fault, dir.path().join("vda.raw"))
}

#[test]
fn an_image_that_cannot_be_given_its_name_leaves_the_old_one_alone() {
    let (fault, path) = vanished(false);
    assert_told(&fault, codes::CANNOT_RENAME_DISK_IMAGE, path.to_str().unwrap());
    let (fault, path) = vanished(true);
    assert_told(&fault, codes::CANNOT_MOVE_DISK_IMAGE_TO_ORIGINAL_LOCATION, path.to_str().unwrap());
}

/// As a network file system does that asks its server a second time: the name is there, and the answer is that it exists.
#[test]
fn a_name_that_is_ours_already_is_not_taken_by_somebody_else() {
    let dir = tempfile::tempdir().unwrap();
    let place = place(dir.path(), false);
    let (folder, path) = (place.open().unwrap(), dir.path().join("vda.raw"));
    let aside = place.aside(JobId::new());
    let under_way = folder.path_of(&aside);
    std::fs::write(&under_way, b"new").unwrap();
    let written = Identity::at(&under_way).unwrap();
    std::fs::hard_link(&under_way, &path).unwrap();
    place.put(&folder, &aside, &written).unwrap();
    // Somebody else's stays taken.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"mine").unwrap();
    assert_told(&place.put(&folder, &aside, &written).unwrap_err(), codes::BACKUP_EXISTS, "vda.raw");
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

/// Between the name and the output of its step an attempt may end for good: only the note knows the file then.
#[test]
fn a_file_that_got_its_name_without_an_output_is_removed_by_its_note_and_no_other_is() {
    let dir = tempfile::tempdir().unwrap();
    let place = place(dir.path(), false);
    let (folder, path) = (place.open().unwrap(), dir.path().join("vda.raw"));
    let aside = place.aside(JobId::new());
    let named = || {
        std::fs::write(folder.path_of(&aside), b"new").unwrap();
        let written = Identity::at(&folder.path_of(&aside)).unwrap();
        place.put(&folder, &aside, &written).unwrap();
        written
    };
    let remove = |known: Option<Known>| place.remove(std::slice::from_ref(&aside), known.as_ref()).unwrap();

    let written = named();
    remove(None);
    assert!(path.exists(), "nobody knows whose it is");
    remove(Some(Known::Noted(written)));
    assert!(!path.exists());

    // Another file of that name, and one that somebody has written to since: the inode alone is no proof.
    let written = named();
    std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
    std::fs::write(&path, b"mine").unwrap();
    remove(Some(Known::Noted(written)));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    std::fs::remove_file(&path).unwrap();
    let written = named();
    std::fs::write(&path, b"written to").unwrap();
    remove(Some(Known::Noted(written)));
    assert!(path.exists());
    // A guest may have written to what an output names.
    remove(Some(Known::Output(written)));
    assert!(!path.exists());
}
