use std::sync::Arc;

use vmkeep_vault::backend::memory::Memory;
use vmkeep_vault::backups::{Mark, put_mark};
use vmkeep_vault::ids::DomainId;
use vmkeep_vault::manifest::SourceFile;
use vmkeep_vault::vault::Confirmed;
use vmkeep_vault::write::{Extent, Options, Parts, Readiness};

use super::*;
use crate::hypervisor::Layer;

const DOMAIN: DomainId = DomainId::new([7; 16]);

fn file(inode: u64) -> SourceFile {
    SourceFile { path: "/i/a".into(), file_system: "fs".into(), inode, size: None, changed: None }
}

fn disk(target: &str) -> BackupDisk {
    BackupDisk {
        target: target.into(),
        chain: vec![Layer { path: "/i/a".into(), format: "qcow2".into() }],
        virtual_size: 1 << 20,
        scratch: "/i/s".into(),
        no_bitmap: None,
        files: vec![file(1)],
    }
}

fn input(kind: Asked) -> LeaseInput {
    LeaseInput {
        vault: "main".into(),
        domain: DomainRef {
            id: crate::hypervisor::DomainId(uuid::Uuid::from_bytes([7; 16])),
            name: "web".into(),
        },
        kind,
        disks: vec![disk("vda")],
        full_every_days: 35,
    }
}

/// What a backup in the vault is to say of itself.
struct Said<'a> {
    kind: BackupKind,
    parent: Option<BackupId>,
    checkpoint: Option<&'a str>,
    inode: u64,
    checked: bool,
    taken: Timestamp,
}

impl Default for Said<'_> {
    fn default() -> Self {
        let (kind, taken) = (BackupKind::Full, Timestamp::now());
        Self { kind, parent: None, checkpoint: None, inode: 1, checked: true, taken }
    }
}

async fn vault() -> vmkeep_vault::vault::Vault {
    Confirmed::plain(false).unwrap().put(Arc::new(Memory::default()), None).await.unwrap()
}

/// Makes a backup that says so.
async fn made(vault: &vmkeep_vault::vault::Vault, said: Said<'_>) -> BackupId {
    Box::pin(make(vault, said)).await
}

async fn make(vault: &vmkeep_vault::vault::Vault, said: Said<'_>) -> BackupId {
    let mut session = Box::pin(Session::begin(vault, DOMAIN, Options::default())).await.unwrap();
    let mut source = Parts::new(vec![Extent::Zero(1 << 20)]);
    let image =
        Box::pin(session.write_image(&mut source, 1 << 20, vmkeep_vault::blob::BlobType::Data, None)).await;
    let id = BackupId::now();
    let mut manifest = session.manifest(id, said.taken);
    manifest.kind = said.kind;
    manifest.parent = said.parent;
    manifest.checkpoint = said.checkpoint.map(str::to_owned);
    manifest.disks.push(Disk {
        whole: Some(said.taken),
        bitmap: said.checkpoint.is_some(),
        files: vec![file(said.inode)],
        ..Disk::new("vda", image.unwrap().image, "qcow2")
    });
    let Readiness::Ready(prepared) = Box::pin(session.prepare(&manifest)).await.unwrap() else { panic!() };
    if said.checked {
        session.commit(&prepared).await.unwrap();
    } else {
        let name = prepared.name.to_string();
        vault.backend().put(&name, prepared.object.clone()).await.unwrap();
    }
    session.end().await.unwrap();
    id
}

async fn based(vault: &vmkeep_vault::vault::Vault, kind: Asked, listed: &[&str]) -> Based {
    let backups = Backups::load(vault, Some(DOMAIN)).await.unwrap();
    let listed: Vec<String> = listed.iter().map(|name| (*name).to_owned()).collect();
    choose(&disk("vda"), &input(kind), &newest_first(&backups), &listed, Timestamp::now())
}

#[tokio::test]
async fn the_newest_backup_is_the_one_that_no_other_is_based_on_whatever_clocks_say() {
    let vault = vault().await;
    let hours = |hours: i64| Timestamp::now() + SignedDuration::from_hours(hours);
    let first = made(&vault, Said { taken: hours(5), ..Said::default() }).await;
    let second = made(&vault, Said { parent: Some(first), taken: hours(1), ..Said::default() }).await;
    let third = made(&vault, Said { parent: Some(second), taken: hours(3), ..Said::default() }).await;
    let order: Vec<BackupId> =
        newest_first(&Backups::load(&vault, None).await.unwrap()).iter().map(|one| one.backup).collect();
    assert_eq!(order, [third, second, first]);
}

#[tokio::test]
async fn root_and_checkpoint_are_of_one_backup_the_newest_whose_checkpoint_is_still_listed() {
    let vault = vault().await;
    let first = made(&vault, Said { checkpoint: Some("c1"), ..Said::default() }).await;
    let second = made(&vault, Said { parent: Some(first), checkpoint: Some("c2"), ..Said::default() }).await;
    // Made while the domain was off: it has none.
    let third = made(&vault, Said { parent: Some(second), ..Said::default() }).await;
    let of = |based: &Based| (based.parent.as_ref().unwrap().backup, based.since.clone());
    let since = |name: &str| Some(name.to_owned());
    assert_eq!(of(&based(&vault, Asked::Auto, &["c1", "c2"]).await), (second, since("c2")));
    assert_eq!(of(&based(&vault, Asked::Auto, &["c1"]).await), (first, since("c1")));
    let whole = based(&vault, Asked::Auto, &[]).await;
    assert_eq!(of(&whole), (third, None), "compared with the newest all the same");
    assert!(whole.whole_because.unwrap().contains("libvirt still lists"));
    assert_eq!(of(&based(&vault, Asked::Full, &["c2"]).await), (third, None));
}

#[tokio::test]
async fn nothing_is_based_on_what_is_unchecked_pruned_of_another_file_or_too_old() {
    let vault = vault().await;
    made(&vault, Said { checkpoint: Some("c1"), checked: false, ..Said::default() }).await;
    let none = based(&vault, Asked::Auto, &["c1"]).await;
    assert!(none.parent.is_none() && none.since.is_none(), "{none:?}");
    let other = made(&vault, Said { checkpoint: Some("c2"), inode: 2, ..Said::default() }).await;
    let whole = based(&vault, Asked::Auto, &["c1", "c2"]).await;
    assert_eq!((whole.parent.unwrap().backup, whole.since), (other, None));
    assert!(whole.whole_because.unwrap().contains("another file"));
    let long_ago = Timestamp::now() - SignedDuration::from_hours(24 * 36);
    made(&vault, Said { parent: Some(other), checkpoint: Some("c3"), taken: long_ago, ..Said::default() })
        .await;
    let old = based(&vault, Asked::Auto, &["c3"]).await;
    assert!(old.since.is_none() && old.whole_because.unwrap().contains("35 days"));
    let good = made(&vault, Said { checkpoint: Some("c4"), ..Said::default() }).await;
    assert_eq!(based(&vault, Asked::Auto, &["c4"]).await.since.as_deref(), Some("c4"));
    put_mark(&vault, good, MarkKind::Prune, &Mark::new(Timestamp::now(), "h")).await.unwrap();
    assert!(based(&vault, Asked::Auto, &["c4"]).await.since.is_none());
}

#[tokio::test]
async fn a_differential_is_based_on_the_newest_full_one() {
    let vault = vault().await;
    let full = made(&vault, Said { checkpoint: Some("c1"), ..Said::default() }).await;
    let kind = BackupKind::Incremental;
    made(&vault, Said { kind, parent: Some(full), checkpoint: Some("c2"), ..Said::default() }).await;
    let based = based(&vault, Asked::Differential, &["c1", "c2"]).await;
    assert_eq!((based.parent.unwrap().backup, based.since.as_deref()), (full, Some("c1")));
}

#[tokio::test]
async fn checkpoints_of_disks_that_take_no_part_this_time_are_kept() {
    let vault = vault().await;
    made(&vault, Said { checkpoint: Some("c1"), ..Said::default() }).await;
    let series = newest_first(&Backups::load(&vault, None).await.unwrap());
    assert_eq!(others(&series, &[disk("vdb")]), ["c1"]);
    assert_eq!(others(&series, &[disk("vda")]), Vec::<String>::new());
}
