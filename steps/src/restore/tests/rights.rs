//! Whose restored files become.

use std::os::unix::fs::MetadataExt as _;

use super::*;
use crate::image::rights::{FileMode, Rights};

/// A backup of files that belonged to whoever runs this, with a mode that nothing gives by itself.
fn recorded(manifest: &mut Manifest) {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    for file in manifest.files.iter_mut().filter(|file| file.format.is_some()) {
        file.rights = Some(Rights { uid, user: None, gid, group: None, mode: FileMode(0o640) });
    }
}

fn modes(host: &Host) -> Vec<u32> {
    let place = host.at("images/new/place");
    let names = ["vda.base1.raw", "vda.qcow2", "vdb.raw"].map(|name| format!("copy%20of%20web-{name}"));
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().mode() & 0o7777;
    names.iter().map(|name| mode(place.join(name))).chain([mode(place.clone())]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn restored_files_are_as_the_originals_were_or_as_configured() {
    let mut host = Host::with(DEFINITION, recorded);
    let (view, id) = host.restore(json!({ "cold": true })).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    host.assert_restored(id);
    assert_eq!(modes(&host), [0o640, 0o640, 0o640, 0o711]);

    host = Host::with(DEFINITION, recorded);
    let mode = |mode| Some(FileMode(mode));
    host.rights = RightsSettings { mode: mode(0o660), directory_mode: mode(0o2750), ..host.rights };
    host.restore(json!({ "cold": true })).await;
    assert_eq!(modes(&host), [0o660, 0o660, 0o660, 0o2750]);

    // A backup of before this was recorded.
    host = Host::new();
    host.restore(json!({ "cold": true })).await;
    assert_eq!(modes(&host), [0o600, 0o600, 0o600, 0o711]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_a_stranger_wrote_chooses_nobodys_files() {
    for (trusted, expected) in [(false, 0o600), (true, 0o640)] {
        let host = Host::with(DEFINITION, recorded);
        let (view, _) = host.restore(json!({ "cold": true, "outside": true, "trusted": trusted })).await;
        assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
        assert_eq!(modes(&host)[0], expected, "trusted: {trusted}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_known_here_is_told_of_in_the_report() {
    let host = Host::with(DEFINITION, |manifest| {
        recorded(manifest);
        for rights in manifest.files.iter_mut().filter_map(|file| file.rights.as_mut()) {
            rights.user = Some("somebody of another host".to_owned());
        }
    });
    let (view, _) = host.restore(json!({ "cold": true })).await;
    let report: Report = serde_json::from_value(output(&view, "settle")).unwrap();
    let told = report.notes.iter().filter(|note| note.contains("somebody of another host")).count();
    assert_eq!(told, 1, "{report:?}");
}
