//! Guests that are saved and loaded.

use vmkeep_steps::hypervisor::{DiskChange, DomainId, Layer, NewIdentity, PauseReason, RunState, Trouble};

use super::definitions::identity;
use crate::bench::{Bench, layer_in, marker, trouble};

pub async fn a_guest_goes_on_where_it_was_saved(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.guest(false).await;
    bench.start(&domain).await;
    let boot = bench.ticks(&domain).await;
    let file = bench.file(&domain, "memory");
    hypervisor.save(&domain.id, &file).await.unwrap();
    assert_eq!(bench.state(&domain).await, RunState::Off);
    // As a backup does: onto overlays, with a chain that is read from the images, and paused.
    let overlays =
        [("vda", bench.overlay(&domain, "vda").await), ("vdb", bench.overlay(&domain, "vdb").await)];
    let disks: Vec<(_, Layer)> = overlays.map(|(target, overlay)| (target.into(), overlay)).into();
    hypervisor.redefine_disks(&domain.id, &DiskChange::Point(disks.clone())).await.unwrap();
    let saved = hypervisor.memory_image_definition(&file).await.unwrap();
    let xml = hypervisor.reloaded_definition(&saved, &disks, &marker()).unwrap();
    hypervisor.start_from_memory(&file, &xml, true).await.unwrap();
    let seen = bench.observe(&domain).await;
    assert_eq!(
        seen.state,
        RunState::Paused(PauseReason::Job),
        "libvirt's reason, though nothing of its own is at work"
    );
    assert_eq!((seen.marker, seen.persistent_marker), (Some(marker()), None));
    assert_eq!(bench.agreed(&domain, "vda").await, disks[0].1.path);
    assert_eq!(seen.qemu.unwrap().disk(&"vda".into()).unwrap().chain.len(), 2);
    assert!(file.exists(), "it is nobody's but ours");
    hypervisor.resume(&domain.id).await.unwrap();
    assert_eq!(bench.ticks(&domain).await, boot, "the same boot goes on");
    bench.destroy(&domain).await;
    bench.start(&domain).await;
    assert_ne!(bench.ticks(&domain).await, boot, "and now another");
    bench.destroy(&domain).await;
}

pub async fn a_saved_guest_is_off_and_its_image_names_its_disks(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    hypervisor.set_marker(&domain.id, &marker()).await.unwrap();
    let file = bench.file(&domain, "memory");
    std::fs::write(&file, b"somebody's").unwrap();
    assert_eq!(trouble(hypervisor.save_memory(&domain.id, &file).await), Trouble::Exists);
    assert_eq!(std::fs::read(&file).unwrap(), b"somebody's");
    assert_eq!(bench.state(&domain).await, RunState::Running);
    std::fs::remove_file(&file).unwrap();
    let running = bench.observe(&domain).await;
    hypervisor.save_memory(&domain.id, &file).await.unwrap();
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.saved, seen.crashed), (RunState::Off, Some(true), false));
    assert_eq!((seen.managed_save, seen.live, seen.qemu), (false, None, None));
    assert_eq!(seen.persistent, running.persistent);
    let xml = hypervisor.memory_image_definition(&file).await.unwrap();
    let held = hypervisor.parse_definition(&xml).unwrap();
    for target in ["vda", "vdb"] {
        assert_eq!(layer_in(&held, target), layer_in(running.live.as_ref().unwrap(), target));
    }
    std::fs::remove_file(&file).unwrap();
    assert_eq!(bench.observe(&domain).await.saved, Some(true), "so it ended, whatever became of the file");
    bench.start(&domain).await;
    bench.destroy(&domain).await;
    assert_eq!(bench.observe(&domain).await.saved, Some(false));
}

pub async fn an_image_that_is_torn_or_missing_is_not_loaded(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    let (file, torn) = (bench.file(&domain, "memory"), bench.file(&domain, "torn"));
    hypervisor.save(&domain.id, &file).await.unwrap();
    let xml = hypervisor.memory_image_definition(&file).await.unwrap();
    // As libvirt leaves it when it is killed: the first word tells.
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[..16].copy_from_slice(b"LibvirtQemudPart");
    std::fs::write(&torn, &bytes).unwrap();
    assert_eq!(trouble(hypervisor.start_from_memory(&torn, &xml, true).await), Trouble::Refused, "torn");
    assert_eq!(trouble(hypervisor.memory_image_definition(&torn).await), Trouble::Refused, "torn");
    std::fs::write(&torn, b"Libvirt").unwrap();
    assert_eq!(trouble(hypervisor.start_from_memory(&torn, &xml, true).await), Trouble::Refused, "no head");
    std::fs::remove_file(&torn).unwrap();
    assert_eq!(trouble(hypervisor.start_from_memory(&torn, &xml, true).await), Trouble::Missing, "missing");
    assert_eq!(trouble(hypervisor.memory_image_definition(&torn).await), Trouble::Missing, "missing");
    assert_eq!(bench.state(&domain).await, RunState::Off);
}

pub async fn an_image_is_loaded_under_its_own_name_alone(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    let file = bench.file(&domain, "memory");
    hypervisor.save(&domain.id, &file).await.unwrap();
    let xml = hypervisor.memory_image_definition(&file).await.unwrap();
    let other = DomainId(uuid::Uuid::from_u128(domain.id.0.as_u128() ^ 1 << 100));
    for (name, id) in [(format!("{} copy", domain.name), domain.id), (domain.name.clone(), other)] {
        let changed = NewIdentity { same: true, ..identity(&name, id) };
        let changed = hypervisor.rewrite_definition(&xml, &changed).unwrap();
        let refused = hypervisor.start_from_memory(&file, &changed, true).await;
        assert_eq!(trouble(refused), Trouble::Refused, "{name} {id}");
        assert_eq!(bench.state(&domain).await, RunState::Off);
    }
    bench.start(&domain).await;
    assert_eq!(trouble(hypervisor.start_from_memory(&file, &xml, true).await), Trouble::Refused, "it runs");
    assert_eq!(bench.state(&domain).await, RunState::Running);
}

pub async fn a_guest_that_was_saved_paused_runs_if_it_is_to_run(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    hypervisor.suspend(&domain.id).await.unwrap();
    let file = bench.file(&domain, "memory");
    hypervisor.save(&domain.id, &file).await.unwrap();
    let xml = hypervisor.memory_image_definition(&file).await.unwrap();
    hypervisor.start_from_memory(&file, &xml, false).await.unwrap();
    assert_eq!(bench.state(&domain).await, RunState::Running);
}

pub async fn a_guest_that_is_defined_no_more_is_loaded_as_a_transient_one(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    let file = bench.file(&domain, "memory");
    hypervisor.save(&domain.id, &file).await.unwrap();
    let xml = hypervisor.memory_image_definition(&file).await.unwrap();
    hypervisor.undefine(&domain.id).await.unwrap();
    hypervisor.start_from_memory(&file, &xml, false).await.unwrap();
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.persistent), (RunState::Running, None));
    bench.destroy(&domain).await;
    assert_eq!(trouble(hypervisor.find(&domain.name).await), Trouble::NoSuchDomain);
}

pub async fn a_copy_of_an_image_under_another_definition_is_another_machine(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    let (file, copy) = (bench.file(&domain, "memory"), bench.file(&domain, "copy"));
    hypervisor.save(&domain.id, &file).await.unwrap();
    let xml = hypervisor.memory_image_definition(&file).await.unwrap();
    let persistent = bench.definition(&domain).await;
    let other = DomainId(uuid::Uuid::from_u128(domain.id.0.as_u128() ^ 1 << 100));
    let mut disks = Vec::new();
    for target in ["vda", "vdb"] {
        let layer = bench.own(&domain, target).await;
        let path = bench.file(&domain, &format!("copy-{target}.{}", layer.format));
        std::fs::copy(&layer.path, &path).unwrap();
        disks.push((target.into(), Layer { path, ..layer }));
    }
    let new = NewIdentity { disks, ..identity(&format!("{} copy", domain.name), other) };
    let rewritten = hypervisor.rewrite_definition(&xml, &new).unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let head = hypervisor.memory_image_head(&file, &rewritten).await.unwrap();
    bytes[..head.len()].copy_from_slice(&head);
    std::fs::write(&copy, bytes).unwrap();
    let defined = hypervisor.rewrite_definition(&persistent.xml, &new).unwrap();
    let other = hypervisor.define_new(&defined).await.unwrap();
    let held = hypervisor.memory_image_definition(&copy).await.unwrap();
    hypervisor.start_from_memory(&copy, &held, true).await.unwrap();
    assert_eq!(bench.state(&other).await, RunState::Paused(PauseReason::Job));
    assert_eq!(bench.agreed(&other, "vda").await, new.disks[0].1.path);
    bench.start(&domain).await;
    assert_eq!(bench.state(&domain).await, RunState::Running, "both at once");
    hypervisor.resume(&other.id).await.unwrap();
    bench.destroy(&other).await;
}

pub async fn a_managed_save_image_is_loaded_by_the_next_start(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    hypervisor.set_hold(&domain.id, &marker()).await.unwrap();
    bench.managed_save(&domain).await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.managed_save, seen.saved), (RunState::Off, true, Some(true)));
    assert_eq!((seen.marker, seen.crashed), (None, false));
    assert_eq!(trouble(hypervisor.undefine(&domain.id).await), Trouble::Refused);
    bench.start(&domain).await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.managed_save), (RunState::Running, false));
    assert_eq!(seen.marker, Some(marker()), "the live definition comes with the memory");
    hypervisor.suspend(&domain.id).await.unwrap();
    bench.managed_save(&domain).await;
    bench.start(&domain).await;
    assert_eq!(bench.state(&domain).await, RunState::Paused(PauseReason::Job), "as it was saved");
}

pub async fn a_managed_save_image_is_set_aside_and_given_back(bench: &dyn Bench) {
    let hypervisor = bench.hypervisor();
    let domain = bench.running().await;
    let aside = bench.file(&domain, "aside");
    assert!(!hypervisor.take_managed_save(&domain.id, &aside).await.unwrap(), "there is none");
    hypervisor.set_hold(&domain.id, &marker()).await.unwrap();
    bench.managed_save(&domain).await;
    assert!(hypervisor.take_managed_save(&domain.id, &aside).await.unwrap());
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.state, seen.managed_save, seen.saved), (RunState::Off, false, Some(true)));
    assert!(!hypervisor.take_managed_save(&domain.id, &aside).await.unwrap(), "no more");
    assert!(aside.exists());
    for _ in 0..2 {
        hypervisor.give_managed_save(&domain.id, &aside).await.unwrap();
        assert!(bench.observe(&domain).await.managed_save);
    }
    bench.start(&domain).await;
    let seen = bench.observe(&domain).await;
    assert_eq!((seen.managed_save, seen.marker), (false, Some(marker())), "it was loaded");
    assert!(aside.exists(), "what was set aside stays");
}
