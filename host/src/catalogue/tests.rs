use std::os::unix::fs::symlink;

use vmkeep_steps::image::root::Roots;
use vmkeep_steps::manifest::Depth;
use vmkeep_steps::manifest::folder::{MANIFEST, PROTECTION, WITHDRAWN};
use vmkeep_store::MemoryStore;
use vmkeep_workflow::engine::{self, Limits, NoEnvironment, SystemClock};
use vmkeep_workflow::{Engine, IfBusy, JobRequest, Registry, Subject};

use super::*;
use crate::verify::{self, Verify, VerifyBackup};

const DEFINITION: &str = "<domain type='qemu'><name>web</name><uuid>00000000-0000-0000-0000-000000000005</uuid>\
                          <memory>1024</memory><os><type>hvm</type></os></domain>";

struct Place {
    dir: tempfile::TempDir,
    store: Arc<MemoryStore>,
}

impl Place {
    fn new() -> Self {
        let this = Self { dir: tempfile::tempdir().unwrap(), store: Arc::new(MemoryStore::new()) };
        std::fs::create_dir(this.root()).unwrap();
        this
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// A catalogue as a vmkeepd that has just started has it.
    fn catalogue(&self) -> Catalogue {
        Catalogue::new(self.store.clone(), vec![self.root()], Arc::new(|why| panic!("{why}")))
    }

    fn make(&self, name: &str, second: i64) -> (PathBuf, BackupId) {
        let folder = self.root().join("web").join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let id = BackupId(uuid::Uuid::now_v7());
        std::fs::write(folder.join("domain.xml"), DEFINITION).unwrap();
        let manifest = serde_json::json!({
            "format": "vmkeep-backup", "version": 1, "min_reader": 1, "backup": id, "job": id, "tool": "test",
            "point_in_time": Timestamp::from_second(second).unwrap(),
            "finished": Timestamp::from_second(second).unwrap(),
            "domain": { "uuid": uuid::Uuid::from_u128(5), "name": "web" },
            "definition": { "inactive": "domain.xml" }, "consistency": "off", "disks": [],
            "memory": { "none": { "reason": "it was off" } },
            "files": [{
                "name": "domain.xml", "role": "definition", "size": DEFINITION.len(),
                "blake3": blake3::hash(DEFINITION.as_bytes()).to_hex().to_string(),
            }],
        });
        std::fs::write(folder.join(MANIFEST), manifest.to_string()).unwrap();
        (folder, id)
    }

    /// Reads a backup again, as a job.
    async fn verify(&self, folder: &Path, backup: BackupId) {
        let roots = Arc::new(Roots::open([self.root()]).unwrap());
        let engine = Engine::new(engine::Config {
            store: self.store.clone(),
            registry: Registry::new().workflow(Verify).step(VerifyBackup { roots }),
            clock: Arc::new(SystemClock),
            environment: Arc::new(NoEnvironment),
            limits: Limits::default(),
            on_fatal: Arc::new(|why| panic!("{why}")),
        });
        let options = verify::Options {
            backup: backup.to_string(),
            folder: folder.to_owned(),
            published: None,
            depth: Depth::Full,
            bandwidth: 0,
        };
        let request = JobRequest {
            workflow: verify::NAME.into(),
            subject: Subject { id: uuid::Uuid::from_u128(5).to_string(), label: "web".into() },
            options: serde_json::to_value(options).unwrap(),
            key: None,
            by: ann("to be sure"),
            if_busy: IfBusy::Refuse,
            limits: Vec::new(),
            retry_of: None,
        };
        engine.recover().await.unwrap();
        let job = engine.request(request).await.unwrap();
        engine.wait(job).await.unwrap();
    }

    async fn kinds(&self) -> Vec<String> {
        let kind = |record: Record| {
            let event: serde_json::Value = serde_json::from_slice(&record.bytes).unwrap();
            event["body"]["type"].as_str().unwrap().to_owned()
        };
        self.catalogue().history().await.unwrap().into_iter().map(kind).collect()
    }
}

fn ann(why: &str) -> Actor {
    Actor { who: "ann".into(), why: Some(why.into()) }
}

fn ids(view: &View) -> Vec<BackupId> {
    view.backups.iter().map(|one| one.place.backup).collect()
}

fn missing(view: &View) -> Vec<BackupId> {
    view.missing.iter().map(|one| one.place.backup).collect()
}

#[tokio::test]
async fn what_is_known_is_written_down_once_and_never_read_again() {
    let place = Place::new();
    let made: Vec<_> = (0..3).map(|n| place.make(&n.to_string(), n)).collect();
    let catalogue = place.catalogue();
    for _ in 0..3 {
        assert_eq!(ids(&catalogue.view().await.unwrap()), [made[2].1, made[1].1, made[0].1], "newest first");
    }
    assert_eq!(place.kinds().await, ["seen", "seen", "seen"]);
    // The next vmkeepd remembers, and opens none of them.
    let next = place.catalogue();
    let mut memory = Memory::default();
    assert_eq!(next.recall(&mut memory).await, Vec::<String>::new());
    let look = next.look(vec![place.root()], memory.shelf.stamps()).await.unwrap();
    assert_eq!((look.read.len(), look.known.len()), (0, 3));
    assert_eq!(ids(&next.view().await.unwrap()).len(), 3);
    assert_eq!(place.kinds().await.len(), 3);
}

#[tokio::test]
async fn a_backup_that_is_gone_is_missing_until_it_is_back_or_forgotten() {
    let place = Place::new();
    let (folder, id) = place.make("1", 1);
    place.catalogue().view().await.unwrap();
    let away = place.dir.path().join("away");
    std::fs::rename(&folder, &away).unwrap();
    let view = place.catalogue().view().await.unwrap();
    assert_eq!((ids(&view), missing(&view)), (vec![], vec![id]));
    assert!(view.missing[0].why.contains("folder is gone"), "{}", view.missing[0].why);
    // In another place it is the same backup.
    std::fs::rename(&away, place.root().join("elsewhere")).unwrap();
    let view = place.catalogue().view().await.unwrap();
    assert_eq!((ids(&view), missing(&view)), (vec![id], vec![]));
    assert!(place.catalogue().forget(id, false, ann("x")).await.is_err(), "it is there");
    std::fs::remove_dir_all(place.root().join("elsewhere")).unwrap();
    place.catalogue().forget(id, true, ann("lost")).await.unwrap();
    assert_eq!(missing(&place.catalogue().view().await.unwrap()), [id], "a dry run forgets nothing");
    place.catalogue().forget(id, false, ann("lost")).await.unwrap();
    let view = place.catalogue().view().await.unwrap();
    assert_eq!((ids(&view), missing(&view)), (vec![], vec![]));
    assert_eq!(place.kinds().await.last().unwrap(), "forgotten");
}

#[tokio::test]
async fn a_root_that_is_away_is_named_as_the_reason() {
    let place = Place::new();
    let (_, id) = place.make("1", 1);
    let second = place.dir.path().join("second");
    std::fs::create_dir(&second).unwrap();
    let catalogue = || {
        let roots = vec![place.root(), second.clone()];
        Catalogue::new(place.store.clone(), roots, Arc::new(|why| panic!("{why}")))
    };
    catalogue().view().await.unwrap();
    std::fs::rename(place.root(), place.dir.path().join("unmounted")).unwrap();
    let view = catalogue().view().await.unwrap();
    assert_eq!(missing(&view), [id]);
    assert!(view.missing[0].why.contains("mounted"), "{}", view.missing[0].why);
    assert_eq!(view.warnings.len(), 1, "{:?}", view.warnings);
    std::fs::rename(place.dir.path().join("unmounted"), place.root()).unwrap();
    assert_eq!(missing(&catalogue().view().await.unwrap()), []);
    let alone = place.catalogue();
    std::fs::remove_dir_all(place.root()).unwrap();
    let fault = alone.view().await.unwrap_err();
    assert_eq!(fault.code, codes::BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST);
}

#[tokio::test]
async fn another_backup_in_the_same_folder_is_another_backup() {
    let place = Place::new();
    let (folder, first) = place.make("1", 1);
    place.catalogue().view().await.unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    let (_, second) = place.make("1", 2);
    for _ in 0..2 {
        let view = place.catalogue().view().await.unwrap();
        assert_eq!((ids(&view), missing(&view)), (vec![second], vec![first]));
    }
}

#[tokio::test]
async fn two_copies_of_a_backup_are_two_rows_of_one() {
    let place = Place::new();
    let (folder, id) = place.make("1", 1);
    let copy = place.root().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for name in [MANIFEST, "domain.xml"] {
        std::fs::copy(folder.join(name), copy.join(name)).unwrap();
    }
    let view = place.catalogue().view().await.unwrap();
    assert_eq!(ids(&view), [id, id]);
    for one in &view.backups {
        let other = if one.place.folder == folder { &copy } else { &folder };
        assert_eq!(one.copies, std::slice::from_ref(other), "each names the other");
    }
    std::fs::remove_dir_all(folder).unwrap();
    let view = place.catalogue().view().await.unwrap();
    assert_eq!((ids(&view), missing(&view)), (vec![id], vec![]));
    assert!(view.backups[0].copies.is_empty());
}

#[tokio::test]
async fn the_catalogue_knows_what_the_last_reading_found() {
    let place = Place::new();
    let (folder, id) = place.make("1", 1);
    let (other, _) = place.make("2", 2);
    let catalogue = place.catalogue();
    let found = |view: View| {
        let one = view.backups.into_iter().find(|one| one.place.backup == id).unwrap();
        one.check.map(|check| check.problem)
    };
    assert_eq!(found(catalogue.view().await.unwrap()), None, "it was never read");
    place.verify(&folder, id).await;
    for _ in 0..2 {
        assert_eq!(found(catalogue.view().await.unwrap()), Some(None));
    }
    std::fs::write(folder.join("domain.xml"), DEFINITION.replace("web", "wob")).unwrap();
    place.verify(&folder, id).await;
    let problem = found(catalogue.view().await.unwrap()).unwrap().unwrap();
    assert!(problem.contains("domain.xml"), "{problem}");
    // The next vmkeepd knows it too, and writes nothing down a second time.
    assert_eq!(found(place.catalogue().view().await.unwrap()), Some(Some(problem)));
    assert_eq!(place.kinds().await, ["seen", "seen", "checked", "checked"]);
    std::fs::write(folder.join("domain.xml"), DEFINITION).unwrap();
    place.verify(&folder, id).await;
    assert_eq!(found(catalogue.view().await.unwrap()), Some(None));
    // Another manifest in its place has not been read.
    let manifest = std::fs::read_to_string(folder.join(MANIFEST)).unwrap();
    std::fs::remove_dir_all(&other).unwrap();
    std::fs::rename(&folder, &other).unwrap();
    assert_eq!(found(catalogue.view().await.unwrap()), None, "in another folder it may be another copy");
    std::fs::rename(&other, &folder).unwrap();
    assert_eq!(found(catalogue.view().await.unwrap()), Some(None));
    std::fs::remove_file(folder.join(MANIFEST)).unwrap();
    std::fs::write(folder.join(MANIFEST), manifest.replace("\"tool\":\"test\"", "\"tool\":\"other\""))
        .unwrap();
    assert_eq!(found(catalogue.view().await.unwrap()), None);
}

#[tokio::test]
async fn a_rebuild_needs_nothing_but_the_folders_and_says_what_is_wrong_with_them() {
    let place = Place::new();
    let (good, id) = place.make("1", 1);
    let (half, _) = place.make("2", 2);
    let (gone, _) = place.make("3", 3);
    place.catalogue().view().await.unwrap();
    std::fs::remove_file(half.join("domain.xml")).unwrap();
    std::fs::remove_dir_all(&gone).unwrap();
    let (strange, _) = place.make("4", 4);
    std::fs::write(strange.join(MANIFEST), r#"{"format":"vmkeep-backup","min_reader":9}"#).unwrap();
    let (withdrawn, _) = place.make("5", 5);
    std::fs::rename(withdrawn.join(MANIFEST), withdrawn.join(WITHDRAWN)).unwrap();
    let report = place.catalogue().rebuild(None, false, ann("to see")).await.unwrap();
    assert_eq!((report.found, &report.added), (2, &vec![]));
    assert_eq!(report.missing, [format!("{}: its folder is gone", gone.display())]);
    assert!(report.unreadable[0].starts_with(strange.to_str().unwrap()), "{report:?}");
    assert!(report.damaged[0].contains("domain.xml is missing"), "{report:?}");
    assert!(report.warnings.iter().any(|w| w.contains("vmkeep delete")), "{report:?}");
    assert_eq!(place.kinds().await.last().unwrap(), "rebuilt");
    // The journal is lost: only what is gone is forgotten with it.
    let empty = Place { dir: place.dir, store: Arc::new(MemoryStore::new()) };
    let (catalogue, both) = (empty.catalogue(), vec![good.clone(), half]);
    let report = catalogue.rebuild(None, true, ann("to see")).await.unwrap();
    assert_eq!((report.added, report.missing), (both.clone(), vec![]));
    assert_eq!(empty.kinds().await, Vec::<String>::new(), "a dry run writes nothing down");
    let report = catalogue.rebuild(None, false, ann("a new host")).await.unwrap();
    assert_eq!((report.added, report.missing), (both, vec![]));
    // From elsewhere: known from then on, and missed when it goes.
    let usb = empty.dir.path().join("usb");
    std::fs::create_dir(&usb).unwrap();
    std::fs::rename(&good, usb.join("b")).unwrap();
    let report = empty.catalogue().rebuild(Some(usb.clone()), false, ann("a disk")).await.unwrap();
    assert_eq!((report.added, report.missing), (vec![usb.join("b")], vec![]));
    assert!(ids(&empty.catalogue().view().await.unwrap()).contains(&id));
    std::fs::remove_dir_all(usb).unwrap();
    assert_eq!(missing(&empty.catalogue().view().await.unwrap()), [id]);
}

#[tokio::test]
async fn a_protection_is_a_note_beside_the_manifest_and_an_event_with_who_and_why() {
    let place = Place::new();
    let (folder, id) = place.make("1", 1);
    let catalogue = place.catalogue();
    let note = |view: &View| view.backups[0].place.protection.clone();
    assert_eq!(note(&catalogue.view().await.unwrap()), None);
    let until = Some(Timestamp::now() + jiff::SignedDuration::from_hours(1));
    catalogue.protect(&folder, id, ann("for the auditors"), until).await.unwrap();
    let found = note(&catalogue.view().await.unwrap()).unwrap();
    assert_eq!(
        (found.by.as_str(), found.why.as_deref(), found.until),
        ("ann", Some("for the auditors"), until)
    );
    // On another host the note is all there is.
    let other = Place { dir: place.dir, store: Arc::new(MemoryStore::new()) };
    assert_eq!(note(&other.catalogue().view().await.unwrap()), Some(found));
    assert!(other.catalogue().unprotect(&folder, id, ann("they have been")).await.unwrap());
    assert!(!other.catalogue().unprotect(&folder, id, ann("again")).await.unwrap());
    assert_eq!(note(&other.catalogue().view().await.unwrap()), None);
    assert!(!folder.join(PROTECTION).exists());
}

#[tokio::test]
async fn a_backup_whose_deletion_has_begun_cannot_be_protected_and_no_note_is_left() {
    let place = Place::new();
    let (folder, id) = place.make("1", 1);
    let catalogue = place.catalogue();
    catalogue.view().await.unwrap();
    std::fs::rename(folder.join(MANIFEST), folder.join(WITHDRAWN)).unwrap();
    let fault = catalogue.protect(&folder, id, ann("x"), None).await.unwrap_err();
    assert_eq!(fault.code, codes::NO_SUCH_BACKUP);
    assert!(!folder.join(PROTECTION).exists());
    let view = catalogue.view().await.unwrap();
    assert_eq!((ids(&view), missing(&view)), (vec![], vec![]), "it is on its way out");
    assert!(view.warnings[0].contains("deletion"), "{:?}", view.warnings);
}

#[tokio::test]
async fn records_of_a_later_release_hide_nothing() {
    let place = Place::new();
    let (_, id) = place.make("1", 1);
    let append = Append {
        stream: StreamId::from(STREAM),
        expected: Seq(0),
        records: vec![br#"{"v":9,"at":"2026-01-01T00:00:00Z","body":{"type":"sung","data":{}}}"#.to_vec()],
        summary: None,
        key: None,
    };
    place.store.append(append).await.unwrap();
    let view = place.catalogue().view().await.unwrap();
    assert_eq!(ids(&view), [id]);
    assert!(view.warnings[0].contains("does not know"), "{:?}", view.warnings);
    assert_eq!(place.kinds().await, ["sung", "seen"]);
}

#[tokio::test]
async fn links_lead_nowhere() {
    let place = Place::new();
    let outside = Place::new();
    outside.make("1", 1);
    symlink(outside.root().join("web"), place.root().join("web")).unwrap();
    assert_eq!(ids(&place.catalogue().view().await.unwrap()), []);
    let roots = Roots::open([place.root()]).unwrap();
    assert!(roots.open_folder(&place.root().join("web/1")).is_err());
}
