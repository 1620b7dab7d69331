//! Ends of guests and of libvirtd, who has an image open, and the guest's agent.

use vmkeep_steps::hypervisor::{
    Backing, DiskChange, FreezeState, Layer, Marker, Mirror, PauseReason, RunState, Trouble,
};

use crate::bench::{Bench, assert_same, disks_only, layer_in, marker, trouble, until};

pub async fn a_killed_qemu_is_a_crash_and_a_destroyed_one_is_not(bench: &dyn Bench) {
    let domain = bench.running().await;
    bench.hypervisor().set_marker(&domain.id, &marker()).await.unwrap();
    let running = bench.observe(&domain).await;
    bench.kill_qemu(&domain).await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.crashed, seen.saved), (RunState::Off, true, Some(false)));
    assert_eq!((seen.live, seen.qemu), (None, None));
    assert_eq!((seen.persistent, seen.marker), (running.persistent, Some(marker())));
    bench.start(&domain).await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.crashed), (RunState::Running, false));
    bench.destroy(&domain).await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.crashed, seen.saved), (RunState::Off, false, Some(false)));
}

pub async fn a_guest_that_is_asked_to_shut_down_ends_and_has_not_crashed(bench: &dyn Bench) {
    let domain = bench.guest(false).await;
    bench.start(&domain).await;
    bench.ticks(&domain).await;
    bench.hypervisor().shutdown(&domain.id).await.unwrap();
    until("the guest to obey", || async { (!bench.state(&domain).await.is_active()).then_some(()) }).await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.crashed, seen.saved), (false, Some(false)));
    assert!(seen.persistent.is_some());
}

pub async fn an_image_that_somebody_has_open_is_not_started_from(bench: &dyn Bench) {
    let (domain, other) = (bench.domain().await, bench.domain().await);
    let image = bench.own(&domain, "vda").await;
    let held = bench.hold(&image).await;
    assert_eq!(trouble(bench.hypervisor().start(&domain.id, false).await), Trouble::Locked);
    assert_eq!(bench.state(&domain).await, RunState::Off);
    drop(held);
    bench.start(&domain).await;
    let point = DiskChange::Point(vec![("vda".into(), image)]);
    bench.hypervisor().redefine_disks(&other.id, &point).await.unwrap();
    assert_eq!(trouble(bench.hypervisor().start(&other.id, false).await), Trouble::Locked);
    let seen = bench.observe(&other).await;
    assert_eq!((seen.state, seen.live, seen.crashed), (RunState::Off, None, false));
    assert_eq!(bench.state(&domain).await, RunState::Running);
}

pub async fn a_missing_image_is_not_started_from(bench: &dyn Bench) {
    let domain = bench.domain().await;
    let missing = Layer { path: bench.file(&domain, "missing.qcow2"), format: "qcow2".to_owned() };
    let point = DiskChange::Point(vec![("vda".into(), missing.clone())]);
    bench.hypervisor().redefine_disks(&domain.id, &point).await.unwrap();
    assert_eq!(layer_in(&bench.definition(&domain).await, "vda"), missing, "nobody looks at it yet");
    assert_eq!(trouble(bench.hypervisor().start(&domain.id, false).await), Trouble::Missing);
    assert_eq!(bench.state(&domain).await, RunState::Off);
}

pub async fn without_an_agent_nothing_is_frozen(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    assert_eq!(trouble(hypervisor.freeze_state(&domain.id).await), Trouble::NoAgent);
    assert_eq!(trouble(hypervisor.freeze(&domain.id).await), Trouble::NoAgent);
    assert_eq!(trouble(hypervisor.thaw(&domain.id).await), Trouble::NoAgent);
    hypervisor.suspend(&domain.id).await.unwrap();
    assert_eq!(trouble(hypervisor.freeze_state(&domain.id).await), Trouble::NotRunning, "it stands still");
    assert_eq!(trouble(hypervisor.freeze(&domain.id).await), Trouble::NotRunning, "it stands still");
    assert_eq!(trouble(hypervisor.thaw(&domain.id).await), Trouble::NotRunning, "it stands still");
}

pub async fn an_agent_freezes_once_and_thaws_once(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.guest(true).await;
    bench.start(&domain).await;
    until("the agent to answer", || async { hypervisor.freeze_state(&domain.id).await.ok() }).await;
    assert_eq!(hypervisor.freeze_state(&domain.id).await.unwrap(), FreezeState::Thawed);
    assert_eq!(hypervisor.thaw(&domain.id).await.unwrap(), 0);
    assert_eq!(hypervisor.freeze(&domain.id).await.unwrap(), 1);
    assert_eq!(hypervisor.freeze_state(&domain.id).await.unwrap(), FreezeState::Frozen);
    assert_eq!(trouble(hypervisor.freeze(&domain.id).await), Trouble::Refused, "once more");
    assert_eq!(bench.state(&domain).await, RunState::Running, "its processors run");
    assert_eq!(hypervisor.thaw(&domain.id).await.unwrap(), 1);
    assert_eq!(hypervisor.freeze_state(&domain.id).await.unwrap(), FreezeState::Thawed);
    bench.destroy(&domain).await;
}

pub async fn a_guest_runs_on_under_a_new_libvirtd(bench: &dyn Bench) {
    let (domain, paused, loaded) = (bench.running().await, bench.running().await, bench.running().await);
    let file = bench.file(&loaded, "memory");
    bench.hypervisor().save(&loaded.id, &file).await.unwrap();
    let xml = bench.hypervisor().memory_image_definition(&file).await.unwrap();
    bench.hypervisor().start_from_memory(&file, &xml, true).await.unwrap();
    let overlay = bench.overlay(&domain, "vda").await;
    bench.hypervisor().take(&domain.id, &disks_only(&[("vda", &overlay)])).await.unwrap();
    bench.hypervisor().set_marker(&domain.id, &marker()).await.unwrap();
    bench.hypervisor().suspend(&paused.id).await.unwrap();
    let before = [bench.observe(&domain).await, bench.observe(&paused).await, bench.observe(&loaded).await];
    let environment = bench.hypervisor().environment().await.unwrap();
    bench.restart_libvirtd().await;
    let after = [bench.observe(&domain).await, bench.observe(&paused).await, bench.observe(&loaded).await];
    before.iter().zip(&after).for_each(|(before, after)| assert_same(before, after));
    let now = bench.hypervisor().environment().await.unwrap();
    assert_ne!(now["libvirtd"], environment["libvirtd"]);
    assert_eq!(now["boot"], environment["boot"]);
    bench.hypervisor().resume(&paused.id).await.unwrap();
    bench.destroy(&paused).await;
    bench.destroy(&domain).await;
}

pub async fn a_new_libvirtd_has_every_definition_and_forgets_how_guests_ended(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let (killed, saved) = (bench.running().await, bench.running().await);
    bench.kill_qemu(&killed).await;
    bench.managed_save(&saved).await;
    let overlay = bench.overlay(&killed, "vda").await;
    let noted = Marker { job: "another".to_owned(), ..marker() };
    hypervisor.note(&killed.id, &noted).await.unwrap();
    hypervisor
        .redefine_disks(&killed.id, &DiskChange::Point(vec![("vda".into(), overlay.clone())]))
        .await
        .unwrap();
    hypervisor.set_autostart(&saved.id, true).await.unwrap();
    hypervisor.set_autostart(&saved.id, false).await.unwrap();
    hypervisor.sync_definitions().await.unwrap();
    let before = [bench.observe(&killed).await, bench.observe(&saved).await];
    bench.restart_libvirtd().await;
    let after = [bench.observe(&killed).await, bench.observe(&saved).await];
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(
            (&after.persistent, &after.persistent_marker),
            (&before.persistent, &before.persistent_marker)
        );
        assert_eq!((after.state, after.saved, after.crashed), (RunState::Off, None, false));
    }
    assert_eq!(layer_in(after[0].persistent.as_ref().unwrap(), "vda"), overlay);
    assert!(after[1].managed_save);
    bench.start(&saved).await;
    assert!(!bench.observe(&saved).await.managed_save);
    bench.destroy(&saved).await;
}

pub async fn a_commit_goes_on_under_a_new_libvirtd(bench: &dyn Bench) {
    let domain = bench.running().await;
    let commit = bench.moved(&domain).await;
    bench.write(&domain, "vda", 0x33).await;
    bench.hypervisor().suspend(&domain.id).await.unwrap();
    bench.ready(&domain, &commit).await;
    bench.restart_libvirtd().await;
    let seen = bench.observe(&domain).await;
    assert_eq!(seen.state, RunState::Paused(PauseReason::Asked));
    assert!(seen.qemu.unwrap().job(&commit.target).unwrap().ready);
    assert_eq!(seen.live.unwrap().disk(&commit.target).unwrap().mirror, Some(Mirror::Ready));
    bench.hypervisor().commit_pivot(&domain.id, &commit).await.unwrap();
    assert_eq!(bench.agreed(&domain, "vda").await, commit.base);
    let own = bench.definition(&domain).await;
    assert_eq!(own.disk(&commit.target).unwrap().backing, Backing::Probed);
    bench.destroy(&domain).await;
}
