//! Overlays on their way back into their bases.

use tokio_util::sync::CancellationToken;
use vmkeep_steps::hypervisor::{
    Backing, BlockJobKind, Commit, DiskChange, Layer, Mirror, PauseReason, RunState, Trouble,
};

use crate::bench::{Bench, assert_same, byte_in, layer_in, trouble};

fn qcow2(path: &std::path::Path) -> Layer {
    Layer { path: path.to_owned(), format: "qcow2".to_owned() }
}

pub async fn a_commit_is_begun_gets_ready_and_moves_everybody_back(bench: &dyn Bench) {
    let domain = bench.running().await;
    let first = bench.definition(&domain).await;
    let commit = bench.moved(&domain).await;
    bench.write(&domain, "vda", 0x33).await;
    bench.ready(&domain, &commit).await;
    let seen = bench.observe(&domain).await;
    let qemu = seen.qemu.unwrap();
    assert_eq!(qemu.jobs.len(), 1);
    assert_eq!((qemu.jobs[0].kind, &qemu.jobs[0].error), (BlockJobKind::Commit, &None));
    assert_eq!(qemu.jobs[0].target.as_ref(), Some(&commit.target));
    assert_eq!(qemu.top(&commit.target), Some(commit.overlay.as_path()));
    let live = seen.live.unwrap();
    assert_eq!(live.disk(&commit.target).unwrap().mirror, Some(Mirror::Ready));
    assert_eq!(layer_in(&live, "vda").path, commit.overlay);
    assert_eq!(layer_in(&seen.persistent.unwrap(), "vda").path, commit.overlay);
    // What is written from here on goes to both.
    bench.write(&domain, "vda", 0x44).await;
    bench.hypervisor().commit_pivot(&domain.id, &commit).await.unwrap();
    assert_eq!(bench.agreed(&domain, "vda").await, commit.base);
    let seen = bench.observe(&domain).await;
    let qemu = seen.qemu.unwrap();
    assert_eq!((qemu.jobs.len(), seen.state), (0, RunState::Running));
    assert_eq!(qemu.disk(&commit.target).unwrap().chain, [qcow2(&commit.base)]);
    assert!(!qemu.open.contains(&commit.overlay), "{:?}", qemu.open);
    let live = seen.live.unwrap();
    let disk = live.disk(&commit.target).unwrap();
    assert_eq!((disk.mirror, &disk.backing), (None, &Backing::Explicit(Vec::new())));
    let persistent = seen.persistent.unwrap();
    assert_eq!(
        persistent.disk(&commit.target).unwrap().backing,
        Backing::Probed,
        "libvirt found it out itself"
    );
    assert_eq!((layer_in(&persistent, "vda"), persistent.bare), (layer_in(&first, "vda"), first.bare));
    bench.hypervisor().sync_definitions().await.unwrap();
    bench.write(&domain, "vda", 0x55).await;
    assert_eq!(byte_in(&qcow2(&commit.base)), 0x55);
}

/// A linked clone: its image stands on another by its header alone.
pub async fn a_chain_that_nobody_wrote_down_is_not_written_down_by_a_commit(bench: &dyn Bench) {
    let domain = bench.domain().await;
    let template = bench.own(&domain, "vda").await;
    let clone = bench.overlay_on(template.clone(), &format!("{}-clone", domain.name)).await;
    let point = DiskChange::Point(vec![("vda".into(), clone.clone())]);
    bench.hypervisor().redefine_disks(&domain.id, &point).await.unwrap();
    let before = bench.definition(&domain).await;
    bench.start(&domain).await;
    let commit = bench.moved(&domain).await;
    let seen = bench.observe(&domain).await;
    let below = seen.qemu.unwrap().disk(&commit.target).unwrap().chain[1..].to_vec();
    assert_eq!(below, [clone.clone(), template.clone()]);
    assert_eq!(seen.live.unwrap().disk(&commit.target).unwrap().backing, Backing::Explicit(below));
    let moved = seen.persistent.unwrap();
    assert_eq!(moved.disk(&commit.target).unwrap().backing, Backing::Explicit(vec![clone.clone()]));
    bench.ready(&domain, &commit).await;
    bench.hypervisor().commit_pivot(&domain.id, &commit).await.unwrap();
    let seen = bench.observe(&domain).await;
    assert_eq!(seen.persistent.unwrap().disks, before.disks);
    let live = seen.live.unwrap();
    assert_eq!(live.disk(&commit.target).unwrap().backing, Backing::Explicit(vec![template]));
    assert_eq!(bench.agreed(&domain, "vda").await, clone.path);
}

pub async fn a_commit_that_is_given_up_leaves_the_guest_on_its_overlay(bench: &dyn Bench) {
    let domain = bench.running().await;
    let commit = bench.moved(&domain).await;
    bench.write(&domain, "vda", 0x33).await;
    let before = bench.observe(&domain).await;
    bench.ready(&domain, &commit).await;
    for _ in 0..2 {
        bench.hypervisor().commit_abort(&domain.id, &commit).await.unwrap();
        crate::bench::until("the job to be gone", || async {
            bench.qemu(&domain).await.jobs.is_empty().then_some(())
        })
        .await;
    }
    let after = bench.observe(&domain).await;
    assert_eq!((after.live, after.persistent), (before.live, before.persistent));
    assert_eq!(after.qemu.unwrap().disks, before.qemu.unwrap().disks);
    bench.write(&domain, "vda", 0x66).await;
    assert_eq!(byte_in(&qcow2(&commit.overlay)), 0x66);
    // And it may be begun anew.
    bench.ready(&domain, &commit).await;
    bench.hypervisor().commit_pivot(&domain.id, &commit).await.unwrap();
    assert_eq!(byte_in(&qcow2(&commit.base)), 0x66);
}

pub async fn a_commit_is_begun_once_and_not_pivoted_before_it_is_ready(bench: &dyn Bench) {
    let domain = bench.running().await;
    let hypervisor = bench.hypervisor();
    let home = bench.own(&domain, "vdb").await;
    let none = Commit { target: "vdb".into(), overlay: home.path.clone(), ..bench.moved(&domain).await };
    assert_eq!(trouble(hypervisor.commit_pivot(&domain.id, &none).await), Trouble::Refused, "no job");
    hypervisor.commit_abort(&domain.id, &none).await.unwrap();
    let overlay = bench.qemu(&domain).await.top(&"vda".into()).unwrap().to_owned();
    let slow = Commit { target: "vda".into(), overlay, bandwidth: 1024, ..none };
    bench.write_much(&domain, "vda", 0x33).await;
    hypervisor.commit_begin(&domain.id, &slow).await.unwrap();
    let qemu = bench.qemu(&domain).await;
    let job = qemu.job(&slow.target).expect("it is there when the call returns");
    assert!(!job.ready && job.done < job.total, "{job:?}");
    let live = bench.observe(&domain).await.live.unwrap();
    assert_eq!(live.disk(&slow.target).unwrap().mirror, Some(Mirror::Running));
    assert_eq!(trouble(hypervisor.commit_pivot(&domain.id, &slow).await), Trouble::Busy, "not ready");
    assert_eq!(trouble(hypervisor.commit_begin(&domain.id, &slow).await), Trouble::Busy, "once more");
    assert_eq!(bench.qemu(&domain).await.jobs.len(), 1);
    hypervisor.commit_abort(&domain.id, &slow).await.unwrap();
}

pub async fn a_paused_guest_is_committed_and_stays_paused(bench: &dyn Bench) {
    let domain = bench.running().await;
    let commit = bench.moved(&domain).await;
    bench.write(&domain, "vda", 0x33).await;
    bench.hypervisor().suspend(&domain.id).await.unwrap();
    bench.ready(&domain, &commit).await;
    bench.hypervisor().commit_pivot(&domain.id, &commit).await.unwrap();
    assert_eq!(bench.state(&domain).await, RunState::Paused(PauseReason::Asked));
    assert_eq!(bench.agreed(&domain, "vda").await, commit.base);
    assert_eq!(byte_in(&qcow2(&commit.base)), 0x33);
}

pub async fn a_base_that_somebody_holds_is_not_committed_into(bench: &dyn Bench) {
    let domain = bench.running().await;
    let commit = bench.moved(&domain).await;
    bench.write(&domain, "vda", 0x33).await;
    let before = bench.observe(&domain).await;
    let held = bench.hold_to_read(&qcow2(&commit.base)).await;
    let refused = bench.hypervisor().commit_begin(&domain.id, &commit).await;
    assert_eq!(trouble(refused), Trouble::Locked);
    assert_same(&before, &bench.observe(&domain).await);
    drop(held);
    bench.ready(&domain, &commit).await;
    bench.hypervisor().commit_pivot(&domain.id, &commit).await.unwrap();
}

pub async fn a_commit_ends_with_qemu_and_the_chain_is_whole(bench: &dyn Bench) {
    let domain = bench.running().await;
    let commit = bench.moved(&domain).await;
    bench.write(&domain, "vda", 0x33).await;
    bench.ready(&domain, &commit).await;
    bench.kill_qemu(&domain).await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.crashed), (RunState::Off, true));
    assert_eq!(layer_in(&seen.persistent.unwrap(), "vda").path, commit.overlay);
    assert_eq!(byte_in(&qcow2(&commit.overlay)), 0x33);
    bench.start(&domain).await;
    assert_eq!(bench.agreed(&domain, "vda").await, commit.overlay);
    assert_eq!(bench.qemu(&domain).await.jobs, []);
    bench.ready(&domain, &commit).await;
    bench.hypervisor().commit_pivot(&domain.id, &commit).await.unwrap();
    assert_eq!(byte_in(&qcow2(&commit.base)), 0x33);
}

pub async fn what_is_off_is_committed_by_a_helper_and_what_runs_is_not(bench: &dyn Bench) {
    let domain = bench.running().await;
    let commit = bench.moved(&domain).await;
    bench.write(&domain, "vda", 0x33).await;
    let (overlay, base) = (qcow2(&commit.overlay), qcow2(&commit.base));
    let go = CancellationToken::new();
    let storage = bench.storage();
    assert_eq!(trouble(storage.commit_offline(&overlay, &base, &go).await), Trouble::Locked);
    bench.destroy(&domain).await;
    let held = bench.hold(&base).await;
    assert_eq!(trouble(storage.commit_offline(&overlay, &base, &go).await), Trouble::Locked);
    drop(held);
    assert_ne!(byte_in(&base), 0x33);
    storage.commit_offline(&overlay, &base, &go).await.unwrap();
    assert_eq!(byte_in(&base), 0x33);
    let emptied = storage.inspect(&overlay).await.unwrap().unwrap();
    assert!(emptied.empty);
    assert_eq!(byte_in(&overlay), 0x33, "it reads as its base does");
    assert!(storage.remove(&overlay.path, emptied.id).await.unwrap());
    assert!(!storage.remove(&overlay.path, emptied.id).await.unwrap());
    let stopped = CancellationToken::new();
    stopped.cancel();
    let again = bench.overlay(&domain, "vdb").await;
    let home = bench.own(&domain, "vdb").await;
    assert_eq!(trouble(storage.commit_offline(&again, &home, &stopped).await), Trouble::Cancelled);
}
