//! The save and the way back to running, against the small world of the snapshot's tests.

use std::path::Path;

use vmkeep_workflow::{Step, Verdict};

use super::guest::{SaveGuest, SaveOutput};
use super::reload::{Outcome, bring_back};
use super::resume::{Back, Work};
use super::{AfterReboot, Saving};
use crate::codes;
use crate::hypervisor::{Hold, HvError, Marker, PauseReason, RunState, Trouble};
use crate::snapshot::safety::{Release, release};
use crate::snapshot::tests::context;
use crate::snapshot::tests::fake::{Fake, STORE, Trap, domain};

/// A switched world whose bases are real files: what stands still is looked at on disk.
fn scene(folder: &Path) -> (Fake, Saving) {
    let fake = Fake::new();
    fake.switched();
    let mut disks = fake.disks();
    for disk in &mut disks {
        let real = folder.join(disk.base.path.file_name().unwrap());
        std::fs::write(&real, b"base").unwrap();
        let old = std::mem::replace(&mut disk.base.path, real.clone());
        let mut state = fake.state();
        let file = state.files.remove(&old).unwrap();
        state.files.insert(real.clone(), file);
        for overlay in state.files.values_mut().filter(|file| file.backing.as_ref() == Some(&old)) {
            overlay.backing = Some(real.clone());
        }
        state.qemu.as_mut().unwrap().tops.insert(disk.target.clone(), real.clone());
        state.live.insert(disk.target.clone(), real);
    }
    let made = disks.into_iter().map(|disk| (disk, "overlay".into())).collect();
    let saving = Saving {
        domain: domain(),
        store: STORE.to_owned(),
        instance: fake.instance(),
        boot: "this".to_owned(),
        disks: made,
        file: folder.join("state"),
        ram_disk: false,
        running: true,
        after_reboot: AfterReboot::Start,
    };
    (fake, saving)
}

async fn saved(fake: &Fake, saving: &Saving) -> SaveOutput {
    let output = SaveGuest(fake.world()).run(&context(1), saving.clone()).await.unwrap();
    assert_eq!(fake.state().run, RunState::Off);
    output
}

fn calls(fake: &Fake, of: &[&str]) -> Vec<String> {
    let state = fake.state();
    state.calls.iter().filter(|call| of.iter().any(|name| call.starts_with(name))).cloned().collect()
}

#[tokio::test]
async fn a_save_that_fails_leaves_the_guest_running_and_says_why() {
    for (trouble, ram_disk, code) in [
        (Trouble::Refused, false, codes::CANNOT_SAVE_MACHINE_STATE),
        (Trouble::NoSpace, false, codes::NOT_ENOUGH_DISK_SPACE),
        (Trouble::NoSpace, true, codes::NOT_ENOUGH_SPACE_ON_RAM_DISK),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (fake, saving) = scene(folder.path());
        let saving = Saving { ram_disk, ..saving };
        fake.trap("save", Trap::Fail(HvError::new(trouble, "no")));
        let fault = SaveGuest(fake.world()).run(&context(1), saving.clone()).await.unwrap_err();
        assert_eq!(fault.code, code);
        assert_eq!(fake.state().run, RunState::Running);
        assert_eq!(fake.state().marker.as_ref().and_then(|marker| marker.hold), None, "nothing is held");
        // The way back finds the guest as it was, and touches nothing.
        let outcome = bring_back(&fake.world(), &context(1), &saving, None).await.unwrap();
        assert_eq!(outcome, Outcome::NotSaved);
        assert!(calls(&fake, &["load", "start"]).is_empty());
    }
}

#[tokio::test]
async fn a_guest_comes_back_with_its_memory_and_the_state_is_used_up_before_it_runs() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, saving) = scene(folder.path());
    let output = saved(&fake, &saving).await;
    let (world, cx) = (fake.world(), context(1));
    assert_eq!(bring_back(&world, &cx, &saving, Some(&output)).await.unwrap(), Outcome::Loaded);
    assert!(matches!(fake.state().run, RunState::Paused(_)), "loaded, and nothing has run");
    let back = Work { world: &world, cx: &cx, saving: &saving, saved: Some(&output) }.loaded().await.unwrap();
    assert_eq!((back.back, back.downtime_ms.is_some()), (Back::Resumed, true));
    assert_eq!(fake.state().run, RunState::Running);
    assert_eq!(calls(&fake, &["load", "note", "resume"]), ["load", "note Some(Resumed)", "resume"]);
    fake.state().guest_writes();
}

#[tokio::test]
async fn a_guest_that_ran_after_its_resume_is_never_given_its_old_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, saving) = scene(folder.path());
    let output = saved(&fake, &saving).await;
    let (world, cx) = (fake.world(), context(1));
    bring_back(&world, &cx, &saving, Some(&output)).await.unwrap();
    // It is let run, writes nothing, and its QEMU is gone before the answer came.
    fake.trap("resume", Trap::Then(Box::new(|state| state.die())));
    let work = Work { world: &world, cx: &cx, saving: &saving, saved: Some(&output) };
    assert!(work.loaded().await.is_err());
    let back = work.loaded().await.unwrap();
    assert_eq!(back.back, Back::Cold);
    assert_eq!(calls(&fake, &["load", "start"]), ["load", "start"]);
}

#[tokio::test]
async fn a_guest_whose_qemu_ended_before_it_ran_is_loaded_once_more() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, saving) = scene(folder.path());
    let output = saved(&fake, &saving).await;
    let (world, cx) = (fake.world(), context(1));
    bring_back(&world, &cx, &saving, Some(&output)).await.unwrap();
    fake.state().die();
    let back = Work { world: &world, cx: &cx, saving: &saving, saved: Some(&output) }.loaded().await.unwrap();
    assert_eq!(back.back, Back::Resumed);
    assert_eq!(calls(&fake, &["load", "start"]), ["load", "load"]);
}

#[tokio::test]
async fn a_state_is_loaded_only_onto_disks_that_are_as_they_were() {
    type Meddling = fn(&Fake, &Saving);
    type Expected = fn(&Outcome) -> bool;
    let cases: [(&str, Meddling, Expected); 5] = [
        ("somebody started it", |fake, _| fake.state().start(), |is| *is == Outcome::StartedByOthers),
        (
            "somebody started it, and it has ended",
            |fake, _| {
                let mut state = fake.state();
                state.start();
                state.guest_writes();
                state.die();
            },
            |is| matches!(is, Outcome::StaysOff(_)),
        ),
        (
            "somebody wrote to a base",
            |_, saving| std::fs::write(&saving.disks[0].0.base.path, b"written to").unwrap(),
            |is| matches!(is, Outcome::Cold(_)),
        ),
        (
            "it ran again and wrote, and was ended",
            |fake, saving| {
                let mut state = fake.state();
                let used = Marker {
                    store: STORE.to_owned(),
                    job: context(1).job.to_string(),
                    hold: Some(Hold::Resumed),
                };
                state.persistent_marker = Some(used);
                state.start();
                state.guest_writes();
                state.die();
                assert_eq!(saving.store, STORE);
            },
            |is| matches!(is, Outcome::StaysOff(_)),
        ),
        (
            "the state is gone",
            |_, saving| std::fs::remove_file(&saving.file).unwrap(),
            |is| matches!(is, Outcome::Cold(_)),
        ),
    ];
    for (case, meddle, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        let (fake, saving) = scene(folder.path());
        let output = saved(&fake, &saving).await;
        meddle(&fake, &saving);
        let outcome = bring_back(&fake.world(), &context(1), &saving, Some(&output)).await.unwrap();
        assert!(expected(&outcome), "{case}: {outcome:?}");
        assert!(calls(&fake, &["load"]).is_empty(), "{case}");
    }
}

#[tokio::test]
async fn a_save_whose_answer_was_lost_is_found_and_a_stale_state_is_not_taken_for_one() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, saving) = scene(folder.path());
    saved(&fake, &saving).await;
    let step = SaveGuest(fake.world());
    assert!(matches!(step.probe(&context(1), saving.clone()).await, Verdict::Done(_)));
    // libvirt died right after it had written the header: the guest ran on, wrote, and was shut down.
    let base = std::fs::File::options().write(true).open(&saving.disks[0].0.base.path).unwrap();
    let later =
        std::fs::metadata(&saving.file).unwrap().modified().unwrap() + std::time::Duration::from_secs(1);
    base.set_modified(later).unwrap();
    assert_eq!(step.probe(&context(1), saving).await, Verdict::NotDone);
}

/// A save that libvirt gave up itself leaves the folder; whoever has saved the guest after that has its memory.
#[tokio::test]
async fn a_state_that_went_with_its_folder_was_ours_and_one_that_went_alone_was_not() {
    for (folder_gone, begun, managed) in
        [(true, true, false), (false, true, false), (true, false, false), (true, true, true)]
    {
        let folder = tempfile::tempdir().unwrap();
        let (fake, saving) = scene(folder.path());
        let saving = Saving { file: folder.path().join("backup/state"), ..saving };
        std::fs::create_dir(folder.path().join("backup")).unwrap();
        let (step, cx) = (SaveGuest(fake.world()), context(1));
        if begun {
            step.run(&cx, saving.clone()).await.unwrap();
        } else {
            fake.state().die();
        }
        (fake.state().saved, fake.state().managed_save) = (Some(true), managed);
        let vanishes = folder.path().join(if folder_gone { "backup" } else { "backup/state" });
        if vanishes.is_dir() { std::fs::remove_dir_all(vanishes) } else { std::fs::remove_file(vanishes) }
            .unwrap();
        match step.probe(&cx, saving).await {
            Verdict::Done(output) => {
                assert!(folder_gone && begun && !managed);
                assert!(output.state.is_none() && output.unusable.unwrap().contains("folder"));
            }
            verdict => assert!(verdict == Verdict::NotDone && !(folder_gone && begun && !managed)),
        }
    }
}

#[tokio::test]
async fn a_guest_that_its_operator_has_paused_is_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, saving) = scene(folder.path());
    fake.state().run = RunState::Paused(PauseReason::Asked);
    let fault = SaveGuest(fake.world()).run(&context(1), saving.clone()).await.unwrap_err();
    assert_eq!(fault.code, codes::MEMORY_UNSAVEABLE);
    assert!(calls(&fake, &["save", "resume"]).is_empty());
    assert!(matches!(fake.state().run, RunState::Paused(_)));
}

#[tokio::test]
async fn a_guest_whose_state_is_worth_nothing_is_started_without_because_it_was_we_who_ended_it() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, saving) = scene(folder.path());
    let output = saved(&fake, &saving).await;
    let output = SaveOutput { state: None, unusable: Some("no".to_owned()), ..output };
    let outcome = bring_back(&fake.world(), &context(1), &saving, Some(&output)).await.unwrap();
    assert_eq!(outcome, Outcome::Cold("no".to_owned()));
}

#[tokio::test]
async fn a_guest_whose_qemu_died_of_its_save_is_started_again_and_one_that_somebody_ended_is_not() {
    for (crashed, ran) in [(true, true), (false, true), (true, false)] {
        let folder = tempfile::tempdir().unwrap();
        let (fake, saving) = scene(folder.path());
        let saving = Saving { running: ran, ..saving };
        fake.state().die();
        fake.state().crashed = crashed;
        let (world, cx) = (fake.world(), context(1));
        let outcome = bring_back(&world, &cx, &saving, None).await.unwrap();
        let Outcome::Cold(why) = outcome else {
            assert!(matches!(outcome, Outcome::StaysOff(_)) && !(crashed && ran), "{outcome:?}");
            assert!(calls(&fake, &["load", "start"]).is_empty());
            continue;
        };
        assert!(crashed && ran && why.contains("by itself"), "{why}");
        let back = Work { world: &world, cx: &cx, saving: &saving, saved: None }.cold(why).await.unwrap();
        assert_eq!((back.back, back.downtime_ms), (Back::Cold, None));
        assert_eq!(fake.state().run, RunState::Running, "on the overlays, which the merge leads home");
        assert_eq!(calls(&fake, &["load", "start"]), ["start"]);
    }
}

#[tokio::test]
async fn an_image_that_somebody_holds_is_waited_for_and_a_state_that_is_refused_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, saving) = scene(folder.path());
    let output = saved(&fake, &saving).await;
    let (world, cx) = (fake.world(), context(1));
    for _ in 0..5 {
        fake.trap("load", Trap::Fail(HvError::new(Trouble::Locked, "held")));
        assert!(bring_back(&world, &cx, &saving, Some(&output)).await.is_err());
    }
    assert_eq!(bring_back(&world, &cx, &saving, Some(&output)).await.unwrap(), Outcome::Loaded);
}

#[tokio::test]
async fn a_guest_that_was_loaded_onto_other_files_is_not_let_run() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, saving) = scene(folder.path());
    let output = saved(&fake, &saving).await;
    let (world, cx) = (fake.world(), context(1));
    bring_back(&world, &cx, &saving, Some(&output)).await.unwrap();
    let (disk, _) = &saving.disks[0];
    fake.state().qemu.as_mut().unwrap().tops.insert(disk.target.clone(), disk.base.path.clone());
    let work = Work { world: &world, cx: &cx, saving: &saving, saved: Some(&output) };
    assert_eq!(work.loaded().await.unwrap_err().code, vmkeep_workflow::Code::EFFECT_DIVERGED);
    assert!(calls(&fake, &["resume", "note"]).is_empty());
}

#[tokio::test]
async fn the_guest_safety_pass_lets_a_loaded_guest_run_without_a_journal() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, saving) = scene(folder.path());
    let output = saved(&fake, &saving).await;
    bring_back(&fake.world(), &context(1), &saving, Some(&output)).await.unwrap();
    let freed = release(&fake.world(), STORE, &domain().id).await.unwrap();
    assert_eq!(freed, Release::Resumed { redefined: Vec::new() });
    let state = fake.state();
    assert_eq!(state.run, RunState::Running);
    assert_eq!(state.persistent_marker.as_ref().unwrap().hold, Some(Hold::Resumed), "the state is used up");
    assert_eq!(state.marker.as_ref().unwrap().hold, None);
    let order: Vec<_> =
        state.calls.iter().filter(|call| call.starts_with("note") || *call == "resume").cloned().collect();
    assert_eq!(order, ["note Some(Resumed)", "resume"]);
}
