//! Snapshots onto prepared overlays.

use vmkeep_steps::hypervisor::{Backing, DiskChange, Layer, PauseReason, RunState, Take, Trouble};

use crate::bench::{Bench, assert_same, byte_in, disks_only, layer_in, trouble};

pub async fn a_snapshot_of_disks_moves_everybody_onto_the_overlays(bench: &dyn Bench) {
    let domain = bench.running().await;
    bench.write(&domain, "vda", 0x11).await;
    let (own, other) = (bench.own(&domain, "vda").await, bench.own(&domain, "vdb").await);
    let overlay = bench.overlay(&domain, "vda").await;
    let instance = bench.qemu(&domain).await.instance;
    bench.hypervisor().take(&domain.id, &disks_only(&[("vda", &overlay)])).await.unwrap();
    assert_eq!(bench.agreed(&domain, "vda").await, overlay.path);
    assert_eq!(bench.agreed(&domain, "vdb").await, other.path, "it was not along");
    let seen = bench.observe(&domain).await;
    assert_eq!(seen.state, RunState::Running);
    assert_eq!((seen.snapshots.len(), seen.checkpoints.len()), (0, 0), "no record of libvirt's");
    let (live, qemu) = (seen.live.unwrap(), seen.qemu.unwrap());
    assert_eq!(qemu.instance, instance);
    assert_eq!(qemu.disk(&"vda".into()).unwrap().chain, [overlay.clone(), own.clone()]);
    assert_eq!(live.disk(&"vda".into()).unwrap().backing, Backing::Explicit(vec![own.clone()]));
    assert_eq!(layer_in(&live, "vda"), overlay);
    let persistent = seen.persistent.unwrap();
    assert_eq!(layer_in(&persistent, "vda"), overlay);
    assert_eq!(persistent.disk(&"vda".into()).unwrap().backing, Backing::Explicit(vec![own.clone()]));
    bench.write(&domain, "vda", 0x22).await;
    assert_eq!((byte_in(&overlay), byte_in(&own)), (0x22, 0x11));
    let image = bench.storage().inspect(&overlay).await.unwrap().unwrap();
    assert_eq!((image.backing, image.empty), (Some(own), false));
}

/// So that no end of QEMU can come between: the definition names the overlays before anything is written to them.
pub async fn a_persistent_definition_that_names_the_overlays_already_is_left_alone(bench: &dyn Bench) {
    let domain = bench.running().await;
    let overlays = [bench.overlay(&domain, "vda").await, bench.overlay(&domain, "vdb").await];
    let [first, second] = &overlays;
    let point = vec![("vda".into(), first.clone()), ("vdb".into(), second.clone())];
    bench.hypervisor().redefine_disks(&domain.id, &DiskChange::Point(point)).await.unwrap();
    let before = bench.definition(&domain).await;
    bench.hypervisor().take(&domain.id, &disks_only(&[("vda", first), ("vdb", second)])).await.unwrap();
    assert_eq!(bench.definition(&domain).await, before);
    assert_eq!(bench.agreed(&domain, "vda").await, first.path);
    assert_eq!(bench.agreed(&domain, "vdb").await, second.path);
}

pub async fn a_snapshot_with_memory_holds_the_guest_that_runs_on(bench: &dyn Bench) {
    let domain = bench.guest(false).await;
    bench.start(&domain).await;
    let boot = bench.ticks(&domain).await;
    let bases = [bench.own(&domain, "vda").await, bench.own(&domain, "vdb").await];
    let overlays = [bench.overlay(&domain, "vda").await, bench.overlay(&domain, "vdb").await];
    let file = bench.file(&domain, "memory");
    let disks = disks_only(&[("vda", &overlays[0]), ("vdb", &overlays[1])]);
    bench.hypervisor().take(&domain.id, &Take { memory: Some(file.clone()), ..disks }).await.unwrap();
    assert_eq!(bench.state(&domain).await, RunState::Running);
    assert_eq!(bench.hypervisor().domain_job(&domain.id).await.unwrap(), None);
    assert_eq!(bench.ticks(&domain).await, boot, "the same boot goes on");
    for (target, overlay) in ["vda", "vdb"].into_iter().zip(&overlays) {
        assert_eq!(bench.agreed(&domain, target).await, overlay.path);
    }
    let xml = bench.hypervisor().memory_image_definition(&file).await.unwrap();
    let held = bench.hypervisor().parse_definition(&xml).unwrap();
    for (target, base) in ["vda", "vdb"].into_iter().zip(&bases) {
        assert_eq!(layer_in(&held, target), *base, "the disks of that instant");
    }
    bench.destroy(&domain).await;
}

pub async fn a_snapshot_of_a_paused_guest_leaves_it_paused(bench: &dyn Bench) {
    let domain = bench.running().await;
    bench.hypervisor().suspend(&domain.id).await.unwrap();
    let overlay = bench.overlay(&domain, "vda").await;
    let memory = Some(bench.file(&domain, "memory"));
    let disks = disks_only(&[("vda", &overlay)]);
    bench.hypervisor().take(&domain.id, &Take { memory, ..disks }).await.unwrap();
    assert_eq!(bench.state(&domain).await, RunState::Paused(PauseReason::Asked));
    assert_eq!(bench.agreed(&domain, "vda").await, overlay.path);
}

pub async fn a_snapshot_onto_overlays_that_cannot_be_opened_changes_nothing(bench: &dyn Bench) {
    let domain = bench.running().await;
    let before = bench.observe(&domain).await;
    let overlay = bench.overlay(&domain, "vda").await;
    let missing = Layer { path: bench.file(&domain, "missing.qcow2"), format: "qcow2".to_owned() };
    let strange = Layer { path: bench.file(&domain, "strange.qcow2"), format: "qcow2".to_owned() };
    std::fs::write(&strange.path, vec![0x55; 1 << 16]).unwrap();
    for (second, kind) in [(&missing, Trouble::Missing), (&strange, Trouble::Refused)] {
        let take = disks_only(&[("vda", &overlay), ("vdb", second)]);
        let memory = Some(bench.file(&domain, "memory"));
        for take in [Take { memory, ..take.clone() }, take] {
            assert_eq!(trouble(bench.hypervisor().take(&domain.id, &take).await), kind, "{take:?}");
            // QEMU keeps the file open in which it found no image.
            let open = bench.qemu(&domain).await.open;
            assert_eq!(open.contains(&second.path), second == &strange, "{take:?}: {open:?}");
            let files = std::slice::from_ref(&second.path);
            bench.hypervisor().close_unused(&domain.id, files).await.unwrap();
            assert_same(&before, &bench.observe(&domain).await);
        }
        assert!(!bench.file(&domain, "memory").exists(), "no memory is left, {second:?}");
    }
    let gone = disks_only(&[("vdx", &overlay)]);
    assert_eq!(trouble(bench.hypervisor().take(&domain.id, &gone).await), Trouble::Refused);
    assert_same(&before, &bench.observe(&domain).await);
}

pub async fn no_disk_is_moved_onto_the_overlay_that_it_is_on(bench: &dyn Bench) {
    let domain = bench.running().await;
    let commit = bench.moved(&domain).await;
    let before = bench.observe(&domain).await;
    let overlay = Layer { path: commit.overlay, format: "qcow2".to_owned() };
    let again = bench.hypervisor().take(&domain.id, &disks_only(&[("vda", &overlay)])).await;
    assert_eq!(trouble(again), Trouble::Locked);
    assert_same(&before, &bench.observe(&domain).await);
}

/// It was to be one of a guest that ended meanwhile.
pub async fn a_snapshot_of_what_is_off_gives_it_other_files_but_no_memory(bench: &dyn Bench) {
    let domain = bench.domain().await;
    let overlay = bench.overlay(&domain, "vda").await;
    let before = bench.definition(&domain).await;
    let take = disks_only(&[("vda", &overlay)]);
    let memory = Take { memory: Some(bench.file(&domain, "memory")), ..take.clone() };
    assert_eq!(trouble(bench.hypervisor().take(&domain.id, &memory).await), Trouble::Refused);
    assert_eq!(bench.definition(&domain).await, before);
    assert!(!bench.file(&domain, "memory").exists());
    bench.hypervisor().take(&domain.id, &take).await.unwrap();
    assert_eq!(layer_in(&bench.definition(&domain).await, "vda"), overlay);
    assert_eq!(bench.state(&domain).await, RunState::Off);
}
