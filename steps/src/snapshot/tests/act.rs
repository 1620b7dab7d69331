//! Preparations, freezing, and the snapshot itself.

use std::path::Path;
use std::time::Duration;

use vmkeep_workflow::{Class, Code, Step, Verdict};

use super::context;
use super::fake::{Fake, STORE, Trap, domain, target};
use crate::codes;
use crate::hypervisor::{DomainJob, Hold, HvError, Marker, RunState, Trouble};
use crate::snapshot::freeze::{FreezeGuest, FreezeInput, FreezePolicy, ThawGuest};
use crate::snapshot::mark::{Mark, MarkInput};
use crate::snapshot::memory::{IfSlow, MemoryLimits};
use crate::snapshot::overlay::{CreateOverlay, OverlayInput};
use crate::snapshot::switch::{SwitchDefinition, SwitchInput};
use crate::snapshot::take::{MemoryInput, TakeInput, TakeSnapshot};

fn switch(fake: &Fake) -> SwitchInput {
    SwitchInput { domain: domain(), definition: fake.definition(), disks: fake.disks() }
}

/// Real files stand behind the bases: what stands still is looked at on disk.
pub(super) fn take(fake: &Fake, folder: &Path, memory: Option<IfSlow>) -> TakeInput {
    let mut disks = fake.disks();
    for disk in &mut disks {
        let real = folder.join(disk.base.path.file_name().unwrap());
        std::fs::write(&real, b"base").unwrap();
        let mut state = fake.state();
        let old = disk.base.path.clone();
        let file = state.files.get(&old).unwrap().clone();
        state.files.insert(real.clone(), file);
        for overlay in state.files.values_mut().filter(|file| file.backing.as_ref() == Some(&old)) {
            overlay.backing = Some(real.clone());
        }
        let process = state.qemu.as_mut().unwrap();
        if process.tops[&disk.target] == old {
            process.tops.insert(disk.target.clone(), real.clone());
        }
        if state.live[&disk.target] == old {
            state.live.insert(disk.target.clone(), real.clone());
        }
        disk.base.path = real;
    }
    TakeInput {
        domain: domain(),
        store: STORE.to_owned(),
        instance: fake.instance(),
        disks,
        memory: memory.map(|if_slow| MemoryInput {
            file: folder.join("memory.save"),
            limits: MemoryLimits { seconds: 0, bytes: 1 << 30, if_slow },
        }),
        without_memory: None,
        frozen: None,
        must_be_frozen: false,
    }
}

#[tokio::test]
async fn another_daemons_marker_is_respected_and_an_old_one_of_ours_is_replaced() {
    let fake = Fake::new();
    let input = MarkInput { domain: domain(), store: STORE.to_owned() };
    let mark = Mark(fake.world());
    let other = Marker { store: "another".to_owned(), job: "x".to_owned(), hold: None };
    fake.state().persistent_marker = Some(other.clone());
    let fault = mark.run(&context(1), input.clone()).await.unwrap_err();
    assert_eq!(fault.code, codes::FOREIGN_MARKER);
    mark.undo(&context(1), input.clone(), None).await.unwrap();
    assert_eq!(fake.state().persistent_marker, Some(other), "what is not ours is not removed");
    fake.state().persistent_marker =
        Some(Marker { store: STORE.to_owned(), job: "old".to_owned(), hold: None });
    mark.run(&context(1), input.clone()).await.unwrap();
    assert_eq!(mark.probe(&context(1), input.clone()).await, Verdict::Done(()));
    mark.undo(&context(1), input, None).await.unwrap();
    assert_eq!(fake.state().persistent_marker, None);
}

#[tokio::test]
async fn the_definition_names_the_overlays_durably_and_can_be_put_back() {
    let fake = Fake::new();
    let overlay = CreateOverlay(fake.world());
    for disk in fake.disks() {
        let input = OverlayInput { domain: domain(), disk, bitmaps: Vec::new() };
        overlay.run(&context(1), input.clone()).await.unwrap();
        // Cut off before its outcome was written down: made again.
        assert_eq!(overlay.probe(&context(1), input.clone()).await, Verdict::NotDone);
        overlay.run(&context(2), input).await.unwrap();
    }
    let step = SwitchDefinition(fake.world());
    step.run(&context(1), switch(&fake)).await.unwrap();
    let overlay_of_vda = fake.disks()[0].overlay.clone();
    assert_eq!(fake.state().durable[&target("vda")], overlay_of_vda);
    assert_eq!(step.probe(&context(1), switch(&fake)).await, Verdict::Done(()));
    step.undo(&context(1), switch(&fake), Some(())).await.unwrap();
    assert_eq!(fake.state().durable[&target("vda")].to_str(), Some("/i/a"));
    for disk in fake.disks() {
        overlay
            .undo(&context(1), OverlayInput { domain: domain(), disk, bitmaps: Vec::new() }, None)
            .await
            .unwrap();
    }
    assert_eq!(fake.state().files.len(), 2);
}

#[tokio::test]
async fn a_definition_is_not_put_back_over_what_a_guest_has_written_to_its_overlay() {
    let fake = Fake::new();
    fake.switched();
    let step = SwitchDefinition(fake.world());
    {
        let mut state = fake.state();
        state.power_cut();
        state.start();
        state.guest_writes();
    }
    step.undo(&context(1), switch(&fake), None).await.unwrap_err();
    fake.state().die();
    step.undo(&context(1), switch(&fake), None).await.unwrap_err();
    let overlay = fake.disks()[0].overlay.clone();
    assert_eq!(fake.state().persistent[&target("vda")], overlay);
}

#[tokio::test]
async fn a_call_that_may_still_land_keeps_a_step_from_being_repeated() {
    let fake = Fake::new();
    let step = SwitchDefinition(fake.world());
    fake.state().stragglers = Some("queued".to_owned());
    assert!(matches!(step.probe(&context(1), switch(&fake)).await, Verdict::InFlight(_)));
    fake.state().stragglers = None;
    assert_eq!(step.probe(&context(1), switch(&fake)).await, Verdict::NotDone);
    let mut cx = context(1);
    cx.still_running = true;
    assert!(matches!(step.probe(&cx, switch(&fake)).await, Verdict::InFlight(_)));
}

#[tokio::test]
async fn a_snapshot_that_was_taken_although_its_answer_was_lost_is_recognised() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    fake.switched();
    let input = take(&fake, folder.path(), None);
    let step = TakeSnapshot(fake.world());
    fake.trap("take", Trap::Lose);
    assert!(step.run(&context(1), input.clone()).await.unwrap_err().in_doubt);
    let Verdict::Done(output) = step.probe(&context(1), input.clone()).await else {
        panic!("not recognised")
    };
    assert_eq!(output.frozen.len(), 2);
    // And by an attempt as well.
    step.run(&context(2), input).await.unwrap();
    assert_eq!(fake.state().calls.iter().filter(|call| *call == "take").count(), 1);
}

#[tokio::test]
async fn a_domain_that_was_started_on_its_overlays_is_not_taken_for_a_snapshot() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    fake.switched();
    let input = take(&fake, folder.path(), None);
    {
        let mut state = fake.state();
        state.power_cut();
        state.start();
    }
    let step = TakeSnapshot(fake.world());
    assert_eq!(step.probe(&context(1), input.clone()).await, Verdict::NotDone);
    let fault = step.run(&context(2), input).await.unwrap_err();
    assert_eq!((fault.code, fault.class), (Code::FACTS_CHANGED, Class::Permanent));
}

#[tokio::test]
async fn disks_that_moved_one_without_the_other_need_an_operator() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    fake.switched();
    let input = take(&fake, folder.path(), None);
    let overlay = input.disks[0].overlay.clone();
    fake.state().qemu.as_mut().unwrap().tops.insert(target("vda"), overlay);
    let step = TakeSnapshot(fake.world());
    assert!(matches!(step.probe(&context(1), input.clone()).await, Verdict::Diverged(_)));
    assert_eq!(step.run(&context(1), input).await.unwrap_err().class, Class::Fatal);
}

#[tokio::test]
async fn memory_that_takes_too_long_is_given_up_or_the_guest_is_stopped_or_the_disks_are_taken_alone() {
    for if_slow in [IfSlow::Fail, IfSlow::Pause, IfSlow::DiskOnly] {
        let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
        fake.switched();
        fake.state().endless = true;
        let input = take(&fake, folder.path(), Some(if_slow));
        let outcome = TakeSnapshot(fake.world()).run(&context(1), input).await;
        match if_slow {
            IfSlow::Fail => {
                assert_eq!(outcome.unwrap_err().code, codes::MEMORY_TOO_SLOW);
                assert_eq!(fake.state().qemu.as_ref().unwrap().tops.len(), 2);
            }
            IfSlow::Pause => {
                let output = outcome.unwrap();
                assert!(output.memory.is_some());
                let calls = fake.state().calls.clone();
                let at = |name: &str| calls.iter().position(|call| call.starts_with(name)).unwrap();
                assert!(at("hold Some") < at("suspend") && at("suspend") < at("take"), "{calls:?}");
                assert!(at("take") < at("resume"), "{calls:?}");
            }
            IfSlow::DiskOnly => {
                let output = outcome.unwrap();
                assert_eq!(output.memory, None);
                assert!(output.without_memory.is_some());
            }
        }
        let state = fake.state();
        assert_eq!(state.run, RunState::Running, "{if_slow:?}");
        assert!(state.marker.as_ref().is_none_or(|marker| marker.hold.is_none()), "{if_slow:?}");
    }
}

#[tokio::test]
async fn memory_is_given_up_however_long_libvirt_and_qemu_need_to_begin() {
    for stopping in [false, true] {
        let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
        fake.switched();
        fake.state().endless = true;
        fake.state().preparing = 60;
        fake.state().early_aborts = 3;
        let mut input = take(&fake, folder.path(), Some(IfSlow::Fail));
        if stopping {
            input.memory.as_mut().unwrap().limits.seconds = 600;
        }
        let cx = context(1);
        if stopping {
            cx.stop.cancel();
        }
        let step = TakeSnapshot(fake.world());
        let run = tokio::time::timeout(Duration::from_secs(60), step.run(&cx, input));
        let fault = run.await.expect("it is never given up").unwrap_err();
        assert_eq!(fault.code == codes::MEMORY_TOO_SLOW, !stopping, "{fault}");
        let state = fake.state();
        assert_eq!((state.run, state.early_aborts), (RunState::Running, 0), "{stopping}");
        assert_eq!(state.qemu.as_ref().unwrap().tops.len(), 2);
    }
}

#[tokio::test]
async fn a_guest_that_stands_still_for_a_save_whose_answer_was_lost_is_set_free_by_the_next_attempt() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    fake.switched();
    let input = take(&fake, folder.path(), Some(IfSlow::Pause));
    // libvirtd died after the transaction, with the guest still stopped for it.
    fake.trap(
        "take",
        Trap::Then(Box::new(|state| {
            state.run = RunState::Paused(crate::hypervisor::PauseReason::Job);
        })),
    );
    fake.trap("observe", Trap::Then(Box::new(|_| {})));
    fake.trap("observe", Trap::Fail(HvError::new(Trouble::Unreachable, "gone")));
    let step = TakeSnapshot(fake.world());
    // The call itself came back well; whatever it found, the guest is free in the end.
    let first = step.run(&context(1), input.clone()).await;
    if fake.state().run != RunState::Running {
        assert!(!matches!(step.probe(&context(1), input.clone()).await, Verdict::Done(_)), "{first:?}");
        step.run(&context(2), input).await.unwrap();
    }
    assert_eq!(fake.state().run, RunState::Running);
}

#[tokio::test]
async fn a_save_that_goes_on_without_its_client_is_waited_for() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    fake.switched();
    let input = take(&fake, folder.path(), Some(IfSlow::Fail));
    fake.state().job = Some(DomainJob {
        operation: "snapshot".to_owned(),
        elapsed_ms: 1,
        done: 0,
        remaining: 1,
        total: 1,
        dirty_rate: 0,
        iteration: 1,
    });
    let step = TakeSnapshot(fake.world());
    assert!(matches!(step.probe(&context(1), input.clone()).await, Verdict::InFlight(_)));
    fake.state().job = None;
    assert_eq!(step.probe(&context(1), input).await, Verdict::NotDone);
}

fn freeze(policy: FreezePolicy) -> FreezeInput {
    FreezeInput { domain: domain(), store: STORE.to_owned(), policy }
}

#[tokio::test]
async fn a_guest_that_we_froze_is_thawed() {
    let fake = Fake::new();
    fake.state().agent = true;
    let frozen = FreezeGuest(fake.world()).run(&context(1), freeze(FreezePolicy::Required)).await.unwrap();
    assert_eq!(frozen.file_systems, 1);
    assert_eq!(fake.state().marker.as_ref().unwrap().hold, Some(Hold::Frozen));
    ThawGuest(fake.world()).run(&context(1), freeze(FreezePolicy::Required)).await.unwrap();
    assert!(!fake.state().frozen);
    assert_eq!(fake.state().marker.as_ref().unwrap().hold, None);
}

#[tokio::test]
async fn an_operators_freeze_is_neither_used_nor_thawed() {
    let fake = Fake::new();
    (fake.state().agent, fake.state().frozen) = (true, true);
    let step = FreezeGuest(fake.world());
    let fault = step.run(&context(1), freeze(FreezePolicy::Required)).await.unwrap_err();
    assert_eq!(fault.code, codes::FROZEN_BY_OTHERS);
    let without = step.run(&context(1), freeze(FreezePolicy::IfPossible)).await.unwrap();
    assert!(without.why_not.is_some());
    ThawGuest(fake.world()).run(&context(1), freeze(FreezePolicy::IfPossible)).await.unwrap();
    assert!(fake.state().frozen);
}

#[tokio::test]
async fn a_freeze_that_may_still_come_is_thawed_all_the_same() {
    let fake = Fake::new();
    fake.state().agent = true;
    fake.trap("freeze", Trap::Fail(HvError::new(Trouble::AgentSilent, "no answer").in_doubt()));
    let fault =
        FreezeGuest(fake.world()).run(&context(1), freeze(FreezePolicy::IfPossible)).await.unwrap_err();
    assert!(fault.in_doubt);
    fake.state().frozen = true;
    ThawGuest(fake.world()).run(&context(1), freeze(FreezePolicy::IfPossible)).await.unwrap();
    assert!(!fake.state().frozen);
}
