//! What is found, and what is taken away.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use jiff::Timestamp;
use vmkeep_workflow::{Actor, Event, Fault, JobId, JobStatus, JobSummary, Seq, Step, Subject};

use super::restores::Placed;
use super::sweep::{Jobs, SweepInput, SweepLeftover, SweepOutput};
use super::*;
use crate::hypervisor::*;
use crate::image::root::Roots;
use crate::restore::place::aside;
use crate::snapshot::Places;
use crate::snapshot::disk::overlay_path;
use crate::snapshot::tests::context;
use crate::snapshot::tests::fake::{Fake, STORE, domain};

/// The journals, with one job.
struct One(Mutex<JobStatus>);

#[async_trait]
impl Jobs for One {
    async fn all(&self) -> Result<Vec<JobSummary>, Fault> {
        Ok(vec![summary(*self.0.lock().unwrap())])
    }

    async fn history(&self, _: JobId) -> Result<Vec<Event>, Fault> {
        Ok(Vec::new())
    }
}

fn job() -> JobId {
    context(1).job
}

fn summary(status: JobStatus) -> JobSummary {
    let now = Timestamp::UNIX_EPOCH;
    JobSummary {
        job: job(),
        workflow: "snapshot".into(),
        subject: Subject { id: domain().id.to_string(), label: "web".to_owned() },
        title: String::new(),
        status,
        by: Actor { who: "test".to_owned(), why: None },
        requested: now,
        updated: now,
        ended: status.ended().then_some(now),
        seq: Seq(9),
        steps: 1,
        steps_done: 0,
        fault: None,
        items: Vec::new(),
    }
}

/// A domain with an overlay of the job beside its image, on real files.
struct Scene {
    fake: Fake,
    dir: tempfile::TempDir,
    jobs: Arc<One>,
    overlay: PathBuf,
    id: FileId,
}

impl Scene {
    fn new() -> Self {
        let (fake, dir) = (Fake::new(), tempfile::tempdir().unwrap());
        let overlay = overlay_path(Path::new("/i"), job(), &"vda".into());
        let id = fake.state().add(overlay.to_str().unwrap(), "qcow2", Some("/i/a"));
        Self { fake, dir, jobs: Arc::new(One(Mutex::new(JobStatus::Abandoned))), overlay, id }
    }

    async fn sweep(&self, sweep: Sweep) -> SweepOutput {
        let places = Places { roots: Arc::new(Roots::open([self.dir.path()]).unwrap()) };
        let step = SweepLeftover { world: self.fake.world(), places, jobs: self.jobs.clone() };
        let input = SweepInput { domain: domain(), store: STORE.to_owned(), of: job(), sweep };
        step.run(&context(1), input).await.unwrap()
    }

    async fn overlay(&self) -> SweepOutput {
        self.sweep(Sweep::Overlay { path: self.overlay.clone(), id: self.id }).await
    }

    fn there(&self) -> bool {
        self.fake.state().files.contains_key(&self.overlay)
    }

    async fn assert_stays(&self, why: &str) {
        let output = self.overlay().await;
        assert!(output.stays.as_ref().is_some_and(|said| said.contains(why)), "{why}: {output:?}");
        assert!(self.there(), "{why}");
    }
}

#[tokio::test]
async fn an_empty_overlay_of_a_job_that_is_over_goes_once() {
    let scene = Scene::new();
    assert_eq!(scene.overlay().await, SweepOutput { done: true, stays: None });
    assert!(!scene.there());
    assert_eq!(scene.overlay().await, SweepOutput { done: false, stays: None });
}

#[tokio::test]
async fn an_overlay_that_anybody_may_need_stays() {
    let scene = Scene::new();
    scene.fake.state().files.get_mut(&scene.overlay).unwrap().empty = false;
    scene.assert_stays("it holds data").await;

    let scene = Scene::new();
    for open in [JobStatus::Running, JobStatus::NeedsAttention, JobStatus::Queued, JobStatus::Paused] {
        *scene.jobs.0.lock().unwrap() = open;
        scene.assert_stays("not over").await;
    }

    // Each of those who have an opinion.
    let scene = Scene::new();
    scene.fake.state().persistent.insert("vda".into(), scene.overlay.clone());
    scene.assert_stays("the persistent definition of web").await;
    let scene = Scene::new();
    scene.fake.state().live.insert("vda".into(), scene.overlay.clone());
    scene.assert_stays("the live definition of web").await;
    let scene = Scene::new();
    // Whoever runs like this would lose what it writes; that is another test's.
    scene.fake.state().run = RunState::Paused(PauseReason::Asked);
    scene.fake.state().qemu.as_mut().unwrap().tops.insert("vda".into(), scene.overlay.clone());
    scene.assert_stays("QEMU of web").await;
    // Somebody's image on top of it.
    let scene = Scene::new();
    scene.fake.state().run = RunState::Paused(PauseReason::Asked);
    scene.fake.state().add("/i/top", "qcow2", scene.overlay.to_str());
    scene.fake.state().persistent.insert("vda".into(), "/i/top".into());
    scene.assert_stays("in use").await;

    // Off, and perhaps saved on it.
    for (saved, managed) in [(None, false), (Some(true), false), (Some(false), true)] {
        let scene = Scene::new();
        scene.fake.state().die();
        (scene.fake.state().saved, scene.fake.state().managed_save) = (saved, managed);
        scene.assert_stays("memory").await;
    }
    let scene = Scene::new();
    scene.fake.state().die();
    scene.fake.state().saved = Some(false);
    assert!(scene.overlay().await.done);
}

#[tokio::test]
async fn a_file_that_a_process_has_open_is_known_to_be() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let data = file.as_file().metadata().unwrap();
    let id = FileId { dev: data.dev(), ino: data.ino() };
    let mine = format!("process {} ", std::process::id());
    assert!(uses::open_by(id).iter().any(|by| by.starts_with(&mine)), "{:?}", uses::open_by(id));
    let path = file.into_temp_path();
    assert!(uses::open_by(id).is_empty());
    drop(path);
}

#[tokio::test]
async fn a_folder_goes_if_it_holds_nothing_but_copies() {
    let scene = Scene::new();
    let folder = scene.dir.path().join(format!("20260131T235959Z-{}", job().short()));
    std::fs::create_dir(&folder).unwrap();
    for name in ["vda.qcow2", "domain.xml", "manifest.json.new"] {
        std::fs::write(folder.join(name), b"x").unwrap();
    }
    for (name, why) in
        [("memory.save", "only one"), ("manifest.json", "backup"), ("manifest.withdrawn.json", "backup")]
    {
        std::fs::write(folder.join(name), b"x").unwrap();
        let output = scene.sweep(Sweep::Folder(folder.clone())).await;
        assert!(output.stays.as_ref().is_some_and(|said| said.contains(why)), "{name}: {output:?}");
        assert!(folder.join("vda.qcow2").exists(), "{name}");
        std::fs::remove_file(folder.join(name)).unwrap();
    }
    assert!(scene.sweep(Sweep::Folder(folder.clone())).await.done);
    assert!(!folder.exists());
    let others = scene.dir.path().join("20260131T235959Z-0123456789ab-not");
    std::fs::create_dir(&others).unwrap();
    assert!(scene.sweep(Sweep::Folder(others.clone())).await.stays.is_some());
}

#[tokio::test]
async fn a_note_and_a_hold_of_a_job_that_is_over_go_and_those_of_others_stay() {
    let marker =
        |store: &str, job: String| Marker { store: store.to_owned(), job, hold: Some(Hold::Suspended) };
    let scene = Scene::new();
    {
        let mut state = scene.fake.state();
        (state.run, state.marker) =
            (RunState::Paused(PauseReason::Asked), Some(marker(STORE, job().to_string())));
    }
    assert!(scene.sweep(Sweep::Unmark).await.stays.is_some(), "the guest is still held");
    assert!(scene.sweep(Sweep::Free).await.done);
    assert_eq!(scene.fake.state().run, RunState::Running);
    assert!(scene.sweep(Sweep::Unmark).await.done);
    assert_eq!(scene.fake.state().marker, None);
    for other in [marker("another", job().to_string()), marker(STORE, JobId::new().to_string())] {
        scene.fake.state().marker = Some(other.clone());
        for sweep in [Sweep::Free, Sweep::Unmark] {
            assert!(!scene.sweep(sweep).await.done);
        }
        assert_eq!(scene.fake.state().marker, Some(other));
    }
}

#[tokio::test]
async fn what_is_found_is_told_with_its_owner_and_only_what_is_over_is_offered() {
    for (status, offered) in [(JobStatus::Abandoned, 2), (JobStatus::Running, 0)] {
        let scene = Scene::new();
        let folder = scene.dir.path().join(format!("20260131T235959Z-{}", "0123456789ab"));
        std::fs::create_dir(&folder).unwrap();
        let look = Look {
            store: STORE.to_owned(),
            overlays: vec![scene.dir.path().to_owned()],
            ram_disk: Some(scene.dir.path().to_owned()),
            roots: vec![scene.dir.path().to_owned()],
            placed: Vec::new(),
        };
        let real = overlay_path(scene.dir.path(), job(), &"vda".into());
        std::fs::write(&real, b"").unwrap();
        scene.fake.state().add(real.to_str().unwrap(), "qcow2", Some("/i/a"));
        std::fs::write(scene.dir.path().join(format!("vmkeep-{}-web.state", job().short())), b"").unwrap();
        let found = look.around(&scene.fake.world(), &[summary(status)]).await.unwrap();
        let words: Vec<String> = found.iter().map(Leftover::words).collect();
        for what in ["the overlay", "the saved memory", "is no backup"] {
            assert!(words.iter().any(|words| words.contains(what)), "{what}: {words:?}");
        }
        assert!(found.iter().all(|one| !one.remedy().is_empty()));
        assert_eq!(found.iter().filter(|one| one.sweep().is_some()).count(), offered, "{words:?}");
    }
}

#[tokio::test]
async fn what_restores_have_left_is_told_and_only_what_bears_their_hidden_names_goes() {
    for (status, offered) in [(JobStatus::Abandoned, 1), (JobStatus::Running, 0)] {
        let scene = Scene::new();
        let deep = scene.dir.path().join("images/new/place");
        std::fs::create_dir_all(&deep).unwrap();
        let half = deep.join(aside(job(), "vda.raw").as_str());
        let strangers = deep.join(aside(JobId::new(), "vda.raw").as_str());
        let named = deep.join("vdb.raw");
        for path in [&half, &strangers, &named] {
            std::fs::write(path, b"half").unwrap();
        }
        // A link of that name is nobody's file, and leads to no other.
        std::os::unix::fs::symlink(&named, deep.join(aside(job(), "vdc.raw").as_str())).unwrap();
        let look = Look {
            store: STORE.to_owned(),
            roots: vec![scene.dir.path().to_owned()],
            placed: vec![
                Placed { job: job().to_string(), path: named.clone() },
                Placed { job: job().to_string(), path: deep.join("never.raw") },
            ],
            ..Look::default()
        };
        let found = look.around(&scene.fake.world(), &[summary(status)]).await.unwrap();
        let of = |path: &Path| {
            let about = |one: &&Leftover| match &one.what {
                What::Half { path: at, .. } | What::Restored(at) => at == path,
                _ => false,
            };
            found.iter().find(about).unwrap_or_else(|| panic!("{} is not told of", path.display()))
        };
        assert!(of(&half).words().contains(&job().short()));
        assert!(matches!(of(&strangers).owner, Owner::Unknown(_)));
        assert!(of(&strangers).sweep().is_none() && of(&named).sweep().is_none());
        assert_eq!(of(&half).sweep().is_some(), status.ended());
        let restores = |one: &&Leftover| matches!(one.what, What::Half { .. } | What::Restored(_));
        assert_eq!(found.iter().filter(restores).count(), 3, "{found:?}");
        assert_eq!(found.iter().filter(restores).filter(|one| one.sweep().is_some()).count(), offered);
    }
}

#[tokio::test]
async fn a_file_under_way_goes_only_if_it_is_that_file_of_that_job_and_nobody_has_it_open() {
    let scene = Scene::new();
    let path = scene.dir.path().join(aside(job(), "vda.raw").as_str());
    let id = |path: &Path| FileId::of(&path.symlink_metadata().unwrap());
    std::fs::write(&path, b"half").unwrap();
    let sweep = Sweep::Half { path: path.clone(), id: id(&path) };
    *scene.jobs.0.lock().unwrap() = JobStatus::Running;
    assert!(scene.sweep(sweep.clone()).await.stays.is_some(), "its job goes on");
    *scene.jobs.0.lock().unwrap() = JobStatus::Abandoned;

    let open = std::fs::File::open(&path).unwrap();
    let output = scene.sweep(sweep.clone()).await;
    assert!(output.stays.is_some_and(|why| why.contains("has it open")));
    drop(open);
    let other = scene.dir.path().join("vda.raw");
    std::fs::write(&other, b"mine").unwrap();
    assert!(scene.sweep(Sweep::Half { path: other.clone(), id: id(&other) }).await.stays.is_some());
    let foreign = FileId { ino: id(&path).ino + 1, ..id(&path) };
    assert!(!scene.sweep(Sweep::Half { path: path.clone(), id: foreign }).await.done);
    assert!(path.exists() && other.exists());
    assert!(scene.sweep(sweep.clone()).await.done);
    assert!(!path.exists() && other.exists());
    assert_eq!(scene.sweep(sweep).await, SweepOutput { done: false, stays: None }, "it is gone already");
}

fn noted(store: &str, job: JobId) -> Option<Marker> {
    Some(Marker { store: store.to_owned(), job: job.to_string(), hold: None })
}

#[tokio::test]
async fn a_pull_of_an_unknown_job_is_nobodys_unless_another_store_has_its_note_in_the_domain() {
    let scene = Scene::new();
    let lost = JobId::new();
    let owner = || async {
        let seen = scene.fake.world().hypervisor.observe(&domain().id).await.unwrap();
        Owner::of_pull(&lost.short(), &[summary(JobStatus::Running)], &seen, STORE)
    };
    // No more than the end of its id is known.
    let Owner::Lost { job: of, domain: at } = owner().await else { panic!("{:?}", owner().await) };
    assert_eq!((of.short(), at), (lost.short(), domain()));
    scene.fake.state().persistent_marker = noted(STORE, lost);
    assert_eq!(owner().await, Owner::Lost { job: lost, domain: domain() });
    // One of both definitions is enough.
    scene.fake.state().marker = noted("another", lost);
    assert!(matches!(owner().await, Owner::Elsewhere { .. }), "{:?}", owner().await);
    scene.fake.state().marker = None;
    scene.fake.state().persistent_marker = noted("another", JobId::new());
    assert!(matches!(owner().await, Owner::Elsewhere { .. }), "{:?}", owner().await);
    let seen = scene.fake.world().hypervisor.observe(&domain().id).await.unwrap();
    let known = Owner::of_pull(&job().short(), &[summary(JobStatus::Running)], &seen, STORE);
    assert_eq!(known, Owner::Open(job()), "the journal is asked first");
}

#[tokio::test]
async fn what_a_lost_pull_has_left_goes_only_as_long_as_the_domain_says_whose_it_was() {
    let lost = JobId::new();
    let mut scene = Scene::new();
    scene.jobs = Arc::new(One(Mutex::new(JobStatus::Running)));
    let path = crate::snapshot::disk::scratch_path(Path::new("/i"), lost, &"vda".into());
    let id = scene.fake.state().add(path.to_str().unwrap(), "qcow2", None);
    let sweep = |of| {
        let places = Places { roots: Arc::new(Roots::open([scene.dir.path()]).unwrap()) };
        let step = SweepLeftover { world: scene.fake.world(), places, jobs: scene.jobs.clone() };
        let sweep = Sweep::Scratch { path: path.clone(), id };
        let input = SweepInput { domain: domain(), store: STORE.to_owned(), of, sweep };
        async move { step.run(&context(1), input).await.unwrap() }
    };
    for (note, why) in [
        (None, "note of its job"),
        (noted(STORE, JobId::new()), "note of its job"),
        (noted("another", lost), "another vmkeep"),
    ] {
        scene.fake.state().persistent_marker = note;
        let output = sweep(lost).await;
        assert!(output.stays.as_ref().is_some_and(|said| said.contains(why)), "{why}: {output:?}");
        assert!(scene.fake.state().files.contains_key(&path));
    }
    scene.fake.state().persistent_marker = noted(STORE, lost);
    assert_eq!(sweep(lost).await, SweepOutput { done: true, stays: None });
    assert!(!scene.fake.state().files.contains_key(&path));
}

#[test]
fn whoever_is_connected_to_a_socket_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let [path, other] = ["vmkeep-0123456789ab.nbd", "nbd"].map(|name| folder.path().join(name));
    let [door, _other] = [&path, &other].map(|path| std::os::unix::net::UnixListener::bind(path).unwrap());
    assert!(!uses::connected_to(&path));
    let client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let inside = door.accept().unwrap();
    assert!(uses::connected_to(&path) && !uses::connected_to(&other));
    drop((client, inside));
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_libvirt_has_locked_for_ever_is_told_with_the_way_out_and_left_alone() {
    let scene = Scene::new();
    let look = Look { store: STORE.to_owned(), ..Look::default() };
    let locked = |found: &[Leftover]| found.iter().filter(|one| one.what == What::Locked(domain())).count();
    let world = scene.fake.world();
    assert_eq!(locked(&look.around(&world, &[summary(JobStatus::Running)]).await.unwrap()), 0);
    scene.fake.state().locked = true;
    let found = look.around(&world, &[summary(JobStatus::Running)]).await.unwrap();
    assert_eq!(locked(&found), 1, "{found:?}");
    let told = found.iter().find(|one| one.what == What::Locked(domain())).unwrap();
    assert!(told.words().contains("waits for ever") && told.remedy().contains("async='backup'"), "{told:?}");
    assert_eq!(told.sweep(), None);
}
