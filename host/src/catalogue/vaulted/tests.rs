use std::path::PathBuf;
use std::sync::Arc;

use serde_json::json;
use vmkeep_steps::backup::NAME;
use vmkeep_store::MemoryStore;
use vmkeep_workflow::journal::Append;
use vmkeep_workflow::{
    Actor, EventStore as _, IfBusy, JobRequest, JobSummary, Phase, Plan, Seq, StepSpec, StreamId, Subject,
};

use super::super::{Catalogue, STREAM};
use super::*;

const DOMAIN: &str = "00000000-0000-0000-0000-000000000005";

/// A store with journals of backups.
#[derive(Default)]
struct Journals(Arc<MemoryStore>);

impl Journals {
    /// A catalogue as a vmkeepd that has just started has it; its only root is not there.
    fn catalogue(&self) -> Catalogue {
        let root = PathBuf::from("/nonexistent/vmkeep/root");
        Catalogue::new(self.0.clone(), vec![root], Arc::new(|why| panic!("{why}")))
    }

    /// The job of a backup of this instant into a vault, which ends so.
    async fn job(&self, vault: u8, second: i64, committed: bool) -> JobId {
        let request = JobRequest {
            workflow: NAME.into(),
            subject: Subject { id: DOMAIN.into(), label: "web".into() },
            options: json!({}),
            key: None,
            by: Actor::default(),
            if_busy: IfBusy::Refuse,
            limits: vec![],
            retry_of: None,
        };
        let of_domain = json!({ "id": DOMAIN, "name": "web" });
        let commit = json!({ "vault": "home", "domain": of_domain, "read": "read" });
        let steps = vec![
            StepSpec::new("lease", TakeLease::KIND, "take a lease", json!({})),
            StepSpec::new("begin", BeginPull::KIND, "begin", json!({})).after("lease"),
            StepSpec::new("commit", CommitBackup::KIND, "commit", commit).after("begin"),
        ];
        let plan = Plan::new(NAME, 1, "a backup", steps, None, json!(null)).unwrap();
        let done = |step: &'static str, output| Body::StepSucceeded {
            step: step.into(),
            phase: Phase::Forward,
            attempt: 1,
            output,
        };
        let vault = VaultId::new([vault; 16]);
        let at = Timestamp::from_second(second).unwrap();
        let backup = BackupId::now();
        let mut bodies = vec![
            Body::JobRequested(request),
            Body::JobPlanned(Box::new(plan)),
            done("lease", json!({ "lease": "ab".repeat(16), "vault": vault, "disks": [] })),
            done("begin", json!({ "at": at, "socket": "/s", "disks": [] })),
        ];
        if committed {
            bodies.push(done("commit", json!({ "backup": backup, "kind": "full", "checked": true })));
        }
        bodies.push(Body::JobSucceeded);
        let events: Vec<Event> =
            bodies.into_iter().map(|body| Event::new(Timestamp::now(), Default::default(), body)).collect();
        let job = JobId::new();
        let mut summary = JobSummary::first(job, &events[0]).unwrap();
        events[1..].iter().for_each(|event| summary.apply(event));
        let append = Append {
            stream: StreamId::job(job),
            expected: Seq(0),
            records: events.iter().map(|event| serde_json::to_vec(event).unwrap()).collect(),
            summary: Some(summary),
            key: None,
        };
        self.0.append(append).await.unwrap();
        job
    }
}

fn told(found: &[Vaulted]) -> Vec<(u8, i64, String)> {
    found.iter().map(|one| (one.vault.bytes()[0], one.at.as_second(), one.job.clone())).collect()
}

#[tokio::test]
async fn the_last_committed_backup_in_each_vault_is_told_also_when_no_folder_can_be_read() {
    let journals = Journals::default();
    let catalogue = journals.catalogue();
    assert_eq!(catalogue.vaulted().await, (vec![], vec![]));
    journals.job(1, 100, true).await;
    let other = journals.job(2, 150, true).await.to_string();
    let last = journals.job(1, 200, true).await.to_string();
    journals.job(1, 300, false).await;
    assert!(catalogue.view().await.is_err(), "the root is not there");
    let (found, warnings) = catalogue.vaulted().await;
    assert_eq!(told(&found), [(1, 200, last.clone()), (2, 150, other.clone())]);
    assert!(warnings.is_empty() && found[0].vault_name == "home" && found[0].domain_uuid == DOMAIN);
    // What comes later is seen, once.
    let newer = journals.job(2, 250, true).await.to_string();
    for _ in 0..2 {
        assert_eq!(told(&catalogue.vaulted().await.0), [(1, 200, last.clone()), (2, 250, newer.clone())]);
    }
    let history = catalogue.history().await.unwrap().len();
    assert_eq!(history, 4, "one record for each backup");
    assert_eq!(told(&journals.catalogue().vaulted().await.0).len(), 2);
    assert_eq!(catalogue.history().await.unwrap().len(), history, "a new vmkeepd notes nothing twice");
}

#[tokio::test]
async fn what_was_put_into_a_vault_is_known_when_the_history_of_its_job_was_pruned() {
    let journals = Journals::default();
    let job = journals.job(1, 100, true).await.to_string();
    let catalogue = journals.catalogue();
    catalogue.vaulted().await;
    let pruned = Journals::default();
    let records = catalogue.history().await.unwrap().into_iter().map(|record| record.bytes).collect();
    let stream = StreamId::from(STREAM);
    let append = Append { stream, expected: Seq(0), records, summary: None, key: None };
    pruned.0.append(append).await.unwrap();
    assert_eq!(told(&pruned.catalogue().vaulted().await.0), [(1, 100, job)]);
}
