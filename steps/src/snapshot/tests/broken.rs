//! Worlds that are broken: each failure says its code, what it was about and why, and leaves the guest and what others own
//! as they were.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmkeep_workflow::{Class, Fault, Step};

use super::act::take;
use super::fake::{Fake, STORE, Trap, domain, target};
use super::{context, copies};
use crate::codes::{self, assert_told};
use crate::hypervisor::{HvError, RunState, Trouble};
use crate::image::root::Roots;
use crate::snapshot::Places;
use crate::snapshot::commit::{CommitInput, CommitOverlay};
use crate::snapshot::copy::CopyImage;
use crate::snapshot::folder::{FolderInput, PrepareFolder};
use crate::snapshot::freeze::{FreezeGuest, FreezeInput, FreezePolicy, ThawGuest};
use crate::snapshot::machine::{KeepInput, KeepNvram, KeepState};
use crate::snapshot::mark::{Mark, MarkInput};
use crate::snapshot::memory::IfSlow;
use crate::snapshot::overlay::{CreateOverlay, OverlayInput};
use crate::snapshot::take::TakeSnapshot;

fn places(root: &Path) -> Places {
    Places { roots: Arc::new(Roots::open([root]).unwrap()) }
}

fn no(words: &str) -> Trap {
    Trap::Fail(HvError::new(Trouble::Refused, words))
}

/// The guest runs, and by everybody's account on these files.
fn assert_runs_on(fake: &Fake, disks: [&Path; 2]) {
    let state = fake.state();
    assert_eq!(state.run, RunState::Running);
    let tops = &state.qemu.as_ref().unwrap().tops;
    assert_eq!([tops[&target("vda")].as_path(), tops[&target("vdb")].as_path()], disks);
    state.assert_safe("a failure");
}

#[tokio::test]
async fn a_domain_that_libvirt_lets_nobody_mark_is_not_touched() {
    let fake = Fake::new();
    fake.trap("mark", no("metadata is read only"));
    let input = MarkInput { domain: domain(), store: STORE.to_owned() };
    let fault = Mark(fake.world()).run(&context(1), input).await.unwrap_err();
    assert_told(&fault, codes::CANNOT_LOCK_MACHINE, "web");
    assert_eq!(fake.state().persistent_marker, None);
    assert_runs_on(&fake, [Path::new("/i/a"), Path::new("/i/b")]);
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("web"), b"a file where a folder should be").unwrap();
    let input = FolderInput { parent: dir.path().join("web"), name: "backup".to_owned() };
    let step = PrepareFolder(places(dir.path()));
    let fault = step.run(&context(1), input).await.unwrap_err();
    assert_told(&fault, codes::CANNOT_CREATE_DIRECTORY, "web/backup");
    assert!(dir.path().join("web").is_file(), "what is in the way is somebody's");
}

#[tokio::test]
async fn an_overlay_is_not_made_over_a_file_that_bears_its_name() {
    let fake = Fake::new();
    let disk = fake.disks().remove(0);
    fake.state().add(disk.overlay.to_str().unwrap(), "qcow2", None);
    let before = fake.state().files[&disk.overlay].id;
    let input = OverlayInput { domain: domain(), disk: disk.clone(), bitmaps: Vec::new() };
    let fault = CreateOverlay(fake.world()).run(&context(1), input).await.unwrap_err();
    assert_told(&fault, codes::CANNOT_CREATE_EMPTY_DISK_IMAGE, disk.overlay.to_str().unwrap());
    assert_eq!(fake.state().files[&disk.overlay].id, before, "it is somebody's");
}

async fn snapshot(fake: &Fake, folder: &Path, trap: Trap) -> Fault {
    fake.switched();
    let input = take(fake, folder, Some(IfSlow::Pause));
    fake.trap("take", trap);
    TakeSnapshot(fake.world()).run(&context(1), input).await.unwrap_err()
}

#[tokio::test]
async fn a_snapshot_that_libvirt_refuses_leaves_the_guest_on_its_own_images() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    let fault = snapshot(&fake, folder.path(), no("QEMU says no")).await;
    assert_told(&fault, codes::CANNOT_TAKE_SNAPSHOT, "web");
    assert!(fault.cause.contains("QEMU says no"), "{fault}");
    assert_runs_on(&fake, [&folder.path().join("a"), &folder.path().join("b")]);
}

#[tokio::test]
async fn a_memory_image_that_was_cut_off_is_not_taken_for_one() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    let file = folder.path().join("memory.save");
    let torn = file.clone();
    let tear =
        Trap::Then(Box::new(move |_| std::fs::write(torn, b"LibvirtQemudPart and a torn rest").unwrap()));
    let fault = snapshot(&fake, folder.path(), tear).await;
    assert_told(&fault, codes::MEMORY_LOST, file.to_str().unwrap());
    assert_eq!(fake.state().run, RunState::Running, "it goes on, on its overlays, until they are merged");
}

fn freeze(policy: FreezePolicy) -> FreezeInput {
    FreezeInput { domain: domain(), store: STORE.to_owned(), policy }
}

#[tokio::test]
async fn a_guest_whose_agent_refuses_is_not_backed_up_frozen() {
    let fake = Fake::new();
    fake.state().agent = true;
    fake.trap("freeze", no("the agent is told not to"));
    let fault = FreezeGuest(fake.world()).run(&context(1), freeze(FreezePolicy::Required)).await.unwrap_err();
    assert_told(&fault, codes::CANNOT_FREEZE, "web");
    assert!(!fake.state().frozen);
    assert_runs_on(&fake, [Path::new("/i/a"), Path::new("/i/b")]);
}

#[tokio::test]
async fn a_thaw_that_fails_is_tried_again_until_the_guest_is_thawed() {
    let fake = Fake::new();
    fake.state().agent = true;
    FreezeGuest(fake.world()).run(&context(1), freeze(FreezePolicy::Required)).await.unwrap();
    fake.trap("thaw", Trap::Fail(HvError::new(Trouble::AgentSilent, "no answer")));
    let thaw = ThawGuest(fake.world());
    let fault = thaw.run(&context(1), freeze(FreezePolicy::Required)).await.unwrap_err();
    assert_told(&fault, codes::CANNOT_THAW, "web");
    assert!(fault.remedy.contains("virsh domfsthaw"), "{fault}");
    assert_eq!(fault.class, Class::Transient);
    thaw.run(&context(2), freeze(FreezePolicy::Required)).await.unwrap();
    assert!(!fake.state().frozen);
}

#[tokio::test]
async fn a_merge_that_qemu_refuses_leaves_the_guest_on_its_overlay_and_both_files_there() {
    let fake = Fake::new();
    fake.taken();
    fake.trap("commit", no("an I/O error"));
    let disk = fake.disks().remove(0);
    let input = CommitInput { domain: domain(), disk: disk.clone(), instance: fake.instance(), bandwidth: 0 };
    let fault = CommitOverlay(fake.world()).run(&context(1), input).await.unwrap_err();
    assert_told(&fault, codes::CANNOT_MERGE_DISK_IMAGES, "disk vda of web");
    let other = fake.disks().remove(1).overlay;
    assert_runs_on(&fake, [&disk.overlay, &other]);
    let state = fake.state();
    assert!(state.files.contains_key(&disk.overlay) && state.files.contains_key(&disk.base.path));
}

async fn copied(fake: &Fake, folder: &Path, meddle: impl FnOnce(&Path)) -> (Fault, PathBuf) {
    let input = copies::input(fake, folder, 0);
    let source = input.file.source.clone();
    meddle(&source);
    let step = CopyImage { world: fake.world(), places: places(folder) };
    (step.run(&context(1), input).await.unwrap_err(), source)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_be_read_is_named() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    let (fault, source) = copied(&fake, folder.path(), |source| std::fs::remove_file(source).unwrap()).await;
    assert_told(&fault, codes::CANNOT_COPY_IMAGE_TO_BACKUP_LOCATION, source.to_str().unwrap());
    assert!(!folder.path().join("vda.raw").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_somebody_wrote_to_since_it_stood_still_is_not_copied() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    let longer = |source: &Path| std::fs::write(source, b"somebody else's").unwrap();
    let (fault, source) = copied(&fake, folder.path(), longer).await;
    assert_told(&fault, codes::SOURCE_CHANGED, source.to_str().unwrap());
    assert!(!folder.path().join("vda.raw").exists());
}

#[tokio::test]
async fn firmware_variables_that_cannot_be_written_to_the_backup_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let variables = dir.path().join("vars.fd");
    std::fs::write(&variables, b"variables").unwrap();
    // A folder where the file should be.
    std::fs::create_dir_all(dir.path().join("backup/nvram/in the way")).unwrap();
    let input = KeepInput {
        folder: dir.path().join("backup"),
        planned: jiff::Timestamp::now(),
        nvram: Some(KeepNvram { file: variables.clone(), format: "raw".to_owned(), template: None }),
        tpm: None,
    };
    let fault = KeepState(places(dir.path())).run(&context(1), input).await.unwrap_err();
    assert_told(&fault, codes::CANNOT_COPY_FILE_TO_BACKUP_LOCATION, "backup/nvram");
    assert_eq!(std::fs::read(variables).unwrap(), b"variables");
}
