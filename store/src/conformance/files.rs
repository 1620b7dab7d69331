//! Engines that keep files: reopening, the lock, formats, reading beside a writer.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::json;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{AppendError, JobFilter, Reserve, StoreError};

use super::sample::{Job, append, assert_holds, assert_whole};
use super::{Stage, small};
use crate::Options;

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The contents of all files of a store but its lock, and when they were last changed.
fn contents(folder: &Path) -> BTreeMap<PathBuf, (Vec<u8>, i64, i64)> {
    let mut found = BTreeMap::new();
    for path in files(folder) {
        if !path.ends_with("lock") {
            let meta = path.metadata().unwrap();
            let content = (std::fs::read(&path).unwrap(), meta.mtime(), meta.mtime_nsec());
            found.insert(path, content);
        }
    }
    found
}

pub async fn all_is_there_after_reopening(stage: &Stage) {
    let mut job = Job::new();
    let (id, created) = {
        let store = stage.open();
        store.append(job.request(0, "snapshot", "web1", Some("nightly"))).await.unwrap();
        store.append(append("catalogue", 0, 7)).await.unwrap();
        store.put_row(job.id, "copy", &json!(1)).await.unwrap();
        (store.id(), store.created())
    };
    for round in 1..4 {
        let store = stage.open();
        assert_eq!((store.id(), store.created()), (id, created));
        assert_holds(&*store, "catalogue", 7).await;
        assert_eq!(store.job(job.id).await.unwrap(), job.summary);
        assert_eq!(store.jobs(&JobFilter::default()).await.unwrap().len(), 1);
        assert_eq!(store.key("nightly").await.unwrap(), Some(job.stream()));
        assert_eq!(store.rows(job.id).await.unwrap(), [("copy".to_owned(), json!(1))]);
        assert_whole(&*store).await;
        store.append(job.next(round, vec![vmkeep_workflow::Body::JobRecovered])).await.unwrap();
    }
}

pub async fn a_second_opener_is_refused_and_told_who_was_first(stage: &Stage) {
    let store = stage.open();
    let Err(StoreError::InUse { path, holder }) = stage.try_open() else { panic!("it was let in") };
    assert_eq!(path, stage.folder().display().to_string());
    assert!(holder.contains(&format!("process {}", std::process::id())), "{holder}");
    store.append(append("a", 0, 1)).await.unwrap();
    assert!(matches!(stage.try_open(), Err(StoreError::InUse { .. })));
}

pub async fn a_store_can_be_opened_again_once_it_is_closed(stage: &Stage) {
    for n in 0..20 {
        let store = stage.open();
        store.append(append("a", n, 1)).await.unwrap();
    }
    assert_holds(&*stage.open(), "a", 20).await;
}

pub async fn a_newer_format_is_refused_and_nothing_is_touched(stage: &Stage) {
    stage.open().append(append("a", 0, 5)).await.unwrap();
    stage.engine().set_format(&stage.folder(), 2);
    let before = contents(&stage.folder());
    let refused = StoreError::TooNew { path: stage.folder().display().to_string(), found: 2, known: 1 };
    for _ in 0..2 {
        assert_eq!(stage.try_open().err(), Some(refused.clone()));
    }
    assert!(contents(&stage.folder()) == before, "a store of a newer release must not be touched");
    assert_eq!(stage.engine().open_read_only(&stage.folder()).err(), Some(refused));
    stage.engine().set_format(&stage.folder(), 1);
    assert_holds(&*stage.open(), "a", 5).await;
}

pub async fn reading_only_sees_what_is_appended_and_changes_nothing(stage: &Stage) {
    let missing = stage.engine().open_read_only(&stage.folder());
    assert!(
        matches!(missing.err(), Some(StoreError::Io(_))),
        "there is nothing to read, and nothing is made"
    );
    assert!(!stage.folder().exists());

    let mut job = Job::new();
    let store = stage.open();
    store.append(job.request(0, "snapshot", "web1", Some("nightly"))).await.unwrap();
    let reading = stage.engine().open_read_only(&stage.folder()).unwrap();
    store.append(append("a", 0, 3)).await.unwrap();
    assert_holds(&*reading, "a", 3).await;
    assert_eq!((reading.id(), reading.created()), (store.id(), store.created()));
    assert_eq!(reading.job(job.id).await.unwrap(), job.summary);
    assert_whole(&*reading).await;

    assert!(matches!(reading.append(append("a", 3, 1)).await, Err(AppendError::Rejected(_))));
    assert!(reading.put_row(job.id, "copy", &json!(1)).await.is_err());
    assert!(reading.clear_rows(job.id).await.is_err());
    drop(reading);
    store.append(append("a", 3, 1)).await.unwrap();
    drop(store);

    let before = contents(&stage.folder());
    let reading = stage.engine().open_read_only(&stage.folder()).unwrap();
    assert_holds(&*reading, "a", 4).await;
    assert_eq!(reading.last(&StreamId::from("a")).await, Ok(Seq(4)));
    for (name, content) in before {
        let now = contents(&stage.folder()).remove(&name);
        assert!(now == Some(content), "{} was changed by reading", name.display());
    }
    // A reader does not keep a daemon from starting.
    let store = stage.open();
    store.append(append("a", 4, 1)).await.unwrap();
    assert_eq!(store.reserve().await, Ok(Reserve::Intact));
}

pub async fn only_the_owner_may_look(stage: &Stage) {
    let folder = stage.folder().join("made/on the way");
    let store = stage.engine().open(&folder, small()).unwrap();
    store.append(append("a", 0, 1)).await.unwrap();
    for path in [stage.folder(), stage.folder().join("made"), folder.clone()] {
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o700,
            "{}",
            path.display()
        );
    }
    for path in files(&folder) {
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}", path.display());
    }
}

pub async fn rubbish_is_refused(stage: &Stage) {
    stage.open().append(append("a", 0, 5)).await.unwrap();
    let sizes: Vec<(PathBuf, u64)> = files(&stage.folder())
        .into_iter()
        .map(|path| (path.clone(), path.metadata().unwrap().len()))
        .filter(|(path, size)| *size > 0 && !["lock", "reserve", "spare"].iter().any(|n| path.ends_with(n)))
        .collect();
    for (path, size) in sizes {
        for rubbish in [Vec::new(), vec![b'x'; usize::try_from(size).unwrap()]] {
            std::fs::write(&path, rubbish).unwrap();
        }
    }
    let outcome = stage.try_open();
    assert!(matches!(outcome.as_ref().err(), Some(StoreError::Damaged(_))), "{:?}", outcome.err());
}

pub async fn two_stores_have_different_ids(stage: &Stage) {
    let other = stage.engine().open(&stage.elsewhere(), small()).unwrap();
    assert_ne!(stage.open().id(), other.id());
    let id = uuid::Uuid::new_v4();
    let named = stage.engine().open(&stage.elsewhere().join("named"), Options { id: Some(id), ..small() });
    assert_eq!(named.unwrap().id(), id);
}
