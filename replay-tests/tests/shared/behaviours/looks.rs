//! What there is to see of a domain, and the plain calls.

use vmkeep_steps::hypervisor::{
    Backing, Commit, Control, DiskChange, DomainId, DomainRef, PauseReason, RunState, Through, Trouble,
};

use crate::bench::{Bench, disks_only, marker, nobody, trouble, until};

pub async fn a_domain_that_is_off_has_nothing_but_its_persistent_definition(bench: &dyn Bench) {
    let domain = bench.domain().await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.domain, seen.state), (domain.clone(), RunState::Off));
    let own = seen.persistent.expect("a persistent definition");
    assert_eq!(own.disks.iter().map(|disk| disk.target.0.as_str()).collect::<Vec<_>>(), ["vda", "vdb"]);
    let formats: Vec<_> = own.disks.iter().map(|disk| disk.format.as_deref()).collect();
    assert_eq!(formats, [Some("qcow2"), Some("raw")]);
    assert!(own.disks.iter().all(|disk| disk.backing == Backing::Probed && disk.mirror.is_none()), "{own:?}");
    assert_eq!((own.devices.agent, own.devices.network_cards), (false, 1));
    assert_eq!((seen.live, seen.qemu, seen.marker, seen.persistent_marker), (None, None, None, None));
    assert_eq!((seen.managed_save, seen.saved, seen.crashed, seen.autostart), (false, None, false, false));
    assert_eq!((seen.snapshots.len(), seen.checkpoints.len()), (0, 0));
    let hypervisor = bench.hypervisor();
    assert_eq!(hypervisor.qemu(&domain.id).await.unwrap(), None);
    assert_eq!(hypervisor.marker(&domain.id).await.unwrap(), None);
    no_stragglers(bench, &domain.id).await;
}

/// A neighbour's call that names no domain, as loading a memory image is one, may be of any, until it returns.
async fn no_stragglers(bench: &dyn Bench, domain: &DomainId) {
    until("no call to be on its way", async || {
        bench.hypervisor().stragglers(domain).await.unwrap().is_none().then_some(())
    })
    .await;
}

pub async fn a_running_domain_has_three_accounts_of_its_disks(bench: &dyn Bench) {
    let domain = bench.running().await;
    for target in ["vda", "vdb"] {
        bench.agreed(&domain, target).await;
    }
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.saved, seen.crashed), (RunState::Running, None, false));
    let (live, qemu) = (seen.live.unwrap(), seen.qemu.unwrap());
    for disk in &live.disks {
        assert_eq!(
            disk.backing,
            Backing::Explicit(Vec::new()),
            "libvirt tells of the chain that it has found"
        );
        let found = qemu.disk(&disk.target).unwrap();
        assert_eq!((found.chain.len(), found.read_only), (1, false));
        assert_eq!(Some(found.chain[0].format.as_str()), disk.format.as_deref());
        assert!(qemu.open.contains(&found.chain[0].path), "{qemu:?}");
    }
    assert_eq!(qemu.jobs, []);
    let own = seen.persistent.unwrap();
    assert!(own.disks.iter().all(|disk| disk.backing == Backing::Probed), "{own:?}");
    let outside = bench.hypervisor().observe_from_outside(&domain.id).await.unwrap();
    assert_eq!(outside.qemu.map(|outside| outside.instance), Some(qemu.instance));
    assert_eq!(bench.hypervisor().control(&domain.id).await.unwrap(), Control::Idle);
    assert_eq!(bench.hypervisor().domain_job(&domain.id).await.unwrap(), None);
    assert_eq!(bench.hypervisor().pull_links(&domain.id).await.unwrap(), 1);
}

pub async fn a_domain_that_was_started_paused_stands_still_because_somebody_asked(bench: &dyn Bench) {
    let domain = bench.domain().await;
    bench.hypervisor().start(&domain.id, true).await.unwrap();
    assert_eq!(bench.state(&domain).await, RunState::Paused(PauseReason::Asked));
    bench.agreed(&domain, "vda").await;
    bench.hypervisor().resume(&domain.id).await.unwrap();
    assert_eq!(bench.state(&domain).await, RunState::Running);
}

pub async fn a_guest_is_suspended_and_resumed_as_often_as_one_likes(bench: &dyn Bench) {
    let domain = bench.running().await;
    for _ in 0..2 {
        bench.hypervisor().suspend(&domain.id).await.unwrap();
        assert_eq!(bench.state(&domain).await, RunState::Paused(PauseReason::Asked));
    }
    for _ in 0..2 {
        bench.hypervisor().resume(&domain.id).await.unwrap();
        assert_eq!(bench.state(&domain).await, RunState::Running);
    }
    bench.hypervisor().suspend(&domain.id).await.unwrap();
    bench.hypervisor().start(&domain.id, false).await.unwrap();
    assert_eq!(bench.state(&domain).await, RunState::Paused(PauseReason::Asked), "it runs already");
}

pub async fn a_domain_is_found_by_name_uuid_or_a_beginning_that_fits_one(bench: &dyn Bench) {
    let domain = bench.domain().await;
    let hypervisor = bench.hypervisor();
    let uuid = domain.id.to_string();
    // So much of it that no other domain begins so.
    let all = hypervisor.domains().await.unwrap();
    let others: Vec<String> = all.iter().filter(|d| **d != domain).map(|d| d.id.to_string()).collect();
    let alone =
        (1..=uuid.len()).find(|n| others.iter().all(|other| !other.starts_with(&uuid[..*n]))).unwrap();
    for word in [domain.name.as_str(), &uuid, &uuid.to_uppercase(), &uuid[..alone]] {
        assert_eq!(hypervisor.find(word).await.unwrap(), domain, "{word}");
    }
    for word in ["", "nobody", &domain.name[..4]] {
        assert_eq!(trouble(hypervisor.find(word).await), Trouble::NoSuchDomain, "{word}");
    }
    assert!(all.contains(&domain));
    assert!(all.is_sorted_by(|a, b| a.name <= b.name), "{all:?}");
}

pub async fn a_domain_that_is_not_there_is_no_such_domain_for_every_call(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let nobody = nobody();
    let xml = bench.definition(&bench.domain().await).await.xml;
    let file = bench.folder().join("nobody");
    assert_eq!(trouble(hypervisor.observe(&nobody).await), Trouble::NoSuchDomain, "observe");
    assert_eq!(trouble(hypervisor.state(&nobody).await), Trouble::NoSuchDomain, "state");
    assert_eq!(trouble(hypervisor.marker(&nobody).await), Trouble::NoSuchDomain, "marker");
    assert_eq!(trouble(hypervisor.qemu(&nobody).await), Trouble::NoSuchDomain, "qemu");
    assert_eq!(trouble(hypervisor.control(&nobody).await), Trouble::NoSuchDomain, "control");
    assert_eq!(trouble(hypervisor.domain_job(&nobody).await), Trouble::NoSuchDomain, "domain_job");
    assert_eq!(trouble(hypervisor.abort_domain_job(&nobody).await), Trouble::NoSuchDomain, "abort");
    no_stragglers(bench, &nobody).await;
    assert_eq!(trouble(hypervisor.set_marker(&nobody, &marker()).await), Trouble::NoSuchDomain, "marker");
    assert_eq!(trouble(hypervisor.set_hold(&nobody, &marker()).await), Trouble::NoSuchDomain, "hold");
    assert_eq!(trouble(hypervisor.clear_marker(&nobody).await), Trouble::NoSuchDomain, "clear");
    assert_eq!(trouble(hypervisor.note(&nobody, &marker()).await), Trouble::NoSuchDomain, "note");
    assert_eq!(trouble(hypervisor.take(&nobody, &disks_only(&[])).await), Trouble::NoSuchDomain, "take");
    assert_eq!(trouble(hypervisor.save(&nobody, &file).await), Trouble::NoSuchDomain, "save");
    assert_eq!(trouble(hypervisor.suspend(&nobody).await), Trouble::NoSuchDomain, "suspend");
    assert_eq!(trouble(hypervisor.resume(&nobody).await), Trouble::NoSuchDomain, "resume");
    assert_eq!(trouble(hypervisor.freeze(&nobody).await), Trouble::NoSuchDomain, "freeze");
    assert_eq!(trouble(hypervisor.thaw(&nobody).await), Trouble::NoSuchDomain, "thaw");
    assert_eq!(trouble(hypervisor.freeze_state(&nobody).await), Trouble::NoSuchDomain, "freeze_state");
    assert_eq!(trouble(hypervisor.start(&nobody, false).await), Trouble::NoSuchDomain, "start");
    assert_eq!(trouble(hypervisor.destroy(&nobody).await), Trouble::NoSuchDomain, "destroy");
    assert_eq!(trouble(hypervisor.shutdown(&nobody).await), Trouble::NoSuchDomain, "shutdown");
    assert_eq!(trouble(hypervisor.set_autostart(&nobody, true).await), Trouble::NoSuchDomain, "autostart");
    assert_eq!(trouble(hypervisor.redefine(&nobody, &xml).await), Trouble::NoSuchDomain, "redefine");
    assert_eq!(
        trouble(hypervisor.take_managed_save(&nobody, &file).await),
        Trouble::NoSuchDomain,
        "managed save"
    );
    hypervisor.undefine(&nobody).await.unwrap();
}

pub async fn what_needs_a_running_guest_says_that_there_is_none(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.domain().await;
    let DomainRef { id, .. } = &domain;
    let (file, overlay) = (bench.file(&domain, "memory"), bench.overlay(&domain, "vda").await);
    let base = bench.own(&domain, "vda").await;
    let commit = Commit {
        target: "vda".into(),
        overlay: overlay.path.clone(),
        base: base.path,
        through: Through::Libvirt,
        bandwidth: 0,
    };
    let point = DiskChange::Point(vec![("vda".into(), overlay.clone())]);
    hypervisor.redefine_disks(id, &point).await.unwrap();
    assert_eq!(trouble(hypervisor.suspend(id).await), Trouble::NotRunning, "suspend");
    assert_eq!(trouble(hypervisor.resume(id).await), Trouble::NotRunning, "resume");
    assert_eq!(trouble(hypervisor.set_hold(id, &marker()).await), Trouble::NotRunning, "hold");
    assert_eq!(trouble(hypervisor.save(id, &file).await), Trouble::NotRunning, "save");
    assert_eq!(trouble(hypervisor.save_memory(id, &file).await), Trouble::NotRunning, "save_memory");
    assert_eq!(trouble(hypervisor.freeze(id).await), Trouble::NotRunning, "freeze");
    assert_eq!(trouble(hypervisor.thaw(id).await), Trouble::NotRunning, "thaw");
    assert_eq!(trouble(hypervisor.freeze_state(id).await), Trouble::NotRunning, "freeze_state");
    let no_chain = trouble(hypervisor.commit_begin(id, &commit).await);
    assert_eq!(
        no_chain,
        Trouble::Refused,
        "libvirt looks for the base first, in a chain that there is only under QEMU"
    );
    assert_eq!(trouble(hypervisor.commit_pivot(id, &commit).await), Trouble::NotRunning, "pivot");
    assert_eq!(trouble(hypervisor.commit_abort(id, &commit).await), Trouble::NotRunning, "abort");
    assert_eq!(trouble(hypervisor.control(id).await), Trouble::NotRunning, "control");
    assert_eq!(trouble(hypervisor.domain_job(id).await), Trouble::NotRunning, "domain_job");
    hypervisor.abort_domain_job(id).await.unwrap();
    hypervisor.close_unused(id, &[commit.overlay]).await.unwrap();
    hypervisor.destroy(id).await.unwrap();
    hypervisor.shutdown(id).await.unwrap();
    assert!(!file.exists());
    assert_eq!(bench.state(&domain).await, RunState::Off);
}

pub async fn to_start_what_runs_and_to_destroy_what_is_off_changes_nothing(bench: &dyn Bench) {
    let domain = bench.running().await;
    let first = bench.qemu(&domain).await;
    bench.hypervisor().start(&domain.id, true).await.unwrap();
    assert_eq!(bench.state(&domain).await, RunState::Running);
    assert_eq!(bench.qemu(&domain).await.instance, first.instance);
    for _ in 0..2 {
        bench.destroy(&domain).await;
        let seen = bench.observe(&domain).await;
        assert_eq!((seen.state, seen.saved, seen.crashed), (RunState::Off, Some(false), false));
    }
}

pub async fn each_start_is_another_qemu(bench: &dyn Bench) {
    let domain = bench.running().await;
    let first = bench.qemu(&domain).await.instance;
    bench.destroy(&domain).await;
    bench.start(&domain).await;
    assert_ne!(bench.qemu(&domain).await.instance, first);
}
