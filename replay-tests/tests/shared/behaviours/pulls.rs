//! Backups that only show the disks, and the checkpoints that are made with them.

use vmkeep_steps::hypervisor::{DomainRef, EXPORT_BITMAP, Pull, PullDisk, Pulling, Shown, Target, Trouble};

use crate::bench::{Bench, PLACE, trouble, until};

/// A pull of both disks; changes of `vda` since that checkpoint, if there is one.
async fn pull(bench: &dyn Bench, domain: &DomainRef, name: &str, since: Option<&str>) -> Pull {
    let socket = bench.hypervisor().socket_folder(&domain.id).await.unwrap().join("pull.nbd");
    let disk = |target: &str, since: Option<&str>| PullDisk {
        target: target.into(),
        scratch: bench.file(domain, &format!("{name}-{target}.scratch")),
        since: since.map(str::to_owned),
        bitmap: target == "vda",
    };
    Pull { socket, checkpoint: Some(name.to_owned()), disks: vec![disk("vda", since), disk("vdb", None)] }
}

async fn begun(bench: &dyn Bench, domain: &DomainRef, name: &str, since: Option<&str>) -> Pull {
    let pull = pull(bench, domain, name, since).await;
    bench.hypervisor().pull_begin(&domain.id, &pull).await.unwrap();
    pull
}

/// Ends it, as libvirt does in its own time.
async fn ended(bench: &dyn Bench, domain: &DomainRef, pull: &Pull) {
    bench.hypervisor().abort_domain_job(&domain.id).await.unwrap();
    gone(bench, domain).await;
    let open = bench.qemu(domain).await.open;
    assert!(pull.disks.iter().all(|disk| !open.contains(&disk.scratch)), "{open:?}");
    for disk in &pull.disks {
        let _ = std::fs::remove_file(&disk.scratch);
    }
}

async fn gone(bench: &dyn Bench, domain: &DomainRef) {
    until("the backup to end", || async { pulling(bench, domain).await.is_nothing().then_some(()) }).await;
}

async fn pulling(bench: &dyn Bench, domain: &DomainRef) -> Pulling {
    bench.hypervisor().pulling(&domain.id).await.unwrap()
}

async fn shown(bench: &dyn Bench, domain: &DomainRef, pull: &Pull, target: &str, changes: bool) -> Shown {
    let instance = bench.qemu(domain).await.instance;
    let export = (pull.socket.as_path(), &Target::from(target));
    bench.hypervisor().open_export(&domain.id, &instance, export, changes).await.unwrap()
}

/// In no order of libvirt's.
async fn checkpoints(bench: &dyn Bench, domain: &DomainRef) -> Vec<String> {
    let mut names = bench.observe(domain).await.checkpoints;
    names.sort();
    names
}

/// The byte in the place, as the pull shows it.
async fn byte(shown: &Shown) -> u8 {
    let part = PLACE..PLACE + 512;
    shown.read(part).await.unwrap()[0]
}

pub async fn a_pull_shows_the_disks_as_they_were_whatever_the_guest_writes(bench: &dyn Bench) {
    let domain = bench.running().await;
    bench.write(&domain, "vda", 0x11).await;
    bench.write(&domain, "vdb", 0x22).await;
    assert!(pulling(bench, &domain).await.is_nothing());
    let pull = begun(bench, &domain, "one", None).await;
    let seen = pulling(bench, &domain).await;
    assert!(seen.is_of(pull.disks.iter().map(|disk| &disk.scratch)), "{seen:?}");
    assert_eq!((seen.exports.len(), seen.jobs.len()), (2, 2), "{seen:?}");
    let open = bench.qemu(&domain).await.open;
    assert!(pull.disks.iter().all(|disk| open.contains(&disk.scratch)), "{open:?}");
    bench.write(&domain, "vda", 0x33).await;
    bench.write(&domain, "vdb", 0x44).await;
    let (a, b) =
        (shown(bench, &domain, &pull, "vda", false).await, shown(bench, &domain, &pull, "vdb", false).await);
    assert_eq!((byte(&a).await, byte(&b).await), (0x11, 0x22));
    assert!(!a.knows_changes() && !b.knows_changes());
    drop((a, b));
    ended(bench, &domain, &pull).await;
    assert_eq!(checkpoints(bench, &domain).await, ["one"]);
    bench.destroy(&domain).await;
}

pub async fn a_pull_since_a_checkpoint_tells_what_has_changed_since(bench: &dyn Bench) {
    let domain = bench.running().await;
    bench.hypervisor().suspend(&domain.id).await.unwrap();
    bench.write(&domain, "vda", 0x11).await;
    let first = begun(bench, &domain, "one", None).await;
    ended(bench, &domain, &first).await;
    let top = bench.own(&domain, "vda").await;
    let bitmaps = bench.hypervisor().bitmaps(&domain.id, &top.path).await.unwrap();
    assert_eq!(bitmaps.iter().map(|bitmap| bitmap.name.as_str()).collect::<Vec<_>>(), ["one"]);
    let second = begun(bench, &domain, "two", Some("one")).await;
    let clean = shown(bench, &domain, &second, "vda", true).await;
    assert!(clean.knows_changes(), "{EXPORT_BITMAP}");
    let all = |shown: Shown| async move { shown.regions(0..shown.size()).await.unwrap() };
    assert!(all(clean).await.iter().all(|region| !region.dirty));
    ended(bench, &domain, &second).await;
    bench.write(&domain, "vda", 0x22).await;
    let third = begun(bench, &domain, "three", Some("one")).await;
    let dirty = all(shown(bench, &domain, &third, "vda", true).await).await;
    assert!(dirty[0].dirty, "{dirty:?}");
    ended(bench, &domain, &third).await;
    assert_eq!(checkpoints(bench, &domain).await, ["one", "three", "two"]);
    bench.destroy(&domain).await;
}

pub async fn a_pull_since_a_checkpoint_that_is_not_there_is_not_begun(bench: &dyn Bench) {
    let domain = bench.running().await;
    let pull = pull(bench, &domain, "one", Some("nobody's")).await;
    let refused = bench.hypervisor().pull_begin(&domain.id, &pull).await;
    assert_eq!(trouble(refused), Trouble::BitmapUnusable);
    assert!(pulling(bench, &domain).await.is_nothing());
    assert!(checkpoints(bench, &domain).await.is_empty());
    bench.destroy(&domain).await;
}

pub async fn checkpoints_are_deleted_one_by_one_while_the_domain_runs(bench: &dyn Bench) {
    let domain = bench.running().await;
    for name in ["one", "two"] {
        let pull = begun(bench, &domain, name, None).await;
        ended(bench, &domain, &pull).await;
    }
    bench.hypervisor().delete_checkpoint(&domain.id, "one").await.unwrap();
    bench.hypervisor().delete_checkpoint(&domain.id, "one").await.unwrap();
    assert_eq!(checkpoints(bench, &domain).await, ["two"]);
    let top = bench.own(&domain, "vda").await;
    let bitmaps = bench.hypervisor().bitmaps(&domain.id, &top.path).await.unwrap();
    assert_eq!(bitmaps.len(), 1);
    bench.write(&domain, "vda", 0x22).await;
    let pull = begun(bench, &domain, "three", Some("two")).await;
    ended(bench, &domain, &pull).await;
    bench.destroy(&domain).await;
    bench.hypervisor().delete_checkpoint(&domain.id, "two").await.unwrap_err();
    assert_eq!(checkpoints(bench, &domain).await, ["three", "two"]);
}

pub async fn bitmaps_outlive_an_end_and_none_a_killed_qemu(bench: &dyn Bench) {
    let domain = bench.running().await;
    let first = begun(bench, &domain, "one", None).await;
    ended(bench, &domain, &first).await;
    bench.destroy(&domain).await;
    bench.start(&domain).await;
    let second = begun(bench, &domain, "two", Some("one")).await;
    ended(bench, &domain, &second).await;
    bench.kill_qemu(&domain).await;
    bench.start(&domain).await;
    let top = bench.own(&domain, "vda").await;
    assert!(bench.hypervisor().bitmaps(&domain.id, &top.path).await.unwrap().is_empty());
    for since in ["one", "two"] {
        let pull = pull(bench, &domain, "three", Some(since)).await;
        assert_eq!(trouble(bench.hypervisor().pull_begin(&domain.id, &pull).await), Trouble::BitmapUnusable);
    }
    assert_eq!(checkpoints(bench, &domain).await, ["one", "two"]);
    for name in ["one", "two"] {
        bench.hypervisor().delete_checkpoint(&domain.id, name).await.unwrap();
    }
    assert!(checkpoints(bench, &domain).await.is_empty());
    bench.destroy(&domain).await;
}

pub async fn as_long_as_a_pull_lasts_there_is_no_other_job(bench: &dyn Bench) {
    let domain = bench.running().await;
    let first = begun(bench, &domain, "one", None).await;
    let job = bench.hypervisor().domain_job(&domain.id).await.unwrap();
    assert!(job.is_some());
    let second = pull(bench, &domain, "two", None).await;
    bench.hypervisor().pull_begin(&domain.id, &second).await.unwrap_err();
    assert!(pulling(bench, &domain).await.is_of(first.disks.iter().map(|disk| &disk.scratch)));
    ended(bench, &domain, &first).await;
    assert!(bench.hypervisor().domain_job(&domain.id).await.unwrap().is_none());
    bench.destroy(&domain).await;
}

pub async fn a_pull_ends_with_qemu(bench: &dyn Bench) {
    let domain = bench.running().await;
    let pull = begun(bench, &domain, "one", None).await;
    let read = shown(bench, &domain, &pull, "vda", false).await;
    bench.kill_qemu(&domain).await;
    read.read(0..512).await.unwrap_err();
    assert!(pulling(bench, &domain).await.is_nothing());
    bench.start(&domain).await;
    assert!(pulling(bench, &domain).await.is_nothing());
    bench.destroy(&domain).await;
}

pub async fn a_pull_goes_on_under_a_new_libvirtd(bench: &dyn Bench) {
    let domain = bench.running().await;
    bench.write(&domain, "vda", 0x11).await;
    let pull = begun(bench, &domain, "one", None).await;
    bench.write(&domain, "vda", 0x22).await;
    let before = pulling(bench, &domain).await;
    bench.restart_libvirtd().await;
    assert_eq!(pulling(bench, &domain).await, before);
    assert_eq!(checkpoints(bench, &domain).await, ["one"]);
    assert_eq!(byte(&shown(bench, &domain, &pull, "vda", false).await).await, 0x11);
    ended(bench, &domain, &pull).await;
    bench.destroy(&domain).await;
}
