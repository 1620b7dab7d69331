//! Deletions of real folders: every refusal, every failure, and the end of the process at every event.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use serde_json::{Value, json};
use uuid::Uuid;
use vmkeep_store::MemoryStore;
use vmkeep_workflow::engine::{Engine, JobView};
use vmkeep_workflow::journal::Append;
use vmkeep_workflow::{
    Actor, Body, Class, Code, Event, EventStore, Fault, IfBusy, JobId, JobRequest, JobStatus, JobSummary,
    Registry, Seq, Step as _, StreamId, Subject, Verdict,
};

use super::remove::Removed;
use super::*;
use crate::codes;
use crate::image::qemu_img::QemuImg;
use crate::image::root::Roots;
use crate::manifest::folder::{MANIFEST, PROTECTION, WITHDRAWN};
use crate::manifest::{self, BackupId, Depth, Manifest, Protection, protection, samples};
use crate::mortal::{Life, engine, finish, live};
use crate::snapshot::Places;

/// Users that a test makes up: nobody at first, and somebody from the n-th question on.
#[derive(Clone, Default)]
struct Made {
    asked: Arc<AtomicUsize>,
    from: Option<usize>,
}

#[async_trait]
impl Users for Made {
    async fn of(&self, _: &Path, _: BackupId) -> Result<Option<String>, Fault> {
        let asked = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        Ok(self.from.filter(|from| asked >= *from).map(|_| "restore, job 1".to_owned()))
    }
}

/// A host with a root and backups of one domain, the oldest first.
struct Host {
    dir: tempfile::TempDir,
    domain: Uuid,
    users: Made,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        for root in ["a", "b"] {
            std::fs::create_dir(dir.path().join(root)).unwrap();
        }
        Self { dir, domain: Uuid::from_u128(77), users: Made::default() }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("a")
    }

    /// A backup that holds this hour of the day, below a root.
    fn make(&self, root: &str, hour: u8) -> (PathBuf, Manifest) {
        let path = self.dir.path().join(format!("{root}/web/{hour}"));
        std::fs::create_dir_all(&path).unwrap();
        let folder = samples::folder(&path);
        let mut manifest = samples::unpublished(&folder);
        manifest.domain.uuid = self.domain;
        manifest.point_in_time = format!("2026-01-01T{hour:02}:00:00Z").parse().unwrap();
        manifest::publish(&folder, &manifest).unwrap();
        (path, manifest)
    }

    fn with(hours: u8) -> (Self, Vec<(PathBuf, Manifest)>) {
        let host = Self::new();
        let made = (1..=hours).map(|hour| host.make("a", hour)).collect();
        (host, made)
    }

    fn engine(&self, store: Arc<dyn EventStore>) -> Engine {
        let roots = Arc::new(Roots::open([self.root(), self.dir.path().join("b")]).unwrap());
        let registry =
            Deletion::new(Places { roots }, Arc::new(self.users.clone())).register(Registry::new());
        engine(store, registry)
    }

    fn request(&self, workflow: &'static str, options: Value, why: Option<&str>) -> JobRequest {
        JobRequest {
            workflow: workflow.into(),
            subject: Subject { id: self.domain.to_string(), label: "web".into() },
            options,
            key: Some("the same request".into()),
            by: Actor { who: "ann".into(), why: why.map(str::to_owned) },
            if_busy: IfBusy::Refuse,
            limits: vec![],
            retry_of: None,
        }
    }

    fn delete(&self, which: &[&(PathBuf, Manifest)], more: &Value) -> JobRequest {
        let backups: Vec<_> = which
            .iter()
            .map(|(folder, manifest)| json!({ "backup": manifest.backup, "folder": folder }))
            .collect();
        let mut options = json!({ "backups": backups });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.request(workflow::DELETE, options, None)
    }

    fn prune(&self, keep: u32, successor: Option<BackupId>) -> JobRequest {
        let mut options = json!({ "keep": keep });
        if let Some(successor) = successor {
            options["successor"] = json!(successor);
        }
        self.request(workflow::PRUNE, options, None)
    }

    async fn run(&self, request: JobRequest) -> JobView {
        let engine = self.engine(Arc::new(MemoryStore::new()));
        engine.recover().await.unwrap();
        let job = engine.request(request).await.unwrap();
        engine.wait(job).await.unwrap();
        engine.view(job).await.unwrap()
    }

    async fn fails(&self, request: JobRequest, status: JobStatus, code: Code) -> String {
        let before = self.everything();
        let view = self.run(request).await;
        let fault = view.summary.fault.clone();
        assert_eq!(view.summary.status, status, "{fault:?}");
        let fault = fault.unwrap();
        assert_eq!(fault.code, code, "{fault}");
        assert!(!fault.remedy.is_empty(), "{fault}");
        assert_eq!(self.everything(), before, "it changed something");
        fault.to_string()
    }

    /// Every path below the roots with its content.
    fn everything(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let (mut found, mut folders) = (Vec::new(), vec![self.dir.path().to_owned()]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                    found.push((entry.path(), Vec::new()));
                } else {
                    found.push((entry.path(), std::fs::read(entry.path()).unwrap_or_default()));
                }
            }
        }
        found.sort();
        found
    }

    fn left(&self) -> Vec<String> {
        let hours = |root: &str| {
            let found = std::fs::read_dir(self.dir.path().join(root).join("web")).into_iter().flatten();
            found.map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        let mut left = hours("a");
        left.extend(hours("b"));
        left.sort();
        left
    }

    /// No folder looks like a backup and is not whole.
    fn assert_no_half(&self, case: &str) {
        for (path, _) in self.everything().iter().filter(|(path, _)| path.ends_with(MANIFEST)) {
            let folder = samples::folder(path.parent().unwrap());
            let stored = manifest::read(&folder).unwrap();
            let found =
                manifest::verify(&folder, &stored, Depth::Quick, &QemuImg::default(), None, &()).unwrap();
            assert!(found.iter().all(|f| !f.problem.serious()), "{case}: {} looks whole", path.display());
        }
    }
}

fn removed(view: &JobView) -> Removed {
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    let step = view.steps.iter().find(|step| step.name.as_str() == "remove").unwrap();
    serde_json::from_value(step.output.clone().unwrap()).unwrap()
}

#[tokio::test]
async fn a_backup_is_deleted_with_its_folder_and_no_other_is_touched() {
    let (host, made) = Host::with(3);
    let view = host.run(host.delete(&[&made[1]], &json!({}))).await;
    let gone = removed(&view).backups;
    assert_eq!(gone.len(), 1);
    assert_eq!((gone[0].backup, gone[0].files), (made[1].1.backup, made[1].1.files.len() as u64));
    assert!(gone[0].left.is_empty());
    assert_eq!(host.left(), ["1", "3"]);
    host.assert_no_half("after");
}

#[tokio::test]
async fn what_does_not_belong_to_a_backup_stays_and_is_named() {
    let (host, made) = Host::with(2);
    let folder = &made[0].0;
    for name in ["notes.txt", "vda.qcow2.bak"] {
        std::fs::write(folder.join(name), "mine").unwrap();
    }
    std::fs::create_dir(folder.join("sub")).unwrap();
    let gone = removed(&host.run(host.delete(&[&made[0]], &json!({}))).await).backups;
    assert_eq!(gone[0].left, ["notes.txt", "sub", "vda.qcow2.bak"]);
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, gone[0].left);
}

#[tokio::test]
async fn several_are_deleted_together_or_none() {
    let (host, made) = Host::with(4);
    protection::write(
        &samples::folder(&made[1].0),
        &Protection::new("ann".into(), jiff::Timestamp::now(), None, Some("for the auditors".into())),
    )
    .unwrap();
    let both = host.delete(&[&made[0], &made[1]], &json!({}));
    let said = host.fails(both, JobStatus::Refused, codes::INVALID_STATE).await;
    assert!(said.contains("ann") && said.contains("for the auditors"), "{said}");
    assert_eq!(removed(&host.run(host.delete(&[&made[0], &made[2]], &json!({}))).await).backups.len(), 2);
    assert_eq!(host.left(), ["2", "4"]);
}

#[tokio::test]
async fn a_protection_that_has_ended_protects_no_more_and_goes_with_the_backup() {
    let (host, made) = Host::with(2);
    let past = "2026-01-01T00:00:00Z".parse().unwrap();
    let note = Protection::new("ann".into(), past, Some(past), None);
    protection::write(&samples::folder(&made[0].0), &note).unwrap();
    removed(&host.run(host.delete(&[&made[0]], &json!({}))).await);
    assert_eq!(host.left(), ["2"]);
}

#[tokio::test]
async fn the_last_whole_backup_goes_only_with_leave_and_reason() {
    let (host, made) = Host::with(2);
    // One that lacks its second disk is no backup to fall back on.
    std::fs::remove_file(made[1].0.join("vdb.raw")).unwrap();
    host.fails(host.delete(&[&made[0]], &json!({})), JobStatus::Refused, codes::INVALID_STATE).await;
    let allowed = host.delete(&[&made[0]], &json!({ "last_copy": true }));
    let said = host.fails(allowed.clone(), JobStatus::Refused, codes::INVALID_STATE).await;
    assert!(said.contains("reason"), "{said}");
    let by = Actor { who: "ann".into(), why: Some("the machine is scrap".into()) };
    removed(&host.run(JobRequest { by, ..allowed }).await);
    assert_eq!(host.left(), ["2"]);
}

#[tokio::test]
async fn a_backup_that_a_job_needs_stays() {
    for (from, status) in [(1, JobStatus::Refused), (2, JobStatus::RolledBack), (3, JobStatus::RolledBack)] {
        let (mut host, made) = Host::with(2);
        // From the third question on: somebody came after the first look at the manifest, and before the second.
        host.users = Made { from: Some(from), ..Made::default() };
        host.fails(host.delete(&[&made[0]], &json!({})), status, codes::SUBJECT_BUSY).await;
        host.assert_no_half("after");
    }
}

#[tokio::test]
async fn places_that_are_not_a_backups_are_refused() {
    let (host, made) = Host::with(2);
    let manifest = &made[0].1;
    let at = |path: &Path| (path.to_owned(), manifest.clone());
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(&made[0].0, host.root().join("web/link")).unwrap();
    for (path, code) in [
        (outside.path(), codes::TARGET_OUTSIDE_ROOTS),
        (&host.root().join("web/link"), codes::UNSAFE_PATH),
        (&host.root().join("web/../web/1"), codes::UNSAFE_PATH),
        (&host.root(), codes::UNSAFE_PATH),
        (&host.root().join("web/9"), codes::NO_SUCH_BACKUP),
        (&host.root().join("web"), codes::NO_SUCH_BACKUP),
        (&made[1].0, codes::MANIFEST_MISMATCH),
    ] {
        host.fails(host.delete(&[&at(path)], &json!({})), JobStatus::Refused, code).await;
    }
    // A file of the backup that is a link leads elsewhere.
    let image = made[0].0.join("vdb.raw");
    std::fs::copy(&image, outside.path().join("precious")).unwrap();
    std::fs::remove_file(&image).unwrap();
    std::os::unix::fs::symlink(outside.path().join("precious"), &image).unwrap();
    host.fails(host.delete(&[&made[0]], &json!({})), JobStatus::Refused, codes::UNSAFE_PATH).await;
    for (text, code) in [
        ("{", codes::MANIFEST_MISMATCH),
        (r#"{"format":"vmkeep-backup","min_reader":99}"#, codes::MANIFEST_TOO_NEW),
    ] {
        std::fs::write(made[1].0.join(MANIFEST), text).unwrap();
        host.fails(host.delete(&[&made[1]], &json!({})), JobStatus::Refused, code).await;
    }
}

#[tokio::test]
async fn a_deletion_that_was_given_up_is_finished_by_another() {
    let (host, made) = Host::with(2);
    let folder = samples::folder(&made[0].0);
    manifest::file::withdraw(&folder).unwrap();
    std::fs::remove_file(made[0].0.join("vda.qcow2")).unwrap();
    removed(&host.run(host.delete(&[&made[0]], &json!({}))).await);
    assert_eq!(host.left(), ["2"]);
}

/// A backup as a deletion has it before it.
fn doomed(folder: &Path, manifest: &Manifest) -> options::Doomed {
    options::Doomed {
        backup: manifest.backup,
        folder: folder.to_owned(),
        manifest: manifest::read(&samples::folder(folder)).unwrap().hash,
        files: manifest.files.len() as u64,
        bytes: 0,
    }
}

/// The file system of a target may not be mounted when a job goes on: then nothing there has been deleted, or put back.
#[tokio::test]
async fn a_backup_is_not_gone_because_the_place_that_it_lies_in_is_not_there() {
    let (host, made) = Host::with(2);
    let (folder, manifest) = &made[0];
    let doomed = doomed(folder, manifest);
    let places = Places { roots: Arc::new(Roots::open([host.root()]).unwrap()) };
    let withdraw = withdraw::WithdrawBackup { places: places.clone(), users: Arc::new(Made::default()) };
    let remove = remove::RemoveBackups(places);
    let input = remove::RemoveInput { backups: vec![doomed.clone()], notes: Vec::new() };
    let (mounted, away) = (host.root().join("web"), host.dir.path().join("away"));
    let cx = crate::snapshot::tests::context(1);
    withdraw.run(&cx, doomed.clone()).await.unwrap();

    std::fs::rename(&mounted, &away).unwrap();
    assert!(matches!(withdraw.probe(&cx, doomed.clone()).await, Verdict::Unknown(_)));
    assert_eq!(withdraw.undo(&cx, doomed.clone(), None).await.unwrap_err().class, Class::Transient);
    let fault = remove.run(&cx, input.clone()).await.unwrap_err();
    assert_eq!((fault.code, fault.class), (codes::CANNOT_REMOVE_FILE, Class::Transient));
    assert!(fault.cause.contains("mounted"), "{fault}");

    std::fs::rename(&away, &mounted).unwrap();
    assert_eq!(remove.run(&cx, input).await.unwrap().backups.len(), 1);
    assert_eq!(host.left(), ["2"]);
}

#[tokio::test]
async fn the_last_backups_are_kept_and_older_ones_go() {
    let (host, _) = Host::with(4);
    host.make("b", 9);
    let view = host.run(host.prune(2, None)).await;
    assert_eq!(removed(&view).backups.len(), 2);
    assert_eq!(host.left(), ["3", "4", "9"], "a copy below another root is another series");
    let read = view.steps.iter().filter(|step| step.name.as_str().starts_with("read/")).count();
    assert_eq!(read, 1, "the newest was read again");
    // Nothing has to go: nothing is read, nothing is touched.
    let before = host.everything();
    let view = host.run(host.prune(2, None)).await;
    assert!(removed(&view).backups.is_empty());
    assert_eq!((view.steps.len(), host.everything()), (1, before));
}

#[tokio::test]
async fn nothing_goes_when_the_newest_is_not_what_its_manifest_says() {
    let (host, made) = Host::with(3);
    // One byte in the last file: sizes and headers are as they should be.
    let image = made[2].0.join("vdb.raw");
    let mut bytes = std::fs::read(&image).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&image, bytes).unwrap();
    let request = host.prune(1, Some(made[2].1.backup));
    host.fails(request, JobStatus::RolledBack, codes::CORRUPT_DISK_IMAGE_FOUND).await;
}

#[tokio::test]
async fn nothing_goes_when_any_file_of_the_successor_is_missing() {
    for file in ["vda.qcow2", "vda.base1.raw", "vdb.raw", "memory.save", "domain.xml"] {
        let (host, made) = Host::with(2);
        std::fs::remove_file(made[1].0.join(file)).unwrap();
        let request = host.prune(1, Some(made[1].1.backup));
        let said = host.fails(request, JobStatus::Refused, codes::MISSING_NECESSARY_FILES).await;
        assert!(said.contains(file), "{said}");
    }
    let (host, _) = Host::with(2);
    let nobody = host.prune(1, Some(BackupId(Uuid::now_v7())));
    host.fails(nobody, JobStatus::Refused, codes::MISSING_NECESSARY_FILES).await;
    host.fails(host.prune(0, None), JobStatus::Refused, codes::USAGE).await;
}

#[tokio::test]
async fn damaged_and_protected_backups_are_not_counted_and_stay() {
    let (host, made) = Host::with(5);
    std::fs::remove_file(made[3].0.join("memory.save")).unwrap();
    let note = Protection::new("ann".into(), jiff::Timestamp::now(), None, None);
    protection::write(&samples::folder(&made[1].0), &note).unwrap();
    std::fs::write(made[2].0.join(MANIFEST), "{").unwrap();
    let view = host.run(host.prune(1, None)).await;
    let removed = removed(&view);
    assert_eq!(removed.backups.len(), 1);
    assert_eq!(host.left(), ["2", "3", "4", "5"]);
    let notes = removed.notes.join("\n");
    assert!(notes.contains("memory.save") && notes.contains("ann") && notes.contains("web/3"), "{notes}");
    assert!(made[1].0.join(PROTECTION).exists());
}

fn at_every_event(prepare: impl Fn() -> (Host, JobRequest), check: impl Fn(&str, &Host, &JobView)) {
    for after in [false, true] {
        for event in 1.. {
            assert!(event < 100, "the job never ends");
            let (host, request) = prepare();
            let inner = Arc::new(MemoryStore::new());
            let engine = |store| host.engine(store);
            let life = live(&engine, &inner, &request, event, after);
            let case = format!("{} event {event}", if after { "after" } else { "before" });
            host.assert_no_half(&case);
            let view = finish(&engine, &inner, &request);
            host.assert_no_half(&case);
            check(&case, &host, &view);
            if matches!(life, Life::Ended) {
                break;
            }
        }
    }
}

#[test]
fn a_deletion_that_dies_at_any_event_never_leaves_half_a_backup_that_looks_whole() {
    at_every_event(
        || {
            let (host, made) = Host::with(3);
            let request = host.delete(&[&made[0], &made[1]], &json!({}));
            (host, request)
        },
        |case, host, view| {
            assert_eq!(view.summary.status, JobStatus::Succeeded, "{case}: {:?}", view.summary.fault);
            assert_eq!(removed(view).backups.len(), 2, "{case}");
            assert_eq!(host.left(), ["3"], "{case}");
        },
    );
}

#[test]
fn a_retention_that_dies_at_any_event_keeps_what_it_must() {
    at_every_event(
        || {
            let (host, made) = Host::with(3);
            let request = host.prune(1, Some(made[2].1.backup));
            (host, request)
        },
        |case, host, view| {
            assert_eq!(view.summary.status, JobStatus::Succeeded, "{case}: {:?}", view.summary.fault);
            assert_eq!(host.left(), ["3"], "{case}");
        },
    );
}

#[test]
fn a_deletion_that_is_forbidden_at_the_last_moment_and_dies_puts_every_manifest_back() {
    at_every_event(
        || {
            let (mut host, made) = Host::with(3);
            // Whoever asks for the sixth time: the second backup, after its manifest was withdrawn.
            host.users = Made { from: Some(6), ..Made::default() };
            let request = host.delete(&[&made[0], &made[1]], &json!({}));
            (host, request)
        },
        |case, host, view| {
            assert_eq!(view.summary.status, JobStatus::RolledBack, "{case}: {:?}", view.summary.fault);
            assert_eq!(host.left(), ["1", "2", "3"], "{case}");
            assert!(host.everything().iter().all(|(path, _)| !path.ends_with(WITHDRAWN)), "{case}");
        },
    );
}

#[tokio::test]
async fn an_unfinished_job_that_names_a_backup_is_found_in_the_journals() {
    let (host, made) = Host::with(1);
    let store = Arc::new(MemoryStore::new());
    let users = OpenJobs(store.clone());
    let (folder, manifest) = &made[0];
    assert_eq!(users.of(folder, manifest.backup).await.unwrap(), None);
    for (workflow, options, needs) in [
        ("delete", json!({ "backups": [{ "folder": folder }] }), false),
        ("restore", json!({ "backup": folder.with_file_name("2") }), false),
        ("restore", json!({ "backup": folder }), true),
    ] {
        let job = JobId::new();
        let request = JobRequest { key: None, ..host.request(workflow, options, None) };
        let event = Event::new(jiff::Timestamp::now(), Default::default(), Body::JobRequested(request));
        let append = Append {
            stream: StreamId::job(job),
            expected: Seq(0),
            records: vec![serde_json::to_vec(&event).unwrap()],
            summary: JobSummary::first(job, &event),
            key: None,
        };
        store.append(append).await.unwrap();
        let found = users.of(folder, manifest.backup).await.unwrap();
        assert_eq!(found, needs.then(|| format!("restore, job {job}")), "{workflow}");
    }
}

/// Put back, the manifest would call a folder without its files a backup.
#[tokio::test]
async fn a_removal_that_has_removed_anything_never_counts_as_not_begun() {
    use super::remove::{RemoveBackups, RemoveInput};
    use crate::manifest::folder::DEFINITION;
    use crate::snapshot::tests::context;
    use vmkeep_workflow::{Step, Verdict};
    let (host, made) = Host::with(2);
    let places = Places { roots: Arc::new(Roots::open([host.root()]).unwrap()) };
    let mut backups = Vec::new();
    for (path, manifest) in &made {
        backups.push(doomed(path, manifest));
        manifest::file::withdraw(&places.roots.open_folder(path).unwrap()).unwrap();
    }
    let (step, input) = (RemoveBackups(places), RemoveInput { backups, notes: Vec::new() });
    let cx = context(1);
    let probe = || step.probe(&cx, input.clone());
    assert!(matches!(probe().await, Verdict::NotDone));
    std::fs::remove_file(made[1].0.join(DEFINITION)).unwrap();
    assert!(matches!(probe().await, Verdict::Partial(token) if !token.is_null()));
    std::fs::remove_dir_all(&made[1].0).unwrap();
    assert!(matches!(probe().await, Verdict::Partial(_)));
}
