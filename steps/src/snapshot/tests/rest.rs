//! The act of a domain that is off, and the way home from it.

use std::path::Path;

use vmkeep_workflow::{Class, Code, Step, Verdict};

use super::context;
use super::fake::{Fake, STORE, domain};
use crate::hypervisor::{DomainJob, PauseReason, RunState};
use crate::snapshot::commit::{CommitInput, CommitOutput, CommitOverlay};
use crate::snapshot::disk::JobDisk;
use crate::snapshot::pivot::{Pivot, PivotInput};
use crate::snapshot::rest::{RestInput, TakeAtRest};

/// A domain that is off, its definition on overlays, its bases real files.
fn off(folder: &Path) -> (Fake, Vec<JobDisk>) {
    let fake = Fake::new();
    fake.state().die();
    fake.switched();
    let mut disks = fake.disks();
    let mut state = fake.state();
    for disk in &mut disks {
        let real = folder.join(disk.base.path.file_name().unwrap());
        std::fs::write(&real, b"base").unwrap();
        let file = state.files.remove(&disk.base.path).unwrap();
        state.files.insert(real.clone(), file);
        state.files.get_mut(&disk.overlay).unwrap().backing = Some(real.clone());
        disk.base.path = real;
    }
    drop(state);
    (fake, disks)
}

fn rest(disks: &[JobDisk]) -> RestInput {
    RestInput { domain: domain(), disks: disks.to_vec() }
}

/// The domain starts from what its definition named before the switch.
fn start_on_bases(fake: &Fake, disks: &[JobDisk]) {
    let mut state = fake.state();
    let switched = state.persistent.clone();
    state.persistent = disks.iter().map(|disk| (disk.target.clone(), disk.base.path.clone())).collect();
    state.start();
    state.persistent = switched;
}

#[tokio::test]
async fn a_domain_that_is_off_or_was_started_from_the_overlays_leaves_its_bases_alone() {
    for started in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (fake, disks) = off(folder.path());
        if started {
            fake.state().start();
            fake.state().guest_writes();
        }
        let taken = TakeAtRest(fake.world()).run(&context(1), rest(&disks)).await.unwrap();
        assert!(taken.off && taken.memory.is_none());
        assert_eq!(taken.frozen.len(), 2);
        assert!(!fake.state().calls.iter().any(|call| call.starts_with("take")));
    }
}

#[tokio::test]
async fn a_domain_that_was_started_before_the_switch_is_moved_to_the_overlays() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, disks) = off(folder.path());
    start_on_bases(&fake, &disks);
    fake.state().guest_writes();
    let taken = TakeAtRest(fake.world()).run(&context(1), rest(&disks)).await.unwrap();
    assert!(!taken.off, "it is a point in time of a running guest");
    assert!(disks.iter().all(|disk| fake.state().qemu.as_ref().unwrap().tops[&disk.target] == disk.overlay));
}

#[tokio::test]
async fn a_domain_that_is_just_being_started_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, disks) = off(folder.path());
    // libvirt knows of a QEMU that cannot be asked yet.
    fake.state().run = RunState::Paused(PauseReason::Job);
    let fault = TakeAtRest(fake.world()).run(&context(1), rest(&disks)).await.unwrap_err();
    assert_eq!(fault.class, Class::Transient);
    start_on_bases(&fake, &disks);
    fake.state().job = Some(DomainJob {
        operation: "start".to_owned(),
        elapsed_ms: 1,
        done: 0,
        remaining: 1,
        total: 1,
        dirty_rate: 0,
        iteration: 0,
    });
    let fault = TakeAtRest(fake.world()).run(&context(1), rest(&disks)).await.unwrap_err();
    assert_eq!(fault.class, Class::Transient);
}

#[tokio::test]
async fn without_a_definition_that_leads_to_the_overlays_nothing_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, disks) = off(folder.path());
    fake.state().managed_save = true;
    let fault = TakeAtRest(fake.world()).run(&context(1), rest(&disks)).await.unwrap_err();
    assert_eq!(
        fault.code,
        Code::FACTS_CHANGED,
        "a saved guest comes back on the files that it was saved with"
    );
    fake.state().managed_save = false;
    let disk = &disks[0];
    fake.state().persistent.insert(disk.target.clone(), disk.base.path.clone());
    let fault = TakeAtRest(fake.world()).run(&context(1), rest(&disks)).await.unwrap_err();
    assert_eq!(fault.code, Code::FACTS_CHANGED);
    fake.state().stragglers = Some("a call".to_owned());
    assert!(matches!(TakeAtRest(fake.world()).probe(&context(1), rest(&disks)).await, Verdict::InFlight(_)));
}

#[tokio::test]
async fn a_guest_saved_onto_its_overlays_keeps_them_until_it_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, disks) = off(folder.path());
    {
        let mut state = fake.state();
        state.start();
        state.guest_writes();
        state.die();
        state.managed_save = true;
    }
    let commit = |disk: &JobDisk| CommitInput {
        domain: domain(),
        disk: disk.clone(),
        instance: String::new(),
        bandwidth: 0,
    };
    let step = CommitOverlay(fake.world());
    let fault = step.run(&context(1), commit(&disks[0])).await.unwrap_err();
    assert_eq!(fault.class, Class::Transient);
    assert!(fault.remedy.contains("managedsave-remove"), "{}", fault.remedy);
    let pivot = PivotInput {
        domain: domain(),
        store: STORE.to_owned(),
        definition: fake.definition(),
        disks: disks.clone(),
        instance: String::new(),
        bandwidth: 0,
    };
    let fault = Pivot(fake.world()).run(&context(2), pivot).await.unwrap_err();
    assert_eq!(fault.class, Class::Transient);
    fake.state().managed_save = false;
    fake.state().start();
    let done = step.run(&context(2), commit(&disks[0])).await.unwrap();
    assert_eq!(done, CommitOutput::Ready);
}
