//! What cannot be, or should not, is said before anything is touched.

use vmkeep_vault::backups::{Hurt, Mark, put_mark};
use vmkeep_vault::marks;
use vmkeep_vault::names::MarkKind;

use super::*;
use crate::codes::assert_told;

impl Host {
    async fn refused(&self, more: Value) -> Fault {
        let before = self.everything();
        let (view, _) = self.restore(&more).await;
        let fault = view.summary.fault.unwrap_or_else(|| panic!("{more} was carried out"));
        assert_eq!(view.summary.status, JobStatus::Refused, "{fault}");
        assert_eq!(self.everything(), before, "a refused restore touched something");
        assert!(self.nobody_reads().await);
        fault
    }

    async fn succeeds(&self, more: Value) {
        let (view, _) = self.restore(&more).await;
        assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_with_its_code_and_nothing_is_touched() {
    let host = Host::new().await;
    let original = DomainId(uuid::Uuid::from_bytes([0x11; 16]));
    host.hypervisor.inner().defined.insert(original, DEFINITION.to_owned());
    std::fs::write(host.at("images/taken"), "mine").unwrap();
    for (more, code) in [
        (json!({ "name": "web 01" }), codes::DOMAIN_EXISTS),
        (json!({ "name": "a/b" }), codes::USAGE),
        (json!({ "folder": "/tmp" }), codes::TARGET_OUTSIDE_ROOTS),
        (json!({ "folder": null }), codes::USAGE),
        (json!({ "disks": { "vdz": "/x" } }), codes::NO_SUCH_DISK),
        (json!({ "disks": { "vda": host.at("images/taken") } }), codes::BACKUP_EXISTS),
        (
            json!({ "disks": { "vda": host.at("images/s"), "vdb": host.at("images/s") } }),
            codes::BACKUP_EXISTS,
        ),
        (json!({ "backup": BackupId::now() }), codes::NO_SUCH_BACKUP),
        (json!({ "domain": VaultDomain::new([7; 16]) }), codes::NO_SUCH_BACKUP),
        (json!({ "surprise": 1 }), codes::USAGE),
    ] {
        assert_eq!(host.refused(more.clone()).await.code, code, "{more}");
    }
    assert_eq!(std::fs::read(host.at("images/taken")).unwrap(), b"mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_nobody_answers_for_is_restored_only_if_that_is_asked_for() {
    let (host, manifest, mut session) = Box::pin(Host::written(true, DEFINITION, &[])).await;
    let Readiness::Ready(prepared) = session.prepare(&manifest).await.unwrap() else { panic!() };
    host.vault.backend().put(&prepared.name.to_string(), prepared.object.clone()).await.unwrap();
    let id = host.backup.to_string();
    drop(session.end().await);
    let fault = host.refused(json!({})).await;
    assert_told(&fault, codes::BACKUP_NOT_SURE, &id);
    assert!(fault.cause.contains("unchecked") && fault.remedy.contains("--unchecked"), "{fault}");
    host.succeeds(json!({ "unchecked": true })).await;

    let host = Host::new().await;
    marks::prune(&host.vault, host.backup, "somebody").await.unwrap();
    let fault = host.refused(json!({})).await;
    assert_told(&fault, codes::BACKUP_NOT_SURE, &host.backup.to_string());
    assert!(fault.cause.contains("pruned"), "{fault}");
    host.succeeds(json!({ "unchecked": true })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_a_check_has_found_hurt_is_refused_with_the_disk_and_its_bytes() {
    let host = Host::new().await;
    let hurt = Hurt { image: "vdb".to_owned(), ranges: vec![(65536, 131_072)], open_ended: false };
    let mark = Mark { hurt: vec![hurt], ..Mark::new(Timestamp::UNIX_EPOCH, "a check") };
    put_mark(&host.vault, host.backup, MarkKind::Hurt, &mark).await.unwrap();
    let fault = host.refused(json!({})).await;
    assert_told(&fault, codes::VAULT_DAMAGED, &host.backup.to_string());
    assert!(fault.cause.contains("of vdb bytes 65536..131072"), "{fault}");
    assert!(fault.remedy.contains("vmkeep vault repair main"), "{fault}");
    host.succeeds(json!({ "unchecked": true })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_from_a_vault_that_anybody_may_have_written_must_be_answered_for() {
    let shared = format!("{DEFINITION}disk=vdc raw /etc/shadow\n");
    let open = Host::with(false, &shared, &[]).await;
    let fault = open.refused(json!({})).await;
    assert_eq!(fault.code, codes::DEFINITION_NOT_TRUSTED);
    assert!(fault.cause.contains("/etc/shadow"), "{fault}");
    open.succeeds(json!({ "trusted": true })).await;
    Host::with(true, &shared, &[]).await.succeeds(json!({})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_pruned_after_the_plan_is_found_out_before_anything_is_made() {
    let host = Host::new().await;
    let engine = host.engine(Arc::new(MemoryStore::new()));
    engine.recover().await.unwrap();
    let (request, _) = request(host.options(&json!({})));
    let plan = engine.dry_run(request.clone()).await.unwrap();
    let recipe = engine.registry().find_workflow(&workflow::NAME.into()).unwrap();
    let outputs = vmkeep_workflow::Outputs::default();
    let differs = async || recipe.check_facts(&plan, &"folder/0".into(), &outputs).await.unwrap();
    assert_eq!(differs().await, None);
    let path = host.at("images/new/place/copy%20of%20web-vdb.raw");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "mine").unwrap();
    assert!(differs().await.unwrap().contains("exists now"));
    std::fs::remove_file(&path).unwrap();
    marks::prune(&host.vault, host.backup, "somebody").await.unwrap();
    assert!(differs().await.unwrap().contains("pruned"));
}
