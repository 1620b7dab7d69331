//! Two definitions of one domain, and what may be done to which of them.

use vmkeep_steps::hypervisor::{DiskChange, DomainId, Hold, Marker, NewIdentity, RunState, Target, Trouble};

use crate::bench::{Bench, layer_in, marker, trouble};

/// Another machine of the same making.
pub fn identity(name: &str, id: DomainId) -> NewIdentity {
    NewIdentity {
        name: name.to_owned(),
        id,
        mac_seed: None,
        disks: Vec::new(),
        without: Vec::new(),
        links_down: false,
        same: false,
        nvram: None,
    }
}

pub async fn disks_are_pointed_elsewhere_in_the_persistent_definition_alone(bench: &dyn Bench) {
    let domain = bench.running().await;
    let (own, overlay) = (bench.own(&domain, "vda").await, bench.overlay(&domain, "vda").await);
    let before = bench.observe(&domain).await;
    let change = DiskChange::Point(vec![("vda".into(), overlay.clone())]);
    bench.hypervisor().redefine_disks(&domain.id, &change).await.unwrap();
    let after = bench.observe(&domain).await;
    let persistent = after.persistent.unwrap();
    assert_eq!(layer_in(&persistent, "vda"), overlay);
    assert_eq!(persistent.disk(&"vdb".into()), before.persistent.unwrap().disk(&"vdb".into()));
    assert_eq!((after.live, after.qemu), (before.live, before.qemu));
    bench.destroy(&domain).await;
    bench.start(&domain).await;
    assert_eq!(bench.agreed(&domain, "vda").await, overlay.path);
    let chain = bench.qemu(&domain).await.disk(&"vda".into()).unwrap().chain.clone();
    assert_eq!(chain, [overlay, own], "the chain is read from the image");
}

pub async fn disks_get_back_exactly_what_a_definition_says_of_them(bench: &dyn Bench) {
    let domain = bench.domain().await;
    let overlay = bench.overlay(&domain, "vda").await;
    let before = bench.definition(&domain).await;
    bench.hypervisor().set_marker(&domain.id, &marker()).await.unwrap();
    let there = DiskChange::Point(vec![("vda".into(), overlay)]);
    let back = DiskChange::LikeIn { xml: before.xml.clone(), targets: vec!["vda".into()] };
    for change in [there, back] {
        bench.hypervisor().redefine_disks(&domain.id, &change).await.unwrap();
        let seen = bench.observe(&domain).await;
        assert_eq!(seen.persistent_marker, Some(marker()), "what is no disk stays");
    }
    bench.hypervisor().clear_marker(&domain.id).await.unwrap();
    let after = bench.definition(&domain).await;
    assert_eq!((after.disks, after.bare), (before.disks, before.bare));
}

pub async fn a_replaced_definition_counts_from_the_next_start(bench: &dyn Bench) {
    let domain = bench.running().await;
    let before = bench.observe(&domain).await;
    let old = before.persistent.unwrap();
    bench.hypervisor().redefine(&domain.id, &bench.altered(&old.xml)).await.unwrap();
    let after = bench.observe(&domain).await;
    let new = after.persistent.unwrap();
    assert_ne!(new.bare, old.bare);
    assert_eq!((after.live, after.qemu), (before.live.clone(), before.qemu));
    bench.destroy(&domain).await;
    bench.start(&domain).await;
    let last = bench.observe(&domain).await;
    assert_ne!(last.live.unwrap().bare, before.live.unwrap().bare);
    assert_eq!(last.persistent.unwrap(), new);
}

pub async fn a_definition_cannot_rename_its_domain(bench: &dyn Bench) {
    let domain = bench.domain().await;
    let before = bench.definition(&domain).await;
    let renamed = NewIdentity { same: true, ..identity(&format!("{} renamed", domain.name), domain.id) };
    let renamed = bench.hypervisor().rewrite_definition(&before.xml, &renamed).unwrap();
    let refused = trouble(bench.hypervisor().redefine(&domain.id, &renamed).await);
    assert_eq!(refused, Trouble::Refused);
    assert_eq!(bench.definition(&domain).await, before);
}

pub async fn a_marker_is_in_both_definitions_and_a_hold_ends_with_the_guest(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    hypervisor.set_marker(&domain.id, &marker()).await.unwrap();
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.marker, seen.persistent_marker), (Some(marker()), Some(marker())));
    let held = Marker { hold: Some(Hold::Suspended), ..marker() };
    hypervisor.set_hold(&domain.id, &held).await.unwrap();
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.marker, seen.persistent_marker), (Some(held.clone()), Some(marker())));
    assert_eq!(hypervisor.marker(&domain.id).await.unwrap(), Some(held));
    bench.destroy(&domain).await;
    assert_eq!(hypervisor.marker(&domain.id).await.unwrap(), Some(marker()));
    bench.start(&domain).await;
    assert_eq!(bench.observe(&domain).await.marker, Some(marker()), "it starts with the persistent one");
    for _ in 0..2 {
        hypervisor.clear_marker(&domain.id).await.unwrap();
        let seen = bench.observe(&domain).await;
        assert_eq!((seen.marker, seen.persistent_marker), (None, None));
    }
}

pub async fn a_note_is_in_the_persistent_definition_alone(bench: &dyn Bench) {
    let domain = bench.running().await;
    let noted = Marker { hold: Some(Hold::Resumed), ..marker() };
    bench.hypervisor().note(&domain.id, &noted).await.unwrap();
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.marker, seen.persistent_marker), (None, Some(noted)));
}

pub async fn what_a_job_changes_does_not_make_another_definition(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.domain().await;
    let before = bench.definition(&domain).await;
    let overlay = bench.overlay(&domain, "vda").await;
    hypervisor.set_marker(&domain.id, &marker()).await.unwrap();
    assert_eq!(bench.definition(&domain).await.bare, before.bare);
    let point = DiskChange::Point(vec![("vda".into(), overlay)]);
    hypervisor.redefine_disks(&domain.id, &point).await.unwrap();
    let changed = bench.definition(&domain).await;
    assert_eq!(changed.bare, before.bare);
    let marked = hypervisor.with_marker(&before.xml, &marker()).unwrap();
    assert_eq!(hypervisor.parse_definition(&marked).unwrap().bare, before.bare);
    hypervisor.redefine(&domain.id, &bench.altered(&changed.xml)).await.unwrap();
    assert_ne!(bench.definition(&domain).await.bare, before.bare);
}

pub async fn a_name_or_a_uuid_that_is_taken_is_not_defined_again(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.domain().await;
    hypervisor.set_marker(&domain.id, &marker()).await.unwrap();
    let before = bench.definition(&domain).await;
    let other = DomainId(uuid::Uuid::from_u128(domain.id.0.as_u128() ^ 1 << 100));
    let define = |name: &str, id: DomainId| {
        let xml = hypervisor.rewrite_definition(&before.xml, &identity(name, id)).unwrap();
        async move { hypervisor.define_new(&xml).await }
    };
    let name = format!("{} copy", domain.name);
    assert_eq!(trouble(define(&domain.name, domain.id).await), Trouble::Exists);
    assert_eq!(trouble(define(&domain.name, other).await), Trouble::Exists);
    assert_eq!(trouble(define(&name, domain.id).await), Trouble::Exists);
    assert_eq!(bench.definition(&domain).await, before);
    let copy = define(&name, other).await.unwrap();
    assert_eq!((&copy.name, copy.id), (&name, other));
    let seen = bench.observe(&copy).await;
    assert_eq!(
        (seen.state, seen.saved, seen.persistent_marker),
        (RunState::Off, None, None),
        "no marker of ours"
    );
    assert_eq!(layer_in(&seen.persistent.unwrap(), "vda"), layer_in(&before, "vda"));
    hypervisor.undefine(&other).await.unwrap();
}

pub async fn a_domain_that_runs_is_not_undefined_and_one_that_is_off_is(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    let image = bench.own(&domain, "vda").await;
    assert_eq!(trouble(hypervisor.undefine(&domain.id).await), Trouble::Busy);
    assert_eq!(bench.state(&domain).await, RunState::Running);
    bench.agreed(&domain, "vda").await;
    bench.destroy(&domain).await;
    for _ in 0..2 {
        hypervisor.undefine(&domain.id).await.unwrap();
    }
    assert_eq!(trouble(hypervisor.find(&domain.name).await), Trouble::NoSuchDomain);
    assert!(image.path.exists(), "and nothing but it");
}

pub async fn a_domain_that_an_operator_undefines_while_it_runs_lives_as_long_as_its_qemu(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    bench.undefine(&domain).await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.persistent), (RunState::Running, None));
    assert!(seen.live.is_some() && seen.qemu.is_some());
    hypervisor.set_marker(&domain.id, &marker()).await.unwrap();
    assert_eq!(hypervisor.marker(&domain.id).await.unwrap(), Some(marker()));
    assert_eq!(trouble(hypervisor.set_autostart(&domain.id, true).await), Trouble::Refused, "autostart");
    hypervisor.clear_marker(&domain.id).await.unwrap();
    let held = Marker { hold: Some(Hold::Suspended), ..marker() };
    hypervisor.set_hold(&domain.id, &held).await.unwrap();
    assert_eq!(hypervisor.marker(&domain.id).await.unwrap(), Some(held));
    hypervisor.destroy(&domain.id).await.unwrap();
    assert_eq!(trouble(hypervisor.observe(&domain.id).await), Trouble::NoSuchDomain);
}

pub async fn autostart_is_seen_and_taken_back(bench: &dyn Bench) {
    let domain = bench.domain().await;
    for on in [true, true, false, false] {
        bench.hypervisor().set_autostart(&domain.id, on).await.unwrap();
        assert_eq!(bench.observe(&domain).await.autostart, on);
    }
    assert_eq!(bench.definition(&domain).await.file(&Target::from("vdx")), None);
}
