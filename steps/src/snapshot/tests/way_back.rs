//! Commit, pivot, tidy, and setting guests free.

use vmkeep_workflow::{Class, Step, Verdict};

use super::context;
use super::fake::{Fake, STORE, Trap, domain, target};
use crate::codes;
use crate::hypervisor::{Hold, HvError, Marker, PauseReason, RunState, Trouble};
use crate::snapshot::commit::{CommitInput, CommitOutput, CommitOverlay};
use crate::snapshot::pivot::{Pivot, PivotInput, PivotOutput};
use crate::snapshot::safety::{Release, release};
use crate::snapshot::switch::{SwitchDefinition, SwitchInput};
use crate::snapshot::tidy::{Tidy, TidyInput};

fn input(fake: &Fake) -> PivotInput {
    PivotInput {
        domain: domain(),
        store: STORE.to_owned(),
        definition: fake.definition(),
        disks: fake.disks(),
        instance: "1".to_owned(),
        bandwidth: 0,
    }
}

async fn pivot(fake: &Fake, attempt: u32) -> Result<PivotOutput, vmkeep_workflow::Fault> {
    Pivot(fake.world()).run(&context(attempt), input(fake)).await
}

async fn probe(fake: &Fake) -> Verdict<PivotOutput> {
    Pivot(fake.world()).probe(&context(1), input(fake)).await
}

fn assert_home(fake: &Fake) {
    let state = fake.state();
    assert_eq!(state.persistent[&target("vda")].to_str(), Some("/i/a"));
    assert_eq!(state.persistent[&target("vdb")].to_str(), Some("/i/b"));
    assert_eq!(state.durable, state.persistent);
    if let Some(qemu) = &state.qemu {
        assert_eq!(qemu.tops, state.persistent);
    }
    assert!(state.marker.as_ref().is_none_or(|marker| marker.hold.is_none()));
}

fn suspended() -> Marker {
    Marker { store: STORE.to_owned(), job: "j".to_owned(), hold: Some(Hold::Suspended) }
}

#[tokio::test]
async fn the_guest_stands_still_from_before_the_first_pivot_until_the_definition_is_durable() {
    let fake = Fake::new();
    fake.taken();
    let output = pivot(&fake, 1).await.unwrap();
    assert!(output.paused_us.is_some());
    assert_home(&fake);
    assert_eq!(fake.state().run, RunState::Running);
    let calls = fake.state().calls.clone();
    let at = |name: &str| calls.iter().position(|call| call.starts_with(name)).unwrap();
    assert!(at("hold Some") < at("suspend") && at("suspend") < at("pivot vda"));
    assert!(at("pivot vdb") < at("sync") && at("sync") < at("resume"));
    assert!(at("resume") < at("hold None"));
    assert_eq!(probe(&fake).await, Verdict::Done(PivotOutput::default()));
}

#[tokio::test]
async fn a_pivot_whose_answer_is_lost_sets_the_guest_free_and_is_finished_by_the_next_attempt() {
    for lost in ["vda", "vdb"] {
        let fake = Fake::new();
        fake.taken();
        if lost == "vdb" {
            fake.trap("pivot", Trap::Then(Box::new(|_| {})));
        }
        fake.trap("pivot", Trap::Lose);
        let fault = pivot(&fake, 1).await.unwrap_err();
        assert!(fault.in_doubt);
        assert_eq!(fake.state().run, RunState::Running, "the guest was set free");
        pivot(&fake, 2).await.unwrap();
        assert_home(&fake);
    }
}

#[tokio::test]
async fn libvirt_dying_between_qemus_pivot_and_its_own_definition_never_lets_the_guest_run_on_a_wrong_one() {
    let fake = Fake::new();
    fake.taken();
    let stale = fake.disks()[0].overlay.clone();
    // QEMU has moved, the definition has not; the guest stands still.
    fake.trap(
        "pivot",
        Trap::Then(Box::new(move |state| {
            state.persistent.insert(target("vda"), stale);
        })),
    );
    fake.trap("pivot", Trap::Fail(HvError::new(Trouble::Unreachable, "gone").in_doubt()));
    pivot(&fake, 1).await.unwrap_err();
    let state = fake.state();
    assert_eq!(state.run, RunState::Running);
    assert_eq!(state.durable[&target("vda")].to_str(), Some("/i/a"), "what QEMU writes to");
    assert!(state.durable[&target("vdb")].to_str().unwrap().contains("vmkeep-"), "what QEMU writes to");
}

#[tokio::test]
async fn a_guest_that_could_not_be_set_free_is_by_the_next_attempt_or_by_the_safety_pass() {
    for by_pass in [false, true] {
        let fake = Fake::new();
        fake.taken();
        fake.trap("resume", Trap::Fail(HvError::new(Trouble::Unreachable, "gone").in_doubt()));
        pivot(&fake, 1).await.unwrap_err();
        assert!(matches!(fake.state().run, RunState::Paused(_)));
        if by_pass {
            let done = release(&fake.world(), STORE, &domain().id).await.unwrap();
            assert!(matches!(done, Release::Resumed { .. }));
            assert_eq!(fake.state().run, RunState::Running);
        }
        assert!(!matches!(probe(&fake).await, Verdict::Done(_)) || by_pass);
        pivot(&fake, 2).await.unwrap();
        assert_eq!(fake.state().run, RunState::Running);
        assert_home(&fake);
    }
}

#[tokio::test]
async fn a_power_cut_at_any_call_of_the_pivot_leaves_a_domain_that_starts_with_everything() {
    let whole = Fake::new();
    whole.taken();
    pivot(&whole, 1).await.unwrap();
    for call in ["hold", "suspend", "pivot", "sync", "resume", "redefine", "observe"] {
        let fake = Fake::new();
        fake.taken();
        fake.trap(call, Trap::Then(Box::new(super::fake::State::power_cut)));
        let _ = pivot(&fake, 1).await;
        fake.state().start();
        // Whatever it started on equals the base, or is the overlay; the next attempt brings it home.
        pivot(&fake, 2).await.unwrap();
        assert_home(&fake);
    }
}

#[tokio::test]
async fn an_operators_pause_is_left_alone() {
    let fake = Fake::new();
    fake.taken();
    fake.state().run = RunState::Paused(PauseReason::Asked);
    pivot(&fake, 1).await.unwrap();
    assert_eq!(fake.state().run, RunState::Paused(PauseReason::Asked));
    assert_home(&fake);
}

#[tokio::test]
async fn a_guest_stopped_for_want_of_space_runs_again_when_the_overlays_are_home() {
    let fake = Fake::new();
    fake.taken();
    fake.state().run = RunState::Paused(PauseReason::IoError);
    let output = pivot(&fake, 1).await.unwrap();
    assert_eq!(fake.state().run, RunState::Running);
    assert!(!output.notes.is_empty());
    assert_home(&fake);
}

#[tokio::test]
async fn a_domain_that_libvirt_is_wrong_about_is_committed_through_the_monitor() {
    let fake = Fake::new();
    fake.taken();
    let base = "/i/a".into();
    fake.state().live.insert(target("vda"), base);
    pivot(&fake, 1).await.unwrap();
    let calls = fake.state().calls.clone();
    assert!(calls.contains(&"commit vda Monitor".to_owned()), "{calls:?}");
    assert!(calls.contains(&"commit vdb Libvirt".to_owned()), "{calls:?}");
    assert_home(&fake);
}

#[tokio::test]
async fn a_libvirt_that_missed_the_end_of_a_pivot_is_an_operators_matter_but_the_guest_is_safe_and_runs() {
    let fake = Fake::new();
    fake.taken();
    let overlay = fake_overlay();
    fake.trap(
        "pivot",
        Trap::Then(Box::new(move |state| {
            state.live.insert(target("vda"), overlay.clone());
            state.persistent.insert(target("vda"), overlay);
        })),
    );
    let fault = pivot(&fake, 1).await.unwrap_err();
    assert_eq!((fault.code, fault.class), (codes::HYPERVISOR_LOST_TRACK, Class::Fatal));
    assert_eq!(fake.state().run, RunState::Running);
    assert_home(&fake);
    // Once it was started anew, all is well.
    {
        let mut state = fake.state();
        state.die();
        state.start();
    }
    assert!(matches!(probe(&fake).await, Verdict::Done(_)));
}

#[tokio::test]
async fn a_domain_that_is_off_is_committed_offline_and_comes_home() {
    let fake = Fake::new();
    fake.taken();
    fake.state().die();
    pivot(&fake, 1).await.unwrap();
    assert_home(&fake);
    assert!(fake.state().calls.iter().any(|call| call == "offline"));
}

#[tokio::test]
async fn a_domain_that_is_started_while_it_is_brought_home_offline_is_brought_home_live() {
    for call in ["offline", "redefine"] {
        let fake = Fake::new();
        fake.taken();
        fake.state().die();
        // Started from the overlay, right before the definition changes, or right after the first commit.
        fake.trap(
            call,
            Trap::Then(Box::new(|state| {
                let overlays: Vec<_> = state
                    .files
                    .keys()
                    .filter(|path| path.to_str().unwrap().contains("vmkeep-"))
                    .cloned()
                    .collect();
                state.persistent.insert(target("vda"), overlays[0].clone());
                state.persistent.insert(target("vdb"), overlays[1].clone());
                let after = std::mem::replace(&mut state.durable, state.persistent.clone());
                state.start();
                state.run = RunState::Paused(PauseReason::Other);
                state.persistent = after.clone();
                state.durable = after;
            })),
        );
        let mut attempt = 1;
        while let Err(fault) = pivot(&fake, attempt).await {
            assert_eq!(fault.class, Class::Transient, "{call}: {fault}");
            attempt += 1;
            assert!(attempt < 4, "{call}: {fault}");
        }
        let state = fake.state();
        assert_eq!(state.qemu.as_ref().unwrap().tops, state.persistent, "{call}");
        assert_eq!(state.persistent[&target("vda")].to_str(), Some("/i/a"), "{call}");
    }
}

#[tokio::test]
async fn a_domain_that_was_started_on_its_overlays_before_anything_was_taken_is_led_home() {
    let fake = Fake::new();
    fake.switched();
    let undo = SwitchInput { domain: domain(), definition: fake.definition(), disks: fake.disks() };
    {
        let mut state = fake.state();
        state.power_cut();
        state.start();
        state.guest_writes();
    }
    pivot(&fake, 1).await.unwrap();
    assert_home(&fake);
    SwitchDefinition(fake.world()).undo(&context(1), undo, Some(())).await.unwrap();
    assert_home(&fake);
}

#[tokio::test]
async fn a_disk_that_somebody_has_pointed_elsewhere_for_the_next_start_stays_there() {
    let fake = Fake::new();
    fake.taken();
    let theirs: std::path::PathBuf = "/i/theirs".into();
    {
        let mut state = fake.state();
        state.die();
        state.persistent.insert(target("vdb"), theirs.clone());
        state.durable = state.persistent.clone();
    }
    let output = pivot(&fake, 1).await.unwrap();
    assert!(output.notes[0].contains("vdb"), "{output:?}");
    let undo = SwitchInput { domain: domain(), definition: fake.definition(), disks: fake.disks() };
    SwitchDefinition(fake.world()).undo(&context(1), undo, Some(())).await.unwrap();
    let state = fake.state();
    assert_eq!(state.durable[&target("vda")].to_str(), Some("/i/a"));
    assert_eq!(state.durable[&target("vdb")], theirs);
    assert_eq!(state.calls.iter().filter(|call| *call == "offline").count(), 2, "both are committed");
}

#[tokio::test]
async fn a_guest_that_somebody_started_on_its_base_beside_a_full_overlay_needs_an_operator() {
    let fake = Fake::new();
    fake.taken();
    {
        let mut state = fake.state();
        state.die();
        state.persistent = [(target("vda"), "/i/a".into()), (target("vdb"), "/i/b".into())].into();
        state.durable = state.persistent.clone();
        state.start();
    }
    let of = commit_of(&fake, 0);
    let fault = CommitOverlay(fake.world()).run(&context(1), of).await.unwrap_err();
    assert_eq!(fault.class, Class::Fatal);
    assert_eq!(pivot(&fake, 1).await.unwrap_err().class, Class::Fatal);
    assert!(fake.state().files.keys().any(|path| path.to_str().unwrap().contains("vmkeep-")));
}

#[tokio::test]
async fn a_disk_that_somebody_else_moved_is_not_touched() {
    let fake = Fake::new();
    fake.taken();
    {
        let mut state = fake.state();
        state.add("/i/elsewhere", "qcow2", None);
        state.qemu.as_mut().unwrap().tops.insert(target("vda"), "/i/elsewhere".into());
        state.persistent.insert(target("vda"), "/i/elsewhere".into());
        state.durable = state.persistent.clone();
    }
    assert_eq!(pivot(&fake, 1).await.unwrap_err().class, Class::Fatal);
    assert!(matches!(probe(&fake).await, Verdict::Diverged(_)));
    assert!(
        !fake.state().calls.iter().any(|call| call.starts_with("suspend") || call.starts_with("redefine"))
    );
}

#[tokio::test]
async fn a_base_that_a_helper_holds_is_named_and_waited_for() {
    let fake = Fake::new();
    fake.taken();
    fake.trap("commit", Trap::Fail(HvError::new(Trouble::Locked, "Failed to get \"write\" lock")));
    let of = commit_of(&fake, 0);
    let step = CommitOverlay(fake.world());
    let fault = step.run(&context(1), of.clone()).await.unwrap_err();
    assert_eq!((fault.code, fault.class), (codes::IMAGE_LOCKED, Class::Transient));
    assert!(fault.remedy.contains("fuser"));
    assert_eq!(step.run(&context(2), of).await.unwrap(), CommitOutput::Ready);
}

/// The name of a device may lead to another since the host was started anew, and nothing of it is anybody's to write to.
#[tokio::test]
async fn nothing_is_committed_to_a_device_that_is_another_now() {
    for off in [false, true] {
        let fake = Fake::new();
        fake.taken();
        if off {
            fake.state().die();
        }
        let mut of = commit_of(&fake, 0);
        (of.disk.device, of.disk.lasting) = (true, Some("serial of another".to_owned()));
        let fault = CommitOverlay(fake.world()).run(&context(1), of).await.unwrap_err();
        assert_eq!((fault.code, fault.class), (vmkeep_workflow::Code::EFFECT_DIVERGED, Class::Fatal));
        assert!(fault.cause.contains("another device"), "{fault}");
        let calls = fake.state().calls.clone();
        assert!(!calls.iter().any(|call| call.starts_with("commit")), "{calls:?}");
    }
}

#[tokio::test]
async fn overlays_go_only_when_nobody_uses_them_and_they_are_proved_to_be_home() {
    let fake = Fake::new();
    fake.taken();
    let of = TidyInput {
        domain: domain(),
        disks: fake.disks().into_iter().map(|disk| (disk, "overlay".into())).collect(),
        proof: "pivot".into(),
    };
    let tidy = Tidy(fake.world());
    // In use.
    let fault = tidy.run(&context(1), of.clone()).await.unwrap_err();
    assert_eq!(fault.code, codes::CANNOT_REMOVE_OLD_DISK_IMAGE);
    // Not in use, but nothing proves that what they hold is in the bases.
    pivot(&fake, 1).await.unwrap();
    let fault = tidy.run(&context(1), of.clone()).await.unwrap_err();
    assert!(fault.cause.contains("never committed"), "{fault}");
    // Named by the definition of a domain that is off.
    {
        let mut state = fake.state();
        state.die();
        for file in state.files.values_mut() {
            file.empty = true;
        }
        let overlay = fake_overlay();
        state.persistent.insert(target("vda"), overlay);
    }
    let fault = tidy.run(&context(1), of.clone()).await.unwrap_err();
    assert!(fault.cause.contains("definition"), "{fault}");
    fake.state().persistent.insert(target("vda"), "/i/a".into());
    assert_eq!(tidy.run(&context(1), of.clone()).await.unwrap().removed, 2);
    assert_eq!(tidy.run(&context(2), of).await.unwrap().removed, 0);
}

fn fake_overlay() -> std::path::PathBuf {
    "/i/vmkeep-0123456789ab-vda.qcow2".into()
}

#[tokio::test]
async fn the_safety_pass_touches_only_what_this_store_holds() {
    let fake = Fake::new();
    fake.taken();
    let id = domain().id;
    fake.state().run = RunState::Paused(PauseReason::Asked);
    assert_eq!(release(&fake.world(), STORE, &id).await.unwrap(), Release::NotHeld, "no marker");
    fake.state().marker = Some(Marker { hold: None, ..suspended() });
    assert_eq!(release(&fake.world(), STORE, &id).await.unwrap(), Release::NotHeld, "no hold");
    fake.state().marker = Some(suspended());
    assert_eq!(release(&fake.world(), "another", &id).await.unwrap(), Release::NotHeld, "another's hold");
    assert_eq!(fake.state().run, RunState::Paused(PauseReason::Asked));
    let done = release(&fake.world(), STORE, &id).await.unwrap();
    assert_eq!(done, Release::Resumed { redefined: Vec::new() });
    assert_eq!(fake.state().run, RunState::Running);
}

#[tokio::test]
async fn the_safety_pass_leaves_empty_overlays_in_the_definition_for_a_snapshot_that_may_still_come() {
    let fake = Fake::new();
    fake.switched();
    {
        let mut state = fake.state();
        state.marker = Some(suspended());
        state.run = RunState::Paused(PauseReason::Asked);
    }
    release(&fake.world(), STORE, &domain().id).await.unwrap();
    assert!(fake.state().durable[&target("vda")].to_str().unwrap().contains("vmkeep-"));
    assert_eq!(fake.state().run, RunState::Running);
}

#[tokio::test]
async fn the_safety_pass_thaws_what_this_store_froze() {
    let fake = Fake::new();
    {
        let mut state = fake.state();
        (state.agent, state.frozen) = (true, true);
        state.marker = Some(Marker { hold: Some(Hold::Frozen), ..suspended() });
    }
    assert_eq!(release(&fake.world(), STORE, &domain().id).await.unwrap(), Release::Thawed);
    assert!(!fake.state().frozen);
}

fn commit_of(fake: &Fake, disk: usize) -> CommitInput {
    CommitInput { domain: domain(), disk: fake.disks()[disk].clone(), instance: "1".to_owned(), bandwidth: 0 }
}

#[tokio::test]
async fn a_disk_that_was_unplugged_is_committed_by_a_helper_and_the_others_as_ever() {
    let fake = Fake::new();
    fake.taken();
    {
        let mut state = fake.state();
        state.qemu.as_mut().unwrap().tops.remove(&target("vdb"));
        state.live.remove(&target("vdb"));
    }
    let overlay = fake.disks()[1].overlay.clone();
    assert!(!fake.state().files[&overlay].empty);
    let output = CommitOverlay(fake.world()).run(&context(1), commit_of(&fake, 1)).await.unwrap();
    assert_eq!(output, CommitOutput::Offline);
    assert!(fake.state().files[&overlay].empty, "a second commit must write nothing");
    pivot(&fake, 1).await.unwrap();
    assert!(matches!(probe(&fake).await, Verdict::Done(_)));
    let state = fake.state();
    assert_eq!(state.run, RunState::Running);
    assert_eq!(state.durable[&target("vdb")].to_str(), Some("/i/b"));
    assert_eq!(state.qemu.as_ref().unwrap().tops[&target("vda")].to_str(), Some("/i/a"));
}

#[tokio::test]
async fn a_disk_that_was_plugged_in_again_without_its_overlay_needs_an_operator() {
    let fake = Fake::new();
    fake.taken();
    {
        let mut state = fake.state();
        state.qemu.as_mut().unwrap().tops.insert(target("vdb"), "/i/b".into());
        state.live.insert(target("vdb"), "/i/b".into());
        // What the fake asserts of every guest that runs does not hold of one that somebody plays tricks on.
        state.run = RunState::Paused(PauseReason::Asked);
    }
    let fault = CommitOverlay(fake.world()).run(&context(1), commit_of(&fake, 1)).await.unwrap_err();
    assert_eq!(fault.class, Class::Fatal);
    assert!(fault.remedy.contains("vmkeep-"), "{fault}");
}

#[tokio::test]
async fn overlays_that_a_saved_memory_belongs_to_stay_until_it_is_loaded_or_given_up() {
    let saved = |managed_save, saved| {
        let fake = Fake::new();
        fake.taken();
        fake.state().die();
        (fake.state().managed_save, fake.state().saved) = (managed_save, saved);
        fake
    };
    let commit = async |fake: &Fake, cx: &[vmkeep_workflow::StepContext; 2]| {
        let mut done = Vec::new();
        for (disk, cx) in cx.iter().enumerate() {
            let committed = CommitOverlay(fake.world()).run(cx, commit_of(fake, disk)).await;
            if let Err(fault) = &committed {
                assert_eq!(fault.class, Class::Transient);
                assert!(fault.remedy.contains("virsh"), "{fault}");
                assert!(!fake.state().calls.iter().any(|call| call == "offline"));
            }
            done.push(committed.is_ok());
        }
        assert_eq!(done[0], done[1]);
        done[0]
    };
    let fresh = || [context(1), context(1)];
    let (fake, cx) = (saved(true, Some(true)), fresh());
    assert!(!commit(&fake, &cx).await);
    // The file of libvirt's own is removed; why it is off does not change by that.
    fake.state().managed_save = false;
    assert!(commit(&fake, &cx).await);
    pivot(&fake, 1).await.unwrap();
    assert_home(&fake);

    let (fake, cx) = (saved(false, Some(true)), fresh());
    assert!(!commit(&fake, &cx).await);
    assert_eq!(pivot(&fake, 1).await.unwrap_err().class, Class::Transient);
    // libvirt was started anew, and does not remember.
    fake.state().saved = None;
    assert!(!commit(&fake, &cx).await);
    // Started from its disks, and shut down.
    fake.state().saved = Some(false);
    assert!(commit(&fake, &cx).await);

    let fake = saved(false, None);
    assert!(commit(&fake, &fresh()).await, "off for any other reason");
}
